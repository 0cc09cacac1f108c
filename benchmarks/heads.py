"""gap_sweep by head on SmolLM2-135M: how fast and how exact, against a loop of hooks.

    python benchmarks/heads.py

24 tokens, 30 layers, 9 query heads (3 of them share keys); the metric is a logit difference at the last token. The loop
runs `run_with_hooks` with `add_gap(..., heads=...)`, an edit at a time. It is timed and compared on edits drawn at
random, in turns with the sweep in the same run, so that a machine that slows down slows both; its time for all edits is
that of the drawn ones, scaled to their number.
"""

import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

import lens_positions as lp
from lens_positions import causal
from lens_positions.progress import track_progress

PROMPT = "When John and Mary went to the store in the old town, John gave a bottle of milk and bread to"


@dataclass
class Options:
    """Options.

    Args:
        model: what `from_pretrained` should load.
        tokens: of the prompt.
        edits: of the loop that are run.
        turns: of sweep and loop.
        seed: of the edits that are drawn.
        output: the file of the results.
    """

    model: str = "smollm2-135m-instruct"
    tokens: int = 24
    edits: int = 90
    turns: int = 2
    seed: int = 0
    output: Path = Path("benchmarks/heads.json")


def main(options: Options) -> None:
    model = lp.HookedPositionTransformer.from_pretrained(options.model)
    tokens = model.to_tokens(PROMPT)
    tokens = torch.cat([tokens, tokens], dim=1)[:, : options.tokens]
    metric = causal.logit_difference(model.to_single_token(" Mary"), model.to_single_token(" John"))
    layers, heads = model.position_layers, model.cfg.n_heads
    every = [(layer, head, t) for layer in layers for head in range(heads) for t in range(1, options.tokens)]
    chosen = np.random.default_rng(options.seed).permutation(len(every))[: options.edits]
    drawn = [every[i] for i in chosen]

    with torch.no_grad():
        baseline = float(metric(model(tokens))[0])
        model.run_with_hooks(tokens, fwd_hooks=lp.add_gap(model, 1, layers=0, heads=0))  # whether heads can be edited

    sweep_seconds, loop_seconds, effects, errors = [], [], torch.empty(0), []
    for part in np.array_split(np.array(drawn), options.turns):
        began = time.perf_counter()
        effects = causal.gap_sweep(model, tokens, metric, by="head")
        sweep_seconds.append(time.perf_counter() - began)

        began = time.perf_counter()
        with torch.no_grad():
            for layer, head, t in track_progress(part.tolist(), "loop"):
                hooks = lp.add_gap(model, t, layers=layer, heads=head)
                value = float(metric(model.run_with_hooks(tokens, fwd_hooks=hooks))[0]) - baseline
                errors.append(abs(value - float(effects[layers.index(layer), head, t])))
        loop_seconds.append((time.perf_counter() - began) / len(part))

    whole = float(np.mean(loop_seconds)) * len(every)
    result = {
        "model": options.model,
        "tokens": options.tokens,
        "layers": len(layers),
        "query_heads": heads,
        "edits": len(every),
        "loop_edits_run": len(drawn),
        "sweep_seconds": [round(seconds, 2) for seconds in sweep_seconds],
        "loop_seconds_an_edit": [round(seconds, 4) for seconds in loop_seconds],
        "loop_seconds_all": round(whole, 1),
        "ratio": round(whole / float(np.mean(sweep_seconds)), 2),
        "largest_error": max(errors),
        "largest_effect": float(effects.abs().max()),
        "seed": options.seed,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except lp.PositionsError as error:
        raise SystemExit(f"benchmarks/heads.py: {error}") from None
