"""What lies on disk beside a model's own files: `positions.json`, `positions.safetensors`, and whether they are whole.

    positions.json          format, positions (a PositionConfig), and where they apply:
      base, base_exact      of an adapter: name, fingerprint and dtype of its base; SHA-256 of it in that dtype
      adapters              of an adapter with peft weights: their names, which are active, whether they are enabled
      tokenizer             of a whole model: the files of its tokenizer
      files                 SHA-256 of each file whose numbers decide what the model computes
    positions.safetensors   the weights of the streams

Everything is checked before anything is built from it. Folders of before have no `files`, and load as they did.
"""

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .core.increments import PositionConfig
from .errors import PositionsError

FORMAT = 1
"""Version of `positions.json`; a newer one is refused."""

LARGEST = 1_000_000
"""Bytes of a description; what is longer is none."""

SEALED = ("*.safetensors", "adapter_config.json", "*/adapter_model.safetensors", "*/adapter_config.json")
"""Files whose checksums a folder keeps."""

OURS = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("positions.json", "positions.safetensors", "adapter_config.json", "adapter_model.safetensors", "README.md"),
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken"),
    *("chat_template*", "tekken.json", "normalizer.json", "*.jinja", "spiece*", "sentencepiece*", "bpe*"),
)
"""Names that a saved model or an adapter consists of; a folder with others is not replaced."""

TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "spiece*", "bpe*")
"""Names of which a folder with a tokenizer has at least one."""


@dataclass(frozen=True)
class SavedPositions:
    """What positions.json says.

    Attributes:
        config: where increments come from.
        base: of an adapter, the `name`, the fingerprint `sha256` and the `dtype` of its base.
        base_exact: SHA-256 of the base's weights in that dtype; None in older folders.
        adapters: of an adapter with peft weights, their `names`, those `active`, and whether they are `enabled`.
        tokenizer: files of the tokenizer; None in older folders and in adapters.
        files: SHA-256 by file.
    """

    config: PositionConfig
    base: dict[str, str] | None = None
    base_exact: str | None = None
    adapters: dict[str, Any] | None = None
    tokenizer: list[str] | None = None
    files: dict[str, str] | None = None


def read_positions(folder: Path) -> SavedPositions | None:
    """What a folder's positions.json says; None where it has none, nor weights of streams.

    Raises:
        PositionsError: it is damaged, missing beside its weights, or was written by a newer version.
    """
    path = folder / "positions.json"
    if not os.path.lexists(path):
        if os.path.lexists(folder / "positions.safetensors"):
            raise PositionsError(f"{folder} has positions.safetensors and no positions.json; expected both.")
        return None
    saved = read_description(path)

    # True is an int in Python, and no version.
    version = saved.get("format")
    if isinstance(version, bool) or not isinstance(version, int):
        raise _damage_error(path, f"format is {_excerpt(version)}")
    if version != FORMAT:
        raise PositionsError(f"{path} has format {version}; expected {FORMAT}: it needs a newer lens-positions.")
    unknown = set(saved) - {"format", "positions", *(f.name for f in fields(SavedPositions)[1:])}
    if unknown:
        raise PositionsError(f"{path} has the unknown field {sorted(unknown)[0][:60]!r}; expected those of format 1.")
    positions = saved.get("positions")
    if not isinstance(positions, dict):
        raise _damage_error(path, f"positions is {_excerpt(positions)}")
    unknown = set(positions) - {f.name for f in fields(PositionConfig)}
    if unknown:
        raise PositionsError(
            f"{path} has the unknown field {sorted(unknown)[0][:60]!r}; expected those of PositionConfig."
        )
    try:
        config = PositionConfig(**positions)
    except TypeError as error:  # a list where a word belongs
        raise _damage_error(path, str(error)) from error
    return SavedPositions(
        config,
        base=_base(path, saved.get("base")),
        base_exact=None if saved.get("base_exact") is None else _digest(path, "base_exact", saved["base_exact"]),
        adapters=_adapters(path, saved.get("adapters")),
        tokenizer=_names(path, "tokenizer", saved.get("tokenizer")),
        files=_files(path, saved.get("files")),
    )


