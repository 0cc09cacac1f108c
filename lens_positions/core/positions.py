"""From increments to positions, and from positions to cos and sin: all the arithmetic of the idea.

Standard RoPE puts each token one step after the one before it. Here that step is an increment d of any size, and a
position is the sum of the increments on the way. Three tokens, of which the second stands half a step after the first
and the third two steps after the second:

    >>> increments = torch.tensor([[1.0, 0.5, 2.0]], requires_grad=True)
    >>> ids = torch.tensor([[0, 1, 2]])  # the model's own position ids

A position is the model's own id plus the running sum of (d - 1), so that increments of 1 give the ids back to the bit,
and whatever the model says by its ids (an offset for padding, a start after a cache) is kept. Since sum(d - 1) is
sum(d) - sum(1), a position is also (ids - sum(1)) + sum(d). The bracket is the *origin*: it does not depend on d, and
so is computed once for all layers. With gap "before", d is the step before its token, and that of the first token
counts for nothing, since no token precedes it:

    >>> counted = torch.tensor([[0.0, 1.0, 1.0]], dtype=torch.float64)
    >>> origin = ids - running_sum(torch.ones(1, 3), counted, gap="before")
    >>> origin.tolist()  # zero, as these ids go up by one from 0
    [[0.0, 0.0, 0.0]]
    >>> positions = positions_at(origin, running_sum(increments, counted, gap="before"), torch.float32)
    >>> positions.tolist()
    [[0.0, 0.5, 2.5]]

With gap "after", d is the step after its token, and that of the last token counts for nothing, as no sum reaches it:

    >>> origin = ids - running_sum(torch.ones(1, 3), gap="after")
    >>> positions_at(origin, running_sum(increments, gap="after"), torch.float32).tolist()
    [[0.0, 1.0, 1.5]]

The model's own rotary module turns positions into cos and sin, here of a single frequency of one radian a step, which
it repeats for both halves of a head:

    >>> from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding
    >>> module = LlamaRotaryEmbedding(LlamaConfig(hidden_size=2, num_attention_heads=1))
    >>> def rotary(positions):
    ...     return module(torch.empty(0), positions)  # the first argument gives the dtype and the device
    >>> def frequencies(positions):
    ...     return torch.tensor([1.0, 1.0])
    >>> cos, sin = cos_and_sin(positions, rotary, frequencies)
    >>> cos[0, :, 0].tolist() == positions[0].cos().tolist()
    True

Rotary modules work without gradients. `cos_and_sin` ties the gradient on: d sin(p) / dp = cos(p), and with gap
"before", as in `positions` above, the last token's p moves with the second and the third increment alike.

    >>> sin[0, 2, 0].backward()
    >>> increments.grad[0].tolist() == [0.0, cos[0, 2, 0].item(), cos[0, 2, 0].item()]
    True

Which tokens a position sums over, where they are not simply all before it, is in `visible_tokens.py`.

Rotary embedding: Su et al., "RoFormer" (arXiv 2104.09864).
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

CosSin = tuple[Float[Tensor, "batch pos *head d_rotary"], Float[Tensor, "batch pos *head d_rotary"]]


def running_sum(
    increments: Float[Tensor, "batch pos *head"],
    counted: Float[Tensor, "#batch pos"] | None = None,
    *,
    gap: str,
    start: Float[Tensor, "batch 1 *head"] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, "batch pos *head"]:
    """Sum d over the tokens up to each one.

    Args:
        increments: d of each token.
        counted: 1 where d counts, 0 where it does not: at padding and, with gap "before", at the first token of a text.
            None: every d counts.
        gap: with "before" a sum includes the token's own d, with "after" it ends with that of the token before it.
        start: the sum over the tokens of a key-value cache, the last one's d included; None: there is no cache.
        dtype: of the sum, where `counted` is None; otherwise that of `counted` decides. In float32, errors would add up
            over a long text.
    """
    # A product with float64 also widens d, in one operator.
    d = increments.to(dtype) if counted is None else beside_heads(counted, increments) * increments
    total = d.cumsum(1)
    if start is not None:
        total = total + start
    if gap == "before":
        return total

    # The sum up to the token before, whose d leads to this one.
    first = torch.zeros_like(total[:, :1]) if start is None else start
    return torch.cat([first, total[:, :-1]], dim=1)


def positions_at(
    origin: Float[Tensor, "#batch pos"], total: Float[Tensor, "batch pos *head"], dtype: torch.dtype
) -> Float[Tensor, "batch pos *head"]:
    """Positions: the origin plus the running sum, added in the sum's float64 and rounded once.

    The origin is the model's own position ids less the running sum of ones over the same tokens. Where every d is 1
    both terms are whole numbers, which float64 adds exactly, so that the ids come back to the bit.
    """
    return (beside_heads(origin, total) + total).to(dtype)


def beside_heads(x: Tensor, values: Float[Tensor, "batch pos *head"]) -> Tensor:
    """Numbers [batch, pos] in a shape that broadcasts with values that may have a head axis."""
    return x if values.ndim == 2 else x.unsqueeze(-1)


def cos_and_sin(
    positions: Float[Tensor, "batch pos *head"],
    rotary: Callable[[Tensor], CosSin],
    frequencies: Callable[[Tensor], Float[Tensor, " d_rotary"]],
) -> CosSin:
    """Rotate by positions: cos and sin as the model's own rotary module gives them, with the gradient of the positions.

    Args:
        positions: one for each token, or one for each token and head.
        rotary: the module, from positions [batch, pos] to cos and sin [batch, pos, d_rotary].
        frequencies: the radians per position of each component of cos and sin, in the dtype of the positions, which it
            is given because dynamic scaling chooses them by the length; called only where gradients are recorded.

    Returns:
        cos and sin, with the head axis before the last one where positions have it.
    """
    # A rotary module knows no heads: those of a token stand in a row, as if they were more tokens.
    flat = positions.flatten(1)
    with torch.no_grad():
        cos, sin = rotary(flat)
    if positions.requires_grad and torch.is_grad_enabled():
        cos, sin = RotaryGradient.apply(flat, cos, sin, frequencies(flat))
    if positions.ndim == 2:
        return cos, sin
    return cos.unflatten(1, positions.shape[1:]), sin.unflatten(1, positions.shape[1:])


class RotaryGradient(torch.autograd.Function):
    """cos and sin as they are, with the gradient of the positions that they were computed from.

    The model's own module computes them under no_grad, so that they are its own to the bit, be its RoPE scaled,
    partial or of another base in local layers. The derivative needs only the frequencies w of the module:
    d cos / dp = -w sin and d sin / dp = w cos. A factor that the module multiplies both with (attention scaling) is in
    cos and sin already, and so in their derivatives.
    """

    @staticmethod
    def forward(
        ctx: Any, positions: Float[Tensor, "batch pos"], cos: Tensor, sin: Tensor, w: Float[Tensor, " d_rotary"]
    ) -> CosSin:
        """Return cos and sin unchanged."""
        # An autograd function must not return its inputs themselves; a view costs nothing. torch.compile stores what
        # has this kind of view, where it would otherwise compute cos and sin anew for each head.
        cos, sin = (x.as_strided(x.size(), x.stride()) for x in (cos, sin))
        ctx.save_for_backward(cos, sin, w)
        ctx.dtype = positions.dtype
        return cos, sin

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        """Return the gradient of the positions, in their float32 (or float64) whatever the model's dtype."""
        cos, sin, w = ctx.saved_tensors
        grad_cos, grad_sin = gradients

        # Sum over components of w (grad_sin cos - grad_cos sin).
        angle = torch.addcmul(grad_sin.to(ctx.dtype) * cos, grad_cos.to(ctx.dtype), sin, value=-1)
        return angle @ w, None, None, None
