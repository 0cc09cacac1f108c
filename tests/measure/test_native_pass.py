"""Blocks as transformers has them give what the bridge's own steps give, and are left alone where somebody looks."""

import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import lens_positions as lp
from lens_positions import causal
from lens_positions.analysis.losses import increments_and_losses, losses
from lens_positions.causal import ablation
from lens_positions.measure.native_pass import native_blocks

NAMES = ["bilingual-rope", "bilingual-shared", "bilingual-per-layer"]
TEXTS = ["The President of the United States spoke today.\n", "中国政府今天在北京举行记者会。\n", "A short one.\n" * 30]


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return lp.HookedPositionTransformer.from_pretrained(request.param)


@contextmanager
def no_native_blocks(_model, _rows):
    yield False


def logits_of(model, tokens, hooks=()):
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=list(hooks)) if hooks else model(tokens)


def test_logits_are_the_same_with_and_without_edits(model):
    tokens = model.to_tokens(TEXTS[0])
    edits = [[], lp.ablate(model, to=1.5), lp.add_gap(model, before=5, by=2.5, layers=[1])]
    before = [logits_of(model, tokens, hooks) for hooks in edits]
    with native_blocks(model, tokens) as is_native:
        assert is_native
        during = [logits_of(model, tokens, hooks) for hooks in edits]
    assert (before[0] - before[2]).abs().max() > 0.01
    for one, other in zip(before, during, strict=True):
        assert (one - other).abs().max() < 1e-4

    # To the bit, once it is over.
    assert all(torch.equal(logits_of(model, tokens, hooks), one) for hooks, one in zip(edits, before, strict=True))


def test_functions_inside_of_blocks_are_still_called(model):
    tokens = model.to_tokens(TEXTS[0])
    half = {name: lambda values, hook: values * 0.5 for name in ("hook_pattern", "hook_attn_scores", "hook_rot_q")}
    for name, function in half.items():
        hook = (f"blocks.1.attn.{name}", function)
        edited = logits_of(model, tokens, [hook])
        with model.hooks(fwd_hooks=[hook]), native_blocks(model, tokens) as is_native:
            assert not is_native
            assert torch.equal(logits_of(model, tokens), edited)
    of_one_head = lp.ablate(model, to=2.0, heads=1)
    with model.hooks(fwd_hooks=of_one_head), native_blocks(model, tokens) as is_native:
        assert not is_native


def test_half_precision_and_dropout_stay_as_they_are():
    model = lp.HookedPositionTransformer.from_pretrained(NAMES[2])
    tokens = model.to_tokens(TEXTS[0])
    model.train()
    with native_blocks(model, tokens) as is_native:
        assert not is_native
    model.eval()
    with native_blocks(model.to(torch.bfloat16), tokens) as is_native:
        assert not is_native


def test_a_module_that_gives_something_else_is_not_taken(model, monkeypatch):
    tokens = model.to_tokens(TEXTS[0])
    own = logits_of(model, tokens)
    original = model.blocks[2].attn.original_component
    monkeypatch.setitem(vars(original), "forward", lambda hidden_states, **_: (hidden_states * 2, None))
    with native_blocks(model, tokens) as is_native:
        assert not is_native
        assert torch.equal(logits_of(model, tokens), own)


def test_other_threads_see_patterns_as_ever(model):
    tokens = model.to_tokens(TEXTS[0])
    seen = []

    def look():
        _, cache = model.run_with_cache(tokens)
        seen.append(cache["pattern", 0].shape)

    with native_blocks(model, tokens) as is_native:
        assert is_native
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert seen == [(1, 4, tokens.shape[1], tokens.shape[1])]


def test_tables_of_ablations_are_those_of_the_bridges_own_steps(model, monkeypatch):
    found = causal.ablation_table(model, TEXTS, attention=False).loss
    monkeypatch.setattr(ablation, "native_blocks", no_native_blocks)
    expected = causal.ablation_table(model, TEXTS, attention=False).loss
    numbers = expected.select_dtypes("number").columns
    np.testing.assert_allclose(found[numbers], expected[numbers], atol=1e-5)
    assert (found[["layer", "to"]] == expected[["layer", "to"]]).all(axis=None)
    changes = expected["change"].abs().max()
    assert changes == 0 if model.position_config.source == "static" else changes > 0.01


def test_one_pass_gives_increments_and_losses(model):
    corpus, found = increments_and_losses(model, TEXTS)
    expected, of_texts = lp.analysis.read_corpus(model, TEXTS), losses(model, TEXTS)
    np.testing.assert_allclose(corpus.increments, expected.increments, atol=1e-5)
    np.testing.assert_array_equal(corpus.document, expected.document)
    np.testing.assert_array_equal(corpus.index, expected.index)
    np.testing.assert_allclose(found.nats / found.tokens, of_texts.nats / of_texts.tokens, atol=1e-6)
    with torch.no_grad():
        tokens = [torch.cat([model.to_tokens(text)[0], torch.tensor([256])])[None] for text in TEXTS[:2]]
        own = [float(model(row, return_type="loss")) for row in tokens]
    np.testing.assert_allclose((found.nats / found.tokens)[:2], own, atol=1e-5)
    assert found.bytes.tolist() == [len(text.encode()) for text in TEXTS]
