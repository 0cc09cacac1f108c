"""The forward pass that runs in this thread, and what its streams share.

Nothing of a pass is kept by the streams themselves: two threads may run one model, a hook may run it inside a pass, and
a checkpointed layer may run again in the backward pass, each with what belongs to its own pass.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .positions import CosSin
from .rotation import RotaryCall, Rotation
from .visible_tokens import Visible


@dataclass(eq=False)
class SharedWork:
    """Positions that several layers compute from the same increments, and their rotation.

    Equal increments, past and call are the same objects, so that no number has to be compared.
    """

    increments: Tensor
    surplus: Tensor | None
    call: RotaryCall
    with_grad: bool
    positions: Tensor
    rotation: Rotation | None = None

    def is_of(self, increments: Tensor, surplus: Tensor | None, call: RotaryCall) -> bool:
        """Whether it was computed from these."""
        same = self.increments is increments and self.surplus is surplus and self.call is call
        return same and self.with_grad == torch.is_grad_enabled()


@dataclass(eq=False)
class ForwardPass:
    """What the streams of one forward pass share.

    Attributes:
        tokens, embeddings: what the model reads.
        mask: the attention mask as the model was given it.
        ids_given: whether the caller chose position ids.
        cache, past_length: the key-value cache, and its tokens before this pass.
        calls: of each stream so far; a looped model runs a layer again.
        residuals: the residual stream entering a layer, by stream; in checkpointed layers those of all.
        increments: of a source that all layers share.
        rotary_calls: of the model's own rotary modules.
        visible: which tokens a position sums over.
        shared: work that layers share; `remembered` likewise, for a cache.
        turned: positions, call and rotation of a layer that others follow.
        heads: cos and sin of a layer whose heads have positions of their own.
        paged: the cache holds pages of several texts.
        checkpointed: layers run a second time in the backward pass.
        with_grad: gradients are recorded.
        started, finished: the decoder was called; the model returned.
        own_decoder: the decoder was called alone, without the model around it.
        outer: the pass inside which this one runs.
    """

    tokens: Int[Tensor, "batch pos"] | None = None
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
    shared: list[SharedWork] = field(default_factory=list)
    remembered: list[tuple[Tensor, Tensor | None, Tensor]] = field(default_factory=list)
    turned: dict[int, tuple[Tensor, RotaryCall, Rotation]] = field(default_factory=dict)
    heads: dict[int, CosSin] = field(default_factory=dict)
    paged: bool = False
    checkpointed: bool = False
    with_grad: bool = False
    started: bool = False
    own_decoder: bool = False
    finished: bool = False
    outer: "ForwardPass | None" = None

    def count(self, stream: int) -> int:
        """The number of this call of a stream."""
        number = self.calls.get(stream, -1) + 1
        self.calls[stream] = number
        return number

    def tag(self, tensor: Tensor, call: RotaryCall | None) -> None:
        """Hand the pass along with cos, sin or position ids: a layer that runs again in the backward pass finds it."""
        tensor._position_pass = self, call  # type: ignore[attr-defined]

    def finish(self) -> None:
        """The model returned; what only its layers needed goes.

        Checkpointed layers run again and need the rest. They hand cos and sin in themselves, and those hold the pass:
        kept here as well, the two would hold each other.
        """
        self.finished = True
        self.outer = None
        for call in self.rotary_calls:
            call.rotation = None


def tagged_pass(handed: Any) -> tuple[ForwardPass | None, RotaryCall | None]:
    """The pass that cos and sin, or position ids, were handed along in, and their rotary call where it is known."""
    first = handed if isinstance(handed, Tensor) else next(iter(handed or ()), None)
    whole = first if hasattr(first, "_position_pass") else getattr(first, "_base", None)  # of a part of it
    return getattr(whole, "_position_pass", (None, None))


class CurrentPass:
    """The forward pass that this thread is in; None between passes.

    A compiler follows plain attributes and no threads, so a pass that is compiled as a whole has a place of its own. Of
    a model whose layers are compiled one by one, each layer looks the pass up outside its graph.
    """

    def __init__(self) -> None:
        self._eager = threading.local()
        self._compiled: ForwardPass | None = None
        self._look_up: Callable[[], ForwardPass | None] = torch.compiler.disable(self._of_thread)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CurrentPass":
        """A copied model is between passes."""
        return CurrentPass()

    def __reduce__(self) -> Any:
        """So is a pickled one."""
        return CurrentPass, ()

    def get(self) -> ForwardPass | None:
        """The pass."""
        if not torch.compiler.is_compiling():
            return self._of_thread()
        return self._look_up() if self._compiled is None else self._compiled

    def begin(self, step: ForwardPass) -> None:
        """Enter a pass, maybe inside another one."""
        if torch.compiler.is_compiling():
            self._compiled = step
        else:
            step.outer = self._of_thread()
            self._eager.step = step

    def end(self) -> None:
        """Leave the pass."""
        step = self.get()
        outer = None if step is None else step.outer
        if not torch.compiler.is_compiling():
            self._eager.step = outer
        self._compiled = None
        if step is not None:
            step.finish()

    def resume(self, step: ForwardPass | None) -> None:
        """Enter a finished pass again, for a layer that runs a second time; None leaves it."""
        self._eager.step = step

    def _of_thread(self) -> ForwardPass | None:
        step = getattr(self._eager, "step", None)
        return self._compiled if step is None else step
