from .ablation import Ablations, ablation_table, token_means
from .attribution import attribution
from .map_folder import GapMap
from .map_run import gap_map
from .map_tables import map_summary
from .mediation import mediation
from .metrics import log_probability, logit_difference, loss
from .paths import path_sweep
from .prompts import PromptEffects, over_prompts
from .sweeps import gap_sweep, patch_sweep

__all__ = [
    "Ablations",
    "GapMap",
    "PromptEffects",
    "ablation_table",
    "attribution",
    "gap_map",
    "gap_sweep",
    "log_probability",
    "logit_difference",
    "loss",
    "map_summary",
    "mediation",
    "over_prompts",
    "patch_sweep",
    "path_sweep",
    "token_means",
]
