"""Text wherever tokens go, and prompts of different length: each gives what it gives alone, or is refused by name."""

import functools
import inspect

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import drawn_weights
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lens_positions as lp
from lens_positions import analysis, causal, cli, viz
from lens_positions.analysis.absolute_position import repeat_block
from lens_positions.analysis.losses import losses
from lens_positions.text import by_length, one_prompt, prompts_of
from lens_positions.text import pad_prompts as batch_of
from lens_positions.viz.text_positions import position_text

TEXTS = ["the cat that sat then went away", "a dog, it ran and then it was gone.", "so it goes on and on"]
CLEAN, CORRUPTED = ["The cat sat on the ma", "Hi the"], ["The dog ran in the ma", "Ho thx"]
END = 256
SIDES = ("left", "right")


@functools.cache
def small_model(source="per_layer", per_head=False, activation="sigmoid"):
    positions = lp.PositionConfig(source=source, per_head=per_head, activation=activation)
    config = lp.PositionModelConfig(d_model=32, n_layers=2, n_heads=4, d_mlp=48, n_ctx=64, positions=positions)
    return drawn_weights(lp.HookedPositionTransformer.from_config(config), 0)


@functools.cache
def shipped():
    return lp.HookedPositionTransformer.from_pretrained("bilingual-per-layer")


def padded(rows, side, pad=END):
    """Rows of different length as one tensor, and the mask of their real tokens."""
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return pad_sequence(rows, batch_first=True, padding_value=pad, padding_side=side), mask


def closed(model, texts, **how):
    """The tokens of documents, closed as measurements close texts."""
    rows = [model.to_tokens(text, **how)[0] for text in texts]
    return [torch.cat([row, row.new_tensor([END])]) for row in rows]


def assert_alike(one, other, error=1e-5):
    if isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other, atol=error, rtol=0)
    else:
        torch.testing.assert_close(one, other, atol=error, rtol=0, equal_nan=True)


DOCUMENTS = {
    "increments_by_category": analysis.increments_by_category,
    "saturation": analysis.saturation,
    "specialisation": analysis.specialisation,
    "extreme_tokens": analysis.extreme_tokens,
    "head_profile": analysis.head_profile,
    "attention_dispersion": analysis.attention_dispersion,
    "loss_by_length": lambda m, t, **how: analysis.loss_by_length(m, t, lp.scale(m, 2.0), (5, 10), **how),
    "frequency_norms": analysis.frequency_norms,
    "frequency_shares": analysis.frequency_shares,
    "positional_heads": lambda m, t, **how: analysis.positional_heads(m, t, offsets=3, **how),
    "attention_sinks": analysis.attention_sinks,
    "ablation_table": lambda m, t, **how: causal.ablation_table(m, t, **how).loss,
    "token_means": causal.token_means,
}
BEGINNINGS = {  # they read the beginnings of texts, which no end of document closes
    "absolute_variation": lambda m, t, **how: analysis.absolute_variation(m, t, block=4, **how),
    "replacement_effects": lambda m, t, **how: analysis.replacement_effects(m, t, ["zeros"], block=4, **how),
    "fingerprints": analysis.fingerprints,
    "repeated": lambda m, t, **how: repeat_block(m, t, block=4, **how),
}
MEASUREMENTS = DOCUMENTS | BEGINNINGS
PROMPTS = {
    "gap_sweep": lambda m, t, **how: causal.gap_sweep(m, t, causal.loss(), **how),
    "patch_sweep": lambda m, t, **how: causal.patch_sweep(
        m, one_prompt(m, t, **how).flip(1), t, causal.loss(), "resid", **how
    ),
    "attribution": lambda m, t, **how: causal.attribution(m, t, causal.loss(), **how),
    "integrated attribution": lambda m, t, **how: causal.attribution(m, t, causal.loss(), "integrated", **how),
    "frequency_contributions": lambda m, t, **how: analysis.frequency_contributions(m, t, 1, **how).terms,
    "place": lambda m, t, **how: position_text(m, t, **how).positions,
    "spacing": lambda m, t, **how: torch.tensor([len(viz.spacing(m, t, **how).axes[0].texts)]),
    "spacing_view": lambda m, t, **how: torch.tensor(viz.spacing_view(m, t, **how).data["rows"][1]["first"]),
    "tokens_view": lambda m, t, **how: torch.tensor(viz.tokens_view(m, t, **how).data["rows"][1]["relative"]),
    "attention_view": lambda m, t, **how: torch.tensor(viz.attention_view(m, t, **how).data["rows"][1]["positions"]),
    "arcs": lambda m, t, **how: torch.tensor([len(viz.arcs(m, t, 1, 0, **how).axes[0].patches)]),
    "increments": lambda m, t, **how: m.increments(t, **how)[~m.increments(t, **how).isnan()],
}


