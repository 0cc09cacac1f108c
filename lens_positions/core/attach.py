"""Attach position streams to a model, and take them off again.

Every RoPE model of transformers computes (cos, sin) once and hands it to each attention module as the keyword
`position_embeddings`; TransformerLens' attention bridges stand in the same places and take the same keyword. So
forward hooks are enough, in a bare model and in a bridge alike:

    model, stack      note the tokens, the mask and the cache of this forward pass (`forward_pass.py`)
    embedding         compute a shared source's increments
    rotary module     note the model's own position ids, cos and sin
    decoder layer     note what a per-layer source reads
    attention         replace `position_embeddings` by the stream's

Where these modules are, and the few models that do it in another way, is in `find_attention.py`; positions of single
heads are in `per_head.py`.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from ..errors import PositionsError
from .devices import device_of, floating_dtype
from .find_attention import Link, RotaryAttention, Site, argument, links_to, parameters
from .forward_pass import CurrentPass, ForwardPass, tagged_pass
from .hook_points import StreamHookPoint, run_hook
from .increments import PositionConfig, build_sources
from .model_wrappers import unwrapped
from .per_head import hook_projections, identity_like, projections_of, refuse_inexact_heads, refuse_split_inputs
from .positions import CosSin
from .rotation import RotaryCall, Rotation, moved_to, rotate, tensors_of
from .stream import PositionStream, full_precision
from .transformer_lens_internals import hook_registry, scan_hook_points, skips_embeddings


class PositionStreams(nn.Module):
    """The position streams of one model: the handle that `attach_positions` returns.

    It is registered in the model as `position_streams`, so that the sources' weights train, move and count with it. Its
    private methods are the hooks, in the order in which a forward pass comes by them.

    Attributes:
        config: what the source is.
        shared_source: the source of all layers, where it is shared or frozen.
        layers: a `PositionStream` for each layer that rotates by positions of its own.
        hook_increments: the hook point of the shared source.
    """

    def __init__(self, config: PositionConfig, sources: nn.ModuleList, numbers: list[int], n_heads: int) -> None:
        super().__init__()
        self.config = config
        self.shared_source = sources[0] if len(sources) == 1 and config.source != "per_layer" else None
        own: list[nn.Module | None] = list(sources) if config.source == "per_layer" else [None] * len(numbers)
        self.layers = nn.ModuleList(PositionStream(config, i, n, own[i], n_heads) for i, n in enumerate(numbers))
        self.hook_increments = StreamHookPoint()
        self.hook_increments.name = "hook_increments"
        self._current = CurrentPass()
        self._undo: list[Callable[[], object]] = []

    @property
    def attached(self) -> bool:
        """Whether the streams are hooked into their model."""
        return bool(self._undo)

    def detach(self) -> None:
        """Take the streams off; the model is the one it was, to the bit. Detaching twice does nothing."""
        while self._undo:
            self._undo.pop()()
        self._current = CurrentPass()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PositionStreams":
        """Move with the model, and keep float32 where the model becomes bf16 or float16."""

        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            half = moved.dtype in (torch.bfloat16, torch.float16)
            return tensor.to(moved.device, torch.float32) if half else moved

        return super()._apply(keep_wide, recurse)

    def _begin(
        self, names: list[str], links: list[Link], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Begin a pass: the model is called, which may embed tokens and images before it calls its decoder."""
        # Before any refusal: `_end` is called in either case, and must find this pass and not one around it.
        self._current.begin(
            ForwardPass(
                tokens=argument(names, args, kwargs, "input_ids"),
                mask=argument(names, args, kwargs, "attention_mask"),
                ids_given=argument(names, args, kwargs, "position_ids") is not None,
            )
        )

        if module._modules.get("position_streams") is not self:
            raise PositionsError(
                "the model's position_streams are a copy of those that run (as peft's modules_to_save and DataParallel "
                "make them), so what trains would not act; expected the model without that copy."
            )
        for link in links:
            link.refuse_replaced()

    def _start(
        self,
        layers: list[nn.Module],
        first_block: nn.Module,
        names: list[str],
        _module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Note what the decoder is given: tokens or embeddings, mask, cache, and how it will run."""
        if self.config.source == "shared" and skips_embeddings(first_block):
            raise PositionsError(
                "start_at_layer leaves out the token embeddings, which the shared source reads; expected a forward "
                "pass from tokens."
            )

        forward_pass = self._current.get()
        if forward_pass is None or forward_pass.started:  # the decoder alone, without the model around it
            forward_pass = ForwardPass(own_decoder=True)
            self._current.begin(forward_pass)
        forward_pass.started = True

        # The model's padding mask says more than the mask of scores that it makes of it for its decoder.
        tokens, mask = (argument(names, args, kwargs, name) for name in ("input_ids", "attention_mask"))
        forward_pass.tokens = forward_pass.tokens if tokens is None else tokens
        if mask is not None and not (isinstance(forward_pass.mask, Tensor) and forward_pass.mask.ndim == 2):
            forward_pass.mask = mask

        forward_pass.ids_given = forward_pass.ids_given or argument(names, args, kwargs, "position_ids") is not None
        forward_pass.cache = argument(names, args, kwargs, "past_key_values")
        forward_pass.past_length = 0 if forward_pass.cache is None else int(forward_pass.cache.get_seq_length())
        forward_pass.embeddings = argument(names, args, kwargs, "inputs_embeds")

        forward_pass.checkpointed = any(m.training and getattr(m, "gradient_checkpointing", False) for m in layers)
        forward_pass.paged = "read_index" in kwargs and "write_index" in kwargs
        forward_pass.with_grad = torch.is_grad_enabled()

        # The frozen source reads token ids; given embeddings pass by the embedding module and its hook.
        if self.config.source == "frozen" or forward_pass.embeddings is not None:
            self._share_increments(forward_pass)

    def _finish(
        self,
        compiled: list[nn.Module],
        links: list[Link],
        _module: nn.Module,
        _args: tuple[Any, ...],
        output: Any,
    ) -> None:
        """Check that all streams ran: the decoder returned, or failed (then there is no output)."""
        forward_pass = self._current.get()
        if forward_pass is None:
            return
        ran = len(forward_pass.calls)
        if forward_pass.own_decoder:
            self._current.end()

        # Fewer may be right (a layer that is left out), or a module was replaced, or a graph is from before.
        if output is not None and ran < len(self.layers) and not torch.compiler.is_compiling():
            for link in links:
                link.refuse_replaced()
            _refuse_stale_graphs(compiled, ran, len(self.layers))

    def _end(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        """End the pass: the model returned, or failed."""
        self._current.end()

    def _note_embeddings(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        """Compute shared increments from the tokens' embeddings."""
        forward_pass = self._current.get()
        if forward_pass is None or not forward_pass.started:
            return  # a model of images and text, which hands the embeddings to its decoder

        if forward_pass.tokens is not None and forward_pass.embeddings is None:
            forward_pass.embeddings = output
            self._share_increments(forward_pass)

    def _note_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note a call of a rotary module, by which layers that have its result are recognised."""
        forward_pass = self._current.get()
        if forward_pass is not None:
            call = RotaryCall.of(module, args, kwargs, output)
            forward_pass.rotary_calls.append(call)
            if forward_pass.checkpointed:
                for tensor in call.tensors():
                    forward_pass.tag(tensor, call)

    def _share_increments(self, forward_pass: ForwardPass) -> None:
        """Compute the increments that all layers share, once a forward pass and outside checkpointed layers."""
        if self.shared_source is None or forward_pass.increments is not None:
            return
        reads = forward_pass.tokens if self.config.source == "frozen" else forward_pass.embeddings
        if reads is None:
            raise PositionsError(
                "the frozen source was given embeddings without token ids; expected input_ids, since it looks "
                "increments up by token."
            )
        with full_precision(reads.device.type):
            forward_pass.increments = run_hook(self.hook_increments, self.shared_source(reads))

    def _note_residual(
        self,
        stream: int,
        names: list[str],
        reads: str,
        _module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Note the residual stream that enters a layer, which its source reads when the layer's attention runs."""
        forward_pass = self._current.get()
        if forward_pass is None:  # a checkpointed layer runs again, on what it had
            return

        # Of other layers only those that will run again are kept.
        if not forward_pass.checkpointed:
            forward_pass.residuals.clear()
        forward_pass.residuals[stream] = argument(names, args, kwargs, reads)

    def _pass_of(
        self, rotation: Any, call: RotaryCall | None
    ) -> tuple[ForwardPass, RotaryCall | None] | tuple[None, None]:
        """Return the forward pass that an attention runs in, and the rotary call that its rotation is from."""
        forward_pass = self._current.get()
        if forward_pass is not None and not forward_pass.finished:
            if call is None:
                return forward_pass, None if rotation is None else _call_behind(rotation, forward_pass)
            if forward_pass.checkpointed:  # the attention itself made this call, and makes another when it runs again
                forward_pass.tag(call.position_ids, None)
            return forward_pass, call

        # No pass runs: a checkpointed layer runs again, in the backward pass.
        again, known = tagged_pass(rotation if call is None else call.position_ids)
        self._current.resume(again)
        return (None, None) if again is None else (again, known if call is None else call)

    def _rotation_of(self, stream: int, states: Tensor, rotation: Any, call: RotaryCall | None) -> Rotation | None:
        """Return the rotation of one attention in this forward pass; None where it is the model's own."""
        forward_pass, call = self._pass_of(rotation, call)
        own = cast(PositionStream, self.layers[stream])
        if forward_pass is None:
            raise PositionsError(
                f"layer {own.layer} runs outside a forward pass of its model; expected the model to be called as a "
                "whole (with gradient checkpointing: gradient_checkpointing_enable(), in a model that hands cos and "
                "sin to its layers)."
            )

        by_stream = own(states, rotation, call, forward_pass)
        if by_stream is None or not self.config.per_head:
            return by_stream

        # The projections rotate, and the attention is handed a rotation that changes nothing.
        forward_pass.of_heads[stream] = by_stream
        return identity_like(rotation)

    def _follow(self, leader: int, states: Tensor, rotation: Any, call: RotaryCall | None) -> Rotation | None:
        """Return the rotation of a layer that attends to another layer's keys: by the positions of that layer.

        It is None where the positions are the model's own.
        """
        forward_pass, call = self._pass_of(rotation, call)
        if forward_pass is None or leader not in forward_pass.of_leaders:
            return None

        positions, call_of_leader, of_leader = forward_pass.of_leaders[leader]
        if call is None:
            raise PositionsError(
                "a layer has cos and sin from no rotary call of this forward pass; expected the model's."
            )

        # Another call has other frequencies.
        if call_of_leader is not call:
            of_leader = rotate(positions.to(call.position_ids.device), call)

        # Such a layer may run for the last tokens only.
        last = slice(-states.shape[1], None)
        if isinstance(of_leader, Tensor):
            return moved_to(of_leader[:, last], states.device)
        cos, sin = of_leader
        return moved_to((cos[:, last], sin[:, last]), states.device)

    def _enter_attention(self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the cache that an attention writes to."""
        forward_pass = self._current.get()
        if forward_pass is not None and forward_pass.cache is None:  # one that the decoder stack made itself, empty
            forward_pass.cache = argument(site.parameters, args, kwargs, "past_key_values")
            if forward_pass.cache is None:
                forward_pass.cache = argument(site.parameters, args, kwargs, "layer_past")
        if self.config.per_head:
            refuse_split_inputs(module)

    def _leave_attention(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        """Leave a pass that was entered again for a checkpointed layer."""
        forward_pass = self._current.get()
        if forward_pass is not None and forward_pass.finished:
            self._current.resume(None)

    def _heads_of(self, stream: int) -> CosSin | None:
        """Return the rotation of a layer's heads in the pass that runs; None where it is the model's own."""
        forward_pass = self._current.get()
        return None if forward_pass is None else forward_pass.of_heads.get(stream)

    @contextmanager
    def recorded(self) -> Iterator[list[Float[Tensor, "rows pos *head"]]]:
        """Collect the increments of every forward pass in the block, for models outside a bridge.

        The list is filled when the block ends: a tensor for each layer, of passes of equal length along the batch.
        """
        kept: list[list[Tensor]] = [[] for _ in self.layers]
        collected: list[Tensor] = []
        hooks = []
        for stream, values in zip(self.layers, kept, strict=True):
            keep = partial(_append, values)
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
    model: Any,
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
        model: a `transformers` causal language model with rotary positions, or a TransformerBridge on one. A pipeline
            or a compiled model is the one inside.
        positions: "static", or a PositionConfig.
        table: increments by token id, for a frozen source.

    Returns:
        The streams; `detach()` takes them off.

    Raises:
        PositionsError: the model has no rotary attention that can be reached, has streams already, or per-head
            increments would not be exact in it, or a wrapper holds copies or pieces of its weights. The model is
            untouched then.

    Graphs that torch.compile made before are dropped, and it guards hooks from here on (`_drop_graphs`).
    """
    config = PositionConfig(source="static") if positions == "static" else positions
    if not isinstance(config, PositionConfig):
        raise PositionsError(f'positions is {positions!r}; expected "static" or a PositionConfig.')

    model = unwrapped(model)
    bridge = model if isinstance(model, TransformerBridge) else None
    base = unbridged(model)
    refuse_attached(base)
    attention = RotaryAttention(base)
    streams = _build(config, base, attention, table)

    try:
        _hook(streams, base, attention)
        if bridge is not None:
            _add_hook_points(bridge, streams, attention)
    except BaseException:
        streams.detach()
        raise

    _drop_graphs()
    return streams


def _build(config: PositionConfig, base: Any, attention: RotaryAttention, table: Tensor | None) -> PositionStreams:
    """Build streams for the layers that rotate, each source where what it reads is; the model stays as it is."""
    own = _with_stream(attention)
    text = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    n_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    embedding = base.get_input_embeddings()
    if config.per_head:
        for site in attention.sites:
            refuse_inexact_heads(site.attention, attention.rotary, text.hidden_size, floating_dtype(base))
    sources = build_sources(
        config,
        n_layers=len(own),
        d_model=text.hidden_size,
        n_heads=n_heads,
        vocab=embedding.weight.shape[0],
        dtype=torch.float64 if floating_dtype(base) == torch.float64 else torch.float32,
        table=table,
    )

    # A model may be on several devices.
    places = [site.layer for site in own] if config.source == "per_layer" else [embedding]
    for source, place in zip(sources, places, strict=False):
        source.to(device_of(place, base))
    return PositionStreams(config, sources, [site.number for site in own], n_heads)


def _with_stream(attention: RotaryAttention) -> list[Site]:
    """The sites that have a stream: those that follow no other."""
    return [site for site in attention.sites if site.leader is None]


def _hook(streams: PositionStreams, base: Any, attention: RotaryAttention) -> None:
    """Make streams part of a model's forward pass; `streams.detach` undoes what was done, also half of it."""
    for handle in _hook_handles(streams, base, attention):
        streams._undo.append(handle.remove)
    base.add_module("position_streams", streams)
    streams._undo.append(partial(_remove_module, base, "position_streams"))


def _hook_handles(streams: PositionStreams, base: Any, attention: RotaryAttention) -> Iterator[Any]:
    """Register all hooks, one after another: those of the model, of each layer, and of layers that follow others."""
    yield from _hook_model(streams, base, attention)
    for i, site in enumerate(_with_stream(attention)):
        yield from _hook_layer(streams, i, site)
    for site in attention.sites:
        if site.leader is not None:
            yield from site.hook(partial(streams._follow, site.leader))
            cast(PositionStream, streams.layers[site.leader]).followed = True
        yield site.wrapper.register_forward_hook(streams._leave_attention, always_call=True)


def _hook_model(streams: PositionStreams, base: Any, attention: RotaryAttention) -> Iterator[Any]:
    """Hook the model, its decoder, its embeddings and its rotary modules."""
    own, embedding = _with_stream(attention), base.get_input_embeddings()
    hooked = [embedding] if streams.config.source == "shared" else []
    if streams.config.per_head:
        hooked += [projection for site in own for projection in projections_of(site.attention)]

    # An adapter that takes the place of one of these is refused at the next pass.
    links = links_to(base, hooked)
    yield base.register_forward_pre_hook(partial(streams._begin, parameters(base), links), with_kwargs=True)
    yield base.register_forward_hook(streams._end, always_call=True)

    # Layers and attention are checked only where streams did not run: a pass may leave layers out.
    layers = [site.layer for site in attention.sites]
    start = partial(streams._start, layers, attention.wrapper(layers[0]), parameters(attention.stack))
    compiled = [module for site in attention.sites for module in (site.layer, site.wrapper, site.attention)]
    links = links_to(base, [module for site in own for module in (site.layer, site.attention, site.wrapper)])
    yield attention.stack.register_forward_pre_hook(start, with_kwargs=True)
    yield attention.stack.register_forward_hook(partial(streams._finish, compiled, links), always_call=True)

    yield embedding.register_forward_hook(streams._note_embeddings)
    for rotary in attention.rotary:
        yield rotary.register_forward_hook(streams._note_rotary, with_kwargs=True)


def _hook_layer(streams: PositionStreams, i: int, site: Site) -> Iterator[Any]:
    """Hook a decoder layer and its attention."""
    names = parameters(site.layer)
    note = partial(streams._note_residual, i, names, "hidden_states" if "hidden_states" in names else names[0])

    # Where no layer is around the attention, the note must be the component's, whose hooks run first.
    layer = site.wrapper if site.layer is site.attention else site.layer
    yield layer.register_forward_pre_hook(note, with_kwargs=True)
    yield site.wrapper.register_forward_pre_hook(partial(streams._enter_attention, site), with_kwargs=True)
    yield from site.hook(partial(streams._rotation_of, i))
    if streams.config.per_head:
        yield from hook_projections(site.attention, partial(streams._heads_of, i))


def _drop_graphs() -> None:
    """Drop compiled graphs: one from before would run a model without its streams.

    By default torch.compile does not check whether a module has hooks when it takes a graph that it compiled for a
    module of the same class. From here on it does, in this process, and what was compiled before is compiled anew.
    """
    import torch._dynamo

    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch._dynamo.reset()


def _refuse_stale_graphs(modules: list[nn.Module], ran: int, expected: int) -> None:
    """Refuse a pass in which compiled layers ran without their streams; layers that were left out are no error."""
    if any(isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in modules):
        raise PositionsError(
            f"{ran} of {expected} position streams ran in this forward pass of compiled layers; expected layers that "
            "were compiled after attach_positions."
        )


def increment_table(model: Any) -> Float[Tensor, "vocab *head"]:
    """Return the increment of every token id, from a shared or frozen source: what a frozen source looks up.

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


def _append(values: list[Tensor], _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
    values.append(output.detach())


def unbridged(model: Any) -> Any:
    """Return the transformers model inside a bridge or what peft wraps around it, or the model itself.

    Raises:
        PositionsError: peft puts tokens of its own in front, which only its wrapper does.
    """
    if isinstance(model, TransformerBridge):
        return model.original_model

    if "peft" not in sys.modules:  # what wraps no model need not be imported
        return model
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner

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
    if any(belongs_to_streams(hook) for module in modules for hook in module._forward_pre_hooks.values()):
        raise PositionsError("position streams are attached to this model already; expected detach() on them first.")


def belongs_to_streams(hook: Any) -> bool:
    """Whether a hook of a module is a method of streams, or a partial around one."""
    if isinstance(hook, partial):
        return any(belongs_to_streams(part) for part in (hook.func, *hook.args))
    return isinstance(getattr(hook, "__self__", None), PositionStreams)


def _call_behind(rotation: Any, forward_pass: ForwardPass) -> RotaryCall | None:
    """Return the rotary call that a layer's rotation is from; None where it cannot be told."""
    calls = forward_pass.rotary_calls
    for call in calls:
        if any(own is given for own in call.tensors() for given in tensors_of(rotation)):
            return call
    if len(calls) == 1:  # moved to another device, or cut
        return calls[0]
    for call in calls:  # part of it where the model computes its last tokens alone
        if any(_is_part(own, given) for own in call.tensors() for given in tensors_of(rotation)):
            return call
    return None


def _is_part(own: Tensor, given: Tensor) -> bool:
    """Whether one tensor is a view of another: they have one storage."""
    return not own.is_meta and own.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()


def _remove_module(owner: nn.Module, name: str) -> None:
    del owner._modules[name]


def _add_hook_points(bridge: Any, streams: PositionStreams, attention: RotaryAttention) -> None:
    """Put the streams' hook points into a bridge, under the names that `attach_positions` promises."""
    added: list[tuple[nn.Module, str]] = []
    if streams.shared_source is not None:
        bridge.add_module("hook_increments", streams.hook_increments)
        added.append((bridge, "hook_increments"))

    for stream, site in zip(streams.layers, _with_stream(attention), strict=True):
        component = site.wrapper
        if component is site.attention:  # inside a block that the bridge leaves whole
            block = attention.component_around(site)
            component = nn.Module()
            block._modules["attn"] = component
            added.append((block, "attn"))
        for name in ("hook_increments", "hook_positions", "hook_rotation"):
            component.add_module(name, getattr(stream, name))
            added.append((component, name))

    scan_hook_points(bridge)
    streams._undo.append(partial(_remove_hook_points, bridge, added))


def _remove_hook_points(bridge: Any, added: list[tuple[nn.Module, str]]) -> None:
    """Take hook points out of a bridge, and their names out of its registry."""
    # By identity: a bridge may name one hook point in several ways.
    hooks = {id(owner._modules.pop(name)) for owner, name in added}
    known = hook_registry(bridge)
    for name in [name for name, hook in known.items() if id(hook) in hooks]:
        del known[name]
