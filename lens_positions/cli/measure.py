"""Measurements on held-out text: `kinds`, `boundaries`, `names`, `heads`, `saturation` and `specialisation`."""

import math
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

import lens_positions as lp

from ..config import Alphabet
from ..errors import PositionsError
from ..terminal import print_grid, print_line, with_interval
from .app import BOS_OF_MODEL, Bos, announce_figure, app, check_learned, check_outputs, complain, write_table
from .durations import announce_duration

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

Model = Annotated[Positional[str], arg(metavar="MODEL", help="a folder, an adapter, a packaged or a hub model.")]
Corpus = Annotated[str, arg(help="held-out text to read: english, chinese, bilingual, code, a file or a folder.")]
Characters = Annotated[int, arg(help="at most so much text, taken evenly from the held-out documents.")]
Seed = Annotated[int, arg(help="of the intervals, shuffles and permutations.")]
Csv = Annotated[Path | None, arg(metavar="FILE", help="write the table to this file, with all columns.")]
Chart = Annotated[Path | None, arg(metavar="FILE", help="draw it, as .png, .svg or .pdf.")]

PER_TOKEN = "95% intervals resample documents"


@app.command
def kinds(
    model: Model,
    corpus: Corpus = "bilingual",
    characters: Characters = 60_000,
    alphabet: Alphabet = "prose",
    only: Annotated[tuple[str, ...], arg(metavar="KIND ...")] = (),
    seed: Seed = 0,
    csv: Csv = None,
    figure: Chart = None,
    bos: Bos = BOS_OF_MODEL,
) -> None:
    """Show increments by layer and kind of token: mean, least and largest.

    Takes about 20 seconds with a shipped model, more with larger ones.

    Args:
        alphabet: kinds of prose, or those of program text (code).
        only: the kinds to show; all that occur if none is named.
    """
    check_outputs(csv, figure)
    prepend_bos = bos.prepend()

    from rich.text import Text

    loaded, texts, what = read_heldout("kinds", model, corpus, characters)
    table = lp.analysis.increments_by_category(
        loaded, texts, seed=seed, alphabet=alphabet, only=only or None, prepend_bos=prepend_bos
    )
    console = print_heading(
        f"{loaded.name}: increments by kind of token, {what}", f"mean (least to largest); {PER_TOKEN}"
    )

    names = [f"{kind} ({n:,})" for kind, n in table.groupby("kind", sort=False)["n"].first().items()]
    _grid(console, table, "kind", "layer", lambda row: f"{row.mean:.2f} ({row.min:.2f} to {row.max:.2f})", names)
    print_line(console, Text("divided by the mean of the layer, with its interval", "bold"))
    _grid(console, table, "kind", "layer", lambda row: _with_interval(row, "relative", "relative_"), names)

    write_if_asked(console, table, csv)
    if figure is not None:
        caption = f"{loaded.name}; {what}. Intervals: 95% of resamples of documents, seed {seed}."
        with announce_figure(console, figure):
            lp.viz.kinds_chart(table, caption, figure)


