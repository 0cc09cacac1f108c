"""Calls of a bridge in which nothing that is handed over goes unheard.

TransformerLens' `forward`, `run_with_cache`, `run_with_hooks` and `generate` pass every keyword that they do not know
on to the model, whose own `**kwargs` swallow it: a hook function is then called no time, `num_beams=4` searches
nothing, and nobody says so. Here `fwd_hooks` and `bwd_hooks` work wherever they mean something, and a keyword, a hook
name or a hook function that nothing hears is refused before the model runs.

    forward, run_with_cache     heard are TransformerLens' own keywords, and those of the model's forward
    run_with_hooks              the same
    generate                    TransformerLens' own, and what the model's forward takes beside the prompt (images);
                                settings of transformers' generate are `hf_generate`'s
    generate_stream             TransformerLens' own
    hf_generate                 transformers' own, which it checks itself

TransformerLens pads texts of different length itself, and hands on no mask of that padding, or one that it guesses from
the tokens. Here such texts go on as tokens beside their mask, so that each gives what it gives alone.

Several threads may run one model, each with hooks of its own: what is given to a call (`fwd_hooks`, a cache) belongs to
that call's passes. Hooks of `with model.hooks(...)` and `add_hook` are the model's, and act in every thread.
"""

import difflib
import inspect
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import GenerationConfig, GenerationMixin
from transformers.utils import TransformersKwargs

from .core.own_thread import OwnHookPoint, in_this_thread
from .core.transformer_lens_internals import OwnHandles, build_alias_to_canonical_map, hook_registry, runs_before_blocks
from .errors import PositionsError
from .text import pad_prompts, prompts_of

HookPairs = Iterable[tuple[Any, Any]] | None
"""(hook name or filter of hook names, hook function) pairs, as TransformerLens takes them."""

TAKEN_OUT = {"one_zero_attention_mask", "use_past_kv_cache", "use_cache"}
"""Keywords that TransformerLens' forward finds in its `**kwargs`."""

OF_FLASH_ATTENTION = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "is_causal", "seq_idx"}
"""Keywords that every transformers model passes down, for kernels that a bridge does not run."""

OF_THE_PROMPT = {"position_ids", "past_key_values", "labels", "inputs_embeds"}
"""Keywords of a forward pass that `generate` would hand over with the prompt and forget at the next token."""


_CACHING = threading.local()
"""Which models each thread fills a cache of."""

COUNT_PADDING = {"repetition_penalty": 1.0, "freq_penalty": 0.0, "no_repeat_ngram_size": 0, "min_length": 0}
"""Settings of a generation that count the padding among the tokens of a prompt, and what they are when they are off."""


