"""What a run is: a dataclass for training from fresh weights, with presets in presets/*.toml, and one for grafts."""

import sys
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from ..config import PositionConfig, PositionModelConfig
from ..errors import PositionsError
from .schema import MOST_STEPS, first_of

PRESETS = Path(__file__).parent / "presets"
MOST = (1 << 31) - 1
MOST_FLOAT = sys.float_info.max
Config = TypeVar("Config")


def check_whole(name: str, value: object, least: int, most: int = MOST) -> None:
    """Refuse what is no whole number of a range."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise PositionsError(f"{name} is {_excerpt(value)}; expected at least {least}, a whole number up to {most}.")


def check_number(name: str, value: object, zero: bool = False) -> None:
    """Refuse what is no finite number above zero; with `zero`, zero is one too."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and -MOST_FLOAT <= value <= MOST_FLOAT
    if not is_number or value < 0 or (value == 0 and not zero):  # type: ignore[operator]
        expected = "a finite number that is not negative" if zero else "a positive number"
        raise PositionsError(f"{name} is {_excerpt(value)}; expected {expected}.")


def _excerpt(value: object) -> str:
    """A value as a sentence can hold it."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of over 40 digits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class RunConfig:
    """What every training run has.

    Args:
        corpus: english, chinese, bilingual, bilingual-large, code, a file, a folder or a hub dataset
            (owner/name, with :config and :split where it has them).
        text_column: the column of a table or a hub dataset that holds the text.
        max_bytes: a cap on the corpus; needed for a hub dataset.
        steps: optimizer steps.
        batch_size: sequences a step, over all processes.
        accumulate: forward passes that a step's batch is cut into.
        learning_rate: the peak, reached after warmup_steps, then a cosine to zero.
        warmup_steps: steps of linear warm-up.
        weight_decay: of AdamW, on matrices only.
        clip: the largest gradient norm.
        precision: "float32", or "bf16" autocast.
        compile: run the training step through torch.compile.
        seed: of the weights and of the order of the data.
        eval_every: steps between evaluations on the held-out windows.
        eval_windows: held-out windows as long as the context, spread over the held-out text.
        save_every: steps between checkpoints.
        trackers: what accelerate should log to besides log.jsonl (tensorboard, wandb, ...).
        keep_at: steps after which the model is kept as it is then, in the folder at/step-N of the run.

    Raises:
        PositionsError: a number out of range, or sizes that do not divide.
    """

    corpus: str = "bilingual"
    text_column: str = "text"
    max_bytes: int | None = None
    steps: int = 1000
    batch_size: int = 64
    accumulate: int = 1
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    precision: Literal["float32", "bf16"] = "float32"
    compile: bool = False
    seed: int = 0
    eval_every: int = 250
    eval_windows: int = 128
    save_every: int = 250
    trackers: tuple[str, ...] = ()
    keep_at: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "eval_every", "eval_windows", "save_every"):
            check_whole(name, getattr(self, name), 1)
        check_whole("steps", self.steps, 1, MOST_STEPS)
        check_whole("warmup_steps", self.warmup_steps, 0)
        check_whole("seed", self.seed, 0)
        for step in self.keep_at or ():
            check_whole("keep_at", step, 1, self.steps)
        check_number("learning_rate", self.learning_rate)
        check_number("clip", self.clip)
        check_number("weight_decay", self.weight_decay, zero=True)
        if self.max_bytes is not None:
            check_whole("max_bytes", self.max_bytes, 1, 1 << 62)

        # Parts of different size would count the tokens of the small one more.
        if self.batch_size % self.accumulate:
            raise PositionsError(
                f"batch_size {self.batch_size} is no multiple of accumulate {self.accumulate}; expected equal parts."
            )


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """A training run from fresh weights.

    Args:
        model: the model and its increment source.
        frozen_from: a saved model whose shared source gives the table of a frozen one.
        frozen_as: what is made of that table: "constant", every byte gets its mean over the training text; "swapped",
            letters get the increment of the space and the space gets the mean of theirs. None takes it as it is.
        head_increments: instead of a table, one constant increment for each head, in positions.

    Raises:
        PositionsError: as RunConfig, and a table for a source that has none.
    """

    model: PositionModelConfig = field(default_factory=PositionModelConfig)
    frozen_from: Path | None = None
    frozen_as: Literal["constant", "swapped"] | None = None
    head_increments: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.n_ctx < 2:
            raise PositionsError("model.n_ctx is 1; expected at least 2, so that there is a gap between tokens.")
        positions = self.model.positions

        # A table that nothing looks up would be a setting without effect.
        for name in ("frozen_from", "head_increments"):
            if getattr(self, name) is not None and positions.source != "frozen":
                raise PositionsError(f"{name} is given for the source {positions.source!r}; expected source 'frozen'.")
        if self.frozen_as is not None and self.frozen_from is None:
            raise PositionsError(f"frozen_as is {self.frozen_as!r} without frozen_from; expected both.")
        if self.head_increments is not None:
            self._check_head_increments(self.head_increments)

    def _check_head_increments(self, increments: tuple[float, ...]) -> None:
        for increment in increments:
            check_number("head_increments", increment)
        heads = self.model.n_heads
        if self.frozen_from is not None or not self.model.positions.per_head or len(increments) != heads:
            raise PositionsError(
                f"head_increments has {len(increments)} numbers; expected one for each of {heads} heads, a source per "
                "head, and no frozen_from."
            )


@dataclass(frozen=True)
class GraftConfig(RunConfig):
    """Position streams learned on a pretrained model, beside the baseline without them.

    Args:
        base: the pretrained model: a shipped or packaged name, a folder or a hub name.
        adapt: what learns besides the source: nothing ("frozen"), LoRA weights on the attention projections
            ("lora"), or every weight ("full"). The baseline has the same, without the source.
        positions: the increment source.
        n_ctx: tokens of a sequence.
        dtype: the dtype of a base that does not learn, "float32" or "bf16"; what learns is float32 always, since
            a bf16 weight is not moved by steps below a 256th of its size.
        adapt_learning_rate: the peak for LoRA weights or the base; learning_rate is the source's.
        lora_rank: rank of the LoRA weights; their scale is 2 (lora_alpha is twice the rank).
        gradient_checkpointing: recompute activations in the backward pass, for memory.

    Raises:
        PositionsError: as RunConfig, a source without weights to learn, or a bf16 base that should learn.
    """

    base: str = "smollm2-135m-instruct"
    adapt: Literal["frozen", "lora", "full"] = "frozen"
    positions: PositionConfig = field(default_factory=lambda: PositionConfig(source="per_layer", hidden=32))
    n_ctx: int = 256
    dtype: Literal["float32", "bf16"] = "float32"
    adapt_learning_rate: float = 1e-4
    lora_rank: int = 8
    gradient_checkpointing: bool = False
    corpus: str = "english"
    steps: int = 300
    batch_size: int = 2
    warmup_steps: int = 20
    eval_every: int = 100
    save_every: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.positions.learned:
            raise PositionsError(
                f"the source {self.positions.source!r} has nothing to learn; expected 'shared' or 'per_layer'."
            )

        # A step may be smaller than the distance between two bf16 numbers of a weight's size, and is then lost.
        if self.adapt == "full" and self.dtype == "bf16":
            raise PositionsError(
                "dtype is bf16 with adapt full; expected float32, since bf16 weights do not move at small learning "
                "rates (precision bf16 runs float32 weights through bf16 autocast)."
            )
        if self.compile and self.gradient_checkpointing:
            raise PositionsError(
                "compile is given with gradient_checkpointing; expected one of them: layers that are computed again in "
                "the backward pass cannot be compiled with their position streams."
            )
        check_whole("n_ctx", self.n_ctx, 2)
        check_whole("lora_rank", self.lora_rank, 1)
        check_number("adapt_learning_rate", self.adapt_learning_rate)


def preset_names() -> list[str]:
    """The presets in the package, by name."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_preset(name: str) -> TrainConfig:
    """The configuration in lens_positions/training/presets/NAME.toml.

    Raises:
        PositionsError: there is no such preset, it is no TOML, or it has an unknown field or a value of another type.
    """
    path = PRESETS / f"{name}.toml"
    if name not in preset_names():
        raise PositionsError(f"there is no preset {name!r}; expected one of {', '.join(preset_names())}.")
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PositionsError(f"{path} cannot be read ({error}); expected TOML.") from error
    return update_config(TrainConfig(), values, str(path))


