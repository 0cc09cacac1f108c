"""Train the `quick` preset, show its increments on an English and a Chinese sentence, and draw them.

Run by `make demo`. An interrupted training goes on where it stopped; a finished one is not run again.
"""

import sys
from pathlib import Path

from lens_positions.cli import main as lens_positions
from lens_positions.training.__main__ import main as training

OUTPUT = Path("demo-output")
RUN = OUTPUT / "quick"
MODEL = RUN / "model"
SENTENCES = {
    "english": "The President of the United States spoke to Congress on Monday.",
    "chinese": "中国政府今天在北京举行新闻发布会。",
}


def main() -> int:
    """Train if need be, then show and draw both sentences."""
    if MODEL.is_dir():
        print(f"{MODEL} is there already: not training again")
    else:
        how = "--resume" if (RUN / "training.json").is_file() else "--output"
        status = training(["train", how, str(RUN)])
        if status:
            return status
    figures = []
    for name, sentence in SENTENCES.items():
        figure = OUTPUT / f"{name}.png"
        print(f"\n{sentence}")
        status = lens_positions(["show", str(MODEL), sentence, "--figure", str(figure)])
        if status:
            return status
        figures += [str(figure)] if figure.is_file() else []
    drawn = " and ".join(figures) or "no file"
    print(
        f"\nThe model is in {MODEL}, its log in {RUN / 'log.jsonl'}, the figures in {drawn}. "
        f'Next: .venv/bin/lens-positions show {MODEL} "your own sentence", or --preset tiny for a better model.'
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
