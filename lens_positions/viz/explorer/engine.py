"""What a model does before and after some edits: all that the page shows, without a page.

An edit changes nothing below its layer and nothing before its token, so the pass after the edits starts there
(`measure/partial_forward.py`), from one baseline pass of the text that is kept. Edits belong to the request: they are
hooks of its own pass, and nothing of them stays in the model.
"""

import base64
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import ActivationCache

from ...causal.attribution import attribution
from ...errors import PositionsError
from ...interventions import Hooks, hook_names
from ...measure.metrics import loss, token_losses
from ...measure.partial_forward import Replay
from ...model import HookedPositionTransformer
from ...text import one_prompt
from ..output import visible_text
from .edits import as_python, first_change, hooks_of, in_words, increments_of, means_of
from .page import still
from .state import EditSpec, State, read_state

MOST_SHOWN = 128
"""Tokens of a text whose attention patterns are kept and shown whole; of a longer one only the chosen token's row."""

TEXTS_KEPT = 4
TOKENS_KEPT = 2048
"""Baselines are kept for so many texts, and for so many tokens in all; that of the last text in any case."""

CANDIDATES = 8
"""Next tokens shown: the likeliest before and the likeliest after."""

HEADS_SHOWN = 8
SEES_NOTHING = 1e-6
"""Attention that moved by less is rounding."""


@dataclass
class Baseline:
    """A text as the model reads it without edits.

    Attributes:
        key: of the model and the text.
        tokens, labels: what the model reads, and how each token is written.
        replay: the baseline pass, from which parts are run again.
        increments, positions: at each layer, in steps of standard RoPE.
        losses: of each token but the first, in nats.
        patterns: of each layer, where the text is short enough; rows of single tokens otherwise.
    """

    key: str
    tokens: Int[Tensor, "1 pos"]
    labels: list[str]
    replay: Replay
    increments: Float[Tensor, "layer pos *head"]
    positions: Float[Tensor, "layer pos *head"]
    losses: Float[Tensor, " next"]
    patterns: list[Float[Tensor, "head pos pos"]] | None
    rows: OrderedDict[int, list[Tensor]] = field(default_factory=OrderedDict)
    slopes: Float[Tensor, "layer pos"] | None = None


@dataclass
class After:
    """The same after edits; what an edit cannot reach is the baseline's."""

    increments: Float[Tensor, "layer pos *head"]
    positions: Float[Tensor, "layer pos *head"]
    losses: Float[Tensor, " next"]
    rows: list[Float[Tensor, "head pos"]] | None
    pattern: Float[Tensor, "pos pos"] | None
    at_token: Float[Tensor, " vocab"]


