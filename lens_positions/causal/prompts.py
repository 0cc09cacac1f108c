"""From one prompt to many: any measurement of one prompt, over a list or a table of them, with intervals.

`over_prompts` runs a measurement of one prompt (`gap_sweep`, `patch_sweep`, `attribution`, `mediation`, your own) on
each of many, of any lengths, brings tokens of the same place together, and says how sure the mean over prompts is:

    value       what the measurement gives on that prompt alone, to rounding, whatever else is in its batch
    place       the index of a token, counted from the start or the end; with a template, its span and its index there
    mean        over the prompts that have that place; n is their number
    interval    where 95% of the means lie over 1,000 resamples of whole prompts (a bootstrap), NaN for one prompt

A prompt is the unit of sampling: prompts that a template makes from the same few words are less independent than their
number says.

Gradients and mediation run in batches of prompts of similar length, padded at the end, under a mask. A token never
attends to what follows it, so padding changes nothing before it. The logits are computed at the tokens alone that the
metric reads. The sweeps go prompt by prompt, as the edits of one fill their batches already. So do gradients and
mediation while hooks are active (`with model.hooks(...)`), which may do anything to a padded row, and wherever an
argument is given that the batches do not know.

The effects of a sweep over many prompts, as averages by place: Meng et al., "Locating and Editing Factual Associations
in GPT" (arXiv 2202.05262), section 2. The bootstrap: Efron, "Bootstrap Methods" (Annals of Statistics 7, 1979).
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial, wraps
from itertools import product
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from ..core.model_state import evaluation_mode
from ..core.own_thread import own_hooks
from ..errors import PositionsError
from ..interventions import HOOK, Hooks, LayerIndices, hook_names, index_of, streams_of, values_of_gaps
from ..measure.intervals import interval_of, resamples
from ..measure.metrics import (
    Metric,
    differentiable,
    log_probability,
    logit_difference,
    metric_values,
    of_prompts,
    place_of,
)
from ..measure.partial_forward import Replay
from ..progress import track_progress
from ..text import Mask
from .pieces import in_pieces
from .prompt_tables import Ends, Prompt, Prompts, is_table, read_prompts, several

TOKENS_A_BATCH = 512
"""Tokens of a batch at most, padding counted, unless one prompt alone has more."""

ACTIVATIONS = 2**31
"""Bytes that a batch's activations may take, roughly; beyond them each block runs a second time (`pieces.py`)."""

NUMBERS_A_TOKEN = 32
"""Numbers that a block keeps of a token for the backward pass, in multiples of d_model (SmolLM2: 36 at 512 tokens)."""

CELLS_AT_ONCE = 4096
"""Of a bootstrap, for memory's sake."""

PATHS = ("total", "direct", "increments", "interaction")

Function = TypeVar("Function", bound=Callable[..., Any])
Batched = Callable[..., list[Any] | None]
"""From a model, some prompts, their metrics and the arguments to the value of each prompt; None: it cannot."""


@dataclass(frozen=True)
class PromptEffects:
    """What a measurement gives over many prompts.

    Attributes:
        table: a row for each layer (and head, span, token, path: whatever the measurement tells apart): `n`, the
            prompts that have that place, `mean` over them and its 95% bootstrap interval `low` to `high`. `token`
            counts as `count_from` says, and `text` is the token there where all prompts have the same.
        of_prompts: the value of each prompt alone: the same columns with `prompt`, its row, and `effect`.
        measurement, model: their names.
        count_from: the end that tokens are counted from.
        arguments: what else was passed to the measurement, in words.

    >>> found = lp.causal.over_prompts(lp.causal.gap_sweep, model, ["The cat", "A dog sat"], lp.causal.loss())
    >>> found.table[["layer", "token", "n"]].tail(1)  # the longer prompt alone has a token 9
        layer  token  n
    59      5      9  1
    """

    table: pd.DataFrame
    of_prompts: pd.DataFrame = field(repr=False)
    measurement: str
    model: str
    count_from: Ends
    arguments: str = ""

    @property
    def prompts(self) -> int:
        """How many prompts there are."""
        return int(self.of_prompts["prompt"].nunique())


