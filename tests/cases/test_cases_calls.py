"""Situations that people reported: padded batches, text, folders, versions, damaged files, threads.

As `test_cases.py`: the right value, or a refusal in one sentence. The reports are in docs/cases.md.
"""

import importlib
import json
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from cases import (
    LEFT,
    ROWS,
    assert_right,
    built,
    every_source,
    generated,
    refused,
    right_or_refused,
    streamed,
    with_streams,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import lens_positions as lp


@pytest.fixture(autouse=True)
def _as_people_run_it(unchecked: None) -> Iterator[None]:
    """Without shape checks and gradients."""
    with torch.no_grad():
        yield


# Padded batches

PROMPTS = ["The cat sat on the ma", "Hi the"], ["The dog ran in the ma", "Ho thx"]


@pytest.fixture(scope="module")
def bilingual() -> Any:
    return lp.HookedPositionTransformer.from_pretrained("bilingual-per-layer")


def between(model: Any) -> Any:
    return lp.causal.logit_difference(model.to_single_token("t"), model.to_single_token("s"))


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_mediation_of_padded_pairs_is_the_mean_of_the_pairs(bilingual, side):
    """TransformerLens #344, nnsight #672."""
    clean, corrupted = ([bilingual.to_tokens(text) for text in texts] for texts in PROMPTS)
    pairs = zip(clean, corrupted, strict=True)
    each = [lp.causal.mediation(bilingual, c, k, between(bilingual), layers=[0]) for c, k in pairs]
    batch = [bilingual.to_tokens(list(texts), padding_side=side) for texts in PROMPTS]
    with right_or_refused():
        table = lp.causal.mediation(bilingual, *batch, between(bilingual), layers=[0])
        expected = sum(t["mean"].to_numpy() for t in each) / 2
        assert abs(table["mean"].to_numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "measure",
    [
        lambda m, t: lp.causal.gap_sweep(m, t, between(m), layers=[0]),
        lambda m, t: lp.causal.attribution(m, t, between(m)),
        lambda m, t: lp.causal.patch_sweep(m, t.flip(1), t, between(m), layers=[0]),
    ],
    ids=["gap_sweep", "attribution", "patch_sweep"],
)
def test_a_padded_prompt_in_a_sweep_is_the_prompt_or_refused(bilingual, measure, side):
    short = bilingual.to_tokens(PROMPTS[0][1])
    padded = bilingual.to_tokens(list(PROMPTS[0]), padding_side=side)[1:]
    assert padded.shape[1] > short.shape[1]
    with right_or_refused():
        effects = measure(bilingual, padded)
        real = slice(-short.shape[1], None) if side == "left" else slice(short.shape[1])
        expected = measure(bilingual, short)
        assert_right(effects[:, real], expected[..., : effects[:, real].shape[1]], 1e-4)


@every_source
def test_texts_of_different_length_generate_what_each_generates(tiny_model, source):
    """TransformerLens #1005; circuit-tracer #67."""
    model = tiny_model(source=source)
    texts = ["The cat sat", "Hi", "A longer one, it is"]
    how = {"max_new_tokens": 8, "do_sample": False, "verbose": False, "stop_at_eos": False, "return_type": "tokens"}
    each = [model.generate(text, **how)[0, -8:] for text in texts]
    with right_or_refused():
        together = model.generate(texts, **how)
        assert torch.equal(together[:, -8:], torch.stack(each))


@pytest.mark.parametrize("side", ["left", "right"])
@every_source
def test_a_mask_given_to_a_bridge_is_heard(tiny_model, source, side):
    """TransformerLens #1609, #1617; nnsight #542."""
    model = tiny_model(source=source)
    mask = LEFT if side == "left" else LEFT.flip(1)
    logits = model(ROWS, attention_mask=mask)
    cached = model.run_with_cache(ROWS, attention_mask=mask)[0]
    assert torch.equal(cached, logits)
    for row, keep in enumerate(mask.bool()):
        assert_right(logits[row, keep][None], model(ROWS[row, keep][None]))
    if side == "left":
        how = {"max_new_tokens": 8, "do_sample": False, "verbose": False, "stop_at_eos": False}
        together = model.generate(ROWS, attention_mask=mask, **how)[:, -8:]
        each = [model.generate(row[keep.bool()][None], **how)[0, -8:] for row, keep in zip(ROWS, mask, strict=True)]
        assert torch.equal(together, torch.stack(each))


# Text


def means(table: Any) -> Tensor:
    return torch.tensor(table["mean"].to_numpy())


@pytest.mark.slow
@pytest.mark.parametrize("text", ["The cat sat", ["The cat sat"]])
@pytest.mark.parametrize(
    "measure",
    [
        lambda m, t, **how: lp.causal.gap_sweep(m, t, between(m), layers=[0], **how),
        lambda m, t, **how: lp.causal.attribution(m, t, between(m), **how),
        lambda m, t, **how: lp.causal.patch_sweep(m, "The dog ran", t, between(m), layers=[0], **how),
        lambda m, t, **how: means(lp.causal.mediation(m, "The dog ran", t, between(m), layers=[0], **how)),
    ],
    ids=["gap_sweep", "attribution", "patch_sweep", "mediation"],
)
def test_text_goes_wherever_tokens_go(bilingual, measure, text):
    effects = measure(bilingual, text)
    assert torch.equal(effects, measure(bilingual, bilingual.to_tokens("The cat sat")))
    without = measure(bilingual, text, prepend_bos=False)
    bare = bilingual.to_tokens("The cat sat", prepend_bos=False)
    if without.ndim == 2:
        assert without.shape[1] == bare.shape[1] == effects.shape[1] - 1


@pytest.mark.parametrize("call", ["forward", "run_with_cache", "run_with_hooks", "increments", "positions"])
def test_prepend_bos_is_heard(bilingual, call):
    """TransformerLens #1624, #74."""
    given = bilingual.to_tokens("The cat", prepend_bos=False)
    result = getattr(bilingual, call)("The cat", prepend_bos=False)
    expected = getattr(bilingual, call)(given)
    first = (lambda x: x[0]) if call == "run_with_cache" else (lambda x: x)
    assert torch.equal(first(result), first(expected))


def word_tokenizer(adds_bos: bool, path: Path | None = None) -> Any:
    """A tokenizer that knows its BOS in a text, as those of chat models do; with or without one of its own."""
    words = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", "The", "cat", "sat", "dog", "ran"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if adds_bos:
        inner.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    if path is None:
        return tokenizer
    tokenizer.save_pretrained(path)
    return transformers.AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_text_that_begins_with_its_own_bos_is_not_given_another_silently(tmp_path, adds_bos):
    """TransformerLens #1418, #1772; transformers #37686: the text of a chat template."""
    kind, tokenizer = lp.HookedPositionTransformer, word_tokenizer(adds_bos, tmp_path)
    model = kind.from_transformers(with_streams(built(vocab_size=8), "shared"), tokenizer)
    once = torch.tensor([[0, 3, 4]])
    assert torch.equal(model.to_tokens("The cat"), once)
    with warnings.catch_warnings(record=True) as heard, right_or_refused():
        warnings.simplefilter("always")
        assert torch.equal(model.to_tokens("<s>The cat"), once) or any("begin" in str(w.message).lower() for w in heard)
        assert torch.equal(model.increments("<s>The cat"), model.increments(once)) or heard


@pytest.mark.parametrize("kept", ["in a folder", "in memory"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_text_begins_with_one_bos_whatever_its_tokenizer_does(tmp_path, adds_bos, kept):
    """TransformerLens #153, #369."""
    tokenizer = word_tokenizer(adds_bos, tmp_path if kept == "in a folder" else None)
    model = lp.HookedPositionTransformer.from_transformers(built(vocab_size=8), tokenizer)
    assert model.to_tokens("The cat").tolist() == [[0, 3, 4]]
    assert model.to_tokens("The cat", prepend_bos=False).tolist() == [[3, 4]]
    assert model.increments("The cat").shape[-1] == 3


# Folders and vocabularies


@pytest.mark.slow
@every_source
def test_a_model_saved_without_a_tokenizer_loads(tmp_path, source):
    """TransformerLens #800, #655, #592."""
    kind = lp.HookedPositionTransformer
    saved = kind.from_transformers(streamed(source))
    saved.save_pretrained(tmp_path / "x")
    loaded = kind.from_pretrained(tmp_path / "x")
    assert loaded.tokenizer is None
    assert torch.equal(loaded(ROWS), saved(ROWS))
    with refused():
        loaded.increments("text")
    given = kind.from_pretrained(tmp_path / "x", tokenizer=lp.tokenizer.byte_tokenizer())
    assert given.tokenizer is not None


@pytest.mark.parametrize("size", [70, 50])
@every_source
def test_a_vocabulary_that_changes_is_followed_or_refused(source, size):
    """TransformerLens #930; peft #1457, #1932."""
    model = streamed(source)
    tokens = ROWS.remainder(40)
    expected = model(tokens).logits[..., :40]
    with right_or_refused():
        model.resize_token_embeddings(size)
        assert_right(model(tokens).logits[..., :40], expected)
        late = torch.tensor([[5, size - 1, 7]])
        logits = model(late).logits
        if source == "frozen":
            model.position_streams.shared_source.table[5:8] = 1.0
            found = []
            model.position_streams.layers[0].hook_increments.add_hook(lambda d, hook: found.append(d))
            model(late)
            assert size < 61 or found[0][0, 1] == 1.0
        assert logits.isfinite().all()


@pytest.mark.parametrize("tied", [False, True])
@every_source
def test_a_bridge_a_bare_model_and_a_folder_agree_after_an_edit(tmp_path, source, tied):
    """transformers #38870: tied weights too."""
    kind = lp.HookedPositionTransformer
    bridge = kind.from_transformers(streamed(source, tie_word_embeddings=tied))
    edited = dict(bridge.original_model.named_parameters())
    for name in list(edited):
        if "layers" in name or "embed" in name:
            edited[name].mul_(1.25)
    bridge.save_pretrained(tmp_path / "x")
    loaded = kind.from_pretrained(tmp_path / "x")
    assert torch.equal(loaded(ROWS), bridge(ROWS))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x", attn_implementation="eager").eval()
    lp.attach_positions(plain, loaded.position_config).load_state_dict(bridge.position_streams.state_dict()) if (
        source != "frozen"
    ) else with_streams(plain, source)
    assert_right(plain(ROWS).logits, bridge(ROWS), 1e-6)


# Versions


def test_the_version_is_that_of_the_package():
    assert lp.__version__ == metadata.version("lens-positions")


@pytest.mark.slow
def test_a_report_is_made_without_the_metadata_of_a_package(tmp_path, monkeypatch, tiny_model):
    """huggingface_hub #4720: packages that are bundled, or run from their source tree, have none."""

    def missing(name: str) -> str:
        if name == "lens-positions":
            raise metadata.PackageNotFoundError(name)
        return known(name)

    known = metadata.version

    monkeypatch.setattr(metadata, "version", missing)
    monkeypatch.setattr(lp, "viz", lp.viz)  # to have it back
    for name in [name for name in sys.modules if name.startswith("lens_positions.viz")]:
        monkeypatch.delitem(sys.modules, name)
    report = importlib.import_module("lens_positions.viz").report
    report(tiny_model(), tmp_path / "report.html", texts=["The cat sat on the mat."], characters=200)
    assert (tmp_path / "report.html").stat().st_size > 10_000


# Files


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory: Any) -> tuple[Path, Tensor]:
    """A saved model, and its logits."""
    path = tmp_path_factory.mktemp("whole") / "model"
    kind = lp.HookedPositionTransformer
    kind.from_transformers(streamed("shared"), lp.tokenizer.byte_tokenizer()).save_pretrained(path)
    with torch.no_grad():
        return path, kind.from_pretrained(path)(ROWS)


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text("utf-8"))
    change(values)
    path.write_text(json.dumps(values), "utf-8")


def reweighted(path: Path, change: Callable[[Tensor], Tensor]) -> None:
    save_file({name: change(tensor).contiguous() for name, tensor in load_file(path).items()}, path)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 0x10
    path.write_bytes(bytes(content))


def replaced_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "no positions.json": lambda f: (f / "positions.json").unlink(),
    "no positions.safetensors": lambda f: (f / "positions.safetensors").unlink(),
    "NaN increments": lambda f: reweighted(f / "positions.safetensors", lambda t: t * torch.nan),
    "infinite increments": lambda f: reweighted(f / "positions.safetensors", lambda t: t + torch.inf),
    "a flipped bit": lambda f: flipped(f / "positions.safetensors"),
    "positions.json a folder": lambda f: replaced_by_a_folder(f / "positions.json"),
    "positions.safetensors a folder": lambda f: replaced_by_a_folder(f / "positions.safetensors"),
    "config.json a folder": lambda f: replaced_by_a_folder(f / "config.json"),
    "a list": lambda f: (f / "positions.json").write_text("[]"),
    "deep nesting": lambda f: (f / "positions.json").write_text("[" * 100_000),
    "not UTF-8": lambda f: (f / "positions.json").write_bytes(b"\xff\xfe{"),
    "empty": lambda f: (f / "positions.json").write_bytes(b""),
    "hidden true": lambda f: rewritten(f / "positions.json", lambda v: v["positions"].update(hidden=True)),
    "gap 1": lambda f: rewritten(f / "positions.json", lambda v: v["positions"].update(gap=1)),
    "per_head 1": lambda f: rewritten(f / "positions.json", lambda v: v["positions"].update(per_head=1)),
    "another source": lambda f: rewritten(f / "positions.json", lambda v: v["positions"].update(source="per_layer")),
    "no positions in it": lambda f: rewritten(f / "positions.json", lambda v: v.pop("positions")),
    "format as text": lambda f: rewritten(f / "positions.json", lambda v: v.update(format="1")),
    "format true": lambda f: rewritten(f / "positions.json", lambda v: v.update(format=True)),
    "another family": lambda f: rewritten(f / "config.json", lambda v: v.update(architectures=["Qwen2ForCausalLM"])),
    "no tokenizer file": lambda f: (f / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_or_gives_its_logits(tmp_path, whole_folder, damage):
    """vllm #53537, transformers #46620: corrupted weights that load without a word."""
    whole, expected = whole_folder
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    DAMAGES[damage](folder)
    with right_or_refused():
        assert torch.equal(lp.HookedPositionTransformer.from_pretrained(folder)(ROWS), expected)
        if damage not in ("format true", "no tokenizer file", "another family"):
            raise AssertionError(f"loaded with {damage}")


# Threads


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What each of several threads returns, started together."""
    results: list[Any] = [None] * count
    barrier = threading.Barrier(count)

    def run(i: int) -> None:
        barrier.wait()
        try:
            with torch.no_grad():  # which is a thread's own
                results[i] = work(i)
        except Exception as error:  # it is the assertion's to show
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    raised = [r for r in results if isinstance(r, Exception)]
    assert not raised, f"{len(raised)} of {count} threads failed: {type(raised[0]).__name__} {str(raised[0])[:200]}"
    return results


def inputs_of_threads(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(1, 61, (1 + i % 3, 6 + 5 * i), generator=generator) for i in range(count)]


@pytest.mark.parametrize(("count", "per_head"), [(2, False), (8, False), (2, True)])
@every_source
def test_threads_that_share_a_model_do_not_mix(source, per_head, count):
    """nnsight #280, transformers #48286."""
    model = with_streams(built(max_position_embeddings=128), source, per_head=per_head)
    inputs = inputs_of_threads(count)
    expected = [model(tokens).logits for tokens in inputs]

    def passes(i: int) -> int:
        return sum(not torch.equal(model(inputs[i]).logits, expected[i]) for _ in range(20))

    assert sum(in_threads(count, passes)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 8])
@every_source
def test_threads_that_generate_do_not_mix(source, count):
    """peft #804: a service with several requests at once."""
    model = streamed(source, max_position_embeddings=128)
    inputs = inputs_of_threads(count)
    expected = [generated(model, tokens) for tokens in inputs]

    def passes(i: int) -> int:
        return sum(not torch.equal(generated(model, inputs[i]), expected[i]) for _ in range(2))

    assert sum(in_threads(count, passes)) == 0


@pytest.mark.parametrize("source", ["shared", "per_layer"])
def test_gradients_of_threads_do_not_mix(source):
    model = streamed(source)
    inputs = inputs_of_threads(4)

    def gradient(i: int) -> Tensor:
        with torch.enable_grad():
            embeddings = model.get_input_embeddings()(inputs[i]).detach().requires_grad_()
            (found,) = torch.autograd.grad(model(inputs_embeds=embeddings).logits.square().mean(), embeddings)
        return found

    expected = [gradient(i) for i in range(4)]
    for found, right in zip(in_threads(4, gradient), expected, strict=True):
        assert torch.equal(found, right)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bridge", "masks"])
def test_threads_with_masks_of_their_own_or_a_bridge_do_not_mix(kind):
    model = streamed("per_layer")
    run: Callable[..., Any] = lambda rows, mask: model(rows, attention_mask=mask).logits  # noqa: E731
    if kind == "bridge":
        run = lp.HookedPositionTransformer.from_transformers(model)
        run = lambda rows, mask, call=run: call(rows, attention_mask=mask)  # noqa: E731
    masks = [LEFT, LEFT * 0 + 1, LEFT.roll(1, 0), LEFT.roll(2, 0)]
    expected = [run(ROWS, mask) for mask in masks]

    def passes(i: int) -> int:
        return sum(not torch.equal(run(ROWS, masks[i]), expected[i]) for _ in range(10))

    assert sum(in_threads(4, passes)) == 0


@every_source
def test_a_pass_inside_a_pass_does_not_mix_with_it(source):
    """A hook that runs the model on something else, as a judge of its own activations does."""
    model = streamed(source)
    expected, other = model(ROWS).logits, model(ROWS.flip(1)).logits
    within: list[Tensor] = []

    def run_another(*_: Any) -> None:
        handle.remove()
        within.append(model(ROWS.flip(1)).logits)

    handle = model.model.layers[1].register_forward_pre_hook(run_another)
    with right_or_refused():
        assert torch.equal(model(ROWS).logits, expected)
        assert torch.equal(within[0], other)
    assert torch.equal(model(ROWS).logits, expected)
