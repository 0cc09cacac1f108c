"""The worked study and the tables beside it: what is said is what the files hold."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
SAID = " ".join((ROOT / "docs" / "measurements.md").read_text("utf-8").split())


@pytest.fixture(scope="module")
def induction():
    spec = importlib.util.spec_from_file_location("induction", ROOT / "demos" / "induction.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_study_finds_what_is_there_and_nothing_else(induction):
    """Noise in every layer, and in layer 1 a loss at the target alone: had there been none, the study would say so."""
    noise = np.random.default_rng(0).normal(0, 0.1, (60, 4, induction.LIST + induction.AGAIN))
    effects = noise.copy()
    effects[:, 1, induction.TARGET] -= 0.3
    table = induction.tested({"repeated": effects, "not repeated": noise}, [0, 1, 2, 5])
    assert list(table["layer"]) == [0, 1, 2, 5] * 2
    found = table[table["q"] < 0.05]
    assert list(zip(found["prompts"], found["layer"], strict=True)) == [("repeated", 1)]
    row = found.iloc[0]
    assert row["difference"] == pytest.approx(row["target"] - row["control"])
    assert row["low"] < -0.3 < row["high"]
    assert row["n"] == 60


def test_the_controls_are_other_gaps_of_the_list(induction):
    assert induction.TARGET not in induction.CONTROLS
    assert min(induction.CONTROLS) > 0
    assert max(induction.CONTROLS) < induction.LIST
    assert len(induction.CONTROLS) == 9


def test_the_measurements_say_what_the_study_found():
    table = pd.read_csv(ROOT / "docs" / "induction.csv")
    repeated = table[table["prompts"] == "repeated"].set_index("layer")
    row = repeated.loc[16]
    assert row["n"] == 60
    assert f"{row['difference']:.2f} ({row['low']:.2f} to {row['high']:.2f}, n = 60, q = {row['q']:.5f}" in SAID
    assert f"loses {-row['target']:.2f} there, against {-row['control']:.2f}" in SAID
    others = repeated[(repeated["q"] < 0.05) & (repeated.index != 16)]
    assert (others["difference"] > 0).all()
    assert list(others.index) == [9, 12, 24, 25, 27]
    assert others["difference"].max() < 0.095


@pytest.mark.parametrize("language", ["english", "chinese"])
def test_the_measurements_say_what_the_ablations_changed(language):
    table = pd.read_csv(ROOT / "benchmarks" / f"ablation_quick_{language}.csv")
    assert f"{table['n'][0]:,}" in SAID
    for to, digits in (("1.0", 3), ("mean", 3 if language == "english" else 4), ("shuffle", 3)):
        row = table[(table["layer"] == "0") & (table["to"] == to)].iloc[0]
        digits = 4 if language == "chinese" and to == "shuffle" else digits
        low, high = (f"{row[end]:+.{digits}f}" for end in ("low", "high"))
        assert f"{row['change']:+.{digits}f} ({low} to {high})" in SAID


def test_the_measurements_say_how_far_gradients_agree():
    found = json.loads((ROOT / "benchmarks" / "causal_attribution.json").read_text())
    for name in ("gradient_and_small", "gradient_and_half", "integrated_and_half"):
        row = found["summary"][name]
        assert f"{row['mean']:.2f} ({row['low']:.2f} to {row['high']:.2f}) | {row['least']:.2f}" in SAID
    assert found["integrated_sum_off_at_most"] < 0.01
    assert found["prompts"] >= 20


def test_sweeps_are_at_least_eight_times_faster_than_the_loop():
    """What the benchmark measured; nothing is timed here."""
    rows = json.loads((ROOT / "benchmarks" / "causal_sweeps.json").read_text())["sweeps"]
    assert len(rows) == 7
    assert min(row["ratio"] for row in rows) >= 8
    assert max(row["largest_error"] for row in rows) <= 1e-3


def test_the_short_table_is_of_the_measurements():
    """Every interval in it stands below it too, or in the results."""
    results = (ROOT / "RESULTS.md").read_text("utf-8")
    _, rows, rest = re.split("## In short|## What the demo's increments are", SAID)
    intervals = re.findall(r"\([+-]?\d\.\d+ to [+-]?\d\.\d+\)?", rows)
    assert len(intervals) >= 6
    for interval in intervals:
        assert interval.rstrip(")") in rest + results, interval
