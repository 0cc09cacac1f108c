"""Situations that people reported of this field's libraries: hooks, and masks and caches.

Each has the right value, computed in another way wherever there is one (each sequence alone, without a cache, an
untouched model that is handed fractional position ids), or a refusal in one sentence. The reports are in docs/cases.md.
"""

import copy
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cases import (
    FAMILIES,
    GREEDY,
    LEFT,
    ROWS,
    TOKENS,
    assert_right,
    away,
    built,
    each_alone,
    every_source,
    generated,
    learned,
    refused,
    right_or_refused,
    streamed,
    with_streams,
)
from torch import Tensor, nn

import lens_positions as lp


@pytest.fixture(autouse=True)
def _as_people_run_it(unchecked: None) -> Iterator[None]:
    """Without shape checks and gradients."""
    with torch.no_grad():
        yield


# Hooks


def stretch(increments: Tensor, hook: Any) -> Tensor:
    return increments * 1.5


STRETCH = [("blocks.0.attn.hook_increments", stretch)]


@every_source
def test_fwd_hooks_are_heard_by_every_call(tiny_model, source):
    model = tiny_model(source=source)
    tokens = ROWS[:1]
    expected = model.run_with_hooks(tokens, fwd_hooks=STRETCH)
    assert away(expected, model(tokens)) > 1e-3
    assert torch.equal(model(tokens, fwd_hooks=STRETCH), expected)
    assert torch.equal(model.run_with_cache(tokens, fwd_hooks=STRETCH)[0], expected)
    how = {"max_new_tokens": 5, "do_sample": False, "verbose": False, "stop_at_eos": False}
    with model.hooks(fwd_hooks=STRETCH):
        stretched = model.generate(tokens, **how)
    assert torch.equal(model.generate(tokens, fwd_hooks=STRETCH, **how), stretched)
    assert not any(point.has_hooks() for point in model.hook_dict.values())


@pytest.mark.parametrize("call", ["forward", "run_with_cache", "generate", "run_with_hooks"])
def test_an_unknown_keyword_is_refused(tiny_model, call):
    model = tiny_model()
    with pytest.raises((lp.PositionsError, TypeError), match="banana"):
        getattr(model, call)(ROWS[:1], banana=1)


def test_a_hook_that_fails_leaves_no_hook(tiny_model):
    """TransformerLens #156."""
    model = tiny_model(source="per_layer")
    before = model(ROWS)

    def fail(increments: Tensor, hook: Any) -> Tensor:
        increments[:, 0, 3, 4] = 0
        return increments

    calls = [model, model.run_with_cache, model.run_with_hooks, model.generate]
    for call in calls:
        with pytest.raises(IndexError):
            call(ROWS, fwd_hooks=[("blocks.0.attn.hook_increments", fail)])
        assert not any(point.has_hooks() for point in model.hook_dict.values())
        assert torch.equal(model(ROWS), before)


def test_ones_own_hook_outlives_a_call_that_brings_others(tiny_model):
    """TransformerLens #1636."""
    model = tiny_model(source="shared")
    seen = []
    model.add_hook("blocks.0.attn.hook_increments", lambda increments, hook: seen.append(increments))
    for call in (model.run_with_cache, model.run_with_hooks, model):
        seen.clear()
        call(ROWS, fwd_hooks=STRETCH)
        assert len(seen) == 1
        model(ROWS)
        assert len(seen) == 2


def test_backward_hooks_of_increments_are_heard_and_leave(tiny_model):
    """TransformerLens #1323 and #1680."""
    model = tiny_model(source="per_layer")
    seen = []
    point = model.hook_dict["blocks.1.attn.hook_increments"]
    with torch.enable_grad():
        with model.hooks(bwd_hooks=[("blocks.1.attn.hook_increments", lambda g, hook: seen.append(g))]):
            model(ROWS, return_type="loss").backward()
        assert len(seen) == 1
        assert not point.has_hooks("both")
        increments = []
        point.add_hook(lambda d, hook: increments.append(d.retain_grad() or d))
        model(ROWS, return_type="loss").backward()
    gradient = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert_right(gradient, increments[0].grad)


