"""Attention that disperses, the temperature against it, and the task that shows both."""

import json
import math
import shlex
from dataclasses import replace

import families
import numpy as np
import pandas as pd
import pytest
import torch
import tyro

import lens_positions as lp
from experiments.maximum import MaximumConfig, accuracy_table, draw, maximum, train_retriever
from lens_positions.analysis.dispersion import (
    COEFFICIENTS,
    adaptive_temperature,
    attention_dispersion,
    loss_by_length,
    sharpen_scores,
)
from lens_positions.tokenizer import byte_tokenizer
from lens_positions.training.__main__ import main

TEXTS = ["The cat sat on the mat and slept, and it rained.", "Nobody knew why it rained today, and nobody asked."]
TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(5))


def test_the_temperature_is_the_polynomial_of_the_entropy():
    scores = torch.randn(50, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.linspace(
        0, 12, 50, dtype=torch.float64
    ).view(-1, 1)
    for row, given in zip(sharpen_scores(scores), scores, strict=True):
        weights = given.softmax(-1).numpy()
        entropy = -(weights * np.log(weights)).sum()
        beta = max(np.polyval(COEFFICIENTS, entropy), 1) if entropy > 0.5 else 1
        assert row.tolist() == pytest.approx((given * beta).tolist(), rel=1e-4)
    entropies = [-(s.softmax(-1) * s.log_softmax(-1)).sum(-1) for s in (scores, sharpen_scores(scores))]
    assert (entropies[1] <= entropies[0] + 1e-9).all()
    assert (entropies[1] < entropies[0] - 0.05).any()


@pytest.mark.parametrize("hidden", [-math.inf, torch.finfo(torch.float32).min])
def test_what_a_mask_hides_stays_hidden(hidden):
    scores = torch.tensor([[1.0, 0.5, hidden, hidden], [0.2, 0.1, 0.3, hidden]])
    sharp = sharpen_scores(scores)
    assert (sharp[scores == hidden] == hidden).all()
    assert torch.equal(sharp.softmax(-1) == 0, scores == hidden)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "says"),
    {
        **dict.fromkeys(
            ("JetMoeForCausalLM", "GPTJForCausalLM", "Gemma4ForCausalLM"),
            "computes its pattern before TransformerLens shows its scores",
        ),
        "GptOssForCausalLM": "not the softmax of its scores",
        "RecurrentGemmaForCausalLM": "layer 1 shows no attn_scores in TransformerLens",
    }.items(),
)
@pytest.mark.usefixtures("unchecked")
def test_heads_without_scores_to_edit_are_refused(name, says):
    model = lp.HookedPositionTransformer.from_transformers(families.build(name), byte_tokenizer())
    with pytest.raises(lp.PositionsError, match=says):
        adaptive_temperature(model)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPTNeoXForCausalLM", "Gemma2ForCausalLM"])
@pytest.mark.usefixtures("unchecked")
def test_the_temperature_reaches_the_logits_of_other_families(name):
    model = lp.HookedPositionTransformer.from_transformers(families.build(name), byte_tokenizer())
    with torch.no_grad():
        own = model(families.TOKENS)
        sharp = model.run_with_hooks(families.TOKENS, fwd_hooks=adaptive_temperature(model))
    assert (own - sharp).abs().max() > 1e-3


def test_chosen_layers_and_heads_get_sharper_and_no_others(tiny_model):
    model = tiny_model(source="per_layer")
    _, plain = model.run_with_cache(TOKENS)
    with model.hooks(fwd_hooks=adaptive_temperature(model, layers=1, heads=[0])):
        _, cache = model.run_with_cache(TOKENS)
    assert torch.equal(plain["pattern", 0], cache["pattern", 0])
    assert torch.equal(plain["pattern", 1][:, 1:], cache["pattern", 1][:, 1:])
    ours, own = cache["pattern", 1][:, 0], plain["pattern", 1][:, 0]
    expected = sharpen_scores(plain["blocks.1.attn.hook_attn_scores"][:, 0]).softmax(-1)
    assert torch.allclose(ours, expected, atol=1e-6)
    assert (ours.amax(-1) - own.amax(-1)).max() > 1e-3


