"""Situations that people reported: adapters in every form, what a refusal leaves, models that live in several places.

As `test_cases.py`: the right value, or a refusal in one sentence that changes nothing; the reports are in
docs/cases.md.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from cases import (
    LEFT,
    ROWS,
    SOURCES,
    assert_clear,
    assert_right,
    away,
    built,
    drawn,
    every_source,
    generated,
    learned,
    refused,
    right_or_refused,
    state_of,
    streamed,
    with_streams,
)
from safetensors.torch import load_file, save_file
from torch import nn

import lens_positions as lp


@pytest.fixture(autouse=True)
def _as_people_run_it(unchecked: None) -> Iterator[None]:
    """Without shape checks and gradients."""
    with torch.no_grad():
        yield


# Adapters

LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}


def lora(**settings: Any) -> peft.LoraConfig:
    torch.manual_seed(3)
    return peft.LoraConfig(**LORA | settings)


def adapted(model: Any, way: str, **settings: Any) -> Any:
    """The model with LoRA, in one of the forms that peft has."""
    torch.manual_seed(3)
    if way == "get_peft_model":
        return peft.get_peft_model(model, lora(**settings)).eval()
    if way == "inject_adapter_in_model":
        return peft.inject_adapter_in_model(lora(**settings), model).eval()
    model.add_adapter(lora(**settings))
    return model.eval()


WAYS = ("get_peft_model", "add_adapter", "inject_adapter_in_model")


@pytest.mark.parametrize("way", WAYS)
@every_source
def test_a_saved_adapter_gives_its_logits_whatever_form_it_had(tmp_path, source, way):
    """TransformerLens #730, peft #2508."""
    built().save_pretrained(tmp_path / "base")
    model = adapted(streamed(source), way)
    expected = model(ROWS).logits
    assert away(expected, streamed(source)(ROWS).logits) > 1e-3
    with right_or_refused():
        try:
            lp.save_adapter(model, tmp_path / "adapter", base=tmp_path / "base")
        except lp.PositionsError:
            assert not (tmp_path / "adapter").exists()
            raise

        fresh = built()
        lp.load_adapter(fresh, tmp_path / "adapter")
        assert_right(fresh(ROWS).logits, expected, 1e-5)


@pytest.mark.parametrize("order", ["attached first", "adapted first"])
@pytest.mark.parametrize("way", WAYS)
@every_source
def test_the_order_of_attaching_and_adapting_does_not_matter(source, way, order):
    with right_or_refused():
        if order == "attached first":
            model = adapted(streamed(source), way)
        else:
            model = with_streams(adapted(built(), way), source)
        merged = with_streams(adapted(built(), "get_peft_model").merge_and_unload(), source)
        assert_right(model(ROWS).logits, merged(ROWS).logits)


@pytest.mark.parametrize(
    ("target", "tied"), [("embed_tokens", False), ("q_proj", True), ("down_proj", False), ("lm_head", False)]
)
@every_source
def test_merging_an_adapter_changes_nothing(source, target, tied):
    """peft #1035, #2018: also where the source reads what is adapted (tied embeddings peft merges together)."""
    with right_or_refused():
        model = adapted(streamed(source, tie_word_embeddings=tied), "get_peft_model", target_modules=[target])
        expected = model(ROWS).logits
        texts = [generated(model, ROWS, max_new_tokens=3, use_cache=cached) for cached in (True, False)]
        assert torch.equal(*texts)
        model.merge_adapter()
        assert_right(model(ROWS).logits, expected)
        model.unmerge_adapter()
        assert_right(model(ROWS).logits, expected)
        merged = model.merge_and_unload()
        assert_right(merged(ROWS).logits, expected)
        reference = with_streams(plain_from(merged), source)
        assert_right(reference(ROWS).logits, expected)


def plain_from(model: Any) -> Any:
    """An untouched model with the weights of one that has streams."""
    plain = built(tie_word_embeddings=model.config.tie_word_embeddings)
    state = {name: w for name, w in model.state_dict().items() if not name.startswith("position_streams.")}
    plain.load_state_dict(state)
    return plain


