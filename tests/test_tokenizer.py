"""The byte tokenizer loses nothing, and every character is found in the tokens that hold it."""

import doctest

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import lens_positions.tokenizer
from lens_positions.errors import PositionsError
from lens_positions.tokenizer import (
    END_OF_DOCUMENT,
    END_OF_DOCUMENT_TEXT,
    byte_labels,
    byte_tokenizer,
    character_spans,
    is_byte_tokenizer,
)

BYTES = byte_tokenizer()
AWKWARD = [
    "",
    "a",
    " leading, trailing ",
    "don't , do n't .",
    "line\nline\r\n\ttab\0nul",
    "中文，分词",
    "👩‍👩‍👧‍👦 🏳️‍🌈",
    "مرحبا بالعالم \u200f",
    "e\u0301 é ﬁ Å",
    f"before{END_OF_DOCUMENT_TEXT}after",
    END_OF_DOCUMENT_TEXT,
    "\ufeffbom\u2028separator\U0010ffff",
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def byte_level_bpe(merges, normalizer=None, trim_offsets=True):
    """A byte-level BPE like those of GPT-2 (no normaliser) and GPT-NeoX or Qwen (NFC)."""
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    vocabulary |= {left + right: 256 + number for number, (left, right) in enumerate(merges)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_ids_are_byte_values_behind_one_end_of_document_symbol():
    assert len(BYTES) == 257
    assert BYTES.bos_token_id == BYTES.eos_token_id == BYTES.pad_token_id == END_OF_DOCUMENT == 256
    assert BYTES.encode("a中") == [256, *"a中".encode()]
    assert BYTES.convert_tokens_to_ids(BYTES.convert_ids_to_tokens(list(range(257)))) == list(range(257))


@given(st.text())
def test_every_text_survives_the_round_trip(text):
    ids = BYTES.encode(text)
    assert ids == [END_OF_DOCUMENT, *text.encode()]
    assert BYTES.decode(ids, skip_special_tokens=True) == text
    assert BYTES.decode(ids[1:]) == text


@pytest.mark.parametrize("text", AWKWARD)
def test_a_saved_and_loaded_tokenizer_behaves_the_same(loaded, text):
    assert loaded.encode(text) == BYTES.encode(text) == [END_OF_DOCUMENT, *text.encode()]
    assert loaded.encode(text, add_special_tokens=False) == list(text.encode())
    assert loaded.decode(loaded.encode(text), skip_special_tokens=True) == text
    assert character_spans(loaded, text) == character_spans(BYTES, text)
    pair = [text, "ab"]
    assert loaded(pair, padding=True).data == BYTES(pair, padding=True).data


def test_a_byte_tokenizer_is_known_after_loading_and_others_are_not_taken_for_one(loaded):
    assert is_byte_tokenizer(BYTES)
    assert is_byte_tokenizer(loaded)
    assert not is_byte_tokenizer(byte_level_bpe([("Ġ", "h")]))
    assert not is_byte_tokenizer(ByT5Tokenizer())


@pytest.mark.parametrize("from_disk", [False, True])
def test_a_bridge_prepends_removes_and_pads_with_the_end_of_document_symbol(loaded, from_disk):
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    bridge = build_bridge_from_module(
        LlamaForCausalLM(config).eval(),
        "LlamaForCausalLM",
        hf_config=config,
        tokenizer=loaded if from_disk else byte_tokenizer(),
    )
    assert bridge.cfg.tokenizer_prepends_bos
    assert not bridge.cfg.tokenizer_appends_eos
    texts = ["ab", "中c"]
    long = [228, 184, 173, 99]
    with_bos = {"right": [256, 97, 98, 256, 256], "left": [256, 256, 256, 97, 98]}
    without_bos = {"right": [97, 98, 256, 256], "left": [256, 256, 97, 98]}
    for side in ("right", "left"):
        assert bridge.to_tokens(texts, padding_side=side).tolist() == [with_bos[side], [256, *long]]
        assert bridge.to_tokens(texts, padding_side=side, prepend_bos=False).tolist() == [without_bos[side], long]
    assert bridge.to_tokens(END_OF_DOCUMENT_TEXT)[0].tolist() == [256, *END_OF_DOCUMENT_TEXT.encode()]
    alone = bridge("ab")[0]
    torch.testing.assert_close(bridge(texts, padding_side="left")[0, -3:], alone)
    torch.testing.assert_close(bridge(texts, padding_side="right")[0, :3], alone)


def test_labels_name_characters_numbered_bytes_and_stray_bytes():
    assert byte_labels(BYTES.encode("a中é\n😀")) == [
        *(END_OF_DOCUMENT_TEXT, "a", "中₁", "中₂", "中₃", "é₁", "é₂", "\n"),
        *("😀₁", "😀₂", "😀₃", "😀₄"),
    ]
    assert byte_labels([0xE4, 0xB8, 256, 0xAD]) == ["\\xe4", "\\xb8", END_OF_DOCUMENT_TEXT, "\\xad"]
    assert byte_labels([0xE4, 0xB8, 0x61]) == ["\\xe4", "\\xb8", "a"]
    assert byte_labels([0xED, 0xA0, 0x80]) == ["\\xed", "\\xa0", "\\x80"]
    assert byte_labels(torch.tensor([65, 256])) == ["A", END_OF_DOCUMENT_TEXT]
    assert byte_labels(np.array([65], np.uint16)) == ["A"]
    assert byte_labels([]) == []


@given(st.lists(st.integers(0, 256)))
def test_any_ids_have_one_label_each(ids):
    labels = byte_labels(ids)
    assert len(labels) == len(ids)
    for token, label in zip(ids, labels, strict=True):
        if token < 128:
            assert label == chr(token)
        elif label.startswith("\\x"):
            assert label == f"\\x{token:02x}"
        elif token < 256:
            assert label[0].encode()["₁₂₃₄".index(label[1])] == token


@pytest.mark.parametrize("token", [-1, 257])
def test_an_id_that_is_no_byte_is_refused(token):
    with pytest.raises(PositionsError, match=f"token {token} at position 1 .* 0 to 256"):
        byte_labels([0, token])


@pytest.mark.parametrize("tokens", [[1.5], ["a"], torch.tensor([[1, 2]])])
def test_what_is_no_row_of_integers_is_refused(tokens):
    # the second error is raised first where shapes and types are checked as the tests run
    with pytest.raises((PositionsError, TypeCheckError), match=r"no row of integers|violates type hint"):
        byte_labels(tokens)


@given(st.text())
def test_byte_spans_are_the_lengths_of_the_characters_end_to_end(text):
    spans = character_spans(BYTES, text)
    for character, (start, end) in zip(text, spans, strict=True):
        assert text.encode()[start:end] == character.encode()


@given(st.text(alphabet="a h\n中丬é😀‍"))
def test_byte_level_bpe_spans_hold_every_byte_of_their_character(text):
    merges = [("Ġ", "h"), ("Ġ", "Ġ"), ("ä", "¸"), ("ä¸", "Ń"), ("Ń", "a"), ("ð", "Ł"), ("Ċ", "Ċ")]
    tokenizer = byte_level_bpe(merges)
    of_character = {character: byte for byte, character in bytes_to_unicode().items()}
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))
    pieces = [bytes(of_character[character] for character in token) for token in tokens]
    passed = 0
    for character, (start, end) in zip(text, character_spans(tokenizer, text), strict=True):
        first_byte = sum(map(len, pieces[:start]))
        last_byte = sum(map(len, pieces[: end - 1]))
        passed_after = passed + len(character.encode())
        assert first_byte <= passed < first_byte + len(pieces[start])
        assert last_byte < passed_after <= last_byte + len(pieces[end - 1])
        passed = passed_after


