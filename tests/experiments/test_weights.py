"""The weights of the study that the repository keeps are those that its tables are of."""

import re
from pathlib import Path

import pytest

import lens_positions as lp
from experiments.suite import weights_of
from experiments.tables import RunName, read_tables

ROOT = Path(__file__).parents[2]
KEPT = sorted(path for path in (ROOT / "experiments" / "weights").iterdir() if path.is_dir())


@pytest.mark.parametrize("folder", KEPT, ids=lambda path: path.name)
def test_kept_weights_are_those_of_the_tables_and_load(folder, tmp_path):
    results = read_tables(ROOT / "experiments" / "results")
    suite, variant, seed = folder.name.split("-")
    run = RunName(suite, variant, int(seed))
    (tmp_path / "model").symlink_to(folder)
    assert weights_of(tmp_path) == results.runs[run]["sha256"]
    model = lp.HookedPositionTransformer.from_pretrained(str(folder))
    assert not (model.increments("How far apart?") == 1).all()

    # What the page says of it is what the tables say.
    (row,) = re.findall(rf"^\| `{folder.name}` .*", (folder.parent / "README.md").read_text(), re.M)
    losses = []
    for name in (run, run._replace(variant="static")):
        scores = results.table("heldout", name)
        shortest = scores[scores["length"] == scores["length"].min()]
        losses.append(f"{shortest['nats'].sum() / shortest['bytes'].sum():.4f}")
    assert row.endswith(f"| {losses[0]} ({losses[1]}) |")
