"""torch.compile: one graph, the same gradients, and no graph lent or lost beside another model.

Shape checks of the tests stand between a compiler and the code, so the figures come from processes without them.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked import Command, script

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def printed(folder: Path, path: Path, *words: str) -> str:
    """What a script prints."""
    process = Command(folder, path, *words, work=script)
    status, (out, error) = process.wait(600), process.said()
    assert status == 0, error[-3000:]
    return out


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    words = ["--backend", "aot_eager", "--layers", "2", "--output", str(folder / "compiled.json")]
    printed(folder, ROOT / "benchmarks" / "compiled.py", *words)
    return json.loads((folder / "compiled.json").read_text())


def test_a_training_step_is_one_graph_without_breaks_or_recompiles(figures):
    rows = figures["graphs"]
    assert len(rows) == 12
    assert {(row["graphs"], row["breaks"], row["recompiles"]) for row in rows} == {(1, 0, 0)}


def test_compiled_gradients_equal_those_in_eager_after_a_plain_model_was_compiled(figures):
    for row in figures["graphs"]:
        assert row["weights_without_gradient"] == 0, row
        assert row["gradient_error"] <= (1e-4 if row["dtype"] == "float32" else 0.05), row
        assert row["loss_error"] <= (1e-6 if row["dtype"] == "float32" else 1e-2), row
        if row["source"].startswith(("shared", "per_layer")):
            assert float(row["gradient"]) > 1e-5, row


def test_a_plain_model_keeps_its_own_graph(figures):
    assert figures["plain_model_kept_its_graph"]


def test_a_stream_adds_few_operators_to_a_layer(figures):
    """The norm of the source is one operator on CUDA, and several on a CPU."""
    added = {row["source"]: row for row in figures["operators"]}
    assert added["static"]["both"] == 0
    assert added["per_layer"]["both"] <= 67
    assert added["per_layer"]["both_with_a_fused_norm"] <= 50


SITUATIONS = """
import warnings

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lens_positions as lp

warnings.simplefilter("ignore")
SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = torch.randint(0, 61, (2, 10), generator=torch.Generator().manual_seed(1))


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.25)).eval()


def drawn(model):
    torch.manual_seed(2)
    for parameter in model.position_streams.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def logits(run):
    with torch.no_grad():
        return run(TOKENS, use_cache=False).logits


def same(a, b):
    return torch.allclose(a, b, atol=1e-5)


# A hook that is added, taken off, streams that are detached: each is heard by the compiled model.
model = llama()
streams = lp.attach_positions(model, lp.PositionConfig("per_layer"))
drawn(model)
run = torch.compile(model, backend="aot_eager")
plain = logits(run)
streams.layers[0].hook_increments.add_hook(lambda d, hook: 2 * d)
assert same(logits(run), logits(model)) and not same(logits(run), plain), "an added hook"
streams.layers[0].hook_increments.remove_hooks()
assert same(logits(run), plain), "a removed hook"
streams.detach()
assert same(logits(run), logits(llama())), "detached streams"

# A model that was compiled, and ran, before it had streams.
for in_place in (False, True):
    model = llama()
    if in_place:
        model.compile(backend="aot_eager")
    run = model if in_place else torch.compile(model, backend="aot_eager")
    before = logits(run)
    lp.attach_positions(run, lp.PositionConfig("per_layer"))
    drawn(model)
    with torch.compiler.set_stance("force_eager"):
        eager = logits(model)
    assert same(logits(run), eager) and not same(eager, before), "compiled before"

# Layers compiled one by one: right, if not one graph.
for source in ("shared", "per_layer", "frozen"):
    model = llama()
    lp.attach_positions(model, lp.PositionConfig(source))
    expected = logits(drawn(model))
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    assert same(logits(model), expected), source

# Torch's own default lends the graph of a plain layer: an error, no number.
torch._dynamo.reset()
plain = llama()
for layer in plain.model.layers:
    layer.compile(backend="aot_eager")
model = llama()
lp.attach_positions(model, lp.PositionConfig("shared"))
drawn(model)
torch._dynamo.config.skip_nnmodule_hook_guards = True
logits(plain)
for layer in model.model.layers:
    layer.compile(backend="aot_eager")
try:
    found = logits(model)
except lp.PositionsError as error:
    assert "position streams ran" in str(error)
else:
    with torch.compiler.set_stance("force_eager"):
        assert same(found, logits(model)), "a lent graph ran without a word"
print("all right")
"""


def test_situations_of_people_who_compile(tmp_path):
    (tmp_path / "situations.py").write_text(SITUATIONS)
    assert printed(tmp_path, tmp_path / "situations.py").strip().endswith("all right")


TRAINED = """
import functools
import json
import os
import sys
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lens_positions import PositionConfig, PositionModelConfig
from lens_positions.training.config import TrainConfig
from lens_positions.training.loop import train

folder, processes = Path(sys.argv[1]), sys.argv[2]
graphs, handed = [], []


def aot_eager(graph, inputs):
    handed.append(len(graph.graph.nodes))
    return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


torch.compile = functools.partial(torch.compile, backend=aot_eager)
parameters = []


