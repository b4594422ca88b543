"""List the attention kernels and what each can do, as the README shows it.

`natrain doctor` says which of them work on this machine."""

from __future__ import annotations

import argparse

# What a kernel may lack, in the order of the columns: attribute of its limits, title.
ABILITIES = {
    "backward": "gradients",
    "rpb": "bias",
    "causal": "causal",
    "stride": "stride",
    "dropout": "dropout",
    "unfused": "`na*d_qk`, `na*d_av`",
    "double_backward": "2nd derivatives",
    "forward_ad": "forward AD",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> int:
    print(kernel_table())
    return 0


def kernel_table() -> str:
    """A markdown table out of the registry, in the order in which ``kernel="auto"`` tries the kernels."""
    from natrain.ops.registry import kernels

    titles = ["kernel", "what it is", "devices", "dtypes", *ABILITIES.values()]
    rows = [titles, ["---"] * len(titles)]
    for kernel in kernels():
        limits = kernel.limits
        rows.append(
            [
                f"`{kernel.name}`",
                kernel.summary,
                _listed(limits.devices),
                _listed(
                    None if limits.dtypes is None else {str(dtype).removeprefix("torch.") for dtype in limits.dtypes}
                ),
                *("yes" if getattr(limits, name) else "-" for name in ABILITIES),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _listed(names: frozenset[str] | None) -> str:
    return "any" if names is None else ", ".join(sorted(names))
