"""The position stream: increments -> positions -> cos and sin, at one layer.

    increments  d[batch, pos]   from the source                                     hook_increments
    positions   p[batch, pos]   the model's own position ids + running sum of d - 1   hook_positions
    cos, sin    the model's own rotary module, called with these positions              hook_rotation

Writing the sum around the model's own position ids keeps everything that they know (padding, the offset of a
cache, packed documents), and all-ones increments give the model's positions back to the bit. Without padding
and cache it is p_0 = 0, p_t = d_1 + ... + d_t (gap "before") or p_t = d_0 + ... + d_{t-1} (gap "after").

The sum runs over the tokens that a token can see (`visible.py`), in float64; positions are float32 (float64 in a
float64 model), whatever the model's dtype. A stream that nobody edits and whose source is static leaves the model's cos
and sin untouched; a shared or frozen one computes them once per forward pass. With a key-value cache a stream goes on
where that cache stopped: what it needs is kept in the cache object itself (`memory.py`).
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PositionsError
from .forward_pass import ForwardPass, SharedWork
from .hook_points import HookedTokens, StreamHookPoint, hooked_at, run_hook
from .increments import PositionConfig
from .kv_cache import memory_of, with_memory
from .positions import positions_at
from .rotation import RotaryCall, Rotation, hooked_rotation, moved_to, rotate
from .visible_tokens import Line, Tree, Visible, visible_tokens


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
        self.hook_increments = StreamHookPoint()
        self.hook_positions = StreamHookPoint()
        self.hook_rotation = StreamHookPoint()

    def forward(self, states: Tensor, handed: Any, call: RotaryCall | None, step: ForwardPass) -> Rotation | None:
        """The rotation for the attention of this layer, or None where it is the model's own.

        Args:
            states: hidden states entering the attention, for their shape, dtype and device.
            handed: the model's own rotation that this layer was given, often one row for all; None where there is none.
            call: the rotary call that it is from; None where it cannot be told.
            step: what this forward pass shares.

        Returns:
            cos and sin [batch pos d_rotary], in the form that the rotary module gives them, with a "head" axis
            before d_rotary where per head.

        Raises:
            PositionsError: the layer runs outside a forward pass of its model, gradients would be lost, or the mask
                does not say which tokens a token sees.
        """
        key = (self.index, step.count(self.index))
        surplus = self._past_surplus(states, step, key)
        static = self.config.source == "static"
        listened = hooked_at(self.hook_increments) or hooked_at(self.hook_positions) or hooked_at(self.hook_rotation)
        if static and surplus is None and not listened:
            return None
        call = self._known(call, step)
        with full_precision(states.device.type):
            increments, positions, work, tokens = self._positions(states, call, surplus, step)

            # A static stream that was only looked at leaves the rotation to the model.
            untouched = static and surplus is None and work.increments is increments
            if positions is not work.positions:
                rotation: Rotation | None = rotate(positions, call)
            elif untouched:
                rotation = None
            else:
                if work.rotation is None:
                    work.rotation = rotate(positions, call)
                rotation = work.rotation

            if step.cache is not None and not untouched:
                _remember(step, key, increments, surplus)
            if hooked_at(self.hook_rotation):
                rotation = hooked_rotation(self.hook_rotation, rotation, handed, positions, call, tokens)
            if rotation is None:
                return None
            if self.followed:
                step.turned[self.index] = positions, call, rotation
            return moved_to(rotation, states.device)

    def _positions(
        self, states: Tensor, call: RotaryCall, surplus: Tensor | None, step: ForwardPass
    ) -> tuple[Tensor, Tensor, SharedWork, HookedTokens]:
        """The increments and positions after their hooks, the work before, and what hooks may know of the tokens."""
        ids = call.position_ids
        given = self._given_increments(states, step).to(ids.device)
        visible = _visible(step, call, self.config.gap, given)
        tokens = HookedTokens(step.past_length, ids, visible)
        increments = run_hook(self.hook_increments, given, tokens)
        shares = given is step.increments and increments is given and not step.checkpointed
        for work in step.shared if shares else ():
            if work.is_of(increments, surplus, call):
                break
        else:
            total = visible.sum(increments, None if surplus is None else surplus.to(ids.device))
            base = positions_at(ids, total, increments.dtype)
            work = SharedWork(given, surplus, call, torch.is_grad_enabled(), base)
            if shares:
                step.shared.append(work)
        return increments, run_hook(self.hook_positions, work.positions, tokens), work, tokens

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

    def _past_surplus(
        self, states: Tensor, step: ForwardPass, key: tuple[int, int]
    ) -> Float[Tensor, "batch past *head"] | None:
        """d - 1 of each token of the cache; None where there is no cache or it is all standard steps."""
        length = step.past_length
        if step.cache is None or length == 0:
            return None
        memory = memory_of(step.cache)
        surplus = None if memory is None else memory.surplus.get(key)
        if surplus is None and self.config.source == "static":
            if not (hooked_at(self.hook_increments) or hooked_at(self.hook_positions)):
                return None
            return torch.zeros(states.shape[0], length, *self.heads, dtype=wide_dtype(states), device=states.device)
        if surplus is None or surplus.shape[:2] != (len(states), length):
            known = "none" if surplus is None else f"{len(surplus)} rows of {surplus.shape[1]}"
            raise PositionsError(
                f"the key-value cache holds {len(states)} rows of {length} tokens at layer {self.layer} and positions "
                f"for {known}; expected a cache filled by this model with its position streams attached, changed only "
                "through its own methods."
            )
        return surplus

    def _known(self, call: RotaryCall | None, step: ForwardPass) -> RotaryCall:
        """The rotary call, if increments may act in this pass."""
        if step.paged:
            raise PositionsError(
                "the model runs several texts in pages of one cache (continuous batching), where increments cannot "
                "tell whose tokens a token follows; expected generate() with another cache."
            )
        if call is None:
            raise PositionsError(
                f"layer {self.layer} has cos and sin from no rotary call of this forward pass; expected the model's "
                "own."
            )
        if self.config.learned and step.checkpointed and step.with_grad and not torch.is_grad_enabled():
            raise PositionsError(
                "reentrant gradient checkpointing loses the gradients of learned increments; expected "
                'gradient_checkpointing_enable({"use_reentrant": False}).'
            )
        return call


def full_precision(device: str) -> AbstractContextManager[Any]:
    """Outside autocast: bf16 cannot tell positions apart past 256."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of sums."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _visible(step: ForwardPass, call: RotaryCall, gap: str, increments: Tensor) -> Visible:
    """What tokens see of each other, found out once a pass."""
    ids = call.position_ids
    if step.visible is None or step.visible.wide.device != ids.device:
        memory, mask = memory_of(step.cache), step.mask
        if step.cache is not None and isinstance(mask, Tensor) and mask.ndim == 2:
            mask = mask[:, : step.past_length + ids.shape[1]]  # one for all that the cache has room for
        step.visible = visible_tokens(
            mask,
            ids,
            gap,
            torch.empty(0, dtype=wide_dtype(increments), device=ids.device),
            packed=step.ids_given and step.cache is None and call.axes is None,
            past=step.past_length,
            slides=any(getattr(step.cache, "is_sliding", ())),
            real=None if memory is None else memory.real,
            ancestors=None if memory is None else memory.ancestors,
        )
    return step.visible


def _remember(step: ForwardPass, key: tuple[int, int], increments: Tensor, surplus: Tensor | None) -> None:
    """Keep d - 1 of all tokens in the cache that holds their keys, and which of them see which."""
    memory, visible = with_memory(step.cache), step.visible
    shared = [total for known, past, total in step.remembered if known is increments and past is surplus]
    if shared:  # by layers that share their increments
        total = shared[0]
    else:
        total = increments.detach().to(wide_dtype(increments)) - 1
        total = total if surplus is None else torch.cat([surplus.to(total.device), total], dim=1)
        step.remembered.append((increments, surplus, total))
    memory.surplus[key] = total
    if isinstance(visible, Line) and visible.real is not None:
        memory.real = visible.real
    elif isinstance(visible, Tree):
        memory.ancestors = visible.every
