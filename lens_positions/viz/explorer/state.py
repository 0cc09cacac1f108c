"""What a page asks for, as plain JSON, checked before any of it is used.

    {"model": "bilingual-per-layer", "text": "The cat sat.", "token": 8, "layer": 0, "head": 2,
     "edits": [{"kind": "gap", "layers": [0], "token": 5, "by": 2.5}]}

A state says everything: no request depends on an earlier one, and a link that holds one shows the same again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import PositionsError, check_text

MOST_CHARACTERS = 20_000
MOST_EDITS = 200
LARGEST = 1e5
"""Positions that one edit may ask for, either way."""

FIELDS: dict[str, tuple[str, ...]] = {
    "gap": ("token", "by"),
    "set": ("token", "to"),
    "mean": ("token",),
    "like": ("token", "text", "source"),
    "freeze": ("text",),
    "ablate": ("to",),
}
"""Kinds of edit, and what each needs beside its layers."""


@dataclass(frozen=True)
class EditSpec:
    """One edit of increments.

    Attributes:
        kind: "gap" lengthens the gap before a token by a number; "set" and "mean" make it a number, or its layer's
            mean on this text; "like" makes it what the gap before another token is on another text; "freeze" holds
            every gap of a layer at what another text of as many tokens has there; "ablate" makes every gap of a layer
            one number, the layer's mean, or a shuffle.
        layers: the model's own numbers; None is every layer with a stream.
        token: the token after the gap.
        by, to: in positions.
        text, source: the other text, and the token of it after whose gap is taken.
    """

    kind: str
    layers: tuple[int, ...] | None = None
    token: int | None = None
    by: float | None = None
    to: float | str | None = None
    text: str | None = None
    source: int | None = None

    def as_json(self) -> dict[str, Any]:
        """The edit as it came."""
        layers = None if self.layers is None else list(self.layers)
        return {"kind": self.kind, "layers": layers} | {name: getattr(self, name) for name in FIELDS[self.kind]}


@dataclass(frozen=True)
class State:
    """What a page asks for.

    Attributes:
        text: what the model reads.
        edits: in the order in which they act.
        token: the one whose prediction and attention are looked at; None is the last.
        layer, head: whose attention; None is the first.
        pattern: whether the whole pattern of that head is asked for.
        known: the key of the text whose values before any edit the page has already.
    """

    text: str
    edits: tuple[EditSpec, ...] = ()
    token: int | None = None
    layer: int | None = None
    head: int | None = None
    pattern: bool = False
    known: str = ""


def read_state(given: Any) -> State:
    """A state from JSON.

    Raises:
        PositionsError: it is none; the sentence says which part.
    """
    fields = _mapping(given, "the state", {"model", "text", "edits", "token", "layer", "head", "pattern", "known"})
    edits = fields.get("edits", [])
    if not isinstance(edits, list) or len(edits) > MOST_EDITS:
        what = f"{len(edits)} edits" if isinstance(edits, list) else f"edits as a {type(edits).__name__}"
        raise PositionsError(f"the state has {what}; expected a list of at most {MOST_EDITS}.")
    known = fields.get("known", "")
    if not isinstance(known, str) or not isinstance(fields.get("pattern", False), bool):
        raise PositionsError("the state has another known or pattern than a text and true or false; expected those.")
    return State(
        text=read_text(fields.get("text"), "the text"),
        edits=tuple(read_edit(edit, f"edit {number}") for number, edit in enumerate(edits, 1)),
        pattern=fields.get("pattern", False),
        known=known,
        **{name: _index(fields.get(name), name) for name in ("token", "layer", "head")},
    )


def read_text(given: Any, name: str) -> str:
    """A text of a bearable length.

    Raises:
        PositionsError: it is none.
    """
    if not isinstance(given, str):
        raise PositionsError(f"{name} is a {type(given).__name__}; expected a text.")
    check_text(given, name)
    if len(given) > MOST_CHARACTERS:
        raise PositionsError(f"{name} has {len(given):,} characters; expected at most {MOST_CHARACTERS:,}.")
    return given


def read_edit(given: Any, name: str = "the edit") -> EditSpec:
    """An edit from JSON.

    Raises:
        PositionsError: it is none.

    >>> read_edit({"kind": "gap", "layers": [0], "token": 5, "by": 2.5})
    EditSpec(kind='gap', layers=(0,), token=5, by=2.5, to=None, text=None, source=None)
    """
    kind = given.get("kind") if isinstance(given, Mapping) else None
    if not isinstance(kind, str) or kind not in FIELDS:
        raise PositionsError(f"{name} is of kind {kind!r:.40}; expected one of {', '.join(FIELDS)}.")
    fields = _mapping(given, name, {"kind", "layers", *FIELDS[kind]})
    values: dict[str, Any] = {}
    for field in FIELDS[kind]:
        value = fields.get(field)
        if field == "text":
            values[field] = read_text(value, f"the other text of {name}")
        elif field in ("token", "source"):
            values[field] = _index(value, f"the {field} of {name}", least=1)
        elif kind == "ablate" and value in ("mean", "shuffle"):
            values[field] = value
        else:
            values[field] = _number(value, f"{field} of {name}")
    return EditSpec(kind, _layers(fields.get("layers"), name), **values)


def _mapping(given: Any, name: str, known: set[str]) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise PositionsError(f"{name} is a {type(given).__name__}; expected an object with {', '.join(sorted(known))}.")
    if unknown := sorted(str(field)[:40] for field in given if field not in known):
        raise PositionsError(f"{name} has {unknown[0]!r}; expected no other than {', '.join(sorted(known))}.")
    return given


def _layers(given: Any, name: str) -> tuple[int, ...] | None:
    if given is None:
        return None
    if not isinstance(given, list) or not 0 < len(given) <= 1000 or any(type(layer) is not int for layer in given):
        raise PositionsError(f"the layers of {name} are {given!r:.60}; expected a list of whole numbers, or null.")
    return tuple(given)


def _index(given: Any, name: str, least: int = 0) -> Any:
    if given is None and least == 0:
        return None
    if type(given) is not int or not least <= given < 1 << 31:
        raise PositionsError(f"{name} is {given!r:.40}; expected a whole number from {least}.")
    return given


def _number(given: Any, name: str) -> float:
    if type(given) not in (int, float) or not -LARGEST <= given <= LARGEST:
        raise PositionsError(f"{name} is {given!r:.40}; expected a number between -{LARGEST:,.0f} and {LARGEST:,.0f}.")
    return float(given)