@every_source
def test_adapters_are_switched_and_turned_off(source):
    """peft #804."""
    model = peft.get_peft_model(streamed(source), lora(), adapter_name="first").eval()
    torch.manual_seed(4)
    model.add_adapter("second", peft.LoraConfig(**LORA | {"target_modules": ["embed_tokens", "k_proj"]}))
    model.eval()
    logits = {}
    with right_or_refused():
        for name in ("first", "second", "first"):
            model.set_adapter(name)
            found = model(ROWS).logits
            assert torch.equal(logits.setdefault(name, found), found)
            alone_merged = copy.deepcopy(model).merge_and_unload(adapter_names=[name])
            assert_right(with_streams(plain_from(alone_merged), source)(ROWS).logits, found)
        with model.disable_adapter():
            assert_right(model(ROWS).logits, streamed(source)(ROWS).logits)


@every_source
def test_a_batch_of_different_adapters_gives_each_row_its_own(source):
    """peft #1558, #1960."""
    model = peft.get_peft_model(streamed(source), lora(), adapter_name="first").eval()
    torch.manual_seed(4)
    model.add_adapter("second", peft.LoraConfig(**LORA | {"target_modules": ["embed_tokens", "k_proj"]}))
    model.eval()
    names = ["first", "second", "__base__"]
    with right_or_refused():
        logits = model(ROWS, adapter_names=names).logits
        for row, name in enumerate(names):
            with contextlib.nullcontext() if name != "__base__" else model.disable_adapter():
                if name != "__base__":
                    model.set_adapter(name)
                assert_right(logits[row : row + 1], model(ROWS[row : row + 1]).logits)


@pytest.mark.parametrize("modules", [["position_streams"], ["shared_source"], ["embed_tokens"]])
@pytest.mark.parametrize("source", ["shared", "per_layer"])
def test_the_source_that_trains_is_the_one_that_runs(source, modules):
    """peft copies the modules that it is to save."""
    base = streamed(source)
    with right_or_refused(), torch.enable_grad():
        model = peft.get_peft_model(base, lora(modules_to_save=modules))
        before = model(ROWS).logits
        model(ROWS, labels=ROWS).loss.backward()
        weights = {n: p for n, p in model.named_parameters() if "position_streams" in n}
        trained = {n: p for n, p in weights.items() if p.requires_grad}
        assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in trained.items() if "offset" not in n)
        with torch.no_grad():
            for parameter in trained.values():
                parameter.add_(0.3)
        if trained:
            assert away(model(ROWS).logits, before) > 1e-4


@every_source
def test_a_prefix_that_peft_learns_has_positions_or_is_refused(source):
    """peft #869: the cache of prefix tuning was filled by no forward pass."""
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    plain, model = built(num_key_value_heads=4), streamed(source, num_key_value_heads=4)
    torch.manual_seed(3)
    plain = peft.get_peft_model(plain, peft.PrefixTuningConfig(**settings)).eval()
    torch.manual_seed(3)
    model = peft.get_peft_model(model, peft.PrefixTuningConfig(**settings)).eval()
    if source == "static":
        assert torch.equal(model(ROWS).logits, plain(ROWS).logits)
        assert torch.equal(model(ROWS, attention_mask=LEFT).logits, plain(ROWS, attention_mask=LEFT).logits)
    else:
        with refused():
            model(ROWS)


