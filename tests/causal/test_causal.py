"""Causal measurements: shortcuts give what the plain loop gives, identities hold, nulls are null, errors are told."""

import functools
import importlib
import itertools
import math
import sys
import warnings

import families
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import drawn_weights

import lens_positions as lp
from lens_positions import causal
from lens_positions.causal.sweeps import SITES
from lens_positions.interventions import ablation_hooks
from lens_positions.measure.metrics import AtToken
from lens_positions.measure.partial_forward import Replay

SOURCES = ("static", "shared", "per_layer", "frozen")
EVERY_SOURCE = list(itertools.product(SOURCES, (False, True), ("before", "after")))
TOKENS = torch.randint(0, 256, (1, 9), generator=torch.Generator().manual_seed(1))
OTHER = torch.randint(0, 256, (1, 9), generator=torch.Generator().manual_seed(2))
DIFFERENCE, LOSS = causal.logit_difference(5, 9), causal.loss(TOKENS)
SHORT, SHORT_OTHER = TOKENS[:, :6], OTHER[:, :6]  # for loops of one run an edit
FEW = settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
TEXTS = ["the cat that sat then went", "a dog, 中文 中国!", "and so it goes on and on"]


@functools.cache
def random_model(source="per_layer", per_head=False, gap="before", seed=0, dtype=torch.float32, layers=3):
    """Made once, since measuring leaves a model as it was; a test that changes its model takes a `fresh_model`."""
    return fresh_model(source, per_head, gap, seed, dtype, layers)


def fresh_model(source="per_layer", per_head=False, gap="before", seed=0, dtype=torch.float32, layers=3):
    config = lp.PositionModelConfig(
        d_model=32, n_layers=layers, n_heads=4, d_mlp=48, n_ctx=64,
        positions=lp.PositionConfig(source=source, per_head=per_head, gap=gap),
    )  # fmt: skip
    model = drawn_weights(lp.HookedPositionTransformer.from_config(config), seed)
    return model if dtype == torch.float32 else model.to(dtype, print_details=False)


def loop(model, tokens, metrics, edits, columns):
    """One run_with_hooks an edit: effect minus baseline, for each metric."""
    with torch.no_grad():
        plain = model(tokens)
        edited = [model.run_with_hooks(tokens, fwd_hooks=edits(la, t)) for la in model.position_layers for t in columns]
        effects = [torch.cat([metric(logits) - metric(plain) for logits in edited]) for metric in metrics]
    return [values.view(len(model.position_layers), -1) for values in effects]


def put_in(cache, site, layer, t):
    hook, axis = SITES[site]
    name = f"blocks.{layer}.{hook}"

    def put(values, hook):
        values = values.clone()
        values.movedim(axis, 1)[:, t] = cache[name].movedim(axis, 1)[:, t]
        return values

    return [(name, put)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "per_head", "gap", "dtype", "error"),
    [(*case, torch.float64, 1e-5) for case in EVERY_SOURCE]
    + [("static", False, "before", torch.float32, 1e-3), ("per_layer", True, "after", torch.float32, 1e-3)],
)
def test_gap_sweep_equals_the_loop(source, per_head, gap, dtype, error):
    model = random_model(source, per_head, gap, dtype=dtype)
    metrics = (DIFFERENCE, causal.loss(SHORT), causal.log_probability(7, at=3))
    plain = loop(model, SHORT, metrics, lambda la, t: lp.add_gap(model, t, by=0.7, layers=la), range(1, 6))
    for metric, exact in zip(metrics, plain, strict=True):
        swept = causal.gap_sweep(model, SHORT, metric, by=0.7)
        assert swept.shape == (3, 6)
        assert (swept[:, 1:] - exact).abs().max() <= error
        assert swept[:, 0].abs().max() == 0.0
        assert swept.abs().max() > 10 * error
    assert swept[:, 4:].abs().max() < 1e-5  # token 3 does not see those after it


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(
    ("source", "per_head", "gap", "dtype", "error"),
    [("static", False, "before", torch.float64, 1e-5), ("per_layer", True, "after", torch.float64, 1e-5),
     ("shared", False, "before", torch.float32, 1e-3)],
)  # fmt: skip
def test_patch_sweep_equals_the_loop(source, per_head, gap, dtype, error, site):
    model = random_model(source, per_head, gap, dtype=dtype)
    cache = model.run_with_cache(SHORT_OTHER)[1]
    metrics = (DIFFERENCE, causal.loss(SHORT))
    plain = loop(model, SHORT, metrics, lambda la, t: put_in(cache, site, la, t), range(6))
    for metric, exact in zip(metrics, plain, strict=True):
        swept = causal.patch_sweep(model, SHORT_OTHER, SHORT, metric, site)
        assert (swept - exact).abs().max() <= error
    assert torch.equal(causal.patch_sweep(model, cache, SHORT, metrics[-1], site), swept)
    if source == "static" and site in ("increments", "positions"):
        assert swept.abs().max() < error  # every increment is 1 there: nothing to patch
    else:
        assert swept.abs().max() > 10 * error


