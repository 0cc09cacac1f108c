"""How a model uses RoPE itself: `frequencies`, `absolute` and `dispersion`."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

import lens_positions as lp

from ..config import BLOCK
from ..errors import PositionsError, check_seed
from ..terminal import print_grid, print_line, with_interval
from .app import BOS_OF_MODEL, Bos, announce_figure, app, check_outputs
from .durations import announce_duration
from .measure import Characters, Chart, Corpus, Model, Seed, print_heading, read_heldout, write_if_asked

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

Csvs = Annotated[
    Path | None, arg(metavar="FILE", help="write the tables to this file and others beside it, with all columns.")
]
BANDS = ("highest quarter", "second", "third", "lowest quarter", "not turned")


@app.command
def frequencies(
    model: Model,
    corpus: Corpus = "english",
    characters: Characters = 20_000,
    seed: Seed = 0,
    csv: Csvs = None,
    figure: Chart = None,
    bos: Bos = BOS_OF_MODEL,
) -> None:
    """Show which rotary frequencies queries and keys are large at, layer by layer, and which heads go by position.

    Works on any RoPE model that streams attach to, learned increments or not.

    Takes about 10 seconds with a shipped model, more with larger ones.
    """
    check_outputs(csv, figure)
    prepend_bos = bos.prepend()

    from ..analysis.frequencies import SIDES

    loaded, texts, what = read_heldout("frequencies", model, corpus, characters)
    norms = lp.analysis.frequency_norms(loaded, texts, seed=seed, prepend_bos=prepend_bos)
    heads = lp.analysis.positional_heads(loaded, texts, seed=seed, prepend_bos=prepend_bos)
    console = print_heading(
        f"{loaded.name}: mean 2-norm of queries and keys by rotary frequency, {what}",
        "mean over tokens, heads and the frequencies of a quarter",
    )

    # Dozens of frequencies are too many columns for a terminal.
    norms["band"] = lp.analysis.frequency_quarters(norms).map(dict(enumerate(BANDS)))
    for side in SIDES:
        _print_norms(console, side, norms[norms["side"] == side])
    use = _print_positional_heads(console, norms, heads)

    _write_tables(console, csv, norms.drop(columns="band"), heads=heads, use=use)
    if figure is not None:
        caption = f"{loaded.name}; {what}. Means over heads and tokens."
        with announce_figure(console, figure):
            lp.viz.norms_map(norms, caption, figure)


def _print_positional_heads(console: "Console", norms: "pd.DataFrame", heads: "pd.DataFrame") -> "pd.DataFrame":
    """The heads that attend by position, and whether they use high frequencies more than others, as a table too."""
    import pandas as pd

    found = heads[heads["positional"]]
    print_line(console, f"{len(found)} of {len(heads)} heads give over half of their attention to one offset, whatever")
    print_line(console, "the tokens are (share of attention, and with the tokens in another order; 95% intervals):\n")
    for head in found.to_dict("records"):
        shares = (with_interval(head, name, ".0%", f"{name}_") for name in ("share", "shuffled"))
        print_line(
            console, f"  layer {head['layer']} head {head['head']}: {head['offset']} back, {' and '.join(shares)}"
        )

    # A model with NoPE layers alone has nothing to compare.
    turns = bool((norms["frequency"] > 0).any())
    use = lp.analysis.high_frequency_use(norms, heads) if turns else pd.DataFrame()
    rows: Any = use.itertuples()
    for row in rows:
        if row.n and row.others:
            print_line(
                console,
                f"  {row.side}: share of squared mean norms in the highest quarter {row.positional:.1%} in {row.n} of "
                f"them, {row.other:.1%} in the {row.others} others (Mann-Whitney p = {row.p:.2g})",
            )
    if not turns:
        print_line(console, "  no frequency turns in this model, so none is used more than another.")
    return use


def _print_norms(console: "Console", side: str, norms: "pd.DataFrame") -> None:
    """The mean norm of queries or keys, a row a layer, a column for each quarter of the frequencies that there is."""
    from rich.text import Text

    # A model that turns few components lacks some quarters; an empty column would look like a zero.
    layers = list(dict.fromkeys(norms["layer"]))
    bands = [band for band in BANDS if (norms["band"] == band).any()]
    means = norms.groupby(["layer", "band"])["norm"].mean()
    cells = [[Text(f"{means[layer, band]:.2f}") for band in bands] for layer in layers]
    print_grid(console, [f"{side}, layer {layer}" for layer in layers], bands, cells)


@app.command
def absolute(
    model: Model,
    corpus: Corpus = "english",
    texts: Annotated[int, arg(help="how many pieces of held-out documents give their beginnings.")] = 24,
    block: Annotated[int, arg(help="tokens that repeat.")] = BLOCK,
    hold: Annotated[bool, arg(help="hold positions on a ruler, each text's own mean step apart.")] = False,
    seed: Seed = 0,
    csv: Csvs = None,
    figure: Chart = None,
    bos: Bos = BOS_OF_MODEL,
) -> None:
    """Show where absolute position comes from, layer by layer, on texts whose beginning repeats.

    The log attention at a fixed distance varies over repeats through the score (the residual stream) and through the
    sum over all keys (the causal mask); then, what goes when the first token's embedding is replaced.

    Takes about 20 seconds with a shipped model, more with larger ones.
    """
    check_outputs(csv, figure)
    prepend_bos = bos.prepend()
    check_seed(seed)
    if texts < 2:
        raise PositionsError(f"--texts is {texts}; expected at least 2, for intervals.")

    announce_duration("absolute")
    loaded = lp.HookedPositionTransformer.from_pretrained(model)
    given = lp.corpora.heldout_pieces(corpus, texts)

    # The same edit in all three measurements, so that their numbers are of one model.
    hooks = lp.ablate(loaded, to="mean", site="positions") if hold else None
    table = lp.analysis.absolute_variation(loaded, given, hooks=hooks, block=block, seed=seed, prepend_bos=prepend_bos)
    drops = lp.analysis.replacement_effects(loaded, given, hooks=hooks, block=block, seed=seed, prepend_bos=prepend_bos)
    found = lp.analysis.attention_sinks(loaded, given, hooks=hooks, seed=seed, prepend_bos=prepend_bos)

    what = f"the beginnings of {len(given)} pieces of held-out {corpus}, repeated"
    console = print_heading(
        f"{loaded.name}: variance of log attention over absolute positions, {what}",
        "nats squared, mean over heads, early and late quarter of the repeats; attention to position 0 (largest head); "
        "95% intervals resample pieces",
    )

    _print_parts(console, table, found)
    print_line(console, "the residual part that goes when the embedding at position 0 is replaced (95% intervals):\n")
    for row in drops[drops["layer"] == "all"].to_dict("records"):
        drop = "nothing to lose" if math.isnan(row["drop"]) else with_interval(row, "drop", "+.0%")
        print_line(console, f"  {row['replacement']:6} {row['queries']:5}  {drop}")

    _write_tables(console, csv, table, drops=drops, sinks=found)
    if figure is not None:
        caption = f"{loaded.name}; {what}. Means over heads. log attention = score (residual) - log Z (mask)."
        with announce_figure(console, figure):
            lp.viz.absolute_chart(table, caption, figure)


def _print_parts(console: "Console", table: "pd.DataFrame", found: "pd.DataFrame") -> None:
    """The residual and the mask part at early and late queries, and the attention to position 0, a row a layer."""
    from rich.text import Text

    from ..analysis.absolute_position import QUARTERS

    # With the common first token, where the model has one; it comes first in the table.
    sinks = found[found["first"] == found["first"].iloc[0]].groupby("layer")["share"]
    overall = table[(table["head"] == "all") & (table["layer"] != "all")]

    # The first and the last quarter are enough to see what changes along the text.
    sides = {"early": overall[overall["quarter"] == 0], "late": overall[overall["quarter"] == QUARTERS - 1]}
    layers = list(dict.fromkeys(overall["layer"]))
    columns = [f"{part}, {name}" for part in ("residual", "mask") for name in sides]
    cells = []
    for layer in layers:
        rows = [(own[own["layer"] == layer].iloc[0], part) for part in ("residual", "mask") for own in sides.values()]
        values = [with_interval(row, part, ".4f", f"{part}_") for row, part in rows]
        cells.append([Text(value) for value in (*values, f"{sinks.mean()[layer]:.0%} ({sinks.max()[layer]:.0%})")])
    print_grid(console, [f"layer {layer}" for layer in layers], [*columns, "sink"], cells)


@app.command
def dispersion(
    model: Model,
    corpus: Corpus = "english",
    characters: Characters = 20_000,
    lengths: Annotated[tuple[int, ...], arg(help="tokens of a window at which the loss is measured.")] = (64, 128, 256),
    seed: Seed = 0,
    csv: Csvs = None,
    figure: Chart = None,
    bos: Bos = BOS_OF_MODEL,
) -> None:
    """Show how attention spreads with the number of items, and what an adaptive temperature does to the loss.

    Takes about 20 seconds with a shipped model, more with larger ones.
    """
    check_outputs(csv, figure)
    prepend_bos = bos.prepend()

    from rich.text import Text

    loaded, texts, what = read_heldout("dispersion", model, corpus, characters)

    # Dispersion is of the model as it is; only the losses below are also with the temperature.
    hooks = lp.analysis.adaptive_temperature(loaded)
    table = lp.analysis.attention_dispersion(loaded, texts, seed=seed, prepend_bos=prepend_bos)
    losses = lp.analysis.loss_by_length(loaded, texts, hooks, lengths, seed, prepend_bos=prepend_bos)
    console = print_heading(
        f"{loaded.name}: attention by the number of items, {what}",
        "entropy in nats, mean over heads, with 95% intervals; the entropy of even attention below",
    )

    means = table[table["head"] == "all"]
    layers, items = list(dict.fromkeys(means["layer"])), sorted(set(means["items"]))
    groups = means.set_index(["layer", "items"])
    cells = [
        [Text(with_interval(groups.loc[(layer, n)], "entropy", ".2f", "entropy_")) for n in items] for layer in layers
    ]

    # What attention would have that is spread evenly: the row to compare with.
    even = means.groupby("items")["log_items"].mean()
    cells.append([Text(f"{even[n]:.2f}") for n in items])
    print_grid(console, [*(f"layer {layer}" for layer in layers), "even"], [f"{n:,}" for n in items], cells)

    print_line(console, "loss with every score at an adaptive temperature, nats per token (95% intervals):\n")
    for row in losses.to_dict("records"):
        difference = with_interval(row, "difference", "+.4f")
        print_line(
            console,
            f"  {row['length']:,} tokens: {row['loss']:.4f}, with it {row['changed']:.4f}, {difference}, "
            f"n = {row['n']:,}",
        )
    _write_tables(console, csv, table, losses=losses)
    if figure is not None:
        with announce_figure(console, figure):
            lp.viz.entropy_chart(table, f"{loaded.name}; {what}. Means over heads.", figure)


def _write_tables(console: "Console", csv: Path | None, table: "pd.DataFrame", **others: "pd.DataFrame") -> None:
    """Write a table, and others beside it with their name behind its own."""
    write_if_asked(console, table, csv)
    for name, other in others.items():
        if csv is not None and not other.empty:
            write_if_asked(console, other, csv.with_stem(f"{csv.stem}_{name}"))
