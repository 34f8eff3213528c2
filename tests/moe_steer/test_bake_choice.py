"""Forced experts and biases on logits, baked: a loaded checkpoint against the hooked model, or a refusal that says why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from families import FAMILIES, available, build_from_config, config_of
from family_cases import Case, busiest, case, collect_routing, logits
from moe_steer import ExpertGain, SteeringPlan, TopK, bake, steer, unbake, verify_bake
from moe_steer.baking.safetensors.biases import _GROUPED
from moe_steer.lab import LAB_MODEL
from test_bake_families import BAKED, quick_or_slow


def number_of_groups(name: str) -> list[int]:
    """What the configuration says, by whatever name."""
    text = config_of(name).get_text_config().to_dict()
    return [text.get(key) or 1 for key in ("n_group", "num_expert_group")]


BIASED = [
    *("afmoe", "axk1", "axk2", "axk2_groups", "bailing_hybrid", "beam", "deepseek_v3", "deepseek_v3_unnormalised"),
    *("deepseek_v32", "deepseek_v4", "dots1", "ernie4_5_moe", "exaone_moe", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"),
    *("gpt_oss", "hy_v3", "hy_v4", "inkling", "kimi_linear", "kolibri1", "laguna", "lfm2_moe", "longcat_flash"),
    *("mimo_v2_flash", "minimax_m2", "minimax_m3_vl_text", "nemotron_h", "solar_open", "glm4v_moe", "glm5_next"),
    *("kimi_k25", "step3p7"),
    *(name for name in ("dots3_note", "hy_v4_vl", "inkling2", "sarvam_mla", "sarvam_moe") if name in available()),
]
"""Families whose checkpoints have a bias that decides the choice."""
GROUPED = {name for name in BIASED if max(number_of_groups(name)) > 1}
CANNOT_BE_CHANGED = ("dbrx", "phimoe")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def ranked(it: Case) -> tuple[int, list[int]]:
    layer = max(it.blocks)
    return layer, busiest(it.routing[layer][0][0])


def routing_of(model: Any, it: Case, layer: int) -> list[dict[int, float]]:
    """Token by token: expert -> weight."""
    with collect_routing(model) as routing:
        logits(model, it.ids_BS)
    ids_TK, weights_TK = routing[layer][0]
    return [dict(zip(*row, strict=True)) for row in zip(ids_TK.tolist(), weights_TK.tolist(), strict=True)]


def assert_baked_equals_hooked(it: Case, plan: SteeringPlan, folder: Path, layer: int) -> Any:
    it.model.save_pretrained(folder / "source")
    certificate = bake(folder / "source", plan, folder / "baked")
    assert (certificate.verdict, certificate.family) == ("rounded", "verified")
    assert certificate.bound <= 2**-23
    plain = type(it.model).from_pretrained(folder / "baked").eval()
    with steer(it.model, plan, strict=True):
        hooked_BSV, hooked = logits(it.model, it.ids_BS), routing_of(it.model, it, layer)
    for found, wanted in zip(routing_of(plain, it, layer), hooked, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(logits(plain, it.ids_BS), hooked_BSV, atol=2e-5, rtol=1e-5)
    return certificate


@pytest.mark.parametrize("name", quick_or_slow(BIASED))
def test_forced_out(name: str, tmp_path: Path) -> None:
    it = case(name)
    layer, order = ranked(it)
    louder = next(expert for expert in order[1:] if expert < 8)  # 8 and 9 are LongCat's, without weights
    plan = SteeringPlan(experts=[ExpertGain(layer, order[0], force="out"), ExpertGain(layer, louder, 4.0)])
    if name in GROUPED:  # two groups of two are kept, and a token needs three of four
        it.model.save_pretrained(tmp_path / "source")
        with pytest.raises(ValueError, match="groups may hold fewer than a token needs, which no bias means exactly"):
            bake(tmp_path / "source", plan, tmp_path / "baked")
        return
    certificate = assert_baked_equals_hooked_with_gain(it, plan, tmp_path, layer)
    assert "forced out, by the router's bias in F32" in certificate.summary()
    verify_bake(tmp_path / "baked", tmp_path / "source")
    unbake(tmp_path / "baked", tmp_path / "original")
    before, after = (load_file(next((tmp_path / part).glob("*.safetensors"))) for part in ("source", "original"))
    assert all(torch.equal(before[key], after[key]) for key in before)


def assert_baked_equals_hooked_with_gain(it: Case, plan: SteeringPlan, folder: Path, layer: int) -> Any:
    """As ``assert_baked_equals_hooked``; a baked gain is in the expert, not in its weight."""
    it.model.save_pretrained(folder / "source")
    certificate = bake(folder / "source", plan, folder / "baked")
    assert (certificate.verdict, certificate.family) == ("rounded", "verified")
    plain = type(it.model).from_pretrained(folder / "baked").eval()
    with steer(it.model, plan, strict=True):
        hooked_BSV, hooked = logits(it.model, it.ids_BS), routing_of(it.model, it, layer)
    assert [set(row) for row in routing_of(plain, it, layer)] == [set(row) for row in hooked]
    torch.testing.assert_close(logits(plain, it.ids_BS), hooked_BSV, atol=2e-5, rtol=1e-5)
    return certificate


@pytest.mark.parametrize("name", quick_or_slow([name for name in BIASED if name != "gpt_oss"]))
def test_forced_in(name: str, tmp_path: Path) -> None:
    it = case(name)
    layer, order = ranked(it)
    plan = SteeringPlan(experts=[ExpertGain(layer, order[-1], force="in")])
    if name in GROUPED:
        it.model.save_pretrained(tmp_path / "source")
        with pytest.raises(ValueError, match="would choose its group as well, and other experts with it"):
            bake(tmp_path / "source", plan, tmp_path / "baked")
        return
    assert_baked_equals_hooked(it, plan, tmp_path, layer)


def test_a_bias_on_the_logits_of_gpt_oss(tmp_path: Path) -> None:
    it = case("gpt_oss")
    layer, order = ranked(it)
    plan = SteeringPlan(
        experts=[ExpertGain(layer, order[-1], logit_bias=1.5), ExpertGain(layer, order[0], force="out")]
    )
    assert_baked_equals_hooked(it, plan, tmp_path, layer)
    forced = SteeringPlan(experts=[ExpertGain(layer, order[-1], force="in")])
    with pytest.raises(ValueError, match="would give it all the weight"):
        bake(tmp_path / "source", forced, tmp_path / "other")


def test_groups_that_stay_large_enough_are_baked(tmp_path: Path) -> None:
    """DeepSeek-V3's rule with two groups of four: three are left in one of them, and a token needs three."""
    config = config_of("deepseek_v3")
    config.n_group, config.topk_group = 2, 1
    model = build_from_config(config)
    ids_BS = case("deepseek_v3").ids_BS
    model.save_pretrained(tmp_path / "source")
    layer = FAMILIES["deepseek_v3"].moe_layers[-1]
    with collect_routing(model) as routing:
        logits(model, ids_BS)
    expert = busiest(routing[layer][0][0])[0]
    plan = SteeringPlan(experts=[ExpertGain(layer, expert, force="out")])
    bake(tmp_path / "source", plan, tmp_path / "baked")
    plain = type(model).from_pretrained(tmp_path / "baked").eval()
    with steer(model, plan, strict=True) as audit:
        hooked_BSV = logits(model, ids_BS)
    assert audit.chosen[layer, expert].selected_before > 0 == audit.chosen[layer, expert].selected_after
    torch.testing.assert_close(logits(plain, ids_BS), hooked_BSV, atol=2e-5, rtol=1e-5)
    two = SteeringPlan(experts=[ExpertGain(layer, e, force="out") for e in (0, 1)])
    with pytest.raises(ValueError, match="1 of 2 groups may hold fewer"):
        bake(tmp_path / "source", two, tmp_path / "other")


