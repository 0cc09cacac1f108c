"""RESULTS.md and its figures, written from the files of runs alone.

The same files give the same text and figures, whoever writes them. No model is loaded but the shipped one that
sentences are drawn with.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from lens_positions.checkpoint import shipped_names
from lens_positions.errors import PositionsError
from lens_positions.model import HookedPositionTransformer
from lens_positions.training.data import write_whole
from lens_positions.training.schema import Commit
from lens_positions.viz.charts import auc_chart, differences_chart
from lens_positions.viz.spacing import spacing
from lens_positions.viz.style import MissingFontError

from .findings import (
    FINDINGS,
    NAMES,
    Finding,
    Suite,
    areas,
    grafts,
    loss_neutral,
    paired_seeds,
    what_increments_cause,
    word_boundaries,
)
from .findings_rope import ROPE_FINDINGS, Machinery
from .measure import read_measured
from .options import ROPE_VARIANTS, VARIANTS, ResultsConfig
from .suite import read_results, say

DRAWN = "bilingual-per-layer"
"""The shipped model that sentences are drawn with."""

SENTENCES = {
    "english": "The President of the United States spoke to Congress on Monday.",
    "chinese": "中国政府今天在北京举行新闻发布会。",
}
"""Those of the demo, which were written before any model was trained."""

DETAILED = (word_boundaries, what_increments_cause)
"""Findings that are given whole for the second suite too: these depend on the layer."""


def write_results(asked: ResultsConfig) -> Path:
    """Write RESULTS.md and its figures.

    Raises:
        PositionsError: there are no results.
    """
    folder = asked.results / asked.preset
    if not list(folder.glob("*/run.json")):
        raise PositionsError(f"{folder} has no results of runs; expected lens-positions experiments suite before.")
    if not asked.output.parent.is_dir() or not asked.figures.is_dir():
        raise PositionsError(
            f"{asked.output} or {asked.figures} cannot be written; expected existing folders for both."
        )
    suite, beside = Suite(folder), Suite(asked.results / asked.beside)
    machinery = Machinery(asked.results / "machinery", suite, asked.results / "maximum")
    try:
        _setting(suite)  # this and the traces first, so that no figure is drawn where a description is damaged
        traces = list(_traces([suite, beside], machinery))
        lines = [*_page(suite, asked), *_beside(beside, asked), *_rope(machinery, asked), *traces]
    except (KeyError, IndexError) as error:
        raise PositionsError(
            f"a file in {asked.results} lacks {error}; expected what suite, measure, machinery and maximum wrote."
        ) from error
    except (TypeError, ValueError) as error:  # a table with text where a number belongs, or the other way round
        if isinstance(error, PositionsError):
            raise
        raise PositionsError(
            f"a file in {asked.results} is damaged ({error}); expected what suite, measure, machinery and maximum "
            "wrote."
        ) from error
    text = "\n".join(lines).rstrip() + "\n"
    write_whole(asked.output, lambda file: file.write(text.encode()))
    return asked.output


def _setting(suite: Suite) -> str:
    """What the models of a suite are, from one of them."""
    config = read_results(next(iter(sorted(suite.folder.glob("*/run.json")))))["config"]
    model = config["model"]
    seen = config["steps"] * config["batch_size"] * model["n_ctx"]
    return (
        f"of the preset `{suite.folder.name}` ({model['n_layers']} layers, width {model['d_model']}, "
        f"{model['n_heads']} heads, context {model['n_ctx']}; {config['steps']:,} steps, {seen / 1e6:.1f}M bytes seen, "
        f"corpus {config['corpus']})"
    )


def _page(suite: Suite, asked: ResultsConfig) -> Iterator[str]:
    findings = [find(suite) for find in FINDINGS]
    yield "# Results"
    yield ""
    yield (
        f"Found on models {_setting(suite)}, beside what Long (2026) reports of 6.4M parameters at one seed. Losses "
        "and increments are those of held-out text; names and pairs of words are chosen by their counts in the "
        "training text. Nothing was tuned, but when the rules of the verdicts were first written one run "
        "(per_layer-0) and the grafts had been measured, and they were made stricter once after that. Intervals are "
        "of 95%: over seeds (Student's t), or where 1,000 resamples of whole documents or lines lie, as each says."
    )
    yield ""
    yield from _summary(findings)
    yield from _draw_sentences(asked)
    yield from _draw_losses(suite, asked)
    yield from _draw_boundaries(suite, asked)
    yield from _in_full(findings, "##", asked)


def _summary(findings: list[Finding]) -> Iterator[str]:
    yield "| finding | verdict | in one sentence |"
    yield "|---|---|---|"
    for finding in findings:
        yield f"| {finding.title} | **{finding.verdict}** | {finding.sentence} |"
    yield ""


def _in_full(findings: list[Finding], heading: str, asked: ResultsConfig) -> Iterator[str]:
    for finding in findings:
        yield f"{heading} {finding.title}"
        yield ""
        yield f"**{finding.verdict[0].upper()}{finding.verdict[1:]}.** {finding.sentence}"
        yield ""
        yield f"Reported: {finding.reported}"
        yield ""
        if finding.figure is not None:
            name, shows, draw = finding.figure
            path = asked.figures / f"results_{name}.png"
            draw(path)
            yield f"![{shows}]({path})"
            yield ""
        if finding.lines:
            yield from finding.lines
            yield ""
        yield f"Rule: {finding.rule}"
        yield ""
        if finding.files:
            yield "From " + ", ".join(f"`{name}`" for name in finding.files) + "."
            yield ""


def _beside(suite: Suite, asked: ResultsConfig) -> Iterator[str]:
    """The findings of another suite, those that it has, in short."""
    if not suite.runs("static"):
        return
    yield f"## The same on models of the preset {suite.folder.name}"
    yield ""
    yield (
        f"Models {_setting(suite)}. Verdicts are by the rules above; what was not run is left out. Where there is one "
        "seed, that is all there is: a difference may be the seed's."
    )
    yield ""
    findings = {find: find(suite) for find in FINDINGS if find is not grafts}
    yield from (line for line in findings[loss_neutral].lines if "| not run |" not in line)
    yield ""
    measured = [finding for finding in findings.values() if finding.verdict != "not measured"]
    yield "| finding | verdict | in one sentence | from |"
    yield "|---|---|---|---|"
    for finding in measured:
        files = ", ".join(f"`{name}`" for name in finding.files)
        yield f"| {finding.title} | **{finding.verdict}** | {finding.sentence} | {files} |"
    yield ""
    for find in DETAILED:
        finding = findings[find]
        if finding.lines:
            yield f"{finding.title}:"
            yield ""
            yield from finding.lines
            yield ""
    yield from _draw_boundaries(suite, asked)


def _rope(machinery: Machinery, asked: ResultsConfig) -> Iterator[str]:
    """How RoPE itself is used, what has been measured of it."""
    findings = [find(machinery) for find in ROPE_FINDINGS]
    if all(finding.verdict == "not measured" for finding in findings):
        return
    yield "## How RoPE itself is used"
    yield ""
    yield (
        "Beside what Barbero et al. (frequencies), Ruscio et al. (absolute position) and Veličković et al. "
        "(dispersion) report, on SmolLM2-135M-Instruct (4-bit weights), on the shipped models and on small models "
        "trained alike. Text is English, held out from these small models' training; whether SmolLM2 has read it is "
        "not known. Intervals are of 95%, over 1,000 resamples of documents or over seeds (Student's t), as each says. "
        "The rules were written when the tools had been tried on SmolLM2 and its norms and heads had been measured, "
        "but not read; those of absolute position, sinks, p-RoPE and dispersion were made stricter once, before the "
        "files that they judge were read, and those of norms, sinks and dispersion once more when their "
        "results were known: for norms and dispersion more is reported than they had asked for, and a residual "
        "stream's cosine can be that of one component. Barbero et al.'s two statements about what RoPE can do are "
        "checked by tests: for any query and distance a key whose score is largest exactly there, and a mean score of "
        "0 at every distance for Gaussian vectors (`tests/test_frequencies.py`)."
    )
    yield ""
    yield from _summary(findings)
    yield from _in_full([finding for finding in findings if finding.verdict != "not measured"], "###", asked)


def _traces(suites: list[Suite], machinery: Machinery) -> Iterator[str]:
    yield "## Where the numbers come from"
    yield ""
    yield "The runs, and the code that they were scored with; each folder of results has the whole configuration."
    yield ""
    yield "| run | command | parameters | weights (sha256) | commit | torch | device |"
    yield "|---|---|---|---|---|---|---|"
    for suite in suites:
        for variant in (*VARIANTS, *ROPE_VARIANTS):
            for seed, folder in suite.runs(variant).items():
                run = read_results(folder / "run.json")
                weights = run["sha256"]["model.safetensors"]
                yield (
                    f"| {suite.folder.name} {variant}-{seed} | `{run['command']}` | {run['parameters']:,} | "
                    f"{weights[:12]} | {_commit(run['git'])} | "
                    f"{run['versions']['torch']} | {run['device']} |"
                )
    yield ""
    yield from _measured(machinery)
    yield "A commit with + had changes beside it that were not committed yet. The commands, in order:"
    yield ""
    for suite in suites:
        for seeds, variants in _run_together(suite).items():
            options = f"--variants {' '.join(variants)} --seeds {' '.join(map(str, seeds))}"
            yield f"    lens-positions experiments suite --preset {suite.folder.name} {options}"
        if suite.runs("static"):
            yield f"    lens-positions experiments measure --preset {suite.folder.name}"
    yield "    lens-positions experiments ship"
    if machinery.folder.is_dir():
        yield "    lens-positions experiments rope"
    if machinery.maximum.is_dir():
        yield "    lens-positions experiments maximum"
    yield "    lens-positions experiments results"


def _measured(machinery: Machinery) -> Iterator[str]:
    """The weights behind the tables of RoPE itself, and the code that measured them."""
    folders = sorted(path.parent for path in machinery.folder.glob("*/measured.json"))
    if not folders:
        return
    yield "How RoPE itself is used was measured on these weights; each folder says how to measure a table again."
    yield ""
    yield "| tables | weights (sha256) | commits |"
    yield "|---|---|---|"
    for folder in folders:
        done = read_measured(folder / "measured.json")
        weights = {sha256[:12] for entry in done.values() for sha256 in entry["sha256"].values()}
        commits = {_commit(entry["git"]) for entry in done.values()}
        yield f"| `{folder.as_posix()}` | {', '.join(sorted(weights))} | {', '.join(sorted(commits))} |"
    yield ""


def _commit(git: Commit | None) -> str:
    return "none" if git is None else f"{git['commit'][:10]}{'+' if git['changed'] else ''}"


def _run_together(suite: Suite) -> dict[tuple[int, ...], list[str]]:
    """Variants by the seeds that they were run at."""
    together: dict[tuple[int, ...], list[str]] = {}
    for variant in (*VARIANTS, *ROPE_VARIANTS):
        if seeds := tuple(suite.runs(variant)):
            together.setdefault(seeds, []).append(variant)
    return together


def _draw_sentences(asked: ResultsConfig) -> Iterator[str]:
    """The sentences as the shipped model places them; figures stay as they are where there is no font for one."""
    if DRAWN not in shipped_names():
        return
    model = HookedPositionTransformer.from_pretrained(DRAWN)
    for language, sentence in SENTENCES.items():
        path = asked.figures / f"results_{language}.png"
        try:
            spacing(model, sentence, path=path)
        except MissingFontError as error:
            say(f"{path} was not drawn: {error}")
        title = language.capitalize()
        yield f"![{title}: characters of a sentence at their learned positions, one row a layer, in {DRAWN}]({path})"
        yield ""


def _draw_losses(suite: Suite, asked: ResultsConfig) -> Iterator[str]:
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
        return
    static = suite.loss("static")
    assert static is not None
    caption = (
        f"Preset {suite.folder.name}; {static['bytes']:,.0f} held-out bytes of {static['documents']:,.0f} documents, "
        "English and Chinese; in brackets the number of seeds. Intervals: 95%."
    )
    path = asked.figures / f"results_losses_{suite.folder.name}.png"
    differences_chart(pd.DataFrame(rows), "Loss of each source minus static RoPE", "nats per byte", caption, path)
    yield f"![Loss of each source minus that of static RoPE]({path})"
    yield ""


def _draw_boundaries(suite: Suite, asked: ResultsConfig) -> Iterator[str]:
    tables = []
    for variant in ("per_layer", "shared"):
        for seed, table in suite.tables(variant, "boundaries").items():
            tables.append(areas(table).assign(measure=NAMES[variant], run=seed))
            statistic = areas(table, "mutual information")  # of the text, and so the same for every run
    if not tables:
        return
    found = pd.concat([*tables, statistic], ignore_index=True)
    first = found.iloc[0]
    caption = (
        f"Preset {suite.folder.name}; {first['n']:,} gaps between Chinese characters in {first['lines']:,} "
        "held-out lines of the People's Daily, segmented by people; a line each seed. Mutual information: of the two "
        "characters, from the training text. Intervals: 95% of resamples of lines."
    )
    path = asked.figures / f"results_boundaries_{suite.folder.name}.png"
    auc_chart(found, "Increments at Chinese word boundaries", caption, path)
    yield f"![Area under the ROC curve of increments at Chinese word boundaries, by layer]({path})"
    yield ""
