"""What was reported, what was found, and the verdict: a function a finding, from the result files of a suite.

The rule of each verdict stands in RESULTS.md beside it. When the rules were written, one run (tiny, per_layer-0) had
been measured, and none of the others.

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

from .suite import VARIANTS, loss_table

Verdict = Literal["reproduced", "not reproduced", "different", "new", "not measured"]

NEUTRAL = 0.01
"""Nats per byte: a difference whose whole interval is smaller either way costs nothing that matters at this size."""

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
    lines: list[str] = field(default_factory=list)  # a table, or a list
    files: list[str] = field(default_factory=list)


class Suite:
    """The result files of a suite."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses = loss_table(folder)

    def runs(self, variant: str) -> dict[int, Path]:
        """The scored runs of a variant, by seed."""
        found = {path.parent.name.removeprefix(f"{variant}-"): path.parent for path in self.folder.glob("*/run.json")}
        return {int(seed): found[seed] for seed in sorted(found) if seed.isdecimal()}

    def tables(self, variant: str, name: str) -> dict[int, pd.DataFrame]:
        """A measurement of the runs of a variant, by seed."""
        folders = self.runs(variant).items()
        return {seed: pd.read_csv(path / f"{name}.csv") for seed, path in folders if (path / f"{name}.csv").is_file()}

    def files(self, variant: str, name: str) -> list[str]:
        """Where these tables are."""
        return [f"{self.folder}/{variant}-{seed}/{name}.csv" for seed in self.tables(variant, name)]

    def loss(self, variant: str, contexts: int = 1) -> "pd.Series[Any] | None":
        """The row of the loss table for a variant, read in pieces of so many training contexts; None without one."""
        rows = self.losses[self.losses["variant"] == variant]
        if rows.empty or rows["loss"].isna().all():
            return None
        return rows[rows["length"] == rows["length"].min() * contexts].iloc[0]


def loss_neutral(suite: Suite) -> Finding:
    """Learned increments cost no loss."""
    lines = [
        "| increments | seeds | loss, nats per byte | difference to static | over seeds | over documents | reported |",
        "|---|---|---|---|---|---|---|",
    ]
    judged: list[tuple[str, bool, float, bool]] = []
    for variant in VARIANTS:
        row = suite.loss(variant)
        if row is None:
            diverged = suite.losses.loc[suite.losses["variant"] == variant, "diverged"]
            lines.append(
                f"| {NAMES[variant]} | {'diverged: ' + diverged.iloc[0] if len(diverged) else 'not run'} | | | | | |"
            )
            continue
        reported = f"{LOSS_REPORTED[variant]:+.4f}" if variant in LOSS_REPORTED else ""
        difference = "" if variant == "static" else f"{row['difference']:+.4f}"
        over = "" if variant == "static" else _ends(row["seeds_low"], row["seeds_high"]) or "one seed"
        lines.append(
            f"| {NAMES[variant]} | {row['n_seeds']} | {row['loss']:.4f} | {difference} | {over} | "
            f"{_ends(row['documents_low'], row['documents_high'])} | {reported} |"
        )
        if variant in ("shared", "per_layer"):
            ends = [row["seeds_low"], row["seeds_high"]]
            judged.append((variant, bool(np.max(np.abs(ends)) <= NEUTRAL), row["difference"], row["n_seeds"] > 1))
    verdict: Verdict = "not measured"
    sentence = "Shared and per layer have not been run at two seeds yet."
    if len(judged) == 2 and all(several for _, _, _, several in judged):
        good = [neutral for _, neutral, _, _ in judged]
        verdict = "reproduced" if all(good) else "different" if any(good) else "not reproduced"
        each = " and ".join(f"{NAMES[name]} {difference:+.4f}" for name, _, difference, _ in judged)
        sentence = f"Against static RoPE at the same seeds the loss differs by {each} nats per byte."
    return Finding(
        "Learned increments cost no loss",
        "differences to RoPE of -0.0006 (shared) to -0.0052 (per layer, per head) nats per byte; one seed each.",
        verdict,
        sentence,
        f"reproduced where the intervals over seeds of shared and per layer lie within {NEUTRAL} nats per byte of 0; "
        "different where one of them does; not reproduced where neither does.",
        lines,
        [f"{suite.folder}/*/heldout.csv"],
    )


