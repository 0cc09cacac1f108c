"""Edits as hooks, as a sentence, and as lines of Python that do the same.

The three must say one thing: `engine.py` runs the hooks, a person reads the sentence, and the lines are run elsewhere.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache

from ...errors import PositionsError
from ...interventions import Hooks, ablate, add_gap, edited_token, freeze, patch
from ...model import HookedPositionTransformer
from .state import EditSpec

Recorded = Callable[[str], ActivationCache]
"""From another text to a cache of its increments."""

WHOLE_ROWS = ("freeze", "ablate")
"""Kinds that edit every gap of a layer."""


def hooks_of(
    model: HookedPositionTransformer,
    edits: Sequence[EditSpec],
    own: Float[Tensor, "layer pos *head"],
    recorded: Recorded,
) -> Hooks:
    """Edits as hooks for one pass over their text.

    Args:
        model: the model.
        edits: in the order in which they act.
        own: the model's own increments on the text.
        recorded: gives the caches of other texts.

    Raises:
        PositionsError: no such token or layer, or an edit that changes nothing.
    """
    hooks: Hooks = []
    for number, edit in enumerate(edits, 1):
        check_edit(model, edit, own.shape[1], f"edit {number}")
        hooks += _hooks(model, edit, own, recorded)
    return hooks


def check_edit(model: HookedPositionTransformer, edit: EditSpec, length: int, name: str) -> None:
    """Refuse an edit at a token or a layer that there is not.

    Raises:
        PositionsError: there is none.
    """
    if edit.token is not None and edit.token >= length:
        raise PositionsError(f"{name} is at token {edit.token}; expected tokens from 1 to {length - 1} of this text.")
    for layer in edit.layers or ():
        if layer not in model.position_layers:
            raise PositionsError(f"{name} is at layer {layer}; expected some of {model.position_layers}.")


def means_of(model: HookedPositionTransformer, own: Float[Tensor, "layer pos *head"]) -> Float[Tensor, " layer"]:
    """The mean gap between two tokens of a text, at each layer; of one token alone, its increment."""
    between = own if own.shape[1] < 2 else own[:, 1:] if model.position_config.gap == "before" else own[:, :-1]
    return between.flatten(1).mean(1)


def _hooks(
    model: HookedPositionTransformer, edit: EditSpec, own: Float[Tensor, "layer pos *head"], recorded: Recorded
) -> Hooks:
    layers = list(edit.layers or model.position_layers)
    if edit.kind == "ablate":
        return ablate(model, edit.to, layers)  # type: ignore[arg-type]
    if edit.kind == "freeze":
        return freeze(recorded(str(edit.text)), layers)

    token = edit.token or 0
    here = edited_token(model, token)
    if edit.kind == "gap":
        return add_gap(model, token, float(edit.by or 0), layers)
    if edit.kind == "set":
        return ablate(model, float(edit.to or 0), layers, here)
    if edit.kind == "like":
        there = edited_token(model, edit.source or 0)
        return patch(recorded(str(edit.text)), layers, there, here)

    # To the mean of each layer, which is another number at each.
    means = means_of(model, own)
    return [
        hook
        for layer in layers
        for hook in ablate(model, float(means[model.position_layers.index(layer)]), layer, here)
    ]


def in_words(model: HookedPositionTransformer, edit: EditSpec, labels: Sequence[str]) -> str:
    """What an edit does, in a sentence."""
    where = _where(edit)
    if edit.kind == "freeze":
        return f"{where}: every gap held at what “{_short(str(edit.text))}” has there"
    if edit.kind == "ablate":
        named = {"mean": "the layer's mean", "shuffle": "that of another token (shuffled)"}
        to = named[edit.to] if isinstance(edit.to, str) else f"{edit.to:g}"
        return f"{where}: every gap becomes {to}"

    token = edit.token or 0
    gap = f"{where}: the gap before “{labels[token]}” (token {token})"
    if edit.kind == "gap":
        by = float(edit.by or 0)
        return f"{gap} is {abs(by):.4g} {'longer' if by > 0 else 'shorter'}"
    if edit.kind == "set":
        return f"{gap} becomes {edit.to:.4g}"
    if edit.kind == "mean":
        return f"{gap} becomes the layer's mean"
    return f"{gap} becomes the gap before token {edit.source} of “{_short(str(edit.text))}”"


def as_python(model: HookedPositionTransformer, text: str, edits: Sequence[EditSpec], token: int) -> str:
    """Lines of Python that do the same with `run_with_hooks`, and read the prediction after a token."""
    lines = [
        "import lens_positions as lp",
        "",
        f"model = lp.HookedPositionTransformer.from_pretrained({model.name!r})",
        f"text = {text!r}",
        "hooks = []",
    ]
    if any(edit.kind == "mean" for edit in edits):
        between = "1:" if model.position_config.gap == "before" else ":-1"
        lines.append(f"means = model.increments(text)[:, 0, {between}].flatten(1).mean(1)")
    for edit in edits:
        lines += _python(model, edit)
    return "\n".join(
        [
            *lines,
            "logits = model.run_with_hooks(text, fwd_hooks=hooks)",
            f"log_probabilities = logits[0, {token}].detach().log_softmax(-1)  # of the token after token {token}",
            "",
        ]
    )


def _python(model: HookedPositionTransformer, edit: EditSpec) -> list[str]:
    layers = list(edit.layers or model.position_layers)
    token = edit.token or 0
    here = edited_token(model, token) if token else 0
    if edit.kind == "ablate":
        return [f"hooks += lp.ablate(model, to={edit.to!r}, layers={layers})"]
    if edit.kind == "gap":
        return [f"hooks += lp.add_gap(model, before={token}, by={edit.by!r}, layers={layers})"]
    if edit.kind == "set":
        return [f"hooks += lp.ablate(model, to={edit.to!r}, layers={layers}, positions={here})"]
    if edit.kind == "mean":
        return [
            f"hooks += lp.ablate(model, to=float(means[{model.position_layers.index(layer)}]), layers={layer}, "
            f"positions={here})"
            for layer in layers
        ]
    cached = f"_, cache = model.run_with_cache({edit.text!r})"
    if edit.kind == "freeze":
        return [cached, f"hooks += lp.freeze(cache, layers={layers})"]
    there = edited_token(model, edit.source or 0)
    return [cached, f"hooks += lp.patch(cache, layers={layers}, source={there}, target={here})"]


def first_change(model: HookedPositionTransformer, edits: Sequence[EditSpec]) -> tuple[int, int]:
    """The first layer, and the first token, that edits reach: nothing before either of them can change.

    Returns:
        The model's own number of the layer, and the token.
    """
    known = model.position_layers
    layers = [known.index(layer) for edit in edits for layer in edit.layers or known]
    tokens = [0 if edit.kind in WHOLE_ROWS else edited_token(model, edit.token or 1) for edit in edits]
    return known[min(layers)], min(tokens)


def increments_of(model: HookedPositionTransformer, text: str) -> ActivationCache:
    """A cache of the increments of a text."""
    with torch.no_grad():
        _, cache = model.run_with_cache(
            model.to_tokens(text),
            names_filter=[stream.hook_increments.name for stream in model.position_streams.layers],  # type: ignore
            return_type=None,
        )
    return cache


def _where(edit: EditSpec) -> str:
    if edit.layers is None:
        return "All layers"
    numbers = list(edit.layers)
    if len(numbers) == 1:
        return f"Layer {numbers[0]}"
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"Layers {numbers[0]} to {numbers[-1]}"
    return f"Layers {', '.join(map(str, numbers))}"


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}…"
