"""``import natten`` in another process: install(), ``python -m natrain.compat SCRIPT``, code as found in the wild."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


def run_python(code: str, folder, *words: str):
    """``code`` as program.py in ``folder``, in a new process: ``python *words``."""
    (folder / "program.py").write_text(textwrap.dedent(code))
    return subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=300)


def test_install(tmp_path):
    done = run_python(
        """
        import importlib.metadata, importlib.util, warnings
        import natrain.compat
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            natrain.compat.install("0.15")
            natrain.compat.install("0.15.1")
        assert [type(w.message).__name__ for w in caught] == ["CompatWarning"], caught
        assert "docs/compat.md" in str(caught[0].message)
        assert importlib.util.find_spec("natten") is not None
        assert importlib.metadata.version("natten") == "0.15.1"
        assert importlib.metadata.packages_distributions()["natten"] == ["natten"]
        assert importlib.metadata.version("torch")
        import natten
        from natten.functional import na3d_qk_with_bias
        from natten.utils.tensor import check_additional_keys
        import natten.natten3d
        assert natten.__version__ == "0.15.1" and natten.natten3d.NeighborhoodAttention3D
        try:
            import natten.context
        except ModuleNotFoundError as error:
            assert error.name == "natten.context"
        else:
            raise SystemExit("0.15 had no context")
        natrain.compat.install("0.15")
        try:
            natrain.compat.install("0.17")
        except ValueError as error:
            assert "before the first `import natten`" in str(error)
        else:
            raise SystemExit("another version was installed beside the first")
        """,
        tmp_path,
        "program.py",
    )
    assert done.returncode == 0, done.stderr


K_DIFFUSION_STYLE = """
    import sys, natten, torch
    assert sys.argv == ["program.py", "--size", "8"], sys.argv
    assert __name__ == "__main__"

    class NeighborhoodSelfAttention(torch.nn.Module):
        def __init__(self, channels, head_dim, kernel_size):
            super().__init__()
            self.heads, self.kernel_size = channels // head_dim, kernel_size
            self.qkv = torch.nn.Linear(channels, 3 * channels, bias=False)

        def forward(self, x):
            qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
            q, k, v = qkv.unbind(-3)
            q, k = (torch.nn.functional.normalize(t, dim=-1) * 3 for t in (q, k))
            fused = natten.functional.na2d(q, k, v, self.kernel_size, scale=1.0)
            q, k, v = (t.movedim(-2, 1) for t in (q, k, v))
            qk = natten.functional.na2d_qk(q, k, self.kernel_size)
            out = natten.functional.na2d_av(torch.softmax(qk, dim=-1), v, self.kernel_size)
            torch.testing.assert_close(out.movedim(1, -2), fused)
            return fused.flatten(-2) if natten.has_fused_na() else out.movedim(1, -2).flatten(-2)

    out = NeighborhoodSelfAttention(8, 4, 7)(torch.randn(1, 8, 9, 8))
    print("ran", tuple(out.shape), natten.__version__)
"""


def test_a_script_runs_unmodified(tmp_path):
    done = run_python(K_DIFFUSION_STYLE, tmp_path, "-m", "natrain.compat", "program.py", "--size", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "ran (1, 8, 9, 8) 0.17.5"
    assert done.stderr.count("CompatWarning") == 1


ONEFORMER_STYLE = """
    import torch
    from natten import NeighborhoodAttention2D as NeighborhoodAttention

    class Block(torch.nn.Module):
        def __init__(self, dim, num_heads, kernel_size=7, dilation=None):
            super().__init__()
            self.attn = NeighborhoodAttention(
                dim, kernel_size=kernel_size, dilation=dilation, num_heads=num_heads, qkv_bias=True, qk_scale=None,
                attn_drop=0.0, proj_drop=0.0)

    block = Block(8, 2, 3, 4).eval()
    state = {"attn.rpb": torch.randn(2, 5, 5), "attn.qkv.weight": torch.randn(24, 8), "attn.qkv.bias": torch.randn(24),
             "attn.proj.weight": torch.eye(8), "attn.proj.bias": torch.zeros(8)}
    block.load_state_dict(state)
    x = torch.randn(1, 7, 14, 8)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 5))
    torch.testing.assert_close(block.attn(x), block.attn(padded)[:, :7])
    print("ran", Block(8, 2, 3).attn(x).shape)
"""

STYLENAT_STYLE = """
    import torch
    from natten.functional import natten2dav, natten2dqkrpb

    class SplitHeads(torch.nn.Module):
        # One projection, half of the heads with one dilation and half with another.
        def __init__(self, dim, heads, kernel_size, dilations):
            super().__init__()
            self.heads, self.kernel_size, self.dilations = heads, kernel_size, dilations
            self.qkv = torch.nn.Linear(dim, 3 * dim)
            size = 2 * kernel_size - 1
            self.rpb = torch.nn.ParameterList(torch.randn(heads // len(dilations), size, size) for _ in dilations)

        def forward(self, x):
            B, H, W, C = x.shape
            qkv = self.qkv(x).reshape(B, H, W, 3, self.heads, C // self.heads).permute(3, 0, 4, 1, 2, 5)
            parts = [t.chunk(len(self.dilations), dim=1) for t in (qkv[0] * (C // self.heads) ** -0.5, qkv[1], qkv[2])]
            outs = []
            for q, k, v, rpb, dilation in zip(*parts, self.rpb, self.dilations):
                attn = natten2dqkrpb(q, k, rpb, self.kernel_size, dilation).softmax(dim=-1)
                assert attn.view(B, -1, H * W, self.kernel_size ** 2).shape[1] == self.heads // 2
                outs.append(natten2dav(attn, v, self.kernel_size, dilation))
            return torch.cat(outs, dim=1).permute(0, 2, 3, 1, 4).reshape(B, H, W, C)

    model = SplitHeads(8, 4, 3, [1, 3])
    loss = model(torch.randn(2, 9, 10, 8)).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    print("ran")
"""


@pytest.mark.parametrize("code", [ONEFORMER_STYLE, STYLENAT_STYLE], ids=["oneformer", "stylenat"])
def test_code_of_014_runs_unmodified(tmp_path, code):
    done = run_python(code, tmp_path, "-m", "natrain.compat", "--natten", "0.14", "program.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ran")


@pytest.mark.slow
def test_spawned_workers_find_natten_too(tmp_path):
    code = """
        import multiprocessing
        import natten

        def work(x):
            return x, natten.__version__, natten.functional.__name__

        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.map(work, [3]))
    """
    done = run_python(code, tmp_path, "-m", "natrain.compat", "--natten", "0.15", "program.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[(3, '0.15.1', 'natten.functional')]"
    assert done.stderr.count("CompatWarning") == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--natten", "0.13", "program.py"), "from 0.14 to 0.21"),
        (("missing.py",), "SCRIPT='missing.py'"),
    ],
)
def test_errors_are_one_line(tmp_path, words, says):
    done = run_python("raise SystemExit('ran')", tmp_path, "-m", "natrain.compat", *words)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and says in done.stderr
