"""What torch.compile makes of a training step with position streams: figures that any machine reproduces.

For each source: the graphs of a step, the graph breaks, the recompiles over six optimiser steps, how far the gradients
of the source's weights are from those in eager, and the operators that a stream adds to each layer. A plain Llama is
compiled first in the same process, and looked at again after each: no graph may be lent or lost.

    python benchmarks/compiled.py [--layers 6 12] [--backend inductor] [--turns 0] [--output FILE]

With --turns, also the time of a step over that of the plain Llama, both compiled and both eager, in turns.
"""

import json
import platform
import statistics
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from lens_positions import PositionConfig, PositionModelConfig
from lens_positions.model import build_model
from lens_positions.training.loop import token_nats

SOURCES = {
    "static": PositionConfig("static"),
    "shared": PositionConfig("shared"),
    "per_layer": PositionConfig("per_layer"),
    "frozen": PositionConfig("frozen"),
    "shared, per head": PositionConfig("shared", per_head=True),
    "per_layer, per head": PositionConfig("per_layer", per_head=True),
}

NO_KERNEL = {
    *("alias", "as_strided", "detach", "expand", "narrow", "permute", "reshape", "select", "slice", "split"),
    *("squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_reshape_alias", "_unsafe_view"),
}
"""Operators that only look at memory in another way."""


@dataclass
class Options:
    """Options.

    Args:
        layers: depths to compile at.
        width: width of the models.
        context: tokens of a row.
        batch: rows of a step.
        backend: of torch.compile; "aot_eager" traces and differentiates, and generates no code.
        mode: of torch.compile, such as "reduce-overhead" on a GPU.
        turns: counted turns of timing; 0 times nothing.
        device: where to run.
        output: where the figures are written as JSON.
    """

    layers: tuple[int, ...] = (6, 12)
    width: int = 64
    context: int = 64
    batch: int = 2
    backend: str = "inductor"
    mode: str | None = None
    turns: int = 0
    device: str = "cpu"
    output: Path | None = Path("benchmarks/compiled.json")


