"""The metrics of `lens_positions.measure`, where whoever measures an effect looks for them."""

from ..measure.metrics import log_probability, logit_difference, loss

__all__ = ["log_probability", "logit_difference", "loss"]
