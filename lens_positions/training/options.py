"""What the commands beside `train` and `graft` can be asked for.

torch is not imported here, so that the command line answers at once.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from ..large_corpus import default_folder


@dataclass(frozen=True)
class CorpusConfig:
    """What to download, and where to.

    Args:
        name: the corpus.
        output: its folder; by default the one that `--corpus bilingual-large` reads, which the environment variable
            LENS_POSITIONS_LARGE_CORPUS names.
    """

    name: tyro.conf.Positional[Literal["bilingual-large"]]
    output: Path = field(default_factory=default_folder)


@dataclass(frozen=True)
class PackConfig:
    """What to pack, and for which machine.

    Args:
        output: the folder that is made; a new one.
        corpus: one or more, tokenised into bytes; each is known there by the same name.
        text_column: the column of a table or a hub dataset that holds the text.
        max_bytes: a cap on each corpus; it is then asked for with the same cap there.
        python: the version of the interpreter there.
        machine: the processor there, which has Linux.
        most: megabytes that the folder may have.
        cache: where tokenised corpora are kept.
    """

    output: Path
    corpus: tuple[str, ...] = ("bilingual",)
    text_column: str = "text"
    max_bytes: int | None = None
    python: Literal["3.11", "3.12", "3.13"] = "3.12"
    machine: Literal["x86_64", "aarch64"] = "x86_64"
    most: int = 40
    cache: Path = Path(".cache")
