"""Tidy tables: every value of the files that runs left, once, and nothing of weights that are gone."""

import json

import pandas as pd
import pytest

from experiments.commands import main
from experiments.gather import gather
from experiments.options import GatherConfig
from experiments.tables import RunName, read_tables, run_of_model
from lens_positions import PositionsError

STATIC, SHARED = RunName("tiny", "static", 0), RunName("tiny", "shared", 0)
SMOLLM2 = RunName("models", "smollm2-135m-instruct", None)


def weights(letter):
    return {"model.safetensors": letter * 64}


def scored(files, run, letter="a", **measured):
    """What `suite` and `measure` leave of a run."""
    folder = files / run.suite / f"{run.variant}-{run.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    described = {"variant": run.variant, "seed": run.seed, "command": "lens-positions train", "sha256": weights(letter)}
    (folder / "run.json").write_text(json.dumps(described, indent=2) + "\n")
    (folder / "heldout.csv").write_text("document,source,length,bytes,nats\n0,a,8,10,1.500000\n1,b,8,20,2.250000\n")
    measured_of(folder, weights(letter), **measured)


def measured_of(folder, sha256, **tables):
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name, text in tables.items():
        entries[name] = {"sha256": sha256, "command": name, "rows": 0 if text is None else text.count("\n") - 1}
        if text is not None:
            (folder / f"{name}.csv").write_text(text)
    (folder / "measured.json").write_text(json.dumps(entries))


@pytest.fixture
def files(tmp_path):
    files = tmp_path / "files"
    scored(files, STATIC)
    scored(files, SHARED, kinds='layer,kind,mean\n0,letter,1.10\n0,"end, of document",2\n')
    measured_of(files / "rope" / "tiny-shared-0", {"model": "b" * 64}, norms="layer,norm\n0,1\n1,2.50\n")
    measured_of(files / "machinery" / SMOLLM2.variant, {"model": "c" * 64}, norms="layer,norm\n0,1e-07\n")
    (files / "maximum").mkdir()
    (files / "maximum" / "seed-3.csv").write_text("seed,items,accuracy\n3,16,0.5\n")
    described = {"command": "lens-positions experiments maximum", "config": {}, "loss": 0.1, "seconds": 2}
    (files / "maximum" / "seed-3.json").write_text(json.dumps(described))
    return files


def gathered(files):
    gather(GatherConfig(files, files.parent / "tables"))
    return read_tables(files.parent / "tables")


def test_tables_say_of_which_run_a_row_is_and_keep_every_letter(files):
    gathered(files)
    tables = files.parent / "tables"
    assert (tables / "norms.csv").read_text() == (
        "suite,variant,seed,layer,norm\nmodels,smollm2-135m-instruct,,0,1e-07\ntiny,shared,0,0,1\ntiny,shared,0,1,2.50\n"
    )
    assert '\ntiny,shared,0,0,"end, of document",2\n' in (tables / "kinds.csv").read_text()
    assert "\ntiny,static,0,1,b,8,20,2.250000\n" in (tables / "heldout.csv").read_text()
    assert (tables / "maximum.csv").read_text() == "suite,variant,seed,items,accuracy\nmaximum,retriever,3,16,0.5\n"


def test_what_is_read_is_what_the_files_say(files):
    tables = gathered(files)
    assert list(tables.seeds("heldout", "tiny", "shared")) == [0]
    expected = pd.read_csv(files / "rope" / "tiny-shared-0" / "norms.csv")
    pd.testing.assert_frame_equal(tables.table("norms", SHARED), expected)
    assert tables.table("norms", STATIC) is None
    assert tables.runs[STATIC] == json.loads((files / "tiny" / "static-0" / "run.json").read_text())
    assert set(tables.measured[SHARED]) == {"kinds", "norms"}
    assert tables.measured[SMOLLM2]["norms"]["sha256"] == {"model": "c" * 64}
    assert tables.maximum[3]["seconds"] == 2