@pytest.mark.parametrize("edit", [lambda m: lp.ablate(m, to=1.0), lambda m: lp.scale(m, 1.0)])
def test_an_intervention_that_cannot_act_is_refused(tiny_model, edit):
    with refused():
        model = tiny_model(source="static")
        model.run_with_hooks(ROWS, fwd_hooks=edit(model))


# Masks and caches

PREFIX, A, B = [0, 1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]
LAYOUTS: dict[str, list[list[int]]] = {
    "two branches": [PREFIX + A, PREFIX + B],
    "a tree three deep": [[0, 1, 2, 3], [0, 1, 4, 5], [0, 1, 4, 6, 7], [0, 1, 4, 6, 8], [9, 10, 11]],
    "two documents": [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11]],
    "interleaved documents": [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]],
    "holes": [[0, 1, 2, 5, 6, 9, 10, 11], [3], [4], [7], [8]],
    "stored backwards": [[11, 10, 9, 8, 7], [6, 5, 4, 3, 2, 1, 0]],
}
"""Paths from a first token to a last one: a token sees those before it on its paths, and itself."""


def seen_in(paths: list[list[int]], length: int = 12) -> tuple[Tensor, Tensor]:
    """Which tokens each token sees, bool [pos pos], and its depth [1 pos]."""
    see, ids = torch.zeros(length, length, dtype=torch.bool), torch.zeros(1, length, dtype=torch.long)
    for path in paths:
        for depth, token in enumerate(path):
            see[token, path[: depth + 1]] = True
            ids[0, token] = depth
    return see, ids


def additive(see: Tensor, hidden: float = torch.finfo(torch.float32).min) -> Tensor:
    """A 4-D mask to add to scores, [batch 1 pos pos]."""
    see = see if see.ndim == 4 else see[None, None]
    return torch.zeros(see.shape).masked_fill(~see, hidden)


def alone(model: Any, paths: list[list[int]], tokens: Tensor = TOKENS) -> list[tuple[list[int], Tensor]]:
    """The logits of each path run as a sequence of its own."""
    return [(path, model(tokens[:, path]).logits) for path in paths]


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@every_source
def test_a_4d_mask_gives_what_each_branch_alone_gives(source, layout, per_head):
    """transformers #29525, #32195; the layouts of tree decoding and of packed documents."""
    see, ids = seen_in(LAYOUTS[layout])
    forms = {
        "smallest number": additive(see),
        "infinity": additive(see, -torch.inf),
        "bool": see[None, None],
        "one for each head": additive(see).expand(1, 4, 12, 12),
        "batch of two": additive(see).expand(2, 1, 12, 12),
    }
    model = with_streams(built(), source, per_head=per_head)
    for mask in list(forms.values())[: 1 if per_head else None]:
        tokens, positions = (x.expand(len(mask), -1) for x in (TOKENS, ids))
        with right_or_refused():
            logits = model(tokens, attention_mask=mask, position_ids=positions).logits
            for path, expected in alone(model, LAYOUTS[layout]):
                assert_right(logits[:, path], expected.expand(len(mask), -1, -1))


@pytest.mark.parametrize("gap", ["before", "after"])
@pytest.mark.parametrize("family", FAMILIES)
@learned
def test_a_tree_mask_is_followed_in_every_family(source, family, gap):
    see, ids = seen_in(LAYOUTS["two branches"])
    model = with_streams(built(family, attention="eager"), source, gap=gap)
    assert away(model(TOKENS).logits, built(family, attention="eager")(TOKENS).logits) > 1e-3
    with right_or_refused():
        logits = model(TOKENS, attention_mask=additive(see), position_ids=ids).logits
        if family not in ("mistral", "gemma3"):  # a 4-D mask takes their window away
            for path, expected in alone(model, LAYOUTS["two branches"]):
                assert_right(logits[:, path], expected)


