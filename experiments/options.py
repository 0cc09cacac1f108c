"""What each command of the study can be asked for, and the names to choose from.

torch is not imported here, so that the command line answers at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from lens_positions.config import PositionConfig

VARIANTS: dict[str, PositionConfig] = {
    "static": PositionConfig(source="static"),
    "shared": PositionConfig(source="shared", activation="softplus"),
    "per_layer": PositionConfig(source="per_layer"),
    "shared_per_head": PositionConfig(source="shared", activation="softplus", per_head=True),
    "per_layer_per_head": PositionConfig(source="per_layer", per_head=True),
    "frozen": PositionConfig(source="frozen"),
    "signed": PositionConfig(source="per_layer", activation="none"),
    "cap_30": PositionConfig(source="per_layer", max_increment=30.0),
    "constant": PositionConfig(source="frozen"),
    "swapped": PositionConfig(source="frozen"),
    "head_steps": PositionConfig(source="frozen", per_head=True),
}
"""What is compared; `static` is standard RoPE."""

FROM_SHARED = {"frozen": None, "constant": "constant", "swapped": "swapped"}
"""Variants with the increments that `shared` learned at the same seed, as a fixed table: as they are; the mean of the
training text for every byte, which leaves their scale; with letters and the space exchanged, which makes them wrong."""

HEAD_STEPS = (0.5, 1.0, 2.0, 4.0)
"""The constant increments of the heads of `head_steps`, in positions: does a head that steps farther look back less?"""

USUAL_VARIANTS = tuple(name for name in VARIANTS if name not in ("constant", "swapped", "head_steps"))
"""What a suite trains where no variant is named."""

ROPE_VARIANTS: dict[str, dict[str, Any]] = {
    "rope_75": {"rope_fraction": 0.75},
    "rope_25": {"rope_fraction": 0.25},
    "rope_0": {"rope_fraction": 0.0},
    "ntk": {"rope_theta": 91_896.0},
    "window": {"sliding_window": 64},
}
"""Other uses of RoPE, with static increments, by what they change in the model: a fraction of the frequencies (Barbero
et al.), a base as NTK scaling by 8 makes it of 10,000 in heads of 32 (10,000 * 8 ** (32 / 30)), a sliding window."""

SHIPPED = {"bilingual-rope": "static", "bilingual-shared": "shared", "bilingual-per-layer": "per_layer"}
"""What is shipped: the name in the package, and the variant of the suite."""

RUN_TABLES = (
    "boundaries",
    "kinds",
    "kinds_code",
    "names",
    "heads",
    "correlations",
    "saturation",
    "below_zero",
    "specialisation",
    "ablation",
    "english",
    "treebank",
)
"""What `measure` measures of a run."""

OF_STATIC = ("english",)
"""Those that a run with increments of 1 has too."""

WHERE_ASKED = ("english", "treebank")
"""Those that need text which is downloaded; they are measured where they are asked for by name."""

ROPE_TABLES = (
    "increments",
    "norms",
    "positional",
    "truncated",
    "absolute",
    "held",
    "drops",
    "sinks",
    "fingerprints",
    "dispersion",
    "temperature",
)
"""What `measure_rope` measures of a model."""

QUESTION_TABLES = ("probes", "gap_effects", "head_reach")
"""What `questions` measures of a run."""


CONSTANTS = (0.8, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0)
"""The increments among which the best constant of a layer is looked for, in positions."""

STAGED = Path("runs/results")
"""Where suites and measurements leave their files until they are gathered."""

GATHERED = Path("experiments/results")
"""The tidy tables of this repository."""


@dataclass(frozen=True)
class SuiteConfig:
    """What a suite is asked for.

    Args:
        preset: the preset that every run takes its other fields from.
        seeds: distinct whole numbers; each gives weights and an order of the data.
        variants: some of those above; static is what the others are compared with.
        steps: optimizer steps, instead of the preset's.
        corpus: text to train and score on, instead of the preset's.
        compile: run training steps through torch.compile.
        precision: of training steps, instead of the preset's.
        output: the folder of the runs; runs/suite/PRESET where none is given.
        results: the folder of the results; runs/results/PRESET where none is given.
        cache: where tokenised corpora are kept.
    """

    preset: str = "tiny"
    seeds: tuple[int, ...] = (0, 1, 2)
    variants: tuple[str, ...] = USUAL_VARIANTS
    steps: int | None = None
    corpus: str | None = None
    compile: bool = False
    precision: Literal["float32", "bf16"] | None = None
    output: Path | None = None
    results: Path | None = None
    cache: Path = Path(".cache")


@dataclass(frozen=True)
class MeasureConfig:
    """What is measured.

    Args:
        preset: the preset of the suite whose runs are measured.
        output: the folder of the runs; runs/suite/PRESET where none is given.
        results: the folder of the results; runs/results/PRESET where none is given.
        only: some of the runs, such as per_layer-0; all finished and scored ones if none is named.
        tables: some of the measurements, such as boundaries; all if none is named.
        treebank: Chinese treebanks in CoNLL-U, for the measurement of that name.
    """

    preset: str = "tiny"
    output: Path | None = None
    results: Path | None = None
    only: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    treebank: tuple[Path, ...] = ()


@dataclass(frozen=True)
class RopeConfig:
    """What is measured.

    Args:
        models: names or folders; the shipped models, SmolLM2 and the finished runs of those variants if none is given.
        runs: the folder of those runs.
        results: the folder of the tables.
        tables: some of the measurements, such as norms; if none is named all, and of the runs those that compare them.
    """

    models: tuple[str, ...] = ()
    runs: Path = Path("runs/suite/tiny")
    results: Path = STAGED / "rope"
    tables: tuple[str, ...] = ()


@dataclass(frozen=True)
class MaximumConfig:
    """How the task is trained and tested.

    Args:
        seeds: each gives weights and data.
        steps: of training.
        batch_size: sets of items a step.
        classes: kinds of items.
        width: of the attention and of the networks around it.
        learning_rate: of AdamW.
        sizes: numbers of items that are tested.
        tested: sets of items for each of them.
        results: the folder of the tables.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 10_000
    batch_size: int = 128
    classes: int = 10
    width: int = 128
    learning_rate: float = 1e-3
    sizes: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    tested: int = 2048
    results: Path = STAGED / "maximum"


