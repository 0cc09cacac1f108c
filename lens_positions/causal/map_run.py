"""A map of what a model wants its distances to be: every gap of a corpus, layer by layer.

The loss of a window is the sum of the nats of its tokens after the first, each predicted from those before it in the
window. A gap belongs to one window, that in which it stands farther from an end (`map_windows.py`), and its gradient is
that of this window's loss, in nats per position. Increments of later layers respond.

Direction: `gradient` is the derivative of the loss by the gap. Where it is negative the loss falls as the gap grows:
the model wants it longer; where it is positive, shorter. It is a slope at the increments as they are, and says nothing
of large changes (`attribution.py` says where it fails); `integrated` goes all the way from a baseline.

`map_windows.py` says which loss, of which tokens, `map_gradients.py` how it is differentiated, `map_folder.py` what is
on disk. Processes share the work by the numbers of shards: of n processes the i-th makes the shards i, i + n, i + 2n.
Each reads the whole corpus, which costs little beside the gradients, and none waits for another. What lies in the
folder is checked and kept, so that the same call goes on after an interruption, with another number of processes too.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..corpus_stream import Documents, Split
from ..errors import PositionsError
from ..interventions import HeadKind, LayerIndices, finite_number, hook_names, is_static
from ..model import HookedPositionTransformer
from ..progress import Counter
from .map_folder import SHARD, GapMap, begin, digest_of, remove_leftovers, weights_digest, write_end, write_shard
from .map_gradients import Baseline, Gradients, WindowGradients, batches_of, is_offloaded
from .map_rows import rows_of
from .map_windows import Window, digest, shards_of, tokens_of
from .sweeps import HEAD_SITES, SITES, By, head_count

WINDOW = 256
"""Tokens of a window, where the model's context is as long."""


