"""What kind a token is, and how far apart a model puts each kind."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

import lens_positions as lp
from lens_positions.analysis.token_kinds import increments_by_category
from lens_positions.measure.kinds import kinds
from lens_positions.tokenizer import END_OF_DOCUMENT, byte_tokenizer

LEAD, REST = "Chinese lead byte", "Chinese continuation byte"


def random_model(seed: int = 0, n_ctx: int = 32, **positions) -> lp.HookedPositionTransformer:
    """A tiny model whose increments differ from token to token."""
    config = lp.PositionModelConfig(
        d_model=16, n_layers=2, n_heads=2, n_ctx=n_ctx, positions=lp.PositionConfig(**positions)
    )
    model = lp.HookedPositionTransformer.from_config(config, seed=seed)
    torch.manual_seed(seed)
    for name, weight in model.position_streams.named_parameters():
        if name.endswith("out.weight"):
            torch.nn.init.normal_(weight)
    return model


def table_model(**positions) -> lp.HookedPositionTransformer:
    """A model whose increment is the token's id: every figure can be checked by hand."""
    model = random_model(source="frozen", **positions)
    tables = [buffer for name, buffer in model.position_streams.named_buffers() if name.endswith("table")]
    for table in tables:
        table.copy_(torch.arange(257.0))
    assert tables
    return model


def of_kind(table: pd.DataFrame, kind: str, layer: int = 0) -> pd.Series:
    (row,) = table[(table["kind"] == kind) & (table["layer"] == layer)].iloc
    return row


def bytes_of(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()))


def test_every_byte_of_a_mixed_text_has_its_kind():
    expected = {
        "a": ["letter"],
        "Z": ["capital"],
        "7": ["digit"],
        " ": ["space"],
        "\n": ["newline"],
        ".": ["sentence end"],
        "?": ["sentence end"],
        ",": ["punctuation"],
        "\t": ["other"],
        "中": [LEAD, REST, REST],
        "𠀀": [LEAD, REST, REST, REST],
        "。": ["Chinese punctuation"] * 3,
        "，": ["Chinese punctuation"] * 3,
        "é": ["other"] * 2,
        "あ": ["other"] * 3,
        "🙂": ["other"] * 4,
    }
    found = kinds(byte_tokenizer(), bytes_of("".join(expected)))
    assert found == [kind for of_character in expected.values() for kind in of_character]


def test_bytes_of_a_cut_character_are_other():
    whole = "中".encode()
    assert kinds(byte_tokenizer(), torch.tensor([*whole[:2], 97])) == ["other", "other", "letter"]
    assert kinds(byte_tokenizer(), torch.tensor([*whole[1:], 97])) == ["other", "other", "letter"]


def test_end_of_document_is_not_the_byte_255():
    assert kinds(byte_tokenizer(), torch.tensor([END_OF_DOCUMENT, 255])) == ["end of document", "other"]


def test_subword_tokens_are_classified_by_their_text():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevel()
    text = "The cat saw London. 12 中, the cat!\n"
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        min_frequency=1,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    found = dict(zip([tokenizer.decode([i]) for i in ids], kinds(tokenizer, torch.tensor(ids)), strict=True))
    assert found == {
        "<s>": "special",
        "The": "word continuation",
        " cat": "word",
        " saw": "word",
        " London": "capitalised word",
        ".": "sentence end",
        " 12": "digit",
        " 中": "Chinese",
        ",": "punctuation",
        " the": "word",
        "!": "sentence end",
        "\n": "newline",
    }


def test_figures_are_those_counted_by_hand():
    row = of_kind(increments_by_category(table_model(), "aab B"), "letter", layer=1)
    assert row["n"] == 3
    assert row["mean"] == pytest.approx((97 + 97 + 98) / 3)
    assert row["std"] == pytest.approx(np.std([97, 97, 98]))
    assert (row["min"], row["max"]) == (97, 98)


def test_the_token_without_effect_is_left_out():
    before = increments_by_category(table_model(gap="before"), torch.tensor([97, 98, 99]))
    after = increments_by_category(table_model(gap="after"), torch.tensor([97, 98, 99]))
    assert (of_kind(before, "letter")["min"], of_kind(before, "letter")["max"]) == (98, 99)
    assert (of_kind(after, "letter")["min"], of_kind(after, "letter")["max"]) == (97, 98)


@pytest.mark.parametrize("gap", ["before", "after"])
@pytest.mark.parametrize("length", [30, 31, 32, 33, 62, 63, 64, 100])
def test_every_token_of_a_long_document_counts_once(gap, length):
    tokens = torch.arange(length) % 26 + 97
    table = increments_by_category(table_model(gap=gap), tokens)
    counted = tokens[1:] if gap == "before" else tokens[:-1]
    assert of_kind(table, "letter")["n"] == length - 1
    assert of_kind(table, "letter")["mean"] == pytest.approx(counted.double().mean().item())


def test_a_character_split_by_two_windows_keeps_its_kind():
    table = increments_by_category(table_model(n_ctx=5), "ab" + "中" * 10)
    assert of_kind(table, LEAD)["n"] == 10
    assert of_kind(table, REST)["n"] == 20


def test_a_text_is_closed_with_the_end_of_document_and_tokens_are_not():
    model = table_model()
    assert of_kind(increments_by_category(model, "abc"), "end of document")["mean"] == END_OF_DOCUMENT
    assert "end of document" not in set(increments_by_category(model, model.to_tokens("abc"))["kind"])


