"""What a block of code changes in a model for the time being, and gives back: modes, modules, hooks and settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch a model to eval mode, in which dropout is off, and each module back to its own mode at the end."""
    # Of a model that is in eval mode already nothing is written: threads may share it, and writing takes longer than
    # a small model's forward pass.
    # A bridge keeps the model that it stands for outside its own modules.
    trained = [module for module in _modules_of(model, getattr(model, "original_model", None)) if module.training]
    try:
        if trained:
            model.eval()
        yield
    finally:
        for module in trained:
            module.training = True


def _modules_of(*roots: Any) -> Iterator[nn.Module]:
    """All modules of some models, each once: as `modules()`, without making a name for each, in a tenth of its time."""
    waiting = [root for root in roots if isinstance(root, nn.Module)]
    known = set()
    while waiting:
        module = waiting.pop()
        if id(module) in known:
            continue
        known.add(id(module))
        yield module
        waiting.extend(child for child in module._modules.values() if child is not None)


@contextmanager
def restored_on_failure(*models: Any) -> Iterator[None]:
    """Give models back their modules, hooks, settings, configuration, and what learns, if the block raises.

    Attributes are noted one by one, and dicts among them (modules, parameters, hooks) with what they hold. Values of
    tensors are not: a block must not write into weights.
    """
    roots = [model for model in models if isinstance(model, nn.Module)]
    modules = {id(module): module for root in roots for module in root.modules()}
    configs = [model.config for model in models if getattr(model, "config", None) is not None]

    # A configuration is no module, so `modules` does not have it.
    attributes = [(vars(owner), _attribute_copies(vars(owner))) for owner in (*modules.values(), *configs)]
    learns = [(parameter, parameter.requires_grad) for root in roots for parameter in root.parameters()]
    try:
        yield
    except BaseException:
        for present, noted in attributes:
            _put_back(present, noted)
        for parameter, learned in learns:
            parameter.requires_grad_(learned)
        raise


def _attribute_copies(attributes: dict[str, Any]) -> dict[str, tuple[Any, dict[Any, Any] | None]]:
    """Each attribute, and a copy of what it holds where it is a dict."""
    return {name: (value, dict(value) if isinstance(value, dict) else None) for name, value in attributes.items()}


def _put_back(attributes: dict[str, Any], noted: dict[str, tuple[Any, dict[Any, Any] | None]]) -> None:
    # What the block added has to go as well.
    attributes.clear()
    for name, (value, content) in noted.items():
        # The same dict as before: handles of hooks refer to it.
        if content is not None:
            value.clear()
            value.update(content)
        attributes[name] = value
