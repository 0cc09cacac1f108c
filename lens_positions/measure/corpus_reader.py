"""A corpus read through a model: the increment of each of its tokens, and where that token stands.

- A document longer than a window is read in windows that overlap by one token. The one increment of a window that
  no rotation depends on (the first with gap "before", the last with gap "after") is left out, so that every other
  token of a document is counted exactly once.
- An increment of a token early in a window was computed from less context than one later on. Layer 0 does not care.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from ..core.own_thread import own_hooks
from ..errors import PositionsError
from ..former_names import getattr_with_former_names
from ..interventions import HOOK, hook_names
from ..model import HookedPositionTransformer
from ..progress import track_progress
from ..text import Mask, TextOrTokens, prompts_of
from ..tokenizer import END_OF_DOCUMENT, is_byte_tokenizer
from .native_pass import native_blocks

WINDOW = 512
"""Tokens of a window at most, where the model's context is longer: attention costs their square."""

TOKENS_A_BATCH = 2048

Texts = TextOrTokens
"""Documents: texts, the rows of a tensor of tokens, or a list of the tokens of each."""


@dataclass(frozen=True)
class CorpusIncrements:
    """What a model makes of documents.

    Attributes:
        documents: the tokens of each document.
        document: for each token measured, the document that it stands in.
        index: its place in that document.
        layers: the model's own number of each layer measured.
        increments: in positions; one head where the source has one for all.
    """

    documents: list[Int[Tensor, " _pos"]]
    document: Int64[np.ndarray, " token"]
    index: Int64[np.ndarray, " token"]
    layers: list[int]
    increments: Float64[np.ndarray, "layer head token"]

    def ids(self) -> Int64[np.ndarray, " token"]:
        """The id of each token measured."""
        # Where each document begins among all tokens.
        starts = np.cumsum([0, *map(len, self.documents)])
        return torch.cat(self.documents).cpu().numpy()[starts[self.document] + self.index]

    def at(
        self, document: Int64[np.ndarray, " asked"], index: Int64[np.ndarray, " asked"]
    ) -> Float64[np.ndarray, "layer head asked"]:
        """The increments of certain tokens, by document and index."""
        # One number for document and index together, as a search needs one key.
        longest = max(map(len, self.documents))
        keys = self.document * longest + self.index
        order = np.argsort(keys)
        return self.increments[..., order[np.searchsorted(keys, document * longest + index, sorter=order)]]