def rows_for(model, name, texts, **how):
    if name in DOCUMENTS:
        return closed(model, texts, **how)
    return [model.to_tokens(text, **how)[0] for text in texts]


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_measurements_take_text_and_tokens_and_padded_batches_alike(name):
    model, measure = small_model(), MEASUREMENTS[name]
    of_texts = measure(model, TEXTS)
    rows = rows_for(model, name, TEXTS)
    assert len({len(row) for row in rows}) == 3
    assert_alike(measure(model, rows), of_texts)
    for side in SIDES:
        tokens, mask = padded(rows, side)
        assert_alike(measure(model, tokens, attention_mask=mask), of_texts)
        with pytest.raises(lp.PositionsError, match=r"may be padding .* expected attention_mask="):
            measure(model, tokens)
    if name != "fingerprints":
        assert_alike(measure(model, TEXTS[0]), measure(model, TEXTS[:1]))


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_measurements_hear_prepend_bos(name):
    model, measure = small_model(), MEASUREMENTS[name]
    with_it, without = (measure(model, TEXTS, prepend_bos=bos) for bos in (True, False))
    assert_alike(with_it, measure(model, TEXTS))
    rows = rows_for(model, name, TEXTS, prepend_bos=False)
    if name not in ("attention_sinks", "fingerprints"):  # which also ask what texts begin with
        assert_alike(without, measure(model, rows))
    with pytest.raises(AssertionError):
        assert_alike(with_it, without)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_is_a_text_or_its_tokens_less_the_padding(name):
    model, measure = small_model(), PROMPTS[name]
    text = TEXTS[0]
    tokens = model.to_tokens(text)
    of_text = measure(model, text)
    for given in ([text], tokens, tokens[0], [tokens[0]]):
        assert_alike(measure(model, given), of_text)
    for side in SIDES:
        wider, mask = padded([tokens[0], tokens.new_zeros(40)], side)
        assert_alike(measure(model, wider[:1], attention_mask=mask[:1]), of_text)
        with pytest.raises(lp.PositionsError, match="may be padding"):
            measure(model, wider[:1])
    if name not in ("increments", "gap_sweep", "attribution", "integrated attribution"):  # these take several
        with pytest.raises(lp.PositionsError, match=r"3 (prompts|texts)"):
            measure(model, TEXTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_hear_prepend_bos(name):
    model, measure = small_model(), PROMPTS[name]
    text = TEXTS[0]
    bare = torch.tensor(list(text.encode()))
    without = measure(model, text, prepend_bos=False)
    assert_alike(without, measure(model, bare))
    assert_alike(measure(model, text, prepend_bos=True), measure(model, text))
    if name not in ("spacing", "arcs"):  # whose drawings are counted here
        with_it = measure(model, text)
        assert with_it.shape != without.shape or (with_it - without).abs().max() > 1e-4


def test_the_default_of_prepend_bos_is_that_of_the_model(monkeypatch):
    model, sweep = small_model(), functools.partial(causal.gap_sweep, small_model())
    monkeypatch.setattr(model.cfg, "default_prepend_bos", False)
    assert sweep(TEXTS[0], causal.loss()).shape[1] == len(TEXTS[0])
    assert sweep(TEXTS[0], causal.loss(), prepend_bos=True).shape[1] == len(TEXTS[0]) + 1
    assert model.to_tokens("ab").tolist() == [[97, 98]]
    assert {*analysis.attention_sinks(model, TEXTS)["first"]} == {"own"}


def test_every_public_function_that_takes_text_hears_prepend_bos_and_masks():
    taking = {"tokens", "text", "texts", "corpus", "clean"}
    texts_alone = {
        "boundary_auc",
        "compare_losses",
        "entity_grouping",
        "gap_map",
        "report",
        "mutual_information",
        "effect_map",
        "loss",
    }
    found = 0
    for module in (causal, analysis, viz):
        for name in module.__all__:
            function = getattr(module, name)
            # The explorer's page has its text from its user, and puts the beginning in front as the model does.
            if (
                inspect.isclass(function)
                or name == "explore"
                or not taking & inspect.signature(function).parameters.keys()
            ):
                continue
            wanted = {"prepend_bos"} if name in texts_alone else {"prepend_bos", "attention_mask"}
            if name not in ("branching_entropy", "mutual_information", "effect_map", "loss"):  # these have no model
                assert wanted <= inspect.signature(function).parameters.keys(), name
                found += 1
    assert found >= 26
    # A map's summary reads files, and the explorer's page takes its text from its user.
    commands = [name for name in cli.__all__ if name not in ("app", "main", "summarise", "explore")]
    assert len(commands) == 16
    assert all("bos" in inspect.signature(getattr(cli, name)).parameters for name in commands)


def test_what_reads_texts_alone_takes_one_and_hears_prepend_bos():
    model = small_model()
    assert_alike(analysis.compare_losses([model], TEXTS[0]), analysis.compare_losses([model], TEXTS[:1]))
    assert losses(model, TEXTS, False).tokens.tolist() == [len(text) for text in TEXTS]
    assert losses(model, TEXTS).tokens.tolist() == [len(text) + 1 for text in TEXTS]
    with_it, without = (analysis.compare_losses([model], TEXTS, prepend_bos=bos) for bos in (True, False))
    assert abs(float(with_it["loss"].iloc[0] - without["loss"].iloc[0])) > 1e-4

    line, words = "天气很好我们去看", ["天气", "很", "好", "我们", "去看"]
    areas = [analysis.boundary_auc(model, line, [words], prepend_bos=bos) for bos in (None, True, False)]
    assert_alike(areas[0], areas[1])
    assert areas[0]["n"].tolist() == areas[2]["n"].tolist()
    assert set(areas[0]["n"]) == {7}

    pairs = pd.DataFrame([("New York", "big cat", 2, 1, 2, 1), ("Red Sea", "dry hat", 2, 1, 2, 1)])
    pairs.columns = ["name", "ordinary", "name_real", "name_reversed", "ordinary_real", "ordinary_reversed"]
    grouped = [
        analysis.entity_grouping(model, pairs, ["New York", "Red Sea"], ["The {} is"], prepend_bos=bos)
        for bos in (None, True, False)
    ]
    assert_alike(grouped[0], grouped[1])
    assert np.abs(grouped[0]["real"] - grouped[2]["real"]).max() > 1e-5


def metrics(model):
    right, wrong = torch.tensor([116, 104]), torch.tensor([115, 101])

    def of_pairs(logits):  # an answer of its own for each pair
        rows = torch.arange(len(logits))
        return logits[rows, -1, right[: len(rows)]] - logits[rows, -1, wrong[: len(rows)]]

    return {
        "last": causal.logit_difference(116, 115),
        "from the start": causal.log_probability(116, at=3),
        "loss": causal.loss(),
        "of pairs": of_pairs,
        "all": lambda logits: logits.log_softmax(-1)[..., 116].mean(1),
    }


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["last", "from the start", "loss", "of pairs", "all"])
def test_mediation_of_pairs_of_different_length_is_the_mean_of_each_alone(metric):
    model = shipped()
    mediation = functools.partial(causal.mediation, layers=[0, 3])
    read = metrics(model)[metric]
    rights = {0: (116, 115), 1: (104, 101)}
    alone = []
    for number, (clean, corrupted) in enumerate(zip(CLEAN, CORRUPTED, strict=True)):
        of_one = causal.logit_difference(*rights[number]) if metric == "of pairs" else read
        alone.append(mediation(model, model.to_tokens(clean), model.to_tokens(corrupted), of_one)["mean"])
    expected = pd.concat(alone, axis=1).mean(axis=1)
    assert expected.abs().max() > 0.1

    rows = {name: [model.to_tokens(text)[0] for text in of] for name, of in (("c", CLEAN), ("k", CORRUPTED))}
    found = [mediation(model, CLEAN, CORRUPTED, read), mediation(model, rows["c"], rows["k"], read)]
    for side in SIDES:
        (clean, mask), (corrupted, _) = (padded(rows[name], side) for name in ("c", "k"))
        assert torch.equal(clean, model.to_tokens(CLEAN, padding_side=side))
        found.append(mediation(model, clean, corrupted, read, attention_mask=mask))
        with pytest.raises(lp.PositionsError, match="may be padding"):
            mediation(model, clean, corrupted, read)
    (left, of_left), (right, of_right) = padded(rows["c"], "left"), padded(rows["k"], "right")
    found.append(mediation(model, left, right, read, attention_mask=(of_left, of_right)))
    for table in found:
        assert table["n"].eq(2).all()
        assert (table["mean"] - expected).abs().max() < 1e-5


