"""Interventions on increments and positions: set them, hold them, exchange them, stretch them.

Each function returns a list of (hook name, hook function), as TransformerLens takes them, so that they work under
`run_with_hooks`, `hooks()`, `run_with_cache` and `generate`, and add up with `+`, the left one first:

    model.run_with_hooks(text, fwd_hooks=lp.ablate(model, to="mean", layers=[0]) + lp.add_gap(model, before=3))

`site` says what is changed, and it is not the same thing:

                increments (the default)                        positions
    meaning     the distance before a token                     where the rotation of one layer puts it
    reaches     every later token of the layer, which moves     that token alone; no other token moves
    ablate      every distance the same number                  a ruler of equal steps (mean: as long as before)
    shuffle     distances change places, order stays            tokens change places, order goes
    scale       distances times a factor                        positions times a factor; of some tokens: those alone
    add_gap     the token and all after it move away            the token alone moves away, into the next gap
    freeze      distances as recorded                           places as recorded; padding and caches included
    patch       a recorded distance                             a recorded place

All arguments that choose are alike: `layers` are the model's own numbers, None every layer with a stream; `heads` are
query heads, or key-value heads with `head_kind="key_value"`, None all of them. Every model whose heads can be rotated
one by one has them, with one increment source for all heads too: the other heads then keep what they had. A query head
sees its own queries and the keys of its group by the positions that it is given (`core/per_head.py`). `positions` says
which tokens, padding left as it is:

    None                        all of them
    3, [0, 5]                   indices from 0, of tokens of the prompt; of several texts those of each, padding not
                                counted
    slice(20, None)             every token from number 20 on, also those that a generation adds
    a mask [pos], [batch pos]   the tokens of the prompt where it is True
    a function of token ids     those where it returns True: `lambda ids: ids == newline`, say, or "all after the first
                                newline", `lambda ids: (ids == newline).cumsum(1) > 0`. It gets the ids [batch total] of
                                all tokens so far, a row with padding alone and without it, and returns booleans of that
                                shape. Whether a token is chosen must not depend on what follows it: a function for
                                which it does is refused.

Generation with a key-value cache calls hooks once for the prompt and once for each new token. Indices count from the
first token of a text, wherever its padding stands; new tokens get the same number, factor or, with "mean", the prompt's
mean; a shuffle and values recorded on the prompt leave them as they are. A list with a mean serves one generation at a
time. A slice and a function choose the same tokens with a cache and without; the mean and the shuffle, which look at a
whole row, take neither a slice without an end nor a function.

An intervention that can only write what is there is refused when it is made, since its null result would be read as a
finding: a factor of 1, a gap longer by 0, and on a static model, whose increments are all 1.0, ablating them to 1.0,
their mean or a shuffle, ablating positions to steps of 1.0, and patching in what a static model recorded. Not refused,
as they act beside other edits: `freeze`, which holds values, and the mean of positions, which need not be even where
documents are packed.
"""

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.model_bridge import TransformerBridge

from .core.hook_points import HookedTokens
from .core.model_wrappers import base_model
from .core.per_head import of_query_heads
from .core.position_streams import PositionStreams
from .errors import PositionsError

HOOK, HEAD_HOOK = "attn.hook_{}", "attn.hook_head_{}"
"""The name of increments and positions within their block, and of those of query heads."""

Hooks = list[tuple[str, Callable[..., Any]]]
"""(hook name, hook function) pairs, as `run_with_hooks` takes them."""

LayerIndices = int | Sequence[int] | None
"""The model's own numbers of layers; None is every layer with a stream."""

HeadIndices = int | Sequence[int] | None
"""Heads from 0; None is all of them."""

TokenIndices = int | Sequence[int] | None
"""Tokens from 0; None is all of them."""

Condition = Callable[[Int[Tensor, "batch total"]], Bool[Tensor, "batch total"]]
"""From the ids of all tokens so far to whether each is chosen, which must not depend on later ones."""

TokenSelection = TokenIndices | slice | Bool[Tensor, "*#batch pos"] | Condition
"""Tokens from 0, a slice of them, a boolean mask [pos] or [batch pos], or a function of their ids."""

Site = Literal["increments", "positions"]
HeadKind = Literal["query", "key_value"]

Edit = Callable[[Float[Tensor, "batch pos *head"], Bool[Tensor, "#batch pos"], HookedTokens], Tensor]
"""From values, the chosen tokens and what is known of them to other values, of which the chosen are used."""


