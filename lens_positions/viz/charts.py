"""Measurements drawn: increments by kind of token, word boundaries by layer, rotary frequencies by layer."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Float64
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from torch import Tensor

from ..errors import PositionsError
from . import style
from .effect_charts import DIVERGING

SEQUENTIAL = LinearSegmentedColormap.from_list("amounts", ["#ffffff", style.SKY, style.BLUE, "#00263d"])

MOST_COLUMNS = 8
"""Layers that get a column of dots with intervals each; more of them become a map."""

KINDS_TITLE, KINDS_UNIT = "Increments by kind of token", "divided by the mean of the layer; 1 is that mean"

KIND_HEIGHT = 0.24
"""Inches of a row of a kind."""

MEASURE_COLOURS = (style.ORANGE, style.BLUE, style.SKY, style.QUIET)


def kinds_chart(table: pd.DataFrame, caption: str = "", path: str | Path | None = None) -> Figure:
    """Draw increments by kind of token, relative to the mean of the layer, with intervals.

    Up to eight layers stand side by side; more become a map of layers by kinds, in which a colour is a mean alone.

    Args:
        table: from `increments_by_category`, heads averaged.
        caption: what is shown, of which model and text.
        path: where to write the figure as well, as .png, .svg or .pdf.

    Raises:
        PositionsError: an empty table, or a path that cannot be written.

    >>> table = lp.analysis.increments_by_category(model, texts)
    >>> figure = lp.viz.kinds_chart(table, path=folder / "kinds.png")
    >>> [axes.get_title() for axes in figure.axes]
    ['layer 0', 'layer 1', 'layer 2', 'layer 3', 'layer 4', 'layer 5']
    """
    if table.empty:
        raise PositionsError("the table of kinds is empty; expected at least one kind of token.")

    # In the order of the table, which is that of the kinds.
    layers, kinds = list(dict.fromkeys(table["layer"])), list(dict.fromkeys(table["kind"]))
    names = [f"{kind}  n={n:,}" for kind, n in table.groupby("kind")["n"].first().loc[kinds].items()]
    with style.context():
        draw = _kinds_map if len(layers) > MOST_COLUMNS else _kinds_columns
        figure = draw(table, layers, kinds, names, caption)
    if path is not None:
        style.save(figure, path)
    return figure


def _kinds_map(table: pd.DataFrame, layers: list[int], kinds: list[str], names: list[str], caption: str) -> Figure:
    """Layers by kinds, a colour each: for more layers than columns with intervals have room for."""
    means = table.pivot(index="kind", columns="layer", values="relative").loc[kinds, layers]
    size = (0.2 * len(layers), KIND_HEIGHT * len(kinds))
    figure, axes = style.frame_figure(size, KINDS_TITLE, KINDS_UNIT, caption, (2.6, 1.0, 0.75, 0.5))
    # White is 1, the mean of the layer; a factor and its inverse get colours of one strength. Ratios that are zero or
    # less have no logarithm, so then the scale is a plain one.
    least, most = float(np.nanmin(means)), float(np.nanmax(means))
    reach = max(most - 1, 1 - least, 0.01)
    factor = max(most, 1 / least, 1.01) if least > 0 else math.inf
    norm = LogNorm(1 / factor, factor) if factor < math.inf else Normalize(1 - reach, 1 + reach)
    image = axes.imshow(means, cmap=DIVERGING, norm=norm, aspect="auto")
    axes.set_xticks(range(0, len(layers), 5), [str(layer) for layer in layers[::5]])
    axes.set_xlabel("layer")
    axes.set_yticks(range(len(kinds)), names)
    axes.tick_params(length=0)
    style.colour_bar(figure, axes, image)
    return figure


def _kinds_columns(table: pd.DataFrame, layers: list[int], kinds: list[str], names: list[str], caption: str) -> Figure:
    """A column for each layer, on one scale: a dot for each kind, with its interval."""
    size = (1.5 * len(layers), KIND_HEIGHT * len(kinds))
    figure, whole = style.frame_figure(size, KINDS_TITLE, KINDS_UNIT, caption, (2.6, 0.3, 0.95, 0.45))
    # The frame that the title stands over is divided among the columns.
    frame = whole.get_position()
    whole.remove()
    places = np.arange(len(kinds))
    values = table[["relative", "relative_low", "relative_high"]].to_numpy()
    ends = min(0.0, float(np.nanmin(values))) * 1.06, max(1.3, float(np.nanmax(values))) * 1.06
    for column, layer in enumerate(layers):
        rows = table[table["layer"] == layer].set_index("kind").reindex(kinds)
        left = frame.x0 + frame.width * column / len(layers)
        axes = figure.add_axes((left, frame.y0, frame.width / len(layers) * 0.88, frame.height))
        axes.hlines(places, rows["relative_low"], rows["relative_high"], color=style.INK, linewidth=1.2)
        colours = [style.ORANGE if value > 1 else style.BLUE for value in rows["relative"]]
        axes.scatter(rows["relative"], places, c=colours, s=18, zorder=3)
        axes.axvline(1, color=style.FAINT, linewidth=0.8, zorder=0)
        axes.set_ylim(len(kinds) - 0.5, -0.5)  # the first kind at the top
        axes.set_xlim(*ends)
        axes.set_yticks(places, names if column == 0 else [""] * len(kinds))
        axes.tick_params(axis="y", length=0)
        axes.set_title(f"layer {layer}", fontsize=9, color=style.QUIET)
    return figure


def auc_chart(table: pd.DataFrame, title: str, caption: str = "", path: str | Path | None = None) -> Figure:
    """Draw an area under the ROC curve by layer, one line a measure, with intervals; 0.5 is chance.

    Args:
        table: a row for each `measure` and `layer` (its number) with `auc` and its interval `low` to `high`; a measure
            that has no layer (a statistic of the text) has NaN there and becomes a level line; with a column `run`, a
            measure has a line for each of its runs.
        title: what is told from what.
        caption: what is shown, of which model and text.
        path: where to write the figure as well, as .png, .svg or .pdf.

    Raises:
        PositionsError: missing columns, or a path that cannot be written.

    >>> lines, words = ["中国政府今天在北京"], [["中国", "政府", "今天", "在", "北京"]]
    >>> figure = lp.viz.auc_chart(lp.analysis.boundary_auc(model, lines, words), "Word boundaries")
    >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    ['increment', 'within token', 'labels shuffled', 'best order of tokens']
    """
    if missing := {"measure", "layer", "auc", "low", "high"} - set(table):
        raise PositionsError(f"the table lacks {', '.join(sorted(missing))}; expected measure, layer, auc, low, high.")

    # A statistic of the text has no layer.
    numbers = sorted({int(layer) for layer in table["layer"].dropna()})
    lines = table.rename(columns={"layer": "at", "auc": "value"})
    return lines_chart(lines, title, "area under the ROC curve; 0.5 is chance", "layer", numbers, 0.5, caption, path)


def lines_chart(
    table: pd.DataFrame,
    title: str,
    unit: str,
    across: str,
    ticks: Sequence[float],
    level: float | None = None,
    caption: str = "",
    path: str | Path | None = None,
    octaves: bool = False,
    logarithmic: bool = False,
) -> Figure:
    """Draw values along something, one line a measure, with intervals.

    Args:
        table: a row for each `measure` and place `at` with `value` and its interval `low` to `high` (NaN for none); a
            measure without a place (NaN) becomes a level line, and with a column `run` one has a line for each of them.
        title: what is drawn.
        unit: of the values.
        across: what runs along the horizontal axis.
        ticks: its marks.
        level: where a faint level line is drawn; None for none.
        caption: what is shown, of which model and text.
        path: where to write the figure as well, as .png, .svg or .pdf.
        octaves: whether every doubling takes as much room.
        logarithmic: whether every factor of the values does; those that are not positive are left out.

    Raises:
        PositionsError: missing columns, or a path that cannot be written.

    >>> rows = [("loss", 64, 1.6, 1.5, 1.7), ("loss", 128, 1.5, 1.4, 1.6)]
    >>> table = pd.DataFrame(rows, columns=["measure", "at", "value", "low", "high"])
    >>> figure = lp.viz.lines_chart(table, "Loss by length", "nats per token", "tokens of a window", [64, 128])
    >>> figure.axes[0].get_xlabel()
    'tokens of a window'
    """
    if missing := {"measure", "at", "value", "low", "high"} - set(table):
        raise PositionsError(f"the table lacks {', '.join(sorted(missing))}; expected measure, at, value, low, high.")
    with style.context():
        size = (max(0.35 * len(ticks), 3.4), 2.4)
        figure, axes = style.frame_figure(size, title, unit, caption, (0.6, 0.3, 0.95, 0.5))

        # Before anything is drawn: limits are found in the scale of the axis.
        if octaves:
            axes.set_xscale("log", base=2)
        if logarithmic:
            axes.set_yscale("log")
        if level is not None:
            axes.axhline(level, color=style.FAINT, linewidth=0.8, zorder=0)
        for i, (measure, rows) in enumerate(table.groupby("measure", sort=False)):
            colour = MEASURE_COLOURS[i % len(MEASURE_COLOURS)]
            _draw_measure(axes, str(measure), rows, colour, i - 0.5, octaves)
        axes.set_xticks(list(ticks), [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel(across)
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    if path is not None:
        style.save(figure, path)
    return figure


def _draw_measure(axes: Axes, measure: str, rows: pd.DataFrame, colour: str, aside: float, octaves: bool) -> None:
    """One measure: a level line where it has no place, else a line with intervals for each of its runs."""
    if rows["at"].isna().all():
        row = rows.iloc[0]
        axes.axhspan(row["low"], row["high"], color=colour, alpha=0.15, linewidth=0)
        axes.axhline(row["value"], color=colour, linestyle="--", linewidth=1.2, label=measure)
        return
    runs = [rows] if "run" not in rows else [of_run for _, of_run in rows.groupby("run")]
    for number, of_run in enumerate(runs):
        # Each line stands a little aside of the last, so that their intervals do not hide each other; on an axis of
        # octaves a factor is what a step is on another.
        shift = aside + number / 3
        places = of_run["at"] * 2 ** (shift * 0.04) if octaves else of_run["at"] + shift * 0.06
        label = measure if number == 0 else None
        axes.vlines(places, of_run["low"], of_run["high"], color=colour, linewidth=1.2)
        axes.plot(places, of_run["value"], "o-", color=colour, markersize=4, linewidth=1, label=label)


def differences_chart(
    table: pd.DataFrame, title: str, unit: str, caption: str = "", path: str | Path | None = None
) -> Figure:
    """Draw differences to a baseline with their intervals, a row each; 0 is no difference.

    Args:
        table: a row each, from the top: `name`, `difference`, `low` and `high`, NaN where there is no interval, and
            optionally `group`, which gives the colour.
        title: what is compared with what.
        unit: of the differences.
        caption: what is shown, of which models and text.
        path: where to write the figure as well, as .png, .svg or .pdf.

    Raises:
        PositionsError: missing columns, or a path that cannot be written.

    >>> rows = [("shared", -0.02, -0.03, -0.01), ("per layer", -0.05, -0.07, -0.03)]
    >>> table = pd.DataFrame(rows, columns=["name", "difference", "low", "high"])
    >>> figure = lp.viz.differences_chart(table, "Loss against RoPE", "nats per byte")
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['shared', 'per layer']
    """
    if missing := {"name", "difference", "low", "high"} - set(table):
        raise PositionsError(f"the table lacks {', '.join(sorted(missing))}; expected name, difference, low and high.")
    groups = table.get("group", pd.Series([""] * len(table)))
    with style.context():
        figure, axes = style.frame_figure((4.2, 0.26 * len(table)), title, unit, caption, (2.4, 0.3, 0.95, 0.45))
        axes.axvline(0, color=style.FAINT, linewidth=0.8, zorder=0)

        # Each row keeps its place whatever its group, so the order of the table is that of the picture.
        places = np.arange(len(table))
        for i, group in enumerate(dict.fromkeys(groups)):
            chosen = (groups == group).to_numpy()
            rows, colour = table[chosen], MEASURE_COLOURS[i % len(MEASURE_COLOURS)]
            axes.hlines(places[chosen], rows["low"], rows["high"], color=colour, linewidth=1.6)
            axes.plot(rows["difference"], places[chosen], "o", color=colour, markersize=4, label=group)
        axes.set_ylim(len(table) - 0.5, -0.5)
        axes.set_yticks(places, table["name"])
        axes.tick_params(axis="y", length=0)
        if "group" in table:
            axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
    if path is not None:
        style.save(figure, path)
    return figure


def frequency_map(
    amounts: Mapping[str, Float[Tensor, "layer frequency"]],
    layers: Sequence[int],
    wavelengths: Sequence[float] | Float64[np.ndarray, " frequency"] | None,
    title: str,
    unit: str,
    caption: str = "",
    path: str | Path | None = None,
) -> Figure:
    """Draw amounts by layer and rotary frequency side by side, on one logarithmic scale; highest frequency at the left.

    Args:
        amounts: by name, positive numbers, such as the mean 2-norm of the query's chunk of that frequency.
        layers: the model's own number of each row; layer 0 is at the bottom.
        wavelengths: of each frequency, in positions; None where layers differ in them, and only their order is given.
        title: what the amounts are.
        unit: theirs.
        caption: what is shown, of which model and text.
        path: where to write the figure as well, as .png, .svg or .pdf.

    Raises:
        PositionsError: no amounts, layers or wavelengths that are not as many as the amounts have, amounts that are not
            positive, or a path that cannot be written.

    >>> amounts = {"query": torch.full((2, 3), 2.0), "key": torch.full((2, 3), 0.5)}  # layer, frequency
    >>> figure = lp.viz.frequency_map(amounts, [0, 1], [6.3, 62.8, 628.3], "Norms", "mean 2-norm")
    >>> [axes.get_title() for axes in figure.axes[:2]]
    ['query', 'key']
    """
    count = _valid_count(amounts, layers, wavelengths)

    # Short wavelengths, the highest frequencies, at the left.
    order = np.arange(count) if wavelengths is None else np.argsort(wavelengths)
    maps = {name: amount.detach().cpu().double().numpy()[:, order] for name, amount in amounts.items()}
    least, most = (float(end([end(values) for values in maps.values()])) for end in (np.min, np.max))

    # One scale for all maps, and never an empty one.
    norm = LogNorm(least, max(most, least * 1.001))
    with style.context():
        width, gap = max(0.16 * count, 3.0), 0.35
        size = (width * len(maps) + gap * (len(maps) - 1), max(0.16 * len(layers), 0.9))
        figure, whole = style.frame_figure(size, title, unit, caption, (0.75, 1.05, 0.95, 0.5))

        # The frame is divided among the maps, with a gap between them.
        frame = whole.get_position()
        whole.remove()
        scale = frame.width / size[0]
        for column, (name, values) in enumerate(maps.items()):
            left = frame.x0 + column * (width + gap) * scale
            axes = figure.add_axes((left, frame.y0, width * scale, frame.height))
            image = axes.imshow(values, cmap=SEQUENTIAL, norm=norm, aspect="auto", origin="lower")
            axes.set_title(name, fontsize=9, color=style.QUIET)
            _label_layers(axes, layers, first=column == 0)
            _label_frequencies(axes, None if wavelengths is None else [wavelengths[i] for i in order], count)
            axes.tick_params(length=0)
        style.colour_bar(figure, axes, image)
    if path is not None:
        style.save(figure, path)
    return figure


def _valid_count(
    amounts: Mapping[str, Float[Tensor, "layer frequency"]],
    layers: Sequence[int],
    wavelengths: Sequence[float] | Float64[np.ndarray, " frequency"] | None,
) -> int:
    """How many frequencies there are, in maps that fit together and that a logarithm can show."""
    if not amounts:
        raise PositionsError("there are no amounts; expected at least one map of layers by frequencies.")
    count = next(iter(amounts.values())).shape[-1] if wavelengths is None else len(wavelengths)
    for amount in amounts.values():
        if amount.shape != (len(layers), count):
            raise PositionsError(
                f"amounts have shape {tuple(amount.shape)}, with {len(layers)} layers and {count} wavelengths; "
                "expected [layer, frequency] to match."
            )
        if not (amount > 0).all():
            raise PositionsError(f"the least amount is {float(amount.min()):.3g}; expected positive ones.")
    return count


def _label_layers(axes: Axes, layers: Sequence[int], first: bool) -> None:
    """Some ten marks of layers, with their numbers on the first of several maps alone."""
    step = max(1, round(len(layers) / 10))
    axes.set_yticks(range(0, len(layers), step), [str(n) for n in layers[::step]] if first else None)
    if first:
        axes.set_ylabel("layer")
    else:
        axes.tick_params(labelleft=False)


def _label_frequencies(axes: Axes, wavelengths: Sequence[float] | None, count: int) -> None:
    """Some six marks along the frequencies: wavelengths, or their numbers where layers differ in those."""
    columns = range(0, count, max(1, count // 6))
    axes.set_xticks(columns, [str(i) if wavelengths is None else f"{wavelengths[i]:,.0f}" for i in columns])
    axes.set_xlabel("frequency, highest first" if wavelengths is None else "wavelength, positions")
