"""The folder that a map is written to: what it holds, and how it is read.

    map.json               what the map is of: model, weights, corpus, windows; written first, and never changed
    gaps-000000.parquet    a shard: every gap of so many windows, at every layer; whole, or not there
    end.json               how many shards, documents and gaps the corpus has; written when its end was reached

A shard is written aside and renamed, so that a process that is killed leaves whole shards alone. What a shard holds
depends on map.json and its number only, not on who wrote it: any number of processes may share the work.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import torch
from accelerate.utils import align_module_device

from ..checkpoint_files import write_whole
from ..core.model_wrappers import base_model
from ..errors import PositionsError

FORMAT = 1
"""Version of map.json."""

DIGEST = b"lens_positions.windows"
"""Under this name a shard's metadata have the digest of its windows."""

SHARD = "gaps-{:06d}.parquet"


@dataclass(frozen=True)
class GapMap:
    """A map on disk, which may still be in the making.

    A row is a gap at a layer (and head, where each has its own):

        document, source, window        the document's number, where it is from, the window in it
        index, layer, head              the token after the gap, and where the gap is
        before, after                   the tokens on both sides as text; `before_id`, `before_kind` and
                                        `before_surprisal` (nats; none for a document's first token), `after` alike
        crosses_word                    null between Chinese characters that nobody has cut into words
        crosses_sentence, crosses_line, crosses_document            by the rules of `measure/text_boundaries.py`
        context, future                 tokens of the window before the gap, and those after the next one, which are
                                        all that the gap can change
        increment, gradient             in positions, and in nats per position
        integrated, integrated_off      on request: nats, and how far the parts of its window are from the whole, as a
                                        share of it

    Attributes:
        folder: where it is.

    >>> found = lp.causal.gap_map(model, texts, folder / "map", progress=False)
    >>> found == lp.causal.GapMap(folder / "map")
    True
    >>> rows = found.table(["index", "layer", "before", "after", "crosses_word", "gradient"])
    >>> rows[rows["layer"] == 0].iloc[2:5].round(1)
        index  layer before after  crosses_word  gradient
    12      3      0      h     e         False      -0.3
    18      4      0      e                True      -1.0
    24      5      0            c          True      -0.6
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    @property
    def settings(self) -> dict[str, Any]:
        """What the map is of.

        Raises:
            PositionsError: there is no map.
        """
        return _read(self.folder / "map.json")

    @property
    def end(self) -> dict[str, int] | None:
        """How many `shards`, `documents` and `gaps` the corpus has; None until somebody has reached its end."""
        return _read(self.folder / "end.json") if (self.folder / "end.json").exists() else None

    @property
    def shards(self) -> list[Path]:
        """The shards that are there, in order."""
        return sorted(self.folder.glob("gaps-*.parquet"))

    @property
    def is_whole(self) -> bool:
        """Whether every gap of the corpus is there."""
        return self.end is not None and len(self.shards) == self.end["shards"]

    def table(self, columns: list[str] | None = None) -> pd.DataFrame:
        """Every row, with these columns: all of a large map may not fit in memory.

        Raises:
            PositionsError: there is no map, no shard, or one that is damaged.
        """
        return pd.concat(self.tables(columns), ignore_index=True)

    def tables(self, columns: list[str] | None = None) -> Iterator[pd.DataFrame]:
        """The rows shard by shard; errors as `table`."""
        _ = self.settings
        if not self.shards:
            raise PositionsError(f"the map in {self.folder} has no shard yet; expected at least one.")
        for path in self.shards:
            try:
                yield pyarrow.parquet.read_table(path, columns=columns).to_pandas()
            except (pa.ArrowException, OSError) as error:
                raise _damage_error(path, error) from error


def begin(folder: Path, settings: dict[str, Any]) -> GapMap:
    """The map of a new folder, or of one that was begun with the same settings.

    Raises:
        PositionsError: the folder has other files or a map of something else, or cannot be written.
    """
    settings = {"format": FORMAT, **settings}
    if folder.exists() and not folder.is_dir():
        raise PositionsError(f"{folder} is a file; expected a folder to write the map to.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "map.json").exists():
            # A name that begins with .map.json is that of another process, which writes it aside at this moment.
            if others := [path.name for path in folder.iterdir() if not path.name.startswith(".map.json")]:
                raise PositionsError(f"{folder} has other files ({sorted(others)[0]}); expected a new folder or a map.")
            _write(folder / "map.json", json.dumps(settings, indent=2).encode() + b"\n")
    except OSError as error:
        raise _write_error(folder, error) from error

    # Another process may have begun it: what counts is what the file says.
    found = GapMap(folder)
    before = found.settings
    for name, given in settings.items():
        # One and the same model may be called by a path here and a name there: its weights are what tells.
        if before.get(name) != given and name not in ("model", "version"):
            of = f"{before.get('model')} and {before.get('corpus')}"
            raise PositionsError(
                f"{folder} holds a map of {of}, with {name} {_excerpt(before.get(name))} where this one has "
                f"{_excerpt(given)}; expected another folder, or the same again."
            )
    return found


def digest_of(path: Path) -> str:
    """The digest of the windows that a shard is of.

    Raises:
        PositionsError: it is damaged.
    """
    try:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise _damage_error(path, error) from error
    return metadata.get(DIGEST, b"").decode()


def write_shard(folder: Path, number: int, rows: pa.Table, digest: str) -> None:
    """Write a shard, whole or not at all.

    Raises:
        PositionsError: the folder cannot be written or has no room.
    """
    buffer = pa.BufferOutputStream()
    pyarrow.parquet.write_table(rows.replace_schema_metadata({DIGEST: digest.encode()}), buffer, compression="zstd")
    try:
        _write(folder / SHARD.format(number), buffer.getvalue())
    except OSError as error:
        raise _write_error(folder, error) from error


def remove_leftovers(folder: Path, processes: tuple[int, int]) -> None:
    """Remove what killed processes left of the shards of this one, whether those are there by now or not."""
    # Of its own shards alone: another process may be writing its shards aside at this moment, and all of them end.json.
    process, count = processes
    for left in folder.glob(".gaps-*.parquet.*"):
        number = left.name.removeprefix(".gaps-").partition(".")[0]
        if number.isdecimal() and int(number) % count == process:
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def write_end(folder: Path, counts: dict[str, int]) -> None:
    """Note that the corpus ends here; every process that gets there writes the same.

    Raises:
        PositionsError: the folder cannot be written or has no room.
    """
    try:
        _write(folder / "end.json", json.dumps(counts, indent=2).encode() + b"\n")
    except OSError as error:
        raise _write_error(folder, error) from error


def _write(path: Path, content: Any) -> None:
    """Write a file, whole or not at all, so that it outlives the machine."""

    def write(file: IO[bytes]) -> None:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())

    write_whole(path, write)


def weights_digest(model: Any) -> str:
    """SHA-256 of all parameters and of the tables of the streams, wherever they wait."""
    # In the order of names, which does not depend on how a model is put together; a module at a time, as those that
    # wait on the disk need not fit in memory together.
    hashed = hashlib.sha256()
    for name, module in sorted(base_model(model).named_modules(), key=lambda item: item[0]):
        with align_module_device(module, torch.device("cpu")):
            tensors = {**dict(module.named_parameters(recurse=False)), **_tables(name, module)}
            for own, tensor in sorted(tensors.items()):
                values = tensor.detach().to("cpu").contiguous()
                hashed.update(f"{own} {values.dtype} {tuple(values.shape)}".encode())
                hashed.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def _tables(name: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What streams keep as buffers, such as frozen increments; buffers of the model itself follow from its config."""
    return dict(module.named_buffers(recurse=False)) if "position_streams" in name else {}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise PositionsError(f"there is no map in {path.parent}; expected a folder that lens-positions map wrote.")
    try:
        read = json.loads(path.read_text("utf-8"))
        if not isinstance(read, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, OSError) as error:
        raise _damage_error(path, error) from error
    if path.name == "map.json" and read.get("format") != FORMAT:
        raise PositionsError(f"{path} has format {read.get('format')!r}; expected {FORMAT}, of this lens-positions.")
    return read


def _excerpt(value: Any) -> str:
    return f"{value!s:.40}" if isinstance(value, str) else f"{value!r:.80}"


def _damage_error(path: Path, error: Exception) -> PositionsError:
    reason = " ".join(str(error).split())[:120]
    return PositionsError(
        f"{path} is damaged ({reason}); expected it as it was written (without it, it is made again)."
    )


def _write_error(folder: Path, error: OSError) -> PositionsError:
    count = len(GapMap(folder).shards) if folder.is_dir() else 0
    return PositionsError(
        f"the map cannot be written to {folder} ({error.strerror}); expected a writable folder with room: its {count} "
        "whole shards can be read, and the same call goes on after them."
    )
