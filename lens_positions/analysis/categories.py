"""How far apart a model puts tokens of each kind: letters, spaces, Chinese characters, ...

A kind depends on what a token is, never on what a model does with it. Byte models are classified byte by byte, with
the bytes of a Chinese character recognised from the bytes around them; subword models by the text of each token.

- A document is the unit of sampling: tokens of one document are not independent, so intervals resample documents.
- A document longer than the context is read in windows that overlap by one token. The one increment of a window that
  no rotation depends on (the first with gap "before", the last with gap "after") is left out, so that every other
  token of a document is counted exactly once.
- An increment of a token early in a window was computed from less context than one later on. Layer 0 does not care.
"""

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from ..errors import PositionsError
from ..hooked import HookedPositionTransformer
from ..tokenizer import END_OF_DOCUMENT, is_byte_tokenizer

BYTE_KINDS = (
    "letter",
    "capital",
    "digit",
    "space",
    "punctuation",
    "sentence end",
    "newline",
    "Chinese lead byte",
    "Chinese continuation byte",
    "Chinese punctuation",
    "other",
    "end of document",
)
SUBWORD_KINDS = (
    "word",
    "capitalised word",
    "word continuation",
    "digit",
    "space",
    "punctuation",
    "sentence end",
    "newline",
    "Chinese",
    "Chinese punctuation",
    "other",
    "special",
)
BOOTSTRAP_DRAWS = 1000
WINDOWS_A_BATCH = 16

_HAN = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
_CHINESE_PUNCTUATION = ((0x3000, 0x303F), (0xFE30, 0xFE4F), (0xFF00, 0xFF65))


def is_han(character: str) -> bool:
    """Whether a character is a Chinese ideograph."""
    return any(low <= ord(character) <= high for low, high in _HAN)


def is_chinese_punctuation(character: str) -> bool:
    """Whether a character is CJK punctuation or a full-width form, such as 。 or ，."""
    return any(low <= ord(character) <= high for low, high in _CHINESE_PUNCTUATION)


def kinds(model_or_tokenizer: Any, tokens: Int[Tensor, " pos"]) -> list[str]:
    """The kind of each token of one document: one of `BYTE_KINDS`, or of `SUBWORD_KINDS` for other tokenizers.

    "letter" is a-z, "capital" A-Z, "sentence end" one of . ! ?, "space" the space alone (a tab is "other"). The bytes
    of a Chinese character that is cut off are "other". In subword models a "word" begins with a space.

    >>> from lens_positions.tokenizer import byte_tokenizer
    >>> kinds(byte_tokenizer(), torch.tensor(list("A 中".encode())))
    ['capital', 'space', 'Chinese lead byte', 'Chinese continuation byte', 'Chinese continuation byte']
    """
    tokenizer = getattr(model_or_tokenizer, "tokenizer", model_or_tokenizer)
    ids = tokens.tolist()
    if is_byte_tokenizer(tokenizer):
        return _byte_kinds(ids)
    special = set(tokenizer.all_special_ids)
    kind_of_id = {i: "special" if i in special else _subword_kind(_token_text(tokenizer, i)) for i in set(ids)}
    return [kind_of_id[i] for i in ids]


