"""Attach position streams to a model, and take them off again.

Every RoPE model of transformers computes (cos, sin) once and hands it to each attention module as the keyword
`position_embeddings`; TransformerLens' attention bridges stand in the same places and take the same keyword. So
forward pre-hooks are enough, in a bare model and in a bridge alike:

    model, stack      note the tokens, the mask and the cache of this forward pass (`passes.py`)
    embedding         compute a shared source's increments
    rotary module     note the model's own position ids, cos and sin
    decoder layer     note what a per-layer source reads
    attention         replace `position_embeddings` by the stream's

Where these modules are, and the few models that do it in another way, is in `sites.py`. Per-head increments cannot
pass through that keyword, which all heads share: there the outputs of the query and key projections are rotated head
by head and the attention module is handed the identity rotation. Where that is not exact, attaching refuses.
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
from .rotation import RotaryCall, Rotation, moved_to, rotate, rotate_heads, tensors_of
from .stream import PositionStream, full_precision


class PositionStreams(nn.Module):
    """The position streams of one model: the handle that `attach_positions` returns.

    Registered in the model as `position_streams`, so that the sources' weights train, move and count with it.

    >>> streams = model.position_streams
    >>> [stream.layer for stream in streams.layers]
    [0, 1, 2, 3, 4, 5]
    >>> streams.attached
    True
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
        """Whether the streams are part of their model's forward pass."""
        return bool(self._undo)

    def detach(self) -> None:
        """Take the streams off; the model is the one it was, to the bit. Detaching twice does nothing."""
        while self._undo:
            self._undo.pop()()
        self._current = CurrentPass()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PositionStreams":
        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            half = moved.dtype in (torch.bfloat16, torch.float16)
            return tensor.to(moved.device, torch.float32) if half else moved

        return super()._apply(keep_wide, recurse)

    def _begin(
        self, names: list[str], links: list[Link], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """The model is called: a model of images and text embeds the tokens before it calls its decoder."""
        # First of all: `_end` leaves a pass whether or not this one is refused, and must not leave one around it.
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
        """Its decoder is called."""
        if self.config.source == "shared" and getattr(first_block, "_start_at_layer_idx", None):
            raise PositionsError(
                "start_at_layer leaves out the token embeddings, which the shared source reads; expected a forward "
                "pass from tokens."
            )
        step = self._current.get()
        if step is None or step.started:  # the decoder alone, without the model around it
            step = ForwardPass(own_decoder=True)
            self._current.begin(step)
        step.started = True
        tokens, mask = (argument(names, args, kwargs, name) for name in ("input_ids", "attention_mask"))
        step.tokens = step.tokens if tokens is None else tokens
        if mask is not None and not (isinstance(step.mask, Tensor) and step.mask.ndim == 2):
            step.mask = mask
        step.ids_given = step.ids_given or argument(names, args, kwargs, "position_ids") is not None
        step.cache = argument(names, args, kwargs, "past_key_values")
        step.past_length = 0 if step.cache is None else int(step.cache.get_seq_length())
        step.embeddings = argument(names, args, kwargs, "inputs_embeds")
        step.checkpointed = any(m.training and getattr(m, "gradient_checkpointing", False) for m in layers)
        step.paged = "read_index" in kwargs and "write_index" in kwargs
        step.with_grad = torch.is_grad_enabled()
        if self.config.source == "frozen" or step.embeddings is not None:
            self._share_increments(step)

    def _finish(
        self,
        compiled: list[nn.Module],
        links: list[Link],
        _module: nn.Module,
        _args: tuple[Any, ...],
        output: Any,
    ) -> None:
        """The decoder returned, or failed (then there is no output)."""
        step = self._current.get()
        if step is None:
            return
        ran = len(step.calls)
        if step.own_decoder:
            self._current.end()
        if output is not None and ran < len(self.layers) and not torch.compiler.is_compiling():
            for link in links:
                link.refuse_replaced()
            _refuse_borrowed_graphs(compiled, ran, len(self.layers))

    def _end(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        """The model returned, or failed."""
        self._current.end()

    def _note_embeddings(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        step = self._current.get()
        if step is not None and step.started and step.tokens is not None and step.embeddings is None:
            step.embeddings = output
            self._share_increments(step)

    def _note_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        step = self._current.get()
        if step is not None:
            call = RotaryCall.of(module, args, kwargs, output)
            step.rotary_calls.append(call)
            if step.checkpointed:
                for tensor in call.tensors():
                    step.tag(tensor, call)

    def _share_increments(self, step: ForwardPass) -> None:
        """The increments of a source that all layers share, once a forward pass and outside checkpointed layers."""
        if self.shared_source is None or step.increments is not None:
            return
        reads = step.tokens if self.config.source == "frozen" else step.embeddings
        if reads is None:
            raise PositionsError(
                "the frozen source was given embeddings without token ids; expected input_ids, since it looks "
                "increments up by token."
            )
        with full_precision(reads.device.type):
            step.increments = run_hook(self.hook_increments, self.shared_source(reads))

    def _note_residual(
        self,
        stream: int,
        names: list[str],
        reads: str,
        _module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        step = self._current.get()
        if step is None:  # a checkpointed layer runs again, on what it had
            return
        if not step.checkpointed:
            step.residuals.clear()
        step.residuals[stream] = argument(names, args, kwargs, reads)

    def _pass_of(
        self, rotation: Any, call: RotaryCall | None
    ) -> tuple[ForwardPass, RotaryCall | None] | tuple[None, None]:
        """The forward pass that an attention runs in, and the rotary call that its rotation is from."""
        step = self._current.get()
        if step is not None and not step.finished:
            if call is None:
                return step, None if rotation is None else _call_behind(rotation, step)
            if step.checkpointed:  # the attention itself made this call, and makes another when it runs again
                step.tag(call.position_ids, None)
            return step, call
        again, known = tagged_pass(rotation if call is None else call.position_ids)
        self._current.resume(again)
        return (None, None) if again is None else (again, known if call is None else call)

    def _turn(self, stream: int, states: Tensor, rotation: Any, call: RotaryCall | None) -> Rotation | None:
        """The rotation of one attention in this forward pass; None where it is the model's own."""
        step, call = self._pass_of(rotation, call)
        own = cast(PositionStream, self.layers[stream])
        if step is None:
            raise PositionsError(
                f"layer {own.layer} runs outside a forward pass of its model; expected the model to be called as a "
                "whole (with gradient checkpointing: gradient_checkpointing_enable(), in a model that hands cos and "
                "sin to its layers)."
            )
        turned = own(states, rotation, call, step)
        if turned is None or not self.config.per_head:
            return turned
        step.heads[stream] = turned
        cos, sin = rotation
        return torch.ones_like(cos), torch.zeros_like(sin)

    def _follow(self, leader: int, states: Tensor, rotation: Any, call: RotaryCall | None) -> Rotation | None:
        """The rotation of a layer that attends to another layer's keys: by the positions of that layer.

        Where the layer sees the last tokens only, theirs; None where the positions are the model's own.
        """
        step, call = self._pass_of(rotation, call)
        if step is None or leader not in step.turned:
            return None
        positions, its_call, turned = step.turned[leader]
        if call is None:
            raise PositionsError(
                "a layer has cos and sin from no rotary call of this forward pass; expected the model's."
            )
        if its_call is not call:
            turned = rotate(positions.to(call.position_ids.device), call)
        last = slice(-states.shape[1], None)
        turned = turned[:, last] if isinstance(turned, Tensor) else (turned[0][:, last], turned[1][:, last])
        return moved_to(turned, states.device)

    def _note_cache(self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = self._current.get()
        if step is not None and step.cache is None:  # one that the decoder stack made itself, empty
            step.cache = argument(site.parameters, args, kwargs, "past_key_values")
            if step.cache is None:
                step.cache = argument(site.parameters, args, kwargs, "layer_past")
        if self.config.per_head:
            bridge_config = getattr(module, "config", None)
            for switch in ("use_split_qkv_input", "use_attn_in"):
                if getattr(bridge_config, switch, False) is True:
                    raise PositionsError(
                        f"set_{switch}(True) goes around the projections, whose outputs per-head increments rotate; "
                        f"expected set_{switch}(False) or per_head=False."
                    )

    def _leave_attention(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        """A layer that ran again is done."""
        step = self._current.get()
        if step is not None and step.finished:
            self._current.resume(None)

    def _rotate_output(
        self, stream: int, d_head: int, _module: nn.Module, _args: tuple[Any, ...], output: Tensor
    ) -> Tensor | None:
        step = self._current.get()
        cos_sin = None if step is None else step.heads.get(stream)
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

    Graphs that torch.compile made before are dropped, and it guards hooks from here on (`_forget_graphs`).

    >>> tokens = torch.arange(8)[None]
    >>> before = llama(tokens).logits
    >>> streams = lp.attach_positions(llama, lp.PositionConfig("per_layer"))
    >>> torch.equal(llama(tokens).logits, before)
    True
    >>> streams.detach()
    """
    config = PositionConfig(source="static") if positions == "static" else positions
    if not isinstance(config, PositionConfig):
        raise PositionsError(f'positions is {positions!r}; expected "static" or a PositionConfig.')
    model = unwrapped(model)
    bridge = model if isinstance(model, TransformerBridge) else None
    base = unbridged(model)
    refuse_attached(base)
    found = RotaryAttention(base)
    streams = _built(config, base, found, table)
    try:
        _hook(streams, base, found)
        if bridge is not None:
            _add_hook_points(bridge, streams, found)
    except BaseException:
        streams.detach()
        raise
    _forget_graphs()
    return streams


def _built(config: PositionConfig, base: Any, found: RotaryAttention, table: Tensor | None) -> PositionStreams:
    """Streams for the layers that rotate, each source where what it reads is; nothing of the model is changed."""
    own = [site for site in found.sites if site.leader is None]
    text = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    n_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    embedding = base.get_input_embeddings()
    if config.per_head:
        for site in found.sites:
            _refuse_inexact_heads(site, found, text.hidden_size, floating_dtype(base))
    sources = build_sources(
        config,
        n_layers=len(own),
        d_model=text.hidden_size,
        n_heads=n_heads,
        vocab=embedding.weight.shape[0],
        dtype=torch.float64 if floating_dtype(base) == torch.float64 else torch.float32,
        table=table,
    )
    places = [site.layer for site in own] if config.source == "per_layer" else [embedding]
    for source, place in zip(sources, places, strict=False):
        source.to(device_of(place, base))
    return PositionStreams(config, sources, [site.number for site in own], n_heads)


def _hook(streams: PositionStreams, base: Any, found: RotaryAttention) -> None:
    """Make streams part of a model's forward pass; `streams.detach` undoes what was done, also half of it."""
    own = [site for site in found.sites if site.leader is None]
    layers = [site.layer for site in found.sites]
    undo = streams._undo
    hooked_into = [base.get_input_embeddings()] if streams.config.source == "shared" else []
    if streams.config.per_head:
        hooked_into += [projection for site in own for projection in (site.attention.q_proj, site.attention.k_proj)]
    reads = links_to(base, hooked_into)
    layered = links_to(base, [module for site in own for module in (site.layer, site.attention, site.wrapper)])

    def add(*handles: Any) -> None:
        undo.extend(handle.remove for handle in handles)

    add(
        base.register_forward_pre_hook(partial(streams._begin, parameters(base), reads), with_kwargs=True),
        base.register_forward_hook(streams._end, always_call=True),
    )
    start = partial(streams._start, layers, found.wrapper(layers[0]), parameters(found.stack))
    compiled = [module for site in found.sites for module in (site.layer, site.wrapper, site.attention)]
    add(
        found.stack.register_forward_pre_hook(start, with_kwargs=True),
        found.stack.register_forward_hook(partial(streams._finish, compiled, layered), always_call=True),
    )
    add(base.get_input_embeddings().register_forward_hook(streams._note_embeddings))
    add(*(rotary.register_forward_hook(streams._note_rotary, with_kwargs=True) for rotary in found.rotary))

    for i, site in enumerate(own):
        names = parameters(site.layer)
        note = partial(streams._note_residual, i, names, "hidden_states" if "hidden_states" in names else names[0])
        layer = site.wrapper if site.layer is site.attention else site.layer
        add(layer.register_forward_pre_hook(note, with_kwargs=True))
        add(site.wrapper.register_forward_pre_hook(partial(streams._note_cache, site), with_kwargs=True))
        add(*site.hook(partial(streams._turn, i)))
        if streams.config.per_head:
            for projection in (site.attention.q_proj, site.attention.k_proj):
                turn = partial(streams._rotate_output, i, site.attention.head_dim)
                add(projection.register_forward_hook(turn))
    for site in found.sites:
        if site.leader is not None:
            add(*site.hook(partial(streams._follow, site.leader)))
            cast(PositionStream, streams.layers[site.leader]).followed = True
        add(site.wrapper.register_forward_hook(streams._leave_attention, always_call=True))
    base.add_module("position_streams", streams)
    undo.append(partial(_remove_module, base, "position_streams"))


def _forget_graphs() -> None:
    """Let no graph that was compiled before run a model without its streams, and none of theirs run another model.

    By default torch.compile does not look whether a module has hooks when it takes a graph that it compiled for a
    module of the same class. From here on it does, in this process, and what was compiled before is compiled anew.
    """
    import torch._dynamo

    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch._dynamo.reset()


def _refuse_borrowed_graphs(modules: list[nn.Module], ran: int, expected: int) -> None:
    """Refuse a pass in which compiled layers ran without their streams; layers that were left out are no such thing."""
    if any(isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in modules):
        raise PositionsError(
            f"{ran} of {expected} position streams ran in this forward pass of compiled layers; expected layers that "
            "were compiled after attach_positions."
        )


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
    hooks = (hook for module in modules for hook in module._forward_pre_hooks.values())
    if any(isinstance(getattr(getattr(h, "func", h), "__self__", None), PositionStreams) for h in hooks):
        raise PositionsError("position streams are attached to this model already; expected detach() on them first.")


def _call_behind(rotation: Any, step: ForwardPass) -> RotaryCall | None:
    """The rotary call of a pass that a layer's rotation is from."""
    calls = step.rotary_calls
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
    return not own.is_meta and own.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()


def _remove_module(owner: nn.Module, name: str) -> None:
    del owner._modules[name]


def _refuse_inexact_heads(site: Site, found: RotaryAttention, d_model: int, dtype: torch.dtype) -> None:
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
    if clipped or not found.rotary or not _heads_rotate_like_halves(attention, found.rotary[0], d_model, dtype):
        raise PositionsError(
            f"per-head increments are not exact in {kind}, which does not rotate the two halves of each whole head "
            "straight after the projection; expected a model such as Llama, or per_head=False."
        )


def _heads_rotate_like_halves(attention: Any, rotary: nn.Module, d_model: int, dtype: torch.dtype) -> bool:
    """Try it: the attention with its own rotation against rotated projections and the identity rotation."""
    device, modes = device_of(attention), [(module, module.training) for module in attention.modules()]
    states = torch.randn(1, 8, d_model, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    hooks = []
    try:
        attention.eval()
        with torch.no_grad():
            # Large enough for scores of a few units, which turning makes a difference to.
            states *= 2 / (attention.q_proj(states).std() * attention.k_proj(states).std()).sqrt()
            cos, sin = rotary(states, 7 * torch.arange(8, device=device)[None])
            own = attention(states, position_embeddings=(cos, sin), attention_mask=None)[0]
            turn = partial(_rotate_projection, (cos[:, :, None], sin[:, :, None]), attention.head_dim)
            hooks = [p.register_forward_hook(turn) for p in (attention.q_proj, attention.k_proj)]
            identity = torch.ones_like(cos), torch.zeros_like(sin)
            ours = attention(states, position_embeddings=identity, attention_mask=None)[0]
        return bool((ours - own).abs().max() <= 0.02 * own.abs().max())
    except (RuntimeError, TypeError, ValueError):
        return False
    finally:
        for module, training in modes:
            module.training = training
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