def longer_texts(suite: Suite) -> Finding:
    """The same models on texts longer than those they were trained on."""
    lines = ["| increments | seeds | 1 context | 2 contexts | 4 contexts |", "|---|---|---|---|---|"]
    worse = []
    for variant in VARIANTS:
        rows = [suite.loss(variant, contexts) for contexts in (1, 2, 4)]
        if rows[0] is None:
            continue
        cells = []
        for row in rows:
            assert row is not None
            difference = "" if variant == "static" else f" ({row['difference']:+.4f})"
            cells.append(f"{row['loss']:.4f}{difference}")
        lines.append(f"| {NAMES[variant]} | {rows[0]['n_seeds']} | {' | '.join(cells)} |")
        last = rows[2]
        if variant in ("shared", "per_layer") and last is not None:
            low, high = (
                last[["seeds_low", "seeds_high"]] if last["n_seeds"] > 1 else last[["documents_low", "documents_high"]]
            )
            worse.append(f"{NAMES[variant]} {last['difference']:+.3f} ({low:+.3f} to {high:+.3f})")
    what = "; ".join(worse)
    return Finding(
        "Beyond the training length",
        "nothing: said to be missing.",
        "new" if worse else "not measured",
        f"At four times the training context the loss differs from static RoPE's by: {what}."
        if worse
        else "Not run yet.",
        "no figure to compare with: an observation of its own, on the same bytes at every length (in brackets the "
        "difference to static; intervals over seeds where there are several, else over documents).",
        lines,
        [f"{suite.folder}/*/heldout.csv"],
    )