@pytest.mark.slow
@FEW
@given(case=st.sampled_from(EVERY_SOURCE), seed=st.integers(0, 3), site=st.sampled_from(list(SITES)))
def test_patching_what_was_there_does_nothing(case, seed, site):
    model = random_model(*case, seed)
    assert causal.patch_sweep(model, TOKENS, TOKENS, LOSS, site).abs().max() < 1e-5


@pytest.mark.parametrize(
    "name",
    ["GPTNeoXForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM",
     "MixtralForCausalLM", "GPTJForCausalLM", "GlmForCausalLM", "Phi3ForCausalLM", "Cohere2ForCausalLM",
     "RecurrentGemmaForCausalLM", "FalconH1ForCausalLM", "DeepseekV3ForCausalLM"],
)  # fmt: skip
def test_sweeps_equal_the_loop_in_other_families(name):
    model = lp.HookedPositionTransformer.from_transformers(families.build(name))
    tokens = families.TOKENS[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each can be resumed, at layers at least
        swept = causal.gap_sweep(model, tokens, DIFFERENCE, by=0.7)
    (plain,) = loop(model, tokens, [DIFFERENCE], lambda la, t: lp.add_gap(model, t, by=0.7, layers=la), range(1, 9))
    assert (swept[:, 1:] - plain).abs().max() <= 1e-5 * max(1, plain.abs().max())
    assert swept.abs().max() > 1e-3


@pytest.mark.slow
def test_a_model_that_cannot_be_resumed_says_so_and_is_swept_all_the_same(monkeypatch):
    model = random_model()
    expected = {site: causal.patch_sweep(model, OTHER, TOKENS, LOSS, site) for site in SITES}
    monkeypatch.setattr(Replay, "_try_again", lambda self: "its blocks are shy")
    for site, effects in expected.items():
        with pytest.warns(
            UserWarning, match=r"LlamaForCausalLM cannot be resumed in the middle \(its blocks are shy\)"
        ):
            swept = causal.patch_sweep(model, OTHER, TOKENS, LOSS, site)
        torch.testing.assert_close(swept, effects, atol=1e-5, rtol=0)


def test_an_inexact_shortcut_is_found_out(monkeypatch):
    model = random_model()
    expected = causal.gap_sweep(model, TOKENS, DIFFERENCE)
    join = Replay._join
    monkeypatch.setattr(Replay, "_join", lambda self, layer, *given: join(self, max(layer - 1, 0), *given))
    with pytest.warns(UserWarning, match="its logits are then off by"):
        swept = causal.gap_sweep(model, TOKENS, DIFFERENCE)
    torch.testing.assert_close(swept, expected, atol=1e-5, rtol=0)


def test_the_last_mlp_runs_for_the_token_that_is_read():
    model = fresh_model()
    rows = []
    handle = model.blocks[-1].mlp.register_forward_hook(lambda mlp, args, output: rows.append(output.shape[1]))
    try:
        causal.gap_sweep(model, TOKENS, LOSS)
        assert rows[2] > 1  # after the baseline and the trial: a loss reads all tokens
        rows.clear()
        causal.gap_sweep(model, TOKENS, DIFFERENCE)
        assert set(rows[2:]) == {1}
    finally:
        handle.remove()


@pytest.mark.slow
def test_a_block_that_does_more_with_its_mlp_is_not_cut_short():
    """The MLP's output is shifted by a token here, so that the last one's is from the token before."""
    model = fresh_model()
    shift = model.blocks[-1].mlp.register_forward_hook(lambda mlp, args, output: output.roll(1, dims=1))
    try:
        replay = Replay(model, TOKENS, last_only=True)
        assert replay.exact
        assert not replay._prunes_mlp
        (plain,) = loop(model, TOKENS, [DIFFERENCE], lambda la, t: lp.add_gap(model, t, layers=la), range(1, 8))
        swept = causal.gap_sweep(model, TOKENS, DIFFERENCE)[:, 1:8]
        assert (swept - plain).abs().max() <= 1e-5 * max(1, float(plain.abs().max()))
    finally:
        shift.remove()


def test_a_sweep_leaves_the_model_as_it_was():
    model = fresh_model().train()
    plain, hooks = model(TOKENS), {name: len(h.fwd_hooks) for name, h in model.hook_dict.items()}
    causal.gap_sweep(model, TOKENS, DIFFERENCE)

    def broken(logits):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        causal.gap_sweep(model, TOKENS, broken)
    with pytest.raises(KeyboardInterrupt), model.hooks([("blocks.2.hook_resid_pre", interrupted)]):
        model(TOKENS)
    assert model.training
    assert torch.equal(model(TOKENS), plain)
    assert {name: len(h.fwd_hooks) for name, h in model.hook_dict.items()} == hooks
    assert not any("forward" in vars(block) for block in model.blocks)


def interrupted(_values, hook):
    raise KeyboardInterrupt


def zero_token_3(values, hook):
    values[:, 3] = 0
    return values


@pytest.mark.slow
@pytest.mark.parametrize("active", ["user", "shuffle", "mean", "freeze", "last token"])
def test_active_hooks_belong_to_baseline_and_edits(active):
    model = random_model()
    other = {
        "user": lambda: [("blocks.0.hook_mlp_out", zero_token_3)],
        "shuffle": lambda: lp.ablate(model, to="shuffle"),
        "mean": lambda: lp.ablate(model, to="mean"),
        "freeze": lambda: lp.freeze(model.run_with_cache(OTHER)[1], layers=0),
        "last token": lambda: lp.ablate(model, to=0.5, positions=8),
    }[active]()
    early = causal.log_probability(7, at=5)
    metrics = (DIFFERENCE, early)
    with model.hooks(fwd_hooks=other):
        by_loop = loop(model, TOKENS, metrics, lambda la, t: lp.add_gap(model, t, layers=la), range(1, 9))
    for metric, plain in zip(metrics, by_loop, strict=True):
        with model.hooks(fwd_hooks=other):
            swept = causal.gap_sweep(model, TOKENS, metric)
        assert (swept[:, 1:] - plain).abs().max() < 1e-5
        assert (causal.gap_sweep(model, TOKENS, metric) - swept).abs().max() > 1e-3 or (
            metric is early and active == "last token"
        )


@pytest.mark.slow
def test_half_precision_is_measured_in_full():
    model = random_model(dtype=torch.bfloat16)
    swept = causal.gap_sweep(model, TOKENS, causal.log_probability(7), by=0.5)
    assert len(swept.unique()) > 15
    losses = causal.ablation_table(model, TEXTS, to=[1.0], layers=0)
    assert losses.attention["look_back"].between(0, 30).all()


def test_a_shortcut_that_is_wrong_in_half_precision_is_found_out(monkeypatch):
    model = random_model(dtype=torch.bfloat16)
    join = Replay._join
    monkeypatch.setattr(Replay, "_join", lambda self, layer, *given: join(self, max(layer - 1, 0), *given))
    with pytest.warns(UserWarning, match="its logits are then off by"):
        causal.gap_sweep(model, TOKENS, DIFFERENCE)


def test_dropout_is_off_on_both_sides():
    model = lp.HookedPositionTransformer.from_transformers(families.build("LlamaForCausalLM"))
    for block in model.blocks:
        block.attn.original_component.attention_dropout = 0.5
    model.train()
    tokens = families.TOKENS[:1]
    assert causal.patch_sweep(model, tokens, tokens, DIFFERENCE, "resid").abs().max() < 1e-5
    assert model.training


def test_ablations_are_not_counted_twice():
    model = random_model()
    found = causal.ablation_table(model, TEXTS, to=[1, 1.0, "mean", "mean"], layers=[1, 1])
    assert list(found.loss["to"]) == ["1.0", "mean"] * 2
    assert found.loss["n"].nunique() == 1
    assert set(found.attention["n"]) == set(found.loss["n"])


def test_gradients_need_no_gradient_mode():
    model = fresh_model()
    slopes = causal.attribution(model, TOKENS, DIFFERENCE)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(causal.attribution(model, TOKENS, DIFFERENCE), slopes)
    model.original_model.requires_grad_(False)
    torch.testing.assert_close(causal.attribution(model, TOKENS, DIFFERENCE), slopes)


@pytest.mark.slow
def test_some_layers_and_a_map_of_tokens():
    model = random_model()
    whole = causal.gap_sweep(model, TOKENS, LOSS)
    torch.testing.assert_close(causal.gap_sweep(model, TOKENS, LOSS, layers=[0, 2]), whole[[0, 2]], atol=1e-5, rtol=0)
    torch.testing.assert_close(causal.gap_sweep(model, TOKENS[0], LOSS, layers=1), whole[[1]], atol=1e-5, rtol=0)
    short = OTHER[:, :4]
    cache = model.run_with_cache(short)[1]
    swept = causal.patch_sweep(model, short, TOKENS, DIFFERENCE, align={7: 1, 3: 3})
    for layer, (t, s) in itertools.product(range(3), ((7, 1), (3, 3))):
        with torch.no_grad():
            hooks = lp.patch(cache, layers=layer, source=s, target=t)
            effect = DIFFERENCE(model.run_with_hooks(TOKENS, fwd_hooks=hooks)) - DIFFERENCE(model(TOKENS))
        assert float(swept[layer, t]) == pytest.approx(float(effect), abs=1e-5)
    assert swept[:, [0, 1, 2, 4, 5, 6, 8]].isnan().all()


@pytest.mark.slow
def test_metrics_of_one_token_agree_with_plain_functions():
    model = random_model()
    for ours, plain in (
        (causal.logit_difference(5, 9, at=4), lambda logits: logits[:, 4, 5] - logits[:, 4, 9]),
        (causal.log_probability(5, at=-3), lambda logits: logits.log_softmax(-1)[:, -3, 5]),
        (AtToken(lambda logits: logits.max(-1).values), lambda logits: logits[:, -1].max(-1).values),
        (LOSS, lambda logits: -logits[:, :-1].log_softmax(-1).gather(2, TOKENS[:, 1:, None].expand(len(logits), -1, 1))
         .mean((1, 2))),
    ):  # fmt: skip
        torch.testing.assert_close(
            causal.gap_sweep(model, TOKENS, ours), causal.gap_sweep(model, TOKENS, plain), atol=1e-5, rtol=0
        )


@pytest.mark.slow
@pytest.mark.parametrize(("source", "per_head", "gap"), EVERY_SOURCE)
def test_gradient_attribution_is_the_slope_of_gap_sweep(source, per_head, gap):
    model = random_model(source, per_head, gap, dtype=torch.float64)
    for metric in (DIFFERENCE, LOSS):
        slopes = causal.attribution(model, TOKENS, metric)
        steps = [causal.gap_sweep(model, TOKENS, metric, by=by) for by in (1e-3, -1e-3)]
        torch.testing.assert_close(slopes, (steps[0] - steps[1]) / 2e-3, atol=1e-3, rtol=1e-3)
    assert slopes[:, 0].abs().max() == 0.0
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("source", "per_head", "gap"), EVERY_SOURCE)
def test_integrated_attribution_sums_to_the_whole_effect(source, per_head, gap):
    model = random_model(source, per_head, gap)
    for baseline in (1.4, "mean"):
        values = causal.attribution(model, TOKENS, DIFFERENCE, "integrated", baseline=baseline)
        with torch.no_grad():
            without = model.run_with_hooks(TOKENS, fwd_hooks=ablation_hooks(model, baseline))
            whole = float(DIFFERENCE(model(TOKENS)) - DIFFERENCE(without))
        assert float(values.sum()) == pytest.approx(whole, rel=0.01, abs=1e-6)
        assert values.shape == (3, 9)
        assert abs(whole) > 1e-3 or (source == "static" and baseline == "mean")
    with torch.no_grad():
        increments = model.increments(OTHER)[:, 0]
    tensor = causal.attribution(model, TOKENS, DIFFERENCE, "integrated", baseline=increments)
    with torch.no_grad():
        without = model.run_with_hooks(TOKENS, fwd_hooks=lp.freeze(model.run_with_cache(OTHER)[1]))
        whole = float(DIFFERENCE(model(TOKENS)) - DIFFERENCE(without))
    assert float(tensor.sum()) == pytest.approx(whole, rel=0.01, abs=1e-6)


