"""GGUF files: the header of one (its metadata and its tensor table), GGUF's names of architectures, and residual vectors as the control vector that
llama.cpp loads with ``--control-vector``.

The package's own reader makes an array object of every token of the vocabulary, which takes tens of seconds for a large one
and is not needed here: lists are skipped. The format is ``docs/gguf.md`` of ggml; the tests compare with that reader.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moe_steer.files import written_aside
from moe_steer.json_files import quoted
from moe_steer.plan import SteeringPlan

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_LAYERS = 512
"""llama.cpp's limit; a control vector has a tensor for each layer up to its last, so that a wrong number would fill the disk."""

# transformers' model_type -> general.architecture of the files that llama.cpp's converter makes of it, where the names differ
# by more than signs
ARCHITECTURES: Mapping[str, tuple[str, ...]] = {
    "deepseek_v2": ("deepseek2",),
    "deepseek_v3": ("deepseek2",),
    "gemma4_text": ("gemma4",),
    "glm4_moe_lite": ("deepseek2",),
    "glm_moe_dsa": ("glm-dsa",),
    "granitemoehybrid": ("granitehybrid",),
    "hunyuan_v1_moe": ("hunyuan-moe",),
    "kimi_k2": ("deepseek2",),
    "mimo_v2_flash": ("mimo2",),
    "mixtral": ("llama",),
    "nemotron_h": ("nemotron_h_moe",),
    "qwen3_5_moe_text": ("qwen35moe",),
    "qwen3_vl_moe_text": ("qwen3vlmoe",),
}


class Entry(NamedTuple):
    """One tensor: ``shape`` in GGUF order (fastest dimension first), ``offset`` from the start of the file."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """``metadata``: numbers and strings; lists are left out. ``num_bytes``: where the tensor data begins."""

    metadata: Mapping[str, Any]
    tensors: tuple[Entry, ...]
    num_bytes: int


def gguf_package() -> Any:
    """The optional ``gguf`` package; ValueError says how to get it."""
    try:
        return import_module("gguf")
    except ImportError:
        raise ValueError(
            "GGUF files are read with the package 'gguf', which is not installed: pip install 'moe-steer[gguf]'"
        ) from None


def architectures_of(model_type: str) -> tuple[str, ...]:
    """What GGUF calls a transformers model_type; empty where it is not known."""
    names = gguf_package().MODEL_ARCH_NAMES.values()
    return ARCHITECTURES.get(model_type, tuple(name for name in names if letters(name) == letters(model_type)))


def letters(name: str) -> str:
    """A name without the signs in which GGUF and transformers differ: 'qwen3moe' for 'qwen3_moe'."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def read_header(path: Path) -> Header:
    """Read a header; ValueError for a file that is not GGUF, cut short, damaged, or of a version not known here."""
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}")
    package = gguf_package()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(data, package)
    except (struct.error, OverflowError):  # a field, or a place that a length in the header leads to, is behind the end
        raise ValueError(f"{path} cannot be read as GGUF: it is cut short in its header") from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as GGUF: {error}") from error


