"""Attach position streams to a model, and take them off again.

Every RoPE model of transformers computes (cos, sin) once and hands it to each attention module as the keyword
`position_embeddings`; TransformerLens' attention bridges stand in the same places and take the same keyword. So
forward pre-hooks are enough, in a bare model and in a bridge alike:

    model, stack      note the tokens, the padding mask and the cache of this forward pass
    embedding         compute a shared source's increments
    rotary module     note the model's own position ids, cos and sin
    decoder layer     note what a per-layer source reads
    attention         replace `position_embeddings` by the stream's

Where these modules are, and the few models that do it in another way, is in `sites.py`. Per-head increments cannot
pass through that keyword, which all heads share: there the outputs of the query and key projections are rotated head
by head and the attention module is handed the identity rotation. Where that is not exact, attaching refuses.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from .errors import PositionsError
from .hooks import run_hook
from .increments import PositionConfig, build_sources
from .rotary import RotaryCall, Rotation, rotate, rotate_heads
from .sites import RotaryAttention, Site, argument, parameters
from .streams import ForwardPass, PositionStream


class PositionStreams(nn.Module):
    """The position streams of one model: the handle that `attach_positions` returns.

    Registered in the model as `position_streams`, so that the sources' weights train, move and count with it.
    """

    def __init__(self, config: PositionConfig, sources: nn.ModuleList, numbers: list[int], n_heads: int) -> None:
        super().__init__()
        self.config = config
        self.shared_source = sources[0] if len(sources) == 1 and config.source != "per_layer" else None
        own: list[nn.Module | None] = list(sources) if config.source == "per_layer" else [None] * len(numbers)
        self.layers = nn.ModuleList(PositionStream(config, i, n, own[i], n_heads) for i, n in enumerate(numbers))
        self.hook_increments = HookPoint()
        self.hook_increments.name = "hook_increments"
        self._step = ForwardPass()
        self._given: tuple[Any, Any] = (None, None)
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PositionStreams":
        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            half = moved.dtype in (torch.bfloat16, torch.float16)
            return tensor.to(moved.device, torch.float32) if half else moved

        return super()._apply(keep_wide, recurse)

    def _note_model(self, names: list[str], _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What the model was given: a model of images and text embeds the tokens before it calls its decoder."""
        self._given = argument(names, args, kwargs, "input_ids"), argument(names, args, kwargs, "attention_mask")

    def _start(
        self,
        layers: list[nn.Module],
        first_block: nn.Module,
        names: list[str],
        _module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if self.config.source == "shared" and getattr(first_block, "_start_at_layer_idx", None):
            raise PositionsError(
                "start_at_layer leaves out the token embeddings, which the shared source reads; expected a forward "
                "pass from tokens."
            )
        tokens, mask = (argument(names, args, kwargs, name) for name in ("input_ids", "attention_mask"))
        tokens = self._given[0] if tokens is None else tokens
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else self._given[1]
        cache = argument(names, args, kwargs, "past_key_values")
        self._given = None, None
        self._step = ForwardPass(
            tokens=tokens,
            mask=mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None,
            cache=cache,
            past_length=0 if cache is None else int(cache.get_seq_length()),
            embeddings=argument(names, args, kwargs, "inputs_embeds"),
            checkpointed=any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in layers),
            with_grad=torch.is_grad_enabled(),
        )
        if self.config.source == "frozen" or self._step.embeddings is not None:
            self._share_increments()

    def _finish(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        # Checkpointed layers run again in the backward pass and need what they shared.
        if not self._step.checkpointed:
            self._step = ForwardPass()

    def _note_embeddings(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        if self._step.tokens is not None and self._step.embeddings is None:
            self._step.embeddings = output
            self._share_increments()

    def _note_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._step.rotary_calls.append(RotaryCall.of(module, args, kwargs, output))

    def _share_increments(self) -> None:
        """The increments of a source that all layers share, once a forward pass and outside checkpointed layers."""
        if self.shared_source is None or self._step.increments is not None:
            return
        reads = self._step.tokens if self.config.source == "frozen" else self._step.embeddings
        if reads is None:
            raise PositionsError(
                "the frozen source was given embeddings without token ids; expected input_ids, since it looks "
                "increments up by token."
            )
        with torch.autocast(reads.device.type, enabled=False):
            self._step.increments = run_hook(self.hook_increments, self.shared_source(reads))

    def _note_residual(
        self,
        stream: int,
        names: list[str],
        reads: str,
        _module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if not self._step.checkpointed:
            self._step.residuals.clear()
        self._step.residuals[stream] = argument(names, args, kwargs, reads)

    def _call_behind(self, rotation: Any) -> RotaryCall | None:
        calls = self._step.rotary_calls
        for same in (_is_same, _is_part):  # part of it where the model computes its last tokens alone
            for call in calls:
                if any(same(own, given) for own in _tensors(call.rotation) for given in _tensors(rotation)):
                    return call
        return calls[0] if len(calls) == 1 and not self._step.checkpointed else None

    def _turn(self, stream: int, states: Tensor, rotation: Any, call: RotaryCall | None) -> Rotation | None:
        """The rotation of one attention in this forward pass; None where it is the model's own."""
        if rotation is not None and call is None:
            call = self._call_behind(rotation)
        turned = self.layers[stream](states, call, self._step)
        if turned is None or not self.config.per_head:
            return turned
        self._step.heads[stream] = turned
        cos, sin = rotation
        return torch.ones_like(cos), torch.zeros_like(sin)

    def _follow(self, leader: int, states: Tensor, rotation: Any, call: RotaryCall | None) -> Rotation | None:
        """The rotation of a layer that attends to another layer's keys: by the positions of that layer.

        Where the layer sees the last tokens only, theirs; None where the positions are the model's own.
        """
        if leader not in self._step.turned:
            return None
        positions, its_call, turned = self._step.turned[leader]
        call = self._call_behind(rotation) if call is None else call
        if call is None:
            raise PositionsError(
                "a layer has cos and sin from no rotary call of this forward pass; expected the model's."
            )
        if its_call is not call:
            turned = rotate(positions, call)
        last = slice(-states.shape[1], None)
        return turned[:, last] if isinstance(turned, Tensor) else (turned[0][:, last], turned[1][:, last])

    def _note_cache(self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._step.cache is None:  # one that the decoder stack made itself, empty
            self._step.cache = argument(site.parameters, args, kwargs, "past_key_values")
            if self._step.cache is None:
                self._step.cache = argument(site.parameters, args, kwargs, "layer_past")
        if self.config.per_head:
            bridge_config = getattr(module, "config", None)
            for switch in ("use_split_qkv_input", "use_attn_in"):
                if getattr(bridge_config, switch, False) is True:
                    raise PositionsError(
                        f"set_{switch}(True) goes around the projections, whose outputs per-head increments rotate; "
                        f"expected set_{switch}(False) or per_head=False."
                    )

    def _rotate_output(
        self, stream: int, d_head: int, _module: nn.Module, _args: tuple[Any, ...], output: Tensor
    ) -> Tensor | None:
        cos_sin = self._step.heads.get(stream)
        return None if cos_sin is None else rotate_heads(output, cos_sin, d_head)

    @contextmanager
    def recorded(self) -> Iterator[list[Float[Tensor, "rows pos *head"]]]:
        """Collect the increments of every forward pass in the block: a list of one tensor a layer, on its end.

        For models outside a bridge; passes of equal length are stacked along the batch.
        """
        kept: list[list[Tensor]] = [[] for _ in self.layers]
        collected: list[Tensor] = []
        hooks = []
        for stream, values in zip(self.layers, kept, strict=True):
            keep = partial(_keep, values)
            hooks.append(cast(HookPoint, stream.hook_increments).register_forward_hook(keep))
        try:
            yield collected
            collected.extend(torch.cat(values) for values in kept)
        finally:
            for hook in hooks:
                hook.remove()

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
    (per_head: to rounding). In a bridge the hook points are `blocks.{l}.attn.hook_increments`, `hook_positions` and
    `hook_rotation`, and `hook_increments` at the root for a shared or frozen source. Layers without RoPE have none; a
    forward pass over three tokens, in eval mode, shows which those are (hooks that are registered already run then).
    Outside a bridge, a hook that edits embeddings or the residual stream is seen by a source if it was registered
    before attaching; a bridge's hook points are always seen.

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
    base = unbridged(model)
    refuse_attached(base)
    found = RotaryAttention(base)
    own = [site for site in found.sites if site.leader is None]
    text = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    n_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if config.per_head:
        for site in found.sites:
            _refuse_inexact_heads(site, found, text.hidden_size)
    first = next(base.parameters())
    sources = build_sources(
        config,
        n_layers=len(own),
        d_model=text.hidden_size,
        n_heads=n_heads,
        vocab=base.get_input_embeddings().weight.shape[0],
        dtype=torch.float64 if first.dtype == torch.float64 else torch.float32,
        table=table,
    ).to(first.device)

    streams = PositionStreams(config, sources, [site.number for site in own], n_heads)
    layers = [site.layer for site in found.sites]
    start = partial(streams._start, layers, found.wrapper(layers[0]), parameters(found.stack))
    handles = [
        base.register_forward_pre_hook(partial(streams._note_model, parameters(base)), with_kwargs=True),
        found.stack.register_forward_pre_hook(start, with_kwargs=True),
        found.stack.register_forward_hook(streams._finish, always_call=True),
        base.get_input_embeddings().register_forward_hook(streams._note_embeddings),
        *(r.register_forward_hook(streams._note_rotary, with_kwargs=True) for r in found.rotary),
    ]
    for i, site in enumerate(own):
        names = parameters(site.layer)
        note = partial(streams._note_residual, i, names, "hidden_states" if "hidden_states" in names else names[0])
        layer = site.wrapper if site.layer is site.attention else site.layer
        handles.append(layer.register_forward_pre_hook(note, with_kwargs=True))
        handles.append(site.wrapper.register_forward_pre_hook(partial(streams._note_cache, site), with_kwargs=True))
        handles += site.hook(partial(streams._turn, i))
        if config.per_head:
            for projection in (site.attention.q_proj, site.attention.k_proj):
                turn = partial(streams._rotate_output, i, site.attention.head_dim)
                handles.append(projection.register_forward_hook(turn))
    for site in found.sites:
        if site.leader is not None:
            handles += site.hook(partial(streams._follow, site.leader))
            cast(PositionStream, streams.layers[site.leader]).followed = True
    streams._undo.extend(handle.remove for handle in handles)
    base.add_module("position_streams", streams)
    streams._undo.append(partial(_remove_module, base, "position_streams"))
    if bridge is not None:
        _add_hook_points(bridge, streams, found)
    return streams


def increment_table(model: Any) -> Float[Tensor, "vocab *head"]:
    """The increment of every token id, from a shared or frozen source: what a frozen source looks up.

    Args:
        model: a transformers model or a bridge with streams attached.

    Raises:
        PositionsError: its increments are no function of the token alone.
    """
    base = unbridged(model)
    streams: PositionStreams = base.position_streams
    if streams.shared_source is None:
        raise PositionsError(
            f"the source is {streams.config.source!r}, whose increments are no function of the token; expected a model "
            "with a shared or frozen source."
        )
    embedding = base.get_input_embeddings()
    ids = torch.arange(embedding.weight.shape[0], device=embedding.weight.device)[None]
    with torch.no_grad():
        return streams.shared_source(ids if streams.config.source == "frozen" else embedding(ids))[0]


def _keep(values: list[Tensor], _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
    values.append(output.detach())


def unbridged(model: Any) -> Any:
    """The transformers model inside a bridge or what peft wraps around it, or the model itself.

    Raises:
        PositionsError: peft puts tokens of its own in front, which only its wrapper does.
    """
    if isinstance(model, TransformerBridge):
        return model.original_model
    if not isinstance(model, PeftModel | PeftMixedModel | BaseTuner):
        return model
    configs: dict[str, Any] = model.peft_config
    for name, config in configs.items():
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise PositionsError(
                f"the adapter {name!r} of the model is {config.peft_type.value}, which puts tokens of its own in "
                "front; expected one that adapts weights, such as LoRA."
            )
    return model.model if isinstance(model, BaseTuner) else unbridged(model.base_model)


def refuse_attached(base: Any) -> None:
    """Refuse a model, or a part of one, that has streams.

    Raises:
        PositionsError: it has.
    """
    modules = base.modules() if isinstance(base, nn.Module) else ()
    hooks = (hook for module in modules for hook in module._forward_pre_hooks.values())
    if any(isinstance(getattr(getattr(h, "func", h), "__self__", None), PositionStreams) for h in hooks):
        raise PositionsError("position streams are attached to this model already; expected detach() on them first.")


def _is_same(own: Tensor, given: Tensor) -> bool:
    return own is given


def _is_part(own: Tensor, given: Tensor) -> bool:
    return not own.is_meta and own.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()


def _tensors(rotation: Any) -> tuple[Tensor, ...]:
    return (rotation,) if isinstance(rotation, Tensor) else tuple(rotation or ())


def _remove_module(owner: nn.Module, name: str) -> None:
    del owner._modules[name]


def _refuse_inexact_heads(site: Site, found: RotaryAttention, d_model: int) -> None:
    attention: Any = site.attention
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
    clipped = getattr(getattr(attention, "config", None), "clip_qkv", None) is not None
    if clipped or not found.rotary or not _heads_rotate_like_halves(attention, found.rotary[0], d_model):
        raise PositionsError(
            f"per-head increments are not exact in {kind}, which does not rotate the two halves of each whole head "
            "straight after the projection; expected a model such as Llama, or per_head=False."
        )


def _heads_rotate_like_halves(attention: Any, rotary: nn.Module, d_model: int) -> bool:
    """Try it: the attention with its own rotation against rotated projections and the identity rotation."""
    weight, training = next(attention.parameters()), attention.training
    states = torch.randn(1, 8, d_model, generator=torch.Generator().manual_seed(0)).to(weight)
    hooks = []
    try:
        attention.eval()
        with torch.no_grad():
            # Large enough for scores of a few units, which turning makes a difference to.
            states *= 2 / (attention.q_proj(states).std() * attention.k_proj(states).std()).sqrt()
            cos, sin = rotary(states, 7 * torch.arange(8, device=weight.device)[None])
            own = attention(states, position_embeddings=(cos, sin), attention_mask=None)[0]
            turn = partial(_rotate_projection, (cos[:, :, None], sin[:, :, None]), attention.head_dim)
            hooks = [p.register_forward_hook(turn) for p in (attention.q_proj, attention.k_proj)]
            identity = torch.ones_like(cos), torch.zeros_like(sin)
            ours = attention(states, position_embeddings=identity, attention_mask=None)[0]
        return bool((ours - own).abs().max() <= 0.02 * own.abs().max())
    except (RuntimeError, TypeError, ValueError):
        return False
    finally:
        attention.train(training)
        for hook in hooks:
            hook.remove()


def _rotate_projection(
    cos_sin: tuple[Tensor, Tensor], d_head: int, _module: nn.Module, _args: tuple[Any, ...], output: Tensor
) -> Tensor:
    return rotate_heads(output, cos_sin, d_head)


def _add_hook_points(bridge: Any, streams: PositionStreams, found: RotaryAttention) -> None:
    added: list[tuple[nn.Module, str]] = []
    if streams.shared_source is not None:
        bridge.add_module("hook_increments", streams.hook_increments)
        added.append((bridge, "hook_increments"))
    for stream, site in zip(streams.layers, (site for site in found.sites if site.leader is None), strict=True):
        component = site.wrapper
        if component is site.attention:  # inside a block that the bridge leaves whole
            block = found.component_around(site)
            component = nn.Module()
            block._modules["attn"] = component
            added.append((block, "attn"))
        for name in ("hook_increments", "hook_positions", "hook_rotation"):
            component.add_module(name, getattr(stream, name))
            added.append((component, name))
    bridge._scan_existing_hooks(bridge, "")
    streams._undo.append(partial(_remove_hook_points, bridge, added))


def _remove_hook_points(bridge: Any, added: list[tuple[nn.Module, str]]) -> None:
    hooks = {id(owner._modules.pop(name)) for owner, name in added}
    for name in [name for name, hook in bridge._hook_registry.items() if id(hook) in hooks]:
        del bridge._hook_registry[name]
