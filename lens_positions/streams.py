"""The position stream: increments -> positions -> cos and sin, at one layer.

    increments  d[batch, pos]   from the source                                     hook_increments
    positions   p[batch, pos]   the model's own position ids + running sum of d - 1   hook_positions
    cos, sin    the model's own rotary module, called with these positions

Writing the sum around the model's own position ids keeps everything that they know (padding, the offset of a
cache, packed documents), and all-ones increments give the model's positions back to the bit. Without padding
and cache it is p_0 = 0, p_t = d_1 + ... + d_t (gap "before") or p_t = d_0 + ... + d_{t-1} (gap "after").

The sum runs in float64 and positions are float32 (float64 in a float64 model), whatever the model's dtype.
A stream that nobody edits and whose source is static leaves the model's cos and sin untouched; a shared or
frozen one computes them once per forward pass. With a key-value cache a stream continues where that cache
stopped: the running sum is kept in the cache object itself, follows its reordering and cropping, and ends with it.

Rotation: Su et al., "RoFormer" (arXiv 2104.09864).
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from .errors import PositionsError
from .increments import PositionConfig

CosSin = tuple[Float[Tensor, "batch pos d_rotary"], Float[Tensor, "batch pos d_rotary"]]


@dataclass(eq=False)
class RotaryCall:
    """One call of a model's rotary module in this forward pass: what it was given and what it returned."""

    module: nn.Module
    args: tuple[Any, ...]  # after hidden states and position ids (a layer type, in some families)
    kwargs: dict[str, Any]
    states: Tensor  # carries the dtype and the device of the result
    position_ids: Int[Tensor, "#batch pos"]
    cos_sin: CosSin
    _frequencies: Tensor | None = None

    def at(self, positions: Float[Tensor, "batch pos"], states: Tensor | None = None) -> CosSin:
        """cos and sin of fractional positions, in the dtype of the states."""
        return self.module.forward(self.states if states is None else states, positions, *self.args, **self.kwargs)

    def frequencies(self) -> Float[Tensor, " d_rotary"]:
        """The rotary frequency of each component of cos and sin, in radians per position, float32.

        Read off the module at one small angle, where atan2(sin, cos) / p is w to rounding, so that neither its
        layout (halves or pairs) nor its scaling need be known.
        """
        if self._frequencies is None:
            p = 2.0**-12
            with torch.no_grad():
                probe = torch.full((1, 1), p, device=self.states.device)
                cos, sin = self.at(probe, self.states.new_zeros((), dtype=torch.float32))
                self._frequencies = torch.atan2(sin, cos)[0, 0] / p
        return self._frequencies


@dataclass(eq=False)
class ForwardPass:
    """What the streams of one forward pass share."""

    tokens: Int[Tensor, "batch pos"] | None = None
    mask: Bool[Tensor, "batch total"] | None = None  # real tokens, those of the cache included
    cache: Any = None
    embeddings: Float[Tensor, "batch pos d_model"] | None = None
    residual: Float[Tensor, "batch pos d_model"] | None = None  # entering the layer that runs now
    increments: Float[Tensor, "batch pos *head"] | None = None  # of a source that all layers share
    rotary_calls: list[RotaryCall] = field(default_factory=list)
    shared_work: dict[tuple[int, ...], Any] = field(default_factory=dict)


class Rotate(torch.autograd.Function):
    """cos and sin of positions by the model's own rotary module, with the gradient it would not give.

    The module decides the values, so scaled, partial and two-base RoPE stay exact. It works under no_grad; the
    derivative needs only its frequencies w: d cos/dp = -w sin, d sin/dp = w cos, attention scaling included.
    """

    @staticmethod
    def forward(ctx: Any, positions: Float[Tensor, "batch pos"], call: RotaryCall) -> CosSin:
        """cos and sin in the dtype of the model."""
        cos, sin = call.at(positions)
        ctx.save_for_backward(cos, sin, call.frequencies())
        ctx.dtype = positions.dtype
        return cos, sin

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        """The gradient of the positions."""
        cos, sin, w = ctx.saved_tensors
        grad_cos, grad_sin = gradients
        angle = grad_sin.to(ctx.dtype) * cos - grad_cos.to(ctx.dtype) * sin
        return (angle * w).sum(-1), None


