"""Interventions: each does what it says, to the tokens, layers and heads that were named, and to nothing else."""

import functools
import itertools

import families
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import drawn_weights

import lens_positions as lp
from lens_positions.interventions import ablation_hooks

SOURCES = ("static", "shared", "per_layer", "frozen")
EVERY_SOURCE = list(itertools.product(SOURCES, (False, True), ("before", "after")))
TOKENS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1))
OTHERS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(2))
FEW = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@functools.cache
def random_model(source="per_layer", per_head=False, gap="before", seed=0, layers=2):
    config = lp.PositionModelConfig(
        d_model=32, n_layers=layers, n_heads=4, d_mlp=48, n_ctx=64,
        positions=lp.PositionConfig(source=source, per_head=per_head, gap=gap),
    )  # fmt: skip
    return drawn_weights(lp.HookedPositionTransformer.from_config(config), seed)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def seen(model, tokens, hooks, site="increments"):
    """What a layer ends up with, every layer stacked."""
    names = [f"blocks.{layer}.attn.hook_{site}" for layer in model.position_layers]
    kept = {}
    keep = [(name, lambda values, hook: kept.update({hook.name: values.clone()})) for name in names]
    model.run_with_hooks(tokens, fwd_hooks=hooks + keep)
    return torch.stack([kept[name] for name in names])


@pytest.mark.parametrize("site", ["increments", "positions"])
@pytest.mark.parametrize(("source", "per_head", "gap"), EVERY_SOURCE)
def test_writing_what_was_there_changes_no_bit(source, per_head, gap, site):
    model = random_model(source, per_head, gap)
    logits, cache = model.run_with_cache(TOKENS)
    hooks = [lp.freeze(cache, site=site)]
    if source != "static" or site == "positions":
        hooks += [lp.patch(cache, site=site), lp.patch(cache, source=[2, 5], target=[2, 5], site=site)]
    if source == "static":
        hooks += [ablation_hooks(model, to) for to in (1.0, "mean", "shuffle")]
        hooks += [ablation_hooks(model, site="positions"), lp.ablate(model, to="mean", site="positions")]
    for hook in hooks:
        assert torch.equal(model.run_with_hooks(TOKENS, fwd_hooks=hook), logits)


@pytest.mark.slow
@FEW
@given(
    case=st.sampled_from(EVERY_SOURCE), seed=st.integers(0, 3), layer=st.integers(0, 1), token=st.integers(1, 8),
    kind=st.sampled_from(["add_gap", "scale", "ablate", "patch", "freeze"]),
    site=st.sampled_from(["increments", "positions"]),
)  # fmt: skip
def test_nothing_changes_before_the_edited_token(case, seed, layer, token, kind, site):
    with torch.no_grad():
        model = random_model(*case, seed)
        cache = model.run_with_cache(OTHERS)[1]
        hooks = {
            "add_gap": lambda: lp.add_gap(model, token, by=0.7, layers=layer, site=site),
            "scale": lambda: lp.scale(model, 2.5, layers=layer, positions=token, site=site),
            "ablate": lambda: lp.ablate(model, to=0.3, layers=layer, positions=[token], site=site),
            "patch": lambda: lp.patch(cache, layers=layer, source=3, target=token, site=site),
            "freeze": lambda: lp.freeze(cache, layers=layer, positions=token, site=site),
        }[kind]()
        plain, edited = model(TOKENS), model.run_with_hooks(TOKENS, fwd_hooks=hooks)
        # With gap "after" the gap before a token is the increment of the token before it, which moves nothing itself.
        assert torch.equal(plain[:, :token], edited[:, :token])


