"""natrain: train, fine-tune and ablate Neighborhood Attention Transformers on JIT-compiled kernels."""

__version__ = "0.1.0"
