"""How RoPE itself is used: what was reported, what was found, and the verdict, from the results alone.

As `findings.py`, for the three results about how RoPE itself is used. The rules were written when the
tools had been tried on SmolLM2-135M and its norms and heads had been measured, but not read; those of absolute
position, of sinks, of p-RoPE and of dispersion were made stricter once, before the files that they judge were read.

Reported: Barbero et al. (arXiv 2410.06205), Ruscio et al. (arXiv 2606.06160), Veličković et al. (arXiv 2410.01104).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lens_positions.analysis.absolute_position import QUARTERS, ROUNDING
from lens_positions.analysis.frequencies import SIDES, frequency_quarters, high_frequency_use
from lens_positions.measure.intervals import t_interval
from lens_positions.terminal import with_interval
from lens_positions.training.schema import Measured
from lens_positions.viz.charts import lines_chart
from lens_positions.viz.rope_charts import absolute_chart, entropy_chart, norms_map

from .calls import Call
from .findings import Block, Finding, Suite, ends_of
from .markdown import grid
from .maximum import MOST, accuracy_table
from .options import ROPE_TABLES, SHIPPED
from .rope_measures import SMOLLM2
from .tables import Tables, run_of_model

ARCHITECTURES = {"static": "RoPE", "ntk": "larger base", "window": "sliding window"}
FRACTIONS = {"static": "1 (RoPE)", "rope_75": "0.75", "rope_25": "0.25", "rope_0": "0 (no encoding)"}
LATE = QUARTERS - 1
REPLACEMENTS = {"token": "another token", "mean": "the mean", "zeros": "zeros", "noise": "noise"}

MOST_HEADS = 0.1
"""The share of all heads up to which positional heads are a few."""

A_SINK = 0.3
"""The share of attention on position 0 from which a head is a sink."""

ALIKE = 0.9
"""The cosine from which states at position 0 are called the same whatever their token."""

FEWEST = 16
"""Items from which dispersion is followed."""


@dataclass(frozen=True)
class RopeResults:
    """What `lens-positions experiments rope` and `maximum` measured, and the suite whose runs they measured."""

    results: Tables
    suite: Suite

    def table(self, model: str, name: str) -> pd.DataFrame | None:
        """A table of a model; None where it was untested."""
        return self.results.table(name, run_of_model(model))

    def tables(self, name: str, *models: str) -> dict[str, Any]:
        """A table of those of these models that have it."""
        return {model: table for model in models if (table := self.table(model, name)) is not None}

    def files(self, names: Sequence[str], *models: str) -> list[str]:
        """The files of those of these tables that some of the models have, as RESULTS.md gives them."""
        return [self.results.path(name) for name in names if self.tables(name, *models)]

    def runs(self, variant: str) -> dict[int, str]:
        """The measured runs of a variant of the suite, by seed."""
        suite = (self.suite.name, variant)
        found = {
            run.seed: str(run)
            for name in ROPE_TABLES
            for run in self.results.measurements.get(name, {})
            if run[:2] == suite and run.seed is not None
        }
        return dict(sorted(found.items()))

    def measured(self) -> dict[str, dict[str, Measured]]:
        """What was measured of each model, on which weights and by which code, by its name."""
        own = {
            str(run): {table: entry for table, entry in of.items() if table in ROPE_TABLES}
            for run, of in self.results.measured.items()
        }
        return {model: own[model] for model in sorted(own) if own[model]}

    def tests(self) -> pd.DataFrame:
        """The table of the maximum-retrieval task, by seed; empty where it was not trained."""
        tables = self.results.measurements.get("maximum", {})
        return pd.concat([table.assign(seed=run.seed) for run, table in tables.items()] or [pd.DataFrame()])


def display_name(model: str) -> str:
    """The name of a model in the text."""
    return "SmolLM2-135M" if model == SMOLLM2 else model


def low_frequencies(of: RopeResults) -> Finding:
    """Queries and keys are larger at low frequencies."""
    norms = of.table(SMOLLM2, "norms")
    rule = (
        "agrees where on both sides the lowest quarter of the frequencies has the largest norm of the four in at "
        "least three quarters of the layers; contrary where on neither side it has a larger one than the highest "
        "quarter in at least half of them; weaker otherwise."
    )
    title = "Queries and keys are largest at the lowest frequencies"
    reported = "in Gemma 7B the mean 2-norm of their chunks is largest at the lowest frequencies."
    if norms is None:
        return Finding(title, reported, *_not_measured("norms"), rule)
    turned = norms[norms["frequency"] > 0].assign(quarter=frequency_quarters(norms))
    shares, mosts, peaks, rows = [], [], [], []
    for side in SIDES:
        own = turned[turned["side"] == side]
        means = own.groupby(["layer", "quarter"])["norm"].mean().unstack()
        above, largest = means[3] > means[0], means.idxmax(axis=1) == 3
        shares.append(float(above.mean()))
        mosts.append(float(largest.mean()))
        peak = own.groupby(["layer", "index"])["norm"].mean().unstack().idxmax(axis=1)
        common = peak.mode().iloc[0]
        wavelength = 2 * math.pi / own.loc[own["index"] == common, "frequency"].iloc[0]
        peaks.append(f"{wavelength:,.0f} positions ({(peak == common).sum()} of {len(peak)} layers)")
        thirds = np.array_split(means.index.to_numpy(), 3)
        for part in (means.index.to_numpy(), *thirds):
            cells = [f"{means.loc[part, q].mean():.2f}" for q in range(4)]
            cells += [f"{chosen[part].sum()} of {len(part)} layers" for chosen in (above, largest)]
            rows.append([side, f"{part[0]} to {part[-1]}", *cells])
    longest = 2 * math.pi / turned["frequency"].min()
    verdict: Call = "weaker"
    if min(mosts) >= 0.75:
        verdict = "agrees"
    elif max(shares) < 0.5:
        verdict = "contrary"
    n = norms.iloc[0]
    what = f"{display_name(SMOLLM2)}, {n['n']:,} tokens of {n['documents']} held-out documents"
    columns = ["side", "layers", "highest quarter", "second", "third", "lowest quarter"]
    columns += ["lowest above highest", "lowest largest"]
    blocks: list[Block] = [grid(columns, rows), f"{what}; mean 2-norm of a chunk, over tokens, heads and frequencies."]
    sentence = (
        f"In {display_name(SMOLLM2)} the lowest quarter is larger than the highest in {shares[0]:.0%} of the layers "
        f"for queries and {shares[1]:.0%} for keys, and the largest of the four in {mosts[0]:.0%} and {mosts[1]:.0%}. "
        f"The single largest norm is most often at a wavelength of {peaks[0]} for queries and {peaks[1]} for keys, the "
        f"longest being {longest:,.0f}."
    )
    figure = ("norms", "Mean 2-norm of queries and keys by layer and rotary frequency", partial(norms_map, norms, what))
    return Finding(title, reported, verdict, sentence, rule, blocks, of.files(["norms"], SMOLLM2), figure)


def heads_by_position(of: RopeResults) -> Finding:
    """A few heads attend by position, with the highest frequencies."""
    norms, heads = of.table(SMOLLM2, "norms"), of.table(SMOLLM2, "positional")
    rule = (
        f"positional are heads with over half of their attention at one offset, with the tokens in another order too. "
        f"Agrees where there are some, at most {MOST_HEADS:.0%} of all, and the highest quarter of the frequencies "
        "has a larger share of the squares of their norms than of the other heads', on both sides (Mann-Whitney, p < "
        "0.05); absent where there are none; weaker otherwise. Two tests."
    )
    title = "A few heads attend by position whatever the tokens, and use the highest frequencies"
    reported = "in Gemma 7B the highest frequencies are used by a few heads, on the diagonal or the previous token."
    if norms is None or heads is None:
        return Finding(title, reported, *_not_measured("norms and positional"), rule)
    found = heads[heads["positional"]]
    files, n = of.files(["norms", "positional"], SMOLLM2), heads.iloc[0]
    if found.empty:
        sentence = f"None of {display_name(SMOLLM2)}'s {len(heads)} heads does."
        return Finding(title, reported, "absent", sentence, rule, [], files)
    rows = []
    for row in found.sort_values("shuffled", ascending=False).head(12).to_dict("records"):
        cells = [with_interval(row, name, ".0%", f"{name}_") for name in ("share", "shuffled")]
        rows.append([f"{row['layer']}, {row['head']}", str(row["offset"]), *cells])
    away = heads.assign(positional=heads["positional"] & (heads["offset"] > 0))
    uses: list[list[dict[Any, Any]]] = [high_frequency_use(norms, group).to_dict("records") for group in (heads, away)]
    each, looking_back = (
        " and ".join(
            f"{row['positional']:.0%} of their squared {row['side']} norms against {row['other']:.0%} of the others' "
            f"(n = {row['n']} and {row['others']} heads, p = {row['p']:.2g})"
            for row in use
        )
        for use in uses
    )
    more = [row["p"] < 0.05 and row["positional"] > row["other"] for row in uses[0]]
    blocks: list[Block] = [
        grid(["layer, head", "tokens back", "share of attention", "tokens in another order"], rows),
        f"The {min(12, len(found))} with the highest share when shuffled, of {len(found)}; {n['n']:,} queries of "
        f"{n['documents']} documents, which the intervals resample. At offset 0 a shuffle says less: every token still "
        f"stands on its own diagonal. Of heads that look back alone the highest quarter makes {looking_back}.",
    ]
    verdict: Call = "agrees" if all(more) and len(found) <= MOST_HEADS * len(heads) else "weaker"
    counts = found["offset"].value_counts().sort_index()
    offsets = ", ".join(f"{count} at {offset}" for offset, count in counts.items())
    sentence = (
        f"{len(found)} of {display_name(SMOLLM2)}'s {len(heads)} heads are positional ({offsets} tokens back). The "
        f"highest quarter of the frequencies makes {each}."
    )
    return Finding(title, reported, verdict, sentence, rule, blocks, files)


def truncated_frequencies(of: RopeResults) -> Finding:
    """What a trained model loses without its lowest, or its highest, frequencies."""
    tables = of.tables("truncated", SMOLLM2, "bilingual-rope")
    title = "A trained model without a part of its frequencies"
    rule = "no figure to compare with: p-RoPE's truncation, applied to models that were trained with all frequencies."
    reported = "nothing about removing frequencies from a trained model."
    if SMOLLM2 not in tables:
        return Finding(title, reported, *_not_measured("truncated"), rule)
    texts, rows = [], []
    for model, table in tables.items():
        by: Any = table.set_index(["keep", "drop"])
        for kept in sorted(set(table["keep"]), reverse=True):
            cells = [
                with_interval(by.loc[(kept, drop)], "difference", "+.3f") if (kept, drop) in by.index else ""
                for drop in ("lowest", "highest")
            ]
            rows.append([display_name(model), f"{kept:.0%}" if kept else "none", *cells])
        n = table.iloc[0]
        texts.append(
            f"{display_name(model)} {n['n']:,} tokens of {n['documents']} documents, windows of {n['length']} tokens"
        )
    norms, turns = of.table(SMOLLM2, "norms"), ""
    if norms is not None:
        angle = _lowest_quarter_degrees(norms, int(tables[SMOLLM2].iloc[0]["length"]))
        turns = (
            f" Within such a window the lowest quarter of {display_name(SMOLLM2)}'s frequencies turns by {angle:.0f} "
            "degrees at most: that nothing is lost without it says nothing of long contexts."
        )
    blocks: list[Block] = [
        grid(["model", "kept", "without the lowest", "without the highest"], rows),
        f"Change of loss in nats per token; {'; '.join(texts)}; intervals resample documents.{turns}",
    ]
    by = tables[SMOLLM2].set_index(["keep", "drop"])
    largest = max(kept for kept, _ in by.index)
    low, high = (with_interval(by.loc[(largest, drop)], "difference", "+.3f") for drop in ("lowest", "highest"))
    none = with_interval(by.loc[(0.0, "lowest")], "difference", "+.2f")
    sentence = (
        f"With {largest:.0%} of its frequencies {display_name(SMOLLM2)}'s loss changes by {low} nats per token without "
        f"the lowest (which hardly turn in such windows) and by {high} without the highest; with none of them by "
        f"{none}."
    )
    files = of.files(["truncated"], *tables) + of.files(["norms"], SMOLLM2)
    return Finding(title, reported, "new", sentence, rule, blocks, files)


def _lowest_quarter_degrees(norms: pd.DataFrame, tokens: int) -> float:
    """How many degrees the lowest quarter of the frequencies turns at most in so many tokens."""
    return math.degrees(tokens * norms.loc[frequency_quarters(norms) == 3, "frequency"].max())


def p_rope(of: RopeResults) -> Finding:
    """Models trained with a fraction of the frequencies."""
    suite = of.suite
    title = "p-RoPE: training with the highest fraction of the frequencies alone"
    reported = (
        "at 2B parameters 0.75-RoPE has the best validation perplexity of those compared, 0.25-RoPE is worse than "
        "RoPE, no encoding worst."
    )
    rule = (
        "four statements: 0.75 loses less than RoPE, 0.25 more, none more, and none more than 0.25; each holds, or is "
        "contradicted, where its interval over seeds lies on one side of 0. Agrees where all hold, contrary where one "
        "is contradicted, undecided otherwise. Four intervals."
    )
    pairs = {"0.75 minus RoPE": ("rope_75", "static", -1), "0.25 minus RoPE": ("rope_25", "static", 1)}
    pairs |= {"none minus RoPE": ("rope_0", "static", 1), "none minus 0.25": ("rope_0", "rope_25", 1)}
    found = {name: suite.difference(ours, base) for name, (ours, base, _) in pairs.items()}
    if any(row is None for row in found.values()):
        gone = "; ".join(f"{name} diverged: {at}" for name in FRACTIONS if (at := suite.diverged(name)))
        return Finding(title, reported, "untested", gone or "Not every fraction has been trained yet.", rule)
    rows = []
    for variant, name in FRACTIONS.items():
        row, paired = suite.loss(variant), suite.paired(variant)
        assert row is not None
        cells = [name, str(row["n_seeds"]), f"{row['loss']:.4f}", "", "", ""]
        if paired is not None:
            intervals = [ends_of(paired[f"{over}_low"], paired[f"{over}_high"]) for over in ("seeds", "documents")]
            cells[1] += f" (paired: {paired['seeds'].replace(' ', ', ')})"
            cells[3:] = [f"{paired['difference']:+.4f}", *intervals]
        for contexts in (2, 4):
            longer: Any = suite.loss(variant, contexts)
            beside = "" if paired is None else f"; {with_interval(longer, 'difference', '+.3f', 'seeds_')}"
            cells.append(f"{longer['loss']:.4f}{beside}")
        rows.append(cells)
    files, turns = [of.results.path("heldout")], ""
    if static := of.tables("norms", *of.runs("static").values()):
        model, norms = next(iter(static.items()))
        context = int(suite.losses["length"].min())
        angle = _lowest_quarter_degrees(norms, context)
        turns = f" In a context of {context} the quarter that 0.75 drops turns by {angle:.0f} degrees at most."
        files += of.files(["norms"], model)
    columns = ["fraction", "seeds", "1 context", "difference to RoPE", "over seeds", "over documents"]
    blocks: list[Block] = [
        grid([*columns, "2 contexts", "4 contexts"], rows),
        "Nats per byte, the same bytes at every length; differences to RoPE at the same seeds, at more contexts with "
        f"their interval over seeds.{turns}",
    ]
    verdict, each = _verdict({name: (found[name], sign) for name, (*_, sign) in pairs.items()})
    return Finding(title, reported, verdict, f"In nats per byte, over seeds: {each}.", rule, blocks, files)


def _verdict(statements: dict[str, tuple[Any, int]]) -> tuple[Call, str]:
    """The verdict over differences that should be above 0 (sign 1) or below (-1), what they are, and how many hold."""
    holds, contradicted, parts = [], [], []
    for name, (row, sign) in statements.items():
        low, high = row.get("seeds_low", math.nan), row.get("seeds_high", math.nan)
        holds.append(low > 0 if sign > 0 else high < 0)
        contradicted.append(high < 0 if sign > 0 else low > 0)
        parts.append(f"{name} {row['difference']:+.4f} ({ends_of(low, high) or 'one seed'})")
    verdict: Call = "undecided"
    if all(holds):
        verdict = "agrees"
    elif any(contradicted):
        verdict = "contrary"
    return verdict, f"{'; '.join(parts)}. {sum(holds)} of {len(holds)} statements hold"


def absolute_position(of: RopeResults) -> Finding:
    """The two sources of absolute position, in three architectures and in a pretrained model."""
    title = "Absolute position comes through the residual stream and through the mask, by architecture"
    reported = "NTK scaling suppresses the residual part, sliding windows let it grow with depth, RoPE lies between."
    rule = (
        "a larger base suppresses the residual part where at early queries its share of both parts, over layers, has "
        "its whole interval below RoPE's; a window lets it grow where at early queries the last layer's residual part "
        "has its whole interval above layer 1's, by a larger factor than RoPE's; each at every seed, two at least. "
        "Agrees where both hold, absent where neither does, weaker where one does; undecided with one seed."
    )
    runs = {variant: of.runs(variant) for variant in ARCHITECTURES}
    tables: Any = {
        v: {seed: table for seed, model in by.items() if (table := of.table(model, "absolute")) is not None}
        for v, by in runs.items()
    }
    seeds = sorted(set.intersection(*(set(by) for by in tables.values())))
    smollm2 = of.table(SMOLLM2, "absolute")
    if smollm2 is None or not seeds:
        return Finding(title, reported, *_not_measured("absolute"), rule)
    shown = {f"{ARCHITECTURES[v]}, seed {seed}": tables[v][seed] for v in ARCHITECTURES for seed in seeds}
    n = smollm2["documents"].iloc[0]
    note = (
        "Variance over repeats of the score (residual) and of log Z (mask) at a fixed distance, nats squared, mean "
        f"over heads; {n} beginnings of pieces of held-out English, repeated, which "
        "intervals resample (pieces of one speech as if they were independent). Early and late are the first and the "
        "last quarter of the repeats, from the third on; the input is longer in SmolLM2: compare layers within a "
        "model. The larger base is what NTK scaling by 8 makes of 10,000, trained with from the start. With a window, "
        f"a layer whose keys do not reach back to the start has no residual part; none is below {ROUNDING:g}."
    )
    verdict, parts = _verdict_on_architectures({seed: {v: tables[v][seed] for v in ARCHITECTURES} for seed in seeds})
    files = of.files(["absolute"], SMOLLM2)
    caption = (
        f"{display_name(SMOLLM2)}; {n} beginnings of held-out texts, repeated; means over heads. "
        "Log attention = score (residual) - log Z (mask). Early, late: first and last quarter of the repeats. "
        "Intervals: 95%, of resampled texts."
    )
    figure = ("absolute", "The two parts of absolute position by layer", partial(absolute_chart, smollm2, caption))
    blocks: list[Block] = [_parts_by_layer(shown | {display_name(SMOLLM2): smollm2}), note]
    return Finding(title, reported, verdict, f"At early queries, {'; '.join(parts)}.", rule, blocks, files, figure)


def _parts_by_layer(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The two parts of absolute position of every model, at early and at late queries."""
    rows = []
    for name, table in tables.items():
        over = _by_layer(table)
        layers = list(dict.fromkeys(over.index.get_level_values("layer")))
        if len(layers) > 8:
            layers = ["all", *layers[1::6], layers[-1]]
        for layer in layers:
            cells = [
                with_interval(row, part, ".2g", f"{part}_") if row[part] > ROUNDING else "none"
                for part in ("residual", "mask")
                for row in (over.loc[(layer, 0)], over.loc[(layer, LATE)])
            ]
            rows.append([name, layer, *cells, with_interval(over.loc[(layer, 0)], "share", ".0%", "share_")])
    columns = ["model", "layers", "residual, early", "residual, late", "mask, early", "mask, late"]
    return grid([*columns, "share of residual, early"], rows)


