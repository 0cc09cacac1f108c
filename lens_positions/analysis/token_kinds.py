"""How far apart a model puts tokens of each kind: letters, spaces, Chinese characters, ...

A kind depends on what a token is, never on what a model does with it. Byte models are classified byte by byte, with
the bytes of a Chinese character recognised from the bytes around them; subword models by the text of each token.

A document is the unit of sampling: tokens of one document are not independent, so intervals resample documents.
See `lens_positions.measure.corpus_reader` for which tokens count.
"""

import string
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float64, Int, Int64
from torch import Tensor

from ..config import Alphabet
from ..errors import PositionsError
from ..measure.corpus_reader import CorpusIncrements, Texts, read_corpus
from ..measure.intervals import bootstrap_means, interval_of, resamples
from ..model import HookedPositionTransformer
from ..text import Mask
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

CODE_KINDS = (
    "letter",
    "capital",
    "digit",
    "underscore",
    "space",
    "indentation",
    "newline",
    "bracket",
    "colon",
    "comma",
    "quote",
    "operator",
    "other",
    "end of document",
)
"""Of program text, in models of bytes: "indentation" is the spaces and tabs that a line begins with."""

_HAN = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
_CODE = (
    ("letter", string.ascii_lowercase),
    ("capital", string.ascii_uppercase),
    ("digit", string.digits),
    ("underscore", "_"),
    ("space", " "),
    ("newline", "\r\n"),
    ("bracket", "()[]{}"),
    ("colon", ":"),
    ("comma", ","),
    ("quote", "'\""),
    ("operator", "+-*/%=<>!&|^~@.;"),
)
_CHINESE_PUNCTUATION = ((0x3000, 0x303F), (0xFE30, 0xFE4F), (0xFF00, 0xFF65))


def is_han(character: str) -> bool:
    """Whether a character is a Chinese ideograph."""
    return any(low <= ord(character) <= high for low, high in _HAN)


def is_chinese_punctuation(character: str) -> bool:
    """Whether a character is CJK punctuation or a full-width form, such as 。 or ，."""
    return any(low <= ord(character) <= high for low, high in _CHINESE_PUNCTUATION)


