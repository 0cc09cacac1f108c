"""Whether the heads of a model can have rotations of their own: tried on a few tokens, not assumed.

    plain     all heads by the rotations of other tokens, one place on, two places on, three places on
    mixed     heads by these three in turn, through a head axis (`per_head.py`)

Every attention is given the same random states in all runs. What reaches its output projection is read head by head:
in the mixed run each head must give what it gave in the plain run with its rotation.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from ..errors import PositionsError
from .devices import device_of
from .find_attention import AttentionModule, AttentionWithRotary, AttentionWithTable, argument, with_argument
from .model_state import evaluation_mode
from .per_head import head_rotation, repeat_keys
from .rotation import RotaryCall

TOKENS, ROTATIONS = 8, 3
SCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Of the random states: small weights need large ones for scores that a rotation makes a difference to."""

SWITCHES = ("use_split_qkv_input", "use_attn_in", "use_attn_result")
"""Of TransformerLens: attention then reads other states than it is given, or goes around its output projection."""

Turn = Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]


def refuse_inexact_heads(base: Any, attentions: Sequence[AttentionModule], n_heads: int, n_query: int) -> None:
    """Refuse a model whose heads cannot have rotations of their own.

    Args:
        base: the transformers model, whose hook functions do not run.
        attentions: its rotary attention, module by module.
        n_heads: heads with a rotation: the query heads, or the key-value heads.
        n_query: query heads.

    Raises:
        PositionsError: the first attention that cannot, and why.
    """
    for attention in attentions:
        kind = type(attention.module).__name__
        if isinstance(attention, AttentionWithTable | AttentionWithRotary):
            _refuse(kind, "which computes its own rotation")
        if attention.leader is not None:
            _refuse(kind, "which reads the keys of another layer")
        if getattr(attention.module, "num_key_value_groups", 1) != 1 and n_query % n_heads:
            _refuse(kind, f"whose {n_query} query heads do not divide by {n_heads}")
    wrong = _first_wrong(base, attentions, n_heads, n_query)
    if wrong is not None:
        _refuse(*wrong)


def _refuse(kind: str, why: str) -> None:
    raise PositionsError(
        f"per-head increments are not exact in {kind}, {why}; expected a model such as Llama, Qwen3, Gemma 3 or "
        "GPT-NeoX, or one rotation for all heads."
    )


def _first_wrong(
    base: Any, attentions: Sequence[AttentionModule], n_heads: int, n_query: int
) -> tuple[str, str] | None:
    """The first attention whose heads do not rotate by themselves, and why."""
    told = [torch.zeros(n_query, dtype=torch.bool) for _ in attentions]
    kept: dict[int, Any] = {}
    for scale in SCALES:
        try:
            plain = [_run(base, attentions, n_query, scale, kept, partial(_turned, k)) for k in range(ROTATIONS)]
            mixed = _run(base, attentions, n_query, scale, kept, partial(_mixed, n_heads))
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError, PositionsError) as error:
            return type(attentions[0].module).__name__, f"where it fails ({' '.join(str(error).split())[:120]})"
        for i, attention in enumerate(attentions):
            apart = _told_apart([run[i] for run in plain], mixed[i], n_heads)
            if apart is None:
                return type(attention.module).__name__, "whose heads do not rotate one by one"
            told[i] |= apart
        if all(2 * int(heads.sum()) >= n_query for heads in told):
            return None

    # A head of no weight looks the same at any rotation. Others of its class then speak for it.
    seen = {type(attention.module).__name__: False for attention in attentions}
    for attention, heads in zip(attentions, told, strict=True):
        seen[type(attention.module).__name__] |= bool(heads.any())
    unclear = next((kind for kind, any_head in seen.items() if not any_head), None)
    return None if unclear is None else (unclear, "where rotations make no difference to tell heads apart by")


