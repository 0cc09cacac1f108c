"""Streams that change nothing change nothing: differences of exactly 0.0, and detaching restores the model."""

import copy
import itertools

import pytest
import torch
import transformers
from transformer_lens.model_bridge import TransformerBridge

import lens_positions as lp
from lens_positions.tokenizer import byte_tokenizer

TOKENS = torch.randint(1, 61, (3, 11), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(TOKENS)
MASK[0, :4] = 0
MASK[1, :1] = 0
EVERY_SOURCE = list(itertools.product(("static", "shared", "per_layer", "frozen"), (False, True), ("before", "after")))


def logits_of(model, **given):
    with torch.no_grad():
        given = {"input_ids": TOKENS, **given}
        return model(**given).logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("source", "gap"), [(s, g) for s, heads, g in EVERY_SOURCE if not heads])
def test_fresh_streams_leave_logits_bit_identical(tiny_llama, source, gap, padded, dtype, attention):
    model = tiny_llama(dtype=dtype, attention=attention)
    given = {"attention_mask": MASK} if padded else {}
    untouched = logits_of(model, **given)
    streams = lp.attach_positions(model, lp.PositionConfig(source=source, gap=gap))
    assert (logits_of(model, **given) - untouched).abs().max() == 0.0
    with streams.record():
        assert (logits_of(model, **given) - untouched).abs().max() == 0.0


@pytest.mark.parametrize("source", ["static", "shared", "per_layer", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_per_head_streams_leave_logits_bit_identical(tiny_llama, source, dtype):
    model = tiny_llama(dtype=dtype, initializer_range=0.1)
    untouched = logits_of(model, attention_mask=MASK)
    lp.attach_positions(model, lp.PositionConfig(source=source, per_head=True))
    real = MASK.bool()
    assert torch.equal(logits_of(model, attention_mask=MASK)[real], untouched[real])


def plain_bridge(model):
    """The bridge as TransformerLens builds it, without streams."""
    hooked = lp.HookedPositionTransformer.from_transformers(model)
    hooked.position_streams.detach()
    return hooked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", ["static", "shared", "per_layer", "frozen"])
def test_fresh_streams_leave_a_bridge_bit_identical(tiny_llama, source, dtype):
    bare = logits_of(tiny_llama(dtype=dtype))
    bridge = plain_bridge(tiny_llama(dtype=dtype))
    with torch.no_grad():
        untouched, plain_cache = bridge.run_with_cache(TOKENS)
        assert torch.equal(untouched, bare)
        streams = lp.attach_positions(bridge, lp.PositionConfig(source=source))
        assert (bridge(TOKENS) - untouched).abs().max() == 0.0
        logits, cache = bridge.run_with_cache(TOKENS)
        assert (logits - untouched).abs().max() == 0.0
        padded = bridge(TOKENS, attention_mask=MASK)
        streams.detach()
        assert torch.equal(bridge(TOKENS, attention_mask=MASK), padded)
    shared = set(plain_cache) & set(cache)
    assert len(shared) > 60
    assert all(torch.equal(plain_cache[name].expand_as(cache[name]), cache[name]) for name in shared)
    assert {n.rsplit(".", 1)[-1] for n in set(cache) - set(plain_cache)} == {
        "hook_increments",
        "hook_positions",
        "hook_head_increments",
        "hook_head_positions",
        "hook_rotation",
    }


def test_static_streams_in_a_bridge_with_gradients_are_bit_identical(tiny_llama):
    bridge = plain_bridge(tiny_llama())
    untouched = bridge(TOKENS)
    lp.attach_positions(bridge)
    logits, _ = bridge.run_with_cache(TOKENS)
    assert torch.equal(logits, untouched)


@pytest.mark.parametrize("rope", ["linear", "dynamic", "yarn", "llama3", "longrope", "proportional"])
@pytest.mark.parametrize("source", ["static", "shared", "per_layer"])
def test_scaled_rope_is_exact(tiny_llama, rope, source):
    parameters = {
        "rope_type": rope,
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 6,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 3, 4, 5],
        "partial_rotary_factor": 0.5 if rope == "proportional" else 1.0,
    }
    model = tiny_llama(rope_parameters=parameters, max_position_embeddings=6)
    untouched = [logits_of(model, input_ids=TOKENS[:, :length]) for length in (11, 5)]
    streams = lp.attach_positions(model, lp.PositionConfig(source=source))
    for length, expected in zip((11, 5), untouched, strict=True):
        with streams.record():
            assert torch.equal(logits_of(model, input_ids=TOKENS[:, :length]), expected)


def fingerprint(model):
    """Everything that attaching could leave behind."""
    hooks = {
        name: [len(m._forward_pre_hooks), len(m._forward_hooks), len(m._forward_hooks_always_called)]
        for name, m in model.named_modules()
    }
    tree = [(name, type(m)) for name, m in model.named_modules()]
    return tree, hooks, {n: t.clone() for n, t in model.state_dict().items()}


@pytest.mark.parametrize(("source", "per_head", "gap"), EVERY_SOURCE)
def test_detach_restores_the_model(tiny_llama, randomize, source, per_head, gap):
    model = tiny_llama()
    tree, hooks, state = fingerprint(model)
    untouched = logits_of(model)
    streams = lp.attach_positions(model, lp.PositionConfig(source=source, per_head=per_head, gap=gap))
    assert streams.attached
    assert len(list(model.named_modules())) > len(tree)
    with torch.no_grad():
        for parameter in streams.parameters():
            parameter.normal_()
    streams.layers[0].hook_increments.add_hook(lambda d, hook: 2 * d)
    assert not torch.equal(logits_of(model), untouched)
    for _ in range(2):  # twice does nothing more
        streams.detach()
        after = fingerprint(model)
        assert not streams.attached
        assert after[:2] == (tree, hooks)
        assert after[2].keys() == state.keys()
        assert all(torch.equal(after[2][name], state[name]) for name in state)
        assert torch.equal(logits_of(model), untouched)
    lp.attach_positions(model)
    assert torch.equal(logits_of(model), untouched)


def test_detach_restores_a_bridge(tiny_llama):
    bridge = plain_bridge(tiny_llama())
    names, untouched = list(bridge.hook_dict), bridge(TOKENS)
    tree, hooks, _ = fingerprint(bridge)
    for source in ("shared", "per_layer", "frozen", "static"):
        streams = lp.attach_positions(bridge, lp.PositionConfig(source=source))
        assert "blocks.1.attn.hook_positions" in bridge.hook_dict
        assert ("hook_increments" in bridge.hook_dict) == (source in ("shared", "frozen"))
        with bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_increments", lambda d, hook: 3 * d)]):
            assert not torch.equal(bridge(TOKENS), untouched)
        streams.detach()
        assert list(bridge.hook_dict) == names
        assert fingerprint(bridge)[:2] == (tree, hooks)
        assert torch.equal(bridge(TOKENS), untouched)


def test_attaching_twice_is_refused(tiny_llama):
    model = tiny_llama()
    lp.attach_positions(model)
    logits = logits_of(model)
    tree, hooks, _ = fingerprint(model)
    for again in (model, model.model):
        with pytest.raises(lp.PositionsError, match="attached to this model already"):
            lp.attach_positions(again)
        assert fingerprint(model)[:2] == (tree, hooks)
    bridge = lp.HookedPositionTransformer.from_transformers(model)
    with pytest.raises(lp.PositionsError, match="attached to this model already"):
        lp.attach_positions(bridge)
    assert torch.equal(bridge(TOKENS), logits)


def small(kind, config, **values):
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0}
    return kind(config(**{**sizes, **heads, **values}))


