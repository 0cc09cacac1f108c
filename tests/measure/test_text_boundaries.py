"""What a gap crosses, by the characters on both sides of it."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lens_positions.errors import PositionsError
from lens_positions.measure.text_boundaries import UNKNOWN, character_boundaries, strongest, token_boundaries
from lens_positions.tokenizer import END_OF_DOCUMENT, byte_tokenizer


def cut(text: str, name: str, **how: bool) -> str:
    """The text with a bar at each boundary."""
    crossed = character_boundaries(text, **how)[name]
    return "".join(f"|{c}" if here and i else c for i, (c, here) in enumerate(zip(text, crossed, strict=True)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("word", "Don't| |go|.|.| |x_1|-|3.14"),
        ("sentence", "He left.| |She stayed"),
        ("sentence", 'He said "go."| |Then'),
        ("sentence", "at 3.14 or e.g. this"),
        ("sentence", "one line\nand the next"),
        ("sentence", "a title|\n|\n|Then text"),
        ("line", "one|\n|two|\r|\n|three"),
        ("sentence", "你好。|再见！|好"),
    ],
)
def test_a_boundary_is_where_two_characters_are_not_of_one_unit(name, expected):
    assert cut(expected.replace("|", ""), name) == expected


@pytest.mark.slow
def test_words_of_chinese_are_unknown_unless_jieba_is_asked():
    text = "你好世界 ok"
    assert character_boundaries(text)["word"].tolist() == [1, UNKNOWN, UNKNOWN, UNKNOWN, 1, 1, 0]
    assert cut(text, "word", jieba=True) == "你好|世界| |ok"


def test_bytes_inside_a_character_cross_nothing_and_special_tokens_the_document():
    tokens = [END_OF_DOCUMENT, *"a 中".encode(), END_OF_DOCUMENT]
    crossed = token_boundaries(byte_tokenizer(), "a 中", tokens)
    assert crossed["word"].tolist() == [1, 1, 1, 1, 0, 0, 1]
    assert crossed["document"].tolist() == [1, 1, 0, 0, 0, 0, 1]
    assert crossed["line"].tolist() == [1, 1, 0, 0, 0, 0, 1]  # the document's ends are ends of lines too


def test_tokens_with_their_space_in_front_cross_once():
    backend = Tokenizer(models.WordLevel({"the": 0, " cat": 1, ".": 2}, "."))
    backend.pre_tokenizer = pre_tokenizers.Split(" cat", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert token_boundaries(tokenizer, "the cat.", [0, 1, 2])["word"].tolist() == [1, 1, 1]
    assert token_boundaries(tokenizer, "the cat.", [0, 1, 2])["sentence"].tolist() == [1, 0, 0]


def test_tokens_of_another_text_are_refused():
    with pytest.raises(PositionsError, match="expected a tokenizer that puts special tokens around"):
        token_boundaries(byte_tokenizer(), "abc", [97, 98])


def test_the_strongest_boundary_names_the_gap():
    names = ("word", "sentence", "line", "document")
    rows = [(0, 0, 0, 0), (1, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 1, 1, 1), (0, 0, 0, 0)]
    crossed = {name: np.array([bool(row[i]) for row in rows]) for i, name in enumerate(names)}
    unknown = np.array([False] * 5 + [True])
    expected = ["inside a word", "word", "sentence", "line", "document", "between Chinese characters"]
    assert strongest(crossed, unknown).tolist() == expected
