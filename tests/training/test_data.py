"""Batches depend on the seed and the step alone, and a token cache is whole or absent."""

import itertools
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

import lens_positions.training.data
from lens_positions import corpora
from lens_positions.errors import PositionsError
from lens_positions.tokenizer import END_OF_DOCUMENT, byte_tokenizer
from lens_positions.training.data import batch, heldout_windows, tokenize_corpus

TOKENS = np.arange(1000, dtype=np.uint16) % 257


def document(index):
    return f"{index:02d} 中 document"


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(document(index) for index in range(40)), encoding="utf-8")
    return str(path)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def files(cache):
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in cache.rglob("*") if path.is_file()}


def test_tokens_are_the_bytes_of_each_document_and_its_end(corpus, cache):
    tokenized = tokenize_corpus(corpus, cache)
    splits = corpora.load(corpus)
    tokenizer = byte_tokenizer()
    for split, tokens, starts in (
        ("train", tokenized.train, tokenized.train_starts),
        ("heldout", tokenized.heldout, tokenized.heldout_starts),
    ):
        assert isinstance(tokens, np.memmap)
        assert tokens.dtype == np.uint16
        assert starts.dtype == np.int64
        expected = [
            [*tokenizer.encode(text, add_special_tokens=False), END_OF_DOCUMENT] for text in splits[split]["text"]
        ]
        assert tokens.tolist() == list(itertools.chain.from_iterable(expected))
        assert [tokens[start:end].tolist() for start, end in zip(starts, [*starts[1:], None], strict=True)] == expected
    assert tokenized.name == corpus


def test_a_cache_is_reused_untouched(corpus, cache, monkeypatch):
    first = tokenize_corpus(corpus, cache)
    before = files(cache)
    monkeypatch.setattr(lens_positions.training.data, "_write", None)
    second = tokenize_corpus(corpus, cache)
    assert files(cache) == before
    assert second.fingerprint == first.fingerprint


def test_changed_text_is_another_cache(corpus, cache, tmp_path):
    before = tokenize_corpus(corpus, cache)
    with open(corpus, "a", encoding="utf-8") as file:
        file.write("!")
    after = tokenize_corpus(corpus, cache)
    capped = tokenize_corpus(corpus, cache, max_bytes=100)
    assert len({before.fingerprint, after.fingerprint, capped.fingerprint}) == 3
    assert after.heldout.tolist() != before.heldout.tolist()


