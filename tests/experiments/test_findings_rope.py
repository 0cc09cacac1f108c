"""Verdicts about RoPE itself, from files with planted answers."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments.findings import Suite
from experiments.findings_rope import (
    FRACTIONS,
    ROPE_FINDINGS,
    RopeResults,
    absolute_position,
    compare_sources,
    first_embedding,
    heads_by_position,
    heads_disperse,
    low_frequencies,
    maximum_task,
    p_rope,
    sinks_carry_a_fingerprint,
    truncated_frequencies,
)
from experiments.markdown import markdown
from experiments.results import ResultsConfig, write_results
from experiments.rope_measures import SMOLLM2
from experiments.ship import SHIPPED
from experiments.tables import RunName, Tables, read_tables, run_of_model
from lens_positions import PositionsError

FREQUENCIES = 8


@pytest.fixture
def rope_results(tmp_path):
    results = Tables(tmp_path)
    return RopeResults(results, Suite(results, "tiny"))


def keep(rope_results, model, name, rows):
    rope_results.results.measurements.setdefault(name, {})[run_of_model(model)] = pd.DataFrame(rows)


def lines_of(finding):
    """The lines of its tables and paragraphs."""
    return "\n".join(map(markdown, finding.blocks)).splitlines()


def norms(growth, positional=(), layers=4):
    """Norms that change by a factor from the highest frequency to the lowest; positional heads the other way."""
    return [
        {
            "layer": layer,
            "side": side,
            "head": head,
            "index": index,
            "frequency": 10.0**-index,
            "n": 100,
            "documents": 4,
            "norm": (1 / growth if (layer, head) in positional else growth) ** (index / FREQUENCIES),
        }
        for layer in range(layers)
        for side in ("query", "key")
        for head in range(8)
        for index in range(FREQUENCIES)
    ]


@pytest.mark.parametrize(("growth", "verdict"), [(2.0, "agrees"), (0.5, "contrary"), (None, "weaker")], ids=str)
def test_the_shape_of_norms_is_judged_by_layers(rope_results, growth, verdict):
    rows = norms(growth or 2.0)
    if growth is None:
        rows = [row | {"norm": 1 / row["norm"]} if row["side"] == "key" else row for row in rows]
    keep(rope_results, SMOLLM2, "norms", rows)
    assert low_frequencies(rope_results).verdict == verdict


def test_norms_that_are_largest_in_a_band_are_not_largest_at_the_lowest_frequencies(rope_results):
    rows = [row | {"norm": row["norm"] * (3 if row["index"] in (4, 5) else 1)} for row in norms(2.0)]
    keep(rope_results, SMOLLM2, "norms", rows)
    found = low_frequencies(rope_results)
    assert found.verdict == "weaker"
    assert (
        "100% of the layers for queries and 100% for keys, and the largest of the four in 0% and 0%" in found.sentence
    )


def heads(positional, layers=4):
    return [
        {
            "layer": layer,
            "head": head,
            "offset": 1,
            "positional": (layer, head) in positional,
            "n": 50,
            "documents": 4,
            **{f"{name}{end}": 0.8 for name in ("share", "shuffled") for end in ("", "_low", "_high")},
        }
        for layer in range(layers)
        for head in range(8)
    ]


def test_positional_heads_are_few_and_use_high_frequencies(rope_results):
    few = {(0, 1), (2, 3), (3, 3)}
    keep(rope_results, SMOLLM2, "norms", norms(4.0, few))
    keep(rope_results, SMOLLM2, "positional", heads(few))
    found = heads_by_position(rope_results)
    assert found.verdict == "agrees"
    assert "3 of SmolLM2-135M's 32 heads" in found.sentence
    keep(rope_results, SMOLLM2, "norms", norms(4.0))  # their norms are like the others'
    assert heads_by_position(rope_results).verdict == "weaker"
    keep(rope_results, SMOLLM2, "positional", heads(set()))
    assert heads_by_position(rope_results).verdict == "absent"


def scored(rope_results, losses, seeds=(0, 1)):
    for variant, loss in losses.items():
        for seed in seeds:
            size = np.array([900, 1000, 1100])
            nats = size * (loss + seed / 100 + np.random.default_rng(seed).normal(0, 1e-5, 3))
            tables = [
                pd.DataFrame({"document": range(3), "source": "x", "length": n, "bytes": size, "nats": nats})
                for n in (256, 512, 1024)
            ]
            keep(rope_results, f"tiny-{variant}-{seed}", "heldout", pd.concat(tables, ignore_index=True))
            rope_results.results.runs[RunName("tiny", variant, seed)] = {"variant": variant, "seed": seed}


@pytest.mark.parametrize(
    ("losses", "verdict", "hold"),
    [
        ((1.5, 1.49, 1.52, 1.6), "agrees", 4),
        ((1.5, 1.49, 1.6, 1.52), "contrary", 3),  # none is better than a quarter
        ((1.5, 1.51, 1.49, 1.48), "contrary", 0),
    ],
)
def test_fractions_are_judged_by_their_order_over_seeds(rope_results, losses, verdict, hold):
    scored(rope_results, dict(zip(FRACTIONS, losses, strict=True)))
    found = p_rope(replace(rope_results, suite=Suite(rope_results.results, "tiny")))
    assert found.verdict == verdict
    assert found.sentence.endswith(f"{hold} of 4 statements hold.")
    assert len([line for line in lines_of(found) if line.startswith("| 0")]) == 3


def test_fractions_at_one_seed_are_undecided(rope_results):
    scored(rope_results, dict(zip(FRACTIONS, (1.5, 1.49, 1.52, 1.6), strict=True)), seeds=(0,))
    assert p_rope(replace(rope_results, suite=Suite(rope_results.results, "tiny"))).verdict == "undecided"


def absolute(residual, mask=0.1):
    """The two parts, with intervals of a tenth either way; `residual` by layer."""
    rows = []
    for layer, value in {"all": np.mean(residual), **dict(enumerate(residual))}.items():
        for quarter in range(4):
            row = {"layer": layer, "head": "all", "quarter": quarter, "documents": 5}
            for part, own in (("residual", value), ("mask", mask), ("share", value / (value + mask))):
                row |= {part: own, f"{part}_low": 0.9 * own, f"{part}_high": 1.1 * own}
            rows.append(row)
    return rows


@pytest.mark.parametrize(
    ("ntk", "window", "verdict"),
    [
        ((0, 0.1, 0.1, 0.1), (0, 0.1, 0.3, 0.9), "agrees"),
        ((0, 0.1, 0.1, 0.1), (0, 0.1, 0.1, 0.1), "weaker"),
        ((0, 0.9, 0.9, 0.9), (0, 0.5, 0.3, 0.1), "absent"),
        ((0, 0.9, 0.9, 0.9), (0, 0.0, 0.3, 0.9), "absent"),  # nothing that it could have grown from
    ],
)
def test_architectures_are_judged_by_their_residual_part(rope_results, ntk, window, verdict):
    for seed in (0, 1):
        for variant, residual in (("static", (0, 0.3, 0.4, 0.5)), ("ntk", ntk), ("window", window)):
            keep(rope_results, f"tiny-{variant}-{seed}", "absolute", absolute(residual))
    assert absolute_position(rope_results).verdict == "untested"
    keep(rope_results, SMOLLM2, "absolute", absolute((0, *(0.1,) * 11)))
    found = absolute_position(rope_results)
    assert found.verdict == verdict
    assert sum(line.startswith("| RoPE, seed 0 |") for line in lines_of(found)) == 5
    del rope_results.results.measurements["absolute"][RunName("tiny", "ntk", 1)]
    assert absolute_position(rope_results).verdict == "undecided"


def test_architectures_whose_statements_hold_at_one_seed_alone_are_absent(rope_results):
    keep(rope_results, SMOLLM2, "absolute", absolute((0, *(0.1,) * 11)))
    for seed, ntk in enumerate(((0, 0.1, 0.1, 0.1), (0, 0.4, 0.4, 0.4))):
        for variant, residual in (("static", (0, 0.3, 0.4, 0.5)), ("ntk", ntk), ("window", (0, 0.1, 0.1, 0.1))):
            keep(rope_results, f"tiny-{variant}-{seed}", "absolute", absolute(residual))
    assert absolute_position(rope_results).verdict == "absent"


def drops(low):
    return [
        {"replacement": how, "layer": "all", "queries": queries, "drop": low + 0.1, "low": low, "high": low + 0.2}
        | {"documents": 5}
        for how in ("token", "mean", "zeros", "noise")
        for queries in ("early", "late")
    ]


def test_drops_without_a_token_of_its_own_are_told_and_untested(rope_results):
    keep(rope_results, SMOLLM2, "drops", drops(0.3))
    found = first_embedding(rope_results)
    assert found.verdict == "untested"
    assert "No model here has a BOS of its own" in found.sentence
    assert "another token +40% (+30% to +50%)" in found.sentence


@pytest.mark.parametrize(
    ("share", "cosine", "verdict"),
    [(0.6, 0.5, "agrees"), (0.6, 0.99, "contrary"), (0.1, 0.5, "absent")],
)
def test_sinks_are_judged_by_what_their_values_say(rope_results, share, cosine, verdict):
    rows = [
        {"first": first, "layer": layer, "head": 0, "share": share, "low": share - 0.01}
        for first in ("common", "own")
        for layer in range(3)
    ]
    keep(rope_results, SMOLLM2, "sinks", rows)
    rows = [
        {"layer": layer, "state": state, "first": first, "first_token": value, "first_token_high": value + 0.01}
        | {"later": 0.2, "n": 10}
        for layer in range(3)
        for state in ("resid_pre", "k", "v")
        for first, value in (("common", 1.0), ("own", cosine if state == "v" else 0.99))
    ]
    keep(rope_results, SMOLLM2, "fingerprints", rows)
    assert sinks_carry_a_fingerprint(rope_results).verdict == verdict


@pytest.mark.parametrize(("gain", "verdict"), [(0.05, "agrees"), (-0.05, "absent"), (None, "weaker")], ids=str)
def test_the_task_is_judged_beyond_four_times_its_size(rope_results, gain, verdict):
    own = rope_results.results.measurements.setdefault("maximum", {})
    for seed in range(5):
        rows = []
        for size in (16, 64, 128, 256):
            more = gain if gain is not None else (0.05 if size < 256 else -0.05)
            for temperature, accuracy in (("learned", 0.9), ("adaptive", 0.9 + more + seed / 1000)):
                row = {"items": size, "temperature": temperature, "accuracy": accuracy, "n": 9}
                rows.append(row | {"entropy": math.log(size) / 2, "largest": 0.5})
        own[RunName("maximum", "retriever", seed)] = pd.DataFrame(rows)
    assert maximum_task(rope_results).verdict == verdict


@pytest.mark.parametrize(("grows", "power"), [(4, -0.9), (3, -0.1)])
def test_heads_within_the_training_length_are_told_and_untested(rope_results, grows, power):
    """Five sharp heads and three that spread from the start; weights fall by a power of the number of items."""
    rows = [
        {
            "layer": 0,
            "head": head,
            "items": items,
            "documents": 3,
            "log_items": math.log(items),
            "largest": items**power,
        }
        | {"entropy": value, "entropy_low": value - 0.1, "entropy_high": value + 0.1}
        for head in ("all", *range(8))
        for items in (2, 16, 64)
        for value in [0.5 + (items == 64 and (head == "all" or head < grows)) + 2 * (head != "all" and head > 4)]
    ]
    keep(rope_results, SMOLLM2, "dispersion", rows)
    found = heads_disperse(rope_results)
    assert found.verdict == "untested"
    assert "intervals apart" in found.sentence
    assert f"{grows / 5:.0%} of the 5 sharp heads (of 8)" in found.sentence
    assert f"n to the power {power:.2f}" in found.sentence


@pytest.mark.slow
def test_what_increments_change_is_over_seeds(rope_results):
    """A third of the norm moves at every seed of per layer, and nothing does in shared."""
    for model in SHIPPED:
        keep(rope_results, model, "norms", norms(2.0))
    for seed in range(3):
        for variant, growth in (("static", 2.0), ("shared", 2.0 + (seed - 1) / 10), ("per_layer", 6.0)):
            keep(rope_results, f"tiny-{variant}-{seed}", "norms", norms(growth + seed / 100))
    found = compare_sources(rope_results)
    assert found.verdict == "new"
    assert found.sentence.startswith("3 of 6 differences over seeds: squared query norms, share of the highest")
    assert "(per layer -" in found.sentence
    assert "shared" not in found.sentence
    assert any("untested" in line for line in lines_of(found))  # the other tables


@pytest.mark.slow
def test_frequencies_are_compared_per_token(rope_results):
    """Steps of ten move the norms to frequencies ten times lower: per token nothing changes."""
    for model in SHIPPED:
        keep(rope_results, model, "norms", norms(2.0))
    steps = [
        {"layer": layer, "kind": kind, "n": n, "mean": mean}
        for layer in range(4)
        for kind, n, mean in (("letter", 3, 12.0), ("space", 1, 4.0))
    ]
    for seed in range(2):
        table = norms(2.0 + seed / 10)
        keep(rope_results, f"tiny-static-{seed}", "norms", table)
        moved = [row | {"frequency": row["frequency"] / 10} for row in table]
        for variant in ("shared", "per_layer"):
            keep(rope_results, f"tiny-{variant}-{seed}", "norms", moved)
            keep(rope_results, f"tiny-{variant}-{seed}", "increments", steps)
    lines = {line.split(" | ")[0]: line for line in lines_of(compare_sources(rope_results))}
    assert lines["| mean log10 frequency of the queries, per position"].count("-1.000 (-1.000 to -1.000), n = 2") == 2
    per_token = [lines["| mean log10 frequency of the queries, per token"], *(lines[f"| {i}"] for i in range(4))]
    assert all(line.count("0.000 (") == 2 and "1.000" not in line for line in per_token)
    assert all(lines[f"| {i}"].count("10.00, 10.00") == 2 for i in range(4))


def test_runs_without_norms_leave_the_table_by_layer_out(rope_results):
    for model in SHIPPED:
        keep(rope_results, model, "norms", norms(2.0))
    rows = [{"first": "common", "layer": 0, "head": 0, "share": 0.1}]
    for variant in ("static", "shared", "per_layer"):
        for seed in (0, 1):
            keep(rope_results, f"tiny-{variant}-{seed}", "sinks", rows)
    found = compare_sources(rope_results)
    assert found.sentence.startswith("0 of 2 differences over seeds")
    assert not any(line.startswith("| 0 |") for line in lines_of(found))


def test_what_a_dropped_quarter_turns_by_is_that_of_the_measured_model(rope_results):
    scored(rope_results, dict(zip(FRACTIONS, (1.5, 1.49, 1.52, 1.6), strict=True)))
    own = replace(rope_results, suite=Suite(rope_results.results, "tiny"))
    assert "degrees" not in "".join(lines_of(p_rope(own)))
    keep(rope_results, "tiny-static-1", "norms", norms(2.0))
    length = int(own.suite.losses["length"].min())
    angle = math.degrees(length * 10.0**-6)  # of eight frequencies the lowest two
    found = p_rope(own)
    assert f"In a context of {length} the quarter that 0.75 drops turns by {angle:.0f} degrees" in lines_of(found)[-1]
    assert [Path(name).name for name in found.files] == ["heldout.csv", "norms.csv"]


def test_without_norms_nothing_is_said_of_what_the_lowest_quarter_turns_by(rope_results):
    rows = [
        {"keep": kept, "drop": drop, "length": 512, "n": 9, "documents": 3, "difference": 0.1, "low": 0.0, "high": 0.2}
        for kept, drop in ((0.75, "lowest"), (0.75, "highest"), (0.0, "lowest"))
    ]
    keep(rope_results, SMOLLM2, "truncated", rows)
    assert "degrees" not in "".join(lines_of(truncated_frequencies(rope_results)))
    keep(rope_results, SMOLLM2, "norms", norms(2.0))
    assert f"turns by {math.degrees(512 * 10.0**-6):.0f} degrees" in lines_of(truncated_frequencies(rope_results))[-1]


@pytest.mark.slow
def test_held_positions_of_learned_increments_are_not_guessed(rope_results):
    """Where they were not measured, the parts as they are do not stand in for them; with RoPE they are the same."""
    rows = [
        {"head": "all", "layer": layer, "quarter": quarter, "residual": 0.5, "mask": 0.1}
        for layer in ("all", 0)
        for quarter in range(4)
    ]
    for model in (
        *SHIPPED,
        *(f"tiny-{variant}-{seed}" for variant in ("static", "shared", "per_layer") for seed in (0, 1)),
    ):
        keep(rope_results, model, "norms", norms(2.0))
        keep(rope_results, model, "absolute", rows)
    lines = lines_of(compare_sources(rope_results))
    line = next(line for line in lines if line.startswith("| residual part, early, positions on"))
    assert line == "| residual part, early, positions on a ruler | 0.5000 |  |  | untested | untested |"


def test_what_was_not_measured_is_said_not_guessed(rope_results):
    for find in ROPE_FINDINGS:
        found = find(rope_results)
        assert found.verdict == "untested"
        assert not found.blocks


def test_damaged_and_foreign_files_are_one_sentence(tmp_path):
    path = tmp_path / "norms.csv"
    for content in (b"\xff\xfe\x00", b"a,b\n1,2\n"):
        path.write_bytes(content)
        with pytest.raises(PositionsError, match=r"norms.csv is damaged"):
            read_tables(tmp_path)
    path.unlink()
    described = {"suite": "tiny", "variant": "static", "seed": 0}
    (tmp_path / "runs.jsonl").write_text(json.dumps(described) + "\n")
    asked = ResultsConfig(results=tmp_path, preset="tiny", output=tmp_path / "RESULTS.md", figures=tmp_path)
    with pytest.raises(PositionsError, match=r"a file in .* lacks 'config'; expected what suite, measure, rope"):
        write_results(asked)
    for line in ("{", json.dumps({"suite": "tiny"}), json.dumps(described | {"colour": 1})):
        (tmp_path / "runs.jsonl").write_text(line + "\n")
        with pytest.raises(PositionsError, match=r"runs.jsonl, line 1, is damaged"):
            read_tables(tmp_path)