def _verdict_on_architectures(seeds: dict[int, dict[str, pd.DataFrame]]) -> tuple[Call, list[str]]:
    """The verdict over the architectures of every seed, and what each seed says."""
    lower, grows, parts = [], [], []
    for seed, tables in seeds.items():
        by = {variant: _by_layer(table) for variant, table in tables.items()}
        share = {variant: over.loc[("all", 0)] for variant, over in by.items()}
        lower.append(bool(share["ntk"]["share_high"] < share["static"]["share_low"]))
        growth = {variant: _growth(over) for variant, over in by.items()}
        grows.append(growth["window"][1] and growth["window"][0] > growth["static"][0])
        parts.append(
            f"seed {seed}: share of the residual part "
            + ", ".join(
                f"{name} {with_interval(share[v], 'share', '.0%', 'share_')}" for v, name in ARCHITECTURES.items()
            )
            + "; last layer over layer 1 "
            + ", ".join(f"{name} {growth[v][0]:.1f}" for v, name in ARCHITECTURES.items())
        )
    verdict: Call = "weaker"
    if len(seeds) < 2:
        verdict = "undecided"
    elif all(lower) and all(grows):
        verdict = "agrees"
    elif not all(lower) and not all(grows):
        verdict = "absent"
    return verdict, parts


