"""Attention drawn as arcs on two rulers: what a token attends to, by distance as the model has it and by count.

Above, tokens stand at their learned positions; below, they are counted, as standard RoPE would have them. An arc runs
from the token that attends to one that it attends to, and is as wide and as strong as the attention. `attention_view`
is the same to explore.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Arc

from ..errors import PositionsError
from ..interventions import Hooks, index_of
from ..model import HookedPositionTransformer
from ..text import Mask, TextOrTokens
from . import style
from .text_positions import MOST_ATTENDING, TextPositions, before_and_after, edits_in_words

SHOWN = 0.01
"""Attention below this is not drawn."""

LABEL_LENGTH = 12
"""Characters of a token's label at most."""


def arcs(
    model: HookedPositionTransformer,
    text: TextOrTokens,
    layer: int,
    head: int,
    token: int | None = None,
    path: str | Path | None = None,
    *,
    hooks: Hooks | None = None,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> Figure:
    """Draw the attention of one token in one head, on a ruler of learned positions and on one of token counts.

    Args:
        model: the model.
        text: what to read, or its tokens, special ones in front included; beyond 48 tokens it is cut.
        layer: the model's own number of a layer with positions.
        head: a query head.
        token: the one that attends, counted from 0 with special tokens in front; None is the last.
        path: where to write the figure as well, as .png, .svg or .pdf.
        hooks: edits; the drawing without them stands at the left, the one with them at the right, on one scale.
        attention_mask, prepend_bos: as for `text_positions.position_text`.

    Raises:
        PositionsError: an empty text, several texts, padding without a mask, no such layer, head or token, a model that
            shows no attention patterns, a path that cannot be written, or (MissingFontError) Chinese and no font that
            can draw it.

    >>> figure = lp.viz.arcs(model, "The cat sat.", layer=0, head=1, path=folder / "arcs.svg")
    >>> figure.texts[1].get_text()  # the last token is the one that attends
    'layer 0, head 1, token 12'
    """
    if path is not None:
        style.check_path(path)
    how: dict[str, Any] = {"attention_mask": attention_mask, "prepend_bos": prepend_bos}
    before, after = before_and_after(model, text, hooks, patterns=True, most=MOST_ATTENDING, **how)
    layer, head, token = _valid_choice(before, layer, head, token)
    sides = [_rulers(side, layer, head, token) for side in (before, after) if side is not None]
    # One scale for both: the longer of the two fills its ruler.
    longest = max(max(float(np.ptp(side.positions)) for side in sides), 1e-9)
    with style.context():
        figure = _draw(before, after, sides, longest, f"layer {layer}, head {head}, token {token}")
    if path is not None:
        style.save(figure, path)
    return figure


def _valid_choice(text: TextPositions, layer: int, head: int, token: int | None) -> tuple[int, int, int]:
    """The layer, head and token that are asked for.

    Raises:
        PositionsError: there is no such one.
    """
    n, heads = len(text.tokens), text.attention().shape[1]
    layer = index_of(layer, "layer", "a number from 0")
    if layer not in text.layers:
        known = ", ".join(map(str, text.layers))
        raise PositionsError(f"layer is {layer}; expected one of the layers with positions ({known}).")
    head = index_of(head, "head", f"one from 0 to {heads - 1}", most=heads - 1)
    return layer, head, n - 1 if token is None else index_of(token, "token", f"one from 0 to {n - 1}", most=n - 1)


@dataclass(frozen=True)
class _Rulers:
    """The attention of one token, and where the tokens stand."""

    labels: list[str]
    token: int
    weights: Float64[np.ndarray, " pos"]
    positions: Float64[np.ndarray, " pos"]
    static: bool


def _rulers(text: TextPositions, layer: int, head: int, token: int) -> _Rulers:
    patterns, entry = text.attention(), text.layers.index(layer)
    of_heads = text.positions[entry]

    # Query heads that share a key-value head share its positions; one head of positions stands for all.
    positions = of_heads[:, head * of_heads.shape[1] // patterns.shape[1]].numpy()
    labels = [style.visible_text(label) for label in text.labels]
    labels = [label if len(label) <= LABEL_LENGTH else label[: LABEL_LENGTH - 1] + "…" for label in labels]
    weights = patterns[entry, head, token].double().numpy()
    return _Rulers(labels, token, weights, positions - positions[0], text.config.source == "static")


def _draw(
    before: TextPositions, after: TextPositions | None, sides: list[_Rulers], longest: float, what: str
) -> Figure:
    """The drawings beside each other."""
    labels, n = sides[0].labels, len(before.tokens)
    fonts = style.fonts_for("".join(labels))
    upright = sum(len(label) > 2 for label in labels) <= n / 10
    caption = (
        f"{before.name}. Arcs run from the blue token to those that it attends to, as wide and strong as the "
        f"attention; below {SHOWN:.0%} none is drawn. {' '.join(edits_in_words(after))} {before.cut()}"
    )
    wide, between = min(max(0.2 * n, 4.5), 11.0), 0.75 if upright else 0.5 + 0.16 * max(map(len, labels))
    gap, high = 0.4, 2 * max(_reach(side, longest, wide) for side in sides) + between
    size = (wide * len(sides) + gap * (len(sides) - 1), high)
    figure, whole = style.frame_figure(size, "Attention on two rulers", what, caption, (0.3, 0.3, 0.95, 0.2))
    frame = whole.get_position()
    whole.remove()
    for column, side in enumerate(sides):
        left = frame.x0 + column * (wide + gap) / size[0] * frame.width
        axes = figure.add_axes((left, frame.y0, wide / size[0] * frame.width, frame.height))
        if len(sides) > 1:
            axes.set_title(("before", "after the edits")[column], fontsize=9, color=style.QUIET)
        _draw_rulers(axes, side, longest, (wide, between, (high - between) / 2), upright, fonts)
    return figure


def _keys_with_arcs(side: _Rulers) -> list[int]:
    return [key for key in range(side.token + 1) if side.weights[key] >= SHOWN]


def _places(side: _Rulers, longest: float) -> tuple[np.ndarray, np.ndarray]:
    """Tokens at their positions and counted, on rulers of length 1."""
    n = len(side.labels)
    return (side.positions - side.positions.min()) / longest, np.arange(n) / max(n - 1, 1)


def _reach(side: _Rulers, longest: float, wide: float) -> float:
    """Inches that the highest arc and what is written above it need."""
    # An arc is a half circle where there is room for it; the highest decides how much room there is.
    reaches = [
        abs(x[side.token] - x[key]) * wide / 2 for x in _places(side, longest) for key in _keys_with_arcs(side)
    ]  # fmt: skip
    return min(max(reaches, default=0.0), 1.1) + 0.3


def _draw_rulers(
    axes: Axes,
    side: _Rulers,
    longest: float,
    size: tuple[float, float, float],
    upright: bool,
    fonts: list[FontProperties],
) -> None:
    """One drawing; `size` is the width, the room between the rulers and that for arcs, in inches."""
    wide, between, arc = size
    learned, counted = _places(side, longest)
    n = len(side.labels)

    # Both rulers have length 1; inches on the vertical axis.
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-arc, between + arc)
    axes.axis("off")
    for name, x, y, up in (("learned", learned, between, 1), ("counted", counted, 0.0, -1)):
        axes.plot([0, max(float(x.max()), 1e-9)], [y, y], color=style.FAINT, linewidth=1, zorder=1)
        axes.plot(x, np.full(n, y), "|", color=style.QUIET, markersize=5, zorder=2)
        for key in _keys_with_arcs(side):
            reach = max(abs(x[side.token] - x[key]), 0.012)
            tall = 2 * min(reach * wide / 2, arc - 0.3)
            axes.add_patch(
                Arc(
                    ((x[side.token] + x[key]) / 2, y), reach, tall, theta1=0 if up > 0 else 180,
                    theta2=180 if up > 0 else 360, color=style.BLUE, linewidth=0.5 + 4 * side.weights[key],
                    alpha=0.35 + 0.65 * float(min(side.weights[key], 1.0)), zorder=3, gid=f"{name}-{key}",
                )
            )  # fmt: skip
        for i, label in enumerate(side.labels):
            shown, font = style.draw_text(label if not upright or len(label) <= 2 else label[0] + "…", fonts)

            # Tokens after the one that attends are pale: it cannot see them.
            colour = style.BLUE if i == side.token else style.QUIET if i > side.token else style.INK
            axes.text(
                x[i], y - up * 0.1, shown, fontproperties=font, fontsize=9, parse_math=False, ha="center",
                va="top" if up > 0 else "bottom", rotation=0 if upright else 90, color=colour,
                gid=f"{name}-label-{i}",
            )  # fmt: skip

    # A line joins each token's places; it ends short of the labels, which stand between the rulers.
    foot = 0.32 if upright else between / 2 - 0.1
    axes.plot([counted, learned], [[foot] * n, [between - foot] * n], color=style.FAINT, linewidth=0.6, zorder=0)
    kind = "" if side.static else "learned "
    above = f"{kind}positions, {float(np.ptp(side.positions)):.1f} steps in all"
    axes.text(0, between + arc, above, fontsize=8, color=style.QUIET, va="top")
    axes.text(0, -arc, f"token counts, {n - 1} steps in all", fontsize=8, color=style.QUIET, va="bottom")
