"""Every variant of increments at several seeds on the same data, scored on the same held-out bytes and compared.

Beside the runs, each a folder as in `loop.py`, stand small results, of which `gather` makes the tables of a repository:

    runs/suite/tiny/per_layer-0          the run of a variant and a seed
    runs/suite/tiny/per_layer-0.lock     held by the process that works on it
    runs/results/tiny/per_layer-0/run.json    what was trained, from what, by which code, and how to repeat it
    runs/results/tiny/per_layer-0/log.csv     the held-out loss while it trained
    runs/results/tiny/per_layer-0/heldout.csv the finished model's loss by held-out document and length of text
    runs/results/tiny/signed-0/diverged.json  instead of these three: the loss stopped being a number
    runs/results/tiny/losses.csv              the comparison, from the files above alone

The order of the data is a function of the seed alone, so that the variants of a seed read the same batches.
"""

import json
import math
import platform
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from filelock import FileLock, Timeout
from jaxtyping import Float64
from rich.console import Console
from rich.text import Text

from lens_positions import __version__
from lens_positions.checkpoint import load_pretrained, replacement_folder
from lens_positions.checkpoint_files import sha256_of_file, write_whole
from lens_positions.errors import PositionsError
from lens_positions.measure.intervals import bootstrap_means, interval_of, resamples, t_interval
from lens_positions.progress import track_progress
from lens_positions.terminal import print_grid, print_line
from lens_positions.training.checkpoints import read_description, read_evaluations, refuse_other
from lens_positions.training.config import TrainConfig, changes, load_preset, to_json
from lens_positions.training.data import (
    TokenizedCorpus,
    heldout_documents,
    heldout_sources,
    heldout_windows,
    tokenize_corpus,
)
from lens_positions.training.loop import DivergedError, FreshModel, Run, are_bytes, new_accelerator, token_nats
from lens_positions.training.provenance import commit
from lens_positions.training.schema import RunResults, read_json

from .gather import suite_tables
from .options import FROM_SHARED, HEAD_STEPS, ROPE_VARIANTS, STAGED, VARIANTS, SuiteConfig
from .tables import RunName, Tables

FACTORS = (1, 2, 4)
"""Lengths at which models are scored, in training contexts."""

BATCH_TOKENS = 4096

OF_ONE_RUN = ("seed", "frozen_from", "frozen_as", "head_increments")
"""Fields in which the runs of a suite may differ, besides their increments."""


@dataclass(frozen=True)
class SuiteRun:
    """A variant at a seed: how it is trained, where, where its results stand, and the command for it alone."""

    variant: str
    seed: int
    config: TrainConfig
    folder: Path
    results: Path
    command: str


def suite(options: SuiteConfig) -> pd.DataFrame:
    """Train and score what is left to do, print the comparison of what is finished, and return it.

    Runs that another process holds are left to it. A run that diverged is recorded, and not tried again.

    Returns:
        The table of `loss_table`, also in losses.csv.

    Raises:
        PositionsError: an unknown name, seeds that are not distinct, a frozen run without the shared one that it needs,
            results of other runs in the folder, or what `train` refuses.
        KeyboardInterrupt: after an interrupt, when the checkpoint has been written.
    """
    state: Any = PartialState(cpu=not torch.accelerator.is_available())
    if state.num_processes > 1:
        raise PositionsError(f"the suite was started in {state.num_processes} joint processes; expected one.")
    runs = plan_runs(options)
    results = runs[0].results.parent
    _refuse_other_results(results, _common(options, load_preset(options.preset)))

    @cache
    def corpus() -> TokenizedCorpus:
        return _corpus(runs[0].config, options.cache)

    left = list(enumerate(runs, 1))
    while left:
        waiting = [(n, run) for n, run in left if not _finish(run, f"run {n} of {len(runs)}", corpus)]
        if len(waiting) == len(left):
            break
        left = waiting
    table = loss_table(suite_tables(results), results.name)
    if len(table):
        write_whole(results / "losses.csv", lambda file: file.write(table.to_csv(index=False).encode()))
        print_losses(table)
    if left:
        names = ", ".join(run.folder.name for _, run in left)
        print_progress(f"not finished: {names}; another process has them, or a run that they need did not end")
    return table


