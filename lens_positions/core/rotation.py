"""Rotation by fractional positions: the model's own rotary module, with a gradient that the module does not provide.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (arXiv 2104.09864).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from .hook_points import HookedTokens, run_hook
from .positions import CosSin, cos_and_sin

Rotation = CosSin | Complex[Tensor, "batch pos *head d_rotary"]
"""What a rotary module returns: cos and sin, or cos + i sin in one tensor."""


@dataclass(eq=False)
class RotaryCall:
    """One call of a model's rotary module in this forward pass: what it was given and what it returned."""

    module: Any
    args: tuple[Any, ...]  # after hidden states and position ids (a layer type, in some families)
    kwargs: dict[str, Any]
    states: Tensor  # carries the dtype and the device of the result
    position_ids: Int[Tensor, "#batch pos"]
    rotation: Any = None  # None: the module was not called, its arithmetic is part of the attention
    axes: Int[Tensor, "axis #batch pos"] | None = None  # ids along time, height and width, less those along time
    is_complex: bool = False
    _frequencies: Tensor | None = None

    @classmethod
    def of(cls, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], rotation: Any) -> "RotaryCall":
        """The call of `module.forward(x, position_ids, ...)` that returned this rotation."""
        given = dict(kwargs)
        states = given.pop("x") if "x" in given else args[0]
        ids = given.pop("position_ids") if "position_ids" in given else args[1]
        axes = ids - ids[:1] if ids.ndim == 3 else None
        whole = ids if axes is None else ids[0]
        return cls(module, tuple(args[2:]), given, states, whole, rotation, axes, isinstance(rotation, Tensor))

    def tensors(self) -> tuple[Tensor, ...]:
        """What the module returned, one by one."""
        return tensors_of(self.rotation)

    def at(self, positions: Float[Tensor, "batch pos"], states: Tensor | None = None) -> CosSin:
        """cos and sin of fractional positions, in the dtype of the states; all axes move together."""
        if self.axes is not None:  # one for each token: several positions in a row are those of its heads
            positions = positions + self.axes.repeat_interleave(positions.shape[-1] // self.axes.shape[-1], dim=-1)
        return self._turn(positions, self.states if states is None else states)

    def cos_sin(self, rotation: Rotation | None) -> CosSin:
        """A rotation of this call as cos and sin; None is that of the model's own whole positions."""
        if rotation is None:
            rotation = self.at(self.position_ids.float())
        return (rotation.real, rotation.imag) if isinstance(rotation, Tensor) else rotation

    def _turn(self, positions: Tensor, states: Tensor) -> CosSin:
        return self.cos_sin(self.module.forward(states, positions, *self.args, **self.kwargs))

    def like_the_module(self, cos_sin: CosSin) -> Rotation:
        """cos and sin in the form in which the module returns them."""
        return torch.complex(*cos_sin) if self.is_complex else cos_sin

    def frequencies(self, positions: Float[Tensor, "batch pos"]) -> Float[Tensor, " d_rotary"]:
        """The rotary frequency of each component of cos and sin at these positions, in radians per position.

        Read off the module at one small angle, where atan2(sin, cos) / p is w to rounding, so that neither its
        layout (halves or pairs) nor its scaling need be known. The largest position goes along, because dynamic
        and long RoPE choose their frequencies by it.
        """
        follows_length = any(kind in str(getattr(self.module, "rope_type", "")) for kind in ("dynamic", "longrope"))
        if self._frequencies is None or follows_length:
            p = 2.0**-12
            with torch.no_grad():
                probe = positions.new_full((1, 1), p)
                if follows_length:
                    probe = torch.cat([probe, positions.max().view(1, 1)], dim=1)
                cos, sin = self._turn(probe if self.axes is None else probe.expand(len(self.axes), -1, -1), positions)
                self._frequencies = torch.atan2(sin, cos)[0, 0] / p
        return self._frequencies


class SinusoidTable:
    """A table of sines and cosines by whole position, as GPT-J has it, in the form of a rotary module.

    A whole position is its row, to the bit; the fraction above it is one more rotation, by the frequencies of row 1.
    """

    def __init__(self, table: Float[Tensor, "n_ctx d_rotary"]) -> None:
        self.table = table

    def forward(self, states: Tensor, positions: Float[Tensor, "batch pos"]) -> CosSin:
        """cos and sin, each of half the table's width."""
        whole = positions.floor().clamp(0, len(self.table) - 1).long()
        (sin, cos), (sin_1, cos_1) = self.table[whole].chunk(2, dim=-1), self.table[1].chunk(2)
        angle = (positions - whole).unsqueeze(-1) * torch.atan2(sin_1, cos_1)
        turned = cos * angle.cos() - sin * angle.sin(), sin * angle.cos() + cos * angle.sin()
        return turned[0].to(states.dtype), turned[1].to(states.dtype)


def rotate(positions: Float[Tensor, "batch pos *head"], call: RotaryCall) -> Rotation:
    """Rotate by positions, in the form in which the module returns it; by positions of heads always cos and sin."""
    rotation = cos_and_sin(positions, call.at, call.frequencies)
    return call.like_the_module(rotation) if positions.ndim == 2 else rotation


def tensors_of(rotation: Any) -> tuple[Tensor, ...]:
    """The tensors of a rotation, in whatever form it is."""
    return (rotation,) if isinstance(rotation, Tensor) else tuple(rotation or ())


def moved_to(rotation: Rotation, device: torch.device) -> Rotation:
    """The rotation where a layer is."""
    if isinstance(rotation, Tensor):
        return rotation.to(device)
    return rotation[0].to(device), rotation[1].to(device)


def hooked_rotation(
    hook: HookPoint,
    rotation: Rotation | None,
    handed: Any,
    positions: Float[Tensor, "batch pos *head"],
    call: RotaryCall,
    tokens: HookedTokens,
) -> Rotation | None:
    """The rotation after its hook point, [batch pos *head 2 d_rotary] with cos before sin; None as it was given.

    Where it is None it is the model's own, which the layer was handed.
    """
    own = torch.stack(call.cos_sin(handed if rotation is None else rotation), dim=-2)
    given = own.expand(positions.shape[0] if rotation is None else own.shape[0], *own.shape[1:])
    returned = run_hook(hook, given, replace(tokens, frequencies=call.frequencies(positions.flatten(1))))
    if returned is given:
        return rotation
    cos_sin = returned[..., 0, :], returned[..., 1, :]
    return cos_sin if positions.ndim == 3 else call.like_the_module(cos_sin)
