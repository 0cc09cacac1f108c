"""Attribution in pieces: the same numbers, hook functions that run once, and memory of what enters a block alone."""

import functools
import itertools
import json
import threading
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import families
import pytest
import torch
from tiny_models import drawn_weights, in_threads
from torch.profiler import ProfilerActivity, profile

import lens_positions as lp
from lens_positions import causal
from lens_positions.causal.pieces import Run, in_pieces
from lens_positions.core.own_thread import own_hooks
from lens_positions.measure.partial_forward import Replay

pytestmark = pytest.mark.filterwarnings("ignore:the integrated attribution sums to")  # two points are too few
TOKENS = torch.randint(0, 256, (1, 9), generator=torch.Generator().manual_seed(1))
LOSS = causal.loss(TOKENS)
EVERY_SOURCE = list(itertools.product(("static", "shared", "per_layer", "frozen"), (False, True), ("before", "after")))
METHODS = ("gradient", "integrated")
SITES = (
    *("hook_resid_pre", "hook_resid_mid", "hook_mlp_out", "hook_resid_post", "attn.hook_attn_scores"),
    *("attn.hook_pattern", "attn.hook_z", "attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_v"),
    *("attn.hook_increments", "attn.hook_positions", "attn.hook_rotation"),
)


@functools.cache
def random_model(source="per_layer", per_head=False, gap="before", layers=3):
    config = lp.PositionModelConfig(
        d_model=32, n_layers=layers, n_heads=4, d_mlp=48, n_ctx=512,
        positions=lp.PositionConfig(source=source, per_head=per_head, gap=gap),
    )  # fmt: skip
    model = drawn_weights(lp.HookedPositionTransformer.from_config(config), 0)
    return model.to(torch.float64, print_details=False)


@pytest.fixture
def both(monkeypatch):
    """An attribution as a whole and in pieces; the blocks that ran again are counted."""
    again = []
    call = Run.__call__

    def counted(run, *args, **kwargs):
        again.append(run._returned is not None)
        return call(run, *args, **kwargs)

    def attributions(attributed):
        module = import_module("lens_positions.causal.attribution")
        found = []
        for pieces in (lambda _model: nullcontext(), in_pieces):
            monkeypatch.setattr(module, "in_pieces", pieces)
            monkeypatch.setattr(Run, "__call__", counted)
            again.clear()
            found.append(attributed())
        return *found, sum(again)

    monkeypatch.setattr(import_module("lens_positions.causal.attribution"), "STEPS", (2,))
    return attributions


def same(whole, pieces):
    """To rounding in float64. A block runs the same operations again, but gradients may be added in another order."""
    assert whole.abs().max() > 1e-6
    torch.testing.assert_close(pieces, whole, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("source", "per_head", "gap"), EVERY_SOURCE)
def test_pieces_change_no_attribution(both, source, per_head, gap, method):
    model = random_model(source, per_head, gap)
    whole, pieces, again = both(lambda: causal.attribution(model, TOKENS, LOSS, method, baseline=1.3))
    same(whole, pieces)
    assert again >= 3


@pytest.mark.parametrize(("per_head", "method"), [(False, "gradient"), (True, "gradient"), (False, "integrated")])
@pytest.mark.parametrize("site", SITES)
def test_hook_functions_run_once_and_act(both, site, per_head, method):
    """One that scales its activation by numbers drawn anew in each call: a second call would give other gradients."""
    model = random_model(per_head=per_head)
    calls = []

    def draws(values, hook):
        calls.append(hook.name)
        return values * (1 + 0.1 * torch.rand(values.shape, dtype=values.dtype))

    def attributed():
        torch.manual_seed(0)
        calls.clear()
        with model.hooks(fwd_hooks=[(f"blocks.{layer}.{site}", draws) for layer in range(3)]):
            return causal.attribution(model, TOKENS, LOSS, method, baseline=1.3), list(calls)

    (whole, before), (pieces, after), again = both(attributed)
    same(whole, pieces)
    assert before == after
    assert again >= 3
    if method == "gradient":
        assert len(after) == 3
    plain = causal.attribution(model, TOKENS, LOSS, method, baseline=1.3)
    assert site == "attn.hook_increments" or not torch.allclose(pieces, plain)


