"""How a command ends: its exit status, and at most one sentence on standard error for whatever is no bug.

0     done
1     whoever read standard output has gone (`... | head -1`)
2     a person can mend it; the sentence says what was given and what was expected
130   interrupted (SIGINT)
143   terminated (SIGTERM)
"""

import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from .errors import PositionsError

MEMORY_IS_OUT = ("can't allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed")
"""What torch says in a RuntimeError when there is no room for a tensor."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: an interrupt by another name, so that whatever tidies up after one does so after the other."""


@dataclass
class Outcome:
    """The exit status of a command, as it is known so far."""

    status: int = 0


def exit_status(program: str, command: Callable[[], int]) -> int:
    """Run a command to its end, as `command_outcome`, and return its exit status."""
    with command_outcome(program) as outcome:
        outcome.status = command()
    return outcome.status


@contextmanager
def command_outcome(program: str) -> Iterator[Outcome]:
    """Run what is inside to its end, whatever that is, and keep its exit status in what is given.

    A KeyboardInterrupt that is raised inside may carry a sentence.

    Args:
        program: what the sentence on standard error begins with.
    """
    outcome = Outcome()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever the locale can write, text of every script is printed
            stream.reconfigure(errors="backslashreplace")
    try:
        with _termination(), warnings.catch_warnings():
            warnings.showwarning = lambda message, *where, **more: complain(program, str(message))
            yield outcome
            _flush()
    except BrokenPipeError:
        _drop_output()
        outcome.status = 1
    except KeyboardInterrupt as interruption:
        if interruption.args:
            complain(program, str(interruption))
        outcome.status = 143 if isinstance(interruption, Terminated) else 130
    except (PositionsError, OSError, MemoryError, RuntimeError) as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        _drop_output()
        complain(program, sentence)
        outcome.status = 2


def complain(program: str, sentence: str) -> None:
    """Say in one line on standard error, if there is one."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(f"{program}: {' '.join(sentence.split())}", file=sys.stderr, flush=True)


def interruption(number: int | None) -> type[KeyboardInterrupt]:
    """What a signal, by its number, is as an exception."""
    return Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _sentence(error: Exception) -> str | None:
    """What a person is told; None for an error that is a bug."""
    if isinstance(error, MemoryError) or any(words in str(error) for words in MEMORY_IS_OUT):
        return f"there is not enough memory ({' '.join(str(error).split())[:200]}); expected smaller sizes."
    return None if isinstance(error, RuntimeError) else str(error)


@contextmanager
def _termination() -> Iterator[None]:
    """Let SIGTERM end what runs inside as an interrupt does."""
    # Python allows signal handlers in the main thread alone.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number: int, _frame: object) -> None:
        raise Terminated

    handlers: dict[int, Callable[[int, Any], None]] = {signal.SIGTERM: end}
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # while everything was imported
        handlers[signal.SIGINT] = signal.default_int_handler
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            # None is a handler that was not set from Python.
            signal.signal(number, handler or signal.SIG_DFL)


def _flush() -> None:
    """Write what is buffered while a failure can still be told."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _drop_output() -> None:
    """Send what is still buffered nowhere, if it cannot be written: the interpreter would complain at its end."""
    try:
        _flush()
    except OSError:
        with suppress(OSError, ValueError):
            # At the level of the file descriptor: the interpreter flushes its own buffers once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
