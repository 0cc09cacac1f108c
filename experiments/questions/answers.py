"""The answers to the four questions, computed from the tidy tables of results alone.

Every row of an answer has an `estimate` with its 95% interval `low` to `high` over `unit`s, of which there are `n`, and
`half_width`, the power: an effect smaller than that would not have been told from none. Seeds are paired where they are
compared. `documents_low` to `documents_high` is a second interval, over lines or documents with seeds averaged.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float64
from scipy import stats

from lens_positions.errors import PositionsError
from lens_positions.measure.intervals import t_interval

from ..rope_measures import SMOLLM2
from ..suite import paired_difference, scores_by_seed
from ..tables import Tables, run_of_model
from .word_gaps import OUTCOMES

CONTRASTS = {
    "scale": ("constant", "static"),
    "identity": ("frozen", "constant"),
    "learned along": ("shared", "frozen"),
    "context": ("per_layer", "shared"),
    "all of it": ("per_layer", "static"),
    "wrong identity": ("swapped", "frozen"),
    "steps by head": ("head_steps", "static"),
}
"""What each pair of retrained variants differs in. The first four add up to the fifth."""

LANGUAGES: dict[str, tuple[str, ...]] = {
    "English": ("sotu",),
    "Chinese": ("peoples_daily", "reviews"),
    "both": ("sotu", "peoples_daily", "reviews"),
}
"""By language, the sources of held-out documents."""

BRANCHING = ("branching entropy after one character", "branching entropy after two characters")

COLUMNS = ["question", "quantity", "variant", "minus", "step", "layer", "language", "length", "by", "unit", "n"]
COLUMNS += ["estimate", "low", "high", "half_width", "documents", "documents_low", "documents_high", "p", "q"]


def find_answers(tables: Tables, suite: str) -> pd.DataFrame:
    """All answers that the tables of a suite hold, a row each, with the columns of COLUMNS.

    Raises:
        PositionsError: they hold none.
    """
    found = [*known(tables, suite), *parts(tables, suite), *causes(tables, suite), *reaches(tables, suite)]
    if not found:
        raise PositionsError(
            f"{tables.folder} has nothing of the suite {suite} to answer a question with; expected "
            "lens-positions experiments suite and questions before."
        )
    return pd.DataFrame(found, columns=COLUMNS)


def known(tables: Tables, suite: str, variant: str = "per_layer") -> list[dict[str, Any]]:
    """Question 1: areas within a first byte by step and layer, over seeds, and how far the farthest lies from 0.5."""
    by_seed = tables.seeds("probes", suite, variant)
    if not by_seed:
        return []
    common = {"question": 1, "variant": variant, "unit": "seeds"}
    whole = pd.concat([table.assign(seed=seed) for seed, table in by_seed.items()], ignore_index=True)
    rows = []
    for (step, layer, measure), of in whole.groupby(["step", "layer", "measure"], dropna=False, sort=False):
        if measure in BRANCHING:  # of the text, alike for all seeds
            first = of.iloc[0]
            own = {"estimate": first["within"], "n": first["lines"], "unit": "lines", "half_width": np.nan}
            own |= {"low": first["within_low"], "high": first["within_high"]}
            own["half_width"] = (own["high"] - own["low"]) / 2
        else:
            own = over(of["within"].to_numpy())
        rows.append(common | {"quantity": f"{measure}, within a first byte", "step": step, "layer": layer} | own)
    deep = whole[whole["layer"] > 0]
    away = (deep["within"] - 0.5).groupby([deep["measure"], deep["step"], deep["seed"]])
    signed = away.agg(lambda of_layers: of_layers.iloc[int(np.argmax(of_layers.abs()))]).unstack("seed")
    far = signed.abs()
    steps = sorted(whole["step"].dropna().unique())
    for measure in far.index.unique("measure"):
        name = f"{measure}: farthest from 0.5"
        rows += [common | {"quantity": name, "step": step, **over(far.loc[measure, step])} for step in steps]
        if len(steps) > 1:
            change = far.loc[measure, steps[-1]] - far.loc[measure, steps[0]]
            rows.append(common | {"quantity": f"{name}, last step minus first", **over(change)})
    for quantity, values in (
        ("increment's share of what the probe knows", far.loc["increment"] / far.loc["probe"]),
        ("increment: farthest from 0.5, signed", signed.loc["increment"]),
        ("increment: farther than with labels shuffled", far.loc["increment"] - far.loc["increment, labels shuffled"]),
    ):
        rows += [common | {"quantity": quantity, "step": step, **over(values.loc[step])} for step in steps]
    return rows


def parts(tables: Tables, suite: str) -> list[dict[str, Any]]:
    """Question 2: the held-out loss of retrained variants, and what each pair differs in, by language and length."""
    scored = {name: scores_by_seed(tables, suite, name) for name in {v for pair in CONTRASTS.values() for v in pair}}
    rows = []
    for (language, sources), (quantity, (variant, minus)) in itertools.product(LANGUAGES.items(), CONTRASTS.items()):
        ours, theirs = scored[variant], scored[minus]
        seeds = sorted(set(ours) & set(theirs))
        if not seeds:
            continue
        for length in ours[seeds[0]].index.unique("length"):
            own, others = ([_nats(of[seed], length, sources) for seed in seeds] for of in (ours, theirs))
            size = own[0]["bytes"]
            if not len(size):
                continue
            if any(not table["bytes"].equals(size) for table in (*own, *others)):
                raise PositionsError(
                    f"{variant} and {minus} of {suite} were scored on different text; expected the same."
                )
            nats = np.stack([(a["nats"] - b["nats"]).to_numpy() for a, b in zip(own, others, strict=True)], axis=1)
            found = paired_difference(nats, size.to_numpy())
            row = {"question": 2, "quantity": quantity, "variant": variant, "minus": minus, "unit": "seeds"}
            row |= {"language": language, "length": length, **over(nats.sum(0) / size.sum()), "documents": len(size)}
            rows.append(row | {name: found.get(name) for name in ("documents_low", "documents_high")})
    return with_q(rows)


def _nats(scores: pd.DataFrame, length: int, sources: Sequence[str]) -> pd.DataFrame:
    of_length: Any = scores.loc[length]
    return of_length[of_length["source"].isin(sources)]


def causes(tables: Tables, suite: str) -> list[dict[str, Any]]:
    """Question 3: the effect of an edited gap at true minus at matched false word beginnings, and at both.

    Then by how much `per_layer` exceeds `static` in the first of these; last, a pretrained model over documents.
    """
    rows: list[dict[str, Any]] = []
    by_variant: dict[str, pd.DataFrame] = {}
    for variant in ("per_layer", "static"):
        by_seed = tables.seeds("gap_effects", suite, variant)
        if not by_seed:
            continue
        whole = pd.concat([table.assign(seed=seed) for seed, table in by_seed.items()], ignore_index=True)
        common = {"question": 3, "variant": variant, "unit": "seeds"}
        for quantity, by, values in _contrasts(whole):
            row = {"quantity": quantity, "by": by, **over(values.groupby(whole["seed"]).mean())}
            of_lines = values.groupby(whole["line"]).mean().to_numpy()
            low, high = t_interval(of_lines)
            rows.append(common | row | {"documents": len(of_lines), "documents_low": low, "documents_high": high})
        difference = whole["character_true"] - whole["character_false"]
        by_variant[variant] = difference.groupby([whole["by"], whole["seed"]]).mean().unstack("seed")
    if len(by_variant) == 2:
        learned = (by_variant["per_layer"] - by_variant["static"]).dropna(axis=1)
        common = {"question": 3, "variant": "per_layer", "minus": "static", "unit": "seeds"}
        quantity = "character: true minus false"
        rows += [common | {"quantity": quantity, "by": by, **over(learned.loc[by])} for by in learned.index[::-1]]
    pretrained = tables.table("gap_effects", run_of_model(SMOLLM2))
    if pretrained is not None:
        common = {"question": 3, "variant": SMOLLM2, "unit": "documents"}
        for quantity, by, values in _contrasts(pretrained):
            of_documents = over(values.groupby(pretrained["line"]).mean())
            documents = {f"documents{end}": of_documents[end.strip("_") or "n"] for end in ("", "_low", "_high")}
            rows.append(common | {"quantity": quantity, "by": by} | of_documents | documents)
    return with_q(rows, only="true minus false")


def _contrasts(effects: pd.DataFrame) -> Iterator[tuple[str, float, "pd.Series[float]"]]:
    """What is told of each outcome of an edit: its effect at true minus at false beginnings, and at both."""
    for by, outcome in itertools.product(sorted(effects["by"].unique(), reverse=True), OUTCOMES):
        of = effects[effects["by"] == by]
        true, false = of[f"{outcome}_true"], of[f"{outcome}_false"]
        yield f"{outcome}: true minus false", float(by), true - false
        yield f"{outcome}: both", float(by), (true + false) / 2


def reaches(tables: Tables, suite: str) -> list[dict[str, Any]]:
    """Question 4: the slope of log look-back on log step over the heads of a layer; 1/c is a slope of -1.

    The steps of `static` are all 1: its heads are given those that `head_steps` has at the same index, as the control.
    """
    fixed = tables.seeds("head_reach", suite, "head_steps")
    if not fixed:
        return []
    steps = next(iter(fixed.values())).groupby("head")["increment"].mean()
    rows: list[dict[str, Any]] = []
    for variant in ("head_steps", "static"):
        by_seed = tables.seeds("head_reach", suite, variant)
        if not by_seed:
            continue
        back = np.stack(
            [
                table.pivot(index="layer", columns="head", values="look_back")[steps.index].to_numpy()
                for table in by_seed.values()
            ]
        )  # seed, layer, head
        slopes = slopes_of(np.log(back), np.log(steps.to_numpy()))
        common = {"question": 4, "variant": variant}
        p = permuted_slopes(np.log(back), np.log(steps.to_numpy()))
        quantity = "slope of log look-back on log step"
        rows.append(common | {"quantity": quantity, "unit": "layers of seeds", **over(slopes.flatten()), "p": p})
        rows.append(common | {"quantity": quantity, "unit": "seeds", **over(slopes.mean(1))})
        for layer in range(slopes.shape[1]):
            rows.append(common | {"quantity": quantity, "unit": "seeds", "layer": layer, **over(slopes[:, layer])})
        for head, step in enumerate(steps):
            mean = over(back[:, :, head].flatten())
            rows.append(common | {"quantity": "look-back", "unit": "layers of seeds", "by": step, **mean})
    return rows


def slopes_of(
    values: Float64[np.ndarray, "*shape head"], steps: Float64[np.ndarray, " head"]
) -> Float64[np.ndarray, "*shape"]:
    """The least-squares slope of values on steps, over heads.

    >>> bool(np.isclose(slopes_of(np.log(np.array([8.0, 4.0, 2.0])), np.log(np.array([1.0, 2.0, 4.0]))), -1))
    True
    """
    centred = steps - steps.mean()
    return values @ centred / (centred @ centred)


def permuted_slopes(
    values: Float64[np.ndarray, "seed layer head"], steps: Float64[np.ndarray, " head"], draws: int = 9_999
) -> float:
    """How often the mean slope is as far from 0 where the heads of every layer are exchanged at random."""
    found = abs(slopes_of(values, steps).mean())
    rng = np.random.default_rng(0)
    exchanged = rng.permuted(np.broadcast_to(values, (draws, *values.shape)), axis=-1)
    by_chance = np.abs(slopes_of(exchanged, steps).mean((-1, -2)))
    return float((1 + np.count_nonzero(by_chance >= found - 1e-12)) / (1 + draws))


def over(values: "Float64[np.ndarray, ' sample'] | pd.Series[float]") -> dict[str, float]:
    """Mean of independent values, Student's interval, its half width, and the p of a mean of 0; NaN for one value."""
    samples = np.asarray(values, dtype=float)
    low, high = t_interval(samples)
    p = float(stats.ttest_1samp(samples, 0.0).pvalue) if len(samples) > 1 and np.ptp(samples) else math.nan
    return {"n": len(samples), "estimate": float(samples.mean()), "low": low, "high": high} | {
        "half_width": (high - low) / 2,
        "p": p,
    }


def with_q(rows: Iterable[dict[str, Any]], only: str = "") -> list[dict[str, Any]]:
    """The same rows, with p corrected over those whose quantity names `only` (Benjamini and Hochberg, 1995)."""
    rows = [dict(row) for row in rows]
    tested = [row for row in rows if only in row["quantity"] and row["p"] == row["p"]]
    if tested:
        corrected = stats.false_discovery_control([row["p"] for row in tested])
        for row, q in zip(tested, corrected, strict=True):
            row["q"] = float(q)
    return rows