def ablate(
    model: TransformerBridge,
    to: float | Literal["mean", "shuffle"] = 1.0,
    layers: LayerIndices = None,
    positions: TokenSelection = None,
    heads: HeadIndices = None,
    *,
    site: Site = "increments",
    seed: int = 0,
    head_kind: HeadKind = "query",
) -> Hooks:
    """Take the structure out of increments.

    A number also changes the scale of a layer whose mean is another one: look at "mean" beside it. The mean and the
    shuffle are over a whole row, later tokens included, so they are not causal: they move a token by what follows it.

    Args:
        model: a bridge with position streams.
        to: a number, the same for every token (1.0 is standard RoPE); "mean", each row's own mean over the chosen
            real tokens whose increment lies between two tokens, so that the row keeps its length; or "shuffle",
            those increments in another order.
        layers, positions, heads, site, head_kind: see above.
        seed: of the shuffle, which is drawn anew for each row and layer, and alike in every call and for any padding.

    Returns:
        (hook name, hook function) pairs, one a layer.

    Raises:
        PositionsError: no such layer, token or head, `to` is none of the three, a mean or a shuffle of tokens without
            an end, or the model is static and has what `to` asks for already.

    >>> with model.hooks(fwd_hooks=lp.ablate(model, to=1.0, layers=0)):  # standard RoPE at layer 0
    ...     model.increments("The cat")[:2, 0].round(decimals=1)
    tensor([[1.0000, 1.0000, 1.0000, 1.0000, 1.0000, 1.0000, 1.0000, 1.0000],
            [1.3000, 1.0000, 0.6000, 0.6000, 1.0000, 1.0000, 1.0000, 0.9000]])
    """
    # Arguments are checked first, so that a wrong one is named before the null result is.
    hooks = ablation_hooks(model, to, layers, positions, heads, site=site, seed=seed, head_kind=head_kind)
    if is_static(model) and (to == 1 or (site == "increments" and isinstance(to, str))):
        has, held = "every increment of this model is 1.0", "freeze(cache)"
        if site == "positions":
            has, held = "positions of this model are steps of 1.0", 'to="mean"'
        raise PositionsError(
            f"{has} (source static), so that ablating {site} to {to!r} changes nothing; expected another number, a "
            f"model with learned increments, or {held} to hold them against other edits."
        )
    return hooks


def ablation_hooks(
    model: TransformerBridge,
    to: float | Literal["mean", "shuffle"] = 1.0,
    layers: LayerIndices = None,
    positions: TokenSelection = None,
    heads: HeadIndices = None,
    *,
    site: Site = "increments",
    seed: int = 0,
    head_kind: HeadKind = "query",
) -> Hooks:
    """What `ablate` gives, on a static model too: for tables, where a row of zeros is a control."""
    if not (isinstance(to, str) and to in ("mean", "shuffle")):
        to = finite_number(to, "to", 'a finite number, "mean" or "shuffle"')
    seed = index_of(seed, "seed", "a whole number from 0")

    endless = (isinstance(positions, slice) and positions.stop is None) or _is_condition(positions)
    if isinstance(to, str) and endless:
        raise PositionsError(
            f"to is {to!r} and positions has no end, so that each new token would change it for those before; expected "
            "a number, or indices, a mask or a slice with an end."
        )

    hooks: Hooks = []
    hook, heads = _of_heads(model, site, heads, head_kind)
    for layer, name in hook_names(model, layers, hook):
        if to == "mean":
            # One object a layer, as it keeps the mean of the prompt for the tokens that are generated.
            hooks.append((name, _hook_function(_Mean(site), positions, heads, f"{site} at the row's mean")))
        elif to == "shuffle":
            # Another order for each layer: with one for all, layers would agree on wrong distances.
            shuffle = partial(_shuffle, site, 1000 * seed + layer)
            hooks.append((name, _hook_function(shuffle, positions, heads, f"{site} shuffled")))
        else:
            even = f"{site} at {to:g}" if site == "increments" else f"positions in steps of {to:g}"
            hooks.append((name, _hook_function(partial(_constant, site, to), positions, heads, even)))
    return hooks


def scale(
    model: TransformerBridge,
    factor: float,
    layers: LayerIndices = None,
    positions: TokenSelection = None,
    heads: HeadIndices = None,
    *,
    site: Site = "increments",
    head_kind: HeadKind = "query",
) -> Hooks:
    """Multiply increments, or positions, by a factor other than 1; arguments, returns and errors as `ablate`.

    >>> increments = model.increments("The cat")[0]
    >>> with model.hooks(fwd_hooks=lp.scale(model, 2.0, layers=0)):
    ...     torch.equal(model.increments("The cat")[0], 2 * increments)
    True
    """
    factor = finite_number(factor, "factor")
    if factor == 1:
        raise PositionsError(
            "factor is 1, which changes nothing; expected another (a run without hooks is the baseline)."
        )
    hook, heads = _of_heads(model, site, heads, head_kind)
    edit = _hook_function(partial(_multiply, factor), positions, heads, f"{site} times {factor:g}")
    return [(name, edit) for _, name in hook_names(model, layers, hook)]


