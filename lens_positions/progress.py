"""Progress of long work on standard error: what, how far, how long still; nothing where nobody watches."""

from collections.abc import Iterator, Sequence
from datetime import timedelta
from time import perf_counter
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, track

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


class Counter:
    """How far long work on a stream is: its share where the end is known, how fast it goes, how long it still takes.

    A bar in a terminal; elsewhere, as in the log of a machine, a line a minute.
    """

    EVERY = 60.0
    """Seconds between two lines."""

    def __init__(self, what: str, total: float | None, *, quick: bool = False) -> None:
        """Say what is done.

        Args:
            what: a word for it.
            total: the amount of it all, in any unit; None if nobody knows.
            quick: show nothing.
        """
        self._what, self._total, self._quick = what, total, quick
        self._done = self._worked = 0.0
        self._made = 0
        self._start = self._said = perf_counter()
        self._console = Console(stderr=True, highlight=False)
        what_is_done, rate = (TextColumn(form, markup=False) for form in ("{task.description}", "{task.fields[rate]}"))
        columns = (what_is_done, BarColumn(), TaskProgressColumn(), rate)
        self._bar = Progress(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task(what, total=total, rate="")

    def __enter__(self) -> "Counter":
        """Begin; a bar stands until the end."""
        if self._console.is_terminal and not self._quick:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End, and take the bar away."""
        if self._bar.live.is_started:  # else it would print an empty line
            self._bar.stop()

    def skip(self, amount: float) -> None:
        """Count what was there already or is another's work."""
        self._done += amount
        self._show()

    def add(self, amount: float, made: int, unit: str) -> None:
        """Count work, and how much it made of what."""
        self._done += amount
        self._worked += amount
        self._made += made
        took = max(perf_counter() - self._start, 1e-9)
        said = f"{self._made / took:,.1f} {unit}/s"
        if self._total is not None:
            # By what was worked on: what is skipped takes no time.
            left = max(self._total - self._done, 0) * took / max(self._worked, 1e-9)
            said += f", at most {timedelta(seconds=round(left))} left"
        self._show(said)

    def _show(self, rate: str | None = None) -> None:
        self._bar.update(self._task, completed=self._done)
        if rate is not None:
            self._bar.update(self._task, rate=rate)
        if rate is None or self._quick or self._console.is_terminal or perf_counter() - self._said < self.EVERY:
            return
        self._said = perf_counter()
        share = "" if self._total is None else f"{self._done / self._total:.1%}, "
        self._console.print(f"{self._what}: {share}{rate}", markup=False, soft_wrap=True)
