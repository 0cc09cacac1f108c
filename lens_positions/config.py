"""What is asked for, as plain values: where increments come from, a model of fresh weights, and names to choose from.

torch is not imported here, so that a command line can show and check these values at once.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .errors import PositionsError

if TYPE_CHECKING:
    from transformers import LlamaConfig, MistralConfig

END_OF_DOCUMENT = 256
"""The token beside the 256 bytes: it begins a text and ends a document."""

BLOCK = 16
"""Tokens that repeat, where the beginnings of texts do."""

Alphabet = Literal["prose", "code"]
"""Which kinds tokens are divided into."""

SweepSite = Literal["increments", "positions", "rot_q", "rot_k", "resid", "pattern"]
"""What a patch replaces."""

SOURCES = ("static", "shared", "per_layer", "frozen")


@dataclass(frozen=True)
class PositionConfig:
    """Where increments come from and how they become positions.

    Args:
        source: "static" (all 1.0), "shared" (a network on the token embedding, one for all layers),
            "per_layer" (a network on the residual stream entering each layer) or "frozen" (a table by token id).
        per_head: one increment for each key-value head (each head, where there is no grouping).
        gap: "before": p_t = d_1 + ... + d_t, the increment is the gap before its token (d_0 has no effect);
            "after": p_t = d_0 + ... + d_{t-1}.
        activation: "sigmoid" (between 0 and max_increment), "softplus" (positive) or "none" (signed).
        max_increment: the bound of the sigmoid, in positions.
        hidden: width of the source's hidden layer; None is a quarter of the model's.

    Raises:
        PositionsError: a value outside those listed.

    >>> lp.PositionConfig("shared", per_head=True).gap
    'before'
    >>> lp.PositionConfig(max_increment=0.0)
    Traceback (most recent call last):
        ...
    lens_positions.errors.PositionsError: max_increment is 0.0; expected a finite number above 1, a fresh increment.
    """

    source: Literal["static", "shared", "per_layer", "frozen"] = "per_layer"
    per_head: bool = False
    gap: Literal["before", "after"] = "before"
    activation: Literal["sigmoid", "softplus", "none"] = "sigmoid"
    max_increment: float = 10.0
    hidden: int | None = None

    def __post_init__(self) -> None:
        for name, given, expected in (
            ("source", self.source, SOURCES),
            ("gap", self.gap, ("before", "after")),
            ("activation", self.activation, ("sigmoid", "softplus", "none")),
        ):
            if given not in expected:
                raise PositionsError(f"{name} is {given!r}; expected one of {', '.join(expected)}.")
        if not (isinstance(self.max_increment, (int, float)) and 1 < self.max_increment < math.inf):
            raise PositionsError(
                f"max_increment is {self.max_increment!r}; expected a finite number above 1, a fresh increment."
            )
        if not isinstance(self.per_head, bool):
            raise PositionsError(f"per_head is {self.per_head!r}; expected True or False.")

        # True is an int to Python, and no width.
        whole = isinstance(self.hidden, int) and not isinstance(self.hidden, bool)
        if self.hidden is not None and not (whole and self.hidden >= 1):
            raise PositionsError(f"hidden is {self.hidden!r}; expected a width of at least 1, or None.")

    @property
    def learned(self) -> bool:
        """Whether the source has weights to train."""
        return self.source in ("shared", "per_layer")

    @property
    def effective(self) -> slice:
        """The tokens of a sequence whose increments a position depends on: all but the first, or the last."""
        return slice(1, None) if self.gap == "before" else slice(None, -1)


@dataclass(frozen=True)
class PositionModelConfig:
    """A Llama over bytes with position streams: RMSNorm, SwiGLU, RoPE, tied embeddings.

    The defaults are the post's model, about 6.4M parameters (Long, 2026).

    Args:
        d_model, n_layers, n_heads: width, depth and attention heads.
        d_mlp: width of the gated MLP; None is 4 * d_model.
        n_ctx: tokens of context in training.
        rope_theta: the rotary base.
        rope_fraction: the fraction of rotary frequencies kept, the highest first: 1 is RoPE, 0 no encoding
            (p-RoPE, Barbero et al., arXiv 2410.06205).
        sliding_window: each token sees so many tokens, itself included; None is all before it.
        positions: the increment source.

    Raises:
        PositionsError: sizes that do not fit together.

    >>> config = lp.PositionModelConfig(d_model=32, n_layers=2, n_heads=4, positions=lp.PositionConfig("shared"))
    >>> lp.HookedPositionTransformer.from_config(config).increments("The").tolist()  # fresh: standard RoPE
    [[[1.0, 1.0, 1.0, 1.0]], [[1.0, 1.0, 1.0, 1.0]]]
    """

    d_model: int = 256
    n_layers: int = 6
    n_heads: int = 8
    d_mlp: int | None = None
    n_ctx: int = 512
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0
    sliding_window: int | None = None
    positions: PositionConfig = field(default_factory=PositionConfig)

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layers", "n_heads", "n_ctx", "d_mlp", "sliding_window"):
            size, optional = getattr(self, name), name in ("d_mlp", "sliding_window")
            if not (isinstance(size, int) and size >= 1) and not (optional and size is None):
                raise PositionsError(f"{name} is {size}; expected a whole number of at least 1.")

        # RoPE turns pairs of components, so each head needs an even number of them.
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            raise PositionsError(
                f"d_model {self.d_model} over n_heads {self.n_heads} gives no even width per head; expected d_model to "
                "be an even multiple of n_heads."
            )
        if not 0 < self.rope_theta < math.inf:
            raise PositionsError(f"rope_theta is {self.rope_theta}; expected a positive number.")

        fraction = self.rope_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction <= 1:
            raise PositionsError(f"rope_fraction is {fraction!r}; expected a number from 0 to 1.")

    def to_transformers(self) -> "LlamaConfig | MistralConfig":
        """The Llama that this configuration describes; with a sliding window a Mistral, which is otherwise one."""
        from transformers import LlamaConfig, MistralConfig

        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.rope_fraction < 1:
            rope |= {"rope_type": "proportional", "partial_rotary_factor": self.rope_fraction}

        settings: dict[str, Any] = {
            "vocab_size": END_OF_DOCUMENT + 1,
            "hidden_size": self.d_model,
            "intermediate_size": self.d_mlp or 4 * self.d_model,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_heads,
            "max_position_embeddings": self.n_ctx,
            "rope_parameters": rope,
            "tie_word_embeddings": True,
            "bos_token_id": END_OF_DOCUMENT,
            "eos_token_id": END_OF_DOCUMENT,
            "pad_token_id": END_OF_DOCUMENT,
        }
        if self.sliding_window is None:
            return LlamaConfig(**settings)
        return MistralConfig(**settings, sliding_window=self.sliding_window)
