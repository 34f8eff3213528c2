"""The request to load a model, and the parts of reading a checkpoint that all backends share.

This includes expanding FP8 checkpoints whose last block is not full, such as DeepSeek-R1's ``kv_a_proj_with_mqa`` (576
rows, blocks of 128).
"""

from __future__ import annotations

import copy
import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

_LEAST_CAPABILITY = (8, 9)
"""CUDA compute capability; below it, and on a CPU, transformers expands FP8 to bfloat16."""
_HEADERS: dict[tuple[str, Any], Any] = {}


@dataclass(frozen=True, kw_only=True)
class LoadRequest:
    """A model to load. ``dtype``: auto or a torch name. ``offload``: "" (none), "cpu", or a folder on NVMe. ``places``: for
    the backend device_map, the device on which each module rests."""

    name: str
    dtype: str = "auto"
    device: str = "cpu"
    experts_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    offload: str = ""
    places: Mapping[str, int | str] | None = None

    @property
    def hub_options(self) -> dict[str, Any]:
        """Options of every ``from_pretrained``."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def config(self) -> Any:
        """The model's configuration."""
        return config_of(self.name, **self.hub_options)

    def model(self, **options: Any) -> Any:
        """``AutoModelForCausalLM.from_pretrained`` with the shared options and the given ones."""
        from transformers import AutoModelForCausalLM

        if self.experts_implementation is not None:
            options["experts_implementation"] = self.experts_implementation
        source, file = where_it_lies(self.name)
        if file:
            from transformers import GgufConfig

            options |= {"quantization_config": GgufConfig(dequantize=True), "config": self.config()}
        elif self.dtype != "auto" and quantisation(self.config()) == "mxfp4":
            from transformers import Mxfp4Config

            options["quantization_config"] = Mxfp4Config(dequantize=True)
        with whole_blocks(self.config()):
            return AutoModelForCausalLM.from_pretrained(
                source, dtype=torch_dtype(self.dtype), **file, **self.hub_options, **options
            )


def where_it_lies(name: str) -> tuple[str, dict[str, Any]]:
    """(folder or hub id, options that name the file) for every ``from_pretrained`` of a model: a name that ends in ``.gguf`` is
    a file in a folder, or in a hub repository (``owner/name/file.gguf``)."""
    if not name.endswith(".gguf"):
        return name, {}
    if os.path.isfile(name):
        return os.path.dirname(name) or ".", {"gguf_file": os.path.basename(name)}
    owner, repository, *file = name.split("/")
    return f"{owner}/{repository}", {"gguf_file": "/".join(file)}


def config_of(name: str, **options: Any) -> Any:
    """The configuration of a model, from config.json or from the header of a GGUF file, which is then its name. A header is
    kept: the library reads the whole vocabulary for it, half a minute for 262,144 tokens."""
    from transformers import AutoConfig

    source, file = where_it_lies(name)
    if not file:
        return AutoConfig.from_pretrained(source, **options)
    key = (name, os.path.getmtime(name) if os.path.isfile(name) else options.get("revision"))
    if key not in _HEADERS:
        _HEADERS[key] = AutoConfig.from_pretrained(source, **file, **options)
        _HEADERS[key]._name_or_path = name
    return copy.deepcopy(_HEADERS[key])


def is_gguf(config: Any) -> bool:
    """Whether a configuration of ``config_of`` is a GGUF file's."""
    return str(getattr(config, "_name_or_path", "")).endswith(".gguf")


def quantisation(config: Any) -> str:
    """The method in which a checkpoint is quantised, by the library's name; empty for none."""
    text = config.get_text_config()
    found = getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None) or {}
    method = found.get("quant_method", "") if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method))


def torch_dtype(name: str) -> str | torch.dtype:
    """The dtype with this name; ValueError for unknown names."""
    if name == "auto":
        return name
    value = getattr(torch, name, None)
    if not isinstance(value, torch.dtype):
        raise ValueError(f"dtype {name!r} is unknown: give auto, float32, bfloat16 or float16")
    return value


def stored_dtype(config: Any) -> torch.dtype:
    """The precision that a checkpoint computes in (for FP8, the precision to which it is dequantised)."""
    value = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(value, str):
        value = getattr(torch, value.removeprefix("torch."))
    return value if isinstance(value, torch.dtype) else torch.float32


def is_fp8(config: Any) -> bool:
    """Whether the checkpoint holds FP8 blocks."""
    return quantisation(config) == "fp8"


def dequantised(config: Any) -> dict[str, Any]:
    """Options that make transformers expand an FP8 checkpoint while reading; none for other checkpoints."""
    if not is_fp8(config):
        return {}
    from transformers import FineGrainedFP8Config

    return {"quantization_config": FineGrainedFP8Config(dequantize=True)}