def _told_apart(
    plain: list[Float[Tensor, "batch pos query_head d_value"]],
    mixed: Float[Tensor, "batch pos query_head d_value"],
    n_heads: int,
) -> Bool[Tensor, " query_head"] | None:
    """Which heads tell rotations apart, where each gave what it gives with its own; None where one did not."""
    n_query = mixed.shape[2]
    of_head = [(head * n_heads // n_query) % ROTATIONS for head in range(n_query)]
    expected = torch.stack([plain[k][:, :, head] for head, k in enumerate(of_head)], dim=2)
    # The arithmetic is the same, and only its order may not be.
    rounding = 2 * torch.finfo(mixed.dtype).eps * float(expected.abs().max())
    if not bool((mixed - expected).abs().max() <= rounding):
        return None
    apart = torch.stack([(one - other).abs().amax((0, 1, 3)) for one, other in combinations(plain, 2)]).amin(0)
    return (apart > 2 * rounding).cpu()


def _run(
    base: Any, attentions: Sequence[AttentionModule], n_query: int, scale: float, kept: dict[int, Any], turn: Turn
) -> list[Tensor]:
    """Run a few tokens; of each attention what reaches its output projection, head by head.

    The first rotation that an attention is given is kept: a learned one would follow what earlier layers put out.
    """
    embedding = base.get_input_embeddings()
    found: dict[int, Tensor] = {}
    hooks: list[Any] = []
    undo: list[Callable[[], object]] = []
    try:
        for i, attention in enumerate(attentions):
            enter = partial(_with_states, attention, i, scale)
            hooks.append(attention.wrapper.register_forward_pre_hook(enter, with_kwargs=True))
            hooks += attention.hook(partial(_rotation, attention.module, n_query, kept.setdefault(i, []), turn, undo))
            hooks.append(attention.wrapper.register_forward_hook(partial(_undo_all, undo), always_call=True))
            for child in filter(_has_matrix, attention.module.children()):
                hooks.append(child.register_forward_pre_hook(partial(_note_input, found, i, n_query)))
        with _quiet(base), evaluation_mode(base), torch.inference_mode(False), torch.no_grad():
            tokens = torch.arange(TOKENS, device=device_of(embedding, base))[None] % len(embedding.weight)
            with torch.compiler.set_stance("force_eager"):
                base(input_ids=tokens, use_cache=False)
    finally:
        _undo_all(undo)
        for hook in hooks:
            hook.remove()
    return [found[i].unflatten(-1, (n_query, -1)) for i in range(len(attentions))]


def _with_states(
    attention: AttentionModule, i: int, scale: float, _module: nn.Module, args: tuple[Any, ...], kwargs: Any
) -> Any:
    """Give an attention random states, the same in each run."""
    states = argument(attention.parameters, args, kwargs, "hidden_states")
    drawn = scale * torch.randn(states.shape, generator=torch.Generator().manual_seed(i))
    return with_argument(attention.parameters, args, kwargs, "hidden_states", drawn.to(states))


def _rotation(
    attention: Any,
    n_query: int,
    kept: list[Any],
    turn: Turn,
    undo: list[Callable[[], object]],
    _states: Tensor,
    rotation: Any,
    _call: RotaryCall | None,
) -> tuple[Tensor, Tensor]:
    if isinstance(rotation, Tensor):
        raise PositionsError("its rotation is one complex tensor")
    kept[:] = kept or [rotation]
    cos, sin = (torch.Tensor.as_subclass(x, Tensor) for x in kept[0])
    # Of streams that are attached and per head, the rotation of the first head.
    plain = (cos[:, :, 0], sin[:, :, 0]) if cos.ndim == 4 else (cos, sin)
    turned = turn(plain)
    if turned[0].ndim == 4 and turned[0].shape[2] == n_query:
        undo += repeat_keys(attention, n_query, None)
    return head_rotation(turned) if turned[0].ndim == 4 else turned


def _turned(k: int, cos_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The rotation of other tokens, k + 1 places on."""
    cos, sin = cos_sin
    return cos.roll(k + 1, dims=1), sin.roll(k + 1, dims=1)


def _mixed(n_heads: int, cos_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Three rotations, by the heads in turn: cos and sin [batch pos head d_rotary]."""
    several = [_turned(head % ROTATIONS, cos_sin) for head in range(n_heads)]
    cos, sin = zip(*several, strict=True)
    return torch.stack(cos, dim=2), torch.stack(sin, dim=2)


def _note_input(found: dict[int, Tensor], i: int, n_query: int, _module: nn.Module, args: tuple[Any, ...]) -> None:
    """Note what a module of an attention is given; the last one that heads are in is its output projection."""
    if args and isinstance(args[0], Tensor) and args[0].ndim == 3 and args[0].shape[-1] % n_query == 0:
        found[i] = args[0].detach().clone()


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    # A quantised Linear has a method of that name.
    return callable(weight) or (weight is not None and weight.ndim == 2)


def _undo_all(undo: list[Callable[[], object]], *_: Any) -> None:
    while undo:
        undo.pop()()


@contextmanager
def _quiet(base: nn.Module) -> Iterator[None]:
    """Take the functions off all hook points for a block, and turn off switches that go around projections."""
    points = [module for module in base.modules() if isinstance(module, HookPoint)]
    kept = [(point._forward_hooks, point._backward_hooks) for point in points]
    configs = {id(config): config for m in base.modules() if (config := vars(m).get("config")) is not None}
    switched = [(c, name) for c in configs.values() for name in SWITCHES if getattr(c, name, False) is True]
    try:
        for config, name in switched:
            setattr(config, name, False)
        for point in points:
            point._forward_hooks, point._backward_hooks = type(point._forward_hooks)(), type(point._backward_hooks)()
        yield
    finally:
        for point, (forward, backward) in zip(points, kept, strict=True):
            point._forward_hooks, point._backward_hooks = forward, backward
        for config, name in switched:
            setattr(config, name, True)
