"""The explorer's page: one HTML, its styles and its scripts, all from this package; and the still of it.

The browser runs the scripts as modules, as they are. A notebook and a still take one script: the same modules in a row,
without their imports and exports, since every name in them is there once.
"""

import json
import re
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib import resources
from typing import Any

from ...errors import PositionsError
from ..interactive import circuitsvis_script

MODULES = ("dom.js", "rulers.js", "panels.js", "explorer.js")
"""Of the page, each after what it imports."""

FILES = {
    **dict.fromkeys((*MODULES, "start.js"), "text/javascript"),
    "explorer.css": "text/css",
    "circuitsvis.js": "text/javascript",
}
"""What the page asks for, and nothing else is served."""

TEXT = "The cat sat on the mat, and the dog saw it."

IMPORT = re.compile(r"^import .*?;\n", re.MULTILINE | re.DOTALL)
EXPORT = re.compile(r"^export (?=function|const|class)", re.MULTILINE)


@cache
def file(name: str) -> str:
    """One of FILES.

    Raises:
        PositionsError: it is none of them.
    """
    if name not in FILES:
        raise PositionsError(f"the file {name!r:.40} was asked for; expected one of {', '.join(FILES)}.")
    return circuitsvis_script() if name == "circuitsvis.js" else _web(name)


@cache
def script() -> str:
    """All modules as one script, which defines `mount`."""
    return "\n".join(EXPORT.sub("", IMPORT.sub("", _web(name))) for name in MODULES)


def notebook_script() -> str:
    """What makes a widget of `script()`, to stand after it."""
    return _web("notebook.js")


def page(models: Sequence[str], start: dict[str, Any] | None = None) -> str:
    """The page of a server that has some models; `start` is the state where the address has none."""
    options = {"models": list(models), "start": {"model": models[0], "text": TEXT} | (start or {})}
    return _web("explorer.html").replace("OPTIONS", _json(options))


def still(result: dict[str, Any], state: dict[str, Any]) -> str:
    """A page that shows one answer before and after its edits, needs no model and asks for nothing.

    Args:
        result: of `Explorer.run`, with its text.
        state: what it was asked with.
    """
    options = _json({"models": [], "start": state | {"model": result["text"]["model"]}, "still": result})
    title = escape(f"{result['text']['model']}: “{result['text']['text'][:60]}”")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        f'<link rel="icon" href="data:,"><style>{_web("explorer.css")}</style></head><body class="lp-page">'
        '<header class="lp-header"><h1>Tokens before and after edits of their distances</h1></header><main></main>'
        f'<script type="application/json" id="lp-options">{options}</script>'
        f'<script type="module">{script()}\nmount(document.querySelector("main"), null, '
        'JSON.parse(document.getElementById("lp-options").textContent));</script></body></html>'
    )


def _json(data: Any) -> str:
    """JSON for a script element: a "<" inside a string would end it."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


@cache
def _web(name: str) -> str:
    return resources.files(__package__).joinpath("web", name).read_text("utf-8")
