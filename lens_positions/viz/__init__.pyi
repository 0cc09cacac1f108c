from .characters import spacing
from .effects import ablation_bars, effect_map
from .machinery import absolute_chart, entropy_chart, norms_map
from .measurements import auc_chart, differences_chart, frequency_map, kinds_chart, lines_chart
from .onefile import report
from .plain import MissingFontError
from .rulers import arcs
from .views import View, attention_view, spacing_view, tokens_view

__all__ = [
    "MissingFontError",
    "View",
    "ablation_bars",
    "absolute_chart",
    "arcs",
    "attention_view",
    "auc_chart",
    "differences_chart",
    "effect_map",
    "entropy_chart",
    "frequency_map",
    "kinds_chart",
    "lines_chart",
    "norms_map",
    "report",
    "spacing",
    "spacing_view",
    "tokens_view",
]
