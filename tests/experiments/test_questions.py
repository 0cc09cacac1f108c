"""Planted answers: each question finds what was put in, and does not find what was not."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

import lens_positions as lp
from experiments.options import GATHERED, QUESTION_TABLES, VARIANTS, QuestionsConfig
from experiments.questions import MEASUREMENTS, models_of
from experiments.questions.answers import COLUMNS, causes, find_answers, known, parts, permuted_slopes, reaches
from experiments.questions.page import write_page
from experiments.questions.probes import BranchingEntropy, area_within, gap_states, lead_bytes, probe_areas
from experiments.questions.verdicts import how_far_heads_look, known_but_unused, what_for, what_gaps_cause
from experiments.questions.word_gaps import (
    CALIPER,
    WORD_PIECES,
    edited_outcomes,
    gap_effects,
    matched_gaps,
    matched_tokens,
    token_gap_effects,
)
from experiments.tables import RunName, Tables, read_tables, run_of_model
from lens_positions import PositionsError, corpora
from lens_positions.analysis.word_boundaries import Gaps, gaps_of
from lens_positions.measure.intervals import auc_interval, resamples
from lens_positions.measure.metrics import token_losses

LINES = ["中国政府今天在北京举行会议", "人民日报今天报道中国经济", "他们在学校学习中国历史"]
WORDS = [
    ["中国", "政府", "今天", "在", "北京", "举行", "会议"],
    ["人民", "日报", "今天", "报道", "中国", "经济"],
    ["他们", "在", "学校", "学习", "中国", "历史"],
]


ROOT = Path(__file__).parents[2]


def frame(rows):
    return pd.DataFrame(rows)


# Areas within strata


def test_one_stratum_gives_the_area_under_the_curve_and_its_bootstrap_interval():
    rng = np.random.default_rng(0)
    owners = rng.integers(0, 80, 2000)
    labels = rng.random(2000) < 0.4
    values = np.round(labels * 0.5 + rng.normal(0, 1, 80)[owners] * 0.5 + rng.normal(0, 1, 2000), 1)
    area, low, high = area_within(values, labels, np.zeros(2000, int), owners)
    assert area == pytest.approx(roc_auc_score(labels, values))
    assert (low, high) == pytest.approx(auc_interval(values, labels, owners, resamples(80, 0)), abs=0.008)


def test_what_a_stratum_alone_tells_is_no_area_within_it():
    rng = np.random.default_rng(0)
    strata = rng.integers(0, 6, 3000)
    labels = rng.random(3000) < np.array([0.1, 0.3, 0.5, 0.6, 0.8, 0.9])[strata]
    assert roc_auc_score(labels, strata) > 0.7
    assert area_within(strata.astype(float), labels, strata, np.arange(3000))[0] == 0.5


def test_a_stratum_of_one_label_has_no_pair():
    labels = np.array([True, True])
    assert np.isnan(area_within(np.array([1.0, 2.0]), labels, np.array([0, 0]), np.array([0, 1]))).all()


# Question 1


@pytest.fixture
def planted():
    """Gaps of 60 lines whose residual tells boundaries in one direction, beside what the first byte tells."""
    rng = np.random.default_rng(1)
    lead = rng.integers(0xE4, 0xEA, 3000)
    line = np.repeat(np.arange(60), 50)
    boundary = rng.random(3000) < 0.5
    residual = rng.normal(0, 1, (3000, 8))
    residual[:, 3] += 1.5 * boundary
    tokens = [torch.from_numpy(lead)]
    gaps = Gaps(60, line, boundary, [("中", "国")] * 3000, np.zeros(3000, int), np.arange(3000), tokens)
    return gaps, lead, residual, rng


@pytest.mark.parametrize("used", [False, True])
def test_a_planted_direction_is_known_and_is_used_only_by_increments_that_have_it(planted, used):
    gaps, lead, residual, rng = planted
    increment = residual[:, 3] if used else rng.normal(0, 1, 3000)
    table = probe_areas(gaps, lead, [1], residual[None], increment[None]).set_index("measure")["within"]
    expected = 0.856  # of two normal distributions 1.5 apart
    assert table["probe"] == pytest.approx(expected, abs=0.02)
    assert table["increment"] == pytest.approx(expected if used else 0.5, abs=0.03)
    assert table["probe, labels shuffled"] == pytest.approx(0.5, abs=0.03)
    assert table["increment, labels shuffled"] == pytest.approx(0.5, abs=0.03)


def test_the_first_layer_of_a_byte_model_knows_nothing_within_a_first_byte(tiny_model):
    model = tiny_model(source="per_layer")
    gaps = gaps_of(model, LINES, WORDS)
    layers, residuals, increments = gap_states(model, gaps)
    table = probe_areas(gaps, lead_bytes(gaps), layers, residuals, increments)
    first = table[table["layer"] == layers[0]].set_index("measure")["within"]
    assert first["probe"] == 0.5
    assert first["increment"] == 0.5


def test_states_are_those_of_the_byte_after_the_gap(tiny_model):
    model = tiny_model(source="per_layer")
    gaps = gaps_of(model, LINES, WORDS)
    layers, residuals, increments = gap_states(model, gaps)
    gap = 7
    _, cache = model.run_with_cache(gaps.tokens[gaps.piece[gap]][None])
    token = gaps.token[gap]
    last = layers[-1]
    assert residuals[-1, gap] == pytest.approx(cache["resid_pre", last][0, token].numpy(), abs=1e-5)
    assert increments[-1, gap] == pytest.approx(cache["increments", last, "attn"][0, token].item(), abs=1e-5)


def test_branching_entropy_backs_off_to_what_was_seen():
    entropy = BranchingEntropy(["中国中国中国", "中人"])
    assert entropy("中") == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert entropy("人中") == entropy("中")  # a pair that was never seen
    assert entropy("国中") == 0.0


def probes(increment, probe=0.3):
    """A table of areas: at each step, how far increments and probes lie from 0.5 in layer 1, with a little noise."""
    rows = []
    for step, distance in increment.items():
        for measure, away in (("probe", probe), ("increment", distance)):
            for suffix, own in (("", away), (", labels shuffled", 0.005)):
                row = {"step": step, "measure": measure + suffix, "layer": 1, "within": 0.5 + own}
                rows.append(row | {"within_low": 0.4, "within_high": 0.6, "lines": 9})
    return frame(rows)


def of_seeds(name, tables, suite="long"):
    """Tables of several runs: by variant, a table a seed."""
    runs = {RunName(suite, variant, seed): table for variant, of in tables.items() for seed, table in enumerate(of)}
    return Tables(Path("tables"), {name: runs})


@pytest.mark.parametrize(
    ("last", "verdict"),
    [
        ((0.02, 0.021, 0.019), "known, mostly unused"),
        ((0.29, 0.28, 0.29), "known and used"),
        ((0.01, 0.29, 0.1), "undecided"),
    ],
)
def test_boundaries_in_increments_get_their_verdict(last, verdict):
    tables = [probes({384: 0.005 + seed / 1000, 6250: distance}) for seed, distance in enumerate(last)]
    answer = known_but_unused(frame(known(of_seeds("probes", {"per_layer": tables}), "long")), 16_384)
    assert answer.verdict == verdict
    never = "told from shuffled labels at no step" in answer.sentence
    assert never == (verdict == "undecided")
    if not never:
        assert "told from shuffled labels at 102M bytes" in answer.sentence
        assert "seeds agree in its direction" in answer.sentence


def test_increments_that_tell_boundaries_in_opposite_ways_are_said_to_differ():
    tables = [probes({384: 0.001, 6250: distance}) for distance in (0.05, -0.05, 0.052)]
    answer = known_but_unused(frame(known(of_seeds("probes", {"per_layer": tables}), "long")), 16_384)
    assert "seeds differ" in answer.sentence
    assert "the farthest increment is 0.051" in answer.sentence


# Question 2


def heldout(english, chinese):
    """A run's losses in nats per byte, by language, the same 20 documents of each."""
    rng = np.random.default_rng(5)
    rows = []
    for document in range(40):
        source, loss = ("sotu", english) if document < 20 else ("reviews", chinese)
        size = 100 + document
        rows.append((document, source, 256, size, size * (loss + rng.normal(0, 0.1))))
    return pd.DataFrame(rows, columns=["document", "source", "length", "bytes", "nats"])


