"""The explorer in headless Chromium: type, drag, undo, reload, and every number is that of `run_with_hooks`."""

import json
import re
import threading
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from browser import answered, chromium, drag, needs_chromium, settle, shown
from tiny_models import drawn_weights

import lens_positions as lp
from lens_positions import viz
from lens_positions.viz.explorer import page as pages
from lens_positions.viz.explorer.server import Models, Server

pytestmark = [needs_chromium, pytest.mark.slow]

NAME = "bilingual-per-layer"
TEXT = "The dog ran to the house."
HOSTILE = "</script><img src=x onerror=window.hacked=1> \"'`${x}"
RIGHT_TO_LEFT = "שלום עולם 👩‍👩‍👧 👍🏽"


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def model():
    return lp.HookedPositionTransformer.from_pretrained(NAME)


@contextmanager
def serving(models):
    server = Server(models)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield server
    server.stop()
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(model):
    with serving(Models(["bilingual-rope"], [model])) as server:
        yield server.address


@contextmanager
def explorer(browser, address, width=1440, height=1000, **options):
    """A page of the explorer; at the end, an error where it complained or asked for anything from elsewhere."""
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    page = context.new_page()
    page.set_default_timeout(20_000)
    said, asked = [], []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    answered(page)
    yield page
    answered(page)
    context.close()
    assert said == []
    own = address.partition("?")[0]
    assert [url for url in asked if not url.startswith((own, "data:", "blob:"))] == []


def write(page, text):
    page.get_by_label("Text", exact=True).fill(text)
    page.wait_for_selector(".lp-explorer[aria-busy=true]")
    answered(page)


def state_of(page):
    return json.loads(page.evaluate("decodeURIComponent(location.hash.slice(1))"))


def by_hooks(model, text, edits, token=-1):
    """What `run_with_hooks` gives, with hooks written here."""
    hooks = []
    for edit in edits:
        if edit["kind"] == "gap":
            hooks += lp.add_gap(model, edit["token"], edit["by"], edit["layers"])
        else:
            assert edit["kind"] == "set"
            hooks += lp.ablate(model, edit["to"], edit["layers"], edit["token"])
    with torch.no_grad():
        return model.run_with_hooks(text, fwd_hooks=hooks)[0, token].log_softmax(-1)


def check(page, model, text, edits, token=-1):
    expected = by_hooks(model, text, edits, token)
    found = shown(page)
    assert len(found) >= 8
    for i, value in found.items():
        assert value == pytest.approx(float(expected[i]), abs=1e-4)


def test_type_drag_undo_reload_and_copy(browser, address, model):
    with explorer(browser, address, permissions=["clipboard-read", "clipboard-write"]) as page:
        write(page, TEXT)
        check(page, model, TEXT, [])
        plain = shown(page)

        drag(page, 0, 5, 90)
        (edit,) = state_of(page)["edits"]
        assert (edit["kind"], edit["layers"], edit["token"]) == ("gap", [0], 5)
        assert edit["by"] > 1
        check(page, model, TEXT, [edit])
        assert shown(page) != plain
        assert page.locator(".lp-edits li span").inner_text().startswith("Layer 0: the gap before “d” (token 5) is ")

        page.get_by_role("button", name="Copy as Python").click()
        lines = page.evaluate("navigator.clipboard.readText()")
        given = {}
        exec(lines, given)
        for i, value in shown(page).items():
            assert value == pytest.approx(float(given["log_probabilities"][i]), abs=1e-4)

        edited = shown(page)
        page.get_by_role("button", name="Undo").click()
        answered(page)
        assert state_of(page)["edits"] == []
        assert shown(page) == plain
        page.get_by_role("button", name="Redo").click()
        answered(page)
        assert shown(page) == edited

        link = page.url
        page.reload()
        answered(page)
        assert (shown(page), page.url) == (edited, link)
        assert page.get_by_label("Text", exact=True).input_value() == TEXT
    with explorer(browser, link) as page:
        assert shown(page) == edited


def test_a_drag_moves_the_token_as_far_as_the_hand(browser, address, model):
    with explorer(browser, address) as page:
        write(page, TEXT)
        page.get_by_label("Scale").select_option("one")
        positions = model.positions(TEXT)[3, 0]
        (first, last) = page.eval_on_selector_all(
            ".lp-ruler:nth-child(4) .lp-token",
            "(all) => [all[0], all.at(-1)].map((t) => +t.getAttribute('x'))",
        )
        per_unit = (last - first) / float(positions[-1] - positions[0])
        drag(page, 3, 8, 40)
        assert state_of(page)["edits"][0]["by"] == pytest.approx(40 / per_unit, rel=2e-3)


