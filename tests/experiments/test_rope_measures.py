"""The three measurements of RoPE itself as commands, and as files of several models."""

import json
import re
import shutil

import pandas as pd
import pytest

import lens_positions as lp
from experiments import rope_measures
from experiments.rope_measures import MEASUREMENTS, OF_RUNS, RopeConfig, measure_rope
from lens_positions import cli, corpora
from lens_positions.training.__main__ import main

PROSE = [
    f"{first} cat sat on mat {i} and slept, and nobody knew why it rained {i * i} times. " * 3
    for i, first in enumerate("TOASB")
]


@pytest.fixture
def saved(randomize, tmp_path, monkeypatch):
    """Two small models on disk, and a little text."""
    for name in ("per_layer", "static"):
        positions = lp.PositionConfig(source=name)
        config = lp.PositionModelConfig(d_model=32, n_layers=2, n_heads=2, n_ctx=176, positions=positions)
        randomize(lp.HookedPositionTransformer.from_config(config)).save_pretrained(tmp_path / name)
    monkeypatch.setattr(corpora, "heldout_excerpts", lambda corpus, characters: PROSE)
    monkeypatch.setattr(corpora, "heldout_pieces", lambda corpus, count: PROSE[:4])
    return tmp_path


@pytest.mark.slow
def test_absolute_prints_draws_and_writes(saved, capsys):
    csv, figure = saved / "absolute.csv", saved / "absolute.png"
    given = ["absolute", str(saved / "per_layer"), "--texts", "4", "--csv", str(csv), "--figure", str(figure)]
    assert cli.main(given) == 0
    printed = capsys.readouterr().out
    assert "residual, early" in printed
    assert len(re.findall(r"^  (?:token|mean|zeros|noise) +early  ", printed, re.MULTILINE)) == 4
    assert {"residual", "mask", "covariance", "total"} <= set(pd.read_csv(csv))
    for other in ("drops", "sinks"):
        assert len(pd.read_csv(saved / f"absolute_{other}.csv"))
        assert f"absolute_{other}.csv" in "".join(printed.split())
    assert figure.stat().st_size > 1000
    assert cli.main(["absolute", str(saved / "static"), "--texts", "1"]) == 2
    assert "--texts is 1; expected at least 2" in capsys.readouterr().err


@pytest.mark.slow
def test_positions_can_be_held(saved, capsys):
    """Of learned increments the residual part changes, of standard RoPE nothing does."""
    printed = {}
    for name in ("per_layer", "static"):
        for held in ([], ["--hold"]):
            assert cli.main(["absolute", str(saved / name), "--texts", "4", *held]) == 0
            printed[name, bool(held)] = capsys.readouterr().out
    assert printed["static", False] == printed["static", True]
    assert printed["per_layer", False] != printed["per_layer", True]


@pytest.mark.slow
def test_a_model_that_turns_nothing_has_norms_and_no_map(randomize, saved, capsys):
    static = lp.PositionConfig(source="static")
    config = lp.PositionModelConfig(d_model=32, n_layers=1, n_heads=2, n_ctx=176, rope_fraction=0.0, positions=static)
    randomize(lp.HookedPositionTransformer.from_config(config)).save_pretrained(saved / "none")
    csv, figure = saved / "none.csv", saved / "none.png"
    assert cli.main(["frequencies", str(saved / "none"), "--csv", str(csv)]) == 0
    assert "no frequency turns in this model" in capsys.readouterr().out
    assert set(pd.read_csv(csv)["frequency"]) == {0.0}
    assert len(pd.read_csv(saved / "none_heads.csv")) == 2
    assert cli.main(["frequencies", str(saved / "none"), "--figure", str(figure)]) == 2
    assert "no frequency of these norms turns" in capsys.readouterr().err


@pytest.mark.slow
def test_one_layer_has_nothing_to_lose(randomize, saved, capsys):
    """Its residual part is rounding, of which no share is told."""
    config = lp.PositionModelConfig(
        d_model=32, n_layers=1, n_heads=2, n_ctx=176, positions=lp.PositionConfig(source="static")
    )
    randomize(lp.HookedPositionTransformer.from_config(config)).save_pretrained(saved / "shallow")
    assert cli.main(["absolute", str(saved / "shallow"), "--texts", "4"]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"(?:early|late) +nothing to lose$", printed, re.MULTILINE)) == 8
    assert "nan" not in printed


