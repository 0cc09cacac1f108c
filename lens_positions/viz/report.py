"""Everything about a model's increments in one file that opens anywhere: `lens-positions report`.

The page holds its data, its figures and the scripts that draw its views, circuitsvis' own among them, once. It asks
nothing of a network, and opens with what was found, from its own tables. Parts that a model cannot have (increments of
a static model, attention that TransformerLens leaves whole, a corpus whose package is missing) are replaced by a
sentence that says why.
"""

import json
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas as pd
import torch
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.figure import Figure

from .. import causal, corpora
from .._version import __version__
from ..analysis.losses import Losses, compare_losses, increments_and_losses
from ..analysis.token_kinds import increments_by_category
from ..checkpoint import fingerprint
from ..core.model_state import evaluation_mode
from ..errors import PositionsError
from ..interventions import Hooks, describe
from ..measure.corpus_reader import WINDOW, CorpusIncrements, first_rows, windows
from ..measure.native_pass import native_blocks
from ..model import HookedPositionTransformer
from ..progress import announce_parts, durations_wanted, estimated
from . import style
from .charts import kinds_chart
from .effect_charts import ABLATION_LABELS, ablation_bars
from .findings import of_ablations, of_kinds, of_losses, sentence
from .interactive import View, attention_view, scripts, spacing_view, styles, tokens_view, write_page
from .output import check_page, visible_character
from .text_positions import SOURCES

ENGLISH = "The President of the United States spoke today."
CHINESE = "中国政府今天在北京举行记者会。"

PACKAGES = ("torch", "transformers", "transformer-lens", "circuitsvis")

LOSS_UNIT = "nats per byte"

ABLATED = 8_000
"""Bytes that are ablated, about: each is read in three ways for each layer, where all else reads it once."""

PROBED = 0.25
"""Seconds of reading from which the length of a report is estimated."""

DRAWN = 4.0
"""Seconds that the rest of a report takes, about: figures, views and the page."""

SNIPPET = 80
"""Characters of a text in a heading."""

Piece = dict[str, Any]

Read = Callable[[int], tuple[CorpusIncrements, Losses]]
"""The increments and losses of the held-out text, by the number of a model."""

Part = tuple[str, Callable[[], Iterator[Piece]]]
"""The title of a part, and what computes it."""


def report(
    model: HookedPositionTransformer,
    path: str | Path,
    texts: str | Sequence[str] = (),
    compare: HookedPositionTransformer | None = None,
    corpus: str | None = None,
    characters: int = 20_000,
    seed: int = 0,
    command: str = "",
    prepend_bos: bool | None = None,
    *,
    hooks: Hooks | None = None,
) -> list[str]:
    """Write a report on a model, and on another beside it.

    Args:
        model: the model.
        path: where to write it, as .html; what was there stays until the new one is whole.
        texts: what to draw; an English and a Chinese sentence where none is given.
        compare: another model, drawn beside the first and compared in loss per byte, paired by document.
        corpus: held-out text for the kinds of token, the loss and the ablations: a name, a file or a folder. None is
            "bilingual" where the packages with its text are installed.
        characters: at most so much of it, taken evenly from the held-out documents.
        seed: of the resampling and the shuffles. `command` is how to make it again, as it stands in the report.
        prepend_bos: whether every text gets the beginning-of-sequence token; None is TransformerLens' default.
        hooks: edits, without and with which texts are drawn and the loss is measured; all else is the model's own.

    Returns what was cut or left out, a sentence each. Interrupted, it writes what is done and raises KeyboardInterrupt.

    Raises:
        PositionsError: an empty text, a path that cannot be written, a corpus that was named and is not there, or
            edits beside another model.

    >>> left_out = lp.viz.report(model, folder / "report.html", texts="The cat sat.", corpus=str(corpus))
    >>> (folder / "report.html").read_text("utf-8")[:15]
    '<!doctype html>'
    """
    check_page(path)
    models = _models(model, compare, hooks)
    texts = [texts] if isinstance(texts, str) else list(texts) or [ENGLISH, CHINESE]
    if not all(texts):
        raise PositionsError("a text is empty; expected at least one character.")
    held_out, of_corpus = _held_out(corpus, characters)
    found: dict[str, list[str]] = {"kinds": [], "ablations": [], "losses": []}
    of, read = (models, held_out, of_corpus, seed, prepend_bos), _reader(models, held_out, prepend_bos)
    planned: list[Part] = [
        *_text_parts(models, texts, prepend_bos, hooks),
        ("Increments by kind of token", lambda: _kinds(models, held_out, of_corpus, seed, read, found)),
        ("Loss on held-out text", lambda: _losses(*of, read, hooks, found)),
        ("What the increments are needed for", lambda: _ablations(*of, found)),
        ("The model" if compare is None else "The models", lambda: _facts(models, hooks)),
        ("How to make this report again", lambda: _again(models, of_corpus, seed, command)),
    ]
    with estimated(_seconds(models, held_out, prepend_bos, hooks), "the report"):
        parts, interrupted = _finished_parts(planned, models)
    opening = [sentence(said) for said in found.values() if said] if held_out else [of_corpus]
    write_page(_page(models, opening, parts, [title for title, _ in planned[len(parts) :]]), path)
    if interrupted is not None:
        raise type(interrupted)(str(path)) from interrupted
    return [*_cut_views(parts), *([] if held_out else [of_corpus])]


