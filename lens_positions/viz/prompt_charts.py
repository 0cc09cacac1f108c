"""Effects over many prompts drawn: a map of layers by places, or lines by layer where there are no places."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from ..causal.prompts import PromptEffects
from ..errors import PositionsError
from . import style
from .charts import MEASURE_COLOURS
from .effect_charts import map_of
from .output import visible_text

DOT = "A dot: the 95% interval over prompts leaves 0 out. Above: how many prompts have the place."


def prompts_chart(
    effects: PromptEffects,
    title: str = "",
    unit: str = "change of the metric, mean over prompts",
    caption: str = "",
    head: int | None = None,
    path: str | Path | None = None,
) -> Figure:
    """Draw the mean effect over many prompts.

    A sweep becomes a map of layers by places, each place with the token that all prompts have there, or its span and
    index, and its number of prompts. Places without a dot could be 0. What has no places (mediation) becomes means with
    intervals by layer.

    Args:
        effects: from `causal.over_prompts`.
        title: what was changed; empty is the measurement's name.
        unit: of the effects.
        caption: what else is to be known, of the model and the prompts.
        head: the head to draw, where effects are by head.
        path: where to write the figure as well, as .png, .svg or .pdf.

    Raises:
        PositionsError: effects by head without a head, a head that they do not have, or a path that cannot be written.

    >>> found = lp.causal.over_prompts(lp.causal.attribution, model, ["The cat", "A dog sat"], lp.causal.loss())
    >>> figure = lp.viz.prompts_chart(found, unit="nats per token and position", path=folder / "prompts.svg")
    >>> [label.get_text() for label in figure.axes[0].get_xticklabels()][1:3]  # "T" or "A", then "h" or a space
    ['[1]', '[2]']
    """
    if path is not None:
        style.check_path(path)

    table = _of_head(effects.table, head)
    title = title or effects.measurement.replace("_", " ")
    of_head = "" if head is None else f", head {head}"
    how = f" ({effects.arguments})" if effects.arguments else ""
    said = f"{effects.model}{of_head}; {effects.measurement}{how}; {effects.prompts} prompts. {caption}".strip()

    # What has places is a map; mediation has paths instead.
    if "token" in table:
        figure = _map(table, title, unit, f"{said} {DOT} Tokens count from the {effects.count_from}.")
    else:
        figure = _lines(table, title, unit, f"{said} Intervals: 95% of resamples of prompts.")
    if path is not None:
        style.save(figure, path)
    return figure


def _of_head(table: pd.DataFrame, head: int | None) -> pd.DataFrame:
    heads = sorted(set(table["head"])) if "head" in table else []
    if (head is None) != (not heads) or (heads and head not in heads):
        known = f"one of the heads {heads[0]} to {heads[-1]}" if heads else "none, as the effects are not by head"
        raise PositionsError(f"head is {head!r}; expected {known}.")
    return table if head is None else table[table["head"] == head]


def _map(table: pd.DataFrame, title: str, unit: str, caption: str) -> Figure:
    places = [name for name in ("span", "token") if name in table]
    columns = list(dict.fromkeys(table[places].itertuples(index=False, name=None)))
    if places == ["token"]:
        # Counted from the end, a longer prompt adds places before those of the others.
        columns.sort()

    layers = list(dict.fromkeys(table["layer"]))
    shape = (len(layers), len(columns))
    row, column = table["layer"].map(layers.index), [columns.index(c) for c in table[places].itertuples(False, None)]
    means, sure = np.full(shape, np.nan), np.zeros(shape, dtype=bool)
    means[row, column] = table["mean"]
    sure[row, column] = (table["low"] > 0) | (table["high"] < 0)

    # Layers of one place have the same token and as many prompts, so its first row speaks for all.
    first = table.assign(column=column).drop_duplicates("column").set_index("column").sort_index()
    labels = [_label(place, str(text)) for place, text in zip(columns, first["text"], strict=True)]
    counts = [f"{n:,}" for n in first["n"]]
    return map_of(torch.from_numpy(means), layers, labels, title, unit, caption, sure, counts)


def _label(place: tuple[Any, ...], text: str) -> str:
    """A place in words: its token where all prompts have the same, else its span and index there."""
    if text:
        return visible_text(text)
    *span, token = place
    return f"{span[0][:8]}[{token}]" if span else f"[{token}]"


def _lines(table: pd.DataFrame, title: str, unit: str, caption: str) -> Figure:
    """Means by layer with intervals, a line for each of the other keys; all layers together stand at the left."""
    keys = [name for name in table if name not in ("layer", "n", "mean", "low", "high")]
    named = table[keys].astype(str).agg(" ".join, axis=1) if keys else pd.Series("mean", table.index)
    layers = list(dict.fromkeys(table["layer"])) if "layer" in table else [""]
    at = table["layer"].map(layers.index) if "layer" in table else pd.Series(0, table.index)
    with style.context():
        size = (max(0.4 * len(layers), 4.2), 2.4)
        figure, axes = style.frame_figure(size, title, unit, caption, (0.75, 0.3, 0.95, 0.45))
        axes.axhline(0, color=style.FAINT, linewidth=0.8, zorder=0)

        # Side by side around the mark of the layer, so that intervals do not cover one another.
        for i, (measure, rows) in enumerate(table.groupby(named, sort=False)):
            colour, places = MEASURE_COLOURS[i % len(MEASURE_COLOURS)], at[rows.index] + (i - 1.5) * 0.12
            axes.vlines(places, rows["low"], rows["high"], color=colour, linewidth=1.2)
            axes.plot(places, rows["mean"], "o", color=colour, markersize=4, label=measure)
        axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
        axes.set_xlabel("layer")
        axes.tick_params(axis="x", length=0)
        axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    return figure