def test_a_metric_that_mixes_pairs_of_different_length_is_refused():
    with pytest.raises(lp.PositionsError, match="the metric returned NaN or infinite values"):
        causal.mediation(small_model(), CLEAN, CORRUPTED, lambda logits: logits[:, -1, 0] - logits[:, -1, 0].mean())


@pytest.mark.slow
def test_mediation_hears_prepend_bos():
    model = small_model()
    bare = [[torch.tensor(list(text.encode())) for text in texts] for texts in (CLEAN, CORRUPTED)]
    without = causal.mediation(model, CLEAN, CORRUPTED, causal.loss(), prepend_bos=False)
    assert_alike(without, causal.mediation(model, *bare, causal.loss()))
    assert (without["mean"] - causal.mediation(model, CLEAN, CORRUPTED, causal.loss())["mean"]).abs().max() > 1e-4


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("side", SIDES)
def test_increments_of_padded_tokens_are_those_of_each_prompt_and_nan_at_padding(side, per_head):
    model = small_model(per_head=per_head)
    rows = [model.to_tokens(text)[0] for text in TEXTS]
    tokens, mask = padded(rows, side)
    for read in (model.increments, model.positions):
        values = read(tokens, attention_mask=mask)
        assert values.shape[:3] == (2, *tokens.shape)
        assert torch.equal(values.isnan().flatten(3).any(-1)[0] if per_head else values.isnan()[0], mask == 0)
        for number, text in enumerate(TEXTS):
            assert_alike(values[:, number, mask[number].bool()], read(text)[:, 0])
    with pytest.raises(lp.PositionsError, match="the texts have different lengths"):
        model.increments(TEXTS)
    with pytest.raises(lp.PositionsError, match="may be padding"):
        model.increments(tokens)


