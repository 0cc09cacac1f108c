"""Pages in headless Chromium, from disk and without a network: drawn where the numbers say, for mouse and keyboard."""

import pytest
import torch
from browser import chromium, needs_chromium, opened, settle
from tiny_models import drawn_weights

import lens_positions as lp
from lens_positions import viz
from lens_positions.viz import output as viz_output
from lens_positions.viz.interactive import page_of, write_page
from lens_positions.viz.text_positions import position_text

pytestmark = [needs_chromium, pytest.mark.slow]

TEXT = "The cat, 中文 sat."
WIDTHS = (390, 1440)
HOSTILE = [
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>&amp;\"'`${x}",
    "a\n\tb\r\u2028 שלום ‮abc",
    "👩‍👩‍👧 e\u0301\u200d\ufeff",
    b"<b>\xe4\xb8 \xff\xc3",  # what a byte model may sample
]


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def model():
    config = lp.PositionModelConfig(d_model=32, n_layers=3, n_heads=4, d_mlp=48, n_ctx=128)
    return drawn_weights(lp.HookedPositionTransformer.from_config(config))


@pytest.fixture(scope="module")
def pages(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for kind in ("spacing", "tokens", "attention"):
        getattr(viz, f"{kind}_view")(model, TEXT).save(folder / f"{kind}.html")
    return folder


def units_drawn(page):
    """(panel, row, unit, x, pixels per unit of the axis) of each character."""
    return page.evaluate(
        """() => [...document.querySelectorAll('svg')].flatMap((panel, p) =>
             [...panel.querySelectorAll('text.unit')].map((t) =>
               [p, +t.dataset.row, +t.dataset.i, +t.getAttribute('x'), +panel.dataset.perUnit]))"""
    )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scale", ["relative to each row's mean", "one scale, in steps"])
def test_every_character_stands_at_its_position(browser, pages, model, width, scale):
    data = viz.spacing_view(model, TEXT).data
    with opened(browser, pages / "spacing.html", width) as page:
        page.get_by_role("button", name=scale).click()
        assert page.locator('button[aria-pressed="true"]').inner_text() == scale
        drawn = units_drawn(page)
        assert len(drawn) == 3 * len(TEXT)
        start = {(p, r): (i, x) for p, r, i, x, _ in reversed(drawn)}
        for panel, row, unit, x, per_unit in drawn:
            first, x_first = start[panel, row]
            mean = data["rows"][row]["mean"] if scale.startswith("relative") else 1
            steps = (data["rows"][row]["first"][unit] - data["rows"][row]["first"][first]) / mean
            assert x - x_first == pytest.approx(steps * per_unit, abs=0.02)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_lines_follow_a_character_from_row_to_row(browser, pages):
    with opened(browser, pages / "spacing.html") as page:
        at = {(row, unit): x for _, row, unit, x, _ in units_drawn(page)}
        lines = page.evaluate(
            "[...document.querySelectorAll('line[data-i]')]"
            ".map((l) => [+l.dataset.i, l.x1.baseVal.value, l.x2.baseVal.value])"
        )
        assert len(lines) == 2 * len(TEXT)
        for number, (unit, above, below) in enumerate(lines):
            row = number // len(TEXT)
            assert (above, below) == pytest.approx((at[row, unit], at[row + 1, unit]), abs=0.02)


def test_a_layer_alone(browser, pages, model):
    with opened(browser, pages / "spacing.html") as page:
        page.get_by_label("Layer", exact=True).select_option("layer 1")
        drawn = units_drawn(page)
        assert len(drawn) == len(TEXT)
        assert page.locator("svg text").first.text_content() == "layer 1"


def test_arrow_keys_and_pointer_read_a_character(browser, pages, model):
    increments = model.increments(TEXT)[:, 0]
    with opened(browser, pages / "spacing.html") as page:
        readout = page.locator(".lp-readout")
        assert "Point at a character" in readout.inner_text()
        page.keyboard.press("Tab")  # layer
        for _ in range(3):
            page.keyboard.press("Tab")  # two scales, the drawing
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert readout.inner_text().startswith("“h”, 2 of 16: increments")
        for layer in range(3):
            assert f"layer {layer}: {increments[layer, 2]:.2f} (at" in readout.inner_text()
        page.keyboard.press("End")
        assert "16 of 16" in readout.inner_text()
        page.locator('text.unit[data-i="9"][data-row="1"]').hover()
        steps = " + ".join(f"{step:.2f}" for step in increments[2, 10:13].tolist())
        assert "“中”, 10 of 16, 3 tokens" in readout.inner_text()
        assert f"layer 2: {steps} (at" in readout.inner_text()
        assert page.locator("text.chosen").count() == 3


def test_tokens_are_tinted_by_their_increments(browser, pages, model):
    data = viz.tokens_view(model, TEXT).data
    with opened(browser, pages / "tokens.html") as page:
        rows = page.locator(".lp-row")
        assert rows.count() == 3
        for layer, row in enumerate(data["rows"]):
            colours = (
                rows.nth(layer)
                .locator(".colored-tokens > span > span")
                .evaluate_all(
                    "(spans) => spans.map((s) => getComputedStyle(s).backgroundColor.match(/\\d+/g).map(Number))"
                )
            )
            assert len(colours) == len(data["labels"])
            for share, (red, _, blue) in zip(row["relative"], colours, strict=True):
                if abs(share) > 0.1:
                    assert (red > blue) == (share > 0)


def arcs_drawn(page):
    return page.evaluate(
        """() => [...document.querySelectorAll('path.arc')].map((a) => {
             const length = a.getTotalLength();
             const [from, to] = [a.getPointAtLength(0), a.getPointAtLength(length)];
             return [a.dataset.ruler, +a.dataset.key, from.x, to.x, +a.dataset.weight];
           })"""
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_arcs_end_where_attention_is(browser, pages, model, width):
    layer, head, token = 2, 3, 8
    _, cache = model.run_with_cache(TEXT)
    weights = cache["pattern", layer][0, head, token]
    positions = model.positions(TEXT)[layer, 0].double()
    with opened(browser, pages / "attention.html", width) as page:
        page.get_by_label("Layer", exact=True).select_option(f"layer {layer}")
        page.get_by_label("Head", exact=True).select_option(f"head {head}")
        page.get_by_label("Token", exact=True).select_option(str(token))
        settle(page)
        labels = page.evaluate(
            "[...document.querySelectorAll('text.token')]"
            ".map((t) => [t.dataset.ruler, +t.dataset.token, +t.getAttribute('x')])"
        )
        at = {(ruler, token): x for ruler, token, x in labels}
        spans = {ruler: at[ruler, len(positions) - 1] - at[ruler, 0] for ruler in ("learned", "counted")}
        for i, position in enumerate(positions.tolist()):
            share = (position - float(positions[0])) / float(positions[-1] - positions[0])
            assert at["learned", i] - at["learned", 0] == pytest.approx(share * spans["learned"], abs=0.05)
            share = i / (len(positions) - 1)
            assert at["counted", i] - at["counted", 0] == pytest.approx(share * spans["counted"], abs=0.05)
        drawn = arcs_drawn(page)
        shown = {key for key in range(token + 1) if weights[key] >= 0.01}
        for ruler in ("learned", "counted"):
            assert {key for name, key, *_ in drawn if name == ruler} == shown
        for ruler, key, start, end, weight in drawn:
            assert weight == pytest.approx(float(weights[key]), abs=2e-5)
            if key != token:
                assert (start, end) == pytest.approx((at[ruler, token], at[ruler, key]), abs=0.05)
        best = int(weights.argmax())
        assert f"{100 * weights[best]:.1f}% “" in page.locator(".lp-readout").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_heads_are_buttons_for_the_keyboard_too(browser, pages):
    with opened(browser, pages / "attention.html") as page:
        page.locator(".lp-paper [role=button]").nth(3).wait_for()
        page.locator(".lp-paper [role=button]").nth(2).focus()
        page.keyboard.press("Enter")
        settle(page)
        assert page.get_by_label("Head", exact=True).input_value() == "2"
        assert page.locator(".lp-paper h2").inner_text().endswith("H2")
        page.get_by_label("Head", exact=True).select_option("head 1")
        settle(page)
        assert page.locator(".lp-paper h2").inner_text().endswith("H1")
        page.get_by_label("Layer", exact=True).select_option("layer 0")
        page.locator(".lp-paper h2", has_text="L0H1").wait_for()  # another layer keeps the head
        assert page.locator(".lp-paper canvas").count() == 5
        page.locator(".lp-drawing").focus()
        page.keyboard.press("Home")
        assert page.get_by_label("Token", exact=True).input_value() == "0"
        page.keyboard.press("ArrowRight")
        assert page.get_by_label("Token", exact=True).input_value() == "1"
        page.locator('text.token[data-token="3"]').first.click()
        assert page.get_by_label("Token", exact=True).input_value() == "3"


def test_hostile_text_is_shown_as_text_in_every_view(browser, model, tmp_path):
    given = [torch.tensor([256, *text]) if isinstance(text, bytes) else text for text in HOSTILE]
    makers = (viz.spacing_view, viz.tokens_view, viz.attention_view)
    write_page(page_of([make(model, text) for text in given for make in makers], "hostile"), tmp_path / "page.html")
    with opened(browser, tmp_path / "page.html", 390) as page:
        assert page.evaluate("window.hacked === undefined && !document.querySelector('img, b')")
        for number, text in enumerate(given):
            text_positions = position_text(model, text)
            units = ["".join(map(viz_output.visible_character, unit)) for unit in text_positions.units]
            labels = ["".join(map(viz_output.visible_character, label)) for label in text_positions.labels]
            spacing, tokens, attention = (page.locator("figure").nth(3 * number + i) for i in range(3))
            assert spacing.locator('text.unit[data-row="0"]').all_text_contents() == units
            tinted = tokens.locator(".colored-tokens").first.locator("> span > span")
            assert tinted.all_text_contents() == [label.replace(" ", "\xa0") for label in labels[1:]]
            tinted.first.hover()
            tooltip = tokens.locator("strong")
            tooltip.wait_for()
            assert tooltip.all_text_contents() == [labels[1]]
            options = attention.get_by_label("Token", exact=True).locator("option")
            assert options.all_text_contents() == [f"{i}: {label}" for i, label in enumerate(labels)]


def test_a_long_special_token_is_shortened_and_keeps_the_page_narrow(browser, model, tmp_path, monkeypatch):
    long = "<|" + "very" * 60 + "|>"
    view = viz.attention_view(model, TEXT)
    view.data["labels"][0] = long
    drawn = viz.spacing_view(model, TEXT)
    drawn.data["units"][0] = long
    write_page(page_of([view, drawn], "long"), tmp_path / "page.html")
    with opened(browser, tmp_path / "page.html", 390) as page:
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.locator("text.unit").first.text_content() == long[:19] + "…"


def test_a_long_paragraph_wraps_and_nothing_of_it_is_lost(browser, tmp_path):
    config = lp.PositionModelConfig(d_model=16, n_layers=2, n_heads=2, n_ctx=8192)
    model = drawn_weights(lp.HookedPositionTransformer.from_config(config))
    text = ("It was the best of times, it was the worst of times. " * 100)[:5000]
    viz.spacing_view(model, text).save(tmp_path / "view.html")
    with opened(browser, tmp_path / "view.html", 390) as page:
        shown = page.locator('text.unit[data-row="1"]').evaluate_all("(all) => all.map((t) => t.textContent).join('')")
        assert shown == text[:1023].replace(" ", "␣")
        assert "The first 1,023 of 5,000 characters are drawn" in page.locator("figcaption").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_notebook_shows_a_view_at_its_own_height(browser, model, tmp_path):
    shown = viz.attention_view(model, TEXT)._repr_html_()
    (tmp_path / "notebook.html").write_text(f'<!doctype html><meta charset="utf-8">{shown}', "utf-8")
    with opened(browser, tmp_path / "notebook.html") as page:
        frame = page.frame_locator("iframe")
        frame.locator("path.arc").first.wait_for()
        frame.locator("canvas").nth(4).wait_for()
        settle(page)
        inside = frame.locator("html").evaluate("(html) => html.scrollHeight")
        assert page.locator("iframe").bounding_box()["height"] == pytest.approx(inside, abs=30)
