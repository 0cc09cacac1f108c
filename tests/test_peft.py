"""An adapter comes back to the bit in every form that peft gives a model, or is refused before a file is written."""

import copy
import re
from pathlib import Path

import families
import pytest
import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import lens_positions as lp
from lens_positions.checkpoint import load_base, load_pretrained, save_pretrained
from lens_positions.tokenizer import byte_tokenizer

TOKENS = torch.randint(0, 257, (2, 11), generator=torch.Generator().manual_seed(6))
H = lp.HookedPositionTransformer


def logits_of(model):
    with torch.no_grad():
        return model(TOKENS).logits


def drawn(model):
    """Adapters and streams far from where they start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "position_streams" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request, tiny_llama, tmp_path):
    tiny_llama(vocab_size=257, tie_word_embeddings=request.param).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def plain(tiny_llama, tmp_path):
    tiny_llama(vocab_size=257).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def lora(**settings):
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"]} | settings)


def bare(folder, **kwargs):
    return load_base(folder, **kwargs)[0]


def wrapped(model, source, config):
    model = get_peft_model(model, config)
    lp.attach_positions(model, lp.PositionConfig(source=source))
    return drawn(model)


def comes_back(model, folder, base, **kwargs):
    """Save an adapter, load it onto its base, and compare; returns the loaded model."""
    want = logits_of(model)
    lp.save_adapter(model, folder, base=base)
    loaded = bare(base, **kwargs)
    lp.load_adapter(loaded, folder)
    assert (logits_of(loaded) - want).abs().max() == 0.0
    assert (logits_of(bare(base, **kwargs)) - want).abs().max() > 0.1
    return loaded


KINDS = {
    "LoRA": lora(),
    "DoRA": lora(use_dora=True),
    "rank-stabilised": lora(use_rslora=True, rank_pattern={"layers.1.self_attn.q_proj": 4}, lora_alpha=7),
    "dropout": lora(lora_dropout=0.2),
    "all-linear": lora(target_modules="all-linear"),
    "embeddings": lora(target_modules=["embed_tokens", "q_proj"]),
    "head": lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "norms": lora(modules_to_save=["norm", "input_layernorm"]),
    "copied embeddings": lora(modules_to_save=["embed_tokens"]),
    "some tokens": lora(trainable_token_indices=[3, 65, 104]),
    "a parameter": lora(target_modules=[], target_parameters=["q_proj.weight"]),
    "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": LoHaConfig(r=2, target_modules=["q_proj"]),
    "LoKr": LoKrConfig(r=2, target_modules=["q_proj"]),
    "OFT": OFTConfig(oft_block_size=4, r=0, target_modules=["q_proj"]),
    "BOFT": BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),
    "HRA": HRAConfig(r=2, target_modules=["q_proj"]),
    "norm tuning": LNTuningConfig(target_modules=["input_layernorm"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_comes_back_to_the_bit(base, tmp_path, kind):
    tied = bare(base).config.tie_word_embeddings
    model = wrapped(bare(base), "shared" if tied else "per_layer", copy.deepcopy(KINDS[kind]))
    loaded = comes_back(model, tmp_path / "adapter", base)
    assert all(p.requires_grad for p in loaded.position_streams.parameters())
    again = bare(base)
    lp.load_adapter(again, tmp_path / "adapter")
    lp.save_adapter(again, tmp_path / "again", base=base)
    for name in ("positions.safetensors", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("order", ["peft first", "streams first"])
@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
@pytest.mark.parametrize("source", ["static", "shared", "per_layer", "frozen"])
def test_both_ways_and_both_orders_are_one_adapter(plain, tmp_path, way, order, source):
    model = bare(plain)
    if order == "streams first":
        lp.attach_positions(model, lp.PositionConfig(source=source))
    if way == "get_peft_model":
        model = get_peft_model(model, lora())
    else:
        model.add_adapter(lora())
    if order == "peft first":
        lp.attach_positions(model, lp.PositionConfig(source=source))
    loaded = comes_back(drawn(model), tmp_path / "adapter", plain)
    assert loaded.active_adapters() == ["default"]
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {"positions.json", "positions.safetensors", "adapter_config.json", "adapter_model.safetensors"}


def two_adapters(plain):
    model = get_peft_model(bare(plain), lora())
    model.add_adapter("other", lora(r=3, target_modules=["q_proj", "down_proj"]))
    model.set_adapter("other")
    lp.attach_positions(model, lp.PositionConfig(source="shared"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return drawn(model)


@pytest.mark.parametrize("active", ["default", "other", "both", "none"])
def test_several_adapters_come_back_with_the_one_that_was_active(plain, tmp_path, active):
    model = two_adapters(plain)
    if active == "none":
        model.base_model.disable_adapter_layers()
    else:
        model.base_model.set_adapter(["default", "other"] if active == "both" else active)
    loaded = comes_back(model, tmp_path / "adapter", plain)
    assert (tmp_path / "adapter" / "other" / "adapter_model.safetensors").is_file()
    for name in ("default", "other"):  # the one that rested came along
        model.base_model.enable_adapter_layers()
        model.base_model.set_adapter(name)
        loaded.enable_adapters()
        loaded.set_adapter(name)
        assert torch.equal(logits_of(loaded), logits_of(model))
    lp.save_adapter(model, tmp_path / "adapter", base=plain)  # an adapter of two is replaced by one of two


def test_an_adapter_with_a_copy_beside_one_without(plain, tmp_path):
    model = get_peft_model(bare(plain), lora(modules_to_save=["lm_head"]))
    model.add_adapter("other", lora(r=3))
    lp.attach_positions(drawn(model), lp.PositionConfig(source="per_layer"))
    for active in ("default", "other"):
        model.set_adapter(active)
        comes_back(drawn(model), tmp_path / active, plain)


def test_loading_can_merge_and_then_differs_by_rounding(plain, tmp_path):
    model = wrapped(bare(plain), "per_layer", lora())
    lp.save_adapter(model, tmp_path / "adapter", base=plain)
    merged = bare(plain)
    lp.load_adapter(merged, tmp_path / "adapter", merge=True)
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    assert 0 < (logits_of(merged) - logits_of(model)).abs().max() < 1e-4
    save_pretrained(merged, byte_tokenizer(), tmp_path / "whole")
    assert torch.equal(logits_of(load_pretrained(tmp_path / "whole")[0]), logits_of(merged))
    bridge = H.from_pretrained(tmp_path / "adapter")
    assert (bridge(TOKENS) - logits_of(model)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["LoRA", "embeddings", "head", "some tokens", "IA3"])
def test_a_bridge_has_the_merged_weights_or_refuses_tied_ones(base, tmp_path, kind):
    tied = bare(base).config.tie_word_embeddings
    model = wrapped(bare(base), "shared", copy.deepcopy(KINDS[kind]))
    lp.save_adapter(model, tmp_path / "adapter", base=base)
    if tied and kind in ("embeddings", "some tokens"):
        with pytest.raises(lp.PositionsError, match="whose weights the model uses twice"):
            H.from_pretrained(tmp_path / "adapter")
        return
    bridge = H.from_pretrained(tmp_path / "adapter")
    assert (bridge(TOKENS) - logits_of(model)).abs().max() < 1e-4
    bridge.save_pretrained(tmp_path / "whole")
    assert torch.equal(H.from_pretrained(tmp_path / "whole")(TOKENS), bridge(TOKENS))


def test_adapters_that_rest_are_not_merged(plain, tmp_path):
    model = two_adapters(plain)
    model.base_model.disable_adapter_layers()
    lp.save_adapter(model, tmp_path / "adapter", base=plain)
    merged = bare(plain)
    lp.load_adapter(merged, tmp_path / "adapter", merge=True)
    assert torch.equal(logits_of(merged), logits_of(model))


def test_float32_lora_on_a_bf16_base_keeps_its_bits(plain, tmp_path):
    model = get_peft_model(bare(plain, dtype=torch.bfloat16), lora())
    lp.attach_positions(model, lp.PositionConfig(source="shared"))
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    bare(plain, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    loaded = comes_back(drawn(model), tmp_path / "adapter", tmp_path / "half", dtype=torch.bfloat16)
    assert {p.dtype for n, p in loaded.named_parameters() if "lora_" in n} == {torch.float32}


@pytest.mark.parametrize("per_head", [False, True])
def test_a_bridge_around_a_peft_model_saves_and_runs_what_it_does(plain, tmp_path, per_head):
    model = get_peft_model(bare(plain, attn_implementation="eager"), lora())
    lp.attach_positions(model, lp.PositionConfig(source="shared", per_head=per_head))
    want = logits_of(drawn(model))
    bridge = H.from_transformers(model)
    assert torch.equal(bridge(TOKENS), want)
    lp.save_adapter(bridge, tmp_path / "adapter", base=plain)
    loaded = bare(plain, attn_implementation="eager")
    lp.load_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(logits_of(loaded), want)
    with pytest.raises(lp.PositionsError, match="LoRA weights that are not merged"):
        bridge.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def merged_model(plain):
    model = wrapped(bare(plain), "shared", lora())
    model.merge_adapter()
    return model


def merged_and_unmerged(plain):
    model = merged_model(plain)
    model.unmerge_adapter()
    return model


def source_copied(plain):
    model = bare(plain)
    lp.attach_positions(model, lp.PositionConfig(source="shared"))
    return get_peft_model(model, lora(modules_to_save=["position_streams"]))


def after_streams(source, per_head=False, **settings):
    def build(plain):
        model = bare(plain)
        lp.attach_positions(model, lp.PositionConfig(source=source, per_head=per_head))
        return get_peft_model(model, lora(**settings))

    return build


def of_kind(config):
    return lambda plain: wrapped(bare(plain), "shared", config)


def rescaled(plain):
    model = wrapped(bare(plain), "shared", lora())
    model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] *= 2
    return model


def uneven(plain):
    model = two_adapters(plain)
    model.base_model.model.model.layers[0].self_attn.q_proj.set_adapter("default")
    return model


def edited(plain):
    model = wrapped(bare(plain), "shared", lora())
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.up_proj.weight[0, 0] *= 1 + 2**-20  # less than bf16 can tell
    return model


def not_finite(plain):
    model = wrapped(bare(plain), "shared", lora())
    with torch.no_grad():
        model.base_model.model.position_streams.shared_source.hidden.bias[0] = float("nan")
    return model


REFUSED = {
    "merged": (merged_model, "default is merged into .*expected it unmerged"),
    "merged and unmerged": (merged_and_unmerged, "not those of .*base to the bit"),
    "merged and unloaded": (lambda plain: merged_model(plain).merge_and_unload(), "not those of .*base to the bit"),
    "edited": (edited, "not those of .*base to the bit"),
    "LoRA on the source": (after_streams("per_layer", target_modules="all-linear"), "a part of the increment source"),
    "part of the source copied": (
        after_streams("per_layer", modules_to_save=["hidden"]),
        "a part of the increment source",
    ),
    "embeddings under a source": (after_streams("shared", target_modules=["embed_tokens"]), "peft wrapped"),
    "tokens under a source": (after_streams("shared", trainable_token_indices=[3]), "peft wrapped"),
    "PiSSA": (of_kind(lora(init_lora_weights="pissa")), "changes the base's weights"),
    "biases": (of_kind(lora(bias="all")), "trains biases of the base"),
    "repeated layers": (of_kind(lora(layer_replication=[(0, 2), (1, 2)])), "repeats layers"),
    "invocation tokens": (of_kind(lora(task_type="CAUSAL_LM", alora_invocation_tokens=[3])), "invocation token"),
    "AdaLoRA": (of_kind(AdaLoraConfig(total_step=10, target_modules=["q_proj"])), "peft does not save .*ranknum"),
    "VeRA": (of_kind(VeraConfig(target_modules=["q_proj"])), "which layers share weights in"),
    "another scale": (rescaled, r"would not come back as it is \(scaling\)"),
    "uneven": (uneven, "sets of adapters are active"),
    "NaN": (not_finite, "NaN or infinite numbers in shared_source.hidden.bias"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_would_not_come_back_is_refused_before_a_file_is_written(plain, tmp_path, form):
    build, says = REFUSED[form]
    model = build(plain)
    with pytest.raises(lp.PositionsError, match=says) as refusal:
        lp.save_adapter(model, tmp_path / "adapter", base=plain)
    assert "\n" not in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_heads_of_their_own_under_lora_come_back(plain, tmp_path):
    """The projections are the model's own, whatever rotates behind them."""
    comes_back(drawn(after_streams("shared", per_head=True)(plain)), tmp_path / "adapter", plain)


