"""Hook points of streams: what a hook function is given, what it may know, and what it may return."""

import threading
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from ..errors import PositionsError
from .visible_tokens import Documents, Line, Tree


@dataclass(frozen=True)
class HookedTokens:
    """Which tokens of a sequence an activation belongs to: a hook function finds it in `hook.ctx["tokens"]`.

    Attributes:
        past: tokens before these, held by a key-value cache.
        ids: the model's own whole positions.
        visible: which tokens a position sums over.
        frequencies: at a rotation, of each component of its cos and sin, in radians per position.
        sequence: the ids of all tokens so far, those of a key-value cache before those of this pass, padding included;
            None where they are not known (embeddings were passed, or the cache was filled without the streams).
    """

    past: int
    ids: Int[Tensor, "#batch pos"]
    visible: Line | Documents | Tree
    frequencies: Float[Tensor, " d_rotary"] | None = None
    sequence: Int[Tensor, "#batch total"] | None = None

    def real(self) -> Bool[Tensor, "#batch pos"]:
        """The tokens that are not padding."""
        return self.visible.real_now()

    def real_so_far(self) -> Bool[Tensor, "#batch total"] | None:
        """The tokens that are not padding, those of the cache included; None: all are, or it is not known of them."""
        return self.visible.real if isinstance(self.visible, Line) else None

    def between(self) -> Bool[Tensor, "#batch pos"]:
        """The tokens whose increment lies between two real tokens: all but the first (gap "after": the last)."""
        return self.visible.between()

    def in_a_row(self) -> bool:
        """Whether the tokens are one text: neither packed documents nor branches."""
        return isinstance(self.visible, Line)


class StreamHookPoint(HookPoint):
    """A hook point whose `ctx` is each thread's own: two threads may run one model, each its own forward pass."""

    def __init__(self) -> None:
        self._ctx = threading.local()
        super().__init__()

    @property
    def ctx(self) -> dict[str, Any]:
        """What a hook function may know, and keep, in this thread."""
        return self._ctx.__dict__

    @ctx.setter
    def ctx(self, value: dict[str, Any]) -> None:
        self._ctx.__dict__.clear()
        self._ctx.__dict__.update(value)

    @ctx.deleter
    def ctx(self) -> None:
        self._ctx.__dict__.clear()

    def __getstate__(self) -> dict[str, Any]:
        # A thread's own values can be neither pickled nor copied.
        return {name: value for name, value in self.__dict__.items() if name != "_ctx"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__["_ctx"] = threading.local()
        super().__setstate__(state)


def run_hook(
    hook: HookPoint,
    activation: Float[Tensor, "batch pos *rest"],
    tokens: HookedTokens | None = None,
    *,
    watched: bool = True,
) -> Float[Tensor, "batch pos *rest"]:
    """Pass an activation through its hook point.

    Hook functions get a copy, so that one that edits in place does not reach other layers. Where no function changed
    the copy, the activation itself comes back: layers share work by the identity of what they were given.

    Args:
        hook: the hook point.
        activation: increments, positions or a rotation.
        tokens: what hook functions may know of the tokens, where the hook point belongs to a layer.
        watched: whether a copy with a gradient comes back although no function changed it, as one may have kept it to
            ask for that gradient. Otherwise only where the gradient is a function's doing.

    Raises:
        PositionsError: a hook function returned another shape, or NaN or infinite values.
    """
    if not has_hooks(hook):
        return activation

    given = activation.clone()
    if hook.bwd_hooks and torch.is_grad_enabled() and not given.requires_grad:
        given.requires_grad_()  # a backward hook is called with the gradient of it

    # PyTorch counts the changes in place of a tensor, except in inference mode.
    version = None if given.is_inference() else given._version

    # A hook function has one way to learn more than the activation: the `ctx` of its hook point.
    hook.ctx["tokens"] = tokens
    try:
        returned = hook(given)
    finally:
        hook.ctx.pop("tokens", None)

    if returned is given and version is not None and given._version == version:
        asked = watched or bool(hook.bwd_hooks) or not activation.requires_grad
        return given if given.requires_grad and asked else activation

    # An edit of another shape would broadcast in the sum, and give numbers that mean nothing.
    if not isinstance(returned, Tensor) or returned.shape != activation.shape:
        shape = tuple(returned.shape) if isinstance(returned, Tensor) else type(returned).__name__
        raise PositionsError(
            f"a hook function at {hook.name} returned {shape}; expected a tensor of shape {tuple(activation.shape)}."
        )
    if not torch.isfinite(returned).all():
        raise PositionsError(f"a hook function at {hook.name} returned NaN or infinite values; expected finite ones.")
    return returned.to(activation.dtype)


def has_hooks(hook: HookPoint) -> bool:
    """Whether a hook point has hook functions."""
    # PyTorch's own records: TransformerLens lists only the hooks that were added through it.
    return bool(hook._forward_hooks or hook._backward_hooks)
