"""Where does absolute position come from, in a model whose rotation knows only distances?

Ruscio et al., "Where does Absolute Position come from in decoder-only Transformers?" (arXiv 2606.06160). On an input
whose content repeats, a query and a key at a fixed distance are the same tokens again and again, at other absolute
positions. The log of their attention is split exactly:

    log pattern[i, j] = score[i, j] - log Z[i]

The score varies over repeats only if the residual stream differs (the residual part); log Z, the sum over all keys that
the causal mask leaves, grows with their number (the mask part). With variances over the repeats of a quarter of the
input, so that early and late queries are told apart,

    total = residual + mask - 2 covariance

The first two repeats are left out: keys of the first have no repeat before them, and its second meeting is the first.

Token 0 attends to itself alone, so its states say which token is first, and whatever reads them is told where it
starts: heads that attend to it are sinks (`attention_sinks`), and `replace_first` takes that token's embedding away.
`hooks` are any interventions, active throughout: with `lp.ablate(model, to="mean", site="positions")` positions stand
on a ruler of equal steps, each text's own mean, so that the rotation can leak nothing and distances keep their scale.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from ..config import BLOCK
from ..core.model_wrappers import base_model
from ..errors import PositionsError
from ..interventions import HOOK, Hooks, LayerIndices, hook_names, index_of
from ..measure.attention import EARLIEST, attention_names, keep_states, run_for_hooks, softmax_checks
from ..measure.corpus_reader import WINDOW, Texts, rows_of, windows
from ..measure.intervals import Tally, interval_of, resamples
from ..model import HookedPositionTransformer
from ..progress import several_passes, track_progress
from ..text import Mask, prompts_of

OFFSETS = 8
"""Distances that are looked at: 0 (the token itself) to 7."""

TOKENS_A_BATCH = 2048

QUARTERS = 4
"""Stretches of the input that are told apart, the earliest queries first."""

SKIPPED = 2
"""Repeats at the start that are left out."""

FEWEST_REPEATS = SKIPPED + 2 * QUARTERS

DRAWS = 4
"""How often another token or noise is drawn, for the mean over draws."""

PARTS = ("residual", "mask", "covariance")

ROUNDING = 1e-9
"""Nats squared: a part below this is rounding, and has nothing to lose."""

Replacement = Literal["token", "mean", "zeros", "noise"]
REPLACEMENTS: tuple[Replacement, ...] = get_args(Replacement)


def repeat_block(
    model: HookedPositionTransformer,
    texts: Texts,
    block: int = BLOCK,
    length: int | None = None,
    *,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> Int[Tensor, "text pos"]:
    """The first tokens of each text, repeated, after the token that it begins with.

    Args:
        model: the model; a byte model's texts begin after an end of document.
        texts: each with a first token and as many more as a block at least.
        block: tokens that repeat.
        length: tokens at most, the one in front included; None is the model's context, at most 512.
        attention_mask: the real tokens of a padded tensor.
        prepend_bos: whether a text begins with the beginning-of-sequence token; where it does not, its own first token
            stands in front. None is TransformerLens' default.

    Raises:
        PositionsError: no texts, one that is shorter than a block, or no room for ten repeats.
    """
    block = index_of(block, "block", "a whole number of tokens from 1", least=1)
    room = min(model.cfg.n_ctx, WINDOW) if length is None else index_of(length, "length", "a number of tokens", least=1)

    # One token stands in front.
    repeats = (room - 1) // block
    if repeats < FEWEST_REPEATS:
        raise PositionsError(
            f"{room} tokens have room for {repeats} repeats of {block}; expected at least {FEWEST_REPEATS}, to see "
            "absolute positions (a smaller block, or a longer context)."
        )
    rows = []
    for number, tokens in enumerate(prompts_of(model, texts, attention_mask, prepend_bos, whole=True)):
        # The first token is not repeated: it marks the beginning, which happens once.
        front, own = tokens[:1], tokens[1:]
        if len(own) < block:
            raise PositionsError(
                f"text {number} has {len(own)} tokens after its first; expected at least {block}, a block."
            )
        rows.append(torch.cat([front, own[:block].repeat(repeats)]))
    return torch.stack(rows)


def first_token(model: HookedPositionTransformer, prepend_bos: bool | None = None) -> int | None:
    """The token that is put in front of texts: an end of document in a byte model, else the tokenizer's, if any is."""
    # Asking with the token and without it tells which one a tokenizer puts in front.
    with_it, without = (prompts_of(model, "a", None, how)[0] for how in (prepend_bos, False))
    return int(with_it[0]) if len(with_it) > len(without) else None


