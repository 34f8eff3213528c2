"""The request to load a model, and what a checkpoint must hold: whole files, and the tensors of its model."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from moe_steer.backends.allocations import Unplanned
from moe_steer.backends.blueprint import (
    BLOCKS,
    UNNAMED,
    config_of,
    dequantised,
    in_blocks,
    is_fp8,
    is_gguf,
    is_mxfp4,
    model_class,
    planning,
    quantisation,
    skeleton,
    torch_dtype,
    where_it_lies,
)
from moe_steer.backends.layout import failing_together
from moe_steer.backends.streaming import whole_blocks
from moe_steer.files import tensor_places

_LEAST_CAPABILITY = (8, 9)
"""CUDA compute capability; below it, and on a CPU, transformers expands FP8 to bfloat16."""


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
        """``from_pretrained`` of the model's own class, with the shared options and the given ones; ValueError, with a tensor's
        name, where checkpoint and model do not have the same tensors."""
        if self.experts_implementation is not None:
            options["experts_implementation"] = self.experts_implementation
        config = self.config()
        source, file = where_it_lies(self.name)
        if file:
            from transformers import GgufConfig

            options["quantization_config"] = GgufConfig(dequantize=True)
        elif self.dtype != "auto" and is_mxfp4(config):
            options |= dequantised(config)
        with whole_blocks(config), the_same_tensors(config, self.name):
            return model_class(config).from_pretrained(
                source, config=config, dtype=torch_dtype(self.dtype), **file, **self.hub_options, **options
            )

    def sharded_model(self, **options: Any) -> Any:
        """The same where each rank reads a part: what one refuses, all refuse."""
        with failing_together():
            return self.model(**options)


def cached_folder(name: str, revision: str | None) -> str | None:
    """The folder of a model (perhaps incomplete) in this machine's hub cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision) if name.count("/") <= 1 else None
    return os.path.dirname(found) if isinstance(found, str) else None


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
        how = "without a quant_method, as MLX does" if method == UNNAMED else f"by {method!r}"
        raise ValueError(
            f"the checkpoint is quantised {how}, which transformers does not know: use a newer one, or another checkpoint"
        )


def refuse_without_kernels(config: Any) -> None:
    """ValueError, before a terabyte is read, when FP8 would stay FP8 here but the package for FP8 arithmetic is missing."""
    if is_fp8(config) and torch.cuda.is_available() and has_fp8_hardware(True) and find_spec("kernels") is None:
        raise ValueError(
            "an FP8 checkpoint needs the package 'kernels' on this GPU: pip install 'moe-steer[fp8]', "
            "or use a backend that expands it to bfloat16 (zero3, autoep, autoep_zero3)"
        )


def has_mxfp4_kernels(on_gpu: bool) -> bool:
    """Whether MXFP4 stays MXFP4; elsewhere transformers expands it to bfloat16. GPUs that are only planned for are assumed to
    have what it takes."""
    return on_gpu and (not torch.cuda.is_available() or all(find_spec(name) for name in ("kernels", "triton")))


def stays_packed(config: Any, dtype: str, on_gpu: bool) -> bool:
    """Whether blocks of few bits are computed with as they are; elsewhere they are expanded while reading."""
    kernels = has_mxfp4_kernels if is_mxfp4(config) else has_fp8_hardware
    return dtype == "fp8" or (dtype == "auto" and in_blocks(config) and kernels(on_gpu))


@contextmanager
def the_same_tensors(config: Any, name: str) -> Iterator[None]:
    """Inside the block, ``from_pretrained`` refuses a checkpoint whose tensors are not those of the model: the library fills a
    missing one with random numbers, prints a table and goes on."""
    from transformers import modeling_utils

    report = modeling_utils.log_state_dict_report
    needed = _shapes_of(config) if is_gguf(config) or in_blocks(config) else {}
    # What a GGUF file or another package's format holds beside the model is for its reader to know; a random tensor never is.
    all_have_a_place = not is_gguf(config) and quantisation(config) in ("", *BLOCKS)

    def refuse(*_: Any, model: Any, loading_info: Any, **more: Any) -> None:
        loading_info.mismatched_keys |= _other_shapes(model, needed)
        extra = {
            key for key in loading_info.unexpected_keys if all_have_a_place and not _is_beside_the_model(key, config)
        }
        plain = not is_gguf(config) and not quantisation(config)
        problem = _difference(model, loading_info, extra, name) or (_whole_numbers(name, model) if plain else "")
        if problem := problem or _not_finite(model):
            raise ValueError(problem)

    modeling_utils.log_state_dict_report = refuse
    try:
        yield
    finally:
        modeling_utils.log_state_dict_report = report


def _shapes_of(config: Any) -> dict[str, torch.Size]:
    """Name -> shape of the model's parameters, expanded; none where the skeleton cannot be built (code of the checkpoint's own)."""
    try:
        with planning(config):
            return {name: parameter.shape for name, parameter in skeleton(config, "bfloat16").named_parameters()}
    except Unplanned:
        return {}


