"""Corpora as memory-mapped tokens, and the windows that training and evaluation read from them.

A batch is a function of the seed and the number of the step alone, so that a resumed run reads what an
uninterrupted one would have read, without the state of any loader.
"""

import functools
import hashlib
import json
import lzma
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from jaxtyping import Int, Int64, UInt
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .. import corpora
from ..checkpoint_files import sha256_of_file, write_whole
from ..errors import PositionsError
from ..tokenizer import END_OF_DOCUMENT, is_byte_tokenizer
from .config import RunConfig
from .schema import PackedCorpus, digest_of, read_json

FORMAT = 1
ARRAYS = ("heldout", "heldout_starts", "train", "train_starts")
PACKED = "packed.json"
"""What describes a corpus that came without its text."""

Splits = DatasetDict | IterableDatasetDict


@dataclass(frozen=True)
class TokenizedCorpus:
    """A corpus as two streams of tokens, each document followed by the token that ends it.

    The arrays are memory maps; `*_starts` holds the offset at which each document begins. `fingerprint`
    changes with the name, the text, the tokenizer and the format. `heldout_sources` has the source of each
    held-out document, where the text that says it is elsewhere.
    """

    name: str
    fingerprint: str
    train: UInt[np.ndarray, " train_pos"]
    train_starts: Int64[np.ndarray, " train_document"]
    heldout: UInt[np.ndarray, " heldout_pos"]
    heldout_starts: Int64[np.ndarray, " heldout_document"]
    heldout_sources: tuple[str, ...] | None = None


@dataclass(frozen=True)
class _Encoding:
    """How documents become tokens: `end` follows each of them, and `name` tells tokenizers apart."""

    encode: Callable[[bytes], np.ndarray]
    end: int
    dtype: str
    name: str | None


def _encoding(tokenizer: PreTrainedTokenizerBase | None) -> _Encoding:
    if tokenizer is None or is_byte_tokenizer(tokenizer):
        return _Encoding(lambda document: np.frombuffer(document, np.uint8), END_OF_DOCUMENT, "<u2", None)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    if end is None:
        raise PositionsError(
            f"{type(tokenizer).__name__} has no end-of-sequence token, which separates documents; expected one."
        )
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str().encode() if backend is not None else type(tokenizer).__name__.encode()
    return _Encoding(
        lambda document: np.array(tokenizer(document.decode(), verbose=False)["input_ids"]),
        end,
        "<u2" if len(tokenizer) <= 1 << 16 else "<u4",
        hashlib.sha256(vocabulary + rules).hexdigest(),
    )


def tokenize_corpus(
    corpus: str,
    cache_dir: Path,
    *,
    text_column: str = "text",
    max_bytes: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> TokenizedCorpus:
    """The tokens of the corpus that `corpora.load` finds under this name, written once and then reused.

    `tokenizer` None is bytes; another one encodes each document as it encodes any text. `max_bytes` caps the
    text, 19/20 of it for training and 1/20 held out, at the end of a document; each split keeps at least one.
    It is required for a hub dataset, which is known by its name alone: delete its folder in `cache_dir` to read
    a newer version. Every other corpus is found again by its content. Files appear whole or not at all, and are
    checked when they are reused.

    A corpus in `cache_dir` that `pack` wrote elsewhere is taken as it is, with its fingerprint, whether its text is
    here or not.

    Raises PositionsError for whatever `corpora.load` refuses, a stream without `max_bytes`, a tokenizer without
    an end-of-sequence token, a packed corpus that is damaged, and an unwritable folder.
    """
    encoding = _encoding(tokenizer)
    known = (
        (corpus, text_column, max_bytes) if encoding.name is None else (corpus, text_column, max_bytes, encoding.name)
    )
    if max_bytes is not None and max_bytes < 1:
        raise PositionsError(f"max_bytes is {max_bytes}: expected at least 1 byte")
    request = {"corpus": corpus, "text_column": text_column, "max_bytes": max_bytes, "tokenizer": encoding.name}

    # A packed corpus stands for its text, which may not be on this machine.
    packed = _packed_corpus(cache_dir, request)
    if packed is not None:
        return packed
    if corpora.is_hub_dataset(corpus):
        if max_bytes is None:
            raise PositionsError(f"{corpus!r} is streamed from the hub without end: expected max_bytes to cap it")
        splits = None

        # The text of a hub dataset is not here to be hashed.
        fingerprint = _fingerprint(known)
    else:
        splits = corpora.load(corpus, text_column=text_column)
        fingerprint = _fingerprint(known, splits)
    folder = cache_folder(cache_dir, corpus, fingerprint)
    try:
        arrays = _read(folder)
        if arrays is None:
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder, splits or corpora.load(corpus, text_column=text_column), max_bytes, encoding)
            arrays = _read(folder)
    except OSError as error:
        raise PositionsError(f"the tokens of {corpus!r} could not be written to {folder}: {error}") from error
    if arrays is None:
        raise PositionsError(f"the token cache {folder} changed while it was written: expected no other writer")
    return TokenizedCorpus(name=corpus, fingerprint=fingerprint, heldout_sources=None, **arrays)


