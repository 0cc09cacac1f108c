"""What was reported, what was found, and the call: a function a finding, from the results of a suite.

The rule of all calls stands in `calls.py`; a finding says its unit, the size asked and the smallest that counts. They
were written when the models of `tiny` and `base` had been measured and those of `long` had been trained, but only the
losses of these had been read.

Reported figures: Long, "How Far Apart Does a Model Think Its Tokens Are?" (2026), one seed each, 6.4M parameters.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from lens_positions.terminal import with_interval
from lens_positions.training.schema import RunResults

from .calls import Call, Estimate, judge, judge_cost, over_seeds, seeds_needed, seen
from .markdown import grid
from .options import CONSTANTS, VARIANTS
from .suite import diverged_at, loss_table, scores_by_seed
from .tables import Tables

Block = pd.DataFrame | str
"""A table of a finding, or a paragraph."""

NEUTRAL = 0.01
"""Nats per byte (of the graft: per token): a cost whose whole interval is below it does not matter at this size."""

ORDERED, SOMEWHAT_ORDERED = 0.7, 0.3
"""Rank correlations with a reported order: what is asked, and the smallest that counts."""

KNOWN, KNOWN_A_LITTLE = 0.09, 0.05
"""Distances of an area under the ROC curve from 0.5: half of what is reported (0.68 and 0.72 at best), and the
smallest that counts."""

PULLED, PULLED_A_LITTLE = 0.1, 0.05
"""Shares of names nearer in the real order, less a half: half of what is reported (0.61 to 0.82), and the smallest."""

MARKED, MARKED_A_LITTLE = 4.0, 1.5
"""Times a layer's mean: half of what is reported of newlines and brackets (8), and the smallest that counts."""

LOOKS, LOOKS_A_LITTLE = 0.24, 0.1
"""Rank correlations over heads: half of the reported one (0.48), and the smallest that counts."""

CAPPED, CAPPED_A_LITTLE = 0.5, 0.1
"""Shares of a layer's increments at the cap: a layer that sits there, and the smallest that counts."""

CODE = {"long": "code"}
"""Of a suite the one that was trained alike on program text."""

LANGUAGES = {"sotu": "English", "reviews": "Chinese", "peoples_daily": "Chinese", "python": "Python"}
"""The language of each source."""

NAMES = {
    "static": "static (RoPE)",
    "shared": "shared",
    "per_layer": "per layer",
    "shared_per_head": "shared, per head",
    "per_layer_per_head": "per layer, per head",
    "frozen": "frozen from shared",
    "signed": "per layer, signed",
    "cap_30": "per layer, cap 30",
    "constant": "constant, the mean of shared",
    "swapped": "shared, letters and space swapped",
    "head_steps": "a constant for each head",
}

SHARED_REPORTED = {
    "letter": 0.79,
    "Chinese continuation byte": 0.80,
    "Chinese lead byte": 0.92,
    "space": 1.05,
    "capital": 1.10,
    "sentence end": 1.18,
    "newline": 2.12,
    "end of document": 2.90,
}
LAYER_0_REPORTED = {
    "letter": 1.64,
    "Chinese continuation byte": 1.79,
    "Chinese lead byte": 2.43,
    "capital": 9.52,
    "sentence end": 9.90,
    "newline": 9.99,
    "space": 9.99,
}
LOSS_REPORTED = {"shared": -0.0006, "per_layer": -0.0031, "shared_per_head": -0.0013, "per_layer_per_head": -0.0052}


CLAIMS = {
    "Learned increments cost no loss": ("loss", "-0.0006 (shared), -0.0031 (per layer) nats per byte"),
    "Beyond the training length": ("longer", "nothing"),
    "Frozen increments do as well as learned ones": ("frozen", "1.802 against 1.803 and 1.803 nats per token"),
    "Shared increments by kind of byte": ("shared-kinds", "an order of 8 kinds"),
    "Layer 0 by kind of byte": ("layer-0-kinds", "an order of 7 kinds"),
    "Middle layers know Chinese word boundaries": ("boundaries", "AUC up to 0.68 and 0.72"),
    "Two-word names are pulled together": ("names", "61 to 82% of 82 names"),
    "Layers specialise on program text": ("code", "newline and bracket about 8 times the rest"),
    "Heads with larger increments look back less far": ("heads", "rank correlation -0.48"),
    "Some layers sit at the cap": ("cap", "some layers at the cap of 10"),
    "What increments cause": ("causes", "nothing"),
    "A graft on a pretrained model costs nothing": ("graft", "+0.001 nats per token"),
}
"""By title, the key of a claim in the table that opens RESULTS.md, and what was reported, in short."""


BOUNDARIES_REPORTED = (
    "against jieba, shared 0.50; per layer L0 0.50, L1 0.54, L2 0.68, L3 0.37, L4 0.63, L5 0.47 (a rerun: 0.52, 0.53, "
    "0.63, 0.41, 0.72, 0.41)."
)


@dataclass(frozen=True)
class Finding:
    """One finding: what was reported, what was found, and what to make of both."""

    title: str
    reported: str
    verdict: Call
    sentence: str
    rule: str
    blocks: list[Block] = field(default_factory=list)  # tables, and paragraphs
    files: list[str] = field(default_factory=list)
    figure: tuple[str, str, Callable[[Path], object]] | None = None  # its name, what it shows, and what draws it
    ours: str = "not measured"  # this and the control as they stand in the table that opens RESULTS.md
    control: str = "none"
    power: str = ""


