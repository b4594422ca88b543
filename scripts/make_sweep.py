"""Print the frozen sweep as yaml: make_sweep.py > configs/ablation/sweep.yaml, which a test compares with the rule."""

from natrain.bench.strata import sweep_text

print(sweep_text(), end="")
