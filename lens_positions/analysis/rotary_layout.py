"""How the components of queries and keys make rotary chunks, found by trying: halves, neighbours and partial rotary.

Where TransformerLens shows queries and keys before the rotation alone (GPT-NeoX, Phi-3, Falcon), scores tell the
layout, and `RotaryLayout.rotate` turns them.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from ..core.hook_points import HookedTokens
from ..core.model_wrappers import base_model
from ..errors import PositionsError
from ..interventions import HOOK, Hooks, LayerIndices, hook_names
from ..measure.attention import keep_states, run_for_hooks, visible_keys

ROTATION = HOOK.format("rotation")
PROBED = 24
"""Tokens that the layout is found with."""

TOLERANCE = 1e-4
"""By how much of the largest score, or of 1, scores may differ from the sum of their terms."""


@dataclass(frozen=True)
class RotaryLayout:
    """How the components of a head make chunks, the same for all heads of a layer, highest frequency first.

    Attributes:
        frequencies: in radians per position; a wavelength is 2 pi over it.
        pairs: the two components of each chunk.
        rest: the components that are not turned.
        components: where cos and sin have the angle of each chunk; None where TransformerLens shows rotated queries.
    """

    frequencies: Float[Tensor, " frequency"]
    pairs: Int[Tensor, "frequency 2"]
    rest: Int[Tensor, " component"]
    components: Int[Tensor, " frequency"] | None = None

    @property
    def all_frequencies(self) -> Float[Tensor, " chunk"]:
        """The frequency of every chunk, 0 for what is not turned."""
        return torch.cat([self.frequencies, self.frequencies.new_zeros(min(len(self.rest), 1))])

    def norms(self, states: Float[Tensor, "*shape d_head"]) -> Float[Tensor, "*shape chunk"]:
        """The 2-norm of each chunk; of what is not turned, that of an average pair of it."""
        norms = states[..., self.pairs].square().sum(-1).sqrt()
        if not len(self.rest):
            return norms

        # Twice the mean square, the square of an average pair, so that it compares with chunks of two.
        rest = (2 * states[..., self.rest].square().mean(-1, keepdim=True)).sqrt()
        return torch.cat([norms, rest], dim=-1)

    def rotate(
        self, states: Float[Tensor, "batch pos head d_head"], rotation: Float[Tensor, "#batch pos 2 d_rotary"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Queries or keys after a rotation."""
        assert self.components is not None

        # A head axis of one, as all heads of a layer turn alike here.
        cos, sin = rotation[..., None, :, self.components].to(states).unbind(-2)
        first, second = states[..., self.pairs[:, 0]], states[..., self.pairs[:, 1]]
        turned = states.clone()
        turned[..., self.pairs[:, 0]] = first * cos - second * sin
        turned[..., self.pairs[:, 1]] = second * cos + first * sin
        return turned

    def chunk(self, i: int) -> Int[Tensor, " component"]:
        """The components of a chunk."""
        return self.pairs[i] if i < len(self.pairs) else self.rest


def rotary_layout(model: TransformerBridge, layers: LayerIndices = None) -> dict[int, RotaryLayout]:
    """How the components of queries and keys are paired, by layer, found by turning each frequency by its own angle.

    Raises:
        PositionsError: no streams, no such layer, queries that TransformerLens does not show, or a rotation that does
            not turn pairs of components.

    >>> layout = lp.analysis.rotary_layout(model)[0]
    >>> layout.pairs[:3].tolist()  # the components that each frequency turns, highest first
    [[0, 16], [1, 17], [2, 18]]
    >>> [round(float(frequency), 2) for frequency in layout.frequencies[:3]]
    [1.0, 0.56, 0.32]
    """
    rotations = dict(hook_names(model, layers, ROTATION))
    patterns = dict(hook_names(model, None, "attn.hook_pattern"))
    vocab, generator = cast(int, model.cfg.d_vocab), torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab, (1, min(PROBED, model.cfg.n_ctx)), generator=generator).to(base_model(model).device)
    angles: dict[int, tuple[Tensor, Tensor]] = {}
    held: dict[str, Tensor] = {}
    runs = []

    # Two runs that differ in the rotation alone: what it does to queries shows which components it pairs.
    for turned in (False, True):
        seen: dict[int, Tensor] = {}
        hooks: Hooks = [
            (name, partial(_rotate_by_known_angles, angles, layer, turned)) for layer, name in rotations.items()
        ]
        # Patterns are held, so that every layer sees in both runs what it sees in the first.
        hooks += [(name, partial(_hold_pattern, held)) for name in patterns.values() if name in model.hook_dict]
        hooks += [
            (n, partial(keep_states, seen, layer)) for layer in rotations for n in names_of(model, layer, "rot_q")
        ]
        run_for_hooks(model, tokens, hooks)
        runs.append(seen)
    layouts = {}
    for layer in rotations:
        if layer in runs[0]:
            layouts[layer] = _layout(layer, runs[0][layer], runs[1][layer], *angles[layer])
        else:
            layouts[layer] = _layout_of_scores(model, tokens, layer)
    return layouts