def plan_runs(options: SuiteConfig) -> list[SuiteRun]:
    """The runs of a suite: all variants of the first seed, then those of the next.

    Raises:
        PositionsError: as `suite`.
    """
    preset = load_preset(options.preset)
    known = [*VARIANTS, *ROPE_VARIANTS]
    if unknown := [name for name in options.variants if name not in known]:
        raise PositionsError(f"there is no variant {unknown[0]!r}; expected some of {', '.join(known)}.")
    if not options.variants or not options.seeds or len(set(options.seeds)) < len(options.seeds):
        given = (
            f"variants {' '.join(options.variants) or 'none'} and seeds {' '.join(map(str, options.seeds)) or 'none'}"
        )
        raise PositionsError(f"the suite got {given}; expected at least one of each, and distinct seeds.")
    output = options.output or Path("runs/suite") / options.preset
    results = options.results or STAGED / options.preset
    common = _common(options, preset)
    runs = []
    for seed in options.seeds:
        shared = output / f"shared-{seed}"
        for variant in (name for name in known if name in options.variants):
            folder = output / f"{variant}-{seed}"
            frozen = variant in FROM_SHARED
            if frozen and not ("shared" in options.variants or is_finished(shared) or is_finished(folder)):
                raise PositionsError(
                    f"{variant} at seed {seed} needs {shared}, which is not finished; expected the variant shared as "
                    "well."
                )
            config = replace(_of_variant(common, variant), seed=seed, **_fixed_increments(variant, shared, common))
            command = command_of(config, options.preset, preset, folder)
            runs.append(SuiteRun(variant, seed, config, folder, results / folder.name, command))
    return runs


def _fixed_increments(variant: str, shared: Path, common: TrainConfig) -> dict[str, Any]:
    """The fixed increments of a variant, where it has some."""
    if variant in FROM_SHARED:
        return {"frozen_from": shared / "model", "frozen_as": FROM_SHARED[variant]}
    if variant == "head_steps":
        heads = common.model.n_heads
        return {"head_increments": tuple(HEAD_STEPS[i % len(HEAD_STEPS)] for i in range(heads))}
    return {}


def _common(options: SuiteConfig, preset: TrainConfig) -> TrainConfig:
    """What all runs have in common."""
    steps = preset.steps if options.steps is None else options.steps
    corpus = preset.corpus if options.corpus is None else options.corpus
    # A preset's milestones that fewer steps do not reach are left out.
    keep_at = tuple(step for step in preset.keep_at or () if step <= steps) or None
    return replace(
        preset,
        steps=steps,
        corpus=corpus,
        keep_at=keep_at,
        compile=preset.compile or options.compile,
        precision=options.precision or preset.precision,
    )


def _of_variant(common: TrainConfig, variant: str) -> TrainConfig:
    increments = VARIANTS.get(variant, VARIANTS["static"])
    return replace(common, model=replace(common.model, positions=increments, **ROPE_VARIANTS.get(variant, {})))


