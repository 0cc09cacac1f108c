"""Every measurement of `lens_positions` on the finished runs of a suite, kept as small files beside their scores;
`gather` makes tidy tables of them.

    tiny/per_layer-0/boundaries.csv      word boundaries in Chinese, segmented by people and by jieba
    tiny/per_layer-0/english.csv         the loss on other writers' English, of static runs too
    tiny/per_layer-0/kinds.csv           increments by kind of byte
    tiny/per_layer-0/kinds_code.csv      the same in program text
    tiny/per_layer-0/names.csv           the space inside two-word names, and inside ordinary pairs
    tiny/per_layer-0/heads.csv           increment and look-back of every head
    tiny/per_layer-0/correlations.csv    how these go together
    tiny/per_layer-0/saturation.csv      the share at the cap
    tiny/signed-0/below_zero.csv         the share below zero, where increments are signed
    tiny/per_layer-0/specialisation.csv  what the kind of a byte explains, in prose and in program text
    tiny/per_layer-0/ablation.csv        the loss without the structure of increments, in English and Chinese
    tiny/per_layer-0/treebank.csv        word boundaries in other people's text, of increments and of a probe
    tiny/per_layer-0/measured.json       the weights, command, text and time of each

All text is held out; what is only counted or chosen (pairs of words and of characters, each byte's mean increment, the
best constant of each layer) comes from the training text. Nothing else is tuned: every option is the default of its
command.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import pandas as pd
import torch

from lens_positions import causal, corpora
from lens_positions.analysis.heads import head_correlations, head_profile
from lens_positions.analysis.specialisation import below_zero, saturation, specialisation
from lens_positions.analysis.token_kinds import increments_by_category
from lens_positions.analysis.two_word_names import entity_grouping, frequent_names, matched_pairs
from lens_positions.analysis.word_boundaries import (
    Association,
    branching_entropy,
    gap_areas,
    gap_increments,
    gaps_of,
    mutual_information,
)
from lens_positions.errors import PositionsError
from lens_positions.measure.corpus_reader import CorpusIncrements, read_corpus, rows_of, windows
from lens_positions.measure.metrics import token_losses
from lens_positions.model import HookedPositionTransformer
from lens_positions.training.loop import are_bytes

from .measured import measure_left
from .options import CONSTANTS, OF_STATIC, STAGED, WHERE_ASKED, MeasureConfig
from .suite import is_finished, print_progress, read_results, weights_of

CHARACTERS = 60_000
COUNTED_CHARACTERS = 12_000
ABLATED_CHARACTERS = {"english": 12_000, "chinese": 4_000}
"""Held-out text whose increments are ablated: a Chinese character is three tokens."""

PIECE = 500
"""Characters of each document of it at most, so that there are many."""

CHOSEN_CHARACTERS = 1_500
"""Training text that it is looked for in, of each language."""

OTHER_ENGLISH = ("anthropology", "economics", "eltec", "pepys")
"""The English sources of `bilingual-large` that `bilingual` does not have."""

DOCUMENTS, DOCUMENT_CHARACTERS = 96, 1000
"""How many of their documents are read, and how much from the beginning of each."""


class Text:
    """The text that all runs are measured on, read once.

    Args:
        treebanks: files of text that other people segmented.
    """

    def __init__(self, treebanks: Sequence[Path] = ()) -> None:
        self._treebanks = treebanks
        self.treebank_names = " and ".join(path.stem for path in treebanks)

    @cached_property
    def treebank(self) -> list[list[str]]:
        """The words of each sentence of the treebanks."""
        if not self._treebanks:
            raise PositionsError("treebank was asked for without a text; expected --treebank FILE.conllu.")
        return [words for path in self._treebanks for words in corpora.read_segmentation(path)]

    @cached_property
    def segmented(self) -> list[list[str]]:
        """The words of held-out lines of the People's Daily, as people segmented them."""
        return corpora.heldout_segmentation()

    @cached_property
    def by_jieba(self) -> list[list[str]]:
        """The same lines, as jieba does."""
        return corpora.jieba_words(self.lines)

    @property
    def lines(self) -> list[str]:
        """Their text."""
        return ["".join(words) for words in self.segmented]

    @cached_property
    def association(self) -> Association:
        """Of Chinese characters, in the training text."""
        return mutual_information(corpora.load("chinese")["train"]["text"])

    @cached_property
    def entropy(self) -> Callable[[str], float]:
        """Of what follows a Chinese character, in the training text."""
        return branching_entropy(corpora.load("chinese")["train"]["text"])

    @cached_property
    def names(self) -> list[str]:
        """Two-word names of the training text that share no word."""
        return frequent_names(corpora.load("english")["train"]["text"])

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """Names and the ordinary pairs of words that are as frequent in the training text."""
        return matched_pairs(corpora.load("english")["train"]["text"], self.names, distinct=True)

    @cached_property
    def other_english(self) -> list[tuple[str, str]]:
        """Source and text of English documents by other writers, an equal number of each source where it has them."""
        train = corpora.load("bilingual-large")["train"]
        of_source: dict[str, list[str]] = {source: [] for source in OTHER_ENGLISH}
        for source, text in zip(train["source"], train["text"], strict=True):
            if source in of_source:
                of_source[source].append(text[:DOCUMENT_CHARACTERS])
        share = DOCUMENTS // len(OTHER_ENGLISH)
        spread = {source: texts[:: max(1, len(texts) // share)][:share] for source, texts in of_source.items()}
        return [(source, text) for source, texts in spread.items() for text in texts]

    @cached_property
    def prose(self) -> list[str]:
        """English and Chinese."""
        return corpora.heldout_excerpts("bilingual", CHARACTERS)

    @cached_property
    def code(self) -> list[str]:
        """Python."""
        return corpora.heldout_excerpts("code", CHARACTERS)

    @cached_property
    def ablated(self) -> dict[str, tuple[list[str], list[str], list[str]]]:
        """By language, training text for each byte's mean increment, some of it for constants, and held-out text."""
        return {
            corpus: (
                corpora.training_excerpts(corpus, COUNTED_CHARACTERS),
                corpora.training_excerpts(corpus, CHOSEN_CHARACTERS),
                [text[:PIECE] for text in corpora.heldout_excerpts(corpus, size)],
            )
            for corpus, size in ABLATED_CHARACTERS.items()
        }


class Subject:
    """A model to measure, and what is read of it once for several measurements."""

    def __init__(self, model: HookedPositionTransformer, text: Text) -> None:
        self.model, self.text = model, text

    @cached_property
    def prose(self) -> CorpusIncrements:
        """The increments of English and Chinese."""
        return read_corpus(self.model, self.text.prose)

    @cached_property
    def code(self) -> CorpusIncrements:
        """The increments of Python."""
        return read_corpus(self.model, self.text.code)

    @cached_property
    def heads(self) -> pd.DataFrame:
        """Increment and look-back of every head."""
        return head_profile(self.model, self.text.prose)


def _boundaries(subject: Subject) -> pd.DataFrame:
    text, model = subject.text, subject.model
    human = gaps_of(model, text.lines, text.segmented)
    layers, increments = gap_increments(model, human)  # of the same gaps, whoever finds the words
    jieba = gaps_of(model, text.lines, text.by_jieba)
    tables = [
        gap_areas(gaps, layers, increments, text.association, entropy=text.entropy, controls=words == "human").assign(
            words=words
        )
        for words, gaps in (("human", human), ("jieba", jieba))
    ]
    return pd.concat(tables, ignore_index=True)


def _treebank(subject: Subject) -> pd.DataFrame:
    """What increments and a probe of the residual stream tell of word boundaries, in other people's text."""
    # With the questions come their page and its charts, which no other measurement needs.
    from .questions.probes import gap_states, lead_bytes, probe_areas

    words = subject.text.treebank
    gaps = gaps_of(subject.model, ["".join(line) for line in words], words)
    table = probe_areas(gaps, lead_bytes(gaps), *gap_states(subject.model, gaps))
    return table.assign(text=subject.text.treebank_names)


def _specialisation(subject: Subject) -> pd.DataFrame:
    prose = specialisation(subject.model, subject.prose).assign(corpus="bilingual")
    code = specialisation(subject.model, subject.code, "code").assign(corpus="code")
    return pd.concat([prose, code], ignore_index=True)


def _ablation(subject: Subject) -> pd.DataFrame:
    tables = []
    for corpus, (counted, chosen, texts) in subject.text.ablated.items():
        means = causal.token_means(subject.model, counted)
        table = causal.ablation_table(subject.model, texts, means=means).loss
        tables += [table.assign(corpus=corpus), _best_constants(subject.model, chosen, texts).assign(corpus=corpus)]
    return pd.concat(tables, ignore_index=True)


def _best_constants(model: HookedPositionTransformer, chosen: list[str], texts: list[str]) -> pd.DataFrame:
    """Ablations of each layer to the constant that costs least in other text: rows with `to` "best constant".

    The mean is no fair constant where a few increments are large: attention may want most tokens where they are.
    """
    tried = causal.ablation_table(model, chosen, to=CONSTANTS).loss
    tried = tried[tried["layer"] != "all"]
    best = tried.loc[tried.groupby("layer")["change"].idxmin()]
    tables = []
    for layer, constant in zip(best["layer"], best["to"], strict=True):
        of_layer = causal.ablation_table(model, texts, layers=int(layer), to=[float(constant)]).loss
        tables.append(of_layer[of_layer["layer"] == layer].assign(to="best constant", constant=float(constant)))
    return pd.concat(tables, ignore_index=True)


def _english(subject: Subject) -> pd.DataFrame:
    """The loss on other writers' English: bytes and nats of each document, cut at the context."""
    rows = []
    for number, (source, text) in enumerate(subject.text.other_english):
        documents, batches = windows(subject.model, [text])
        nats, size = 0.0, 0
        for tokens, _ in rows_of(documents, batches, "english"):
            with torch.no_grad():
                losses = token_losses(subject.model(tokens), tokens[:, 1:])
            counted = are_bytes(tokens[:, 1:])
            nats, size = nats + float(losses.double()[counted].sum()), size + int(counted.sum())
        rows.append({"document": number, "source": source, "bytes": size, "nats": round(nats, 3)})
    return pd.DataFrame(rows)


MEASUREMENTS: dict[str, tuple[Callable[[Subject], pd.DataFrame], str]] = {
    "boundaries": (_boundaries, "boundaries {model}"),
    "kinds": (lambda s: increments_by_category(s.model, s.prose), "kinds {model}"),
    "kinds_code": (
        lambda s: increments_by_category(s.model, s.code, alphabet="code"),
        "kinds {model} --corpus code --alphabet code",
    ),
    "names": (lambda s: entity_grouping(s.model, s.text.pairs, s.text.names), "experiments measure --tables names"),
    "heads": (lambda s: s.heads, "heads {model}"),
    "correlations": (lambda s: head_correlations(s.heads), "heads {model}"),
    "saturation": (lambda s: saturation(s.model, s.prose), "saturation {model}"),
    "below_zero": (lambda s: below_zero(s.model, s.prose), "saturation {model}"),
    "specialisation": (_specialisation, "specialisation {model}"),
    "ablation": (_ablation, "experiments measure --tables ablation"),
    "english": (_english, "experiments measure --tables english"),
    "treebank": (_treebank, "experiments measure --tables treebank --treebank FILE.conllu"),
}
"""Each measurement, and the command that prints it (or the first half of it, where two texts are measured)."""


def measure(options: MeasureConfig) -> list[str]:
    """Measure what is not measured yet, and return the names of the runs that are measured and whose weights are here.

    A file is written when its measurement is done, so that an interruption loses one measurement at most. A run whose
    weights have changed since is measured anew; one whose weights are not here keeps the files that it has. What needs
    text that is downloaded, other writers' English and other people's treebanks, is measured where it is asked for by
    its name.

    Raises:
        PositionsError: no scored run with increments of its own, or an unknown one, or an unknown measurement.
    """
    if wrong := set(options.tables) - set(MEASUREMENTS):
        raise PositionsError(f"there is no measurement {min(wrong)!r}; expected some of {', '.join(MEASUREMENTS)}.")
    runs = options.output or Path("runs/suite") / options.preset
    results = options.results or STAGED / options.preset
    scored = [path.parent for path in sorted(results.glob("*/run.json"))]
    if unknown := set(options.only) - {folder.name for folder in scored}:
        raise PositionsError(f"{results} has no scored run {min(unknown)!r}; expected one that the suite has finished.")
    chosen = [folder for folder in scored if not options.only or folder.name in options.only]
    names = [name for name in MEASUREMENTS if name in (options.tables or set(MEASUREMENTS) - set(WHERE_ASKED))]
    if not set(names) & set(OF_STATIC):
        chosen = [folder for folder in chosen if not _is_static(folder)]
    if not chosen:
        raise PositionsError(
            f"{results} has no scored run with increments to measure (those of static are all 1); expected "
            "lens-positions experiments suite before."
        )
    text, measured = Text(options.treebank), []

    # Refused here where it is not at hand, as no matter of a model.
    if "english" in names:
        text.other_english  # noqa: B018
    if "treebank" in names:
        text.treebank  # noqa: B018
    for number, folder in enumerate(chosen, 1):
        run = runs / folder.name
        if not is_finished(run):
            print_progress(f"{folder.name}: its weights are not in {run}; what was measured stays")
            continue
        of_run = [name for name in names if name in OF_STATIC or not _is_static(folder)]
        _measure(run, folder, text, of_run, f"{folder.name} ({number} of {len(chosen)})")
        measured.append(folder.name)
    return measured


def _is_static(folder: Path) -> bool:
    """Whether the increments of a scored run are all 1."""
    return bool(read_results(folder / "run.json", "variant")["variant"] == "static")


def _measure(run: Path, folder: Path, text: Text, names: list[str], title: str) -> None:
    model, weights = run / "model", weights_of(run)
    if weights != read_results(folder / "run.json", "sha256")["sha256"]:
        raise PositionsError(
            f"{run} is not the run that {folder} was scored on; expected lens-positions experiments suite again."
        )
    subject: list[Subject] = []  # loaded for the first measurement that is left

    def loaded() -> Subject:
        if not subject:
            subject.append(Subject(HookedPositionTransformer.from_pretrained(str(model)), text))
        return subject[0]

    def of_subject(measurement: Callable[[Subject], pd.DataFrame]) -> pd.DataFrame:
        return measurement(loaded())

    tables = {
        name: (partial(of_subject, measurement), f"lens-positions {command.format(model=model)}")
        for name, (measurement, command) in MEASUREMENTS.items()
        if name in names
    }
    measure_left(tables, folder, weights, title)