def refused_models():
    tf = transformers
    return {
        "absolute positions": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=61)),
        "encoder": lambda: small(tf.BertModel, tf.BertConfig),
        "rotary encoder": lambda: small(
            tf.ModernBertForMaskedLM,
            tf.ModernBertConfig,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
        ),
        "another rotary encoder": lambda: small(
            tf.EsmForMaskedLM, tf.EsmConfig, position_embedding_type="rotary", mask_token_id=2
        ),
        "relative positions": lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=61, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2)
        ),
        "no transformers model": lambda: torch.nn.Linear(2, 2),
    }


@pytest.mark.parametrize("kind", refused_models())
def test_models_without_causal_rotary_attention_are_refused_and_untouched(kind):
    model = refused_models()[kind]()
    tree, hooks, _ = fingerprint(model)
    with pytest.raises(lp.PositionsError, match="expected a") as refusal:
        lp.attach_positions(model)
    assert str(refusal.value).count(". ") == 0
    assert "\n" not in str(refusal.value)
    assert fingerprint(model)[:2] == (tree, hooks)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [None, "gpt2", 3])
def test_what_is_no_model_is_refused(wrong):
    with pytest.raises(lp.PositionsError, match=type(wrong).__name__):
        lp.attach_positions(wrong)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", ["per_layer", None, {"source": "static"}])
def test_what_is_no_configuration_is_refused(tiny_llama, wrong):
    with pytest.raises(lp.PositionsError, match='expected "static" or a PositionConfig'):
        lp.attach_positions(tiny_llama(), wrong)


HEADS = {"head_dim": 8, "num_key_value_heads": 2}
EXACT = {
    **dict.fromkeys(["Mistral", "Qwen2", "Gemma", "Starcoder2", "Granite", "Arcee", "SeedOss", "Olmo"], HEADS),
    "SmolLM3": {**HEADS, "num_hidden_layers": 2, "no_rope_layers": [1, 0]},  # a layer without rotation and stream
    "Qwen3": HEADS,  # a norm of each head between projection and rotation
    "Gemma3": HEADS,
    "Olmo2": {"num_key_value_heads": 2},  # a norm over all heads
    "GPTNeoX": {},  # one projection for all
    "Phi3": {"num_key_value_heads": 2},
    "Cohere": {"num_key_value_heads": 2},  # adjacent pairs
    "Helium": HEADS,
    "Ernie4_5": HEADS,
    "Phi": {},  # part of each head
    "StableLm": {"num_key_value_heads": 2},
    "Glm": HEADS,
}
INEXACT = {
    "GPTJ": ({"rotary_dim": 8, "n_positions": 32}, "computes its own rotation"),
    "Llama4": ({"intermediate_size_mlp": 16, **HEADS}, "complex"),
}


