"""How well increments tell word boundaries: by two routes, against planted answers, and what is refused."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import lens_positions as lp
from lens_positions import corpora
from lens_positions.analysis.word_boundaries import (
    TIES_AT,
    boundary_auc,
    branching_entropy,
    gap_increments,
    gaps_of,
    mutual_information,
)
from lens_positions.measure.intervals import auc_interval, auc_within, resamples
from lens_positions.tokenizer import END_OF_DOCUMENT

WORDS = [
    ["今天", "天气", "很", "好", "。"],
    ["我们", "a", "在", "北京", "大学", "x", "学习", "中文"],
    ["他", "说", "：", "“", "再见", "”"],
    ["老师", "和", "学生"],
]
TEXTS = ["".join(words) for words in WORDS]
LONG = [["中国", "人民", "在", "学习", "历史"] * 7, ["好"] * 40 + ["学生"]]


def by_hand(model, texts, words, layer):
    """Labels and increments from run_with_cache, byte by byte, for lines that fit the context."""
    labels, values = [], []
    for text, of_line in zip(texts, words, strict=True):
        tokens = torch.tensor([[END_OF_DOCUMENT, *text.encode()]])
        _, cache = model.run_with_cache(tokens)
        increments = cache["increments", layer, "attn"][0].double()
        increments = increments.mean(-1) if increments.ndim == 2 else increments
        ends, place = set(), 0
        for word in of_line:
            place += len(word)
            ends.add(place)
        for i in range(1, len(text)):
            if all("一" <= character <= "鿿" for character in text[i - 1 : i + 1]):
                first_byte = 1 + len(text[:i].encode())
                at = first_byte if model.position_config.gap == "before" else first_byte - 1
                labels.append(i in ends)
                values.append(round(float(increments[at]), TIES_AT))
    return np.array(labels), np.array(values)


@pytest.mark.slow
@pytest.mark.parametrize("positions", [{}, {"gap": "after"}, {"per_head": True}], ids=str)
def test_the_area_is_that_of_run_with_cache_alone(tiny_model, positions):
    model = tiny_model(source="per_layer", **positions)
    table = boundary_auc(model, TEXTS, WORDS)
    for layer in range(2):
        labels, values = by_hand(model, TEXTS, WORDS, layer)
        (row,) = table[(table["measure"] == "increment") & (table["layer"] == layer)].iloc
        assert row["auc"] == pytest.approx(roc_auc_score(labels, values), abs=1e-9)
        assert (row["n"], row["boundaries"], row["lines"]) == (len(labels), labels.sum(), 4)


def test_increments_without_structure_tell_nothing(tiny_model):
    table = boundary_auc(tiny_model(source="static"), TEXTS, WORDS)
    of_layers = table.dropna(subset="layer")
    assert (of_layers[["auc", "low", "high"]] == 0.5).all(axis=None)


def test_a_long_line_is_cut_at_characters_and_every_gap_measured_once(tiny_model):
    model = tiny_model(source="per_layer")
    texts = ["".join(words) for words in LONG]
    gaps = gaps_of(model, texts, LONG)
    assert len(gaps.tokens) > 4
    assert max(map(len, gaps.tokens)) <= model.cfg.n_ctx
    for tokens in gaps.tokens:
        bytes(token for token in tokens.tolist() if token != END_OF_DOCUMENT).decode()  # raises inside a character
    pairs = [pair for text in texts for pair in pairwise(text)]
    assert gaps.pair == pairs
    assert gaps.boundary.sum() == sum(map(len, LONG)) - len(LONG)
    for piece, token, (_, after) in zip(gaps.piece, gaps.token, gaps.pair, strict=True):
        assert bytes(gaps.tokens[piece][token : token + 3].tolist()).decode() == after


def test_a_gap_has_the_increment_of_the_next_characters_first_byte(tiny_model):
    model = tiny_model(source="per_layer")
    texts = ["".join(words) for words in LONG]
    gaps = gaps_of(model, texts, LONG)
    layers, values = gap_increments(model, gaps)
    assert layers == [0, 1]
    for gap in (0, 20, len(gaps.line) - 1):
        expected = model.increments(gaps.tokens[gaps.piece[gap]])[:, 0, gaps.token[gap]]
        np.testing.assert_allclose(values[:, gap], expected, rtol=1e-5)


def test_shuffled_labels_stay_in_their_line(tiny_model, monkeypatch):
    """Lines whose gaps are all boundaries, or all none, told apart by their increments: shuffling changes nothing."""
    words = [list("学习中文"), ["学习中文"], list("北京大学"), ["北京大学"]]
    planted = np.repeat([1.0, 0.0, 1.0, 0.0], 3)
    monkeypatch.setattr("lens_positions.analysis.word_boundaries.gap_increments", lambda *_: ([0], planted[None]))
    table = boundary_auc(tiny_model(), ["".join(line) for line in words], words)
    by = table.set_index("measure")["auc"]
    assert list(by.index) == ["increment", "within token", "labels shuffled", "best order of tokens"]
    assert by["increment"] == by["labels shuffled"] == 1.0


def test_the_interval_is_that_of_weighted_areas():
    rng = np.random.default_rng(0)
    owners = np.sort(rng.integers(12, size=200))
    labels = rng.random(200) < 0.4
    values = np.round(labels + rng.normal(0, 1, 200), 1)  # with ties
    draws = resamples(12, seed=1)[:200]
    areas = [roc_auc_score(labels, values, sample_weight=draw[owners]) for draw in draws]
    assert auc_interval(values, labels, owners, draws) == pytest.approx(tuple(np.percentile(areas, [2.5, 97.5])))


def test_the_area_within_strata_is_that_of_all_their_pairs():
    rng = np.random.default_rng(1)
    strata = rng.integers(4, size=120)
    labels = rng.random(120) < 0.2 + 0.2 * strata
    values = np.round(strata + labels * 0.5 + rng.normal(0, 1, 120), 1)  # with ties
    true, false = np.flatnonzero(labels), np.flatnonzero(~labels)
    pairs = [(values[i], values[j]) for i in true for j in false if strata[i] == strata[j]]
    by_hand = np.mean([(a > b) + (a == b) / 2 for a, b in pairs])
    assert auc_within(values, labels, strata) == pytest.approx(by_hand)
    assert roc_auc_score(labels, values) > by_hand + 0.05  # strata alone tell something

    # One stratum is the plain area, and the interval is that of resampled pairs.
    assert auc_within(values, labels, np.zeros(120, dtype=int)) == pytest.approx(roc_auc_score(labels, values))
    owners = np.sort(rng.integers(9, size=120))
    draws = resamples(9, seed=2)[:50]
    areas = []
    for weights in (draw[owners] for draw in draws):
        weighed = [
            (weights[i] * weights[j], values[i], values[j]) for i in true for j in false if strata[i] == strata[j]
        ]
        won = sum(w * ((a > b) + (a == b) / 2) for w, a, b in weighed)
        areas.append(won / sum(w for w, _, _ in weighed))
    expected = tuple(np.percentile(areas, [2.5, 97.5]))
    assert auc_interval(values, labels, owners, draws, strata) == pytest.approx(expected)


def test_layer_0_knows_nothing_within_a_token_and_no_value_of_it_beats_the_best_order(tiny_model):
    table = boundary_auc(tiny_model(source="per_layer"), TEXTS, WORDS).set_index(["measure", "layer"])
    assert table.loc[("within token", 0), "auc"] == pytest.approx(0.5)
    assert table.loc[("within token", 1), "auc"] != pytest.approx(0.5)
    best = table.xs("best order of tokens", level="measure")["auc"].iloc[0]
    assert 1 - best <= table.loc[("increment", 0), "auc"] <= best


def test_branching_entropy_is_that_of_counts():
    entropy = branching_entropy(["北京北京", "京北x北京"])  # after 北 always 京, after 京 always 北
    assert entropy("北") == entropy("京") == 0
    entropy = branching_entropy(["北京北海北京", "好"])
    assert entropy("北") == pytest.approx(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))
    assert entropy("好") > 0  # never followed: the entropy of all characters
    with pytest.raises(lp.PositionsError, match="training text has no two Chinese characters"):
        branching_entropy(["none"])


@pytest.mark.slow
def test_branching_entropy_finds_the_ends_of_words(tiny_model):
    rng = np.random.default_rng(0)
    words = [word for line in WORDS for word in line]
    training = ["".join(rng.permutation(words)) for _ in range(100)]
    table = boundary_auc(tiny_model(), TEXTS, WORDS, training)
    (row,) = table[table["measure"] == "branching entropy"].iloc
    assert row["auc"] > 0.9


def test_mutual_information_is_that_of_counts():
    association = mutual_information(["北京北京", "京北x北京"])  # pairs: 北京 3, 京北 2, of 5
    assert association("北", "京") == pytest.approx(math.log(3 * 5 / (3 * 3)))
    assert association("北", "北") == pytest.approx(math.log(0.5 * 5 / (3 * 2)))


def test_the_mutual_information_of_two_characters_finds_words(tiny_model):
    rng = np.random.default_rng(0)
    words = [word for line in WORDS for word in line]
    training = ["".join(rng.permutation(words)) for _ in range(100)]  # words whole, in every order
    table = boundary_auc(tiny_model(), TEXTS, WORDS, training)
    (row,) = table[table["measure"] == "mutual information"].iloc
    assert math.isnan(row["layer"])
    assert row["auc"] > 0.95


@pytest.mark.slow
def test_people_segmented_the_held_out_text():
    words = corpora.heldout_segmentation()[:20]
    texts = ["".join(line) for line in words]
    assert corpora.jieba_words(texts) != words
    assert ["".join(line) for line in corpora.jieba_words(texts)] == texts


@pytest.mark.parametrize(
    ("texts", "words", "sentence"),
    [
        (["No Chinese here."], [["No Chinese here."]], "no two Chinese characters side by side"),
        (["天气很好"], [["天气", "好"]], "words of line 0 spell '天气好'; expected its text, '天气很好'"),
        (["天气", "很好"], [["天气"]], "2 lines and words for 1"),
        (["天气"], [["天气"]], "0 of 1 gaps"),
        (["天气"], [["天", "气"]], "1 of 1 gaps"),
        ([], [], "expected a list of lines"),
        ([5], [["天气"]], "expected a list of lines, as text"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_has_no_answer_is_refused(tiny_model, texts, words, sentence):
    with pytest.raises(lp.PositionsError, match=sentence):
        boundary_auc(tiny_model(), texts, words)


def test_training_text_without_chinese_is_refused():
    with pytest.raises(lp.PositionsError, match="training text has no two Chinese characters"):
        mutual_information(["none"])
