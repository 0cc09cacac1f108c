"""How much memory attribution takes by the length of the prompt, with blocks that run again in the backward pass.

Beside it the same attribution in one whole backward pass, as it was before. Peaks are those of fresh processes (the
largest resident size, the model included), one for each row. Times are CPU seconds, in turns in one process.

    python benchmarks/attribution_memory.py [--model NAME] [--lengths 512 1024 2048] [--output FILE]
"""

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

import lens_positions as lp
from lens_positions import causal
from lens_positions.causal.pieces import in_pieces


@dataclass
class Options:
    """Options.

    Args:
        model: what `from_pretrained` should load.
        lengths: tokens of the prompts.
        timed: lengths that are timed.
        turns: counted turns of each pair, after one that is not.
        output: where the table is written as JSON.
        alone: measure one row and print it: the length, then "pieces" or "whole", then "gradient" or "integrated".
    """

    model: str = "smollm2-135m-instruct"
    lengths: tuple[int, ...] = (512, 1024, 2048)
    timed: tuple[int, ...] = (512,)
    turns: int = 3
    output: Path = Path("benchmarks/attribution_memory.json")
    alone: tuple[int, Literal["pieces", "whole"], Literal["gradient", "integrated"]] | None = None


def main(options: Options) -> None:
    """Measure, print the tables and write them."""
    if options.alone is not None:
        print(json.dumps(peak(options.model, *options.alone)))
        return
    rows = []
    wanted = [(length, "gradient") for length in options.lengths] + [
        (length, "integrated") for length in options.lengths[:1]
    ]
    for length, method in wanted:
        for how in ("whole", "pieces"):
            rows.append(fresh(options.model, length, how, method))
            print(rows[-1], flush=True)
    described = {
        "command": "python benchmarks/attribution_memory.py",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "model": options.model,
        "memory": rows,
        "time": times(options),
    }
    options.output.write_text(json.dumps(described, indent=2) + "\n", "utf-8")


def fresh(model: str, length: int, how: str, method: str) -> dict[str, Any]:
    """One row, measured in a process of its own."""
    command = [sys.executable, __file__, "--model", model, "--alone", str(length), how, method]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak(name: str, length: int, how: str, method: Literal["gradient", "integrated"]) -> dict[str, Any]:
    """The largest resident size before and after one attribution, in GB."""
    model, tokens = lp.HookedPositionTransformer.from_pretrained(name), prompt(length)
    with torch.no_grad():
        model(tokens[:, :8])
    before = resident()
    attributed(model, tokens, how, method)
    return {
        "tokens": length,
        "how": how,
        "method": method,
        "gb_of_the_model": round(before, 2),
        "gb_at_most": round(resident(), 2),
    }


def attributed(model: Any, tokens: torch.Tensor, how: str, method: Literal["gradient", "integrated"]) -> torch.Tensor:
    """The attribution of the loss; of the integrated one, whose points are run one after the other, two points."""
    module: Any = import_module("lens_positions.causal.attribution")
    module.in_pieces, module.STEPS, module.TOLERANCE = in_pieces if how == "pieces" else whole, (2,), float("inf")
    return causal.attribution(model, tokens, causal.loss(), method, baseline=1.1)


def whole(_model: Any) -> AbstractContextManager[None]:
    """One backward pass through all that the forward pass kept."""
    return nullcontext()


def prompt(length: int) -> torch.Tensor:
    """Random tokens: memory and time do not depend on which."""
    return torch.randint(0, 1000, (1, length), generator=torch.Generator().manual_seed(0))


def resident() -> float:
    """The largest resident size of this process so far, in GB (Linux counts in KiB, macOS in bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def times(options: Options) -> list[dict[str, Any]]:
    """CPU seconds in pieces over those as a whole, in turns, and how far the results are apart."""
    model = lp.HookedPositionTransformer.from_pretrained(options.model)
    rows = []
    for length in options.timed:
        ratios, apart = [], 0.0
        for turn in range(options.turns + 1):
            seconds, values = {}, {}
            for how in ("pieces", "whole") if turn % 2 else ("whole", "pieces"):
                start = time.process_time()
                values[how] = attributed(model, prompt(length), how, "gradient")
                seconds[how] = time.process_time() - start
            ratios.append(seconds["pieces"] / seconds["whole"])
            apart = max(apart, float((values["pieces"] - values["whole"]).abs().max()))
        row = {
            "tokens": length,
            "cpu_seconds": {how: round(taken, 1) for how, taken in seconds.items()},
            "ratio": round(statistics.median(ratios[1:]), 3),
            "ratios": [round(ratio, 3) for ratio in ratios[1:]],
            "apart_at_most": apart,
            "largest_value": float(values["whole"].abs().max()),
        }
        print(row, flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except lp.PositionsError as error:
        raise SystemExit(f"benchmarks/attribution_memory.py: {error}") from None
