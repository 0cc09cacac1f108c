"""What one edit at one layer and token does to the output: for every layer and token, exactly.

Direction: effects are the metric with the edit minus the metric without it. `gap_sweep` needs no second prompt and is
the first thing to run on any RoPE model. `patch_sweep` puts in values that were recorded on another input; where
increments are not learned all of them are 1.0, and patching them from another prompt does nothing.

Each effect is what `run_with_hooks` with that one edit would give, to rounding, at a fraction of the cost: an edit is
run from its layer and token on, beside many others (`replay.py`). Hooks that are active while a sweep runs
(`with model.hooks(...)`) belong to its baseline and to every edit; as they may do anything, every edit is then a run
of its own over the whole prompt.

By head, an edit is of one query head at one layer and token, and all other heads keep what they had, with one increment
source for all heads too. A longer gap for one query head moves its queries from there on, and the keys of its group as
this head alone sees them; the other heads of the group see the keys where they were. So the effects of the heads of a
group do not sum to that of the group (`heads="key_value"`), nor those of all heads to that of the layer.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.model_bridge import TransformerBridge

from ..config import SweepSite
from ..core.model_state import evaluation_mode
from ..core.per_head import of_query_heads
from ..errors import PositionsError
from ..interventions import (
    HEAD_HOOK,
    HeadKind,
    Hooks,
    LayerIndices,
    edited_token,
    finite_number,
    hook_names,
    index_of,
    query_heads,
    streams_of,
    with_query_heads,
)
from ..measure.metrics import Metric, baseline_of, metric_values, of_prompts, place_of
from ..measure.partial_forward import Replay
from ..progress import track_progress
from ..text import Mask, TextOrTokens, one_prompt
from .prompts import many_prompts

SITES: dict[str, tuple[str, int]] = {
    "increments": ("attn.hook_increments", 1),
    "positions": ("attn.hook_positions", 1),
    "rot_q": ("attn.hook_rot_q", 1),
    "rot_k": ("attn.hook_rot_k", 1),
    "resid": ("hook_resid_pre", 1),
    "pattern": ("attn.hook_pattern", 2),
}
"""Hook name and the axis of the token (of the query, in a pattern)."""

By = Literal["layer", "head"]

HEAD_SITES = {"increments": HEAD_HOOK.format("increments"), "positions": HEAD_HOOK.format("positions")}
"""Where heads have what all of them share at the site of that name."""

TOKENS_A_BATCH = 2048
"""Edits are grouped into batches of at most about so many tokens, for memory's sake."""

TOKENS_A_GROUP = 4
"""Neighbouring tokens whose edits start together, at the first of them."""

LOGITS_A_BATCH = 2**27
"""Numbers in the logits of a batch at most: half a GiB in float32."""


