"""Every hook that is handed to a call is called, and a keyword that nothing hears is refused."""

import shutil
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import families
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model

import lens_positions as lp
from lens_positions.model_calls import model_keywords

TOKENS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1))
INPUTS = {
    "a text": "The distance",
    "a list of one": ["The distance"],
    "texts of different length": ["a", "Two words"],
    "tokens": TOKENS,
    "one row of tokens": TOKENS[0],
}
INCREMENTS = "blocks.0.attn.hook_increments"
GREEDY = {"max_new_tokens": 5, "do_sample": False, "verbose": False, "stop_at_eos": False, "return_type": "tokens"}
SOURCES = ("static", "shared", "per_layer", "frozen")


class Counting:
    """Doubles what it is given, and counts."""

    def __init__(self):
        self.calls = 0

    def __call__(self, values, hook):
        self.calls += 1
        return 2 * values


def active(model):
    """How many hook functions are at each hook point, in both directions."""
    return [(len(hook.fwd_hooks), len(hook.bwd_hooks)) for hook in model._hook_registry.values()]


@pytest.mark.parametrize("given", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("source", SOURCES)
def test_forward_and_run_with_cache_hear_hooks_as_the_context_does(tiny_model, source, given):
    model = tiny_model(source=source)
    plain, before = model(given), active(model)
    with model.hooks(fwd_hooks=[(INCREMENTS, Counting())]):
        expected, cache = model.run_with_cache(given)

    hook = Counting()
    assert torch.equal(model(given, fwd_hooks=[(INCREMENTS, hook)]), expected)
    assert hook.calls == 1
    logits, own = model.run_with_cache(given, fwd_hooks=[(INCREMENTS, hook)])
    assert hook.calls == 2
    assert torch.equal(logits, expected)
    assert own.keys() == cache.keys()
    assert all(torch.equal(own[name], cache[name]) for name in cache)

    assert active(model) == before
    assert not torch.equal(expected, plain)
    assert torch.equal(model(given), plain)


@pytest.mark.parametrize("given", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
def test_generation_hears_hooks_as_the_context_does(tiny_model, given, cached):
    model = tiny_model(source="per_layer")
    how = {**GREEDY, "use_past_kv_cache": cached}
    plain, before = model.generate(given, **how), active(model)
    with model.hooks(fwd_hooks=[(INCREMENTS, Counting())]):
        expected = model.generate(given, **how)
    assert not torch.equal(expected, plain)

    hook = Counting()
    assert torch.equal(model.generate(given, fwd_hooks=[(INCREMENTS, hook)], **how), expected)
    assert hook.calls == 5
    pieces = model.generate_stream(given, fwd_hooks=[(INCREMENTS, hook)], max_tokens_per_yield=1, **how)
    assert torch.equal(torch.cat(list(pieces), dim=1), expected)
    assert hook.calls == 10
    assert active(model) == before
    assert torch.equal(model.generate(given, **how), plain)


def test_generation_by_transformers_hears_hooks(tiny_model):
    model = tiny_model(source="per_layer")
    how = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "stop_at_eos": False}
    with model.hooks(fwd_hooks=[(INCREMENTS, Counting())]):
        expected = model.hf_generate(TOKENS, **how)
    hook = Counting()
    assert torch.equal(model.hf_generate(TOKENS, fwd_hooks=[(INCREMENTS, hook)], **how), expected)
    assert hook.calls == 5
    assert not torch.equal(model.hf_generate(TOKENS, **how), expected)


def test_a_stream_has_its_hooks_while_it_computes_and_not_between_pieces(tiny_model):
    model = tiny_model(source="per_layer")
    plain, before = model(TOKENS), active(model)
    pieces = model.generate_stream(TOKENS, fwd_hooks=[(INCREMENTS, Counting())], max_tokens_per_yield=1, **GREEDY)
    next(pieces)
    assert active(model) == before
    assert torch.equal(model(TOKENS), plain)
    pieces.close()
    assert torch.equal(model(TOKENS), plain)
    assert not model._capture_hf_cache


def test_the_cache_of_a_generated_text_is_that_of_its_hooks(tiny_model):
    model = tiny_model(source="per_layer")
    hooks = lp.scale(model, 2.0)
    text, cache = model.generate(TOKENS[:1], fwd_hooks=hooks, return_cache=True, **GREEDY)
    logits, expected = model.run_with_cache(text, fwd_hooks=hooks)
    assert torch.equal(cache["increments", 1, "attn"], expected["increments", 1, "attn"])
    assert torch.equal(logits[:, 8:-1].argmax(-1), text[:, 9:])


def test_hooks_add_to_those_that_are_active(tiny_model):
    model = tiny_model(source="per_layer")
    four = model.run_with_hooks(TOKENS, fwd_hooks=[(INCREMENTS, lambda values, hook: 4 * values)])
    text = model.generate(TOKENS, fwd_hooks=[(INCREMENTS, lambda values, hook: 4 * values)], **GREEDY)
    active_one, given = Counting(), Counting()
    with model.hooks(fwd_hooks=[(INCREMENTS, active_one)]):
        hooks = [(INCREMENTS, given)]
        for logits in (
            model(TOKENS, fwd_hooks=hooks),
            model.run_with_cache(TOKENS, fwd_hooks=hooks)[0],
            model.run_with_hooks(TOKENS, fwd_hooks=hooks),
        ):
            assert torch.equal(logits, four)
        assert torch.equal(model.generate(TOKENS, fwd_hooks=hooks, **GREEDY), text)
        assert given.calls == active_one.calls == 3 + 5
        model(TOKENS)
        assert (given.calls, active_one.calls) == (8, 9)


def test_hooks_are_gone_after_an_exception(tiny_model):
    model = tiny_model(source="per_layer")
    plain, before = model(TOKENS), active(model)

    def broken(values, hook):
        raise KeyboardInterrupt

    hooks = [(INCREMENTS, Counting()), ("blocks.1.attn.hook_positions", broken)]
    for call in (model.forward, model.run_with_cache, model.run_with_hooks, model.generate):
        with pytest.raises(KeyboardInterrupt):
            call(TOKENS, fwd_hooks=hooks)
        assert active(model) == before
    with pytest.raises(KeyboardInterrupt):
        list(model.generate_stream(TOKENS, fwd_hooks=hooks))
    assert active(model) == before
    assert torch.equal(model(TOKENS), plain)


@pytest.mark.parametrize("source", SOURCES)
def test_backward_hooks_are_called_with_the_gradients(tiny_model, source):
    model = tiny_model(source=source)
    names = [INCREMENTS, "blocks.1.attn.hook_positions", "blocks.1.hook_in"]
    _, cache = model.run_with_cache(TOKENS, names_filter=names, return_type="loss", incl_bwd=True)
    calls = {
        "forward": lambda hooks: model(TOKENS, return_type="loss", bwd_hooks=hooks).backward(),
        "run_with_hooks": lambda hooks: model.run_with_hooks(TOKENS, return_type="loss", bwd_hooks=hooks).backward(),
        "run_with_cache": lambda hooks: model.run_with_cache(TOKENS, return_type="loss", bwd_hooks=hooks)[0].backward(),
        "incl_bwd": lambda hooks: model.run_with_cache(
            TOKENS, names_filter=names, return_type="loss", bwd_hooks=hooks, incl_bwd=True
        ),
    }
    for call in calls.values():
        found = {}
        call(
            [(name, lambda gradient, hook, found=found: found.update({hook.name: gradient.clone()})) for name in names]
        )
        assert found.keys() == set(names)
        for name, gradient in found.items():
            assert gradient.abs().max() > 0
            torch.testing.assert_close(gradient, cache[f"{name}_grad"])
    assert not any(n for _, n in active(model))


def test_positional_arguments_mean_what_they_do_in_transformer_lens(tiny_model):
    model = tiny_model(source="per_layer")
    assert torch.equal(model(TOKENS, "loss"), model(TOKENS, return_type="loss"))
    hooks = [(INCREMENTS, Counting())]
    assert torch.equal(model(TOKENS, "loss", fwd_hooks=hooks), model.run_with_hooks(TOKENS, hooks, return_type="loss"))
    assert torch.equal(
        model.run_with_hooks(TOKENS, hooks, [], True, False, "loss"), model(TOKENS, "loss", fwd_hooks=hooks)
    )
    _, cache = model.run_with_cache(TOKENS, False, False, INCREMENTS, fwd_hooks=hooks)
    assert list(cache) == [INCREMENTS]
    assert type(cache) is dict
    assert model.generate(TOKENS, 3, verbose=False).shape == (2, 12)
    with pytest.raises(TypeError, match="each once"):
        model(TOKENS, "loss", return_type="loss")


def test_from_a_layer_on_the_hooks_before_it_are_left_out(tiny_model):
    model = tiny_model(source="per_layer")
    residual = model.run_with_cache(TOKENS)[1]["blocks.1.hook_resid_pre"]
    hooks = [(f"blocks.{layer}.attn.hook_increments", Counting()) for layer in (0, 1)]
    hooks.append((lambda name: name.endswith("attn.hook_positions"), Counting()))
    expected = model.run_with_hooks(residual, fwd_hooks=hooks, start_at_layer=1)
    assert torch.equal(model(residual, fwd_hooks=hooks, start_at_layer=1), expected)
    logits, cache = model.run_with_cache(residual, fwd_hooks=hooks, start_at_layer=-1)
    assert torch.equal(logits, expected)
    assert INCREMENTS not in cache
    assert [hook.calls for _, hook in hooks] == [0, 3, 3]


@pytest.mark.slow
def test_what_the_model_and_transformer_lens_hear_goes_through(tiny_model):
    """Each changes what it should, or is known to change nothing."""
    model = tiny_model(source="per_layer")
    plain = model(TOKENS)
    ids = 3 * torch.arange(9)[None]
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    for call in (model, model.run_with_hooks, lambda *args, **kwargs: model.run_with_cache(*args, **kwargs)[0]):
        assert torch.equal(call(TOKENS, logits_to_keep=2), plain[:, -2:])
        assert (call(TOKENS, position_ids=ids) - plain).abs().max() > 0.1
        masked = call(TOKENS, attention_mask=mask)
        assert (masked - plain)[0, 3:].abs().max() > 0.1
        assert torch.equal(call(TOKENS, one_zero_attention_mask=mask), masked)
        for same in ({"use_past_kv_cache": True}, {"use_cache": False}, {"output_hidden_states": True},
                     {"return_dict": True}, {"labels": TOKENS}):  # fmt: skip
            assert (call(TOKENS, **same) - plain).abs().max() < 1e-5
        assert call("ab", prepend_bos=False).shape[1] == call("ab").shape[1] - 1 == 2
    text = model.generate(TOKENS, **GREEDY)
    for same in ({"use_cache": False}, {"logits_to_keep": 1}, {"top_k": 5}, {"eos_token_id": 256}):
        assert torch.equal(model.generate(TOKENS, **GREEDY, **same), text)


def refusals(model):
    tokens, identity = TOKENS, lambda values, hook: values
    residual, pair = model.run_with_cache(tokens)[1]["blocks.1.hook_resid_pre"], (INCREMENTS, identity)
    heard = "which neither TransformerLens nor LlamaForCausalLM hears; expected"
    flash = "for attention kernels that a bridge does not run"
    calls = {"forward": model, "run_with_cache": model.run_with_cache, "run_with_hooks": model.run_with_hooks,
             "generate": model.generate, "generate_stream": model.generate_stream}  # fmt: skip
    found = [(f"{name} was given banana, {heard} one of ", lambda call=call: call(tokens, banana=1))
             for name, call in calls.items()]  # fmt: skip
    for name in ("forward", "run_with_cache", "run_with_hooks"):
        call = calls[name]
        found += [
            (f"{name} was given atention_mask, {heard} attention_mask", lambda c=call: c(tokens, atention_mask=tokens)),
            (f"{name} was given token_type_ids, {heard}", lambda c=call: c(tokens, token_type_ids=tokens)),
            (f"{name} was given cache_position, {heard}", lambda c=call: c(tokens, cache_position=torch.arange(9))),
            (f"{name} was given input_ids, {heard}", lambda c=call: c("a text", input_ids=tokens)),
            (f"{name} was given num_items_in_batch, {heard}", lambda c=call: c(tokens, num_items_in_batch=4)),
            (f"{name} does not hear is_causal, which is {flash}", lambda c=call: c(tokens, is_causal=False)),
            (f"{name} does not hear cu_seq_lens_q", lambda c=call: c(tokens, cu_seq_lens_q=torch.tensor([0, 9]))),
            ("stop_at_layer is 2; expected a layer from 0 to 1", lambda c=call: c(tokens, stop_at_layer=2)),
            ("stop_at_layer is -3", lambda c=call: c(tokens, stop_at_layer=-3)),
            ("tokens with prepend_bos=True", lambda c=call: c(tokens, prepend_bos=True)),
            ("tokens with padding_side", lambda c=call: c(tokens, padding_side="left")),
            ("return_dict=False hides", lambda c=call: c(tokens, return_type="logits_and_cache", return_dict=False)),
            ("bwd_hooks were given while gradients are off",
             torch.no_grad()(lambda c=call: c(tokens, bwd_hooks=[pair]))),
        ]  # fmt: skip
    for name in ("generate", "generate_stream"):
        call = calls[name]
        found += [
            (f"{name} does not hear num_beams, a setting of transformers' own", lambda c=call: c(tokens, num_beams=4)),
            (f"{name} does not hear min_new_tokens", lambda c=call: c(tokens, min_new_tokens=4)),
            (f"{name} would hear position_ids with the prompt", lambda c=call: c(tokens, position_ids=tokens)),
            (f"{name} would hear past_key_values with", lambda c=call: c(tokens, past_key_values=None)),
            (f"{name} was given stop_at_layer, {heard}", lambda c=call: c(tokens, stop_at_layer=1)),
            (f"{name} was given bwd_hooks and differentiates nothing", lambda c=call: c(tokens, bwd_hooks=[pair])),
        ]  # fmt: skip
    found.append(("hf_generate was given bwd_hooks", lambda: model.hf_generate(tokens, bwd_hooks=[pair])))
    for call in (*calls.values(), model.hf_generate, lambda _, fwd_hooks: model.hooks(fwd_hooks)):
        found += [
            (f"names 'blocks.0.attn.hook_increment', which is no hook point of this model; expected a name in "
             f"hook_dict, such as '{INCREMENTS}'",
             lambda c=call: c(tokens, fwd_hooks=[pair, ("blocks.0.attn.hook_increment", identity)])),
            ("has a list as the hook function at 'hook_embed'",
             lambda c=call: c(tokens, fwd_hooks=[("hook_embed", [])])),
            ("has a NoneType as the hook function at a filter", lambda c=call: c(tokens, fwd_hooks=[(len, None)])),
            ("has a str that is no (hook name or filter, hook function) pair",
             lambda c=call: c(tokens, fwd_hooks=pair)),
            ("fwd_hooks is a dict; expected a list", lambda c=call: c(tokens, fwd_hooks=dict([pair]))),
            ("fwd_hooks is a int; expected a list", lambda c=call: c(tokens, fwd_hooks=3)),
            ("has a filter that no hook point passes",
             lambda c=call: c(tokens, fwd_hooks=[(lambda name: name == "banana", identity)])),
        ]  # fmt: skip
    found.append(("bwd_hooks names 'x'", lambda: model(residual, bwd_hooks=[("x", identity)], start_at_layer=1)))
    return found


@pytest.mark.usefixtures("unchecked")
def test_what_nothing_hears_is_refused_in_a_sentence_before_anything_runs(tiny_model):
    model = tiny_model(source="per_layer")
    plain, before, forward = model(TOKENS), active(model), []
    handle = model.original_model.register_forward_pre_hook(lambda *_: forward.append(1))
    wrong = refusals(model)
    forward.clear()
    for sentence, call in wrong:
        with pytest.raises(lp.PositionsError) as error:
            call()
        assert sentence in str(error.value)
        assert "\n" not in str(error.value)
        assert active(model) == before
    assert not forward
    handle.remove()
    assert torch.equal(model(TOKENS), plain)


def test_a_hook_point_that_the_model_does_not_come_by_is_told(tiny_model):
    model = tiny_model(source="per_layer")
    hooks = [("rotary_emb.hook_out", Counting()), (INCREMENTS, Counting())]
    for call in (model, model.run_with_hooks, model.run_with_cache, model.generate):
        with pytest.warns(UserWarning, match=r"hook functions at 'rotary_emb.hook_out' were not called"):
            call(TOKENS, fwd_hooks=hooks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(TOKENS, fwd_hooks=[("blocks.1.attn.hook_increments", Counting())], stop_at_layer=1)
        model(
            TOKENS,
            fwd_hooks=[*lp.scale(model, 2.0), ("hook_embed", Counting()), ("blocks.0.hook_resid_pre", Counting())],
        )


def test_keywords_of_models_inside_others_are_heard(tiny_llama):
    """Through LoRA, and through a model of images and text around the decoder."""
    llama = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=2))
    assert {"logits_to_keep", "position_ids", "use_cache", "return_dict"} <= model_keywords(llama)
    assert not {"banana", "kwargs", "args", "self", "is_causal", "input_ids"} & model_keywords(llama)
    pictured = families.build("Gemma3ForConditionalGeneration")
    assert {"pixel_values", "token_type_ids", "logits_to_keep", "use_cache"} <= model_keywords(pictured)


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "lens_positions._version.__version__"}
    assert len(Version(lp.__version__).release) == 3