@every_source
def test_learned_prompt_tokens_before_padding_on_the_left(source):
    """peft #54: a mask of ones, zeros and ones."""
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    torch.manual_seed(3)
    model = peft.get_peft_model(streamed(source), peft.PromptTuningConfig(**settings)).eval()
    torch.manual_seed(3)
    plain = peft.get_peft_model(built(), peft.PromptTuningConfig(**settings)).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    if source == "frozen":
        with refused():
            model(ROWS, attention_mask=LEFT)
    elif source == "static":
        assert torch.equal(model(ROWS, attention_mask=LEFT).logits, plain(ROWS, attention_mask=LEFT).logits)
    else:
        prompt = model.get_prompt(1)
        embeddings = torch.cat([prompt, model.get_base_model().get_input_embeddings()(ROWS[1:2])], 1)
        expected = model.get_base_model()(inputs_embeds=embeddings).logits
        assert_right(model(ROWS, attention_mask=LEFT).logits[1:2], expected)
        # Tokens behind padding stand three holes further from the prompt; all distances among them stay.
        changed = ROWS.clone()
        changed[0, :4] = 7
        assert torch.equal(
            model(changed, attention_mask=LEFT).logits[0, 7:], model(ROWS, attention_mask=LEFT).logits[0, 7:]
        )


@learned
def test_peft_saves_learned_increments_with_what_it_saves(tmp_path, source):
    """peft's own save_pretrained and from_pretrained, on a base with its streams attached."""
    model = peft.get_peft_model(streamed(source), lora()).eval()
    expected = model(ROWS).logits
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(streamed(source), tmp_path).eval()
    assert torch.equal(loaded(ROWS).logits, expected)


# Refusals


def wrapped(kind: str) -> Any:
    """A model inside something."""
    model = built()
    if kind == "PeftModel":
        return peft.get_peft_model(model, lora()).eval()
    if kind == "torch.compile":
        return torch.compile(model, backend="eager")
    if kind == "DataParallel":
        return nn.DataParallel(model)
    if kind == "pipeline":
        return transformers.TextGenerationPipeline(model=model, tokenizer=lp.tokenizer.byte_tokenizer(), device="cpu")
    if kind == "list":
        return [model]
    if kind == "inner":
        return model.model
    return model


def inside(thing: Any) -> Any:
    """The module inside a wrapper that is none, or whose call is not the model's."""
    if isinstance(thing, list):
        return thing[0]
    if isinstance(thing, nn.DataParallel):
        return thing.module
    return getattr(thing, "_orig_mod", getattr(thing, "model", thing) if hasattr(thing, "preprocess") else thing)


@pytest.mark.parametrize("kind", ["PeftModel", "torch.compile", "DataParallel", "pipeline", "list", "inner"])
def test_a_wrapped_model_is_attached_to_as_a_whole_or_refused(kind):
    """TransformerLens #730."""
    thing = wrapped(kind)
    model = inside(thing)
    before, output = state_of(model), model(ROWS)[0]
    try:
        streams = lp.attach_positions(thing, lp.PositionConfig("shared"))
    except lp.PositionsError as error:
        assert_clear(error)
    else:
        assert torch.equal(model(ROWS)[0], output)
        drawn(streams, model)
        assert away(model(ROWS)[0], output) > 1e-3
        streams.detach()
    assert state_of(model) == before
    assert torch.equal(model(ROWS)[0], output)
    assert lp.attach_positions(wrapped("nothing"), "static").attached


@pytest.mark.parametrize("kind", ["PeftModel", "torch.compile", "DataParallel", "pipeline", "list", "inner"])
def test_a_wrapped_model_is_bridged_as_a_whole_or_refused(kind):
    """TransformerLens #730."""
    thing = wrapped(kind)
    model = inside(thing)
    before, output = state_of(model), model(ROWS)[0]
    try:
        bridge = lp.HookedPositionTransformer.from_transformers(thing)
    except lp.PositionsError as error:
        assert_clear(error)
        assert state_of(model) == before
        assert torch.equal(model(ROWS)[0], output)
    else:
        assert_right(bridge(ROWS), output)


def test_the_next_call_after_a_refused_peft_model_works():
    model = peft.get_peft_model(built(), lora()).eval()
    expected = model(ROWS).logits
    with right_or_refused():
        lp.HookedPositionTransformer.from_transformers(model)
        return
    merged = model.merge_and_unload()
    bridge = lp.HookedPositionTransformer.from_transformers(merged)
    assert_right(bridge(ROWS), expected)


def no_adapter_for() -> Any:
    model = built()
    model.config.architectures = ["NobodyKnowsForCausalLM"]
    return model


