"""The two parts of absolute position, on models whose answer is known."""

import math

import families
import numpy as np
import pytest
import torch

import lens_positions as lp
from lens_positions.analysis import absolute_position
from lens_positions.analysis.absolute_position import (
    REPLACEMENTS,
    absolute_variation,
    attention_sinks,
    fingerprints,
    repeat_block,
    replace_first,
    replacement_effects,
)
from lens_positions.interventions import ablation_hooks
from lens_positions.tokenizer import END_OF_DOCUMENT, byte_tokenizer

TEXTS = ["The cat sat on the mat and slept.", "Nobody knew why it rained today.", "天气很好，我们学习中文。"]


def model_of(randomize, n_layers=2, **config):
    sizes = {"d_model": 32, "n_heads": 2, "n_ctx": 64, "positions": lp.PositionConfig(source="static")}
    config = lp.PositionModelConfig(n_layers=n_layers, **(sizes | config))
    return randomize(lp.HookedPositionTransformer.from_config(config))


def test_content_repeats_after_one_token(tiny_model):
    model = tiny_model()
    rows = repeat_block(model, TEXTS, block=5, length=52)
    assert rows.shape == (3, 51)
    assert (rows[:, 0] == END_OF_DOCUMENT).all()
    assert torch.equal(rows[:, 1:6], rows[:, 16:21])
    assert bytes(rows[0, 1:6].tolist()) == b"The c"


def test_one_layer_has_nothing_but_the_mask(randomize):
    """What layer 0 reads is the token alone, so at a fixed distance the score never varies."""
    table = absolute_variation(model_of(randomize, n_layers=1), TEXTS, block=4, offsets=4)
    assert table["residual"].max() < 1e-9
    assert table["mask"].max() > 1e-3
    assert table["total"].tolist() == pytest.approx(table["mask"].tolist(), rel=1e-3, abs=1e-6)
    deeper = absolute_variation(model_of(randomize), TEXTS, block=4, offsets=4)
    assert deeper[deeper["layer"] == 0]["residual"].max() < 1e-9
    assert deeper[deeper["layer"] == 1]["residual"].max() > 1e-4


def test_uniform_attention_has_the_log_of_the_number_of_keys(randomize):
    model = model_of(randomize, n_layers=1)
    with torch.no_grad():
        model.original_model.model.layers[0].self_attn.q_proj.weight.zero_()
    table = absolute_variation(model, TEXTS, block=4, offsets=2)
    log_z = np.log(np.arange(9, 57) + 1).reshape(4, 3, 4)  # quarter, repeat, place in the block
    expected = log_z.var(1).mean(1)
    for head in (0, 1, "all"):
        rows = table[(table["head"] == head) & (table["layer"] == 0)]
        assert rows["mask"].tolist() == pytest.approx(expected.tolist(), rel=1e-4)
        assert rows["start"].tolist() == [9, 21, 33, 45]
        assert rows["residual"].max() < 1e-12


def test_parts_are_those_of_the_patterns(randomize):
    """The variation of log attention, from `run_with_cache` alone, is residual plus mask minus twice their product."""
    model = model_of(randomize)
    rows = repeat_block(model, TEXTS[:1], block=6)
    _, cache = model.run_with_cache(rows)
    pattern = cache["pattern", 1][0, 1].double().log()
    logs = [[pattern[query, query - offset].item() for offset in range(3)] for query in range(13, 61)]
    expected = np.array(logs).reshape(4, 2, 6, 3).var(1).mean((1, 2))
    table = absolute_variation(model, TEXTS[:1], layers=1, block=6, offsets=3)
    own = table[table["head"] == 1]
    assert own["total"].tolist() == pytest.approx(expected.tolist(), rel=1e-3)
    parts = own["residual"] + own["mask"] - 2 * own["covariance"]
    assert parts.tolist() == pytest.approx(own["total"].tolist())
    assert own["residual_low"].isna().all()  # one text
    heads = table[table["head"] != "all"].groupby("quarter")["mask"].mean()
    for layer in (1, "all"):  # the mean over heads, and over the one layer that was asked for
        mean = table[(table["head"] == "all") & (table["layer"] == layer)]["mask"]
        assert mean.tolist() == pytest.approx(heads.tolist())


