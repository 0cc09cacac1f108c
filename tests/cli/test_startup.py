"""What is imported when: nothing heavy for help and refusals, and every name there when it is asked for."""

import ast
import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import experiments.measure
import experiments.rope_measures
import lens_positions as lp
from experiments import options
from lens_positions import analysis, causal, training, viz
from lens_positions.training.commands import FORMER_COMMANDS

ROOT = Path(__file__).parents[2]
PACKAGES = [lp, analysis, causal, training, viz]
app = importlib.import_module("lens_positions.cli.app")
HEAVY = {
    "accelerate", "circuitsvis", "datasets", "jaxtyping", "matplotlib", "numpy", "pandas", "peft", "safetensors",
    "scipy", "sklearn", "tokenizers", "torch", "transformer_lens", "transformers", "wandb",
}  # fmt: skip

IN_ONE_PROCESS = """
import contextlib, io, json, sys
codes, said = [], []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            codes.append(main(arguments))
        except SystemExit as exit:
            codes.append(exit.code)
    said.append(out.getvalue() + err.getvalue())
print(json.dumps([codes, said, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def run(code: str, *arguments: str) -> str:
    """What a fresh Python prints."""
    environment = {name: value for name, value in os.environ.items() if name != "EAGER_IMPORT"} | {"COLUMNS": "100"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout


def commands(main: str, *lines: list[str]) -> tuple[list[int], list[str], set[str]]:
    """The exit status and the words of each of these command lines in one process, and the libraries it imported."""
    codes, said, imported = json.loads(run(f"from {main} import main\n{IN_ONE_PROCESS}", json.dumps(lines)))
    return codes, said, set(imported)


def names_of(package: ModuleType) -> list[str]:
    return sorted(package.__all__)


def test_importing_the_packages_imports_no_library():
    code = "import sys, lens_positions, lens_positions.analysis, lens_positions.causal, lens_positions.viz\n"
    code += "print(*{name.partition('.')[0] for name in sys.modules})"
    imported = set(run(code).split())
    assert "lens_positions" in imported
    assert not imported & HEAVY


def test_a_position_config_needs_no_torch():
    imported = run("import sys, lens_positions as lp; lp.PositionModelConfig(n_layers=1); print(*sys.modules)").split()
    assert "lens_positions.config" in imported
    assert not set(imported) & HEAVY


@pytest.mark.slow
def test_help_and_wrong_arguments_import_no_library():
    every = [
        [name, "--help"]
        for name in sorted(set(importlib.import_module("lens_positions.cli").__all__) - {"app", "main"})
    ]
    wrong = [
        [],
        ["shwo"],
        ["show"],
        ["show", "bilingual-per-layer", "text", "--layer", "1"],
        ["show", "bilingual-per-layer", "text", "--layers", "first"],
        ["kinds", "bilingual-per-layer", "--alphabet", "runes"],
    ]
    refused = [
        ["show", "bilingual-per-layer", ""],
        ["show", "bilingual-per-layer", "text", "--figure", "picture.bmp"],
        ["show", "bilingual-per-layer", "text", "--figure", "no/such/folder/page.html"],
        ["report", "bilingual-per-layer", "--output", "page.txt"],
        ["gaps", "bilingual-per-layer", "text", "--wrong", "a"],
        ["extremes", "bilingual-per-layer", "--csv", "no/such/folder/table.csv"],
        ["absolute", "bilingual-per-layer", "--texts", "1"],
    ]
    codes, said, imported = commands("lens_positions.cli", ["--help"], *every, *wrong, *refused)
    assert codes == [0] * (1 + len(every)) + [2] * (len(wrong) + len(refused))
    assert not imported & HEAVY
    assert all(f"{name} " in said[0] for name, _ in every)
    assert all("expected" in sentence for sentence in said[-len(refused) :])


@pytest.mark.slow
def test_help_and_wrong_arguments_of_training_import_no_library():
    study = ["suite", "measure", "questions", "results", "ship", "rope", "maximum"]
    names = ["train", "graft", "resume", "corpus", "pack", *(f"experiments {name}" for name in study)]
    wrong = [["tarin"], ["train", "--preset", "huge"], ["train", "--stpes", "3"], ["train", "--steps", "0"]]
    wrong += [["resume"], ["experiments"], ["experiments", "siute"]]
    codes, said, imported = commands("lens_positions.cli", *[[*name.split(), "--help"] for name in names], *wrong)
    assert codes == [0] * len(names) + [2] * len(wrong)
    assert not imported & HEAVY
    assert all(f"usage: lens-positions {name}" in text for name, text in zip(names, said, strict=False))
    assert all(name in said[names.index("experiments measure")] for name in options.RUN_TABLES)


@pytest.mark.slow
def test_the_installed_command_finds_the_study_of_a_checkout():
    installed = Path(sys.executable).with_name("lens-positions")
    for words, expected in ((["--help"], "  questions  Answer the four questions."), (["suite", "--help"], "usage: ")):
        done = subprocess.run([installed, "experiments", *words], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert expected in done.stdout


def test_every_command_is_in_the_overview_once():
    listed = [name for names in app.GROUPS.values() for name in names]
    named = sorted(set(importlib.import_module("lens_positions.cli").__all__) - {"app", "main"})
    assert sorted(listed) == sorted([*named, *app.TRAINING, *app.STUDY])
    assert all(f"  {name} " in app.overview() for name in listed)


def test_a_command_by_its_former_name_says_the_new_one(capsys):
    for former, name in app.FORMER_NAMES.items():
        assert app.main([former, "--help"]) == 0
        printed = capsys.readouterr()
        assert f"usage: lens-positions {name}" in printed.out
        assert printed.err.count("\n") == 1
        assert f"{former} is called {name} now" in printed.err


@pytest.mark.slow
def test_names_of_before_lead_to_the_commands_of_the_study():
    codes, said, _ = commands("lens_positions.training.__main__", *[[name, "--help"] for name in FORMER_COMMANDS])
    assert codes == [0] * len(FORMER_COMMANDS)
    for name, text in zip(FORMER_COMMANDS.values(), said, strict=True):
        assert f"usage: lens-positions experiments {name}" in text


def test_names_shown_by_help_are_those_that_are_measured():
    assert tuple(experiments.measure.MEASUREMENTS) == options.RUN_TABLES
    assert tuple(experiments.rope_measures.MEASUREMENTS) == options.ROPE_TABLES


@pytest.mark.slow
def test_show_imports_no_library_that_it_does_not_use():
    codes, said, imported = commands("lens_positions.cli", ["show", "bilingual-per-layer", "The cat sat."])
    assert codes == [0]
    assert "layer 0" in said[0]
    assert "torch" in imported
    assert not imported & {"circuitsvis", "matplotlib", "peft", "sklearn", "wandb"}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_name_is_listed_and_resolves(package):
    assert dir(package) == names_of(package)
    for name in package.__all__:
        value = getattr(package, name)
        assert isinstance(value, ModuleType) == (package is lp and name in ("analysis", "causal", "corpora", "viz"))
    everything: dict[str, object] = {}
    exec(f"from {package.__name__} import *", everything)
    assert set(package.__all__) <= set(everything)
    with pytest.raises(AttributeError, match="spacings"):
        package.spacings  # noqa: B018


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_type_checkers_see_the_same_names(package):
    stub = Path(str(package.__file__)).with_suffix(".pyi")
    (listed,) = [node.value for node in ast.parse(stub.read_text("utf-8")).body if isinstance(node, ast.Assign)]
    assert sorted(ast.literal_eval(listed)) == names_of(package)
    assert (
        "*.pyi"
        in tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"][
            package.__name__
        ]
    )


MODULE_FIRST = """
import importlib, os, sys
import pandas, torch, transformer_lens

for where in sys.argv[1:]:
    if os.fork() == 0:
        package, _, name = where.rpartition(".")
        module = importlib.import_module(where)
        found = getattr(importlib.import_module(package), name)
        print(name, found is getattr(module, name), found.__qualname__, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
def test_a_function_is_not_hidden_by_the_module_of_its_name():
    """Each in a process of its own, which has imported that module first; the libraries are imported once."""
    names = ["analysis.specialisation", "causal.attribution", "causal.mediation", "training.graft"]
    said = run(MODULE_FIRST, *(f"lens_positions.{name}" for name in names)).split("\n")[:-1]
    assert said == [f"{name} True {name}" for _, name in (where.split(".") for where in names)]