def test_a_copied_source_is_refused_by_name(plain, tmp_path):
    with pytest.raises(lp.PositionsError, match=r"peft (copied|copies) .*attach_positions after"):
        lp.save_adapter(source_copied(plain), tmp_path / "adapter", base=plain)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_prompts_of_peft_are_refused_by_name(plain, tmp_path, kind):
    model = get_peft_model(bare(plain), kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
    for refused in (
        lambda: lp.attach_positions(model),
        lambda: H.from_transformers(model),
        lambda: lp.save_adapter(model, tmp_path / "adapter", base=plain),
        lambda: lp.load_adapter(model, tmp_path / "base"),
    ):
        with pytest.raises(lp.PositionsError, match=r"PREFIX_TUNING|PROMPT_TUNING|no adapter at"):
            refused()
    assert not hasattr(model.get_base_model(), "position_streams")


@pytest.mark.parametrize("part", ["norm", "hidden", "source"])
def test_a_part_of_the_source_that_peft_copies_is_the_one_that_runs(plain, part):
    """A copy that trains takes part; the original, which rests, does not."""
    model = bare(plain)
    lp.attach_positions(model, lp.PositionConfig(source="per_layer"))
    model = drawn(get_peft_model(model, lora(modules_to_save=[part])))
    model(TOKENS, labels=TOKENS).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if "position_streams" in n and p.requires_grad}
    assert trained
    assert all(p.grad is not None and p.grad.any() for p in trained.values())