def test_even_attention_has_the_entropy_of_the_number_of_keys(tiny_model):
    model = tiny_model(source="static")
    with torch.no_grad():
        for layer in model.original_model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    table = attention_dispersion(model, TEXTS)
    assert table["entropy"].tolist() == pytest.approx(table["log_items"].tolist(), rel=1e-5)
    first = table[table["items"] == 4].iloc[0]
    assert first["largest"] == pytest.approx(np.mean([1 / n for n in (4, 5, 6, 7)]))
    assert first["log_items"] == pytest.approx(np.mean(np.log([4, 5, 6, 7])))
    assert list(dict.fromkeys(table["items"])) == [2, 4, 8, 16]  # no window fills 32 to 63


def test_a_sliding_window_has_no_more_items_than_it_holds(randomize):
    config = lp.PositionModelConfig(
        d_model=32, n_layers=1, n_heads=2, n_ctx=64, sliding_window=4, positions=lp.PositionConfig(source="static")
    )
    model = randomize(lp.HookedPositionTransformer.from_config(config))
    with torch.no_grad():
        model.original_model.model.layers[0].self_attn.q_proj.weight.zero_()
    table = attention_dispersion(model, TEXTS)
    late = table[table["items"] >= 4]
    assert late["log_items"].tolist() == pytest.approx([math.log(4)] * len(late))
    assert late["entropy"].tolist() == pytest.approx([math.log(4)] * len(late), rel=1e-5)


def test_entropy_and_largest_weight_are_those_of_the_patterns(tiny_model):
    model = tiny_model(source="per_layer")
    table = attention_dispersion(model, TEXTS, layers=1)
    found = []
    for text in TEXTS:
        _, cache = model.run_with_cache(torch.cat([model.to_tokens(text), torch.tensor([[256]])], dim=1))
        found.append(cache["pattern", 1][0, 1, 15:31])
    weights = [row[row > 0] for x in found for row in x]
    row = table[(table["items"] == 16) & (table["head"] == 1)].iloc[0]
    assert row["entropy"] == pytest.approx(np.mean([float(-(w * w.log()).sum()) for w in weights]), rel=1e-4)
    assert row["largest"] == pytest.approx(np.mean([float(w.max()) for w in weights]), rel=1e-4)
    assert row["n"] == len(weights) == 32
    heads = table[table["head"] != "all"].groupby("items")[["entropy", "largest", "log_items"]].mean()
    pd.testing.assert_frame_equal(table[table["head"] == "all"].set_index("items")[[*heads]], heads, rtol=1e-6)
    sharper = attention_dispersion(model, TEXTS, layers=1, hooks=adaptive_temperature(model))
    assert (sharper["entropy"] <= table["entropy"] + 1e-6).all()


@pytest.mark.slow
def test_the_loss_is_that_of_the_same_tokens_at_every_length(tiny_model):
    model = tiny_model(source="per_layer")
    texts = ["".join(chr(97 + (i * i + 3 * i + j) % 26) for i in range(80)) for j in range(3)]
    hooks = adaptive_temperature(model)
    table = loss_by_length(model, texts, hooks, lengths=(16, 32)).set_index("length")
    documents = [model.to_tokens(text, truncate=False)[0] for text in texts]
    ended = [torch.cat([tokens, torch.tensor([256])]) for tokens in documents]
    for length in (16, 32):
        losses = [[], []]
        for tokens in ended:
            for rows in tokens[:64].view(-1, length):
                for k, active in enumerate(([], hooks)):
                    logits = model.run_with_hooks(rows[None], fwd_hooks=active)[0, :-1]
                    losses[k].append(torch.nn.functional.cross_entropy(logits, rows[1:]).item())
        row = table.loc[length]
        assert [row["loss"], row["changed"]] == pytest.approx([np.mean(x) for x in losses], rel=1e-4)
        assert row["n"] == 3 * 64 // length * (length - 1)
        assert row["low"] <= row["difference"] <= row["high"]
    assert loss_by_length(model, texts, [], lengths=(16,))["difference"].tolist() == [0.0]


def test_the_answer_is_the_class_of_the_largest_number():
    items, _, answers = draw(64, 9, 5, torch.Generator().manual_seed(0))
    assert items.shape == (64, 9, 6)
    for row, answer in zip(items, answers, strict=True):
        assert row[row[:, 0].argmax(), 1:].argmax() == answer


