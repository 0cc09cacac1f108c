"""Many prompts and what is to be measured on each: read from a list, or from a table of pandas or `datasets`.

    clean                        the prompt, as text or as token ids
    corrupted                    the other prompt of a pair, for what compares two
    answer, wrong                the tokens whose logits are compared, as text (one token, its space included) or as ids

With a template, such as "The {animal} sat on the {place}.", each prompt is the template filled in from the columns of
these names, and the corrupted one from `corrupted_animal`, `corrupted_place`, or where there is no such column from the
same as the clean one. The template's spans, and the text between them, are then what tokens of different prompts are
aligned by. A token belongs to the span that holds its last character, as " John" does to a {name} after a space.
"""

import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from ..errors import PositionsError
from ..interventions import index_of
from ..text import Mask, TextOrTokens, prompts_of
from ..tokenizer import character_spans

if TYPE_CHECKING:
    from datasets import Dataset

Prompts = Any if not TYPE_CHECKING else TextOrTokens | pd.DataFrame | Dataset
"""Prompts as every function takes them, or a table of them."""

Ends = Literal["start", "end"]
START = "(start)"
"""The span of the special tokens in front of a text."""

CORRUPTED = "corrupted_"


@dataclass(frozen=True)
class Prompt:
    """One prompt and what belongs to it.

    Attributes:
        clean, corrupted: token ids, [pos]; corrupted is None where there is no pair.
        answer, wrong: token ids; None where the table does not say.
        places: of each token of `clean`, its span (empty without a template) and its index there, counted from 0, or
            from the end as -1, -2 and so on.
        pairs: from tokens of `clean` to those of `corrupted` in the same place; None where each token has its own
            index there.
    """

    clean: Int[Tensor, " pos"]
    corrupted: Int[Tensor, " pos_corrupted"] | None
    answer: int | None
    wrong: int | None
    places: list[tuple[str, int]]
    pairs: dict[int, int] | None = None


def is_table(given: Any) -> bool:
    """Whether something is a table of prompts: of pandas, or of `datasets`."""
    return isinstance(given, pd.DataFrame) or (hasattr(given, "to_pandas") and hasattr(given, "column_names"))


def several(given: Any) -> bool:
    """Whether something is a table, or a list or batch that is not of one prompt."""
    if isinstance(given, Tensor):
        return given.ndim == 2 and len(given) > 1
    return is_table(given) or (isinstance(given, Sequence) and not isinstance(given, str) and len(given) > 1)


