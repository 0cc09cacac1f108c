"""Masks: a position is the sum of increments over the tokens that its token can see, whatever the mask is."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import StaticCache

import lens_positions as lp

LEARNED = ("shared", "per_layer", "frozen")
GAPS = st.sampled_from(["before", "after"])
LOWEST = torch.finfo(torch.float32).min


@pytest.fixture
def build(tiny_llama, randomize):
    """build(source, gap): a Llama with streams whose increments are far from one."""

    def built(source="shared", gap="before", **config):
        model = tiny_llama()
        lp.attach_positions(model, lp.PositionConfig(source, gap=gap, **config))
        return randomize(model)

    return built


def positions_of(model, tokens, **given):
    """Increments and positions of the last layer."""
    stream = model.position_streams.layers[-1]
    seen = {}
    hooks = [
        stream.hook_increments.register_forward_hook(lambda m, a, out: seen.update(d=out.detach())),
        stream.hook_positions.register_forward_hook(lambda m, a, out: seen.update(p=out.detach())),
    ]
    try:
        with torch.no_grad():
            logits = model(tokens, **given).logits
    finally:
        for hook in hooks:
            hook.remove()
    return seen["d"], seen["p"], logits


def added(seen):
    """A mask of scores, as transformers takes it."""
    return torch.zeros(seen.shape).masked_fill(~seen, LOWEST)[:, None]


def ids_of(ancestors):
    """Position ids that count ancestors, as they are given with trees."""
    return (ancestors.sum(-1) - 1).clamp(min=0)


def summed(d, ancestors, gap):
    """The sum of increments over the tokens that each token sees, one by one."""
    p = torch.zeros(d.shape, dtype=torch.float64)
    for row, i in itertools.product(range(d.shape[0]), range(d.shape[1])):
        path = ancestors[row, i].nonzero().flatten().tolist()
        counted = path[1:] if gap == "before" else [j for j in path if j != i]
        p[row, i] = d[row, counted].double().sum()
    return p


@st.composite
def forests(draw, most=12):
    """Parents of tokens in a row: None begins a document; left and right padding, holes."""
    length = draw(st.integers(2, most))
    parents, real = [], []
    for i in range(length):
        kind = draw(st.sampled_from(["next", "next", "branch", "document", "padding"]))
        earlier = [j for j in range(i) if real[j]]
        real.append(kind != "padding")
        parent = None
        if kind == "next" and earlier:
            parent = earlier[-1]
        elif kind == "branch" and earlier:
            parent = draw(st.sampled_from(earlier))
        parents.append(parent)
    return parents, real


def ancestors_of(parents, real):
    """Bool [1, pos, pos]: each token's path to the root of its tree."""
    length = len(parents)
    ancestors = torch.zeros(1, length, length, dtype=torch.bool)
    for i in range(length):
        j = i if real[i] else None
        while j is not None:
            ancestors[0, i, j] = True
            j = parents[j]
    return ancestors


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    forest=forests(), gap=st.sampled_from(["before", "after"]), source=st.sampled_from(LEARNED), seed=st.integers(0, 9)
)
def test_positions_sum_over_what_a_token_sees_and_equal_those_of_its_branch_alone(forest, gap, source, seed):
    model = MODELS[source, gap]
    parents, real = forest
    ancestors = ancestors_of(parents, real)
    tokens = torch.randint(0, 61, (1, len(parents)), generator=torch.Generator().manual_seed(seed))
    ids = ids_of(ancestors)
    d, p, logits = positions_of(model, tokens, attention_mask=added(ancestors), position_ids=ids, use_cache=False)
    expected = summed(d, ancestors, gap)
    kept = torch.tensor(real)
    assert torch.allclose(p[0, kept].double(), expected[0, kept], atol=2e-6, rtol=1e-6)
    for leaf in (i for i in range(len(parents)) if real[i]):
        path = ancestors[0, leaf].nonzero().flatten()
        _, alone, own = positions_of(model, tokens[:, path])
        assert torch.allclose(p[0, path], alone[0], atol=2e-6, rtol=1e-6)
        assert torch.allclose(logits[0, leaf], own[0, -1], atol=2e-4, rtol=1e-4)


MODELS: dict = {}


