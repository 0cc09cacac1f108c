from .config import GraftConfig, TrainConfig, load_preset
from .graft import graft
from .loop import train

__all__ = ["GraftConfig", "TrainConfig", "graft", "load_preset", "train"]
