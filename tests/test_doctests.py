"""Every public name has an example in its docstring, and what the example shows is what comes out."""

import doctest
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import lens_positions as lp
from lens_positions import analysis, causal, viz

PUBLIC = {
    f"{prefix}{name}": getattr(package, name)
    for prefix, package in (("", lp), ("analysis.", analysis), ("causal.", causal), ("viz.", viz))
    for name in package.__all__
    if inspect.isclass(getattr(package, name)) or inspect.isroutine(getattr(package, name))
}
EXEMPT = ("PositionStreams", "causal.Ablations", "causal.PromptEffects", "viz.View")
"""What other functions return: their examples get them so."""

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
TEXTS = [
    "The cat sat on the mat and looked at the door. A dog ran by the house and did not come back. "
    "We have seen the people of this country work, and we know what they can do.",
    "A bird sang in the tree by the road. The sun came up over the hill, and the children went to school. "
    "In the evening they told us what they had heard there, and we were glad of it.",
    "My friends, this is the year in which we build the bridge. It will be long and it will cost much, "
    "but those who live on both sides of the river have asked for it since the war.",
]


@pytest.fixture(scope="module")
def model() -> lp.HookedPositionTransformer:
    """Loaded once: no example changes it."""
    return lp.HookedPositionTransformer.from_pretrained("bilingual-per-layer")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i, text in enumerate(TEXTS * 4):
        (folder / f"{i:02}.txt").write_text(text)
    return folder


@pytest.fixture
def names(
    model: lp.HookedPositionTransformer, corpus: Path, tiny_llama: Callable[..., Any], tmp_path: Path
) -> dict[str, Any]:
    """What the docstring of the package says that every example has."""
    given = {"model": model, "texts": list(TEXTS), "llama": tiny_llama(), "folder": tmp_path, "corpus": corpus}
    return {"lp": lp, "torch": torch, "pd": pd, **given}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_a_short_example_and_it_is_true(name: str, names: dict[str, Any]) -> None:
    docstring = inspect.getdoc(PUBLIC[name])
    assert docstring is not None
    example = doctest.DocTestParser().get_doctest(docstring, names, name, None, None)
    assert 1 <= len(example.examples) <= 5
    assert name in docstring[docstring.index(">>>") :] or name in EXEMPT

    said: list[str] = []
    failed, tried = doctest.DocTestRunner(optionflags=FLAGS).run(example, out=said.append)
    assert (failed, tried) == (0, len(example.examples)), "".join(said)


def test_what_the_examples_use_is_described_where_one_looks_first(names: dict[str, Any]) -> None:
    assert all(f"`{name}`" in str(lp.__doc__) for name in names)
