from . import analysis, causal, corpora, viz
from ._version import __version__
from .attach import PositionStreams, attach_positions
from .config import PositionConfig, PositionModelConfig
from .errors import PositionsError
from .hooked import HookedPositionTransformer
from .interventions import ablate, add_gap, freeze, patch, scale
from .pretrained import load_adapter, save_adapter

__all__ = [
    "HookedPositionTransformer",
    "PositionConfig",
    "PositionModelConfig",
    "PositionStreams",
    "PositionsError",
    "__version__",
    "ablate",
    "add_gap",
    "analysis",
    "attach_positions",
    "causal",
    "corpora",
    "freeze",
    "load_adapter",
    "patch",
    "save_adapter",
    "scale",
    "viz",
]