def over_prompts(
    measurement: Callable[..., Tensor | pd.DataFrame],
    model: TransformerBridge,
    prompts: Prompts,
    metric: Metric | None = None,
    *,
    template: str | None = None,
    count_from: Ends = "start",
    tokens_a_batch: int = TOKENS_A_BATCH,
    seed: int = 0,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
    **arguments: Any,
) -> PromptEffects:
    """Measure each of many prompts, and average over them by place.

    Args:
        measurement: of one prompt: `(model, tokens, metric)` to a tensor [layer pos] or [layer head pos], or a table
            with columns of keys and `mean`. A parameter `source` or `corrupted` gets the other prompt of the pair.
        model: a bridge with position streams.
        prompts: a list of texts or tokens of any lengths, or a table (pandas or `datasets`) with columns `clean`,
            `corrupted` for pairs, and `answer` and `wrong`, one token each as text or id.
        metric: of every prompt; None takes the table's: the logit of `answer` minus that of `wrong` after the last
            token, or the log probability of `answer` where there is no `wrong`.
        template: a text with {names} of columns, by whose spans tokens are aligned; see `prompt_tables`.
        count_from: count tokens from the "start" (0, 1, ...) or the "end" (-1, -2, ...) of a prompt or of each span.
        tokens_a_batch: for memory's sake; results do not depend on it. `seed` is that of the resampling.
        attention_mask, prepend_bos: as for `gap_sweep`. `arguments` are passed on to the measurement.

    Raises:
        PositionsError: an empty table, a column or span that is missing, pairs that do not align, no metric, or what
            the measurement refuses.

    >>> table = pd.DataFrame({"animal": ["cat", "horse"], "answer": [".", "."], "wrong": ["!", "?"]})
    >>> found = lp.causal.over_prompts(lp.causal.attribution, model, table, template="The {animal} sat")
    >>> rows = found.table.query("layer == 0 and span == 'animal'")
    >>> rows[["span", "token", "text", "n"]]  # "cat" has no fourth byte
         span  token text  n
    5  animal      0       2
    6  animal      1       2
    7  animal      2       2
    8  animal      3       1
    9  animal      4       1
    """
    _check_measurement(measurement)
    streams_of(model)
    size = index_of(tokens_a_batch, "tokens_a_batch", "a whole number from 1", least=1)
    read = read_prompts(model, prompts, template, count_from, attention_mask, prepend_bos)
    metrics, roles = _metrics(read, metric), _roles(measurement, read, arguments)
    found = _values(measurement, model, read, metrics, roles, size, arguments)
    of_prompts = _long(model, read, found, arguments.get("layers"))
    words = ", ".join(f"{key}={value!r:.60}" for key, value in arguments.items() if value is not None)
    name, of_model = (getattr(x, key, type(x).__name__) for x, key in ((measurement, "__name__"), (model, "name")))
    return PromptEffects(_summary(of_prompts, len(read), seed), of_prompts, name, of_model, count_from, words)


def _check_measurement(measurement: Any) -> None:
    if not callable(measurement):
        raise PositionsError(f"the measurement is {measurement!r}; expected a function of a model and one prompt.")


