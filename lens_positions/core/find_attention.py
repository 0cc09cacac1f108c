"""Where a model's attention gets its rotation from: found by what the modules are, and by what they do.

    keyword    nearly all: (cos, sin) or a complex tensor, computed once, handed over as `position_embeddings`
    inside     the attention calls a rotary module of its own (RecurrentGemma)
    table      the attention gathers sines and cosines by position id from a table (GPT-J)

A layer counts only if its rotation takes part: a forward pass over three tokens, when attaching, shows which
rotation reaches the output of which attention. Layers without RoPE drop out, whatever they are called, and so do
the encoders of images and sound. An attention that reads another layer's keys is seen to depend on the rotation
of that layer too, and follows its positions.
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
from .model_state import evaluating
from .rotation import RotaryCall, SinusoidTable
from .transformer_lens_internals import is_wrapper

Turn = Callable[[Tensor, Any, RotaryCall | None], Any]
"""From hidden states, rotation and rotary call to another rotation, or None to keep it."""


class Site:
    """One attention module, handed its rotation as a keyword.

    Attributes:
        attention: the model's own module; `wrapper` the bridge component in its place, or the same.
        layer: the decoder layer around it, in the same way.
        number: the model's own number of that layer.
        leader: the stream whose positions it follows, counted over the sites that have one; None for its own.
    """

    def __init__(self, name: str, attention: nn.Module, wrapper: nn.Module, layer: nn.Module) -> None:
        self.name = name
        self.attention: Any = attention
        self.wrapper = wrapper
        self.layer = layer
        self.parameters = parameters(attention)
        self.number = next((int(part) for part in name.split(".") if part.isdigit()), 0)
        self.leader: int | None = None

    def hook(self, turn: Turn) -> list[Any]:
        """Hand this attention another rotation in every forward pass; returns handles to remove."""
        return [self.wrapper.register_forward_pre_hook(partial(self._enter, turn), with_kwargs=True)]

    def _enter(self, turn: Turn, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rotation = argument(self.parameters, args, kwargs, "position_embeddings")
        if rotation is None:
            return None
        turned = turn(argument(self.parameters, args, kwargs, "hidden_states"), rotation, None)
        return None if turned is None else with_argument(self.parameters, args, kwargs, "position_embeddings", turned)


class InsideSite(Site):
    """One attention module that calls a rotary module of its own."""

    def __init__(self, rotary: nn.Module, *place: Any) -> None:
        super().__init__(*place)
        self.rotary = rotary
        self._states = threading.local()

    def hook(self, turn: Turn) -> list[Any]:
        """As `Site.hook`: the output of the rotary module is replaced."""
        return [
            self.wrapper.register_forward_pre_hook(self._note, with_kwargs=True),
            self.wrapper.register_forward_hook(self._forget, always_call=True),
            self.rotary.register_forward_hook(partial(self._leave_rotary, turn), with_kwargs=True),
        ]

    def _note(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._states.entering = argument(self.parameters, args, kwargs, "hidden_states")

    def _forget(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        self._states.entering = None

    def _leave_rotary(
        self, turn: Turn, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        return turn(self._states.entering, output, RotaryCall.of(module, args, kwargs, output))


class TableSite(Site):
    """One attention module that gathers sines and cosines by position id from a table.

    For the time of its forward it gets a table of one row for each token of the batch, and ids that count the rows;
    other threads wait that long.
    """

    def __init__(self, table: str, *place: Any) -> None:
        super().__init__(*place)
        self.table = table
        self._own: list[Tensor] = []
        self._lock = threading.RLock()

    def hook(self, turn: Turn) -> list[Any]:
        """As `Site.hook`."""
        restore = self.wrapper.register_forward_hook(self._restore, always_call=True)
        return [*super().hook(turn), restore, SimpleNamespace(remove=self._restore)]

    def _enter(self, turn: Turn, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        states = argument(self.parameters, args, kwargs, "hidden_states")
        self._lock.acquire()
        self._put_back()  # an interrupt passes by hooks, and would leave the table of its batch
        ids, own = argument(self.parameters, args, kwargs, "position_ids"), getattr(self.attention, self.table)
        turned = turn(states, None, RotaryCall(SinusoidTable(own), (), {}, states, ids))
        if turned is None:
            return None
        cos, sin = turned
        self._own[:] = [own]
        setattr(self.attention, self.table, torch.cat([sin, cos], dim=-1).flatten(0, 1))
        rows = torch.arange(cos.shape[0] * cos.shape[1], device=ids.device).view(cos.shape[:2])
        return with_argument(self.parameters, args, kwargs, "position_ids", rows)

    def _restore(self, *_: Any) -> None:
        self._put_back()
        with suppress(RuntimeError):  # not taken, where the attention failed before
            self._lock.release()

    def _put_back(self) -> None:
        if self._own:
            setattr(self.attention, self.table, self._own.pop())


@dataclass(frozen=True)
class Link:
    """A module in its place in a model."""

    owner: nn.Module
    name: str
    module: nn.Module

    def refuse_replaced(self) -> None:
        """Refuse a pass of a model in which another module stands in its place.

        Raises:
            PositionsError: one does: what streams hooked into is not what runs.
        """
        if self.owner._modules.get(self.name) is not self.module:
            raise PositionsError(
                f"{self.name} of {type(self.owner).__name__} is another module than when position streams were "
                "attached; expected the same (detach and attach again after a change, such as an adapter)."
            )


def links_to(base: nn.Module, modules: list[nn.Module]) -> list[Link]:
    """The places of some modules in a model."""
    wanted = {id(module) for module in modules}
    owned = [(owner, name, child) for owner in base.modules() for name, child in owner._modules.items()]
    return [Link(owner, name, child) for owner, name, child in owned if child is not None and id(child) in wanted]


class RotaryAttention:
    """Where a model's rotary attention is.

    Attributes:
        sites: its attention modules whose rotation has an effect, in order.
        rotary: the modules that compute a rotation for several of them.
        stack: the module that calls them all (`model.model` in a Llama).

    Raises:
        PositionsError: there is none that can be reached, or the model is not a causal decoder.
    """

    def __init__(self, base: Any) -> None:
        kind = self._kind = type(base).__name__
        if not (isinstance(base, nn.Module) and hasattr(base, "get_input_embeddings") and hasattr(base, "config")):
            raise PositionsError(f"the model is a {kind}; expected a transformers model or a TransformerBridge.")
        if getattr(base.config, "is_encoder_decoder", False):
            raise PositionsError(f"{kind} is an encoder with a decoder; expected a decoder such as Llama.")
        refuse_absent_weights(base)
        self._wrappers = {id(m.original_component): m for m in base.modules() if is_wrapper(m)}
        self._own = {name: m for name, m in base.named_modules() if not is_wrapper(m)}
        inside = {id(m) for m in _decoder(base).modules()}
        decoder = {name: m for name, m in self._own.items() if id(m) in inside}
        rotary = {name: m for name, m in decoder.items() if _is_rotary(m)}
        callers = {name: self._caller(base, m) for name, m in rotary.items()}
        self.rotary = [m for name, m in rotary.items() if _takes(callers[name], "input_ids")]
        candidates = [
            *(
                self._site(Site, name)
                for name, m in decoder.items()
                if _takes(m, "position_embeddings") and _takes(m, "hidden_states")
            ),
            *(
                self._site(InsideSite, self._name(callers[name]), m)
                for name, m in rotary.items()
                if not _takes(callers[name], "input_ids")
            ),
            *(self._site(TableSite, name, table) for name, m in decoder.items() if (table := _sinusoids(m))),
        ]
        _refuse_positions_of_blocks(kind, candidates)
        self.sites = _take_part(base, candidates)
        if not self.sites:
            raise PositionsError(
                f"{kind} has no attention that takes rotary position_embeddings; expected a RoPE model such as Llama, "
                "Qwen, Gemma or GPT-NeoX."
            )
        if not all(getattr(site.attention, "is_causal", True) for site in self.sites):
            raise PositionsError(f"{kind} has attention that is not causal; expected a decoder such as Llama.")
        self.stack = self._ancestor(self.sites[0].name, "input_ids")

    def wrapper(self, module: nn.Module) -> nn.Module:
        """The bridge component that stands in for a module, or the module itself where there is none."""
        return self._wrappers.get(id(module), module)

    def component_around(self, site: Site) -> nn.Module:
        """The innermost bridge component around an attention that has none of its own."""
        names = [n for n, m in self._own.items() if site.name.startswith(n + ".") and id(m) in self._wrappers]
        return self._wrappers[id(self._own[names[-1]])]

    def _site(self, kind: Any, name: str, *first: Any) -> Site:
        attention = self._own[name]
        around = self._ancestor(name, "")
        layer = self._ancestor(name, "hidden_states", attention if isinstance(around, nn.ModuleList) else around)
        return kind(*first, name, attention, self.wrapper(attention), layer)

    def _caller(self, base: nn.Module, rotary: nn.Module) -> nn.Module:
        """The module that holds a rotary module, the decoder before an attention that only knows of it."""
        names = [name for name, m in base.named_modules(remove_duplicate=False) if m is rotary]
        callers = [self._ancestor(name, "") for name in names]
        return next((m for m in callers if _takes(m, "input_ids")), callers[0])

    def _name(self, module: nn.Module) -> str:
        return next(name for name, m in self._own.items() if m is module)

    def _ancestor(self, name: str, parameter: str, otherwise: nn.Module | None = None) -> Any:
        """The innermost module around this one whose forward takes a parameter."""
        around = [m for n, m in self._own.items() if (name.startswith(n + ".") or n == "") and n != name]
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
    """The names of what a module's forward takes, in order; read off its class, since a bridge may patch the module."""
    kind: Any = type(module)
    return _parameters(kind)


