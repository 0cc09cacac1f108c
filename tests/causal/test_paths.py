"""Effects through one receiver, against a circuit known by construction and against freezing all else by hand."""

import functools

import pytest
import torch
import transformers

import lens_positions as lp

TOKENS = torch.randint(3, 61, (1, 7), generator=torch.Generator().manual_seed(3))
CONTENT, FIRST, SECOND = slice(0, 8), slice(8, 16), slice(16, 24)
METRIC = lp.causal.logit_difference(5, 9)


@functools.cache
def circuit():
    """Layer 0, head 1 attends by distance and writes FIRST; queries of layer 1, head 2 read it, which writes SECOND.

    The logits read SECOND alone. A large constant in the embeddings keeps the norm of the residual stream the same.
    """
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 2, "head_dim": 8}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False, pad_token_id=0
    )
    base = transformers.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape, size=1.0):
        return size * torch.randn(shape, generator=generator)

    heads = [slice(8 * i, 8 * i + 8) for i in range(4)]
    with torch.no_grad():
        for layer in base.model.layers:
            for module in (layer.mlp.down_proj, *(getattr(layer.self_attn, f"{n}_proj") for n in "qkvo")):
                module.weight.zero_()
        base.model.embed_tokens.weight.zero_()
        base.model.embed_tokens.weight[:, CONTENT] = drawn(61, 8)
        base.model.embed_tokens.weight[:, 31] = 5000.0
        base.lm_head.weight.zero_()
        base.lm_head.weight[:, SECOND] = drawn(61, 8, size=2000.0)

        # The constant is about 5.7 once normed, and what is written in the residual stream about 0.001.
        first, second = (layer.self_attn for layer in base.model.layers)
        for module in (first.q_proj, first.k_proj):
            module.weight[heads[1], 31] = drawn(8, size=0.4)
        first.v_proj.weight[heads[1], CONTENT] = drawn(8, 8, size=1000.0)
        first.o_proj.weight[FIRST, heads[1]] = drawn(8, 8, size=0.3)
        second.q_proj.weight[heads[2], FIRST] = drawn(8, 8, size=1000.0)
        second.k_proj.weight[heads[2], CONTENT] = drawn(8, 8, size=1000.0)
        second.v_proj.weight[heads[2], CONTENT] = drawn(8, 8, size=1000.0)
        second.o_proj.weight[SECOND, heads[2]] = drawn(8, 8, size=0.3)
    return lp.HookedPositionTransformer.from_transformers(base)


@pytest.mark.slow
def test_paths_of_a_known_circuit_are_its_own():
    model = circuit()
    whole = float(lp.causal.gap_sweep(model, TOKENS, METRIC, layers=0)[0, 3])
    assert abs(whole) > 0.05
    through = {
        receivers: lp.causal.path_sweep(model, TOKENS, METRIC, before=3, layers=0, receivers=receivers)
        for receivers in ("head", "query", "key", "resid")
    }

    # All of it leaves layer 0 by head 1, and all of it reaches the logits by the queries of head 2 in layer 1.
    expected = torch.zeros(2, 4)
    expected[0, 1] = expected[1, 2] = whole
    assert torch.allclose(through["head"], expected, atol=1e-3 * abs(whole))
    assert torch.allclose(through["query"][1], expected[1], atol=1e-3 * abs(whole))
    assert through["key"][1].abs().max() < 1e-3 * abs(whole)
    assert torch.allclose(through["resid"], torch.tensor([0.0, whole]), atol=1e-3 * abs(whole))

    # In layer 0 the distance moves queries and keys of head 1, and of no other.
    for side in ("query", "key"):
        assert through[side][0, 1].abs() > 1e-3 * abs(whole)
        assert through[side][0, [0, 2, 3]].abs().max() == 0


FAMILIES = {"Llama": {"num_key_value_heads": 2}, "Qwen3": {"num_key_value_heads": 2}, "Gemma3": {}, "GPTNeoX": {}}


