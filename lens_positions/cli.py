"""The `lens-positions` command: what a model's increments are, in a terminal.

Standard output holds what was asked for; whatever went wrong is one sentence on standard error, with exit status 2.
Colour says again what the printed numbers say, and is left out for a pipe, a dumb terminal or NO_COLOR.
"""

import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from jaxtyping import Float
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text
from torch import Tensor
from tyro.conf import Positional, arg

from . import corpora
from .analysis.categories import increments_by_category
from .analysis.moved import vocabulary, what_moved
from .analysis.reading import read
from .errors import PositionsError
from .hooked import HookedPositionTransformer
from .viz import style
from .viz.spacing import layers_to_show, spacing

LABEL_WIDTH = 17
"""The longest token label, in terminal cells; longer ones are cut."""

app = tyro.extras.SubcommandApp()


@app.command
def show(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    text: Annotated[Positional[str], arg(metavar="TEXT")],
    layers: Annotated[tuple[int, ...], arg(metavar="LAYER ...")] = (),
    table: bool = True,
    figure: Annotated[Path | None, arg(metavar="FILE")] = None,
) -> None:
    """Show how far apart a model puts the tokens of a text.

    Args:
        model: a folder, the name of a shipped model, or a model of the hub.
        text: the text to show; put -- before a text that begins with a dash.
        layers: the layers to show; all of them if none is named.
        table: print the increments by kind of token as well.
        figure: draw the characters at their learned positions, as .png, .svg or .pdf.
    """
    _check_text(text)
    if figure is not None:
        style.check_path(figure)
    loaded = HookedPositionTransformer.from_pretrained(model)
    increments = loaded.increments(text)[:, 0]
    if increments.ndim == 3:
        increments = increments.mean(dim=-1)
    rows = layers_to_show(loaded, layers or None, increments)
    # Entry 0 stands before the text; with gap "after", it is the last increment that moves no token of the text.
    used = loaded.position_config.effective
    means = {layer: float(increments[layer, used].mean()) for layer in rows}
    console = Console(highlight=False)
    _print_tokens(console, loaded, text, increments, rows, means)
    if table:
        _print_kinds(console, loaded, text, rows, means)
    if figure is not None:
        try:
            spacing(loaded, text, layers=layers or None, path=figure)
        except style.MissingFontError as error:
            _complain(f"no figure was drawn: {error}")
        else:
            _print_line(console, f"figure: {figure}")