def fractional(plain: Any, increments: Tensor, ids: Tensor, see: Tensor, **given: Any) -> Tensor:
    """Logits of an untouched model at positions summed token by token in float64, gap "before"."""
    positions = ids.double().expand(increments.shape).clone()
    for row, t in itertools.product(range(len(increments)), range(increments.shape[1])):
        visible = [j for j in range(t + 1) if see[t, j]]
        before = sorted(visible, key=lambda j: int(ids.expand(increments.shape)[row, j]))
        positions[row, t] += sum(float(increments[row, j]) - 1 for j in before[1:])
    return plain(position_ids=positions.float(), **given).logits


def increments_of(model: Any, tokens: Tensor) -> Tensor:
    """The increments of a shared or frozen source, by token."""
    reads = tokens if model.position_streams.config.source == "frozen" else model.get_input_embeddings()(tokens)
    return model.position_streams.shared_source(reads)


@pytest.mark.parametrize("source", ["shared", "frozen"])
def test_positions_are_the_sum_over_what_a_token_sees(source):
    """Against an untouched model that is handed fractional position ids."""
    for layout in ("two branches", "a tree three deep", "interleaved documents", "holes"):
        see, ids = seen_in(LAYOUTS[layout])
        model = streamed(source)
        given = {"input_ids": TOKENS, "attention_mask": additive(see)}
        with right_or_refused():
            logits = model(**given, position_ids=ids).logits
            assert_right(logits, fractional(built(), increments_of(model, TOKENS), ids, see, **given))


@pytest.mark.parametrize("source", ["shared", "frozen"])
def test_a_prefix_that_sees_itself_whole_keeps_the_order_of_its_tokens(source):
    """A prefix-LM mask: five tokens see each other, the others are causal."""
    causal = torch.ones(12, 12).tril().bool()
    see = causal.clone()
    see[:5, :5] = True
    model, ids = streamed(source), torch.arange(12)[None]
    with right_or_refused():
        logits = model(TOKENS, attention_mask=additive(see)).logits
        given = {"input_ids": TOKENS, "attention_mask": additive(see)}
        assert_right(logits, fractional(built(), increments_of(model, TOKENS), ids, causal, **given))


@every_source
def test_a_window_in_a_4d_mask_is_the_window_of_the_model(source):
    """A token's position counts all tokens before it, not only those that its window shows."""
    model, windowed = streamed(source), streamed(source, "mistral")
    windowed.load_state_dict(model.state_dict())
    causal = torch.ones(12, 12).tril()
    see = (causal - causal.tril(-5)).bool()
    assert away(windowed(TOKENS).logits, model(TOKENS).logits) > 1e-3
    with right_or_refused():
        assert_right(model(TOKENS, attention_mask=additive(see)).logits, windowed(TOKENS).logits)


@learned
def test_a_mask_that_differs_from_head_to_head_has_no_position_for_a_token(source):
    see = torch.stack([seen_in(LAYOUTS[name])[0] for name in ("two branches", "two documents")] * 2)[None]
    with refused():
        streamed(source)(TOKENS, attention_mask=additive(see))


@learned
def test_a_4d_mask_of_zeros_and_ones_to_add_is_refused(source):
    """Added to scores it hides nothing, later tokens included: a token has no place then."""
    mask = torch.ones(12, 12).tril().long()[None, None]
    with refused():
        streamed(source, attention="eager")(TOKENS, attention_mask=mask)


@pytest.mark.parametrize("family", ["llama", "qwen2", "neox"])
@every_source
def test_a_causal_4d_mask_with_padding_is_the_2d_mask(source, family):
    model = streamed(source, family)
    causal = torch.ones(12, 12).tril()
    for mask in (LEFT, LEFT.flip(1)):
        see = (causal * mask[:, None]).bool() | torch.eye(12).bool()
        ids = (mask.cumsum(1) - 1).clamp(min=0)
        expected = model(ROWS, attention_mask=mask, position_ids=ids).logits
        logits = model(ROWS, attention_mask=additive(see[:, None]), position_ids=ids).logits
        assert_right(logits[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("family", FAMILIES)
@every_source
def test_a_padded_row_gives_what_it_gives_alone(source, family):
    """transformers #22161, #18478, #25790: left, right and middle padding, with and without position ids."""
    model = streamed(source, family)
    middle = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1], [1] * 12, [0, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0]])
    for mask, with_ids in ((LEFT, False), (LEFT, True), (LEFT.flip(1), False), (middle, True)):
        if mask is middle and FAMILIES[family][1].get("sliding_window"):
            continue  # a window counts the padding in the middle
        given = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if with_ids else {}
        for dtype in (torch.long, torch.bool, torch.float32) if mask is LEFT and with_ids else (torch.long,):
            logits = model(ROWS, attention_mask=mask.to(dtype), **given).logits
            for row, keep in enumerate(mask.bool()):
                assert_right(logits[row, keep][None], model(ROWS[row, keep][None]).logits)


