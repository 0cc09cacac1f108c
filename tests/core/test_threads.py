"""Threads: what a forward pass knows is its own."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import lens_positions as lp


def in_threads(work, count, threads):
    """The results of `work(i)` for i below `count`, from several threads that begin together."""
    ready = threading.Barrier(threads)

    def waits(i):
        if i < threads:
            ready.wait()
        with torch.no_grad():
            return work(i)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(waits, range(count)))


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