def test_the_mean_over_layers_has_an_interval_of_its_own(randomize):
    table = absolute_variation(model_of(randomize), TEXTS, block=4, offsets=4)
    over_heads = table[(table["head"] == "all") & (table["layer"] != "all")]
    means, of_all = over_heads.groupby("quarter")[["residual", "mask"]].mean(), table[table["layer"] == "all"]
    assert list(of_all["head"]) == ["all"] * 4
    for part in ("residual", "mask"):
        assert of_all[part].tolist() == pytest.approx(means[part].tolist())
        assert (of_all[f"{part}_low"] <= of_all[part]).all()
        assert (of_all[part] <= of_all[f"{part}_high"]).all()


def test_the_rotation_leaks_nothing_about_absolute_position(randomize):
    """All positions further on: the same parts."""
    model = model_of(randomize)
    own = absolute_variation(model, TEXTS, block=4, offsets=4)
    further = [(f"blocks.{layer}.attn.hook_positions", lambda p, hook: p + 1000.0) for layer in range(2)]
    table = absolute_variation(model, TEXTS, hooks=further, block=4, offsets=4)
    for part in ("residual", "mask", "total"):
        assert table[part].tolist() == pytest.approx(own[part].tolist(), rel=0.02, abs=1e-5)


def test_learned_positions_leak_until_they_are_held(randomize):
    """Increments that differ with depth of context turn the same two tokens by other angles."""
    model = model_of(randomize, positions=lp.PositionConfig(source="per_layer"))
    own = absolute_variation(model, TEXTS, block=4, offsets=4)
    held = absolute_variation(model, TEXTS, block=4, offsets=4, hooks=lp.ablate(model, to="mean", site="positions"))
    deep = own["layer"] == 1
    assert (own["residual"] - held["residual"])[deep].abs().max() > 1e-4


@pytest.mark.parametrize("to", [1.0, "mean"])
def test_held_positions_leak_nothing(randomize, to):
    """Gaps that grow along the text make the score of the only layer vary; on a ruler it varies no more."""
    model = model_of(randomize, n_layers=1)
    growing = [("blocks.0.attn.hook_positions", lambda positions, hook: positions + 0.02 * positions**2)]
    leaking = absolute_variation(model, TEXTS, hooks=growing, block=4, offsets=4)
    assert leaking["residual"].min() > 1e-4
    on_ruler = growing + ablation_hooks(model, to, site="positions")
    assert absolute_variation(model, TEXTS, hooks=on_ruler, block=4, offsets=4)["residual"].max() < 1e-9


def test_a_sliding_window_has_no_mask_part_once_it_is_full(randomize):
    model = model_of(randomize, n_layers=1, sliding_window=12)
    assert type(model.original_model).__name__ == "MistralForCausalLM"
    table = absolute_variation(model, TEXTS, block=4, offsets=2)
    full = table["start"] > 12 + 4  # the window holds whole repeats alone
    assert full.sum() == 3 * 4
    assert table[full]["mask"].max() < 1e-12
    whole = absolute_variation(model_of(randomize, n_layers=1), TEXTS, block=4, offsets=2)
    assert whole["mask"].min() > 1e-6


@pytest.mark.parametrize("how", REPLACEMENTS)
def test_the_first_embedding_is_replaced_and_nothing_else(randomize, how):
    model = model_of(randomize)
    tokens = repeat_block(model, TEXTS, block=4)
    _, plain = model.run_with_cache(tokens)
    with model.hooks(fwd_hooks=replace_first(model, how)):
        _, cache = model.run_with_cache(tokens)
    before, after = plain["blocks.0.hook_resid_pre"], cache["blocks.0.hook_resid_pre"]
    assert torch.equal(before[:, 1:], after[:, 1:])
    weights = model.original_model.get_input_embeddings().weight
    first = after[:, 0]
    if how == "zeros":
        assert (first == 0).all()
    elif how == "mean":
        assert torch.allclose(first, weights.mean(0).expand_as(first), atol=1e-6)
    elif how == "token":
        assert all((weights == row).all(-1).any() for row in first)
        assert not (first == before[:, 0]).all(-1).any()
        assert not torch.equal(first[0], first[1])
    else:
        assert torch.allclose(first.norm(dim=-1), before[:, 0].norm(dim=-1))
        assert not torch.allclose(first, before[:, 0])


