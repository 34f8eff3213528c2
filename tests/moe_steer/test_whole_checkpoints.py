"""What a checkpoint must hold: the tensors of its model, all and no others; and by which class it is read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import moe_steer.lab
from launch.cli.main import main
from moe_steer import load_model
from moe_steer.backends import read_config
from moe_steer.backends.blueprint import config_of, model_class

pytestmark = pytest.mark.slow

Tensors = dict[str, torch.Tensor]
LAB = Path(moe_steer.lab.__file__).parent / "model"
UP = "model.layers.3.mlp.shared_experts.up_proj.weight"
EXPERT = "model.layers.3.mlp.experts.5.up_proj.weight"
BACKENDS = ("plain", "tp_ep", "zero3", "autoep", "autoep_zero3")


def changed(folder: Path, change: Callable[[Tensors], object], source: Path = LAB, **config: Any) -> Path:
    """A copy of a checkpoint with other tensors, and perhaps another configuration."""
    target = folder / "changed"
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors", {"format": "pt"}
    )
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, **config}))
    return target


def cut_experts(tensors: Tensors) -> None:
    for name in tensors:
        if re.search(r"layers\.3\.mlp\.experts\.\d+\.(up|gate)_proj", name):
            tensors[name] = tensors[name][:5]


DAMAGES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing": (lambda t: t.pop(UP), f"the checkpoint lacks tensor '{UP}' of DeepseekV3ForCausalLM: fetch it again"),
    "two missing": (lambda t: [t.pop(UP), t.pop("lm_head.weight")], r"lacks tensor 'lm_head.weight' \(and 1 more\)"),
    "part of an expert": (lambda t: t.pop(EXPERT), f"the checkpoint lacks tensor '{EXPERT}'"),
    "a routing bias": (lambda t: t.pop("model.layers.3.mlp.gate.e_score_correction_bias"), "e_score_correction_bias'"),
    "unexpected": (
        lambda t: t.update({"model.layers.3.mlp.third.weight": torch.zeros(3)}),
        "DeepseekV3ForCausalLM has no place for the checkpoint's tensor 'model.layers.3.mlp.third.weight'",
    ),
    "a layer too many": (
        lambda t: t.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(3)}),
        "has no place for the checkpoint's tensor 'model.layers.9.mlp.up_proj.weight'",
    ),
    "another shape": (
        lambda t: t.update({UP: t[UP][:5]}),
        re.escape(f"tensor '{UP}' has another shape ([5, 128] is stored, the configuration says [64, 128])"),
    ),
    "experts of another shape": (cut_experts, "'model.layers.3.mlp.experts.gate_up_proj' has another shape"),
}


def refused(folder: Path, message: str, backend: str = "plain") -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_model(folder, backend)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_other_tensors_than_the_models_are_refused(
    damage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change, message = DAMAGES[damage]
    refused(changed(tmp_path, change), message)
    assert "LOAD REPORT" not in capfd.readouterr().err, "one line is enough"


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("damage", ["missing", "part of an expert", "unexpected", "experts of another shape"])
def test_every_backend_refuses_them(backend: str, damage: str, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    refused(changed(tmp_path, change), message, backend)


def test_the_command_names_the_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = tmp_path / "p.jsonl"
    problems.write_text('{"problem_id": "a", "prompt": "1+1?", "target": "2", "answer_type": "number"}\n')
    folder = changed(tmp_path, lambda t: t.pop(UP))
    command = ["generate", "--model", str(folder), "--problems", str(problems), "--greedy", "--max-new-tokens", "2"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 1
    assert f"lacks tensor '{UP}'" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("generations*"))


def test_what_stands_beside_the_model_is_no_difference(tmp_path: Path) -> None:
    """Layers that predict further tokens, buffers that the library computes, and matrices that are tied."""

    def more(tensors: Tensors) -> None:
        tensors["model.layers.4.eh_proj.weight"] = torch.zeros(3)
        tensors["model.mtp.0.weight"] = torch.zeros(3)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)

    load_model(changed(tmp_path, more, num_nextn_predict_layers=1))
    refused(
        changed(tmp_path, more, num_nextn_predict_layers=0),
        "no place for the checkpoint's tensor 'model.layers.4.eh_proj",
    )


def small(model_type: str, **values: Any) -> Any:
    base = {
        "vocab_size": 966,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return CONFIG_MAPPING[model_type](**{**base, "head_dim": 16, "max_position_embeddings": 4096, **values})


def saved(config: Any, folder: Path) -> Path:
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(LAB / name, folder / name)
    return folder


def test_tied_matrices_are_stored_once(tmp_path: Path) -> None:
    folder = saved(small("qwen2", intermediate_size=96, tie_word_embeddings=True), tmp_path / "tied")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model, _ = load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    refused(changed(tmp_path, lambda t: None, folder, tie_word_embeddings=False), "lacks tensor 'lm_head.weight'")


@pytest.mark.parametrize("window", [1, 32, 4096])
@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "mistral", "gpt_oss", "cohere2", "qwen2", "phi3"])
def test_models_with_a_window_load_and_are_planned(
    model_type: str, window: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2} if model_type == "gpt_oss" else {}
    pad = {"pad_token_id": 0} if model_type == "phi3" else {}
    config = small(model_type, intermediate_size=32, sliding_window=window, **experts, **pad)
    folder = saved(config, tmp_path / model_type)
    model, _ = load_model(folder)
    assert type(model).__name__ == config.architectures[0] if config.architectures else True
    assert main(["memory", "--model", str(folder), "--gpus", "1", "--gpu-gib", "8"]) == 0
    said = capsys.readouterr()
    assert "fastest that fits: plain" in said.out
    assert "cannot be planned" not in said.err


def test_the_class_that_the_configuration_names_reads_it() -> None:
    def named(config: Any, *architectures: str) -> str:
        config.architectures = list(architectures) or None
        found = model_class(config)
        return found.__name__

    dense = small("qwen2", intermediate_size=96)
    assert named(dense, "Qwen2ForCausalLM") == named(dense) == "AutoModelForCausalLM"
    assert named(dense, "Qwen2ForSequenceClassification") == "AutoModelForCausalLM", "no class that writes text"
    assert named(dense, "LlamaForCausalLM") == "AutoModelForCausalLM", "a class of another configuration"
    vision = CONFIG_MAPPING["qwen3_vl_moe"]()
    assert named(vision, "Qwen3VLMoeForConditionalGeneration") == named(vision) == "AutoModelForImageTextToText"
    assert named(CONFIG_MAPPING["mistral4"](), "Mistral4ForCausalLM") == "AutoModelForImageTextToText"
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder: give a decoder model"):
        named(transformers.T5Config(), "T5ForConditionalGeneration")
    with pytest.raises(ValueError, match="has no class that writes text for vit: install"):
        named(CONFIG_MAPPING["vit"]())


def test_an_unknown_type_is_read_as_the_class_that_it_names(tmp_path: Path) -> None:
    """As Kimi-K2 is published."""
    folder = changed(tmp_path, lambda t: None, model_type="kimi_k2")
    config = read_config(folder)
    assert type(config).__name__ == "DeepseekV3Config"
    assert type(load_model(folder)[0]).__name__ == "DeepseekV3ForCausalLM"
    folder = changed(tmp_path, lambda t: None, model_type="kimi_k2", architectures=["NoSuchForCausalLM"])
    with pytest.raises(ValueError, match="kimi_k2"):
        config_of(str(folder))


@pytest.mark.parametrize(
    "left",
    [
        {"output_router_logits": True},
        {"return_dict": False},
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "flash_attention_3"},
    ],
    ids=str,
)
def test_what_a_training_run_left_in_the_configuration_changes_nothing(
    left: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss over the routers, which the library cannot compute while it generates; tuples in place of named outputs; attention by a
    package that is not here."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
    folder = saved(small("mixtral", **experts), tmp_path / "model")
    problems = tmp_path / "p.jsonl"
    problems.write_text('{"problem_id": "a", "prompt": "1+1?", "target": "2", "answer_type": "number"}\n')
    texts = []
    for out in ("before", "after"):
        command = ["generate", "--model", str(folder), "--problems", str(problems), "--greedy", "--max-new-tokens", "4"]
        assert main([*command, "--out", str(tmp_path / out)]) == 0
        assert main(["memory", "--model", str(folder), "--gpus", "1", "--gpu-gib", "8"]) == 0
        texts.append(json.loads((tmp_path / out / "generations.jsonl").read_text())["token_ids"])
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **left}))
    assert texts[0] == texts[1]
    assert "cannot be planned" not in capsys.readouterr().err