def increments_by_category(
    model: HookedPositionTransformer,
    texts: str | Sequence[str] | Int[Tensor, "..."] | Sequence[Int[Tensor, " _pos"]],
    heads: Literal["mean", "all"] = "mean",
    seed: int = 0,
) -> pd.DataFrame:
    """Increments by layer and kind of token.

    Args:
        model: the model.
        texts: documents, as text or as tokens (a tensor, its rows, or a list of tensors). A byte model's texts are
            closed with the end-of-document token, as in training; tokens are used as they are, less padding.
        heads: with increments per head, "mean" averages the heads of a token first, "all" gives each head its rows.
        seed: of the bootstrap.

    Returns:
        One row for each layer (and head, where all are asked for) and kind that occurs: `layer`, `head`, `kind`,
        `n` (tokens), and in steps of standard RoPE `mean`, `std` (of these very tokens), `min`, `max`, and `low` to
        `high`, where the mean lies in 95% of 1,000 bootstrap resamples of whole documents. These two are NaN for a
        kind found in fewer than two documents.

    Raises:
        PositionsError: no documents, one of fewer than two tokens, or all heads of a model that has one for all.
    """
    if heads not in ("mean", "all"):
        raise PositionsError(f'heads is {heads!r}; expected "mean" or "all".')
    if heads == "all" and not model.position_config.per_head:
        raise PositionsError('heads is "all"; expected "mean", as the increments of this model are not per head.')

    documents = _documents(model, texts)
    kept = model.position_config.effective
    values, names, owners = [], [], []
    for batch in _batches(documents, model):
        with torch.no_grad():
            increments = model.increments(torch.stack([window.tokens for window in batch]))
        if increments.ndim == 4 and heads == "mean":
            increments = increments.mean(dim=-1)
        values.append(increments[:, :, kept].flatten(1, 2).double().cpu().numpy())
        for window in batch:
            names += window.kinds[kept]
            owners += [window.document] * len(window.kinds[kept])

    value = np.concatenate(values, axis=1)
    kind, document_of = np.array(names), np.array(owners)
    value = value.transpose(0, 2, 1) if value.ndim == 3 else value[:, None]  # [layer head token]
    chances = np.full(len(documents), 1 / len(documents))
    draws = np.random.default_rng(seed).multinomial(len(documents), chances, size=BOOTSTRAP_DRAWS)
    rows = []
    for name in _kind_order(model):
        of_kind = kind == name
        if not of_kind.any():
            continue
        found, owner_of = value[..., of_kind], document_of[of_kind]
        low, high = _interval_of_mean(found, owner_of, draws)
        for layer, head in np.ndindex(found.shape[:2]):
            one = found[layer, head]
            rows.append(
                {
                    "layer": layer,
                    "head": head,
                    "kind": name,
                    "n": one.size,
                    "mean": one.mean(),
                    "std": one.std(),
                    "min": one.min(),
                    "max": one.max(),
                    "low": low[layer, head],
                    "high": high[layer, head],
                }
            )
    table = pd.DataFrame(rows).sort_values(["layer", "head"], kind="stable", ignore_index=True)
    return table if heads == "all" else table.drop(columns="head")


