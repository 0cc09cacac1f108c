"""Views to explore, in a notebook, in a page of their own, or in the report: the same objects everywhere.

- `spacing_view`: characters at their positions; hover or use the arrow keys, switch layers and scale.
- `tokens_view`: circuitsvis' coloured tokens, tinted by increment, one row a layer.
- `attention_view`: attention beside increments. Arcs from a chosen token on a ruler of learned positions, and below it
  the same attention on the ruler of token counts; then circuitsvis' attention heads of the same layer.

A view is data and the page's own script draws it. Whatever a text holds stays text: it is escaped here and is only
ever put into text nodes there. Nothing is fetched: circuitsvis' script comes from the installed package, once a page.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..interventions import Hooks, LayerIndices
from ..model import HookedPositionTransformer
from ..text import Mask, TextOrTokens
from . import style
from .output import check_page, write_whole
from .spacing import Scale, caption_of, is_boundary, rows_of
from .text_positions import (
    MOST_ATTENDING,
    TextPositions,
    before_and_after,
    edits_in_words,
    rows_to_show,
)

LEAST_MEAN = 1e-6
"""A mean increment below this is none to divide by."""

MOST_UNITS = 20_000
"""Characters times rows of an interactive drawing."""


WHEN = ("before the edits", "after the edits")


@dataclass(frozen=True)
class View:
    """A drawing that answers the mouse and the keyboard; Jupyter shows it as it stands.

    Attributes:
        kind: which of the page's views it is.
        title: its heading.
        data: what is drawn.
        cut: what was left out of the text, in a sentence; empty where nothing was.
        beside: another that stands beside it: the same after edits.

    >>> view = lp.viz.spacing_view(model, "The cat")
    >>> view.kind, view.data["units"]
    ('spacing', ['T', 'h', 'e', '␣', 'c', 'a', 't'])
    >>> view.save(folder / "spacing.html")
    """

    kind: Literal["spacing", "tokens", "attention"]
    title: str
    data: dict[str, Any] = field(repr=False)
    cut: str = ""
    beside: "View | None" = field(default=None, repr=False)

    def fragment(self, title: str | None = None) -> str:
        """Its part of a page, under a title of its own or another, without the scripts that draw it."""
        if self.beside is not None:
            pair = [View(view.kind, view.title, view.data, view.cut) for view in (self, self.beside)]
            titles = [
                view.title if title is None else f"{title} · {when}" for view, when in zip(pair, WHEN, strict=True)
            ]
            both = "".join(view.fragment(name) for view, name in zip(pair, titles, strict=True))
            return f'<div class="lp-beside">{both}</div>'
        # A "<" inside a JSON string would end the script element in which it stands.
        data = json.dumps(self.data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
        return (
            f'<figure class="lp-view" data-view="{self.kind}"><h3>{escape(title or self.title)}</h3>'
            f'<script type="application/json">{data}</script></figure>'
        )

    def page(self) -> str:
        """A page of its own, light as a notebook is, which needs no network."""
        return page_of([self], self.title)

    def save(self, path: str | Path) -> None:
        """Write the page; what was there stays until the new one is whole.

        Raises:
            PositionsError: a place that cannot be written.
        """
        write_page(self.page(), path)

    def _repr_html_(self) -> str:
        """A frame around the page, so that nothing of it meets the notebook's own styles; it takes its own height."""
        return (
            f'<iframe srcdoc="{escape(self.page())}" title="{escape(self.title)}" '
            'style="width:100%;height:420px;border:0"></iframe>'
        )


