"""A baked checkpoint, loaded as it is, against the hooked model: every family that can be steered."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bake_checkpoints import read_all
from families import FAMILIES, available, config_of
from families import REFUSED as NOT_STEERABLE
from family_cases import Case, case, logits
from moe_steer import SteeringPlan, steer
from moe_steer.baking import Certificate, bake
from moe_steer.baking.safetensors.folder import REFUSED, VERIFIED
from moe_steer.layers import moe_layers

CORE = [
    "aria",
    "dbrx",
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "gemma4",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "hunyuan_v1_moe",
    "longcat_flash",
    "minimax_m2",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_vl_moe",
    "step3p7",
]
"""Compared bit for bit in every run: both models loaded from disk, experts run one by one."""
QUICK = ("deepseek_v3", "gpt_oss", "mixtral", "qwen3_moe")
"""Of which ``make check`` compares these."""
BAKED = [name for name in available() if name not in NOT_STEERABLE and FAMILIES[name].model_type not in REFUSED]
OTHERS = [name for name in BAKED if name not in CORE]
FUSED = ["deepseek_v3", "jamba", "kimi_linear", "mixtral", "qwen3_moe"]
"""Families whose files hold single experts; the library can also write them fused, as it holds them in memory."""


def quick_or_slow(names: list[str]) -> list[Any]:
    """The names as parameters, marked slow but for the quick ones."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def load(like: Any, folder: Path, **options: Any) -> Any:
    try:
        return type(like).from_pretrained(folder, experts_implementation="eager", **options).eval()
    except ValueError:  # LongCat has no choice of implementation
        return type(like).from_pretrained(folder, **options).eval()


def baked(it: Case, folder: Path, plan: SteeringPlan, **options: Any) -> tuple[Path, Path, Certificate]:
    it.model.save_pretrained(folder / "source", **options)
    certificate = bake(folder / "source", plan, folder / "baked")
    return folder / "source", folder / "baked", certificate


@pytest.mark.parametrize("name", quick_or_slow(CORE))
def test_baked_equals_hooked_bit_for_bit_and_nothing_else_changes(name: str, tmp_path: Path) -> None:
    it = case(name)
    source, target, certificate = baked(it, tmp_path, it.plan())
    assert (certificate.verdict, certificate.family) == ("exact", "verified")
    before, after = read_all(source), read_all(target)
    assert before.keys() == after.keys()
    touched = {tensor for entry in certificate.entries for tensor in entry.tensors}
    assert {key for key in before if before[key] != after[key]} == touched
    assert (source / "config.json").read_bytes() == (target / "config.json").read_bytes()
    original, plain = load(it.model, source), load(it.model, target)
    with steer(original, it.plan(), quiet=True):
        hooked_BSV = logits(original, it.ids_BS)
    assert torch.equal(logits(plain, it.ids_BS), hooked_BSV)
    assert not torch.allclose(logits(original, it.ids_BS), hooked_BSV, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_other_family(name: str, tmp_path: Path) -> None:
    """One load only: the model in memory is hooked, so sums may be taken in another order."""
    it = case(name)
    _, target, certificate = baked(it, tmp_path, it.plan())
    assert (certificate.verdict, certificate.family) == ("exact", "verified")
    plain = type(it.model).from_pretrained(target).eval()
    with steer(it.model, it.plan(), quiet=True):
        hooked_BSV = logits(it.model, it.ids_BS)
    torch.testing.assert_close(logits(plain, it.ids_BS), hooked_BSV, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", quick_or_slow(FUSED))
def test_the_fused_layout_of_the_same_model(name: str, tmp_path: Path) -> None:
    it = case(name)
    source, target, certificate = baked(it, tmp_path, it.plan(), save_original_format=False)
    assert all(tensor.endswith("experts.down_proj") for entry in certificate.entries for tensor in entry.tensors)
    original, plain = load(it.model, source), load(it.model, target)
    with steer(original, it.plan(), quiet=True):
        hooked_BSV = logits(original, it.ids_BS)
    assert torch.equal(logits(plain, it.ids_BS), hooked_BSV)


def experts_output(model: Any, ids_BS: torch.Tensor, layer: int) -> torch.Tensor:
    """What the experts of one layer add up to."""
    found = {}

    def keep(_: Any, __: Any, output: torch.Tensor) -> None:
        found["output"] = output.detach().clone()

    handle = next(it for it in moe_layers(model) if it.index == layer).experts.register_forward_hook(keep)
    try:
        logits(model, ids_BS)
    finally:
        handle.remove()
    return found["output"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gain"), [(name, (1.5, 10.0, 3.0)[i % 3]) for i, name in enumerate(CORE[::2])])
def test_other_gains_in_bfloat16_are_off_by_rounding_only(name: str, gain: float, tmp_path: Path) -> None:
    """Stored in bfloat16, computed in float32, so that the stored numbers alone make the difference."""
    it = case(name)
    plan = dataclasses.replace(
        it.plan(), experts=[dataclasses.replace(entry, gain=gain) for entry in it.plan().experts]
    )
    stored = {key: value.bfloat16() for key, value in it.model.state_dict().items() if value.is_floating_point()}
    it.model.save_pretrained(tmp_path / "source", state_dict={**it.model.state_dict(), **stored})
    certificate = bake(tmp_path / "source", plan, tmp_path / "baked")
    assert certificate.verdict == "rounded"
    assert all(entry.worst <= entry.bound <= 2**-8 and entry.rms < 2e-3 for entry in certificate.entries)
    original = load(it.model, tmp_path / "source", dtype=torch.float32)
    plain = load(it.model, tmp_path / "baked", dtype=torch.float32)
    first = plan.experts[0].layer
    with steer(original, plan, quiet=True):
        hooked_TD = experts_output(original, it.ids_BS, first)
        hooked_BSV = logits(original, it.ids_BS)
    assert (experts_output(plain, it.ids_BS, first) - hooked_TD).norm() <= 2e-3 * hooked_TD.norm()
    assert (logits(plain, it.ids_BS) - hooked_BSV).norm() <= 4e-3 * hooked_BSV.norm()  # three experts, further layers


@pytest.mark.parametrize("name", [name for name in available() if FAMILIES[name].model_type in REFUSED])
def test_families_that_take_no_plan_are_refused_by_name(name: str, tmp_path: Path) -> None:
    from families import build
    from moe_steer import ExpertGain

    model = build(name)
    model.save_pretrained(tmp_path / "source")
    plan = SteeringPlan(experts=[ExpertGain(FAMILIES[name].moe_layers[-1], 0, 2.0)])
    with pytest.raises(ValueError, match=f"{FAMILIES[name].model_type}.* cannot be baked: "):
        bake(tmp_path / "source", plan, tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


def test_the_table_names_only_families_that_are_compared_here() -> None:
    types = {FAMILIES[name].model_type for name in BAKED}
    configs = [config_of(name) for name in BAKED]
    types |= {config.get_text_config().model_type for config in configs} | {config.model_type for config in configs}
    # Wrappers and text parts that are the same decoder under another name.
    same = {"aria", "gemma4", "kimi_k2", "qwen3_5_moe", "qwen4_exp", "minimax_m3_vl", "qwen3_vl_moe_text"}
    same |= {"inkling2_loop_text"}  # test_layers_run_again compares it
    later = {FAMILIES[name].model_type for name in FAMILIES.keys() - set(available())}  # than the installed library
    assert VERIFIED - types <= same | later | {f"{name}_text" for name in later}
