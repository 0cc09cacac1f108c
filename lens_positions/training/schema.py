"""What the JSON files of training hold: a schema for each, checked whole before anything is done with what they say.

A value is of its type to the letter (true is no number, 3.0 no whole number, and only losses may be NaN), and no field
is unknown. pydantic checks them; whatever else is wrong with a file (no UTF-8, a cut line, deep nesting, a folder in
its place) ends in the same sentence.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from ..errors import PositionsError

FORMAT = 1
"""Version of a checkpoint's state.json."""

MOST_STEPS = 99_999_999
"""The names of checkpoints have eight digits."""

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
WITH_NAN = ConfigDict(strict=True, extra="forbid", allow_inf_nan=True)

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Step = Annotated[int, Field(ge=0, le=MOST_STEPS)]
Count = Annotated[int, Field(ge=0)]
Fingerprint = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
Nonempty = Annotated[dict[str, Sha256], Field(min_length=1)]


@with_config(STRICT)
class RunDescription(TypedDict):
    """training.json: what a run was started with."""

    config: dict[str, Any]
    corpus_fingerprint: str
    base_sha256: NotRequired[Sha256]


@with_config(STRICT)
class CheckpointState(TypedDict):
    """state.json: where a run stands, of which run, and a digest of every other file of the checkpoint."""

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]
    step: Annotated[int, Field(ge=1, le=MOST_STEPS)]
    run: Sha256
    files: Nonempty
    schedule: dict[str, Any]
    param_groups: list[dict[str, Any]]


@with_config(STRICT)
class LossLine(TypedDict):
    """A line of log.jsonl for a step."""

    step: Annotated[int, Field(ge=1, le=MOST_STEPS)]
    loss: float
    learning_rate: NotRequired[float]
    tokens_per_second: NotRequired[int]


@with_config(WITH_NAN)
class Evaluation(TypedDict):
    """A line of log.jsonl for an evaluation."""

    step: Step
    heldout_nats_per_byte: NotRequired[float]
    heldout_bits_per_byte: NotRequired[float]
    heldout_bytes: NotRequired[Count]
    heldout_nats_per_token: NotRequired[float]
    heldout_bits_per_token: NotRequired[float]
    heldout_tokens: NotRequired[Count]
    increments: list[dict[str, float]]


@with_config(STRICT)
class Commit(TypedDict):
    """The code that wrote something."""

    commit: str
    changed: bool


@with_config(STRICT)
class PackedCommit(Commit):
    """commit.json of a packed project: also a digest of the code, which tells whether it was changed since."""

    sha256: Sha256


@with_config(STRICT)
class PackedCorpus(TypedDict):
    """packed.json: the request that a corpus was tokenised for, and what only its text could tell."""

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]
    corpus: str
    text_column: str
    max_bytes: int | None
    tokenizer: Sha256 | None
    fingerprint: Fingerprint
    arrays: Nonempty
    heldout_sources: list[str]
    sha256: Sha256


@with_config(WITH_NAN)
class RunResults(TypedDict, total=False):
    """run.json and diverged.json: what a suite writes of a run; a reader says which fields it needs.

    `sha256` is that of the weights that are kept. Where these are rounded to half precision, `sha256_float32` is that
    of the weights as trained.
    """

    variant: str
    seed: Count
    command: str
    config: dict[str, Any]
    corpus_fingerprint: str
    base_sha256: Sha256
    parameters: Count
    evaluation: Evaluation
    tokens_per_second: int | None
    sha256: dict[str, Sha256]
    sha256_float32: dict[str, Sha256]
    versions: dict[str, str]
    git: Commit | None
    device: str
    step: Step


@with_config(STRICT)
class Measured(TypedDict, total=False):
    """An entry of measured.json: a table that was measured."""

    sha256: dict[str, str]
    command: str
    rows: Count
    refused: str
    seconds: Count
    git: Commit | None


@with_config(WITH_NAN)
class MaximumResults(TypedDict):
    """seed-N.json of the maximum-retrieval task."""

    command: str
    config: dict[str, Any]
    loss: float
    seconds: Count


def read_json(path: Path, schema: Any, *needed: str) -> Any:
    """What a JSON file says, where it fits a schema.

    Args:
        path: the file.
        schema: one of the above, or a type that is made of them.
        needed: fields that must be there, of those that the schema does not require.

    Raises:
        PositionsError: it is no file, or says something else.
    """
    if path.exists() and not path.is_file():
        raise PositionsError(f"{path} is no file; expected the one that training wrote.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PositionsError(f"{path} cannot be read ({error.strerror}); expected what training wrote.") from error
    value = parse_json(content, schema, str(path))
    if missing := [name for name in needed if name not in value]:
        raise PositionsError(f"{path} is damaged (it has no {missing[0]}); expected what training wrote.")
    return value


def parse_json(content: bytes, schema: Any, where: str) -> Any:
    """What a piece of JSON says, where it fits a schema.

    Raises:
        PositionsError: it does not.
    """
    try:
        return TypeAdapter(schema).validate_json(content, strict=True)
    except ValidationError as error:
        raise PositionsError(f"{where} is damaged ({first_of(error)}); expected what training wrote.") from error


def first_of(error: ValidationError) -> str:
    """The first thing that pydantic found wrong, and where."""
    found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(map(str, found["loc"]))
    return f"{place}: {found['msg']}" if place else found["msg"]


def digest_of(values: Any) -> str:
    """SHA-256 of plain values, whatever the order of their fields."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
