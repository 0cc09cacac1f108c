"""Maps of a corpus: `map` makes one, and `summarise` says what it shows."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

import lens_positions as lp

from ..errors import PositionsError, check_seed
from ..terminal import print_line, with_interval
from .app import BOS_OF_MODEL, Bos, announce_figure, app, check_outputs, write_table
from .durations import announce_duration

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from rich.console import Console

    from ..causal.map_folder import GapMap


@dataclass(frozen=True)
class MapFlags:
    """What is mapped, and how much at once.

    Attributes:
        split: the held-out documents, or all.
        characters: at most so much text, taken evenly from the held-out documents.
        text_column: of a table or a hub dataset.
        layers: the layers to map; all of them if none is named.
        by: layer, or head: a row for each head as well.
        heads: query heads, or key_value heads: the query heads that share their keys together.
        window: tokens that the model reads at once; 256 or its context by default.
        overlap: tokens that a window shares with the next; a quarter by default.
        baseline: also integrate from these increments to the model's own: a number or mean.
        steps: points of that path at most.
        jieba: let jieba cut Chinese into words.
        shard: windows a file.
        batch: tokens that run together.
    """

    split: Literal["heldout", "all"] = "heldout"
    characters: int | None = None
    text_column: str = "text"
    layers: Annotated[tuple[int, ...], arg(metavar="LAYER ...")] = ()
    by: Literal["layer", "head"] = "layer"
    heads: Literal["query", "key_value"] = "query"
    window: int | None = None
    overlap: int | None = None
    baseline: str | None = None
    steps: int = 256
    jieba: bool = False
    shard: int = 32
    batch: int = 1024

    def arguments(self) -> dict[str, Any]:
        """What `gap_map` takes under these names."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**given, "layers": self.layers or None, "baseline": _baseline(self.baseline)}


@dataclass(frozen=True)
class LoadingFlags:
    """How the model is loaded.

    Attributes:
        device_map: put one model on several devices, such as auto; no processes then.
        dtype: of the weights, such as bfloat16.
        offload_folder: where weights wait that fit nowhere else.
    """

    device_map: str | None = None
    dtype: str | None = None
    offload_folder: Annotated[Path | None, arg(metavar="FOLDER")] = None

    def load(self, model: str, device: "torch.device") -> "lp.HookedPositionTransformer":
        """The model, on the device of this process or on several."""
        import torch

        how: dict[str, Any] = {}
        if self.dtype is not None:
            if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
                raise PositionsError(f"--dtype is {self.dtype!r}; expected one such as float32 or bfloat16.")
            how["dtype"] = getattr(torch, self.dtype)

        if self.device_map is not None:
            how["device_map"] = self.device_map
        elif device.type == "cuda":
            how["device_map"] = {"": device}
        if self.offload_folder is not None:
            how["offload_folder"] = str(self.offload_folder)
        return lp.HookedPositionTransformer.from_pretrained(model, **how)


MAP_DEFAULTS = MapFlags()
LOADING_DEFAULTS = LoadingFlags()


@app.command
def map(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    corpus: str,
    output: Annotated[Path, arg(metavar="FOLDER")],
    flags: Annotated[MapFlags, arg(name="")] = MAP_DEFAULTS,
    loading: Annotated[LoadingFlags, arg(name="")] = LOADING_DEFAULTS,
    bos: Bos = BOS_OF_MODEL,
) -> None:
    """Map every gap of a corpus: which ones the model would have longer, and which shorter, by layer.

    Under `accelerate launch` or `torchrun` the processes share the work, each with a model on a device of its own. The
    same command goes on with a map that was interrupted.

    Takes about 40 seconds for 100,000 characters with a shipped model, more with larger ones.

    Args:
        model: a folder, an adapter, the name of a packaged model, or a model of the hub.
        corpus: english, chinese, bilingual, code, a file, a folder, or a dataset of the hub, which is streamed.
        output: the folder for the map's Parquet files.
        flags: what is mapped, and how much at once.
        loading: how the model is loaded.
    """
    chosen = {**flags.arguments(), "prepend_bos": bos.prepend()}

    import torch
    from accelerate import PartialState
    from rich.console import Console

    # Without an accelerator several processes are only seen where that is said. What it says is not typed.
    state: Any = PartialState(cpu=not torch.accelerator.is_available())
    if loading.device_map is not None and state.num_processes > 1:
        raise PositionsError(
            f"--device-map {loading.device_map} was given to {state.num_processes} processes; expected one process for "
            "a model on several devices, or a model for each process."
        )

    if state.is_main_process:
        announce_duration("map", _most_characters(corpus, flags))
    loaded = loading.load(model, state.device)

    # One process speaks for all: each has its own part, and the first its bar.
    share = (state.process_index, state.num_processes)
    found = lp.causal.gap_map(loaded, corpus, output, **chosen, processes=share, progress=state.is_main_process)
    if state.is_main_process:
        print_line(Console(highlight=False), _summary_line(found))
    state.destroy_process_group()