def update_config(config: Config, values: dict[str, Any], where: str) -> Config:
    """A dataclass with the given fields replaced, nested ones by nested dictionaries.

    Raises:
        PositionsError: a field that it does not have, or a value of another type or out of range.
    """
    known = {f.name: getattr(config, f.name) for f in fields(config)}  # type: ignore[arg-type]
    types = get_type_hints(type(config))
    changes = {}
    for name, value in values.items():
        if name not in known:
            raise PositionsError(f"{where} has the unknown field {name!r}; expected one of {', '.join(known)}.")
        current = known[name]
        if is_dataclass(current):
            if not isinstance(value, dict):
                raise PositionsError(f"{where} has {_excerpt(value)} as {name}; expected its fields.")
            changes[name] = update_config(current, value, f"{where}, {name}")
        else:
            changes[name] = _of_type(types[name], value, f"{where} has a wrong {name}")
    try:
        return replace(config, **changes)  # type: ignore[type-var]
    except PositionsError as error:
        raise PositionsError(f"{where}: {error}") from error


def _of_type(expected: Any, value: Any, wrong: str) -> Any:
    """A value of JSON or TOML as its field has it: a list as a tuple, a path from its text."""
    if expected == Path | None and isinstance(value, str) and "\0" not in value:
        return Path(value)

    # JSON and TOML know no tuples.
    if isinstance(value, list):
        value = tuple(value)
    try:
        return TypeAdapter(expected).validate_python(value, strict=True)
    except ValidationError as error:
        raise PositionsError(f"{wrong} ({first_of(error)}); expected what such a file says.") from error


def to_json(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain values, which `update_config` reads back."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}


def changes(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a configuration, as `to_json` writes it, that differ from another's, with their values.

    A field that the other lacks counts as None: it was written before there was such a field.
    """
    for name, value in after.items():
        if isinstance(value, dict):
            # A nested configuration that was not there before counts as one without fields.
            known = before.get(name)
            yield from changes(known if isinstance(known, dict) else {}, value, f"{prefix}{name}.")
        elif value != before.get(name):
            yield prefix + name, value
