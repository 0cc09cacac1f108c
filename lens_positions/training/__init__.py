"""Train increments from fresh weights, or graft them onto a pretrained model: `lens-positions train` and `graft`."""

import sys

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

if __name__ == "training":  # by the link in a checkout: one package under both names
    import lens_positions.training

    sys.modules[__name__] = lens_positions.training
