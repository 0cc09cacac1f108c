"""Positions of heads: increments that each key-value head has for itself.

A model hands all heads of a layer one (cos, sin), so those of each head cannot take that way. Instead the outputs of
the query and key projections are rotated head by head, and the attention is handed the rotation by nothing:

    one for all heads      q_proj, k_proj -> attention rotates by (cos, sin) -> scores
    one for each head      q_proj, k_proj -> rotated here -> attention rotates by (1, 0), by nothing -> scores

That is exact where the attention rotates the two halves of whole heads straight after the projections, as Llama does.
Whether it does is tried when streams are attached, and refused where it does not.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PositionsError
from .devices import device_of
from .model_state import evaluation_mode
from .positions import CosSin


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


def identity_like(cos_sin: CosSin) -> CosSin:
    """The rotation by an angle of 0, which an attention is handed when its heads are rotated already."""
    cos, sin = cos_sin
    return torch.ones_like(cos), torch.zeros_like(sin)


def projections_of(attention: Any) -> tuple[nn.Module, nn.Module]:
    """The modules whose outputs are rotated head by head."""
    return attention.q_proj, attention.k_proj


def hook_projections(attention: Any, rotation: Callable[[], CosSin | None]) -> list[Any]:
    """Rotate the queries and keys of an attention, head by head, in every forward pass; returns handles to remove.

    Args:
        attention: the module with the projections.
        rotation: gives cos and sin [batch pos head d_rotary] of the pass that runs, or None to rotate nothing.
    """
    hook = partial(_rotate_output, rotation, attention.head_dim)
    return [projection.register_forward_hook(hook) for projection in projections_of(attention)]


def _rotate_output(
    rotation: Callable[[], CosSin | None], d_head: int, _module: nn.Module, _args: tuple[Any, ...], output: Tensor
) -> Tensor | None:
    cos_sin = rotation()
    return None if cos_sin is None else rotate_heads(output, cos_sin, d_head)


def refuse_split_inputs(component: nn.Module) -> None:
    """Refuse a pass of a bridge that computes queries and keys without the projections.

    Raises:
        PositionsError: one of TransformerLens' switches that do so is on.
    """
    config = getattr(component, "config", None)
    for switch in ("use_split_qkv_input", "use_attn_in"):
        if getattr(config, switch, False) is True:
            raise PositionsError(
                f"set_{switch}(True) goes around the projections, whose outputs per-head increments rotate; "
                f"expected set_{switch}(False) or per_head=False."
            )


def refuse_inexact_heads(attention: Any, rotary: list[nn.Module], d_model: int, dtype: torch.dtype) -> None:
    """Refuse an attention whose heads cannot be rotated at its projections.

    Args:
        attention: the model's own module.
        rotary: the rotary modules of the model; none where each attention has its own.
        d_model: width of the hidden states.
        dtype: their dtype.

    Raises:
        PositionsError: it has no separate projections, or does something between them and the rotation, or rotates
            in another way.
    """
    kind = type(attention).__name__
    if not (hasattr(attention, "q_proj") and hasattr(attention, "k_proj") and hasattr(attention, "head_dim")):
        raise PositionsError(
            f"per-head increments are not exact in {kind}, which has no separate query and key projections; expected "
            "a model such as Llama, or per_head=False."
        )

    normed = [n for n, _ in attention.named_children() if "norm" in n]
    if normed:
        raise PositionsError(
            f"per-head increments are not exact in {kind}, which has {normed[0]} between projection and rotation; "
            "expected a model without it, or per_head=False."
        )

    clipped = getattr(getattr(attention, "config", None), "clip_qkv", None) is not None
    if clipped or not rotary or not _rotates_halves(attention, rotary[0], d_model, dtype):
        raise PositionsError(
            f"per-head increments are not exact in {kind}, which does not rotate the two halves of each whole head "
            "straight after the projection; expected a model such as Llama, or per_head=False."
        )


def _rotates_halves(attention: Any, rotary: nn.Module, d_model: int, dtype: torch.dtype) -> bool:
    """Try it: the attention with its own rotation against rotated projections and the identity rotation."""
    device = device_of(attention)
    states = torch.randn(1, 8, d_model, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    hooks: list[Any] = []
    try:
        with evaluation_mode(attention), torch.no_grad():
            # Large enough for scores of a few units, which turning makes a difference to.
            states *= 2 / (attention.q_proj(states).std() * attention.k_proj(states).std()).sqrt()
            cos, sin = rotary(states, 7 * torch.arange(8, device=device)[None])
            own = attention(states, position_embeddings=(cos, sin), attention_mask=None)[0]

            of_one_head = cos[:, :, None], sin[:, :, None]
            hooks = hook_projections(attention, lambda: of_one_head)
            ours = attention(states, position_embeddings=identity_like((cos, sin)), attention_mask=None)[0]

        # Another layout is off by the size of the output; rounding, also in bf16, by far less.
        return bool((ours - own).abs().max() <= 0.02 * own.abs().max())
    except (RuntimeError, TypeError, ValueError):
        return False  # an attention that takes other arguments
    finally:
        for hook in hooks:
            hook.remove()
