"""Chunks of queries and keys by rotary frequency: every layout, exact sums, and heads whose answer is known."""

import math

import families
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lens_positions as lp
from lens_positions.analysis.frequencies import (
    aligned_key,
    frequency_contributions,
    frequency_norms,
    frequency_shares,
    high_frequency_use,
    positional_heads,
    scores_by_distance,
    truncate_frequencies,
)
from lens_positions.analysis.rotary_layout import rotary_layout
from lens_positions.cli import main
from lens_positions.tokenizer import byte_tokenizer

TOKENS = torch.randint(3, 20, (1, 12), generator=torch.Generator().manual_seed(6))

# name: components of the first two pairs, and how many components are not turned
LAYOUTS = {
    "LlamaForCausalLM": ([[0, 4], [1, 5]], 0),
    "Qwen3ForCausalLM": ([[0, 4], [1, 5]], 0),
    "CohereForCausalLM": ([[0, 1], [2, 3]], 0),
    "PhiForCausalLM": ([[0, 2], [1, 3]], 4),
    "GlmForCausalLM": ([[0, 1], [2, 3]], 4),
    "GPTNeoXForCausalLM": ([[0, 1]], 6),
    "Phi3ForCausalLM": ([[0, 4], [1, 5]], 0),
    "CodeGenForCausalLM": ([[0, 1], [2, 3]], 4),
}


@pytest.fixture(autouse=True)
def _quiet(recwarn):
    """Models of families warn about what does not matter here."""


def family(name):
    return lp.HookedPositionTransformer.from_transformers(families.build(name), byte_tokenizer())


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.usefixtures("unchecked")
def test_chunks_are_found_in_every_layout_and_their_terms_sum_to_the_scores(name):
    model = family(name)
    pairs, rest = LAYOUTS[name]
    _, cache = model.run_with_cache(TOKENS)
    past = torch.ones(12, 12).tril().bool()
    for layer, layout in rotary_layout(model).items():
        assert layout.pairs[: len(pairs)].tolist() == pairs
        assert len(layout.rest) == rest
        assert (layout.frequencies.diff() < 0).all()
        assert layout.frequencies[0] == pytest.approx(1.0)
        found = frequency_contributions(model, TOKENS, layer)
        scores = cache[f"blocks.{layer}.attn.hook_attn_scores"][0]
        assert (found.terms.sum(1) - scores)[:, past].abs().max() < 1e-4
        assert found.terms.std() > 0.01
        assert len(found.frequencies) == found.terms.shape[1] == len(layout.pairs) + (rest > 0)


@pytest.mark.parametrize("per_head", [False, True])
def test_terms_sum_to_the_scores_of_learned_increments(tiny_model, per_head):
    model = tiny_model(source="per_layer", per_head=per_head)
    _, cache = model.run_with_cache(TOKENS)
    past = torch.ones(12, 12).tril().bool()
    for layer in range(2):
        terms = frequency_contributions(model, TOKENS, layer).terms
        assert (terms.sum(1) - cache[f"blocks.{layer}.attn.hook_attn_scores"][0])[:, past].abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPTNeoXForCausalLM"])
@pytest.mark.usefixtures("unchecked")
def test_terms_are_those_of_an_intervention(name):
    """Scores under truncated frequencies are split too, in layouts that are read before and after the rotation."""
    model = family(name)
    half = truncate_frequencies(model, 0.5)
    site = "blocks.1.attn.hook_attn_scores"
    with model.hooks(fwd_hooks=half), torch.no_grad():
        scores = model.run_with_cache(TOKENS, names_filter=site)[1][site][0]
    terms = frequency_contributions(model, TOKENS, 1, hooks=half).terms
    past = torch.ones(12, 12).tril().bool()
    assert (terms.sum(1) - scores)[:, past].abs().max() < 1e-4
    assert (terms - frequency_contributions(model, TOKENS, 1).terms).abs().max() > 1e-3


def test_norms_are_those_of_the_chunks_with_intervals_over_documents(tiny_model):
    model = tiny_model(source="per_layer")
    texts = ["The cat sat on the mat.", "天气很好。", "One more."]
    table = frequency_norms(model, texts)
    layout, found = rotary_layout(model)[1], []
    for text in texts:
        tokens = torch.cat([model.to_tokens(text), torch.tensor([[256]])], dim=1)
        _, cache = model.run_with_cache(tokens)
        found.append(cache["blocks.1.attn.hook_rot_k"][0])
    of_head = torch.cat(found)[:, 1]
    expected = [of_head[:, pair].norm(dim=-1).mean().item() for pair in layout.pairs]
    rows = table[(table["layer"] == 1) & (table["side"] == "key") & (table["head"] == 1)]
    assert rows["norm"].tolist() == pytest.approx(expected, rel=1e-4)
    assert rows["frequency"].tolist() == pytest.approx(layout.frequencies.tolist())
    assert (rows["low"] < rows["norm"]).all()
    assert (rows["norm"] < rows["high"]).all()
    assert set(table["n"]) == {sum(map(len, found))}
    assert frequency_norms(model, texts[0])["low"].isna().all()