def test_learned_increments_are_measured_where_the_model_has_them():
    model = random_model(source="per_layer")
    text = "The cat 中."
    increments = model.increments(text)[:, 0]
    table = increments_by_category(model, model.to_tokens(text))
    spaces = [1 + i for i, byte in enumerate(text.encode()) if byte == 32]
    for layer in range(2):
        assert of_kind(table, "space", layer)["mean"] == pytest.approx(increments[layer, spaces].mean().item())
    assert increments[0].std() > 0.1


def test_padding_changes_nothing():
    model = random_model(source="per_layer")
    texts = ["a b", "Long 中文 text."]
    rows = [model.to_tokens(text)[0] for text in texts]
    closed = [torch.cat([row, row.new_tensor([END_OF_DOCUMENT])]) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(closed, batch_first=True, padding_value=END_OF_DOCUMENT)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in closed], batch_first=True)
    of_padded = increments_by_category(model, padded, attention_mask=mask)
    pd.testing.assert_frame_equal(of_padded, increments_by_category(model, texts))


def test_the_interval_is_of_documents():
    model = table_model()
    alike = of_kind(increments_by_category(model, ["ab", "ab", "ab"]), "letter")
    assert alike["low"] == alike["high"] == alike["mean"] == 97.5
    table = increments_by_category(model, ["aaaa", "b", "cc", "Z"])
    row = of_kind(table, "letter")
    assert row["min"] <= row["low"] < row["mean"] < row["high"] <= row["max"]
    assert math.isnan(of_kind(table, "capital")["low"])
    pd.testing.assert_frame_equal(table, increments_by_category(model, ["aaaa", "b", "cc", "Z"]))


@pytest.mark.slow
def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    model, rng = table_model(n_ctx=64), np.random.default_rng(0)
    covered = 0
    for seed in range(20):
        documents = ["".join(chr(97 + letter) * 5 for letter in rng.integers(0, 26, size=4)) for _ in range(25)]
        row = of_kind(increments_by_category(model, documents, seed=seed), "letter")
        covered += row["low"] <= 97 + 12.5 <= row["high"]
    assert covered >= 16


def test_all_heads_average_to_their_mean():
    model = random_model(source="per_layer", per_head=True)
    texts = ["The cat.", "A 中 b"]
    mean, every = increments_by_category(model, texts), increments_by_category(model, texts, heads="all")
    assert list(every.columns[:10]) == ["layer", "head", "kind", "n", "mean", "std", "min", "max", "low", "high"]
    assert len(every) == 2 * len(mean)
    assert every["mean"].nunique() > len(mean)
    averaged = every.groupby(["layer", "kind"], sort=False)["mean"].mean().to_numpy()
    np.testing.assert_allclose(averaged, mean["mean"].to_numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([], "no texts were given"),
        ("", "the text is empty"),
        (["a", ""], "text 1 is empty"),
        (torch.tensor([97]), "text 0 has 1 tokens; expected at least two"),
        (torch.full((1, 4), END_OF_DOCUMENT), "row 0 of the tokens begins with 4 of token 256"),
    ],
)
def test_bad_texts_are_refused(texts, said):
    with pytest.raises(lp.PositionsError, match=said):
        increments_by_category(table_model(), texts)


def test_all_heads_are_refused_where_increments_are_not_per_head():
    with pytest.raises(lp.PositionsError, match="not per head"):
        increments_by_category(table_model(), "ab", heads="all")
    with pytest.raises((lp.PositionsError, TypeError), match="heads"):
        increments_by_category(table_model(), "ab", heads="some")


@pytest.mark.parametrize("activation", ["sigmoid", "softplus", "none"])
def test_the_table_is_that_of_the_sources_own_network(activation):
    """A shared source written out: embedding, Linear, GELU, Linear, activation; no hook and no cache."""
    model = random_model(source="shared", activation=activation)
    texts = ["The cat sat, twice.", "天气很好 and 2 more"]
    weights = dict(model.position_streams.named_parameters())
    hidden, out = (
        [
            next(w.detach().double() for n, w in weights.items() if n.endswith(f"{part}.{name}"))
            for name in ("weight", "bias")
        ]
        for part in ("hidden", "out")
    )
    embedding = model.original_model.get_input_embeddings().weight.detach().double()
    rows = [torch.tensor([*text.encode(), END_OF_DOCUMENT]) for text in texts]  # after the one that begins a text
    tokens = torch.cat(rows)
    x = embedding[tokens] @ hidden[0].T + hidden[1]
    x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
    x = (x @ out[0].T + out[1])[:, 0]
    expected = {
        "sigmoid": 10 / (1 + torch.exp(-(x - math.log(9)))),
        "softplus": torch.log1p(torch.exp(x + math.log(math.e - 1))),
        "none": 1 + x,
    }[activation]
    found = increments_by_category(model, texts)
    kind = np.array([name for row in rows for name in kinds(byte_tokenizer(), row)])
    for name in set(kind):
        row = of_kind(found, name, layer=1)
        values = expected[torch.from_numpy(kind == name)].numpy()
        assert row["n"] == len(values)
        assert (row["mean"], row["min"], row["max"]) == pytest.approx(
            (values.mean(), values.min(), values.max()), rel=1e-5
        )
