"""A map of what a model wants its distances to be: every gap of a corpus, layer by layer.

Direction: `gradient` is the derivative of the loss by the gap. Where it is negative the loss falls as the gap grows:
the model wants it longer; where it is positive, shorter. It is a slope at the increments as they are, and says nothing
of large changes (`attribution.py` says where it fails); `integrated` goes all the way from a baseline.

`map_windows.py` says which loss, of which tokens, `map_gradients.py` how it is differentiated, `map_folder.py` what is
on disk. Processes share the work by the numbers of shards: of n processes the i-th makes the shards i, i + n, i + 2n.
Each reads the whole corpus, which costs little beside the gradients, and none waits for another. What lies in the
folder is checked and kept, so that the same call goes on after an interruption, with another number of processes too.
"""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from ..corpus_stream import Documents, Split
from ..errors import PositionsError
from ..interventions import LayerIndices, finite_number, hook_names, is_static
from ..model import HookedPositionTransformer
from ..progress import Counter
from .map_folder import SHARD, GapMap, begin, digest_of, weights_digest, write_end, write_shard
from .map_gradients import Baseline, Gradients, WindowGradients, batches_of, is_offloaded
from .map_rows import rows_of
from .map_windows import Window, digest, shards_of, tokens_of

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

    The loss of a window is the sum of the nats of its tokens after the first, each predicted from those before it in
    the window. A gap belongs to one window, that in which it stands farther from an end (`causal/map_windows.py`), and
    its gradient is that of this window's loss, in nats per position. Increments of later layers respond.

    Args:
        model: the model, on whatever device it is, or on several.
        corpus: a name, a file, a folder or a dataset of the hub, as `corpora.load` takes them, or documents as texts.
        folder: a new folder, or one with a part of this very map, which is gone on with.
        split: the held-out documents of a corpus, or "all" of it.
        characters: at most so many, as `corpora.heldout_excerpts` (of "all", the first ones).
        text_column: of a table or a hub dataset.
        layers: the model's own layer numbers; None is all that rotate.
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

    Returns:
        The map. A row is a gap at a layer (and head, where each has its own): `document` (its number), `source`,
        `window`, `index` (of the token after the gap), `layer`, `head`; of the tokens on both sides `before` and
        `after` (text), `_id`, `_kind`, `_surprisal` (nats; none for a document's first token); `crosses_word` (null
        between Chinese characters that nobody has cut into words), `crosses_sentence`, `crosses_line` and
        `crosses_document` (`measure/text_boundaries.py` has the rules); `context`, the tokens of the window before the
        gap, and `future`, those after the next one, which are all that the gap can change; `increment`, in positions;
        `gradient`; and on request `integrated` (nats) with `integrated_off`, how far the parts of its window are from
        the whole, as a share of it.

    Raises:
        PositionsError: no corpus or one without text, no such layer, sizes that do not fit, a folder that has something
            else or no room. What is in the folder stays.

    >>> found = lp.causal.gap_map(model, texts, folder / "map", layers=[0, 1], progress=False)
    >>> rows = found.table(["index", "layer", "before", "after", "crosses_word", "gradient"])
    >>> rows[rows["layer"] == 0].iloc[2:5].round(1)
       index  layer before after  crosses_word  gradient
    4      3      0      h     e         False      -0.3
    6      4      0      e                True      -1.0
    8      5      0            c          True      -0.6
    """
    if not 0 <= processes[0] < processes[1]:
        raise PositionsError(f"processes is {processes}; expected the number of one, from 0, and how many there are.")
    names = hook_names(model, layers, "attn.hook_increments")
    window, overlap = _sizes(model, window, overlap, {"shard": shard, "batch": batch, "steps": steps})
    if baseline is not None:
        baseline = _checked(model, baseline)
    documents = Documents(corpus, split, characters, text_column)
    settings = {
        "model": model.name,
        "weights": weights_digest(model),
        "positions": asdict(model.position_config),
        "corpus": documents.name,
        "split": split,
        "characters": characters,
        "layers": [layer for layer, _ in names],
        "window": window,
        "overlap": overlap,
        "shard": shard,
        "baseline": baseline,
        "steps": steps if baseline is not None else None,
        "jieba": jieba,
        "bos": prepend_bos,
    }
    kept = begin(Path(folder), settings)
    pieces = is_offloaded(model) if pieces is None else pieces
    gradients = WindowGradients(model, [name for _, name in names], baseline, steps, pieces)
    work = shards_of(tokens_of(model, documents, jieba, prepend_bos), window, overlap, shard)
    with Counter(f"map of {model.name}", documents.characters, quick=not progress) as counter:
        _make_shards(kept, work, gradients, processes, batch, counter)
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
    process, count = processes
    layers = kept.settings["layers"]
    counts = {"shards": 0, "documents": 0, "gaps": 0}
    for number, windows in enumerate(work):
        counts["shards"] += 1
        counts["documents"] += sum(one.number == 0 for one in windows)
        counts["gaps"] += sum(one.end - one.first for one in windows)
        if number % count != process or _is_there(kept, number, windows):
            counter.skip(sum(one.characters for one in windows))
            continue
        rows = rows_of(windows, _found(windows, gradients, batch, counter), layers)
        write_shard(kept.folder, number, rows, digest(windows))
    if not counts["gaps"]:
        raise PositionsError(f"{kept.settings['corpus']} has no document of two tokens; expected at least one gap.")
    write_end(kept.folder, counts)


def _found(windows: list[Window], gradients: WindowGradients, batch: int, counter: Counter) -> list[Gradients]:
    """What the backward passes of a shard give, in the order of its windows."""
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
    if digest_of(path) != digest(windows):
        raise PositionsError(
            f"{path} is of other text than {kept.settings['corpus']} has there now; expected the corpus that the map "
            "was begun with, or another folder."
        )
    return True


def _sizes(
    model: HookedPositionTransformer, window: int | None, overlap: int | None, others: dict[str, int]
) -> tuple[int, int]:
    """The window and the overlap, of sizes that fit."""
    context = model.cfg.n_ctx
    window = min(context, WINDOW) if window is None else window
    overlap = window // 4 if overlap is None else overlap
    if not 4 <= window <= context:
        raise PositionsError(f"window is {window}; expected from 4 to {context} tokens, the model's context.")
    if not 2 <= overlap <= window // 2:
        raise PositionsError(f"overlap is {overlap}; expected from 2 tokens to half of a window ({window // 2}).")
    for name, size in others.items():
        if size < 1:
            raise PositionsError(f"{name} is {size}; expected at least 1.")
    return window, overlap


def _checked(model: HookedPositionTransformer, baseline: Baseline) -> Baseline:
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
