"""Through which heads a distance acts: an edited gap that reaches one receiver, and nothing else.

    gap before a token, longer at some layers (the senders)
      -> their heads' rotations -> what their attention adds to the residual stream
        -> one receiver: a head, its queries or its keys, or the residual stream that enters a later layer
          -> everything after it, which responds

Everything else is frozen at what it is without the edit: the attention of the senders reads the residual stream of the
baseline, no other attention and no MLP responds before the receiver, and all that the receiver does not get keeps its
baseline values. So this is path patching with direct paths from the senders to the receiver (Wang et al.,
"Interpretability in the Wild", arXiv 2211.00593; Goldowsky-Dill et al., "Localizing Model Behavior with Path Patching",
arXiv 2304.05969), with a distance as what is patched. At a sender's own layer the receiver gets the edited rotation
itself.

Direction: effects are the metric with the edit through one receiver minus the metric without it. They need not sum to
the effect of the edit: paths through two heads count for both, and queries and keys that both move by the same distance
leave their scores as they were, where either alone does not.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from ..core.model_state import evaluation_mode
from ..core.own_thread import own_hooks
from ..errors import PositionsError
from ..interventions import HeadIndices, HeadKind, Hooks, LayerIndices, add_gap, edited_token, index_of
from ..measure.metrics import Metric, baseline_of, metric_values, of_prompts
from ..measure.partial_forward import Replay
from ..progress import track_progress
from ..text import Mask, TextOrTokens, one_prompt
from .sweeps import TOKENS_A_BATCH, keys_apart, known_hooks, whole_logits

Receivers = Literal["head", "query", "key", "resid"]

RECEIVERS: dict[str, str] = {
    "head": "attn.hook_z",
    "query": "attn.hook_rot_q",
    "key": "attn.hook_rot_k",
    "resid": "hook_resid_pre",
}
"""The hook that has what a receiver gets, [batch pos head ...], or [batch pos d_model]."""


def path_sweep(
    model: TransformerBridge,
    tokens: TextOrTokens,
    metric: Metric,
    before: int,
    length: float = 1.0,
    layers: LayerIndices = None,
    receivers: Receivers = "head",
    *,
    heads: HeadIndices = None,
    head_kind: HeadKind = "query",
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> Float[Tensor, "layer *head"]:
    """The effect of one longer gap through each receiver alone.

    Args:
        model: a bridge with position streams.
        tokens: one prompt, as text or as tokens.
        metric: from logits [batch pos vocab] to one number a row.
        before: the token that the gap is before.
        length: positions to add to it.
        layers: the senders, where the gap is longer; None is all that rotate.
        receivers: "head", all that a query head reads and rotates (queries, keys, values); "query" or "key", its
            rotated queries, or the rotated keys as it alone sees them; "resid", the residual stream entering a layer.
        heads, head_kind: heads of the senders whose gap is longer; None is all of them.
        attention_mask, prepend_bos: as for `gap_sweep`.

    Returns:
        Entry [l, h] for query head h of layer `model.position_layers[l]`, or [l] for "resid": the metric with the edit
        through it minus the metric without. 0 before the first sender.

    Raises:
        PositionsError: no streams, no such layer, head, token or kind of receiver, or a bridge without these hooks.

    >>> metric = lp.causal.log_probability(ord("."))
    >>> effects = lp.causal.path_sweep(model, "The cat sat", metric, before=4, layers=0, receivers="query")
    >>> effects.shape  # layer, head: which later heads ask differently as that gap is longer at layer 0
    torch.Size([6, 4])
    """
    if receivers not in RECEIVERS:
        raise PositionsError(f"receivers is {receivers!r}; expected one of {', '.join(RECEIVERS)}.")

    prompt = one_prompt(model, tokens, attention_mask, prepend_bos)
    expected = f"the index of a token after the first, from 1 to {prompt.shape[1] - 1}"
    before = index_of(before, "before", expected, least=1, most=prompt.shape[1] - 1)
    edit = add_gap(model, before, length, layers, heads, head_kind=head_kind)

    # All layers are in the result; those below the first sender hear nothing of it, and stay 0.
    names = known_hooks(model, RECEIVERS[receivers], None)
    also = keys_apart(model) if receivers == "key" else []
    senders = [int(name.split(".")[-3]) for name, _ in edit]

    frozen = _Frozen(model, prompt)
    values = frozen.through(edit, names, also)
    later = [place for place, (layer, _) in enumerate(names) if layer >= min(senders)]
    return _effects(frozen.replay, metric, _Receivers(names, later, values, also), edited_token(model, before))


class _Frozen:
    """A prompt without the edit, and what an edit does when all but the direct paths is held.

    Attributes:
        replay: the baseline.
    """

    def __init__(self, model: TransformerBridge, prompt: Int[Tensor, "1 pos"]) -> None:
        self.model = model
        self.prompt = prompt
        blocks = range(len(cast(Any, model).blocks))
        self.resid = [f"blocks.{i}.hook_resid_pre" for i in blocks]
        self.mlp = [f"blocks.{i}.hook_mlp_out" for i in blocks]
        missing = [name for name in (*self.resid, *self.mlp) if name not in model.hook_dict]
        if missing:
            raise PositionsError(f"the model has no {missing[0]}; expected a bridge whose blocks can be held there.")

        # The baseline at every place that a run below is held at.
        self._own: dict[str, Tensor] = {}
        record: Hooks = [(name, partial(_keep, self._own, name)) for name in (*self.resid, *self.mlp)]

        # Hooks of the user may do anything, so what they changed is computed anew in each run.
        hooked = any(point.has_hooks("fwd") for point in model.hook_dict.values())
        self.replay = Replay(model, prompt, hooks=record, resume=not hooked)

    def through(self, edit: Hooks, names: list[tuple[int, str]], also: Hooks) -> dict[str, Tensor]:
        """What each receiver gets by the direct paths from an edit: values at their hooks."""
        # Every block reads the baseline, so that it adds what the edit does in its own attention.
        entering: dict[str, Tensor] = {}
        hold: Hooks = [(name, partial(_hold, entering, name, self._own[name])) for name in self.resid]
        hold += [(name, partial(_hold, {}, name, self._own[name])) for name in self.mlp]
        self._run(edit + hold)

        # The first block's input is the embeddings. What enters another has what the one before it added.
        changed: dict[str, Tensor] = {}
        total = torch.zeros_like(self._own[self.resid[0]])
        for name in self.resid:
            total = total + (entering[name] - self._own[name])
            changed[name] = self._own[name] + total

        # Receivers read the changed stream, with the edit in place; what they get is noted and goes no further.
        got: dict[str, Tensor] = {}
        move: Hooks = [(name, partial(_hold, {}, name, changed[name])) for name in self.resid]
        keep: Hooks = [(name, partial(_keep, got, name)) for _, name in names]
        self._run(edit + also + move + keep)

        # A hook that never ran would leave the baseline there: an effect of 0 that is none.
        silent = [name for _, name in names if name not in got]
        if silent:
            raise PositionsError(
                f"{silent[0]} never ran in this model, whose bridge does not show it; expected other receivers, "
                'such as "head".'
            )
        return got

    def _run(self, hooks: Hooks) -> None:
        with evaluation_mode(self.model), torch.no_grad(), own_hooks(self.model, hooks):
            self.model(self.prompt, return_type="logits", use_cache=False)


def _keep(kept: dict[str, Tensor], name: str, values: Tensor, hook: Any) -> None:
    kept[name] = values.detach().clone()


def _hold(entering: dict[str, Tensor], name: str, value: Tensor, values: Tensor, hook: Any) -> Tensor:
    """Note what comes, and let something else go on."""
    entering[name] = values.detach().clone()
    return value.expand_as(values)


@dataclass(frozen=True)
class _Receivers:
    """What receivers get.

    Attributes:
        names: the number of each layer and its hook.
        later: the places of the layers that an edit can reach.
        values: of the whole prompt, by the name of a hook.
        also: hooks that every run needs.
    """

    names: list[tuple[int, str]]
    later: list[int]
    values: dict[str, Tensor]
    also: Hooks


def _effects(replay: Replay, metric: Metric, receivers: _Receivers, token: int) -> Float[Tensor, "layer *head"]:
    """Give each receiver what it gets, one in each row of a batch, and let all after it respond."""
    metric = of_prompts(metric, replay.tokens)
    baseline = baseline_of(metric, replay.logits)
    start = replay.start(token)

    # Queries, keys and outputs have a head axis, [batch pos head ...]; the residual stream has none.
    first = receivers.values[receivers.names[0][1]]
    by_head = first.ndim == 4
    units = [(place, head) for place in receivers.later for head in (range(first.shape[2]) if by_head else [None])]
    at_once = max(1, TOKENS_A_BATCH // (replay.tokens.shape[1] - start))
    effects = torch.zeros(len(receivers.names), first.shape[2] if by_head else 1, dtype=torch.float64)

    batches = [units[i : i + at_once] for i in range(0, len(units), at_once)]
    for batch in track_progress(batches, "following paths", quick=len(batches) < 4):
        rows: dict[int, list[tuple[int, int | None]]] = {}
        joining: Counter[int] = Counter()
        for row, (place, head) in enumerate(batch):
            rows.setdefault(place, []).append((row, head))
            joining[receivers.names[place][0]] += 1

        hooks: Hooks = list(receivers.also)
        for place, of_place in rows.items():
            name = receivers.names[place][1]
            hooks.append((name, partial(_receive, receivers.values[name][:, start:], of_place)))

        # Rows join at the layer of their receiver; up to there they would all be the baseline.
        logits = whole_logits(None, replay.logits, replay.run(hooks, joining, token), start)
        for (place, head), value in zip(batch, metric_values(metric, logits).double().tolist(), strict=True):
            effects[place, head or 0] = value - baseline

    # Differences are taken in double precision, and are as exact as the logits were.
    effects = effects.to(replay.logits.dtype if replay.logits.dtype == torch.float64 else torch.float32)
    return effects if by_head else effects[:, 0]


def _receive(got: Tensor, rows: list[tuple[int, int | None]], values: Tensor, hook: Any) -> Tensor:
    """Give each of some rows its value, in one head or in all."""
    edited = values.clone()
    for row, head in rows:
        if head is None:
            edited[row] = got[0]
        else:
            edited[row, :, head] = got[0, :, head]
    return edited
