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
from ..interventions import index_of

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
        return self.read(_wide(logits[:, place_of(self.at, logits.shape[1])]))


def place_of(at: int, length: int) -> int:
    """The index of the token that a metric reads, from the start.

    Raises:
        PositionsError: the prompt has no such token.
    """
    if isinstance(at, bool) or not isinstance(at, int) or not -length <= at < length:
        raise PositionsError(f"the metric reads token {at!r}; expected one of the prompt's {length} tokens.")
    return at % length


def logit_difference(answer: int, wrong: int, at: int = -1) -> AtToken:
    """The logit of the answer minus that of a wrong one, token ids both, where token `at` predicts the next."""
    return AtToken(lambda logits: _of(logits, answer) - _of(logits, wrong), at)


def log_probability(answer: int, at: int = -1) -> AtToken:
    """The log probability of the answer, in nats, where token `at` predicts the next."""
    return AtToken(lambda logits: _of(logits.log_softmax(-1), answer), at)


def _of(logits: Float[Tensor, "batch vocab"], token: int) -> Float[Tensor, " batch"]:
    vocab = logits.shape[1]
    return logits[:, index_of(token, "a token of the metric", f"an id from 0 to {vocab - 1}", most=vocab - 1)]


def _wide(logits: Tensor) -> Tensor:
    """Half precision has three digits: too few for small effects."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def loss(tokens: Int[Tensor, "*one pos"]) -> Metric:
    """The mean loss of a prompt's tokens after the first, in nats per token."""
    if not isinstance(tokens, Tensor) or tokens.ndim not in (1, 2) or tokens.numel() != tokens.shape[-1]:
        given = f"shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else f"a {type(tokens).__name__}"
        raise PositionsError(f"loss was given {given}; expected the token ids of one prompt, [pos] or [1, pos].")
    targets = tokens.flatten()[1:]

    def of(logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
        if logits.shape[1] != len(targets) + 1 or not len(targets):
            raise PositionsError(
                f"loss is of {len(targets) + 1} tokens and the prompt has {logits.shape[1]}; expected its own tokens, "
                "at least two."
            )
        return token_losses(logits, targets.expand(len(logits), -1)).mean(1)

    return of


def token_losses(
    logits: Float[Tensor, "batch pos vocab"], targets: Int[Tensor, "batch next"]
) -> Float[Tensor, "batch next"]:
    """The loss of each token but the first of a row, in nats."""
    predicted = _wide(logits[:, :-1]).transpose(1, 2)
    return torch.nn.functional.cross_entropy(predicted, targets.to(logits.device), reduction="none")


def measured(metric: Metric, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
    """The metric of each row.

    Raises:
        PositionsError: it is not one finite number a row.
    """
    if not callable(metric):
        raise PositionsError(f"the metric is {metric!r}; expected a function from logits to one number a row.")
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


def look_back(pattern: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query"]:
    """How many tokens back each query attends, on average over its pattern."""
    queries, keys = (torch.arange(n, device=pattern.device) for n in pattern.shape[2:])
    return (pattern * (queries[:, None] - keys).to(pattern)).sum(-1)
