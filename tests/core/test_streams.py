"""Position streams: what an increment can reach, gradients, precision, how often the rotary work is done."""

import itertools
import weakref

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.llama import modeling_llama

import lens_positions as lp

SOURCES = ("static", "shared", "per_layer", "frozen")
EVERY_SOURCE = list(itertools.product(SOURCES, (False, True), ("before", "after")))
TOKENS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tiny_stream(tiny_llama, randomize):
    """A Llama outside any bridge with streams attached, and the streams."""

    def build(dtype=torch.float32, attention="eager", prepare=lambda model: model, llama=None, **config):
        model = prepare(tiny_llama(dtype=dtype, attention=attention, **(llama or {})))
        streams = lp.attach_positions(model, lp.PositionConfig(**config))
        return randomize(model), streams

    return build


class DoubleRotary(modeling_llama.LlamaRotaryEmbedding):
    """The model's own module computes in float32."""

    def forward(self, x, position_ids):
        angles = position_ids[..., None].double() * self.inv_freq.double()
        return torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()


class DoubleNorm(modeling_llama.LlamaRMSNorm):
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def truly_double(model):
    """A Llama without its casts to float32."""
    for module in model.modules():
        if isinstance(module, modeling_llama.LlamaRotaryEmbedding):
            module.__class__ = DoubleRotary
        elif isinstance(module, modeling_llama.LlamaRMSNorm):
            module.__class__ = DoubleNorm
    return model


def set_increments(streams, values):
    """Hold every layer's increments at values[layer]."""
    for stream, value in zip(streams.layers, values, strict=True):
        stream.hook_increments.remove_hooks()
        stream.hook_increments.add_hook(lambda _, hook, value=value: value)


def stretch_in_place(activation, hook):
    activation.mul_(3).add_(1)


def shape_of(streams, tokens=TOKENS):
    return (*tokens.shape, 2) if streams.config.per_head else tuple(tokens.shape)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("source", "per_head", "gap"), EVERY_SOURCE)
def test_increment_reaches_only_the_logits_after_it(tiny_stream, source, per_head, gap, attention):
    model, streams = tiny_stream(source=source, per_head=per_head, gap=gap, attention=attention)
    with torch.no_grad():
        before = model(TOKENS).logits
        for layer, t in itertools.product((0, 1), (1, 4, 7)):

            def stretch(increments, hook, t=t):
                increments[:, t] += 1.5
                return increments

            streams.layers[layer].hook_increments.add_hook(stretch)
            after = model(TOKENS).logits
            streams.layers[layer].hook_increments.remove_hooks()
            first = t if gap == "before" else t + 1
            assert torch.equal(after[:, :first], before[:, :first])
            assert (after[:, first:] != before[:, first:]).any(-1).all()
        assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize(("source", "per_head", "gap"), EVERY_SOURCE)
def test_the_outermost_increment_has_no_effect(tiny_stream, source, per_head, gap):
    model, streams = tiny_stream(source=source, per_head=per_head, gap=gap)
    before = model(TOKENS).logits

    def stretch(increments, hook):
        increments[:, 0 if gap == "before" else -1] = 7.25
        return increments

    for stream in streams.layers:
        stream.hook_increments.add_hook(stretch)
    assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.slow
@pytest.mark.parametrize("per_head", [False, True])
def test_positions_are_the_running_sum_of_increments(tiny_model, per_head):
    for source, gap in itertools.product(("shared", "per_layer", "frozen"), ("before", "after")):
        model = tiny_model(source=source, per_head=per_head, gap=gap)
        increments, positions = model.increments(TOKENS).double(), model.positions(TOKENS)
        assert (positions[:, :, 0] == 0).all()
        steps = increments[:, :, 1:] if gap == "before" else increments[:, :, :-1]
        assert (positions[:, :, 1:] - steps.cumsum(2)).abs().max() < 5e-6


