"""Which gaps a metric depends on, from gradients: for every layer and token at once.

Direction: a positive value says that the metric grows with the gap ("gradient"), or that this gap's part of going
from the baseline to the model's own increments raised the metric ("integrated"). With `causal.loss` as the metric a
negative gradient marks a gap that the model would have longer.

Where it fails: a gradient is the slope at increments as they are. Rotation is periodic, so a query and a key far apart
see a fast frequency turn past its best place within a fraction of a step, and the effect of a finite change can have
the other sign. `gap_sweep` gives the finite change itself, at a higher price.

Memory: the logits several times over, what enters each block, and the activations of one block, since each runs a
second time in the backward pass (`pieces.py`). Hook functions that are active run once; a block with a hook of torch's
own keeps its activations instead. Values agree with those of one whole backward pass to rounding.

Integrated gradients: Sundararajan et al., "Axiomatic Attribution for Deep Networks" (arXiv 1703.01365), equation 1.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from ..core.model_state import evaluation_mode
from ..core.own_thread import own_hooks
from ..errors import PositionsError
from ..interventions import HeadKind, Hooks, ablation_hooks, hook_names, streams_of, values_of_gaps
from ..measure.metrics import Metric, differentiable, metric_values, of_prompts
from ..progress import track_progress
from ..text import Mask, TextOrTokens, one_prompt
from .pieces import in_pieces
from .prompts import batched_gradients, many_prompts
from .sweeps import HEAD_SITES, SITES, By, head_count

TOKENS_A_BATCH = 512
STEPS = (16, 32, 64, 128, 256, 512, 1024)
"""Points of the path, doubled until the sum is the whole effect."""

TOLERANCE = 0.01


@many_prompts(batched_gradients)
def attribution(
    model: TransformerBridge,
    tokens: TextOrTokens,
    metric: Metric,
    method: Literal["gradient", "integrated"] = "gradient",
    baseline: float | Literal["mean"] | Float[Tensor, "layer pos *head"] = 1.0,
    *,
    by: By = "layer",
    heads: HeadKind = "query",
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> Float[Tensor, "layer *of_head pos"]:
    """The first-order effect of every gap, in one backward pass, or its part of the whole effect.

    Args:
        model: a bridge with position streams.
        tokens: one prompt, as text or as tokens; or many, as a list or a table, which gives what `over_prompts` does.
        metric: from logits [batch pos vocab] to one number a row, differentiable.
        method: "gradient", the derivative of the metric by each gap at increments as they are; increments of later
            layers respond, as they do in `gap_sweep`. Or "integrated", along the straight path from the baseline's
            increments to the model's own, each point of which sets all layers at once.
        baseline: increments where the path begins: a number (1.0 is standard RoPE, so on a model without learned
            increments another one is needed: 0.0 puts all tokens in one place), "mean" for each layer's mean, or all
            of them (by head those of query heads, [layer pos head]).
        by, heads: as for `gap_sweep`; of key-value heads, the sum of the query heads that share their keys.
        attention_mask, prepend_bos: as for `gap_sweep`.

    Returns:
        Entry [l, t], for the gap before token t at layer `model.position_layers[l]`; by head, entry [l, h, t]. It is in
        the metric's unit per position ("gradient"), or in the metric's unit ("integrated"), where the sum is the metric
        with the model's own increments minus the metric with the baseline's. By layer, it is the sum of the heads.

    Raises:
        PositionsError: no streams, a method or baseline that there is not, tokens or metric that do not fit.

    Warns:
        UserWarning: the sum is more than 1% off the whole effect, even with 1,024 steps.

    >>> slopes = lp.causal.attribution(model, "The cat sat.", lp.causal.loss())  # layer, pos
    >>> of_heads = lp.causal.attribution(model, "The cat sat.", lp.causal.loss(), by="head")  # layer, head, pos
    >>> torch.allclose(of_heads.sum(1), slopes, atol=1e-5)
    True
    >>> bool((slopes[:, 0] == 0).all())  # there is no gap before the first token
    True
    """
    if method not in ("gradient", "integrated"):
        raise PositionsError(f'method is {method!r}; expected "gradient" or "integrated".')
    prompt = one_prompt(model, tokens, attention_mask, prepend_bos)
    metric = of_prompts(metric, prompt)
    count = head_count(model, by, heads)
    site = HEAD_SITES["increments"] if by == "head" else SITES["increments"][0]
    names = [name for _, name in hook_names(model, None, site)]

    # A caller may have switched gradients off for everything; they are needed here.
    with evaluation_mode(model), torch.inference_mode(False), torch.enable_grad():
        prompt = prompt.clone()  # one that was made in inference mode cannot be saved for a backward pass
        run = _gradient if method == "gradient" else partial(_integrated_gradients, baseline=baseline)
        values = run(model, prompt, metric, names)
    return _by_gap(values, count if by == "head" else None, streams_of(model).config.gap)


def _by_gap(
    values: Float[Tensor, "layer pos *head"], heads: int | None, gap: str
) -> Float[Tensor, "layer *of_head pos"]:
    """Attributions of increments as those of the gaps before tokens, of so many heads or of the layer."""
    if heads is not None:
        values = reduce(values, "layer pos (head query) -> layer head pos", "sum", head=heads)
    elif values.ndim == 3:
        values = values.sum(-1)
    return values_of_gaps(values, gap)


def _gradient(
    model: TransformerBridge, prompt: Int[Tensor, "1 pos"], metric: Metric, names: list[str]
) -> Float[Tensor, "layer pos *head"]:
    current = streams_of(model)._current

    # A hook function of the user may run the model inside the pass that is differentiated.
    around = current.get()
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def note(increments: Tensor, hook: HookPoint) -> Tensor | None:
        step = current.get()
        if step is None or step.outer is not around:  # a pass that another hook function runs in this one
            return None
        found[str(hook.name)].append(increments if increments.requires_grad else increments.requires_grad_())
        return increments.view_as(increments)  # another tensor: heads have rotations of their own where one is put in

    with own_hooks(model, [(name, note) for name in names]), in_pieces(model):
        logits = model(prompt, return_type="logits", use_cache=False)
        value = differentiable(metric_values(metric, logits))[0]
        every = [increments for calls in found.values() for increments in calls]
        gradients = iter(torch.autograd.grad(value, every, materialize_grads=True))

    # A looped model calls a layer several times, each with the increment that an edit would change.
    return torch.stack([torch.stack([next(gradients)[0] for _ in found[name]]).sum(0) for name in names]).cpu()


def _integrated_gradients(
    model: TransformerBridge,
    prompt: Int[Tensor, "1 pos"],
    metric: Metric,
    names: list[str],
    baseline: float | Literal["mean"] | Tensor,
) -> Float[Tensor, "layer pos *head"]:
    with torch.no_grad():
        # The path is a straight line between two sets of increments, recorded here and held at each point.
        own = _increments(model, prompt, names, [])
        if isinstance(baseline, Tensor):
            if baseline.shape != own.shape or not baseline.isfinite().all():
                raise PositionsError(
                    f"baseline has shape {tuple(baseline.shape)}; expected finite increments of shape "
                    f"{tuple(own.shape)}."
                )
            start = baseline.to(own)
        elif isinstance(baseline, str) and baseline != "mean":
            raise PositionsError(f'baseline is {baseline!r}; expected a number, "mean" or increments.')
        else:
            start = _increments(model, prompt, names, ablation_hooks(model, to=baseline))

        # Both ends in one pass: their difference is what the attribution has to sum to.
        ends = torch.stack([start, own])
        first, last = _at_points(model, prompt, metric, names, ends).tolist()
    whole = last - first
    sums = math.nan
    values = torch.zeros_like(own)
    for steps in STEPS:
        # Integrated gradients (Sundararajan, Taly and Yan, arXiv 1703.01365, equation 1): the difference times the mean
        # slope along the path.
        values = (own - start) * _mean_gradient(model, prompt, metric, names, start, own, steps)
        sums = float(values.double().sum())
        if abs(sums - whole) <= TOLERANCE * abs(whole) or torch.equal(own, start):
            return values.cpu()
    warnings.warn(
        f"the integrated attribution sums to {sums:.4g} and the whole effect is {whole:.4g}, more than "
        f"{TOLERANCE:.0%} apart after {STEPS[-1]} steps: the path turns too fast for them (a long prompt, or a "
        "baseline far away).",
        stacklevel=3,
    )
    return values.cpu()


def _mean_gradient(
    model: TransformerBridge,
    prompt: Int[Tensor, "1 pos"],
    metric: Metric,
    names: list[str],
    start: Tensor,
    own: Tensor,
    steps: int,
) -> Float[Tensor, "layer pos *head"]:
    """The gradient averaged over the path by Gauss-Legendre quadrature, exact for smooth paths with few points."""
    # On [-1, 1], with weights that sum to 2.
    places, weights = np.polynomial.legendre.leggauss(steps)
    total = torch.zeros_like(own)
    at_once = max(1, TOKENS_A_BATCH // prompt.shape[1])
    for i in track_progress(range(0, steps, at_once), f"attributing in {steps:,} steps", quick=steps < 256):
        # From [-1, 1] to [0, 1], with an axis of points before those of increments.
        along = own.new_tensor((places[i : i + at_once] + 1) / 2).view(-1, *[1] * own.ndim)
        points, share = start + along * (own - start), torch.as_tensor(weights[i : i + at_once] / 2)
        total += _slopes(model, prompt, metric, names, points, share).sum(0)
    return total


def _at_points(
    model: TransformerBridge,
    prompt: Int[Tensor, "1 pos"],
    metric: Metric,
    names: list[str],
    points: Float[Tensor, "row layer pos *head"],
) -> Float[Tensor, " row"]:
    """The metric with increments set at all layers, a row for each point."""
    with own_hooks(model, _hooks_that_set(names, points)):
        return metric_values(metric, model(prompt.expand(len(points), -1), return_type="logits", use_cache=False))


def _slopes(
    model: TransformerBridge,
    prompt: Int[Tensor, "1 pos"],
    metric: Metric,
    names: list[str],
    points: Float[Tensor, "row layer pos *head"],
    weights: Float[Tensor, " row"],
) -> Float[Tensor, "row layer pos *head"]:
    """The gradient of a weighted sum of the metric at some points."""
    # One number is differentiated for all points at once, as rows do not depend on each other.
    points = points.requires_grad_()
    with own_hooks(model, _hooks_that_set(names, points)), in_pieces(model):
        logits = model(prompt.expand(len(points), -1), return_type="logits", use_cache=False)
        value = differentiable(metric_values(metric, logits))
        return torch.autograd.grad(value @ weights.to(value), points)[0]


def _hooks_that_set(names: list[str], points: Float[Tensor, "row layer pos *head"]) -> Hooks:
    return [(name, _hook_that_sets(points[:, i])) for i, name in enumerate(names)]


def _hook_that_sets(values: Tensor) -> Callable[..., Tensor]:
    return lambda _given, hook: values


def _increments(
    model: TransformerBridge, prompt: Int[Tensor, "1 pos"], names: list[str], hooks: Hooks
) -> Float[Tensor, "layer pos *head"]:
    """The increments at every layer after some hooks."""
    with own_hooks(model, hooks):
        _, cache = model.run_with_cache(prompt, names_filter=names, return_type=None)
    return torch.stack([cache[name][0] for name in names])
