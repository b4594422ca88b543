"""natrain: train, fine-tune and ablate Neighborhood Attention Transformers on JIT-compiled kernels.

Importing registers every model with timm and compiles nothing.
"""

from natrain import models
from natrain.ops import *  # noqa: F403
from natrain.ops import __all__ as _operators

__version__ = "0.1.0"
__all__ = ["__version__", "models", *_operators]
