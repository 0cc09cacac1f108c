"""The rotary modules of models: how they were called, and how to call them again with other positions.

`cos_and_sin` in `positions.py` rotates; what models do differently is here. A rotary module may return cos and sin or
one complex tensor, may count positions along several axes, may choose its frequencies by the length of the text, or may
be a table inside the attention.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from .hook_points import HookedTokens, run_hook
from .positions import CosSin
from .visible_tokens import Visible

Rotation = CosSin | Complex[Tensor, "batch pos *head d_rotary"]
"""What a rotary module returns: cos and sin, or cos + i sin in one tensor."""


@dataclass(eq=False)
class RotaryCall:
    """One call of a model's rotary module in this forward pass: what it was given and what it returned.

    Attributes:
        module: the rotary module.
        args, kwargs: what it was given after hidden states and position ids (a layer type, in some families).
        states: hidden states, which carry the dtype and the device of the result.
        position_ids: the model's own; along time, where there are several axes.
        rotation: what it returned; None where the arithmetic is part of the attention, and no module was called.
        axes: ids along time, height and width, less those along time; None where there is one axis.
        is_complex: whether it returns cos + i sin.
    """

    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    states: Tensor
    position_ids: Int[Tensor, "#batch pos"]
    rotation: Any = None
    axes: Int[Tensor, "axis #batch pos"] | None = None
    is_complex: bool = False
    _frequencies: Tensor | None = None
    _origin: tuple[Visible, Tensor] | None = None

    @classmethod
    def of(cls, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], rotation: Any) -> "RotaryCall":
        """Describe the call of `module.forward(x, position_ids, ...)` that returned this rotation."""
        rest = dict(kwargs)

        # transformers calls its rotary modules by position or by name, in either order.
        states = rest.pop("x") if "x" in rest else args[0]
        ids = rest.pop("position_ids") if "position_ids" in rest else args[1]

        # Models of images and text have ids [axis, batch, pos]; increments move a token along all axes alike.
        axes = ids - ids[:1] if ids.ndim == 3 else None
        along_time = ids if axes is None else ids[0]
        return cls(module, tuple(args[2:]), rest, states, along_time, rotation, axes, isinstance(rotation, Tensor))

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors of what the module returned."""
        return tensors_of(self.rotation)

    def origin(self, visible: Visible) -> Float[Tensor, "#batch pos"]:
        """Return the model's own position ids less the standard steps that are summed over, once for all layers."""
        # Layers on another device have tokens of their own, and so an origin of their own.
        if self._origin is None or self._origin[0] is not visible:
            self._origin = visible, self.position_ids - visible.steps()
        return self._origin[1]

    def at(self, positions: Float[Tensor, "batch pos"], states: Tensor | None = None) -> CosSin:
        """Return cos and sin of fractional positions, in the dtype of the states (default: those of the call)."""
        if self.axes is not None:
            # Axes are one for each token; several positions of a token in a row are those of its heads.
            positions = positions + self.axes.repeat_interleave(positions.shape[-1] // self.axes.shape[-1], dim=-1)
        return self._cos_sin_at(positions, self.states if states is None else states)

    def cos_sin(self, rotation: Rotation | None) -> CosSin:
        """Return a rotation of this call as cos and sin; None stands for that of the model's own position ids."""
        if rotation is None:  # an attention that was handed none, as it gathers from a table
            rotation = self.at(self.position_ids.float())
        return (rotation.real, rotation.imag) if isinstance(rotation, Tensor) else rotation

    def _cos_sin_at(self, positions: Tensor, states: Tensor) -> CosSin:
        # `forward` and not the module itself, whose hooks (`_note_rotary` is one) are for the model's own call.
        return self.cos_sin(self.module.forward(states, positions, *self.args, **self.kwargs))

    def in_module_form(self, cos_sin: CosSin) -> Rotation:
        """Return cos and sin in the form in which the module returns them."""
        return torch.complex(*cos_sin) if self.is_complex else cos_sin

    def frequencies(self, positions: Float[Tensor, "batch pos"]) -> Float[Tensor, " d_rotary"]:
        """Return the rotary frequency of each component of cos and sin, in radians per position.

        The module is asked for one small position p, where atan2(sin, cos) / p is the frequency to rounding. So neither
        its layout (halves or pairs) nor its scaling need be known.

        Args:
            positions: those of the pass: dynamic and long RoPE choose their frequencies by the largest one.
        """
        # These two choose by the length of the text, so that what was read once may not hold for the next pass.
        follows_length = any(kind in str(getattr(self.module, "rope_type", "")) for kind in ("dynamic", "longrope"))
        if self._frequencies is None or follows_length:
            # A power of two, so that the division is exact; small enough that no angle passes half a turn.
            p = 2.0**-12
            with torch.no_grad():
                probe = positions.new_full((1, 1), p)
                if follows_length:
                    probe = torch.cat([probe, positions.max().view(1, 1)], dim=1)
                if self.axes is not None:
                    probe = probe.expand(len(self.axes), -1, -1)
                cos, sin = self._cos_sin_at(probe, positions)
                self._frequencies = torch.atan2(sin, cos)[0, 0] / p
        return self._frequencies


class SinusoidTable:
    """A table of sines and cosines by whole position, as GPT-J has it, in the form of a rotary module.

    A whole position gives its row, to the bit. For a fraction above it, that row is rotated once more, by the fraction
    of the angles in row 1.
    """

    def __init__(self, table: Float[Tensor, "n_ctx d_rotary"]) -> None:
        self.table = table

    def forward(self, states: Tensor, positions: Float[Tensor, "batch pos"]) -> CosSin:
        """Return cos and sin, each of half the table's width."""
        # Positions before the first row or after the last keep the rest of their distance in the fraction.
        whole = positions.floor().clamp(0, len(self.table) - 1).long()
        (sin, cos), (sin_1, cos_1) = self.table[whole].chunk(2, dim=-1), self.table[1].chunk(2)

        # cos and sin of a sum of two angles.
        angle = (positions - whole).unsqueeze(-1) * torch.atan2(sin_1, cos_1)
        cos_of_sum = cos * angle.cos() - sin * angle.sin()
        sin_of_sum = sin * angle.cos() + cos * angle.sin()
        return cos_of_sum.to(states.dtype), sin_of_sum.to(states.dtype)


def tensors_of(rotation: Any) -> tuple[Tensor, ...]:
    """Return the tensors of a rotation, in whatever form it is."""
    return (rotation,) if isinstance(rotation, Tensor) else tuple(rotation or ())


def move_to_device(rotation: Rotation, device: torch.device) -> Rotation:
    """Move a rotation to the device of a layer."""
    if isinstance(rotation, Tensor):
        return rotation.to(device)
    return rotation[0].to(device), rotation[1].to(device)


def run_rotation_hook(
    hook: HookPoint,
    rotation: Rotation | None,
    model_rotation: Any,
    positions: Float[Tensor, "batch pos *head"],
    call: RotaryCall,
    tokens: HookedTokens,
) -> Rotation | None:
    """Pass a rotation through its hook point, as [batch pos *head 2 d_rotary] with cos before sin.

    Args:
        hook: the hook point.
        rotation: by the positions of the stream; None where the layer keeps the model's own.
        model_rotation: the model's own, for the second case; often one row for the whole batch.
        positions, call, tokens: what the rotation is of.

    Returns:
        The rotation after the hook point; None where it was None and no function changed it.
    """
    # One activation for a hook function, so that it edits cos and sin together.
    own = torch.stack(call.cos_sin(model_rotation if rotation is None else rotation), dim=-2)

    # A hook function is given a row for each text, so that it can edit one of them.
    activation = own.expand(positions.shape[0] if rotation is None else own.shape[0], *own.shape[1:])
    returned = run_hook(hook, activation, replace(tokens, frequencies=call.frequencies(positions.flatten(1))))
    if returned is activation:
        return rotation

    # A rotation of heads goes to the projections, which take cos and sin whatever the module's form.
    cos_sin = returned[..., 0, :], returned[..., 1, :]
    return cos_sin if positions.ndim == 3 else call.in_module_form(cos_sin)
