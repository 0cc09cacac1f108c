"""What the demo's model learned: its training time, its held-out loss, and its increments by kind of byte.

    python benchmarks/quick.py [--run demo-output/quick] [--output benchmarks/quick.json]

Increments are measured on held-out documents, every 4th of the mixed corpus; intervals resample documents. The control
is the same model before training, whose increments are all 1.
"""

import json
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from lens_positions import HookedPositionTransformer, PositionsError, corpora
from lens_positions.analysis.token_kinds import increments_by_category
from lens_positions.training.config import TrainConfig, update_config

AT_MOST_MINUTES = 5.0
AT_MOST_NATS = 1.75
AT_LEAST_RATIO = 1.3


@dataclass
class Options:
    """Options.

    Args:
        run: the folder of a finished run.
        output: where the figures are written as JSON.
    """

    run: Path = Path("demo-output/quick")
    output: Path = Path("benchmarks/quick.json")


def main(options: Options) -> None:
    """Measure a finished run, print the figures and write them."""
    if not (options.run / "model").is_dir():
        raise PositionsError(f"{options.run} has no finished model; expected the folder of a run: make demo makes one.")
    saved = json.loads((options.run / "training.json").read_text("utf-8"))
    config = update_config(TrainConfig(), saved["config"], str(options.run / "training.json"))
    log = [json.loads(line) for line in (options.run / "log.jsonl").read_text("utf-8").splitlines()]
    speed = [record["tokens_per_second"] for record in log if "tokens_per_second" in record][-1]
    evaluation = [record for record in log if "heldout_nats_per_byte" in record][-1]

    model = HookedPositionTransformer.from_pretrained(options.run / "model")
    documents = corpora.load(config.corpus)["heldout"]["text"][::4]
    table = increments_by_category(model, documents)
    first = table[table["layer"] == 0].set_index("kind")
    ratio = first.loc["space", "mean"] / first.loc["letter", "mean"]
    described = {
        "command": "make demo; python benchmarks/quick.py",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "seed": config.seed,
        "training_minutes": round(config.steps * config.batch_size * config.model.n_ctx / speed / 60, 2),
        "heldout_nats_per_byte": round(evaluation["heldout_nats_per_byte"], 4),
        "heldout_bytes": evaluation["heldout_bytes"],
        "layer_0_space_over_letter": round(ratio, 3),
        "heldout_documents": len(documents),
        "increments": table.round(4).to_dict("records"),
    }
    options.output.write_text(json.dumps(described, indent=1) + "\n", "utf-8")
    means = table.pivot(index="kind", columns="layer", values="mean").reindex(table["kind"].unique())
    print(means.round(2).to_string())
    for name, value, limit in (
        ("training_minutes", described["training_minutes"], f"at most {AT_MOST_MINUTES}"),
        ("heldout_nats_per_byte", described["heldout_nats_per_byte"], f"below {AT_MOST_NATS}"),
        ("layer_0_space_over_letter", described["layer_0_space_over_letter"], f"at least {AT_LEAST_RATIO}"),
    ):
        print(f"{name}: {value} ({limit} is expected)")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except PositionsError as error:
        raise SystemExit(f"quick: {error}") from None
