"""A position stream's memory of a key-value cache: kept in the cache object itself, so that it ends with it."""

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class PositionMemory:
    """Mixed into the class of a key-value cache: the running sums of its tokens, which follow what happens to them."""

    position_sums: dict[tuple[int, int], Float[Tensor, "batch past *head"]]

    def __reduce__(self) -> Any:
        """Pickle and copy by the class that the cache had."""
        return _restored, (type(self).__mro__[2], self.__dict__)

    def _each(self, change: Any) -> None:
        changed = {id(sums): change(sums) for sums in self.position_sums.values()}
        self.position_sums = {key: changed[id(sums)] for key, sums in self.position_sums.items()}

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()  # type: ignore[misc]
        self.position_sums = {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow a beam search."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._each(lambda sums: sums[beam_idx.to(sums.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._each(lambda sums: sums[indices.to(sums.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._each(lambda sums: sums.repeat_interleave(repeats, dim=0))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Drop the last tokens."""
        super().crop(*args, **kwargs)  # type: ignore[misc]
        self._each(lambda sums: sums[:, : self.get_seq_length()])  # type: ignore[attr-defined]


@cache
def _with_memory(cache_class: type) -> type:
    return type(cache_class.__name__, (PositionMemory, cache_class), {"__module__": cache_class.__module__})


def _restored(cache_class: type, state: dict[str, Any]) -> Any:
    kv_cache: Any = object.__new__(_with_memory(cache_class))
    kv_cache.__dict__.update(state)
    return kv_cache


def with_past(
    carry: Float[Tensor, "batch pos *head"], past: Float[Tensor, "batch past *head"] | None, kv_cache: Any
) -> Float[Tensor, "batch total *head"] | None:
    """The running sums of new tokens behind those of past ones, where a cache wants them."""
    if kv_cache is None:
        return None
    return carry if past is None else torch.cat([past, carry], dim=1)


def remember(kv_cache: Any, key: tuple[int, int], sums: Float[Tensor, "batch total *head"]) -> None:
    """Keep the running sums of all tokens in the cache that holds their keys.

    The key is the stream and the number of its call in a forward pass, of which a looped model makes several.
    """
    if not isinstance(kv_cache, PositionMemory):
        kv_cache.__class__ = _with_memory(kv_cache.__class__)
        kv_cache.position_sums = {}
    kv_cache.position_sums[key] = sums