def _interval_of_mean(values: np.ndarray, owners: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95% bootstrap interval [layer head] of the mean of values [layer head token], by document."""
    counts = np.bincount(owners, minlength=draws.shape[1])
    if np.count_nonzero(counts) < 2:
        return np.full(values.shape[:2], np.nan), np.full(values.shape[:2], np.nan)
    sums = np.zeros((draws.shape[1], *values.shape[:2]))
    np.add.at(sums, owners, values.transpose(2, 0, 1))
    drawn = draws @ counts
    means = np.tensordot(draws, sums, axes=1)[drawn > 0] / drawn[drawn > 0, None, None]
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return low, high


def _kind_order(model: HookedPositionTransformer) -> tuple[str, ...]:
    return BYTE_KINDS if is_byte_tokenizer(model.tokenizer) else SUBWORD_KINDS


def _documents(model: HookedPositionTransformer, texts: Any) -> list[Int[Tensor, " _pos"]]:
    """Each document as tokens, at least two of them."""
    if isinstance(texts, str):
        texts = [texts]
    elif isinstance(texts, Tensor):
        texts = [texts] if texts.ndim == 1 else list(texts)
    if not len(texts):
        raise PositionsError("no texts were given; expected at least one.")
    documents = []
    for number, text in enumerate(texts):
        if isinstance(text, str):
            if not text:
                raise PositionsError(f"text {number} is empty; expected at least one character.")
            tokens = model.to_tokens(text, truncate=False)[0]
            if is_byte_tokenizer(model.tokenizer):
                tokens = torch.cat([tokens, tokens.new_tensor([END_OF_DOCUMENT])])
        elif isinstance(text, Tensor) and text.ndim == 1:
            tokens = _without_padding(text, model.tokenizer)
        else:
            raise PositionsError(f"text {number} is {text!r:.40}; expected a text, or a tensor of tokens [pos].")
        if len(tokens) < 2:
            raise PositionsError(f"text {number} has {len(tokens)} tokens; expected at least two.")
        documents.append(tokens)
    return documents


@dataclass
class _Window:
    """A part of a document, at most as long as the context."""

    document: int
    tokens: Int[Tensor, " _pos"]
    kinds: list[str]


def _batches(documents: list[Int[Tensor, " _pos"]], model: HookedPositionTransformer) -> Iterator[list[_Window]]:
    """All windows of the documents, in batches of equal length, so that none is padded."""
    by_length: dict[int, list[_Window]] = {}
    for number, document in enumerate(documents):
        document_kinds = kinds(model, document)
        for start in range(0, len(document) - 1, model.cfg.n_ctx - 1):
            part = slice(start, start + model.cfg.n_ctx)
            window = _Window(number, document[part], document_kinds[part])
            by_length.setdefault(len(window.tokens), []).append(window)
    for windows in by_length.values():
        for start in range(0, len(windows), WINDOWS_A_BATCH):
            yield windows[start : start + WINDOWS_A_BATCH]


def _without_padding(tokens: Int[Tensor, " _pos"], tokenizer: Any) -> Int[Tensor, " _pos"]:
    """Tokens less the padding at either end; where the padding token is also BOS or EOS, one of them stays."""
    pad = tokenizer.pad_token_id
    content = (tokens != pad).nonzero() if pad is not None else torch.arange(len(tokens))
    if not len(content):
        return tokens[:0]
    margin = 1 if pad in (tokenizer.bos_token_id, tokenizer.eos_token_id) else 0
    return tokens[max(int(content[0]) - margin, 0) : int(content[-1]) + 1 + margin]


def _byte_kinds(ids: list[int]) -> list[str]:
    # Byte 255 is in no valid text, so it can stand for the end-of-document token while the bytes are decoded.
    text = bytes(min(i, 255) for i in ids).decode("utf-8", "surrogateescape")
    found: list[str] = []
    for character in text:
        size = len(character.encode("utf-8", "surrogateescape"))
        if ids[len(found)] == END_OF_DOCUMENT:
            found.append("end of document")
        elif is_han(character):
            found += ["Chinese lead byte"] + ["Chinese continuation byte"] * (size - 1)
        else:
            found += [_character_kind(character)] * size
    return found


def _character_kind(character: str) -> str:
    if is_chinese_punctuation(character):
        return "Chinese punctuation"
    for kind, members in (
        ("letter", string.ascii_lowercase),
        ("capital", string.ascii_uppercase),
        ("digit", string.digits),
        ("space", " "),
        ("newline", "\r\n"),
        ("sentence end", ".!?"),
        ("punctuation", string.punctuation),
    ):
        if character in members:
            return kind
    return "other"


def _token_text(tokenizer: Any, token: int) -> str:
    """The text of one token, with the leading space that some tokenizers drop when they decode."""
    text = tokenizer.decode([token])
    piece = tokenizer.convert_ids_to_tokens(token)
    return " " + text if piece.startswith("▁") and not text.startswith(" ") else text


def _subword_kind(text: str) -> str:
    if "\n" in text or "\r" in text:
        return "newline"
    content = text.strip()
    if not content:
        return "space" if text else "other"
    first = content[0]
    if any(map(is_han, content)):
        return "Chinese"
    if first.isalpha():
        if not text[0].isspace():
            return "word continuation"
        return "capitalised word" if first.isupper() else "word"
    if content.isdigit():
        return "digit"
    if all(character in ".!?" for character in content):
        return "sentence end"
    if all(character in string.punctuation for character in content):
        return "punctuation"
    if all(map(is_chinese_punctuation, content)):
        return "Chinese punctuation"
    return "other"
