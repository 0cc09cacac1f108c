"""The map: every gap of a corpus once a layer, exact, whole after any kill, the same from any number of processes."""

import functools
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from forked import Command

import lens_positions as lp
from lens_positions import cli
from lens_positions.causal.map_folder import write_shard
from lens_positions.causal.map_gradients import Gradients
from lens_positions.causal.map_rows import rows_of
from lens_positions.causal.map_windows import Tokens, shards_of, windows_of
from lens_positions.corpus_stream import Document
from lens_positions.measure.metrics import token_losses
from lens_positions.tokenizer import byte_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = [
    "The cat sat on the mat. A dog ran by, and it did not come back.\nThe end of the day. " * 2,
    "你好，世界。It is a short one.",
    "x",
    "Words and words and words, " * 9,
]
SMALL = {"window": 32, "overlap": 8, "shard": 3, "progress": False}


def losses(model, tokens):
    return token_losses(model(tokens[None], return_type="logits", use_cache=False), tokens[None, 1:])[0]


def by_layer(rows: pd.DataFrame, column: str = "gradient") -> np.ndarray:
    """[layer, gap, *head] of a map of one document."""
    layers = rows["layer"].nunique()
    heads = [rows["head"].nunique()] if "head" in rows else []
    return np.moveaxis(rows[column].to_numpy().reshape(-1, layers, *heads), 0, 1)


# What is in it


@pytest.mark.parametrize(("length", "window", "overlap"), [(2, 8, 2), (8, 8, 2), (9, 8, 4), (100, 16, 5), (101, 7, 3)])
def test_every_gap_has_one_window_with_text_on_both_sides(length, window, overlap):
    found = windows_of(length, window, overlap)
    assert [t for _, _, first, end in found for t in range(first, end)] == list(range(1, length))
    for start, stop, first, end in found:
        assert stop - start <= window
        assert start < first < end <= stop
        assert start == 0 or first - start > overlap // 2
        assert stop == length or stop - end >= overlap - overlap // 2 - 1


