"""Pictures of increments, positions and what they cause: figures to print, views to explore, and the report."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
