"""A head whose every effect can be computed on paper: it reads exactly one step back, by a few fast frequencies.

One layer and one head. A query is the same for every token, and so is a key but for a turn by one step: the score of
token j seen from token i is A * sum_w cos(w (p_i - p_j - 1)), largest one step back. Values are one-hot, so the logits
are the attention to each byte, over the norm. `paper` is that formula, in plain float64.
"""

import copy

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lens_positions as lp
from lens_positions import causal
from lens_positions.tokenizer import byte_tokenizer

VOCAB, WIDTH, SHARPNESS, EPSILON = 257, 258, 6.0, 1e-6
PAIRS = [0, 20, 40, 60]
FREQUENCIES = 10_000.0 ** (-np.array(PAIRS) / (WIDTH / 2))
TEXT = torch.tensor([list(b"abcdefgh")])
OTHER = torch.tensor([list(b"stuvwxyz")])
INCREMENTS = {**{ord(c): 0.5 + 0.15 * i for i, c in enumerate("abcdefgh")},
              **{ord(c): 2.0 - 0.1 * i for i, c in enumerate("stuvwxyz")}}  # fmt: skip


def attention(positions):
    """[query, key], by the formula."""
    back = positions[:, None] - positions[None]
    scores = SHARPNESS * np.cos(FREQUENCIES * (back[..., None] - 1)).sum(-1)
    scores[np.triu_indices(len(positions), 1)] = -np.inf
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def paper(tokens, increments):
    """Logits [pos, vocab] of these increments; the first has no effect."""
    increments = np.asarray(increments, dtype=np.float64)
    weights = attention(np.concatenate([[0.0], np.cumsum(increments[1:])]))
    mixed = np.zeros((len(tokens), VOCAB))
    for j, token in enumerate(tokens):
        mixed[:, token] += weights[:, j]
    return mixed / np.sqrt((2 + (mixed**2).sum(1, keepdims=True)) / (2 * VOCAB + 1) + EPSILON)


@pytest.fixture(scope="module")
def llama():
    """The head, written into a Llama."""
    hidden = 2 * VOCAB + 1  # the byte, one that is always on, what the head writes
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=hidden, intermediate_size=1, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, head_dim=WIDTH, max_position_embeddings=64, rms_norm_eps=EPSILON,
            tie_word_embeddings=False, bos_token_id=None, eos_token_id=256, pad_token_id=256,
        )
    ).eval()  # fmt: skip
    model.config._attn_implementation = "eager"
    normed = 1 / np.sqrt(2 / hidden + EPSILON)  # what the norm makes of a one: two are on
    half, bytes_ = WIDTH // 2, range(VOCAB)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.ndim == 1 else 0.0)
        model.model.embed_tokens.weight[bytes_, bytes_] = 1.0
        model.model.embed_tokens.weight[:, VOCAB] = 1.0
        attention, size = model.model.layers[0].self_attn, SHARPNESS * WIDTH**0.5
        for pair, frequency in zip(PAIRS, FREQUENCIES, strict=True):
            attention.q_proj.weight[pair, VOCAB] = size / normed
            attention.k_proj.weight[pair, VOCAB] = np.cos(frequency) / normed
            attention.k_proj.weight[half + pair, VOCAB] = np.sin(frequency) / normed
        attention.v_proj.weight[bytes_, bytes_] = 1 / normed
        attention.o_proj.weight[range(VOCAB + 1, hidden), bytes_] = 1.0
        model.lm_head.weight[bytes_, range(VOCAB + 1, hidden)] = 1.0
    return model


@pytest.fixture(scope="module")
def static(llama):
    return lp.HookedPositionTransformer.from_transformers(copy.deepcopy(llama), byte_tokenizer())


@pytest.fixture(scope="module")
def learned(llama):
    """The same head with an increment for each byte."""
    table = torch.ones(VOCAB)
    for byte, increment in INCREMENTS.items():
        table[byte] = increment
    config = lp.PositionConfig(source="frozen")
    return lp.HookedPositionTransformer.from_transformers(copy.deepcopy(llama), byte_tokenizer(), config, table=table)


def increments_of(tokens):
    return np.array([INCREMENTS[int(t)] for t in tokens[0]])


METRIC = causal.logit_difference(ord("g"), ord("f"))


def on_paper(increments, tokens=TEXT):
    logits = paper(tokens[0].tolist(), increments)[-1]
    return logits[ord("g")] - logits[ord("f")]


def close(ours, theirs):
    torch.testing.assert_close(torch.as_tensor(ours).double(), torch.as_tensor(theirs), atol=2e-5, rtol=1e-4)


def test_the_head_reads_one_step_back(static):
    logits, cache = static.run_with_cache(TEXT)
    pattern = cache["pattern", 0][0, 0]
    close(pattern, attention(np.arange(8.0)))
    assert (pattern[1:].argmax(1) == torch.arange(7)).all()
    assert (pattern.diagonal(-1)[1:] > 0.85).all()
    close(logits[0], paper(TEXT[0].tolist(), np.ones(8)))


