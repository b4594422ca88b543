"""The published dilation plans by name: ``dilations="coco800"`` (DiNAT, 2209.15001, section 4 and appendix A).

A name says the task and the shorter side of its images in pixels; ``k11`` belongs to kernel size 11. A pattern repeats
over its stage; a stage that follows no pattern is written out, and then fits the published depth only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from natrain.errors import invalid, nearest

Dilations = int | Sequence[int | Sequence[int]]
Plans = Mapping[str, Sequence[Sequence[int]]]

DILATIONS_224 = ((1, 8), (1, 4), (1, 2), (1,))

DINAT: Plans = {
    "in224": DILATIONS_224,
    "in384": ((1, 13), (1, 6), (1, 3), (1,)),
    "in384_k11": DILATIONS_224,
    "coco800": ((1, 28), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
    "ade512": ((1, 16), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
    "ade640": ((1, 20), (1, 5, 1, 10), (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5), (1, 2)),
    "mask2former_k11": ((1, 14), (1, 4, 1, 7), (*(1, 2, 1, 3) * 4, 1, 3), (1,)),
}

DINATS: Plans = {
    "in224": DILATIONS_224,
    "in384": ((1, 13), (1, 6), (1, 3), (1,)),
    "coco800": ((1, 28), (1, 14), (1, 3, 1, 5, 1, 7), (1, 3)),
    "ade512": ((1, 16), (1, 8), (1, 2, 1, 3, 1, 4), (1, 2)),
}


def named_plan(dilations: Dilations | str, plans: Plans, depths: Sequence[int]) -> Dilations:
    """The plan that ``dilations`` names; what is no name passes through.

    Raises:
        ValueError: no plan of that name for this family, or one made for other depths.
    """
    if not isinstance(dilations, str):
        return dilations
    if dilations not in plans:
        example = nearest(dilations, plans) or next(iter(plans), None)
        raise invalid(
            "dilations",
            dilations,
            f"one of {', '.join(plans)}, or numbers" if plans else "numbers: no plans are published for this family",
            "dilations=2" if example is None else f"dilations={example!r}",
        )
    plan = plans[dilations]
    if len(plan) != len(depths) or any(len(pattern) > depth for pattern, depth in zip(plan, depths, strict=True)):
        raise invalid(
            "dilations",
            dilations,
            f"a plan for {len(depths)} stages of {tuple(depths)} blocks; this one has patterns of "
            f"{tuple(map(len, plan))} blocks",
            f"dilations={[[1, 2][: min(2, depth)] for depth in depths]}",
        )
    return plan
