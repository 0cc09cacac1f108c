"""Question 1: word boundaries in the residual stream, and in the increments computed from it, by training step.

A logistic regression reads the residual stream that enters a layer at the first byte of a Chinese character, and says
whether a word begins there, as people segmented the text. It is fitted on two thirds of the lines and scored on the
rest, each third in turn. The increment of that byte is computed from the same vector, so the probe bounds what the
increment could know.

Of six first bytes, some begin words more often than others: any ordering of them alone gives an area under the ROC
curve of 0.445 to 0.555. The area *within* a first byte compares gaps before equal bytes only; there the bytes' identity
gives 0.5. The control is the same with labels shuffled within each first byte.

Beside them stands a statistic of the text that sees only what the increment can, the characters to the left: how
uncertain the next character is (branching entropy; Jin and Tanaka-Ishii, "Unsupervised segmentation of Chinese text by
use of branching entropy", 2006).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float64, Int64
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from lens_positions.analysis.word_boundaries import TIES_AT, Gaps, gaps_of
from lens_positions.errors import PositionsError
from lens_positions.interventions import HOOK, hook_names
from lens_positions.measure.attention import keep_states
from lens_positions.measure.corpus_reader import rows_of, windows
from lens_positions.measure.intervals import shuffle_within
from lens_positions.measure.kinds import is_han
from lens_positions.model import HookedPositionTransformer

FOLDS = 3
"""Thirds of the lines: the probe is scored on lines that it was not fitted on."""

SEED = 0
"""Of the labels that are shuffled."""


@dataclass(frozen=True)
class BoundaryText:
    """Held-out lines with the words that people found in them, and what the training text says of their characters.

    Attributes:
        lines: the text of each line.
        words: the words of each, which spell it.
        branching: the uncertainty of the next character.
    """

    lines: list[str]
    words: list[list[str]]
    branching: "BranchingEntropy"


class BranchingEntropy:
    """How uncertain the next character is after the last one, or the last two, as counted in a text.

    >>> entropy = BranchingEntropy(["中国中国中国", "中国人中立"])
    >>> round(entropy("中"), 2), round(entropy("国人"), 2)  # 4 of 5 times 国, once 立; always 中
    (0.5, 0.0)
    """

    def __init__(self, texts: Iterable[str]) -> None:
        followers: dict[str, Counter[str]] = defaultdict(Counter)
        for text in texts:
            for i in range(1, len(text)):
                if not is_han(text[i - 1]):
                    continue
                followers[text[i - 1]][text[i]] += 1
                if i > 1 and is_han(text[i - 2]):
                    followers[text[i - 2 : i]][text[i]] += 1
        self._entropies = {context: _entropy(counts) for context, counts in followers.items()}
        self._mean = float(np.mean(list(self._entropies.values()))) if self._entropies else 0.0

    def __call__(self, context: str) -> float:
        """In nats; that of the context without its first character where it was never seen, then the mean."""
        while context and context not in self._entropies:
            context = context[1:]
        return self._entropies.get(context, self._mean)


def _entropy(counts: Counter[str]) -> float:
    shares = np.array(list(counts.values())) / counts.total()
    return float((shares * np.log(1 / shares)).sum())


def boundary_probes(models: dict[int, Path], text: BoundaryText) -> pd.DataFrame:
    """The areas of probes, increments and their controls, by training step and layer.

    Args:
        models: by training step, the folder of a model.
        text: what the gaps are taken from.

    Returns:
        A row for each `step`, `measure` and `layer` (both NaN for branching entropy, which has no model): `auc` with
        its 95% interval `low` to `high`, `within` (the area within a first byte) with `within_low` to `within_high`,
        `n` gaps, of which `boundaries`, in so many `lines`.
    """
    tables: list[pd.DataFrame] = []
    for step, folder in models.items():
        model = HookedPositionTransformer.from_pretrained(str(folder))
        gaps = gaps_of(model, text.lines, text.words)
        lead = lead_bytes(gaps)
        if not tables:
            tables.append(_branching_areas(gaps, lead, text.branching))
        layers, residuals, increments = gap_states(model, gaps)
        tables.append(probe_areas(gaps, lead, layers, residuals, increments).assign(step=step))
    table = pd.concat(tables, ignore_index=True)
    return table[["step", *(name for name in table if name != "step")]]


def lead_bytes(gaps: Gaps) -> Int64[np.ndarray, " gap"]:
    """The first byte of the character after each gap, which the increment of that byte sees too."""
    return np.array([int(gaps.tokens[piece][token]) for piece, token in zip(gaps.piece, gaps.token, strict=True)])


def gap_states(
    model: HookedPositionTransformer, gaps: Gaps
) -> tuple[list[int], Float64[np.ndarray, "layer gap width"], Float64[np.ndarray, "layer gap"]]:
    """The layers, and at the first byte after each gap the residual stream that enters them and the increment there."""
    documents, batches = windows(model, gaps.tokens)
    streams, increments = (
        dict(hook_names(model, None, hook)) for hook in ("hook_resid_pre", HOOK.format("increments"))
    )
    of_piece: dict[int, Int64[np.ndarray, " gap"]] = {
        int(piece): np.flatnonzero(gaps.piece == piece) for piece in np.unique(gaps.piece)
    }
    residual = np.zeros((len(streams), len(gaps.token), model.cfg.d_model))
    increment = np.zeros((len(streams), len(gaps.token)))
    for rows, owners in rows_of(documents, batches, "probe"):
        kept: dict[Any, Tensor] = {}
        hooks: list[Any] = [
            (name, partial(keep_states, kept, (kind, layer)))
            for kind, names in (("residual", streams), ("increment", increments))
            for layer, name in names.items()
        ]
        with torch.no_grad():
            model.run_with_hooks(rows, fwd_hooks=hooks, return_type=None)
        for row, piece in enumerate(owners):
            own = of_piece.get(piece, np.array([], dtype=int))
            tokens = torch.from_numpy(gaps.token[own])
            for place, layer in enumerate(streams):
                residual[place, own] = kept["residual", layer][row, tokens].double().numpy()
                values = kept["increment", layer][row, tokens].double()
                increment[place, own] = (values if values.ndim == 1 else values.mean(-1)).numpy()  # heads averaged
    return list(streams), residual, increment


def probe_areas(
    gaps: Gaps,
    lead: Int64[np.ndarray, " gap"],
    layers: list[int],
    residuals: Float64[np.ndarray, "layer gap width"],
    increments: Float64[np.ndarray, "layer gap"],
) -> pd.DataFrame:
    """What `boundary_probes` returns, of one model: "probe" and "increment", and each with "labels shuffled"."""
    shuffled = gaps.boundary[shuffle_within(lead, SEED)]
    rows = []
    for layer, residual, increment in zip(layers, residuals, increments, strict=True):
        for suffix, labels in (("", gaps.boundary), (", labels shuffled", shuffled)):
            # A probe is compared with itself: the scores of one fold's probe and another's have no common zero.
            scores, fold = probe_scores(residual, labels, gaps.line)
            found = {"probe": _areas(scores, labels, lead, gaps.line, fold)}
            found |= {"increment": _areas(np.round(increment, TIES_AT), labels, lead, gaps.line)}
            rows += [{"measure": name + suffix, "layer": layer, **areas} for name, areas in found.items()]
    return pd.DataFrame(rows)


def probe_scores(
    residual: Float64[np.ndarray, "gap width"], labels: Bool[np.ndarray, " gap"], lines: Int64[np.ndarray, " gap"]
) -> tuple[Float64[np.ndarray, " gap"], Int64[np.ndarray, " gap"]]:
    """How sure a logistic regression is of a boundary, fitted on other lines than the gap's own; and the gap's fold."""
    owners = len(np.unique(lines))
    if owners < FOLDS:
        raise PositionsError(
            f"{owners} of the lines have gaps between Chinese characters; expected {FOLDS} or more, to fit a probe on "
            "others."
        )
    scores, fold = np.zeros(len(labels)), np.zeros(len(labels), dtype=np.int64)
    for number, (fitted, scored) in enumerate(GroupKFold(FOLDS).split(residual, labels, lines)):
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        scores[scored] = probe.fit(residual[fitted], labels[fitted]).decision_function(residual[scored])
        fold[scored] = number
    return np.round(scores, TIES_AT), fold  # equal vectors are ties, whatever the batch


def _branching_areas(gaps: Gaps, lead: Int64[np.ndarray, " gap"], branching: BranchingEntropy) -> pd.DataFrame:
    left = [_left_of(gaps, i) for i in range(len(gaps.token))]
    rows = []
    for length, name in ((1, "branching entropy after one character"), (2, "branching entropy after two characters")):
        values = np.array([branching(context[-length:]) for context in left])
        rows.append({"measure": name, "layer": math.nan, **_areas(values, gaps.boundary, lead, gaps.line)})
    return pd.DataFrame(rows).assign(step=math.nan)


def _left_of(gaps: Gaps, gap: int) -> str:
    """The last two Chinese characters before a gap, or the last one where the one before it is no Chinese character."""
    tokens = gaps.tokens[gaps.piece[gap]][: gaps.token[gap]][-6:]  # two characters of three bytes at most
    left = bytes(token for token in tokens.tolist() if token < 256).decode("utf-8", errors="ignore")[-2:]
    return left if len(left) == 2 and is_han(left[0]) else left[-1:]


def _areas(
    values: Float64[np.ndarray, " gap"],
    labels: Bool[np.ndarray, " gap"],
    lead: Int64[np.ndarray, " gap"],
    lines: Int64[np.ndarray, " gap"],
    fold: Int64[np.ndarray, " gap"] | None = None,
) -> dict[str, float]:
    """The area over all gaps (of a fold), and within first bytes, each with its interval."""
    fold = np.zeros_like(lead) if fold is None else fold
    auc = dict(zip(("auc", "low", "high"), area_within(values, labels, fold, lines), strict=True))
    names = ("within", "within_low", "within_high")
    within = dict(zip(names, area_within(values, labels, fold * 256 + lead, lines), strict=True))
    return {**auc, **within, "n": len(labels), "boundaries": int(labels.sum()), "lines": len(np.unique(lines))}


def area_within(
    values: Float64[np.ndarray, " sample"],
    labels: Bool[np.ndarray, " sample"],
    strata: Int64[np.ndarray, " sample"],
    owners: Int64[np.ndarray, " sample"],
) -> tuple[float, float, float]:
    """The area under the ROC curve over pairs of one stratum, and its 95% interval over owners.

    The area is the share of pairs (one true, one false, of the same stratum) in which the true one has the larger
    value, ties counted half. The interval is normal, its variance that of the owners' influence on the area
    (Obuchowski, "Nonparametric analysis of clustered ROC curve data", 1997; NaN for one owner).

    >>> values, labels = np.array([1.0, 2.0, 9.0, 8.0]), np.array([False, True, True, False])
    >>> area_within(values, labels, np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]))[0]
    1.0
    """
    larger, pairs, total = np.zeros(len(values)), np.zeros(len(values)), 0.0
    for stratum in np.unique(strata):
        true, false = (np.flatnonzero((strata == stratum) & of_label) for of_label in (labels, ~labels))
        below = _places(values[true], np.sort(values[false]))
        above = len(true) - _places(values[false], np.sort(values[true]))
        larger[true], larger[false] = below, above
        pairs[true], pairs[false] = len(false), len(true)
        total += len(true) * len(false)
    if not total:
        return math.nan, math.nan, math.nan
    area = larger[labels].sum() / total
    _, owner = np.unique(owners, return_inverse=True)
    influence = np.bincount(owner, (larger - area * pairs) / total)
    count = len(influence)
    reach = 1.96 * math.sqrt(count / (count - 1) * (influence**2).sum()) if count > 1 else math.nan
    return float(area), float(area - reach), float(area + reach)


def _places(values: np.ndarray, sorted_others: np.ndarray) -> Float64[np.ndarray, " value"]:
    """How many others are smaller than each value, equal ones counted half."""
    return (np.searchsorted(sorted_others, values, "left") + np.searchsorted(sorted_others, values, "right")) / 2
