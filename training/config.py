"""What a run is: a dataclass for training from fresh weights, with presets in presets/*.toml, and one for grafts."""

import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from lens_positions.config import PositionConfig, PositionModelConfig
from lens_positions.errors import PositionsError

PRESETS = Path(__file__).parent / "presets"
Config = TypeVar("Config")


@dataclass(frozen=True)
class RunConfig:
    """What every training run has.

    Args:
        corpus: english, chinese, bilingual, code, a file, a folder or a hub dataset (owner/name[:config][:split]).
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

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "eval_every", "eval_windows", "save_every"):
            if getattr(self, name) < 1:
                raise PositionsError(f"{name} is {getattr(self, name)}; expected at least 1.")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise PositionsError(f"{name} is {getattr(self, name)}; expected a positive number.")
        if min(self.warmup_steps, self.weight_decay) < 0:
            raise PositionsError("warmup_steps and weight_decay must not be negative.")
        if not 0 <= self.seed < 1 << 31:
            raise PositionsError(f"seed is {self.seed}; expected a whole number from 0 to {(1 << 31) - 1}.")
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

    Raises:
        PositionsError: as RunConfig, and a table for a source that has none.
    """

    model: PositionModelConfig = field(default_factory=PositionModelConfig)
    frozen_from: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.n_ctx < 2:
            raise PositionsError("model.n_ctx is 1; expected at least 2, so that there is a gap between tokens.")
        if self.frozen_from is not None and self.model.positions.source != "frozen":
            raise PositionsError(
                f"frozen_from is given for the source {self.model.positions.source!r}; expected source 'frozen'."
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
        if self.adapt == "full" and self.dtype == "bf16":
            raise PositionsError(
                "dtype is bf16 with adapt full; expected float32, since bf16 weights do not move at small learning "
                "rates (precision bf16 runs float32 weights through bf16 autocast)."
            )
        for name, least in (("n_ctx", 2), ("lora_rank", 1)):
            if getattr(self, name) < least:
                raise PositionsError(f"{name} is {getattr(self, name)}; expected at least {least}.")
        if not 0 < self.adapt_learning_rate < float("inf"):
            raise PositionsError(f"adapt_learning_rate is {self.adapt_learning_rate}; expected a positive number.")


def preset_names() -> list[str]:
    """The presets in the package, by name."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_preset(name: str) -> TrainConfig:
    """The configuration in training/presets/NAME.toml.

    Raises:
        PositionsError: there is no such preset, or it has an unknown field.
    """
    path = PRESETS / f"{name}.toml"
    if name not in preset_names():
        raise PositionsError(f"there is no preset {name!r}; expected one of {', '.join(preset_names())}.")
    return updated(TrainConfig(), tomllib.loads(path.read_text("utf-8")), str(path))


def updated(config: Config, values: dict[str, Any], where: str) -> Config:
    """A dataclass with the given fields replaced, nested ones by nested dictionaries.

    Raises:
        PositionsError: a field that it does not have.
    """
    known = {f.name: getattr(config, f.name) for f in fields(config)}  # type: ignore[arg-type]
    changes = {}
    for name, value in values.items():
        if name not in known:
            raise PositionsError(f"{where} has the unknown field {name!r}; expected one of {', '.join(known)}.")
        current = known[name]
        if is_dataclass(current) and isinstance(value, dict):
            value = updated(current, value, f"{where}, {name}")
        elif name == "frozen_from" and value is not None:
            value = Path(value)
        elif isinstance(value, list):
            value = tuple(value)
        changes[name] = value
    return replace(config, **changes)  # type: ignore[type-var]


def to_json(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain values, which `updated` reads back."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}


def changes(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a configuration, as `to_json` writes it, that differ from another's, with their values.

    A field that the other lacks counts as None: it was written before there was such a field.
    """
    for name, value in after.items():
        if isinstance(value, dict):
            known = before.get(name)
            yield from changes(known if isinstance(known, dict) else {}, value, f"{prefix}{name}.")
        elif value != before.get(name):
            yield prefix + name, value