def test_an_integral_that_does_not_add_up_is_said(monkeypatch):
    model = random_model()
    monkeypatch.setattr(sys.modules["lens_positions.causal.attribution"], "STEPS", (1,))
    with pytest.warns(UserWarning, match="integrated attribution sums to .* and the whole effect is"):
        causal.attribution(model, TOKENS, DIFFERENCE, "integrated", baseline=40.0)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_mediation_adds_up(source):
    model = random_model(source)
    clean = torch.randint(0, 256, (5, 9), generator=torch.Generator().manual_seed(3))
    corrupted = torch.randint(0, 256, (5, 9), generator=torch.Generator().manual_seed(4))
    table = causal.mediation(model, clean, corrupted, DIFFERENCE)
    assert list(dict.fromkeys(table["layer"])) == ["all", 0, 1, 2]
    assert (table["n"] == 5).all()
    assert ((table["low"] <= table["mean"]) & (table["mean"] <= table["high"])).all()
    wide = table.pivot(index="layer", columns="path", values="mean")
    np.testing.assert_allclose(wide["total"], wide["direct"] + wide["increments"] + wide["interaction"], atol=1e-5)
    with torch.no_grad():
        total = DIFFERENCE(model(corrupted)) - DIFFERENCE(model(clean))
        held = lp.freeze(model.run_with_cache(clean)[1], layers=1)
        direct = DIFFERENCE(model.run_with_hooks(corrupted, fwd_hooks=held)) - DIFFERENCE(model(clean))
    assert wide.loc[1, "total"] == pytest.approx(float(total.mean()), abs=1e-5)
    assert wide.loc[1, "direct"] == pytest.approx(float(direct.mean()), abs=1e-5)
    if source == "static":
        assert (wide[["increments", "interaction"]] == 0).all(axis=None)
    else:
        assert wide["increments"].abs().min() > 1e-4
    if source == "frozen":  # a table by token: of the same increments in every layer
        same = causal.mediation(model, clean, clean.clone(), DIFFERENCE)
        assert (same["mean"] == 0).all()
    one = causal.mediation(model, clean[:1], corrupted[:1], DIFFERENCE, layers=2)
    assert one["low"].isna().all()
    assert list(dict.fromkeys(one["layer"])) == ["all", 2]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "per_head"), itertools.product(SOURCES, (False, True)))