@pytest.mark.slow
@FEW
@given(case=st.sampled_from(EVERY_SOURCE), other=st.sampled_from(SOURCES), seed=st.integers(0, 3))
def test_frozen_patterns_depend_on_content_alone(case, other, seed):
    """Two models with the same weights and different increments, held at the same ones, attend alike."""
    source, per_head, gap = case
    with torch.no_grad():
        one, two = random_model(source, per_head, gap, seed), random_model(other, per_head, gap, seed)
        cache = one.run_with_cache(OTHERS)[1]
        stretched = lp.add_gap(two, 3, by=2.0) + lp.scale(two, 0.4)
        held = [one.run_with_hooks(TOKENS, fwd_hooks=lp.freeze(cache))]
        held.append(two.run_with_hooks(TOKENS, fwd_hooks=stretched + lp.freeze(cache)))
        assert torch.equal(*held)
        if source != other and "static" not in (source, other):
            assert not torch.equal(one(TOKENS), two(TOKENS))


@pytest.mark.parametrize("gap", ["before", "after"])
@pytest.mark.parametrize("per_head", [False, True])
def test_ablation_sets_a_number_the_mean_or_another_order(per_head, gap):
    model = random_model("per_layer", per_head, gap)
    own = seen(model, TOKENS, [])
    used = slice(1, None) if gap == "before" else slice(None, -1)
    assert (seen(model, TOKENS, lp.ablate(model, to=2.5)) == 2.5).all()

    mean = seen(model, TOKENS, lp.ablate(model, to="mean", layers=0))[0]
    torch.testing.assert_close(mean, own[0, :, used].mean(1, keepdim=True).expand_as(mean))
    assert len(mean[:, 0].unique()) == mean[:, 0].numel()  # each row, and head, its own
    length = seen(model, TOKENS, lp.ablate(model, to="mean", layers=0), "positions")[0][:, -1]
    torch.testing.assert_close(length, seen(model, TOKENS, [], "positions")[0][:, -1])

    shuffled = seen(model, TOKENS, lp.ablate(model, to="shuffle", layers=0))[0]
    assert not torch.equal(shuffled, own[0])
    torch.testing.assert_close(shuffled[:, used].sort(1).values, own[0, :, used].sort(1).values)
    ineffective = 0 if gap == "before" else -1
    assert torch.equal(shuffled[:, ineffective], own[0, :, ineffective])
    again = seen(model, TOKENS, lp.ablate(model, to="shuffle", layers=0))[0]
    assert torch.equal(again, shuffled)
    assert not torch.equal(seen(model, TOKENS, lp.ablate(model, to="shuffle", layers=0, seed=1))[0], shuffled)


def test_layers_tokens_and_heads_are_those_that_were_named():
    model = random_model("per_layer", True)
    own = seen(model, TOKENS, [])
    after = seen(model, TOKENS, lp.scale(model, 3.0, layers=1, positions=[2, 5], heads=3))
    expected = own.clone()
    expected[1, :, [2, 5], 3] *= 3
    assert torch.equal(after, expected)
    mask = TOKENS > 128
    after = seen(model, TOKENS, lp.ablate(model, to=0.5, layers=[1], positions=mask, heads=[0, 2]))
    expected = own.clone()
    expected[1][mask[..., None] & torch.tensor([True, False, True, False])] = 0.5
    assert torch.equal(after, expected)
    one_row = torch.arange(9) % 2 == 0
    after = seen(model, TOKENS, lp.ablate(model, to=0.5, layers=1, positions=one_row))
    assert (after[1, :, one_row] == 0.5).all()
    assert torch.equal(after[1, :, ~one_row], own[1, :, ~one_row])


@pytest.mark.parametrize("gap", ["before", "after"])
def test_a_gap_moves_its_token_and_those_after_it(gap):
    model = random_model("per_layer", False, gap)
    own = seen(model, TOKENS, [], "positions")
    moved = seen(model, TOKENS, lp.add_gap(model, 4, by=1.5, layers=1), "positions") - own
    assert torch.equal(moved[1, :, :4], torch.zeros(2, 4))
    torch.testing.assert_close(moved[1, :, 4:], torch.full((2, 5), 1.5))
    alone = seen(model, TOKENS, lp.add_gap(model, 4, by=1.5, layers=1, site="positions"), "positions") - own
    torch.testing.assert_close(alone[1], 1.5 * (torch.arange(9) == 4).float().expand(2, 9))
    assert torch.equal(alone[0], torch.zeros(2, 9))