def many_prompts(batched: Batched | None = None, lists: bool = True) -> Callable[[Function], Function]:
    """A decorator: a measurement of one prompt that takes many as well, by `over_prompts`.

    Its further arguments may then be those of `over_prompts`, and what it returns is a `PromptEffects`. A table stands
    for both prompts of a pair.

    Args:
        batched: a faster way than one by one; None: there is none.
        lists: leave only tables to `over_prompts` where False, as the measurement takes lists itself.
    """
    is_many = several if lists else is_table

    def decorate(measurement: Function) -> Function:
        signature = inspect.signature(measurement)
        sides = {name: _COLUMNS[name] for name in signature.parameters if name in _COLUMNS}

        @wraps(measurement)
        def call(model: Any, *given: Any, **named: Any) -> Any:
            options = {name: named.pop(name) for name in _OPTIONS & named.keys()}
            try:
                arguments = signature.bind_partial(model, *given, **named).arguments
            except TypeError:  # as Python says it
                return measurement(model, *given, **named, **options)

            # A call on one prompt stays what it was: only lists, tables and options of `over_prompts` lead elsewhere.
            prompts = [arguments[name] for name in sides if name in arguments]
            if not any(map(is_many, prompts)) and not options:
                return measurement(model, *given, **named)

            # `call` and not the bare measurement: `over_prompts` finds the faster way at its `batched`.
            rest = {name: value for name, value in arguments.items() if name not in ("model", *sides)}
            return over_prompts(call, model, _one_table(prompts, list(sides.values())), **rest, **options)

        cast(Any, call).batched = batched
        return cast(Function, call)

    return decorate


_COLUMNS = {"source": "corrupted", "tokens": "clean", "clean": "clean", "corrupted": "corrupted"}
_OPTIONS = {"template", "count_from", "tokens_a_batch", "seed"}


def _one_table(prompts: list[Any], columns: list[str]) -> Any:
    """A list or table as it is; two lists, of both sides of pairs, as a table."""
    if len(prompts) == 1 and (len(columns) == 1 or is_table(prompts[0])):
        return prompts[0]

    # One text beside a list is a list of one, which then has too few for pairs.
    lists = [[given] if isinstance(given, str) else list(given) for given in prompts if isinstance(given, Iterable)]
    if len(lists) < len(columns) or any(map(is_table, prompts)):
        raise PositionsError(
            "pairs of prompts were given as one of two lists, or as a table beside something else; expected two lists, "
            "or one table and the metric as metric=."
        )
    if len(lists[0]) != len(lists[1]):
        counts = dict(zip(columns, map(len, lists), strict=True))
        raise PositionsError(
            f"there are {counts['clean']} clean and {counts['corrupted']} corrupted prompts; expected pairs."
        )
    return pd.DataFrame(dict(zip(columns, lists, strict=True)))


def _metrics(prompts: list[Prompt], metric: Metric | None) -> list[Metric]:
    """The metric of each prompt."""
    if metric is not None:
        return [metric] * len(prompts)
    if prompts[0].answer is None:
        raise PositionsError(
            "no metric was given; expected one, or a table with a column 'answer' (and 'wrong') of one token each."
        )
    return [
        log_probability(cast(int, prompt.answer))
        if prompt.wrong is None
        else logit_difference(cast(int, prompt.answer), prompt.wrong)
        for prompt in prompts
    ]


def _roles(measurement: Callable[..., Any], prompts: list[Prompt], arguments: Mapping[str, Any]) -> dict[str, str]:
    """Which parameter of a measurement takes the clean prompt, and which the corrupted one.

    Raises:
        PositionsError: it compares two prompts and there are no pairs, or it has no parameter for a prompt.
    """
    parameters = inspect.signature(measurement).parameters
    clean = next((name for name in ("tokens", "clean", "prompt", "text") if name in parameters), None)
    if clean is None or "metric" not in parameters:
        raise PositionsError(
            f"the measurement takes {', '.join(parameters) or 'nothing'}; expected a function with parameters "
            "model, tokens and metric."
        )

    roles = {"clean": clean}
    other = next((name for name in ("source", "corrupted") if name in parameters), None)
    if other is not None:
        if prompts[0].corrupted is None:
            raise PositionsError(
                "the measurement compares pairs of prompts and none has a corrupted one; expected a column "
                "'corrupted', or with a template a column 'corrupted_<span>'."
            )
        roles["corrupted"] = other
        if "align" not in arguments:
            _check_pairs(prompts, "align" in parameters)
    return roles