def add_gap(
    model: TransformerBridge,
    before: int | slice | Condition,
    by: float = 1.0,
    layers: LayerIndices = None,
    heads: HeadIndices = None,
    *,
    site: Site = "increments",
    head_kind: HeadKind = "query",
) -> Hooks:
    """Lengthen the gap between token `before - 1` and token `before` by so many positions, other than 0.

    With gap "after" the increment that is edited is that of token `before - 1`; the tokens that move are the same.
    Other arguments, returns and errors as `ablate`.

    Args:
        model: a bridge with position streams.
        before: a token of the prompt after the first; or a slice or a function as `positions` takes them, for the gap
            before each of many tokens, those that a generation adds among them. A function is refused with gap "after",
            where the increment to edit is past when the token comes.
        by: positions to add.
        layers, heads, site: see above.

    >>> before = model.positions("The cat")[0]
    >>> with model.hooks(fwd_hooks=lp.add_gap(model, before=5, by=2.0, layers=0)):
    ...     after = model.positions("The cat")[0]
    >>> (after - before).round(decimals=3)
    tensor([[0., 0., 0., 0., 0., 2., 2., 2.]])
    >>> spaces = lp.add_gap(model, before=lambda ids: ids == ord(" "), by=1.0)  # before every space, as it comes
    >>> model.run_with_hooks("The cat", fwd_hooks=spaces).shape
    torch.Size([1, 8, 257])
    """
    by = finite_number(by, "by", "a finite number of positions")
    if by == 0:
        raise PositionsError("by is 0, which changes nothing; expected another (a run without hooks is the baseline).")

    # A position belongs to its token; an increment to the gap before or after it, by the model's convention.
    tokens, last = _gaps(model, before, site)
    hook, heads = _of_heads(model, site, heads, head_kind)
    what = "the gap" if site == "increments" else "the position"
    words = f"{what} {_with_sign(by)} before {_chosen_words(before)}"
    edit = EditHook(partial(_lengthen, by, last), tokens, _heads_of(heads), words)
    return [(name, edit) for _, name in hook_names(model, layers, hook)]


def _gaps(model: TransformerBridge, before: Any, site: str) -> "tuple[Chosen, int | None]":
    """The tokens that are edited for some gaps, and the one that the prompt must have; None: none."""
    shift = edited_token(model, 1) - 1 if site == "increments" else 0
    if isinstance(before, slice):
        _check_slice(before, "before")
        if shift:
            # The same slice a token earlier; there is nothing before token 0.
            stop = None if before.stop is None else before.stop - 1
            return slice(max((before.start or 1) - 1, 0), stop, before.step), None
        return before, None
    if _is_condition(before):
        if shift:
            raise PositionsError(
                'before is a function and this model has gap "after", where the increment before a token is fixed '
                "before that token is known; expected the index of a token or a slice."
            )
        return before, None
    index = index_of(before, "before", "the index of a token after the first, from 1, a slice or a function", least=1)
    return [index + shift], index


def freeze(
    cache: ActivationCache,
    layers: LayerIndices = None,
    positions: TokenSelection = None,
    heads: HeadIndices = None,
    *,
    site: Site = "increments",
    head_kind: HeadKind = "query",
) -> Hooks:
    """Hold increments at the values that a cache recorded, so that other edits cannot flow through them.

    Args:
        cache: from `run_with_cache` on an input of as many tokens; a batch of one serves every row.
        layers: None is every layer that the cache has.
        positions, heads, site, head_kind: see above.

    Returns:
        (hook name, hook function) pairs, one a layer.

    Raises:
        PositionsError: the cache has no such hooks; when run, an input of another length, batch or number of heads.

    >>> _, cache = model.run_with_cache("The cat")
    >>> with model.hooks(fwd_hooks=lp.freeze(cache)):  # of another text, at the increments of this one
    ...     held = model.increments("The dog")
    >>> torch.equal(held[3], cache["increments", 3, "attn"])
    True
    """
    found, heads = _cached_values(cache, site, layers, heads, head_kind)
    return [
        (name, _hook_function(partial(_put_recorded, values, None, None), positions, heads, f"{site} held as recorded"))
        for name, values in found
    ]