def kinds(model_or_tokenizer: Any, tokens: Int[Tensor, " pos"], alphabet: Alphabet = "prose") -> list[str]:
    """The kind of each token of one document: one of `BYTE_KINDS`, or of `SUBWORD_KINDS` for other tokenizers.

    With the alphabet "code" one of `CODE_KINDS`, for bytes alone.

    "letter" is a-z, "capital" A-Z, "sentence end" one of . ! ?, "space" the space alone (a tab is "other"). The bytes
    of a Chinese character that is cut off are "other". In subword models a "word" begins with a space.

    >>> from lens_positions.tokenizer import byte_tokenizer
    >>> kinds(byte_tokenizer(), torch.tensor(list("A 中".encode())))
    ['capital', 'space', 'Chinese lead byte', 'Chinese continuation byte', 'Chinese continuation byte']

    Raises:
        PositionsError: another alphabet, or "code" for a tokenizer that is not of bytes.
    """
    if alphabet not in ("prose", "code"):
        raise PositionsError(f'alphabet is {alphabet!r}; expected "prose" or "code".')
    tokenizer = getattr(model_or_tokenizer, "tokenizer", model_or_tokenizer)
    ids = tokens.tolist()
    if is_byte_tokenizer(tokenizer):
        return _byte_kinds(ids) if alphabet == "prose" else _code_kinds(ids)
    if alphabet == "code":
        raise PositionsError('alphabet is "code"; expected "prose", as the tokens of this model are not bytes.')
    special = set(tokenizer.all_special_ids)
    kind_of_id = {i: "special" if i in special else _subword_kind(_token_text(tokenizer, i)) for i in set(ids)}
    return [kind_of_id[i] for i in ids]


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
    1          capital    8   2.1
    2            space  112   7.2
    3      punctuation    5   6.2
    4     sentence end    8   6.6
    5  end of document    3   4.9
    """
    if heads not in ("mean", "all"):
        raise PositionsError(f'heads is {heads!r}; expected "mean" or "all".')
    if heads == "all" and not model.position_config.per_head:
        raise PositionsError('heads is "all"; expected "mean", as the increments of this model are not per head.')

    corpus = read_corpus(model, texts, attention_mask, prepend_bos)
    kind = corpus_kinds(model, corpus, alphabet)
    order = kind_order(model, alphabet)
    for asked in only or ():
        if asked not in kind:
            occurring = ", ".join(name for name in order if name in kind)
            raise PositionsError(f"the texts have no token of the kind {asked!r}; expected some of {occurring}.")
    value, documents = corpus.increments, corpus.documents
    if heads == "mean":
        value = value.mean(axis=1, keepdims=True)
    draws = resamples(len(documents), seed)
    sums, counts = document_sums(value, corpus.document, len(documents))
    overall = bootstrap_means(sums, counts, draws)
    positive = np.nanpercentile(overall, 2.5, axis=0) > 0  # no ratio to a mean that may be nothing
    rows = []
    for name in order if only is None else dict.fromkeys(only):
        of_kind = kind == name
        if not of_kind.any():
            continue
        found = value[..., of_kind]
        sums, counts = document_sums(found, corpus.document[of_kind], len(documents))
        means = bootstrap_means(sums, counts, draws)
        several = np.count_nonzero(counts) > 1
        low, high = interval_of(means) if several else (np.full(found.shape[:2], np.nan),) * 2
        relative_low, relative_high = interval_of(means / np.where(positive, overall, 1)) if several else (low, high)
        relative_low, relative_high = (np.where(positive, end, np.nan) for end in (relative_low, relative_high))
        for layer, head in np.ndindex(found.shape[:2]):
            one = found[layer, head]
            rows.append(
                {
                    "layer": corpus.layers[layer],
                    "head": head,
                    "kind": name,
                    "n": one.size,
                    "mean": one.mean(),
                    "std": one.std(),
                    "min": one.min(),
                    "max": one.max(),
                    "low": low[layer, head],
                    "high": high[layer, head],
                    "relative": one.mean() / (value[layer, head].mean() if positive[layer, head] else np.nan),
                    "relative_low": relative_low[layer, head],
                    "relative_high": relative_high[layer, head],
                }
            )
    table = pd.DataFrame(rows).sort_values(["layer", "head"], kind="stable", ignore_index=True)
    return table if heads == "all" else table.drop(columns="head")


def document_sums(
    values: Float64[np.ndarray, "layer head token"], owners: Int64[np.ndarray, " token"], documents: int
) -> tuple[Float64[np.ndarray, "document layer head"], Int64[np.ndarray, " document"]]:
    """Sums and numbers of values by the document that they stand in."""
    sums = np.zeros((documents, *values.shape[:2]))
    np.add.at(sums, owners, values.transpose(2, 0, 1))
    return sums, np.bincount(owners, minlength=documents)


def kind_order(model: HookedPositionTransformer, alphabet: Alphabet = "prose") -> tuple[str, ...]:
    """All kinds that the tokens of a model may have, in the order of tables."""
    if alphabet == "code":
        return CODE_KINDS
    return BYTE_KINDS if is_byte_tokenizer(model.tokenizer) else SUBWORD_KINDS


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


def _code_kinds(ids: list[int]) -> list[str]:
    found: list[str] = []
    for i, byte in enumerate(ids):
        character = chr(byte) if byte < 128 else ""
        starts_line = i == 0 or found[-1] in ("newline", "indentation", "end of document")
        if byte == END_OF_DOCUMENT:
            found.append("end of document")
        elif character and character in " \t" and starts_line:
            found.append("indentation")
        else:
            found.append(next((kind for kind, members in _CODE if character and character in members), "other"))
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
