from . import analysis, causal, corpora, viz
from ._version import __version__
from .checkpoint import load_adapter, save_adapter
from .config import PositionConfig, PositionModelConfig
from .core.attach import attach_positions
from .core.position_streams import PositionStreams
from .errors import PositionsError
from .interventions import (
    Edit,
    Hooks,
    LayerIndices,
    TokenSelection,
    ablate,
    add_gap,
    describe,
    freeze,
    patch,
    scale,
)
from .model import HookedPositionTransformer

__all__ = [
    "Edit",
    "HookedPositionTransformer",
    "Hooks",
    "LayerIndices",
    "PositionConfig",
    "PositionModelConfig",
    "PositionStreams",
    "PositionsError",
    "TokenSelection",
    "__version__",
    "ablate",
    "add_gap",
    "analysis",
    "attach_positions",
    "causal",
    "corpora",
    "describe",
    "freeze",
    "load_adapter",
    "patch",
    "save_adapter",
    "scale",
    "viz",
]