LOSSES = {"static": 1.3, "constant": 1.3, "frozen": 1.25, "shared": 1.25, "per_layer": 1.28, "swapped": 1.32}


@pytest.fixture
def losses():
    """Identity gains 0.05 and context costs 0.03 in English; in Chinese nothing does anything."""
    noise = np.random.default_rng(0).normal(0, 0.0003, (len(LOSSES), 3, 2))
    return of_seeds(
        "heldout",
        {
            variant: [heldout(loss + noise[i, seed, 0], 1.2 + noise[i, seed, 1]) for seed in range(3)]
            for i, (variant, loss) in enumerate(LOSSES.items())
        },
    )


def test_planted_parts_of_the_loss_are_found_by_language(losses):
    rows = frame(parts(losses, "long"))
    english = rows[rows["language"] == "English"].set_index("quantity")
    assert english.loc["identity", "estimate"] == pytest.approx(-0.05, abs=0.003)
    assert english.loc["identity", "high"] < 0
    assert english.loc["context", "low"] > 0
    assert english.loc["wrong identity", "estimate"] == pytest.approx(0.07, abs=0.003)
    chinese = rows[(rows["language"] == "Chinese")].set_index("quantity")
    assert chinese["estimate"].abs().max() < 0.003
    answer = what_for(rows)
    assert answer.verdict == "decided in part"
    assert "gain of identity in English" in answer.sentence
    assert "cost of context in English" in answer.sentence
    assert "Chinese" not in answer.sentence