@pytest.mark.parametrize("name", ["train", "heldout", "train_starts", "heldout_starts"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_a_damaged_cache_is_rebuilt(corpus, cache, name, damage):
    whole = tokenize_corpus(corpus, cache)
    expected = (whole.train.tolist(), whole.heldout.tolist(), whole.train_starts.tolist())
    path = next(cache.rglob(f"{name}.npy"))
    content = path.read_bytes()
    path.unlink()
    if damage == "truncate":
        path.write_bytes(content[:-3])
    elif damage == "flip":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    rebuilt = tokenize_corpus(corpus, cache)
    assert (rebuilt.train.tolist(), rebuilt.heldout.tolist(), rebuilt.train_starts.tolist()) == expected
    assert path.read_bytes() == content


def test_damaged_digests_are_rebuilt(corpus, cache):
    tokenize_corpus(corpus, cache)
    digests = next(cache.rglob("digests.json"))
    digests.write_text("{", encoding="utf-8")
    tokenize_corpus(corpus, cache)
    assert digests.read_text(encoding="utf-8").endswith("}")


def killed_midway(corpus, cache):
    documents = lens_positions.training.data._documents

    def killing(split):
        for number, one in enumerate(documents(split)):
            if number == 5 and list(cache.rglob(".train*/new")):
                os.kill(os.getpid(), signal.SIGKILL)
            yield one

    lens_positions.training.data._documents = killing
    tokenize_corpus(corpus, cache)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_writer_leaves_no_half_file_and_the_next_one_succeeds(corpus, cache):
    writer = multiprocessing.get_context("fork").Process(target=killed_midway, args=(corpus, cache))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    assert list(cache.rglob(".train.npy*/new"))
    assert not list(cache.rglob("train.npy"))
    assert not list(cache.rglob("digests.json"))
    assert len(tokenize_corpus(corpus, cache).train_starts) == 38


def test_a_failing_writer_cleans_up_after_itself(corpus, cache, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(PositionsError, match=r"could not be written to .* disk full"):
        tokenize_corpus(corpus, cache)
    assert files(cache) == {}


def test_a_cache_folder_that_is_a_file_is_refused(corpus, tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(PositionsError, match="could not be written"):
        tokenize_corpus(corpus, tmp_path / "taken")


def test_max_bytes_caps_the_text_at_the_end_of_a_document(corpus, cache):
    length = len(document(0).encode())
    capped = tokenize_corpus(corpus, cache, max_bytes=11 * length)
    assert len(capped.train_starts) == 10
    assert len(capped.heldout_starts) == 1
    assert len(capped.train) == 10 * (length + 1)
    with pytest.raises(PositionsError, match="max_bytes is 0"):
        tokenize_corpus(corpus, cache, max_bytes=0)


def test_a_hub_stream_is_capped_deduplicated_and_then_read_offline(cache, monkeypatch):
    texts = [document(index) for index in range(60)]
    texts[3] = document(39)

    def load_dataset(*arguments, **options):
        return Dataset.from_dict({"text": texts}).to_iterable_dataset()

    monkeypatch.setattr(corpora, "load_dataset", load_dataset)
    with pytest.raises(PositionsError, match=r"'owner/name' is streamed .* expected max_bytes"):
        tokenize_corpus("owner/name", cache)
    stream = tokenize_corpus("owner/name", cache, max_bytes=10_000)
    assert len(stream.heldout_starts) == 3
    assert len(stream.train_starts) == 56
    assert document(39).encode() not in bytes(stream.train.astype("u1"))
    monkeypatch.setattr(corpora, "load_dataset", None)
    assert tokenize_corpus("owner/name", cache, max_bytes=10_000).train.tolist() == stream.train.tolist()


def test_a_stream_too_short_to_hold_out_is_refused(cache, monkeypatch):
    stream = Dataset.from_dict({"text": ["a"] * 19}).to_iterable_dataset()
    monkeypatch.setattr(corpora, "load_dataset", lambda *arguments, **options: stream)
    with pytest.raises(PositionsError, match="the heldout split of the corpus has no text"):
        tokenize_corpus("owner/name", cache, max_bytes=100)


@given(seed=st.integers(0, 2**32), n=st.integers(0, 2**32))
def test_a_batch_is_a_pure_function_of_seed_and_step(seed, n):
    state = np.random.get_state()[1].copy(), torch.get_rng_state()
    one = batch(TOKENS, seed=seed, n=n, batch_size=4, n_ctx=16)
    batch(TOKENS, seed=seed, n=n + 1, batch_size=4, n_ctx=16)
    assert torch.equal(one, batch(TOKENS.copy(), seed=seed, n=n, batch_size=4, n_ctx=16))
    assert (np.random.get_state()[1] == state[0]).all()
    assert torch.equal(torch.get_rng_state(), state[1])


def test_batches_are_windows_of_the_stream_and_differ_by_seed_and_step():
    one = batch(TOKENS, seed=0, n=0, batch_size=64, n_ctx=16)
    assert one.shape == (64, 17)
    assert one.dtype == torch.int64
    assert ((one[:, 1:] - one[:, :-1]) % 257 == 1).all()
    assert not torch.equal(one, batch(TOKENS, seed=0, n=1, batch_size=64, n_ctx=16))
    assert not torch.equal(one, batch(TOKENS, seed=1, n=0, batch_size=64, n_ctx=16))


def test_every_offset_can_be_drawn_and_none_beyond_the_end():
    tokens = np.arange(20, dtype=np.uint16)
    drawn = batch(tokens, seed=0, n=0, batch_size=1000, n_ctx=16)
    assert set(drawn[:, 0].tolist()) == {0, 1, 2, 3}
    assert batch(tokens, seed=0, n=0, batch_size=2, n_ctx=19).tolist() == [list(range(20))] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_ctx": 1000}, "has 1000 tokens: expected at least 1001"),
        ({"n_ctx": 0}, "n_ctx is 0"),
        ({"seed": -1}, "got seed -1"),
        ({"n": -1}, "n -1"),
        ({"batch_size": 0}, "batch_size 0"),
    ],
)
def test_a_batch_that_cannot_be_drawn_is_refused(change, message):
    with pytest.raises(PositionsError, match=message):
        batch(TOKENS, **({"seed": 0, "n": 0, "batch_size": 2, "n_ctx": 16} | change))


def test_all_heldout_windows_predict_each_token_once():
    tokens = np.arange(100, dtype=np.uint16)
    windows = heldout_windows(tokens, n_ctx=9, max_windows=100)
    assert windows.shape == (11, 10)
    assert windows[:, 1:].flatten().tolist() == list(range(1, 100))


@given(length=st.integers(11, 2000), n_ctx=st.integers(1, 10), max_windows=st.integers(1, 50))
def test_kept_windows_are_distinct_and_spread_over_the_whole_stream(length, n_ctx, max_windows):
    windows = heldout_windows(np.arange(length, dtype=np.uint16), n_ctx, max_windows)
    starts = windows[:, 0]
    available = (length - 1) // n_ctx
    assert len(windows) == min(available, max_windows)
    assert torch.equal(windows, starts[:, None] + torch.arange(n_ctx + 1))
    assert starts[0] == 0
    assert (starts % n_ctx == 0).all()
    gaps = torch.diff(torch.cat([starts, torch.tensor([available * n_ctx])])) // n_ctx
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def test_heldout_windows_that_cannot_be_cut_are_refused():
    with pytest.raises(PositionsError, match="has 16 tokens: expected at least 17"):
        heldout_windows(TOKENS[:16], 16, 4)
    with pytest.raises(PositionsError, match="max_windows is 0"):
        heldout_windows(TOKENS, 16, 0)