def _check_pairs(prompts: list[Prompt], may_map: bool) -> None:
    """Refuse pairs of different lengths, unless spans say which tokens belong together and the measurement hears it."""
    for row, prompt in enumerate(prompts):
        here, there = len(prompt.clean), len(cast(Tensor, prompt.corrupted))
        if here != there and not (may_map and prompt.pairs):
            other = ", or a template whose spans say which tokens belong together" if may_map else ""
            raise PositionsError(
                f"the prompts of row {row} do not align: {here} tokens in the clean one and {there} in the corrupted "
                f"one; expected equally many{other}."
            )


def _values(
    measurement: Callable[..., Any],
    model: TransformerBridge,
    prompts: list[Prompt],
    metrics: list[Metric],
    roles: dict[str, str],
    size: int,
    arguments: Mapping[str, Any],
) -> list[Any]:
    """The value of each prompt, in batches of so many tokens where that can be."""
    batched: Batched | None = getattr(measurement, "batched", None)

    # Batches pad rows and cut logits, which the hooks of a user need not bear: then each prompt runs alone.
    hooked = any(point.has_hooks("fwd") for point in model.hook_dict.values())
    if batched is not None and not hooked:
        found = _in_batches(batched, model, prompts, metrics, size, arguments)
        if found is not None:
            return found
    pairs = track_progress(list(zip(prompts, metrics, strict=True)), "prompts", quick=len(prompts) < 4)
    return [_alone(measurement, model, roles, arguments, *pair) for pair in pairs]


def _alone(
    measurement: Callable[..., Any],
    model: TransformerBridge,
    roles: dict[str, str],
    arguments: Mapping[str, Any],
    prompt: Prompt,
    metric: Metric,
) -> Any:
    """The measurement of one prompt."""
    given: dict[str, Any] = {roles["clean"]: prompt.clean[None], "metric": metric, **arguments}
    if "corrupted" in roles:
        given[roles["corrupted"]] = cast(Tensor, prompt.corrupted)[None]
        if prompt.pairs is not None and "align" in inspect.signature(measurement).parameters:
            # An alignment that the caller gave goes before that of the spans.
            given.setdefault("align", prompt.pairs)
    return measurement(model, **given)


def _in_batches(
    batched: Batched,
    model: TransformerBridge,
    prompts: list[Prompt],
    metrics: list[Metric],
    size: int,
    arguments: Mapping[str, Any],
) -> list[Any] | None:
    """The value of each prompt, in batches of neighbours in length; None where they cannot be batched."""
    # From short to long, so that a prompt is padded to a neighbour in length: the newest is the longest of its batch.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].clean))
    batches: list[list[int]] = []
    for i in order:
        if not batches or (len(batches[-1]) + 1) * len(prompts[i].clean) > size:
            batches.append([])
        batches[-1].append(i)

    found: dict[int, Any] = {}
    for batch in track_progress(batches, "batches", quick=len(batches) < 4):
        values = batched(model, [prompts[i] for i in batch], [metrics[i] for i in batch], arguments)
        if values is None:
            return None
        found |= dict(zip(batch, values, strict=True))
    return [found[i] for i in range(len(prompts))]


