"""lens-positions: the distance between tokens as an activation in TransformerLens."""

from .attach import PositionStreams, attach_positions
from .errors import PositionsError
from .hooked import HookedPositionTransformer, PositionModelConfig
from .increments import PositionConfig
from .pretrained import load_adapter, save_adapter

__all__ = [
    "HookedPositionTransformer",
    "PositionConfig",
    "PositionModelConfig",
    "PositionStreams",
    "PositionsError",
    "attach_positions",
    "load_adapter",
    "save_adapter",
]