def test_ablation_table_equals_plain_runs(source, per_head):
    model = random_model(source, per_head)
    found = causal.ablation_table(model, TEXTS)
    assert len(found.loss) == 3 * 4
    assert len(found.attention) == 3 * (3 + 3) * 4
    documents = [model.to_tokens(text) for text in TEXTS]
    documents = [torch.cat([d, torch.tensor([[256]])], dim=1) for d in documents]
    n = sum(d.shape[1] - 1 for d in documents)
    for to, layer in itertools.product((1.0, "mean"), ("all", 1)):
        sums = np.zeros(3)
        for tokens in documents:
            name = "blocks.1.attn.hook_pattern"
            hooks = ablation_hooks(model, to, None if layer == "all" else layer)
            with torch.no_grad():
                plain, cache = model.run_with_cache(tokens, names_filter=name)
                with model.hooks(fwd_hooks=hooks):
                    ablated, cache_ablated = model.run_with_cache(tokens, names_filter=name)
            metric = causal.loss(tokens)
            sums[0] += float(metric(ablated) - metric(plain)) * (tokens.shape[1] - 1)
            sums[1] += int((ablated[:, :-1].argmax(-1) != plain[:, :-1].argmax(-1)).sum())
            sums[2] += float((cache[name] - cache_ablated[name])[0, 2, 1:].abs().sum() / 2)
        row = found.loss[(found.loss["to"] == str(to)) & (found.loss["layer"] == layer)].iloc[0]
        attention = found.attention.query(f"ablated == {layer!r} and to == '{to}' and layer == 1 and head == 2").iloc[0]
        assert (row["n"], row["documents"], attention["n"]) == (n, 3, n)
        assert row["change"] == pytest.approx(sums[0] / n, abs=1e-5)
        assert row["changed"] == pytest.approx(sums[1] / n)
        assert attention["distance"] == pytest.approx(sums[2] / n, abs=1e-5)
    values = found.loss
    assert ((values["low"] <= values["change"]) & (values["change"] <= values["high"])).all()
    if source == "static":
        assert values["change"].abs().max() < 1e-5
        assert found.attention["distance"].max() < 1e-5
    else:
        assert values["change"].abs().max() > 1e-3
        assert found.attention["distance"].min() > 0


