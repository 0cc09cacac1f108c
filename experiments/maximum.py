"""The task of Veličković et al. (arXiv 2410.01104): which class has the largest of n items?

An item is a number between 0 and 1 and a class; one head of attention looks for the item with the largest number, and a
small network names its class. It is trained on 5 to 16 items and tested on up to thousands, with the attention that it
learned and with `lens_positions.analysis.dispersion.sharpen_scores`, on the same items.

    runs/results/maximum/seed-0.csv    accuracy, entropy and largest weight by number of items, with and without
    runs/results/maximum/seed-0.json   configuration, seconds, loss

A seed whose files are there is not trained again.
"""

import json
import math
import shlex
import time
from dataclasses import asdict, fields

import pandas as pd
import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn
from torch.nn import functional

from lens_positions.analysis.dispersion import attention_entropy, sharpen_scores
from lens_positions.checkpoint_files import write_whole
from lens_positions.errors import PositionsError
from lens_positions.measure.intervals import t_interval
from lens_positions.progress import track_progress
from lens_positions.terminal import print_grid, print_line, with_interval
from lens_positions.training.config import check_number, check_whole
from lens_positions.training.schema import MaximumResults, read_json

from .options import MaximumConfig
from .suite import print_progress

FEWEST, MOST = 5, 16
"""Items in training."""


