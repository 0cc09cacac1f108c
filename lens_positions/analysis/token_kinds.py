"""How far apart a model puts tokens of each kind: letters, spaces, Chinese characters, ...

Which kind a token is of is said in `measure/kinds.py`.

A document is the unit of sampling: tokens of one document are not independent, so intervals resample documents.
See `lens_positions.measure.corpus_reader` for which tokens count.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from einops import rearrange, reduce
from jaxtyping import Float64, Int64

from ..config import Alphabet
from ..errors import PositionsError
from ..measure.corpus_reader import CorpusIncrements, Texts, read_corpus
from ..measure.intervals import bootstrap_means, interval_of, resamples
from ..measure.kinds import (  # noqa: F401 - some of these names were of this module in the version before
    BYTE_KINDS,
    CODE_KINDS,
    SUBWORD_KINDS,
    is_chinese_punctuation,
    is_han,
    kind_order,
    kinds,
)
from ..model import HookedPositionTransformer
from ..text import Mask


def corpus_kinds(
    model: HookedPositionTransformer, corpus: CorpusIncrements, alphabet: Alphabet = "prose"
) -> np.ndarray:
    """The kind of each token of a corpus that was read."""
    kinds_of = [kinds(model, document, alphabet) for document in corpus.documents]
    return np.array([kinds_of[number][place] for number, place in zip(corpus.document, corpus.index, strict=True)])


def increments_by_category(
    model: HookedPositionTransformer,
    texts: Texts | CorpusIncrements,
    heads: Literal["mean", "all"] = "mean",
    seed: int = 0,
    alphabet: Alphabet = "prose",
    only: Sequence[str] | None = None,
    *,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """Increments by layer and kind of token.

    Args:
        model: the model.
        texts: documents, as text or as tokens (a tensor, its rows, or a list of tensors). A byte model's texts are
            closed with the end-of-document token, as in training; tokens are used as they are. Or what `read_corpus`
            made of them.
        heads: with increments per head, "mean" averages the heads of a token first, "all" gives each head its rows.
        seed: of the bootstrap.
        alphabet: the kinds, "prose", or "code" for the kinds of program text.
        only: the kinds that are asked for, each of which must occur; None is all that do.
        attention_mask, prepend_bos: as for `analysis.read_corpus`.

    Returns:
        One row for each layer (and head, where all are asked for) and kind that occurs: `layer`, `head`, `kind`,
        `n` (tokens), and in steps of standard RoPE `mean`, `std` (of these very tokens), `min`, `max`, and `low` to
        `high`, where the mean lies in 95% of 1,000 bootstrap resamples of whole documents; `relative`, the mean
        divided by that of all tokens of the layer, and its interval (NaN where that may be zero or less).
        Intervals are NaN for a kind found in fewer than two documents.

    Raises:
        PositionsError: no documents, one of fewer than two tokens, a kind asked for of which there is no token, or
            all heads of a model that has one for all.

    >>> table = lp.analysis.increments_by_category(model, texts)
    >>> table.loc[table["layer"] == 0, ["kind", "n", "mean"]].round(1)
                  kind    n  mean
    0           letter  390   1.2
    1          capital    8   2.0
    2            space  112   2.1
    3      punctuation    5   4.2
    4     sentence end    8   3.8
    5  end of document    3   3.8
    """
    _check_heads(model, heads)
    corpus = read_corpus(model, texts, attention_mask, prepend_bos)
    kind = corpus_kinds(model, corpus, alphabet)
    order = kind_order(model, alphabet)
    _check_occurring(only or (), kind, order)

    value = corpus.increments
    if heads == "mean":
        value = reduce(value, "layer head token -> layer 1 token", "mean")
    names = [name for name in (order if only is None else dict.fromkeys(only)) if name in kind]
    table = _kind_table(corpus, value, kind, names, seed)
    return table if heads == "all" else table.drop(columns="head")


def _check_heads(model: HookedPositionTransformer, heads: str) -> None:
    """Refuse another word, and heads of their own where the model has one increment for all."""
    if heads not in ("mean", "all"):
        raise PositionsError(f'heads is {heads!r}; expected "mean" or "all".')
    if heads == "all" and not model.position_config.per_head:
        raise PositionsError('heads is "all"; expected "mean", as the increments of this model are not per head.')


def _check_occurring(only: Sequence[str], kind: np.ndarray, order: Sequence[str]) -> None:
    """Refuse a kind that was asked for and does not occur: a row that is missing looks like a kind of no interest."""
    for asked in only:
        if asked not in kind:
            occurring = ", ".join(name for name in order if name in kind)
            raise PositionsError(f"the texts have no token of the kind {asked!r}; expected some of {occurring}.")


def _kind_table(
    corpus: CorpusIncrements,
    value: Float64[np.ndarray, "layer head token"],
    kind: np.ndarray,
    names: Sequence[str],
    seed: int,
) -> pd.DataFrame:
    """One row for each layer, head and kind, with the intervals of its mean and of its ratio to the layer's."""
    documents = len(corpus.documents)
    draws = resamples(documents, seed)
    overall = bootstrap_means(*document_sums(value, corpus.document, documents), draws)
    # A ratio means nothing where the mean that it is divided by may be zero or less.
    positive = np.nanpercentile(overall, 2.5, axis=0) > 0

    rows: list[dict[str, Any]] = []
    for name in names:
        of_kind = kind == name
        found = value[..., of_kind]
        sums, counts = document_sums(found, corpus.document[of_kind], documents)
        # Numerator and denominator come from the same resamples, so what they share cancels in the ratio.
        means = bootstrap_means(sums, counts, draws)
        # A kind that one document alone has says nothing about documents: it gets no interval.
        several = np.count_nonzero(counts) > 1
        low, high = interval_of(means) if several else (np.full(found.shape[:2], np.nan),) * 2
        relative_low, relative_high = interval_of(means / np.where(positive, overall, 1)) if several else (low, high)
        for layer, head in np.ndindex(found.shape[:2]):
            one, whole = found[layer, head], value[layer, head]
            divisible = positive[layer, head]
            row = {"layer": corpus.layers[layer], "head": head, "kind": name, "n": one.size}
            row |= {"mean": one.mean(), "std": one.std(), "min": one.min(), "max": one.max()}
            row |= {"low": low[layer, head], "high": high[layer, head]}
            row |= {"relative": one.mean() / whole.mean() if divisible else np.nan}
            row |= {"relative_low": relative_low[layer, head] if divisible else np.nan}
            rows.append(row | {"relative_high": relative_high[layer, head] if divisible else np.nan})
    return pd.DataFrame(rows).sort_values(["layer", "head"], kind="stable", ignore_index=True)


def document_sums(
    values: Float64[np.ndarray, "layer head token"], owners: Int64[np.ndarray, " token"], documents: int
) -> tuple[Float64[np.ndarray, "document layer head"], Int64[np.ndarray, " document"]]:
    """Sums and numbers of values by the document that they stand in."""
    sums = np.zeros((documents, *values.shape[:2]))
    # `sums[owners] += values` would count a document once, however often it occurs in `owners`.
    np.add.at(sums, owners, rearrange(values, "layer head token -> token layer head"))
    return sums, np.bincount(owners, minlength=documents)
