"""The corpus `bilingual-large`: English and Chinese prose that is open to all, built by recipe from its sources.

`large_corpus.toml` names each source, its licence and how its documents are cut. The documents are text files in a
folder, `english/*.txt` and `chinese/*.txt`, so that anyone can read, count or leave out what a model is trained on.
"""

import hashlib
import html
import os
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from pydantic import BaseModel, ConfigDict

from .errors import PositionsError

RECIPE = Path(__file__).with_name("large_corpus.toml")
FOLDER_VARIABLE = "LENS_POSITIONS_LARGE_CORPUS"


class Source(BaseModel):
    """One entry of the recipe; the comment at its top says what each field means."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    language: Literal["english", "chinese"]
    title: str
    licence: str
    url: str
    commit: str
    files: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    document: Literal["file", "folder"] = "file"
    format: Literal["xml", "html", "markdown"]
    root: str = ""
    blocks: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    contains: str = ""
    strip: str = ""
    until: str = ""
    sha256: str


def sources(recipe: Path = RECIPE) -> list[Source]:
    """The sources of the recipe, in its order."""
    return [Source(**entry) for entry in tomllib.loads(recipe.read_text("utf-8"))["source"]]


def default_folder() -> Path:
    """Where the corpus lies: in the folder that LENS_POSITIONS_LARGE_CORPUS names, else in the user's cache."""
    given = os.environ.get(FOLDER_VARIABLE)
    return Path(given) if given else Path.home() / ".cache" / "lens-positions" / "bilingual-large"


def build(
    folder: Path, heldout: Iterable[str], recipe: list[Source] | None = None, report: Callable[[str], None] = print
) -> None:
    """Download the sources that `folder` lacks, cut them into documents, and write these.

    A document is left out if more than half of its text stands in lines that an earlier document or one of `heldout`
    has. What is whole in the folder already is kept, so that the same call goes on after an interruption.

    Raises:
        PositionsError: a source cannot be downloaded, its documents have another checksum than the recipe says, or
            the folder cannot be written.
    """
    recipe = sources() if recipe is None else recipe
    try:
        for language in {source.language for source in recipe}:
            (folder / language).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PositionsError(f"the corpus could not be written to {folder}: {error.strerror}") from error

    # What is measured on must not stand in the text that is added to train on.
    seen = {line for text in heldout for line in _lines(text)}
    for source in recipe:
        documents = read_documents(folder, source)
        is_whole = checksum(documents) == source.sha256
        if not is_whole:
            report(f"{source.name}: downloading {source.url}")
            documents = _documents_of(source, _checkout(source, folder / ".downloads" / source.name))

        # Also of what is there already, so that later sources know its lines.
        documents = _new(documents, seen)
        found = checksum(documents)
        if found != source.sha256:
            raise PositionsError(f"the documents of {source.name} have the checksum {found}: expected {source.sha256}")
        if not is_whole:
            _write(folder, source, documents)
        size = sum(len(document.encode()) for document in documents)
        report(f"{source.name}: {len(documents):,} documents, {size / 1e6:.1f} MB, {source.licence}")


def read_documents(folder: Path, source: Source) -> list[str]:
    """The documents of a source that lie in the folder, none if it was not built."""
    paths = sorted((folder / source.language).glob(f"{source.name}-*.txt"))
    return [path.read_bytes().decode(errors="replace") for path in paths]  # what is damaged, the checksum tells


def checksum(documents: list[str]) -> str:
    """The SHA-256 of the documents, each in UTF-8 and ended by a zero byte."""
    return hashlib.sha256(b"".join(document.encode() + b"\0" for document in documents)).hexdigest()


def _write(folder: Path, source: Source, documents: list[str]) -> None:
    language = folder / source.language

    # Fewer documents than before would leave old ones standing among the new.
    for stale in language.glob(f"{source.name}-*.txt"):
        stale.unlink()
    for number, document in enumerate(documents):
        (language / f"{source.name}-{number:04}.txt").write_bytes(document.encode())


def parts(folder: Path) -> list[list[tuple[str, str]]]:
    """The documents of each source with the source's name, checked against the recipe.

    Raises:
        PositionsError: a source is missing from the folder, or its documents are not those of the recipe.
    """
    found = []
    for source in sources():
        documents = read_documents(folder, source)
        if checksum(documents) != source.sha256:
            raise PositionsError(
                f"{folder} does not hold the documents of {source.name} that the recipe names: expected what "
                f"`lens-positions corpus` writes there; {FOLDER_VARIABLE} names another folder"
            )
        found.append([(document, source.name) for document in documents])
    return found


