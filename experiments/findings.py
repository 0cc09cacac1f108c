"""What was reported, what was found, and the verdict: a function a finding, from the results of a suite.

The rule of each verdict stands in RESULTS.md beside it. When the rules were first written, one run (tiny,
per_layer-0) and the grafts had been measured; they were made stricter once after that.

Reported figures: Long, "How Far Apart Does a Model Think Its Tokens Are?" (2026), one seed each, 6.4M parameters.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy import stats

from lens_positions.terminal import with_interval
from lens_positions.training.schema import RunResults

from .markdown import grid
from .options import VARIANTS
from .suite import diverged_at, loss_table, paired_difference, scores_by_seed
from .tables import Tables

Verdict = Literal["reproduced", "not reproduced", "different", "undecided", "new", "not measured"]

Block = pd.DataFrame | str
"""A table of a finding, or a paragraph."""

NEUTRAL = 0.01
"""Nats per byte (of the graft: per token): a cost whose whole interval is below it does not matter at this size."""

SMALLEST = 0.01
"""The smallest share of an increment by which names must be nearer to count."""

NEEDED = 0.005
"""Nats per byte: what an ablation must cost, with its whole interval, for the loss to need what it takes away."""

ABOVE_CHANCE = 0.55
"""The area under the ROC curve from which a layer is said to know word boundaries."""

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


@dataclass(frozen=True)
class Finding:
    """One finding: what was reported, what was found, and what to make of both."""

    title: str
    reported: str
    verdict: Verdict
    sentence: str
    rule: str
    blocks: list[Block] = field(default_factory=list)  # tables, and paragraphs
    files: list[str] = field(default_factory=list)
    figure: tuple[str, str, Callable[[Path], object]] | None = None  # its name, what it shows, and what draws it


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
        """The loss of a variant minus another's, as `paired_difference`; None without a seed that both have."""
        ours, theirs = (scores_by_seed(self.results, self.name, own) for own in (variant, other))
        seeds = [seed for seed in ours if seed in theirs]
        if not seeds:
            return None
        shortest = min(ours[seeds[0]].index.unique("length"))
        size = ours[seeds[0]].loc[shortest, "bytes"].to_numpy()
        by_seed = [ours[seed].loc[shortest, "nats"] - theirs[seed].loc[shortest, "nats"] for seed in seeds]
        return paired_difference(np.stack(by_seed, axis=1), size)

    def loss(self, variant: str, contexts: int = 1) -> "pd.Series[Any] | None":
        """The row of the loss table for a variant, read in pieces of so many training contexts; None without one."""
        rows = self.losses[self.losses["variant"] == variant]
        if rows.empty or rows["loss"].isna().all():
            return None
        return rows[rows["length"] == rows["length"].min() * contexts].iloc[0]


