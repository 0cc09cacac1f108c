"""Hooks that belong to one call, where several threads run one model.

Hook points are modules, so a function at one of them is met by every forward pass of the model. What a call adds for
its own pass must stay away from passes of other threads: without this, the edit of one thread would reach the logits
of another, and a cache would fill with another thread's activations.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import nn

_FORWARDS = threading.Lock()
"""Held while the forward of a block is exchanged."""

_ACTING = threading.local()
"""`thread`: for which thread this one runs blocks again."""


def in_this_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    """A hook function that acts in forward passes of the thread that asks for it, and returns None in others.

    To PyTorch and TransformerLens alike, None says that nothing changed. In a backward pass it always acts, as the
    autograd engine runs checkpointed layers again in threads of its own; but for `acting_for`, which knows for whom.
    """
    return partial(_run_in_thread, threading.get_ident(), function)


@contextmanager
def acting_for(thread: int) -> Iterator[None]:
    """Run what follows as a thread would, by its `threading.get_ident()`: with its hooks, and no others'."""
    with value_for_thread(_ACTING, "thread", thread):
        yield


@contextmanager
def value_for_thread(values: threading.local, name: str, value: Any) -> Iterator[None]:
    """Give this thread another value for the time being, and that of before, or None, at the end."""
    outer = getattr(values, name, None)
    setattr(values, name, value)
    try:
        yield
    finally:
        setattr(values, name, outer)


def thread_of(hook: Any) -> int | None:
    """The thread in which a hook acts alone, `in_this_thread` or as a hook point keeps it; None is every thread."""
    # TransformerLens keeps a function as `hook` in a function of its own, a cell of which it is then.
    code = getattr(hook, "__code__", None)
    if code is not None and "hook" in code.co_freevars:
        hook = hook.__closure__[code.co_freevars.index("hook")].cell_contents
    while isinstance(hook, partial):
        if hook.func is _run_in_thread:
            return int(hook.args[0])
        hook = hook.func
    return None


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
    if torch.compiler.is_compiling():
        return function(*args, **kwargs)
    running = getattr(_ACTING, "thread", None)
    if running is None:
        running = thread if torch._C._current_graph_task_id() >= 0 else threading.get_ident()
    return function(*args, **kwargs) if running == thread else None


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
    with ExitStack() as exchanged:
        for block, output in zip(blocks, outputs, strict=False):
            exchanged.enter_context(own_forward(block, partial(_known_output, output)))
        yield


def _known_output(output: Any, _forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: output


@contextmanager
def own_forward(block: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Put another forward in the place of a block's in this thread, for the time being.

    Args:
        block: the block.
        make: from the forward that this thread had to the one that it gets.
    """
    exchanged = OwnForwards.enter(block, make)
    try:
        yield
    finally:
        exchanged.leave()


class OwnForwards:
    """A block's forward while some threads have another, the last that each has put there."""

    def __init__(self, block: nn.Module) -> None:
        update_wrapper(self, block.forward)
        self._attributes = vars(block)
        self._before = self._attributes.get("forward")
        self._forward = block.forward
        self._own: dict[int, list[Callable[..., Any]]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What this thread's own forward gives, or the block's."""
        own = self._own.get(threading.get_ident())
        return (own[-1] if own else self._forward)(*args, **kwargs)

    @classmethod
    def enter(cls, block: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> "OwnForwards":
        """The exchanged forward of a block, that which other threads use already or a new one, with one more."""
        with _FORWARDS:
            present = vars(block).get("forward")
            exchanged = present if isinstance(present, cls) else cls(block)
            exchanged._attributes["forward"] = exchanged
            own = exchanged._own.setdefault(threading.get_ident(), [])
            own.append(make(own[-1] if own else exchanged._forward))
            return exchanged

    def leave(self) -> None:
        """Forget the last of this thread, and give the block its own forward back after the last of all."""
        with _FORWARDS:
            own = self._own[threading.get_ident()]
            own.pop()
            if own:
                return
            del self._own[threading.get_ident()]
            # Something else may have been put in front of it meanwhile, which goes on to it and to the block's own.
            if not self._own and self._attributes.get("forward") is self:
                self._attributes.pop("forward")
                if self._before is not None:
                    self._attributes["forward"] = self._before