class Retriever(nn.Module):
    """One head of attention over items, and the class that it names."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()

        def network(given: int, returned: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(given, width), nn.GELU(), nn.Linear(width, returned))

        self.item, self.query, self.named = network(1 + classes, width), network(1, width), network(width, classes)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(
        self, items: Float[Tensor, "set item feature"], query: Float[Tensor, "set 1"], sharp: bool = False
    ) -> tuple[Float[Tensor, "set classes"], Float[Tensor, "set item"]]:
        """Logits of the classes, and the weights that items got."""
        states = self.item(items)
        scores = torch.einsum("bd,bnd->bn", self.q(self.query(query)), self.k(states)) / math.sqrt(states.shape[-1])
        weights = (sharpen_scores(scores) if sharp else scores).softmax(-1)
        return self.named(torch.einsum("bn,bnd->bd", weights, self.v(states))), weights


def draw(
    sets: int, items: int, classes: int, generator: torch.Generator
) -> tuple[Float[Tensor, "set item feature"], Float[Tensor, "set 1"], Int[Tensor, " set"]]:
    """Items, a query that says nothing, and the class of the item with the largest number."""
    numbers = torch.rand(sets, items, generator=generator)
    kinds = torch.randint(classes, (sets, items), generator=generator)
    features = torch.cat([numbers[..., None], functional.one_hot(kinds, classes).float()], dim=-1)
    answers = kinds.gather(1, numbers.argmax(1, keepdim=True))[:, 0]
    return features, torch.rand(sets, 1, generator=generator), answers


def train_retriever(options: MaximumConfig, seed: int) -> tuple[Retriever, float]:
    """A retriever trained on few items, and its loss over the last hundred steps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Retriever(options.classes, options.width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, fused=True)
    last: list[float] = []
    for step in track_progress(range(options.steps), f"seed {seed}: training"):
        size = int(torch.randint(FEWEST, MOST + 1, (), generator=generator))
        items, query, answers = draw(options.batch_size, size, options.classes, generator)
        loss = functional.cross_entropy(model(items, query)[0], answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= options.steps - 100:
            last.append(float(loss.detach()))
    return model.eval(), sum(last) / max(1, len(last))


@torch.no_grad()
def score_retriever(model: Retriever, options: MaximumConfig, seed: int) -> pd.DataFrame:
    """A row for each number of items and `temperature` ("learned", "adaptive"): accuracy, entropy, largest weight."""
    rows = []
    for size in track_progress(options.sizes, f"seed {seed}: testing"):
        generator = torch.Generator().manual_seed(1_000_000 + 1000 * seed + size)
        sums = torch.zeros(2, 3, dtype=torch.float64)
        at_once = max(1, 2**18 // size)
        for start in range(0, options.tested, at_once):
            sets = min(at_once, options.tested - start)
            items, query, answers = draw(sets, size, options.classes, generator)
            for sharp in (False, True):
                logits, weights = model(items, query, sharp)
                right = (logits.argmax(-1) == answers).double()
                found = torch.stack([right, attention_entropy(weights).double(), weights.amax(-1).double()], dim=-1)
                sums[int(sharp)] += found.sum(0)
        for temperature, mean in zip(("learned", "adaptive"), (sums / options.tested).tolist(), strict=True):
            row = {"seed": seed, "items": size, "temperature": temperature, "n": options.tested}
            rows.append(row | dict(zip(("accuracy", "entropy", "largest"), mean, strict=True)))
    return pd.DataFrame(rows)


def maximum(options: MaximumConfig) -> pd.DataFrame:
    """Train and test what is not done yet; returns what `accuracy_table` makes of the files.

    Raises:
        PositionsError: no seeds or sizes, a number out of range, or damaged files.
    """
    if len(set(options.seeds)) < len(options.seeds) or len(set(options.sizes)) < len(options.sizes):
        raise PositionsError("a seed or a size was given twice; expected distinct ones.")
    check_number("learning_rate", options.learning_rate)
    numbers = (options.steps, options.batch_size, options.width, options.tested, *options.sizes)
    if not options.seeds or not options.sizes or min(*numbers, options.classes - 1) < 1 or min(options.seeds) < 0:
        raise PositionsError("a number of the task is too small; expected seeds from 0, 2 classes and all else from 1.")
    for number in (*numbers, options.classes, *options.seeds):
        check_whole("a number of the task", number, 0)
    options.results.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        described, table = options.results / f"seed-{seed}.json", options.results / f"seed-{seed}.csv"
        config = {name: value for name, value in asdict(options).items() if name not in ("seeds", "results")}
        config = json.loads(json.dumps(config))
        if described.is_file() and table.is_file() and read_json(described, MaximumResults)["config"] == config:
            print_progress(f"seed {seed}: done before")
            continue
        if described.is_file():
            raise PositionsError(f"{described} is of another configuration; expected another --results, or none there.")
        began = time.monotonic()
        model, loss = train_retriever(options, seed)
        csv = score_retriever(model, options, seed).to_csv(index=False, float_format="%.6g").encode()
        described.unlink(missing_ok=True)
        write_whole(table, lambda file, csv=csv: file.write(csv))  # type: ignore[misc]
        text = {"command": _command(options, seed), "config": config, "loss": round(loss, 6)}
        text |= {"seconds": math.ceil(time.monotonic() - began)}
        written = (json.dumps(text, indent=2) + "\n").encode()
        write_whole(described, lambda file, written=written: file.write(written))  # type: ignore[misc]
    return accuracy_table(pd.concat([pd.read_csv(options.results / f"seed-{seed}.csv") for seed in options.seeds]))


def _command(options: MaximumConfig, seed: int) -> str:
    """What trains and tests this seed again."""
    words = ["lens-positions", "experiments", "maximum", "--seeds", str(seed)]
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name not in ("seeds", "results") and value != field.default:
            words += [f"--{field.name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


def accuracy_table(tests: pd.DataFrame) -> pd.DataFrame:
    """Accuracy by number of items over seeds, and what the temperature changes.

    Returns:
        One row for each number of `items`: `n_seeds`; the means over seeds of `learned` and `adaptive` accuracy, of
        their `difference`, of the `entropy` and the `largest` weight of the learned attention; each of the first three
        with `_low` and `_high`, Student's 95% interval over seeds (NaN for one). `log_items` is the entropy of weights
        that are all alike.
    """
    rows = []
    for items, own in tests.groupby("items"):
        by = own.pivot(index="seed", columns="temperature", values="accuracy")
        row = {"items": items, "log_items": math.log(float(items)), "n_seeds": len(by)}  # type: ignore[arg-type]
        samples = {"learned": by["learned"], "adaptive": by["adaptive"], "difference": by["adaptive"] - by["learned"]}
        for name, values in samples.items():
            low, high = t_interval(values.to_numpy())
            row |= {name: values.mean(), f"{name}_low": low, f"{name}_high": high}
        learned = own[own["temperature"] == "learned"]
        rows.append(row | {"entropy": learned["entropy"].mean(), "largest": learned["largest"].mean()})
    return pd.DataFrame(rows)


def print_accuracies(table: pd.DataFrame) -> None:
    """Print what `accuracy_table` returns."""
    console = Console(highlight=False)
    seeds = int(table["n_seeds"].min())
    print_line(console, f"accuracy at finding the largest of n items, {seeds} seed(s), 95% intervals over seeds\n")
    names = [f"{row.items:,} items" for row in table.itertuples()]
    columns = ["learned", "adaptive", "difference", "entropy", "log n", "largest weight"]
    cells = []
    for row in table.to_dict("records"):
        written = [with_interval(row, name, ".1%", f"{name}_") for name in ("learned", "adaptive")]
        written += [with_interval(row, "difference", "+.1%", "difference_")]
        written += [f"{row['entropy']:.2f}", f"{row['log_items']:.2f}", f"{row['largest']:.3f}"]
        cells.append([Text(text) for text in written])
    print_grid(console, names, columns, cells)
