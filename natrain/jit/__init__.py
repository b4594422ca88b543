"""From sources and constants to a compiled kernel, at first use: cache, lock, build, errors.

``build(spec)`` returns the path of the artifact. Toolchains (C++ for the host, nvcc and NVRTC for CUDA) say how to
compile; the cache, the lock and the errors are the same for all. Importing compiles nothing.
"""

from natrain.jit.build import BuildError, BuildSpec, CompileFailed, Toolchain, build, find_built, run_ninja, source_root

__all__ = ["BuildError", "BuildSpec", "CompileFailed", "Toolchain", "build", "find_built", "run_ninja", "source_root"]