def test_a_release_asks_for_nothing_that_was_asked(browser, address, model):
    with explorer(browser, address) as page:
        write(page, TEXT)
        asked = []
        page.on("request", lambda request: request.url.endswith("/api/run") and asked.append(request.post_data_json))
        box = page.locator('.lp-ruler >> nth=0 >> .lp-token[data-i="5"]').bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + 60, y, steps=10)
        answered(page)
        before = len(asked)
        page.mouse.up()
        answered(page)
        assert len(asked) == before > 0
        assert asked[-1]["edits"] == state_of(page)["edits"]
        assert all(one["edits"] != other["edits"] for one, other in pairwise(asked))
        check(page, model, TEXT, state_of(page)["edits"])

        # What stands there already is not asked for: all layers, and back.
        page.get_by_label("acts in", exact=True).select_option("all")
        page.get_by_label("acts in", exact=True).select_option("layer")
        answered(page)
        assert len(asked) == before


def test_an_answer_that_comes_late_is_not_drawn_over_a_newer_one(browser, address, model):
    with explorer(browser, address) as page:
        write(page, TEXT)
        held = []

        def hold(route):
            if held:
                route.continue_()
            else:
                held.append(route)

        page.route("**/api/run", hold)
        page.locator(".lp-ruler >> nth=0 >> svg").focus()
        page.keyboard.press("PageUp")
        page.keyboard.press("PageUp")
        answered(page)
        edits = state_of(page)["edits"]
        assert [edit["by"] for edit in edits] == [2]
        check(page, model, TEXT, edits)
        expected = shown(page)
        stale = {**json.loads(held[0].request.post_data), "known": ""}
        late = page.request.post(held[0].request.url, headers=held[0].request.headers, data=stale)
        held[0].fulfill(response=late)
        answered(page)
        assert shown(page) == expected


def test_layers_in_a_range_and_all_of_them(browser, address, model):
    with explorer(browser, address) as page:
        write(page, TEXT)
        page.get_by_label("acts in", exact=True).select_option("range")
        page.get_by_label("from", exact=True).select_option("1")
        page.get_by_label("to", exact=True).select_option("3")
        drag(page, 1, 6, -30)
        page.get_by_label("acts in", exact=True).select_option("all")
        page.get_by_label("becomes", exact=True).fill("2.5")
        page.keyboard.press("Enter")
        answered(page)
        edits = state_of(page)["edits"]
        assert [edit["layers"] for edit in edits] == [[1, 2, 3], None]
        check(page, model, TEXT, edits)
        page.get_by_role("button", name=re.compile("^Remove: Layers 1 to 3")).click()
        answered(page)
        check(page, model, TEXT, edits[1:])


def test_other_texts_and_whole_layers(browser, address, model):
    with explorer(browser, address) as page:
        write(page, "The cat")
        page.get_by_text("Another text, whole layers").click()
        page.get_by_label("Another text", exact=True).fill("The dog")
        page.get_by_role("button", name="Freeze the layer to it").click()
        answered(page)
        page.get_by_label("Every gap becomes").select_option("mean")
        page.get_by_label("acts in", exact=True).select_option("all")
        page.get_by_role("button", name="Ablate the layer").click()
        answered(page)
        _, cache = model.run_with_cache("The dog")
        hooks = lp.freeze(cache, [0]) + lp.ablate(model, "mean")
        expected = model.run_with_hooks("The cat", fwd_hooks=hooks)[0, -1].log_softmax(-1)
        for i, value in shown(page).items():
            assert value == pytest.approx(float(expected[i]), abs=1e-4)

        # What cannot be is one sentence, and undo leads back.
        page.get_by_label("Another text", exact=True).fill("of another length")
        page.get_by_role("button", name="Freeze the layer to it").click()
        page.wait_for_selector(".lp-wrong")
        assert "expected equally many" in page.locator(".lp-said").inner_text()
        page.get_by_role("button", name="Undo").click()
        answered(page)
        assert page.locator(".lp-wrong").count() == 0


