"""A text drawn at its learned positions: each character stands as far from the last as the model puts it.

- The x of a character is its position less that of the first character in its panel. Attention sees only differences
  of positions, so where a panel starts carries no meaning.
- `scale="relative"` divides each row by its mean increment, so that rows compare in pattern and not in size; the mean
  is printed beside the row. `scale="common"` puts all rows on one axis in steps of standard RoPE.
- With increments per head, the mean over the heads is drawn.
"""

import math
import textwrap
import unicodedata
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from ..errors import PositionsError
from ..interventions import Hooks, LayerIndices
from ..model import HookedPositionTransformer
from ..text import Mask, TextOrTokens
from . import style
from .text_positions import TextPositions, before_and_after, edits_in_words, rows_to_show

TITLE = "Characters at their learned positions"
MAX_PANELS = 8
POINTS_PER_INCH = 72
TYPE_SIZE = 12.0  # points
ROW_HEIGHT = 0.44  # inches
PANEL_WIDTH = (5.0, 11.0)  # inches, least and most

Scale = Literal["relative", "common"]


def spacing(
    model: HookedPositionTransformer,
    text: TextOrTokens,
    layers: LayerIndices = None,
    scale: Scale = "relative",
    path: str | Path | None = None,
    *,
    hooks: Hooks | None = None,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> Figure:
    """Draw a text with each character at its learned position, one row a layer.

    Layers that share their increments share one row. In subword models a token is drawn whole, at its position. The
    same as a page to explore is `spacing_view`.

    Args:
        model: the model.
        text: what to draw, or its tokens, special ones in front included; beyond eight panels, and beyond the context,
            it is cut, and the caption says where.
        layers: the layers to draw; None is all of them.
        scale: "relative" divides each row by its mean increment, "common" keeps steps of standard RoPE.
        path: where to write the figure as well, as .png, .svg or .pdf.
        hooks: edits, whose rows stand below those without them, layer by layer.
        attention_mask, prepend_bos: as for `text_positions.position_text`.

    Raises:
        PositionsError: an empty text, several texts, padding without a mask, a layer that the model lacks, a mean
            increment that is not positive in the relative scale, a path that cannot be written, or (MissingFontError)
            Chinese and no font that can draw it.

    >>> figure = lp.viz.spacing(model, "The cat sat.", path=folder / "spacing.svg")
    >>> figure.axes[0].get_xlabel()
    "position, from the first character (each row's mean increment is 1)"
    """
    if scale not in ("relative", "common"):
        raise PositionsError(f'scale is {scale!r}; expected "relative" or "common".')
    if path is not None:
        style.check_path(path)
    before, after = before_and_after(model, text, hooks, attention_mask=attention_mask, prepend_bos=prepend_bos)
    rows = rows_of(before, after, rows_to_show(model, layers, before, after, "positions"), scale)
    fonts = style.fonts_for("".join(before.units))
    with style.context():
        figure = _draw(before, after, rows, scale, fonts)
    if path is not None:
        style.save(figure, path)
    return figure


@dataclass(frozen=True)
class Row:
    """Where each unit of a text begins and ends in one row, in steps of standard RoPE or in mean increments.

    Attributes:
        name: of its layer.
        mean_increment: in steps of standard RoPE.
        first, last: places of each unit.
        edited: whether edits were active.
    """

    name: str
    mean_increment: float
    first: list[float]
    last: list[float]
    edited: bool = False


def rows_of(
    before: TextPositions, after: TextPositions | None, shown: list[tuple[int, str, bool]], scale: Scale
) -> list[Row]:
    """The rows to draw, in units of the axis.

    Args:
        before, after: the text without and with edits.
        shown: from `rows_to_show`.
        scale: see the module.

    Raises:
        PositionsError: a mean increment that is not positive, by which the relative scale would divide.
    """
    rows = []
    for layer, name, edited in shown:
        source = after if after is not None and edited else before
        positions, mean = source.positions[layer].mean(-1), source.mean_increment(layer)
        if scale == "relative" and mean <= 0:
            raise PositionsError(
                f'the mean increment of {name} is {mean:.3g}; expected a positive one, by which scale="relative" '
                'divides: use scale="common".'
            )
        positions = positions / mean if scale == "relative" else positions
        first, last = positions[before.first].tolist(), positions[before.last].tolist()
        rows.append(Row(name, mean, first, last, edited))
    return rows


def caption_of(before: TextPositions, after: TextPositions | None, rows: list[Row], scale: Scale) -> list[str]:
    """What a reader must know to read the picture, a sentence each."""
    said = before.convention()
    if after is not None:
        said += edits_in_words(after, [(0, row.name, row.edited) for row in rows])
    edited = any(row.edited for row in rows)
    if before.config.source != "static" or edited:
        if scale == "relative":
            said.append("Each row is divided by its mean increment, printed at its left in steps of standard RoPE.")
        else:
            said.append("All rows share one scale; a row's mean increment is printed at its left.")
    if len(rows) > 1:
        said.append("Lines follow a character from row to row.")
    if any(row.first != row.last for row in rows):
        said.append("A character of several tokens stands at its first; the line under it runs to its last.")
    if any(map(is_boundary, before.units)):
        said.append("Orange: whitespace (␣, ⏎) and punctuation.")
    return said


def is_boundary(unit: str) -> bool:
    """Whether a unit has no letter, digit or ideograph: whitespace and punctuation, drawn in the accent colour."""
    return not any(character.isalnum() for character in unit)


def _draw(
    before: TextPositions, after: TextPositions | None, rows: list[Row], scale: Scale, fonts: list[FontProperties]
) -> Figure:
    units = before.units

    # How wide the picture must be for its characters; in more panels where one would be too wide.
    needed = _points_needed(units, rows)
    extent = max(max(row.last) - min(row.first) for row in rows)
    n_panels = math.ceil(needed * extent / (PANEL_WIDTH[1] * POINTS_PER_INCH))
    panels = _panels(units, min(max(n_panels, 1), len(units)))[:MAX_PANELS]

    # Every panel has the same scale, wide enough for the longest row of any.
    ranges = [_range(rows, panel) for panel in panels]
    extent = max(high - low for low, high in ranges)
    width = min(max(1.4 * needed * extent / POINTS_PER_INCH, PANEL_WIDTH[0]), PANEL_WIDTH[1])
    margin = max(extent, 1e-6) * 0.13 / width

    said = caption_of(before, after, rows, scale)
    if any(style.draw_text(unit, fonts)[0] != style.visible_text(unit) for unit in set(units)):
        said.append(f"{style.SUBSTITUTE} stands for a character that no installed font draws.")
    said += filter(None, [before.cut(panels[-1].stop)])
    caption = textwrap.wrap(" ".join(said), width=int((width + 0.9) * 17))
    left, right, top, between = 1.4 if after else 1.1, 0.25, 0.5, 0.45
    bottom = 0.75 + 0.16 * len(caption)
    panel_height = ROW_HEIGHT * len(rows)
    height = top + len(panels) * (panel_height + between) - between + bottom
    figure = style.Drawing(figsize=(left + width + right, height))

    # matplotlib places in fractions of the figure; everything here is thought in inches.
    inch = (1 / figure.get_figwidth(), 1 / height)
    figure.text(0.2 * inch[0], 1 - 0.17 * inch[1], TITLE, fontsize=13, fontweight="bold", va="top")
    figure.text(
        0.2 * inch[0], 0.12 * inch[1], "\n".join(caption), fontsize=8, color=style.QUIET, linespacing=1.35,
        parse_math=False,
    )  # fmt: skip
    for number, panel in enumerate(panels):
        foot = height - top - (number + 1) * panel_height - number * between
        axes = figure.add_axes((left * inch[0], foot * inch[1], width * inch[0], panel_height * inch[1]))
        low = ranges[number][0]
        axes.set_xlim(low - margin, low + extent + margin)
        _draw_panel(axes, units, rows, panel, fonts)
    unit = "each row's mean increment is 1" if scale == "relative" else "in steps of standard RoPE"
    start = "the first character of the panel" if len(panels) > 1 else "the first character"
    axes.set_xlabel(f"position, from {start} ({unit})")
    return figure


def _points_needed(units: list[str], rows: list[Row]) -> float:
    """How many points wide a unit of the axis must be for three in four neighbours to stand clear of each other.

    At most twice what they would need if they stood evenly: some sources give many tokens the same position.
    """
    needed, widths, gaps = [], 0.0, 0.0
    for row in rows:
        for (unit, after), (x, x_after) in zip(pairwise(units), pairwise(row.first), strict=True):
            # Centre to centre, two neighbours need half the width of each.
            width, gap = (_width(unit) + _width(after)) / 2 * TYPE_SIZE * 0.9, max(abs(x_after - x), 1e-6)
            needed.append(width / gap)
            widths, gaps = widths + width, gaps + gap
    if not needed:
        return TYPE_SIZE

    # Three quarters of the neighbours, since the last quarter may stand on one spot.
    return min(sorted(needed)[(len(needed) - 1) * 3 // 4], 2 * widths / gaps)


def _width(unit: str) -> float:
    """The width of a unit as drawn, roughly, in multiples of the type size."""
    return sum(1.0 if unicodedata.east_asian_width(character) in "WF" else 0.62 for character in unit)


def _panels(units: list[str], n_panels: int) -> list[range]:
    """Units in `n_panels` runs of similar length, cut after whitespace or punctuation where some is near."""
    cuts = [0]
    for number in range(1, n_panels):
        even = round(number * len(units) / n_panels)
        reach = len(units) // (4 * n_panels)

        # The nearest cut after a space or a mark, a quarter of a panel away at most.
        near = sorted(range(even - reach, even + reach + 1), key=lambda cut: abs(cut - even))
        cuts.append(next((cut for cut in near if cut > cuts[-1] and is_boundary(units[cut - 1])), even))
    return [range(start, stop) for start, stop in pairwise([*cuts, len(units)])]


def _range(rows: list[Row], panel: range) -> tuple[float, float]:
    """The least and greatest x in a panel, over all rows."""
    # Increments may be negative, so the first unit need not be the leftmost.
    low = min(row.first[i] - row.first[panel.start] for row in rows for i in panel)
    high = max(row.last[i] - row.first[panel.start] for row in rows for i in panel)
    return low, high


def _draw_panel(axes: Axes, all_units: list[str], rows: list[Row], panel: range, fonts: list[FontProperties]) -> None:
    """Draw the units of one panel in every row, and the lines that follow each from row to row."""
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.set_yticks([])
    units = [all_units[i] for i in panel]
    colors = [style.ORANGE if is_boundary(unit) else style.INK for unit in units]

    # Each panel begins at its own first unit.
    x = [[row.first[i] - row.first[panel.start] for i in panel] for row in rows]
    for r, row in enumerate(rows):
        label = f"{row.name}\nmean {row.mean_increment:.2f}"
        axes.annotate(
            label, (0, r), (-8, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
            ha="right", va="center", fontsize=8, color=style.BLUE if row.edited else style.QUIET, linespacing=1.25,
            annotation_clip=False,
        )  # fmt: skip
        ends = [row.last[i] - row.first[panel.start] for i in panel]

        # Units of several tokens get a line from their first to their last.
        joined = [[(a, r + 0.32), (b, r + 0.32)] for a, b in zip(x[r], ends, strict=True) if a != b]
        axes.add_collection(LineCollection(joined, colors=style.SKY, linewidths=1.0, zorder=2), autolim=False)
        for at, unit, color in zip(x[r], units, colors, strict=True):
            shown, font = style.draw_text(unit, fonts)
            axes.text(
                at, r, shown, ha="center", va="center", fontproperties=font, fontsize=TYPE_SIZE, color=color,
                parse_math=False, zorder=3,
            )  # fmt: skip
    for r, (above, below) in enumerate(pairwise(x)):
        lines = [[(a, r + 0.36), (b, r + 0.68)] for a, b in zip(above, below, strict=True)]
        shades = [style.ORANGE if color == style.ORANGE else style.FAINT for color in colors]
        widths = [0.8 if color == style.ORANGE else 0.6 for color in colors]
        axes.add_collection(LineCollection(lines, colors=shades, linewidths=widths, zorder=1), autolim=False)
