"""Train increments from fresh weights, or graft them onto a pretrained model: `lens-positions train` and `graft`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