@pytest.mark.slow
@pytest.mark.parametrize("by", ["layer", "head"])
def test_ablations_in_one_batch_are_those_one_by_one(monkeypatch, by):
    model = random_model("per_layer", True)
    texts = ["the cat that sat then went " * 8, *TEXTS, *TEXTS]  # batches of several rows and of one
    means = causal.token_means(model, TEXTS)
    whole = causal.ablation_table(model, texts, means=means, by=by)
    monkeypatch.setattr(importlib.import_module("lens_positions.causal.ablation"), "TOKENS_A_BATCH", 1)
    single = causal.ablation_table(model, texts, means=means, by=by)
    pd.testing.assert_frame_equal(whole.loss, single.loss, rtol=0, atol=1e-5)
    pd.testing.assert_frame_equal(whole.attention, single.attention, rtol=0, atol=1e-4)
    without = causal.ablation_table(model, texts, means=means, by=by, attention=False)
    pd.testing.assert_frame_equal(whole.loss, without.loss, rtol=0, atol=1e-5)
    assert without.attention.empty


@pytest.mark.slow
def test_ablation_of_some_layers_and_long_documents():
    model = random_model()
    text = "the cat that sat then went " * 8  # longer than the context of 64
    some = causal.ablation_table(model, [text, *TEXTS], layers=[0, 2], to=["mean"])
    assert list(some.loss["layer"]) == ["all", 0, 2]
    assert some.loss["n"].iloc[0] == sum(len(t.encode()) + 1 for t in [text, *TEXTS])
    assert set(some.attention["layer"]) == {0, 2}
    alone = causal.ablation_table(model, text, to=["mean"])
    assert alone.loss["low"].isna().all()
    again = causal.ablation_table(model, TEXTS, to=["shuffle"]).loss
    assert again.equals(causal.ablation_table(model, TEXTS, to=["shuffle"]).loss)
    assert not again.equals(causal.ablation_table(model, TEXTS, to=["shuffle"], seed=1).loss)


