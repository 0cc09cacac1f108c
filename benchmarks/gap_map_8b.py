"""One batch of a map on a model of 8B parameters that does not fit in memory: weights in bf16 that wait on the disk.

    python benchmarks/gap_map_8b.py --folder FOLDER [--layers 32] [--memory 4GiB]

The shape is that of Llama 3.1 8B (32 layers of 4,096, 128,256 tokens), the weights are random, the tokens are bytes.
First a small twin, of the same kind and far smaller: its map with weights that wait on the disk against its map with
all of them in memory. Then one window of the large one; the largest resident size of the process is printed with it,
which counts pages of weight files that the system keeps for reading and could drop. The folder needs 16 GB.
"""

import json
import os
import platform
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import lens_positions as lp
from lens_positions.tokenizer import byte_tokenizer

TEXT = "The sea is calm, and the wind is from the north. "
SHAPE: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
SMALL = SHAPE | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 224, "num_attention_heads": 8}


@dataclass
class Options:
    """Options.

    Attributes:
        folder: for the weights and the maps.
        layers: of the large model.
        memory: for weights that stay in memory, of the large model; the others wait on the disk.
        output: where results are written.
    """

    folder: Path
    layers: int = 32
    memory: str = "4GiB"
    output: Path = Path("benchmarks/gap_map_8b.json")


def main(options: Options) -> None:
    """Compare the small twin, then run the large one."""
    torch.set_num_threads(1)
    small, large = options.folder / "small", options.folder / "large"
    written(small, SMALL | {"num_hidden_layers": 3, "num_key_value_heads": 2})
    whole = lp.HookedPositionTransformer.from_pretrained(small, dtype=torch.bfloat16)
    split = offloaded(small, "200KiB", options.folder / "offload-small")
    rows = [one_map(model, options.folder / name) for model, name in ((whole, "map-whole"), (split, "map-split"))]
    apart = float((rows[0]["gradient"] - rows[1]["gradient"]).abs().max())
    print(f"small twin: {len(rows[0]):,} rows, largest difference {apart}", flush=True)

    written(large, SHAPE | {"num_hidden_layers": options.layers})
    start, used = time.perf_counter(), time.process_time()
    model = offloaded(large, options.memory, options.folder / "offload")
    loaded = time.perf_counter()
    found = one_map(model, options.folder / "map-large")
    result = {
        "parameters": sum(p.numel() for p in model.original_model.parameters()),
        "layers": options.layers,
        "weights_in_memory": options.memory,
        "waiting_on_disk": sum(p.is_meta for p in model.original_model.parameters()),
        "rows": len(found),
        "largest_gradient": float(found["gradient"].abs().max()),
        "load_seconds": round(loaded - start, 1),
        "map_seconds": round(time.perf_counter() - loaded, 1),
        "cpu_seconds": round(time.process_time() - used, 1),
        "peak_megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "small_twin_rows": len(rows[0]),
        "small_twin_largest_difference": apart,
        "machine": f"{platform.machine()}, one thread of {os.cpu_count()} cores that others use too",
    }
    print(json.dumps(result))
    options.output.write_text(json.dumps(result, indent=2) + "\n")


def offloaded(folder: Path, memory: str, waiting: Path) -> lp.HookedPositionTransformer:
    """The model with most of its weights on the disk."""
    return lp.HookedPositionTransformer.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="auto", max_memory={"cpu": memory}, offload_folder=str(waiting)
    )


def one_map(model: lp.HookedPositionTransformer, folder: Path) -> Any:
    """The rows of one window."""
    return lp.causal.gap_map(model, [TEXT], folder, window=64, progress=False).table()


def written(folder: Path, shape: dict[str, Any]) -> None:
    """Write a random model, a file a layer, so that no more than a layer is in memory."""
    if (folder / "model.safetensors.index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**shape, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    files: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{part}.safetensors", []).append(name)
    generator = torch.Generator().manual_seed(0)
    for file, names in files.items():
        save_file({n: drawn(shapes[n], generator) for n in names}, folder / file, {"format": "pt"})
    index = {name: file for file, names in files.items() for name in names}
    size = 2 * sum(shape.numel() for shape in shapes.values())
    described = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(described))


def drawn(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Norms of ones; matrices that keep the size of what they multiply."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    scale = (3 / shape[1]) ** 0.5
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-scale, scale, generator=generator)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