def note(optimizer, args, kwargs):
    found = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()), len(handed)
    learned = [p for group in optimizer.param_groups for p in group["params"]]
    graphs.append((*found, sum(p.grad is None or not p.grad.any().item() for p in learned)))


register_optimizer_step_pre_hook(note)
# Over 1 MiB of weights, which is more than the first bucket of gradients that DDP sends.
model = PositionModelConfig(d_model=128, n_layers=3, n_heads=2, n_ctx=32, positions=PositionConfig("per_layer"))
for words in sys.argv[3:]:
    how, accumulate = words.split("-")
    config = TrainConfig(
        model=model, corpus=str(folder / "corpus"), steps=5, batch_size=8, warmup_steps=1, eval_every=5, eval_windows=8,
        save_every=5, compile=how == "compiled", accumulate=int(accumulate),
    )
    run = folder / f"{words}-{processes}"

    # A run begins with no graphs, as one in a process of its own.
    torch._dynamo.reset()
    counters.clear()
    graphs.clear()
    handed.clear()
    train(config, run, cache_dir=folder / "cache")
    if os.environ.get("RANK", "0") == "0":
        (run / "graphs.json").write_text(json.dumps(graphs))
"""

RUNS = {1: ("eager-1", "compiled-2"), 2: ("compiled-1", "compiled-2")}
"""What is trained in one process, and in two; each process imports everything once."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(how, accumulate, processes): the losses of five steps, and of each step its graphs and the like."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "corpus").mkdir()
    for i in range(40):
        (folder / "corpus" / f"{i:02}.txt").write_text(f"Document {i}. The cat sat on mat {i * i}.\n" * 12, "utf-8")
    (folder / "trained.py").write_text(TRAINED)

    @functools.cache
    def train(processes):
        words = [folder / "trained.py", folder, processes, *RUNS[processes]]
        if processes == 1:
            return printed(folder, *words)
        launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0", "--standalone"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, *launch, *map(str, words)], capture_output=True, text=True, timeout=600, env=environment
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def run(how, accumulate=1, processes=1):
        train(processes)
        done = folder / f"{how}-{accumulate}-{processes}"
        lines = [json.loads(line) for line in (done / "log.jsonl").read_text("utf-8").splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        return losses, json.loads((done / "graphs.json").read_text())

    return run


@pytest.mark.parametrize(("accumulate", "processes"), [(2, 1), (1, 2), (2, 2)])
def test_a_compiled_run_has_the_losses_of_an_eager_one_in_parts_and_over_processes(trained, accumulate, processes):
    """Of each step: one graph, no break, one call of the compiler, and in the last one a gradient for every weight.

    Left on, DDPOptimizer cuts the graph at the buckets of gradients, and the compiler runs once for each piece.
    """
    eager, _ = trained("eager")
    losses, steps = trained("compiled", accumulate, processes)
    assert len(losses) == 5
    assert max(abs(a - b) for a, b in zip(eager, losses, strict=True)) < 1e-4
    assert {tuple(step[:3]) for step in steps} == {(1, 0, 1)}
    assert steps[-1][3] == 0


PRECISE = """
from dataclasses import replace

import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import lens_positions as lp
from lens_positions.model import build_model

TOKENS = torch.randint(0, 256, (1, 8192), generator=torch.Generator().manual_seed(0))
SIZES = lp.PositionModelConfig(d_model=8, n_layers=1, n_heads=1, d_mlp=8, n_ctx=8192)

# In a tensor, which is an operation of the graph: a hook at the stream would break it.
kept = torch.empty(1, 8192, dtype=torch.float64)
rotate = LlamaRotaryEmbedding.forward


def keep(self, x, position_ids):
    # The model's own call has whole numbers, and that of a trial has three tokens.
    if position_ids.is_floating_point() and position_ids.shape == kept.shape:
        assert position_ids.dtype == torch.float32, position_ids.dtype
        kept.copy_(position_ids)
    return rotate(self, x, position_ids)


LlamaRotaryEmbedding.forward = keep


def positions(dtype, increment, source, compiled):
    "What the model's rotary module is called with."
    model = build_model(replace(SIZES, positions=lp.PositionConfig(source)), seed=0).to(dtype).eval()
    if source == "frozen":
        model.position_streams.shared_source.table.fill_(increment)

    kept.fill_(torch.nan)
    with torch.no_grad():
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        run(TOKENS, use_cache=False)
    return kept[0].clone()


for dtype in (torch.float32, torch.bfloat16):
    for compiled in (False, True):
        expected = torch.arange(8192).double() * 1.37
        apart = (positions(dtype, 1.37, "frozen", compiled) - expected).abs().max()
        assert apart < 1e-3, (dtype, compiled, float(apart))
        ones = positions(dtype, 1.0, "per_layer", compiled)
        assert torch.equal(ones, torch.arange(8192).double()), (dtype, compiled)
print("all right")
"""


def test_positions_of_8192_tokens_are_within_a_thousandth_of_a_sum_in_float64(tmp_path):
    """Eager and compiled, in float32 and bf16 models; increments of one give the model's own to the bit."""
    (tmp_path / "precise.py").write_text(PRECISE)
    assert printed(tmp_path, tmp_path / "precise.py").strip().endswith("all right")