def _most_characters(corpus: str, flags: MapFlags) -> int | None:
    """How much text a map reads at most; None where only reading it would tell."""
    if flags.characters is not None or not Path(corpus).is_file():
        return flags.characters

    # Bytes, of which a character has one or more.
    size = Path(corpus).stat().st_size
    return size // lp.corpora.HELDOUT_EVERY if flags.split == "heldout" else size


def _baseline(given: str | None) -> float | Literal["mean"] | None:
    """What stands after --baseline, as `gap_map` takes it."""
    if given is None or given == "mean":
        return given  # type: ignore[return-value]
    try:
        return float(given)
    except ValueError:
        raise PositionsError(f"--baseline is {given!r}; expected a number of positions, or mean.") from None


def _summary_line(found: "GapMap") -> str:
    """What is in the folder by now."""
    end = found.end or {}

    # Other processes may still be writing: what is here so far is what can be said.
    there, every = len(found.shards), end.get("shards", 0)
    whole = "" if there == every else f"; {there} of {every} shards are there, and other processes have the rest"
    return f"map: {found.folder}, {end.get('gaps', 0):,} gaps of {end.get('documents', 0):,} documents{whole}"


@app.command
def summarise(
    maps: Annotated[Positional[tuple[Path, ...]], arg(metavar="MAP ...")],
    by: Literal["boundary", "before_kind", "after_kind"] = "boundary",
    shuffles: int = 100,
    seed: int = 0,
    csv: Annotated[Path | None, arg(metavar="FILE")] = None,
    figure: Annotated[Path | None, arg(metavar="FILE")] = None,
) -> None:
    """Show which gaps a model would have longer and which shorter, from maps that `map` made.

    Takes about 10 seconds for a map of 3,000 gaps, longer for larger ones.

    Args:
        maps: their folders; that of a control beside another, say.
        by: the strongest boundary that a gap crosses, or the kind of the token before or after it.
        shuffles: of the gaps within each document, as a control.
        seed: of the shuffles and the intervals.
        csv: write the table, with every layer, to this file.
        figure: draw it, as .png, .svg or .pdf.
    """
    check_outputs(csv, figure)
    check_seed(seed)
    if not maps:
        raise PositionsError("no map was named; expected at least one folder that lens-positions map wrote.")

    from rich.console import Console

    table = lp.causal.map_summary(maps, by, seed, shuffles)
    console = Console(highlight=False)
    _print_summary(console, table, by, shuffles)
    if csv is not None:
        write_table(table, csv)
        print_line(console, f"table: {csv}")

    if figure is not None:
        counts = table[table["layer"] == "all"].groupby(["model", "corpus"], sort=False)["n"].sum()
        gaps = " and ".join(f"{n:,} gaps" for n in counts)
        caption = (
            f"{gaps}. Intervals: 95% of resamples of documents; shuffled: 95% of {shuffles} shuffles of the gaps "
            f"within each document, seed {seed}."
        )
        with announce_figure(console, figure):
            lp.viz.map_chart(table, caption, figure)


def _print_summary(console: "Console", table: "pd.DataFrame", by: str, shuffles: int) -> None:
    """The sums over layers, and how many layers are decided."""
    for (model, corpus), rows in table.groupby(["model", "corpus"], sort=False):
        print_line(console, f"{model}: mean gradient of the loss by the gap, nats per position, {corpus}")
        print_line(console, f"below 0 is longer; 95% intervals resample documents; [shuffled: 95% of {shuffles}]\n")
        whole = rows[rows["layer"] == "all"]

        # Names of the groups in one column, whatever their length.
        width = max(len(str(name)) for name in whole[by])
        for row in whole.to_dict("records"):
            # The sum over layers may hide that they disagree, so it comes with how many go which way.
            layers = rows[(rows[by] == row[by]) & (rows["layer"] != "all")]["wants"]
            decided = f"of {len(layers)} layers {sum(layers == 'longer')} longer, {sum(layers == 'shorter')} shorter"
            shuffled = f"[{row['shuffled_low']:+.4f} to {row['shuffled_high']:+.4f}]"
            n = f"n = {row['n']:,} in {row['documents']:,} documents"
            mean = with_interval(row, "gradient", "+.4f")
            print_line(console, f"  {row[by]:{width}}  {mean}  {shuffled}  {row['wants']}; {decided}; {n}")
        console.print()
