"""Which rotary frequencies does a model use, and what for?

Barbero et al., "Round and Round We Go! What makes Rotary Positional Encodings useful?" (arXiv 2410.06205). RoPE turns
each pair of components of queries and keys by an angle of its own per position, its frequency, so a query and a key are
lists of two-dimensional chunks, one for each frequency, and their score is a sum with one term for each:

    frequency_norms          how long the chunks are
    frequency_contributions  the terms: they sum to the model's own scores
    frequency_shares         how much of the variation of a head's scores over keys each term makes
    positional_heads         heads that attend to a fixed offset whatever the tokens are
    truncate_frequencies     the model without its lowest, or its highest, frequencies
    aligned_key, scores_by_distance   what RoPE can do with one query and one key

Which components belong together is found by trying (`rotary_layout`): halves, neighbours and partial rotary alike.
Components that no frequency turns are a chunk of frequency 0, whose norm is scaled to that of a pair.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from ..errors import PositionsError
from ..interventions import Hooks, LayerIndices, finite_number, hook_names, index_of
from ..measure.attention import EARLIEST, attention_names, run_for_hooks, visible_keys
from ..measure.corpus_reader import Texts, rows_of, windows
from ..measure.intervals import Tally, bootstrap_means, interval_of, resamples, shuffle_within
from ..model import HookedPositionTransformer
from ..text import Mask, TextOrTokens, one_prompt
from .rotary_layout import (
    ROTATION,
    RotaryLayout,
    names_of,
    products_of,
    rotary_layout,
    rotation_frequencies,
    score_factor,
)

SIDES = ("query", "key")


def frequency_norms(
    model: HookedPositionTransformer,
    texts: Texts,
    layers: LayerIndices = None,
    hooks: Hooks | None = None,
    seed: int = 0,
    *,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """The mean 2-norm of the chunks of queries and keys, by frequency, layer and head (Barbero et al., section 4).

    Args:
        model: the model.
        texts: documents, as for `increments_by_category`.
        layers: the model's own layer numbers; None is all that rotate.
        hooks: interventions to measure under, such as those of `truncate_frequencies`.
        seed: of the bootstrap.
        attention_mask, prepend_bos: as for `analysis.read_corpus`.

    Returns:
        One row for each `layer`, `side` ("query", "key"), `head` and chunk: its `index`, 0 for the highest frequency,
        the `frequency` (radians per position; 0 for what is not turned), `n` (tokens), `documents` and the mean
        `norm` over tokens with `low` to `high`, where it lies in 95% of 1,000 resamples of documents (NaN for one).

    Raises:
        PositionsError: as `rotary_layout` and `read_corpus`.

    >>> table = lp.analysis.frequency_norms(model, texts, layers=0)
    >>> table.groupby("side")["norm"].mean().round(1)
    side
    key      2.2
    query    1.9
    Name: norm, dtype: float64
    """
    layouts = rotary_layout(model, layers)
    documents, batches = windows(model, texts, attention_mask, prepend_bos)
    tallies: dict[tuple[int, str], Tally] = {}

    def tally(side: str, layer: int, owners: list[int], states: Tensor) -> None:
        own = tallies.setdefault((layer, side), Tally(len(documents)))
        own.add(owners, layouts[layer].norms(states.detach().float()))

    for rows, owners in rows_of(documents, batches, "frequencies"):
        listen: Hooks = []
        for layer, layout in layouts.items():
            for side in SIDES:
                listen += _states_hooks(model, layer, layout, side, partial(tally, side, layer, owners))
        run_for_hooks(model, rows, [*(hooks or []), *listen])
    draws = resamples(len(documents), seed)
    parts = [
        _norm_rows(layer, side, layout.all_frequencies.numpy(), tallies[layer, side], draws)
        for layer, layout in layouts.items()
        for side in SIDES
    ]
    return pd.concat(parts, ignore_index=True)


def _norm_rows(
    layer: int, side: str, frequencies: Float[np.ndarray, " chunk"], own: Tally, draws: Int[np.ndarray, "draw document"]
) -> pd.DataFrame:
    """The rows of `frequency_norms` of one side of a layer, head by head."""
    summary = [values.flatten() for values in own.summary(draws)]  # [head chunk], the chunk fastest
    heads = len(summary[0]) // len(frequencies)
    return pd.DataFrame(
        {
            "layer": layer,
            "side": side,
            "head": repeat(np.arange(heads), "head -> (head chunk)", chunk=len(frequencies)),
            "index": repeat(np.arange(len(frequencies)), "chunk -> (head chunk)", head=heads),
            "frequency": repeat(frequencies, "chunk -> (head chunk)", head=heads),
            "n": int(own.counts.sum()),
            "documents": len(own.counts),
            **dict(zip(("norm", "low", "high"), summary, strict=True)),
        }
    )


@dataclass(frozen=True)
class Contributions:
    """The terms of a layer's attention scores.

    Attributes:
        frequencies: of each term, in radians per position, highest first; 0 for what is not turned.
        terms: they sum over the chunks to the model's own scores, wherever the query sees the key. They take the memory
            of the scores times the number of chunks.
    """

    frequencies: Float[Tensor, " chunk"]
    terms: Float[Tensor, "head chunk query key"]


def frequency_contributions(
    model: TransformerBridge,
    tokens: TextOrTokens,
    layer: int,
    hooks: Hooks | None = None,
    *,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> Contributions:
    """The attention scores of a layer on a prompt, split exactly into one term for each frequency.

    The prompt is a text or tokens, with the mask of its padding; `hooks` are interventions to split them under.

    Raises:
        PositionsError: several prompts, no such layer, as `rotary_layout`, or scores that are more than scaled products
            of queries and keys (capped, or with a bias).

    >>> terms = lp.analysis.frequency_contributions(model, "The cat", layer=0).terms
    >>> terms.shape  # head, frequency, query, key
    torch.Size([4, 16, 8, 8])
    >>> scores = model.run_with_cache("The cat")[1]["attn_scores", 0][0]
    >>> torch.allclose(terms.sum(1).tril(), scores.tril(), atol=1e-4)
    True
    """
    layer = index_of(layer, "layer", "the number of one layer")
    layouts = rotary_layout(model, layer)
    found: list[Tensor] = []

    def collect(_layer: int, terms: Iterator[Tensor], _seen_keys: Tensor) -> None:
        # One prompt: the batch axis goes.
        found.append(torch.stack([term[0] for term in terms], dim=1))

    _each_score(model, one_prompt(model, tokens, attention_mask, prepend_bos), layouts, collect, hooks)
    return Contributions(layouts[layer].all_frequencies, found[0])


def _each_score(
    model: TransformerBridge,
    rows: Int[Tensor, "batch pos"],
    layouts: dict[int, RotaryLayout],
    use: Callable[[int, Iterator[Float[Tensor, "batch head query key"]], Bool[Tensor, "batch head query key"]], None],
    hooks: Hooks | None,
) -> None:
    """Run some rows, and hand `use` each layer's number, the terms of its scores, chunk by chunk, and the keys seen."""
    listen: Hooks = []
    for layer, layout in layouts.items():
        scores = names_of(model, layer, "attn_scores")
        if not scores:
            raise PositionsError(f"layer {layer} has no attention scores in TransformerLens; expected some.")

        # Queries and keys come by before the scores that are made of them, layer by layer.
        seen: dict[str, Tensor] = {}
        for side in SIDES:
            listen += _states_hooks(model, layer, layout, side, partial(seen.__setitem__, side))
        listen.append((scores[0], partial(_split, layer, layout, seen, use)))
    run_for_hooks(model, rows, [*(hooks or []), *listen])


