"""HookedPositionTransformer: hook points, the calls of TransformerLens, saving and loading, refusals."""

import copy
import errno
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import lens_positions as lp

SOURCES = ("static", "shared", "per_layer", "frozen")
EVERY_SOURCE = list(itertools.product(SOURCES, (False, True), ("before", "after")))
TOKENS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(6))
BATCH, POS, WIDTH, HEADS, D_HEAD, D_MLP, VOCAB = 2, 9, 32, 4, 8, 48, 257

# HookedTransformer with RMSNorm, gated MLP and rotary positions: every hook name, and the shape of its activation.
ROOT_HOOKS = {
    "hook_embed": (BATCH, POS, WIDTH),
    "ln_final.hook_scale": (BATCH, POS, 1),
    "ln_final.hook_normalized": (BATCH, POS, WIDTH),
}
BLOCK_HOOKS = {
    "hook_resid_pre": (BATCH, POS, WIDTH),
    "hook_resid_mid": (BATCH, POS, WIDTH),
    "hook_resid_post": (BATCH, POS, WIDTH),
    "hook_attn_out": (BATCH, POS, WIDTH),
    "hook_mlp_out": (BATCH, POS, WIDTH),
    "ln1.hook_scale": (BATCH, POS, 1),
    "ln1.hook_normalized": (BATCH, POS, WIDTH),
    "ln2.hook_scale": (BATCH, POS, 1),
    "ln2.hook_normalized": (BATCH, POS, WIDTH),
    "attn.hook_q": (BATCH, POS, HEADS, D_HEAD),
    "attn.hook_k": (BATCH, POS, HEADS, D_HEAD),
    "attn.hook_v": (BATCH, POS, HEADS, D_HEAD),
    "attn.hook_z": (BATCH, POS, HEADS, D_HEAD),
    "attn.hook_rot_q": (BATCH, POS, HEADS, D_HEAD),
    "attn.hook_rot_k": (BATCH, POS, HEADS, D_HEAD),
    "attn.hook_attn_scores": (BATCH, HEADS, POS, POS),
    "attn.hook_pattern": (BATCH, HEADS, POS, POS),
    "mlp.hook_pre": (BATCH, POS, D_MLP),
    "mlp.hook_pre_linear": (BATCH, POS, D_MLP),
    "mlp.hook_post": (BATCH, POS, D_MLP),
}
OPTIONAL_HOOKS = {
    "attn.hook_result": ("set_use_attn_result", (BATCH, POS, HEADS, WIDTH)),
    "hook_attn_in": ("set_use_attn_in", (BATCH, POS, HEADS, WIDTH)),
    "hook_q_input": ("set_use_split_qkv_input", (BATCH, POS, HEADS, WIDTH)),
    "hook_k_input": ("set_use_split_qkv_input", (BATCH, POS, HEADS, WIDTH)),
    "hook_v_input": ("set_use_split_qkv_input", (BATCH, POS, HEADS, WIDTH)),
    "hook_mlp_in": ("set_use_hook_mlp_in", (BATCH, POS, WIDTH)),
}
CLASSIC = {**ROOT_HOOKS, **{f"blocks.{i}.{name}": shape for i in range(2) for name, shape in BLOCK_HOOKS.items()}}


def own_hooks(model):
    names = [f"blocks.{i}.attn.{hook}" for i in range(2) for hook in ("hook_increments", "hook_positions")]
    return names + (["hook_increments"] if model.position_config.source in ("shared", "frozen") else [])


# --- hook points


