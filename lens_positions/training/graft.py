"""Graft position streams onto a pretrained model: learn increments, and measure them against a baseline without them.

A graft is a folder of two runs, each as in `loop.py`, and their comparison:

    graft/            the streams, and what else learns
    baseline/         the same base, data, order of data, steps and seed without the source
    comparison.json   held-out loss of both, and the paired difference over documents

The streams start at increments of exactly 1.0, so before the first step both are the pretrained model. With
`adapt` "frozen" the baseline has nothing to learn, and is that model.
"""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from ..checkpoint import (
    checkpoint_path,
    fingerprint,
    load_base,
    load_pretrained,
    read_positions,
    save_adapter,
    save_pretrained,
)
from ..checkpoint_files import write_whole
from ..core.attach import attach_positions
from ..core.find_attention import RotaryAttention
from ..core.increments import PositionConfig
from ..errors import PositionsError
from ..measure.intervals import t_interval
from ..tokenizer import is_byte_tokenizer
from .checkpoints import read_evaluations, refuse_other
from .config import GraftConfig, to_json
from .loop import Run, Subject, lock_folder, new_accelerator, refuse_used, tokenize_corpus_once

PARTS = ("graft", "baseline")


class GraftedModel(Subject):
    """A pretrained model with streams: the source learns, and with it LoRA weights or everything."""

    def __init__(self, config: GraftConfig, positions: PositionConfig) -> None:
        self.config, self.n_ctx = config, config.n_ctx
        own = read_positions(Path(checkpoint_path(config.base)))
        if own is not None and own.config.source != "static":
            raise PositionsError(
                f"{config.base} has position streams of its own ({own.config.source}); expected a model without them."
            )
        dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
        self.model, self.tokenizer = load_base(config.base, dtype=dtype)
        context = getattr(self.model.config, "max_position_embeddings", None)
        if context is not None and config.n_ctx > context:
            raise PositionsError(f"n_ctx is {config.n_ctx}; expected at most {context}, the context of {config.base}.")

        # Before anything is added: what a graft is resumed on must be this base.
        self.base_sha256 = fingerprint(self.model)
        self.byte_tokens = is_byte_tokenizer(self.tokenizer)

        # Whether the tokenizer puts BOS in front is seen by asking it.
        starts_texts = self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        self.bos = self.tokenizer.bos_token_id if starts_texts and not self.byte_tokens else None
        self.model.requires_grad_(config.adapt == "full")

        # LoRA weights first and the source after them, each from the seed: with and without a source, LoRA starts
        # alike.
        torch.manual_seed(config.seed)
        if config.adapt == "lora":
            self._add_lora()
        self.adapted_parameters = [p for p in self.model.parameters() if p.requires_grad]
        torch.manual_seed(config.seed)
        self.streams = attach_positions(self.model, positions)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def _add_lora(self) -> None:
        # peft wants names; attention is found as modules.
        names = {id(module): name for name, module in self.model.named_modules()}
        attentions = RotaryAttention(self.model).modules

        # All linear maps of attention that rotates, by what they are and not by name: families name them differently.
        projections = [m for one in attentions for m in one.module.modules() if isinstance(m, nn.Linear)]
        if not projections:
            raise PositionsError(f"{self.config.base} has no linear projections in its attention; expected some.")
        rank = self.config.lora_rank
        targets = [names[id(m)] for m in projections]
        self.model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets))
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                # Beside a bf16 base: a bf16 weight is not moved by small steps.
                parameter.data = parameter.data.float()

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """The source at its rate, and what else learns at another."""
        groups = [
            (list(self.streams.parameters()), self.config.learning_rate),
            (self.adapted_parameters, self.config.adapt_learning_rate),
        ]
        return [group for group in groups if group[0]]

    def identity(self) -> dict[str, str]:
        """The weights that the base had."""
        return {"base_sha256": self.base_sha256}

    def save(self, folder: Path) -> None:
        """Write the adapter, or the whole model where all of it learns."""
        if self.config.adapt == "full":
            save_pretrained(self.model, self.tokenizer, folder)
        else:
            save_adapter(self.model, folder, base=self.config.base)

    def restore(self, folder: Path) -> None:
        """Take over an adapter or a whole model."""
        if self.config.adapt == "full":
            self.model.load_state_dict(load_pretrained(folder)[0].state_dict())
            return
        self.streams.load_state_dict(load_file(folder / "positions.safetensors"))
        if self.config.adapt == "lora":
            set_peft_model_state_dict(self.model, load_file(folder / "adapter_model.safetensors"))