def command_of(config: TrainConfig, name: str, preset: TrainConfig, folder: Path) -> str:
    """The command that trains this configuration alone, as a preset and what differs from it."""
    words = ["lens-positions", "train", "--preset", name, "--output", str(folder)]
    for field, value in changes(to_json(preset) | {"seed": None}, to_json(config)):
        values = value if isinstance(value, list | tuple) else [] if value is True else [value]
        words += [f"--{field.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def is_finished(run: Path) -> bool:
    """Whether a run was trained to its end: heldout.csv is written last."""
    return (run / "heldout.csv").is_file()


def _refuse_other_results(results: Path, common: TrainConfig) -> None:
    """Refuse to mix results: only the seed may differ, and what makes the variant."""

    def compared(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name not in OF_ONE_RUN}

    for path in [*results.glob("*/run.json"), *results.glob("*/diverged.json")]:
        wanted = json.loads(json.dumps(to_json(_of_variant(common, path.parent.name.rpartition("-")[0]))))
        for name, value in changes(compared(read_results(path, "config")["config"]), compared(wanted)):
            raise PositionsError(
                f"{path.parent} was trained with another {name} than {value}; expected a results folder for it alone."
            )


def read_results(path: Path, *needed: str) -> RunResults:
    """What run.json or diverged.json says.

    Args:
        path: the file.
        needed: fields that are asked of it.

    Raises:
        PositionsError: it is damaged, or lacks one of these.
    """
    found: RunResults = read_json(path, RunResults, *needed)
    return found


def _corpus(config: TrainConfig, cache_dir: Path) -> TokenizedCorpus:
    corpus = tokenize_corpus(
        config.corpus, cache_dir, text_column=config.text_column, max_bytes=config.max_bytes, tokenizer=None
    )
    heldout_windows(corpus.heldout, max(FACTORS) * config.model.n_ctx, 1)  # too little text is said before training
    return corpus


def _finish(run: SuiteRun, which: str, corpus: Callable[[], TokenizedCorpus]) -> bool:
    """Do what is left to do for a run; False where it must wait for another process."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{run.folder}.lock", timeout=0):
            return _finish_locked(run, f"{which}: {run.variant}, seed {run.seed}", corpus)
    except Timeout:
        return False


def _finish_locked(run: SuiteRun, title: str, corpus: Callable[[], TokenizedCorpus]) -> bool:
    if (run.results / "diverged.json").is_file():
        return True
    if is_finished(run.folder):
        refuse_other(run.folder, {"config": to_json(run.config)})
        if _is_scored(run):
            return True
        print_progress(f"{title}: trained before, to be scored")
    elif run.config.frozen_from is not None and not is_finished(run.config.frozen_from.parent):
        return False
    else:
        print_progress(title)
        try:
            _train(run, corpus())
        except DivergedError as error:
            described = {"step": error.step, "command": run.command, "config": to_json(run.config)}
            _write_results(run, {"diverged.json": json.dumps(described, indent=2) + "\n"})
            print_progress(
                f"{title}: diverged at step {error.step}; without {run.results / 'diverged.json'} it is tried again"
            )
            return True
    refuse_other(run.folder, {"corpus_fingerprint": corpus().fingerprint})
    score(run, corpus())
    return True


def _train(run: SuiteRun, corpus: TokenizedCorpus) -> None:
    """As `loop.train`, with the tokens at hand; it goes on where there is something to go on from."""
    if run.config.compile:
        torch.compiler.reset()  # or the models before would count against the limit of recompilations
    accelerator = new_accelerator(run.config, run.folder)
    training = Run(run.config, run.folder, accelerator, corpus, FreshModel(run.config, corpus), name=run.folder.name)
    training.go(resume=(run.folder / "training.json").exists())
    if training.interrupted:  # when all was done
        raise training.interrupted


def weights_of(run: Path) -> dict[str, str]:
    """A digest of each file of weights of a finished run."""
    return {path.name: sha256_of_file(path) for path in sorted((run / "model").glob("*.safetensors"))}


def _is_scored(run: SuiteRun) -> bool:
    described = run.results / "run.json"
    return described.is_file() and read_results(described).get("sha256") == weights_of(run.folder)


def score(run: SuiteRun, corpus: TokenizedCorpus) -> None:
    """Measure a finished run on held-out text and write its results: all three files or none.

    Versions, commit and machine are those of this measurement; the speed is the training's.
    """
    model = load_pretrained(run.folder / "model")[0].to(PartialState().device)
    evaluations, speeds = read_evaluations(run.folder)
    nats = evaluate_lengths(model, corpus, run.config.model.n_ctx, name=run.folder.name)
    nats.insert(1, "source", np.array(heldout_sources(run.config, corpus))[nats["document"]])
    described = {
        "variant": run.variant,
        "seed": run.seed,
        "command": run.command,
        **read_description(run.folder),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "evaluation": evaluations[-1],
        "tokens_per_second": speeds[-1] if speeds else None,
        "sha256": weights_of(run.folder),
        "versions": {
            "python": platform.python_version(),
            "lens_positions": __version__,
            **{name: version(name) for name in ("torch", "transformers")},
        },
        "git": commit(),
        "device": _device(),
    }
    losses = pd.DataFrame(evaluations)[["step", "heldout_nats_per_byte"]]
    files = {
        "heldout.csv": nats.to_csv(index=False, float_format="%.6f"),
        "log.csv": losses.to_csv(index=False),
        "run.json": json.dumps(described, indent=2) + "\n",
    }
    _write_results(run, files)


def _write_results(run: SuiteRun, files: dict[str, str]) -> None:
    with replacement_folder(run.results) as folder:
        for name, text in files.items():
            (folder / name).write_text(text, "utf-8")


@torch.no_grad()
def evaluate_lengths(
    model: Any,
    corpus: TokenizedCorpus,
    n_ctx: int,
    factors: Sequence[int] = FACTORS,
    max_bytes: int = 262_144,
    name: str = "model",
) -> pd.DataFrame:
    """The loss of a byte model on the same held-out bytes, read in pieces of one and more training contexts.

    A window of the longest length is cut into pieces of each length, so that every token is predicted exactly once at
    every length, with more or less text before it.

    Args:
        model: a transformers model.
        corpus: the text.
        n_ctx: the training context, in tokens.
        factors: the lengths in contexts; each divides the longest.
        max_bytes: at most so many predicted tokens, spread over the held-out text.
        name: what progress calls the model.

    Returns:
        A row for each length and document: `document`, `length` in tokens, predicted `bytes` (ends of documents are
        none) and the `nats` of all predicted tokens.

    Raises:
        PositionsError: factors that do not divide the longest, or less text than a window of the longest length.
    """
    if not factors or min(factors) < 1 or any(max(factors) % factor for factor in factors):
        raise PositionsError(f"factors are {tuple(factors)}; expected whole numbers that divide the largest.")
    longest = n_ctx * max(factors)
    if max_bytes < longest:
        raise PositionsError(f"max_bytes is {max_bytes}; expected at least {longest}, the longest length.")
    windows = heldout_windows(corpus.heldout, longest, max_bytes // longest)
    documents = heldout_documents(corpus, longest, max_bytes // longest).flatten()
    counted = are_bytes(windows[:, 1:]).flatten()
    found = []
    for length in (n_ctx * factor for factor in factors):
        pieces = windows.unfold(1, length + 1, length).flatten(0, 1)
        batches = pieces.split(max(1, BATCH_TOKENS // length))
        nats = [
            token_nats(model, batch.to(model.device)).double().cpu()
            for batch in track_progress(batches, f"{name}: loss at {length} tokens")
        ]
        columns = {"document": documents, "bytes": counted.int(), "nats": torch.cat(nats).flatten()}
        table = pd.DataFrame({column: values.numpy() for column, values in columns.items()})
        found.append(table.groupby("document", as_index=False).sum().assign(length=length))
    return pd.concat(found, ignore_index=True)[["document", "length", "bytes", "nats"]]


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()} CPU, threads: {torch.get_num_threads()}"


def loss_table(results: Tables, suite: str) -> pd.DataFrame:
    """The loss of every variant of a suite at every length, and its difference to static, from results alone.

    Returns:
        A row for each variant and length, in the order of VARIANTS and ROPE_VARIANTS:

        - `variant`, `length` (tokens), `documents`, `bytes`: what was scored;
        - `n_seeds`, `loss`: the mean over so many seeds, in nats per byte;
        - `seeds`, `difference`: the seeds that static has too, and the mean over them of the loss minus static's;
        - `seeds_low`, `seeds_high`: Student's 95% interval of that mean over seeds; NaN for fewer than two;
        - `documents_low`, `documents_high`: where it lies in 95% of 1,000 resamples of documents, seeds averaged;
        - `diverged`: the seeds whose loss stopped being a number, each with its step.

        Empty where there are no results.

    Raises:
        PositionsError: results of different text, or a damaged table.
    """
    scored = {variant: scores_by_seed(results, suite, variant) for variant in (*VARIANTS, *ROPE_VARIANTS)}
    sizes = _common_sizes(suite, scored)
    rows = []
    for variant, scores in scored.items():
        diverged = diverged_at(results, suite, variant)
        if not scores and not diverged:
            continue
        common = {"variant": variant, "n_seeds": len(scores), "diverged": diverged}
        if sizes is None:
            rows.append(common)
            continue
        paired = [seed for seed in scores if seed in scored["static"] and variant != "static"]
        for length in sizes.index.unique("length"):
            size = sizes.loc[length].to_numpy()
            row = common | {"length": length, "documents": len(size), "bytes": size.sum()}
            nats = {seed: table["nats"].loc[length] for seed, table in scores.items()}
            if nats:
                row["loss"] = np.mean([own.sum() for own in nats.values()]) / size.sum()
            if paired:
                differences = [nats[seed] - scored["static"][seed]["nats"].loc[length] for seed in paired]
                row |= {"seeds": " ".join(map(str, paired))}
                row |= paired_difference(np.stack(differences, axis=1), size)
            rows.append(row)
    columns = ["variant", "length", "documents", "bytes", "n_seeds", "loss", "seeds", "difference"]
    columns += ["seeds_low", "seeds_high", "documents_low", "documents_high", "diverged"]
    return pd.DataFrame(rows, columns=columns)


def scores_by_seed(results: Tables, suite: str, variant: str) -> dict[int, pd.DataFrame]:
    """The scores of the runs of a variant, as `read_scores`, by seed."""
    return {
        seed: _scores(table, f"{results.path('heldout')} of {RunName(suite, variant, seed)}")
        for seed, table in results.seeds("heldout", suite, variant).items()
    }


def diverged_at(results: Tables, suite: str, variant: str) -> str:
    """The seeds of a variant whose loss stopped being a number, each with its step."""
    steps = {run.seed: of["step"] for run, of in results.runs.items() if run[:2] == (suite, variant) and "step" in of}
    return ", ".join(f"seed {seed} at step {step}" for seed, step in sorted(steps.items(), key=str))


def _common_sizes(suite: str, scored: dict[str, dict[int, pd.DataFrame]]) -> "pd.Series[int] | None":
    """The bytes of every document at every length, which must be those of all runs; None without a run."""
    sizes: pd.Series[int] | None = None
    for variant, tables in scored.items():
        for seed, table in tables.items():
            sizes = table["bytes"] if sizes is None else sizes
            if not table["bytes"].equals(sizes):
                run = RunName(suite, variant, seed)
                raise PositionsError(f"{run} was scored on other text than the rest; expected the same for all.")
    return sizes


def read_scores(path: Path) -> pd.DataFrame:
    """What heldout.csv says: `source`, `bytes` and `nats` by `length` and `document`.

    Raises:
        PositionsError: it is damaged.
    """
    try:
        table = pd.read_csv(path)
    except (ValueError, OSError) as error:
        raise PositionsError(f"{path} is damaged ({error}); expected what the suite wrote.") from error
    return _scores(table, str(path))


def _scores(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """A table of heldout.csv, checked, by length and document."""
    try:
        scores = table.set_index(["length", "document"])[["source", "bytes", "nats"]].sort_index()
        scores = scores.astype({"bytes": "int64", "nats": "float64"})
        if not len(scores) or not scores.index.is_unique or not np.isfinite(scores["nats"]).all():
            raise ValueError("a document is missing, there twice, or without its nats")
        return scores
    except (ValueError, KeyError) as error:
        raise PositionsError(f"{where} is damaged ({error}); expected what the suite wrote.") from error


def paired_difference(nats: Float64[np.ndarray, "document seed"], size: np.ndarray) -> dict[str, float]:
    """The mean difference in nats per byte, with both of its intervals."""
    by_seed = nats.sum(0) / size.sum()
    found = {"difference": float(by_seed.mean())}
    if nats.shape[1] > 1:
        found["seeds_low"], found["seeds_high"] = over_seeds(by_seed)
    if len(size) > 1:
        low, high = interval_of(bootstrap_means(nats.mean(1, keepdims=True), size, resamples(len(size), seed=0)))
        found["documents_low"], found["documents_high"] = float(low[0]), float(high[0])
    return found


def over_seeds(differences: Float64[np.ndarray, " seed"]) -> tuple[float, float]:
    """Student's 95% interval of the mean difference over seeds.

    Raises:
        PositionsError: fewer than two seeds.
    """
    if len(differences) < 2:
        raise PositionsError(
            f"there are differences of {len(differences)} seed(s); expected at least 2 for an interval."
        )
    return t_interval(differences)


def print_losses(table: pd.DataFrame) -> None:
    """Print what `loss_table` returns, and say what its numbers are."""
    console = Console(highlight=False)
    text = table.dropna(subset="bytes")[["bytes", "documents"]]
    if len(text):
        size, documents = text.iloc[0]
        print_line(
            console, f"held-out loss in nats per byte, on the same {size:,.0f} bytes of {documents:,.0f} documents"
        )
    print_line(
        console, "read in pieces of so many tokens; difference: minus static at the same seeds, with intervals of 95%\n"
    )
    cells = []
    for row in table.to_dict("records"):
        seeds = "" if row["seeds"] != row["seeds"] else str(row["seeds"])
        over = _interval_text(row["seeds_low"], row["seeds_high"])
        cells.append(
            [
                str(row["n_seeds"]),
                "diverged" if math.isnan(row["loss"]) else f"{row['loss']:.4f}",
                "" if math.isnan(row["difference"]) else f"{row['difference']:+.4f}",
                over or ("one seed" if len(seeds.split()) == 1 else ""),
                _interval_text(row["documents_low"], row["documents_high"]),
            ]
        )
    names = [f"{variant} {length:.0f}" for variant, length in zip(table["variant"], table["length"], strict=True)]
    columns = ["seeds", "loss", "difference", "over seeds", "over documents"]
    width = max(map(len, names))
    print_grid(console, [f"{name:{width}}" for name in names], columns, [[Text(c) for c in row] for row in cells])
    for variant, text in dict(zip(table["variant"], table["diverged"], strict=True)).items():
        if text:
            print_line(console, f"{variant} diverged: {text}")


def _interval_text(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"{low:+.4f} to {high:+.4f}"


def print_progress(text: str) -> None:
    """A line of progress on standard error."""
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
