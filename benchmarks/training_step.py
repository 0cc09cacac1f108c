"""What position streams cost in a training step: one step beside the same step of the untouched Llama.

Each model takes turns with the untouched one, first one ahead and then the other, and a ratio is taken within a turn,
so a machine that slows down slows both. Among them is a minimal hand-written transformer of the same size: what a
library's model costs.

    python benchmarks/training_step.py [--compile] [--turns 24] [--models NAME ...] [--output FILE]

A step with streams keeps more activations for its backward pass, and glibc returns such memory to the system after each
step, to ask for it again in the next. With MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=17179869184 in the
environment it keeps the memory, which makes both models faster and is the fairer comparison of what they compute.
"""

import json
import os
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
from lens_positions.model import build_model
from lens_positions.training.loop import token_nats

SIZES = {
    "width 256, 8 heads, 6 layers, context 512": (PositionModelConfig(), 4),
    "width 128, 4 heads, 4 layers, context 256": (
        PositionModelConfig(d_model=128, n_layers=4, n_heads=4, n_ctx=256),
        16,
    ),
}
AT_MOST = {"width 256, 8 heads, 6 layers, context 512": 1.05, "width 128, 4 heads, 4 layers, context 256": 1.12}
"""The most that a per-layer stream may cost over the untouched Llama, eager."""


@dataclass
class Options:
    """Options.

    Args:
        compile: run forward pass and loss through torch.compile, as training does.
        turns: counted turns of each pair, after three that are not.
        models: the models to time, of static, shared, per_layer, "per_layer, per head" and "minimal transformer"; all
            of them if none is named.
        output: where the table is written as JSON.
    """

    compile: bool = False
    turns: int = 24
    models: tuple[str, ...] = ()
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
    torch._dynamo.config.recompile_limit = 64  # a graph for each model
    table = []
    for size, (config, batch) in SIZES.items():
        untouched = LlamaForCausalLM(config.to_transformers())
        for name, model in models(config).items():
            if options.models and name not in options.models:
                continue
            pairs = take_turns(model, untouched, batch, config.n_ctx, options)
            ratios = [ours / theirs for ours, theirs in pairs]
            row = {
                "size": size,
                "model": name,
                "ratio_to_untouched": round(statistics.median(ratios), 3),
                "ratio_of_fastest": round(min(a for a, _ in pairs) / min(b for _, b in pairs), 3),
                "quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]],
                "tokens_per_second": round(batch * config.n_ctx / statistics.median(ours for ours, _ in pairs)),
                "at_most": AT_MOST[size] if name == "per_layer" and not options.compile else None,
            }
            table.append(row)
            low, high = row["quartiles"]
            speed = f"{row['tokens_per_second']:,} tokens/s"
            print(f"{size}  {name:20}  {row['ratio_to_untouched']:.3f} ({low:.3f} to {high:.3f})  {speed}", flush=True)
    described = {
        "command": "python benchmarks/training_step.py" + (" --compile" if options.compile else ""),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "compiled": options.compile,
        "memory": "kept between steps" if "MALLOC_TRIM_THRESHOLD_" in os.environ else "returned after each step",
        "turns": options.turns,
        "table": table,
    }
    options.output.write_text(json.dumps(described, indent=2) + "\n")


def models(config: PositionModelConfig) -> dict[str, Any]:
    """The models to compare, of one size."""
    sources = {name: PositionConfig(source=name) for name in ("static", "shared", "per_layer")}
    sources["per_layer, per head"] = PositionConfig(per_head=True)
    built: dict[str, Any] = {n: build_model(replace(config, positions=p), seed=0) for n, p in sources.items()}
    return built | {"minimal transformer": MinimalTransformer(config)}


def take_turns(model: Any, untouched: Any, batch: int, n_ctx: int, options: Options) -> list[tuple[float, float]]:
    """Seconds of one training step of a model and of the untouched one, side by side, `turns` times over."""
    rows = torch.randint(0, 257, (batch, n_ctx + 1), generator=torch.Generator().manual_seed(0))
    pair = (model, untouched)
    nats = torch.compile(token_nats, fullgraph=True) if options.compile else token_nats
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True) for m in pair]
    seconds = []
    for turn in range(options.turns + 3):
        taken = [0.0, 0.0]
        for i in (0, 1) if turn % 2 else (1, 0):
            start = time.perf_counter()
            nats(pair[i], rows).mean().backward()
            optimizers[i].step()
            optimizers[i].zero_grad()
            taken[i] = time.perf_counter() - start
        seconds.append((taken[0], taken[1]))
    return seconds[3:]


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