def gap_map(
    model: HookedPositionTransformer,
    corpus: str | Iterable[str],
    folder: str | Path,
    *,
    split: Split = "heldout",
    characters: int | None = None,
    text_column: str = "text",
    layers: LayerIndices = None,
    by: By = "layer",
    heads: HeadKind = "query",
    window: int | None = None,
    overlap: int | None = None,
    baseline: Baseline | None = None,
    steps: int = 256,
    jieba: bool = False,
    prepend_bos: bool | None = None,
    shard: int = 32,
    batch: int = 1024,
    pieces: bool | None = None,
    processes: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> GapMap:
    """Write the derivative of the loss by every gap of a corpus, at every layer, to a folder of Parquet files.

    Args:
        model: the model, on whatever device it is, or on several.
        corpus: a name, a file, a folder or a dataset of the hub, as `corpora.load` takes them, or documents as texts.
        folder: a new folder, or one with a part of this very map, which is gone on with.
        split: the held-out documents of a corpus, or "all" of it.
        characters: at most so many, as `corpora.heldout_excerpts` (of "all", the first ones).
        text_column: of a table or a hub dataset.
        layers: the model's own layer numbers; None is all that rotate.
        by, heads: as for `gap_sweep`: "head" has a row for each gap, layer and head; of key-value heads, the sum of the
            query heads that share their keys.
        window: tokens that the model reads at once; None is 256, or its context.
        overlap: tokens that a window shares with the next; None is a quarter of a window.
        baseline: also integrate from these increments to the model's own (a number or "mean", as for `attribution`).
        steps: points of that path at most; each window gets as many as it needs, from 16.
        jieba: let jieba find the words of Chinese, so that gaps between its characters can cross a word's boundary.
        prepend_bos: whether texts get the beginning-of-sequence token; None is TransformerLens' default.
        shard: windows a file. What a process has of a shard when it is killed is lost.
        batch: tokens that run together. It changes values by rounding alone.
        pieces: run each block again in the backward pass, for memory's sake; None does so where weights are offloaded.
        processes: which of how many processes this is.
        progress: say on standard error how far it is.

    Raises:
        PositionsError: no text, no such layer, sizes that do not fit, a folder of something else or without room.

    >>> found = lp.causal.gap_map(model, texts, folder / "map", layers=[0, 1], progress=False)
    >>> len(found.table(["gradient"]))  # nats per position, of 526 gaps at two layers
    1052
    """
    _check_processes(processes)
    text = MapText(corpus, split, characters, text_column, jieba, prepend_bos)
    plan = plan_map(
        model, text, layers, by, heads, baseline, window=window, overlap=overlap, shard=shard, batch=batch, steps=steps
    )
    return run_map(plan, begin(Path(folder), plan.settings), pieces, processes, progress)


@dataclass(frozen=True)
class MapText:
    """The text of a map, as `gap_map` is given it."""

    corpus: str | Iterable[str]
    split: Split
    characters: int | None
    text_column: str
    jieba: bool
    prepend_bos: bool | None

    def documents(self) -> Documents:
        """Find the corpus, and read it through once where it is made of files."""
        return Documents(self.corpus, self.split, self.characters, self.text_column)


@dataclass(frozen=True)
class MapSizes:
    """How much of a map is made at once; tokens, but for `shard` (windows) and `steps` (points of a path)."""

    window: int
    overlap: int
    shard: int
    batch: int
    steps: int


@dataclass(frozen=True)
class MapPlan:
    """What a map is of, when all of it was checked and nothing is computed yet.

    Attributes:
        hooks: the number of each layer, and the name of the hook of its increments, or of those of its query heads.
        heads: by head, their kind and how many a layer has; None by layer.
        baseline: increments where the path of the integrated attribution begins; None for the gradient alone.
    """

    model: HookedPositionTransformer
    hooks: list[tuple[int, str]]
    heads: tuple[HeadKind, int] | None
    text: MapText
    documents: Documents
    sizes: MapSizes
    baseline: Baseline | None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What map.json says: whatever rows depend on.

        `batch` and `pieces` are not in it: they change values by rounding alone.
        """
        return {
            "model": self.model.name,
            "weights": weights_digest(self.model),
            "positions": asdict(self.model.position_config),
            "corpus": self.documents.name,
            "split": self.text.split,
            "characters": self.text.characters,
            "layers": [layer for layer, _ in self.hooks],
            "heads": None if self.heads is None else self.heads[0],
            "window": self.sizes.window,
            "overlap": self.sizes.overlap,
            "shard": self.sizes.shard,
            "baseline": self.baseline,
            "steps": self.sizes.steps if self.baseline is not None else None,
            "jieba": self.text.jieba,
            "bos": self.text.prepend_bos,
        }


def plan_map(
    model: HookedPositionTransformer,
    text: MapText,
    layers: LayerIndices,
    by: By,
    heads: HeadKind,
    baseline: Baseline | None,
    *,
    window: int | None,
    overlap: int | None,
    **sizes: int,
) -> MapPlan:
    """Check what a map is asked to be; arguments as those of `gap_map`.

    Raises:
        PositionsError: as `gap_map`, but for what is on disk.
    """
    count = head_count(model, by, heads)
    hooks = hook_names(model, layers, HEAD_SITES["increments"] if by == "head" else SITES["increments"][0])
    chosen = _sizes_that_fit(model.cfg.n_ctx, window, overlap, sizes)
    if baseline is not None:
        baseline = _informative_baseline(model, baseline)

    # Last, as it reads the whole corpus: a mistake elsewhere should not wait for that.
    return MapPlan(model, hooks, (heads, count) if by == "head" else None, text, text.documents(), chosen, baseline)


def run_map(plan: MapPlan, kept: GapMap, pieces: bool | None, processes: tuple[int, int], progress: bool) -> GapMap:
    """Make what a map does not have yet of its plan; arguments as those of `gap_map`."""
    model, sizes, text = plan.model, plan.sizes, plan.text
    pieces = is_offloaded(model) if pieces is None else pieces
    names, heads = [name for _, name in plan.hooks], None if plan.heads is None else plan.heads[1]
    gradients = WindowGradients(model, names, plan.baseline, sizes.steps, pieces, heads)

    # Generators all the way: a corpus of any length is read, cut and mapped a shard at a time.
    tokens = tokens_of(model, plan.documents, text.jieba, text.prepend_bos)
    work = shards_of(tokens, sizes.window, sizes.overlap, sizes.shard)
    with Counter(f"map of {model.name}", plan.documents.characters, quick=not progress) as counter:
        _make_shards(kept, work, gradients, processes, sizes.batch, counter)
    return kept


def _make_shards(
    kept: GapMap,
    work: Iterable[list[Window]],
    gradients: WindowGradients,
    processes: tuple[int, int],
    batch: int,
    counter: Counter,
) -> None:
    """Make the shards of this process that are not there, and note where the corpus ends."""
    remove_leftovers(kept.folder, processes)
    process, count = processes
    layers = kept.settings["layers"]
    counts = {"shards": 0, "documents": 0, "gaps": 0}
    for number, windows in enumerate(work):
        counts["shards"] += 1
        counts["documents"] += sum(one.number == 0 for one in windows)
        counts["gaps"] += sum(one.end - one.first for one in windows)

        # Each process counts the whole corpus, so that whoever reaches its end can write end.json, and makes its share.
        if number % count != process or _is_there(kept, number, windows):
            counter.skip(sum(one.characters for one in windows))
            continue

        rows = rows_of(windows, _gradients_of(windows, gradients, batch, counter), layers)
        write_shard(kept.folder, number, rows, digest(windows))

    if not counts["gaps"]:
        raise PositionsError(f"{kept.settings['corpus']} has no document of two tokens; expected at least one gap.")
    write_end(kept.folder, counts)


def _gradients_of(windows: list[Window], gradients: WindowGradients, batch: int, counter: Counter) -> list[Gradients]:
    """What the backward passes of a shard give, in the order of its windows."""
    # Batches take the longest windows first, and say which these are.
    found: dict[int, Gradients] = {}
    for chosen, together in batches_of([one.ids for one in windows], batch):
        found |= zip(chosen, gradients(together), strict=True)
        gaps = sum(windows[i].end - windows[i].first for i in chosen)
        counter.add(sum(windows[i].characters for i in chosen), gaps, "gaps")
    return [found[i] for i in range(len(windows))]


def _is_there(kept: GapMap, number: int, windows: list[Window]) -> bool:
    """Whether a shard was written before, of these very windows."""
    path = kept.folder / SHARD.format(number)
    if not path.exists():
        return False

    # Settings alone do not tell: a file of the same name may have other text by now.
    if digest_of(path) != digest(windows):
        raise PositionsError(
            f"{path} is of other text than {kept.settings['corpus']} has there now; expected the corpus that the map "
            "was begun with, or another folder."
        )
    return True


def _check_processes(processes: tuple[int, int]) -> None:
    if not 0 <= processes[0] < processes[1]:
        raise PositionsError(f"processes is {processes}; expected the number of one, from 0, and how many there are.")


def _sizes_that_fit(context: int, window: int | None, overlap: int | None, others: dict[str, int]) -> MapSizes:
    """All sizes, with the defaults of those that are None."""
    window = min(context, WINDOW) if window is None else window
    overlap = window // 4 if overlap is None else overlap

    # A larger overlap than half a window would put some tokens into three windows.
    if not 4 <= window <= context:
        raise PositionsError(f"window is {window}; expected from 4 to {context} tokens, the model's context.")
    if not 2 <= overlap <= window // 2:
        raise PositionsError(f"overlap is {overlap}; expected from 2 tokens to half of a window ({window // 2}).")
    for name, size in others.items():
        if size < 1:
            raise PositionsError(f"{name} is {size}; expected at least 1.")
    return MapSizes(window, overlap, **others)


def _informative_baseline(model: HookedPositionTransformer, baseline: Baseline) -> Baseline:
    """The baseline, if the path from it to the model's own increments has any length."""
    if baseline == "mean":
        same = is_static(model)
    elif isinstance(baseline, str):
        raise PositionsError(f'baseline is {baseline!r}; expected a number of positions or "mean".')
    else:
        baseline = finite_number(baseline, "baseline", "a finite number of positions")
        same = is_static(model) and baseline == 1
    if same:
        raise PositionsError(
            f"baseline is {baseline!r} and every increment of {model.name} is 1.0, so that every part is 0; expected "
            "another one (0.0 puts all tokens in one place)."
        )
    return baseline