class HookedCalls(OwnHandles, TransformerBridge):
    """A TransformerBridge that hears hooks in every call and refuses keywords that nothing hears."""

    @property
    def hook_dict(self) -> Any:
        """The hook points by name; while this thread fills a cache, as its own pass alone meets them."""
        points = super().hook_dict
        if id(self) not in getattr(_CACHING, "models", ()):
            return points
        return {name: OwnHookPoint(point) for name, point in points.items()}

    def forward(
        self, input: Any, *args: Any, fwd_hooks: HookPairs = (), bwd_hooks: HookPairs = (), **kwargs: Any
    ) -> Any:
        """Run the model, as `TransformerBridge.forward`, with hooks for this pass where any are given.

        Args:
            input: text, a list of texts, tokens [batch, pos] or [pos], or embeddings [batch, pos, d_model]. Of texts of
                different length, the shorter are padded and their padding is masked: a loss is the mean over real
                tokens, and 0 at padding with `loss_per_token`.
            args, kwargs: as `TransformerBridge.forward` (return_type, prepend_bos, attention_mask, ...) and the
                model's own forward (position_ids, logits_to_keep, ...).
            fwd_hooks: (hook name or filter, hook function) pairs, for this pass, beside hooks that are active.
            bwd_hooks: the same for the gradients of this pass, whenever its backward pass runs.

        Raises:
            PositionsError: a keyword, hook name or hook function that nothing hears, backward hooks while gradients
                are off, or texts of different length with a mask that shows their padding.

        Warns:
            UserWarning: a hook function was not called, as the model does not come by its hook point.
        """
        kwargs = _by_name("forward", args, kwargs)
        forward, backward = self._heard("forward", input, kwargs, fwd_hooks, bwd_hooks)
        if forward or backward:
            # TransformerLens' forward knows no hooks; run_with_hooks does, and comes back to it with them in place.
            return self.run_with_hooks(input, fwd_hooks=forward, bwd_hooks=backward, **kwargs)
        input = self._mask_padding("forward", input, kwargs)
        return super().forward(input, **kwargs)

    def run_with_hooks(
        self, input: Any, fwd_hooks: HookPairs = (), bwd_hooks: HookPairs = (), *args: Any, **kwargs: Any
    ) -> Any:
        """Run the model with hooks, as `TransformerBridge.run_with_hooks`; refusals and warnings as `forward`."""
        kwargs = _by_name("run_with_hooks", args, kwargs, after=3)
        forward, backward = self._heard("run_with_hooks", input, kwargs, fwd_hooks, bwd_hooks)
        input = self._mask_padding("run_with_hooks", input, kwargs)
        with _count_calls(forward, kwargs) as counted:
            return super().run_with_hooks(input, counted, backward, **kwargs)

    def run_with_cache(
        self, input: Any, *args: Any, fwd_hooks: HookPairs = (), bwd_hooks: HookPairs = (), **kwargs: Any
    ) -> Any:
        """Run the model and keep its activations, as they are after the hooks that are given.

        Arguments, refusals and warnings as `forward`, and those of `TransformerBridge.run_with_cache` (names_filter,
        pos_slice, incl_bwd, ...). With `start_at_layer`, hooks before that layer are left out, as in run_with_hooks.
        """
        kwargs = _by_name("run_with_cache", args, kwargs)
        forward, backward = self._heard("run_with_cache", input, kwargs, fwd_hooks, bwd_hooks)
        if isinstance(input, str):
            kwargs.pop("padding_side", None)  # one text has none; its tokens would be refused with it
        input = self._mask_padding("run_with_cache", input, kwargs)
        if kwargs.get("start_at_layer") is not None:
            # Layers may be counted from the end.
            start = kwargs["start_at_layer"] % len(self.blocks)
            forward, backward = (self._from_layer(start, pairs) for pairs in (forward, backward))
        keep = {name: kwargs[name] for name in ("reset_hooks_end", "clear_contexts") if name in kwargs}
        with self._with_hooks(forward, backward, kwargs, **keep), _note_caching(self):
            return super().run_with_cache(input, **kwargs)

    def generate(
        self, input: Any = "", *args: Any, fwd_hooks: HookPairs = (), bwd_hooks: HookPairs = (), **kwargs: Any
    ) -> Any:
        """Continue a text, as `TransformerBridge.generate`, with hooks in every forward pass of it.

        With a key-value cache, hooks are called once for the prompt and once for each new token but the last.

        Args:
            input: text, a list of texts, or tokens [batch, pos] or [pos]. Texts of different length are padded on the
                left, whatever `padding_side` is.
            args, kwargs: as `TransformerBridge.generate`; `use_cache` is `use_past_kv_cache`.
            fwd_hooks: as `forward`.
            bwd_hooks: refused, as nothing is differentiated.

        Raises:
            PositionsError: as `forward`, a setting that only transformers' own generate hears, or one that would count
                the padding of a prompt.
        """
        kwargs = _by_name("generate", args, kwargs)
        if kwargs.get("use_cache") is not None:
            # TransformerLens has a name of its own for what transformers calls use_cache.
            kwargs["use_past_kv_cache"] = kwargs["use_cache"]
        kwargs.pop("use_cache", None)
        forward = self._heard_in_generation("generate", kwargs, fwd_hooks, bwd_hooks)
        input = self._mask_padding("generate", input, kwargs)
        with self._with_hooks(forward, [], kwargs):
            return super().generate(_as_batch(input), **kwargs)

    def generate_stream(
        self, input: Any = "", *args: Any, fwd_hooks: HookPairs = (), bwd_hooks: HookPairs = (), **kwargs: Any
    ) -> Any:
        """Continue a text piece by piece, as `TransformerBridge.generate_stream`; hooks as `generate`.

        Hooks are active while a piece is computed, and not between pieces.
        """
        kwargs = _by_name("generate_stream", args, kwargs)
        forward = self._heard_in_generation("generate_stream", kwargs, fwd_hooks, bwd_hooks)
        input = self._mask_padding("generate_stream", input, kwargs)
        pieces = super().generate_stream(_as_batch(input), **kwargs)
        return self._pieces_with_hooks(pieces, forward) if forward else pieces

    def hf_generate(
        self, input: Any = "", *args: Any, fwd_hooks: HookPairs = (), bwd_hooks: HookPairs = (), **kwargs: Any
    ) -> Any:
        """Continue a text with transformers' own generate, as `TransformerBridge.hf_generate`; hooks as `generate`."""
        _refuse_backward("hf_generate", bwd_hooks)
        mask = kwargs.get("attention_mask")
        if _several_texts(input):
            # Whether several texts will be padded shows in their lengths: there is no mask yet.
            padding = len(set(map(len, self.tokenizer(input)["input_ids"]))) > 1
        else:
            padding = isinstance(mask, Tensor) and not mask.all()
        if padding:
            _refuse_counting("hf_generate", vars(self.original_model.generation_config) | kwargs)
        with self._with_hooks(self._pairs(fwd_hooks, "fwd_hooks"), [], {}):
            return super().hf_generate(_as_batch(input), *args, **kwargs)

    def hooks(
        self, fwd_hooks: HookPairs = (), bwd_hooks: HookPairs = (), *args: Any, **kwargs: Any
    ) -> AbstractContextManager[Any]:
        """Hooks for a while, as `TransformerBridge.hooks`.

        Raises:
            PositionsError: a hook name or a hook function that there is not; a filter that no name passes.
        """
        forward, backward = self._pairs(fwd_hooks, "fwd_hooks"), self._pairs(bwd_hooks, "bwd_hooks")
        return super().hooks(forward, backward, *args, **kwargs)

    @contextmanager
    def _with_hooks(
        self, forward: list[Any], backward: list[Any], kwargs: Mapping[str, Any], **keep: bool
    ) -> Iterator[None]:
        with ExitStack() as stack:
            if forward or backward:
                counted = stack.enter_context(_count_calls(forward, kwargs))
                stack.enter_context(super().hooks(counted, backward, **keep))
            yield

    def _pieces_with_hooks(self, pieces: Any, forward: list[Any]) -> Iterator[Any]:
        # Hooks are on only while a piece is computed: between pieces the caller may run the model for something else.
        done = object()
        try:
            with _count_calls(forward, {}) as counted:
                while True:
                    with super().hooks(counted):
                        piece = next(pieces, done)
                    if piece is done:
                        return
                    yield piece
        finally:
            pieces.close()

    def _heard(
        self, method: str, input: Any, kwargs: Mapping[str, Any], fwd_hooks: HookPairs, bwd_hooks: HookPairs
    ) -> tuple[list[Any], list[Any]]:
        """Check the keywords and hooks of a call, nothing of which may go unheard, and return the hooks."""
        known = _keywords(method) | _keywords("forward")
        if not kwargs.keys() <= known:
            self._refuse_unknown(method, kwargs.keys() - known)
        if isinstance(input, Tensor):
            _refuse_for_tokens(method, kwargs)
        self._refuse_layer(kwargs.get("stop_at_layer"))
        if kwargs.get("return_dict") is False and kwargs.get("return_type") == "logits_and_cache":
            raise PositionsError(
                "return_dict=False hides the key-value cache that return_type='logits_and_cache' asks for; expected "
                "one of the two."
            )
        backward = self._pairs(bwd_hooks, "bwd_hooks")
        if backward and not torch.is_grad_enabled():
            raise PositionsError(
                "bwd_hooks were given while gradients are off, so that none would be called; expected "
                "torch.enable_grad()."
            )
        return self._pairs(fwd_hooks, "fwd_hooks"), backward

    def _mask_padding(self, method: str, input: Any, kwargs: dict[str, Any]) -> Any:
        """Several texts as tokens, with the mask of their padding among the keywords; other input as it is."""
        generates = method.startswith("generate")
        if _several_texts(input) and self._pads_as_texts_alone(generates):
            prompts = prompts_of(self, input, prepend_bos=kwargs.pop("prepend_bos", None), whole=generates)
            side = kwargs.pop("padding_side", None)
            input, real = pad_prompts(self.tokenizer, prompts, "left" if generates else side)
            _hand_on(method, real.bool(), kwargs)
            if generates and kwargs.get("return_type", "input") == "input":
                kwargs["return_type"] = "str"  # as for texts
        mask = kwargs.get("attention_mask")
        if generates and isinstance(mask, Tensor) and not mask.all():
            _refuse_counting(method, kwargs)
        return input

    def _pads_as_texts_alone(self, generates: bool) -> bool:
        """Whether texts can be padded and masked here; TransformerLens refuses some models, and pads others itself."""
        if getattr(self.original_model.config, "is_encoder_decoder", False):
            return False
        return not generates or bool(getattr(self.adapter, "supports_batched_generation", True))

    def _heard_in_generation(
        self, method: str, kwargs: Mapping[str, Any], fwd_hooks: HookPairs, bwd_hooks: HookPairs
    ) -> list[Any]:
        """Check the keywords and hooks of a generation as `_heard` does, and return its forward hooks."""
        _refuse_backward(method, bwd_hooks)
        unknown = kwargs.keys() - _keywords(method)
        for name in sorted(unknown & OF_THE_PROMPT):
            raise PositionsError(
                f"{method} would hear {name} with the prompt and not with the tokens after it; expected "
                f"hf_generate(tokens, {name}=...), or attention_mask for padding."
            )
        for name in sorted(unknown & _settings_of_transformers()):
            raise PositionsError(
                f"{method} does not hear {name}, a setting of transformers' own generate; expected "
                f"hf_generate(tokens, {name}=...), which does."
            )
        if unknown:
            self._refuse_unknown(method, unknown)
        return self._pairs(fwd_hooks, "fwd_hooks")

    def _refuse_unknown(self, method: str, unknown: set[str]) -> None:
        """Refuse the keywords that the model's forward does not hear either."""
        heard: set[str] = set()
        if method != "generate_stream":  # which hands the model nothing
            heard |= model_keywords(self.original_model)
        if not method.startswith("generate"):
            heard |= _keywords("forward") | TAKEN_OUT
            if "decoder_input_ids" in heard:
                heard |= {"decoder_input"}
            if getattr(self.cfg, "is_stateful", False):
                heard |= {"cache_position", "cache_params"}  # TransformerLens' own generation hands them over

        for name in sorted(unknown - heard):
            if name in OF_FLASH_ATTENTION:
                raise PositionsError(
                    f"{method} does not hear {name}, which is for attention kernels that a bridge does not run; "
                    "expected attention_mask (and position_ids for packed documents)."
                )
            expected = sorted(heard | _keywords(method))
            near = difflib.get_close_matches(name, expected, n=1)
            raise PositionsError(
                f"{method} was given {name}, which neither TransformerLens nor {type(self.original_model).__name__} "
                f"hears; expected {f'{near[0]}, or another' if near else 'one'} of {', '.join(expected)}."
            )

    def _refuse_layer(self, stop: Any) -> None:
        """Refuse a layer past the last block: TransformerLens would run to the end and return logits."""
        blocks = getattr(self, "blocks", None)
        if stop is not None and blocks is not None and not -len(blocks) <= stop < len(blocks):
            raise PositionsError(
                f"stop_at_layer is {stop}; expected a layer from 0 to {len(blocks) - 1}, before which to stop "
                f"(blocks.{len(blocks) - 1}.hook_resid_post is what leaves the last)."
            )

    def _pairs(self, given: HookPairs, argument: str) -> list[Any]:
        """Hooks as a list, each of them one that can be called."""
        if given is None:
            return []
        if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
            raise PositionsError(
                f"{argument} is a {type(given).__name__}; expected a list of (hook name or filter, hook function) "
                "pairs."
            )
        pairs = list(given)
        own = hook_registry(self)

        # Most names are found in the registry; aliases are listed only where one is not.
        every: Mapping[str, Any] = own
        for pair in pairs:
            name = _valid_name(pair, argument)
            if isinstance(name, str) and name in every:
                continue
            if every is own:
                known = self.hook_dict
                every = {**dict.fromkeys(build_alias_to_canonical_map(known)), **known}
            if isinstance(name, str) and name not in every:
                near = difflib.get_close_matches(name, every, n=1)
                raise PositionsError(
                    f"{argument} names {name!r}, which is no hook point of this model; expected a name in hook_dict"
                    f"{f', such as {near[0]!r}' if near else ''}."
                )
            if not isinstance(name, str) and not any(map(name, every)):
                raise PositionsError(
                    f"{argument} has a filter that no hook point passes, so that its function would not be called; "
                    "expected one that is true of some name in hook_dict."
                )
        return pairs

    def _from_layer(self, start: int, pairs: list[Any]) -> list[Any]:
        """The hooks of the blocks that a pass from a layer on computes."""

        def runs(name: str) -> bool:
            # "blocks.3.attn.hook_q": the number of the block is the second part.
            number = name.split(".")[1] if name.startswith("blocks.") else ""
            return not runs_before_blocks(self, name) and not (number.isdigit() and int(number) < start)

        chosen: list[Any] = []
        for name, function in pairs:
            if not isinstance(name, str):
                chosen.append((lambda n, passes=name: passes(n) and runs(n), function))
            elif runs(name):
                chosen.append((name, function))
        return chosen


