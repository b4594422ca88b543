"""Neighborhood attention operators: public functions, kernels and how one is chosen."""

from natrain.ops import cpu, fused, gemm, library, naive  # noqa: F401  register operators and kernels
from natrain.ops.functional import (
    explain,
    na1d,
    na1d_av,
    na1d_qk,
    na1d_qkvpacked,
    na2d,
    na2d_av,
    na2d_qk,
    na2d_qkvpacked,
    na3d,
    na3d_av,
    na3d_qk,
    na3d_qkvpacked,
)
from natrain.ops.merge import merge_attentions
from natrain.ops.problem import Problem, Window
from natrain.ops.registry import list_kernels

__all__ = [
    "Problem",
    "Window",
    "explain",
    "list_kernels",
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na1d_qkvpacked",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na2d_qkvpacked",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "na3d_qkvpacked",
]
