"""Shipped models: found by name, float32 from half the bytes, and a card whose every number can be traced."""

import fnmatch
import json
import re
import tomllib
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lens_positions as lp
from experiments import suite as suite_module
from experiments.gather import gather
from experiments.options import GatherConfig
from experiments.ship import ROPE, SHIPPED, ShipConfig, card, score_table, ship
from experiments.suite import SuiteConfig, evaluate_lengths, scores_by_seed, suite
from experiments.tables import RunName, read_tables
from lens_positions import checkpoint as pretrained
from lens_positions import corpora
from lens_positions.checkpoint import fingerprint, load_base, load_pretrained, shipped_names
from lens_positions.checkpoint_files import sha256_of_file
from lens_positions.training.__main__ import main
from lens_positions.training.config import GraftConfig, TrainConfig
from lens_positions.training.data import tokenize_corpus
from lens_positions.training.graft import GraftedModel

ROOT = Path(__file__).parents[2]
TOKENS = torch.randint(0, 257, (2, 11), generator=torch.Generator().manual_seed(6))
REAL = shipped_names()
MOST_BYTES = 8_000_000


@pytest.fixture(scope="module", autouse=True)
def _little_text():
    """The bilingual corpus in small: its sources, and a little text of each."""
    speeches = [(f"Message {i}: the state of union {i * i} is strong. " * 8, "sotu") for i in range(40)]
    daily = [(f"中国有{i}个城市，人民{i * i}。" * 4, "peoples_daily") for i in range(44)]
    reviews = [(f"很好{i}，{i * i}分。" * 3, "reviews") for i in range(44)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(corpora, "_speeches", lambda: speeches)
        patched.setattr(corpora, "_peoples_daily", lambda: (daily[:40], daily[40:]))
        patched.setattr(corpora, "_reviews", lambda: (reviews[:40], reviews[40:]))
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished suite of the three variants, as tiny stand-ins for the runs that are shipped."""
    folder = tmp_path_factory.mktemp("done")
    tiny = TrainConfig(
        model=lp.PositionModelConfig(d_model=16, n_layers=2, n_heads=2, n_ctx=32),
        steps=4,
        batch_size=4,
        warmup_steps=1,
        learning_rate=3e-2,
        eval_windows=4,
    )
    folders = {"output": folder / "runs", "results": folder / "files" / "long", "cache": folder / "cache"}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(suite_module, "load_preset", lambda name: tiny)
        suite(SuiteConfig(seeds=(0,), variants=tuple(SHIPPED.values()), **folders))
    gather(GatherConfig(folder / "files", folder / "results"))
    return folder


def asked(folder, output):
    return ShipConfig(runs=folder / "runs", results=folder / "results", output=output, cache=folder / "cache")


@pytest.fixture(scope="module")
def shipped(done):
    """The folder that the three were shipped into, and what was found of them."""
    return done / "shipped", ship(asked(done, done / "shipped"))


@pytest.fixture
def by_name(shipped, monkeypatch):
    """As if the package had been installed with them."""
    monkeypatch.setattr(pretrained, "CHECKPOINTS", shipped[0])


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logits_of(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.usefixtures("by_name")
@pytest.mark.parametrize(("name", "variant"), SHIPPED.items())
def test_a_shipped_model_is_the_run_with_rounded_weights(name, variant, shipped, done):
    folder, run = shipped[0] / name, done / "runs" / f"{variant}-0" / "model"
    assert {w.dtype for w in load_file(folder / "model.safetensors").values()} == {torch.float16}
    for file in ("positions.safetensors", "config.json", "tokenizer.json"):
        assert (folder / file).read_bytes() == (run / file).read_bytes()
    described = [json.loads((place / "positions.json").read_text("utf-8")) for place in (folder, run)]
    assert [
        d.pop("files")["model.safetensors"] == sha256_of_file(place / "model.safetensors")
        for d, place in zip(described, (folder, run), strict=True)
    ] == [True, True]
    assert described[0] == described[1]
    expected, _ = load_pretrained(run)
    exact = logits_of(expected)
    with torch.no_grad():
        for parameter_name, parameter in expected.named_parameters():
            if "position_streams" not in parameter_name:
                parameter.copy_(parameter.half())
    loaded, tokenizer = load_pretrained(name)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(logits_of(loaded), logits_of(expected))
    assert not torch.equal(logits_of(loaded), exact)
    assert tokenizer("é")["input_ids"] == [256, 195, 169]
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert plain.dtype == torch.float32
    assert torch.equal(plain.lm_head.weight, expected.lm_head.weight)
    bridge = lp.HookedPositionTransformer.from_pretrained(name)
    assert (bridge.name, bridge.position_config.source) == (name, variant)
    assert bridge.increments("ab 中").shape == (2, 1, 7)


@pytest.mark.parametrize(("name", "variant"), SHIPPED.items())
def test_scores_are_those_of_the_shipped_weights(name, variant, shipped, done):
    folder, tables = shipped
    model, _ = load_pretrained(folder / name)
    found = evaluate_lengths(model, tokenize_corpus("bilingual", done / "cache"), 32)
    written = pd.read_csv(folder / name / "scores.csv")
    assert list(written.columns) == ["document", "source", "length", "bytes", "nats"]
    assert set(written["source"]) == {"sotu", "peoples_daily", "reviews"}
    assert written["nats"].tolist() == pytest.approx(found["nats"].tolist(), abs=1e-6)
    exact = pd.read_csv(done / "files" / "long" / f"{variant}-0" / "heldout.csv")
    table = tables[name].set_index(["text", "length"])
    for length in (32, 64, 128):
        at = found[found["length"] == length]
        loss = at["nats"].sum() / at["bytes"].sum()
        row = table.loc["all", length]
        assert row["loss"] == pytest.approx(loss, abs=1e-6)
        unrounded = exact[exact["length"] == length]["nats"].sum() / at["bytes"].sum()
        assert row["rounding"] == pytest.approx(loss - unrounded, abs=1e-6)
        assert 0 < abs(row["rounding"]) < 1e-2
        assert (row["documents"], row["bytes"]) == (len(at), at["bytes"].sum())
        assert sum(table.loc[text, length]["bytes"] for text in ("English", "Chinese")) == row["bytes"]
        assert f"| all | {length} | {len(at)} | {at['bytes'].sum():,} | {loss:.4f} |" in card_of(folder / name)
    chinese = written[(written["source"] != "sotu") & (written["length"] == 64)]
    assert table.loc["Chinese", 64]["loss"] == chinese["nats"].sum() / chinese["bytes"].sum()


def card_of(folder):
    return (folder / "CARD.md").read_text("utf-8")


def test_differences_to_rope_are_paired_and_have_an_interval_over_documents(shipped):
    folder, tables = shipped
    ours, rope = (tables[name].set_index(["text", "length"]).loc["all", 32] for name in ("bilingual-shared", ROPE))
    assert ours["difference"] == pytest.approx(ours["loss"] - rope["loss"], abs=1e-12)
    assert ours["documents_low"] < ours["difference"] < ours["documents_high"]
    low, high = ours["documents_low"], ours["documents_high"]
    assert f"| {ours['difference']:+.4f} ({low:+.4f} to {high:+.4f}) |" in card_of(folder / "bilingual-shared")
    assert "no interval over seeds" in card_of(folder / "bilingual-shared")
    assert rope["difference"] == 0
    assert f"minus {ROPE}" not in card_of(folder / ROPE)


def test_the_card_says_what_the_run_says(shipped, done):
    folder, tables = shipped
    for name, variant in SHIPPED.items():
        text = card_of(folder / name)
        described = json.loads((folder / name / "run.json").read_text("utf-8"))
        results = done / "files" / "long" / f"{variant}-0" / "run.json"
        assert (folder / name / "run.json").read_bytes() == results.read_bytes()
        rounding = tables[name]["rounding"][0]
        for said in (
            described["command"],
            described["corpus_fingerprint"],
            f"{described['parameters']:,} parameters",
            f"{4 * 4 * 32} bytes of it",
            f"torch {described['versions']['torch']}",
            f"lens-positions experiments ship --runs {done / 'runs'}",
            f'from_pretrained("{name}")',
            f"32 tokens by {rounding:+.6f} nats per byte",
        ):
            assert said in text, said
        assert "nan" not in text


def test_shipping_again_changes_nothing(shipped, done, capsys):
    before = contents(shipped[0])
    folders = {"--runs": done / "runs", "--results": done / "results", "--cache": done / "cache"}
    folders["--output"] = shipped[0]
    assert main(["ship", *(str(word) for option in folders.items() for word in option)]) == 0
    assert contents(shipped[0]) == before
    assert sorted(path.name for path in shipped[0].iterdir()) == sorted(SHIPPED)
    loss = shipped[1][ROPE]["loss"][0]
    assert f"bilingual-rope: {loss:.4f} nats per byte at 32 tokens" in capsys.readouterr().out


@pytest.mark.usefixtures("by_name")
def test_a_local_folder_wins_over_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_pretrained(ROPE)[0].position_streams.config.source == "static"
    pretrained.save_pretrained(*load_pretrained("bilingual-shared"), ROPE)
    assert load_pretrained(ROPE)[0].position_streams.config.source == "shared"


@pytest.mark.usefixtures("by_name")
def test_an_adapter_knows_a_shipped_base_by_its_name(tmp_path):
    config = GraftConfig(base=ROPE, n_ctx=32, positions=lp.PositionConfig(source="per_layer"))
    grafted = GraftedModel(config, config.positions)
    with torch.no_grad():
        for parameter in grafted.streams.parameters():
            parameter.normal_()
    grafted.save(tmp_path / "adapter")
    base = json.loads((tmp_path / "adapter" / "positions.json").read_text("utf-8"))["base"]
    assert base == {"name": ROPE, "sha256": fingerprint(load_base(ROPE)[0]), "dtype": "float32"}
    assert torch.equal(logits_of(load_pretrained(tmp_path / "adapter")[0]), logits_of(grafted.model.eval()))
    with pytest.raises(lp.PositionsError, match=r"bilingual-shared has position streams of its own \(shared\)"):
        GraftedModel(replace(config, base="bilingual-shared"), config.positions)


@pytest.mark.usefixtures("by_name")
def test_an_unknown_name_is_told_the_known_ones():
    known = "bilingual-per-layer, bilingual-rope, bilingual-shared, smollm2-135m-instruct"
    with pytest.raises(lp.PositionsError, match=rf"bilingual-rop cannot be loaded.*expected a folder.*{known}") as said:
        load_pretrained("bilingual-rop")
    assert "\n" not in str(said.value)
    with pytest.raises(lp.PositionsError, match="owner/bilingual-rope cannot be loaded as a transformers model: "):
        load_pretrained("owner/bilingual-rope")


def test_without_shipped_models_nothing_is_missing(tmp_path, monkeypatch):
    for folder in (tmp_path, tmp_path / "nothing"):
        monkeypatch.setattr(pretrained, "CHECKPOINTS", folder)
        assert shipped_names() == []
        with pytest.raises(lp.PositionsError, match=r"one of smollm2-135m-instruct\)"):
            load_pretrained(ROPE)


def rewrite(path, **changes):
    described = json.loads(path.read_text("utf-8"))
    described["config"] |= changes
    path.write_text(json.dumps(described), "utf-8")


RUN, RESULTS = Path("runs/shared-0"), Path("files/long/shared-0")
SPOILT = {
    "no run": (lambda at: (at / RUN / "training.json").unlink(), "there is no run .*shared-0; expected one that"),
    "an unfinished run": (lambda at: (at / RUN / "heldout.csv").unlink(), "run .*shared-0 is not finished; expected"),
    "no scores": (
        lambda at: (at / RESULTS / "run.json").unlink(),
        "results has no scores of the weights in .*shared-0; expected those that",
    ),
    "scores of other weights": (
        lambda at: (at / RUN / "model/model.safetensors").write_bytes(b"other"),
        "results has no scores of the weights in .*shared-0; expected those that",
    ),
    "another length of training": (
        lambda at: rewrite(at / RESULTS / "run.json", steps=5),
        "shared-0 was trained with steps 5 and .*static-0 with 4; expected runs that differ in their increments alone",
    ),
    "another shape": (
        lambda at: rewrite(at / RESULTS / "run.json", model=asdict(lp.PositionModelConfig(d_model=32))),
        "shared-0 was trained with model.d_model 32 and .*static-0 with 16",
    ),
    "another corpus": (
        lambda at: [rewrite(path, corpus="code") for path in at.glob("files/long/*/run.json")],
        "static-0 was trained on code; expected bilingual, as the names bilingual-rope, .* say",
    ),
    "text that has changed": (
        lambda at: [rewrite(path, max_bytes=9000) for path in at.glob("files/long/*/run.json")],
        "static-0 was started with another configuration or text",
    ),
    "scores of other text": (
        lambda at: (at / RESULTS / "heldout.csv").write_text("document,source,length,bytes,nats\n1,sotu,32,9,9.5\n"),
        "shared-0 was scored on other text than what is shipped",
    ),
    "something in the way": (
        lambda at: [(at / "out" / ROPE).mkdir(parents=True), (at / "out" / ROPE / "notes.txt").write_text("mine")],
        "bilingual-rope holds other files; expected a shipped model",
    ),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_what_cannot_be_shipped_is_one_sentence_and_nothing_is_written(spoilt, done, tmp_path, capsys):
    for path, data in contents(done).items():
        if path.parts[0] in ("runs", "files") and "checkpoints" not in path.parts:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(data)
    harm, says = SPOILT[spoilt]
    harm(tmp_path)
    gather(GatherConfig(tmp_path / "files", tmp_path / "results"))
    before = contents(tmp_path)
    folders = {"--runs": "runs", "--results": "results", "--output": "out", "--cache": done / "cache"}
    assert main(["ship", *(str(w) for name, at in folders.items() for w in (name, tmp_path / at))]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("lens-positions: ")
    assert re.search(says, error)
    assert contents(tmp_path) == before


def test_every_file_of_a_shipped_model_is_in_the_package(shipped):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["lens_positions.checkpoints"]
    for path in contents(shipped[0]):
        assert any(fnmatch.fnmatch(str(path), pattern) for pattern in patterns), path


@pytest.mark.parametrize("name", REAL)
def test_what_the_package_ships_loads_by_its_name_and_is_small(name):
    folder = pretrained.CHECKPOINTS / name
    assert name in SHIPPED
    model = lp.HookedPositionTransformer.from_pretrained(name)
    assert (model.name, model.cfg.dtype) == (name, torch.float32)
    assert torch.isfinite(model("The people, 人民")).all()
    assert sum(map(len, contents(folder).values())) < MOST_BYTES


@pytest.mark.parametrize("name", REAL)
def test_the_card_of_what_the_package_ships_has_the_losses_of_its_scores(name):
    folder = pretrained.CHECKPOINTS / name
    scores = pd.read_csv(folder / "scores.csv")
    at = scores[scores["length"] == scores["length"].min()]
    row = re.search(r"^\| all \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|", card_of(folder), re.MULTILINE)
    loss = at["nats"].sum() / at["bytes"].sum()
    expected = (f"{at['length'].iloc[0]:,}", f"{len(at):,}", f"{at['bytes'].sum():,}", f"{loss:.4f}")
    assert row is not None
    assert row.groups() == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_what_the_package_says_of_a_run_is_what_the_tables_say(name):
    folder, results = pretrained.CHECKPOINTS / name, read_tables(ROOT / "experiments" / "results")
    described = dict(results.runs[RunName("long", SHIPPED[name], 0)])
    assert json.dumps(described, indent=2) + "\n" == (folder / "run.json").read_text("utf-8")
    exact = scores_by_seed(results, "long", SHIPPED[name])[0]
    table = score_table(folder, exact, pretrained.CHECKPOINTS / ROPE, "run")
    command = re.search(r"and shipped by\n\n    (.*)\n", card_of(folder))[1]
    assert card(name, described, table, command) == card_of(folder)


@pytest.mark.slow
def test_what_the_package_ships_differs_in_increments_alone():
    found = [json.loads((pretrained.CHECKPOINTS / name / "run.json").read_text("utf-8")) for name in REAL]
    for described in found:
        described["config"]["model"].pop("positions")
    assert len({json.dumps([described["config"], described["corpus_fingerprint"]]) for described in found}) <= 1
    assert REAL in ([], sorted(SHIPPED))