class Suite:
    """The results of a suite."""

    def __init__(self, results: Tables, name: str) -> None:
        self.results, self.name = results, name
        self.losses = loss_table(results, name)

    def runs(self, variant: str) -> dict[int, RunResults]:
        """What is known of the scored runs of a variant, by seed."""
        own = {run.seed: of for run, of in self.results.runs.items() if run[:2] == (self.name, variant)}
        return {seed: own[seed] for seed in sorted(seed for seed in own if seed is not None) if "step" not in own[seed]}

    def tables(self, variant: str, name: str) -> dict[int, pd.DataFrame]:
        """A measurement of the scored runs of a variant, by seed."""
        scored = self.runs(variant)
        found = self.results.seeds(name, self.name, variant)
        return {seed: table for seed, table in found.items() if seed in scored}

    def files(self, variant: str, *names: str) -> list[str]:
        """The files of these measurements where a variant has them, as RESULTS.md gives them."""
        return [self.results.path(name) for name in names if self.tables(variant, name)]

    def diverged(self, variant: str) -> str:
        """The seeds of a variant whose loss stopped being a number, each with its step."""
        return diverged_at(self.results, self.name, variant)

    def paired(self, variant: str, contexts: int = 1) -> "pd.Series[Any] | None":
        """As `loss`, where there is a seed that static has too."""
        row = self.loss(variant, contexts)
        return None if row is None or pd.isna(row["difference"]) else row

    def difference(self, variant: str, other: str) -> dict[str, float] | None:
        """The loss of a variant minus another's, with its interval over seeds; None without a seed that both have."""
        found = self.differences(variant, other).get("all")
        return None if found is None else {"difference": found.mean, "seeds_low": found.low, "seeds_high": found.high}

    def differences(self, variant: str, other: str = "static", contexts: int = 1) -> dict[str, Estimate]:
        """The loss of a variant minus another's over the seeds of both, in nats per byte: of all text and by language.

        Empty without a seed that both have, or without that length of text.
        """
        ours, theirs = (scores_by_seed(self.results, self.name, own) for own in (variant, other))
        values: dict[str, list[float]] = {}
        for seed in (seed for seed in ours if seed in theirs):
            lengths = ours[seed].index.unique("length")
            if min(lengths) * contexts not in lengths:
                return {}
            own, base = (scores[seed].loc[min(lengths) * contexts] for scores in (ours, theirs))
            nats = own["nats"] - base["nats"]
            values.setdefault("all", []).append(float(nats.sum() / own["bytes"].sum()))
            languages = own["source"].map(lambda source: LANGUAGES.get(source, source))
            for language, rows in nats.groupby(languages):
                values.setdefault(str(language), []).append(float(rows.sum() / own["bytes"][rows.index].sum()))
        return {language: over_seeds(each) for language, each in values.items()}

    def other_english(self, variant: str) -> Estimate | None:
        """The loss of a variant minus static's on other writers' English; None without a seed that both have."""
        ours, theirs = (self.tables(own, "english") for own in (variant, "static"))
        seeds = [seed for seed in ours if seed in theirs]
        each = [float((ours[s]["nats"] - theirs[s]["nats"]).sum() / ours[s]["bytes"].sum()) for s in seeds]
        return over_seeds(each) if each else None

    def loss(self, variant: str, contexts: int = 1) -> "pd.Series[Any] | None":
        """The row of the loss table for a variant, read in pieces of so many training contexts; None without one."""
        rows = self.losses[self.losses["variant"] == variant]
        if rows.empty or rows["loss"].isna().all():
            return None
        return rows[rows["length"] == rows["length"].min() * contexts].iloc[0]


def loss_neutral(suite: Suite) -> Finding:
    """Learned increments cost no loss, in either language."""
    title = "Learned increments cost no loss"
    costs: dict[str, dict[str, Estimate]] = {}
    for variant in ("shared", "per_layer"):
        found = suite.differences(variant)
        costs[variant] = {language: found[language] for language in found if language != "all" or len(found) < 3}
    gone = "; ".join(f"{NAMES[v]} diverged: {suite.diverged(v)}" for v in costs if suite.diverged(v))
    all_costs = [each for by_language in costs.values() for each in by_language.values()]
    measured = all(costs.values()) and all(each.n > 1 for each in all_costs)
    verdict: Call = judge_cost(all_costs, NEUTRAL) if measured else "untested"
    if gone and verdict == "agrees":
        verdict = "undecided"
    languages = list(costs["per_layer"]) if measured else []
    ours = "; ".join(
        f"{language}: shared {costs['shared'][language].text('+.4f')}, per layer "
        f"{costs['per_layer'][language].text('+.4f')}"
        for language in languages
    )
    others = {variant: suite.other_english(variant) for variant in costs}
    beside = ", ".join(f"{NAMES[v]} {each.text('+.4f')}" for v, each in others.items() if each is not None)
    documents = next((len(t) for t in suite.tables("static", "english").values()), 0)
    control = f"English of {documents} documents by other writers: {beside}" if beside else "none"
    sentence = "Shared and per layer have not been run at two seeds of static yet."
    if measured:
        n = f"{min(each.n for each in all_costs)} seeds"
        sentence = f"Against static RoPE at the same seeds the loss differs, in nats per byte ({n}), in {ours}."
    return Finding(
        title,
        "differences to RoPE of -0.0006 (shared) to -0.0052 (per layer, per head) nats per byte; one seed each.",
        verdict,
        sentence + (f" {gone}." if gone else ""),
        f"a cost, its limit {NEUTRAL} nats per byte: of shared and of per layer, in each language. A seed that "
        "diverged leaves it undecided.",
        [
            losses(suite),
            "Of both languages together. A difference, and its intervals, are over the seeds that static has too; "
            "losses over all seeds of a row.",
            f"{control[0].upper()}{control[1:]}." if beside else "",
        ],
        [suite.results.path("heldout"), *suite.files("static", "english")],
        ours=ours or "not measured",
        control=control,
        power=_cost_power(all_costs) if measured else "",
    )