@pytest.mark.slow
def test_dispersion_prints_draws_and_writes(saved, capsys):
    csv, figure = saved / "dispersion.csv", saved / "dispersion.png"
    given = ["dispersion", str(saved / "static"), "--lengths", "16", "32", "--csv", str(csv), "--figure", str(figure)]
    assert cli.main(given) == 0
    printed = capsys.readouterr().out
    assert "even" in printed
    assert "16 tokens: " in printed
    assert set(pd.read_csv(csv)["layer"]) == {0, 1}
    assert len(pd.read_csv(saved / "dispersion_losses.csv")) == 2
    assert figure.stat().st_size > 1000
    assert cli.main(["dispersion", str(saved / "static"), "--lengths", "12", "32"]) == 2
    assert "expected whole numbers from 2 that divide the longest" in capsys.readouterr().err


@pytest.mark.slow
def test_tables_of_several_models_are_kept_and_left(saved, monkeypatch):
    monkeypatch.setattr(rope_measures, "LENGTHS", (16, 32))
    models = tuple(str(saved / name) for name in ("per_layer", "static"))
    asked = RopeConfig(models=models, results=saved / "results")
    assert measure_rope(asked) == ["per_layer", "static"]
    for name in ("per_layer", "static"):
        folder = saved / "results" / name
        done = json.loads((folder / "measured.json").read_text())
        assert list(done) == list(MEASUREMENTS)
        kept = {table: entry["rows"] for table, entry in done.items() if "refused" not in entry}
        assert all(rows == len(pd.read_csv(folder / f"{table}.csv")) for table, rows in kept.items())
        assert set(done) - set(kept) == ({"increments", "held"} if name == "static" else set())
    truncated = pd.read_csv(saved / "results" / "static" / "truncated.csv")
    assert truncated[["keep", "drop"]].values.tolist()[:3] == [[0.75, "lowest"], [0.75, "highest"], [0.5, "lowest"]]
    before = {path: path.read_bytes() for path in (saved / "results").rglob("*.*")}
    monkeypatch.setattr(rope_measures, "_texts", None)
    measure_rope(asked)
    assert {path: path.read_bytes() for path in (saved / "results").rglob("*.*")} == before


@pytest.mark.slow
def test_finished_runs_are_measured_for_what_compares_them(saved, monkeypatch):
    monkeypatch.setattr(rope_measures, "LENGTHS", (16, 32))
    monkeypatch.setattr(rope_measures, "shipped_names", tuple)
    monkeypatch.setattr(rope_measures, "SMOLLM2", str(saved / "static"))
    for run in ("rope_25-0", "per_layer-1"):
        shutil.copytree(saved / "static", saved / "tiny" / run / "model")
    (saved / "tiny" / "rope_25-0" / "heldout.csv").touch()  # the other is not finished
    asked = RopeConfig(runs=saved / "tiny", results=saved / "results")
    assert measure_rope(asked) == ["static", "tiny-rope_25-0"]
    for name, tables in (("static", MEASUREMENTS), ("tiny-rope_25-0", OF_RUNS)):
        assert list(json.loads((saved / "results" / name / "measured.json").read_text())) == list(tables)


def test_bad_requests_are_one_sentence(tmp_path, capsys):
    assert main(["machinery", "--tables", "colours"]) == 2
    assert "there is no measurement 'colours'; expected some of increments, norms" in capsys.readouterr().err
    assert main(["machinery", "--models", str(tmp_path), "--results", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["machinery", "--runs", str(tmp_path / "none")]) == 2
    assert "expected one with runs of a suite" in capsys.readouterr().err


def test_pieces_are_spread_over_the_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Document {i} has a few words of its own, {i * i}." for i in range(60)), "utf-8")
    pieces = corpora.heldout_pieces(str(text), 2, 20)
    assert len(set(pieces)) == 2
    assert {len(piece) for piece in pieces} == {20}
    with pytest.raises(corpora.PositionsError, match="999 pieces of 20 characters were asked for; expected from 1 to"):
        corpora.heldout_pieces(str(text), 999, 20)
    with pytest.raises(corpora.PositionsError, match="has 500 characters, a piece; expected longer ones"):
        corpora.heldout_pieces(str(text), 2, 500)