@dataclass(frozen=True)
class GatherConfig:
    """What is gathered from where.

    Args:
        files: what suites and measurements left: a folder for each suite, and the folders rope and maximum.
        results: the folder of the tidy tables.
    """

    files: Path = STAGED
    results: Path = GATHERED


@dataclass(frozen=True)
class ResultsConfig:
    """Where results are read from and written to.

    Args:
        results: the folder of the tidy tables.
        preset: the suite that findings are taken from.
        beside: suites of models that were trained less, whose findings are told after them where they have results.
        rope: the suite whose runs show how RoPE itself is used, which comes last, if it was measured.
        output: the text to write.
        figures: the folder of figures, beside it.
    """

    results: Path = GATHERED
    preset: str = "long"
    beside: tuple[str, ...] = ("base", "tiny")
    rope: str = "tiny"
    output: Path = Path("RESULTS.md")
    figures: Path = Path("docs")


@dataclass(frozen=True)
class RowConfig:
    """Which row of the table that opens RESULTS.md is computed again.

    Args:
        key: the word that stands beside the claim, such as boundaries; all rows if none is given.
        results: the folder of the tidy tables.
        preset: the suite that findings are taken from.
    """

    key: tyro.conf.Positional[str] = ""
    results: Path = GATHERED
    preset: str = "long"


@dataclass(frozen=True)
class QuestionsConfig:
    """What is asked of which suite.

    Args:
        suite: the suite whose runs are asked.
        runs: the folder of the runs; runs/suite/SUITE where none is given.
        files: what suites and measurements left; runs/results where none is given.
        tables: some of the measurements, such as probes; all if none is named.
        results: the folder of the tidy tables.
        output: the page to write.
    """

    suite: str = "long"
    runs: Path | None = None
    files: Path | None = None
    tables: tuple[str, ...] = ()
    results: Path = GATHERED
    output: Path = Path("docs/findings-questions.md")


@dataclass(frozen=True)
class ShipConfig:
    """What is shipped from where.

    Args:
        preset: the preset of the suite that the runs are of.
        runs: the folder of the runs; runs/suite/PRESET where none is given.
        results: the folder of the tidy tables.
        output: the folder of the shipped models.
        seed: the seed of the runs.
        cache: where tokenised corpora are kept.
    """

    preset: str = "long"
    runs: Path | None = None
    results: Path = GATHERED
    output: Path = Path("lens_positions/checkpoints")
    seed: int = 0
    cache: Path = Path(".cache")
