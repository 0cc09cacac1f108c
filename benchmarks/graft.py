"""What a graft learned: its loss beside the baseline and beside controls, its increments, and what moved.

    python benchmarks/graft.py RUN ... [--output FILE]

Each RUN is a folder that `lens-positions graft` wrote. The controls change the graft's increments and nothing else,
on the same held-out windows:

    mean      every increment becomes the layer's mean: is it the scale of positions that matters, or who gets what?
    shuffled  the increments of a window change places among its tokens, at each layer alike: same values, wrong tokens

Differences are paired by document: their mean, with a 95% t interval.
"""

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from rich.console import Console
from torch import Tensor
from tyro.conf import Positional

from lens_positions import HookedPositionTransformer, PositionsError, corpora
from lens_positions.analysis.extremes import extreme_tokens, vocabulary_increments
from lens_positions.analysis.token_kinds import increments_by_category
from lens_positions.checkpoint import load_pretrained
from lens_positions.measure.corpus_reader import read_corpus
from lens_positions.training.config import GraftConfig, update_config
from lens_positions.training.data import heldout_documents, heldout_windows, tokenize_corpus
from lens_positions.training.graft import compare, document_difference
from lens_positions.training.loop import token_nats

CHARACTERS = 60_000
"""Held-out text that is read for the increments by kind of token and for what moved."""


@dataclass
class Options:
    """Options.

    Args:
        runs: folders that graft wrote to the end.
        output: where the figures are written as JSON.
        cache: where the tokens of corpora are kept.
    """

    runs: Positional[tuple[Path, ...]]
    output: Path = Path("benchmarks/graft.json")
    cache: Path = Path(".cache")


def main(options: Options) -> None:
    """Measure every run and write what was found."""
    described = {
        "command": "python benchmarks/graft.py " + " ".join(map(str, options.runs)),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "runs": {run.name: measure(run, options.cache) for run in options.runs},
    }
    options.output.write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n", "utf-8")


def measure(run: Path, cache: Path) -> dict[str, Any]:
    """One graft: its comparison, its controls, its increments by kind and what moved."""
    found = compare(run)
    saved = json.loads((run / "graft" / "training.json").read_text("utf-8"))["config"]
    config = update_config(GraftConfig(), saved, str(run))
    model, tokenizer = load_pretrained(run / "graft" / "model")
    corpus = tokenize_corpus(
        config.corpus, cache, text_column=config.text_column, max_bytes=config.max_bytes, tokenizer=tokenizer
    )
    windows = heldout_windows(corpus.heldout, config.n_ctx, config.eval_windows)
    documents = heldout_documents(corpus, config.n_ctx, config.eval_windows)
    parts = {part: pd.read_csv(run / part / "heldout.csv", index_col="document") for part in ("graft", "baseline")}
    losses = {part: table.iloc[:, 1] / table.iloc[:, 0] for part, table in parts.items()}
    means = [layer["mean"] for layer in found["increments"]]
    order = torch.randperm(config.n_ctx - 1, generator=torch.Generator().manual_seed(0)) + 1
    changes: dict[str, Callable[[int, Tensor], Tensor]] = {
        "mean": lambda layer, d: torch.full_like(d, means[layer]),
        "shuffled": lambda layer, d: torch.cat([d[:, :1], d[:, order]], dim=1),
    }
    console = Console(stderr=True)
    for name, change in changes.items():
        console.print(f"{run.name}: held-out loss with increments {name}")
        losses[name] = changed_loss(model, windows, documents, change)
    bridge = HookedPositionTransformer.from_transformers(model, tokenizer)
    console.print(f"{run.name}: what moved")
    texts = corpora.heldout_excerpts(config.corpus, CHARACTERS)
    heldout = read_corpus(bridge, texts)
    kinds = increments_by_category(bridge, heldout)
    described = {
        "config": saved,
        **found,
        "graft_minus_baseline": document_difference(losses["graft"], losses["baseline"]),
        "mean_minus_graft": document_difference(losses["mean"], losses["graft"]),
        "mean_minus_baseline": document_difference(losses["mean"], losses["baseline"]),
        "shuffled_minus_graft": document_difference(losses["shuffled"], losses["graft"]),
        "shuffled_minus_baseline": document_difference(losses["shuffled"], losses["baseline"]),
        "adapter_bytes": sum(f.stat().st_size for f in (run / "graft" / "model").iterdir()),
        "read_tokens": len(heldout.index),
        "read_documents": len(texts),
        "by_kind": kinds.round(4).to_dict("records"),
        "what_moved": extreme_tokens(bridge, heldout, top=6).round(4).to_dict("records"),
    }
    if config.positions.source == "shared":
        described["vocabulary"] = extreme_tokens(bridge, top=12).round(4).to_dict("records")
        described["vocabulary_size"] = len(vocabulary_increments(bridge))
    for name in ("graft_minus_baseline", "mean_minus_graft", "shuffled_minus_graft"):
        difference = described[name]
        print(f"{run.name} {name}: {difference}")
    return described


@torch.no_grad()
def changed_loss(
    model: Any, windows: Tensor, documents: Tensor, change: Callable[[int, Tensor], Tensor]
) -> "pd.Series[float]":
    """Nats per token of each held-out document, with changed increments."""
    hooks = [stream.hook_increments for stream in model.position_streams.layers]
    for layer, hook in enumerate(hooks):
        hook.add_hook(lambda d, hook, layer=layer: change(layer, d))
    nats = torch.cat([token_nats(model, rows).double() for rows in windows.split(2)])
    for hook in hooks:
        hook.remove_hooks()
    table = pd.DataFrame({"document": documents.flatten().numpy(), "nats": nats.flatten().numpy()})
    return table.groupby("document")["nats"].mean()


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except PositionsError as error:
        raise SystemExit(f"graft: {error}") from None
