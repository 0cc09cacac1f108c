"""The short film of the explorer in docs/: real screenshots of a page that a real model answers.

    python demos/explore_film.py    writes docs/explore.webp

It needs Chromium (`make chromium`), and the packages of the extra "dev".
"""

import io
import shutil
import threading
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from playwright.sync_api import Page, sync_playwright

from lens_positions.viz.explorer.server import Models, Server

FILM = Path(__file__).parents[1] / "docs" / "explore.webp"
TEXT = "The cat sat on the mat."
SIZE = (1120, 740)
MOST_BYTES = 2_000_000
LETTER = 7  # the token "t" of "cat"
STEP, HOLD = 80, 1400  # milliseconds

HAND = [(0, 0), (0, 17), (4, 13), (7, 20), (10, 19), (7, 12), (12, 12)]
"""The outline of a pointer: a headless browser draws none."""


class Film:
    """Frames of a page, each with the time that it is shown and the pointer where it is."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.frames: list[Image.Image] = []
        self.times: list[int] = []
        self.hand = (40.0, 40.0)

    def shoot(self, time: int = STEP) -> None:
        """Add what is seen now."""
        self.page.wait_for_selector("main[aria-busy=false]")
        frame = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
        outline = [(x + self.hand[0], y + self.hand[1]) for x, y in HAND]
        ImageDraw.Draw(frame).polygon(outline, fill="black", outline="white")
        self.frames.append(frame)
        self.times.append(time)

    def move(self, x: float, y: float, steps: int) -> None:
        """Carry the pointer, and whatever it holds, to a place."""
        (from_x, from_y) = self.hand
        for i in range(1, steps + 1):
            self.hand = (from_x + (x - from_x) * i / steps, from_y + (y - from_y) * i / steps)
            self.page.mouse.move(*self.hand)
            self.shoot()

    def to(self, target: Any, steps: int = 5) -> None:
        """Carry the pointer onto something."""
        box = target.bounding_box()
        self.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps)

    def click(self, time: int) -> None:
        """Press what the pointer is on, and add what is seen then."""
        self.page.mouse.down()
        self.page.mouse.up()
        self.shoot(time)

    def pull(self, layer: int, token: int, pixels: float) -> None:
        """Take a token and carry it so far."""
        self.to(self.page.locator(f'.lp-ruler >> nth={layer} >> .lp-token[data-i="{token}"]'))
        self.page.mouse.down()
        self.move(self.hand[0] + pixels, self.hand[1], 14)
        self.page.mouse.up()
        self.shoot(HOLD)

    def save(self, path: Path) -> int:
        """Write the film as small as it has to be, and return its size in bytes.

        Raises:
            SystemExit: it is too large in the coarsest quality.
        """
        for quality in (80, 65, 50, 35, 20):
            content = io.BytesIO()
            first, *others = self.frames
            how: dict[str, Any] = {"quality": quality, "method": 4, "loop": 0, "duration": self.times}
            first.save(content, "WEBP", save_all=True, append_images=others, **how)
            if content.tell() <= MOST_BYTES:
                path.write_bytes(content.getvalue())
                return content.tell()
        raise SystemExit(f"the film has {content.tell():,} bytes; expected at most {MOST_BYTES:,}.")


def play(film: Film) -> None:
    """Look at what follows "cat", pull its last letter away, look at the head that changed most, go on, and undo."""
    page = film.page
    film.shoot(HOLD)
    film.to(page.locator(".lp-chip").nth(LETTER))
    film.click(HOLD)
    film.pull(0, LETTER, 150)
    film.to(page.locator(".lp-head").first)
    film.click(HOLD)
    page.get_by_label("acts in", exact=True).select_option("all")
    film.shoot()
    film.pull(1, 16, 110)
    film.to(page.get_by_role("button", name="Undo"))
    for _ in range(2):
        film.click(700)


def main() -> None:
    """Make the film."""
    server = Server(Models(["bilingual-per-layer"]))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("no Chromium was found; expected one, as from make chromium.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": SIZE[0], "height": SIZE[1]}, color_scheme="light")
        page.goto(server.address)
        page.wait_for_selector("main[aria-busy=false] .lp-next tbody tr")
        page.get_by_label("Text", exact=True).fill(TEXT)
        page.wait_for_selector("main[aria-busy=true]")
        page.wait_for_selector("main[aria-busy=false]")
        page.wait_for_timeout(3_000)  # until slopes are there
        film = Film(page)
        play(film)
        browser.close()
    server.stop()
    thread.join()
    print(f"{FILM}: {len(film.frames)} frames, {sum(film.times) / 1000:.0f} s, {film.save(FILM):,} bytes")


if __name__ == "__main__":
    main()
