"""How models use RoPE itself: frequencies, absolute position and dispersion, kept as small files;
`gather` makes tidy tables of them.

    rope/smollm2-135m-instruct/norms.csv       norms of queries and keys by frequency, layer and head
    rope/smollm2-135m-instruct/positional.csv  heads that attend to a fixed offset
    rope/smollm2-135m-instruct/truncated.csv   the loss without the lowest, or the highest, frequencies
    rope/smollm2-135m-instruct/absolute.csv    the two parts of absolute position
    rope/bilingual-shared/increments.csv       increments by layer and kind of token
    rope/bilingual-shared/held.csv             the same with positions on a ruler of equal steps
    rope/smollm2-135m-instruct/drops.csv       what goes with the first token's embedding
    rope/smollm2-135m-instruct/sinks.csv       attention to position 0
    rope/smollm2-135m-instruct/fingerprints.csv  how alike its states are
    rope/smollm2-135m-instruct/dispersion.csv  entropy by number of items
    rope/smollm2-135m-instruct/temperature.csv the loss with an adaptive temperature, by length

Models are the shipped ones, SmolLM2-135M, and finished runs of a suite: RoPE, its variants, and learned increments,
whose seeds say what a difference between shipped models is worth. All text is held out, and English.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pandas as pd

from lens_positions import corpora
from lens_positions.analysis.absolute_position import (
    absolute_variation,
    attention_sinks,
    fingerprints,
    replacement_effects,
)
from lens_positions.analysis.dispersion import adaptive_temperature, attention_dispersion, loss_by_length
from lens_positions.analysis.frequencies import frequency_norms, positional_heads, truncate_frequencies
from lens_positions.analysis.token_kinds import increments_by_category
from lens_positions.checkpoint import fingerprint, shipped_names
from lens_positions.errors import PositionsError
from lens_positions.interventions import ablate
from lens_positions.measure.corpus_reader import WINDOW
from lens_positions.model import HookedPositionTransformer

from .measured import measure_left
from .options import ROPE_VARIANTS, RopeConfig
from .suite import is_finished

SMOLLM2 = "smollm2-135m-instruct"
CHARACTERS = 60_000
PIECES = 24
KEPT = (0.75, 0.5, 0.25, 0.0)
COMPARED = ("static", "shared", "per_layer", *ROPE_VARIANTS)
"""Variants of a suite whose runs are measured."""

OF_RUNS = ("increments", "norms", "positional", "absolute", "held", "drops", "sinks", "dispersion")
"""What is measured of them: what differs between sources and between architectures."""

LENGTHS = (64, 128, 256, 512)
"""Tokens of the windows that losses are measured at, up to the model's context."""


@cache
def _texts() -> list[str]:
    return corpora.heldout_excerpts("english", CHARACTERS)


@cache
def _pieces() -> list[str]:
    return corpora.heldout_pieces("english", PIECES)


def _losses_truncated(model: HookedPositionTransformer) -> pd.DataFrame:
    """The loss at one length with a part of the frequencies."""
    length = (min(model.cfg.n_ctx, WINDOW),)
    tables = [
        loss_by_length(model, _texts(), truncate_frequencies(model, keep, drop), length).assign(keep=keep, drop=drop)
        for keep in KEPT
        for drop in ("lowest", "highest")
        if keep or drop == "lowest"
    ]
    return pd.concat(tables, ignore_index=True)


def _increments(model: HookedPositionTransformer) -> pd.DataFrame:
    """Of the text that norms are measured on: an increment of c turns every frequency c times as fast."""
    if model.position_config.source == "static":
        raise PositionsError("the increments of this model are all 1; expected learned increments.")
    return increments_by_category(model, _texts())


def _absolute_with_even_positions(model: HookedPositionTransformer) -> pd.DataFrame:
    """Absolute position on a ruler of each text's own mean step, so that the rotation can leak nothing."""
    if model.position_config.source == "static":
        raise PositionsError("the positions of this model are held as they are; expected learned increments.")
    return absolute_variation(model, _pieces(), hooks=ablate(model, to="mean", site="positions"))


def _temperature(model: HookedPositionTransformer) -> pd.DataFrame:
    lengths = [length for length in LENGTHS if length <= model.cfg.n_ctx]
    return loss_by_length(model, _texts(), adaptive_temperature(model), lengths)


MEASUREMENTS: dict[str, Callable[[HookedPositionTransformer], pd.DataFrame]] = {
    "increments": _increments,
    "norms": lambda model: frequency_norms(model, _texts()),
    "positional": lambda model: positional_heads(model, _texts()),
    "truncated": _losses_truncated,
    "absolute": lambda model: absolute_variation(model, _pieces()),
    "held": _absolute_with_even_positions,
    "drops": lambda model: replacement_effects(model, _pieces()),
    "sinks": lambda model: attention_sinks(model, _pieces()),
    "fingerprints": lambda model: fingerprints(model, _pieces()),
    "dispersion": lambda model: attention_dispersion(model, _texts()),
    "temperature": _temperature,
}


def measure_rope(options: RopeConfig) -> list[str]:
    """Measure what is not measured yet, and return the names of the folders.

    A table is written when it is done, so that an interruption loses one at most.

    Raises:
        PositionsError: an unknown measurement, or a model that cannot be loaded.
    """
    if wrong := set(options.tables) - set(MEASUREMENTS):
        raise PositionsError(f"there is no measurement {min(wrong)!r}; expected some of {', '.join(MEASUREMENTS)}.")
    if options.runs != RopeConfig.runs and not options.runs.is_dir():
        raise PositionsError(f"there is no folder {options.runs}; expected one with runs of a suite.")
    runs = [] if options.models else _finished_runs(options.runs)
    found = []
    for number, given in enumerate([*(options.models or (*shipped_names(), SMOLLM2)), *runs], 1):
        usual = OF_RUNS if given in runs else MEASUREMENTS
        names = [name for name in MEASUREMENTS if name in (options.tables or usual)]
        path = Path(given)
        name = "-".join(path.parts[-3:-1]) if path.name == "model" else path.name  # tiny-static-0
        model = HookedPositionTransformer.from_pretrained(given)
        command = f"lens-positions experiments rope --models {given} --tables"
        tables = {table: (partial(MEASUREMENTS[table], model), f"{command} {table}") for table in names}
        folder = options.results / name
        folder.mkdir(parents=True, exist_ok=True)
        measure_left(tables, folder, {"model": fingerprint(model.original_model)}, f"{name} ({number})")
        found.append(name)
    return found


def _finished_runs(runs: Path) -> list[str]:
    """The models of a suite's finished runs, variant by variant."""
    return [
        str(run / "model")
        for variant in COMPARED
        for run in sorted(runs.glob(f"{variant}-[0-9]*"))
        if run.is_dir() and is_finished(run)
    ]
