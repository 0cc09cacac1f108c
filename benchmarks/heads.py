"""gap_sweep by head on SmolLM2-135M: how fast and how exact, against a loop of hooks.

    python benchmarks/heads.py

24 tokens, 30 layers, 9 query heads (3 of them share keys); the metric is a logit difference at the last token. The loop
runs `run_with_hooks` with `add_gap(..., heads=...)`, an edit at a time. It is timed and compared on edits drawn at
random, in turns with the sweep in the same run, so that a machine that slows down slows both; its time for all edits is
that of the drawn ones, scaled to their number. Both are measured in seconds of the clock and in CPU seconds of the
process, which say more where others use the machine.

`least_cpu_seconds` is what matrix products alone take that a sweep cannot leave out as long as it computes each edit:
those of all blocks but the last from an edit's layer on, from its token on, at the speed of 1,024 rows at once, and the
logits of one token an edit.
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

    sweeps, loops, least, effects, errors = [], [], [], torch.empty(0), []
    for part in np.array_split(np.array(drawn), options.turns):
        began = now()
        effects = causal.gap_sweep(model, tokens, metric, by="head")
        sweeps.append(now() - began)
        least.append(least_cpu_seconds(model, options.tokens))

        began = now()
        with torch.no_grad():
            for layer, head, t in track_progress(part.tolist(), "loop"):
                hooks = lp.add_gap(model, t, layers=layer, heads=head)
                value = float(metric(model.run_with_hooks(tokens, fwd_hooks=hooks))[0]) - baseline
                errors.append(abs(value - float(effects[layers.index(layer), head, t])))
        loops.append((now() - began) / len(part))

    sweep, an_edit = np.mean(sweeps, axis=0), np.mean(loops, axis=0)
    ratio, cpu_ratio = an_edit * len(every) / sweep
    result = {
        "model": options.model,
        "tokens": options.tokens,
        "layers": len(layers),
        "query_heads": heads,
        "edits": len(every),
        "loop_edits_run": len(drawn),
        "sweep_seconds": [round(float(seconds), 2) for seconds, _ in sweeps],
        "sweep_cpu_seconds": [round(float(seconds), 2) for _, seconds in sweeps],
        "loop_seconds_an_edit": [round(float(seconds), 4) for seconds, _ in loops],
        "loop_cpu_seconds_an_edit": [round(float(seconds), 4) for _, seconds in loops],
        "ratio": round(float(ratio), 2),
        "cpu_ratio": round(float(cpu_ratio), 2),
        "least_cpu_seconds": [round(seconds, 1) for seconds in least],
        "largest_cpu_ratio": round(float(an_edit[1]) * len(every) / float(np.mean(least)), 2),
        "largest_error": max(errors),
        "largest_effect": float(effects.abs().max()),
        "seed": options.seed,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def now() -> np.ndarray:
    """Seconds of the clock, and CPU seconds of this process."""
    return np.array([time.perf_counter(), time.process_time()])


def least_cpu_seconds(model: lp.HookedPositionTransformer, tokens: int, rows: int = 1024) -> float:
    """The matrix products of all edits, at the speed that they have in large batches.

    The last block is left out, as it runs for little more than keys and values: the rest is of the last token alone.
    """
    base, count = model.original_model, len(model.position_layers)
    block = [p for name, p in base.named_parameters() if f"layers.{count // 2}." in name and p.ndim == 2]
    layers_of_edits = sum(range(count))
    tokens_of_edits = sum(tokens - t for t in range(1, tokens))
    a_row = products_cpu_seconds(block, rows) / rows
    a_logit = products_cpu_seconds([base.get_output_embeddings().weight], rows) / rows
    return model.cfg.n_heads * (layers_of_edits * tokens_of_edits * a_row + count * (tokens - 1) * a_logit)


def products_cpu_seconds(weights: list[torch.Tensor], rows: int, turns: int = 5) -> float:
    """CPU seconds of one product with each matrix, the mean of some turns."""
    inputs = [torch.randn(rows, weight.shape[1]) for weight in weights]
    with torch.no_grad():
        torch.nn.functional.linear(inputs[0], weights[0])
        began = time.process_time()
        for _ in range(turns):
            for given, weight in zip(inputs, weights, strict=True):
                torch.nn.functional.linear(given, weight)
    return (time.process_time() - began) / turns


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except lp.PositionsError as error:
        raise SystemExit(f"benchmarks/heads.py: {error}") from None
