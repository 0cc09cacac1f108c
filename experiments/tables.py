"""The results of the study as tidy tables: a file for each measurement, whose rows say of which run they are.

    experiments/results/runs.jsonl      what was trained, from what, by which code; a line each run
    experiments/results/heldout.csv     the loss by held-out document and length of text
    experiments/results/boundaries.csv  and the other measurements, those of RoPE itself among them
    experiments/results/measured.jsonl  the weights, command and code of every measurement; a line each
    experiments/results/maximum.csv     the maximum-retrieval task; maximum.jsonl says how it was trained

The first columns are suite, variant and seed. A model that is no run of a suite has the suite "models", its name as the
variant, and no seed. `gather` writes these files; whatever tells results reads them here.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from lens_positions.errors import PositionsError
from lens_positions.training.schema import MaximumResults, Measured, RunResults, parse_json

from .options import ROPE_VARIANTS, VARIANTS

MODELS = "models"
"""The suite of models that are no runs of one."""

RUNS, MEASURED, MAXIMUM = "runs.jsonl", "measured.jsonl", "maximum.jsonl"


class RunName(NamedTuple):
    """Of what a row is."""

    suite: str
    variant: str
    seed: int | None

    def __str__(self) -> str:
        return self.variant if self.seed is None else f"{self.suite}-{self.variant}-{self.seed}"


KEYS = list(RunName._fields)


def run_of_model(name: str) -> RunName:
    """The run that a model is, by the name that `rope` gives it: tiny-static-0, or the name of another model."""
    suite_and_variant, _, seed = name.rpartition("-")
    suite, _, variant = suite_and_variant.partition("-")
    if seed.isdecimal() and variant in (*VARIANTS, *ROPE_VARIANTS):
        return RunName(suite, variant, int(seed))
    return RunName(MODELS, name, None)


@dataclass(frozen=True)
class Tables:
    """All results.

    Args:
        folder: where they are.
        measurements: the tables of a measurement, by run.
        runs: what is known of each run, as its run.json or diverged.json had it.
        measured: of each run the measurements, and on which weights each was made.
        maximum: how each seed of the maximum-retrieval task was trained.
    """

    folder: Path
    measurements: dict[str, dict[RunName, pd.DataFrame]] = field(default_factory=dict)
    runs: dict[RunName, RunResults] = field(default_factory=dict)
    measured: dict[RunName, dict[str, Measured]] = field(default_factory=dict)
    maximum: dict[int, MaximumResults] = field(default_factory=dict)

    def path(self, name: str) -> str:
        """The file of a measurement, as RESULTS.md gives it."""
        return (self.folder / f"{name}.csv").as_posix()

    def table(self, name: str, run: RunName) -> pd.DataFrame | None:
        """A measurement of a run; None where it was not measured."""
        return self.measurements.get(name, {}).get(run)

    def seeds(self, name: str, suite: str, variant: str) -> dict[int, pd.DataFrame]:
        """A measurement of the runs of a variant, by seed and in its order."""
        tables = self.measurements.get(name, {})
        found = {run.seed: table for run, table in tables.items() if (run.suite, run.variant) == (suite, variant)}
        return {seed: found[seed] for seed in sorted(seed for seed in found if seed is not None)}


def read_tables(folder: Path) -> Tables:
    """The results in a folder; empty where there are none.

    Raises:
        PositionsError: a file is damaged.
    """
    paths = sorted(path for path in folder.glob("*.*") if path.suffix in (".csv", ".jsonl") and path.is_file())
    return tables_of({path.name: path.read_bytes() for path in paths}, folder)


def tables_of(files: Mapping[str, bytes], folder: Path) -> Tables:
    """The results that files hold, by their names.

    Raises:
        PositionsError: a file is damaged.
    """
    measurements = {
        name.removesuffix(".csv"): _by_run(content, folder / name)
        for name, content in files.items()
        if name.endswith(".csv")
    }
    runs: dict[RunName, RunResults] = {}
    for run, _, described in _lines(files, RUNS, folder, RunResults):
        seed: Any = {} if run.seed is None else {"seed": run.seed}
        runs[run] = {"variant": run.variant, **seed, **described}
    measured: dict[RunName, dict[str, Measured]] = {}
    for run, table, entry in _lines(files, MEASURED, folder, Measured):
        measured.setdefault(run, {})[table] = entry
    maximum = {run.seed: entry for run, _, entry in _lines(files, MAXIMUM, folder, MaximumResults)}
    return Tables(folder, measurements, runs, measured, {seed: of for seed, of in maximum.items() if seed is not None})


def _by_run(content: bytes, path: Path) -> dict[RunName, pd.DataFrame]:
    """The rows of each run, without the columns that name it."""
    try:
        # The type of a column is that of all of its values, not that of the chunk that they were read with.
        types: Any = {"suite": str, "variant": str, "seed": "Int64"}
        whole = pd.read_csv(io.BytesIO(content), low_memory=False, dtype=types)
        groups: Any = whole.groupby(KEYS, sort=False, dropna=False)
    except (ValueError, KeyError, TypeError) as error:
        raise PositionsError(f"{path} is damaged ({error}); expected a table that gather wrote.") from error
    return {
        RunName(suite, variant, None if pd.isna(seed) else int(seed)): rows.drop(columns=KEYS).reset_index(drop=True)
        for (suite, variant, seed), rows in groups
    }


def _lines(files: Mapping[str, bytes], name: str, folder: Path, schema: Any) -> list[tuple[RunName, str, Any]]:
    """The lines of a file: of which run, of which table (where it says one), and the rest, which fits a schema."""
    found = []
    for number, line in enumerate(files.get(name, b"").splitlines(), 1):
        where = f"{folder / name}, line {number},"
        values = parse_json(line, dict[str, Any], where)
        if missing := [key for key in KEYS if key not in values]:
            raise PositionsError(f"{where} is damaged (it has no {missing[0]}); expected what gather wrote.")
        run, table = RunName(*(values.pop(key) for key in KEYS)), values.pop("table", "")
        found.append((run, table, parse_json(to_line(values), schema, where)))
    return found


def to_line(values: Mapping[str, Any]) -> bytes:
    """A line of a .jsonl file, without its end."""
    return json.dumps(values, ensure_ascii=False).encode()
