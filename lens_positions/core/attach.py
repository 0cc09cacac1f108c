"""Attach position streams to a model, and take them off again.

Every RoPE model of transformers computes (cos, sin) once and hands it to each attention module as the keyword
`position_embeddings`; TransformerLens' attention bridges stand in the same places and take the same keyword. So
forward hooks are enough, in a bare model and in a bridge alike:

    model, stack      note the tokens, the mask and the cache of this forward pass (`forward_pass.py`)
    embedding         compute a shared source's increments
    rotary module     note the model's own position ids, cos and sin
    decoder layer     note what a per-layer source reads
    attention         replace `position_embeddings` by the stream's

Where these modules are, and the few models that do it in another way, is in `find_attention.py`; positions of single
heads are in `per_head.py`.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from ..errors import PositionsError
from .devices import device_of, floating_dtype
from .find_attention import AttentionModule, RotaryAttention, links_to, parameters
from .head_trial import refuse_inexact_heads
from .increments import PositionConfig, build_sources
from .model_wrappers import base_model, unwrap_model
from .position_streams import PositionStreams, refuse_attached
from .stream import PositionStream
from .transformer_lens_internals import hook_registry, scan_hook_points

STREAM_HOOKS = (
    "hook_increments",
    "hook_positions",
    "hook_head_increments",
    "hook_head_positions",
    "hook_rotation",
)
"""The hook points of a stream, in the order in which they run."""


def attach_positions(
    model: Any,
    positions: Literal["static"] | PositionConfig = "static",
    *,
    table: Float[Tensor, "vocab *head"] | None = None,
) -> PositionStreams:
    """Make the increments and positions of every rotary layer of a model activations of their own.

    A fresh source gives increments of exactly 1.0, so the model computes what it computed before, to the bit. In a
    bridge the hook points are `blocks.{l}.attn.hook_increments`, `hook_positions` and `hook_rotation`, the first two
    again for each query head (`hook_head_increments`, `hook_head_positions`: [batch pos head]), and `hook_increments`
    at the root for a shared or frozen source. Layers without RoPE have none; a forward pass over three tokens, in eval
    mode, shows which those are (hooks that are registered already run then). Outside a bridge, a hook that edits
    embeddings or the residual stream is seen by a source if it was registered before attaching; a bridge's always is.

    Args:
        model: a `transformers` causal language model with rotary positions, or a TransformerBridge on one. A pipeline
            or a compiled model is the one inside.
        positions: "static", or a PositionConfig.
        table: increments by token id, for a frozen source.

    Returns:
        The streams; `detach()` takes them off.

    Raises:
        PositionsError: the model has no rotary attention that can be reached, has streams already, or per-head
            increments would not be exact in it, or a wrapper holds copies or pieces of its weights. The model is
            untouched then.

    Graphs that torch.compile made before are dropped, and it guards hooks from here on (`_drop_graphs`).

    >>> tokens = torch.arange(8)[None]
    >>> before = llama(tokens).logits
    >>> streams = lp.attach_positions(llama, lp.PositionConfig("per_layer"))
    >>> torch.equal(llama(tokens).logits, before)
    True
    >>> streams.detach()
    """
    config = PositionConfig(source="static") if positions == "static" else positions
    if not isinstance(config, PositionConfig):
        raise PositionsError(f'positions is {positions!r}; expected "static" or a PositionConfig.')

    # Everything is checked before anything of the model is changed.
    model = unwrap_model(model)
    bridge = model if isinstance(model, TransformerBridge) else None
    base = base_model(model)
    refuse_attached(base)
    rotary_attention = RotaryAttention(base)
    streams = _build(config, base, rotary_attention, table)

    try:
        _hook(streams, base, rotary_attention)
        if bridge is not None:
            _add_hook_points(bridge, streams, rotary_attention)
    except BaseException:
        streams.detach()
        raise

    _drop_graphs()
    return streams


def _build(
    config: PositionConfig, base: Any, rotary_attention: RotaryAttention, table: Tensor | None
) -> PositionStreams:
    """Build streams for the layers that rotate, each source where what it reads is; the model stays as it is."""
    own = _with_stream(rotary_attention)
    # In a model of images and text, the sizes of its decoder.
    text = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config

    # Heads that share keys rotate alike: one position for each key-value head.
    n_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    embedding = base.get_input_embeddings()
    if config.per_head:
        refuse_inexact_heads(base, rotary_attention.modules, n_heads, text.num_attention_heads)
    sources = build_sources(
        config,
        n_layers=len(own),
        d_model=text.hidden_size,
        n_heads=n_heads,
        vocab=embedding.weight.shape[0],
        dtype=torch.float64 if floating_dtype(base) == torch.float64 else torch.float32,
        table=table,
    )

    # A model may be on several devices.
    places = [attention.layer for attention in own] if config.source == "per_layer" else [embedding]
    for source, place in zip(sources, places, strict=False):
        source.to(device_of(place, base))

    # The streams know the model's own numbers of layers, which hook names have; their own places count streams.
    streams = PositionStreams(
        config, sources, [attention.number for attention in own], n_heads, text.num_attention_heads
    )
    streams._attentions = rotary_attention.modules
    return streams


def _with_stream(rotary_attention: RotaryAttention) -> list[AttentionModule]:
    """The attention modules that have a stream: those that follow no other."""
    return [attention for attention in rotary_attention.modules if attention.leader is None]


def _hook(streams: PositionStreams, base: Any, rotary_attention: RotaryAttention) -> None:
    """Make streams part of a model's forward pass; `streams.detach` undoes what was done, also half of it."""
    for handle in _hook_handles(streams, base, rotary_attention):
        streams._undo.append(handle.remove)

    # Part of the model, so that weights train, move and are saved with it.
    base.add_module("position_streams", streams)
    streams._undo.append(partial(_remove_module, base, "position_streams"))