def _by_layer(table: pd.DataFrame) -> Any:
    """The means over heads, by layer ("all" or its number as text) and quarter."""
    own = table[table["head"].astype(str) == "all"]
    return own.assign(layer=own["layer"].astype(str)).set_index(["layer", "quarter"])


def _growth(over: Any) -> tuple[float, bool]:
    """The last layer's residual part at early queries over layer 1's, and whether it lies wholly above."""
    layers = [int(layer) for layer in dict.fromkeys(over.index.get_level_values("layer")) if layer != "all"]
    first, last = over.loc[(str(min(layers) + 1), 0)], over.loc[(str(max(layers)), 0)]
    if first["residual"] < ROUNDING:
        return math.nan, False
    return last["residual"] / first["residual"], bool(last["residual_low"] > first["residual_high"])


def first_embedding(of: RopeResults) -> Finding:
    """What goes with the embedding at position 0."""
    title = "Replacing the first embedding takes away a part of the residual part"
    reported = "replacing that of BOS before the forward pass took 40% away, at early queries."
    rule = (
        "untested: what is reported is about models whose texts all begin with a token of their own (BOS), and no "
        "model here has one. What these lose is given beside it."
    )
    runs = {f"{name}, seed {s}": m for v, name in ARCHITECTURES.items() for s, m in of.runs(v).items()}
    models = {display_name(SMOLLM2): SMOLLM2, "bilingual-rope": "bilingual-rope"} | runs
    tables = {name: t for name, model in models.items() if (t := of.table(model, "drops")) is not None}
    if display_name(SMOLLM2) not in tables:
        return Finding(title, reported, *_not_measured("drops"), rule)
    rows = []
    drops: Any = {}
    for name, table in tables.items():
        by: Any = table[table["layer"].astype(str) == "all"].set_index(["replacement", "queries"])
        for queries in ("early", "late"):
            rows.append([name, queries, *_drops(by.xs(queries, level="queries"))])
        drops[name] = by
    own = drops[display_name(SMOLLM2)].xs("early", level="queries")
    n = own["documents"].iloc[0]
    layered: Any = tables[display_name(SMOLLM2)]
    layered = layered[(layered["layer"].astype(str) != "all") & (layered["queries"] == "early")]
    by_layer = [
        [str(layer), *_drops(own_rows.set_index("replacement"))]
        for layer, own_rows in layered.assign(layer=layered["layer"].astype(int)).groupby("layer")
    ]
    blocks: list[Block] = [
        grid(["model", "queries", *REPLACEMENTS.values()], rows),
        f"Share of the residual part (mean over layers and heads) that goes; below 0 there is more of it, and where it "
        f"more than doubles the cell says how many times as much there is. {n} repeated "
        "beginnings, which intervals resample. Early are a quarter of the repeats, from the third on, so not the very "
        "first queries; and on repeated content a query's place and the number of copies before it are one, so that "
        f"heads that look for copies vary too. Layer by layer, at early queries of {display_name(SMOLLM2)}:",
        grid(["layer", *REPLACEMENTS.values()], by_layer),
    ]
    each = ", ".join(f"{name} {with_interval(own.loc[how], 'drop', '+.0%')}" for how, name in REPLACEMENTS.items())
    sentence = (
        f"No model here has a BOS of its own. Of {display_name(SMOLLM2)}'s residual part at early queries a replaced "
        f"first token of a text takes away: {each} (n = {n})."
    )
    files = of.files(["drops"], *(models[name] for name in tables))
    return Finding(title, reported, "untested", sentence, rule, blocks, files)


