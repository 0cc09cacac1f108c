"""Run a prompt again from a layer and a token on.

An edit at layer l and token t changes nothing below layer l and nothing before token t. So the residual stream that
enters layer l, and the keys and values of the tokens before t, are taken from one baseline pass. Copies of the prompt
join the batch at the layer that edits them: blocks below the first are skipped, and the tokens before t stand in a
key-value cache, with what the streams remember of them in it. Where the logits of the last token alone are asked for,
the last block's MLP runs for that token alone.

Whether that holds in a model is tried, not assumed: the middle of the prompt is run again without any edit, and where
it does not give the baseline's logits back, every run is one of the whole prompt (with a warning).

Several threads may run parts of one model at once: what a run puts into the model acts in its own thread alone.
"""

import copy
import inspect
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import Module
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache

from ..core.kv_cache import memory_of
from ..core.model_state import evaluation_mode
from ..core.own_thread import in_this_thread, own_hooks, return_known_outputs
from ..core.per_head import GROWING
from ..interventions import Hooks, streams_of


class Replay:
    """The baseline pass of a prompt, or of a batch of them, and what it takes to run parts of it again.

    Attributes:
        logits: of the baseline, of the last token alone where `last_only`.
        exact: whether parts can be run again.
    """

    def __init__(
        self,
        model: TransformerBridge,
        tokens: Int[Tensor, "batch pos"],
        *,
        hooks: Hooks | None = None,
        last_only: bool = False,
        tokens_too: bool = True,
        resume: bool = True,
        tried: bool = False,
        how: Mapping[str, Any] | None = None,
    ) -> None:
        """Run the baseline.

        Args:
            model: a bridge with position streams.
            tokens: one prompt, or several of equal length, copied together (which can be resumed at layers only).
            hooks: for the baseline pass, to record from it.
            last_only: compute the logits of the last token alone.
            tokens_too: keep what is needed to resume at a token after the first.
            resume: False runs the whole prompt every time.
            tried: where `tokens_too` is False, resuming is exact, as it was for another prompt, or several others.
            how: further arguments of the model's calls, such as a mask of padding; then one copy joins at a time.
        """
        self.model = model
        self.tokens = tokens
        self._blocks: Sequence[Any] = cast(Any, getattr(model, "blocks", ()))

        # Not every architecture can leave logits out.
        forward = inspect.signature(type(model.original_model).forward).parameters
        self._last_only, self._is_masked = last_only, bool(how)
        self._prunes_mlp = False
        self._how: dict[str, Any] = {**(how or {})}
        if last_only and "logits_to_keep" in forward:
            self._how["logits_to_keep"] = 1

        # What enters each block, and what it returns: a run that starts at a block needs the first, and skips by the
        # second.
        self._inputs: list[Tensor] = []
        self._outputs: list[Any] = []
        self._cache = DynamicCache() if tokens_too and len(tokens) == 1 and tokens.shape[1] > 1 else None
        self.exact = False
        if self._cache is not None and resume:
            try:
                self.logits = self._baseline(hooks or [])
                self.exact = self._try_again() is None
            except Exception:  # recurrent layers, say, want a cache of another kind
                self.exact = False
        if not self.exact:
            # A pass that failed may have left half a cache; the baseline runs again without one.
            self._cache = None
            self.logits = self._baseline(hooks or [])
            why = self._try_again() if resume and not (tried and not tokens_too) else None
            self.exact = resume and why is None
            if why is not None and tokens_too:
                warnings.warn(
                    f"{type(model.original_model).__name__} cannot be resumed in the middle ({why}); every edit runs "
                    "the whole prompt through all layers, which is slower.",
                    stacklevel=4,
                )

    def start(self, token: int) -> int:
        """The token from which a run that concerns this token and later ones starts."""
        return token if self.exact and self._cache is not None else 0

    def run(self, hooks: Hooks, joining: Mapping[int, int], token: int = 0) -> Float[Tensor, "rows rest vocab"]:
        """The logits of the tokens from `start(token)` on (or of the last alone), with hooks.

        Args:
            hooks: what to do; tokens count from `start(token)`, rows in the order in which they join.
            joining: how many copies of the prompt join the batch at each block, the lowest block first.
            token: see above.
        """
        with evaluation_mode(self.model), torch.no_grad():
            if self.exact:
                return self._resume(hooks, joining, self.start(token))
            with own_hooks(self.model, hooks):
                return self._logits(self.tokens.repeat(sum(joining.values()), 1), None)

    def _baseline(self, hooks: Hooks) -> Tensor:
        self._inputs, self._outputs = [], []
        handles = []
        for block in self._blocks:
            handles.append(block.register_forward_pre_hook(in_this_thread(self._keep_input), with_kwargs=True))
            handles.append(block.register_forward_hook(in_this_thread(self._keep_output)))
        try:
            with evaluation_mode(self.model), torch.no_grad(), own_hooks(self.model, hooks):
                return self._logits(self.tokens, self._cache)
        finally:
            for handle in handles:
                handle.remove()

    def _try_again(self) -> str | None:
        """Run the middle of the prompt again without any edit: why that fails, or None."""
        if not self._blocks:
            return "it has no row of blocks"

        # The middle: what works at the first or last block alone is not enough.
        layer = len(self._blocks) // 2

        # Two copies that join at different blocks, as edits do; one, where more cannot be.
        joining = Counter([layer] if self._is_masked and len(self.tokens) > 1 else [layer, len(self._blocks) - 1])
        token = 0 if self._cache is None else self.tokens.shape[1] // 2
        try:
            with evaluation_mode(self.model), torch.no_grad():
                again = self._resume([], joining, token)
        except Exception as error:  # the model's own code meets input that it need not be made for
            return " ".join(str(error).split())[:200]

        # Relative to the largest logit, as rounding is; a thousand units in the last place are many layers of it.
        own = self.logits[:, -again.shape[1] :].repeat(len(again) // len(self.logits), 1, 1)
        off = float((again - own).abs().max() / own.abs().max().clamp(min=1e-30))
        rounding = min(1e3 * torch.finfo(own.dtype).eps, 0.05)
        if off > rounding:
            return f"its logits are then off by {off:.1e} of their size"
        self._prunes_mlp = self._last_only and self._can_prune(joining, token, again)
        return None

    def _can_prune(self, joining: Mapping[int, int], token: int, expected: Tensor) -> bool:
        """Whether the last block's MLP can leave out all tokens but the last: tried, as blocks differ."""
        if not isinstance(getattr(self._blocks[-1], "mlp", None), Module):
            return False
        self._prunes_mlp = True
        try:
            with evaluation_mode(self.model), torch.no_grad():
                found = self._resume([], joining, token)
        except Exception:  # a block that does more with its MLP's output than to add it
            return False

        # The arithmetic is the same but for its order.
        rounding = 32 * torch.finfo(found.dtype).eps * expected.abs().max()
        return found.shape == expected.shape and bool((found - expected).abs().max() <= rounding)

    def _resume(self, hooks: Hooks, joining: Mapping[int, int], token: int) -> Tensor:
        # How many rows are in the batch at each block: those that joined there or before.
        present = list(accumulate(joining.get(i, 0) for i in range(len(self._blocks))))
        first = min(joining)
        handles = [
            self._blocks[layer].register_forward_pre_hook(
                in_this_thread(partial(self._join, layer, copies, token, layer == first)),
                with_kwargs=True,
                prepend=True,
            )
            for layer, copies in joining.items()
        ]
        if self._prunes_mlp:
            mlp = self._blocks[-1].mlp
            handles.append(mlp.register_forward_pre_hook(in_this_thread(_last_token), with_kwargs=True))
        try:
            with (
                return_known_outputs(self._blocks[:first], self._outputs),
                own_hooks(self.model, hooks),
            ):
                return self._logits(self.tokens[:, token:], self._prefix(token, present) if token else None)
        finally:
            for handle in handles:
                handle.remove()

    def _join(
        self, layer: int, copies: int, token: int, alone: bool, _block: Any, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        # What the baseline had at this block, of the tokens that run; the first rows replace the batch, others join it.
        joined = self._inputs[layer][:, token:].repeat(copies, 1, 1)
        if args:
            return (joined if alone else torch.cat([args[0], joined]), *args[1:]), kwargs
        return args, {
            **kwargs,
            "hidden_states": joined if alone else torch.cat([kwargs["hidden_states"], joined]),
        }

    def _prefix(self, token: int, present: list[int]) -> Any:
        """The key-value cache of the tokens before one, with as many rows at each layer as are present there."""
        # A run adds keys to its cache, and the next one needs that of the baseline.
        cache: Any = copy.deepcopy(self._cache)

        # A negative number drops so many of the last tokens.
        cache.crop(token - self.tokens.shape[1])

        # Each layer has keys for the rows that are there when it runs; for layers that are skipped, for none.
        for layer, rows in zip(cache.layers, present, strict=False):
            if rows and type(layer).__name__ in GROWING:
                # Such a layer makes a new tensor when it adds keys, so that until then all rows can be views of one.
                layer.keys, layer.values = (x.expand(rows, *x.shape[1:]) for x in (layer.keys, layer.values))
            elif rows:
                layer.batch_repeat_interleave(rows)
        streams: Any = streams_of(self.model).layers

        # The streams' own record of the cached tokens has rows as well.
        memory = memory_of(cache)
        surplus = {} if memory is None else memory.surplus
        for key, values in surplus.items():
            surplus[key] = values.repeat_interleave(max(present[streams[key[0]].layer], 1), dim=0)
        return cache

    def _logits(self, tokens: Tensor, cache: Any) -> Tensor:
        how = {"use_cache": False} if cache is None else {"past_key_values": cache}
        logits = self.model(tokens, return_type="logits", **how, **self._how)
        return logits[:, -1:] if self._last_only else logits

    def _keep_input(self, _block: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._inputs.append(args[0] if args else kwargs["hidden_states"])

    def _keep_output(self, _block: Any, _args: Any, output: Any) -> None:
        self._outputs.append(output)


def _last_token(_mlp: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Give an MLP the last token alone; its output is added to all tokens, of which only the last is read."""
    if args:
        return (args[0][:, -1:], *args[1:]), kwargs
    return args, {name: x[:, -1:] if isinstance(x, Tensor) and x.ndim == 3 else x for name, x in kwargs.items()}