@pytest.mark.parametrize(("source", "per_head"), itertools.product(SOURCES, (False, True)))
def test_increments_and_positions_are_hook_points(tiny_model, source, per_head):
    model = tiny_model(source=source, per_head=per_head)
    shape = (BATCH, POS, HEADS) if per_head else (BATCH, POS)
    _, cache = model.run_with_cache(TOKENS)
    for name in own_hooks(model):
        assert name in model.hook_dict
        assert model.hook_dict[name].name == name
        assert cache[name].shape == shape
        assert cache[name].dtype == torch.float32
    assert ("hook_increments" in model.hook_dict) == (source in ("shared", "frozen"))
    assert torch.equal(cache["increments", 0, "attn"], cache["blocks.0.attn.hook_increments"])
    assert torch.equal(cache["positions", 1, "attn"], cache["blocks.1.attn.hook_positions"])
    assert torch.equal(model.increments(TOKENS)[1], cache["increments", 1, "attn"])
    assert torch.equal(model.positions(TOKENS)[1], cache["positions", 1, "attn"])


@pytest.mark.parametrize("source", SOURCES)
def test_every_classic_hook_fires_with_its_classic_shape(tiny_model, source):
    model = tiny_model(source=source)
    shapes = {}
    hooks = [(name, lambda a, hook, name=name: shapes.__setitem__(name, tuple(a.shape))) for name in CLASSIC]
    model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert shapes == CLASSIC
    _, cache = model.run_with_cache(TOKENS)
    assert {name: tuple(cache[name].shape) for name in CLASSIC} == CLASSIC


@pytest.mark.slow
def test_editing_a_classic_hook_reaches_the_logits(tiny_model):
    model = tiny_model(source="per_layer")
    plain = model(TOKENS)
    for name in CLASSIC:
        edited = model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda a, hook: a * 0.5)])
        assert not torch.equal(edited, plain), name


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONAL_HOOKS)
def test_optional_classic_hooks_fire_when_enabled(tiny_model, name):
    switch, shape = OPTIONAL_HOOKS[name]
    model = tiny_model(source="per_layer")
    plain = model(TOKENS)
    getattr(model, switch)(True)
    logits, cache = model.run_with_cache(TOKENS)
    assert tuple(cache[f"blocks.1.{name}"].shape) == shape
    assert (logits - plain).abs().max() < 1e-4


@pytest.mark.parametrize("switch", sorted({switch for switch, _ in OPTIONAL_HOOKS.values()}))
def test_per_head_increments_are_never_dropped(tiny_model, switch):
    """TransformerLens goes around the projections where it splits their input, and rotates as ever."""
    model = tiny_model(source="per_layer", per_head=True)
    plain = model(TOKENS)
    getattr(model, switch)(True)
    assert (model(TOKENS) - plain).abs().max() < 1e-4


