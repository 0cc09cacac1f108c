"""How long imports and commands take before they answer: CPU seconds of fresh processes, user and system together.

The commands take turns, so that a machine that slows down slows all of them; the figures are medians. Beside what the
package does stand an empty Python, `import torch`, and the libraries that a model needs whoever loads it.

    python benchmarks/startup.py [--turns 5] [--output FILE]
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import tyro

EMPTY, TORCH, LIBRARIES, IMPORT, BOTH, HELP, WRONG, SHOW = (
    "python -c pass",
    "import torch",
    "import transformer_lens.model_bridge",
    "import lens_positions",
    "import torch, lens_positions",
    "lens-positions --help",
    "lens-positions shwo (a wrong command)",
    'lens-positions show bilingual-per-layer "..."',
)
COMMANDS = {
    EMPTY: ["-c", "pass"],
    TORCH: ["-c", TORCH],
    LIBRARIES: ["-c", LIBRARIES],
    IMPORT: ["-c", IMPORT],
    BOTH: ["-c", BOTH],
    HELP: ["-m", "lens_positions", "--help"],
    "lens-positions show --help": ["-m", "lens_positions", "show", "--help"],
    WRONG: ["-m", "lens_positions", "shwo"],
    "lens-positions train --help": ["-m", "lens_positions", "train", "--help"],
    SHOW: ["-m", "lens_positions", "show", "bilingual-per-layer", "The President of the United States spoke."],
}
STATUS = {WRONG: 2}
AT_MOST = {HELP: 0.5, WRONG: 0.5}
"""CPU seconds."""

AT_MOST_OVER_TORCH = 1.0
"""CPU seconds that the package may add to `import torch`."""


@dataclass
class Options:
    """Options.

    Args:
        turns: runs of each command, after one that fills the caches.
        output: where the table is written as JSON.
    """

    turns: int = 5
    output: Path = Path("benchmarks/startup.json")


def cpu_seconds(name: str) -> float:
    """The user and system time of a command in a process of its own, and of its children."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *COMMANDS[name]], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != STATUS.get(name, 0):
        raise SystemExit(f"{name}: exit status {process.returncode}; expected {STATUS.get(name, 0)}.")
    return used.ru_utime + used.ru_stime


def measured(turns: int) -> dict[str, float]:
    """The median of each command over turns in which all run once."""
    for name in COMMANDS:
        cpu_seconds(name)
    taken = [{name: cpu_seconds(name) for name in COMMANDS} for _ in range(turns)]
    return {name: statistics.median(turn[name] for turn in taken) for name in COMMANDS}


def main() -> int:
    """Measure, print and write; 1 where a bar is missed."""
    options = tyro.cli(Options, description=__doc__)
    seconds = measured(options.turns)
    over = seconds[BOTH] - seconds[TORCH]
    print(f"{'CPU seconds':48} {'seconds':>8} {'of import torch':>16}")
    for name, value in seconds.items():
        bar = f"  at most {AT_MOST[name]:g}" if name in AT_MOST else ""
        print(f"{name:48} {value:8.2f} {value / seconds[TORCH]:16.2f}{bar}")
    print(f"{'lens_positions, beyond import torch':48} {over:8.2f} {'':16}  at most {AT_MOST_OVER_TORCH:g}")
    print(f"{'show, beyond the libraries of the model':48} {seconds[SHOW] - seconds[LIBRARIES]:8.2f}")
    described = {
        "unit": f"CPU seconds, user and system, median of {options.turns} turns",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "transformer-lens", "tyro")},
        "cpus": os.cpu_count(),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "over_import_torch": {name: round(value / seconds[TORCH], 3) for name, value in seconds.items()},
        "added_to_import_torch": round(over, 3),
        "at_most": AT_MOST | {"added_to_import_torch": AT_MOST_OVER_TORCH},
    }
    options.output.write_text(json.dumps(described, indent=2) + "\n", "utf-8")
    return int(over > AT_MOST_OVER_TORCH or any(seconds[name] > bar for name, bar in AT_MOST.items()))


if __name__ == "__main__":
    sys.exit(main())
