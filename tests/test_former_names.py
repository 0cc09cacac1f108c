"""Names of the version before: each is the thing that it was, and says once what it is called now."""

import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from lens_positions.former_names import MODULES, NAMES

ROOT = Path(__file__).parents[1]

PACKAGE = {former: name for former, name in MODULES.items() if not former.startswith("training.")}
CHECKOUT = {former: name for former, name in MODULES.items() if former.startswith("training.")}


def warned(caught: list[warnings.WarningMessage], former: str) -> list[str]:
    """The sentences of deprecation about a name."""
    own = [w for w in caught if issubclass(w.category, DeprecationWarning)]
    return [str(w.message) for w in own if f"{former} is called" in str(w.message)]


@pytest.mark.parametrize("former", PACKAGE)
def test_a_module_by_its_former_name_is_the_module_and_warns_once(former: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, former, raising=False)
    module = importlib.import_module(PACKAGE[former])
    spec = module.__spec__
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert importlib.import_module(former) is module
        assert importlib.import_module(former) is module
    assert warned(caught, former) == [
        f"{former} is called {PACKAGE[former]} now; the former name goes with version 0.3.0."
    ]
    assert module.__spec__ is spec
    assert module.__name__ == PACKAGE[former]


@pytest.mark.parametrize("former", NAMES)
def test_a_function_by_its_former_name_is_the_function_and_warns_once(former: str) -> None:
    owner, _, name = former.rpartition(".")
    module = importlib.import_module(owner)
    vars(module).pop(name, None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert getattr(module, name) is getattr(module, NAMES[former])
        assert getattr(module, name) is getattr(module, NAMES[former])
    assert warned(caught, former) == [
        f"{former} is called {owner}.{NAMES[former]} now; the former name goes with version 0.3.0."
    ]


def test_a_name_that_never_was_is_no_attribute() -> None:
    for module in ("lens_positions", "lens_positions.analysis", "lens_positions.measure.corpus_reader"):
        with pytest.raises(AttributeError, match="attracted"):
            _ = importlib.import_module(module).attracted


@pytest.mark.slow
def test_modules_of_training_work_in_a_checkout_and_warnings_point_at_the_import() -> None:
    program = """
import importlib, json, sys, warnings
import training
result = {}
for former, name in json.loads(sys.argv[1]).items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        same = importlib.import_module(former) is importlib.import_module(name)
        importlib.import_module(former)
    result[former] = [same, sum(f"{former} is called {name} now" in str(w.message) for w in caught)]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import lens_positions.hooked
assert [w.filename for w in caught if "is called lens_positions.model now" in str(w.message)] == ["<string>"]
import lens_positions.training
result["training"] = [training is lens_positions.training, 1]
print(json.dumps(result))
"""
    words = [sys.executable, "-c", program, json.dumps(CHECKOUT)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found == {former: [True, 1] for former in [*CHECKOUT, "training"]}


def test_a_method_by_its_former_name_records_and_warns(tiny_model) -> None:
    model = tiny_model(source="shared")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with model.position_streams.recorded() as increments:
            model("The cat")
    assert warned(caught, "PositionStreams.recorded")
    assert len(increments) == len(model.position_layers)
