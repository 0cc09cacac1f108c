"""What streams remember of the tokens in a key-value cache: kept in the cache object itself, so that it ends with it.

A cache holds keys that are rotated already, and forgets which increments they were rotated by. The next token needs
their sum. Beam search, cropping and batching change what a cache holds, through its own methods; so the memory is mixed
into the cache's class, where those methods take it along.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

OF_HEADS = "query heads"
"""Marks, behind the stream and its call, what query heads differ by from the increments that they share."""


class PositionMemory:
    """The increments and the structure of a cache's tokens, mixed into the class of the cache.

    Attributes:
        surplus: d - 1 of each token, by stream and by the number of its call in a forward pass, of which a looped
            model makes several; with `OF_HEADS` behind these, what each query head adds to that.
        real: the tokens that are not padding; None: all are.
        ancestors: which tokens each one sums over, where a mask made a tree of them; None: they stand in a row.
        tokens: their ids; None where they are not known.
    """

    surplus: dict[tuple[Any, ...], Float[Tensor, "batch past *head"]]
    real: Bool[Tensor, "#batch past"] | None
    ancestors: Bool[Tensor, "#batch past past"] | None
    tokens: Int[Tensor, "#batch past"] | None

    def __reduce__(self) -> Any:
        """Pickle and copy by the class that the cache had: the mixed one has no name to import."""
        # The order of the drawing in `with_memory`: the mixed class, the memory, and what the cache was.
        _mixed, _memory, cache_class = type(self).__mro__[:3]
        return _unpickled, (cache_class, self.__dict__)

    def _each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the rows of a batch alike everywhere."""
        self._each_surplus(change)
        for name in ("real", "ancestors", "tokens"):
            values = getattr(self, name)
            if values is not None and len(values) > 1:  # one row stands for all
                setattr(self, name, change(values))

    def _each_surplus(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the surplus of every stream; what several streams share is changed once, and stays shared.

        Layers of a shared source have one tensor, not equal ones. Tensors compare by value, so they are told apart by
        `id`, which is safe while `surplus` holds them.
        """
        # One change for each tensor, however many layers hold it.
        changed = {id(values): change(values) for values in self.surplus.values()}
        self.surplus = {key: changed[id(values)] for key, values in self.surplus.items()}

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()  # type: ignore[misc]
        self.surplus, self.real, self.ancestors, self.tokens = {}, None, None, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._each_row(lambda values: values[beam_idx.to(values.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._each_row(lambda values: values[indices.to(values.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._each_row(lambda values: values.repeat_interleave(repeats, dim=0))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Drop the last tokens."""
        # A cache may be told a length to keep or, with a minus, one to drop: it knows what is left.
        super().crop(*args, **kwargs)  # type: ignore[misc]
        length = int(self.get_seq_length())  # type: ignore[attr-defined]
        self._each_surplus(lambda values: values[:, :length])
        if self.real is not None:
            self.real = self.real[:, :length]
        if self.tokens is not None:
            self.tokens = self.tokens[:, :length]
        if self.ancestors is not None:
            self.ancestors = self.ancestors[:, :length, :length]


def memory_of(kv_cache: Any) -> PositionMemory | None:
    """Return what a cache remembers of positions, or None."""
    return kv_cache if isinstance(kv_cache, PositionMemory) else None


def with_memory(kv_cache: Any) -> PositionMemory:
    """Return the same cache, which remembers positions from now on.

        before    DynamicCache
        after     DynamicCache' -> PositionMemory -> DynamicCache     (the class of this one object)

    The caller holds the cache and goes on with it, and so do the model and `generate`: an object around it would be
    seen by none of them. So the object itself gets another class, a subclass of its own that has the memory in front.
    """
    if not isinstance(kv_cache, PositionMemory):
        kv_cache.__class__ = _class_with_memory(kv_cache.__class__)
        kv_cache.surplus, kv_cache.real, kv_cache.ancestors, kv_cache.tokens = {}, None, None, None
    return kv_cache


@cache
def _class_with_memory(cache_class: type) -> type:
    return type(cache_class.__name__, (PositionMemory, cache_class), {"__module__": cache_class.__module__})


def _unpickled(cache_class: type, state: dict[str, Any]) -> Any:
    # Not through `__init__`, which would make an empty cache.
    kv_cache: Any = object.__new__(_class_with_memory(cache_class))
    kv_cache.__dict__.update(state)
    return kv_cache
