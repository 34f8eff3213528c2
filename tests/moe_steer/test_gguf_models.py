"""A GGUF file as a model: the logits and the tokenizer that it was made from, every command, and the refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import tiny
from gguf_files import write_gguf, write_model
from launch.cli.main import main
from moe_steer import load_model
from moe_steer.backends import read_config, read_tokenizer, resolve
from moe_steer.layers import model_shape
from reasoning_evals.engines import InProcessSampler, Request, SamplingConfig
from stats_helpers import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}user: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
KINDS = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = byte_tokenizer()
    made.chat_template = TEMPLATE
    return made


def model_of(arch: str, tokenizer: Any) -> Any:
    settings, kind = KINDS[arch]
    return tiny.randomise(
        kind(
            settings(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                eos_token_id=tokenizer.eos_token_id,
                tie_word_embeddings=False,
            )
        )
    )


@pytest.fixture(scope="module")
def file(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny.gguf", model_of("qwen2", tokenizer), tokenizer)


@pytest.mark.parametrize("arch", KINDS)
@pytest.mark.parametrize("type_name", ["F32", "F16", "Q8_0"])
def test_logits_are_those_of_the_stored_weights(arch: str, type_name: str, tokenizer: Any, tmp_path: Path) -> None:
    """Exactly, for values that the type holds; Q8_0 against the package's own dequantiser."""
    made = copy.deepcopy(model_of(arch, tokenizer))
    kind = gguf.GGMLQuantizationType[type_name]
    for parameter in made.parameters():
        if parameter.ndim > 1 and kind != gguf.GGMLQuantizationType.F32:
            raw = gguf.quants.quantize(parameter.numpy(), kind)
            parameter.copy_(torch.from_numpy(gguf.quants.dequantize(raw, kind).copy()))
    path = write_model(tmp_path / "tiny.gguf", made, tokenizer, type_name, arch)
    loaded, _ = load_model(path)
    ids_BS = torch.arange(3, 23)[None]
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded(ids_BS).logits, made(ids_BS).logits)


def test_tokenizer_template_and_stop_token_come_from_the_file(file: Path, tokenizer: Any) -> None:
    loaded, read = load_model(file)
    for text in ("Wait, so <think>we wait</think> 12+3", " two  spaces\n\nand lines", "Größe"):
        assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert read.decode(read(text)["input_ids"]) == text
    assert read.chat_template == TEMPLATE
    assert InProcessSampler(loaded, read).stop_ids == (tokenizer.eos_token_id,)


