"""Tiny random models, increments far from one, and what a situation must show: the right value, or a refusal."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lens_positions as lp

SOURCES = ("static", "shared", "per_layer", "frozen")
LEARNED = ("shared", "per_layer", "frozen")
"""Those whose increments differ from token to token."""

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {}),
    "gemma3": (
        "Gemma3",
        {
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "neox": ("GPTNeoX", {"rotary_pct": 0.5, "use_parallel_residual": True}),
}
TOKENS = torch.randint(1, 61, (1, 12), generator=torch.Generator().manual_seed(4))
ROWS = torch.randint(1, 61, (3, 12), generator=torch.Generator().manual_seed(5))
LEFT = torch.tensor([[0] * 4 + [1] * 8, [1] * 12, [0] * 1 + [1] * 11])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}

every_source = pytest.mark.parametrize("source", SOURCES)
learned = pytest.mark.parametrize("source", LEARNED)


def built(family: str = "llama", *, attention: str = "sdpa", **config: Any) -> Any:
    """A tiny random model whose positions matter; the same weights every time."""
    name, sizes = FAMILIES[family]
    torch.manual_seed(0)
    text = "Text" if name == "Gemma3" else ""
    described = getattr(transformers, f"{name}{text}Config")(**SIZES | sizes | config)
    described._attn_implementation = attention
    return getattr(transformers, f"{name}ForCausalLM")(described).eval()


def with_streams(model: Any, source: str, **config: Any) -> Any:
    """The model with increments far from one."""
    return drawn(lp.attach_positions(model, lp.PositionConfig(source=source, **config)), model)


@torch.no_grad()
def drawn(streams: Any, model: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    for parameter in streams.parameters():
        parameter.normal_(std=0.5, generator=generator)
    for name, buffer in streams.named_buffers():
        if name.endswith("table"):
            buffer.uniform_(0.25, 3, generator=generator)
    return model


def streamed(source: str, family: str = "llama", **config: Any) -> Any:
    """A tiny model of a family with drawn increments."""
    return with_streams(built(family, **config), source)


def away(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative where values are above one."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1))


def assert_right(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert actual.isfinite().all(), "NaN or infinite"
    assert away(actual, expected) < tolerance, f"off by {away(actual, expected):.3g}"


def assert_clear(error: BaseException) -> None:
    """One sentence that says what was given and what was expected."""
    text = str(error)
    assert len(text) < 400, f"{len(text)} characters: {text}"
    assert "expected" in text, text
    assert "\n" not in text, text


@contextlib.contextmanager
def refused() -> Iterator[None]:
    with pytest.raises(lp.PositionsError) as caught:
        yield
    assert_clear(caught.value)


@contextlib.contextmanager
def right_or_refused() -> Iterator[None]:
    """Assertions in the block hold, or the library refuses in one sentence."""
    try:
        yield
    except lp.PositionsError as error:
        assert_clear(error)


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that attaching may add to a model: modules, hooks, replaced forwards, registry entries, modes, gradients."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "modules": [name for name, _ in model.named_modules(remove_duplicate=False)],
        "hooks": {name: [len(getattr(m, h)) for h in hooks] for name, m in model.named_modules()},
        "forwards": [name for name, m in model.named_modules() if "forward" in vars(m)],
        "modes": {name: m.training for name, m in model.named_modules()},
        "learns": {name: p.requires_grad for name, p in model.named_parameters()},
        "weights": {name: id(p) for name, p in model.named_parameters()},
        "registry": sorted(getattr(model, "_hook_registry", {})),
    }


def generated(model: Any, tokens: Tensor, **how: Any) -> Tensor:
    return model.generate(tokens, **GREEDY | how)[:, tokens.shape[1] if tokens.ndim == 2 else 0 :]


def each_alone(model: Any, rows: Tensor, mask: Tensor, **how: Any) -> Tensor:
    return torch.cat([generated(model, row[keep.bool()][None], **how) for row, keep in zip(rows, mask, strict=True)])