@pytest.fixture(autouse=True)
def models(build):
    """One model for each source and gap, for all examples."""
    if not MODELS:
        MODELS.update({(s, gap): build(s, gap) for s in LEARNED for gap in ("before", "after")})
    return MODELS


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    real=st.lists(st.booleans(), min_size=3, max_size=12),
    gap=st.sampled_from(["before", "after"]),
    form=st.integers(0, 3),
)
def test_padding_anywhere_gives_what_the_real_tokens_alone_give(real, gap, form):
    mask = torch.tensor([real])
    if not mask.any():
        return
    model = MODELS["per_layer", gap]
    tokens = torch.arange(7, 7 + len(real))[None]
    given_mask = (mask, mask.long(), mask.float(), added((mask[:, None] & mask[:, :, None]).tril()))[form]
    ids = (mask.long().cumsum(1) - 1).clamp(min=0)
    d, p, logits = positions_of(model, tokens, attention_mask=given_mask, position_ids=ids, use_cache=False)
    _, alone, own = positions_of(model, tokens[mask][None])
    assert torch.allclose(p[mask], alone[0], atol=2e-6)
    assert torch.allclose(logits[mask], own[0], atol=2e-4)
    assert d.isfinite().all()


@pytest.mark.parametrize("source", LEARNED)
@pytest.mark.parametrize("gap", ["before", "after"])
def test_packed_documents_are_each_as_alone(build, source, gap):
    model = build(source, gap)
    lengths = (4, 1, 6)
    tokens = torch.randint(0, 61, (1, sum(lengths)))
    ids = torch.cat([torch.arange(n) for n in lengths])[None]
    _, p, logits = positions_of(model, tokens, position_ids=ids, use_cache=False)
    start = 0
    for n in lengths:
        _, alone, own = positions_of(model, tokens[:, start : start + n])
        assert torch.allclose(p[:, start : start + n], alone, atol=2e-6)
        assert torch.allclose(logits[:, start : start + n], own, atol=2e-5)
        start += n


@pytest.mark.parametrize("source", LEARNED)
def test_sliding_window_as_a_mask_keeps_the_distances_of_the_row(build, source):
    model = build(source)
    tokens = torch.randint(0, 61, (1, 11))
    window = torch.ones(1, 11, 11, dtype=torch.bool).tril() & ~torch.ones(1, 11, 11, dtype=torch.bool).tril(-4)
    d, p, _ = positions_of(model, tokens, attention_mask=added(window))
    assert torch.allclose(p.double(), torch.nn.functional.pad(d[:, 1:].double().cumsum(1), (1, 0)), atol=2e-6)


@pytest.mark.parametrize("source", LEARNED)
@pytest.mark.parametrize("gap", ["before", "after"])
def test_branches_go_on_from_a_cached_prompt(build, source, gap):
    """Speculative decoding: two drafts of one prompt in one pass, then the accepted one goes on."""
    model = build(source, gap)
    prompt, first, second = (torch.randint(0, 61, (1, n)) for n in (5, 3, 4))
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
        seen = torch.ones(1, 7, 12, dtype=torch.bool).tril(5)
        seen[:, 3:, 5:8] = False
        ids = torch.tensor([[5, 6, 7, 5, 6, 7, 8]])
        logits = model(
            torch.cat([first, second], 1), attention_mask=added(seen), position_ids=ids, past_key_values=cache
        ).logits
        for draft, part in ((first, logits[:, :3]), (second, logits[:, 3:])):
            alone = model(torch.cat([prompt, draft], 1)).logits[:, 5:]
            assert torch.allclose(part, alone, atol=2e-4)
        cache.crop(-4)  # the first draft is kept
        more = torch.randint(0, 61, (1, 2))
        on = model(more, past_key_values=cache).logits
        assert torch.allclose(on, model(torch.cat([prompt, first, more], 1)).logits[:, 8:], atol=2e-4)


@pytest.mark.parametrize("source", LEARNED)
def test_a_static_cache_with_padding_on_the_left_generates_the_same(build, source):
    model = build(source)
    tokens = torch.randint(1, 61, (2, 6))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    generate = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    dynamic = model.generate(tokens, **generate)
    static = model.generate(
        tokens, past_key_values=StaticCache(config=model.config, max_cache_len=16), disable_compile=True, **generate
    )
    assert torch.equal(dynamic, static)


def test_masks_that_say_nothing_of_tokens_are_refused_and_static_streams_take_them(build, tiny_llama):
    learned, static, plain = build("per_layer"), tiny_llama(), tiny_llama()
    lp.attach_positions(static, "static")
    tokens = torch.randint(0, 61, (1, 6))
    by_head = torch.zeros(1, 4, 6, 6).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), LOWEST)
    by_head[:, 1, 4, 2] = LOWEST
    for mask, words in (
        (by_head, "from some heads"),
        (torch.ones(1, 1, 6, 6, dtype=torch.long), "int64"),
        (torch.ones(1, 4), "expected one column for each of the 6 tokens"),
    ):
        with pytest.raises(lp.PositionsError, match=words):
            learned(tokens, attention_mask=mask)
    with torch.no_grad():
        assert torch.equal(static(tokens, attention_mask=by_head).logits, plain(tokens, attention_mask=by_head).logits)
        learned(tokens)  # the refused passes left nothing behind
