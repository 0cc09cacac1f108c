"""The command itself, and what all of its parts check and say alike.

What a command runs on is imported when it runs: through `lp`, or inside it. Help and refusals need no torch.
"""

import inspect
import sys
import textwrap
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
from ..exits import command_outcome
from ..progress import say_durations
from ..terminal import print_line
from ..viz import output as viz_output

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

DESCRIPTION = "How far apart a model puts its tokens, and what that causes."

PROGRAM = "lens-positions"

TRAINING = {
    "train": "Train a model with position streams from fresh weights, on any text.",
    "graft": "Learn position streams on a pretrained model, beside the same model without them.",
    "resume": "Go on with a training run or a graft that was interrupted.",
    "corpus": "Download a corpus by its recipe.",
    "pack": "Make one folder to train from where there is no network.",
}
STUDY = {"experiments": "The study of the repository: suites of runs, measurements of them, findings."}

GROUPS = {
    "Look at increments": ("show", "explore", "extremes", "report"),
    "Ask what they cause": ("gaps", "patch", "ablate"),
    "Map a corpus": ("map", "summarise"),
    "Measure them on held-out text": ("kinds", "boundaries", "names", "heads", "saturation", "specialisation"),
    "Ask how a model uses RoPE itself": ("frequencies", "absolute", "dispersion"),
    "Train": tuple(TRAINING),
    "Reproduce": tuple(STUDY),
}
"""The commands by what people do."""

FORMER_NAMES = {"moved": "extremes"}
"""Names that commands had in the version before, which work for this one."""

app = tyro.extras.SubcommandApp()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (None: the process's own) and return its exit status, as in `exits`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in FORMER_NAMES:
        name = FORMER_NAMES[words[0]]
        complain(f"the command {words[0]} is called {name} now; expected {name}, as the old name goes with 0.3.0.")
        words[0] = name

    # Training has a command line of its own, which `python -m training` runs too.
    if words and words[0] in TRAINING:
        from ..training.commands import main as training

        return training(words)
    with command_outcome(PROGRAM) as outcome, say_durations(complain):
        outcome.status = _experiments(words[1:]) if words[:1] == ["experiments"] else _run(words)
    return outcome.status


def _run(words: list[str]) -> int:
    """One of the commands in this package, or the list of all."""
    if not words or words[0] in ("-h", "--help"):
        print(overview(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    try:
        # Without a help text for "which command", tyro reads the source of its own classes for one.
        app.cli(prog=PROGRAM, description=DESCRIPTION, args=words, config=[tyro.conf.arg(help="")])
    except SystemExit as exit:  # tyro has printed its help or its complaint
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    return 0


def _experiments(words: list[str]) -> int:
    """A command of the study, which stands in the repository and not in the package."""
    # An installed command does not look in the current folder by itself.
    here = str(Path.cwd())
    if Path("experiments/commands.py").is_file() and here not in sys.path:
        sys.path.insert(0, here)
    try:
        from experiments.commands import main as experiments
    except ModuleNotFoundError as error:
        # A package that the study needs and that is missing is another error than a missing checkout.
        if error.name not in ("experiments", "experiments.commands"):
            raise
        raise PositionsError(
            "the experiments are not here; expected a checkout of the lens-positions repository as the current folder."
        ) from error
    return experiments(words)


def overview() -> str:
    """What `lens-positions --help` prints: every command with one line, by what people do."""
    from .. import cli

    lines = [f"usage: {PROGRAM} COMMAND [--help]", "", DESCRIPTION]
    for group, names in GROUPS.items():
        lines += ["", group]
        for name in names:
            said = TRAINING.get(name) or STUDY.get(name) or inspect.getdoc(getattr(cli, name)) or ""

            # The first paragraph of a docstring, which may run over two lines of the source.
            first = said.split("\n\n")[0].replace("\n", " ").rstrip(".")
            lines += textwrap.wrap(first, 100, initial_indent=f"  {name:16}", subsequent_indent=" " * 18)
    return "\n".join(lines)


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
        viz_output.check_path(figure)


def check_learned(model: "lp.HookedPositionTransformer", so: str, expected: str) -> None:
    """Refuse a model whose increments are all 1.0."""
    if model.position_config.source == "static":
        raise PositionsError(f"every increment of {model.name} is 1.0 (source static), so {so}; expected {expected}.")


def complain(sentence: str) -> None:
    """Say on standard error, in one line, what went wrong or was left out."""
    exits.complain(PROGRAM, sentence)


@contextmanager
def announce_figure(console: "Console", figure: Path) -> Iterator[None]:
    """Say where the figure is that is drawn inside, or that there is none for want of a font."""
    try:
        yield
    except viz_output.MissingFontError as error:
        complain(f"no figure was drawn: {error}")
    else:
        print_line(console, f"figure: {figure}")


def write_table(table: "pd.DataFrame", csv: Path) -> None:
    """Write a table; what was there stays until the new one is whole."""
    viz_output.write_whole(csv, table.to_csv(index=False).encode("utf-8", "backslashreplace"), "table")
