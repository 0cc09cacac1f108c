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

from experiments import measure as measure_module
from experiments import results as results_module
from experiments.findings import FINDINGS, LAYER_0_REPORTED, Suite, word_boundaries
from experiments.gather import gather, suite_tables
from experiments.measure import MEASUREMENTS, MeasureConfig, measure
from experiments.options import GatherConfig
from experiments.results import ResultsConfig, write_results
from experiments.suite import weights_of
from lens_positions import PositionsError, causal, corpora
from lens_positions.analysis.specialisation import specialisation
from lens_positions.analysis.word_boundaries import boundary_auc, mutual_information
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
    monkeypatch.setattr(measure_module.Text, "pairs", pairs)
    monkeypatch.setattr(measure_module.Text, "prose", PROSE)
    monkeypatch.setattr(measure_module.Text, "code", ["def f(x):\n    return x", "a = [1, 2]\n"])
    monkeypatch.setattr(measure_module, "NAMES", ("New York", "Rio Grande"))
    monkeypatch.setattr(corpora, "training_excerpts", lambda corpus, characters: PROSE[:2])
    monkeypatch.setattr(corpora, "heldout_excerpts", lambda corpus, characters: PROSE[1:])
    return tmp_path


def asked(folder, **more):
    return MeasureConfig(output=folder / "runs", results=folder / "results", **more)