def test_a_model_is_a_run_where_its_name_has_a_suite_a_variant_and_a_seed():
    assert run_of_model("tiny-per_layer-12") == RunName("tiny", "per_layer", 12)
    assert run_of_model("smollm2-135m-instruct") == SMOLLM2
    assert run_of_model("bilingual-elastic-0") == RunName("models", "bilingual-elastic-0", None)
    assert str(RunName("tiny", "per_layer", 12)) == "tiny-per_layer-12"


def test_gathering_again_changes_nothing_and_says_so(files, capsys):
    gathered(files)
    before = {path: path.read_bytes() for path in (files.parent / "tables").iterdir()}
    assert main(["gather", "--files", str(files), "--results", str(files.parent / "tables")]) == 0
    assert "nothing" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (files.parent / "tables").iterdir()} == before


def test_what_was_gathered_before_stays_beside_what_is_new(files, tmp_path):
    before = gathered(files)
    elsewhere = tmp_path / "elsewhere"
    scored(elsewhere, RunName("tiny", "static", 1))
    gather(GatherConfig(elsewhere, files.parent / "tables"))
    after = read_tables(files.parent / "tables")
    assert set(after.runs) == {*before.runs, RunName("tiny", "static", 1)}
    assert list(after.seeds("heldout", "tiny", "static")) == [0, 1]
    pd.testing.assert_frame_equal(after.table("kinds", SHARED), before.table("kinds", SHARED))
    assert after.measured == before.measured


def test_of_new_weights_nothing_that_was_measured_of_the_old_is_kept(files, tmp_path):
    gathered(files)
    scored(tmp_path / "anew", SHARED, letter="d")
    gather(GatherConfig(tmp_path / "anew", files.parent / "tables"))
    after = read_tables(files.parent / "tables")
    assert after.runs[SHARED]["sha256"] == weights("d")
    assert after.table("heldout", SHARED) is not None
    assert after.table("kinds", SHARED) is after.table("norms", SHARED) is None
    assert SHARED not in after.measured
    assert after.table("norms", SMOLLM2) is not None


def test_a_run_that_diverges_loses_its_scores(files, tmp_path):
    gathered(files)
    folder = tmp_path / "anew" / "tiny" / "static-0"
    folder.mkdir(parents=True)
    (folder / "diverged.json").write_text(json.dumps({"step": 7, "command": "lens-positions train", "config": {}}))
    gather(GatherConfig(tmp_path / "anew", files.parent / "tables"))
    after = read_tables(files.parent / "tables")
    assert after.runs[STATIC]["step"] == 7
    assert after.table("heldout", STATIC) is None


def test_a_measurement_that_is_refused_now_is_gone(files):
    gathered(files)
    folder = files / "tiny" / "shared-0"
    (folder / "kinds.csv").unlink()
    entry = {"kinds": {"sha256": weights("a"), "command": "kinds", "rows": 0, "refused": "there are none"}}
    (folder / "measured.json").write_text(json.dumps(entry))
    after = gathered(files)
    assert after.table("kinds", SHARED) is None
    assert after.measured[SHARED]["kinds"]["refused"] == "there are none"
    assert not (files.parent / "tables" / "kinds.csv").exists()


@pytest.mark.parametrize("name", ["heldout.csv", "run.json", "measured.json"])
def test_a_damaged_file_is_one_sentence_and_no_table_is_changed(files, name):
    before = gathered(files)
    (files / "tiny" / "shared-0" / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PositionsError, match=f"{name} is damaged"):
        gathered(files)
    assert read_tables(files.parent / "tables").runs == before.runs


def test_nothing_to_gather_is_refused(tmp_path):
    with pytest.raises(PositionsError, match="has no results; expected what lens-positions experiments suite, measure"):
        gather(GatherConfig(tmp_path / "none", tmp_path / "tables"))
    assert not (tmp_path / "tables").exists()
