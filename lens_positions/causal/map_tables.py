"""What a map shows: which gaps a model would have longer, and which shorter, by what they cross or what stands there.

The statistic is the mean gradient over the gaps of a group, in nats per position and gap: how the loss of a window
changes as one of these gaps grows. Documents are the unit of sampling, so intervals resample whole documents. Two
controls stand beside it:

    shuffled      the gradients of each document given to its gaps at random, which keeps a document's mean and loses
                  which gap is which: the interval of so many shuffles
    difference    the mean minus what all shuffles give on average, the mean of the same documents: what the group has
                  of its own

A map is read shard by shard, and held in memory a document at a time.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float64, Int64

from ..errors import PositionsError, check_seed
from ..measure.intervals import bootstrap_means, interval_of, resamples
from ..measure.text_boundaries import BOUNDARIES, strongest
from .map_folder import GapMap

Grouping = Literal["boundary", "before_kind", "after_kind"]

ORDER = ("inside a word", "between Chinese characters", *BOUNDARIES)

SHUFFLES = 100


@dataclass
class _Group:
    """Sums over the gaps of one group.

    Attributes:
        counts, sums, longer, chance: by document: gaps, and by layer (the last is all layers together) the sum of their
            gradients, how many are negative, and what the document's mean would make of the sum.
        shuffled: the sum after each shuffle.
    """

    counts: dict[int, int] = field(default_factory=dict)
    sums: dict[int, np.ndarray] = field(default_factory=dict)
    longer: dict[int, np.ndarray] = field(default_factory=dict)
    chance: dict[int, np.ndarray] = field(default_factory=dict)
    shuffled: np.ndarray | float = 0.0


def map_summary(
    maps: GapMap | str | Path | Sequence[GapMap | str | Path],
    by: Grouping = "boundary",
    seed: int = 0,
    shuffles: int = SHUFFLES,
) -> pd.DataFrame:
    """Which gaps a model would have longer or shorter, by layer.

    Args:
        maps: one map or several, such as that of a control; whole ones.
        by: "boundary", the strongest that a gap crosses (document, line, sentence, word, or none, inside a word), or
            the kind of the token "before_kind" or "after_kind" the gap.
        seed: of the shuffles and the intervals.
        shuffles: how many.

    Returns:
        A row for each map, group and layer, and one for `layer` "all", the sum of a gap's gradients over the layers (of
        heads too): `model`, `corpus`, the group, `n` gaps in so many `documents`; `gradient`, the mean in nats per
        position, with its interval `low` to `high`; `shuffled_low` to `shuffled_high`, where 95% of the shuffles lie;
        `difference` to chance with `difference_low` to `difference_high`; `longer`, the share of gaps with a negative
        gradient, with `longer_low` to `longer_high`; and `wants`: "longer" where the gradient's interval is below 0 and
        the gradient below the shuffles, "shorter" where both are above, else "undecided". Intervals of 95% resample
        documents, and are NaN where fewer than two have such a gap; they are not corrected for how many rows there are.

    Raises:
        PositionsError: no map, one that is not whole, or another way to group.

    >>> found = lp.causal.gap_map(model, texts, folder / "map", layers=[0], progress=False)
    >>> table = lp.causal.map_summary(found)
    >>> table.loc[table["layer"] == "all", ["boundary", "n", "documents"]]
            boundary    n  documents
    0  inside a word  283          3
    2           word  227          3
    4       sentence   10          3
    6       document    6          3
    """
    check_seed(seed)
    if by not in ("boundary", "before_kind", "after_kind"):
        raise PositionsError(f'by is {by!r}; expected "boundary", "before_kind" or "after_kind".')
    if shuffles < 1:
        raise PositionsError(f"shuffles is {shuffles}; expected at least 1.")

    given = [maps] if isinstance(maps, str | Path | GapMap) else list(maps)
    if not given:
        raise PositionsError("no map was given; expected at least one.")
    opened = [one if isinstance(one, GapMap) else GapMap(Path(one)) for one in given]

    # All of them first: a table of large maps takes a while.
    for one in opened:
        _check_whole(one)
    return pd.concat([_of_map(one, by, seed, shuffles) for one in opened], ignore_index=True)


def _check_whole(one: GapMap) -> None:
    _ = one.settings
    if not one.is_whole:
        of = f" of {one.end['shards']}" if one.end else ""
        raise PositionsError(
            f"the map in {one.folder} has {len(one.shards)}{of} shards; expected a whole one: the command that made it "
            "goes on with it."
        )


def _of_map(one: GapMap, by: Grouping, seed: int, shuffles: int) -> pd.DataFrame:
    # A map need not fit in memory: one document at a time, and of it only sums by group.
    settings = one.settings
    generator = np.random.default_rng(seed)
    groups: dict[str, _Group] = defaultdict(_Group)
    documents = 0
    for names, gradients in _documents(one, by):
        _count(groups, documents, names, gradients, shuffles, generator)
        documents += 1

    # Gaps of one document are no independent samples, so documents are resampled.
    draws = resamples(documents, seed)
    order = [name for name in ORDER if name in groups] if by == "boundary" else sorted(groups)
    layers: list[Any] = ["all", *settings["layers"]]
    rows = [row for name in order for row in _rows(groups[name], documents, draws, layers)]
    table = pd.DataFrame(rows)
    table.insert(0, by, [name for name in order for _ in layers])
    table.insert(0, "corpus", settings["corpus"])
    table.insert(0, "model", settings["model"])
    return table


def _documents(one: GapMap, by: Grouping) -> Iterator[tuple[np.ndarray, Float64[np.ndarray, "gap layer"]]]:
    """The group and the gradients of every gap, document by document; heads are summed."""
    columns = [by] if by != "boundary" else [f"crosses_{name}" for name in BOUNDARIES]
    layers = len(one.settings["layers"])
    number = -1
    names: list[np.ndarray] = []
    gradients: list[np.ndarray] = []
    for rows in one.tables(["document", "index", "layer", "gradient", *columns]):
        # How many rows the first gap has, by layers: 1, or the number of heads.
        heads = int(((rows["index"] == rows["index"][0]) & (rows["document"] == rows["document"][0])).sum()) // layers
        values = rows["gradient"].to_numpy(np.float64).reshape(-1, layers, heads).sum(2)
        gaps = rows.iloc[:: layers * heads]
        group = _boundary(gaps) if by == "boundary" else gaps[by].astype(str).to_numpy(object)

        # A document may go on in the next shard: it is given out when another one begins.
        owners = gaps["document"].to_numpy()
        starts = [0, *(np.flatnonzero(np.diff(owners)) + 1), len(owners)]
        for start, stop in pairwise(starts):
            if owners[start] != number and names:
                yield np.concatenate(names), np.concatenate(gradients)
                names, gradients = [], []
            number = owners[start]
            names.append(group[start:stop])
            gradients.append(values[start:stop])
    yield np.concatenate(names), np.concatenate(gradients)


def _boundary(gaps: pd.DataFrame) -> np.ndarray:
    # Null says that nobody has cut these Chinese characters into words.
    unknown = gaps["crosses_word"].isna().to_numpy()
    crossed = {name: gaps[f"crosses_{name}"].fillna(False).to_numpy(bool) for name in BOUNDARIES}
    return strongest(crossed, unknown)


def _count(
    groups: dict[str, _Group],
    document: int,
    names: np.ndarray,
    gradients: Float64[np.ndarray, "gap layer"],
    shuffles: int,
    generator: np.random.Generator,
) -> None:
    """Add a document to the sums."""
    # The column of all layers together comes first, as in `_rows`.
    values = np.concatenate([gradients.sum(1, keepdims=True), gradients], axis=1)
    known, codes = np.unique(names.astype(str), return_inverse=True)

    # One-hot [gap group]: a product with it sums over the gaps of each group.
    members = np.eye(len(known))[codes]
    sums, longer, counts = members.T @ values, members.T @ (values < 0), members.sum(0)

    # The control: gaps keep their document and lose their group.
    shuffled = np.stack([members[generator.permutation(len(codes))].T @ values for _ in range(shuffles)])
    for i, name in enumerate(known):
        group = groups[str(name)]
        group.counts[document] = int(counts[i])
        group.sums[document], group.longer[document] = sums[i], longer[i]

        # What as many gaps of this document would sum to if groups meant nothing.
        group.chance[document] = counts[i] * values.mean(0)
        group.shuffled = group.shuffled + shuffled[:, i]


def _rows(
    group: _Group, documents: int, draws: Int64[np.ndarray, "draw document"], layers: list[Any]
) -> list[dict[str, Any]]:
    """A group's rows, by layer."""
    # Documents without such a gap count 0, and are drawn like the others.
    counts = np.zeros(documents, dtype=np.int64)
    counts[list(group.counts)] = list(group.counts.values())
    n = int(counts.sum())

    def of_documents(by_document: dict[int, np.ndarray]) -> Float64[np.ndarray, "document layer"]:
        whole = np.zeros((documents, len(layers)))
        whole[list(by_document)] = list(by_document.values())
        return whole

    sums, chance = of_documents(group.sums), of_documents(group.chance)
    measured = {"gradient": sums, "difference": sums - chance, "longer": of_documents(group.longer)}
    found: dict[str, np.ndarray] = {}
    for name, values in measured.items():
        ends = "" if name == "gradient" else f"{name}_"
        found[name] = values.sum(0) / n
        low, high = interval_of(bootstrap_means(values, counts, draws)) if len(group.counts) > 1 else (np.nan, np.nan)
        found[f"{ends}low"], found[f"{ends}high"] = (np.broadcast_to(end, len(layers)) for end in (low, high))
        if name == "gradient":
            found["shuffled_low"], found["shuffled_high"] = interval_of(np.asarray(group.shuffled) / n)

    # Both must agree: an interval away from 0 alone may be what every gap of these documents has.
    longer = (found["high"] < 0) & (found["gradient"] < found["shuffled_low"])
    shorter = (found["low"] > 0) & (found["gradient"] > found["shuffled_high"])
    wants = np.where(longer, "longer", np.where(shorter, "shorter", "undecided"))
    return [
        {"layer": layer, "n": n, "documents": len(group.counts)}
        | {name: float(values[i]) for name, values in found.items()}
        | {"wants": str(wants[i])}
        for i, layer in enumerate(layers)
    ]
