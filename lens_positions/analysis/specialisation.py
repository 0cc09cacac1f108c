"""What each layer marks: how much of its increments the kind of a token explains, and where they end at the cap.

A layer whose increments follow the kind of a token (spaces far, letters near) has a large share explained; one that
follows the context, or nothing, a small one. As a control the same share is computed with kinds shuffled among the
tokens of each document.
"""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float64, Int64

from ..config import Alphabet
from ..errors import PositionsError
from ..measure.corpus_reader import CorpusIncrements, Texts, read_corpus
from ..measure.intervals import bootstrap_means, interval_of, resamples, shuffle_within
from ..model import HookedPositionTransformer
from ..text import Mask
from .token_kinds import corpus_kinds, document_sums, increments_by_category

AT_CAP = 0.99
"""From this fraction of the cap on, an increment counts as at the cap."""


def saturation(
    model: HookedPositionTransformer,
    texts: Texts | CorpusIncrements,
    seed: int = 0,
    *,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """The share of increments at the cap of the sigmoid, where they can grow no more, by layer.

    Args:
        model: a model whose increments are bounded; heads are counted apart and pooled.
        texts: documents, as for `increments_by_category`.
        seed: of the bootstrap.
        attention_mask, prepend_bos: as for `analysis.read_corpus`.

    Returns:
        One row a layer: `n` (increments), `documents`, `cap` (in positions), `share` of the increments at 0.99 of it or
        more, with `low` to `high`, where it lies in 95% of 1,000 resamples of documents (NaN for one), and `max`.

    Raises:
        PositionsError: increments that have no cap, and as `read_corpus`.

    >>> table = lp.analysis.saturation(model, texts)
    >>> table[["layer", "cap", "share", "max"]].round(1)
       layer   cap  share  max
    0      0  10.0    0.0  4.2
    1      1  10.0    0.0  1.9
    2      2  10.0    0.0  2.3
    3      3  10.0    0.0  5.0
    4      4  10.0    0.0  3.4
    5      5  10.0    0.0  4.6
    """
    if (given := _other_activation(model, "sigmoid")) is not None:
        raise PositionsError(f"the model has {given}, which has no cap; expected learned increments with a sigmoid.")
    cap = model.position_config.max_increment
    corpus = read_corpus(model, texts, attention_mask, prepend_bos)
    table = _shares(corpus, corpus.increments >= AT_CAP * cap, seed)
    table.insert(3, "cap", cap)
    return table.assign(max=corpus.increments.max(axis=(1, 2)))


def below_zero(
    model: HookedPositionTransformer,
    texts: Texts | CorpusIncrements,
    seed: int = 0,
    *,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """The share of increments that put a token before the last one, where a source may be signed, by layer.

    Returns:
        As `saturation`, with `min` in place of `cap` and `max`.

    Raises:
        PositionsError: increments that are bounded below, and as `read_corpus`.

    >>> signed = lp.PositionConfig(activation="none")
    >>> config = lp.PositionModelConfig(d_model=32, n_layers=2, n_heads=4, positions=signed)
    >>> fresh = lp.HookedPositionTransformer.from_config(config)
    >>> lp.analysis.below_zero(fresh, texts)[["layer", "n", "share", "min"]]
       layer    n  share  min
    0      0  526    0.0  1.0
    1      1  526    0.0  1.0
    """
    if (given := _other_activation(model, "none")) is not None:
        raise PositionsError(f'the model has {given}; expected learned increments with activation "none".')
    corpus = read_corpus(model, texts, attention_mask, prepend_bos)
    return _shares(corpus, corpus.increments < 0, seed).assign(min=corpus.increments.min(axis=(1, 2)))


def _other_activation(model: HookedPositionTransformer, wanted: str) -> str | None:
    """What a model has in place of learned increments with this activation; None where it has them."""
    config = model.position_config
    if not config.learned:
        return f"the source {config.source!r}"
    return None if config.activation == wanted else f"activation {config.activation!r}"


def _shares(corpus: CorpusIncrements, chosen: Bool[np.ndarray, "layer head token"], seed: int) -> pd.DataFrame:
    """The share of increments chosen, by layer, with its interval over documents."""
    documents = len(corpus.documents)
    sums, counts = document_sums(chosen.mean(axis=1, keepdims=True), corpus.document, documents)

    # One document says nothing about others.
    low, high = np.full((2, len(chosen)), np.nan)
    if documents > 1:
        low, high = interval_of(bootstrap_means(sums[..., 0], counts, resamples(documents, seed)))
    columns = {"layer": corpus.layers, "n": chosen[0].size, "documents": documents}
    return pd.DataFrame(columns | {"share": chosen.mean(axis=(1, 2)), "low": low, "high": high})


def specialisation(
    model: HookedPositionTransformer,
    texts: Texts | CorpusIncrements,
    alphabet: Alphabet = "prose",
    seed: int = 0,
    *,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """By layer, how much the kind of a token explains of its increment, and which kinds stand out most.

    Args:
        model: the model; increments per head are averaged over the heads.
        texts: documents, as for `increments_by_category`.
        alphabet: the kinds of prose, or those of program text ("code", in models of bytes).
        seed: of the bootstrap and of the shuffle.
        attention_mask, prepend_bos: as for `analysis.read_corpus`.

    Returns:
        One row a layer: `n` (tokens), `documents`, `explained` (eta squared: the variance between kinds as a share of
        all variance, 0 where increments do not vary) with `low` to `high`, where it lies in 95% of 1,000 resamples of
        documents (NaN for one), `shuffled` (the same with kinds shuffled within each document); then the kinds that
        stand farthest from and nearest to the token before them, relative to the mean of the layer: `farthest`,
        `farthest_relative`, `farthest_low`, `farthest_high`, and likewise `nearest`. Kinds found in fewer than two
        documents do not count.

    Raises:
        PositionsError: as `increments_by_category`.

    >>> table = lp.analysis.specialisation(model, texts)
    >>> table[["layer", "explained", "shuffled", "farthest", "nearest"]].head(1).round(1)
       layer  explained  shuffled     farthest nearest
    0      0        0.9       0.0  punctuation  letter
    """
    corpus = read_corpus(model, texts, attention_mask, prepend_bos)
    table = increments_by_category(model, corpus, seed=seed, alphabet=alphabet)
    names, kind = np.unique(corpus_kinds(model, corpus, alphabet), return_inverse=True)

    # Within documents, so that what is left is what documents differ in by themselves.
    shuffled = kind[shuffle_within(corpus.document, seed)]
    documents = len(corpus.documents)
    draws = resamples(documents, seed) if documents > 1 else np.empty((0, 1), dtype=np.int64)
    whole = np.ones((1, documents), dtype=np.int64)
    rows = []
    for layer, values in zip(corpus.layers, corpus.increments.mean(axis=1), strict=True):
        # The first draw takes each document once: the estimate, and behind it the resamples.
        drawn = _eta_squared(values, kind, len(names), corpus.document, np.concatenate([whole, draws]))
        low, high = interval_of(drawn[1:, None]) if documents > 1 else np.full((2, 1), np.nan)
        row = {"layer": layer, "n": len(values), "documents": documents, "explained": drawn[0]}
        row |= {"low": low[0], "high": high[0]}
        row["shuffled"] = _eta_squared(values, shuffled, len(names), corpus.document, whole)[0]

        # A kind without an interval is of one document alone.
        rows.append(row | _ends(table[(table["layer"] == layer) & (table["low"].notna() | (documents == 1))]))
    return pd.DataFrame(rows)


def _ends(of_layer: pd.DataFrame) -> dict[str, Any]:
    """The kinds that stand farthest from and nearest to the token before them, with what their means are."""
    ranked = of_layer.sort_values("mean")
    row: dict[str, Any] = {}
    for end, found in (("farthest", ranked.iloc[-1]), ("nearest", ranked.iloc[0])):
        row |= {end: found["kind"]} | {
            f"{end}_{column.removeprefix('relative_')}": found[column]
            for column in ("relative", "relative_low", "relative_high")
        }
    return row


def _eta_squared(
    values: Float64[np.ndarray, " token"],
    kind: Int64[np.ndarray, " token"],
    n_kinds: int,
    owners: Int64[np.ndarray, " token"],
    draws: Int64[np.ndarray, "draw document"],
) -> Float64[np.ndarray, " draw"]:
    """Eta squared in each resample of documents, from sums of each document and kind."""
    values = values - values.mean()  # the sums of squares below are then of the size of the variance

    # A number for each document and kind: sums of these cells are all that a resample needs.
    cell = owners * n_kinds + kind
    shape = (draws.shape[1], n_kinds)
    counts, sums, squares = (
        np.bincount(cell, weights, minlength=shape[0] * n_kinds).reshape(shape)
        for weights in (np.ones(len(values)), values, values**2)
    )
    n, total, square = draws @ counts, draws @ sums, (draws @ squares).sum(1)

    # Sums of squares about the mean: between kinds, and in all.
    mean_square = total.sum(1) ** 2 / n.sum(1)
    between = np.divide(total**2, n, out=np.zeros_like(total), where=n > 0).sum(1) - mean_square
    variation = square - mean_square
    varies = variation > 1e-10 * n.sum(1)  # float32 increments that are all alike
    return np.divide(between, variation, out=np.zeros_like(between), where=varies)