@cache
def _parameters(kind: Any) -> list[str]:
    return list(inspect.signature(kind.forward).parameters)[1:]


def argument(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """The argument of this name, however it was passed to parameters of these names; None where it was not."""
    if name in kwargs:
        return kwargs[name]
    return args[names.index(name)] if name in names and names.index(name) < len(args) else None


def with_argument(
    names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with another value for the one of this name."""
    if name in kwargs or name not in names or names.index(name) >= len(args):
        return args, {**kwargs, name: value}
    place = names.index(name)
    return (*args[:place], value, *args[place + 1 :]), kwargs


def _takes(module: nn.Module, parameter: str) -> bool:
    return parameter in parameters(module)


def _is_rotary(module: nn.Module) -> bool:
    return _takes(module, "position_ids") and any(
        n.endswith("inv_freq") for n, _ in module.named_buffers(recurse=False)
    )


def _sinusoids(module: nn.Module) -> str | None:
    """The name of a module's table of sines and cosines: row 0 is all sin 0, then all cos 0."""
    for name, table in module.named_buffers(recurse=False):
        if _takes(module, "position_ids") and table.ndim == 2 and len(table) > 1 and table.is_floating_point():
            sin, cos = table[0].chunk(2)
            if not table.is_meta and sin.eq(0).all() and cos.eq(1).all():
                return name
    return None


def _decoder(base: Any) -> nn.Module:
    """The part that reads tokens, in a model that also has encoders; the model itself otherwise."""
    found = getattr(base, "get_decoder", lambda: base)()
    holds_tokens = isinstance(found, nn.Module) and any(m is base.get_input_embeddings() for m in found.modules())
    return found if holds_tokens else base


def _refuse_positions_of_blocks(kind: str, sites: list[Site]) -> None:
    keyword = [site.name for site in sites if type(site) is Site]
    for site in sites:
        if isinstance(site, InsideSite) and any(site.name.startswith(name + ".") for name in keyword):
            raise PositionsError(
                f"{kind} rotates keys that stand for blocks of tokens by positions of their own, in {site.name}; "
                "expected a model that rotates the keys of tokens."
            )


def _take_part(base: Any, sites: list[Site]) -> list[Site]:
    """The sites whose rotation reaches what their attention returns; each learns whose positions it follows.

    Where the model cannot run on three tokens (its weights are elsewhere, its input is special), the innermost
    candidates are taken as they are.
    """
    reached: dict[int, set[int]] = {}
    leaves: dict[int, tuple[int, Tensor]] = {}
    hooks = []
    embedding = base.get_input_embeddings()
    try:
        for i, site in enumerate(sites):
            hooks += [
                site.wrapper.register_forward_pre_hook(partial(_cut, site), with_kwargs=True),
                *site.hook(partial(_plant, leaves, i)),
                site.wrapper.register_forward_hook(partial(_trace, site, leaves, reached, i), with_kwargs=True),
            ]
        with (
            evaluating(base),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            tokens = torch.arange(3, device=device_of(embedding, base))[None] % len(embedding.weight)
            base(input_ids=tokens, use_cache=False)
    except Exception as error:  # it is the model's own code that runs here, on input that it need not be made for
        warnings.warn(
            f"{type(base).__name__} does not run on three tokens ({' '.join(str(error).split())[:200]}): every "
            "attention that could rotate gets a stream, even where it does not.",
            stacklevel=4,
        )
        reached = {i: {i} for i in range(len(sites))}
    finally:
        for hook in hooks:
            hook.remove()
    whole = [i for i in reached if not any(sites[j].name.startswith(sites[i].name + ".") for j in reached)]
    kept = [i for i in sorted(whole) if reached[i]]
    leaders = {i: max((j for j in reached[i] - {i} if reached.get(j) == {j}), default=None) for i in kept}
    own = [i for i in kept if leaders[i] is None]
    for i, leader in leaders.items():
        sites[i].leader = None if leader is None else own.index(leader)
    return [sites[i] for i in kept]


def _cut(site: Site, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    states = argument(site.parameters, args, kwargs, "hidden_states")
    return with_argument(site.parameters, args, kwargs, "hidden_states", states.detach())


def _plant(
    leaves: dict[int, tuple[int, Tensor]], i: int, _states: Tensor, rotation: Any, call: RotaryCall | None
) -> Any:
    given = call.at(call.position_ids.float()) if rotation is None and call is not None else rotation
    fresh = [t.detach().clone().requires_grad_() for t in ((given,) if isinstance(given, Tensor) else given)]
    leaves.update({id(leaf): (i, leaf) for leaf in fresh})
    return fresh[0] if isinstance(given, Tensor) else tuple(fresh)


def _trace(
    site: Site,
    leaves: dict[int, tuple[int, Tensor]],
    reached: dict[int, set[int]],
    i: int,
    _module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    states = argument(site.parameters, args, kwargs, "hidden_states")
    result = output[0] if isinstance(output, tuple) else output
    if not isinstance(result, Tensor) or result.shape != states.shape or i not in {n for n, _ in leaves.values()}:
        return
    found = reached.setdefault(i, set())
    waiting, seen = [result.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in leaves:
            found.add(leaves[id(getattr(node, "variable", None))][0])
        waiting += [before for before, _ in node.next_functions]
