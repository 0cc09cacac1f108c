"""The `lens-positions` command: what a model's increments are and what they cause, in a terminal.

Standard output holds what was asked for; whatever went wrong is one sentence on standard error, with exit status 2.
Colour says again what the printed numbers say, and is left out for a pipe, a dumb terminal or NO_COLOR.
"""

from .app import app, main
from .cause import ablate, gaps, patch
from .look import explore, extremes, report, show
from .map import map, summarise
from .measure import boundaries, heads, kinds, names, saturation, specialisation
from .rope import absolute, dispersion, frequencies

__all__ = [
    "ablate",
    "absolute",
    "app",
    "boundaries",
    "dispersion",
    "explore",
    "extremes",
    "frequencies",
    "gaps",
    "heads",
    "kinds",
    "main",
    "map",
    "names",
    "patch",
    "report",
    "saturation",
    "show",
    "specialisation",
    "summarise",
]
