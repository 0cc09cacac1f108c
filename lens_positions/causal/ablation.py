"""What the loss, the predictions and the attention lose without the structure of the increments.

Every layer, and all layers together, with increments at 1.0 ("1.0"), at each row's mean ("mean") and in another order
("shuffle"). Ablation to 1.0 also changes the scale of a layer whose mean is not 1, so look at the mean beside it: what
"1.0" does beyond "mean" is scale, not structure. A shuffle keeps every increment and gives it to another token: what it
does beyond "mean" is harm done by wrong increments. With `token_means`, "token" gives each token the mean increment
that its id has in other text: what that costs is what a layer knows beyond the identity of a token.

Losses are paired: the same tokens with and without. A document is the unit of sampling; intervals resample documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from ..core.model_wrappers import base_model
from ..errors import PositionsError
from ..interventions import HOOK, Hooks, LayerIndices, ablation_hooks, finite_number, hook_names, index_of, streams_of
from ..measure.corpus_reader import CorpusIncrements, Texts, read_corpus, rows_of, windows
from ..measure.intervals import Tally, resamples
from ..measure.metrics import look_back, token_losses
from ..measure.partial_forward import Replay
from ..model import HookedPositionTransformer
from ..text import Mask
from .sweeps import SITES

To = float | Literal["mean", "shuffle", "token"]
ABLATION = 'a finite number, "mean", "shuffle" or "token"'
INTERVENTIONS: tuple[To, ...] = (1.0, "mean", "shuffle")


@dataclass(frozen=True)
class Ablations:
    """What ablations change.

    Attributes:
        loss: a row for each `layer` ("all" or its number) and intervention `to`: `n` (predicted tokens), `documents`,
            `baseline` (nats per token without the ablation), `change` (with minus without) and its interval `low` to
            `high`, and `changed`, the share of tokens whose most likely prediction is another one, with `changed_low`
            to `changed_high`.
        attention: a row for each `ablated` ("all" or a layer) and `to`, and each head of the `layer` looked at (the
            ablated one; all of them for "all"): `distance`, the total variation between its patterns with and without,
            from 0 to 1, `look_back` (how many tokens back it attends without the ablation, on average over the
            pattern), `look_back_change`, each a mean over tokens, with `_low` and `_high`; `n` as above. Empty where
            the bridge leaves a model's attention whole and has no patterns.

    >>> ablations = lp.causal.ablation_table(model, texts, layers=0, to=["mean"])
    >>> ablations.loss["layer"].tolist(), len(ablations.attention)  # four heads, with all layers and with layer 0
    (['all', 0], 8)
    """

    loss: pd.DataFrame
    attention: pd.DataFrame


def ablation_table(
    model: TransformerBridge,
    corpus: Texts,
    layers: LayerIndices = None,
    to: Sequence[To] = INTERVENTIONS,
    seed: int = 0,
    means: Float[Tensor, "layer vocab *head"] | None = None,
    *,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> Ablations:
    """Change of loss, predictions and attention by ablating increments, layer by layer and together.

    Args:
        model: a bridge with position streams and a tokenizer.
        corpus: documents, as text or as tokens; long ones are cut into windows.
        layers: the model's own layer numbers, ablated one by one and together; None is all that rotate.
        to: the ablations; "mean" is best kept, for the reason above. Given `means`, "token" is always among them.
        seed: of the shuffle and the resampling.
        means: of other text, from `token_means`.
        attention_mask, prepend_bos: as for `analysis.read_corpus`.

    Returns:
        Two tables, in nats per token and tokens; intervals are where 95% of 1,000 resamples of whole documents lie,
        NaN for a single document. On a static model "1.0", "mean" and "shuffle" are what is there: a control of zeros.

    Raises:
        PositionsError: no streams, no such layer, no documents or one of fewer than two tokens, or "token" without
            means, or means of another shape than [layer, vocab].

    >>> ablations = lp.causal.ablation_table(model, texts, to=["mean"])
    >>> ablations.loss[["layer", "to", "baseline", "change"]].head(2).round(1)
      layer    to  baseline  change
    0   all  mean       1.5     1.1
    1     0  mean       1.5     1.1
    """
    names = dict(hook_names(model, layers, SITES["pattern"][0]))
    numbers = list(names)
    if isinstance(to, str) or not isinstance(to, Sequence) or not to:
        raise PositionsError(f"to is {to!r}; expected a list of ablations, some of 1.0, 'mean' and 'shuffle'.")
    to = list(
        dict.fromkeys(how if how in ("mean", "shuffle", "token") else finite_number(how, "to", ABLATION) for how in to)
    )
    if means is not None:
        to = list(dict.fromkeys([*to, "token"]))
        shape = (len(streams_of(model).layers), model.cfg.d_vocab)
        if means.shape[:2] != shape:
            raise PositionsError(f"means have shape {tuple(means.shape)}; expected {shape}, [layer, vocab].")
    elif "token" in to:
        raise PositionsError('to has "token" and no means were given; expected those of token_means.')
    seed = index_of(seed, "seed", "a whole number from 0")
    documents, batches = windows(cast(HookedPositionTransformer, model), corpus, attention_mask, prepend_bos)
    patterns = {layer: name for layer, name in names.items() if name in model.hook_dict}
    which: list[int | str] = ["all", *numbers]
    ablated = [(layer, how) for layer in which for how in to]
    tallies: dict[tuple[int | str, To, int | None], Tally] = {}
    base = Tally(len(documents))
    for number, (rows, owners) in enumerate(rows_of(documents, batches, "ablating")):
        targets = rows[:, 1:]
        own: dict[str, Tensor] = {}
        record: Hooks = [(name, partial(_keep_pattern, own)) for name in patterns.values()]
        replay = Replay(model, rows.to(base_model(model).device), hooks=record, tokens_too=False)
        nats, best = token_losses(replay.logits, targets), replay.logits[:, :-1].argmax(-1)
        base.add(owners, nats[..., None])
        for layer, how in ablated:
            seen = numbers if layer == "all" else [cast(int, layer)]
            if how == "token":
                hooks = _set_to(model, seen, cast(Tensor, means), rows)
            else:
                hooks = ablation_hooks(model, to=cast(Any, how), layers=seen, seed=seed + number)
            compared: dict[str, Tensor] = {}
            listen: Hooks = [(patterns[n], partial(_compare, own, compared)) for n in seen if n in patterns]
            logits = replay.run(hooks + listen, {min(seen): 1})
            changed = logits[:, :-1].argmax(-1) != best
            tally = tallies.setdefault((layer, how, None), Tally(len(documents)))
            tally.add(owners, torch.stack([token_losses(logits, targets) - nats, changed.to(nats)], dim=-1))
            for n in filter(patterns.get, seen):
                tally = tallies.setdefault((layer, how, n), Tally(len(documents)))
                tally.add(owners, compared[patterns[n]])
    draws = resamples(len(documents), seed)
    baseline = float(base.summary(draws)[0][0])
    losses, attention = [], []
    for (layer, how, seen_at), tally in tallies.items():
        row: dict[str, Any] = {
            "layer": layer,
            "to": str(how),
            "n": int(tally.counts.sum()),
            "documents": len(documents),
        }
        mean, low, high = tally.summary(draws)
        if seen_at is None:
            row |= {"baseline": baseline, "change": mean[0], "low": low[0], "high": high[0]}
            row |= {"changed": mean[1], "changed_low": low[1], "changed_high": high[1]}
            losses.append(row)
            continue
        for head in range(mean.shape[-1]):
            of_head: dict[str, Any] = {"ablated": layer, "to": str(how), "layer": seen_at, "head": head, "n": row["n"]}
            for i, column in enumerate(("distance", "look_back", "look_back_change")):
                of_head |= {column: mean[i, head], f"{column}_low": low[i, head], f"{column}_high": high[i, head]}
            attention.append(of_head)
    return Ablations(pd.DataFrame(losses), pd.DataFrame(attention))


def token_means(
    model: TransformerBridge,
    corpus: Texts | CorpusIncrements,
    *,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> Float[Tensor, "layer vocab *head"]:
    """The mean increment of each token id at each layer with a stream, over a corpus: what a frozen table could know.

    A token that the corpus does not have gets the mean of the layer. Take other text than that which is measured.

    Raises:
        PositionsError: as `read_corpus`.

    >>> means = lp.causal.token_means(model, texts)  # layer, vocabulary
    >>> [round(float(means[0, ord(letter)]), 1) for letter in " a"]  # at layer 0, of the space and of an "a"
    [7.2, 1.1]
    """
    streams_of(model)
    corpus_increments = read_corpus(cast(HookedPositionTransformer, model), corpus, attention_mask, prepend_bos)
    of_token = torch.from_numpy(corpus_increments.ids())
    values = torch.from_numpy(corpus_increments.increments)
    shape = (*values.shape[:2], cast(Any, model.cfg.d_vocab))
    sums = torch.zeros(shape, dtype=values.dtype).index_add(2, of_token, values)
    counts = torch.bincount(of_token, minlength=shape[2])
    means = torch.where(counts > 0, sums / counts.clamp(min=1), values.mean(-1, keepdim=True)).float()
    return means.transpose(1, 2) if streams_of(model).config.per_head else means[:, 0]


def _set_to(
    model: TransformerBridge, layers: list[int], means: Float[Tensor, "layer vocab *head"], rows: Int[Tensor, "row pos"]
) -> Hooks:
    """Hooks that give every token of some rows the mean increment of its id."""
    every = hook_names(model, None, HOOK.format("increments"))
    table = zip(every, means, strict=True)
    return [(name, partial(_replace_rows, of_ids[rows.cpu()])) for (layer, name), of_ids in table if layer in layers]


def _replace_rows(values: Tensor, increments: Tensor, hook: HookPoint) -> Tensor:
    return values.to(increments)


def _keep_pattern(kept: dict[str, Tensor], pattern: Tensor, hook: HookPoint) -> None:
    kept[cast(str, hook.name)] = pattern.detach()


def _compare(own: dict[str, Tensor], compared: dict[str, Tensor], pattern: Tensor, hook: HookPoint) -> None:
    name = cast(str, hook.name)
    compared[name] = _pattern_change(own[name].float(), pattern.float())


def _pattern_change(
    own: Float[Tensor, "batch head query key"], ablated: Float[Tensor, "batch head query key"]
) -> Float[Tensor, "batch next 3 head"]:
    """Total variation, look-back and its change of every query that has a choice: all but the first."""
    before, after = look_back(own), look_back(ablated)
    distance = (own - ablated).abs().sum(-1) / 2
    return torch.stack([distance, before, after - before], dim=-1)[:, :, 1:].permute(0, 2, 3, 1)