def cached_folder(name: str, revision: str | None) -> str | None:
    """The folder of a model (perhaps incomplete) in this machine's hub cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision) if name.count("/") <= 1 else None
    return os.path.dirname(found) if isinstance(found, str) else None


def check_shards(folder: str | os.PathLike[str], *, partial: bool = False) -> None:
    """ValueError that names the first weight file of a local checkpoint that is missing, cut short, no safetensors file, or
    without a tensor that the index promises.

    ``partial``: a missing file is not an error, it will be downloaded. Reads headers only, so a terabyte takes a second; a
    rank that fails later, while loading, would leave the other ranks waiting, and its error names no file.
    """
    index = Path(folder, "model.safetensors.index.json")
    promised: dict[str, set[str]] = {}
    if index.is_file():
        try:
            for tensor, name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
                promised.setdefault(name, set()).add(tensor)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is not an index of weight files: fetch it again") from error
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


def has_fp8_hardware(on_gpu: bool) -> bool:
    """Whether FP8 stays FP8: on this machine's GPUs by their capability; GPUs that are only planned for are assumed to have
    it."""
    if not on_gpu:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= _LEAST_CAPABILITY


def refuse_unknown_quantisation(config: Any) -> None:
    """ValueError for a method that the library does not know: it would warn, and read the numbers as if they were weights."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method = quantisation(config)
    if method not in ("", "bitsandbytes", *AUTO_QUANTIZATION_CONFIG_MAPPING):
        raise ValueError(
            f"the checkpoint is quantised by {method!r}, which transformers does not know: use a newer one, or another checkpoint"
        )


def refuse_without_kernels(config: Any) -> None:
    """ValueError, before a terabyte is read, when FP8 would stay FP8 here but the package for FP8 arithmetic is missing."""
    if is_fp8(config) and torch.cuda.is_available() and has_fp8_hardware(True) and find_spec("kernels") is None:
        raise ValueError(
            "an FP8 checkpoint needs the package 'kernels' on this GPU: pip install 'moe-steer[fp8]', "
            "or use a backend that expands it to bfloat16 (zero3, autoep, autoep_zero3)"
        )


@contextmanager
def whole_blocks(config: Any) -> Iterator[None]:
    """Inside the block, transformers expands partly filled blocks correctly.

    transformers 5.22 takes the block size from the shapes (rows / rows of scales): where the last block is partly filled it
    raises, or, if the division has no remainder by chance, scales with blocks of the wrong size. Here the weight is padded
    to whole blocks of the checkpoint's block size, expanded, and cut back.
    """
    if not is_fp8(config):
        yield
        return
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    quantization = config.quantization_config
    stated = quantization.get("weight_block_size") if isinstance(quantization, dict) else quantization.weight_block_size
    block_rows, block_columns = stated or (128, 128)
    original = Fp8Dequantize._dequantize_one

    def expand(self: Any, quantized: Tensor, scales: Tensor, output_dtype: Any = None) -> Tensor:
        if scales.ndim < 2 or quantized.element_size() != 1 or not quantized.is_floating_point():
            return original(self, quantized, scales, output_dtype=output_dtype)
        rows, columns = quantized.shape[-2:]
        missing_rows = scales.shape[-2] * block_rows - rows
        missing_columns = scales.shape[-1] * block_columns - columns
        if not (0 < missing_rows < block_rows or 0 < missing_columns < block_columns):
            return original(self, quantized, scales, output_dtype=output_dtype)
        filled = pad(quantized.float(), (0, max(missing_columns, 0), 0, max(missing_rows, 0)))
        return original(self, filled, scales, output_dtype=output_dtype)[..., :rows, :columns].contiguous()

    Fp8Dequantize._dequantize_one = expand  # type: ignore[method-assign]
    try:
        yield
    finally:
        Fp8Dequantize._dequantize_one = original  # type: ignore[method-assign]


def skeleton(config: Any, dtype: str = "auto") -> Any:
    """The model of ``config`` on the meta device: parameters with shapes and dtypes but without memory.

    ``dtype``: auto (as stored: FP8 stays FP8), fp8 (the family's experts and linear layers in FP8 blocks of 128), or a torch
    name, to which an FP8 checkpoint is expanded.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    stored_as_fp8 = is_fp8(config)
    quantization = config.quantization_config if stored_as_fp8 else None
    if stored_as_fp8:
        del config.quantization_config
    if dtype == "fp8" or (dtype == "auto" and stored_as_fp8):
        chosen = stored_dtype(config) if stored_as_fp8 else torch.bfloat16
    else:
        asked = torch_dtype(dtype)
        chosen = stored_dtype(config) if isinstance(asked, str) else asked
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=chosen)
    if dtype == "fp8" or (dtype == "auto" and stored_as_fp8):
        _to_fp8(model, quantization)
    return model.eval()


def _to_fp8(model: Any, quantization: Any) -> None:
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    if quantization is None:
        settings = FineGrainedFP8Config()
    elif isinstance(quantization, dict):
        settings = FineGrainedFP8Config.from_dict(quantization)
    else:
        settings = quantization
    skipped = [*get_keys_to_not_convert(model), *(settings.modules_to_not_convert or [])]
    replace_with_fp8_linear(model, modules_to_not_convert=skipped, quantization_config=settings, pre_quantized=True)