@pytest.mark.slow
def test_every_gap_of_the_corpus_is_there_once_a_layer(tiny_model, tmp_path):
    model = tiny_model(source="per_layer")
    found = lp.causal.gap_map(model, TEXTS, tmp_path / "map", **SMALL)
    rows = found.table()
    tokens = [[256, *text.encode(), 256] for text in TEXTS]
    keys = [(d, t, layer) for d, ids in enumerate(tokens) for t in range(1, len(ids)) for layer in (0, 1)]
    assert list(rows[["document", "index", "layer"]].itertuples(index=False, name=None)) == keys
    assert rows["after_id"].tolist() == [tokens[d][t] for d, t, _ in keys]
    assert rows["before_id"].tolist() == [tokens[d][t - 1] for d, t, _ in keys]
    assert found.is_whole
    assert found.end == {"shards": len(found.shards), "documents": 4, "gaps": len(keys) // 2}
    assert len(found.shards) > 3
    shown = rows[(rows["document"] == 1) & (rows["layer"] == 0)]
    assert shown["after"].tolist()[:4] == ["你₁", "你₂", "你₃", "好₁"]
    assert shown["crosses_word"].tolist()[:4] == [True, False, False, None]
    assert shown["crosses_document"].sum() == 2
    assert shown["after_kind"].tolist()[-1] == "end of document"


@pytest.mark.parametrize("source", ["static", "shared", "per_layer", "frozen"])
@pytest.mark.parametrize("gap", ["before", "after"])
def test_gradients_are_those_of_attribution(tiny_model, tmp_path, source, gap):
    model = tiny_model(source=source, gap=gap)
    rows = lp.causal.gap_map(model, [TEXTS[1]], tmp_path / "map", window=64, progress=False).table()
    tokens = torch.tensor([256, *TEXTS[1].encode(), 256])
    expected = lp.causal.attribution(model, tokens, lp.causal.loss()) * (len(tokens) - 1)
    assert by_layer(rows) == pytest.approx(expected[:, 1:].numpy(), abs=1e-5 * float(expected.abs().max()))
    with torch.no_grad():
        surprisal = losses(model, tokens)
        increments = model.increments(tokens)[:, 0]
    assert rows["after_surprisal"].to_numpy()[::2] == pytest.approx(surprisal.numpy(), abs=1e-5)
    shown = increments[:, 1:] if gap == "before" else increments[:, :-1]
    assert by_layer(rows, "increment") == pytest.approx(shown.numpy(), abs=1e-6)


@pytest.mark.slow
def test_a_gradient_is_the_slope_of_the_loss_by_that_gap_and_head(tiny_llama, tmp_path):
    """By finite differences in double precision, each gap, layer and head alone."""
    llama = tiny_llama(dtype=torch.float64, vocab_size=257)
    model = lp.HookedPositionTransformer.from_transformers(
        llama, byte_tokenizer(), lp.PositionConfig("static", per_head=True)
    )
    rows = lp.causal.gap_map(model, ["abc de."], tmp_path / "map", window=32, progress=False).table()
    tokens = torch.tensor([256, *b"abc de.", 256])
    found = by_layer(rows)
    assert found.shape == (2, 8, 2)
    step = 0.01  # the model's own rotary module computes in single precision
    for layer, head, t in product((0, 1), (0, 1), range(1, 9)):

        def loss(by, layer=layer, head=head, t=t):
            def longer(increments, hook):
                increments[:, t, head] += by
                return increments

            with torch.no_grad(), model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_increments", longer)]):
                return float(losses(model, tokens).sum())

        slope = (loss(step) - loss(-step)) / (2 * step)
        assert found[layer, t - 1, head] == pytest.approx(slope, abs=1e-3 * float(np.abs(found).max()))


@pytest.mark.slow
@pytest.mark.parametrize("source", ["static", "shared"])
@pytest.mark.parametrize("gap", ["before", "after"])
def test_gradients_by_head_are_those_of_attribution(tiny_llama, tmp_path, source, gap):
    """Two query heads share keys, and the shorter text is padded beside the longer one."""
    llama = tiny_llama(vocab_size=257, num_attention_heads=4, num_key_value_heads=2)
    model = lp.HookedPositionTransformer.from_transformers(llama, byte_tokenizer(), lp.PositionConfig(source, gap=gap))
    texts = ["abc de.", "The cat sat."]
    maps = {
        kind: lp.causal.gap_map(model, texts, tmp_path / kind, by="head", heads=kind, progress=False).table()
        for kind in ("query", "key_value")
    }
    whole = lp.causal.gap_map(model, texts, tmp_path / "layers", progress=False).table()
    for kind, rows in maps.items():
        for number, text in enumerate(texts):
            tokens = torch.tensor([256, *text.encode(), 256])
            expected = lp.causal.attribution(model, tokens, lp.causal.loss(), by="head", heads=kind)
            expected = expected.movedim(1, 2)[:, 1:].numpy() * (len(tokens) - 1)
            found = by_layer(rows[rows["document"] == number])
            assert found.shape == expected.shape == (2, len(tokens) - 1, 4 if kind == "query" else 2)
            assert found == pytest.approx(expected, abs=1e-5 * float(np.abs(expected).max()))
    sums = maps["query"].groupby(["document", "index", "layer"], sort=False)["gradient"].sum()
    of_layers = whole["gradient"].to_numpy()
    assert sums.to_numpy() == pytest.approx(of_layers, abs=1e-5 * float(np.abs(of_layers).max()))
    assert (maps["key_value"]["increment"].to_numpy()[::2] == whole["increment"].to_numpy()).all()


@pytest.mark.slow
def test_integrated_parts_of_heads_sum_to_the_whole_effect(tiny_llama, tmp_path):
    llama = tiny_llama(vocab_size=257, num_attention_heads=4, num_key_value_heads=2)
    model = lp.HookedPositionTransformer.from_transformers(llama, byte_tokenizer(), lp.PositionConfig("shared"))
    rows = lp.causal.gap_map(model, ["abc de."], tmp_path / "map", by="head", baseline=0.0, progress=False).table()
    tokens = torch.tensor([256, *b"abc de.", 256])
    with torch.no_grad():
        own = float(losses(model, tokens).sum())
        with model.hooks(fwd_hooks=lp.ablate(model, to=0.0)):
            whole = own - float(losses(model, tokens).sum())
    assert rows["integrated"].sum() == pytest.approx(whole, rel=0.011)


def test_a_map_by_layer_is_not_gone_on_with_by_head(tiny_model, tmp_path):
    model = tiny_model()
    lp.causal.gap_map(model, ["abc"], tmp_path / "map", progress=False)
    with pytest.raises(lp.PositionsError, match="with heads None where this one has query"):
        lp.causal.gap_map(model, ["abc"], tmp_path / "map", by="head", progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["static", "per_layer"])
def test_results_do_not_depend_on_the_batch_or_on_pieces(tiny_model, tmp_path, source):
    model = tiny_model(source=source)
    one = lp.causal.gap_map(model, TEXTS, tmp_path / "1", **SMALL, batch=1).table()
    for name, how in (("2", {"batch": 100}), ("3", {"batch": 4096}), ("4", {"pieces": True})):
        other = lp.causal.gap_map(model, TEXTS, tmp_path / name, **SMALL, **how).table()
        for column in ("gradient", "after_surprisal", "increment"):
            most = one[column].abs().max()
            assert np.nanmax(np.abs(other[column] - one[column])) <= 1e-5 * most
        assert one.drop(columns=["gradient", "after_surprisal", "before_surprisal", "increment"]).equals(
            other.drop(columns=["gradient", "after_surprisal", "before_surprisal", "increment"])
        )


@pytest.mark.slow
def test_integrated_parts_sum_to_the_whole_effect(tiny_model, tmp_path):
    model = tiny_model(source="per_layer")
    given = {"window": 64, "baseline": 1.0, "progress": False}
    rows = lp.causal.gap_map(model, [TEXTS[1], TEXTS[2]], tmp_path / "map", **given).table()
    for number, text in enumerate((TEXTS[1], TEXTS[2])):
        tokens = torch.tensor([256, *text.encode(), 256])
        with torch.no_grad():
            own = float(losses(model, tokens).sum())
            with model.hooks(fwd_hooks=lp.ablate(model, to=1.0)):
                whole = own - float(losses(model, tokens).sum())
        of_document = rows[rows["document"] == number]
        assert of_document["integrated"].sum() == pytest.approx(whole, rel=0.011)
        assert (of_document["integrated_off"] <= 0.01).all()
        expected = lp.causal.attribution(model, tokens, lp.causal.loss(), "integrated") * (len(tokens) - 1)
        assert by_layer(of_document, "integrated") == pytest.approx(expected[:, 1:].numpy(), abs=0.02 * abs(whole))


@pytest.mark.slow
def test_chosen_layers_are_those_of_the_whole_map(tiny_model, tmp_path):
    model = tiny_model(source="per_layer")
    every = lp.causal.gap_map(model, TEXTS, tmp_path / "every", **SMALL).table()
    one = lp.causal.gap_map(model, TEXTS, tmp_path / "one", layers=[1], **SMALL).table()
    assert one["gradient"].to_numpy() == pytest.approx(every.loc[every["layer"] == 1, "gradient"].to_numpy(), abs=1e-6)


def test_the_model_is_as_it_was_before(tiny_model, tmp_path):
    model = tiny_model(source="per_layer").train()
    learning = [parameter.requires_grad for parameter in model.parameters()]
    lp.causal.gap_map(model, TEXTS[1:2], tmp_path / "map", **SMALL)
    assert [parameter.requires_grad for parameter in model.parameters()] == learning
    assert model.training
    assert not any(point.has_hooks() for point in model.hook_dict.values())


# Processes and interruptions


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_files(tiny_model, tmp_path):
    model = tiny_model(source="per_layer")
    lp.causal.gap_map(model, TEXTS, tmp_path / "one", **SMALL)
    for number in (2, 0, 1):
        found = lp.causal.gap_map(model, TEXTS, tmp_path / "three", **SMALL, processes=(number, 3))
        assert found.is_whole == (number == 1)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_what_is_missing_is_made_again_and_nothing_else(tiny_model, tmp_path):
    model = tiny_model(source="static")
    found = lp.causal.gap_map(model, TEXTS, tmp_path / "map", **SMALL)
    whole, times = contents(found.folder), {path.name: path.stat().st_mtime_ns for path in found.shards}
    found.shards[1].unlink()
    # Of killed processes: one was writing the shard that is missing, one had just written the first.
    (found.folder / ".gaps-000001.parquet.elsewhere-1.partial").write_bytes(b"half")
    (found.folder / ".gaps-000000.parquet.k2j4").mkdir()
    lp.causal.gap_map(model, TEXTS, found.folder, **SMALL)
    assert contents(found.folder) == whole
    kept = [path.name for path in found.shards if path.stat().st_mtime_ns == times[path.name]]
    assert len(kept) == len(found.shards) - 1


COMMAND = ("map", "bilingual-rope", "--corpus", "english", "--characters", "9000", "--shard", "2", "--window", "64")


def started(folder: Path, **how) -> Command:
    return Command(folder.parent, *COMMAND, "--output", folder, **how)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("maps") / "whole"
    model = lp.HookedPositionTransformer.from_pretrained("bilingual-rope")
    lp.causal.gap_map(model, "english", folder, characters=9000, shard=2, window=64, progress=False)
    return contents(folder)


@pytest.mark.slow
def test_a_kill_at_random_moments_loses_and_repeats_nothing(uninterrupted, tmp_path):
    """Five kills while shards are written, and one run to the end."""
    folder, generator = tmp_path / "map", random.Random(0)
    before = 0
    for _ in range(5):
        # So many shards later, however fast the machine, and somewhere in the next.
        process, enough = started(folder), before + generator.randrange(6)
        while process.poll() is None and len(list(folder.glob("gaps-*.parquet"))) <= enough:
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        # Beside them may be a hidden folder, in which the next shard was being written.
        there = {path.name: path.read_bytes() for path in folder.glob("gaps-*.parquet")}
        assert all(uninterrupted[name] == content for name, content in there.items())
        before = len(there)
    assert 0 < before < len(uninterrupted) - 2
    process = started(folder)
    assert process.wait() == 0, process.said()
    said, _ = process.said()
    assert f"{json.loads(uninterrupted['end.json'])['gaps']:,} gaps" in said
    assert contents(folder) == uninterrupted


@pytest.mark.slow
def test_two_launched_processes_write_what_one_does(uninterrupted, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "lens_positions"]
    words = [*launch, *COMMAND, "--output", str(tmp_path / "map")]
    process = subprocess.run(words, env=environment, capture_output=True, text=True)
    said, complaint = process.stdout, process.stderr
    assert process.returncode == 0, complaint
    assert said.count("map: ") == 1
    assert contents(tmp_path / "map") == uninterrupted


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_leaves_whole_shards(uninterrupted, tmp_path):
    """No file may be longer than all but the longest shards."""
    sizes = sorted(len(content) for name, content in uninterrupted.items() if name.startswith("gaps-"))
    limit = sizes[-1] - 1

    small_files = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    process = started(tmp_path / "map", before=small_files)
    assert process.wait() == 2
    _, complaint = process.said()
    assert complaint.count("\n") == 1
    assert "the map cannot be written to" in complaint
    assert "File too large" in complaint
    assert "whole shards can be read" in complaint
    found = lp.causal.GapMap(tmp_path / "map")
    assert not found.is_whole
    assert len(found.table()) > 0
    assert set(contents(found.folder)) <= set(uninterrupted)
    assert started(found.folder).wait() == 0
    assert contents(found.folder) == uninterrupted


# Models in several places


@pytest.mark.slow
def test_a_model_that_waits_on_the_disk_gives_the_same_map(tiny_llama, tmp_path):
    byte_llama = tiny_llama(vocab_size=257, tie_word_embeddings=False)
    byte_llama.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    whole = lp.HookedPositionTransformer.from_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "lm_head": "disk", "model.rotary_emb": "cpu"}
    split = lp.HookedPositionTransformer.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offload")
    )
    one = lp.causal.gap_map(whole, TEXTS, tmp_path / "whole", **SMALL).table()
    other = lp.causal.gap_map(split, TEXTS, tmp_path / "split", **SMALL).table()
    pd.testing.assert_frame_equal(one, other, rtol=0, atol=0)


