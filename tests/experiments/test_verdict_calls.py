"""The rule of all calls, on planted seeds, and the power that is stated."""

import numpy as np
import pytest

from experiments.calls import POWER, judge, judge_cost, over_seeds, seeds_needed, seen


@pytest.mark.parametrize(
    ("values", "call"),
    [
        ((0.19, 0.20, 0.21), "agrees"),  # reaches what is asked, 0.1, and lies above the smallest, 0.05
        ((0.06, 0.065, 0.07), "weaker"),
        ((-0.2, -0.21, -0.19), "contrary"),
        ((0.01, 0.0, -0.01), "absent"),
        ((0.0, 0.1, 0.2), "undecided"),
        ((0.2,), "undecided"),
    ],
)
def test_an_effect_is_called_by_its_interval_over_seeds(values, call):
    assert judge(over_seeds(values), asked=0.1, smallest=0.05) == call


@pytest.mark.parametrize(
    ("costs", "call"),
    [
        ([(-0.01, -0.011, -0.012), (0.0, 0.001, 0.002)], "agrees"),  # a gain is no cost
        ([(0.0, 0.001, 0.002), (0.02, 0.021, 0.022)], "contrary"),  # one cost is enough
        ([(0.0, 0.001, 0.002), (-0.02, 0.0, 0.02)], "undecided"),
        ([(0.0,)], "undecided"),
        ([], "untested"),
    ],
)
def test_a_cost_is_called_by_all_of_its_intervals(costs, call):
    assert judge_cost([over_seeds(values) for values in costs], limit=0.01) == call


def test_an_interval_ends_where_numbers_can_lie():
    found = over_seeds((0.9, 0.95, 1.0), (-1, 1))
    assert found.high == 1
    assert found.low == pytest.approx(over_seeds((0.9, 0.95, 1.0)).low)


@pytest.mark.slow
def test_an_effect_as_large_as_the_stated_power_is_told_four_times_in_five():
    """The spread of seeds is known here, so that the formula is that of the noncentral t up to its approximation."""
    rng = np.random.default_rng(0)
    spread = np.array([-1.0, 0.0, 1.0])
    effect = seen(over_seeds(tuple(spread)), smallest=0.5)
    samples = rng.normal(effect, 1.0, (4000, 3))
    told = [over_seeds(tuple(row)).low > 0.5 for row in samples]
    assert POWER - 0.12 < np.mean(told) < POWER + 0.12


def test_as_many_seeds_as_are_said_to_be_needed_decide():
    """Seeds with exactly the mean and the spread of three: one fewer than said leaves it undecided."""
    three = over_seeds((0.08, 0.14, 0.09))
    assert judge(three, 0.09, 0.05) == "undecided"
    needed = seeds_needed(three, 0.05)

    def like(n):
        values = np.resize([-1.0, 1.0], n) if n % 2 == 0 else np.append(np.resize([-1.0, 1.0], n - 1), 0.0)
        return over_seeds(tuple(three.mean + values / values.std(ddof=1) * np.std(three.values, ddof=1)))

    assert judge(like(needed), 0.09, 0.05) == "agrees"
    assert judge(like(needed - 1), 0.09, 0.05) == "undecided"
    assert seeds_needed(over_seeds((0.0499, 0.0501, 0.0500)), 0.05) is None
