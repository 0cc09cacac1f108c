"""Threads: what a forward pass knows is its own."""

import pytest
import torch
from tiny_models import in_threads

import lens_positions as lp
from lens_positions.measure.partial_forward import Replay


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 8])
@pytest.mark.parametrize("source", ["static", "shared", "per_layer", "frozen"])
def test_passes_in_threads_give_what_they_give_alone_to_the_bit(tiny_llama, randomize, source, threads):
    model = tiny_llama()
    lp.attach_positions(model, lp.PositionConfig(source))
    randomize(model)
    inputs = [torch.randint(0, 61, (1 + i % 3, 5 + 7 * (i % 5))) for i in range(16)]
    with torch.no_grad():
        alone = [model(x).logits for x in inputs]
    found = in_threads(lambda i: model(inputs[i % 16]).logits, 160, threads)
    assert sum(not torch.equal(found[i], alone[i % 16]) for i in range(160)) == 0


@pytest.mark.slow
def test_generation_in_threads_keeps_its_caches_apart(tiny_llama, randomize):
    model = tiny_llama()
    lp.attach_positions(model, lp.PositionConfig("per_layer"))
    randomize(model)
    prompts = [torch.randint(1, 61, (1, 3 + i)) for i in range(6)]
    how = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    alone = [model.generate(x, attention_mask=torch.ones_like(x), **how) for x in prompts]
    found = in_threads(
        lambda i: model.generate(prompts[i % 6], attention_mask=torch.ones_like(prompts[i % 6]), **how), 24, 4
    )
    assert all(torch.equal(found[i], alone[i % 6]) for i in range(24))


@pytest.mark.slow
def test_interventions_in_threads_see_the_tokens_of_their_own_pass(tiny_model):
    """One intervention on the model, passes of different lengths: what a hook knows of tokens is its pass's own."""
    model = tiny_model(source="per_layer")
    inputs = [torch.randint(0, 61, (1, 4 + 5 * i)) for i in range(4)]
    with model.hooks(fwd_hooks=lp.ablate(model, to="shuffle")), torch.no_grad():
        alone = [model(x) for x in inputs]
        found = in_threads(lambda i: model(inputs[i % 4]), 80, 4)
    assert sum(not torch.equal(found[i], alone[i % 4]) for i in range(80)) == 0


def edits_of(model, number):
    """The edits of one thread, of another kind and place than those of the others."""
    kind, layer = number % 4, number % 2
    if kind == 0:
        return lp.add_gap(model, before=1 + number // 4, by=0.5 + number, layers=layer)
    if kind == 1:
        return lp.ablate(model, to=0.25 * number, layers=layer)
    if kind == 2:
        return lp.scale(model, 1.5 + number, positions=[2, 4])
    return lp.ablate(model, to=3.0, layers=layer, positions=[3]) + lp.add_gap(model, before=5, by=-0.5 * number)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "passes"), [("static", 2000), ("per_layer", 2000), ("shared", 240), ("frozen", 240)]
)
def test_eight_threads_with_edits_of_their_own_give_what_each_gives_alone_to_the_bit(tiny_model, source, passes):
    """Thousands of passes of one model: of every eight, one has no edits and one fills a cache."""
    model = tiny_model(source=source)
    inputs = [torch.randint(0, 61, (1 + i % 2, 6 + 5 * (i % 3))) for i in range(24)]
    names = ["blocks.1.attn.hook_positions", "blocks.1.attn.hook_pattern", "blocks.1.hook_resid_post"]

    def run(i):
        number, tokens = i % 8, inputs[i % 24]
        if number == 6:
            return (model(tokens),)
        if number == 7:
            logits, cache = model.run_with_cache(tokens, names_filter=names, fwd_hooks=edits_of(model, number))
            return (logits, *(cache[name] for name in names))
        return (model.run_with_hooks(tokens, fwd_hooks=edits_of(model, number)),)

    with torch.no_grad():
        alone = [run(i) for i in range(24)]
    assert not any(torch.equal(alone[i][0], alone[i + 6][0]) for i in (0, 1))
    found = in_threads(run, passes, 8)
    wrong = [i for i in range(passes) if not all(map(torch.equal, found[i], alone[i % 24]))]
    assert wrong == []
    assert not any(point.fwd_hooks or point._forward_hooks for point in model.hook_dict.values())


@pytest.mark.slow
@pytest.mark.parametrize("source", ["static", "per_layer"])
def test_partial_passes_in_threads_give_what_they_give_alone_to_the_bit(tiny_model, source):
    model = tiny_model(source=source)
    prompts = [torch.randint(0, 61, (1, 8 + 3 * i)) for i in range(8)]
    replays = [Replay(model, prompt) for prompt in prompts]
    assert all(replay.exact for replay in replays)

    def run(i):
        number = i % 8
        hooks = lp.add_gap(model, before=2 + number % 3, by=1.0 + number, layers=number % 2)
        return replays[number].run(hooks, {number % 2: 1}, 2 + number % 3)

    alone = [run(i) for i in range(8)]
    found = in_threads(run, 400, 8)
    assert [i for i in range(400) if not torch.equal(found[i], alone[i % 8])] == []
    assert not any("forward" in vars(block) for block in model.blocks)


def test_hooks_of_the_model_act_in_every_thread_and_hooks_of_a_call_in_its_own(tiny_model):
    model = tiny_model(source="static")
    tokens = torch.randint(0, 61, (1, 9))
    with torch.no_grad():
        plain = model(tokens)
        edited = model.run_with_hooks(tokens, fwd_hooks=lp.add_gap(model, before=3))
        with model.hooks(fwd_hooks=lp.add_gap(model, before=3)):
            assert torch.equal(in_threads(lambda i: model(tokens), 2, 2)[1], edited)
        meanwhile = []

        def ask_another_thread(increments, hook):
            if not meanwhile:
                meanwhile.append(None)
                meanwhile.extend(in_threads(lambda i: model(tokens), 1, 1))

        hooks = [*lp.add_gap(model, before=3), ("blocks.0.attn.hook_increments", ask_another_thread)]
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=hooks), edited)
    assert torch.equal(meanwhile[1], plain)


def test_a_pass_inside_a_hook_of_another_pass_changes_neither(tiny_model):
    model = tiny_model(source="per_layer")
    outer, inner = torch.randint(0, 61, (2, 9)), torch.randint(0, 61, (1, 5))
    with torch.no_grad():
        expected, expected_inner = model(outer), model(inner)
        found = []

        def look(increments, hook):
            if not found:
                found.append(None)
                found.append(model(inner))

        got = model.run_with_hooks(outer, fwd_hooks=[("blocks.1.attn.hook_increments", look)])
    assert torch.equal(got, expected)
    assert torch.equal(found[1], expected_inner)
