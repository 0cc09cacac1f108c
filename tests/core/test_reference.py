"""The whole forward pass against a second one: from the formulas, in plain torch, float64, without shared code."""

import math

import pytest
import torch

import lens_positions as lp

N_LAYERS, N_HEADS, N_KV, D_HEAD, THETA, EPS = 3, 4, 2, 8, 10_000.0, 1e-6
TOKENS = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(2))


def norm(x, weight):
    return weight * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def positions_of(increments, gap):
    """increments [batch pos head] -> positions, summed token by token."""
    positions = torch.zeros_like(increments)
    for t in range(1, increments.shape[1]):
        step = increments[:, t] if gap == "before" else increments[:, t - 1]
        positions[:, t] = positions[:, t - 1] + step
    return positions


def rotated(x, positions):
    """x [batch head pos d_head], positions [batch head pos]: component i turns with component i + d_head / 2."""
    half = D_HEAD // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = positions * THETA ** (-2 * i / D_HEAD)
        a, b = x[..., i], x[..., i + half]
        out[..., i] = a * angle.cos() - b * angle.sin()
        out[..., i + half] = b * angle.cos() + a * angle.sin()
    return out


def reference_source(weights, prefix, x, activation, max_increment):
    """Increments of a learned source from its weights."""
    if f"{prefix}.norm.weight" in weights:
        x = norm(x, weights[f"{prefix}.norm.weight"])
    x = x @ weights[f"{prefix}.hidden.weight"].T + weights[f"{prefix}.hidden.bias"]
    x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
    x = x @ weights[f"{prefix}.out.weight"].T + weights[f"{prefix}.out.bias"]
    if activation == "sigmoid":
        return max_increment / (1 + (max_increment - 1) * torch.exp(-x))
    return torch.log(1 + (math.e - 1) * x.exp()) if activation == "softplus" else 1 + x


