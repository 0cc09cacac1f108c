"""How a map cuts a corpus: documents into windows, windows into shards.

    tokens of a document   0 1 2 3 4 5 6 7 8 9 ...
    window 0               [---------------]            `window` tokens
    window 1                         [---------------]  begins `window - overlap` later
    gaps of window 0         1 2 3 4 5 6 7              those up to the middle of the overlap
    gaps of window 1                       8 9 ...      those after it

The gap before token t needs token t - 1 as well. Windows overlap, and a gap that two of them hold belongs to the one in
which it stands farther from an end: so every gap of a document has exactly one window, with text on both sides of it.
A shard is a fixed number of windows one after another; which ones depends on the corpus alone.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int8
from torch import Tensor

from ..corpus_stream import Document
from ..measure.kinds import kinds
from ..measure.text_boundaries import token_boundaries
from ..text import prompts_of
from ..tokenizer import END_OF_DOCUMENT, byte_labels, is_byte_tokenizer


@dataclass(eq=False)
class Tokens:
    """A document as tokens, and what its text says of them.

    Attributes:
        number: its place in the corpus, from 0; documents without a gap are counted too.
        document: its text.
        ids: its tokens. Those of a byte model end with the end-of-document token where the text is whole.
        tokenizer: of the model.
        jieba: whether jieba finds the words of Chinese.
    """

    number: int
    document: Document
    ids: Int[Tensor, " pos"]
    tokenizer: Any
    jieba: bool

    @cached_property
    def kinds(self) -> list[str]:
        """The kind of each token."""
        return kinds(self.tokenizer, self.ids)

    @cached_property
    def boundaries(self) -> dict[str, Int8[np.ndarray, " pos"]]:
        """What the gap before each token crosses."""
        return token_boundaries(self.tokenizer, self.document.text, self.ids.tolist(), self.jieba)

    @cached_property
    def labels(self) -> list[str]:
        """Each token as text."""
        ids = self.ids.tolist()
        if is_byte_tokenizer(self.tokenizer):
            return byte_labels(ids)

        # A document repeats its tokens: each id is decoded once.
        text_of = {i: self.tokenizer.decode([i]) for i in set(ids)}
        return [text_of[i] for i in ids]


@dataclass(frozen=True)
class Window:
    """Part of a document that a model reads at once.

    Attributes:
        tokens: of the document.
        number: its place in the document.
        start, stop: its tokens.
        first, end: its own gaps, by the token after each.
    """

    tokens: Tokens = field(repr=False)
    number: int
    start: int
    stop: int
    first: int
    end: int

    @property
    def ids(self) -> Int[Tensor, " _pos"]:
        """Its tokens."""
        return self.tokens.ids[self.start : self.stop]

    @property
    def characters(self) -> float:
        """Its share of the characters of the document."""
        return len(self.tokens.document.text) * (self.end - self.first) / (len(self.tokens.ids) - 1)


def tokens_of(
    model: Any, documents: Iterable[Document], jieba: bool = False, prepend_bos: bool | None = None
) -> Iterator[Tokens]:
    """The tokens of each document.

    Raises:
        PositionsError: a model without a tokenizer.
    """
    byte_model = is_byte_tokenizer(model.tokenizer)
    for number, document in enumerate(documents):
        ids = prompts_of(model, document.text, None, prepend_bos, whole=True)[0].cpu()

        # The gap before the end is a gap as well, but only where the text really ends there.
        if byte_model and document.whole:
            ids = torch.cat([ids, ids.new_tensor([END_OF_DOCUMENT])])
        yield Tokens(number, document, ids, model.tokenizer, jieba)


def windows_of(length: int, window: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """The windows of a document of so many tokens: start, stop, first gap and the end of its gaps.

    >>> windows_of(10, 6, 3)
    [(0, 6, 1, 5), (3, 9, 5, 8), (6, 10, 8, 10)]
    """
    found = []
    start, first = 0, 1
    while first < length:
        stop = min(start + window, length)
        following = start + window - overlap

        # The middle of the overlap, where a gap is as far from the end of this window as from the start of the next.
        end = length if stop == length else following + overlap // 2 + 1
        found.append((start, stop, first, end))
        start, first = following, end
    return found


def shards_of(documents: Iterable[Tokens], window: int, overlap: int, size: int) -> Iterator[list[Window]]:
    """The windows of all documents, so many a shard."""
    shard: list[Window] = []
    for tokens in documents:
        for number, place in enumerate(windows_of(len(tokens.ids), window, overlap)):
            shard.append(Window(tokens, number, *place))
            if len(shard) == size:
                yield shard
                shard = []
    if shard:
        yield shard


def digest(shard: list[Window]) -> str:
    """SHA-256 of which tokens a shard is made of."""
    hashed = hashlib.sha256()

    # Places and ids together: equal tokens that are cut elsewhere make other gaps.
    for one in shard:
        hashed.update(f"{one.tokens.number} {one.start} {one.stop} {one.first} {one.end}\n".encode())
        hashed.update(one.ids.numpy().tobytes())
    return hashed.hexdigest()