@pytest.mark.parametrize(
    ("noise", "verdict"), [(0.0005, "no part above 0.01 at the training length"), (0.02, "undecided")]
)
def test_no_planted_part_is_called_small_or_undecided_by_what_would_have_been_seen(noise, verdict):
    away = noise * np.array([-1.0, 0.1, 0.9])
    runs = {name: [heldout(1.3 + (-1) ** i * d, 1.2 - (-1) ** i * d) for d in away] for i, name in enumerate(LOSSES)}
    answer = what_for(frame(parts(of_seeds("heldout", runs), "long")))
    assert answer.verdict == verdict
    assert "no part of it is told from 0" in answer.sentence


def test_parts_add_up_to_all_of_it(losses):
    rows = frame(parts(losses, "long")).set_index(["language", "quantity"])["estimate"]
    for language in ("English", "Chinese", "both"):
        four = sum(rows[language, part] for part in ("scale", "identity", "learned along", "context"))
        assert four == pytest.approx(rows[language, "all of it"])


def test_parts_of_other_text_are_refused(losses):
    table = losses.measurements["heldout"][RunName("long", "shared", 1)]
    table.loc[3, "bytes"] += 1
    with pytest.raises(PositionsError, match="different text"):
        parts(losses, "long")


# Question 3


def test_pairs_have_the_same_first_byte_and_nearly_the_same_losses(tiny_model):
    model = tiny_model(source="static")
    gaps = gaps_of(model, LINES, WORDS)
    own = np.flatnonzero(gaps.piece == 0)
    tokens = gaps.tokens[0]
    losses = np.zeros(len(tokens) - 1)
    pairs = matched_gaps(gaps, own, losses)
    assert pairs
    for true, false in pairs:
        assert gaps.boundary[true]
        assert not gaps.boundary[false]
        assert tokens[gaps.token[true]] == tokens[gaps.token[false]]
    losses[gaps.token[[true for true, _ in pairs]]] = CALIPER + 0.1  # those beginnings are dearer now
    assert not set(pairs) & set(matched_gaps(gaps, own, losses))


@pytest.mark.parametrize("by", [0.5, -0.5])
@pytest.mark.parametrize("positions", [{"source": "static"}, {"source": "per_layer", "per_head": True}])
def test_an_edited_row_is_what_add_gap_makes_of_it(tiny_model, positions, by):
    model = tiny_model(**positions)
    tokens = gaps_of(model, LINES, WORDS).tokens[0]
    outcomes = edited_outcomes(model, tokens, torch.tensor([6, 9, 6]), torch.tensor([by, by, 0.0]))
    for row, at, edit in ((0, 6, by), (1, 9, by), (2, 6, 0.0)):
        hooks = lp.add_gap(model, before=at, by=edit) if edit else []
        with model.hooks(fwd_hooks=hooks):
            logits, cache = model.run_with_cache(tokens[None])
        losses = token_losses(logits, tokens[None, 1:])[0]
        patterns = torch.stack([cache["pattern", layer] for layer in range(model.cfg.n_layers)])
        across = patterns[:, 0, :, at : at + 3, :at].sum(-1).mean()
        assert outcomes[row, 2] == pytest.approx(across.item(), abs=1e-5)
        assert outcomes[row, 0] == pytest.approx(losses[at : at + 2].sum().item(), abs=1e-4)
        assert outcomes[row, 1] == pytest.approx(losses[at + 2 : at + 8].sum().item(), abs=1e-4)
    assert outcomes[0, 0] != pytest.approx(outcomes[2, 0], abs=1e-6)


