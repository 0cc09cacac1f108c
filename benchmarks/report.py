"""How large reports are, how fast they open, and what they look like: written, then opened in Chromium, offline.

    python benchmarks/report.py [MODEL ...] [--characters N ...] [--folder FOLDER] [--output FILE]

Opened is a page whose texts, figures and arcs are there; complete, when circuitsvis has drawn its heads too, which it
does when the page is idle or they come into sight. Medians of five, at 1440 pixels, on the page's own clock. An error
or a request of the page is an error here. The first model's report is kept as screenshots.
"""

import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lens_positions.cli import main as lens_positions

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from browser import CHROMIUM, chromium, opened

MOST_MEGABYTES, MOST_SECONDS = 6.0, 3.0
WATCH = """
window.drawn = {};
const parts = {spacing: 'text.unit', tokens: '.colored-tokens > span', attention: 'path.arc'};
const whole = {...parts, attention: 'canvas'};
const all = (wanted) => [...document.querySelectorAll('figure[data-view]')]
  .every((view) => view.querySelector(wanted[view.dataset.view]));
const look = () => {
  if (document.readyState === 'complete') {
    if (all(parts)) window.drawn.opened ??= performance.now() / 1000;
    if (all(whole)) window.drawn.complete ??= performance.now() / 1000;
  }
  if (!window.drawn.complete) requestAnimationFrame(look);
};
requestAnimationFrame(look);
"""
DRAWN = "window.drawn.complete"


@dataclass
class Options:
    """Options.

    Args:
        models: what `from_pretrained` should load.
        characters: of held-out text, for each model in turn; the last counts for all that follow.
        folder: where the reports are written.
        output: where the table is written as JSON.
        screenshots: a folder for those of the first model's report.
    """

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ("demo-output/quick/model", "smollm2-135m-instruct")
    characters: tuple[int, ...] = (20_000, 4_000)
    folder: Path = Path("demo-output")
    output: Path = Path("benchmarks/report.json")
    screenshots: Path = Path("docs")


def main(options: Options) -> None:
    """Write each report, open it, print and keep what was measured."""
    if CHROMIUM is None:
        raise SystemExit("benchmarks/report.py: there is no Chromium; expected one (make chromium).")
    rows = []
    with chromium() as browser:
        for number, model in enumerate(options.models):
            characters = options.characters[min(number, len(options.characters) - 1)]
            path, start = options.folder / f"report-{number}.html", time.perf_counter()
            cpu = time.process_time()
            if lens_positions(["report", model, "-o", str(path), "--characters", str(characters)]):
                raise SystemExit(2)
            made, cpu = time.perf_counter() - start, time.process_time() - cpu
            times: dict[str, list[float]] = {"opened": [], "complete": []}
            for _ in range(5):
                with opened(browser, path.resolve(), script=WATCH) as page:
                    page.wait_for_function(DRAWN)
                    for name, seconds in page.evaluate("window.drawn").items():
                        times[name].append(seconds)
            megabytes = path.stat().st_size / 1e6
            row = {"model": model, "characters": characters, "megabytes": round(megabytes, 2)}
            row |= {f"{name}_seconds": round(statistics.median(taken), 2) for name, taken in times.items()}
            row |= {"made_seconds": round(made, 1), "made_cpu_seconds": round(cpu, 1)}
            rows.append(row)
            print(
                row,
                "ok" if megabytes <= MOST_MEGABYTES and row["opened_seconds"] < MOST_SECONDS else "TOO LARGE OR SLOW",
            )
            if number == 0:
                for width, scheme in ((1440, "light"), (1440, "dark"), (390, "light")):
                    with opened(browser, path.resolve(), width, script=WATCH, color_scheme=scheme) as page:
                        page.wait_for_function(DRAWN)
                        name = f"report-{width}{'-dark' if scheme == 'dark' else ''}.png"
                        page.screenshot(path=options.screenshots / name, full_page=True)
                        if name == "report-1440.png":
                            first = {"x": 0, "y": 0, "width": 1440, "height": 1330}
                            page.screenshot(path=options.screenshots / "report.png", full_page=True, clip=first)
    machine = f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}"
    options.output.write_text(json.dumps({"machine": machine, "reports": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
