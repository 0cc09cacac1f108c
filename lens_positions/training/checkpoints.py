"""What a run left in its folder, read strictly: its description, its newest checkpoint, and its log up to there.

Nothing here writes. A checkpoint's state.json names the run that it is of, by a digest of training.json, and has a
digest of each of its files: an edited configuration or a flipped bit is told before anything goes on from it.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..checkpoint_files import sha256_of_file
from ..errors import PositionsError
from .config import changes
from .schema import FORMAT, CheckpointState, Evaluation, LossLine, RunDescription, digest_of, parse_json, read_json

LOG = "log.jsonl"
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"


def read_description(run: Path) -> RunDescription:
    """What the training.json of a run says.

    Raises:
        PositionsError: it is damaged, or its newest checkpoint is of a run that was described otherwise.
    """
    described: RunDescription = read_json(run / "training.json", RunDescription)
    checkpoint = newest_checkpoint(run)

    # The checkpoint holds the digest of the description that it was trained under.
    if checkpoint is not None and read_state(checkpoint)["run"] != digest_of(described):
        raise PositionsError(
            f"{run / 'training.json'} was changed after {checkpoint} was written; expected what the run was started "
            "with."
        )
    return described


def refuse_other(run: Path, described: dict[str, Any]) -> None:
    """Refuse a run whose training.json says something else than this.

    Raises:
        PositionsError: it does, or it is damaged.
    """
    saved: Any = read_description(run)

    # Through JSON, as the file went: tuples are lists there.
    if any(changes(saved, json.loads(json.dumps(described)))):
        raise PositionsError(f"{run} was started with another configuration or text; expected its training.json.")


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None where it stopped before the first.

    Raises:
        PositionsError: the folder is no run.
    """
    if not (run / "training.json").exists():
        raise PositionsError(f"{run} has no run to resume; expected a folder that training wrote.")

    # A folder of another name is one that was being written.
    found = [p for p in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8}", p.name)]
    return max(found, default=None)


def read_state(checkpoint: Path) -> CheckpointState:
    """What the state.json of a checkpoint says.

    Raises:
        PositionsError: it is damaged, or of another step than the folder's.
    """
    state: CheckpointState = read_json(checkpoint / STATE, CheckpointState)
    if checkpoint.name != f"step-{state['step']:08d}":
        raise PositionsError(
            f"the checkpoint {checkpoint} is damaged (it says step {state['step']}); expected its own."
        )
    return state


def describe_state(folder: Path, step: int, run: str, schedule: dict[str, Any], groups: list[Any]) -> CheckpointState:
    """The state.json of a checkpoint whose other files are in a folder already."""
    files = {path.relative_to(folder).as_posix(): sha256_of_file(path) for path in sorted(_files(folder))}
    return {
        "format": FORMAT,
        "step": step,
        "run": run,
        "files": files,
        "schedule": schedule,
        "param_groups": groups,
    }


def refuse_damaged(checkpoint: Path, state: CheckpointState, expected: dict[str, Any]) -> None:
    """Refuse a checkpoint that is not as it was written.

    Args:
        checkpoint: its folder.
        state: what its state.json says.
        expected: the fields of it that its configuration and its step alone decide.

    Raises:
        PositionsError: a file of it was changed, is missing or was added; or its state.json says something else.
    """
    # Missing, added and changed files alike: nothing that is loaded is unchecked.
    found = {path.relative_to(checkpoint).as_posix() for path in _files(checkpoint)} - {STATE}
    for name in sorted(found ^ set(state["files"])):
        what = "was added" if name in found else "is missing"
        raise PositionsError(f"the checkpoint {checkpoint} is damaged: {name} {what}; expected what the run wrote.")
    for name, digest in state["files"].items():
        if sha256_of_file(checkpoint / name) != digest:
            raise PositionsError(f"the checkpoint {checkpoint} is damaged: {name} was changed after it was written.")
    said: Any = state
    for field, value in expected.items():
        # As JSON, where 1 and 1.0 differ and the order of keys does not count.
        if json.dumps(said[field], sort_keys=True) != json.dumps(value, sort_keys=True):
            raise PositionsError(
                f"the checkpoint {checkpoint} is damaged: its {field} is not what the configuration gives at step "
                f"{state['step']}, with this version of torch."
            )


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]


