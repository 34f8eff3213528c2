"""The memory plan against what models of several shapes really hold, and the verdicts people read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache
from transformers.integrations import sdpa_attention

from launch.cli.main import main
from moe_steer.backends import checkpoint, memory, shards
from moe_steer.backends.allocations import Allocations
from moe_steer.backends.blueprint import skeleton
from moe_steer.backends.memory import choose_backend, plan_memory
from moe_steer.backends.rehearsal import Rehearsed, rehearse, rehearse_step
from moe_steer.backends.zero3 import KEEP_WHOLE_BELOW

GIB = 2**30
R1 = {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256, "kv_lora_rank": 512, "q_lora_rank": 1536,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
    "max_position_embeddings": 163840, "dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
}  # fmt: skip
TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
MID = {
    "vocab_size": 4000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
}
EXPERTS = {
    "moe_intermediate_size": 64,
    "num_experts_per_tok": 4,
    "n_routed_experts": 16,
    "num_experts": 16,
    "num_key_value_heads": 4,
}
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_group": 4,
    "topk_group": 2,
}
CASES = {
    "tiny deepseek_v3": ("deepseek_v3", {**TINY, **EXPERTS, **LATENT}, 2, 64),
    "mid deepseek_v3": ("deepseek_v3", {**MID, **EXPERTS, **LATENT, "num_key_value_heads": 8}, 2, 96),
    "mid qwen3_moe": ("qwen3_moe", {**MID, **EXPERTS, "head_dim": 64}, 3, 80),
    "mid glm4_moe": ("glm4_moe", {**MID, **EXPERTS, "head_dim": 64}, 1, 200),
    "tiny gpt_oss": ("gpt_oss", {**TINY, "num_local_experts": 8, "num_key_value_heads": 2, "head_dim": 16}, 2, 50),
    "mid qwen2": ("qwen2", {**MID, "num_key_value_heads": 2}, 2, 128),
}


def config_of(model_type: str, values: dict[str, Any]) -> Any:
    return CONFIG_MAPPING[model_type](**values)


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_within_5_percent_of_what_one_process_allocates(case: str) -> None:
    model_type, values, batch, tokens = CASES[case]
    config = config_of(model_type, values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad(), Allocations() as allocations:
        model(torch.zeros((batch, tokens), dtype=torch.long), past_key_values=cache, use_cache=True, logits_to_keep=1)
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    plan = plan_memory(config, 1, 100 * GIB, dtype="float32", context=tokens, batch=batch, prompt=tokens, on_gpu=False)
    plain = plan.footprints[0]
    assert plain.weights == pytest.approx(weights, rel=0.01)
    assert plain.cache + plain.activations == pytest.approx(allocations.peak, rel=0.05)
    assert plain.total == pytest.approx(weights + allocations.peak, rel=0.05)


def test_the_latent_cache_of_r1_is_70272_bytes_a_token() -> None:
    from moe_steer.backends.blueprint import skeleton

    model = skeleton(config_of("deepseek_v3", R1), "bfloat16")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(671.0e9, rel=1e-3)
    assert rehearse(model, 1, 128).cache == 128 * 70272


@pytest.mark.parametrize(
    ("gpus", "gib", "fastest"),
    [(8, 141, "tp_ep"), (16, 80, "tp_ep"), (8, 80, None)],
    ids=["8xH200", "16xH100", "8xH100"],
)
def test_r1_in_fp8_goes_where_it_is_known_to_go(gpus: int, gib: float, fastest: str | None) -> None:
    plan = plan_memory(config_of("deepseek_v3", R1), gpus, int(gib * 0.92 * GIB), context=4096, prompt=256)
    assert (plan.fastest and plan.fastest.backend) == fastest
    by_name = {item.backend: item for item in plan.footprints}
    known = {8: (87.8, 156), 16: (49.3, 78)}[gpus]  # weights in GiB: FP8 under tp_ep, bf16 under ZeRO-3
    assert by_name["tp_ep"].weights / GIB == pytest.approx(known[0], rel=0.02)
    assert by_name["zero3"].weights / GIB == pytest.approx(known[1], rel=0.02)
    assert ("16 GPUs" in plan.advice) == (fastest is None)


def test_backends_that_cannot_run_a_model_say_why() -> None:
    dense = plan_memory(config_of("qwen2", {**TINY, "num_key_value_heads": 2}), 2, GIB, context=64, prompt=64)
    reasons = {item.backend: item.why_not for item in dense.footprints}
    assert reasons["plain"] == reasons["tp_ep"] == reasons["zero3"] == ""
    assert "no preset for qwen2" in reasons["autoep"]
    odd = plan_memory(config_of("qwen3_moe", {**TINY, **EXPERTS}), 3, GIB, context=64, prompt=64)
    assert "16 experts cannot be shared evenly by 3 ranks" in {i.backend: i.why_not for i in odd.footprints}["tp_ep"]


def test_offload_leaves_one_layer_on_the_device() -> None:
    config = config_of("qwen2", {**MID, "num_key_value_heads": 2})
    resting = plan_memory(config, 1, GIB, dtype="float32", context=64, prompt=64, offload="cpu").footprints[-1]
    whole = plan_memory(config, 1, GIB, dtype="float32", context=64, prompt=64).footprints[-1]
    assert resting.total < whole.total
    assert resting.host == whole.weights


def test_more_ranks_and_fewer_bytes_never_need_more() -> None:
    config = config_of("deepseek_v3", {**MID, **EXPERTS, **LATENT})
    plans = {n: plan_memory(config, n, GIB, dtype="float32", context=64, prompt=64) for n in (1, 2, 4, 8)}
    for before, after in ((1, 2), (2, 4), (4, 8)):
        for left, right in zip(plans[before].footprints, plans[after].footprints, strict=True):
            assert right.weights <= left.weights


def test_the_command_prints_the_table_and_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["memory", "--model", "lab", "--gpus", "2", "--gpu-gib", "1", "--context", "512", "--prompt", "64"]) == 0
    )
    text = capsys.readouterr().out
    assert "fastest that fits: plain" in text
    assert all(name in text for name in ("tp_ep", "autoep_zero3", "activations"))
    assert (
        main(["memory", "--model", "lab", "--gpus", "1", "--gpu-gib", "0.001", "--context", "512", "--prompt", "64"])
        == 1
    )
    assert "none fits: use" in capsys.readouterr().out
    assert main(["memory", "--model", "./nowhere", "--gpus", "1", "--gpu-gib", "1"]) == 1
    assert "there is no model folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("gpu-gib", "inf", "is inf: give a finite number"),
        ("gpu-gib", "nan", "is nan: give a finite number"),
        ("gpu-gib", "-3", "is -3: give a number above 0"),
        ("host-gib", "inf", "is inf: give a finite number"),
        ("host-gib", "-1", "is -1: give a number above 0"),
        ("gpus", "0", "is 0: give a whole number >= 1"),
        ("prompt", "0", "is 0: give a whole number >= 1"),
    ],
)
def test_numbers_of_no_machine_are_named(
    option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"gpus": "1", "gpu-gib": "80", option: value}
    asked = [word for name, one in given.items() for word in (f"--{name}", one)]
    assert main(["memory", "--model", "lab", *asked]) == 1
    assert capsys.readouterr().err == f"moe-steer: --{option} {said}\n"


def test_a_decode_step_repeats_keys_and_values_for_the_heads_that_share_them() -> None:
    """Rows of unequal prompts bring a mask, and under a mask the library has no kernel for shared keys."""
    values = {**MID, **EXPERTS, "head_dim": 64, "num_key_value_heads": 2, "dtype": "bfloat16"}
    model = skeleton(CONFIG_MAPPING["qwen3_moe"](**values), "bfloat16")
    found = rehearse_step(model, 4, 500)
    repeated = 2 * 4 * values["num_attention_heads"] * 500 * 64 * 2
    if hasattr(sdpa_attention, "pack_gqa"):  # since transformers 5.23 the heads of one query stand in for its tokens
        assert found.activations < repeated / 2
    else:
        assert repeated <= found.activations < 2 * repeated
    assert found.cache == rehearse(model, 4, 500).cache
    alone = rehearse_step(
        skeleton(CONFIG_MAPPING["qwen3_moe"](**{**values, "num_key_value_heads": 8}), "bfloat16"), 4, 500
    )
    assert alone.activations < repeated / 2, "nothing is repeated where every head has its own"


def test_latent_attention_is_decoded_without_expanding_the_past() -> None:
    model = skeleton(CONFIG_MAPPING["deepseek_v3"](**{**MID, **EXPERTS, **LATENT, "num_key_value_heads": 8}), "float32")
    found = rehearse_step(model, 2, 300)
    assert found.activations == 0
    assert found.cache == rehearse(model, 2, 300).cache


def test_fp8_is_planned_as_what_it_becomes_here(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG_MAPPING["deepseek_v3"](**R1)
    for name in ("rehearse", "rehearse_step"):  # weights alone are looked at
        monkeypatch.setattr(memory, name, lambda *_: Rehearsed(0, 0))

    def weights(on_gpu: bool, dtype: str = "auto") -> float:
        plan = plan_memory(config, 16, 80 * GIB, dtype=dtype, context=64, prompt=16, on_gpu=on_gpu)
        return next(item.weights for item in plan.footprints if item.backend == "tp_ep") / GIB

    assert weights(on_gpu=True) == pytest.approx(49.3, rel=0.02)
    assert weights(on_gpu=False) == pytest.approx(98, rel=0.02), "a CPU expands it"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert weights(on_gpu=True) == pytest.approx(98, rel=0.02), "so does an A100"
    assert weights(on_gpu=True, dtype="fp8") == pytest.approx(49.3, rel=0.02), "asked for by name"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert weights(on_gpu=True) == pytest.approx(49.3, rel=0.02)


def test_planning_fp8_leaves_the_librarys_experts_as_they_were() -> None:
    """Else the hundredth plan of one process would fail at Python's limit of recursion."""
    from transformers.integrations import finegrained_fp8

    config = CONFIG_MAPPING["deepseek_v3"](**{**MID, **EXPERTS, **LATENT, "num_key_value_heads": 8})
    before = finegrained_fp8.FP8Experts, finegrained_fp8.FP8Experts.__init__, finegrained_fp8.FP8Experts.forward
    model = skeleton(config, "fp8")
    assert any(isinstance(module, finegrained_fp8.FP8Experts) for module in model.modules())
    after = finegrained_fp8.FP8Experts, finegrained_fp8.FP8Experts.__init__, finegrained_fp8.FP8Experts.forward
    assert after == before