def test_a_single_beginning_or_end_that_every_row_has_is_none_of_the_padding():
    model = small_model()
    alike = torch.tensor([[END, 97, 98, END], [END, 99, 97, END]])
    assert [row.tolist() for row in prompts_of(model, alike)] == alike.tolist()
    real = torch.ones_like(alike).bool()
    assert [row.tolist() for row in prompts_of(model, alike, real)] == alike.tolist()
    assert len(prompts_of(model, alike[:, :3])) == len(prompts_of(model, alike[:, 1:])) == 2
    for tokens, says in (
        ([[END, 97, 98], [99, 97, 98]], "row 0 of the tokens begins with 1 of token 256, which may be padding"),
        ([[97, 97, 98], [99, 97, END]], "row 1 of the tokens ends with 1 of token 256"),
        ([[END, END, 98]], "row 0 of the tokens begins with 2"),
        ([[98, END, END]], "row 0 of the tokens ends with 2"),
    ):
        with pytest.raises(lp.PositionsError, match=says):
            prompts_of(model, torch.tensor(tokens))
        given = torch.tensor(tokens)
        assert torch.equal(torch.stack(prompts_of(model, given, torch.ones_like(given))), given)
    # A list has no padding, so its rows need not be alike.
    assert len(prompts_of(model, [torch.tensor([END, 97]), torch.tensor([97, 98])])) == 2


def test_masks_that_do_not_fit_are_refused_in_one_sentence():
    model = small_model()
    tokens = torch.tensor([[97, 98, 99, 100], [101, 102, 103, 104]])
    ones = torch.ones_like(tokens)
    for given, mask, says in (
        (tokens, ones[:, :3], r"attention_mask is of shape \(2, 3\); expected a tensor of the tokens' shape \(2, 4\)"),
        (tokens, torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]), "hides tokens between others in row 0"),
        (tokens, torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]), "hides every token in row 1"),
        (tokens, 2 * ones, "attention_mask has other values than 0 and 1"),
        (TEXTS, ones, "attention_mask was given with a list; expected a tensor of tokens"),
        ("abc", ones, "attention_mask was given with a str"),
    ):
        with pytest.raises(lp.PositionsError, match=says):
            prompts_of(model, given, mask)
    with pytest.raises(lp.PositionsError, match="attention_mask or prepend_bos was given with a corpus that was read"):
        analysis.saturation(model, analysis.read_corpus(model, TEXTS), prepend_bos=False)
    with pytest.raises(lp.PositionsError, match="without texts"):
        analysis.extreme_tokens(small_model("shared"), prepend_bos=False)
    bare = lp.HookedPositionTransformer.from_transformers(LlamaForCausalLM(tiny(16)))
    with pytest.raises(lp.PositionsError, match="no tokenizer; expected tokens instead of text"):
        causal.gap_sweep(bare, "abc", causal.loss())


