"""The spacing figure: every character stands where its position says. Geometry is compared, not pixels."""

from pathlib import Path

import pytest
import torch
from matplotlib import font_manager
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lens_positions as lp
from lens_positions.viz import output as viz_output
from lens_positions.viz import style
from lens_positions.viz.spacing import MAX_PANELS, spacing
from lens_positions.viz.text_positions import position_text

HOSTILE = "<b>&amp; $x_1$ \\frac ^{ [red] \t\x1b[31m\x00 ‮abc שלום 👩‍👩‍👧 e\u0301 'q\""

CHINESE_FILES = [str(font_manager.findfont(font)) for font in style.fonts_for("")[1:]]
needs_chinese = pytest.mark.skipif(not CHINESE_FILES, reason="no Chinese font is installed")


def random_model(n_layers: int = 3, n_ctx: int = 256, **positions) -> lp.HookedPositionTransformer:
    """A tiny model whose increments differ from token to token, each between 0 and 10."""
    config = lp.PositionModelConfig(
        d_model=16, n_layers=n_layers, n_heads=2, n_ctx=n_ctx, positions=lp.PositionConfig(**positions)
    )
    model = lp.HookedPositionTransformer.from_config(config)
    torch.manual_seed(0)
    for name, weight in model.position_streams.named_parameters():
        if name.endswith("out.weight"):
            torch.nn.init.normal_(weight)
    return model


@pytest.fixture(scope="module")
def model() -> lp.HookedPositionTransformer:
    return random_model()


@pytest.fixture
def latin_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has matplotlib's own fonts and no other."""
    own = [font for font in font_manager.fontManager.ttflist if "mpl-data" in str(font.fname)]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda *args, **kwargs: [])


def drawn_rows(figure: Figure) -> list[list[list[tuple[float, str]]]]:
    """The (x, text) of the characters drawn in each row of each panel."""
    panels = []
    for axes in figure.axes:
        characters = [text for text in axes.texts if not isinstance(text, Annotation)]
        heights = sorted({text.get_position()[1] for text in characters})
        panels.append(
            [
                [(t.get_position()[0], t.get_text()) for t in characters if t.get_position()[1] == height]
                for height in heights
            ]
        )
    return panels


def character_positions(model: lp.HookedPositionTransformer, text: str) -> torch.Tensor:
    """The position of each character's first token in each layer."""
    text_positions = position_text(model, text)
    return text_positions.positions.mean(-1)[:, text_positions.first]


def caption(figure: Figure) -> str:
    return " ".join(figure.texts[-1].get_text().split())


def first_bytes(text: str) -> list[int]:
    """The index of each character's first byte, in the tokens of the text with one token before it."""
    return [1 + len(text[:i].encode()) for i in range(len(text))]


def test_a_character_stands_at_its_first_byte(model):
    text = "a中, é\nb"
    expected = model.positions(text)[:, 0, first_bytes(text)]
    torch.testing.assert_close(character_positions(model, text), expected.double(), rtol=0, atol=1e-6)


def test_common_scale_draws_each_character_at_its_position(model):
    text = "To be, or not."
    x = model.positions(text)[:, 0, first_bytes(text)]
    (rows,) = drawn_rows(spacing(model, text, scale="common"))
    assert len(rows) == 3
    for layer, row in enumerate(rows):
        assert [shown for _, shown in row] == list(text.replace(" ", "␣"))
        assert [place for place, _ in row] == pytest.approx((x[layer] - x[layer, 0]).tolist(), abs=1e-4)
    assert rows[0] != rows[1]


def test_relative_scale_makes_the_mean_increment_of_every_row_one(model):
    text = "To be, or not"
    increments = model.increments(text)[:, 0]
    x = model.positions(text)[:, 0, first_bytes(text)]
    (rows,) = drawn_rows(spacing(model, text))
    for layer, row in enumerate(rows):
        mean = increments[layer, 2:].mean()
        assert [place for place, _ in row] == pytest.approx(((x[layer] - x[layer, 0]) / mean).tolist(), abs=1e-4)
        assert row[-1][0] == pytest.approx(len(text) - 1, abs=1e-4)