def patch(
    cache: ActivationCache,
    layers: LayerIndices = None,
    source: TokenIndices = None,
    target: TokenIndices = None,
    heads: HeadIndices = None,
    *,
    site: Site = "increments",
    head_kind: HeadKind = "query",
) -> Hooks:
    """Put in increments that were recorded on another input.

    Args:
        cache: from `run_with_cache` on the other input; a batch of one serves every row.
        layers: None is every layer that the cache has.
        source, target: the map between the inputs: the value of token `source[i]` there goes to token `target[i]`
            here. Without it every token gets that of the same index, and both inputs must be equally long.
        heads, site, head_kind: see above.

    Returns:
        (hook name, hook function) pairs, one a layer.

    Raises:
        PositionsError: the cache has no such hooks, the map does not fit, or the increments are those of a static
            model, all 1.0; when run, as `freeze`.

    >>> _, cache = model.run_with_cache("The cat")
    >>> with model.hooks(fwd_hooks=lp.patch(cache, layers=0, source=4, target=1)):  # that of the space, for "T"
    ...     model.increments("The cat")[0].round(decimals=1)
    tensor([[3.8000, 2.1000, 1.1000, 1.1000, 2.1000, 1.4000, 1.1000, 1.2000]])
    """
    if (source is None) != (target is None):
        given, missing = ("source", "target") if target is None else ("target", "source")
        raise PositionsError(f"{given} was given without {missing}; expected both, token by token.")
    here, there = (None if tokens is None else indices_of(tokens, "a token") for tokens in (target, source))
    if here is not None and there is not None and (len(here) != len(there) or len(set(here)) < len(here)):
        raise PositionsError(
            f"the map goes from {len(there)} tokens to {len(set(here))} different ones; expected as many of each, and "
            "each target once."
        )
    hooks: Hooks = []
    found, heads = _cached_values(cache, site, layers, heads, head_kind)

    # Whether all that is put in is the 1.0 that a static model has everywhere.
    plain = site == "increments" and is_static(cache.model)
    for name, values in found:
        if there is not None and max(there, default=0) >= values.shape[1]:
            raise PositionsError(
                f"source has token {max(there)}; expected tokens below {values.shape[1]}, the length of the recorded "
                "input."
            )
        edit = partial(_put_recorded, values, there, here)
        hooks.append((name, _hook_function(edit, here, heads, f"{site} of another input put in")))
        plain = plain and bool((values if there is None else values[:, there]).eq(1).all())
    if plain:
        raise PositionsError(
            "the cache is of a static model, whose increments are all 1.0, so that patching changes nothing; expected "
            "that of a model with learned increments, or ablate(model, to=1.0) to put 1.0 into such a model."
        )
    return hooks


def streams_of(model: Any) -> PositionStreams:
    """The streams of a bridge.

    Raises:
        PositionsError: it is none, or has none.
    """
    if not isinstance(model, TransformerBridge):
        raise PositionsError(
            f"the model is a {type(model).__name__}; expected a HookedPositionTransformer, or a TransformerBridge with "
            "position streams (hook points are a bridge's)."
        )
    streams = getattr(base_model(model), "position_streams", None)
    if streams is None:
        raise PositionsError("the bridge has no position streams; expected attach_positions(bridge) first.")
    return streams


def is_static(model: Any) -> bool:
    """Whether a model is a bridge whose streams give increments of 1.0 to every token."""
    streams = getattr(base_model(model), "position_streams", None) if isinstance(model, TransformerBridge) else None
    return isinstance(streams, PositionStreams) and streams.config.source == "static"


def edited_token(model: TransformerBridge, before: int) -> int:
    """The token whose increment is the gap before another one."""
    return before if streams_of(model).config.gap == "before" else before - 1


def values_of_gaps(values: Float[Tensor, "*axes"], gap: str, dim: int = -1) -> Float[Tensor, "*axes"]:
    """Values of increments, in the order of their tokens along `dim`, as values of the gap before each token."""
    if gap == "before":
        return values

    # The increment of token t - 1 is the gap before token t; no gap is before the first.
    first, others = values.narrow(dim, 0, 1), values.narrow(dim, 0, values.shape[dim] - 1)
    return torch.cat([torch.zeros_like(first), others], dim=dim)


def hook_names(model: TransformerBridge, layers: LayerIndices, hook: str) -> list[tuple[int, str]]:
    """The number of each of some layers and its hook of a name within the block, in the model's order.

    Raises:
        PositionsError: no streams, or a layer that has none.
    """
    every: list[Any] = list(streams_of(model).layers)
    known = [stream.layer for stream in every]
    wanted = known if layers is None else indices_of(layers, "a layer")
    for layer in wanted:
        if layer not in known:
            raise PositionsError(f"layer {layer} has no positions of its own; expected some of {_short(known)}.")
    blocks = [(s.layer, s.hook_increments.name.removesuffix(HOOK.format("increments"))) for s in every]
    return [(layer, block + hook) for layer, block in blocks if layer in wanted]


