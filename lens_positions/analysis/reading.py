"""`read` of `lens_positions.measure`, where whoever analyses a corpus looks for it."""

from ..measure.corpus_reader import read

__all__ = ["read"]
