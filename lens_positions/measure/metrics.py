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
    """The logit of the answer minus that of a wrong one, token ids both, where token `at` predicts the next.

    >>> metric = lp.causal.logit_difference(ord("e"), ord("z"))
    >>> metric(model("Th")).item() > 0  # "The" rather than "Thz"
    True
    """
    return AtToken(lambda logits: _of(logits, answer) - _of(logits, wrong), at)


def log_probability(answer: int, at: int = -1) -> AtToken:
    """The log probability of the answer, in nats, where token `at` predicts the next.

    >>> metric = lp.causal.log_probability(ord("e"))  # a byte's id is its value
    >>> 0.7 < metric(model("Th")).exp().item() < 0.9  # the probability that "e" follows
    True
    """
    return AtToken(lambda logits: _of(logits.log_softmax(-1), answer), at)


def _of(logits: Float[Tensor, "batch vocab"], token: int) -> Float[Tensor, " batch"]:
    # Checked here, where the vocabulary is known: a metric is made before the model is.
    vocab = logits.shape[1]
    return logits[:, index_of(token, "a token of the metric", f"an id from 0 to {vocab - 1}", most=vocab - 1)]


def _wide(logits: Tensor) -> Tensor:
    """Half precision has three digits: too few for small effects."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@dataclass(frozen=True)
class Loss:
    """The mean loss of the tokens after the first of each row, in nats per token.

    Attributes:
        tokens: of one prompt for all rows, or of a prompt a row; None until a measurement says whose (`of_prompts`).
    """

    tokens: Int[Tensor, "#batch pos"] | None = None

    def __call__(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, " batch"]:
        """One number a row."""
        if self.tokens is None:
            raise PositionsError("loss() was called without a prompt; expected loss(tokens), outside of a measurement.")

        # A broadcast of the wrong prompt would give a loss, and no error.
        length = self.tokens.shape[1]
        if logits.shape[1] != length or length < 2:
            raise PositionsError(
                f"loss is of {length} tokens and the prompt has {logits.shape[1]}; expected its own tokens, at least "
                "two."
            )
        return token_losses(logits, self.tokens[:, 1:].expand(len(logits), -1)).mean(1)


def loss(tokens: Int[Tensor, "*one pos"] | None = None) -> Loss:
    """The mean loss of a prompt's tokens after the first, in nats per token.

    Args:
        tokens: of the prompt, without padding; None is whatever prompt a measurement runs, each of several its own.

    Raises:
        PositionsError: something else than the tokens of one prompt.

    >>> metric = lp.causal.loss(model.to_tokens("The cat"))
    >>> torch.allclose(metric(model("The cat")), model("The cat", return_type="loss"))
    True
    """
    if tokens is None:
        return Loss()
    if not isinstance(tokens, Tensor) or tokens.ndim not in (1, 2) or tokens.numel() != tokens.shape[-1]:
        given = f"shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else f"a {type(tokens).__name__}"
        raise PositionsError(
            f"loss was given {given}; expected the token ids of one prompt, [pos] or [1, pos], or nothing, as loss() "
            "is of the prompts that are measured."
        )
    return Loss(tokens.reshape(1, -1))


def of_prompts(metric: Metric, tokens: Int[Tensor, "batch pos"]) -> Metric:
    """The metric of these prompts: a loss that was given none becomes theirs."""
    return Loss(tokens) if isinstance(metric, Loss) and metric.tokens is None else metric


def token_losses(
    logits: Float[Tensor, "batch pos vocab"], targets: Int[Tensor, "batch next"]
) -> Float[Tensor, "batch next"]:
    """The loss of each token but the first of a row, in nats."""
    # cross_entropy takes classes as axis 1, and the logits of a token predict the next.
    predicted = _wide(logits[:, :-1]).transpose(1, 2)
    return torch.nn.functional.cross_entropy(predicted, targets.to(logits.device), reduction="none")


def differentiable(value: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
    """The values of a metric, if they have a gradient; that of an argmax, say, has none anywhere.

    Raises:
        PositionsError: they have none.
    """
    if not value.requires_grad:
        raise PositionsError("the metric has no gradient; expected one that is differentiable by the logits.")
    return value


def metric_values(
    metric: Metric, logits: Float[Tensor, "batch pos vocab"], rows: list[int] | None = None
) -> Float[Tensor, " row"]:
    """The metric of each row, or of these rows.

    Raises:
        PositionsError: it is not one finite number a row.
    """
    if not callable(metric):
        raise PositionsError(f"the metric is {metric!r}; expected a function from logits to one number a row.")

    # The metric may be any function of the user, so nothing about its result is certain.
    value: Any = metric(logits)
    if not isinstance(value, Tensor) or value.shape != logits.shape[:1]:
        given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise PositionsError(
            f"the metric returned {given} for logits {tuple(logits.shape)}; expected one number a row, shape "
            f"({len(logits)},)."
        )
    value = value if rows is None else value[rows]
    if not value.isfinite().all():
        raise PositionsError("the metric returned NaN or infinite values; expected one finite number a row.")
    return value


def baseline_of(metric: Metric, logits: Float[Tensor, "1 pos vocab"]) -> float:
    """The metric of a prompt. It is evaluated on two equal rows, which catches a metric that mixes its rows."""
    return float(metric_values(metric, logits.expand(2, -1, -1))[0].detach())


def look_back(pattern: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query"]:
    """How many tokens back each query attends, on average over its pattern."""
    queries, keys = (torch.arange(n, device=pattern.device) for n in pattern.shape[2:])
    return (pattern * (queries[:, None] - keys).to(pattern)).sum(-1)