def _cached_values(
    cache: ActivationCache, site: str, layers: LayerIndices, heads: HeadIndices, kind: HeadKind
) -> tuple[list[tuple[str, Float[Tensor, "batch pos *head"]]], HeadIndices]:
    """The hook and the recorded values of each layer, and the heads of that hook."""
    suffix = "." + _hook_at(site)
    if not isinstance(cache, ActivationCache):
        raise PositionsError(f"the cache is a {type(cache).__name__}; expected the one that run_with_cache returns.")
    found: dict[int, list[str]] = {}
    for name in cache:
        if name.endswith(suffix):
            # "blocks.3.attn.hook_increments": the number is third from the end. A looped model has several of one
            # number.
            found.setdefault(int(name.split(".")[-3]), []).append(name)
    wanted = list(found) if layers is None else indices_of(layers, "a layer")
    missing = [layer for layer in wanted if layer not in found]
    if missing or not wanted:
        which = f"blocks.{missing[0] if missing else 0}{suffix}"
        raise PositionsError(
            f"the cache has no {which}; expected one from run_with_cache of a model with position streams, whose "
            "names_filter lets it through."
        )
    values = [(name, cache[name].detach()) for layer in dict.fromkeys(wanted) for name in found[layer]]

    # A cache from which the batch axis was taken is one row.
    values = [(name, value if cache.has_batch_dim else value[None]) for name, value in values]
    hook, heads = _of_heads(cast(Any, cache.model), site, heads, kind)
    if hook != _hook_at(site):
        count = streams_of(cache.model).n_query
        values = [(name.removesuffix(suffix) + "." + hook, of_query_heads(value, count)) for name, value in values]
    return values, heads


def _hook_at(site: str) -> str:
    if site not in ("increments", "positions"):
        raise PositionsError(f'site is {site!r}; expected "increments" or "positions".')
    return HOOK.format(site)


def _of_heads(model: TransformerBridge, site: str, heads: HeadIndices, kind: HeadKind) -> tuple[str, list[int] | None]:
    """The hook within a block that has some heads, and their places in it."""
    hook = _hook_at(site)
    streams = streams_of(model)
    if kind not in ("query", "key_value"):
        raise PositionsError(f'head_kind is {kind!r}; expected "query" or "key_value".')
    if heads is None:
        return hook, None

    count = streams.n_query if kind == "query" else streams.n_key_value
    chosen = indices_of(heads, "a head")
    _check_heads(chosen, count, kind)

    # Where a source gives these heads their own increments, those are edited.
    if streams.config.per_head and count == streams.n_key_value:
        return hook, chosen
    return HEAD_HOOK.format(site), query_heads(with_query_heads(model), chosen, kind)


def with_query_heads(model: TransformerBridge) -> PositionStreams:
    """The streams of a bridge whose query heads can have rotations of their own.

    Raises:
        PositionsError: they cannot, or it has no streams.
    """
    streams = streams_of(model)
    streams.try_query_heads(base_model(model))
    streams.refuse_query_heads()
    return streams


def query_heads(streams: PositionStreams, heads: list[int], kind: HeadKind) -> list[int]:
    """The query heads that some heads are: themselves, or those that share the keys of some key-value heads."""
    each = 1 if kind == "query" else streams.n_query // streams.n_key_value
    return [each * head + i for head in heads for i in range(each)]


def _check_heads(heads: list[int], count: int, kind: HeadKind) -> None:
    wrong = [head for head in heads if head >= count]
    if wrong:
        which = "query" if kind == "query" else "key-value"
        raise PositionsError(f"there is no head {wrong[0]}; expected {which} heads from 0 to {count - 1}.")


def indices_of(given: Any, what: str) -> list[int]:
    """One index or several as a list of Python's own numbers.

    Raises:
        PositionsError: none, or something that is no whole number from 0.
    """
    # A string and a tensor of one number are iterable, and mean one index.
    several = isinstance(given, Iterable) and not (isinstance(given, str | Tensor) and getattr(given, "ndim", 0) == 0)
    indices = [
        index_of(i, None, f"whole numbers from 0, each the index of {what}") for i in (given if several else [given])
    ]
    if not indices:
        raise PositionsError(f"an empty list was given; expected the index of {what}, or None for all.")
    return indices


def index_of(given: Any, name: str | None, expected: str, least: int = 0, most: int | None = None) -> int:
    """A whole number as Python's own.

    Raises:
        PositionsError: it is none, too small or too large.
    """
    try:
        index = operator.index(given)
    except TypeError:
        # What is no whole number is refused like one that is too small.
        index = least - 1
    if index < least or isinstance(given, bool) or (most is not None and index > most):
        raise PositionsError(f"{name or 'an index'} is {given!r}; expected {expected}.")
    return index


def finite_number(given: Any, name: str, expected: str = "a finite number") -> float:
    """A number as Python's own.

    Raises:
        PositionsError: it is none, or not finite.
    """
    if isinstance(given, bool) or not isinstance(given, Real) or not math.isfinite(given):
        raise PositionsError(f"{name} is {given!r}; expected {expected}.")
    return float(given)


def _short(numbers: list[int]) -> str:
    """0 to 29, or 0, 2, 5."""
    if len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


Chosen = list[int] | slice | Tensor | Condition | None
"""Tokens as they were chosen, checked."""