@app.command
def boundaries(
    model: Model,
    words: str = "human",
    corpus: str | None = None,
    lines: int | None = None,
    training: str = "chinese",
    seed: Seed = 0,
    csv: Csv = None,
    figure: Chart = None,
    bos: Bos = BOS_OF_MODEL,
) -> None:
    """Show how well increments tell Chinese word boundaries from the inside of words, layer by layer.

    Beside the increments: the same among gaps before one and the same token, with labels shuffled within lines, what
    any order of those tokens could reach, the branching entropy after the character before, and the mutual information
    of both characters.

    Takes about 80 seconds with a shipped model, more with larger ones.

    Args:
        words: "human" (the People's Daily of the corpus chinese, held-out lines), "jieba" (the same lines, or those of
            --corpus, segmented by jieba), or a file: a treebank (.conllu), or lines with spaces between words.
        corpus: held-out text for jieba.
        lines: at most so many lines, spread evenly.
        training: the corpus in whose training text characters are counted; none leaves that out.
    """
    check_outputs(csv, figure)
    prepend_bos = bos.prepend()
    texts, segmented, of_what = _word_segmentation(words, corpus)
    if lines is not None:
        if lines < 1:
            raise PositionsError(f"--lines is {lines}; expected at least 1.")

        # Every so many lines, so that all parts of the text are in.
        kept = range(0, len(texts), max(1, math.ceil(len(texts) / lines)))
        texts = [texts[i] for i in kept]
        segmented = segmented if isinstance(segmented, str) else [segmented[i] for i in kept]

    # Held-out lines are measured, so the statistic of the text is counted in training text: it has not seen them
    # either.
    counted = None if training == "none" else lp.corpora.load(training)["train"]["text"]
    announce_duration("boundaries")
    loaded = lp.HookedPositionTransformer.from_pretrained(model)
    table = lp.analysis.boundary_auc(loaded, texts, segmented, counted, seed, prepend_bos=prepend_bos)
    first = table.iloc[0]
    what = f"{first['n']:,} gaps between Chinese characters in {first['lines']:,} lines, {of_what}"
    console = print_heading(
        f"{loaded.name}: word boundaries, {first['boundaries']:,} of {what}",
        "area under the ROC curve, 0.5 is chance; 95% intervals resample lines",
    )

    # What has no layer, as the statistic of the text, gets a row of its own.
    layers = table.assign(layer=[f"layer {layer:.0f}" if layer == layer else "no layer" for layer in table["layer"]])
    _grid(console, layers, "layer", "measure", lambda row: _with_interval(row, "auc", ""))
    write_if_asked(console, table, csv)
    if figure is not None:
        caption = f"{loaded.name}; {what}. Intervals: 95% of resamples of lines, seed {seed}."
        title = "Increments at Chinese word boundaries"
        with announce_figure(console, figure):
            lp.viz.auc_chart(table, title, caption, figure)


@app.command
def names(
    model: Model,
    corpus: Annotated[
        str, arg(help="text like that which the model was trained on, to count pairs of words in.")
    ] = "english",
    names: Annotated[Path | None, arg(metavar="FILE")] = None,
    csv: Csv = None,
    bos: Bos = BOS_OF_MODEL,
) -> None:
    """Show whether the space inside a two-word name is shorter than in the reversed name, layer by layer.

    As a control, the same for ordinary pairs of words that are as frequent in both orders.

    Takes about 20 seconds with a shipped model, more with larger ones.

    Args:
        names: two-word names, one a line; 94 that presidents speak of if none are given.
    """
    check_outputs(csv, None)
    prepend_bos = bos.prepend()
    if names is not None and not names.is_file():
        raise PositionsError(f"there is no file {names}; expected one with a two-word name a line.")

    from rich.text import Text

    from ..analysis.two_word_names import NAMES

    lines = [] if names is None else [line.strip() for line in lp.corpora.read_text(names).splitlines()]
    given = NAMES if names is None else [line for line in lines if line]
    announce_duration("names")
    loaded = lp.HookedPositionTransformer.from_pretrained(model)

    # Where every increment is 1.0 all differences are 0, and a table of them would look like a finding.
    check_learned(loaded, "names and other words are alike", "a model with learned increments")
    table = lp.analysis.entity_grouping(
        loaded, lp.corpora.load(corpus)["train"]["text"], given, prepend_bos=prepend_bos
    )
    console = print_heading(
        f"{loaded.name}: the increment at the space inside two words, real order minus reversed",
        "mean with a 95% interval, share nearer in the real order, Wilcoxon p (q over layers), over families of pairs "
        "that share words",
    )

    counts = table.groupby("group", sort=False)[["n", "families"]].first()
    heads = [f"{row.Index} ({row.n} in {row.families} families)" for row in counts.itertuples()]

    def cell(row: Any) -> str:
        return (
            f"{row.difference:+.4f} ({row.low:+.4f} to {row.high:+.4f})  {row.smaller:.0%}  {row.p:.2g} ({row.q:.2g})"
        )

    for group, head in zip(counts.index, heads, strict=True):
        print_line(console, Text(head, "bold"))
        for row in table[table["group"] == group].itertuples():
            print_line(console, f"  layer {row.layer}  {cell(row)}")
    write_if_asked(console, table, csv)