def graft(
    config: GraftConfig, folder: Path, *, resume: bool = False, cache_dir: Path = Path(".cache")
) -> dict[str, Any]:
    """Train a graft and its baseline into a folder, and compare them on held-out documents.

    Args:
        config: the graft; with `resume` it must be the one that the folder was started with.
        folder: the folder; a new graft needs an empty one.
        resume: go on where it was interrupted.
        cache_dir: where the tokens of corpora are kept.

    Returns:
        The comparison: held-out nats per token (per byte for a model of bytes) of both parts, and the mean over
        documents of the difference, graft minus baseline, with its 95% t interval.

    Raises:
        PositionsError: the base or the corpus cannot be had, the base is not what the folder was started with, the
            folder is in use, or what is in it is damaged.
        KeyboardInterrupt: after an interrupt, when the checkpoint has been written.
    """
    if not resume:
        refuse_used(folder)
    for part in PARTS if resume else ():
        if (folder / part / "training.json").exists():
            refuse_other(folder / part, {"config": to_json(config)})

    # A part whose held-out table is written is finished.
    left = [part for part in PARTS if not (folder / part / "heldout.csv").exists()]
    with ExitStack() as holding:
        for part in left:
            run = _prepare_run(config, part, folder, cache_dir)
            if part == left[0]:
                holding.enter_context(lock_folder(folder))
                if not resume:  # again, as another process may have come first
                    refuse_used(folder)
            run.go(resume=(folder / part / "training.json").exists())
            run.accelerator.free_memory()
            if run.interrupted:  # when all was done
                raise run.interrupted
            del run  # or two models would be in memory
    compared = compare(folder)
    text = json.dumps(compared, indent=2) + "\n"
    write_whole(folder / "comparison.json", lambda file: file.write(text.encode()))
    return compared


def _prepare_run(config: GraftConfig, part: str, folder: Path, cache_dir: Path) -> Run:
    """The run of a part, with what is there of it checked; nothing is written yet."""
    positions = config.positions
    if part == "baseline":
        positions = PositionConfig(source="static", gap=positions.gap)
    accelerator = new_accelerator(config, folder / part)
    subject = GraftedModel(config, positions)
    corpus = tokenize_corpus_once(config, cache_dir, accelerator, subject.tokenizer)

    # An id beyond the embeddings fails on a GPU with an error that says nothing.
    rows = len(subject.model.get_input_embeddings().weight)
    largest = max(int(corpus.train.max()), int(corpus.heldout.max()))
    if largest >= rows:
        raise PositionsError(
            f"the tokenizer of {config.base} gives token {largest}, and the model has embeddings of {rows}; expected a "
            "tokenizer made for it."
        )
    run = Run(config, folder / part, accelerator, corpus, subject, name=part, whole=folder)
    if (folder / part / "training.json").exists():
        run.saved_progress()
    return run


def compare(folder: Path) -> dict[str, Any]:
    """Held-out loss of a graft and its baseline, and the paired difference over documents.

    Raises:
        PositionsError: one of them is not finished, or a file is damaged.
    """
    for part in PARTS:
        if not (folder / part / "heldout.csv").is_file():
            raise PositionsError(f"{folder} has no finished {part}; expected a folder that graft wrote to the end.")

    # Paired by document: both parts predicted the same tokens.
    ours, theirs = (_read_heldout(folder / part / "heldout.csv") for part in PARTS)
    unit = ours.columns[0]
    if unit not in theirs or not ours[unit].equals(theirs[unit]):
        raise PositionsError(f"the parts of {folder} were measured on different text; expected one graft.")
    name = f"nats_per_{unit.removesuffix('s')}"
    return {
        "graft_" + name: ours["nats"].sum() / ours[unit].sum(),
        "baseline_" + name: theirs["nats"].sum() / theirs[unit].sum(),
        "difference_of_documents": document_difference(ours["nats"] / ours[unit], theirs["nats"] / theirs[unit]),
        f"heldout_{unit}": int(ours[unit].sum()),
        "increments": read_evaluations(folder / "graft")[0][-1]["increments"],
    }


def _read_heldout(path: Path) -> pd.DataFrame:
    """Predicted tokens and their nats by document."""
    try:
        table = pd.read_csv(path, index_col="document")
        sizes, nats = table.columns
        table = table.astype({sizes: "int64", nats: "float64"})
        if nats != "nats" or not len(table) or not np.isfinite(table["nats"]).all() or (table[sizes] < 0).any():
            raise ValueError("its numbers are none that a run writes")
    except (ValueError, KeyError, OSError) as error:
        raise PositionsError(f"{path} is damaged ({error}); expected what the run wrote.") from error
    return table


def document_difference(ours: "pd.Series[float]", theirs: "pd.Series[float]") -> dict[str, float | int | None]:
    """A difference of losses by document: `mean`, its 95% t interval `low` to `high` (None for one), `documents`."""
    # A document all of whose tokens are uncounted has no loss.
    difference = (ours - theirs).dropna()
    low, high = t_interval(difference.to_numpy()) if len(difference) > 1 else (None, None)
    return {"mean": float(difference.mean()), "low": low, "high": high, "documents": len(difference)}