def test_the_lab_model_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from launch.cli.main import main

    plan, baked = tmp_path / "plan.json", tmp_path / "baked"
    words = ["--experts", "2:4=3", "--force-out", "2:0", "3:9"]
    assert main(["plan", "--out", str(plan), *words]) == 0
    source = ["--model", str(LAB_MODEL)]
    assert main(["bake", "--plan", str(plan), *source, "--out", str(baked)]) == 0
    assert "layer   3 expert   9: rounded, worst 0.0e+00, rms 0.0e+00; forced out, by" in capsys.readouterr().out
    assert main(["verify", "--baked", str(baked), *source, "--forward", "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    assert "greedy tokens agree" in said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_in_half_precision_is_beyond_all_scores(dtype: torch.dtype, tmp_path: Path) -> None:
    it = case("glm4_moe_lite")
    layer, order = ranked(it)
    it.model.save_pretrained(tmp_path / "source")
    shard = tmp_path / "source" / "model.safetensors"
    tensors = {
        key: value.to(dtype) if key.endswith("e_score_correction_bias") else value
        for key, value in load_file(shard).items()
    }
    save_file(tensors, shard, {"format": "pt"})
    entries = [ExpertGain(layer, order[-1], force="in"), ExpertGain(layer, order[0], force="out")]
    bake(tmp_path / "source", SteeringPlan(experts=entries), tmp_path / "baked")
    plain = type(it.model).from_pretrained(tmp_path / "baked", dtype=torch.float32).eval()
    for row in routing_of(plain, it, layer):
        assert order[-1] in row
        assert order[0] not in row


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("qwen3_moe", {"force": "out"}, "the router of qwen3_moe has no bias that decides which experts are chosen"),
        ("mixtral", {"force": "in"}, "the router of mixtral has no bias"),
        (
            "granitemoe",
            {"logit_bias": 1.0},
            r"expert 0 logit \+1 cannot be baked: the router of granitemoe has no bias",
        ),
        (
            "deepseek_v3",
            {"logit_bias": 1.0},
            "decides the choice alone, and a bias on the logit moves the weight as well",
        ),
    ],
)
def test_what_no_weights_mean_is_refused_and_says_why(
    name: str, entry: dict[str, Any], message: str, tmp_path: Path
) -> None:
    it = case(name)
    layer = max(it.blocks)
    it.model.save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match=message) as error:
        bake(tmp_path / "source", SteeringPlan(experts=[ExpertGain(layer, 0, **entry)]), tmp_path / "baked")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="one number of experts a token for all layers; set it there"):
        bake(tmp_path / "source", SteeringPlan(top_k=[TopK(layer, 1)]), tmp_path / "baked")
    scoped = SteeringPlan(experts=[ExpertGain(layer, 0, force="out")], scope="thought")
    with pytest.raises(ValueError, match="scope 'thought' cannot be baked"):
        bake(tmp_path / "source", scoped, tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


def test_numbers_that_config_json_leaves_out_are_asked_for(tmp_path: Path) -> None:
    it = case("deepseek_v3")
    it.model.save_pretrained(tmp_path / "source")
    plan = SteeringPlan(experts=[ExpertGain(max(it.blocks), 0, force="in")])
    path = tmp_path / "source" / "config.json"
    text = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in text.items() if key != "n_group"}))
    with pytest.raises(ValueError, match="config.json lacks n_group or topk_group"):
        bake(tmp_path / "source", plan, tmp_path / "baked")
    path.write_text(json.dumps({key: value for key, value in text.items() if key != "num_experts_per_tok"}))
    out = SteeringPlan(experts=[ExpertGain(max(it.blocks), 0, force="out")])
    with pytest.raises(ValueError, match="does not say how many experts a token has"):
        bake(tmp_path / "source", out, tmp_path / "baked")


def test_the_table_of_grouped_families_is_whole() -> None:
    types = {config_of(name).get_text_config().model_type: name for name in BIASED}
    grouped = {kind for kind, name in types.items() if hasattr(config_of(name).get_text_config(), "topk_group")}
    assert grouped - _GROUPED == set()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BAKED if name not in BIASED])
def test_every_other_family_refuses(name: str, tmp_path: Path) -> None:
    it = case(name)
    it.model.save_pretrained(tmp_path / "source")
    plan = SteeringPlan(experts=[ExpertGain(max(it.blocks), 0, force="out")])
    words = "cannot be changed" if name in CANNOT_BE_CHANGED else "has no bias that decides which experts are chosen"
    with pytest.raises(ValueError, match=words):
        bake(tmp_path / "source", plan, tmp_path / "baked")