def only_frequencies(kept):
    """A Llama of one layer whose queries and keys have nothing but some frequencies."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=257,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    gone = [i for head in range(4) for i in range(8) if i % 4 not in kept for i in [8 * head + i]]
    with torch.no_grad():
        for projection in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj):
            projection.weight.normal_(std=0.5)
            projection.weight[gone] *= 1e-3  # not 0, for a component that never turns has no frequency
    return lp.HookedPositionTransformer.from_transformers(model, byte_tokenizer())


def test_shares_say_which_frequencies_make_the_scores():
    texts = ["The cat sat on the mat and slept.", "Nobody knew why it rained."]
    table = frequency_shares(only_frequencies([1]), texts)
    assert table.groupby("index")["share"].mean().tolist() == pytest.approx([0, 1, 0, 0], abs=1e-4)
    table = frequency_shares(only_frequencies([0, 1, 2, 3]), texts)
    assert table.groupby(["layer", "head"])["share"].sum().tolist() == pytest.approx([1.0] * 4)
    assert (table["low"] <= table["share"] + 1e-9).all()
    assert table["share"].between(0.01, 0.9).all()


def test_shares_are_covariances_over_the_variance():
    model = only_frequencies([0, 2])
    text = "The cat sat."
    tokens = torch.cat([model.to_tokens(text), torch.tensor([[256]])], dim=1)
    terms = frequency_contributions(model, tokens, 0).terms[2].double().numpy()
    total = terms.sum(0)
    of = [
        sum(np.cov(term[i, : i + 1], total[i, : i + 1], bias=True)[0, 1] for i in range(1, len(term))) for term in terms
    ]
    rows = frequency_shares(model, text).query("head == 2")
    assert rows["share"].tolist() == pytest.approx((np.array(of) / sum(of)).tolist(), abs=1e-5)


def llama(fraction, seed=3):
    config = lp.PositionModelConfig(d_model=32, n_layers=2, n_heads=2, n_ctx=32, rope_fraction=fraction)
    return lp.HookedPositionTransformer.from_config(config, seed=seed)


@pytest.mark.parametrize("keep", [1.0, 0.75, 0.5, 0.3, 0.0])
def test_truncation_is_the_model_that_was_built_with_this_fraction(keep):
    whole, truncated = llama(1.0), llama(keep)
    truncated.original_model.load_state_dict(whole.original_model.state_dict())
    logits = whole.run_with_hooks(TOKENS, fwd_hooks=truncate_frequencies(whole, keep))
    assert (logits - truncated(TOKENS)).abs().max() < 1e-5
    assert torch.equal(logits, whole(TOKENS)) == (keep == 1.0)
    layout = rotary_layout(truncated)[0]
    assert len(layout.pairs) == int(keep * 8)
    assert len(layout.rest) == 16 - 2 * int(keep * 8)


def test_truncation_from_above_keeps_the_rest():
    model = llama(1.0)
    hooks = truncate_frequencies(model, 0.25, drop="highest")
    layout = rotary_layout(model)[0]
    with model.hooks(fwd_hooks=hooks):
        _, cache = model.run_with_cache(TOKENS)
    _, plain = model.run_with_cache(TOKENS)
    turned, unturned = cache["blocks.0.attn.hook_rot_q"], plain["blocks.0.attn.hook_q"]
    highest, lowest = layout.pairs[:6].flatten(), layout.pairs[6:].flatten()
    assert (turned[..., highest] - unturned[..., highest]).abs().max() < 1e-6
    assert torch.equal(turned[..., lowest], plain["blocks.0.attn.hook_rot_q"][..., lowest])
    every = model.run_with_hooks(TOKENS, fwd_hooks=truncate_frequencies(model, 1.0, drop="highest"))
    assert torch.equal(every, model(TOKENS))


@pytest.mark.parametrize("source", ["static", "per_layer"])
def test_no_frequency_at_all_is_every_token_at_one_place(tiny_model, source):
    model = tiny_model(source=source)
    truncated = model.run_with_hooks(TOKENS, fwd_hooks=truncate_frequencies(model, 0.0))
    held = [(f"blocks.{layer}.attn.hook_positions", lambda p, hook: torch.zeros_like(p)) for layer in range(2)]
    assert (truncated - model.run_with_hooks(TOKENS, fwd_hooks=held)).abs().max() < 1e-5
    assert (truncated - model(TOKENS)).abs().max() > 1e-3


def test_truncation_holds_in_generation_with_a_cache(tiny_model):
    model = tiny_model(source="per_layer", per_head=True)
    with model.hooks(fwd_hooks=truncate_frequencies(model, 0.5)):
        kept = model.generate(TOKENS, max_new_tokens=6, do_sample=False, use_past_kv_cache=True, verbose=False)
        anew = model.generate(TOKENS, max_new_tokens=6, do_sample=False, use_past_kv_cache=False, verbose=False)
    assert torch.equal(kept, anew)


def previous_token_model(distance):
    """One layer whose queries and keys are the same for every token, and whose scores are largest at one distance."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=257,
        max_position_embeddings=128,
        attention_bias=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    frequencies = 10_000.0 ** (-torch.arange(0, 32, 2).double() / 32)
    query = 4 * torch.ones(32, dtype=torch.float64)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.weight.zero_()
        attention.k_proj.weight.zero_()
        attention.q_proj.bias[:32] = query
        attention.k_proj.bias[:32] = aligned_key(query, distance, frequencies)
    return lp.HookedPositionTransformer.from_transformers(model, byte_tokenizer())


