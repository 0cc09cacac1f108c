"""Pictures of increments, positions and what they cause: figures to print, views to explore, and the report."""

import lazy_loader

from .. import former_names

_lazy, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__getattr__ = former_names.getattr_with_former_names(__name__, _lazy)
