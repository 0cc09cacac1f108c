"""What the answers say: a verdict by a rule, a sentence, tables and the power of each question."""

from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from ..markdown import grid

LENGTH = 256
"""Tokens of a training context, at which losses are told first."""

SMALL = 0.01
"""Nats per byte, near one hundredth of the loss, below which a part is called small."""

PARTS = ("scale", "identity", "learned along", "context", "all of it")


@dataclass(frozen=True)
class Answer:
    """One question and its answer.

    Args:
        number: the question's; what was measured, and the rule of the verdict, stand in the template.
        title: the question.
        verdict: the answer in a word or two.
        sentence: the answer with its numbers.
        power: what effect would have been seen.
        blocks: tables and paragraphs.
        figure, shows: a picture beside the page, and what it shows.
    """

    number: int
    title: str
    verdict: str
    sentence: str
    power: str
    blocks: list[pd.DataFrame | str] = field(default_factory=list)
    figure: str = ""
    shows: str = ""


def side(row: "pd.Series[Any]", at: float = 0.0, documents: bool = True) -> str:
    """Whether an estimate's intervals lie "above" or "below" a number; "undecided" where one reaches over it."""
    ends = [row["low"], row["high"]]
    ends += [row["documents_low"], row["documents_high"]] if documents else []
    if all(end > at for end in ends):
        return "above"
    return "below" if all(end < at for end in ends) else "undecided"


def known_but_unused(rows: pd.DataFrame, bytes_a_step: int) -> Answer:
    """Question 1."""
    share, increment, probe = (
        rows[rows["quantity"] == quantity].set_index("step").sort_index()
        for quantity in (
            "increment's share of what the probe knows",
            "increment: farthest from 0.5",
            "probe: farthest from 0.5",
        )
    )
    beyond = rows[rows["quantity"] == "increment: farther than with labels shuffled"].set_index("step").sort_index()
    last, first = share.index[-1], share.index[0]
    signed = rows[rows["quantity"] == "increment: farthest from 0.5, signed"].set_index("step").loc[last]
    shared = "seeds agree in its direction"
    if side(signed, documents=False) == "undecided":
        shared = "seeds differ in whether it is longer or shorter before words"
    use = side(share.loc[last], 0.5, documents=False)
    verdict = {"below": "known, mostly unused", "above": "known and used"}.get(use, "undecided")
    entered = [step for step in beyond.index if side(beyond.loc[step], documents=False) == "above"]
    when = "told from shuffled labels " + (
        f"at {', '.join(_size(step, bytes_a_step) for step in entered)}" if entered else "at no step"
    )
    sentence = (
        f"After {_size(last, bytes_a_step)} the best probe of the residual stream reaches an area of "
        f"{0.5 + probe.loc[last, 'estimate']:.3f} within a first byte, the farthest increment is "
        f"{_estimate(increment.loc[last])} away from 0.5 ({when}): {_estimate(share.loc[last], 2)} of the probe's "
        f"distance, against {_estimate(share.loc[first], 2)} after {_size(first, bytes_a_step)}; {shared}."
    )
    return Answer(
        1,
        "Do word boundaries enter the increments with training?",
        verdict,
        sentence,
        f"the interval over seeds of the farthest increment is {increment.loc[last, 'half_width']:.3f} wide to each "
        f"side after {_size(last, bytes_a_step)}, that of its share {share.loc[last, 'half_width']:.2f}; a smaller "
        "change would not have been seen. The farthest of five layers is away from 0.5 by chance too, by as much as "
        "the row with shuffled labels says.",
        [_by_step(rows, bytes_a_step), _by_layer(rows, last)],
    )


def _by_step(rows: pd.DataFrame, bytes_a_step: int) -> pd.DataFrame:
    quantities = {
        "probe: farthest from 0.5": "probe",
        "increment: farthest from 0.5": "increment",
        "increment: farthest from 0.5, signed": "increment, signed (+: longer before words)",
        "increment, labels shuffled: farthest from 0.5": "increment, labels shuffled",
        "probe, labels shuffled: farthest from 0.5": "probe, labels shuffled",
        "increment: farther than with labels shuffled": "increment less shuffled, by seed",
        "increment's share of what the probe knows": "increment's share of the probe",
    }
    steps = sorted(rows["step"].dropna().unique())
    cells = []
    for quantity, name in quantities.items():
        of = rows[rows["quantity"] == quantity].set_index("step")
        cells.append([name, *(_estimate(of.loc[step]) for step in steps)])
    change = rows[rows["quantity"] == "increment: farthest from 0.5, last step minus first"].iloc[0]
    cells.append(["increment, last minus first", *[""] * (len(steps) - 1), _estimate(change, signed=True)])
    return grid(["distance from 0.5, farthest layer", *(_size(step, bytes_a_step) for step in steps)], cells)