REFUSED: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "a table of the wrong length": (
        built,
        lambda m: lp.attach_positions(m, lp.PositionConfig("frozen"), table=torch.ones(7)),
    ),
    "a table with NaN": (
        built,
        lambda m: lp.attach_positions(m, lp.PositionConfig("frozen"), table=torch.full((61,), torch.nan)),
    ),
    "a table for a learned source": (
        built,
        lambda m: lp.attach_positions(m, lp.PositionConfig("shared"), table=torch.ones(61)),
    ),
    "heads of a table of sines": (
        lambda: transformers.GPTJForCausalLM(
            transformers.GPTJConfig(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)
        ).eval(),
        lambda m: lp.attach_positions(m, lp.PositionConfig("shared", per_head=True)),
    ),
    "positions that are no source": (built, lambda m: lp.attach_positions(m, "learned")),
    "attached twice": (lambda: with_streams(built(), "shared"), lambda m: lp.attach_positions(m)),
    "no rotary positions": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        ).eval(),
        lambda m: lp.attach_positions(m),
    ),
    "an encoder": (
        lambda: transformers.BertForMaskedLM(
            transformers.BertConfig(
                vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
            )
        ).eval(),
        lambda m: lp.attach_positions(m),
    ),
    "no adapter for the architecture": (
        no_adapter_for,
        lambda m: lp.HookedPositionTransformer.from_transformers(m, positions=lp.PositionConfig("shared")),
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_model_is_as_it_was(what):
    build, call = REFUSED[what]
    model = build().train()
    model.model.layers[0].eval() if hasattr(model, "model") else None
    before = state_of(model)
    with refused():
        call(model)
    assert state_of(model) == before
    assert not [name for name in vars(model) if "position" in name]


@pytest.mark.parametrize("damage", ["truncated", "another base", "another shape", "no source"])
def test_a_refused_adapter_leaves_the_model_as_it_was(tmp_path, damage):
    built().save_pretrained(tmp_path / "base")
    lp.save_adapter(adapted(streamed("shared"), "add_adapter"), tmp_path / "ad", base=tmp_path / "base")
    weights = tmp_path / "ad" / "positions.safetensors"
    model = built("qwen2") if damage == "another base" else built()
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-40])
    elif damage == "another shape":
        save_file({n: t[..., :-1].contiguous() for n, t in load_file(weights).items()}, weights)
    elif damage == "no source":
        save_file({"other": torch.ones(3)}, weights)
    before, logits = state_of(model), model(ROWS).logits
    with refused():
        lp.load_adapter(model, tmp_path / "ad")
    assert state_of(model) == before
    assert torch.equal(model(ROWS).logits, logits)
    lp.attach_positions(model, "static")


@every_source
def test_a_copied_model_is_its_own(source):
    """accelerate #1835: a copy whose hooks still call the original."""
    model = streamed(source)
    expected = model(ROWS).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ROWS).logits, expected)
    for parameter in twin.position_streams.parameters():
        parameter.zero_()
    for name, buffer in twin.position_streams.named_buffers():
        if name.endswith("table"):
            buffer.zero_()
    assert torch.equal(model(ROWS).logits, expected)
    if source != "static":
        assert away(twin(ROWS).logits, expected) > 1e-3
    twin.position_streams.detach()
    assert torch.equal(twin(ROWS).logits, built()(ROWS).logits)
    assert torch.equal(model(ROWS).logits, expected)
    model.position_streams.detach()
    assert state_of(model) == state_of(built()) | {"weights": state_of(model)["weights"]}


@learned
def test_a_layer_put_in_the_place_of_another_is_noticed(source):
    """Its attention has no stream: with one learned increments would be left out without a word."""
    model = streamed(source)
    expected = model(ROWS).logits
    layer = copy.deepcopy(built().model.layers[0])
    with right_or_refused():
        model.model.layers[0] = layer
        assert_right(model(ROWS).logits, expected)


