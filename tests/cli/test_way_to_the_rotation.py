"""How many files a reader crosses from `lens-positions show` to the rotation."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import lens_positions
from lens_positions import cli
from lens_positions.core import positions

PACKAGE = Path(lens_positions.__file__).parent
AT_MOST = 8


@pytest.mark.slow
def test_from_show_to_the_rotation_a_reader_crosses_few_files(capsys: pytest.CaptureFixture[str]) -> None:
    ways: list[list[str]] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        """Note the files of the package that are on the stack where cos and sin are computed."""
        code = frame.f_code
        if event != "call" or (code.co_name, code.co_filename) != ("cos_and_sin", positions.__file__):
            return
        files: dict[str, None] = {}
        below: FrameType | None = frame
        while below is not None:
            path = Path(below.f_code.co_filename)
            if path.is_relative_to(PACKAGE):
                files[str(path.relative_to(PACKAGE))] = None
            below = below.f_back
        if files:
            ways.append(list(files)[::-1])

    sys.setprofile(note)
    try:
        assert cli.main(["show", "bilingual-per-layer", "The cat sat."]) == 0
    finally:
        sys.setprofile(None)
    assert "by kind of token" in capsys.readouterr().out
    assert ways
    for way in ways:
        assert way[0] == "cli/app.py"
        assert way[-1] == "core/positions.py"
        assert len(way) <= AT_MOST, way
