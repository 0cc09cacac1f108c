"""Coverage: every architecture of TransformerLens is accounted for, and what docs/families.md says of it holds.

A gap is pinned to its cause: the test of it fails on the day the cause is gone.
"""

import re

import families
import pytest
import torch
import transformers
from families import CHECKED, COUNTED, FAMILIES, PAGE, SUPPORTED_ARCHITECTURES, Family
from transformer_lens.model_bridge import TransformerBridge

import lens_positions as lp
from lens_positions.core.rotation import SinusoidTable


def test_every_architecture_of_transformer_lens_is_accounted_for():
    assert set(FAMILIES) - set(SUPPORTED_ARCHITECTURES) == set()
    assert set(SUPPORTED_ARCHITECTURES) - set(FAMILIES) == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("unchecked")
def test_family(name):
    assert families.failures(families.report(name)) == []


def test_the_page_names_every_architecture_and_counts_the_supported_ones():
    page = PAGE.read_text("utf-8")
    named = re.findall(r"^\| (\w+)(?: \(\w+\))? \|", page, re.MULTILINE)
    assert [name for name in named if name in FAMILIES] == [*COUNTED, *(n for n in FAMILIES if n not in COUNTED)]
    assert f"**{len(CHECKED)} of {len(COUNTED)}** architectures" in " ".join(page.split())
    assert len(re.findall(r"\| yes, in layers", page)) == len(CHECKED)


def reasons(text):
    return [name for name, family in FAMILIES.items() if getattr(family, "gap", family) == text]


@pytest.mark.parametrize("name", reasons(families.HUB.gap))
def test_gap_without_modelling_code(name):
    assert not hasattr(transformers, name), f"transformers now has {name}; give it a tiny config in tests/families.py"


def test_gap_of_blocks_with_positions_of_their_own():
    model = families.build("DeepseekV4ForCausalLM")
    before = families.fingerprint(model)
    with pytest.raises(lp.PositionsError, match=str(FAMILIES["DeepseekV4ForCausalLM"].gap)):
        lp.attach_positions(model)
    assert families.fingerprint(model) == before


def test_gap_of_models_that_are_not_of_transformers():
    bridge = TransformerBridge.boot_native(
        {"d_model": 8, "d_head": 4, "n_heads": 2, "n_layers": 1, "n_ctx": 8, "d_vocab": 8, "act_fn": "gelu"}
    )
    for model in (bridge, bridge.original_model):
        with pytest.raises(lp.PositionsError, match="expected a transformers model"):
            lp.attach_positions(model)
    assert not hasattr(transformers, "TransformerLensPretrain")


@pytest.mark.parametrize("name", [name for name, r in FAMILIES.items() if str(r).startswith("another name of")])
def test_another_name_is_the_same_adapter_and_no_model_of_its_own(name):
    assert SUPPORTED_ARCHITECTURES[name] is SUPPORTED_ARCHITECTURES[FAMILIES[name].split()[-1]]
    assert not hasattr(transformers, name)


@pytest.mark.parametrize("name", reasons(families.ENCODER_DECODER))
def test_encoders_with_a_decoder_are_no_causal_language_models(name):
    assert getattr(transformers, name).config_class.is_encoder_decoder or name == "Florence2ForConditionalGeneration"


@pytest.mark.parametrize("name", [*reasons("attention without rotary positions"), "BloomForCausalLM", "OPTForCausalLM"])
@pytest.mark.filterwarnings("ignore")
def test_causal_models_without_rotary_positions_are_refused(name):
    kind = getattr(transformers, name)
    sizes = {**families.SIZES, "word_embed_proj_dim": 32, "ffn_dim": 32, "num_experts": 2}
    sizes |= {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_num_heads": 8}
    sizes |= {"mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8}
    if name == "NemotronHForCausalLM":
        sizes["layers_block_type"] = ["linear_attention", "full_attention"] * 2
    model = kind(kind.config_class(**sizes)).eval()
    before = families.fingerprint(model)
    with pytest.raises(lp.PositionsError, match="no attention that takes rotary position_embeddings"):
        lp.attach_positions(model)
    assert families.fingerprint(model) == before


@torch.no_grad()
def test_layers_without_rope_have_no_stream():
    """Streams carry the model's own layer numbers, in the names of their hook points and in errors."""
    model = families.build("SmolLM3ForCausalLM")  # rotates in layer 1 alone
    streams = lp.attach_positions(model, lp.PositionConfig(source="per_layer"))
    assert [stream.layer for stream in streams.layers] == [1]
    streams.layers[0].hook_increments.add_hook(lambda d, hook: d[:1])
    with pytest.raises(lp.PositionsError, match=r"expected a tensor of shape \(2, 9\)"):
        families.logits_of(model)
    cache = transformers.DynamicCache(config=model.config)
    streams.detach()
    model(families.TOKENS, past_key_values=cache)
    bridge = families.plain_bridge(model)
    streams = lp.attach_positions(bridge, lp.PositionConfig(source="per_layer"))
    names = {"blocks.1.attn.hook_increments", "blocks.1.attn.hook_head_increments"}
    assert {n for n in bridge.hook_dict if "increments" in n} == names
    assert bridge.positions(families.TOKENS).shape == (1, *families.TOKENS.shape)
    with pytest.raises(lp.PositionsError, match="2 rows of 9 tokens at layer 1 and positions for none"):
        model(families.TOKENS, past_key_values=cache)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Gemma3nForConditionalGeneration", "Gemma4ForCausalLM"])
def test_layers_that_read_another_layers_keys_go_by_its_positions(name):
    """Stretching layer 0 for everybody moves the queries of layer 2 with the keys that they meet."""
    model = families.build(name)
    streams = lp.attach_positions(model)
    assert [stream.layer for stream in streams.layers] == [0, 1]
    assert all(stream.has_followers for stream in streams.layers)
    seen = []
    attention = model.get_decoder().layers[2].self_attn
    handle = attention.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["position_embeddings"][0]), with_kwargs=True
    )
    families.logits_of(model)
    streams.layers[0].hook_positions.add_hook(lambda p, hook: 2 * p)
    families.logits_of(model)
    handle.remove()
    assert torch.equal(seen[1][:, 3], seen[0][:, 6].expand_as(seen[1][:, 3]))
    assert not torch.equal(seen[1][:, 3], seen[0][:, 3].expand_as(seen[1][:, 3]))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "Gemma3ForConditionalGeneration"])
