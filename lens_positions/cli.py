"""The `lens-positions` command: what a model's increments are and what they cause, in a terminal.

Standard output holds what was asked for; whatever went wrong is one sentence on standard error, with exit status 2.
Colour says again what the printed numbers say, and is left out for a pipe, a dumb terminal or NO_COLOR.
"""

import io
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import tyro
from jaxtyping import Float
from rich.console import Console
from rich.text import Text
from torch import Tensor
from tyro.conf import Positional, arg

from . import causal, corpora
from .analysis.categories import increments_by_category
from .analysis.moved import vocabulary, what_moved
from .analysis.reading import read
from .causal.metrics import Metric
from .causal.sweeps import SweepSite
from .errors import PositionsError
from .hooked import HookedPositionTransformer
from .terminal import effect_cell, increment_cell, print_grid, print_line
from .viz import style
from .viz.characters import spacing
from .viz.effects import ablation_bars, effect_map
from .viz.onefile import report as write_report
from .viz.placed import Placed, layers_to_show, place
from .viz.views import check_page, spacing_view

app = tyro.extras.SubcommandApp()


@app.command
def show(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    text: Annotated[Positional[str], arg(metavar="TEXT")],
    layers: Annotated[tuple[int, ...], arg(metavar="LAYER ...")] = (),
    table: bool = True,
    figure: Annotated[Path | None, arg(metavar="FILE")] = None,
) -> None:
    """Show how far apart a model puts the tokens of a text.

    Args:
        model: a folder, the name of a shipped model, or a model of the hub.
        text: the text to show; put -- before a text that begins with a dash.
        layers: the layers to show; all of them if none is named.
        table: print the increments by kind of token as well.
        figure: draw the characters at their learned positions, as .png, .svg or .pdf, or as .html to explore.
    """
    _check_text(text)
    explored = figure is not None and figure.suffix.lower() in (".html", ".htm")
    if figure is not None and explored:
        check_page(figure)
    elif figure is not None and figure.suffix.lower() not in style.KINDS:
        raise PositionsError(
            f"the figure's path is {figure}; expected a name that ends in .png, .svg or .pdf, or .html to explore."
        )
    else:
        _check_outputs(None, figure)
    loaded = HookedPositionTransformer.from_pretrained(model)
    placed = place(loaded, text, most=loaded.cfg.n_ctx)
    increments = placed.increments.mean(dim=-1)
    rows = layers_to_show(loaded, layers or None, increments)
    # Entry 0 stands before the text; with gap "after", it is the last increment that moves no token of the text.
    used = loaded.position_config.effective
    moving = increments[:, used] if increments.shape[1] > 1 else increments
    means = {layer: float(moving[layer].mean()) for layer in rows}
    console = Console(highlight=False)
    _print_tokens(console, loaded, placed, rows, means)
    if table:
        _print_kinds(console, loaded, placed, rows, means)
    if placed.cut():
        _complain(placed.cut().replace("drawn", "shown"))
    if figure is not None:
        try:
            if explored:
                spacing_view(loaded, text, layers or None).save(figure)
            else:
                divisible = all(placed.mean_increment(entry) > 0 for entry in rows)
                spacing(loaded, text, layers or None, "relative" if divisible else "common", figure)
        except style.MissingFontError as error:
            _complain(f"no figure was drawn: {error}")
        else:
            print_line(console, f"figure: {figure}")


