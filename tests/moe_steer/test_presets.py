import pytest

from moe_steer.entries.presets import PRESETS, preset_plan
from moe_steer.layers import ModelShape

R1 = ModelShape("deepseek_v3", 61, 256, 8, tuple(range(3, 61)), 7168)
QWEN3 = ModelShape("qwen3_moe", 94, 128, 8, tuple(range(94)), 4096)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_the_model_it_was_published_for(name: str) -> None:
    preset_plan(name, top=5).check(R1 if "r1" in name else QWEN3)
    with pytest.raises(ValueError, match="the plan was made for"):
        preset_plan(name).check(QWEN3 if "r1" in name else R1)


def test_the_headline_plan() -> None:
    entries = [(e.layer, e.expert, e.gain) for e in preset_plan("rice-r1-math").experts]
    assert entries == [(39, 182, 64.0), (29, 126, 64.0)]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="preset 'rice' is unknown: choose one of rice-r1-math"):
        preset_plan("rice")
    with pytest.raises(ValueError, match="top is 6, give 1 to 5"):
        preset_plan("rice-r1-math", top=6)
