"""What a training run is: one dataclass, and presets of it in `training/presets/*.toml`."""

import tomllib
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from lens_positions.errors import PositionsError
from lens_positions.hooked import PositionModelConfig

PRESETS = Path(__file__).parent / "presets"
Config = TypeVar("Config")


@dataclass(frozen=True)
class TrainConfig:
    """A training run from fresh weights.

    Args:
        model: the model and its increment source.
        corpus: english, chinese, bilingual, code, a file, a folder or a hub dataset (owner/name[:config][:split]).
        text_column: the column of a table or a hub dataset that holds the text.
        max_bytes: a cap on the corpus; needed for a hub dataset.
        frozen_from: a saved model whose shared source gives the table of a frozen one.
        steps: optimizer steps.
        batch_size: sequences of model.n_ctx tokens a step, over all processes.
        accumulate: forward passes that a step's batch is cut into.
        learning_rate: the peak, reached after warmup_steps, then a cosine to zero.
        warmup_steps: steps of linear warm-up.
        weight_decay: of AdamW, on matrices only.
        clip: the largest gradient norm.
        precision: "float32", or "bf16" autocast.
        compile: run the training step through torch.compile.
        seed: of the weights and of the order of the data.
        eval_every: steps between evaluations on the held-out windows.
        eval_windows: held-out windows of model.n_ctx tokens, spread over the held-out text.
        save_every: steps between checkpoints.
        trackers: what accelerate should log to besides log.jsonl (tensorboard, wandb, ...).

    Raises:
        PositionsError: a number out of range, or sizes that do not divide.
    """

    model: PositionModelConfig = field(default_factory=PositionModelConfig)
    corpus: str = "bilingual"
    text_column: str = "text"
    max_bytes: int | None = None
    frozen_from: Path | None = None
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
        if min(self.seed, self.warmup_steps, self.weight_decay) < 0:
            raise PositionsError("seed, warmup_steps and weight_decay must not be negative.")
        if self.batch_size % self.accumulate:
            raise PositionsError(
                f"batch_size {self.batch_size} is no multiple of accumulate {self.accumulate}; expected equal parts."
            )
        if self.frozen_from is not None and self.model.positions.source != "frozen":
            raise PositionsError(
                f"frozen_from is given for the source {self.model.positions.source!r}; expected source 'frozen'."
            )


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


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain values; `updated(TrainConfig(), ...)` reads it back."""
    values = asdict(config)
    values["frozen_from"] = None if config.frozen_from is None else str(config.frozen_from)
    return values
