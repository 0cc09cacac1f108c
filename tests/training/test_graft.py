"""Grafts: only what should learn learns, always beside a baseline, and a killed one goes on to the bit."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from forked import Command
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lens_positions as lp
from lens_positions.checkpoint import fingerprint, load_base, load_pretrained
from lens_positions.training.__main__ import main
from lens_positions.training.config import GraftConfig, to_json, update_config
from lens_positions.training.data import heldout_windows, tokenize_corpus
from lens_positions.training.graft import GraftedModel, compare, graft
from lens_positions.training.loop import newest_checkpoint, token_nats

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(60):
        text = f"Document {i}. The cat sat on mat {i * i}; the {i} dogs of the town saw it.\n" * 12
        (folder / f"{i:02}.txt").write_text(text, "utf-8")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory, corpus):
    """A Llama over word pieces, with weights that make positions matter."""
    folder = tmp_path_factory.mktemp("base")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False)
    backend.train([str(path) for path in corpus.iterdir()], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=64)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(base, corpus):
    return GraftConfig(
        base=str(base),
        corpus=str(corpus),
        n_ctx=32,
        steps=12,
        batch_size=4,
        learning_rate=1e-2,
        warmup_steps=2,
        eval_every=6,
        eval_windows=24,
        save_every=4,
    )


def losses(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    return [(r["step"], r["loss"]) for r in lines if "loss" in r]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["shared", "per_layer"])
def test_a_frozen_graft_trains_its_source_alone(config, base, tmp_path, source):
    positions = lp.PositionConfig(source=source, hidden=8)
    config = replace(config, positions=positions, steps=60, eval_every=60, save_every=60)
    found = graft(config, tmp_path / "run", cache_dir=tmp_path / "cache")
    assert found["graft_nats_per_token"] < found["baseline_nats_per_token"] - 0.01
    saved = tmp_path / "run" / "graft" / "model"
    assert sorted(p.name for p in saved.iterdir()) == ["positions.json", "positions.safetensors"]
    model, _ = load_pretrained(saved)
    untouched, _ = load_base(base)
    assert all(torch.equal(model.get_parameter(name), p) for name, p in untouched.named_parameters())
    increments = lp.HookedPositionTransformer.from_pretrained(saved).increments("The cat sat on the mat")
    assert increments.std() > 1e-3


@pytest.mark.parametrize("adapt", ["frozen", "lora", "full"])
def test_a_graft_and_its_baseline_start_as_the_untouched_model(config, base, adapt, tmp_path):
    untouched, tokenizer = load_base(base)
    rows = heldout_windows(tokenize_corpus(config.corpus, tmp_path, tokenizer=tokenizer).heldout, 32, 8)
    for positions in (config.positions, lp.PositionConfig(source="static")):
        model = GraftedModel(replace(config, adapt=adapt), positions).model
        with torch.no_grad():
            assert (token_nats(model, rows) - token_nats(untouched, rows)).abs().max() == 0.0


def learned(subject):
    return {name for name, p in subject.model.named_parameters() if p.requires_grad}


def test_what_learns_is_what_was_asked_for(config):
    frozen = learned(GraftedModel(config, config.positions))
    lora = learned(GraftedModel(replace(config, adapt="lora"), config.positions))
    full = learned(GraftedModel(replace(config, adapt="full"), config.positions))
    assert all(name.startswith("position_streams.") for name in frozen)
    assert frozen < lora
    assert {name.split(".")[-4] for name in lora - frozen} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert all("lora_" in name for name in lora - frozen)
    assert frozen < full
    assert "model.layers.1.mlp.up_proj.weight" in full
    static = lp.PositionConfig(source="static")
    assert learned(GraftedModel(config, static)) == set()
    assert learned(GraftedModel(replace(config, adapt="lora"), static)) == lora - frozen


@pytest.mark.slow
@pytest.mark.parametrize("adapt", ["lora", "full"])
def test_the_baseline_learns_from_the_same_data_without_the_source(config, adapt, tmp_path):
    config = replace(config, adapt=adapt, adapt_learning_rate=1e-2, steps=30, eval_every=30, save_every=30)
    found = graft(config, tmp_path / "run", cache_dir=tmp_path / "cache")
    ours, theirs = losses(tmp_path / "run" / "graft"), losses(tmp_path / "run" / "baseline")
    assert ours[0] == theirs[0]
    assert ours[-1] != theirs[-1]
    assert theirs[-1][1] < theirs[0][1] - 0.5
    assert found["baseline_nats_per_token"] < theirs[0][1] - 0.5
    assert found["difference_of_documents"]["documents"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("adapt", ["frozen", "lora", "full"])
def test_the_saved_graft_has_the_loss_that_was_reported(config, adapt, tmp_path):
    config = replace(config, adapt=adapt, adapt_learning_rate=1e-2)
    found = graft(config, tmp_path / "run", cache_dir=tmp_path / "cache")
    model, tokenizer = load_pretrained(tmp_path / "run" / "graft" / "model")
    rows = heldout_windows(tokenize_corpus(config.corpus, tmp_path / "cache", tokenizer=tokenizer).heldout, 32, 24)
    with torch.no_grad():
        assert token_nats(model, rows).mean().item() == pytest.approx(found["graft_nats_per_token"], abs=1e-5)


@pytest.mark.slow
def test_the_comparison_is_a_paired_t_interval_over_documents(config, tmp_path):
    found = graft(config, tmp_path / "run", cache_dir=tmp_path / "cache")
    ours, theirs = (pd.read_csv(tmp_path / "run" / part / "heldout.csv") for part in ("graft", "baseline"))
    assert len(ours) == 3
    assert ours["tokens"].sum() == 22 * 32 == found["heldout_tokens"]
    difference = ours["nats"] / ours["tokens"] - theirs["nats"] / theirs["tokens"]
    half = stats.t.ppf(0.975, 2) * difference.std() / 3**0.5
    of_documents = found["difference_of_documents"]
    assert of_documents["mean"] == pytest.approx(difference.mean())
    assert of_documents["low"] == pytest.approx(difference.mean() - half)
    assert of_documents["high"] == pytest.approx(difference.mean() + half)
    assert json.loads((tmp_path / "run" / "comparison.json").read_text()) == found


@pytest.mark.slow
def test_a_killed_graft_goes_on_to_the_bit(config, tmp_path, capsys):
    given = ["--base", config.base, "--corpus", config.corpus, "--cache", tmp_path / "cache", "--adapt", "lora"]
    given += ["--n-ctx=32", "--steps=60", "--batch-size=4", "--eval-windows=8", "--eval-every=30", "--save-every=7"]
    assert main(["graft", *map(str, given), "--output", str(tmp_path / "whole")]) == 0
    killed = Command(tmp_path, "graft", *given, "--output", tmp_path / "killed")
    log = tmp_path / "killed" / "graft" / "log.jsonl"
    while not (log.exists() and log.read_text("utf-8").count("\n") > 25):
        assert killed.poll() is None, killed.said()
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(losses(tmp_path / "killed" / "graft")) < 60
    capsys.readouterr()
    assert main(["graft", "--resume", str(tmp_path / "killed"), "--cache", str(tmp_path / "cache")]) == 0
    assert "95% t interval" in capsys.readouterr().out
    for name in ("comparison.json", "graft/model/positions.safetensors", "graft/model/adapter_model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing_but_memory(config, tmp_path):
    """It runs layers a second time, when the forward pass that knew their positions is over."""
    for name in (False, True):
        checkpointed = replace(config, gradient_checkpointing=name, adapt="full", adapt_learning_rate=1e-3)
        graft(checkpointed, tmp_path / str(name), cache_dir=tmp_path / "cache")
    plain, again = (losses(tmp_path / str(name) / "graft") for name in (False, True))
    assert plain[0][1] != plain[-1][1]
    for (_, a), (_, b) in zip(plain, again, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("adapt", ["frozen", "lora"])
def test_on_a_bf16_base_what_learns_is_float32_and_moves(config, adapt, tmp_path):
    config = replace(config, dtype="bf16", adapt=adapt, learning_rate=1e-4, adapt_learning_rate=1e-5)
    subject = GraftedModel(config, config.positions)
    assert subject.model.dtype == torch.bfloat16
    assert {p.dtype for p in subject.model.parameters() if p.requires_grad} == {torch.float32}
    before = {name: p.clone() for name, p in subject.model.named_parameters() if p.requires_grad}
    graft(config, tmp_path / "run", cache_dir=tmp_path / "cache")
    subject.restore(tmp_path / "run" / "graft" / "model")
    moved = {n for n, p in subject.model.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert any(".out." in name for name in moved)
    assert any("lora_B" in name for name in moved) == (adapt == "lora")


def test_every_sequence_starts_with_the_token_that_texts_start_with(config, base, tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    assert GraftedModel(config, config.positions).bos is None
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    load_base(base)[0].save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    subject = GraftedModel(replace(config, base=str(tmp_path / "base")), config.positions)
    assert subject.bos == tokenizer.bos_token_id
    seen = []
    subject.model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    from lens_positions.training.loop import Run, new_accelerator

    corpus = tokenize_corpus(config.corpus, tmp_path / "cache", tokenizer=subject.tokenizer)
    Run(config, tmp_path / "run", new_accelerator(config, tmp_path / "run"), corpus, subject).evaluate()
    assert all((rows[:, 0] == subject.bos).all() for rows in seen)


def test_the_configuration_survives_json(config):
    assert update_config(GraftConfig(), json.loads(json.dumps(to_json(config))), "here") == config


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"base": "nowhere/at/all"}, "no model folder at nowhere/at/all"),
        ({"n_ctx": 65}, "n_ctx is 65; expected at most 64"),
        ({"corpus": "klingon"}, "klingon"),
        ({"trackers": ("carrier pigeon",)}, "carrier pigeon"),
    ],
)
def test_bad_grafts_are_one_sentence_and_leave_nothing(config, change, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(lp.PositionsError, match=says):
        graft(replace(config, **change), Path("run"), cache_dir=Path("cache"))
    assert not list(tmp_path.glob("run*"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"positions": lp.PositionConfig(source="static")}, "'static' has nothing to learn"),
        ({"adapt": "full", "dtype": "bf16"}, "bf16 weights do not move"),
        ({"adapt_learning_rate": 0.0}, "adapt_learning_rate is 0.0"),
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"n_ctx": 1}, "n_ctx is 1; expected at least 2"),
        ({"seed": 1 << 31}, "seed is 2147483648"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_configurations_without_sense_are_refused(config, change, says):
    with pytest.raises(lp.PositionsError, match=says):
        replace(config, **change)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--base", "/nowhere"], "no model folder at /nowhere"),
        (["--base", "owner/name/more"], "no model folder"),
        (["--resume", "/nowhere"], "no run to resume"),
        (["--resume", "/nowhere", "--steps", "3"], "expected the run's folder alone"),
    ],
)
def test_bad_requests_end_in_one_sentence(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["graft", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_base_with_streams_of_its_own_is_refused(config, base, tmp_path):
    model = lp.HookedPositionTransformer.from_pretrained(base, positions=lp.PositionConfig(source="shared"))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(lp.PositionsError, match=r"position streams of its own \(shared\)"):
        graft(replace(config, base=str(tmp_path / "model")), tmp_path / "run", cache_dir=tmp_path / "cache")


@pytest.mark.slow
def test_another_base_is_not_resumed(config, base, tmp_path):
    moved = tmp_path / "base"
    model, tokenizer = load_base(base)
    model.save_pretrained(moved)
    tokenizer.save_pretrained(moved)
    config = replace(config, base=str(moved))
    graft(config, tmp_path / "run", cache_dir=tmp_path / "cache")
    (tmp_path / "run" / "graft" / "heldout.csv").unlink()
    before = fingerprint(model)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert fingerprint(model) != before
    model.save_pretrained(moved)
    with pytest.raises(lp.PositionsError, match="another configuration or text"):
        graft(config, tmp_path / "run", resume=True, cache_dir=tmp_path / "cache")
    assert newest_checkpoint(tmp_path / "run" / "graft") is not None


@pytest.mark.slow
def test_dropout_is_the_same_in_a_resumed_run_and_however_often_it_is_saved(config, base, tmp_path, monkeypatch):
    model, tokenizer = load_base(base)
    model.config.attention_dropout = 0.3
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = replace(config, base=str(tmp_path / "base"), adapt="full", adapt_learning_rate=1e-3)
    graft(config, tmp_path / "often", cache_dir=tmp_path / "cache")
    with monkeypatch.context() as broken:
        broken.setattr("lens_positions.training.loop.Run.evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            graft(config, tmp_path / "stopped", cache_dir=tmp_path / "cache")
    graft(config, tmp_path / "stopped", resume=True, cache_dir=tmp_path / "cache")
    for part in ("graft", "baseline"):
        assert losses(tmp_path / "stopped" / part) == losses(tmp_path / "often" / part)
    assert losses(tmp_path / "often" / "graft")[0] == losses(tmp_path / "often" / "baseline")[0]


@pytest.mark.slow
def test_an_interrupt_in_the_last_evaluation_stops_before_the_baseline(config, tmp_path, monkeypatch):
    from lens_positions.training import loop

    evaluate = loop.Run.evaluate

    def interrupted(run, *given):
        if run.step == config.steps:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(run, *given)

    monkeypatch.setattr(loop.Run, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        graft(config, tmp_path / "run", cache_dir=tmp_path / "cache")
    assert (tmp_path / "run" / "graft" / "heldout.csv").exists()
    assert not (tmp_path / "run" / "baseline").exists()
    monkeypatch.undo()
    assert "difference_of_documents" in graft(config, tmp_path / "run", resume=True, cache_dir=tmp_path / "cache")


def test_a_tokenizer_of_another_model_is_refused(config, base, tmp_path):
    sizes = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(tmp_path / "base")
    PreTrainedTokenizerFast.from_pretrained(base).save_pretrained(tmp_path / "base")
    with pytest.raises(lp.PositionsError, match="the model has embeddings of 20;"):
        graft(replace(config, base=str(tmp_path / "base")), tmp_path / "run", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_left_as_it_is(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("mine")
    with pytest.raises(lp.PositionsError, match="exists already"):
        graft(config, tmp_path / "run", cache_dir=tmp_path / "cache")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["precious"]
    with pytest.raises(lp.PositionsError, match="no finished graft"):
        compare(tmp_path / "run")