def loss_neutral(suite: Suite) -> Finding:
    """Learned increments cost no loss."""
    both = {variant: suite.paired(variant) for variant in ("shared", "per_layer")}
    gone = "; ".join(
        f"{NAMES[variant]} diverged: {suite.diverged(variant)}" for variant in both if suite.diverged(variant)
    )
    rows = {variant: row for variant, row in both.items() if row is not None and not np.isnan(row["seeds_high"])}
    verdict: Verdict = "not measured"
    sentence = "Shared and per layer have not been run at two seeds of static yet."
    if len(rows) == 2:
        if max(row["seeds_high"] for row in rows.values()) <= NEUTRAL and not gone:
            verdict = "reproduced"
        elif max(row["seeds_low"] for row in rows.values()) > NEUTRAL:
            verdict = "not reproduced"
        else:
            verdict = "undecided"
        each = " and ".join(
            f"{NAMES[variant]} {row['difference']:+.4f} ({ends_of(row['seeds_low'], row['seeds_high'])}, "
            f"{paired_seeds(row)} seeds)"
            for variant, row in rows.items()
        )
        sentence = f"Against static RoPE at the same seeds the loss differs by {each} nats per byte."
    return Finding(
        "Learned increments cost no loss",
        "differences to RoPE of -0.0006 (shared) to -0.0052 (per layer, per head) nats per byte; one seed each.",
        verdict,
        sentence + (f" {gone}." if gone else ""),
        f"reproduced where the intervals over seeds of shared and per layer end below {NEUTRAL} nats per byte (a gain "
        "is no cost) and no seed of theirs diverged; not reproduced where one lies wholly above; undecided otherwise.",
        [
            losses(suite),
            "A difference, and its intervals, are over the seeds that static has too; losses over all seeds of a row.",
        ],
        [suite.results.path("heldout")],
    )


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
    table, worse = [], []
    for variant in VARIANTS:
        rows = [row for row in (suite.loss(variant, contexts) for contexts in (1, 2, 4)) if row is not None]
        if not rows:
            continue
        known = suite.paired(variant) is not None
        cells = [f"{row['loss']:.4f}" + (f" ({row['difference']:+.4f})" if known else "") for row in rows]
        table.append([NAMES[variant], _seeds(rows[0]), *cells])
        last = suite.paired(variant, 4)
        if variant in ("shared", "per_layer") and last is not None:
            unit = "documents" if np.isnan(last["seeds_low"]) else "seeds"
            low, high = last[f"{unit}_low"], last[f"{unit}_high"]
            worse.append(f"{NAMES[variant]} {last['difference']:+.3f} ({low:+.3f} to {high:+.3f} over {unit})")
    what = "; ".join(worse)
    return Finding(
        "Beyond the training length",
        "nothing: said to be missing.",
        "new" if worse else "not measured",
        f"At four times the training context the loss differs from static RoPE's by: {what}."
        if worse
        else "Not run yet.",
        "no figure to compare with: an observation of its own, on the same bytes at every length; in brackets the "
        "difference to static at the same seeds.",
        [grid(["increments", "seeds", "1 context", "2 contexts", "4 contexts"], table)],
        [suite.results.path("heldout")],
    )


def frozen_increments(suite: Suite) -> Finding:
    """Increments of a trained model, given to fresh weights as a table."""
    verdict: Verdict
    parts, ends = [], []
    for other in ("static", "shared"):
        found = suite.difference("frozen", other)
        if found is None:
            continue
        ends.append((found["documents_low"], found["documents_high"]))
        parts.append(f"{other} {found['difference']:+.4f} ({ends[-1][0]:+.4f} to {ends[-1][1]:+.4f})")
    if len(parts) < 2:
        verdict, sentence = _not_run("frozen", suite)
    else:
        if max(high for _, high in ends) <= NEUTRAL:
            verdict = "reproduced"
        else:
            verdict = "not reproduced" if max(low for low, _ in ends) > NEUTRAL else "undecided"
        sentence = f"With the table that shared learned, fresh weights differ in loss from {' and from '.join(parts)}."
    return Finding(
        "Frozen increments do as well as learned ones",
        "1.802 against 1.803 trained jointly and 1.803 of RoPE (another corpus, nats per token).",
        verdict,
        sentence,
        f"reproduced where the intervals over documents of the differences to static and to shared end below {NEUTRAL} "
        "nats per byte, not reproduced where one lies wholly above, undecided otherwise. The fresh weights start from "
        "the seed, and see the data order, of the shared model that the table is from.",
        [],
        [name for variant in ("frozen", "shared", "static") for name in suite.files(variant, "heldout")],
    )


