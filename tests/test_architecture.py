"""The layers of the package: imports go one way, and the idea stays in two short files."""

import ast
import doctest
import subprocess
import sys
from pathlib import Path

import pytest

import lens_positions.core.positions

ROOT = Path(__file__).parents[1]
CORE = ROOT / "lens_positions" / "core"

OF_TRANSFORMER_LENS = (
    "_bridge_builder",
    "_hook_registry",
    "_is_embedding_stage_hook",
    "_original_component",
    "_scan_existing_hooks",
    "_start_at_layer_idx",
    "_weights_processed",
)
"""Private names of TransformerLens that the package needs."""


def test_imports_go_one_way():
    checked = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "0 broken" in checked.stdout


def test_the_idea_is_two_short_files():
    lines = [(CORE / name).read_text().count("\n") for name in ("increments.py", "positions.py")]
    assert sum(lines) <= 350


def own_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from its name to its end, less those of functions and classes in it, which are read on their own."""
    nested = [
        node.end_lineno - node.lineno + 1
        for node in function.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    return function.end_lineno - function.lineno + 1 - sum(nested)


@pytest.mark.slow
def test_no_function_is_over_60_lines():
    """The signature and the docstring count as well: a function is what a reader takes in at once."""
    long = {
        f"{file.relative_to(ROOT)}: {node.name}"
        for file in (ROOT / "lens_positions").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and own_lines(node) > 60
    }
    assert long == set()


def test_the_worked_example_holds():
    found = doctest.testmod(lens_positions.core.positions)
    assert found.failed == 0
    assert found.attempted >= 10


def test_private_names_of_transformer_lens_are_in_one_file():
    elsewhere = {
        f"{file.relative_to(ROOT)}: {name}"
        for folder in ("lens_positions", "experiments")
        for file in (ROOT / folder).rglob("*.py")
        for name in OF_TRANSFORMER_LENS
        if file.name != "transformer_lens_internals.py" and name in file.read_text(encoding="utf-8")
    }
    assert elsewhere == set()