def _cost_power(costs: list[Estimate]) -> str:
    """What a cost would have had to be to be called one."""
    if not costs or min(each.n for each in costs) < 2:
        return ""
    largest = max(seen(each, NEUTRAL) for each in costs)
    return f"a cost of {largest:.3f} nats per byte would have been called one. {len(costs)} intervals."


def _would_decide(found: Estimate, smallest: float, call: Call) -> str:
    """What an undecided claim would take; nothing of any other."""
    if call != "undecided":
        return ""
    if found.n < 2:
        return " Three seeds would be a start."
    needed = seeds_needed(found, smallest)
    return f" To decide: with this mean and spread {f'{needed} seeds' if needed else 'more than 100 seeds'}."


def losses(suite: Suite, only_run: bool = False) -> pd.DataFrame:
    """The losses of all variants, or of those that were run, beside static's and the reported ones."""
    columns = ["increments", "seeds", "loss, nats per byte", "difference to static"]
    columns += ["over seeds", "over documents", "reported"]
    rows = []
    for variant in VARIANTS:
        row, diverged = suite.loss(variant), suite.diverged(variant)
        gone = f"diverged: {diverged}" if diverged else ""
        if row is None:
            if gone or not only_run:
                rows.append([NAMES[variant], gone or "not run", *[""] * 5])
            continue
        cells = [NAMES[variant], "; ".join(filter(None, [_seeds(row), gone])), f"{row['loss']:.4f}"]
        if variant == "static":
            cells += ["", "", "", ""]
        elif suite.paired(variant) is None:
            cells += ["static not run at its seeds", "", "", ""]
        else:
            cells += [f"{row['difference']:+.4f}", ends_of(row["seeds_low"], row["seeds_high"]) or "one seed"]
            cells += [ends_of(row["documents_low"], row["documents_high"])]
            cells += [f"{LOSS_REPORTED[variant]:+.4f}" if variant in LOSS_REPORTED else ""]
        rows.append(cells)
    return grid(columns, rows)


def longer_texts(suite: Suite) -> Finding:
    """The same models on texts longer than those they were trained on."""
    title = "Beyond the training length"
    table, parts = [], {}
    for variant in VARIANTS:
        rows = [row for row in (suite.loss(variant, contexts) for contexts in (1, 2, 4)) if row is not None]
        if not rows:
            continue
        known = suite.paired(variant) is not None
        cells = [f"{row['loss']:.4f}" + (f" ({row['difference']:+.4f})" if known else "") for row in rows]
        found = suite.differences(variant, contexts=4).get("all")
        table.append([NAMES[variant], _seeds(rows[0]), *cells, found.text("+.3f") if found and known else ""])
        if found is not None and variant != "static":
            parts[variant] = f"{NAMES[variant]} {found.text('+.3f')}"
    ours = ", ".join(parts[variant] for variant in ("shared", "per_layer") if variant in parts)
    others = {name: Suite(suite.results, name) for name in (*CODE.values(), "paper") if suite.name in CODE}
    found_there = {name: own.differences("per_layer", contexts=4).get("all") for name, own in others.items()}
    there = [f"in `{name}` {found.text('+.3f')}" for name, found in found_there.items() if found]
    elsewhere = f"Per layer, at four contexts, {', '.join(there)}." if there else ""
    return Finding(
        title,
        "nothing: said to be missing.",
        "new" if ours else "untested",
        f"At four times the training context the loss differs from static RoPE's, over seeds, by: {ours} nats per byte."
        if ours
        else "Not run yet.",
        "no figure to compare with: an observation of its own, on the same bytes at every length; in brackets the "
        "difference to static at the same seeds.",
        [grid(["increments", "seeds", "1 context", "2 contexts", "4 contexts", "difference at 4"], table), elsewhere],
        [suite.results.path("heldout")],
        ours=ours or "none",
        control=parts.get("constant", "none"),
        power=f"{len(parts)} intervals." if parts else "",
    )


def frozen_increments(suite: Suite) -> Finding:
    """Increments of a trained model, given to fresh weights as a table."""
    title = "Frozen increments do as well as learned ones"
    found = {other: suite.differences("frozen", other).get("all") for other in ("static", "shared")}
    costs = [each for each in found.values() if each is not None]
    verdict, sentence = _not_run("frozen", suite)
    ours = "none"
    if len(costs) == 2:
        verdict = judge_cost(costs, NEUTRAL)
        ours = ", ".join(f"minus {other} {each.text('+.4f')}" for other, each in found.items() if each is not None)
        sentence = f"With the table that shared learned, fresh weights differ in loss by: {ours} nats per byte."
    swapped = suite.differences("swapped").get("all")
    control = f"letters and space swapped, minus static {swapped.text('+.4f')}" if swapped else "none"
    if swapped:
        sentence += f" A wrong table does as well ({control}): what the table says does not show in the loss."
    return Finding(
        title,
        "1.802 against 1.803 trained jointly and 1.803 of RoPE (another corpus, nats per token).",
        verdict,
        sentence,
        f"a cost, its limit {NEUTRAL} nats per byte: over static and over shared. The fresh weights start from the "
        "seed, and see the data order, of the shared model that the table is from.",
        [],
        [name for variant in ("frozen", "shared", "static") for name in suite.files(variant, "heldout")],
        ours=ours,
        control=control,
        power=_cost_power(costs),
    )


