"""Processes that are forked from one that has imported everything: no seconds of imports, and no checks of shapes.

What a test does to them is what it would do to a process that a shell began: send a signal, wait, read what it wrote.
"""

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def command(words: list[str]) -> None:
    """`lens-positions` with these words."""
    from lens_positions.cli import main

    sys.exit(main(words))


def script(words: list[str]) -> None:
    """A file of Python, and its arguments."""
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


class Command:
    """A running command line, of `lens-positions` or a script; its standard output and error go to files."""

    def __init__(
        self,
        folder: Path,
        *words: Any,
        work: Callable[[list[str]], object] = command,
        before: Callable[[], None] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        number = len(list(folder.glob("*.stdout")))
        self.paths = [folder / f"{number}.{name}" for name in ("stdout", "stderr")]
        given = self.paths, work, [str(word) for word in words], before, environment or {}
        self.process = server().Process(target=run, args=given)
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, timeout: float | None = 300) -> int | None:
        self.process.join(timeout)
        return self.process.exitcode

    def said(self) -> tuple[str, str]:
        """Standard output and standard error."""
        out, error = (path.read_text("utf-8") for path in self.paths)
        return out, error


def server() -> Any:
    """The process that forks; begun with the first command, it ends with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["forked_imports"])
    words = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(words))
    return context


def run(
    paths: list[Path],
    work: Callable[[list[str]], object],
    words: list[str],
    before: Callable[[], None] | None,
    environment: dict[str, str],
) -> None:
    """What the child does."""
    os.environ.update(environment)
    for number, path in enumerate(paths, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    # Those of a process that a shell begins; the server of forks ignores an interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if before is not None:
        before()

    work(words)
