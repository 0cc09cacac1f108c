"""The suite: every run exactly once, whoever runs it; scored on the same bytes; compared seed by seed."""

import hashlib
import json
import os
import shlex
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from scipy import stats

from experiments import suite as suite_module
from experiments.gather import suite_tables
from experiments.suite import (
    ROPE_VARIANTS,
    VARIANTS,
    SuiteConfig,
    evaluate_lengths,
    loss_table,
    over_seeds,
    plan_runs,
    suite,
)
from lens_positions import PositionConfig, PositionModelConfig, PositionsError
from lens_positions.checkpoint import load_pretrained
from lens_positions.core.attach import increment_table
from lens_positions.measure import intervals
from lens_positions.model import build_model
from lens_positions.training.__main__ import main, parse
from lens_positions.training.config import TrainConfig, changes, load_preset
from lens_positions.training.data import heldout_windows, tokenize_corpus
from lens_positions.training.loop import Run, are_bytes, token_nats, train

STEPS = 4
PER_BYTE = "heldout_nats_per_byte"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(80):
        text = f"Document {i}. The cat sat on mat {i * i}; 中国 has {i} cities.\n" * 6
        (folder / f"{i:02}.txt").write_text(text, "utf-8")
    return folder


@pytest.fixture(scope="module")
def tiny(corpus):
    return TrainConfig(
        model=PositionModelConfig(d_model=16, n_layers=2, n_heads=2, n_ctx=32),
        corpus=str(corpus),
        steps=STEPS,
        batch_size=4,
        warmup_steps=1,
        learning_rate=1e-2,
        eval_every=2,
        eval_windows=4,
        save_every=STEPS,
    )