def test_the_file_names_the_model(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded, read = load_model(file)
    assert capsys.readouterr().err.count("the weights of the GGUF file were dequantised to float32") == 1
    assert model_shape(loaded).name == str(file)
    assert InProcessSampler(loaded, read).describe()["model"] == str(file)
    assert read.name_or_path == str(file)
    assert resolve(file.parent) == str(file)
    assert load_model(file, dtype="bfloat16")[0].dtype == torch.bfloat16
    assert read_config(file).num_hidden_layers == 3


def test_sampled_tokens_are_generates(file: Path, tokenizer: Any) -> None:
    made = model_of("qwen2", tokenizer)
    loaded, read = load_model(file)
    ids = tuple(tokenizer("Wait, the other solution")["input_ids"])
    asked = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    expected = made.generate(torch.tensor([ids]), **asked)[0, len(ids) :].tolist()
    config = SamplingConfig(greedy=True, max_new_tokens=12)
    (sample,) = InProcessSampler(loaded, read).sample([Request(ids, 0, "a")], config)
    assert list(sample.token_ids) == expected


def test_device_map_holds_it(file: Path) -> None:
    loaded, _ = load_model(file, "device_map", max_memory="cpu=1GiB")
    plain, _ = load_model(file)
    ids_BS = torch.arange(3, 23)[None]
    assert torch.equal(loaded(ids_BS).logits, plain(ids_BS).logits)


def test_commands_take_it(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--model", str(file), "--gpus", "1", "--gpu-gib", "1", "--context", "64"]) == 0
    assert "a GGUF file is dequantised by one process: use plain or device_map" in capsys.readouterr().out
    run = [
        "generate",
        "--model",
        str(file),
        "--num",
        "2",
        "--max-new-tokens",
        "8",
        "--greedy",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(run) == 0
    assert f'"model": "{file}"' in (tmp_path / "run" / "run.json").read_text()
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("question,matching,not_matching\nso?,we wait,we go\nwhy?,we wait,no\n")
    asked = ["direction", "--contrast", "answers", "--pairs", str(pairs), "--layers", "1", "--chat"]
    assert main([*asked, "--model", str(file), "--out", str(tmp_path / "directions")]) == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"blk.1.attn_q.weight": None}, r"the checkpoint lacks tensor 'model\.layers\.1\.self_attn\.q_proj\.weight'"),
        ({"output_norm.weight": None}, r"the checkpoint lacks tensor 'model\.norm\.weight' of Qwen2ForCausalLM"),
        (
            {"blk.2.ffn_up.weight": np.zeros((5, 32), np.float32)},
            r"'model\.layers\.2\.mlp\.up_proj\.weight' has another shape",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["plain", "device_map"])
def test_no_parameter_stays_random(
    changed: dict[str, Any], message: str, backend: str, tmp_path: Path, tokenizer: Any
) -> None:
    path = write_model(tmp_path / "part.gguf", model_of("qwen2", tokenizer), tokenizer, **changed)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(path, backend, max_memory="cpu=1GiB" if backend == "device_map" else "")
    assert "\n" not in str(caught.value)


def test_what_a_file_holds_beside_the_model_is_no_difference(tmp_path: Path, tokenizer: Any) -> None:
    """Frequencies that converters write; and the head is the embeddings where there is no other."""
    made = model_of("qwen2", tokenizer)
    beside: dict[str, Any] = {"rope_freqs.weight": np.ones(4, np.float32), "output.weight": None}
    loaded, _ = load_model(write_model(tmp_path / "more.gguf", made, tokenizer, **beside))
    assert torch.equal(loaded.lm_head.weight, made.model.embed_tokens.weight)


def without_tokenizer(folder: Path, tokenizer: Any) -> Path:
    path = folder / "bare.gguf"
    writer: Any = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_tensor("token_embd.weight", torch.zeros(8, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def torn(folder: Path, tokenizer: Any) -> Path:
    whole = write_model(folder / "whole.gguf", model_of("qwen2", tokenizer), tokenizer)
    (folder / "torn.gguf").write_bytes(whole.read_bytes()[:200])
    return folder / "torn.gguf"


def several(folder: Path, tokenizer: Any) -> Path:
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(b"GGUF")
    return folder


def part(folder: Path, tokenizer: Any) -> Path:
    return write_gguf(folder / "big.gguf", split=3)


def text(folder: Path, tokenizer: Any) -> Path:
    (folder / "notes.gguf").write_text("not a model " * 20)
    return folder / "notes.gguf"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder, _: write_gguf(folder / "x.gguf", arch="deepseek2"), "architecture deepseek2 .*not supported.*: give the checkpoint"),
        (without_tokenizer, "^the tokenizer of the GGUF file .* cannot be read by transformers .*: give the checkpoint"),
        (torn, "cannot be read by transformers"),
        (text, "does not start with the GGUF magic bytes"),
        (several, r"holds 2 GGUF files: give one of them, such as .*a\.gguf"),
        (part, "is one of [0-9]+ parts, which the library does not join: llama-gguf-split --merge"),
        (lambda folder, _: folder / "no.gguf", r"there is no GGUF file '.*no\.gguf'"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(
    make: Callable[[Path, Any], Path], message: str, tmp_path: Path, tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_model(make(tmp_path, tokenizer))
    assert "\n" not in str(caught.value)


def test_the_missing_package_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.modeling_gguf_pytorch_utils.is_gguf_available", lambda *_: False)
    with pytest.raises(
        ValueError, match=r"\(Please install torch and gguf.*\): pip install 'moe-steer\[gguf\]'"
    ) as caught:
        read_tokenizer(file)
    assert "\n" not in str(caught.value)


def test_backends_over_ranks_refuse_it(file: Path) -> None:
    for backend in ("tp_ep", "zero3", "autoep"):
        with pytest.raises(ValueError, match="a GGUF file is dequantised by one process: use plain or device_map"):
            load_model(file, backend)
    with pytest.raises(ValueError, match="(?i)disk offload is not supported for models loaded from GGUF"):
        load_model(file, "device_map", max_memory="cpu=100KiB", offload=str(file.parent))
