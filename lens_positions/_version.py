"""The version of this package, known without its being installed; `pyproject.toml` reads it from here.

Between releases it is the coming one with `.dev0` behind it; see docs/release.md.
"""

__version__ = "0.2.0.dev0"