class PositionStream(nn.Module):
    """Increments to positions to cos and sin at one layer, with a hook point at each of the first two."""

    def __init__(self, config: PositionConfig, layer: int, source: nn.Module | None, n_heads: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer  # its place among the layers with rotary attention
        self.cache_layer = layer  # its place in a key-value cache
        self.n_heads = n_heads
        self.source = source  # of this layer alone; None where static, shared or frozen
        self.hook_increments = HookPoint()
        self.hook_positions = HookPoint()

    def forward(self, states: Tensor, call: RotaryCall, step: ForwardPass) -> CosSin | None:
        """cos and sin for the attention of this layer, or None where they are the model's own.

        Args:
            states: hidden states entering the attention, for their shape and dtype.
            call: the rotary call whose cos and sin this layer was given.
            step: what this forward pass shares.

        Returns:
            cos and sin [batch pos d_rotary], with a "head" axis before d_rotary where per head.
        """
        past = self._past(states, step)
        static = self.config.source == "static"
        if static and past is None and not (_hooked(self.hook_increments) or _hooked(self.hook_positions)):
            return None
        with torch.autocast(states.device.type, enabled=False):
            given = self._given_increments(states, step)
            increments = run_hook(self.hook_increments, given)
            edited = increments is not given
            key = (id(given), id(past), id(call))
            shareable = self.source is None and not edited
            if shareable and key in step.shared_work:
                carry, base = step.shared_work[key]
            else:
                carry = running_sum(increments, past, step.mask, self.config.gap)
                base = add_to_ids(call.position_ids, carry, past, self.config.gap, increments.dtype)
                if shareable:
                    step.shared_work[key] = carry, base
            if step.cache is not None and not (static and past is None and not edited):
                remember(step.cache, self.cache_layer, past, carry.detach())
            positions = run_hook(self.hook_positions, base)
            if positions is base and not edited and static and past is None:
                return None
            if not shareable or positions is not base:
                return rotate(positions, call)
            if (*key, 1) not in step.shared_work:
                step.shared_work[*key, 1] = rotate(base, call)
            return step.shared_work[*key, 1]

    def _given_increments(self, states: Tensor, step: ForwardPass) -> Float[Tensor, "batch pos *head"]:
        if self.source is not None:
            assert step.residual is not None
            return self.source(step.residual)
        if step.increments is None:
            dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
            shape = (*states.shape[:2], self.n_heads) if self.config.per_head else states.shape[:2]
            step.increments = torch.ones(shape, dtype=dtype, device=states.device)
        return step.increments

    def _past(self, states: Tensor, step: ForwardPass) -> Float[Tensor, "batch past *head"] | None:
        """The running sum at each token of the cache; None where there is no cache or it is all standard steps."""
        if step.cache is None:
            return None
        length = step.cache.get_seq_length(self.cache_layer)
        past = getattr(step.cache, "position_sums", {}).get(self.cache_layer)
        if length == 0:
            return None
        if past is None and self.config.source == "static":
            if not (_hooked(self.hook_increments) or _hooked(self.hook_positions)):
                return None
            dtype = _wide(states)
            shape = (states.shape[0], length, self.n_heads) if self.config.per_head else (states.shape[0], length)
            return torch.zeros(shape, dtype=dtype, device=states.device)
        if past is None or past.shape[1] != length:
            known = 0 if past is None else past.shape[1]
            raise PositionsError(
                f"the key-value cache holds {length} tokens at layer {self.layer} and positions for {known} of them; "
                "expected a cache filled by this model with its position streams attached, changed only through "
                "its own methods."
            )
        return past


def run_hook(hook: HookPoint, activation: Float[Tensor, "batch pos *head"]) -> Float[Tensor, "batch pos *head"]:
    """Pass an activation through its hook point; the same object comes back where nothing changed it.

    Hook functions get a copy, so that one that edits in place does not reach other layers.

    Raises:
        PositionsError: a hook function returned another shape, or NaN or infinite values.
    """
    if not _hooked(hook):
        return activation
    given = activation.clone()
    if hook.bwd_hooks and torch.is_grad_enabled() and not given.requires_grad:
        given.requires_grad_()
    version = given._version
    returned = hook(given)
    if returned is given and given._version == version:
        return given if given.requires_grad else activation
    if not isinstance(returned, Tensor) or returned.shape != activation.shape:
        shape = tuple(returned.shape) if isinstance(returned, Tensor) else type(returned).__name__
        raise PositionsError(
            f"a hook function at {hook.name} returned {shape}; expected a tensor of shape {tuple(activation.shape)}."
        )
    if not torch.isfinite(returned).all():
        raise PositionsError(f"a hook function at {hook.name} returned NaN or infinite values; expected finite ones.")
    return returned.to(activation.dtype)


def _hooked(hook: HookPoint) -> bool:
    return bool(hook._forward_hooks or hook._backward_hooks)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def running_sum(
    increments: Float[Tensor, "batch pos *head"],
    past: Float[Tensor, "batch past *head"] | None,
    mask: Bool[Tensor, "batch total"] | None,
    gap: str,
) -> Float[Tensor, "batch pos *head"]:
    """Sum of d - 1 over the real tokens up to and including each one, on top of the cache's last sum.

    With gap "before", the first real token of a row adds nothing: there is no token for it to be away from.
    """
    length = increments.shape[1]
    surplus = increments.to(_wide(increments)) - 1
    if mask is not None:
        counted = mask.cumsum(1) > (1 if gap == "before" else 0)
        counted = (counted & mask)[:, -length:]
        surplus = surplus * (counted if surplus.ndim == 2 else counted.unsqueeze(-1))
    elif gap == "before" and past is None:
        rest = surplus[:, 1:].cumsum(1)
        return torch.cat([torch.zeros_like(surplus[:, :1]), rest], dim=1)
    total = surplus.cumsum(1)
    return total if past is None else total + past[:, -1:]


def add_to_ids(
    position_ids: Int[Tensor, "#batch pos"],
    carry: Float[Tensor, "batch pos *head"],
    past: Float[Tensor, "batch past *head"] | None,
    gap: str,
    dtype: torch.dtype,
) -> Float[Tensor, "batch pos *head"]:
    """Positions: the model's own ids plus the running sum up to each token (gap "after": up to the one before)."""
    if gap == "after":
        before = torch.zeros_like(carry[:, :1]) if past is None else past[:, -1:]
        carry = torch.cat([before, carry[:, :-1]], dim=1)
    ids = position_ids if carry.ndim == 2 else position_ids.unsqueeze(-1)
    return (ids + carry).to(dtype)


def rotate(positions: Float[Tensor, "batch pos *head"], call: RotaryCall) -> CosSin:
    """cos and sin of positions, with a "head" axis before the last one where the positions have it."""
    if positions.ndim == 2:
        return cast(CosSin, Rotate.apply(positions, call))
    cos, sin = Rotate.apply(positions.flatten(1), call)
    return cos.unflatten(1, positions.shape[1:]), sin.unflatten(1, positions.shape[1:])


def rotate_heads(
    projected: Float[Tensor, "batch pos width"], cos_sin: CosSin, d_head: int
) -> Float[Tensor, "batch pos width"]:
    """Rotate the output of a query or key projection, each head by its own positions (halves layout).

    Where there are more heads than positions have, as the queries of grouped attention do, consecutive heads
    share one.
    """
    heads = projected.unflatten(-1, (-1, d_head))
    cos, sin = (x.repeat_interleave(heads.shape[2] // x.shape[2], dim=2) for x in cos_sin)
    first, second = heads.chunk(2, dim=-1)
    return (heads * cos + torch.cat((-second, first), dim=-1) * sin).flatten(-2)


class PositionMemory:
    """Mixed into the class of a key-value cache: the running sums of its tokens, which follow what happens to them."""

    position_sums: dict[int, Float[Tensor, "batch past *head"]]

    def _each(self, change: Any) -> None:
        self.position_sums = {layer: change(layer, sums) for layer, sums in self.position_sums.items()}

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()  # type: ignore[misc]
        self.position_sums = {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._each(lambda _, sums: sums[beam_idx.to(sums.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._each(lambda _, sums: sums[indices.to(sums.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._each(lambda _, sums: sums.repeat_interleave(repeats, dim=0))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Drop the last tokens."""
        super().crop(*args, **kwargs)  # type: ignore[misc]
        self._each(lambda layer, sums: sums[:, : self.get_seq_length(layer)])  # type: ignore[attr-defined]


@cache
def _with_memory(cache_class: type) -> type:
    return type(cache_class.__name__, (PositionMemory, cache_class), {"__module__": cache_class.__module__})


def remember(
    kv_cache: Any,
    layer: int,
    past: Float[Tensor, "batch past *head"] | None,
    sums: Float[Tensor, "batch pos *head"],
) -> None:
    """Keep the running sums of new tokens, behind those of past ones, in the cache that holds their keys."""
    if not isinstance(kv_cache, PositionMemory):
        kv_cache.__class__ = _with_memory(kv_cache.__class__)
        kv_cache.position_sums = {}
    kv_cache.position_sums[layer] = sums if past is None else torch.cat([past, sums], dim=1)
