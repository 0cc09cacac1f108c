"""Effects drawn and printed: every number in its place, in figures, terminal and files; mistakes are one sentence."""

import inspect
import math

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import drawn_weights

import lens_positions as lp
from lens_positions import causal, cli
from lens_positions.viz import style
from lens_positions.viz.effect_charts import ablation_bars, effect_map, map_of
from lens_positions.viz.prompt_charts import prompts_chart


@pytest.fixture(scope="module")
def model():
    config = lp.PositionModelConfig(d_model=32, n_layers=3, n_heads=4, d_mlp=48, n_ctx=64)
    return drawn_weights(lp.HookedPositionTransformer.from_config(config))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model"
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "static"
    config = lp.PositionModelConfig(d_model=16, n_layers=2, n_heads=2, positions=lp.PositionConfig(source="static"))
    lp.HookedPositionTransformer.from_config(config).save_pretrained(path)
    return str(path)


@pytest.fixture
def corpus(tmp_path):
    """A folder of documents, of which the last one in twenty is held out."""
    for i in range(60):
        (tmp_path / f"{i:02}.txt").write_text(f"Document {i} is about the number {i * i}, 中文 and so on.\n", "utf-8")
    return str(tmp_path)


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")

    def command(*arguments):
        code = cli.main(list(arguments))
        return code, *capsys.readouterr()

    return command


def test_a_map_has_every_effect_in_its_place():
    effects = torch.arange(-6.0, 6.0).view(3, 4)
    effects[0, 2] = math.nan
    figure = map_of(effects, [0, 4, 7], ["a", "中", "<script>", "$x^2$"], "Title $1", "nats", "caption " * 30)
    axes, bar = figure.axes
    (image,) = axes.get_images()
    np.testing.assert_array_equal(image.get_array().filled(math.nan), effects.numpy())
    assert image.get_clim() == (-6.0, 6.0)
    assert image.origin == "lower"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "中", "<script>", "$x^2$"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "4", "7"]
    figure.canvas.draw()
    low = min(label.get_window_extent().y0 for label in axes.get_xticklabels())
    texts = {text.get_text().split("\n")[0]: text for text in figure.texts}
    assert texts["Title $1"].get_parse_math() is False
    assert "nats" in texts
    caption = next(text for text in figure.texts if text.get_text().startswith("caption"))
    assert caption.get_window_extent().y1 < low  # no label runs into it
    assert all(t.get_window_extent().x0 >= 0 and t.get_window_extent().x1 <= figure.bbox.x1 for t in figure.texts)
    assert bar.get_ylim() == (-6.0, 6.0)


def test_a_map_of_nothing_is_drawn():
    map_of(torch.zeros(1, 3), [0], ["a", "b", "c"], "Nothing", "nats")
    with pytest.raises(lp.PositionsError, match=r"effects have shape \(1, 3\), with 2 layers and 3 tokens"):
        map_of(torch.zeros(1, 3), [0, 1], ["a", "b", "c"], "Nothing", "nats")


def test_a_map_needs_the_model_the_effects_and_the_text_alone(model):
    effects = causal.gap_sweep(model, "a text", causal.loss(), layers=[0, 1])
    hooks = lp.scale(model, 2.0, layers=0)
    figure = effect_map(model, effects, "a text", [0, 1], hooks=hooks)
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels[1:] == ["a", "␣", "t", "e", "x", "t"]
    said = " ".join(" ".join(text.get_text() for text in figure.texts).split())
    assert "Edits: increments times 2 in layer 0." in said
    with pytest.raises(lp.PositionsError, match="effects have shape"):
        effect_map(model, effects, "a text")
    with pytest.raises(lp.PositionsError, match="the model is a Tensor; expected the model that was measured"):
        inspect.unwrap(effect_map)(effects, effects, "a text")


def test_many_prompts_are_drawn_with_their_numbers(model):
    found = causal.over_prompts(causal.attribution, model, ["a cat", "a dog sat"], causal.loss())
    figure = prompts_chart(found, caption="Two texts.")
    (image,) = figure.axes[0].get_images()
    expected = found.table.pivot(index="layer", columns="token", values="mean")
    np.testing.assert_allclose(image.get_array(), expected.to_numpy())
    assert [text.get_text() for text in figure.axes[0].texts] == ["2"] * 6 + ["1"] * 4
    pairs = pd.DataFrame({"clean": ["a cat", "a dog"], "corrupted": ["a dog", "a cow"]})
    bars = prompts_chart(causal.mediation(model, pairs, metric=causal.loss()))
    legend = [text.get_text() for text in bars.axes[0].get_legend().get_texts()]
    assert legend == ["total", "direct", "increments", "interaction"]
    with pytest.raises(lp.PositionsError, match="head is 2; expected none, as the effects are not by head"):
        prompts_chart(found, head=2)


