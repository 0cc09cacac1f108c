"""One folder to train from on a machine without a network, as the node of a cluster, whose Python has PyTorch.

    lens_positions experiments benchmarks ...   the project, as the checkout has it, without the shipped weights
    commit.json                              its commit, which results made there name
    wheels/                                  what an image with PyTorch and transformers lacks
    .cache/bilingual-84b9a06e881d03fc/       a corpus: its tokens, compressed, and packed.json about it
    install.sh, run, INSTALL.txt             how it is installed and used there

A packed corpus has the fingerprint of its text and is asked for by the same name, so that a run is the same run on
either side: `--resume` goes on with it, and its results compare.
"""

import json
import lzma
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from ..checkpoint_files import replacement_folder, sha256_of_file
from ..errors import PositionsError
from ..progress import track_progress
from .config import TrainConfig
from .data import ARRAYS, FORMAT, PACKED, cache_folder, heldout_sources, tokenize_corpus
from .options import PackConfig
from .provenance import COMMIT, ROOT, code_digest, commit
from .schema import digest_of

PROJECT = (
    *("lens_positions", "experiments/*.py", "experiments/*.sh", "benchmarks"),
    *("pyproject.toml", "README.md", "Makefile", "LICENSE"),
)
SHIPPED = "lens_positions/checkpoints"
"""Only its code is packed: no training needs the shipped models."""

CARRIED = (
    *("annotated-types", "datasets", "dill", "docstring_parser", "einops", "jaxtyping", "lazy-loader", "multiprocess"),
    *("pydantic", "pydantic_core", "rich", "transformer-lens", "typeguard", "typing_extensions", "typing-inspection"),
    *("tyro", "wadler_lindig", "xxhash"),
)
"""What training imports beyond torch, transformers, accelerate, peft, pandas, scipy, scikit-learn, matplotlib, pyarrow
and what these require. transformer-lens requires more (beartype, fancy-einsum, sentencepiece, wandb), but imports none
of it. Some are in many images, in any version: pydantic needs a recent typing_extensions."""

PLATFORMS = ("manylinux_2_28", "manylinux_2_17", "manylinux2014", "manylinux1")

# pip's --isolated keeps a user's settings (--user, an index, constraints) out of it. dill takes a module for a library
# only under a folder of this name, and would pickle all that another module holds.
INSTALL = """#!/bin/sh
# Install the wheels into this folder; nothing else on this machine is changed, and no network is used.
set -eu
cd "$(dirname "$0")"
python=${PYTHON:-python3}
found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ "$found" != VERSION ]; then
    echo "install: $python is Python $found; expected VERSION (PYTHON=/path/to/python sh install.sh)" >&2
    exit 2
fi
"$python" -m pip --isolated install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --upgrade \\
    --target site-packages wheels/*.whl
"""

RUN = """#!/bin/sh
# sh run COMMAND: run a command in this folder, with what it holds.
cd "$(dirname "$0")" || exit
export HF_HUB_OFFLINE=1
export PYTHONPATH="$PWD:$PWD/site-packages${PYTHONPATH:+:$PYTHONPATH}"
exec "$@"
"""

READ = """lens-positions for Python VERSION on Linux (MACHINE), to train without a network. That Python has torch,
transformers, accelerate, peft, pandas, pyarrow, scipy, scikit-learn and matplotlib; the rest is here:

    sh install.sh
    sh run python3 -m lens_positions train --preset quick

Commands run in this folder, and their paths are relative to it. These corpora are tokenised here, and each is used
under its name whether its text is there or not:

CORPORA

A run's folder (runs/...) can be carried to a machine that has the text, or from it, and --resume goes on with it.
lens-positions experiments measure reads text, which is not here: it is for a machine that has it.
"""