@dataclass(frozen=True)
class Batch:
    """Prompts padded at their ends to one length, and what of their logits is read.

    Attributes:
        tokens: the prompts; padding repeats their last token.
        lengths: of each.
        places: the tokens whose logits are computed; None: all.
        how: arguments of the model's call.
    """

    tokens: Int[Tensor, "batch pos"]
    lengths: list[int]
    places: list[int] | None
    how: dict[str, Any]

    @classmethod
    def of(cls, model: TransformerBridge, prompts: list[Int[Tensor, " _pos"]], metrics: list[Metric]) -> "Batch":
        """Pad prompts, and find out which logits their metrics read."""
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        tokens = torch.stack([torch.cat([p, p[-1:].expand(longest - len(p))]) for p in prompts])

        # The mask tells streams which tokens are real; those before the padding see none of it either way.
        how: dict[str, Any] = {}
        if min(lengths) < longest:
            real = torch.arange(longest) < torch.tensor(lengths)[:, None]
            how["attention_mask"] = real.long().to(tokens.device)

        # Logits are the largest tensor of a small model: where every metric says which token it reads, only those are
        # made.
        at = [getattr(metric, "at", None) for metric in metrics]
        places = None
        if None not in at and "logits_to_keep" in inspect.signature(type(model.original_model).forward).parameters:
            places = sorted({place_of(cast(int, a), n) for a, n in zip(at, lengths, strict=True)})
            how["logits_to_keep"] = torch.tensor(places, device=tokens.device)
        return cls(tokens, lengths, places, how)

    def metric(self, metrics: list[Metric], logits: Float[Tensor, "batch place vocab"]) -> Float[Tensor, " batch"]:
        """The metric of each prompt, of its own logits alone."""
        found = []
        for row, (metric, length) in enumerate(zip(metrics, self.lengths, strict=True)):
            if self.places is None:
                own = logits[row : row + 1, :length]
            else:
                # A metric that reads one token sees that one's logits at every place.
                at = self.places.index(place_of(cast(Any, metric).at, length))
                own = logits[row : row + 1, at : at + 1].expand(-1, length, -1)
            of_row = of_prompts(metric, self.tokens[row : row + 1, :length])
            found.append(metric_values(of_row, own)[0])
        return torch.stack(found)


def batched_gradients(
    model: TransformerBridge, prompts: list[Prompt], metrics: list[Metric], arguments: Mapping[str, Any]
) -> list[Float[Tensor, "layer _pos"]] | None:
    """What `attribution` gives by gradient on each of some prompts, in one backward pass."""
    if arguments.keys() - {"method"} or arguments.get("method", "gradient") != "gradient":
        return None
    names = [name for _, name in hook_names(model, None, HOOK.format("increments"))]
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def note(increments: Tensor, hook: HookPoint) -> None:
        found[str(hook.name)].append(increments if increments.requires_grad else increments.requires_grad_())

    with evaluation_mode(model), torch.inference_mode(False), torch.enable_grad():
        batch = Batch.of(model, [prompt.clean.clone() for prompt in prompts], metrics)
        cfg = model.cfg

        # What the backward pass would keep of all blocks; beyond `ACTIVATIONS` it is computed twice instead.
        kept = (
            batch.tokens.numel()
            * cfg.n_layers
            * cfg.d_model
            * NUMBERS_A_TOKEN
            * cast(Any, model.original_model).dtype.itemsize
        )
        pieces = in_pieces(model) if kept > ACTIVATIONS else nullcontext()
        with own_hooks(model, [(name, note) for name in names]), pieces:
            logits = model(batch.tokens, return_type="logits", use_cache=False, **batch.how)
            value = differentiable(batch.metric(metrics, logits)).sum()
            every = [increments for calls in found.values() for increments in calls]
            gradients = iter(torch.autograd.grad(value, every, materialize_grads=True))

    # A looped model calls a layer several times, each with the increment that an edit would change.
    by_layer = torch.stack([torch.stack([next(gradients) for _ in found[name]]).sum(0) for name in names], dim=1).cpu()
    by_layer = by_layer.sum(-1) if by_layer.ndim == 4 else by_layer
    by_layer = values_of_gaps(by_layer, streams_of(model).config.gap)
    return [of_row[:, :length] for of_row, length in zip(by_layer, batch.lengths, strict=True)]


