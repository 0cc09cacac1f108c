"""Bytes as tokens, readable labels for them, and which tokens cover which character.

The byte tokenizer has no vocabulary to learn: the id of a token is the value of a byte, and one symbol more
ends a document. It is an ordinary `transformers` tokenizer, so TransformerLens treats it like any other.
"""

from collections.abc import Sequence
from operator import index

import numpy as np
from jaxtyping import Integer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .config import END_OF_DOCUMENT
from .errors import PositionsError

END_OF_DOCUMENT_TEXT = "<|endofdocument|>"

_BYTE_OF_CHARACTER = {character: byte for byte, character in bytes_to_unicode().items()}
_VOCABULARY = {**_BYTE_OF_CHARACTER, END_OF_DOCUMENT_TEXT: END_OF_DOCUMENT}
_SUBSCRIPTS = "₁₂₃₄"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 257 symbols: the 256 byte values, each its own id, and an end-of-document symbol.

    It puts the end-of-document symbol in front of every text, where it serves as the beginning-of-sequence
    token, and pads with it. It is lossless: nothing is normalised, and the literal text of the special token
    is read as the bytes it is written in. `save_pretrained` writes a plain `transformers` folder.

    >>> byte_tokenizer().encode("é")
    [256, 195, 169]
    """
    backend = Tokenizer(models.BPE(vocab=_VOCABULARY, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_DOCUMENT_TEXT,
        eos_token=END_OF_DOCUMENT_TEXT,
        pad_token=END_OF_DOCUMENT_TEXT,
        # TransformerLens asks for both: it reloads a tokenizer that does not state add_bos_token by its name.
        add_bos_token=True,
        name_or_path="",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether the ids of `tokenizer` are byte values and 256 the end of a document, built here or loaded.

    Raises:
        PositionsError: there is none.
    """
    if tokenizer is None:
        raise PositionsError("the model has no tokenizer; expected one (from_pretrained(..., tokenizer=...)).")
    return len(tokenizer) == len(_VOCABULARY) and tokenizer.get_vocab() == _VOCABULARY


def byte_labels(
    tokens: Sequence[int] | Integer[Tensor, " pos"] | Integer[np.ndarray, " pos"],
) -> list[str]:
    """A readable label for each byte token, given its neighbours.

    An ASCII character is its own label. The bytes of a longer UTF-8 character are that character with a
    subscript, a byte that belongs to no valid character is its hexadecimal value, and the end of a document
    is the text of its token. Raises PositionsError for an id outside 0 to 256.

    >>> byte_labels([97, 228, 184, 173, 228, 256])
    ['a', '中₁', '中₂', '中₃', '\\\\xe4', '<|endofdocument|>']
    """
    try:
        ids = [index(token) for token in tokens]
    except TypeError as error:
        raise PositionsError(f"tokens are no row of integers ({error}): expected one id from 0 to 256 each") from error
    for position, token in enumerate(ids):
        if not 0 <= token <= END_OF_DOCUMENT:
            raise PositionsError(f"token {token} at position {position} is no byte token: expected an id from 0 to 256")
    labels: list[str] = []
    for character, size in byte_characters(ids):
        labels += [character] if size == 1 else [character + subscript for subscript in _SUBSCRIPTS[:size]]
    return labels


def byte_characters(ids: Sequence[int]) -> list[tuple[str, int]]:
    """The characters that byte tokens spell, and how many bytes each takes.

    A byte that belongs to no valid character is one by itself, written as its hexadecimal value, and so is the end of a
    document, by the text of its token.

    >>> byte_characters([228, 184, 173, 228, 256])
    [('中', 3), ('\\\\xe4', 1), ('<|endofdocument|>', 1)]
    """
    characters: list[tuple[str, int]] = []
    start = 0
    while start < len(ids):
        character = _character_at(ids, start)
        if ids[start] == END_OF_DOCUMENT:
            characters.append((END_OF_DOCUMENT_TEXT, 1))
        else:
            characters.append((character, len(character.encode())) if character else (f"\\x{ids[start]:02x}", 1))
        start += characters[-1][1]
    return characters


def _character_at(ids: Sequence[int], start: int) -> str:
    """The UTF-8 character whose first byte is at `start`, or an empty string where none begins."""
    for length in range(1, 5):
        candidate = list(ids[start : start + length])
        if END_OF_DOCUMENT in candidate:
            break
        try:
            return bytes(candidate).decode("utf-8")
        except UnicodeDecodeError:
            continue
    return ""


def character_spans(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    """For each character of `text`, the half-open range of the tokens that hold it, without special tokens.

    Several characters may share a token and one character may take several. Wherever the tokens spell the
    bytes of `text` exactly, as those of the byte tokenizer and of byte-level BPE do, the ranges are exact to
    the byte; elsewhere they follow the tokenizer's offsets. A space that the offsets leave out belongs to the
    token after it, any other such character (an accent that normalisation composed) to the token before it;
    the range is empty where there is no such token. Raises PositionsError for a tokenizer without offsets and
    for lone surrogates.

    >>> character_spans(byte_tokenizer(), "a中")
    [(0, 1), (1, 4)]
    """
    if not tokenizer.is_fast:
        raise PositionsError(
            f"{type(tokenizer).__name__} gives no character offsets: expected a fast (Rust-backed) tokenizer"
        )
    try:
        text_bytes = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PositionsError(
            f"character {error.start} of the text is the lone surrogate {text[error.start]!a}: "
            "expected text that can be written as UTF-8"
        ) from error
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)

    # Bytes are exact where tokens spell them; offsets count characters, and a tokenizer may normalise those.
    pieces = _token_bytes(tokenizer, encoding["input_ids"])
    if b"".join(pieces) == text_bytes:
        return _spans_from_bytes(pieces, text)
    return _spans_from_offsets(encoding["offset_mapping"], text)


def _token_bytes(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[bytes]:
    """The bytes of each token in the alphabet of byte-level BPE; none for a token written in any other."""
    # Added tokens are written as they are, and not in the byte alphabet.
    added = {token_id: token.content.encode() for token_id, token in tokenizer.added_tokens_decoder.items()}
    pieces = []
    for token_id, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        spelled = all(character in _BYTE_OF_CHARACTER for character in token)
        in_bytes = bytes(_BYTE_OF_CHARACTER[character] for character in token) if spelled else b""
        pieces.append(added.get(token_id, in_bytes))
    return pieces


def _spans_from_bytes(pieces: list[bytes], text: str) -> list[tuple[int, int]]:
    # The number of the token that each byte is in.
    token_of_byte = [number for number, piece in enumerate(pieces) for _ in piece]
    spans, start = [], 0
    for character in text:
        end = start + len(character.encode())
        spans.append((token_of_byte[start], token_of_byte[end - 1] + 1))
        start = end
    return spans


def _spans_from_offsets(offsets: list[tuple[int, int]], text: str) -> list[tuple[int, int]]:
    spans: list[tuple[int, int] | None] = [None] * len(text)
    for number, (start, end) in enumerate(offsets):
        for position in range(start, end):
            # Several tokens may share a character: its range grows from the first of them to this one.
            earlier = spans[position]
            spans[position] = (earlier[0] if earlier else number, number + 1)
    filled: list[tuple[int, int]] = []
    passed = 0  # tokens that end at or before the current character
    for position, span in enumerate(spans):
        while passed < len(offsets) and offsets[passed][1] <= position:
            passed += 1
        if span is None and text[position].isspace():
            span = (passed, min(passed + 1, len(offsets)))
        filled.append(span or (filled[-1] if filled else (0, 0)))
    return filled