@app.command
def heads(
    model: Model,
    corpus: Corpus = "bilingual",
    characters: Characters = 60_000,
    seed: Seed = 0,
    csv: Csv = None,
    bos: Bos = BOS_OF_MODEL,
) -> None:
    """Show each head's mean increment and how far back it looks, and how the two go together.

    Takes about 20 seconds with a shipped model, more with larger ones.
    """
    check_outputs(csv, None)
    prepend_bos = bos.prepend()

    import pandas as pd

    loaded, texts, what = read_heldout("heads", model, corpus, characters)
    check_learned(loaded, "there is nothing to compare", "a model with learned increments")
    table = lp.analysis.head_profile(loaded, texts, seed, prepend_bos=prepend_bos)
    console = print_heading(f"{loaded.name}: heads, {what}", f"mean increment, and look-back in tokens; {PER_TOKEN}")
    named = table.assign(head=[f"{layer}.{head}" for layer, head in zip(table["layer"], table["head"], strict=True)])

    # The two columns of each head as two rows, which is the form that the grid takes.
    both = pd.concat(
        [
            named.assign(what=column, value=named[column], low=named[f"{column}_low"], high=named[f"{column}_high"])
            for column in ("increment", "look_back")
        ]
    )
    _grid(console, both, "head", "what", lambda row: _with_interval(row, "value", ""))
    write_if_asked(console, table, csv)
    try:
        # Too few heads for a correlation is no error of the command: the table stands.
        correlations = lp.analysis.head_correlations(table, seed)
    except PositionsError as error:
        complain(f"no correlation: {error}")
        return

    for row in correlations.itertuples():
        test = "" if math.isnan(row.p) else f", p = {row.p:.2g} of permutations"  # type: ignore[arg-type]
        interval = f"({row.low:+.2f} to {row.high:+.2f}){test}"
        print_line(console, f"{row.measure} over {row.n} {row.scope}: {row.correlation:+.2f} {interval}")


@app.command
def saturation(
    model: Model,
    corpus: Corpus = "bilingual",
    characters: Characters = 60_000,
    seed: Seed = 0,
    csv: Csv = None,
    bos: Bos = BOS_OF_MODEL,
) -> None:
    """Show the share of increments that sit at their cap, or below zero where they are signed, layer by layer.

    Takes about 20 seconds with a shipped model, more with larger ones.
    """
    check_outputs(csv, None)
    prepend_bos = bos.prepend()
    loaded, texts, what = read_heldout("saturation", model, corpus, characters)

    # Without an activation there is no cap to sit at, and increments may be negative.
    if loaded.position_config.learned and loaded.position_config.activation == "none":
        table = lp.analysis.below_zero(loaded, texts, seed, prepend_bos=prepend_bos)
        console = print_heading(f"{loaded.name}: increments below zero, {what}", PER_TOKEN)
        for row in table.itertuples():
            print_line(console, f"  layer {row.layer}  {_share(row, 'share')}  least {row.min:.2f}")
        write_if_asked(console, table, csv)
        return

    table = lp.analysis.saturation(loaded, texts, seed, prepend_bos=prepend_bos)
    console = print_heading(f"{loaded.name}: increments at the cap of {table['cap'].iloc[0]:g}, {what}", PER_TOKEN)
    for row in table.itertuples():
        print_line(console, f"  layer {row.layer}  {_share(row, 'share')}  largest {row.max:.2f}")
    write_if_asked(console, table, csv)


