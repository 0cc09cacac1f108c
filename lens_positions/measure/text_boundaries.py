"""What a gap between two tokens crosses: a boundary of words, of sentences, of lines or of the document.

Each is decided by the characters on both sides of the gap, so that it is the same for tokens of any kind:

    word        the two are not of one word: a word ends, or what stands between words does
    sentence    the two are not of one sentence; what stands between two sentences is of neither
    line        one of them ends a line (a line feed or a carriage return)
    document    one of them is no text: what is put in front of a document, or ends it

A space in front of a word is so between words on both of its sides: "cat| sat" crosses, and "cat |sat" too. A gap in
the middle of a character crosses nothing.

Words are those of Unicode Standard Annex 29 (section 4, as `regex` finds them): "don't" is one, "well-known" two. It
cannot cut Chinese, so that a gap between two Chinese characters crosses nobody knows what (`UNKNOWN`), unless jieba is
asked. A sentence ends at . ! ? or an ellipsis (closing quotes and brackets included) before whitespace that is not
followed by a small letter, at their Chinese forms wherever they stand, and at an empty line; "Mr. Smith" is cut too.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import regex
from jaxtyping import Bool, Int8

from ..corpora import jieba_words
from ..errors import PositionsError
from ..tokenizer import character_spans
from .kinds import is_han

UNKNOWN = -1
"""Of a gap between two Chinese characters, whether it crosses a boundary of words."""

BOUNDARIES = ("word", "sentence", "line", "document")

_WORDS = regex.compile(r"\b", regex.V1 | regex.WORD)
_HAS_WORD = regex.compile(r"\w")
_SENTENCE_END = regex.compile(
    r"(?:[.!?…]+[\"'”’»)\]]*(?=\s+(?!\s|\p{Ll}))|[。！？]+[”’」』）]*|(?=\n[^\S\n]*\n))(?P<between>\s*)"
)


def character_boundaries(text: str, jieba: bool = False) -> dict[str, Int8[np.ndarray, " gap"]]:
    """Which boundaries lie before each character of a text: 1, 0, or `UNKNOWN`; entry 0 is the beginning.

    Args:
        text: of one document.
        jieba: whether jieba finds the words of Chinese.

    >>> [int(i) for i in np.flatnonzero(character_boundaries("Don't go. Stay")["word"])]
    [0, 5, 6, 8, 9, 10]
    """
    word = np.ones(len(text), dtype=np.int8)
    for start, stop in _words(text):
        word[start + 1 : stop] = 0
    _cut_chinese(text, word, jieba)

    sentence = np.zeros(len(text), dtype=np.int8)
    for found in _SENTENCE_END.finditer(text):
        sentence[found.start("between") : found.end("between") + 1] = 1

    ends_line = np.array([character in "\r\n" for character in text], dtype=np.int8)
    line = ends_line | np.concatenate([ends_line[:1] * 0, ends_line[:-1]])
    return {"word": word, "sentence": sentence, "line": line}


def _words(text: str) -> list[tuple[int, int]]:
    """From where to where each word goes."""
    cuts = [0, *(found.start() for found in _WORDS.finditer(text)), len(text)]
    pieces = pairwise(cuts)
    return [(start, stop) for start, stop in pieces if start < stop and _HAS_WORD.search(text, start, stop)]


def _cut_chinese(text: str, word: Int8[np.ndarray, " gap"], jieba: bool) -> None:
    """Replace what is said of the gaps between two Chinese characters."""
    han = np.array([is_han(character) for character in text], dtype=bool)
    between = np.flatnonzero(han[1:] & han[:-1]) + 1
    if not len(between):
        return
    word[between] = UNKNOWN
    if jieba:
        starts = np.zeros(len(text) + 1, dtype=np.int8)
        starts[np.cumsum([len(found) for found in jieba_words([text])[0]])] = 1
        word[between] = starts[between]


def token_boundaries(
    tokenizer: Any, text: str, tokens: list[int], jieba: bool = False
) -> dict[str, Int8[np.ndarray, " pos"]]:
    """Which boundaries the gap before each token of a document crosses: 1, 0, or `UNKNOWN`; entry 0 is no gap.

    Args:
        tokenizer: of the model, with offsets.
        text: of the document.
        tokens: its ids, with whatever stands before and after the text's own.
        jieba: whether jieba finds the words of Chinese.

    Raises:
        PositionsError: the tokens are not those of the text, or the tokenizer has no offsets.
    """
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    in_front = next((k for k in range(len(tokens) - len(own) + 1) if tokens[k : k + len(own)] == own), None)
    if in_front is None:
        raise PositionsError(
            f"the tokens of the text {text!r:.40} are others beside the special ones than without; expected a "
            "tokenizer that puts special tokens around a text and leaves it alone."
        )
    first, last = _ends(character_spans(tokenizer, text), len(own))
    here = first[1:]  # the character that each gap leads to
    inside = last[:-1] >= here

    crossed = {name: np.ones(len(tokens), dtype=np.int8) for name in BOUNDARIES}
    gaps = slice(in_front + 1, in_front + len(own))
    crossed["document"][gaps] = 0
    for name, of_characters in character_boundaries(text, jieba).items():
        crossed[name][gaps] = np.where(inside, 0, of_characters[np.minimum(here, len(text) - 1)])
    return crossed


def _ends(spans: list[tuple[int, int]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last character of each token; one without any has those of its neighbours."""
    first, last = np.full(count, len(spans)), np.full(count, -1)
    for character, (start, stop) in enumerate(spans):
        first[start:stop] = np.minimum(first[start:stop], character)
        last[start:stop] = character
    return np.minimum.accumulate(first[::-1])[::-1], np.maximum.accumulate(last)


def strongest(crossed: dict[str, Bool[np.ndarray, " gap"]], unknown: Bool[np.ndarray, " gap"]) -> np.ndarray:
    """The strongest boundary that each gap crosses, or "inside a word", or "between Chinese characters"."""
    found = np.full(len(unknown), "inside a word", dtype=object)
    found[unknown] = "between Chinese characters"
    for name in BOUNDARIES:
        found[crossed[name]] = name
    return found
