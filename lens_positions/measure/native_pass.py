"""Blocks as transformers computes them, for passes in which nobody looks at their parts.

A bridge computes attention and norms step by step, so that scores, patterns and scales can be seen and edited. Where
only logits are read, the modules of transformers themselves give the same in about half of the time
(`scaled_dot_product_attention`, with models that use it). Their order of summing is another: logits differ by rounding.

Whether that holds for a model is tried, not assumed; and where a function sits at a hook point inside of its blocks,
the bridge's own steps remain, as that function would not be called.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from ..core.hook_points import StreamHookPoint, has_hooks
from ..core.model_wrappers import base_model
from ..core.own_thread import own_forward
from ..core.stream import PositionStream
from ..core.transformer_lens_internals import is_wrapper

ROUNDING = 256
"""Units in the last place of the largest logit by which logits may differ."""


@contextmanager
def native_blocks(model: TransformerBridge, rows: Int[Tensor, "row pos"]) -> Iterator[bool]:
    """Let blocks run as transformers has them, in this thread and for the time being, where logits stay what they are.

    Edits of increments act as ever; patterns, scores and what else is inside of a block cannot be hooked meanwhile.

    Args:
        model: a bridge. One of half precision stays as it is: rounding is no small difference there.
        rows: tokens to try it with.

    Yields:
        Whether it is so.

    >>> from lens_positions.measure.native_pass import native_blocks
    >>> tokens = model.to_tokens("The cat sat.")
    >>> with native_blocks(model, tokens) as is_native, torch.no_grad():
    ...     logits = model(tokens)
    >>> is_native, torch.allclose(logits, model(tokens), atol=1e-4)
    (True, True)
    """
    components = _components_of(model)
    with ExitStack() as native:
        is_native = bool(components) and _agrees(model, components, rows.to(base_model(model).device))
        if is_native:
            _exchange(components, native)
        yield is_native


def _components_of(model: TransformerBridge) -> list[Any]:
    """The attention, norms and MLP of each block; none at all where a function at a hook point would be passed by."""
    blocks: list[nn.Module] = list(cast(Any, getattr(model, "blocks", ())))
    components: list[Any] = [child for block in blocks for child in block.children() if is_wrapper(child)]
    modules = [module for component in components for module in component.modules()]

    # Streams act before the attention runs, but for those of single heads.
    points = [module for module in modules if isinstance(module, HookPoint) and not isinstance(module, StreamHookPoint)]
    of_heads = any(
        stream.has_head_hooks() for stream in base_model(model).modules() if isinstance(stream, PositionStream)
    )
    is_hooked = of_heads or any(map(has_hooks, points))

    # Dropout draws anew in each pass, which could not be compared.
    trains = any(component.original_component.training for component in components)
    is_wide = base_model(model).dtype in (torch.float32, torch.float64)
    return [] if is_hooked or trains or not is_wide else components


def _agrees(model: TransformerBridge, components: list[Any], rows: Int[Tensor, "row pos"]) -> bool:
    """Whether logits are the same, but for rounding."""
    with torch.no_grad(), ExitStack() as native:
        own = model(rows)
        try:
            _exchange(components, native)
            found = model(rows)
        except Exception:  # a module that needs what only its component of the bridge hands it
            return False
    most = ROUNDING * torch.finfo(own.dtype).eps * own.abs().max()
    return found.shape == own.shape and bool((found - own).abs().max() <= most)


def _exchange(components: list[Any], native: ExitStack) -> None:
    for component in components:
        native.enter_context(own_forward(component, partial(_forward_of, component.original_component)))


def _forward_of(original: nn.Module, _forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of the module that a component of the bridge stands for."""
    return original.forward
