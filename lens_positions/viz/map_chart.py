"""A map of a corpus drawn: which gaps a model would have longer, and which shorter."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..errors import PositionsError
from . import style
from .effect_charts import DIVERGING

NEEDED = {"model", "corpus", "layer", "n", "gradient", "low", "high", "shuffled_low", "shuffled_high", "wants"}
COLOURS = {"longer": style.BLUE, "shorter": style.ORANGE, "undecided": style.QUIET}


def map_chart(table: pd.DataFrame, caption: str = "", path: str | Path | None = None) -> Figure:
    """Draw the mean gradient of each group of gaps: over all layers with its interval, and below it layer by layer.

    Each map is a column. A grey bar is where 95% of the shuffles lie. In the layers a dot says that both the interval
    and the shuffles agree; blue gaps the model would have longer, orange ones shorter.

    Args:
        table: from `causal.map_summary`, of one map or several.
        caption: what is shown.
        path: where to write the figure as well, as .png, .svg or .pdf.

    Raises:
        PositionsError: missing columns, or a path that cannot be written.

    >>> found = lp.causal.gap_map(model, texts, folder / "map", progress=False)
    >>> figure = lp.viz.map_chart(lp.causal.map_summary(found))
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['inside a word  n=283', 'word  n=227', 'sentence  n=10', 'document  n=6']
    """
    if missing := NEEDED - set(table):
        raise PositionsError(f"the table lacks {', '.join(sorted(missing))}; expected one that map_summary made.")
    by = next(name for name in ("boundary", "before_kind", "after_kind") if name in table)
    maps = [rows for _, rows in table.groupby(["model", "corpus"], sort=False)]
    groups = list(dict.fromkeys(table[by]))
    layers = max(len(set(rows["layer"])) - 1 for rows in maps)

    # Inches: a line for each group above, a row of cells for each below, a column for each map.
    dots, cells = 0.26 * len(groups), 0.2 * len(groups)
    wide, between, around = max(0.17 * layers, 3.2), 1.0, 2.1
    title, unit = "Which gaps a model would have longer", "gradient of the loss, nats per position: below 0 is longer"
    with style.context():
        size = (wide * len(maps) + (around - 0.3) * (len(maps) - 1), dots + between + cells)
        figure, whole = style.frame_figure(size, title, unit, caption, (around, 0.9, 0.95, 0.5))

        # The frame is only measured: its place is taken by two axes for each map.
        frame = whole.get_position()
        whole.remove()
        across, up = frame.width / size[0], frame.height / size[1]
        for column, rows in enumerate(maps):
            left = frame.x0 + column * (wide + around - 0.3) * across
            top = (left, frame.y0 + (cells + between) * up, wide * across, dots * up)
            axes = figure.add_axes(top)
            axes.set_title(f"{rows['model'].iloc[0]}, {rows['corpus'].iloc[0]}", fontsize=9, color=style.QUIET)
            _draw_dots(axes, rows[rows["layer"] == "all"].set_index(by), groups)
            by_layer = figure.add_axes((left, frame.y0, wide * across, cells * up))
            _draw_layers(figure, by_layer, rows[rows["layer"] != "all"], by, groups)
    if path is not None:
        style.save(figure, path)
    return figure


def _draw_dots(axes: Axes, rows: pd.DataFrame, groups: list[str]) -> None:
    """All layers together: the mean with its interval, before the shuffles."""
    # Another map may have groups that this one lacks; they keep their line, so that lines can be followed across.
    rows = rows.reindex(groups)
    places = np.arange(len(groups))
    axes.axvline(0, color=style.FAINT, linewidth=0.8, zorder=0)
    axes.hlines(places, rows["shuffled_low"], rows["shuffled_high"], color=style.FAINT, linewidth=7)
    colours = [COLOURS.get(str(wants), style.QUIET) for wants in rows["wants"]]
    axes.hlines(places, rows["low"], rows["high"], color=colours, linewidth=1.6)
    axes.scatter(rows["gradient"], places, c=colours, s=18, zorder=3)

    # From top to bottom in the order of the table.
    axes.set_ylim(len(groups) - 0.5, -0.5)
    counts = ["" if np.isnan(n) else f"  n={n:,.0f}" for n in rows["n"]]
    axes.set_yticks(places, [f"{name}{n}" for name, n in zip(groups, counts, strict=True)])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("sum over the layers (grey: shuffled)")


def _draw_layers(figure: Figure, axes: Axes, rows: pd.DataFrame, by: str, groups: list[str]) -> None:
    """Layer by layer, a colour for the mean and a dot where it is decided."""
    layers = list(dict.fromkeys(rows["layer"]))
    means = rows.pivot(index=by, columns="layer", values="gradient").reindex(index=groups, columns=layers)
    wants = rows.pivot(index=by, columns="layer", values="wants").reindex(index=groups, columns=layers)

    # White is no gradient, so the scale reaches as far below zero as above.
    most = float(np.nanmax(np.abs(means.to_numpy(float)))) or 1.0
    image = axes.imshow(means.to_numpy(float), cmap=DIVERGING, vmin=-most, vmax=most, aspect="auto")
    decided = np.argwhere(wants.isin(["longer", "shorter"]).to_numpy())
    axes.scatter(decided[:, 1], decided[:, 0], s=3, color=style.INK)

    # Some ten labels, however many layers.
    step = max(1, round(len(layers) / 10))
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_yticks(range(len(groups)), groups)
    axes.tick_params(length=0)
    axes.set_xlabel("layer (a dot: decided)")
    style.colour_bar(figure, axes, image)
