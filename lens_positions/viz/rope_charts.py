"""How a model uses RoPE itself, drawn from the tables of `analysis`: frequencies, absolute position, dispersion."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from ..analysis.absolute_position import QUARTERS, ROUNDING
from ..analysis.frequencies import SIDES
from ..errors import PositionsError
from .charts import frequency_map, lines_chart


def norms_map(norms: pd.DataFrame, caption: str = "", path: str | Path | None = None) -> Figure:
    """Draw the norms of queries and keys by layer and rotary frequency, means over heads.

    Args:
        norms: from `frequency_norms`.
        caption: what is shown, of which model and text.
        path: where to write the figure as well, as .png, .svg or .pdf.

    Raises:
        PositionsError: no frequency that turns, layers with different numbers of frequencies, or a path that cannot be
            written.

    >>> figure = lp.viz.norms_map(lp.analysis.frequency_norms(model, texts))
    >>> [axes.get_title() for axes in figure.axes[:2]]
    ['query norm', 'key norm']
    """
    turned = norms[norms["frequency"] > 0]
    if turned.empty:
        raise PositionsError("no frequency of these norms turns; expected rotary positions, to draw them by frequency.")
    means = turned.groupby(["side", "layer", "index"])["norm"].mean()
    amounts = {f"{side} norm": torch.tensor(means[side].unstack().to_numpy()) for side in SIDES}

    # Some models turn local and global layers at different frequencies: then only their order can be an axis.
    same = turned.groupby("index")["frequency"].nunique().eq(1).all()
    wavelengths = 2 * np.pi / turned.groupby("index")["frequency"].first().to_numpy() if same else None
    layers = [int(layer) for layer in dict.fromkeys(turned["layer"])]
    return frequency_map(amounts, layers, wavelengths, "Norms by rotary frequency", "mean 2-norm", caption, path)


def absolute_chart(table: pd.DataFrame, caption: str = "", path: str | Path | None = None) -> Figure:
    """Draw the two parts of absolute position by layer, at early and late queries, means over heads.

    The axis is logarithmic, and parts that are rounding are left out.

    Args:
        table: from `absolute_variation`.
        caption: what is shown, of which model and text.
        path: where to write the figure as well, as .png, .svg or .pdf.

    Raises:
        PositionsError: a path that cannot be written.

    >>> table = lp.analysis.absolute_variation(model, texts, layers=[0, 1])
    >>> figure = lp.viz.absolute_chart(table, path=folder / "absolute.svg")
    >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    ['residual, early', 'residual, late', 'mask, early', 'mask, late']
    """
    own = table[(table["head"] == "all") & (table["layer"] != "all")]
    own = own.assign(at=own["layer"].astype(int))
    lines = pd.concat(
        own[own["quarter"] == quarter][["at", part, f"{part}_low", f"{part}_high"]]
        .set_axis(["at", "value", "low", "high"], axis=1)
        .assign(measure=f"{part}, {name}")
        for part in ("residual", "mask")
        for name, quarter in (("early", 0), ("late", QUARTERS - 1))
    )
    layers = sorted(set(own["at"]))
    unit = "variance over repeats, nats squared"
    lines = lines[lines["value"] > ROUNDING]
    title = "Absolute position by layer"
    return lines_chart(lines, title, unit, "layer", layers, None, caption, path, logarithmic=True)


def entropy_chart(table: pd.DataFrame, caption: str = "", path: str | Path | None = None) -> Figure:
    """Draw the entropy of attention by number of items: first, middle and last layer, beside even attention.

    Args:
        table: from `attention_dispersion`.
        caption: what is shown, of which model and text.
        path: where to write the figure as well, as .png, .svg or .pdf.

    Raises:
        PositionsError: a path that cannot be written.

    >>> table = lp.analysis.attention_dispersion(model, texts)
    >>> figure = lp.viz.entropy_chart(table)
    >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    ['layer 0', 'layer 3', 'layer 5', 'even: log n']
    """
    own = table[table["head"] == "all"].rename(columns={"items": "at"})
    layers, items = list(dict.fromkeys(own["layer"])), sorted(set(own["at"]))

    # Three lines can be told apart; thirty cannot.
    shown = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    columns = {"entropy": "value", "entropy_low": "low", "entropy_high": "high"}
    lines = [own[own["layer"] == layer].rename(columns=columns).assign(measure=f"layer {layer}") for layer in shown]

    # The entropy of attention that is spread evenly is the log of the number of items.
    even = own.groupby("at")["log_items"].mean().rename("value").reset_index()
    lines.append(even.assign(measure="even: log n", low=math.nan, high=math.nan))
    drawn = pd.concat([line[["measure", "at", "value", "low", "high"]] for line in lines])
    title, across = "Entropy by number of items", "items from, to twice as many"
    return lines_chart(drawn, title, "nats", across, items, 0.0, caption, path, octaves=True)