@app.command
def moved(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    corpus: str | None = None,
    characters: int = 60_000,
    layers: Annotated[tuple[int, ...], arg(metavar="LAYER ...")] = (),
    top: int = 8,
    csv: Annotated[Path | None, arg(metavar="FILE")] = None,
) -> None:
    """Show which tokens a graft or a trained model puts nearest and farthest, and which kinds of token.

    Args:
        model: a folder, an adapter, the name of a packaged model, or a model of the hub.
        corpus: held-out text to read: english, chinese, bilingual, code, a file or a folder. A shared or frozen
            source needs none: its whole vocabulary is ranked.
        characters: at most so much text, taken evenly from the held-out documents.
        layers: the layers to show; all of them if none is named.
        top: tokens at each end.
        csv: write the tokens shown to this file as well, with all columns.
    """
    _check_outputs(csv, None)
    loaded = HookedPositionTransformer.from_pretrained(model)
    texts = None if corpus is None else corpora.heldout_excerpts(corpus, characters)
    reading = None if texts is None else read(loaded, texts)
    found = what_moved(loaded, reading, top)
    if texts is None or reading is None:
        of_vocabulary = vocabulary(loaded)
        by_kind = of_vocabulary.groupby("kind", as_index=False).agg(n=("id", "size"), relative=("relative", "mean"))
        by_kind = by_kind.assign(layer=0, relative_low=math.nan, relative_high=math.nan)
        what, mean = f"{len(of_vocabulary):,} token ids, each once", of_vocabulary["increment"].mean()
    else:
        by_kind = increments_by_category(loaded, reading)
        what = f"{sum(map(len, texts)):,} characters of {len(texts)} held-out documents of {corpus}"
        mean = math.nan
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
    for layer in shown:
        if texts is not None or len(shown) > 1:
            print_line(console, Text(f"layer {layer}", "bold"))
        for end, rows in found[found["layer"] == layer].groupby("end"):
            print_line(console, f"  {end}")
            for row in rows.to_dict("records"):
                where = row["context"] if "context" in row else f"⟦{row['token']}⟧  {row['kind']}"
                where = "".join(c if c == " " else style.visible(c) for c in where).replace("⟦ ⟧", "⟦␣⟧")
                often = f"  n={row['n']}" if "n" in row else ""
                print_line(console, f"    ×{row['relative']:.2f}  {row['increment']:.3f}{often}  {where}")
        for row in by_kind[by_kind["layer"] == layer].sort_values("relative").to_dict("records"):
            low, high = row["relative_low"], row["relative_high"]
            interval = "" if math.isnan(low) else f" ({low:.3f} to {high:.3f})"
            print_line(console, f"  {row['kind']} (n={row['n']:,}): ×{row['relative']:.3f}{interval}")
        console.print()
    if csv is not None:
        found[found["layer"].isin(shown)].to_csv(csv, index=False)
        print_line(console, f"tokens: {csv}")


@app.command
def gaps(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    text: Annotated[Positional[str], arg(metavar="TEXT")],
    answer: str | None = None,
    wrong: str | None = None,
    by: float = 1.0,
    layers: Annotated[tuple[int, ...], arg(metavar="LAYER ...")] = (),
    csv: Annotated[Path | None, arg(metavar="FILE")] = None,
    figure: Annotated[Path | None, arg(metavar="FILE")] = None,
) -> None:
    """Show what lengthening each gap of a text does, at every layer: the first thing to run on any RoPE model.

    Args:
        model: a folder, an adapter, the name of a packaged model, or a model of the hub.
        text: the prompt; put -- before one that begins with a dash.
        answer: the right next token; the effect is on its log probability, or without it on the loss of the text.
        wrong: a wrong one; the effect is on the logit of the answer minus that of this.
        by: positions to add to a gap.
        layers: the layers to show; all of them if none is named.
        csv: write every effect to this file.
        figure: draw the map of layers by tokens, as .png, .svg or .pdf.
    """
    _check_text(text)
    _check_outputs(csv, figure)
    if wrong is not None and answer is None:
        raise PositionsError("--wrong was given without --answer; expected both, or the answer alone.")
    loaded = HookedPositionTransformer.from_pretrained(model)
    tokens = loaded.to_tokens(text)
    metric, unit = _metric(loaded, tokens, answer, wrong)
    effects = causal.gap_sweep(loaded, tokens, metric, by, layers or None)
    what = f"{loaded.name}: {by:g} more before each token, one gap and layer at a time"
    _show_effects(loaded, tokens, effects, layers, what, unit, csv, figure)


