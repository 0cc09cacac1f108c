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

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from ..core.model_state import evaluation_mode
from ..core.own_thread import own_hooks
from ..errors import PositionsError
from ..interventions import HeadKind, Hooks, LayerIndices, freeze, hook_names
from ..measure.intervals import t_interval
from ..measure.metrics import Metric, metric_values, of_prompts
from ..progress import track_progress
from ..text import Mask, TextOrTokens, by_length, prompts_of
from .prompts import PATHS, batched_mediation, many_prompts
from .sweeps import SITES, By, head_count

Held = tuple[int | None, int | None]
"""A layer and its head; None is all of them."""

Measure = Callable[[Int[Tensor, "row pos"], Float[Tensor, "row pos vocab"]], Float64[np.ndarray, " row"]]
"""From some rows and their logits to the metric of each."""


@many_prompts(batched_mediation, lists=False)
def mediation(
    model: TransformerBridge,
    clean: TextOrTokens,
    corrupted: TextOrTokens,
    metric: Metric,
    layers: LayerIndices = None,
    *,
    by: By = "layer",
    heads: HeadKind = "query",
    attention_mask: Mask | tuple[Mask, Mask] = None,
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """Split the effect of a change of input into what goes through the increments and what does not.

    Args:
        model: a bridge with position streams.
        clean, corrupted: pairs of prompts, as text or as tokens. The two of a pair have one length, so that token t
            has the same place in both; pairs may differ in length. A table of both, as `clean`, gives what
            `over_prompts` does, with bootstrap intervals.
        metric: from logits [batch pos vocab] to one number a row; each row of both belongs to its pair. Pairs of
            another length run on their own, without padding, so that token -1 is each prompt's own last; the rows of
            the pairs that are not among them are then NaN.
        layers: the model's own layer numbers; None is all that rotate.
        by: "layer", or "head": the increments of one head of one layer are held or changed, the other heads of that
            layer respond.
        heads: with by="head", "query" or "key_value" heads (all query heads that share their keys together).
        attention_mask: the real tokens of both, where they are padded tensors; or a pair of masks, one for each.
        prepend_bos: whether texts get the beginning-of-sequence token; None is TransformerLens' default.

    Returns:
        Columns `layer` ("all" first: those layers together, then each alone), `head` (by head, "all" in the first
        rows), `path` (total, direct, increments, interaction: see the module), `n` (pairs), `mean` (over the pairs, in
        the metric's unit) and `low` to `high`, its 95% t interval (NaN for one pair).

    Raises:
        PositionsError: no streams, no such layer, a pair of different lengths, padding without a mask, or a metric
            that does not fit.

    >>> metric = lp.causal.logit_difference(ord("s"), ord("z"))
    >>> table = lp.causal.mediation(model, ["The cat"], ["The dog"], metric)
    >>> wide = table.pivot(index="layer", columns="path", values="mean")
    >>> parts = wide["direct"] + wide["increments"] + wide["interaction"]
    >>> bool((wide["total"] - parts).abs().max() < 1e-4)
    True
    """
    hooks = hook_names(model, layers, SITES["increments"][0])
    names, numbers = [name for _, name in hooks], list(dict(hooks))
    held: list[Held] = [(None, None), *_layers_and_heads(model, numbers, by, heads)]
    cleans, corrupteds = _pairs(model, clean, corrupted, attention_mask, prepend_bos)

    # All layers together, then each layer or head alone.
    effects = np.empty((len(held), len(PATHS), len(cleans)))
    with evaluation_mode(model), torch.no_grad():
        groups = by_length(cleans)
        for pairs, rows in track_progress(groups, "mediating", quick=len(groups) * len(held) < 5):
            others = torch.stack([corrupteds[pair] for pair in pairs])
            measure = partial(_numbers, metric, pairs, len(cleans))
            effects[..., pairs] = _effects(model, rows, others, measure, names, held, heads)
    return _effects_table(held, effects, by)


def _pairs(
    model: TransformerBridge,
    clean: TextOrTokens,
    corrupted: TextOrTokens,
    attention_mask: Mask | tuple[Mask, Mask],
    prepend_bos: bool | None,
) -> tuple[list[Int[Tensor, " _pos"]], list[Int[Tensor, " _pos"]]]:
    """The tokens of the clean and of the corrupted prompts, pair by pair of one length."""
    # Both prompts of a pair have one length, so one mask may serve both.
    masks = attention_mask if isinstance(attention_mask, tuple) else (attention_mask, attention_mask)
    if len(masks) != 2:
        raise PositionsError(f"attention_mask is a tuple of {len(masks)}; expected one mask, or one for each of two.")
    cleans, corrupteds = (
        prompts_of(model, given, mask, prepend_bos) for given, mask in zip((clean, corrupted), masks, strict=True)
    )
    _check_pairs(cleans, corrupteds)
    return cleans, corrupteds


def _effects_table(held: list[Held], effects: Float64[np.ndarray, "held path pair"], by: By) -> pd.DataFrame:
    """The mean of each path over pairs, which are the samples, with its interval."""
    rows: list[dict[str, Any]] = []
    for (layer, head), of_layer in zip(held, effects, strict=True):
        for path, effect in zip(PATHS, of_layer, strict=True):
            low, high = t_interval(effect)
            row: dict[str, Any] = {"layer": "all" if layer is None else layer}
            if by == "head":
                row["head"] = "all" if head is None else head
            row |= {"path": path, "n": len(effect)}
            rows.append(row | {"mean": float(effect.mean()), "low": low, "high": high})
    return pd.DataFrame(rows)


def _layers_and_heads(model: TransformerBridge, layers: list[int], by: By, heads: HeadKind) -> list[Held]:
    """Each layer alone, or each head of each."""
    if by == "layer":
        return [(layer, None) for layer in layers]
    return [(layer, head) for layer in layers for head in range(head_count(model, by, heads))]


def _check_pairs(cleans: list[Int[Tensor, " _pos"]], corrupteds: list[Int[Tensor, " _pos"]]) -> None:
    expected = "expected pairs of prompts of equal length"
    if len(cleans) != len(corrupteds):
        raise PositionsError(f"there are {len(cleans)} clean and {len(corrupteds)} corrupted prompts; {expected}.")
    for number, (clean, corrupted) in enumerate(zip(cleans, corrupteds, strict=True)):
        if len(clean) != len(corrupted):
            raise PositionsError(
                f"pair {number} has {len(clean)} tokens in the clean prompt and {len(corrupted)} in the corrupted one; "
                f"{expected}."
            )


def _effects(
    model: TransformerBridge,
    clean: Int[Tensor, "pair pos"],
    corrupted: Int[Tensor, "pair pos"],
    measure: Measure,
    names: list[str],
    each: list[Held],
    kind: HeadKind,
) -> Float64[np.ndarray, "held path pair"]:
    """The effects of pairs of one length: of all layers together, then of each layer or head alone."""
    # Increments of both prompts, to be held at in the runs below.
    logits_clean, of_clean = model.run_with_cache(clean, names_filter=names)
    logits_corrupted, of_corrupted = model.run_with_cache(corrupted, names_filter=names)
    base = measure(clean, logits_clean)
    total = measure(corrupted, logits_corrupted) - base

    def effect_with(tokens: Int[Tensor, "pair pos"], hooks: Hooks) -> Float64[np.ndarray, " pair"]:
        with own_hooks(model, hooks):
            return measure(tokens, model(tokens, return_type="logits")) - base

    found = []
    for layer, head in each:
        # The corrupted prompt with the increments of the clean one: what does not go through them. And the reverse.
        direct = effect_with(corrupted, freeze(of_clean, layers=layer, heads=head, head_kind=kind))
        through = effect_with(clean, freeze(of_corrupted, layers=layer, heads=head, head_kind=kind))

        # What is left over is what both do together and neither does alone.
        found.append([total, direct, through, total - direct - through])
    return np.array(found)


def _numbers(
    metric: Metric, pairs: list[int], n: int, tokens: Int[Tensor, "row pos"], logits: Float[Tensor, "row pos vocab"]
) -> Float64[np.ndarray, " row"]:
    """The metric of some of n pairs: it sees all rows, those of the others as NaN, as its rows belong to the pairs."""
    if len(pairs) < n:
        # A metric may index rows by pair, so each pair has its row; the others hold NaN, which no mean can hide.
        some, of_some = logits, tokens
        logits, tokens = some.new_full((n, *some.shape[1:]), torch.nan), of_some.new_zeros((n, of_some.shape[1]))
        logits[pairs], tokens[pairs] = some, of_some
    return metric_values(of_prompts(metric, tokens), logits, pairs).double().cpu().numpy()
