"""Effects by head: each against a run of its own whose head gets what it should have, and the others what they had."""

import functools

import pytest
import torch
import transformers

import lens_positions as lp

TOKENS = torch.randint(3, 61, (1, 7), generator=torch.Generator().manual_seed(3))
HEADS = 4
GROUPED = {"head_dim": 8, "num_key_value_heads": 2}
FAMILIES = {
    "Llama": GROUPED,
    "Qwen3": GROUPED,  # a norm of each head between projection and rotation
    "Gemma3": {**GROUPED, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "Olmo2": {"num_key_value_heads": 2},  # a norm over all heads there
    "GPTNeoX": {},  # one projection for all; part of each head is rotated
}
METRIC = lp.causal.logit_difference(5, 9)


@functools.cache
def model_of(family, positions="static"):
    """A tiny random bridge whose heads attend by distance, with learned increments where asked for."""
    config = "Gemma3Text" if family == "Gemma3" else family
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": HEADS, "max_position_embeddings": 64, "initializer_range": 0.25}
    torch.manual_seed(0)
    base = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{config}Config")(**sizes, pad_token_id=0, **FAMILIES[family])
    ).eval()
    model = lp.HookedPositionTransformer.from_transformers(base, positions=positions)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.original_model.position_streams.parameters():
            parameter.normal_(std=0.5, generator=generator)
    return model


def value(model, hooks=()):
    with torch.no_grad():
        return float(METRIC(model.run_with_hooks(TOKENS, fwd_hooks=list(hooks)))[0])


def only_in(model, layer, heads, hooks):
    """Hooks that give some heads the output that they have under other hooks, and leave the other heads alone."""
    name = f"blocks.{layer}.attn.hook_z"
    with model.hooks(fwd_hooks=hooks), torch.no_grad():
        _, cache = model.run_with_cache(TOKENS, names_filter=[name])

    def put(z, hook):
        z = z.clone()
        z[:, :, heads] = cache[name][:, :, heads]
        return z

    return [(name, put)]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["static", lp.PositionConfig("shared")])
def test_a_gap_of_one_head_is_what_its_output_alone_does(family, positions):
    """The whole layer is edited, and only the output of this head is kept: no head axis is in this reference."""
    model = model_of(family, positions)
    effects = lp.causal.gap_sweep(model, TOKENS, METRIC, by="head", length=0.7)
    assert effects.shape == (2, HEADS, TOKENS.shape[1])
    assert (effects[..., 0] == 0).all()
    baseline = value(model)
    for layer in range(2):
        for head in range(HEADS):
            for t in range(1, TOKENS.shape[1]):
                hooks = only_in(model, layer, [head], lp.add_gap(model, t, 0.7, layers=layer))
                assert value(model, hooks) - baseline == pytest.approx(float(effects[layer, head, t]), abs=1e-5)
    assert effects.abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("family", ["Llama", "GPTNeoX"])