@app.command
def patch(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    clean: str,
    corrupted: str,
    answer: str,
    wrong: str,
    site: SweepSite = "increments",
    layers: Annotated[tuple[int, ...], arg(metavar="LAYER ...")] = (),
    csv: Annotated[Path | None, arg(metavar="FILE")] = None,
    figure: Annotated[Path | None, arg(metavar="FILE")] = None,
) -> None:
    """Show what values recorded on the clean prompt do in the corrupted one, one layer and token at a time.

    The effect is on the logit of the answer minus that of the wrong one, after the last token.

    Args:
        model: a folder, an adapter, the name of a packaged model, or a model of the hub.
        clean: the prompt that values are recorded on.
        corrupted: the prompt that they are put into, of as many tokens.
        answer: the right next token of the clean prompt.
        wrong: that of the corrupted one.
        site: what is patched: increments, positions, rotated queries or keys, the residual stream, attention patterns.
        layers: the layers to patch; all of them if none is named.
        csv: write every effect to this file.
        figure: draw the map of layers by tokens, as .png, .svg or .pdf.
    """
    for prompt in (clean, corrupted):
        _check_text(prompt)
    _check_outputs(csv, figure)
    loaded = HookedPositionTransformer.from_pretrained(model)
    if site in ("increments", "positions"):
        _check_learned(loaded, f"patching {site} does nothing", "another --site, or lens-positions gaps")
    source, tokens = loaded.to_tokens(clean), loaded.to_tokens(corrupted)
    if source.shape != tokens.shape:
        raise PositionsError(
            f"the clean prompt has {source.shape[1]} tokens and the corrupted one {tokens.shape[1]}; expected equally "
            "many (causal.patch_sweep takes a map of tokens)."
        )
    metric, unit = _metric(loaded, tokens, answer, wrong)
    effects = causal.patch_sweep(loaded, source, tokens, metric, site, layers or None)
    with torch.no_grad():
        ends = [float(metric(loaded(prompt))[0]) for prompt in (source, tokens)]
    what = (
        f"{loaded.name}: {site} of the clean prompt in the corrupted one; {unit} is {ends[0]:+.3f} in the clean one "
        f"and {ends[1]:+.3f} in the corrupted one"
    )
    _show_effects(loaded, tokens, effects, layers, what, unit, csv, figure)


@app.command
def ablate(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    corpus: str,
    characters: int = 20_000,
    layers: Annotated[tuple[int, ...], arg(metavar="LAYER ...")] = (),
    seed: int = 0,
    csv: Annotated[Path | None, arg(metavar="FILE")] = None,
    figure: Annotated[Path | None, arg(metavar="FILE")] = None,
) -> None:
    """Show what the loss and the attention lose without the structure of the increments, layer by layer.

    Increments go to 1.0, to the mean of their row, or to other tokens (shuffled). What 1.0 does beyond the mean is
    scale, not structure.

    Args:
        model: a folder, an adapter, the name of a packaged model, or a model of the hub.
        corpus: held-out text to read: english, chinese, bilingual, code, a file or a folder.
        characters: at most so much text, taken evenly from the held-out documents.
        layers: the layers to ablate; all of them if none is named.
        seed: of the shuffle and the intervals.
        csv: write the changes of loss to this file, and those of attention beside it.
        figure: draw the changes of loss, as .png, .svg or .pdf.
    """
    _check_outputs(csv, figure)
    loaded = HookedPositionTransformer.from_pretrained(model)
    _check_learned(loaded, "ablating them does nothing", "a model with learned increments")
    texts = corpora.heldout_excerpts(corpus, characters)
    found = causal.ablation_table(loaded, texts, layers or None, seed=seed)
    console = Console(highlight=False)
    first = found.loss.iloc[0]
    of_text = f"{first['n']:,} tokens of {first['documents']} held-out documents of {corpus}"
    print_line(console, f"{loaded.name}: {loaded.position_config.source} increments ablated; {of_text}")
    print_line(
        console, f"loss without ablation {first['baseline']:.4f} nats per token; 95% intervals resample documents\n"
    )
    _print_ablations(console, found)
    if csv is not None:
        beside = csv.with_name(f"{csv.stem}-attention{csv.suffix}")
        found.loss.to_csv(csv, index=False)
        found.attention.to_csv(beside, index=False)
        print_line(console, f"loss: {csv}, attention: {beside}")
    if figure is not None:
        caption = f"{loaded.name}; {of_text}. Intervals: 95% of resamples of documents, seed {seed}."
        ablation_bars(found.loss, caption=caption, path=figure)
        print_line(console, f"figure: {figure}")