def order_by_chance(kinds: int) -> float:
    """The rank correlation that 95% of all orders of so many kinds stay at or below.

    >>> round(order_by_chance(4), 2)
    0.8
    """
    ranks = np.arange(kinds)
    orders = np.array(list(permutations(range(kinds))), dtype=np.int8)
    squares = ((orders - ranks) ** 2).sum(1)
    return float(np.quantile(1 - 6 * squares / (kinds * (kinds**2 - 1)), 0.95, method="higher"))


def kinds_of_bytes(variant: str, reported: dict[str, float], title: str) -> Callable[[Suite], Finding]:
    """Mean increments by kind of byte, in the order that was reported?"""

    def find(suite: Suite) -> Finding:
        tables = {
            seed: table[table["layer"] == 0].set_index("kind") for seed, table in suite.tables(variant, "kinds").items()
        }
        kinds = list(reported)
        rule = (
            f"by the rank correlation of mean increments with the {len(kinds)} reported: asked is {ORDERED}, the "
            f"smallest that counts {SOMEWHAT_ORDERED}."
        )
        said = ", ".join(f"{kind} {value:.2f}" for kind, value in reported.items()) + "."
        if not tables:
            return Finding(title, said, *_not_run(variant, suite), rule)
        rows = []
        for kind in kinds:
            cells = [with_interval(table.loc[kind], "mean", ".2f") for table in tables.values()]
            rows.append([kind, f"{reported[kind]:.2f}", *cells])
        ranks = [float(stats.spearmanr([*reported.values()], t.loc[kinds, "mean"]).statistic) for t in tables.values()]
        found, n = over_seeds(ranks, (-1, 1)), next(iter(tables.values()))["n"].sum()
        each = ", ".join(f"{rank:+.2f}" for rank in ranks)
        ours = f"rank correlation {found.text('+.2f')}; by seed {each}"
        control = f"95% of all orders reach at most {order_by_chance(len(kinds)):+.2f}"
        sentence = (
            f"The order of kinds agrees with the reported one at a {ours} ({_count_seeds(found.n)}; {n:,} bytes, "
            f"{len(kinds)} kinds). By chance {control}."
        )
        blocks: list[Block] = [
            grid(["kind", "reported", *(f"seed {seed}" for seed in tables)], rows),
            f"Means and intervals over documents, {n:,} bytes of held-out English and Chinese.",
        ]
        told = min(seen(found, SOMEWHAT_ORDERED), 1)
        power = f"a correlation of {told:.2f} would have counted." if found.n > 1 else ""
        call = judge(found, ORDERED, SOMEWHAT_ORDERED)
        files, beside = suite.files(variant, "kinds"), {"ours": ours, "control": control, "power": power}
        return Finding(title, said, call, sentence, rule, blocks, files, None, **beside)

    return find


def word_boundaries(suite: Suite) -> Finding:
    """Layers above 0 know Chinese word boundaries."""
    title = "Middle layers know Chinese word boundaries"
    rule = (
        f"by the distance from 0.5 of the area under the ROC curve, of the layer above 0 where it is largest, against "
        f"human segmentation and within the first byte of the next character (any order of these bytes has an area of "
        f"its own): asked is {KNOWN}, the smallest that counts {KNOWN_A_LITTLE}. The largest of several layers is "
        "somewhat above what one layer would have."
    )
    reported = BOUNDARIES_REPORTED
    tables = suite.tables("per_layer", "boundaries")
    if not tables:
        return Finding(title, reported, *_not_run("per_layer", suite), rule)
    everyone = {(v, s): t for v in VARIANTS for s, t in suite.tables(v, "boundaries").items()}
    first = next(iter(tables.values()))
    information = areas(first, "mutual information").iloc[0]
    note = (
        f"{information['n']:,} gaps between two Chinese characters in {information['lines']:,} held-out lines; "
        f"intervals resample lines. Counted in the training text: the mutual information of both characters, of which "
        f"an increment has not seen the second, {information['auc']:.3f}"
    )
    within = {seed: areas(table, "within token") for seed, table in tables.items()}
    if any(table.empty for table in within.values()):
        best = ", ".join(f"{areas(t)[areas(t)['layer'] > 0]['auc'].max():.3f}" for t in tables.values())
        sentence = f"Not measured within lead bytes here; with them the best layer above 0 has {best} (by seed)."
        blocks: list[Block] = [_areas_by_layer(everyone), f"{note}."]
        return Finding(title, reported, "untested", sentence, rule, blocks, [suite.results.path("boundaries")])
    above = {seed: table[table["layer"] > 0]["auc"] for seed, table in within.items()}
    found = _farthest_from_chance(above.values())
    entropy = areas(first, "branching entropy")["auc"].iloc[0]
    ends = f"{min(auc.min() for auc in above.values()):.3f} to {max(auc.max() for auc in above.values()):.3f}"
    ours = f"AUC within a lead byte {ends} over layers and seeds; largest distance from 0.5 {_each_seed(found)}"
    control = _boundary_control(first, within)
    call = judge(found, KNOWN, KNOWN_A_LITTLE)
    power = f"a distance of {seen(found, KNOWN_A_LITTLE):.3f} would have counted."
    power += f" {sum(map(len, above.values()))} areas above layer 0.{_would_decide(found, KNOWN_A_LITTLE, call)}"
    beyond = sum(_is_beyond(table) for table in within.values())
    blocks = [
        _areas_by_layer(everyone),
        f"{note}; of the one before alone, {entropy:.3f}. What a probe of the residual stream knows there is the first "
        "of [four questions](docs/findings-questions.md). Rows of a first byte compare gaps before the same one only.",
        *_boundaries_of_others(suite),
    ]
    return Finding(
        title,
        reported,
        call,
        f"Over {information['n']:,} gaps: {ours} ({_count_seeds(found.n)}). The interval of that layer over lines lies "
        f"beyond {KNOWN_A_LITTLE} at {beyond} of {found.n} seeds. Beside it: {control}.",
        rule,
        blocks,
        [suite.results.path("boundaries"), *suite.files("per_layer", "treebank")],
        ours=ours,
        control=control,
        power=power if found.n > 1 else "",
    )