@every_source
def test_a_row_of_padding_alone_leaves_the_others_as_they_are(source):
    model = streamed(source)
    mask = torch.stack([torch.zeros(12).long(), torch.ones(12).long()])
    logits = model(ROWS[:2], attention_mask=mask).logits
    assert_right(logits[1:], model(ROWS[1:2]).logits)


@pytest.mark.parametrize("source", ["shared", "frozen"])
def test_holes_without_position_ids_keep_the_steps_of_the_model(source):
    """The model counts one step for each hole; increments are added for the tokens that are there."""
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1]])
    see = torch.ones(12, 12).tril().bool() & mask.bool()
    model, ids = streamed(source), torch.arange(12)[None]
    with right_or_refused():
        logits = model(TOKENS, attention_mask=mask).logits
        given = {"input_ids": TOKENS, "attention_mask": mask}
        expected = fractional(built(), increments_of(model, TOKENS), ids, see, **given)
        assert_right(logits[mask.bool()], expected[mask.bool()])


PACKINGS = {
    "two documents": [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4],
    "documents of one token": [0, 1, 2, 0, 0, 1, 2, 3, 0, 1, 2, 3],
    "the first goes on from before": [5, 6, 7, 8, 0, 1, 2, 3, 4, 5, 6, 7],
    "none begins at zero": [5, 6, 7, 8, 9, 10, 3, 4, 5, 6, 7, 8],
}


@pytest.mark.parametrize("packing", PACKINGS)
@every_source
def test_packed_documents_give_what_each_alone_gives(source, packing):
    """transformers #39194, #39814: no mask and no cache, position ids that restart."""
    ids = torch.tensor([PACKINGS[packing]])
    starts = [0, *(t for t in range(1, 12) if ids[0, t] != ids[0, t - 1] + 1), 12]
    for family in ("llama", "qwen2", "neox"):
        model = streamed(source, family)
        logits = model(TOKENS, position_ids=ids, use_cache=False).logits
        for start, stop in itertools.pairwise(starts):
            part = slice(start, stop)
            assert_right(logits[:, part], model(TOKENS[:, part]).logits)


@every_source
def test_two_rows_packed_in_different_ways_do_not_mix(source):
    model = streamed(source)
    ids = torch.tensor([PACKINGS["two documents"], PACKINGS["documents of one token"]])
    logits = model(ROWS[:2], position_ids=ids, use_cache=False).logits
    for row, starts in enumerate(([0, 7, 12], [0, 3, 4, 8, 12])):
        for start, stop in itertools.pairwise(starts):
            assert_right(logits[row : row + 1, start:stop], model(ROWS[row : row + 1, start:stop]).logits)