@many_prompts()
def gap_sweep(
    model: TransformerBridge,
    tokens: TextOrTokens,
    metric: Metric,
    by: By | float = "layer",
    layers: LayerIndices = None,
    *,
    length: float = 1.0,
    heads: HeadKind = "query",
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> Float[Tensor, "layer *head pos"]:
    """The effect of lengthening each gap of a prompt, at every layer or for every head.

    Args:
        model: a bridge with position streams.
        tokens: one prompt, as text or as tokens; or many, as a list or a table, which gives what `over_prompts` does.
        metric: from logits [batch pos vocab] to one number a row (`causal.logit_difference`, `causal.loss`, your own).
        by: "layer": one edit is of all heads of a layer; "head": of one head. A number stands for `length`.
        layers: the model's own layer numbers, taken in the model's order; None is all that rotate.
        length: positions to add to the gap; 1.0 is one step of standard RoPE.
        heads: with by="head", "query" heads, or "key_value" heads: all query heads that share their keys together.
        attention_mask: the real tokens of a padded row; the prompt is what they are, and the padding has no entry.
        prepend_bos: whether a text gets the beginning-of-sequence token; None is TransformerLens' default.

    Returns:
        Entry [l, t]: the metric with the gap before token t longer at the l-th of these layers (of
        `model.position_layers`), minus the metric without; by head, entry [l, h, t]. There is no gap before token 0: 0.

    Raises:
        PositionsError: no streams, no such layer, tokens or metric that do not fit, or heads that cannot be rotated
            one by one.

    >>> effects = lp.causal.gap_sweep(model, "The cat sat.", lp.causal.loss(), by=1.0)
    >>> effects[0].round(decimals=2)  # nats per token, by lengthening the gap before each token at layer 0
    tensor([ 0.0000, -0.0000,  0.0400, -0.0100, -0.0900,  0.3600,  0.0800,  0.2700,
            -0.0100,  0.0000, -0.1300, -0.3300,  0.0000])
    >>> lp.causal.gap_sweep(model, "The cat sat.", lp.causal.loss(), by="head").shape  # layer, head, pos
    torch.Size([6, 4, 13])
    """
    if not isinstance(by, str):
        by, length = "layer", finite_number(by, "by", 'a finite number of positions, "layer" or "head"')
    length = finite_number(length, "length", "a finite number of positions")
    if length == 0:
        raise PositionsError("by is 0.0; expected a number of positions other than 0.")
    prompt = one_prompt(model, tokens, attention_mask, prepend_bos)

    # The gap before a token is its own increment, or that of the token before it, by the model's convention.
    cells = {t: edited_token(model, t) for t in range(1, prompt.shape[1])}
    places = _places(model, "increments", layers, by, heads)
    effects = _sweep(model, prompt, metric, places, cells, lambda _place, _edits, values: values + length)
    effects[..., 0] = 0.0
    return effects


@many_prompts()
def patch_sweep(
    model: TransformerBridge,
    source: ActivationCache | TextOrTokens,
    tokens: TextOrTokens,
    metric: Metric,
    site: SweepSite = "increments",
    layers: LayerIndices = None,
    align: Mapping[int, int] | None = None,
    *,
    by: By = "layer",
    heads: HeadKind = "query",
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> Float[Tensor, "layer *head pos"]:
    """The effect of each value recorded on another input, put in alone, at every layer and token, or for every head.

    Args:
        model: a bridge with position streams.
        source: the other input, as text or as tokens without padding, or a cache that recorded it (one row). Many
            pairs, as two lists or one table, give what `over_prompts` does.
        tokens: the prompt that values are put into, as text or as tokens.
        metric: from logits [batch pos vocab] to one number a row.
        site: "increments", "positions", the rotated queries "rot_q" or keys "rot_k", and for comparison the residual
            stream entering the layer ("resid") and the row of a query in all attention "pattern"s.
        layers: the model's own layer numbers, taken in the model's order; None is all that rotate.
        align: the map of tokens, from those of this prompt to those of the other input. Without it every token gets
            the value of its own index, and both must be equally long (a pattern's always, as its rows are over keys).
        by, heads: as for `gap_sweep`; a rotated key is put in as one query head sees it. "resid" has no heads.

    Returns:
        Entry [l, t]: the metric with the other input's value at token t of the l-th of these layers, minus the metric
        without; by head, entry [l, h, t]. NaN at tokens that `align` leaves out. On a model without learned increments
        the whole sweep at "increments" is 0: there `gap_sweep` is the one to run.

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
    places = _places(model, site, layers, by, heads)
    recorded = _recorded_values(model, source, places, prepend_bos)
    length, there = prompt.shape[1], recorded[0].shape[0]
    pairs = _token_pairs(align, length, there, recorded[0].shape[-1] if site == "pattern" else None)

    put = partial(_recorded_for, recorded, pairs, site)
    return _sweep(model, prompt, metric, places, {t: t for t in sorted(pairs)}, put)


def _token_pairs(align: Mapping[int, int] | None, length: int, there: int, keys: int | None) -> dict[int, int]:
    """The source's token for each of the prompt's, in a prompt of some length; `keys` of a recorded pattern."""
    if align is None and there != length:
        raise PositionsError(
            f"the source has {there} tokens and the prompt {length}; expected equally many, or a map of tokens "
            "(align={token here: token there})."
        )
    if keys is not None and (align is not None or keys != length):
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
    return pairs


@dataclass(frozen=True)
class Edits:
    """Edits of one hook point in a batch: each of another row, at one token, of all heads or of one.

    Attributes:
        rows, tokens: of each edit; tokens count from the start of the prompt.
        heads: of each edit, or None.
    """

    rows: list[int]
    tokens: list[int]
    heads: list[int] | None


Put = Callable[[int, Edits, Tensor], Tensor]
"""From a place in the sweep, its edits [n] and the values there [n ...] to other values."""


@dataclass(frozen=True)
class _Places:
    """Where a sweep edits.

    Attributes:
        names: the number of each layer, and its hook point.
        axis: of the token.
        heads: the places on the head axis that each edit changes, one list for each head; None where all are.
        shared: of each layer, the hook point that has the value of all heads; for what was recorded.
        also: hooks that every run needs.
    """

    names: list[tuple[int, str]]
    axis: int
    heads: list[list[int]] | None
    shared: list[str]
    also: Hooks

    def units(self) -> list[tuple[int, list[int] | None]]:
        """The layer, counted over the names, and the heads of each edit, in the order of the result."""
        return [(i, heads) for i in range(len(self.names)) for heads in (self.heads or cast(Any, [None]))]


def _places(model: TransformerBridge, site: str, layers: LayerIndices, by: By, heads: HeadKind) -> _Places:
    """Where a sweep edits at a site, by layer or by head."""
    count = head_count(model, by, heads)
    names, axis = known_hooks(model, SITES[site][0], layers), SITES[site][1]
    shared = [name for _, name in names]
    if by == "layer":
        return _Places(names, axis, None, shared, [])
    if site == "resid":
        raise PositionsError('site is "resid", which has no heads; expected by="layer", or another site.')

    names = known_hooks(model, HEAD_SITES.get(site, SITES[site][0]), layers)
    also: Hooks = []

    # Keys have key-value heads already. For query heads each gets a copy of those of its group, to be edited alone.
    if site == "rot_k" and heads == "key_value":
        return _Places(names, axis, [[head] for head in range(count)], shared, [])
    if site == "rot_k":
        also = keys_apart(model, layers)
    return _Places(names, axis, [query_heads(streams_of(model), [head], heads) for head in range(count)], shared, also)


def head_count(model: TransformerBridge, by: By, heads: HeadKind) -> int:
    """How many heads of a kind a layer has.

    Raises:
        PositionsError: `by` or `heads` is another word, or heads cannot be edited one by one.
    """
    if by not in ("layer", "head"):
        raise PositionsError(f'by is {by!r}; expected "layer" or "head".')
    if heads not in ("query", "key_value"):
        raise PositionsError(f'heads is {heads!r}; expected "query" or "key_value".')
    streams = with_query_heads(model) if by == "head" else streams_of(model)
    return streams.n_query if heads == "query" else streams.n_key_value


def keys_apart(model: TransformerBridge, layers: LayerIndices = None) -> Hooks:
    """Hooks that give each query head keys of its own, equal to those of its group.

    Raises:
        PositionsError: the model cannot have them.
    """
    with_query_heads(model)
    return [(name, _keep_values) for _, name in hook_names(model, layers, HEAD_SITES["increments"])]


def _keep_values(values: Tensor, hook: Any) -> Tensor:
    return values.clone()


@dataclass(frozen=True)
class _Group:
    """Edits that share a batch: each of these tokens in each of these units."""

    units: range
    tokens: list[int]


def _sweep(
    model: TransformerBridge,
    prompt: Int[Tensor, "1 pos"],
    metric: Metric,
    places: _Places,
    cells: dict[int, int],
    put: Put,
) -> Float[Tensor, "layer *head pos"]:
    """Run every edit; `cells` leads from the columns of the result to the tokens that are edited for them."""
    length = prompt.shape[1]
    metric = of_prompts(metric, prompt)

    # A metric that says which token it reads (`at`) needs no logits after it, and of all logits only those.
    at = getattr(metric, "at", None)
    last = length - 1 if at is None else place_of(at, length)

    # Hooks of the user may do anything (count calls, look at rows): then each edit is a run of its own.
    hooked = any(point.has_hooks("fwd") for point in model.hook_dict.values())
    cut = at is not None and not hooked
    if cut:
        prompt = prompt[:, : last + 1]
    replay = Replay(model, prompt, last_only=cut, resume=not hooked)
    read = partial(whole_logits, length if cut else None, replay.logits)
    baseline = baseline_of(metric, read(replay.logits, 0))

    units = places.units()

    # NaN says that no edit was made there; an edit after the token that the metric reads does nothing: 0.
    effects = torch.full((len(units), length), math.nan, dtype=torch.float64)
    effects[:, list(cells)] = 0.0
    column = {token: t for t, token in cells.items()}
    tokens = [token for token in column if token < prompt.shape[1]]
    groups = (
        _one_unit_groups(len(units), tokens)
        if hooked
        else _groups(len(units), tokens, replay, places.heads is not None)
    )
    for group in track_progress(groups, "sweeping", quick=len(groups) < 4):
        # The rows of the batch: for each unit of the group, one copy of the prompt for each of its tokens.
        start = replay.start(group.tokens[0])
        size = len(group.tokens)
        joining: Counter[int] = Counter()
        for unit in group.units:  # a looped model has several of one number
            joining[places.names[units[unit][0]][0]] += size
        logits = replay.run(_hooks_of(places, units, group, start, put), joining, group.tokens[0])
        values = metric_values(metric, read(logits, start)).double().cpu() - baseline
        columns = [column[token] for token in group.tokens]
        effects[group.units.start : group.units.stop, columns] = values.view(-1, size)
    effects = effects.to(replay.logits.dtype if replay.logits.dtype == torch.float64 else torch.float32)
    return effects if places.heads is None else effects.unflatten(0, (len(places.names), -1))


def _hooks_of(places: _Places, units: list[tuple[int, list[int] | None]], group: _Group, start: int, put: Put) -> Hooks:
    """The hooks of a batch: one for each hook point that is edited, with the edits of all rows there."""
    of_place: dict[int, list[tuple[int, int, list[int] | None]]] = {}
    for row, (unit, token) in enumerate((unit, token) for unit in group.units for token in group.tokens):
        place, heads = units[unit]
        of_place.setdefault(place, []).append((row, token, heads))

    hooks: Hooks = []
    for place, cells in of_place.items():
        # An edit of several heads is one of each of them.
        each = [(row, token, head) for row, token, heads in cells for head in (heads or cast(Any, [None]))]
        rows, tokens, of_heads = (list(column) for column in zip(*each, strict=True))
        edits = Edits(rows, tokens, None if places.heads is None else of_heads)
        hooks.append((places.names[place][1], partial(_edit_rows, put, place, places.axis, edits, start)))
    return places.also + hooks


def _groups(n_units: int, tokens: list[int], replay: Replay, by_head: bool) -> list[_Group]:
    """All edits in groups of neighbours, for batches of about `TOKENS_A_BATCH` tokens.

    By head, one token has edits enough for a batch.
    """
    length, vocab = replay.tokens.shape[1], replay.logits.shape[-1]
    groups = []
    together_at_most = 1 if by_head else TOKENS_A_GROUP
    for i in range(0, len(tokens), together_at_most):
        # Neighbours start at the first of them, which costs few tokens more than starting each at its own.
        together = tokens[i : i + together_at_most]

        # Tokens that a copy of the prompt runs: those from the edit on.
        rest = length - replay.start(together[0])
        room = min(TOKENS_A_BATCH // rest, LOGITS_A_BATCH // (replay.logits.shape[1] * vocab))
        at_once = max(1, room // len(together))
        for first in range(0, n_units, at_once):
            groups.append(_Group(range(first, min(first + at_once, n_units)), together))
    return groups


def _one_unit_groups(n_units: int, tokens: list[int]) -> list[_Group]:
    return [_Group(range(unit, unit + 1), [token]) for unit in range(n_units) for token in tokens]


def _edit_rows(put: Put, place: int, axis: int, edits: Edits, start: int, values: Tensor, hook: Any) -> Tensor:
    """Give each row of some edits another value at its token."""
    # A clone, as a hook must not write into what other rows, or autograd, still need.
    edited = values.clone()
    by_token = edited.movedim(axis, 1)
    index: tuple[list[int], ...] = (edits.rows, [token - start for token in edits.tokens])
    if edits.heads is not None:
        index = (*index, edits.heads)
    by_token[index] = put(place, edits, by_token[index])
    return edited


def whole_logits(
    length: int | None, baseline: Tensor, logits: Float[Tensor, "rows rest vocab"], start: int
) -> Float[Tensor, "rows pos vocab"]:
    """Logits as a metric expects them: those before `start` are the baseline's.

    A metric that reads one token, given as `length` of the prompt, sees its logits at every place.
    """
    if length is not None:
        return logits[:, -1:].expand(-1, length, -1)
    return torch.cat([baseline[:, :start].expand(len(logits), -1, -1), logits], dim=1) if start else logits


def known_hooks(model: TransformerBridge, hook: str, layers: LayerIndices) -> list[tuple[int, str]]:
    """The hook points of a name within their block.

    Raises:
        PositionsError: the bridge has none of that name, or no such layer.
    """
    names = hook_names(model, layers, hook)
    for _, name in names:
        if name not in model.hook_dict:
            raise PositionsError(f"the model has no {name}; expected a site that its bridge has hooks for.")
    return names


def _recorded_for(
    recorded: list[Float[Tensor, "pos_source ..."]],
    pairs: dict[int, int],
    site: str,
    place: int,
    edits: Edits,
    values: Tensor,
) -> Tensor:
    """The recorded values at a hook point for the tokens, and heads, of some edits, in the place of their own."""
    index = [pairs[t] for t in edits.tokens]
    new = recorded[place][index] if edits.heads is None else recorded[place][index, edits.heads]
    new = new.to(values)
    if site == "pattern":
        # A prompt that is cut after the token that the metric reads has fewer keys than the recording.
        new = new[..., : values.shape[-1]]
    if new.shape != values.shape:
        raise PositionsError(
            f"the recorded values have shape {tuple(new.shape[1:])} a token and the prompt's "
            f"{tuple(values.shape[1:])}; expected the same model."
        )
    return new


def _recorded_values(
    model: TransformerBridge, source: ActivationCache | TextOrTokens, places: _Places, prepend_bos: bool | None
) -> list[Float[Tensor, "pos_source ..."]]:
    """Values of the source at each of the hook points, by token."""
    names = [name for _, name in places.names]

    if isinstance(source, ActivationCache):
        cache = source
    elif isinstance(source, Tensor | Sequence):
        prompt = one_prompt(model, source, prepend_bos=prepend_bos)
        with evaluation_mode(model), torch.no_grad():
            _, cache = model.run_with_cache(prompt, names_filter=places.shared, return_type=None)
    else:
        raise PositionsError(f"source is a {type(source).__name__}; expected text, token ids or a cache.")
    recorded = []
    for name, shared in zip(names, places.shared, strict=True):
        # What heads have of their own, where it was recorded.
        name = name if name in cache else shared
        if name not in cache:
            raise PositionsError(f"the cache has no {name}; expected one whose names_filter lets it through.")

        # A cache may have lost its batch axis (remove_batch_dim).
        values = cache[name] if cache.has_batch_dim else cache[name][None]
        if len(values) != 1:
            raise PositionsError(f"the source has {len(values)} rows; expected one.")

        # The token first, whatever stands where it does: the query, in a pattern.
        recorded.append(_of_heads(values.movedim(places.axis, 1), places)[0])
    return recorded


def _of_heads(values: Float[Tensor, "1 pos_source ..."], places: _Places) -> Float[Tensor, "1 pos_source ..."]:
    """Recorded values with as many heads as a sweep by head asks for."""
    if places.heads is None:
        return values

    # A recording of fewer heads has one value for each group of them.
    count = 1 + max(max(heads) for heads in places.heads)
    if values.ndim == 2:
        return of_query_heads(values, count)
    return values if values.shape[2] == count else values.repeat_interleave(count // values.shape[2], dim=2)