# What cannot be


def refusal(*given, **more) -> str:
    with pytest.raises(lp.PositionsError) as error:
        lp.causal.gap_map(*given, **({"progress": False} | more))
    return str(error.value)


def test_mistakes_are_one_sentence_and_touch_nothing(tiny_model, tmp_path, unchecked):
    model, new = tiny_model(source="static"), tmp_path / "new"
    assert "layer 7 has no positions of its own" in refusal(model, TEXTS, new, layers=[7])
    assert "expected from 4 to 64 tokens" in refusal(model, TEXTS, new, window=65)
    assert "expected from 2 tokens to half of a window (16)" in refusal(model, TEXTS, new, window=32, overlap=17)
    assert "shard is 0; expected at least 1" in refusal(model, TEXTS, new, shard=0)
    assert "processes is (2, 2)" in refusal(model, TEXTS, new, processes=(2, 2))
    assert "expected at least one document" in refusal(model, [" "], new)
    assert "every part is 0; expected another one" in refusal(model, TEXTS, new, baseline="mean")
    assert "baseline is 'most'" in refusal(model, TEXTS, new, baseline="most")
    assert "baseline is nan" in refusal(model, TEXTS, new, baseline=math.nan)
    assert not new.exists()
    with pytest.raises(lp.PositionsError, match="there is no map in"):
        lp.causal.GapMap(new).table()