def pack(options: PackConfig) -> dict[str, int]:
    """Make the folder; a failure leaves nothing behind.

    Returns:
        The bytes of each wheel, of each corpus and of the project, by name.

    Raises:
        PositionsError: this is no checkout, the folder is there already, a wheel cannot be had, a corpus is refused, or
            all is larger than asked for.
    """
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        raise PositionsError(f"{options.output} exists already; expected a new or empty folder.")

    # A packed project is no checkout, and has no history to name.
    head = None if (ROOT / COMMIT).exists() else commit()
    if head is None:
        raise PositionsError(f"{ROOT} is no git checkout; expected one of lens-positions, to pack what it holds.")
    with replacement_folder(options.output) as folder:
        _copy_project(folder)
        described = {**head, "sha256": code_digest(folder)}
        (folder / COMMIT).write_text(json.dumps(described, indent=2) + "\n", "utf-8")
        sizes = {"the project": size_of(folder)}

        download_wheels(options, folder / "wheels")
        sizes |= {path.name: path.stat().st_size for path in sorted((folder / "wheels").iterdir())}

        corpora = []
        for name in dict.fromkeys(options.corpus):
            config = TrainConfig(corpus=name, text_column=options.text_column, max_bytes=options.max_bytes)
            packed = pack_corpus(config, options.cache, folder / ".cache")
            cap = "" if options.max_bytes is None else f", with --max-bytes {options.max_bytes}"
            corpora.append(f"    {name} ({packed.name[-16:]}){cap}")
            sizes[f"the corpus {name}"] = size_of(packed)

        _write_scripts(options, folder, "\n".join(corpora) or "    none")
        if size_of(folder) > options.most * 10**6:
            parts = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in sizes.items() if size > 10**6)
            raise PositionsError(
                f"the folder would have {size_of(folder) / 1e6:.1f} MB ({parts}); expected at most {options.most} "
                "(--max-bytes caps the text, --most the folder)."
            )
    return sizes


def print_packed(sizes: dict[str, int], output: Path) -> None:
    """Say what is in the folder, and what to do with it."""
    for name, size in sizes.items():
        print(f"{size / 1e6:9.2f} MB  {name}")
    print(f"{size_of(output) / 1e6:9.2f} MB  {output}; copy it whole (.cache is in it), and read INSTALL.txt there")


def size_of(folder: Path) -> int:
    """The bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def pack_corpus(config: TrainConfig, cache_dir: Path, into: Path) -> Path:
    """Write the tokens of a corpus for a machine that does not have its text, and return their folder.

    Args:
        config: the corpus, its column and its cap.
        cache_dir: where its tokens are kept here.
        into: where they are to be found there.

    Raises:
        PositionsError: as `tokenize_corpus`.
    """
    tokens = tokenize_corpus(
        config.corpus, cache_dir, text_column=config.text_column, max_bytes=config.max_bytes, tokenizer=None
    )
    kept, folder = (cache_folder(where, config.corpus, tokens.fingerprint) for where in (cache_dir, into))
    folder.mkdir(parents=True)

    # lzma keeps no more of a text than its dictionary when it looks for what was said before: 64 MB at preset 9.
    for name in track_progress(ARRAYS, f"compressing {config.corpus}"):
        with (kept / f"{name}.npy").open("rb") as array, lzma.open(folder / f"{name}.npy.xz", "wb", preset=9) as packed:
            shutil.copyfileobj(array, packed)

    described = {
        "format": FORMAT,
        "corpus": config.corpus,
        "text_column": config.text_column,
        "max_bytes": config.max_bytes,
        "tokenizer": None,
        "fingerprint": tokens.fingerprint,
        "arrays": {name: sha256_of_file(kept / f"{name}.npy") for name in ARRAYS},
        "heldout_sources": heldout_sources(config, tokens),
    }
    text = json.dumps(described | {"sha256": digest_of(described)}, ensure_ascii=False)
    (folder / PACKED).write_text(text + "\n", "utf-8")
    return folder


def download_wheels(options: PackConfig, wheels: Path) -> None:
    """The wheels of CARRIED in the versions that are installed here.

    Raises:
        PositionsError: pip finds one nowhere, or reaches no index.
    """
    wanted = [f"{name}=={version(name)}" for name in CARRIED]
    platforms = [word for platform in PLATFORMS for word in ("--platform", f"{platform}_{options.machine}")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "2", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", options.python]
    found = subprocess.run([*command, *platforms, "--dest", wheels, *wanted], capture_output=True, text=True)
    if found.returncode:
        # pip says much; the line that begins with ERROR is the reason.
        lines = [line for line in found.stderr.splitlines() if line.strip()] or ["no word of why"]
        said = next((line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")), lines[-1])
        if "connection broken" in found.stderr:
            said = "no package index could be reached"
        raise PositionsError(
            f"pip could not download the wheels for Python {options.python} ({said}); expected pip, and a package "
            "index that has them."
        )


def _copy_project(folder: Path) -> None:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PROJECT]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        # Shipped weights are most of the project.
        is_weights = name.startswith(f"{SHIPPED}/") and Path(name).parent != Path(SHIPPED)
        if not is_weights and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def _write_scripts(options: PackConfig, folder: Path, corpora: str) -> None:
    for name, text in (("install.sh", INSTALL), ("run", RUN), ("INSTALL.txt", READ)):
        filled = text.replace("VERSION", options.python).replace("MACHINE", options.machine).replace("CORPORA", corpora)
        (folder / name).write_text(filled, "utf-8")
        os.chmod(folder / name, 0o755 if name != "INSTALL.txt" else 0o644)
