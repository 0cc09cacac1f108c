"""Sweeps and attributions on SmolLM2-135M: how fast, how exact, and how far a gradient can be trusted.

    python benchmarks/causal.py sweeps        speed and error of gap_sweep and patch_sweep against the plain loop
    python benchmarks/causal.py attribution   attribution against exact effects, on 24 prompts

Sweeps: 32 tokens, 30 layers, two threads; the metric is a logit difference at the last token. The plain loop of
`run_with_hooks` is run whole for gap_sweep; for patch_sweep it is timed and compared on cells drawn at random. Loop and
sweep take turns in parts of the same run, so a machine that slows down slows both.

Attribution: sentences of held-out presidential messages, cut to 24 tokens; the metric is the log probability of the
next token. The exact effect is gap_sweep's, for a change of 0.5 and of 0.05 of each gap.
"""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from scipy import stats

import lens_positions as lp
from lens_positions import causal, corpora
from lens_positions.causal.sweeps import SITES
from lens_positions.progress import track_progress

PROMPT = (
    "When John and Mary went to the store in the old town, John gave a bottle of milk and a loaf of warm bread to the "
    "tall woman, and to"
)
OTHER = (
    "When Paul and Anna ran to the house on the long road, Anna took a basket of eggs and a sack of fresh apples to "
    "the old teacher, and to"
)
SITES_COMPARED = ("increments", "positions", "rot_q", "rot_k", "resid", "pattern")


@dataclass
class Options:
    """Options.

    Args:
        what: "sweeps" or "attribution".
        model: what `from_pretrained` should load.
        cells: edits of the plain loop for each site of patch_sweep.
        prompts: prompts for attribution.
        tokens: tokens of each.
        seed: of the cells that are drawn.
    """

    what: tyro.conf.Positional[Literal["sweeps", "attribution"]]
    model: str = "smollm2-135m-instruct"
    cells: int = 96
    prompts: int = 24
    tokens: int = 24
    seed: int = 0


