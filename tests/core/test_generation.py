"""With a key-value cache the increments go on where the cache stopped, whatever happens to the cache in between."""

import copy
import gc
import itertools
import pickle
import weakref

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, StaticCache

import lens_positions as lp

EVERY_SOURCE = list(itertools.product(("static", "shared", "per_layer", "frozen"), (False, True), ("before", "after")))
every_source = pytest.mark.parametrize(("source", "per_head", "gap"), EVERY_SOURCE)
TOKENS = torch.randint(1, 61, (3, 12), generator=torch.Generator().manual_seed(4))
MASK = torch.ones_like(TOKENS)
MASK[0, :4] = 0
MASK[2, :1] = 0


@pytest.fixture
def tiny_stream(tiny_llama, randomize):
    def build(source, per_head=False, gap="before", **llama):
        model = tiny_llama(**llama)
        lp.attach_positions(model, lp.PositionConfig(source=source, per_head=per_head, gap=gap))
        return randomize(model)

    return build


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def ids_of(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


@every_source
def test_cached_logits_equal_uncached_ones(tiny_stream, source, per_head, gap):
    """In pieces of different lengths, with rows padded on the left, handing the cache over by hand."""
    model = tiny_stream(source, per_head, gap)
    for mask in (None, MASK):
        given = {} if mask is None else {"attention_mask": mask, "position_ids": ids_of(mask)}
        whole = model(TOKENS, **given).logits
        cache, pieces = None, []
        for start, stop in ((0, 5), (5, 6), (6, 10), (10, 12)):
            if mask is not None:
                given = {"attention_mask": mask[:, :stop], "position_ids": ids_of(mask)[:, start:stop]}
            out = model(TOKENS[:, start:stop], past_key_values=cache, use_cache=True, **given)
            cache = out.past_key_values
            pieces.append(out.logits)
        error = (torch.cat(pieces, 1) - whole)[MASK.bool()].abs().max()
        assert error < 1e-5 * whole[MASK.bool()].abs().max()


@pytest.mark.slow
@every_source
def test_cached_generation_equals_uncached(tiny_stream, source, per_head, gap):
    model = tiny_stream(source, per_head, gap)
    for how in ({}, {"do_sample": True, "temperature": 1.5}, {"num_beams": 3, "num_return_sequences": 2}):
        for given in ({}, {"attention_mask": MASK}):
            texts = []
            for cached in (True, False):
                torch.manual_seed(5)
                how = {"do_sample": False, "max_new_tokens": 6, **how, "use_cache": cached}
                texts.append(model.generate(TOKENS, **given, **how))
            assert texts[0].shape[1] == 18
            assert torch.equal(*texts)


@every_source
def test_generation_depends_on_the_increments(tiny_stream, source, per_head, gap):
    if source == "static":
        return
    model = tiny_stream(source, per_head, gap)
    learned = model.generate(TOKENS, max_new_tokens=10, do_sample=False)
    model.position_streams.detach()
    assert not torch.equal(learned, model.generate(TOKENS, max_new_tokens=10, do_sample=False))


@pytest.mark.slow
@pytest.mark.parametrize(("source", "per_head"), sorted({entry[:2] for entry in EVERY_SOURCE}))
def test_bridge_generates_alike_with_and_without_cache(tiny_model, source, per_head):
    model = tiny_model(source=source, per_head=per_head)
    how = {"max_new_tokens": 8, "do_sample": False, "verbose": False, "stop_at_eos": False, "return_type": "tokens"}
    for prompt in (TOKENS, "The distance", ["a", "Two words"]):
        cached, uncached = (model.generate(prompt, use_past_kv_cache=cached, **how) for cached in (True, False))
        assert torch.equal(cached, uncached)
    assert isinstance(model.generate("The", max_new_tokens=3, verbose=False), str)


def test_bridge_hands_the_cache_out_and_takes_it_back(tiny_model):
    model = tiny_model(source="per_layer")
    whole = model(TOKENS)
    first, cache = model(TOKENS[:, :7], return_type="logits_and_cache")
    rest = model(TOKENS[:, 7:], past_key_values=cache)
    assert (torch.cat([first, rest], 1) - whole).abs().max() < 1e-5


def continued(model, cache, tokens):
    return model(tokens, past_key_values=cache).logits


@every_source
def test_changes_of_the_cache_are_followed(tiny_stream, source, per_head, gap):
    model = tiny_stream(source, per_head, gap)
    prompt, rest = TOKENS[:, :7], TOKENS[:, 7:]

    def filled(tokens=prompt):
        return model(tokens, use_cache=True).past_key_values

    def check(cache, before, after):
        expected = model(torch.cat([before, after], 1)).logits[:, before.shape[1] :]
        assert (continued(model, cache, after) - expected).abs().max() < 5e-5

    cache = filled()
    cache.crop(-3)
    check(cache, prompt[:, :4], rest)

    order = torch.tensor([2, 0, 0])
    cache = filled()
    cache.reorder_cache(order)
    check(cache, prompt[order], rest)

    cache = filled()
    cache.batch_select_indices(torch.tensor([2, 0]))
    check(cache, prompt[[2, 0]], rest[[2, 0]])

    cache = filled()
    cache.batch_repeat_interleave(2)
    check(cache, prompt.repeat_interleave(2, 0), rest.repeat_interleave(2, 0))

    cache = filled()
    twin = copy.deepcopy(cache)
    continued(model, cache, rest.flip(1))
    check(twin, prompt, rest)

    cache.reset()
    check(cache, prompt[:, :0], rest)


@pytest.mark.parametrize("source", ["static", "shared", "per_layer"])
def test_preallocated_cache(tiny_stream, source):
    model = tiny_stream(source)
    plain = model.generate(TOKENS, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(TOKENS, max_new_tokens=6, do_sample=False, cache_implementation="static"), plain)
    cache = StaticCache(config=model.config, max_cache_len=32)
    first = model(TOKENS[:, :7], past_key_values=cache).logits
    rest = model(TOKENS[:, 7:], past_key_values=cache).logits
    # Rounding of float32, whose order of summation depends on how many tokens run together.
    assert (torch.cat([first, rest], 1) - model(TOKENS).logits).abs().max() < 3e-5


def test_assisted_generation_equals_plain(tiny_stream):
    """Prompt look-up proposes several tokens at once and crops what is refused."""
    model = tiny_stream("per_layer")
    how = {"max_new_tokens": 20, "do_sample": False}
    prompt = TOKENS[:1, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]]
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **how), model.generate(prompt, **how))