def _states_hooks(
    model: TransformerBridge, layer: int, layout: RotaryLayout, side: str, use: Callable[[Tensor], None]
) -> Hooks:
    """Hooks that hand rotated queries or keys, [batch pos head d_head], to `use`."""
    if layout.components is None:
        return [(name, partial(_hand_over, use)) for name in names_of(model, layer, f"rot_{side[0]}")]
    # TransformerLens shows queries before the rotation, and the rotation itself earlier in the same layer: its cosines
    # and sines are kept, and turn the states when these come by.
    rotation: list[Tensor] = []

    def turn(states: Tensor) -> None:
        use(layout.rotate(states.float(), rotation[-1]))

    (first,), (second,) = names_of(model, layer, "rotation"), names_of(model, layer, side[0])
    return [(first, partial(_hand_over, rotation.append)), (second, partial(_hand_over, turn))]


def _hand_over(use: Callable[[Tensor], None], states: Tensor, hook: HookPoint) -> None:
    use(states.detach())


def _split(
    layer: int,
    layout: RotaryLayout,
    seen: dict[str, Tensor],
    use: Callable[..., None],
    scores: Float[Tensor, "batch head query key"],
    hook: HookPoint,
) -> None:
    query, key = (seen.pop(side).float() for side in SIDES)
    # Models scale scores in ways of their own; the factor is found from the scores, and refused where there is none.
    factor = score_factor(query, key, scores)
    if factor is None:
        raise PositionsError(
            f"the scores of layer {layer} are not its queries times its keys (they may be capped or biased); expected "
            "plain attention."
        )
    # A generator: all terms at once take the memory of the scores times the number of chunks.
    terms = (products_of(factor * query, key, layout.chunk(i)) for i in range(len(layout.all_frequencies)))
    use(layer, terms, visible_keys(scores))