def _reader(models: list[HookedPositionTransformer], texts: list[str], bos: bool | None) -> Read:
    """What reads the texts with a model: once, for the kinds and for the losses."""
    return cache(lambda number: increments_and_losses(models[number], texts, bos))


def _seconds(
    models: list[HookedPositionTransformer], held_out: list[str], bos: bool | None, hooks: Hooks | None
) -> float:
    """How long the report will take: what one pass of a part of the held-out text takes, times the passes planned."""
    if not durations_wanted() or not held_out:
        return 0.0
    seconds = DRAWN
    for model in models:
        documents, batches = windows(model, held_out, None, bos)
        read, sample = 0, first_rows(documents, batches)
        with evaluation_mode(model), native_blocks(model, sample), torch.no_grad():
            start = perf_counter()
            for number, batch in enumerate(batches):
                rows = torch.stack([documents[document][start:stop] for document, start, stop in batch])
                model(rows)
                read += rows.numel()

                # The first pass of a model is slower than all others.
                if number == 0 and len(batches) > 1:
                    start, read = perf_counter(), 0
                elif perf_counter() - start > PROBED:
                    break
        seconds += (perf_counter() - start) / max(read, 1) * sum(map(len, documents)) * _passes(model, held_out, hooks)
    return seconds


def _passes(model: HookedPositionTransformer, held_out: list[str], hooks: Hooks | None) -> float:
    """How often a report reads its held-out text, in whole passes."""
    losses = 2 if hooks else 1
    if model.position_config.source == "static":
        return losses

    # Increments are read with the losses. Of a share of the documents: the baseline, and in three ways all layers and
    # each, from which a pass goes on.
    layers = model.position_layers
    blocks = int(model.cfg.n_layers)
    ablated = 1 + 3 * sum(blocks - layer for layer in [*layers, min(layers)]) / blocks
    return losses + ablated / _one_in(held_out)


def _one_in(texts: list[str]) -> int:
    """Of how many documents one is ablated."""
    return math.ceil(sum(len(text.encode()) for text in texts) / ABLATED)


def _models(
    model: HookedPositionTransformer, compare: HookedPositionTransformer | None, hooks: Hooks | None
) -> list[HookedPositionTransformer]:
    """The models of the report, in order."""
    if hooks and compare is not None:
        raise PositionsError("hooks came with a model to compare; expected one of them, as edits are of one model.")
    return [model] if compare is None else [model, compare]


def _text_parts(
    models: list[HookedPositionTransformer], texts: list[str], bos: bool | None, hooks: Hooks | None
) -> list[Part]:
    """The parts that draw texts."""
    return [
        ("Characters at their positions", lambda: _spacing(models, texts, bos, hooks)),
        ("Tokens tinted by increment", lambda: _tints(models, texts, bos, hooks)),
        ("Attention beside increments", lambda: _attention(models, texts, bos, hooks)),
    ]


def _cut_views(parts: list[dict[str, Any]]) -> list[str]:
    """What views leave out of their texts, a sentence each."""
    views = [piece for part in parts for piece in part["pieces"] if piece["kind"] == "view" and piece["view"].cut]
    return [f"{piece['title']}: {piece['view'].title}: {piece['view'].cut}" for piece in views]


def _finished_parts(
    planned: list[Part], models: list[HookedPositionTransformer]
) -> tuple[list[dict[str, Any]], KeyboardInterrupt | None]:
    """The parts, or those before an interruption, and the interruption. Each is computed when it is its turn."""
    parts: list[dict[str, Any]] = []
    with ExitStack() as modes:
        for model in models:  # once for all parts, as every pass would switch every module there and back
            modes.enter_context(evaluation_mode(model))
        for title, pieces in announce_parts(planned, "report"):
            try:
                parts.append({"title": title, "id": title.lower().replace(" ", "-"), "pieces": list(pieces())})
            except KeyboardInterrupt as interruption:
                return parts, interruption
    return parts, None


