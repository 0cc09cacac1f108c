"""What increments are: `show`, `explore`, `extremes` and `report`."""

import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

import lens_positions as lp

from ..errors import PositionsError, check_seed, check_text
from ..terminal import increment_cell, print_grid, print_line
from ..viz import output as viz_output
from .app import BOS_OF_MODEL, Bos, announce_figure, app, check_outputs, complain, write_table
from .durations import announce_duration

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from ..measure.corpus_reader import CorpusIncrements
    from ..viz.spacing import Scale
    from ..viz.text_positions import TextPositions

SHIPPED = ("bilingual-per-layer", "bilingual-shared", "bilingual-rope")
"""Models that come with the package; the explorer opens with the first."""


@app.command
def show(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    text: Annotated[Positional[str], arg(metavar="TEXT")],
    layers: Annotated[tuple[int, ...], arg(metavar="LAYER ...")] = (),
    table: bool = True,
    figure: Annotated[Path | None, arg(metavar="FILE")] = None,
    bos: Bos = BOS_OF_MODEL,
) -> None:
    """Show how far apart a model puts the tokens of a text.

    Takes about 10 seconds with a shipped model.

    Args:
        model: a folder, the name of a shipped model, or a model of the hub.
        text: the text to show; put -- before a text that begins with a dash.
        layers: the layers to show; all of them if none is named.
        table: print the increments by kind of token as well.
        figure: draw the characters at their learned positions, as .png, .svg or .pdf, or as .html to explore.
    """
    check_text(text)
    prepend_bos = bos.prepend()
    explored = _check_figure(figure)

    from rich.console import Console

    from ..viz.text_positions import layers_to_show, position_text

    loaded = lp.HookedPositionTransformer.from_pretrained(model)
    text_positions = position_text(loaded, text, most=loaded.cfg.n_ctx, prepend_bos=prepend_bos)
    increments = text_positions.increments.mean(dim=-1)
    rows = layers_to_show(loaded, layers or None, increments)

    # Entry 0 stands before the text; with gap "after", it is the last increment that moves no token of the text.
    used = loaded.position_config.effective
    moving = increments[:, used] if increments.shape[1] > 1 else increments
    means = {layer: float(moving[layer].mean()) for layer in rows}

    console = Console(highlight=False)
    _print_tokens(console, loaded, text_positions, rows, means)
    if table:
        _print_kinds(console, loaded, text_positions, rows, means)

    # A text past the context is read as far as it goes; that is said on standard error, not in the table.
    if text_positions.cut():
        complain(text_positions.cut().replace("drawn", "shown"))
    if figure is not None:
        with announce_figure(console, figure):
            if explored:
                lp.viz.spacing_view(loaded, text, layers or None, prepend_bos=prepend_bos).save(figure)
            else:
                scale = _scale_of(text_positions, rows)
                lp.viz.spacing(loaded, text, layers or None, scale, figure, prepend_bos=prepend_bos)


def _check_figure(figure: Path | None) -> bool:
    """Refuse a figure that could not be written; whether it is a page to explore, which ends in .html."""
    explored = figure is not None and figure.suffix.lower() in (".html", ".htm")
    if figure is not None and explored:
        viz_output.check_page(figure)
    elif figure is not None and figure.suffix.lower() not in viz_output.KINDS:
        raise PositionsError(
            f"the figure's path is {figure}; expected a name that ends in .png, .svg or .pdf, or .html to explore."
        )
    else:
        check_outputs(None, figure)
    return explored


def _scale_of(text_positions: "TextPositions", rows: dict[int, str]) -> "Scale":
    """The scale of a figure: each row's own, if each has a mean that positions can be divided by."""
    # Signed increments may have a mean of zero or less.
    divisible = all(text_positions.mean_increment(entry) > 0 for entry in rows)
    return "relative" if divisible else "common"


