"""The derivative of a window's loss by each of its gaps, at every layer, from one backward pass.

The loss of a window is the sum of the nats of its tokens after the first, each predicted from those before it in the
window. At every layer a tensor of zeros is added to the increments, [batch pos *head]; the derivative by it is what one
position more would do at that layer alone, per position; by head, at that query head alone. Increments of later layers
respond, as they do in `gap_sweep`.

The integrated attribution goes from a baseline's increments to the model's own on a straight path, all layers at once,
at points of Gauss and Legendre (Sundararajan et al., arXiv 1703.01365, equation 1). Its sum over all gaps of a window
is the loss at the model's own increments minus that at the baseline's: points are doubled until it is, within 1%, or
there are as many as allowed; how far it is off is kept.

Windows run together in batches, sorted by length and padded at the right with a mask. A row of a batch depends on no
other row, so that values differ between batch sizes by rounding alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from ..core.devices import device_of
from ..core.model_state import evaluation_mode
from ..core.model_wrappers import base_model
from ..core.own_thread import own_hooks
from ..interventions import Hooks, ablation_hooks, streams_of, values_of_gaps
from ..measure.metrics import token_losses
from .pieces import in_pieces

Baseline = float | Literal["mean"]

FIRST_STEPS = 16
"""Points of a path, doubled until the sum of the parts is the whole."""

TOLERANCE = 0.01
"""How far the sum of the parts may be off, as a share of the whole."""


@dataclass(frozen=True)
class Gradients:
    """What a window's backward pass gives.

    Attributes:
        increments: as they are, in positions.
        gradient: of the window's loss, in nats per position; 0 at the token that has no gap.
        surprisal: of each token, in nats; NaN for the first.
        integrated: each gap's part of the loss at the model's own increments minus that at the baseline's, in nats.
        off: how far the sum of those parts is off the whole, as a share of it.
    """

    increments: Float[np.ndarray, "layer pos *head"]
    gradient: Float[np.ndarray, "layer pos *head"]
    surprisal: Float[np.ndarray, " pos"]
    integrated: Float[np.ndarray, "layer pos *head"] | None = None
    off: float = float("nan")


@dataclass(frozen=True)
class Batch:
    """Windows that run together.

    Attributes:
        tokens: padded at the right.
        mask: 1 for a real token; None where nothing is padded.
        lengths: of the windows.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"] | None
    lengths: list[int]


