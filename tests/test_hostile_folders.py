"""Folders that are wrong are refused in one sentence, whatever is wrong; nothing on disk and in a model is lost."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import struct
from functools import partial

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_models import drawn_weights
from transformers import LlamaConfig, LlamaForCausalLM

import lens_positions as lp
from lens_positions.checkpoint import CHECKPOINTS, load_base, load_pretrained, shipped_names
from lens_positions.checkpoint_files import read_positions, sha256_of_file
from lens_positions.tokenizer import byte_tokenizer

pytestmark = pytest.mark.usefixtures("unchecked")
H = lp.HookedPositionTransformer
TOKENS = torch.randint(0, 257, (2, 11), generator=torch.Generator().manual_seed(6))
WHOLE, STREAMS = "model.safetensors", "positions.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A whole model, an adapter and its base, written once."""
    folder = tmp_path_factory.mktemp("written")
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "d_mlp": 48, "n_ctx": 64}
    source = lp.PositionConfig(source="shared", hidden=5)
    drawn_weights(H.from_config(lp.PositionModelConfig(**sizes, positions=source))).save_pretrained(folder / "whole")
    plain = LlamaForCausalLM(lp.PositionModelConfig(**sizes).to_transformers())
    plain.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    plain.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    lp.attach_positions(plain, source)
    lp.save_adapter(plain, folder / "adapter", base=folder / "base")
    return folder


