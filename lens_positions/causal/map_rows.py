"""The rows of a map: one for each gap of a shard, layer by layer."""

from typing import Any

import numpy as np
import pyarrow as pa

from ..measure.text_boundaries import BOUNDARIES, UNKNOWN
from .map_gradients import Gradients
from .map_windows import Window


def rows_of(windows: list[Window], gradients: list[Gradients], layers: list[int]) -> pa.Table:
    """The table of a shard, sorted by document, gap, layer and head; `GapMap` says what its columns are."""
    return pa.concat_tables(
        [_of_window(window, found, layers) for window, found in zip(windows, gradients, strict=True)],
    ).unify_dictionaries()


def _of_window(window: Window, found: Gradients, layers: list[int]) -> pa.Table:
    here = np.arange(window.first, window.end)  # the token after each gap, in the document
    place = here - window.start  # and in the window
    heads = found.gradient.shape[2:]
    repeats = len(layers) * int(np.prod(heads, dtype=int))

    def of_gaps(values: Any, kind: Any) -> pa.Array:
        """A value a gap, at each of its rows."""
        return pa.array(np.repeat(np.asarray(values), repeats), kind, from_pandas=True)

    def words(values: list[str], tokens: np.ndarray) -> pa.Array:
        named, codes = np.unique([values[i] for i in tokens], return_inverse=True)
        indices = pa.array(np.repeat(codes, repeats), pa.int32())
        return pa.DictionaryArray.from_arrays(indices, pa.array(named.tolist(), pa.string()))

    def of_rows(values: np.ndarray) -> pa.Array:
        """A value a gap and layer (and head)."""
        return pa.array(np.moveaxis(values[:, place], 0, 1).reshape(-1), pa.float32())

    tokens = window.tokens
    ids = tokens.ids.numpy()
    count = len(here) * repeats

    # Rows run gap by gap, in a gap layer by layer, in a layer head by head: every column is in that order.
    columns: dict[str, pa.Array] = {
        "document": pa.array(np.full(count, tokens.number), pa.int64()),
        "source": words([tokens.document.source], np.zeros(len(here), dtype=int)),
        "window": pa.array(np.full(count, window.number), pa.int32()),
        "index": of_gaps(here, pa.int32()),
        "layer": pa.array(np.tile(np.repeat(layers, int(np.prod(heads, dtype=int))), len(here)), pa.int16()),
    }
    if heads:
        columns["head"] = pa.array(np.tile(np.arange(heads[0]), len(here) * len(layers)), pa.int16())

    # Text and kinds repeat so often that dictionaries keep a shard small.
    for side, at in (("before", here - 1), ("after", here)):
        columns[side] = words(tokens.labels, at)
        columns[f"{side}_id"] = of_gaps(ids[at], pa.int32())
        columns[f"{side}_kind"] = words(tokens.kinds, at)
        columns[f"{side}_surprisal"] = of_gaps(found.surprisal[at - window.start], pa.float32())
    for name in BOUNDARIES:
        # Unknown is null, and neither yes nor no: whoever counts must decide.
        crossed = tokens.boundaries[name][here]
        columns[f"crosses_{name}"] = pa.array(
            np.repeat(crossed == 1, repeats), pa.bool_(), mask=np.repeat(crossed == UNKNOWN, repeats)
        )

    columns["context"] = of_gaps(place, pa.int32())
    columns["future"] = of_gaps(window.stop - 1 - here, pa.int32())
    columns["increment"] = of_rows(found.increments)
    columns["gradient"] = of_rows(found.gradient)
    if found.integrated is not None:
        columns["integrated"] = of_rows(found.integrated)
        columns["integrated_off"] = pa.array(np.full(count, found.off), pa.float32(), from_pandas=True)
    return pa.table(columns)
