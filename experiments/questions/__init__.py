"""Four questions about increments, each answered with seeds, an interval and a control.

    probes.py      1. do word boundaries enter the increments with training, and when?
    answers.py     2. what is an increment for? And the answers to all four, from the tables of results alone
    word_gaps.py   3. does a gap before a true word beginning matter more than before a matched false one?
    answers.py     4. does a head that steps farther look back less?
    page.py        the answers as a page, with figures

Measurements are kept as small files beside the scores of a run, as `measure` keeps its own, and gathered by `gather`:

    long/per_layer-0/probes.csv       areas of probes and increments, by training step and layer
    long/per_layer-0/gap_effects.csv  the effects of edited gaps, by line
    long/head_steps-0/head_reach.csv  increment and look-back of every head
    rope/smollm2-135m-instruct/gap_effects.csv  as above, of English, by document
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import pandas as pd

from lens_positions import corpora
from lens_positions.analysis.heads import head_profile
from lens_positions.checkpoint import fingerprint
from lens_positions.errors import PositionsError
from lens_positions.model import HookedPositionTransformer
from lens_positions.training.schema import RunDescription, read_json

from ..gather import gather
from ..measured import measure_left
from ..options import STAGED, GatherConfig, QuestionsConfig
from ..rope_measures import SMOLLM2
from ..suite import is_finished, print_progress, read_results, weights_of
from ..tables import read_tables
from .answers import find_answers
from .page import write_page
from .probes import BoundaryText, BranchingEntropy, boundary_probes
from .word_gaps import gap_effects, token_gap_effects

EVERY_LINE = 4
"""One held-out line of so many is read for the probes."""

LINES = 150
"""Lines at most for edited gaps."""

PAIRS = 24
"""Pairs of a document at most for edited gaps of SmolLM2."""

CHARACTERS = 20_000
"""Of English and Chinese text, for the look-back of heads."""


class Text:
    """Held-out text, read once for all runs."""

    @cached_property
    def segmented(self) -> list[list[str]]:
        """The words of held-out lines of the People's Daily, as people segmented them."""
        return corpora.heldout_segmentation()

    @cached_property
    def boundaries(self) -> BoundaryText:
        """Some of these lines, for the probes, and the branching entropy of the training text."""
        words = self.segmented[::EVERY_LINE]
        training = corpora.load("chinese")["train"]["text"]
        return BoundaryText(["".join(line) for line in words], words, BranchingEntropy(training))

    @cached_property
    def messages(self) -> list[str]:
        """English documents, whole."""
        return list(corpora.load("english")["heldout"]["text"])

    @cached_property
    def prose(self) -> list[str]:
        """English and Chinese."""
        return corpora.heldout_excerpts("bilingual", CHARACTERS)


def _probes(run: Path, text: Text) -> pd.DataFrame:
    return boundary_probes(models_of(run), text.boundaries)


def _gap_effects(run: Path, text: Text) -> pd.DataFrame:
    lines = ["".join(words) for words in text.segmented]
    return gap_effects(_model(run), lines, text.segmented, LINES)


def _head_reach(run: Path, text: Text) -> pd.DataFrame:
    return head_profile(_model(run), text.prose)


def _model(run: Path) -> HookedPositionTransformer:
    return HookedPositionTransformer.from_pretrained(str(run / "model"))


MEASUREMENTS: dict[str, tuple[Callable[[Path, Text], pd.DataFrame], tuple[str, ...]]] = {
    "probes": (_probes, ("per_layer",)),
    "gap_effects": (_gap_effects, ("per_layer", "static")),
    "head_reach": (_head_reach, ("head_steps", "static")),
}
"""What is measured, and of which variants. Question 2 needs the scores of the suite alone."""


def models_of(run: Path) -> dict[int, Path]:
    """The models of a run by training step: those that it kept on its way, and the last."""
    kept = {int(folder.name.removeprefix("step-")): folder for folder in sorted((run / "at").glob("step-*"))}
    steps = read_json(run / "training.json", RunDescription)["config"]["steps"]
    return {**kept, steps: run / "model"}


def questions(options: QuestionsConfig) -> Path:
    """Measure what is left of the runs whose weights are here, gather, and write the answers as a table and a page.

    Raises:
        PositionsError: an unknown measurement, results of other weights, or nothing to answer with.
    """
    if wrong := set(options.tables) - set(MEASUREMENTS):
        raise PositionsError(f"there is no measurement {min(wrong)!r}; expected some of {', '.join(MEASUREMENTS)}.")
    results = STAGED / options.suite if options.files is None else options.files / options.suite
    runs = Path("runs/suite") / options.suite if options.runs is None else options.runs
    text = Text()
    for described in sorted(results.glob("*/run.json")):
        _measure(runs / described.parent.name, described.parent, text, options.tables or tuple(MEASUREMENTS))
    if "gap_effects" in (options.tables or MEASUREMENTS):
        _measure_pretrained(results.parent / "rope" / SMOLLM2, text)
    if results.is_dir():
        gather(GatherConfig(results.parent, options.results))
    found = find_answers(read_tables(options.results), options.suite)
    return write_page(found, options)


def _measure_pretrained(folder: Path, text: Text) -> None:
    """Question 3 of a pretrained model; its results stand beside those of how it uses RoPE."""
    try:
        model = HookedPositionTransformer.from_pretrained(SMOLLM2)
    except PositionsError as error:  # a package that need not be there
        print_progress(f"{SMOLLM2}: {error} What was measured stays.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = "lens-positions experiments questions --tables gap_effects"
    tables = {"gap_effects": (lambda: token_gap_effects(model, text.messages, PAIRS), command)}
    measure_left(tables, folder, {"model": fingerprint(model.original_model)}, SMOLLM2)


def _measure(run: Path, folder: Path, text: Text, names: tuple[str, ...]) -> None:
    variant = folder.name.rpartition("-")[0]
    chosen = {name: of[0] for name, of in MEASUREMENTS.items() if name in names and variant in of[1]}
    if not chosen:
        return
    if not is_finished(run):
        print_progress(f"{folder.name}: its weights are not in {run}; what was measured stays")
        return
    weights = weights_of(run)
    if weights != read_results(folder / "run.json", "sha256")["sha256"]:
        raise PositionsError(
            f"{run} is not the run that {folder} was scored on; expected lens-positions experiments suite again."
        )
    suite = folder.parent.name
    tables = {
        name: (lambda of=of: of(run, text), f"lens-positions experiments questions --suite {suite} --tables {name}")
        for name, of in chosen.items()
    }
    measure_left(tables, folder, weights, folder.name)