SMALL = {"steps": 150, "batch_size": 32, "classes": 3, "width": 32, "sizes": (8, 64), "tested": 256}


@pytest.mark.slow
def test_training_learns_the_task_and_every_seed_is_its_own():
    asked = MaximumConfig(**(SMALL | {"steps": 400}))
    model, loss = train_retriever(asked, 0)
    assert loss < 0.7 * math.log(3)
    again, _ = train_retriever(asked, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert train_retriever(asked, 1)[1] != loss


@pytest.mark.slow
def test_seeds_are_kept_and_not_trained_again(tmp_path, monkeypatch, capsys):
    asked = MaximumConfig(seeds=(0, 1), results=tmp_path, **SMALL)
    table = maximum(asked)
    assert table["items"].tolist() == [8, 64]
    assert set(table["n_seeds"]) == {2}
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("experiments.maximum.train_retriever", None)
    pd.testing.assert_frame_equal(maximum(asked), table)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    words = shlex.split(json.loads(before["seed-1.json"])["command"])
    assert words[:3] == ["lens-positions", "experiments", "maximum"]
    again = tyro.cli(MaximumConfig, args=[*words[3:], "--results", str(tmp_path)])
    assert again == replace(asked, seeds=(1,))
    with pytest.raises(lp.PositionsError, match="is of another configuration"):
        maximum(replace(asked, steps=3))
    assert "seed 0: done before" in capsys.readouterr().err


def test_weights_that_round_to_0_are_still_items(randomize, tiny_model):
    """Even attention is over the keys that the mask leaves, however sharp the heads are."""
    model = randomize(tiny_model())
    plain = attention_dispersion(model, TEXTS)
    sharper = [(f"blocks.{layer}.attn.hook_rot_q", lambda queries, hook: 3e3 * queries) for layer in range(2)]
    sharp = attention_dispersion(model, TEXTS, hooks=sharper)
    assert sharp["largest"].mean() > 0.99
    assert sharp["log_items"].tolist() == pytest.approx(plain["log_items"].tolist())


def test_accuracies_have_an_interval_over_seeds():
    rows = [
        {"seed": seed, "items": 16, "temperature": name, "accuracy": value, "entropy": 1.0, "largest": 0.5}
        for seed in range(3)
        for name, value in (("learned", 0.5 + 0.1 * seed), ("adaptive", 0.6 + 0.1 * seed))
    ]
    row = accuracy_table(pd.DataFrame(rows)).iloc[0]
    assert [row["learned"], row["adaptive"], row["difference"]] == pytest.approx([0.6, 0.7, 0.1])
    reach = 4.302653 * 0.1 / math.sqrt(3)
    assert [row["learned_low"], row["learned_high"]] == pytest.approx([0.6 - reach, 0.6 + reach])
    assert [row["difference_low"], row["difference_high"]] == pytest.approx([0.1, 0.1])


@pytest.mark.usefixtures("unchecked")
def test_bad_requests_are_one_sentence(tiny_model, tmp_path, capsys):
    model = tiny_model()
    for call, says in {
        lambda: adaptive_temperature(model, heads=[9]): "there is no head 9; expected heads from 0 to 3",
        lambda: adaptive_temperature(model, layers=5): "layer 5 has no positions of its own",
        lambda: loss_by_length(
            model, TEXTS, [], lengths=(12, 32)
        ): "expected whole numbers from 2 that divide the longest",
        lambda: loss_by_length(model, TEXTS, [], lengths=(512,)): "no text has 512 tokens",
        lambda: loss_by_length(model, TEXTS, [], lengths=64): "lengths is 64; expected whole numbers",
    }.items():
        with pytest.raises(lp.PositionsError, match=says):
            call()
    for words, says in {
        ("--seeds", "0", "0"): "a seed or a size was given twice",
        ("--learning-rate", "nan"): "learning_rate is nan; expected a positive number",
    }.items():
        assert main(["maximum", *words, "--results", str(tmp_path)]) == 2
        assert says in capsys.readouterr().err
    assert main(["maximum", "--tested", "0", "--results", str(tmp_path)]) == 2
    assert "a number of the task is too small" in capsys.readouterr().err