def test_prompts_of_one_length_run_together():
    groups = by_length([torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([4, 5])])
    assert [(numbers, rows.tolist()) for numbers, rows in groups] == [([1], [[3]]), ([0, 2], [[1, 2], [4, 5]])]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("side", SIDES)
def test_prompts_padded_with_their_mask_give_what_each_gives_alone(side, bos):
    model = shipped()
    prompts = prompts_of(model, CLEAN, None, bos)
    tokens, mask = batch_of(model.tokenizer, prompts, side)
    assert mask.sum(1).tolist() == [len(prompt) for prompt in prompts]
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask)
        for row, real, prompt in zip(logits, mask.bool(), prompts, strict=True):
            assert_close_to(row[real], model(prompt[None])[0])


def assert_close_to(one, other):
    """To five digits of the largest value: kernels add in another order for another width."""
    assert_alike(one, other, 1e-5 * max(1.0, float(other.detach().abs().max())))


def of_rows(values, lengths, side):
    """Of each row, what belongs to its own tokens."""
    return [row[-n:] if side == "left" else row[:n] for row, n in zip(values, lengths, strict=True)]


EDITS = {
    "none": lambda m: [],
    "mean": lambda m: lp.ablate(m, to="mean"),
    "ruler": lambda m: lp.ablate(m, to="mean", site="positions"),
    "gap": lambda m: lp.add_gap(m, 2, by=3.0),
    "list": lambda m: lp.scale(m, 2.0, positions=[1, 2]),
    "slice": lambda m: lp.scale(m, 2.0, positions=slice(2, None)),
    "shuffle": lambda m: lp.ablate(m, to="shuffle", seed=3),
}


@pytest.mark.parametrize("bos", [True, False, None])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("edit", ["none", "mean", "ruler", "gap", "list", "slice"])
def test_texts_of_different_length_give_in_one_call_what_each_gives_alone(edit, side, bos):
    for model in (small_model(), small_model("shared", per_head=True)):
        hooks, how = EDITS[edit](model), {"prepend_bos": bos}
        alone = [model.run_with_cache(text, fwd_hooks=hooks, **how) for text in TEXTS]
        lengths = [logits.shape[1] for logits, _ in alone]
        assert len(set(lengths)) == 3

        logits, cache = model.run_with_cache(TEXTS, fwd_hooks=hooks, padding_side=side, **how)
        for found in (logits, model(TEXTS, fwd_hooks=hooks, padding_side=side, **how),
                      model.run_with_hooks(TEXTS, hooks, padding_side=side, **how)):  # fmt: skip
            for row, (expected, _) in zip(of_rows(found, lengths, side), alone, strict=True):
                assert_close_to(row, expected[0])
        for name in ("blocks.1.attn.hook_increments", "blocks.1.hook_resid_post"):
            for row, (_, own) in zip(of_rows(cache[name], lengths, side), alone, strict=True):
                assert_close_to(row, own[name][0])
        if edit != "none":
            assert (logits - model(TEXTS, padding_side=side, **how)).abs().max() > 0.01


@pytest.mark.parametrize("side", SIDES)
def test_the_shipped_model_gives_texts_of_different_length_what_each_gives_alone(side):
    model = shipped()
    hooks = lp.ablate(model, to="mean")
    with torch.no_grad():
        for bos in (True, False):
            alone = [model(text, prepend_bos=bos, fwd_hooks=hooks)[0] for text in CLEAN]
            found = model.run_with_hooks(CLEAN, hooks, prepend_bos=bos, padding_side=side)
            for row, expected in zip(of_rows(found, map(len, alone), side), alone, strict=True):
                assert_close_to(row, expected)


