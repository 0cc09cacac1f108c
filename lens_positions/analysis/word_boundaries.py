"""Word boundaries in Chinese, which has no spaces: do increments know them?

Between two Chinese characters there is a gap, and the gap is a boundary of words or the inside of one. `boundary_auc`
asks how well one number tells the two apart: the increment before the next character's first token, and beside it what
could fool the reader:

- the increment of layer 0, or of a shared source, knows the identity of one byte and no context;
- labels shuffled within each line keep a line's share of boundaries and lose which gaps they are;
- the mutual information of the two characters, from the text that a model was trained on, needs no model at all.

Lines are cut at characters where they are longer than the context, never within one; a piece after the first begins
with the character before it, so that every gap of a line is measured once, with the text of its piece before it.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float64, Int, Int64
from sklearn.metrics import roc_auc_score
from torch import Tensor

from ..corpora import jieba_words
from ..errors import PositionsError
from ..measure.corpus_reader import WINDOW, read_corpus
from ..measure.intervals import auc_interval, resamples, shuffle_within
from ..measure.kinds import is_han
from ..model import HookedPositionTransformer
from ..progress import track_progress
from ..text import prompts_of
from ..tokenizer import character_spans

Association = Callable[[str, str], float]

UNSEEN = 0.5
"""The count given to a pair of characters that the training text does not have."""


TIES_AT = 5
"""Decimals of a position within which two increments count as equal."""


@dataclass(frozen=True)
class Gaps:
    """The gaps between two Chinese characters of some lines, in order.

    Attributes:
        lines: how many lines there are, those without a gap included.
        line: the line that each gap is in.
        boundary: whether words meet there.
        pair: the characters on both sides.
        piece: which piece of `tokens` it is measured in.
        token: the index there of the next character's first token.
        tokens: the tokens of each piece, with what the tokenizer puts in front of a text in the first of each line.
    """

    lines: int
    line: Int64[np.ndarray, " gap"]
    boundary: Bool[np.ndarray, " gap"]
    pair: list[tuple[str, str]]
    piece: Int64[np.ndarray, " gap"]
    token: Int64[np.ndarray, " gap"]
    tokens: list[Int[Tensor, " _pos"]]


def boundary_auc(
    model: HookedPositionTransformer,
    texts: str | Sequence[str],
    words: Sequence[Sequence[str]] | Literal["jieba"],
    training: Iterable[str] | Association | None = None,
    seed: int = 0,
    *,
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """How well increments tell a word boundary from the inside of a word, between two Chinese characters, by layer.

    Args:
        model: the model; increments per head are averaged over the heads.
        texts: lines of text; a line is the unit of sampling.
        words: the words of each line, which must spell it, or "jieba" to let jieba find them.
        training: text that the model was trained on, for the mutual information of characters, or what
            `mutual_information` made of it.
        seed: of the shuffled labels and of the intervals.
        prepend_bos: as for `analysis.read_corpus`.

    Returns:
        One row for each `measure` and `layer`: `auc`, the area under the ROC curve (the chance that a boundary has the
        larger value of the two; 0.5 tells nothing), `low` to `high`, where it lies in 95% of 1,000 resamples of whole
        lines (NaN for one line), `n` gaps, of which `boundaries`, and `lines` with a gap. The measures are "increment",
        "labels shuffled" (increments against labels shuffled within lines) and, with `training`, "mutual information"
        (minus that of the two characters), which has no layer (NaN). Gaps within a token have no increment and are left
        out.

    Raises:
        PositionsError: no gap between two Chinese characters, no boundary or nothing else among them, words that do
            not spell their line, or not as many of them.

    >>> lines, words = ["中国政府今天在北京"], [["中国", "政府", "今天", "在", "北京"]]
    >>> table = lp.analysis.boundary_auc(model, lines, words)
    >>> table.loc[table["measure"] == "increment", ["layer", "auc", "n", "boundaries"]].round(2)
       layer   auc  n  boundaries
    0      0  0.59  8           4
    1      1  0.19  8           4
    2      2  0.38  8           4
    3      3  0.88  8           4
    4      4  0.62  8           4
    5      5  0.31  8           4
    """
    gaps = gaps_of(model, texts, words, prepend_bos)
    return gap_areas(gaps, *gap_increments(model, gaps), training, seed)


def gap_areas(
    gaps: Gaps,
    layers: list[int],
    increments: Float64[np.ndarray, "layer gap"],
    training: Iterable[str] | Association | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Compute the table of `boundary_auc` from gaps and their increments."""
    draws = resamples(gaps.lines, seed)
    shuffled = gaps.boundary[shuffle_within(gaps.line, seed)]
    lines = len(np.unique(gaps.line))
    rows = []

    # The same bytes have the same increment, but for a rounding of 1e-7 that depends on the batch: those are ties.
    increments = np.round(increments, TIES_AT)

    def add(measure: str, layer: float, values: np.ndarray, labels: np.ndarray) -> None:
        # A line is the unit of sampling, as the words of one line depend on each other.
        low, high = auc_interval(values, labels, gaps.line, draws) if lines > 1 else (math.nan, math.nan)
        row = {"measure": measure, "layer": layer, "auc": roc_auc_score(labels, values), "low": low, "high": high}
        rows.append(row | {"n": len(labels), "boundaries": int(labels.sum()), "lines": lines})

    # A thousand resamples for each area take longer than the model does.
    of_layers = [("increment", gaps.boundary), ("labels shuffled", shuffled)]
    parts = [(measure, labels, i) for measure, labels in of_layers for i in range(len(layers))]
    for measure, labels, i in track_progress(parts, "areas under curves", quick=len(gaps.line) < 10_000):
        add(measure, layers[i], increments[i], labels)
    if training is not None:
        association = training if callable(training) else mutual_information(training)
        add("mutual information", math.nan, -np.array([association(*pair) for pair in gaps.pair]), gaps.boundary)
    return pd.DataFrame(rows)


