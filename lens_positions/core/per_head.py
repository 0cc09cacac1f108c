"""Rotations of heads: increments that each head of a layer has for itself.

A model hands all heads of a layer one (cos, sin), [batch pos d_rotary], and rotates its queries and keys with it,
whatever stands before: a projection, a norm, one matrix for queries, keys and values. Here (cos, sin) get a head axis
and the model goes on to do the rotation itself, so that nothing of its arithmetic is written again:

    one for all heads      cos [batch pos d]        cos.unsqueeze(1) -> [batch 1 pos d]       times queries, times keys
    one for each head      cos [batch pos head d]   cos.unsqueeze(1) -> [batch head pos d]    times queries, times keys

Heads that share keys (grouped-query attention) can have rotations of their own too. A query head h then sees the keys
of its group rotated by the positions of h, both sides of the distance by the same positions:

    one for each key-value head   a group's queries and its keys rotate alike; keys are stored once a group
    one for each query head       keys (and values) are repeated for each query head first, and each copy is rotated
                                  by the positions of its query head; from there on the layer has no groups

The repeated keys are those that the model makes of them itself, just before the scores, so that nothing changes where
all rotations are equal. Whether all of this holds in a model is tried (`head_trial.py`), and refused where it does not.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import PositionsError
from .positions import CosSin

KEYS, VALUES = "k_proj", "v_proj"
"""The modules of an attention whose outputs are repeated."""

GROUPS = "num_key_value_groups"
"""How often an attention of transformers repeats keys and values before the scores."""

GROWING = ("DynamicLayer", "DynamicSlidingWindowLayer")
"""Layers of a key-value cache that hold keys in a tensor that may get more heads."""

UNSQUEEZE: tuple[Any, ...] = (torch.Tensor.unsqueeze, torch.unsqueeze)
MULTIPLY: tuple[Any, ...] = (torch.Tensor.mul, torch.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)


class HeadRotation(Tensor):
    """cos or sin of each head, [batch pos head d_rotary], where a model expects those of all heads.

    Every RoPE model of transformers makes place for its heads with `unsqueeze`: the axis that it asks for is the one
    that the heads go to. All other operations are those of a tensor.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Put the heads where the model makes place for them."""
        if func not in UNSQUEEZE:
            return super().__torch_function__(func, types, args, kwargs or {})
        dim = args[1] if len(args) > 1 else (kwargs or {})["dim"]
        with torch._C.DisableTorchFunctionSubclass():
            if dim in (1, -3):
                return args[0].transpose(1, 2).as_subclass(_HeadsFirst)
            if dim in (2, -2):
                return args[0].view_as(args[0]).as_subclass(_TokensFirst)
        raise PositionsError(f"the model puts heads on axis {dim} of cos and sin; expected axis 1 or 2.")


class _BesideHeads(Tensor):
    """cos or sin with heads in the place that the model's queries and keys have them in."""

    AXIS: int

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Multiply queries by the rotation of their head, or of the key-value head that they share."""
        if func not in MULTIPLY:
            return super().__torch_function__(func, types, args, kwargs or {})
        turned, rotation = args if isinstance(args[1], cls) else (args[1], args[0])
        with torch._C.DisableTorchFunctionSubclass():
            times = turned.shape[cls.AXIS] // rotation.shape[cls.AXIS]
            return turned * (rotation if times == 1 else rotation.repeat_interleave(times, dim=cls.AXIS))


class _HeadsFirst(_BesideHeads):
    AXIS = 1


class _TokensFirst(_BesideHeads):
    AXIS = 2


def head_rotation(cos_sin: CosSin) -> tuple[Tensor, Tensor]:
    """cos and sin [batch pos head d_rotary] in the form that an attention takes."""
    cos, sin = cos_sin
    return cos.as_subclass(HeadRotation), sin.as_subclass(HeadRotation)


def of_query_heads(values: Float[Tensor, "batch pos *head"], count: int) -> Float[Tensor, "batch pos query_head"]:
    """Numbers of all heads, or of key-value heads, for each query head: those of a group share one."""
    if values.ndim == 2:
        return values[..., None].expand(*values.shape, count)
    return values.repeat_interleave(count // values.shape[2], dim=2)


def repeat_keys(attention: Any, count: int, kv_cache: Any) -> list[Callable[[], object]]:
    """Let an attention have keys and values of each query head, for one call.

    The keys that a cache holds are repeated too, and stay so: every later call must do the same.

    Args:
        attention: the model's own module.
        count: query heads.
        kv_cache: the cache that it writes to, or None.

    Returns:
        What undoes it after the call.

    Raises:
        PositionsError: the attention has no such modules, goes around them, or the cache cannot hold more heads.
    """
    groups = int(getattr(attention, GROUPS, 1))
    if groups == 1:
        return []
    refuse_split_inputs(attention)
    times = partial(_repeated, count // groups, groups)
    _repeat_cached(attention, count, groups, kv_cache)
    handles = [module.register_forward_hook(times) for module in (_key_module(attention), getattr(attention, VALUES))]
    setattr(attention, GROUPS, 1)
    return [*(handle.remove for handle in handles), partial(setattr, attention, GROUPS, groups)]


def _key_module(attention: Any) -> nn.Module:
    """The module whose output is an attention's keys: a norm over all of them, or the projection.

    A norm over each head alone gives equal heads equal results, so what is before it can be repeated. One over all
    heads has a weight for each number of them.
    """
    projection = getattr(attention, KEYS)
    for name in ("k_norm", "k_layernorm"):
        norm = getattr(attention, name, None)
        weight = getattr(norm, "weight", None)
        if norm is not None and weight is not None and weight.shape == projection.weight.shape[:1]:
            return norm
    return projection


def _repeated(
    heads: int, times: int, _module: nn.Module, _args: tuple[Any, ...], output: Float[Tensor, "batch pos width"]
) -> Float[Tensor, "batch pos wider"]:
    return output.unflatten(-1, (heads, -1)).repeat_interleave(times, dim=2).flatten(2)


def _repeat_cached(attention: Any, count: int, groups: int, kv_cache: Any) -> None:
    """Repeat the keys and values that a cache holds for this layer, unless they are repeated already."""
    layers = getattr(kv_cache, "layers", [])
    number = getattr(attention, "layer_idx", None)
    if kv_cache is None or number is None or number >= len(layers):
        return
    layer = layers[number]
    if type(layer).__name__ not in GROWING:
        raise PositionsError(
            f"the key-value cache has a {type(layer).__name__}, which cannot hold keys of each query head; expected "
            "generation with the default cache, or an edit by key-value heads."
        )
    keys = getattr(layer, "keys", None)
    if keys is not None and keys.numel() and keys.shape[1] * groups == count:
        layer.keys, layer.values = (_for_query_heads(x, groups) for x in (layer.keys, layer.values))


def _for_query_heads(
    cached: Float[Tensor, "batch head past d_head"], groups: int
) -> Float[Tensor, "batch query_head past d_head"]:
    """Cached keys or values for each query head; rows that are views of one row stay so."""
    if cached.stride(0) == 0:
        return cached[:1].repeat_interleave(groups, dim=1).expand(len(cached), -1, -1, -1)
    return cached.repeat_interleave(groups, dim=1)


def refuse_split_inputs(attention: nn.Module) -> None:
    """Refuse a pass of a bridge that computes keys without the projection whose output is repeated.

    Raises:
        PositionsError: one of TransformerLens' switches that do so is on.
    """
    config = getattr(getattr(attention, KEYS, None), "config", None)
    for switch in ("use_split_qkv_input", "use_attn_in"):
        if getattr(config, switch, False) is True:
            raise PositionsError(
                f"set_{switch}(True) goes around the projection of keys, which are repeated for each query head; "
                f"expected set_{switch}(False), or an edit by key-value heads."
            )