@pytest.mark.parametrize("distance", [0, 1, 5])
def test_a_head_that_was_built_to_look_so_far_back_is_found(distance):
    texts = ["The cat sat on the mat and slept.", "Nobody knew why it rained, and it did."]
    model = previous_token_model(distance)
    table = positional_heads(model, texts)
    built, other = table.iloc[0], table.iloc[1]  # the other head has no weights: it attends to all alike
    assert built["offset"] == distance
    assert built["positional"]
    assert built["share"] == pytest.approx(built["shuffled"])
    assert built["share"] > 0.9
    assert not other["positional"]
    assert built["n"] == sum(model.to_tokens(text).shape[1] + 1 - 16 for text in texts)
    unturned = positional_heads(model, texts, hooks=truncate_frequencies(model, 0.0))
    assert not unturned["positional"].any()


def test_a_head_that_reads_tokens_is_not_called_positional():
    """Tokens that say their place in the order they have: the share falls when they are shuffled."""
    model = only_frequencies([0, 1, 2, 3])
    texts = ["abcdefghijklmnopqrstuvwxyz" * 2]

    def looks_at_the_letter_before(pattern, hook):
        tokens = seen[-1]
        wanted = torch.zeros_like(pattern)
        for query in range(pattern.shape[-2]):
            before = (tokens[0, : query + 1] == tokens[0, query] - 1).nonzero().flatten()
            wanted[..., query, before[-1] if len(before) else query] = 1
        return wanted

    seen = []
    model.hook_dict["blocks.0.attn.hook_pattern"].add_hook(looks_at_the_letter_before, is_permanent=True)
    model.hook_dict["embed.hook_in"].add_hook(lambda tokens, hook: seen.append(tokens), is_permanent=True)
    natural = positional_heads(model, texts).iloc[0]
    assert natural["offset"] == 1
    assert natural["share"] > 0.9
    assert natural["shuffled"] < 0.5
    assert not natural["positional"]


def test_high_frequencies_of_positional_heads_are_set_beside_the_others():
    rows = [
        {"layer": 0, "side": side, "head": head, "index": i, "frequency": 1.0 / (i + 1), "norm": norm}
        for side, heads in (("query", range(4)), ("key", range(2)))
        for head in heads
        for i, norm in enumerate((3.0, 1.0, 1.0, 1.0) if head == 0 else (1.0, 1.0, 1.0, 1.0))
    ]
    heads = pd.DataFrame({"layer": 0, "head": range(4), "positional": [True, False, False, False]})
    table = high_frequency_use(pd.DataFrame(rows), heads).set_index("side")
    assert table.loc["query", ["n", "others", "positional", "other"]].tolist() == [1, 3, 9 / 12, 1 / 4]
    assert table.loc["key", ["n", "others", "positional", "other"]].tolist() == [1, 1, 9 / 12, 1 / 4]
    assert 0 < table.loc["query", "p"] <= 1
    nobody = high_frequency_use(pd.DataFrame(rows), heads.assign(positional=False))
    assert nobody["p"].isna().all()