def test_residual_stream_adds_up(tiny_model):
    _, cache = tiny_model(source="per_layer").run_with_cache(TOKENS)
    for layer in range(2):
        mid = cache["resid_pre", layer] + cache["attn_out", layer]
        assert torch.allclose(cache["resid_mid", layer], mid, atol=1e-5)
        assert torch.allclose(cache["resid_post", layer], mid + cache["mlp_out", layer], atol=1e-5)
    assert torch.allclose(cache["pattern", 0].sum(-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("per_head", [False, True])
def test_rotated_keys_are_the_keys_turned_by_the_positions(tiny_model, per_head):
    model = tiny_model(source="per_layer", per_head=per_head)
    _, cache = model.run_with_cache(TOKENS)
    for which, layer in itertools.product("qk", range(2)):
        if per_head:  # hook_q and hook_k stay what the projection gives
            weight = getattr(model.original_model.model.layers[layer].self_attn, f"{which}_proj").weight
            x = cache[f"blocks.{layer}.attn.hook_in"] @ weight.T
            assert torch.allclose(cache[which, layer].flatten(2), x, atol=1e-5)
        positions = cache["positions", layer, "attn"]
        angles = (positions if per_head else positions[..., None])[..., None] * 10_000.0 ** (-torch.arange(4) / 4)
        a, b = cache[which, layer].chunk(2, -1)
        turned = torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)
        assert torch.allclose(cache[f"rot_{which}", layer], turned, atol=1e-4)


def test_names_filter(tiny_model):
    model = tiny_model(source="shared")
    for names in ("hook_increments", ["blocks.1.attn.hook_positions"], lambda name: name.endswith("hook_increments")):
        _, cache = model.run_with_cache(TOKENS, names_filter=names)
        matches = (
            names if callable(names) else lambda name, names=names: name in names if names[0] != "h" else name == names
        )
        assert set(cache) == {name for name in own_hooks(model) if matches(name)}
    _, cache = model.run_with_cache(TOKENS, names_filter=own_hooks(model), remove_batch_dim=False)
    assert set(cache) == set(own_hooks(model))
    _, cache = model.run_with_cache(TOKENS[:1], names_filter=own_hooks(model), remove_batch_dim=True)
    assert cache["hook_increments"].shape == (POS,)


@pytest.mark.parametrize(("source", "per_head"), itertools.product(SOURCES, (False, True)))
def test_hooks_come_and_go(tiny_model, source, per_head):
    model = tiny_model(source=source, per_head=per_head)
    plain = model(TOKENS)
    edit = [("blocks.0.attn.hook_increments", lambda d, hook: 2 * d)]
    edited = model.run_with_hooks(TOKENS, fwd_hooks=edit)
    assert not torch.equal(edited, plain)
    assert torch.equal(model(TOKENS), plain)
    with model.hooks(fwd_hooks=edit):
        assert torch.equal(model(TOKENS), edited)
    assert torch.equal(model(TOKENS), plain)
    model.add_hook(*edit[0])
    assert torch.equal(model(TOKENS), edited)
    model.reset_hooks()
    assert torch.equal(model(TOKENS), plain)
    model.add_hook(lambda name: name.endswith("hook_increments"), lambda d, hook: d)
    assert (model(TOKENS) - plain).abs().max() < 1e-5
    model.reset_hooks()
    assert not any(hook.has_hooks() for hook in model.hook_dict.values())


@pytest.mark.parametrize("source", ["shared", "frozen"])
def test_editing_the_root_increments_reaches_every_layer(tiny_model, source):
    model = tiny_model(source=source)

    def stretch(d, hook):
        return d + 0.5

    with model.hooks(fwd_hooks=[("hook_increments", stretch)]):
        root, cache = model.run_with_cache(TOKENS)
    layers = model.run_with_hooks(TOKENS, fwd_hooks=[(f"blocks.{i}.attn.hook_increments", stretch) for i in range(2)])
    assert torch.equal(root, layers)
    plain = model.increments(TOKENS)[0]
    assert all(torch.equal(cache["increments", i, "attn"], plain + 0.5) for i in range(2))


@pytest.mark.parametrize("source", SOURCES)
def test_editing_positions_changes_the_rotation_and_nothing_before(tiny_model, source):
    model = tiny_model(source=source)
    _, plain = model.run_with_cache(TOKENS)
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_positions", lambda p, hook: 1.7 * p)]):
        _, edited = model.run_with_cache(TOKENS)
    for name in ("hook_increments", "hook_q", "hook_k", "hook_v"):
        assert torch.equal(plain[f"blocks.0.attn.{name}"], edited[f"blocks.0.attn.{name}"])
    for name in ("hook_rot_q", "hook_rot_k", "hook_pattern"):
        assert not torch.equal(plain[f"blocks.0.attn.{name}"], edited[f"blocks.0.attn.{name}"])
    if source != "per_layer":  # there the next layer reads another residual stream
        assert torch.equal(plain["positions", 1, "attn"], edited["positions", 1, "attn"])


# --- gradients


@pytest.mark.parametrize(("source", "per_head"), itertools.product(SOURCES, (False, True)))
def test_backward_hooks_give_the_gradients(tiny_model, source, per_head):
    model = tiny_model(source=source, per_head=per_head)
    gradients = {}

    def keep(gradient, hook):
        gradients[hook.name] = gradient.clone()

    names = own_hooks(model)
    with model.hooks(bwd_hooks=[(name, keep) for name in names]):
        model(TOKENS, return_type="loss").backward()
    assert set(gradients) == set(names)
    assert all(g.shape[:2] == (BATCH, POS) and g.abs().max() > 0 for g in gradients.values())

    direction, step = torch.randn(gradients[names[0]].shape), 1e-2
    for name in (names[0], names[3]):
        losses = []
        for sign in (1, -1):
            edit = [(name, lambda a, hook, sign=sign: a + sign * step * direction)]
            losses.append(model.run_with_hooks(TOKENS, return_type="loss", fwd_hooks=edit).item())
        expected = (losses[0] - losses[1]) / (2 * step)
        assert (gradients[name] * direction).sum().item() == pytest.approx(expected, rel=0.05, abs=2e-3)
    model.zero_grad()
    _, cache = model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    for name in names:
        assert torch.allclose(cache[f"{name}_grad"], gradients[name], atol=1e-6)


def test_backward_hooks_leave_the_logits_alone(tiny_model):
    for source in SOURCES:
        model = tiny_model(source=source)
        plain = model(TOKENS)
        with model.hooks(bwd_hooks=[(name, lambda g, hook: None) for name in own_hooks(model)]):
            assert torch.equal(model(TOKENS), plain)


def test_gradients_flow_to_an_inserted_leaf(tiny_model):
    model = tiny_model(source="static")
    leaf = torch.ones(BATCH, POS, requires_grad=True)
    hooks = [("blocks.1.attn.hook_increments", lambda d, hook: leaf)]
    model.run_with_hooks(TOKENS, return_type="loss", fwd_hooks=hooks).backward()
    assert leaf.grad[:, 0].abs().max() == 0
    assert leaf.grad[:, 1:-1].abs().min() > 0  # the last one moves only the last logits, which have no loss


# --- parts of the forward pass


@pytest.mark.parametrize("source", SOURCES)
def test_stop_at_layer(tiny_model, source):
    model = tiny_model(source=source)
    plain, cache = model.run_with_cache(TOKENS)
    for layer in (0, 1, -1):
        assert torch.equal(model(TOKENS, stop_at_layer=layer), cache["resid_pre", layer % 2])
    _, part = model.run_with_cache(TOKENS, stop_at_layer=1)
    assert "blocks.0.attn.hook_increments" in part
    assert "blocks.1.attn.hook_increments" not in part
    assert torch.equal(model(TOKENS), plain)


@pytest.mark.parametrize("source", ["static", "per_layer"])
def test_start_at_layer(tiny_model, source):
    model = tiny_model(source=source)
    plain, cache = model.run_with_cache(TOKENS)
    for layer in range(2):
        assert torch.equal(model(cache["resid_pre", layer], start_at_layer=layer), plain)


@pytest.mark.parametrize(("source", "words"), [("shared", "start_at_layer"), ("frozen", "token ids")])
def test_start_at_layer_is_refused_where_the_source_reads_tokens(tiny_model, source, words):
    model = tiny_model(source=source)
    plain, cache = model.run_with_cache(TOKENS)
    with pytest.raises(lp.PositionsError, match=words):
        model(cache["resid_pre", 1], start_at_layer=1)
    assert torch.equal(model(TOKENS), plain)


# --- the calls of TransformerLens


def test_classic_calls(tiny_model):
    model = tiny_model(source="per_layer")
    text = "The distance, 距离."
    tokens = model.to_tokens(text)
    assert tokens.tolist() == [[256, *text.encode()]]
    labels = model.to_str_tokens(text)
    assert len(labels) == tokens.shape[1]
    assert labels[1:4] == ["T", "h", "e"]
    logits, cache = model.run_with_cache(text)
    assert torch.equal(logits, model(tokens))
    assert cache["pattern", 0].shape[-1] == tokens.shape[1]
    assert cache["increments", 0, "attn"].shape == tokens.shape
    loss = model(text, return_type="loss")
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    both = model(text, return_type="both")
    assert torch.equal(both[0], logits)
    assert model(text, return_type="loss", loss_per_token=True).shape == (1, tokens.shape[1] - 1)
    assert model(text, return_type=None) is None
    assert isinstance(model.generate("The", max_new_tokens=4, verbose=False), str)
    assert (model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_model, model.cfg.n_ctx) == (2, HEADS, WIDTH, 64)
    assert model.W_Q.shape == (2, HEADS, WIDTH, D_HEAD)
    assert model.W_U.shape == (WIDTH, VOCAB)


@pytest.mark.parametrize("source", SOURCES)
def test_compatibility_mode_keeps_hook_points_and_increments(tiny_model, source):
    model = tiny_model(source=source)
    plain, increments = model(TOKENS).log_softmax(-1), model.increments(TOKENS)
    model.enable_compatibility_mode(disable_warnings=True)
    logits, cache = model.run_with_cache(TOKENS)
    assert (logits.log_softmax(-1) - plain).abs().max() < 1e-4
    for name in (*own_hooks(model), *CLASSIC):
        assert name in cache, name
    assert torch.allclose(model.increments(TOKENS), increments, atol=1e-5)
    edited = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.attn.hook_increments", lambda d, hook: 2 * d)])
    assert not torch.equal(edited, logits)


@pytest.mark.slow
def test_static_streams_are_exact_in_compatibility_mode(tiny_model):
    with_streams, without = tiny_model(source="static"), tiny_model(source="static")
    without.position_streams.detach()
    for model in (with_streams, without):
        model.enable_compatibility_mode(disable_warnings=True)
    assert torch.equal(with_streams(TOKENS), without(TOKENS))
    assert torch.equal(with_streams.run_with_cache(TOKENS)[0], without(TOKENS))


def test_copies_and_dtypes(tiny_model):
    model = tiny_model(source="per_layer")
    plain = model(TOKENS)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(TOKENS), plain)
    twin.to(torch.bfloat16, print_details=False)
    assert twin(TOKENS).dtype == torch.bfloat16
    assert twin.positions(TOKENS).dtype == torch.float32
    assert next(twin.position_streams.parameters()).dtype == torch.float32
    twin = copy.deepcopy(model).to(torch.float64, print_details=False)
    assert twin.positions(TOKENS).dtype == torch.float64
    assert (twin(TOKENS) - plain).abs().max() < 1e-4
    assert torch.equal(model(TOKENS), plain)


