"""Pictures with edits: before and after are those of plain runs with and without hooks, and captions say the edits."""

import numpy as np
import pytest
import torch

import lens_positions as lp
from lens_positions import analysis, viz

TEXT = "The cat, 中文."


@pytest.fixture
def model(tiny_model):
    return tiny_model(source="per_layer")


def edited(model, hooks):
    with model.hooks(fwd_hooks=hooks):
        return model.positions(TEXT)[:, 0], model.increments(TEXT)[:, 0]


def test_an_edited_layer_has_its_row_below_that_without_edits(model):
    hooks = lp.add_gap(model, before=4, by=2.5, layers=1)
    data = viz.spacing_view(model, TEXT, [1], hooks=hooks).data
    assert [row["name"] for row in data["rows"]] == ["layer 1", "layer 1, edited"]
    plain, changed = model.positions(TEXT)[1, 0], edited(model, hooks)[0][1]
    for row, positions in zip(data["rows"], (plain, changed), strict=True):
        np.testing.assert_allclose(row["first"][:8], positions[1:9], rtol=1e-5)  # the special token is not drawn
    assert "Edits: the gap +2.5 before token 4 in layer 1." in data["caption"]["common"]
    assert "edited" not in str(viz.spacing_view(model, TEXT, [1]).data)

    rows = viz.tokens_view(model, TEXT, [0, 1], hooks=hooks).data["rows"]
    assert [row["name"] for row in rows] == ["layer 0", "layer 1", "layer 1, edited"]


def test_layers_of_a_static_model_that_no_edit_changes_share_a_row(tiny_model):
    model = tiny_model(source="static")
    last = model.position_layers[-1]
    rows = viz.spacing_view(model, TEXT, hooks=lp.scale(model, 2.0, layers=last)).data["rows"]
    assert {row["name"] for row in rows} >= {f"layer {last}", f"layer {last}, edited"}
    assert len(rows) == 3
    every = viz.spacing_view(model, TEXT, hooks=lp.scale(model, 2.0)).data["rows"]
    assert [row["name"] for row in every] == ["static", "static, edited"]


def test_edits_that_move_nothing_are_said_to(model):
    looking = [(f"blocks.{model.position_layers[0]}.attn.hook_increments", lambda values, hook: None)]
    caption = viz.spacing_view(model, TEXT, hooks=looking).data["caption"]["common"]
    assert "the function <lambda> at blocks.0.attn.hook_increments. They change nothing that is drawn here." in caption


def test_attention_before_and_after_stand_beside_each_other(model):
    hooks = lp.ablate(model, to=0.3, layers=0)
    view = viz.attention_view(model, TEXT, hooks=hooks)
    assert view.beside is not None
    plain = viz.attention_view(model, TEXT)
    with model.hooks(fwd_hooks=hooks):
        after = viz.attention_view(model, TEXT)
    assert view.data["patterns"] == plain.data["patterns"]
    assert view.beside.data["patterns"] == after.data["patterns"] != plain.data["patterns"]
    assert view.page().count('class="lp-view"') == 2
    assert [word in view.page() for word in ("before the edits", "after the edits", "increments at 0.3")] == [True] * 3


def test_arcs_have_one_scale_on_both_sides(model):
    hooks = lp.scale(model, 2.0, layers=0)
    figure = viz.arcs(model, TEXT, 0, 0, hooks=hooks)
    before, after = figure.axes
    places = [
        [text.get_position()[0] for text in axes.texts if str(text.get_gid()).startswith("learned-label")]
        for axes in (before, after)
    ]
    np.testing.assert_allclose(np.diff(places[1]), 2 * np.diff(places[0]), rtol=1e-4)
    said = " ".join(" ".join(text.get_text() for text in figure.texts).split())
    assert "Edits: increments times 2 in layer 0." in said
    assert viz.spacing(model, TEXT, hooks=hooks).axes


def test_the_loss_with_edits_is_that_of_a_run_with_hooks(model):
    hooks = lp.scale(model, 3.0)
    texts = ["some text here", "and another one"]
    table = analysis.compare_losses([model], texts, hooks=hooks)
    with model.hooks(fwd_hooks=hooks):
        alone = analysis.compare_losses([model], texts)["loss"][0]
    assert table["model"].tolist() == [model.name, f"{model.name}, edited"]
    np.testing.assert_allclose(table["loss"][1], alone)
    np.testing.assert_allclose(table["difference"][1], table["loss"][1] - table["loss"][0])


@pytest.mark.slow
def test_a_report_shows_edits_of_one_model_alone(model, tmp_path):
    hooks = lp.scale(model, 3.0, layers=0)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(12):
        (corpus / f"{i:02}.txt").write_text(f"Some text to hold out, and some more of it: {i}. " * 9)
    viz.report(model, tmp_path / "page.html", texts=TEXT, corpus=str(corpus), characters=400, hooks=hooks)
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "Edits: increments times 3 in layer 0. Texts are drawn without and with them." in page
    assert f"{model.name}, edited" in page
    with pytest.raises(lp.PositionsError, match="hooks came with a model to compare; expected one of them"):
        viz.report(model, tmp_path / "both.html", compare=model, hooks=hooks)


def test_edits_are_said_in_words(model):
    mask = torch.zeros(9, dtype=torch.bool).index_fill(0, torch.tensor([2, 5]), True)
    said = {
        "increments at 1 at token 3 in layers 0 and 1": lp.ablate(model, 1.0, [0, 1], 3),
        "increments at the row's mean in layer 1": lp.ablate(model, "mean", 1),
        "positions shuffled in layer 0": lp.ablate(model, "shuffle", 0, site="positions"),
        "positions times 0.5 at every token from 20 on in layer 0": lp.scale(
            model, 0.5, 0, slice(20, None), site="positions"
        ),
        "increments times 2 at every token from 1 to 8 in steps of 2 in layer 0": lp.scale(
            model, 2.0, 0, slice(1, 9, 2)
        ),
        "increments times 2 at 2 tokens of a mask in layer 0": lp.scale(model, 2.0, 0, mask),
        "the gap -1 before the tokens that a function chooses in layer 0": lp.add_gap(
            model, lambda ids: ids == 5, -1.0, 0
        ),
        "": [],
    }
    for words, hooks in said.items():
        assert lp.describe(hooks) == words
