"""How a model uses RoPE itself: `frequencies`."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.text import Text

from ..analysis.frequencies import SIDES, frequency_norms, high_frequency_use, positional_heads
from ..hooked import HookedPositionTransformer
from ..terminal import print_grid, print_line
from ..viz.measurements import frequency_map
from .app import app, check_outputs, drawn
from .measuring import Characters, Chart, Corpus, Csv, Model, Seed, headed, read_heldout, written

BANDS = ("highest quarter", "second", "third", "lowest quarter", "not turned")


@app.command
def frequencies(
    model: Model,
    corpus: Corpus = "english",
    characters: Characters = 20_000,
    seed: Seed = 0,
    csv: Csv = None,
    figure: Chart = None,
) -> None:
    """Show which rotary frequencies queries and keys are large at, layer by layer, and which heads go by position.

    Works on any RoPE model that streams attach to, learned increments or not.
    """
    check_outputs(csv, figure)
    loaded, texts, what = read_heldout(model, corpus, characters)
    norms = frequency_norms(loaded, texts, seed=seed)
    heads = positional_heads(loaded, texts, seed=seed)
    console = headed(
        f"{loaded.name}: mean 2-norm of queries and keys by rotary frequency, {what}",
        "mean over tokens, heads and the frequencies of a quarter",
    )
    norms["band"] = _bands(norms)
    layers = list(dict.fromkeys(norms["layer"]))
    for side in SIDES:
        own = norms[norms["side"] == side]
        bands = [band for band in BANDS if (own["band"] == band).any()]
        means = own.groupby(["layer", "band"])["norm"].mean()
        cells = [[Text(f"{means[layer, band]:.2f}") for band in bands] for layer in layers]
        print_grid(console, [f"{side}, layer {layer}" for layer in layers], bands, cells)
    found = heads[heads["positional"]]
    print_line(console, f"{len(found)} of {len(heads)} heads give over half of their attention to one offset, whatever")
    print_line(console, "the tokens are (share of attention, and with the tokens in another order; 95% intervals):\n")
    rows: Any = found.itertuples()
    for row in rows:
        shares = (
            f"{getattr(row, name):.0%}" + ("" if math.isnan(getattr(row, f"{name}_low")) else f" ({_ends(row, name)})")
            for name in ("share", "shuffled")
        )
        print_line(console, f"  layer {row.layer} head {row.head}: {row.offset} back, {' and '.join(shares)}")
    rows = high_frequency_use(norms, heads).itertuples()
    for row in rows:
        if row.n and row.others:
            print_line(
                console,
                f"  {row.side}: share of squared norm in the highest quarter {row.positional:.1%} in {row.n} of them, "
                f"{row.other:.1%} in the {row.others} others (Mann-Whitney p = {row.p:.2g})",
            )
    written(console, norms.drop(columns="band"), csv)
    if figure is not None:
        caption = f"{loaded.name}; {what}. Means over heads and tokens."
        with drawn(console, figure):
            _draw(loaded, norms, caption, figure)


def _bands(norms: pd.DataFrame) -> "pd.Series[str]":
    """The quarter of its layer's frequencies that each chunk is in."""
    turned = norms["frequency"] > 0
    counts = norms["index"].where(turned).groupby(norms["layer"]).transform("max") + 1
    quarter = (4 * norms["index"] / counts).where(turned, 4).astype(int)
    return quarter.map(dict(enumerate(BANDS)))


def _ends(row: Any, name: str) -> str:
    return f"{getattr(row, f'{name}_low'):.0%} to {getattr(row, f'{name}_high'):.0%}"


def _draw(model: HookedPositionTransformer, norms: pd.DataFrame, caption: str, path: Path) -> None:
    turned = norms[norms["frequency"] > 0]
    means = turned.groupby(["side", "layer", "index"])["norm"].mean()
    amounts = {f"{side} norm": torch.tensor(means[side].unstack().to_numpy()) for side in SIDES}
    same = turned.groupby("index")["frequency"].nunique().eq(1).all()
    wavelengths = 2 * np.pi / turned.groupby("index")["frequency"].first().to_numpy() if same else None
    frequency_map(
        amounts, model.position_layers, wavelengths, "Norms by rotary frequency", "mean 2-norm", caption, path
    )