@pytest.mark.slow
def test_a_folder_of_something_else_is_refused_and_left_alone(tiny_model, tmp_path):
    model = tiny_model(source="static")
    found = lp.causal.gap_map(model, TEXTS, tmp_path / "map", **SMALL)
    before = contents(found.folder)
    other = tiny_model(source="static")
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 0.5
    assert "with weights " in refusal(other, TEXTS, found.folder, **SMALL)
    assert "with window 32 where this one has 30" in refusal(model, TEXTS, found.folder, **SMALL | {"window": 30})
    assert "with layers [0, 1] where this one has [0]" in refusal(model, TEXTS, found.folder, layers=0, **SMALL)
    learned = tiny_model(source="per_layer")
    of_learned = lp.causal.gap_map(learned, TEXTS[1:2], tmp_path / "learned", **SMALL)
    with torch.no_grad():
        next(learned.position_streams.parameters()).view(-1)[0] += 0.5
    assert "with weights " in refusal(learned, TEXTS[1:2], of_learned.folder, **SMALL)
    changed = [TEXTS[0].replace("cat", "cow"), *TEXTS[1:]]
    assert "is of other text than texts has there now" in refusal(model, changed, found.folder, **SMALL)
    assert contents(found.folder) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    assert "has other files (thesis.txt)" in refusal(model, TEXTS, tmp_path / "other")
    assert "is a file" in refusal(model, TEXTS, tmp_path / "other" / "thesis.txt")
    found.shards[0].write_bytes(b"PAR1 and then nothing")
    assert "is damaged" in refusal(model, TEXTS, found.folder, **SMALL)
    (found.folder / "map.json").write_text("{")
    assert "map.json is damaged" in refusal(model, TEXTS, found.folder, **SMALL)