def _drops(by: Any) -> list[str]:
    """The cells of what every replacement takes away, from rows by replacement."""
    return [_drop(by.loc[how]) for how in REPLACEMENTS]


def _drop(row: Any) -> str:
    """A share that goes, or how many times as much there is where it more than doubles."""
    if pd.isna(row["drop"]):
        return "nothing to lose"
    if row["drop"] > -1:
        return with_interval(row, "drop", "+.0%")
    times, least, most = (f"{1 - row[name]:.1f}" for name in ("drop", "high", "low"))
    return f"{times} times as much ({least} to {most})"


def sinks_carry_a_fingerprint(of: RopeResults) -> Finding:
    """Heads attend to position 0, whose states say which token is there."""
    title = "The states at the sink say which token is at position 0"
    reported = "sinks carry a fingerprint of it: the same for every input where it is BOS, else varying with the token."
    rule = (
        f"with the texts' own first tokens: agrees where in SmolLM2-135M some head gives over {A_SINK:.0%} of its "
        f"attention to position 0 (whole interval) and the values there have a mean cosine below {ALIKE} (whole "
        "interval) in most of the layers that have such heads; contrary where they do not; absent where there is no "
        "such head. With a common first token the cosine is 1, as it must be in a causal model."
    )
    sinks, prints = (of.tables(name, SMOLLM2, *SHIPPED) for name in ("sinks", "fingerprints"))
    if SMOLLM2 not in sinks or SMOLLM2 not in prints:
        return Finding(title, reported, *_not_measured("sinks and fingerprints"), rule)
    rows = []
    verdict: Call = "absent"
    sentence = f"With the texts' own first tokens {display_name(SMOLLM2)} has no such head."
    for model in [model for model in sinks if model in prints]:
        cells = []
        for first in ("common", "own"):
            heads = sinks[model][sinks[model]["first"] == first]
            found = heads[heads["low"] > A_SINK]
            cells.append(f"{len(found)} of {len(heads)} heads, largest share {heads['share'].max():.0%}")
        own = prints[model][prints[model]["first"] == "own"]
        own = own[own["layer"].isin(found["layer"]) | found.empty]
        alike = own.groupby("state")["first_token"].mean()
        own = own[own["state"] == "v"]
        cells += [f"{alike[state]:.3f}" for state in ("resid_pre", "k", "v")] + [f"{own['later'].mean():.3f}"]
        rows.append([display_name(model), *cells])
        if model == SMOLLM2 and len(found):
            varied = own["first_token_high"] < ALIKE
            verdict = "agrees" if varied.mean() > 0.5 else "contrary"
            sentence = (
                f"With the texts' own first tokens {len(found)} of {display_name(model)}'s {len(heads)} heads are "
                f"sinks; the values at position 0 have a mean cosine of {alike['v']:.3f} between texts in the "
                f"{len(own)} layers that have them, below {ALIKE} in {varied.sum()}; keys {alike['k']:.3f}, the "
                f"residual stream {alike['resid_pre']:.3f}."
            )
    n = prints[SMOLLM2].iloc[-1]
    columns = ["model", "sinks, common first token", "own first token", "cosine at position 0, residual stream"]
    blocks: list[Block] = [
        grid([*columns, "keys", "values", "values at the 17th token"], rows),
        f"Cosines between texts with their own first tokens, in {n['n']} pairs of SmolLM2's that begin with different "
        "tokens, mean over the layers with sinks (over all without). Pieces have 200 characters. One very large "
        "component that all states share brings the cosine of the residual stream to 1 whatever else it holds; keys "
        "and values, after the norm, are what attention reads. That sinks pass this on is what the replaced embedding "
        "above tests.",
    ]
    models = [model for model in sinks if model in prints]
    return Finding(title, reported, verdict, sentence, rule, blocks, of.files(["sinks", "fingerprints"], *models))