@pytest.mark.slow
def test_a_model_saved_as_an_object_is_the_model(tmp_path):
    """accelerate #2613: hooks that pickle does not take."""
    for source in SOURCES:
        model = streamed(source)
        torch.save(model, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        assert torch.equal(loaded(ROWS).logits, model(ROWS).logits)
        assert torch.equal(generated(loaded, ROWS), generated(model, ROWS))


def test_replicas_of_data_parallel_run_or_are_refused():
    """transformers #8145, pytorch #40457: a replica has no parameters of its own to ask for a device."""
    model = streamed("shared")
    expected = model(ROWS).logits
    with right_or_refused():
        assert torch.equal(nn.DataParallel(model)(ROWS).logits, expected)


def test_a_distributed_wrapper_runs_or_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = streamed("shared")
        expected = model(ROWS).logits
        parallel = nn.parallel.DistributedDataParallel(model)
        assert torch.equal(parallel(ROWS).logits, expected)
        bare = nn.parallel.DistributedDataParallel(built())
        before = state_of(bare)
        with right_or_refused():
            streams = lp.attach_positions(bare, lp.PositionConfig("shared"))
            assert away(bare(ROWS).logits, built()(ROWS).logits) == 0.0
            streams.detach()
        assert state_of(bare) == before
    finally:
        torch.distributed.destroy_process_group()


# Places

SPLITS: dict[str, dict[str, str]] = {
    "layers": {
        "model.embed_tokens": "disk",
        "model.layers.0": "disk",
        "model.layers.1": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    },
    "all on disk": {"": "disk"},
    "embeddings": {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    | {"lm_head": "cpu"},
    "all but the embeddings": {
        "model.embed_tokens": "cpu",
        "model.layers": "disk",
        "model.norm": "disk",
        "model.rotary_emb": "disk",
        "lm_head": "disk",
    },
    "projections": {
        "model.embed_tokens": "cpu",
        "model.norm": "disk",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
        "model.layers.1": "disk",
        "model.layers.0.mlp": "cpu",
        "model.layers.0.input_layernorm": "disk",
        "model.layers.0.post_attention_layernorm": "cpu",
        "model.layers.0.self_attn.q_proj": "disk",
        "model.layers.0.self_attn.k_proj": "cpu",
        "model.layers.0.self_attn.v_proj": "disk",
        "model.layers.0.self_attn.o_proj": "cpu",
    },
}


BRIEF = {"max_new_tokens": 2}


@contextlib.contextmanager
def every_layer_is_seen() -> Iterator[None]:
    """No warning that the model could not be run to see which layers rotate."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*does not run on three tokens")
        yield


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    built().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(("split", "per_head"), [*((split, False) for split in SPLITS), ("layers", True)])
@every_source
def test_a_model_on_disk_in_part_gives_what_it_gives_in_one_place(saved, source, per_head, split):
    """TransformerLens #1280, #872, #1615; accelerate #3866, #797; transformers #45482, #47705."""
    config = lp.PositionConfig(source, per_head=per_head)
    whole, places = built(), SPLITS[split]
    lp.attach_positions(whole, config)
    drawn(whole.position_streams, whole)
    with right_or_refused(), every_layer_is_seen():
        kind = transformers.LlamaForCausalLM
        model = kind.from_pretrained(saved, device_map=places, offload_folder=saved / "off").eval()
        before = state_of(model)
        streams = lp.attach_positions(model, config)
        assert torch.equal(model(ROWS).logits, built()(ROWS).logits) or per_head
        drawn(streams, model)
        assert torch.equal(model(ROWS, attention_mask=LEFT).logits, whole(ROWS, attention_mask=LEFT).logits)
        assert torch.equal(generated(model, ROWS, **BRIEF), generated(whole, ROWS, **BRIEF))
        streams.detach()
        assert torch.equal(model(ROWS).logits, built()(ROWS).logits)
        assert state_of(model)["hooks"] == before["hooks"]


WAYS_TO_MOVE: dict[str, Callable[[Any, Path], Any]] = {
    "cpu_offload": lambda m, _: accelerate.cpu_offload(m, execution_device="cpu"),
    "disk_offload": lambda m, path: accelerate.disk_offload(m, path, execution_device="cpu"),
    "dispatch_model by layer": lambda m, path: accelerate.dispatch_model(
        m,
        SPLITS["layers"] | ({"position_streams": "cpu"} if hasattr(m, "position_streams") else {}),
        main_device="cpu",
        offload_dir=path,
        force_hooks=True,
    ),
    "dispatch_model by projection": lambda m, path: accelerate.dispatch_model(
        m,
        SPLITS["projections"] | ({"position_streams": "disk"} if hasattr(m, "position_streams") else {}),
        main_device="cpu",
        offload_dir=path,
        force_hooks=True,
    ),
}


@pytest.mark.parametrize("order", ["attached first", "moved first"])
@pytest.mark.parametrize("way", WAYS_TO_MOVE)
@every_source
def test_what_accelerate_moves_gives_what_it_gave(tmp_path, source, way, order):
    whole = streamed(source)
    expected = whole(ROWS).logits
    with right_or_refused(), every_layer_is_seen():
        if order == "attached first":
            model = WAYS_TO_MOVE[way](streamed(source), tmp_path)
        else:
            model = WAYS_TO_MOVE[way](built(), tmp_path)
            lp.attach_positions(model, lp.PositionConfig(source)).load_state_dict(whole.position_streams.state_dict())
            if source == "frozen":
                drawn(model.position_streams, model)
        assert torch.equal(model(ROWS).logits, expected)
        assert torch.equal(generated(model, ROWS, **BRIEF), generated(whole, ROWS, **BRIEF))


@every_source
def test_a_copy_of_a_dispatched_model_is_its_own(tmp_path, source):
    """accelerate #1835."""
    model = accelerate.cpu_offload(streamed(source), execution_device="cpu")
    expected = streamed(source)(ROWS).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ROWS).logits, expected)
    assert torch.equal(model(ROWS).logits, expected)