def test_characters_share_a_token_and_a_character_takes_several():
    tokenizer = byte_level_bpe([("Ġ", "h"), ("Ġ", "Ġ"), ("ä", "¸")])
    assert tokenizer.tokenize("a   h中") == ["a", "ĠĠ", "Ġh", "ä¸", "Ń"]
    assert character_spans(tokenizer, "a   h中") == [(0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (3, 5)]


def test_trimmed_spaces_and_composed_accents_go_to_their_neighbour_where_text_is_normalised():
    tokenizer = byte_level_bpe([("Ġ", "h"), ("Ġ", "Ġ")], normalizer=normalizers.NFC())
    text = "a   he\u0301 h"
    assert tokenizer.tokenize(text) == ["a", "ĠĠ", "Ġh", "Ã", "©", "Ġh"]
    spans = [(0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (3, 5), (3, 5), (5, 6), (5, 6)]
    assert character_spans(tokenizer, text) == spans


def test_spans_of_a_sentencepiece_like_tokenizer_follow_its_offsets():
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)} | {"▁": 257, "h": 258, "▁h": 259}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "h")], byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer.tokenize("h中 h") == ["▁h", "<0xE4>", "<0xB8>", "<0xAD>", "▁h"]
    assert character_spans(tokenizer, "h中 h") == [(0, 1), (1, 4), (4, 5), (4, 5)]


def test_text_and_tokenizers_without_spans_are_refused():
    with pytest.raises(PositionsError, match=r"character 1 .* lone surrogate '\\ud800'"):
        character_spans(BYTES, "a\ud800")
    with pytest.raises(PositionsError, match="ByT5Tokenizer gives no character offsets"):
        character_spans(ByT5Tokenizer(), "a")


def test_the_examples_in_the_docstrings_are_true():
    assert doctest.testmod(lens_positions.tokenizer) == (0, 4)
