"""Names of version 0.1.0, which work for this version and say which name to use. They go with 0.3.0.

    >>> from lens_positions.hooked import HookedPositionTransformer  # DeprecationWarning: ... lens_positions.model ...

A module by its former name is the module itself, so a class or function has one identity under both names.
"""

import importlib
import sys
import warnings
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MOVES = {
    "lens_positions": (
        "attach=core.attach calls=model_calls hooked=model hooks=core.hook_points increments=core.increments "
        "memory=core.kv_cache passes=core.forward_pass placement=core.devices pretrained=checkpoint "
        "rotary=core.rotation saved=checkpoint_files sites=core.find_attention streams=core.stream "
        "visible=core.visible_tokens wrappers=core.model_wrappers"
    ),
    "lens_positions.analysis": (
        "boundaries=analysis.word_boundaries categories=analysis.token_kinds chunks=analysis.rotary_layout "
        "entities=analysis.two_word_names intervals=measure.intervals moved=analysis.extremes "
        "reading=measure.corpus_reader running=measure.attention"
    ),
    "lens_positions.causal": "replay=measure.partial_forward",
    "lens_positions.cli": "causes=cli.cause looking=cli.look machinery=cli.rope measuring=cli.measure",
    "lens_positions.viz": (
        "characters=viz.spacing effects=viz.effect_charts machinery=viz.rope_charts measurements=viz.charts "
        "onefile=viz.report placed=viz.text_positions plain=viz.output rulers=viz.arcs views=viz.interactive"
    ),
    "training": (
        "checkpoints=training.checkpoints commands=training.commands config=training.config data=training.data "
        "graft=training.graft loop=training.loop options=training.options pack=training.pack "
        "provenance=training.provenance schema=training.schema tables=training.tables"
    ),
}

_STUDY = (
    "findings=findings findings_rope=findings_rope machinery=rope_measures maximum=maximum measure=measure "
    "results=results ship=ship suite=suite"
)

MODULES = {
    f"{package}.{old}": f"lens_positions.{new}"
    for package, moves in _MOVES.items()
    for old, new in (move.split("=") for move in moves.split())
} | {f"training.{old}": f"experiments.{new}" for old, new in (move.split("=") for move in _STUDY.split())}
"""Modules by their former names; those of `training` work in a checkout, where they were."""

NAMES = {
    "lens_positions.analysis.compared": "compare_losses",
    "lens_positions.analysis.read": "read_corpus",
    "lens_positions.analysis.what_moved": "extreme_tokens",
    "lens_positions.analysis.extremes.what_moved": "extreme_tokens",
    "lens_positions.analysis.losses.compared": "compare_losses",
    "lens_positions.measure.corpus_reader.read": "read_corpus",
    "lens_positions.measure.corpus_reader.Reading": "CorpusIncrements",
}
"""Functions and classes by their former names, and what each is called now in the same package or module."""


def getattr_with_former_names(owner: str, known: Callable[[str], Any] | None = None) -> Callable[[str], Any]:
    """Return a `__getattr__` for a package or module that also finds what it has under former names.

    Args:
        owner: its name.
        known: its own `__getattr__`, if it has one.
    """

    def find(name: str) -> Any:
        former = f"{owner}.{name}"
        if former in NAMES:
            warn(former, f"{owner}.{NAMES[former]}", stacklevel=3)
            module = sys.modules[owner]
            value = getattr(module, NAMES[former])
            setattr(module, name, value)  # the next look finds it there, without a warning
            return value
        if former in MODULES:
            return importlib.import_module(former)
        if known is not None:
            return known(name)
        raise AttributeError(f"module {owner!r} has no attribute {name!r}")

    return find


class FormerModules(MetaPathFinder, Loader):
    """Import a module by its former name as the module that it is now."""

    def __init__(self) -> None:
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """Find the names of `MODULES`, and no other."""
        return ModuleSpec(fullname, self) if fullname in MODULES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module that is called otherwise now."""
        # The module itself and no copy: a class must be one and the same under both names.
        warn(spec.name, MODULES[spec.name], stacklevel=3)
        module = importlib.import_module(MODULES[spec.name])
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own spec back, which the import under its former name has replaced."""
        assert module.__spec__ is not None
        module.__spec__ = self._specs.pop(module.__spec__.name)


def install() -> None:
    """Let import statements find modules by their former names, before a folder of such a name is looked into."""
    if not any(isinstance(finder, FormerModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, FormerModules())


def warn(former: str, name: str, stacklevel: int = 3) -> None:
    """Warn of a former name that was used, by default in the call of the function that calls this one."""
    sentence = f"{former} is called {name} now; the former name goes with version 0.3.0."
    warnings.warn(sentence, DeprecationWarning, stacklevel=stacklevel)