def _farthest_from_chance(areas: Iterable["pd.Series[Any]"]) -> Estimate:
    """How far the area of some layer lies from 0.5 at most, over seeds; an entry has the areas of one seed."""
    return over_seeds([float((auc - 0.5).abs().max()) for auc in areas])


def _each_seed(found: Estimate) -> str:
    """The mean over seeds with its interval, and the value of each."""
    return f"{found.text('.3f')}, by seed {', '.join(f'{value:.3f}' for value in found.values)}"


def _boundaries_of_others(suite: Suite) -> list[Block]:
    """What increments and a probe tell of word boundaries in text that others wrote and segmented."""
    tables = suite.tables("per_layer", "treebank")
    if not tables:
        return []

    def farthest(measure: str) -> str:
        of_measure = (table[(table["measure"] == measure) & (table["layer"] > 0)] for table in tables.values())
        return _each_seed(_farthest_from_chance(own["within"] for own in of_measure))

    first = next(iter(tables.values())).iloc[0]
    return [
        f"In other people's text, segmented by other people ({first['text']}: {first['n']:,} gaps in "
        f"{first['lines']:,} sentences that no model was trained on), the area within a first byte lies at most so far "
        f"from 0.5, over the layers above 0: of increments {farthest('increment')}; of a probe of the residual stream "
        f"that they read {farthest('probe')}; with labels shuffled {farthest('increment, labels shuffled')} and "
        f"{farthest('probe, labels shuffled')}. [Which text](docs/measurements.md#other-peoples-segmentation)."
    ]


def _boundary_control(table: pd.DataFrame, within: dict[int, pd.DataFrame]) -> str:
    """What lead bytes alone, layer 0 and a statistic of the text reach."""
    order = areas(table, "best order of tokens")["auc"].iloc[0]
    layer_0 = max(abs(float(own[own["layer"] == 0]["auc"].iloc[0]) - 0.5) for own in within.values())
    return (
        f"lead bytes alone, in any order, {1 - order:.3f} to {order:.3f}; layer 0 within one, off by {layer_0:.3f}; "
        f"branching entropy after the character before {areas(table, 'branching entropy')['auc'].iloc[0]:.3f}"
    )


def _is_beyond(within: pd.DataFrame) -> bool:
    """Whether some layer above 0 has its whole interval over lines beyond the smallest distance that counts."""
    above = within[within["layer"] > 0]
    return bool((np.maximum(above["low"] - 0.5, 0.5 - above["high"]) > KNOWN_A_LITTLE).any())


def _areas_by_layer(tables: dict[tuple[str, int], pd.DataFrame]) -> pd.DataFrame:
    """The areas under the ROC curve of every run, by layer and by who segmented the words."""
    columns: list[str] = []
    rows = []
    kinds = (("human", "increment", "people"), ("human", "within token", "people, one first byte"))
    for (variant, seed), table in tables.items():
        for words, measure, name in (*kinds, ("jieba", "increment", "jieba")):
            own = areas(table, measure, words).set_index("layer")
            if own.empty:
                continue
            columns = columns or ["run", "words by", *(f"layer {layer:.0f}" for layer in own.index)]
            cells = [with_interval(row, "auc", ".3f") for _, row in own.iterrows()]
            rows.append([f"{variant}-{seed}", name, *cells, *[""] * (len(columns) - 2 - len(cells))])
    return grid(columns, rows)


