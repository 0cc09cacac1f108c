"""The commands that train: `lens-positions train --preset quick --output runs/quick`, and the others.

A command imports what it runs on when it runs: help and refusals need no torch.
"""

import argparse
import sys
from pathlib import Path

import tyro

from ..errors import PositionsError
from ..exits import exit_status
from .config import GraftConfig, TrainConfig, load_preset, preset_names, update_config
from .options import CorpusConfig, PackConfig

TRAIN = """Train a model with position streams from fresh weights.

--preset NAME (%s) sets the fields below; every one can be given on top of it.
--output DIR is the folder of the run (default: runs/NAME); --resume DIR goes on with an interrupted one.
--cache DIR keeps tokenised corpora (default: .cache).
The preset quick takes about three minutes on two cores; how long a run takes is shown while it trains.
"""

GRAFT = """Learn position streams on a pretrained model, and compare it with the same model without them.

--output DIR is the folder (default: runs/graft); --resume DIR goes on with an interrupted one.
--cache DIR keeps tokenised corpora (default: .cache).
The defaults (300 steps on SmolLM2-135M) take about half an hour on two cores; what is left is shown while it trains.
"""

RESUME = """usage: lens-positions resume RUN

Go on with a training run or a graft that was interrupted. How long what is left takes is shown while it trains."""

CORPUS = """Download a corpus from its sources. What is there already is kept, so the same command goes on.

bilingual-large takes some minutes: 7 git repositories are fetched, and their text is freed of repetitions.
"""

PACK = """Pack the project, tokenised corpora and the wheels that a PyTorch image lacks into one folder.

Takes about a minute with the corpus bilingual, most of it for the wheels to arrive.
"""

FORMER_COMMANDS = {name: name for name in ("suite", "measure", "maximum", "gather", "results", "ship")} | {
    "machinery": "rope"
}
"""Commands of the study, which were commands of training once."""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status, as `lens_positions.exits` has them."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {
        "train": train_command,
        "graft": graft_command,
        "resume": resume_command,
        "corpus": corpus_command,
        "pack": pack_command,
    }
    if argv and argv[0] in FORMER_COMMANDS:  # names of before
        from ..cli import main as lens_positions

        return lens_positions(["experiments", FORMER_COMMANDS[argv[0]], *argv[1:]])

    def run() -> int:
        if not argv or argv[0] not in commands:
            given = f"{argv[0]!r} is no command" if argv else "no command was given"
            raise PositionsError(f"{given}; expected: lens-positions {', '.join(commands)} [--help]")
        return commands[argv[0]](argv[1:])

    return exit_status("lens-positions", run)


def train_command(argv: list[str]) -> int:
    """Train from a preset and overrides, or resume a run."""
    config, own = parse(argv)

    from accelerate import PartialState

    from .loop import train

    run = own.resume or own.output or Path("runs") / own.preset
    final = train(config, run, resume=own.resume is not None, cache_dir=own.cache)
    if PartialState().is_main_process:
        print(f"held-out loss {final['heldout_nats_per_byte']:.4f} nats per byte; the model is in {run / 'model'}")
    return 0


def resume_command(argv: list[str]) -> int:
    """Go on with an interrupted run, whichever kind it is."""
    if argv in (["--help"], ["-h"]):
        print(RESUME)
        return 0
    if len(argv) != 1 or argv[0].startswith("-"):
        raise PositionsError(f"resume got {' '.join(argv) or 'nothing'}; expected the folder of one run.")

    from .graft import PARTS

    is_graft = (Path(argv[0]) / PARTS[0]).is_dir()
    return (graft_command if is_graft else train_command)(["--resume", argv[0]])


def graft_command(argv: list[str]) -> int:
    """Graft a source onto a pretrained model beside its baseline, or resume it."""
    config, own = parse_graft(argv)

    from accelerate import PartialState

    from .graft import graft

    folder = own.resume or own.output or Path("runs/graft")
    found = graft(config, folder, resume=own.resume is not None, cache_dir=own.cache)
    if PartialState().is_main_process:
        (graft_name, ours), (_, theirs), (_, difference), *_ = found.items()
        low, high = difference["low"], difference["high"]
        interval = "" if low is None else f" ({low:+.4f} to {high:+.4f})"
        unit = graft_name.removeprefix("graft_").replace("_", " ")
        print(
            f"held-out loss {ours:.4f} {unit} against {theirs:.4f} of the baseline, difference "
            f"{difference['mean']:+.4f}{interval}, the mean of {difference['documents']} documents (95% t interval); "
            f"the graft is in {folder / 'graft' / 'model'}"
        )
    return 0


def corpus_command(argv: list[str]) -> int:
    """Download the sources of a corpus and cut them into documents."""
    options = tyro.cli(CorpusConfig, prog="lens-positions corpus", description=CORPUS, args=argv)

    from .. import corpora, large_corpus

    large_corpus.build(options.output, corpora.load("bilingual")["heldout"]["text"])
    print(f"the corpus is in {options.output}; --corpus {options.name} reads it")
    return 0


def pack_command(argv: list[str]) -> int:
    """Make a folder to train from where there is no network."""
    config = tyro.cli(PackConfig, prog="lens-positions pack", description=PACK, args=argv)

    from .pack import pack, print_packed

    print_packed(pack(config), config.output)
    return 0


def parse(argv: list[str]) -> tuple[TrainConfig, argparse.Namespace]:
    """The configuration that the words of a command line ask for, and the folders they name.

    Raises:
        PositionsError: an unknown preset, or a folder without a run to resume.
        SystemExit: an unknown field or a value of the wrong kind.
    """
    parser = _folders("train")
    parser.add_argument("--preset", default="quick")
    own, rest = parser.parse_known_args(argv)
    if own.resume is None:
        description = TRAIN % ", ".join(preset_names())
        preset = load_preset(own.preset)
        return tyro.cli(TrainConfig, prog=parser.prog, description=description, default=preset, args=rest), own
    _refuse_more(own, rest)
    return update_config(TrainConfig(), _saved_config(own.resume), str(own.resume)), own


def parse_graft(argv: list[str]) -> tuple[GraftConfig, argparse.Namespace]:
    """As `parse`, for a graft."""
    parser = _folders("graft")
    own, rest = parser.parse_known_args(argv)
    if own.resume is None:
        return tyro.cli(GraftConfig, prog=parser.prog, description=GRAFT, args=rest), own
    _refuse_more(own, rest)

    from .graft import PARTS

    part = own.resume / PARTS[0]
    return update_config(GraftConfig(), _saved_config(part), str(part)), own


def _folders(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"lens-positions {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    return parser


def _refuse_more(own: argparse.Namespace, rest: list[str]) -> None:
    if rest or own.output is not None:
        given = " ".join(rest) or "--output"
        raise PositionsError(f"--resume was given with {given}; expected the run's folder alone.")


def _saved_config(run: Path) -> dict[str, object]:
    from .checkpoints import newest_checkpoint, read_description

    newest_checkpoint(run)  # where there is no run, that is what to say
    return read_description(run)["config"]