@pytest.mark.parametrize("source", ["shared", "per_layer", "frozen"])
def test_cache_filled_without_streams_is_refused(tiny_stream, source):
    model = tiny_stream(source)
    streams = model.position_streams
    config, state = streams.config, streams.state_dict()
    streams.detach()
    cache = model(TOKENS[:, :7], use_cache=True).past_key_values
    lp.attach_positions(model, config, table=state.get("shared_source.table"))
    with pytest.raises(lp.PositionsError, match="3 rows of 7 tokens at layer 0 and positions for none"):
        continued(model, cache, TOKENS[:, 7:])


def test_cache_changed_behind_its_back_is_refused(tiny_stream):
    model = tiny_stream("per_layer")
    cache = model(TOKENS[:, :7], use_cache=True).past_key_values
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :-2], layer.values[:, :, :-2]
    with pytest.raises(lp.PositionsError, match="5 tokens at layer 0 and positions for 3 rows of 7"):
        continued(model, cache, TOKENS[:, 7:])


@pytest.mark.parametrize("gap", ["before", "after"])
@pytest.mark.parametrize("per_head", [False, True])
def test_intervention_in_some_steps_stays_in_the_positions_after_it(tiny_stream, per_head, gap):
    """Static streams remember nothing until somebody edits, and go on from there."""
    model = tiny_stream("static", per_head, gap)
    hooks = [stream.hook_increments for stream in model.position_streams.layers]
    shape = (3, 12, 2) if per_head else (3, 12)
    for edited in ({0}, {1}, {0, 2}, {3}):
        factors = torch.ones(shape)
        cache, pieces = None, []
        for number, (start, stop) in enumerate(((0, 5), (5, 6), (6, 10), (10, 12))):
            if number in edited:
                factors[:, start:stop] = 2.5
                hooks[1].add_hook(lambda d, hook: 2.5 * d)
            out = model(TOKENS[:, start:stop], past_key_values=cache, use_cache=True)
            hooks[1].remove_hooks()
            cache = out.past_key_values
            pieces.append(out.logits)
        hooks[1].add_hook(lambda d, hook, factors=factors: factors * d)
        whole = model(TOKENS).logits
        hooks[1].remove_hooks()
        assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-5
        assert (whole - model(TOKENS).logits).abs().max() > 1e-3