def model_keywords(model: Any) -> frozenset[str]:
    """The keywords that a model's forward hears in a bridge: its own, and those of the models inside it.

    Args:
        model: a transformers model, or a PeftModel around one.
    """
    parts = [model]
    for inner in ("get_base_model", "get_decoder"):  # of a PeftModel, and of a model of images and text
        if hasattr(model, inner):
            parts.append(getattr(model, inner)())

    # A model for causal language hands its keywords to the decoder inside it.
    parts += [part.base_model for part in parts[:2] if hasattr(part, "base_model")]
    heard, passes_on = _parameters(tuple(dict.fromkeys(map(type, parts))))
    if passes_on:
        heard |= (TransformersKwargs.__optional_keys__ | {"return_dict"}) - OF_FLASH_ATTENTION
        heard -= {"num_items_in_batch"}  # for a loss that a bridge computes itself
    return heard - {"input_ids"}


@lru_cache
def _parameters(models: tuple[Any, ...]) -> tuple[frozenset[str], bool]:
    """The named parameters of some models' forward, and whether the first passes others on."""
    every = [inspect.signature(model.forward).parameters.values() for model in models]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = {p.name for parameters in every for p in parameters if p.kind in kinds}

    # Only the outermost decides whether others get through: it is the one that is called.
    return frozenset(names - {"self"}), any(p.kind is inspect.Parameter.VAR_KEYWORD for p in every[0])