def kinds_of_bytes(variant: str, reported: dict[str, float], title: str, where: str) -> Callable[[Suite], Finding]:
    """Mean increments by kind of byte, in the order that was reported?"""

    def find(suite: Suite) -> Finding:
        tables = {
            seed: table[table["layer"] == 0].set_index("kind") for seed, table in suite.tables(variant, "kinds").items()
        }
        kinds = list(reported)
        rule = (
            f"by the rank correlation of mean increments with the {len(kinds)} reported: reproduced where it is at "
            "least 0.7 at every seed, not reproduced where it is below 0.3 at every seed, different otherwise."
        )
        said = ", ".join(f"{kind} {value:.2f}" for kind, value in reported.items()) + "."
        if not tables:
            return Finding(title, said, *_not_run(variant, suite), rule)
        rows = []
        for kind in kinds:
            cells = [with_interval(table.loc[kind], "mean", ".2f") for table in tables.values()]
            rows.append([kind, f"{reported[kind]:.2f}", *cells])
        ranks = [float(stats.spearmanr([*reported.values()], t.loc[kinds, "mean"]).statistic) for t in tables.values()]
        verdict: Verdict = "different"
        if min(ranks) >= 0.7:
            verdict = "reproduced"
        elif max(ranks) < 0.3:
            verdict = "not reproduced"
        given = f"{', '.join(f'{rank:+.2f}' for rank in ranks)} ({_count_seeds(len(ranks))})"
        sentence = f"The order of kinds agrees with the reported one at a rank correlation of {given}."
        n = next(iter(tables.values()))["n"].sum()
        blocks: list[Block] = [
            grid(["kind", "reported", *(f"seed {seed}" for seed in tables)], rows),
            f"Means and intervals over documents, {n:,} bytes {where}.",
        ]
        return Finding(title, said, verdict, sentence, rule, blocks, suite.files(variant, "kinds"))

    return find


def word_boundaries(suite: Suite) -> Finding:
    """Middle layers know Chinese word boundaries, layer 0 and the shared source do not."""
    tables = {(v, s): t for v in VARIANTS for s, t in suite.tables(v, "boundaries").items()}
    rule = (
        f"reproduced where at every seed of per layer some layer above 0 has its whole interval above {ABOVE_CHANCE} "
        "(human segmentation) while layer 0 and shared stay within 0.05 of 0.5; different where some layer's interval "
        "lies outside that of its shuffled labels, on either side; not reproduced otherwise."
    )
    reported = (
        "against jieba, shared 0.50; per layer L0 0.50, L1 0.54, L2 0.68, L3 0.37, L4 0.63, L5 0.47 (a rerun: 0.52, "
        "0.53, 0.63, 0.41, 0.72, 0.41)."
    )
    title = "Middle layers know Chinese word boundaries"
    if not suite.tables("per_layer", "boundaries"):
        return Finding(title, reported, *_not_run("per_layer", suite), rule)
    known, beyond, at_chance, best = [], [], [], []
    for (variant, _), table in tables.items():
        own, shuffled = (areas(table, measure).set_index("layer") for measure in ("increment", "labels shuffled"))
        if variant == "per_layer":
            above = own[own.index > 0]
            known.append(bool((above["low"] > ABOVE_CHANCE).any()))
            outside = (above["low"] > shuffled["high"].loc[above.index]) | (
                above["high"] < shuffled["low"].loc[above.index]
            )
            beyond.append(bool(outside.any()))
            at_chance.append(abs(own["auc"].loc[0] - 0.5) <= 0.05)
            best.append(above["auc"].max())
        elif variant == "shared":
            at_chance.append(abs(own["auc"].iloc[0] - 0.5) <= 0.05)
    n = next(iter(tables.values())).iloc[0]
    statistic = areas([*tables.values()][-1], "mutual information")["auc"].iloc[0]  # of the text, not of a run
    note = (
        f"{n['n']:,} gaps between two Chinese characters in {n['lines']:,} held-out lines; intervals resample lines. "
        f"The mutual information of the two characters, from the training text, reaches {statistic:.3f}."
    )
    verdict: Verdict = "not reproduced"
    if all(known) and all(at_chance) and suite.tables("shared", "boundaries"):
        verdict = "reproduced"
    elif any(beyond):
        verdict = "different"
    largest = ", ".join(f"{auc:.3f}" for auc in best)
    sentence = (
        f"The best layer above 0 reaches an AUC of {largest} (by seed), where counting pairs of characters in the "
        f"training text reaches {statistic:.3f}."
    )
    files = [suite.results.path("boundaries")]
    return Finding(title, reported, verdict, sentence, rule, [_areas_by_layer(tables), note], files)


