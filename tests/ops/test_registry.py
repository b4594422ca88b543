"""Choosing, refusing, explaining; kernels of user packages."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
import torch

import natrain
from natrain.ops import registry
from natrain.ops.problem import Problem, Window
from natrain.ops.registry import Kernel, Limits


def _problem(**changes) -> Problem:
    fields = dict(
        batch=2, spatial=(8, 8), heads=2, head_dim=32, window=Window((3, 3), (1, 1), (1, 1), (False, False)),
        dtype=torch.float32, device="cpu",
    )  # fmt: skip
    return Problem(**{**fields, **changes})


class Picky(Kernel):
    name, summary, priority = "picky", "refuses nearly everything", 1
    limits = Limits(
        devices=frozenset({"cuda"}), dtypes=frozenset({torch.bfloat16}), na_dims=frozenset({1}), max_head_dim=16,
        head_dim_multiple=24, min_capability=(9, 0), rpb=False, causal=False, stride=False, dropout=False,
        deterministic=False, backward=False,
    )  # fmt: skip


@pytest.fixture
def kernels(monkeypatch):
    """A registry of this test's own."""
    registry.kernels()
    monkeypatch.setattr(registry, "_KERNELS", dict(registry._KERNELS))
    registry._choose_cached.cache_clear()
    yield registry._KERNELS
    registry._choose_cached.cache_clear()


def test_every_limit_gives_its_own_reason():
    window = Window((3, 3), (1, 1), (2, 1), (True, False))
    problem = _problem(
        window=window, device="cuda", capability=(8, 0), has_rpb=True, has_dropout=True, needs_grad=True,
        deterministic=True, unfused=True, kv_heads=1, value_dim=64, has_key_mask=True,
    )  # fmt: skip
    reasons = "; ".join(Picky().unsupported_reasons(problem))
    for expected in (
        "dtype torch.float32", "rank 2", "capability (8, 0)", "head_dim 32 (at most 16)", "multiple of 24", "no rpb",
        "no is_causal", "no stride", "no dropout_p", "no deterministic", "no gradients", "no visible attention weights",
        "no head_dim of v (64) other than q's (32)", "no 1 heads of k and v for 2 of q (GQA)", "no key_mask",
    ):  # fmt: skip
        assert expected in reasons
    assert "device cpu (has cuda)" in "; ".join(Picky().unsupported_reasons(_problem()))
    inside = _problem(window=Window((3,), (1,), (1,), (False,)), spatial=(8,), head_dim=0, dtype=torch.bfloat16)
    assert Picky().unsupported_reasons(dataclasses.replace(inside, device="cuda", capability=(9, 0))) == []
    wide = Limits(max_head_dim=48, head_dim_multiple=32, value_dim=True)
    assert wide.reasons(_problem(value_dim=64)) == ["head_dim of v 64 (at most 48)"]
    assert wide.reasons(_problem(value_dim=40)) == ["head_dim of v 40 (a multiple of 32)"]


def test_auto_takes_the_first_without_reasons_and_says_so_once(kernels, caplog):
    registry._say_once.cache_clear()
    registry.register(Picky())
    with caplog.at_level(logging.INFO, logger="natrain"):
        for batch in (3, 4):
            # The other kernels' own limits decide which one follows; the picky one, first in priority, never does.
            assert registry.choose(_problem(batch=batch)).name == registry.explain_problem(_problem()).chosen != "picky"
    assert len([r for r in caplog.records if 'kernel="auto" uses' in r.message]) == 1


def test_a_named_kernel_is_never_replaced(kernels):
    registry.register(Picky())
    q = torch.randn(1, 8, 8, 2, 32)
    with pytest.raises(
        ValueError, match=r"kernel='picky' is not allowed.*device cpu \(has cuda\).*rank 2.*Try: kernel="
    ):
        natrain.na2d(q, q, q, 3, kernel="picky")


def test_the_error_of_auto_lists_every_kernel_with_its_reasons(kernels):
    kernels.clear()
    registry.register(Picky())
    with pytest.raises(ValueError, match=r"no kernel supports this problem(?s:.*)picky.*device cpu \(has cuda\)"):
        registry.choose(_problem())


def test_a_misspelt_kernel_names_the_nearest():
    q = torch.randn(1, 8, 1, 8)
    with pytest.raises(ValueError, match=r"kernel='referense' is not allowed.*Try: kernel=\"reference\""):
        natrain.na1d(q, q, q, 3, kernel="referense")
    with pytest.raises(ValueError, match="kernel=7"):
        natrain.na1d(q, q, q, 3, kernel=7)


