"""What static position streams cost in a forward pass of a real model in a TransformerBridge, SmolLM2-135M.

The bridge with streams and without takes turns with itself, first one ahead and then the other, and a ratio is taken
within a turn, so a machine that slows down slows both.

    python benchmarks/smollm2.py [--model NAME] [--turns 20] [--tokens 256] [--output FILE]
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from lens_positions import HookedPositionTransformer, PositionsError, attach_positions

AT_MOST = {"static streams": 1.03, "run_with_cache of increments and positions": 1.10}
"""The most that each may cost over the bridge's plain forward pass."""


@dataclass
class Options:
    """Options.

    Args:
        model: what `from_pretrained` should load.
        turns: counted turns of each pair, after two that are not.
        tokens: tokens of the prompt.
        output: where the table is written as JSON.
    """

    model: str = "smollm2-135m-instruct"
    turns: int = 20
    tokens: int = 256
    output: Path = Path("benchmarks/smollm2.json")


def main(options: Options) -> None:
    """Time both, print the table and write it."""
    model = HookedPositionTransformer.from_pretrained(options.model)
    tokens = torch.randint(0, model.cfg.d_vocab, (1, options.tokens), generator=torch.Generator().manual_seed(0))
    names = [n for n in model.hook_dict if n.endswith(("attn.hook_increments", "attn.hook_positions"))]

    def plain() -> None:
        model(tokens)

    def cached() -> None:
        model.run_with_cache(tokens, names_filter=names)

    table = []
    for name, ours, theirs_attached in (
        ("static streams", plain, False),
        ("run_with_cache of increments and positions", cached, True),
    ):
        pairs = take_turns(model, ours, plain, theirs_attached, options.turns)
        ratios = [a / b for a, b in pairs]
        low, _, high = statistics.quantiles(ratios, n=4)
        row = {
            "what": name,
            "beside": "the bridge with streams" if theirs_attached else "the bridge without streams",
            "ratio": round(statistics.median(ratios), 3),
            "quartiles": [round(low, 3), round(high, 3)],
            "ratio_of_fastest": round(min(a for a, _ in pairs) / min(b for _, b in pairs), 3),
            "at_most": AT_MOST[name],
        }
        table.append(row)
        print(f"{name}: {row['ratio']:.3f} ({low:.3f} to {high:.3f}) of {row['beside']}; expected {AT_MOST[name]}")
    described = {
        "command": "python benchmarks/smollm2.py",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "model": options.model,
        "tokens": options.tokens,
        "turns": options.turns,
        "table": table,
    }
    options.output.write_text(json.dumps(described, indent=2) + "\n", "utf-8")


@torch.no_grad()
def take_turns(
    model: Any, ours: Callable[[], None], theirs: Callable[[], None], theirs_attached: bool, turns: int
) -> list[tuple[float, float]]:
    """Seconds of one forward pass of each, side by side, `turns` times over; attaching is not timed."""
    seconds = []
    for turn in range(turns + 2):
        taken = [0.0, 0.0]
        for i in (0, 1) if turn % 2 else (1, 0):
            if i == 1 and not theirs_attached:
                model.position_streams.detach()
            start = time.perf_counter()
            (ours, theirs)[i]()
            taken[i] = time.perf_counter() - start
            if i == 1 and not theirs_attached:
                attach_positions(model)
        seconds.append((taken[0], taken[1]))
    return seconds[2:]


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except PositionsError as error:
        raise SystemExit(f"smollm2: {error}") from None
