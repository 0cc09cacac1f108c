"""Views and figures hold what the model computed: positions, increments and attention, each number in its place."""

import base64
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.patches import Arc
from tiny_models import drawn_weights

import lens_positions as lp
from lens_positions import viz
from lens_positions.analysis.token_kinds import increments_by_category
from lens_positions.viz import output as plain
from lens_positions.viz.interactive import View

TEXT = "The cat, 中文."


def small_model(n_layers=3, n_ctx=64, **positions):
    config = lp.PositionModelConfig(
        d_model=32, n_layers=n_layers, n_heads=4, d_mlp=48, n_ctx=n_ctx, positions=lp.PositionConfig(**positions)
    )
    return drawn_weights(lp.HookedPositionTransformer.from_config(config))


@pytest.fixture(scope="module")
def model():
    return small_model()


def unpacked(view, layer):
    """The patterns of a layer in an attention view, [head, query, key]."""
    heads, n = view.data["heads"], len(view.data["labels"])
    whole = np.frombuffer(base64.b64decode(view.data["patterns"][layer]), dtype="<u2").reshape(heads, -1)
    patterns = torch.zeros(heads, n, n)
    patterns[:, *torch.tril_indices(n, n)] = torch.from_numpy(whole.astype(np.float32) / 65535)
    return patterns


def test_a_spacing_view_holds_positions_and_increments_of_every_unit(model):
    data = viz.spacing_view(model, TEXT).data
    assert data["units"] == list("The␣cat,␣中文.")
    assert data["boundary"] == [unit in "␣,." for unit in data["units"]]
    positions, increments = model.positions(TEXT)[:, 0], model.increments(TEXT)[:, 0]
    first = [1 + len(TEXT[:i].encode()) for i in range(len(TEXT))]
    for layer, row in enumerate(data["rows"]):
        assert row["name"] == f"layer {layer}"
        assert row["first"] == pytest.approx(positions[layer, first].tolist(), abs=1e-3)
        assert row["increments"][9] == pytest.approx(increments[layer, first[9] : first[9] + 3].tolist(), abs=1e-4)
        assert row["mean"] == pytest.approx(float(increments[layer, 2:].mean()), abs=1e-3)
        assert row["last"][9] == pytest.approx(float(positions[layer, first[9] + 2]), abs=1e-3)


def test_a_static_model_is_one_row_called_static():
    view = viz.spacing_view(small_model(source="static"), TEXT)
    (row,) = view.data["rows"]
    assert row["name"] == "static"
    assert "static increments" in view.data["caption"]["relative"]


def test_rows_that_cannot_be_divided_by_their_mean_keep_one_scale():
    model = small_model(activation="none")
    with torch.no_grad():
        for name, bias in model.position_streams.named_parameters():
            if name.endswith("out.bias"):
                bias.fill_(-30.0)
    assert viz.spacing_view(model, TEXT).data["relative"] is False


def test_tokens_are_tinted_by_the_share_of_the_mean_that_they_deviate(model):
    data = viz.tokens_view(model, TEXT).data
    assert data["labels"][-4:] == ["文₁", "文₂", "文₃", "."]
    for layer, row in enumerate(data["rows"]):
        increments = model.increments(TEXT)[layer, 0, 1:]
        mean = increments[1:].mean()
        assert row["relative"] == pytest.approx((increments / mean - 1).tolist(), abs=1e-3)


def test_negative_increments_are_tinted_by_how_far_they_reach():
    model = small_model(activation="none")
    with torch.no_grad():
        for name, bias in model.position_streams.named_parameters():
            if name.endswith("out.bias"):
                bias.fill_(-30.0)
    for layer, row in enumerate(viz.tokens_view(model, TEXT).data["rows"]):
        increments = model.increments(TEXT)[layer, 0, 1:]
        assert row["mean"] < 0
        reach = increments.abs() / increments[1:].mean().abs()
        assert row["relative"] == pytest.approx((reach - 1).tolist(), abs=1e-3)


