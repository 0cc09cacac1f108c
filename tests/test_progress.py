"""How long work will take is said beforehand, once, to those who asked, and only where it is long."""

import pytest

from lens_positions import progress


class Clock:
    """A clock that goes on by so many seconds with each piece of work."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "perf_counter", clock)
    return clock


def work(clock: Clock, parts: int, seconds: float, what: str = "sweeping") -> list[int]:
    done = []
    for part in progress.track_progress(range(parts), what, quick=True):
        clock.now += seconds
        done.append(part)
    return done


def test_the_time_left_is_said_once_after_the_first_part(clock):
    said = []
    with progress.say_durations(said.append):
        assert work(clock, 25, 5.0) == list(range(25))
    assert said == ["about 2 minutes on this machine: sweeping, 24 of 25 parts left"]


def test_a_short_first_part_is_not_enough_to_go_by(clock):
    said = []
    with progress.say_durations(said.append):
        work(clock, 401, 0.1)
    (sentence,) = said
    left = int(sentence.split(", ")[1].split()[0])
    assert 385 <= left <= 392  # a second of work was done by then
    assert sentence.startswith("about 40 seconds on this machine: sweeping")


def test_short_work_says_nothing(clock):
    said = []
    with progress.say_durations(said.append):
        work(clock, 5, 2.0)
        work(clock, 1, 100.0)  # nothing is left when it can be told
    assert said == []


def test_nobody_is_told_who_has_not_asked(clock, capsys):
    work(clock, 25, 5.0)
    assert capsys.readouterr() == ("", "")


def test_the_first_of_several_passes_speaks_for_all(clock):
    said = []
    with progress.say_durations(said.append), progress.several_passes(3):
        for _ in range(3):
            work(clock, 10, 60.0)
    assert said == ["about 29 minutes on this machine: sweeping, 9 of 10 parts left, 3 times"]


def test_times_are_rough():
    rough = [progress.rough_time(seconds) for seconds in (3, 42, 89, 95, 130, 3600, 5400, 9000)]
    assert rough == [
        "10 seconds", "40 seconds", "90 seconds", "2 minutes", "2 minutes", "60 minutes", "1.5 hours", "2.5 hours",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_command_says_it_on_standard_error(clock, monkeypatch, capsys):
    """Through the command itself: a model that takes a minute for each batch."""
    import lens_positions as lp
    from lens_positions.cli import main

    def slow(model, texts, **_options):
        work(clock, 3, 60.0, "reading")
        raise lp.errors.PositionsError("that is all; expected no more.")

    monkeypatch.setattr(lp.analysis, "increments_by_category", slow)
    assert main(["kinds", "bilingual-per-layer", "--corpus", __file__]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    during, *_ = err.splitlines()  # to a file: in a terminal another line comes before the model is loaded
    assert during == "lens-positions: about 2 minutes on this machine: reading, 2 of 3 parts left"