def read_corpus(
    model: HookedPositionTransformer,
    texts: "Texts | CorpusIncrements",
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> CorpusIncrements:
    """Read documents: the increment of every token, at every layer and head. What was read before is returned as it is.

    Args:
        model: the model.
        texts: documents, as text or as tokens (a tensor, its rows, or a list of tensors). A byte model's texts are
            closed with the end-of-document token, as in training; tokens are used as they are.
        attention_mask: the real tokens of a padded tensor.
        prepend_bos: whether texts get the beginning-of-sequence token; None is TransformerLens' default.

    Raises:
        PositionsError: no documents, one of fewer than two tokens, padding without a mask, or a model without a
            tokenizer.

    >>> corpus = lp.analysis.read_corpus(model, texts)  # once, for several measurements
    >>> corpus.increments.shape  # layer, head, token
    (6, 1, 526)
    >>> lp.analysis.saturation(model, corpus)["max"].round(1).tolist()  # the largest increment of each layer
    [4.2, 1.9, 2.3, 5.0, 3.4, 4.6]
    """
    if isinstance(texts, CorpusIncrements):
        if attention_mask is not None or prepend_bos is not None:
            raise PositionsError(
                "attention_mask or prepend_bos was given with a corpus that was read; expected them where it is read: "
                "its tokens are what they are."
            )
        return texts
    documents, batches = windows(model, texts, attention_mask, prepend_bos)
    values = []
    for rows, _ in rows_of(documents, batches, "reading", quick=2 * TOKENS_A_BATCH):
        # A mask of ones, as windows are of equal length: tokens that look like padding are text here.
        with torch.no_grad():
            values.append(model.increments(rows, torch.ones_like(rows)))
    return _corpus_of(model, documents, batches, values)


def read_corpus_and_logits(
    model: HookedPositionTransformer,
    texts: Texts,
    see: Callable[[Int[Tensor, "batch pos"], list[int], Float[Tensor, "batch pos vocab"]], None],
    prepend_bos: bool | None = None,
) -> CorpusIncrements:
    """Read documents as `read_corpus`, and let a function see the logits of the same passes.

    Args:
        model: the model.
        texts: documents.
        see: is called with the tokens of each batch of windows, the document of each row, and their logits.
        prepend_bos: as for `read_corpus`.

    Raises:
        PositionsError: as `read_corpus`.

    >>> from lens_positions.measure.corpus_reader import read_corpus_and_logits
    >>> seen = []
    >>> corpus = read_corpus_and_logits(model, texts, lambda rows, owners, logits: seen.append(rows.numel()))
    >>> corpus.increments.shape, sum(seen)  # the first increment of a document lies between no two tokens
    ((6, 1, 526), 529)
    """
    documents, batches = windows(model, texts, None, prepend_bos)
    names = [name for _, name in hook_names(model, None, HOOK.format("increments"))]
    values = []
    with native_blocks(model, first_rows(documents, batches)), torch.no_grad():
        for rows, owners in rows_of(documents, batches, "reading", quick=2 * TOKENS_A_BATCH):
            kept: dict[str, Tensor] = {}
            with own_hooks(model, [(name, partial(_keep, kept)) for name in names]):
                logits = model(rows)
            values.append(torch.stack([kept[name] for name in names]))
            see(rows, owners, logits)
    return _corpus_of(model, documents, batches, values)


def _keep(kept: dict[str, Tensor], increments: Tensor, hook: HookPoint) -> None:
    kept[cast(str, hook.name)] = increments


def _corpus_of(
    model: HookedPositionTransformer,
    documents: list[Int[Tensor, " _pos"]],
    batches: list[list[tuple[int, int, int]]],
    increments: list[Tensor],
) -> CorpusIncrements:
    """What was read, from the increments [layer batch pos *head] of each batch of windows."""
    # The one increment of a window that lies between no two of its tokens is left out.
    kept = model.position_config.effective
    values, owners, places = [], [], []
    for batch, found in zip(batches, increments, strict=True):
        values.append(found[:, :, kept].flatten(1, 2).double().cpu().numpy())
        for number, start, stop in batch:
            place = np.arange(start, stop)[kept]
            places.append(place)
            owners.append(np.full(len(place), number))
    value = np.concatenate(values, axis=1)

    # Layers, tokens and, of increments per head, heads; without them one head stands for all.
    value = value.transpose(0, 2, 1) if value.ndim == 3 else value[:, None]
    return CorpusIncrements(documents, np.concatenate(owners), np.concatenate(places), model.position_layers, value)


def windows(
    model: HookedPositionTransformer,
    texts: Texts,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> tuple[list[Int[Tensor, " _pos"]], list[list[tuple[int, int, int]]]]:
    """The tokens of each document, and all their windows (document, start, stop) in batches of equal length.

    Windows of a document overlap by one token, so that each of its tokens but the first is predicted exactly once.

    Raises:
        PositionsError: as `read_corpus`.
    """
    if model.cfg.n_ctx < 2:
        raise PositionsError("the model's context is one token; expected at least two.")
    if getattr(model, "tokenizer", None) is None:
        raise PositionsError("the model has no tokenizer; expected one, to tell what its tokens are.")
    documents = _documents(model, texts, attention_mask, prepend_bos)
    return documents, list(_batches(documents, min(model.cfg.n_ctx, WINDOW)))


def first_rows(
    documents: list[Int[Tensor, " _pos"]], batches: list[list[tuple[int, int, int]]]
) -> Int[Tensor, "1 pos"]:
    """The first window, to try something with."""
    number, start, stop = batches[0][0]
    return documents[number][None, start:stop]


def rows_of(
    documents: list[Int[Tensor, " _pos"]], batches: list[list[tuple[int, int, int]]], what: str, quick: int = 512
) -> Iterator[tuple[Int[Tensor, "batch pos"], list[int]]]:
    """The rows of each batch of windows, and the document that each is of.

    Progress says that `what` is done, where there are as many tokens as `quick` or more.
    """
    for batch in track_progress(batches, what, quick=sum(map(len, documents)) < quick):
        yield (
            torch.stack([documents[number][start:stop] for number, start, stop in batch]),
            [number for number, _, _ in batch],
        )


def _documents(
    model: HookedPositionTransformer, texts: Texts, attention_mask: Mask, prepend_bos: bool | None
) -> list[Int[Tensor, " _pos"]]:
    """Each document as tokens, at least two of them."""
    # `whole`: longer than the context is fine, as windows cut it.
    documents = prompts_of(model, texts, attention_mask, prepend_bos, whole=True)
    if is_byte_tokenizer(model.tokenizer) and not isinstance(texts, Tensor):
        given = [texts] if isinstance(texts, str) else texts

        # As in training, where each document ends with this token and is asked to predict it.
        end = documents[0].new_tensor([END_OF_DOCUMENT])
        documents = [
            torch.cat([tokens, end]) if isinstance(text, str) else tokens
            for text, tokens in zip(given, documents, strict=True)
        ]
    for number, tokens in enumerate(documents):
        if len(tokens) < 2:
            raise PositionsError(f"text {number} has {len(tokens)} tokens; expected at least two.")
    return documents


def _batches(documents: list[Int[Tensor, " _pos"]], length: int) -> Iterator[list[tuple[int, int, int]]]:
    """All windows of the documents (document, start, stop), in batches of equal length, so that none is padded."""
    # Windows as long as the context, and each document's rest: few lengths, most windows of the first.
    by_length: dict[int, list[tuple[int, int, int]]] = {}
    for number, document in enumerate(documents):
        # A step of one less than the length: the last token of a window is the first of the next, which predicts from
        # it.
        for start in range(0, len(document) - 1, length - 1):
            stop = min(start + length, len(document))
            by_length.setdefault(stop - start, []).append((number, start, stop))
    for size, of_size in by_length.items():
        # About as many tokens in each batch, whatever the length of its windows.
        together = max(1, TOKENS_A_BATCH // size)
        for first in range(0, len(of_size), together):
            yield of_size[first : first + together]


__getattr__ = getattr_with_former_names(__name__)