@pytest.mark.parametrize("source", ["shared", "frozen"])
def test_packed_ids_beside_a_mask_or_a_cache_are_one_document(source):
    """transformers #46634: there the model does not separate them, and positions follow what it does."""
    model, ids = streamed(source), torch.tensor([PACKINGS["two documents"]])
    ones = torch.ones_like(TOKENS)
    surplus = (increments_of(model, TOKENS).double() - 1)[:, 1:].cumsum(1)
    positions = ids + torch.cat([torch.zeros(1, 1), surplus], 1)
    expected = built()(TOKENS, attention_mask=ones, position_ids=positions.float()).logits
    for given in ({"attention_mask": ones}, {"use_cache": True}):
        with right_or_refused():
            assert_right(model(TOKENS, position_ids=ids, **given).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
@every_source
def test_generation_from_padded_prompts_is_that_of_each_prompt(source, family):
    """transformers #25790, #37574; unsloth #3699: dynamic, static and no cache, beyond the window."""
    model = streamed(source, family)
    expected = each_alone(model, ROWS, LEFT, use_cache=False)
    assert torch.equal(generated(model, ROWS, attention_mask=LEFT, use_cache=False), expected)
    assert torch.equal(generated(model, ROWS, attention_mask=LEFT), expected)
    assert torch.equal(generated(model, ROWS, attention_mask=LEFT, cache_implementation="static"), expected)


@every_source
def test_position_ids_given_to_generate_are_those_it_would_take(source):
    """transformers #29149."""
    model = streamed(source)
    ids = (LEFT.cumsum(1) - 1).clamp(min=0)
    expected = each_alone(model, ROWS, LEFT)
    assert torch.equal(generated(model, ROWS, attention_mask=LEFT, position_ids=ids), expected)


@pytest.mark.parametrize("source", ["static", "shared", "per_layer"])
def test_generation_from_embeddings_is_that_from_tokens(source):
    """transformers #32493."""
    model = streamed(source)
    embeddings = model.get_input_embeddings()(ROWS)
    texts = model.generate(inputs_embeds=embeddings, attention_mask=LEFT, **GREEDY)
    assert torch.equal(texts, each_alone(model, ROWS, LEFT))


def test_embeddings_without_tokens_are_refused_where_increments_go_by_token():
    model = streamed("frozen")
    with refused():
        model(inputs_embeds=model.get_input_embeddings()(ROWS))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@every_source
def test_drafts_that_are_refused_leave_nothing_behind(source, family):
    """transformers #30042, #30312, #48280: prompt look-up and an assistant, within and beyond a window."""
    model, assistant = streamed(source, family), with_streams(built("llama", num_hidden_layers=1), "shared")
    prompt = TOKENS[:, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]]
    how = {"max_new_tokens": 16}
    expected = generated(model, prompt, use_cache=False, **how)
    assert torch.equal(generated(model, prompt, prompt_lookup_num_tokens=3, **how), expected)
    assert torch.equal(generated(model, prompt, assistant_model=assistant, **how), expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@every_source
def test_a_prompt_in_chunks_is_the_prompt(source, family):
    """Prefill in chunks, and a cache with padding between what it holds and what comes (TransformerLens #386)."""
    model = streamed(source, family)
    expected = each_alone(model, ROWS, LEFT, use_cache=False)
    assert torch.equal(generated(model, ROWS, attention_mask=LEFT, prefill_chunk_size=5), expected)
    if family != "llama":
        return  # a window counts the padding in the middle
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 12, [1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1]])
    ids, cache, pieces = (mask.cumsum(1) - 1).clamp(min=0), None, []
    for start, stop in ((0, 5), (5, 9), (9, 12)):
        given = {"attention_mask": mask[:, :stop], "position_ids": ids[:, start:stop]}
        out = model(ROWS[:, start:stop], past_key_values=cache, use_cache=True, **given)
        cache = out.past_key_values
        pieces.append(out.logits)
    logits = torch.cat(pieces, 1)
    for row, keep in enumerate(mask.bool()):
        assert_right(logits[row, keep][None], model(ROWS[row, keep][None]).logits)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@every_source
def test_a_tree_behind_a_cache_gives_what_each_branch_alone_gives(source, kind):
    """transformers #29731: the prefix is cached, both branches come at once, then one of them goes on."""
    model = streamed(source)
    room = 12 if kind == "dynamic" else 16
    see, ids = seen_in(LAYOUTS["two branches"])
    see = nn.functional.pad(see, (0, room - 12))
    cache = transformers.DynamicCache(config=model.config)
    if kind == "static":
        cache = transformers.StaticCache(config=model.config, max_cache_len=room)
    with right_or_refused():
        first = see[:5, : 5 if kind == "dynamic" else room]
        logits = [model(TOKENS[:, :5], attention_mask=additive(first), past_key_values=cache).logits]
        for start, stop in ((5, 10), (10, 12)):
            rows = see[start:stop, : stop if kind == "dynamic" else room]
            given = {"attention_mask": additive(rows), "position_ids": ids[:, start:stop]}
            logits.append(model(TOKENS[:, start:stop], past_key_values=cache, **given).logits)
        for path, expected in alone(model, LAYOUTS["two branches"]):
            assert_right(torch.cat(logits, 1)[:, path], expected)


