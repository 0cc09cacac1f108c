"""The command line: what it prints, and that no mistake of a person's ends in a traceback."""

import io
import re
import subprocess
import sys

import pytest
import torch
from matplotlib import font_manager

import lens_positions as lp
from lens_positions import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved model of three layers whose increments differ from token to token."""
    config = lp.PositionModelConfig(d_model=16, n_layers=3, n_heads=2, n_ctx=64)
    model = lp.HookedPositionTransformer.from_config(config)
    torch.manual_seed(0)
    for name, weight in model.position_streams.named_parameters():
        if name.endswith("out.weight"):
            torch.nn.init.normal_(weight)
    path = tmp_path_factory.mktemp("models") / "random"
    model.save_pretrained(path)
    return str(path)


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        return code, *capsys.readouterr()

    return run


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d\d", line)]


@pytest.mark.slow
def test_every_token_is_printed_with_its_increment_in_every_layer(run, folder):
    code, out, _ = run("show", folder, "ab 中c", "--no-table")
    increments = lp.HookedPositionTransformer.from_pretrained(folder).increments("ab 中c")[:, 0]
    assert code == 0
    (header,) = [line for line in out.splitlines() if "中" in line]
    assert header.split() == ["<|endofdocument|>", "a", "b", "␣", "中₁", "中₂", "中₃", "c"]
    rows = [line for line in out.splitlines() if line.startswith("layer")]
    assert [numbers(row) for row in rows] == [pytest.approx(layer.tolist(), abs=0.0051) for layer in increments]


def test_the_table_counts_each_kind(run, folder):
    code, out, _ = run("show", folder, "Ab, 中\n12.")
    assert code == 0
    for kind in (
        "letter (1)",
        "capital (1)",
        "digit (2)",
        "space (1)",
        "punctuation (1)",
        "sentence end (1)",
        "newline (1)",
        "Chinese lead byte (1)",
        "Chinese continuation byte (2)",
    ):
        assert kind in out
    assert "by kind" not in run("show", folder, "Ab", "--no-table")[1]


def test_layers_are_chosen(run, folder):
    _, out, _ = run("show", folder, "ab", "--layers", "0", "2")
    assert "layer 0" in out
    assert "layer 2" in out
    assert "layer 1" not in out


def test_a_source_for_all_layers_is_printed_once(run, tmp_path):
    config = lp.PositionModelConfig(d_model=16, n_layers=3, n_heads=2, positions=lp.PositionConfig(source="static"))
    lp.HookedPositionTransformer.from_config(config).save_pretrained(tmp_path / "model")
    _, out, _ = run("show", str(tmp_path / "model"), "ab", "--no-table")
    assert [numbers(line) for line in out.splitlines() if line.startswith("static")] == [[1, 1, 1]]


def test_no_line_is_wider_than_the_terminal_and_none_is_lost(run, folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    text = "The quick brown fox.\r\nThe 中文 fox [bold]x[/]"
    _, out, _ = run("show", folder, text)
    grid = [line for line in out.splitlines() if re.match(r"layer|letter|   ", line)]
    assert max(map(len, grid)) <= 60
    assert sum(len(numbers(line)) for line in grid if line.startswith("layer 1")) == len(text.encode()) + 1


@pytest.mark.parametrize("text", ["[red]x[/red]", "[/]", ":smile:", "a\x1b[31mb\x07", "\u202eabc", "%s {0} \\n"])
def test_hostile_text_is_shown_as_text(run, folder, text, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    code, out, err = run("show", folder, text)
    (header,) = [line for line in out.splitlines() if "<|endofdocument|>" in line]
    expected = []
    for character in text.replace(" ", "␣"):
        shown, size = character if character.isprintable() else "·", len(character.encode())
        expected += [shown] if character in "␣" or size == 1 else [shown + "₁₂₃"[i] for i in range(size)]
    assert code == 0
    assert header.split()[1:] == expected
    assert not set("\x1b\x07\u202e") & set(out)
    assert err == ""


def coloured(folder: str, monkeypatch, **environment: str) -> str:
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["show", folder, "abcdefgh ijkl", "--no-table"]) == 0
    return out.getvalue()


def test_colour_tints_what_is_far_from_the_mean(folder, monkeypatch):
    out = coloured(folder, monkeypatch, FORCE_COLOR="1", TERM="xterm-256color", COLORTERM="truecolor")
    assert re.search(r"\x1b\[30;48;2;\d+;\d+;\d+m", out)


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1", "FORCE_COLOR": "1", "TERM": "xterm-256color"}])
def test_without_a_terminal_or_with_no_color_there_is_no_colour(folder, monkeypatch, environment):
    out = coloured(folder, monkeypatch, **environment)
    assert "48;2" not in out
    assert "48;5" not in out
    assert "layer 0" in out


@pytest.mark.slow
def test_a_figure_is_written(run, folder, tmp_path):
    path = tmp_path / "spacing.svg"
    code, out, _ = run("show", folder, "ab c", "--figure", str(path))
    assert code == 0
    assert f"figure: {path}" in out
    assert path.read_text().startswith("<?xml")


def test_an_interactive_figure_is_written(run, folder, tmp_path):
    code, _, err = run("show", folder, "ab c", "--figure", str(tmp_path / "figure.html"))
    assert (code, err) == (0, "")
    page = (tmp_path / "figure.html").read_text("utf-8")
    assert page.startswith("<!doctype html>")
    assert '"units":["a","b","\\u2423","c"]' in page


def test_a_text_beyond_the_context_is_cut_and_a_sentence_says_where(run, folder):
    code, out, err = run("show", folder, "a" * 80)
    assert code == 0
    assert "letter (63)" in out
    expected = "The first 63 of 80 characters are shown (the model's context is 64 tokens)."
    assert err == f"lens-positions: {expected}\n"


def test_without_a_chinese_font_the_rest_is_printed_and_the_sentence_says_why(run, folder, tmp_path, monkeypatch):
    own = [font for font in font_manager.fontManager.ttflist if "mpl-data" in str(font.fname)]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda *args, **kwargs: [])
    code, out, err = run("show", folder, "中", "--figure", str(tmp_path / "a.png"))
    assert code == 0
    assert "Chinese lead byte (1)" in out
    assert "fonts-wqy-zenhei or fonts-noto-cjk" in err
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("MODEL", ""), "the text is empty; expected at least one character."),
        (("MODEL", "\udcff"), "the lone surrogate U+DCFF"),
        (("MODEL", "ab", "--layers", "3"), "layer 3 was asked for; expected one of the layers 0 to 2."),
        (("MODEL", "ab", "--layers", "-1"), "an index is -1; expected whole numbers from 0"),
        (("MODEL", "ab", "--figure", "a.gif"), "expected a name that ends in .png, .svg or .pdf, or .html to explore."),
        (("MODEL", "ab", "--figure", "/no/such/folder/a.html"), "there is no folder /no/such/folder"),
        (("MODEL", "ab", "--figure", "/no/such/folder/a.png"), "expected a folder that exists"),
        (("/no/such/model", "ab"), "there is no model folder at /no/such/model"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_status_2(run, folder, arguments, said):
    code, out, err = run("show", *(folder if argument == "MODEL" else argument for argument in arguments))
    assert code == 2
    assert out == ""
    assert err.startswith("lens-positions: ")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [(), ("bogus",), ("show",), ("show", "a", "b", "--bogus")])
def test_wrong_usage_is_exit_status_2_and_names_the_help(run, arguments):
    code, _, err = run(*arguments)
    assert code == 2
    assert "--help" in err


def test_help_describes_every_argument(run):
    code, out, _ = run("show", "--help")
    assert code == 0
    for name in ("MODEL", "TEXT", "--layers", "--no-table", "--figure"):
        assert name in out


def test_an_interrupt_is_quiet(run, folder, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(lp.HookedPositionTransformer, "run_with_cache", interrupt)
    assert run("show", folder, "ab") == (130, "", "")


@pytest.mark.slow
def test_python_m_runs_the_command(folder):
    done = subprocess.run(
        [sys.executable, "-m", "lens_positions", "show", folder, "ab", "--layers", "9"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "lens-positions: layer 9 was asked for; expected one of the layers 0 to 2.\n"