def read_description(path: Path) -> dict[str, Any]:
    """A JSON object of a file that was saved with a model: UTF-8, finite numbers, each name once.

    Raises:
        PositionsError: it is anything else, or cannot be read.
    """
    if path.is_dir():
        raise PositionsError(f"{path} is a folder; expected a file.")
    try:
        # Read whole into memory, so its size comes first.
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        read = json.loads(path.read_text("utf-8"), object_pairs_hook=_each_once, parse_constant=_refuse_constant)
        if not isinstance(read, dict):
            raise ValueError(f"it holds {_excerpt(read)}")
    except (ValueError, OSError) as error:
        raise _damage_error(path, str(error)) from error
    except RecursionError as error:
        raise _damage_error(path, "it is nested too deeply") from error
    return read


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Python's JSON keeps the last of two equal names without a word.
    read = dict(pairs)
    if len(read) != len(pairs):
        raise ValueError("a name stands twice")
    for name, value in pairs:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name[:60]} is {value}")
    return read


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is no number of JSON")


def _damage_error(path: Path, reason: str) -> PositionsError:
    reason = " ".join(reason.split())[:200]
    return PositionsError(f"{path} is damaged ({reason}); expected the JSON that save_pretrained wrote.")


def _excerpt(value: Any) -> str:
    kind = type(value).__name__
    return f"{kind} {str(value)[:40]!r}" if isinstance(value, str | int | float) else kind