def cache_folder(cache_dir: Path, corpus: str, fingerprint: str) -> Path:
    """Where the tokens of a corpus are kept."""
    return Path(cache_dir) / f"{re.sub(r'[^A-Za-z0-9]+', '-', corpus).strip('-')[-40:]}-{fingerprint}"


def _packed_corpus(cache_dir: Path, request: dict[str, Any]) -> TokenizedCorpus | None:
    """The corpus that was packed by this name, with this tokenizer and this cap, if there is one."""
    # Sixteen of any character, as the fingerprint cannot be computed without the text.
    anywhere = cache_folder(cache_dir, request["corpus"], "?" * 16)
    found = []
    for path in sorted(anywhere.parent.glob(f"{anywhere.name}/{PACKED}")):
        described: PackedCorpus = read_json(path, PackedCorpus)
        if request.items() <= described.items():
            found.append((path.parent, described))
    if not found:
        return None

    # Two texts by one name: which one is meant cannot be told.
    if len(found) > 1:
        folders = " and ".join(str(folder) for folder, _ in found)
        raise PositionsError(f"{request['corpus']!r} is packed in {folders}; expected one of them.")
    return _open_packed(*found[0])


def _open_packed(folder: Path, described: PackedCorpus) -> TokenizedCorpus:
    """A packed corpus, whose arrays are decompressed when it is first used.

    Raises:
        PositionsError: it is not as it was packed, or the folder cannot be written.
    """
    damaged = PositionsError(
        f"the packed corpus {folder} is damaged; expected what lens-positions pack wrote, copied whole."
    )
    values = {name: value for name, value in described.items() if name != "sha256"}

    # The description has a digest of itself; the folder name has the fingerprint again.
    if digest_of(values) != described["sha256"] or not folder.name.endswith(f"-{described['fingerprint']}"):
        raise damaged

    try:
        arrays = _arrays(folder, described["arrays"])
        if arrays is None:
            for name in ARRAYS:
                with lzma.open(folder / f"{name}.npy.xz") as packed:
                    write_whole(folder / f"{name}.npy", functools.partial(shutil.copyfileobj, packed))
            arrays = _arrays(folder, described["arrays"])
    except (FileNotFoundError, EOFError, lzma.LZMAError) as error:
        raise damaged from error
    except OSError as error:
        raise PositionsError(f"the packed corpus {folder} could not be unpacked there: {error}") from error
    if arrays is None:
        raise damaged

    sources = tuple(described["heldout_sources"])
    return TokenizedCorpus(
        name=described["corpus"], fingerprint=described["fingerprint"], heldout_sources=sources, **arrays
    )