def reference_logits(weights, tokens, increments_of, gap):
    """increments_of(layer, embedding, residual) gives [batch pos] or [batch pos kv_head]."""
    weights = {name: w.double() for name, w in weights.items()}
    embedding = residual = weights["model.embed_tokens.weight"][tokens]
    batch, length, _ = residual.shape
    for layer in range(sum(name.endswith("input_layernorm.weight") for name in weights)):
        w = {k.removeprefix(f"model.layers.{layer}."): v for k, v in weights.items() if f"layers.{layer}." in k}
        n_kv = len(w["self_attn.k_proj.weight"]) // D_HEAD
        increments = increments_of(layer, embedding, residual).double()
        if increments.ndim == 2:
            increments = increments[:, :, None].expand(-1, -1, n_kv)
        positions = positions_of(increments, gap).transpose(1, 2)

        x = norm(residual, w["input_layernorm.weight"])
        q, k, v = (
            (x @ w[f"self_attn.{name}_proj.weight"].T).view(batch, length, -1, D_HEAD).transpose(1, 2) for name in "qkv"
        )
        group = N_HEADS // n_kv
        k = rotated(k, positions).repeat_interleave(group, 1)
        q = rotated(q, positions.repeat_interleave(group, 1))
        scores = q @ k.transpose(2, 3) / math.sqrt(D_HEAD)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        z = scores.softmax(-1) @ v.repeat_interleave(group, 1)
        residual = residual + z.transpose(1, 2).flatten(2) @ w["self_attn.o_proj.weight"].T

        x = norm(residual, w["post_attention_layernorm.weight"])
        gate, up = x @ w["mlp.gate_proj.weight"].T, x @ w["mlp.up_proj.weight"].T
        residual = residual + (gate * torch.sigmoid(gate) * up) @ w["mlp.down_proj.weight"].T
    return norm(residual, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def weights_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def llama(tiny_llama):
    return lambda: tiny_llama(num_hidden_layers=N_LAYERS, rms_norm_eps=EPS, initializer_range=0.2)


def logits_and_largest_error(model, tokens, expected):
    with torch.no_grad():
        logits = model(tokens)
    logits = getattr(logits, "logits", logits)
    assert expected.std() > 0.3
    return (logits - expected).abs().max().item()


@pytest.mark.parametrize("bridged", [False, True])
@pytest.mark.parametrize("gap", ["before", "after"])
@pytest.mark.parametrize("per_head", [False, True])
def test_given_increments_agree_with_the_reference(llama, per_head, gap, bridged):
    """Another tensor for each layer, set by hooks."""
    model = llama()
    weights = weights_of(model)
    given = 0.1 + 3 * torch.rand(N_LAYERS, 2, 12, *([N_KV] if per_head else []))
    config = lp.PositionConfig(source="static", per_head=per_head, gap=gap)
    expected = reference_logits(weights, TOKENS, lambda layer, *_: given[layer], gap)
    standard = reference_logits(weights, TOKENS, lambda layer, *_: torch.ones_like(given[layer]), gap)
    assert (expected - standard).abs().max() > 0.1
    if bridged:
        hooked = lp.HookedPositionTransformer.from_transformers(model, positions=config)
        hooks = [(f"blocks.{i}.attn.hook_increments", lambda _, hook, i=i: given[i]) for i in range(N_LAYERS)]

        def run(tokens):
            return hooked.run_with_hooks(tokens, fwd_hooks=hooks)
    else:
        run, streams = model, lp.attach_positions(model, config)
        for stream, value in zip(streams.layers, given, strict=True):
            stream.hook_increments.add_hook(lambda _, hook, value=value: value)
    error = logits_and_largest_error(run, TOKENS, expected)
    print("largest error", error)
    assert error < 1e-5


@pytest.mark.parametrize("per_head", [False, True])
def test_unmodified_model_agrees_with_the_reference(llama, per_head):
    model = llama()
    expected = reference_logits(weights_of(model), TOKENS, lambda *_: torch.ones(2, 12), "before")
    assert logits_and_largest_error(model, TOKENS, expected) < 1e-5
    lp.attach_positions(model, lp.PositionConfig(source="static", per_head=per_head))
    assert logits_and_largest_error(model, TOKENS, expected) < 1e-5


@pytest.mark.parametrize("bridged", [False, True])
@pytest.mark.parametrize("gap", ["before", "after"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("source", ["shared", "per_layer", "frozen"])
def test_sources_agree_with_the_reference(llama, source, per_head, gap, bridged):
    model = llama()
    activation = {"shared": "softplus", "per_layer": "sigmoid", "frozen": "none"}[source]
    config = lp.PositionConfig(source=source, per_head=per_head, gap=gap, activation=activation, max_increment=4.0)
    table = 0.1 + 3 * torch.rand(61, *([N_KV] if per_head else [])) if source == "frozen" else None
    streams = lp.attach_positions(model, config, table=table)
    for name, parameter in streams.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    weights = weights_of(model)

    def increments(layer, embedding, residual):
        if source == "frozen":
            return table[TOKENS]
        prefix, reads = "shared_source", embedding
        if source == "per_layer":
            prefix, reads = f"layers.{layer}.source", residual
        double = {name: w.double() for name, w in weights.items()}
        values = reference_source(double, f"position_streams.{prefix}", reads, activation, 4.0)
        return values if per_head else values[..., 0]

    expected = reference_logits(weights, TOKENS, increments, gap)
    run = lp.HookedPositionTransformer.from_transformers(model) if bridged else model
    error = logits_and_largest_error(run, TOKENS, expected)
    print("largest error", error)
    assert error < 1e-5


def test_byte_model_agrees_with_the_reference(tiny_model):
    """The model that training starts from: no grouping of heads, tied embeddings."""
    model = tiny_model(source="per_layer")
    weights = {name.replace("._original_component", ""): w for name, w in model.original_model.state_dict().items()}
    tokens = model.to_tokens("The distance, 中文.")
    increments = model.increments(tokens)
    expected = reference_logits(weights, tokens, lambda layer, *_: increments[layer], "before")
    assert logits_and_largest_error(model, tokens, expected) < 1e-5 * max(1, expected.abs().max().item())