@dataclass(eq=False)
class EditHook:
    """A hook function that makes an edit at some tokens and heads, and can say so.

    Attributes:
        edit: what is made of the values, see `Edit`.
        positions: the tokens.
        heads: None: all.
        words: what it does, without where.
    """

    edit: Edit
    positions: Chosen
    heads: list[int] | None
    words: str

    def __post_init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, values: Float[Tensor, "batch pos *head"], hook: Any) -> Float[Tensor, "batch pos *head"]:
        """The values with the change made."""
        tokens: HookedTokens = hook.ctx["tokens"]
        if _is_condition(self.positions):
            chosen = self._where_true(tokens)
        else:
            chosen = _chosen_tokens(cast(Any, self.positions), tokens, *values.shape[:2])
        chosen = chosen.to(values.device)

        edited = self.edit(values, chosen, tokens)

        # An edit may compute every value; here only those that were chosen are taken.
        where = _in_shape_of(chosen, values)
        if self.heads is not None:
            of_heads = torch.zeros(values.shape[2], dtype=torch.bool, device=values.device)
            of_heads[self.heads] = True
            where = where & of_heads
        return torch.where(where, edited, values)

    def _where_true(self, tokens: HookedTokens) -> Bool[Tensor, "#batch pos"]:
        """The tokens of this pass for which the condition holds; asked once a pass for all layers."""
        sequence, last = tokens.sequence, self._last
        if sequence is None:
            raise PositionsError(
                "positions is a function of token ids and this pass does not know them all; expected ids rather than "
                "embeddings, and a key-value cache that was filled with the streams attached."
            )
        if last is None or last[0] is not sequence:
            last = self._last = (
                sequence,
                _holds_in_rows(cast(Condition, self.positions), sequence, tokens.real_so_far()),
            )
        return tokens.real() & last[1][:, tokens.past :].to(tokens.ids.device)


def describe(hooks: Hooks) -> str:
    """What some hooks do, in a sentence without its end; empty where there are none.

    Functions of your own are named, with the hook points that they are at.

    >>> lp.describe(lp.scale(model, 2.0, layers=[0, 3]) + lp.add_gap(model, before=5))
    'increments times 2 in layers 0 and 3; the gap +1 before token 5 in layers 0 to 5'
    """
    layers: dict[str, list[int]] = {}
    for name, function in hooks:
        # Edits of the same words in several layers are said once, with the layers.
        if isinstance(function, EditHook):
            said = function.words
            if function.positions is not None and " before " not in said:
                said += f" at {_chosen_words(function.positions)}"
            if function.heads is not None:
                said += f", {_numbers_in_words('head', function.heads)}"
            layers.setdefault(said, []).append(int(name.split(".")[-3]))
        else:
            # Behind a partial stands the function that has a name.
            function = getattr(function, "func", function)
            called = getattr(function, "__name__", type(function).__name__)
            layers.setdefault(f"the function {called} at {name}", [])
    return "; ".join(
        f"{said} in {_numbers_in_words('layer', where)}" if where else said for said, where in layers.items()
    )


def _numbers_in_words(what: str, numbers: list[int]) -> str:
    numbers = sorted(set(numbers))
    if len(numbers) == 1:
        return f"{what} {numbers[0]}"
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{what}s {numbers[0]} to {numbers[-1]}"
    return f"{what}s {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _chosen_words(positions: Any) -> str:
    """Which tokens, in words."""
    if isinstance(positions, slice):
        end = "on" if positions.stop is None else f"to {positions.stop - 1}"
        step = "" if positions.step in (None, 1) else f" in steps of {positions.step}"
        return f"every token from {positions.start or 0} {end}{step}"
    if isinstance(positions, Tensor):
        return f"{int(positions.sum())} tokens of a mask"
    if _is_condition(positions):
        called = getattr(positions, "__name__", type(positions).__name__)
        return "the tokens that a function chooses" if called == "<lambda>" else f"the tokens that {called} chooses"
    numbers = positions if isinstance(positions, list) else [positions]
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return _numbers_in_words("token", numbers[:8]) + more


def _with_sign(by: float) -> str:
    return f"{by:+g}"


def _is_condition(positions: Any) -> bool:
    return callable(positions) and not isinstance(positions, Tensor)


def _check_slice(chosen: slice, name: str) -> None:
    """Refuse a slice that counts from an end which a generation moves."""
    for end, least in ((chosen.start, 0), (chosen.stop, 1), (chosen.step, 1)):
        if end is not None:
            expected = "a slice of whole numbers from 0, as the end of a text moves while it is generated"
            index_of(end, f"an end of the slice {name}", expected, least=least)


def _heads_of(heads: HeadIndices) -> list[int] | None:
    return None if heads is None else indices_of(heads, "a head")