def _rotate_by_known_angles(
    angles: dict[int, tuple[Tensor, Tensor]],
    layer: int,
    turned: bool,
    rotation: Float[Tensor, "batch pos *head 2 d_rotary"],
    hook: HookPoint,
) -> Float[Tensor, "batch pos *head 2 d_rotary"]:
    """No rotation, or each frequency by an angle of its own between 0 and pi."""
    own = rotation_frequencies(hook)
    distinct, which = own.unique(return_inverse=True)

    # Distinct angles strictly between 0 and pi: each tells its frequency, and none is its own inverse.
    known = math.pi * torch.arange(1, len(distinct) + 1, device=own.device) / (len(distinct) + 1)
    angles[layer] = known.where(distinct > 0, 0.0), distinct
    angle = angles[layer][0][which].to(rotation) * turned
    length = rotation.norm(dim=-2, keepdim=True)  # some scalings of RoPE also scale cos and sin
    return torch.cat([length * angle.cos(), length * angle.sin()], dim=-2)


def _layout(
    layer: int,
    before: Float[Tensor, "1 pos head d_head"],
    after: Float[Tensor, "1 pos head d_head"],
    angles: Float[Tensor, " distinct"],
    frequencies: Float[Tensor, " distinct"],
) -> RotaryLayout:
    """Find the pairs: they keep their energy while they turn, and the angle that they turn by names their frequency."""
    # Every token and head is one sample of the same map: [sample component].
    x, y = (states.double().flatten(0, 2) for states in (before, after))
    size = x.abs().amax(0)

    # A component that stays is not turned (partial rotary).
    moves = (y - x).abs().amax(0) > 1e-4 * size.max()

    # What one component of a pair gains the other loses, in every sample: x_i^2 + x_j^2 = y_i^2 + y_j^2. So partners
    # are the components whose gains are each other's losses.
    energy = (y.square() - x.square()).T
    apart = torch.cdist(energy, -energy).fill_diagonal_(math.inf)
    apart[:, ~moves] = math.inf
    partner = apart.argmin(1)
    turned = [i for i in range(len(size)) if moves[i]]
    pairs = [(i, int(partner[i])) for i in turned if i < partner[i]]
    if any(int(partner[partner[i]]) != i for i in turned):
        raise PositionsError(f"layer {layer} does not turn pairs of components; expected rotary positions.")
    found = []
    for i, j in pairs:
        # The angle by which the pair was turned, over all samples; its sign depends on the order of the two.
        cos, sin = (x[:, i] * y[:, i] + x[:, j] * y[:, j]).sum(), (x[:, i] * y[:, j] - x[:, j] * y[:, i]).sum()
        away = (angles - torch.atan2(sin.abs(), cos)).abs()
        if away.min() > math.pi / (len(angles) + 1) / 4:
            raise PositionsError(f"layer {layer} turns components {i} and {j} by no known angle; expected a rotation.")
        found.append(float(frequencies[away.argmin()]))
    order = sorted(range(len(pairs)), key=lambda k: -found[k])
    return RotaryLayout(
        torch.tensor([found[k] for k in order], dtype=torch.float64),
        torch.tensor([pairs[k] for k in order], dtype=torch.long).view(-1, 2),
        torch.tensor([i for i in range(len(size)) if not moves[i]], dtype=torch.long),
    )