def _areas_by_layer(tables: dict[tuple[str, int], pd.DataFrame]) -> pd.DataFrame:
    """The areas under the ROC curve of every run, by layer and by who segmented the words."""
    columns: list[str] = []
    rows = []
    for (variant, seed), table in tables.items():
        for words in ("human", "jieba"):
            own = areas(table, words=words).set_index("layer")
            columns = columns or ["run", "words", *(f"layer {layer:.0f}" for layer in own.index)]
            cells = [with_interval(row, "auc", ".3f") for _, row in own.iterrows()]
            rows.append([f"{variant}-{seed}", words, *cells, *[""] * (len(columns) - 2 - len(cells))])
    return grid(columns, rows)


def two_word_names(suite: Suite) -> Finding:
    """The space inside a name is shorter than in the reversed name, beyond what frequency explains."""
    tables = suite.tables("per_layer", "names")
    rule = (
        f"reproduced where at every seed some layer is at least {SMALLEST:.0%} smaller in the real order of names "
        "(Wilcoxon, q < 0.05 over layers) and smaller by more than in ordinary pairs as frequent (the same test and "
        "size); different where names differ, however little and whichever way; not reproduced where they do not. At "
        "the space a model of bytes has read the first word alone."
    )
    reported = (
        "no effect in layers 0 and 1; smaller for the real order in layers 2 to 5 (61 to 82% of 82 names, p from 4e-2 "
        "to 6e-10); no control for frequency."
    )
    title = "Two-word names are pulled together"
    if not tables:
        return Finding(title, reported, *_not_run("per_layer", suite), rule)
    rows = []
    effects, beyond, differs = [], [], []
    for seed, table in tables.items():
        by = table.set_index(["group", "layer"])
        for layer in table["layer"].unique():
            cells = []
            for group in ("names", "ordinary pairs", "names - ordinary pairs"):
                row = by.loc[(group, layer)]
                cells.append(f"{with_interval(row, 'difference', '+.4f')}, {row['smaller']:.0%}, q = {row['q']:.2g}")
            rows.append([f"per_layer-{seed}", str(layer), *cells])
        sure = table[table["q"] < 0.05]
        size = by.loc["names"]["real"].abs() * SMALLEST
        found = sure[sure["difference"] < -sure["layer"].map(size)]
        effects.append(set(found.loc[found["group"] == "names", "layer"]))
        differs.append(bool((sure["group"] == "names").any()))
        beyond.append(effects[-1] & set(found.loc[found["group"] == "names - ordinary pairs", "layer"]))
    n = next(iter(tables.values())).groupby("group")["families"].first()
    blocks: list[Block] = [
        grid(["run", "layer", "names", "ordinary pairs", "names beyond pairs"], rows),
        f"Increment at the inner space, real order minus reversed, mean over families of pairs that share words "
        f"({n['names']} of names, {n['ordinary pairs']} of ordinary pairs; five carriers), t interval over families; "
        "share that is nearer in the real order; Wilcoxon signed-rank test over families.",
    ]
    verdict: Verdict = "not reproduced"
    if all(beyond):
        verdict = "reproduced"
    elif any(differs):
        verdict = "different"
    each = "; ".join(
        f"seed {seed}: layers {_some(effect)} nearer, of which {_some(more)} beyond ordinary pairs"
        for seed, effect, more in zip(tables, effects, beyond, strict=True)
    )
    return Finding(
        title, reported, verdict, f"In the real order, {each}.", rule, blocks, suite.files("per_layer", "names")
    )


