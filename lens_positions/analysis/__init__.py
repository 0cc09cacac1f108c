"""Measurements on increments: one file a question, each a function that returns a table with n and an interval."""

from .boundaries import boundary_auc, mutual_information
from .categories import increments_by_category
from .entities import entity_grouping, matched_pairs
from .heads import head_correlations, head_profile
from .losses import compared
from .moved import what_moved
from .reading import read
from .specialisation import below_zero, saturation, specialisation

__all__ = [
    "below_zero",
    "boundary_auc",
    "compared",
    "entity_grouping",
    "head_correlations",
    "head_profile",
    "increments_by_category",
    "matched_pairs",
    "mutual_information",
    "read",
    "saturation",
    "specialisation",
    "what_moved",
]
