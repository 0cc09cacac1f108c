"""Which tokens a position sums over: those that its token can see.

    Line        no mask, or a padding mask: every real token before it
    Documents   packed, position ids that restart: the tokens of its own document
    Tree        any other mask: its ancestors, which are the tokens that it sees, those that they see, and so on

    tokens      The  cat | sat  down | ran  off      a prompt and two ways to go on, in one row
    sums over   The  The   The  The    The  The
                     cat   cat  cat    cat  cat
                           sat  sat    ran  ran
                                down        off

Attention depends on p_i - p_j where token i sees token j, so the sum of a token must hold the tokens between the two
and no others. A sliding window hides tokens that lie between: they are ancestors, though not seen.

Line and Documents are running sums (`positions.py`); a Tree is a product with the matrix of ancestors.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from ..errors import PositionsError
from .positions import beside_heads, running_sum

HIDDEN = -1e3
"""A number added to a score that takes its key out of the softmax, whatever the score."""


@dataclass(eq=False)
class Line:
    """Real tokens in a row.

    Attributes:
        past: tokens of a key-value cache before those of this pass.
        length: tokens of this pass.
        gap: the convention of the increments.
        real: the tokens that are not padding, those of the cache included; None: all are.
        wide: the dtype and device of sums.
        counted: 1.0 where an increment counts. With gap "before" that of a row's first real token does not: nothing
            is there for it to be away from.
    """

    past: int
    length: int
    gap: str
    real: Bool[Tensor, "batch total"] | None
    wide: Tensor

    def __post_init__(self) -> None:
        first = 1 if self.gap == "before" else 0  # real tokens of a row whose increment does not count
        if self.real is None:
            counted = self.wide.new_ones(1, self.past + self.length - first)
            counted = functional.pad(counted, (first, 0))
        else:
            # `cumsum` numbers the real tokens of a row from 1.
            counted = (self.real & (self.real.cumsum(1) > first)).to(self.wide)
        self.counted: Float[Tensor, "#batch total"] = counted
        self._now = counted[:, self.past :]

    def sum(
        self, increments: Float[Tensor, "batch pos *head"], surplus: Float[Tensor, "batch past *head"] | None
    ) -> Float[Tensor, "batch pos *head"]:
        """Sum up to each token: d of the tokens of this pass, and d - 1 of those of the cache.

        Args:
            increments: d of the tokens of this pass.
            surplus: d - 1 of the tokens of the cache; None where there are none.

        Returns:
            The sum, with the token's own increment where the gap is "before" it, in float64.
        """
        start = None
        if surplus is not None:
            # The cache stands before everything of this pass, so its sum is where the sum of this pass starts.
            start = (surplus * beside_heads(self.counted[:, : self.past], surplus)).sum(1, keepdim=True)
        return running_sum(increments, self._now, gap=self.gap, start=start)

    def steps(self) -> Float[Tensor, "#batch pos"]:
        """The sum of standard steps: how many tokens of this pass are summed over."""
        return running_sum(torch.ones_like(self._now), self._now, gap=self.gap)

    def between(self) -> Bool[Tensor, "#batch pos"]:
        """The tokens whose increment lies between two real ones: all but the first (gap "after": the last)."""
        if self.gap == "before":
            return self._now.bool()

        # With gap "after" the last real token drops out; counted from the end, it is number 1.
        real = self.real_now()
        return real & (real.flip(1).cumsum(1).flip(1) > 1)

    def real_now(self) -> Bool[Tensor, "#batch pos"]:
        """The tokens of this pass that are not padding."""
        if self.real is not None:
            return self.real[:, self.past :]
        return torch.ones(1, self.length, dtype=torch.bool, device=self.wide.device)


@dataclass(eq=False)
class Documents:
    """Documents in a row, none of which sees another.

    Attributes:
        starts: for each token, the first one of its document.
        gap, wide: as in `Line`.
    """

    starts: Int[Tensor, "#batch pos"]
    gap: str
    wide: Tensor

    def sum(
        self, increments: Float[Tensor, "batch pos *head"], surplus: Float[Tensor, "batch past *head"] | None
    ) -> Float[Tensor, "batch pos *head"]:
        """As `Line.sum`; there is never a cache."""
        total = running_sum(increments, gap=self.gap, dtype=self.wide.dtype)

        # One sum over the whole row, less what it had come to where the document begins.
        return total - total.gather(1, beside_heads(self.starts, total).expand(total.shape))

    def steps(self) -> Float[Tensor, "#batch pos"]:
        """As `Line.steps`: how far a token is from the first one of its document."""
        index = torch.arange(self.starts.shape[1], device=self.starts.device)
        return (index - self.starts).to(self.wide)

    def between(self) -> Bool[Tensor, "#batch pos"]:
        """As `Line.between`, of each document."""
        index = torch.arange(self.starts.shape[1], device=self.starts.device)
        later = index > self.starts
        return later if self.gap == "before" else functional.pad(later[:, 1:], (0, 1))

    def real_now(self) -> Bool[Tensor, "#batch pos"]:
        """As `Line.real_now`."""
        return torch.ones_like(self.starts, dtype=torch.bool)


@dataclass(eq=False)
class Tree:
    """Tokens with ancestors, by any mask.

    Attributes:
        ancestors: of each token of this pass, itself among them; none where it is padding.
        every: the same of all tokens, those of the cache before these.
        past: as in `Line`; gap, wide likewise.
        roots: tokens with no ancestor but themselves, whose increment lies before nothing.
    """

    ancestors: Bool[Tensor, "#batch pos total"]
    every: Bool[Tensor, "#batch total total"]
    past: int
    gap: str
    wide: Tensor

    def __post_init__(self) -> None:
        # Counted over all tokens: one whose only ancestors are in the cache is no root.
        self.roots = self.every.sum(2) == 1
        if self.gap == "before":
            counted = self.ancestors & ~self.roots[:, None]
        else:  # a token's own increment lies after it
            counted = self.ancestors & ~_diagonal(self.ancestors)
        self._counted = counted.to(self.wide)

    def sum(
        self, increments: Float[Tensor, "batch pos *head"], surplus: Float[Tensor, "batch past *head"] | None
    ) -> Float[Tensor, "batch pos *head"]:
        """As `Line.sum`."""
        own = increments.to(self.wide)

        # A token may have any set of ancestors, so this sum is no running one: ancestors times increments.
        every = own if surplus is None else torch.cat([surplus, own], dim=1)
        counted = self._counted.expand(len(every), -1, -1)
        return torch.einsum("bqk,bk...->bq...", counted, every)

    def steps(self) -> Float[Tensor, "#batch pos"]:
        """As `Line.steps`."""
        return self._counted[..., self.past :].sum(2)

    def between(self) -> Bool[Tensor, "#batch pos"]:
        """As `Line.between`: tokens that have an ancestor (gap "after": that are one)."""
        others = self.ancestors & ~_diagonal(self.ancestors)
        return others.any(2) if self.gap == "before" else others.any(1)[:, self.past :]

    def real_now(self) -> Bool[Tensor, "#batch pos"]:
        """As `Line.real_now`."""
        return self.ancestors.any(2)


Visible = Line | Documents | Tree


def visible_tokens(
    mask: Any,
    ids: Int[Tensor, "#batch pos"],
    gap: str,
    wide: Tensor,
    *,
    packed: bool,
    past: int,
    slides: bool,
    real: Bool[Tensor, "#batch past"] | None,
    ancestors: Bool[Tensor, "#batch past past"] | None,
) -> Visible:
    """Find out which tokens of a forward pass see which.

    Args:
        mask: what the model was given as attention mask: None, padding [batch, total], scores to add or a boolean
            mask [batch, head, pos, total], or a dict of such by kind of layer.
        ids: the model's own position ids.
        gap: the convention of the increments.
        wide: a tensor of the dtype and device that sums have.
        packed: whether position ids that restart begin a new document, as in transformers where they are given
            without mask and cache.
        past: tokens of the cache.
        slides: whether the cache drops tokens that a window has passed, so that a mask may begin after them.
        real, ancestors: what is known of the tokens of the cache; None: all are real, and in a row.

    Raises:
        PositionsError: a mask that does not say which tokens a token sees.
    """
    length = ids.shape[1]
    total = past + length
    mask = _one_mask(mask)

    if mask is not None and mask.ndim == 4:
        seen = _visibility(mask, past, length, slides).to(wide.device)
        return _line_or_tree(seen, past, gap, wide, real, ancestors)

    if mask is not None and mask.shape[1] != total:
        raise PositionsError(
            f"the attention mask has shape {tuple(mask.shape)}; expected one column for each of the {total} tokens, "
            "those of the key-value cache included."
        )
    mask = None if mask is None else mask.bool().to(wide.device)

    # No mask for a cache that holds padding: that padding stays hidden, and what comes now is real.
    if mask is None and real is not None:
        mask = functional.pad(real, (0, length), value=True)

    # A cache that holds a tree, which this pass goes on from.
    if ancestors is not None:
        seen = torch.ones(1, length, total, dtype=torch.bool, device=wide.device).tril(past)
        seen = seen if mask is None else seen & mask[:, None] & mask[:, past:, None]
        return _tree(seen, past, gap, wide, real, ancestors)

    if packed and mask is None and past == 0:
        return Documents(_starts(ids), gap, wide)
    return Line(past, length, gap, mask, wide)


def _diagonal(ancestors: Bool[Tensor, "#batch pos total"]) -> Bool[Tensor, "pos total"]:
    """Each token of this pass beside itself among all tokens."""
    length, total = ancestors.shape[1:]
    return (
        torch.ones(length, total, dtype=torch.bool, device=ancestors.device).tril(total - length).triu(total - length)
    )


def _starts(ids: Int[Tensor, "#batch pos"]) -> Int[Tensor, "#batch pos"]:
    """The first token of each token's document: ids that do not go on by one begin another."""
    index = torch.arange(ids.shape[1], device=ids.device)

    # The largest beginning so far is the last one.
    begins = functional.pad(ids.diff(dim=1) != 1, (1, 0), value=True)
    return torch.where(begins, index, 0).cummax(1).values


