"""Recompute every number, and every call, of the table that opens RESULTS.md, from the tables in this repository.

    python experiments/check.py

Written apart from the code that made the table, with pandas and numpy alone: nothing of this project is imported. Each
function reads the files of one row and returns the numbers of its columns "ours" and "control" in the order in which
they stand there, as they should be printed, and the call. A number that differs is an error.
"""

import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
SUITE, CODE = "long", "code"
T = {1: 12.706204736432095, 2: 4.302652729911275, 3: 3.182446305284263, 4: 2.7764451051977987}
"""The 97.5% point of Student's t by degrees of freedom, from a table of it."""

CHINESE = ("reviews", "peoples_daily")
NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?%?")
Row = tuple[list[str], str]


def table(name: str, suite: str = SUITE, variant: str | None = None) -> pd.DataFrame:
    """The rows of a file for a suite, and a variant."""
    rows = pd.read_csv(ROOT / "experiments" / "results" / f"{name}.csv", low_memory=False)
    rows = rows[rows["suite"] == suite]
    return rows if variant is None else rows[rows["variant"] == variant]


def interval(values: Iterable[float], least: float = -np.inf, most: float = np.inf) -> tuple[float, float, float]:
    """Mean over seeds, and the ends of Student's 95% interval, cut where values cannot lie."""
    values = np.array(list(values), dtype=float)
    mean, n = values.mean(), len(values)
    if n < 2:
        return mean, np.nan, np.nan
    reach = T[n - 1] * values.std(ddof=1) / np.sqrt(n)
    return mean, max(mean - reach, least), min(mean + reach, most)


def printed(found: tuple[float, float, float], form: str) -> list[str]:
    """A mean and its ends, as numbers are printed; the mean alone without an interval."""
    return [format(value, form) for value in found if not np.isnan(value)]


def call_of(found: tuple[float, float, float], asked: float, smallest: float) -> str:
    """The call on an effect whose reported direction is up."""
    _, low, high = found
    if np.isnan(low):
        return "undecided"
    if low > smallest:
        return "agrees" if high >= asked else "weaker"
    if high < -smallest:
        return "contrary"
    return "absent" if -smallest <= low and high <= smallest else "undecided"


def call_of_costs(costs: list[tuple[float, float, float]], limit: float = 0.01) -> str:
    """The call on costs that should be none."""
    if any(low > limit for _, low, _ in costs):
        return "contrary"
    return "agrees" if all(high <= limit for _, _, high in costs) else "undecided"


def loss_differences(variant: str, other: str, sources: Iterable[str] | None = None, contexts: int = 1) -> list[float]:
    """Nats per byte of a variant less another's, one of each seed that both have."""
    scores = table("heldout")
    scores = scores[scores["length"] == scores["length"].min() * contexts]
    if sources is not None:
        scores = scores[scores["source"].isin(list(sources))]
    sums = scores.groupby(["variant", "seed"])[["nats", "bytes"]].sum()
    per_byte = sums["nats"] / sums["bytes"]
    ours, theirs = per_byte[variant], per_byte[other]
    return [ours[seed] - theirs[seed] for seed in sorted(set(ours.index) & set(theirs.index))]


def loss() -> Row:
    """Differences in Chinese and in English, and in other writers' English."""
    numbers, costs = [], []
    for sources in (CHINESE, ("sotu",)):
        for variant in ("shared", "per_layer"):
            costs.append(interval(loss_differences(variant, "static", sources)))
            numbers += printed(costs[-1], "+.4f")
    other = table("english")
    numbers.append(str(other["document"].nunique()))
    sums = other.groupby(["variant", "seed"])[["nats", "bytes"]].sum()
    per_byte: Any = (sums["nats"] / sums["bytes"]).unstack("seed")
    for variant in ("shared", "per_layer"):
        numbers += printed(interval((per_byte.loc[variant] - per_byte.loc["static"]).dropna()), "+.4f")
    return numbers, call_of_costs(costs)


