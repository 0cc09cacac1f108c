"""Two-word names against their reverse, and ordinary pairs matched to them by counts."""

import numpy as np
import pytest
from scipy import stats

import lens_positions as lp
from lens_positions.analysis.two_word_names import CARRIERS, NAMES, entity_grouping, frequent_names, matched_pairs

TRAINING = [
    "New York has public debt. New York has public debt. " * 3,
    "Rio Grande, annual report, Rio Grande, annual report, the foreign policy, annual message " * 2,
    "great mass of the young men; United States, United States, United States and great mass",
]
SOME = ("New York", "Rio Grande", "United States")


def test_ordinary_pairs_are_as_frequent_in_both_orders():
    table = matched_pairs(TRAINING, SOME).set_index("name")
    assert table.loc["New York", "ordinary"] == "public debt"
    assert list(table.loc["New York"].iloc[1:]) == [6, 0, 6, 0]
    assert table["ordinary"].is_unique
    both = table[["name_real", "ordinary_real"]].to_numpy() + 1
    assert (both.max(1) / both.min(1) <= 1.5).all()


def test_frequent_names_are_families_of_their_own():
    training = ["We saw New York, New York and New Jersey.", "Then in New York the Rio Grande. Old Rio was old, old."]
    assert frequent_names(training) == ["New York", "Rio Grande"]  # not New Jersey, which shares a word; not old Rio
    assert frequent_names(training, most=1) == ["New York"]
    assert frequent_names(["nothing of the kind"]) == []


def test_distinct_pairs_share_no_word():
    training = ["public debt, public law, New York, Rio Grande, private law"]
    names = ["New York", "Rio Grande"]
    shared = matched_pairs(training, names)["ordinary"]
    assert len(shared) == 2
    found = matched_pairs(training, names, distinct=True)
    words = [word for pair in found["ordinary"] for word in pair.split()]
    assert len(words) == len(set(words)) == 4
    assert list(found["name"]) == names


def test_a_name_without_a_pair_as_frequent_is_left_out():
    table = matched_pairs([*TRAINING, "Vera Cruz " * 100], [*SOME, "Vera Cruz"])
    assert "Vera Cruz" not in set(table["name"])


@pytest.mark.slow
@pytest.mark.parametrize("positions", [{}, {"gap": "after"}, {"per_head": True}], ids=str)
def test_the_increments_are_those_at_the_inner_space(tiny_model, positions):
    model = tiny_model(source="per_layer", **positions)
    table = entity_grouping(model, TRAINING, SOME)
    assert list(table["group"].unique()) == ["names", "ordinary pairs", "names - ordinary pairs"]
    by_hand = []
    for name in SOME:
        first, second = name.split()
        of_orders = []
        for a, b in ((first, second), (second, first)):
            found = []
            for carrier in CARRIERS:
                text = carrier.format(f"{a} {b}")
                _, cache = model.run_with_cache(text)
                increments = cache["increments", 1, "attn"][0].double()
                at = 1 + len(text[: text.index(f"{a} {b}") + len(a)].encode())
                found.append(float(increments[at].mean()))
            of_orders.append(np.mean(found))
        by_hand.append(of_orders[0] - of_orders[1])
    (row,) = table[(table["layer"] == 1) & (table["group"] == "names")].iloc
    assert row["n"] == 3
    assert row["difference"] == pytest.approx(np.mean(by_hand), abs=1e-5)
    assert row["p"] == pytest.approx(stats.wilcoxon(by_hand).pvalue)
    assert row["smaller"] == np.mean(np.array(by_hand) < 0)


@pytest.mark.slow
def test_names_that_share_a_word_are_one_family(tiny_model):
    """Before its second word a name is its first word alone, so such names have the same increments."""
    training = [*TRAINING, "New Jersey and old debts, old debts and New Jersey. " * 3]
    names = ["New York", "New Jersey", "Rio Grande", "United States"]
    table = entity_grouping(tiny_model(source="per_layer"), training, names).set_index(["group", "layer"])
    row = table.loc[("names", 1)]
    assert (row["n"], row["families"]) == (4, 3)
    each = [
        entity_grouping(tiny_model(source="per_layer"), training, pair).set_index(["group", "layer"]).loc[("names", 1)]
        for pair in (["New York", "New Jersey", "Rio Grande"], ["Rio Grande", "United States"])
    ]
    # two families in each: f(New), f(Rio) and f(Rio), f(United)
    alone = entity_grouping(tiny_model(source="per_layer"), training, ["United States", "New York", "New Jersey"])
    third = alone.set_index(["group", "layer"]).loc[("names", 1)]
    total = sum(one["difference"] for one in (*each, third))
    assert row["difference"] == pytest.approx(total / 3, abs=1e-6)


def test_a_name_that_the_text_does_not_have_is_not_matched():
    assert list(matched_pairs(TRAINING, [*SOME, "Not There"])["name"]) == list(matched_pairs(TRAINING, SOME)["name"])


@pytest.mark.slow
def test_where_the_token_alone_decides_nothing_differs(tiny_model):
    """The inner space is the same byte in both orders."""
    table = entity_grouping(tiny_model(source="shared"), TRAINING, SOME)
    assert (table["difference"] == 0).all()
    assert (table["p"] == 1).all()


def test_names_are_compared_with_their_own_pairs(tiny_model):
    table = entity_grouping(tiny_model(source="per_layer"), TRAINING, SOME)
    of = table[table["layer"] == 1].set_index("group")["difference"]
    assert of["names - ordinary pairs"] == pytest.approx(of["names"] - of["ordinary pairs"])


def test_the_names_are_of_two_words_and_different():
    assert len(set(NAMES)) == len(NAMES) >= 90
    assert all(len(name.split()) == 2 for name in NAMES)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"names": ["York", "New York"]}, "'York' is not two words"),
        ({"names": ["New York"]}, "1 names"),
        ({"carriers": ["no place"]}, "no place for a name"),
        ({"training": ["nothing of the sort"]}, "0 of 3 names have an ordinary pair"),
    ],
)
def test_what_has_no_answer_is_refused(tiny_model, options, sentence):
    with pytest.raises(lp.PositionsError, match=sentence):
        entity_grouping(tiny_model(), **{"training": TRAINING, "names": SOME} | options)
