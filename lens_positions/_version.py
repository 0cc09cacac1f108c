"""The version of this package, known without its being installed; `pyproject.toml` reads it from here."""

__version__ = "0.1.0"