@app.command
def moved(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    corpus: str | None = None,
    characters: int = 60_000,
    layers: Annotated[tuple[int, ...], arg(metavar="LAYER ...")] = (),
    top: int = 8,
    csv: Annotated[Path | None, arg(metavar="FILE")] = None,
) -> None:
    """Show which tokens a graft or a trained model puts nearest and farthest, and which kinds of token.

    Args:
        model: a folder, an adapter, the name of a packaged model, or a model of the hub.
        corpus: held-out text to read: english, chinese, bilingual, code, a file or a folder. A shared or frozen
            source needs none: its whole vocabulary is ranked.
        characters: at most so much text, taken evenly from the held-out documents.
        layers: the layers to show; all of them if none is named.
        top: tokens at each end.
        csv: write the tokens shown to this file as well, with all columns.
    """
    if csv is not None and (csv.is_dir() or not csv.parent.is_dir()):
        wrong = f"{csv} is a folder" if csv.is_dir() else f"there is no folder {csv.parent} for {csv.name}"
        raise PositionsError(f"{wrong}; expected the name of a file in an existing folder.")
    loaded = HookedPositionTransformer.from_pretrained(model)
    texts = None if corpus is None else corpora.heldout_excerpts(corpus, characters)
    reading = None if texts is None else read(loaded, texts)
    found = what_moved(loaded, reading, top)
    if texts is None or reading is None:
        of_vocabulary = vocabulary(loaded)
        by_kind = of_vocabulary.groupby("kind", as_index=False).agg(n=("id", "size"), relative=("relative", "mean"))
        by_kind = by_kind.assign(layer=0, relative_low=math.nan, relative_high=math.nan)
        what, mean = f"{len(of_vocabulary):,} token ids, each once", of_vocabulary["increment"].mean()
    else:
        by_kind = increments_by_category(loaded, reading)
        what = f"{sum(map(len, texts)):,} characters of {len(texts)} held-out documents of {corpus}"
        mean = math.nan
    shown = layers or tuple(dict.fromkeys(found["layer"]))
    if missing := set(shown) - set(found["layer"]):
        known = ", ".join(map(str, dict.fromkeys(found["layer"])))
        raise PositionsError(f"layer {min(missing)} is not there; expected some of {known}.")
    console = Console(highlight=False)
    config = loaded.position_config
    _print_line(console, f"{loaded.name}: {config.source} increments, the gap {config.gap} each token; {what}")
    if texts is None:
        _print_line(console, f"mean increment {mean:.3f}; × is an increment divided by that mean\n")
    else:
        _print_line(console, "× is an increment divided by the mean of its layer; by kind with a 95% interval\n")
    for layer in shown:
        if texts is not None or len(shown) > 1:
            _print_line(console, Text(f"layer {layer}", "bold"))
        for end, rows in found[found["layer"] == layer].groupby("end"):
            _print_line(console, f"  {end}")
            for row in rows.to_dict("records"):
                place = row["context"] if "context" in row else f"⟦{row['token']}⟧  {row['kind']}"
                place = "".join(c if c == " " else style.visible(c) for c in place).replace("⟦ ⟧", "⟦␣⟧")
                often = f"  n={row['n']}" if "n" in row else ""
                _print_line(console, f"    ×{row['relative']:.2f}  {row['increment']:.3f}{often}  {place}")
        for row in by_kind[by_kind["layer"] == layer].sort_values("relative").to_dict("records"):
            low, high = row["relative_low"], row["relative_high"]
            interval = "" if math.isnan(low) else f" ({low:.3f} to {high:.3f})"
            _print_line(console, f"  {row['kind']} (n={row['n']:,}): ×{row['relative']:.3f}{interval}")
        console.print()
    if csv is not None:
        found[found["layer"].isin(shown)].to_csv(csv, index=False)
        _print_line(console, f"tokens: {csv}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (None: the process's own) and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app.cli(prog="lens-positions", description=__doc__.splitlines()[0], args=argv)
    except (PositionsError, OSError) as error:
        _complain(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    except SystemExit as exit:  # tyro has printed its help or its complaint
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    return 0


def _check_text(text: str) -> None:
    if not text:
        raise PositionsError("the text is empty; expected at least one character.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise PositionsError(
            f"the text has the lone surrogate U+{code:04X}; expected text that UTF-8 can hold."
        ) from error


def _complain(sentence: str) -> None:
    print(f"lens-positions: {' '.join(sentence.split())}", file=sys.stderr)


def _print_tokens(
    console: Console,
    model: HookedPositionTransformer,
    text: str,
    increments: Float[Tensor, "layer pos"],
    rows: dict[int, str],
    means: dict[int, float],
) -> None:
    """Each token with its increments, a row a layer, in blocks as wide as the terminal."""
    config = model.position_config
    heads = ", mean of the heads" if config.per_head else ""
    _print_line(console, f"{model.name}: {config.source} increments{heads}, the gap {config.gap} each token")
    _print_line(console, "1.00 is one step of standard RoPE; blue: nearer than the layer's mean, orange: farther\n")
    labels = ["".join(map(style.visible, label)) for label in model.to_str_tokens(text)]
    cells = [[_number(value, means[layer]) for value in increments[layer].tolist()] for layer in rows]
    _print_grid(console, list(rows.values()), labels, cells)


def _print_kinds(
    console: Console, model: HookedPositionTransformer, text: str, rows: dict[int, str], means: dict[int, float]
) -> None:
    """The mean and standard deviation of the increments by kind of token, a column a layer."""
    table = increments_by_category(model, model.to_tokens(text))
    _print_line(console, "by kind of token (how many): mean ± standard deviation\n")
    entry_of = {model.position_layers[entry]: entry for entry in rows}
    by_kind = table[table["layer"].isin(list(entry_of))].groupby("kind", sort=False)
    names = [f"{kind} ({of_kind['n'].iloc[0]})" for kind, of_kind in by_kind]
    cells = [
        [
            _number(mean, means[entry_of[layer]]).append(f" ±{std:.2f}", "dim")
            for layer, mean, std in zip(of_kind["layer"], of_kind["mean"], of_kind["std"], strict=True)
        ]
        for _, of_kind in by_kind
    ]
    _print_grid(console, names, list(rows.values()), cells)


def _print_grid(console: Console, rows: list[str], columns: list[str], cells: list[list[Text]]) -> None:
    """Print a table in as many blocks of columns as the width of the terminal asks for."""
    columns = [set_cell_size(c, LABEL_WIDTH - 1) + "…" if cell_len(c) > LABEL_WIDTH else c for c in columns]
    widths = [max(cell_len(c), *(row[i].cell_len for row in cells)) + 1 for i, c in enumerate(columns)]
    margin = max(map(cell_len, rows))
    start = 0
    while start < len(columns):
        stop, room = start + 1, console.width - margin - widths[start]
        while stop < len(columns) and widths[stop] <= room:
            room -= widths[stop]
            stop += 1
        header = "".join(" " * (widths[i] - cell_len(columns[i])) + columns[i] for i in range(start, stop))
        _print_line(console, Text(" " * margin + header, "bold"))
        for name, row in zip(rows, cells, strict=True):
            line = Text(name + " " * (margin - cell_len(name)))
            for i in range(start, stop):
                line.append(" " * (widths[i] - row[i].cell_len)).append_text(row[i])
            _print_line(console, line)
        console.print()
        start = stop


def _print_line(console: Console, line: str | Text) -> None:
    """Print text as it is: no markup, emoji codes or wrapping."""
    console.print(line if isinstance(line, Text) else Text(line), soft_wrap=True)


def _number(increment: float, mean: float) -> Text:
    """An increment, tinted by how it compares with its layer's mean, in steps of a factor of the square root of 2."""
    if mean <= 0:
        return Text(f"{increment:.2f}")
    octaves = math.log2(max(increment / mean, 0.25))
    shade = min(round(abs(octaves) * 2), len(style.FARTHER))
    if shade == 0:
        return Text(f"{increment:.2f}")
    return Text(f"{increment:.2f}", f"black on {(style.FARTHER if octaves > 0 else style.NEARER)[shade - 1]}")
