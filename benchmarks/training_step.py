"""What position streams cost in a training step: one step beside the same step of the untouched Llama.

Models take turns in one run, and each ratio is taken within a turn, so a machine that slows down slows both. Beside
them stands a minimal hand-written transformer of the same size: what a library's model costs.

    python benchmarks/training_step.py [--compile] [--turns 15] [--output benchmarks/training_step.json]
"""

import json
import platform
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from lens_positions import PositionConfig, PositionModelConfig
from lens_positions.hooked import build_model
from training.loop import token_nats

SIZES = {
    "width 256, 8 heads, 6 layers, context 512": (PositionModelConfig(), 4),
    "width 128, 4 heads, 4 layers, context 256": (
        PositionModelConfig(d_model=128, n_layers=4, n_heads=4, n_ctx=256),
        16,
    ),
}
TARGETS = {"width 256, 8 heads, 6 layers, context 512": 1.05, "width 128, 4 heads, 4 layers, context 256": 1.12}
"""The most that a per-layer stream may cost over the untouched Llama, eager."""


@dataclass
class Options:
    """Options.

    Args:
        compile: run every model through torch.compile.
        turns: counted turns, after three that are not.
        output: where the table is written as JSON.
    """

    compile: bool = False
    turns: int = 15
    output: Path = Path("benchmarks/training_step.json")


class MinimalTransformer(nn.Module):
    """The same Llama in as few lines of plain torch as it takes."""

    def __init__(self, config: PositionModelConfig) -> None:
        super().__init__()
        self.heads, d = config.n_heads, config.d_model
        self.embed = nn.Embedding(257, d)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.RMSNorm(d),
                    "qkv": nn.Linear(d, 3 * d, bias=False),
                    "out": nn.Linear(d, d, bias=False),
                    "norm2": nn.RMSNorm(d),
                    "gate_up": nn.Linear(d, 8 * d, bias=False),
                    "down": nn.Linear(4 * d, d, bias=False),
                }
            )
            for _ in range(config.n_layers)
        )
        self.norm = nn.RMSNorm(d)
        half = d // config.n_heads // 2
        angles = torch.outer(torch.arange(config.n_ctx), config.rope_theta ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary position encoding, halves layout."""
        a, b = x.chunk(2, dim=-1)
        cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """Logits, in the shape of a transformers output."""
        x = self.embed(input_ids)
        for layer in self.layers:
            q, k, v = layer["qkv"](layer["norm1"](x)).chunk(3, dim=-1)
            q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
            y = functional.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
            x = x + layer["out"](y.transpose(1, 2).flatten(2))
            gate, up = layer["gate_up"](layer["norm2"](x)).chunk(2, dim=-1)
            x = x + layer["down"](functional.silu(gate) * up)
        return Output(self.norm(x) @ self.embed.weight.T)


@dataclass
class Output:
    """What `token_nats` reads."""

    logits: Tensor


def main(options: Options) -> None:
    """Time every model at both sizes, print the table and write it."""
    table = []
    for size, (config, batch) in SIZES.items():
        models: dict[str, Any] = {"untouched Llama": LlamaForCausalLM(config.to_transformers())}
        for source in ("static", "shared", "per_layer"):
            models[source] = build_model(replace(config, positions=PositionConfig(source=source)), seed=0)
        per_head = replace(config, positions=PositionConfig(per_head=True))
        models["per_layer, per head"] = build_model(per_head, seed=0)
        models["minimal transformer"] = MinimalTransformer(config)
        seconds = take_turns(models, batch, config.n_ctx, options)
        for name, times in seconds.items():
            ratios = [a / b for a, b in zip(times, seconds["untouched Llama"], strict=True)]
            table.append(
                {
                    "size": size,
                    "model": name,
                    "ratio_to_untouched": round(statistics.median(ratios), 3),
                    "quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]],
                    "tokens_per_second": round(batch * config.n_ctx / statistics.median(times)),
                    "target": TARGETS[size] if name == "per_layer" and not options.compile else None,
                }
            )
            row = table[-1]
            print(
                f"{size}  {name:20}  {row['ratio_to_untouched']:.3f}  {row['tokens_per_second']:>8,} tokens/s",
                flush=True,
            )
    described = {
        "command": "python benchmarks/training_step.py" + (" --compile" if options.compile else ""),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "compiled": options.compile,
        "turns": options.turns,
        "table": table,
    }
    options.output.write_text(json.dumps(described, indent=2) + "\n")


def take_turns(models: dict[str, Any], batch: int, n_ctx: int, options: Options) -> dict[str, list[float]]:
    """Seconds of one training step of each model, one after another, `turns` times over."""
    rows = torch.randint(0, 257, (batch, n_ctx + 1), generator=torch.Generator().manual_seed(0))
    optimizers = {name: torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True) for name, m in models.items()}
    run = {name: torch.compile(m) if options.compile else m for name, m in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(options.turns + 3):
        for name, model in run.items():
            start = time.perf_counter()
            token_nats(model, rows).mean().backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if turn >= 3:
                seconds[name].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