def test_two_tabs_keep_their_edits_apart(browser, address, model):
    with explorer(browser, address) as one, explorer(browser, address) as two:
        write(one, TEXT)
        write(two, TEXT)
        drag(one, 0, 5, 120)
        for i in range(4):  # both at once
            for page, token in ((one, 7), (two, 9)):
                page.locator(f".lp-ruler >> nth={i} >> svg").focus()
                page.locator(f'.lp-ruler >> nth={i} >> .lp-token[data-i="{token}"]').click()
                page.keyboard.press("PageUp")
        for page in (one, two):
            answered(page)
            check(page, model, TEXT, state_of(page)["edits"])
        assert len(state_of(one)["edits"]) == 5
        assert len(state_of(two)["edits"]) == 4
        assert {edit["token"] for edit in state_of(two)["edits"]} == {9}


def test_everything_by_keyboard(browser, address, model):
    with explorer(browser, address) as page:
        write(page, TEXT)
        page.locator(".lp-chip[tabindex='0']").focus()
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        answered(page)
        assert state_of(page)["token"] == 2

        for _ in range(40):  # on to the ruler of layer 1
            page.keyboard.press("Tab")
            if (page.evaluate("document.activeElement.getAttribute('aria-label')") or "").startswith("Layer 1,"):
                break
        assert page.evaluate("document.activeElement.getAttribute('role')") == "slider"
        page.keyboard.press("ArrowRight")
        before = float(page.evaluate("document.activeElement.getAttribute('aria-valuenow')"))
        page.keyboard.press("Shift+ArrowUp")
        page.keyboard.press("ArrowUp")
        answered(page)
        assert page.evaluate("document.activeElement.getAttribute('aria-valuetext')").endswith(
            f"+1.10 from {before:.2f}"
        )
        (edit,) = state_of(page)["edits"]
        assert edit == {"kind": "gap", "layers": [1], "token": 2, "by": 1.1}
        check(page, model, TEXT, [edit], token=2)
        page.keyboard.press("Control+z")
        answered(page)
        assert state_of(page)["edits"][0]["by"] == 1
        page.keyboard.press("Delete")
        answered(page)
        assert state_of(page)["edits"] == []


def test_every_control_has_a_name_and_nothing_has_one_twice(browser, address):
    with explorer(browser, address) as page:
        drag(page, 0, 5, 60)
        page.locator("summary").first.click()
        snapshot = page.locator("main").aria_snapshot()
        for role in ("button", "combobox", "textbox", "slider", "spinbutton"):
            assert not re.search(rf"- {role}:?$|- {role} \[", snapshot, re.MULTILINE), role
        assert len(re.findall(r'- slider "Layer \d, gap before', snapshot)) == 6


def test_the_page_fits_a_phone_and_says_where_there_is_more(browser, address):
    with explorer(browser, address, width=390, height=844, has_touch=True) as page:
        write(page, 2 * TEXT)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        wide = page.locator(".lp-rulers")
        assert wide.evaluate("(node) => node.scrollWidth > node.clientWidth")
        assert "lp-more" in wide.get_attribute("class")
        wide.evaluate("(node) => (node.scrollLeft = node.scrollWidth)")
        settle(page)
        assert "lp-more" not in wide.get_attribute("class")


def luminance(colour):
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough(browser, address, scheme):
    """WCAG 2.1 AA: 4.5 for text, of all text colours on all of its grounds."""
    with explorer(browser, address, color_scheme=scheme) as page:
        drag(page, 0, 5, 60)
        colours = page.evaluate(
            """() => Object.fromEntries(["page", "ink", "quiet", "raised", "orange", "blue"].map((name) => {
                 const probe = document.createElement("i");
                 probe.style.color = `var(--${name})`;
                 document.querySelector("main").append(probe);
                 const found = getComputedStyle(probe).color;
                 probe.remove();
                 return [name, found];
               }))"""
        )
        for text in ("ink", "quiet", "orange", "blue"):
            for ground in ("page", "raised"):
                light, dark = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground, scheme)
        before = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.get_by_role("button", name="Switch between dark and light").click()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


def test_attention_and_the_whole_pattern_of_a_head(browser, address, model):
    with explorer(browser, address) as page:
        write(page, TEXT)
        drag(page, 0, 5, 90)
        edits = state_of(page)["edits"]
        page.locator(".lp-head").first.click()
        answered(page)
        layer, head = state_of(page)["layer"], state_of(page)["head"]
        hooks = lp.add_gap(model, 5, edits[0]["by"], [0])
        with torch.no_grad():
            _, own = model.run_with_cache(TEXT)
            _, now = model.run_with_cache(TEXT, fwd_hooks=hooks)
        for name, cache in (("before", own), ("after", now)):
            weights = cache["pattern", layer][0, head, -1]
            keys = page.eval_on_selector_all(f".lp-arc-{name}", "(all) => all.map((arc) => +arc.dataset.key)")
            assert set(keys) == set((weights >= 0.01).nonzero().flatten().tolist())
        page.get_by_text("The whole pattern of this head").click()
        page.wait_for_selector(
            ".lp-papers figure:nth-child(2) .lp-paper canvas, .lp-papers figure:nth-child(2) .lp-paper svg"
        )


