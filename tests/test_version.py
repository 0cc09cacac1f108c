"""The version: of the coming release while it is not out, and the same wherever it stands."""

import re
from pathlib import Path

import lens_positions as lp

ROOT = Path(__file__).parents[1]


def test_the_version_is_that_of_the_first_heading_of_the_changes():
    heading = re.search(r"^## (\S+)( \(unreleased\))?", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert lp.__version__ == heading[1] + (".dev0" if heading[2] else "")


def test_a_citation_names_the_last_release():
    headings = re.findall(r"^## (\S+)( \(unreleased\))?", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [version for version, unreleased in headings if not unreleased]
    assert f"version: {released[0]}\n" in (ROOT / "CITATION.cff").read_text()