def test_positions_can_be_put_on_a_ruler_exchanged_and_scaled():
    model = random_model("per_layer")
    own = seen(model, TOKENS, [], "positions")

    def positions(**given):
        return seen(model, TOKENS, lp.ablate(model, layers=0, site="positions", **given), "positions")[0]

    assert torch.equal(positions(), torch.arange(9.0).expand(2, 9))
    assert torch.equal(positions(to=2.0), 2 * torch.arange(9.0).expand(2, 9))
    ruler = torch.arange(9.0) * own[0, :, -1:] / 8
    torch.testing.assert_close(positions(to="mean"), ruler)
    some = positions(to="mean", positions=[3])
    torch.testing.assert_close(some[:, 3], ruler[:, 3])
    assert torch.equal(some[:, 4:], own[0, :, 4:])
    torch.testing.assert_close(positions(to="shuffle").sort(1).values, own[0].sort(1).values)
    assert not torch.equal(positions(to="shuffle"), own[0])
    scaled = seen(model, TOKENS, lp.scale(model, 2.0, layers=0, positions=[2], site="positions"), "positions")[0]
    assert torch.equal(scaled[:, 2], 2 * own[0, :, 2])
    assert torch.equal(scaled[:, 3:], own[0, :, 3:])


def test_patches_follow_the_map_of_tokens():
    model = random_model("per_layer")
    other = TOKENS[:1, :6].flip(1)
    cache = model.run_with_cache(other)[1]
    recorded, own = seen(model, other, []), seen(model, TOKENS, [])
    after = seen(model, TOKENS, lp.patch(cache, layers=1, source=[1, 5, 2], target=[8, 3, 4]))
    expected = own.clone()
    expected[1][:, [8, 3, 4]] = recorded[1][:, [1, 5, 2]]
    assert torch.equal(after, expected)
    without_batch = model.run_with_cache(other[0], remove_batch_dim=True)[1]
    again = seen(model, TOKENS, lp.patch(without_batch, layers=1, source=[1, 5, 2], target=[8, 3, 4]))
    assert torch.equal(again, after)