def code_delimiters(suite: Suite) -> Finding:
    """In program text a middle layer marks scope."""
    tables = suite.tables("per_layer", "kinds_code")
    rule = (
        "reproduced where at every seed some layer above 0 puts newlines or brackets at least 1.5 times as far as its "
        "mean (whole interval); different where such a layer marks other kinds so; not reproduced otherwise. The "
        "models were trained on prose: their code is off the training distribution, unlike that of the report."
    )
    reported = "a middle layer marks scope delimiters (newline and bracket about 8, the rest about 1)."
    title = "Layers specialise on program text"
    if not tables:
        return Finding(title, reported, *_not_run("per_layer", suite), rule)
    rows = []
    marks, others = [], []
    for seed, table in suite.tables("per_layer", "specialisation").items():
        for row in table[table["corpus"] == "code"].to_dict("records"):
            cells = [
                f"{row[end]} {row[f'{end}_relative']:.2f} ({row[f'{end}_low']:.2f} to {row[f'{end}_high']:.2f})"
                for end in ("farthest", "nearest")
            ]
            share = f"{row['explained']:.0%} ({row['low']:.0%} to {row['high']:.0%}; shuffled {row['shuffled']:.0%})"
            rows.append([f"per_layer-{seed}", str(row["layer"]), share, *cells])
    for table in tables.values():
        above = table[(table["layer"] > 0) & (table["relative_low"] >= 1.5)]
        marks.append(bool(above["kind"].isin(["newline", "bracket"]).any()))
        others.append(len(above) > 0)
    verdict: Verdict = "reproduced" if all(marks) else "different" if any(others) else "not reproduced"
    found = sum(marks)
    sentence = f"A layer above 0 sets newlines or brackets apart at {found} of {len(marks)} seeds."
    blocks: list[Block] = [grid(["run", "layer", "explained by kind", "farthest", "nearest"], rows)]
    return Finding(
        title, reported, verdict, sentence, rule, blocks, suite.files("per_layer", "kinds_code", "specialisation")
    )


def heads_look_back(suite: Suite) -> Finding:
    """Heads with larger increments look back less far."""
    tables = suite.tables("per_layer_per_head", "correlations")
    rule = (
        "reproduced where at every seed the rank correlation over all heads is below 0, and that within layers too (p "
        "< 0.05 of permutations within layers; over all heads there is no test, as layers differ in both); different "
        "where only that over all heads is below 0; not reproduced otherwise."
    )
    reported = "Pearson -0.35, Spearman -0.48 over 48 heads."
    title = "Heads with larger increments look back less far"
    if not tables:
        return Finding(title, reported, *_not_run("per_layer_per_head", suite), rule)
    rows = []
    overall_below, within_below, values = [], [], []
    for seed, table in tables.items():
        for row in table.to_dict("records"):
            interval = with_interval(row, "correlation", "+.2f")
            p = "" if pd.isna(row["p"]) else format(row["p"], ".2g")
            rows.append([f"per_layer_per_head-{seed}", f"{row['n']} {row['scope']}", row["measure"], interval, p])
        rank = table[table["measure"] == "spearman"].set_index("scope")
        overall = rank.loc["heads"]
        values.append(with_interval(overall, "correlation", "+.2f"))
        within = rank.loc["within layers"]
        values[-1] += f" over all heads, {with_interval(within, 'correlation', '+.2f')} within layers"
        overall_below.append(bool(overall["correlation"] < 0))
        within_below.append(bool(within["correlation"] < 0 and within["p"] < 0.05))
    verdict: Verdict = "not reproduced"
    if all(overall_below):
        verdict = "reproduced" if all(within_below) else "different"
    sentence = f"The rank correlation is {'; '.join(values)}."
    blocks: list[Block] = [grid(["run", "scope", "measure", "correlation", "p"], rows)]
    return Finding(title, reported, verdict, sentence, rule, blocks, suite.files("per_layer_per_head", "correlations"))