def frozen_increments(suite: Suite) -> Finding:
    """Increments of a trained model, given to fresh weights as a table."""
    row, shared = suite.loss("frozen"), suite.loss("shared")
    if row is None or shared is None:
        verdict, sentence = _not_run("frozen")
    else:
        low, high = row[["documents_low", "documents_high"]]
        within = max(abs(low), abs(high)) <= NEUTRAL
        verdict = "reproduced" if within else "not reproduced"
        sentence = (
            f"With the table that shared learned, fresh weights reach {row['loss']:.4f} nats per byte, static "
            f"{row['difference']:+.4f} ({low:+.4f} to {high:+.4f} over documents)."
        ).replace("static ", "a difference to static of ")
    return Finding(
        "Frozen increments do as well as learned ones",
        "1.802 against 1.803 trained jointly and 1.803 of RoPE (another corpus, nats per token).",
        verdict,
        sentence,
        f"reproduced where the interval over documents of the difference to static lies within {NEUTRAL} of 0. The "
        "fresh weights start from the seed, and see the data order, of the shared model that the table is from.",
        [],
        suite.files("frozen", "heldout"),
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
            return Finding(title, said, *_not_run(variant), rule)
        lines = [
            "| kind | reported | " + " | ".join(f"seed {seed}" for seed in tables) + " |",
            "|---|---|" + "---|" * len(tables),
        ]
        for kind in kinds:
            cells = [
                f"{row['mean']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
                for row in (t.loc[kind] for t in tables.values())
            ]
            lines.append(f"| {kind} | {reported[kind]:.2f} | {' | '.join(cells)} |")
        ranks = [float(stats.spearmanr([*reported.values()], t.loc[kinds, "mean"]).statistic) for t in tables.values()]
        verdict: Verdict = "different"
        if min(ranks) >= 0.7:
            verdict = "reproduced"
        elif max(ranks) < 0.3:
            verdict = "not reproduced"
        given = ", ".join(f"{rank:+.2f}" for rank in ranks)
        sentence = (
            f"The order of kinds agrees with the reported one at rank correlations of {given} ({len(ranks)} seeds)."
        )
        n = next(iter(tables.values()))["n"].sum()
        lines += ["", f"Means and intervals over documents, {n:,} bytes {where}."]
        return Finding(title, said, verdict, sentence, rule, lines, suite.files(variant, "kinds"))

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
        return Finding(title, reported, *_not_run("per_layer"), rule)
    files, known, beyond, at_chance, best = [], [], [], [], []
    lines: list[str] = []
    statistic = np.nan
    for (variant, seed), table in tables.items():
        files.append(f"{suite.folder}/{variant}-{seed}/boundaries.csv")
        for words in ("human", "jieba"):
            own = table[(table["words"] == words) & (table["measure"] == "increment")].set_index("layer")
            if not lines:
                lines = [
                    "| run | words | " + " | ".join(f"layer {layer:.0f}" for layer in own.index) + " |",
                    "|---|---|" + "---|" * len(own),
                ]
            cells = [_between(row, "auc", ".3f") for _, row in own.iterrows()]
            lines.append(f"| {variant}-{seed} | {words} | {' | '.join(cells)} |")
        own = table[(table["words"] == "human") & (table["measure"] == "increment")].set_index("layer")
        shuffled = table[(table["words"] == "human") & (table["measure"] == "labels shuffled")].set_index("layer")
        statistic = table[(table["words"] == "human") & (table["measure"] == "mutual information")]["auc"].iloc[0]
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
    lines += [
        "",
        f"{n['n']:,} gaps between two Chinese characters in {n['lines']:,} held-out lines; intervals resample lines. "
        f"The mutual information of the two characters, from the training text, reaches {statistic:.3f}.",
    ]
    verdict: Verdict = "not reproduced"
    if all(known) and all(at_chance):
        verdict = "reproduced"
    elif all(beyond):
        verdict = "different"
    largest = ", ".join(f"{auc:.3f}" for auc in best)
    sentence = (
        f"The best layer above 0 reaches an AUC of {largest} (by seed), where counting pairs of characters in the "
        f"training text reaches {statistic:.3f}."
    )
    return Finding(title, reported, verdict, sentence, rule, lines, files)


def two_word_names(suite: Suite) -> Finding:
    """The space inside a name is shorter than in the reversed name, beyond what frequency explains."""
    tables = suite.tables("per_layer", "names")
    rule = (
        "reproduced where at every seed some layer has a smaller increment in the real order of names (Wilcoxon, q < "
        "0.05 over layers) and smaller by more than in ordinary pairs as frequent (the same test); different where "
        "names differ but no more than those pairs; not reproduced where names do not differ."
    )
    reported = (
        "no effect in layers 0 and 1; smaller for the real order in layers 2 to 5 (61 to 82% of 82 names, p from 4e-2 "
        "to 6e-10); no control for frequency."
    )
    title = "Two-word names are pulled together"
    if not tables:
        return Finding(title, reported, *_not_run("per_layer"), rule)
    lines = ["| run | layer | names | ordinary pairs | names beyond pairs |", "|---|---|---|---|---|"]
    effects, beyond = [], []
    for seed, table in tables.items():
        by = table.set_index(["group", "layer"])
        for layer in table["layer"].unique():
            cells = []
            for group in ("names", "ordinary pairs", "names - ordinary pairs"):
                row = by.loc[(group, layer)]
                cells.append(f"{_between(row, 'difference', '+.4f')}, {row['smaller']:.0%}, q = {row['q']:.2g}")
            lines.append(f"| per_layer-{seed} | {layer} | {' | '.join(cells)} |")
        found = table[(table["q"] < 0.05) & (table["difference"] < 0)]
        effects.append(set(found.loc[found["group"] == "names", "layer"]))
        beyond.append(effects[-1] & set(found.loc[found["group"] == "names - ordinary pairs", "layer"]))
    n = next(iter(tables.values())).groupby("group")["n"].first()
    lines += [
        "",
        f"Increment at the inner space, real order minus reversed, mean over {n['names']} names or "
        f"{n['ordinary pairs']} ordinary pairs and five carriers, t interval over pairs; share that is nearer in the "
        "real order; Wilcoxon signed-rank test.",
    ]
    verdict: Verdict = "not reproduced"
    if all(beyond):
        verdict = "reproduced"
    elif any(effects):
        verdict = "different"
    each = "; ".join(
        f"seed {seed}: layers {_some(effect)} nearer, of which {_some(more)} beyond ordinary pairs"
        for seed, effect, more in zip(tables, effects, beyond, strict=True)
    )
    return Finding(
        title, reported, verdict, f"In the real order, {each}.", rule, lines, suite.files("per_layer", "names")
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
        return Finding(title, reported, *_not_run("per_layer"), rule)
    lines = ["| run | layer | explained by kind | farthest | nearest |", "|---|---|---|---|---|"]
    marks, others = [], []
    for seed, table in suite.tables("per_layer", "specialisation").items():
        for row in table[table["corpus"] == "code"].to_dict("records"):
            cells = [
                f"{row[end]} {row[f'{end}_relative']:.2f} ({row[f'{end}_low']:.2f} to {row[f'{end}_high']:.2f})"
                for end in ("farthest", "nearest")
            ]
            share = f"{row['explained']:.0%} ({row['low']:.0%} to {row['high']:.0%}; shuffled {row['shuffled']:.0%})"
            lines.append(f"| per_layer-{seed} | {row['layer']} | {share} | {' | '.join(cells)} |")
    for table in tables.values():
        above = table[(table["layer"] > 0) & (table["relative_low"] >= 1.5)]
        marks.append(bool(above["kind"].isin(["newline", "bracket"]).any()))
        others.append(len(above) > 0)
    verdict: Verdict = "reproduced" if all(marks) else "different" if any(others) else "not reproduced"
    found = sum(marks)
    sentence = f"A layer above 0 sets newlines or brackets apart at {found} of {len(marks)} seeds."
    return Finding(title, reported, verdict, sentence, rule, lines, suite.files("per_layer", "kinds_code"))


def heads_look_back(suite: Suite) -> Finding:
    """Heads with larger increments look back less far."""
    tables = suite.tables("per_layer_per_head", "correlations")
    rule = (
        "reproduced where the rank correlation over all heads lies below 0 with its whole interval and p < 0.05 at "
        "every seed; different where it does so above 0, or only within layers; not reproduced otherwise."
    )
    reported = "Pearson -0.35, Spearman -0.48 over 48 heads."
    title = "Heads with larger increments look back less far"
    if not tables:
        return Finding(title, reported, *_not_run("per_layer_per_head"), rule)
    lines = ["| run | scope | measure | correlation | p |", "|---|---|---|---|---|"]
    negative, elsewhere, values = [], [], []
    for seed, table in tables.items():
        for row in table.to_dict("records"):
            interval = _between(row, "correlation", "+.2f")
            lines.append(
                f"| per_layer_per_head-{seed} | {row['n']} {row['scope']} | {row['measure']} | {interval} | "
                f"{row['p']:.2g} |"
            )
        rank = table[table["measure"] == "spearman"].set_index("scope")
        overall = rank.loc["heads"]
        values.append(_between(overall, "correlation", "+.2f"))
        negative.append(bool(overall["high"] < 0 and overall["p"] < 0.05))
        within = rank.loc["within layers"]
        elsewhere.append(
            bool((overall["low"] > 0 and overall["p"] < 0.05) or (within["high"] < 0 and within["p"] < 0.05))
        )
    verdict: Verdict = "reproduced" if all(negative) else "different" if any(elsewhere) else "not reproduced"
    sentence = f"The rank correlation over all heads is {', '.join(values)}."
    return Finding(title, reported, verdict, sentence, rule, lines, suite.files("per_layer_per_head", "correlations"))


def caps_and_signs(suite: Suite) -> Finding:
    """How much sits at the cap of 10, what a cap of 30 changes, and whether signed increments become negative."""
    lines = ["| run | layer | share at the cap | largest |", "|---|---|---|---|"]
    at_cap, signs, files = [], [], []
    for variant in ("per_layer", "per_layer_per_head", "cap_30"):
        files += suite.files(variant, "saturation")
        for seed, table in suite.tables(variant, "saturation").items():
            for row in table.to_dict("records"):
                interval = f"{_between(row, 'share', '.1%')} of {row['cap']:g}"
                lines.append(f"| {variant}-{seed} | {row['layer']} | {interval} | {row['max']:.2f} |")
            if variant == "per_layer":
                at_cap.append(table["share"].max())
    for seed, table in suite.tables("signed", "below_zero").items():
        files += suite.files("signed", "below_zero")
        for row in table.to_dict("records"):
            interval = f"{_between(row, 'share', '.1%')} below 0"
            lines.append(f"| signed-{seed} | {row['layer']} | {interval} | least {row['min']:.2f} |")
        signs.append(table["share"].max())
    sentence = "Not run yet."
    verdict: Verdict = "not measured"
    if at_cap and signs:
        verdict = "reproduced" if max(at_cap) > 0.1 and max(signs) < 0.05 else "different"
        sentence = (
            f"With the cap at 10 the layer nearest to it has {', '.join(f'{share:.0%}' for share in at_cap)} of its "
            f"increments there (by seed); of signed increments at most {max(signs):.1%} of a layer's are below 0."
        )
    return Finding(
        "Some layers sit at the cap, and almost no increment becomes negative",
        "some layers sit at the cap of 10; no cap above it was tried; signed increments were: almost none negative.",
        verdict,
        sentence,
        "reproduced where a layer has more than 10% of its increments at the cap and no layer has 5% below 0; "
        "different otherwise.",
        lines if len(lines) > 2 else [],
        files,
    )


def what_increments_cause(suite: Suite) -> Finding:
    """Which layers' increments the loss needs, and whether their looks predict it."""
    tables = suite.tables("per_layer", "ablation")
    rule = (
        "no figure to compare with. A layer is needed where the interval of its ablation to the mean lies above 0.005 "
        "nats per byte; looks are the distance of a layer's AUC from 0.5, causes its ablation to the mean in Chinese, "
        "correlated by rank over layers and seeds."
    )
    reported = "nothing: no increment was ablated, patched or frozen in the trained models."
    title = "What increments cause"
    if not tables:
        return Finding(title, reported, *_not_run("per_layer"), rule)
    lines = [
        "| run | text | layer | to 1.0 | to the mean | shuffled | to the token's mean |",
        "|---|---|---|---|---|---|---|",
    ]
    needed, looks, causes, knows = [], [], [], []
    for seed, table in tables.items():
        boundaries = suite.tables("per_layer", "boundaries").get(seed)
        groups: Any = table.groupby(["corpus", "layer"], sort=False)
        for (corpus, layer), rows in groups:
            by: Any = rows.set_index(rows["to"].astype(str))
            cells = [_between(by.loc[to], "change", "+.4f") for to in ("1.0", "mean", "shuffle", "token")]
            lines.append(f"| per_layer-{seed} | {corpus} | {layer} | {' | '.join(cells)} |")
            if layer == "all":
                continue
            if by.loc["mean", "low"] > 0.005:
                needed.append(f"{layer} ({corpus}, seed {seed})")
            if by.loc["token", "low"] > 0.005:
                knows.append(f"{layer} ({corpus}, seed {seed})")
            if corpus == "chinese" and boundaries is not None:
                own = boundaries[(boundaries["measure"] == "increment") & (boundaries["words"] == "human")]
                looks.append(abs(float(own.loc[own["layer"] == int(layer), "auc"].iloc[0]) - 0.5))
                causes.append(float(by.loc["mean", "change"]))
    relation = ""
    if len(looks) > 3:
        found = stats.spearmanr(looks, causes)
        relation = (
            f" Over {len(looks)} layers, how far the AUC is from 0.5 goes with what the ablation costs at a rank "
            f"correlation of {found.statistic:+.2f} (p = {found.pvalue:.2g})."
        )
    sentence = (
        f"The loss needs which token gets which increment in layers {', '.join(needed) or 'none'}, and more than the "
        f"token's identity in {', '.join(knows) or 'none'}.{relation}"
    )
    lines += [
        "",
        "Change of loss in nats per predicted byte with the increments of a layer replaced, intervals over documents.",
    ]
    return Finding(title, reported, "new", sentence, rule, lines, suite.files("per_layer", "ablation"))


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
    worst = max(max(abs(run["difference_of_documents"][end]) for end in ("low", "high")) for run in runs.values())
    return Finding(
        "A graft on a pretrained model costs nothing",
        "+0.001 nats against the paired baseline on SmolLM2-1.7B with LoRA, 2,000 steps; increments move by 1 to 3%.",
        "reproduced" if worst <= 0.02 else "different",
        f"On SmolLM2-135M with its weights frozen, 300 steps, nats per token: {'; '.join(parts)}.",
        "reproduced where every interval over documents lies within 0.02 nats per token of 0.",
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


def _not_run(variant: str) -> tuple[Verdict, str]:
    return "not measured", f"The variant {variant} has not been run and measured yet."


def _between(row: Any, column: str, written: str) -> str:
    return f"{row[column]:{written}} ({row['low']:{written}} to {row['high']:{written}})"


def _ends(low: float, high: float) -> str:
    return "" if np.isnan(low) else f"{low:+.4f} to {high:+.4f}"


def _some(layers: set[int]) -> str:
    return ", ".join(map(str, sorted(layers))) or "none"
