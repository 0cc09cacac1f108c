"""What is measured already of some weights, and what is left: a file for each table, and measured.json beside them."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from lens_positions import corpora
from lens_positions.checkpoint_files import write_whole
from lens_positions.errors import PositionsError

from .gather import read_measured
from .suite import commit, print_progress


def measure_left(
    tables: Mapping[str, tuple[Callable[[], pd.DataFrame], str]], folder: Path, weights: dict[str, str], title: str
) -> None:
    """Write what is not measured yet of some weights, each table with the command that prints it, and measured.json."""
    described = folder / "measured.json"
    done: dict[str, Any] = read_measured(described) if described.exists() else {}
    for name, (measurement, command) in tables.items():
        if done.get(name, {}).get("sha256") == weights:
            continue
        began = time.monotonic()
        entry: dict[str, Any] = {"sha256": weights, "command": command}
        try:
            table = measurement()
        except corpora.MissingPackageError:  # says nothing about the model: it is left to where the text is
            raise
        except PositionsError as error:  # a measurement that this model does not have
            (folder / f"{name}.csv").unlink(missing_ok=True)
            entry |= {"rows": 0, "refused": str(error)}
        else:
            csv = table.to_csv(index=False, float_format="%.6g").encode()
            write_whole(folder / f"{name}.csv", lambda file, csv=csv: file.write(csv))  # type: ignore[misc]
            entry |= {"rows": len(table)}
        seconds = time.monotonic() - began
        done[name] = entry | {"seconds": math.ceil(seconds), "git": commit()}
        written = (json.dumps(done, indent=2) + "\n").encode()
        write_whole(described, lambda file, written=written: file.write(written))  # type: ignore[misc]
        print_progress(f"{title}: {name}, {seconds:.0f} s")