def two_word_names(suite: Suite) -> Finding:
    """The space inside a name is shorter than in the reversed name, beyond what frequency explains."""
    tables = suite.tables("per_layer", "names")
    rule = (
        f"by the share of families of names that are nearer in the real order by more than ordinary pairs of words as "
        f"frequent, mean over layers 2 and above, less a half: asked is {PULLED}, the smallest that counts "
        f"{PULLED_A_LITTLE}. At the space a model of bytes has read the first word alone."
    )
    reported = (
        "no effect in layers 0 and 1; smaller for the real order in layers 2 to 5 (61 to 82% of 82 names, p from 4e-2 "
        "to 6e-10); no control for frequency."
    )
    title = "Two-word names are pulled together"
    if not tables:
        return Finding(title, reported, *_not_run("per_layer", suite), rule)
    groups = ("names", "ordinary pairs", "names - ordinary pairs")
    rows = []
    shares: dict[str, list[float]] = {group: [] for group in groups}
    for seed, table in tables.items():
        by = table.set_index(["group", "layer"])
        for layer in table["layer"].unique():
            cells = []
            for group in groups:
                row = by.loc[(group, layer)]
                cells.append(f"{with_interval(row, 'difference', '+.4f')}, {row['smaller']:.0%}, q = {row['q']:.2g}")
            rows.append([f"per_layer-{seed}", str(layer), *cells])
        for group in groups:
            own = table[(table["group"] == group) & (table["layer"] > 1)]
            shares[group].append(float(own["smaller"].mean()) - 0.5)
    n = next(iter(tables.values())).groupby("group")["families"].first()
    found, names, pairs = (over_seeds(shares[group]) for group in (groups[2], groups[0], groups[1]))
    blocks: list[Block] = [
        grid(["run", "layer", "names", "ordinary pairs", "names beyond pairs"], rows),
        f"Increment at the inner space, real order minus reversed, mean over families of pairs that share words "
        f"({n['names']} of names, {n['ordinary pairs']} of ordinary pairs; five carriers), t interval over families; "
        "share that is nearer in the real order; Wilcoxon signed-rank test over families, q over the layers of a seed. "
        f"{len(rows) * 3} tests.",
    ]
    ours = f"beyond pairs {_half(found)} of {n['names - ordinary pairs']} families; names alone {_half(names)}"
    control = f"ordinary pairs as frequent {_half(pairs)}"
    call = judge(found, PULLED, PULLED_A_LITTLE)
    power = f"a share of {0.5 + seen(found, PULLED_A_LITTLE):.0%} would have counted." if found.n > 1 else ""
    power += _would_decide(found, PULLED_A_LITTLE, call)
    return Finding(
        title,
        reported,
        call,
        f"Nearer in the real order are, over layers 2 and above, {ours} ({_count_seeds(found.n)}); {control}.",
        rule,
        blocks,
        suite.files("per_layer", "names"),
        ours=ours,
        control=control,
        power=power,
    )


def _half(found: Estimate) -> str:
    """A share that was kept less a half, in percent."""
    return over_seeds([value + 0.5 for value in found.values], (0, 1)).text(".1%")


def code_delimiters(suite: Suite) -> Finding:
    """In program text a middle layer marks scope, in models that were trained on program text."""
    rule = (
        "of models trained on program text, as the report's were: by how many times the mean of its layer newlines or "
        f"brackets have, in the layer above 0 and of the two kinds where it is most; geometric mean over seeds, asked "
        f"is {MARKED}, the smallest that counts {MARKED_A_LITTLE}. The largest of several is above what one would have."
    )
    reported = "a middle layer marks scope delimiters (newline and bracket about 8, the rest about 1)."
    title = "Layers specialise on program text"
    code = Suite(suite.results, CODE[suite.name]) if suite.name in CODE else None
    tables = code.tables("per_layer", "kinds_code") if code else {}
    if not tables or code is None:
        sentence = "These models never saw program text, and none were trained on it alike."
        return Finding(title, reported, "untested", sentence, rule)
    rows, largest, others = [], [], []
    for seed, table in tables.items():
        above = table[table["layer"] > 0]
        scope = above["kind"].isin(["newline", "bracket"])
        largest.append(float(above[scope]["relative"].max()))
        others.append(float(above[~scope]["relative"].max()))
        for layer, own in table.groupby("layer"):
            by: Any = own.set_index("kind")
            top = own.sort_values("relative").iloc[-1]
            cells = [with_interval(by.loc[kind], "relative", ".2f", "relative_") for kind in ("newline", "bracket")]
            rows.append([f"per_layer-{seed}", str(layer), *cells, f"{top['kind']} {top['relative']:.2f}"])
    found, other = (over_seeds([float(np.log(value)) for value in values]) for values in (largest, others))
    ours = f"newline or bracket {_times(found)}"
    control = f"the largest of the other kinds {_times(other)}"
    power = ""
    if found.n > 1:
        told = float(np.exp(seen(found, float(np.log(MARKED_A_LITTLE)))))
        power = f"{told:.1f} times would have counted. {len(rows) * 2} means."
    return Finding(
        title,
        reported,
        judge(found, float(np.log(MARKED)), float(np.log(MARKED_A_LITTLE))),
        f"In models trained on Python the layer above 0 that marks them most has {ours} times its mean "
        f"({_count_seeds(found.n)}); {control}."
        + (" Other kinds stand out as much: that is no mark of scope." if other.high >= found.mean else ""),
        rule,
        [grid(["run", "layer", "newline", "bracket", "largest kind"], rows), "Times the mean of the layer."],
        code.files("per_layer", "kinds_code"),
        ours=ours,
        control=control,
        power=power,
    )


def _times(found: Estimate) -> str:
    """A mean of logarithms as a factor, with its interval."""
    if found.n < 2:
        return f"{np.exp(found.mean):.2f} (one seed)"
    return f"{np.exp(found.mean):.2f} ({np.exp(found.low):.2f} to {np.exp(found.high):.2f})"


