"""Folders as publishers ship them, through the commands: each works, or is refused in one line that says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.cli.main import main
from moe_steer.backends import read_tokenizer
from moe_steer.lab import LAB_MODEL

PROBLEM = '{"problem_id": "a", "prompt": "What is 12 * 11?", "target": "132", "answer_type": "integer"}\n'


def of_lab(folder: Path) -> Path:
    return Path(shutil.copytree(LAB_MODEL, folder))


def edit(file: Path, **values: object) -> None:
    """Some keys of a JSON file; None takes a key away."""
    kept = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in kept.items() if value is not None}))


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def tekken(folder: Path) -> None:
    without_tokenizer(folder)
    (folder / "tekken.json").write_text("{}")


def adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def own_code(folder: Path) -> None:
    edit(
        folder / "config.json", model_type="strange", architectures=["Strange"], auto_map={"AutoConfig": "code.Config"}
    )
    (folder / "code.py").write_text("raise SystemExit('code of the checkpoint ran')")


def sentences(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    edit(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    (folder / "tokenizer.model").write_bytes(b"")


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no tokenizer": (
        without_tokenizer,
        "it has no words: tokenizer.json or the other files of its class are missing; fetch",
    ),
    "tekken.json alone": (tekken, "tekken.json is none of them"),
    "an adapter": (adapter, "holds an adapter: merge it into its model first"),
    "code of its own": (own_code, "read through it, then --trust-remote-code runs it"),
    "sentencepiece is missing": (sentences, "its vocabulary is tokenizer.model: pip install sentencepiece protobuf"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_what_to_do(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change, words = REFUSED[name]
    change(model := of_lab(tmp_path / "model"))
    monkeypatch.setattr("moe_steer.backends.sources.find_spec", lambda package: None)
    (tmp_path / "p.jsonl").write_text(PROBLEM)
    argv = ["generate", "--model", str(model), "--problems", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "out")]
    assert main(argv) == 1
    error = capsys.readouterr().err.strip()
    assert words in error
    assert error.splitlines()[-1].startswith("moe-steer: ")
    assert "Traceback" not in error


def test_a_template_that_lies_in_the_processors_file_is_read(tmp_path: Path) -> None:
    model = of_lab(tmp_path / "model")
    template = read_tokenizer(model).chat_template
    for file in model.glob("chat_template*"):
        file.unlink()
    edit(model / "tokenizer_config.json", chat_template=None)
    assert read_tokenizer(model).chat_template is None
    (model / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert read_tokenizer(model).chat_template == template


def test_a_folder_with_everything_that_publishers_leave_in_is_steered_baked_and_verified(tmp_path: Path) -> None:
    """Old spellings, bfloat16 in shards, weights for other programs beside them, and sampling defaults out of range."""
    model = of_lab(tmp_path / "model")
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(model / "model.safetensors").items()}
    (model / "model.safetensors").unlink()
    names = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    parts = [dict(list(tensors.items())[part::2]) for part in (0, 1)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, model / name)
    index = {"metadata": {}, "weight_map": {key: name for name, part in zip(names, parts, strict=True) for key in part}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(tensors, model / "consolidated.safetensors")
    torch.save({"x": torch.zeros(1)}, model / "pytorch_model.bin")
    (model / "original").mkdir()
    save_file(tensors, model / "original" / "model.safetensors")
    edit(model / "config.json", dtype=None, torch_dtype="bfloat16", auto_map={"AutoConfig": "code.Config"})
    (model / "code.py").write_text("raise SystemExit('code of the checkpoint ran')")
    odd = {
        "temperature": 0.0,
        "top_p": 1.5,
        "top_k": -1,
        "repetition_penalty": 0,
        "max_length": 20,
        "eos_token_id": [2],
    }
    (model / "generation_config.json").write_text(json.dumps(odd))
    plan, baked = str(tmp_path / "plan.json"), str(tmp_path / "baked")
    (tmp_path / "prompts.txt").write_text("What is 12 * 11?\n")
    assert main(["plan", "--experts", "2:5=4", "--out", plan]) == 0
    assert main(["bake", "--model", str(model), "--plan", plan, "--out", baked]) == 0
    verify = ["verify", "--baked", baked, "--model", str(model), "--forward", "--max-new-tokens", "4"]
    assert main([*verify, "--prompts", str(tmp_path / "prompts.txt")]) == 0
