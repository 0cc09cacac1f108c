"""Models whose parts are in several places, and whether position streams are exact in them.

`python tests/placements.py` tries every family, placement and source and writes docs/placements.md;
tests/test_placements.py asserts the same of a part of them. Two accelerators cannot be tried on a machine with none.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pandas as pd
import torch
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model

import lens_positions as lp
from lens_positions.progress import track_progress

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.25,
}
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma3", "GPTNeoX", "Phi", "Olmo2")
SOURCES = ("static", "shared", "per_layer", "frozen", "per_layer, per head")
TOKENS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(3))


def build(family: str) -> Any:
    """A tiny random model of a family."""
    prefix = "Gemma3Text" if family == "Gemma3" else family
    sizes = {k: v for k, v in SIZES.items() if family not in ("GPTNeoX", "Phi") or k not in ("head_dim",)}
    if family == "GPTNeoX":
        sizes.pop("num_key_value_heads")
    config = getattr(transformers, f"{prefix}Config")(**sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.config._attn_implementation = "eager"
    return model


def drawn(streams: lp.PositionStreams) -> lp.PositionStreams:
    """Sources whose increments are far from one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in streams.parameters():
            parameter.normal_(std=0.5, generator=generator)
        for buffer in streams.buffers():
            buffer.uniform_(0.25, 3, generator=generator)
    return streams


def config_of(source: str) -> lp.PositionConfig:
    """The configuration that a source's name says."""
    name, *per_head = source.split(", ")
    return lp.PositionConfig(name, per_head=bool(per_head))


def parts(model: Any) -> dict[str, str]:
    """Where accelerate can cut a model: embeddings, layers, what is between, and the head, all on the CPU."""
    stack = model.base_model_prefix
    inner = getattr(model, stack)
    where = {}
    for name, module in inner.named_children():
        several = (
            {f"{stack}.{name}.{i}": "cpu" for i in range(len(module))}
            if isinstance(module, torch.nn.ModuleList)
            else {}
        )
        where |= several or {f"{stack}.{name}": "cpu"}
    heads = [name for name, _ in model.named_children() if name != stack and name != "position_streams"]
    streams = {"position_streams": "cpu"} if hasattr(model, "position_streams") else {}
    return where | dict.fromkeys(heads, "cpu") | streams


def loaded(chosen: Callable[[str], bool]) -> Callable[[Any, str], Any]:
    """Load a saved model with some of its parts on the disk."""

    def load(model: Any, folder: str) -> Any:
        where = {name: "disk" if chosen(name) else "cpu" for name in parts(model)}
        model.save_pretrained(f"{folder}/model")
        return (
            type(model)
            .from_pretrained(
                f"{folder}/model", device_map=where, offload_folder=f"{folder}/off", attn_implementation="eager"
            )
            .eval()
        )

    return load


PLACEMENTS: dict[str, Callable[[Any, str], Any]] = {
    "embeddings on the disk": loaded(lambda name: "embed" in name),
    "every second layer on the disk": loaded(lambda name: name[-1] in "02"),
    "all layers on the disk": loaded(lambda name: name[-1].isdigit()),
    "the head on the disk": loaded(lambda name: "lm_head" in name or "embed_out" in name),
    "all on the disk": loaded(lambda name: True),
    "accelerate.cpu_offload": lambda model, _: cpu_offload(model, execution_device=torch.device("cpu")),
    "accelerate.disk_offload": lambda model, folder: disk_offload(model, f"{folder}/off", torch.device("cpu")),
    "dispatch_model, main device cpu": lambda model, folder: dispatch_model(
        model,
        {n: "disk" if n[-1] == "1" else "cpu" for n in parts(model)},
        main_device="cpu",
        offload_dir=f"{folder}/off",
    ),
}


LATER = ("accelerate.cpu_offload", "accelerate.disk_offload", "dispatch_model, main device cpu")
"""Placements of a model that is in memory, which may have its streams already."""


def difference(family: str, placement: str, source: str, *, attach_first: bool = False) -> float | str:
    """The largest difference of logits to the same model in one place, or the sentence that refuses it."""
    whole = build(family)
    try:
        state = drawn(lp.attach_positions(whole, config_of(source))).state_dict()
    except lp.PositionsError as error:
        return str(error)
    split = build(family)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        if attach_first:
            lp.attach_positions(split, config_of(source)).load_state_dict(state)
        split = PLACEMENTS[placement](split, folder)
        if not attach_first:
            try:
                lp.attach_positions(split, config_of(source)).load_state_dict(state)
            except lp.PositionsError as error:
                return str(error)
        return float((split(TOKENS).logits - whole(TOKENS).logits).abs().max())


def table() -> pd.DataFrame:
    """Every family, placement and source."""
    cells = [(f, p, s, False) for f in FAMILIES for p in PLACEMENTS for s in SOURCES]
    cells += [(f, p, s, True) for f in FAMILIES for p in LATER for s in SOURCES]
    rows = []
    for family, placement, source, first in track_progress(cells, "placing"):
        shown = f"{placement}, streams first" if first else placement
        found = difference(family, placement, source, attach_first=first)
        rows.append({"family": family, "placement": shown, "source": source, "difference": found})
    return pd.DataFrame(rows)


HEADER = """# Models in several places

The largest difference of any logit between a model whose parts are in several places and the same model in one, with
position streams whose sources are far from fresh (static: all steps 1.0): tiny random models, nine tokens, a
CPU. "refused" is the sentence below the table. Written by `python tests/placements.py`.

"""


def main() -> int:
    """Write docs/placements.md; 1 where something is neither exact nor refused."""
    found = table()
    refusals = sorted({d for d in found["difference"] if isinstance(d, str)})
    found["shown"] = ["refused" if isinstance(d, str) else f"{d:.1e}" if d else "0.0" for d in found["difference"]]
    wide = found.pivot(index=["family", "placement"], columns="source", values="shown")[list(SOURCES)].reset_index()
    lines = [HEADER + "| " + " | ".join(wide.columns) + " |", "|" + " --- |" * len(wide.columns)]
    lines += ["| " + " | ".join(row) + " |" for row in wide.itertuples(index=False)]
    lines += ["", *(f"- {sentence}" for sentence in refusals)]
    Path("docs/placements.md").write_text("\n".join(lines) + "\n")
    wrong = [d for d in found["difference"] if not isinstance(d, str) and d]
    print(f"{len(found)} combinations, {len(wrong)} not exact")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
