"""The names and argument orders of NATTEN's releases, as their source distributions have them."""

from __future__ import annotations

import importlib
import inspect

import pytest

from natrain.compat.importing import build_tree, interface_of

SWITCHES_015 = """
has_bfloat has_cuda has_fp32_gemm has_fp64_gemm has_gemm has_half has_tf32_gemm disable_gemm_na disable_tf32
disable_tiled_na enable_gemm_na enable_tf32 enable_tiled_na
"""
CONTEXT_017 = """
are_deterministic_algorithms_enabled use_deterministic_algorithms use_kv_parallelism_in_fused_na
is_kv_parallelism_in_fused_na_enabled use_fna is_fna_enabled use_fused_na is_fused_na_enabled use_autotuner
force_flex_attention disable_autotuner is_autotuner_enabled is_autotuner_enabled_for_forward
is_autotuner_enabled_for_backward is_autotuner_thorough_for_forward is_autotuner_thorough_for_backward has_cuda has_half
has_bfloat has_gemm has_fna has_fused_na has_tf32_gemm has_fp32_gemm has_fp64_gemm use_tf32_in_gemm_na use_tiled_na
use_gemm_na use_flex_attention is_tf32_in_gemm_na_enabled is_tiled_na_enabled is_gemm_na_enabled
set_memory_usage_preference get_memory_usage_preference is_memory_usage_default is_memory_usage_strict
is_memory_usage_unrestricted enable_tf32 disable_tf32 enable_gemm_na disable_gemm_na enable_tiled_na disable_tiled_na
"""
CONTEXT_020 = """
are_deterministic_algorithms_enabled use_deterministic_algorithms use_kv_parallelism_in_fused_na
is_kv_parallelism_in_fused_na_enabled set_memory_usage_preference get_memory_usage_preference is_memory_usage_default
is_memory_usage_strict is_memory_usage_unrestricted is_flex_compile_allowed is_flex_compile_backprop_allowed
allow_flex_compile allow_flex_compile_backprop disable_flex_compile disable_flex_compile_backprop
"""
CONFIGS_021 = """
get_bwd_configs_for_cutlass_fmha get_bwd_configs_for_cutlass_fna get_configs_for_cutlass_fmha
get_configs_for_cutlass_fna get_configs_for_cutlass_hopper_fmha get_bwd_configs_for_cutlass_hopper_fmha
get_configs_for_cutlass_hopper_fna get_bwd_configs_for_cutlass_hopper_fna get_bwd_configs_for_cutlass_blackwell_fmha
get_bwd_configs_for_cutlass_blackwell_fna get_configs_for_cutlass_blackwell_fmha get_configs_for_cutlass_blackwell_fna
get_configs_for_flex_fmha get_configs_for_flex_fna
"""
MODULES = "NeighborhoodAttention1D NeighborhoodAttention2D NeighborhoodAttention3D"
OLD = " ".join(f"natten{rank}d{kind}" for rank in (1, 2, 3) for kind in ("qkrpb", "qk", "av"))
PAIR = " ".join(f"na{rank}d_{kind}" for rank in (1, 2, 3) for kind in ("qk", "av"))

NAMES = {
    ("0.14.6", ""): "NeighborhoodAttention1D NeighborhoodAttention2D",
    ("0.14.6", "functional"): "natten1dqkrpb natten1dqk natten1dav natten2dqkrpb natten2dqk natten2dav",
    ("0.15.1", ""): f"{MODULES} {SWITCHES_015}",
    ("0.15.1", "functional"): f"{OLD} {PAIR} na1d_qk_with_bias na2d_qk_with_bias na3d_qk_with_bias {SWITCHES_015}",
    ("0.15.1", "utils"): "check_additional_keys check_additional_values make_attn_tensor_from_input NoneType",
    ("0.17.5", ""): f"{MODULES} {CONTEXT_017}",
    ("0.17.5", "functional"): f"na1d na2d na3d {PAIR} {OLD}",
    ("0.17.5", "context"): f"{CONTEXT_017} MemoryUsagePreference",
    ("0.17.5", "utils"): (
        "check_additional_keys check_additional_values check_all_args check_causal_arg check_input_size_arg "
        "check_dilation_arg check_kernel_size_arg get_num_na_weights get_device_cc make_attn_tensor_from_input"
    ),
    ("0.17.5", "types"): "CausalArg2DTypeOrDed Dimension2DTypeOrDed DimensionType CausalArgType NoneType",
    ("0.20.1", ""): f"{MODULES} {CONTEXT_020} na1d na2d na3d attention merge_attentions HAS_LIBNATTEN",
    ("0.21.0", ""): f"{MODULES} {CONTEXT_020} {CONFIGS_021} na1d na2d na3d attention merge_attentions HAS_LIBNATTEN",
    ("0.21.7", "functional"): "na1d na2d na3d attention merge_attentions neighborhood_attention_generic",
    ("0.21.7", "types"): "KernelSchedule DimensionTypeOrDed",
}


@pytest.mark.parametrize(("version", "module"), NAMES)
def test_names(version, module):
    tree = build_tree("natten", interface_of(version))
    found = tree["natten." + module if module else "natten"]
    missing = [name for name in NAMES[version, module].split() if not hasattr(found, name)]
    assert not missing


def test_only_017_has_the_context_that_code_asks_for():
    """``hasattr(natten, "context")`` is how code tells 0.17 from 0.14 (rel_pos_bias or bias)."""
    assert not hasattr(build_tree("natten", interface_of("0.14"))["natten"], "context")
    assert not hasattr(build_tree("natten", interface_of("0.15"))["natten"], "context")
    assert hasattr(build_tree("natten", interface_of("0.17"))["natten"], "context")


