"""Whatever a person, a file or a terminal does to `lens-positions`: one sentence and exit status 2, or as documented.

Every variant of the first half runs in this process and leaves the disk as it was. The second half runs real processes,
forked from one that has imported everything, with standard output closed, full, gone or in another encoding.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import lens_positions as lp
from lens_positions import cli
from lens_positions.exits import exit_status

ROOT = Path(__file__).parents[2]
DEEP = b"[" * 100_000
HUGE = "1" + "0" * 30


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small model, a static one, and files of every wrong kind."""
    place = tmp_path_factory.mktemp("place")
    for name, source in {"model": "per_layer", "static": "static"}.items():
        positions = lp.PositionConfig(source=source)
        config = lp.PositionModelConfig(d_model=16, n_layers=2, n_heads=2, n_ctx=64, positions=positions)
        model = lp.HookedPositionTransformer.from_config(config)
        torch.manual_seed(0)
        for weight_name, weight in model.position_streams.named_parameters():
            if weight_name.endswith("out.weight"):
                torch.nn.init.normal_(weight)
        model.save_pretrained(place / name)
    (place / "corpus").mkdir()
    for i in range(24):
        text = f"Text {i}. The cat sat on a mat; 中国 has {i} cities, and the United States have more. "
        (place / "corpus" / f"{i:02}.txt").write_text(text * 5, "utf-8")
    for name, content in {
        "empty.txt": b"",
        "binary.txt": b"\xff\xfe\x00abc\n\nxx",
        "spaces.txt": b" \n\n \n",
        "one.txt": b"one",
        "bad.jsonl": b'{"text": "a"}\n[[[',
        "numbers.jsonl": b'{"text": 1}\n{"text": 2}\n',
        "columns.csv": b"a,b\n1,2\n",
        "junk.parquet": b"PAR1junk",
        "words.txt": "中国 政府 今天\n北京 举行\n".encode() * 5,
        "file": b"x",
    }.items():
        (place / name).write_bytes(content)
    configs = {"bare": None, "cut": b"{", "list": b"[]", "binary": b"\xff\xfe", "deep": DEEP, "true": b"true"}
    for name, content in configs.items():
        (place / f"{name}-model").mkdir()
        if content is not None:
            (place / f"{name}-model" / "config.json").write_bytes(content)
    (place / "folder").mkdir()
    return place


