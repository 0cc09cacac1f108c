"""Attention drawn as arcs on two rulers: what a token attends to, by distance as the model has it and by count.

Above, tokens stand at their learned positions; below, they are counted, as standard RoPE would have them. An arc runs
from the token that attends to one that it attends to, and is as wide and as strong as the attention. `attention_view`
is the same to explore.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Arc

from ..errors import PositionsError
from ..interventions import index_of
from ..model import HookedPositionTransformer
from ..text import Mask, TextOrTokens
from . import style
from .text_positions import MOST_ATTENDING, TextPositions, position_text

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
    text_positions = position_text(
        model, text, patterns=True, most=MOST_ATTENDING, attention_mask=attention_mask, prepend_bos=prepend_bos
    )
    entry, head, token = _chosen(text_positions, layer, head, token)
    figure = _draw(
        text_positions, _Rulers(text_positions, entry, head, token), f"layer {layer}, head {head}, token {token}"
    )
    if path is not None:
        style.save(figure, path)
    return figure


def _chosen(text_positions: TextPositions, layer: int, head: int, token: int | None) -> tuple[int, int, int]:
    """The entry of the layer, the head and the token that attends, each one that is there."""
    n, heads = len(text_positions.tokens), text_positions.attention().shape[1]
    layer = index_of(layer, "layer", "a number from 0")
    if layer not in text_positions.layers:
        known = ", ".join(map(str, text_positions.layers))
        raise PositionsError(f"layer is {layer}; expected one of the layers with positions ({known}).")
    head = index_of(head, "head", f"one from 0 to {heads - 1}", most=heads - 1)
    token = n - 1 if token is None else index_of(token, "token", f"one from 0 to {n - 1}", most=n - 1)
    return text_positions.layers.index(layer), head, token


class _Rulers:
    """Where everything stands: both rulers have length 1, and the vertical axis is in inches.

    Attributes:
        token: the one that attends.
        weights: its attention to each token.
        attended: the tokens that get an arc.
        span: positions from the nearest to the farthest token.
        learned, counted: the places of tokens on the two rulers, from 0 to 1.
        labels: of the tokens, cut to a length that can be read.
        upright: whether labels stand upright (most are of one character or two), or are turned by a quarter.
        wide, between, arc: the width, the room between the rulers, and that of the arcs on either side.
    """

    def __init__(self, text_positions: TextPositions, entry: int, head: int, token: int) -> None:
        patterns = text_positions.attention()
        n, heads = len(text_positions.tokens), patterns.shape[1]
        self.token = token
        self.weights = patterns[entry, head, token].double().numpy()
        of_heads = text_positions.positions[entry]
        # Query heads that share a key-value head share its positions; one head of positions stands for all.
        positions = of_heads[:, head * of_heads.shape[1] // heads].numpy()
        self.span = float(np.ptp(positions)) or 1.0
        self.learned = (positions - positions.min()) / self.span
        self.counted = np.arange(n) / max(n - 1, 1)
        self.attended = [key for key in range(token + 1) if self.weights[key] >= SHOWN]

        labels = [style.visible_text(label) for label in text_positions.labels]
        self.labels = [label if len(label) <= LABEL_LENGTH else label[: LABEL_LENGTH - 1] + "…" for label in labels]
        self.upright = sum(len(label) > 2 for label in self.labels) <= n / 10

        self.wide = min(max(0.2 * n, 4.5), 11.0)
        self.between = 0.75 if self.upright else 0.5 + 0.16 * max(map(len, self.labels))
        # An arc is a half circle where there is room for it; the highest decides how much room there is.
        reaches = [
            abs(x[token] - x[key]) * self.wide / 2 for x in (self.learned, self.counted) for key in self.attended
        ]
        self.arc = min(max(reaches, default=0.0), 1.1) + 0.3


def _draw(text_positions: TextPositions, rulers: _Rulers, what: str) -> Figure:
    """Both rulers, the lines that join them, and what they are."""
    n, between, arc = len(rulers.labels), rulers.between, rulers.arc
    caption = (
        f"{text_positions.name}. Arcs run from the blue token to those that it attends to, as wide and strong as the "
        f"attention; below {SHOWN:.0%} none is drawn. {text_positions.cut()}"
    )
    with style.context():
        size = (rulers.wide, 2 * arc + between)
        figure, axes = style.frame_figure(size, "Attention on two rulers", what, caption, (0.3, 0.3, 0.75, 0.2))
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-arc, between + arc)
        axes.axis("off")
        _draw_ruler(axes, rulers, "learned", rulers.learned, between, 1)
        _draw_ruler(axes, rulers, "counted", rulers.counted, 0.0, -1)

        # A line joins each token's places; it ends short of the labels, which stand between the rulers.
        foot = 0.32 if rulers.upright else between / 2 - 0.1
        ends = [[foot] * n, [between - foot] * n]
        axes.plot([rulers.counted, rulers.learned], ends, color=style.FAINT, linewidth=0.6, zorder=0)
        learned_or_not = "" if text_positions.config.source == "static" else "learned "
        above = f"{learned_or_not}positions, {rulers.span:.1f} steps in all"
        axes.text(0, between + arc, above, fontsize=8, color=style.QUIET, va="top")
        axes.text(0, -arc, f"token counts, {n - 1} steps in all", fontsize=8, color=style.QUIET, va="bottom")
    return figure


def _draw_ruler(
    axes: Axes, rulers: _Rulers, name: str, x: Float64[np.ndarray, " token"], y: float, up: Literal[1, -1]
) -> None:
    """One ruler at height y, its arcs above (up is 1) or below it, its labels on the other side."""
    axes.plot([0, 1], [y, y], color=style.FAINT, linewidth=1, zorder=1)
    axes.plot(x, np.full(len(x), y), "|", color=style.QUIET, markersize=5, zorder=2)
    token, weights = rulers.token, rulers.weights
    for key in rulers.attended:
        reach = max(abs(x[token] - x[key]), 0.012)  # attention to itself is a small loop, not nothing
        tall = 2 * min(reach * rulers.wide / 2, rulers.arc - 0.3)
        axes.add_patch(
            Arc(
                ((x[token] + x[key]) / 2, y), reach, tall, theta1=0 if up > 0 else 180,
                theta2=180 if up > 0 else 360, color=style.BLUE, linewidth=0.5 + 4 * weights[key],
                alpha=0.35 + 0.65 * float(min(weights[key], 1.0)), zorder=3, gid=f"{name}-{key}",
            )
        )  # fmt: skip
    fonts = style.fonts_for("".join(rulers.labels))
    for i, label in enumerate(rulers.labels):
        shown, font = style.draw_text(label if not rulers.upright or len(label) <= 2 else label[0] + "…", fonts)
        # Tokens after the one that attends are pale: it cannot see them.
        colour = style.BLUE if i == token else style.QUIET if i > token else style.INK
        axes.text(
            x[i], y - up * 0.1, shown, fontproperties=font, fontsize=9, parse_math=False, ha="center",
            va="top" if up > 0 else "bottom", rotation=0 if rulers.upright else 90, color=colour,
            gid=f"{name}-label-{i}",
        )  # fmt: skip
