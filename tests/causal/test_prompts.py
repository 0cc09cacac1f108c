"""Many prompts at once: each gives what it gives alone, places are what they are called, and errors are told."""

import json
import math
from pathlib import Path

import families
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from tiny_models import drawn_weights

import lens_positions as lp
from lens_positions import causal
from lens_positions.causal import prompts as module
from lens_positions.causal.prompt_tables import read_prompts

TEXTS = ["The cat", "A dog sat on the mat.", "Once, a president spoke", "中文 a", "it"]
TABLE = pd.DataFrame(
    {
        "animal": ["cat", "horse", "elephant", "dog"],
        "corrupted_animal": ["dog", "mouse", "antelope", "cow"],
        "answer": [".", ".", ",", "s"],
        "wrong": ["!", "?", "!", "t"],
    }
)
TEMPLATE = "The {animal} sat"


def small_model(source="per_layer", per_head=False, gap="before", dtype=torch.float32):
    config = lp.PositionModelConfig(
        d_model=32, n_layers=3, n_heads=4, d_mlp=48, n_ctx=64,
        positions=lp.PositionConfig(source=source, per_head=per_head, gap=gap),
    )  # fmt: skip
    model = drawn_weights(lp.HookedPositionTransformer.from_config(config), 0)
    return model if dtype == torch.float32 else model.to(dtype, print_details=False)


@pytest.fixture(scope="module")
def model():
    return small_model()


def of_prompt(found, row):
    return found.of_prompts[found.of_prompts["prompt"] == row]["effect"].to_numpy()


