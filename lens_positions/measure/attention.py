"""Running a model for what its attention does: hooks that look, and no gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from ..core.find_attention import parameters
from ..core.model_state import evaluation_mode
from ..core.model_wrappers import base_model
from ..core.own_thread import own_hooks
from ..errors import PositionsError
from ..interventions import HOOK, Hooks, LayerIndices, hook_names

EARLIEST = 16
"""Queries before this one are left out where attention is judged from afar: they have few keys to choose from."""


def attention_names(model: TransformerBridge, layers: LayerIndices, what: str) -> dict[int, str]:
    """The hook point of "pattern" or "attn_scores" by layer.

    Scores are tried, on three tokens: an edit of them has to reach the pattern.

    Raises:
        PositionsError: no such layer, or one whose attention TransformerLens does not show, or shows for reading alone.
    """
    names = dict(hook_names(model, layers, HOOK.format(what)))
    if missing := [layer for layer, name in names.items() if name not in model.hook_dict]:
        raise PositionsError(f"layer {missing[0]} shows no {what} in TransformerLens; expected attention that does.")
    if what == "attn_scores":
        # Scores that are known and differ from the model's: a pattern that does not follow them is not made from them.
        edits: Hooks = [(name, _by_place) for name in names.values()]
        run_for_hooks(model, torch.zeros(1, 3, dtype=torch.long), [*edits, *softmax_checks(names)])
    return names


def _by_place(scores: Float[Tensor, "*rows key"], hook: HookPoint) -> Float[Tensor, "*rows key"]:
    """Scores that are the place of their key."""
    places = torch.arange(scores.shape[-1]).to(scores)
    return scores.where(hidden_keys(scores), places)


def softmax_checks(names: dict[int, str]) -> Hooks:
    """Hooks that refuse patterns which are not the softmax of the scores that are read at these hook points."""
    hooks: Hooks = []
    for layer, name in names.items():
        seen: list[Tensor] = []

        # `seen` as a default argument, so that each layer has its own: a closure would see the last one.
        def note(scores: Tensor, hook: HookPoint, seen: list[Tensor] = seen) -> None:
            # Two queries are enough to tell, and all of them would double the memory of a pass.
            seen[:] = [scores[:, :, [scores.shape[2] // 2, -1]].detach()]

        def check(pattern: Tensor, hook: HookPoint, seen: list[Tensor] = seen, layer: int = layer) -> None:
            if not seen:
                raise PositionsError(
                    f"layer {layer} computes its pattern before TransformerLens shows its scores, so that an edit of "
                    "them would change nothing; expected attention that goes through its hook points."
                )
            own = pattern[:, :, [pattern.shape[2] // 2, -1]].detach().float()

            # A hundredth lets half precision pass, and nothing that a model does on purpose.
            if (seen.pop().float().softmax(-1) - own).abs().max() > 1e-2:
                raise PositionsError(
                    f"the patterns of layer {layer} are not the softmax of its scores (it may have a sink of its own); "
                    "expected plain attention."
                )

        hooks += [(name, note), (name.replace("hook_attn_scores", "hook_pattern"), check)]
    return hooks


@contextmanager
def hooked_evaluation(model: TransformerBridge, hooks: Hooks) -> Iterator[None]:
    """In eval mode, without gradients, and with these hooks."""
    with evaluation_mode(model), torch.no_grad(), own_hooks(model, hooks):
        yield


def run_for_hooks(model: TransformerBridge, tokens: Int[Tensor, "batch pos"], hooks: Hooks) -> None:
    """Run rows for what hooks see of them; their logits are of no use."""
    base = base_model(model)

    # The logits of a whole batch may take more memory than everything else.
    fewer = {"logits_to_keep": 1} if "logits_to_keep" in parameters(base) else {}
    with hooked_evaluation(model, hooks):
        model(tokens.to(base.device), return_type=None, use_cache=False, **fewer)


def hidden_keys(scores: Float[Tensor, "*rows key"]) -> Bool[Tensor, "*rows key"]:
    """Which keys a mask hides, whether by minus infinity or by the least number."""
    # Half of the least number: models add masks to scores, which moves the sum off the least.
    return scores <= torch.finfo(scores.dtype).min / 2


def visible_keys(scores: Float[Tensor, "*rows query key"]) -> Bool[Tensor, "*rows query key"]:
    """Which keys a query sees: none after it, and none that the model's mask hides."""
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return causal & ~hidden_keys(scores)


def keep_states(kept: dict[Any, Tensor], what: Any, states: Tensor, hook: HookPoint) -> None:
    """A hook function that keeps what it sees."""
    kept[what] = states.detach()
