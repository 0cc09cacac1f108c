"""Extremes: they are found where they are, with their context, relative to the mean of their layer."""

import pandas as pd
import pytest
import torch

import lens_positions as lp
from lens_positions import corpora
from lens_positions.analysis.extremes import extreme_tokens, vocabulary_increments
from lens_positions.analysis.token_kinds import increments_by_category
from lens_positions.cli import main
from lens_positions.measure.corpus_reader import read_corpus


@pytest.fixture
def table_model(tiny_config):
    """A frozen source whose increments are known: 1, but for three bytes."""
    model = lp.HookedPositionTransformer.from_config(tiny_config(source="frozen"))
    table = model.position_streams.shared_source.table
    table.fill_(1.0)
    for character, increment in (("z", 3.0), ("q", 2.0), ("e", 0.25)):
        table[ord(character)] = increment
    return model


def test_the_vocabulary_of_a_frozen_source_is_ranked(table_model):
    found = extreme_tokens(table_model, top=2)
    mean = (254 + 3 + 2 + 0.25) / 257
    assert list(found["token"]) == ["z", "q", "e", found["token"][3]]
    assert list(found["end"]) == ["largest", "largest", "smallest", "smallest"]
    assert list(found["rank"]) == [1, 2, 1, 2]
    assert list(found["increment"]) == [3, 2, 0.25, 1]
    assert found["relative"][0] == pytest.approx(3 / mean)
    assert found["kind"][0] == "letter"
    every = vocabulary_increments(table_model)
    assert len(every) == 257
    assert every.loc[256, "token"] == "<|endofdocument|>"
    assert every["relative"].mean() == pytest.approx(1)


def test_extremes_of_texts_stand_in_their_context(table_model):
    found = extreme_tokens(table_model, ["A quiet zoo.", "The sea, 中文q"], top=2)
    first = found[found["layer"] == 0]
    assert list(first["context"][:3]) == ["A quiet ⟦z⟧oo.", "A ⟦q⟧uiet zoo.", "A qui⟦e⟧t zoo."]
    assert list(first["n"][:3]) == [1, 2, 3]
    assert list(found.columns) == [
        "layer", "end", "rank", "token", "kind", "increment", "relative", "context", "n", "mean_of_token",
    ]  # fmt: skip
    pd.testing.assert_frame_equal(
        found[found["layer"] == 1].drop(columns="layer").reset_index(drop=True),
        first.drop(columns="layer").reset_index(drop=True),
    )


def test_each_token_is_listed_once_by_its_most_extreme_occurrence(tiny_model):
    model = tiny_model(source="per_layer")
    text = "the cat that sat then went, 中文 中国"
    found, increments = extreme_tokens(model, text, top=1000), model.increments(text)[:, 0, 1:]
    for layer in (0, 1):
        for end, extreme in (("largest", increments[layer].max()), ("smallest", increments[layer].min())):
            rows = found[(found["layer"] == layer) & (found["end"] == end)]
            assert rows["token"].is_unique or rows.groupby("token").size().max() <= 3  # bytes that share a label
            end_token = rows[rows["token"] != "<|endofdocument|>"].iloc[0]
            assert end_token["increment"] == pytest.approx(extreme.item(), abs=1e-5)
            assert (
                rows["increment"].is_monotonic_decreasing
                if end == "largest"
                else rows["increment"].is_monotonic_increasing
            )
            assert rows["n"].sum() == increments.shape[1] + 1  # and the end of the document
    wide = found[(found["end"] == "largest") & found["context"].str.contains("⟦中₁⟧")]
    assert len(wide) == 2


def test_relative_increments_are_to_the_mean_of_the_layer(tiny_model):
    model = tiny_model(source="per_layer", per_head=True)
    corpus = read_corpus(model, ["one two", "three 中 four"])
    found = extreme_tokens(model, corpus, top=3)
    mean = corpus.increments.mean(axis=(1, 2))
    assert (found["increment"] / found["relative"]).to_numpy() == pytest.approx(mean[found["layer"]])
    table = increments_by_category(model, corpus)
    assert (table["mean"] / table["relative"]).to_numpy() == pytest.approx(mean[table["layer"]])
    inside = table.dropna()
    assert ((inside["relative_low"] <= inside["relative"]) & (inside["relative"] <= inside["relative_high"])).all()


def test_a_constant_factor_moves_nothing_relatively(table_model):
    before = increments_by_category(table_model, ["a quiet zoo", "the sea"])
    table_model.position_streams.shared_source.table.mul_(4)
    after = increments_by_category(table_model, ["a quiet zoo", "the sea"])
    assert after["mean"].to_numpy() == pytest.approx(4 * before["mean"].to_numpy())
    for column in ("relative", "relative_low", "relative_high"):
        assert after[column].to_numpy() == pytest.approx(before[column].to_numpy(), nan_ok=True)