@pytest.mark.slow
@pytest.mark.parametrize("source", ["static", "shared", "per_layer", "frozen"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("gap", ["before", "after"])
def test_gradients_in_padded_batches_are_those_of_each_prompt_alone(source, per_head, gap):
    model = small_model(source, per_head, gap, torch.float64)  # but for cos and sin, which are float32 in any model
    for metric in (causal.loss(), causal.logit_difference(5, 9), causal.log_probability(97, at=1)):
        alone = [causal.attribution(model, text, metric).double().numpy() for text in TEXTS]
        for size in (1, 30, 500):
            found = causal.attribution(model, TEXTS, metric, tokens_a_batch=size)
            for row, values in enumerate(alone):
                np.testing.assert_allclose(of_prompt(found, row), values.ravel(), atol=1e-5 * np.abs(values).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["GPTNeoXForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Qwen3ForCausalLM", "MixtralForCausalLM",
     "GPTJForCausalLM", "Cohere2ForCausalLM", "RecurrentGemmaForCausalLM", "FalconH1ForCausalLM",
     "DeepseekV3ForCausalLM"],
)  # fmt: skip
def test_other_families_give_each_prompt_its_own_gradients(name):
    model = lp.HookedPositionTransformer.from_transformers(families.build(name))
    prompts = [torch.randint(2, 60, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 9, 4, 7)]
    for metric in (causal.loss(), causal.log_probability(5)):
        found = causal.attribution(model, prompts, metric)
        assert found.table["mean"].abs().max() > 1e-4
        for row, prompt in enumerate(prompts):
            alone = causal.attribution(model, prompt, metric).double().numpy()
            np.testing.assert_allclose(of_prompt(found, row), alone.ravel(), atol=2e-5 * np.abs(alone).max())


@pytest.mark.slow
@pytest.mark.parametrize("source", ["static", "shared", "per_layer"])
@pytest.mark.parametrize("layers", [None, [2, 0]])
def test_mediation_in_batches_is_that_of_each_pair_alone(source, layers):
    model = small_model(source)
    pairs = pd.DataFrame(
        {"clean": ["The cat", "A dog ran", "a mouse"], "corrupted": ["The dog", "A cat sat", "a house"]}
    )
    for metric in (causal.logit_difference(5, 9), causal.loss()):
        alone = [
            causal.mediation(model, clean, corrupted, metric, layers)["mean"].to_numpy()
            for clean, corrupted in pairs.itertuples(index=False)
        ]
        for size in (1, 500):
            found = causal.mediation(model, pairs, metric=metric, layers=layers, tokens_a_batch=size)
            for row, values in enumerate(alone):
                np.testing.assert_allclose(of_prompt(found, row), values, atol=1e-5)
    assert set(found.table["n"]) == {3}


@pytest.mark.slow
def test_sweeps_of_lists_and_pairs_are_those_of_each_alone(model):
    metric = causal.logit_difference(5, 9)
    found = causal.gap_sweep(model, TEXTS, metric, 0.7, layers=[1])
    for row, text in enumerate(TEXTS):
        alone = causal.gap_sweep(model, text, metric, 0.7, [1])
        np.testing.assert_allclose(of_prompt(found, row), alone.ravel().double().numpy(), atol=1e-7)
    found = causal.patch_sweep(model, ["The dog", "A cat"], ["The cat", "A dog"], metric)
    alone = causal.patch_sweep(model, "A cat", "A dog", metric)
    np.testing.assert_allclose(of_prompt(found, 1), alone.ravel().double().numpy(), atol=1e-7)


@pytest.mark.slow
def test_hooks_and_arguments_that_batches_do_not_know_go_one_by_one(model, monkeypatch):
    """An edit in place of a padded row would not be that of the prompt, so no row is padded."""
    monkeypatch.setattr(module, "Batch", None)
    mean = lp.ablate(model, to="mean", layers=0)
    with model.hooks(fwd_hooks=mean):
        found = causal.attribution(model, TEXTS[:2], causal.loss())
        alone = causal.attribution(model, TEXTS[0], causal.loss())
    np.testing.assert_allclose(of_prompt(found, 0), alone.ravel().double().numpy(), atol=1e-7)
    integrated = causal.attribution(model, TEXTS[:2], causal.loss(), "integrated")
    alone = causal.attribution(model, TEXTS[1], causal.loss(), "integrated")
    np.testing.assert_allclose(of_prompt(integrated, 1), alone.ravel().double().numpy(), atol=1e-7)


def test_blocks_that_run_twice_give_the_same_gradients(model, monkeypatch):
    whole = causal.attribution(model, TEXTS, causal.loss()).of_prompts["effect"]
    monkeypatch.setattr(module, "ACTIVATIONS", 0)
    pieces = causal.attribution(model, TEXTS, causal.loss()).of_prompts["effect"]
    np.testing.assert_allclose(whole, pieces, atol=1e-6)


@pytest.mark.slow
def test_a_table_says_what_is_measured_and_where():
    model = small_model(dtype=torch.float64)
    found = causal.attribution(model, TABLE, template=TEMPLATE)
    assert found.prompts == 4
    table = found.table[found.table["layer"] == 1]
    assert list(dict.fromkeys(table["span"])) == ["(start)", "The", "animal", "sat"]
    assert table[table["span"] == "animal"]["n"].tolist() == [4, 4, 4, 2, 2, 1, 1, 1]  # cat, horse, elephant, dog
    assert table[table["span"] == "sat"]["text"].tolist() == [" ", "s", "a", "t"]
    for row, filled in enumerate(TABLE.itertuples()):
        metric = causal.logit_difference(ord(filled.answer), ord(filled.wrong))
        alone = causal.attribution(model, f"The {filled.animal} sat", metric)
        expected = alone.ravel().double().numpy()
        np.testing.assert_allclose(of_prompt(found, row), expected, atol=1e-5 * np.abs(expected).max())

    # "datasets" and pandas are one, and tokens may be counted from the end.
    same = causal.attribution(model, Dataset.from_pandas(TABLE), template=TEMPLATE)
    pd.testing.assert_frame_equal(same.table, found.table)
    ends = causal.attribution(model, TABLE, template=TEMPLATE, count_from="end").table
    ends = ends[(ends["layer"] == 0) & (ends["span"] == "animal")]
    assert ends["token"].tolist() == list(range(-8, 0))
    assert ends["n"].tolist() == [1, 1, 1, 2, 2, 4, 4, 4]
    plain = causal.attribution(model, TEXTS, causal.loss(), count_from="end").table
    assert plain[plain["layer"] == 0]["token"].tolist() == list(range(-24, 0))
    assert plain[plain["layer"] == 0]["n"].tolist()[-3:] == [5, 5, 5]


@pytest.mark.slow
def test_pairs_of_other_lengths_are_aligned_by_span_and_left_out_where_they_have_no_partner(model):
    table = pd.DataFrame({"animal": ["cat", "horse"], "corrupted_animal": ["horse", "cow"], "answer": [".", "."]})
    for count_from, pairs in (("start", {5: 5, 6: 6, 7: 7}), ("end", {5: 7, 6: 8, 7: 9})):
        (first, second) = read_prompts(model, table, TEMPLATE, count_from)
        front, back = {i: i for i in range(5)}, {i: i + 2 for i in range(8, 12)}
        assert first.pairs == front | pairs | back
        assert second.pairs is not None
        assert len(second.pairs) == 12
        found = causal.patch_sweep(model, table, template=TEMPLATE, count_from=count_from)
        alone = causal.patch_sweep(
            model, "The horse sat", "The cat sat", causal.log_probability(ord(".")), align=first.pairs
        )
        np.testing.assert_allclose(of_prompt(found, 0), alone.ravel().double().numpy(), atol=1e-7)
        two = found.table[(found.table["layer"] == 0) & (found.table["span"] == "animal")]
        assert sorted(two["n"]) == [2, 2, 2]  # the other two of "horse" have no partner in "cow"


def test_spans_of_subwords_end_where_their_last_token_does(smollm2):
    model = lp.HookedPositionTransformer.from_pretrained(smollm2)
    table = pd.DataFrame({"name": ["Mary", "Bartholomew"], "other": ["John", "Ann"], "answer": [" Mary", " Bart"]})
    rows = read_prompts(model, table, "When {name} and {other} met, {name} said")
    labels = [model.to_str_tokens(row.clean) for row in rows]
    for row, of_row, (name, other) in zip(rows, labels, (("Mary", "John"), ("Bartholomew", "Ann")), strict=True):
        spans = {}
        for (span, _), label in zip(row.places, of_row, strict=True):
            spans[span] = spans.get(span, "") + label
        assert spans["name"] == f" {name}"
        assert spans["other"] == f" {other}"
        assert spans["name (2)"] == f" {name}"
        assert list(spans)[-1] == "said"
    assert rows[0].answer == model.to_single_token(" Mary")


def test_means_and_intervals_are_those_of_a_bootstrap_over_prompts():
    values = np.array([[1.0, 5.0], [2.0, np.nan], [6.0, 7.0]])
    rows = [(p, 0, t, values[p, t]) for p in range(3) for t in range(2)]
    of_prompts = pd.DataFrame(rows, columns=["prompt", "layer", "token", "effect"])
    table = module._summary(of_prompts, 3, seed=4)
    assert table["n"].tolist() == [3, 2]
    np.testing.assert_allclose(table["mean"], [3.0, 6.0])
    draws = np.random.default_rng(4).multinomial(3, np.full(3, 1 / 3), size=1000)
    by_hand = [np.percentile(draws @ values[:, 0] / 3, [2.5, 97.5])]
    kept = draws[:, [0, 2]]
    counts = kept.sum(1)
    some = counts > 0
    by_hand.append(np.percentile((kept @ values[[0, 2], 1])[some] / counts[some], [2.5, 97.5]))
    np.testing.assert_allclose(table[["low", "high"]], by_hand)
    alone = module._summary(of_prompts[of_prompts["prompt"] == 0], 1, seed=0)
    assert alone[["low", "high"]].isna().all(axis=None)


@pytest.mark.slow
def test_the_bootstrap_covers_the_mean_about_as_often_as_it_says():
    """Of 300 draws of 40 prompts, 95% of the intervals hold the true mean; a few less, as such intervals are."""
    random = np.random.default_rng(0)
    held = 0
    for seed in range(300):
        low, high = module._bootstrap(random.normal(1.0, 2.0, (40, 1)), seed)
        held += bool(low[0] <= 1.0 <= high[0])
    assert 0.90 <= held / 300 <= 0.98


def test_your_own_measurement_of_one_prompt_runs_over_many(model):
    def last_increment(model, tokens, metric):
        values = model.increments(tokens)[:, 0].clone()
        values[:, :-1] = math.nan
        return values

    found = causal.over_prompts(last_increment, model, TEXTS, causal.loss(), count_from="end")
    assert found.table["token"].tolist() == [-1, -1, -1]
    expected = np.mean([model.increments(text)[1, 0, -1].item() for text in TEXTS])
    np.testing.assert_allclose(found.table["mean"][1], expected, rtol=1e-6)
    assert found.measurement == "last_increment"


def test_ablation_table_reads_the_column_of_a_table(model):
    table = pd.DataFrame({"clean": TEXTS[:3]})
    by_table, by_list = (causal.ablation_table(model, texts, to=["mean"]).loss for texts in (table, TEXTS[:3]))
    pd.testing.assert_frame_equal(by_table, by_list)


def refusals(model):
    loss, sweep = causal.loss(), causal.gap_sweep
    pairs = pd.DataFrame({"clean": ["The cat", "A dog"], "corrupted": ["The dog", "A horse"]})
    return {
        "the table of prompts is empty; expected at least one row": lambda: sweep(model, TABLE[:0], loss),
        "the table has no column 'clean'; expected one beside those that it has .'animal', ": lambda: sweep(
            model, TABLE, loss
        ),
        "the table has no column 'place'": lambda: sweep(model, TABLE, template="The {animal} on the {place}"),
        "row 1 of column 'animal' is .*; expected the text of that span": lambda: sweep(
            model, TABLE.assign(animal=["cat", None, "dog", "a"]), template=TEMPLATE
        ),
        "row 1 of column 'clean' is 3.5; expected a text or token ids": lambda: sweep(
            model, pd.DataFrame({"clean": ["a text", 3.5]}), loss
        ),
        "row 0 of column 'answer' is 'two', which has 3 tokens; expected one token": lambda: sweep(
            model, TABLE.assign(answer="two"), template=TEMPLATE
        ),
        "row 0 of column 'answer' is nan; expected one token as text, or an id from 0 to 256": lambda: sweep(
            model, TABLE.assign(answer=math.nan), template=TEMPLATE
        ),
        "the template 'The cat' names no span that a column could fill": lambda: sweep(
            model, TABLE, loss, template="The cat"
        ),
        "the template 'The {animal' cannot be read": lambda: sweep(model, TABLE, loss, template="The {animal"),
        "a template was given with a list; expected a table": lambda: sweep(model, TEXTS, loss, template=TEMPLATE),
        "no metric was given; expected one, or a table with a column 'answer'": lambda: causal.over_prompts(
            sweep, model, TEXTS
        ),
        "the prompts of row 1 do not align: 6 tokens in the clean one and 8 in the corrupted one; expected equally "
        "many, or a template": lambda: causal.patch_sweep(model, pairs, metric=loss),
        "the prompts of row 1 do not align": lambda: causal.mediation(model, pairs, metric=loss),
        "compares pairs of prompts and none has a corrupted one": lambda: causal.patch_sweep(
            model, pairs[["clean"]], metric=loss
        ),
        "there are 1 clean and 2 corrupted prompts; expected pairs": lambda: causal.patch_sweep(
            model, ["a", "b"], ["a"], loss
        ),
        "attention_mask was given with a table": lambda: causal.over_prompts(
            sweep, model, pairs, loss, attention_mask=torch.ones(2, 2, dtype=torch.int64)
        ),
        "the measurement takes x; expected a function with parameters model, tokens and metric": lambda: (
            causal.over_prompts(lambda x: x, model, TEXTS, loss)
        ),
        "returned shape .2,. for prompt 0; expected a tensor .layer pos.": lambda: causal.over_prompts(
            lambda model, tokens, metric: torch.zeros(2), model, TEXTS, loss
        ),
        "tokens_a_batch is 0; expected a whole number from 1": lambda: sweep(model, TEXTS, loss, tokens_a_batch=0),
        "the metric has no gradient": lambda: causal.attribution(model, TEXTS, lambda logits: logits[:, 0, 0].detach()),
        "the metric reads token 7; expected one of the prompt's 3 tokens": lambda: causal.attribution(
            model, TEXTS, causal.log_probability(5, at=7)
        ),
    }


@pytest.mark.parametrize("message", list(refusals(None)))
def test_what_does_not_fit_is_refused_in_one_sentence(model, message):
    with pytest.raises(lp.PositionsError, match=message) as told:
        refusals(model)[message]()
    assert str(told.value).count(". ") == 0


def test_a_span_without_a_token_of_its_own_is_refused(smollm2):
    model = lp.HookedPositionTransformer.from_pretrained(smollm2)
    table = pd.DataFrame({"part": ["hous"], "answer": [" a"]})
    with pytest.raises(lp.PositionsError, match=r"span 'part' of row 0 .'hous'. has no token that ends in it"):
        causal.gap_sweep(model, table, template="The {part}es")


def test_the_benchmark_of_batches_says_what_it_found():
    found = json.loads((Path(__file__).parents[2] / "benchmarks" / "prompts.json").read_text())
    (row,) = [row for row in found["rows"] if row["measurement"] == "attribution"]
    assert (row["prompts"], min(found["lengths"]), max(found["lengths"])) == (200, 5, 60)
    assert row["ratio"] <= 0.35
    for of_row in found["rows"]:
        assert of_row["apart_at_most"] <= 1e-5 * max(1.0, of_row["largest_value"])
        assert of_row["apart_by_batch_size"] <= 1e-5 * max(1.0, of_row["largest_value"])
