"""The files that runs and measurements leave, gathered into the tidy tables of `tables.py`.

`suite`, `measure`, `rope` and `maximum` write file by file, so that several processes can share a folder and an
interruption loses one file at most:

    runs/results/tiny/per_layer-0/...        of a run of a suite: run.json, heldout.csv and the measurements
    runs/results/rope/tiny-static-0/...      of a model, how it uses RoPE itself
    runs/results/maximum/seed-0.csv, .json   the maximum-retrieval task

Values are taken over letter by letter. What was gathered before stays, but for rows of the same table and run; and
where the weights of a run have changed, all that was measured of the old ones goes.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from lens_positions.checkpoint_files import write_whole
from lens_positions.errors import PositionsError
from lens_positions.training.schema import MaximumResults, Measured, RunResults, read_json

from .options import ROPE_VARIANTS, VARIANTS, GatherConfig
from .tables import KEYS, MAXIMUM, MEASURED, RUNS, RunName, Tables, run_of_model, tables_of, to_line

MAXIMUM_TASK = ("maximum", "retriever")
"""Suite and variant of the runs of the maximum-retrieval task."""

ROPE = ("rope", "machinery")
"""The folder of measurements of RoPE itself, and its name in the version before."""
"""The folder of models that `rope` measured."""


@dataclass(frozen=True)
class TidyTables:
    """Rows by file and run: the text of tables, or what the lines of a .jsonl file say."""

    tables: dict[str, dict[RunName, pd.DataFrame]] = field(default_factory=dict)
    lines: dict[str, dict[tuple[RunName, str], dict[str, Any]]] = field(default_factory=dict)

    def add_table(self, path: Path, run: RunName) -> None:
        """Take over a CSV."""
        self.tables.setdefault(path.name, {})[run] = _text_of(path.read_bytes(), path)

    def add_line(self, name: str, run: RunName, values: dict[str, Any], table: str = "") -> None:
        """Take over what a JSON file says."""
        self.lines.setdefault(name, {})[run, table] = values

    def files(self) -> dict[str, bytes]:
        """The tidy files, by name."""
        tables = {name: _table(by_run) for name, by_run in self.tables.items() if by_run}
        return tables | {name: _jsonl(by_run) for name, by_run in self.lines.items() if by_run}


def gather(options: GatherConfig) -> list[str]:
    """Gather what is in the folder of files into the tidy tables, and return the names of those that changed.

    Raises:
        PositionsError: there is nothing to gather, or a damaged file.
    """
    new = TidyTables()
    for folder in sorted(path for path in options.files.glob("*") if path.is_dir()):
        _add_folder(new, folder)
    if not new.tables and not new.lines:
        raise PositionsError(
            f"{options.files} has no results; expected what lens-positions experiments suite, measure, rope or maximum "
            "wrote."
        )
    options.results.mkdir(parents=True, exist_ok=True)
    options.files.mkdir(parents=True, exist_ok=True)
    with FileLock(options.files / "gather.lock"):  # what another process gathers meanwhile would be lost
        old = read_gathered(options.results)
        return _write(_merge(old, new).files(), {*old.tables, *old.lines}, options.results)


def _write(files: dict[str, bytes], before: set[str], folder: Path) -> list[str]:
    """Write what has changed, remove what has no rows left, and return the names of both."""
    changed = []
    for name, content in files.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            write_whole(path, lambda file, content=content: file.write(content))  # type: ignore[misc]
            changed.append(name)
    gone = sorted(before - set(files))
    for name in gone:
        (folder / name).unlink()
    return [*changed, *gone]


def suite_tables(folder: Path) -> Tables:
    """The files of one suite, as the tables that they will be."""
    found = TidyTables()
    _add_folder(found, folder)
    return tables_of(found.files(), folder)


def _add_folder(found: TidyTables, folder: Path) -> None:
    """Take over the files of a suite, of `rope`, or of `maximum`, as the name of their folder says."""
    if folder.name == MAXIMUM_TASK[0]:
        _add_maximum(found, folder)
        return
    for own in sorted(path for path in folder.glob("*") if path.is_dir()):
        variant, _, seed = own.name.rpartition("-")
        if folder.name in ROPE:
            _add_run(found, own, run_of_model(own.name))
        elif seed.isdecimal() and variant in (*VARIANTS, *ROPE_VARIANTS):  # and no folder of something else
            _add_run(found, own, RunName(folder.name, variant, int(seed)))


def _add_run(found: TidyTables, folder: Path, run: RunName) -> None:
    for name, *needed in (("run.json", "sha256"), ("diverged.json",)):
        if (folder / name).is_file():
            found.add_line(RUNS, run, dict(read_json(folder / name, RunResults, *needed)))
    described = folder / "measured.json"
    for table, entry in (read_measured(described) if described.exists() else {}).items():
        found.add_line(MEASURED, run, dict(entry), table)
    for path in sorted(folder.glob("*.csv")):
        found.add_table(path, run)


def read_measured(path: Path) -> dict[str, Measured]:
    """What a measured.json says, by table.

    Raises:
        PositionsError: it is damaged.
    """
    found: dict[str, Measured] = read_json(path, dict[str, Measured])
    return found


def _add_maximum(found: TidyTables, folder: Path) -> None:
    for path in sorted(folder.glob("seed-*.json")):
        run = RunName(*MAXIMUM_TASK, int(path.stem.removeprefix("seed-")))
        found.add_line(MAXIMUM, run, dict(read_json(path, MaximumResults)))
        table = _text_of(path.with_suffix(".csv").read_bytes(), path.with_suffix(".csv"))
        found.tables.setdefault("maximum.csv", {})[run] = table.drop(columns="seed", errors="ignore")


def read_gathered(folder: Path) -> TidyTables:
    """The tidy tables of a folder, as text."""
    found = TidyTables()
    for path in sorted(folder.glob("*.csv")):
        whole: Any = _text_of(path.read_bytes(), path)
        if missing := [key for key in KEYS if key not in whole]:
            raise PositionsError(f"{path} has no column {missing[0]}; expected a table that gather wrote.")
        for (suite, variant, seed), rows in whole.groupby(KEYS, sort=False):
            run = RunName(suite, variant, int(seed) if seed else None)
            found.tables.setdefault(path.name, {})[run] = rows.drop(columns=KEYS)
    for name in (RUNS, MEASURED, MAXIMUM):
        if (folder / name).is_file():
            for line in (folder / name).read_text("utf-8").splitlines():
                values = json.loads(line)
                run, table = RunName(*(values.pop(key) for key in KEYS)), values.pop("table", "")
                found.add_line(name, run, values, table)
    return found


def _text_of(content: bytes, path: Path) -> pd.DataFrame:
    """A table with its values as they are written."""
    try:
        return pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)
    except ValueError as error:
        raise PositionsError(f"{path} is damaged ({error}); expected a table.") from error


def _merge(old: TidyTables, new: TidyTables) -> TidyTables:
    """The old rows, but where there are new ones of the same table and run, or new weights."""
    gone = _with_other_weights(old, new)
    refused = {
        (f"{table}.csv", run) for (run, table), entry in new.lines.get(MEASURED, {}).items() if "refused" in entry
    }
    tables = {
        name: {run: rows for run, rows in by_run.items() if run not in gone and (name, run) not in refused}
        for name, by_run in old.tables.items()
    }
    for name, by_run in new.tables.items():
        tables[name] = tables.get(name, {}) | by_run
    lines = {
        name: {key: values for key, values in by_key.items() if key[0] not in gone}
        for name, by_key in old.lines.items()
    }
    for name, by_key in new.lines.items():
        lines[name] = lines.get(name, {}) | by_key
    return TidyTables(tables, lines)


def _with_other_weights(old: TidyTables, new: TidyTables) -> set[RunName]:
    """The runs that were trained anew, whether or not they have diverged."""
    before = old.lines.get(RUNS, {})
    trained = {key: described for key, described in new.lines.get(RUNS, {}).items() if key in before}
    return {key[0] for key, described in trained.items() if described.get("sha256") != before[key].get("sha256")}


def _order(run: RunName) -> tuple[str, str, int]:
    return run.suite, run.variant, -1 if run.seed is None else run.seed


def _table(by_run: dict[RunName, pd.DataFrame]) -> bytes:
    """The CSV of all runs, with the columns that name them in front."""
    tables = []
    for run in sorted(by_run, key=_order):
        table = by_run[run].copy()
        for place, (key, value) in enumerate(zip(KEYS, run, strict=True)):
            table.insert(place, key, "" if value is None else str(value))
        tables.append(table)
    return pd.concat(tables, ignore_index=True).fillna("").to_csv(index=False).encode()


def _jsonl(by_key: dict[tuple[RunName, str], dict[str, Any]]) -> bytes:
    """A line for each run, or for each table of a run."""

    def lines() -> Iterator[bytes]:
        for run, table in sorted(by_key, key=lambda key: _order(key[0])):  # tables stay in the order of measurement
            named = dict(zip(KEYS, run, strict=True)) | ({"table": table} if table else {})
            yield to_line(named | {name: value for name, value in by_key[run, table].items() if name not in named})

    return b"".join(line + b"\n" for line in lines())