def maximum_task(of: RopeResults) -> Finding:
    """Attention that was sharp in training disperses, and a temperature helps."""
    title = "A head that is sharp on few items disperses on many; an adaptive temperature makes it better"
    reported = "so in the task of finding the largest of n items, trained at up to 16, without further training."
    rule = (
        f"agrees where from four times the training size on, {4 * MOST} items, accuracy with the temperature is "
        "above that without at most of the sizes (whole interval over seeds) and below it at none, and the entropy "
        "grows with every doubling; absent where it is above at no size; weaker otherwise; undecided with one seed."
    )
    tested = of.tests()
    if tested.empty:
        return Finding(title, reported, *_not_measured("maximum"), rule)
    table = accuracy_table(tested)
    seeds = int(table["n_seeds"].min())
    sets = tested["n"].iloc[0]
    note = (
        f"{seeds} seeds, which the intervals are over (Student's t); {sets:,} sets of items for each size and seed, "
        "the same with and without. Accuracy falls for two reasons: attention spreads, and the largest two of n "
        "numbers come closer, by about 1 / n."
    )
    beyond = table[table["items"] >= 4 * MOST]
    above, below = beyond["difference_low"] > 0, beyond["difference_high"] < 0
    verdict: Call = "weaker"
    if seeds < 2:
        verdict = "undecided"
    elif above.mean() > 0.5 and not below.any() and (np.diff(table["entropy"]) > 0).all():
        verdict = "agrees"
    elif not above.any():
        verdict = "absent"
    first, last = table.iloc[0], table.iloc[-1]
    sentence = (
        f"Accuracy is {first['learned']:.1%} at {first['items']:.0f} items and {last['learned']:.1%} at "
        f"{last['items']:,.0f}, there with the temperature {last['adaptive']:.1%} (difference "
        f"{with_interval(last, 'difference', '+.1%', 'difference_')}, {seeds} seeds); the entropy is "
        f"{first['entropy']:.2f} and {last['entropy']:.2f} nats, log n {first['log_items']:.2f} and "
        f"{last['log_items']:.2f}."
    )
    caption = f"{seeds} seeds, 95% intervals over them; {sets:,} sets a size; trained on 5 to {MOST} items."
    shows = "Accuracy at finding the largest item, with and without an adaptive temperature"
    figure = ("maximum", shows, _accuracy_chart(table, caption))
    blocks: list[Block] = [_accuracies(table), note]
    return Finding(title, reported, verdict, sentence, rule, blocks, [of.results.path("maximum")], figure)