@app.command
def extremes(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    corpus: str | None = None,
    characters: int = 60_000,
    layers: Annotated[tuple[int, ...], arg(metavar="LAYER ...")] = (),
    top: int = 8,
    csv: Annotated[Path | None, arg(metavar="FILE")] = None,
    bos: Bos = BOS_OF_MODEL,
) -> None:
    """Show which tokens a graft or a trained model puts nearest and farthest, and which kinds of token.

    Takes about 20 seconds with a shipped model, more with larger ones.

    Args:
        model: a folder, an adapter, the name of a packaged model, or a model of the hub.
        corpus: held-out text to read: english, chinese, bilingual, code, a file or a folder. A shared or frozen
            source needs none: its whole vocabulary is ranked.
        characters: at most so much text, taken evenly from the held-out documents.
        layers: the layers to show; all of them if none is named.
        top: tokens at each end.
        csv: write the tokens shown to this file as well, with all columns.
    """
    check_outputs(csv, None)
    prepend_bos = bos.prepend()

    if corpus is None and prepend_bos is not None:
        raise PositionsError("--bos or --no-bos was given without --corpus; expected text to read, or neither flag.")

    from rich.console import Console
    from rich.text import Text

    announce_duration("extremes", 0 if corpus is None else characters)
    loaded = lp.HookedPositionTransformer.from_pretrained(model)
    texts = None if corpus is None else lp.corpora.heldout_excerpts(corpus, characters)
    corpus_increments = None if texts is None else lp.analysis.read_corpus(loaded, texts, prepend_bos=prepend_bos)
    found = lp.analysis.extreme_tokens(loaded, corpus_increments, top)
    by_kind, what, mean = _extremes_by_kind(loaded, texts, corpus_increments, corpus)

    # Refused here and not before loading: which layers there are depends on the source.
    shown = layers or tuple(dict.fromkeys(found["layer"]))
    if missing := set(shown) - set(found["layer"]):
        known = ", ".join(map(str, dict.fromkeys(found["layer"])))
        raise PositionsError(f"layer {min(missing)} is not there; expected some of {known}.")

    console = Console(highlight=False)
    config = loaded.position_config
    print_line(console, f"{loaded.name}: {config.source} increments, the gap {config.gap} each token; {what}")
    if texts is None:
        print_line(console, f"mean increment {mean:.3f}; × is an increment divided by that mean\n")
    else:
        print_line(console, "× is an increment divided by the mean of its layer; by kind with a 95% interval\n")

    # A source of the whole vocabulary is the same in every layer, and needs no heading.
    for layer in shown:
        if texts is not None or len(shown) > 1:
            print_line(console, Text(f"layer {layer}", "bold"))
        _print_extremes(console, found[found["layer"] == layer], by_kind[by_kind["layer"] == layer])
    if csv is not None:
        write_table(found[found["layer"].isin(shown)], csv)
        print_line(console, f"tokens: {csv}")


def _extremes_by_kind(
    model: "lp.HookedPositionTransformer",
    texts: list[str] | None,
    corpus_increments: "CorpusIncrements | None",
    corpus: str | None,
) -> "tuple[pd.DataFrame, str, float]":
    """Increments by kind, what they were measured on, and their mean (NaN where each layer has one of its own)."""
    if texts is None or corpus_increments is None:
        from ..analysis.extremes import vocabulary_increments

        # A source without context: its vocabulary is all there is, so it has no documents and no intervals.
        of_vocabulary = vocabulary_increments(model)
        by_kind = of_vocabulary.groupby("kind", as_index=False).agg(n=("id", "size"), relative=("relative", "mean"))
        by_kind = by_kind.assign(layer=0, relative_low=math.nan, relative_high=math.nan)
        return by_kind, f"{len(of_vocabulary):,} token ids, each once", of_vocabulary["increment"].mean()

    what = f"{sum(map(len, texts)):,} characters of {len(texts)} held-out documents of {corpus}"
    return lp.analysis.increments_by_category(model, corpus_increments), what, math.nan


def _print_extremes(console: "Console", found: "pd.DataFrame", by_kind: "pd.DataFrame") -> None:
    """The nearest and the farthest tokens of a layer, and its kinds of token from near to far."""
    for end, rows in found.groupby("end"):
        print_line(console, f"  {end}")
        for row in rows.to_dict("records"):
            where = row["context"] if "context" in row else f"⟦{row['token']}⟧  {row['kind']}"
            # Spaces between words stay as they are; a token that is a space alone would be an empty bracket.
            where = "".join(c if c == " " else viz_output.visible_character(c) for c in where).replace("⟦ ⟧", "⟦␣⟧")
            often = f"  n={row['n']}" if "n" in row else ""
            print_line(console, f"    ×{row['relative']:.2f}  {row['increment']:.3f}{often}  {where}")
    for row in by_kind.sort_values("relative").to_dict("records"):
        low, high = row["relative_low"], row["relative_high"]
        interval = "" if math.isnan(low) else f" ({low:.3f} to {high:.3f})"
        print_line(console, f"  {row['kind']} (n={row['n']:,}): ×{row['relative']:.3f}{interval}")
    console.print()


