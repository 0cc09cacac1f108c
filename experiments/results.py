"""RESULTS.md and its figures, written from the tables of results alone.

The same tables give the same text and figures, whoever writes them. No model is loaded but the shipped one that
sentences are drawn with. What is said stands in `findings.py`, `findings_rope.py` and the folder `templates`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lens_positions.checkpoint import shipped_names
from lens_positions.checkpoint_files import write_whole
from lens_positions.errors import PositionsError
from lens_positions.model import HookedPositionTransformer
from lens_positions.training.config import preset_names
from lens_positions.viz.charts import auc_chart, differences_chart
from lens_positions.viz.spacing import spacing
from lens_positions.viz.style import MissingFontError

from .calls import POWER, RULES
from .findings import (
    CLAIMS,
    CODE,
    FINDINGS,
    NAMES,
    Finding,
    Suite,
    areas,
    ends_of,
    grafts,
    loss_neutral,
    losses,
    paired_seeds,
)
from .findings_rope import ROPE_FINDINGS, RopeResults
from .markdown import grid, page
from .options import ROPE_VARIANTS, VARIANTS, ResultsConfig, RowConfig
from .suite import print_progress
from .tables import MEASURED, RUNS, read_tables

DRAWN = "bilingual-per-layer"
"""The shipped model that sentences are drawn with."""

SENTENCES = {
    "english": "The President of the United States spoke to Congress on Monday.",
    "chinese": "中国政府今天在北京举行新闻发布会。",
}
"""Those of the demo, which were written before any model was trained."""

LARGER = ("paper",)
"""Suites of larger models, of which only the loss is told."""


@dataclass(frozen=True)
class Figure:
    """A figure that was drawn, and what it shows."""

    path: Path
    shows: str


def write_results(options: ResultsConfig) -> Path:
    """Write RESULTS.md and its figures.

    Raises:
        PositionsError: there are no results.
    """
    results = read_tables(options.results)
    if not any(run.suite == options.preset and "step" not in of for run, of in results.runs.items()):
        raise PositionsError(
            f"{options.results} has no results of runs of {options.preset}; expected lens-positions experiments suite, "
            "and gather, before."
        )
    if not options.output.parent.is_dir() or not options.figures.is_dir():
        raise PositionsError(
            f"{options.output} or {options.figures} cannot be written; expected existing folders for both."
        )
    try:
        suites = [Suite(results, name) for name in (options.preset, *options.beside)]
        text = _page(suites, RopeResults(results, Suite(results, options.rope)), options)
    except (KeyError, IndexError) as error:
        raise PositionsError(
            f"a file in {options.results} lacks {error}; expected what suite, measure, rope and maximum wrote."
        ) from error
    except (TypeError, ValueError) as error:  # a table with text where a number belongs, or the other way round
        if isinstance(error, PositionsError):
            raise
        raise PositionsError(
            f"a file in {options.results} is damaged ({error}); expected what suite, measure, rope and maximum wrote."
        ) from error
    write_whole(options.output, lambda file: file.write(text.encode()))
    return options.output


def claim_rows(options: RowConfig) -> list[str]:
    """Rows of the table that opens RESULTS.md, from the tables of results.

    Raises:
        PositionsError: there is no such row, or there are no results.
    """
    keys = [key for key, _ in CLAIMS.values()]
    if options.key and options.key not in keys:
        raise PositionsError(f"there is no row {options.key!r}; expected one of {', '.join(keys)}.")
    suite = Suite(read_tables(options.results), options.preset)
    if not suite.runs("static"):
        raise PositionsError(f"{options.results} has no results of runs of {options.preset}; expected some.")
    found = [find(suite) for find in FINDINGS]
    return [_claim(finding) for finding in found if options.key in ("", CLAIMS[finding.title][0])]


def _claim(finding: Finding) -> str:
    """A row of the table that opens RESULTS.md."""
    key, reported = CLAIMS[finding.title]
    claim = f"[{finding.title}](RESULTS.md#{finding.title.lower().replace(' ', '-')}) `{key}`"
    return f"| {claim} | {reported} | {finding.ours} | **{finding.verdict}** | {finding.control} |"


def _page(suites: list[Suite], rope_results: RopeResults, options: ResultsConfig) -> str:
    """The text of RESULTS.md; its figures are drawn."""
    suite = suites[0]
    trained = _trained([*suites, *(Suite(suite.results, name) for name in (*CODE.values(), *LARGER))])
    traces = _traces([own for own, _ in trained], rope_results, options)  # refused before a figure is drawn
    findings, rope = [find(suite) for find in FINDINGS], [find(rope_results) for find in ROPE_FINDINGS]
    if not any(finding.blocks for finding in rope):
        rope = []
    figures = [*_draw_sentences(options), *_draw_losses(suite, options), *_draw_boundaries(suite, options)]
    values = {
        "models": grid(
            ["suite", "model", "bytes seen", "corpus", "runs", "minutes a run", "loss of RoPE", "per layer minus RoPE"],
            _cells(trained),
        ),
        "claims": [_claim(finding) for finding in findings],
        "rules": RULES,
        "power": POWER,
        "findings": findings,
        "figures": figures,
        "drawn": _draw_figures([*findings, *rope], options),
        "besides": [_beside(own) for own in suites[1:] if own.runs("static")],
    }
    return page("results.md.jinja", **values, rope=rope, **traces)


def _trained(suites: list[Suite]) -> list[tuple[Suite, dict[str, Any]]]:
    """The suites that have runs, each with the configuration of one of them."""
    found = []
    for suite in suites:
        scored = {str(run): of for run, of in suite.results.runs.items() if run.suite == suite.name}
        scored = {name: of for name, of in scored.items() if "step" not in of}
        if scored:
            found.append((suite, scored[min(scored)]["config"]))
    return found


def _cells(trained: list[tuple[Suite, dict[str, Any]]]) -> list[list[str]]:
    """What was trained, a row a suite: size, bytes seen, runs and loss."""
    rows = []
    for suite, config in trained:
        model, static, paired = config["model"], suite.loss("static"), suite.paired("per_layer")
        seen = config["steps"] * config["batch_size"] * model["n_ctx"] * config.get("accumulate", 1)
        size = f"{model['n_layers']} layers, width {model['d_model']}, context {model['n_ctx']}"
        seeds = {variant: len(suite.runs(variant)) for variant in (*VARIANTS, *ROPE_VARIANTS)}
        counts: dict[int, list[str]] = {}
        for variant, count in seeds.items():
            counts.setdefault(count, []).append(variant)
        runs = "; ".join(f"{n} of {', '.join(names)}" for n, names in sorted(counts.items(), reverse=True) if n)
        cells = [suite.name, size, f"{seen / 1e6:.1f}M", str(config["corpus"]), runs, _minutes(suite, seen)]
        cells.append("" if static is None else f"{static['loss']:.4f}")
        if paired is None:
            cells.append("")
        else:
            over = "seeds" if not np.isnan(paired["seeds_low"]) else "documents"
            ends = ends_of(paired[f"{over}_low"], paired[f"{over}_high"])
            cells.append(f"{paired['difference']:+.4f} ({ends}, over {over})")
        rows.append(cells)
    return rows


def _minutes(suite: Suite, seen: int) -> str:
    """How long the steps of a run took, by the median of its last speeds, and on what."""
    runs = [run for variant in VARIANTS for run in suite.runs(variant).values()]
    speeds = [speed for run in runs if (speed := run.get("tokens_per_second"))]
    minutes = f"{seen / float(np.median(speeds)) / 60:.0f}, " if speeds else ""
    return minutes + ("CPU" if "CPU" in runs[0]["device"] else runs[0]["device"])


def _draw_figures(findings: Iterable[Finding], options: ResultsConfig) -> dict[str, Figure]:
    """The figures of findings, by their titles."""
    drawn = {}
    for finding in findings:
        if finding.figure is not None:
            name, shows, draw = finding.figure
            path = options.figures / f"results_{name}.png"
            draw(path)
            drawn[finding.title] = Figure(path, shows)
    return drawn


def _beside(suite: Suite) -> dict[str, Any]:
    """The findings of another suite, those that it has, in short."""
    findings = {find: find(suite) for find in FINDINGS if find is not grafts}
    return {
        "name": suite.name,
        "losses": [losses(suite, only_run=True), findings[loss_neutral].blocks[1]],
        "findings": list(findings.values()),
    }


def _traces(suites: list[Suite], rope_results: RopeResults, options: ResultsConfig) -> dict[str, Any]:
    """What was run, on which weights, by which code, and the commands."""
    return {
        "runs_file": (options.results / RUNS).as_posix(),
        "measured_file": (options.results / MEASURED).as_posix(),
        "commands": _commands(suites, rope_results),
    }


def _commands(suites: list[Suite], rope_results: RopeResults) -> list[str]:
    """What makes all this again, in order."""
    commands = []
    for suite in suites:
        for seeds, variants in _run_together(suite).items():
            options = f"--variants {' '.join(variants)} --seeds {' '.join(map(str, seeds))}"
            commands.append(f"suite --preset {_preset(suite)} {options}")
        if suite.runs("static"):
            commands.append(f"measure --preset {suite.name}")
    commands += ["gather", "ship"]
    of_rope = ["rope"] if rope_results.measured() else []
    of_maximum = ["maximum"] if not rope_results.tests().empty else []
    again = ["gather"] if of_rope or of_maximum else []
    return [*commands, *of_rope, *of_maximum, *again, "results"]


def _preset(suite: Suite) -> str:
    """The preset of a suite, with what was asked for beside it where the suite has another name."""
    if suite.name in preset_names():
        return suite.name
    runs = [run for variant in VARIANTS for run in suite.runs(variant).values()]
    words = runs[0]["command"].split()
    asked = [f"{name} {words[words.index(name) + 1]}" for name in ("--preset", "--corpus", "--steps") if name in words]
    folders = f"--output runs/suite/{suite.name} --results runs/results/{suite.name}"
    return " ".join([*asked, folders]).removeprefix("--preset ")


def _run_together(suite: Suite) -> dict[tuple[int, ...], list[str]]:
    """Variants by the seeds that they were run at."""
    together: dict[tuple[int, ...], list[str]] = {}
    for variant in (*VARIANTS, *ROPE_VARIANTS):
        if seeds := tuple(suite.runs(variant)):
            together.setdefault(seeds, []).append(variant)
    return together


def _draw_sentences(options: ResultsConfig) -> list[Figure]:
    """The sentences as the shipped model places them; figures stay as they are where there is no font for one."""
    if DRAWN not in shipped_names():
        return []
    figures = []
    model = HookedPositionTransformer.from_pretrained(DRAWN)
    for language, sentence in SENTENCES.items():
        path = options.figures / f"results_{language}.png"
        try:
            spacing(model, sentence, path=path)
        except MissingFontError as error:
            print_progress(f"{path} was not drawn: {error}")
        title = language.capitalize()
        shows = f"{title}: characters of a sentence at their learned positions, one row a layer, in {DRAWN}"
        figures.append(Figure(path, shows))
    return figures


def _draw_losses(suite: Suite, options: ResultsConfig) -> list[Figure]:
    """The losses beside static's, where some are paired with it."""
    rows = []
    for variant in list(VARIANTS)[1:]:
        row = suite.paired(variant)
        if row is None:
            continue
        several = not np.isnan(row["seeds_low"])
        ends = ("seeds_low", "seeds_high") if several else ("documents_low", "documents_high")
        group = "interval over seeds" if several else "one seed, interval over documents"
        name = f"{NAMES[variant]}  ({paired_seeds(row)})"
        rows.append(
            {"name": name, "difference": row["difference"], "low": row[ends[0]], "high": row[ends[1]], "group": group}
        )
    if not rows:
        return []
    static = suite.loss("static")
    assert static is not None
    caption = (
        f"Preset {suite.name}; {static['bytes']:,.0f} held-out bytes of {static['documents']:,.0f} documents, "
        "English and Chinese; in brackets the number of seeds. Intervals: 95%."
    )
    path = options.figures / f"results_losses_{suite.name}.png"
    differences_chart(pd.DataFrame(rows), "Loss of each source minus static RoPE", "nats per byte", caption, path)
    return [Figure(path, "Loss of each source minus that of static RoPE")]


def _draw_boundaries(suite: Suite, options: ResultsConfig) -> list[Figure]:
    """The areas under the ROC curve by layer, where they were measured."""
    tables = []
    for seed, table in suite.tables("per_layer", "boundaries").items():
        own = areas(table, "within token")
        tables.append((own if len(own) else areas(table)).assign(measure=NAMES["per_layer"], run=seed))
        statistic = areas(table, "branching entropy")  # of the text, and so the same for every run
    if not tables:
        return []
    found = pd.concat([*tables, statistic], ignore_index=True)
    first = found.iloc[0]
    caption = (
        f"Preset {suite.name}; {first['n']:,} gaps between Chinese characters in {first['lines']:,} "
        "held-out lines of the People's Daily, segmented by people; gaps before the same first byte are compared; a "
        "line each seed. Branching entropy: after the character before, from the training text. Intervals: 95% of "
        "resamples of lines."
    )
    path = options.figures / f"results_boundaries_{suite.name}.png"
    auc_chart(found, "Increments at Chinese word boundaries", caption, path)
    return [Figure(path, "Area under the ROC curve of increments at Chinese word boundaries, by layer")]