# The table


def written_map(folder: Path, gradient, seed: int = 0) -> lp.causal.GapMap:
    """A map whose gradients a function of the text before each gap decides; 20 documents, one layer, small shards."""
    generator = np.random.default_rng(seed)
    folder.mkdir()
    shards = 0
    documents = [Document(f"One two {number}, three. Four five.\nsix", "made") for number in range(20)]
    tokens = [
        Tokens(number, document, torch.tensor([256, *document.text.encode()]), byte_tokenizer(), False)
        for number, document in enumerate(documents)
    ]
    for number, windows in enumerate(shards_of(tokens, 16, 4, 3)):
        found = []
        for one in windows:
            text = bytes(min(i, 255) for i in one.tokens.ids.tolist()).decode("latin-1")
            values = [[gradient(text, t, layer, generator) for t in range(one.start, one.stop)] for layer in (0, 1)]
            values = np.array(values, dtype=np.float32)
            found.append(Gradients(np.ones_like(values), values, np.ones(one.stop - one.start, dtype=np.float32)))
        write_shard(folder, number, rows_of(windows, found, [3, 5]), "x")
        shards += 1
    settings = {"format": 1, "model": "made", "corpus": "made", "layers": [3, 5]}
    (folder / "map.json").write_text(json.dumps(settings))
    (folder / "end.json").write_text(json.dumps({"shards": shards, "documents": 20, "gaps": 1}))
    return lp.causal.GapMap(folder)


def spaces_are_too_short(text, t, layer, generator):
    return generator.normal() * 0.1 - (0.5 if layer == 0 and " " in text[t - 1 : t + 1] else 0.0)