def _by_layer(rows: pd.DataFrame, step: float) -> pd.DataFrame:
    names = ("probe", "increment", "increment, labels shuffled")
    of_step = rows[rows["step"] == step]
    layers = sorted(of_step["layer"].dropna().unique())
    cells = []
    for name in names:
        of = of_step[of_step["quantity"] == f"{name}, within a first byte"].set_index("layer")
        cells.append([name, *(_estimate(of.loc[layer]) for layer in layers)])
    for _, row in rows[rows["quantity"].str.startswith("branching")].iterrows():
        name = row["quantity"].removesuffix(", within a first byte")
        cells.append([f"{name} ({row['n']:.0f} lines)", _estimate(row), *[""] * (len(layers) - 1)])
    return grid(["area within a first byte, at the end", *(f"layer {layer:.0f}" for layer in layers)], cells)


def what_for(rows: pd.DataFrame) -> Answer:
    """Question 2."""
    whole: Any = rows[rows["quantity"] == "all of it"].set_index(["language", "length"])
    at_length = rows[(rows["length"] == LENGTH) & rows["quantity"].isin(PARTS[:-1]) & (rows["language"] != "both")]
    sides = [side(row) for _, row in at_length.iterrows()]
    told = [
        f"{'gain' if found == 'below' else 'cost'} of {row['quantity']} in {row['language']} {_loss(row)}"
        for found, (_, row) in zip(sides, at_length.iterrows(), strict=True)
        if found != "undecided"
    ]
    widest = at_length[["low", "high"]].abs().max().max()
    if told:
        verdict = "decided in part"
    else:
        verdict = f"no part above {SMALL} at the training length" if widest < SMALL else "undecided"
    sentence = (
        f"At the training length `per_layer` minus `static` is {_loss(whole.loc['both', LENGTH])} nats per byte; "
        f"{'; '.join(told) or 'no part of it is told from 0 in either language'}, and the intervals of all parts end "
        f"within {widest:.4f} of 0."
    )
    longest = rows["length"].max()
    if longest > LENGTH:
        far = whole.loc["both", longest]
        called = {"below": "a gain", "above": "a cost"}.get(side(far), "undecided")
        sentence += (
            f" At {longest:.0f} tokens, beyond training, all of it is {_loss(far)}: {called} by both intervals, "
            f"q = {far['q']:.2f} over all rows."
        )
    widths = at_length.groupby("language")["half_width"].max()
    return Answer(
        2,
        "What is an increment for?",
        verdict,
        sentence,
        "at the training length and with three seeds a part of "
        + ", ".join(f"{width:.4f} nats per byte in {language}" for language, width in widths.items())
        + " would have been told from 0; with the two seeds of the controls hardly any. English is 12 documents.",
        [_losses_table(rows, float(length)) for length in sorted(rows["length"].unique())],
    )


def _losses_table(rows: pd.DataFrame, length: float) -> pd.DataFrame:
    of = rows[rows["length"] == length]
    cells = [
        [
            str(row["quantity"]),
            f"{row['variant']} - {row['minus']}",
            str(row["language"]),
            f"{row['n']:.0f}",
            f"{row['estimate']:+.4f}",
            _interval(row["low"], row["high"]),
            _interval(row["documents_low"], row["documents_high"]),
            "" if pd.isna(row["q"]) else f"{row['q']:.3f}",
        ]
        for _, row in of.iterrows()
    ]
    columns = [f"part, at {length:.0f} tokens", "difference of", "language", "seeds", "nats per byte"]
    return grid([*columns, "over seeds", "over documents", "q"], cells)


def what_gaps_cause(rows: pd.DataFrame) -> Answer:
    """Question 3."""
    of_character = rows[rows["quantity"] == "character: true minus false"]
    differences, learned = of_character[of_character["minus"].isna()], of_character[of_character["minus"].notna()]
    sides = {(row["variant"], row["by"]): side(row) for _, row in differences.iterrows()}
    of_learned = {found for (variant, _), found in sides.items() if variant == "per_layer"}
    verdict = {frozenset({"below"}): "less than other gaps", frozenset({"above"}): "more than other gaps"}.get(
        frozenset(of_learned), "undecided"
    )
    said = [
        f"{row['by']:+g} in `{row['variant']}` {_loss(row, 3)} ({sides[row['variant'], row['by']]})"
        for _, row in differences.iterrows()
    ]
    said += [
        f"{row['by']:+g} in `per_layer` minus `static` {_loss(row, 3)} ({side(row, documents=False)})"
        for _, row in learned.iterrows()
    ]
    both = rows[rows["quantity"] == "character: both"]
    moved = ", ".join(f"{row['by']:+g} in `{row['variant']}` {_loss(row, 3)}" for _, row in both.iterrows())
    return Answer(
        3,
        "Do gaps before words matter more than other gaps?",
        verdict,
        "The damage to the character after an edited gap, at a true word beginning minus at a matched false one, in "
        f"nats: {'; '.join(said)}.",
        "a difference of "
        + ", ".join(
            f"{row['half_width']:.3f} ({row['by']:+g}, `{row['variant']}`)" for _, row in differences.iterrows()
        )
        + " nats would have been seen over seeds (of one pretrained model: over documents).",
        [f"At both kinds of places the edit costs the character, in nats: {moved}.", _causes_table(rows)],
    )


