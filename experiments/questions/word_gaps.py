"""Question 3: what a longer or shorter gap does before a true word beginning, and before a matched false one.

Both begin with the same first byte, stand in the same line, and cost the unedited model about the same: the loss of
the first byte and that of the two after it differ by less than half a nat together. Each gap is edited alone, in all
layers. The first byte is predicted before the gap and cannot change; what can is

    character   the loss of the two bytes left of the character after the gap, in nats
    later       the loss of the six bytes after that character, in nats
    across      the share of attention that the character's three bytes pay to what is before the gap, heads and layers
                averaged

A model of other tokens (`token_gap_effects`) is asked the same in a language with spaces: a true beginning is a token
that begins with a space, a false one goes on with a word, both with the same first letter. There `character` is the
loss of the next token, `later` that of the three after it, and `across` is of both tokens.

Direction: with the edit minus without it, so a positive loss is damage. The question is the difference of true and
false beginnings, paired within lines; the effect at both is the positive control, that the edit does something.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from lens_positions.analysis.word_boundaries import Gaps, gaps_of
from lens_positions.errors import PositionsError
from lens_positions.interventions import HOOK, edited_token, hook_names
from lens_positions.measure.attention import attention_names
from lens_positions.measure.metrics import token_losses
from lens_positions.model import HookedPositionTransformer

BY = (0.5, -0.5)
"""Positions that a gap is longer by."""

CALIPER = 0.5
"""Nats within which the losses of a pair agree."""

PAIRS_A_LINE = 2


@dataclass(frozen=True)
class Reach:
    """Which tokens after the one behind an edited gap count.

    Attributes:
        own: those whose loss is that of `character`.
        later: those after them.
    """

    own: int
    later: int

    @property
    def tokens(self) -> int:
        """All of them, with the token behind the gap."""
        return 1 + self.own + self.later


BYTES = Reach(2, 6)
"""A Chinese character is three bytes."""

WORD_PIECES = Reach(1, 3)

WINDOW = 96
"""Tokens of a text that are read at a time, where tokens are no bytes."""

OUTCOMES = ("character", "later", "across")

Place = tuple[int, int]
"""A window of a text, and the index of a token in it."""


def gap_effects(model: HookedPositionTransformer, lines: list[str], words: list[list[str]], most: int) -> pd.DataFrame:
    """The effects of longer and shorter gaps at true and false word beginnings.

    Args:
        model: a byte model with position streams.
        lines, words: text, and the words that people found in it.
        most: lines at most.

    Returns:
        A row for each `line` with a pair and each `by`: `pairs`, and for each outcome its mean over the line's pairs at
        true and at false beginnings, as `character_true` and so on; `surprisal_true` and `surprisal_false`, the loss of
        the character, in nats, that was matched.

    Raises:
        PositionsError: no pair matches.
    """
    gaps = gaps_of(model, lines, words)
    rows: list[dict[str, float]] = []
    used: set[int] = set()
    for piece, tokens in enumerate(gaps.tokens):
        own = np.flatnonzero(gaps.piece == piece)
        if not len(own) or int(gaps.line[own[0]]) in used:  # the first piece of a line that has a pair
            continue
        losses = _losses(model, tokens[None])[0]
        pairs = matched_gaps(gaps, own, losses)
        if pairs:
            line = int(gaps.line[own[0]])
            used.add(line)
            places = [(int(gaps.token[true]), int(gaps.token[false])) for true, false in pairs]
            rows += _pair_effects(model, tokens, line, places, losses)
        if len(used) == most:
            break
    if not rows:
        raise PositionsError("no true and false word beginnings of a line match; expected more text.")
    return pd.DataFrame(rows)


def token_gap_effects(model: HookedPositionTransformer, texts: list[str], most: int) -> pd.DataFrame:
    """The effects of longer and shorter gaps at true and false word beginnings, of a model whose tokens are no bytes.

    Words that go on in a second token are few, so that pairs are of one text, and not of one line.

    Args:
        model: a model with position streams, whose tokens begin words with a space.
        texts: in a language with spaces, read in windows of WINDOW tokens.
        most: pairs of each text at most.

    Returns:
        As `gap_effects`, a row for each text with a pair and each `by`; `line` is the number of the text.

    Raises:
        PositionsError: no pair matches.
    """
    rows: list[dict[str, float]] = []
    for number, text in enumerate(texts):
        # By the tokenizer itself, as a text may be longer than the model's context.
        whole = torch.tensor(model.tokenizer.encode(text, add_special_tokens=False))
        prompts = [
            model.to_tokens(model.tokenizer.decode(window))[0]
            for window in whole.split(WINDOW)
            if len(window) == WINDOW
        ]
        losses = [_losses(model, prompt[None])[0] for prompt in prompts]
        tokens = [[str(token) for token in model.to_str_tokens(prompt)] for prompt in prompts]
        pairs = matched_tokens(tokens, losses)[:most]
        if not pairs:
            continue

        # All places of a window run in one batch.
        effects: dict[Place, Float64[np.ndarray, "by outcome"]] = {}
        for window, prompt in enumerate(prompts):
            places = [place for pair in pairs for place in pair if place[0] == window]
            if places:
                at = np.array([token for _, token in places])
                effects |= dict(zip(places, _effects_at(model, prompt, at, WORD_PIECES), strict=True))
        of_kinds = np.array([[effects[place] for place in pair] for pair in pairs]).mean(0)  # kind, by, outcome
        dear = [[_surprisal(losses[i], token, WORD_PIECES).sum() for i, token in pair] for pair in pairs]
        rows += _rows(number, len(pairs), of_kinds.swapaxes(0, 1), np.mean(dear, axis=0))
    if not rows:
        raise PositionsError("no true and false word beginnings of a text match; expected more text.")
    return pd.DataFrame(rows)


def matched_gaps(gaps: Gaps, own: np.ndarray, losses: Float64[np.ndarray, " next"]) -> list[tuple[int, int]]:
    """Pairs of a true and a false word beginning with the same first byte and nearly the same losses, nearest first.

    Args:
        gaps: of all lines.
        own: the gaps of one piece of a line.
        losses: of each token of the piece after the first.
    """
    tokens = gaps.tokens[gaps.piece[own[0]]]
    fits = [gap for gap in own if gaps.token[gap] > 1 and gaps.token[gap] + BYTES.tokens <= len(tokens)]
    candidates = [
        (int(true), int(false))
        for true in fits
        for false in fits
        if gaps.boundary[true] and not gaps.boundary[false] and tokens[gaps.token[true]] == tokens[gaps.token[false]]
    ]
    return _nearest(candidates, lambda gap: _surprisal(losses, gaps.token[gap], BYTES))[:PAIRS_A_LINE]


def matched_tokens(windows: list[list[str]], losses: list[Float64[np.ndarray, " next"]]) -> list[tuple[Place, Place]]:
    """As `matched_gaps`, of the tokens of a text in a language with spaces, each by its window and its index there.

    >>> matched_tokens([["", " a", " bet", "ter", " toy", "s", " is", " mine", " now", "."]], [np.zeros(9)])
    [((0, 4), (0, 3))]
    """
    true: list[Place] = []
    false: list[Place] = []
    for window, tokens in enumerate(windows):
        for i in range(2, len(tokens) - WORD_PIECES.tokens + 1):
            if tokens[i][:1] == " " and tokens[i][1:2].isalpha():
                true.append((window, i))
            elif tokens[i][:1].isalpha() and tokens[i - 1][-1:].isalpha():
                false.append((window, i))

    def letter(place: Place) -> str:
        return windows[place[0]][place[1]].strip()[0].lower()

    candidates = [(i, j) for i in true for j in false if letter(i) == letter(j)]
    return _nearest(candidates, lambda place: _surprisal(losses[place[0]], place[1], WORD_PIECES))


def _nearest(
    candidates: list[tuple[Any, Any]], surprisal: Callable[[Any], Float64[np.ndarray, "2"]]
) -> list[tuple[Any, Any]]:
    """Of pairs of places those whose losses agree within the caliper: the nearest first, and no place twice."""
    found = []
    for true, false in candidates:
        apart = float(np.abs(surprisal(true) - surprisal(false)).sum())
        if apart < CALIPER:
            found.append((apart, true, false))
    chosen: list[tuple[Any, Any]] = []
    taken: set[Any] = set()
    for _, true, false in sorted(found):
        if not taken & {true, false}:
            chosen.append((true, false))
            taken |= {true, false}
    return chosen


def _surprisal(losses: Float64[np.ndarray, " next"], token: int | np.integer, reach: Reach) -> Float64[np.ndarray, "2"]:
    """The loss of the token behind a gap, and of the tokens after it that count as its own."""
    return np.array([losses[token - 1], losses[token : token + reach.own].sum()])


def _pair_effects(
    model: HookedPositionTransformer,
    tokens: Int[Tensor, " pos"],
    line: int,
    pairs: list[tuple[int, int]],
    losses: np.ndarray,
) -> list[dict[str, float]]:
    """Both edits before all tokens of the pairs of a line."""
    places = np.array([place for pair in pairs for place in pair])
    effects = _effects_at(model, tokens, places, BYTES).reshape(len(pairs), 2, len(BY), len(OUTCOMES)).mean(0)
    surprisal = np.array([_surprisal(losses, place, BYTES).sum() for place in places]).reshape(-1, 2).mean(0)
    return _rows(line, len(pairs), effects.swapaxes(0, 1), surprisal)


def _effects_at(
    model: HookedPositionTransformer, tokens: Int[Tensor, " pos"], places: Int64[np.ndarray, " place"], reach: Reach
) -> Float64[np.ndarray, "place by outcome"]:
    """Both edits before some tokens, a row each in one batch, less the same rows without an edit."""
    prompt = tokens[: places.max() + reach.tokens]
    at = torch.from_numpy(np.tile(places, 1 + len(BY)))
    by = torch.tensor((0.0, *BY)).repeat_interleave(len(places))
    outcomes = edited_outcomes(model, prompt, at, by, reach).reshape(1 + len(BY), len(places), len(OUTCOMES))
    return (outcomes[1:] - outcomes[0]).swapaxes(0, 1)


def _rows(
    line: int,
    pairs: int,
    effects: Float64[np.ndarray, "by kind outcome"],
    surprisal: Float64[np.ndarray, " kind"],
) -> list[dict[str, float]]:
    """A row for each edit of a line."""
    found = []
    for number, amount in enumerate(BY):
        row: dict[str, float] = {"line": line, "by": amount, "pairs": pairs}
        for kind, name in enumerate(("true", "false")):
            row |= {f"{outcome}_{name}": float(effects[number, kind, i]) for i, outcome in enumerate(OUTCOMES)}
            row |= {f"surprisal_{name}": float(surprisal[kind])}
        found.append(row)
    return found


def edited_outcomes(
    model: HookedPositionTransformer,
    tokens: Int[Tensor, " pos"],
    at: Int[Tensor, " case"],
    by: Float[Tensor, " case"],
    reach: Reach = BYTES,
) -> Float64[np.ndarray, "case outcome"]:
    """The outcomes of a prompt with the gap before token `at` longer by `by`, in all layers and heads, case by case."""
    patterns = attention_names(model, None, "pattern")
    edited = torch.nonzero(by)[:, 0]
    row = torch.where(by == 0, 0, (by != 0).cumsum(0))  # cases without an edit share row 0
    token = at[edited] - 1 + edited_token(model, 1)  # the token whose increment is that gap
    shares: list[Tensor] = []

    def lengthen(values: Tensor, hook: HookPoint) -> Tensor:
        longer = values.clone()
        own = by[edited] if values.ndim == 2 else by[edited, None]
        longer[1 + torch.arange(len(edited)), token] += own.to(values)
        return longer

    def note(pattern: Tensor, hook: HookPoint) -> None:
        queries = at[:, None] + torch.arange(1 + reach.own)
        of_cases = pattern.detach().mean(1)[row[:, None], queries]  # case, byte of the character, key
        before = torch.arange(pattern.shape[-1]) < at[:, None]
        shares.append((of_cases * before[:, None]).sum(-1).mean(1))

    hooks: list[Any] = [(name, lengthen) for _, name in hook_names(model, None, HOOK.format("increments"))]
    hooks += [(name, note) for name in patterns.values()]
    losses = _losses(model, tokens.expand(1 + len(edited), -1), hooks)[row.numpy()]
    starts = at.numpy()[:, None]
    of_cases = partial(np.take_along_axis, losses, axis=1)
    character = of_cases(starts + np.arange(reach.own)).sum(1)  # the loss of token t is entry t - 1
    later = of_cases(starts + reach.own + np.arange(reach.later)).sum(1)
    return np.stack([character, later, torch.stack(shares).mean(0).double().numpy()], axis=1)


def _losses(
    model: HookedPositionTransformer, rows: Int[Tensor, "row pos"], hooks: list[Any] | None = None
) -> Float64[np.ndarray, "row next"]:
    """The loss of each token after the first, in nats."""
    with torch.no_grad():
        logits = model.run_with_hooks(rows, fwd_hooks=hooks or [], return_type="logits")
    return token_losses(logits, rows[:, 1:]).double().numpy()
