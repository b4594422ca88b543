"""The interface of NATTEN 0.17 as a module: ``import natrain.compat.natten as natten``, nothing installed."""

import sys

from natrain.compat import DEFAULT_VERSION
from natrain.compat.importing import build_tree, interface_of

_tree = build_tree(__name__, interface_of(DEFAULT_VERSION))
_root = _tree.pop(__name__)
globals().update({name: value for name, value in vars(_root).items() if not name.startswith("__")})
__all__ = _root.__all__
__version__ = _root.__version__
__path__: list[str] = []
sys.modules.update(_tree)
