"""Mean increments and look-back of heads, and how they go together."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import lens_positions as lp
from lens_positions.analysis.heads import head_correlations, head_profile

TEXTS = ["The cat sat on the mat.", "天气很好 and so on", "A third one, somewhat longer than the others are."]


@pytest.mark.parametrize("positions", [{}, {"per_head": True}, {"gap": "after"}], ids=str)
def test_the_profile_is_that_of_the_cache(tiny_model, positions):
    model = tiny_model(source="per_layer", **positions)
    table = head_profile(model, TEXTS).set_index(["layer", "head"])
    assert len(table) == 8
    increments, look_back = [], []
    for text in TEXTS:
        tokens = torch.tensor([[256, *text.encode(), 256]])
        _, cache = model.run_with_cache(tokens)
        own = cache["increments", 1, "attn"][0][model.position_config.effective].double()
        increments += (own[:, 2] if own.ndim == 2 else own).tolist()
        pattern = cache["pattern", 1][0, 2].double()
        for query in range(1, len(pattern)):
            look_back.append(sum((query - key) * float(pattern[query, key]) for key in range(query + 1)))
    row = table.loc[1, 2]
    assert row["n"] == len(look_back) == len(increments)
    assert row["increment"] == pytest.approx(np.mean(increments), rel=1e-5)
    assert row["look_back"] == pytest.approx(np.mean(look_back), rel=1e-5)
    assert row["increment_low"] <= row["increment"] <= row["increment_high"]
    assert row["look_back_low"] < row["look_back"] < row["look_back_high"]


def test_heads_that_share_a_key_share_its_increment(tiny_llama, randomize):
    llama = tiny_llama(vocab_size=257)
    model = randomize(
        lp.HookedPositionTransformer.from_transformers(
            llama, lp.tokenizer.byte_tokenizer(), lp.PositionConfig(per_head=True)
        )
    )
    of = head_profile(model, TEXTS).set_index(["layer", "head"])["increment"]
    assert of[0, 0] == of[0, 1] != of[0, 2] == of[0, 3]


def profile(increments, look_back, heads=8):
    layers, numbers = np.divmod(np.arange(len(increments)), heads)
    return pd.DataFrame({"layer": layers, "head": numbers, "increment": increments, "look_back": look_back})


def test_correlations_over_heads_are_scipys():
    rng = np.random.default_rng(0)
    x = rng.normal(size=48)
    table = head_correlations(profile(x, y := rng.normal(size=48) - 0.7 * x)).set_index(["scope", "measure"])
    assert table.loc[("heads", "pearson"), "correlation"] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert table.loc[("heads", "spearman"), "correlation"] == pytest.approx(stats.spearmanr(x, y).statistic)
    low, high = stats.pearsonr(x, y).confidence_interval()
    assert tuple(table.loc[("heads", "pearson"), ["low", "high"]]) == pytest.approx((low, high))
    assert table.loc["heads", "p"].isna().all()  # heads of a layer are no independent samples of all heads


def test_within_layers_what_layers_differ_by_is_gone():
    """Layers with larger increments look back less far, heads of a layer are all chance."""
    rng = np.random.default_rng(1)
    of_layer = np.repeat(np.arange(6.0), 8)
    x, y = of_layer + rng.normal(0, 0.1, 48), -of_layer + rng.normal(0, 0.1, 48)
    table = head_correlations(profile(x, y)).set_index(["scope", "measure"])
    assert table.loc[("heads", "pearson"), "correlation"] < -0.9
    within = table.loc[("within layers", "pearson")]
    assert within["low"] < 0 < within["high"]
    assert within["p"] > 0.05


def test_a_relation_within_layers_is_found_where_layers_hide_it():
    rng = np.random.default_rng(2)
    of_layer, of_head = np.repeat(np.arange(6.0), 8), rng.normal(size=48)
    table = head_correlations(profile(10 * of_layer + of_head, 10 * of_layer - of_head))
    of = table.set_index(["scope", "measure"])["correlation"]
    assert of["heads", "pearson"] > 0.9
    assert of["within layers", "pearson"] == pytest.approx(-1)
    assert (table.set_index("scope").loc["within layers", "p"] < 0.001).all()


def test_query_heads_that_share_an_increment_count_once():
    rng = np.random.default_rng(3)
    of_keys, noise = rng.normal(size=24), rng.normal(size=48)
    table = head_correlations(profile(np.repeat(of_keys, 2), noise))
    alone = head_correlations(profile(of_keys, noise.reshape(24, 2).mean(1), heads=4))
    assert (table["n"] == 24).all()
    pd.testing.assert_frame_equal(table, alone)


def test_heads_that_share_an_increment_are_one_layer():
    table = head_correlations(profile(np.repeat([1.0, 2, 4, 3], 4), np.arange(16.0), heads=4))
    assert set(table["scope"]) == {"layers"}
    assert (table["n"] == 4).all()
    assert table["correlation"].iloc[0] == pytest.approx(stats.pearsonr([1, 2, 4, 3], [1.5, 5.5, 9.5, 13.5]).statistic)


@pytest.mark.parametrize("increments", [[1.0, 1.0, 1.0, 1.0], [1.0, 2.0]])
def test_too_little_to_correlate_is_refused(increments):
    with pytest.raises(lp.PositionsError, match="expected four or more, not all the same"):
        head_correlations(profile(np.array(increments), np.arange(len(increments)) * 1.0, heads=1))
