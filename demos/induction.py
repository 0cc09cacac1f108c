"""A worked study: where does distance matter for induction in SmolLM2-135M?

    python demos/induction.py [--prompts 60] [--seed 0]

A prompt is a list of twelve random words and its first nine again: the model should go on with the tenth. It does so by
induction (Olsson et al., "In-context Learning and Induction Heads", 2022): a head of an early layer writes into each
word which word stood one step before it, and a head of a later layer looks for the word whose predecessor is the
present one. If the first head finds that predecessor by distance, then lengthening by one step the gap between the
ninth and the tenth word of the list, and no other, should harm the answer, in the layer of that head; if it finds it in
another way, it should do no more than other gaps do.

    measured   gap_sweep: every gap one position longer, at every layer; the metric is the logit of the tenth word
               minus the mean logit of the other eleven
    target     the gap before the tenth word of the list
    control 1  the gaps before the other words of the list but the first and the ninth: same place, no part in the match
    control 2  the same target and controls where the words after the list are other random words, so that there is no
               match: what is special about the place, not about induction

Per layer: target minus control, paired by prompt, with a 95% t interval, and a two-sided t test, corrected over the
layers (Benjamini and Hochberg). The ninth word's gap is left out of the controls, as it moves the match's own key.
Writes docs/induction.csv and docs/induction.png. Random words, so that nothing but the repetition gives the answer.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from matplotlib.figure import Figure
from scipy import stats

import lens_positions as lp
from lens_positions import causal
from lens_positions.measure.intervals import t_interval
from lens_positions.measure.metrics import AtToken
from lens_positions.progress import track_progress
from lens_positions.viz import style
from lens_positions.viz.effect_charts import DIVERGING

LIST, AGAIN = 12, 9
"""Words of the list, and how many of them come again; the answer is word AGAIN, counted from 0."""

TARGET = AGAIN
CONTROLS = [t for t in range(1, LIST) if t not in (TARGET, TARGET - 1)]
"""Words whose gap is meant: the one before them. There is no start token, which SmolLM2-Instruct reads as a turn's."""


@dataclass
class Options:
    """Options.

    Args:
        prompts: prompts with a repetition, and as many without.
        model: what `from_pretrained` should load.
        seed: of the words.
        output: where the table and the figure go, as .csv and .png.
    """

    prompts: int = 60
    model: str = "smollm2-135m-instruct"
    seed: int = 0
    output: Path = Path("docs/induction")


def main(options: Options) -> None:
    """Sweep every prompt, test every layer, write the table and the figure."""
    model = lp.HookedPositionTransformer.from_pretrained(options.model)
    words = plain_words(model)
    random = np.random.default_rng(options.seed)
    effects: dict[str, list[torch.Tensor]] = {"repeated": [], "not repeated": []}
    logits: dict[str, list[float]] = {"repeated": [], "not repeated": []}
    right = []
    for _ in track_progress(range(options.prompts), "prompts"):
        drawn = words[random.permutation(len(words))[: LIST + AGAIN]]
        listed, others = drawn[:LIST], drawn[LIST:]
        for kind, second in (("repeated", listed[:AGAIN]), ("not repeated", others)):
            prompt = torch.tensor([[*listed, *second]])
            metric = AtToken(answer_against(int(listed[AGAIN]), [int(w) for i, w in enumerate(listed) if i != AGAIN]))
            with torch.no_grad():
                last = model(prompt)
            logits[kind].append(float(metric(last)[0]))
            if kind == "repeated":
                right.append(bool(last[0, -1].argmax() == listed[AGAIN]))
            effects[kind].append(causal.gap_sweep(model, prompt, metric))
    swept = {kind: torch.stack(of_kind).double().numpy() for kind, of_kind in effects.items()}
    table = tested(swept, model.position_layers)
    table.to_csv(options.output.with_suffix(".csv"), index=False, float_format="%.5g")
    found = table[(table["prompts"] == "repeated") & (table["q"] < 0.05)]
    n = options.prompts
    print(
        f"the answer is the most likely next word in {np.mean(right):.0%} of {n} prompts; its logit is above the other"
    )
    print(
        f"words' mean by {np.mean(logits['repeated']):.2f} (without repetition {np.mean(logits['not repeated']):.2f})"
    )
    print(found.to_string(index=False, float_format="%.3f"))
    style.save(drawn_study(swept, table, options), options.output.with_suffix(".png"))