def on_disk(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


COMMANDS: dict[str, list[str]] = {
    "show": ["show", "model", "ab"],
    "gaps": ["gaps", "model", "The cat"],
    "patch": ["patch", "model", "--clean", "ab", "--corrupted", "cd", "--answer", "e", "--wrong", "f"],
    "ablate": ["ablate", "model", "--corpus", "corpus", "--characters", "400"],
    "extremes": ["extremes", "model", "--corpus", "corpus"],
    "report": ["report", "model", "--output", "report.html", "--corpus", "corpus"],
    "kinds": ["kinds", "model", "--corpus", "corpus"],
    "boundaries": ["boundaries", "model", "--words", "words.txt", "--training", "none"],
    "names": ["names", "model", "--corpus", "corpus"],
    "heads": ["heads", "model", "--corpus", "corpus"],
    "saturation": ["saturation", "model", "--corpus", "corpus"],
    "specialisation": ["specialisation", "model", "--corpus", "corpus"],
    "frequencies": ["frequencies", "model", "--corpus", "corpus"],
    "absolute": ["absolute", "model", "--corpus", "corpus", "--texts", "2", "--block", "2"],
    "dispersion": ["dispersion", "model", "--corpus", "corpus", "--lengths", "32"],
}
ON_TEXT = [name for name, words in COMMANDS.items() if "--corpus" in words]


def changed(command: str, option: str, value: str) -> list[str]:
    """The command with another model (MODEL), text (TEXT) or value of an option."""
    words = list(COMMANDS[command])
    if option in ("MODEL", "TEXT"):
        words[1 if option == "MODEL" else 2] = value
    elif option in words:
        words[words.index(option) + 1] = value
    else:
        words += [option, value]
    return words


MODELS = ("", "/nowhere", "bare-model", "cut-model", "list-model", "binary-model", "deep-model", "true-model", "file")
MODELS += ("a/b/c", "..", "~/nothing", "x" * 300, "bad\udcffname", "file/model", "empty.txt")
CORPORA = ("", "/nowhere", "folder", "empty.txt", "binary.txt", "spaces.txt", "one.txt", "bad.jsonl", "numbers.jsonl")
CORPORA += ("columns.csv", "junk.parquet", "klingon", "own/er", "x" * 300, "bad\udcff")
VARIANTS: list[tuple[str, str, str]] = [
    *[("show", "MODEL", value) for value in MODELS],
    *[(command, "MODEL", "/nowhere") for command in COMMANDS if command != "show"],
    *[("kinds", "--corpus", value) for value in CORPORA],
    *[("report", "--corpus", value) for value in ("", "binary.txt", "klingon")],
    *[(command, "--corpus", "binary.txt") for command in ON_TEXT],
    *[("show", "TEXT", value) for value in ("", "\udcff")],
    *[("gaps", "TEXT", value) for value in ("", "\udcff", "a" * 500)],
    *[(command, "--layers", value) for command in ("show", "gaps", "extremes") for value in ("2", "-1", HUGE)],
    *[("patch", option, value) for option in ("--answer", "--wrong") for value in ("", "abc")],
    *[("patch", option, value) for option in ("--clean", "--corrupted") for value in ("", "abc", "\udcff")],
    *[("gaps", "--by", value) for value in ("nan", "inf", "-inf", "1e999")],
    *[("gaps", "--answer", value) for value in ("", "abc")],
    ("gaps", "--wrong", "e"),
    *[(command, "--characters", value) for command in ("ablate", "kinds", "report") for value in ("0", "-1")],
    *[(c, "--seed", value) for c in ("ablate", "report", "kinds", "absolute", "heads") for value in ("-1", HUGE)],
    *[("extremes", "--top", value) for value in ("0", "-1")],
    *[("boundaries", "--lines", value) for value in ("0", "-1")],
    *[
        ("boundaries", "--words", value)
        for value in ("", "/nowhere", "folder", "empty.txt", "binary.txt", "spaces.txt")
    ],
    *[("boundaries", "--training", value) for value in ("/nowhere", "empty.txt", "klingon")],
    *[("names", "--names", value) for value in ("/nowhere", "folder", "empty.txt", "binary.txt", "one.txt")],
    *[("kinds", "--only", value) for value in ("", "magic")],
    *[("absolute", "--texts", value) for value in ("0", "-1", "1", HUGE)],
    *[("absolute", "--block", value) for value in ("0", "-1", "100000")],
    *[("dispersion", "--lengths", value) for value in ("0", "-5", "99999999")],
    *[("report", "--compare", value) for value in ("", "/nowhere", "deep-model")],
    *[("report", "--output", value) for value in ("/nowhere/r.html", "r.txt", "folder", "", "x" * 300 + ".html")],
    *[("gaps", "--csv", value) for value in ("/nowhere/x.csv", "folder", "", "x" * 300, "file/x.csv")],
    *[("show", "--figure", value) for value in ("/nowhere/x.png", "x.gif", "folder", "", "file/x.png")],
    *[(command, "MODEL", "static") for command in ("ablate", "names", "heads", "specialisation")],
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("command", "option", "value"), VARIANTS, ids=[" ".join(v)[:40] for v in VARIANTS])
def test_a_wrong_argument_is_one_sentence_and_changes_nothing(command, option, value, place, capfd, monkeypatch):
    monkeypatch.chdir(place)
    before = on_disk(place)
    assert cli.main(changed(command, option, value)) == 2
    out, error = capfd.readouterr()
    assert out == ""
    assert error.startswith("lens-positions: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert len(error) < 700
    assert on_disk(place) == before


OF_ANOTHER_TYPE = [("show", "--layers", "x"), ("gaps", "--by", "far"), ("kinds", "--seed", "1.5")]
OF_ANOTHER_TYPE += [("patch", "--site", "x"), ("kinds", "--alphabet", "greek"), ("ablate", "--characters", "nan")]
OF_ANOTHER_TYPE += [("kinds", "--bogus", "1")]


@pytest.mark.parametrize(("command", "option", "value"), OF_ANOTHER_TYPE)
def test_a_value_of_another_type_is_exit_status_2_with_the_help_named(command, option, value, capsys):
    assert cli.main(changed(command, option, value)) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert "--help" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs_on_a_terminal_of_one_column(command, place, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "1")
    words = COMMANDS[command] if command != "report" else changed("report", "--output", str(tmp_path / "r.html"))
    status = cli.main(words)
    out, error = capsys.readouterr()
    assert "Traceback" not in error
    if command == "names":  # which has too little text here
        assert (status, error.count("\n")) == (2, 1)
    else:
        assert status == 0
        assert out.strip()


WRITTEN = {name: "--csv" for name in ("gaps", "ablate", "extremes", "kinds", "frequencies")} | {"show": "--figure"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("command", [command for command, option in WRITTEN.items() if option == "--csv"])
def test_a_table_on_a_full_disk_is_one_sentence(command, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert cli.main([*COMMANDS[command], "--csv", "/dev/full"]) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("command", "option"), WRITTEN.items())
def test_a_disk_that_fills_up_leaves_what_was_there(command, option, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(place)
    path = tmp_path / ("old.png" if option == "--figure" else "old.csv")
    path.write_bytes(b"of before")
    write = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        write(self, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert cli.main([*COMMANDS[command], option, str(path)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert on_disk(tmp_path) == {str(path): b"of before"}


def test_a_device_is_written_to_and_not_replaced(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    device = tmp_path / "device"
    os.mkfifo(device)
    reader = subprocess.Popen(["cat", str(device)], stdout=subprocess.PIPE)
    assert cli.main([*COMMANDS["gaps"], "--csv", str(device)]) == 0
    assert reader.communicate()[0].startswith(b"layer,position,token,effect")
    assert device.is_fifo()


def test_files_that_are_no_text_are_left_out_with_one_sentence(place, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    for path in (place / "corpus").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "picture").write_bytes(b"\xff\xfe\x00")
    assert cli.main(changed("kinds", "--corpus", str(tmp_path))) == 0
    assert capsys.readouterr().err == f"lens-positions: left out 1 file(s) in {tmp_path} that are not UTF-8 text\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_ends_every_command_quietly(command, number, status, place, capsys, monkeypatch):
    monkeypatch.chdir(place)

    def signalled(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(lp.HookedPositionTransformer, "from_pretrained", signalled)
    before = on_disk(place)
    assert cli.main(COMMANDS[command]) == status
    assert capsys.readouterr() == ("", "")
    assert on_disk(place) == before
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_report_that_is_interrupted_keeps_what_is_done_and_says_so(
    number, status, place, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(place)
    report_module = importlib.import_module("lens_positions.viz.report")  # `viz.report` is the function
    monkeypatch.setattr(report_module, "_tints", lambda *given: os.kill(os.getpid(), number) or iter(()))
    path = tmp_path / "report.html"
    assert cli.main(changed("report", "--output", str(path))) == status
    assert capsys.readouterr().err == f"lens-positions: interrupted: {path} has the parts that were done.\n"
    assert path.read_text("utf-8").startswith("<!doctype html>")


def test_an_error_that_is_a_bug_is_not_hidden():
    def broken() -> int:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        exit_status("lens-positions", broken)


FORKED = """
import json, os, sys

given = json.loads(sys.argv[1])
import forked_imports
from lens_positions.cli import main

for name, case in given["cases"].items():
    sys.stdout.flush()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    os.dup2(os.open(f"{given['folder']}/{name}.err", os.O_WRONLY | os.O_CREAT), 2)
    if case["out"] == "closed":
        os.close(1)
        sys.stdout = None
    else:
        if case["out"] == "gone":
            read, write = os.pipe()
            os.close(read)
        else:
            path = case["out"] if "/" in case["out"] else f"{given['folder']}/{name}.out"
            write = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(write, 1)
        sys.stdout = open(1, "w", encoding=case.get("encoding", "utf-8"), closefd=False)
    if case.get("err") == "closed":
        os.close(2)
        sys.stderr = None
    else:
        sys.stderr = open(2, "w", encoding=case.get("encoding", "utf-8"), closefd=False)
    status = os.fork()
    if status == 0:
        sys.exit(main(case["arguments"]))
    _, status = os.waitpid(status, 0)
    with open(f"{given['folder']}/{name}.status", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(status)))
    os._exit(0)
"""

CASES: dict[str, dict[str, Any]] = {
    "closed": {"out": "closed", "arguments": ["show", "model", "ab"]},
    "full": {"out": "/dev/full", "arguments": ["show", "model", "ab"]},
    "head": {"out": "gone", "arguments": ["show", "model", "ab " * 15]},
    "help-head": {"out": "gone", "arguments": ["show", "--help"]},
    "help-full": {"out": "/dev/full", "arguments": ["--help"]},
    "ascii": {"out": "file", "encoding": "ascii", "arguments": ["show", "model", "中文 ✓"]},
    "ascii-error": {"out": "file", "encoding": "ascii", "arguments": ["show", "/nowhere/中", "a"]},
    "no-stderr": {"out": "file", "err": "closed", "arguments": ["show", "/nowhere", "a"]},
}


@pytest.fixture(scope="module")
def forked(place, tmp_path_factory):
    """How each of CASES ended: its exit status, standard output and standard error; without a home, in the C locale."""
    folder = tmp_path_factory.mktemp("forked")
    kept = {name: os.environ[name] for name in ("PATH", "LENS_POSITIONS_TESTS") if name in os.environ}
    narrow = {"LC_ALL": "C", "PYTHONUTF8": "0", "COLUMNS": "20", "OMP_NUM_THREADS": "1"}
    narrow["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    given = json.dumps({"folder": str(folder), "cases": CASES})
    (folder / "forked.py").write_text(FORKED)
    words = [sys.executable, str(folder / "forked.py"), given]
    done = subprocess.run(words, cwd=place, env=kept | narrow, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr

    def ended(name: str) -> tuple[int, bytes, bytes]:
        texts = [folder / f"{name}.{kind}" for kind in ("out", "err")]
        out, error = (path.read_bytes() if path.exists() else b"" for path in texts)
        return int((folder / f"{name}.status").read_text()), out, error

    return ended


@pytest.mark.slow
def test_a_closed_standard_output_is_no_error(forked):
    assert forked("closed") == (0, b"", b"")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "help-full"])
def test_a_full_standard_output_is_one_sentence(forked, name):
    status, _, error = forked(name)
    assert (status, error.count(b"\n")) == (2, 1), error
    assert b"No space left on device" in error


@pytest.mark.slow
@pytest.mark.parametrize("name", ["head", "help-head"])
def test_a_reader_that_has_gone_ends_it_quietly(forked, name):
    assert forked(name) == (1, b"", b"")


@pytest.mark.slow
def test_what_the_locale_cannot_write_is_escaped(forked):
    status, out, error = forked("ascii")
    assert (status, error) == (0, b"")
    assert b"\\u4e2d" in out
    status, out, error = forked("ascii-error")
    assert (status, out, error.count(b"\n")) == (2, b"", 1)
    assert b"\\u4e2d" in error


@pytest.mark.slow
def test_without_standard_error_the_status_says_it_and_standard_output_stays_clean(forked):
    assert forked("no-stderr") == (2, b"", b"")
