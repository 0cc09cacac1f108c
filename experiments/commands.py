"""The commands of the study: `lens-positions experiments suite`, or another, from a checkout of the repository.

A command imports what it runs on when it runs: help and refusals need no torch.
"""

import sys

import tyro

from lens_positions.errors import PositionsError
from lens_positions.exits import exit_status
from lens_positions.training.config import preset_names

from .options import (
    QUESTION_TABLES,
    ROPE_TABLES,
    ROPE_VARIANTS,
    RUN_TABLES,
    SHIPPED,
    VARIANTS,
    GatherConfig,
    MaximumConfig,
    MeasureConfig,
    QuestionsConfig,
    ResultsConfig,
    RopeConfig,
    RowConfig,
    ShipConfig,
    SuiteConfig,
)

SUITE = """Train every variant of increments at several seeds with the same data, and compare their losses.

The variants are %s; and, of RoPE itself,
%s. Runs that are finished are kept, interrupted ones go on, and several of these commands may share
the work of one folder. The presets are %s.
"""

MEASURE = """Measure the increments of the runs that a suite has finished, and keep the tables beside their scores.

The measurements are %s. What is measured already is left as it is.
"""

QUESTIONS = """Answer four questions about increments from the runs of a suite, and write them as a page.

Do word boundaries enter increments with training? What is an increment for? Do gaps before words matter more than other
gaps? Do heads that step farther look back less? The measurements are %s; what is measured already is
left as it is, and where no weights are here the page is written from the tables alone.
"""

SHIP = """Put finished, scored runs of a suite into the package in half precision, each with a card of what it is.

The models are %s.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status, as `lens_positions.exits` has them."""
    argv = sys.argv[1:] if argv is None else argv
    commands = {
        "suite": suite_command,
        "measure": measure_command,
        "rope": rope_command,
        "maximum": maximum_command,
        "gather": gather_command,
        "questions": questions_command,
        "results": results_command,
        "row": row_command,
        "ship": ship_command,
    }

    def run() -> int:
        if argv and argv[0] in ("-h", "--help"):
            print("usage: lens-positions experiments COMMAND [--help]\n")
            print("\n".join(f"  {name:10} {command.__doc__}" for name, command in commands.items()))
            return 0
        if not argv or argv[0] not in commands:
            given = f"{argv[0]!r} is no command" if argv else "no command was given"
            raise PositionsError(f"{given}; expected: lens-positions experiments {', '.join(commands)} [--help]")
        return commands[argv[0]](argv[1:])

    return exit_status("lens-positions", run)


def suite_command(argv: list[str]) -> int:
    """Train, score and compare what is left of a suite."""
    description = SUITE % (", ".join(VARIANTS), ", ".join(ROPE_VARIANTS), ", ".join(preset_names()))
    config = tyro.cli(SuiteConfig, prog="lens-positions experiments suite", description=description, args=argv)

    from .suite import suite

    try:
        suite(config)
    except KeyboardInterrupt as interruption:
        sentence = "the suite was interrupted; the same command again goes on from there"
        raise type(interruption)(sentence) from interruption
    return 0


def measure_command(argv: list[str]) -> int:
    """Measure what is left of a suite's runs."""
    description = MEASURE % ", ".join(RUN_TABLES)
    config = tyro.cli(MeasureConfig, prog="lens-positions experiments measure", description=description, args=argv)

    from .measure import measure

    names = measure(config)
    print(f"measured: {', '.join(names) or 'nothing, as no weights are here'}")
    return 0


def gather_command(argv: list[str]) -> int:
    """Gather the files of suites and measurements into the tidy tables of the repository."""
    description = "Gather what suite, measure, rope and maximum left, file by file, into one table a measurement."
    config = tyro.cli(GatherConfig, prog="lens-positions experiments gather", description=description, args=argv)

    from .gather import gather

    print(f"changed in {config.results}: {', '.join(gather(config)) or 'nothing'}")
    return 0


def results_command(argv: list[str]) -> int:
    """Write RESULTS.md from the tables of results."""
    description = "Write RESULTS.md and its figures from the tables of results alone."
    config = tyro.cli(ResultsConfig, prog="lens-positions experiments results", description=description, args=argv)

    from .results import write_results

    print(write_results(config))
    return 0


def row_command(argv: list[str]) -> int:
    """Compute a row of the table that opens RESULTS.md again, and print it."""
    description = "Compute a row of the table that opens RESULTS.md from the tables of results, and print it."
    config = tyro.cli(RowConfig, prog="lens-positions experiments row", description=description, args=argv)

    from .results import claim_rows

    print("\n".join(claim_rows(config)))
    return 0


def questions_command(argv: list[str]) -> int:
    """Answer the four questions."""
    description = QUESTIONS % ", ".join(QUESTION_TABLES)
    config = tyro.cli(QuestionsConfig, prog="lens-positions experiments questions", description=description, args=argv)

    from .questions import questions

    print(questions(config))
    return 0


def rope_command(argv: list[str]) -> int:
    """Measure how models use RoPE itself."""
    description = f"Frequencies, absolute position and dispersion: {', '.join(ROPE_TABLES)}. What is measured is left."
    config = tyro.cli(RopeConfig, prog="lens-positions experiments rope", description=description, args=argv)

    from .rope_measures import measure_rope

    print(f"measured: {', '.join(measure_rope(config))}")
    return 0


def maximum_command(argv: list[str]) -> int:
    """Train the maximum-retrieval task and print its accuracy by number of items."""
    description = "Which class has the largest of n items? Trained on 5 to 16, tested on more, by Veličković et al."
    config = tyro.cli(MaximumConfig, prog="lens-positions experiments maximum", description=description, args=argv)

    from .maximum import maximum, print_accuracies

    print_accuracies(maximum(config))
    return 0


def ship_command(argv: list[str]) -> int:
    """Ship three runs of a suite."""
    options = tyro.cli(
        ShipConfig, prog="lens-positions experiments ship", description=SHIP % ", ".join(SHIPPED), args=argv
    )

    from .ship import ship

    for name, table in ship(options).items():
        length, loss = table[["length", "loss"]].iloc[0]
        print(f"{name}: {loss:.4f} nats per byte at {length:.0f} tokens; the model is in {options.output / name}")
    return 0