def _layout_of_scores(model: TransformerBridge, tokens: Int[Tensor, "1 pos"], layer: int) -> RotaryLayout:
    """Try halves, then neighbours: the layout is the one that gives the layer's own scores."""
    sites = {what: names_of(model, layer, what) for what in ("rotation", "q", "k", "attn_scores")}
    seen: dict[str, Tensor] = {}
    frequencies: list[Tensor] = []
    hooks: Hooks = [(name, partial(keep_states, seen, what)) for what, names in sites.items() for name in names]
    hooks += [(name, partial(_note_frequencies, frequencies)) for name in sites["rotation"]]
    run_for_hooks(model, tokens, hooks)
    if len(seen) == len(sites) and seen["q"].ndim == seen["k"].ndim == 4 and seen["rotation"].ndim == 4:
        own = frequencies[0]

        # cos and sin may name each frequency once or twice: the first of each.
        components = torch.tensor([i for i, w in enumerate(own) if w not in own[:i]])
        n = len(components)
        order = own[components].argsort(descending=True)
        indices = torch.arange(2 * n)

        # Components i and i + n (halves), or 2i and 2i + 1 (neighbours).
        for pairs in (indices.view(2, n).T, indices.view(n, 2)):
            rest = torch.arange(2 * n, seen["q"].shape[-1])
            layout = RotaryLayout(own[components][order].double(), pairs[order], rest, components[order])
            if 2 * n > seen["q"].shape[-1]:
                break
            query, key = (layout.rotate(seen[side].float(), seen["rotation"]) for side in ("q", "k"))
            if score_factor(query, key, seen["attn_scores"]) is not None:
                return layout
    raise PositionsError(
        f"layer {layer} shows in TransformerLens no queries and keys that its scores could be split by; expected "
        "hook_rot_q and hook_rot_k, or hook_q and hook_k straight before the rotation."
    )


def _note_frequencies(noted: list[Tensor], rotation: Tensor, hook: HookPoint) -> None:
    noted.append(rotation_frequencies(hook).cpu())


def rotation_frequencies(hook: HookPoint) -> Float[Tensor, " d_rotary"]:
    """How fast each component of cos and sin turns at a hooked rotation, whichever way."""
    tokens: HookedTokens = hook.ctx["tokens"]
    assert tokens.frequencies is not None
    return tokens.frequencies.abs()


def score_factor(
    query: Float[Tensor, "batch pos head d_head"],
    key: Float[Tensor, "batch pos kv_head d_head"],
    scores: Float[Tensor, "batch head query key"],
) -> float | None:
    """The factor that makes products of queries and keys the scores, wherever a key is seen; None where none does."""
    products = products_of(query, key, torch.arange(query.shape[-1]))
    seen = visible_keys(scores)
    ours, own = products[seen].double(), scores[seen].double()

    # Least squares; then every single score must fit.
    factor = (ours @ own) / (ours @ ours).clamp_min(1e-30)
    tolerance = max(TOLERANCE, 8 * torch.finfo(scores.dtype).eps)
    close = (ours * factor - own).abs().max() <= tolerance * own.abs().max().clamp_min(1)
    return float(factor) if close else None


def products_of(query: Tensor, key: Tensor, components: Tensor) -> Float[Tensor, "batch head query key"]:
    """The products of queries and keys over some components, each query head with the key head that it reads."""
    # Query heads h, h + 1, ... of a group read one key head.
    shared = key[..., components].repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    return torch.einsum("bqhd,bkhd->bhqk", query[..., components], shared)


def names_of(model: TransformerBridge, layer: int, what: str) -> list[str]:
    """The name of a hook point in the attention of a layer, if the model has it."""
    return [name for _, name in hook_names(model, layer, HOOK.format(what)) if name in model.hook_dict]


def _hold_pattern(held: dict[str, Tensor], pattern: Tensor, hook: HookPoint) -> Tensor:
    return held.setdefault(cast(str, hook.name), pattern.detach())
