"""What can be said of the backends without a second process: names, refusals, rules, damaged files, layouts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

import tiny
from families import available, build
from moe_steer import load_model
from moe_steer.backends.blueprint import skeleton
from moe_steer.backends.checkpoint import cached_folder
from moe_steer.backends.layout import Layout, layout_of, lockstep, remember_layout
from moe_steer.backends.memory import choose_backend
from moe_steer.backends.offload import in_cpu_memory
from moe_steer.backends.registry import BACKENDS, refusal
from moe_steer.backends.shard_index import check_shards
from moe_steer.backends.streaming import whole_blocks
from moe_steer.backends.tp_ep import _left_as_loaded, parallel_rules
from moe_steer.backends.zero3 import PRESETS, settings, zero3_section
from rank_processes import run_ranks


def config_of(model_type: str, **values: Any) -> Any:
    base = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
    }
    return CONFIG_MAPPING[model_type](**{**base, **values})


@pytest.mark.parametrize("name", ["autotp", "tp", "init_inference"])
def test_autotp_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match="AutoTP leaves the fused experts of transformers 5 whole on every rank"):
        load_model("lab", backend=name)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(
        ValueError, match="backend 'magic' is unknown: choose one of auto, plain, device_map, tp_ep, autoep"
    ):
        load_model("lab", backend="magic")


def test_a_backend_without_its_ranks_says_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="the ranks have not met yet: start with 'deepspeed'"):
        load_model("lab", backend="zero3")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero3", "autoep"])
def test_one_process_needs_no_compiler(backend: str, tmp_path: Path) -> None:
    """DeepSpeed compiles an operator for joining ranks, unless it is told not to; zero3 joins earlier than autoep."""
    script, compiled = tmp_path / "load.py", tmp_path / "compiled"
    script.write_text(f"from moe_steer import load_model; load_model('lab', backend={backend!r})")
    (nothing := tmp_path / "empty").mkdir()
    done = run_ranks(script, 1, [], 120, PATH=str(nothing), TORCH_EXTENSIONS_DIR=str(compiled))
    assert done.codes == [0], done.text[-2000:]
    assert not compiled.exists()
    assert not list(nothing.iterdir())


def test_offload_without_zero3_is_refused() -> None:
    with pytest.raises(ValueError, match="offload 'cpu' is a feature of zero3 and device_map, not of plain"):
        load_model("lab", backend="plain", offload="cpu")


def test_old_transformers_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "5.17.0")
    config = config_of("qwen3_moe")
    assert "rewrites expert ids under expert parallelism" in refusal("tp_ep", config, 2)
    assert refusal("plain", config, 2) == ""


def test_refusals_name_what_is_wrong() -> None:
    assert "no preset for glm4_moe" in refusal("autoep", config_of("glm4_moe"), 2)
    assert "128 experts cannot be shared evenly by 3 ranks" in refusal(
        "autoep_zero3", config_of("qwen3_moe", num_experts=128), 3
    )
    assert "no parallel plan for gpt2" in refusal("tp_ep", config_of("gpt2"), 2)
    assert "no expert-parallel plan for longcat_flash" in refusal("tp_ep", config_of("longcat_flash"), 2)
    assert all(refusal(name, config_of("deepseek_v3"), 8) == "" for name in BACKENDS if name != "device_map")


def test_presets_are_those_that_deepspeed_states() -> None:
    from deepspeed.module_inject.auto_ep_presets.registry import preset_name_for_hf_model_type

    assert {model_type: preset_name_for_hf_model_type(model_type) for model_type in PRESETS} == PRESETS


def test_attention_stays_whole_where_ranks_outnumber_key_value_heads() -> None:
    model = skeleton(config_of("qwen3_moe", num_key_value_heads=4, num_experts=8, moe_intermediate_size=32))
    within, _ = parallel_rules(model, 4)
    beyond, experts = parallel_rules(model, 8)
    assert within["model.layers.*.self_attn.k_proj"] == "colwise"
    assert {style for name, style in beyond.items() if "self_attn" in name} == {"replicate"}
    assert beyond["model.layers.*.mlp.gate_proj"] == "colwise"
    assert "model.layers.*.mlp.experts" in experts


def test_fp8_layers_stay_whole_where_their_blocks_do_not_divide() -> None:
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "moe_intermediate_size": 256,
        "n_routed_experts": 16,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    model = skeleton(config_of("deepseek_v3", **sizes, num_key_value_heads=8, quantization_config=quantization))
    rules, _ = parallel_rules(model, 4)
    assert rules["model.layers.*.mlp.down_proj"] == "rowwise"  # 1024 / 128 = 8 blocks for 4 ranks
    assert rules["model.layers.*.mlp.shared_experts.gate_proj"] == "replicate"  # 256 / 128 = 2 blocks for 4 ranks
    assert parallel_rules(model, 2)[0]["model.layers.*.mlp.shared_experts.gate_proj"] == "colwise"


def test_partly_filled_fp8_blocks_are_expanded_with_the_stated_block_size() -> None:
    """DeepSeek-R1's kv_a_proj_with_mqa has 576 rows in blocks of 128; 192 rows would silently be read as two blocks of 96."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    config = config_of("deepseek_v3", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    for rows in (576, 192):
        weight = torch.randn(rows, 256).to(torch.float8_e4m3fn)
        scales = torch.rand(-(-rows // 128), 2) + 0.5
        naive = weight.float() * scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)
        with whole_blocks(config):
            assert torch.equal(Fp8Dequantize(None)._dequantize_one(weight, scales), naive)
    weight, scales = torch.randn(576, 256).to(torch.float8_e4m3fn), torch.ones(5, 2)
    with pytest.raises(ValueError, match="not divisible"):  # the library on its own, outside of the block
        Fp8Dequantize(None)._dequantize_one(weight, scales)


def test_a_damaged_or_missing_weight_file_is_named(tmp_path: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in names:
        save_file({name[:11]: torch.zeros(100)}, str(tmp_path / name))
    index = {"weight_map": {name[:11]: name for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    check_shards(tmp_path)
    content = (tmp_path / names[1]).read_bytes()
    (tmp_path / names[1]).write_bytes(content[:-8])
    with pytest.raises(ValueError, match=re.escape(f"the weight file {names[1]}") + r".*is damaged .*fetch it again"):
        check_shards(tmp_path)
    save_file({"another": torch.zeros(100)}, str(tmp_path / names[1]))
    with pytest.raises(ValueError, match=r"is damaged \(the tensor model-00002 is not in it\): fetch it again"):
        check_shards(tmp_path)
    (tmp_path / names[1]).write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="it has no safetensors header"):
        check_shards(tmp_path)
    (tmp_path / names[1]).unlink()
    with pytest.raises(ValueError, match=re.escape(f"the weight file {names[1]} is missing")):
        check_shards(tmp_path)


def test_one_file_beside_shards_is_two_checkpoints(tmp_path: Path) -> None:
    """transformers loads model.safetensors, engines what the index names: a stray file is other weights, without a word."""
    model = tiny.qwen3_moe()
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    model.save_pretrained(tmp_path / "whole")
    check_shards(tmp_path / "shards")
    check_shards(tmp_path / "whole")
    shutil.copy(tmp_path / "whole" / "model.safetensors", tmp_path / "shards")
    for partial in (False, True):
        with pytest.raises(ValueError, match="holds two checkpoints"):
            check_shards(tmp_path / "shards", partial=partial)
    with pytest.raises(ValueError, match="leave one, so that all engines load the same"):
        load_model(tmp_path / "shards")
    single = {"weight_map": dict.fromkeys(load_file(tmp_path / "whole" / "model.safetensors"), "model.safetensors")}
    (tmp_path / "whole" / "model.safetensors.index.json").write_text(json.dumps(single))
    check_shards(tmp_path / "whole")


def test_auto_takes_plain_where_it_fits_and_says_so() -> None:
    backend, reason = choose_backend(tiny.deepseek_v3().config, 1, "auto", "")
    assert backend == "plain"
    assert reason.startswith("plain: the fastest that fits, ")
    assert "\n" not in reason


def test_auto_takes_the_next_where_the_model_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.deepseek_v3().config
    whole = sum(p.numel() * p.element_size() for p in tiny.deepseek_v3().parameters())
    monkeypatch.setattr("moe_steer.backends.memory.available_bytes", lambda world_size: (int(whole * 2.2), "test"))
    monkeypatch.setattr(
        "moe_steer.backends.memory.rehearse",
        lambda *args, **kwargs: __import__("moe_steer.backends.rehearsal").backends.rehearsal.Rehearsed(
            0, int(whole * 1.4)
        ),
    )
    assert choose_backend(config, 2, "auto", "")[0] == "tp_ep"
    monkeypatch.setattr("moe_steer.backends.memory.available_bytes", lambda world_size: (whole // 50, "test"))
    with pytest.raises(ValueError, match="no backend fits .* a rank .*: use "):
        choose_backend(config, 2, "auto", "")


def test_layouts_say_whose_tokens_count() -> None:
    same = Layout(backend="tp_ep", rank=1, world_size=4, same_tokens=True, lockstep=True)
    own = Layout(backend="zero3", rank=1, world_size=4, lockstep=True)
    assert (same.share, same.writes) == ((0, 1), False)
    assert (own.share, own.writes) == ((1, 4), True)
    model = tiny.qwen2()
    assert layout_of(model) == Layout()
    remember_layout(model, own)
    assert layout_of(model) is own
    del model.steering_layout


def test_in_step_leaves_a_lone_model_alone() -> None:
    model = tiny.qwen2()
    before = tiny.hook_count(model)
    with lockstep(model):
        assert tiny.hook_count(model) == before


def test_settings_state_the_precision() -> None:
    assert settings(torch.bfloat16)["bf16"] == {"enabled": True}
    assert "bf16" not in settings(torch.float32)
    assert zero3_section(in_cpu_memory())["offload_param"]["device"] == "cpu"


def test_fp8_codes_are_not_cast_while_an_engine_is_made() -> None:
    model = torch.nn.Linear(4, 4, bias=False)
    model.weight = torch.nn.Parameter(model.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with _left_as_loaded(model):
        assert model.bfloat16() is model.half() is model.float() is model
    assert model.weight.dtype == torch.float8_e4m3fn
    assert model.bfloat16().weight.dtype == torch.bfloat16, "outside it casts as ever"


def test_a_torn_shard_in_the_hubs_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--someone--model" / "snapshots" / "abc"
    tiny.deepseek_v3().save_pretrained(snapshot)
    (tmp_path / "models--someone--model" / "refs").mkdir()
    (tmp_path / "models--someone--model" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    assert cached_folder("someone/model", None) == str(snapshot)
    assert cached_folder("someone/else", None) is None
    check_shards(snapshot, partial=True)
    weights = snapshot / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"the weight file model.safetensors in .*snapshots/abc' is damaged .*fetch it again"
    ):
        load_model("someone/model", backend="plain")


def test_attention_that_is_cut_out_of_a_larger_tensor_while_reading_stays_whole() -> None:
    """Sarvam's checkpoints fuse queries, keys and values: the library splits them by their full sizes, which a slice does not have."""
    if "sarvam_moe" not in available():
        pytest.skip("came with transformers 5.24")
    rules, _ = parallel_rules(build("sarvam_moe"), 2)
    assert {style for name, style in rules.items() if ".self_attn." in name} == {"replicate"}
    assert rules["model.layers.*.mlp.shared_experts.gate_proj"] == "colwise"
