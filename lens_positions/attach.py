"""Attach position streams to a model, and take them off again.

Every RoPE model of transformers computes (cos, sin) once and hands it to each attention module as the keyword
`position_embeddings`; TransformerLens' attention bridges stand in the same places and take the same keyword. So
forward pre-hooks are enough, in a bare model and in a bridge alike:

    decoder stack     note the tokens, the padding mask and the cache of this forward pass
    embedding         note what a shared source reads
    rotary module     note the model's own position ids, cos and sin
    decoder layer     note what a per-layer source reads
    attention         replace `position_embeddings` by the stream's

Modules are found by what they are: attention is the innermost module whose forward takes `position_embeddings`,
a rotary module has inverse frequencies and takes `position_ids`. Per-head increments cannot pass through that
keyword, which all heads share: there the outputs of the query and key projections are rotated head by head and the
attention module is handed the identity rotation. Where that is not exact, attaching refuses.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from .errors import PositionsError
from .increments import PositionConfig, build_sources
from .streams import ForwardPass, PositionStream, RotaryCall, rotate_heads, run_hook


class PositionStreams(nn.Module):
    """The position streams of one model: the handle that `attach_positions` returns.

    Registered in the model as `position_streams`, so that the sources' weights train, move and count with it.
    """

    def __init__(self, config: PositionConfig, sources: nn.ModuleList, n_layers: int, n_heads: int) -> None:
        super().__init__()
        self.config = config
        self.shared_source = sources[0] if len(sources) == 1 and config.source != "per_layer" else None
        own: list[nn.Module | None] = list(sources) if config.source == "per_layer" else [None] * n_layers
        self.layers = nn.ModuleList(PositionStream(config, i, own[i], n_heads) for i in range(n_layers))
        self.hook_increments = HookPoint()
        self.hook_increments.name = "hook_increments"
        self._step = ForwardPass()
        self._undo: list[Callable[[], object]] = []

    @property
    def attached(self) -> bool:
        """Whether the streams are part of their model's forward pass."""
        return bool(self._undo)

    def detach(self) -> None:
        """Take the streams off; the model is the one it was, to the bit. Detaching twice does nothing."""
        while self._undo:
            self._undo.pop()()
        self._step = ForwardPass()

    def _start(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        mask = kwargs.get("attention_mask")
        self._step = ForwardPass(
            tokens=tokens,
            mask=mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None,
            cache=kwargs.get("past_key_values"),
            embeddings=kwargs.get("inputs_embeds"),
        )

    def _note_embeddings(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        if self._step.embeddings is None:
            self._step.embeddings = output

    def _note_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = dict(kwargs)
        states = given.pop("x") if "x" in given else args[0]
        ids = given.pop("position_ids") if "position_ids" in given else args[1]
        self._step.rotary_calls.append(RotaryCall(module, tuple(args[2:]), given, states, ids, output))
        if self.shared_source is not None and self._step.increments is None:
            reads = self._step.tokens if self.config.source == "frozen" else self._step.embeddings
            if reads is None:
                raise PositionsError(
                    "the frozen source was given embeddings without token ids; expected input_ids, since it looks "
                    "increments up by token."
                )
            with torch.autocast(states.device.type, enabled=False):
                self._step.increments = run_hook(self.hook_increments, self.shared_source(reads))

    def _note_residual(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._step.residual = args[0] if args else kwargs["hidden_states"]

    def _call_behind(self, cos_sin: tuple[Tensor, Tensor]) -> RotaryCall:
        calls = self._step.rotary_calls
        return next((call for call in calls if call.cos_sin[0] is cos_sin[0]), calls[0])

    def _enter_attention(
        self,
        layer: int,
        heads: list[Tensor],
        _module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if kwargs.get("position_embeddings") is None:
            return None
        states = args[0] if args else kwargs["hidden_states"]
        call = self._call_behind(kwargs["position_embeddings"])
        cos_sin = self.layers[layer](states, call, self._step)
        heads.clear()
        if cos_sin is None:
            return None
        if self.config.per_head:
            heads.extend(cos_sin)
            cos_sin = torch.ones_like(call.cos_sin[0]), torch.zeros_like(call.cos_sin[1])
        return args, {**kwargs, "position_embeddings": cos_sin}

    def extra_repr(self) -> str:
        """The configuration, for printing a model."""
        return str(self.config)


def attach_positions(
    model: nn.Module,
    positions: Literal["static"] | PositionConfig = "static",
    *,
    table: Float[Tensor, "vocab *head"] | None = None,
) -> PositionStreams:
    """Make the increments and positions of every rotary layer of a model activations of their own.

    A fresh source gives increments of exactly 1.0, so the model computes what it computed before, to the bit
    (per_head: to rounding). In a bridge the hook points are `blocks.{l}.attn.hook_increments` and
    `blocks.{l}.attn.hook_positions`, and `hook_increments` at the root for a shared or frozen source.

    Args:
        model: a `transformers` causal language model with rotary positions, or a TransformerBridge on one.
        positions: "static", or a PositionConfig.
        table: increments by token id, for a frozen source.

    Returns:
        The streams; `detach()` takes them off.

    Raises:
        PositionsError: the model has no rotary attention that can be reached, has streams already, or per-head
            increments would not be exact in it. The model is untouched then.
    """
    config = PositionConfig(source="static") if positions == "static" else positions
    if not isinstance(config, PositionConfig):
        raise PositionsError(f'positions is {positions!r}; expected "static" or a PositionConfig.')
    bridge = model if isinstance(model, TransformerBridge) else None
    base: Any = bridge.original_model if bridge is not None else model
    if "position_streams" in base._modules:
        raise PositionsError("position streams are attached to this model already; expected detach() on them first.")

    found = find_rotary_attention(base)
    text = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    n_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if config.per_head:
        for attention in found.attention:
            _refuse_inexact_heads(attention)
    first = next(base.parameters())
    sources = build_sources(
        config,
        n_layers=len(found.attention),
        d_model=text.hidden_size,
        n_heads=n_heads,
        vocab=base.get_input_embeddings().weight.shape[0],
        dtype=torch.float64 if first.dtype == torch.float64 else torch.float32,
        table=table,
    ).to(first.device)

    streams = PositionStreams(config, sources, len(found.attention), n_heads)
    handles = [
        found.stack.register_forward_pre_hook(streams._start, with_kwargs=True),
        base.get_input_embeddings().register_forward_hook(streams._note_embeddings),
        *(r.register_forward_hook(streams._note_rotary, with_kwargs=True) for r in found.rotary),
    ]
    for layer, attention in enumerate(found.attention):
        heads: list[Tensor] = []
        handles.append(found.decoder_layers[layer].register_forward_pre_hook(streams._note_residual, with_kwargs=True))
        enter = partial(streams._enter_attention, layer, heads)
        handles.append(found.wrapper(attention).register_forward_pre_hook(enter, with_kwargs=True))
        if config.per_head:
            for projection in (attention.q_proj, attention.k_proj):
                handles.append(projection.register_forward_hook(partial(_rotate_output, heads, attention.head_dim)))
        stream: Any = streams.layers[layer]
        stream.cache_layer = getattr(attention, "layer_idx", layer)
    streams._undo.extend(handle.remove for handle in handles)
    base.add_module("position_streams", streams)
    streams._undo.append(partial(base._modules.pop, "position_streams"))
    if bridge is not None:
        _add_hook_points(bridge, streams, found)
    return streams


class RotaryAttention:
    """Where a model's rotary attention is.

    Attributes:
        attention: the attention modules, in order.
        decoder_layers: the decoder layer around each of them.
        rotary: the modules that turn position ids into cos and sin.
        stack: the module that calls them all (`model.model` in a Llama).
    """

    def __init__(self, base: nn.Module) -> None:
        wrappers = {id(m.original_component): m for m in base.modules() if _is_wrapper(m)}
        own = [(name, m) for name, m in base.named_modules() if not _is_wrapper(m)]
        takes = [(name, m) for name, m in own if "position_embeddings" in inspect.signature(m.forward).parameters]
        self._wrappers = wrappers
        self.attention: list[Any] = [
            m for name, m in takes if not any(other.startswith(name + ".") for other, _ in takes if other != name)
        ]
        self.rotary = [
            m
            for _, m in own
            if "position_ids" in inspect.signature(m.forward).parameters
            and any(n.endswith("inv_freq") for n, _ in m.named_buffers(recurse=False))
        ]
        names = {id(m): name for name, m in own}
        self.decoder_layers = [_ancestor(own, names[id(m)], "hidden_states") for m in self.attention]
        self.stack = _ancestor(own, names[id(self.rotary[0])], "input_ids") if self.rotary else base

    def wrapper(self, module: nn.Module) -> nn.Module:
        """The bridge component that stands in for a module, or the module itself where there is none."""
        return self._wrappers.get(id(module), module)


def find_rotary_attention(base: Any) -> RotaryAttention:
    """Find the attention and rotary modules of a `transformers` model, bridged or not.

    Raises:
        PositionsError: there are none, or the model is not a causal decoder.
    """
    name = type(base).__name__
    if not hasattr(base, "get_input_embeddings") or not hasattr(base, "config"):
        raise PositionsError(f"the model is a {name}; expected a transformers model or a TransformerBridge.")
    found = RotaryAttention(base)
    if not found.rotary or not found.attention:
        raise PositionsError(
            f"{name} has no attention that takes rotary position_embeddings; expected a RoPE model such as Llama, "
            "Qwen, Gemma or GPT-NeoX."
        )
    return found


def _is_wrapper(module: nn.Module) -> bool:
    return getattr(module, "original_component", None) is not None


def _ancestor(own: list[tuple[str, nn.Module]], name: str, parameter: str) -> nn.Module:
    above = [m for n, m in own if (name.startswith(n + ".") or n == "") and n != name]
    return next(m for m in reversed(above) if parameter in inspect.signature(m.forward).parameters)


def _refuse_inexact_heads(attention: nn.Module) -> None:
    kind = type(attention).__name__
    normed = [n for n, _ in attention.named_children() if "norm" in n]
    if not (hasattr(attention, "q_proj") and hasattr(attention, "k_proj") and hasattr(attention, "head_dim")):
        raise PositionsError(
            f"per-head increments are not exact in {kind}, which has no separate query and key projections; expected "
            "a model such as Llama, or per_head=False."
        )
    if normed:
        raise PositionsError(
            f"per-head increments are not exact in {kind}, which has {normed[0]} between projection and rotation; "
            "expected a model without it, or per_head=False."
        )


def _rotate_output(
    heads: list[Tensor], d_head: int, _module: nn.Module, _args: tuple[Any, ...], output: Tensor
) -> Tensor | None:
    return rotate_heads(output, (heads[0], heads[1]), d_head) if heads else None


def _add_hook_points(bridge: Any, streams: PositionStreams, found: RotaryAttention) -> None:
    added: list[tuple[nn.Module, str]] = []
    if streams.shared_source is not None:
        bridge.add_module("hook_increments", streams.hook_increments)
        added.append((bridge, "hook_increments"))
    wrapped = [found.wrapper(m) for m in found.attention]
    for stream, attention in zip(streams.layers, wrapped, strict=True):
        for name in ("hook_increments", "hook_positions"):
            attention.add_module(name, getattr(stream, name))
            added.append((attention, name))
    bridge._scan_existing_hooks(bridge, "")

    def remove() -> None:
        hooks = {id(owner._modules.pop(name)) for owner, name in added}
        for name in [name for name, hook in bridge._hook_registry.items() if id(hook) in hooks]:
            del bridge._hook_registry[name]

    streams._undo.append(remove)