def test_lora_on_a_source_is_part_of_what_runs(plain):
    model = bare(plain)
    lp.attach_positions(model, lp.PositionConfig(source="per_layer"))
    model = drawn(get_peft_model(model, lora(target_modules="all-linear")))
    model(TOKENS, labels=TOKENS).loss.backward()
    on_sources = [p for n, p in model.named_parameters() if "position_streams" in n and "lora_" in n]
    assert len(on_sources) == 8
    assert all(p.grad is not None and p.grad.any() for p in on_sources)


def test_increments_lora_and_peft_s_own_files(plain, tmp_path, monkeypatch):
    """The lines of docs/how-to/graft.md: peft first, streams after it, one folder that both libraries read."""
    page = (Path(__file__).parent.parent / "docs" / "how-to" / "graft.md").read_text("utf-8")
    adapt, attach, save = [line.strip() for line in page.splitlines() if re.match("    .*peft_model", line)]
    monkeypatch.chdir(tmp_path)
    names = {"lp": lp, "get_peft_model": get_peft_model, "LoraConfig": LoraConfig, "PeftModel": PeftModel}
    names |= {"model": bare(plain), "name": plain}
    exec(adapt, names)
    exec(attach, names)
    peft_model, streams = names["peft_model"], names["streams"]
    learn = {n for n, p in peft_model.named_parameters() if p.requires_grad}
    assert {n.split(".")[-3] for n in learn if "position_streams" not in n} == {"lora_A", "lora_B"}
    assert len([n for n in learn if "position_streams" in n]) == len(list(streams.parameters())) == 4
    want = logits_of(drawn(peft_model))
    exec(save, names)

    names["model"] = bare(plain)
    lp.load_adapter(names["model"], "both")
    assert torch.equal(logits_of(names["model"]), want)
    by_peft = PeftModel.from_pretrained(bare(plain), "both").eval()
    streams.detach()
    assert torch.equal(logits_of(by_peft), logits_of(peft_model))
    assert (logits_of(by_peft) - want).abs().max() > 0.1


