"""The explorer as a widget in a live JupyterLab: pulled by hand and by keyboard, and Python sees it.

JupyterLab may be installed anywhere on the PATH, or beside this Python: its kernel is this Python in either case. It is
not among the requirements of development, as it takes more than a hundred megabytes for this one test.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch
from browser import answered, chromium, drag, needs_chromium, settle, shown, type_keys

import lens_positions as lp

HERE = Path(__file__).parents[2]
LAB = shutil.which("jupyter-lab") or shutil.which("jupyter-lab", path=Path(sys.executable).parent)

pytestmark = [
    needs_chromium,
    pytest.mark.slow,
    pytest.mark.skipif(LAB is None, reason="needs JupyterLab: pip install jupyterlab"),
]

TEXT = "The dog ran to the house."
FIRST = f"""import json
import torch
import lens_positions as lp
model = lp.HookedPositionTransformer.from_pretrained("bilingual-per-layer")
widget = lp.viz.explore(model, {TEXT!r})
widget"""
SECOND = """with torch.no_grad():
    values = model.run_with_hooks(widget.text, fwd_hooks=widget.hooks())[0, -1].log_softmax(-1)
print(json.dumps({"text": widget.text, "edits": widget.edits, "values": values.tolist()}))"""


@pytest.fixture
def address(tmp_path):
    """A notebook in a JupyterLab of its own, with nothing of the user's settings."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in (FIRST, SECOND)])
    notebook.metadata.kernelspec = {"name": "own", "display_name": "own", "language": "python"}
    (tmp_path / "work").mkdir()
    nbformat.write(notebook, tmp_path / "work" / "notebook.ipynb")
    kernel = tmp_path / "data" / "kernels" / "own"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "own", "language": "python"}))

    # The front end of widgets is where anywidget is installed, which need not be where JupyterLab is.
    folders = {f"JUPYTER_{name.upper()}_DIR": str(tmp_path / name) for name in ("data", "config", "runtime")}
    paths = {"JUPYTER_PATH": str(Path(sys.prefix, "share", "jupyter")), "PYTHONPATH": str(HERE)}
    own = {**folders, **paths, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    options = [
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        "--port=0",
        f"--ServerApp.root_dir={tmp_path / 'work'}",
    ]
    quiet = ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url="]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen([LAB, *options, *quiet], env=os.environ | own, stdout=log, stderr=log)
        try:
            known = wait_for_server(server, tmp_path)
            yield f"{known['url']}lab/tree/notebook.ipynb?token={known['token']}"
        finally:
            server.terminate()
            server.wait(60)


def wait_for_server(server, folder):
    """What a JupyterLab writes about itself when it has a port."""
    for _ in range(240):
        found = list((folder / "runtime").glob("jpserver-*.json"))
        if found:
            time.sleep(1)  # until it is whole, and the server listens
            return json.loads(found[0].read_text())
        assert server.poll() is None, (folder / "log").read_text()
        time.sleep(0.25)
    raise AssertionError((folder / "log").read_text())


def in_python(page):
    """What the second cell prints: the widget's text and edits, and what `run_with_hooks` gives with them."""
    answered(page)
    cell = page.locator(".jp-Notebook .jp-CodeCell").nth(1)
    printed = cell.locator(".jp-OutputArea-output")
    cell.locator(".jp-InputArea-editor").click()

    # An output that is marked is not that of the run that is to come.
    printed.evaluate_all("(all) => all.forEach((one) => (one.dataset.old = ''))")
    page.keyboard.press("Control+Enter")
    new = cell.locator(".jp-OutputArea-output:not([data-old])")
    new.wait_for()
    return json.loads(new.inner_text())


def check(page, edits):
    """Python has these edits, and the page shows what the model gives with them."""
    found = in_python(page)
    assert found["edits"] == edits
    values = shown(page)
    assert len(values) >= 8
    assert values == pytest.approx({i: found["values"][i] for i in values}, abs=1e-4)
    return found["values"]


def test_the_explorer_works_in_jupyterlab(address, tmp_path):
    said = []
    with chromium() as browser:
        page = browser.new_context(viewport={"width": 1440, "height": 1000}).new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: message.type in ("error", "warning") and said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(address)

        # Until its kernel is there, the menu has nothing to run.
        page.locator(".jp-Notebook .jp-CodeCell").nth(1).wait_for()
        page.get_by_text("own | Idle").wait_for()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        page.wait_for_selector(".lp-explorer .lp-next tbody tr", timeout=180_000)
        plain = check(page, [])

        # By hand, and back.
        drag(page, 0, 5, 60)
        (edit,) = in_python(page)["edits"]
        assert (edit["kind"], edit["layers"], edit["token"]) == ("gap", [0], 5)
        assert edit["by"] > 1
        edited = check(page, [edit])
        assert max(abs(a - b) for a, b in zip(plain, edited, strict=True)) > 1e-3

        # By keyboard. "d d" deletes a cell and Ctrl+Z undoes what was typed in one, where the notebook gets them.
        type_keys(page, "ArrowRight", "ArrowUp", "Shift+ArrowUp", "d", "d", "x")
        assert page.locator(".jp-Notebook .jp-CodeCell").count() == 2
        check(page, [edit, {"kind": "gap", "layers": [0], "token": 6, "by": 1.1}])
        type_keys(page, "Control+z", "Control+z")
        assert "print(" in page.locator(".jp-Notebook .jp-CodeCell").nth(1).locator(".cm-content").inner_text()
        check(page, [edit])

        # The theme is the notebook's.
        scheme = "getComputedStyle(document.querySelector('.lp-explorer')).colorScheme"
        assert page.evaluate(scheme) == "light"
        page.evaluate("document.body.dataset.jpThemeLight = 'false'")
        assert page.evaluate(scheme) == "dark"

        # The pattern, and all of it in a second place.
        page.get_by_text("The whole pattern of this head").click()
        page.wait_for_selector(".lp-paper canvas, .lp-paper svg")
        page.locator(".lp-explorer .lp-note").first.click(button="right")
        page.get_by_text("Create New View for Cell Output", exact=True).click()
        second = page.get_by_role("tabpanel", name="Output View").locator(".lp-explorer")
        second.locator(".lp-paper canvas, .lp-paper svg").first.wait_for()
        second.get_by_role("button", name="Remove").first.click()
        page.wait_for_function("document.querySelectorAll('.lp-edits li').length === 0")
        check(page, [])
        type_keys(page, "ArrowRight", "PageUp")
        again = check(page, [{"kind": "gap", "layers": [0], "token": 7, "by": 1.0}])

        # A reload of a notebook whose kernel still runs.
        page.keyboard.press("Control+s")
        page.wait_for_selector(".jp-Notebook", state="attached")
        settle(page)
        page.reload()
        page.wait_for_selector(".lp-explorer .lp-next tbody tr")
        assert check(page, [{"kind": "gap", "layers": [0], "token": 7, "by": 1.0}]) == again
        page.screenshot(path=tmp_path / "jupyterlab.png")
    assert said == []

    model = lp.HookedPositionTransformer.from_pretrained("bilingual-per-layer")
    with torch.no_grad():
        expected = model.run_with_hooks(TEXT, fwd_hooks=lp.add_gap(model, 7, 1.0, [0]))[0, -1].log_softmax(-1)
    assert again == pytest.approx(expected.tolist(), abs=1e-4)
