"""`read_corpus` of `lens_positions.measure`, where whoever analyses a corpus looks for it."""

from ..measure.corpus_reader import read_corpus

__all__ = ["read_corpus"]