def _digest(path: Path, field: str, value: Any) -> str:
    if not (isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")):
        raise _damage_error(path, f"{field} is {_excerpt(value)}, no SHA-256")
    return value


def _names(path: Path, field: str, value: Any) -> list[str] | None:
    """File names inside the folder: none leads out of it."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(n, str) for n in value):
        raise _damage_error(path, f"{field} is {_excerpt(value)}, no list of names")
    for name in value:
        # A name such as "../x" in a downloaded folder must not reach files outside of it.
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name or len(name) > 255:
            raise _damage_error(path, f"{field} has {name[:60]!r}, no name of a file in the folder")
    return value


def _base(path: Path, value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) != {"name", "sha256", "dtype"}:
        raise _damage_error(path, f"base is {_excerpt(value)}, expected name, sha256 and dtype")
    if not (isinstance(value["name"], str) and value["name"].strip()):
        raise _damage_error(path, f"the base's name is {_excerpt(value['name'])}")
    _digest(path, "the base's sha256", value["sha256"])
    if value["dtype"] not in ("float32", "bfloat16", "float16", "float64"):
        raise _damage_error(path, f"the base's dtype is {_excerpt(value['dtype'])}")
    return value


def _adapters(path: Path, value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) != {"names", "active", "enabled"}:
        raise _damage_error(path, f"adapters is {_excerpt(value)}, expected names, active and enabled")
    names = _names(path, "adapters", value["names"]) or []
    active = _names(path, "adapters", value["active"]) or []
    distinct = len(set(names)) == len(names) and len(set(active)) == len(active)

    # Each adapter has a folder of its name, one level down.
    plain = all(len(Path(name).parts) == 1 for name in names)
    if not (names and distinct and plain and set(active) <= set(names) and isinstance(value["enabled"], bool)):
        raise _damage_error(path, "adapters has names that are not its own, or enabled is neither true nor false")
    return value


def _files(path: Path, value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise _damage_error(path, f"files is {_excerpt(value)}, expected SHA-256 by name")
    _names(path, "files", list(value))
    return {name: _digest(path, f"the SHA-256 of {name[:60]}", digest) for name, digest in value.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The weights in a safetensors file: finite numbers of 32 or 64 bits for streams, floating for adapters.

    Raises:
        PositionsError: there is no such file, it is truncated or damaged, or a weight is NaN or infinite.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise PositionsError(f"{path.parent} has no {path.name}; expected both it and its description.") from error
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PositionsError(f"{path} is truncated or damaged: {reason}; expected a safetensors file.") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise PositionsError(f"{path} has NaN or infinite numbers in {name}; expected finite weights.")
    return tensors


def seal(folder: Path) -> None:
    """Write the checksums of a folder's weights into its positions.json, as the last step of saving."""
    described = json.loads((folder / "positions.json").read_text("utf-8"))

    # Descriptions of adapters are sealed too: an edited rank or target would load as another adapter.
    files = sorted({file for pattern in SEALED for file in folder.glob(pattern)})
    described["files"] = {file.relative_to(folder).as_posix(): sha256_of_file(file) for file in files}
    (folder / "positions.json").write_text(json.dumps(described, indent=2) + "\n", "utf-8")


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write under a temporary name in the same folder and rename, so that `path` never holds half a file."""
    # In the same folder, as a rename between file systems is a copy that can be interrupted.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        staging = Path(folder) / "new"
        with staging.open("wb") as file:
            write(file)
        os.replace(staging, path)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_changed(folder: Path, saved: SavedPositions, *, streams: bool = True, others: bool = True) -> None:
    """Refuse a folder whose weights (of the streams, or the other files) are not those that were saved.

    Raises:
        PositionsError: a file is missing, or has other bytes.
    """
    for name, expected in (saved.files or {}).items():
        path = folder / name
        if not (streams if name == "positions.safetensors" else others):
            continue
        if not path.is_file():
            raise PositionsError(f"{folder} has no {name}; expected the file that was saved with it.")
        try:
            found = sha256_of_file(path)
        except OSError as error:
            raise PositionsError(f"{path} cannot be read: {error}; expected the file that was saved.") from error
        if found != expected:
            raise PositionsError(
                f"{path} is not the file that was saved (SHA-256 {found[:12]}, expected {expected[:12]}): it is "
                "damaged or was changed; expected the folder as it was written."
            )


def is_taken(folder: Path) -> bool:
    """Whether there is a folder with anything in it.

    Raises:
        PositionsError: there is one that cannot be read.
    """
    try:
        return os.path.isdir(folder) and any(folder.iterdir())
    except OSError as error:
        raise PositionsError(f"{folder} cannot be read: {error}; expected a readable folder.") from error


def is_replaceable(folder: Path) -> bool:
    """Whether nothing but files of a saved model or adapter would go if a folder were replaced."""
    # What is not ours must be the folder of an adapter, all of whose files are.
    inside = [item for item in folder.iterdir() if not any(item.match(pattern) for pattern in OURS)]
    return all(item.is_dir() and (item / "adapter_config.json").is_file() and is_replaceable(item) for item in inside)


@contextlib.contextmanager
def replacement_folder(path: Path) -> Iterator[Path]:
    """A new folder to write in, which takes the place of `path` at the end; until then `path` stays as it is.

    Raises:
        PositionsError: the place cannot be written.
    """
    try:
        # Through a link to its target, which is then replaced; the link stays.
        path = path.resolve() if path.is_symlink() else path
        if path.exists() and not path.is_dir():
            raise PositionsError(f"{path} is a file; expected a folder.")
        path.parent.mkdir(parents=True, exist_ok=True)

        # Beside its target and not in /tmp: only within one file system is a rename a single step.
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True) as room:
            staging, old = Path(room) / "new", Path(room) / "old"
            staging.mkdir()
            yield staging
            try:
                if path.exists():
                    os.replace(path, old)
                os.replace(staging, path)
            except BaseException:
                # Interrupted between the two renames: what was there goes back.
                if old.exists() and not path.exists():
                    os.replace(old, path)
                raise
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise PositionsError(f"{path} cannot be written: {reason}; expected a writable folder with room.") from error