@app.command
def report(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    output: Annotated[Path, arg(aliases=["-o"], metavar="FILE")],
    text: Annotated[tuple[str, ...], arg(metavar="TEXT ...")] = (),
    compare: Annotated[str | None, arg(metavar="OTHER")] = None,
    corpus: str | None = None,
    characters: int = 20_000,
    seed: int = 0,
) -> None:
    """Write one page that holds everything about a model's increments, and opens without a network.

    Spacing, tokens tinted by increment, attention beside increments, increments by kind of token, loss and ablations.
    Interrupted, it keeps the parts that are done.

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
        _check_text(one)
    check_page(output)
    loaded = HookedPositionTransformer.from_pretrained(model)
    other = None if compare is None else HookedPositionTransformer.from_pretrained(compare)
    options: list[tuple[str, Any]] = [("--text", text), ("--compare", compare), ("--corpus", corpus)]
    words = ["lens-positions", "report", model, "--output", str(output)]
    for option, value in options:
        words += [option, *([value] if isinstance(value, str) else value)] if value else []
    words += ["--characters", str(characters), "--seed", str(seed)]
    try:
        left_out = write_report(loaded, output, text, other, corpus, characters, seed, shlex.join(words))
    except KeyboardInterrupt as interruption:
        if interruption.args:
            _complain(f"interrupted: {output} has the parts that were done.")
        raise
    for sentence in left_out:
        _complain(sentence)
    print_line(Console(highlight=False), f"report: {output} ({output.stat().st_size / 1e6:.1f} MB)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (None: the process's own) and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app.cli(prog="lens-positions", description=__doc__.splitlines()[0], args=argv)
    except (PositionsError, OSError) as error:
        _complain(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    except SystemExit as exit:  # tyro has printed its help or its complaint
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    return 0


def _check_text(text: str) -> None:
    if not text:
        raise PositionsError("the text is empty; expected at least one character.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise PositionsError(
            f"the text has the lone surrogate U+{code:04X}; expected text that UTF-8 can hold."
        ) from error


def _complain(sentence: str) -> None:
    print(f"lens-positions: {' '.join(sentence.split())}", file=sys.stderr)


def _print_tokens(
    console: Console, model: HookedPositionTransformer, placed: Placed, rows: dict[int, str], means: dict[int, float]
) -> None:
    """Each token with its increments, a row a layer, in blocks as wide as the terminal."""
    config = model.position_config
    heads = ", mean of the heads" if config.per_head else ""
    print_line(console, f"{model.name}: {config.source} increments{heads}, the gap {config.gap} each token")
    print_line(console, "1.00 is one step of standard RoPE; blue: nearer than the layer's mean, orange: farther\n")
    labels = [style.legible(label) for label in placed.labels]
    increments = placed.increments.mean(-1)
    cells = [[increment_cell(value, means[layer]) for value in increments[layer].tolist()] for layer in rows]
    print_grid(console, list(rows.values()), labels, cells)


def _print_kinds(
    console: Console, model: HookedPositionTransformer, placed: Placed, rows: dict[int, str], means: dict[int, float]
) -> None:
    """The mean and standard deviation of the increments by kind of token, a column a layer."""
    table = increments_by_category(model, placed.tokens)
    print_line(console, "by kind of token (how many): mean ± standard deviation\n")
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


def _check_outputs(csv: Path | None, figure: Path | None) -> None:
    if csv is not None and (csv.is_dir() or not csv.parent.is_dir()):
        wrong = f"{csv} is a folder" if csv.is_dir() else f"there is no folder {csv.parent} for {csv.name}"
        raise PositionsError(f"{wrong}; expected the name of a file in an existing folder.")
    if figure is not None:
        style.check_path(figure)


def _check_learned(model: HookedPositionTransformer, so: str, expected: str) -> None:
    if model.position_config.source == "static":
        raise PositionsError(f"every increment of {model.name} is 1.0 (source static), so {so}; expected {expected}.")


def _metric(
    model: HookedPositionTransformer, tokens: Tensor, answer: str | None, wrong: str | None
) -> tuple[Metric, str]:
    """What effects are measured on, and its name with the unit."""
    if tokens.shape[1] < 2:
        raise PositionsError("the text has one token, so there is no gap in it; expected at least two.")
    if answer is None:
        return causal.loss(tokens), "loss, nats per token"
    right = _single_token(model, answer, "answer")
    if wrong is None:
        return causal.log_probability(right), f"log probability of {answer!r}, nats"
    return causal.logit_difference(right, _single_token(model, wrong, "wrong")), f"logit of {answer!r} minus {wrong!r}"


def _single_token(model: HookedPositionTransformer, text: str, option: str) -> int:
    _check_text(text)
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise PositionsError(
            f"--{option} {text!r} is {len(ids)} tokens; expected one (a byte in a byte model; mind the space in front "
            "of a word in others)."
        )
    return int(ids[0])


def _show_effects(
    model: HookedPositionTransformer,
    tokens: Tensor,
    effects: Float[Tensor, "layer pos"],
    layers: tuple[int, ...],
    what: str,
    unit: str,
    csv: Path | None,
    figure: Path | None,
) -> None:
    """Effects as a grid of layers by tokens, the largest of them in a list, a file and a figure."""
    console = Console(highlight=False)
    numbers = sorted(set(layers)) or model.position_layers
    labels = [style.legible(label) for label in model.to_str_tokens(tokens[0])]
    print_line(console, what)
    print_line(console, f"change of the {unit}; orange raises it, blue lowers it\n")
    most = float(effects.nan_to_num().abs().max())
    cells = [[effect_cell(value, most) for value in row] for row in effects.tolist()]
    print_grid(console, [f"layer {number}" for number in numbers], labels, cells)
    print_line(console, "largest effects")
    length = effects.shape[1]
    for i in effects.nan_to_num().abs().flatten().topk(min(8, effects.numel())).indices.tolist():
        layer, t = divmod(i, length)
        around = "".join(labels[max(0, t - 4) : t]) + f"⟦{labels[t]}⟧" + "".join(labels[t + 1 : t + 3])
        print_line(console, f"  {float(effects[layer, t]):+.4f}  layer {numbers[layer]}, token {t}  {around}")
    if csv is not None:
        rows = [
            {"layer": number, "position": t, "token": label, "effect": float(effects[i, t])}
            for i, number in enumerate(numbers)
            for t, label in enumerate(model.to_str_tokens(tokens[0]))
        ]
        pd.DataFrame(rows).to_csv(csv, index=False)
        print_line(console, f"effects: {csv}")
    if figure is not None:
        title = "Effect of each layer and token"
        try:
            effect_map(effects, numbers, labels, title, f"change of {unit}", what, figure)
        except style.MissingFontError as error:
            _complain(f"no figure was drawn: {error}")
        else:
            print_line(console, f"figure: {figure}")


def _print_ablations(console: Console, found: causal.Ablations) -> None:
    """Change of loss, changed predictions, and attention, a row a layer."""
    loss, attention = found.loss, found.attention
    layers, kinds = list(dict.fromkeys(loss["layer"])), list(dict.fromkeys(loss["to"]))
    rows = [layer if layer == "all" else f"layer {layer}" for layer in layers]
    columns = ["shuffled" if kind == "shuffle" else f"to {kind}" for kind in kinds]
    of: Any = loss.set_index(["layer", "to"]).to_dict("index")

    def cells(written: Any) -> list[list[Text]]:
        return [[Text(written(layer, kind)) for kind in kinds] for layer in layers]

    def change(layer: Any, kind: str) -> str:
        row = of[layer, kind]
        interval = "" if math.isnan(row["low"]) else f" ({row['low']:+.4f} to {row['high']:+.4f})"
        return f"{row['change']:+.4f}{interval}"

    print_line(console, "change of loss, nats per token")
    print_grid(console, rows, columns, cells(change))
    print_line(console, "tokens whose most likely prediction is another one")
    print_grid(console, rows, columns, cells(lambda la, kind: f"{of[la, kind]['changed']:.1%}"))
    if attention.empty:
        return
    of_heads = attention.groupby(["ablated", "to"])
    summary = of_heads.agg(mean=("distance", "mean"), most=("distance", "max"), back=("look_back_change", "mean"))
    heads: Any = summary.to_dict("index")
    print_line(console, "total variation between patterns with and without, mean of the heads (largest)")
    print_grid(console, rows, columns, cells(lambda la, kind: "{mean:.3f} ({most:.3f})".format(**heads[la, kind])))
    print_line(console, "change of look-back, tokens, mean of the heads")
    print_grid(console, rows, columns, cells(lambda la, kind: f"{heads[la, kind]['back']:+.2f}"))