def test_an_increment_that_moves_nothing_has_no_tint():
    (row, *_) = viz.tokens_view(small_model(gap="after"), TEXT).data["rows"]
    assert row["relative"][-1] == 0
    assert all(row["relative"][:-1])


def test_one_token_has_its_own_increment_as_its_mean(model):
    (row, *_) = viz.spacing_view(model, "a").data["rows"]
    assert row["mean"] == pytest.approx(float(model.increments("a")[0, 0, 1]), abs=1e-5)


def test_tiny_increments_keep_their_digits():
    model = small_model()
    with torch.no_grad():
        for name, parameter in model.position_streams.named_parameters():
            if ".out." in name:
                parameter.fill_(-9.0 if name.endswith("bias") else 0.01)
    data = viz.spacing_view(model, TEXT).data
    assert data["relative"]
    for layer, row in enumerate(data["rows"]):
        exact = float(model.increments(TEXT)[layer, 0, 2:].double().mean())
        assert row["mean"] == pytest.approx(exact, rel=1e-3)
        assert row["mean"] < 0.02


@pytest.mark.parametrize(("layers", "rows"), [(0, 1), ([2, 0], 2), (None, 3)])
def test_layers_are_one_or_several(model, layers, rows, unchecked):
    assert len(viz.spacing_view(model, TEXT, layers).data["rows"]) == rows


def test_an_attention_view_holds_the_patterns_of_the_model(model):
    view = viz.attention_view(model, TEXT)
    _, cache = model.run_with_cache(TEXT)
    for layer in range(3):
        torch.testing.assert_close(unpacked(view, layer), cache["pattern", layer][0], rtol=0, atol=1e-5)
        row = view.data["rows"][layer]
        assert row["positions"][0] == pytest.approx(model.positions(TEXT)[layer, 0].tolist(), abs=1e-3)
        assert row["increments"][0] == pytest.approx(model.increments(TEXT)[layer, 0].tolist(), abs=1e-4)


def test_an_attention_view_has_the_positions_of_each_head():
    model = small_model(per_head=True)
    row = viz.attention_view(model, TEXT).data["rows"][1]
    expected = model.positions(TEXT)[1, 0].T
    assert torch.tensor(row["positions"]) == pytest.approx(expected, abs=1e-3)


def test_views_say_what_they_cut():
    model = small_model(n_ctx=128)
    assert (
        "The first 47 of 100 characters are drawn (they are 48 tokens)."
        in viz.attention_view(model, "a" * 100).data["caption"]
    )
    captions = viz.spacing_view(model, "b" * 200).data["caption"]
    assert "The first 127 of 200 characters are drawn (the model's context is 128 tokens)." in captions["common"]


def test_a_model_that_shows_no_patterns_is_refused_in_a_sentence(model, monkeypatch):
    hidden = {name: point for name, point in model.hook_dict.items() if not name.endswith("hook_pattern")}
    monkeypatch.setattr(type(model), "hook_dict", property(lambda self: hidden))
    with pytest.raises(lp.PositionsError, match="shows no attention patterns"):
        viz.attention_view(model, TEXT)


HOSTILE = "</script><script>window.hacked=1</script><!--&amp;\"'\u2028"


def test_a_fragment_has_no_markup_of_the_text(model):
    page = viz.spacing_view(model, HOSTILE).page()
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    assert "".join(json.loads(data)["units"]) == "".join(map(plain.visible_character, HOSTILE))
    assert page.count("hacked") == 0  # spelled character by character, and escaped in JSON
    escaped = View("tokens", "</h3><script>hacked", {"labels": ["</script><script>hacked"]}).fragment()
    assert escaped.count("<script") == escaped.count("</script>") == 1


def test_a_notebook_shows_the_same_page_in_a_frame(model):
    view = viz.attention_view(model, TEXT)
    shown = view._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    assert shown.count("<") == 2  # the page is an attribute
    assert view.page().count("var CircuitsVis=") == 1
    assert "sourceMappingURL" not in view.page()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("view.txt", "expected a name that ends in .html"),
        ("no/view.html", "there is no folder"),
        ("x.html", "is a folder"),
    ],
)
def test_a_page_that_cannot_be_written_is_refused(model, tmp_path, name, said):
    (tmp_path / "x.html").mkdir()
    with pytest.raises(lp.PositionsError, match=said):
        viz.spacing_view(model, "ab").save(tmp_path / name)


