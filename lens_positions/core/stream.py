"""The position stream: increments -> positions -> cos and sin, at one layer.

    increments  d[batch, pos]   from the source                                     hook_increments
    positions   p[batch, pos]   the model's own position ids + running sum of d - 1   hook_positions
    cos, sin    the model's own rotary module, called with these positions              hook_rotation

Each query head can have its own, whatever the source:

    of heads    d[batch, pos, head]   those of all heads, once for each query head       hook_head_increments
                p[batch, pos, head]   positions + running sum of what heads differ by    hook_head_positions

Where no function changes them there, heads share what they shared before, to the bit.

The arithmetic is in `positions.py`; this file decides when it runs and on what. Without padding and cache, positions
are p_0 = 0, p_t = d_1 + ... + d_t (gap "before") or p_t = d_0 + ... + d_{t-1} (gap "after").

The sum runs over the tokens that a token can see (`visible_tokens.py`), in float64; positions are float32 (float64 in a
float64 model), whatever the model's dtype. A stream whose source is static and that no hook edits leaves the model's
cos and sin untouched; a shared or frozen one computes them once per forward pass. With a key-value cache a stream goes
on where that cache stopped: what it needs is kept in the cache object itself (`kv_cache.py`).
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import PositionsError
from .forward_pass import ForwardPass, SharedPositions
from .hook_points import HookedTokens, StreamHookPoint, has_hooks, run_hook
from .increments import PositionConfig
from .kv_cache import OF_HEADS, memory_of, with_memory
from .per_head import of_query_heads
from .positions import cos_and_sin, positions_at
from .rotation import RotaryCall, Rotation, move_to_device, run_rotation_hook
from .visible_tokens import Line, Tree, Visible, visible_tokens


class PositionStream(nn.Module):
    """Increments to positions to cos and sin at one layer, with a hook point at each.

    Attributes:
        config: what the source is.
        index: its place among the streams.
        layer: the model's own number of its layer.
        followed: whether other layers attend to this layer's keys, and so need its positions.
        heads: the shape of the head axis; empty where all heads share.
        n_query: how many query heads there are.
        source: of this layer alone; None where it is static, shared or frozen.
    """

    def __init__(
        self, config: PositionConfig, index: int, layer: int, source: nn.Module | None, n_heads: int, n_query: int
    ) -> None:
        super().__init__()
        self.config = config
        self.index = index
        self.layer = layer
        self.has_followers = False
        self.heads = (n_heads,) if config.per_head else ()
        self.n_query = n_query
        self.source = source
        self.hook_increments = StreamHookPoint()
        self.hook_positions = StreamHookPoint()
        self.hook_head_increments = StreamHookPoint()
        self.hook_head_positions = StreamHookPoint()
        self.hook_rotation = StreamHookPoint()

    def forward(
        self, states: Tensor, model_rotation: Any, call: RotaryCall | None, forward_pass: ForwardPass
    ) -> Rotation | None:
        """The rotation for the attention of this layer, or None where it is the model's own.

        Args:
            states: hidden states entering the attention, for their shape, dtype and device.
            model_rotation: the model's own, which this layer was given; often one row for the whole batch, and None
                where the attention takes none.
            call: the rotary call that it is from; None where it cannot be told.
            forward_pass: what this forward pass shares.

        Returns:
            cos and sin [batch pos d_rotary], in the form that the rotary module gives them, with a "head" axis
            before d_rotary where per head, or where a function gave query heads their own.

        Raises:
            PositionsError: the layer runs outside a forward pass of its model, gradients would be lost, or the mask
                does not say which tokens a token sees.
        """
        # A looped model runs this layer several times in a pass, and its cache has a place for each.
        key = (self.index, forward_pass.count(self.index))
        surplus = self._past_surplus(states, forward_pass, key)

        # Nothing can differ from the model's own: no arithmetic, and the model's own rotation to the bit.
        static = self.config.source == "static"
        apart = self._heads_before(forward_pass, key)
        if static and surplus is None and apart is None and not self.has_hooks():
            return None

        call = self._valid_call(call, forward_pass)
        with full_precision(states.device.type):
            increments, positions, shared, tokens = self._positions(states, call, surplus, forward_pass)
            by_head = self._by_head(increments, positions, apart, tokens, forward_pass, key)

            # A static stream that hooks only looked at leaves the rotation to the model.
            unedited = static and surplus is None and shared.increments is increments
            rotation: Rotation | None
            if by_head is not None or positions is not shared.positions:  # edited at this layer alone
                positions = positions if by_head is None else by_head
                rotation = rotate(positions, call)
            elif unedited:
                rotation = None
            else:
                if shared.rotation is None:
                    shared.rotation = rotate(positions, call)
                rotation = shared.rotation

            if forward_pass.cache is not None and not unedited:
                _remember(forward_pass, key, increments, surplus)
            if has_hooks(self.hook_rotation):
                rotation = run_rotation_hook(self.hook_rotation, rotation, model_rotation, positions, call, tokens)
            if rotation is None:
                return None

            # A layer that attends to this layer's keys comes later in the pass.
            if self.has_followers:
                forward_pass.of_leaders[self.index] = positions, call, rotation
            return move_to_device(rotation, states.device)

    def _positions(
        self, states: Tensor, call: RotaryCall, surplus: Tensor | None, forward_pass: ForwardPass
    ) -> tuple[Tensor, Tensor, SharedPositions, HookedTokens]:
        """Increments and positions after their hooks, the positions before, and what hooks may know of the tokens."""
        ids = call.position_ids
        from_source = self._from_source(states, forward_pass).to(ids.device)
        visible = _visible(forward_pass, call, self.config.gap, from_source)
        tokens = HookedTokens(forward_pass.past_length, ids, visible, sequence=_sequence(forward_pass))
        increments = run_hook(self.hook_increments, from_source, tokens)

        # Increments of all layers that no hook changed give all layers the same positions. A checkpointed layer
        # computes its own, so that it can be run again.
        shares = from_source is forward_pass.increments and increments is from_source and not forward_pass.checkpointed
        candidates = forward_pass.shared_positions if shares else []
        found = [known for known in candidates if known.match(increments, surplus, call)]

        # All layers with one source sum the same increments: the sum is made once, and so are cos and sin.
        if found:
            shared = found[0]
        else:
            total = visible.sum(increments, None if surplus is None else surplus.to(ids.device))
            positions = positions_at(call.origin(visible), total, increments.dtype)
            shared = SharedPositions(from_source, surplus, call, torch.is_grad_enabled(), positions)
            if shares:
                forward_pass.shared_positions.append(shared)

        return increments, run_hook(self.hook_positions, shared.positions, tokens), shared, tokens

    def has_hooks(self) -> bool:
        """Whether a function may change something at this layer."""
        points = (self.hook_increments, self.hook_positions, self.hook_rotation)
        return any(map(has_hooks, points)) or self.has_head_hooks()

    def has_head_hooks(self) -> bool:
        """Whether a function may give query heads their own increments or positions."""
        return has_hooks(self.hook_head_increments) or has_hooks(self.hook_head_positions)

    def _heads_before(self, forward_pass: ForwardPass, key: tuple[int, int]) -> Float[Tensor, "batch past head"] | None:
        """What query heads differ by in the tokens of the cache; None where they share all increments."""
        memory = memory_of(forward_pass.cache)
        return None if memory is None else memory.surplus.get((*key, OF_HEADS))

    def _by_head(
        self,
        increments: Float[Tensor, "batch pos *head"],
        positions: Float[Tensor, "batch pos *head"],
        before: Float[Tensor, "batch past head"] | None,
        tokens: HookedTokens,
        forward_pass: ForwardPass,
        key: tuple[int, int],
    ) -> Float[Tensor, "batch pos head"] | None:
        """The positions of each query head, after the hooks; None where heads share those that they are given."""
        if before is None and not self.has_head_hooks():
            return None
        shared, of_heads = (of_query_heads(values, self.n_query) for values in (increments, positions))
        own = run_hook(self.hook_head_increments, shared, tokens, watched=False)
        found = of_heads
        if own is not shared or before is not None:
            # The running sum of what heads differ by is exactly 0 for a head that does not.
            apart = own.to(wide_dtype(own)) - shared
            if before is None and tokens.past:
                before = apart.new_zeros(len(apart), tokens.past, self.n_query)
            total = tokens.visible.sum(apart, before)
            found = (of_heads.to(total) + total).to(positions.dtype)
        else:
            apart = torch.zeros_like(shared, dtype=wide_dtype(shared))
        found = run_hook(self.hook_head_positions, found, tokens, watched=False)
        if found is of_heads:
            return None

        if self.has_followers:
            raise PositionsError(
                f"other layers attend to the keys of layer {self.layer}, whose query heads cannot have positions of "
                "their own; expected an edit of all heads."
            )
        if forward_pass.cache is not None:  # from here on its keys are those of query heads
            memory = with_memory(forward_pass.cache)
            before = apart.new_zeros(len(apart), tokens.past, self.n_query) if before is None else before
            memory.surplus[*key, OF_HEADS] = torch.cat([before.to(apart.device), apart.detach()], dim=1)
            _remember_structure(forward_pass)
        return found

    def _from_source(self, states: Tensor, forward_pass: ForwardPass) -> Float[Tensor, "batch pos *head"]:
        """The increments of this layer before its hook."""
        if self.source is not None:
            residual = forward_pass.residuals[self.index]
            # The layer's hook noted what enters it. A model with several residual streams mixes them into one for its
            # attention: that one is read.
            return self.source(residual if residual.shape == states.shape else states)

        if forward_pass.increments is None:
            if self.config.source != "static":
                raise PositionsError(
                    f"the {self.config.source} source saw no tokens in this forward pass; expected the embeddings that "
                    "the model had when streams were attached (detach and attach again after a change)."
                )
            # Static: standard steps.
            dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
            forward_pass.increments = torch.ones(*states.shape[:2], *self.heads, dtype=dtype, device=states.device)

        if len(forward_pass.increments) != len(states):  # rows of one prompt that joined on the way
            return forward_pass.increments[:1].expand(len(states), *forward_pass.increments.shape[1:])
        return forward_pass.increments

    def _past_surplus(
        self, states: Tensor, forward_pass: ForwardPass, key: tuple[int, int]
    ) -> Float[Tensor, "batch past *head"] | None:
        """d - 1 of each token of the cache; None where there is no cache or it is all standard steps."""
        length = forward_pass.past_length
        if forward_pass.cache is None or length == 0:
            return None

        # The cache may have been filled before streams were attached, or by another model.
        memory = memory_of(forward_pass.cache)
        surplus = None if memory is None else memory.surplus.get(key)
        if surplus is None and self.config.source == "static":
            if not (has_hooks(self.hook_increments) or has_hooks(self.hook_positions)):
                return None
            # A hook was added after the cache was filled: its tokens were standard steps.
            return torch.zeros(states.shape[0], length, *self.heads, dtype=wide_dtype(states), device=states.device)

        if surplus is None or surplus.shape[:2] != (len(states), length):
            known = "none" if surplus is None else f"{len(surplus)} rows of {surplus.shape[1]}"
            raise PositionsError(
                f"the key-value cache holds {len(states)} rows of {length} tokens at layer {self.layer} and positions "
                f"for {known}; expected a cache filled by this model with its position streams attached, changed only "
                "through its own methods."
            )
        return surplus

    def _valid_call(self, call: RotaryCall | None, forward_pass: ForwardPass) -> RotaryCall:
        """Return the rotary call, if increments can act in this pass; refuse the pass otherwise."""
        if forward_pass.paged:
            raise PositionsError(
                "the model runs several texts in pages of one cache (continuous batching), where increments cannot "
                "tell whose tokens a token follows; expected generate() with another cache."
            )
        if call is None:
            raise PositionsError(
                f"layer {self.layer} has cos and sin from no rotary call of this forward pass; expected the model's "
                "own."
            )
        if self.config.learned and forward_pass.checkpointed and forward_pass.with_grad and not torch.is_grad_enabled():
            raise PositionsError(
                "reentrant gradient checkpointing loses the gradients of learned increments; expected "
                'gradient_checkpointing_enable({"use_reentrant": False}).'
            )
        return call


def full_precision(device: str) -> AbstractContextManager[Any]:
    """Leave autocast for a block: bf16 cannot tell positions apart past 256."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of sums: float64, where the device has it (Apple's has not)."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _visible(forward_pass: ForwardPass, call: RotaryCall, gap: str, increments: Tensor) -> Visible:
    """Return which tokens see which: computed once a pass, and shared by its layers."""
    ids = call.position_ids

    # Of a model on several devices, once for each device.
    if forward_pass.visible is None or forward_pass.visible.wide.device != ids.device:
        memory, mask = memory_of(forward_pass.cache), forward_pass.mask
        if forward_pass.cache is not None and isinstance(mask, Tensor) and mask.ndim == 2:
            # `generate` gives a static cache one mask for all the tokens that it has room for.
            mask = mask[:, : forward_pass.past_length + ids.shape[1]]
        forward_pass.visible = visible_tokens(
            mask,
            ids,
            gap,
            torch.empty(0, dtype=wide_dtype(increments), device=ids.device),
            # Ids along three axes go back within one image, too.
            packed=forward_pass.ids_given and forward_pass.cache is None and call.axes is None,
            past=forward_pass.past_length,
            slides=any(getattr(forward_pass.cache, "is_sliding", ())),
            real=None if memory is None else memory.real,
            ancestors=None if memory is None else memory.ancestors,
        )
    return forward_pass.visible