def _hook_handles(streams: PositionStreams, base: Any, rotary_attention: RotaryAttention) -> Iterator[Any]:
    """Register all hooks, one after another: those of the model, of each layer, and of layers that follow others."""
    yield from _hook_model(streams, base, rotary_attention)
    for i, attention in enumerate(_with_stream(rotary_attention)):
        yield from _hook_layer(streams, i, attention)

    for attention in rotary_attention.modules:
        # After the hooks of its leader, whose positions it takes.
        if attention.leader is not None:
            yield from attention.hook(partial(streams._follow, attention.leader))
            cast(PositionStream, streams.layers[attention.leader]).has_followers = True
        yield attention.wrapper.register_forward_hook(streams._leave_attention, always_call=True)


def _hook_model(streams: PositionStreams, base: Any, rotary_attention: RotaryAttention) -> Iterator[Any]:
    """Hook the model, its decoder, its embeddings and its rotary modules."""
    own, embedding = _with_stream(rotary_attention), base.get_input_embeddings()
    hooked = [embedding] if streams.config.source == "shared" else []

    # An adapter that takes the place of one of these is refused at the next pass.
    links = links_to(base, hooked)
    yield base.register_forward_pre_hook(partial(streams._begin, parameters(base), links), with_kwargs=True)
    yield base.register_forward_hook(streams._end, always_call=True)

    # Layers and attention are checked only where streams did not run: a pass may leave layers out.
    layers = [attention.layer for attention in rotary_attention.modules]
    start = partial(streams._start, layers, rotary_attention.wrapper(layers[0]), parameters(rotary_attention.stack))
    compiled = [
        module
        for attention in rotary_attention.modules
        for module in (attention.layer, attention.wrapper, attention.module)
    ]
    links = links_to(
        base, [module for attention in own for module in (attention.layer, attention.module, attention.wrapper)]
    )
    yield rotary_attention.stack.register_forward_pre_hook(start, with_kwargs=True)
    yield rotary_attention.stack.register_forward_hook(partial(streams._finish, compiled, links), always_call=True)

    yield embedding.register_forward_hook(streams._note_embeddings)
    for rotary in rotary_attention.rotary:
        yield rotary.register_forward_hook(streams._note_rotary, with_kwargs=True)


def _hook_layer(streams: PositionStreams, i: int, attention: AttentionModule) -> Iterator[Any]:
    """Hook a decoder layer and its attention."""
    names = parameters(attention.layer)
    note = partial(streams._note_residual, i, names, "hidden_states" if "hidden_states" in names else names[0])

    # Where no layer is around the attention, the note must be the component's, whose hooks run first.
    layer = attention.wrapper if attention.layer is attention.module else attention.layer
    yield layer.register_forward_pre_hook(note, with_kwargs=True)
    yield attention.wrapper.register_forward_pre_hook(partial(streams._enter_attention, attention), with_kwargs=True)
    yield from attention.hook(partial(streams._rotation_of, i))


def _drop_graphs() -> None:
    """Drop compiled graphs: one from before would run a model without its streams.

    By default torch.compile does not check whether a module has hooks when it takes a graph that it compiled for a
    module of the same class. From here on it does, in this process, and what was compiled before is compiled anew.
    """
    import torch._dynamo

    torch._dynamo.config.skip_nnmodule_hook_guards = False
    torch._dynamo.reset()


def increment_table(model: Any) -> Float[Tensor, "vocab *head"]:
    """Return the increment of every token id, from a shared or frozen source: what a frozen source looks up.

    Args:
        model: a transformers model or a bridge with streams attached.

    Raises:
        PositionsError: its increments are no function of the token alone.
    """
    base = base_model(model)
    streams: PositionStreams = base.position_streams
    if streams.shared_source is None:
        raise PositionsError(
            f"the source is {streams.config.source!r}, whose increments are no function of the token; expected a model "
            "with a shared or frozen source."
        )
    embedding = base.get_input_embeddings()
    ids = torch.arange(embedding.weight.shape[0], device=embedding.weight.device)[None]
    with torch.no_grad():
        return streams.shared_source(ids if streams.config.source == "frozen" else embedding(ids))[0]


def _remove_module(owner: nn.Module, name: str) -> None:
    del owner._modules[name]


def _add_hook_points(bridge: Any, streams: PositionStreams, rotary_attention: RotaryAttention) -> None:
    """Put the streams' hook points into a bridge, under the names that `attach_positions` promises."""
    added: list[tuple[nn.Module, str]] = []
    if streams.shared_source is not None:
        bridge.add_module("hook_increments", streams.hook_increments)
        added.append((bridge, "hook_increments"))

    for stream, attention in zip(streams.layers, _with_stream(rotary_attention), strict=True):
        component = attention.wrapper
        if component is attention.module:  # inside a block that the bridge leaves whole
            block = rotary_attention.component_around(attention)
            component = nn.Module()
            block._modules["attn"] = component
            added.append((block, "attn"))
        for name in STREAM_HOOKS:
            component.add_module(name, getattr(stream, name))
            added.append((component, name))

    # The registry is built when a bridge is made: hook points that came later are not in it.
    scan_hook_points(bridge)
    streams._undo.append(partial(_remove_hook_points, bridge, added))


def _remove_hook_points(bridge: Any, added: list[tuple[nn.Module, str]]) -> None:
    """Take hook points out of a bridge, and their names out of its registry."""
    # By identity: a bridge may name one hook point in several ways.
    hooks = {id(owner._modules.pop(name)) for owner, name in added}
    known = hook_registry(bridge)
    for name in [name for name, hook in known.items() if id(hook) in hooks]:
        del known[name]