@pytest.mark.slow
def test_sources_differ_and_bases_do_not(tiny_config):
    models = [lp.HookedPositionTransformer.from_config(tiny_config(source=s, per_head=h)) for s, h, _ in EVERY_SOURCE]
    logits = [model(TOKENS) for model in models]
    assert all((other - logits[0]).abs().max() <= 1e-6 for other in logits)
    other = lp.HookedPositionTransformer.from_config(tiny_config(), seed=1)
    assert not torch.equal(other(TOKENS), logits[0])


def test_attaching_to_a_transformers_model_keeps_its_streams(tiny_llama, randomize):
    model = tiny_llama()
    lp.attach_positions(model, lp.PositionConfig(source="per_layer", per_head=True, gap="after"))
    expected = randomize(model)(TOKENS % 61).logits
    hooked = lp.HookedPositionTransformer.from_transformers(model)
    assert hooked.position_config == lp.PositionConfig(source="per_layer", per_head=True, gap="after")
    assert torch.equal(hooked(TOKENS % 61), expected)


# --- increments() and positions()


def test_increments_of_text_and_of_tokens(tiny_model):
    model = tiny_model(source="per_layer", per_head=True)
    tokens = model.to_tokens("abc")
    assert torch.equal(model.increments("abc"), model.increments(tokens))
    assert torch.equal(model.increments(tokens[0]), model.increments(tokens))
    assert model.increments(["abc", "xyz"]).shape == (2, 2, 4, 4)
    assert model.positions("abc").shape == (2, 1, 4, 4)
    assert not model.increments("abc").requires_grad
    assert model.increments("a" * 63).shape[2] == 64


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "empty"),
        ([], "no texts were given"),
        (["abc", ""], "empty"),
        ("a" * 64, "65 tokens.*64"),
        (["abc", "ab"], "different lengths"),
        (torch.ones(1, 4), "float32"),
        (torch.ones(1, 4, dtype=torch.bool), "bool"),
        (torch.ones(1, 0, dtype=torch.long), r"\(1, 0\)"),
        (torch.ones(0, 4, dtype=torch.long), r"\(0, 4\)"),
        (torch.ones(2, 3, 4, dtype=torch.long), r"\(2, 3, 4\)"),
        (torch.ones(1, 65, dtype=torch.long), "65 tokens.*64"),
        (torch.tensor([[0, 257]]), "257.*256"),
        (torch.tensor([[-1, 5]]), "-1.*256"),
    ],
    ids=lambda value: str(value)[:12] if isinstance(value, str) else type(value).__name__,
)
def test_what_increments_and_positions_refuse(tiny_model, given, words):
    model = tiny_model(source="frozen")
    for values in (model.increments, model.positions):
        with pytest.raises(lp.PositionsError, match=words):
            values(given)


