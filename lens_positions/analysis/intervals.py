"""95% intervals: of a mean over independent samples, and of a mean over tokens whose documents are the samples."""

import numpy as np
from jaxtyping import Float64, Int64
from scipy import stats

BOOTSTRAP_DRAWS = 1000


def t_interval(samples: Float64[np.ndarray, " sample"]) -> tuple[float, float]:
    """Student's interval of the mean of independent samples; NaN for one sample."""
    if len(samples) < 2:
        return np.nan, np.nan
    if np.ptp(samples) == 0:
        return float(samples[0]), float(samples[0])
    interval = stats.ttest_1samp(samples, 0.0).confidence_interval(0.95)
    return float(interval.low), float(interval.high)


def resamples(documents: int, seed: int) -> Int64[np.ndarray, "draw document"]:
    """How often each document occurs in each of 1,000 resamples of whole documents."""
    chances = np.full(documents, 1 / documents)
    return np.random.default_rng(seed).multinomial(documents, chances, size=BOOTSTRAP_DRAWS)


def drawn_means(
    sums: Float64[np.ndarray, "document *shape"],
    counts: Int64[np.ndarray, " document"],
    draws: Int64[np.ndarray, "draw document"],
) -> Float64[np.ndarray, "draw *shape"]:
    """The mean of all values in each resample of documents; NaN in one that holds none."""
    drawn = (draws @ counts).astype(float)
    drawn[drawn == 0] = np.nan
    return np.tensordot(draws, sums, axes=1) / drawn.reshape(-1, *[1] * (sums.ndim - 1))


def interval_of(means: Float64[np.ndarray, "draw *shape"]) -> tuple[np.ndarray, np.ndarray]:
    """Where 95% of the resampled means lie."""
    low, high = np.nanpercentile(means, [2.5, 97.5], axis=0)
    return low, high
