"""Finished runs of a suite as models inside the package, by name, for whoever has no hour to train them.

    lens_positions/checkpoints/bilingual-rope/
        config.json, tokenizer.json, ...     a plain transformers folder, whose weights load as float32
        model.safetensors                    the weights of the run, rounded to float16
        positions.json, .safetensors         the streams, as the run saved them
        scores.csv                           the loss of these rounded weights by held-out document and length of text
        run.json                             of the suite: what was trained, from what, by which code
        CARD.md                              what a person should know, from the files above and the unrounded scores

All models or none are written. The same runs and text give the same bytes again.
"""

import json
import shlex
import shutil
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from lens_positions.checkpoint import load_pretrained
from lens_positions.checkpoint_files import replacement_folder, seal
from lens_positions.errors import PositionsError
from lens_positions.training.checkpoints import refuse_other
from lens_positions.training.config import TrainConfig, update_config
from lens_positions.training.data import TokenizedCorpus, heldout_sources, tokenize_corpus

from .markdown import grid, page
from .options import SHIPPED, ShipConfig
from .suite import evaluate_lengths, is_finished, paired_difference, read_scores, scores_by_seed, weights_of
from .tables import RunName, Tables, read_tables

ROPE = "bilingual-rope"

CARD_FIELDS = ("command", "config", "corpus_fingerprint", "parameters", "sha256", "versions", "git", "device")
"""What a card says of a run."""

TEXTS = {
    "all": ("sotu", "peoples_daily", "reviews"),
    "English": ("sotu",),
    "Chinese": ("peoples_daily", "reviews"),
    "Chinese: newspaper": ("peoples_daily",),
    "Chinese: reviews": ("reviews",),
}
"""What losses are given for, and the sources of the corpus in each."""

INCREMENTS = {
    "static": "Its increments are exactly 1: standard RoPE, which the other shipped models are compared with.",
    "shared": "One increment source serves all layers, a small network on the embedding of each token; its increments "
    "are {range}.",
    "per_layer": "Each layer has an increment source of its own, a small network on the residual stream that enters "
    "the layer; its increments are {range}.",
}


def ship(options: ShipConfig) -> dict[str, pd.DataFrame]:
    """Write every model of SHIPPED, score what was written, and return what `score_table` finds of each.

    Raises:
        PositionsError: a run is missing, not finished or not scored, the runs differ in more than their increments,
            their text is not the bilingual corpus as it is here, or there are other files in the way. Nothing is
            written then.
    """
    results = read_tables(options.results)
    described = {name: _scored_run(options, results, variant) for name, variant in SHIPPED.items()}
    _refuse_different(options, described)
    for name in SHIPPED:
        _refuse_other_files(options.output / name)
    config = update_config(TrainConfig(), described[ROPE]["config"], str(_run(options, "static")))
    corpus = tokenize_corpus(
        config.corpus, options.cache, text_column=config.text_column, max_bytes=config.max_bytes, tokenizer=None
    )
    refuse_other(_run(options, "static"), {"corpus_fingerprint": corpus.fingerprint})
    sources = np.array(heldout_sources(config, corpus))
    tables = {}
    with ExitStack() as whole:
        staged = {name: whole.enter_context(replacement_folder(options.output / name)) for name in SHIPPED}
        for name, variant in SHIPPED.items():
            folder = staged[name]
            _write_rounded(_run(options, variant) / "model", folder)
            _write_scores(folder, name, corpus, config.model.n_ctx, sources)
            (folder / "run.json").write_text(json.dumps(described[name], indent=2) + "\n", "utf-8")
            exact = scores_by_seed(results, options.preset, variant)[options.seed]
            tables[name] = score_table(folder, exact, staged[ROPE], _run(options, variant).name)
            command = ["lens-positions", "experiments", "ship", *_options(options)]
            (folder / "CARD.md").write_text(card(name, described[name], tables[name], shlex.join(command)), "utf-8")
    return tables


def _run(options: ShipConfig, variant: str) -> Path:
    runs = options.runs or Path("runs/suite") / options.preset
    return runs / f"{variant}-{options.seed}"


def _options(options: ShipConfig) -> list[str]:
    given = {field.name: str(getattr(options, field.name)) for field in fields(options)}
    return [word for f in fields(options) if given[f.name] != str(f.default) for word in (f"--{f.name}", given[f.name])]


def _scored_run(options: ShipConfig, results: Tables, variant: str) -> dict[str, Any]:
    """What is known of a finished run, whose scores are those of its weights."""
    run = _run(options, variant)
    if not (run / "training.json").is_file():
        raise PositionsError(f"there is no run {run}; expected one that lens-positions experiments suite trained.")
    if not is_finished(run):
        raise PositionsError(
            f"the run {run} is not finished; expected lens-positions experiments suite to have ended it."
        )
    name = RunName(options.preset, variant, options.seed)
    described = dict(results.runs.get(name, {}))
    if described.get("sha256") != weights_of(run) or results.table("heldout", name) is None:
        raise PositionsError(
            f"{options.results} has no scores of the weights in {run}; expected those that lens-positions experiments "
            "suite writes, gathered."
        )
    if missing := [field for field in CARD_FIELDS if field not in described]:
        raise PositionsError(f"{options.results} has no {missing[0]} of {name}; expected what the suite wrote.")
    return described


