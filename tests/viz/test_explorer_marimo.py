"""The explorer as a widget in a live marimo, whose cells run again when the widget changes.

marimo may be installed anywhere on the PATH, or beside this Python, whose packages it is given in either case. It is no
requirement of development, as it would be there for this one test.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from browser import answered, chromium, drag, needs_chromium, shown, type_keys

import lens_positions as lp

HERE = Path(__file__).parents[2]
MARIMO = shutil.which("marimo") or shutil.which("marimo", path=Path(sys.executable).parent)

pytestmark = [
    needs_chromium,
    pytest.mark.slow,
    pytest.mark.skipif(MARIMO is None, reason="needs marimo: pip install marimo"),
]

TEXT = "The dog ran to the house."
NOTEBOOK = f"""import marimo

app = marimo.App(width="full")


@app.cell
def _():
    import json
    import torch
    import marimo as mo
    import lens_positions as lp
    model = lp.HookedPositionTransformer.from_pretrained("bilingual-per-layer")
    shown = mo.ui.anywidget(lp.viz.explore(model, {TEXT!r}))
    shown
    return json, model, shown, torch


@app.cell
def _(json, model, shown, torch):
    widget = shown.widget
    with torch.no_grad():
        values = model.run_with_hooks(widget.text, fwd_hooks=widget.hooks())[0, -1].log_softmax(-1)
    print(json.dumps({{"text": widget.text, "edits": widget.edits, "values": values.tolist()}}))


if __name__ == "__main__":
    app.run()
"""
SETTINGS = """[tool.marimo.display]
theme = "dark"
[tool.marimo.runtime]
auto_instantiate = true
"""


@pytest.fixture
def address(tmp_path):
    """A notebook in a marimo of its own, dark where the system is light."""
    (tmp_path / "notebook.py").write_text(NOTEBOOK)
    (tmp_path / "pyproject.toml").write_text(SETTINGS)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(HERE), *(path for path in sys.path if path.endswith("site-packages"))])
    own = {"PYTHONPATH": paths, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "XDG_CONFIG_HOME": str(tmp_path)}
    options = ["--headless", "--no-token", "--skip-update-check", "--host", "127.0.0.1", "--port", str(port)]
    with open(tmp_path / "log", "w") as log:
        command = [MARIMO, "edit", "notebook.py", *options]
        server = subprocess.Popen(command, cwd=tmp_path, env=os.environ | own, stdout=log, stderr=log)
        try:
            yield wait_for_server(server, f"http://127.0.0.1:{port}/", tmp_path / "log")
        finally:
            server.terminate()
            server.wait(60)


def wait_for_server(server, url, log):
    """The address, from when it answers."""
    for _ in range(240):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{url}health", timeout=5).close()
            return url
        except OSError:
            time.sleep(0.25)
    raise AssertionError(log.read_text())


def in_python(page, fits):
    """What the second cell prints, which runs again by itself when the widget changes, once its edits fit."""
    for _ in range(100):
        said = page.locator("[data-cell-id]").nth(1).inner_text()
        found = next((json.loads(line) for line in said.splitlines() if line.startswith('{"text"')), None)
        if found and fits(found["edits"]):
            return found
        page.wait_for_timeout(100)
    raise AssertionError(said)


def check(page, edits):
    """Python has these edits, and the page shows what the model gives with them."""
    answered(page)
    found = in_python(page, lambda seen: seen == edits)
    values = shown(page)
    assert len(values) >= 8
    assert values == pytest.approx({i: found["values"][i] for i in values}, abs=1e-4)
    return found["values"]


def test_the_explorer_works_in_marimo(address, tmp_path):
    said = []
    with chromium() as browser:
        page = browser.new_context(viewport={"width": 1440, "height": 1000}).new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: message.type == "error" and said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(address)
        page.wait_for_selector(".lp-explorer .lp-next tbody tr", timeout=180_000)
        plain = check(page, [])

        # The theme is the notebook's, which is dark, and then the button's.
        scheme = "(root) => [getComputedStyle(root).backgroundColor, getComputedStyle(root).color]"
        dark = page.locator(".lp-explorer").evaluate(scheme)
        page.locator(".lp-explorer button", has_text="Theme").click()
        light = page.locator(".lp-explorer").evaluate(scheme)
        assert [dark, light] == [["rgb(20, 23, 28)", "rgb(232, 234, 238)"], ["rgb(255, 255, 255)", "rgb(29, 33, 41)"]]

        # By hand, and back.
        drag(page, 0, 5, 60)
        (edit,) = in_python(page, len)["edits"]
        assert (edit["kind"], edit["layers"], edit["token"]) == ("gap", [0], 5)
        assert edit["by"] > 1
        edited = check(page, [edit])
        assert max(abs(a - b) for a, b in zip(plain, edited, strict=True)) > 1e-3

        # By keyboard: no key is the notebook's.
        type_keys(page, "ArrowRight", "ArrowUp", "Shift+ArrowUp", "d", "d", "x")
        assert page.locator("[data-cell-id]").count() == 2
        check(page, [edit, {"kind": "gap", "layers": [0], "token": 6, "by": 1.1}])
        type_keys(page, "Control+z", "Control+z")
        check(page, [edit])

        # A number that is typed.
        length = page.locator(".lp-explorer input[type=number]").first
        length.click()
        page.keyboard.press("Control+a")
        page.keyboard.type("12.5", delay=150)
        assert length.input_value() == "12.5"
        page.keyboard.press("Enter")
        changed = [edit, {"kind": "set", "layers": [0], "token": 6, "to": 12.5}]
        again = check(page, changed)

        # circuitsvis, which looks for its place in the document, and not in the shadow tree in which this widget is.
        page.get_by_text("The whole pattern of this head").click()
        page.wait_for_selector(".lp-paper canvas, .lp-paper svg")
        assert page.locator(".lp-paper canvas, .lp-paper svg").count() == 2
        page.locator(".lp-papers").scroll_into_view_if_needed()
        page.screenshot(path=tmp_path / "marimo.png")

        # A reload while the kernel runs.
        page.reload()
        page.wait_for_selector(".lp-explorer .lp-next tbody tr")
        assert check(page, changed) == again
    assert said == []

    model = lp.HookedPositionTransformer.from_pretrained("bilingual-per-layer")
    (added,) = lp.add_gap(model, edit["token"], edit["by"], [0])

    def set_gap(increments, hook):
        increments[:, 6] = 12.5
        return increments

    with torch.no_grad():
        expected = model.run_with_hooks(TEXT, fwd_hooks=[added, (added[0], set_gap)])[0, -1].log_softmax(-1)
    assert again == pytest.approx(expected.tolist(), abs=1e-4)