def test_looking_on_while_generating_changes_nothing(tiny_stream):
    for source in ("static", "per_layer"):
        model = tiny_stream(source)
        plain = model.generate(TOKENS, max_new_tokens=8, do_sample=False, attention_mask=MASK)
        for stream in model.position_streams.layers:
            stream.hook_positions.add_hook(lambda p, hook: None)
            stream.hook_increments.add_hook(lambda d, hook: None)
        assert torch.equal(model.generate(TOKENS, max_new_tokens=8, do_sample=False, attention_mask=MASK), plain)


def test_memory_of_positions_ends_with_the_cache(tiny_stream):
    model = tiny_stream("per_layer")
    cache = model(TOKENS, use_cache=True).past_key_values
    sums = [weakref.ref(s) for s in cache.surplus.values()]
    watched = weakref.ref(cache)
    assert len(sums) == 2
    del cache
    gc.collect()
    assert watched() is None
    assert [s() for s in sums] == [None, None]


def test_a_pickled_cache_goes_on(tiny_stream):
    model = tiny_stream("per_layer")
    cache = pickle.loads(pickle.dumps(model(TOKENS[:, :7], use_cache=True).past_key_values))
    assert (continued(model, cache, TOKENS[:, 7:]) - model(TOKENS).logits[:, 7:]).abs().max() < 1e-5


def test_two_caches_do_not_meet(tiny_stream):
    model = tiny_stream("per_layer").double()  # float32 itself may be off by more than is asked for
    first, second = (model(t[:, :7], use_cache=True).past_key_values for t in (TOKENS, TOKENS.flip(1)))
    expected = model(TOKENS).logits[:, 7:], model(TOKENS.flip(1)).logits[:, 7:]
    for t in range(7, 12):  # turn by turn
        a = continued(model, first, TOKENS[:, t : t + 1])
        b = continued(model, second, TOKENS.flip(1)[:, t : t + 1])
        assert (a - expected[0][:, t - 7 : t - 6]).abs().max() < 1e-5
        assert (b - expected[1][:, t - 7 : t - 6]).abs().max() < 1e-5


