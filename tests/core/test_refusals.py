"""A refusal changes nothing: the model is as it was, and the natural next call works."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertLMHeadModel, TextGenerationPipeline

import lens_positions as lp
from lens_positions.tokenizer import byte_tokenizer

Hooked = lp.HookedPositionTransformer
TOKENS = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(2))


def state_of(model):
    """Everything that attaching touches: modules, hooks, classes, settings and values."""
    modules = {name: type(module) for name, module in model.named_modules()}
    hooks = {
        name: [len(module._forward_pre_hooks), len(module._forward_hooks), "forward" in vars(module), module.training]
        for name, module in model.named_modules()
    }
    values = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    return modules, hooks, values, copy.deepcopy(vars(model.config))


def assert_same(one, other):
    assert one[:2] == other[:2]
    assert one[2].keys() == other[2].keys()
    assert all(one[2][n][0] == other[2][n][0] and torch.equal(one[2][n][1], other[2][n][1]) for n in one[2])
    assert one[3] == other[3]


def refused_without_a_trace(model, call, words):
    before = state_of(model)
    with pytest.raises(lp.PositionsError, match=words) as refusal:
        call()
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400
    assert_same(before, state_of(model))


@pytest.mark.parametrize(
    ("positions", "table", "words"),
    [
        ("dynamic", None, "expected"),
        (lp.PositionConfig("frozen"), torch.ones(5), "shape"),
        (lp.PositionConfig("frozen"), torch.full((61,), torch.nan), "NaN"),
        ("static", torch.ones(61), "frozen"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_refused_attach_leaves_the_model_as_it_was(tiny_llama, positions, table, words):
    model = tiny_llama()
    refused_without_a_trace(model, lambda: lp.attach_positions(model, positions, table=table), words)
    lp.attach_positions(model, lp.PositionConfig("shared"))
    with pytest.raises(lp.PositionsError, match="attached to this model already"):
        lp.attach_positions(model, "static")
    assert torch.equal(model(TOKENS).logits, tiny_llama()(TOKENS).logits)


def test_a_failure_in_the_middle_of_attaching_is_undone(tiny_llama, monkeypatch):
    model = tiny_llama()
    before = state_of(model)

    def fails(*_args, **_kwargs):
        raise MemoryError("no room")

    monkeypatch.setattr(model.model.layers[1].self_attn, "register_forward_pre_hook", fails)
    with pytest.raises(MemoryError):
        lp.attach_positions(model, lp.PositionConfig("per_layer"))
    monkeypatch.undo()
    assert_same(before, state_of(model))
    lp.attach_positions(model, lp.PositionConfig("per_layer"))


@pytest.mark.slow
def test_a_refused_bridge_leaves_the_model_as_it_was(tiny_llama, monkeypatch):
    model = tiny_llama()
    model.config.architectures = ["NobodysForCausalLM"]
    refused_without_a_trace(model, lambda: Hooked.from_transformers(model), "no adapter")
    model.config.architectures = None

    before = state_of(model)

    def fails(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lens_positions.core.attach._add_hook_points", fails)
    with pytest.raises(KeyboardInterrupt):
        Hooked.from_transformers(model)
    monkeypatch.undo()
    assert_same(before, state_of(model))
    bridge = Hooked.from_transformers(model)
    assert torch.equal(bridge(TOKENS), tiny_llama()(TOKENS).logits)


@pytest.mark.slow
def test_wrappers_that_are_exact_are_taken_off(tiny_llama):
    expected = tiny_llama()(TOKENS).logits
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    pipeline = TextGenerationPipeline(model=tiny_llama(vocab_size=300), tokenizer=byte_tokenizer())
    compiled = torch.compile(tiny_llama(), backend="eager")
    for wrapped in (adapted, compiled, pipeline):
        streams = lp.attach_positions(wrapped, lp.PositionConfig("per_layer"))
        assert streams.attached
        inside = getattr(wrapped, "_orig_mod", wrapped)
        if inside is not pipeline:
            assert torch.equal(inside(TOKENS).logits, expected)
        streams.detach()
    assert torch.equal(Hooked.from_transformers(compiled)(TOKENS), expected)


def test_wrappers_that_hold_copies_are_refused_by_name(tiny_llama):
    model = tiny_llama()
    wrapped = nn.DataParallel(model)
    for call in (lp.attach_positions, Hooked.from_transformers):
        refused_without_a_trace(model, lambda call=call: call(wrapped), "DataParallel")
    lp.attach_positions(model, "static")


def test_what_is_no_rotary_decoder_is_refused_as_it_was():
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = BertLMHeadModel(BertConfig(**sizes, intermediate_size=48, is_decoder=True)).eval()
    for call in (lp.attach_positions, Hooked.from_transformers):
        refused_without_a_trace(model, lambda call=call: call(model), "RoPE|rotary")


def test_a_refused_pass_leaves_no_pass_behind(tiny_llama, randomize):
    model = tiny_llama()
    streams = lp.attach_positions(model, lp.PositionConfig("per_layer"))
    randomize(model)
    with torch.no_grad():
        expected = model(TOKENS).logits
        with pytest.raises(lp.PositionsError, match="attention mask"):
            model(TOKENS, attention_mask=torch.ones(2, 3))
        assert streams._current.get() is None
        assert torch.equal(model(TOKENS).logits, expected)