@lru_cache
def _keywords(method: str) -> frozenset[str]:
    """The keywords of one of TransformerLens' methods."""
    own = frozenset(_order(method))
    return own | {"device"} if method == "run_with_cache" else own


@lru_cache
def _order(method: str) -> tuple[str, ...]:
    parameters = inspect.signature(getattr(TransformerBridge, method)).parameters.values()

    # Without `self` and the input.
    return tuple(p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD)[2:]


@lru_cache
def _settings_of_transformers() -> frozenset[str]:
    """What transformers' generate takes."""
    taken = inspect.signature(GenerationMixin.generate).parameters
    named = frozenset(taken) - {"self", "inputs", "kwargs"}
    return named | {name for name in vars(GenerationConfig()) if not name.startswith("_")}


def _by_name(method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], after: int = 1) -> dict[str, Any]:
    """All arguments after the input by name."""
    names = _order(method)[after - 1 :]
    named = dict(zip(names, args, strict=False))
    if len(args) > len(names) or named.keys() & kwargs.keys():
        raise TypeError(f"{method}() takes at most {len(names) + after} arguments, each once")
    return named | dict(kwargs)


def _as_batch(input: Any) -> Any:
    one = isinstance(input, Tensor) and input.ndim == 1 and not input.is_floating_point()
    return input[None] if one else input


