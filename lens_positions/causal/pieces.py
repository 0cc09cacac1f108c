"""Gradients whose memory does not grow with what a block computes: each block runs again in the backward pass.

Between the two passes only what enters a block is kept, [batch pos d_model], and not what it computes: scores and
patterns [batch head query key], the insides of the MLP. One block at a time is there as a whole. The price is a second
forward pass of the blocks (Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174).

Hook functions run once. What a function put in another tensor's place is kept, and is what the block gets when it runs
again, so that a function may draw noise, count its calls or run the model. It costs the memory of that tensor and of
what its own arithmetic saves; a function that only reads costs nothing.

Other threads run the model as it is, or in pieces of their own. Of the hooks that they add for a call, none acts here.

Three things are left as they were, with all their memory: a block one of whose modules has a hook of torch's own
(`register_forward_hook`), a block that fills a key-value cache, and a model without a row of blocks.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from ..core.forward_pass import CurrentPass, ForwardPass
from ..core.own_thread import acting_for, own_forward, thread_of, value_for_thread
from ..interventions import streams_of

OWN_HOOKS = ("transformer_lens.", "lens_positions.", "transformers.")
"""Modules whose hooks are part of how a model runs, and run again with their block."""

CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")


@contextmanager
def in_pieces(model: TransformerBridge) -> Iterator[None]:
    """Run this thread's forward passes so that they keep little; differentiate them before the context ends.

    Args:
        model: a bridge with position streams. Hook functions that are added inside the context run twice.
    """
    current = streams_of(model)._current
    blocks = [block for block in cast(Any, getattr(model, "blocks", ())) if not _has_foreign_hooks(block)]
    points = {id(m): m for block in blocks for m in block.modules() if isinstance(m, HookPoint)}
    with ExitStack() as exchanged:
        for point in points.values():
            exchanged.enter_context(_hooks_that_run_once(point))
        for block in blocks:
            exchanged.enter_context(own_forward(block, partial(Piece, current=current)))
        yield


class Piece:
    """A block's forward in one thread, which runs again in the backward pass."""

    def __init__(self, forward: Callable[..., Any], current: CurrentPass) -> None:
        self._forward = forward
        self._current = current

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output."""
        # Passes without gradients and passes with a cache run the block as it is.
        step = self._current.get()
        ours = torch.is_grad_enabled() and step is not None
        if not ours or any(kwargs.get(name) is not None for name in CACHES):
            return self._forward(*args, **kwargs)
        run = Run(self._forward, self._current, cast(ForwardPass, step))
        return checkpoint(run, *args, use_reentrant=False, **kwargs)


class Run:
    """One call of a block: first in its forward pass, and then in a copy of that pass as it was at that point."""

    def __init__(self, forward: Callable[..., Any], current: CurrentPass, step: ForwardPass) -> None:
        self._forward = forward
        self._current = current

        # The pass goes on and changes; the second run needs it as the block met it.
        self._before = step.as_it_is()
        self._thread = threading.get_ident()
        self._returned: list[tuple[Any, bool]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output; hook functions run the first time."""
        if self._returned is None:
            self._returned = []
            with _hooks_of_block(Tape(self._returned, again=False)):
                return self._forward(*args, **kwargs)

        # A copy, as a backward pass may run the block more than once (retain_graph).
        tape = Tape(list(self._returned), again=True, thread=self._thread)
        with self._current.within(self._before.as_it_is()), acting_for(self._thread), _hooks_of_block(tape):
            return self._forward(*args, **kwargs)


@dataclass
class Tape:
    """What hook functions did in one call of a block, in order.

    Attributes:
        returned: by each: the tensor that it put in another's place, or None; and whether gradients flow into it.
        again: the block runs again.
        thread: whose pass it is; the second run may be in one of autograd's.
    """

    returned: list[tuple[Any, bool]]
    again: bool
    thread: int = field(default_factory=threading.get_ident)

    def keep(self, returned: Any, learns: bool) -> None:
        """Keep a copy: the model may go on to write into the tensor."""
        self.returned.append((returned.detach().clone() if isinstance(returned, Tensor) else returned, learns))

    def next(self, output: Any) -> Any:
        """What the next function returned. Gradients flow in the graph of the block's first call, not into this."""
        # Hook functions come by in the same order as the first time.
        returned, learns = self.returned.pop(0)
        tensor = output if returned is None else returned
        if learns and not tensor.requires_grad:
            tensor.requires_grad_()
        return returned


class Once:
    """A function at a hook point that runs in a block's first call alone.

    Attributes:
        function: the function.
        thread: in which it acts alone; None is every thread.
        users: how many contexts need it to be so.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.thread = thread_of(function)
        self.users = 0

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        """What the function returns, or returned."""
        tape: Tape | None = getattr(_active_runs, "tape", None)
        if tape is None or self.thread not in (None, tape.thread):
            return self.function(module, *given)

        # PyTorch hands (module, args, output), and with keywords (module, args, kwargs, output).
        output = given[-1]
        if tape.again:
            return tape.next(output)
        version = _version(output)

        # What the function's own arithmetic saves is not of the block, which will run without it.
        with _hooks_of_block(None), saved_tensors_hooks(_as_it_is, _as_it_is):
            returned = self.function(module, *given)
        changed = output if returned is None else returned
        untouched = changed is output and _version(output) == version
        tape.keep(None if untouched else changed, bool(getattr(changed, "requires_grad", False)))
        return returned


@contextmanager
def _hooks_that_run_once(point: HookPoint) -> Iterator[None]:
    """Let the functions at a hook point run once a block, but for those that other threads have for calls of theirs."""
    # Hook functions may count, draw or write: they run once, though the block runs twice.
    used: list[tuple[int, Once]] = []
    places = point._forward_hooks
    with _PLACES:
        for key, function in list(places.items()):
            # Another thread takes its own away when it likes, and none of them acts in this one.
            once = function if isinstance(function, Once) else Once(function)
            if once.thread not in (None, threading.get_ident()):
                continue
            places[key] = cast(Any, once)
            once.users += 1
            used.append((key, once))
    try:
        yield
    finally:
        with _PLACES:
            for key, once in used:
                once.users -= 1
                # Another library may have put its own there since; that stays.
                if not once.users and cast(Any, places.get(key)) is once:
                    places[key] = once.function


_PLACES = threading.Lock()
"""Held while functions at hook points are exchanged."""

_active_runs = threading.local()


@contextmanager
def _hooks_of_block(tape: Tape | None) -> Iterator[None]:
    """The tape that hook functions of this thread are kept on; None runs them as they are."""
    with value_for_thread(_active_runs, "tape", tape):
        yield


def _has_foreign_hooks(block: nn.Module) -> bool:
    """Whether a module of a block has hooks that are neither a hook point's nor the library's own."""
    for module in block.modules():
        if isinstance(module, HookPoint):
            continue
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not _where_from(hook).startswith(OWN_HOOKS):
                return True
    return False


def _where_from(hook: Any) -> str:
    # A partial is where its function is.
    function = getattr(hook, "func", hook)
    return getattr(function, "__module__", None) or ""


def _version(value: Any) -> int | None:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
