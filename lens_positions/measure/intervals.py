"""95% intervals: of a mean over independent samples, and of a mean or an area under a curve over tokens whose documents
are the samples."""

import math
from collections.abc import Callable

import numpy as np
import scipy
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from ..errors import check_seed

BOOTSTRAP_DRAWS = 1000


def t_interval(samples: Float64[np.ndarray, " sample"]) -> tuple[float, float]:
    """Student's interval of the mean of independent samples; NaN for one sample."""
    if len(samples) < 2:
        return np.nan, np.nan

    # Without any spread the t statistic is a division by zero; the interval is the one value.
    if np.ptp(samples) == 0:
        return float(samples[0]), float(samples[0])
    interval = scipy.stats.ttest_1samp(samples, 0.0).confidence_interval(0.95)
    return float(interval.low), float(interval.high)


def resamples(documents: int, seed: int) -> Int64[np.ndarray, "draw document"]:
    """How often each document occurs in each of 1,000 resamples of whole documents.

    Raises:
        PositionsError: a seed that is no whole number from 0, of 63 bits.
    """
    check_seed(seed)

    # Drawing documents with replacement is a multinomial: its counts are all that a mean needs.
    chances = np.full(documents, 1 / documents)
    return np.random.default_rng(seed).multinomial(documents, chances, size=BOOTSTRAP_DRAWS)


def bootstrap_means(
    sums: Float64[np.ndarray, "document *shape"],
    counts: Int64[np.ndarray, " document"],
    draws: Int64[np.ndarray, "draw document"],
) -> Float64[np.ndarray, "draw *shape"]:
    """The mean of all values in each resample of documents; NaN in one that holds none."""
    # Each document counts as often as it was drawn, with all of its tokens.
    drawn = (draws @ counts).astype(float)
    drawn[drawn == 0] = np.nan
    return np.tensordot(draws, sums, axes=1) / drawn.reshape(-1, *[1] * (sums.ndim - 1))


def interval_of(means: Float64[np.ndarray, "draw *shape"]) -> tuple[np.ndarray, np.ndarray]:
    """Where 95% of the resampled means lie."""
    # A resample without any value has no mean and no say.
    low, high = np.nanpercentile(means, [2.5, 97.5], axis=0)
    return low, high


def shuffle_within(
    groups: Int64[np.ndarray, " sample"], seed: int, times: tuple[int, ...] = ()
) -> Int64[np.ndarray, "*times sample"]:
    """Indices that exchange samples within their groups: for every sample the one whose value it gets."""
    # `argsort(groups)` lists the places of each group together, `lexsort` lists them by group and random key: side by
    # side, each place of a group meets a random one of the same group.
    keys = np.random.default_rng(seed).random((*times, len(groups)))
    exchanged = np.empty(keys.shape, dtype=np.int64)
    exchanged[..., np.argsort(groups, kind="stable")] = np.lexsort((keys, np.broadcast_to(groups, keys.shape)))
    return exchanged


def auc_interval(
    values: Float64[np.ndarray, " sample"],
    labels: Bool[np.ndarray, " sample"],
    owners: Int64[np.ndarray, " sample"],
    draws: Int64[np.ndarray, "draw document"],
    strata: Int64[np.ndarray, " sample"] | None = None,
) -> tuple[float, float]:
    """Where 95% of the areas under the ROC curve lie over resamples of whole documents (`owners` of the samples).

    As `sklearn.metrics.roc_auc_score` with a sample weight a draw, but sorted once. With `strata`, of pairs within a
    stratum alone, as `auc_within`.
    """
    area = _area_by_weights(values, labels, np.zeros(len(values), dtype=np.int64) if strata is None else strata)
    areas = [area(draw[owners].astype(float)) for draw in draws]
    low, high = interval_of(np.array(areas)[:, None])
    return float(low[0]), float(high[0])


def auc_within(
    values: Float64[np.ndarray, " sample"], labels: Bool[np.ndarray, " sample"], strata: Int64[np.ndarray, " sample"]
) -> float:
    """The area under the ROC curve of pairs within a stratum alone: what values know beyond the stratum.

    The chance that of a true and a false sample of the same stratum the true one has the larger value, ties counted
    half, over all such pairs of all strata; NaN without any.
    """
    return _area_by_weights(values, labels, strata)(np.ones(len(values)))


def _area_by_weights(
    values: Float64[np.ndarray, " sample"], labels: Bool[np.ndarray, " sample"], strata: Int64[np.ndarray, " sample"]
) -> Callable[[Float64[np.ndarray, " sample"]], float]:
    """From the weights of samples to the area under the ROC curve within strata.

    The area is the chance that a sample with the label has a larger value than one without, ties counted half. Sorted
    once, each resample needs only its weights, summed over blocks of equal values.
    """
    order = np.lexsort((values, strata))
    values, labels, strata = values[order], labels[order], strata[order]

    # Blocks of equal values within a stratum; of each block, the first block of its stratum.
    blocks = np.flatnonzero((np.diff(values, prepend=-np.inf) != 0) | (np.diff(strata, prepend=strata[:1] - 1) != 0))
    _, first, of_block = np.unique(strata[blocks], return_index=True, return_inverse=True)

    def area(weights: Float64[np.ndarray, " sample"]) -> float:
        weights = weights[order]
        larger = np.add.reduceat(weights * labels, blocks)
        smaller = np.add.reduceat(weights * ~labels, blocks)
        pairs = np.add.reduceat(larger, first) @ np.add.reduceat(smaller, first)

        before = smaller.cumsum() - smaller  # of all strata up to here; less those of the strata before this one
        below = before - before[first][of_block] + smaller / 2
        return float(larger @ below / pairs) if pairs else np.nan

    return area


class Tally:
    """Sums of numbers over the tokens of each document."""

    def __init__(self, documents: int) -> None:
        self.sums: np.ndarray | None = None
        self.counts = np.zeros(documents, dtype=np.int64)

    def add(self, owners: list[int], values: Float[Tensor, "row token *shape"]) -> None:
        """Count the values of some rows, each row with the document that it is of."""
        # Float64: a sum over a corpus in float32 loses the digits that a paired difference lives on.
        of_rows = values.double().sum(1).cpu().numpy()
        if self.sums is None:
            self.sums = np.zeros((len(self.counts), *of_rows.shape[1:]))

        # Unbuffered, as several rows of a batch may be of one document.
        np.add.at(self.sums, owners, of_rows)
        np.add.at(self.counts, owners, values.shape[1])

    def summary(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean over tokens, and its interval."""
        assert self.sums is not None
        mean = self.sums.sum(0) / self.counts.sum()

        # One document says nothing about others.
        if np.count_nonzero(self.counts) < 2:
            return mean, np.full_like(mean, math.nan), np.full_like(mean, math.nan)
        return mean, *interval_of(bootstrap_means(self.sums, self.counts, draws))
