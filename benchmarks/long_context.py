"""Positions at 8,192 tokens of a real model: how exact their sum is, what that does to logits, and the memory it takes.

A per-layer source with random weights gives increments far from 1. They are recorded once and held fixed; then

- the positions are compared with the sum of the same increments in exact rational arithmetic, beside a plain running
  sum in float32 and in bf16;
- the logits are compared with those of the same model in float64 with float64 positions: first the float64 model with
  float32 positions, which is the effect of positions alone, then the float32 model, and beside it the error that the
  untouched model has in float32;
- peak memory of a forward pass is taken with and without streams, each in a process of its own.

    python benchmarks/long_context.py [--model NAME] [--tokens 8192] [--output FILE]
"""

import json
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from torch import Tensor, nn

from lens_positions import PositionConfig, PositionsError, attach_positions, corpora
from lens_positions.checkpoint import load_base

EVERY = 64
"""Logits are compared at every 64th token, the last among them."""


@dataclass
class Options:
    """Options.

    Args:
        model: what to load.
        tokens: tokens of the prompt, from held-out English.
        memory: only print the peak memory of one forward pass, in MiB: of the "untouched" model, or "per_layer".
        output: where the figures are written as JSON.
    """

    model: str = "smollm2-135m-instruct"
    tokens: int = 8192
    memory: Literal["untouched", "per_layer"] | None = None
    output: Path = Path("benchmarks/long_context.json")


class Float64Rotary(nn.Module):
    """A model's rotary module without its cast to float32."""

    def __init__(self, inv_freq: Tensor) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inv_freq.double())

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of positions in float64."""
        angles = (position_ids[..., None].double() * self.inv_freq).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def main(options: Options) -> None:
    """Measure, print and write."""
    torch.manual_seed(0)
    model, tokenizer = load_base(options.model)
    text = " ".join(corpora.load("english")["heldout"]["text"])[: 8 * options.tokens]
    tokens = tokenizer(text, return_tensors="pt")["input_ids"][:, : options.tokens]
    if options.memory:
        print(peak_mebibytes(model, tokens, options.memory))
        return
    console = Console(stderr=True)
    memory = {}
    for what in ("untouched", "per_layer"):
        console.print(f"peak memory: {what}")
        again = [sys.executable, __file__, "--model", options.model, "--tokens", str(options.tokens), "--memory", what]
        memory[what] = int(subprocess.run(again, check=True, capture_output=True, text=True).stdout)

    console.print("increments")
    streams = attach_positions(model, PositionConfig(source="per_layer"))
    for stream in streams.layers:
        nn.init.normal_(stream.source.out.weight, std=0.2)
    positions: list[Tensor] = []
    for stream in streams.layers:
        stream.hook_positions.add_hook(lambda p, hook: positions.append(p[0].clone()))
    with streams.record() as seen, torch.no_grad():
        model(tokens, logits_to_keep=1)
    increments = [layer[0] for layer in seen]
    streams.detach()

    console.print("sums")
    sums = {name: 0.0 for name in ("ours", "float32 running sum", "bf16 running sum")}
    for d, p in zip(increments, positions, strict=True):
        steps = torch.cat([torch.zeros(1), d[1:]])
        exact = [Fraction(0), *accumulate(map(Fraction, d[1:].tolist()))]
        for name, found in (
            ("ours", p),
            ("float32 running sum", torch.tensor(list(accumulate(steps, torch.add)))),
            ("bf16 running sum", torch.stack(list(accumulate(steps.bfloat16(), torch.add)))),
        ):
            worst = max(abs(Fraction(x) - y) for x, y in zip(found.tolist(), exact, strict=True))
            sums[name] = max(sums[name], float(worst))

    def logits(what: str, double: bool, round_positions: bool | None) -> Tensor:
        console.print(f"logits: {what}")
        streams = None
        if round_positions is not None:
            streams = attach_positions(model)
            for stream, layer in zip(streams.layers, increments, strict=True):
                stream.hook_increments.add_hook(held(layer))
                if round_positions:
                    stream.hook_positions.add_hook(lambda p, hook: p.float().to(p.dtype))
        keep = torch.arange(EVERY - 1, tokens.shape[1], EVERY)
        with torch.no_grad():
            found = model(tokens, logits_to_keep=keep).logits.double()
        if streams is not None:
            streams.detach()
        assert double == (model.dtype == torch.float64)
        return found

    single = logits("float32 model, streams", False, True)
    plain = logits("float32 model, untouched", False, None)
    inv_freq = model.model.rotary_emb.inv_freq
    model.double()
    model.model.rotary_emb = Float64Rotary(inv_freq.float())
    reference = logits("float64 model, float64 positions", True, False)
    rounded = logits("float64 model, float32 positions", True, True)
    untouched = logits("float64 model, untouched", True, None)
    size = reference.std().item()
    described = {
        "command": "python benchmarks/long_context.py",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "model": options.model,
        "tokens": tokens.shape[1],
        "increments": {
            "mean": torch.stack(increments).mean().item(),
            "min": torch.stack(increments).min().item(),
            "max": torch.stack(increments).max().item(),
        },
        "largest_position": max(p.max().item() for p in positions),
        "largest_error_of_positions": sums,
        "standard_deviation_of_logits": size,
        "largest_error_of_logits": {
            "float32 positions alone": (rounded - reference).abs().max().item(),
            "float32 model with streams": (single - reference).abs().max().item(),
            "float32 model untouched": (plain - untouched).abs().max().item(),
        },
        "effect_of_the_increments_on_logits": (reference - untouched).abs().max().item(),
        "peak_memory_mebibytes": memory,
    }
    options.output.write_text(json.dumps(described, indent=2) + "\n", "utf-8")
    print(json.dumps(described, indent=2))


def held(increments: Tensor) -> Callable[[Tensor, Any], Tensor]:
    """A hook function that puts recorded increments in."""
    return lambda d, hook: increments[None].to(d.dtype)


@torch.no_grad()
def peak_mebibytes(model: Any, tokens: Tensor, what: str) -> int:
    """Peak memory of this process after one forward pass."""
    if what == "per_layer":
        streams = attach_positions(model, PositionConfig(source="per_layer"))
        for stream in streams.layers:
            nn.init.normal_(stream.source.out.weight, std=0.2)
    model(tokens, logits_to_keep=1, use_cache=False)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except PositionsError as error:
        raise SystemExit(f"long_context: {error}") from None
