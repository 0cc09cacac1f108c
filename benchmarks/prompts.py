"""What batches of prompts save over the same prompts one by one, and how far the values are apart.

200 prompts of real text, 5 to 60 tokens long, as many of each length. Gradients are measured on all of them in both
ways; sweeps and mediation, which take minutes a prompt, on a sample of them, and the row says of how many. Times are
CPU seconds of one process. "in pieces" gives the batches the memory-saving backward pass that single runs have, so that
what is left of the ratio is due to the batch alone. The file is written after each row.

    OMP_NUM_THREADS=1 python benchmarks/prompts.py [--model NAME] [--prompts 200] [--sample 6] [--output FILE]
"""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro

import lens_positions as lp
from lens_positions import causal, corpora


@dataclass
class Options:
    """Options.

    Args:
        model: what `from_pretrained` should load.
        prompts: how many.
        shortest, longest: their lengths, in tokens.
        sample: of how many the slow measurements are taken.
        corpus: where the text is from.
        output: where the table is written as JSON.
    """

    model: str = "smollm2-135m-instruct"
    prompts: int = 200
    shortest: int = 5
    longest: int = 60
    sample: int = 6
    corpus: str = "english"
    output: Path = Path("benchmarks/prompts.json")


def main(options: Options) -> None:
    """Measure, print the rows and write them."""
    model = lp.HookedPositionTransformer.from_pretrained(options.model)
    table = prompts_of(model, options)
    sample = table.iloc[:: len(table) // options.sample][: options.sample].reset_index(drop=True)
    metric = causal.logit_difference(int(table["answer"][0]), int(table["wrong"][0]))
    prompts: Any = import_module("lens_positions.causal.prompts")
    causal.attribution(model, table["clean"][0], metric)  # not counted: the first call warms up
    rows: list[dict[str, Any]] = []

    def add(name: str, some: pd.DataFrame, measurement: Callable[..., Any], **arguments: Any) -> None:
        rows.append(compared(name, model, some, measurement, **arguments))
        described = {
            "command": "OMP_NUM_THREADS=1 python benchmarks/prompts.py",
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
            "model": options.model,
            "lengths": [int(n) for n in table["clean"].map(len)],
            "rows": rows,
        }
        options.output.write_text(json.dumps(described, indent=2) + "\n", "utf-8")

    add("attribution", table, causal.attribution)
    fifth = table.iloc[::5].reset_index(drop=True)
    limit, prompts.ACTIVATIONS = prompts.ACTIVATIONS, 0
    add("attribution, batches in pieces", fifth, causal.attribution)
    prompts.ACTIVATIONS = limit
    add("attribution, loss of every token", fifth, causal.attribution, metric=causal.loss())
    add("mediation, 3 layers", sample, causal.mediation, layers=[0, 14, 29])
    add("gap_sweep, 2 layers", sample, causal.gap_sweep, layers=[0, 14])


def prompts_of(model: Any, options: Options) -> pd.DataFrame:
    """Pieces of text, each with the token that follows, another token, and the same piece with one token exchanged."""
    random = np.random.default_rng(0)
    text = " ".join(corpora.heldout_excerpts(options.corpus, 40_000))
    tokens = model.to_tokens(text, prepend_bos=False, truncate=False)[0]
    rows, start = [], 0
    for length in random.permutation(
        np.linspace(options.shortest, options.longest, options.prompts).round().astype(int)
    ):
        clean, answer = tokens[start : start + length], int(tokens[start + length])
        corrupted = clean.clone()
        corrupted[length // 2] = tokens[int(random.integers(len(tokens)))]
        wrong = int(tokens[int(random.integers(len(tokens)))])
        rows.append({"clean": clean, "corrupted": corrupted, "answer": answer, "wrong": wrong})
        start += int(length) + 1
    return pd.DataFrame(rows)


def compared(
    name: str, model: Any, table: pd.DataFrame, measurement: Callable[..., Any], **arguments: Any
) -> dict[str, Any]:
    """Both ways, and how far apart: the largest difference, beside the largest value and that of other batches."""
    start = time.process_time()
    together = causal.over_prompts(measurement, model, table, **arguments)
    batched = time.process_time() - start

    start = time.process_time()
    direct = [single(measurement, model, row, arguments) for row in table.itertuples()]
    one_by_one = time.process_time() - start

    own = np.concatenate([np.asarray(values, dtype=float).ravel() for values in direct])
    found = together.of_prompts["effect"].to_numpy()
    some = table.iloc[:: max(1, len(table) // 20)].reset_index(drop=True)
    sizes = [causal.over_prompts(measurement, model, some, **arguments, tokens_a_batch=n) for n in (90, 700)]
    by_size = np.abs(sizes[0].of_prompts["effect"] - sizes[1].of_prompts["effect"]).max()
    row = {
        "measurement": name,
        "prompts": len(table),
        "cpu_seconds_batched": round(batched, 2),
        "cpu_seconds_one_by_one": round(one_by_one, 2),
        "ratio": round(batched / one_by_one, 3),
        "apart_at_most": float(np.abs(found - own).max()),
        "apart_by_batch_size": float(by_size),
        "largest_value": float(np.abs(own).max()),
    }
    print(row, flush=True)
    return row


def single(measurement: Callable[..., Any], model: Any, row: Any, arguments: dict[str, Any]) -> Any:
    """The measurement of one prompt, by the function of one prompt."""
    given = {"metric": causal.logit_difference(row.answer, row.wrong), **arguments}
    if measurement is causal.mediation:
        return measurement(model, row.clean[None], row.corrupted[None], **given)["mean"]
    return measurement(model, row.clean[None], **given)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except lp.PositionsError as error:
        raise SystemExit(f"benchmarks/prompts.py: {error}") from None
