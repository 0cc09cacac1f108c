"""Question 3: what a longer or shorter gap does before a true word beginning, and before a matched false one.

Both begin with the same first byte, stand in the same line, and cost the unedited model about the same: the loss of
the first byte and that of the two after it differ by less than half a nat together. Each gap is edited alone, in all
layers. The first byte is predicted before the gap and cannot change; what can is

    character   the loss of the two bytes left of the character after the gap, in nats
    later       the loss of the six bytes after that character, in nats
    across      the share of attention that the character's three bytes pay to what is before the gap, heads and layers
                averaged

Direction: with the edit minus without it, so a positive loss is damage. The question is the difference of true and
false beginnings, paired within lines; the effect at both is the positive control, that the edit does something.
"""

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64, Int
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
LATER = 6
"""Bytes after the character whose loss is counted too."""

OUTCOMES = ("character", "later", "across")


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
            used.add(int(gaps.line[own[0]]))
            rows += _line_effects(model, tokens, gaps, pairs, losses)
        if len(used) == most:
            break
    if not rows:
        raise PositionsError("no true and false word beginnings of a line match; expected more text.")
    return pd.DataFrame(rows)


def matched_gaps(gaps: Gaps, own: np.ndarray, losses: Float64[np.ndarray, " next"]) -> list[tuple[int, int]]:
    """Pairs of a true and a false word beginning with the same first byte and nearly the same losses, nearest first.

    Args:
        gaps: of all lines.
        own: the gaps of one piece of a line.
        losses: of each token of the piece after the first.
    """
    tokens = gaps.tokens[gaps.piece[own[0]]]
    fits = [gap for gap in own if gaps.token[gap] > 1 and gaps.token[gap] + 3 + LATER <= len(tokens)]
    found = []
    for true in (gap for gap in fits if gaps.boundary[gap]):
        for false in (gap for gap in fits if not gaps.boundary[gap]):
            if tokens[gaps.token[true]] != tokens[gaps.token[false]]:
                continue
            apart = np.abs(_surprisal(losses, gaps.token[true]) - _surprisal(losses, gaps.token[false])).sum()
            if apart < CALIPER:
                found.append((float(apart), int(true), int(false)))
    chosen: list[tuple[int, int]] = []
    for _, true, false in sorted(found):
        taken = {gap for pair in chosen for gap in pair}
        if len(chosen) < PAIRS_A_LINE and not taken & {true, false}:
            chosen.append((true, false))
    return chosen


def _surprisal(losses: Float64[np.ndarray, " next"], token: int | np.integer) -> Float64[np.ndarray, "2"]:
    """The loss of the first byte of a character, at this token, and of the two after it."""
    return np.array([losses[token - 1], losses[token : token + 2].sum()])


def _line_effects(
    model: HookedPositionTransformer,
    tokens: Int[Tensor, " pos"],
    gaps: Gaps,
    pairs: list[tuple[int, int]],
    losses: np.ndarray,
) -> list[dict[str, float]]:
    """Both edits at all gaps of a line's pairs, a row each in one batch, beside the same rows without an edit."""
    places = np.array([gaps.token[gap] for pair in pairs for gap in pair])
    prompt = tokens[: places.max() + 3 + LATER]
    at = torch.from_numpy(np.tile(places, 1 + len(BY)))
    by = torch.tensor((0.0, *BY)).repeat_interleave(len(places))
    outcomes = edited_outcomes(model, prompt, at, by).reshape(1 + len(BY), len(pairs), 2, len(OUTCOMES))
    effects = (outcomes[1:] - outcomes[0]).mean(1)  # by, true or false, outcome
    surprisal = np.array([_surprisal(losses, place).sum() for place in places]).reshape(-1, 2).mean(0)
    found = []
    for number, amount in enumerate(BY):
        row: dict[str, float] = {"line": int(gaps.line[pairs[0][0]]), "by": amount, "pairs": len(pairs)}
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
        queries = at[:, None] + torch.arange(3)
        of_cases = pattern.detach().mean(1)[row[:, None], queries]  # case, byte of the character, key
        before = torch.arange(pattern.shape[-1]) < at[:, None]
        shares.append((of_cases * before[:, None]).sum(-1).mean(1))

    hooks: list[Any] = [(name, lengthen) for _, name in hook_names(model, None, HOOK.format("increments"))]
    hooks += [(name, note) for name in patterns.values()]
    losses = _losses(model, tokens.expand(1 + len(edited), -1), hooks)[row.numpy()]
    starts = at.numpy()[:, None]
    of_cases = partial(np.take_along_axis, losses, axis=1)
    character = of_cases(starts + np.arange(2)).sum(1)  # the loss of token t is entry t - 1
    later = of_cases(starts + 2 + np.arange(LATER)).sum(1)
    return np.stack([character, later, torch.stack(shares).mean(0).double().numpy()], axis=1)


def _losses(
    model: HookedPositionTransformer, rows: Int[Tensor, "row pos"], hooks: list[Any] | None = None
) -> Float64[np.ndarray, "row next"]:
    """The loss of each token after the first, in nats."""
    with torch.no_grad():
        logits = model.run_with_hooks(rows, fwd_hooks=hooks or [], return_type="logits")
    return token_losses(logits, rows[:, 1:]).double().numpy()