@app.command
def report(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    output: Annotated[Path, arg(aliases=["-o"], metavar="FILE")],
    text: Annotated[tuple[str, ...], arg(metavar="TEXT ...")] = (),
    compare: Annotated[str | None, arg(metavar="OTHER")] = None,
    corpus: str | None = None,
    characters: int = 20_000,
    seed: int = 0,
    bos: Bos = BOS_OF_MODEL,
) -> None:
    """Write one page that holds everything about a model's increments, and opens without a network.

    Spacing, tokens tinted by increment, attention beside increments, increments by kind of token, loss and ablations.
    Interrupted, it keeps the parts that are done.

    Takes about 20 seconds with a shipped model, more with larger ones.

    Args:
        model: a folder, an adapter, the name of a packaged model, or a model of the hub.
        output: the page to write, as .html.
        text: the texts to draw; an English and a Chinese sentence if none is given.
        compare: another model to draw beside it.
        corpus: held-out text to measure on: english, chinese, bilingual, code, a file or a folder; bilingual if none
            is named and its packages are installed.
        characters: at most so much of it, taken evenly from the held-out documents.
        seed: of the intervals and the shuffles.
    """
    for one in text:
        check_text(one)
    viz_output.check_page(output)
    prepend_bos = bos.prepend()
    check_seed(seed)

    from rich.console import Console

    announce_duration("report", characters if compare is None else 2 * characters)
    loaded = lp.HookedPositionTransformer.from_pretrained(model)
    other = None if compare is None else lp.HookedPositionTransformer.from_pretrained(compare)
    options: list[tuple[str, Any]] = [("--text", text), ("--compare", compare), ("--corpus", corpus)]

    # The report says how to make it again: this command, without what is by default.
    words = ["lens-positions", "report", model, "--output", str(output)]
    for option, value in options:
        words += [option, *([value] if isinstance(value, str) else value)] if value else []
    words += ["--characters", str(characters), "--seed", str(seed)]
    words += [] if prepend_bos is None else ["--bos" if prepend_bos else "--no-bos"]
    command = shlex.join(words)
    try:
        left_out = lp.viz.report(loaded, output, text, other, corpus, characters, seed, command, prepend_bos)
    except KeyboardInterrupt as interruption:
        # Without a path nothing was written yet.
        if interruption.args:
            sentence = f"interrupted: {output} has the parts that were done."
            raise type(interruption)(sentence) from interruption
        raise
    for sentence in left_out:
        complain(sentence)
    print_line(Console(highlight=False), f"report: {output} ({output.stat().st_size / 1e6:.1f} MB)")


@app.command
def explore(
    model: Annotated[Positional[tuple[str, ...]], arg(metavar="MODEL ...")] = (),
    host: str = "127.0.0.1",
    port: int = 0,
    open: bool = True,
) -> None:
    """Pull tokens apart in a browser and see what the model does; ready in about ten seconds.

    Tokens stand on the ruler of each layer. Drag one, or set a gap to a number, and the next token, the loss of each
    token and the attention of a head are shown before and after. Ctrl+C ends it. Nothing but this machine reaches it.

    Args:
        model: one or several: a folder, the name of a shipped model, or a model of the hub; the three shipped ones if
            none is named. The page can ask for no other.
        host: the address to listen on; any other than 127.0.0.1 lets other machines in.
        port: the port to listen on; any free one if it is 0.
        open: open the page in a browser.
    """
    names = model or SHIPPED
    if not 0 <= port < 1 << 16:
        raise PositionsError(f"port is {port}; expected a number from 0 to 65535.")

    from rich.console import Console

    from ..viz.explorer.server import Models, Server, is_local

    console = Console(highlight=False)

    # The others are loaded when the page first asks for them.
    first = lp.HookedPositionTransformer.from_pretrained(names[0])
    server = Server(Models(names, [first]), host, port)
    if not is_local(host):
        complain(
            f"listening on {host}: whoever reaches this machine and has the address below can read and change what the "
            "page shows and keep this machine busy, and the connection is not encrypted."
        )
    print_line(console, f"the explorer is at {server.address} (Ctrl+C ends it)")

    if open:
        import webbrowser

        webbrowser.open(server.address)
    server.run()


def _print_tokens(
    console: "Console",
    model: "lp.HookedPositionTransformer",
    text_positions: "TextPositions",
    rows: dict[int, str],
    means: dict[int, float],
) -> None:
    """Each token with its increments, a row a layer, in blocks as wide as the terminal."""
    config = model.position_config
    heads = ", mean of the heads" if config.per_head else ""
    print_line(console, f"{model.name}: {config.source} increments{heads}, the gap {config.gap} each token")
    print_line(console, "1.00 is one step of standard RoPE; blue: nearer than the layer's mean, orange: farther\n")
    labels = [viz_output.visible_text(label) for label in text_positions.labels]
    increments = text_positions.increments.mean(-1)

    # Tinted by the mean of the row's own layer, as layers differ in scale.
    cells = [[increment_cell(value, means[layer]) for value in increments[layer].tolist()] for layer in rows]
    print_grid(console, list(rows.values()), labels, cells)


def _print_kinds(
    console: "Console",
    model: "lp.HookedPositionTransformer",
    text_positions: "TextPositions",
    rows: dict[int, str],
    means: dict[int, float],
) -> None:
    """The mean and standard deviation of the increments by kind of token, a column a layer."""
    table = lp.analysis.increments_by_category(model, text_positions.corpus_increments())
    print_line(console, "by kind of token (how many): mean ± standard deviation\n")

    # Tables have the model's own numbers of layers; rows are entries of the streams.
    entry_of = {model.position_layers[entry]: entry for entry in rows}
    by_kind = table[table["layer"].isin(list(entry_of))].groupby("kind", sort=False)
    names = [f"{kind} ({of_kind['n'].iloc[0]})" for kind, of_kind in by_kind]
    cells = [
        [
            increment_cell(mean, means[entry_of[layer]]).append(f" ±{std:.2f}", "dim")
            for layer, mean, std in zip(of_kind["layer"], of_kind["mean"], of_kind["std"], strict=True)
        ]
        for _, of_kind in by_kind
    ]
    print_grid(console, names, list(rows.values()), cells)