def _refuse_different(options: ShipConfig, described: dict[str, dict[str, Any]]) -> None:
    """Refuse runs that differ in more than where increments come from, and text that the names do not say."""

    def in_common(run: dict[str, Any]) -> dict[str, Any]:
        config = run["config"]
        model = {f"model.{name}": value for name, value in config["model"].items() if name != "positions"}
        others = {name: value for name, value in config.items() if name != "model"}
        return {"corpus_fingerprint": run["corpus_fingerprint"], **others, **model}

    first = in_common(described[ROPE])
    for name, variant in SHIPPED.items():
        other = in_common(described[name])
        for field, value in first.items():
            if other.get(field) != value:
                raise PositionsError(
                    f"{_run(options, variant)} was trained with {field} {other.get(field)} and "
                    f"{_run(options, 'static')} with {value}; expected runs that differ in their increments alone."
                )
    if first["corpus"] != "bilingual":
        raise PositionsError(
            f"{_run(options, 'static')} was trained on {first['corpus']}; expected bilingual, as the names "
            f"{', '.join(SHIPPED)} say."
        )


def _refuse_other_files(path: Path) -> None:
    if path.is_dir() and any(path.iterdir()) and not (path / "CARD.md").is_file():
        raise PositionsError(f"{path} holds other files; expected a shipped model to replace, or a new folder.")


def _write_rounded(model: Path, folder: Path) -> None:
    """A saved model with its own weights in half the bytes; config.json still says float32, which they load as."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    weights = load_file(model / "model.safetensors")
    rounded = {name: weight.to(torch.float16) for name, weight in weights.items()}
    save_file(rounded, folder / "model.safetensors", {"format": "pt"})
    seal(folder)


def _write_scores(folder: Path, name: str, corpus: TokenizedCorpus, n_ctx: int, sources: np.ndarray) -> None:
    nats = evaluate_lengths(load_pretrained(folder)[0], corpus, n_ctx, name=name)
    nats.insert(1, "source", sources[nats["document"]])
    nats.to_csv(folder / "scores.csv", index=False, float_format="%.6f")


def score_table(model: Path, exact: pd.DataFrame, rope: Path, run: str) -> pd.DataFrame:
    """Losses of a shipped model, from scores.csv, against those before rounding and those of shipped RoPE.

    Args:
        model: the folder of the model.
        exact: the scores of its run, as `read_scores`.
        rope: the folder of the model that is compared with.
        run: the name of its run.

    Returns:
        A row for each of TEXTS and each length, shortest first:

        - `text`, `length` (tokens), `documents`, `bytes`: what was scored;
        - `loss`: in nats per byte;
        - `rounding`: the loss minus that of the unrounded weights;
        - `difference`: the loss minus that of `rope`;
        - `documents_low`, `documents_high`: where that lies in 95% of 1,000 resamples of documents; NaN for one.

    Raises:
        PositionsError: scores of different text, or a damaged file.
    """
    shipped, compared = (read_scores(folder / "scores.csv") for folder in (model, rope))
    if not shipped["bytes"].equals(exact["bytes"]) or not shipped["bytes"].equals(compared["bytes"]):
        raise PositionsError(f"{run} was scored on other text than what is shipped; expected the same for all.")
    rows = []
    for text, sources in TEXTS.items():
        of_text = shipped["source"].isin(sources)
        for length, scores in shipped[of_text].groupby("length"):
            size = scores["bytes"].to_numpy()
            nats = scores["nats"]
            row = {"text": text, "length": length, "documents": len(size), "bytes": size.sum()}
            row["loss"] = nats.sum() / size.sum()
            row["rounding"] = (nats - exact["nats"][scores.index]).sum() / size.sum()
            row |= paired_difference((nats - compared["nats"][scores.index]).to_numpy()[:, None], size)
            rows.append(row)
    columns = ["text", "length", "documents", "bytes", "loss", "rounding", "difference"]
    return pd.DataFrame(rows, columns=[*columns, "documents_low", "documents_high"])


def card(name: str, described: dict[str, Any], table: pd.DataFrame, command: str) -> str:
    """CARD.md of a shipped model.

    Args:
        name: the name that it is loaded by.
        described: what its run.json says.
        table: what `score_table` finds.
        command: what ships it.
    """
    config = update_config(TrainConfig(), described["config"], "run.json")
    positions = config.model.positions
    bound = f"between 0 and {positions.max_increment:g} positions"
    spans = {"sigmoid": f"{bound} (sigmoid)", "softplus": "positive (softplus)", "none": "of either sign"}
    increments = INCREMENTS[positions.source].format(range=spans[positions.activation])
    lengths = " and ".join(f"{length:,}" for length in table["length"].unique()[1:])
    values = {"name": name, "described": described, "config": config, "command": command, "increments": increments}
    text = table[table["text"] == "all"].iloc[0]
    return page("card.md.jinja", **values, rope=ROPE, text=text, lengths=lengths, losses=_losses(name, table))


def _losses(name: str, table: pd.DataFrame) -> pd.DataFrame:
    """What `score_table` found, as text."""
    columns = ["text", "tokens", "documents", "bytes", "loss", *([f"minus {ROPE}"] if name != ROPE else []), "rounding"]
    rows = []
    for row in table.to_dict("records"):
        cells = [row["text"], *(f"{row[name]:,}" for name in ("length", "documents", "bytes")), f"{row['loss']:.4f}"]
        if name != ROPE:
            between = f" ({row['documents_low']:+.4f} to {row['documents_high']:+.4f})" if row["documents"] > 1 else ""
            cells.append(f"{row['difference']:+.4f}{between}")
        rows.append([*cells, f"{row['rounding']:+.6f}"])
    return grid(columns, rows)