def heads_look_back(suite: Suite) -> Finding:
    """Heads with larger increments look back less far."""
    tables = suite.tables("per_layer_per_head", "correlations")
    rule = (
        f"by the rank correlation of increment and look-back within layers, sign turned: asked is {LOOKS}, the "
        f"smallest that counts {LOOKS_A_LITTLE}. Over all heads there is no test, as layers differ in both."
    )
    reported = "Pearson -0.35, Spearman -0.48 over 48 heads."
    title = "Heads with larger increments look back less far"
    if not tables:
        return Finding(title, reported, *_not_run("per_layer_per_head", suite), rule)
    rows, within, values = [], [], []
    for seed, table in tables.items():
        for row in table.to_dict("records"):
            interval = with_interval(row, "correlation", "+.2f")
            p = "" if pd.isna(row["p"]) else format(row["p"], ".2g")
            rows.append([f"per_layer_per_head-{seed}", f"{row['n']} {row['scope']}", row["measure"], interval, p])
        rank: Any = table[table["measure"] == "spearman"].set_index("scope")
        within.append(-float(rank.loc["within layers", "correlation"]))
        overall = with_interval(rank.loc["heads"], "correlation", "+.2f")
        values.append(
            f"{overall} over all {rank.loc['heads', 'n']} heads, "
            f"{with_interval(rank.loc['within layers'], 'correlation', '+.2f')} within layers"
        )
    found = over_seeds(within, (-1, 1))
    call = judge(found, LOOKS, LOOKS_A_LITTLE)
    power = f"a correlation of {seen(found, LOOKS_A_LITTLE):.2f} would have counted." if found.n > 1 else "one seed."
    power += _would_decide(found, LOOKS_A_LITTLE, call)
    blocks: list[Block] = [grid(["run", "scope", "measure", "correlation", "p"], rows)]
    return Finding(
        title,
        reported,
        call,
        f"The rank correlation is {'; '.join(values)}.",
        rule,
        blocks,
        suite.files("per_layer_per_head", "correlations"),
        ours="; ".join(values),
        control="none",
        power=power,
    )


def caps(suite: Suite) -> Finding:
    """How much sits at the cap of 10, and what a cap of 30 and signed increments change."""
    title = "Some layers sit at the cap"
    rule = (
        f"by the share of its increments that the layer nearest to the cap has there, at every seed: asked is "
        f"{CAPPED}, the smallest that counts {CAPPED_A_LITTLE}."
    )
    reported = (
        "some layers sit at the cap of 10; no cap above it was tried; of signed increments almost none is negative."
    )
    tables = suite.tables("per_layer", "saturation")
    if not tables:
        return Finding(title, reported, *_not_run("per_layer", suite), rule)
    rows, extra, files = [], [], suite.files("per_layer", "saturation")
    for variant in ("per_layer", "per_layer_per_head", "cap_30"):
        for seed, table in suite.tables(variant, "saturation").items():
            for row in table.to_dict("records"):
                interval = f"{with_interval(row, 'share', '.1%')} of {row['cap']:g}"
                rows.append([f"{variant}-{seed}", str(row["layer"]), interval, f"{row['max']:.2f}"])
            if variant == "cap_30":
                extra.append(f"with the cap at 30 {table['share'].max():.0%} (seed {seed})")
    for seed, table in suite.tables("signed", "below_zero").items():
        extra.append(f"of signed increments at most {table['share'].max():.1%} of a layer's below 0 (seed {seed})")
        files += suite.files("signed", "below_zero")
    shares = {seed: float(table["share"].max()) for seed, table in tables.items()}
    largest = ", ".join(f"{table['max'].max():.1f}" for table in tables.values())
    found = over_seeds([*shares.values()], (0, 1))
    each = ", ".join(f"{share:.0%}" for share in shares.values())
    ours = f"largest share of a layer {each} (by seed)"
    control = f"largest increment {largest} of 10 (by seed)"
    call = judge(found, CAPPED, CAPPED_A_LITTLE)
    power = f"a mean share of {seen(found, CAPPED_A_LITTLE):.0%} would have counted." if found.n > 1 else "one seed."
    power += _would_decide(found, CAPPED_A_LITTLE, call)
    return Finding(
        title,
        reported,
        call,
        f"At the cap of 10: {ours}; {control}." + (f" Beside it: {'; '.join(extra)}." if extra else ""),
        rule,
        [grid(["run", "layer", "share at the cap", "largest"], rows)],
        files,
        ours=ours,
        control=control,
        power=power,
    )


ABLATIONS = {
    "1.0": "to 1.0",
    "mean": "to the mean",
    "best constant": "to the best constant tried",
    "token": "to the token's mean",
    "shuffle": "shuffled",
}