@every_source
def test_a_bridge_of_a_model_on_disk_in_part(saved, source):
    """TransformerLens #1615."""
    settings = {"device_map": SPLITS["layers"], "offload_folder": saved / "off"}
    with right_or_refused():
        kind, config = lp.HookedPositionTransformer, lp.PositionConfig(source)
        bridge = kind.from_transformers(transformers.LlamaForCausalLM.from_pretrained(saved, **settings), None, config)
        assert_right(bridge(ROWS), built(attention="eager")(ROWS).logits)
        assert bridge.increments(ROWS).eq(1).all()


@every_source
def test_a_model_without_weights_is_refused_or_gets_a_source_when_it_gets_weights(source):
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(built().config).eval()
    before = state_of(model)
    try:
        streams = lp.attach_positions(model, lp.PositionConfig(source))
    except lp.PositionsError as error:
        assert_clear(error)
        assert state_of(model) == before
    else:
        assert all(not p.is_meta or q.is_meta for p, q in zip(streams.parameters(), model.parameters(), strict=False))


@pytest.mark.parametrize("per_head", [False, True])
@every_source
def test_dynamically_quantized_weights_are_exact_or_refused(source, per_head):
    """TransformerLens #684, #930."""
    model = torch.ao.quantization.quantize_dynamic(built(), {nn.Linear}, dtype=torch.qint8)
    expected, texts, before = model(ROWS).logits, generated(model, ROWS), state_of(model)
    try:
        streams = lp.attach_positions(model, lp.PositionConfig(source, per_head=per_head))
    except lp.PositionsError as error:
        assert_clear(error)
    else:
        assert_right(model(ROWS).logits, expected, 1e-6 if per_head else 1e-12)
        drawn(streams, model)
        if source != "static":
            assert away(model(ROWS).logits, expected) > 1e-3
        else:
            assert torch.equal(generated(model, ROWS), texts) or per_head
        streams.detach()
    assert state_of(model) == before
    assert torch.equal(model(ROWS).logits, expected)