def _several_texts(input: Any) -> bool:
    return isinstance(input, list) and len(input) > 1 and all(isinstance(one, str) for one in input)


def _hand_on(method: str, real: Bool[Tensor, "batch pos"], kwargs: dict[str, Any]) -> None:
    """Put the mask of padding among the keywords, where there is padding and they have none."""
    if real.all():
        return
    name = "one_zero_attention_mask" if kwargs.get("attention_mask") is None else "attention_mask"
    mask = kwargs.get(name)
    if mask is None and kwargs.get("past_key_values") is None:
        kwargs["attention_mask"] = real.long()
        return
    if mask is None:
        raise PositionsError(
            f"{method} was given texts of different length with past_key_values and no mask; expected attention_mask "
            "for what is cached and for the texts, or texts of equal length."
        )
    if mask.ndim != 2:
        return

    # The mask may also cover a cache before the texts: their part is its end.
    padding, shown = ~real.to(mask.device), mask[:, -real.shape[1] :] != 0
    if shown.shape != padding.shape or (shown & padding).any():
        raise PositionsError(
            f"{name} of shape {tuple(mask.shape)} shows padding of the texts, which are {tuple(real.shape)} with it; "
            "expected 0 there, or texts without a mask, which get their own."
        )


def _refuse_counting(method: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings of a generation that would count padding."""
    for name, off in COUNT_PADDING.items():
        if (given := settings.get(name)) is not None and given != off:
            raise PositionsError(
                f"{method} was given padded prompts with {name} {given}, which counts padding among their tokens; "
                f"expected one prompt at a time, prompts of equal length, or {name}={off}."
            )


def _valid_name(pair: Any, argument: str) -> Any:
    """The name or filter of a pair whose function can be called."""
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not (isinstance(pair[0], str) or callable(pair[0])):
        raise PositionsError(
            f"{argument} has a {type(pair).__name__} that is no (hook name or filter, hook function) pair; expected a "
            "list of such pairs."
        )
    name, function = pair
    if not callable(function):
        at = repr(name) if isinstance(name, str) else "a filter"
        raise PositionsError(
            f"{argument} has a {type(function).__name__} as the hook function at {at}; expected a function of the "
            "activation and its hook."
        )
    return name


def _refuse_backward(method: str, bwd_hooks: HookPairs) -> None:
    if bwd_hooks is not None and not (isinstance(bwd_hooks, tuple | list) and len(bwd_hooks) == 0):
        raise PositionsError(
            f"{method} was given bwd_hooks and differentiates nothing; expected fwd_hooks, or bwd_hooks for forward, "
            "run_with_hooks or run_with_cache."
        )


def _refuse_for_tokens(method: str, kwargs: Mapping[str, Any]) -> None:
    """Keywords that TransformerLens reads for texts alone."""
    if kwargs.get("prepend_bos"):
        raise PositionsError(
            f"{method} was given tokens with prepend_bos=True, which is heard for texts alone; expected tokens that "
            "begin with it (model.to_tokens(text, prepend_bos=True)), or a text."
        )
    if kwargs.get("padding_side") is not None:
        raise PositionsError(
            f"{method} was given tokens with padding_side, which is heard for texts alone; expected attention_mask."
        )


@contextmanager
def _note_caching(model: Any) -> Iterator[None]:
    """For as long as this thread adds the hooks of a cache to a model and runs it."""
    inside = getattr(_CACHING, "models", ())
    _CACHING.models = (*inside, id(model))
    try:
        yield
    finally:
        _CACHING.models = inside


@contextmanager
def _count_calls(pairs: list[Any], kwargs: Mapping[str, Any]) -> Iterator[list[Any]]:
    """The same hooks; at the end, a word of those that were not called by a whole forward pass."""
    # A hook that is never called looks like one that does nothing: a null result that is none.
    calls = [0] * len(pairs)
    yield [(name, in_this_thread(partial(_count_call, calls, i, function))) for i, (name, function) in enumerate(pairs)]
    in_part = any(kwargs.get(name) is not None for name in ("start_at_layer", "stop_at_layer"))
    missed = [repr(name) for (name, _), n in zip(pairs, calls, strict=True) if n == 0 and isinstance(name, str)]
    if missed and not in_part:
        warnings.warn(
            f"hook functions at {', '.join(dict.fromkeys(missed))} were not called: this model does not come by there.",
            stacklevel=4,
        )


def _count_call(calls: list[int], i: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    calls[i] += 1
    return function(*args, **kwargs)
