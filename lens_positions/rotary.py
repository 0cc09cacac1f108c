"""Rotation by fractional positions: the model's own rotary module, with the gradient that it would not give.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (arXiv 2104.09864).
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

CosSin = tuple[Float[Tensor, "batch pos *head d_rotary"], Float[Tensor, "batch pos *head d_rotary"]]


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

    def frequencies(self, positions: Float[Tensor, "batch pos"]) -> Float[Tensor, " d_rotary"]:
        """The rotary frequency of each component of cos and sin at these positions, in radians per position.

        Read off the module at one small angle, where atan2(sin, cos) / p is w to rounding, so that neither its
        layout (halves or pairs) nor its scaling need be known. The largest position goes along, because dynamic
        and long RoPE choose their frequencies by it.
        """
        follows_length = any(kind in str(getattr(self.module, "rope_type", "")) for kind in ("dynamic", "longrope"))
        if self._frequencies is None or follows_length:
            p = 2.0**-12
            with torch.no_grad():
                probe = positions.new_full((1, 1), p)
                if follows_length:
                    probe = torch.cat([probe, positions.max().view(1, 1)], dim=1)
                cos, sin = self.at(probe, positions)
                self._frequencies = torch.atan2(sin, cos)[0, 0] / p
        return self._frequencies


class Rotate(torch.autograd.Function):
    """cos and sin of positions by the model's own rotary module, with the gradient it would not give.

    The module decides the values, so scaled, partial and two-base RoPE stay exact. It works under no_grad; the
    derivative needs only its frequencies w: d cos/dp = -w sin, d sin/dp = w cos, attention scaling included.
    """

    @staticmethod
    def forward(ctx: Any, positions: Float[Tensor, "batch pos"], call: RotaryCall) -> CosSin:
        """cos and sin in the dtype of the model."""
        cos, sin = call.at(positions)
        ctx.save_for_backward(cos, sin, call.frequencies(positions))
        ctx.dtype = positions.dtype
        return cos, sin

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        """The gradient of the positions."""
        cos, sin, w = ctx.saved_tensors
        grad_cos, grad_sin = gradients
        angle = grad_sin.to(ctx.dtype) * cos - grad_cos.to(ctx.dtype) * sin
        return (angle * w).sum(-1), None


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
