"""Tables in a terminal: as wide as it is, and coloured where it shows colour."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

FARTHER = ("#fbe3cf", "#f8c49a", "#f2a15f", "#e67f2e")
"""Tints for increments above the mean, from near to far."""
NEARER = ("#d9e8f5", "#acd0eb", "#79b3de", "#4794cc")

LABEL_WIDTH = 18
"""The longest column label, in terminal cells; longer ones are cut."""


def print_grid(console: "Console", rows: list[str], columns: list[str], cells: "list[list[Text]]") -> None:
    """Print a table in as many blocks of columns as the width of the terminal asks for."""
    from rich.cells import cell_len, set_cell_size
    from rich.text import Text

    columns = [set_cell_size(c, LABEL_WIDTH - 1) + "…" if cell_len(c) > LABEL_WIDTH else c for c in columns]
    widths = [max(cell_len(c), *(row[i].cell_len for row in cells)) + 1 for i, c in enumerate(columns)]
    margin = max(map(cell_len, rows))
    start = 0
    while start < len(columns):
        stop, room = start + 1, console.width - margin - widths[start]

        # As many columns as fit beside the row names; at least one, however narrow the terminal.
        while stop < len(columns) and widths[stop] <= room:
            room -= widths[stop]
            stop += 1
        header = "".join(" " * (widths[i] - cell_len(columns[i])) + columns[i] for i in range(start, stop))
        print_line(console, Text(" " * margin + header, "bold"))
        for name, row in zip(rows, cells, strict=True):
            # Widths in terminal cells: a Chinese character takes two.
            line = Text(name + " " * (margin - cell_len(name)))
            for i in range(start, stop):
                line.append(" " * (widths[i] - row[i].cell_len)).append_text(row[i])
            print_line(console, line)
        console.print()
        start = stop


def print_line(console: "Console", line: "str | Text") -> None:
    """Print text as it is: no markup, emoji codes or wrapping."""
    from rich.text import Text

    console.print(line if isinstance(line, Text) else Text(line), soft_wrap=True)


def increment_cell(increment: float, mean: float) -> "Text":
    """An increment, tinted by how it compares with its layer's mean, in steps of a factor of the square root of 2."""
    from rich.text import Text

    if mean <= 0:
        return Text(f"{increment:.2f}")

    # By ratio, so that half and twice the mean are as strong; nothing nearer than a quarter gets a deeper tint.
    octaves = math.log2(max(increment / mean, 0.25))
    shade = min(round(abs(octaves) * 2), len(FARTHER))
    if shade == 0:
        return Text(f"{increment:.2f}")
    return Text(f"{increment:.2f}", f"black on {(FARTHER if octaves > 0 else NEARER)[shade - 1]}")


def effect_cell(effect: float, most: float) -> "Text":
    """An effect with its sign, tinted by its size beside the largest one: orange raises the metric, blue lowers it."""
    from rich.text import Text

    if math.isnan(effect):
        return Text("·")
    digits = 2 if most >= 1 else 3 if most >= 0.1 else 4
    written = f"{effect:+.{digits}f}"
    shade = round(abs(effect) / most * len(FARTHER)) if most else 0
    if shade == 0:
        return Text(written)
    return Text(written, f"black on {(FARTHER if effect > 0 else NEARER)[shade - 1]}")


def with_interval(row: Any, column: str, form: str, ends: str = "") -> str:
    """A value with its interval, if it has one, from the columns low and high, with `ends` before their names."""
    low, high = row[f"{ends}low"], row[f"{ends}high"]
    return f"{row[column]:{form}}" + ("" if math.isnan(low) else f" ({low:{form}} to {high:{form}})")
