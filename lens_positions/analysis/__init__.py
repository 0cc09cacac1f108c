"""Measurements on increments: one file a question, each a function that returns a table with n and an interval."""

import lazy_loader

from .. import former_names

_lazy, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__getattr__ = former_names.getattr_with_former_names(__name__, _lazy)
