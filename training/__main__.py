"""The command line of training: `python -m training train --preset quick --output runs/quick`."""

import argparse
import json
import sys
from pathlib import Path

import tyro
from accelerate import PartialState

from lens_positions.errors import PositionsError

from .config import TrainConfig, load_preset, preset_names, updated
from .loop import newest_checkpoint, train

DESCRIPTION = """Train a model with position streams from fresh weights.

--preset NAME (%s) sets the fields below; every one can be given on top of it.
--output DIR is the folder of the run (default: runs/NAME); --resume DIR goes on with an interrupted one.
--cache DIR keeps tokenised corpora (default: .cache).
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 when done, 2 for what a person can mend, 130 when interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] != ["train"]:
            given = f"{argv[0]!r} is no command" if argv else "no command was given"
            raise PositionsError(f"{given}; expected: python -m training train [--preset NAME] [--help]")
        return train_command(argv[1:])
    except (PositionsError, OSError) as error:
        print(f"training: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def train_command(argv: list[str]) -> int:
    """Train from a preset and overrides, or resume a run."""
    config, own = parse(argv)
    run = own.resume or own.output or Path("runs") / own.preset
    final = train(config, run, resume=own.resume is not None, cache_dir=own.cache)
    if PartialState().is_main_process:
        print(f"held-out loss {final['heldout_nats_per_byte']:.4f} nats per byte; the model is in {run / 'model'}")
    return 0


def parse(argv: list[str]) -> tuple[TrainConfig, argparse.Namespace]:
    """The configuration that the words of a command line ask for, and the folders they name.

    Raises:
        PositionsError: an unknown preset, or a folder without a run to resume.
        SystemExit: an unknown field or a value of the wrong kind.
    """
    parser = argparse.ArgumentParser(prog="python -m training train", add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    own, rest = parser.parse_known_args(argv)
    if own.resume is None:
        prog, description = parser.prog, DESCRIPTION % ", ".join(preset_names())
        preset = load_preset(own.preset)
        return tyro.cli(TrainConfig, prog=prog, description=description, default=preset, args=rest), own
    if rest or own.output is not None:
        given = " ".join(rest) or "--output"
        raise PositionsError(f"--resume was given with {given}; expected the run's folder alone.")
    newest_checkpoint(own.resume)
    described = own.resume / "training.json"
    try:
        saved = json.loads(described.read_text("utf-8"))["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise PositionsError(f"{described} is damaged ({error}); expected what the run wrote.") from error
    return updated(TrainConfig(), saved, str(described)), own


if __name__ == "__main__":
    sys.exit(main())