def refusals(model):
    sweep, patch = causal.gap_sweep, causal.patch_sweep
    bare = model.run_with_cache(TOKENS, names_filter="blocks.0.hook_resid_pre")[1]
    two = model.run_with_cache(TOKENS.repeat(2, 1))[1]
    other = random_model(per_head=True)
    of_heads = other.run_with_cache(TOKENS)[1]
    pair = torch.cat([TOKENS, OTHER])
    return {
        "the metric returned shape (2, 9) for logits (2, 9, 257); expected one number a row, shape (2,)":
            lambda: sweep(model, TOKENS, lambda logits: logits[:, :, 0]),
        "the metric returned shape (); expected one": lambda: sweep(model, TOKENS, lambda logits: logits.mean()),
        "the metric returned shape ()": lambda: causal.attribution(model, TOKENS, lambda logits: logits.mean()),
        "the metric returned a float": lambda: sweep(model, TOKENS, lambda logits: 1.0),
        "the metric returned NaN or infinite": lambda: sweep(model, TOKENS, lambda logits: logits[:, 0, 0] * math.nan),
        "the metric reads token 9; expected one of the prompt's 9 tokens":
            lambda: sweep(model, TOKENS, causal.log_probability(5, at=9)),
        "tokens go from 300 to 300; expected ids from 0 to 256":
            lambda: sweep(model, torch.tensor([[300, 300]]), LOSS),
        "by is 0.0; expected": lambda: sweep(model, TOKENS, LOSS, by=0.0),
        "by is nan": lambda: sweep(model, TOKENS, LOSS, by=math.nan),
        "layer 3 has no positions of its own; expected some of 0 to 2": lambda: sweep(model, TOKENS, LOSS, layers=3),
        "site is 'keys'; expected one of increments, positions":
            lambda: patch(model, OTHER, TOKENS, LOSS, "keys"),
        "the source has 4 tokens and the prompt 9; expected equally many, or a map":
            lambda: patch(model, OTHER[:, :4], TOKENS, LOSS),
        "align maps token 9 to 0; expected tokens from 0 to 8": lambda: patch(model, OTHER, TOKENS, LOSS, align={9: 0}),
        "align maps token 0 to 12": lambda: patch(model, OTHER, TOKENS, LOSS, align={0: 12}),
        "patterns are patched row by row": lambda: patch(model, OTHER, TOKENS, LOSS, "pattern", align={0: 1}),
        "the cache has no blocks.0.attn.hook_increments": lambda: patch(model, bare, TOKENS, LOSS),
        "the source has 2 rows; expected one": lambda: patch(model, two, TOKENS, LOSS),
        "source is a dict; expected text, token ids or a cache": lambda: patch(model, {}, TOKENS, LOSS),
        "the recorded values have shape (4,) a token and the prompt's ()": lambda: patch(model, of_heads, TOKENS, LOSS),
        "method is 'magic'": lambda: causal.attribution(model, TOKENS, LOSS, "magic"),
        "baseline is 'shuffle'; expected a number":
            lambda: causal.attribution(model, TOKENS, LOSS, "integrated", baseline="shuffle"),
        "baseline has shape (3, 4)":
            lambda: causal.attribution(model, TOKENS, LOSS, "integrated", baseline=torch.ones(3, 4)),
        "pair 0 has 9 tokens in the clean prompt and 4 in the corrupted one; expected pairs of prompts of equal length":
            lambda: causal.mediation(model, TOKENS, OTHER[:, :4], DIFFERENCE),
        "there are 1 clean and 2 corrupted prompts; expected pairs":
            lambda: causal.mediation(model, TOKENS, pair, DIFFERENCE),
        "to is []; expected a list of ablations": lambda: causal.ablation_table(model, TEXTS, to=[]),
        "to is 'mean'; expected a list": lambda: causal.ablation_table(model, TEXTS, to="mean"),
        "seed is -1; expected": lambda: causal.ablation_table(model, TEXTS, seed=-1),
        "a token of the metric is 999; expected an id from 0 to 256":
            lambda: sweep(model, TOKENS, causal.logit_difference(999, 9)),
        "a token of the metric is 'the'": lambda: sweep(model, TOKENS, causal.log_probability("the")),
        "the metric reads token 20; expected one of the prompt's 9":
            lambda: causal.attribution(model, TOKENS, causal.log_probability(5, at=20)),
        "the metric reads token 2.0": lambda: sweep(model, TOKENS, causal.log_probability(5, at=2.0)),
        "loss is of 4 tokens and the prompt has 9": lambda: sweep(model, TOKENS, causal.loss(OTHER[:, :4])),
        "loss was given shape (2, 9)": lambda: causal.loss(pair),
        "loss was given a str": lambda: causal.loss("a text"),
        "the metric is None; expected a function": lambda: sweep(model, TOKENS, None),
        "the metric has no gradient":
            lambda: causal.attribution(model, TOKENS, lambda logits: DIFFERENCE(logits.detach())),
        "text 0 is 1; expected a text, or a tensor": lambda: causal.mediation(model, [1, 2], TOKENS, DIFFERENCE),
        "tokens are shape (1, 9) and torch.float32":
            lambda: causal.mediation(model, TOKENS.float(), TOKENS, DIFFERENCE),
        "align is {}": lambda: patch(model, OTHER, TOKENS, LOSS, align={}),
        "an index is '3'": lambda: patch(model, OTHER, TOKENS, LOSS, align={"3": 1}),
        "site is ['resid']": lambda: patch(model, OTHER, TOKENS, LOSS, ["resid"]),
        "to is 'zero'": lambda: causal.ablation_table(model, TEXTS, to=["zero"]),
        "layer 7 has no positions": lambda: causal.ablation_table(model, TEXTS, layers=[7]),
        "no texts were given": lambda: causal.ablation_table(model, []),
        "the text is empty": lambda: causal.ablation_table(model, [""]),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_what_a_person_can_get_wrong_is_one_sentence():
    model = random_model()
    plain = model(TOKENS)
    for sentence, wrong in refusals(model).items():
        first, *rest = sentence.split("; ")
        with pytest.raises(lp.PositionsError) as error:
            wrong()
        assert all(part in str(error.value) for part in (first, *rest))
        assert "\n" not in str(error.value)
    assert torch.equal(model(TOKENS), plain)
    llama = model.original_model
    for function in (causal.gap_sweep, causal.attribution):
        with pytest.raises(lp.PositionsError, match="the model is a LlamaForCausalLM; expected a HookedPosition"):
            function(llama, TOKENS, LOSS)