def frequency_shares(
    model: HookedPositionTransformer,
    texts: Texts,
    layers: LayerIndices = None,
    hooks: Hooks | None = None,
    seed: int = 0,
    *,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """How much of the variation of a head's scores over keys each frequency makes.

    The share is the covariance of the term with the score over the keys that a query sees, summed over queries, over
    the sum of the variances of the scores: shares sum to 1 over the chunks of a head, and a share below 0 works
    against the rest.

    Args, errors: as `frequency_norms`, and as `frequency_contributions`.

    Returns:
        One row for each `layer`, `head` and chunk: `index`, `frequency`, `n` (queries that see two keys or more),
        `documents`, `share` and `low` to `high`, as in `frequency_norms`.

    >>> table = lp.analysis.frequency_shares(model, texts, layers=0)
    >>> table.groupby("head")["share"].sum().round(6).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    layouts = rotary_layout(model, layers)
    documents, batches = windows(model, texts, attention_mask, prepend_bos)
    tallies = {layer: Tally(len(documents)) for layer in layouts}

    def tally(owners: list[int], layer: int, terms: Iterator[Tensor], seen: Tensor) -> None:
        tallies[layer].add(owners, _covariances(terms, seen))

    for rows, owners in rows_of(documents, batches, "frequencies"):
        _each_score(model, rows, layouts, partial(tally, owners), hooks)
    draws = resamples(len(documents), seed)
    table = []
    for layer, layout in layouts.items():
        own = tallies[layer]
        sums = cast(np.ndarray, own.sums)  # [document head chunk]
        # The terms sum to the score, so their covariances with it sum to its variance, the denominator.
        share = sums.sum(0) / sums.sum((0, 2))[:, None]
        low = high = np.full_like(share, math.nan)
        if np.count_nonzero(own.counts) > 1:
            means = bootstrap_means(sums, own.counts, draws)
            low, high = interval_of(means / means.sum(2, keepdims=True))
        for head, of_head in enumerate(share):
            for index, value in enumerate(of_head):
                row: dict[str, Any] = {"layer": layer, "head": head, "index": index}
                row |= {"frequency": float(layout.all_frequencies[index]), "n": int(own.counts.sum())}
                row |= {"documents": len(documents), "share": value, "low": low[head, index], "high": high[head, index]}
                table.append(row)
    return pd.DataFrame(table)


def _covariances(
    terms: Iterator[Float[Tensor, "batch head query key"]], seen: Bool[Tensor, "batch head query key"]
) -> Float[Tensor, "batch query_less_one head chunk"]:
    """The covariance of each term with the sum of all, over the keys that a query sees; the first query, which sees
    one key, is left out."""
    # Masked twice: for the mean over the keys that are seen, and so that the others add nothing to the products.
    count = seen.sum(-1, keepdim=True)
    centred = [((term - (term * seen).sum(-1, keepdim=True) / count) * seen) for term in terms]
    total = torch.stack(centred).sum(0)
    found = torch.stack([(term * total).sum(-1) / count[..., 0] for term in centred], dim=-1)
    return rearrange(found[:, :, 1:], "batch head query chunk -> batch query head chunk")


def truncate_frequencies(
    model: TransformerBridge,
    keep: float,
    drop: Literal["lowest", "highest"] = "lowest",
    layers: LayerIndices = None,
) -> Hooks:
    """p-RoPE as an intervention: only a fraction of the rotary frequencies still turns queries and keys.

    Keeps floor(keep * frequencies) of those that the model turns, as a model trained with `rope_fraction` does; equal
    frequencies go together. Dropped chunks stay as they are before the rotation.

    Args:
        model: a bridge with position streams.
        keep: the fraction that stays; 1 is the identity, to the bit, and 0 no rotary encoding at all.
        drop: "lowest" (p-RoPE) or, the reverse, "highest".
        layers: the model's own layer numbers; None is all that rotate.

    Returns:
        (hook name, hook function) pairs, one a layer, as `lp.ablate` returns them.

    Raises:
        PositionsError: no streams, no such layer, keep outside [0, 1], or another `drop`.

    >>> logits = model("The cat")
    >>> torch.equal(model("The cat", fwd_hooks=lp.analysis.truncate_frequencies(model, keep=1)), logits)
    True
    >>> torch.equal(model("The cat", fwd_hooks=lp.analysis.truncate_frequencies(model, keep=0.75)), logits)
    False
    """
    expected = "a fraction of the frequencies from 0 to 1"
    if not 0 <= finite_number(keep, "keep", expected) <= 1:
        raise PositionsError(f"keep is {keep}; expected {expected}.")
    if drop not in ("lowest", "highest"):
        raise PositionsError(f'drop is {drop!r}; expected "lowest" or "highest".')
    return [(name, partial(_truncate_rotation, keep, drop)) for _, name in hook_names(model, layers, ROTATION)]


def _truncate_rotation(
    keep: float, drop: str, rotation: Float[Tensor, "batch pos *head 2 d_rotary"], hook: HookPoint
) -> Float[Tensor, "batch pos *head 2 d_rotary"]:
    own = rotation_frequencies(hook)
    turns = own > 0
    distinct, counts = own[turns].unique(return_counts=True)
    if not len(distinct):
        return rotation
    if drop == "lowest":
        distinct, counts = distinct.flip(0), counts.flip(0)
    # cos and sin name a frequency once or twice, by the layout, so it is the share of components that counts.
    kept = math.floor(keep * int(counts.sum()) / int(counts.min()) + 1e-9) * int(counts.min())
    # Equal frequencies stay or go together, as nothing tells one of them from the other.
    mask = torch.isin(own, distinct[counts.cumsum(0) <= kept]) | ~turns
    if bool(mask.all()):
        return rotation
    # Turned by no angle, with the length that the rotation has: YaRN scales its cosines and sines.
    cos, sin = rotation.unbind(-2)
    return torch.stack([cos.where(mask, cos.hypot(sin)), sin.where(mask, 0.0)], dim=-2)


OFFSETS = 8
"""How far back heads are followed: 0 (the token itself) to 7."""

POSITIONAL = 0.5
"""The share of attention at one offset from which a head counts as positional."""


def positional_heads(
    model: HookedPositionTransformer,
    texts: Texts,
    layers: LayerIndices = None,
    hooks: Hooks | None = None,
    offsets: int = OFFSETS,
    seed: int = 0,
    *,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """Heads that attend to a fixed offset, whatever the tokens are: the diagonal, the previous token, and so on.

    The offset is the one with the most attention in the text as it is; the control is the same text with the tokens of
    each window, but its first, in another order, which keeps positions and takes away what the order of tokens says.
    At offset 0 it says less: every token still stands on its own diagonal.

    Args:
        model, texts, layers, hooks, seed: as for `frequency_norms`; the seed is also that of the shuffle.
        offsets: how many offsets are looked at, 0 (the token itself) first.

    Returns:
        One row for each `layer` and `head`: `offset` (tokens back), `n` (queries from the 17th token of a window on),
        `documents`, the mean `share` of attention at that offset, the same in `shuffled` text, each with `_low` and
        `_high`, where it lies in 95% of 1,000 resamples of documents (NaN for one), and `positional`, whether more than
        half of the attention goes there in both.

    Raises:
        PositionsError: attention without patterns, texts without a window of 17 tokens, and as `read_corpus`.

    >>> table = lp.analysis.positional_heads(model, texts, layers=0)
    >>> table[["head", "offset", "share", "shuffled", "positional"]].iloc[[0, 2]].round(1)  # in shuffled text too
       head  offset  share  shuffled  positional
    0     0       1    0.6       0.6        True
    2     2       2    0.5       0.5        True
    """
    offsets = index_of(offsets, "offsets", f"a whole number from 1 to {EARLIEST}", least=1, most=EARLIEST)
    documents, batches = windows(model, texts, attention_mask, prepend_bos)

    # Windows of a batch have one length.
    batches = [batch for batch in batches if batch[0][2] - batch[0][1] > EARLIEST]
    if not batches:
        raise PositionsError(f"no text has {EARLIEST + 1} tokens; expected at least one, to see offsets from afar.")
    tallies = _offset_shares(model, documents, batches, attention_names(model, layers, "pattern"), hooks, offsets, seed)
    draws = resamples(len(documents), seed)
    table = []
    for layer in dict.fromkeys(layer for layer, _ in tallies):
        natural, control = (tallies[layer, shuffled].summary(draws) for shuffled in (False, True))
        counts = tallies[layer, False].counts
        for head, shares in enumerate(natural[0]):
            # The offset is chosen in the text as it is, so the shuffled text is a test that had no say in the choice.
            offset = int(shares.argmax())
            row: dict[str, Any] = {"layer": layer, "head": head, "offset": offset}
            row |= {"n": int(counts.sum()), "documents": np.count_nonzero(counts)}
            for name, summary in (("share", natural), ("shuffled", control)):
                mean, low, high = (values[head, offset] for values in summary)
                row |= {name: mean, f"{name}_low": low, f"{name}_high": high}
            table.append(row | {"positional": bool(min(row["share"], row["shuffled"]) > POSITIONAL)})
    return pd.DataFrame(table)


def _offset_shares(
    model: HookedPositionTransformer,
    documents: list[Tensor],
    batches: list[list[tuple[int, int, int]]],
    patterns: dict[int, str],
    hooks: Hooks | None,
    offsets: int,
    seed: int,
) -> dict[tuple[int, bool], Tally]:
    """The share of attention at each offset, [head offset], by layer, in the text as it is (False) and shuffled."""
    tallies = {(layer, shuffled): Tally(len(documents)) for layer in patterns for shuffled in (False, True)}

    def tally(layer: int, shuffled: bool, owners: list[int], pattern: Tensor, hook: HookPoint) -> None:
        # Diagonal -k holds query k and key 0 first: `EARLIEST - k` entries on, all of them begin at the same query.
        back = [pattern.diagonal(-offset, -2, -1)[..., EARLIEST - offset :] for offset in range(offsets)]
        shares = torch.stack(back, dim=-1).detach().float()
        tallies[layer, shuffled].add(owners, rearrange(shares, "batch head query offset -> batch query head offset"))

    for number, (rows, owners) in enumerate(rows_of(documents, batches, "heads")):
        # The first token stays: many models put a special one there, whose place is part of what it says.
        rest = rows[:, 1:]
        order = torch.from_numpy(shuffle_within(np.arange(rest.numel()) // rest.shape[1], seed + number))
        exchanged = torch.cat([rows[:, :1], rest.flatten()[order.to(rest.device)].view_as(rest)], dim=1)
        for shuffled, tokens in ((False, rows), (True, exchanged)):
            listen: Hooks = [(name, partial(tally, layer, shuffled, owners)) for layer, name in patterns.items()]
            run_for_hooks(model, tokens, [*(hooks or []), *listen])
    return tallies


def frequency_quarters(norms: pd.DataFrame) -> "pd.Series[int]":
    """The quarter of its layer's frequencies that each row of `frequency_norms` is in: 0 the highest, 3 the lowest, 4
    what is not turned.

    >>> norms = lp.analysis.frequency_norms(model, texts, layers=0)
    >>> lp.analysis.frequency_quarters(norms).head(8).tolist()
    [0, 0, 0, 0, 1, 1, 1, 1]
    """
    turned = norms["frequency"] > 0

    # How many frequencies the layer turns.
    counts = norms["index"].where(turned).groupby(norms["layer"]).transform("max") + 1
    return (4 * norms["index"] / counts).where(turned, 4).astype(int)


def high_frequency_use(norms: pd.DataFrame, heads: pd.DataFrame, highest: float = 0.25) -> pd.DataFrame:
    """Do positional heads use high frequencies more than the others do?

    Args:
        norms: from `frequency_norms`.
        heads: from `positional_heads`, of the same model.
        highest: the fraction of the frequencies that counts as high.

    Returns:
        One row for each `side`: `n` positional heads (key-value heads count once, as positional if one of their query
        heads is) and `others`, the mean share of the high frequencies in the squares of the mean norms of all chunks
        that turn, as `positional` and `other`, and `p`, of a two-sided Mann-Whitney test over heads, NaN where either
        group is empty.

    Raises:
        PositionsError: tables of different layers, or no frequency that turns.

    >>> norms = lp.analysis.frequency_norms(model, texts)
    >>> table = lp.analysis.high_frequency_use(norms, lp.analysis.positional_heads(model, texts))
    >>> table[["side", "n", "others", "positional", "other"]].round(1)
        side  n  others  positional  other
    0  query  2      22         0.5    0.2
    1    key  2      22         0.4    0.2
    """
    if not 0 < finite_number(highest, "highest", "a fraction above 0") < 1:
        raise PositionsError(f"highest is {highest}; expected a fraction between 0 and 1.")
    if set(norms["layer"]) != set(heads["layer"]):
        raise PositionsError("norms and heads are of different layers; expected both of the same model and layers.")
    rows = []
    for side in SIDES:
        own = norms[(norms["side"] == side) & (norms["frequency"] > 0)]
        if own.empty:
            raise PositionsError("the model turns no frequency; expected rotary positions.")
        by: Any = ["layer", "head"]
        counts = own.groupby("layer")["index"].transform("max") + 1

        # Squares of norms add up over chunks to that of the whole vector, so shares of them are shares of a whole.
        squares = own.assign(square=own["norm"] ** 2, high=own["index"] < np.ceil(highest * counts))
        share = squares[squares["high"]].groupby(by)["square"].sum() / squares.groupby(by)["square"].sum()
        # Keys have fewer heads where query heads share them: a key head stands for its group of query heads.
        grouped = int(heads["head"].max() + 1) // int(own["head"].max() + 1)
        positional = heads.assign(head=heads["head"] // grouped).groupby(by)["positional"].any().reindex(share.index)
        ours, others = share[positional], share[~positional]
        row = {"side": side, "n": len(ours), "others": len(others), "positional": ours.mean(), "other": others.mean()}
        p = stats.mannwhitneyu(ours, others).pvalue if len(ours) and len(others) else math.nan
        rows.append(row | {"p": p})
    return pd.DataFrame(rows)


def aligned_key(
    query: Float[Tensor, "*shape d_rotary"], distance: float, frequencies: Float[Tensor, " frequency"]
) -> Float[Tensor, "*shape d_rotary"]:
    """The key, as long as the query, whose score with it is largest when it stands exactly so many positions before.

    RoPE need not make attention decay with distance (Barbero et al., section 3): turned on by the distance, the query
    itself is that key. Components are in halves: the first half holds the first component of every pair.

    >>> query, frequencies = torch.tensor([1.0, 0.0]), torch.tensor([0.5])
    >>> lp.analysis.aligned_key(query, 3.0, frequencies).round(decimals=2)  # turned by 1.5 radians
    tensor([0.0700, 1.0000])
    """
    return _rotate(query, query.new_tensor(finite_number(distance, "distance")), frequencies)


def scores_by_distance(
    query: Float[Tensor, "*shape d_rotary"],
    key: Float[Tensor, "*shape d_rotary"],
    distances: Float[Tensor, " distance"],
    frequencies: Float[Tensor, " frequency"],
) -> Float[Tensor, "*shape distance"]:
    """The score, before any scaling, of a query with a key that stands so many positions before it.

    Over independent Gaussian queries and keys its mean is 0 at every distance (Barbero et al., section 3).

    >>> query, distances = torch.tensor([1.0, 0.0]), torch.arange(4.0)
    >>> lp.analysis.scores_by_distance(query, query, distances, torch.tensor([1.0])).round(decimals=2)  # cosines
    tensor([ 1.0000,  0.5400, -0.4200, -0.9900])
    """
    # A key that stands `distance` before the query is turned back by it: scores depend on the difference alone.
    turned = _rotate(key[..., None, :], -distances.to(key), frequencies)
    return (query[..., None, :] * turned).sum(-1)


def _rotate(states: Tensor, distances: Tensor, frequencies: Tensor) -> Tensor:
    if states.shape[-1] != 2 * len(frequencies):
        raise PositionsError(
            f"there are {states.shape[-1]} components and {len(frequencies)} frequencies; expected two for each."
        )

    # Each frequency turns by its own angle per position.
    angle = distances[..., None] * frequencies.to(states)
    cos, sin = angle.cos(), angle.sin()
    first, second = states.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