def batch(
    tokens: UInt[np.ndarray, " stream"], *, seed: int, n: int, batch_size: int, n_ctx: int
) -> Int[Tensor, "batch pos"]:
    """Batch `n`: `batch_size` windows of n_ctx + 1 tokens at random offsets, a function of (seed, n) alone.

    Raises PositionsError for a corpus shorter than a window, a negative seed or n, and sizes below 1.
    """
    _check_window(tokens, n_ctx)
    if min(seed, n) < 0 or batch_size < 1:
        raise PositionsError(
            f"batch got seed {seed}, n {n}, batch_size {batch_size}: expected seed >= 0, n >= 0 and batch_size >= 1"
        )

    # A generator of its own for each batch: batch n does not depend on the batches before it.
    starts = np.random.default_rng([seed, n]).integers(len(tokens) - n_ctx, size=batch_size)
    return _windows(tokens, starts, n_ctx)


def heldout_windows(tokens: UInt[np.ndarray, " stream"], n_ctx: int, max_windows: int) -> Int[Tensor, "window pos"]:
    """Windows of n_ctx + 1 tokens that share at most an end token, so that no token is predicted twice.

    Where there are more than `max_windows`, those kept are spread evenly over the stream, so that every part
    of a mixed corpus is measured. A remainder shorter than a window is left out. Raises PositionsError for a
    stream shorter than a window and sizes below 1.
    """
    return _windows(tokens, _heldout_offsets(tokens, n_ctx, max_windows), n_ctx)


def heldout_documents(corpus: TokenizedCorpus, n_ctx: int, max_windows: int) -> Int[Tensor, "window pos_less_one"]:
    """The number of the document that each predicted token of `heldout_windows` belongs to."""
    offsets = _heldout_offsets(corpus.heldout, n_ctx, max_windows)

    # The first token of a window is not predicted in it.
    predicted = offsets[:, None] + np.arange(1, n_ctx + 1)

    # The last document that begins at or before the token.
    return torch.from_numpy(np.searchsorted(corpus.heldout_starts, predicted, side="right") - 1)


def heldout_sources(config: RunConfig, corpus: TokenizedCorpus) -> list[str]:
    """Where each held-out document comes from, in the order of its tokens."""
    if corpus.heldout_sources is not None:
        return list(corpus.heldout_sources)
    rows = corpora.load(config.corpus, text_column=config.text_column)["heldout"]

    # Documents without text were left out of the tokens, and a cap may have cut the last ones off.
    return list(islice((row["source"] for row in rows if row["text"]), len(corpus.heldout_starts)))


def _heldout_offsets(tokens: UInt[np.ndarray, " stream"], n_ctx: int, max_windows: int) -> Int64[np.ndarray, " window"]:
    _check_window(tokens, n_ctx)
    if max_windows < 1:
        raise PositionsError(f"max_windows is {max_windows}: expected at least 1")

    # Windows of n_ctx predictions each; the last token of one is the first of the next.
    available = (len(tokens) - 1) // n_ctx
    kept = min(available, max_windows)
    return np.arange(kept) * available // kept * n_ctx


def _check_window(tokens: UInt[np.ndarray, " stream"], n_ctx: int) -> None:
    if n_ctx < 1:
        raise PositionsError(f"n_ctx is {n_ctx}: expected at least 1")
    if len(tokens) < n_ctx + 1:
        raise PositionsError(f"the corpus has {len(tokens)} tokens: expected at least {n_ctx + 1}, one more than n_ctx")


def _windows(
    tokens: UInt[np.ndarray, " stream"], starts: Int64[np.ndarray, " batch"], n_ctx: int
) -> Int[Tensor, "batch pos"]:
    return torch.from_numpy(tokens[starts[:, None] + np.arange(n_ctx + 1)].astype(np.int64))


def _fingerprint(known: tuple[object, ...], splits: Splits | None = None) -> str:
    digest = hashlib.sha256(repr((FORMAT, *known)).encode())
    if splits is not None:
        for split in ("train", "heldout"):
            digest.update(split.encode())
            for document in _documents(splits[split]):
                # With its length, so that moving a boundary between documents changes the digest.
                digest.update(len(document).to_bytes(8, "little") + document)
    return digest.hexdigest()[:16]


