"""What the loss, the predictions and the attention lose without the structure of the increments.

Every layer, and all layers together, with increments at 1.0 ("1.0"), at each row's mean ("mean") and in another order
("shuffle"). Ablation to 1.0 also changes the scale of a layer whose mean is not 1, so look at the mean beside it: what
"1.0" does beyond "mean" is scale, not structure. A shuffle keeps every increment and gives it to another token: what it
does beyond "mean" is harm done by wrong increments. With `token_means`, "token" gives each token the mean increment
that its id has in other text: what that costs is what a layer knows beyond the identity of a token.

Losses are paired: the same tokens with and without. A document is the unit of sampling; intervals resample documents.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, Literal, cast

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from ..core.model_state import evaluation_mode
from ..core.model_wrappers import base_model
from ..core.per_head import of_query_heads
from ..errors import PositionsError
from ..interventions import (
    HEAD_HOOK,
    HOOK,
    HeadKind,
    Hooks,
    LayerIndices,
    ablation_hooks,
    finite_number,
    hook_names,
    index_of,
    query_heads,
    streams_of,
)
from ..measure.corpus_reader import TOKENS_A_BATCH, CorpusIncrements, Texts, read_corpus, rows_of, windows
from ..measure.intervals import Tally, resamples
from ..measure.metrics import look_back, token_losses
from ..measure.native_pass import native_blocks
from ..measure.partial_forward import Replay
from ..model import HookedPositionTransformer
from ..text import Mask
from .prompt_tables import Prompts, documents_of
from .sweeps import SITES, By, head_count

To = float | Literal["mean", "shuffle", "token"]
Ablated = tuple[int | str, int | None]
"""A layer, or "all", and a head of it, or None for all of them."""

HookFunction = Callable[[Tensor, HookPoint], Tensor | None]

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
    corpus: Prompts,
    layers: LayerIndices = None,
    to: Sequence[To] = INTERVENTIONS,
    seed: int = 0,
    means: Float[Tensor, "layer vocab *head"] | None = None,
    *,
    by: By = "layer",
    heads: HeadKind = "query",
    attention: bool = True,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> Ablations:
    """Change of loss, predictions and attention by ablating increments, layer by layer and together.

    Args:
        model: a bridge with position streams and a tokenizer.
        corpus: documents, as text or as tokens, or a table with a column `clean`; long ones are cut into windows.
        layers: the model's own layer numbers, ablated one by one and together; None is all that rotate.
        to: the ablations; "mean" is best kept, for the reason above. Given `means`, "token" is always among them.
        seed: of the shuffle and the resampling.
        means: of other text, from `token_means`.
        by: "layer", or "head": one head of one layer is ablated, and the other heads keep their increments.
        heads: with by="head", "query" or "key_value" heads (all query heads that share their keys together).
        attention: whether patterns are compared; without, the second table is empty and the first comes sooner.
        attention_mask, prepend_bos: as for `analysis.read_corpus`.

    Returns:
        Two tables, in nats per token and tokens; intervals are where 95% of 1,000 resamples of whole documents lie,
        NaN for a single document. By head there is a column `head` in the first and `ablated_head` in the second, which
        then has the pattern of that head. On a static model "1.0", "mean" and "shuffle" are what is there: a control
        of zeros.

    Raises:
        PositionsError: no streams, no such layer, no documents or one of fewer than two tokens, or "token" without
            means, or means of another shape than [layer, vocab].

    >>> ablations = lp.causal.ablation_table(model, texts, to=["mean"])
    >>> ablations.loss[["layer", "to", "baseline", "change"]].head(2).round(1)
      layer    to  baseline  change
    0   all  mean       1.3     0.1
    1     0  mean       1.3     0.1
    """
    names = dict(hook_names(model, layers, SITES["pattern"][0]))
    to = _valid_ablations(model, to, means)
    seed = index_of(seed, "seed", "a whole number from 0")
    bridge, texts = cast(HookedPositionTransformer, model), documents_of(corpus)
    documents, batches = windows(bridge, texts, attention_mask, prepend_bos)

    # A bridge shows no pattern where it leaves a block whole: that layer has losses alone.
    patterns = {layer: name for layer, name in names.items() if attention and name in model.hook_dict}
    each = _each_ablation(model, list(names), by, heads)
    run = _Run(model, list(names), patterns, heads, means)
    what = f"ablating in {len(each) * len(to)} ways"
    base, tallies = _tallies(run, list(product(each, to)), len(documents), rows_of(documents, batches, what), seed)
    return _tables(tallies, base, len(documents), seed, by == "head", run)


def _tallies(
    run: "_Run",
    ablations: list[tuple[Ablated, To]],
    documents: int,
    batches: Iterable[tuple[Int[Tensor, "row pos"], list[int]]],
    seed: int,
) -> tuple[Tally, dict[tuple[Ablated, To, int | None], Tally]]:
    """The losses without ablation, and what each ablation changes, in the order of the ablations."""
    base, tallies = Tally(documents), dict[tuple[Ablated, To, int | None], Tally]()

    # Once for all passes, as each would switch every module there and back.
    with evaluation_mode(run.model), ExitStack() as faster:
        for number, (rows, owners) in enumerate(batches):
            # Heads with edits of their own act inside the attention.
            if number == 0 and not run.patterns and all(head is None for (_, head), _ in ablations):
                faster.enter_context(native_blocks(run.model, rows[:1]))
            baseline = run.baseline(rows)
            base.add(owners, baseline.nats[..., None])
            for together in run.groups(baseline, ablations):
                # A seed a batch: the same shuffle of every window would be one draw, not many.
                for key, values in run.changes(baseline, together, seed + number).items():
                    tallies.setdefault(key, Tally(documents)).add(owners, values)
    order = {ablation: place for place, ablation in enumerate(ablations)}
    return base, dict(sorted(tallies.items(), key=lambda item: order[item[0][:2]]))


def _each_ablation(model: TransformerBridge, layers: list[int], by: By, heads: HeadKind) -> list[Ablated]:
    """What is ablated: all layers together, then each layer, or each head of each, alone."""
    of_layer = range(head_count(model, by, heads)) if by == "head" else [None]
    return [("all", None), *((layer, head) for layer in layers for head in of_layer)]


def _valid_ablations(
    model: TransformerBridge, to: Sequence[To], means: Float[Tensor, "layer vocab *head"] | None
) -> list[To]:
    """The ablations, each once, with "token" among them where there are means."""
    if isinstance(to, str) or not isinstance(to, Sequence) or not to:
        raise PositionsError(f"to is {to!r}; expected a list of ablations, some of 1.0, 'mean' and 'shuffle'.")
    to = list(
        dict.fromkeys(how if how in ("mean", "shuffle", "token") else finite_number(how, "to", ABLATION) for how in to)
    )
    if means is not None:
        shape = (len(streams_of(model).layers), model.cfg.d_vocab)
        if means.shape[:2] != shape:
            raise PositionsError(f"means have shape {tuple(means.shape)}; expected {shape}, [layer, vocab].")
        return list(dict.fromkeys([*to, "token"]))
    if "token" in to:
        raise PositionsError('to has "token" and no means were given; expected those of token_means.')
    return to


class _Baseline:
    """Some rows without ablation: what every ablation of them is compared with.

    Attributes:
        rows: the tokens; `targets` those that are predicted.
        patterns: attention by hook name.
        replay: runs them again from a layer on.
        nats: the loss of each token that is predicted; `best` the most likely prediction.
    """

    def __init__(
        self, model: TransformerBridge, rows: Int[Tensor, "row pos"], patterns: dict[int, str], tried: bool
    ) -> None:
        self.rows, self.targets = rows, rows[:, 1:]
        self.patterns: dict[str, Tensor] = {}
        record: Hooks = [(name, partial(_keep_pattern, self.patterns)) for name in patterns.values()]

        # An ablation changes nothing below its first layer, so what enters that layer is kept and run on from there.
        self.replay = Replay(model, rows.to(base_model(model).device), hooks=record, tokens_too=False, tried=tried)
        self.nats = token_losses(self.replay.logits, self.targets)
        self.best = self.replay.logits[:, :-1].argmax(-1)


@dataclass(frozen=True)
class _Run:
    """What all ablations of a table share.

    Attributes:
        layers: the model's own numbers of those that are ablated.
        patterns: the hook of each layer that has patterns.
        heads: the kind of heads, where they are ablated one by one.
        means: increments by token, for "token".
        exact: whether batches of one row (False), and of several (True), were found to resume exactly.
    """

    model: TransformerBridge
    layers: list[int]
    patterns: dict[int, str]
    heads: HeadKind
    means: Tensor | None
    exact: set[bool] = field(default_factory=set)

    def baseline(self, rows: Int[Tensor, "row pos"]) -> _Baseline:
        """Some rows without ablation. That a pass can be resumed is tried once with one row, and once with several."""
        several = len(rows) > 1
        baseline = _Baseline(self.model, rows, self.patterns, several in self.exact)
        if baseline.replay.exact:
            self.exact.add(several)
        return baseline

    def groups(self, baseline: _Baseline, ablations: list[tuple[Ablated, To]]) -> list[list[tuple[Ablated, To]]]:
        """The ablations in groups that run as one batch, of about `TOKENS_A_BATCH` tokens; the lowest layer first."""
        # Where every copy runs the whole prompt, a run has one.
        size = max(1, TOKENS_A_BATCH // baseline.rows.numel()) if baseline.replay.exact else 1
        ordered = sorted(ablations, key=lambda ablation: min(self.layers_of(ablation[0])))
        return [ordered[first : first + size] for first in range(0, len(ordered), size)]

    def changes(
        self, baseline: _Baseline, together: list[tuple[Ablated, To]], seed: int
    ) -> dict[tuple[Ablated, To, int | None], Tensor]:
        """What some ablations change, the lowest layer first: each one's loss and prediction (under None), and the
        patterns of each layer that it ablates."""
        size = len(baseline.rows)
        edits: dict[str, list[tuple[slice, HookFunction]]] = {}
        joining: Counter[int] = Counter()
        found: dict[tuple[Ablated, To, int | None], Tensor] = {}
        compared: dict[tuple[Ablated, To, int], Tensor] = {}

        # Copy after copy of the rows in one batch, each with the hooks of its own ablation.
        for copy, (ablated, how) in enumerate(together):
            rows, seen = slice(copy * size, (copy + 1) * size), self.layers_of(ablated)
            joining[min(seen)] += 1
            hooks = self.hooks_of(baseline, ablated, how, seed)
            for layer in seen:
                if layer in self.patterns:
                    keep = partial(_compare, baseline.patterns, compared, (ablated, how, layer))
                    hooks.append((self.patterns[layer], keep))
            for name, function in hooks:
                edits.setdefault(name, []).append((rows, function))
        logits = baseline.replay.run([(name, partial(_in_rows, each)) for name, each in edits.items()], joining)

        # Paired by token: what texts differ in cancels.
        for (ablated, how), own in zip(together, logits.split(size), strict=True):
            of_loss = token_losses(own, baseline.targets) - baseline.nats
            changed = own[:, :-1].argmax(-1) != baseline.best
            found[ablated, how, None] = torch.stack([of_loss, changed.to(of_loss)], dim=-1)

            which = slice(None) if ablated[1] is None else self.heads_of(ablated[1])
            for layer in self.layers_of(ablated):
                if (ablated, how, layer) in compared:
                    found[ablated, how, layer] = compared[ablated, how, layer][..., which]
        return found

    def layers_of(self, ablated: Ablated) -> list[int]:
        """The layers of an ablation."""
        return self.layers if ablated[0] == "all" else [cast(int, ablated[0])]

    def hooks_of(self, baseline: _Baseline, ablated: Ablated, how: To, seed: int) -> Hooks:
        """The hooks of an ablation of the baseline's rows."""
        layers, head = self.layers_of(ablated), ablated[1]
        if how == "token":
            return _set_to(self.model, layers, cast(Tensor, self.means), baseline.rows, self.heads_of(head))
        return ablation_hooks(self.model, cast(Any, how), layers, heads=head, seed=seed, head_kind=self.heads)

    def heads_of(self, head: int | None) -> list[int] | None:
        """The query heads that one head is; None where all are ablated."""
        return None if head is None else query_heads(streams_of(self.model), [head], self.heads)