def test_hooks_that_only_read_or_write_in_place(both):
    model = random_model()
    read = []

    def reads(values, hook):
        read.append(values.detach().sum())

    def writes(values, hook):
        values[:, 2] *= 0.5

    def attributed():
        read.clear()
        hooks = [(f"blocks.{layer}.attn.hook_pattern", reads) for layer in range(3)]
        with model.hooks(fwd_hooks=[*hooks, ("blocks.1.hook_mlp_out", writes), ("blocks.0.attn.hook_rot_q", writes)]):
            return causal.attribution(model, TOKENS, LOSS), torch.stack(read)

    (whole, before), (pieces, after), again = both(attributed)
    same(whole, pieces)
    assert torch.equal(before, after)
    assert len(after) == again == 3


def test_gradients_flow_through_what_hooks_carry_from_block_to_block(both):
    model = random_model()
    carried = {}

    def takes(values, hook):
        carried["residual"] = values

    def puts(values, hook):
        return values + carried["residual"].tanh()

    def attributed():
        with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", takes), ("blocks.2.hook_mlp_out", puts)]):
            return causal.attribution(model, TOKENS, LOSS)

    whole, pieces, _ = both(attributed)
    same(whole, pieces)


def test_a_model_that_was_recorded_before(both):
    """Recording leaves hooks of transformers on a model, which run again with their block."""
    model = random_model()
    model.run_with_cache(TOKENS)
    whole, pieces, again = both(lambda: causal.attribution(model, TOKENS, LOSS))
    same(whole, pieces)
    assert again == 3


def test_backward_hooks_and_interventions_beside_it(both):
    model = random_model()
    gradients = []

    def attributed():
        gradients.clear()
        look = [(f"blocks.{i}.hook_mlp_out", lambda g, hook: gradients.append(g.clone())) for i in range(3)]
        with model.hooks(fwd_hooks=lp.ablate(model, to=1.2, layers=[1]) + lp.add_gap(model, 4), bwd_hooks=look):
            return causal.attribution(model, TOKENS, LOSS), torch.stack(gradients)

    (whole, before), (pieces, after), _ = both(attributed)
    same(whole, pieces)
    same(before, after)
    assert len(after) == 3


def test_a_hook_that_runs_the_model(both):
    model = random_model()
    inside = []

    def runs(values, hook):
        if not inside:
            inside.append(None)
            inside[0] = model(TOKENS[:, :4])
            return values + inside[0].mean()
        return values

    def attributed():
        inside.clear()
        with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", runs)]):
            return causal.attribution(model, TOKENS, LOSS)

    whole, pieces, _ = both(attributed)
    same(whole, pieces)


def test_a_block_with_a_hook_of_torchs_own_stays_whole(both):
    model = random_model()
    calls = []

    def attributed():
        calls.clear()
        handle = model.blocks[1].mlp.register_forward_hook(lambda module, given, output: calls.append(1))
        try:
            return causal.attribution(model, TOKENS, LOSS)
        finally:
            handle.remove()

    whole, pieces, again = both(attributed)
    same(whole, pieces)
    assert len(calls) == 1
    assert again == 2


def test_the_model_is_left_as_it_was():
    model = random_model()
    kept = []
    with model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", lambda values, hook: kept.append(1))]):
        before = [
            (dict(vars(block)), [list(m._forward_hooks.items()) for m in block.modules()]) for block in model.blocks
        ]
        with pytest.raises(lp.PositionsError, match="the metric has no gradient"):
            causal.attribution(model, TOKENS, lambda logits: LOSS(logits.detach()))
        causal.attribution(model, TOKENS, LOSS)
        after = [
            (dict(vars(block)), [list(m._forward_hooks.items()) for m in block.modules()]) for block in model.blocks
        ]
    assert [hooks for _, hooks in before] == [hooks for _, hooks in after]
    assert all("forward" not in attributes for attributes, _ in after)


def test_another_thread_runs_the_model_as_it_is():
    model = random_model()
    with in_pieces(model), torch.enable_grad():
        graphs = []

        def work():
            graphs.append(torch.autograd.grad(model(TOKENS).sum(), model.embed.weight)[0])

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    (alone,) = torch.autograd.grad(model(TOKENS).sum(), model.embed.weight)
    torch.testing.assert_close(graphs[0], alone)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["static", "per_layer"])
