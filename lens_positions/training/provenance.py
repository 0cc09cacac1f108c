"""Which code something was measured with: the commit of a checkout, or the one that a packed project was made from."""

import hashlib
import subprocess
from pathlib import Path

from .schema import Commit, PackedCommit, read_json

ROOT = Path(__file__).resolve().parents[2]
"""The checkout or the packed project, where this runs from one."""

COMMIT = "commit.json"
CODE = ("lens_positions", "experiments")


def commit(root: Path = ROOT) -> Commit | None:
    """The commit of a checkout or a packed project, and whether the code differs from it; None for anything else."""
    if (root / COMMIT).is_file():
        packed: PackedCommit = read_json(root / COMMIT, PackedCommit)
        return {"commit": packed["commit"], "changed": packed["changed"] or packed["sha256"] != code_digest(root)}

    def git(*words: str) -> list[str]:
        command = ["git", "--no-optional-locks", *words]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()

    try:
        head, top = git("rev-parse", "HEAD", "--show-toplevel")
        if Path(top).resolve() != root:  # installed inside somebody else's checkout
            return None
        return {"commit": head, "changed": bool(git("status", "--porcelain", "--", *CODE))}
    except (OSError, subprocess.CalledProcessError):
        return None


def code_digest(root: Path) -> str:
    """SHA-256 of the code and the presets in a project's folder."""
    digest = hashlib.sha256()

    # Only what computes: a changed README changes no result.
    paths = [path for package in CODE for path in (root / package).rglob("*")]
    for path in sorted(path for path in paths if path.suffix in (".py", ".toml")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()