@functools.cache
def model_of(family):
    """A tiny random bridge of three layers."""
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "pad_token_id": 0}
    sizes |= {"num_attention_heads": 4, "initializer_range": 0.25, **FAMILIES[family]}
    if family != "GPTNeoX":
        sizes["head_dim"] = 8
    torch.manual_seed(0)
    config = getattr(transformers, f"{'Gemma3Text' if family == 'Gemma3' else family}Config")(**sizes)
    base = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    return lp.HookedPositionTransformer.from_transformers(base)


def run(model, hooks, names=()):
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        logits, cache = model.run_with_cache(TOKENS, names_filter=list(names))
    return float(METRIC(logits)[0]), cache


def put(name, value, head=None):
    def hook(values, hook):
        values = values.clone()
        values[(slice(None), slice(None)) + (() if head is None else (head,))] = value
        return values

    return [(name, hook)]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("receivers", ["head", "query", "resid"])
def test_paths_agree_with_freezing_all_else_by_hand(family, receivers):
    """Other attention is frozen at its heads' outputs here, not at what enters the blocks."""
    if family == "GPTNeoX" and receivers == "query":
        pytest.skip("its bridge has no rotated queries")
    model, sender = model_of(family), 0
    hook = {"head": "attn.hook_z", "query": "attn.hook_rot_q", "resid": "hook_resid_pre"}[receivers]
    held = [f"blocks.{i}.{name}" for i in range(3) for name in ("attn.hook_z", "hook_mlp_out")]
    baseline, own = run(model, [], held)
    edit = lp.add_gap(model, 3, 0.7, layers=sender)
    effects = lp.causal.path_sweep(model, TOKENS, METRIC, 3, 0.7, sender, receivers)

    for layer in range(3):
        name = f"blocks.{layer}.{hook}"
        # What is recorded at a receiver must not be frozen before.
        frozen = [n for n in held if n not in (f"blocks.{sender}.attn.hook_z", f"blocks.{layer}.attn.hook_z")]
        _, got = run(model, edit + [pair for n in frozen for pair in put(n, own[n])], [name])
        for head in [None] if receivers == "resid" else range(4):
            value = got[name] if head is None else got[name][:, :, head]
            effect = run(model, put(name, value, head))[0] - baseline
            ours = effects[layer] if head is None else effects[layer, head]
            assert effect == pytest.approx(float(ours), abs=1e-5)
    assert effects[1:].abs().max() > 1e-3


def test_the_gap_of_all_heads_through_each_of_them_is_that_of_the_sweep_by_head():
    model = model_of("Llama")
    by_head = lp.causal.gap_sweep(model, TOKENS, METRIC, "head", layers=1, length=0.7)[0, :, 4]
    through = lp.causal.path_sweep(model, TOKENS, METRIC, 4, 0.7, 1)
    assert torch.allclose(through[1], by_head, atol=1e-5)
    assert (through[0] == 0).all()


def test_one_head_of_the_senders_alone():
    model = model_of("Llama")
    through = lp.causal.path_sweep(model, TOKENS, METRIC, 4, 0.7, 1, "key", heads=2)
    assert through[1, 2].abs() > 1e-4
    assert (through[1, [0, 1, 3]] == 0).all()


@pytest.mark.usefixtures("unchecked")
def test_paths_that_there_are_not_are_refused_in_one_sentence():
    model = model_of("GPTNeoX")
    refused = {
        "receivers is 'value'; expected one of head, query, key, resid": lambda: lp.causal.path_sweep(
            model, TOKENS, METRIC, 3, receivers="value"
        ),
        "before is 7; expected the index of a token after the first, from 1 to 6": lambda: lp.causal.path_sweep(
            model, TOKENS, METRIC, 7
        ),
        "layer 3 has no positions": lambda: lp.causal.path_sweep(model, TOKENS, METRIC, 3, layers=3),
        "hook_rot_q never ran": lambda: lp.causal.path_sweep(model, TOKENS, METRIC, 3, receivers="query"),
    }
    for sentence, call in refused.items():
        with pytest.raises(lp.PositionsError, match=sentence):
            call()
