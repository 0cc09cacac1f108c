"""How much of what a change of input does goes through the increments.

A clean and a corrupted prompt differ in their tokens, and so in their increments d. With m(tokens, d) the metric:

    total        m(corrupted, d of corrupted) - m(clean, d of clean)
    direct       m(corrupted, d of clean)     - m(clean, d of clean)      the tokens change, the increments are held
    increments   m(clean, d of corrupted)     - m(clean, d of clean)      the increments change, the tokens are held
    interaction  total - direct - increments

These are the natural direct and indirect effects of Pearl ("Direct and Indirect Effects", UAI 2001), used for language
models by Vig et al. (arXiv 2004.12265). For one layer, only its increments are held or changed, and the direct effect
contains what flows through those of the others. Increments that are set do not respond to what is upstream of them.

Where increments are not learned they are the same for both prompts: direct is total, and the rest 0.
"""

from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from ..analysis.intervals import t_interval
from ..errors import PositionsError
from ..interventions import Hooks, Some, freeze, hook_names
from ..progress import tracked
from .metrics import Metric, measured
from .replay import evaluating
from .sweeps import SITES, prompts_of

PATHS = ("total", "direct", "increments", "interaction")


def mediation(
    model: TransformerBridge,
    clean: Int[Tensor, "batch pos"],
    corrupted: Int[Tensor, "batch pos"],
    metric: Metric,
    layers: Some = None,
) -> pd.DataFrame:
    """Split the effect of a change of input into what goes through the increments and what does not.

    Args:
        model: a bridge with position streams.
        clean, corrupted: pairs of prompts, one a row, of one length: token t of a pair has the same place in both.
        metric: from logits [batch pos vocab] to one number a row; each row of both belongs to its pair.
        layers: the model's own layer numbers; None is all that rotate.

    Returns:
        Columns `layer` ("all" first: those layers together, then each alone), `path` (total, direct, increments,
        interaction: see the module), `n` (pairs), `mean` (over the pairs, in the metric's unit) and `low` to `high`,
        its 95% t interval (NaN for one pair).

    Raises:
        PositionsError: no streams, no such layer, prompts of different shape, or a metric that does not fit.
    """
    clean, corrupted = prompts_of(model, clean), prompts_of(model, corrupted)
    if clean.shape != corrupted.shape:
        raise PositionsError(
            f"clean has shape {tuple(clean.shape)} and corrupted {tuple(corrupted.shape)}; expected pairs of prompts "
            "of equal length, [batch pos] both."
        )
    hooks = hook_names(model, layers, SITES["increments"][0])
    names, numbers = [name for _, name in hooks], list(dict(hooks))
    with evaluating(model), torch.no_grad():
        logits_clean, of_clean = model.run_with_cache(clean, names_filter=names)
        logits_corrupted, of_corrupted = model.run_with_cache(corrupted, names_filter=names)
        base = _numbers(metric, logits_clean)
        total = _numbers(metric, logits_corrupted) - base
        rows: list[dict[str, Any]] = []
        for layer in tracked(["all", *numbers], "mediating", quick=len(numbers) < 4):
            which = None if layer == "all" else cast(int, layer)
            direct = _with(model, corrupted, metric, freeze(of_clean, layers=which)) - base
            through = _with(model, clean, metric, freeze(of_corrupted, layers=which)) - base
            effects = (total, direct, through, total - direct - through)
            for path, effect in zip(PATHS, effects, strict=True):
                low, high = t_interval(effect)
                rows.append(
                    {
                        "layer": layer,
                        "path": path,
                        "n": len(effect),
                        "mean": float(effect.mean()),
                        "low": low,
                        "high": high,
                    }
                )
    return pd.DataFrame(rows)


def _with(model: TransformerBridge, tokens: Tensor, metric: Metric, hooks: Hooks) -> np.ndarray:
    with model.hooks(fwd_hooks=hooks):
        return _numbers(metric, model(tokens, return_type="logits"))


def _numbers(metric: Metric, logits: Any) -> np.ndarray:
    return measured(metric, logits).double().cpu().numpy()
