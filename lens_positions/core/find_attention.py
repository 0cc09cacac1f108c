"""Where a model's attention gets its rotation from: found by what the modules are, and by what they do.

    AttentionModule        nearly all: (cos, sin) or a complex tensor, computed once, handed over as
                           `position_embeddings`
    AttentionWithRotary    the attention calls a rotary module of its own (RecurrentGemma)
    AttentionWithTable     the attention gathers sines and cosines by position id from a table (GPT-J)

A layer counts only if its rotation has an effect: a forward pass over three tokens, when attaching, shows which
rotation reaches the output of which attention. Layers without RoPE drop out, whatever they are called, and so do the
encoders of images and sound. An attention that reads another layer's keys depends on the rotation of that layer too,
and follows its positions.
"""

import inspect
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PositionsError
from .devices import device_of, refuse_absent_weights
from .model_state import evaluation_mode
from .rotation import RotaryCall, SinusoidTable
from .transformer_lens_internals import is_wrapper

Replace = Callable[[Tensor, Any, RotaryCall | None], Any]
"""From hidden states, rotation and rotary call to another rotation, or None to keep it."""


class AttentionModule:
    """One attention module, handed its rotation as a keyword.

    Attributes:
        module: the model's own; `wrapper` is the bridge component in its place, or the same.
        layer: the decoder layer around it, in the same way.
        number: the model's own number of that layer.
        leader: the stream whose positions it follows, counted over the modules that have one; None for its own.
    """

    def __init__(self, name: str, module: nn.Module, wrapper: nn.Module, layer: nn.Module) -> None:
        self.name = name
        self.module: Any = module
        self.wrapper = wrapper
        self.layer = layer
        self.parameters = parameters(module)

        # A layer is the first number in a name such as "model.layers.3.self_attn".
        self.number = next((int(part) for part in name.split(".") if part.isdigit()), 0)
        self.leader: int | None = None

    def hook(self, replace: Replace) -> list[Any]:
        """Hand this attention another rotation in every forward pass, and return handles to remove."""
        return [self.wrapper.register_forward_pre_hook(partial(self._enter, replace), with_kwargs=True)]

    def _enter(self, replace: Replace, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rotation = argument(self.parameters, args, kwargs, "position_embeddings")
        if rotation is None:
            return None
        other = replace(argument(self.parameters, args, kwargs, "hidden_states"), rotation, None)
        return None if other is None else with_argument(self.parameters, args, kwargs, "position_embeddings", other)


class AttentionWithRotary(AttentionModule):
    """One attention module that calls a rotary module of its own."""

    def __init__(self, rotary: nn.Module, *place: Any) -> None:
        super().__init__(*place)
        self.rotary = rotary
        self._states = threading.local()  # `entering`: the hidden states of the call that runs

    def hook(self, replace: Replace) -> list[Any]:
        """As `AttentionModule.hook`; what is replaced is the output of the rotary module."""
        return [
            self.wrapper.register_forward_pre_hook(self._note, with_kwargs=True),
            self.wrapper.register_forward_hook(self._forget, always_call=True),
            self.rotary.register_forward_hook(partial(self._leave_rotary, replace), with_kwargs=True),
        ]

    def _note(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._states.entering = argument(self.parameters, args, kwargs, "hidden_states")

    def _forget(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        # An attention that runs outside its layer later finds nothing, and not the states of another pass.
        self._states.entering = None

    def _leave_rotary(
        self, replace: Replace, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        return replace(self._states.entering, output, RotaryCall.of(module, args, kwargs, output))


class AttentionWithTable(AttentionModule):
    """One attention module that gathers sines and cosines by position id from a table.

    For the time of its forward it gets another table and other ids:

        model      table[position id]      a row for each whole position
        stream     table[batch * pos]      a row for each token of the batch, at its fractional position
                   ids 0, 1, 2, ...        which count those rows

    The table is the module's own attribute, so other threads that run the model wait that long.
    """

    def __init__(self, table: str, *place: Any) -> None:
        super().__init__(*place)
        self.table = table
        self._own: list[Tensor] = []  # the module's own table, while it has another
        self._lock = threading.RLock()

    def hook(self, replace: Replace) -> list[Any]:
        """As `AttentionModule.hook`."""
        restore = self.wrapper.register_forward_hook(self._restore, always_call=True)
        return [*super().hook(replace), restore, SimpleNamespace(remove=self._restore)]

    def _enter(self, replace: Replace, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        states = argument(self.parameters, args, kwargs, "hidden_states")

        # Held until `_restore`: the table is one attribute of the module, and all threads read it.
        self._lock.acquire()
        self._put_back()  # an interrupt passes by hooks, and would have left the table of its batch

        ids, own = argument(self.parameters, args, kwargs, "position_ids"), getattr(self.module, self.table)
        rotation = replace(states, None, RotaryCall(SinusoidTable(own), (), {}, states, ids))
        if rotation is None:
            return None

        cos, sin = rotation
        self._own[:] = [own]
        setattr(self.module, self.table, torch.cat([sin, cos], dim=-1).flatten(0, 1))

        # The new table has a row for each token of the batch, one after another, so ids just count.
        rows = torch.arange(cos.shape[0] * cos.shape[1], device=ids.device).view(cos.shape[:2])
        return with_argument(self.parameters, args, kwargs, "position_ids", rows)

    def _restore(self, *_: Any) -> None:
        self._put_back()

        # Called also on detaching, and where a hook before this one failed: the lock may not be taken.
        with suppress(RuntimeError):
            self._lock.release()

    def _put_back(self) -> None:
        if self._own:
            setattr(self.module, self.table, self._own.pop())


@dataclass(frozen=True)
class Link:
    """A module in its place in a model: what its parent calls by this name."""

    owner: nn.Module
    name: str
    module: nn.Module

    def refuse_replaced(self) -> None:
        """Refuse a pass of a model in which another module stands in this place.

        Raises:
            PositionsError: one does, so the module that streams hooked into is not the one that runs.
        """
        if self.owner._modules.get(self.name) is not self.module:
            raise PositionsError(
                f"{self.name} of {type(self.owner).__name__} is another module than when position streams were "
                "attached; expected the same (detach and attach again after a change, such as an adapter)."
            )


def links_to(base: nn.Module, modules: list[nn.Module]) -> list[Link]:
    """Return the places of some modules in a model: several of one that is used twice."""
    wanted = {id(module) for module in modules}
    owned = [(owner, name, child) for owner in base.modules() for name, child in owner._modules.items()]
    return [Link(owner, name, child) for owner, name, child in owned if child is not None and id(child) in wanted]


class RotaryAttention:
    """Where a model's rotary attention is.

    A bridge puts components around the model's own modules. Modules are found among the model's own, whose classes say
    what they are; hooks go to the components, where those of users are. Modules are told apart by `id`, which is safe
    while the model holds them.

    Attributes:
        modules: its attention modules whose rotation has an effect, in order.
        rotary: the modules that compute a rotation for several of them.
        stack: the module that calls them all (`model.model` in a Llama).

    Raises:
        PositionsError: there is none that can be reached, or the model is not a causal decoder.
    """

    def __init__(self, base: Any) -> None:
        kind = self._kind = type(base).__name__
        _refuse_other_models(base, kind)

        # From each of the model's own modules to the bridge component that stands around it.
        self._wrappers = {id(m.original_component): m for m in base.modules() if is_wrapper(m)}
        self._own = {name: m for name, m in base.named_modules() if not is_wrapper(m)}

        # Images and sound are encoded beside the decoder, by attention that no token waits for.
        in_decoder = {id(m) for m in _decoder(base).modules()}
        decoder = {name: m for name, m in self._own.items() if id(m) in in_decoder}

        # A rotary module that the decoder calls serves all layers; one that attention calls serves that attention.
        rotary = {name: m for name, m in decoder.items() if _is_rotary(m)}
        callers = {name: self._caller(base, m) for name, m in rotary.items()}
        self.rotary = [m for name, m in rotary.items() if _takes(callers[name], "input_ids")]

        # Names decide nothing yet: a candidate counts if its rotation is seen to act.
        candidates = self._candidates(decoder, rotary, callers)
        _refuse_positions_of_blocks(kind, candidates)
        self.modules = _attentions_with_effect(base, candidates)
        if not self.modules:
            raise PositionsError(
                f"{kind} has no attention that takes rotary position_embeddings; expected a RoPE model such as Llama, "
                "Qwen, Gemma or GPT-NeoX."
            )
        if not all(getattr(attention.module, "is_causal", True) for attention in self.modules):
            raise PositionsError(f"{kind} has attention that is not causal; expected a decoder such as Llama.")
        self.stack = self._ancestor(self.modules[0].name, "input_ids")

    def _candidates(
        self, decoder: dict[str, nn.Module], rotary: dict[str, nn.Module], callers: dict[str, nn.Module]
    ) -> list[AttentionModule]:
        """All modules that look like rotary attention, of each kind."""
        keyword = [n for n, m in decoder.items() if _takes(m, "position_embeddings") and _takes(m, "hidden_states")]
        inside = [(n, m) for n, m in rotary.items() if not _takes(callers[n], "input_ids")]
        tables = [(n, table) for n, m in decoder.items() if (table := _sinusoids(m))]
        return [
            *(self._attention_module(AttentionModule, name) for name in keyword),
            *(
                self._attention_module(AttentionWithRotary, self._name(callers[name]), module)
                for name, module in inside
            ),
            *(self._attention_module(AttentionWithTable, name, table) for name, table in tables),
        ]

    def wrapper(self, module: nn.Module) -> nn.Module:
        """The bridge component that stands in for a module, or the module itself where there is none."""
        return self._wrappers.get(id(module), module)

    def component_around(self, attention: AttentionModule) -> nn.Module:
        """The innermost bridge component around an attention that has none of its own."""
        names = [n for n, m in self._own.items() if attention.name.startswith(n + ".") and id(m) in self._wrappers]

        # Modules come in order from the outside in.
        return self._wrappers[id(self._own[names[-1]])]

    def _attention_module(self, kind: Any, name: str, *first: Any) -> AttentionModule:
        attention = self._own[name]
        around = self._ancestor(name, "")

        # The decoder layer takes hidden states; of a model without one (attention in a plain list) the attention does.
        layer = self._ancestor(name, "hidden_states", attention if isinstance(around, nn.ModuleList) else around)
        return kind(*first, name, attention, self.wrapper(attention), layer)

    def _caller(self, base: nn.Module, rotary: nn.Module) -> nn.Module:
        """The module that holds a rotary module, the decoder before an attention that only knows of it."""
        # One module may have several names, where attention keeps a reference to the decoder's.
        names = [name for name, m in base.named_modules(remove_duplicate=False) if m is rotary]
        callers = [self._ancestor(name, "") for name in names]
        return next((m for m in callers if _takes(m, "input_ids")), callers[0])

    def _name(self, module: nn.Module) -> str:
        return next(name for name, m in self._own.items() if m is module)

    def _ancestor(self, name: str, parameter: str, otherwise: nn.Module | None = None) -> Any:
        """The innermost module around this one whose forward takes a parameter."""
        around = [m for n, m in self._own.items() if (name.startswith(n + ".") or n == "") and n != name]

        # Modules are named from the outside in, so the innermost comes last.
        for module in reversed(around):
            if not parameter or _takes(module, parameter):
                return module
        if otherwise is not None:
            return otherwise
        raise PositionsError(
            f"{self._kind} has no module around {name} whose forward takes {parameter}; expected a decoder such as "
            "Llama."
        )


def parameters(module: nn.Module) -> list[str]:
    """Return the names of what a module's forward takes, in order.

    They are read off its class: a bridge may put another `forward` on the module itself, which takes anything.
    """
    kind: Any = type(module)
    return _parameters(kind)


@cache
def _parameters(kind: Any) -> list[str]:
    # Without `self`.
    return list(inspect.signature(kind.forward).parameters)[1:]


def argument(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """Return the argument of this name, passed by position or by name; None where it was not passed."""
    if name in kwargs:
        return kwargs[name]

    # A model may pass arguments by position, and fewer than its forward takes.
    return args[names.index(name)] if name in names and names.index(name) < len(args) else None


def with_argument(
    names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the same arguments with another value for the one of this name."""
    if name in kwargs or name not in names or names.index(name) >= len(args):
        return args, {**kwargs, name: value}
    place = names.index(name)
    return (*args[:place], value, *args[place + 1 :]), kwargs


def _takes(module: nn.Module, parameter: str) -> bool:
    return parameter in parameters(module)


def _is_rotary(module: nn.Module) -> bool:
    """Whether a module computes cos and sin: from position ids, by inverse frequencies (some have two sets of them)."""
    return _takes(module, "position_ids") and any(
        n.endswith("inv_freq") for n, _ in module.named_buffers(recurse=False)
    )


def _sinusoids(module: nn.Module) -> str | None:
    """Return the name of a module's table of sines and cosines: its row 0 is all sin 0, then all cos 0."""
    for name, table in module.named_buffers(recurse=False):
        if _takes(module, "position_ids") and table.ndim == 2 and len(table) > 1 and table.is_floating_point():
            # At position 0 every angle is 0, whatever the frequencies are.
            sin, cos = table[0].chunk(2)
            if not table.is_meta and sin.eq(0).all() and cos.eq(1).all():
                return name
    return None


def _refuse_other_models(base: Any, kind: str) -> None:
    """Refuse what is no decoder of transformers with its weights in reach."""
    if not (isinstance(base, nn.Module) and hasattr(base, "get_input_embeddings") and hasattr(base, "config")):
        raise PositionsError(f"the model is a {kind}; expected a transformers model or a TransformerBridge.")
    if getattr(base.config, "is_encoder_decoder", False):
        raise PositionsError(f"{kind} is an encoder with a decoder; expected a decoder such as Llama.")
    refuse_absent_weights(base)


def _decoder(base: Any) -> nn.Module:
    """Return the part that reads tokens, in a model that also has encoders; the model itself otherwise."""
    found = getattr(base, "get_decoder", lambda: base)()
    holds_tokens = isinstance(found, nn.Module) and any(m is base.get_input_embeddings() for m in found.modules())
    return found if holds_tokens else base


def _refuse_positions_of_blocks(kind: str, attentions: list[AttentionModule]) -> None:
    """Refuse attention that has a second rotation inside, as that of compressed keys."""
    # Exactly this class: an attention that takes cos and sin, and has another rotary module inside it.
    keyword = [attention.name for attention in attentions if type(attention) is AttentionModule]
    for attention in attentions:
        if isinstance(attention, AttentionWithRotary) and any(
            attention.name.startswith(name + ".") for name in keyword
        ):
            raise PositionsError(
                f"{kind} rotates keys that stand for blocks of tokens by positions of their own, in {attention.name}; "
                "expected a model that rotates the keys of tokens."
            )


def _attentions_with_effect(base: Any, attentions: list[AttentionModule]) -> list[AttentionModule]:
    """Keep the attention whose rotation reaches what it returns; each module learns whose positions it follows.

    Where the model cannot run on three tokens (its weights are elsewhere, its input is special), the innermost
    candidates are taken as they are.
    """
    try:
        reached = _rotations_behind(base, attentions)
    except Exception as error:  # it is the model's own code that runs here, on input that it need not be made for
        warnings.warn(
            f"{type(base).__name__} does not run on three tokens ({' '.join(str(error).split())[:200]}): every "
            "attention that could rotate gets a stream, even where it does not.",
            stacklevel=4,
        )
        reached = {i: {i} for i in range(len(attentions))}

    # A layer takes `position_embeddings` too, and hands them on to its attention: the innermost module counts.
    inner = [i for i in reached if not any(attentions[j].name.startswith(attentions[i].name + ".") for j in reached)]
    kept = [i for i in sorted(inner) if reached[i]]

    # A follower's output depends on the rotation of another attention, one that depends on its own alone.
    leaders = {i: max((j for j in reached[i] - {i} if reached.get(j) == {j}), default=None) for i in kept}
    with_stream = [i for i in kept if leaders[i] is None]
    for i, leader in leaders.items():
        attentions[i].leader = None if leader is None else with_stream.index(leader)
    return [attentions[i] for i in kept]


def _rotations_behind(base: Any, attentions: list[AttentionModule]) -> dict[int, set[int]]:
    """Run three tokens: of each attention that ran, those whose rotation its output depends on.

        hidden states, detached --+
                                  +-> attention -> output -> its autograd graph, walked back to the leaves
        rotation, a fresh leaf ---+

    The names of modules say little of what they compute; the graph that autograd records says all. Hidden states are
    detached before each attention, so what is found behind its output came through this attention: its own rotation,
    or that of a layer whose keys it reads.
    """
    reached: dict[int, set[int]] = {}
    leaves: dict[int, tuple[int, Tensor]] = {}
    hooks = []
    embedding = base.get_input_embeddings()
    try:
        # Pre-hooks run in the order of registration: states are detached before the rotation becomes a leaf.
        for i, attention in enumerate(attentions):
            hooks += [
                attention.wrapper.register_forward_pre_hook(partial(_detach_states, attention), with_kwargs=True),
                *attention.hook(partial(_rotation_as_leaf, leaves, i)),
                attention.wrapper.register_forward_hook(
                    partial(_note_leaves, attention, leaves, reached, i), with_kwargs=True
                ),
            ]
        with (
            evaluation_mode(base),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            # Several tokens, as at one position alone every rotation gives the same scores.
            tokens = torch.arange(3, device=device_of(embedding, base))[None] % len(embedding.weight)
            base(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return reached


def _detach_states(
    attention: AttentionModule, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    states = argument(attention.parameters, args, kwargs, "hidden_states")
    return with_argument(attention.parameters, args, kwargs, "hidden_states", states.detach())


def _rotation_as_leaf(
    leaves: dict[int, tuple[int, Tensor]], i: int, _states: Tensor, rotation: Any, call: RotaryCall | None
) -> Any:
    """Replace a rotation by a copy that autograd graphs end at, and note which attention it belongs to."""
    own = call.at(call.position_ids.float()) if rotation is None and call is not None else rotation

    # A clone for each attention: models hand one and the same (cos, sin) to all of them.
    fresh = [t.detach().clone().requires_grad_() for t in ((own,) if isinstance(own, Tensor) else own)]
    leaves.update({id(leaf): (i, leaf) for leaf in fresh})  # which keeps them, so that no id is used again
    return fresh[0] if isinstance(own, Tensor) else tuple(fresh)


def _note_leaves(
    attention: AttentionModule,
    leaves: dict[int, tuple[int, Tensor]],
    reached: dict[int, set[int]],
    i: int,
    _module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    """Note whose rotations are behind the output of an attention, if it is one and was handed a leaf."""
    states = argument(attention.parameters, args, kwargs, "hidden_states")

    # Attention returns its output, or a tuple of it and its weights; what returns something else is no attention.
    result = output[0] if isinstance(output, tuple) else output
    if not isinstance(result, Tensor) or result.shape != states.shape or i not in {n for n, _ in leaves.values()}:
        return
    found = reached.setdefault(i, set())
    found |= {leaves[leaf][0] for leaf in _leaves_behind(result) & leaves.keys()}


def _leaves_behind(result: Tensor) -> set[int]:
    """Walk an autograd graph from a tensor back to its leaves, and return their ids.

    result.grad_fn -> MulBackward -> next_functions -> ... -> AccumulateGrad, whose `variable` is the leaf
    """
    leaves: set[int] = set()
    waiting, seen = [result.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)

        # Only an AccumulateGrad node has a `variable`; the id of None is that of no leaf.
        leaves.add(id(getattr(node, "variable", None)))
        waiting += [before for before, _ in node.next_functions]
    return leaves