@pytest.mark.parametrize("way", ["repeated", "copied", "expanded by hand"])
@every_source
def test_a_prefix_is_shared_by_several_branches(source, way):
    model = streamed(source)
    cache = model(TOKENS[:, :5], use_cache=True).past_key_values
    branches = torch.stack([TOKENS[0, 5:9], TOKENS[0, 8:12]])
    expected = model(torch.cat([TOKENS[:, :5].expand(2, -1), branches], 1)).logits[:, 5:]
    with right_or_refused():
        if way == "copied":
            caches = [copy.deepcopy(cache) for _ in branches]
            pairs = zip(branches, caches, strict=True)
            logits = torch.cat([model(b[None], past_key_values=c).logits for b, c in pairs])
        elif way == "repeated":
            cache.batch_repeat_interleave(2)
            logits = model(branches, past_key_values=cache).logits
        else:
            for layer in cache.layers:
                layer.keys, layer.values = (x.expand(2, -1, -1, -1) for x in (layer.keys, layer.values))
            logits = model(branches, past_key_values=cache).logits
        assert_right(logits, expected)


@every_source
def test_a_preallocated_cache_may_come_with_a_mask_of_its_whole_length(source):
    model = streamed(source)
    cache = transformers.StaticCache(config=model.config, max_cache_len=20)
    mask = nn.functional.pad(LEFT, (0, 8))
    ids = (LEFT.cumsum(1) - 1).clamp(min=0)
    with right_or_refused():
        first = mask.clone()
        first[:, 7:] = 0
        pieces = [model(ROWS[:, :7], attention_mask=first, position_ids=ids[:, :7], past_key_values=cache).logits]
        given = {"attention_mask": mask, "position_ids": ids[:, 7:], "past_key_values": cache}
        pieces.append(model(ROWS[:, 7:], **given).logits)
        logits = torch.cat(pieces, 1)
        for row, keep in enumerate(LEFT.bool()):
            assert_right(logits[row, keep][None], model(ROWS[row, keep][None]).logits)


@every_source
def test_masks_by_layer_type_are_those_that_the_model_makes(source):
    model = streamed(source, "gemma3")
    states = model.get_input_embeddings()(ROWS)
    for mask in (None, LEFT):
        given = {"config": model.config, "inputs_embeds": states, "attention_mask": mask, "past_key_values": None}
        masks = {
            "full_attention": transformers.masking_utils.create_causal_mask(**given),
            "sliding_attention": transformers.masking_utils.create_sliding_window_causal_mask(**given),
        }
        keep = torch.ones_like(ROWS).bool() if mask is None else mask.bool()
        with right_or_refused():
            logits = model(ROWS, attention_mask=masks).logits
            assert_right(logits[keep], model(ROWS, attention_mask=mask).logits[keep])