def _page(
    models: list[HookedPositionTransformer], found: list[str], parts: list[dict[str, Any]], missing: list[str]
) -> str:
    """The page with everything in it: first what was `found`; `missing` are titles of parts that were not reached."""
    names = " and ".join(model.name for model in models)
    loader = Environment(loader=PackageLoader("lens_positions.viz", "web"), autoescape=True)
    return loader.get_template("report.html").render(
        title=f"does {names} think its" if len(models) == 1 else f"do {names} think their",
        styles=_own_text(styles()),
        scripts=_own_text(scripts()),
        found=found,
        parts=parts,
        missing=missing,
        version=__version__,
    )


def _facts(models: list[HookedPositionTransformer], hooks: Hooks | None) -> Iterator[Piece]:
    """What each model is, and which edits are shown."""
    if hooks:
        yield _note(f"Edits: {describe(hooks)}. Texts are drawn without and with them.")
    # Models may differ in which facts they have; rows are all of them, in order.
    columns = [_facts_of(model) for model in models]
    names = list(dict.fromkeys(name for column in columns for name in column))
    yield _table(["", *(model.name for model in models)], [[n, *(c.get(n, "") for c in columns)] for n in names])
    for model in models:
        if model.position_config.source == "static":
            yield _note(
                f"{model.name} has no learned increments: every token stands one step after the last, and its rows are "
                "drawn so."
            )


def _facts_of(model: HookedPositionTransformer) -> dict[str, str]:
    config, cfg = model.position_config, model.cfg
    hf = model.original_model.config
    facts = {
        "increments": SOURCES[config.source],
        "architecture": type(model.original_model).__name__,
        "parameters": f"{sum(p.numel() for p in model.original_model.parameters()):,}, of which "
        f"{sum(p.numel() for p in model.position_streams.parameters()):,} make increments",
        "layers": f"{cfg.n_layers}, of which {len(model.position_layers)} have positions",
        "heads": f"{cfg.n_heads} a layer",
        "width": f"{cfg.d_model}",
        "vocabulary": f"{cfg.d_vocab:,} tokens",
        "context": f"{cfg.n_ctx:,} tokens",
        "RoPE base": f"{(getattr(hf, 'rope_parameters', None) or {}).get('rope_theta', 'as its layers say')}",
        "weights": f"SHA-256 {fingerprint(model)[:16]}… (in bf16, without the streams)",
    }
    if config.source != "static":
        facts["gap"] = f"an increment is the gap {config.gap} its token"
        if config.source != "frozen":
            bound = f", at most {config.max_increment:g}" if config.activation == "sigmoid" else ""
            facts["activation"] = f"{config.activation}{bound}"
        facts["per head"] = "yes" if config.per_head else "no, one for all heads of a layer"
    return facts | _training_facts(Path(model.name))


def _training_facts(folder: Path) -> dict[str, str]:
    """What the run that wrote a model left beside it."""
    if not (folder / "positions.json").is_file():
        return {}
    try:
        # Written beside the model by the run; anything else may stand there too.
        config = json.loads((folder.parent / "training.json").read_text("utf-8"))["config"]
        last = json.loads((folder.parent / "log.jsonl").read_text("utf-8").strip().splitlines()[-1])
        return {
            "training": f"{config['steps']:,} steps on {config['corpus']}, seed {config['seed']}",
            "held-out loss of the run": f"{last['heldout_nats_per_byte']:.4f} nats per byte",
        }
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _spacing(
    models: list[HookedPositionTransformer], texts: list[str], bos: bool | None, hooks: Hooks | None
) -> Iterator[Piece]:
    yield _text("Each character stands as far from the last as the model puts it, one row a layer.")
    for text in texts:
        # Headings are short: the whole text stands once, above its views.
        if len(text) > SNIPPET:
            yield {"kind": "quote", "text": text}
        for model in models:
            yield _view(spacing_view(model, text, hooks=hooks, prepend_bos=bos), text, model, models)


def _tints(
    models: list[HookedPositionTransformer], texts: list[str], bos: bool | None, hooks: Hooks | None
) -> Iterator[Piece]:
    for text in texts:
        for model in models:
            yield _view(tokens_view(model, text, hooks=hooks, prepend_bos=bos), text, model, models)