def test_constant_on_all_positions_changes_no_pattern(tiny_model):
    model = tiny_model(source="per_layer")
    patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in range(2)]
    _, plain = model.run_with_cache(TOKENS, names_filter=patterns)
    for constant in (0.5, 37.3, -100.0):
        shift = [(f"blocks.{layer}.attn.hook_positions", lambda p, hook, c=constant: p + c) for layer in range(2)]
        with model.hooks(fwd_hooks=shift):
            _, shifted = model.run_with_cache(TOKENS, names_filter=patterns)

        # A position near 100 is rounded by up to 4e-6, and the angle of the fastest component with it.
        assert max((shifted[name] - plain[name]).abs().max() for name in patterns) < 4e-5


@pytest.mark.parametrize("gap", ["before", "after"])
@pytest.mark.parametrize("per_head", [False, True])
def test_gradients_of_a_logit_agree_with_finite_differences(tiny_stream, per_head, gap):
    model, streams = tiny_stream(torch.float64, "sdpa", truly_double, source="static", per_head=per_head, gap=gap)
    model.requires_grad_(False)
    values = (0.2 + 2 * torch.rand(2, *shape_of(streams)[1:], dtype=torch.float64)).requires_grad_()

    def logits(values):  # one row of the batch for each set of increments
        set_increments(streams, values.transpose(0, 1))
        return model(TOKENS[:1].expand(len(values), -1)).logits[:, -1, 7]

    (gradient,) = torch.autograd.grad(logits(values[None]), values)
    nudges = 1e-5 * torch.eye(values.numel(), dtype=torch.float64).unflatten(1, values.shape)
    with torch.no_grad():
        differences = (logits(values + nudges) - logits(values - nudges)).view_as(values) / 2e-5
    print("largest difference", (gradient - differences).abs().max(), "of", gradient.abs().max())
    assert gradient.abs().max() > 0.01
    assert (gradient - differences).abs().max() < 1e-8


def test_second_derivatives_agree_with_finite_differences(tiny_stream):
    model, streams = tiny_stream(torch.float64, "sdpa", truly_double, source="static", llama={"num_hidden_layers": 1})
    tokens = TOKENS[:1, :4]
    values = 0.2 + 2 * torch.rand(1, 1, 4, dtype=torch.float64)

    def logit(values):
        set_increments(streams, values)
        return model(tokens).logits[0, -1, :2]

    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(logit, values.requires_grad_(), atol=1e-6)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3, 4, 5], "factor": 4.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_gradients_follow_scaled_rope(tiny_stream, rope):
    rope |= {"rope_theta": 10_000.0, "original_max_position_embeddings": 8}
    model, streams = tiny_stream(source="static", llama={"rope_parameters": rope, "max_position_embeddings": 8})
    values = (1 + torch.rand(2, 2, 9)).requires_grad_()
    values.data[..., -1] = 1  # dynamic RoPE follows the last position, which stays where it is

    def logit(values):
        set_increments(streams, values)
        return model(TOKENS).logits[0, -1, 7]

    (gradient,) = torch.autograd.grad(logit(values), values)
    with torch.no_grad():
        along = torch.zeros_like(values)
        along[:, :, 2], along[:, :, 5] = 1, -1
        differences = (logit(values + 1e-2 * along) - logit(values - 1e-2 * along)) / 2e-2
    assert (gradient * along).sum().item() == pytest.approx(differences.item(), rel=0.02, abs=2e-3)