@pytest.mark.parametrize("gap", ["before", "after"])
def test_padding_is_left_as_it_is(gap):
    """Left padding: the real tokens fare as they do without it."""
    model = random_model("per_layer", False, gap)
    text = TOKENS[:1, :6]
    padded = torch.cat([torch.full((1, 3), 256), text], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    for to in (1.7, "mean"):
        for site in ("increments", "positions"):
            hooks = lp.ablate(model, to=to, site=site)
            alone = model.run_with_hooks(text, fwd_hooks=hooks)
            with model.hooks(fwd_hooks=hooks):
                torch.testing.assert_close(model(padded, attention_mask=mask)[:, 3:], alone, atol=1e-4, rtol=1e-4)


def test_interventions_add_up_from_left_to_right():
    model = random_model("per_layer")
    hooks = lp.ablate(model, to=2.0, layers=0) + lp.scale(model, 3.0, layers=0) + lp.add_gap(model, 4, layers=0)
    increments = seen(model, TOKENS, hooks)[0]
    assert torch.equal(increments, 6 + (torch.arange(9) == 4).float().expand(2, 9))
    logits = model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    with model.hooks(fwd_hooks=hooks):
        assert torch.equal(model(TOKENS), logits)
        cached = model.run_with_cache(TOKENS)
    assert torch.equal(cached[0], logits)
    assert torch.equal(cached[1]["increments", 0, "attn"], increments)
    assert not torch.equal(model(TOKENS), logits)


@pytest.mark.parametrize(("source", "per_head", "gap"), EVERY_SOURCE)
def test_cached_generation_equals_uncached_generation(source, per_head, gap):
    model = random_model(source, per_head, gap)
    hooks = lp.scale(model, 1.5, layers=1) + lp.add_gap(model, 3, by=2.0) + lp.ablate(model, to=0.6, layers=0)
    hooks += lp.add_gap(model, 5, by=2.0, site="positions")
    with model.hooks(fwd_hooks=hooks):
        texts = [
            model.generate(TOKENS, max_new_tokens=6, do_sample=False, use_past_kv_cache=cached, verbose=False,
                           stop_at_eos=False)
            for cached in (True, False)
        ]  # fmt: skip
    assert texts[0].shape == (2, 15)
    assert torch.equal(*texts)


def test_generation_holds_what_was_recorded_on_the_prompt():
    """With a cache the prompt's increments are held; so a run over the whole text with the same map agrees."""
    model = random_model("per_layer")
    cache = model.run_with_cache(OTHERS)[1]
    with model.hooks(fwd_hooks=lp.freeze(cache)):
        text = model.generate(TOKENS, max_new_tokens=6, do_sample=False, verbose=False, stop_at_eos=False)
    held = lp.patch(cache, source=list(range(9)), target=list(range(9)))
    logits = model.run_with_hooks(text, fwd_hooks=held)
    assert torch.equal(logits[:, 8:-1].argmax(-1), text[:, 9:])


def test_new_tokens_take_the_mean_of_the_prompt():
    model = random_model("per_layer")
    prompt_mean = seen(model, TOKENS, lp.ablate(model, to="mean"))[:, :, :1]
    kept = []
    keep = [("blocks.1.attn.hook_increments", lambda values, hook: kept.append(values.clone()))]
    with model.hooks(fwd_hooks=lp.ablate(model, to="mean") + keep):
        model.generate(TOKENS, max_new_tokens=3, do_sample=False, verbose=False, stop_at_eos=False)
    assert [values.shape[1] for values in kept] == [9, 1, 1]
    for values in kept:
        assert torch.equal(values, prompt_mean[1].expand_as(values))


def refusals(model, cache):
    per_head = random_model("per_layer", True)
    of_heads = per_head.run_with_cache(TOKENS)[1]
    bare = model.run_with_cache(TOKENS, names_filter="blocks.0.hook_resid_pre")[1]
    short, after = TOKENS[:, :5], random_model("per_layer", False, "after")
    run = model.run_with_hooks
    return {
        "layer 2 has no positions of its own; expected some of 0 to 1": lambda: lp.ablate(model, layers=2),
        "an empty list was given; expected the index of a layer": lambda: lp.scale(model, 2.0, layers=[]),
        "there is no token 9; expected tokens from 0 to 8":
            lambda: run(TOKENS, fwd_hooks=lp.scale(model, 2.0, positions=[1, 9])),
        "an index is -1; expected whole numbers from 0, each the index of a token":
            lambda: lp.scale(model, 2.0, positions=-1),
        "positions has shape (2, 9) and dtype torch.int64": lambda: lp.scale(model, 2.0, positions=TOKENS),
        "the mask of tokens has length 9; expected 5":
            lambda: run(short, fwd_hooks=lp.scale(model, 2.0, positions=TOKENS > 9)),
        "there is no head 4; expected query heads from 0 to 3": lambda: lp.freeze(of_heads, heads=4),
        "there is no head 5; expected key-value heads from 0 to 3":
            lambda: lp.scale(model, 2.0, heads=5, head_kind="key_value"),
        'head_kind is \'keys\'; expected "query" or "key_value"':
            lambda: lp.scale(model, 2.0, heads=1, head_kind="keys"),
        "to is 'zero'; expected a finite number": lambda: lp.ablate(model, to="zero"),
        "to is [1.0]": lambda: lp.ablate(model, to=[1.0]),
        "seed is 0.5; expected a whole number": lambda: lp.ablate(model, to="shuffle", seed=0.5),
        "factor is 1, which changes nothing; expected another": lambda: lp.scale(model, 1),
        "factor is 1, which": lambda: lp.scale(per_head, 1.0, positions=[4], heads=1, site="positions"),
        "by is 0, which changes nothing; expected another": lambda: lp.add_gap(model, 3, by=0.0),
        "factor is '2'; expected a finite number": lambda: lp.scale(model, "2"),
        "an index is 'all'; expected whole numbers": lambda: lp.scale(model, 2.0, layers="all"),
        "an index is 1.0": lambda: lp.scale(model, 2.0, layers=1.0),
        "the cache is a dict; expected the one that run_with_cache returns": lambda: lp.freeze(dict(cache.items())),
        "the mask of tokens has 2 rows; expected one, or 1":
            lambda: run(TOKENS[:1], fwd_hooks=lp.scale(model, 2.0, positions=TOKENS > 9)),
        "there is no token 9; expected tokens from 1 to 8": lambda: run(TOKENS, fwd_hooks=lp.add_gap(after, 9)),
        "to is nan": lambda: lp.ablate(model, to=float("nan")),
        "factor is inf": lambda: lp.scale(model, float("inf")),
        "by is nan": lambda: lp.add_gap(model, 3, by=float("nan")),
        "before is 0; expected the index of a token after the first": lambda: lp.add_gap(model, 0),
        "there is no token 5; expected tokens from 0 to 4": lambda: run(short, fwd_hooks=lp.add_gap(model, 5)),
        "site is 'keys'": lambda: lp.ablate(model, site="keys"),
        "the cache has no blocks.0.attn.hook_increments": lambda: lp.freeze(bare),
        "the cache has no blocks.7.attn.hook_positions": lambda: lp.patch(cache, layers=7, site="positions"),
        "source was given without target": lambda: lp.patch(cache, source=[1]),
        "target was given without source": lambda: lp.patch(cache, target=[1]),
        "the map goes from 2 tokens to 1": lambda: lp.patch(cache, source=[1, 2], target=[3]),
        "the map goes from 2 tokens to 1 different": lambda: lp.patch(cache, source=[1, 2], target=[3, 3]),
        "source has token 9; expected tokens below 9": lambda: lp.patch(cache, source=[9], target=[3]),
        "the recorded input has 9 tokens and this one 5": lambda: run(short, fwd_hooks=lp.patch(cache)),
        "the recorded values have shape (2, 9) and the input's (1, 9)":
            lambda: run(TOKENS[:1], fwd_hooks=lp.freeze(cache)),
        "the recorded values have shape (2, 9, 4)": lambda: run(TOKENS, fwd_hooks=lp.freeze(of_heads)),
        "the model is a LlamaForCausalLM; expected a HookedPositionTransformer":
            lambda: lp.ablate(model.original_model),
    }  # fmt: skip


@pytest.mark.usefixtures("unchecked")
def test_what_a_person_can_get_wrong_is_one_sentence():
    model = random_model("per_layer")
    plain = model(TOKENS)
    for sentence, wrong in refusals(model, model.run_with_cache(TOKENS)[1]).items():
        with pytest.raises(lp.PositionsError) as error:
            wrong()
        assert sentence in str(error.value)
        assert str(error.value).count("\n") == 0
    assert torch.equal(model(TOKENS), plain)


@pytest.mark.usefixtures("unchecked")
def test_indices_and_numbers_of_numpy_and_torch_are_taken():
    model = random_model("per_layer", True)
    cache = model.run_with_cache(OTHERS)[1]
    for ours, plain in (
        (lp.scale(model, np.float32(2), layers=np.int64(1), positions=np.arange(3), heads=torch.tensor([1, 2])),
         lp.scale(model, 2.0, layers=1, positions=[0, 1, 2], heads=[1, 2])),
        (lp.ablate(model, to=1, layers=range(2), positions=range(2, 5)), lp.ablate(model, positions=[2, 3, 4])),
        (lp.add_gap(model, np.int64(3)), lp.add_gap(model, 3)),
        (lp.patch(cache, source=torch.arange(2), target=np.array([4, 5]), layers=torch.tensor([0, 1])),
         lp.patch(cache, source=[0, 1], target=[4, 5])),
    ):  # fmt: skip
        assert torch.equal(seen(model, TOKENS, ours), seen(model, TOKENS, plain))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("per_head", "gap"), itertools.product((False, True), ("before", "after")))
