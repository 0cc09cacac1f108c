"""lens-positions: the distance between tokens as an activation in TransformerLens.

Every public name has an example in its docstring, and tests/test_doctests.py runs it. In these examples `lp` is this
package, `model` the shipped bilingual-per-layer, `texts` three short English texts, `llama` a tiny random Llama of
transformers, `folder` an empty folder and `corpus` a folder of text files; `torch` and `pd` (pandas) are imported.
"""

import lazy_loader

from . import former_names

_lazy, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__getattr__ = former_names.getattr_with_former_names(__name__, _lazy)

former_names.install()