@pytest.mark.slow
def test_no_two_texts_share_a_draw(randomize, monkeypatch):
    """Another token and noise are drawn for each text alone, in batches of any size."""
    monkeypatch.setattr(absolute_position, "TOKENS_A_BATCH", 1)
    model, seen = model_of(randomize), []
    note = [("embed.hook_out", lambda embeddings, hook: embeddings)]
    own = absolute_position.replace_first

    def noted(model, how, seed):
        seen.append(seed)
        return own(model, how, seed)

    monkeypatch.setattr(absolute_position, "replace_first", noted)
    replacement_effects(model, TEXTS, ["noise"], hooks=note, block=4, offsets=4)
    assert len(set(seen)) == len(seen) == 4 * len(TEXTS)


def test_shares_are_those_of_both_parts(randomize):
    table = absolute_variation(model_of(randomize), TEXTS, block=4, offsets=4)
    both = table["residual"] + table["mask"]
    assert table["share"].tolist() == pytest.approx((table["residual"] / both).tolist())
    assert ((table["share_low"] <= table["share"]) & (table["share"] <= table["share_high"])).all()


@pytest.mark.slow
def test_the_drop_is_one_minus_the_ratio_of_the_parts(randomize):
    model = model_of(randomize)
    table = replacement_effects(model, TEXTS, ["zeros"], block=4, offsets=4)
    before = absolute_variation(model, TEXTS, block=4, offsets=4)
    after = absolute_variation(model, TEXTS, hooks=replace_first(model, "zeros"), block=4, offsets=4)
    for queries, quarter in (("early", 0), ("late", 3)):
        early = [
            frame[(frame["layer"] == 1) & (frame["quarter"] == quarter) & (frame["head"] == "all")]["residual"].item()
            for frame in (before, after)
        ]
        row = table[(table["layer"] == 1) & (table["queries"] == queries)].iloc[0]
        assert [row["before"], row["after"]] == pytest.approx(early, rel=1e-6)
        assert row["drop"] == pytest.approx(1 - early[1] / early[0])
        assert row["low"] <= row["drop"] <= row["high"]
    assert set(table["layer"]) == {"all", 0, 1}
    assert table[table["layer"] == 0][["drop", "low", "high"]].isna().all(axis=None)  # nothing to lose


def test_all_goes_where_the_first_token_is_the_only_leak(randomize):
    """A first layer whose every query sees all keys alike, repeats without a value: only token 0 can leak."""
    model = model_of(randomize)
    layer = model.original_model.model.layers[0].self_attn
    with torch.no_grad():
        layer.q_proj.weight.zero_()
    silent = [("blocks.0.attn.hook_v", lambda v, hook: torch.cat([v[:, :1], torch.zeros_like(v[:, 1:])], dim=1))]
    table = replacement_effects(model, TEXTS, ["zeros"], hooks=silent, block=4, offsets=4)
    own = table[table["layer"] == 1]
    assert (own["before"] > 1e-6).all()
    assert (own["drop"] > 0.999).all()


def test_sinks_are_the_attention_at_position_0(randomize):
    model = model_of(randomize)
    table = attention_sinks(model, TEXTS)
    shares = []
    for text in TEXTS:
        tokens = torch.cat([model.to_tokens(text), torch.tensor([[END_OF_DOCUMENT]])], dim=1)
        _, cache = model.run_with_cache(tokens)
        shares.append(cache["pattern", 1][0, 0, 16:, 0])
    row = table[(table["layer"] == 1) & (table["head"] == 0) & (table["first"] == "common")].iloc[0]
    assert row["share"] == pytest.approx(torch.cat(shares).mean().item(), rel=1e-5)
    assert row["n"] == sum(map(len, shares))
    _, cache = model.run_with_cache(model.to_tokens(TEXTS[0], prepend_bos=False))
    alone = attention_sinks(model, TEXTS[:1])
    row = alone[(alone["layer"] == 1) & (alone["head"] == 0) & (alone["first"] == "own")].iloc[0]
    assert row["n"] == cache["pattern", 1].shape[2] + 1 - 16  # and the end of the document