@pytest.fixture
def saved(written, tmp_path):
    """The same, to change."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    return tmp_path


def text(name, content):
    """Write a file of the folder anew."""
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def described(**changes):
    def change(folder):
        path = folder / "positions.json"
        read = json.loads(path.read_text())
        for name, value in changes.items():
            inner = name.split("__")
            place = read[inner[0]] if len(inner) == 2 else read
            place[inner[-1]] = value
        path.write_text(json.dumps(read))

    return change


def lacking(name):
    def remove(folder):
        (folder / name).unlink()

    return remove


def is_a_folder(name):
    def change(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def flipped(name, place=-3):
    def flip(folder):
        data = bytearray((folder / name).read_bytes())
        data[place] ^= 4
        (folder / name).write_bytes(data)

    return flip


def cut(name, length=40):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def tensors(name, change):
    def rewrite(folder):
        held = load_file(folder / name)
        change(held)
        save_file(held, folder / name, {"format": "pt"})

    return rewrite


def first(change):
    """Change the first tensor of a file, by name."""

    def act(held):
        name = min(held)
        held[name] = change(held[name].clone())

    return act


def filled(value):
    return first(lambda tensor: tensor.fill_(value))


def config(**changes):
    def change(folder):
        read = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(read))

    return change


def loop(name):
    def link(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(folder / name)

    return link


def without_both(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


DEEP = "[" * 100_000
HUGE = '{"format": 1, "positions": {"hidden": ' + "9" * 5000 + "}}"
TWICE = '{"format": 1, "positions": {"gap": "after", "gap": "before"}}'
DIGEST = "0" * 64

EVERYWHERE = {
    "positions.json is missing": (lacking("positions.json"), "no positions.json; expected both"),
    "positions.json is a folder": (is_a_folder("positions.json"), "is a folder; expected a file"),
    "positions.json is a loop": (loop("positions.json"), "is damaged"),
    "positions.json is empty": (text("positions.json", ""), "is damaged"),
    "positions.json is deep": (text("positions.json", DEEP), "nested too deeply"),
    "positions.json is deep inside": (
        text("positions.json", '{"format": 1, "positions": ' + '{"a": ' * 50_000 + "1" + "}" * 50_001),
        "nested too deeply",
    ),
    "positions.json is no UTF-8": (text("positions.json", b'{"format": 1, "x": "\xff"}'), "is damaged"),
    "positions.json has a number of 5000 digits": (text("positions.json", HUGE), "is damaged"),
    "positions.json says a thing twice": (text("positions.json", TWICE), "stands twice"),
    "positions.json is a list": (text("positions.json", "[]"), "it holds list"),
    "positions.json is long": (text("positions.json", " " * 2_000_000), "2000000 bytes"),
    "positions.json is null": (text("positions.json", "null"), "is damaged"),
    "format is true": (described(format=True), "format is bool"),
    "format is text": (described(format="1"), "format is str"),
    "format is newer": (described(format=2), "needs a newer lens-positions"),
    "a field is unknown": (described(curve=1), "unknown field 'curve'"),
    "a source's field is unknown": (described(positions__curve=1), "unknown field 'curve'"),
    "positions is a list": (described(positions=[1]), "positions is list"),
    "source is a list": (described(positions__source=["shared"]), "source is|damaged"),
    "source is an object": (described(positions__source={"a": 1}), "source is|damaged"),
    "gap is unknown": (described(positions__gap="around"), "gap is 'around'"),
    "activation is null": (described(positions__activation=None), "activation is None"),
    "per_head is 1": (described(positions__per_head=1), "per_head is 1"),
    "hidden is true": (described(positions__hidden=True), "hidden is True"),
    "hidden is 5.0": (described(positions__hidden=5.0), "hidden is 5.0"),
    "hidden is negative": (described(positions__hidden=-5), "hidden is -5"),
    "hidden is huge": (described(positions__hidden=10**15), "has 5 rows, and hidden is 10+"),
    "hidden is another": (described(positions__hidden=6), "has 5 rows, and hidden is 6"),
    "max_increment is text": (described(positions__max_increment="10"), "max_increment is '10'"),
    "max_increment is NaN": (described(positions__max_increment=float("nan")), "is damaged"),
    "max_increment overflows": (
        text("positions.json", '{"format": 1, "positions": {"max_increment": 1e999}}'),
        "is damaged",
    ),
    "max_increment is 1": (described(positions__max_increment=1), "max_increment is 1"),
    "another source": (described(positions__source="per_layer"), "does not fit"),
    "a static source with weights": (described(positions__source="static"), "does not fit"),
    "a frozen source without a table": (described(positions__source="frozen"), "no weights of a frozen source"),
    "per head after all": (described(positions__per_head=True), "does not fit"),
    "a checksum is no checksum": (described(files={STREAMS: "abc"}), "no SHA-256"),
    "a checksum leads out": (described(files={"../../etc/passwd": DIGEST}), "no name of a file in the folder"),
    "files is a list": (described(files=[STREAMS]), "files is list"),
    "the streams are missing": (lacking(STREAMS), "no positions.safetensors; expected both"),
    "the streams are a folder": (is_a_folder(STREAMS), "truncated or damaged"),
    "the streams are a loop": (loop(STREAMS), "no positions.safetensors; expected both"),
    "the streams are empty": (text(STREAMS, b""), "truncated or damaged"),
    "the streams are truncated": (cut(STREAMS), "truncated or damaged"),
    "the streams lack their end": (lambda f: cut(STREAMS, (f / STREAMS).stat().st_size - 1)(f), "truncated or damaged"),
    "the streams' header is huge": (text(STREAMS, struct.pack("<Q", 1 << 60) + b"{}"), "truncated or damaged"),
    "the streams' header is nonsense": (text(STREAMS, struct.pack("<Q", 4) + b"\xff\xfe{}"), "truncated or damaged"),
    "the streams have NaN": (tensors(STREAMS, filled(float("nan"))), "NaN or infinite"),
    "the streams are infinite": (tensors(STREAMS, filled(float("-inf"))), "NaN or infinite"),
    "the streams are whole numbers": (tensors(STREAMS, first(lambda t: t.long())), "expected float32 or float64"),
    "the streams are half": (tensors(STREAMS, first(lambda t: t.half())), "expected float32 or float64"),
    "the streams have other shapes": (tensors(STREAMS, first(lambda t: t.flatten()[:1])), "does not fit"),
    "the streams have one more": (tensors(STREAMS, lambda held: held.update(x=torch.ones(1))), "does not fit"),
    "the streams lack one": (tensors(STREAMS, lambda held: held.pop("shared_source.out.bias")), "does not fit"),
    "the streams have a flipped bit": (flipped(STREAMS), "not the file that was saved"),
    "the streams are of another model": (
        tensors(STREAMS, first(lambda t: t + 1)),
        "not the file that was saved",
    ),
}

OF_A_MODEL = {
    "no config": (lacking("config.json"), "config.json"),
    "config is a folder": (is_a_folder("config.json"), "no config.json"),
    "config is deep": (text("config.json", DEEP), "cannot be loaded"),
    "config is no UTF-8": (text("config.json", b"\xff\xfe"), "cannot be loaded"),
    "config of another family": (config(architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel, and is a Llama"),
    "architectures is a word": (config(architectures="LlamaForCausalLM"), "cannot be loaded|list of names"),
    "architectures holds a number": (config(architectures=[5]), "cannot be loaded|list of names"),
    "config of another model type": (config(model_type="bert"), "cannot be loaded|no tensor|unknown tensor"),
    "config without sizes": (config(hidden_size=-32), "cannot be loaded"),
    "config with other sizes": (config(intermediate_size=47), "cannot be loaded|misshapen"),
    "config with one layer more": (config(num_hidden_layers=3), "no tensor"),
    "config with one layer less": (config(num_hidden_layers=1), "unknown tensor"),
    "the model is missing": (lacking(WHOLE), "cannot be loaded"),
    "the model is a folder": (is_a_folder(WHOLE), "cannot be loaded"),
    "the model is truncated": (cut(WHOLE), "cannot be loaded"),
    "the model has a flipped bit": (flipped(WHOLE), "not the file that was saved"),
    "the model has NaN": (tensors(WHOLE, filled(float("nan"))), "not the file that was saved"),
    "the tokenizer is missing": (lacking("tokenizer.json"), "no tokenizer.json, a file of its tokenizer"),
    "all of the tokenizer is missing": (without_both, "a file of its tokenizer"),
    "the tokenizer is a folder": (is_a_folder("tokenizer.json"), "no tokenizer.json"),
    "the tokenizer is nonsense": (text("tokenizer.json", "{"), "cannot be loaded"),
    "the tokenizer is deep": (text("tokenizer.json", DEEP), "cannot be loaded"),
    "a tokenizer's name leads out": (described(tokenizer=["../x"]), "no name of a file in the folder"),
    "the tokenizer is a number": (described(tokenizer=3), "no list of names"),
}

OF_AN_ADAPTER = {
    "no base": (described(base=None), "is damaged|there is no adapter|no config.json"),
    "a base without a name": (described(base={}), "expected name, sha256 and dtype"),
    "a base with more": (described(base__more=1), "expected name, sha256 and dtype"),
    "a base that is a list": (described(base=["x"]), "base is list"),
    "a base named 7": (described(base__name=7), "the base's name is int"),
    "a base named nothing": (described(base__name="  "), "the base's name is"),
    "a base of another dtype": (described(base__dtype="int8"), "the base's dtype is"),
    "a base of a dtype in a list": (described(base__dtype=["float32"]), "the base's dtype is"),
    "a base with a short digest": (described(base__sha256="abc"), "no SHA-256"),
    "a base with another digest": (described(base__sha256=DIGEST), "was made for"),
    "a base that differs in the last bits": (described(base_exact=DIGEST), "expected that base to the bit"),
    "adapters is a list": (described(adapters=["default"]), "adapters is list"),
    "adapters that lead out": (described(adapters__names=["../x"]), "no name of a file in the folder"),
    "adapters in a folder below": (described(adapters__names=["a/b"]), "is damaged"),
    "adapters that are active and not there": (described(adapters__active=["ghost"]), "is damaged"),
    "adapters that are enabled perhaps": (described(adapters__enabled="yes"), "is damaged"),
    "adapters twice": (described(adapters__names=["default", "default"]), "is damaged"),
    "no LoRA": (lacking("adapter_model.safetensors"), "no adapter_model.safetensors"),
    "no LoRA description": (lacking("adapter_config.json"), "damaged or do not fit"),
    "a LoRA description is a folder": (is_a_folder("adapter_config.json"), "damaged or do not fit"),
    "a LoRA description is deep": (text("adapter_config.json", DEEP), "damaged or do not fit"),
    "LoRA of an unknown kind": (text("adapter_config.json", '{"peft_type": "MAGIC"}'), "damaged or do not fit"),
    "LoRA that is a prompt": (
        text("adapter_config.json", '{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}'),
        "damaged or do not fit",
    ),
    "LoRA on modules that are not there": (
        text("adapter_config.json", '{"peft_type": "LORA", "r": 2, "target_modules": ["ghost"]}'),
        "damaged or do not fit",
    ),
    "LoRA of a huge rank": (
        text("adapter_config.json", '{"peft_type": "LORA", "r": 1000000000000, "target_modules": ["q_proj"]}'),
        "damaged or do not fit",
    ),
    "LoRA is truncated": (cut("adapter_model.safetensors"), "damaged or do not fit"),
    "LoRA has NaN": (tensors("adapter_model.safetensors", filled(float("nan"))), "NaN or infinite"),
    "LoRA of other shapes": (tensors("adapter_model.safetensors", first(lambda t: t[:1])), "damaged or do not fit"),
    "LoRA of whole numbers": (tensors("adapter_model.safetensors", first(lambda t: t.long())), "do not fit"),
    "LoRA has a flipped bit": (flipped("adapter_model.safetensors"), "not the file that was saved"),
}


def contents(folder):
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        files[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return files


def refused_once(says, call):
    with pytest.raises(lp.PositionsError, match=says) as refusal:
        call()
    said = str(refusal.value)
    assert "\n" not in said
    assert len(said) < 1000


@pytest.mark.parametrize("harm", EVERYWHERE | OF_A_MODEL)
def test_a_wrong_model_folder_is_refused_in_one_sentence(saved, harm):
    change, says = (EVERYWHERE | OF_A_MODEL)[harm]
    change(saved / "whole")
    before = contents(saved)
    refused_once(says, lambda: H.from_pretrained(saved / "whole"))
    assert contents(saved) == before


@pytest.mark.parametrize("harm", EVERYWHERE | OF_AN_ADAPTER)
def test_a_wrong_adapter_is_refused_and_leaves_the_base_as_it_was(saved, harm):
    change, says = (EVERYWHERE | OF_AN_ADAPTER)[harm]
    change(saved / "adapter")
    before = contents(saved)
    refused_once(says, lambda: H.from_pretrained(saved / "adapter"))
    model = load_base(saved / "base")[0]
    modules = [(n, type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refused_once(says, lambda: lp.load_adapter(model, saved / "adapter"))
    assert [(n, type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()] == modules
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "peft_config")
    after = model.state_dict()
    assert set(after) == set(state)
    assert all(torch.equal(state[name], after[name]) for name in state)
    assert contents(saved) == before


def test_a_base_that_is_not_there_is_named(saved):
    described(base__name="/nowhere/at/all")(saved / "adapter")
    refused_once("no model folder at /nowhere/at/all", lambda: H.from_pretrained(saved / "adapter"))
    moved = H.from_pretrained(saved / "adapter", base=saved / "base")
    assert moved.position_config.source == "shared"


@pytest.mark.slow
def test_a_folder_from_before_checksums_still_loads(saved):
    for name in ("whole", "adapter"):
        want = H.from_pretrained(saved / name)(TOKENS)
        path = saved / name / "positions.json"
        read = json.loads(path.read_text())
        for field in ("files", "tokenizer", "base_exact", "adapters"):
            read.pop(field, None)
        path.write_text(json.dumps(read))
        old = H.from_pretrained(saved / name)
        assert torch.equal(old(TOKENS), want)
        assert old.to_tokens("é").tolist() == [[256, 195, 169]]


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_models_have_the_checksums_of_their_files(name):
    described = read_positions(CHECKPOINTS / name)
    weights = {path.name for path in (CHECKPOINTS / name).glob("*.safetensors")}
    assert set(described.files) == weights == {WHOLE, STREAMS}
    assert all(sha256_of_file(CHECKPOINTS / name / file) == digest for file, digest in described.files.items())


@pytest.mark.parametrize("where", ["", "\0", "a" * 5000, "owner/" + "b" * 5000])
def test_names_that_no_folder_can_have_are_refused(where):
    refused_once("folder|cannot be loaded|is no name of a model", lambda: H.from_pretrained(where))


@pytest.mark.slow
def test_a_model_without_a_tokenizer_loads_and_takes_tokens(tiny_llama, tmp_path):
    model = tiny_llama(vocab_size=257)
    H.from_transformers(model).save_pretrained(tmp_path / "ours")
    tiny_llama(vocab_size=257).save_pretrained(tmp_path / "theirs")
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for name in ("ours", "theirs"):
        loaded = H.from_pretrained(tmp_path / name)
        assert loaded.tokenizer is None
        assert loaded.increments(TOKENS).eq(1).all()
        with pytest.raises(lp.PositionsError, match="no tokenizer; expected tokens"):
            loaded.to_tokens("text")
        with pytest.raises(lp.PositionsError, match="no tokenizer; expected"):
            loaded.to_str_tokens(TOKENS[0])
        for given in (byte_tokenizer(), tmp_path / "tokenizer", str(tmp_path / "tokenizer")):
            spoken = H.from_pretrained(tmp_path / name, tokenizer=given)
            assert spoken.to_tokens("é").tolist() == [[256, 195, 169]]
        refused_once("cannot be loaded", lambda: H.from_pretrained(tmp_path / "ours", tokenizer=tmp_path / "nowhere"))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(H.from_pretrained(tmp_path / "again")(TOKENS), loaded(TOKENS))
    assert read_positions(tmp_path / "again").tokenizer == []


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("vocab", [70, 55])
def test_a_vocabulary_that_changes_size_keeps_its_increments_and_new_tokens_get_one(
    tiny_llama, tmp_path, vocab, per_head
):
    torch.manual_seed(1)
    table = 0.5 + torch.rand(61, 2) if per_head else 0.5 + torch.rand(61)
    model = tiny_llama()
    lp.attach_positions(model, lp.PositionConfig("frozen", per_head=per_head), table=table)
    model.resize_token_embeddings(vocab)
    tokens = torch.tensor([[5, 7, 50, vocab - 1, 3, vocab - 3]])
    with model.position_streams.record() as increments, torch.no_grad():
        want = model(tokens).logits
    expected = torch.ones(vocab, *table.shape[1:])
    expected[:61] = table[:vocab]
    assert torch.equal(increments[0], expected[tokens])

    whole = tiny_llama()
    whole.resize_token_embeddings(vocab)
    whole.load_state_dict({n: t for n, t in model.state_dict().items() if "position_streams" not in n})
    lp.attach_positions(whole, lp.PositionConfig("frozen", per_head=per_head), table=expected)
    assert torch.equal(whole(tokens).logits, want)
    bridged = H.from_transformers(model)
    bridged.save_pretrained(tmp_path / "model")
    assert torch.equal(load_file(tmp_path / "model" / STREAMS)["shared_source.table"], expected)
    loaded = load_pretrained(tmp_path / "model", attn_implementation="eager")[0]
    assert torch.equal(loaded(tokens).logits, want)
    assert torch.equal(H.from_pretrained(tmp_path / "model")(tokens), bridged(tokens))


@contextlib.contextmanager
def files_of_at_most(size):
    """The system's own limit: writing past it fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("size", [0, 100, 1000, 5000, 20_000])
