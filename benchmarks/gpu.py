"""Tokens a second of a training step on a GPU, at the size of the preset `paper`.

A step is what `lens_positions/training/loop.py` does: forward pass and loss in bf16 autocast, backward pass, clipping
and AdamW. The models are the plain Llama of transformers and the same with static, shared and per_layer streams; each
runs eager, compiled, and compiled with CUDA graphs ("reduce-overhead"), which is what training does on one GPU.

    python benchmarks/gpu.py [--seconds 170] [--output benchmarks/gpu-CARD.json]

What does not fit in the seconds given is left out and said to be. Figures are written as they come.
"""

import gc
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import tyro
from torch import Tensor
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM

from lens_positions import PositionConfig
from lens_positions.model import build_model
from lens_positions.training.config import load_preset
from lens_positions.training.loop import token_nats

MODELS = ("plain", "static", "shared", "per_layer")
MODES = {"eager": None, "compiled": "default", "reduce-overhead": "reduce-overhead"}
ORDER = (
    *((model, mode) for mode in ("reduce-overhead", "eager", "compiled") for model in ("plain", "per_layer")),
    *((model, mode) for mode in ("reduce-overhead", "eager", "compiled") for model in ("shared", "static")),
)
"""What matters most comes first."""

WARM_UP = 8
STEPS = 30
PARTS = 3


@dataclass
class Options:
    """Options.

    Args:
        preset: whose sizes and batch are taken.
        batch_size: sequences a step, instead of the preset's.
        seconds: after which no further model is begun.
        output: where the figures are written as JSON; benchmarks/gpu-CARD.json where none is given.
    """

    preset: str = "paper"
    batch_size: int | None = None
    seconds: float = 170
    output: Path | None = None


def main(options: Options) -> None:
    """Time what fits, print each figure, and write them."""
    began = time.monotonic()
    if not torch.cuda.is_available():
        raise SystemExit(
            "there is no CUDA device here; expected one (python benchmarks/compiled.py runs on any machine)."
        )
    card = torch.cuda.get_device_name()
    output = options.output or Path("benchmarks") / f"gpu-{card.split()[-1] if 'HBM' not in card else 'H100'}.json"
    config = load_preset(options.preset)
    size = options.batch_size or config.batch_size
    rows = torch.randint(0, 256, (size, config.model.n_ctx + 1), generator=torch.Generator().manual_seed(0)).cuda()
    described: dict[str, Any] = {
        "command": "python benchmarks/gpu.py",
        "card": card,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "preset": options.preset,
        "batch": f"{size} sequences of {config.model.n_ctx}, bf16 autocast",
        "kernels": {},
        "table": [],
        "left_out": [],
    }

    def write() -> None:
        output.write_text(json.dumps(described, indent=2) + "\n")

    plain = kernels_of_a_layer("plain", options, rows)
    for name in MODELS[1:]:
        added = kernels_of_a_layer(name, options, rows)
        added.subtract(plain)
        described["kernels"][name] = {
            "a_layer": added.total(),
            "by_name": {kernel: count for kernel, count in added.most_common() if count},
        }
        print(f"kernels that {name} adds a layer: {added.total()}", flush=True)
    write()

    for name, mode in ORDER:
        if time.monotonic() - began > options.seconds:
            described["left_out"].append(f"{name}, {mode}")
            continue
        row = {"model": name, "mode": mode, **timed(name, mode, rows, options)}
        described["table"].append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        write()
    compare(described)
    write()
    print(f"{time.monotonic() - began:.0f} s in all; left out: {', '.join(described['left_out']) or 'nothing'}")


def timed(name: str, mode: str, rows: Tensor, options: Options) -> dict[str, Any]:
    """Tokens a second of one model in one mode, with what the compiler made of it."""
    model = built(name, options)
    if name == "plain":  # a model with streams does both when these are attached
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch._dynamo.reset()
    counters.clear()
    nats = token_nats if MODES[mode] is None else torch.compile(token_nats, mode=MODES[mode])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    step = training_step(nats, model, optimizer, rows)

    start = time.monotonic()
    step()
    torch.cuda.synchronize()
    first = time.monotonic() - start
    for _ in range(WARM_UP):
        loss = step()
    torch.cuda.synchronize()
    graphs = counters["stats"]["unique_graphs"]

    torch.cuda.reset_peak_memory_stats()
    speeds = []
    for _ in range(PARTS):
        start = time.monotonic()
        for _ in range(STEPS):
            loss = step()
        torch.cuda.synchronize()
        speeds.append(STEPS * rows[:, :-1].numel() / (time.monotonic() - start))
    row = {
        "million_tokens_per_second": round(statistics.median(speeds) / 1e6, 3),
        "parts": [round(speed / 1e6, 3) for speed in speeds],
        "first_step_seconds": round(first, 1),
        "peak_gigabytes": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "graphs": graphs,
        "breaks": sum(counters["graph_break"].values()),
        "recompiles": counters["stats"]["unique_graphs"] - graphs,
        "loss": round(float(loss), 4),
    }
    del model, optimizer, step, loss
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return row


def training_step(
    nats: Callable[..., Tensor], model: Any, optimizer: torch.optim.Optimizer, rows: Tensor
) -> Callable[[], Tensor]:
    """One step of training, as a function that returns the loss."""
    parameters = list(model.parameters())

    def step() -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = nats(model, rows).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def kernels_of_a_layer(name: str, options: Options, rows: Tensor) -> Counter[str]:
    """The kernels that an eager forward and backward pass launches for one layer more, by name."""
    shallow, deep = (kernels(built(name, options, n_layers), rows) for n_layers in (2, 3))
    deep.subtract(shallow)
    return deep


def kernels(model: Any, rows: Tensor) -> Counter[str]:
    """The kernels that an eager forward and backward pass launches, by name."""

    def once() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = token_nats(model, rows[:4]).mean()
        loss.backward()  # outside of autocast, as in training
        model.zero_grad()

    once()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        once()
        torch.cuda.synchronize()
    copies = ("Memcpy", "Memset")
    names = [event.name for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return Counter(name[:160] for name in names if not name.startswith(copies))


def built(name: str, options: Options, n_layers: int | None = None) -> Any:
    """A model of the preset's size on the card, in training mode."""
    config = load_preset(options.preset).model
    config = replace(config, n_layers=n_layers or config.n_layers)
    if name == "plain":
        torch.manual_seed(0)
        return LlamaForCausalLM(config.to_transformers()).cuda().train()
    activation = "softplus" if name == "shared" else "sigmoid"
    positions = PositionConfig(source=name, activation=activation) if name != "static" else PositionConfig("static")
    return build_model(replace(config, positions=positions), seed=0).cuda().train()


def compare(described: dict[str, Any]) -> None:
    """Every model over the plain one in the same mode."""
    speeds = {(row["model"], row["mode"]): row["million_tokens_per_second"] for row in described["table"]}
    for row in described["table"]:
        plain = speeds.get(("plain", row["mode"]))
        if plain:
            row["of_plain"] = round(row["million_tokens_per_second"] / plain, 3)
    for mode in MODES:
        found = {m: speeds.get((m, mode)) for m in MODELS}
        print(f"{mode:16}", "  ".join(f"{m} {v or '-'}" for m, v in found.items()), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
