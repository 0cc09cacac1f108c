"""Pass increments, positions and rotations through TransformerLens' hook points, and know whether anything changed."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from .errors import PositionsError


@dataclass(frozen=True)
class HookedTokens:
    """Which tokens of a sequence an activation belongs to: a hook function finds it in `hook.ctx["tokens"]`.

    Attributes:
        past: tokens before these, held by a key-value cache.
        ids: the model's own whole positions.
        gap: the convention of the increments.
        mask: the real tokens of the sequence, those of the cache included; None: all are.
        frequencies: at a rotation, of each component of its cos and sin, in radians per position.
    """

    past: int
    ids: Int[Tensor, "#batch pos"]
    gap: str
    mask: Bool[Tensor, "batch total"] | None = None
    frequencies: Float[Tensor, " d_rotary"] | None = None

    def real(self) -> Bool[Tensor, "#batch pos"]:
        """The tokens that are not padding."""
        length = self.ids.shape[1]
        return torch.ones_like(self.ids, dtype=torch.bool) if self.mask is None else self.mask[:, -length:]

    def moved(self) -> Bool[Tensor, "#batch pos"]:
        """The tokens whose increment lies between two real tokens: all but the first (gap "after": the last)."""
        real = self.real()
        if self.gap == "before":
            whole = real if self.mask is None else self.mask
            earlier = whole.cumsum(1)[:, -real.shape[1] :] + (self.past if self.mask is None else 0)
            return real & (earlier > 1)
        return real & (real.flip(1).cumsum(1).flip(1) > 1)


def run_hook(
    hook: HookPoint, activation: Float[Tensor, "batch pos *rest"], tokens: HookedTokens | None = None
) -> Float[Tensor, "batch pos *rest"]:
    """Pass an activation through its hook point; the same object comes back where nothing changed it.

    Hook functions get a copy, so that one that edits in place does not reach other layers.

    Args:
        hook: the hook point.
        activation: increments, positions or a rotation.
        tokens: what hook functions may know of the tokens, where the hook point belongs to a layer.

    Raises:
        PositionsError: a hook function returned another shape, or NaN or infinite values.
    """
    if not hooked_at(hook):
        return activation
    given = activation.clone()
    if hook.bwd_hooks and torch.is_grad_enabled() and not given.requires_grad:
        given.requires_grad_()
    version = None if given.is_inference() else given._version  # inference tensors do not count their changes
    hook.ctx["tokens"] = tokens
    try:
        returned = hook(given)
    finally:
        hook.ctx.pop("tokens", None)
    if returned is given and version is not None and given._version == version:
        return given if given.requires_grad else activation
    if not isinstance(returned, Tensor) or returned.shape != activation.shape:
        shape = tuple(returned.shape) if isinstance(returned, Tensor) else type(returned).__name__
        raise PositionsError(
            f"a hook function at {hook.name} returned {shape}; expected a tensor of shape {tuple(activation.shape)}."
        )
    if not torch.isfinite(returned).all():
        raise PositionsError(f"a hook function at {hook.name} returned NaN or infinite values; expected finite ones.")
    return returned.to(activation.dtype)


def hooked_at(hook: HookPoint) -> bool:
    """Whether anybody listens at a hook point."""
    return bool(hook._forward_hooks or hook._backward_hooks)