def plain_words(model: lp.HookedPositionTransformer) -> np.ndarray:
    """Tokens that are a space and at least four small letters."""
    texts = {i: model.tokenizer.decode([i]) for i in range(len(model.tokenizer))}
    return np.array([i for i, t in texts.items() if t[0:1] == " " and t[1:].isascii() and t[1:].islower()
                     and t[1:].isalpha() and len(t) >= 5])  # fmt: skip


def answer_against(answer: int, others: list[int]):
    """The logit of the answer minus the mean of the others'."""
    return lambda logits: logits[:, answer] - logits[:, others].mean(1)


def tested(swept: dict[str, np.ndarray], layers: list[int]) -> pd.DataFrame:
    """Target minus control at each layer, paired by prompt."""
    rows = []
    for kind, effects in swept.items():
        target, control = effects[:, :, TARGET], effects[:, :, CONTROLS].mean(2)
        p = stats.ttest_1samp(target - control, 0.0).pvalue
        for i, (layer, q) in enumerate(zip(layers, stats.false_discovery_control(p), strict=True)):
            low, high = t_interval((target - control)[:, i])
            row = {"prompts": kind, "layer": layer, "n": len(effects), "target": target[:, i].mean()}
            row |= {"control": control[:, i].mean(), "difference": (target - control)[:, i].mean()}
            rows.append(row | {"low": low, "high": high, "p": p[i], "q": q})
    return pd.DataFrame(rows)


def drawn_study(swept: dict[str, np.ndarray], table: pd.DataFrame, options: Options) -> Figure:
    """The mean effect of every gap, and the target against its control by layer."""
    mean = swept["repeated"].mean(0)
    labels = [*(f"word {i + 1}" for i in range(LIST)), *(f"word {i + 1} again" for i in range(AGAIN))]
    with style.context():
        figure = Figure(figsize=(9.6, 5.6))
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.35, 1])
        most = np.abs(mean).max()
        image = left.imshow(mean, cmap=DIVERGING, vmin=-most, vmax=most, origin="lower", aspect="auto")
        left.set_xticks(range(1, len(labels)), labels[1:], rotation=90)
        left.set_xlim(0.5, len(labels) - 0.5)
        left.set_ylabel("layer")
        left.tick_params(length=0)
        left.set_title(f"One position longer gap before each word\n(mean of {options.prompts} prompts)", fontsize=9)
        figure.colorbar(image, ax=left, label="change of the answer's logit over the other words'").outline.set_visible(
            False
        )
        for kind, colour, shift in (("not repeated", style.QUIET, 0.15), ("repeated", style.ORANGE, -0.15)):
            rows = table[table["prompts"] == kind]
            places = np.arange(len(rows)) + shift
            right.hlines(places, rows["low"], rows["high"], color=colour, linewidth=1.2)
            right.plot(rows["difference"], places, "o", color=colour, markersize=3, label=f"word list {kind}")
        right.axvline(0, color=style.FAINT, linewidth=0.8, zorder=0)
        right.set_xlabel("gap before the answer's word minus other gaps of the list")
        right.set_title("Target minus control, 95% intervals", fontsize=9)
        right.legend(frameon=False, fontsize=8)
        figure.suptitle("Where distance matters for induction", x=0.02, ha="left", fontsize=12, fontweight="bold")
        note = (
            f"{options.model}; twelve random words and the first nine again, answer: the tenth; "
            f"{options.prompts} prompts, seed {options.seed}. Blue: the longer gap harms the answer."
        )
        figure.text(0.02, 0.015, note, fontsize=8, color=style.QUIET)
        figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except lp.PositionsError as error:
        raise SystemExit(f"demos/induction.py: {error}") from None
