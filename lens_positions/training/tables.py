"""Increments that a run is given and does not learn: a table by token id, from another model or from numbers.

They are what learned increments are compared with. A table that another model learned keeps what each byte is worth;
its mean keeps the scale alone; exchanging letters and the space keeps the scale and makes the values wrong.
"""

import string

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..checkpoint import load_pretrained
from ..core.attach import increment_table
from ..tokenizer import END_OF_DOCUMENT
from .config import TrainConfig
from .data import TokenizedCorpus

LETTERS = [ord(letter) for letter in string.ascii_letters]
SPACE = ord(" ")


def fixed_table(config: TrainConfig, corpus: TokenizedCorpus) -> Float[Tensor, "vocab *head"] | None:
    """The increments by token id that a run is given, in positions; None where it is given none.

    Raises:
        PositionsError: the model that they come from is missing, or has no shared or frozen source.
    """
    if config.head_increments is not None:
        # One row for each id: 256 bytes and the end of a document.
        return torch.tensor(config.head_increments).repeat(END_OF_DOCUMENT + 1, 1)
    if config.frozen_from is None:
        return None

    table = increment_table(load_pretrained(config.frozen_from)[0])
    if config.frozen_as == "constant":
        return mean_step(table, corpus)
    return swap_letters(table) if config.frozen_as == "swapped" else table


def mean_step(table: Float[Tensor, "vocab *head"], corpus: TokenizedCorpus) -> Float[Tensor, "vocab *head"]:
    """The mean increment of the training text, for every token."""
    # Weighted by how often each byte occurs: the mean distance between tokens stays what it was.
    counts = torch.from_numpy(np.bincount(corpus.train, minlength=len(table)))
    mean = torch.tensordot(counts.double(), table.double(), dims=1) / counts.sum()
    return mean.to(table.dtype).expand_as(table).contiguous()


def swap_letters(table: Float[Tensor, "vocab *head"]) -> Float[Tensor, "vocab *head"]:
    """Letters of the Latin alphabet with the increment of the space, and the space with the mean of theirs."""
    exchanged = table.clone()
    exchanged[LETTERS] = table[SPACE]
    exchanged[SPACE] = table[LETTERS].mean(dim=0)
    return exchanged
