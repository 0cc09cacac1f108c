"""What each layer marks, and what sits at the cap."""

import numpy as np
import pytest
import torch

import lens_positions as lp
from lens_positions.analysis.specialisation import below_zero, saturation, specialisation
from lens_positions.analysis.token_kinds import corpus_kinds, increments_by_category
from lens_positions.measure.corpus_reader import read_corpus
from lens_positions.measure.kinds import CODE_KINDS, kinds
from lens_positions.tokenizer import byte_tokenizer

TEXTS = [
    "The cat sat on a mat, twice.",
    "天气很好。 And then?",
    "One more text\nof 2 lines.",
    "Plain words and no more",
]
CODE = "def f(x):\n    return x_1['A'] == 2\n\n\treturn é"


@pytest.fixture
def by_kind(tiny_model):
    """A model whose increment depends on the kind of the token alone."""
    model = tiny_model(source="frozen")
    (table,) = (buffer for name, buffer in model.position_streams.named_buffers() if name.endswith("table"))
    names = [kinds(byte_tokenizer(), torch.tensor([i]))[0] for i in range(257)]
    table.copy_(torch.tensor([1.0 + (sorted(set(names)).index(name)) for name in names]))
    return model


def test_where_the_kind_decides_it_explains_everything(by_kind):
    english = [text for text in TEXTS if text.isascii()]  # a cut Chinese byte alone has no kind of its own
    row = specialisation(by_kind, english).iloc[0]
    assert row["explained"] == pytest.approx(1)
    assert row["low"] == pytest.approx(1)
    assert row["shuffled"] < 0.5


def test_explained_is_the_share_of_variance_between_kinds(tiny_model):
    model = tiny_model(source="per_layer")
    table = specialisation(model, TEXTS)
    corpus = read_corpus(model, TEXTS)
    kind = corpus_kinds(model, corpus)
    for layer, values in enumerate(corpus.increments[:, 0]):
        between = sum(
            (kind == name).sum() * (values[kind == name].mean() - values.mean()) ** 2 for name in np.unique(kind)
        )
        share = between / ((values - values.mean()) ** 2).sum()
        assert table["explained"][layer] == pytest.approx(share)
        assert 0 <= table["low"][layer] <= table["high"][layer] <= 1
    assert list(table["n"]) == [len(kind)] * 2


def test_the_kinds_that_stand_out_are_those_of_the_table(tiny_model):
    model = tiny_model(source="per_layer")
    row = specialisation(model, TEXTS).iloc[1]
    table = increments_by_category(model, TEXTS)
    of_layer = table[(table["layer"] == 1) & table["relative_low"].notna()].set_index("kind")["relative"]
    assert (row["farthest"], row["nearest"]) == (of_layer.idxmax(), of_layer.idxmin())
    assert row["farthest_relative"] == of_layer.max()
    assert row["nearest_relative"] == of_layer.min()


@pytest.mark.slow
def test_signed_increments_are_ranked_by_size_and_have_no_ratio_to_nothing(tiny_model):
    model = tiny_model(source="per_layer", activation="none")
    source = model.position_streams.layers[1].source
    with torch.no_grad():
        source.out.bias.sub_(float(read_corpus(model, TEXTS).increments[1].mean()))  # a mean of about nothing
    row = specialisation(model, TEXTS).iloc[1]
    table = increments_by_category(model, TEXTS)
    of_layer = table[(table["layer"] == 1) & table["low"].notna()].set_index("kind")
    assert row["farthest"] == of_layer["mean"].idxmax()
    assert np.isnan(row["farthest_relative"])
    assert of_layer["relative"].isna().all()
    found = below_zero(model, TEXTS)
    assert found["share"][1] == (read_corpus(model, TEXTS).increments[1] < 0).mean()
    with pytest.raises(lp.PositionsError, match='expected learned increments with activation "none"'):
        below_zero(tiny_model(), TEXTS)


def test_increments_that_are_all_alike_are_explained_by_nothing(tiny_model):
    table = specialisation(tiny_model(source="static"), TEXTS)
    assert (table["explained"] == 0).all()


def test_the_share_at_the_cap_is_counted(tiny_model):
    model = tiny_model(source="per_layer", max_increment=4.0)
    source = model.position_streams.layers[0].source
    with torch.no_grad():
        source.out.weight.zero_()
        source.out.bias.fill_(50)
    table = saturation(model, TEXTS)
    assert table["share"][0] == table["low"][0] == table["high"][0] == 1
    values = read_corpus(model, TEXTS).increments[1]
    assert table["share"][1] == (values >= 0.99 * 4).mean()
    assert table["max"][1] == values.max()
    assert (table["cap"] == 4).all()


@pytest.mark.parametrize("positions", [{"source": "static"}, {"source": "shared", "activation": "softplus"}], ids=str)
def test_increments_without_a_cap_are_refused(tiny_model, positions):
    with pytest.raises(lp.PositionsError, match="which has no cap"):
        saturation(tiny_model(**positions), TEXTS)


def test_program_text_has_kinds_of_its_own():
    found = kinds(byte_tokenizer(), torch.tensor([*CODE.encode(), 256]), "code")
    assert set(found) <= set(CODE_KINDS)
    assert found[:10] == ["letter"] * 3 + ["space", "letter", "bracket", "letter", "bracket", "colon", "newline"]
    assert found[10:14] == ["indentation"] * 4
    of = dict(zip(CODE, found, strict=False))
    assert (of["_"], of["'"], of["="], of["A"], of["1"]) == ("underscore", "quote", "operator", "capital", "digit")
    assert found[CODE.index("\t")] == "indentation"
    assert found[-3:] == ["other", "other", "end of document"]


def test_a_kind_that_does_not_occur_is_refused_and_another_listed_alone(tiny_model):
    model = tiny_model()
    table = increments_by_category(model, TEXTS, only=["digit"])
    assert set(table["kind"]) == {"digit"}
    with pytest.raises(lp.PositionsError, match="no token of the kind 'capital'; expected some of letter"):
        increments_by_category(model, ["none here", "nor here"], only=["letter", "capital"])


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_alphabet_is_refused(tiny_model):
    with pytest.raises(lp.PositionsError, match='expected "prose" or "code"'):
        specialisation(tiny_model(), TEXTS, "verse")
