"""The published experts of RICE (arXiv 2505.14681, camera-ready, tables of top-5 experts), as plans.

Layer numbers are taken as absolute and 0-based; the paper does not say so, and the listed numbers do not decide it. A run on the
real model shows in its audit whether a preset's experts fire.
"""

from __future__ import annotations

from typing import Any

from moe_steer.plan import ExpertGain, SteeringPlan

PAPER_GAIN = 64.0
PAPER_TOP = 2
_R1 = {"model_type": "deepseek_v3", "num_layers": 61, "num_experts": 256, "name": "deepseek-ai/DeepSeek-R1"}
_QWEN3 = {"model_type": "qwen3_moe", "num_layers": 94, "num_experts": 128, "name": "Qwen/Qwen3-235B-A22B"}
_RANKED: dict[str, tuple[dict[str, Any], tuple[tuple[int, int], ...]]] = {
    "rice-r1-math": (_R1, ((39, 182), (29, 126), (14, 114), (27, 45), (16, 129))),
    "rice-r1-physics": (_R1, ((29, 126), (39, 182), (36, 53), (39, 46), (24, 159))),
    "rice-r1-chemistry": (_R1, ((7, 197), (39, 182), (22, 37), (29, 106), (29, 126))),
    "rice-r1-biology": (_R1, ((42, 194), (22, 37), (37, 241), (43, 61), (39, 188))),
    "rice-r1-all": (_R1, ((39, 182), (29, 126), (29, 106), (4, 214), (50, 120))),
    "rice-qwen3-235b-math": (_QWEN3, ((70, 47), (23, 115), (19, 47), (75, 46), (22, 88))),
    "rice-qwen3-235b-physics": (_QWEN3, ((2, 28), (74, 65), (4, 44), (25, 103), (7, 36))),
    "rice-qwen3-235b-chemistry": (_QWEN3, ((32, 58), (26, 30), (68, 35), (37, 57), (25, 103))),
    "rice-qwen3-235b-biology": (_QWEN3, ((2, 28), (26, 30), (67, 15), (82, 29), (25, 103))),
    "rice-qwen3-235b-all": (_QWEN3, ((25, 103), (26, 30), (82, 29), (67, 15), (37, 57))),
}
PRESETS = tuple(_RANKED)


def preset_plan(name: str, top: int = PAPER_TOP, gain: float = PAPER_GAIN) -> SteeringPlan:
    """The first ``top`` (1 to 5) published experts at ``gain``; the paper uses 2 and 64. ValueError for another name or number."""
    if name not in _RANKED:
        raise ValueError(f"preset {name!r} is unknown: choose one of {', '.join(PRESETS)}")
    model, ranked = _RANKED[name]
    if not 1 <= top <= len(ranked):
        raise ValueError(f"preset {name!r} lists {len(ranked)} experts: top is {top}, give 1 to {len(ranked)}")
    return SteeringPlan(
        experts=[ExpertGain(layer, expert, gain) for layer, expert in ranked[:top]],
        model=model,
        provenance={
            "preset": name,
            "source": "arXiv 2505.14681, table of top experts",
            "layer_ids": "taken as absolute, 0-based",
        },
    )
