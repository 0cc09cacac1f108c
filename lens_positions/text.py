"""Text or tokens to prompts: the one place where they are read and padding is taken off.

- Prompts of different length never share a padded batch. Each is a row of its own tokens, and rows of equal length run
  together, so that every prompt gives what it gives alone.
- Padding is what `attention_mask` says. Without a mask a padded tensor cannot be told from one whose texts begin or end
  with the padding token (which is often that of a beginning or an end), so what may be either is refused.
- A text begins with the beginning-of-sequence token (BOS) where TransformerLens puts one. A text that is written with
  its own, as a chat template writes it, keeps that one and gets no second.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from .core.devices import device_of
from .core.model_wrappers import base_model
from .errors import PositionsError, check_text

TextOrTokens = str | Sequence[str] | Int[Tensor, "*_batch _pos"] | Sequence[Int[Tensor, "*_one _pos"]]
"""A text or a list of texts; the tokens of a prompt or of a batch; or a list of the tokens of prompts of any length."""

Mask = Int[Tensor, "*_batch _pos"] | Bool[Tensor, "*_batch _pos"] | None
"""1 or True where a token is none of the padding, as tokenizers return it; None where there is no padding."""


def prompts_of(
    model: TransformerBridge,
    given: TextOrTokens,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
    *,
    whole: bool = False,
) -> list[Int[Tensor, " _pos"]]:
    """The tokens of each prompt, without its padding, where the model is.

    Args:
        model: a bridge.
        given: a text or several, or tokens: [pos], [batch, pos], or a list of [pos] of any lengths.
        attention_mask: the real tokens of a padded tensor, in its shape; padding stands at either end of a row.
        prepend_bos: whether texts begin with BOS; None is TransformerLens' default for this model. Tokens are used as
            they are.
        whole: read texts that are longer than the model's context.

    Raises:
        PositionsError: nothing, empty text or a text longer than the context, no tokenizer for a text, no such tokens,
            a mask that does not fit, or padding without a mask.
    """
    if prepend_bos is not None and not isinstance(prepend_bos, bool):
        raise PositionsError(f"prepend_bos is {prepend_bos!r}; expected True, False or None.")
    if isinstance(given, Tensor):
        rows = _rows(given)
        _check_ids(model, rows)
        prompts = _without_padding(model, rows, attention_mask)
    else:
        if attention_mask is not None:
            raise PositionsError(
                f"attention_mask was given with a {type(given).__name__}; expected a tensor of tokens [batch, pos] "
                "beside it, as texts and lists have no padding."
            )
        prompts = _list_texts(model, [given] if isinstance(given, str) else given, prepend_bos, whole)
    base = base_model(model)

    # Tokens go where the embeddings are; further on the model moves what it needs itself.
    device = device_of(base.get_input_embeddings(), base)
    return [prompt.to(device) for prompt in prompts]


def one_prompt(
    model: TransformerBridge, given: TextOrTokens, attention_mask: Mask = None, prepend_bos: bool | None = None
) -> Int[Tensor, "1 pos"]:
    """The tokens of one prompt, as a row.

    Raises:
        PositionsError: as `prompts_of`, or several prompts.
    """
    prompts = prompts_of(model, given, attention_mask, prepend_bos)
    if len(prompts) != 1:
        what = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"{len(prompts)} prompts"
        raise PositionsError(
            f"tokens are {what}; expected the token ids of one prompt, [pos] or [1, pos], or its text."
        )
    return prompts[0][None]


def by_length(prompts: Sequence[Int[Tensor, " _pos"]]) -> list[tuple[list[int], Int[Tensor, "batch _pos"]]]:
    """Prompts of equal length together: which they are, and their tokens as rows."""
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    groups = [list(numbers) for _, numbers in groupby(order, key=lambda number: len(prompts[number]))]
    return [(numbers, torch.stack([prompts[number] for number in numbers])) for numbers in groups]


def pad_prompts(
    tokenizer: Any, prompts: Sequence[Int[Tensor, " _pos"]], padding_side: str | None = None
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Prompts as one tensor, padded on the tokenizer's side or another, and the mask of their real tokens."""
    rows = {"input_ids": [prompt.tolist() for prompt in prompts]}
    batch = tokenizer.pad(rows, padding_side=padding_side, return_attention_mask=True, return_tensors="pt")
    device = prompts[0].device
    return batch["input_ids"].to(device), batch["attention_mask"].to(device)


def begins_with_bos(tokenizer: Any, text: str) -> bool:
    """Whether a text is written with its own beginning-of-sequence token in front."""
    bos = tokenizer.bos_token
    if bos is None or not text.lstrip().startswith(bos):
        return False

    # Only where the tokenizer reads those characters as its special token, and not as text.
    return tokenizer(text, add_special_tokens=False)["input_ids"][:1] == [tokenizer.bos_token_id]


def prepends_bos(model: TransformerBridge, text: str, prepend_bos: bool | None = None) -> bool:
    """Whether a text gets BOS in front of it: never beside its own."""
    wanted = getattr(model.cfg, "default_prepend_bos", True) if prepend_bos is None else prepend_bos
    return bool(wanted) and not begins_with_bos(model.tokenizer, text)