def test_padding_of_a_model_of_images_and_text_is_counted_out(name):
    """It embeds the tokens and makes its masks before it calls its decoder."""
    model = families.build(name)
    streams = lp.attach_positions(model, lp.PositionConfig(source="frozen"), table=torch.linspace(0.5, 2, 61))
    ids = (families.MASK.cumsum(1) - 1).clamp(min=0)
    padded = families.logits_of(model, attention_mask=families.MASK, position_ids=ids)
    alone = model(input_ids=families.TOKENS[:1, 3:], use_cache=False).logits
    assert families.apart(padded[:1, 3:], alone) < 1e-5 * alone.abs().max()
    streams.detach()


@torch.no_grad()
def test_the_table_of_gpt_j_is_its_own_again_after_an_error():
    model = families.build("GPTJForCausalLM")
    untouched = families.logits_of(model)
    streams = lp.attach_positions(model, lp.PositionConfig(source="shared"))
    families.randomize(streams)
    table = model.transformer.h[0].attn.embed_positions
    handle = model.transformer.h[0].attn.out_proj.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        families.logits_of(model)
    handle.remove()
    assert model.transformer.h[0].attn.embed_positions is table
    streams.detach()
    assert torch.equal(families.logits_of(model), untouched)


@torch.no_grad()
def test_fractional_positions_of_a_table_are_those_of_its_frequencies():
    table = families.build("GPTJForCausalLM").transformer.h[0].attn.embed_positions
    positions = torch.tensor([[0.0, 3.0, 3.25, 17.5, -2.5, 100.75]])  # the table has 64 rows
    cos, sin = SinusoidTable(table).forward(table, positions)
    w = 10_000 ** -(torch.arange(0, 4, 2) / 4)
    assert torch.equal(torch.cat([sin, cos], dim=-1)[0, :2], table[[0, 3]])
    assert families.apart(cos, (positions[..., None] * w).cos()) < 1e-5
    assert families.apart(sin, (positions[..., None] * w).sin()) < 1e-5


KINDS_OF_ROTATION = {
    "Llama4ForCausalLM": "one complex tensor",
    "GptOssForCausalLM": "half the width",
    "Qwen2_5_VLForConditionalGeneration": "several axes",
    "RecurrentGemmaForCausalLM": "a rotary module in the attention",
    "GPTJForCausalLM": "a table",
    "Gemma4ForCausalLM": "layers that follow others",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS_OF_ROTATION)
def test_gradient_of_positions_is_that_of_small_steps(name):
    model = families.build(name)
    streams = lp.attach_positions(model)
    step = torch.zeros((), requires_grad=True)
    direction = torch.linspace(-1, 1, families.TOKENS.shape[1])
    streams.layers[-1].hook_positions.add_hook(lambda p, hook: p + step * direction)
    weights = torch.randn(61, generator=torch.Generator().manual_seed(0))

    def value():
        return (families.logits_of(model).double() * weights).mean()

    value().backward()
    with torch.no_grad():
        values = []
        for h in (1e-2, -1e-2):
            step.fill_(h)
            values.append(value())
    expected = (values[0] - values[1]) / 2e-2
    assert abs(expected) > 1e-4
    assert abs(step.grad - expected) < 0.02 * abs(expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("source", ["shared", "per_layer"])
@pytest.mark.parametrize("name", KINDS_OF_ROTATION)
def test_gradient_checkpointing_gives_the_same_gradients(name, source):
    model = families.build(name)
    families.randomize(lp.attach_positions(model, lp.PositionConfig(source=source)))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        families.logits_of(model).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.position_streams.parameters() if p.grad is not None])
        model.zero_grad()
    assert len(gradients[0]) == len(gradients[1]) > 0
    for plain, checkpointed in zip(*gradients, strict=True):
        assert families.apart(plain, checkpointed) <= 1e-5 * max(1e-3, plain.abs().max().item())


def test_a_model_that_cannot_run_on_three_tokens_is_taken_at_its_word():
    """Without the trial every candidate counts, and is still exact."""
    model = families.build("SmolLM3ForCausalLM")

    def needs_more(module, args, kwargs):
        if kwargs["input_ids"].shape[1] < 4:
            raise RuntimeError("expected at least four tokens")

    model.register_forward_pre_hook(needs_more, with_kwargs=True)
    before = families.fingerprint(model)
    with torch.no_grad():
        untouched = families.logits_of(model)
        streams = lp.attach_positions(model, lp.PositionConfig(source="shared"))
        assert [stream.layer for stream in streams.layers] == [0, 1]
        assert torch.equal(families.logits_of(model), untouched)
    streams.detach()
    assert families.fingerprint(model) == before


def test_attaching_leaves_training_mode_and_random_numbers_alone():
    model = families.build("PhiForCausalLM").train()
    model.model.layers[0].eval()
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    streams = lp.attach_positions(model)
    streams.detach()
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes


def test_a_family_says_what_it_is():
    for family in FAMILIES.values():
        assert isinstance(family, Family) or len(family) > 5