def _hook_function(edit: Edit, positions: TokenSelection, heads: HeadIndices, words: str) -> EditHook:
    """A hook function that makes an edit at some tokens and heads."""
    chosen: Chosen
    if isinstance(positions, Tensor):
        if positions.dtype != torch.bool or positions.ndim not in (1, 2):
            raise PositionsError(
                f"positions has shape {tuple(positions.shape)} and dtype {positions.dtype}; expected a boolean mask "
                "[pos] or [batch pos], or a list of indices."
            )
        chosen = positions
    elif isinstance(positions, slice):
        _check_slice(positions, "positions")
        chosen = positions
    elif positions is None or _is_condition(positions):
        chosen = cast(Any, positions)
    else:
        chosen = indices_of(positions, "a token")
    return EditHook(edit, chosen, _heads_of(heads), words)


def _holds_in_rows(
    condition: Condition, sequence: Int[Tensor, "batch total"], real: Bool[Tensor, "#batch total"] | None
) -> Bool[Tensor, "batch total"]:
    """Where a condition holds; a row with padding is asked about without it, as it would be alone."""
    if real is None or bool(real.all()):
        return _holds(condition, sequence)
    mask = torch.zeros_like(sequence, dtype=torch.bool)
    for row, of_row in enumerate(real.to(sequence.device).expand(sequence.shape)):
        if bool(of_row.any()):
            mask[row, of_row] = _holds(condition, sequence[row : row + 1, of_row])[0]
    return mask


def _holds(condition: Condition, sequence: Int[Tensor, "batch total"]) -> Bool[Tensor, "batch total"]:
    """Where a condition holds.

    Raises:
        PositionsError: it does not return booleans of that shape, or chooses by what follows a token. The latter is
            found by asking again without the last token; as every pass asks, no generation can be misled.
    """
    mask = condition(sequence)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != sequence.shape:
        given = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise PositionsError(
            f"the function of tokens returned {given} for ids of shape {tuple(sequence.shape)}; expected booleans of "
            "that shape."
        )
    if sequence.shape[1] > 1 and not torch.equal(condition(sequence[:, :-1]), mask[:, :-1]):
        raise PositionsError(
            f"the function of tokens chooses others among the first {sequence.shape[1] - 1} once a token follows them; "
            "expected one that depends on a token and those before it alone, as later ones are not there yet."
        )
    return mask


def _chosen_tokens(
    positions: list[int] | slice | Tensor | None, tokens: HookedTokens, batch: int, length: int
) -> Bool[Tensor, "#batch pos"]:
    """Which real tokens of this pass are meant."""
    real = tokens.real()
    if positions is None:
        return real
    if isinstance(positions, Tensor):
        mask = positions.reshape(-1, positions.shape[-1])
        if tokens.past == 0 and mask.shape[1] != length:
            raise PositionsError(
                f"the mask of tokens has length {mask.shape[1]}; expected {length}, the length of the input."
            )
        if len(mask) not in (1, batch):
            raise PositionsError(f"the mask of tokens has {len(mask)} rows; expected one, or {batch} as the input.")

        # A mask of the prompt says nothing of tokens that are generated: they are not chosen.
        mask = mask[:, tokens.past : tokens.past + length].to(real.device)
        return real & torch.nn.functional.pad(mask, (0, length - mask.shape[1]))
    numbers = _token_numbers(tokens, length)
    if isinstance(positions, slice):
        start, step = positions.start or 0, positions.step or 1
        chosen = (numbers >= start) & ((numbers - start) % step == 0)
        return real & (chosen if positions.stop is None else chosen & (numbers < positions.stop))

    _refuse_missing(max(positions), 0, tokens, length)
    return real & torch.isin(numbers, torch.tensor(positions, device=numbers.device))


def _token_numbers(tokens: HookedTokens, length: int) -> Int[Tensor, "#batch pos"]:
    """The number of each token of this pass in its own text, from 0.

    Padding has no number of its own, so that an index means the same token whatever stands beside its text in a batch.
    """
    total, device = tokens.past + length, tokens.ids.device
    real = tokens.real_so_far()
    if real is None:
        return torch.arange(tokens.past, total, device=device)[None]
    return (real.to(device).cumsum(1) - 1)[:, tokens.past : total]


def _refuse_missing(token: int, first: int, tokens: HookedTokens, length: int) -> None:
    """Refuse a token that one of the texts does not have, of those from `first` on that may be chosen.

    With a cache, indices before this pass were edited, and refused, in their own.
    """
    if tokens.past:
        return
    last = int(_token_numbers(tokens, length)[:, -1].min())
    if token > last:
        raise PositionsError(f"there is no token {token}; expected tokens from {first} to {last}.")


def _in_shape_of(mask: Tensor, values: Tensor) -> Tensor:
    """A mask or numbers [batch pos] in the shape of values, which may have heads."""
    return (mask if values.ndim == 2 else mask[..., None]).expand(values.shape)


def _constant(site: str, number: float, values: Tensor, _chosen: Tensor, tokens: HookedTokens) -> Tensor:
    if site == "increments":
        return torch.full_like(values, number)

    # Position ids and not a count: padding in front has none of its own.
    return _in_shape_of(number * tokens.ids.to(values), values)