def test_what_cannot_be_ranked_is_refused(tiny_model, table_model):
    with pytest.raises(lp.PositionsError, match=r"'per_layer'.*expected texts to read"):
        extreme_tokens(tiny_model(source="per_layer"))
    with pytest.raises(lp.PositionsError, match="every increment is 1"):
        extreme_tokens(tiny_model(source="static"), "some text")
    with pytest.raises(lp.PositionsError, match="top is 0"):
        extreme_tokens(table_model, top=0)
    table_model.tokenizer = None
    for measure in (extreme_tokens, lambda model: increments_by_category(model, torch.tensor([97, 98]))):
        with pytest.raises(lp.PositionsError, match="no tokenizer"):
            measure(table_model)


def test_excerpts_are_spread_over_the_held_out_documents(tmp_path):
    for i in range(60):
        (tmp_path / f"{i:02}.txt").write_text(f"{i} " + "word " * 2000)
    whole = corpora.load(str(tmp_path))["heldout"]["text"]
    assert corpora.heldout_excerpts(str(tmp_path), 10**6) == list(whole)
    pieces = corpora.heldout_excerpts(str(tmp_path), 6000)
    assert len(pieces) == 3
    assert all(len(piece) == 2000 and document.startswith(piece) for piece, document in zip(pieces, whole, strict=True))
    assert sum(map(len, corpora.heldout_excerpts(str(tmp_path), 100))) <= 100
    with pytest.raises(lp.PositionsError, match="characters is 0"):
        corpora.heldout_excerpts(str(tmp_path), 0)
    with pytest.raises(lp.PositionsError, match="streamed from the hub"):
        corpora.heldout_excerpts("owner/name", 10)


@pytest.fixture
def saved(table_model, tiny_model, tmp_path):
    table_model.save_pretrained(tmp_path / "frozen")
    tiny_model(source="per_layer").save_pretrained(tmp_path / "per_layer")
    (tmp_path / "text.txt").write_text("A quiet zoo.\n\nThe <b>sea</b>, 中文.\n\nThree [red] words.")
    return tmp_path


def test_extremes_prints_the_vocabulary_of_a_frozen_source(saved, capsys):
    assert main(["extremes", str(saved / "frozen"), "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert "257 token ids" in out
    assert out.index("⟦z⟧") < out.index("⟦q⟧") < out.index("⟦e⟧")


def test_extremes_reads_a_corpus_and_writes_a_table(saved, capsys):
    given = ["extremes", str(saved / "per_layer"), "--corpus", str(saved / "text.txt"), "--layers", "1", "--top", "3"]
    assert main([*given, "--csv", str(saved / "moved.csv")]) == 0
    out = capsys.readouterr().out
    assert "layer 1" in out
    assert "layer 0" not in out
    assert "held-out documents" in out
    table = pd.read_csv(saved / "moved.csv")
    assert set(table["layer"]) == {1}
    assert len(table) == 6
    model = lp.HookedPositionTransformer.from_pretrained(saved / "per_layer")
    increments = model.increments("Three [red] words.")[1, 0, 1:]
    largest = table[(table["end"] == "largest") & (table["token"] != "<|endofdocument|>")].iloc[0]
    assert largest["increment"] == pytest.approx(increments.max().item(), abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{saved}/per_layer"], "expected texts to read (--corpus on the command line)"),
        (["{saved}/per_layer", "--corpus", "klingon"], "'klingon' is no corpus"),
        (["{saved}/per_layer", "--corpus", "{saved}/text.txt", "--layers", "7"], "layer 7 is not there; expected some"),
        (["{saved}/frozen", "--csv", "{saved}/nowhere/x.csv"], "there is no folder"),
        (["{saved}/frozen", "--csv", "{saved}"], "is a folder"),
        (["{saved}/frozen", "--top", "0"], "top is 0"),
        (["{saved}/nothing"], "no model folder at"),
    ],
)
def test_bad_requests_end_in_one_sentence(saved, capsys, arguments, says):
    assert main(["extremes", *(argument.format(saved=saved) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_window_is_no_longer_than_it_must_be(tiny_model, monkeypatch):
    """Attention costs the square of a window, and a pretrained model's context is thousands of tokens."""
    from lens_positions.measure import corpus_reader as reading

    monkeypatch.setattr(reading, "WINDOW", 16)
    model, seen = tiny_model(source="shared"), []
    plain = model.increments
    monkeypatch.setattr(model, "increments", lambda rows, mask: seen.append(rows.shape[1]) or plain(rows, mask))
    found = read_corpus(model, "a" * 100)
    assert max(seen) == 16
    assert found.increments.shape[-1] == 101
    assert torch.equal(torch.from_numpy(found.index).sort().values, torch.arange(1, 102))