def read_optimizer(checkpoint: Path, parameters: list[nn.Parameter]) -> dict[int, dict[str, Tensor]]:
    """The moments of each parameter, by its number.

    Raises:
        PositionsError: the file is damaged, or of other parameters.
    """
    path = checkpoint / OPTIMIZER
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise PositionsError(f"the checkpoint {checkpoint} is damaged: {' '.join(str(error).split())}") from error
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        if not number.isdecimal() or int(number) >= len(parameters):
            raise PositionsError(f"the checkpoint {checkpoint} is damaged: {path.name} has the unknown tensor {name}.")

        # AdamW's step is a number; its two moments are shaped as the parameter.
        if key != "step" and tensor.shape != parameters[int(number)].shape:
            raise PositionsError(f"the checkpoint {checkpoint} is damaged: {name} in {path.name} is misshapen.")
        moments.setdefault(int(number), {})[key] = tensor
    if not moments or any(set(own) != {"step", "exp_avg", "exp_avg_sq"} for own in moments.values()):
        raise PositionsError(f"the checkpoint {checkpoint} is damaged: {path.name} lacks moments of AdamW.")
    return moments


def read_log(run: Path, step: int, is_evaluated: Callable[[int], bool]) -> list[str]:
    """The lines of log.jsonl up to a step; what a killed run wrote after it is left out, damaged or not.

    Args:
        run: the folder of the run.
        step: that of the checkpoint; 0 where there is none.
        is_evaluated: whether an evaluation was due at a step.

    Raises:
        PositionsError: a step or an evaluation is missing, or there twice, or a line between them is damaged.
    """
    lines = _lines(run) if step else []

    # Which evaluations a run up to this step must have logged.
    due = {n for n in range(1, step + 1) if is_evaluated(n)}
    seen: dict[str, set[int]] = {"loss": set(), "increments": set()}
    kept = []
    for number, line in enumerate(lines, 1):
        # Everything up to the checkpoint is there: the rest is of a run that was killed.
        if len(seen["loss"]) == step and seen["increments"] >= due:
            break
        record = _record(run, number, line)
        own = seen["loss" if "loss" in record else "increments"]
        if record["step"] in own or not 1 <= record["step"] <= step:
            raise PositionsError(f"{run / LOG} is damaged at line {number}: step {record['step']} is out of place.")
        own.add(record["step"])
        kept.append(line.decode())
    missing = (set(range(1, step + 1)) - seen["loss"]) | (due - seen["increments"])
    if missing:
        raise PositionsError(f"{run / LOG} is damaged: it lacks step {min(missing)}; expected all up to {step}.")
    return kept


def read_evaluations(run: Path) -> tuple[list[Evaluation], list[int]]:
    """The evaluations and the tokens per second that a finished run logged.

    Raises:
        PositionsError: the log is damaged, or has no evaluation.
    """
    records = [_record(run, number, line) for number, line in enumerate(_lines(run), 1)]
    evaluations = [record for record in records if "increments" in record]
    if not evaluations:
        raise PositionsError(f"{run / LOG} has no evaluation; expected that of a finished run.")
    return evaluations, [record["tokens_per_second"] for record in records if "tokens_per_second" in record]


def _lines(run: Path) -> list[bytes]:
    log = run / LOG
    if not log.is_file():
        raise PositionsError(f"there is no file {log}; expected the log that the run wrote.")
    return log.read_bytes().splitlines()


def _record(run: Path, number: int, line: bytes) -> Any:
    return parse_json(line, LossLine | Evaluation, f"{run / LOG}, line {number},")