def arcs_drawn(figure, ruler):
    """The ends, heights and widths of the arcs on a ruler, by key."""
    found = {}
    for patch in figure.axes[0].patches:
        name, key = patch.get_gid().split("-")
        if isinstance(patch, Arc) and name == ruler:
            (x, _), reach = patch.get_center(), patch.width / 2
            found[int(key)] = (x - reach, x + reach, patch.get_linewidth())
    return found


def labels_at(figure, ruler):
    return {
        int(text.get_gid().rsplit("-", 1)[1]): text.get_position()[0]
        for text in figure.axes[0].texts
        if (text.get_gid() or "").startswith(f"{ruler}-label")
    }


def test_arcs_end_where_attention_is_and_tokens_stand_at_their_positions(model):
    token, layer, head = 9, 1, 2
    figure = viz.arcs(model, "The cat sat.", layer, head, token)
    positions = model.positions("The cat sat.")[layer, 0]
    learned = ((positions - positions.min()) / (positions.max() - positions.min())).tolist()
    counted = [i / 12 for i in range(13)]
    _, cache = model.run_with_cache("The cat sat.")
    weights = cache["pattern", layer][0, head, token].tolist()
    for ruler, x in (("learned", learned), ("counted", counted)):
        assert labels_at(figure, ruler) == pytest.approx(dict(enumerate(x)), abs=1e-5)
        drawn = arcs_drawn(figure, ruler)
        assert set(drawn) == {key for key, weight in enumerate(weights) if weight >= 0.01}
        for key, (left, right, width) in drawn.items():
            assert width == pytest.approx(0.5 + 4 * weights[key], abs=1e-4)
            if abs(x[key] - x[token]) > 0.012:
                assert (left, right) == pytest.approx(sorted((x[key], x[token])), abs=1e-5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"layer": 3}, "layer is 3; expected one of the layers with positions \\(0, 1, 2\\)"),
        ({"head": 4}, "head is 4; expected one from 0 to 3"),
        ({"token": 13}, "token is 13; expected one from 0 to 12"),
        ({"text": ""}, "the text is empty"),
        ({"path": "a.gif"}, "ends in .png, .svg or .pdf"),
    ],
)
def test_arcs_of_what_is_not_there_are_refused(model, given, said):
    with pytest.raises(lp.PositionsError, match=said):
        viz.arcs(model, **{"text": "The cat sat.", "layer": 0, "head": 0} | given)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("text", ["<b>&amp; $x_1$ \\frac ^{ [red]", "שלום 👩‍👩‍👧 e\u0301\n\t\x1b", "a" * 5000])
def test_arcs_of_hostile_text_are_drawn(model, text, tmp_path):
    viz.arcs(model, text, 0, 0, path=tmp_path / "arcs.svg")
    assert (tmp_path / "arcs.svg").stat().st_size > 1000


TEXTS = ["The cat sat. It was 12.\n", "A dog ran, and so on!\n", "中文在这里。\n"]


def test_kinds_stand_at_their_means_with_their_intervals(model, tmp_path):
    table = increments_by_category(model, TEXTS)
    figure = viz.kinds_chart(table, "caption", tmp_path / "kinds.png")
    assert [axes.get_title() for axes in figure.axes] == ["layer 0", "layer 1", "layer 2"]
    for layer, axes in enumerate(figure.axes):
        rows = table[table["layer"] == layer]
        dots, bars = (next(c for c in axes.collections if kind in type(c).__name__) for kind in ("Path", "Line"))
        assert dots.get_offsets()[:, 0].tolist() == pytest.approx(rows["relative"].tolist())
        several = ~rows["relative_low"].isna().to_numpy()
        ends = np.array([segment[:, 0] for segment in bars.get_segments() if len(segment)])
        assert ends == pytest.approx(rows[["relative_low", "relative_high"]].to_numpy()[several])


