"""Word boundaries in Chinese, which has no spaces: do increments know them?

Between two Chinese characters there is a gap, and the gap is a boundary of words or the inside of one. `boundary_auc`
asks how well one number tells the two apart: the increment before the next character's first token, and beside it what
could fool the reader:

- the increment of layer 0, or of a shared source, knows the identity of one byte and no context, and the first byte of
  the next character alone tells something: so increments are also compared among gaps before the same token only, and
  the best that any order of these tokens could do is beside it;
- labels shuffled within each line keep a line's share of boundaries and lose which gaps they are;
- the branching entropy after the character before, from the text that a model was trained on, has seen what the model
  has (and of it the last character alone); the mutual information of the two characters has seen the next one too,
  which no increment has. Neither needs a model.

Lines are cut at characters where they are longer than the context, never within one; a piece after the first begins
with the character before it, so that every gap of a line is measured once, with the text of its piece before it.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float64, Int, Int64
from sklearn.metrics import roc_auc_score
from torch import Tensor

from ..corpora import jieba_words
from ..errors import PositionsError
from ..measure.corpus_reader import WINDOW, read_corpus
from ..measure.intervals import auc_interval, auc_within, resamples, shuffle_within
from ..measure.kinds import is_han
from ..model import HookedPositionTransformer
from ..progress import track_progress
from ..text import prompts_of
from ..tokenizer import character_spans

Association = Callable[[str, str], float]

UNSEEN = 0.5
"""The count given to a pair of characters that the training text does not have."""


BEST_ORDER = "best order of tokens"

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
        "within token" (pairs of gaps before the same token alone: what the increment knows beyond the identity of the
        token that it belongs to), "labels shuffled" (increments against labels shuffled within lines), and without a
        layer (NaN): "best order of tokens" (the largest area that any value of that token alone could have on these
        very gaps; the smallest is 1 minus it), and with `training` "branching entropy" (after the character before; not
        where an association is given) and "mutual information" (minus that of the two characters). Gaps within a token
        have no increment and are left out.

    Raises:
        PositionsError: no gap between two Chinese characters, no boundary or nothing else among them, words that do
            not spell their line, or not as many of them.

    >>> lines, words = ["中国政府今天在北京"], [["中国", "政府", "今天", "在", "北京"]]
    >>> table = lp.analysis.boundary_auc(model, lines, words)
    >>> table.loc[table["measure"] == "increment", ["layer", "auc", "n", "boundaries"]].round(2)
       layer   auc  n  boundaries
    0    0.0  0.34  8           4
    1    1.0  0.38  8           4
    2    2.0  0.31  8           4
    3    3.0  0.62  8           4
    4    4.0  0.69  8           4
    5    5.0  0.75  8           4
    """
    gaps = gaps_of(model, texts, words, prepend_bos)
    training = training if training is None or callable(training) else list(training)
    entropy = None if training is None or callable(training) else branching_entropy(training)
    return gap_areas(gaps, *gap_increments(model, gaps), training, seed, entropy=entropy)


def gap_areas(
    gaps: Gaps,
    layers: list[int],
    increments: Float64[np.ndarray, "layer gap"],
    training: Iterable[str] | Association | None = None,
    seed: int = 0,
    *,
    entropy: Callable[[str], float] | None = None,
    controls: bool = True,
) -> pd.DataFrame:
    """What `boundary_auc` returns, from what `gaps_of`, `gap_increments` and `branching_entropy` do.

    Without `controls` only "increment" and what is counted in the training text.
    """
    draws = resamples(gaps.lines, seed)
    shuffled = gaps.boundary[shuffle_within(gaps.line, seed)]
    lines = len(np.unique(gaps.line))
    rows = []
    pieces = zip(gaps.piece, gaps.token, strict=True)
    tokens = np.array([int(gaps.tokens[piece][token]) for piece, token in pieces])

    # The same bytes have the same increment, but for a rounding of 1e-7 that depends on the batch: those are ties.
    increments = np.round(increments, TIES_AT)

    def add(measure: str, layer: float, values: np.ndarray, labels: np.ndarray, strata: Any = None) -> None:
        # A line is the unit of sampling, as the words of one line depend on each other.
        low, high = auc_interval(values, labels, gaps.line, draws, strata) if lines > 1 else (math.nan, math.nan)
        auc = roc_auc_score(labels, values) if strata is None else auc_within(values, labels, strata)
        row = {"measure": measure, "layer": layer, "auc": auc, "low": low, "high": high}
        rows.append(row | {"n": len(labels), "boundaries": int(labels.sum()), "lines": lines})

    # A thousand resamples for each area take longer than the model does.
    of_layers: list[tuple[str, Any, Any]] = [("increment", gaps.boundary, None)]
    if controls:
        of_layers += [("within token", gaps.boundary, tokens), ("labels shuffled", shuffled, None)]
    parts = [(*each, i) for each in of_layers for i in range(len(layers))]
    for measure, labels, strata, i in track_progress(parts, "areas under curves", quick=len(gaps.line) < 10_000):
        add(measure, layers[i], increments[i], labels, strata)
    if controls:
        # A token's share of boundaries is the value of it that orders these gaps best.
        _, token = np.unique(tokens, return_inverse=True)
        add(BEST_ORDER, math.nan, (np.bincount(token, gaps.boundary) / np.bincount(token))[token], gaps.boundary)
    if entropy is not None:
        add("branching entropy", math.nan, np.array([entropy(before) for before, _ in gaps.pair]), gaps.boundary)
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


def branching_entropy(texts: Iterable[str]) -> Callable[[str], float]:
    """The entropy, in nats, of the character that follows a Chinese character, as counted in texts.

    Many continuations after a character say that a word may end there. Only the text before a gap is used, as a causal
    model has it. Neighbouring Chinese characters alone are counted; a character that was never seen has the entropy of
    all characters. Jin and Tanaka-Ishii, "Unsupervised segmentation of Chinese text by use of branching entropy", 2006.

    Raises:
        PositionsError: no two Chinese characters side by side.

    >>> entropy = lp.analysis.branching_entropy(["中国中国人国人"])
    >>> round(entropy("中"), 2), round(entropy("国"), 2)  # always the same next; two of three
    (0.0, 0.64)
    """
    after: dict[str, Counter[str]] = {}
    for text in texts:
        for a, b in pairwise(text):
            if is_han(a) and is_han(b):
                after.setdefault(a, Counter())[b] += 1
    if not after:
        raise PositionsError("the training text has no two Chinese characters side by side; expected Chinese text.")

    def nats(counts: Counter[str]) -> float:
        shares = np.array(list(counts.values())) / counts.total()
        return max(0.0, float(-(shares * np.log(shares)).sum()))

    known = {character: nats(counts) for character, counts in after.items()}
    of_all = nats(sum(after.values(), Counter()))
    return lambda character: known.get(character, of_all)
