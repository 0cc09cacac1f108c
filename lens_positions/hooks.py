"""Pass increments and positions through TransformerLens' hook points, and know whether anything changed."""

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from .errors import PositionsError


def run_hook(hook: HookPoint, activation: Float[Tensor, "batch pos *head"]) -> Float[Tensor, "batch pos *head"]:
    """Pass an activation through its hook point; the same object comes back where nothing changed it.

    Hook functions get a copy, so that one that edits in place does not reach other layers.

    Raises:
        PositionsError: a hook function returned another shape, or NaN or infinite values.
    """
    if not hooked_at(hook):
        return activation
    given = activation.clone()
    if hook.bwd_hooks and torch.is_grad_enabled() and not given.requires_grad:
        given.requires_grad_()
    version = None if given.is_inference() else given._version  # inference tensors do not count their changes
    returned = hook(given)
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
