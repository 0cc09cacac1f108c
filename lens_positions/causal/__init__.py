"""What increments cause: sweeps over edits, attribution, mediation, and tables of ablations.

Every effect is the metric with a change minus the metric without it.
"""

import lazy_loader

from .. import former_names

_lazy, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__getattr__ = former_names.getattr_with_former_names(__name__, _lazy)
