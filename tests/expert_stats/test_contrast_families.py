"""The truncated pass on every family that transformers has: rows padded on the right equal single rows, and nothing is
left behind."""

from __future__ import annotations

import pytest

from expert_stats import MarkedSequence, collect_contrast
from families import available, build
from tiny import hook_count

SEVERAL_STREAMS = {"deepseek_v4", "hy_v4", "hy_v4_vl", "glm5_next", "qwen4_exp"}
REFUSED = {"zaya": "zaya cannot be observed", "ernie4_5_vl_moe": "several expert blocks in one decoder layer"}
SEQUENCES = [
    MarkedSequence("a", tuple(range(5, 17)), (4, 7)),
    MarkedSequence("b", tuple(range(20, 26)), (), (3, 5)),
]


@pytest.mark.parametrize("name", available())
def test_a_batch_equals_single_rows_in_every_family(name: str) -> None:
    model = build(name)
    if name in SEVERAL_STREAMS | set(REFUSED):
        with pytest.raises(
            ValueError, match=REFUSED.get(name, "has no single residual stream to take a direction from")
        ):
            collect_contrast(model, SEQUENCES, [0, 1])
        assert hook_count(model) == 0
        return
    together = collect_contrast(model, SEQUENCES, [0, 1])
    alone = collect_contrast(model, SEQUENCES, [0, 1], batch_tokens=1)
    for layer in (0, 1):
        mine, other = together[layer].difference_D, alone[layer].difference_D
        assert float((mine - other).abs().max()) <= 1e-4 * float(other.abs().max())
    assert hook_count(model) == 0