@pytest.mark.parametrize("bos", [True, False])
def test_a_shuffle_of_texts_is_the_same_under_any_padding(bos):
    model = small_model()
    hooks = EDITS["shuffle"](model)
    for first in range(3):  # the first row's draw is that of the text alone
        texts = TEXTS[first:] + TEXTS[:first]
        lengths = [model.to_tokens(text, prepend_bos=bos).shape[1] for text in texts]
        left, right = (
            of_rows(model(texts, fwd_hooks=hooks, padding_side=side, prepend_bos=bos), lengths, side) for side in SIDES
        )
        assert_close_to(left[0], model(texts[0], fwd_hooks=hooks, prepend_bos=bos)[0])
        assert (left[0] - model(texts[0], prepend_bos=bos)[0]).abs().max() > 0.01
        for one, other in zip(left, right, strict=True):
            assert_close_to(one, other)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("side", SIDES)
def test_a_loss_of_texts_of_different_length_counts_no_padding(side, bos):
    model = small_model()
    how = {"prepend_bos": bos, "fwd_hooks": EDITS["mean"](model)}
    alone = [model(text, return_type="loss", loss_per_token=True, **how)[0] for text in TEXTS]
    how["padding_side"] = side
    mean = torch.cat(alone).mean()
    assert_close_to(model(TEXTS, return_type="loss", **how), mean)
    assert_close_to(model(TEXTS, return_type="both", **how)[1], mean)
    assert_close_to(model.run_with_cache(TEXTS, return_type="loss", **how)[0], mean)
    each = model(TEXTS, return_type="loss", loss_per_token=True, **how)
    for row, expected in zip(of_rows(each, map(len, alone), side), alone, strict=True):
        assert_close_to(row, expected)
    assert_close_to(each.sum(1), torch.stack([losses.sum() for losses in alone]))
    labels, _ = padded([model.to_tokens(text, prepend_bos=bos)[0] for text in TEXTS], side)
    assert_close_to(model(TEXTS, labels=labels, return_type="loss", **how), mean)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("bos", [True, False, None])
@pytest.mark.parametrize("edit", ["none", "mean", "gap", "slice"])
def test_texts_of_different_length_go_on_as_each_does_alone(edit, bos, cached):
    model = shipped()
    how = {"max_new_tokens": 8, "do_sample": False, "verbose": False, "prepend_bos": bos, "use_past_kv_cache": cached}
    how["fwd_hooks"] = EDITS[edit](model)
    alone = [model.generate(text, **how) for text in CLEAN]
    assert model.generate(CLEAN, **how) == alone
    assert model.generate(CLEAN, padding_side="right", return_type="str", **how) == alone
    pieces = model.generate_stream(CLEAN, max_tokens_per_yield=3, **how)
    assert ["".join(of_text) for of_text in zip(*pieces, strict=True)] == alone
    tokens = model.generate(CLEAN, return_type="tokens", **how)
    assert tokens.shape[1] == max(model.to_tokens(text, prepend_bos=bos).shape[1] for text in CLEAN) + 8


@pytest.mark.parametrize("side", SIDES)
def test_a_token_that_a_text_of_the_batch_does_not_have_is_refused(side):
    model = small_model()
    texts, longest = [TEXTS[0], "ab"], model.to_tokens(TEXTS[0]).shape[1]
    shortest = model.to_tokens("ab").shape[1]
    assert shortest < longest
    for edit in (lp.add_gap(model, shortest), lp.scale(model, 2.0, positions=shortest)):
        model.run_with_hooks(TEXTS[0], fwd_hooks=edit)
        with pytest.raises(lp.PositionsError, match=f"no token {shortest}; expected tokens from . to {shortest - 1}"):
            model.run_with_hooks(texts, fwd_hooks=edit, padding_side=side)


@pytest.mark.slow
def test_transformers_generate_goes_on_with_texts_of_different_length_as_with_each():
    model = shipped()
    how = {"max_new_tokens": 8, "do_sample": False, "fwd_hooks": EDITS["mean"](model)}
    assert model.hf_generate(CLEAN, **how) == [model.hf_generate(text, **how) for text in CLEAN]


