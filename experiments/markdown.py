"""Pages and tables in Markdown: a template of the folder `templates`, and tables as compact as a diff likes them."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from lens_positions.errors import PositionsError

try:
    from tabulate import DataRow, TableFormat
except ModuleNotFoundError as error:
    raise PositionsError(
        "the package tabulate is not here, which writes tables in Markdown; expected pip install 'lens-positions[dev]'."
    ) from error


def grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> pd.DataFrame:
    """A table of text.

    Raises:
        ValueError: a row has more or fewer cells than there are columns.
    """
    return pd.DataFrame([list(row) for row in rows], columns=list(columns), dtype=object)


def markdown(block: pd.DataFrame | str, numbers: bool = False) -> str:
    """A table in Markdown, or a paragraph as it is.

    Args:
        block: a table of text, or a paragraph.
        numbers: whether all columns but the first are aligned to the right.
    """
    if isinstance(block, str):
        return block
    rule = ["---", *["---:"] * (block.shape[1] - 1)]
    line = f"| {' | '.join(rule)} |" if numbers else "|" + "---|" * block.shape[1]
    # Cells are not padded to the width of their column, or one long cell would change every line of a table.
    row = DataRow("|", "|", "|")
    form = TableFormat(None, lambda widths, alignments: line, None, None, row, row, 1, None)
    return block.to_markdown(index=False, tablefmt=form, stralign=None, disable_numparse=True)


def page(template: str, **values: Any) -> str:
    """A page from a template and what it tells."""
    pages = Environment(
        loader=PackageLoader(__package__, "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # text, no HTML
    )
    pages.filters["markdown"] = markdown
    return pages.get_template(template).render(**values)
