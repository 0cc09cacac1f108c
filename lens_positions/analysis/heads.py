"""Do heads with larger increments look back less far?

`head_profile` measures both for every head; `head_correlations` says how they go together, over all heads and within
layers. Where a source gives one increment to all heads of a layer, only layers can be compared.

A longer increment turns queries and keys faster with every token, which is also what a larger rotary frequency does: a
correlation says how heads came to use their increments, not that an increment shortens a head's reach. For that, edit
increments (`lp.scale`) and see.
"""

from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
import torch
from einops import rearrange, repeat
from jaxtyping import Float, Float64, Int
from scipy import stats
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from ..errors import PositionsError
from ..interventions import HOOK, hook_names
from ..measure.attention import attention_names, keep_states
from ..measure.corpus_reader import Texts, rows_of, windows
from ..measure.intervals import Tally, resamples, shuffle_within
from ..measure.metrics import look_back
from ..model import HookedPositionTransformer
from ..text import Mask

PERMUTATIONS = 10_000


def head_profile(
    model: HookedPositionTransformer,
    texts: Texts,
    seed: int = 0,
    *,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """The mean increment and the mean look-back of every head.

    Args:
        model: the model.
        texts: documents, as for `increments_by_category`.
        seed: of the bootstrap.
        attention_mask, prepend_bos: as for `analysis.read_corpus`.

    Returns:
        One row for each `layer` and `head`: `n` (tokens), `documents`, `increment` (in positions; that of the layer
        where its heads share one, and of the key-value head where heads share those) and `look_back` (tokens back, the
        mean over each token's pattern and over tokens; the first of a window, which has no choice, is left out), each
        with `_low` and `_high`, where the mean lies in 95% of 1,000 resamples of documents, NaN for one.

    Raises:
        PositionsError: attention without patterns, and as `read_corpus`.

    >>> table = lp.analysis.head_profile(model, texts)
    >>> table.loc[table["layer"] == 0, ["head", "increment", "look_back"]].round(1)
       head  increment  look_back
    0     0        1.5        2.7
    1     1        1.5        2.6
    2     2        1.5        4.5
    3     3        1.5        3.2
    """
    documents, batches = windows(model, texts, attention_mask, prepend_bos)
    patterns = attention_names(model, None, "pattern")
    increments = dict(hook_names(model, None, HOOK.format("increments")))
    tallies = {layer: Tally(len(documents)) for layer in patterns}
    for rows, owners in rows_of(documents, batches, "heads"):
        found = _increments_and_look_back(model, rows, patterns, increments)
        for layer, tally in tallies.items():
            tally.add(owners, found[layer])
    draws = resamples(len(documents), seed)
    table = []
    for layer, tally in tallies.items():
        mean, low, high = tally.summary(draws)
        for head in range(len(mean)):
            row = {"layer": layer, "head": head, "n": int(tally.counts.sum()), "documents": len(documents)}
            for i, column in enumerate(("increment", "look_back")):
                row |= {column: mean[head, i], f"{column}_low": low[head, i], f"{column}_high": high[head, i]}
            table.append(row)
    return pd.DataFrame(table)


def _increments_and_look_back(
    model: HookedPositionTransformer,
    rows: Int[Tensor, "batch pos"],
    patterns: dict[int, str],
    increments: dict[int, str],
) -> dict[int, Float[Tensor, "batch pos_less_one query_head 2"]]:
    """By layer, the increment and the look-back of every query but the first, which has no choice."""
    of_increments: dict[int, Tensor] = {}
    of_look_back: dict[int, Tensor] = {}
    hooks: list[Any] = [(name, partial(_keep_look_back, of_look_back, layer)) for layer, name in patterns.items()]
    hooks += [(name, partial(keep_states, of_increments, layer)) for layer, name in increments.items()]
    with torch.no_grad():
        model.run_with_hooks(rows, fwd_hooks=hooks, return_type=None)

    found = {}
    for layer, back in of_look_back.items():
        own = of_increments[layer][:, model.position_config.effective].to(back)
        own = own[..., None] if own.ndim == 2 else own
        # Query heads h, h + 1, ... of a group share the increment of their key-value head, or of the layer.
        group = back.shape[-1] // own.shape[-1]
        own = repeat(own, "batch pos head -> batch pos (head group)", group=group)
        found[layer] = torch.stack([own, back], dim=-1)
    return found


def head_correlations(profile: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """How mean increments go with mean look-back, from `head_profile`.

    Query heads that share an increment are averaged first. Heads of a layer are no independent samples of all heads
    (layers differ in both), so only the scope "within layers" has a test.

    Args:
        profile: of one model.
        seed: of the permutations.

    Returns:
        One row for each `scope` and `measure` ("pearson", "spearman"): `n`, `correlation`, `low` to `high` (95%, by
        Fisher's transformation, less a degree of freedom for each layer) and `p` (two-sided, of 10,000 permutations).
        Where heads have increments of their own, the scopes are "heads" (all of them; `p` is NaN) and "within layers"
        (values, or ranks, less the mean of their layer; permuted within layers); else "layers", the means of layers.

    Raises:
        PositionsError: fewer than four heads or layers, or increments that are all the same.

    >>> table = lp.analysis.head_correlations(lp.analysis.head_profile(model, texts))
    >>> table[["scope", "measure", "n"]]
        scope   measure  n
    0  layers   pearson  6
    1  layers  spearman  6
    """
    own = profile.groupby("layer")["increment"].nunique().max() > 1

    # Query heads of a group share one increment and are no independent samples: each group is one.
    by = ["layer", "increment"] if own else ["layer"]
    whole = profile.groupby(by, as_index=False, sort=False)[["increment", "look_back"]].mean()
    if len(whole) < 4 or whole["increment"].nunique() < 2:
        what = "heads" if own else "layers, whose heads share their increments"
        raise PositionsError(
            f"there are {len(whole)} {what} with {whole['increment'].nunique()} different mean increments; expected "
            "four or more, not all the same."
        )
    layer = whole["layer"].to_numpy()
    values = whole[["increment", "look_back"]].to_numpy().T

    # Spearman's correlation is Pearson's of the ranks.
    ranks = np.stack([stats.rankdata(row) for row in values])
    rows = []
    for scope in ("heads", "within layers") if own else ("layers",):
        groups = layer if scope == "within layers" else np.zeros(len(layer), dtype=int)
        for measure, pair in (("pearson", values), ("spearman", ranks)):
            row = {"scope": scope, "measure": measure, "n": len(layer), **_correlation_row(pair, groups, seed)}
            rows.append(row | ({"p": np.nan} if scope == "heads" else {}))
    return pd.DataFrame(rows)


def _correlation_row(pair: Float64[np.ndarray, "2 sample"], groups: np.ndarray, seed: int) -> dict[str, float]:
    """Correlation of two rows less the means of their groups, its interval, and its p-value."""
    # Correlating what is left of each value without the mean of its layer takes the differences between layers out.
    _, group = np.unique(groups, return_inverse=True)
    means = np.stack([np.bincount(group, row) / np.bincount(group) for row in pair])
    x, y = pair - means[:, group]

    def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        size = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
        return np.divide((x * y).sum(-1), size, out=np.full_like(size, np.nan), where=size > 0)

    found = float(correlation(x[None], y[None])[0])
    freedom = len(x) - len(means[0]) - 2  # n - 3 for one group
    reach = NormalDist().inv_cdf(0.975) / np.sqrt(freedom) if freedom > 0 else np.inf
    # Clipped, as Fisher's transformation of a perfect correlation is infinite.
    centre = np.arctanh(np.clip(found, -1 + 1e-12, 1 - 1e-12))
    by_chance = correlation(x[None], y[shuffle_within(group, seed, (PERMUTATIONS,))])
    # The order that was found is one of the permutations, so p is never 0.
    p = (1 + np.count_nonzero(np.abs(by_chance) >= abs(found) - 1e-12)) / (1 + PERMUTATIONS)
    return {"correlation": found, "low": float(np.tanh(centre - reach)), "high": float(np.tanh(centre + reach)), "p": p}


def _keep_look_back(
    kept: dict[int, Tensor], layer: int, pattern: Float[Tensor, "batch head query key"], hook: HookPoint
) -> None:
    """How many tokens back each query attends on average, [batch, query, head], the first query left out."""
    kept[layer] = rearrange(look_back(pattern.detach().float())[..., 1:], "batch head query -> batch query head")