def _documents(split: Dataset | IterableDataset) -> Iterator[bytes]:
    for rows in split.iter(batch_size=1000):
        yield from (text.encode() for text in rows["text"] if text)


def _read(folder: Path) -> dict[str, np.ndarray] | None:
    """The arrays in `folder` as memory maps, or None where one is missing, cut short or altered."""
    try:
        # Written last: a cache without them was interrupted.
        digests = json.loads((folder / "digests.json").read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return _arrays(folder, digests)


def _arrays(folder: Path, digests: object) -> dict[str, np.ndarray] | None:
    """The arrays in `folder` as memory maps, or None where these are not their digests."""
    try:
        if digests != {name: sha256_of_file(folder / f"{name}.npy") for name in ARRAYS}:
            return None
    except FileNotFoundError:
        return None
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}


def _write(folder: Path, splits: Splits, max_bytes: int | None, encoding: _Encoding) -> None:
    """Tokenise both splits into `folder`; the digests, which make the arrays valid, are written last."""
    heldout_bytes = max_bytes and max_bytes // corpora.HELDOUT_EVERY
    train_bytes = max_bytes and max_bytes - max_bytes // corpora.HELDOUT_EVERY

    # A hub dataset may repeat a document in both splits. Digests of the held-out ones fit in memory; the texts may not.
    heldout_texts: set[bytes] = set()

    def heldout() -> Iterator[bytes]:
        for document in _first_bytes(_documents(splits["heldout"]), heldout_bytes):
            heldout_texts.add(hashlib.blake2b(document, digest_size=16).digest())
            yield document

    def train() -> Iterator[bytes]:
        for document in _documents(splits["train"]):
            if hashlib.blake2b(document, digest_size=16).digest() not in heldout_texts:
                yield document

    # Held-out text first, as its digests keep it out of the training text.
    _write_stream(folder, "heldout", heldout(), encoding)
    _write_stream(folder, "train", _first_bytes(train(), train_bytes), encoding)
    digests = json.dumps({name: sha256_of_file(folder / f"{name}.npy") for name in ARRAYS})
    write_whole(folder / "digests.json", lambda file: file.write(digests.encode()))


def _first_bytes(documents: Iterable[bytes], max_bytes: int | None) -> Iterator[bytes]:
    """The documents up to `max_bytes` in all, and at least one."""
    total = 0
    for document in documents:
        if max_bytes is not None and total and total + len(document) > max_bytes:
            return
        total += len(document)
        yield document


def _write_stream(folder: Path, split: str, documents: Iterator[bytes], encoding: _Encoding) -> None:
    starts: list[int] = []
    length = 0

    def write_tokens(file: IO[bytes]) -> None:
        nonlocal length
        _write_header(file, 0, encoding.dtype)
        console = Console(stderr=True)
        for document in track(
            documents, f"tokenising {split}", console=console, transient=True, disable=not console.is_terminal
        ):
            starts.append(length)

            # Written as it comes: a corpus may be larger than memory.
            tokens = np.append(encoding.encode(document), encoding.end).astype(encoding.dtype)
            file.write(tokens.tobytes())
            length += len(tokens)

        # The length is known now; the header has the size that it had.
        file.seek(0)
        _write_header(file, length, encoding.dtype)

    write_whole(folder / f"{split}.npy", write_tokens)
    if not starts:
        raise PositionsError(f"the {split} split of the corpus has no text: expected at least one document")
    write_whole(folder / f"{split}_starts.npy", lambda file: np.save(file, np.array(starts, np.int64)))


def _write_header(file: IO[bytes], length: int, dtype: str) -> None:
    """The header of a one-dimensional .npy file, which numpy pads to one size for any length."""
    header = {"descr": dtype, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)