def test_tokens_are_paired_by_first_letter_and_surprisal_where_enough_text_follows():
    tokens = ["", " a", " bet", "ter", " Toy", "s", " is", " ted", "tle", " no", "w", " or", " in", " the", " end"]
    losses = np.zeros(len(tokens) - 1)
    toy, ter, ted, tle = (0, 4), (0, 3), (0, 7), (0, 8)
    assert matched_tokens([tokens], [losses]) == [(toy, ter), (ted, tle)]
    dearer = losses.copy()
    dearer[3] = CALIPER + 0.1  # of " Toy", which follows "ter"
    assert matched_tokens([tokens], [dearer]) == [(ted, tle)]
    assert matched_tokens([tokens[:7]], [losses[:6]]) == []
    both = matched_tokens([tokens, tokens], [dearer, losses])  # of two windows of a text
    assert {place for pair in both for place in pair} == {ted, tle, (1, 4), (1, 3), (1, 7), (1, 8)}


def test_word_pieces_count_the_next_token_and_the_three_after_it(tiny_model):
    model = tiny_model(source="static")
    tokens = gaps_of(model, LINES, WORDS).tokens[0]
    outcomes = edited_outcomes(model, tokens, torch.tensor([6, 6]), torch.tensor([0.5, 0.0]), WORD_PIECES)
    with model.hooks(fwd_hooks=lp.add_gap(model, before=6, by=0.5)):
        logits, cache = model.run_with_cache(tokens[None])
    losses = token_losses(logits, tokens[None, 1:])[0]
    across = torch.stack([cache["pattern", layer][0, :, 6:8, :6] for layer in range(model.cfg.n_layers)])
    expected = [losses[6].item(), losses[7:10].sum().item(), across.sum(-1).mean().item()]
    assert outcomes[0] == pytest.approx(expected, abs=1e-4)


def test_gaps_of_a_pretrained_model_are_edited_by_document(smollm2):
    text = corpora.load("english")["heldout"]["text"][0][:9000]
    model = lp.HookedPositionTransformer.from_pretrained(str(smollm2))
    found = token_gap_effects(model, [text, text], 1)
    assert found["line"].tolist() == [0, 0, 1, 1]
    assert found["by"].tolist() == [0.5, -0.5] * 2
    assert (found["surprisal_true"] - found["surprisal_false"]).abs().max() < CALIPER
    assert found.drop(columns="line").iloc[:2].to_numpy() == pytest.approx(
        found.drop(columns="line").iloc[2:].to_numpy()
    )
    farther, nearer = found["across_true"].iloc[:2]
    assert farther < 0
    assert nearer > 0
    with pytest.raises(PositionsError, match="match"):
        token_gap_effects(model, ["Too short."], 1)


def test_edited_gaps_of_lines_without_a_pair_are_refused(tiny_model):
    with pytest.raises(PositionsError, match="match"):
        gap_effects(tiny_model(source="static"), ["中国人"], [["中国", "人"]], 5)


def effects(difference):
    rng = np.random.default_rng(2)
    rows = []
    for line in range(30):
        for by in (0.5, -0.5):
            row = {"line": line, "by": by, "pairs": 1}
            for outcome in ("character", "later", "across"):
                noise = rng.normal(0, 0.02)
                row |= {f"{outcome}_false": 0.4, f"{outcome}_true": 0.4 + noise + difference * (outcome == "character")}
            rows.append(row)
    return frame(rows)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((-0.3, -0.31, -0.29), "less than other gaps"),
        ((0.3, 0.31, 0.29), "more than other gaps"),
        ((0.3, -0.3, 0.01), "undecided"),
    ],
)
def test_planted_effects_of_gaps_get_their_verdict(differences, verdict):
    none = [effects(noise) for noise in (0.001, -0.001, 0.0)]
    tables = of_seeds("gap_effects", {"per_layer": [effects(d) for d in differences], "static": none})
    rows = pd.DataFrame(causes(tables, "long"), columns=COLUMNS)
    learned = rows[rows["minus"] == "static"]
    assert learned["estimate"].tolist() == pytest.approx([np.mean(differences)] * 2, abs=0.02)
    found = rows[(rows["quantity"] == "character: true minus false") & (rows["variant"] == "static")]
    assert ((found["low"] < 0.01) & (found["high"] > -0.01)).all()
    assert what_gaps_cause(rows).verdict == verdict