def main(options: Options) -> None:
    model = lp.HookedPositionTransformer.from_pretrained(options.model)
    result = sweeps(model, options) if options.what == "sweeps" else attributions(model, options)
    result |= {"model": options.model, "seed": options.seed, "threads": torch.get_num_threads()}
    result |= {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    output = Path(f"benchmarks/causal_{options.what}.json")
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {output}")


def sweeps(model: lp.HookedPositionTransformer, options: Options) -> dict[str, Any]:
    """Time both sweeps against the loop."""
    tokens, other = model.to_tokens(PROMPT), model.to_tokens(OTHER)
    length = min(tokens.shape[1], other.shape[1], 32)
    tokens, other = tokens[:, :length], other[:, :length]
    metric = causal.logit_difference(model.to_single_token(" Mary"), model.to_single_token(" John"))
    layers = model.position_layers
    rows = []

    def compare(name: str, sweep: Callable[[], torch.Tensor], cells: list[tuple[int, int]], edits: Any, all_: int):
        """A quarter of the loop, the sweep, and so on: four turns."""
        seconds, loop, effects, values = 0.0, 0.0, torch.empty(0), []
        for part in np.array_split(np.array(cells), 4):
            began = time.perf_counter()
            effects = sweep()
            seconds += (time.perf_counter() - began) / 4
            began = time.perf_counter()
            with torch.no_grad():
                for layer, t in track_progress(part.tolist(), f"loop of {name}"):
                    values.append(float(metric(model.run_with_hooks(tokens, fwd_hooks=edits(layer, t)))[0]))
            loop += time.perf_counter() - began
        loop *= all_ / len(cells)
        with torch.no_grad():
            baseline = float(metric(model(tokens))[0])
        exact = torch.tensor([value - baseline for value in values])
        ours = torch.stack([effects[layers.index(layer), t] for layer, t in cells])
        row = {
            "sweep": name,
            "edits": all_,
            "loop_edits_run": len(cells),
            "sweep_seconds": round(seconds, 2),
            "loop_seconds": round(loop, 1),
            "ratio": round(loop / seconds, 2),
            "largest_error": float((ours - exact).abs().max()),
            "largest_effect": float(exact.abs().max()),
        }
        print(row, flush=True)
        rows.append(row)

    every = [(layer, t) for layer in layers for t in range(1, length)]
    compare(
        "gap_sweep", lambda: causal.gap_sweep(model, tokens, metric), every,
        lambda layer, t: lp.add_gap(model, t, layers=layer), len(every),
    )  # fmt: skip
    _, cache = model.run_with_cache(other)
    random = np.random.default_rng(options.seed)
    for site in SITES_COMPARED:
        hook, axis = SITES[site]

        def edit(layer: int, t: int, hook: str = hook, axis: int = axis):
            name = f"blocks.{layer}.{hook}"

            def put(values, hook):
                values = values.clone()
                values.movedim(axis, 1)[:, t] = cache[name].movedim(axis, 1)[:, t]
                return values

            return [(name, put)]

        drawn = [(layers[i // length], i % length) for i in random.permutation(len(layers) * length)[: options.cells]]
        compare(
            f"patch_sweep {site}",
            lambda site=site: causal.patch_sweep(model, cache, tokens, metric, site),
            drawn, edit, len(layers) * length,
        )  # fmt: skip
    return {"tokens": length, "layers": len(layers), "sweeps": rows}


def attributions(model: lp.HookedPositionTransformer, options: Options) -> dict[str, Any]:
    """Correlate attribution with exact effects, prompt by prompt."""
    texts = corpora.heldout_excerpts("english", 40_000)
    sentences = [s.strip() for text in texts for s in text.replace("\n", " ").split(". ")]
    long = [model.to_tokens(s)[0] for s in sentences if len(s) > 60]
    prompts = [t[: options.tokens + 1] for t in long if len(t) > options.tokens]
    chosen = np.random.default_rng(options.seed).permutation(len(prompts))[: options.prompts]
    rows, gradients, exacts, integrals = [], [], [], []
    for i in track_progress(chosen.tolist(), "prompts"):
        tokens, metric = prompts[i][None, :-1], causal.log_probability(int(prompts[i][-1]))
        gradient = causal.attribution(model, tokens, metric)
        half, small = (causal.gap_sweep(model, tokens, metric, by=by) for by in (0.5, 0.05))
        # From every gap 0.5 longer to standard RoPE: its sign is that of shortening.
        integrated = -causal.attribution(model, tokens, metric, "integrated", baseline=1.5)
        with torch.no_grad():
            longer = model.run_with_hooks(tokens, fwd_hooks=lp.ablate(model, to=1.5))
            whole = float(metric(longer)[0] - metric(model(tokens))[0])
        row = {
            "prompt": model.tokenizer.decode(tokens[0], skip_special_tokens=True),
            "gradient_and_half": correlation(gradient[:, 1:], half[:, 1:]),
            "gradient_and_small": correlation(gradient[:, 1:], small[:, 1:]),
            "integrated_and_half": correlation(integrated[:, 1:], half[:, 1:]),
            "whole_effect": whole,
            "integrated_sum": float(integrated.double().sum()),
            "same_sign_of_largest_tenth": same_sign(gradient[:, 1:], half[:, 1:]),
        }
        print({k: round(v, 4) for k, v in row.items() if k != "prompt"}, flush=True)
        rows.append(row)
        gradients.append(gradient), exacts.append(half), integrals.append(integrated)
    summary = {}
    for name in ("gradient_and_half", "gradient_and_small", "integrated_and_half", "same_sign_of_largest_tenth"):
        values = np.array([row[name] for row in rows])
        interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        summary[name] = {"mean": values.mean(), "low": interval.low, "high": interval.high, "least": values.min()}
    off = [abs(row["integrated_sum"] - row["whole_effect"]) / abs(row["whole_effect"]) for row in rows]
    g, e = torch.stack(gradients), torch.stack(exacts)
    by_layer = [correlation(g[:, layer, 1:], e[:, layer, 1:]) for layer in range(g.shape[1])]
    by_token = {
        f"{near} to {far} tokens before the end": correlation(g[..., -far - 1 : -near], e[..., -far - 1 : -near])
        for near, far in ((1, 3), (4, 11), (12, options.tokens - 2))
    }
    before = [previous_token(model, prompts[i][None, :-1]) for i in chosen]
    return {
        "attention_to_previous_token_by_layer": np.mean(before, axis=0).tolist(),
        "rank_correlation_of_that_and_agreement": stats.spearmanr(np.mean(before, axis=0), by_layer)._asdict(),
        "prompts": len(rows),
        "tokens": options.tokens,
        "summary": summary,
        "integrated_sum_off_at_most": max(off),
        "gradient_and_half_by_layer": by_layer,
        "gradient_and_half_by_token": by_token,
        "rows": rows,
    }


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Pearson's, over all gaps."""
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])


def previous_token(model: lp.HookedPositionTransformer, tokens: torch.Tensor) -> np.ndarray:
    """For each layer, the attention to the token before of the head that has most of it, query 3 and later."""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_pattern"))
    patterns = torch.stack([cache["pattern", layer][0] for layer in model.position_layers])
    return patterns.diagonal(-1, dim1=-2, dim2=-1)[..., 2:].mean(-1).max(-1).values.numpy()


def same_sign(gradient: torch.Tensor, exact: torch.Tensor) -> float:
    """How often the gradient has the sign of the exact effect, among the tenth of gaps that matter most."""
    most = exact.flatten().abs().topk(exact.numel() // 10).indices
    return float((gradient.flatten()[most].sign() == exact.flatten()[most].sign()).double().mean())


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except lp.PositionsError as error:
        raise SystemExit(f"benchmarks/causal.py: {error}") from None