def what_increments_cause(suite: Suite) -> Finding:
    """What the loss needs of each layer's increments: their scale, the identity of the token, or more."""
    tables = suite.tables("per_layer", "ablation")
    rule = (
        "no figure to compare with. What the mean costs may be scale; what the best constant tried costs (of "
        f"{', '.join(f'{constant:g}' for constant in CONSTANTS)}, found in little training text: the mean may be "
        "better) is structure; what the "
        "token's mean costs is more than identity, which layer 0 cannot know; a shuffle gives every increment to "
        "another token."
    )
    reported = "nothing: no increment was ablated, patched or frozen in the trained models."
    title = "What increments cause"
    if not tables:
        return Finding(title, reported, *_not_run("per_layer", suite), rule)
    rows = []
    for seed, table in tables.items():
        groups: Any = table.groupby(["corpus", "layer"], sort=False)
        for (corpus, layer), own in groups:
            by: Any = own.set_index(own["to"].astype(str))
            cells = [with_interval(by.loc[to], "change", "+.4f") if to in by.index else "" for to in ABLATIONS]
            rows.append([f"per_layer-{seed}", corpus, str(layer), *cells])
    n = next(iter(tables.values())).groupby("corpus")["documents"].first()
    parts = {to: _cost_of(tables, "0", to) for to in (*CAUSES, "shuffle")}
    identity = _cost_of(tables, "all", "token")
    ours = "; ".join(
        f"{corpus.capitalize()}, layer 0: "
        + ", ".join(f"{ABLATIONS[to]} {parts[to][corpus].text('+.3f')}" for to in CAUSES if corpus in parts[to])
        for corpus in parts["mean"]
    )
    control = "; ".join(
        f"{corpus.capitalize()}: the token's mean in all layers {identity[corpus].text('+.3f')}, layer 0 shuffled "
        f"{parts['shuffle'][corpus].text('+.3f')}"
        for corpus in identity
    )
    layers = next(iter(tables.values()))["layer"].astype(str)
    some = layers[layers != "all"].nunique()
    cannot = "cannot reach p = 0.05" if some < 5 else "reach p = 0.05 only from about 0.9 on"
    blocks: list[Block] = [
        grid(["run", "text", "layer", *ABLATIONS.values()], rows),
        "Change of loss in nats per predicted byte with the increments of a layer replaced, intervals over documents "
        f"({', '.join(f'{count} {corpus}' for corpus, count in n.items())}). {len(rows) * len(ABLATIONS)} intervals. "
        f"No rank correlation of looks and causes is given: over the {some} layers of a seed it would {cannot}.",
    ]
    return Finding(
        title,
        reported,
        "new",
        f"In nats per byte, over seeds ({len(tables)}): {ours}. Beside it: {control}.",
        rule,
        blocks,
        suite.files("per_layer", "ablation"),
        ours=ours,
        control=control,
    )


CAUSES = ("mean", "best constant")


def _cost_of(tables: dict[int, pd.DataFrame], layer: str, to: str) -> dict[str, Estimate]:
    """What an ablation of a layer, or of all, costs over seeds, by corpus; nothing where it was not measured."""
    values: dict[str, list[float]] = {}
    for table in tables.values():
        own = table[(table["layer"].astype(str) == layer) & (table["to"].astype(str) == to)]
        for row in own.to_dict("records"):
            values.setdefault(row["corpus"], []).append(float(row["change"]))
    return {corpus: over_seeds(each) for corpus, each in values.items()}


def grafts(suite: Suite) -> Finding:
    """A graft on a pretrained model costs nothing."""
    title = "A graft on a pretrained model costs nothing"
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "graft.json"
    runs = json.loads(path.read_text("utf-8"))["runs"]
    parts = []
    for run in runs.values():
        found = run["difference_of_documents"]
        parts.append(
            f"{run['config']['positions']['source'].replace('_', ' ')} {found['mean']:+.4f} ({found['low']:+.4f} to "
            f"{found['high']:+.4f}, {found['documents']} documents)"
        )
    above = [run["difference_of_documents"]["low"] > NEUTRAL for run in runs.values()]
    means = [layer["mean"] for run in runs.values() for layer in run["increments"]]
    ours = f"{'; '.join(parts)}; one seed"
    between = f"a layer's mean increment lies between {min(means):.2f} and {max(means):.2f}"
    return Finding(
        title,
        "+0.001 nats against the paired baseline on SmolLM2-1.7B with LoRA, 2,000 steps; increments move by 1 to 3%.",
        "contrary" if any(above) else "undecided",
        f"On SmolLM2-135M with its weights frozen, 300 steps, nats per token: {ours}; {between}.",
        f"a cost, its limit {NEUTRAL} nats per token; with one seed it is undecided, but where an interval over "
        "documents lies above the limit. How far increments move is not judged: here the base is frozen, and another.",
        [],
        ["benchmarks/graft.json"],
        ours=ours,
        control="none",
        power="To decide: three seeds.",
    )


FINDINGS: tuple[Callable[[Suite], Finding], ...] = (
    loss_neutral,
    longer_texts,
    frozen_increments,
    kinds_of_bytes("shared", SHARED_REPORTED, "Shared increments by kind of byte"),
    kinds_of_bytes("per_layer", LAYER_0_REPORTED, "Layer 0 by kind of byte"),
    word_boundaries,
    two_word_names,
    code_delimiters,
    heads_look_back,
    caps,
    what_increments_cause,
    grafts,
)


def areas(table: pd.DataFrame, measure: str = "increment", words: str = "human") -> pd.DataFrame:
    """The rows of a table of boundaries for one measure and one segmentation."""
    return table[(table["measure"] == measure) & (table["words"] == words)]


def paired_seeds(row: Any) -> int:
    """How many seeds of a row of the loss table static has too."""
    return 0 if pd.isna(row["seeds"]) else len(str(row["seeds"]).split())


def _not_run(variant: str, suite: Suite) -> tuple[Call, str]:
    if gone := suite.diverged(variant):
        return "contrary", f"The variant {variant} diverged: {gone}."
    return "untested", f"The variant {variant} has not been run and measured here; three seeds would do."


def _seeds(row: Any) -> str:
    """How many seeds a row has, and how many of them static has too."""
    paired = paired_seeds(row)
    return f"{row['n_seeds']}" + (f" ({paired} paired)" if paired and paired != row["n_seeds"] else "")


def _count_seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def ends_of(low: float, high: float) -> str:
    """The ends of the interval of a difference; nothing without one."""
    return "" if np.isnan(low) else f"{low:+.4f} to {high:+.4f}"
