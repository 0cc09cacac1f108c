"""What one edit at one layer and token does to the output: for every layer and token, exactly.

Direction: effects are the metric with the edit minus the metric without it. `gap_sweep` needs no second prompt and is
the first thing to run on any RoPE model. `patch_sweep` puts in values that were recorded on another input; where
increments are not learned all of them are 1.0, and patching them from another prompt does nothing.

Each effect is what `run_with_hooks` with that one edit would give, to rounding, at a fraction of the cost: an edit is
run from its layer and token on, beside many others (`replay.py`). Hooks that are active while a sweep runs
(`with model.hooks(...)`) belong to its baseline and to every edit; as they may do anything, every edit is then a run
of its own over the whole prompt.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.model_bridge import TransformerBridge

from ..config import SweepSite
from ..core.model_state import evaluation_mode
from ..errors import PositionsError
from ..interventions import Hooks, LayerIndices, edited_token, finite_number, hook_names, index_of
from ..measure.metrics import Metric, baseline_of, metric_values, of_prompts, place_of
from ..measure.partial_forward import Replay
from ..progress import track_progress
from ..text import Mask, TextOrTokens, one_prompt

SITES: dict[str, tuple[str, int]] = {
    "increments": ("attn.hook_increments", 1),
    "positions": ("attn.hook_positions", 1),
    "rot_q": ("attn.hook_rot_q", 1),
    "rot_k": ("attn.hook_rot_k", 1),
    "resid": ("hook_resid_pre", 1),
    "pattern": ("attn.hook_pattern", 2),
}
"""Hook name and the axis of the token (of the query, in a pattern)."""

TOKENS_A_BATCH = 2048
"""Edits are grouped into batches of at most about so many tokens, for memory's sake."""

TOKENS_A_GROUP = 4
"""Neighbouring tokens whose edits start together, at the first of them."""

LOGITS_A_BATCH = 2**27
"""Numbers in the logits of a batch at most: half a GiB in float32."""