def _tables(
    tallies: dict[tuple[Ablated, To, int | None], Tally],
    base: Tally,
    documents: int,
    seed: int,
    by_head: bool,
    run: _Run,
) -> Ablations:
    """The table of losses and that of attention."""
    # The same resamples for every row, so that rows can be compared.
    draws = resamples(documents, seed)
    baseline = float(base.summary(draws)[0][0])
    losses, attention = [], []
    for ((layer, head), how, seen_at), tally in tallies.items():
        n = int(tally.counts.sum())
        mean, low, high = tally.summary(draws)
        whole = "all" if head is None else head
        if seen_at is None:
            row: dict[str, Any] = {"layer": layer} | ({"head": whole} if by_head else {}) | {"to": str(how)}
            row |= {"n": n, "documents": documents, "baseline": baseline}
            row |= {"change": mean[0], "low": low[0], "high": high[0]}
            row |= {"changed": mean[1], "changed_low": low[1], "changed_high": high[1]}
            losses.append(row)
            continue
        for i, of_head in enumerate(run.heads_of(head) or range(mean.shape[-1])):
            row = {"ablated": layer} | ({"ablated_head": whole} if by_head else {})
            row |= {"to": str(how), "layer": seen_at, "head": of_head, "n": n}
            for j, column in enumerate(("distance", "look_back", "look_back_change")):
                row |= {column: mean[j, i], f"{column}_low": low[j, i], f"{column}_high": high[j, i]}
            attention.append(row)
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
    [2.1, 1.1]
    """
    streams_of(model)
    corpus_increments = read_corpus(cast(HookedPositionTransformer, model), corpus, attention_mask, prepend_bos)
    of_token = torch.from_numpy(corpus_increments.ids())
    values = torch.from_numpy(corpus_increments.increments)
    shape = (*values.shape[:2], cast(Any, model.cfg.d_vocab))

    # `index_add` counts every occurrence of an id; an assignment by index would keep the last.
    sums = torch.zeros(shape, dtype=values.dtype).index_add(2, of_token, values)
    counts = torch.bincount(of_token, minlength=shape[2])

    # An id that the corpus lacks has no mean of its own.
    means = torch.where(counts > 0, sums / counts.clamp(min=1), values.mean(-1, keepdim=True)).float()
    return means.transpose(1, 2) if streams_of(model).config.per_head else means[:, 0]


def _set_to(
    model: TransformerBridge,
    layers: list[int],
    means: Float[Tensor, "layer vocab *head"],
    rows: Int[Tensor, "row pos"],
    heads: list[int] | None,
) -> Hooks:
    """Hooks that give every token of some rows the mean increment of its id, in all heads or in some."""
    every = hook_names(model, None, (HOOK if heads is None else HEAD_HOOK).format("increments"))

    # Means are of every layer that has a stream, in their order.
    table = zip(every, means, strict=True)
    return [
        (name, partial(_replace_rows, of_ids[rows.cpu()], heads)) for (layer, name), of_ids in table if layer in layers
    ]


def _replace_rows(values: Tensor, heads: list[int] | None, given: Tensor, hook: HookPoint) -> Tensor:
    values = values.to(given)
    if heads is None:
        return values
    replaced = given.clone()
    replaced[..., heads] = of_query_heads(values, given.shape[2])[..., heads]
    return replaced


def _keep_pattern(kept: dict[str, Tensor], pattern: Tensor, hook: HookPoint) -> None:
    kept[cast(str, hook.name)] = pattern.detach()


def _compare(
    own: dict[str, Tensor],
    compared: dict[tuple[Ablated, To, int], Tensor],
    key: tuple[Ablated, To, int],
    pattern: Tensor,
    hook: HookPoint,
) -> None:
    compared[key] = _pattern_change(own[cast(str, hook.name)].float(), pattern.float())


def _in_rows(functions: list[tuple[slice, HookFunction]], values: Tensor, hook: HookPoint) -> Tensor | None:
    """Let each function see, and change, the rows that are its own."""
    edited = None
    for rows, function in functions:
        # Rows of later layers have not joined yet, and come after these.
        result = function(values[rows], hook)
        if result is not None and len(result) == len(values):
            edited = result
        elif result is not None:
            # A clone, as a hook must not write into what other rows still need.
            edited = values.clone() if edited is None else edited
            edited[rows] = result
    return edited


def _pattern_change(
    own: Float[Tensor, "batch head query key"], ablated: Float[Tensor, "batch head query key"]
) -> Float[Tensor, "batch next 3 head"]:
    """Total variation, look-back and its change of every query that has a choice: all but the first."""
    before, after = look_back(own), look_back(ablated)
    distance = (own - ablated).abs().sum(-1) / 2
    return torch.stack([distance, before, after - before], dim=-1)[:, :, 1:].permute(0, 2, 3, 1)
