"""What the process that forks commands imports, once: see `forked`. No shapes are checked in it."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

import lens_positions.causal
import lens_positions.cli
import lens_positions.training.graft
import lens_positions.training.loop  # noqa: F401

torch.set_num_threads(1)