def absolute_variation(
    model: HookedPositionTransformer,
    texts: Texts,
    layers: LayerIndices = None,
    hooks: Hooks | None = None,
    block: int = BLOCK,
    offsets: int | None = None,
    length: int | None = None,
    seed: int = 0,
    *,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """How much the log attention at a fixed distance varies with absolute position, and through what.

    Args:
        model: the model.
        texts: the source of repeated content, a document each.
        layers: the model's own layer numbers; None is all that rotate.
        hooks: interventions to measure under, such as those of `replace_first`.
        block, length, attention_mask, prepend_bos: as for `repeat_block`.
        offsets: distances that are looked at, from 0; None is 8, or a block where that is shorter.
        seed: of the bootstrap.

    Returns:
        One row for each `layer`, `head` ("all" is their mean) and `quarter` (0 has the earliest queries), before them
        the mean over layers, with both "all": `start` and `stop`, the positions of its queries, `n` (pairs of query and
        key), `documents`, and the variance over repeats of the score, `residual`, and of log Z, `mask`, with their
        `covariance`, and `total`, that of the log attention, each a mean over the tokens of a block and the distances;
        all in nats squared, with `_low` and `_high`, where it lies in 95% of 1,000 resamples of texts (NaN for one).
        `share` is the residual part over the sum of both, likewise, and NaN where there is neither.

    Raises:
        PositionsError: as `repeat_block`; no attention scores, or patterns that are not their softmax.

    >>> table = lp.analysis.absolute_variation(model, texts, layers=0)
    >>> whole = table[(table["layer"] == 0) & (table["head"] == "all")]
    >>> whole[["quarter", "documents"]].assign(residual_below_mask=whole["residual"] < whole["mask"])
       quarter  documents  residual_below_mask
    4        0          3                 True
    5        1          3                 True
    6        2          3                 True
    7        3          3                 True
    """
    rows = repeat_block(model, texts, block, length, attention_mask=attention_mask, prepend_bos=prepend_bos)
    found = _variances(rows, model, layers, hooks, block, offsets)
    draws = resamples(len(rows), seed)
    size = _repeats_a_quarter(rows, block)
    offsets = _distances(offsets, block)
    # The mean over heads stands before the heads, and the mean over layers before the layers: "all" in the table.
    overall = {layer: of_layer.mean(1, keepdims=True) for layer, of_layer in found.items()}
    groups: dict[int | str, np.ndarray] = {"all": np.mean(list(overall.values()), axis=0)}
    groups |= {layer: np.concatenate([overall[layer], of_layer], axis=1) for layer, of_layer in found.items()}
    return pd.DataFrame(
        [
            row
            for layer, of_layer in groups.items()
            for row in _variation_rows(layer, of_layer, draws, block, size, offsets)
        ]
    )


def _variation_rows(
    layer: int | str,
    of_layer: Float64[np.ndarray, "text head quarter part"],
    draws: Int64[np.ndarray, "draw text"],
    block: int,
    size: int,
    offsets: int,
) -> Iterator[dict[str, Any]]:
    """The rows of `absolute_variation` of one layer, whose first head is the mean of the others."""
    # log attention = score - log Z, so its variance is residual + mask - 2 covariance.
    parts = np.concatenate([of_layer, (of_layer @ [1, 1, -2])[..., None]], axis=-1)
    intervals, shares = _over_texts(parts, draws), _shares(of_layer, draws)
    for head, quarter in np.ndindex(parts.shape[1], QUARTERS):
        start = 1 + (SKIPPED + quarter * size) * block
        row: dict[str, Any] = {"layer": layer, "head": "all" if head == 0 else head - 1, "quarter": quarter}
        row |= {"start": start, "stop": start + size * block, "n": len(parts) * size * block * offsets}
        row |= {"documents": len(parts)}
        for i, part in enumerate((*PARTS, "total")):
            row |= _with_ends(part, (values[head, quarter, i] for values in intervals))
        yield row | _with_ends("share", (values[head, quarter] for values in shares))


def _with_ends(column: str, values: Iterable[Any]) -> dict[str, float]:
    """A value and the ends of its interval, by the names of their columns."""
    return dict(zip((column, f"{column}_low", f"{column}_high"), values, strict=True))


def replacement_effects(
    model: HookedPositionTransformer,
    texts: Texts,
    replacements: Sequence[Replacement] = REPLACEMENTS,
    layers: LayerIndices = None,
    hooks: Hooks | None = None,
    block: int = BLOCK,
    offsets: int | None = None,
    length: int | None = None,
    seed: int = 0,
    *,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """How much of the residual part goes when the embedding at position 0 is replaced, at early and late queries.

    Ruscio et al. report 40% at early queries. Early is the first quarter of the repeats that are looked at, from the
    third on, late the last. Another token and noise are drawn four times, each time for each text alone, and averaged.

    Args, errors: as `absolute_variation` and `replace_first`.

    Returns:
        One row for each `replacement`, `layer` ("all" or its number) and `queries` ("early", "late"): `documents`,
        `before` and `after`, the residual part without and with it (nats squared, mean over heads), and `drop`, one
        minus their ratio, with `low` to `high`, where it lies in 95% of 1,000 resamples of texts (NaN for one).

    >>> table = lp.analysis.replacement_effects(model, texts, replacements=["mean"], layers=0)
    >>> table[["replacement", "layer", "queries", "documents"]]
      replacement layer queries  documents
    0        mean   all   early          3
    1        mean   all    late          3
    2        mean     0   early          3
    3        mean     0    late          3
    """
    if not replacements or isinstance(replacements, str):
        raise PositionsError(f"replacements is {replacements!r}; expected some of {', '.join(REPLACEMENTS)}.")
    rows = repeat_block(model, texts, block, length, attention_mask=attention_mask, prepend_bos=prepend_bos)
    draws = resamples(len(rows), seed)

    # What is drawn at random differs from draw to draw; the mean and zeros do not.
    times = {replacement: DRAWS if replacement in ("token", "noise") else 1 for replacement in replacements}
    with several_passes(1 + sum(times.values())):
        own = _variances(rows, model, layers, hooks, block, offsets)
        replaced: dict[Replacement, list[dict[int, np.ndarray]]] = {}
        for how, i in [(name, i) for name, number in times.items() for i in range(number)]:
            draw = partial(_replacement_of_batch, model, how, (seed, i), hooks or [])
            replaced.setdefault(how, []).append(_variances(rows, model, layers, draw, block, offsets))

    numbers: list[int | str] = ["all", *own]
    table = []
    for replacement in replacements:
        other = {layer: np.mean([of[layer] for of in replaced[replacement]], axis=0) for layer in own}
        for layer in numbers:
            chosen = [n for n in own if layer in ("all", n)]
            # Part 0 is the residual part; the mean is over heads, then over layers: [text quarter].
            before, after = (np.mean([of[n][..., 0].mean(1) for n in chosen], axis=0) for of in (own, other))
            for queries, quarter in (("early", 0), ("late", QUARTERS - 1)):
                row: dict[str, Any] = {"replacement": replacement, "layer": layer, "queries": queries}
                table.append(row | _drop_row(before[:, quarter], after[:, quarter], draws))
    return pd.DataFrame(table)


def _drop_row(
    before: Float64[np.ndarray, " text"], after: Float64[np.ndarray, " text"], draws: Int64[np.ndarray, "draw text"]
) -> dict[str, float]:
    """How much of the residual part a replacement takes away; NaN where there is nothing but rounding to lose."""
    drop = low = high = math.nan
    if before.mean() > ROUNDING:
        drop = 1 - after.sum() / before.sum()
        if len(before) > 1:
            ends = interval_of((1 - draws @ after / (draws @ before))[:, None])
            low, high = (float(end[0]) for end in ends)
    found = {"documents": len(before), "before": before.mean(), "after": after.mean()}
    return found | {"drop": drop, "low": low, "high": high}


def _replacement_of_batch(
    model: TransformerBridge, how: Replacement, seeds: tuple[int, int], hooks: Hooks, batch: int
) -> Hooks:
    """The hooks of a replacement that draws anew for every batch, so that no two texts share a draw."""
    own = int(np.random.SeedSequence((*seeds, batch)).generate_state(1)[0])
    return [*hooks, *replace_first(model, how, own)]


def _distances(offsets: int | None, block: int) -> int:
    if offsets is None:
        return min(OFFSETS, block)
    return index_of(offsets, "offsets", f"a whole number from 1 to {block}, a block", least=1, most=block)


def _repeats_a_quarter(rows: Int[Tensor, "text pos"], block: int) -> int:
    return ((rows.shape[1] - 1) // block - SKIPPED) // QUARTERS


def _over_texts(values: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over texts, and its interval."""
    mean = values.mean(0)
    if len(values) < 2:
        return mean, np.full_like(mean, math.nan), np.full_like(mean, math.nan)
    return mean, *interval_of(np.tensordot(draws, values, axes=1) / len(values))


def _shares(parts: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The residual part over residual and mask, of [text head quarter part], and its interval over texts."""
    # Entry 0 is the texts as they are, the others are the resamples.
    sums = np.concatenate([parts.sum(0)[None], np.tensordot(draws, parts, axes=1)])[..., :2]
    whole = sums.sum(-1)
    share = np.divide(sums[..., 0], whole, out=np.full_like(whole, math.nan), where=whole > ROUNDING * len(parts))
    if len(parts) < 2:
        return share[0], np.full_like(share[0], math.nan), np.full_like(share[0], math.nan)
    # Percentiles of nothing but NaN would warn: such entries are filled, and taken out again.
    empty = np.isnan(share[1:]).all(0)
    low, high = (np.where(empty, math.nan, end) for end in interval_of(np.where(empty, 0.0, share[1:])))
    return share[0], low, high


def _variances(
    rows: Int[Tensor, "text pos"],
    model: HookedPositionTransformer,
    layers: LayerIndices,
    hooks: Hooks | Callable[[int], Hooks] | None,
    block: int,
    offsets: int | None,
) -> dict[int, np.ndarray]:
    """By layer the variances of score and log Z and their covariance in repeated rows, [text head quarter part].

    Hooks may depend on the number of the batch.
    """
    offsets = _distances(offsets, block)
    names = attention_names(model, layers, "attn_scores")
    found: dict[int, list[np.ndarray]] = {layer: [] for layer in names}
    size = _repeats_a_quarter(rows, block)

    # Queries from the third repeat on; a remainder that fills no quarter is left out at the end.
    start = 1 + SKIPPED * block
    queries = torch.arange(start, start + QUARTERS * size * block)

    # For each query the keys at the distances 0, 1, ... before it.
    keys = queries[:, None] - torch.arange(offsets)

    def collect(layer: int, scores: Float[Tensor, "batch head query key"], hook: HookPoint) -> None:
        # Float64, as a variance over repeats is a small difference of large squares.
        own = scores.detach()[..., queries, :].double()
        score = own.gather(-1, keys.to(own.device).expand(*own.shape[:2], -1, -1))

        # The log of the sum over all keys, the denominator of the softmax; the same for all distances.
        log_z = own.logsumexp(-1, keepdim=True).expand_as(score)
        # A query's place in its block stays fixed; what varies is which repeat it stands in.
        axes = "batch head (quarter repeat place) offset -> batch head quarter repeat place offset"
        by_repeat = [rearrange(values, axes, quarter=QUARTERS, repeat=size) for values in (score, log_z)]
        score, log_z = (values - values.mean(3, keepdim=True) for values in by_repeat)

        # Centred over repeats, so that means of products are variances and the covariance.
        products = torch.stack([score * score, log_z * log_z, score * log_z], dim=-1)
        found[layer].append(products.mean((3, 4, 5)).cpu().numpy())

    batches = rows.split(max(1, TOKENS_A_BATCH // rows.shape[1]))
    for number, batch in enumerate(track_progress(batches, "absolute position", quick=rows.numel() < 512)):
        listen = [(name, partial(collect, layer)) for layer, name in names.items()]

        # Hooks that draw at random draw anew for each batch.
        active = hooks(number) if callable(hooks) else hooks or []
        run_for_hooks(model, batch, [*active, *softmax_checks(names), *listen])
    return {layer: np.concatenate(parts) for layer, parts in found.items()}


def replace_first(model: TransformerBridge, how: Replacement, seed: int = 0) -> Hooks:
    """Replace the embedding of the token at position 0, before everything else.

    Args:
        model: a bridge.
        how: "token" (another token's, drawn for each row), "mean" (of all tokens), "zeros", or "noise" (Gaussian, drawn
            for each row, as long as it).
        seed: of the token and of the noise.

    Returns:
        (hook name, hook function) pairs, as `lp.ablate` returns them. An input of one token is left as it is: with a
        key-value cache it is a new one.

    Raises:
        PositionsError: another `how`, or no embeddings in TransformerLens.

    >>> hooks = lp.analysis.replace_first(model, "zeros")
    >>> _, cache = model.run_with_cache("The cat", fwd_hooks=hooks)
    >>> cache["resid_pre", 0][0].norm(dim=-1).round(decimals=1)
    tensor([0.0000, 1.3000, 1.4000, 1.3000, 1.3000, 1.5000, 1.3000, 1.4000])
    """
    if how not in REPLACEMENTS:
        raise PositionsError(f"how is {how!r}; expected one of {', '.join(REPLACEMENTS)}.")
    seed = index_of(seed, "seed", "a whole number from 0")
    name = "embed.hook_out"
    if name not in model.hook_dict:
        raise PositionsError(f"the model has no {name}; expected one whose embeddings TransformerLens shows.")
    embedding = base_model(model).get_input_embeddings()
    embedding = getattr(embedding, "original_component", embedding)  # without its hooks
    ids = torch.arange(embedding.weight.shape[0], device=embedding.weight.device)
    return [(name, partial(_replace_embedding, embedding, ids, how, seed))]


@torch.no_grad()
def _replace_embedding(
    embedding: Any,
    ids: Int[Tensor, " vocab"],
    how: Replacement,
    seed: int,
    embeddings: Float[Tensor, "batch pos d_model"],
    hook: HookPoint,
) -> Float[Tensor, "batch pos d_model"]:
    if embeddings.shape[1] == 1:
        return embeddings
    first, generator = embeddings[:, 0], torch.Generator().manual_seed(seed)
    if how == "token":
        drawn = torch.randint(len(ids) - 1, (len(first),), generator=generator).to(ids.device)
        given = embedding(ids[drawn])
        # A draw that is the token itself gives the next one; one id less is drawn, so that there is a next.
        given = torch.where((given == first).all(-1, keepdim=True), embedding(ids[drawn + 1]), given)
    elif how == "mean":
        given = embedding(ids).mean(0).expand_as(first)
    elif how == "zeros":
        given = torch.zeros_like(first)
    else:
        # As long as the vector that it replaces, as length alone may mark a token.
        noise = torch.randn(first.shape, generator=generator).to(first)
        given = noise / noise.norm(dim=-1, keepdim=True) * first.norm(dim=-1, keepdim=True)
    changed = embeddings.clone()
    changed[:, 0] = given
    return changed


def attention_sinks(
    model: HookedPositionTransformer,
    texts: Texts,
    layers: LayerIndices = None,
    hooks: Hooks | None = None,
    seed: int = 0,
    *,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """The share of attention that goes to position 0, by head, on the beginnings of texts.

    Returns:
        One row for each `first`, `layer` and `head`: first is "common" (the token that texts begin with in this model
        stands in front; left out where there is none) or "own" (the text's first token does); `n` (queries from the
        17th token on, those too that a sliding window keeps from seeing position 0), `documents`, `share` and `low` to
        `high`, where it lies in 95% of 1,000 resamples of documents (NaN for one).

    Raises:
        PositionsError: attention without patterns, texts without a window of 18 tokens, and as `read_corpus`.

    >>> table = lp.analysis.attention_sinks(model, texts, layers=0)
    >>> bool((table["share"] < 0.02).all())  # this model has no sink at layer 0
    True
    """
    documents, batches = windows(model, texts, attention_mask, prepend_bos)
    # Only the first window of a document begins at position 0.
    begun = [[window for window in batch if window[1] == 0 and window[2] > EARLIEST + 1] for batch in batches]
    if not any(begun):
        raise PositionsError(f"no text has {EARLIEST + 2} tokens; expected at least one, to see a sink from afar.")
    names, common = attention_names(model, layers, "pattern"), first_token(model, prepend_bos)
    tallies: dict[tuple[str, int], Tally] = {}

    def tally(first: str, layer: int, owners: list[int], pattern: Tensor, hook: HookPoint) -> None:
        own = tallies.setdefault((first, layer), Tally(len(documents)))
        # Early queries have few keys to choose from, and give position 0 much whatever the head does.
        own.add(owners, rearrange(pattern[:, :, EARLIEST:, 0].detach().float(), "batch head query -> batch query head"))

    for rows, owners in rows_of(documents, [batch for batch in begun if batch], "sinks"):
        # Without its common token the same text begins with a token of its own, and the rest is unchanged.
        in_front = common is not None and bool((rows[:, 0] == common).all())
        for first, tokens in ({"common": rows, "own": rows[:, 1:]} if in_front else {"own": rows}).items():
            listen: Hooks = [(name, partial(tally, first, layer, owners)) for layer, name in names.items()]
            run_for_hooks(model, tokens, [*(hooks or []), *listen])
    draws = resamples(len(documents), seed)
    table = []
    for (first, layer), own in tallies.items():
        for head, (share, low, high) in enumerate(zip(*own.summary(draws), strict=True)):
            row = {"first": first, "layer": layer, "head": head, "n": int(own.counts.sum())}
            row |= {"documents": np.count_nonzero(own.counts)}
            table.append(row | {"share": share, "low": low, "high": high})
    return pd.DataFrame(table)


def fingerprints(
    model: HookedPositionTransformer,
    texts: Texts,
    layers: LayerIndices = None,
    hooks: Hooks | None = None,
    seed: int = 0,
    *,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """How alike the states at position 0 are across texts, with a common first token and with the texts' own.

    A causal model's state at position 0 is a function of its token alone: with a common one it is the same in every
    text, and with the texts' own it may say which token that is. One very large component that all states share brings
    the cosine of residual streams near 1 whatever else they hold (Sun et al., arXiv 2402.17762, call these massive
    activations); keys and values, which come after the layer's norm, are what attention reads.

    Returns:
        One row for each `layer`, `state` ("resid_pre", the residual stream that enters the layer; "k" and "v", its keys
        before the rotation and values, all heads as one vector, where TransformerLens shows them) and `first`
        ("common", "own"): `n` pairs of texts, and the mean cosine of the states there, as `first_token`, and at the
        17th token, as `later`; each with `_low` and `_high`, where it lies in 95% of 1,000 resamples of texts. Left out
        are pairs of a text with itself, and with their own first tokens those that begin alike.

    Raises:
        PositionsError: fewer than three texts, or one of fewer than 17 tokens.

    >>> table = lp.analysis.fingerprints(model, texts, layers=0)
    >>> table.loc[table["state"] == "resid_pre", ["first", "n", "first_token"]].round(2)
        first  n  first_token
    0  common  3         1.00
    3     own  3         0.36
    """
    common = first_token(model, prepend_bos)
    own = _first_tokens(prompts_of(model, texts, attention_mask, prepend_bos, whole=True), common)
    names = _state_names(model, layers)
    rows = torch.stack(own)
    front = rows[:1, :1] if common is None else rows.new_tensor([[common]])
    draws = resamples(len(rows), seed)
    # Pairs of texts [text, text]: none of a text with itself, and with their own first tokens none that begin alike.
    others = 1 - np.eye(len(rows))
    apart = others * (rows[:, :1] != rows[:, 0]).cpu().numpy()
    if not apart.any():
        raise PositionsError("all texts begin with the same token; expected others, to tell its fingerprint.")

    # As many tokens in both: the last gives way to the one in front.
    with_common = torch.cat([front.expand(len(rows), 1), rows[:, :-1]], dim=1)
    table = []
    for first, tokens, pairs in (("common", with_common, others), ("own", rows, apart)):
        seen: dict[tuple[int, str], Tensor] = {}
        listen: Hooks = [(name, partial(keep_states, seen, key)) for key, name in names.items()]
        run_for_hooks(model, tokens, [*(hooks or []), *listen])
        for (layer, state), found in seen.items():
            row: dict[str, Any] = {"layer": layer, "state": state, "first": first, "n": int(pairs.sum()) // 2}
            for column, place in (("first_token", 0), ("later", EARLIEST)):
                row |= _with_ends(column, _mean_cosine(found[:, place], pairs, draws))
            table.append(row)
    return pd.DataFrame(table)


def _first_tokens(documents: list[Int[Tensor, " _pos"]], common: int | None) -> list[Int[Tensor, " _pos"]]:
    """The beginning of each text, from its own first token on, as far as it is looked at."""
    own = [tokens[int(int(tokens[0]) == common) :][: EARLIEST + 1] for tokens in documents]
    if len(own) < 3:
        raise PositionsError(f"there are {len(own)} texts; expected at least three texts, to compare them.")
    if short := [number for number, tokens in enumerate(own) if len(tokens) <= EARLIEST]:
        raise PositionsError(f"text {short[0]} has {len(own[short[0]])} tokens; expected at least {EARLIEST + 1}.")
    return own


def _state_names(model: HookedPositionTransformer, layers: LayerIndices) -> dict[tuple[int, str], str]:
    """The hook names of the states that are compared, by layer and state, as far as TransformerLens shows them."""
    states = {"resid_pre": "hook_resid_pre"} | {side: HOOK.format(side) for side in ("k", "v")}
    return {
        (layer, state): name
        for state, hook in states.items()
        for layer, name in hook_names(model, layers, hook)
        if name in model.hook_dict
    }


def _mean_cosine(
    states: Float[Tensor, "text *d"], pairs: Float64[np.ndarray, "text text"], draws: Int64[np.ndarray, "draw text"]
) -> tuple[float, float, float]:
    """The mean cosine over pairs of texts, and where it lies in 95% of resamples of texts."""
    unit = torch.nn.functional.normalize(states.flatten(1).double(), dim=-1)
    cosines = (unit @ unit.T).cpu().numpy() * pairs
    # In a resample that holds text a m times and text b n times, their pair occurs m * n times.
    weights = ((draws @ pairs) * draws).sum(1).astype(float)
    weights[weights == 0] = math.nan  # a resample of one text alone has no pair
    low, high = interval_of((((draws @ cosines) * draws).sum(1) / weights)[:, None])
    return cosines.sum() / pairs.sum(), float(low[0]), float(high[0])