class Kernels(TorchDispatchMode):
    """Count the operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in NO_KERNEL:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def main(options: Options) -> dict[str, Any]:
    """Compile every source at every depth, print the table and write it."""
    rows = torch.randint(0, 257, (options.batch, options.context + 1), generator=torch.Generator().manual_seed(0))
    rows = rows.to(options.device)
    table, plain_kept = [], True
    for depth in options.layers:
        torch._dynamo.reset()
        plain = llama(options, depth)
        compiled_plain = compiled(plain, options)
        expected = logits(plain, rows)
        plain_kept &= torch.allclose(logits(compiled_plain, rows), expected, atol=1e-4)
        for source in SOURCES:
            for dtype in ("float32", "bf16 autocast"):
                row = {"layers": depth, "source": source, "dtype": dtype, **tried(source, depth, dtype, rows, options)}
                plain_kept &= torch.allclose(logits(compiled_plain, rows), expected, atol=1e-4)
                table.append(row)
                print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    found = {
        "command": f"python benchmarks/compiled.py --backend {options.backend}",
        "machine": f"{platform.machine()}, {device_name(options.device)}, torch {torch.__version__}",
        "plain_model_kept_its_graph": plain_kept,
        "graphs": table,
        "operators": operators(options),
        "times": [times(source, options) for source in SOURCES] if options.turns else [],
    }
    for part in ("operators", "times"):
        for row in found[part]:
            print(row)
    print("the plain model", "kept its own graph" if plain_kept else "RAN ANOTHER MODEL'S GRAPH")
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=2) + "\n")
    return found


def tried(source: str, depth: int, dtype: str, rows: Tensor, options: Options) -> dict[str, Any]:
    """Six compiled optimiser steps of one source beside an eager one."""
    model = streamed(source, options, depth)
    # Without attaching again: what a person does who has one model of each kind in a process.
    counters.clear()
    nats = compiled(token_nats, options, fullgraph=True)
    loss, eager = gradients(token_nats, model, rows, dtype)
    compiled_loss, found = gradients(nats, model, rows, dtype)
    graphs = counters["stats"]["unique_graphs"]

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(6):
        gradients(nats, model, rows.roll(step, 0), dtype)
        optimizer.step()
    largest = max((float(g.abs().max()) for g in eager), default=0.0)
    apart = max((float((a - b).abs().max()) for a, b in zip(eager, found, strict=True)), default=0.0)
    return {
        "graphs": graphs,
        "breaks": sum(counters["graph_break"].values()),
        "recompiles": counters["stats"]["unique_graphs"] - graphs,
        "gradient": f"{largest:.1e}",
        "gradient_error": float(f"{apart / largest:.1e}") if largest else 0.0,
        "weights_without_gradient": sum(not g.any() for g in found),
        "loss_error": float(f"{abs(compiled_loss - loss) / loss:.1e}"),
    }


def gradients(nats: Any, model: Any, rows: Tensor, dtype: str) -> tuple[float, list[Tensor]]:
    """The loss of a step, and the gradient of each weight of the source."""
    model.zero_grad()
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=dtype != "float32"):
        loss = nats(model, rows).mean()
    loss.backward()
    found = []
    for parameter in model.position_streams.parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found.append(gradient.detach().clone())
    return float(loss.detach()), found


def operators(options: Options) -> list[dict[str, Any]]:
    """Operators that each source adds to a layer, forward and backward; on a GPU each is at least one launch."""
    plain = kernels_of_a_layer("plain", options)
    norm = kernels_of_a_norm(options)
    found = []
    for source in SOURCES:
        forward, backward = (a - b for a, b in zip(kernels_of_a_layer(source, options), plain, strict=True))
        row = {"source": source, "forward": forward, "backward": backward, "both": forward + backward}
        if source.startswith("per_layer"):  # where RMSNorm is one operator, as on CUDA
            row["both_with_a_fused_norm"] = forward + backward - (norm[0] - 1) - (norm[1] - 1)
        found.append(row)
    return found


def kernels_of_a_layer(source: str, options: Options) -> tuple[int, int]:
    """What one layer more adds to a forward pass and to a backward pass."""
    counts = []
    for depth in (2, 4):
        model = llama(options, depth) if source == "plain" else streamed(source, options, depth)
        rows = torch.randint(0, 257, (2, 33), device=options.device)
        token_nats(model, rows).mean().backward()
        model.zero_grad()
        with Kernels() as forward:
            loss = token_nats(model, rows).mean()
        with Kernels() as backward:
            loss.backward()
        counts.append((forward.count.total(), backward.count.total()))
    (a, b), (c, d) = counts
    return (c - a) // 2, (d - b) // 2


def kernels_of_a_norm(options: Options) -> tuple[int, int]:
    """The operators of RMSNorm on this device."""
    x, weight = (torch.ones(size, device=options.device, requires_grad=True) for size in ((2, 3, 8), (8,)))
    with Kernels() as forward:
        y = functional.rms_norm(x, (8,), weight, 1e-6)
    gradient = torch.ones_like(y)
    with Kernels() as backward:
        y.backward(gradient)
    return forward.count.total(), backward.count.total()


def times(source: str, options: Options) -> dict[str, Any]:
    """The time of a step over that of the plain Llama, compiled and eager, in turns."""
    config = PositionModelConfig()
    rows = torch.randint(0, 257, (4, config.n_ctx + 1), generator=torch.Generator().manual_seed(0)).to(options.device)
    plain = LlamaForCausalLM(config.to_transformers()).to(options.device)
    own = build_model(replace(config, positions=SOURCES[source]), seed=0).to(options.device)
    row: dict[str, Any] = {"source": source, "size": "width 256, 6 layers, 4 rows of 512"}
    eager_plain = None
    for how in ("eager", "compiled"):
        nats = token_nats if how == "eager" else compiled(token_nats, options)
        pairs = take_turns(nats, own, plain, rows, options)
        row[how] = round(statistics.median(a / b for a, b in pairs), 3)
        if eager_plain is None:
            eager_plain = statistics.median(b for _, b in pairs)
        else:
            row["compiled_over_eager_plain"] = round(statistics.median(a for a, _ in pairs) / eager_plain, 3)
    return row


def take_turns(nats: Any, model: Any, other: Any, rows: Tensor, options: Options) -> list[tuple[float, float]]:
    """Seconds of one forward pass, loss and backward pass of each, side by side."""
    seconds = []
    for turn in range(options.turns + 3):
        taken = [0.0, 0.0]
        for i in (0, 1) if turn % 2 else (1, 0):
            run = (model, other)[i]
            start = time.perf_counter()
            nats(run, rows).mean().backward()
            if rows.is_cuda:
                torch.cuda.synchronize()
            taken[i] = time.perf_counter() - start
            run.zero_grad()
        seconds.append((taken[0], taken[1]))
    return seconds[3:]


def llama(options: Options, depth: int) -> Any:
    """The untouched Llama."""
    torch.manual_seed(0)
    return LlamaForCausalLM(sizes(options, depth).to_transformers()).to(options.device)


def streamed(source: str, options: Options, depth: int) -> Any:
    """The same with streams whose increments are far from one."""
    model = build_model(replace(sizes(options, depth), positions=SOURCES[source]), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.position_streams.parameters():
            parameter.normal_(std=0.5, generator=generator)
    return model.to(options.device)


def sizes(options: Options, depth: int) -> PositionModelConfig:
    """The size of the models."""
    return PositionModelConfig(d_model=options.width, n_layers=depth, n_heads=4, n_ctx=options.context)


def logits(run: Any, rows: Tensor) -> Tensor:
    """Of a training pass."""
    return run(input_ids=rows[:, :-1], use_cache=False).logits.detach()


def compiled(function: Any, options: Options, fullgraph: bool = False) -> Any:
    """A model, or a function of one, through torch.compile."""
    return torch.compile(function, backend=options.backend, mode=options.mode, fullgraph=fullgraph)


def device_name(device: str) -> str:
    """The name of a card, or how many threads."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} threads"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