def test_kinds_below_zero_are_in_sight(model):
    table = increments_by_category(model, TEXTS)
    table.loc[0, ["relative", "relative_low", "relative_high"]] = [-1.0, -1.4, -0.5]
    for axes in viz.kinds_chart(table).axes:
        assert axes.get_xlim()[0] < -1.4


@pytest.mark.slow
def test_kinds_in_many_layers_are_a_map():
    table = increments_by_category(small_model(n_layers=9), TEXTS)
    figure = viz.kinds_chart(table)
    (image,) = figure.axes[0].get_images()
    expected = table.pivot(index="kind", columns="layer", values="relative").loc[list(dict.fromkeys(table["kind"]))]
    np.testing.assert_allclose(image.get_array(), expected)
    low, high = image.get_clim()
    assert low * high == pytest.approx(1)
    with pytest.raises(lp.PositionsError, match="the table of kinds is empty"):
        viz.kinds_chart(table[:0])


def test_an_auc_stands_at_its_layer_and_a_statistic_of_the_text_is_level():
    rows = [{"measure": "increment", "layer": la, "auc": 0.5 + la / 20, "low": 0.4, "high": 0.7} for la in range(4)]
    rows.append({"measure": "bigrams", "layer": math.nan, "auc": 0.6, "low": 0.58, "high": 0.63})
    figure = viz.auc_chart(pd.DataFrame(rows), "Word boundaries")
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines["increment"].get_ydata()) == [0.5, 0.55, 0.6, 0.65]
    assert np.round(lines["increment"].get_xdata()).tolist() == [0, 1, 2, 3]
    assert list(lines["bigrams"].get_ydata()) == [0.6, 0.6]
    twice = pd.DataFrame([row | {"run": run} for row in rows[:4] for run in (0, 1)])
    first, second = [line for line in viz.auc_chart(twice, "Runs").axes[0].lines if line.get_marker() == "o"]
    assert first.get_color() == second.get_color()
    assert [first.get_label(), second.get_label()[0]] == ["increment", "_"]
    with pytest.raises(lp.PositionsError, match="the table lacks auc"):
        viz.auc_chart(pd.DataFrame(rows).drop(columns="auc"), "Word boundaries")


def test_a_difference_stands_at_its_value_with_its_interval_around():
    rows = [
        {"name": "shared", "difference": -0.1, "low": -0.2, "high": 0.0, "group": "several"},
        {"name": "signed", "difference": 0.3, "low": 0.1, "high": 0.4, "group": "one"},
    ]
    (axes,) = viz.differences_chart(pd.DataFrame(rows), "Loss", "nats per byte").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["shared", "signed"]
    dots = {line.get_label(): line for line in axes.lines if line.get_marker() == "o"}
    for place, row in enumerate(rows):
        assert (*dots[row["group"]].get_xdata(), *dots[row["group"]].get_ydata()) == (row["difference"], place)
    ends = [segment.tolist() for lines in axes.collections for segment in lines.get_segments()]
    assert ends == [[[-0.2, 0], [0.0, 0]], [[0.1, 1], [0.4, 1]]]
    with pytest.raises(lp.PositionsError, match="the table lacks high"):
        viz.differences_chart(pd.DataFrame(rows).drop(columns="high"), "Loss", "nats")


def test_frequencies_run_from_the_highest_to_the_lowest():
    amounts = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    figure = viz.frequency_map({"query": amounts}, [0, 5], [600.0, 6.3, 60.0], "Norms of queries", "mean 2-norm")
    (image,) = figure.axes[0].get_images()
    assert image.get_array().tolist() == [[2, 3, 1], [5, 6, 4]]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["6", "60", "600"]
    with pytest.raises(lp.PositionsError, match="the least amount is 0; expected positive ones"):
        viz.frequency_map({"query": amounts - 1}, [0, 5], [600.0, 6.3, 60.0], "", "")
    with pytest.raises(lp.PositionsError, match=r"shape \(2, 3\), with 1 layers and 3 wavelengths"):
        viz.frequency_map({"query": amounts}, [0], [600.0, 6.3, 60.0], "", "")