def test_text_without_a_tokenizer_is_refused(tiny_llama):
    model = lp.HookedPositionTransformer.from_transformers(tiny_llama())
    assert model.increments(TOKENS % 61).shape == (2, BATCH, POS)
    with pytest.raises(lp.PositionsError, match="no tokenizer"):
        model.increments("abc")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "wrong",
    [
        {"d_model": 30},
        {"d_model": 0},
        {"d_model": 32.0},
        {"n_heads": 3},
        {"n_heads": 0},
        {"n_layers": 0},
        {"n_layers": "two"},
        {"n_ctx": -1},
        {"d_mlp": 0},
        {"d_mlp": -8},
        {"rope_fraction": 1.5},
        {"rope_fraction": float("nan")},
        {"rope_theta": 0},
        {"rope_theta": float("nan")},
    ],
)
def test_model_config_refuses(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(lp.PositionsError, match=name) as refusal:
        lp.PositionModelConfig(**{"d_model": 32, "n_heads": 4, **wrong})
    assert str(value) in str(refusal.value)


# --- saving and loading


@pytest.mark.parametrize(("source", "per_head", "gap"), EVERY_SOURCE)
def test_saved_model_gives_the_same_logits_to_the_bit(tiny_model, tmp_path, source, per_head, gap):
    model = tiny_model(source=source, per_head=per_head, gap=gap, activation="softplus", hidden=5, max_increment=4.5)
    model.save_pretrained(tmp_path / "model")
    loaded = lp.HookedPositionTransformer.from_pretrained(tmp_path / "model")
    assert loaded.position_config == model.position_config
    assert (loaded(TOKENS) - model(TOKENS)).abs().max() == 0.0
    assert torch.equal(loaded.increments("Words, 中文."), model.increments("Words, 中文."))
    assert loaded.to_str_tokens("é") == model.to_str_tokens("é")
    loaded.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "positions.safetensors", "positions.json", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_saved_folder_is_a_plain_transformers_folder(tiny_model, tmp_path):
    model = tiny_model(source="static")
    model.save_pretrained(tmp_path / "model")
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert type(plain) is LlamaForCausalLM
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    plain.set_attn_implementation("eager")
    assert torch.equal(plain(TOKENS).logits, model(TOKENS))
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("é")["input_ids"] == [256, 195, 169]
    assert not list((tmp_path / "model").glob("*.bin"))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_saving_from_outside_a_bridge_is_the_same(tiny_config, randomize, tmp_path):
    from lens_positions.checkpoint import load_pretrained, save_pretrained
    from lens_positions.model import build_model

    model = randomize(build_model(tiny_config(source="shared"), seed=3))
    save_pretrained(model, None, tmp_path / "model")
    loaded = lp.HookedPositionTransformer
    with pytest.raises(lp.PositionsError):
        loaded.from_pretrained(tmp_path / "nothing")
    save_pretrained(model, lp.HookedPositionTransformer.from_config(tiny_config()).tokenizer, tmp_path / "model")
    again, _ = load_pretrained(tmp_path / "model")
    assert torch.equal(again.eval()(TOKENS).logits, model(TOKENS).logits)


def test_bfloat16_survives_saving(tiny_model, tmp_path):
    tiny_model(source="per_layer").save_pretrained(tmp_path / "float32")
    load = lp.HookedPositionTransformer.from_pretrained
    model = load(tmp_path / "float32", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model", dtype=torch.bfloat16)
    assert loaded(TOKENS).dtype == torch.bfloat16
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert torch.equal(loaded.increments(TOKENS), model.increments(TOKENS))


@pytest.mark.slow
def test_plain_folder_takes_a_source(tiny_llama, tmp_path):
    tiny_llama(vocab_size=257).save_pretrained(tmp_path / "plain")
    lp.HookedPositionTransformer.from_config(lp.PositionModelConfig()).tokenizer.save_pretrained(tmp_path / "plain")
    config = lp.PositionConfig(source="per_layer")
    static, learned = (
        lp.HookedPositionTransformer.from_pretrained(tmp_path / "plain", positions=positions)
        for positions in (None, config)
    )
    assert learned.position_config == config
    assert torch.equal(static(TOKENS), learned(TOKENS))


def test_folded_weights_are_not_saved(tiny_model, tmp_path):
    model = tiny_model(source="per_layer")
    model.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(lp.PositionsError, match="enable_compatibility_mode"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def saved(tiny_model, tmp_path):
    tiny_model(source="per_layer").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def described(path, **changes):
    saved = json.loads(path.read_text())
    path.write_text(
        json.dumps({**saved, **changes, "positions": {**saved["positions"], **changes.get("positions", {})}})
    )


NORM, OUT = "model.norm.weight", "layers.0.source.out.weight"
DAMAGES = {
    "truncated model": (lambda f: truncate(f / "model.safetensors"), "cannot be loaded"),
    "truncated positions": (lambda f: truncate(f / "positions.safetensors"), "truncated or damaged"),
    "empty model": (lambda f: (f / "model.safetensors").write_bytes(b""), "cannot be loaded"),
    "empty positions": (lambda f: (f / "positions.safetensors").write_bytes(b""), "truncated or damaged"),
    "no model": (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),
    "no positions": (lambda f: (f / "positions.safetensors").unlink(), "no positions.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "model lacks a tensor": (lambda f: rewrite(f / "model.safetensors", lambda t: t.pop(NORM)), "no tensor model.norm"),
    "positions lack a tensor": (lambda f: rewrite(f / "positions.safetensors", lambda t: t.pop(OUT)), "does not fit"),
    "model has one more": (
        lambda f: rewrite(f / "model.safetensors", lambda t: t.update(extra=torch.ones(1))),
        "unknown tensor extra",
    ),
    "positions have one more": (
        lambda f: rewrite(f / "positions.safetensors", lambda t: t.update(extra=torch.ones(1))),
        "does not fit",
    ),
    "misshapen model": (
        lambda f: rewrite(f / "model.safetensors", lambda t: t.update({NORM: torch.ones(5)})),
        "misshapen tensor model.norm|cannot be loaded",
    ),
    "misshapen positions": (
        lambda f: rewrite(f / "positions.safetensors", lambda t: t.update({OUT: torch.ones(5)})),
        "does not fit",
    ),
    "newer version": (lambda f: described(f / "positions.json", format=2), "newer lens-positions"),
    "unknown field": (lambda f: described(f / "positions.json", positions={"curve": 1}), "unknown field 'curve'"),
    "wrong value": (lambda f: described(f / "positions.json", positions={"gap": "none"}), "gap is 'none'"),
    "no JSON": (lambda f: (f / "positions.json").write_text('{"format": 1, '), "damaged"),
    "other JSON": (lambda f: (f / "positions.json").write_text("[1, 2]"), "damaged"),
    "binary JSON": (lambda f: (f / "positions.json").write_bytes(b"\xff\xfe\x00"), "damaged"),
    "no format": (lambda f: (f / "positions.json").write_text('{"positions": {}}'), "damaged"),
    "no fields": (lambda f: (f / "positions.json").write_text('{"format": 1, "positions": 3}'), "damaged"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be loaded"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder_is_refused_in_one_sentence(saved, damage):
    harm, words = DAMAGES[damage]
    harm(saved)
    with pytest.raises(lp.PositionsError, match=words) as refusal:
        lp.HookedPositionTransformer.from_pretrained(saved)
    assert "\n" not in str(refusal.value)


def test_saved_nan_in_a_frozen_table_is_refused(tiny_model, tmp_path):
    tiny_model(source="frozen").save_pretrained(tmp_path / "model")
    rewrite(tmp_path / "model" / "positions.safetensors", lambda t: t["shared_source.table"].fill_(float("nan")))
    with pytest.raises(lp.PositionsError, match="NaN"):
        lp.HookedPositionTransformer.from_pretrained(tmp_path / "model")


def test_missing_folder_and_second_source_are_refused(saved, tmp_path):
    for missing in (tmp_path / "nothing", str(tmp_path / "a" / "b"), saved / "model.safetensors"):
        with pytest.raises(lp.PositionsError, match="no model folder"):
            lp.HookedPositionTransformer.from_pretrained(missing)
    with pytest.raises(lp.PositionsError, match="streams of its own"):
        lp.HookedPositionTransformer.from_pretrained(saved, positions=lp.PositionConfig(source="shared"))


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("file", ["model.safetensors", "positions.safetensors", "positions.json", "tokenizer"])
def test_full_disk_leaves_the_old_folder_whole(tiny_model, saved, monkeypatch, file):
    before, beside = contents(saved), list(saved.parent.iterdir())
    model = tiny_model(source="shared")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if file == "model.safetensors":
        monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    elif file == "positions.safetensors":
        monkeypatch.setattr("lens_positions.checkpoint.save_file", full)
    elif file == "tokenizer":
        monkeypatch.setattr(type(model.tokenizer), "save_pretrained", full)
    else:
        monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(lp.PositionsError, match="No space left on device"):
        model.save_pretrained(saved)
    assert contents(saved) == before
    assert list(saved.parent.iterdir()) == beside


def test_what_is_in_the_way_stays(tiny_model, tmp_path):
    model = tiny_model(source="static")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(lp.PositionsError, match="is a file"):
        model.save_pretrained(tmp_path / "notes.txt")
    with pytest.raises(lp.PositionsError, match="cannot be written"):
        model.save_pretrained(tmp_path / "notes.txt" / "model")
    with pytest.raises(lp.PositionsError, match="other files"):
        model.save_pretrained(tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    model.save_pretrained(tmp_path / "empty")
    assert torch.equal(lp.HookedPositionTransformer.from_pretrained(tmp_path / "empty")(TOKENS), model(TOKENS))


def test_layers_go_by_their_number_in_the_model():
    """In a model of which only some layers rotate, values are those of the others, and say of which."""
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    from lens_positions.analysis.token_kinds import increments_by_category
    from lens_positions.tokenizer import byte_tokenizer
    from lens_positions.viz.text_positions import layers_to_show

    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    ids = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    config = SmolLM3Config(**sizes, **ids, num_attention_heads=4, num_key_value_heads=2, no_rope_layers=[1, 0, 1])
    positions = lp.PositionConfig(source="per_layer")
    model = lp.HookedPositionTransformer.from_transformers(SmolLM3ForCausalLM(config), byte_tokenizer(), positions)
    assert model.position_layers == [0, 2]
    assert "blocks.2.attn.hook_increments" in model.hook_dict
    assert "blocks.1.attn.hook_increments" not in model.hook_dict
    increments = model.increments("The cat.")
    assert increments.shape == (2, 1, 8)
    assert set(increments_by_category(model, ["The cat.", "A dog."])["layer"]) == {0, 2}
    assert layers_to_show(model, [2], increments) == {1: "layer 2"}
    with pytest.raises(lp.PositionsError, match="layer 1 was asked for; expected one of the layers 0, 2"):
        layers_to_show(model, [1], increments)
