"""Draw the figures of the README from the demo's model: `make demo`, then `python demos/figures.py`.

Writes docs/english.png, docs/chinese.png, docs/arcs.png and docs/kinds.png.
"""

import sys
from pathlib import Path

from demo import MODEL, SENTENCES

import lens_positions as lp
from lens_positions import corpora, viz
from lens_positions.analysis.token_kinds import increments_by_category

DOCS = Path("docs")
CHARACTERS = 60_000


def main() -> int:
    """Draw each figure; a missing model is one sentence."""
    try:
        model = lp.HookedPositionTransformer.from_pretrained(MODEL)
    except lp.PositionsError as error:
        print(f"demos/figures.py: {error} (make demo trains it)", file=sys.stderr)
        return 2
    for name, sentence in SENTENCES.items():
        viz.spacing(model, sentence, path=DOCS / f"{name}.png")
    viz.arcs(model, "The President of the United States", layer=0, head=1, path=DOCS / "arcs.png")
    texts = corpora.heldout_excerpts("bilingual", CHARACTERS)
    count = f"{sum(map(len, texts)):,} characters of {len(texts)} held-out documents, English and Chinese"
    caption = f"{MODEL}; {count}. Intervals: 95% of resamples of documents, seed 0."
    viz.kinds_chart(increments_by_category(model, texts), caption, DOCS / "kinds.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