def _sequence(forward_pass: ForwardPass) -> Int[Tensor, "batch total"] | None:
    """Return the ids of all tokens so far, put together once a pass; None where those of the cache are not known."""
    if forward_pass.sequence is None and forward_pass.tokens is not None:
        now = forward_pass.tokens
        memory = memory_of(forward_pass.cache)
        before = None if memory is None else memory.tokens
        if forward_pass.past_length == 0:
            forward_pass.sequence = now
        elif before is not None and before.shape[1] == forward_pass.past_length and len(before) in (1, len(now)):
            forward_pass.sequence = torch.cat([before.to(now).expand(len(now), -1), now], dim=1)
    return forward_pass.sequence


def _remember(forward_pass: ForwardPass, key: tuple[int, int], increments: Tensor, surplus: Tensor | None) -> None:
    """Keep d - 1 of all tokens in the cache that holds their keys, and which of them see which."""
    memory = with_memory(forward_pass.cache)

    # Layers that share their increments share one tensor here too.
    shared = [whole for known, past, whole in forward_pass.shared_surplus if known is increments and past is surplus]
    if shared:
        whole = shared[0]
    else:
        whole = increments.detach().to(wide_dtype(increments)) - 1
        whole = whole if surplus is None else torch.cat([surplus.to(whole.device), whole], dim=1)
        forward_pass.shared_surplus.append((increments, surplus, whole))
    memory.surplus[key] = whole
    _remember_structure(forward_pass)


def _remember_structure(forward_pass: ForwardPass) -> None:
    """Keep which tokens of the cache see which."""
    memory, visible = with_memory(forward_pass.cache), forward_pass.visible
    memory.tokens = _sequence(forward_pass)

    # A line without padding needs no record.
    if isinstance(visible, Line) and visible.real is not None:
        memory.real = visible.real
    elif isinstance(visible, Tree):
        memory.ancestors = visible.every


def rotate(positions: Float[Tensor, "batch pos *head"], call: RotaryCall) -> Rotation:
    """Rotate by positions, in the form in which the module returns it; by positions of heads always cos and sin."""
    rotation = cos_and_sin(positions, call.at, call.frequencies)
    return call.in_module_form(rotation) if positions.ndim == 2 else rotation