def gap_increments(model: HookedPositionTransformer, gaps: Gaps) -> tuple[list[int], Float64[np.ndarray, "layer gap"]]:
    """The model's own number of each layer, and the increment of each gap there, heads averaged."""
    corpus = read_corpus(model, gaps.tokens)
    # With gap "before" a token's increment is the distance to the token before it; with "after", to the next one.
    token = gaps.token if model.position_config.gap == "before" else gaps.token - 1
    return corpus.layers, corpus.at(gaps.piece, token).mean(axis=1)


def gaps_of(
    model: HookedPositionTransformer,
    texts: str | Sequence[str],
    words: Sequence[Sequence[str]] | Literal["jieba"],
    prepend_bos: bool | None = None,
) -> Gaps:
    """The gaps between two Chinese characters of each line that fall between two tokens; errors as `boundary_auc`."""
    texts = [texts] if isinstance(texts, str) else texts
    if not len(texts) or not all(isinstance(text, str) for text in texts):
        raise PositionsError(f"texts is {texts!r:.40}; expected a list of lines, as text.")
    words = jieba_words(texts) if isinstance(words, str) else words
    if len(words) != len(texts):
        raise PositionsError(f"there are {len(texts)} lines and words for {len(words)}; expected as many.")
    found: list[tuple[int, bool, tuple[str, str], int, int]] = []
    pieces: list[Int[Tensor, " _pos"]] = []
    for number, (text, of_line) in enumerate(zip(texts, words, strict=True)):
        # A word list of another text would put every boundary in the wrong place, and give an area near one half.
        spelled = "".join(of_line)
        if spelled != text:
            raise PositionsError(f"the words of line {number} spell {spelled!r:.40}; expected its text, {text!r:.40}.")
        if not text:
            continue

        # Words end after so many characters of the line.
        ends = set(np.cumsum([len(word) for word in of_line]).tolist())
        spans = character_spans(model.tokenizer, text)
        for start, stop, tokens, offset in _pieces(model, text, spans, prepend_bos):
            for i in range(start + 1, stop):
                # Two characters in one token have no increment between them.
                if is_han(text[i - 1]) and is_han(text[i]) and spans[i][0] >= spans[i - 1][1]:
                    found.append((number, i in ends, (text[i - 1], text[i]), len(pieces), spans[i][0] - offset))
            pieces.append(tokens)
    if not found:
        raise PositionsError(
            f"the {len(texts)} lines have no two Chinese characters side by side, in tokens of their own; expected "
            "Chinese text."
        )
    line, boundary, pair, piece, token = zip(*found, strict=True)

    # An area under a curve needs both kinds.
    boundaries = sum(boundary)
    if boundaries in (0, len(boundary)):
        raise PositionsError(
            f"{boundaries} of {len(boundary)} gaps between Chinese characters are word boundaries; expected some that "
            "are and some that are not."
        )
    return Gaps(len(texts), np.array(line), np.array(boundary), list(pair), np.array(piece), np.array(token), pieces)


def _pieces(
    model: HookedPositionTransformer, text: str, spans: list[tuple[int, int]], prepend_bos: bool | None
) -> Iterable[tuple[int, int, Int[Tensor, " _pos"], int]]:
    """A line in pieces that fit the context: the characters from start to stop, their tokens, the offset of these."""
    (tokens,) = prompts_of(model, text, None, prepend_bos, whole=True)
    in_front = len(tokens) - spans[-1][1]  # what the tokenizer puts before a text
    longest = min(model.cfg.n_ctx, WINDOW)
    start = 0
    while start < len(text):
        first = 0 if start == 0 else spans[start][0] + in_front
        stop = start + 1

        # As many whole characters as fit; a character is never cut.
        while stop < len(text) and spans[stop][1] + in_front - first <= longest:
            stop += 1
        yield start, stop, tokens[first : spans[stop - 1][1] + in_front], first - in_front
        if stop == len(text):
            return

        # The last character again, so that the gap between two pieces is in one of them.
        start = max(stop - 1, start + 1)


def mutual_information(texts: Iterable[str]) -> Association:
    """Pointwise mutual information, in nats, of two Chinese characters side by side, as counted in texts.

    log n(ab) N / (n(a_) n(_b)), over all N pairs of neighbouring Chinese characters; a pair that was never seen counts
    as half of one, and a character that was never seen as the rarest that was. Church and Hanks, "Word association
    norms, mutual information, and lexicography", 1990.

    Raises:
        PositionsError: no two Chinese characters side by side.

    >>> information = lp.analysis.mutual_information(["中国中国人国人"])
    >>> round(information("中", "国"), 2)  # log 2
    0.69
    """
    pairs = Counter(pair for text in texts for pair in pairwise(text) if is_han(pair[0]) and is_han(pair[1]))
    total = pairs.total()
    if not total:
        raise PositionsError("the training text has no two Chinese characters side by side; expected Chinese text.")

    # How often a character stands first, and second: the margins of the table of pairs.
    left, right = Counter[str](), Counter[str]()
    for (a, b), count in pairs.items():
        left[a] += count
        right[b] += count

    def association(a: str, b: str) -> float:
        return math.log((pairs[a, b] or UNSEEN) * total / ((left[a] or 1) * (right[b] or 1)))

    return association
