"""How RoPE itself is used: what was reported, what was found, and the verdict, from the files of results alone.

As `findings.py`, for the three results about the machinery that increments act on. The rules of the verdicts were
written before the files that they judge were read; the tools had been tried on SmolLM2-135M before.

Reported: Barbero et al. (arXiv 2410.06205), Ruscio et al. (arXiv 2606.06160), Veličković et al. (arXiv 2410.01104).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lens_positions.analysis.frequencies import SIDES, high_frequency_use
from lens_positions.analysis.intervals import t_interval
from lens_positions.errors import PositionsError

from .findings import Finding, Suite, Verdict
from .machinery import SMOLLM2
from .maximum import MOST, accuracy_table
from .ship import SHIPPED

ARCHITECTURES = {"static": "RoPE", "ntk": "NTK-scaled", "window": "sliding window"}
FRACTIONS = {"static": "1 (RoPE)", "rope_75": "0.75", "rope_25": "0.25", "rope_0": "0 (no encoding)"}
QUERIES = {"early": 0, "late": 3}
"""The quarter of the input, by name."""

MOST_HEADS = 0.1
"""The share of all heads up to which positional heads are a few."""

A_SINK = 0.3
"""The share of attention on position 0 from which a head is a sink."""

ALIKE = 0.9
"""The cosine from which states at position 0 are called the same whatever their token."""


@dataclass(frozen=True)
class Machinery:
    """The files of `python -m training machinery` and `maximum`, and the suite whose runs they measured."""

    folder: Path
    suite: Suite
    maximum: Path

    def path(self, model: str, name: str) -> Path:
        """Where a table of a model is."""
        return self.folder / model / f"{name}.csv"

    def table(self, model: str, name: str) -> pd.DataFrame | None:
        """A table of a model; None where it was not measured."""
        path = self.path(model, name)
        if not path.is_file():
            return None
        try:
            return pd.read_csv(path)
        except ValueError as error:
            raise PositionsError(f"{path} is damaged ({error}); expected a table.") from error

    def files(self, names: Sequence[str], *models: str) -> list[str]:
        """Of these, the files that are there, as RESULTS.md gives them."""
        paths = [self.path(model, name) for model in models for name in names]
        return [path.as_posix() for path in paths if path.is_file()]

    def runs(self, variant: str) -> dict[int, str]:
        """The measured runs of a variant of the suite, by seed."""
        prefix = f"{self.suite.folder.name}-{variant}-"
        found = [folder.name for folder in self.folder.glob(f"{prefix}*") if folder.is_dir()]
        seeds = sorted(int(name.removeprefix(prefix)) for name in found if name.removeprefix(prefix).isdecimal())
        return {seed: f"{prefix}{seed}" for seed in seeds}


def low_frequencies(of: Machinery) -> Finding:
    """Queries and keys are largest at the lowest frequencies."""
    norms = of.table(SMOLLM2, "norms")
    rule = (
        "reproduced where on both sides the lowest quarter of the frequencies has the larger norm than the highest in "
        "at least three quarters of the layers; not reproduced where it has on neither side in half of them; different "
        "otherwise."
    )
    title, reported = (
        "Queries and keys are largest at the lowest frequencies",
        "so in Gemma 7B, by the mean 2-norm of their chunks.",
    )
    if norms is None:
        return Finding(title, reported, *_not_measured("norms"), rule)
    norms = norms[norms["frequency"] > 0]
    quarter = (4 * norms["index"] / (norms["index"].max() + 1)).astype(int)
    lines = [
        "| side | layers | highest quarter | second | third | lowest quarter | lowest above highest | largest at |",
        "|---|---|---|---|---|---|---|---|",
    ]
    shares, peaks = [], []
    for side in SIDES:
        own = norms["side"] == side
        means = norms[own].groupby([norms["layer"], quarter])["norm"].mean().unstack()
        shares.append(float((means[3] > means[0]).mean()))
        by_frequency = norms[own].groupby(["layer", "frequency"])["norm"].mean().unstack()
        wavelength = 2 * np.pi / by_frequency.idxmax(axis=1)
        peaks.append(float(wavelength.median()))
        thirds = np.array_split(means.index.to_numpy(), 3)
        for part in (means.index.to_numpy(), *thirds):
            cells = [f"{means.loc[part, q].mean():.2f}" for q in range(4)]
            above = int((means.loc[part, 3] > means.loc[part, 0]).sum())
            cells += [f"{above} of {len(part)} layers", f"{wavelength[part].median():,.0f} positions"]
            lines.append(f"| {side} | {part[0]} to {part[-1]} | {' | '.join(cells)} |")
    verdict: Verdict = "different"
    if min(shares) >= 0.75:
        verdict = "reproduced"
    elif max(shares) <= 0.5:
        verdict = "not reproduced"
    n = norms.iloc[0]
    lines += [
        "",
        f"SmolLM2-135M, {n['n']:,} tokens of {n['documents']} held-out documents; mean 2-norm of a chunk; last the "
        "wavelength with the largest norm, the median over layers.",
    ]
    sentence = (
        f"In SmolLM2-135M the lowest quarter is larger than the highest in {shares[0]:.0%} of the layers for queries "
        f"and {shares[1]:.0%} for keys; in the median layer the single largest norm is at a wavelength of "
        f"{peaks[0]:,.0f} and {peaks[1]:,.0f} positions, of up to {2 * np.pi / norms['frequency'].min():,.0f}."
    )
    return Finding(title, reported, verdict, sentence, rule, lines, of.files(["norms"], SMOLLM2))


def heads_by_position(of: Machinery) -> Finding:
    """A few heads attend by position alone, with the highest frequencies."""
    norms, heads = of.table(SMOLLM2, "norms"), of.table(SMOLLM2, "positional")
    rule = (
        f"reproduced where there are such heads, at most {MOST_HEADS:.0%} of all, and the highest quarter of the "
        "frequencies has a larger share of their squared norm than of the other heads' on both sides (Mann-Whitney, p "
        "< 0.05); not reproduced where there are none; different otherwise."
    )
    title = "A few heads attend by position alone, and use the highest frequencies"
    reported = "in Gemma 7B the highest frequencies are used by a few heads, on the diagonal or the previous token."
    if norms is None or heads is None:
        return Finding(title, reported, *_not_measured("norms and positional"), rule)
    found = heads[heads["positional"]]
    lines = ["| layer, head | tokens back | share of attention | tokens in another order |", "|---|---|---|---|"]
    for row in found.sort_values("shuffled", ascending=False).head(12).to_dict("records"):
        cells = [_ends(row, name, ".0%") for name in ("share", "shuffled")]
        lines.append(f"| {row['layer']}, {row['head']} | {row['offset']} | {' | '.join(cells)} |")
    use: dict[Any, Any] = high_frequency_use(norms, heads).set_index("side").to_dict("index")
    lines += ["", f"The {min(12, len(found))} most certain of {len(found)}; intervals resample documents."]
    verdict: Verdict = "not reproduced"
    sentence = f"None of SmolLM2-135M's {len(heads)} heads does."
    if found.empty:
        lines = []
    else:
        more = [row["p"] < 0.05 and row["positional"] > row["other"] for row in use.values()]
        verdict = "reproduced" if all(more) and len(found) <= MOST_HEADS * len(heads) else "different"
        counts = found["offset"].value_counts().sort_index()
        offsets = ", ".join(f"{count} at {offset}" for offset, count in counts.items())
        each = "; ".join(
            f"{side} {row['positional']:.0%} against {row['other']:.0%} (p = {row['p']:.2g})"
            for side, row in use.items()
        )
        sentence = (
            f"{len(found)} of SmolLM2-135M's {len(heads)} heads give over half of their attention to one offset "
            f"whatever the order of the tokens ({offsets} tokens back); the highest quarter has of their squared norm, "
            f"beside the others': {each}."
        )
    return Finding(title, reported, verdict, sentence, rule, lines, of.files(["norms", "positional"], SMOLLM2))


def truncated_frequencies(of: Machinery) -> Finding:
    """What a trained model loses without its lowest, or its highest, frequencies."""
    models = [SMOLLM2, "bilingual-rope"]
    tables = {model: table for model in models if (table := of.table(model, "truncated")) is not None}
    title = "A trained model without a part of its frequencies"
    rule = "no figure to compare with: the intervention that p-RoPE is, on models that were trained with all of them."
    reported = "nothing of trained models; over long contexts no low frequency is a stable channel for meaning."
    if SMOLLM2 not in tables:
        return Finding(title, reported, *_not_measured("truncated"), rule)
    lines = ["| model | kept | without the lowest | without the highest |", "|---|---|---|---|"]
    for model, table in tables.items():
        own: Any = table.set_index(["keep", "drop"])
        for kept in sorted(set(table["keep"]), reverse=True):
            cells = [
                _between(own.loc[(kept, drop)], "difference", "+.3f") if (kept, drop) in own.index else ""
                for drop in ("lowest", "highest")
            ]
            lines.append(f"| {model} | {kept:.0%} | {' | '.join(cells)} |")
    n = tables[SMOLLM2].iloc[0]
    lines += [
        "",
        f"Change of loss in nats per token, windows of a context (at most {n['length']:.0f} tokens), "
        f"{n['documents']:.0f} held-out documents; intervals resample them.",
    ]
    by: Any = tables[SMOLLM2].set_index(["keep", "drop"])["difference"]
    largest = max(kept for kept, _ in by.index)
    sentence = (
        f"With {largest:.0%} of the frequencies SmolLM2-135M loses {by[largest, 'lowest']:+.3f} nats per token without "
        f"the lowest and {by[largest, 'highest']:+.3f} without the highest; with none of them {by[0.0, 'lowest']:+.2f}."
    )
    return Finding(title, reported, "new", sentence, rule, lines, of.files(["truncated"], *tables))


def p_rope(of: Machinery) -> Finding:
    """Models trained with a fraction of the frequencies."""
    suite = of.suite
    rows = {variant: suite.paired(variant) for variant in FRACTIONS if variant != "static"}
    beside: Any = suite.difference("rope_0", "rope_25")
    title = "p-RoPE: training with the highest fraction of the frequencies alone"
    reported = (
        "at 2B parameters 0.75-RoPE has the best validation perplexity of those compared, 0.25-RoPE is worse than "
        "RoPE, no encoding worst."
    )
    rule = (
        "reproduced where 0.75 loses less than RoPE, 0.25 more and none more, and none more than 0.25, each difference "
        "with its whole interval over documents (seeds averaged) on that side; not reproduced where none of the first "
        "three does; different otherwise."
    )
    if beside is None or any(row is None for row in rows.values()):
        return Finding(title, reported, "not measured", "Not every fraction has been trained yet.", rule)
    lines = [
        "| fraction | seeds | 1 context | difference to RoPE | over seeds | over documents | 2 contexts | 4 contexts |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant, name in FRACTIONS.items():
        row, paired = suite.loss(variant), suite.paired(variant)
        assert row is not None
        cells = [name, f"{row['n_seeds']}", f"{row['loss']:.4f}", "", "", ""]
        if paired is not None:
            cells[3:] = [
                f"{paired['difference']:+.4f}",
                *(_range(paired, over, "+.4f") for over in ("seeds", "documents")),
            ]
        for contexts in (2, 4):
            longer: Any = suite.loss(variant, contexts)
            cells.append(f"{longer['loss']:.4f}" + ("" if paired is None else f" ({longer['difference']:+.4f})"))
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Nats per byte, the same bytes at every length; differences are to RoPE at the same seeds, and the losses "
        "means over all seeds of a row.",
    ]
    found: Any = rows
    below, above = "documents_high", "documents_low"
    first = [found["rope_75"][below] < 0, found["rope_25"][above] > 0, found["rope_0"][above] > 0]
    verdict: Verdict = "different"
    if all(first) and beside[above] > 0:
        verdict = "reproduced"
    elif not any(first):
        verdict = "not reproduced"
    each = "; ".join(
        f"{FRACTIONS[variant]} {row['difference']:+.4f} ({_range(row, 'documents', '+.4f')} over documents)"
        for variant, row in found.items()
    )
    sentence = f"Against RoPE at the same seeds ({found['rope_0']['seeds'].replace(' ', ', ')}), nats per byte: {each}."
    return Finding(title, reported, verdict, sentence, rule, lines, [f"{suite.folder}/*/heldout.csv"])


def absolute_position(of: Machinery) -> Finding:
    """The two sources of absolute position, in three architectures and in a pretrained model."""
    title = "Absolute position comes through the residual stream and the mask, and the architecture sets the balance"
    reported = "NTK scaling suppresses the residual part, sliding windows let it grow with depth, RoPE lies between."
    rule = (
        "NTK suppresses it where at every seed its mean over layers at early queries has its whole interval below that "
        "of RoPE; a window lets it grow where at every seed the last layer's has its whole interval above that of "
        "layer 1 at late queries, by a larger factor than RoPE's. Reproduced where both hold, not reproduced where "
        "neither does, different otherwise."
    )
    measured = {
        variant: {seed: of.table(model, "absolute") for seed, model in of.runs(variant).items()}
        for variant in ARCHITECTURES
    }
    tables: Any = {v: {s: t for s, t in by.items() if t is not None} for v, by in measured.items()}
    seeds = sorted(set.intersection(*(set(by) for by in tables.values())))
    smollm2 = of.table(SMOLLM2, "absolute")
    if not seeds or smollm2 is None:
        return Finding(title, reported, *_not_measured("absolute"), rule)
    lines = [
        "| model | layers | residual, early | residual, late | mask, early | mask, late |",
        "|---|---|---|---|---|---|",
    ]
    named = {f"{ARCHITECTURES[v]}, seed {seed}": tables[v][seed] for v in ARCHITECTURES for seed in seeds}
    for name, table in (named | {"SmolLM2-135M": smollm2}).items():
        over = table[table["head"] == "all"].set_index(["layer", "quarter"])
        layers = list(dict.fromkeys(over.index.get_level_values("layer")))
        if len(layers) > 8:
            layers = ["all", *layers[1::6], layers[-1]]
        for layer in layers:
            cells = [
                _ends(over.loc[(layer, quarter)], part, ".4f") for part in ("residual", "mask") for quarter in (0, 3)
            ]
            lines.append(f"| {name} | {layer} | {' | '.join(cells)} |")
    lines += [
        "",
        "Variance over repeats of log attention at a fixed distance, nats squared, mean over heads (and layers, where "
        f"it says all); {smollm2['documents'].iloc[0]} repeated beginnings of pieces of held-out English, which "
        "intervals resample. Pieces of one speech are counted as if they were independent.",
    ]
    lower, grows, factors = [], [], []
    for seed in seeds:
        by = {v: tables[v][seed][tables[v][seed]["head"] == "all"].set_index(["layer", "quarter"]) for v in tables}
        lower.append(by["ntk"].loc[("all", 0), "residual_high"] < by["static"].loc[("all", 0), "residual_low"])
        ends = {v: _growth(table) for v, table in by.items()}
        window = by["window"]
        last = max(window.index.get_level_values("layer"), key=lambda layer: -1 if layer == "all" else int(layer))
        apart = window.loc[(last, 3), "residual_low"] > window.loc[("1", 3), "residual_high"]
        grows.append(bool(apart and ends["window"] > ends["static"]))
        means = {v: by[v].loc[("all", 0), "residual"] for v in by}
        factors.append(
            f"seed {seed}: residual part at early queries RoPE {means['static']:.4f}, NTK {means['ntk']:.4f}, window "
            f"{means['window']:.4f}; late, last layer over layer 1: RoPE {ends['static']:.1f}, NTK {ends['ntk']:.1f}, "
            f"window {ends['window']:.1f}"
        )
    verdict: Verdict = "different"
    if all(lower) and all(grows):
        verdict = "reproduced"
    elif not any(lower) and not any(grows):
        verdict = "not reproduced"
    models = [of.runs(variant)[seed] for variant in ARCHITECTURES for seed in seeds]
    sentence = f"{'; '.join(factors)}."
    return Finding(title, reported, verdict, sentence, rule, lines, of.files(["absolute"], *models, SMOLLM2))


def _growth(over: pd.DataFrame) -> float:
    """The residual part at late queries: the last layer's over layer 1's."""
    own = over.xs(3, level="quarter")["residual"].drop("all")
    own.index = own.index.astype(int)
    return float(own[own.index.max()] / own[1])


def first_embedding(of: Machinery) -> Finding:
    """What goes with the embedding at position 0."""
    title = "Replacing the first embedding takes away a part of the residual part"
    reported = "replacing that of BOS before the forward pass took 40% away, at early queries."
    rule = (
        "reproduced where in SmolLM2-135M every replacement takes away more than nothing at early queries, with its "
        "whole interval; not reproduced where none does; different otherwise."
    )
    runs = {f"{name}, seed {s}": m for v, name in ARCHITECTURES.items() for s, m in of.runs(v).items()}
    models = {"SmolLM2-135M": SMOLLM2, "bilingual-rope": "bilingual-rope"} | runs
    tables = {name: t for name, model in models.items() if (t := of.table(model, "drops")) is not None}
    if "SmolLM2-135M" not in tables:
        return Finding(title, reported, *_not_measured("drops"), rule)
    lines = ["| model | queries | another token | mean | zeros | noise |", "|---|---|---|---|---|---|"]
    drops: Any = {}
    for name, table in tables.items():
        by = table[table["layer"].astype(str) == "all"].set_index(["replacement", "queries"])
        for queries in QUERIES:
            cells = [_between(by.loc[(how, queries)], "drop", "+.0%") for how in ("token", "mean", "zeros", "noise")]
            lines.append(f"| {name} | {queries} | {' | '.join(cells)} |")
        drops[name] = by
    own = drops["SmolLM2-135M"].xs("early", level="queries")
    verdict: Verdict = "different"
    if (own["low"] > 0).all():
        verdict = "reproduced"
    elif not (own["low"] > 0).any():
        verdict = "not reproduced"
    lines += ["", "Share of the residual part that goes, all layers; below 0 there is more of it. Intervals as above."]
    each = ", ".join(f"{how} {_between(row, 'drop', '+.0%')}" for how, row in own.to_dict("index").items())
    sentence = f"At early queries of SmolLM2-135M: {each}."
    files = of.files(["drops"], *(models[name] for name in tables))
    return Finding(title, reported, verdict, sentence, rule, lines, files)


def sinks_carry_a_fingerprint(of: Machinery) -> Finding:
    """Heads attend to position 0, whose states say which token is there."""
    title = "Sinks carry a fingerprint of the token at position 0"
    reported = "the same for every input where that token is BOS, else varying with the token."
    rule = (
        f"reproduced where in SmolLM2-135M some head gives over {A_SINK:.0%} of its attention to position 0 (whole "
        f"interval) and the states there with the texts' own first tokens have a mean cosine below {ALIKE} (whole "
        "interval) in most of the layers that have such heads; different where they do not; not reproduced where there "
        "is no such head. With a common first token the cosine is 1, as it must be in a causal model."
    )
    models = [SMOLLM2, *SHIPPED]
    tables: Any = {
        model: (sinks, prints)
        for model in models
        if (sinks := of.table(model, "sinks")) is not None and (prints := of.table(model, "fingerprints")) is not None
    }
    if SMOLLM2 not in tables:
        return Finding(title, reported, *_not_measured("sinks and fingerprints"), rule)
    lines = [
        "| model | sinks | largest share | cosine at position 0, common token | own tokens | at the 17th token |",
        "|---|---|---|---|---|---|",
    ]
    varied: list[float] = []
    for model, (sinks, prints) in tables.items():
        found = sinks[sinks["low"] > A_SINK]
        common, own = (
            prints[(prints["first"] == first) & (prints["layer"].isin(found["layer"]) | found.empty)]
            for first in ("common", "own")
        )
        if model == SMOLLM2:
            varied = [float((own["first_token_high"] < ALIKE).mean())] if len(found) else []
            own_cosine = own["first_token"].mean()
        cells = [f"{len(found)} of {len(sinks)} heads", f"{sinks['share'].max():.0%}"]
        means = common["first_token"].mean(), own["first_token"].mean(), own["later"].mean()
        cells += [f"{mean:.3f}" for mean in means]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    lines += ["", "Cosines of the residual stream between texts, means over the layers with sinks (over all without)."]
    verdict: Verdict = "not reproduced"
    sentence = "SmolLM2-135M has no such head."
    if varied:
        verdict = "reproduced" if varied[0] > 0.5 else "different"
        sinks = tables[SMOLLM2][0]
        sentence = (
            f"{(sinks['low'] > A_SINK).sum()} of SmolLM2-135M's {len(sinks)} heads are sinks; with the texts' own "
            f"first tokens the states at position 0 have a mean cosine of {own_cosine:.3f} there."
        )
    return Finding(title, reported, verdict, sentence, rule, lines, of.files(["sinks", "fingerprints"], *tables))


def maximum_task(of: Machinery) -> Finding:
    """Attention that was sharp in training disperses, and a temperature helps."""
    title = "A head that is sharp on few items disperses on many; an adaptive temperature makes it better"
    reported = "so in the task of finding the largest of n items, trained at up to 16, without further training."
    rule = (
        f"reproduced where from four times the training size on, {4 * MOST} items, accuracy with the temperature is "
        "above that without at most of the sizes (whole interval over seeds) and below it at none, and the entropy "
        "grows with every doubling; not reproduced where it is above at no size; different otherwise."
    )
    paths = sorted(of.maximum.glob("seed-*.csv"))
    if not paths:
        return Finding(title, reported, *_not_measured("maximum"), rule)
    table = accuracy_table(pd.concat([pd.read_csv(path) for path in paths]))
    lines = [
        "| items | accuracy | with the temperature | difference | entropy | log n | largest weight |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table.to_dict("records"):
        cells = [_ends(row, "learned", ".1%"), _ends(row, "adaptive", ".1%"), _ends(row, "difference", "+.1%")]
        cells += [f"{row['entropy']:.2f}", f"{row['log_items']:.2f}", f"{row['largest']:.3f}"]
        lines.append(f"| {row['items']:,} | {' | '.join(cells)} |")
    seeds = int(table["n_seeds"].min())
    lines += ["", f"{seeds} seeds, which the intervals are over (Student's t)."]
    beyond = table[table["items"] >= 4 * MOST]
    above, below = beyond["difference_low"] > 0, beyond["difference_high"] < 0
    spreads = bool((np.diff(table["entropy"]) > 0).all())
    verdict: Verdict = "different"
    if above.mean() > 0.5 and not below.any() and spreads:
        verdict = "reproduced"
    elif not above.any():
        verdict = "not reproduced"
    first, last = table.iloc[0], table.iloc[-1]
    sentence = (
        f"From {first['items']:.0f} to {last['items']:,.0f} items accuracy falls from {first['learned']:.1%} to "
        f"{last['learned']:.1%}, with the temperature to {last['adaptive']:.1%} (difference "
        f"{_ends(last, 'difference', '+.1%')}, {seeds} seeds); entropy grows from {first['entropy']:.2f} to "
        f"{last['entropy']:.2f} nats, log n from {first['log_items']:.2f} to {last['log_items']:.2f}."
    )
    return Finding(title, reported, verdict, sentence, rule, lines, [path.as_posix() for path in paths])


def heads_disperse(of: Machinery) -> Finding:
    """Entropy of a language model's heads by number of items."""
    title = "Heads of a language model disperse with the number of items"
    reported = "with bounded scores every weight falls like 1/n."
    rule = (
        "reproduced where in SmolLM2-135M at least three quarters of the heads have a larger mean entropy at the most "
        "items than at the fewest, with intervals apart; not reproduced where less than half have; different otherwise."
    )
    tables: Any = {model: t for model in (SMOLLM2, *SHIPPED) if (t := of.table(model, "dispersion")) is not None}
    if SMOLLM2 not in tables:
        return Finding(title, reported, *_not_measured("dispersion"), rule)
    lines = [
        "| model | items | entropy, mean over heads | of even attention | least head | largest weight |",
        "|---|---|---|---|---|---|",
    ]
    shares: dict[str, float] = {}
    for model, table in tables.items():
        by_head = table[table["head"] != "all"]
        for items, own in by_head.groupby("items"):
            cells = [own["entropy"].mean(), own["log_items"].mean(), own["entropy"].min(), own["largest"].mean()]
            lines.append(f"| {model} | {items} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
        ends: list[Any] = [
            by_head[by_head["items"] == end].set_index(["layer", "head"])
            for end in (by_head["items"].min(), by_head["items"].max())
        ]
        shares[model] = float((ends[1]["entropy_low"] > ends[0]["entropy_high"]).mean())
    n = tables[SMOLLM2].iloc[0]
    lines += ["", f"Nats; a row is a query with so many tokens up to it, to twice as many; {n['documents']} documents."]
    table = tables[SMOLLM2]
    own = table[table["head"] == "all"].groupby("items")[["entropy", "log_items"]].mean()
    verdict: Verdict = "different"
    if shares[SMOLLM2] >= 0.75:
        verdict = "reproduced"
    elif shares[SMOLLM2] < 0.5:
        verdict = "not reproduced"
    sentence = (
        f"{shares[SMOLLM2]:.0%} of SmolLM2-135M's heads have a larger entropy at {own.index.max()} items than at "
        f"{own.index.min()}; the mean grows from {own['entropy'].iloc[0]:.2f} to {own['entropy'].iloc[-1]:.2f} nats, "
        f"that of even attention from {own['log_items'].iloc[0]:.2f} to {own['log_items'].iloc[-1]:.2f}."
    )
    return Finding(title, reported, verdict, sentence, rule, lines, of.files(["dispersion"], *tables))


def temperature_on_text(of: Machinery) -> Finding:
    """The loss of language models with every score at an adaptive temperature."""
    title = "An adaptive temperature on a language model that was trained without"
    reported = "no figure that is compared here."
    rule = "no figure to compare with: helps or hurts where the interval over documents lies on one side of 0."
    tables: Any = {model: t for model in (SMOLLM2, *SHIPPED) if (t := of.table(model, "temperature")) is not None}
    if SMOLLM2 not in tables:
        return Finding(title, reported, *_not_measured("temperature"), rule)
    lines = ["| model | tokens | loss | with the temperature | difference |", "|---|---|---|---|---|"]
    for model, table in tables.items():
        for row in table.to_dict("records"):
            difference = _between(row, "difference", "+.4f")
            lines.append(f"| {model} | {row['length']} | {row['loss']:.4f} | {row['changed']:.4f} | {difference} |")
    own = tables[SMOLLM2]
    n = own.iloc[0]
    lines += ["", f"Nats per token on the same tokens at every length, {n['documents']:.0f} held-out documents."]
    each = ", ".join(f"{_between(row, 'difference', '+.4f')} at {row['length']}" for row in own.to_dict("records"))
    sentence = f"SmolLM2-135M's loss changes by {each} tokens, in nats per token."
    return Finding(title, reported, "new", sentence, rule, lines, of.files(["temperature"], *tables))


def _share_of_norm(highest: bool, of: Machinery, model: str) -> float | None:
    """How much of the squared norm of queries the highest, or the lowest, quarter of the frequencies has."""
    norms = of.table(model, "norms")
    if norms is None:
        return None
    own = norms[(norms["side"] == "query") & (norms["frequency"] > 0)]
    quarter = 4 * own["index"] // (own["index"].max() + 1)
    squares = own["norm"] ** 2
    return float(squares[quarter == (0 if highest else 3)].sum() / squares.sum())


def _positional(of: Machinery, model: str) -> float | None:
    heads = of.table(model, "positional")
    return None if heads is None else float(heads["positional"].mean())


def _part(name: str, part: str, quarter: int, of: Machinery, model: str) -> float | None:
    table = of.table(model, name)
    if table is None:
        return None
    own = table[(table["layer"].astype(str) == "all") & (table["quarter"] == quarter)]
    return float(own[part].iloc[0])


def _dropped(of: Machinery, model: str) -> float | None:
    drops = of.table(model, "drops")
    if drops is None:
        return None
    own = drops[(drops["layer"].astype(str) == "all") & (drops["queries"] == "early")]
    return float(own["drop"].mean())


def _sink(of: Machinery, model: str) -> float | None:
    sinks = of.table(model, "sinks")
    return None if sinks is None else float(sinks["share"].mean())


def _spread(of: Machinery, model: str) -> float | None:
    """Nats that a head's entropy grows by from the fewest to the most items."""
    table = of.table(model, "dispersion")
    if table is None:
        return None
    means = table[table["head"] == "all"].groupby("items")["entropy"].mean()
    return float(means.loc[means.index.max()] - means.loc[means.index.min()])


QUANTITIES: dict[str, tuple[Callable[[Machinery, str], float | None], str, str]] = {
    "squared norm of queries in the highest quarter of frequencies": (partial(_share_of_norm, True), "norms", ".1%"),
    "the same, lowest quarter": (partial(_share_of_norm, False), "norms", ".1%"),
    "positional heads": (_positional, "positional", ".1%"),
    "residual part, early queries": (partial(_part, "absolute", "residual", 0), "absolute", ".4f"),
    "residual part, late queries": (partial(_part, "absolute", "residual", 3), "absolute", ".4f"),
    "residual part, early, positions held on a ruler": (partial(_part, "held", "residual", 0), "held", ".4f"),
    "residual part, late, positions held on a ruler": (partial(_part, "held", "residual", 3), "held", ".4f"),
    "mask part, early queries": (partial(_part, "absolute", "mask", 0), "absolute", ".4f"),
    "mask part, late queries": (partial(_part, "absolute", "mask", 3), "absolute", ".4f"),
    "residual part that goes with the first embedding, early": (_dropped, "drops", ".0%"),
    "attention to position 0, mean over heads": (_sink, "sinks", ".1%"),
    "entropy gained from the fewest to the most items": (_spread, "dispersion", ".2f"),
}
"""What is compared between sources: how it is read from the files, from which, and how it is written."""


def together(of: Machinery) -> Finding:
    """Do learned increments change which frequencies are used, how absolute position leaks, how heads disperse?"""
    title = "What learned increments change about all this"
    reported = "nothing."
    rule = (
        "no figure to compare with: a change is one where the interval over seeds of the difference to RoPE (preset "
        f"{of.suite.folder.name}, Student's t, the same seeds) lies on one side of 0. No correction for the number of "
        "rows: at 95% one in twenty would by chance."
    )
    if not all(of.table(model, "norms") is not None for model in SHIPPED):
        return Finding(title, reported, *_not_measured("norms, absolute and dispersion"), rule)
    runs = {variant: of.runs(variant) for variant in ("static", "shared", "per_layer")}
    lines = [
        f"| mean over layers and heads | {' | '.join(SHIPPED)} | shared minus RoPE over seeds | per layer minus RoPE |",
        "|---|---|---|---|---|---|",
    ]
    changed = []
    for name, (read, _, form) in QUANTITIES.items():
        values = [read(of, model) for model in SHIPPED]
        cells = ["" if value is None else f"{value:{form}}" for value in values]
        for variant in ("shared", "per_layer"):
            pairs = [
                (read(of, runs[variant][seed]), read(of, runs["static"][seed]))
                for seed in sorted(set(runs[variant]) & set(runs["static"]))
            ]
            differences = np.array([ours - base for ours, base in pairs if ours is not None and base is not None])
            if len(differences) < 2:
                cells.append("not measured")
                continue
            low, high = t_interval(differences)
            sign = f"+{form}"
            cells.append(f"{differences.mean():{sign}} ({low:{sign}} to {high:{sign}})")
            if low > 0 or high < 0:
                changed.append(f"{name} ({variant.replace('_', ' ')} {differences.mean():{sign}})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    seeds = sorted(set(runs["static"]) & set(runs["per_layer"]))
    lines += [
        "",
        f"The three shipped models (preset base, one seed each), and differences over {len(seeds)} seeds of the preset "
        f"{of.suite.folder.name}. A difference of shares is in points. On a ruler every position is one step after the "
        "last, so that nothing leaks through the rotation.",
    ]
    sentence = f"Over {len(seeds)} seeds these change: {'; '.join(changed) or 'none'}."
    files = of.files(sorted({name for _, name, _ in QUANTITIES.values()}), *SHIPPED)
    files += [f"{of.folder}/{of.suite.folder.name}-*/"] if seeds else []
    return Finding(title, reported, "new", sentence, rule, lines, files)


ROPE_FINDINGS: tuple[Callable[[Machinery], Finding], ...] = (
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
    together,
)


def _not_measured(tables: str) -> tuple[Verdict, str]:
    return "not measured", f"The table(s) {tables} have not been measured yet (python -m training machinery, maximum)."


def _between(row: Any, column: str, form: str) -> str:
    """A value with the interval in `low` and `high`."""
    interval = "" if pd.isna(row["low"]) else f" ({row['low']:{form}} to {row['high']:{form}})"
    return f"{row[column]:{form}}{interval}" if not pd.isna(row[column]) else "none to lose"


def _ends(row: Any, column: str, form: str) -> str:
    """A value with the interval in columns of its own name."""
    low, high = row[f"{column}_low"], row[f"{column}_high"]
    return f"{row[column]:{form}}" + ("" if pd.isna(low) else f" ({low:{form}} to {high:{form}})")


def _range(row: Any, over: str, form: str) -> str:
    return "" if pd.isna(row[f"{over}_low"]) else f"{row[f'{over}_low']:{form}} to {row[f'{over}_high']:{form}}"
