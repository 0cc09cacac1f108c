"""The forward pass that runs in this thread, and what its streams share.

Streams keep nothing of a pass themselves. Two threads may run one model, a hook may run it inside a pass, and a
checkpointed layer may run again in the backward pass: each finds what belongs to its own pass here.

    CurrentPass     which pass runs in this thread
    ForwardPass     one pass: the tokens, the mask, the cache, and what layers share
    tag             hands a pass along with a tensor, to a layer that runs again
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .rotation import RotaryCall, Rotation
from .visible_tokens import Visible


@dataclass(eq=False)
class SharedPositions:
    """Positions that several layers compute from the same increments, and their rotation.

    Layers that share increments, cache and rotary call hold the same objects, so that no numbers need be compared.
    """

    increments: Tensor
    surplus: Tensor | None
    call: RotaryCall
    with_grad: bool
    positions: Tensor
    rotation: Rotation | None = None

    def match(self, increments: Tensor, surplus: Tensor | None, call: RotaryCall) -> bool:
        """Whether they were computed from these objects, with gradients as now."""
        same = self.increments is increments and self.surplus is surplus and self.call is call
        return same and self.with_grad == torch.is_grad_enabled()


@dataclass(eq=False)
class ForwardPass:
    """What the streams of one forward pass share.

    Attributes:
        tokens, embeddings: what the model reads.
        sequence: the ids of all tokens so far, those of the cache before these; None where they are not known.
        mask: the attention mask as the model was given it.
        ids_given: whether the caller chose position ids.
        cache, past_length: the key-value cache, and its tokens before this pass.
        calls: of each stream so far; a looped model runs a layer again.
        residuals: the residual stream entering a layer, by stream; in checkpointed layers those of all.
        increments: of a source that all layers share.
        rotary_calls: of the model's own rotary modules.
        visible: which tokens a position sums over.
        shared_positions: positions that several layers share.
        shared_surplus: the same for what goes into the cache: increments, surplus before and surplus with them.
        of_leaders: positions, call and rotation of a layer that others follow, by stream.
        undo: what ends with the attention that runs.
        paged: the cache holds pages of several texts.
        checkpointed: layers run a second time in the backward pass.
        held: parts of it are kept (`as_it_is`), to run a second time in the backward pass.
        with_grad: gradients are recorded.
        started, finished: the decoder was called; the model returned.
        own_decoder: the decoder was called alone, without the model around it.
        outer: the pass inside which this one runs.
    """

    tokens: Int[Tensor, "batch pos"] | None = None
    sequence: Int[Tensor, "batch total"] | None = None
    mask: Any = None
    ids_given: bool = False
    cache: Any = None
    past_length: int = 0
    calls: dict[int, int] = field(default_factory=dict)
    embeddings: Float[Tensor, "batch pos d_model"] | None = None
    residuals: dict[int, Float[Tensor, "batch pos d_model"]] = field(default_factory=dict)
    increments: Float[Tensor, "batch pos *head"] | None = None
    rotary_calls: list[RotaryCall] = field(default_factory=list)
    visible: Visible | None = None
    shared_positions: list[SharedPositions] = field(default_factory=list)
    shared_surplus: list[tuple[Tensor, Tensor | None, Tensor]] = field(default_factory=list)
    of_leaders: dict[int, tuple[Tensor, RotaryCall, Rotation]] = field(default_factory=dict)
    undo: list[Callable[[], object]] = field(default_factory=list)
    paged: bool = False
    checkpointed: bool = False
    held: bool = False
    with_grad: bool = False
    started: bool = False
    own_decoder: bool = False
    finished: bool = False
    outer: "ForwardPass | None" = None

    def count(self, stream: int) -> int:
        """Count a call of a stream, and return its number in this pass, from 0."""
        number = self.calls.get(stream, -1) + 1
        self.calls[stream] = number
        return number

    def tag(self, tensor: Tensor, call: RotaryCall | None) -> None:
        """Hand the pass along with cos, sin or position ids.

            forward     rotary module -> cos, sin (tagged) -> checkpointed layer, which keeps its inputs
            backward                     cos, sin (tagged) -> the layer runs again, after the pass has ended

        The inputs of a checkpointed layer are all that reaches its second run, so they must bring the pass along.
        """
        # An attribute on the tensor: nothing else that a checkpointed layer keeps is ours.
        tensor._position_pass = self, call  # type: ignore[attr-defined]

    def finish(self) -> None:
        """Mark the pass as finished, and let go of what only its layers needed.

        Checkpointed layers run again and need the rest. They bring cos and sin with them, and those hold the pass: kept
        here as well, the two would hold each other in memory.
        """
        self.finished = True
        self.outer = None
        for call in () if self.held else self.rotary_calls:
            call.rotation = None

    def as_it_is(self) -> "ForwardPass":
        """A copy of the pass at this point: what runs in it does what it would do now, and leaves this one alone."""
        self.held = True

        # A later layer may add a rotation to what is shared.
        shared = [replace(positions) for positions in self.shared_positions]
        kept = replace(self, shared_positions=shared, undo=[], outer=None, finished=False)
        for name in ("calls", "residuals", "of_leaders", "rotary_calls", "shared_surplus"):
            setattr(kept, name, getattr(self, name).copy())
        return kept


def tagged_pass(tagged: Any) -> tuple[ForwardPass | None, RotaryCall | None]:
    """Return the pass that cos and sin, or position ids, were tagged with, and their rotary call where it is known."""
    first = tagged if isinstance(tagged, Tensor) else next(iter(tagged or ()), None)

    # A slice is another tensor, without the tag; PyTorch keeps the tensor that it is a view of in `_base`.
    whole = first if hasattr(first, "_position_pass") else getattr(first, "_base", None)
    return getattr(whole, "_position_pass", (None, None))


class CurrentPass:
    """The forward pass that this thread is in; None between passes.

    the whole model compiled     a plain attribute, `_compiled`: a compiler cannot follow threads
    single layers compiled       each layer looks the thread's pass up outside its graph
    eager                        the thread's own pass
    """

    def __init__(self) -> None:
        self._eager = threading.local()
        self._compiled: ForwardPass | None = None
        self._outside_graph: Callable[[], ForwardPass | None] = torch.compiler.disable(self._of_thread)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CurrentPass":
        """Copy as between passes: a thread's own values cannot be copied."""
        return CurrentPass()

    def __reduce__(self) -> Any:
        """Pickle as between passes, for the same reason."""
        return CurrentPass, ()

    def get(self) -> ForwardPass | None:
        """Return the pass that runs in this thread, or None."""
        if not torch.compiler.is_compiling():
            return self._of_thread()

        # Nothing was begun inside this graph: it is of a single layer, and breaks here to look the pass up.
        return self._outside_graph() if self._compiled is None else self._compiled

    def begin(self, forward_pass: ForwardPass) -> None:
        """Enter a pass, maybe inside another one, which goes on after it."""
        if torch.compiler.is_compiling():
            self._compiled = forward_pass
        else:
            forward_pass.outer = self._of_thread()
            self._eager.forward_pass = forward_pass

    def end(self) -> None:
        """Leave the pass."""
        # A pass that runs inside another one gives way to it.
        forward_pass = self.get()
        outer = None if forward_pass is None else forward_pass.outer
        if not torch.compiler.is_compiling():
            self._eager.forward_pass = outer
        self._compiled = None
        if forward_pass is not None:
            forward_pass.finish()

    def resume(self, forward_pass: ForwardPass | None) -> None:
        """Enter a finished pass again, for a layer that runs a second time; None leaves it."""
        self._eager.forward_pass = forward_pass

    @contextmanager
    def within(self, forward_pass: ForwardPass) -> Iterator[None]:
        """Run something in another pass than the one that this thread is in, or in none."""
        outer = self._of_thread()
        self._eager.forward_pass = forward_pass
        try:
            yield
        finally:
            self._eager.forward_pass = outer

    def _of_thread(self) -> ForwardPass | None:
        # Eager code inside a compiled pass (a graph break) finds that pass.
        forward_pass = getattr(self._eager, "forward_pass", None)
        return self._compiled if forward_pass is None else forward_pass