@pytest.mark.parametrize("by", [-0.5, 0.5, 1.0, 2.5])
def test_stretching_a_gap_moves_its_attention_as_the_formula_says(static, by):
    increments = np.ones(8)
    increments[5] += by
    patterns = []
    static.run_with_hooks(
        TEXT,
        fwd_hooks=[*lp.add_gap(static, 5, by=by), ("blocks.0.attn.hook_pattern", lambda p, hook: patterns.append(p))],
    )
    close(patterns[0][0, 0], attention(np.concatenate([[0.0], np.cumsum(increments[1:])])))
    assert abs(patterns[0][0, 0, 5, 4] - attention(np.arange(8.0))[5, 4]) > 0.01


@pytest.mark.parametrize("by", [0.5, 1.0])
def test_gap_sweep_gives_the_effect_of_every_gap(static, learned, by):
    for model, own in ((static, np.ones(8)), (learned, increments_of(TEXT))):
        effects = [0.0] + [on_paper(own + by * (np.arange(8) == t)) - on_paper(own) for t in range(1, 8)]
        close(causal.gap_sweep(model, TEXT, METRIC, by=by)[0], effects)
        assert max(map(abs, effects)) > 1


@pytest.mark.parametrize("to", [1.0, 0.4, "mean"])
def test_ablation_gives_the_effect_on_paper(learned, to):
    own = increments_of(TEXT)
    ablated = np.full(8, own[1:].mean() if to == "mean" else to)
    with torch.no_grad():
        value = METRIC(learned.run_with_hooks(TEXT, fwd_hooks=lp.ablate(learned, to=to)))
    close(value, [on_paper(ablated)])
    table = causal.ablation_table(learned, TEXT, to=[to]).loss
    targets = TEXT[0, 1:].tolist()

    def loss(increments):
        logits = paper(TEXT[0].tolist(), increments)[:-1]
        return (np.log(np.exp(logits).sum(1)) - logits[range(7), targets]).mean()

    assert list(table["layer"]) == ["all", 0]
    close(table["baseline"].to_numpy(), [loss(own)] * 2)
    close(table["change"].to_numpy(), [loss(ablated) - loss(own)] * 2)


def test_ablated_attention_moves_by_the_distance_on_paper(learned):
    own, ablated = (attention(np.concatenate([[0.0], np.cumsum(d[1:])])) for d in (increments_of(TEXT), np.ones(8)))
    back = np.arange(8)[:, None] - np.arange(8)
    row = causal.ablation_table(learned, TEXT, to=[1.0]).attention.iloc[1]
    assert (row["ablated"], row["layer"], row["head"], row["n"]) == (0, 0, 0, 7)
    close(row["distance"], (np.abs(own - ablated).sum(1) / 2)[1:].mean())
    close(row["look_back"], (own * back).sum(1)[1:].mean())
    close(row["look_back_change"], ((ablated - own) * back).sum(1)[1:].mean())
    assert row["distance"] > 0.02


def test_patch_gives_the_effect_on_paper(static, learned):
    own, other = increments_of(TEXT), increments_of(OTHER)
    effects = []
    for t in range(8):
        patched = own.copy()
        patched[t] = other[t]
        effects.append(on_paper(patched) - on_paper(own))
    close(causal.patch_sweep(learned, OTHER, TEXT, METRIC)[0], effects)
    assert max(map(abs, effects)) > 0.5
    assert causal.patch_sweep(static, OTHER, TEXT, METRIC).abs().max() == 0.0


@pytest.mark.slow
def test_attribution_is_the_slope_and_the_integral_on_paper(learned):
    own, step = increments_of(TEXT), 1e-6
    unit = np.eye(8)
    slopes = [(on_paper(own + step * unit[t]) - on_paper(own - step * unit[t])) / (2 * step) for t in range(8)]
    close(causal.attribution(learned, TEXT, METRIC)[0], slopes)
    assert max(map(abs, slopes)) > 1
    for baseline, start in ((1.0, np.ones(8)), (0.0, np.zeros(8)), ("mean", np.full(8, own[1:].mean()))):
        places, weights = np.polynomial.legendre.leggauss(64)
        integrals = np.zeros(8)
        for place, weight in zip(places, weights, strict=True):
            at = start + (place + 1) / 2 * (own - start)
            slope = [(on_paper(at + step * unit[t]) - on_paper(at - step * unit[t])) / (2 * step) for t in range(8)]
            integrals += weight / 2 * np.array(slope) * (own - start)
        integrated = causal.attribution(learned, TEXT, METRIC, "integrated", baseline=baseline)[0]
        assert float(integrated.sum()) == pytest.approx(on_paper(own) - on_paper(start), rel=0.01)
        torch.testing.assert_close(integrated.double(), torch.tensor(integrals), atol=0.02, rtol=0.02)


def test_mediation_is_the_split_on_paper(learned):
    corrupted = torch.tensor([list(b"abcdgfeh")])
    own, other = increments_of(TEXT), increments_of(corrupted)
    base = on_paper(own)
    total, direct = on_paper(other, corrupted) - base, on_paper(own, corrupted) - base
    through = on_paper(other) - base
    table = causal.mediation(learned, TEXT, corrupted, METRIC)
    for layer in ("all", 0):
        of_layer = table[table["layer"] == layer]
        assert list(of_layer["path"]) == ["total", "direct", "increments", "interaction"]
        close(of_layer["mean"].to_numpy(), [total, direct, through, total - direct - through])
    assert min(map(abs, (direct, through, total - direct - through))) > 0.01