def test_four_threads_attribute_with_edits_of_their_own_to_the_bit(source):
    """Gradients of one model at once, beside passes with edits and parts of passes."""
    model = random_model(source)
    prompts = [torch.randint(0, 256, (1, 6 + i), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    replays = [Replay(model, prompt) for prompt in prompts]
    seen = []
    look = [("blocks.1.hook_mlp_out", lambda values, hook: seen.append(threading.get_ident()))]

    def work(i):
        prompt, edit = prompts[i % 4], lp.add_gap(model, before=2 + i % 3, by=1.0 + i % 4, layers=i % 3)
        if i % 5 == 3:
            return model.run_with_hooks(prompt, fwd_hooks=edit)
        if i % 5 == 4:
            return replays[i % 4].run(edit, {i % 3: 1}, 2)
        with own_hooks(model, edit):
            return causal.attribution(model, prompt, causal.loss(prompt))

    alone = [work(i).detach() for i in range(60)]
    with model.hooks(fwd_hooks=look):
        found = in_threads(work, 240, 4)
    assert [i for i in range(240) if not torch.equal(found[i], alone[i % 60])] == []
    assert not torch.equal(alone[0], alone[20])  # of one prompt with different edits

    # The function of every thread ran once in each pass with gradients, and once in every other that meets it.
    assert len(seen) == 240 - sum(i % 5 == 4 and i % 3 == 2 for i in range(240))
    assert not any(point._forward_hooks for point in model.hook_dict.values())
    assert not any("forward" in vars(block) for block in model.blocks)


@pytest.mark.filterwarnings("ignore")
def test_a_looped_model_calls_a_layer_several_times():
    model = families.plain_bridge(families.build("HrmTextForCausalLM").double())
    families.randomize(lp.attach_positions(model, lp.PositionConfig(source="per_layer")))
    tokens = families.TOKENS[:1]
    slopes = causal.attribution(model, tokens, causal.loss())
    longer, shorter = (causal.gap_sweep(model, tokens, causal.loss(), by=by) for by in (1e-3, -1e-3))
    torch.testing.assert_close(slopes, (longer - shorter) / 2e-3, atol=1e-3, rtol=0)
    assert slopes.abs().max() > 0.02


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", ["static", "per_layer"])
@pytest.mark.parametrize(
    "name",
    ["GPTJForCausalLM", "RecurrentGemmaForCausalLM", "Gemma3ForCausalLM", "GPTNeoXForCausalLM", "MixtralForCausalLM"],
)
def test_other_ways_to_rotate(both, name, source):
    """A table by position id, a rotary module inside the attention, two bases, part of a head, experts."""
    model = families.plain_bridge(families.build(name))
    streams = lp.attach_positions(model, lp.PositionConfig(source=source))
    if source == "per_layer":
        families.randomize(streams)
    whole, pieces, again = both(lambda: causal.attribution(model, families.TOKENS[:1], causal.loss()))
    torch.testing.assert_close(pieces, whole, atol=1e-7, rtol=1e-5)  # float32
    assert again > 0


def held(layers, length, pieces):
    """Bytes that a forward pass leaves behind for the backward pass, its logits included."""
    model = random_model("static", layers=layers)
    tokens = torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(0))
    model(tokens)  # what a first pass makes once
    with (
        in_pieces(model) if pieces else nullcontext(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p,
    ):
        logits = model(tokens, use_cache=False)
        assert logits.requires_grad
    return sum(event.self_cpu_memory_usage for event in p.key_averages())


def a_layer(length, pieces):
    return (held(6, length, pieces) - held(3, length, pieces)) / 3


@pytest.mark.slow
def test_a_layer_keeps_what_enters_it_and_no_pattern():
    width = 32 * 8  # bytes of a token's residual stream in float64
    for length in (64, 256):
        assert a_layer(length, pieces=True) <= 3 * length * width
    assert a_layer(256, pieces=False) > 4 * 256 * 256 * 8  # a pattern of four heads, and more
    assert held(6, 256, pieces=False) > 2 * held(6, 256, pieces=True)


def test_the_measured_memory_is_half_and_the_time_a_third_more_at_most():
    path = Path(__file__).parents[2] / "benchmarks" / "attribution_memory.json"
    found = json.loads(path.read_text())
    most = {(row["tokens"], row["how"]): row["gb_at_most"] for row in found["memory"] if row["method"] == "gradient"}
    assert most[2048, "pieces"] < most[2048, "whole"] / 2
    assert all(row["ratio"] < 4 / 3 for row in found["time"])
    said = (path.parents[1] / "docs" / "measurements.md").read_text("utf-8")
    for length in (512, 1024, 2048):
        assert f"| {length:,} | {most[length, 'whole']:.2f} GB | {most[length, 'pieces']:.2f} GB |" in said
