from .arcs import arcs
from .charts import auc_chart, differences_chart, frequency_map, kinds_chart, lines_chart
from .effect_charts import ablation_bars, effect_map, head_map
from .interactive import View, attention_view, spacing_view, tokens_view
from .map_chart import map_chart
from .output import MissingFontError
from .prompt_charts import prompts_chart
from .report import report
from .rope_charts import absolute_chart, entropy_chart, norms_map
from .spacing import spacing
from .widget import explore

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
    "explore",
    "frequency_map",
    "head_map",
    "kinds_chart",
    "lines_chart",
    "map_chart",
    "norms_map",
    "prompts_chart",
    "report",
    "spacing",
    "spacing_view",
    "tokens_view",
]
