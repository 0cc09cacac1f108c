"""The command line of training: `python -m training train --preset quick --output runs/quick`, or another command.

A command imports what it runs on when it runs: help and refusals need no torch.
"""

import argparse
import sys
from pathlib import Path

import tyro

from lens_positions.errors import PositionsError
from lens_positions.exits import exit_status

from .config import GraftConfig, TrainConfig, load_preset, preset_names, updated
from .options import (
    MEASURED,
    OF_ROPE,
    ROPE_VARIANTS,
    SHIPPED,
    VARIANTS,
    CorpusConfig,
    MachineryConfig,
    MaximumConfig,
    MeasureConfig,
    PackConfig,
    ResultsConfig,
    ShipConfig,
    SuiteConfig,
)

TRAIN = """Train a model with position streams from fresh weights.

--preset NAME (%s) sets the fields below; every one can be given on top of it.
--output DIR is the folder of the run (default: runs/NAME); --resume DIR goes on with an interrupted one.
--cache DIR keeps tokenised corpora (default: .cache).
"""

GRAFT = """Learn position streams on a pretrained model, and compare it with the same model without them.

--output DIR is the folder (default: runs/graft); --resume DIR goes on with an interrupted one.
--cache DIR keeps tokenised corpora (default: .cache).
"""

SUITE = """Train every variant of increments at several seeds with the same data, and compare their losses.

The variants are %s; and, of RoPE itself,
%s. Runs that are finished are kept, interrupted ones go on, and several of these commands may share
the work of one folder. The presets are %s.
"""

SHIP = """Put finished, scored runs of a suite into the package in half precision, each with a card of what it is.

The models are %s.
"""


MEASURE = """Measure the increments of the runs that a suite has finished, and keep the tables beside their scores.

The measurements are %s. What is measured already is left as it is.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status, as `lens_positions.exits` has them."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {
        "train": train_command,
        "graft": graft_command,
        "suite": suite_command,
        "measure": measure_command,
        "results": results_command,
        "ship": ship_command,
        "machinery": machinery_command,
        "maximum": maximum_command,
        "corpus": corpus_command,
        "pack": pack_command,
    }

    def run() -> int:
        if not argv or argv[0] not in commands:
            given = f"{argv[0]!r} is no command" if argv else "no command was given"
            raise PositionsError(f"{given}; expected: python -m training {', '.join(commands)} [--help]")
        return commands[argv[0]](argv[1:])

    return exit_status("training", run)


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


def suite_command(argv: list[str]) -> int:
    """Train, score and compare what is left of a suite."""
    description = SUITE % (", ".join(VARIANTS), ", ".join(ROPE_VARIANTS), ", ".join(preset_names()))
    config = tyro.cli(SuiteConfig, prog="python -m training suite", description=description, args=argv)

    from .suite import suite

    try:
        suite(config)
    except KeyboardInterrupt as interruption:
        sentence = "the suite was interrupted; the same command again goes on from there"
        raise type(interruption)(sentence) from interruption
    return 0


def measure_command(argv: list[str]) -> int:
    """Measure what is left of a suite's runs."""
    description = MEASURE % ", ".join(MEASURED)
    config = tyro.cli(MeasureConfig, prog="python -m training measure", description=description, args=argv)

    from .measure import measure

    names = measure(config)
    print(f"measured: {', '.join(names) or 'nothing, as no weights are here'}")
    return 0


def results_command(argv: list[str]) -> int:
    """Write RESULTS.md from the files of results."""
    description = "Write RESULTS.md and its figures from the files of results alone."
    config = tyro.cli(ResultsConfig, prog="python -m training results", description=description, args=argv)

    from .results import write_results

    print(write_results(config))
    return 0


def machinery_command(argv: list[str]) -> int:
    """Measure how models use RoPE itself."""
    description = f"Frequencies, absolute position and dispersion: {', '.join(OF_ROPE)}. What is measured is left."
    config = tyro.cli(MachineryConfig, prog="python -m training machinery", description=description, args=argv)

    from .machinery import machinery

    print(f"measured: {', '.join(machinery(config))}")
    return 0


def maximum_command(argv: list[str]) -> int:
    """Train the maximum-retrieval task and print its accuracy by number of items."""
    description = "Which class has the largest of n items? Trained on 5 to 16, tested on more, by Veličković et al."
    config = tyro.cli(MaximumConfig, prog="python -m training maximum", description=description, args=argv)

    from .maximum import maximum, print_accuracies

    print_accuracies(maximum(config))
    return 0


def corpus_command(argv: list[str]) -> int:
    """Download the sources of a corpus and cut them into documents."""
    description = "Download a corpus from its sources. What is there already is kept, so the same command goes on."
    asked = tyro.cli(CorpusConfig, prog="python -m training corpus", description=description, args=argv)

    from lens_positions import corpora, large_corpus

    large_corpus.build(asked.output, corpora.load("bilingual")["heldout"]["text"])
    print(f"the corpus is in {asked.output}; --corpus {asked.name} reads it")
    return 0


def ship_command(argv: list[str]) -> int:
    """Ship three runs of a suite."""
    asked = tyro.cli(ShipConfig, prog="python -m training ship", description=SHIP % ", ".join(SHIPPED), args=argv)

    from .ship import ship

    for name, table in ship(asked).items():
        length, loss = table[["length", "loss"]].iloc[0]
        print(f"{name}: {loss:.4f} nats per byte at {length:.0f} tokens; the model is in {asked.output / name}")
    return 0


def pack_command(argv: list[str]) -> int:
    """Make a folder to train from where there is no network."""
    description = "Pack the project, tokenised corpora and the wheels that a PyTorch image lacks into one folder."
    config = tyro.cli(PackConfig, prog="python -m training pack", description=description, args=argv)

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
    return updated(TrainConfig(), _saved_config(own.resume), str(own.resume)), own


def parse_graft(argv: list[str]) -> tuple[GraftConfig, argparse.Namespace]:
    """As `parse`, for a graft."""
    parser = _folders("graft")
    own, rest = parser.parse_known_args(argv)
    if own.resume is None:
        return tyro.cli(GraftConfig, prog=parser.prog, description=GRAFT, args=rest), own
    _refuse_more(own, rest)

    from .graft import PARTS

    part = own.resume / PARTS[0]
    return updated(GraftConfig(), _saved_config(part), str(part)), own


def _folders(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m training {command}", add_help=False, allow_abbrev=False)
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