def _checkout(source: Source, folder: Path) -> Path:
    """The files of the source at its commit, whose name is git's checksum of them; no other files are downloaded."""
    folder.mkdir(parents=True, exist_ok=True)

    def git(*arguments: str) -> None:
        try:
            subprocess.run(
                ["git", "-C", str(folder), *arguments], check=True, env=os.environ | {"GIT_TERMINAL_PROMPT": "0"}
            )
        except FileNotFoundError as error:
            raise PositionsError("git is not installed: expected it, to download the sources of the corpus") from error
        except subprocess.CalledProcessError as error:
            raise PositionsError(
                f"{source.name} could not be downloaded: expected commit {source.commit} at {source.url} "
                f"(git {arguments[0]} ended with status {error.returncode})"
            ) from error

    git("init", "--quiet")  # which changes nothing in a repository that an interrupted call has left
    for key, value in {
        "remote.origin.url": source.url,
        "advice.detachedHead": "false",
        "core.autocrlf": "false",
    }.items():
        git("config", key, value)

    # One commit without its files; the checkout then asks for those of the sparse set alone.
    git("fetch", "--depth=1", "--filter=blob:none", "origin", source.commit)
    git("sparse-checkout", "set", "--no-cone", *(f"/{pattern}" for pattern in source.files))
    git("checkout", "--force", "--detach", source.commit)
    return folder


def _documents_of(source: Source, checkout: Path) -> list[str]:
    excluded = {path for pattern in source.exclude for path in checkout.glob(pattern)}

    # Sorted, as file systems list in orders of their own and the checksum is of one order.
    paths = sorted({path for pattern in source.files for path in checkout.glob(pattern)} - excluded)
    texts = {path: text for path in paths if (text := _text(source, path.read_text("utf-8-sig")))}
    if source.document == "file":
        return list(texts.values())
    folders = sorted({path.parent for path in texts})
    return ["\n".join(texts[path] for path in sorted(texts, key=_number) if path.parent == one) for one in folders]


def _number(path: Path) -> int:
    return int(re.findall(r"\d+", path.stem)[-1])


def _text(source: Source, file: str) -> str:
    if source.contains and not re.search(source.contains, file):
        return ""
    if source.strip:
        file = re.sub(source.strip, "", file)
    if source.format == "xml":
        text = _xml_text(file, source)
    else:
        text = _html_text(file) if source.format == "html" else _markdown_text(file)
    return re.split(source.until, text, maxsplit=1)[0].strip() if source.until else text


def _xml_text(file: str, source: Source) -> str:
    root = next(element for element in ElementTree.fromstring(file.lstrip()).iter() if _tag(element) == source.root)
    blocks: list[str] = []

    def inner(element: ElementTree.Element) -> str:
        # What stands after a dropped element (its tail) belongs to the text around it.
        parts = [inner(child) * (_tag(child) not in source.drop) + (child.tail or "") for child in element]
        return (element.text or "") * bool(_tag(element)) + "".join(parts)

    def walk(element: ElementTree.Element) -> None:
        for child in element:
            if _tag(child) in source.blocks:
                blocks.append(" ".join(inner(child).split()))
            elif _tag(child) not in source.drop:
                walk(child)

    walk(root)
    return "\n\n".join(block for block in blocks if block)


def _tag(element: ElementTree.Element) -> str:
    """The name of an element without its namespace, empty for a comment."""
    return element.tag.rsplit("}", 1)[-1] if isinstance(element.tag, str) else ""


def _html_text(file: str) -> str:
    """The lines of text, which every tag ends."""
    return "\n".join(_lines(html.unescape(re.sub("<[^>]*>", "\n", file))))


def _markdown_text(file: str) -> str:
    """Headings, paragraphs and lists, without code blocks, tables, pictures and the addresses of links."""
    from markdown_it import MarkdownIt

    blocks, tables = [], 0
    for token in MarkdownIt("commonmark").enable("table").parse(file):
        # The depth of tables: their cells are inline text as well, and are left out.
        tables += (token.type == "table_open") - (token.type == "table_close")
        if token.type == "inline" and not tables:
            kept = (
                child.content if child.type in ("text", "code_inline") else "\n" * child.type.endswith("break")
                for child in token.children or []
            )
            blocks.append("\n".join(_lines("".join(kept))))
    return "\n\n".join(block for block in blocks if block)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def _new(documents: list[str], seen: set[str]) -> list[str]:
    """The documents that are not mostly made of lines in `seen`, to which theirs are added."""
    kept = []
    for document in documents:
        lines = _lines(document)
        repeated = sum(len(line) for line in lines if line in seen)

        # By characters: many short lines (headings, licences) are common to documents that differ.
        if 2 * repeated <= sum(map(len, lines)):
            kept.append(document)
            seen.update(lines)
    return kept
