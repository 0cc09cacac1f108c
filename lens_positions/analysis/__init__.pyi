from .absolute_position import absolute_variation, attention_sinks, fingerprints, replace_first, replacement_effects
from .corpus_reader import read_corpus
from .dispersion import adaptive_temperature, attention_dispersion, loss_by_length
from .extremes import extreme_tokens
from .frequencies import (
    aligned_key,
    frequency_contributions,
    frequency_norms,
    frequency_quarters,
    frequency_shares,
    high_frequency_use,
    positional_heads,
    scores_by_distance,
    truncate_frequencies,
)
from .heads import head_correlations, head_profile
from .losses import compare_losses
from .rotary_layout import rotary_layout
from .specialisation import below_zero, saturation, specialisation
from .token_kinds import increments_by_category
from .two_word_names import entity_grouping, frequent_names, matched_pairs
from .word_boundaries import boundary_auc, branching_entropy, mutual_information

__all__ = [
    "absolute_variation",
    "adaptive_temperature",
    "aligned_key",
    "attention_dispersion",
    "attention_sinks",
    "below_zero",
    "boundary_auc",
    "branching_entropy",
    "compare_losses",
    "entity_grouping",
    "extreme_tokens",
    "fingerprints",
    "frequency_contributions",
    "frequency_norms",
    "frequency_quarters",
    "frequency_shares",
    "frequent_names",
    "head_correlations",
    "head_profile",
    "high_frequency_use",
    "increments_by_category",
    "loss_by_length",
    "matched_pairs",
    "mutual_information",
    "positional_heads",
    "read_corpus",
    "replace_first",
    "replacement_effects",
    "rotary_layout",
    "saturation",
    "scores_by_distance",
    "specialisation",
    "truncate_frequencies",
]
