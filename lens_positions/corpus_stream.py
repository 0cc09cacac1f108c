"""Documents of a corpus one after another, however long it is: what a run over all of it reads.

The names are those of `corpora.load`, and so are the documents that are held out. Files are read as they are needed, so
that memory does not grow with the corpus; one pass before the work counts the characters and finds whatever cannot be
read, so that hours of work do not end at a broken byte.
"""

import codecs
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from . import corpora
from .errors import PositionsError

Split = Literal["heldout", "all"]

BLOCK = 1 << 20
"""Bytes of a text file that are read at once."""


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        text: all of it, or its beginning.
        source: where it is from.
        whole: whether it is all of it.
    """

    text: str
    source: str
    whole: bool = True


class Documents:
    """The documents of a corpus, which can be gone through several times.

    Attributes:
        name: what was asked for.
        characters: how many there are; None for a dataset of the hub, which nobody has counted.
    """

    def __init__(
        self, corpus: str | Iterable[str], split: Split = "heldout", characters: int | None = None, column: str = "text"
    ) -> None:
        """Find the corpus, and read it through once where it is made of files.

        Args:
            corpus: what `corpora.load` takes, or documents as texts (all of which are read, whatever the split).
            split: the held-out documents, or every one.
            characters: at most so many; of the held-out ones as `corpora.heldout_excerpts`, else from the beginning.
            column: the column of a table or a hub dataset that holds the text.

        Raises:
            PositionsError: as `corpora.load`, or there is no text.
        """
        if split not in ("heldout", "all"):
            raise PositionsError(f'split is {split!r}; expected "heldout" or "all".')
        if characters is not None and characters < 1:
            raise PositionsError(f"characters is {characters}; expected at least 1.")
        self.name = corpus if isinstance(corpus, str) else "texts"
        self._corpus = corpus if isinstance(corpus, str) else _valid_texts(corpus)
        self._split, self._limit, self._column = split, characters, column

        self._kept: list[Document] | None = None

        # Excerpts are taken evenly over the whole split, so they are chosen at once; all else is read as it comes.
        streamed = isinstance(corpus, str) and corpora.is_hub_dataset(corpus)
        if isinstance(corpus, str) and split == "heldout" and characters is not None and not streamed:
            excerpts = corpora.heldout_documents(corpus, characters, text_column=column)
            self._kept = [Document(text, source, whole) for text, source, whole in excerpts]

        # The one pass that meets whatever cannot be read before the work begins; of the hub it would download all.
        self.characters = None if streamed else sum(len(document.text) for document in self)
        if self.characters == 0:
            which = "held-out text" if split == "heldout" and isinstance(corpus, str) else "text"
            raise PositionsError(f"{self.name} has no {which}; expected at least one document that is not empty.")

    def __iter__(self) -> Iterator[Document]:
        """Each document that has text, in order."""
        left = self._limit
        for document in self._kept if self._kept is not None else self._every():
            if not document.text.strip():
                continue
            if left is None or self._kept is not None:
                yield document
                continue
            if len(document.text) <= left:
                yield document

            # The last document is cut, and says so: a byte model must not see the end of a document there.
            elif left:
                yield Document(document.text[:left], document.source, whole=False)
            left -= min(left, len(document.text))
            if not left:
                return

    def _every(self) -> Iterator[Document]:
        if not isinstance(self._corpus, str):
            yield from (Document(text, self.name) for text in self._corpus)
            return

        # A name of a corpus goes before a file of that name, as in `corpora.load`.
        path = Path(os.path.expanduser(self._corpus))
        if self._corpus in corpora.NAMES or not (self._corpus and os.path.exists(path)):
            splits = corpora.load(self._corpus, text_column=self._column)
            for split in ("heldout",) if self._split == "heldout" else ("train", "heldout"):
                yield from (Document(row["text"], row["source"]) for row in splits[split])
            return
        documents = (document for document in _at(path, self._column) if document.text.strip())
        yield from _heldout(documents) if self._split == "heldout" else documents


def _valid_texts(texts: Iterable[str]) -> list[str]:
    found = [texts] if isinstance(texts, str) else list(texts)
    for number, text in enumerate(found):
        if not isinstance(text, str):
            raise PositionsError(f"document {number} is a {type(text).__name__}; expected documents as texts.")
    return found


def _heldout(documents: Iterable[Document]) -> Iterator[Document]:
    """Every twentieth document, or the last one of fewer than twenty: what `corpora.load` holds out."""
    last, count = None, 0
    for count, last in enumerate(documents, start=1):
        if count % corpora.HELDOUT_EVERY == 0:
            yield last
    if last is not None and 1 < count < corpora.HELDOUT_EVERY:
        yield last


def _at(path: Path, column: str) -> Iterator[Document]:
    """The documents of a folder, a table or a text file, in the order of `corpora.load`."""
    if path.is_dir():
        files = (file for file in path.rglob("*") if file.is_file())
        visible = (f for f in files if not any(part.startswith(".") for part in f.relative_to(path).parts))
        for file in sorted(visible):
            try:
                text = file.read_bytes().decode("utf-8-sig")
            except UnicodeDecodeError:
                continue  # `load` leaves them out too
            except OSError as error:
                raise PositionsError(
                    f"{file} could not be read: {error.strerror}; expected a readable file."
                ) from error
            yield Document(text, file.relative_to(path).as_posix())
    elif path.suffix.lower() in corpora.TABLES:
        for text in corpora.table_texts(path, column):
            yield Document(text, path.name)
    else:
        for text in _paragraphs(path):
            yield Document(text.strip("\r\n"), path.name)


def _paragraphs(path: Path) -> Iterator[str]:
    """A text file cut at blank lines, a block of bytes at a time."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    passed, rest = 0, ""
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                rest += decoder.decode(block)
                passed += len(block)

                # Whitespace at the end of a block may go on as a longer blank line: it waits for the next one.
                text = rest.rstrip()
                *whole, last = corpora.BLANK_LINES.split(text)
                rest = last + rest[len(text) :]
                yield from whole

        # A file that ends inside a character is refused here.
        rest += decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        place = "in the middle of a character" if error.reason == "unexpected end of data" else "in what is no text"
        raise PositionsError(f"{path} ends or breaks off {place} near byte {passed}; expected UTF-8.") from error
    except OSError as error:
        raise PositionsError(f"{path} could not be read: {error.strerror}, expected a file.") from error
    yield from corpora.BLANK_LINES.split(rest)
