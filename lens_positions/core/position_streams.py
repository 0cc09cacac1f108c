"""The streams of one model, and what they do in each of its forward passes.

`attach.py` hooks the methods here into the model; `forward_pass.py` holds what they note; `stream.py` computes.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from transformer_lens.hook_points import HookPoint

from .. import former_names
from ..errors import PositionsError
from .find_attention import AttentionModule, Link, argument
from .forward_pass import CurrentPass, ForwardPass, tagged_pass
from .head_trial import refuse_inexact_heads
from .hook_points import StreamHookPoint, run_hook
from .increments import PositionConfig
from .per_head import head_rotation, repeat_keys
from .positions import CosSin
from .rotation import RotaryCall, Rotation, move_to_device, tensors_of
from .stream import PositionStream, full_precision, rotate
from .transformer_lens_internals import skips_embeddings


class PositionStreams(nn.Module):
    """The position streams of one model: the handle that `attach_positions` returns.

    It is registered in the model as `position_streams`, so that the sources' weights train, move and count with it. Its
    private methods are the hooks, in the order in which a forward pass comes by them.

    Attributes:
        config: what the source is.
        shared_source: the source of all layers, where it is shared or frozen.
        layers: a `PositionStream` for each layer that rotates by positions of its own.
        hook_increments: the hook point of the shared source.
        n_query, n_key_value: how many query heads and key-value heads a layer has.

    >>> streams = model.position_streams
    >>> [stream.layer for stream in streams.layers]
    [0, 1, 2, 3, 4, 5]
    >>> streams.attached
    True
    """

    def __init__(
        self, config: PositionConfig, sources: nn.ModuleList, numbers: list[int], n_heads: int, n_query: int
    ) -> None:
        super().__init__()
        self.config = config
        self.shared_source = sources[0] if len(sources) == 1 and config.source != "per_layer" else None
        own: list[nn.Module | None] = list(sources) if config.source == "per_layer" else [None] * len(numbers)
        self.layers = nn.ModuleList(
            PositionStream(config, i, n, own[i], n_heads, n_query) for i, n in enumerate(numbers)
        )
        self.hook_increments = StreamHookPoint()
        self.hook_increments.name = "hook_increments"
        self.n_query = n_query
        self.n_key_value = n_heads
        # Whether query heads can have rotations of their own is tried when one shall.
        self._attentions: list[AttentionModule] = []
        self._query_heads: PositionsError | Literal["untried", "exact"] = "untried"
        self._current = CurrentPass()
        self._undo: list[Callable[[], object]] = []

    @property
    def attached(self) -> bool:
        """Whether the streams are hooked into their model."""
        return bool(self._undo)

    def detach(self) -> None:
        """Take the streams off; the model is the one it was, to the bit. Detaching twice does nothing."""
        while self._undo:  # the last first: names before hooks, layers before the model
            self._undo.pop()()
        self._current = CurrentPass()

    def try_query_heads(self, base: nn.Module) -> None:
        """Find out, once, whether query heads can have rotations of their own in this model (`head_trial.py`).

        A function may only look at what heads have, so that a refusal waits for one that edits.
        """
        if self._query_heads != "untried":
            return
        self._query_heads = "exact"  # as the trial runs the model
        try:
            refuse_inexact_heads(base, self._attentions, self.n_query, self.n_query)
        except PositionsError as error:
            self._query_heads = error

    def refuse_query_heads(self) -> None:
        """Refuse edits of query heads where the trial found that they would not be exact.

        Raises:
            PositionsError: why.
        """
        if isinstance(self._query_heads, PositionsError):
            raise PositionsError(*self._query_heads.args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PositionStreams":
        """Move with the model, and keep float32 where the model becomes bf16 or float16."""

        def keep_wide(tensor: Tensor) -> Tensor:
            # What fn does is not known, only what comes out of it. The wide one starts from the tensor, not from bits
            # that were rounded away.
            moved = fn(tensor)
            half = moved.dtype in (torch.bfloat16, torch.float16)
            return tensor.to(moved.device, torch.float32) if half else moved

        return super()._apply(keep_wide, recurse)

    def _begin(
        self, names: list[str], links: list[Link], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Begin a pass: the model is called, which may embed tokens and images before it calls its decoder."""
        # Before any refusal: `_end` is called in either case, and must find this pass and not one around it.
        forward_pass = ForwardPass(
            tokens=argument(names, args, kwargs, "input_ids"),
            mask=argument(names, args, kwargs, "attention_mask"),
            ids_given=argument(names, args, kwargs, "position_ids") is not None,
        )
        self._current.begin(forward_pass)

        if module._modules.get("position_streams") is not self:
            raise PositionsError(
                "the model's position_streams are a copy of those that run (as peft's modules_to_save and DataParallel "
                "make them), so what trains would not act; expected the model without that copy."
            )

        # Checked in each pass: an adapter may be added, or a module exchanged, at any time.
        for link in links:
            link.refuse_replaced()
        by_head = any(cast(PositionStream, stream).has_head_hooks() for stream in self.layers)
        if by_head and self._query_heads == "untried" and not torch.compiler.is_compiling():
            self.try_query_heads(module)

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

        # The cache as it is before this pass: attention adds to it layer by layer.
        forward_pass.past_length = 0 if forward_pass.cache is None else int(forward_pass.cache.get_seq_length())
        forward_pass.embeddings = argument(names, args, kwargs, "inputs_embeds")

        # As transformers decides it: layers are checkpointed in training mode only.
        forward_pass.checkpointed = any(m.training and getattr(m, "gradient_checkpointing", False) for m in layers)
        # What continuous batching hands down, for a cache in pages.
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
                # Layers get these in their second run, in the backward pass, and by them the pass and the call.
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
        if by_stream is None or isinstance(by_stream, Tensor) or by_stream[0].ndim == 3:
            return by_stream
        if by_stream[0].shape[2] == self.n_query and not (own.heads and own.heads[0] == self.n_query):
            self._repeat_keys(stream, forward_pass)
        return head_rotation(by_stream)

    def _repeat_keys(self, stream: int, forward_pass: ForwardPass) -> None:
        """Let an attention have keys of each query head, until it returns."""
        self.refuse_query_heads()
        if self._query_heads == "untried":
            raise PositionsError(
                "query heads have rotations of their own in a pass that began without them; expected the model to be "
                "called as a whole, and not compiled before its first edit by head."
            )
        with_stream = [attention for attention in self._attentions if attention.leader is None]
        forward_pass.undo += repeat_keys(with_stream[stream].module, self.n_query, forward_pass.cache)

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
            return move_to_device(of_leader[:, last], states.device)
        cos, sin = of_leader
        cos_sin = cast(CosSin, move_to_device((cos[:, last], sin[:, last]), states.device))
        return cos_sin if cos.ndim == 3 else head_rotation(cos_sin)

    def _enter_attention(
        self, attention: AttentionModule, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Note the cache that an attention writes to."""
        forward_pass = self._current.get()
        if forward_pass is not None and forward_pass.cache is None:  # one that the decoder stack made itself, empty
            forward_pass.cache = argument(attention.parameters, args, kwargs, "past_key_values")
            if forward_pass.cache is None:
                forward_pass.cache = argument(attention.parameters, args, kwargs, "layer_past")

    def _leave_attention(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        """Undo what was for this call, and leave a pass that was entered again for a checkpointed layer."""
        forward_pass = self._current.get()
        while forward_pass is not None and forward_pass.undo:
            forward_pass.undo.pop()()
        if forward_pass is not None and forward_pass.finished:
            self._current.resume(None)

    @contextmanager
    def record(self) -> Iterator[list[Float[Tensor, "rows pos *head"]]]:
        """Collect the increments of every forward pass in the block, for models outside a bridge.

        The list is filled when the block ends: a tensor for each layer, of passes of equal length along the batch.
        """
        # Hooks of PyTorch and not of the hook points, which are the user's to reset.
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

    def recorded(self) -> AbstractContextManager[list[Float[Tensor, "rows pos *head"]]]:
        """`record` by its name of version 0.1.0."""
        former_names.warn("PositionStreams.recorded", "PositionStreams.record")
        return self.record()

    def extra_repr(self) -> str:
        """The configuration, for printing a model."""
        return str(self.config)


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
        # Hooks are partials around methods, and may be partials around partials.
        return any(belongs_to_streams(part) for part in (hook.func, *hook.args))
    return isinstance(getattr(hook, "__self__", None), PositionStreams)


def _refuse_stale_graphs(modules: list[nn.Module], ran: int, expected: int) -> None:
    """Refuse a pass in which compiled layers ran without their streams; layers that were left out are no error."""
    if any(isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in modules):
        raise PositionsError(
            f"{ran} of {expected} position streams ran in this forward pass of compiled layers; expected layers that "
            "were compiled after attach_positions."
        )


def _call_behind(rotation: Any, forward_pass: ForwardPass) -> RotaryCall | None:
    """Return the rotary call that a layer's rotation is from; None where it cannot be told."""
    calls = forward_pass.rotary_calls
    for call in calls:
        # The very tensors that a rotary module returned, in nearly all models.
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


def _append(values: list[Tensor], _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
    values.append(output.detach())
