"""What a map costs: rows, time and the largest resident size of a fresh process, one model and corpus at a time.

    python benchmarks/gap_map.py --models bilingual-rope --corpora english --characters 200000 --maps maps

Each map is made by `lens-positions map` in a process of its own with one thread. Where `--limit` seconds are not enough
the process is killed, and what was written until then is counted. Results are added to `--output`, by model and corpus.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import tyro

from lens_positions.causal import GapMap


@dataclass(frozen=True)
class Options:
    """What is mapped.

    Attributes:
        models: names or folders.
        corpora: names or files.
        characters: of each; 0 is all of it.
        split: the held-out documents, or all.
        shard: windows a file.
        maps: a folder for the maps, each in a folder of its own.
        limit: seconds for each map.
        output: where results are added.
    """

    models: tuple[str, ...] = ("bilingual-rope", "bilingual-shared", "bilingual-per-layer")
    corpora: tuple[str, ...] = ("english", "chinese", "bilingual", "code")
    characters: int = 200_000
    split: str = "heldout"
    shard: int = 32
    maps: Path = Path("maps")
    limit: float = 3600.0
    output: Path = Path("benchmarks/gap_map.json")


def main(options: Options) -> None:
    """Make each map and note what it cost."""
    options.maps.mkdir(parents=True, exist_ok=True)
    for model in options.models:
        for corpus in options.corpora:
            found = measured(model, corpus, options)
            known = json.loads(options.output.read_text()) if options.output.exists() else []
            same = ("model", "corpus", "characters", "split")
            known = [one for one in known if any(one[name] != found[name] for name in same)]
            options.output.write_text(json.dumps([*known, found], indent=2) + "\n")
            print(json.dumps(found), flush=True)


def measured(model: str, corpus: str, options: Options) -> dict[str, Any]:
    """One map in a fresh process."""
    folder = options.maps / f"{Path(model).name}-{Path(corpus).stem}-{options.split}-{options.characters}"
    command = [sys.executable, "-m", "lens_positions", "map", model, "--corpus", corpus, "--output", str(folder)]
    command += ["--split", options.split, "--shard", str(options.shard)]
    if options.characters:
        command += ["--characters", str(options.characters)]
    start = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    status, usage, cut = waited(process, start + options.limit)
    seconds = time.perf_counter() - start
    if status and not cut:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    shards = GapMap(folder).shards
    rows = sum(pyarrow.parquet.read_metadata(shard).num_rows for shard in shards)
    return {
        "model": Path(model).name,
        "corpus": Path(corpus).stem,
        "split": options.split,
        "characters": options.characters,
        "whole": not cut,
        "rows": rows,
        "gaps": rows // len(GapMap(folder).settings["layers"]),
        "shards": len(shards),
        "megabytes": round(sum(shard.stat().st_size for shard in shards) / 1e6, 2),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_megabytes": round(usage.ru_maxrss / 1024),
        "machine": f"{platform.machine()}, one thread of {os.cpu_count()} cores that others use too",
    }


def waited(process: subprocess.Popen[bytes], until: float) -> tuple[int, Any, bool]:
    """The status of a process, what it used, and whether it was killed because time was over."""
    cut = False
    while True:
        found, status, usage = os.wait4(process.pid, os.WNOHANG)
        if found:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage, cut
        if time.perf_counter() > until and not cut:
            os.kill(process.pid, signal.SIGKILL)
            cut = True
        time.sleep(0.2)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
