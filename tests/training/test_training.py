"""Training: resumes to the bit, agrees over processes, evaluates on what it never saw, and refuses clearly."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import Command

from lens_positions import HookedPositionTransformer, PositionConfig, PositionModelConfig, PositionsError
from lens_positions.core.attach import increment_table
from lens_positions.training.__main__ import main
from lens_positions.training.config import TrainConfig, load_preset, preset_names, to_json, update_config
from lens_positions.training.loop import newest_checkpoint, train

ROOT = Path(__file__).parents[2]
SMALL = [
    "--model.d-model=32",
    "--model.n-layers=2",
    "--model.n-heads=2",
    "--model.n-ctx=32",
    "--batch-size=4",
    "--eval-windows=8",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        text = f"Document {i}. The cat sat on mat {i * i}; 中国 has {i} cities.\n" * 8
        (folder / f"{i:02}.txt").write_text(text, "utf-8")
    return folder


@pytest.fixture
def config(corpus):
    return TrainConfig(
        model=PositionModelConfig(d_model=32, n_layers=2, n_heads=2, n_ctx=32),
        corpus=str(corpus),
        steps=12,
        batch_size=4,
        warmup_steps=2,
        eval_every=6,
        eval_windows=8,
        save_every=4,
    )


def losses(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    return [(r["step"], r["loss"]) for r in lines if "loss" in r]


def evaluations(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    return [r for r in lines if "heldout_nats_per_byte" in r]


def command(*arguments):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def called(*arguments):
    """What `command` does, in this process, which has imported everything already: the exit status."""
    return main([str(argument) for argument in arguments[2:]])


@pytest.mark.slow
def test_the_loss_falls_and_the_model_loads(config, tmp_path):
    config = replace(config, steps=60, learning_rate=1e-2, eval_every=60, save_every=60)
    final = train(config, tmp_path / "run", cache_dir=tmp_path / "cache")
    assert losses(tmp_path / "run")[0][1] > 5
    assert final["heldout_nats_per_byte"] < 3
    assert final["heldout_bits_per_byte"] == pytest.approx(final["heldout_nats_per_byte"] / 0.6931471805599453)
    assert len(final["increments"]) == 2
    assert {"mean", "std", "min", "max", "share_at_cap"} <= set(final["increments"][0])
    model = HookedPositionTransformer.from_pretrained(tmp_path / "run" / "model")
    assert model.increments("cat").std() > 0


@pytest.mark.slow
def test_the_evaluation_is_the_models_loss_on_held_out_bytes(config, tmp_path):
    final = train(config, tmp_path / "run", cache_dir=tmp_path / "cache")
    model = HookedPositionTransformer.from_pretrained(tmp_path / "run" / "model")
    from lens_positions.training.data import heldout_windows, tokenize_corpus

    windows = heldout_windows(tokenize_corpus(config.corpus, tmp_path / "cache").heldout, 32, 8)
    with torch.no_grad():
        nats = model(windows[:, :-1]).log_softmax(-1).gather(-1, windows[:, 1:, None]).sum().item()
    expected = -nats / int((windows[:, 1:] != 256).sum())
    assert final["heldout_nats_per_byte"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_a_run_killed_at_an_arbitrary_step_and_resumed_logs_the_same_losses_to_the_bit(corpus, tmp_path):
    arguments = ["-m", "lens_positions", "train", "--corpus", corpus, "--cache", tmp_path / "cache", *SMALL]
    arguments += ["--steps=80", "--save-every=8", "--eval-every=40", "--warmup-steps=5"]
    assert called(*arguments, "--output", tmp_path / "whole") == 0

    killed = Command(tmp_path, *arguments[2:], "--output", tmp_path / "killed")
    log = tmp_path / "killed" / "log.jsonl"
    while not (log.exists() and log.read_text("utf-8").count("\n") > 30):
        assert killed.poll() is None, killed.said()
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(losses(tmp_path / "killed")) < 80
    assert called("-m", "lens_positions", "train", "--resume", tmp_path / "killed", "--cache", tmp_path / "cache") == 0

    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert evaluations(tmp_path / "killed") == evaluations(tmp_path / "whole")
    first = (tmp_path / "killed/model/model.safetensors").read_bytes()
    assert first == (tmp_path / "whole/model/model.safetensors").read_bytes()


@pytest.mark.slow
def test_an_interrupt_saves_and_leaves_cleanly(corpus, tmp_path):
    arguments = ["-m", "lens_positions", "train", "--corpus", corpus, "--cache", tmp_path / "cache", *SMALL]
    run = Command(tmp_path, *arguments[2:], "--steps=100000", "--output", tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    while not (log.exists() and log.read_text("utf-8").count("\n") > 15):
        assert run.poll() is None, run.said()
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) == 130
    _, error = run.said()
    assert "Traceback" not in error
    assert "--resume" in error
    step = int(newest_checkpoint(tmp_path / "run").name.split("-")[1])
    assert losses(tmp_path / "run")[-1][0] == step


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(corpus, tmp_path):
    arguments = [
        "-m",
        "lens_positions",
        "train",
        "--corpus",
        corpus,
        "--cache",
        tmp_path / "cache",
        *SMALL,
        "--steps=20",
    ]
    assert called(*arguments, "--output", tmp_path / "one") == 0
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    two = command(*launch, *arguments, "--output", tmp_path / "two")
    assert two.wait() == 0, two.stderr.read()
    single, double = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [s for s, _ in single] == [s for s, _ in double] == list(range(1, 21))
    assert max(abs(a - b) for (_, a), (_, b) in zip(single, double, strict=True)) < 1e-5


@pytest.mark.slow
def test_accumulated_batches_give_the_losses_of_whole_ones(config, tmp_path):
    train(config, tmp_path / "whole", cache_dir=tmp_path / "cache")
    train(replace(config, accumulate=2), tmp_path / "parts", cache_dir=tmp_path / "cache")
    for (_, a), (_, b) in zip(losses(tmp_path / "whole"), losses(tmp_path / "parts"), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_models_that_differ_in_source_start_from_the_same_function(config, tmp_path):
    first = {}
    for source in ("static", "shared", "per_layer"):
        model = replace(config.model, positions=PositionConfig(source=source))
        train(replace(config, model=model, steps=1), tmp_path / source, cache_dir=tmp_path / "cache")
        first[source] = losses(tmp_path / source)[0]
    assert first["static"] == first["shared"] == first["per_layer"]


@pytest.mark.slow
def test_a_frozen_table_comes_from_a_trained_shared_source_and_does_not_train(config, tmp_path):
    shared = replace(config, model=replace(config.model, positions=PositionConfig(source="shared")), learning_rate=1e-2)
    train(shared, tmp_path / "shared", cache_dir=tmp_path / "cache")
    model = replace(config.model, positions=PositionConfig(source="frozen"))
    frozen = replace(config, model=model, frozen_from=tmp_path / "shared" / "model")
    train(frozen, tmp_path / "frozen", cache_dir=tmp_path / "cache")
    table = increment_table(HookedPositionTransformer.from_pretrained(tmp_path / "shared" / "model"))
    assert table.std() > 0
    assert torch.equal(table, increment_table(HookedPositionTransformer.from_pretrained(tmp_path / "frozen" / "model")))


@pytest.mark.slow
def test_bf16_training_keeps_positions_and_the_loss_finite(config, tmp_path):
    final = train(replace(config, precision="bf16"), tmp_path / "run", cache_dir=tmp_path / "cache")
    assert final["heldout_nats_per_byte"] < 6


def test_every_preset_loads_and_its_configuration_survives_json():
    assert set(preset_names()) >= {"quick", "tiny", "base", "paper"}
    for name in preset_names():
        config = load_preset(name)
        assert update_config(TrainConfig(), json.loads(json.dumps(to_json(config))), name) == config


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no command"),
        (["fly"], "'fly' is no command"),
        (["train", "--preset", "huge"], "expected one of base, long, paper, quick, tiny"),
        (["train", "--corpus", "klingon"], "klingon"),
        (["train", "--resume", "/nowhere"], "no run to resume"),
    ],
)
def test_bad_requests_end_in_one_sentence(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps", "0"], "steps is 0"),
        (["--model.d-model", "10"], "d_model 10"),
        (["--accumulate", "3"], "no multiple of accumulate"),
        (["--frozen-from", "somewhere"], "expected source 'frozen'"),
        (["--learning-speed", "3"], "--learning-speed"),
        (["--steps", "many"], "many"),
    ],
)
def test_bad_fields_are_refused_in_a_sentence(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["train", *arguments])
    assert left.value.code == 2
    output = "".join(capsys.readouterr())
    assert says in output
    assert "Traceback" not in output
    assert not (tmp_path / "runs").exists()


def test_an_unknown_field_of_a_preset_is_refused_by_name():
    with pytest.raises(PositionsError, match="unknown field 'learning_speed'"):
        update_config(TrainConfig(), {"learning_speed": 3}, "a preset")


def test_a_folder_in_use_is_left_as_it_is(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("mine")
    with pytest.raises(PositionsError, match="exists already"):
        train(config, tmp_path / "run", cache_dir=tmp_path / "cache")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["precious"]


def test_a_place_that_cannot_be_written_is_one_sentence(corpus, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    arguments = ["train", "--corpus", str(corpus), "--cache", str(tmp_path / "cache"), *SMALL]
    assert main([*arguments, "--output", str(tmp_path / "file" / "run")]) == 2
    assert "Not a directory" in capsys.readouterr().err


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_whole(config, tmp_path, monkeypatch):
    from lens_positions.training import loop

    save, calls = loop.save_file, []

    def fills_up(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        save(*arguments, **options)

    monkeypatch.setattr(loop, "save_file", fills_up)
    with pytest.raises(PositionsError, match="No space left on device"):
        train(config, tmp_path / "run", cache_dir=tmp_path / "cache")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    train(config, tmp_path / "run", resume=True, cache_dir=tmp_path / "cache")
    assert losses(tmp_path / "run")[-1][0] == 12


@pytest.mark.slow
def test_a_run_that_stopped_before_its_first_checkpoint_starts_over(config, tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr("lens_positions.training.loop.Run._save", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "stopped", cache_dir=tmp_path / "cache")
    assert losses(tmp_path / "stopped")
    train(config, tmp_path / "stopped", resume=True, cache_dir=tmp_path / "cache")
    train(config, tmp_path / "whole", cache_dir=tmp_path / "cache")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_resuming_another_configuration_is_refused(config, tmp_path):
    train(config, tmp_path / "run", cache_dir=tmp_path / "cache")
    with pytest.raises(PositionsError, match="another configuration"):
        train(replace(config, seed=1), tmp_path / "run", resume=True, cache_dir=tmp_path / "cache")


def test_a_damaged_checkpoint_is_one_sentence(config, tmp_path):
    train(config, tmp_path / "run", cache_dir=tmp_path / "cache")
    path = newest_checkpoint(tmp_path / "run") / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(PositionsError, match="is damaged"):
        train(config, tmp_path / "run", resume=True, cache_dir=tmp_path / "cache")


def test_a_loss_that_is_no_number_stops_the_run(config, tmp_path):
    with pytest.raises(PositionsError, match="the loss is"):
        train(replace(config, learning_rate=1e30, clip=1e30), tmp_path / "run", cache_dir=tmp_path / "cache")


@pytest.mark.slow
def test_a_run_keeps_the_model_as_it_was_at_milestones(config, tmp_path):
    train(replace(config, keep_at=(4, 8)), tmp_path / "whole", cache_dir=tmp_path / "cache")
    assert sorted(path.name for path in (tmp_path / "whole/at").iterdir()) == ["step-00000004", "step-00000008"]

    # What a run of 12 steps had after 8 is what its checkpoint of that step had.
    for step in (4, 8):
        stopped = tmp_path / f"stopped-{step}"
        config_of_stop = replace(config, keep_at=(step,), save_every=6)
        train(config_of_stop, stopped, cache_dir=tmp_path / "cache")
        kept, again = (
            HookedPositionTransformer.from_pretrained(run / "at" / f"step-{step:08d}")
            for run in (tmp_path / "whole", stopped)
        )
        final = HookedPositionTransformer.from_pretrained(stopped / "model")
        text = "The cat sat on mat 9."
        assert torch.equal(kept(text), again(text))
        assert not torch.equal(kept(text), final(text))


@pytest.mark.parametrize("steps", [(0,), (13,)])
def test_a_milestone_is_a_step_of_the_run(config, steps):
    with pytest.raises(PositionsError, match=r"keep_at is \d+; expected at least 1, a whole number up to 12"):
        replace(config, keep_at=steps)


def test_fixed_increments_are_asked_for_in_one_way(config):
    heads = replace(config.model, positions=PositionConfig("frozen", per_head=True))
    assert replace(config, model=heads, head_increments=(0.5, 2.0)).head_increments == (0.5, 2.0)
    for wrong, sentence in (
        ({"head_increments": (1.0, 2.0)}, "given for the source 'per_layer'; expected source 'frozen'"),
        ({"model": heads, "head_increments": (1.0,)}, "has 1 numbers; expected one for each of 2 heads"),
        ({"model": heads, "head_increments": (1.0, 0.0)}, "head_increments is 0.0; expected a positive number"),
        ({"model": heads, "frozen_as": "constant"}, "frozen_as is 'constant' without frozen_from; expected both"),
    ):
        with pytest.raises(PositionsError, match=re.escape(sentence)):
            replace(config, **wrong)


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["compiler", "cache"])
def test_training_goes_on_eager_where_a_compiler_or_its_cache_is_missing(tmp_path, corpus, missing):
    if missing == "cache" and not Path("/proc/self").exists():
        pytest.skip("/proc is a folder in which nobody can write, the administrator included")
    wrong = {"TORCHINDUCTOR_CACHE_DIR": "/proc" if missing == "cache" else str(tmp_path / "inductor")}
    if missing == "compiler":
        wrong["PATH"] = str(tmp_path)
    arguments = ["train", "--corpus", str(corpus), *SMALL, "--steps=3", "--cache", str(tmp_path / "cache")]
    assert called("-m", "lens_positions", *arguments, "--output", tmp_path / "eager") == 0
    process = Command(tmp_path, *arguments, "--output", tmp_path / "compiled", "--compile", environment=wrong)
    status, (_, said) = process.wait(), process.said()
    assert status == 0, said
    assert "torch.compile failed" in said
    assert "training goes on without it" in said
    assert "Traceback" not in said
    assert losses(tmp_path / "compiled") == losses(tmp_path / "eager")


def test_compiling_with_gradient_checkpointing_is_refused_on_the_command_line(tmp_path, corpus, capsys):
    arguments = ["graft", "--base", "smollm2-135m-instruct", "--corpus", str(corpus), "--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--compile", "--gradient-checkpointing"])
    assert left.value.code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "compile is given with gradient_checkpointing; expected one of them" in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()