def test_explain_prints_the_choice_and_every_reason(kernels):
    registry.register(Picky())
    q = torch.randn(1, 8, 8, 2, 32)
    text = str(natrain.explain(q, q, q, 3, rpb=torch.zeros(2, 5, 5)))
    assert "na2d 8x8; batch 1, heads 2, head_dim 32; kernel_size (3, 3)" in text
    assert "picky      device cpu (has cuda)" in text and " chosen" in text
    assert natrain.explain(_problem()).chosen == natrain.explain(q, q, q, 3).chosen
    grouped = natrain.explain(q, q[..., :1, :], q[..., :1, :8], 3, key_mask=torch.ones(1, 8, 8, dtype=torch.bool))
    assert "kv_heads 1; value_dim 8; " in str(grouped) and "has_key_mask" in str(grouped)
    with pytest.raises(ValueError, match="key_mask.shape"):
        natrain.explain(q, q, q, 3, key_mask=torch.ones(1, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="rank 1 to 3"):
        natrain.explain(torch.randn(3), None, None, 3)


def test_explain_takes_what_a_call_takes_and_sees_what_it_sees():
    q = torch.randn(1, 8, 8, 2, 32, requires_grad=True)
    assert natrain.explain(q, q, q, 3).problem.needs_grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        problem = natrain.explain(q, q, q, 3, 2, 1, False, None, None, None, 0.1, True, "reference").problem
    assert problem.dtype == torch.bfloat16 and problem.has_dropout and not problem.needs_grad
    assert natrain.explain(*[q.to("meta")] * 3, 3).problem.device == "meta"
    with pytest.raises(TypeError, match="dilatoin"):
        natrain.explain(q, q, q, 3, dilatoin=2)


def test_problem_is_hashable_and_prints_its_flags():
    assert len({_problem(), _problem(), _problem(has_rpb=True)}) == 2
    text = str(_problem(kv_heads=1, value_dim=8, has_key_mask=True))
    assert "heads 2, head_dim 32; kv_heads 1; value_dim 8; " in text and text.endswith("float32 on cpu has_key_mask")
    assert str(_problem(has_rpb=True, device="cuda", capability=(9, 0))).endswith("float32 on cuda sm_90 has_rpb")


def test_problems_of_another_process_are_found_by_their_hash():
    sent = "import pickle, sys; from tests.ops.test_registry import _problem; problem = _problem(); hash(problem); "
    sent += "sys.stdout.buffer.write(pickle.dumps(problem))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    result = subprocess.run([sys.executable, "-c", sent], capture_output=True, check=True, env=environment)
    assert pickle.loads(result.stdout) in {_problem()}


def test_a_name_in_use_cannot_be_registered(kernels):
    with pytest.raises(ValueError, match="name='reference' is not allowed"):
        registry.register(kernels["reference"])


def test_a_user_package_adds_a_kernel_by_the_documented_steps(kernels, monkeypatch, tmp_path):
    """natrain/ops/README.md, followed to the letter: a module, an entry point, nothing in natrain touched."""
    (tmp_path / "theirs.py").write_text(
        "import torch\n"
        "from natrain.ops.registry import FusedKernel, Limits\n"
        "class Mean(FusedKernel):\n"
        "    name, summary, priority = 'mean', 'averages all values', 200\n"
        "    limits = Limits(devices=frozenset({'cpu'}), rpb=False, backward=False)\n"
        "    def forward(self, problem, q, k, v, rpb, key_mask, seed, scale, dropout_p):\n"
        "        axes = tuple(range(1, v.dim() - 2))\n"
        "        return v.mean(axes, keepdim=True).expand_as(v).contiguous(), torch.zeros(q.shape[:-1])\n"
        "    def backward(self, *args):\n"
        "        raise AssertionError\n"
    )
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[natrain.kernels]\nmean = theirs:Mean\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._pending.cache_clear()
    assert natrain.list_kernels()[-1] == "mean"
    q = torch.randn(1, 6, 6, 2, 4)
    torch.testing.assert_close(natrain.na2d(q, q, q, 3, kernel="mean"), q.mean((1, 2), keepdim=True).expand_as(q))
    with pytest.raises(ValueError, match="no gradients"):
        natrain.na2d(q.requires_grad_(), q, q, 3, kernel="mean")


def test_a_foreign_kernel_that_cannot_be_loaded_is_named_in_every_call(kernels, monkeypatch, tmp_path):
    (tmp_path / "broken.py").write_text(
        "from natrain.ops.registry import Kernel, Limits\n"
        "class Fine(Kernel):\n"
        "    name, summary, priority, limits = 'fine', 'does nothing', 200, Limits()\n"
        "class Same(Fine):\n"
        "    name = 'cpu'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for value, reason in (("broken:Same", "name='cpu' is not allowed.*'reference'"), ("nowhere:X", "No module named")):
        registry._KERNELS.pop("fine", None)
        entries = [EntryPoint("fine", "broken:Fine", registry.ENTRY_POINT_GROUP)]
        entries.append(EntryPoint("bad", value, registry.ENTRY_POINT_GROUP))
        monkeypatch.setattr(registry, "_pending", lambda entries=entries: entries)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f'"bad = {value}" of its package cannot be loaded: {reason}'):
                natrain.list_kernels()
    entries.clear()
    assert natrain.list_kernels()[-1] == "fine"