def caps_and_signs(suite: Suite) -> Finding:
    """How much sits at the cap of 10, what a cap of 30 changes, and whether signed increments become negative."""
    at_cap, signs, files, rows = [], [], [], []
    for variant in ("per_layer", "per_layer_per_head", "cap_30"):
        files += suite.files(variant, "saturation")
        for seed, table in suite.tables(variant, "saturation").items():
            for row in table.to_dict("records"):
                interval = f"{with_interval(row, 'share', '.1%')} of {row['cap']:g}"
                rows.append([f"{variant}-{seed}", str(row["layer"]), interval, f"{row['max']:.2f}"])
            if variant == "per_layer":
                at_cap.append(table["share"].max())
    higher: list[Any] = [t.sort_values("share").iloc[-1] for t in suite.tables("cap_30", "saturation").values()]
    files += suite.files("signed", "below_zero")
    for seed, table in suite.tables("signed", "below_zero").items():
        for row in table.to_dict("records"):
            interval = f"{with_interval(row, 'share', '.1%')} below 0"
            rows.append([f"signed-{seed}", str(row["layer"]), interval, f"least {row['min']:.2f}"])
        signs.append(table["share"].max())
    verdict, sentence = _not_run("signed" if at_cap else "per_layer", suite)
    if at_cap and signs:
        verdict = "reproduced" if max(at_cap) > 0.1 and max(signs) < 0.05 else "different"
        sentence = (
            f"With the cap at 10 the layer nearest to it has {', '.join(f'{share:.0%}' for share in at_cap)} of its "
            f"increments there (by seed); of signed increments at most {max(signs):.1%} of a layer's are below 0."
        )
        if higher:
            shares = ", ".join(f"{row['share']:.0%} (layer {row['layer']:.0f})" for row in higher)
            sentence += f" With the cap at 30 the layer nearest to it has {shares}."
    return Finding(
        "Some layers sit at the cap, and almost no increment becomes negative",
        "some layers sit at the cap of 10; no cap above it was tried; signed increments were: almost none negative.",
        verdict,
        sentence,
        "reproduced where a layer has more than 10% of its increments at the cap and no layer has 5% below 0; "
        "different otherwise.",
        [grid(["run", "layer", "share at the cap", "largest"], rows)] if rows else [],
        files,
    )


def what_increments_cause(suite: Suite) -> Finding:
    """Which layers' increments the loss needs, and whether their looks predict it."""
    tables = suite.tables("per_layer", "ablation")
    rule = (
        f"no figure to compare with. A layer is needed where the interval of its ablation to the mean lies above "
        f"{NEEDED} nats per byte, and knows more than identity where that to the token's mean does; looks are the "
        "distance of a layer's AUC from 0.5, causes its ablation to the mean in Chinese, correlated by rank over the "
        "layers of a seed."
    )
    reported = "nothing: no increment was ablated, patched or frozen in the trained models."
    title = "What increments cause"
    if not tables:
        return Finding(title, reported, *_not_run("per_layer", suite), rule)
    needed, knows, relations, table_rows = [], [], [], []
    for seed, table in tables.items():
        looks, causes = [], []
        boundaries = suite.tables("per_layer", "boundaries").get(seed)
        groups: Any = table.groupby(["corpus", "layer"], sort=False)
        for (corpus, layer), rows in groups:
            by: Any = rows.set_index(rows["to"].astype(str))
            cells = [with_interval(by.loc[to], "change", "+.4f") for to in ("1.0", "mean", "shuffle", "token")]
            table_rows.append([f"per_layer-{seed}", corpus, str(layer), *cells])
            if layer == "all":
                continue
            if by.loc["mean", "low"] > NEEDED:
                needed.append(f"{layer} ({corpus}, seed {seed})")
            if by.loc["token", "low"] > NEEDED:
                knows.append(f"{layer} ({corpus}, seed {seed})")
            if corpus == "chinese" and boundaries is not None:
                own = areas(boundaries)
                looks.append(abs(float(own.loc[own["layer"] == int(layer), "auc"].iloc[0]) - 0.5))
                causes.append(float(by.loc["mean", "change"]))
        if len(looks) > 2:
            relations.append(f"{stats.spearmanr(looks, causes).statistic:+.2f}")
    relation = ""
    if relations:
        relation = (
            f" How far a layer's AUC is from 0.5 goes with what its ablation costs at a rank correlation of "
            f"{', '.join(relations)} (seed by seed, over its few layers)."
        )
    sentence = (
        f"The loss needs which token gets which increment in layers {', '.join(needed) or 'none'}, and more than the "
        f"token's identity in {', '.join(knows) or 'none'}.{relation}"
    )
    blocks: list[Block] = [
        grid(["run", "text", "layer", "to 1.0", "to the mean", "shuffled", "to the token's mean"], table_rows),
        "Change of loss in nats per predicted byte with the increments of a layer replaced, intervals over documents.",
    ]
    return Finding(title, reported, "new", sentence, rule, blocks, suite.files("per_layer", "ablation", "boundaries"))


