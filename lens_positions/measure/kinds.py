"""Of which kind a token is: letters, spaces, Chinese characters, ...

A kind depends on what a token is, never on what a model does with it. Byte models are classified byte by byte, with
the bytes of a Chinese character recognised from the bytes around them; subword models by the text of each token.
"""

import string
from typing import Any

from jaxtyping import Int
from torch import Tensor

from ..config import Alphabet
from ..errors import PositionsError
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

    # The text of a subword does not depend on its neighbours, so each id is looked at once.
    kind_of_id = {i: "special" if i in special else _subword_kind(_token_text(tokenizer, i)) for i in set(ids)}
    return [kind_of_id[i] for i in ids]


def kind_order(model_or_tokenizer: Any, alphabet: Alphabet = "prose") -> tuple[str, ...]:
    """All kinds that the tokens of a model may have, in the order of tables."""
    if alphabet == "code":
        return CODE_KINDS
    tokenizer = getattr(model_or_tokenizer, "tokenizer", model_or_tokenizer)
    return BYTE_KINDS if is_byte_tokenizer(tokenizer) else SUBWORD_KINDS


def _byte_kinds(ids: list[int]) -> list[str]:
    # Byte 255 is in no valid text, so it can stand for the end-of-document token while the bytes are decoded.
    text = bytes(min(i, 255) for i in ids).decode("utf-8", "surrogateescape")
    found: list[str] = []
    for character in text:
        # "surrogateescape" keeps each byte of no valid character as one character, which encodes to that byte again.
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
        # A byte beyond ASCII is part of a character of several bytes: no kind of program text, so "other".
        character = chr(byte) if byte < 128 else ""

        # Spaces after spaces that began a line are indentation as well.
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
        # In this order: sentence ends are punctuation too, and come first.
        if character in members:
            return kind
    return "other"


def _token_text(tokenizer: Any, token: int) -> str:
    """The text of one token, with the leading space that some tokenizers drop when they decode."""
    text = tokenizer.decode([token])

    # SentencePiece marks a space with ▁ and strips it from the first token decoded.
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
        # BPE vocabularies write the space in front of a word as part of its first token.
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
