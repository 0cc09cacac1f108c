"""Six words for what came of a claim, and one rule for all of them: an interval against two sizes.

The unit is the seed: a model trained anew. Each claim gives one number a seed, signed so that what was reported is
above 0, and Student's 95% interval of its mean over seeds is held against

- the **smallest** size that would count as anything, and
- the size that was **asked**, usually half of the reported one.

`judge` and `judge_cost` are the rules; RULES says them in words, as RESULTS.md prints them. `seen` is the power of a
call: what an effect would have had to be to be told from the smallest size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from lens_positions.measure.intervals import t_interval

Call = Literal["agrees", "weaker", "contrary", "absent", "undecided", "untested", "new"]

RULES: dict[str, str] = {
    "agrees": "the interval lies above the smallest size that counts and reaches the size asked; of a cost, it ends at "
    "or below the limit.",
    "weaker": "it lies above the smallest size, but ends below the size asked.",
    "contrary": "it lies wholly on the other side: below minus the smallest size; of a cost, above the limit.",
    "absent": "it lies wholly within the smallest size on either side, so that an effect that counts is excluded.",
    "undecided": "none of these: the interval is too wide, or there are fewer than two seeds.",
    "untested": "nothing was measured that could tell.",
}
"""What each word means. Where nothing was reported there is nothing to agree with: that is new, without a call."""

POWER = 0.8
"""How often an effect of the size that `seen` gives would have been told."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, with Student's 95% interval.

    Attributes:
        values: one of each seed.
        mean, low, high: of their mean; the ends are NaN for one seed.
    """

    values: tuple[float, ...]
    mean: float
    low: float
    high: float

    @property
    def n(self) -> int:
        """The number of seeds."""
        return len(self.values)

    def text(self, form: str) -> str:
        """Mean and interval, such as "+0.1 (+0.0 to +0.2)"; without an interval "one seed"."""
        ends = "one seed" if np.isnan(self.low) else f"{self.low:{form}} to {self.high:{form}}"
        return f"{self.mean:{form}} ({ends})"


def over_seeds(values: Sequence[float], bounds: tuple[float, float] = (-np.inf, np.inf)) -> Estimate:
    """The mean of one number a seed; its interval ends where the numbers themselves can lie.

    Raises:
        ValueError: no seed.

    >>> over_seeds([0.1, 0.2, 0.3]).text(".2f")
    '0.20 (-0.05 to 0.45)'
    """
    if not values:
        raise ValueError("there is no seed; expected at least one value.")
    low, high = np.clip(t_interval(np.array(values, dtype=float)), *bounds)
    return Estimate(tuple(values), float(np.mean(values)), float(low), float(high))


def judge(found: Estimate, asked: float, smallest: float) -> Call:
    """The call on an effect, signed so that the reported one is above 0.

    >>> judge(over_seeds([0.10, 0.11, 0.12]), asked=0.09, smallest=0.05)
    'agrees'
    >>> judge(over_seeds([-0.01, 0.0, 0.01]), asked=0.09, smallest=0.05)
    'absent'
    """
    if found.n < 2:
        return "undecided"
    if found.low > smallest:
        return "agrees" if found.high >= asked else "weaker"
    if found.high < -smallest:
        return "contrary"
    return "absent" if found.low >= -smallest and found.high <= smallest else "undecided"


def judge_cost(found: Sequence[Estimate], limit: float) -> Call:
    """The call on "costs nothing", over all costs that it is about; a gain is no cost.

    >>> judge_cost([over_seeds([0.001, 0.002, 0.003])], limit=0.01)
    'agrees'
    """
    if not found:
        return "untested"
    if any(each.n >= 2 and each.low > limit for each in found):
        return "contrary"
    return "agrees" if all(each.n >= 2 and each.high <= limit for each in found) else "undecided"


def seen(found: Estimate, smallest: float) -> float:
    """The smallest effect that would have had its whole interval above `smallest` four times in five.

    smallest + (t of 0.975 + t of 0.8) * the standard error over these seeds; NaN for one seed.
    """
    if found.n < 2:
        return float("nan")
    error = float(np.std(found.values, ddof=1)) / found.n**0.5
    quantiles: Any = stats.t.ppf([0.975, POWER], found.n - 1)  # type: ignore[attr-defined]
    return smallest + float(quantiles.sum()) * error


def seeds_needed(found: Estimate, smallest: float, most: int = 100) -> int | None:
    """How many seeds would decide, if their mean and spread stayed as they are: the whole interval on one side of, or
    within, the smallest size; None where more than `most` would be needed.

    >>> seeds_needed(over_seeds([0.08, 0.14, 0.09]), smallest=0.05)
    4
    """
    spread = float(np.std(found.values, ddof=1)) if found.n > 1 else float("nan")
    for n in range(2, most + 1):
        quantile: Any = stats.t.ppf(0.975, n - 1)  # type: ignore[attr-defined]
        reach = float(quantile) * spread / n**0.5
        low, high = abs(found.mean) - reach, abs(found.mean) + reach
        if low > smallest or (low >= -smallest and high <= smallest):
            return n
    return None
