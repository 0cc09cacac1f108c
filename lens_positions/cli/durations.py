"""How long commands take: said before a model is loaded, and in their help, by the figures of `docs/measurements.md`.

Loading a large model takes minutes by itself, so who asked should know before it whether to wait. Once a second of the
work is done, `progress.py` says how long the rest takes on this machine with this model.
"""

import sys
from dataclasses import dataclass

from ..progress import LONG, rough_time
from .app import complain


@dataclass(frozen=True)
class Duration:
    """CPU seconds of one thread with `bilingual-per-layer` (1.6 million parameters), loading it included.

    Attributes:
        start: those that do not depend on the text.
        thousand: those of 1,000 characters.
    """

    start: float
    thousand: float = 0.0

    def seconds(self, characters: int) -> float:
        """The seconds for so much text."""
        return self.start + self.thousand * characters / 1000


DURATIONS = {
    "ablate": Duration(7, 1.45),
    "absolute": Duration(20),
    "boundaries": Duration(80),
    "dispersion": Duration(7, 0.77),
    "extremes": Duration(7, 0.2),
    "frequencies": Duration(7, 0.36),
    "heads": Duration(7, 0.2),
    "kinds": Duration(7, 0.2),
    "map": Duration(7, 0.3),
    "names": Duration(20),
    "report": Duration(7, 0.6),
    "saturation": Duration(7, 0.2),
    "specialisation": Duration(7, 0.2),
}


def announce_duration(command: str, characters: int | None = 0) -> None:
    """Say in a terminal how long a command will take, roughly, where it is ten seconds or more.

    In a log the measured time follows (`progress.py`), and a refusal stays the only line.

    Args:
        command: its name.
        characters: of the text that it reads, at most; None: all there is, which nobody has counted yet.
    """
    if not sys.stderr.isatty():
        return
    duration = DURATIONS[command]
    if characters is None:
        what, seconds = " for every 100,000 characters", duration.thousand * 100
    else:
        what, seconds = "", duration.seconds(characters)
    if seconds >= LONG:
        complain(f"{command} takes about {rough_time(seconds)}{what} with a shipped model, more with larger ones")