def on_disk(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_measurement_is_that_of_its_function(trained):
    assert measure(asked(trained)) == ["per_layer-0"]
    folder = trained / "results" / "per_layer-0"
    done = json.loads((folder / "measured.json").read_text())
    assert list(done) == list(MEASUREMENTS)
    model = measure_module.HookedPositionTransformer.from_pretrained(str(trained / "runs" / "per_layer-0" / "model"))
    found = pd.read_csv(folder / "boundaries.csv")
    lines = ["".join(line) for line in WORDS]
    expected = boundary_auc(model, lines, WORDS, mutual_information(PROSE))
    of_people = found[found["words"] == "human"].drop(columns="words")
    pd.testing.assert_frame_equal(of_people, expected, check_dtype=False, rtol=1e-5)
    found = pd.read_csv(folder / "specialisation.csv")
    assert found["explained"].tolist()[:2] == pytest.approx(
        specialisation(model, PROSE)["explained"].tolist(), rel=1e-5
    )
    found = pd.read_csv(folder / "ablation.csv", dtype={"layer": str, "to": str})
    means = causal.token_means(model, PROSE[:2])
    expected = causal.ablation_table(model, PROSE[1:], means=means).loss
    assert found["change"].tolist()[: len(expected)] == pytest.approx(expected["change"].tolist(), rel=1e-4)
    assert done["below_zero"]["refused"].startswith("the model has activation 'sigmoid'")
    assert not (folder / "below_zero.csv").exists()


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


def test_some_measurements_can_be_asked_for_and_the_rest_come_later(trained):
    measure(asked(trained, tables=("saturation", "kinds")))
    described = trained / "results" / "per_layer-0" / "measured.json"
    assert list(json.loads(described.read_text())) == ["kinds", "saturation"]
    measure(asked(trained))
    assert set(json.loads(described.read_text())) == set(MEASUREMENTS)


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
                of_layers(tmp_path, variant, seed, {0: 0.5, 1: 0.53, 2: 0.6, 3: 0.4})
    return tmp_path


def of_layers(folder, variant, seed, areas):
    """Areas under the ROC curve by layer, with intervals of 0.01 either way."""
    rows = [
        {"measure": measure, "layer": layer, "auc": auc, "low": auc - 0.01, "high": auc + 0.01, "words": words}
        for words in ("human", "jieba")
        for measure, values in (
            ("increment", areas),
            ("labels shuffled", dict.fromkeys(areas, 0.5)),
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
    return ResultsConfig(results=folder / "tables", output=folder / "RESULTS.md", figures=folder)


def test_the_same_files_give_the_same_text_and_figures(results):
    write_results(written(results))
    before = on_disk(results)
    assert (results / "results_losses_tiny.png").is_file()
    assert (results / "results_boundaries_tiny.png").is_file()
    write_results(written(results))
    assert on_disk(results) == before


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
    assert "| Learned increments cost no loss | **reproduced** |" in said
    worse = results / "results/tiny/per_layer-2/heldout.csv"
    table = pd.read_csv(worse)
    table.assign(nats=table["nats"] * 1.02).to_csv(worse, index=False)
    write_results(written(results))
    assert "| Learned increments cost no loss | **undecided** |" in (results / "RESULTS.md").read_text()


def test_a_seed_that_diverged_is_said_and_nothing_is_reproduced_beside_it(results):
    gone = results / "results/tiny/per_layer-2"
    for file in gone.iterdir():
        file.unlink()
    (gone / "diverged.json").write_text(json.dumps({"step": 7, "config": {}}))
    write_results(written(results))
    said = (results / "RESULTS.md").read_text()
    assert "| Learned increments cost no loss | **undecided** |" in said
    assert "per layer diverged: seed 2 at step 7." in said


def test_seeds_that_static_lacks_have_no_difference(results):
    for seed in (1, 2):
        for file in (results / f"results/tiny/static-{seed}").iterdir():
            file.unlink()
    write_results(written(results))
    said = (results / "RESULTS.md").read_text()
    assert "| Learned increments cost no loss | **not measured** |" in said
    assert "| per layer | 3 (1 paired) |" in said
    assert "nan" not in said


def test_another_suite_is_told_beside_with_what_it_has(results):
    base = results / "results" / "base"
    for variant in ("static", "per_layer"):
        shutil.copytree(results / "results" / "tiny" / f"{variant}-0", base / f"{variant}-0")
    text = write_results(written(results)).read_text()
    above, beside = text.split("## The same on models of the preset base")
    assert "one seed" in beside
    assert "not run |" not in beside
    assert "| Learned increments cost no loss |" not in beside  # not at one seed
    assert "| Middle layers know Chinese word boundaries | **different** |" in beside
    assert beside.count("0.600 (0.590 to 0.610)") == 2
    assert above.count("0.600 (0.590 to 0.610)") == 12
    assert "--preset base --variants static per_layer --seeds 0\n" in beside
    assert (results / "results_boundaries_base.png").is_file()


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
    ("areas", "verdict"),
    [
        ({0: 0.5, 1: 0.53, 2: 0.6, 3: 0.4}, "reproduced"),
        ({0: 0.5, 1: 0.53, 2: 0.54, 3: 0.4}, "different"),
        ({0: 0.6, 1: 0.53, 2: 0.6, 3: 0.5}, "different"),
        ({0: 0.5, 1: 0.505, 2: 0.51, 3: 0.5}, "not reproduced"),
    ],
)
def test_boundaries_are_judged_by_every_seed(results, areas, verdict):
    of_layers(results, "per_layer", 1, areas)
    if verdict == "not reproduced":
        for seed in SEEDS:
            of_layers(results, "per_layer", seed, areas)
    assert word_boundaries(tiny_of(results)).verdict == verdict


def test_what_was_not_run_is_said_not_guessed(results):
    suite = tiny_of(results)
    found = {finding.title: finding for finding in (find(suite) for find in FINDINGS)}
    assert found["Frozen increments do as well as learned ones"].verdict == "not measured"
    assert found["Two-word names are pulled together"].verdict == "not measured"


@pytest.mark.parametrize(("order", "verdict"), [(1, "reproduced"), (-1, "not reproduced")])
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
    says = "has no results of runs of tiny; expected lens-positions experiments suite, and gather, before"
    assert says in capsys.readouterr().err


def test_the_results_of_this_repository_are_those_of_its_files(tmp_path, monkeypatch):
    """Regenerating changes nothing, and every file that is named is there."""
    monkeypatch.chdir(ROOT)
    said = (ROOT / "RESULTS.md").read_text("utf-8")
    write_results(ResultsConfig(output=tmp_path / "RESULTS.md", figures=tmp_path))
    assert (tmp_path / "RESULTS.md").read_text("utf-8").replace(f"{tmp_path}/", "docs/") == said
    named = re.findall(r"`((?:experiments/results|benchmarks)/[\w/.-]+)`", said)
    assert len(set(named)) >= 20
    assert all((ROOT / name).is_file() for name in named)