def state_of(model):
    return {
        "tensors": {n: t.clone() for n, t in model.state_dict().items()},
        "learns": {n: p.requires_grad for n, p in model.named_parameters()},
        "modules": [(n, type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in
                    model.named_modules()],
        "peft": {n for n in vars(model) if "peft" in n},
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("another base", "was made for"),
        ("last bits of the base", "expected that base to the bit"),
        ("LoRA of other shapes", "do not fit"),
        ("second adapter missing", "adapter_config.json"),
        ("streams not finite", "NaN or infinite"),
        ("streams of other shapes", "does not fit"),
        ("a flipped bit in LoRA", "not the file that was saved"),
        ("a flipped bit in the streams", "not the file that was saved"),
        ("a changed alpha", "not the file that was saved"),
        ("adapter already there", "has an adapter of peft already"),
    ],
)
def test_a_refused_load_leaves_the_base_as_it_was(plain, tmp_path, harm, says):
    from safetensors.torch import load_file, save_file

    saved = two_adapters(plain)
    want = logits_of(saved)
    lp.save_adapter(saved, tmp_path / "good", base=plain)
    lp.save_adapter(saved, tmp_path / "bad", base=plain)
    bad = tmp_path / "bad"

    def change(name, edit):
        tensors = load_file(bad / name)
        edit(tensors, next(iter(sorted(tensors))))
        save_file(tensors, bad / name)

    def flip(name):
        data = bytearray((bad / name).read_bytes())
        data[-2] ^= 1
        (bad / name).write_bytes(data)

    base = bare(plain)
    with torch.no_grad():
        if harm == "another base":
            base.model.norm.weight[3] += 1
        elif harm == "last bits of the base":
            base.model.norm.weight[3] += 2**-20
    base.model.layers[1].mlp.requires_grad_(False)
    if harm == "LoRA of other shapes":
        change("other/adapter_model.safetensors", lambda t, n: t.update({n: t[n][:1].clone()}))
    elif harm == "second adapter missing":
        (bad / "other" / "adapter_config.json").unlink()
    elif harm == "streams not finite":
        change("positions.safetensors", lambda t, n: t[n].fill_(float("inf")))
    elif harm == "streams of other shapes":
        change("positions.safetensors", lambda t, n: t.update({n: t[n][:1].clone()}))
    elif harm == "a changed alpha":
        path = bad / "adapter_config.json"
        path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    elif harm == "adapter already there":
        base.add_adapter(lora())
    elif "flipped" in harm:
        flip("adapter_model.safetensors" if "LoRA" in harm else "positions.safetensors")
    before = state_of(base)
    with pytest.raises(lp.PositionsError, match=says) as refusal:
        lp.load_adapter(base, bad)
    assert "\n" not in str(refusal.value)
    after = state_of(base)
    assert all(torch.equal(t, after["tensors"][n]) for n, t in before.pop("tensors").items())
    after.pop("tensors")
    assert after == before
    if "base" not in harm and "already" not in harm:  # the natural next call works
        lp.load_adapter(base, tmp_path / "good")
        assert torch.equal(logits_of(base), want)


