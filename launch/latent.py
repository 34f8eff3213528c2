"""Latent attention (MLA) in the sizes that engines have kernels for: DeepSeek-R1's 512 + 64, filled up with zeros.

The function stays the same: queries are scaled for the larger head, latents for the longer mean of their norm, and each pair of
rotary components moves to where the longer table has its frequency.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_steer.files import write_whole
from moe_steer.json_files import read_json

LATENT, ROTARY = 512, 64
"""kv_lora_rank and qk_rope_head_dim of DeepSeek-V2, V3 and R1: vLLM's MLA kernels take 576 numbers a token and no others."""


def lacks_kernel(config: dict[str, Any]) -> bool:
    """Whether a model has latent attention in smaller sizes, which can be filled up."""
    sizes = config.get("kv_lora_rank"), config.get("qk_rope_head_dim")
    if config.get("model_type") != "deepseek_v3" or not all(isinstance(size, int) for size in sizes):
        return False
    fits = sizes[0] <= LATENT and sizes[1] <= ROTARY and ROTARY % sizes[1] == 0  # type: ignore[operator]
    return fits and sizes != (LATENT, ROTARY)


def cpu_options(config: dict[str, Any], given: Sequence[str]) -> list[str]:
    """What vLLM must be told on a CPU to compute latent attention right, where the user's options do not say it themselves.

    Its kernel for AMX takes no float32, and is chosen wherever the processor has AMX. Its own rotary embedding (0.32) is wrong for queries
    of several heads, and is used where nothing is compiled: what follows is nonsense, without a word.
    """
    if "kv_lora_rank" not in config:
        return []
    # Both spellings of a value, --dtype float32 and --dtype=float32; of a repeated option the last counts.
    words = [part for option in given for part in option.split("=", 1)]
    names = {word.replace("_", "-") for word in words if word.startswith("-")}
    dtypes = [words[at + 1] for at, word in enumerate(words[:-1]) if word == "--dtype"]
    told: list[str] = []
    if dtypes[-1:] in (["float32"], ["float"]) and not names & {"--attention-backend", "--attention-config"}:
        told += ["--attention-backend", "CPU_MLA"]
    if "--enforce-eager" in names and not names & {"--compilation-config", "-O", "-cc"}:
        told += ["--compilation-config", '{"custom_ops":["none"]}']
    return told


def with_latent_sizes(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Copy the checkpoint in ``source`` to a new folder, its latents filled up; ValueError where there is nothing to fill up, or
    a tensor is not plain numbers."""
    from safetensors.torch import load_file, save

    source, out = Path(source), Path(out)
    config = read_json(source / "config.json", "fetch it again", endless=True)
    if not lacks_kernel(config) or config.get("quantization_config"):
        raise ValueError(
            f"{source} has no latent attention in sizes below {LATENT} + {ROTARY} to fill up: serve it as it is"
        )
    shutil.copytree(
        source, out, ignore=shutil.ignore_patterns("config.json", "*.safetensors", "*.safetensors.index.json")
    )
    weights = {
        name: tensor for file in sorted(source.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    filled = {name: _filled(name, tensor, config) for name, tensor in weights.items()}
    write_whole(out / "model.safetensors", save(filled, metadata={"format": "pt"}))
    sizes = {"kv_lora_rank": LATENT, "qk_rope_head_dim": ROTARY, "qk_head_dim": config["qk_nope_head_dim"] + ROTARY}
    write_whole(
        out / "config.json", json.dumps({**config, **sizes, "head_dim": ROTARY}, indent=2, sort_keys=True) + "\n"
    )


def _filled(name: str, tensor: Any, config: dict[str, Any]) -> Any:
    import torch

    latent, rotary, plain = config["kv_lora_rank"], config["qk_rope_head_dim"], config["qk_nope_head_dim"]
    # Pair i of the short table has the frequency of pair i * ROTARY / rotary of the long one.
    pairs = torch.arange(rotary)
    places = pairs % 2 + 2 * (ROTARY // rotary) * (pairs // 2)
    if name.endswith(("q_b_proj.weight", "q_proj.weight")):
        heads_HND = tensor.view(config["num_attention_heads"], plain + rotary, -1)
        larger = tensor.new_zeros(len(heads_HND), plain + ROTARY, heads_HND.shape[-1])
        larger[:, :plain], larger[:, plain + places] = heads_HND[:, :plain], heads_HND[:, plain:]
        return (larger * math.sqrt((plain + ROTARY) / (plain + rotary))).flatten(0, 1).contiguous()
    if name.endswith("kv_a_proj_with_mqa.weight"):
        larger = tensor.new_zeros(LATENT + ROTARY, tensor.shape[1])
        # Latents grow as their mean of squares shrinks, so that the norm's epsilon weighs what it weighed.
        larger[:latent], larger[LATENT + places] = tensor[:latent] * math.sqrt(LATENT / latent), tensor[latent:]
        return larger
    if name.endswith("kv_a_layernorm.weight"):
        larger = tensor.new_zeros(LATENT)
        larger[:latent] = tensor / math.sqrt(LATENT / latent)
        return larger
    if name.endswith("kv_b_proj.weight"):
        larger = tensor.new_zeros(len(tensor), LATENT)
        larger[:, :latent] = tensor
        return larger
    return tensor