def longer() -> Row:
    """Differences at four contexts."""
    variants = ("shared", "per_layer", "constant")
    return [n for v in variants for n in printed(interval(loss_differences(v, "static", contexts=4)), "+.3f")], "new"


def frozen() -> Row:
    """Frozen less static, less shared, and a wrong table less static."""
    costs = [interval(loss_differences("frozen", other)) for other in ("static", "shared")]
    swapped = interval(loss_differences("swapped", "static"))
    return [n for each in (*costs, swapped) for n in printed(each, "+.4f")], call_of_costs(costs)


REPORTED = {
    "shared": "letter, Chinese continuation byte, Chinese lead byte, space, capital, sentence end, newline, "
    "end of document",
    "per_layer": "letter, Chinese continuation byte, Chinese lead byte, capital, sentence end, newline = space",
}
"""The kinds of bytes in the reported order of their increments; two share the last place of layer 0."""


def kinds(variant: str) -> Row:
    """Rank correlations with the reported order, and what orders by chance have."""
    places = REPORTED[variant].split(", ")
    kind_place = [(kind, place) for place, names in enumerate(places) for kind in names.split(" = ")]
    expected = pd.Series(dict(kind_place)).rank()
    rows = table("kinds", variant=variant)
    rows = rows[(rows["layer"] == 0) & rows["kind"].isin(expected.index)]
    correlations = []
    for _, own in rows.groupby("seed"):
        ranks = own.set_index("kind")["mean"].rank()
        correlations.append(np.corrcoef(ranks[expected.index], expected)[0, 1])
    found, n = interval(correlations, -1, 1), len(expected)
    orders = np.array(list(itertools.permutations(range(n))), dtype=np.int8)
    chance = np.sort(1 - 6 * ((orders - np.arange(n)) ** 2).sum(1) / (n * (n * n - 1)))
    numbers = [*printed(found, "+.2f"), *(format(value, "+.2f") for value in correlations)]
    numbers += ["95%", format(chance[int(np.ceil(0.95 * (len(chance) - 1)))], "+.2f")]
    return numbers, call_of(found, 0.7, 0.3)


def boundaries() -> Row:
    """Areas within a lead byte, and those of statistics."""
    rows = table("boundaries", variant="per_layer")
    rows = rows[rows["words"] == "human"]
    within = rows[rows["measure"] == "within token"]
    above = within[within["layer"] > 0]
    found = interval((above["auc"] - 0.5).abs().groupby(above["seed"]).max())
    of_text = rows[rows["seed"] == rows["seed"].min()].set_index("measure")["auc"]
    order = of_text["best order of tokens"]
    numbers = [format(above["auc"].min(), ".3f"), format(above["auc"].max(), ".3f"), "0.5", *printed(found, ".3f")]
    numbers += [format(value, ".3f") for value in (above["auc"] - 0.5).abs().groupby(above["seed"]).max()]
    layer_0 = (within[within["layer"] == 0]["auc"] - 0.5).abs().max()
    numbers += [format(1 - order, ".3f"), format(order, ".3f"), "0", format(layer_0, ".3f")]
    return [*numbers, format(of_text["branching entropy"], ".3f")], call_of(found, 0.09, 0.05)


def names() -> Row:
    """Shares of families that are nearer in the real order, over layers 2 and above."""
    rows = table("names", variant="per_layer")
    above = rows[rows["layer"] >= 2].groupby(["group", "seed"])["smaller"].mean()
    beyond = interval(above["names - ordinary pairs"] - 0.5)
    first = rows[(rows["seed"] == rows["seed"].min()) & (rows["group"] == "names - ordinary pairs")]
    numbers = [*printed(interval(above["names - ordinary pairs"], 0, 1), ".1%"), str(first["families"].iloc[0])]
    for group in ("names", "ordinary pairs"):
        numbers += printed(interval(above[group], 0, 1), ".1%")
    return numbers, call_of(beyond, 0.1, 0.05)