def spacing_view(
    model: HookedPositionTransformer,
    text: TextOrTokens,
    layers: LayerIndices = None,
    *,
    hooks: Hooks | None = None,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> View:
    """Characters at their learned positions: `characters.spacing` to explore.

    Args:
        model: the model.
        text: what to draw, or its tokens, special ones in front included.
        layers: the layers to draw; None is all of them.
        hooks: edits, whose rows stand below those without them, layer by layer.
        attention_mask, prepend_bos: as for `text_positions.position_text`.

    Raises:
        PositionsError: an empty text, several texts, padding without a mask, or a layer that the model lacks.

    >>> view = lp.viz.spacing_view(model, "The cat")
    >>> view.data["units"]
    ['T', 'h', 'e', '␣', 'c', 'a', 't']
    """
    before, after = before_and_after(model, text, hooks, attention_mask=attention_mask, prepend_bos=prepend_bos)
    shown = rows_to_show(model, layers, before, after, "positions")
    rows = rows_of(before, after, shown, "common")

    # Not where some row's mean is near zero, by which it would be divided.
    relative = all(row.mean_increment > LEAST_MEAN for row in rows)

    # A browser becomes slow with thousands of elements: fewer units where there are more rows.
    n = _drawable_units(before, len(rows))
    ranges = list(zip(before.first[:n], before.last[:n], strict=True))
    increments = [_source(before, after, edited).increments[layer].mean(-1).tolist() for layer, _, edited in shown]

    scales: tuple[Scale, ...] = ("relative", "common")
    data = {
        "units": [style.visible_text(unit) for unit in before.units[:n]],
        "boundary": [is_boundary(unit) for unit in before.units[:n]],
        "relative": relative,
        "rows": [
            {
                "name": row.name,
                "mean": _short(row.mean_increment),
                "first": _short(row.first[:n]),
                "last": _short(row.last[:n]),
                "increments": [_short(of_row[first : last + 1]) for first, last in ranges],
            }
            for row, of_row in zip(rows, increments, strict=True)
        ],
        "caption": {
            scale: " ".join([*caption_of(before, after, rows, scale), before.cut(n)]).strip() for scale in scales
        },
    }
    return View("spacing", "Characters at their learned positions", data, before.cut(n))


def tokens_view(
    model: HookedPositionTransformer,
    text: TextOrTokens,
    layers: LayerIndices = None,
    *,
    hooks: Hooks | None = None,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> View:
    """The tokens of a text tinted by their increments, one row a layer, by circuitsvis.

    A token at its row's mean is white; one whose increment is twice the mean or more is orange, and one without any is
    blue. Rows whose mean is 0 have no tint.

    Args, raises: as `spacing_view`.

    >>> view = lp.viz.tokens_view(model, "The cat")
    >>> view.title, view.kind
    ('Tokens tinted by increment', 'tokens')
    """
    before, after = before_and_after(model, text, hooks, attention_mask=attention_mask, prepend_bos=prepend_bos)
    shown = rows_to_show(model, layers, before, after, "increments")

    # Up to the last token of the last unit that is drawn.
    n = _drawable_units(before, len(shown))
    stop = before.last[n - 1] + 1
    moves = torch.zeros(len(before.tokens), dtype=torch.bool)
    moves[before.config.effective] = True  # the others have no tint
    rows = []
    for layer, name, edited in shown:
        source = _source(before, after, edited)
        increments = source.increments[layer, before.first[0] : stop].mean(-1)
        mean = source.mean_increment(layer)

        # A mean near zero would make every deviation from it enormous.
        tint = increments / mean - 1 if abs(mean) > LEAST_MEAN else torch.zeros_like(increments)
        tint[~moves[before.first[0] : stop]] = 0
        rows.append({"name": name, "mean": _short(mean), "relative": _short(tint.tolist())})
    said = [
        *before.convention(),
        *edits_in_words(after, shown),
        "White: at the row's mean; orange: twice as far or more; blue: no distance at all. Pointing at a token shows "
        "the deviation, as a share of the mean.",
        before.cut(n),
    ]
    data = {
        "labels": [style.visible_text(label) for label in before.labels[before.first[0] : stop]],
        "rows": rows,
        "farther": style.ORANGE,
        "nearer": style.BLUE,
        "caption": " ".join(said).strip(),
    }
    return View("tokens", "Tokens tinted by increment", data, before.cut(n))


def attention_view(
    model: HookedPositionTransformer,
    text: TextOrTokens,
    most: int = MOST_ATTENDING,
    *,
    hooks: Hooks | None = None,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> View:
    """Attention beside increments: arcs on two rulers, and circuitsvis' attention heads.

    Args:
        model: the model.
        text: what to read, or its tokens, special ones in front included.
        most: tokens at most; the text is cut there, and the caption says so.
        hooks: edits; the view without them has the one with them at its side.
        attention_mask, prepend_bos: as for `text_positions.position_text`.

    Raises:
        PositionsError: an empty text, several texts, padding without a mask, or a model that shows no attention
            patterns.

    >>> view = lp.viz.attention_view(model, "The cat")
    >>> view.title, view.kind
    ('Attention beside increments', 'attention')
    """
    how: dict[str, Any] = {"attention_mask": attention_mask, "prepend_bos": prepend_bos}
    before, after = before_and_after(model, text, hooks, patterns=True, most=most, **how)
    if after is None:
        return _attention_of(before, _most_structured(before), [])

    # The view begins where the edits did most, or, if they did nothing here, as it would without them.
    changed = (after.attention() - before.attention()).abs().amax(dim=(1, 2, 3))
    layer = int(changed.argmax()) if bool(changed.any()) else _most_structured(before)
    said = edits_in_words(after)
    if not bool(changed.any()):
        said.append("They change no attention that is drawn here.")
    view = _attention_of(before, layer, [*said, "Here: before them."], WHEN[0])
    return replace(view, beside=_attention_of(after, layer, [*said, "Here: after them."], WHEN[1]))


def _most_structured(text: TextPositions) -> int:
    """The entry of the layer whose increments differ most for their size, which a view begins with."""
    spread = text.increments.std(dim=(1, 2), correction=0) / text.increments.abs().mean(dim=(1, 2)).clamp_min(1e-9)
    return int(spread.argmax())


def _attention_of(text: TextPositions, layer: int, edits: list[str], when: str = "") -> View:
    """The view of a text at its positions, which begins with a layer."""
    patterns = text.attention()
    static = text.config.source == "static"

    said = [
        *text.convention(heads="each head has its own"),
        *edits,
        "Each arc runs from the chosen token to one that it attends to; its width and strength are the "
        "attention, and below 1% none is drawn. Above the line tokens stand at their "
        + ("positions, one step a token unless they are edited" if static else "learned positions")
        + "; below it they are counted. Click a token, or use the arrow keys.",
        text.cut(),
    ]
    data = {
        "labels": [style.visible_text(label) for label in text.labels],
        "rows": [
            {
                "name": f"layer {number}",
                "increments": _short(text.increments[entry].T.tolist()),
                "positions": _short(text.positions[entry].T.tolist()),
            }
            for entry, number in enumerate(text.layers)
        ],
        "heads": patterns.shape[1],
        "patterns": [_pack_patterns(of_layer) for of_layer in patterns],
        "layer": layer,
        "head": 0,
        "static": static,
        "positive": style.BLUE,
        "caption": " ".join(said).strip(),
    }
    return View("attention", "Attention beside increments" + (f", {when}" if when else ""), data, text.cut())


def _source(before: TextPositions, after: TextPositions | None, edited: bool) -> TextPositions:
    return after if after is not None and edited else before


def page_of(views: Sequence[View], title: str) -> str:
    """A page with some views, which needs no network."""
    # circuitsvis is most of a page, and is left out where none of its views is there.
    drawn_by = scripts(circuits=any(view.kind != "spacing" for view in views))
    return (
        '<!doctype html><html lang="en" data-theme="light"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{styles()}</style></head>"
        f'<body class="lp-alone">{"".join(view.fragment() for view in views)}{drawn_by}</body></html>'
    )


@cache
def styles() -> str:
    """The styles of a page with views."""
    return _web("views.css")


def scripts(circuits: bool = True) -> str:
    """The scripts that draw the views of a page, to stand once at its end."""
    texts = [circuitsvis_script()] if circuits else []
    return "".join(f"<script>{text}</script>" for text in [*texts, _web("views.js")])


def write_page(page: str, path: str | Path) -> None:
    """Write a page; what was there stays until the new one is whole.

    Raises:
        PositionsError: a place that cannot be written.
    """
    path = Path(path)
    check_page(path)
    write_whole(path, page.encode("utf-8", "backslashreplace"), "page")


def _drawable_units(text: TextPositions, rows: int) -> int:
    return min(len(text.units), max(1, MOST_UNITS // rows))


def _short(values: Any) -> Any:
    """Numbers with as many digits as a page needs, in lists of any depth."""
    # Seven digits are those of float32.
    return [_short(value) for value in values] if isinstance(values, list) else float(f"{values:.7g}")


def _pack_patterns(patterns: Float[Tensor, "head pos pos"]) -> str:
    """The lower triangles of some heads as whole numbers from 0 to 65535, in base 64: a fifth of their JSON."""
    # Attention is causal: the upper triangle is zeros.
    rows, columns = torch.tril_indices(*patterns.shape[1:]).unbind()
    whole = (patterns[:, rows, columns].clamp(0, 1) * 65535).round().numpy().astype("<u2")
    return base64.b64encode(np.ascontiguousarray(whole).tobytes()).decode("ascii")


@cache
def _web(name: str) -> str:
    return resources.files(__package__).joinpath("web", name).read_text("utf-8")


@cache
def circuitsvis_script() -> str:
    """circuitsvis' own script, as the package ships it, without the address of its source map."""
    # A script inside a page ends at the first "</script", also in a string.
    script = resources.files("circuitsvis").joinpath("dist", "cdn", "iife.js").read_text("utf-8")
    return script.split("//# sourceMappingURL=")[0].replace("</script", "<\\/script")
