"""Pages in a real browser: Chromium without a network, and everything that it says or asks for."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: the Debian package chromium")

FLAGS = ["--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium."""
    # As root it has no sandbox.
    flags = [*FLAGS, "--disable-sync", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, path: Path, width: int = 1440, script: str = "", **options: Any) -> Iterator[Page]:
    """A page from disk; at the end, an error where it complained or asked for anything beyond its own file."""
    context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **options)
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.add_init_script(script)
    said: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url[:200]))
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('.lp-view[data-view]:not([data-mounted])').length === 0")
    settle(page)
    yield page
    settle(page)
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("data:", "blob:", "about:srcdoc"))] == [path.as_uri()]


def settle(page: Page) -> None:
    """Wait until what was asked for is drawn."""
    page.evaluate(
        "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 50))))"
    )


def answered(page: Page) -> None:
    """Wait until the model of the explorer has answered everything that was asked."""
    page.wait_for_selector(".lp-explorer[aria-busy=false] .lp-next tbody tr")
    settle(page)


def drag(page: Page, layer: int, token: int, pixels: float) -> None:
    """Take a token of the explorer with the mouse and carry it so many pixels."""
    answered(page)
    node = page.locator(f'.lp-ruler >> nth={layer} >> .lp-token[data-i="{token}"]')
    node.scroll_into_view_if_needed()
    box = node.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + pixels, y, steps=8)
    page.mouse.up()
    answered(page)


def shown(page: Page) -> dict[int, float]:
    """The log probability after the edits of each candidate of the explorer, by token id."""
    rows = page.eval_on_selector_all(".lp-next tbody tr", "(all) => all.map((r) => [+r.dataset.id, +r.dataset.after])")
    return dict(rows)


def type_keys(page: Page, *keys: str) -> None:
    """Press keys on the ruler of the explorer's layer 0."""
    page.locator(".lp-ruler svg[role=slider]").first.focus()
    for key in keys:
        page.keyboard.press(key)
        answered(page)
