"""One look for every figure: colours, type, and the fonts that can draw a given text.

Colours are from the Okabe-Ito palette, which stays distinct in colour-blind vision. Latin text is set in DejaVu Sans,
which matplotlib ships; Chinese needs a font of the system's, found by name or among the files of its font folders.
"""

import hashlib
import re
import textwrap
from functools import cache
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib import font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import LogFormatter

from ..measure.kinds import is_chinese_punctuation, is_han
from .output import SUBSTITUTE, MissingFontError, check_path, visible_text, write_whole

INK = "#1d2129"
FAINT = "#c9ced6"
QUIET = "#646c7a"
ORANGE = "#d55e00"
BLUE = "#0072b2"
SKY = "#56b4e9"

PAGE_COLOURS = {INK: "ink", FAINT: "faint", QUIET: "quiet", ORANGE: "orange", BLUE: "blue"}
"""The names that these colours have in a page, where each has a light and a dark one."""

RC: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelsize": 8,
    "axes.labelsize": 8,
    "figure.facecolor": "white",
    "savefig.dpi": 200,
    "svg.hashsalt": "lens-positions",
}
CHINESE_FAMILIES = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Noto Sans CJK",
    "Source Han Sans SC",
    "Source Han Sans",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "PingFang",
    "Hiragino Sans GB",
    "Heiti",
    "Microsoft YaHei",
    "SimHei",
    "Droid Sans Fallback",
    "Noto Serif CJK",
    "SimSun",
)
CHINESE_FILES = (
    "cjk",
    "notosanssc",
    "sourcehan",
    "wqy",
    "pingfang",
    "heiti",
    "hiragino",
    "msyh",
    "simhei",
    "droidsansfallback",
)


def context() -> Any:
    """A context manager in which matplotlib draws in this project's style."""
    return rc_context(RC)


def fonts_for(text: str) -> list[FontProperties]:
    """The fonts that may draw a text, in order of preference.

    Raises:
        MissingFontError: the text has Chinese characters and no font for them is installed.
    """
    chinese = _chinese_font()
    if chinese is None and any(is_han(c) or is_chinese_punctuation(c) for c in text):
        raise MissingFontError(
            "the text has Chinese characters and no font that can draw them was found; "
            "install the Debian package fonts-wqy-zenhei or fonts-noto-cjk."
        )
    latin = FontProperties(family=["DejaVu Sans"])

    # Names of files vary by distribution and version; what they have in common is a part of them.
    return [latin, chinese] if chinese else [latin]


def draw_text(text: str, fonts: list[FontProperties]) -> tuple[str, FontProperties]:
    """A text as it is drawn, and the font that draws most of it; what that font lacks becomes a substitute."""
    shown = visible_text(text)

    # One font for the whole text: characters of several would not stand on one line.
    font = max(fonts, key=lambda candidate: sum(ord(c) in _code_points(candidate) for c in shown))
    return "".join(c if ord(c) in _code_points(font) else SUBSTITUTE for c in shown), font


class Drawing(Figure):
    """A figure that a notebook shows as it stands, whether pyplot is in use or not."""

    def _repr_png_(self) -> bytes:
        return render_figure(self, "png", dpi=110)


def frame_figure(
    size: tuple[float, float], title: str, subtitle: str, caption: str,
    margins: tuple[float, float, float, float] = (0.75, 0.3, 0.75, 0.35),
) -> tuple[Drawing, Axes]:  # fmt: skip
    """A figure with its title above and its caption below, as they are: no formulas; and axes between them.

    Args:
        size: of the axes, wide and high, in inches.
        title, subtitle: above.
        caption: below, wrapped.
        margins: left, right, above and below the axes, in inches; the caption's lines come on top of the last.
    """
    left, right, top, below = margins

    # Sizes are given for the axes, so that figures with longer captions keep their drawing.
    width = left + size[0] + right
    lines = textwrap.wrap(caption, width=int(width * 15))
    bottom = below + 0.15 * len(lines)
    height = bottom + size[1] + top

    # Parts of a figure are placed in shares of it, and thought of in inches.
    figure = Drawing(figsize=(width, height))
    axes = figure.add_axes((left / width, bottom / height, size[0] / width, size[1] / height))
    places: list[tuple[float, str, dict[str, Any]]] = [
        (1 - 0.15 / height, title, {"fontsize": 12, "fontweight": "bold", "va": "top"}),
        (1 - 0.4 / height, subtitle, {"fontsize": 9, "color": QUIET, "va": "top"}),
        (0.1 / height, "\n".join(lines), {"fontsize": 8, "color": QUIET, "linespacing": 1.35}),
    ]
    for y, text, look in places:
        figure.text(0.15 / width, y, text, parse_math=False, **look)
    return figure, axes


