"""What increments cause: sweeps over edits, attribution, mediation, and tables of ablations.

Every effect is the metric with a change minus the metric without it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