def _attention(
    models: list[HookedPositionTransformer], texts: list[str], bos: bool | None, hooks: Hooks | None
) -> Iterator[Piece]:
    yield _text(
        "The same attention on two rulers: tokens as far apart as the layer has them, and counted. What is near on the "
        "upper ruler is near for this layer, whatever stands between."
    )
    for text in texts:
        for model in models:
            try:
                yield _view(attention_view(model, text, hooks=hooks, prepend_bos=bos), text, model, models)
            except PositionsError as error:
                yield _note(str(error))


def _kinds(
    models: list[HookedPositionTransformer],
    texts: list[str],
    of: str,
    seed: int,
    read: Read,
    found: dict[str, list[str]],
) -> Iterator[Piece]:
    if not texts:
        yield _note(of)
        return
    for number, model in enumerate(models):
        if model.position_config.source == "static":
            found["kinds"].append(f"{model.name} has no learned increments, so none differs by kind of token")
            yield _note(f"Every increment of {model.name} is 1: there is nothing to compare.")
            continue
        table = increments_by_category(model, read(number)[0], seed=seed)
        found["kinds"].append(of_kinds(model.name, table))
        caption = f"{model.name}; {of}. Intervals: 95% of resamples of documents, seed {seed}."
        yield _figure(kinds_chart(table, caption), f"Increments by kind of token and layer, {model.name}")
        rows = [
            [row.kind, str(row.layer), f"{row.n:,}", f"{row.mean:.3f}{_interval(row.low, row.high, '.3f')}",
             f"{row.relative:.3f}{_interval(row.relative_low, row.relative_high, '.3f')}"]
            for row in table.itertuples()
        ]  # fmt: skip
        columns = ["kind", "layer", "n", "mean, in steps of RoPE (95%)", "over the layer's mean (95%)"]
        yield _table(columns, rows, f"The numbers, {model.name}")


def _losses(
    models: list[HookedPositionTransformer],
    texts: list[str],
    of: str,
    seed: int,
    bos: bool | None,
    read: Read,
    hooks: Hooks | None,
    found: dict[str, list[str]],
) -> Iterator[Piece]:
    if not texts:
        yield _note(of)
        return
    known = [read(number)[1] for number in range(len(models))]
    try:
        table = compare_losses(models, texts, seed, hooks=hooks, prepend_bos=bos, unedited=known)
    except PositionsError as error:
        if not hooks:
            raise
        yield _note(f"The edits are not made for this text, which is measured without them: {error}")
        table = compare_losses(models, texts, seed, unedited=known)
    found["losses"].append(of_losses(table))
    several = len(table) > 1
    rows = []
    for row in table.to_dict("records"):
        loss = f"{row['loss']:.4f}{_interval(row['low'], row['high'], '.4f')}"
        cells = [str(row["model"]), loss, f"{row['bytes']:,}", str(row["documents"])]
        if several:
            value = row["difference"]
            ends = _interval(row["difference_low"], row["difference_high"], "+.4f")
            cells.append("" if math.isnan(value) else f"{value:+.4f}{ends}")
        rows.append(cells)
    columns = ["model", "nats per byte (95%)", "bytes", "documents"]
    yield _table([*columns, f"minus {models[0].name} (95%, paired)"] if several else columns, rows)
    yield _text(
        f"{of[0].upper()}{of[1:]}; intervals resample documents, seed {seed}. A model reads "
        f"windows of its context, at most {WINDOW} tokens; a byte model also predicts where a document ends."
    )


def _ablations(
    models: list[HookedPositionTransformer],
    texts: list[str],
    of: str,
    seed: int,
    bos: bool | None,
    found: dict[str, list[str]],
) -> Iterator[Piece]:
    if not texts:
        yield _note(of)
        return
    yield _text(
        "Increments at 1.0, at the mean of their row, and given to other tokens of the row. What 1.0 does beyond the "
        "mean is scale, not structure."
    )
    step = _one_in(texts)
    for model in models:
        if model.position_config.source == "static":
            found["ablations"].append(f"ablating increments of {model.name} does nothing, as each of them is 1")
            yield _note(f"Every increment of {model.name} is 1: ablating them does nothing.")
            continue
        loss, said = _ablation_losses(model, texts[::step], seed, bos)
        found["ablations"].append(of_ablations(model.name, loss, LOSS_UNIT))
        share = "" if step == 1 else f"one document in {step} of "
        caption = (
            f"{model.name}; {loss['n'].iloc[0]:,} tokens, {share}{of}; {loss['baseline'].iloc[0]:.4f} {LOSS_UNIT} "
            f"without ablation{said}. Intervals: 95% of resamples of documents, seed {seed}."
        )
        figure = ablation_bars(loss, caption=caption, unit=LOSS_UNIT)
        yield _figure(figure, f"Change of loss by ablation and layer, {model.name}")
        rows = [
            [str(row.layer), ABLATION_LABELS.get(str(row.to), f"to {row.to}"),
             f"{row.change:+.4f}{_interval(row.low, row.high, '+.4f')}",
             f"{row.changed:.2%}{_interval(row.changed_low, row.changed_high, '.2%')}"]
            for row in loss.itertuples()
        ]  # fmt: skip
        columns = ["layer", "increments", f"change of loss, {LOSS_UNIT} (95%)", "other prediction (95%)"]
        yield _table(columns, rows, f"The numbers, {model.name}", is_open=len(rows) <= 24)


