"""Every architecture that TransformerLens has an adapter for: what it is, and whether position streams are exact in it.

`python tests/families.py` builds a tiny random model of each family that is a causal language model with rotary
positions, checks it, and writes docs/families.md. tests/test_families.py asserts the same.
"""

import functools
import os
import re
import sys
import warnings
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from rich.console import Console
from rich.progress import track
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES, ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf

import lens_positions as lp

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(TOKENS)
MASK[0, :3] = 0


@dataclass(frozen=True)
class Family:
    """A causal language model with rotary positions.

    Args:
        sizes: what its config is given besides SIZES; of the text decoder, where it has several parts.
        without: entries of SIZES that its config does not take.
        model: the transformers class, where it is not the architecture's name.
        parts: for a model of several modalities: its config but for the text; `text_type` is the text's model type.
        gap: why it is not supported; None where it is.
        built: whether a tiny model can be built.
        relative: whether its own logits stay as they are when all position ids move.
    """

    sizes: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    model: str = ""
    parts: dict[str, Any] | None = None
    gap: str | None = None
    built: bool = True
    relative: bool = True


MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# A product over fewer tokens may round differently, which would carry an edit's effect on the routing of later tokens
# to earlier ones: with every expert in use, "none before" can be exactly none.
EVERY_EXPERT = {**MOE, "num_experts_per_tok": 4}
SHARED_EXPERT = {"n_routed_experts": 4, "n_shared_experts": 1, "shared_expert_intermediate_size": 16}
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_n_groups": 1, "mamba_d_state": 8}
MAMBA |= {"mamba_chunk_size": 4}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
LLAMA4 = {**MOE, "num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 1], "attention_chunk_size": 6, "moe_layers": [1]}
LLAMA4 |= {"intermediate_size_mlp": 48, "num_experts_per_tok": 1}
GEMMA4 = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 6,
    "vocab_size_per_layer_input": 61,
    "hidden_size_per_layer_input": 8,
    "global_head_dim": 8,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
AUDIO = {
    "d_model": 16,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "num_mel_bins": 8,
}

HUB = Family(built=False, gap="its modelling code is only on the hub (trust_remote_code)")
DIFFUSION = "a diffusion model, not causal"
ENCODER_DECODER = "an encoder with a decoder"
LEARNED = "learned absolute positions"
ALIBI = "ALiBi, no rotary positions"
STATE_SPACE = "a state space, no attention"


VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 32,
    "image_size": 16,
    "patch_size": 8,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
    "vision_output_dim": 16,
    "mm_embed_dim": 16,
    "mm_posemb_size": 4,
}


def multimodal(text: str, vision: str | None = None, outer: dict[str, Any] | None = None, **sizes: Any) -> Family:
    """A model of several modalities around a text decoder; model types where the config asks for them."""
    other: dict[str, Any] = dict(outer or {})
    if vision is not None:
        other.setdefault("vision_config", {**VISION, **({"model_type": vision} if vision else {})})
    return Family(sizes, parts={"text_type": text, **other})