def test_lines_follow_each_character_from_row_to_row(model):
    figure = spacing(model, "abc d")
    (rows,) = drawn_rows(figure)
    lines = [c for c in figure.axes[0].collections if isinstance(c, LineCollection) and len(c.get_segments())]
    assert len(lines) == 2
    for above, below, between in zip(rows, rows[1:], lines, strict=False):
        ends = [(segment[0][0], segment[1][0]) for segment in between.get_segments()]
        assert ends == [(a, b) for (a, _), (b, _) in zip(above, below, strict=True)]


@pytest.mark.slow
@pytest.mark.usefixtures("latin_only")
def test_the_bytes_of_a_character_are_joined_from_first_to_last(model):
    text = "aéb"
    positions = model.positions(text)[0, 0]
    axes = spacing(model, text, layers=[0], scale="common").axes[0]
    (line,) = next(c.get_segments() for c in axes.collections if len(c.get_segments()))
    assert line[:, 0] == pytest.approx((positions[2:4] - positions[1]).tolist(), abs=1e-4)


def test_a_long_text_wraps_into_panels_that_hold_all_of_it_at_one_scale(model):
    text = "It was the best of times, it was the worst of times, it was the age of wisdom, " * 2
    figure = spacing(model, text)
    panels = drawn_rows(figure)
    assert 1 < len(panels) <= MAX_PANELS
    for layer in range(3):
        assert "".join(shown for rows in panels for _, shown in rows[layer]) == text.replace(" ", "␣")
    assert all(rows[layer][0][0] == 0 for rows in panels for layer in range(3))
    spans = [axes.get_xlim()[1] - axes.get_xlim()[0] for axes in figure.axes]
    assert max(spans) == pytest.approx(min(spans))
    x = character_positions(model, text)[1]
    start = len(panels[0][1])
    in_second = x[start : start + len(panels[1][1])] - x[start]
    mean = model.increments(text)[1, 0, 2:].double().mean()
    assert [place for place, _ in panels[1][1]] == pytest.approx((in_second / mean).tolist(), abs=1e-3)


def test_every_character_lies_inside_its_panel(model):
    figure = spacing(model, "It was the best of times, it was the worst of times. " * 3)
    for axes, rows in zip(figure.axes, drawn_rows(figure), strict=True):
        low, high = axes.get_xlim()
        assert all(low < x < high for row in rows for x, _ in row)


def test_a_text_beyond_the_last_panel_is_cut_and_the_caption_says_where():
    figure = spacing(random_model(n_ctx=2048, n_layers=1), "word " * 400)
    shown = sum(len(rows[0]) for rows in drawn_rows(figure))
    assert len(figure.axes) == MAX_PANELS
    assert shown < 2000
    assert f"The first {shown} of 2,000 characters are drawn." in caption(figure)


def test_a_text_beyond_the_context_is_cut_at_a_character_and_the_caption_says_why(model):
    text = "中" * 100
    figure = spacing(model, text, layers=[0])
    assert sum(len(rows[0]) for rows in drawn_rows(figure)) == 85  # of 3 tokens each, with one in front
    assert "The first 85 of 100 characters are drawn (the model's context is 256 tokens)." in caption(figure)


def test_tokens_that_are_no_text_are_drawn_byte_by_byte(model):
    """What a byte model samples need not be UTF-8."""
    tokens = torch.tensor([256, *"aé".encode(), 0xE4, 0xB8, 256, *b"<b>"])
    text_positions = position_text(model, tokens)
    assert text_positions.units == ["a", "é", "\\xe4", "\\xb8", "<|endofdocument|>", "<", "b", ">"]
    assert text_positions.first == [1, 2, 4, 5, 6, 7, 8, 9]
    assert text_positions.last == [1, 3, 4, 5, 6, 7, 8, 9]
    x = model.positions(tokens)[0, 0, text_positions.first].double()
    (rows,) = drawn_rows(spacing(model, tokens, layers=[0], scale="common"))
    assert [at for at, _ in rows[0]] == pytest.approx((x - x[0]).tolist(), abs=1e-4)