def _ablation_losses(
    model: HookedPositionTransformer, texts: list[str], seed: int, bos: bool | None
) -> tuple[pd.DataFrame, str]:
    """The losses of ablations in nats per byte, the unit of this page, and how they came by it where that is not plain.

    Every document counts with its tokens; the number of tokens a byte, by which all are multiplied, is that of all the
    documents together.
    """
    loss = causal.ablation_table(model, texts, seed=seed, attention=False, prepend_bos=bos).loss
    a_byte = int(loss["n"].iloc[0]) / sum(len(text.encode()) for text in texts)
    columns = ["baseline", "change", "low", "high"]
    loss[columns] = loss[columns] * a_byte
    return loss, "" if a_byte == 1 else f" (measured a token, times {a_byte:.4f} tokens a byte)"


def _again(models: list[HookedPositionTransformer], of: str, seed: int, command: str) -> Iterator[Piece]:
    if command:
        yield {"kind": "code", "text": command}
    rows = [["lens-positions", __version__], *([package, version(package)] for package in PACKAGES)]
    rows += [["Python", platform.python_version()], ["seed", str(seed)], ["text", of], ["made on", str(date.today())]]
    yield _table(["", ""], rows)


def _held_out(corpus: str | None, characters: int) -> tuple[list[str], str]:
    """Held-out text and what it is; no text and why, where none was asked for by name."""
    try:
        texts = corpora.heldout_excerpts("bilingual" if corpus is None else corpus, characters)
    except PositionsError as error:
        # A corpus that was asked for by name is needed; the default one is shown where it can be had.
        if corpus is not None or characters < 1:
            raise
        return [], f"Left out, as there is no held-out text: {error}"
    count = f"{sum(map(len, texts)):,} characters of {len(texts)} held-out documents"
    return texts, f"{count} of {corpus or 'bilingual'}"


def _text(text: str) -> Piece:
    return {"kind": "text", "text": text}


def _note(text: str) -> Piece:
    return {"kind": "note", "text": text}


def _table(columns: list[str], rows: Sequence[Sequence[Any]], summary: str = "", is_open: bool = False) -> Piece:
    return {"kind": "table", "columns": columns, "rows": rows, "summary": summary, "open": is_open}


def _view(view: View, text: str, model: HookedPositionTransformer, models: list[HookedPositionTransformer]) -> Piece:
    # A heading is short; the whole text stands above its views.
    snippet = text if len(text) <= SNIPPET else text[:SNIPPET] + "…"
    title = "".join(c if c == " " and not snippet.isspace() else visible_character(c) for c in snippet)
    return {"kind": "view", "view": view, "title": title if len(models) == 1 else f"{title} · {model.name}"}


def _figure(figure: Figure, alt: str) -> Piece:
    """A figure with its words as text of the page, which wraps where the picture has to be scrolled."""
    # Those that `style.frame_figure` wrote; the caption was broken into lines for the width of the picture.
    title, subtitle, caption = (text.get_text() for text in figure.texts[:3])
    for text in figure.texts[:3]:
        text.set_visible(False)
    drawn = Markup(style.page_svg(figure, alt))
    return {"kind": "figure", "svg": drawn, "alt": alt, "title": title, "subtitle": subtitle,
            "caption": caption.replace("\n", " ")}  # fmt: skip


def _interval(low: Any, high: Any, form: str) -> str:
    return "" if pd.isna(low) else f" ({low:{form}} to {high:{form}})"


def _own_text(text: str) -> Markup:
    """Text of our own files, which goes into the page as it is."""
    return Markup(text)