@pytest.mark.slow
def test_the_table_finds_what_was_put_in_and_shuffles_do_not(tmp_path):
    found = written_map(tmp_path / "map", spaces_are_too_short)
    table = lp.causal.map_summary(found).set_index(["boundary", "layer"])
    assert table.loc[("word", 3), "wants"] == "longer"
    assert table.loc[("word", "all"), "wants"] == "longer"
    assert table.loc[("word", 5), "wants"] == "undecided"
    assert table.loc[("inside a word", 3), "wants"] == "undecided"
    assert table.loc[("word", 3), "longer"] > 0.8
    rows = found.table()
    rows["boundary"] = np.select(
        [rows[f"crosses_{name}"] for name in ("document", "line", "sentence", "word")],
        ["document", "line", "sentence", "word"],
        "inside a word",
    )
    expected = rows.groupby(["boundary", "layer"])["gradient"].mean()
    for key, mean in expected.items():
        assert table.loc[key, "gradient"] == pytest.approx(mean, abs=1e-6)
    of_documents = rows.assign(chance=rows.groupby(["document", "layer"])["gradient"].transform("mean"))
    chance = of_documents.groupby(["boundary", "layer"])["chance"].mean()
    for key, mean in chance.items():
        row = table.loc[key]
        assert row["gradient"] - row["difference"] == pytest.approx(mean, abs=1e-6)
        assert row["shuffled_low"] < mean < row["shuffled_high"]
    assert table["n"].loc[("word", "all")] == (rows["boundary"] == "word").sum() / 2


@pytest.mark.slow
def test_noise_alone_is_undecided(tmp_path):
    """Of 60 rows, one layer each, of six maps."""
    decided = []
    for seed in range(6):
        found = written_map(tmp_path / str(seed), lambda text, t, layer, generator: generator.normal(), seed)
        table = lp.causal.map_summary(found)
        decided += (table.loc[table["layer"] != "all", "wants"] != "undecided").tolist()
    assert len(decided) == 60
    assert np.mean(decided) <= 0.1


@pytest.mark.slow
def test_kinds_group_the_table_too(tmp_path):
    table = lp.causal.map_summary(written_map(tmp_path / "map", spaces_are_too_short), by="after_kind")
    wants = table[table["layer"] == 3].set_index("after_kind")["wants"]
    assert wants["space"] == "longer"
    assert wants["letter"] != "shorter"


def test_a_map_that_is_not_whole_has_no_table(tmp_path, unchecked):
    found = written_map(tmp_path / "map", spaces_are_too_short)
    found.shards[0].unlink()
    with pytest.raises(lp.PositionsError, match="expected a whole one"):
        lp.causal.map_summary(found)
    with pytest.raises(lp.PositionsError, match='expected "boundary"'):
        lp.causal.map_summary(found, by="colour")
    with pytest.raises(lp.PositionsError, match="expected at least one"):
        lp.causal.map_summary([])


@pytest.mark.slow
def test_the_figure_has_a_column_a_map(tmp_path):
    maps = [written_map(tmp_path / name, spaces_are_too_short) for name in ("a", "b")]
    table = lp.causal.map_summary(maps)
    table.loc[len(table) // 2 :, "model"] = "other"
    figure = lp.viz.map_chart(table, "made", tmp_path / "map.png")
    assert [axes.get_title() for axes in figure.axes[::3]] == ["made, made", "other, made"]
    with pytest.raises(lp.PositionsError, match="the table lacks"):
        lp.viz.map_chart(table.drop(columns="wants"))


# The command


@pytest.mark.slow
def test_the_commands_make_and_show_a_map(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    corpus = tmp_path / "notes.txt"
    corpus.write_text("\n\n".join(f"Note {i}: the sea is calm, and the wind is from the north." for i in range(60)))
    output = tmp_path / "map"
    given = ["map", "bilingual-rope", "--corpus", str(corpus), "--output", str(output)]
    assert cli.main(given) == 0
    said = capsys.readouterr()
    assert "gaps of 3 documents" in said.out
    assert said.err == ""
    table = tmp_path / "table.csv"
    assert cli.main(["summarise", str(output), "--csv", str(table), "--figure", str(tmp_path / "map.svg")]) == 0
    said = capsys.readouterr().out
    assert "inside a word" in said
    assert len(pd.read_csv(table)) == 7 * len(pd.read_csv(table)["boundary"].unique())
    assert (tmp_path / "map.svg").read_text().startswith("<?xml")
    for wrong, sentence in (
        ([*given, "--window", "8"], "expected another folder"),
        ([*given[:-1], str(corpus)], "is a file; expected a folder"),
        ([*given, "--baseline", "most"], "expected a number of positions, or mean"),
        ([*given, "--dtype", "float3"], "expected one such as float32"),
        (["summarise", str(tmp_path)], "there is no map in"),
        (["summarise"], "expected at least one folder"),
    ):
        assert cli.main(wrong) == 2
        said = capsys.readouterr().err
        assert sentence in said
        assert said.count("\n") == 1
