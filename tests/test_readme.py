"""What the README says can be run, can be run."""

import inspect
import re
import shlex
from pathlib import Path

import pytest
import tyro
from conftest import SMOLLM2

from experiments.options import (
    GatherConfig,
    MachineryConfig,
    MaximumConfig,
    MeasureConfig,
    ResultsConfig,
    ShipConfig,
    SuiteConfig,
)
from lens_positions import checkpoint as pretrained
from lens_positions import cli
from lens_positions.training.__main__ import parse, parse_graft
from lens_positions.training.options import CorpusConfig, PackConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
MEASUREMENTS = (ROOT / "docs" / "measurements.md").read_text("utf-8")
COMMAND = {name: getattr(cli, name) for name in cli.__all__ if name not in ("app", "main")}
COMMANDS = [
    line.strip().split("  #")[0].strip()
    for line in (README + MEASUREMENTS).splitlines()
    if re.match(r"    (make|python|lens-pos)", line)
]


def test_python_snippets_run_in_order(tmp_path, monkeypatch, smollm2):
    """By its name SmolLM2 is loaded in `test_smollm2`; here the name leads to the same weights in a quicker format."""
    package, _, hub = pretrained.PACKAGED[SMOLLM2]
    monkeypatch.setitem(pretrained.PACKAGED, SMOLLM2, (package, str(smollm2), hub))
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) >= 2
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    increments, logits, stretched = names["increments"], names["logits"], names["stretched"]
    assert increments.shape[:2] == (6, 1)
    assert (logits[:, :3] == stretched[:, :3]).all()
    assert (logits[:, 3:] != stretched[:, 3:]).any()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(command):
    assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.startswith("lens-positions train") and "--resume" not in c]
)
def test_training_commands_parse(command):
    config, own = parse(shlex.split(command)[2:])
    assert config.steps > 0
    assert own.output is not None


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("lens-positions graft")])
def test_graft_commands_parse(command):
    config, own = parse_graft(shlex.split(command)[2:])
    assert config.steps > 0
    assert own.output is not None


ASKED = {
    "experiments suite": SuiteConfig,
    "experiments measure": MeasureConfig,
    "experiments gather": GatherConfig,
    "experiments results": ResultsConfig,
    "experiments ship": ShipConfig,
    "experiments rope": MachineryConfig,
    "experiments maximum": MaximumConfig,
    "pack": PackConfig,
    "corpus": CorpusConfig,
}


def name_of(command):
    """The command, by its one or two words."""
    words = shlex.split(command)[1:]
    return " ".join(words[:2]) if words[0] == "experiments" else words[0]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("lens-positions ") and name_of(c) in ASKED])
def test_commands_of_the_study_parse(command):
    words = shlex.split(command)[1 + len(name_of(command).split()) :]
    assert tyro.cli(ASKED[name_of(command)], args=words) is not None


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("lens-positions ") and name_of(c) in COMMAND])
def test_lens_positions_commands_have_the_options_they_use(command):
    name, *words = shlex.split(command)[1:]
    known = inspect.signature(COMMAND[name]).parameters
    words = ["--output" if word == "-o" else word for word in words]
    assert all(word.removeprefix("--").replace("-", "_") in known for word in words if word.startswith("--"))


def test_benchmarks_are_there():
    scripts = re.findall(r"benchmarks/\w+\.(?:py|json)", README + MEASUREMENTS)
    assert len(set(scripts)) >= 6
    assert all((ROOT / script).is_file() for script in scripts)


def test_linked_files_are_there():
    for folder, text in ((ROOT, README), (ROOT / "docs", MEASUREMENTS)):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (folder / target).is_file(), target
