"""Two-word names: does a model put "New" and "York" nearer to each other than "York" and "New"?

The measure is the increment at the space between the two words, in the order of the name against the reversed one, over
carrier sentences. A name's order is also the commoner one in the training text, so the control is ordinary pairs of
words ("public debt") that occur as often in both orders: what names do beyond them is not a matter of frequency.

In a model of bytes the increment at the space has read the first word alone; in a model of subwords the space belongs
to the second word's token, whose increment has read that word as well.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import product

import numpy as np
import pandas as pd
from einops import reduce
from jaxtyping import Float64
from scipy import stats
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from ..errors import PositionsError
from ..measure.corpus_reader import read_corpus
from ..measure.intervals import t_interval
from ..model import HookedPositionTransformer
from ..text import prompts_of
from ..tokenizer import character_spans

NAMES = tuple(
    name.strip()
    for name in [
        "\n    Abraham Lincoln",
        " Air Force",
        " Argentine Republic",
        " Bering Sea",
        " British Columbia",
        " British Guiana",
        " Buenos Ayres",
        " Camp David",
        "\n    Caribbean Sea",
        " Central America",
        " Chesapeake Bay",
        " Civil War",
        " Colorado River",
        " Columbia River",
        " Costa Rica",
        "\n    Dominican Republic",
        " Eastern Europe",
        " Far East",
        " Federal Reserve",
        " Franklin Roosevelt",
        " George Washington",
        " Great Britain",
        "\n    Great Lakes",
        " Great Plains",
        " Guadalupe Hidalgo",
        " Guantanamo Bay",
        " Hawaiian Islands",
        " Indian Ocean",
        " Indian Territory",
        "\n    Kansas City",
        " La Plata",
        " Lake Erie",
        " Latin America",
        " Los Angeles",
        " Marine Corps",
        " Middle East",
        " Military Academy",
        "\n    Mississippi River",
        " Monroe Doctrine",
        " National Guard",
        " Naval Academy",
        " New Granada",
        " New Hampshire",
        " New Jersey",
        " New Mexico",
        "\n    New Orleans",
        " New York",
        " New Zealand",
        " North Africa",
        " North America",
        " North Atlantic",
        " North Carolina",
        " North Korea",
        "\n    Ohio River",
        " Ottoman Empire",
        " Pacific Ocean",
        " Panama Canal",
        " Peace Corps",
        " Pearl Harbor",
        " Persian Gulf",
        " Philippine Islands",
        "\n    Porto Rico",
        " Puerto Rico",
        " Red Cross",
        " Rhode Island",
        " Rio Grande",
        " Rocky Mountains",
        " Saddam Hussein",
        " San Diego",
        "\n    San Francisco",
        " San Juan",
        " Santa Fe",
        " Santo Domingo",
        " Security Council",
        " South Africa",
        " South America",
        " South Carolina",
        "\n    South Korea",
        " South Vietnam",
        " Southeast Asia",
        " Soviet Union",
        " Supreme Court",
        " Union Pacific",
        " United Kingdom",
        "\n    United Nations",
        " United States",
        " Vera Cruz",
        " Wall Street",
        " West Indies",
        " West Point",
        " West Virginia",
        " Western Europe",
        "\n    White House",
        " World Bank\n    ",
    ]
)
"""Names of two words that the corpus `english` has at least six times."""

CARRIERS = (
    "They spoke about {} for an hour.",
    "The report on {} came late.",
    "We read of {} in the papers.",
    "In his view {} was the reason.",
    "Nobody mentioned {} again that year.",
)

CAPITALS = r"(?<=[a-z,;] )(?=([A-Z][a-z]+) ([A-Z][a-z]+)\b)"
"""Two words with capitals that begin no sentence."""

ALIKE = 1.5
"""The largest factor between the counts (plus one) of a name and of its ordinary pair, in either order."""

COLUMNS = ["layer", "group", "n", "families", "real", "reversed", "difference", "low", "high", "smaller", "p", "q"]

ROUNDING = 5
"""Decimals of an increment that do not depend on what it was computed together with, in float32."""


def entity_grouping(
    model: HookedPositionTransformer,
    training: Iterable[str] | pd.DataFrame,
    names: Sequence[str] = NAMES,
    carriers: Sequence[str] = CARRIERS,
    *,
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """The increment at the space inside two-word names against the same words reversed, and inside ordinary pairs.

    Args:
        model: the model; increments per head are averaged over the heads.
        training: the text that it was trained on, or text like it, in which pairs are counted; or what `matched_pairs`
            found in it for these names.
        names: two words each, with one space between them.
        carriers: sentences with {} for the name.
        prepend_bos: as for `analysis.read_corpus`.

    Pairs that share a word share measurements (in a model of bytes all names that begin with "New" have the very same
    increment), so the unit of the test and of the interval is a family: all pairs that are linked by words in common.

    Returns:
        One row for each layer and `group`: "names", "ordinary pairs" (each matched to a name by `matched_pairs`) and
        "names - ordinary pairs" (of the names that have a match): `n` (pairs), `families`, `real` and `reversed` (mean
        increments, over carriers and pairs), `difference` (real minus reversed, the mean over families; of the third
        group, that of names minus that of pairs) with its 95% t interval over families, `low` to `high`, `smaller` (the
        share of families nearer in the real order), `p` (two-sided Wilcoxon signed-rank test over families; 1 where
        none differs) and `q` (the same, corrected for the number of layers by Benjamini and Hochberg).

    Raises:
        PositionsError: a name that is not two words, a carrier without {}, fewer than two names, or a training text
            that matches fewer than two of them.

    >>> training = ["They left New York for the North Sea, and saw green fields and small houses."]
    >>> table = lp.analysis.entity_grouping(model, training, names=["New York", "North Sea"])
    >>> table.loc[table["layer"] == 1, ["group", "n", "families"]]
                        group  n  families
    3                   names  2         2
    4          ordinary pairs  2         1
    5  names - ordinary pairs  2         1
    """
    _check_names(names, carriers)
    names = list(dict.fromkeys(names))
    matched = training if isinstance(training, pd.DataFrame) else matched_pairs(training, names)
    if len(matched) < 2:
        raise PositionsError(
            f"{len(matched)} of {len(names)} names have an ordinary pair of words as frequent; expected training text "
            "in English that has them."
        )
    table = _grouping_table(model, names, matched, carriers, prepend_bos)
    table["q"] = table.groupby("group")["p"].transform(stats.false_discovery_control)
    return table[COLUMNS]


def _grouping_table(
    model: HookedPositionTransformer,
    names: list[str],
    matched: pd.DataFrame,
    carriers: Sequence[str],
    prepend_bos: bool | None,
) -> pd.DataFrame:
    """The rows of `entity_grouping`, without their correction for the number of layers."""
    split = [tuple(name.split(" ")) for name in names]
    of_ordinary = [tuple(pair.split(" ")) for pair in matched["ordinary"]]
    partner = np.array([names.index(name) for name in matched["name"]])
    # A difference between a name and its pair belongs to the families of both.
    together = [split[i] + pair for i, pair in zip(partner, of_ordinary, strict=True)]

    layers, spaces = _inner_spaces(model, [*names, *matched["ordinary"]], carriers, prepend_bos)
    real, reversed_ = spaces[:, :, 0], spaces[:, :, 1]
    rows = []
    for i, layer in enumerate(layers):
        of_pairs = real[i] - reversed_[i]
        of_names, of_others = of_pairs[: len(names)], of_pairs[len(names) :]
        for group, part, differences, words in (
            ("names", slice(len(names)), of_names, split),
            ("ordinary pairs", slice(len(names), None), of_others, of_ordinary),
        ):
            both = {"real": real[i, part].mean(), "reversed": reversed_[i, part].mean()}
            rows.append({"layer": layer, "group": group, **both, **_difference_row(differences, _families(words))})

        # What names have beyond ordinary pairs: each minus its own match, which counts what frequency alone does.
        beyond = _difference_row(of_names[partner] - of_others, _families(together))
        rows.append({"layer": layer, "group": "names - ordinary pairs", **beyond})
    return pd.DataFrame(rows)


def _check_names(names: Sequence[str], carriers: Sequence[str]) -> None:
    """Refuse names that are not two words, carriers without a place for one, and too few of either."""
    for name in names:
        if len(name.split(" ")) != 2 or not all(name.split(" ")):
            raise PositionsError(f"the name {name!r} is not two words; expected one space between two.")
    for carrier in carriers:
        if "{}" not in carrier:
            raise PositionsError(f"the carrier {carrier!r} has no place for a name; expected {{}} in it.")
    if len(set(names)) < 2 or not carriers:
        raise PositionsError(
            f"there are {len(set(names))} names and {len(carriers)} carriers; expected two names or more."
        )


def frequent_names(training: Iterable[str], most: int = 200) -> list[str]:
    """The most frequent two-word names of a text that share no word, so that each is a family of its own.

    A name is two words side by side that begin with a capital after a word or comma of the same sentence, both of them
    written so at least half of the time in the whole text. Nothing is looked at but counts; of two names with a word
    in common the rarer one is left out.

    Args:
        training: text in English.
        most: at most so many.

    >>> lp.analysis.frequent_names(["They left New York for the North Sea, and New York for New Jersey."])
    ['New York', 'North Sea']
    """
    pairs, words = Counter[tuple[str, str]](), Counter[str]()
    for text in training:
        words.update(re.findall(r"[A-Za-z]+", text))
        pairs.update((found[1], found[2]) for found in re.finditer(CAPITALS, text))

    # By frequency, and then by name, so that the same text always gives the same list.
    used: set[str] = set()
    names: list[str] = []
    for pair, _ in sorted(pairs.items(), key=lambda item: (-item[1], item[0])):
        if len(names) == most:
            break
        if len({*pair}) == 2 and used.isdisjoint(pair) and all(words[word] >= words[word.lower()] for word in pair):
            names.append(" ".join(pair))
            used.update(pair)
    return names


def matched_pairs(training: Iterable[str], names: Sequence[str] = NAMES, *, distinct: bool = False) -> pd.DataFrame:
    """An ordinary pair of words for each name, as frequent as it in both orders.

    Ordinary words are of small letters, three at least, and no stop words (scikit-learn's list). Among all pairs the
    assignment with the closest counts in both orders is taken, and among equals the one whose two words are as frequent
    as those of the name; names that the text does not have, or without a pair within a factor of 1.5 in each order, are
    left out. Nothing is looked at but counts. With `distinct` no two ordinary pairs share a word: the names are gone
    through in their order, and each takes the closest pair that is left.

    Returns:
        A row for each matched name: `name`, `ordinary`, and the counts in the text, `name_real`, `name_reversed`,
        `ordinary_real`, `ordinary_reversed`.

    >>> training = ["They left New York for the North Sea, and saw green fields and small houses."]
    >>> table = lp.analysis.matched_pairs(training, names=["New York"])
    >>> table[["name", "ordinary", "name_real", "ordinary_real"]]
           name   ordinary  name_real  ordinary_real
    0  New York  saw green          1              1
    """
    pairs, words = Counter[tuple[str, str]](), Counter[str]()
    for text in training:
        words.update(re.findall(r"[A-Za-z]+", text))
        # The lookahead lets pairs overlap: of "a b c" both "a b" and "b c" are counted.
        pairs.update((found[1], found[2]) for found in re.finditer(r"\b(?=([A-Za-z]+) ([A-Za-z]+)\b)", text))
    of_names = [(name.split(" ")[0], name.split(" ")[1]) for name in names]
    known = [i for i, pair in enumerate(of_names) if pairs[pair]]
    names, of_names = [names[i] for i in known], [of_names[i] for i in known]
    # A pair rarer than this is beyond the factor from every name; all pairs by all names would not fit in memory.
    least = min((pairs[pair] for pair in of_names), default=np.inf) / ALIKE - 1
    ordinary = [pair for pair, count in pairs.items() if count >= least and all(map(_is_ordinary, pair))]
    if not ordinary:
        return pd.DataFrame(
            columns=["name", "ordinary", "name_real", "name_reversed", "ordinary_real", "ordinary_reversed"]
        )

    def counts(of: Sequence[tuple[str, str]]) -> np.ndarray:
        # Logs of counts plus one, so that a pair that never occurs reversed has a finite distance to others.
        found = [(pairs[a, b], pairs[b, a], words[a], words[b]) for a, b in of]
        return np.log(np.array(found) + 1)

    apart = np.abs(counts(of_names)[:, None] - counts(ordinary))
    both_orders, of_words = apart[..., :2].sum(-1), apart[..., 2:].sum(-1)
    # A hundredth: the frequency of single words only decides between pairs that match equally well.
    cost = both_orders + of_words / 100
    chosen = _closest_distinct(cost, ordinary) if distinct else zip(*linear_sum_assignment(cost), strict=True)
    rows = []
    for name, pair in chosen:
        if apart[name, pair, :2].max() > np.log(ALIKE):
            continue
        (a, b), (c, d) = of_names[name], ordinary[pair]
        rows.append((names[name], f"{c} {d}", pairs[a, b], pairs[b, a], pairs[c, d], pairs[d, c]))
    columns = ["name", "ordinary", "name_real", "name_reversed", "ordinary_real", "ordinary_reversed"]
    return pd.DataFrame(rows, columns=columns)


def _closest_distinct(
    cost: Float64[np.ndarray, "name pair"], ordinary: Sequence[tuple[str, str]]
) -> Iterator[tuple[int, int]]:
    """The closest pair of each name, in their order, of those that share no word with the pairs before."""
    first, second = np.array(ordinary).T
    free = first != second
    for name, of_name in enumerate(cost):
        if not free.any():
            return
        pair = int(np.where(free, of_name, np.inf).argmin())
        yield name, pair
        free &= ~(np.isin(first, ordinary[pair]) | np.isin(second, ordinary[pair]))


def _is_ordinary(word: str) -> bool:
    return len(word) >= 3 and word.islower() and word not in ENGLISH_STOP_WORDS


def _inner_spaces(
    model: HookedPositionTransformer, pairs: Sequence[str], carriers: Sequence[str], prepend_bos: bool | None
) -> tuple[list[int], np.ndarray]:
    """Increments at the inner space, [layer, pair, order], heads and carriers averaged."""
    texts, places = [], []
    for pair, order, carrier in product(pairs, (1, -1), carriers):
        first, second = pair.split(" ")[::order]
        text = carrier.replace("{}", f"{first} {second}", 1)
        # Spans count the text's own tokens; special ones that the model puts in front shift them.
        spans = character_spans(model.tokenizer, text)
        (tokens,) = prompts_of(model, text, None, prepend_bos, whole=True)
        in_front = len(tokens) - spans[-1][1]
        places.append(spans[carrier.index("{}") + len(first)][0] + in_front)
        texts.append(text)
    corpus = read_corpus(model, texts, None, prepend_bos)
    found = corpus.at(np.arange(len(texts)), np.array(places)).mean(axis=1)
    # `product` ran over carriers fastest, then over the two orders, then over the pairs.
    found = reduce(found, "layer (pair order carrier) -> layer pair order", "mean", pair=len(pairs), order=2)
    # Two spaces that have read the same tokens should differ by exactly nothing: the signed-rank test counts signs.
    return corpus.layers, found.round(ROUNDING)


def _families(pairs: Sequence[tuple[str, ...]]) -> np.ndarray:
    """The family of each pair: pairs that are linked by words in common have the same."""
    words = {word: i for i, word in enumerate(dict.fromkeys(word for pair in pairs for word in pair))}
    # Words are the nodes of a graph, pairs its edges, and families its connected components.
    links = [(words[pair[0]], words[word]) for pair in pairs for word in pair]
    rows, columns = np.array(links).T
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(words), len(words)))
    _, of_word = connected_components(graph, directed=False)
    return np.array([of_word[words[pair[0]]] for pair in pairs])


def _difference_row(of_pairs: np.ndarray, families: np.ndarray) -> dict[str, float]:
    # The mean of each family is one sample, as its members share measurements.
    _, family = np.unique(families, return_inverse=True)
    differences = np.bincount(family, of_pairs) / np.bincount(family)
    low, high = t_interval(differences)
    p = stats.wilcoxon(differences).pvalue if differences.any() else 1.0
    return {
        "n": len(of_pairs),
        "families": len(differences),
        "difference": differences.mean(),
        "low": low,
        "high": high,
        "smaller": (differences < 0).mean(),
        "p": float(p),
    }
