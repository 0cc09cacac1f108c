"""Where does absolute position come from, in a model whose rotation knows only distances?

Ruscio et al., "Where does Absolute Position come from in decoder-only Transformers?" (arXiv 2606.06160). On an input
whose content repeats, a query and a key at a fixed distance are the same tokens again and again, at other absolute
positions. The log of their attention is split exactly:

    log pattern[i, j] = score[i, j] - log Z[i]

The score varies over repeats only if the residual stream differs (the residual part); log Z, the sum over all keys that
the causal mask leaves, grows with their number (the mask part). With deviations from the mean over repeats,

    total = residual + mask - 2 covariance

Token 0 attends to itself alone, so its states say which token is first, and whatever reads them is told where it
starts: heads that attend to it are sinks (`attention_sinks`), and `replace_first` takes that token's embedding away.
`hooks` are any interventions, active throughout: with `lp.ablate(model, site="positions")` every position is one step
after the last, whatever was learned, so that the rotation can leak nothing.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from ..attach import unbridged
from ..errors import PositionsError
from ..hooked import HookedPositionTransformer
from ..interventions import Hooks, Some, hook_names, index_of
from ..progress import tracked
from ..tokenizer import END_OF_DOCUMENT, is_byte_tokenizer
from .intervals import Tally, interval_of, resamples
from .reading import WINDOW, windows
from .running import EARLIEST, attention_names, keep, run

BLOCK = 16
"""Tokens that repeat."""

OFFSETS = 8
"""Distances that are looked at: 0 (the token itself) to 7."""

ROWS_A_BATCH = 8

PARTS = ("residual", "mask", "covariance")

Replacement = Literal["token", "mean", "zeros", "noise"]
REPLACEMENTS: tuple[Replacement, ...] = ("token", "mean", "zeros", "noise")


def repeated(
    model: HookedPositionTransformer, texts: Sequence[str], block: int = BLOCK, length: int | None = None
) -> Int[Tensor, "text pos"]:
    """The first tokens of each text, repeated; in front the token that texts begin with in this model.

    Args:
        model: the model; a byte model's texts begin after an end of document.
        texts: each with as many tokens as a block at least.
        block: tokens that repeat.
        length: tokens at most, the one in front included; None is the model's context, at most 512.

    Raises:
        PositionsError: no texts, one that is shorter than a block, or no room for three repeats.
    """
    block = index_of(block, "block", "a whole number of tokens from 1", least=1)
    room = min(model.cfg.n_ctx, WINDOW) if length is None else index_of(length, "length", "a number of tokens", least=1)
    repeats = (room - 1) // block
    if repeats < 3:
        raise PositionsError(
            f"{room} tokens have room for {repeats} repeats of {block}; expected at least 3, to see absolute positions."
        )
    if isinstance(texts, str) or not len(texts):
        raise PositionsError(f"texts is {texts!r:.40}; expected a list of texts.")
    first = first_token(model)
    rows = []
    for number, text in enumerate(texts):
        tokens = model.to_tokens(text, truncate=False, prepend_bos=False)[0]
        if len(tokens) < block + (first is None):
            raise PositionsError(
                f"text {number} has {len(tokens)} tokens; expected at least {block + (first is None)}, a block."
            )
        front = tokens[:1] if first is None else tokens.new_tensor([first])
        own = tokens[1:] if first is None else tokens
        rows.append(torch.cat([front, own[:block].repeat(repeats)]))
    return torch.stack(rows)


def first_token(model: HookedPositionTransformer) -> int | None:
    """The token that texts begin with: an end of document in a byte model, else the tokenizer's, if it has one."""
    if getattr(model, "tokenizer", None) is None:
        raise PositionsError("the model has no tokenizer; expected one, to read texts.")
    return END_OF_DOCUMENT if is_byte_tokenizer(model.tokenizer) else model.tokenizer.bos_token_id