def _parse(data: mmap.mmap, package: Any) -> Header:
    if data[:4] != b"GGUF":
        raise ValueError(f"it begins with {data[:4]!r}, not with 'GGUF'")
    version, num_tensors, num_keys = struct.unpack_from("<IQQ", data, 4)
    if version & 0xFFFF == 0:
        raise ValueError("it is written for another byte order: convert it with gguf-convert-endian first")
    if version not in (2, 3):
        raise ValueError(f"it is of version {version}, this program reads 2 and 3")
    at, metadata = 24, dict[str, Any]()
    for _ in range(num_keys):
        key, at = _string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        metadata[key], at = _value(data, at + 4, kind)
    rows = []
    for _ in range(num_tensors):
        name, at = _string(data, at)
        (num_dims,) = struct.unpack_from("<I", data, at)
        *shape, kind, offset = struct.unpack_from(f"<{num_dims}QIQ", data, at + 4)
        at += 4 + 8 * num_dims + 12
        rows.append((name, tuple(shape), kind, offset))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ValueError(f"its general.alignment is {alignment!r}")
    start = -(-at // alignment) * alignment
    tensors = tuple(_entry(package, start, len(data), *row) for row in rows)
    if len({entry.name for entry in tensors}) < len(tensors):
        raise ValueError("two of its tensors have one name")
    return Header(metadata=metadata, tensors=tensors, num_bytes=min(start, len(data)))


def _string(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    (raw,) = struct.unpack_from(f"<{length}s", data, at + 8) if length < len(data) else struct.unpack_from("<Q", b"")
    return raw.decode(), at + 8 + length


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    """A number or string, or None for a list, and where the next field begins."""
    if kind == _STRING:
        return _string(data, at)
    if kind != _ARRAY:
        (value,) = struct.unpack_from(_scalar(kind), data, at)
        return value, at + struct.calcsize(_scalar(kind))
    item, length = struct.unpack_from("<IQ", data, at)
    at += 12
    if item != _STRING:
        return None, at + length * struct.calcsize(_scalar(item))
    read = struct.Struct("<Q").unpack_from
    for _ in range(length):
        at += 8 + read(data, at)[0]
    return None, at


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"its metadata has a value of the unknown type {kind}")
    return _SCALARS[kind]


def _entry(
    package: Any, start: int, file_size: int, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> Entry:
    try:
        tensor_type = package.GGMLQuantizationType(kind)
    except ValueError:
        raise ValueError(f"{name} is of type {kind}, which this version of the package 'gguf' does not know") from None
    num_values, num_bytes = package.GGML_QUANT_SIZES[tensor_type]
    if shape and shape[0] % num_values:
        raise ValueError(f"{name} has rows of {shape[0]} values, which {tensor_type.name} cannot hold")
    size = math.prod(shape) // num_values * num_bytes
    if start + offset + size > file_size:
        raise ValueError(
            f"it is cut short: {name} should end at byte {start + offset + size}, the file has {file_size}"
        )
    return Entry(name, tensor_type.name, shape, start + offset, size)


def export_control_vector(plan: SteeringPlan, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Write the residual vectors of a plan, times their strengths in their units, as a GGUF control vector; returns what was written.

    ``direction.N`` is added to the output of decoder block N at every token, which is what a residual entry of layer N and
    scope "all" means; several entries of one layer are summed. Layers in between get zeros, since some readers stop at the
    first gap. ValueError for a plan without vectors, for other scopes, for layer 0 (llama.cpp has no direction there), for
    vectors of different widths, and for a plan that also holds gains: those are baked, and ``bake`` does both at once.
    """
    plan.refuse_outside("a control vector")
    if plan.top_k:
        raise ValueError("the plan also has top_k entries, which a control vector cannot hold: leave them out of it")
    if plan.active_experts:
        raise ValueError(
            f"the plan also names {len(plan.active_experts)} experts, which a control vector cannot hold: use bake with control_vector=FILE for both"
        )
    return export_residual(plan, Path(path), _model_hint(plan))


def export_residual(plan: SteeringPlan, path: Path, architecture: str) -> dict[str, Any]:
    """As ``export_control_vector``, whatever else the plan holds; ``architecture`` becomes the file's model hint."""
    plan.refuse_outside("a control vector")
    directions = _directions(plan)
    package = gguf_package()
    if os.path.lexists(path):
        raise ValueError(f"{str(path)!r} exists: give the control vector another name, or remove it first")
    with written_aside(path) as aside:
        writer = package.GGUFWriter(str(aside), "controlvector")
        writer.add_string("controlvector.model_hint", architecture)
        writer.add_uint32("controlvector.layer_count", max(directions))
        width = len(next(iter(directions.values())))
        for layer in range(1, max(directions) + 1):
            writer.add_tensor(f"direction.{layer}", directions.get(layer, np.zeros(width, dtype=np.float32)))
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "layers": sorted(directions),
        "use": f"llama-server --control-vector {path.name}",
    }


def _model_hint(plan: SteeringPlan) -> str:
    model_type = str((plan.model or {}).get("model_type") or "unknown")
    return (*architectures_of(model_type), model_type)[0]


def _directions(plan: SteeringPlan) -> dict[int, npt.NDArray[np.float32]]:
    """Layer -> vector [D], summed in float32 in the plan's order, as steering adds them."""
    directions: dict[int, npt.NDArray[np.float32]] = {}
    for entry in plan.active_residual:
        if entry.scope != "all":
            raise ValueError(
                f"the residual entry of layer {entry.layer} has the scope {entry.scope!r}, a control vector acts on all tokens: use scope 'all'"
            )
        if not 1 <= entry.layer < _MAX_LAYERS:
            raise ValueError(
                f"the residual entry of layer {quoted(entry.layer)} cannot be exported: llama.cpp's control vectors begin at layer 1, "
                f"and its models have at most {_MAX_LAYERS}"
            )
        vector_D = np.asarray(plan.load_shift(entry).numpy(), dtype=np.float32)
        before_D = directions.get(entry.layer)
        widths = {len(vector) for vector in directions.values()} | {len(vector_D)}
        if len(widths) > 1:
            raise ValueError(f"the residual vectors have the widths {sorted(widths)}: they must all fit one model")
        directions[entry.layer] = vector_D if before_D is None else before_D + vector_D
    if not directions:
        raise ValueError("the plan holds no residual vector of non-zero strength: there is nothing to export")
    return directions
