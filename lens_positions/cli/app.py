"""The command itself, and what all of its parts check and say alike.

What a command runs on is imported when it runs: through `lp`, or inside it. Help and refusals need no torch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import FlagCreatePairsOff, arg

import lens_positions as lp

from .. import exits
from ..errors import PositionsError
from ..exits import exit_status
from ..terminal import print_line
from ..viz import plain

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

DESCRIPTION = "What a model's increments are and what they cause, in a terminal."

app = tyro.extras.SubcommandApp()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (None: the process's own) and return its exit status, as in `exits`."""

    def run() -> int:
        try:
            # Without a help text for "which command", tyro reads the source of its own classes for one.
            app.cli(prog="lens-positions", description=DESCRIPTION, args=argv, config=[tyro.conf.arg(help="")])
        except SystemExit as exit:  # tyro has printed its help or its complaint
            return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        return 0

    return exit_status("lens-positions", run)


@dataclass(frozen=True)
class BosFlags:
    """Whether texts get the beginning-of-sequence token; with neither flag as in TransformerLens."""

    bos: Annotated[bool, FlagCreatePairsOff, arg(help="put the beginning-of-sequence token in front of texts.")] = False
    no_bos: Annotated[bool, FlagCreatePairsOff, arg(help="leave it out; by default as in TransformerLens.")] = False

    def prepend(self) -> bool | None:
        """What functions take as `prepend_bos`."""
        if self.bos and self.no_bos:
            raise PositionsError("--bos and --no-bos were given; expected one of them, or none.")
        return True if self.bos else False if self.no_bos else None


Bos = Annotated[BosFlags, arg(name="")]
BOS_OF_MODEL = BosFlags()


def check_outputs(csv: Path | None, figure: Path | None) -> None:
    """Refuse, before any work, files that could not be written after it."""
    if csv is not None and (csv.is_dir() or not csv.parent.is_dir()):
        wrong = f"{csv} is a folder" if csv.is_dir() else f"there is no folder {csv.parent} for {csv.name}"
        raise PositionsError(f"{wrong}; expected the name of a file in an existing folder.")
    if figure is not None:
        plain.check_path(figure)


def check_learned(model: "lp.HookedPositionTransformer", so: str, expected: str) -> None:
    """Refuse a model whose increments are all 1.0."""
    if model.position_config.source == "static":
        raise PositionsError(f"every increment of {model.name} is 1.0 (source static), so {so}; expected {expected}.")


def complain(sentence: str) -> None:
    """Say on standard error, in one line, what went wrong or was left out."""
    exits.complain("lens-positions", sentence)


@contextmanager
def drawn(console: "Console", figure: Path) -> Iterator[None]:
    """Say where the figure is that is drawn inside, or that there is none for want of a font."""
    try:
        yield
    except plain.MissingFontError as error:
        complain(f"no figure was drawn: {error}")
    else:
        print_line(console, f"figure: {figure}")


def write_table(table: "pd.DataFrame", csv: Path) -> None:
    """Write a table; what was there stays until the new one is whole."""
    plain.write_whole(csv, table.to_csv(index=False).encode("utf-8", "backslashreplace"), "table")
