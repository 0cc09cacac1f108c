"""The answers as a table and a page with figures: the same table gives the same page."""

from pathlib import Path

import numpy as np
import pandas as pd

from lens_positions.checkpoint_files import write_whole
from lens_positions.training.config import load_preset
from lens_positions.viz.charts import differences_chart, lines_chart

from ..markdown import page
from ..options import QuestionsConfig
from ..tables import KEYS
from .verdicts import LENGTH, PARTS, Answer, how_far_heads_look, known_but_unused, what_for, what_gaps_cause


def write_page(answers: pd.DataFrame, options: QuestionsConfig) -> Path:
    """Write answers.csv beside the other tables, the page, and its figures beside the page; return the page."""
    keyed = answers.assign(suite=options.suite, seed="")  # of no one seed
    keyed = keyed[[*KEYS, *(name for name in answers if name not in KEYS)]]
    keyed = keyed.sort_values("variant", kind="stable")  # as gather sorts runs
    csv = keyed.to_csv(index=False, float_format="%.6g").encode()
    write_whole(options.results / "answers.csv", lambda file: file.write(csv))
    text = answers_page(answers, options)
    write_whole(options.output, lambda file: file.write(text.encode()))
    return options.output


def answers_page(answers: pd.DataFrame, options: QuestionsConfig) -> str:
    """The page, with its figures drawn beside where it will stand."""
    preset = load_preset(options.suite)
    bytes_a_step = preset.batch_size * preset.accumulate * preset.model.n_ctx
    found: list[Answer] = []
    for number, rows in answers.groupby("question"):
        folder = options.output.parent
        if number == 1:
            answer = known_but_unused(rows, bytes_a_step)
            answer = _with_figure(answer, _draw_probes(rows, bytes_a_step, folder), PROBES)
        elif number == 2:
            answer = _with_figure(what_for(rows), _draw_parts(rows, folder), LOSSES)
        else:
            answer = what_gaps_cause(rows) if number == 3 else how_far_heads_look(rows)
        found.append(answer)
    size = f"{preset.steps * bytes_a_step / 1e6:.0f}M bytes"
    return page("questions.md.jinja", suite=options.suite, preset=preset, size=size, answers=found)


PROBES = "How far probes and increments lie from chance, by bytes of training"
LOSSES = "Differences in held-out loss between retrained variants, English and Chinese"


def _with_figure(answer: Answer, path: Path, shows: str) -> Answer:
    return Answer(**{**vars(answer), "figure": path.name, "shows": shows})


def _draw_probes(rows: pd.DataFrame, bytes_a_step: int, folder: Path) -> Path:
    """How far the farthest layer's area lies from chance, by bytes of training."""
    path = folder / "questions_probes.png"
    measures = ("probe", "increment", "increment, labels shuffled")
    tables = [rows[rows["quantity"] == f"{measure}: farthest from 0.5"].assign(measure=measure) for measure in measures]
    table = pd.concat(tables).rename(columns={"estimate": "value"})
    table["at"] = table["step"] * bytes_a_step / 1e6
    caption = (
        "per_layer, three seeds, the farthest of layers 1 to 5; area between gaps with the same first byte; held-out "
        "lines of the People's Daily, segmented by people. Intervals over seeds, Student's t."
    )
    ticks = [round(float(size), 1) for size in np.unique(table["at"])]
    across, unit = "million bytes of training", "distance of the area under the ROC curve from 0.5"
    lines_chart(table, "Word boundaries", unit, across, ticks, 0.0, caption, path, octaves=True)
    return path


def _draw_parts(rows: pd.DataFrame, folder: Path) -> Path:
    """The parts of the loss at the training length, of three seeds each."""
    path = folder / "questions_parts.png"
    chosen = rows[(rows["length"] == LENGTH) & rows["quantity"].isin(PARTS) & (rows["language"] != "both")]
    table = chosen.rename(columns={"language": "group", "estimate": "difference"})
    table["name"] = table["quantity"] + ": " + table["variant"] + " - " + table["minus"]
    caption = (
        f"Models retrained from scratch, three seeds, {LENGTH} tokens of context; the first four parts add up to the "
        "fifth. Intervals over seeds, Student's t. Below 0 is a gain."
    )
    table = table.reset_index(drop=True)
    table[["difference", "low", "high"]] *= 1000
    differences_chart(table, "What an increment is for", "thousandths of a nat per byte, held-out", caption, path)
    return path
