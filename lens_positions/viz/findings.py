"""What a report found, in a sentence a table: the sentences that it opens with, made of the numbers that it shows."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

FEWEST = 30
"""Tokens that a kind must have to stand in a sentence: the mean of fewer says little, and the largest is easily one."""


def of_kinds(name: str, table: pd.DataFrame) -> str:
    """In which layer increments differ most by kind of token, and how, without the full stop.

    The layer is that with the widest range of relative increments, of kinds that have an interval and 30 tokens. It is
    chosen after looking; its intervals are those of the table.

    Args:
        name: of the model.
        table: from `increments_by_category`, heads averaged.

    >>> columns = ["layer", "kind", "n", "relative", "relative_low", "relative_high"]
    >>> rows = [(0, "letter", 90, 0.5, 0.4, 0.6), (0, "space", 40, 2.0, 1.9, 2.1)]
    >>> of_kinds("m", pd.DataFrame(rows, columns=columns))
    'm puts tokens apart by kind most in layer 0: space ×2.000 the mean of the layer (1.900 to 2.100), letter ×0.500 (0.400 to 0.600)'
    """  # noqa: E501 - a sentence

    # A kind of a few tokens is easily the farthest of all by chance.
    known = table[(table["n"] >= FEWEST) & table["relative_low"].notna()]
    by_layer = known.groupby("layer")["relative"]
    ranges = (by_layer.max() - by_layer.min())[by_layer.count() > 1]
    if ranges.empty:
        return f"{name} has no layer in which two kinds of token are frequent enough to compare"

    # The layer was chosen after looking: its extremes are called apart only if their intervals do not overlap.
    rows = known[known["layer"] == ranges.idxmax()].sort_values("relative")
    least, most = rows.iloc[0], rows.iloc[-1]
    if most["relative_low"] <= least["relative_high"]:
        return f"{name} puts no kind of token clearly farther apart than another: in every layer the intervals overlap"
    far, near = (f"{row['kind']} ×{row['relative']:.3f}" for row in (most, least))
    return (
        f"{name} puts tokens apart by kind most in layer {most['layer']}: {far} the mean of the layer "
        f"{_interval(most, 'relative_', '.3f')}, {near} {_interval(least, 'relative_', '.3f')}"
    )


def of_ablations(name: str, loss: pd.DataFrame, unit: str) -> str:
    """What it costs to give every increment the mean of its row, and in which layer most, without the full stop.

    Args:
        name: of the model.
        loss: `Ablations.loss`, in the unit.
        unit: such as "nats per byte".
    """
    means = loss[loss["to"] == "mean"]
    every = means[means["layer"] == "all"].iloc[0]
    layers = means[means["layer"] != "all"]
    cost = f"{every['change']:+.4f} {unit}{_ends(every, 'low', 'high', '+.4f')}"
    said = (
        f"increments of {name} at the mean of their row change the loss by {cost}{_sure(every['low'], every['high'])}"
    )
    if len(layers) < 2:
        return said
    most: dict[Any, Any] = max(layers.to_dict("records"), key=lambda row: row["change"])
    return f"{said}, most in layer {most['layer']} alone: {most['change']:+.4f}{_ends(most, 'low', 'high', '+.4f')}"


def of_losses(table: pd.DataFrame) -> str:
    """The loss, or the difference of the second model's to the first's, without the full stop.

    Args:
        table: from `compare_losses`.
    """
    first: dict[Any, Any] = table.to_dict("records")[0]
    loss = f"{first['loss']:.4f} nats per byte{_ends(first, 'low', 'high', '.4f')}"
    count = f"{first['documents']} held-out documents"
    if len(table) == 1:
        return f"the loss of {first['model']} on {count} is {loss}"
    other: dict[Any, Any] = table.to_dict("records")[1]
    low, high = other["difference_low"], other["difference_high"]
    difference = f"{other['difference']:+.4f} nats per byte{_ends(other, 'difference_low', 'difference_high', '+.4f')}"
    return (
        f"on {count} the loss of {other['model']} minus that of {first['model']}, which is {loss}, is {difference}"
        f"{_sure(low, high)}"
    )


def sentence(parts: Sequence[str]) -> str:
    """Parts, one for each model, as one sentence.

    >>> sentence(["a has 1", "b has 2"])
    'A has 1; b has 2.'
    """
    said = "; ".join(parts)
    # The name of a model is written as it is.
    return f"{said[0].upper()}{said[1:]}." if said.startswith(("the ", "on ", "increments ", "a ")) else f"{said}."


def _interval(row: Any, prefix: str, form: str) -> str:
    return f"({row[prefix + 'low']:{form}} to {row[prefix + 'high']:{form}})"


def _ends(row: Any, low: str, high: str, form: str) -> str:
    return "" if math.isnan(row[low]) else f" ({row[low]:{form}} to {row[high]:{form}})"


def _sure(low: float, high: float) -> str:
    """What an interval that holds zero means, in words."""
    return ", no clear difference" if low <= 0 <= high else ""