def batched_mediation(
    model: TransformerBridge, prompts: list[Prompt], metrics: list[Metric], arguments: Mapping[str, Any]
) -> list[pd.DataFrame] | None:
    """What `mediation` gives on each of some pairs. A layer's run begins at that layer, from what entered it before."""
    if arguments.keys() - {"layers"}:
        return None
    hooks = hook_names(model, arguments.get("layers"), HOOK.format("increments"))
    clean = _Side(model, [prompt.clean for prompt in prompts], metrics, hooks)
    corrupted = _Side(model, [cast(Tensor, prompt.corrupted) for prompt in prompts], metrics, hooks)

    # The paths as `mediation` defines them; a row each, in the order of `PATHS`.
    total = corrupted.own - clean.own
    layers: list[Any] = ["all", *dict(hooks)]
    effects = []
    for layer in layers:
        direct = corrupted.metric_with(layer, clean.increments) - clean.own
        through = clean.metric_with(layer, corrupted.increments) - clean.own
        effects.append(torch.stack([total, direct, through, total - direct - through]))
    values = torch.stack(effects).double().cpu().numpy()  # layer, path, prompt
    keys = pd.DataFrame(product(layers, PATHS), columns=["layer", "path"])
    return [keys.assign(mean=values[..., i].ravel()) for i in range(len(prompts))]


class _Side:
    """The clean prompts of some pairs, or the corrupted ones: what they give, and with other increments."""

    def __init__(
        self,
        model: TransformerBridge,
        prompts: list[Int[Tensor, " _pos"]],
        metrics: list[Metric],
        hooks: list[tuple[int, str]],
    ) -> None:
        self.hooks, self.metrics = hooks, metrics
        self.batch = Batch.of(model, prompts, metrics)
        self.increments: dict[str, Tensor] = {}
        record: Hooks = [(name, partial(_record, self.increments)) for _, name in hooks]
        self._replay = Replay(model, self.batch.tokens, hooks=record, tokens_too=False, how=self.batch.how)
        self.own = self.batch.metric(metrics, self._replay.logits)

    def metric_with(self, layer: Any, increments: Mapping[str, Tensor]) -> Float[Tensor, " prompt"]:
        """The metric of each prompt with these increments at one layer, or at all of them."""
        chosen = [(number, name) for number, name in self.hooks if layer in ("all", number)]
        hooks: Hooks = [(name, partial(_replace, increments[name])) for _, name in chosen]
        return self.batch.metric(self.metrics, self._replay.run(hooks, {min(dict(chosen)): 1}))


def _record(kept: dict[str, Tensor], increments: Tensor, hook: HookPoint) -> None:
    kept[str(hook.name)] = increments.detach()


def _replace(others: Tensor, increments: Tensor, hook: HookPoint) -> Tensor:
    return others.to(increments)


def _long(model: TransformerBridge, prompts: list[Prompt], found: list[Any], layers: LayerIndices) -> pd.DataFrame:
    """The value of each prompt, a row each."""
    if all(isinstance(values, pd.DataFrame) for values in found):
        return pd.concat([_of_table(row, values) for row, values in enumerate(found)], ignore_index=True)
    numbers: list[Any] = [layer for layer, _ in hook_names(model, layers, HOOK.format("increments"))]
    parts = []
    for row, (prompt, values) in enumerate(zip(prompts, found, strict=True)):
        shape = tuple(values.shape) if isinstance(values, Tensor) else ()
        if len(shape) not in (2, 3) or (shape[0], shape[-1]) != (len(numbers), len(prompt.clean)):
            what = f"shape {shape}" if shape else f"a {type(values).__name__}"
            raise PositionsError(
                f"the measurement returned {what} for prompt {row}; expected a tensor [layer pos] or [layer head pos] "
                f"with {len(numbers)} layers and {len(prompt.clean)} tokens, or a table."
            )

        # One row of the table for each entry of the tensor: its indices, flattened in the order of its values.
        layer, *head, token = np.indices(shape).reshape(len(shape), -1)
        spans, places = (np.array(column, dtype=object) for column in zip(*prompt.places, strict=True))
        columns: dict[str, Any] = {"prompt": row, "layer": np.array(numbers)[layer]}
        columns |= {"head": head[0]} if head else {}
        columns |= {"span": spans[token]} if prompt.places[0][0] else {}
        columns |= {"token": places[token].astype(int), "text": np.array(_labels(model, prompt), dtype=object)[token]}
        parts.append(pd.DataFrame({**columns, "effect": values.detach().cpu().double().numpy().ravel()}))
    return pd.concat(parts, ignore_index=True)


