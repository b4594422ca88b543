"""Switches are remembered, choose a kernel where natrain has one to choose, and say so where it has not."""

from __future__ import annotations

import pytest
import torch

from natrain.compat import switches, v017, v020


@pytest.fixture(autouse=True)
def fresh_switches(monkeypatch):
    """Every test starts with NATTEN's own defaults."""
    monkeypatch.setattr(switches, "state", switches.State())


def test_defaults_are_nattens():
    assert switches.is_gemm_na_enabled() and switches.is_tiled_na_enabled()
    assert not switches.is_fused_na_enabled() and not switches.is_autotuner_enabled()
    assert not switches.are_deterministic_algorithms_enabled() and switches.is_memory_usage_default()


def test_kv_parallelism_starts_as_each_version_had_it():
    old, new = (interface.LAYOUT["context"] for interface in (v017, v020))
    assert not old["is_kv_parallelism_in_fused_na_enabled"]() and new["is_kv_parallelism_in_fused_na_enabled"]()
    new["use_kv_parallelism_in_fused_na"](False)
    assert not new["is_kv_parallelism_in_fused_na_enabled"]()
    new["use_kv_parallelism_in_fused_na"](True)
    assert old["is_kv_parallelism_in_fused_na_enabled"]() and new["is_kv_parallelism_in_fused_na_enabled"]()


def test_fused_and_its_short_names():
    context = v017.LAYOUT["context"]
    context["use_fna"](True, kv_parallel=True)
    assert context["is_fna_enabled"]() and context["is_fused_na_enabled"]()
    assert switches.is_kv_parallelism_in_fused_na_enabled()
    context["use_fused_na"](False)
    assert not context["is_fna_enabled"]() and not switches.is_kv_parallelism_in_fused_na_enabled()


def test_forced_flex_attention_refuses_what_it_refused():
    q = torch.randn(1, 4, 4, 1, 8)
    switches.force_flex_attention()
    torch.testing.assert_close(v017.na2d(q, q, q, 3).shape, q.shape)
    with pytest.raises(NotImplementedError, match="scale"):
        v017.na2d(q, q, q, 3, scale=1.0)
    with pytest.raises(NotImplementedError, match="rpb"):
        v017.na2d(q, q, q, 3, rpb=torch.zeros(1, 5, 5))


def test_gemm_off_means_the_naive_kernel_on_cuda_only():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert switches.unfused_kernel(cuda) == switches.unfused_kernel(cpu) == "auto"
    assert switches.disable_gemm_na() is False
    assert switches.unfused_kernel(cuda) == "naive"
    assert switches.unfused_kernel(cpu) == "auto"
    assert switches.enable_gemm_na() is True


def test_tf32_is_torchs_and_a_call_that_disagrees_says_so(monkeypatch):
    monkeypatch.setattr(switches, "is_tf32_in_gemm_na_enabled", lambda: False)
    with pytest.warns(UserWarning, match='fp32_precision = "tf32"'):
        switches.use_tf32_in_gemm_na(True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no CUDA device")
def test_without_cuda_every_feature_query_says_no():
    context = v017.LAYOUT["context"]
    queries = [name for name in context if name.startswith("has_")]
    assert len(queries) == 9 and not any(context[name]() for name in queries)


@pytest.mark.gpu
def test_feature_queries_on_cuda():
    major, minor = torch.cuda.get_device_capability()
    assert switches.get_device_cc() == 10 * major + minor
    assert switches.has_cuda() and switches.has_half() and switches.has_bfloat() is (major >= 8)
    from natrain.ops import list_kernels

    assert switches.has_gemm() is ("gemm" in list_kernels())


def test_determinism_points_to_torchs_own_switch():
    with pytest.warns(UserWarning, match="torch.use_deterministic_algorithms"):
        switches.use_deterministic_algorithms()
    assert switches.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="deterministic"):
        switches.use_kv_parallelism_in_fused_na()
    with pytest.raises(RuntimeError, match="deterministic"):
        switches.use_autotuner(forward_pass=True)


def test_autotuner_and_memory_preference_are_remembered():
    switches.use_autotuner(forward_pass=True, thorough_mode_backward=True)
    assert switches.is_autotuner_enabled() and switches.is_autotuner_enabled_for_forward()
    assert not switches.is_autotuner_enabled_for_backward() and switches.is_autotuner_thorough_for_backward()
    switches.disable_autotuner()
    assert not switches.is_autotuner_enabled() and not switches.is_autotuner_thorough_for_backward()
    with pytest.raises(ValueError, match="steps_forward"):
        switches.use_autotuner(steps_forward="5")
    switches.set_memory_usage_preference("strict")
    assert switches.is_memory_usage_strict() and not switches.is_memory_usage_default()
    with pytest.raises(ValueError, match="unrestricted"):
        switches.set_memory_usage_preference("lots")


def test_flex_compile_guards_are_remembered():
    switches.allow_flex_compile(True, backprop=True)
    assert switches.is_flex_compile_allowed() and switches.is_flex_compile_backprop_allowed()
    switches.disable_flex_compile_backprop()
    assert switches.is_flex_compile_allowed() and not switches.is_flex_compile_backprop_allowed()
    switches.disable_flex_compile()
    assert not switches.is_flex_compile_allowed()
