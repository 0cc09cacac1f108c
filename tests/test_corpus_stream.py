"""Documents one after another: the same that `corpora.load` has, without all of them in memory."""

import json
from pathlib import Path

import pytest

import lens_positions as lp
from lens_positions import corpus_stream
from lens_positions.corpus_stream import Documents

TEXTS = [f"Document {i} of the sea,\nand the wind. 中文" + "!" * i for i in range(45)]


@pytest.fixture(params=["text", "jsonl", "folder", "few"])
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        (tmp_path / "c").mkdir()
        for i, text in enumerate(TEXTS):
            (tmp_path / "c" / f"{i:02}.txt").write_text(text, "utf-8")
        (tmp_path / "c" / ".hidden").write_text("no")
        return str(tmp_path / "c")
    if request.param == "jsonl":
        path = tmp_path / "c.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        return str(path)
    path = tmp_path / "c.txt"
    path.write_text("\n \n\t\n".join(TEXTS[:3] if request.param == "few" else TEXTS), "utf-8")
    return str(path)


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_the_stream_holds_out_what_the_corpus_does(corpus, monkeypatch, block):
    monkeypatch.setattr(corpus_stream, "BLOCK", block)
    heldout = lp.corpora.load(corpus)["heldout"]
    found = list(Documents(corpus))
    assert [one.text for one in found] == list(heldout["text"])
    assert [one.source for one in found] == list(heldout["source"])
    assert Documents(corpus).characters == sum(map(len, heldout["text"]))
    assert all(one.whole for one in found)


def test_all_is_every_document_in_order(corpus):
    found = [one.text for one in Documents(corpus, "all")]
    assert found in (TEXTS, TEXTS[:3])


def test_a_limit_cuts_and_says_so(corpus):
    found = list(Documents(corpus, "all", characters=50))
    assert "".join(one.text for one in found) == "".join(TEXTS)[:50]
    assert [one.whole for one in found] == [True, False]


@pytest.mark.slow
def test_excerpts_are_those_of_other_measurements():
    found = list(Documents("chinese", characters=3_000))
    assert [one.text for one in found] == lp.corpora.heldout_excerpts("chinese", 3_000)
    assert {one.source for one in found} == {"peoples_daily", "reviews"}


def refusal(*given, **more) -> str:
    with pytest.raises(lp.PositionsError) as error:
        Documents(*given, **more)
    return str(error.value)


def test_text_that_ends_in_the_middle_of_a_character_is_refused_before_any_work(tmp_path):
    path = tmp_path / "cut.txt"
    path.write_bytes("\n\n".join(TEXTS).encode()[:-46])
    assert path.read_bytes()[-2:] == "中文".encode()[-4:-2]
    assert "ends or breaks off in the middle of a character near byte" in refusal(str(path))
    path.write_bytes(b"good text\n\nbad \xff text")
    assert "expected UTF-8" in refusal(str(path))


def test_what_has_no_text_is_refused(tmp_path, unchecked):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n \n")
    assert "has no held-out text" in refusal(str(empty))
    assert "has no text" in refusal(str(empty), "all")
    assert "has no text" in refusal([])
    assert "is empty" in refusal(str(empty.with_suffix(".jsonl").touch() or empty.with_suffix(".jsonl")))
    assert "is no corpus" in refusal("no such thing")
    assert "expected documents as texts" in refusal(["a", 3])
    assert "expected at least 1" in refusal(["a"], characters=0)
    assert 'expected "heldout" or "all"' in refusal(["a"], "train")