@pytest.mark.parametrize(("source", "per_head", "gap"), [e for e in EVERY_SOURCE if e[0] in ("shared", "per_layer")])
def test_gradients_reach_the_sources_in_eager_and_under_autocast(tiny_stream, source, per_head, gap):
    model, streams = tiny_stream(source=source, per_head=per_head, gap=gap)
    gradients = []
    for autocast in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(TOKENS, labels=TOKENS).loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in streams.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in streams.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_gradients_under_compile_equal_those_in_eager(tiny_stream):
    model, streams = tiny_stream(source="per_layer", llama={"num_hidden_layers": 1})
    found = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        run(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in streams.parameters()]))
    assert found[0].abs().max() > 1e-3
    assert torch.allclose(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("per_head", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(tiny_stream, source, per_head):
    model, _ = tiny_stream(source=source, per_head=per_head)
    model.train()

    def gradients():
        model.zero_grad()
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.allclose(gradients(), plain, rtol=1e-5, atol=1e-6)
    model.gradient_checkpointing_disable()
    assert torch.equal(gradients(), plain)


@pytest.mark.parametrize("source", ["shared", "per_layer"])
def test_checkpointed_passes_do_not_meet_in_one_backward_pass(tiny_stream, source):
    model, streams = tiny_stream(source=source)
    model.train()
    summed = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        losses = [model(tokens, labels=tokens, use_cache=False).loss for tokens in (TOKENS, TOKENS.flip(1))]
        sum(losses).backward()
        summed.append(torch.cat([p.grad.flatten() for p in streams.parameters()]))
    assert summed[0].abs().max() > 1e-3
    assert torch.allclose(*summed, rtol=1e-5, atol=1e-7)


def test_gradient_checkpointing_that_would_lose_gradients_is_refused(tiny_stream):
    model, _ = tiny_stream(source="per_layer")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(lp.PositionsError, match="use_reentrant"):
        model(TOKENS, labels=TOKENS, use_cache=False)


@pytest.mark.parametrize(("source", "per_head"), itertools.product(SOURCES, (False, True)))
def test_positions_are_float32_in_bfloat16_and_under_autocast(tiny_stream, source, per_head):
    long = torch.randint(0, 61, (1, 400))
    model, streams = tiny_stream(source=source, per_head=per_head)
    for stream in streams.layers:
        stream.hook_positions.add_hook(lambda p, hook: seen.append(p))
    with torch.no_grad():
        seen = []
        with torch.autocast("cpu", torch.bfloat16):
            model(long)
        model.to(torch.bfloat16)(long)
    assert {p.dtype for p in seen} == {torch.float32}
    if source == "static":
        assert all((p.diff(dim=1) == 1).all() for p in seen)
    else:
        assert all(p.diff(dim=1)[:, 300:].unique().numel() > 30 for p in seen)


@pytest.mark.slow
def test_a_long_running_sum_keeps_its_precision(tiny_stream):
    model, streams = tiny_stream(source="static", llama={"max_position_embeddings": 4096})
    set_increments(streams, torch.full((2, 1, 4000), 0.1))
    streams.layers[1].hook_positions.add_hook(lambda p, hook: seen.append(p[0]))
    seen = []
    with torch.no_grad():
        model(torch.zeros(1, 4000, dtype=torch.long), logits_to_keep=1)
    exact = torch.arange(4000) * torch.tensor(0.1).double()
    assert (seen[0] - exact).abs().max() < 2e-5


class Counter:
    def __init__(self, module):
        self.calls, self.forward = 0, module.forward
        module.forward = self

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.forward(*args, **kwargs)

    def during(self, model, tokens, **given):
        before = self.calls
        with torch.no_grad():
            model(tokens, **given)
        return self.calls - before


@pytest.mark.parametrize("per_head", [False, True])
def test_static_shared_and_frozen_do_the_rotary_work_once_for_all_layers(tiny_stream, per_head):
    """Once is the model's own call; another source adds its own."""
    expected = {"static": 1, "shared": 2, "frozen": 2, "per_layer": 1 + 5}
    for source, calls in expected.items():
        model, streams = tiny_stream(source=source, per_head=per_head, llama={"num_hidden_layers": 5})
        counter = Counter(model.model.rotary_emb)
        assert counter.during(model, TOKENS) == calls
        prompt = model(TOKENS[:, :5], use_cache=True).past_key_values
        assert counter.during(model, TOKENS[:, 5:7], past_key_values=prompt) == calls
        prompt.reorder_cache(torch.tensor([1, 0]))
        assert counter.during(model, TOKENS[:, 7:], past_key_values=prompt) == calls
        with streams.record():  # looking on is no edit
            assert counter.during(model, TOKENS) == calls


@pytest.mark.parametrize("hook", ["hook_increments", "hook_positions"])
@pytest.mark.parametrize("source", SOURCES)
def test_edit_in_place_stays_in_its_layer_and_its_pass(tiny_stream, source, hook):
    model, streams = tiny_stream(source=source)
    seen = []
    getattr(streams.layers[1], hook).add_hook(lambda a, hook: seen.append(a.clone()))
    if source == "per_layer":  # let layer 1 read the same residual stream whatever layer 0 does
        model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    model(TOKENS)
    getattr(streams.layers[0], hook).add_hook(stretch_in_place)
    edited = model(TOKENS).logits
    getattr(streams.layers[0], hook).remove_hooks()
    model(TOKENS)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    if source != "per_layer":
        assert not torch.equal(edited, model(TOKENS).logits)


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_edit_in_place_counts_without_gradients(tiny_stream, inference):
    model, streams = tiny_stream(source="static")
    with inference():
        plain = model(TOKENS).logits
        streams.layers[0].hook_increments.add_hook(lambda a, hook: None)
        assert torch.equal(model(TOKENS).logits, plain)
        streams.layers[0].hook_increments.add_hook(stretch_in_place)
        assert not torch.equal(model(TOKENS).logits, plain)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda a: a * float("nan"), "NaN"),
        (lambda a: a / 0, "infinite"),
        (lambda a: a[:, :-1], r"\(2, 8\).*\(2, 9\)"),
        (lambda a: a[..., None], r"\(2, 9, 1\).*\(2, 9\)"),
        (lambda a: a[:1], r"\(1, 9\).*\(2, 9\)"),
        (lambda a: a.mean(), r"\(\).*\(2, 9\)"),
        (lambda a: a.tolist(), "list"),
        (lambda a: a.fill_(float("inf")), "infinite"),
    ],
    ids=["nan", "inf", "short", "axis", "row", "scalar", "list", "in-place"],
)
def test_what_a_hook_returns_is_checked(tiny_stream, source, wrong, words):
    model, streams = tiny_stream(source=source)
    hooks = [streams.layers[1].hook_increments, streams.layers[0].hook_positions]
    for hook in hooks + ([streams.hook_increments] if source in ("shared", "frozen") else []):
        hook.add_hook(lambda a, hook: wrong(a))
        with pytest.raises(lp.PositionsError, match=words), torch.no_grad():
            model(TOKENS)
        hook.remove_hooks()
    model(TOKENS)


