"""Latents filled up with zeros: the same function, in the sizes that engines take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from launch.serve import lacks_kernel, with_latent_sizes
from moe_steer.lab import LAB_DENSE, LAB_MODEL, LAB_SERVED


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latent") / "lab"
    with_latent_sizes(LAB_MODEL, folder)
    return folder


def test_the_lab_that_is_shipped_for_engines_is_this_copy(served: Path) -> None:
    for path in served.iterdir():
        assert (LAB_SERVED / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_function_is_the_same(served: Path) -> None:
    """In float64, where nothing but the function could differ."""
    ids = torch.arange(5, 165)[None]
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
            .eval()(ids)
            .logits
            for folder in (LAB_MODEL, served)
        ]
    assert float((logits[0] - logits[1]).abs().max()) < 1e-5 * float(logits[0].abs().max())


def test_sizes_and_files(served: Path) -> None:
    config = json.loads((served / "config.json").read_text())
    assert (config["kv_lora_rank"], config["qk_rope_head_dim"], config["qk_head_dim"]) == (512, 64, 96)
    assert config["scoring_func"] == "sigmoid"
    assert {path.name for path in served.iterdir()} == {path.name for path in LAB_MODEL.iterdir()}
    assert (served / "model.safetensors").stat().st_size < 12 * 2**20


@pytest.mark.parametrize("folder", [LAB_DENSE, None])
def test_what_is_served_as_it_is_is_not_copied(served: Path, tmp_path: Path, folder: Path | None) -> None:
    assert not lacks_kernel(json.loads(((folder or served) / "config.json").read_text()))
    with pytest.raises(
        ValueError, match=r"has no latent attention in sizes below 512 \+ 64 to fill up: serve it as it is"
    ):
        with_latent_sizes(folder or served, tmp_path / "out")
    assert not (tmp_path / "out").exists()
