"""What figures and pages need before anything is drawn: characters that can be seen, and a place to be written to.

No library for drawing is imported here, so that a command can refuse what cannot be done at once.
"""

import os
import unicodedata
from contextlib import suppress
from pathlib import Path

from ..errors import PositionsError

SUBSTITUTE = "·"
KINDS = (".png", ".svg", ".pdf")
"""Of files that a figure can be written to."""


class MissingFontError(PositionsError):
    """No installed font can draw the Chinese characters of a text.

    >>> issubclass(lp.viz.MissingFontError, lp.PositionsError)
    True
    """


def visible_character(character: str) -> str:
    """A character as it is shown: whitespace gets a mark, what cannot stand alone or be printed a substitute."""
    marks = {"\n": "⏎", "\r": "␍", "\t": "⇥"}
    if character in marks:
        return marks[character]
    if unicodedata.category(character) == "Zs":
        return "␣"

    # An accent alone would stand on the character before it.
    if unicodedata.combining(character):
        return "◌" + character
    return character if character.isprintable() else SUBSTITUTE


def visible_text(text: str) -> str:
    """A text of which every character can be seen."""
    return "".join(map(visible_character, text))


def write_whole(path: Path, content: bytes, what: str) -> None:
    """Write a file; what was there stays until the new one is whole.

    Raises:
        PositionsError: a place that cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        if path.exists() and not path.is_file():  # /dev/stdout, which must not become a file
            path.write_bytes(content)
            return
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise PositionsError(
            f"the {what} cannot be written to {path} ({error.strerror}); expected a writable folder with room."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def check_path(path: str | Path) -> None:
    """Refuse a path at which no figure can be written.

    Raises:
        PositionsError: an unknown suffix, or a folder that does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in KINDS:
        raise PositionsError(f"the figure's path is {path}; expected a name that ends in .png, .svg or .pdf.")
    if not path.parent.is_dir():
        raise PositionsError(f"the figure's path is {path}; expected a folder that exists, and {path.parent} does not.")


def check_page(path: str | Path) -> None:
    """Refuse a path at which no page can be written.

    Raises:
        PositionsError: a name that does not end in .html, a folder, or one that does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise PositionsError(f"the page's path is {path}; expected a name that ends in .html.")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        what = f"{path.parent} cannot be written" if path.parent.is_dir() else f"there is no folder {path.parent}"
        what = "that is a folder" if path.is_dir() else what
        raise PositionsError(f"the page's path is {path}, and {what}; expected a file in an existing folder.")