@pytest.mark.slow
def test_for_any_query_and_distance_a_key_scores_highest_exactly_there():
    """Barbero et al., section 3: RoPE need not make attention decay."""
    generator = torch.Generator().manual_seed(0)
    frequencies = 10_000.0 ** (-torch.arange(0, 64, 2).double() / 64)
    distances = torch.arange(2048).double()
    queries = torch.randn(32, 64, generator=generator, dtype=torch.float64)
    for distance in (0, 1, 7, 300, 2000):
        keys = aligned_key(queries, distance, frequencies)
        scores = scores_by_distance(queries, keys, distances, frequencies)
        assert (scores.argmax(-1) == distance).all()
        assert scores[:, distance].tolist() == pytest.approx(queries.square().sum(-1).tolist())
        assert keys.norm(dim=-1).tolist() == pytest.approx(queries.norm(dim=-1).tolist())


def test_gaussian_queries_and_keys_score_zero_on_average_at_every_distance():
    """Within four standard errors at each of 12 distances; a decay would show at the larger ones."""
    generator = torch.Generator().manual_seed(0)
    frequencies = 10_000.0 ** (-torch.arange(0, 32, 2).double() / 32)
    distances = torch.tensor([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096]).double()
    queries, keys = torch.randn(2, 20_000, 32, generator=generator, dtype=torch.float64)
    scores = scores_by_distance(queries, keys, distances, frequencies)
    error = scores.std(0) / math.sqrt(len(scores))
    assert (scores.mean(0).abs() < 4 * error).all()
    assert scores.std(0).tolist() == pytest.approx([math.sqrt(32)] * 12, rel=0.05)


@pytest.mark.slow
def test_the_command_prints_draws_and_writes(tiny_model, tmp_path, capsys):
    model = tmp_path / "model"
    tiny_model(source="per_layer").save_pretrained(model)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The cat sat on mat {i} and slept.\n\n" for i in range(40)), "utf-8")
    csv, figure = tmp_path / "norms.csv", tmp_path / "norms.png"
    given = ["frequencies", str(model), "--corpus", str(text), "--csv", str(csv), "--figure", str(figure)]
    assert main(given) == 0
    printed = capsys.readouterr().out
    assert "highest quarter" in printed
    assert "heads give over half of their attention to one offset" in printed
    assert set(pd.read_csv(csv)["side"]) == {"query", "key"}
    assert figure.stat().st_size > 1000


def test_bad_requests_are_one_sentence(tiny_model, tmp_path, capsys):
    model = tiny_model()
    for keep in (-0.1, 1.5, math.nan):
        with pytest.raises(lp.PositionsError, match=r"keep is .*; expected a fraction of the frequencies from 0 to 1"):
            truncate_frequencies(model, keep)
    with pytest.raises(lp.PositionsError, match="layer 7 has no positions of its own"):
        truncate_frequencies(model, 0.5, layers=7)
    with pytest.raises(lp.PositionsError, match="no text has 17 tokens"):
        positional_heads(model, "short")
    with pytest.raises(lp.PositionsError, match="offsets is 99; expected a whole number from 1 to 16"):
        positional_heads(model, "long enough to be looked at", offsets=99)
    with pytest.raises(lp.PositionsError, match="there are 6 components and 4 frequencies"):
        aligned_key(torch.ones(6), 1, torch.ones(4))
    assert main(["frequencies", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.usefixtures("unchecked")
def test_another_end_to_drop_from_is_refused(tiny_model):
    with pytest.raises(lp.PositionsError, match='drop is \'all\'; expected "lowest" or "highest"'):
        truncate_frequencies(tiny_model(), 0.5, drop="all")
    with pytest.raises(lp.PositionsError, match="keep is 'half'; expected a fraction"):
        truncate_frequencies(tiny_model(), "half")
    for layer in (None, [0, 1]):
        with pytest.raises(lp.PositionsError, match="expected the number of one layer"):
            frequency_contributions(tiny_model(), TOKENS[:1], layer)
    with pytest.raises(lp.PositionsError, match="distance is nan; expected a finite number"):
        aligned_key(torch.ones(8), math.nan, torch.ones(4))
    for fraction in ("a", None, True, 1.5):
        with pytest.raises(lp.PositionsError, match=r"rope_fraction is .*; expected a number from 0 to 1"):
            lp.PositionModelConfig(rope_fraction=fraction)


@pytest.mark.usefixtures("unchecked")
def test_scores_that_are_no_sum_of_terms_are_refused():
    model = family("Gemma2ForCausalLM")
    assert rotary_layout(model)[0].pairs.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    with pytest.raises(lp.PositionsError, match="layer 0 are not its queries times its keys"):
        frequency_contributions(model, TOKENS, 0)
    with pytest.raises(lp.PositionsError, match="shows in TransformerLens no queries and keys"):
        rotary_layout(family("JetMoeForCausalLM"))


def test_a_model_without_rope_is_refused():
    with pytest.raises(lp.PositionsError, match="expected a RoPE model"):
        lp.HookedPositionTransformer.from_transformers(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2)))