class _Mean:
    """Every increment its row's mean; positions on a ruler of equal steps. New tokens of a cache take the prompt's."""

    def __init__(self, site: str) -> None:
        self.site = site
        self.of_prompt: tuple[Tensor, ...] | None = None

    def __call__(self, values: Tensor, chosen: Tensor, tokens: HookedTokens) -> Tensor:
        # A new prompt, or a batch of another size, starts anew.
        if tokens.past == 0 or self.of_prompt is None or len(self.of_prompt[0]) != len(values):
            counted = chosen & tokens.between()
            of_prompt = _mean(values, counted) if self.site == "increments" else _line(values, tokens)
            self.of_prompt = tuple(numbers.detach() for numbers in of_prompt)
            start, step = of_prompt
        else:
            start, step = self.of_prompt
        return (start + step * _in_shape_of(tokens.ids.to(values), values)).to(values.dtype)


def _mean(values: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each row, and no step; the first value where nothing is counted."""
    # A sum with weights, as rows have different numbers of real tokens.
    weights = _in_shape_of(counted, values).to(torch.promote_types(values.dtype, torch.float32))
    total = weights.sum(1, keepdim=True)
    mean = (weights * values).sum(1, keepdim=True) / total.clamp(min=1)
    return torch.where(total > 0, mean, values[:, :1]), torch.zeros_like(mean)


def _line(values: Tensor, tokens: HookedTokens) -> tuple[Tensor, Tensor]:
    """Start and step of the ruler from the first to the last real token of each row."""
    real, ids = _in_shape_of(tokens.real(), values), _in_shape_of(tokens.ids.to(values), values)

    # argmax of 0s and 1s is the first 1; the last real token is the one with the largest id.
    first, last = real.to(torch.uint8).argmax(1, keepdim=True), ids.where(real, -1).argmax(1, keepdim=True)
    (p_0, p_1), (i_0, i_1) = ((x.gather(1, first), x.gather(1, last)) for x in (values, ids))

    # A row of one real token has no step; its ruler is a point.
    step = (p_1 - p_0) / (i_1 - i_0).clamp(min=1)
    return p_0 - step * i_0, step


def _shuffle(site: str, seed: int, values: Tensor, chosen: Tensor, tokens: HookedTokens) -> Tensor:
    # On the CPU, where the generator is: a seed gives the same order on every device.
    counted = (chosen & tokens.between() if site == "increments" else chosen).expand(values.shape[:2]).cpu()
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(values.shape[1]).repeat(len(counted), 1)
    for row, (mask, real) in enumerate(zip(counted, tokens.real().expand(values.shape[:2]).cpu(), strict=True)):
        # One draw for each token from the first real one to the last, so that padding changes no draw.
        places, span = mask.nonzero().flatten(), real.nonzero().flatten()
        if len(span):
            draw = torch.rand(int(span[-1] - span[0]) + 1, generator=generator)
            order[row, places] = places[draw[places - span[0]].argsort()]
    return values.gather(1, _in_shape_of(order.to(values.device), values))


def _multiply(factor: float, values: Tensor, _chosen: Tensor, _tokens: HookedTokens) -> Tensor:
    return factor * values


def _lengthen(by: float, before: int | None, values: Tensor, _chosen: Tensor, tokens: HookedTokens) -> Tensor:
    if before is not None:
        _refuse_missing(before, 1, tokens, values.shape[1])
    return values + by


def _put_recorded(
    recorded: Tensor,
    source: list[int] | None,
    target: list[int] | None,
    values: Tensor,
    _chosen: Tensor,
    tokens: HookedTokens,
) -> Tensor:
    """Recorded values in the places of this pass; tokens that none was recorded for keep their own."""
    past, length = tokens.past, values.shape[1]
    if recorded.shape[2:] != values.shape[2:] or len(recorded) not in (1, len(values)):
        raise PositionsError(
            f"the recorded values have shape {tuple(recorded.shape)} and the input's {tuple(values.shape)}; expected "
            "the same batch (or one row) and heads."
        )
    if source is None and past == 0 and recorded.shape[1] != length:
        raise PositionsError(
            f"the recorded input has {recorded.shape[1]} tokens and this one {length}; expected equally many, or "
            "patch(..., source=, target=) with a map of tokens."
        )

    # Without a map every recorded token goes to its own index.
    there = source if source is not None else list(range(recorded.shape[1]))
    here = target if target is not None else there

    # Tokens of earlier passes were served then; those that come later are served when they come.
    pairs = [(s, t - past) for s, t in zip(there, here, strict=True) if 0 <= t - past < length]
    result = values.clone()
    if pairs:
        sources, targets = zip(*pairs, strict=True)
        result[:, list(targets)] = recorded[:, list(sources)].to(values)
    return result