def batches_of(windows: list[Int[Tensor, " _pos"]], at_once: int) -> Iterator[tuple[list[int], Batch]]:
    """All windows in batches of at most so many tokens with their padding, the longest windows first.

    Each batch comes with the places of its windows in the list.
    """
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i]))
    while order:
        longest = len(windows[order[0]])
        count = max(1, at_once // longest)
        chosen, order = order[:count], order[count:]
        lengths = [len(windows[i]) for i in chosen]

        # What stands under the padding is never seen: 0 is a token that every model has.
        tokens = torch.nn.utils.rnn.pad_sequence([windows[i] for i in chosen], batch_first=True)
        mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
        yield chosen, Batch(tokens, None if min(lengths) == longest else mask, lengths)


class WindowGradients:
    """The gradients of batches of windows in one model."""

    def __init__(
        self,
        model: TransformerBridge,
        names: list[str],
        baseline: Baseline | None = None,
        steps: int = 256,
        pieces: bool = False,
        heads: int | None = None,
    ) -> None:
        """Choose what is computed.

        Args:
            model: a bridge with position streams.
            names: of the hooks of the increments, a layer each; by head, of those of query heads.
            baseline: increments where the path of the integrated attribution begins, as for `attribution`; None for
                the gradient alone.
            steps: points of that path at most.
            pieces: run each block a second time in the backward pass, so that little is kept between the two.
            heads: by head, how many: fewer than query heads are the groups that share their keys, each the sum of its
                query heads.
        """
        self._model = model
        self._names = names
        self._baseline = baseline
        self._steps = steps
        self._pieces = pieces
        self._heads = heads
        self._gap = streams_of(model).config.gap
        base = base_model(model)
        self._device = device_of(base.get_input_embeddings(), base)

    def __call__(self, batch: Batch) -> list[Gradients]:
        """The gradients of each window of a batch."""
        model = self._model
        with evaluation_mode(model), fixed_weights(model), torch.inference_mode(False), torch.enable_grad():
            batch = Batch(
                batch.tokens.to(self._device),
                None if batch.mask is None else batch.mask.to(self._device),
                batch.lengths,
            )
            own, gradient, surprisal = self._gradient(batch)
            path = None if self._baseline is None else self._integrated(batch, own, surprisal.sum(1))
        return [self._of_row(row, length, own, gradient, surprisal, path) for row, length in enumerate(batch.lengths)]

    def _of_row(
        self,
        row: int,
        length: int,
        own: Tensor,
        gradient: Tensor,
        surprisal: Tensor,
        path: tuple[Tensor, Tensor] | None,
    ) -> Gradients:
        def cut(values: Tensor) -> np.ndarray:
            found = values_of_gaps(values[:, row, :length].float().cpu(), self._gap, dim=1)

            # There is no gap before the first token.
            found[:, 0] = 0
            return found.numpy()

        def of_heads(values: Tensor) -> np.ndarray:
            if self._heads is None:
                return cut(values)
            return cut(reduce(values, "layer row pos (head query) -> layer row pos head", "sum", head=self._heads))

        # The query heads of a group share increments, and have effects of their own, which sum to that of the group.
        if self._heads is not None:
            own = own[..., :: own.shape[-1] // self._heads]

        # Nothing in a window predicts its first token.
        first = torch.full((1,), torch.nan)
        of_tokens = torch.cat([first, surprisal[row, : length - 1].float().cpu()]).numpy()
        if path is None:
            return Gradients(cut(own), of_heads(gradient), of_tokens)
        return Gradients(cut(own), of_heads(gradient), of_tokens, of_heads(path[0]), float(path[1][row]))

    def _gradient(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Increments and gradient [layer batch pos *head], and losses [batch next]."""
        found: dict[str, Tensor] = {}
        added: dict[str, Tensor] = {}

        def lengthen(increments: Tensor, hook: HookPoint) -> Tensor:
            name = str(hook.name)
            found.setdefault(name, increments.detach())

            # A looped model calls a layer several times: its gap grows in all of them.
            zeros = added.setdefault(name, torch.zeros_like(increments).requires_grad_())
            return increments + zeros

        # One backward pass for all layers and gaps: each has zeros of its own to differentiate by.
        with self._run_with([(name, lengthen) for name in self._names]):
            losses = self._losses(batch)
            gradients = torch.autograd.grad(losses.sum(), [added[name] for name in self._names], materialize_grads=True)
        # Layers of a model on several devices.
        recorded = [found[name] for name in self._names]
        stacked = (torch.stack([x.to(self._device) for x in values]) for values in (recorded, gradients))
        own, gradient = stacked
        return own, gradient, losses.detach()

    def _losses(self, batch: Batch) -> Float[Tensor, "batch next"]:
        """The nats of each token after the first; 0 where it is padding."""
        more = {} if batch.mask is None else {"attention_mask": batch.mask}
        logits = self._model(batch.tokens, return_type="logits", use_cache=False, **more)
        losses = token_losses(logits, batch.tokens[:, 1:])
        return losses if batch.mask is None else losses * batch.mask[:, 1:].to(losses)

    def _integrated(
        self, batch: Batch, own: Float[Tensor, "layer batch pos *head"], losses: Float[Tensor, " batch"]
    ) -> tuple[Tensor, Tensor]:
        """Each gap's part [layer batch pos *head], and how far their sum is off, by window."""
        real = torch.ones_like(batch.tokens) if batch.mask is None else batch.mask

        # Padding goes nowhere: on its own path it would count in the sums.
        way = (own - self._at_baseline(batch)) * real.view(1, *real.shape, *[1] * (own.ndim - 3)).to(own)
        with torch.no_grad(), self._run_with(_hooks_that_set(self._names, own - way)):
            whole = losses - self._losses(batch).sum(1)

        # Each window by itself gets as many points as it needs, so that its values do not depend on the others.
        parts, off = torch.zeros_like(own), torch.full_like(whole, torch.inf)
        rows, points = torch.arange(len(whole), device=whole.device), FIRST_STEPS
        while len(rows) and points <= max(self._steps, FIRST_STEPS):
            of_rows = Batch(batch.tokens[rows], None if batch.mask is None else batch.mask[rows], [])
            parts[:, rows] = way[:, rows] * self._mean_gradient(of_rows, own[:, rows], way[:, rows], points)
            sums = parts[:, rows].double().transpose(0, 1).flatten(1).sum(1)
            off[rows] = ((sums - whole[rows]) / whole[rows]).abs().to(off)
            rows, points = rows[off[rows] > TOLERANCE], 2 * points
        return parts, off

    def _mean_gradient(self, batch: Batch, own: Tensor, way: Tensor, points: int) -> Tensor:
        """The gradient averaged over the path by quadrature."""
        # From [-1, 1], where the points are defined, to the path from 0 to 1.
        places, weights = np.polynomial.legendre.leggauss(points)
        mean = torch.zeros_like(own)
        for place, weight in zip((places + 1) / 2, weights / 2, strict=True):
            mean += float(weight) * self._gradient_at(batch, own - (1 - float(place)) * way)
        return mean

    def _at_baseline(self, batch: Batch) -> Float[Tensor, "layer batch pos *head"]:
        """The increments where the path begins."""
        assert self._baseline is not None
        found: dict[str, Tensor] = {}

        def keep(increments: Tensor, hook: HookPoint) -> None:
            found.setdefault(str(hook.name), increments.detach().clone().to(self._device))

        # A baseline may depend on the prompt ("mean"), so it is read off a run with it in place.
        hooks: Hooks = ablation_hooks(self._model, to=self._baseline)
        with torch.no_grad(), self._run_with([*hooks, *((name, keep) for name in self._names)]):
            self._losses(batch)
        return torch.stack([found[name] for name in self._names])

    def _gradient_at(
        self, batch: Batch, increments: Float[Tensor, "layer batch pos *head"]
    ) -> Float[Tensor, "layer batch pos *head"]:
        """The gradient where the increments of all layers are set."""
        increments = increments.detach().requires_grad_()
        with self._run_with(_hooks_that_set(self._names, increments)):
            return torch.autograd.grad(self._losses(batch).sum(), increments)[0]

    @contextmanager
    def _run_with(self, hooks: Hooks) -> Iterator[None]:
        with own_hooks(self._model, hooks), in_pieces(self._model) if self._pieces else nullcontext():
            yield


def _hooks_that_set(names: list[str], increments: Float[Tensor, "layer batch pos *head"]) -> Hooks:
    def put(values: Tensor) -> Callable[..., Tensor]:
        return lambda given, hook: values.to(given.device)

    return [(name, put(increments[i])) for i, name in enumerate(names)]


@contextmanager
def fixed_weights(model: torch.nn.Module) -> Iterator[None]:
    """Let no gradient be computed for weights, for the time being: nothing is kept for them."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def is_offloaded(model: Any) -> bool:
    """Whether weights are loaded when they are needed: a backward pass of the whole would hold all of them."""
    # accelerate puts a hook on each module that it loads, alone or as one of several.
    hooks = (getattr(module, "_hf_hook", None) for module in base_model(model).modules())
    return any(getattr(one, "offload", False) for hook in hooks for one in (hook, *getattr(hook, "hooks", ())))