@pytest.mark.parametrize("family", INEXACT)
def test_per_head_increments_that_would_not_be_exact_are_refused(family):
    tf = transformers
    sizes, why = INEXACT[family]
    values = {"bos_token_id": 1, "eos_token_id": 2, **sizes}
    config = "Llama4Text" if family == "Llama4" else family
    model = small(getattr(tf, family + "ForCausalLM"), getattr(tf, config + "Config"), **values).eval()
    tree, hooks, _ = fingerprint(model)
    with pytest.raises(lp.PositionsError, match=f"per-head increments are not exact.*{why}"):
        lp.attach_positions(model, lp.PositionConfig(per_head=True))
    assert fingerprint(model)[:2] == (tree, hooks)


@pytest.mark.parametrize("family", EXACT)
def test_fresh_per_head_increments_are_exact_where_they_are_accepted(family):
    tf = transformers
    values = {"initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2, **EXACT[family]}
    config = "Gemma3Text" if family == "Gemma3" else family
    model = small(getattr(tf, family + "ForCausalLM"), getattr(tf, config + "Config"), **values).eval()
    untouched = logits_of(model)
    streams = lp.attach_positions(model, lp.PositionConfig(per_head=True))
    assert torch.equal(logits_of(model), untouched)
    streams.layers[0].hook_increments.add_hook(lambda d, hook: 2 * d)
    assert (logits_of(model) - untouched).abs().max() > 1e-6


def test_copies_have_streams_of_their_own(tiny_llama, randomize):
    model = tiny_llama()
    lp.attach_positions(model, lp.PositionConfig(source="per_layer"))
    randomize(model)
    model(TOKENS, labels=TOKENS).loss.backward()
    twin = copy.deepcopy(model)
    logits = logits_of(model)
    assert torch.equal(logits_of(twin), logits)
    twin.position_streams.layers[0].hook_increments.add_hook(lambda d, hook: 3 * d)
    assert not torch.equal(logits_of(twin), logits)
    assert torch.equal(logits_of(model), logits)
    twin.position_streams.detach()
    assert "position_streams" not in twin._modules
    assert torch.equal(logits_of(model), logits)


def test_copied_bridge_has_streams_of_its_own(tiny_model):
    model = tiny_model(source="shared")
    tokens = TOKENS
    model(tokens, return_type="loss").backward()
    twin, logits = copy.deepcopy(model), model(tokens)
    assert torch.equal(twin(tokens), logits)
    hooks = [("hook_increments", lambda d, hook: 3 * d)]
    assert not torch.equal(twin.run_with_hooks(tokens, fwd_hooks=hooks), logits)
    twin.position_streams.detach()
    assert "hook_increments" not in twin.hook_dict
    assert "hook_increments" in model.hook_dict
    assert torch.equal(model(tokens), logits)


def test_streams_attach_to_a_bridge_that_transformer_lens_built(tiny_llama):
    bridge = TransformerBridge.boot_transformers("tiny", hf_model=tiny_llama(), tokenizer=byte_tokenizer())
    untouched = bridge(TOKENS)
    lp.attach_positions(bridge, lp.PositionConfig(source="shared"))
    logits, cache = bridge.run_with_cache(TOKENS)
    assert torch.equal(logits, untouched)
    assert (cache["hook_increments"] == 1).all()


def test_an_interrupted_forward_pass_leaves_the_models_own_table():
    config = transformers.GPTJConfig(vocab_size=61, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)
    torch.manual_seed(0)
    model = transformers.GPTJForCausalLM(config).eval()
    untouched, table = logits_of(model), model.transformer.h[0].attn.embed_positions
    streams = lp.attach_positions(model, lp.PositionConfig(source="shared"))

    def interrupt(*_):
        raise KeyboardInterrupt

    for end in ("next pass", "detach"):
        hook = model.transformer.h[0].attn.out_proj.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            logits_of(model)
        hook.remove()
        if end == "detach":
            streams.detach()
            assert model.transformer.h[0].attn.embed_positions is table
        assert torch.equal(logits_of(model), untouched)


def test_embeddings_that_were_exchanged_are_not_ignored(tiny_llama):
    model = tiny_llama()
    lp.attach_positions(model, lp.PositionConfig(source="shared"))
    model.set_input_embeddings(copy.deepcopy(model.get_input_embeddings()))
    model.get_input_embeddings()._forward_hooks.clear()
    with pytest.raises(lp.PositionsError, match=r"embed_tokens of LlamaModel is another.*detach and attach again"):
        logits_of(model)


def test_a_model_that_cannot_be_tried_gets_streams_everywhere_and_says_so(tiny_llama):
    model = tiny_llama()
    hook = model.model.layers[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match=r"does not run on three tokens .division by zero"):
        streams = lp.attach_positions(model)
    hook.remove()
    assert len(streams.layers) == 2
