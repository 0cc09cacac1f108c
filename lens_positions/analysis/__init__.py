"""Measurements on increments: one file a question, each a function that returns a table with n and an interval."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