@app.command
def specialisation(
    model: Model,
    corpus: Corpus = "bilingual",
    characters: Characters = 60_000,
    alphabet: Alphabet = "prose",
    seed: Seed = 0,
    csv: Csv = None,
    bos: Bos = BOS_OF_MODEL,
) -> None:
    """Show how much of each layer's increments the kind of a token explains, and which kinds stand out.

    Takes about 20 seconds with a shipped model, more with larger ones.

    Args:
        alphabet: kinds of prose, or those of program text (code).
    """
    check_outputs(csv, None)
    prepend_bos = bos.prepend()
    loaded, texts, what = read_heldout("specialisation", model, corpus, characters)
    check_learned(loaded, "no kind stands out", "a model with learned increments")
    table = lp.analysis.specialisation(loaded, texts, alphabet, seed, prepend_bos=prepend_bos)
    console = print_heading(
        f"{loaded.name}: what the kind of a token explains of its increment, {what}",
        f"share of the variance (with kinds shuffled in each document); × is to the mean of the layer; {PER_TOKEN}",
    )
    for row in table.itertuples():
        ends = (f"{end} {getattr(row, end)} ×{_with_interval(row, f'{end}_relative', f'{end}_')}" for end in ENDS)
        print_line(console, f"  layer {row.layer}  {_share(row, 'explained')} ({row.shuffled:.1%})  {', '.join(ends)}")
    write_if_asked(console, table, csv)


ENDS = ("farthest", "nearest")


def read_heldout(
    command: str, model: str, corpus: str, characters: int
) -> "tuple[lp.HookedPositionTransformer, list[str], str]":
    """The model, held-out text, and how to name that text; how long the command takes is said before."""
    announce_duration(command, characters)
    loaded = lp.HookedPositionTransformer.from_pretrained(model)
    texts = lp.corpora.heldout_excerpts(corpus, characters)
    return loaded, texts, f"{sum(map(len, texts)):,} characters of {len(texts)} held-out documents of {corpus}"


def _word_segmentation(words: str, corpus: str | None) -> tuple[list[str], Any, str]:
    """Lines, their words (or "jieba"), and how to name them."""
    if corpus is not None and words != "jieba":
        raise PositionsError(f"--corpus was given with --words {words}; expected it with --words jieba alone.")

    # The lines are the same for both, so that people and jieba compare.
    if words in ("human", "jieba") and corpus is None:
        segmented = lp.corpora.heldout_segmentation()
        whose = "segmented by people" if words == "human" else "segmented by jieba"
        texts = ["".join(line) for line in segmented]
        return texts, segmented if words == "human" else "jieba", f"the held-out People's Daily {whose}"

    # Text that nobody has cut: jieba is all there is.
    if corpus is not None:
        heldout = lp.corpora.load(corpus)["heldout"]["text"]
        texts = [line for text in heldout for line in text.splitlines() if line]
        return texts, "jieba", f"held out of {corpus}, segmented by jieba"

    path = Path(words)
    if not path.is_file():
        raise PositionsError(
            f"--words is {words!r}; expected human, jieba, a treebank (.conllu), or a file of lines with spaces "
            "between words."
        )
    segmented = lp.corpora.read_segmentation(path)
    return ["".join(line) for line in segmented], segmented, f"lines of {path}"


def print_heading(first: str, second: str) -> "Console":
    """Print what is shown, and in what unit; where to print the rest."""
    from rich.console import Console

    console = Console(highlight=False)
    print_line(console, first)
    print_line(console, second + "\n")
    return console


def _grid(
    console: "Console", table: "pd.DataFrame", row: str, column: str, cell: Any, names: Sequence[str] | None = None
) -> None:
    """A table of cells by two of its columns, in their order of appearance."""
    from rich.text import Text

    rows, columns = _unique(table[row]), _unique(table[column])

    # Cells by row and column; a kind may be missing in some layer.
    of: dict[tuple[Hashable, Hashable], Any] = {(getattr(r, row), getattr(r, column)): r for r in table.itertuples()}
    cells = [[Text(cell(of[r, c]) if (r, c) in of else "") for c in columns] for r in rows]
    labels = [f"layer {c}" if column == "layer" else str(c) for c in columns]
    print_grid(console, list(names or map(str, rows)), labels, cells)


def _unique(values: "pd.Series[Any]") -> list[Any]:
    return list(dict.fromkeys(values))


def _with_interval(row: Any, column: str, ends: str) -> str:
    return with_interval(row._asdict(), column, ".3f", ends)


def _share(row: Any, column: str) -> str:
    return with_interval(row._asdict(), column, ".1%")


def write_if_asked(console: "Console", table: "pd.DataFrame", csv: Path | None) -> None:
    """Write a table where that is asked for, and say where."""
    if csv is not None:
        write_table(table, csv)
        print_line(console, f"table: {csv}")
