"""How long the explorer takes from the release of a drag to the last update of its page, and whether its memory grows.

A real Chromium drags tokens of a page that `lens-positions explore` answers, both on this machine; the browser takes
its share of the cores. Timed is from when the browser got the release of the mouse (the time stamp of its event) to
when the page had made the frame that shows the answer to it, all of its panels: a message that is posted in that
frame's requestAnimationFrame comes right after the frame's style, layout and paint. What is left out is what the page
cannot see: the compositor and the screen.

    python -m benchmarks.explore                     the shipped model, 200 drags; then 30 edits a second for a minute
    python -m benchmarks.explore --model smollm2-135m-instruct --tokens 30 --drags 40

Measured (2 CPU cores, torch 2.13, Chromium headless): see docs/measurements.md.
"""

import argparse
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import psutil
import torch
from playwright.sync_api import Page, Request, sync_playwright

from lens_positions import HookedPositionTransformer
from lens_positions.viz.explorer.engine import Explorer

TEXT = "The cat sat on the mat, and the dog by the door saw it. When Mary and John met, John thanked Mary for it. "
LIMITS = {"bilingual": (50, 120), "smollm2": (400, float("inf"))}
"""Milliseconds that the median and the 95th percentile may take."""

# The page writes all that an answer changes within one task, and is not busy at its end. Where the answer came before
# the hand let go, that is the task of the release itself.
WATCH = """
() => {
  window.updates = [];
  const main = document.querySelector("main");
  const channel = new MessageChannel();
  let released = null, drawn = null;
  channel.port1.onmessage = () => {
    window.updates.push(performance.now() - drawn);
    main.dataset.updates = window.updates.length;
  };
  const look = () => {
    if (released === null || main.getAttribute("aria-busy") !== "false") return;
    drawn = released;
    released = null;
    requestAnimationFrame(() => channel.port2.postMessage(null));
  };
  addEventListener("pointerup", (event) => {
    if (!event.target.closest(".lp-ruler")) return;
    released = event.timeStamp;
    look();
  });
  new MutationObserver(look).observe(main, { attributes: true, attributeFilter: ["aria-busy"] });
}
"""

# The middles of the tokens of a ruler that a mouse can take: in sight, under no other, and not the first.
IN_REACH = """
(row) => [...row.querySelectorAll(".lp-token")].flatMap((token) => {
  const { x, y, width, height } = token.getBoundingClientRect();
  const middle = [x + width / 2, y + height / 2];
  return token.dataset.i !== "0" && document.elementFromPoint(...middle) === token ? [middle] : [];
})
"""


