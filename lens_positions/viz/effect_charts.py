"""Effects drawn: a map of layers by tokens for sweeps and attributions, and bars with intervals for ablations.

Orange raises the metric, blue lowers it, white does nothing; the scale is the same on both sides of zero.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from torch import Tensor

from ..errors import PositionsError
from ..interventions import Hooks, LayerIndices, describe, hook_names
from ..model import HookedPositionTransformer
from ..text import Mask, TextOrTokens, one_prompt
from . import style
from .output import visible_text

DIVERGING = LinearSegmentedColormap.from_list("effects", [style.BLUE, style.SKY, "#ffffff", "#f2a15f", style.ORANGE])
LABEL_LENGTH = 14
"""Characters of a token's label at most."""

INTERVENTION_COLOURS = {"1.0": style.ORANGE, "mean": style.BLUE, "shuffle": style.QUIET, "token": style.SKY}
ABLATION_LABELS = {"shuffle": "shuffled", "token": "to token's mean"}


def effect_map(
    model: HookedPositionTransformer,
    effects: Float[Tensor, "layer pos"],
    text: TextOrTokens,
    layers: LayerIndices = None,
    title: str = "Effect of each layer and token",
    unit: str = "change of the metric",
    caption: str = "",
    path: str | Path | None = None,
    *,
    hooks: Hooks | None = None,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> Figure:
    """Draw the effect of every layer and token.

    Args:
        model: the model that was measured.
        effects: from `causal.gap_sweep`, `patch_sweep` or `attribution`; NaN is left blank.
        text: the prompt, as text or as tokens.
        layers: the layers that were measured, as they were given there; layer 0 is at the bottom, where the text comes
            in.
        title: what was changed.
        unit: of the effects.
        caption: what else is to be known; the model and the edits stand there in any case.
        path: where to write the figure as well, as .png, .svg or .pdf.
        hooks: edits that were active while the effects were measured.
        attention_mask, prepend_bos: as for `causal.gap_sweep`.

    Raises:
        PositionsError: layers or tokens that are not as many as the effects have, a path that cannot be written, or
            (MissingFontError) Chinese and no font that can draw it.

    >>> effects = lp.causal.gap_sweep(model, "The cat", lp.causal.loss())
    >>> figure = lp.viz.effect_map(model, effects, "The cat", unit="nats per token")
    >>> figure.axes[0].get_ylabel()
    'layer'
    """
    if not isinstance(model, HookedPositionTransformer):
        raise PositionsError(
            f"the model is a {type(model).__name__}; expected the model that was measured, then its effects and the "
            "prompt."
        )

    numbers = [number for number, _ in hook_names(model, layers, "")]
    prompt = one_prompt(model, text, attention_mask, prepend_bos)[0]
    known = getattr(model, "tokenizer", None) is not None
    tokens = list(model.to_str_tokens(prompt)) if known else [str(token) for token in prompt.tolist()]
    said = f"{model.name}. {f'Edits: {describe(hooks)}. ' if hooks else ''}{caption}".strip()
    figure = map_of(effects, numbers, [visible_text(token) for token in tokens], title, unit, said)
    if path is not None:
        style.save(figure, path)
    return figure


def map_of(
    effects: Float[Tensor, "layer pos"],
    layers: Sequence[int],
    tokens: Sequence[str],
    title: str,
    unit: str,
    caption: str = "",
    sure: Bool[np.ndarray, "layer pos"] | None = None,
    above: Sequence[str] = (),
) -> Figure:
    """Draw a map of layers by tokens.

    Args:
        effects: NaN is left blank.
        layers: the model's own number of each row.
        tokens: the label of each column.
        title, unit, caption: as they are written.
        sure: cells that get a dot.
        above: what is written small above each column.

    Raises:
        PositionsError: layers or tokens that are not as many as the effects have.
    """
    if effects.shape != (len(layers), len(tokens)):
        raise PositionsError(
            f"effects have shape {tuple(effects.shape)}, with {len(layers)} layers and {len(tokens)} tokens; expected "
            "[layer, pos] to match."
        )
    tokens = [token if len(token) <= LABEL_LENGTH else token[: LABEL_LENGTH - 1] + "…" for token in tokens]
    fonts = style.fonts_for("".join(tokens))
    values = effects.detach().cpu().numpy()
    # White is no effect: the scale reaches as far below zero as above.
    most = float(np.nanmax(np.abs(np.nan_to_num(values)))) or 1.0
    with style.context():
        wide, high = max(0.22 * len(tokens), 3.0), max(0.16 * len(layers), 0.9)
        below = 0.35 + 0.075 * max(map(len, tokens))
        top = 0.75 + (0.05 + 0.06 * max(map(len, above)) if above else 0)
        figure, axes = style.frame_figure((wide, high), title, unit, caption, (0.75, 1.05, top, below))
        image = axes.imshow(values, cmap=DIVERGING, vmin=-most, vmax=most, aspect="auto", origin="lower")
        if sure is not None:
            # A dot and not a colour: the colour already says how large the effect is.
            rows, columns = sure.nonzero()
            axes.plot(columns, rows, "o", color=style.INK, markersize=1.8, linestyle="none")
        for column, said in enumerate(above):
            axes.annotate(
                said, (column, 1), (0, 2), xycoords=axes.get_xaxis_transform(), textcoords="offset points",
                ha="center", va="bottom", fontsize=6, color=style.QUIET, rotation=90,
            )  # fmt: skip
        axes.set_ylabel("layer")
        # Some ten labels, however many layers.
        step = max(1, round(len(layers) / 10))
        axes.set_yticks(range(0, len(layers), step), [str(layers[i]) for i in range(0, len(layers), step)])
        _label_tokens(axes, tokens, fonts)
        axes.tick_params(length=0)
        style.colour_bar(figure, axes, image)
    return figure


def _label_tokens(axes: Axes, tokens: Sequence[str], fonts: list[FontProperties]) -> None:
    """A token below each column, in a font that has its characters."""
    axes.set_xticks(range(len(tokens)))
    labels = [style.draw_text(token or " ", fonts) for token in tokens]
    axes.set_xticklabels([text for text, _ in labels], rotation=90, parse_math=False)
    for label, (_, font) in zip(axes.get_xticklabels(), labels, strict=True):
        label.set_fontproperties(font)
        label.set_fontsize(8)


def head_map(
    effects: Float[Tensor, "layer head *pos"],
    layers: Sequence[int],
    title: str,
    unit: str,
    caption: str = "",
    path: str | Path | None = None,
) -> Figure:
    """Draw the effect of every layer and head; of each head over a prompt, the one at the token where it is largest.

    `effect_map(model, effects[:, head], text)` draws one head at every token.

    Args:
        effects: from a sweep or an attribution with by="head", or from `causal.path_sweep`; NaN counts for nothing.
        layers: the model's own number of each row; layer 0 is at the bottom, where the text comes in.
        title, unit, caption, path: as for `effect_map`.

    Raises:
        PositionsError: layers that are not as many as the effects have, no head axis, or a path that cannot be written.

    >>> effects = lp.causal.gap_sweep(model, "The cat", lp.causal.loss(), by="head")
    >>> figure = lp.viz.head_map(effects, model.position_layers, "A longer gap", "nats per token")
    >>> figure.axes[0].get_xlabel()
    'head'
    """
    if effects.ndim not in (2, 3) or len(effects) != len(layers):
        raise PositionsError(
            f"effects have shape {tuple(effects.shape)}, with {len(layers)} layers; expected [layer, head] or "
            "[layer, head, pos] to match."
        )
    values = effects.detach().cpu().nan_to_num().numpy()
    if values.ndim == 3:  # with its sign
        largest = np.abs(values).argmax(-1, keepdims=True)
        values = np.take_along_axis(values, largest, axis=-1)[..., 0]
        unit += ", at the token where it is largest"

    # As in `map_of`: white is no effect.
    most = float(np.abs(values).max()) or 1.0
    with style.context():
        size = (max(0.22 * values.shape[1], 3.0), max(0.16 * len(layers), 0.9))
        figure, axes = style.frame_figure(size, title, unit, caption, (0.75, 1.05, 0.75, 0.5))
        image = axes.imshow(values, cmap=DIVERGING, vmin=-most, vmax=most, aspect="auto", origin="lower")
        axes.set(ylabel="layer", xlabel="head")
        for axis, names in ((axes.xaxis, range(values.shape[1])), (axes.yaxis, layers)):
            step = max(1, round(len(names) / 10))
            axis.set_ticks(range(0, len(names), step), [str(names[i]) for i in range(0, len(names), step)])
        axes.tick_params(length=0)
        style.colour_bar(figure, axes, image)
    if path is not None:
        style.save(figure, path)
    return figure


def ablation_bars(
    loss: pd.DataFrame, title: str = "Loss without the structure of increments", caption: str = "",
    path: str | Path | None = None, *, unit: str = "nats per token",
) -> Figure:  # fmt: skip
    """Draw the change of loss by ablation, a group of bars for each layer and for all together, with intervals.

    Args:
        loss: `Ablations.loss`.
        title, caption: above and below.
        path: where to write the figure as well, as .png, .svg or .pdf.
        unit: of the losses.

    Raises:
        PositionsError: a path that cannot be written.

    >>> ablations = lp.causal.ablation_table(model, texts, layers=0, to=["mean"])
    >>> figure = lp.viz.ablation_bars(ablations.loss, path=folder / "ablations.svg")
    >>> figure.axes[0].get_ylabel()
    'change of loss, nats per token'
    """
    groups, kinds = list(dict.fromkeys(loss["layer"])), list(dict.fromkeys(loss["to"]))
    with style.context():
        wide, high = max(0.55 * len(groups) * max(len(kinds), 2) / 2, 3.4), 2.4
        figure, axes = style.frame_figure((wide, high), title, "", caption, (0.9, 0.3, 0.75, 0.45))
        for i, kind in enumerate(kinds):
            rows = loss[loss["to"] == kind].set_index("layer").loc[groups]

            # The bars of a group stand side by side, around its mark.
            places = np.arange(len(groups)) + (i - (len(kinds) - 1) / 2) * 0.8 / len(kinds)

            # matplotlib wants the lengths of error bars, down and up from the value.
            errors = np.abs(rows[["low", "high"]].to_numpy().T - rows["change"].to_numpy())
            axes.bar(
                places, rows["change"], 0.76 / len(kinds), yerr=None if np.isnan(errors).any() else errors,
                color=INTERVENTION_COLOURS.get(kind, style.FAINT), ecolor=style.INK, capsize=1.5,
                error_kw={"linewidth": 0.7}, label=ABLATION_LABELS.get(kind, f"to {kind}"),
            )  # fmt: skip
        axes.axhline(0, color=style.FAINT, linewidth=0.8, zorder=0)
        axes.set_xticks(range(len(groups)), [str(g) if g == "all" else f"layer {g}" for g in groups])

        # "layer 12" and its neighbours would run into one another.
        if len(groups) > 12:
            axes.set_xticks(range(len(groups)), [str(g) for g in groups])
        axes.set_ylabel(f"change of loss, {unit}")
        axes.tick_params(axis="x", length=0)
        axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    if path is not None:
        style.save(figure, path)
    return figure
