"""The independent check of the table that opens RESULTS.md: it passes, it shares no code, and a wrong digit fails."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import check
from experiments.findings import CLAIMS

ROOT = Path(__file__).parents[2]
SAID = (ROOT / "RESULTS.md").read_text("utf-8")


def test_every_number_and_call_of_the_table_is_that_of_the_files():
    assert check.differences(SAID) == []
    assert set(check.rows_of(SAID)) == {key for key, _ in CLAIMS.values()}


@pytest.mark.slow
def test_the_check_is_a_script_of_pandas_and_numpy_alone():
    tree = ast.parse((ROOT / "experiments" / "check.py").read_text("utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {
        name
        for node in imports
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module])
    }
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == {"numpy", "pandas"}
    assert all(node.level == 0 for node in imports if isinstance(node, ast.ImportFrom))
    done = subprocess.run(
        [sys.executable, "experiments/check.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("all numbers and calls of 12 rows")


def row_of(key):
    (row,) = [line for line in SAID.splitlines() if line.startswith("| [") and f"`{key}` |" in line]
    return row


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key, _ in CLAIMS.values()])
def test_another_digit_or_another_call_fails(key):
    row = row_of(key)
    claim, reported, ours, call, control = row.split(" | ")
    numbers = check.NUMBER.findall(ours)
    if numbers:
        digit = numbers[-1].rstrip("%")[-1]
        place = ours.rindex(digit)
        other = ours[:place] + str((int(digit) + 1) % 10) + ours[place + 1 :]
        changed = " | ".join([claim, reported, other, call, control])
        (wrong,) = check.differences(SAID.replace(row, changed))
        assert wrong.startswith(f"{key}: ")
    changed = " | ".join([claim, reported, ours, "**certain**", control])
    assert check.differences(SAID.replace(row, changed)) == [
        f"{key}: the call **certain** stands there; expected {call.strip('*')}"
    ]


def test_a_row_that_is_missing_fails():
    assert check.differences(SAID.replace(row_of("cap") + "\n", ""))[0].startswith("the rows are")