def test_tokens_of_a_text_are_the_text(model):
    text = "a中, é\nb"
    of_text, of_tokens = position_text(model, text), position_text(model, model.to_tokens(text)[0])
    assert of_text.units == of_tokens.units
    assert (of_text.first, of_text.last) == (of_tokens.first, of_tokens.last)
    assert torch.equal(of_text.positions, of_tokens.positions)


def test_a_text_whose_tokens_stand_together_still_fits():
    model = random_model(source="frozen", n_layers=1)
    (table,) = (buffer for name, buffer in model.position_streams.named_buffers() if name.endswith("table"))
    table.fill_(0.001)[ord(" ")] = 5.0
    assert len(spacing(model, "These words are points and the spaces all there is.").axes) == 1


@pytest.mark.parametrize(("source", "name"), [("static", "static"), ("shared", "all layers")])
def test_one_source_for_all_layers_is_one_row(source, name):
    figure = spacing(random_model(source=source), "ab c")
    ((row,),) = drawn_rows(figure)
    assert len(row) == 4
    assert [t.get_text().split("\n")[0] for t in figure.axes[0].texts if isinstance(t, Annotation)] == [name]


def test_static_increments_stand_evenly_and_are_called_static():
    figure = spacing(random_model(source="static"), "ab c")
    assert [x for x, _ in drawn_rows(figure)[0][0]] == [0, 1, 2, 3]
    assert "static increments" in caption(figure)


def test_per_head_increments_are_drawn_as_their_mean():
    model = random_model(per_head=True)
    expected = model.positions("ab c").mean(dim=-1)[:, 0, 1:]
    torch.testing.assert_close(character_positions(model, "ab c"), expected.double(), rtol=0, atol=1e-5)
    assert "mean over heads" in caption(spacing(model, "ab c"))


def test_chosen_layers_are_drawn_in_order(model):
    figure = spacing(model, "ab c", layers=[2, 0])
    labels = [t.get_text().split("\n")[0] for t in figure.axes[0].texts if isinstance(t, Annotation)]
    assert labels == ["layer 0", "layer 2"]


def test_the_caption_stands_alone():
    said = caption(spacing(random_model(gap="after"), "ab c"))
    assert "fresh (each layer learns its own increments" in said
    assert "the gap after its token" in said
    assert "divided by its mean increment" in said


def test_a_subword_model_draws_each_token_whole_at_its_position():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["The cat saw the cat"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<s>",
        pad_token="<s>",
        add_bos_token=True,
        name_or_path="subwords",
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    table = torch.arange(len(tokenizer)) / 100
    model = lp.HookedPositionTransformer.from_transformers(
        LlamaForCausalLM(config), tokenizer, lp.PositionConfig(source="frozen"), table=table
    )
    ids = tokenizer.encode(" saw the cat!", add_special_tokens=False)
    ((row,),) = drawn_rows(spacing(model, " saw the cat!", scale="common"))
    assert [shown for _, shown in row] == ["␣saw", "␣the", "␣cat", "!"]
    assert [x for x, _ in row] == pytest.approx([0, *table[ids[1:]].cumsum(0).tolist()], abs=1e-4)


@pytest.mark.usefixtures("latin_only")
@pytest.mark.parametrize("text", ["中", "a 国 b", "。"])
def test_chinese_without_a_font_is_an_error_that_names_the_packages(model, text, tmp_path):
    with pytest.raises(style.MissingFontError, match="fonts-wqy-zenhei or fonts-noto-cjk"):
        spacing(model, text, path=tmp_path / "figure.png")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@needs_chinese
def test_a_font_installed_since_matplotlib_listed_the_fonts_is_found(model, latin_only, monkeypatch):
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda *args, **kwargs: CHINESE_FILES)
    ((row, *_),) = drawn_rows(spacing(model, "中国"))
    assert [shown for _, shown in row] == ["中", "国"]