CALLS = {
    ("0.14.6", "functional.natten2dqkrpb"): "query key rpb kernel_size dilation",
    ("0.14.6", "functional.natten2dav"): "attn value kernel_size dilation",
    ("0.14.6", "NeighborhoodAttention2D"): (
        "dim num_heads kernel_size dilation=1 bias=True qkv_bias=True qk_scale=None attn_drop=0.0 proj_drop=0.0"
    ),
    ("0.15.1", "functional.na3d_qk_with_bias"): (
        "query key bias kernel_size_d kernel_size dilation_d dilation additional_keys=None"
    ),
    ("0.15.1", "functional.na2d_av"): "attn value kernel_size dilation additional_values=None",
    ("0.15.1", "NeighborhoodAttention3D"): (
        "dim num_heads kernel_size kernel_size_d=None dilation=1 dilation_d=None bias=True qkv_bias=True qk_scale=None "
        "attn_drop=0.0 proj_drop=0.0"
    ),
    ("0.17.5", "functional.na2d_qk"): "query key kernel_size dilation=1 additional_keys=None is_causal=False rpb=None",
    ("0.17.5", "functional.na2d_av"): "attn value kernel_size dilation=1 additional_values=None is_causal=False",
    ("0.17.5", "functional.na2d"): (
        "query key value kernel_size dilation=1 is_causal=False rpb=None scale=None additional_keys=None "
        "additional_values=None xformers_kwargs=None"
    ),
    ("0.17.5", "NeighborhoodAttention2D"): (
        "dim num_heads kernel_size dilation=1 is_causal=False rel_pos_bias=False qkv_bias=True qk_scale=None "
        "attn_drop=0.0 proj_drop=0.0 use_experimental_ops=False"
    ),
    ("0.17.5", "use_fused_na"): "mode=True kv_parallel=True use_flex_attention=False force_flex_attention=False",
    ("0.21.0", "na3d"): (
        "query key value kernel_size stride=1 dilation=1 is_causal=False scale=None additional_keys=None "
        "additional_values=None attention_kwargs=None backend=None q_tile_shape=None kv_tile_shape=None "
        "backward_q_tile_shape=None backward_kv_tile_shape=None backward_kv_splits=None "
        "backward_use_pt_reduction=False run_persistent_kernel=True kernel_schedule=None torch_compile=False"
    ),
    ("0.21.0", "attention"): (
        "query key value scale=None backend=None q_tile_size=None kv_tile_size=None backward_q_tile_size=None "
        "backward_kv_tile_size=None backward_kv_splits=None backward_use_pt_reduction=False "
        "run_persistent_kernel=True kernel_schedule=None torch_compile=False return_lse=False"
    ),
    ("0.21.0", "merge_attentions"): "outputs lse_tensors torch_compile=True",
    ("0.21.0", "NeighborhoodAttention1D"): (
        "embed_dim num_heads kernel_size stride=1 dilation=1 is_causal=False qkv_bias=True qk_scale=None proj_drop=0.0"
    ),
    ("0.21.7", "na2d"): (
        "query key value kernel_size stride=1 dilation=1 is_causal=False scale=None additional_keys=None "
        "additional_values=None attention_kwargs=None backend=None q_tile_shape=None kv_tile_shape=None "
        "backward_q_tile_shape=None backward_kv_tile_shape=None backward_kv_splits=None "
        "backward_use_pt_reduction=False run_persistent_kernel=True kernel_schedule=None torch_compile=False "
        "return_lse=False"
    ),
    ("0.21.7", "attention"): (
        "query key value is_causal=False scale=None seqlens_Q=None seqlens_KV=None cumulative_seqlen_Q=None "
        "cumulative_seqlen_KV=None max_seqlen_Q=None max_seqlen_KV=None backend=None q_tile_size=None "
        "kv_tile_size=None backward_q_tile_size=None backward_kv_tile_size=None backward_kv_splits=None "
        "backward_use_pt_reduction=False run_persistent_kernel=True kernel_schedule=None torch_compile=False "
        "return_lse=False"
    ),
    ("0.21.7", "merge_attentions"): "outputs lse_tensors torch_compile=True use_autograd_fix=True",
}


@pytest.mark.parametrize(("version", "path"), CALLS)
def test_argument_order_and_defaults(version, path):
    module, _, name = path.rpartition(".")
    tree = build_tree("natten", interface_of(version))
    function = getattr(tree["natten." + module if module else "natten"], name)
    parameters = inspect.signature(function).parameters.values()
    said = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    wanted = CALLS[version, path].split()
    # 0.20.1 had one more at the end, which 0.21 dropped; code for either calls.
    assert [entry for entry in said if entry != "try_fuse_additional_kv=False"] == wanted


def test_the_module_of_natrain_is_017():
    module = importlib.import_module("natrain.compat.natten")
    functional = importlib.import_module("natrain.compat.natten.functional")
    assert module.__version__ == "0.17.5" and module.functional is functional
    assert functional.na2d is interface_of("0.17").na2d


@pytest.mark.parametrize(
    ("version", "first_release"),
    [("0.14", "0.14.6"), ("0.14.2.post4", "0.14.6"), ("0.15.0", "0.15.1"), ("0.17.3", "0.17.5"), ("0.20", "0.21.1"),
     ("0.21.0", "0.21.1"), ("0.21.1", "0.21.1"), ("0.21.5", "0.21.7"), ("0.21", "0.21.7")],
)  # fmt: skip
def test_versions_that_share_an_interface(version, first_release):
    assert interface_of(version).VERSION == first_release


@pytest.mark.parametrize("version", ["0.13", "0.22", "1.0", "latest", "", None])
def test_other_versions_are_refused(version):
    with pytest.raises(ValueError, match="from 0.14 to 0.21"):
        interface_of(version)
