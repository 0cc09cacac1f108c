"""What an effect is measured on: functions from logits [batch pos vocab] to one number a row.

Any such function will do. Those here that read one token say so (`at`), which lets a sweep leave out the logits, and
the tokens, that they do not read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import PositionsError

Metric = Callable[[Float[Tensor, "batch pos vocab"]], Float[Tensor, " batch"]]


@dataclass(frozen=True)
class AtToken:
    """A metric that reads the logits of one token.

    Attributes:
        read: from the logits [batch vocab] of that token to one number a row.
        at: the token, counted from the end where negative.
    """

    read: Callable[[Float[Tensor, "batch vocab"]], Float[Tensor, " batch"]]
    at: int = -1

    def __call__(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
        """One number a row."""
        return self.read(logits[:, self.at])


def logit_difference(answer: int, wrong: int, at: int = -1) -> AtToken:
    """The logit of the answer minus that of a wrong one, token ids both, where token `at` predicts the next."""
    return AtToken(lambda logits: logits[:, answer] - logits[:, wrong], at)


def log_probability(answer: int, at: int = -1) -> AtToken:
    """The log probability of the answer, in nats, where token `at` predicts the next."""
    return AtToken(lambda logits: logits.log_softmax(-1)[:, answer], at)


def loss(tokens: Int[Tensor, "*one pos"]) -> Metric:
    """The mean loss of a prompt's tokens after the first, in nats per token."""
    targets = tokens.flatten()[1:]

    def of(logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
        return token_losses(logits, targets.expand(len(logits), -1)).mean(1)

    return of


def token_losses(
    logits: Float[Tensor, "batch pos vocab"], targets: Int[Tensor, "batch next"]
) -> Float[Tensor, "batch next"]:
    """The loss of each token but the first of a row, in nats."""
    predicted = logits[:, :-1].transpose(1, 2)
    return torch.nn.functional.cross_entropy(predicted, targets.to(logits.device), reduction="none")


def measured(metric: Metric, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
    """The metric of each row.

    Raises:
        PositionsError: it is not one finite number a row.
    """
    value: Any = metric(logits)
    if not isinstance(value, Tensor) or value.shape != logits.shape[:1]:
        given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise PositionsError(
            f"the metric returned {given} for logits {tuple(logits.shape)}; expected one number a row, shape "
            f"({len(logits)},)."
        )
    if not value.isfinite().all():
        raise PositionsError("the metric returned NaN or infinite values; expected one finite number a row.")
    return value


def baseline_of(metric: Metric, logits: Float[Tensor, "1 pos vocab"]) -> float:
    """The metric of a prompt, asked for with two equal rows: a metric that mixes its rows is found out."""
    return float(measured(metric, logits.expand(2, -1, -1))[0].detach())
