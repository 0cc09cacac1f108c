"""RESULTS.md and its figures, written from the files of runs alone.

No model is loaded, so that the same files give the same text and figures, whoever writes them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lens_positions.errors import PositionsError
from lens_positions.viz.measurements import auc_chart, differences_chart

from .data import write_whole
from .findings import FINDINGS, NAMES, Finding, Suite, areas, paired_seeds
from .suite import VARIANTS, read_json


@dataclass(frozen=True)
class ResultsConfig:
    """Where results are read from and written to.

    Args:
        results: the folder of results, with one folder for each suite in it.
        preset: the suite that findings are taken from.
        output: the text to write.
        figures: the folder of figures, beside it.
    """

    results: Path = Path("results")
    preset: str = "tiny"
    output: Path = Path("RESULTS.md")
    figures: Path = Path("docs")


def write_results(asked: ResultsConfig) -> Path:
    """Write RESULTS.md and its figures.

    Raises:
        PositionsError: there are no results.
    """
    folder = asked.results / asked.preset
    if not list(folder.glob("*/run.json")):
        raise PositionsError(f"{folder} has no results of runs; expected python -m training suite before.")
    suite = Suite(folder)
    if not asked.output.parent.is_dir() or not asked.figures.is_dir():
        raise PositionsError(
            f"{asked.output} or {asked.figures} cannot be written; expected existing folders for both."
        )
    try:
        findings = [find(suite) for find in FINDINGS]
    except (KeyError, IndexError) as error:
        raise PositionsError(
            f"a table in {folder} lacks {error}; expected what the suite and measure wrote."
        ) from error
    figures = [line for draw in FIGURES for line in draw(suite, asked)]
    text = "\n".join(_page(suite, findings, figures, asked)).rstrip() + "\n"
    write_whole(asked.output, lambda file: file.write(text.encode()))
    return asked.output


def _page(suite: Suite, findings: list[Finding], figures: list[str], asked: ResultsConfig) -> Iterator[str]:
    yield "# Results"
    yield ""
    first = read_json(next(iter(sorted(suite.folder.glob("*/run.json")))))
    config, model = first["config"], first["config"]["model"]
    seen = config["steps"] * config["batch_size"] * model["n_ctx"]
    yield (
        f"Found on models of the preset `{asked.preset}` ({model['n_layers']} layers, width {model['d_model']}, "
        f"{model['n_heads']} heads, context {model['n_ctx']}; {config['steps']:,} steps, {seen / 1e6:.1f}M bytes seen, "
        f"corpus {config['corpus']}), beside what Long (2026) reports of 6.4M parameters at one seed. Losses and "
        "increments are those of held-out text; names and pairs of words are chosen by their counts in the training "
        "text. Nothing was tuned, but when the rules of the verdicts were first written one run (per_layer-0) and the "
        "grafts had been measured, and they were made stricter once after that. Intervals are of 95%: over seeds "
        "(Student's t), or where 1,000 resamples of whole documents or lines lie, as each says."
    )
    yield ""
    yield "| finding | verdict | in one sentence |"
    yield "|---|---|---|"
    for finding in findings:
        yield f"| {finding.title} | **{finding.verdict}** | {finding.sentence} |"
    yield ""
    yield from figures
    for finding in findings:
        yield f"## {finding.title}"
        yield ""
        yield f"**{finding.verdict[0].upper()}{finding.verdict[1:]}.** {finding.sentence}"
        yield ""
        yield f"Reported: {finding.reported}"
        yield ""
        if finding.lines:
            yield from finding.lines
            yield ""
        yield f"Rule: {finding.rule}"
        yield ""
        if finding.files:
            yield "From " + ", ".join(f"`{name}`" for name in finding.files) + "."
            yield ""
    yield from _traces(suite, asked)


def _traces(suite: Suite, asked: ResultsConfig) -> Iterator[str]:
    yield "## Where the numbers come from"
    yield ""
    yield "The runs, and the code that they were scored with; each folder of results has the whole configuration."
    yield ""
    yield "| run | command | parameters | weights (sha256) | commit | torch | device |"
    yield "|---|---|---|---|---|---|---|"
    for variant in VARIANTS:
        for seed, folder in suite.runs(variant).items():
            run = read_json(folder / "run.json")
            git = run["git"] or {"commit": "none", "changed": False}
            yield (
                f"| {variant}-{seed} | `{run['command']}` | {run['parameters']:,} | "
                f"{run['sha256']['model.safetensors'][:12]} | {git['commit'][:10]}{'+' if git['changed'] else ''} | "
                f"{run['versions']['torch']} | {run['device']} |"
            )
    yield ""
    yield "A commit with + had changes beside it that were not committed yet. The commands, in order:"
    yield ""
    yield f"    python -m training suite --preset {asked.preset}"
    yield f"    python -m training measure --preset {asked.preset}"
    yield f"    python -m training results --preset {asked.preset}"


def _draw_losses(suite: Suite, asked: ResultsConfig) -> list[str]:
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
        f"Preset {asked.preset}; {static['bytes']:,.0f} held-out bytes of {static['documents']:,.0f} documents, "
        "English and Chinese; in brackets the number of seeds. Intervals: 95%."
    )
    path = asked.figures / "results_losses.png"
    differences_chart(pd.DataFrame(rows), "Loss of each source minus static RoPE", "nats per byte", caption, path)
    return [f"![Loss of each source minus that of static RoPE]({path})", ""]


def _draw_boundaries(suite: Suite, asked: ResultsConfig) -> list[str]:
    tables = []
    for variant in ("per_layer", "shared"):
        for seed, table in suite.tables(variant, "boundaries").items():
            tables.append(areas(table).assign(measure=f"{NAMES[variant]}, seed {seed}"))
            statistic = areas(table, "mutual information")  # of the text, and so the same for every run
    if not tables:
        return []
    found = pd.concat([*tables, statistic], ignore_index=True)
    first = found.iloc[0]
    caption = (
        f"Preset {asked.preset}; {first['n']:,} gaps between Chinese characters in {first['lines']:,} held-out lines "
        "of the People's Daily, segmented by people. Mutual information: of the two characters, from the training "
        "text. Intervals: 95% of resamples of lines."
    )
    path = asked.figures / "results_boundaries.png"
    auc_chart(found, "Increments at Chinese word boundaries", caption, path)
    return [f"![Area under the ROC curve of increments at Chinese word boundaries, by layer]({path})", ""]


FIGURES: tuple[Callable[[Suite, ResultsConfig], list[str]], ...] = (_draw_losses, _draw_boundaries)
