"""Measurements of finished runs, and what RESULTS.md makes of the files."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments import findings as findings_module
from experiments import measure as measure_module
from experiments import results as results_module
from experiments.commands import main as study
from experiments.findings import (
    CLAIMS,
    FINDINGS,
    LAYER_0_REPORTED,
    Suite,
    order_by_chance,
    what_increments_cause,
    word_boundaries,
)
from experiments.gather import gather, suite_tables
from experiments.measure import MEASUREMENTS, MeasureConfig, measure
from experiments.options import WHERE_ASKED, GatherConfig
from experiments.results import ResultsConfig, write_results
from experiments.suite import weights_of
from experiments.tables import read_tables
from lens_positions import PositionsError, causal, corpora
from lens_positions.analysis.specialisation import specialisation
from lens_positions.analysis.word_boundaries import boundary_auc, branching_entropy, mutual_information
from lens_positions.training.__main__ import main
from lens_positions.viz.style import MissingFontError

ROOT = Path(__file__).parents[2]
PROSE = ["The cat sat on the mat.", "天气很好，我们在学习。", "One more text, of two lines.\nHere."]
WORDS = [["天气", "很", "好"], ["我们", "在", "学习", "中文"]]


@pytest.fixture
def trained(tiny_model, tmp_path, monkeypatch):
    """A finished, scored run of one variant, and little text to measure it on."""
    folder = tmp_path / "runs" / "per_layer-0"
    tiny_model(source="per_layer").save_pretrained(folder / "model")
    (folder / "heldout.csv").write_text("")
    for name, texts in (("static-0", "static"), ("per_layer-0", "per_layer")):
        results = tmp_path / "results" / name
        results.mkdir(parents=True)
        (results / "run.json").write_text(json.dumps({"variant": texts, "sha256": weights_of(folder)}))
    monkeypatch.setattr(measure_module.Text, "segmented", WORDS)
    monkeypatch.setattr(measure_module.Text, "by_jieba", [["天气", "很好"], ["我们", "在", "学习中文"]])
    monkeypatch.setattr(measure_module.Text, "association", staticmethod(mutual_information(PROSE)))
    pairs = pd.DataFrame({"name": ["New York", "Rio Grande"], "ordinary": ["public debt", "tax cuts"]})
    monkeypatch.setattr(measure_module.Text, "entropy", staticmethod(branching_entropy(PROSE)))
    monkeypatch.setattr(measure_module.Text, "pairs", pairs)
    monkeypatch.setattr(measure_module.Text, "names", ["New York", "Rio Grande"])
    monkeypatch.setattr(measure_module.Text, "other_english", [("pepys", PROSE[0]), ("eltec", PROSE[2])])
    monkeypatch.setattr(measure_module.Text, "prose", PROSE)
    monkeypatch.setattr(measure_module.Text, "code", ["def f(x):\n    return x", "a = [1, 2]\n"])
    monkeypatch.setattr(corpora, "training_excerpts", lambda corpus, characters: PROSE[:2])
    monkeypatch.setattr(corpora, "heldout_excerpts", lambda corpus, characters: PROSE[1:])
    return tmp_path


def asked(folder, **more):
    return MeasureConfig(output=folder / "runs", results=folder / "results", **more)


def on_disk(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_every_measurement_is_that_of_its_function(trained):
    assert measure(asked(trained)) == ["per_layer-0"]
    folder = trained / "results" / "per_layer-0"
    done = json.loads((folder / "measured.json").read_text())
    assert list(done) == [name for name in MEASUREMENTS if name not in WHERE_ASKED]
    model = measure_module.HookedPositionTransformer.from_pretrained(str(trained / "runs" / "per_layer-0" / "model"))
    found = pd.read_csv(folder / "boundaries.csv")
    lines = ["".join(line) for line in WORDS]
    expected = boundary_auc(model, lines, WORDS, PROSE)
    of_people = found[found["words"] == "human"].drop(columns="words")
    pd.testing.assert_frame_equal(of_people, expected, check_dtype=False, rtol=1e-5)
    assert list(found[found["words"] == "jieba"]["measure"].unique()) == [
        "increment",
        "branching entropy",
        "mutual information",
    ]
    found = pd.read_csv(folder / "specialisation.csv")
    assert found["explained"].tolist()[:2] == pytest.approx(
        specialisation(model, PROSE)["explained"].tolist(), rel=1e-5
    )
    found = pd.read_csv(folder / "ablation.csv", dtype={"layer": str, "to": str})
    means = causal.token_means(model, PROSE[:2])
    expected = causal.ablation_table(model, PROSE[1:], means=means).loss
    assert found["change"].tolist()[: len(expected)] == pytest.approx(expected["change"].tolist(), rel=1e-4)
    best = found[found["to"] == "best constant"]
    constants = causal.ablation_table(model, PROSE[:2], to=measure_module.CONSTANTS).loss
    chosen = constants[constants["layer"] == 1].set_index("to")["change"].astype(float).idxmin()
    row = best[(best["layer"] == "1") & (best["corpus"] == "english")].iloc[0]
    assert row["constant"] == float(chosen)
    assert done["below_zero"]["refused"].startswith("the model has activation 'sigmoid'")
    assert not (folder / "below_zero.csv").exists()


@pytest.mark.slow
def test_what_is_measured_is_left_and_new_weights_are_measured_anew(trained, capsys, tiny_model):
    measure(asked(trained))
    before = on_disk(trained)
    assert main(["measure", "--output", str(trained / "runs"), "--results", str(trained / "results")]) == 0
    assert on_disk(trained) == before
    assert "measured: per_layer-0" in capsys.readouterr().out
    run = trained / "runs" / "per_layer-0"
    (trained / "results" / "per_layer-0" / "run.json").write_text(
        json.dumps({"variant": "per_layer", "sha256": {"model.safetensors": "0" * 64}})
    )
    with pytest.raises(PositionsError, match=r"is not the run that .* was scored on"):
        measure(asked(trained))
    (run / "heldout.csv").unlink()  # the weights are elsewhere
    assert measure(asked(trained)) == []
    assert "what was measured stays" in capsys.readouterr().err


@pytest.mark.slow
def test_some_measurements_can_be_asked_for_and_the_rest_come_later(trained):
    measure(asked(trained, tables=("saturation", "kinds")))
    described = trained / "results" / "per_layer-0" / "measured.json"
    assert list(json.loads(described.read_text())) == ["kinds", "saturation"]
    measure(asked(trained))
    assert set(json.loads(described.read_text())) == set(MEASUREMENTS) - set(WHERE_ASKED)


def test_boundaries_of_a_treebank_are_those_of_its_words(trained, tmp_path):
    rows = [
        ["\t".join([str(i), word, *"_" * 7, "SpaceAfter=No"]) for i, word in enumerate(line, 1)] for line in WORDS * 2
    ]
    path = tmp_path / "some.conllu"
    path.write_text("\n\n".join("\n".join(line) for line in rows), encoding="utf-8")
    assert measure(asked(trained, tables=("treebank",), treebank=(path,))) == ["per_layer-0"]
    table = pd.read_csv(trained / "results" / "per_layer-0" / "treebank.csv")
    assert set(table["text"]) == {"some"}
    model = measure_module.HookedPositionTransformer.from_pretrained(str(trained / "runs" / "per_layer-0" / "model"))
    expected = boundary_auc(model, ["".join(line) for line in WORDS * 2], WORDS * 2)
    expected = expected[expected["measure"] == "increment"]["auc"]
    assert table[table["measure"] == "increment"]["auc"].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    path.write_text("\n".join(rows[0]), encoding="utf-8")
    (trained / "results" / "per_layer-0" / "measured.json").unlink()
    measure(asked(trained, tables=("treebank",), treebank=(path,)))
    refused = json.loads((trained / "results" / "per_layer-0" / "measured.json").read_text())["treebank"]["refused"]
    assert (
        refused == "1 of the lines have gaps between Chinese characters; expected 3 or more, to fit a probe on others."
    )
    assert {"probe", "probe, labels shuffled"} < set(table["measure"])


def test_the_loss_on_other_writers_english_is_that_of_each_document(trained):
    measure(asked(trained, tables=("english",)))
    table = pd.read_csv(trained / "results" / "per_layer-0" / "english.csv")
    assert list(table["source"]) == ["pepys", "eltec"]
    assert list(table["bytes"]) == [len(PROSE[0].encode()), len(PROSE[2].encode())]
    model = measure_module.HookedPositionTransformer.from_pretrained(str(trained / "runs" / "per_layer-0" / "model"))
    by_hand = model(PROSE[0], return_type="loss", loss_per_token=True).sum().item()
    assert table["nats"][0] == pytest.approx(by_hand, rel=0.02)  # the document's end is left out


@pytest.mark.slow
def test_an_interruption_keeps_the_measurements_that_are_done(trained, monkeypatch):
    def stop(subject):
        raise KeyboardInterrupt

    monkeypatch.setitem(MEASUREMENTS, "names", (stop, "names {model}"))
    with pytest.raises(KeyboardInterrupt):
        measure(asked(trained))
    done = json.loads((trained / "results" / "per_layer-0" / "measured.json").read_text())
    assert list(done) == ["boundaries", "kinds", "kinds_code"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["measure", "--only", "shared-7"], "has no scored run 'shared-7'"),
        (["measure", "--only", "static-0"], "no scored run with increments"),
        (["measure", "--tables", "treebank"], "asked for without a text; expected --treebank FILE.conllu"),
        (["measure", "--tables", "treebank", "--treebank", "nowhere"], "nowhere could not be read"),
        (["measure", "--tables", "colours"], "there is no measurement 'colours'; expected some of boundaries, kinds"),
    ],
)
def test_bad_requests_end_in_one_sentence(trained, arguments, says, capsys):
    folders = ["--output", str(trained / "runs"), "--results", str(trained / "results")]
    assert main([arguments[0], *folders, *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1


# What RESULTS.md says


VARIANTS = {"static": 0.0, "shared": -0.002, "per_layer": 0.004}
FLAT = {0: 0.5, 1: 0.51, 2: 0.505, 3: 0.49}
KNOWING = {0: 0.5, 1: 0.53, 2: 0.62, 3: 0.4}
SEEDS = (0, 1, 2)


@pytest.fixture
def results(tmp_path):
    """Files of results with planted answers."""
    for variant, difference in VARIANTS.items():
        for seed in SEEDS:
            folder = tmp_path / "results" / "tiny" / f"{variant}-{seed}"
            folder.mkdir(parents=True)
            rng = np.random.default_rng(seed)
            size, noise = np.array([900, 1000, 1100]), rng.normal(0, 1e-4, 3)
            nats = size * (1.5 + seed / 100 + difference * (1 + seed / 10) + (noise if variant != "static" else 0))
            tables = [
                pd.DataFrame({"document": range(3), "source": "x", "length": n, "bytes": size, "nats": nats * grows})
                for n, grows in ((256, 1.0), (512, 1.1), (1024, 1.2))
            ]
            pd.concat(tables).to_csv(folder / "heldout.csv", index=False)
            config = {"steps": 10, "batch_size": 8, "corpus": "bilingual"}
            config["model"] = {"n_layers": 4, "d_model": 128, "n_heads": 4, "n_ctx": 256}
            described = {"variant": variant, "seed": seed, "command": "lens-positions train", "config": config}
            described |= {"parameters": 1, "sha256": {"model.safetensors": "0" * 64}, "device": "CPU"}
            described |= {"git": {"commit": "c" * 40, "changed": False}, "versions": {"torch": "2"}}
            (folder / "run.json").write_text(json.dumps(described))
            if variant != "static":
                of_layers(tmp_path, variant, seed, KNOWING)
    return tmp_path


def of_layers(folder, variant, seed, areas):
    """Areas under the ROC curve by layer, with intervals of 0.01 either way."""
    rows = [
        {"measure": measure, "layer": layer, "auc": auc, "low": auc - 0.01, "high": auc + 0.01, "words": words}
        for words in ("human", "jieba")
        for measure, values in (
            ("increment", areas),
            ("within token", areas),
            ("labels shuffled", dict.fromkeys(areas, 0.5)),
            ("best order of tokens", {np.nan: 0.555}),
            ("branching entropy", {np.nan: 0.75}),
            ("mutual information", {np.nan: 0.87}),
        )
        for layer, auc in values.items()
    ]
    path = folder / "results" / "tiny" / f"{variant}-{seed}" / "boundaries.csv"
    pd.DataFrame(rows).assign(n=100, boundaries=40, lines=7).to_csv(path, index=False)


def tiny_of(folder):
    """The suite, of the files as they are now."""
    return Suite(suite_tables(folder / "results" / "tiny"), "tiny")


def written(folder):
    """What is asked for, of the files as they are now."""
    gather(GatherConfig(folder / "results", folder / "tables"))
    asked = {"results": folder / "tables", "output": folder / "RESULTS.md", "figures": folder}
    return ResultsConfig(preset="tiny", beside=("base",), **asked)


def call_of(said, title):
    """The call in the table that opens a text."""
    (row,) = [line for line in said.splitlines() if line.startswith(f"| [{title}]")]
    return row.split(" | ")[3].strip("*")


@pytest.mark.slow
def test_the_same_files_give_the_same_text_and_figures(results):
    write_results(written(results))
    before = on_disk(results)
    assert (results / "results_losses_tiny.png").is_file()
    assert (results / "results_boundaries_tiny.png").is_file()
    write_results(written(results))
    assert on_disk(results) == before


@pytest.mark.slow
def test_losses_are_judged_by_their_interval_over_seeds(results):
    write_results(written(results))
    said = (results / "RESULTS.md").read_text()
    row = next(line for line in said.splitlines() if line.startswith("| per layer | 3"))
    by_seed = []
    for seed in SEEDS:
        tables = [pd.read_csv(results / f"results/tiny/{name}-{seed}/heldout.csv") for name in ("per_layer", "static")]
        ours, theirs = (table[table["length"] == 256] for table in tables)
        by_seed.append((ours["nats"].sum() - theirs["nats"].sum()) / ours["bytes"].sum())
    low, high = stats.t.interval(0.95, 2, np.mean(by_seed), stats.sem(by_seed))
    assert f"{np.mean(by_seed):+.4f} | {low:+.4f} to {high:+.4f}" in row
    assert call_of(said, "Learned increments cost no loss") == "agrees"
    worse = results / "results/tiny/per_layer-2/heldout.csv"
    table = pd.read_csv(worse)
    table.assign(nats=table["nats"] * 1.02).to_csv(worse, index=False)
    write_results(written(results))
    assert call_of((results / "RESULTS.md").read_text(), "Learned increments cost no loss") == "undecided"


def test_a_cost_in_one_language_is_a_cost(results):
    """Half of the documents are of another language; per layer costs 0.05 in it, and gains as much in the first."""
    for seed in SEEDS:
        for variant in VARIANTS:
            path = results / f"results/tiny/{variant}-{seed}/heldout.csv"
            table = pd.read_csv(path).assign(source=["sotu", "reviews", "reviews"] * 3)
            if variant == "per_layer":
                table["nats"] += table["bytes"] * np.where(table["source"] == "sotu", -0.12, 0.05)
            table.to_csv(path, index=False)
    (finding,) = [find(tiny_of(results)) for find in FINDINGS if find.__name__ == "loss_neutral"]
    assert finding.verdict == "contrary"
    assert "4 intervals" in finding.power
    found = tiny_of(results).differences("per_layer")
    assert found["all"].mean < 0.01 < 0.05 < found["Chinese"].mean


@pytest.mark.slow
def test_a_seed_that_diverged_is_said_and_nothing_agrees_beside_it(results):
    gone = results / "results/tiny/per_layer-2"
    for file in gone.iterdir():
        file.unlink()
    (gone / "diverged.json").write_text(json.dumps({"step": 7, "config": {}}))
    write_results(written(results))
    said = (results / "RESULTS.md").read_text()
    assert call_of(said, "Learned increments cost no loss") == "undecided"
    assert "per layer diverged: seed 2 at step 7." in said


@pytest.mark.slow
def test_seeds_that_static_lacks_have_no_difference(results):
    for seed in (1, 2):
        for file in (results / f"results/tiny/static-{seed}").iterdir():
            file.unlink()
    write_results(written(results))
    said = (results / "RESULTS.md").read_text()
    assert call_of(said, "Learned increments cost no loss") == "untested"
    assert "| per layer | 3 (1 paired) |" in said
    assert "nan" not in said


@pytest.mark.slow
def test_another_suite_is_told_beside_with_what_it_has(results):
    base = results / "results" / "base"
    for variant in ("static", "per_layer"):
        shutil.copytree(results / "results" / "tiny" / f"{variant}-0", base / f"{variant}-0")
    text = write_results(written(results)).read_text()
    above, beside = text.split("## The same at less training: the preset base")
    assert "one seed" in beside
    assert "not run |" not in beside
    assert "| Learned increments cost no loss | **untested** |" in beside  # not at one seed
    assert "| Middle layers know Chinese word boundaries | **undecided** |" in beside
    assert "0.620 (0.610 to 0.630)" not in beside  # its layers stand in the file alone
    assert above.count("0.620 (0.610 to 0.630)") == 18
    assert "--preset base --variants static per_layer --seeds 0\n" in beside
    assert not (results / "results_boundaries_base.png").exists()


@pytest.mark.slow
def test_sentences_are_drawn_with_the_shipped_model(results, tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(results_module, "shipped_names", lambda: [results_module.DRAWN])
    monkeypatch.setattr(
        results_module, "HookedPositionTransformer", SimpleNamespace(from_pretrained=lambda name: tiny_model())
    )
    assert "results_chinese.png)" in write_results(written(results)).read_text()
    assert (results / "results_english.png").is_file()
    (results / "results_english.png").unlink()

    def fontless(*args, **kwargs):
        raise MissingFontError("no font")

    monkeypatch.setattr(results_module, "spacing", fontless)
    assert "results_english.png)" in write_results(written(results)).read_text()
    assert "results_english.png was not drawn: no font" in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize(
    ("by_seed", "verdict"),
    [
        ([KNOWING, KNOWING, {0: 0.5, 1: 0.63, 2: 0.5, 3: 0.5}], "agrees"),
        ([{0: 0.5, 1: 0.57, 2: 0.5, 3: 0.5}, {0: 0.5, 1: 0.43, 2: 0.5, 3: 0.5}, {0: 0.5, 1: 0.575}], "weaker"),
        ([FLAT, FLAT, FLAT], "absent"),
        ([KNOWING, FLAT, FLAT], "undecided"),
        ([{**FLAT, 0: 0.7}] * 3, "absent"),  # what layer 0 orders is not asked
    ],
)
def test_boundaries_are_judged_within_tokens_over_seeds(results, by_seed, verdict):
    for seed in SEEDS:
        of_layers(results, "per_layer", seed, by_seed[seed])
    found = word_boundaries(tiny_of(results))
    assert found.verdict == verdict
    assert "0.445 to 0.555" in found.control
    assert "0.750" in found.control


def test_boundaries_in_other_peoples_text_are_told_beside_them(results):
    for seed in SEEDS:
        of_layers(results, "per_layer", seed, KNOWING)
        rows = [
            {"measure": measure, "layer": layer, "within": value}
            for measure, values in {
                "increment": (0.9, 0.45 - seed / 100, 0.51),  # what layer 0 orders is not asked
                "probe": (0.5, 0.75, 0.8),
                "increment, labels shuffled": (0.5, 0.501, 0.499),
                "probe, labels shuffled": (0.5, 0.502, 0.5),
            }.items()
            for layer, value in enumerate(values)
        ]
        path = results / f"results/tiny/per_layer-{seed}/treebank.csv"
        pd.DataFrame(rows).assign(n=1234, boundaries=40, lines=7, text="some treebank").to_csv(path, index=False)
    found = word_boundaries(tiny_of(results))
    told = next(block for block in found.blocks if isinstance(block, str) and "other people" in block)
    assert "some treebank: 1,234 gaps in 7 sentences" in told
    assert "of increments 0.060 (0.035 to 0.085), by seed 0.050, 0.060, 0.070" in told
    assert "0.300 (0.300 to 0.300)" in told
    assert found.files[-1].endswith("treebank.csv")


def test_boundaries_that_were_not_measured_within_tokens_are_untested(results):
    for seed in SEEDS:
        path = results / f"results/tiny/per_layer-{seed}/boundaries.csv"
        table = pd.read_csv(path)
        table[table["measure"].isin(["increment", "labels shuffled", "mutual information"])].to_csv(path, index=False)
    found = word_boundaries(tiny_of(results))
    assert found.verdict == "untested"
    assert "0.620" in found.sentence


def names_of(folder, seed, beyond, names=0.7):
    """Shares of families that are nearer in the real order, alike in four layers."""
    shares = {"names": names, "ordinary pairs": names - beyond + 0.5, "names - ordinary pairs": beyond}
    rows = [
        {"layer": layer, "group": group, "n": 200, "families": 200, "real": 1, "difference": 0, "low": 0, "high": 0}
        | {"smaller": share if layer > 1 else 0.0, "q": 1}
        for layer in range(4)
        for group, share in shares.items()
    ]
    pd.DataFrame(rows).to_csv(folder / f"results/tiny/per_layer-{seed}/names.csv", index=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("beyond", "verdict"),
    [
        ((0.66, 0.65, 0.64), "agrees"),
        ((0.575, 0.57, 0.58), "weaker"),
        ((0.5, 0.51, 0.49), "absent"),  # though 70% of names are nearer: their pairs are too
        ((0.3, 0.31, 0.29), "contrary"),
        ((0.3, 0.5, 0.7), "undecided"),
    ],
)
def test_names_are_judged_beyond_ordinary_pairs(results, beyond, verdict):
    for seed, share in zip(SEEDS, beyond, strict=True):
        names_of(results, seed, share)
    assert finding_of(results, "Two-word names are pulled together").verdict == verdict


OF_TITLE = {}
"""The function of each finding, which says its title only with its verdict."""


def finding_of(folder, title):
    suite = tiny_of(folder)
    if not OF_TITLE:
        OF_TITLE.update({find(suite).title: find for find in FINDINGS})
        assert len(OF_TITLE) == len(FINDINGS)
    found = OF_TITLE[title](suite)
    assert found.title == title
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("largest", "verdict"),
    [((7, 8, 9), "agrees"), ((2, 2.1, 2.2), "weaker"), ((1, 1.1, 1.2), "absent"), ((1, 3, 9), "undecided")],
)
def test_scope_is_judged_in_models_of_program_text(results, largest, verdict, monkeypatch):
    title = "Layers specialise on program text"
    assert finding_of(results, title).verdict == "untested"
    monkeypatch.setitem(findings_module.CODE, "tiny", "code")
    shutil.copytree(results / "results" / "tiny", results / "results" / "code")
    for seed, value in zip(SEEDS, largest, strict=True):
        rows = [
            {"layer": layer, "kind": kind, "relative": value if (layer, kind) == (1, "bracket") else 1}
            | {"relative_low": 1, "relative_high": 1}
            for layer in range(3)
            for kind in ("newline", "bracket", "quote")
        ]
        rows[0]["relative"] = 20  # layer 0 is not asked
        pd.DataFrame(rows).to_csv(results / f"results/code/per_layer-{seed}/kinds_code.csv", index=False)
    gather(GatherConfig(results / "results", results / "tables"))
    suite = Suite(read_tables(results / "tables"), "tiny")
    (found,) = [finding for finding in (find(suite) for find in FINDINGS) if finding.title == title]
    assert found.verdict == verdict
    assert "1.00 (1.00 to 1.00)" in found.control


@pytest.mark.slow
@pytest.mark.parametrize(
    ("within", "verdict"),
    [
        ((-0.5, -0.45, -0.55), "agrees"),
        ((0.5, 0.45, 0.55), "contrary"),
        ((-0.9, 0.0, 0.9), "undecided"),
        ((-0.9,), "undecided"),
    ],
)
def test_heads_are_judged_within_layers_over_seeds(results, within, verdict):
    for seed, value in enumerate(within):
        folder = results / f"results/tiny/per_layer_per_head-{seed}"
        shutil.copytree(results / f"results/tiny/per_layer-{seed}", folder)
        rows = [
            {"scope": scope, "measure": "spearman", "n": 24, "correlation": found, "low": -1, "high": 1, "p": 0.5}
            for scope, found in (("heads", -0.6), ("within layers", value))
        ]
        pd.DataFrame(rows).to_csv(folder / "correlations.csv", index=False)
    assert finding_of(results, "Heads with larger increments look back less far").verdict == verdict


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shares", "verdict"),
    [
        ((0.6, 0.65, 0.7), "agrees"),
        ((0.2, 0.21, 0.22), "weaker"),
        ((0.0, 0.004, 0.0), "absent"),
        ((0.7, 0, 0), "undecided"),
    ],
)
def test_the_cap_is_judged_by_all_seeds(results, shares, verdict):
    for seed, share in zip(SEEDS, shares, strict=True):
        table = pd.DataFrame({"layer": [0, 1], "share": [0, share], "low": 0, "high": 1, "cap": 10, "max": 9})
        table.to_csv(results / f"results/tiny/per_layer-{seed}/saturation.csv", index=False)
    assert finding_of(results, "Some layers sit at the cap").verdict == verdict


@pytest.mark.slow
@pytest.mark.parametrize(("cost", "verdict"), [(0.0, "agrees"), (0.05, "contrary")])
def test_frozen_increments_are_judged_over_seeds(results, cost, verdict):
    title = "Frozen increments do as well as learned ones"
    for seed in SEEDS:
        assert finding_of(results, title).verdict == (
            "untested" if seed == 0 else "undecided" if seed == 1 else verdict
        )
        folder = results / f"results/tiny/frozen-{seed}"
        shutil.copytree(results / f"results/tiny/shared-{seed}", folder)
        table = pd.read_csv(folder / "heldout.csv")
        nats = table["nats"] + table["bytes"] * (cost + seed * 1e-4)
        table.assign(nats=nats).to_csv(folder / "heldout.csv", index=False)
    assert finding_of(results, title).verdict == verdict


def test_what_increments_cause_is_told_of_layer_0_over_seeds(results):
    costs = {"1.0": 1.0, "mean": 0.9, "best constant": 0.2, "token": 0.01, "shuffle": 1.4}
    for seed in SEEDS:
        rows = [
            {
                "corpus": corpus,
                "layer": layer,
                "to": to,
                "change": cost + seed / 100,
                "low": 0,
                "high": 1,
                "documents": 12,
            }
            for corpus in ("english", "chinese")
            for layer in ("all", 0, 1)
            for to, cost in costs.items()
        ]
        pd.DataFrame(rows).to_csv(results / f"results/tiny/per_layer-{seed}/ablation.csv", index=False)
    found = what_increments_cause(tiny_of(results))
    assert found.verdict == "new"
    assert "to the mean +0.910 (+0.885 to +0.935), to the best constant tried +0.210 (+0.185 to +0.235)" in found.ours
    assert "the token's mean in all layers +0.020" in found.control
    assert "cannot reach p = 0.05" in found.blocks[1]


@pytest.mark.slow
def test_every_finding_is_a_row_of_the_table_and_is_computed_again_by_its_key(results, capsys):
    asked = written(results)
    text = write_results(asked).read_text()
    suite = tiny_of(results)
    for finding in (find(suite) for find in FINDINGS):
        key, reported = CLAIMS[finding.title]
        capsys.readouterr()
        assert study(["row", key, "--results", str(asked.results), "--preset", "tiny"]) == 0
        row = capsys.readouterr().out.strip()
        assert row in text.splitlines()
        assert f"`{key}` | {reported} |" in row
    assert study(["row", "nothing", "--results", str(asked.results)]) == 2
    assert "there is no row 'nothing'; expected one of loss, longer, frozen" in capsys.readouterr().err


@pytest.mark.slow
def test_an_order_by_chance_is_that_of_all_orders():
    rng = np.random.default_rng(0)
    drawn = [stats.spearmanr(range(6), rng.permutation(6)).statistic for _ in range(2000)]
    assert np.mean(np.array(drawn) <= order_by_chance(6) + 1e-9) == pytest.approx(0.96, abs=0.02)


def test_what_was_not_run_is_said_not_guessed(results):
    suite = tiny_of(results)
    found = {finding.title: finding for finding in (find(suite) for find in FINDINGS)}
    assert found["Frozen increments do as well as learned ones"].verdict == "untested"
    assert found["Two-word names are pulled together"].verdict == "untested"
    assert found["Two-word names are pulled together"].ours == "not measured"


@pytest.mark.slow
@pytest.mark.parametrize(("order", "verdict"), [(1, "agrees"), (-1, "contrary")])
def test_kinds_are_judged_by_their_order(results, order, verdict):
    kinds = list(LAYER_0_REPORTED)
    mean = np.array([LAYER_0_REPORTED[kind] for kind in kinds]) * order + 20
    table = pd.DataFrame({"layer": 0, "kind": kinds, "mean": mean, "low": mean, "high": mean, "n": 5})
    for seed in SEEDS:
        table.to_csv(results / f"results/tiny/per_layer-{seed}/kinds.csv", index=False)
    suite = tiny_of(results)
    found = [find(suite) for find in FINDINGS]
    (finding,) = [finding for finding in found if finding.title == "Layer 0 by kind of byte"]
    assert finding.verdict == verdict


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    assert main(["results", "--results", str(tmp_path)]) == 2
    says = "has no results of runs of long; expected lens-positions experiments suite, and gather, before"
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_the_results_of_this_repository_are_those_of_its_files(tmp_path, monkeypatch):
    """Regenerating changes nothing, and every file that is named is there."""
    monkeypatch.chdir(ROOT)
    said = (ROOT / "RESULTS.md").read_text("utf-8")
    write_results(ResultsConfig(output=tmp_path / "RESULTS.md", figures=tmp_path))
    assert (tmp_path / "RESULTS.md").read_text("utf-8").replace(f"{tmp_path}/", "docs/") == said
    named = re.findall(r"`((?:experiments/results|benchmarks)/[\w/.-]+)`", said)
    assert len(set(named)) >= 20
    assert all((ROOT / name).is_file() for name in named)