def test_bars_have_their_heights_and_intervals(model):
    loss = causal.ablation_table(model, ["a text, 中文", "another text", "and a third"]).loss
    figure = ablation_bars(loss)
    (axes,) = figure.axes
    heights = [bar.get_height() for bars in axes.containers if hasattr(bars, "patches") for bar in bars.patches]
    expected = pd.concat([loss[loss["to"] == to] for to in ("1.0", "mean", "shuffle")])["change"]
    np.testing.assert_allclose(heights, expected)
    segments = [s for c in axes.collections for s in c.get_segments()]
    np.testing.assert_allclose(sorted(s[0][1] for s in segments), sorted(loss["low"]), atol=1e-9)
    np.testing.assert_allclose(sorted(s[1][1] for s in segments), sorted(loss["high"]), atol=1e-9)
    alone = causal.ablation_table(model, "one document has no interval").loss
    assert not ablation_bars(alone).axes[0].collections


def numbers(line):
    return [float(word) for word in line.split()[2:]]


def test_gaps_are_printed_listed_written_and_drawn(run, folder, model, tmp_path):
    csv, figure = tmp_path / "gaps.csv", tmp_path / "gaps.svg"
    code, out, err = run("gaps", folder, "ab 中", "--by", "0.5", "--csv", str(csv), "--figure", str(figure))
    assert (code, err) == (0, "")
    tokens = model.to_tokens("ab 中")
    effects = causal.gap_sweep(model, tokens, causal.loss(tokens), by=0.5)
    rows = [line for line in out.splitlines() if line.startswith("layer ")]
    torch.testing.assert_close(torch.tensor([numbers(row) for row in rows]), effects, atol=5e-3, rtol=0)
    first = next(line for line in out.splitlines() if ", token " in line)
    assert float(first.split()[0]) == pytest.approx(float(effects.flatten()[effects.abs().argmax()]), abs=1e-4)
    table = pd.read_csv(csv, keep_default_na=False)
    np.testing.assert_allclose(table["effect"], effects.flatten(), rtol=1e-5, atol=1e-7)
    assert list(table["token"][:4]) == ["<|endofdocument|>", "a", "b", " "]
    assert figure.read_text().startswith("<?xml")
    assert "change of the loss, nats per token" in out


