"""The position stream: increments -> positions -> cos and sin, at one layer.

    increments  d[batch, pos]   from the source                                     hook_increments
    positions   p[batch, pos]   the model's own position ids + running sum of d - 1   hook_positions
    cos, sin    the model's own rotary module, called with these positions              hook_rotation

Writing the sum around the model's own position ids keeps everything that they know (padding, the offset of a
cache, packed documents), and all-ones increments give the model's positions back to the bit. Without padding
and cache it is p_0 = 0, p_t = d_1 + ... + d_t (gap "before") or p_t = d_0 + ... + d_{t-1} (gap "after").

The sum runs in float64 and positions are float32 (float64 in a float64 model), whatever the model's dtype.
A stream that nobody edits and whose source is static leaves the model's cos and sin untouched; a shared or
frozen one computes them once per forward pass. With a key-value cache a stream continues where that cache
stopped: the running sum is kept in the cache object itself, follows its reordering and cropping, and ends with it.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from .errors import PositionsError
from .hooks import HookedTokens, hooked_at, run_hook
from .increments import PositionConfig
from .memory import remember, with_past
from .rotary import CosSin, RotaryCall, Rotation, hooked_rotation, rotate


@dataclass(eq=False)
class ForwardPass:
    """What the streams of one forward pass share."""

    tokens: Int[Tensor, "batch pos"] | None = None
    mask: Bool[Tensor, "batch total"] | None = None  # real tokens, those of the cache included
    cache: Any = None
    past_length: int = 0  # tokens in that cache before this pass
    calls: dict[int, int] = field(default_factory=dict)  # of each stream so far: a looped model runs a layer again
    embeddings: Float[Tensor, "batch pos d_model"] | None = None
    residuals: dict[int, Float[Tensor, "batch pos d_model"]] = field(default_factory=dict)  # entering a layer
    increments: Float[Tensor, "batch pos *head"] | None = None  # of a source that all layers share
    rotary_calls: list[RotaryCall] = field(default_factory=list)
    shared_work: dict[tuple[int, ...], Any] = field(default_factory=dict)
    turned: dict[int, tuple[Tensor, RotaryCall, Rotation]] = field(default_factory=dict)  # what others follow
    heads: dict[int, CosSin] = field(default_factory=dict)  # cos and sin of a layer, where per head
    checkpointed: bool = False  # layers run a second time in the backward pass
    with_grad: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "ForwardPass":
        """A copied model is between passes."""
        return ForwardPass()


class PositionStream(nn.Module):
    """Increments to positions to cos and sin at one layer, with a hook point at each."""

    def __init__(self, config: PositionConfig, index: int, layer: int, source: nn.Module | None, n_heads: int) -> None:
        super().__init__()
        self.config = config
        self.index = index  # its place among the streams
        self.layer = layer  # the model's own number of its layer
        self.followed = False  # by layers that attend to this layer's keys
        self.heads = (n_heads,) if config.per_head else ()
        self.source = source  # of this layer alone; None where static, shared or frozen
        self.hook_increments = HookPoint()
        self.hook_positions = HookPoint()
        self.hook_rotation = HookPoint()

    def forward(self, states: Tensor, call: RotaryCall | None, step: ForwardPass) -> Rotation | None:
        """The rotation for the attention of this layer, or None where it is the model's own.

        Args:
            states: hidden states entering the attention, for their shape and dtype.
            call: the rotary call whose cos and sin this layer was given; None where it cannot be told.
            step: what this forward pass shares.

        Returns:
            cos and sin [batch pos d_rotary], in the form that the rotary module gives them, with a "head" axis
            before d_rotary where per head.

        Raises:
            PositionsError: the layer runs outside a forward pass of its model, or gradients would be lost.
        """
        step.calls[self.index] = step.calls.get(self.index, -1) + 1
        past = self._past(states, step)
        static = self.config.source == "static"
        hooks = (self.hook_increments, self.hook_positions, self.hook_rotation)
        if static and past is None and not any(map(hooked_at, hooks)):
            return None
        if call is None:
            raise PositionsError(
                f"layer {self.layer} has cos and sin from no rotary call of this forward pass; expected the model's "
                "own (with gradient checkpointing: gradient_checkpointing_enable() and one backward pass for each)."
            )
        if self.config.learned and step.checkpointed and step.with_grad and not torch.is_grad_enabled():
            raise PositionsError(
                "reentrant gradient checkpointing loses the gradients of learned increments; expected "
                'gradient_checkpointing_enable({"use_reentrant": False}).'
            )
        with torch.autocast(states.device.type, enabled=False):
            given = self._given_increments(states, step)
            tokens = HookedTokens(step.past_length, call.position_ids, self.config.gap, step.mask)
            increments = run_hook(self.hook_increments, given, tokens)
            edited = increments is not given
            key = (id(given), id(past), id(call), torch.is_grad_enabled())
            shared = given is step.increments and not (edited or step.checkpointed)
            work = step.shared_work if shared else {}
            if key not in work:
                carry = running_sum(increments, past, step.mask, self.config.gap)
                base = add_to_ids(call.position_ids, carry, past, self.config.gap, increments.dtype)
                work[key] = base, with_past(carry.detach(), past, step.cache), past  # past keeps its id taken
            base, sums, _ = work[key]
            if step.cache is not None and not (static and past is None and not edited):
                remember(step.cache, (self.index, step.calls[self.index]), sums)
            positions = run_hook(self.hook_positions, base, tokens)
            if positions is base and not edited and static and past is None:
                rotation = None
            elif positions is not base:
                rotation = rotate(positions, call)
            else:
                if (*key, 1) not in work:
                    work[*key, 1] = rotate(base, call)
                rotation = work[*key, 1]
            if hooked_at(self.hook_rotation):
                rotation = hooked_rotation(self.hook_rotation, rotation, positions, call, tokens)
            if self.followed and rotation is not None:
                step.turned[self.index] = positions, call, rotation
            return rotation

    def _given_increments(self, states: Tensor, step: ForwardPass) -> Float[Tensor, "batch pos *head"]:
        if self.source is not None:
            residual = step.residuals[self.index]
            # A model with several residual streams mixes them into one for its attention: that one is read.
            return self.source(residual if residual.shape == states.shape else states)
        if step.increments is None:
            if self.config.source != "static":
                raise PositionsError(
                    f"the {self.config.source} source saw no tokens in this forward pass; expected the embeddings that "
                    "the model had when streams were attached (detach and attach again after a change)."
                )
            dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
            step.increments = torch.ones(*states.shape[:2], *self.heads, dtype=dtype, device=states.device)
        if len(step.increments) != len(states):  # rows of one prompt that joined on the way
            return step.increments[:1].expand(len(states), *step.increments.shape[1:])
        return step.increments

    def _past(self, states: Tensor, step: ForwardPass) -> Float[Tensor, "batch past *head"] | None:
        """The running sum at each token of the cache; None where there is no cache or it is all standard steps."""
        length = step.past_length
        if step.cache is None or length == 0:
            return None
        past = getattr(step.cache, "position_sums", {}).get((self.index, step.calls[self.index]))
        if past is None and self.config.source == "static":
            if not (hooked_at(self.hook_increments) or hooked_at(self.hook_positions)):
                return None
            return torch.zeros(states.shape[0], length, *self.heads, dtype=_wide(states), device=states.device)
        if past is None or past.shape[1] != length:
            known = 0 if past is None else past.shape[1]
            raise PositionsError(
                f"the key-value cache holds {length} tokens at layer {self.layer} and positions for {known} of them; "
                "expected a cache filled by this model with its position streams attached, changed only through "
                "its own methods."
            )
        return past


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