def test_windows_in_the_middle_of_a_text_are_no_beginnings(randomize):
    model = model_of(randomize)
    long = TEXTS[0] * 8
    table = attention_sinks(model, [long])
    assert model.to_tokens(long, truncate=False).shape[1] > 2 * model.cfg.n_ctx
    assert set(table.loc[table["first"] == "common", "n"]) == {model.cfg.n_ctx - 16}


def test_the_state_at_position_0_is_a_fingerprint_of_its_token(randomize):
    table = fingerprints(model_of(randomize), TEXTS).set_index(["first", "state", "layer"])
    assert table.loc["common", "first_token"].tolist() == pytest.approx([1] * 6)
    assert (table.loc["own", "first_token"] < 0.99).all()
    assert (table.loc["common", "later"] < 0.99).all()
    assert set(table["n"]) == {3}


def test_a_component_that_all_states_share_hides_what_the_token_is(randomize):
    """It brings the residual stream's cosine to 1, and through the norm that of what attention reads."""
    model = model_of(randomize)

    def massive(states, hook):
        return torch.cat([states[..., :1] + 1e4, states[..., 1:]], dim=-1)

    hooks = [("blocks.1.hook_resid_pre", massive)]
    own, with_it = (fingerprints(model, TEXTS, hooks=of).query("first == 'own'") for of in ([], hooks))
    assert (own["first_token"] < 0.99).all()
    assert (with_it.loc[with_it["layer"] == 0, "first_token"] < 0.99).all()
    assert (with_it.loc[with_it["layer"] == 1, "first_token"] > 0.999).all()


def test_a_layer_without_either_part_has_no_share_there_alone(randomize):
    """In a full window the first layer varies early, while it fills, and not later."""
    model = model_of(randomize, n_layers=1, n_ctx=176, sliding_window=40)
    table = absolute_variation(model, TEXTS, block=4, offsets=2)
    early, late = table[table["quarter"] == 0], table[table["quarter"] == 3]
    assert early["share"].max() < 1e-3
    assert early[["share_low", "share_high"]].notna().all(axis=None)
    assert late[["share", "share_low", "share_high"]].isna().all(axis=None)


@pytest.mark.usefixtures("unchecked")
def test_attention_that_is_not_the_softmax_of_what_it_shows_is_refused():
    model = lp.HookedPositionTransformer.from_transformers(families.build("Llama4ForCausalLM"), byte_tokenizer())
    with pytest.raises(lp.PositionsError, match="layer 0 computes its pattern before TransformerLens shows its scores"):
        absolute_variation(model, TEXTS, block=4, offsets=2)


@pytest.mark.usefixtures("unchecked")
def test_bad_requests_are_one_sentence(tiny_model, tiny_llama):
    model = tiny_model()
    for call, says in {
        lambda: repeat_block(model, TEXTS, length=40): "40 tokens have room for 2 repeats of 16; expected at least 10",
        lambda: repeat_block(
            model, ["abc"], block=6
        ): "text 0 has 3 tokens after its first; expected at least 6, a block",
        lambda: repeat_block(
            model, "text", block=6
        ): "text 0 has 4 tokens after its first; expected at least 6, a block",
        lambda: absolute_variation(
            model, TEXTS, block=4, offsets=5
        ): "offsets is 5; expected a whole number from 1 to 4",
        lambda: absolute_variation(model, [5, 6], block=4): "text 0 is 5; expected a text, or a tensor of tokens",
        lambda: replacement_effects(model, TEXTS, [], block=4): "expected some of token, mean, zeros, noise",
        lambda: replace_first(model, "another"): "how is 'another'; expected one of token, mean, zeros, noise",
        lambda: fingerprints(model, TEXTS[:1]): "expected at least three texts",
        lambda: attention_sinks(model, ["a"]): "no text has 18 tokens",
        lambda: fingerprints(model, [TEXTS[0]] * 3): "all texts begin with the same token",
    }.items():
        with pytest.raises(lp.PositionsError, match=says):
            call()
    bare = lp.HookedPositionTransformer.from_transformers(tiny_llama())
    with pytest.raises(lp.PositionsError, match="the model has no tokenizer"):
        repeat_block(bare, TEXTS, block=4)
    assert math.isnan(replacement_effects(model, TEXTS[:1], ["zeros"], block=4, offsets=2)["low"].iloc[0])