WITHOUT_METADATA = """
import importlib.metadata as metadata, pathlib, sys

found = metadata.Distribution.from_name.__func__

def hidden(cls, name):
    if name.replace("_", "-") == "lens-positions":
        raise metadata.PackageNotFoundError(name)
    return found(cls, name)

metadata.Distribution.from_name = classmethod(hidden)
try:
    metadata.version("lens-positions")
except metadata.PackageNotFoundError:
    import lens_positions as lp

    config = lp.PositionModelConfig(d_model=8, n_layers=1, n_heads=2, d_mlp=8, n_ctx=64)
    lp.viz.report(lp.HookedPositionTransformer.from_config(config), sys.argv[1], ["The cat sat."], characters=400)
    print(lp.__version__, pathlib.Path(lp.__file__).parent)
"""


@pytest.mark.slow
def test_a_report_is_made_from_a_bare_source_tree(tmp_path):
    """Nothing installed: the package as a folder on the path, and no metadata of it to be found."""
    source = Path(lp.__file__).parent
    shutil.copytree(source, tmp_path / "tree" / "lens_positions", ignore=shutil.ignore_patterns("__pycache__"))
    page = tmp_path / "page.html"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_METADATA, str(page)],
        cwd=tmp_path, env={"PATH": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tmp_path / "tree")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    version, folder = done.stdout.split()
    assert (version, Path(folder)) == (lp.__version__, tmp_path / "tree" / "lens_positions")
    assert f"Made by lens-positions {lp.__version__}." in page.read_text("utf-8")