@pytest.mark.slow
def test_padding_on_the_left_moves_nothing(tiny_stream):
    for source, per_head, gap in EVERY_SOURCE:
        model, _ = tiny_stream(source=source, per_head=per_head, gap=gap)
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), TOKENS], dim=1)
        mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(TOKENS)], dim=1)
        with torch.no_grad():
            alone = model(TOKENS).logits
            behind = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 3:]
            assert (alone - behind).abs().max() < 2e-5, (source, per_head, gap)
            behind = model(padded, attention_mask=mask).logits[:, 3:]
            assert (alone - behind).abs().max() < 5e-5, (source, per_head, gap)


@pytest.mark.parametrize(("source", "per_head"), itertools.product(SOURCES, (False, True)))
def test_nothing_of_a_pass_stays_behind(tiny_stream, source, per_head):
    model, streams = tiny_stream(source=source, per_head=per_head)
    kept = []
    streams.layers[1].hook_positions.add_hook(lambda p, hook: kept.append(weakref.ref(p)))
    model.model.layers[1].register_forward_pre_hook(lambda m, args: kept.append(weakref.ref(args[0])))
    loss = model(TOKENS, labels=TOKENS, use_cache=False).loss
    loss.backward()
    del loss
    assert [ref() for ref in kept] == [None, None]