@pytest.mark.slow
def test_gaps_of_some_layers_on_an_answer(run, folder, model):
    tokens = model.to_tokens("ab cd")
    for options, metric in (
        (["--answer", "e"], causal.log_probability(ord("e"))),
        (["--answer", "e", "--wrong", "f"], causal.logit_difference(ord("e"), ord("f"))),
    ):
        code, out, _ = run("gaps", folder, "ab cd", "--layers", "2", "0", *options)
        assert code == 0
        effects = causal.gap_sweep(model, tokens, metric)
        rows = {line.split()[1]: numbers(line) for line in out.splitlines() if line.startswith("layer ")}
        assert set(rows) == {"0", "2"}
        torch.testing.assert_close(torch.tensor(rows["2"]), effects[2], atol=5e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("site", ["increments", "rot_k", "resid", "pattern"])
def test_patches_go_from_the_clean_prompt_into_the_corrupted_one(run, folder, model, site):
    prompts = ["--clean", "The cat", "--corrupted", "The dog", "--answer", "s", "--wrong", "r"]
    code, out, _ = run("patch", folder, *prompts, "--site", site)
    assert code == 0
    clean, corrupted = model.to_tokens("The cat"), model.to_tokens("The dog")
    metric = causal.logit_difference(ord("s"), ord("r"))
    effects = causal.patch_sweep(model, clean, corrupted, metric, site)
    rows = [numbers(line) for line in out.splitlines() if line.startswith("layer ")]
    torch.testing.assert_close(torch.tensor(rows), effects, atol=5e-3, rtol=0)
    with torch.no_grad():
        assert f"{float(metric(model(clean))[0]):+.3f} in the clean one" in out
        assert f"{float(metric(model(corrupted))[0]):+.3f} in the corrupted one" in out


@pytest.mark.slow
def test_ablations_are_printed_written_and_drawn(run, folder, model, corpus, tmp_path):
    csv, figure = tmp_path / "loss.csv", tmp_path / "loss.png"
    code, out, err = run("ablate", folder, "--corpus", corpus, "--csv", str(csv), "--figure", str(figure))
    assert (code, err) == (0, "")
    loss, attention = pd.read_csv(csv), pd.read_csv(tmp_path / "loss-attention.csv")
    assert list(loss["layer"]) == ["all"] * 3 + ["0"] * 3 + ["1"] * 3 + ["2"] * 3
    assert len(attention) == 3 * 6 * 4
    row = loss[(loss["layer"] == "1") & (loss["to"] == "mean")].iloc[0]
    assert f"{row['change']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})" in out
    assert f"{row['changed']:.1%}" in out
    of_layer = attention[(attention["ablated"] == "1") & (attention["to"] == "mean")]
    assert f"{of_layer['distance'].mean():.3f} ({of_layer['distance'].max():.3f})" in out
    assert f"{int(row['n']):,} tokens of {int(row['documents'])} held-out documents" in out
    assert figure.read_bytes().startswith(b"\x89PNG")


PATCH = ["patch", "MODEL", "--clean", "The cat", "--answer", "s", "--wrong", "r"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gaps", "MODEL", ""], "the text is empty"),
        (["gaps", "MODEL", "a" * 64], "the text has 65 tokens"),
        (["gaps", "MODEL", "ab", "--wrong", "c"], "--wrong was given without --answer"),
        (["gaps", "MODEL", "ab", "--answer", "cd"], "--answer 'cd' is 2 tokens; expected one"),
        (["gaps", "MODEL", "ab", "--by", "nan"], "by is nan; expected a finite number"),
        (["gaps", "MODEL", "ab", "--layers", "3"], "layer 3 has no positions of its own; expected some of 0 to 2"),
        (["gaps", "MODEL", "ab", "--figure", "a.gif"], "expected a name that ends in .png, .svg or .pdf"),
        (["gaps", "MODEL", "ab", "--csv", "/no/such/a.csv"], "there is no folder /no/such for a.csv"),
        (["gaps", "/no/such/model", "ab"], "there is no model folder at /no/such/model"),
        (
            [*PATCH, "--corrupted", "The dogs"],
            "the clean prompt has 8 tokens and the corrupted one 9; expected equally",
        ),
        ([*PATCH, "--corrupted", ""], "the text is empty"),
        ([*PATCH[:-1], "中", "--corrupted", "The dog"], "--wrong '中' is 3 tokens"),
        (["patch", "STATIC", *PATCH[2:], "--corrupted", "The dog"], "so patching increments does nothing; expected"),
        (["ablate", "STATIC", "--corpus", "CORPUS"], "every increment of"),
        (["ablate", "MODEL", "--corpus", "nope"], "'nope' is no corpus"),
        (["ablate", "MODEL", "--corpus", "CORPUS", "--layers", "9"], "layer 9 has no positions of its own"),
        (["ablate", "MODEL", "--corpus", "CORPUS", "--characters", "0"], "expected"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_status_2(run, folder, static, corpus, arguments, said):
    stand_for = {"MODEL": folder, "STATIC": static, "CORPUS": corpus}
    code, out, err = run(*(stand_for.get(a, a) for a in arguments))
    assert code == 2
    assert out == ""
    assert err.startswith("lens-positions: ")
    assert said in err
    assert err.count("\n") == 1


def test_without_a_chinese_font_the_map_says_why(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(style, "_chinese_font", lambda: None)
    code, out, err = run("gaps", folder, "a中", "--figure", str(tmp_path / "a.png"))
    assert code == 0
    assert "largest effects" in out
    assert "no figure was drawn" in err


def test_a_map_of_heads_shows_the_largest_effect_of_each_with_its_sign():
    effects = torch.zeros(2, 3, 5)
    effects[0, 1, 2], effects[0, 1, 4], effects[1, 2, 0] = -3.0, 2.0, 1.0
    figure = lp.viz.head_map(effects, [4, 7], "A longer gap", "nats")
    drawn = figure.axes[0].images[0]
    assert drawn.get_array().tolist() == [[0.0, -3.0, 0.0], [0.0, 0.0, 1.0]]
    assert drawn.get_clim() == (-3.0, 3.0)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["4", "7"]
    with pytest.raises(lp.PositionsError, match=r"effects have shape \(2, 3, 5\), with 3 layers"):
        lp.viz.head_map(effects, [0, 1, 2], "A longer gap", "nats")
