"""Progress of long work on standard error: what, how far, how long still; nothing where nobody watches."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


def tracked(items: Sequence[Item], what: str, *, quick: bool = False) -> Iterator[Item]:
    """The items one by one, with a bar that is gone at the end.

    Args:
        items: the pieces of work, of about equal length.
        what: a word for it.
        quick: show nothing; so too where standard error is not a terminal.
    """
    console = Console(stderr=True)
    return iter(track(items, what, console=console, transient=True, disable=quick or not console.is_terminal))
