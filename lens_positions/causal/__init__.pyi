from .ablation import Ablations, ablation_table, token_means
from .attribution import attribution
from .mediation import mediation
from .metrics import log_probability, logit_difference, loss
from .paths import path_sweep
from .sweeps import gap_sweep, patch_sweep

__all__ = [
    "Ablations",
    "ablation_table",
    "attribution",
    "gap_sweep",
    "log_probability",
    "logit_difference",
    "loss",
    "mediation",
    "patch_sweep",
    "path_sweep",
    "token_means",
]