@pytest.mark.parametrize("text", [HOSTILE, RIGHT_TO_LEFT, "中国政府今天在北京。"])
def test_text_of_every_kind_is_text(browser, address, model, text):
    with explorer(browser, address, width=390) as page:
        write(page, text)
        check(page, model, text, [])
        assert page.evaluate("window.hacked === undefined && !document.querySelector('img')")
        assert page.locator(".lp-chip").count() == len(model.to_tokens(text)[0])
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        drag(page, 0, 3, 30)
        check(page, model, text, state_of(page)["edits"])
        direction = page.locator(".lp-strip").evaluate("(node) => getComputedStyle(node).direction")
        assert direction == ("rtl" if text == RIGHT_TO_LEFT else "ltr")


def test_two_thousand_tokens_stay_usable(browser, tmp_path):
    config = lp.PositionModelConfig(d_model=32, n_layers=3, n_heads=2, n_ctx=2048)
    model = drawn_weights(lp.HookedPositionTransformer.from_config(config))
    text = ("It was the best of times, 👍 it was the worst of times. " * 40)[:1930]
    with serving(Models([], [model])) as server, explorer(browser, server.address) as page:
        write(page, text)
        n = model.to_tokens(text).shape[1]
        assert n >= 2000
        assert page.locator(".lp-chip").count() == n
        assert page.locator(".lp-rulers .lp-token").count() < 2000  # only what is in sight
        page.locator(".lp-ruler >> nth=1 >> svg").focus()
        page.keyboard.press("End")
        page.keyboard.press("PageUp")
        answered(page)
        check(page, model, text, state_of(page)["edits"])
        assert page.locator(f'.lp-ruler >> nth=1 >> .lp-token[data-i="{n - 1}"]').count() == 1
        page.locator(".lp-rulers").evaluate("(node) => (node.scrollLeft = 0)")
        settle(page)
        drag(page, 0, 4, 50)
        check(page, model, text, state_of(page)["edits"])


def test_the_saved_page_shows_the_same_without_a_model(browser, address, model, tmp_path):
    with explorer(browser, address) as page:
        write(page, TEXT)
        drag(page, 0, 5, 90)
        expected = shown(page)
        with page.expect_download() as saving:
            page.get_by_role("button", name="Save as page").click()
        saving.value.save_as(tmp_path / "page.html")
    for width in (390, 1440):
        with explorer(browser, (tmp_path / "page.html").as_uri(), width, offline=True) as page:
            assert shown(page) == expected
            assert page.locator(".lp-edits li").count() == 1
            assert page.locator(".lp-ruler").count() == 6
            assert page.locator(".lp-arc-after").count() > 0
            assert page.locator("[role=slider]").count() == 0
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_another_model_of_the_server(browser, address):
    with explorer(browser, address) as page:
        write(page, TEXT)
        page.get_by_label("Model").select_option("bilingual-rope")
        answered(page)
        check(page, lp.HookedPositionTransformer.from_pretrained("bilingual-rope"), TEXT, [])


def test_a_page_of_another_site_gets_nothing(browser, address, tmp_path):
    (tmp_path / "evil.html").write_text("<!doctype html><title>evil</title>")
    context = browser.new_context()
    page = context.new_page()
    page.goto((tmp_path / "evil.html").as_uri())
    own, _, token = address.partition("?token=")
    asked = """([url, token]) => fetch(url, {method: "POST", body: "{}",
                 headers: {"Content-Type": "application/json", "X-Explorer-Token": token}})
               .then((answer) => answer.status, () => "refused")"""
    assert page.evaluate(asked, [f"{own}api/run", token]) == "refused"
    context.close()


