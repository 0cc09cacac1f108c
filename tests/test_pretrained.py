"""Adapters hold streams without their base, know it, and refuse another; a base is itself in any dtype and bridge."""

import json
import os

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import lens_positions as lp
from lens_positions import PositionsError
from lens_positions.checkpoint import fingerprint, load_base, load_pretrained, replacement_folder, save_pretrained
from lens_positions.tokenizer import byte_tokenizer

TOKENS = torch.randint(0, 257, (2, 11), generator=torch.Generator().manual_seed(6))


def logits_of(model):
    with torch.no_grad():
        return model(TOKENS).logits


def modules_of(model):
    return [(n, type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]


@pytest.fixture
def base(tiny_llama, tmp_path):
    tiny_llama(vocab_size=257).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def grafted(base, randomize):
    def build(lora=False, **positions):
        model, _ = load_base(base)
        if lora:
            model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(parameter, std=0.3)
        lp.attach_positions(model, lp.PositionConfig(**positions))
        with torch.no_grad():
            for parameter in model.position_streams.parameters():
                parameter.normal_()
        return model.eval()

    return build


@pytest.mark.parametrize("source", ["shared", "per_layer", "frozen"])
@pytest.mark.parametrize("per_head", [False, True])
def test_an_adapter_gives_the_same_logits_to_the_bit(grafted, base, tmp_path, source, per_head):
    model = grafted(source=source, per_head=per_head)
    lp.save_adapter(model, tmp_path / "adapter", base=base)
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == ["positions.json", "positions.safetensors"]
    loaded, tokenizer = load_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert tokenizer("é")["input_ids"] == [256, 195, 169]
    bridged = lp.HookedPositionTransformer.from_pretrained(tmp_path / "adapter")
    assert torch.equal(
        bridged.increments(TOKENS), lp.HookedPositionTransformer.from_transformers(model).increments(TOKENS)
    )


def test_an_adapter_of_a_bridge_is_the_same_file(grafted, base, tmp_path):
    model = grafted(source="per_layer")
    lp.save_adapter(model, tmp_path / "bare", base=base)
    lp.save_adapter(lp.HookedPositionTransformer.from_transformers(model), tmp_path / "bridged", base=base)
    for name in ("positions.json", "positions.safetensors"):
        assert (tmp_path / "bare" / name).read_bytes() == (tmp_path / "bridged" / name).read_bytes()


def test_lora_weights_are_merged_when_an_adapter_is_loaded(grafted, base, tmp_path):
    model = grafted(lora=True, source="per_layer")
    lp.save_adapter(model, tmp_path / "adapter", base=base)
    loaded, _ = load_pretrained(tmp_path / "adapter")
    assert not any("lora_" in name for name, _ in loaded.named_parameters())
    assert (logits_of(loaded) - logits_of(model)).abs().max() < 1e-4 * logits_of(model).abs().max()
    streams_alone, _ = load_base(base)
    lp.attach_positions(streams_alone, model.position_streams.config)
    streams_alone.position_streams.load_state_dict(model.position_streams.state_dict())
    assert (logits_of(loaded) - logits_of(streams_alone)).abs().max() > 0.1
    save_pretrained(loaded, byte_tokenizer(), tmp_path / "whole")
    assert torch.equal(logits_of(load_pretrained(tmp_path / "whole")[0]), logits_of(loaded))


def test_the_fingerprint_is_of_the_base_alone(grafted, base):
    plain = fingerprint(load_base(base)[0])
    assert fingerprint(load_base(base, dtype=torch.bfloat16)[0]) == plain
    assert fingerprint(grafted(source="per_layer")) == plain
    assert fingerprint(grafted(source="shared", lora=True)) == plain
    bridged = lp.HookedPositionTransformer.from_transformers(grafted(source="shared"))
    assert fingerprint(bridged) == plain
    with torch.no_grad():
        bridged.original_model.get_input_embeddings().weight[3, 5] += 0.1
    assert fingerprint(bridged) != plain


@pytest.mark.parametrize("lora", [False, True])
def test_another_base_is_refused_and_untouched(grafted, base, tmp_path, lora):
    lp.save_adapter(grafted(source="shared", lora=lora), tmp_path / "adapter", base=base)
    other, _ = load_base(base)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    before, logits = modules_of(other), logits_of(other)
    with pytest.raises(
        lp.PositionsError, match=r"was made for .*base .weights [0-9a-f]{12}.*expected that base"
    ) as refusal:
        lp.load_adapter(other, tmp_path / "adapter")
    assert "\n" not in str(refusal.value)
    assert modules_of(other) == before
    assert torch.equal(logits_of(other), logits)
    other.save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(lp.PositionsError, match="was made for"):
        load_pretrained(tmp_path / "adapter", base=tmp_path / "other")


def test_a_base_that_moved_is_named_by_hand(grafted, base, tmp_path):
    model = grafted(source="per_layer")
    lp.save_adapter(model, tmp_path / "adapter", base=base)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(lp.PositionsError, match=r"no model folder at .*base"):
        load_pretrained(tmp_path / "adapter")
    loaded, _ = load_pretrained(tmp_path / "adapter", base=tmp_path / "elsewhere")
    assert torch.equal(logits_of(loaded), logits_of(model))
    with pytest.raises(lp.PositionsError, match="is no adapter; expected no base"):
        load_pretrained(tmp_path / "elsewhere", base=tmp_path / "elsewhere")


def test_an_adapter_attaches_to_a_bridge_and_comes_off(grafted, base, tmp_path):
    model = grafted(source="shared")
    lp.save_adapter(model, tmp_path / "adapter", base=base)
    bridge = lp.HookedPositionTransformer.from_pretrained(base)
    bridge.position_streams.detach()
    untouched = bridge(TOKENS)
    streams = lp.load_adapter(bridge, tmp_path / "adapter")
    assert not torch.equal(bridge(TOKENS), untouched)
    with pytest.raises(lp.PositionsError, match="attached to this model already"):
        lp.load_adapter(bridge, tmp_path / "adapter")
    streams.detach()
    assert torch.equal(bridge(TOKENS), untouched)


def test_lora_in_a_bridge_is_refused(grafted, base, tmp_path):
    lp.save_adapter(grafted(source="shared", lora=True), tmp_path / "adapter", base=base)
    bridge = lp.HookedPositionTransformer.from_pretrained(base)
    bridge.position_streams.detach()
    with pytest.raises(lp.PositionsError, match="LoRA weights to merge; expected a transformers model outside"):
        lp.load_adapter(bridge, tmp_path / "adapter")


def truncate(path):
    path.write_bytes(path.read_bytes()[:40])


DAMAGE = {
    "no weights": (lambda folder: (folder / "positions.safetensors").unlink(), "expected both"),
    "truncated weights": (lambda folder: truncate(folder / "positions.safetensors"), "truncated or damaged"),
    "truncated description": (lambda folder: truncate(folder / "positions.json"), "is damaged"),
    "a base without a name": (
        lambda folder: (folder / "positions.json").write_text('{"format": 1, "positions": {}, "base": {}}'),
        "is damaged",
    ),
    "other shapes": (
        lambda folder: save_file(
            {n: t[:1].clone() for n, t in load_file(folder / "positions.safetensors").items()},
            folder / "positions.safetensors",
        ),
        "does not fit",
    ),
    "LoRA of other shapes": (
        lambda folder: save_file(
            {n: t[:1].clone() for n, t in load_file(folder / "adapter_model.safetensors").items()},
            folder / "adapter_model.safetensors",
        ),
        "damaged or do not fit",
    ),
    "LoRA without half of it": (
        lambda folder: save_file(
            {n: t for n, t in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in n},
            folder / "adapter_model.safetensors",
        ),
        "damaged or do not fit",
    ),
    "LoRA without a description": (
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        "damaged or do not",
    ),
    "truncated LoRA": (lambda folder: truncate(folder / "adapter_model.safetensors"), "damaged or do not fit"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_adapters_are_one_sentence_and_leave_the_base_alone(grafted, base, tmp_path, damage):
    lp.save_adapter(grafted(source="per_layer", lora="LoRA" in damage), tmp_path / "adapter", base=base)
    destroy, said = DAMAGE[damage]
    destroy(tmp_path / "adapter")
    with pytest.raises(lp.PositionsError, match=said) as refusal:
        lp.HookedPositionTransformer.from_pretrained(tmp_path / "adapter")
    assert "\n" not in str(refusal.value)
    model, _ = load_base(base)
    before, logits = modules_of(model), logits_of(model)
    with pytest.raises(lp.PositionsError, match=said):
        lp.load_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits_of(model), logits)
    assert modules_of(model) == before


def test_what_cannot_be_an_adapter_is_refused(grafted, base, tmp_path):
    model = grafted(source="shared")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(lp.PositionsError, match="holds other files"):
        lp.save_adapter(model, tmp_path / "mine", base=base)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    with pytest.raises(lp.PositionsError, match="there is no adapter at"):
        lp.load_adapter(load_base(base)[0], tmp_path / "mine")
    with pytest.raises(lp.PositionsError, match="no position streams; expected attach_positions"):
        lp.save_adapter(load_base(base)[0], tmp_path / "adapter", base=base)
    with pytest.raises(lp.PositionsError, match="LoRA weights that are not merged"):
        save_pretrained(grafted(source="shared", lora=True), None, tmp_path / "whole")
    bridge = lp.HookedPositionTransformer.from_transformers(model)
    bridge.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(lp.PositionsError, match="folded"):
        lp.save_adapter(bridge, tmp_path / "adapter", base=base)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "mine"]


def test_a_saved_model_is_not_replaced_by_an_adapter(grafted, base, tmp_path):
    model = grafted(source="shared")
    save_pretrained(model, byte_tokenizer(), tmp_path / "whole")
    kept = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    with pytest.raises(lp.PositionsError, match="holds other files; expected an adapter"):
        lp.save_adapter(model, tmp_path / "whole", base=base)
    assert {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()} == kept


@pytest.mark.parametrize("lora", [False, True])
def test_a_loaded_adapter_learns_as_before(grafted, base, tmp_path, lora):
    lp.save_adapter(grafted(source="per_layer", lora=lora), tmp_path / "adapter", base=base)
    loaded, _ = load_pretrained(tmp_path / "adapter")
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    loaded(TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.position_streams.layers[0].parameters())


def test_an_adapter_loads_its_base_in_the_dtype_it_was_made_in(grafted, base, tmp_path):
    model, _ = load_base(base, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bf16")
    byte_tokenizer().save_pretrained(tmp_path / "bf16")
    wide, _ = load_base(tmp_path / "bf16", dtype=torch.float32)
    lp.attach_positions(wide, lp.PositionConfig(source="shared"))
    lp.save_adapter(wide, tmp_path / "adapter", base=tmp_path / "bf16")
    assert load_base(tmp_path / "bf16")[0].dtype == torch.bfloat16
    assert load_pretrained(tmp_path / "adapter")[0].dtype == torch.float32
    assert load_pretrained(tmp_path / "adapter", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_saving_draws_no_random_numbers_and_keeps_how_the_model_generates(grafted, tmp_path):
    model = grafted(source="shared")
    model.generation_config.eos_token_id = [1, 7]
    model.generation_config.max_new_tokens = 77
    before = torch.get_rng_state()
    save_pretrained(model, byte_tokenizer(), tmp_path / "whole")
    assert torch.equal(torch.get_rng_state(), before)
    loaded, _ = load_pretrained(tmp_path / "whole")
    assert (loaded.generation_config.eos_token_id, loaded.generation_config.max_new_tokens) == ([1, 7], 77)


def test_tensors_that_transformers_no_longer_reads_are_no_obstacle(base):
    weights = load_file(base / "model.safetensors")
    save_file({**weights, "model.layers.0.self_attn.bias": torch.ones(1)}, base / "model.safetensors", {"format": "pt"})
    assert load_base(base)[0] is not None
    save_file({**weights, "position_streams.x": torch.ones(1)}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(lp.PositionsError, match=r"an unknown tensor position_streams\.x"):
        load_base(base)


def test_any_config_that_transformers_cannot_read_is_one_sentence(base):
    described = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(described | {"hidden_size": "wide"}))
    with pytest.raises(lp.PositionsError, match="cannot be loaded as a transformers model") as refusal:
        load_base(base)
    assert "\n" not in str(refusal.value)


def test_a_relative_base_is_found_from_anywhere(grafted, base, tmp_path, monkeypatch):
    model = grafted(source="shared")
    monkeypatch.chdir(tmp_path)
    lp.save_adapter(model, "adapter", base="base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(logits_of(load_pretrained(tmp_path / "adapter")[0]), logits_of(model))


def test_the_description_names_the_base(grafted, base, tmp_path):
    lp.save_adapter(grafted(source="shared"), tmp_path / "adapter", base="owner/name")
    described = json.loads((tmp_path / "adapter" / "positions.json").read_text())
    assert described["base"] == {
        "name": "owner/name",
        "sha256": fingerprint(load_base(base)[0]),
        "dtype": "float32",
    }


def test_a_replaced_folder_is_as_readable_as_any_and_comes_back_if_the_last_step_fails(tmp_path, monkeypatch):
    path = tmp_path / "model"
    with replacement_folder(path) as folder:
        (folder / "a").write_text("first")
    (tmp_path / "other").mkdir()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    moves = []

    def failing(source, target):
        moves.append(target)
        if len(moves) == 2:
            raise OSError("no room")
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(PositionsError, match="no room"), replacement_folder(path) as folder:
        (folder / "a").write_text("second")
    assert len(moves) == 3
    assert (path / "a").read_text() == "first"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["model", "other"]
