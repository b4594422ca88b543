"""The layers of docs/performance.md out of a sweep's results, beside their floor and what other libraries took.

    python -m natrain.bench.sweep configs/ablation/peers.yaml --out runs/peers
    python scripts/compare_layers.py runs/peers [--kernel fused] [--dtype bf16] [--rpb]

Prints a Markdown table: milliseconds forward and backward, times the floor, and the peer's time over ours (peers of
natrain/bench/layers.py, recorded on another day; those in the results were measured in the same run). Last the
geometric means.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from natrain.bench import layers, rows
from natrain.bench.case import DTYPES, Case
from natrain.bench.estimate import DIRECTIONS, floor_bytes
from natrain.report.kernels import Run, geometric_mean


def peer_ms(kernel: str, layer: str, dtype: str) -> tuple[float, float] | None:
    """What the peer of a kernel took: NATTEN's kernels of the same family, the best of all for ``fused``."""
    if kernel == "fused":
        return layers.BEST_PEER_MS[layer] if dtype in ("fp16", "bf16") else None
    table = layers.NATTEN_NAIVE_MS if kernel == "naive" else layers.NATTEN_GEMM_MS
    return table.get(layer, {}).get(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kernel", default="fused", choices=("naive", "gemm", "fused"))
    parser.add_argument("--dtype", default="bf16", choices=tuple(DTYPES))
    parser.add_argument("--rpb", action="store_true")
    arguments = parser.parse_args()
    for name in ("results.csv", "environment.jsonl"):
        if not (arguments.folder / name).is_file():
            raise SystemExit(f"error: folder {arguments.folder} holds no {name}. Try: what a sweep was given as --out")
    times: dict[tuple[Case, str], dict[str, float]] = {}
    for row in rows.read(arguments.folder / "results.csv"):
        run = Run.of(row)
        if run.ms is not None:
            times.setdefault((run.case, run.direction), {})[run.arm] = run.ms
    note = json.loads((arguments.folder / "environment.jsonl").read_text().splitlines()[-1])
    others = sorted({arm for own in times.values() for arm in own} - {arguments.kernel})
    title = ["layer", "ms", "of the floor", "peer / ours", *(f"{name} / ours" for name in others)]
    print(f"{note['device']}, copy {note['copy_bytes_per_s'] / 1e12:.2f} TB/s, {arguments.kernel}, {arguments.dtype}")
    print("| " + " | ".join(title) + " |\n|" + "---|" * len(title))
    ratios: dict[str, dict[str, list[float]]] = {which: {} for which in DIRECTIONS}
    for layer in layers.LAYERS:
        case = layer.case(DTYPES[arguments.dtype], arguments.rpb)
        cells = [[] for _ in title[1:]]
        for index, which in enumerate(DIRECTIONS):
            own = times.get((case, which), {})
            if arguments.kernel not in own:
                break
            ms = own[arguments.kernel]
            peer = peer_ms(arguments.kernel, layer.name, arguments.dtype)
            floor_ms = 1e3 * floor_bytes(case, which) / note["copy_bytes_per_s"]
            found = [peer and peer[index], *(own.get(name) for name in others)]
            for name, other in zip(("peer", *others), found, strict=True):
                if other:
                    ratios[which].setdefault(name, []).append(other / ms)
            for cell, text in zip(
                cells,
                [
                    f"{ms:.4f}",
                    f"{ms / floor_ms:.2f}",
                    *("" if other is None else f"{other / ms:.2f}" for other in found),
                ],
                strict=True,
            ):
                cell.append(text)
        else:
            print(f"| {layer.name} | " + " | ".join(" / ".join(cell) for cell in cells) + " |")
    for which, by_name in ratios.items():
        found = ", ".join(f"{name} {geometric_mean(values):.2f}" for name, values in by_name.items())
        print(f"{which}, geometric means over ours: {found}")


if __name__ == "__main__":
    main()