def test_what_cannot_act_on_a_static_model_is_refused(per_head, gap):
    """Refused is what can only write the values that are there; what is not refused acts."""
    model, learned = random_model("static", per_head, gap), random_model("per_layer", per_head, gap)
    plain, cache = model.run_with_cache(TOKENS)
    idle = {
        "every increment of this model is 1.0 (source static), so that ablating increments to 1.0 changes nothing":
            lambda: lp.ablate(model),
        "ablating increments to 'mean' changes nothing": lambda: lp.ablate(model, to="mean", layers=1),
        "ablating increments to 'shuffle' changes nothing": lambda: lp.ablate(model, to="shuffle", positions=[2, 4]),
        "positions of this model are steps of 1.0 (source static), so that ablating positions to 1":
            lambda: lp.ablate(model, to=1, site="positions"),
        "factor is 1, which": lambda: lp.scale(model, 1.0),
        "factor is 1": lambda: lp.scale(model, 1.0, site="positions"),
        "by is 0": lambda: lp.add_gap(model, 3, by=0),
        "the cache is of a static model, whose increments are all 1.0": lambda: lp.patch(cache),
        "the cache is of a static model": lambda: lp.patch(cache, source=[1], target=[4], layers=0),
    }  # fmt: skip
    for sentence, make in idle.items():
        with pytest.raises(lp.PositionsError) as error:
            make()
        assert sentence in str(error.value)
        assert "; expected" in str(error.value)
        assert "\n" not in str(error.value)

    edited = model.run_with_cache(TOKENS, fwd_hooks=lp.add_gap(model, 4, by=2.0))[1]
    for hooks in (
        lp.ablate(model, to=2.0), lp.ablate(model, to=2.0, site="positions"), lp.scale(model, 0.5),
        lp.ablate(model, to="shuffle", site="positions"), lp.add_gap(model, 3), lp.patch(edited), lp.freeze(edited),
        lp.patch(cache, source=[1], target=[4], site="positions"),
    ):  # fmt: skip
        assert (model(TOKENS, fwd_hooks=hooks) - plain).abs().max() > 1e-3

    held = lp.add_gap(model, 4, by=2.0) + lp.freeze(cache)
    assert torch.equal(model(TOKENS, fwd_hooks=held), plain)
    own, ablated = learned(TOKENS), learned(TOKENS, fwd_hooks=lp.ablate(learned))
    assert torch.equal(learned(TOKENS, fwd_hooks=lp.freeze(cache)), ablated)
    assert (ablated - own).abs().max() > 1e-3


