"""What is wrong with the files or the numbers that training is given ends in one sentence, and changes nothing.

Every variant runs the command in this process: the exit status is 2, standard error has one line and no traceback, and
whatever was on the disk is there to the byte afterwards.
"""

import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from experiments.tables import read_tables
from lens_positions import PositionConfig, PositionModelConfig, PositionsError
from lens_positions.training import config, data, loop
from lens_positions.training.checkpoints import newest_checkpoint
from lens_positions.training.commands import main
from lens_positions.training.config import TrainConfig, load_preset, to_json, update_config
from lens_positions.training.loop import train
from lens_positions.training.schema import RunResults, read_json

ROOT = Path(__file__).parents[2]
DEEP = b"[" * 100_000
RAW = {
    "empty": b"",
    "a cut line": b'{"step": 12, "con',
    "null": b"null",
    "a list": b"[1, 2]",
    "a number": b"3",
    "no UTF-8": b"\xff\xfe\x00{}",
    "zeros": bytes(64),
    "deep nesting": DEEP,
    "deep objects": b'{"config": ' + b'{"a": ' * 50_000,
    "thousands of digits": b'{"step": ' + b"1" * 6000 + b"}",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(20):
        (folder / f"{i:02}.txt").write_text(f"Document {i}. The cat sat on mat {i * i}; 中国 has {i} cities.\n" * 8)
    return folder


@pytest.fixture(scope="module")
def config_of(corpus):
    model = PositionModelConfig(d_model=16, n_layers=1, n_heads=2, n_ctx=16, positions=PositionConfig(hidden=4))
    sizes = {"steps": 12, "batch_size": 2, "warmup_steps": 2, "eval_every": 6, "eval_windows": 4, "save_every": 4}
    return TrainConfig(model=model, corpus=str(corpus), **sizes)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def stopped(config_of, cache, tmp_path_factory):
    """A run of twelve steps that was interrupted at the eighth, when it had saved."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    save, saved = loop.Run._save, []

    def interrupted(self):
        save(self)
        saved.append(self.step)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop.Run, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config_of, folder, cache_dir=cache)
    assert newest_checkpoint(folder).name == "step-00000008"
    return folder


@pytest.fixture
def run(stopped, tmp_path):
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def on_disk(folder: Path) -> dict[str, bytes | None]:
    """Every file with its content, and every folder."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def ended(arguments: list[str]) -> int | None:
    """The exit status; tyro leaves by SystemExit where it has printed its own complaint."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as left:
        return left.code


def refused(arguments: list[Any], folder: Path, capsys: Any) -> str:
    """The one line that a command is refused in; nothing in a folder has changed."""
    before = on_disk(folder)
    capsys.readouterr()
    status = ended(arguments)
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (2, 1), error
    assert error.startswith("lens-positions: ")
    assert "Traceback" not in error
    assert len(error) < 600
    assert on_disk(folder) == before
    return error


def edited(path: Path, *keys: Any, to: Any = None, without: bool = False) -> None:
    """Change a value of a JSON file, or leave it out."""
    whole = json.loads(path.read_text())
    inside = whole
    for key in keys[:-1]:
        inside = inside[key]
    if without:
        del inside[keys[-1]]
    else:
        inside[keys[-1]] = to
    path.write_text(json.dumps(whole))


def edit(*keys: Any, to: Any = None, without: bool = False) -> Callable[[Path], None]:
    return lambda path: edited(path, *keys, to=to, without=without)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_dead_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def raw(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


RAW_DAMAGES = {name: raw(content) for name, content in RAW.items()} | {"a folder": a_folder}

STATE = {
    "missing": lambda path: path.unlink(),
    "a dead link": a_dead_link,
    **{f"step {value!r}": edit("step", to=value) for value in (-1, 0, True, "8", 8.0, None, 4, 12, 10**30, [8], 1e400)},
    **{f"no {key}": edit(key, without=True) for key in ("step", "run", "files", "schedule", "param_groups", "format")},
    "an unknown field": edit("more", to=1),
    "a newer format": edit("format", to=2),
    "format true": edit("format", to=True),
    **{f"schedule {value!r}": edit("schedule", to=value) for value in (5, {}, None, [])},
    "another epoch": edit("schedule", "last_epoch", to=0),
    "another rate": edit("schedule", "_last_lr", 0, to=1.0),
    "a rate that is NaN": edit("schedule", "_last_lr", 0, to=float("nan")),
    **{f"groups {value!r}": edit("param_groups", to=value) for value in ("x", [], {}, None, [5])},
    "another decay": edit("param_groups", 0, "weight_decay", to=0.5),
    "text as a rate": edit("param_groups", 0, "lr", to="high"),
    "true as a rate": edit("param_groups", 0, "lr", to=True),
    "no parameters": edit("param_groups", 0, "params", to=[]),
    "another run": edit("run", to="0" * 64),
    "no digest": edit("run", to="abc"),
    "no files": edit("files", to={}),
    "another digest": edit("files", "optimizer.safetensors", to="0" * 64),
    "one file less": edit("files", "optimizer.safetensors", without=True),
    "a file elsewhere": edit("files", "../../training.json", to="0" * 64),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("damage", [*STATE.values(), *RAW_DAMAGES.values()], ids=[*STATE, *RAW_DAMAGES])
def test_a_wrong_state_is_refused_before_anything_is_written(run, cache, capsys, damage):
    path = newest_checkpoint(run) / "state.json"
    damage(path)
    said = refused(["train", "--resume", run, "--cache", cache], run.parent, capsys)
    assert "step-00000008" in said or "training.json was changed" in said


def in_config(*keys: str, to: Any) -> Callable[[Path], None]:
    return edit("config", *keys, to=to)


DESCRIPTION = {
    **{f"steps {value!r}": in_config("steps", to=value) for value in ("12", True, -1, 0, 12.0, None, 10**30, [12])},
    **{
        f"{name} {value!r}": in_config(name, to=value)
        for name in ("learning_rate", "weight_decay", "clip")
        for value in (float("nan"), float("inf"), -1.0, "high", True, None, 10**400)
    },
    **{f"{name} -1": in_config(name, to=-1) for name in ("batch_size", "warmup_steps", "seed", "max_bytes")},
    "more steps": in_config("steps", to=13),
    "another seed": in_config("seed", to=1),
    "another rate": in_config("learning_rate", to=0.5),
    "another width": in_config("model", "d_model", to=32),
    "text as a model": in_config("model", to="large"),
    "no model": in_config("model", to=None),
    "true as a width": in_config("model", "d_model", to=True),
    "a huge width": in_config("model", "d_model", to=10**12),
    "another source": in_config("model", "positions", "source", to="magic"),
    "hidden true": in_config("model", "positions", "hidden", to=True),
    "max_increment NaN": in_config("model", "positions", "max_increment", to=float("nan")),
    "number as a corpus": in_config("corpus", to=3),
    "text as trackers": in_config("trackers", to="wandb"),
    "numbers as trackers": in_config("trackers", to=[1]),
    "number as a path": in_config("frozen_from", to=7),
    "a path with a zero": in_config("frozen_from", to="a\0b"),
    "precision": in_config("precision", to="float8"),
    "compile 1": in_config("compile", to=1),
    "an unknown field": in_config("learning_speed", to=1),
    "list as a configuration": edit("config", to=[1]),
    "no configuration": edit("config", without=True),
    "no fingerprint": edit("corpus_fingerprint", without=True),
    "number as a fingerprint": edit("corpus_fingerprint", to=5),
    "another fingerprint": edit("corpus_fingerprint", to="0" * 16),
    "another field": edit("more", to=1),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("damage", [*DESCRIPTION.values(), *RAW_DAMAGES.values()], ids=[*DESCRIPTION, *RAW_DAMAGES])
def test_a_wrong_description_is_refused_before_anything_is_written(run, cache, capsys, damage):
    damage(run / "training.json")
    assert "training.json" in refused(["train", "--resume", run, "--cache", cache], run.parent, capsys)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def without_moments(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if not name.startswith("0.")}, path)


CHECKPOINT = {
    "empty optimizer": ("optimizer.safetensors", raw(b"")),
    "an optimizer of nothing": ("optimizer.safetensors", lambda path: save_file({}, path)),
    "moments missing": ("optimizer.safetensors", without_moments),
    "a bit of the optimizer": ("optimizer.safetensors", flipped),
    "no optimizer": ("optimizer.safetensors", lambda path: path.unlink()),
    "an optimizer folder": ("optimizer.safetensors", a_folder),
    "a bit of the weights": ("model/model.safetensors", flipped),
    "a bit of the source": ("model/positions.safetensors", flipped),
    "no source": ("model/positions.safetensors", lambda path: path.unlink()),
    "no config": ("model/config.json", lambda path: path.unlink()),
    "a file more": ("model/config.json", lambda path: path.with_name("chat.py").write_text("x")),
    "no model": ("model/config.json", lambda path: shutil.rmtree(path.parent)),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("name", "damage"), CHECKPOINT.values(), ids=CHECKPOINT)
def test_a_checkpoint_that_was_changed_is_refused(run, cache, capsys, name, damage):
    damage(newest_checkpoint(run) / name)
    assert "is damaged" in refused(["train", "--resume", run, "--cache", cache], run.parent, capsys)


@pytest.mark.parametrize(
    "whole", [{}, {"0.exp_avg": torch.zeros(1)}, {"x.y": torch.zeros(1)}, {"0.step": torch.ones(())}]
)
def test_moments_that_do_not_fit_are_refused_whatever_the_digest_says(run, cache, capsys, whole):
    checkpoint = newest_checkpoint(run)
    save_file(whole, checkpoint / "optimizer.safetensors")
    digest = data.sha256_of_file(checkpoint / "optimizer.safetensors")
    edited(checkpoint / "state.json", "files", "optimizer.safetensors", to=digest)
    before = on_disk(run)
    assert main(["train", "--resume", str(run), "--cache", str(cache)]) == 2
    assert "optimizer.safetensors" in capsys.readouterr().err
    assert on_disk(run) == before


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def with_line(number: int, line: bytes) -> Callable[[Path], Any]:
    def damage(path: Path) -> None:
        lines = lines_of(path)
        lines[number] = line
        path.write_bytes(b"".join(lines))

    return damage


LOG = {
    "missing": lambda path: path.unlink(),
    "empty": raw(b""),
    "binary": raw(bytes(range(256))),
    "a folder": a_folder,
    "cut in the middle": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "a line missing": with_line(3, b""),
    "a blank line": with_line(3, b"\n"),
    "a line twice": with_line(3, b'{"step": 3, "loss": 5.0}\n{"step": 3, "loss": 5.0}\n'),
    **{
        f"line {line.decode('latin-1')[:20]!r}": with_line(3, line + b"\n")
        for line in (
            b"null",
            b"[]",
            b"4",
            b"\xff\xfe",
            DEEP,
            b'{"step": 4}',
            b'{"step": true, "loss": 1.0}',
            b'{"step": "4", "loss": 1.0}',
            b'{"step": 4, "loss": "low"}',
            b'{"step": 4, "loss": NaN}',
            b'{"step": -4, "loss": 1.0}',
            b'{"step": 99, "loss": 1.0}',
            b'{"step": 4, "loss": 1.0, "more": 1}',
            b'{"step": 4, "loss": 1.0',
        )
    },
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("damage", LOG.values(), ids=LOG)
def test_a_log_that_is_damaged_before_the_checkpoint_is_refused(run, cache, capsys, damage):
    damage(run / "log.jsonl")
    assert "log.jsonl" in refused(["train", "--resume", run, "--cache", cache], run.parent, capsys)


TAILS = [b'{"step": 9, "lo', b"\xff\xfe\n", bytes(512), b'{"step": 9, "loss": NaN}\n{"step": 10', DEEP, b"null\n"]


@pytest.mark.parametrize("tail", TAILS, ids=range(len(TAILS)))
def test_what_a_killed_run_was_writing_is_dropped(stopped, run, cache, config_of, tail):
    with (run / "log.jsonl").open("ab") as log:
        log.write(tail)
    assert main(["train", "--resume", str(run), "--cache", str(cache)]) == 0
    records = [json.loads(line) for line in lines_of(run / "log.jsonl")]
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 13))
    assert lines_of(run / "log.jsonl")[: len(lines_of(stopped / "log.jsonl"))] == lines_of(stopped / "log.jsonl")


NUMBERS = {
    "train": ("steps", "batch-size", "accumulate", "warmup-steps", "seed", "eval-every", "eval-windows", "save-every"),
    "graft": ("steps", "batch-size", "n-ctx", "lora-rank", "seed"),
}
RATES = {
    "train": ("learning-rate", "clip", "weight-decay", "model.rope-theta", "model.positions.max-increment"),
    "graft": ("adapt-learning-rate", "weight-decay", "positions.max-increment"),
}
OPTIONS = [
    *[(c, f"--{n}", v) for c, names in NUMBERS.items() for n in names for v in ("-1", "1" + "0" * 30, "nan", "1.5")],
    *[(c, f"--{n}", v) for c, names in RATES.items() for n in names for v in ("nan", "inf", "-inf", "-1", "1e999")],
    ("train", "--max-bytes", "0"),
    ("train", "--model.d-model", "0"),
    ("train", "--model.n-layers", "-1"),
    ("train", "--model.n-ctx", "1"),
    ("train", "--model.rope-fraction", "nan"),
    ("train", "--model.positions.hidden", "0"),
    ("suite", "--seeds", "-1"),
    ("suite", "--seeds", "1.5"),
    ("suite", "--steps", "0"),
    ("suite", "--variants", "magic"),
    ("suite", "--preset", "huge"),
    ("maximum", "--steps", "1" + "0" * 30),
    ("maximum", "--steps", "0"),
    ("maximum", "--seeds", "-1"),
    ("maximum", "--seeds", "1" + "0" * 30),
    ("maximum", "--sizes", "0"),
    ("maximum", "--learning-rate", "inf"),
    ("maximum", "--learning-rate", "-1"),
    ("maximum", "--classes", "1"),
    ("machinery", "--tables", "magic"),
    ("machinery", "--models", "/nowhere"),
    ("measure", "--tables", "magic"),
    ("measure", "--results", "/nowhere"),
    ("results", "--results", "/nowhere"),
    ("results", "--output", "/nowhere/RESULTS.md"),
    ("ship", "--seed", "-1"),
    ("ship", "--runs", "/nowhere"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("command", "option", "value"), OPTIONS, ids=[" ".join(option)[:40] for option in OPTIONS])
def test_numbers_out_of_range_are_refused_before_anything_is_written(
    command, option, value, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert ended([command, option, value]) == 2
    printed = "".join(capsys.readouterr())
    assert "Traceback" not in printed
    assert printed.strip()
    assert on_disk(tmp_path) == {}


@pytest.mark.slow
def test_a_model_that_no_memory_holds_is_one_sentence(corpus, cache, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", "--corpus", corpus, "--cache", cache, "--model.n-ctx=16", "--model.d-model=1200000"]
    assert "GB of memory" in refused([*words, "--output", tmp_path / "run"], tmp_path, capsys)
    words = ["train", "--corpus", corpus, "--cache", cache, "--model.n-ctx=16", "--batch-size=2000000000"]
    words += ["--model.d-model=16", "--model.n-layers=1", "--model.n-heads=1", "--output", tmp_path / "run"]
    assert "GB of memory" in refused(words, tmp_path, capsys)


@pytest.mark.parametrize("error", [MemoryError("Unable to allocate 9 TiB"), RuntimeError("CUDA out of memory. Tried")])
def test_a_memory_that_runs_out_is_one_sentence(error, tmp_path, capsys, monkeypatch):
    def allocate(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("lens_positions.training.loop.train", allocate)
    assert "there is not enough memory" in refused(["train"], tmp_path, capsys)


def test_a_bug_is_not_hidden(monkeypatch):
    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("lens_positions.training.loop.train", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train"])


PRESETS = {
    "no TOML": "steps = = 3",
    "binary": b"\xff\xfe",
    "text as steps": 'steps = "12"',
    "true as steps": "steps = true",
    "NaN": "weight_decay = nan",
    "a date": "seed = 2026-01-01",
    "unknown": "learning_speed = 3",
    "number as a model": "model = 3",
    "text as a width": '[model]\nd_model = "wide"',
    "deep": "a = " + "[" * 5000,
}


@pytest.mark.parametrize("text", PRESETS.values(), ids=PRESETS)
def test_a_wrong_preset_is_one_sentence(text, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr(config, "PRESETS", tmp_path)
    refused(["train", "--preset", "mine"], tmp_path, capsys)


RESULTS = {
    "no sha256": edit("sha256", without=True),
    "sha256 of numbers": edit("sha256", to={"model.safetensors": 3}),
    "sha256 5": edit("sha256", to=5),
    "config 5": edit("config", to=5),
    "seed true": edit("seed", to=True),
    "parameters text": edit("parameters", to="many"),
    "git text": edit("git", to="main"),
    "versions list": edit("versions", to=[1]),
    "unknown": edit("more", to=1),
}
SHIPPED = ROOT / "lens_positions" / "checkpoints" / "bilingual-shared" / "run.json"


@pytest.mark.parametrize("damage", [*RESULTS.values(), *RAW_DAMAGES.values()], ids=[*RESULTS, *RAW_DAMAGES])
def test_a_damaged_run_json_is_one_sentence_of_every_command_that_reads_it(damage, tmp_path, capsys, monkeypatch):
    results = tmp_path / "runs" / "results" / "tiny" / "shared-0"
    results.mkdir(parents=True)
    shutil.copyfile(SHIPPED, results / "run.json")
    damage(results / "run.json")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    commands = [["suite", "--seeds", "0", "--variants", "shared"], ["measure"], ["gather"]]
    if damage is RESULTS["no sha256"]:  # which a suite makes anew
        commands = [["gather"]]

    def train_nothing(*_: object) -> None:
        pytest.fail("the damaged file was not read, and a run was trained")

    monkeypatch.setattr("experiments.suite._train", train_nothing)
    for command in commands:
        said = refused(command, tmp_path, capsys)
        gathered = command == ["gather"] and ("sha256" in said or "runs/results has no results" in said)
        assert "run.json is" in said or gathered


@pytest.mark.parametrize("content", RAW.values(), ids=RAW)
def test_a_token_cache_with_damaged_digests_is_made_again(content, corpus, tmp_path):
    before = data.tokenize_corpus(str(corpus), tmp_path)
    next(tmp_path.rglob("digests.json")).write_bytes(content)
    again = data.tokenize_corpus(str(corpus), tmp_path)
    assert (again.train == before.train).all()
    assert json.loads(next(tmp_path.rglob("digests.json")).read_text())


@pytest.mark.slow
def test_every_file_of_results_in_the_package_is_read():
    results = read_tables(ROOT / "experiments" / "results")
    configs = {str(run): of["config"] for run, of in results.runs.items()}
    for path in ROOT.glob("lens_positions/checkpoints/*/run.json"):
        configs[str(path)] = read_json(path, RunResults, "config", "sha256")["config"]
    assert len(configs) > 20
    for name, saved in configs.items():
        assert to_json(update_config(TrainConfig(), saved, name))["steps"] == saved["steps"]
    assert len(results.measured) > 20
    assert [of["config"]["tested"] for of in results.maximum.values()] == [2048] * 5
    assert load_preset("tiny").steps == 3000


@pytest.mark.parametrize("words", [[], ["one", "two"], ["--stpes"]], ids=str)
def test_resume_without_one_folder_is_one_sentence_on_standard_error(words, capsys):
    assert main(["resume", *words]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.count("\n") == 1
    assert "expected the folder of one run" in printed.err


@pytest.mark.slow
@pytest.mark.parametrize("command", [["--resume"], ["--output"]], ids=["resume", "output"])
def test_a_folder_that_another_process_works_on_is_refused(command, run, config_of, corpus, cache, capsys):
    words = ["train", *command, run, "--cache", cache]
    if command == ["--output"]:
        shutil.rmtree(run)
        model = ["--model.d-model=16", "--model.n-layers=1", "--model.n-heads=2", "--model.n-ctx=16"]
        words += ["--corpus", corpus, *model, "--steps=2"]
    with FileLock(f"{run}.lock"):
        assert "another process works on" in refused(words, run.parent, capsys)
    assert main([str(word) for word in words]) == 0  # the file is still there, and nobody holds it
    assert Path(f"{run}.lock").is_file()


def test_a_lock_that_a_killed_process_left_does_not_block(run, cache):
    holder = "import fcntl, sys, time\nf = open(sys.argv[1], 'w')\nfcntl.flock(f, fcntl.LOCK_EX)\n"
    words = [sys.executable, "-c", holder + "print('held', flush=True)\ntime.sleep(600)", f"{run}.lock"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    assert main(["train", "--resume", str(run), "--cache", str(cache)]) == 2
    process.kill()
    process.wait()
    process.stdout.close()
    assert main(["train", "--resume", str(run), "--cache", str(cache)]) == 0


def test_of_two_runs_into_one_folder_at_once_one_is_refused(config_of, cache, tmp_path):
    outcomes: list[Any] = []

    def start() -> None:
        try:
            with loop.lock_folder(tmp_path / "run"):
                outcomes.append("held")
                time.sleep(0.5)
        except PositionsError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes)[1] == "held"
    assert "another process works on" in sorted(outcomes)[0]


def opening(names: list[str], full_at: int | None, do: Callable[[], Any]) -> None:
    """Note what is written by Path.open, open and safetensors; raise ENOSPC at one of them."""

    def noted(name: str) -> None:
        names.append(name)
        if full_at is not None and len(names) > full_at:
            raise OSError(errno.ENOSPC, "No space left on device", name)

    path_open, save = Path.open, loop.save_file

    def opened(self, mode="r", *args, **kwargs):
        if set(mode) & set("wax"):
            noted(self.name)
        return path_open(self, mode, *args, **kwargs)

    def saved(tensors, name, *args, **kwargs):
        noted(Path(name).name)
        return save(tensors, name, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "open", opened)
        patched.setattr(loop, "save_file", saved)
        do()


@pytest.mark.slow
def test_a_disk_that_fills_up_at_any_write_is_one_sentence_and_the_run_goes_on_later(
    config_of, cache, tmp_path, capsys
):
    config_of = replace(config_of, steps=4, eval_every=2, save_every=2)
    data.tokenize_corpus(config_of.corpus, cache)
    whole = tmp_path / "whole"
    names: list[str] = []
    opening(names, None, lambda: train(config_of, whole, cache_dir=cache))
    assert {"log.jsonl", "optimizer.safetensors", "state.json", "new"} <= set(names)
    firsts = {names.index(name) for name in names}
    lasts = {len(names) - 1 - names[::-1].index(name) for name in ("log.jsonl", "new")}
    for at in sorted(firsts | lasts):
        folder = tmp_path / f"full-{at}"
        capsys.readouterr()
        with pytest.raises((PositionsError, OSError), match="No space left on device"):
            opening([], at, lambda folder=folder: train(config_of, folder, cache_dir=cache))
        resume = (folder / "training.json").is_file()
        train(config_of, folder, resume=resume, cache_dir=cache)
        assert lines_of(folder / "log.jsonl")[-1] == lines_of(whole / "log.jsonl")[-1], names[at]
        first = (folder / "model" / "model.safetensors").read_bytes()
        assert first == (whole / "model" / "model.safetensors").read_bytes()
        assert not [path for path in folder.rglob("*") if path.suffix in (".tmp", ".partial")]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_log_on_a_full_disk_is_one_sentence(run, cache, capsys, monkeypatch):
    monkeypatch.setattr(loop, "LOG", "/dev/full")
    monkeypatch.setattr(loop.Run, "_open", lambda self, resume: setattr(self, "digest", ""))
    assert main(["train", "--resume", str(run), "--cache", str(cache)]) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_one_line_and_it_goes_on_from_there(
    number, status, config_of, cache, tmp_path, capsys, monkeypatch
):
    stepped = loop.Run._train_step

    def signalled(self):
        if self.step == 5:
            os.kill(os.getpid(), number)
        return stepped(self)

    folder = tmp_path / "run"
    words = ["train", "--corpus", config_of.corpus, "--output", folder, "--cache", cache, "--steps=9", "--batch-size=2"]
    words += ["--model.d-model=16", "--model.n-layers=1", "--model.n-heads=2", "--model.n-ctx=16", "--eval-windows=2"]
    with monkeypatch.context() as patched:
        patched.setattr(loop.Run, "_train_step", signalled)
        assert main([str(word) for word in words]) == status
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"lens-positions: interrupted at step 6 of 9; --resume {folder} goes on from there"
    assert main(["train", "--resume", str(folder), "--cache", str(cache)]) == 0
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    steps = [json.loads(line)["step"] for line in lines_of(folder / "log.jsonl")]
    assert sorted(set(steps)) == list(range(1, 10))


LONG = {
    "suite": ("experiments.suite.suite", "the suite was interrupted"),
    "measure": ("experiments.measure.measure", ""),
    "machinery": ("experiments.rope_measures.measure_rope", ""),
    "maximum": ("experiments.maximum.maximum", ""),
    "results": ("experiments.results.write_results", ""),
    "ship": ("experiments.ship.ship", ""),
    "graft": ("lens_positions.training.graft.graft", ""),
    "train": ("lens_positions.training.loop.train", ""),
}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", LONG)
def test_a_signal_ends_every_long_command_quietly(command, number, status, tmp_path, capsys, monkeypatch):
    where, said = LONG[command]

    def signalled(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.chdir(tmp_path)
    module, name = where.rsplit(".", 1)
    monkeypatch.setattr(importlib.import_module(module), name, signalled)  # a package may have its function's name
    assert main([command]) == status
    out, error = capsys.readouterr()
    assert out == ""
    assert said in error
    assert error.count("\n") == bool(said)
    assert on_disk(tmp_path) == {}


def test_a_loss_that_is_no_number_names_a_checkpoint_only_where_there_is_one(config_of, cache, tmp_path):
    with pytest.raises(PositionsError, match="there is no checkpoint from before"):
        train(replace(config_of, learning_rate=1e30, clip=1e30, warmup_steps=0), tmp_path / "run", cache_dir=cache)

    def late(self, step=loop.Run._train_step):
        loss = step(self)
        return loss * float("nan") if self.step == 6 else loss

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop.Run, "_train_step", late)
        with pytest.raises(PositionsError, match="step-00000004 is from before"):
            train(config_of, tmp_path / "later", cache_dir=cache)


@pytest.fixture(scope="module")
def grafted(corpus, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grafted") / "graft"
    words = ["graft", "--base=bilingual-rope", "--corpus", corpus, "--cache", cache, "--n-ctx=16", "--steps=2"]
    assert ended([*words, "--batch-size=2", "--eval-windows=4", "--positions.hidden=4", "--output", folder]) == 0
    return folder


def unfinished(part: str, damage: Callable[[Path], Any], name: str) -> Callable[[Path], Any]:
    """The baseline is to be done again, and a file of a part is damaged."""

    def do(folder: Path) -> None:
        (folder / "baseline" / "heldout.csv").unlink()
        damage(folder / part / name)

    return do


GRAFTS: dict[str, Callable[[Path], Any]] = {
    "another seed of what is finished": unfinished("graft", in_config("seed", to=1), "training.json"),
    "another seed of the baseline": unfinished("baseline", in_config("seed", to=1), "training.json"),
    "a baseline that says nothing": unfinished("baseline", raw(b"{}"), "training.json"),
    "a state of another run": unfinished("graft", edit("run", to="0" * 64), "checkpoints/step-00000002/state.json"),
    "another seed when all is done": lambda folder: edited(folder / "graft" / "training.json", "config", "seed", to=1),
    "empty losses": lambda folder: (folder / "graft" / "heldout.csv").write_bytes(b""),
    "binary losses": lambda folder: (folder / "baseline" / "heldout.csv").write_bytes(bytes(range(256))),
    "text as losses": lambda folder: (folder / "graft" / "heldout.csv").write_text("document,bytes,nats\n0,1,low\n"),
    "losses that are NaN": lambda folder: (folder / "graft" / "heldout.csv").write_text("document,bytes,nats\n0,1,\n"),
    "a log of nothing": lambda folder: (folder / "graft" / "log.jsonl").write_bytes(b""),
    "a binary log": lambda folder: (folder / "graft" / "log.jsonl").write_bytes(bytes(range(256))),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("damage", GRAFTS.values(), ids=GRAFTS)
def test_a_graft_with_a_wrong_file_is_refused_before_anything_is_written(grafted, tmp_path, cache, capsys, damage):
    shutil.copytree(grafted, tmp_path / "graft")
    damage(tmp_path / "graft")
    refused(["graft", "--resume", tmp_path / "graft", "--cache", cache], tmp_path, capsys)