FAMILIES: dict[str, Family | str] = {
    "AfmoeForCausalLM": Family({**MOE, **SLIDING, "num_shared_experts": 1, "num_dense_layers": 1}),
    "ApertusForCausalLM": Family(),
    "ArceeForCausalLM": Family(),
    "ASTForAudioClassification": "an encoder of sound",
    "BaiChuanForCausalLM": "another name of BaichuanForCausalLM",
    "BaichuanForCausalLM": HUB,
    "BambaForCausalLM": Family({**MAMBA, "attn_layer_indices": [1]}),
    "BartForConditionalGeneration": ENCODER_DECODER,
    "BD3LM": DIFFUSION,
    "DreamModel": DIFFUSION,
    "Emu3ForConditionalGeneration": multimodal(
        "",
        outer={
            "vq_config": {
                "base_channels": 32,
                "channel_multiplier": [1],
                "num_res_blocks": 1,
                "hidden_size": 32,
                "codebook_size": 8,
                "attn_resolutions": [],
                "temporal_downsample_factor": 2,
            },
            "vocabulary_map": {"<image>": 5, "<|extra_200|>": 6},
        },
    ),
    "AudioFlamingo3ForConditionalGeneration": multimodal("qwen2", outer={"audio_config": AUDIO}),
    "FlexOlmoForCausalLM": Family(MOE),
    "GiddForDiffusionLM": DIFFUSION,
    "HyenaDNAForCausalLM": "convolutions, no attention",
    "LLaDA2MoeModelLM": DIFFUSION,
    "Jais2ForCausalLM": Family(),
    "JetMoeForCausalLM": Family({**EVERY_EXPERT, "kv_channels": 8}),
    "JetMoEForCausalLM": "another name of JetMoeForCausalLM",
    "LagunaForCausalLM": Family({**MOE, **SLIDING, "shared_expert_intermediate_size": 16}),
    "Ministral3ForCausalLM": Family(),
    "VaultGemmaForCausalLM": Family(SLIDING),
    "YoutuForCausalLM": Family({**LATENT, "head_dim": 4}),
    "ModernBertDecoderForCausalLM": Family(
        {"layer_types": ["sliding_attention", "full_attention"], "local_attention": 12, "cls_token_id": 1}
    ),
    "MusicFlamingoForConditionalGeneration": multimodal(
        "qwen2", outer={"audio_config": {**AUDIO, "model_type": "audioflamingo3_encoder"}}
    ),
    "NanoChatForCausalLM": Family(),
    "RwkvForCausalLM": STATE_SPACE,
    "SwitchTransformersForConditionalGeneration": ENCODER_DECODER,
    "BertForMaskedLM": "an encoder",
    "BertLMHeadModel": LEARNED,
    "RobertaForMaskedLM": "an encoder",
    "BitNetForCausalLM": Family(),
    "BlenderbotForConditionalGeneration": ENCODER_DECODER,
    "BloomForCausalLM": ALIBI,
    "BloomModel": ALIBI,
    "CodeGenForCausalLM": Family({"rotary_dim": 4}, without=("num_key_value_heads",)),
    "Cohere2ForCausalLM": Family(SLIDING),
    "CohereForCausalLM": Family(),
    "DeepseekV2ForCausalLM": Family({**LATENT, **MOE, **SHARED_EXPERT}),
    "DeepseekV3ForCausalLM": Family({**LATENT, **MOE, **SHARED_EXPERT, "head_dim": 4}),
    "Ernie4_5ForCausalLM": Family(),
    "Ernie4_5_MoeForCausalLM": Family({**MOE, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}),
    "ExaoneForCausalLM": HUB,
    "Exaone4ForCausalLM": Family(SLIDING),
    "DeepseekV4ForCausalLM": Family(
        {
            **MOE,
            "num_key_value_heads": 1,
            "n_routed_experts": 4,
            "q_lora_rank": 16,
            "o_lora_rank": 8,
            "o_groups": 2,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_topk": 4,
            "hc_mult": 2,
        },
        gap="rotates keys that stand for blocks of tokens by positions of their own",
    ),
    "FalconForCausalLM": Family({"multi_query": False}, without=("head_dim", "num_key_value_heads")),
    "FalconH1ForCausalLM": Family(MAMBA),
    "FalconMambaForCausalLM": STATE_SPACE,
    "Florence2ForConditionalGeneration": ENCODER_DECODER,
    "GemmaForCausalLM": Family(),
    "Gemma1ForCausalLM": "another name of GemmaForCausalLM",
    "Gemma2ForCausalLM": Family(SLIDING),
    "Gemma3ForCausalLM": Family(SLIDING),
    "Gemma3ForConditionalGeneration": multimodal("", "siglip_vision_model", {"mm_tokens_per_image": 4}, **SLIDING),
    "Gemma3nForConditionalGeneration": multimodal(
        "",
        outer={
            "vision_config": {"hidden_size": 16, "vocab_size": 4, "vocab_offset": 53},
            "audio_config": {
                "hidden_size": 16,
                "vocab_size": 4,
                "vocab_offset": 57,
                "conf_num_hidden_layers": 1,
                "conf_num_attention_heads": 2,
            },
        },
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=6,
        vocab_size_per_layer_input=61,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        altup_num_inputs=2,
    ),
    "Gemma4ForConditionalGeneration": multimodal("", "", **GEMMA4),
    "Gemma4UnifiedForConditionalGeneration": multimodal("", "", **GEMMA4),
    "Gemma4ForCausalLM": Family(GEMMA4),
    "GraniteForCausalLM": Family(),
    "GraniteMoeForCausalLM": Family(EVERY_EXPERT),
    "GraniteMoeHybridForCausalLM": Family(
        {**MAMBA, **MOE, "layer_types": ["mamba", "attention"], "position_embedding_type": "rope"}
    ),
    "GlmForCausalLM": Family(),
    "Glm4ForCausalLM": Family(),
    "Glm4vForConditionalGeneration": multimodal("", "", rope_parameters={**MROPE, "mrope_section": [1, 1, 2]}),
    "GlmMoeDsaForCausalLM": Family(
        # Enough index heads that no two tokens score exactly 0: topk breaks ties by chance.
        {**LATENT, **MOE, **SHARED_EXPERT, "index_n_heads": 16, "index_head_dim": 8, "index_topk": 4, "head_dim": 4}
    ),
    "Glm4MoeForCausalLM": Family({**MOE, **SHARED_EXPERT, "first_k_dense_replace": 1}),
    "Glm4MoeLiteForCausalLM": Family({**LATENT, **MOE, **SHARED_EXPERT}),
    "GlmAsrForConditionalGeneration": multimodal("llama", outer={"audio_config": AUDIO}),
    "GPT2LMHeadModel": LEARNED,
    "GPTBigCodeForCausalLM": LEARNED,
    "GptOssForCausalLM": Family({**MOE, **SLIDING}),
    "GPT2LMHeadCustomModel": LEARNED,
    "GPTJForCausalLM": Family({"rotary_dim": 4}, without=("num_key_value_heads",)),
    "HrmTextForCausalLM": Family(
        {"H_cycles": 2, "L_cycles": 2, "num_hidden_layers": 6, "num_layers_per_stack": 1},
        without=("num_key_value_heads",),
    ),
    "HubertForCTC": "an encoder of sound",
    "HubertModel": "an encoder of sound",
    "Wav2Vec2ForCTC": "an encoder of sound",
    "Wav2Vec2ForPreTraining": "an encoder of sound",
    "Wav2Vec2Model": "an encoder of sound",
    "HunYuanDenseV1ForCausalLM": Family(relative=False),
    "Idefics3ForConditionalGeneration": multimodal("llama", ""),
    "InternLM2ForCausalLM": HUB,
    "JambaForCausalLM": "attention without rotary positions",
    "LEDForConditionalGeneration": ENCODER_DECODER,
    "LLaDAModelLM": DIFFUSION,
    "LlamaForCausalLM": Family(),
    "Llama4ForCausalLM": Family(LLAMA4),
    "Llama4ForConditionalGeneration": multimodal("", "", **LLAMA4),
    "LlavaForConditionalGeneration": multimodal("llama", "clip_vision_model"),
    "LlavaNextForConditionalGeneration": multimodal("llama", "clip_vision_model"),
    "LlavaOnevisionForConditionalGeneration": multimodal("qwen2", "siglip_vision_model"),
    "Lfm2ForCausalLM": Family({"layer_types": ["conv", "full_attention"]}),
    "Lfm2MoeForCausalLM": Family({**MOE, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "LongT5ForConditionalGeneration": ENCODER_DECODER,
    "M2M100ForConditionalGeneration": ENCODER_DECODER,
    "Mamba2ForCausalLM": STATE_SPACE,
    "MambaForCausalLM": STATE_SPACE,
    "MarianMTModel": ENCODER_DECODER,
    "MBartForConditionalGeneration": ENCODER_DECODER,
    "MiniMaxM2ForCausalLM": Family(MOE),
    "NemotronForCausalLM": Family(),
    "NemotronHForCausalLM": "attention without rotary positions",
    "MixtralForCausalLM": Family(MOE),
    "MistralForCausalLM": Family({"sliding_window": 6}),
    "Mistral3ForConditionalGeneration": multimodal("mistral", "pixtral"),
    "MPTForCausalLM": "another name of MptForCausalLM",
    "MptForCausalLM": ALIBI,
    "MuseGlimmerForConditionalGeneration": multimodal(
        "", "", {"projector_hidden_size": 16, "out_hidden_size": 64}, **SLIDING
    ),
    "NeoForCausalLM": "another name of GPTNeoForCausalLM",
    "NeoXForCausalLM": "another name of GPTNeoXForCausalLM",
    "NeelSoluOldForCausalLM": LEARNED,
    "OlmoForCausalLM": Family(),
    "Olmo2ForCausalLM": Family(),
    "Olmo3ForCausalLM": Family(SLIDING),
    "OlmoeForCausalLM": Family(EVERY_EXPERT),
    "OlmoHybridForCausalLM": Family({**DELTA_NET, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "OpenAIGPTLMHeadModel": LEARNED,
    "OpenELMForCausalLM": HUB,
    "OPTForCausalLM": LEARNED,
    "PegasusForConditionalGeneration": ENCODER_DECODER,
    "OuroForCausalLM": HUB,
    "PhiForCausalLM": Family(),
    "Phi3ForCausalLM": Family(),
    "PhiMoEForCausalLM": Family(MOE, model="PhimoeForCausalLM"),
    "QwenForCausalLM": HUB,
    "Qwen2ForCausalLM": Family(),
    "Qwen2_5_VLForConditionalGeneration": multimodal("", "", rope_parameters={**MROPE, "mrope_section": [2, 1, 1]}),
    "Qwen2AudioForConditionalGeneration": multimodal("qwen2", outer={"audio_config": AUDIO}),
    "Qwen2MoeForCausalLM": Family({**MOE, "shared_expert_intermediate_size": 16}),
    "Qwen3ForCausalLM": Family(),
    "Qwen3VLForConditionalGeneration": multimodal("", "", rope_parameters={**MROPE, "mrope_section": [2, 1, 1]}),
    "Qwen3VLMoeForConditionalGeneration": multimodal(
        "", "", rope_parameters={**MROPE, "mrope_section": [2, 1, 1]}, **MOE
    ),
    "Qwen3MoeForCausalLM": Family(MOE),
    "Qwen3NextForCausalLM": Family({**MOE, **DELTA_NET, "shared_expert_intermediate_size": 16}),
    "Qwen3_5ForCausalLM": Family({**DELTA_NET, "rope_parameters": MROPE}),
    "Qwen3_5ForConditionalGeneration": multimodal("", "", **DELTA_NET, rope_parameters=MROPE),
    "Qwen3_5MoeForCausalLM": Family(
        {**MOE, **DELTA_NET, "shared_expert_intermediate_size": 16, "rope_parameters": MROPE}
    ),
    "Qwen3_5MoeForConditionalGeneration": multimodal(
        "", "", **MOE, **DELTA_NET, shared_expert_intermediate_size=16, rope_parameters=MROPE
    ),
    "RavenForCausalLM": HUB,
    "RecurrentGemmaForCausalLM": Family({"block_types": ["recurrent", "attention"], "attention_window_size": 6}),
    "SeedOssForCausalLM": Family(),
    "RWKV7ForCausalLM": STATE_SPACE,
    "SmolLM3ForCausalLM": Family({"no_rope_layers": [0, 1]}),
    "StableLmForCausalLM": Family(),
    "Starcoder2ForCausalLM": Family(),
    "T5ForConditionalGeneration": ENCODER_DECODER,
    "MT5ForConditionalGeneration": ENCODER_DECODER,
    "T5WithLMHeadModel": "another name of T5ForConditionalGeneration",
    "T5GemmaForConditionalGeneration": ENCODER_DECODER,
    "T5Gemma2ForConditionalGeneration": ENCODER_DECODER,
    "XGLMForCausalLM": "sinusoids added to the embedding",
    "Zamba2ForCausalLM": Family(
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "chunk_size": 4,
            "mamba_d_state": 8,
            "use_mem_rope": True,
            "num_key_value_heads": 4,
        },
        without=("head_dim",),
    ),
    "NanoGPTForCausalLM": LEARNED,
    "TransformerLensNative": Family(built=False, gap="TransformerLens' own model, not one of transformers"),
    "TransformerLensPretrain": Family(built=False, gap="a module of the user's own, not one of transformers"),
    "MinGPTForCausalLM": LEARNED,
    "GPTNeoForCausalLM": LEARNED,
    "GPTNeoXForCausalLM": Family(without=("num_key_value_heads",)),
    "ViTModel": "an encoder of images",
    "ViTForImageClassification": "an encoder of images",
    "DeiTModel": "an encoder of images",
    "DeiTForImageClassification": "an encoder of images",
}


def config_of(name: str, family: Family) -> Any:
    """The tiny config of a family."""
    kind = getattr(transformers, family.model or name).config_class
    sizes = {n: v for n, v in SIZES.items() if n not in family.without} | family.sizes
    if family.parts is None:
        return kind(**sizes)
    parts = dict(family.parts)
    if text_type := parts.pop("text_type"):
        sizes["model_type"] = text_type
    return kind(text_config=sizes, **parts)


def build(name: str) -> Any:
    """A tiny random model of a family: on the CPU, eager attention, every weight drawn so that positions matter."""
    family = FAMILIES[name]
    assert isinstance(family, Family)
    config = config_of(name, family)
    config.architectures = [name]
    if isinstance(getattr(config, "vision_config", None), transformers.Gemma3nVisionConfig):
        # Its own encoder of images needs a library of vision models; the text does not meet it.
        sizes = config.vision_config.to_dict() | VISION
        config.__dict__["vision_config"] = transformers.SiglipVisionConfig(**sizes)
    torch.manual_seed(0)
    model = getattr(transformers, family.model or name)._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif parameter.is_floating_point():
                parameter.normal_(std=0.25, generator=generator)
    return model.eval()


def plain_bridge(model: Any) -> lp.HookedPositionTransformer:
    """The bridge as TransformerLens builds it around a model that is at hand, without streams."""
    architecture = model.config.architectures[0]
    cfg = build_bridge_config_from_hf(model.config, architecture, architecture, model.dtype)
    kind = SUPPORTED_ARCHITECTURES[architecture]
    with mock.patch.object(kind, "required_libraries", []):  # for pictures; these checks are of text alone
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(cfg)
    adapter.cfg.device = "cpu"
    adapter.prepare_model(model)
    return lp.HookedPositionTransformer(model, adapter, None).eval()


def logits_of(model: Any, **given: Any) -> torch.Tensor:
    """Logits of the fixed tokens, from a model or a bridge."""
    if isinstance(model, TransformerBridge):
        return model(TOKENS, **given)
    return model(input_ids=TOKENS, use_cache=False, **given).logits


def randomize(streams: lp.PositionStreams) -> None:
    """Increments far from one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in streams.named_parameters():
            if ".out." in name:
                parameter.normal_(std=0.5, generator=generator)


def fingerprint(model: Any) -> Any:
    """Everything that attaching could leave behind, weights aside."""
    return [
        (name, type(m), len(m._forward_pre_hooks), len(m._forward_hooks), len(m._forward_hooks_always_called))
        for name, m in model.named_modules()
    ], list(getattr(model, "hook_dict", ()))


SOURCES = {
    "static": lp.PositionConfig("static"),
    "shared": lp.PositionConfig("shared"),
    "per_layer": lp.PositionConfig("per_layer"),
}


@dataclass
class Report:
    """What was measured on one family.

    Attributes:
        layers: the model's numbers of the layers that have a stream; `n_layers` how many there are.
        bare: largest change of a logit through static and fresh streams.
        bridged: the same in the bridge, against the same bridge.
        bridge_alone: largest difference between the logits of the bridge and of the bare model, without streams.
        after, before: an increment made longer at token 4, one layer at a time, bare and bridged: smallest change of a
            logit at that token or after it, largest before it.
        constant: largest relative change when all positions move by 5; where the model itself is not relative, largest
            difference from the untouched model with its position ids moved.
        cached: largest relative difference of logits in generation with and without a cache.
        texts: whether those generated the same tokens.
        gradient: smallest among the largest gradients of the sources' output weights.
        detached: whether detaching gave back modules, hooks and logits, to the bit, bare and bridged.
        per_head: largest relative change through fresh per-head increments, or the sentence that refuses them.
    """

    layers: list[int]
    n_layers: int
    bare: float
    bridged: float
    bridge_alone: float
    after: float
    before: float
    constant: float
    cached: float
    texts: bool
    gradient: float
    detached: bool
    per_head: float | str


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest absolute difference."""
    return (one - other).abs().max().item()


def identity(model: Any) -> tuple[float, bool]:
    """Largest change of a logit through static and fresh streams, and whether detaching restored the model."""
    largest, restored, before = 0.0, True, fingerprint(model)
    inputs: list[dict[str, Any]] = [{}, {"attention_mask": MASK}]
    untouched = [logits_of(model, **given) for given in inputs]
    # DeepseekV2's bridge rounds by the number of rows of its position ids: its logits, given one for each text.
    ids = torch.arange(TOKENS.shape[1]).repeat(len(TOKENS), 1)
    rows = untouched
    if isinstance(model, TransformerBridge) and model.cfg.architecture == "DeepseekV2ForCausalLM":
        rows = [logits_of(model, position_ids=ids, **given) for given in inputs]
    for config in SOURCES.values():
        streams = lp.attach_positions(model, config)
        for given, unwatched, watched in zip(inputs, untouched, rows, strict=True):
            # Watched, static streams compute positions too, which they do for nobody otherwise.
            with streams.record() as increments:
                logits = logits_of(model, **given)
            assert all((recorded == 1).all() for recorded in increments)
            largest = max(largest, min(apart(logits, watched), apart(logits, unwatched)))
            logits = logits_of(model, **given)
            largest = max(largest, min(apart(logits, watched), apart(logits, unwatched)))
        streams.detach()
        restored &= fingerprint(model) == before
    return largest, restored & all(
        torch.equal(logits_of(model, **given), logits) for given, logits in zip(inputs, untouched, strict=True)
    )


def edit(model: Any) -> tuple[float, float, list[int]]:
    """An increment made longer at token 4, one layer at a time: smallest change after it, largest before it.

    Also the model's numbers of those layers.
    """

    def stretch(increments: torch.Tensor, hook: Any) -> torch.Tensor:
        increments[:, 4] = 2.75
        return increments

    untouched, after, before = logits_of(model), float("inf"), 0.0
    streams = lp.attach_positions(model)
    for stream in streams.layers:
        if isinstance(model, TransformerBridge):
            logits = model.run_with_hooks(TOKENS, fwd_hooks=[(stream.hook_increments.name, stretch)])
        else:
            stream.hook_increments.add_hook(stretch)
            logits = logits_of(model)
            stream.hook_increments.remove_hooks()
        change = (logits - untouched).abs().amax(-1)
        after = min(after, change[:, 4:].max().item())
        before = max(before, change[:, :4].max().item())
    if isinstance(model, lp.HookedPositionTransformer):
        assert model.increments(TOKENS).shape == (len(streams.layers), *TOKENS.shape)
    streams.detach()
    return after, before, [stream.layer for stream in streams.layers]


def constant(model: Any, relative: bool) -> float:
    """How far from what it should be a model's logits are when all positions move by 5."""
    moved = {} if relative else {"position_ids": torch.arange(TOKENS.shape[1])[None] + 5}
    expected = logits_of(model, **moved)
    assert relative or apart(expected, logits_of(model)) > 1e-2
    streams = lp.attach_positions(model)
    for stream in streams.layers:
        stream.hook_positions.add_hook(lambda positions, hook: positions + 5)
    change = apart(logits_of(model), expected) / expected.abs().max().item()
    streams.detach()
    return change


def cached(model: Any, source: str) -> tuple[bool, float]:
    """Whether greedy texts with and without a cache are equal, and the largest relative difference of their logits.

    One of the rows is padded on the left.
    """
    streams = lp.attach_positions(model, SOURCES[source])
    randomize(streams)
    how: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": 3, "do_sample": False}
    how |= {"output_logits": True, "return_dict_in_generate": True, "eos_token_id": -1}
    (text, logits), (other, reference) = (
        (out.sequences, torch.stack(out.logits))
        for out in (model.generate(input_ids=TOKENS, use_cache=use_cache, **how) for use_cache in (True, False))
    )
    streams.detach()
    return torch.equal(text, other), apart(logits, reference) / reference.abs().max().item()


def gradient(model: Any) -> float:
    """Smallest among the largest gradients of the sources' output weights; all must be finite."""
    smallest = float("inf")
    for source in ("shared", "per_layer"):
        streams = lp.attach_positions(model, SOURCES[source])
        randomize(streams)
        with torch.enable_grad():
            logits_of(model).square().mean().backward()
        for name, parameter in streams.named_parameters():
            if ".out.weight" in name:
                assert parameter.grad is not None
                assert parameter.grad.isfinite().all()
                smallest = min(smallest, parameter.grad.abs().max().item())
        streams.detach()
        model.zero_grad()
    return smallest


def per_head(model: Any) -> float | str:
    """Largest relative change of a logit through fresh per-head increments, or the sentence that refuses them."""
    untouched = logits_of(model)
    try:
        streams = lp.attach_positions(model, lp.PositionConfig("per_layer", per_head=True))
    except lp.PositionsError as error:
        return str(error)
    change = apart(logits_of(model), untouched) / untouched.abs().max().item()
    streams.detach()
    return change


@functools.cache
def report(name: str) -> Report:
    """Build a family and measure everything."""
    family = FAMILIES[name]
    assert isinstance(family, Family)
    torch.manual_seed(0)
    with torch.no_grad():
        model = build(name)
        untouched = logits_of(model)
        bare, restored = identity(model)
        after, before, layers = edit(model)
        moved = constant(model, family.relative)
        texts, difference = cached(model, "per_layer")
        slope, heads = gradient(model), per_head(model)
        bridge = plain_bridge(model)
        bridge_alone = apart(logits_of(bridge), untouched)
        bridged, restored_too = identity(bridge)
        after_too, before_too, _ = edit(bridge)
    return Report(
        layers=layers,
        n_layers=model.config.get_text_config().num_hidden_layers,
        bare=bare,
        bridged=bridged,
        bridge_alone=bridge_alone,
        after=min(after, after_too),
        before=max(before, before_too),
        constant=moved,
        cached=difference,
        texts=texts,
        gradient=slope,
        detached=restored and restored_too,
        per_head=heads,
    )


ROUNDING = 1e-5
PAGE = Path(__file__).parents[1] / "docs" / "families.md"
CHECKED = [name for name, family in FAMILIES.items() if isinstance(family, Family) and family.gap is None]
COUNTED = [name for name, family in FAMILIES.items() if isinstance(family, Family)]


def failures(result: Report) -> list[str]:
    """What a family does not hold to, by name; an empty list where it is supported."""
    claims = {
        "identity bare": result.bare == 0.0,
        "identity bridged": result.bridged == 0.0,
        "edit after": result.after > 1e-4,
        "edit before": result.before == 0.0,
        "constant": result.constant < ROUNDING,
        "cached": result.texts and result.cached < ROUNDING,
        "gradient": 0 < result.gradient < float("inf"),
        "detach": result.detached,
        "per head": isinstance(result.per_head, str) or result.per_head < ROUNDING,
    }
    return [claim for claim, holds in claims.items() if not holds]


def row(name: str) -> str:
    """One line of the table."""
    family, adapter = FAMILIES[name], SUPPORTED_ARCHITECTURES[name].__name__
    assert isinstance(family, Family)
    head = f"| {name} ({adapter}) |"
    if family.gap is not None:
        return f"{head} no: {family.gap} |" + " |" * 8
    result = report(name)
    missing = failures(result)
    layers = ", ".join(map(str, result.layers))
    refused = re.search("which (.*);", result.per_head) if isinstance(result.per_head, str) else None
    cells = [
        f"no: {', '.join(missing)}" if missing else f"yes, in layers {layers} of {result.n_layers}",
        f"{result.bare:.1g}" if result.bare else "0.0",
        f"{result.bridged:.1g}" if result.bridged else "0.0",
        "0.0" if result.bridge_alone == 0 else "< 1e-4" if result.bridge_alone < 1e-4 else f"{result.bridge_alone:.1g}",
        f"{'changed' if result.after > 1e-4 else 'not changed'} / {result.before:.1g}",
        ("< 1e-5" if result.constant < ROUNDING else f"{result.constant:.1g}") + ("" if family.relative else " *"),
        "equal" if "cached" not in missing else f"{result.cached:.1g}",
        "to the bit" if result.detached else "no",
        f"refused: {refused[1]}" if refused else "exact" if "per head" not in missing else f"{result.per_head:.1g}",
    ]
    return f"{head} {' | '.join(cells)} |"


def page() -> str:
    """docs/families.md."""
    console = Console(stderr=True)
    rows = [row(name) for name in track(COUNTED, "model families", console=console)]
    supported = sum("| yes, " in line for line in rows)
    versions = ", ".join(f"{p} {version(p)}" for p in ("transformer-lens", "transformers", "torch"))
    others = [f"| {name} | {reason} |" for name, reason in FAMILIES.items() if isinstance(reason, str)]
    return f"""# Model families

Position streams are exact in **{supported} of {len(rows)}** architectures: all those among the {len(FAMILIES)} that
TransformerLens has an adapter for which are causal language models with rotary positions. Measured by `make families`
on tiny random models with {versions}; the tests assert the same.

A family counts only if all of this holds, in every layer that rotates its queries and keys:

- *identity*: static streams and fresh `shared` and `per_layer` ones change no logit (largest change 0.0), bare, and in
  the bridge against the same bridge. *bridge alone* is how far the bridge is from the bare model without any streams.
- *edit*: an increment made longer at one token of one layer changes logits at that token or after it, and none before.
- *constant*: moving all positions by 5 changes logits by rounding alone (relative to the largest). Marked *: the model
  itself is not relative, since it scales queries and keys after rotating them; there the logits equal those of the
  untouched model with its position ids moved.
- *cached*: with learned increments, one row padded, text generated with and without a cache is equal, and its logits
  to 1e-5 of the largest.
- *detach*: the model's modules, hooks and logits are what they were, to the bit, bare and bridged.
- *per head*: fresh per-head increments change logits by rounding alone (1e-5 of the largest), or are refused.

Gradients reach the weights of every source in each of them. Layers are the model's own numbers, of how many there are;
the others have no rotary attention, or attend to an earlier layer's keys and go by its positions. DeepseekV2's bridge
rounds by the number of rows of its position ids, and is compared with itself given one row for each text. Models of
several modalities are checked on text alone.

| family (adapter) | supported | identity bare | identity bridged | bridge alone | edit after / before | constant | \
cached | detach | per head |
|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

## Not counted

| architecture | what it is |
|---|---|
{chr(10).join(others)}
""".replace("\\\n", "")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    PAGE.write_text(page(), "utf-8")
    print(PAGE, file=sys.stderr)