def _accuracies(table: pd.DataFrame) -> pd.DataFrame:
    """What `accuracy_table` found, as text."""
    rows = []
    for row in table.to_dict("records"):
        cells = [with_interval(row, name, ".1%", f"{name}_") for name in ("learned", "adaptive")]
        cells += [with_interval(row, "difference", "+.1%", "difference_")]
        cells += [f"{row['entropy']:.2f}", f"{row['log_items']:.2f}", f"{row['largest']:.3f}"]
        rows.append([f"{row['items']:,}", *cells])
    columns = ["items", "accuracy", "with the temperature", "difference", "entropy", "log n", "largest weight"]
    return grid(columns, rows)


def _accuracy_chart(table: pd.DataFrame, caption: str) -> Callable[[Path], object]:
    """What draws the accuracies by number of items."""
    drawn = pd.concat(
        table[["items", name, f"{name}_low", f"{name}_high"]]
        .set_axis(["at", "value", "low", "high"], axis=1)
        .assign(measure=measure)
        for name, measure in (("learned", "as trained"), ("adaptive", "adaptive temperature"))
    )
    title, sizes = "Finding the largest of n items", list(table["items"])
    return partial(lines_chart, drawn, title, "accuracy", "items", sizes, None, caption, octaves=True)


def heads_disperse(of: RopeResults) -> Finding:
    """Heads of a language model that are sharp on few items, on more."""
    title = "Sharp heads of a language model disperse with the number of items"
    reported = "heads that are sharp in training disperse: with bounded scores every weight falls like 1/n."
    rule = (
        f"untested: the claim is about more items than a model was trained with, and the most here lie well within the "
        f"training length. Sharp are heads with less than half of the entropy of even attention at {FEWEST} items."
    )
    tables = of.tables("dispersion", SMOLLM2, *SHIPPED)
    if SMOLLM2 not in tables:
        return Finding(title, reported, *_not_measured("dispersion"), rule)
    n = tables[SMOLLM2].iloc[0]
    blocks: list[Block] = [
        _entropies(tables),
        f"Nats; a row is the queries with so many tokens up to them, to twice as many; {n['documents']} documents of "
        "held-out English.",
    ]
    own = _dispersal(tables[SMOLLM2])
    sentence = (
        f"{own['share']:.0%} of the {own['sharp']:.0f} sharp heads (of {own['heads']:.0f}) of {display_name(SMOLLM2)} "
        f"have a larger entropy at {own['to']:.0f} items than at {FEWEST}, intervals apart. It grows by "
        f"{own['slope']:.2f} of what even "
        f"attention's does in the median sharp head (quartiles {own['low']:.2f} to {own['high']:.2f}), by "
        f"{own['others']:.2f} in the others; the largest weight of the median sharp head falls like n to the power "
        f"{own['falls']:.2f}."
    )
    caption = (
        f"{display_name(SMOLLM2)}; {n['documents']} documents of held-out English; means over heads, 95% intervals "
        "over documents."
    )
    figure = ("dispersion", "Entropy of attention by number of items", partial(entropy_chart, tables[SMOLLM2], caption))
    return Finding(title, reported, "untested", sentence, rule, blocks, of.files(["dispersion"], *tables), figure)


def _few_and_many(table: pd.DataFrame) -> tuple[Any, Any, Any]:
    """The rows of heads: all from the fewest items on, those at the fewest, and those at the most."""
    heads = table[(table["head"].astype(str) != "all") & (table["items"] >= FEWEST)].set_index(["layer", "head"])
    return heads, heads[heads["items"] == FEWEST], heads[heads["items"] == heads["items"].max()]