def test_a_pretrained_model_is_told_of_over_documents():
    tables = of_seeds("gap_effects", {"per_layer": [effects(d) for d in (0.3, 0.31, 0.29)]})
    tables.measurements["gap_effects"][run_of_model("smollm2-135m-instruct")] = effects(-0.2)
    rows = pd.DataFrame(causes(tables, "long"), columns=COLUMNS)
    own = rows[(rows["variant"] == "smollm2-135m-instruct") & (rows["quantity"] == "character: true minus false")]
    assert own["unit"].tolist() == ["documents"] * 2
    assert own["n"].tolist() == [30] * 2
    assert own["estimate"].tolist() == pytest.approx([-0.2] * 2, abs=0.02)
    assert (own["high"] < -0.18).all()
    assert what_gaps_cause(rows).verdict == "more than other gaps"  # by the models with seeds alone


# Question 4

STEPS = np.array([0.5, 1.0, 2.0, 4.0])


def reach(slope, seed, steps=STEPS):
    rng = np.random.default_rng(seed)
    rows = []
    for layer in range(6):
        back = 20 * (layer + 1) * STEPS**slope * np.exp(rng.normal(0, 0.05, 4))
        rows += [{"layer": layer, "head": head, "increment": steps[head], "look_back": back[head]} for head in range(4)]
    return frame(rows)


@pytest.mark.parametrize(
    ("slope", "verdict"),
    [
        (-1, "it falls as 1/c"),
        (-0.5, "it falls, but less than 1/c"),
        (-1.5, "it falls more than 1/c"),
        (0.5, "it grows"),
    ],
)
def test_planted_slopes_get_their_verdict_beside_a_flat_control(slope, verdict):
    tables = of_seeds(
        "head_reach",
        {"head_steps": [reach(slope, 0), reach(slope, 1)], "static": [reach(0, s, np.ones(4)) for s in (2, 3, 4)]},
    )
    rows = frame(reaches(tables, "long"))
    whole = rows[rows["unit"].eq("layers of seeds") & rows["quantity"].str.startswith("slope")].set_index("variant")
    assert whole.loc["head_steps", "estimate"] == pytest.approx(slope, abs=0.05)
    assert whole.loc["static", "low"] < 0 < whole.loc["static", "high"]
    answer = how_far_heads_look(rows)
    assert answer.verdict == verdict


def test_exchanged_heads_have_a_slope_by_chance():
    values = np.random.default_rng(0).normal(0, 1, (40, 2, 6, 4))
    by_chance = [permuted_slopes(heads, np.log(STEPS), 199) for heads in values]
    assert np.count_nonzero(np.array(by_chance) < 0.05) <= 5
    assert np.median(by_chance) == pytest.approx(0.5, abs=0.25)
    assert permuted_slopes(values[0] - 3 * np.log(STEPS), np.log(STEPS), 999) == 0.001


# The command and the page


def test_names_shown_by_help_are_those_that_are_measured():
    assert tuple(MEASUREMENTS) == QUESTION_TABLES
    assert {variant for _, variants in MEASUREMENTS.values() for variant in variants} <= set(VARIANTS)


def test_the_models_of_a_run_are_those_it_kept_and_the_last(tmp_path):
    (tmp_path / "at" / "step-00000384").mkdir(parents=True)
    (tmp_path / "training.json").write_text('{"config": {"steps": 6250}, "corpus_fingerprint": "a"}')
    assert models_of(tmp_path) == {384: tmp_path / "at" / "step-00000384", 6250: tmp_path / "model"}


def test_no_results_are_refused(tmp_path):
    with pytest.raises(PositionsError, match="nothing of the suite long"):
        find_answers(Tables(tmp_path), "long")


@pytest.mark.slow
def test_the_page_and_its_table_are_those_of_the_tables(tmp_path):
    options = QuestionsConfig(results=tmp_path, output=tmp_path / "page.md")
    write_page(find_answers(read_tables(ROOT / GATHERED), "long"), options)
    assert (tmp_path / "page.md").read_text("utf-8") == (ROOT / "docs" / "findings-questions.md").read_text("utf-8")
    assert (tmp_path / "answers.csv").read_bytes() == (ROOT / GATHERED / "answers.csv").read_bytes()
    for name in ("questions_probes.png", "questions_parts.png"):
        assert (tmp_path / name).stat().st_size > 10_000
        assert (ROOT / "docs" / name).is_file()