def code() -> Row:
    """The largest mean of newlines and brackets, and of other kinds, in means of the layer."""
    rows = table("kinds_code", CODE, "per_layer")
    rows = rows[rows["layer"] > 0]
    scope = rows["kind"].isin(["newline", "bracket"])
    numbers, found = [], []
    for own in (rows[scope], rows[~scope]):
        logs = interval(np.log(own.groupby("seed")["relative"].max()))
        found.append(logs)
        numbers += [format(np.exp(value), ".2f") for value in logs]
    return numbers, call_of(found[0], np.log(4.0), np.log(1.5))


def cap() -> Row:
    """The largest share at the cap and the largest increment of each seed."""
    rows = table("saturation", variant="per_layer").groupby("seed")[["share", "max"]].max()
    numbers = [format(value, ".0%") for value in rows["share"]] + [format(value, ".1f") for value in rows["max"]]
    return [*numbers, "10"], call_of(interval(rows["share"], 0, 1), 0.5, 0.1)


def causes() -> Row:
    """What ablations of layer 0 cost."""
    rows = table("ablation", variant="per_layer")
    rows = rows.assign(layer=rows["layer"].astype(str), to=rows["to"].astype(str))
    cost: Any = rows.set_index(["corpus", "layer", "to", "seed"])["change"].sort_index()
    ours, control = [], []
    for corpus in ("english", "chinese"):
        mean, best, token, shuffled = (
            printed(interval(cost.loc[(corpus, layer, to)]), "+.3f")
            for layer, to in (("0", "mean"), ("0", "best constant"), ("all", "token"), ("0", "shuffle"))
        )
        ours += ["0", *mean, *best]
        control += [*token, "0", *shuffled]
    return [*ours, *control], "new"


def graft() -> Row:
    """The differences of the grafts, as their file has them."""
    runs = json.loads((ROOT / "benchmarks" / "graft.json").read_text("utf-8"))["runs"].values()
    found = [run["difference_of_documents"] for run in runs]
    numbers = [
        text
        for each in found
        for text in (*(format(each[end], "+.4f") for end in ("mean", "low", "high")), str(each["documents"]))
    ]
    return numbers, "contrary" if any(each["low"] > 0.01 for each in found) else "undecided"


ROWS: dict[str, Callable[[], Row]] = {
    "loss": loss,
    "longer": longer,
    "frozen": frozen,
    "shared-kinds": lambda: kinds("shared"),
    "layer-0-kinds": lambda: kinds("per_layer"),
    "boundaries": boundaries,
    "names": names,
    "code": code,
    "heads": lambda: ([], "untested"),
    "cap": cap,
    "causes": causes,
    "graft": graft,
}


def rows_of(text: str) -> dict[str, list[str]]:
    """The cells of the opening table, by the key of each row: claim, reported, ours, call, control."""
    lines = itertools.takewhile(lambda line: not line.startswith("## "), text.splitlines())
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("| ")]
    return {key[1]: row for row in cells if (key := re.search(r"`([\w-]+)`", row[0]))}


def differences(text: str) -> list[str]:
    """What RESULTS.md says otherwise than the files: a sentence each."""
    said, wrong = rows_of(text), []
    if set(said) != set(ROWS):
        wrong.append(f"the rows are {sorted(said)}; expected {sorted(ROWS)}")
    for key in (key for key in ROWS if key in said):
        numbers, call = ROWS[key]()
        _, _, ours, told, control = said[key]
        found = NUMBER.findall(f"{ours} {control}")
        if found != numbers:
            wrong.append(f"{key}: {found} stands there; expected {numbers}")
        if told.strip("*") != call:
            wrong.append(f"{key}: the call {told} stands there; expected {call}")
    return wrong


if __name__ == "__main__":
    found = differences((ROOT / "RESULTS.md").read_text("utf-8"))
    print("\n".join(found) or f"all numbers and calls of {len(ROWS)} rows are those of the files")
    sys.exit(bool(found))