@needs_chinese
def test_chinese_is_drawn_in_a_font_that_has_it(model):
    texts = [text for text in spacing(model, "a中").axes[0].texts if text.get_text() == "中"]
    assert len(texts) == 3
    font = font_manager.get_font(font_manager.findfont(texts[0].get_fontproperties()))
    assert font.get_char_index(ord("中")) != 0


@pytest.mark.parametrize(
    ("character", "shown"),
    [(" ", "␣"), ("\u3000", "␣"), ("\n", "⏎"), ("\t", "⇥"), ("\x1b", "·"), ("\u200d", "·"), ("\u0301", "◌\u0301")],
)
def test_what_cannot_be_seen_gets_a_mark(character, shown):
    assert viz_output.visible_character(character) == shown


@pytest.mark.usefixtures("latin_only")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_hostile_text_is_drawn_as_text(model, suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "name", "runs/$\\frac{$")
    figure = spacing(model, HOSTILE, path=tmp_path / f"figure.{suffix}")
    shown = [text for rows in drawn_rows(figure) for _, text in rows[0]]
    assert len(shown) == len(HOSTILE)
    assert "".join(shown[:14]) == "<b>&amp;␣$x_1$"
    assert shown[HOSTILE.index("👩")] == style.SUBSTITUTE
    assert "stands for a character" in caption(figure)
    assert not any(text.get_parse_math() for text in figure.axes[0].texts if not isinstance(text, Annotation))
    assert (tmp_path / f"figure.{suffix}").stat().st_size > 1000


@pytest.mark.slow
def test_png_and_svg_are_what_they_say_and_written_alike_twice(model, tmp_path):
    for name, magic in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        spacing(model, "ab c", path=tmp_path / name)
        first = (tmp_path / name).read_bytes()
        spacing(model, "ab c", path=str(tmp_path / name))
        assert first.startswith(magic)
        assert (tmp_path / name).read_bytes() == first


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"text": ""}, "empty"),
        ({"text": "\ud800"}, "lone surrogate"),
        ({"text": torch.tensor([256, 300])}, "tokens go from 256 to 300; expected ids from 0 to 256"),
        ({"text": torch.tensor([])}, r"tokens are shape \(0,\)"),
        ({"text": torch.tensor([[1, 2], [3, 4]])}, r"2 texts were given; expected one text, or its token ids \[pos\]"),
        ({"layers": [3]}, "layer 3 was asked for; expected one of the layers 0 to 2"),
        ({"layers": [-1]}, "an index is -1; expected whole numbers from 0"),
        ({"path": "figure.gif"}, "figure.gif; expected a name that ends in .png"),
        ({"path": "no/such/folder/figure.png"}, "expected a folder that exists"),
    ],
)
def test_bad_requests_are_refused(model, kwargs, said, unchecked):
    with pytest.raises(lp.PositionsError, match=said):
        spacing(model, **{"text": "ab c"} | kwargs)


def test_an_unknown_scale_is_refused(model):
    with pytest.raises((lp.PositionsError, TypeError), match="scale"):
        spacing(model, "ab c", scale="log")


def test_a_folder_that_cannot_be_written_is_an_error_and_leaves_the_old_figure(model, tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    path.write_text("old")

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(lp.PositionsError, match="No space left on device"):
        spacing(model, "ab", path=path)
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["old"]


def test_a_mean_increment_below_zero_cannot_be_divided_by():
    model = random_model(activation="none")
    with torch.no_grad():
        for name, bias in model.position_streams.named_parameters():
            if name.endswith("out.bias"):
                bias.fill_(-30.0)
    with pytest.raises(lp.PositionsError, match='use scale="common"'):
        spacing(model, "ab c")
    ((row, *_),) = drawn_rows(spacing(model, "ab c", scale="common"))
    assert row[-1][0] < row[0][0]