def _causes_table(rows: pd.DataFrame) -> pd.DataFrame:
    cells = [
        [
            str(row["quantity"]),
            str(row["variant"]) + ("" if pd.isna(row["minus"]) else f" - {row['minus']}"),
            f"{row['by']:+g}",
            f"{row['n']:.0f}" if row["unit"] == "seeds" else "",
            f"{row['estimate']:+.4f}",
            _interval(row["low"], row["high"]) if row["unit"] == "seeds" else "",
            "" if pd.isna(row["documents"]) else f"{row['documents']:.0f}",
            _interval(row["documents_low"], row["documents_high"]),
            "" if pd.isna(row["q"]) else f"{row['q']:.3f}",
        ]
        for _, row in rows.iterrows()
    ]
    columns = ["effect", "variant", "gap", "seeds", "mean", "over seeds", "lines or documents", "over these", "q"]
    return grid(columns, cells)


def how_far_heads_look(rows: pd.DataFrame) -> Answer:
    """Question 4."""
    slopes = rows[(rows["quantity"] == "slope of log look-back on log step") & rows["layer"].isna()]
    whole: Any = slopes[slopes["unit"] == "layers of seeds"].set_index("variant")
    fixed = whole.loc["head_steps"]
    if side(fixed, documents=False) == "below" and fixed["p"] < 0.05:
        verdict = {"above": "it falls, but less than 1/c", "below": "it falls more than 1/c"}.get(
            side(fixed, -1.0, documents=False), "it falls as 1/c"
        )
    else:
        verdict = {"above": "it grows"}.get(side(fixed, documents=False), "undecided")
    control = f", where `static` has {_estimate(whole.loc['static'], 2, True)}" if "static" in whole.index else ""
    back = rows[(rows["quantity"] == "look-back") & (rows["variant"] == "head_steps")].sort_values("by")
    means = ", ".join(f"{row['estimate']:.1f} at {row['by']:g}" for _, row in back.iterrows())
    return Answer(
        4,
        "Does a head that steps farther look back less?",
        verdict,
        f"The slope of log look-back on log step is {_estimate(fixed, 2, True)} over layers and seeds (p = "
        f"{fixed['p']:.4f}, heads exchanged within layers){control}; 1/c would be -1. In tokens: {means}.",
        f"a slope of {fixed['half_width']:.2f} would have been told from 0. Layers of one model are no independent "
        "samples; two seeds alone say "
        f"{_estimate(slopes[(slopes['unit'] == 'seeds') & (slopes['variant'] == 'head_steps')].iloc[0], 2, True)}.",
        [_reaches_table(rows)],
    )


def _reaches_table(rows: pd.DataFrame) -> pd.DataFrame:
    cells = []
    for _, row in rows.iterrows():
        where = "all layers" if pd.isna(row["layer"]) else f"layer {row['layer']:.0f}"
        where = where if pd.isna(row["by"]) else f"head with step {row['by']:g} in head_steps"
        n = f"{row['n']:.0f} {row['unit']}"
        cells.append([str(row["quantity"]), str(row["variant"]), where, n, _estimate(row, 2)])
    return grid(["quantity", "variant", "of", "n", "mean"], cells)


def _size(step: float, bytes_a_step: int) -> str:
    return f"{step * bytes_a_step / 1e6:.3g}M bytes"


def _estimate(row: "pd.Series[Any]", digits: int = 3, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{row['estimate']:{sign}.{digits}f} ({row['low']:{sign}.{digits}f} to {row['high']:{sign}.{digits}f})"


def _loss(row: "pd.Series[Any]", digits: int = 4) -> str:
    return _estimate(row, digits, signed=True)


def _interval(low: float, high: float) -> str:
    return "" if pd.isna(low) else f"{low:+.4f} to {high:+.4f}"
