"""Attention drawn as arcs on two rulers: what a token attends to, by distance as the model has it and by count.

Above, tokens stand at their learned positions; below, they are counted, as standard RoPE would have them. An arc runs
from the token that attends to one that it attends to, and is as wide and as strong as the attention. `attention_view`
is the same to explore.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Arc

from ..errors import PositionsError
from ..interventions import index_of
from ..model import HookedPositionTransformer
from ..text import Mask, TextOrTokens
from . import style
from .text_positions import MOST_ATTENDING, position_text

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
    patterns = text_positions.attention()
    n, heads = len(text_positions.tokens), patterns.shape[1]
    layer = index_of(layer, "layer", "a number from 0")
    if layer not in text_positions.layers:
        known = ", ".join(map(str, text_positions.layers))
        raise PositionsError(f"layer is {layer}; expected one of the layers with positions ({known}).")
    head = index_of(head, "head", f"one from 0 to {heads - 1}", most=heads - 1)
    token = n - 1 if token is None else index_of(token, "token", f"one from 0 to {n - 1}", most=n - 1)
    entry = text_positions.layers.index(layer)
    weights = patterns[entry, head, token].double().numpy()
    of_heads = text_positions.positions[entry]
    positions = of_heads[:, head * of_heads.shape[1] // heads].numpy()
    positions = positions - positions[0]

    labels = [style.visible_text(label) for label in text_positions.labels]
    labels = [label if len(label) <= LABEL_LENGTH else label[: LABEL_LENGTH - 1] + "…" for label in labels]
    fonts = style.fonts_for("".join(labels))
    upright = sum(len(label) > 2 for label in labels) <= n / 10
    span = float(np.ptp(positions)) or 1.0
    caption = (
        f"{text_positions.name}. Arcs run from the blue token to those that it attends to, as wide and strong as the "
        f"attention; below {SHOWN:.0%} none is drawn. {text_positions.cut()}"
    )
    with style.context():
        wide, between = min(max(0.2 * n, 4.5), 11.0), 0.75 if upright else 0.5 + 0.16 * max(map(len, labels))
        counted = np.arange(n) / max(n - 1, 1)
        learned = (positions - positions.min()) / span
        attended = [key for key in range(token + 1) if weights[key] >= SHOWN]
        reaches = [abs(x[token] - x[key]) * wide / 2 for x in (learned, counted) for key in attended]
        arc = min(max(reaches, default=0.0), 1.1) + 0.3
        what = f"layer {layer}, head {head}, token {token}"
        size = (wide, 2 * arc + between)
        figure, axes = style.frame_figure(size, "Attention on two rulers", what, caption, (0.3, 0.3, 0.75, 0.2))
        # Both rulers have length 1; inches on the vertical axis.
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-arc, between + arc)
        axes.axis("off")
        for name, x, y, up in (("learned", learned, between, 1), ("counted", counted, 0.0, -1)):
            axes.plot([0, 1], [y, y], color=style.FAINT, linewidth=1, zorder=1)
            axes.plot(x, np.full(n, y), "|", color=style.QUIET, markersize=5, zorder=2)
            for key in attended:
                reach = max(abs(x[token] - x[key]), 0.012)
                tall = 2 * min(reach * wide / 2, arc - 0.3)
                axes.add_patch(
                    Arc(
                        ((x[token] + x[key]) / 2, y), reach, tall, theta1=0 if up > 0 else 180,
                        theta2=180 if up > 0 else 360, color=style.BLUE, linewidth=0.5 + 4 * weights[key],
                        alpha=0.35 + 0.65 * float(min(weights[key], 1.0)), zorder=3, gid=f"{name}-{key}",
                    )
                )  # fmt: skip
            for i, label in enumerate(labels):
                shown, font = style.draw_text(label if not upright or len(label) <= 2 else label[0] + "…", fonts)
                colour = style.BLUE if i == token else style.QUIET if i > token else style.INK
                axes.text(
                    x[i], y - up * 0.1, shown, fontproperties=font, fontsize=9, parse_math=False, ha="center",
                    va="top" if up > 0 else "bottom", rotation=0 if upright else 90, color=colour,
                    gid=f"{name}-label-{i}",
                )  # fmt: skip
        foot = 0.32 if upright else between / 2 - 0.1
        axes.plot([counted, learned], [[foot] * n, [between - foot] * n], color=style.FAINT, linewidth=0.6, zorder=0)
        learned_or_not = "" if text_positions.config.source == "static" else "learned "
        above = f"{learned_or_not}positions, {span:.1f} steps in all"
        axes.text(0, between + arc, above, fontsize=8, color=style.QUIET, va="top")
        axes.text(0, -arc, f"token counts, {n - 1} steps in all", fontsize=8, color=style.QUIET, va="bottom")
    if path is not None:
        style.save(figure, path)
    return figure