def _of_table(row: int, values: pd.DataFrame) -> pd.DataFrame:
    if "mean" not in values:
        raise PositionsError(
            f"the measurement returned a table with columns {', '.join(map(str, values))}; expected a column 'mean' "
            "beside its keys."
        )

    # Whatever else a table has tells rows apart; its own n and interval say nothing over prompts.
    keys = [name for name in values if name not in ("n", "mean", "low", "high")]
    return values[keys].assign(effect=values["mean"]).assign(prompt=row)[["prompt", *keys, "effect"]]


def _labels(model: TransformerBridge, prompt: Prompt) -> list[str]:
    if getattr(model, "tokenizer", None) is None:
        return [str(token) for token in prompt.clean.tolist()]
    return list(cast(Any, model.to_str_tokens(prompt.clean)))


def _summary(of_prompts: pd.DataFrame, prompts: int, seed: int) -> pd.DataFrame:
    """Mean over prompts and its bootstrap interval, a row for each place."""
    keys = [name for name in of_prompts if name not in ("prompt", "text", "effect")]
    rows = of_prompts.dropna(subset="effect")
    if rows.empty:
        raise PositionsError("no prompt has a place that was measured; expected some with tokens that align.")

    # Layers, spans and paths in the order in which they come; tokens by their number.
    ranks = {name: rows[name] if name == "token" else pd.factorize(rows[name])[0] for name in keys}
    rows = rows.iloc[np.lexsort([np.asarray(ranks[name]) for name in reversed(keys)])]

    # A prompt by cell matrix: NaN where a prompt has no such place.
    cells = rows.groupby(keys, sort=False, observed=True)
    cell = cells.ngroup().to_numpy()
    values = np.full((prompts, cells.ngroups), np.nan)
    values[rows["prompt"].to_numpy(), cell] = rows["effect"].to_numpy()
    table = rows.loc[~pd.Series(cell, rows.index).duplicated(), keys].reset_index(drop=True)

    # A token stands for a place only if every prompt has that very token there.
    if "text" in rows:
        same = (cells["text"].nunique().to_numpy() == 1) & (np.isfinite(values).sum(0) == prompts)
        table["text"] = np.where(same, cells["text"].first().to_numpy(), "")
    n = np.isfinite(values).sum(0)
    low, high = _bootstrap(values, seed)

    # One prompt resampled is the same prompt: an interval of no width that nobody should read.
    alone = n < 2
    return table.assign(
        n=n, mean=np.nanmean(values, axis=0), low=np.where(alone, np.nan, low), high=np.where(alone, np.nan, high)
    )


def _bootstrap(values: Float64[np.ndarray, "prompt cell"], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Where 95% of the means lie over resamples of prompts; a prompt that lacks a cell counts for none there."""
    draws = resamples(len(values), seed)
    low, high = np.empty(values.shape[1]), np.empty(values.shape[1])

    # Means of all resamples as one product; what a prompt lacks adds 0 to the sum and 0 to the count.
    for first in range(0, values.shape[1], CELLS_AT_ONCE):
        some = values[:, first : first + CELLS_AT_ONCE]
        counts = (draws @ np.isfinite(some)).astype(float)
        counts[counts == 0] = np.nan
        ends = interval_of(draws @ np.nan_to_num(some) / counts)
        low[first : first + CELLS_AT_ONCE], high[first : first + CELLS_AT_ONCE] = ends
    return low, high