def read_prompts(
    model: TransformerBridge,
    given: Prompts,
    template: str | None = None,
    count_from: Ends = "start",
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> list[Prompt]:
    """The prompts of a list or a table.

    Args:
        model: a bridge, with a tokenizer where there is text.
        given: see the module.
        template: a text with {names} of columns.
        count_from: the end of a prompt, or of each span, from which tokens are counted.
        attention_mask, prepend_bos: as for `prompts_of`.

    Raises:
        PositionsError: an empty table, a missing column, a cell that holds nothing that it could, a template that
            names no span, an answer that is not one token.
    """
    if count_from not in ("start", "end"):
        raise PositionsError(f'count_from is {count_from!r}; expected "start" or "end".')
    if not is_table(given):
        if template is not None:
            raise PositionsError(
                f"a template was given with a {type(given).__name__}; expected a table with a column for each {{name}}."
            )

        rows = prompts_of(model, cast(Any, given), attention_mask, prepend_bos)
        return [Prompt(row, None, None, None, _places(len(row), count_from)) for row in rows]

    if attention_mask is not None:
        raise PositionsError("attention_mask was given with a table; expected none, as its prompts have no padding.")
    table = _frame(given)

    if template is not None:
        return _from_template(model, table, template, count_from, prepend_bos)
    clean = _column(model, table, "clean", prepend_bos)
    corrupted = _column(model, table, "corrupted", prepend_bos) if "corrupted" in table else [None] * len(table)
    return [
        Prompt(row, other, answer, wrong, _places(len(row), count_from))
        for row, other, answer, wrong in zip(clean, corrupted, *_tokens_of_metric(model, table), strict=True)
    ]


def documents_of(given: Any) -> Any:
    """The column `clean` of a table, as a list of texts or tokens; what is no table as it is.

    Raises:
        PositionsError: an empty table, one without that column, or a cell that holds no prompt.
    """
    return _prompt_cells(_frame(given), "clean") if is_table(given) else given


def _frame(given: Any) -> pd.DataFrame:
    table = given if isinstance(given, pd.DataFrame) else given.to_pandas()
    if table.empty:
        raise PositionsError("the table of prompts is empty; expected at least one row.")
    return table


def _places(length: int, count_from: Ends) -> list[tuple[str, int]]:
    return [("", t if count_from == "start" else t - length) for t in range(length)]


def _cells_of_column(table: pd.DataFrame, name: str) -> list[Any]:
    if name not in table:
        known = ", ".join(map(repr, map(str, table.columns))) or "none"
        raise PositionsError(f"the table has no column {name!r}; expected one beside those that it has ({known}).")
    return list(table[name])


def _prompt_cells(table: pd.DataFrame, name: str) -> list[str | Int[Tensor, "*_one _pos"]]:
    """The prompts of a column, each a text or token ids."""
    cells: list[Any] = []
    for row, cell in enumerate(_cells_of_column(table, name)):
        # Columns of pandas and `datasets` hold ids as lists or arrays.
        if isinstance(cell, list | tuple | np.ndarray) and len(cell) and np.asarray(cell).dtype.kind in "iu":
            cell = torch.as_tensor(np.asarray(cell, dtype=np.int64))
        if not isinstance(cell, Tensor) and not (isinstance(cell, str) and cell):
            raise PositionsError(f"row {row} of column {name!r} is {cell!r}; expected a text or token ids.")
        cells.append(cell)
    return cells


def _column(
    model: TransformerBridge, table: pd.DataFrame, name: str, prepend_bos: bool | None
) -> list[Int[Tensor, " _pos"]]:
    return prompts_of(model, cast(Any, _prompt_cells(table, name)), None, prepend_bos)


def _tokens_of_metric(model: TransformerBridge, table: pd.DataFrame) -> list[list[int | None]]:
    """The answers and the wrong answers; None where the table has none."""
    found: list[list[int | None]] = []
    for name in ("answer", "wrong"):
        cells = list(table[name]) if name in table else None
        found.append([None] * len(table) if cells is None else [_one_token(model, name, *c) for c in enumerate(cells)])
    return found


def _one_token(model: TransformerBridge, name: str, row: int, cell: Any) -> int:
    where = f"row {row} of column {name!r}"
    if not isinstance(cell, str):
        size = cast(int, model.cfg.d_vocab)
        return index_of(cell, where, f"one token as text, or an id from 0 to {size - 1}", most=size - 1)
    if getattr(model, "tokenizer", None) is None:
        raise PositionsError(f"{where} is text and the model has no tokenizer; expected token ids.")

    # A metric reads one logit: a word of several tokens would be scored by its first alone, silently.
    ids = cast(Any, model.tokenizer)(cell, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise PositionsError(f"{where} is {cell!r}, which has {len(ids)} tokens; expected one token.")
    return int(ids[0])


def _from_template(
    model: TransformerBridge, table: pd.DataFrame, template: str, count_from: Ends, prepend_bos: bool | None
) -> list[Prompt]:
    parts = _parts(template)
    fields = list(dict.fromkeys(name for _, name in parts if name is not None))
    columns = {name: _cells(table, name) for name in fields}
    others = {name: _cells(table, CORRUPTED + name) for name in fields if CORRUPTED + name in table}

    prompts = []
    for row, (answer, wrong) in enumerate(zip(*_tokens_of_metric(model, table), strict=True)):
        fills = {name: cells[row] for name, cells in columns.items()}
        clean, spans = _fill_template(model, parts, fills, row, prepend_bos)
        places = [
            (name, _index(i, of_span, count_from)) for name, of_span in spans.items() for i in range(len(of_span))
        ]
        corrupted, pairs = None, None
        if others:
            # The corrupted prompt differs in the spans that have a column of their own; the rest of it is the clean
            # one.
            fills |= {name: cells[row] for name, cells in others.items()}
            corrupted, there = _fill_template(model, parts, fills, row, prepend_bos)
            pairs = _align_spans(spans, there, count_from)

            # Token by token is what measurements do anyway, and all of them can.
            pairs = None if len(clean) == len(corrupted) and all(a == b for a, b in pairs.items()) else pairs
        prompts.append(Prompt(clean, corrupted, answer, wrong, places, pairs))
    return prompts


def _index(i: int, tokens: range, count_from: Ends) -> int:
    return i if count_from == "start" else i - len(tokens)


def _parts(template: str) -> list[tuple[str, str | None]]:
    """Text and the span after it, in turn: the text may be empty, the last span None.

    Raises:
        PositionsError: no template, or one without spans.
    """
    expected = 'expected a text with a {name} for each span, such as "The {animal} sat."'
    if not isinstance(template, str):
        raise PositionsError(f"the template is a {type(template).__name__}; {expected}.")
    try:
        parsed = [(text, name) for text, name, _, _ in string.Formatter().parse(template)]
    except ValueError as error:
        raise PositionsError(f"the template {template!r:.60} cannot be read ({error}); {expected}.") from error

    # {0} and {a.b} are formats of Python that name no column.
    names = [name for _, name in parsed if name is not None]
    if not names or not all(name.isidentifier() for name in names):
        raise PositionsError(f"the template {template!r:.60} names no span that a column could fill; {expected}.")
    return parsed


def _cells(table: pd.DataFrame, name: str) -> list[str]:
    cells = _cells_of_column(table, name)
    for row, cell in enumerate(cells):
        if not (isinstance(cell, str) and cell.strip()):
            raise PositionsError(f"row {row} of column {name!r} is {cell!r}; expected the text of that span.")
    return cells


def _fill_template(
    model: TransformerBridge,
    parts: list[tuple[str, str | None]],
    fills: dict[str, str],
    row: int,
    prepend_bos: bool | None,
) -> tuple[Int[Tensor, " pos"], dict[str, range]]:
    """The tokens of one filled-in template, and the range of them that each of its parts has, in order."""
    segments: list[tuple[str, str, bool]] = []  # its name, its text, whether it is a span
    seen: Counter[str] = Counter()
    for text, name in parts:
        # A text is called by itself, a span by its column; what comes twice is numbered.
        both = ((text.strip() or text, text, False), (name or "", fills.get(name or "", ""), True))
        for what, fill, is_span in both:
            if fill:
                seen[what] += 1
                label = what if seen[what] == 1 else f"{what} ({seen[what]})"
                segments.append((label, fill, is_span))
    written = "".join(fill for _, fill, _ in segments)

    (tokens,) = prompts_of(model, [written], None, prepend_bos)
    of_character = character_spans(cast(Any, model.tokenizer), written)

    # What stands before the first token of the text is the BOS.
    own = max(stop for _, stop in of_character)
    front = len(tokens) - own

    # A token belongs to the part that holds its last character, so later characters overwrite.
    owner, start = [START] * front + [""] * own, 0
    for label, fill, _ in segments:
        for first, stop in of_character[start : start + len(fill)]:
            owner[front + first : front + stop] = [label] * (stop - first)
        start += len(fill)

    counts = Counter(owner)
    for label, fill, is_span in segments:
        if is_span and not counts[label]:
            raise PositionsError(
                f"span {label!r} of row {row} ({fill!r:.40}) has no token that ends in it; expected a template whose "
                "spans do not end inside of tokens."
            )

    # Parts come one after another, so each has a run of tokens.
    ranges, first = {}, 0
    for label in dict.fromkeys(owner):
        ranges[label] = range(first, first + counts[label])
        first += counts[label]
    return tokens, ranges


def _align_spans(here: dict[str, range], there: dict[str, range], count_from: Ends) -> dict[int, int]:
    """Tokens of the same place in the same part; what only one of the two has is left out."""
    pairs: dict[int, int] = {}
    for name, ours in here.items():
        theirs = there.get(name, range(0))
        n = min(len(ours), len(theirs))
        if n:
            pairs |= zip(ours[:n], theirs[:n]) if count_from == "start" else zip(ours[-n:], theirs[-n:])  # noqa: B905
    return pairs
