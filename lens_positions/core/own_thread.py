"""Hooks that belong to one call, where several threads run one model.

Hook points are modules, so a function at one of them is met by every forward pass of the model. What a call adds for
its own pass must stay away from passes of other threads: without this, the edit of one thread would reach the logits
of another, and a cache would fill with another thread's activations.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

_FORWARDS = threading.Lock()
"""Held while the forward of a block is exchanged."""


def in_this_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    """A hook function that acts in forward passes of the thread that asks for it, and returns None in others.

    To PyTorch and TransformerLens alike, None says that nothing changed. In a backward pass it always acts: the
    autograd engine runs checkpointed layers again in threads of its own.
    """
    return partial(_run_in_thread, threading.get_ident(), function)


@contextmanager
def own_hooks(model: Any, hooks: Iterable[tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
    """Add hook functions to a bridge for the time being, each of which acts in this thread alone.

    Args:
        model: the bridge.
        hooks: pairs of a hook name and a function, as `model.hooks` takes them.
    """
    with model.hooks(fwd_hooks=[(name, in_this_thread(function)) for name, function in hooks]):
        yield


def _run_in_thread(thread: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling() or threading.get_ident() == thread or torch._C._current_graph_task_id() >= 0:
        return function(*args, **kwargs)
    return None


class OwnHookPoint:
    """A hook point as one call sees it: functions that are added act in this thread alone."""

    def __init__(self, point: Any) -> None:
        self._point = point

    def __getattr__(self, name: str) -> Any:
        return getattr(self._point, name)

    def add_hook(self, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Add a function, as `HookPoint.add_hook`."""
        return self._point.add_hook(in_this_thread(hook), *args, **kwargs)


@contextmanager
def return_known_outputs(blocks: Iterable[nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Replace what some blocks compute in this thread by outputs that are known, for the time being.

        block(x) -> nn.Module.__call__ -> hooks before -> forward -> hooks after
                                                             |
                                                  replaced here: gives the output

    A bridge runs its blocks in a row and has no way to leave some out (`start_at_layer` would start from a residual
    stream of one batch, where here rows join at several layers). An instance attribute `forward` hides that of the
    class. A bridge component has a `__setattr__` of its own and may have such an attribute already, so it is put into
    `__dict__` and what was there comes back with the last thread that leaves.
    """
    every: list[KnownOutputs] = []
    try:
        for block, output in zip(blocks, outputs, strict=False):
            every.append(KnownOutputs.enter(block, output))
        yield
    finally:
        for known in reversed(every):
            known.leave()


class KnownOutputs:
    """A block's forward while some threads know what it would give."""

    def __init__(self, block: nn.Module) -> None:
        self._attributes = vars(block)
        self._before = self._attributes.get("forward")
        self._forward = block.forward
        self._outputs: dict[int, list[Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What this thread knows, or what the block computes."""
        known = self._outputs.get(threading.get_ident())
        return known[-1] if known else self._forward(*args, **kwargs)

    @classmethod
    def enter(cls, block: nn.Module, output: Any) -> "KnownOutputs":
        """The exchanged forward of a block, that which other threads use already or a new one, with one more output."""
        with _FORWARDS:
            present = vars(block).get("forward")
            known = present if isinstance(present, cls) else cls(block)
            known._attributes["forward"] = known
            known._outputs.setdefault(threading.get_ident(), []).append(output)
            return known

    def leave(self) -> None:
        """Forget the last output of this thread, and give the block its own forward back after the last of all."""
        with _FORWARDS:
            own = self._outputs[threading.get_ident()]
            own.pop()
            if own:
                return
            del self._outputs[threading.get_ident()]
            # Something else may have been put in front of it meanwhile, which goes on to it and finds nothing known.
            if not self._outputs and self._attributes.get("forward") is self:
                self._attributes.pop("forward")
                if self._before is not None:
                    self._attributes["forward"] = self._before
