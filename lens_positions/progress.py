"""Progress of long work on standard error: what, how far, how long still; nothing where nobody watches."""

from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


def track_progress(items: Sequence[Item], what: str, *, quick: bool = False) -> Iterator[Item]:
    """The items one by one, with a bar that is gone at the end.

    Args:
        items: the pieces of work, of about equal length.
        what: a word for it.
        quick: show nothing; so too where standard error is not a terminal.
    """
    console = Console(stderr=True)
    return iter(track(items, what, console=console, transient=True, disable=quick or not console.is_terminal))


def announce_parts(parts: Sequence[Item], what: str) -> Iterator[Item]:
    """The parts of long work one by one, each with a line when it is done: what, how far, how long it took."""
    console = Console(stderr=True, highlight=False)
    for number, part in enumerate(parts, start=1):
        start = perf_counter()
        yield part
        if console.is_terminal:
            took = perf_counter() - start
            name = part[0] if isinstance(part, tuple) else part
            console.print(f"{what}: {name} ({number} of {len(parts)}, {took:.1f} s)", markup=False)