def test_fp8_that_stays_fp8_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG_MAPPING["deepseek_v3"](**R1)
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: None)
    checkpoint.refuse_without_kernels(config)  # here it is expanded
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(ValueError, match=r"needs the package 'kernels' on this GPU: pip install 'moe-steer\[fp8\]'"):
        checkpoint.refuse_without_kernels(config)
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: object())
    checkpoint.refuse_without_kernels(config)


@pytest.mark.slow
def test_auto_chooses_for_the_jobs_batch_and_length() -> None:
    recipe = Path(__file__).parents[2] / "launch" / "configs" / "qwen3-30b-1xh100.json"
    shape = json.loads(recipe.read_text())["shape"]
    config = CONFIG_MAPPING[shape.pop("model_type")](**shape)
    limit = int(0.92 * 80 * GIB)
    assert choose_backend(config, 2, "auto", "", limit, True)[0] == "plain"
    assert choose_backend(config, 2, "auto", "", limit, True, batch=8, context=32768)[0] == "tp_ep"


def test_a_module_of_several_parameters_is_gathered_twice_over() -> None:
    """DeepSpeed copies each out of the buffer that they came in; measured: 194.2 MiB for 96 MiB of experts."""
    model = torch.nn.Module()
    model.experts = torch.nn.Module()
    model.experts.up = torch.nn.Parameter(torch.empty(KEEP_WHOLE_BELOW + 1, device="meta"))
    alone = shard_of_zero3(model)
    assert alone == (KEEP_WHOLE_BELOW + 1) * 4
    model.experts.down = torch.nn.Parameter(torch.empty(KEEP_WHOLE_BELOW + 1, device="meta"))
    assert shard_of_zero3(model) == 4 * alone


def shard_of_zero3(model: torch.nn.Module) -> int:
    """Bytes that the largest module takes when it is gathered."""
    return max(shards._own(module, name, set()) for name, module in model.named_modules())