def _other_shapes(model: Any, needed: Mapping[str, torch.Size]) -> set[tuple[str, torch.Size, torch.Size]]:
    """(name, stored shape, needed shape) of expanded parameters: the library compares shapes only where nothing is expanded.
    A model of several ranks holds parts."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        return set()
    found = ((name, getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters() if p.element_size() > 1)
    return {(name, shape, needed[name]) for name, shape in found if shape != needed.get(name, shape)}


def _difference(model: Any, found: Any, extra: Collection[str], folder: str) -> str:
    """The first tensor that checkpoint and model do not share, in words; empty when they have the same."""
    own = type(model).__name__
    shapes = sorted((name, tuple(stored), tuple(needed)) for name, stored, needed in found.mismatched_keys)
    if found.missing_keys:
        return f"the checkpoint lacks {_some({_lost_part(name, folder) for name in found.missing_keys})} of {own}: fetch it again, or the model it was made from"
    if shapes:
        _, stored, needed = shapes[0]
        sizes = f"{list(stored)} is stored, the configuration says {list(needed)}"
        return f"the checkpoint's {_some([entry[0] for entry in shapes])} has another shape ({sizes}): fetch both again"
    if found.conversion_errors:
        last = str(min(found.conversion_errors.items())[1]).strip().splitlines()[-1][:120]
        return f"the checkpoint's parts of {_some(found.conversion_errors)} do not make one tensor ({last}): fetch it again"
    if extra:
        return f"{own} has no place for the checkpoint's {_some(extra)}: the configuration belongs to other weights, fetch both again"
    return str(found.error_msgs[0])[:300] if found.error_msgs else ""


def _whole_numbers(folder: str, model: Any) -> str:
    """A weight that is stored as whole numbers, in words: of a checkpoint that is not quantised the header was changed. Older
    checkpoints hold causal masks as ``attention.bias``, which their class ignores."""
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    for path in sorted(Path(folder).glob("*.safetensors")):
        for name, place in tensor_places(path).items():
            whole = re.fullmatch(r"[IU]\d+|BOOL", place.dtype) and name.endswith((".weight", ".bias"))
            if whole and not any(pattern.search(name) for pattern in ignored):
                return f"the checkpoint's tensor {name!r} is stored as {place.dtype}, whole numbers: fetch it again"
    return ""


def _not_finite(model: Any) -> str:
    """A weight with numbers that are NaN or infinite, in words: whatever is computed with them says nothing. The smallest and the
    largest number tell, and take no memory, as a table of truth values would."""
    for name, parameter in model.named_parameters():
        held = getattr(parameter, "ds_tensor", parameter)
        held = held.to_local() if hasattr(held, "to_local") else held  # this rank's part, without a word to the others
        # A class of its own (torchao), or bits packed into numbers (bitsandbytes), is for its package to read.
        if type(held) not in (Tensor, nn.Parameter) or held.is_meta or not held.numel() or not held.is_floating_point():
            continue
        if held.element_size() == 1:
            continue
        low, high = map(float, torch.aminmax(held.detach()))
        # What is beyond float16 became infinite by being read so, and may mean nothing but "very small", as the bias of an expert.
        if math.isnan(low) or (held.dtype != torch.float16 and not (math.isfinite(low) and math.isfinite(high))):
            return f"the checkpoint's {_some([name])} holds numbers that are NaN or infinite: fetch it again"
    return ""


def _lost_part(name: str, folder: str) -> str:
    """Which of an expert's tensors is not stored, where the model has one tensor for all experts; else ``name``."""
    pattern = re.compile(re.escape(name.rpartition(".")[0]) + r"\.(\d+)\.(.+)")
    headers = (safe_open(path, "pt") for path in Path(folder).glob("*.safetensors"))
    stored = {
        (int(part[1]), part[2])
        for header in headers
        for key in header.offset_keys()
        if (part := pattern.fullmatch(key))
    }
    wanted = {(number, leaf) for number, _ in stored for _, leaf in stored}
    return ".".join([name.rpartition(".")[0], *map(str, min(wanted - stored))]) if wanted - stored else name


def _some(names: Collection[str]) -> str:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"tensor {min(names)!r}{more}"


def _is_beside_the_model(name: str, config: Any) -> bool:
    """Tensors that checkpoints carry beside the model: layers that predict further tokens, which stand behind the last decoder
    layer or under a name of their own, and scales for other engines in a quantised checkpoint."""
    text = config.get_text_config()
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    counts = {key: value for key, value in vars(text).items() if re.search("nextn|mtp", key) and isinstance(value, int)}
    if layer and any(int(layer[1]) - text.num_hidden_layers in range(number) for number in counts.values()):
        return True
    return bool(re.search(r"(^|[._])mtp[._]", name)) or (
        bool(quantisation(config)) and "scale" in name.rpartition(".")[2]
    )