def _list_texts(
    model: TransformerBridge, given: Any, prepend_bos: bool | None, whole: bool
) -> list[Int[Tensor, " _pos"]]:
    if not isinstance(given, Sequence):
        raise PositionsError(
            f"tokens are a {type(given).__name__}; expected text, a tensor of token ids [pos] or [batch, pos], or a "
            "list of texts or of tensors."
        )
    if not len(given):
        raise PositionsError("no texts were given; expected at least one.")
    prompts = []
    for number, one in enumerate(given):
        if isinstance(one, str):
            check_text(one, "the text" if len(given) == 1 else f"text {number}")
            prompts.append(_text_tokens(model, one, prepend_bos, whole))
        elif isinstance(one, Tensor) and (one.ndim == 1 or one.shape[:-1] == (1,)):
            row = _rows(one)
            _check_ids(model, row)
            prompts += _without_padding(model, row, None)
        else:
            raise PositionsError(f"text {number} is {one!r:.40}; expected a text, or a tensor of tokens [pos].")
    return prompts


def _text_tokens(model: TransformerBridge, text: str, prepend_bos: bool | None, whole: bool) -> Int[Tensor, " _pos"]:
    if getattr(model, "tokenizer", None) is None:
        raise PositionsError("the model has no tokenizer; expected tokens instead of text.")

    # Not cut: a text that is longer than the context is refused below, or read in windows by who asked for `whole`.
    tokens = model.to_tokens(text, prepend_bos=prepends_bos(model, text, prepend_bos), truncate=False)[0]
    if not len(tokens):
        raise PositionsError(f"the text {text!r:.40} has no tokens; expected at least one.")
    return tokens if whole else fit_context(model, tokens[None])[0]


def fit_context(model: TransformerBridge, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """The tokens of texts, where they fit the context.

    Raises:
        PositionsError: they do not.
    """
    if tokens.shape[1] > model.cfg.n_ctx:
        raise PositionsError(
            f"the text has {tokens.shape[1]} tokens with the first one; expected at most {model.cfg.n_ctx}, the "
            "model's context (truncate=True cuts it)."
        )
    return tokens


def _rows(given: Tensor) -> Int[Tensor, "batch pos"]:
    rows = given[None] if given.ndim == 1 else given
    if rows.ndim != 2 or not rows.numel() or rows.dtype not in (torch.int64, torch.int32):
        raise PositionsError(
            f"tokens are shape {tuple(given.shape)} and {given.dtype}; expected a tensor of token ids, [pos] or "
            "[batch, pos], with at least one position."
        )
    return rows


def _check_ids(model: TransformerBridge, rows: Int[Tensor, "batch pos"]) -> None:
    size = base_model(model).get_input_embeddings().weight.shape[0]
    if rows.min() < 0 or rows.max() >= size:
        raise PositionsError(f"tokens go from {rows.min()} to {rows.max()}; expected ids from 0 to {size - 1}.")


def _without_padding(
    model: TransformerBridge, rows: Int[Tensor, "batch pos"], mask: Mask
) -> list[Int[Tensor, " _pos"]]:
    if mask is None:
        _refuse_padding(model, rows)
        return list(rows)
    if not isinstance(mask, Tensor) or mask.numel() != rows.numel() or mask.shape[-1] != rows.shape[1]:
        given = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise PositionsError(f"attention_mask is {given}; expected a tensor of the tokens' shape {tuple(rows.shape)}.")

    # A mask of one row may come without a batch axis.
    real = mask.reshape(rows.shape).to(rows.device)
    if not ((real == 0) | (real == 1)).all():
        raise PositionsError("attention_mask has other values than 0 and 1; expected 1 for each real token.")
    prompts = []
    for number, (row, of_row) in enumerate(zip(rows, real.bool(), strict=True)):
        places = of_row.nonzero().flatten()

        # Real tokens in one stretch: what stands between two of them is part of the text.
        if not len(places) or int(places[-1] - places[0]) + 1 != len(places):
            what = "hides tokens between others" if len(places) else "hides every token"
            raise PositionsError(f"attention_mask {what} in row {number}; expected padding at its ends alone.")
        prompts.append(row[places[0] : places[-1] + 1])
    return prompts


def _refuse_padding(model: TransformerBridge, rows: Int[Tensor, "batch pos"]) -> None:
    """Refuse tokens that may be padded: only a mask can tell."""
    tokenizer: Any = getattr(model, "tokenizer", None)
    if tokenizer is None or tokenizer.pad_token_id is None:
        return
    pad = tokenizer.pad_token_id

    # The product up to each place is 1 as long as all tokens were padding: its sum is the length of that run.
    is_pad = (rows == pad).long()
    sides = (
        ("begins", is_pad.cumprod(1).sum(1), tokenizer.bos_token_id),
        ("ends", is_pad.flip(1).cumprod(1).sum(1), tokenizer.eos_token_id),
    )
    for verb, runs, special in sides:
        # One such token may be a text's own beginning or end, where every row has it.
        own = int(pad == special and bool((runs == runs[0]).all()))
        if bool((runs > own).any()):
            row = int(runs.argmax())
            raise PositionsError(
                f"row {row} of the tokens {verb} with {int(runs[row])} of token {pad}, which may be padding or part of "
                "the text; expected attention_mask= beside padded tokens, or texts."
            )
