"""Commands say how long they take: in their help, and before a model is loaded."""

import inspect

import pytest

from lens_positions import cli
from lens_positions.cli.app import GROUPS, STUDY, TRAINING
from lens_positions.cli.durations import DURATIONS, announce_duration
from lens_positions.progress import rough_time

COMMANDS = [name for names in GROUPS.values() for name in names if name not in TRAINING | STUDY]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_says_how_long_it_takes(command):
    help_text = " ".join((inspect.getdoc(getattr(cli, command)) or "").split())
    assert "seconds" in help_text or "minutes" in help_text


@pytest.mark.parametrize("command", sorted(DURATIONS))
def test_help_and_announcement_agree(command, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    function = getattr(cli, command)
    given = inspect.signature(function).parameters.get("characters")
    characters = 100_000 if given is None else given.default
    seconds = DURATIONS[command].seconds(characters)
    assert f"about {rough_time(seconds)}" in " ".join(inspect.getdoc(function).split())
    announce_duration(command, characters)
    assert f"{command} takes about {rough_time(seconds)} with a shipped model" in capsys.readouterr().err


def test_short_work_is_not_announced_and_neither_is_any_in_a_log(capsys, monkeypatch):
    announce_duration("kinds", 500_000)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    announce_duration("kinds", 500)
    assert capsys.readouterr().err == ""


def test_text_that_nobody_has_counted_is_announced_by_its_share(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    announce_duration("map", None)
    assert "for every 100,000 characters" in capsys.readouterr().err
