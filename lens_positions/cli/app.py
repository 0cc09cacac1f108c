"""The command itself, and what all of its parts check and say alike."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import tyro
from rich.console import Console

from .. import exits
from ..errors import PositionsError
from ..exits import exit_status
from ..hooked import HookedPositionTransformer
from ..terminal import print_line
from ..viz import style

DESCRIPTION = "What a model's increments are and what they cause, in a terminal."

app = tyro.extras.SubcommandApp()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (None: the process's own) and return its exit status, as in `exits`."""

    def run() -> int:
        try:
            app.cli(prog="lens-positions", description=DESCRIPTION, args=argv)
        except SystemExit as exit:  # tyro has printed its help or its complaint
            return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        return 0

    return exit_status("lens-positions", run)


def check_text(text: str) -> None:
    """Refuse a text that is empty or that UTF-8 cannot hold."""
    if not text:
        raise PositionsError("the text is empty; expected at least one character.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise PositionsError(
            f"the text has the lone surrogate U+{code:04X}; expected text that UTF-8 can hold."
        ) from error


def check_outputs(csv: Path | None, figure: Path | None) -> None:
    """Refuse, before any work, files that could not be written after it."""
    if csv is not None and (csv.is_dir() or not csv.parent.is_dir()):
        wrong = f"{csv} is a folder" if csv.is_dir() else f"there is no folder {csv.parent} for {csv.name}"
        raise PositionsError(f"{wrong}; expected the name of a file in an existing folder.")
    if figure is not None:
        style.check_path(figure)


def check_learned(model: HookedPositionTransformer, so: str, expected: str) -> None:
    """Refuse a model whose increments are all 1.0."""
    if model.position_config.source == "static":
        raise PositionsError(f"every increment of {model.name} is 1.0 (source static), so {so}; expected {expected}.")


def complain(sentence: str) -> None:
    """Say on standard error, in one line, what went wrong or was left out."""
    exits.complain("lens-positions", sentence)


@contextmanager
def drawn(console: Console, figure: Path) -> Iterator[None]:
    """Say where the figure is that is drawn inside, or that there is none for want of a font."""
    try:
        yield
    except style.MissingFontError as error:
        complain(f"no figure was drawn: {error}")
    else:
        print_line(console, f"figure: {figure}")


def write_table(table: pd.DataFrame, csv: Path) -> None:
    """Write a table; what was there stays until the new one is whole."""
    style.write_whole(csv, table.to_csv(index=False).encode("utf-8", "backslashreplace"), "table")