def gap_sweep(
    model: TransformerBridge,
    tokens: TextOrTokens,
    metric: Metric,
    by: float = 1.0,
    layers: LayerIndices = None,
    *,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> Float[Tensor, "layer pos"]:
    """The effect of lengthening each gap of a prompt, at every layer.

    Args:
        model: a bridge with position streams.
        tokens: one prompt, as text or as tokens.
        metric: from logits [batch pos vocab] to one number a row (`causal.logit_difference`, `causal.loss`, your own).
        by: positions to add to the gap; 1.0 is one step of standard RoPE.
        layers: the model's own layer numbers, taken in the model's order; None is all that rotate.
        attention_mask: the real tokens of a padded row; the prompt is what they are, and the padding has no entry.
        prepend_bos: whether a text gets the beginning-of-sequence token; None is TransformerLens' default.

    Returns:
        Entry [l, t]: the metric with the gap before token t longer at the l-th of these layers (of
        `model.position_layers`), minus the metric without. There is no gap before token 0: 0. With increments per
        head the gap grows in all heads.

    Raises:
        PositionsError: no streams, no such layer, tokens or metric that do not fit.

    >>> effects = lp.causal.gap_sweep(model, "The cat sat.", lp.causal.loss(), by=1.0)
    >>> effects[0].round(decimals=2)  # nats per token, by lengthening the gap before each token at layer 0
    tensor([ 0.0000,  0.0000,  0.0200,  0.0200,  0.0200,  0.1300,  0.0100, -0.1400,
            -0.0100, -0.1400, -0.2700, -0.5000,  0.0000])
    """
    by = finite_number(by, "by", "a finite number of positions")
    if by == 0:
        raise PositionsError("by is 0.0; expected a number of positions other than 0.")
    prompt = one_prompt(model, tokens, attention_mask, prepend_bos)
    cells = {t: edited_token(model, t) for t in range(1, prompt.shape[1])}
    effects = _sweep(model, prompt, metric, _known_hooks(model, "increments", layers), 1, cells, _lengthen(by))
    effects[:, 0] = 0.0
    return effects


def patch_sweep(
    model: TransformerBridge,
    source: ActivationCache | TextOrTokens,
    tokens: TextOrTokens,
    metric: Metric,
    site: SweepSite = "increments",
    layers: LayerIndices = None,
    align: Mapping[int, int] | None = None,
    *,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> Float[Tensor, "layer pos"]:
    """The effect of each value recorded on another input, put in alone, at every layer and token.

    Args:
        model: a bridge with position streams.
        source: the other input, as text or as tokens without padding, or a cache that recorded it (one row).
        tokens: the prompt that values are put into, as text or as tokens.
        metric: from logits [batch pos vocab] to one number a row.
        site: "increments", "positions", the rotated queries "rot_q" or keys "rot_k", and for comparison the residual
            stream entering the layer ("resid") and the row of a query in all attention "pattern"s.
        layers: the model's own layer numbers, taken in the model's order; None is all that rotate.
        align: the map of tokens, from those of this prompt to those of the other input. Without it every token gets
            the value of its own index, and both must be equally long (a pattern's always, as its rows are over keys).

    Returns:
        Entry [l, t]: the metric with the other input's value at token t of the l-th of these layers, minus the metric
        without; NaN at tokens that `align` leaves out. On a model without learned increments the whole sweep at
        "increments" is 0: there `gap_sweep` is the one to run.

    Raises:
        PositionsError: no streams, no such layer, site or token, different lengths without a map, a cache without the
            hooks, a metric that is not one number a row.

    >>> metric = lp.causal.log_probability(ord("."))
    >>> effects = lp.causal.patch_sweep(model, "The dog sat", "The cat sat", metric)
    >>> (effects[0].abs() > 1e-3).int()  # at layer 0 the increments differ where the letters do
    tensor([0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0], dtype=torch.int32)
    """
    if not (isinstance(site, str) and site in SITES):
        raise PositionsError(f"site is {site!r}; expected one of {', '.join(SITES)}.")
    prompt = one_prompt(model, tokens, attention_mask, prepend_bos)
    names, axis = _known_hooks(model, site, layers), SITES[site][1]
    recorded = _recorded_values(model, source, names, axis, prepend_bos)
    length, there = prompt.shape[1], recorded[0].shape[0]
    if align is None and there != length:
        raise PositionsError(
            f"the source has {there} tokens and the prompt {length}; expected equally many, or a map of tokens "
            "(align={token here: token there})."
        )
    if site == "pattern" and (align is not None or recorded[0].shape[-1] != length):
        raise PositionsError("patterns are patched row by row over all keys; expected equally long inputs and no map.")
    if align is not None and not (isinstance(align, Mapping) and align):
        raise PositionsError(f"align is {align!r}; expected {{token here: token there}} with at least one pair.")
    expected = "whole numbers from 0, as align maps tokens to tokens"
    pairs = {t: t for t in range(length)}
    if align is not None:
        pairs = {index_of(t, None, expected): index_of(s, None, expected) for t, s in align.items()}
    for here, source_token in pairs.items():
        if not (0 <= here < length and 0 <= source_token < there):
            raise PositionsError(
                f"align maps token {here} to {source_token}; expected tokens from 0 to {length - 1} of the prompt and "
                f"0 to {there - 1} of the source."
            )

    def recorded_values(layer: int, here: list[int], values: Tensor) -> Tensor:
        new = recorded[layer][[pairs[t] for t in here]].to(values)
        if site == "pattern":
            new = new[..., : values.shape[-1]]
        if new.shape != values.shape:
            raise PositionsError(
                f"the recorded values have shape {tuple(new.shape[1:])} a token and the prompt's "
                f"{tuple(values.shape[1:])}; expected the same model."
            )
        return new

    return _sweep(model, prompt, metric, names, axis, {t: t for t in sorted(pairs)}, recorded_values)


TokenEdit = Callable[[int, list[int], Tensor], Tensor]
"""From a layer's place in the sweep, tokens [n] and their values [n ...] to other values."""


@dataclass(frozen=True)
class _Group:
    """Edits that share a batch: each of these tokens at each of these layers."""

    layers: range
    tokens: list[int]


def _sweep(
    model: TransformerBridge,
    prompt: Int[Tensor, "1 pos"],
    metric: Metric,
    names: list[tuple[int, str]],
    axis: int,
    cells: dict[int, int],
    edit: TokenEdit,
) -> Float[Tensor, "layer pos"]:
    """Run every edit; `cells` leads from the columns of the result to the tokens that are edited for them."""
    length = prompt.shape[1]
    metric = of_prompts(metric, prompt)
    at = getattr(metric, "at", None)
    last = length - 1 if at is None else place_of(at, length)
    hooked = any(point.has_hooks("fwd") for point in model.hook_dict.values())
    cut = at is not None and not hooked
    if cut:
        prompt = prompt[:, : last + 1]
    replay = Replay(model, prompt, last_only=cut, resume=not hooked)
    read = partial(_whole_logits, length if cut else None, replay.logits)
    baseline = baseline_of(metric, read(replay.logits, 0))
    effects = torch.full((len(names), length), math.nan, dtype=torch.float64)
    effects[:, list(cells)] = 0.0
    column = {token: t for t, token in cells.items()}
    tokens = [token for token in column if token < prompt.shape[1]]
    groups = _one_token_groups(names, tokens) if hooked else _groups(names, tokens, replay)
    for group in track_progress(groups, "sweeping", quick=len(groups) < 4):
        start = replay.start(group.tokens[0])
        size = len(group.tokens)
        hooks: Hooks = [
            (names[layer][1], partial(_edit_rows, edit, layer, axis, size * i, group.tokens, start))
            for i, layer in enumerate(group.layers)
        ]
        joining: Counter[int] = Counter()
        for layer in group.layers:  # a looped model has several of one number
            joining[names[layer][0]] += size
        logits = replay.run(hooks, joining, group.tokens[0])
        values = metric_values(metric, read(logits, start)).double().cpu() - baseline
        columns = [column[token] for token in group.tokens]
        effects[group.layers.start : group.layers.stop, columns] = values.view(-1, size)
    return effects.to(replay.logits.dtype if replay.logits.dtype == torch.float64 else torch.float32)


def _groups(names: list[tuple[int, str]], tokens: list[int], replay: Replay) -> list[_Group]:
    """All edits in groups of neighbours, for batches of about `TOKENS_A_BATCH` tokens."""
    length, vocab = replay.tokens.shape[1], replay.logits.shape[-1]
    groups = []
    for i in range(0, len(tokens), TOKENS_A_GROUP):
        together = tokens[i : i + TOKENS_A_GROUP]
        rest = length - replay.start(together[0])
        room = min(TOKENS_A_BATCH // rest, LOGITS_A_BATCH // (replay.logits.shape[1] * vocab))
        at_once = max(1, room // len(together))
        for first in range(0, len(names), at_once):
            groups.append(_Group(range(first, min(first + at_once, len(names))), together))
    return groups


def _one_token_groups(names: list[tuple[int, str]], tokens: list[int]) -> list[_Group]:
    return [_Group(range(layer, layer + 1), [token]) for layer in range(len(names)) for token in tokens]


def _edit_rows(
    edit: TokenEdit, layer: int, axis: int, first_row: int, tokens: list[int], start: int, values: Tensor, hook: Any
) -> Tensor:
    """Row `first_row + i` gets another value at token `tokens[i]`."""
    edited = values.clone()
    by_token = edited.movedim(axis, 1)
    rows, places = range(first_row, first_row + len(tokens)), [token - start for token in tokens]
    by_token[list(rows), places] = edit(layer, tokens, by_token[list(rows), places])
    return edited


def _whole_logits(
    length: int | None, baseline: Tensor, logits: Float[Tensor, "rows rest vocab"], start: int
) -> Float[Tensor, "rows pos vocab"]:
    """Logits as a metric expects them: those before `start` are the baseline's.

    A metric that reads one token, given as `length` of the prompt, sees its logits at every place.
    """
    if length is not None:
        return logits[:, -1:].expand(-1, length, -1)
    return torch.cat([baseline[:, :start].expand(len(logits), -1, -1), logits], dim=1) if start else logits


def _lengthen(by: float) -> TokenEdit:
    return lambda _layer, _tokens, values: values + by


def _known_hooks(model: TransformerBridge, site: str, layers: LayerIndices) -> list[tuple[int, str]]:
    names = hook_names(model, layers, SITES[site][0])
    for _, name in names:
        if name not in model.hook_dict:
            raise PositionsError(f"the model has no {name}; expected a site that its bridge has hooks for.")
    return names


def _recorded_values(
    model: TransformerBridge,
    source: ActivationCache | TextOrTokens,
    names: list[tuple[int, str]],
    axis: int,
    prepend_bos: bool | None,
) -> list[Float[Tensor, "pos_source ..."]]:
    """Values of the source at each of the hook points, by token."""
    if isinstance(source, ActivationCache):
        cache = source
    elif isinstance(source, Tensor | Sequence):
        prompt = one_prompt(model, source, prepend_bos=prepend_bos)
        with evaluation_mode(model), torch.no_grad():
            _, cache = model.run_with_cache(prompt, names_filter=[n for _, n in names], return_type=None)
    else:
        raise PositionsError(f"source is a {type(source).__name__}; expected text, token ids or a cache.")
    recorded = []
    for _, name in names:
        if name not in cache:
            raise PositionsError(f"the cache has no {name}; expected one whose names_filter lets it through.")
        values = cache[name] if cache.has_batch_dim else cache[name][None]
        if len(values) != 1:
            raise PositionsError(f"the source has {len(values)} rows; expected one.")
        recorded.append(values.movedim(axis, 1)[0])
    return recorded