class _PlainLogFormatter(LogFormatter):
    """The same marks, but 4 and not 4 × 10⁰, 0.6 and not 6e-01."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def colour_bar(figure: Figure, axes: Axes, image: Any) -> None:
    """The scale of an image, at the right of its axes."""
    frame = axes.get_position()
    width = figure.get_size_inches()[0]
    bar = figure.add_axes((frame.x1 + 0.15 / width, frame.y0, 0.12 / width, frame.height))
    scale = figure.colorbar(image, cax=bar)
    scale.outline.set_visible(False)
    if isinstance(image.norm, LogNorm):
        scale.formatter = scale.minorformatter = _PlainLogFormatter(minor_thresholds=(2, 0.5))
    bar.tick_params(length=0)


def render_figure(figure: Figure, kind: str, dpi: float = RC["savefig.dpi"]) -> bytes:
    """A figure as the content of a png, svg or pdf file, the same at every time."""
    # Without the date, the same figure is the same file.
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": None}
    content = BytesIO()
    with context():
        figure.savefig(content, format=kind, metadata=undated[kind], dpi=dpi)
    return content.getvalue()


def page_svg(figure: Figure, label: str) -> str:
    """A figure as an element of a page, cropped to what is drawn, in the colours of the page (`web/views.css`).

    Its ink and its marks follow the page from light to dark; the cells of a map keep theirs, which mean something.

    Args:
        figure: in the colours of this module, without a ground of its own.
        label: what it shows, for who does not see it.
    """
    content = BytesIO()
    with context():
        figure.savefig(content, format="svg", metadata={"Date": None}, bbox_inches="tight", transparent=True)
    svg = content.getvalue().decode("utf-8")

    # Without the XML declaration, which may only stand at the beginning of a document.
    svg = svg[svg.index("<svg") :]
    for colour, variable in PAGE_COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")

    # Identifiers are a figure's own, and a page has several figures.
    mark = hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>f{mark}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, SVG or PDF, by the suffix of the path; what was there stays until the new one is whole.

    Raises:
        PositionsError: another suffix, or a place that cannot be written.
    """
    path = Path(path)
    check_path(path)
    write_whole(path, render_figure(figure, path.suffix[1:].lower()), "figure")


def _chinese_font() -> FontProperties | None:
    """The best installed font for Chinese; one installed since matplotlib made its list is found too."""
    font = _listed_chinese_font()
    if font is None:
        # matplotlib keeps its list of fonts from the first time that it ran.
        for file in _unlisted_chinese_files():
            font_manager.fontManager.addfont(file)
        font = _listed_chinese_font()
    return font


def _listed_chinese_font() -> FontProperties | None:
    fonts = sorted(font_manager.fontManager.ttflist, key=lambda f: (f.name, f.style != "normal", abs(_weight(f) - 400)))
    font = next((f for family in CHINESE_FAMILIES for f in fonts if f.name.startswith(family)), None)
    # The weight is asked for as it is: matplotlib warns where a family lacks the normal one.
    return FontProperties(family=[font.name], weight=_weight(font)) if font else None


def _weight(font: font_manager.FontEntry) -> int:
    return font.weight if isinstance(font.weight, int) else font_manager.weight_dict[font.weight]


def _unlisted_chinese_files() -> list[str]:
    listed = {font.fname for font in font_manager.fontManager.ttflist}
    return [
        file
        for file in font_manager.findSystemFonts()
        if file not in listed and any(part in Path(file).name.lower().replace("-", "") for part in CHINESE_FILES)
    ]


@cache
def _code_points(font: FontProperties) -> frozenset[int]:
    return frozenset(font_manager.get_font(font_manager.findfont(font)).get_charmap())