class Explorer:
    """One model, to be asked what it does to a text with and without edits, from any thread.

    >>> explorer = Explorer(model)
    >>> edit = {"kind": "gap", "layers": [0], "token": 5, "by": 2.5}
    >>> result = explorer.run({"text": "The cat", "edits": [edit]})
    >>> result["edits"]
    ['Layer 0: the gap before “c” (token 5) is 2.5 longer']
    """

    def __init__(self, model: HookedPositionTransformer, threads: int | None = None) -> None:
        """Take a model.

        Args:
            model: the model, which stays as it is, in eval mode.
            threads: that PyTorch may run it with; None leaves that as it is set.

        Raises:
            PositionsError: it has no tokenizer.
        """
        if getattr(model, "tokenizer", None) is None:
            raise PositionsError(f"{model.name} has no tokenizer; expected one, to read text.")
        self.model = model.eval()
        self._threads = threads
        self._turn = threading.RLock()
        self._baselines: OrderedDict[str, Baseline] = OrderedDict()
        self._others: OrderedDict[str, ActivationCache] = OrderedDict()
        streams = hook_names(model, None, "attn.hook_increments")
        self._names = {
            site: [name for _, name in hook_names(model, None, f"attn.hook_{site}")]
            for site in ("increments", "positions", "pattern")
        }
        self._layers = [layer for layer, _ in streams]
        self._attends = all(name in model.hook_dict for name in self._names["pattern"])

    def run(self, given: Any, outdated: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """What the model does before and after the edits of a state, as JSON.

        Args:
            given: the state, see `state.py`.
            outdated: asked when the model is free: whether nobody waits for this answer any more.

        Returns:
            What a page shows; {"stale": True} for an outdated question.

        Raises:
            PositionsError: no state, a text that the model cannot read, or an edit that cannot act on it.
        """
        state = read_state(given)
        start = time.perf_counter()
        with self._turn, torch.no_grad(), _with_threads(self._threads):
            if outdated():
                return {"stale": True}
            before = self._baseline(state.text)
            token, layer, head = self._choice(state, before)
            rows = self._rows(before, token)
            after = self._after(before, state.edits, token, layer, head) if state.edits else None
            result: dict[str, Any] = {
                "key": before.key,
                "looked": {"token": token, "layer": layer, "head": head},
                "next": self._next(before, after, token),
                "after": None if after is None else self._values(after),
                "edits": [in_words(self.model, edit, before.labels) for edit in state.edits],
                "python": as_python(self.model, state.text, state.edits, token),
            }
            if rows is not None:
                now = None if after is None else after.rows
                result["attention"] = self._attention(before, after, rows, now, token, layer, head, state.pattern)
                result["heads"] = [] if now is None else _rank_heads(rows, now, self._layers)
            if state.known != before.key:
                result["text"] = self._describe(before, state.text)
        return result | {"seconds": round(time.perf_counter() - start, 4)}

    def page(self, given: Any) -> str:
        """A page that shows a state before and after its edits, without a model; errors as `run`."""
        result = self.run({**given, "known": ""} if isinstance(given, dict) else given)
        return still(result, given)

    def slopes(self, given: Any, outdated: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """By how much the mean loss of a text grows with each of its gaps, without edits: one attribution pass.

        Arguments and errors as `run`.
        """
        state = read_state(given)
        with self._turn, _with_threads(self._threads):
            if outdated():
                return {"stale": True}
            with torch.no_grad():
                before = self._baseline(state.text)
            if before.slopes is None:
                if before.tokens.shape[1] < 2:
                    before.slopes = torch.zeros(len(self._layers), 1)
                else:
                    before.slopes = attribution(self.model, before.tokens, loss())
            return {"key": before.key, "slopes": _as_lists(before.slopes)}

    def hooks(self, text: str, edits: tuple[EditSpec, ...]) -> Hooks:
        """The hooks of some edits on a text, for `run_with_hooks`."""
        with self._turn, torch.no_grad():
            return hooks_of(self.model, edits, self._baseline(text).increments, self._other_text)

    def _baseline(self, text: str) -> Baseline:
        """The baseline of a text: the one that is kept, or a new one."""
        key = sha256(f"{self.model.name}\0{text}".encode()).hexdigest()[:16]
        if key not in self._baselines:
            self._baselines[key] = self._read(key, text)
        self._baselines.move_to_end(key)
        while len(self._baselines) > 1 and (
            len(self._baselines) > TEXTS_KEPT
            or sum(kept.tokens.shape[1] for kept in self._baselines.values()) > TOKENS_KEPT
        ):
            self._baselines.popitem(last=False)
        return self._baselines[key]

    def _read(self, key: str, text: str) -> Baseline:
        tokens = one_prompt(self.model, text)
        whole = self._attends and tokens.shape[1] <= MOST_SHOWN
        seen: dict[str, Tensor] = {}
        names = self._names["increments"] + self._names["positions"] + (self._names["pattern"] if whole else [])
        replay = Replay(self.model, tokens, hooks=_record_hooks(names, seen))
        increments, positions = (
            torch.stack([seen[name][0].cpu() for name in self._names[site]]) for site in ("increments", "positions")
        )
        return Baseline(
            key=key,
            tokens=tokens,
            labels=[visible_text(label) for label in self.model.to_str_tokens(tokens[0])],
            replay=replay,
            increments=increments,
            positions=positions,
            losses=token_losses(replay.logits, tokens[:, 1:])[0].cpu(),
            patterns=[seen[name][0].float().cpu() for name in self._names["pattern"]] if whole else None,
        )

    def _choice(self, state: State, before: Baseline) -> tuple[int, int, int]:
        """The token, layer and head that the page looks at."""
        length = before.tokens.shape[1]
        token = length - 1 if state.token is None else state.token
        layer = self._layers[0] if state.layer is None else state.layer
        head = 0 if state.head is None else state.head
        heads = int(self.model.cfg.n_heads)
        if token >= length or layer not in self._layers or head >= heads:
            raise PositionsError(
                f"the state looks at token {token}, layer {layer} and head {head}; expected a token below {length}, "
                f"one of the layers {self._layers} and a head below {heads}."
            )
        return token, layer, head

    def _rows(self, before: Baseline, token: int) -> list[Float[Tensor, "head pos"]] | None:
        """What a token attends to in every head before any edit; None where the model does not show it."""
        if not self._attends:
            return None
        if before.patterns is not None:
            return [pattern[:, token] for pattern in before.patterns]
        if token not in before.rows:
            seen: dict[str, Tensor] = {}
            start = before.replay.start(token)
            hooks = _record_hooks(self._names["pattern"], seen, row=token - start)
            before.replay.run(hooks, {self._layers[0]: 1}, token)
            before.rows[token] = [seen[name][0].float().cpu() for name in self._names["pattern"]]
            while len(before.rows) > TEXTS_KEPT:
                before.rows.popitem(last=False)
        return before.rows[token]

    def _after(self, before: Baseline, edits: tuple[EditSpec, ...], token: int, layer: int, head: int) -> After:
        """Run what the edits can reach, and take the rest from the baseline."""
        hooks = hooks_of(self.model, edits, before.increments, self._other_text)
        first, from_token = first_change(self.model, edits)
        start = before.replay.start(from_token)
        entry = self._layers.index(first)

        seen: dict[str, Tensor] = {}
        for site in ("increments", "positions"):
            hooks += _record_hooks(self._names[site][entry:], seen)
        whole = before.patterns is not None
        if self._attends and token >= start:
            hooks += _record_hooks(self._names["pattern"][entry:], seen, row=None if whole else token - start)
        logits = before.replay.run(hooks, {first: 1}, from_token)

        def values_of(site: str) -> Tensor:
            changed = [seen[name][0].cpu() for name in self._names[site][entry:]]
            return _join_changes(getattr(before, site), entry, start, changed)

        changed = token_losses(logits, before.tokens[:, start + 1 :])[0].cpu()
        rows = self._rows(before, token)
        pattern = None if before.patterns is None else before.patterns[self._layers.index(layer)][head]
        if rows is not None and token >= start:
            now = [seen[name][0].float().cpu() for name in self._names["pattern"][entry:]]
            rows = rows[:entry] + [of_layer[:, token - start] if whole else of_layer for of_layer in now]
            if pattern is not None and self._layers.index(layer) >= entry:
                pattern = torch.cat([pattern[:start], now[self._layers.index(layer) - entry][head]])
        at_token = logits[0, token - start] if token >= start else before.replay.logits[0, token]
        losses = torch.cat([before.losses[:start], changed])
        return After(values_of("increments"), values_of("positions"), losses, rows, pattern, at_token)

    def _other_text(self, text: str) -> ActivationCache:
        """The increments of another text, of which the last few are kept."""
        if text not in self._others:
            self._others[text] = increments_of(self.model, text)
            while len(self._others) > TEXTS_KEPT:
                self._others.popitem(last=False)
        return self._others[text]

    def _describe(self, before: Baseline, text: str) -> dict[str, Any]:
        """A text without edits, and what a page has to know of its model."""
        config = self.model.position_config
        return {
            "model": self.model.name,
            "source": config.source,
            "gap": config.gap,
            "perHead": config.per_head,
            "layers": self._layers,
            "heads": int(self.model.cfg.n_heads),
            "text": text,
            "labels": before.labels,
            "ids": before.tokens[0].tolist(),
            "means": _as_lists(means_of(self.model, before.increments)),
            "before": self._values(before),
        }

    def _values(self, values: Baseline | After) -> dict[str, Any]:
        """Increments and positions, the mean of the heads where each has its own, and losses; None has the first."""
        increments, positions = (
            of_heads.mean(-1) if of_heads.ndim == 3 else of_heads for of_heads in (values.increments, values.positions)
        )
        return {
            "increments": _as_lists(increments),
            "positions": _as_lists(positions),
            "losses": [None, *_as_lists(values.losses)],
            "loss": _as_lists(values.losses.double().mean()) if len(values.losses) else None,
        }

    def _next(self, before: Baseline, after: After | None, token: int) -> dict[str, Any]:
        """The distribution of the token after one, before and after the edits, in nats."""
        own = before.replay.logits[0, token].double().log_softmax(-1)
        now = own if after is None else after.at_token.double().log_softmax(-1)
        count = min(CANDIDATES, len(own))
        ids = {*own.topk(count).indices.tolist(), *now.topk(count).indices.tolist()}
        candidates = sorted(ids, key=lambda i: -float(now[i]))
        labels = self.model.to_str_tokens(torch.tensor(candidates))
        moved = float((own.exp() * (own - now)).nan_to_num().sum())
        return {
            "candidates": [
                {"id": i, "label": visible_text(label), "before": _as_lists(own[i]), "after": _as_lists(now[i])}
                for i, label in zip(candidates, labels, strict=True)
            ],
            "divergence": 0.0 if after is None else max(moved, 0.0),
        }

    def _attention(
        self,
        before: Baseline,
        after: After | None,
        rows: list[Tensor],
        now: list[Tensor] | None,
        token: int,
        layer: int,
        head: int,
        whole: bool,
    ) -> dict[str, Any]:
        """What a token attends to in one head, where that head puts what, and the whole pattern where it is wanted."""
        entry = self._layers.index(layer)

        def places(values: Baseline | After) -> Any:
            of_layer = values.positions[entry]
            if of_layer.ndim == 2:  # query heads share those of their group
                of_layer = of_layer[:, head * of_layer.shape[1] // int(self.model.cfg.n_heads)]
            return _as_lists(of_layer)

        result: dict[str, Any] = {
            "before": {"row": _as_lists(rows[entry][head]), "positions": places(before)},
            "after": None,
            "whole": before.patterns is not None,
        }
        if after is not None and now is not None:
            result["after"] = {"row": _as_lists(now[entry][head]), "positions": places(after)}
        if whole and before.patterns is not None:
            result["before"]["pattern"] = _pack(before.patterns[entry][head])
            if after is not None and after.pattern is not None:
                result["after"]["pattern"] = _pack(after.pattern)
        return result


@contextmanager
def _with_threads(count: int | None) -> Iterator[None]:
    """Let PyTorch use so many threads in what this thread runs, and as many as before afterwards."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _record_hooks(names: list[str], seen: dict[str, Tensor], row: int | None = None) -> Hooks:
    """Hooks that keep what stands at some hook points, or one query's row of a pattern."""

    def keep(name: str, activation: Tensor, hook: Any) -> None:
        kept = activation.detach() if row is None else activation.detach()[:, :, row]
        seen[name] = kept.clone()

    return [(name, partial(keep, name)) for name in names]


def _join_changes(own: Tensor, entry: int, start: int, changed: list[Tensor]) -> Tensor:
    """A baseline's values [layer pos *head] with those from a layer and a token on in their place."""
    whole = own.clone()
    whole[entry:, start:] = torch.stack(changed).to(whole)
    return whole


def _rank_heads(before: list[Tensor], after: list[Tensor], layers: list[int]) -> list[dict[str, Any]]:
    """The heads whose attention of the chosen token moved most, by total variation: the share that went elsewhere."""
    moved = torch.stack([(now - own).abs().sum(-1) / 2 for own, now in zip(before, after, strict=True)])
    most = moved.flatten().topk(min(HEADS_SHOWN, moved.numel()))
    heads = moved.shape[1]
    return [
        {"layer": layers[place // heads], "head": place % heads, "by": _as_lists(torch.tensor(value))}
        for value, place in zip(most.values.tolist(), most.indices.tolist(), strict=True)
        if value > SEES_NOTHING
    ]


def _as_lists(values: Tensor) -> Any:
    """Numbers with seven digits, in lists of the tensor's shape."""
    return _round(values.detach().double().cpu().tolist())


def _round(values: Any) -> Any:
    if not isinstance(values, list):
        return float(f"{values:.7g}")
    if values and isinstance(values[0], list):
        return [_round(value) for value in values]
    return [float(f"{value:.7g}") for value in values]


def _pack(pattern: Float[Tensor, "pos pos"]) -> str:
    """The lower triangle of a head as whole numbers from 0 to 65535, in base 64."""
    rows, columns = torch.tril_indices(*pattern.shape).unbind()
    whole = (pattern[rows, columns].clamp(0, 1) * 65535).round().numpy().astype("<u2")
    return base64.b64encode(np.ascontiguousarray(whole).tobytes()).decode("ascii")