@pytest.mark.parametrize("family", ["tied Llama", "Llama", "GPT-NeoX"])
@pytest.mark.parametrize("edit", ["W_E", "W_U", "W_Q", "W_O", "b_U", "bare embedding", "bare attention"])
def test_a_model_edited_in_a_bridge_and_its_saved_folder_agree_or_saving_is_refused(tiny_llama, tmp_path, family, edit):
    if family == "GPT-NeoX":
        sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        torch.manual_seed(0)
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=4, initializer_range=0.25)).eval()
        model.set_attn_implementation("eager")
    else:
        model = tiny_llama(tie_word_embeddings=family == "tied Llama")
    bridge = H.from_transformers(model, positions=lp.PositionConfig(source="shared"))
    tokens, before = TOKENS % 61, bridge(TOKENS % 61)
    names = ("q_proj._original_component.weight", "query_key_value._original_component.weight")
    attention = next(t for n, t in model.state_dict().items() if n.endswith(names))
    weight = {
        "W_E": lambda: bridge.embed.W_E,
        "W_U": lambda: bridge.unembed.W_U,
        "W_Q": lambda: bridge.blocks[0].attn.W_Q,
        "W_O": lambda: bridge.blocks[0].attn.W_O,
        "b_U": lambda: bridge.unembed.b_U,
        "bare embedding": lambda: model.get_input_embeddings().weight,
        "bare attention": lambda: attention,
    }[edit]()
    with torch.no_grad():
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    lost = edit == "b_U" or (family == "GPT-NeoX" and edit in ("W_Q", "bare attention"))
    if lost:
        with pytest.raises(lp.PositionsError, match=r"a bias that the bridge added|joint query, key and value"):
            bridge.save_pretrained(tmp_path / "model")
        assert not list(tmp_path.iterdir())
        return
    now = bridge(tokens)
    assert (now - before).abs().max() > 0.1
    bridge.save_pretrained(tmp_path / "model")
    loaded, tokenizer = load_pretrained(tmp_path / "model", attn_implementation="eager")
    assert tokenizer is None
    assert torch.equal(loaded(tokens).logits, now)
    assert torch.equal(H.from_pretrained(tmp_path / "model")(tokens), now)


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "GPTNeoXForCausalLM", "StableLmForCausalLM", "GlmForCausalLM"])
def test_second_names_that_a_bridge_gives_to_biases_are_no_edits(tmp_path, name):
    bridge = H.from_transformers(families.build(name), positions=lp.PositionConfig(source="per_layer"))
    bridge.save_pretrained(tmp_path / "model")
    tokens = families.TOKENS
    assert torch.equal(H.from_pretrained(tmp_path / "model", attn_implementation="eager")(tokens), bridge(tokens))