def absolute_variation(
    model: HookedPositionTransformer,
    texts: Sequence[str],
    layers: Some = None,
    hooks: Hooks | None = None,
    block: int = BLOCK,
    offsets: int = OFFSETS,
    length: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """How much the log attention at a fixed distance varies with absolute position, and through what.

    Args:
        model: the model.
        texts: the source of repeated content, a document each.
        layers: the model's own layer numbers; None is all that rotate.
        hooks: interventions to measure under, such as those of `replace_first`.
        block, length: as for `repeated`.
        offsets: distances that are looked at, from 0; at most a block.
        seed: of the bootstrap.

    Returns:
        One row for each `layer`, `head` and `repeat` (1 the second one, which is the first whose keys are all repeats):
        `position`, that of its first query, `n` (pairs of query and key), `documents`, and the mean squared deviation
        from the mean over repeats of the score, `residual`, and of log Z, `mask`, with their mean product,
        `covariance`, and `total`, that of the log attention; all in nats squared, each with `_low` and `_high`, where
        it lies in 95% of 1,000 resamples of texts (NaN for one text).

    Raises:
        PositionsError: as `repeated`; no attention scores, or patterns that are not their softmax.
    """
    rows, sums, counts = _deviations(model, texts, layers, hooks, block, offsets, length)
    draws = resamples(len(rows), seed)
    repeats = (rows.shape[1] - 1) // block
    table = []
    for layer, of_layer in sums.items():  # [text head repeat part]
        parts = np.concatenate([of_layer, (of_layer @ [1, 1, -2])[..., None]], axis=-1)
        mean, low, high = _over_texts(parts / counts, draws)
        for head in range(parts.shape[1]):
            for repeat in range(1, repeats):
                row: dict[str, Any] = {"layer": layer, "head": head, "repeat": repeat, "position": 1 + repeat * block}
                row |= {"n": len(rows) * counts, "documents": len(rows)}
                for i, part in enumerate((*PARTS, "total")):
                    at = head, repeat - 1, i
                    row |= {part: mean[at], f"{part}_low": low[at], f"{part}_high": high[at]}
                table.append(row)
    return pd.DataFrame(table)


def replacement_effects(
    model: HookedPositionTransformer,
    texts: Sequence[str],
    replacements: Sequence[Replacement] = REPLACEMENTS,
    layers: Some = None,
    hooks: Hooks | None = None,
    block: int = BLOCK,
    offsets: int = OFFSETS,
    length: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """How much of the residual part goes when the embedding at position 0 is replaced, at early and late queries.

    Ruscio et al. report 40% at early queries. Early are the first quarter of the repeats, late the last.

    Args, errors: as `absolute_variation` and `replace_first`.

    Returns:
        One row for each `replacement`, `layer` ("all" or its number) and `queries` ("early", "late"): `documents`,
        `before` and `after`, the residual part without and with it (nats squared, mean over heads), and `drop`, one
        minus their ratio, with `low` to `high`, where it lies in 95% of 1,000 resamples of texts (NaN for one).
    """
    rows, own, counts = _deviations(model, texts, layers, hooks, block, offsets, length)
    draws = resamples(len(rows), seed)
    quarter = max(1, ((rows.shape[1] - 1) // block - 1) // 4)
    table = []
    for replacement in replacements:
        replaced = [*(hooks or []), *replace_first(model, replacement, seed)]
        _, other, _ = _deviations(model, texts, layers, replaced, block, offsets, length)
        numbers: list[int | str] = ["all", *own]
        for layer in numbers:
            pairs = [
                np.stack([values[n][..., 0].mean(1) for n in own if layer in ("all", n)]).mean(0) / counts
                for values in (own, other)
            ]
            for queries, where in (("early", slice(None, quarter)), ("late", slice(-quarter, None))):
                before, after = (values[:, where].mean(1) for values in pairs)
                low = high = math.nan
                if len(rows) > 1:
                    ends = interval_of((1 - draws @ after / np.maximum(draws @ before, 1e-30))[:, None])
                    low, high = (float(end[0]) for end in ends)
                row: dict[str, Any] = {"replacement": replacement, "layer": layer, "queries": queries}
                row |= {"documents": len(rows), "before": before.mean(), "after": after.mean()}
                gone = 1 - after.sum() / before.sum() if before.sum() > 1e-12 else math.nan
                table.append(row | {"drop": gone, "low": low, "high": high})
    return pd.DataFrame(table)


def _over_texts(values: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over texts, and its interval."""
    mean = values.mean(0)
    if len(values) < 2:
        return mean, np.full_like(mean, math.nan), np.full_like(mean, math.nan)
    return mean, *interval_of(np.tensordot(draws, values, axes=1) / len(values))


def _deviations(
    model: HookedPositionTransformer,
    texts: Sequence[str],
    layers: Some,
    hooks: Hooks | None,
    block: int,
    offsets: int,
    length: int | None,
) -> tuple[Int[Tensor, "text pos"], dict[int, np.ndarray], int]:
    """By layer, sums over pairs of the three products of deviations, [text head repeat part]; how many pairs."""
    offsets = index_of(offsets, "offsets", f"a whole number from 1 to {block}, a block", least=1, most=block)
    rows = repeated(model, texts, block, length)
    names = attention_names(model, layers, "attn_scores")
    found: dict[int, list[np.ndarray]] = {layer: [] for layer in names}

    def collect(layer: int, scores: Float[Tensor, "batch head query key"], hook: HookPoint) -> None:
        normaliser = scores.detach().double().logsumexp(-1)
        queries = torch.arange(1 + block, rows.shape[1], device=scores.device)
        keys = queries[:, None] - torch.arange(offsets, device=scores.device)
        pairs = scores.detach().double()[..., queries[:, None], keys]  # [batch head query offset]
        parts = [
            values.unflatten(2, (-1, block)) for values in (pairs, normaliser[..., queries, None].expand_as(pairs))
        ]
        score, mask = (values - values.mean(2, keepdim=True) for values in parts)
        products = torch.stack([score * score, mask * mask, score * mask], dim=-1)
        found[layer].append(products.sum((3, 4)).cpu().numpy())

    for batch in tracked(rows.split(ROWS_A_BATCH), "absolute position", quick=rows.numel() < 512):
        listen = [(name, partial(collect, layer)) for layer, name in names.items()]
        run(model, batch, [*(hooks or []), *_softmax_checks(model, names), *listen])
    return rows, {layer: np.concatenate(sums) for layer, sums in found.items()}, block * offsets


def _softmax_checks(model: TransformerBridge, names: dict[int, str]) -> Hooks:
    """Hooks that refuse patterns which are not the softmax of the scores that are read."""
    hooks: Hooks = []
    for layer, name in names.items():
        seen: list[Tensor] = []

        def note(scores: Tensor, hook: HookPoint, seen: list[Tensor] = seen) -> None:
            seen[:] = [scores[:, :, -1].detach()]

        def check(pattern: Tensor, hook: HookPoint, seen: list[Tensor] = seen, layer: int = layer) -> None:
            if (seen[0].float().softmax(-1) - pattern[:, :, -1].detach().float()).abs().max() > 1e-2:
                raise PositionsError(
                    f"the patterns of layer {layer} are not the softmax of its scores (it may have a sink of its own); "
                    "expected plain attention."
                )

        hooks += [(name, note), (name.replace("hook_attn_scores", "hook_pattern"), check)]
    return hooks


def replace_first(model: TransformerBridge, how: Replacement, seed: int = 0) -> Hooks:
    """Replace the embedding of the token at position 0, before everything else.

    Args:
        model: a bridge.
        how: "token" (another token's, drawn), "mean" (of all tokens), "zeros", or "noise" (Gaussian, as long as it).
        seed: of the token and of the noise.

    Returns:
        (hook name, hook function) pairs, as `lp.ablate` returns them. An input of one token is left as it is: with a
        key-value cache it is a new one.

    Raises:
        PositionsError: another `how`, or no embeddings in TransformerLens.
    """
    if how not in REPLACEMENTS:
        raise PositionsError(f"how is {how!r}; expected one of {', '.join(REPLACEMENTS)}.")
    seed = index_of(seed, "seed", "a whole number from 0")
    name = "embed.hook_out"
    if name not in model.hook_dict:
        raise PositionsError(f"the model has no {name}; expected one whose embeddings TransformerLens shows.")
    embedding = unbridged(model).get_input_embeddings()
    embedding = getattr(embedding, "original_component", embedding)  # without its hooks
    ids = torch.arange(embedding.weight.shape[0], device=embedding.weight.device)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        value = {
            "token": lambda: embedding(ids[torch.randint(len(ids), (1,), generator=generator)])[0],
            "mean": lambda: embedding(ids).mean(0),
            "zeros": lambda: torch.zeros_like(embedding(ids[:1])[0]),
            "noise": lambda: torch.randn(embedding.weight.shape[1], generator=generator),
        }[how]()
    return [(name, partial(_replaced, value, how == "noise"))]


def _replaced(
    value: Float[Tensor, " d_model"], as_long: bool, embeddings: Float[Tensor, "batch pos d_model"], hook: HookPoint
) -> Float[Tensor, "batch pos d_model"]:
    if embeddings.shape[1] == 1:
        return embeddings
    given = value.to(embeddings)
    if as_long:
        given = given / given.norm() * embeddings[:, 0].norm(dim=-1, keepdim=True)
    changed = embeddings.clone()
    changed[:, 0] = given
    return changed


def attention_sinks(
    model: HookedPositionTransformer,
    texts: Sequence[str],
    layers: Some = None,
    hooks: Hooks | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """The share of attention that goes to position 0, by head, on texts as they are.

    Returns:
        One row for each `layer` and `head`: `n` (queries from the 17th token on), `documents`, `share` and `low` to
        `high`, where it lies in 95% of 1,000 resamples of documents (NaN for one).

    Raises:
        PositionsError: attention without patterns, texts without a window of 17 tokens, and as `reading.read`.
    """
    documents, batches = windows(model, texts)
    batches = [batch for batch in batches if batch[0][1] == 0 and batch[0][2] > EARLIEST]
    if not batches:
        raise PositionsError(f"no text has {EARLIEST + 1} tokens; expected at least one, to see a sink from afar.")
    names = attention_names(model, layers, "pattern")
    tallies = {layer: Tally(len(documents)) for layer in names}

    def tally(layer: int, owners: list[int], pattern: Float[Tensor, "batch head query key"], hook: HookPoint) -> None:
        tallies[layer].add(owners, pattern[:, :, EARLIEST:, 0].detach().float().transpose(1, 2))

    for batch in tracked(batches, "sinks", quick=sum(map(len, documents)) < 512):
        rows = torch.stack([documents[number][start:stop] for number, start, stop in batch])
        owners = [number for number, _, _ in batch]
        listen: Hooks = [(name, partial(tally, layer, owners)) for layer, name in names.items()]
        run(model, rows, [*(hooks or []), *listen])
    draws = resamples(len(documents), seed)
    table = []
    for layer, tally_of in tallies.items():
        for head, (share, low, high) in enumerate(zip(*tally_of.summary(draws), strict=True)):
            row = {"layer": layer, "head": head, "n": int(tally_of.counts.sum()), "documents": len(documents)}
            table.append(row | {"share": share, "low": low, "high": high})
    return pd.DataFrame(table)


def fingerprints(model: HookedPositionTransformer, texts: Sequence[str], layers: Some = None) -> pd.DataFrame:
    """How alike the states at position 0 are across texts, with a common first token and with the texts' own.

    A causal model's state at position 0 is a function of its token alone: with a common one it is the same in every
    text, and with the texts' own it says which token that is.

    Returns:
        One row for each `layer` and `first` ("common", "own"): `n` pairs of texts, and the mean cosine of the residual
        streams that enter the layer there, as `first_token`, and at the 17th token, as `later`; each with `_low` and
        `_high`, where it lies in 95% of 1,000 resamples of texts (pairs of a text with itself left out).

    Raises:
        PositionsError: fewer than two texts, or one of fewer than 17 tokens.
    """
    if isinstance(texts, str) or len(texts) < 2:
        raise PositionsError(f"texts is {texts!r:.40}; expected at least two texts, to compare them.")
    names = dict(hook_names(model, layers, "hook_resid_pre"))
    own = [model.to_tokens(text, truncate=False, prepend_bos=False)[0, : EARLIEST + 1] for text in texts]
    if short := [number for number, tokens in enumerate(own) if len(tokens) <= EARLIEST]:
        raise PositionsError(f"text {short[0]} has {len(own[short[0]])} tokens; expected at least {EARLIEST + 1}.")
    rows = torch.stack(own)
    common = first_token(model)
    front = rows[:1, :1] if common is None else torch.tensor([[common]])
    draws = resamples(len(rows), 0)
    table = []
    for first, tokens in (("common", torch.cat([front.expand(len(rows), 1), rows[:, :-1]], dim=1)), ("own", rows)):
        seen: dict[int, Tensor] = {}
        run(model, tokens, [(name, partial(keep, seen, layer)) for layer, name in names.items()])
        for layer, states in seen.items():
            row: dict[str, Any] = {"layer": layer, "first": first, "n": len(rows) * (len(rows) - 1) // 2}
            for column, place in (("first_token", 0), ("later", EARLIEST)):
                unit = torch.nn.functional.normalize(states[:, place].double(), dim=-1)
                cosines = (unit @ unit.T).fill_diagonal_(0).cpu().numpy()
                others = 1 - np.eye(len(rows))
                drawn = ((draws @ cosines) * draws).sum(1) / ((draws @ others) * draws).sum(1)
                low, high = interval_of(drawn[:, None])
                mean = cosines.sum() / others.sum()
                row |= {column: mean, f"{column}_low": float(low[0]), f"{column}_high": float(high[0])}
            table.append(row)
    return pd.DataFrame(table)