def test_a_full_disk_leaves_what_was_there(saved, tiny_model, size):
    model, adapted = tiny_model(source="shared", hidden=5), load_base(saved / "base")[0]
    lp.load_adapter(adapted, saved / "adapter")
    before = contents(saved)
    saves = [partial(model.save_pretrained, saved / "whole"), partial(model.save_pretrained, saved / "new")]
    if size < 5000:  # the adapter needs no more
        saves.append(partial(lp.save_adapter, adapted, saved / "adapter", base=saved / "base"))
    for save in saves:
        with files_of_at_most(size):
            refused_once("cannot be written", save)
        assert contents(saved) == before


def test_a_full_disk_while_the_tokenizer_is_written(saved, tiny_model, monkeypatch):
    model = tiny_model(source="shared", hidden=5)

    def full(*args, **kwargs):
        raise Exception("No space left on device (os error 28)")

    before = contents(saved)
    monkeypatch.setattr(type(model.tokenizer), "save_pretrained", full)
    refused_once("No space left", lambda: model.save_pretrained(saved / "whole"))
    assert contents(saved) == before


def test_places_that_cannot_be_written_are_refused(saved, tiny_model, monkeypatch):
    model, adapted = tiny_model(source="shared", hidden=5), load_base(saved / "base")[0]
    lp.load_adapter(adapted, saved / "adapter")
    (saved / "file").write_text("mine")
    (saved / "whole" / "notes.txt").write_text("precious")
    (saved / "adapter" / "notes").mkdir()
    (saved / "adapter" / "notes" / "a.txt").write_text("precious")
    before = contents(saved)
    for name in ("file", "file/below", "whole", "adapter", "a" * 300):
        says, where = "is a file|cannot be written|holds other files", saved / name
        refused_once(says, partial(model.save_pretrained, where))
        refused_once(says, partial(lp.save_adapter, adapted, where, base=saved / "base"))

    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", read_only)
    refused_once("Read-only file system", lambda: model.save_pretrained(saved / "new"))
    assert contents(saved) == before


def test_a_link_to_a_folder_stays_a_link(saved, tiny_model):
    model = tiny_model(source="shared", hidden=5)
    (saved / "link").symlink_to(saved / "whole")
    with torch.no_grad():
        model.embed.W_E[3] += 1
    model.save_pretrained(saved / "link")
    assert (saved / "link").is_symlink()
    assert torch.equal(H.from_pretrained(saved / "whole")(TOKENS), model(TOKENS))


@pytest.mark.slow
def test_another_family_is_refused_and_a_head_of_the_same_is_read(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes)).save_pretrained(tmp_path / "model")
    for named, says in (("MistralForCausalLM", "MistralForCausalLM, and is a Llama"), ("BertModel", "BertModel, and")):
        config(architectures=[named])(tmp_path / "model")
        refused_once(says, lambda: H.from_pretrained(tmp_path / "model"))
    for named in (None, ["LlamaForCausalLM"]):
        config(architectures=named)(tmp_path / "model")
        assert H.from_pretrained(tmp_path / "model").cfg.n_layers == 1