@pytest.fixture(autouse=True)
def _tiny_preset(tiny, monkeypatch):
    monkeypatch.setattr(suite_module, "load_preset", lambda name: tiny)


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    """A finished suite of two variants at two seeds, and a third at one."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(suite_module, "load_preset", lambda name: tiny)
        suite(asked(folder, (0, 1), ("static", "shared")))
        suite(asked(folder, (1,), ("frozen",)))
    return folder


def asked(folder, seeds=(0,), variants=("static",), **more):
    folders = {"output": folder / "runs", "results": folder / "results", "cache": folder / "cache"}
    return SuiteConfig(seeds=seeds, variants=variants, **folders, **more)


def words(folder, *more):
    folders = ("--output", folder / "runs", "--results", folder / "results", "--cache", folder / "cache")
    return ["suite", *map(str, (*folders, *more))]


def on_disk(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files if path.name != "losses.csv"}


def steps_of(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def test_the_variants_are_the_ones_that_are_written_about():
    assert list(VARIANTS) == [
        "static",
        "shared",
        "per_layer",
        "shared_per_head",
        "per_layer_per_head",
        "frozen",
        "signed",
        "cap_30",
        "constant",
        "swapped",
        "head_steps",
    ]
    assert VARIANTS["shared_per_head"] == PositionConfig(source="shared", activation="softplus", per_head=True)
    assert VARIANTS["per_layer"] == PositionConfig(source="per_layer", activation="sigmoid", max_increment=10.0)
    assert VARIANTS["signed"].activation == "none"
    assert VARIANTS["cap_30"].max_increment == 30


def test_variants_of_rope_change_the_model_and_have_static_increments(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(suite_module, "load_preset", load_preset)
    runs = {run.variant: run.config.model for run in plan_runs(SuiteConfig(seeds=(0,), variants=tuple(ROPE_VARIANTS)))}
    assert [runs[f"rope_{part}"].rope_fraction for part in (75, 25, 0)] == [0.75, 0.25, 0.0]
    assert runs["window"].sliding_window == 64
    assert runs["ntk"].rope_theta == pytest.approx(10_000 * 8 ** (32 / 30), rel=1e-5)
    assert {model.positions for model in runs.values()} == {VARIANTS["static"]}
    for run in plan_runs(SuiteConfig(seeds=(0,), variants=tuple(ROPE_VARIANTS))):
        assert parse(shlex.split(run.command)[2:])[0] == run.config


@pytest.mark.slow
def test_fixed_increments_are_the_shared_ones_or_one_for_each_head(tiny, corpus, tmp_path):
    suite(asked(tmp_path, variants=("shared", "frozen", "constant", "swapped", "head_steps")))
    tables = {
        name: increment_table(load_pretrained(tmp_path / "runs" / f"{name}-0" / "model")[0])
        for name in ("shared", "frozen", "constant", "swapped", "head_steps")
    }
    shared, letters = tables["shared"], [ord(letter) for letter in "abcXYZ"]
    assert torch.equal(tables["frozen"], shared)

    # The mean that the training text has, not that of the 257 tokens.
    tokens = torch.from_numpy(tokenize_corpus(str(corpus), tmp_path / "cache").train.astype("int64"))
    assert tables["constant"].unique().numel() == 1
    torch.testing.assert_close(tables["constant"][0], shared[tokens].mean(), rtol=1e-5, atol=0)
    assert not torch.isclose(shared[tokens].mean(), shared.mean(), rtol=1e-6)

    assert torch.equal(tables["swapped"][letters], shared[32].expand(6))
    assert tables["swapped"][32] == shared[[*range(65, 91), *range(97, 123)]].mean()
    other = [ord("\n"), ord("."), *range(128, 257)]
    assert torch.equal(tables["swapped"][other], shared[other])

    assert torch.equal(tables["head_steps"], torch.tensor([0.5, 1.0]).repeat(257, 1))


def test_the_command_of_a_run_with_fixed_increments_asks_for_them(monkeypatch):
    monkeypatch.setattr(suite_module, "load_preset", load_preset)
    variants = ("shared", "constant", "swapped", "head_steps")
    for run in plan_runs(SuiteConfig(preset="long", steps=1000, seeds=(0,), variants=variants)):
        assert run.config.keep_at == (384,)
        assert parse(shlex.split(run.command)[2:])[0] == run.config


def test_a_suite_can_be_compiled_and_in_half_precision_where_its_preset_is_not(tiny):
    run = plan_runs(SuiteConfig(seeds=(0,), variants=("static",), compile=True, precision="bf16"))[0]
    assert (run.config.compile, run.config.precision) == (True, "bf16")
    assert "--compile" in run.command
    assert "--precision bf16" in run.command


def test_what_was_written_before_a_field_was_added_is_still_the_same_run():
    before = {"steps": 3, "model": {"d_model": 8}}
    assert list(changes(before, {"steps": 3, "model": {"d_model": 8, "sliding_window": None}})) == []
    assert list(changes(before, {"steps": 3, "model": {"d_model": 8, "sliding_window": 4}})) == [
        ("model.sliding_window", 4)
    ]
    assert list(changes(before, {"steps": 4, "model": {"d_model": 9}})) == [("steps", 4), ("model.d_model", 9)]


def test_runs_come_seed_by_seed_with_the_same_data_and_a_command_of_their_own(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(suite_module, "load_preset", load_preset)
    runs = plan_runs(SuiteConfig(seeds=(3, 1), variants=("frozen", "static", "shared", "cap_30", "shared_per_head")))
    assert [run.folder.name for run in runs[:5]] == [
        "static-3",
        "shared-3",
        "shared_per_head-3",
        "frozen-3",
        "cap_30-3",
    ]
    assert [run.seed for run in runs] == [3] * 5 + [1] * 5
    assert runs[3].config.frozen_from == Path("runs/suite/tiny/shared-3/model")
    for run in runs:
        config, own = parse(shlex.split(run.command)[2:])
        assert (config, own.output) == (run.config, Path("runs/suite/tiny") / run.folder.name)
        plain = replace(run.config, model=load_preset("tiny").model, frozen_from=None, seed=0)
        assert plain == load_preset("tiny")


def test_a_run_of_the_suite_is_the_run_of_train(done, tmp_path):
    run = plan_runs(asked(done, (1,), ("shared",)))[0]
    train(run.config, tmp_path / "alone", cache_dir=done / "cache")
    for name in ("training.json", "heldout.csv", "model/model.safetensors", "model/positions.safetensors"):
        assert (run.folder / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_a_frozen_run_has_the_table_of_the_shared_run_of_its_seed(done):
    tables = {
        name: increment_table(load_pretrained(done / "runs" / name / "model")[0]) for name in ("shared-1", "frozen-1")
    }
    assert tables["shared-1"].std() > 0
    assert torch.equal(tables["shared-1"], tables["frozen-1"])


def test_results_say_what_was_trained_and_what_came_out(done, tiny):
    results, run = done / "results" / "shared-0", done / "runs" / "shared-0"
    described = json.loads((results / "run.json").read_text("utf-8"))
    weights = (run / "model" / "model.safetensors").read_bytes()
    assert described["sha256"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert described["config"] == json.loads((run / "training.json").read_text("utf-8"))["config"]
    assert described["parameters"] == sum(p.numel() for p in load_pretrained(run / "model")[0].parameters())
    assert described["evaluation"]["step"] == STEPS
    assert described["tokens_per_second"] > 0
    assert set(described["versions"]) == {"python", "torch", "transformers", "lens_positions"}
    log = pd.read_csv(results / "log.csv")
    assert log["step"].tolist() == [2, 4]
    assert log[PER_BYTE].iloc[-1] == described["evaluation"][PER_BYTE]
    heldout = pd.read_csv(results / "heldout.csv")
    assert list(heldout.columns) == ["document", "source", "length", "bytes", "nats"]
    assert sorted(set(heldout["length"])) == [32, 64, 128]
    assert dict(zip(heldout["document"], heldout["source"], strict=True))[1] == "39.txt"


def test_a_finished_suite_called_again_changes_nothing_and_prints_its_table(done, capsys, monkeypatch):
    monkeypatch.setattr(suite_module, "tokenize_corpus", lambda *args, **options: pytest.fail("nothing is to be read"))
    before = on_disk(done)
    losses = (done / "results" / "losses.csv").read_bytes()
    assert main(words(done, "--seeds", 1, "--variants", "static", "shared", "frozen")) == 0
    assert on_disk(done) == before
    assert (done / "results" / "losses.csv").read_bytes() == losses
    output = capsys.readouterr()
    assert "shared 128" in output.out
    assert output.err == ""


def test_changed_weights_are_scored_again(done, monkeypatch):
    scored = []
    monkeypatch.setattr(suite_module, "score", lambda run, corpus: scored.append(run.folder.name))
    monkeypatch.setattr(suite_module, "weights_of", lambda run: {"model.safetensors": f"of {run.name}"})
    suite(asked(done, (1,)))
    assert scored == ["static-1"]


def test_an_interrupted_suite_goes_on_to_the_bit(done, tmp_path, monkeypatch, capsys):
    step, calls = Run._train_step, []

    def interrupted(self):
        calls.append(self.step)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "_train_step", interrupted)
        assert main(words(tmp_path, "--seeds", 0, "--variants", "static")) == 130
    assert "the same command again" in capsys.readouterr().err
    assert steps_of(tmp_path / "runs" / "static-0") == [1, 2, 3]
    assert not (tmp_path / "results").exists()

    assert main(words(tmp_path, "--seeds", 0, "--variants", "static")) == 0
    assert "run 1 of 1: static, seed 0" in capsys.readouterr().err
    assert steps_of(tmp_path / "runs" / "static-0") == [1, 2, 3, 4]
    for name in ("runs/static-0/model/model.safetensors", "results/static-0/heldout.csv", "results/static-0/log.csv"):
        assert (tmp_path / name).read_bytes() == (done / name).read_bytes()


def test_what_another_process_holds_is_left_to_it(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    with FileLock(tmp_path / "runs" / "shared-0.lock"):
        table = suite(asked(tmp_path, (0,), ("shared", "static", "frozen"), steps=1))
    assert set(table["variant"]) == {"static"}
    assert sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()) == ["static-0"]
    assert "not finished: shared-0, frozen-0" in capsys.readouterr().err


@pytest.mark.slow
def test_a_frozen_run_waits_for_the_shared_one_that_ends_meanwhile(tmp_path, monkeypatch):
    tries = []

    def train_or_leave(run, which, corpus):
        tries.append(run.variant)
        return run.variant != "frozen" or len(tries) > 2

    monkeypatch.setattr(suite_module, "_finish", train_or_leave)
    suite(asked(tmp_path, (0,), ("shared", "frozen")))
    assert tries == ["shared", "frozen", "frozen"]


@pytest.mark.slow
def test_a_run_that_diverges_is_recorded_and_not_tried_again(tiny, tmp_path, monkeypatch, capsys):
    steep = replace(tiny, learning_rate=1e30, clip=1e30)
    monkeypatch.setattr(suite_module, "load_preset", lambda name: steep)
    table = suite(asked(tmp_path))
    step = json.loads((tmp_path / "results" / "static-0" / "diverged.json").read_text("utf-8"))["step"]
    assert 1 < step <= STEPS
    assert table[["variant", "n_seeds", "diverged"]].values.tolist() == [["static", 0, f"seed 0 at step {step}"]]
    assert f"static diverged: seed 0 at step {step}" in capsys.readouterr().out
    before = on_disk(tmp_path)
    suite(asked(tmp_path))
    assert on_disk(tmp_path) == before


@pytest.mark.slow
def test_every_byte_is_predicted_once_at_each_length(tiny, tmp_path):
    text = tokenize_corpus(tiny.corpus, tmp_path / "cache")
    model = build_model(replace(tiny.model, positions=VARIANTS["per_layer"]), seed=0).eval()
    found = evaluate_lengths(model, text, 32, (1, 2, 4), max_bytes=6 * 128 + 5)
    of_documents = {length: rows.set_index("document")["bytes"] for length, rows in found.groupby("length")}
    assert of_documents[32].equals(of_documents[64])
    assert of_documents[32].equals(of_documents[128])
    windows = heldout_windows(text.heldout, 128, 6)
    assert of_documents[32].sum() == int(are_bytes(windows[:, 1:]).sum()) < 6 * 128
    with torch.no_grad():
        whole = token_nats(model, windows).sum().item()
        pieces = [token_nats(model, windows[:, start : start + 33]).sum().item() for start in (0, 32, 64, 96)]
    nats = found.groupby("length")["nats"].sum()
    assert nats[128] == pytest.approx(whole, rel=1e-6)
    assert nats[32] == pytest.approx(sum(pieces), rel=1e-6)
    assert nats[32] != pytest.approx(nats[128], rel=1e-6)


@pytest.mark.parametrize(
    ("factors", "max_bytes", "says"),
    [
        ((2, 3), 1000, r"factors are \(2, 3\)"),
        ((), 1000, "factors are"),
        ((1, 4), 100, "max_bytes is 100; expected at least 128"),
    ],
)
def test_lengths_that_cannot_be_cut_are_refused(tiny, tmp_path, factors, max_bytes, says):
    text = tokenize_corpus(tiny.corpus, tmp_path / "cache")
    with pytest.raises(PositionsError, match=says):
        evaluate_lengths(None, text, 32, factors, max_bytes)


@pytest.fixture
def written(tmp_path):
    """Results by hand: per_layer lacks seed 2, static lacks seed 3."""
    draw = np.random.default_rng(0)
    for variant, seeds in (("static", (0, 1, 2)), ("per_layer", (0, 1, 3)), ("signed", (0,))):
        for seed in seeds:
            folder = tmp_path / f"{variant}-{seed}"
            folder.mkdir()
            rows = [(d, "a", length, 10 * (d + 1), draw.uniform(10, 30)) for length in (8, 16) for d in range(5)]
            table = pd.DataFrame(rows, columns=["document", "source", "length", "bytes", "nats"])
            table.to_csv(folder / "heldout.csv", index=False)
    (tmp_path / "signed-1").mkdir()
    (tmp_path / "signed-1" / "diverged.json").write_text('{"step": 7}')
    return tmp_path


def test_the_table_is_what_scipy_finds_by_hand(written):
    table = loss_table(suite_tables(written), written.name).set_index(["variant", "length"])
    row = table.loc["per_layer", 16]
    nats = {
        name: pd.read_csv(written / name / "heldout.csv").query("length == 16")["nats"].to_numpy()
        for name in ("static-0", "static-1", "per_layer-0", "per_layer-1", "per_layer-3")
    }
    assert (row["documents"], row["bytes"], row["n_seeds"], row["seeds"]) == (5, 150, 3, "0 1")
    assert row["loss"] == pytest.approx(np.mean([nats[f"per_layer-{s}"].sum() / 150 for s in (0, 1, 3)]))
    by_document = [nats[f"per_layer-{s}"] - nats[f"static-{s}"] for s in (0, 1)]
    differences = [difference.sum() / 150 for difference in by_document]
    assert row["difference"] == pytest.approx(np.mean(differences))
    low, high = stats.t.interval(0.95, 1, np.mean(differences), stats.sem(differences))
    assert (row["seeds_low"], row["seeds_high"]) == pytest.approx((low, high))
    counts = intervals.resamples(5, 0)
    means = counts @ np.mean(by_document, axis=0) / (counts @ (10 * np.arange(1, 6)))
    assert (row["documents_low"], row["documents_high"]) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))
    assert pd.isna(table.loc[("static", 8), "difference"])


def test_one_seed_has_no_interval_and_the_table_says_so(written, capsys):
    row = loss_table(suite_tables(written), written.name).set_index(["variant", "length"]).loc["signed", 8]
    assert pd.isna(row["seeds_low"])
    assert row["documents_low"] < row["difference"] < row["documents_high"]
    assert row["diverged"] == "seed 1 at step 7"
    suite_module.print_losses(loss_table(suite_tables(written), written.name))
    printed = capsys.readouterr().out
    assert "one seed" in printed
    assert "signed diverged: seed 1 at step 7" in printed
    assert "nan" not in printed
    with pytest.raises(PositionsError, match=r"differences of 1 seed\(s\); expected at least 2"):
        over_seeds(np.array([0.1]))


def test_results_of_other_text_are_not_compared(written):
    path = written / "static-1" / "heldout.csv"
    path.write_text(path.read_text().replace(",10,", ",11,"))
    with pytest.raises(PositionsError, match="other text"):
        loss_table(suite_tables(written), written.name)


def test_a_variant_that_was_trained_otherwise_is_not_compared(done, tmp_path):
    shutil.copytree(done / "results", tmp_path / "results")
    path = tmp_path / "results" / "static-1" / "run.json"
    described = json.loads(path.read_text())
    described["config"]["model"]["rope_theta"] = 50_000.0
    path.write_text(json.dumps(described))
    with pytest.raises(PositionsError, match=r"was trained with another model.rope.theta than 10000"):
        suite(replace(asked(done), results=tmp_path / "results"))


def test_results_of_other_runs_are_not_overwritten(done):
    elsewhere = replace(asked(done, steps=STEPS + 1), output=done / "elsewhere")
    with pytest.raises(PositionsError, match="was trained with another steps than 5"):
        suite(elsewhere)
    assert not (done / "elsewhere").exists()


def test_a_run_of_another_configuration_is_refused(done, tmp_path):
    with pytest.raises(PositionsError, match="static-0 was started with another configuration"):
        suite(replace(asked(done, steps=STEPS + 1), results=tmp_path / "results"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--variants", "static", "elastic"], "there is no variant 'elastic'; expected some of static, shared"),
        (["--seeds", 0, 1, 0], "seeds 0 1 0; expected at least one of each, and distinct seeds"),
        (["--seeds", 0, "--variants", "frozen"], "shared-0, which is not finished"),
        (["--preset", "huge"], "expected one of base, long, paper, quick, tiny"),
        (["--steps", 0], "steps is 0"),
        (["--corpus", "klingon", "--seeds", 0, "--variants", "static"], "klingon"),
    ],
)
def test_bad_requests_end_in_one_sentence(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite_module, "load_preset", load_preset)
    assert main(words(tmp_path, *arguments)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("lens-positions: ")
    assert says in error
    assert not (tmp_path / "results").exists()


def test_help_lists_the_variants(capsys):
    with pytest.raises(SystemExit) as left:
        main(["suite", "--help"])
    assert left.value.code == 0
    output = capsys.readouterr().out
    assert all(name in output for name in (*VARIANTS, "--seeds", "--results"))
