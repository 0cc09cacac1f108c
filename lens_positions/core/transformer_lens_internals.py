"""What this package uses of TransformerLens beside its documented interface, all in one place.

TransformerLens promises none of these names, so a new version may rename them. Each has one function or name here,
with what it stands for and what would break without it; nothing else in the package says any of them. They are those
of TransformerLens 4, to which the package's dependency is bounded.
"""

import threading
from typing import Any

from torch import nn
from transformer_lens.hook_points import HookPoint

# The second names of hook points, such as hook_attn_out. Hooks may be named by either; without this, hooks by a second
# name would be refused as unknown.
from transformer_lens.model_bridge.bridge_core import BridgeCore, build_alias_to_canonical_map

# How TransformerLens describes a transformers model to itself, and sets a tokenizer up (it may load another one, that
# puts a BOS in front). `from_transformers` builds bridges around models in memory with them; boot_transformers, the
# documented way, loads a model by name. Without them no bridge could be built around a model that is there.
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf, configure_tokenizer

__all__ = [
    "ORIGINAL",
    "OwnHandles",
    "build_alias_to_canonical_map",
    "build_bridge_config_from_hf",
    "configure_tokenizer",
    "has_processed_weights",
    "hook_registry",
    "is_wrapper",
    "own_name",
    "runs_before_blocks",
    "scan_hook_points",
    "skips_embeddings",
]

_HANDLES = threading.Lock()

# The name under which a bridge component holds the transformers module that it stands for. State dicts of a bridged
# model have it in every key: without it, neither digests nor adapters would find a weight by the model's own name.
ORIGINAL = "_original_component"


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module is a bridge component around a module of the model's own."""
    # The public side of ORIGINAL. A component without a module of its own has None there; without the name, streams
    # would look for attention among the components, whose forwards take everything.
    return getattr(module, "original_component", None) is not None


def hook_registry(bridge: Any) -> dict[str, HookPoint]:
    """Return the hook points of a bridge by name: the dict itself, which may be changed."""
    # What run_with_hooks, run_with_cache and hooks look names up in. `hook_dict`, which is public, is a new dict at
    # each call, made by a walk over the model: names could be read from it, but those of streams not taken out again.
    return bridge._hook_registry


def scan_hook_points(bridge: Any) -> None:
    """Let a bridge find hook points that were put into its modules after it was built, and name them."""
    # A bridge looks for hook points once, when it is built. Without this, `hook_increments`, `hook_positions` and
    # `hook_rotation` would exist and no call could name them.
    bridge._scan_existing_hooks(bridge, "")


def skips_embeddings(first_block: nn.Module) -> bool:
    """Whether the pass that runs was started at a later layer, and so reads no token embeddings."""
    # `start_at_layer` notes on each block where the pass starts, for the time of the call. Layer 0 reads embeddings as
    # ever. Without it, a shared source would read those of another pass.
    return bool(getattr(first_block, "_start_at_layer_idx", None))


def runs_before_blocks(bridge: Any, name: str) -> bool:
    """Whether a hook point is one of the embeddings, which a pass from a later layer on leaves out."""
    # Which names those are depends on the architecture, and TransformerLens keeps the list. Without it, run_with_cache
    # would warn of hooks that `start_at_layer` leaves out by intent.
    return bool(bridge._is_embedding_stage_hook(name))


def has_processed_weights(model: Any) -> bool:
    """Whether enable_compatibility_mode folded a bridge's weights (layer norms, centring)."""
    # Weights are changed in place then. Without it, save_pretrained would write weights that transformers reads as
    # another model.
    return bool(getattr(model, "_weights_processed", False))


class OwnHandles:
    """What a bridge does with the handles of its hooks, one thread at a time."""

    @staticmethod
    def _remove_temporary_hook(hook_point: Any, direction: Any, handle: Any) -> None:
        # TransformerLens takes a call's handles out of a hook point's list by writing a new list. Two threads that do
        # so at once would put back what the other took out, and the list, with all that its functions hold, would grow.
        with _HANDLES:
            BridgeCore._remove_temporary_hook(hook_point, direction, handle)


def own_name(name: str) -> str:
    """The name that a module or tensor of a bridged model has in the model itself."""
    return ".".join(part for part in name.split(".") if part != ORIGINAL)
