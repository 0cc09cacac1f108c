"""Progress of long work on standard error: how long it will take, how far it is; nothing for work that is short.

A bar stands where somebody watches a terminal. How long work will take is said beforehand to whoever asked for it with
`say_durations`, as the command line does: in a log file there is no bar to look at.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from time import perf_counter
from typing import TypeVar

Item = TypeVar("Item")

Say = Callable[[str], None]

LONG = 10.0
"""Seconds of work that are worth a sentence."""

MEASURED = 1.0
"""Seconds of work that an estimate is made from: a first piece alone may be slow, as caches and threads warm up."""


@dataclass
class _Passes:
    """How many loops make one piece of work, and whether one of them has said how long all take."""

    number: int = 1
    said: bool = False


_say: ContextVar[Say | None] = ContextVar("say", default=None)
_passes: ContextVar[_Passes | None] = ContextVar("passes", default=None)


@contextmanager
def say_durations(say: Say) -> Iterator[None]:
    """Say of each long loop inside how long it will take, once its first second has shown how fast this machine is."""
    token = _say.set(say)
    try:
        yield
    finally:
        _say.reset(token)


@contextmanager
def several_passes(number: int) -> Iterator[None]:
    """Take the loops inside as that many equal parts of one piece of work: the first speaks for all of them."""
    token = _passes.set(_Passes(number))
    try:
        yield
    finally:
        _passes.reset(token)


@contextmanager
def estimated(seconds: float, what: str) -> Iterator[None]:
    """Say at once how long the work inside will take, as somebody has worked out; its loops then say nothing of it."""
    say = _say.get()
    if say is not None and seconds >= LONG:
        say(f"about {rough_time(seconds)} on this machine: {what}")
    token = _passes.set(_Passes(said=True))
    try:
        yield
    finally:
        _passes.reset(token)


def durations_wanted() -> bool:
    """Whether anybody wants to be told how long work will take."""
    return _say.get() is not None


def track_progress(items: Sequence[Item], what: str, *, quick: bool = False) -> Iterator[Item]:
    """The items one by one, with a bar that is gone at the end.

    Args:
        items: the pieces of work, of about equal length.
        what: a word for it.
        quick: show no bar; so too where standard error is not a terminal.
    """
    from rich.console import Console
    from rich.progress import track

    # Standard error, as standard output is for results that may go into a file.
    console = Console(stderr=True)
    tracked = track(items, what, console=console, transient=True, disable=quick or not console.is_terminal)
    return _with_estimate(tracked, len(items), what)


def _with_estimate(items: Iterable[Item], number: int, what: str) -> Iterator[Item]:
    """The items, and in between, once, a sentence on how long the rest of them will take."""
    say, passes = _say.get(), _passes.get() or _Passes()
    waits = say is not None and not passes.said
    start = perf_counter()
    for done, item in enumerate(items):
        # Between two items: `done` of them were worked on since the start.
        took = perf_counter() - start
        if waits and done and took >= MEASURED:
            waits, passes.said = False, True
            each = took / done
            left = each * (number - done) + each * number * (passes.number - 1)
            if left >= LONG and say is not None:
                times = f", {passes.number} times" if passes.number > 1 else ""
                say(f"about {rough_time(left)} on this machine: {what}, {number - done} of {number} parts left{times}")
        yield item


def rough_time(seconds: float) -> str:
    """A time as a person would say it: to ten seconds, then to minutes, then to half hours.

    >>> rough_time(42), rough_time(130), rough_time(9000)
    ('40 seconds', '2 minutes', '2.5 hours')
    """
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} seconds"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{round(seconds / 1800) / 2:g} hours"


def announce_parts(parts: Sequence[Item], what: str) -> Iterator[Item]:
    """The parts of long work one by one, each with a line when it is done: what, how far, how long it took."""
    from rich.console import Console

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
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

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