@every_source
def test_a_long_prompt_leaves_the_frequencies_of_a_short_one(source):
    """transformers #25306, #25104: dynamic NTK chooses its frequencies by the longest position."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    settings = {"rope_parameters": rope, "max_position_embeddings": 16}
    plain, model = built(**settings), with_streams(built(**settings), source)
    long = torch.randint(1, 61, (1, 40), generator=torch.Generator().manual_seed(8))
    short = model(TOKENS).logits
    stretched = model(long).logits
    assert torch.equal(model(TOKENS).logits, short)
    assert torch.equal(model(long).logits, stretched)
    model.position_streams.detach()
    for tokens in (TOKENS, long, TOKENS):
        assert torch.equal(model(tokens).logits, plain(tokens).logits)


STATIC_INPUTS: dict[str, dict[str, Any]] = {
    "no mask": {},
    "left padding": {"attention_mask": LEFT},
    "right padding": {"attention_mask": LEFT.flip(1)},
    "packed": {"position_ids": torch.tensor([PACKINGS["two documents"]])},
    "packed with a mask": {"position_ids": torch.tensor([PACKINGS["two documents"]]), "attention_mask": LEFT * 0 + 1},
    "tree": {"attention_mask": additive(seen_in(LAYOUTS["two branches"])[0]).expand(3, -1, -1, -1)},
    "prefix": {"attention_mask": torch.ones(3, 1, 12, 12).bool()},
    "two kinds of heads": {"attention_mask": additive(torch.rand(1, 4, 12, 12) > -1)},
}


@pytest.mark.parametrize("given", STATIC_INPUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_static_streams_leave_every_mask_to_the_model(family, given):
    plain, model = built(family), with_streams(built(family), "static")
    assert torch.equal(model(ROWS, **STATIC_INPUTS[given]).logits, plain(ROWS, **STATIC_INPUTS[given]).logits)
    if given == "right padding":  # transformers #48161: and generation from it
        right = STATIC_INPUTS[given]
        assert torch.equal(generated(model, ROWS, **right), generated(plain, ROWS, **right))


@every_source
def test_positions_beyond_256_are_told_apart_in_bf16(source):
    """transformers #25681, #29285; gpt-neox #1003."""
    settings = {"max_position_embeddings": 1024}
    model = with_streams(built(**settings).to(torch.bfloat16), source)
    tokens = torch.randint(1, 61, (1, 600), generator=torch.Generator().manual_seed(9))
    positions = []
    model.position_streams.layers[0].hook_positions.add_hook(lambda p, hook: positions.append(p))
    model(tokens)
    assert positions[0].dtype == torch.float32
    assert len(positions[0][0].unique()) == 600
    steps = positions[0][0].double().diff()
    if source in ("shared", "frozen"):
        expected = increments_of(model, tokens)[0, 1:].double()
        assert (steps - expected).abs().max() < 2e-4  # float32 holds positions near 1000 to 6e-5
    elif source == "static":
        assert torch.equal(steps, torch.ones(599).double())


@pytest.mark.slow
@pytest.mark.parametrize("source", ["static", "shared", "per_layer"])
def test_paged_generation_is_generation_or_refused(source):
    """transformers #41655, #48294: continuous batching packs all requests into one row, with a cache of its own."""
    model = streamed(source)
    small = transformers.ContinuousBatchingConfig(num_blocks=8, page_size=8, max_batch_tokens=64)
    how = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    prompts = [row[:length].tolist() for row, length in zip(ROWS, (6, 9, 4), strict=True)]
    expected = [generated(model, torch.tensor([prompt]), max_new_tokens=4)[0].tolist() for prompt in prompts]
    found = model.generate_batch(prompts, generation_config=how, continuous_batching_config=small, warmup=False)
    answers = [answer.generated_tokens for answer in found.values()]
    if source == "static":
        assert sorted(answers) == sorted(expected)
    else:  # transformers hands the refusal on with each request
        assert answers == [[], [], []]
        assert all("continuous batching" in answer.error for answer in found.values())


def test_every_report_that_a_test_names_is_listed():
    """In docs/cases.md, and none besides."""
    folder = Path(__file__).parent
    text = "".join(path.read_text("utf-8") for path in sorted(folder.glob("test_cases*.py")))
    named = set()
    for project, numbers in re.findall(r"([A-Za-z][\w-]+) (#\d+(?:(?:, | and )#\d+)*)", text):
        named |= {f"{project} {number}" for number in re.findall(r"#\d+", numbers)}
    page = (folder.parents[1] / "docs" / "cases.md").read_text("utf-8")
    listed = {f"{project} #{number}" for project, number in re.findall(r"\[[\w-]+/([\w-]+)#(\d+)\]", page)}
    assert named == listed
    tests = set(re.findall(r"^def (test_\w+)", text, re.M))
    assert set(re.findall(r"`(test_\w+)`", page)) <= tests