def test_the_widget_runs_the_same_page(browser, model, tmp_path):
    """Its script with its state as the notebook stores them, and this process in the place of the kernel."""
    edit = {"kind": "gap", "layers": [0], "token": 5, "by": 2.5}
    widget = viz.explore(model, TEXT, [edit])
    context = browser.new_context()
    page = context.new_page()
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    answers = []
    widget.send = answers.append

    def kernel(message):
        widget._on_question(widget, json.loads(message), [])
        return json.dumps(answers.pop())

    def saved(state):
        widget.state = json.loads(state)

    page.expose_function("kernel", kernel)
    page.expose_function("saved", saved)
    (tmp_path / "cell.html").write_text(cell_of(widget._esm, widget._css, widget.state, widget.result), "utf-8")
    page.goto((tmp_path / "cell.html").as_uri())
    answered(page)
    check(page, model, TEXT, [edit])
    drag(page, 2, 9, 60)
    assert len(widget.edits) == 2
    check(page, model, TEXT, widget.edits)
    expected = model.run_with_hooks(TEXT, fwd_hooks=widget.hooks())[0, -1].log_softmax(-1)
    for i, value in shown(page).items():
        assert value == pytest.approx(float(expected[i]), abs=1e-4)
    page.get_by_text("The whole pattern of this head").click()
    page.wait_for_selector(".lp-paper canvas, .lp-paper svg")
    context.close()
    assert said == []


def cell_of(script, styles, state, result):
    """A page that does what a notebook does with a widget (anywidget's front end): its state, and a kernel or none."""
    data = json.dumps({"state": state, "result": result}).replace("<", "\\u003c")
    return f"""<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><style>{styles}</style>
      <div id="cell"></div>
      <script type="application/json" id="data">{data}</script>
      <script type="module">
        {script.replace("export default { render };", "")}
        const values = JSON.parse(document.getElementById("data").textContent);
        const heard = [];
        render({{
          el: document.getElementById("cell"),
          model: {{
            get: (name) => values[name],
            set: (name, value) => (values[name] = value),
            save_changes: () => window.saved?.(JSON.stringify(values.state)),
            on: (name, does) => name === "msg:custom" && heard.push(does),
            off: () => null,
            send: async (message) => {{
              if (!window.kernel) return;
              const answer = JSON.parse(await window.kernel(JSON.stringify(message)));
              heard.forEach((does) => does(answer));
            }},
          }},
        }});
      </script>"""


def test_a_notebook_stores_a_widget_that_is_shown_without_its_kernel(browser, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    code = f"""import torch
import lens_positions as lp
model = lp.HookedPositionTransformer.from_pretrained({NAME!r})
widget = lp.viz.explore(model, {TEXT!r}, edits=[{{"kind": "gap", "layers": [0], "token": 5, "by": 2.5}}])
widget"""
    again = """logits = model.run_with_hooks(widget.text, fwd_hooks=widget.hooks())
print(widget.edits, float(logits[0, -1].detach().log_softmax(-1).max()))"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in (code, again)])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    first, second = notebook.cells
    edits, value = re.match(r"(\[.*\]) (\S+)", second.outputs[0]["text"]).groups()
    assert edits == "[{'kind': 'gap', 'layers': [0], 'token': 5, 'by': 2.5}]"

    # As a front end with widgets shows it, and as one without.
    (output,) = [output for output in first.outputs if "data" in output]
    stored = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    widget = stored[output["data"]["application/vnd.jupyter.widget-view+json"]["model_id"]]["state"]
    (tmp_path / "widget.html").write_text(
        cell_of(widget["_esm"], widget["_css"], widget["state"], widget["result"]), "utf-8"
    )
    (tmp_path / "plain.html").write_text(
        '<!doctype html><link rel="icon" href="data:,"><meta charset="utf-8">' + output["data"]["text/html"], "utf-8"
    )
    with explorer(browser, (tmp_path / "widget.html").as_uri(), offline=True) as page:
        assert max(shown(page).values()) == pytest.approx(float(value), abs=1e-4)
        assert page.locator(".lp-ruler").count() == 6
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto((tmp_path / "plain.html").as_uri())
    page.frame_locator("iframe").locator(".lp-next tbody tr").first.wait_for()
    assert page.frame_locator("iframe").locator(".lp-edits li").count() == 1
    context.close()


def test_the_modules_of_the_page_are_one_script_too():
    """Each name stands once in them, so that a notebook may have them in a row."""
    names = re.findall(r"^(?:function|class|const|let) (\w+)", pages.script(), re.MULTILINE)
    assert len(names) == len(set(names)) > 20
    assert not re.search(r"^(import|export)\b", pages.script(), re.MULTILINE)
