"""Does attention stay sharp when there is more to attend to?

Veličković et al., "softmax is not enough (for sharp out-of-distribution)" (arXiv 2410.01104): with scores that are
bounded every weight of a softmax falls like one over the number of items, so heads that are sharp on short inputs
disperse on long ones. `attention_dispersion` measures it, `adaptive_temperature` is the paper's remedy as an
intervention, and `loss_by_length` asks whether a language model is better for it. The paper's task, to find the largest
of n items, is `lens-positions maximum`.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from ..errors import PositionsError
from ..interventions import HeadIndices, Hooks, LayerIndices, indices_of
from ..measure.attention import attention_names, hidden_keys, hooked_evaluation, run_for_hooks, visible_keys
from ..measure.corpus_reader import Texts, rows_of, windows
from ..measure.intervals import Tally, bootstrap_means, interval_of, resamples
from ..measure.metrics import token_losses
from ..model import HookedPositionTransformer
from ..progress import several_passes, track_progress
from ..text import Mask

COEFFICIENTS = (-0.037, 0.481, -2.3, 4.917, -1.791)
"""Of the inverse temperature as a polynomial in the entropy, the highest power first (Veličković et al., section 5)."""

DISPERSED = 0.5
"""Nats of entropy from which a row is made sharper."""


def sharpen_scores(scores: Float[Tensor, "*rows item"]) -> Float[Tensor, "*rows item"]:
    """Scores times an inverse temperature of at least 1, chosen by the entropy of their softmax.

    beta = max(polynomial(entropy), 1) where the entropy is above 0.5 nats, else 1 (Veličković et al., section 5).
    """
    entropy = attention_entropy(scores.float().softmax(-1))
    # Horner's scheme, the highest power first.
    beta = torch.zeros_like(entropy)
    for coefficient in COEFFICIENTS:
        beta = beta * entropy + coefficient
    beta = beta.clamp(min=1).where(entropy > DISPERSED, 1.0)[..., None].to(scores)
    return scores.where(hidden_keys(scores), scores * beta)  # no factor should push a mask over the edge


def adaptive_temperature(model: TransformerBridge, layers: LayerIndices = None, heads: HeadIndices = None) -> Hooks:
    """Sharper attention without training: every row of scores at the temperature of `sharpen_scores`.

    Args:
        model: a bridge with position streams.
        layers: the model's own layer numbers; None is all that rotate.
        heads: query heads; None is all.

    Returns:
        (hook name, hook function) pairs, one a layer, as `lp.ablate` returns them.

    Raises:
        PositionsError: no such layer or head, or attention whose scores TransformerLens does not show, or whose pattern
            is not their softmax.

    >>> [name for name, _ in lp.analysis.adaptive_temperature(model, layers=[0, 5])]
    ['blocks.0.attn.hook_attn_scores', 'blocks.5.attn.hook_attn_scores']
    """
    chosen = None if heads is None else indices_of(heads, "a head")
    names = attention_names(model, layers, "attn_scores")
    if chosen and max(chosen) >= model.cfg.n_heads:
        raise PositionsError(f"there is no head {max(chosen)}; expected heads from 0 to {model.cfg.n_heads - 1}.")
    return [(name, partial(_sharpen_heads, chosen)) for name in names.values()]


def _sharpen_heads(
    heads: list[int] | None, scores: Float[Tensor, "batch head query key"], hook: HookPoint
) -> Float[Tensor, "batch head query key"]:
    if heads is None:
        return sharpen_scores(scores)

    # Other heads keep their scores.
    changed = scores.clone()
    changed[:, heads] = sharpen_scores(scores[:, heads])
    return changed


def attention_entropy(weights: Float[Tensor, "*rows item"]) -> Float[Tensor, "*rows"]:
    """The entropy of attention weights, in nats."""
    return torch.special.entr(weights).sum(-1)


def attention_dispersion(
    model: HookedPositionTransformer,
    texts: Texts,
    layers: LayerIndices = None,
    hooks: Hooks | None = None,
    seed: int = 0,
    *,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """Entropy and largest weight of every head's attention, by how many items there are.

    Args:
        model: the model.
        texts: documents, as for `increments_by_category`.
        layers: the model's own layer numbers; None is all that rotate.
        hooks: interventions to measure under, such as `adaptive_temperature`.
        seed: of the bootstrap.
        attention_mask, prepend_bos: as for `analysis.read_corpus`.

    Returns:
        One row for each `layer`, `head` ("all" is their mean) and octave of `items`: a query with n tokens up to it,
        itself included, counts for the power of two that n reaches (64: 64 to 127). `n` is queries, of so many
        `documents`; `log_items` the mean of the log of the keys that they see (fewer in a sliding window), the entropy
        of attention that is spread evenly. Octaves that the longest window does not fill are left out. Mean `entropy`
        (nats) and mean `largest` weight have `_low` and `_high`, where they lie in 95% of 1,000 resamples of documents
        (NaN for one).

    Raises:
        PositionsError: attention without patterns, texts of two tokens alone, and as `read_corpus`.

    >>> table = lp.analysis.attention_dispersion(model, texts, layers=0)
    >>> table.loc[table["head"] == "all", ["items", "log_items", "entropy"]].round(1)
        items  log_items  entropy
    0       2        0.9      0.2
    5       4        1.7      0.4
    10      8        2.4      0.6
    15     16        3.1      0.6
    20     32        3.8      0.7
    25     64        4.5      0.7
    """
    documents, batches = windows(model, texts, attention_mask, prepend_bos)
    names = attention_names(model, layers, "pattern")
    longest = max(stop - start for batch in batches for _, start, stop in batch)
    if longest < 3:
        raise PositionsError(f"the longest window has {longest} tokens; expected 3 at least.")
    tallies = _dispersion_by_octave(model, documents, batches, names, longest, hooks or [])
    draws = resamples(len(documents), seed)
    table = []
    for (layer, of), own in tallies.items():
        mean, low, high = own.summary(draws)  # [head column], the mean over heads first
        for head in range(len(mean)):
            row: dict[str, Any] = {"layer": layer, "head": "all" if head == 0 else head - 1, "items": of}
            row |= {"log_items": mean[head, 2]}
            row |= {"n": int(own.counts.sum()), "documents": int((own.counts > 0).sum())}
            for j, column in enumerate(("entropy", "largest")):
                row |= {column: mean[head, j], f"{column}_low": low[head, j], f"{column}_high": high[head, j]}
            table.append(row)
    return pd.DataFrame(table)


def _dispersion_by_octave(
    model: HookedPositionTransformer,
    documents: list[Tensor],
    batches: list[list[tuple[int, int, int]]],
    names: dict[int, str],
    longest: int,
    hooks: Hooks,
) -> dict[tuple[int, int], Tally]:
    """By layer and octave: entropy, largest weight and log of the keys, [head column], the mean over heads first."""
    # Octave i holds the queries with 2**i to 2**(i + 1) - 1 tokens up to them; one that no window fills would be the
    # mean over the few queries that begin it.
    octaves = [2**i for i in range(1, (longest + 1).bit_length() - 1)]
    octave = torch.arange(1, longest + 1).log2().floor().long()
    tallies = {(layer, of): Tally(len(documents)) for layer in names for of in octaves}

    # How many keys a query sees comes from the mask in the scores: in the pattern a weight may round to 0.
    seen: dict[tuple[int, int], Tensor] = {}  # by layer and length of the window
    counted = {layer: name.replace("hook_pattern", "hook_attn_scores") for layer, name in names.items()}

    def count(layer: int, scores: Float[Tensor, "batch head query key"], hook: HookPoint) -> None:
        seen[layer, scores.shape[2]] = visible_keys(scores[0, 0].detach()).sum(-1)

    def tally(layer: int, owners: list[int], pattern: Float[Tensor, "batch head query key"], hook: HookPoint) -> None:
        pattern = pattern.detach().float()
        # Without scores in TransformerLens, a key that any row or head gives weight to is one that is seen.
        sizes = seen.get((layer, pattern.shape[2]), (pattern > 0).any(0).any(0).sum(-1))
        sizes = sizes.to(pattern.device).log().expand(pattern.shape[:-1])
        found = torch.stack([attention_entropy(pattern), pattern.amax(-1), sizes], dim=-1)
        found = rearrange(found, "batch head query column -> batch query head column")
        found = torch.cat([found.mean(2, keepdim=True), found], dim=2)
        for i, of in enumerate(octaves, 1):
            within = (octave[: pattern.shape[2]] == i).nonzero().flatten()
            if len(within):
                tallies[layer, of].add(owners, found[:, within])

    for rows, owners in rows_of(documents, batches, "dispersion"):
        listen: Hooks = [(name, partial(count, layer)) for layer, name in counted.items() if name in model.hook_dict]
        listen += [(name, partial(tally, layer, owners)) for layer, name in names.items()]
        # Listeners come last, so that they see what the interventions made.
        run_for_hooks(model, rows, [*hooks, *listen])
    return tallies


def loss_by_length(
    model: HookedPositionTransformer,
    texts: Texts,
    hooks: Hooks,
    lengths: Sequence[int] = (64, 128, 256, 512),
    seed: int = 0,
    *,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """The loss with and without an intervention, on the same text read in windows of several lengths.

    Args:
        model: the model.
        texts: documents, as for `increments_by_category`; those shorter than the longest length are left out, and the
            others cut to a multiple of it.
        hooks: the intervention, such as that of `adaptive_temperature`.
        lengths: tokens of a window; each divides the longest. Longer than the model's context is extrapolation.
        seed: of the bootstrap.
        attention_mask, prepend_bos: as for `analysis.read_corpus`.

    Returns:
        One row for each `length`: `n` (predicted tokens, the same in number at every length but for the first of each
        window), `documents`, `loss` without and `changed` with the intervention (nats per token), and `difference`,
        with minus without, with `low` to `high`, where it lies in 95% of 1,000 resamples of documents (NaN for one).

    Raises:
        PositionsError: lengths that do not divide the longest, no document as long as that, and as `read_corpus`.

    >>> hooks = lp.analysis.adaptive_temperature(model)
    >>> table = lp.analysis.loss_by_length(model, texts, hooks, lengths=[32, 128])
    >>> table[["length", "n", "documents"]]
       length    n  documents
    0      32  372          3
    1     128  381          3
    """
    _check_lengths(lengths)
    lengths = sorted(set(lengths))
    longest = lengths[-1]
    documents = [tokens for tokens in windows(model, texts, attention_mask, prepend_bos)[0] if len(tokens) >= longest]
    if not documents:
        raise PositionsError(f"no text has {longest} tokens; expected at least one as long as the longest length.")
    draws = resamples(len(documents), seed)
    with several_passes(len(lengths)):
        tallies = {length: _losses_at(model, documents, length, longest, hooks) for length in lengths}
    table = []
    for length, own in tallies.items():
        assert own.sums is not None  # at least one document was read
        without, with_it = own.sums.sum(0) / own.counts.sum()
        # The same tokens with and without: the difference is taken before the resampling, document by document.
        difference = own.sums[:, 1] - own.sums[:, 0]
        low = high = math.nan
        if len(documents) > 1:
            ends = interval_of(bootstrap_means(difference[:, None], own.counts, draws))
            low, high = (float(end[0]) for end in ends)
        row = {"length": length, "n": int(own.counts.sum()), "documents": len(documents), "loss": without}
        table.append(row | {"changed": with_it, "difference": with_it - without, "low": low, "high": high})
    return pd.DataFrame(table)


def _check_lengths(lengths: Sequence[int]) -> None:
    """Refuse lengths that do not cut the same text: each must divide the longest."""
    whole = isinstance(lengths, Sequence) and [isinstance(length, int) and length > 1 for length in lengths]
    if not whole or not all(whole) or any(max(lengths) % length for length in lengths):
        raise PositionsError(f"lengths is {lengths!r}; expected whole numbers from 2 that divide the longest.")


def _losses_at(
    model: HookedPositionTransformer, documents: list[Tensor], length: int, longest: int, hooks: Hooks
) -> Tally:
    """Losses without and with the hooks, [2] a token, of the documents in windows of one length."""
    own = Tally(len(documents))
    # Every length reads the same tokens: as many whole windows of the longest length as the document has.
    pieces = [
        (number, tokens[: len(tokens) // longest * longest].view(-1, length)) for number, tokens in enumerate(documents)
    ]
    parts = [(number, part) for number, rows in pieces for part in rows.split(max(1, 2048 // length))]
    for number, rows in track_progress(parts, f"loss at {length} tokens", quick=sum(map(len, documents)) < 2048):
        losses = []
        for active in ([], hooks):
            with hooked_evaluation(model, active):
                losses.append(token_losses(model(rows), rows[:, 1:]))
        own.add([number] * len(rows), torch.stack(losses, dim=-1))
    return own