def _one_mask(mask: Any) -> Tensor | None:
    """Return the mask; of one for each kind of layer, the one that hides least: that of full attention."""
    if isinstance(mask, dict):
        known = [m for m in mask.values() if m is not None]
        if len(known) < len(mask):  # a kind of layer without a mask: None hides nothing
            return None
        return _one_mask(mask.get("full_attention", known[0] if known else None))

    if mask is None or (isinstance(mask, Tensor) and mask.ndim in (2, 4)):
        return mask
    given = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
    raise PositionsError(
        f"the attention mask is {given}; expected [batch, pos] or [batch, head, query, key], from which increments "
        "know the tokens that a token sees."
    )


def _visibility(mask: Tensor, past: int, length: int, slides: bool) -> Bool[Tensor, "#batch pos total"]:
    """Return which tokens each token of this pass sees, itself among them.

    Two tokens of an image may see each other. The sum needs an order, so the later one is taken to see the earlier.
    """
    total = past + length
    if mask.shape[2] != length or (mask.shape[3] < total and not slides):
        raise PositionsError(
            f"the attention mask has shape {tuple(mask.shape)}; expected {length} queries and at least {total} keys."
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise PositionsError(
            f"the attention mask is {mask.dtype} of shape {tuple(mask.shape)}; expected booleans or numbers to add to "
            "the scores."
        )

    seen = mask if mask.dtype == torch.bool else mask > HIDDEN
    if mask.shape[1] > 1 and not bool((seen == seen[:, :1]).all()):
        raise PositionsError(
            f"the attention mask {tuple(mask.shape)} hides other tokens from some heads than from others; expected one "
            "for all, as a token has one position."
        )

    # A cache that a window slides over drops its first tokens, so a mask of its keys begins after them.
    seen = functional.pad(seen[:, 0, :, :total], (max(total - mask.shape[3], 0), 0))
    now = seen[..., past:]
    now = now & (now.tril() | ~now.transpose(1, 2))
    seen = torch.cat([seen[..., :past], now], dim=2)

    # A real token sees itself, whatever the mask says; padding sees nothing.
    return seen | (seen.any(2, keepdim=True) & _diagonal(seen))


def _line_or_tree(
    seen: Bool[Tensor, "#batch pos total"],
    past: int,
    gap: str,
    wide: Tensor,
    real: Bool[Tensor, "#batch past"] | None,
    ancestors: Bool[Tensor, "#batch past past"] | None,
) -> Line | Tree:
    """Read a mask of queries and keys: a padding mask in another form, or a tree."""
    # A compiler cannot follow that choice, as it depends on values; the tree is exact for both.
    padding = None
    if ancestors is None and not torch.compiler.is_compiling():
        padding = _as_padding(seen, past, real)
    if padding is None:
        return _tree(seen, past, gap, wide, real, ancestors)
    return Line(past, seen.shape[1], gap, padding, wide)


def _as_padding(
    seen: Bool[Tensor, "#batch pos total"], past: int, real: Bool[Tensor, "#batch past"] | None
) -> Bool[Tensor, "#batch total"] | None:
    """Return the padding mask that says the same, or None where there is none."""
    # A padding mask has one number a token: whether anything sees it.
    columns = seen.any(1)
    known = torch.ones_like(columns[:1, :past]) if real is None else real
    if not torch.equal(*torch.broadcast_tensors(columns[:, :past], known)):
        return None

    # Real tokens see all real tokens before them; what the rows of padding say has no effect.
    causal = columns[:, None] & torch.ones_like(seen[:1]).tril(past)
    of_real = columns[:, past:, None]
    return columns if torch.equal(seen & of_real, causal & of_real) else None


def _tree(
    seen: Bool[Tensor, "#batch pos total"],
    past: int,
    gap: str,
    wide: Tensor,
    real: Bool[Tensor, "#batch past"] | None,
    ancestors: Bool[Tensor, "#batch past past"] | None,
) -> Tree:
    """Follow what tokens see, what that sees, and so on, to the ancestors of each token.

    seen once      d -> c      c -> b      b -> a
    twice          d -> c, b   c -> b, a   b -> a
    four times     d -> c, b, a            each round reaches twice as far as the one before
    """
    length = seen.shape[1]
    now, before = seen[..., past:], seen[..., :past]
    for _ in range(max(length - 1, 1).bit_length()):
        further = _two_steps(now, now) | now
        if not torch.compiler.is_compiling() and torch.equal(further, now):
            break
        now = further

    # Tokens of the cache stand in a row where nothing else is known of them.
    if ancestors is None:
        ancestors = torch.ones(1, past, past, dtype=torch.bool, device=seen.device).tril()
        ancestors = ancestors if real is None else ancestors & real[:, None]
    before = _two_steps(now, before) | before
    before = _two_steps(before, ancestors) | before

    # The rows of the cache's tokens above those of this pass, for the next pass.
    found = torch.cat([before, now], dim=2)
    rows = max(len(found), len(ancestors))
    earlier = functional.pad(ancestors, (0, length)).expand(rows, -1, -1)
    every = torch.cat([earlier, found.expand(rows, -1, -1)], dim=1)
    return Tree(found, every, past, gap, wide)


def _two_steps(first: Bool[Tensor, "#batch i j"], then: Bool[Tensor, "#batch j k"]) -> Bool[Tensor, "#batch i k"]:
    """Return which tokens are reached by a step of the first relation and then one of the second."""
    return (first.float() @ then.float()) > 0
