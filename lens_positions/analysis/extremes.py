"""Extremes: the tokens that a source puts farthest from and nearest to the token before them.

A shared or frozen source gives each token id one increment, so the whole vocabulary can be ranked. A per-layer source
gives an increment to each occurrence, so a corpus is ranked, and each token stands with its context. Both are compared
with the layer's mean: a constant factor on all increments is a change of scale, not of what is near or far.

These are extremes, picked from many: they suggest what to test. The table by kind of token
(`increments_by_category`) has the intervals.
"""

import pandas as pd
import torch

from ..core.attach import increment_table
from ..errors import PositionsError
from ..former_names import getattr_with_former_names
from ..measure.corpus_reader import CorpusIncrements, Texts, read_corpus
from ..measure.kinds import kinds
from ..model import HookedPositionTransformer
from ..text import Mask
from ..tokenizer import byte_labels, is_byte_tokenizer
from .token_kinds import corpus_kinds

CONTEXT_CHARACTERS = 24


def extreme_tokens(
    model: HookedPositionTransformer,
    texts: Texts | CorpusIncrements | None = None,
    top: int = 10,
    *,
    attention_mask: Mask = None,
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """The tokens with the largest and the smallest increments, at each layer.

    Args:
        model: a graft or a trained model; increments per head are averaged over the heads.
        texts: documents, as for `increments_by_category`; None ranks the whole vocabulary, which a shared or frozen
            source allows.
        top: how many tokens at each end; each token id is listed once, by its most extreme occurrence.
        attention_mask, prepend_bos: as for `analysis.read_corpus`.

    Returns:
        One row for each layer, end and rank: `layer`, `end` ("largest" or "smallest"), `rank`, `token`, `kind`,
        `increment` (in positions), `relative` (to the mean increment of the layer, over the vocabulary or the texts),
        and of the texts `context` (the token in ⟦ ⟧), `n` (occurrences of the token) and `mean_of_token` over them.

    Raises:
        PositionsError: a static source, one that needs texts and none given, no tokenizer, or a top below 1.

    >>> table = lp.analysis.extreme_tokens(model, texts, top=1)
    >>> table.loc[table["layer"] == 0, ["end", "token", "kind", "increment", "n"]].round(1)
            end token         kind  increment   n
    0   largest     ,  punctuation        4.2   5
    1  smallest     r       letter        1.0  19
    """
    if top < 1:
        raise PositionsError(f"top is {top}; expected at least 1.")
    if model.tokenizer is None:
        raise PositionsError("the model has no tokenizer; expected one, to name its tokens.")
    if model.position_config.source == "static":
        raise PositionsError("the source is static, so every increment is 1; expected a learned or frozen one.")
    if texts is None and (attention_mask is not None or prepend_bos is not None):
        raise PositionsError(
            "attention_mask or prepend_bos was given without texts; expected texts (--corpus on the command line), as "
            "the whole vocabulary has none."
        )
    if texts is not None:
        return _of_texts(model, read_corpus(model, texts, attention_mask, prepend_bos), top)
    if model.position_streams.shared_source is None:
        raise PositionsError(
            f"the source is {model.position_config.source!r}, whose increments are no function of the token alone; "
            "expected texts to read (--corpus on the command line)."
        )
    table = vocabulary_increments(model)
    ranked = []
    for end, ascending in (("largest", False), ("smallest", True)):
        rows = table.sort_values("increment", ascending=ascending, kind="stable").head(top)
        ranked.append(rows.assign(layer=0, end=end, rank=range(1, len(rows) + 1)))
    columns = ["layer", "end", "rank", "token", "kind", "increment", "relative"]
    return pd.concat(ranked, ignore_index=True)[columns]


def vocabulary_increments(model: HookedPositionTransformer) -> pd.DataFrame:
    """The increment of every token id, from a shared or frozen source: `id`, `token`, `kind`, `increment`, `relative`.

    `relative` is to the mean over the vocabulary, in which every id counts once. Ids without a token are left out.

    Raises:
        PositionsError: the source's increments are no function of the token alone.
    """
    increments = increment_table(model).double()

    # A table per head is averaged, as a token is ranked as a whole.
    increments = increments.mean(-1) if increments.ndim == 2 else increments
    pieces = model.tokenizer.convert_ids_to_tokens(range(len(increments)))

    # Embeddings may have more rows than the tokenizer has tokens: those ids stand for nothing.
    ids = torch.tensor([i for i, piece in enumerate(pieces) if piece is not None])
    values = increments.cpu()[ids].numpy()
    names = [_label(model, i) for i in ids.tolist()]
    columns = {"id": ids.numpy(), "token": names, "kind": kinds(model, ids), "increment": values}
    return pd.DataFrame(columns).assign(relative=values / values.mean())


def _of_texts(model: HookedPositionTransformer, corpus: CorpusIncrements, top: int) -> pd.DataFrame:
    tokens = pd.DataFrame({"document": corpus.document, "index": corpus.index})
    tokens["id"] = corpus.ids()
    tokens["kind"] = corpus_kinds(model, corpus)
    tables = []
    for layer, values in zip(corpus.layers, corpus.increments.mean(axis=1), strict=True):
        tokens["increment"] = values

        # A token that is frequent would fill the list by itself: each id is shown at its own extreme.
        by_id = tokens.groupby("id")["increment"]
        for end, found in (("largest", by_id.idxmax()), ("smallest", by_id.idxmin())):
            rows = tokens.loc[found].sort_values("increment", ascending=end == "smallest", kind="stable").head(top)
            tables.append(
                rows.assign(
                    layer=layer,
                    end=end,
                    rank=range(1, len(rows) + 1),
                    token=[_label(model, i) for i in rows["id"]],
                    relative=rows["increment"] / values.mean(),
                    context=[
                        _context(model, corpus.documents[d].tolist(), i)
                        for d, i in zip(rows["document"], rows["index"], strict=True)
                    ],
                    n=by_id.size()[rows["id"]].to_numpy(),
                    mean_of_token=by_id.mean()[rows["id"]].to_numpy(),
                )
            )
    columns = ["layer", "end", "rank", "token", "kind", "increment", "relative", "context", "n", "mean_of_token"]
    return pd.concat(tables, ignore_index=True)[columns]


def _label(model: HookedPositionTransformer, token: int) -> str:
    tokenizer = model.tokenizer
    return byte_labels([token])[0] if is_byte_tokenizer(tokenizer) else tokenizer.decode([token])


def _context(model: HookedPositionTransformer, ids: list[int], place: int) -> str:
    """The text around a token, which stands in brackets; several bytes of a character are shown whole."""
    tokenizer = model.tokenizer

    # A Chinese character is three bytes.
    reach = 3 * CONTEXT_CHARACTERS if is_byte_tokenizer(tokenizer) else CONTEXT_CHARACTERS
    before = tokenizer.decode(ids[max(0, place - reach) : place], skip_special_tokens=True)[-CONTEXT_CHARACTERS:]
    after = tokenizer.decode(ids[place + 1 : place + 1 + reach], skip_special_tokens=True)[: CONTEXT_CHARACTERS // 2]
    label = tokenizer.decode([ids[place]])
    if is_byte_tokenizer(tokenizer):
        # A character has four bytes at most, so three on either side are enough to tell which byte this is.
        first = max(0, place - 3)
        label = byte_labels(ids[first : place + 4])[place - first]
    return f"{before}⟦{label}⟧{after}"


__getattr__ = getattr_with_former_names(__name__)
