"""Increments, the positions that they sum to, and how both get into a model: what every other package stands on.

Start with `increments.py` (where increments come from) and `positions.py` (what they become).
"""