def test_settings_that_count_padding_are_refused_for_texts_of_different_length():
    model, how = small_model(), {"max_new_tokens": 2, "verbose": False}
    tokens, mask = padded([model.to_tokens(text)[0] for text in TEXTS], "left")
    for generate in (model.generate, lambda *given, **settings: list(model.generate_stream(*given, **settings))):
        for name, value in (("repetition_penalty", 1.5), ("freq_penalty", 0.5)):
            for given, masks in ((TEXTS, {}), (tokens, {"attention_mask": mask})):
                with pytest.raises(lp.PositionsError, match=f"{name} {value}, which counts padding .* one prompt at a"):
                    generate(given, **{name: value}, **how, **masks)
            generate(TEXTS[:1], **{name: value}, **how)
            generate(["one", "two"], **{name: value}, **how)
    for name, value in (("repetition_penalty", 1.5), ("no_repeat_ngram_size", 2), ("min_length", 40)):
        for given, masks in ((TEXTS, {}), (tokens, {"attention_mask": mask})):
            with pytest.raises(lp.PositionsError, match=f"{name} {value}, which counts padding"):
                model.hf_generate(given, max_new_tokens=2, **{name: value}, **masks)
        model.hf_generate(["one", "two"], max_new_tokens=2, **{name: value})
        model.hf_generate(TEXTS, max_new_tokens=2)


def test_masks_of_texts_that_show_their_padding_are_refused():
    model = small_model()
    rows = [model.to_tokens(text)[0] for text in TEXTS]
    for name in ("attention_mask", "one_zero_attention_mask"):
        for side, other in (SIDES, SIDES[::-1]):
            _, mask = padded(rows, side)
            own, given = (model(TEXTS, padding_side=side, **how) for how in ({}, {name: mask}))
            assert torch.equal(own, given)
            for wrong in (padded(rows, other)[1], mask[:, 1:], mask[:2], torch.ones_like(mask)):
                with pytest.raises(lp.PositionsError, match=f"{name} of shape .* shows padding of the texts"):
                    model(TEXTS, padding_side=side, **{name: wrong})
    _, cached = model([TEXTS[0]] * 3, return_type="logits_and_cache", use_cache=True)
    with pytest.raises(lp.PositionsError, match="with past_key_values and no mask; expected attention_mask"):
        model(TEXTS, past_key_values=cached)


def test_texts_of_equal_length_run_without_a_mask():
    model, texts = small_model(), ["one", "two"]
    tokens = model.to_tokens(texts, prepend_bos=False)
    for side in SIDES:
        assert torch.equal(model(texts, prepend_bos=False, padding_side=side), model(tokens))


def test_a_loss_of_no_prompt_is_that_of_the_prompt_measured():
    model = small_model()
    tokens = model.to_tokens(TEXTS[0])
    assert_alike(
        causal.gap_sweep(model, TEXTS[0], causal.loss()), causal.gap_sweep(model, tokens, causal.loss(tokens)), 0
    )
    assert causal.loss(tokens)(model(tokens)).item() == pytest.approx(
        model(tokens, return_type="loss").item(), abs=1e-5
    )
    with pytest.raises(lp.PositionsError, match=r"expected loss\(tokens\)"):
        causal.loss()(model(tokens))


def tiny(vocabulary):
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


def llama_like(adds_bos):
    """A tokenizer of words with <s>, </s> and <pad>, which puts <s> in front by itself or leaves that to others."""
    words = ["<s>", "</s>", "<pad>", "<unk>", "a", "b", "c"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        add_bos_token=adds_bos, name_or_path="",
    )  # fmt: skip
    tokenizer.init_kwargs["add_bos_token"] = True  # or TransformerLens looks for it on the hub
    return tokenizer


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_text_with_its_own_bos_gets_no_second_one(adds_bos):
    model = lp.HookedPositionTransformer.from_transformers(LlamaForCausalLM(tiny(8)), llama_like(adds_bos))
    assert model.cfg.tokenizer_prepends_bos == adds_bos
    for text, bos, expected in (
        ("a b", None, [0, 4, 5]),
        ("a b", False, [4, 5]),
        ("<s> a b", None, [0, 4, 5]),
        ("<s> a b", True, [0, 4, 5]),
        ("<s> a b", False, [0, 4, 5]),
        ("a <s> b", None, [0, 4, 0, 5]),
    ):
        assert model.to_tokens(text, prepend_bos=bos).tolist() == [expected]
        assert prompts_of(model, text, None, bos)[0].tolist() == expected
        assert causal.gap_sweep(model, text, causal.loss(), prepend_bos=bos).shape == (1, len(expected))
    both = ["<s> a b c", "a b"]
    assert model.to_tokens(both, padding_side="right").tolist() == [[0, 4, 5, 6], [0, 4, 5, 2]]
    assert model.to_tokens(both, padding_side="left").tolist() == [[0, 4, 5, 6], [2, 0, 4, 5]]
    assert model.to_tokens(both, False, "left").tolist() == [[0, 4, 5, 6], [2, 2, 4, 5]]


