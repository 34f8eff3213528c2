"""What is asked of every backend, and the parts of reading a checkpoint that all of them share."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A model to load. ``dtype``: auto or a torch name. ``offload``: "" (none), "cpu", or a folder on NVMe."""

    name: str
    dtype: str = "auto"
    device: str = "cpu"
    experts_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    offload: str = ""

    @property
    def hub_options(self) -> dict[str, Any]:
        """Options of every ``from_pretrained``."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def config(self) -> Any:
        """The model's configuration."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.name, **self.hub_options)

    def model(self, **options: Any) -> Any:
        """``AutoModelForCausalLM.from_pretrained`` with the shared options and the given ones."""
        from transformers import AutoModelForCausalLM

        from moe_steer.backends.fp8 import whole_blocks

        if self.experts_implementation is not None:
            options["experts_implementation"] = self.experts_implementation
        with whole_blocks(self.config()):
            return AutoModelForCausalLM.from_pretrained(
                self.name, dtype=torch_dtype(self.dtype), **self.hub_options, **options
            )


def torch_dtype(name: str) -> str | torch.dtype:
    """The dtype of a name; ValueError for names that are none."""
    if name == "auto":
        return name
    value = getattr(torch, name, None)
    if not isinstance(value, torch.dtype):
        raise ValueError(f"dtype {name!r} is unknown: give auto, float32, bfloat16 or float16")
    return value


def stored_dtype(config: Any) -> torch.dtype:
    """The precision that a checkpoint computes in (of an FP8 checkpoint, the one it is dequantised to)."""
    value = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(value, str):
        value = getattr(torch, value.removeprefix("torch."))
    return value if isinstance(value, torch.dtype) else torch.float32


def is_fp8(config: Any) -> bool:
    """Whether the checkpoint holds FP8 blocks."""
    quantization = getattr(config, "quantization_config", None) or {}
    method = (
        quantization.get("quant_method")
        if isinstance(quantization, dict)
        else getattr(quantization, "quant_method", "")
    )
    return str(getattr(method, "value", method)) == "fp8"


def dequantised(config: Any) -> dict[str, Any]:
    """Options that make transformers expand an FP8 checkpoint while reading; none for other checkpoints."""
    if not is_fp8(config):
        return {}
    from transformers import FineGrainedFP8Config

    return {"quantization_config": FineGrainedFP8Config(dequantize=True)}


def cached_folder(name: str, revision: str | None) -> str | None:
    """Where the hub's cache of this machine holds a model, or what there is of it; None where it holds nothing."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision) if name.count("/") <= 1 else None
    return os.path.dirname(found) if isinstance(found, str) else None


def check_shards(folder: str | os.PathLike[str], *, partial: bool = False) -> None:
    """ValueError that names the first weight file of a local checkpoint that is missing, cut short, no safetensors file, or without
    a tensor that the index promises.

    ``partial``: a file that is missing is no error, it is still to be fetched. Reads headers only, so a terabyte takes a second; a rank that fails later, in the middle of loading, would leave the others
    waiting and name no file.
    """
    index = Path(folder, "model.safetensors.index.json")
    promised: dict[str, set[str]] = {}
    if index.is_file():
        try:
            for tensor, name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
                promised.setdefault(name, set()).add(tensor)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is no index of weight files: fetch it again") from error
    else:
        promised = {path.name: set() for path in Path(folder).glob("*.safetensors")}
    for name, tensors in sorted(promised.items()):
        path = Path(folder, name)
        if not path.is_file() and partial:
            continue
        if not path.is_file():
            raise ValueError(f"the weight file {name} is missing in {os.fspath(folder)!r}: fetch the checkpoint again")
        problem = _problem(path, tensors)
        if problem:
            raise ValueError(f"the weight file {name} in {os.fspath(folder)!r} is damaged ({problem}): fetch it again")


def _problem(path: Path, promised: set[str]) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 0 < length <= size - 8:
            return "it has no safetensors header"
        try:
            entries = json.loads(file.read(length))
            end = max((item["data_offsets"][1] for key, item in entries.items() if key != "__metadata__"), default=0)
        except (ValueError, KeyError, AttributeError, TypeError):
            return "its header cannot be read"
    if size != 8 + length + end:
        return f"{size} bytes, {8 + length + end} expected"
    absent = sorted(promised - set(entries))
    return f"the tensor {absent[0]} is not in it" if absent else ""
