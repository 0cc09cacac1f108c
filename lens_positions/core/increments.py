"""Increment sources: what decides how far each token stands from the one before it.

Every source but static is a small module that returns increments, Float[Tensor, "batch pos"] (per head with a trailing
axis, one for each key-value head), in positions: 1.0 is one step of standard RoPE. A fresh source returns exactly 1.0
everywhere, so that a model computes the same with and without it; only a frozen one that is given a table does not.
The arithmetic runs in the source's own dtype (float32, or float64 in a float64 model), and `stream.py` switches
autocast off around it, because bf16 cannot tell positions apart past 256. `positions.py` makes positions of them.

    source       reads                                    one for
    static       nothing: 1.0                             all layers
    shared       the token's embedding                    all layers
    per_layer    the residual stream entering the layer   each layer
    frozen       the token's id, in a fixed table         all layers

Learned increments: Long, "How Far Apart Does a Model Think Its Tokens Are?" (LessWrong, June 2026).
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from ..config import PositionConfig
from ..errors import PositionsError

EPS = 1e-6
"""Of the RMSNorm: that of Llama."""


class LinearPlusConstant(nn.Linear):
    """A Linear plus a constant, in few operators where it has one output."""

    def __init__(self, d_in: int, d_out: int, constant: float) -> None:
        super().__init__(d_in, d_out)
        self.constant = constant

    def forward(self, x: Float[Tensor, "batch pos hidden"]) -> Float[Tensor, "batch pos out"]:
        """As nn.Linear, plus the constant."""
        if self.out_features > 1:
            return super().forward(x) + self.constant

        # torch.compile fuses a matrix times a vector with its neighbours; in place, as addmv copies its first argument.
        rows = x.flatten(0, -2)
        start = self.bias.expand(len(rows)) + self.constant
        return start.addmv_(rows, self.weight.view(-1)).view(*x.shape[:-1], 1)


class LearnedIncrements(nn.Module):
    """Increments from a two-layer network: Linear, GELU, Linear, activation.

    The last layer starts at zero, so that its product x is 0 everywhere. Increments are f(x + b) / f(b), which is
    exactly 1.0 then, for a fixed offset b:

        sigmoid     f(b) = 1 / max_increment    increments between 0 and max_increment
        softplus    f(b) = 1                    positive
        none        f(b) = b = 1                any number, negative ones too

    `normalize` puts an RMSNorm in front, so that the network of every layer gets inputs of size 1, whatever the
    residual stream has grown to there.
    """

    def __init__(self, config: PositionConfig, d_model: int, n_heads: int | None, normalize: bool) -> None:
        super().__init__()
        hidden = config.hidden or max(1, d_model // 4)
        self.norm = nn.RMSNorm(d_model, eps=EPS) if normalize else nn.Identity()
        self.hidden = nn.Linear(d_model, hidden)
        self.offset = {
            "sigmoid": -math.log(config.max_increment - 1),
            "softplus": math.log(math.e - 1),
            "none": 1.0,
        }[config.activation]
        self.out = LinearPlusConstant(hidden, n_heads or 1, self.offset)
        self.per_head, self.activation = n_heads is not None, config.activation
        self._fresh: Tensor | None = None  # `_fresh_activation` of the last shape

        # Inputs of size 1 come out of the hidden layer with size 1, and out of the last one as zeros.
        nn.init.normal_(self.hidden.weight, std=1 / math.sqrt(d_model))
        nn.init.zeros_(self.hidden.bias)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, states: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos *head"]:
        """Increments of each token, from its embedding or its residual stream."""
        x = states.to(self.out.weight.dtype)
        x = self.out(functional.gelu(self.hidden(self.norm(x))))  # with the offset added
        x = x if self.per_head else x.squeeze(-1)
        return x if self.activation == "none" else self._activation(x) / self._fresh_activation(x)

    def _activation(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x) if self.activation == "sigmoid" else functional.softplus(x)

    def _fresh_activation(self, x: Tensor) -> Tensor:
        """f(b), what the activation of a fresh source is, by which every activation is divided.

        It is computed in the shape of x, because vectorised and scalar functions may differ in the last bit, and kept
        for the next call of that shape.
        """
        if torch.compiler.is_compiling():  # in the graph, where nothing can be kept
            return self._activation(torch.full_like(x, self.offset))
        kept = self._fresh
        if kept is None or kept.shape != x.shape or kept.dtype != x.dtype or kept.device != x.device:
            # A tensor of inference mode could not be kept for a pass with gradients.
            with torch.no_grad(), torch.inference_mode(False):
                kept = self._activation(torch.full(x.shape, self.offset, dtype=x.dtype, device=x.device))
            self._fresh = kept
        return kept


class FrozenIncrements(nn.Module):
    """Increments looked up by token id in a table that does not train, such as what a shared source has learned.

    Ids beyond the end of the table get 1.0: a vocabulary that grows once the table is there (`resize_token_embeddings`)
    gets standard steps.
    """

    def __init__(self, table: Float[Tensor, "vocab *head"]) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.table: Tensor

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos *head"]:
        """Increments of each token, from its id."""
        in_table = tokens < len(self.table)
        increments = self.table[torch.where(in_table, tokens, 0)]

        # Broadcast over heads, where the table has them.
        in_table = in_table.view(*in_table.shape, *[1] * (increments.ndim - tokens.ndim))
        return torch.where(in_table, increments, 1.0)

    def table_for(self, vocab: int) -> Float[Tensor, "vocab *head"]:
        """The increments of the first `vocab` token ids, as `forward` gives them."""
        table = self.table[:vocab]
        return torch.cat([table, table.new_ones(vocab - len(table), *table.shape[1:])])


def build_sources(
    config: PositionConfig,
    *,
    n_layers: int,
    d_model: int,
    n_heads: int,
    vocab: int,
    dtype: torch.dtype,
    table: Float[Tensor, "vocab *head"] | None = None,
) -> nn.ModuleList:
    """The modules a configuration asks for: none when static, one when shared or frozen, else one a layer.

    Args:
        config: what to build.
        n_layers: layers with rotary attention.
        d_model: width of the residual stream.
        n_heads: key-value heads, used where config.per_head.
        vocab: number of token ids, the length of a frozen table.
        dtype: float32 or float64.
        table: increments by token id for a frozen source; None gives all ones.

    Raises:
        PositionsError: a table for a source that has none, of the wrong shape, or with NaN or infinite values.
    """
    heads = n_heads if config.per_head else None
    if table is not None and config.source != "frozen":
        raise PositionsError(f"a table was given for the source {config.source!r}; expected source='frozen' with it.")

    if config.source == "static":
        return nn.ModuleList()

    if config.source == "frozen":
        shape = (vocab, n_heads) if config.per_head else (vocab,)
        table = torch.ones(shape) if table is None else table.detach()
        if table.shape != shape:
            raise PositionsError(f"the frozen table has shape {tuple(table.shape)}; expected {shape}.")
        if not torch.isfinite(table).all():
            raise PositionsError("the frozen table has NaN or infinite increments; expected finite numbers.")
        return nn.ModuleList([FrozenIncrements(table.to(dtype).clone())])

    if config.source == "shared":
        return nn.ModuleList([LearnedIncrements(config, d_model, heads, normalize=False)]).to(dtype)

    return nn.ModuleList([LearnedIncrements(config, d_model, heads, normalize=True) for _ in range(n_layers)]).to(dtype)