def test_a_table_of_a_static_model_is_a_control_of_zeros():
    model, metric = random_model("static"), lp.causal.logit_difference(3, 5)
    table = lp.causal.ablation_table(model, TOKENS)
    assert set(table.loss["to"]) == {"1.0", "mean", "shuffle"}
    assert (table.loss["change"] == 0).all()
    assert (table.attention["distance"] == 0).all()
    assert (lp.causal.attribution(model, TOKENS[0], metric, method="integrated") == 0).all()
    effects = lp.causal.mediation(model, TOKENS, OTHERS, metric)
    assert (effects.loc[effects["path"] == "increments", "mean"] == 0).all()
    assert (effects.loc[effects["path"] == "total", "mean"].abs() > 1e-3).all()


def test_layers_of_one_number_are_all_meant():
    """A looped model has two stacks of blocks, both numbered from 0."""
    model = lp.HookedPositionTransformer.from_transformers(families.build("HrmTextForCausalLM"))
    assert model.position_layers == [0, 0]
    cache = model.run_with_cache(families.TOKENS)[1]
    names = [name for name, _ in lp.freeze(cache)]
    assert names == [name for name, _ in lp.ablate(model, to=2.0)]
    assert len(names) == 2


def test_a_bridge_without_streams_is_told_to_attach_them(tiny_llama):
    model = lp.HookedPositionTransformer.from_transformers(tiny_llama())
    model.position_streams.detach()
    with pytest.raises(lp.PositionsError, match="no position streams; expected attach_positions"):
        lp.ablate(model)