@contextmanager
def served(model: str) -> Iterator[str]:
    """The address of an explorer in a process of its own, as a person starts it."""
    command = [sys.executable, "-m", "lens_positions", "explore", model, "--no-open"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            # The address stands in what it says, wherever a terminal would break the line.
            said = ""
            while "(Ctrl+C" not in said:
                line = server.stdout.readline() if server.stdout else ""
                if not line:
                    raise SystemExit(f"the explorer of {model} did not start")
                said += line.strip("\n")
            yield said[said.index("http://") : said.index("(Ctrl+C")].replace(" ", "")
        finally:
            server.terminate()


@contextmanager
def opened(address: str, text: str) -> Iterator[Page]:
    """A page of the explorer that shows a text, with the slopes and whatever loads late."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1440, "height": 1000})
        page.set_default_timeout(60_000)
        page.goto(address)
        page.wait_for_selector("main[aria-busy=false] .lp-next tbody tr")
        page.get_by_label("Text", exact=True).fill(text)
        page.wait_for_selector("main[aria-busy=true]")
        page.wait_for_selector("main[aria-busy=false]")
        page.wait_for_selector(".lp-slope:not(:empty)", state="attached")
        page.wait_for_timeout(1_000)
        yield page
        browser.close()


def drags(page: Page, count: int, layers: int) -> tuple[np.ndarray, float]:
    """The milliseconds of each drag, of a random token of a random layer by a random distance; and questions a drag."""
    draw, done, asked = random.Random(0), 0, 0

    def count_question(request: Request) -> None:
        nonlocal asked
        asked += request.url.endswith("/api/run")

    page.evaluate(WATCH)
    while done < count:
        row = page.locator(".lp-ruler").nth(draw.randrange(layers))
        row.scroll_into_view_if_needed()
        x, y = draw.choice(row.evaluate(IN_REACH))
        page.on("request", count_question)
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x + draw.choice([-1, 1]) * draw.randrange(5, 60), y, steps=6)
        page.mouse.up()
        done += 1
        page.wait_for_selector(f'main[data-updates="{done}"]')
        page.remove_listener("request", count_question)
        page.wait_for_timeout(60)
        if done % 4 == 0:  # edits add up, as they do when somebody plays
            while page.get_by_role("button", name="Undo").is_enabled():
                page.get_by_role("button", name="Undo").click()
                page.wait_for_selector("main[aria-busy=false]")
    return np.array(page.evaluate("window.updates")), asked / done


def processor_time(page: Page, explorer: Explorer, text: str, tokens: int, edits: int = 40) -> tuple[float, float]:
    """Milliseconds of one core that an edit takes in the engine and in the page, whatever else the machine does.

    Of the page it is the main thread: script, style, layout and paint. The engine is one of this process, one thread.
    """
    torch.set_num_threads(1)
    draw, layers = random.Random(1), explorer.model.position_layers
    known = explorer.run({"text": text})["key"]
    start = time.process_time()
    for _ in range(edits):
        edit = {"kind": "gap", "layers": [draw.choice(layers)], "token": draw.randrange(1, tokens), "by": 1.5}
        explorer.run({"text": text, "edits": [edit], "known": known})
    engine = (time.process_time() - start) / edits

    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})

    def spent() -> float:
        found = {metric["name"]: metric["value"] for metric in devtools.send("Performance.getMetrics")["metrics"]}
        return found["TaskDuration"]

    page.locator(".lp-ruler svg").first.focus()
    page.keyboard.press("ArrowRight")
    before = spent()
    for _ in range(edits):
        page.keyboard.press("ArrowUp")
        page.wait_for_selector("main[aria-busy=false]")
    return 1000 * engine, 1000 * (spent() - before) / edits


def memory(explorer: Explorer, text: str, tokens: int, seconds: int, rate: int) -> list[float]:
    """MiB of this process at the end of each tenth of the time, under so many edits a second."""
    draw, process = random.Random(0), psutil.Process()
    layers = explorer.model.position_layers
    found, edits, start = [], 0, time.perf_counter()
    for part in range(10):
        while edits < (part + 1) * seconds * rate / 10:
            edit = {
                "kind": "gap",
                "layers": [draw.choice(layers)],
                "token": draw.randrange(1, tokens),
                "by": draw.uniform(-2, 5),
            }
            explorer.run({"text": text, "edits": [edit]})
            edits += 1
            time.sleep(max(0.0, start + edits / rate - time.perf_counter()))
        found.append(process.memory_info().rss / 2**20)
    took = time.perf_counter() - start
    print(f"{edits} edits in {took:.1f} s, {edits / took:.1f} a second; memory in MiB: {[round(m) for m in found]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bilingual-per-layer")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--drags", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=60, help="of edits for the memory; 0 leaves it out")
    parser.add_argument("--rate", type=int, default=30, help="edits a second")
    options = parser.parse_args()
    model = HookedPositionTransformer.from_pretrained(options.model)
    text = model.tokenizer.decode(model.to_tokens(TEXT)[0, 1 : options.tokens])
    tokens = model.to_tokens(text).shape[1]
    if options.drags:
        with served(options.model) as address, opened(address, text) as page:
            took, asked = drags(page, options.drags, len(model.position_layers))
            engine, drawing = processor_time(page, Explorer(model), text, tokens)
        median, late = np.median(took), np.quantile(took, 0.95)
        print(f"{options.model}, {tokens} tokens, n = {len(took)} drags with {asked:.1f} questions each:")
        print(f"from release to the last update: median {median:.0f} ms, 95% within {late:.0f} ms")
        print(f"processor time of an edit: {engine:.0f} ms of one core in the engine, {drawing:.0f} ms in the page")
        limits = next((limits for name, limits in LIMITS.items() if name in options.model), (float("inf"),) * 2)
        print("within the limits" if median <= limits[0] and late <= limits[1] else f"LIMITS ARE {limits}")
    if options.seconds:
        found = memory(Explorer(model), text, tokens, options.seconds, options.rate)
        print(f"from the second tenth to the last: {found[-1] - found[1]:+.1f} MiB")


if __name__ == "__main__":
    main()
