"""Where the parts of a model are: on one device, on several, or on a disk until they run (accelerate's hooks)."""

from typing import Any

import torch
from torch import nn

from ..errors import PositionsError


def device_of(module: nn.Module, around: nn.Module | None = None) -> torch.device:
    """The device that a module computes on, which is not where an offloaded weight waits.

    Args:
        module: the module.
        around: a module to ask where it has neither weights nor a device of its own.
    """
    for part in module.modules():
        # An offloaded weight waits on the disk or the meta device; accelerate knows where it will run.
        for hook in _accelerate_hooks(part):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device if isinstance(device, str | torch.device) else f"{_accelerator()}:{device}")
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            if not tensor.is_meta:
                return tensor.device

    # Nothing of it has a place: what surrounds it does, or everything is on the CPU.
    return torch.device("cpu") if around is None or around is module else device_of(around)


def floating_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's states: that of its embeddings, as quantised weights have another."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.is_floating_point():
        return weight.dtype
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def refuse_absent_weights(model: nn.Module) -> None:
    """Refuse a model whose weights are nowhere.

    Raises:
        PositionsError: weights are on the meta device, and nothing loads them when they are needed.
    """
    for name, part in model.named_modules():
        offloaded = any(getattr(hook, "offload", False) for hook in _accelerate_hooks(part))
        for own, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta and not offloaded:
                raise PositionsError(
                    f"{name}.{own} is on the meta device, without values; expected loaded weights (offloaded by "
                    "accelerate they are)."
                )


def _accelerate_hooks(module: nn.Module) -> tuple[Any, ...]:
    hook = getattr(module, "_hf_hook", None)  # a SequentialHook holds several
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def _accelerator() -> str:
    """The kind of device that accelerate's numbers count."""
    found = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    return "cuda" if found is None else found.type