def grafts(suite: Suite) -> Finding:
    """A graft on a pretrained model costs nothing."""
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "graft.json"
    runs = json.loads(path.read_text("utf-8"))["runs"]
    parts = []
    for run in runs.values():
        found = run["difference_of_documents"]
        parts.append(
            f"{run['config']['positions']['source'].replace('_', ' ')} {found['mean']:+.4f} ({found['low']:+.4f} to "
            f"{found['high']:+.4f}, {found['documents']} documents)"
        )
    highs = [run["difference_of_documents"]["high"] for run in runs.values()]
    means = [layer["mean"] for run in runs.values() for layer in run["increments"]]
    return Finding(
        "A graft on a pretrained model costs nothing",
        "+0.001 nats against the paired baseline on SmolLM2-1.7B with LoRA, 2,000 steps; increments move by 1 to 3%.",
        "reproduced" if max(highs) <= NEUTRAL else "undecided",
        f"On SmolLM2-135M with its weights frozen, 300 steps, one seed, nats per token: {'; '.join(parts)}; a layer's "
        f"mean increment lies between {min(means):.2f} and {max(means):.2f}.",
        f"reproduced where every interval over documents ends below {NEUTRAL} nats per token; undecided otherwise. How "
        "far increments move is not judged: here the base is frozen, and another one.",
        [],
        ["benchmarks/graft.json"],
    )


FINDINGS: tuple[Callable[[Suite], Finding], ...] = (
    loss_neutral,
    longer_texts,
    frozen_increments,
    kinds_of_bytes("shared", SHARED_REPORTED, "Shared increments by kind of byte", "of held-out English and Chinese"),
    kinds_of_bytes("per_layer", LAYER_0_REPORTED, "Layer 0 by kind of byte", "of held-out English and Chinese"),
    word_boundaries,
    two_word_names,
    code_delimiters,
    heads_look_back,
    caps_and_signs,
    what_increments_cause,
    grafts,
)


def areas(table: pd.DataFrame, measure: str = "increment", words: str = "human") -> pd.DataFrame:
    """The rows of a table of boundaries for one measure and one segmentation."""
    return table[(table["measure"] == measure) & (table["words"] == words)]


def paired_seeds(row: Any) -> int:
    """How many seeds of a row of the loss table static has too."""
    return 0 if pd.isna(row["seeds"]) else len(str(row["seeds"]).split())


def _not_run(variant: str, suite: Suite) -> tuple[Verdict, str]:
    if gone := suite.diverged(variant):
        return "not reproduced", f"The variant {variant} diverged: {gone}."
    return "not measured", f"The variant {variant} has not been run and measured yet."


def _seeds(row: Any) -> str:
    """How many seeds a row has, and how many of them static has too."""
    paired = paired_seeds(row)
    return f"{row['n_seeds']}" + (f" ({paired} paired)" if paired and paired != row["n_seeds"] else "")


def _count_seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def ends_of(low: float, high: float) -> str:
    """The ends of the interval of a difference; nothing without one."""
    return "" if np.isnan(low) else f"{low:+.4f} to {high:+.4f}"


def _some(layers: set[int]) -> str:
    return ", ".join(map(str, sorted(layers))) or "none"