@pytest.mark.parametrize("source", ["static", "per_layer"])
def test_sliding_window_cache(source, randomize):
    config = MistralConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=5,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = MistralForCausalLM(config)
    lp.attach_positions(model, lp.PositionConfig(source=source))
    randomize(model)
    texts = [model.generate(TOKENS, max_new_tokens=10, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*texts)


def newlines(ids):
    return ids == 7


def after_the_third(ids):
    """All tokens after the third one that can be divided by 3, whenever it comes."""
    return (ids % 3 == 0).cumsum(1).roll(1, 1).index_fill(1, torch.tensor([0]), 0) > 2


def edits_that_start_later(model):
    even = dict(positions=lambda ids: ids % 2 == 0)
    return {
        "a slice past the prompt": lp.ablate(model, to=3.0, positions=slice(15, None)),
        "a slice with steps": lp.scale(model, 4.0, positions=slice(5, 22, 3)),
        "positions of a slice": lp.scale(model, 1.5, positions=slice(14, None), site="positions"),
        "a function": lp.ablate(model, to=0.2, **even) + lp.scale(model, 2.0, layers=0, positions=slice(16, 18)),
        "a function of the past": lp.scale(model, 4.0, positions=after_the_third),
        "gaps from a token on": lp.add_gap(model, before=slice(14, None), by=2.5),
    }


@pytest.mark.slow
@pytest.mark.parametrize("source", ["static", "per_layer"])
@pytest.mark.parametrize("gap", ["before", "after"])
@pytest.mark.parametrize("per_head", [False, True])
def test_edits_that_start_later_generate_alike_with_and_without_a_cache(tiny_model, source, gap, per_head):
    """Greedily, of a tiny Llama; the logits of the cached steps are those of one whole pass with the same edit."""
    model = tiny_model(source=source, gap=gap, per_head=per_head).to(torch.float64, print_details=False)
    prompt = TOKENS[:1]
    greedy = dict(max_new_tokens=12, do_sample=False, verbose=False, stop_at_eos=False)
    plain = model(model.generate(prompt, **greedy))
    changed = 0
    for name, hooks in edits_that_start_later(model).items():
        runs = [model.generate(prompt, use_past_kv_cache=c, fwd_hooks=hooks, **greedy) for c in (True, False)]
        assert torch.equal(*runs), name
        (ids,), step = runs[:1], len(prompt[0])
        with model.hooks(fwd_hooks=hooks):
            whole, cache, pieces = model(ids), None, []
            for start, stop in ((0, step), *((t, t + 1) for t in range(step, ids.shape[1]))):
                out = model.original_model(ids[:, start:stop], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                pieces.append(out.logits)
        assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-5 * whole.abs().max(), name
        changed += (whole - model(ids)).abs().max() > 1e-4
    assert changed == 6
    assert plain.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bilingual-rope", "bilingual-shared", "bilingual-per-layer"])
def test_shipped_models_generate_alike_with_edits_that_start_past_the_prompt(name):
    model = lp.HookedPositionTransformer.from_pretrained(name)
    prompt = model.to_tokens("The President of the United")
    greedy = dict(max_new_tokens=24, do_sample=False, verbose=False, stop_at_eos=False)
    plain = model.generate(prompt, **greedy)
    spaces = dict(before=lambda ids: ids == ord(" "), by=3.0)
    for hooks in (lp.add_gap(model, **spaces), lp.ablate(model, to=2.5, positions=slice(prompt.shape[1] + 4, None))):
        runs = [model.generate(prompt, use_past_kv_cache=c, fwd_hooks=hooks, **greedy) for c in (True, False)]
        assert torch.equal(*runs)
        start = prompt.shape[1] + (5 if hooks[0][1].positions.__class__ is slice else 0)
        assert torch.equal(runs[0][:, :start], plain[:, :start])
        assert not torch.equal(runs[0], plain)


def test_rows_of_a_batch_meet_a_condition_each_at_its_own_token(tiny_model):
    """Padded on the left, with a beam search's reordering beneath: as each row alone."""
    model = tiny_model(source="per_layer")
    hooks = lp.scale(model, 5.0, positions=after_the_third)
    whole, cache = [], None
    with model.hooks(fwd_hooks=hooks):
        for start, stop in ((0, 6), (6, 7), (7, 12)):
            given = {"attention_mask": MASK[:, :stop], "position_ids": ids_of(MASK)[:, start:stop]}
            out = model.original_model(TOKENS[:, start:stop], past_key_values=cache, use_cache=True, **given)
            cache = out.past_key_values
            if stop == 6:  # there and back
                cache.reorder_cache(torch.tensor([2, 0, 1]))
                cache.reorder_cache(torch.tensor([1, 2, 0]))
            whole.append(out.logits)
        for row, mask in enumerate(MASK.bool()):
            alone = model(TOKENS[row][mask][None])
            assert (torch.cat(whole, 1)[row][mask] - alone[0]).abs().max() < 1e-5 * alone.abs().max()


def has_a_next(ids):
    return torch.nn.functional.pad(ids[:, 1:] >= 0, (0, 1))


def test_choices_that_a_generation_would_break_are_refused(tiny_model):
    model, after = tiny_model(source="per_layer"), tiny_model(source="per_layer", gap="after")
    ids = TOKENS[:1]
    last = lp.scale(
        model, 2.0, positions=lambda ids: torch.nn.functional.pad(ids[:, 1:] == ids[:, 1], (0, 1), value=True)
    )
    refused = {
        "chooses others among the first 11 once a token follows": lambda: model(ids, fwd_hooks=last),
        "returned torch.int64 .1, 12. for ids of shape .1, 12.; expected booleans": lambda: model.run_with_hooks(
            ids, fwd_hooks=lp.scale(model, 2.0, positions=lambda ids: ids)
        ),
        "returned a list for ids": lambda: model.run_with_hooks(
            ids, fwd_hooks=lp.scale(model, 2.0, positions=lambda ids: [True])
        ),
        "an end of the slice positions is -3; expected": lambda: lp.scale(model, 2.0, positions=slice(-3, None)),
        "an end of the slice before is 0": lambda: lp.add_gap(model, before=slice(2, 9, 0)),
        "to is 'mean' and positions has no end": lambda: lp.ablate(model, to="mean", positions=slice(3, None)),
        "to is 'shuffle' and positions has no end": lambda: lp.ablate(model, to="shuffle", positions=newlines),
        'before is a function and this model has gap "after"': lambda: lp.add_gap(after, before=newlines),
    }
    for message, run in refused.items():
        with pytest.raises(lp.PositionsError, match=message):
            run()
    with (
        model.hooks(fwd_hooks=lp.scale(model, 2.0, positions=newlines)),
        pytest.raises(lp.PositionsError, match="does not know them all; expected ids rather than embeddings"),
    ):
        model.original_model(inputs_embeds=model.original_model.get_input_embeddings()(ids))