def test_a_padding_token_of_its_own_is_refused_without_a_mask():
    model = lp.HookedPositionTransformer.from_transformers(LlamaForCausalLM(tiny(8)), llama_like(True))
    for side in SIDES:
        tokens = model.to_tokens(["a b c", "a b"], padding_side=side)
        with pytest.raises(lp.PositionsError, match="1 of token 2, which may be padding"):
            prompts_of(model, tokens)
        assert [row.tolist() for row in prompts_of(model, tokens, tokens != 2)] == [[0, 4, 5, 6], [0, 4, 5]]


def test_a_chat_of_smollm2_keeps_its_own_beginning(smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    model = lp.HookedPositionTransformer.from_transformers(LlamaForCausalLM(tiny(len(tokenizer))), tokenizer)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    own = tokenizer(chat, add_special_tokens=False)["input_ids"]
    begin = tokenizer.bos_token_id
    assert chat.startswith("<|im_start|>")
    assert begin == own[0] != own[1]
    for bos in (None, True, False):
        assert model.to_tokens(chat, prepend_bos=bos)[0].tolist() == own
        assert model.increments(chat, prepend_bos=bos).shape[2] == len(own)
    assert model.run_with_cache(chat)[0].shape[1] == len(own)
    assert model.to_tokens("Hi")[0].tolist() == [begin, *tokenizer("Hi")["input_ids"]]
    assert model.to_tokens([chat, "Hi"])[1, :2].tolist() == [begin, *tokenizer("Hi")["input_ids"]]
    assert model.to_str_tokens(chat)[0] == "<|im_start|>"
    assert position_text(model, chat).labels[0] == position_text(model, "Hi").labels[0] == "<|im_start|>"


def test_bytes_that_spell_the_end_of_document_are_no_bos():
    model = small_model()
    spelled = model.tokenizer.bos_token + "a"
    assert model.to_tokens(spelled)[0, :2].tolist() == [END, ord("<")]
    assert model.to_tokens(spelled, prepend_bos=False)[0].tolist() == list(spelled.encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "small"
    small_model().save_pretrained(path)
    return str(path)


@pytest.mark.slow
def test_the_flags_are_heard_on_the_command_line(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        code = cli.main(arguments)
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    default, with_it, without = (
        run("show", folder, "ab c", "--no-table", *flag) for flag in ([], ["--bos"], ["--no-bos"])
    )
    assert default == with_it
    assert "<|endofdocument|>" in default
    assert "<|endofdocument|>" not in without
    for flag, bos in (("--bos", True), ("--no-bos", False)):
        csv = tmp_path / f"{bos}.csv"
        run("gaps", folder, "ab cd", "--csv", str(csv), flag)
        effects = causal.gap_sweep(small_model(), "ab cd", causal.loss(), prepend_bos=bos)
        assert pd.read_csv(csv)["effect"].to_numpy() == pytest.approx(effects.flatten().numpy(), abs=1e-5)
        run(
            "patch",
            folder,
            "--clean",
            "ab",
            "--corrupted",
            "cd",
            "--answer",
            "a",
            "--wrong",
            "b",
            "--csv",
            str(csv),
            flag,
        )
        assert len(pd.read_csv(csv)) == 2 * (2 + bos)

    text = tmp_path / "held.txt"
    text.write_text("\n\n".join(f"{text} ({number})" for number in range(40) for text in TEXTS))
    tables = []
    for flag in ("--bos", "--no-bos"):
        run("kinds", folder, "--corpus", str(text), "--characters", "400", "--csv", str(tmp_path / "k.csv"), flag)
        tables.append(pd.read_csv(tmp_path / "k.csv"))
    assert tables[0]["n"].sum() > tables[1]["n"].sum()

    assert cli.main(["show", folder, "ab", "--bos", "--no-bos"]) == 2
    assert "--bos and --no-bos were given; expected one of them" in capsys.readouterr().err
    assert cli.main(["extremes", folder, "--no-bos"]) == 2
    assert "without --corpus" in capsys.readouterr().err