def _entropies(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Entropy and largest weight of every model by number of items."""
    rows = []
    for model, table in tables.items():
        heads, few, _ = _few_and_many(table)
        sharp = _sharp(few)
        for items, own in heads.groupby("items"):
            means = [own["entropy"].mean(), own["log_items"].mean(), own["entropy"][sharp].mean()]
            rows.append([display_name(model), str(items), *(f"{mean:.2f}" for mean in [*means, own["largest"].mean()])])
    columns = ["model", "items", "entropy, mean over layers and heads", "even attention", "of sharp heads"]
    return grid([*columns, "largest weight"], rows)


def _sharp(few: Any) -> Any:
    """Which heads have less than half of the entropy of even attention, at the fewest items."""
    return few["entropy"] < few["log_items"] / 2


def _dispersal(table: pd.DataFrame) -> dict[str, float]:
    """How far the sharp heads of a model spread from the fewest items to the most."""
    _, few, many = _few_and_many(table)
    sharp = _sharp(few)
    more_items = many["log_items"] - few["log_items"]
    slope = (many["entropy"] - few["entropy"]) / more_items
    falls = np.log(many["largest"] / few["largest"]) / more_items
    more = many["entropy_low"] > few["entropy_high"]
    found = {
        "sharp": sharp.sum(),
        "heads": len(sharp),
        "share": more[sharp].mean(),
        "to": many["items"].max(),
        "slope": slope[sharp].median(),
        "low": slope[sharp].quantile(0.25),
        "high": slope[sharp].quantile(0.75),
        "others": slope[~sharp].median(),
        "falls": falls[sharp].median(),
    }
    return {name: float(value) for name, value in found.items()}


def temperature_on_text(of: RopeResults) -> Finding:
    """The loss of language models with every score at an adaptive temperature."""
    title = "An adaptive temperature on a language model that was trained without"
    reported = "no figure that is compared here."
    rule = "no figure to compare with: helps or hurts where the interval over documents lies on one side of 0."
    tables = of.tables("temperature", SMOLLM2, *SHIPPED)
    if SMOLLM2 not in tables:
        return Finding(title, reported, *_not_measured("temperature"), rule)
    rows = []
    for model, table in tables.items():
        for row in table.to_dict("records"):
            effect = "hurts" if row["low"] > 0 else "helps" if row["high"] < 0 else ""
            cells = [str(row["length"]), f"{row['n']:,}", f"{row['loss']:.4f}", f"{row['changed']:.4f}"]
            rows.append([display_name(model), *cells, with_interval(row, "difference", "+.4f"), effect])
    own = tables[SMOLLM2]
    blocks: list[Block] = [
        grid(["model", "tokens", "n", "loss", "with the temperature", "difference", ""], rows),
        "Nats per token on the same text at every length, of whose windows the first token is not predicted; "
        f"{own['documents'].iloc[0]} documents, which intervals resample.",
    ]
    each = ", ".join(f"{with_interval(row, 'difference', '+.4f')} at {row['length']}" for row in own.to_dict("records"))
    sentence = (
        f"In windows of several lengths {display_name(SMOLLM2)}'s loss changes by {each} tokens, in nats per token."
    )
    return Finding(title, reported, "new", sentence, rule, blocks, of.files(["temperature"], *tables))


def _standard(of: RopeResults, model: str) -> bool:
    """Whether every increment of a model is 1."""
    return SHIPPED.get(model) == "static" or model in of.runs("static").values()


def _query_norms(of: RopeResults, model: str) -> pd.DataFrame | None:
    """The squares of the mean norms of the queries, of what turns."""
    norms = of.table(model, "norms")
    if norms is None:
        return None
    own = norms[(norms["side"] == "query") & (norms["frequency"] > 0)]
    return own.assign(square=own["norm"] ** 2)


def _share_of_norm(quarter: int, of: RopeResults, model: str) -> float | None:
    """How much of the squares of the queries' mean norms a quarter of the frequencies has."""
    own = _query_norms(of, model)
    return (
        None
        if own is None
        else float(own.loc[frequency_quarters(own) == quarter, "square"].sum() / own["square"].sum())
    )


def _steps(of: RopeResults, model: str) -> Any:
    """The mean increment of each layer, or of all; None where it was untested."""
    if _standard(of, model):
        return 1.0
    increments = of.table(model, "increments")
    if increments is None:
        return None
    sums = increments.assign(total=increments["mean"] * increments["n"]).groupby("layer")[["total", "n"]].sum()
    return sums["total"] / sums["n"]


def _log_frequency(of: RopeResults, model: str, per_token: bool = True, layer: int | None = None) -> float | None:
    """The log10 of the frequencies, in the mean over a layer's squared query norms, and over layers.

    Per position, or per token: a mean increment of c turns every frequency c times as fast.
    """
    own, steps = _query_norms(of, model), _steps(of, model) if per_token else 1.0
    if own is None or steps is None:
        return None
    weighed = own.assign(log=np.log10(own["frequency"]) * own["square"]).groupby("layer")[["log", "square"]].sum()
    logs = weighed["log"] / weighed["square"] + np.log10(steps)
    return float(logs.mean() if layer is None else logs[layer])


def _positional(of: RopeResults, model: str) -> float | None:
    heads = of.table(model, "positional")
    return None if heads is None else float(heads["positional"].mean())


def _part(name: str, part: str, quarter: int, of: RopeResults, model: str) -> float | None:
    name = "absolute" if name == "held" and _standard(of, model) else name  # its positions are held as they are
    table = of.table(model, name)
    return None if table is None else float(_by_layer(table).loc[("all", quarter), part])


def _first_embedding_drop(of: RopeResults, model: str) -> float | None:
    drops = of.table(model, "drops")
    if drops is None:
        return None
    own = drops[(drops["layer"].astype(str) == "all") & (drops["queries"] == "early")]
    return float(own["drop"].mean())


def _sink(of: RopeResults, model: str) -> float | None:
    sinks = of.table(model, "sinks")
    return None if sinks is None else float(sinks.loc[sinks["first"] == "common", "share"].mean())


def _spread(of: RopeResults, model: str) -> float | None:
    """By how much the mean entropy grows with the number of items, over what even attention's does."""
    table = of.table(model, "dispersion")
    if table is None:
        return None
    own = table[(table["head"].astype(str) == "all") & (table["items"] >= FEWEST)]
    means = own.groupby("items")[["entropy", "log_items"]].mean()
    grown = means.iloc[-1] - means.iloc[0]
    return float(grown["entropy"] / grown["log_items"])


QUANTITIES: dict[str, tuple[Callable[[RopeResults, str], float | None], str, str]] = {
    "squared query norms, share of the highest quarter": (partial(_share_of_norm, 0), "norms", ".1%"),
    "squared query norms, share of the lowest quarter": (partial(_share_of_norm, 3), "norms", ".1%"),
    "mean log10 frequency of the queries, per position": (partial(_log_frequency, per_token=False), "norms", ".3f"),
    "mean log10 frequency of the queries, per token": (_log_frequency, "increments", ".3f"),
    "positional heads, share of all": (_positional, "positional", ".1%"),
    "residual part, early queries": (partial(_part, "absolute", "residual", 0), "absolute", ".4f"),
    "residual part, late queries": (partial(_part, "absolute", "residual", LATE), "absolute", ".4f"),
    "residual part, early, positions on a ruler": (partial(_part, "held", "residual", 0), "held", ".4f"),
    "residual part, late, positions on a ruler": (partial(_part, "held", "residual", LATE), "held", ".4f"),
    "mask part, early queries": (partial(_part, "absolute", "mask", 0), "absolute", ".4f"),
    "mask part, late queries": (partial(_part, "absolute", "mask", LATE), "absolute", ".4f"),
    "residual part that goes with the first embedding, early": (_first_embedding_drop, "drops", ".0%"),
    "attention to position 0, mean over heads": (_sink, "sinks", ".1%"),
    "entropy's growth over that of even attention": (_spread, "dispersion", ".2f"),
}
"""What is compared between sources: how it is read from the files, from which, and how it is written."""


def compare_sources(of: RopeResults) -> Finding:
    """Do learned increments change which frequencies are used, how absolute position leaks, how heads disperse?"""
    title = "What learned increments change about all this"
    reported = "nothing."
    runs = {variant: of.runs(variant) for variant in ("static", "shared", "per_layer")}
    paired = {variant: sorted(set(runs[variant]) & set(runs["static"])) for variant in ("shared", "per_layer")}
    if any(of.table(model, "norms") is None for model in SHIPPED) or min(map(len, paired.values())) < 2:
        return Finding(title, reported, *_not_measured("norms, absolute and dispersion, at two seeds,"), "")
    compared = SourceDifferences(of, runs, paired)
    rows = []
    for name, (read, _, form) in QUANTITIES.items():
        cells = ["" if value is None else f"{value:{form}}" for value in (read(of, model) for model in SHIPPED)]
        rows.append([name, *cells, *compared.cells(read, name, form)])
    blocks: list[Block] = [
        grid(["quantity", *SHIPPED, "shared minus RoPE, over seeds", "per layer minus RoPE"], rows),
        "The three shipped models (preset base, one seed each), and differences over n seeds of the preset "
        f"{of.suite.name}; of shares, in points. Quarters are of the rotary frequencies, norms means over "
        "tokens. A mean increment of c turns every frequency of its layer c times as fast, so frequencies per token "
        "are what layers of different steps can be compared in; they are in radians. Parts are means over layers and "
        "heads, nats squared; what goes "
        "with the first embedding is the mean of four replacements. On a ruler positions are equal steps apart, each "
        "text's own mean, so that nothing leaks through the rotation and distances keep their scale; a model with "
        "learned increments is then off what it was trained on.",
        *_frequencies_by_layer(compared),
    ]
    count, changed = compared.count, compared.changed
    sentence = f"{len(changed)} of {count} differences over seeds: {'; '.join(changed) or 'none'}."
    rule = (
        "no figure to compare with: a change is one where the interval over seeds of the difference to RoPE (preset "
        f"{of.suite.name}, Student's t, the same seeds) lies on one side of 0. Of {count} intervals "
        f"{count / 20:.1f} would by chance; those of a quantity and of its layers, or with and without a ruler, are "
        "related."
    )
    models = [*SHIPPED, *(model for by_seed in runs.values() for model in by_seed.values())]
    files = of.files(sorted({name for _, name, _ in QUANTITIES.values()}), *models)
    return Finding(title, reported, "new", sentence, rule, blocks, files)


@dataclass
class SourceDifferences:
    """The differences to RoPE of runs with learned increments, at the same seeds.

    Args:
        of: the measurements.
        runs: the measured models of RoPE and of each source of increments, by seed.
        paired: the seeds of each source that RoPE has too.
        changed: what was found to differ, by intervals over seeds.
        count: how many intervals there were.
    """

    of: RopeResults
    runs: dict[str, dict[int, str]]
    paired: dict[str, list[int]]
    changed: list[str] = field(default_factory=list)
    count: int = 0

    def cells(self, read: Callable[[RopeResults, str], float | None], name: str, form: str) -> list[str]:
        """The difference of each source; those that an interval tells from 0 are noted."""
        cells = []
        for variant, seeds in self.paired.items():
            pairs = [(read(self.of, self.runs[variant][s]), read(self.of, self.runs["static"][s])) for s in seeds]
            differences = np.array([ours - base for ours, base in pairs if ours is not None and base is not None])
            if len(differences) < 2:
                cells.append("untested")
                continue
            low, high = t_interval(differences)
            row = {"difference": differences.mean(), "low": low, "high": high}
            written = with_interval(row, "difference", f"+{form}")
            cells.append(f"{written}, n = {len(differences)}")
            self.count += 1
            if low > 0 or high < 0:
                self.changed.append(f"{name} ({variant.replace('_', ' ')} {written})")
        return cells


def _frequencies_by_layer(compared: SourceDifferences) -> list[Block]:
    """The frequencies of each layer, and its mean increment, where RoPE's norms were measured."""
    of = compared.of
    static = of.tables("norms", *compared.runs["static"].values())
    if not static:
        return []
    rows = []
    for layer in sorted({layer for norms in static.values() for layer in norms["layer"]}):
        read = partial(_log_frequency, layer=layer)
        own = np.mean([read(of, model) for model in static])
        steps = [
            [found[layer] for seed in seeds if (found := _steps(of, compared.runs[variant][seed])) is not None]
            for variant, seeds in compared.paired.items()
        ]
        cells = [f"{own:.3f}", *compared.cells(read, f"log10 frequency per token, layer {layer}", ".3f")]
        rows.append([str(layer), *cells, *(", ".join(f"{step:.2f}" for step in of_seeds) for of_seeds in steps)])
    columns = ["layer", "RoPE", "shared minus RoPE", "per layer minus RoPE", "mean increment, shared", "per layer"]
    said = "Layer by layer, the mean log10 frequency of the queries per token, and the mean increment at each seed:"
    return [said, grid(columns, rows)]


ROPE_FINDINGS: tuple[Callable[[RopeResults], Finding], ...] = (
    low_frequencies,
    heads_by_position,
    truncated_frequencies,
    p_rope,
    absolute_position,
    first_embedding,
    sinks_carry_a_fingerprint,
    maximum_task,
    heads_disperse,
    temperature_on_text,
    compare_sources,
)


def _not_measured(tables: str) -> tuple[Call, str]:
    return "untested", f"Not measured yet: {tables} (lens-positions experiments rope, maximum)."
