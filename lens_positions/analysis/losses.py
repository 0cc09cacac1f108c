"""The loss of models on the same documents, per byte of text, so that models with other tokenizers compare.

A document is the unit of sampling: differences are paired by document, and intervals resample documents. The nats are
those of the tokens that a model predicts: all but the first of a document (a byte model predicts its end as well).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from ..errors import PositionsError
from ..former_names import getattr_with_former_names
from ..interventions import Hooks
from ..measure.corpus_reader import (
    TOKENS_A_BATCH,
    CorpusIncrements,
    first_rows,
    read_corpus_and_logits,
    rows_of,
    windows,
)
from ..measure.intervals import bootstrap_means, interval_of, resamples
from ..measure.metrics import token_losses
from ..measure.native_pass import native_blocks
from ..model import HookedPositionTransformer


@dataclass(frozen=True)
class Losses:
    """The loss of a model on some documents.

    Attributes:
        nats: summed over the predicted tokens of each document.
        tokens: how many those are.
        bytes: the length of each document in UTF-8.
    """

    nats: Float64[np.ndarray, " document"]
    tokens: Int64[np.ndarray, " document"]
    bytes: Int64[np.ndarray, " document"]


def losses(model: HookedPositionTransformer, texts: str | Sequence[str], prepend_bos: bool | None = None) -> Losses:
    """The loss of each document.

    Raises:
        PositionsError: no documents, one of fewer than two tokens, or a model without a tokenizer.
    """
    texts = [texts] if isinstance(texts, str) else texts
    if not all(isinstance(text, str) for text in texts):
        raise PositionsError("losses were asked for of something else than text; expected documents as strings.")
    documents, batches = windows(model, texts, None, prepend_bos)
    sums = _Sums(texts)
    with native_blocks(model, first_rows(documents, batches)), torch.no_grad():
        for rows, owners in rows_of(documents, batches, f"loss of {model.name}", quick=2 * TOKENS_A_BATCH):
            sums.add(rows, owners, model(rows))
    return sums.losses


def increments_and_losses(
    model: HookedPositionTransformer, texts: Sequence[str], prepend_bos: bool | None = None
) -> tuple[CorpusIncrements, Losses]:
    """What `read_corpus` and `losses` find, in one pass.

    Raises:
        PositionsError: as `losses`, or a model without position streams.

    >>> from lens_positions.analysis.losses import increments_and_losses, losses
    >>> corpus, found = increments_and_losses(model, texts)
    >>> abs(found.nats - losses(model, texts).nats).max() < 1e-4
    True
    """
    sums = _Sums(texts)
    return read_corpus_and_logits(model, list(texts), sums.add, prepend_bos), sums.losses


class _Sums:
    """The losses of some documents, while they are read."""

    def __init__(self, texts: Sequence[str]) -> None:
        sizes = np.array([len(text.encode()) for text in texts])
        self.losses = Losses(np.zeros(len(texts)), np.zeros(len(texts), dtype=np.int64), sizes)

    def add(self, rows: Int[Tensor, "batch pos"], owners: list[int], logits: Float[Tensor, "batch pos vocab"]) -> None:
        """Add some windows, each of a document."""
        of_tokens = token_losses(logits, rows[:, 1:]).double().cpu()

        # Unbuffered, as a document may have several windows in a batch.
        np.add.at(self.losses.nats, owners, of_tokens.sum(1).numpy())
        np.add.at(self.losses.tokens, owners, of_tokens.shape[1])


def compare_losses(
    models: Sequence[HookedPositionTransformer],
    texts: str | Sequence[str],
    seed: int = 0,
    *,
    hooks: Hooks | None = None,
    prepend_bos: bool | None = None,
    unedited: Sequence[Losses] | None = None,
) -> pd.DataFrame:
    """The loss of each model in nats per byte, and its difference to the first one's.

    Args:
        models: one or more.
        texts: documents, as text, since bytes are counted.
        seed: of the resampling.
        hooks: edits, with which the first model is measured again, as the model "..., edited".
        prepend_bos: as for `analysis.read_corpus`.
        unedited: the losses of the models on these documents without edits, where they are known.

    Returns:
        A row for each model: `model`, `documents`, `bytes`, `tokens` (predicted), `loss` (nats per byte) with its
        interval `low` to `high`, and, where there are several, `difference` to the first with `difference_low` to
        `difference_high`, NaN for the first itself. Intervals are where 95% of 1,000 resamples of whole documents lie,
        NaN for one document.

    Raises:
        PositionsError: as `losses`.

    >>> table = lp.analysis.compare_losses([model, model], texts)  # a model with itself
    >>> table["difference"].tolist()
    [nan, 0.0]
    """
    texts = [texts] if isinstance(texts, str) else texts
    names = [model.name for model in models]
    found = [losses(model, texts, prepend_bos) for model in models] if unedited is None else list(unedited)
    if hooks:
        with models[0].hooks(fwd_hooks=hooks):
            found.insert(1, losses(models[0], texts, prepend_bos))
        names.insert(1, f"{names[0]}, edited")
    draws = resamples(len(texts), seed)

    def mean_of(nats: Float64[np.ndarray, " document"], name: str) -> dict[str, float]:
        # Bytes of the text itself, which models with different tokenizers have in common.
        size = found[0].bytes
        low, high = interval_of(bootstrap_means(nats[:, None], size, draws)) if len(texts) > 1 else ([np.nan], [np.nan])
        columns = (name, f"{name}_low", f"{name}_high") if name == "difference" else (name, "low", "high")
        return dict(zip(columns, (nats.sum() / size.sum(), float(low[0]), float(high[0])), strict=True))

    rows = []
    for name, of_model in zip(names, found, strict=True):
        counts = {"documents": len(texts), "bytes": int(of_model.bytes.sum()), "tokens": int(of_model.tokens.sum())}
        rows.append({"model": name, **counts, **mean_of(of_model.nats, "loss")})
        if of_model is not found[0]:
            # Paired by document: what makes a document hard for both cancels.
            rows[-1] |= mean_of(of_model.nats - found[0].nats, "difference")
    return pd.DataFrame(rows)


__getattr__ = getattr_with_former_names(__name__)
