"""Running a model for what its attention does: hooks that look, and no gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from ..attach import unbridged
from ..causal.replay import evaluating
from ..errors import PositionsError
from ..interventions import HOOK, Hooks, Some, hook_names
from ..sites import parameters

EARLIEST = 16
"""Queries before this one are left out where attention is judged from afar: they have few keys to choose from."""


def attention_names(model: TransformerBridge, layers: Some, what: str) -> dict[int, str]:
    """The hook point of "pattern" or "attn_scores" by layer.

    Raises:
        PositionsError: no such layer, or one whose attention TransformerLens does not show.
    """
    names = dict(hook_names(model, layers, HOOK.format(what)))
    if missing := [layer for layer, name in names.items() if name not in model.hook_dict]:
        raise PositionsError(f"layer {missing[0]} shows no {what} in TransformerLens; expected attention that does.")
    return names


@contextmanager
def evaluated(model: TransformerBridge, hooks: Hooks) -> Iterator[None]:
    """In eval mode, without gradients, and with these hooks."""
    with evaluating(model), torch.no_grad(), model.hooks(fwd_hooks=cast(Any, hooks)):
        yield


def run(model: TransformerBridge, tokens: Int[Tensor, "batch pos"], hooks: Hooks) -> None:
    """Run rows for what hooks see of them; their logits are of no use."""
    base = unbridged(model)
    fewer = {"logits_to_keep": 1} if "logits_to_keep" in parameters(base) else {}
    with evaluated(model, hooks):
        model(tokens.to(base.device), return_type=None, use_cache=False, **fewer)


def hidden(scores: Float[Tensor, "*rows key"]) -> Bool[Tensor, "*rows key"]:
    """Which keys a mask hides, whether by minus infinity or by the least number."""
    return scores <= torch.finfo(scores.dtype).min / 2


def keep(kept: dict[Any, Tensor], what: Any, states: Tensor, hook: HookPoint) -> None:
    """A hook function that keeps what it sees."""
    kept[what] = states.detach()
