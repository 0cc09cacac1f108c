"""What increments cause: `gaps`, `patch` and `ablate`."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

import lens_positions as lp

from ..config import SweepSite
from ..errors import PositionsError, check_seed, check_text
from ..terminal import effect_cell, print_grid, print_line
from ..viz import output as viz_output
from .app import BOS_OF_MODEL, Bos, announce_figure, app, check_learned, check_outputs, write_table
from .durations import announce_duration

if TYPE_CHECKING:
    from jaxtyping import Float
    from rich.console import Console
    from rich.text import Text
    from torch import Tensor

    from ..measure.metrics import Metric


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
    bos: Bos = BOS_OF_MODEL,
) -> None:
    """Show what lengthening each gap of a text does, at every layer: the first thing to run on any RoPE model.

    Takes about 10 seconds for a sentence with a shipped model, more with larger ones.

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
    check_text(text)
    check_outputs(csv, figure)
    prepend_bos = bos.prepend()
    if wrong is not None and answer is None:
        raise PositionsError("--wrong was given without --answer; expected both, or the answer alone.")

    # Whatever can be refused was refused by here: a typing error should not wait for torch.
    from ..text import one_prompt

    loaded = lp.HookedPositionTransformer.from_pretrained(model)
    tokens = one_prompt(loaded, text, prepend_bos=prepend_bos)
    metric, unit = _metric(loaded, tokens, answer, wrong)
    effects = lp.causal.gap_sweep(loaded, text, metric, by, layers or None, prepend_bos=prepend_bos)

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
    bos: Bos = BOS_OF_MODEL,
) -> None:
    """Show what values recorded on the clean prompt do in the corrupted one, one layer and token at a time.

    The effect is on the logit of the answer minus that of the wrong one, after the last token.

    Takes about 10 seconds for a sentence with a shipped model, more with larger ones.

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
        check_text(prompt)
    check_outputs(csv, figure)
    prepend_bos = bos.prepend()

    import torch

    from ..text import one_prompt

    loaded = lp.HookedPositionTransformer.from_pretrained(model)
    if site in ("increments", "positions"):
        check_learned(loaded, f"patching {site} does nothing", "another --site, or lens-positions gaps")

    # Checked here and not in the sweep, so that the sentence names the options of the command.
    source, tokens = (one_prompt(loaded, prompt, prepend_bos=prepend_bos) for prompt in (clean, corrupted))
    if source.shape != tokens.shape:
        raise PositionsError(
            f"the clean prompt has {source.shape[1]} tokens and the corrupted one {tokens.shape[1]}; expected equally "
            "many (causal.patch_sweep takes a map of tokens)."
        )

    metric, unit = _metric(loaded, tokens, answer, wrong)
    effects = lp.causal.patch_sweep(loaded, clean, corrupted, metric, site, layers or None, prepend_bos=prepend_bos)
    with torch.no_grad():
        # What the effects stand between: the metric on either prompt, without any edit.
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
    tokens: bool = False,
    seed: int = 0,
    csv: Annotated[Path | None, arg(metavar="FILE")] = None,
    figure: Annotated[Path | None, arg(metavar="FILE")] = None,
    bos: Bos = BOS_OF_MODEL,
) -> None:
    """Show what the loss and the attention lose without the structure of the increments, layer by layer.

    Increments go to 1.0, to the mean of their row, or to other tokens (shuffled). What 1.0 does beyond the mean is
    scale, not structure.

    Takes about 40 seconds with a shipped model, more with larger ones.

    Args:
        model: a folder, an adapter, the name of a packaged model, or a model of the hub.
        corpus: held-out text to read: english, chinese, bilingual, code, a file or a folder.
        characters: at most so much text, taken evenly from the held-out documents.
        layers: the layers to ablate; all of them if none is named.
        tokens: also give each token the mean increment that its id has in as much training text, as a frozen table
            would.
        seed: of the shuffle and the intervals.
        csv: write the changes of loss to this file, and those of attention beside it.
        figure: draw the changes of loss, as .png, .svg or .pdf.
    """
    check_outputs(csv, figure)
    prepend_bos = bos.prepend()
    check_seed(seed)

    from rich.console import Console

    announce_duration("ablate", characters)
    loaded = lp.HookedPositionTransformer.from_pretrained(model)
    check_learned(loaded, "ablating them does nothing", "a model with learned increments")
    texts = lp.corpora.heldout_excerpts(corpus, characters)
    means = None
    if tokens:
        # Means of other text than that which is measured: its own would know the answer.
        training = lp.corpora.training_excerpts(corpus, characters)
        means = lp.causal.token_means(loaded, training, prepend_bos=prepend_bos)
    found = lp.causal.ablation_table(loaded, texts, layers or None, seed=seed, means=means, prepend_bos=prepend_bos)

    console = Console(highlight=False)
    of_text = _print_ablated_text(console, loaded, found, corpus)
    _print_ablations(console, found)
    if csv is not None:
        # Two tables of different columns: two files.
        beside = csv.with_name(f"{csv.stem}-attention{csv.suffix}")
        write_table(found.loss, csv)
        write_table(found.attention, beside)
        print_line(console, f"loss: {csv}, attention: {beside}")
    if figure is not None:
        caption = f"{loaded.name}; {of_text}. Intervals: 95% of resamples of documents, seed {seed}."
        with announce_figure(console, figure):
            lp.viz.ablation_bars(found.loss, caption=caption, path=figure)


def _metric(
    model: "lp.HookedPositionTransformer", tokens: "Tensor", answer: str | None, wrong: str | None
) -> "tuple[Metric, str]":
    """What effects are measured on, and its name with the unit."""
    if tokens.shape[1] < 2:
        raise PositionsError("the text has one token, so there is no gap in it; expected at least two.")

    # A prompt without an answer still says something: how well the model predicts the prompt itself.
    if answer is None:
        return lp.causal.loss(tokens), "loss, nats per token"
    right = _single_token(model, answer, "answer")
    if wrong is None:
        return lp.causal.log_probability(right), f"log probability of {answer!r}, nats"
    difference = lp.causal.logit_difference(right, _single_token(model, wrong, "wrong"))
    return difference, f"logit of {answer!r} minus {wrong!r}"


def _single_token(model: "lp.HookedPositionTransformer", text: str, option: str) -> int:
    check_text(text)

    # The effect is on one logit, so the answer has to be one token.
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise PositionsError(
            f"--{option} {text!r} is {len(ids)} tokens; expected one (a byte in a byte model; mind the space in front "
            "of a word in others)."
        )
    return int(ids[0])


def _show_effects(
    model: "lp.HookedPositionTransformer",
    tokens: "Tensor",
    effects: "Float[Tensor, 'layer pos']",
    layers: tuple[int, ...],
    what: str,
    unit: str,
    csv: Path | None,
    figure: Path | None,
) -> None:
    """Effects as a grid of layers by tokens, the largest of them in a list, a file and a figure."""
    from rich.console import Console

    console = Console(highlight=False)

    # In the order of the rows of the map.
    numbers = sorted(set(layers)) or model.position_layers
    labels = [viz_output.visible_text(label) for label in model.to_str_tokens(tokens[0])]
    print_line(console, what)
    print_line(console, f"change of the {unit}; orange raises it, blue lowers it\n")

    # One scale of colour for the whole grid, so that layers compare; NaN is a token that was not edited.
    most = float(effects.nan_to_num().abs().max())
    cells = [[effect_cell(value, most) for value in row] for row in effects.tolist()]
    print_grid(console, [f"layer {number}" for number in numbers], labels, cells)
    print_line(console, "largest effects")
    length = effects.shape[1]

    # The list says in words what the colours say: where the effect is largest, and in which text.
    for i in effects.nan_to_num().abs().flatten().topk(min(8, effects.numel())).indices.tolist():
        # The map was flattened to rank it.
        layer, t = divmod(i, length)
        around = "".join(labels[max(0, t - 4) : t]) + f"⟦{labels[t]}⟧" + "".join(labels[t + 1 : t + 3])
        print_line(console, f"  {float(effects[layer, t]):+.4f}  layer {numbers[layer]}, token {t}  {around}")

    if csv is not None:
        import pandas as pd

        rows = [
            {"layer": number, "position": t, "token": label, "effect": float(effects[i, t])}
            for i, number in enumerate(numbers)
            for t, label in enumerate(model.to_str_tokens(tokens[0]))
        ]
        write_table(pd.DataFrame(rows), csv)
        print_line(console, f"effects: {csv}")
    if figure is not None:
        title = "Effect of each layer and token"
        with announce_figure(console, figure):
            said = what.removeprefix(f"{model.name}: ")  # the figure says the model itself
            lp.viz.effect_map(model, effects, tokens, numbers, title, f"change of {unit}", said, figure)


def _print_ablated_text(
    console: "Console", model: "lp.HookedPositionTransformer", found: "lp.causal.Ablations", corpus: str
) -> str:
    """Print what was ablated, and the loss without; return how to name the text that was read."""
    # Counts and the baseline are the same in every row.
    first = found.loss.iloc[0]
    of_text = f"{first['n']:,} tokens of {first['documents']} held-out documents of {corpus}"
    print_line(console, f"{model.name}: {model.position_config.source} increments ablated; {of_text}")
    print_line(
        console, f"loss without ablation {first['baseline']:.4f} nats per token; 95% intervals resample documents\n"
    )
    return of_text


def _print_ablations(console: "Console", found: "lp.causal.Ablations") -> None:
    """Change of loss, changed predictions, and attention, a row a layer."""
    from rich.text import Text

    from ..viz.effect_charts import ABLATION_LABELS

    loss, attention = found.loss, found.attention

    # Rows and columns in the order of the table, which is that of the model.
    layers, kinds = list(dict.fromkeys(loss["layer"])), list(dict.fromkeys(loss["to"]))
    rows = [layer if layer == "all" else f"layer {layer}" for layer in layers]
    columns = [ABLATION_LABELS.get(kind, f"to {kind}") for kind in kinds]
    of: Any = loss.set_index(["layer", "to"]).to_dict("index")

    def cells(written: Any) -> "list[list[Text]]":
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

    # A number for each head is too much for a terminal: the mean over heads, and the largest.
    of_heads = attention.groupby(["ablated", "to"])
    summary = of_heads.agg(mean=("distance", "mean"), most=("distance", "max"), back=("look_back_change", "mean"))
    heads: Any = summary.to_dict("index")
    print_line(console, "total variation between patterns with and without, mean of the heads (largest)")
    print_grid(console, rows, columns, cells(lambda la, kind: "{mean:.3f} ({most:.3f})".format(**heads[la, kind])))
    print_line(console, "change of look-back, tokens, mean of the heads")
    print_grid(console, rows, columns, cells(lambda la, kind: f"{heads[la, kind]['back']:+.2f}"))
