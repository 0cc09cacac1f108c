"""A text as a model places it: what every picture of it is drawn from.

- A unit is what is drawn in one place: a character, or a whole token where a token holds several characters. The
  several bytes (or tokens) of one character are one unit.
- Tokens may be given instead of a text, such as those that a model sampled: a byte that belongs to no valid character
  is then a unit of its own, written as its hexadecimal value.
- What is longer than the context, or than a picture can hold, is cut, and `cut` says where.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from ..causal.sweeps import SITES
from ..core.increments import PositionConfig
from ..core.own_thread import own_hooks
from ..errors import PositionsError
from ..interventions import Hooks, LayerIndices, describe, hook_names, index_of, indices_of
from ..measure.corpus_reader import CorpusIncrements
from ..model import HookedPositionTransformer
from ..text import Mask, TextOrTokens, prompts_of
from ..tokenizer import byte_characters, character_spans, is_byte_tokenizer

MOST_DRAWN = 1024
"""Tokens of a picture: beyond these nobody can read it."""

MOST_ATTENDING = 48
"""Tokens of a picture of attention: its patterns, and the time that circuitsvis takes, grow with their square."""

SOURCES = {
    "static": "static increments: every token stands one step after the last, as in standard RoPE",
    "shared": "one learned increment per token, shared by all layers",
    "per_layer": "each layer learns its own increments from its residual stream",
    "frozen": "increments held fixed, by token",
}


@dataclass(frozen=True)
class TextPositions:
    """A text and what a model makes of it.

    Attributes:
        name: the model's.
        config: where its increments come from.
        layers: the model's own number of each layer that has positions.
        tokens: those of the text, special ones in front included.
        labels: a readable label of each token.
        units: what is drawn in one place.
        sizes: how many characters each unit has.
        first, last: the first and the last token of each unit.
        increments, positions: in steps of standard RoPE; one head where all heads share them.
        patterns: attention from each token to each, where it was asked for and the model shows it.
        whole: characters of the text, those that were cut included.
        limit: why it was cut; empty where it was not.
        edits: what the hooks did that were active, in words; empty where there were none.
    """

    name: str
    config: PositionConfig
    layers: list[int]
    tokens: Int[Tensor, " pos"]
    labels: list[str]
    units: list[str]
    sizes: list[int]
    first: list[int]
    last: list[int]
    increments: Float64[Tensor, "layer pos head"]
    positions: Float64[Tensor, "layer pos head"]
    patterns: Float[Tensor, "layer query_head pos pos"] | None
    whole: int
    limit: str
    edits: str = ""

    def mean_increment(self, entry: int) -> float:
        """The mean step between the tokens of the text at an entry of `layers`; of one token alone, its increment."""
        # Without special tokens in front, whose increments may be of another size.
        steps = self.positions[entry, self.first[0] :].mean(-1).diff()
        return float(steps.mean() if len(steps) else self.increments[entry, self.first[0]].mean())

    def convention(self, heads: str = "mean over heads") -> list[str]:
        """Whose increments these are, and what an increment is, a sentence each."""
        of_heads = f"; {heads}" if self.config.per_head else ""
        said = [f"{self.name} ({SOURCES[self.config.source]}{of_heads})."]
        return (
            said if self.config.source == "static" else [*said, f"An increment is the gap {self.config.gap} its token."]
        )

    def corpus_increments(self) -> CorpusIncrements:
        """The increments of these tokens as those of a corpus of this one document, for what measures corpora.

        Raises:
            PositionsError: a single token, whose increment is no distance between tokens.
        """
        if len(self.tokens) < 2:
            raise PositionsError(f"text 0 has {len(self.tokens)} tokens; expected at least two.")

        # The increment that lies between no two tokens of this text does not count.
        index = np.arange(len(self.tokens))[self.config.effective]
        increments = self.increments.permute(0, 2, 1).numpy()[..., index]
        return CorpusIncrements([self.tokens], np.zeros_like(index), index, self.layers, increments)

    def attention(self) -> Float[Tensor, "layer query_head pos pos"]:
        """The patterns.

        Raises:
            PositionsError: the model shows none.
        """
        if self.patterns is None:
            raise PositionsError(
                f"{self.name} shows no attention patterns (TransformerLens leaves its attention whole); expected a "
                "model with hook_pattern."
            )
        return self.patterns

    def cut(self, units: int | None = None) -> str:
        """What is left out of the text where its first units are shown, in a sentence; empty where nothing is."""
        shown = sum(self.sizes[:units])
        why = f" ({self.limit})" if self.limit and shown == sum(self.sizes) else ""
        return f"The first {shown:,} of {self.whole:,} characters are drawn{why}." if shown < self.whole else ""


def position_text(
    model: HookedPositionTransformer,
    text: TextOrTokens,
    *,
    patterns: bool = False,
    most: int = MOST_DRAWN,
    hooks: Hooks | None = None,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> TextPositions:
    """Run a model on a text, and keep where it puts what.

    Args:
        model: the model.
        text: a text, or the tokens of one as they are, special ones in front included.
        patterns: keep the attention patterns as well.
        most: tokens at most; the context in any case.
        hooks: edits, active while the model runs.
        attention_mask: the real tokens of a padded row; the padding is left out.
        prepend_bos: whether a text gets the beginning-of-sequence token; None is TransformerLens' default.

    Raises:
        PositionsError: an empty text, several texts, a model without a tokenizer, no such tokens, padding without a
            mask, or a first character that alone is too long.
    """
    tokens, given = _one_text(model, text, attention_mask, prepend_bos)
    room = min(model.cfg.n_ctx, index_of(most, "most", "at least one token", least=1))
    units, sizes, spans = _units(model, tokens, given)
    # Cut between units, so that no character is drawn that the model has not read whole.
    kept = sum(stop <= room for _, stop in spans)
    if not kept:
        raise PositionsError(f"the first character takes more than {room} tokens; expected a text that begins in them.")

    limit = f"the model's context is {room:,} tokens" if room == model.cfg.n_ctx else f"they are {room:,} tokens"
    tokens = tokens[: spans[kept - 1][1]] if kept < len(units) else tokens

    increments, positions, attention = _record(model, tokens, patterns, hooks or [])
    return TextPositions(
        name=model.name,
        config=model.position_config,
        layers=model.position_layers,
        tokens=tokens.cpu(),
        labels=list(model.to_str_tokens(tokens)),
        units=units[:kept],
        sizes=sizes[:kept],
        first=[start for start, _ in spans[:kept]],
        last=[stop - 1 for _, stop in spans[:kept]],
        increments=increments,
        positions=positions,
        patterns=attention,
        whole=sum(sizes),
        limit=limit if kept < len(units) else "",
        edits=describe(hooks or []),
    )


def _one_text(
    model: HookedPositionTransformer, text: TextOrTokens, attention_mask: Mask, prepend_bos: bool | None
) -> tuple[Int[Tensor, " pos"], str | None]:
    """The tokens of the one text that was given, and the text itself where it was given as one."""
    if getattr(model, "tokenizer", None) is None:
        raise PositionsError("the model has no tokenizer; expected one, to tell what its tokens are.")
    prompts = prompts_of(model, text, attention_mask, prepend_bos, whole=True)
    if len(prompts) != 1:
        raise PositionsError(f"{len(prompts)} texts were given; expected one text, or its token ids [pos].")

    # A list of one text counts as that text.
    (given,) = [text] if isinstance(text, str | Tensor) else text
    return prompts[0], given if isinstance(given, str) else None


def _record(
    model: HookedPositionTransformer, tokens: Int[Tensor, " pos"], patterns: bool, edits: Hooks
) -> tuple[
    Float64[Tensor, "layer pos head"],
    Float64[Tensor, "layer pos head"],
    Float[Tensor, "layer query_head pos pos"] | None,
]:
    """Increments and positions after edits; attention patterns where they are wanted and every layer shows them."""
    wanted = ["increments", "positions", *(["pattern"] if patterns else [])]
    sites = {site: [name for _, name in hook_names(model, None, SITES[site][0])] for site in wanted}
    names = [name for of_site in sites.values() for name in of_site if name in model.hook_dict]

    # Edits come before the recording, which is added last.
    with torch.no_grad(), own_hooks(model, edits):
        _, cache = model.run_with_cache(tokens[None], names_filter=names, return_type=None)

    increments, positions = (
        torch.stack([cache[name][0] for name in sites[site]]).detach().cpu().double()
        for site in ("increments", "positions")
    )
    # One increment for all heads has no axis of heads: an axis of one is what all that draws expects.
    if increments.ndim == 2:
        increments, positions = increments[..., None], positions[..., None]
    if not patterns or not all(name in cache for name in sites["pattern"]):
        return increments, positions, None
    return increments, positions, torch.stack([cache[name][0].float().cpu() for name in sites["pattern"]])


def before_and_after(
    model: HookedPositionTransformer, text: TextOrTokens, hooks: Hooks | None, **how: Any
) -> tuple[TextPositions, TextPositions | None]:
    """A text as the model places it, and as it does with edits, where there are some.

    Args:
        model, text: as for `position_text`.
        hooks: the edits; None or an empty list: there are none.
        how: further arguments of `position_text`.
    """
    if hooks is not None and not isinstance(hooks, list):
        raise PositionsError(f"hooks is a {type(hooks).__name__}; expected a list, as `ablate` and others return it.")
    return position_text(model, text, **how), position_text(model, text, hooks=hooks, **how) if hooks else None


def rows_to_show(
    model: HookedPositionTransformer,
    layers: LayerIndices,
    before: TextPositions,
    after: TextPositions | None,
    what: str,
) -> list[tuple[int, str, bool]]:
    """The rows of a picture: the entry of the layer, the row's name, and whether it is that after the edits.

    A layer that the edits change has two rows, one below the other. The others keep theirs, as one where they are
    alike.

    Args:
        model, layers: as for `layers_to_show`.
        before, after: the text without and with edits.
        what: "increments" or "positions", whose change counts.
    """
    values: Tensor = getattr(before, what)
    if after is None:
        return [(entry, name, False) for entry, name in layers_to_show(model, layers, values).items()]
    edited: Tensor = getattr(after, what)
    shown = layers_to_show(model, layers, torch.cat([values, edited], dim=-1))
    changed = [entry for entry in shown if not torch.equal(values[entry], edited[entry])]

    # Layers that are the same with and without edits share one row, if they are also like one another.
    rows, same = [], [entry for entry in shown if entry not in changed]
    alike = len(same) > 1 and all(torch.equal(values[entry], values[same[0]]) for entry in same)
    for entry, name in shown.items():
        if entry in changed:
            rows += [(entry, name, False), (entry, f"{name}, edited", True)]
        elif not alike:
            rows.append((entry, name, False))
        elif entry == same[0]:
            rows.append((entry, "other layers" if changed else "all layers", False))
    return rows


def edits_in_words(after: TextPositions | None, rows: list[tuple[int, str, bool]] | None = None) -> list[str]:
    """What a caption says of the edits."""
    if after is None:
        return []
    said = [f"Edits: {after.edits}."]
    if rows is not None and not any(edited for _, _, edited in rows):
        said.append("They change nothing that is drawn here.")
    return said


def layers_to_show(
    model: HookedPositionTransformer, layers: LayerIndices, values: Float[Tensor, "layer ..."]
) -> dict[int, str]:
    """The layers to give a row each, as entries of `values`, with the row's name; one row where all are the same.

    Args:
        model: the model, whose `position_layers` are those of `values`.
        layers: their numbers in the model; None is all of them.
        values: what would be shown of each layer.

    Raises:
        PositionsError: a layer that the model does not have, or that does not rotate.
    """
    numbers = model.position_layers
    wanted = numbers if layers is None else indices_of(layers, "a layer")
    for layer in wanted:
        if layer not in numbers:
            known = f"0 to {len(numbers) - 1}" if numbers == list(range(len(numbers))) else ", ".join(map(str, numbers))
            raise PositionsError(f"layer {layer} was asked for; expected one of the layers {known}.")
    chosen = sorted({numbers.index(layer) for layer in wanted})

    # Static, and shared without edits: every layer would be the same row.
    source = model.position_config.source
    if source != "per_layer" and all(torch.equal(values[entry], values[chosen[0]]) for entry in chosen):
        return {chosen[0]: "static" if source == "static" else "all layers"}
    return {entry: f"layer {numbers[entry]}" for entry in chosen}


def _units(
    model: HookedPositionTransformer, tokens: Int[Tensor, " pos"], text: str | None
) -> tuple[list[str], list[int], list[tuple[int, int]]]:
    """The units of some tokens, how many characters each has, and the range of its tokens; `text` where it is known."""
    tokenizer = model.tokenizer
    if text is not None:
        of_character = character_spans(tokenizer, text)
        own = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        given, special = tokens.tolist(), set(tokenizer.all_special_ids)

        # Special tokens at the beginning are no part of the text; some may stand alone.
        own = len(given) - next((i for i, token in enumerate(given) if token not in special), len(given) - 1)
        ids = given[len(given) - own :]
        text = str(tokenizer.decode(ids))

        # Tokens that a model sampled need not be those that the tokenizer makes of their text: then each is shown by
        # itself.
        if tokenizer(text, add_special_tokens=False)["input_ids"] != ids:
            named = byte_characters(ids) if is_byte_tokenizer(tokenizer) else [(tokenizer.decode([i]), 1) for i in ids]
            stops = list(accumulate((size for _, size in named), initial=len(tokens) - own))
            return [unit for unit, _ in named], [1] * len(named), list(pairwise(stops))
        of_character = character_spans(tokenizer, text)

    before = len(tokens) - own
    starts = [min(start, own - 1) for start, _ in of_character]

    # A unit begins with each character whose first token is another one than that of the character before.
    heads = [i for i, start in enumerate(starts) if i == 0 or start != starts[i - 1]]
    pieces = list(pairwise([*heads, len(text)]))
    spans = [(before + starts[i], before + max(of_character[j - 1][1], starts[i] + 1)) for i, j in pieces]
    return [text[i:j] for i, j in pieces], [j - i for i, j in pieces], spans