def test_key_value_heads_are_all_query_heads_of_their_group_together(family):
    model = model_of(family)
    effects = lp.causal.gap_sweep(model, TOKENS, METRIC, by="head", heads="key_value")
    each = 2 if family == "Llama" else 1
    assert effects.shape == (2, HEADS // each, TOKENS.shape[1])
    for group in range(HEADS // each):
        heads = list(range(each * group, each * (group + 1)))
        hooks = only_in(model, 1, heads, lp.add_gap(model, 3, layers=1))
        assert value(model, hooks) - value(model) == pytest.approx(float(effects[1, group, 3]), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["static", lp.PositionConfig("per_layer", gap="after")])
def test_sweeps_by_head_agree_with_a_loop_of_interventions(family, positions):
    model = model_of(family, positions)
    effects = lp.causal.gap_sweep(model, TOKENS, METRIC, "head", layers=[1])
    for head in range(HEADS):
        for t in (1, 4, 6):
            hooks = lp.add_gap(model, t, layers=1, heads=head)
            assert value(model, hooks) - value(model) == pytest.approx(float(effects[0, head, t]), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("site", ["increments", "positions", "rot_q", "rot_k", "pattern"])
def test_patches_by_head_are_what_the_output_of_this_head_does(site):
    model = model_of("Llama", lp.PositionConfig("shared"))
    other = TOKENS.flip(1)
    effects = lp.causal.patch_sweep(model, other, TOKENS, METRIC, site, by="head")
    hook, axis = lp.causal.sweeps.SITES[site]
    _, cache = model.run_with_cache(other)
    for layer in range(2):
        name = f"blocks.{layer}.{hook}"
        for t in (0, 3, 6):

            def put(values, hook, name=name, t=t):
                values = values.clone()
                values.movedim(axis, 1)[:, t] = cache[name].movedim(axis, 1)[:, t]
                return values

            for head in range(HEADS):
                hooks = only_in(model, layer, [head], [(name, put)])
                assert value(model, hooks) - value(model) == pytest.approx(float(effects[layer, head, t]), abs=1e-5)
    assert effects.abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_by_head_are_slopes_of_the_sweep_and_sum_to_those_of_the_layer(family):
    model = model_of(family, lp.PositionConfig("shared"))
    slopes = lp.causal.attribution(model, TOKENS, METRIC, by="head")
    assert torch.allclose(slopes.sum(1), lp.causal.attribution(model, TOKENS, METRIC), atol=1e-4)
    up, down = (lp.causal.gap_sweep(model, TOKENS, METRIC, "head", length=h) for h in (0.01, -0.01))
    assert torch.allclose((up - down) / 0.02, slopes, atol=2e-3, rtol=0.02)
    assert slopes.abs().amax(-1).min() > 1e-3


def test_integrated_attribution_by_head_sums_to_the_whole_effect():
    model = model_of("Llama", lp.PositionConfig("shared"))
    parts = lp.causal.attribution(model, TOKENS, METRIC, "integrated", by="head")
    whole = value(model) - value(model, lp.ablate(model, to=1.0))
    assert float(parts.sum()) == pytest.approx(whole, rel=0.02)
    assert parts.shape == (2, HEADS, TOKENS.shape[1])


@pytest.mark.slow
def test_mediation_by_head_holds_one_head():
    model = model_of("Llama", lp.PositionConfig("shared"))
    clean, corrupted = TOKENS, TOKENS.flip(1)
    table = lp.causal.mediation(model, clean, corrupted, METRIC, by="head").set_index(["layer", "head", "path"])
    _, recorded = model.run_with_cache(corrupted)
    for head in range(HEADS):
        hooks = only_in(model, 1, [head], lp.freeze(recorded, layers=1))
        through = table.loc[(1, head, "increments"), "mean"]
        assert value(model, hooks) - value(model) == pytest.approx(through, abs=1e-5)
    assert len(table) == 4 * (1 + 2 * HEADS)


@pytest.mark.slow
def test_ablation_by_head_changes_one_head():
    model = lp.HookedPositionTransformer.from_pretrained("bilingual-per-layer")
    tokens = model.to_tokens("The cat sat on the mat and slept.")
    tables = lp.causal.ablation_table(model, tokens, layers=1, to=["mean"], by="head")
    assert tables.loss["head"].tolist() == ["all", 0, 1, 2, 3]
    alone = tables.attention.query("ablated_head != 'all'")
    assert (alone["ablated_head"] == alone["head"]).all()
    loss = lp.causal.loss(tokens)
    hooks = lp.ablate(model, to="mean", layers=1, heads=2)
    change = float((loss(model.run_with_hooks(tokens, fwd_hooks=hooks)) - loss(model(tokens)))[0].detach())
    assert tables.loss.query("head == 2")["change"].item() == pytest.approx(change, abs=1e-5)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "GPTNeoX"])
def test_generation_with_one_head_edited_is_alike_with_and_without_cache(family):
    model = model_of(family)
    hooks = lp.add_gap(model, 3, by=2.5, layers=[0, 1], heads=[1])
    how = {"max_new_tokens": 6, "do_sample": False, "stop_at_eos": False, "verbose": False, "fwd_hooks": hooks}
    ids = [model.generate(TOKENS, use_past_kv_cache=cached, **how) for cached in (True, False)]
    assert torch.equal(*ids)


@pytest.mark.parametrize("positions", ["static", lp.PositionConfig("shared")])
def test_looking_at_heads_changes_nothing(positions):
    model = model_of("Llama", positions)
    plain = model(TOKENS)
    logits, cache = model.run_with_cache(TOKENS)
    assert torch.equal(logits, plain)
    assert cache["rot_k", 1].shape[2] == 2  # one for each key-value head, with gradients too
    assert cache["blocks.1.attn.hook_head_increments"].shape == (*TOKENS.shape, HEADS)


@pytest.mark.usefixtures("unchecked")
def test_what_has_no_heads_is_refused_in_one_sentence():
    model = model_of("Llama")
    refused = {
        "by is 'heads'; expected": lambda: lp.causal.gap_sweep(model, TOKENS, METRIC, by="heads"),
        "heads is 'value'; expected": lambda: lp.causal.attribution(model, TOKENS, METRIC, by="head", heads="value"),
        'site is "resid", which has no heads': lambda: lp.causal.patch_sweep(
            model, TOKENS, TOKENS, METRIC, "resid", by="head"
        ),
        "there is no head 4; expected query heads from 0 to 3": lambda: lp.add_gap(model, 2, heads=4),
        "there is no head 2; expected key-value heads from 0 to 1": lambda: lp.add_gap(
            model, 2, heads=2, head_kind="key_value"
        ),
    }
    for sentence, call in refused.items():
        with pytest.raises(lp.PositionsError, match=sentence):
            call()
