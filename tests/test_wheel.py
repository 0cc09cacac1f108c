"""The wheel, installed where the repository is not: it holds the package alone, and its command works from there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
NOT_COPIED = (".*", "*.egg-info", "build", "docs", "demo-output", "runs", "__pycache__")

# The commands in one process, since imports are most of what they take. What leads to a checkout goes from the paths.
COMMANDS = """
import contextlib, importlib.util, io, json, sys
from pathlib import Path

checkout, lines = Path(sys.argv[1]), json.loads(sys.argv[2])
sys.path[:] = [path for path in sys.path if Path(path).resolve() != checkout]
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]

import lens_positions
from lens_positions.cli import main

ended = []
for line in lines:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            status = main(line)
        except SystemExit as left:
            status = left.code
    ended.append([status, out.getvalue(), error.getvalue()])
found = [name for name in ("training", "experiments") if importlib.util.find_spec(name)]
print("\\n" + json.dumps({"file": lens_positions.__file__, "found": found, "ended": ended}))
"""
SMALL = ["--steps=3", "--batch-size=2", "--warmup-steps=1", "--eval-every=3", "--eval-windows=4", "--save-every=3"]
MODEL = ["--model.d-model=16", "--model.n-layers=1", "--model.n-heads=2", "--model.n-ctx=16"]
LINES = {
    "help": ["--help"],
    "show": ["show", "bilingual-per-layer", "The cat sat."],
    "report": ["report", "bilingual-per-layer", "--text", "The cat.", "--corpus", "texts", "--output", "report.html"],
    "train": ["train", "--corpus", "texts", *MODEL, *SMALL, "--cache", "cache", "--output", "run"],
    "show what was trained": ["show", "run/model", "The cat sat."],
    "graft": [
        "graft",
        "--base=bilingual-rope",
        "--n-ctx=16",
        "--corpus=texts",
        *SMALL,
        "--cache=cache",
        "--output=graft",
    ],
    "experiments": ["experiments", "suite"],
}


def pip(*words: str | Path) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "--quiet", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the wheel in it, built from a copy so that the repository stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NOT_COPIED), symlinks=True)
    pip("wheel", folder / "source", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "built")
    (wheel,) = (folder / "built").iterdir()
    pip("install", "--no-deps", "--no-index", "--target", folder / "site", wheel)
    shutil.rmtree(folder / "source")
    return folder / "site"


@pytest.fixture(scope="module")
def ended(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """How each of LINES ended in an empty folder: its exit status, standard output and standard error; and the rest."""
    place = tmp_path_factory.mktemp("place")
    (place / "texts").mkdir()
    for i in range(20):
        (place / "texts" / f"{i:02}.txt").write_text(
            f"Document {i}. The cat sat on mat {i * i}, and the dog saw it.\n" * 8
        )
    given = {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    words = [sys.executable, "-c", COMMANDS, str(ROOT), json.dumps(list(LINES.values()))]
    done = subprocess.run(words, cwd=place, env=os.environ | given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    return said | {"place": place, "ended": dict(zip(LINES, said["ended"], strict=True))}


def test_it_holds_the_package_its_metadata_and_its_command_and_nothing_else(installed: Path) -> None:
    names = {path.name.split("-")[0] + path.suffix for path in installed.iterdir()}
    assert names == {"lens_positions", "lens_positions.dist-info", "bin"}
    assert [path.name for path in (installed / "bin").iterdir()] == ["lens-positions"]
    assert not list(installed.rglob("test_*"))
    assert len(list((installed / "lens_positions" / "checkpoints").glob("*/model.safetensors"))) == 3


def test_it_is_the_wheel_that_ran_and_the_repository_was_out_of_reach(installed: Path, ended: dict[str, Any]) -> None:
    assert Path(ended["file"]) == installed / "lens_positions" / "__init__.py"
    assert ended["found"] == []


@pytest.mark.parametrize("name", [name for name in LINES if name != "experiments"])
def test_a_command_works_from_the_wheel(ended: dict[str, Any], name: str) -> None:
    status, out, error = ended["ended"][name]
    assert status == 0, error
    assert "Traceback" not in out + error


def test_the_commands_did_what_they_are_for(ended: dict[str, Any]) -> None:
    place, said = ended["place"], ended["ended"]
    assert "usage: lens-positions" in said["help"][1]
    assert "layer 0" in said["show"][1]
    assert (place / "report.html").read_text("utf-8").startswith("<!doctype html>")
    assert (place / "run" / "model" / "model.safetensors").is_file()
    assert (place / "graft" / "graft" / "model" / "positions.safetensors").is_file()


def test_the_study_is_said_to_be_elsewhere_in_one_sentence(ended: dict[str, Any]) -> None:
    status, out, error = ended["ended"]["experiments"]
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert "the experiments are not here; expected a checkout of the lens-positions repository" in error
