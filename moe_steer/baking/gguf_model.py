"""What a GGUF model holds and where, a model in several parts read as one; and where each tensor type keeps the scales of a block.

Every type below dequantises to values that are linear in its scale fields: ``d * q``, or ``d * q - dmin * m``. So
multiplying these fields multiplies the tensor, and no other byte of the block changes. Source of the layouts:
``ggml-common.h`` of llama.cpp, checked in the tests against the dequantiser of the ``gguf`` package.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_steer.baking import folder_files
from moe_steer.baking.edits import Container, StoredTensor
from moe_steer.baking.numbers import E8M0_NAN, LARGEST, ROUNDOFF, Floats, Rounding, decode, encode, measured, scaled
from moe_steer.gguf import Header, read_header

Bytes = npt.NDArray[np.uint8]
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "E8M0": 1}
"""Bytes of one scale, by its number format. E8M0, a bare exponent, holds powers of two and no zero."""
NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "E8M0": "e8m0"}
E8M0_LARGEST = 2.0**126
_PART = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
_KEYS = ("block_count", "nextn_predict_layers", "expert_count", "embedding_length")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFormat:
    """One tensor type: ``num_values`` numbers in blocks of ``num_bytes``, with a scale at each of ``offsets``.

    ``nibbles``: byte columns whose upper four bits together are one float16, lowest nibble first (IQ1_M).
    """

    name: str
    num_values: int
    num_bytes: int
    number: str
    offsets: tuple[int, ...] = (0,)
    nibbles: tuple[int, ...] = ()

    @property
    def roundoff(self) -> float:
        """Largest relative error of rounding one scale between the smallest normal number and ``largest``."""
        return ROUNDOFF.get(self.number, 0.0)

    @property
    def largest(self) -> float:
        """The largest scale that is finite."""
        return LARGEST.get(self.number, E8M0_LARGEST)

    def read(self, blocks_NB: Bytes) -> Floats:
        """The scales [N, fields] of N blocks; a code that is not a number becomes NaN."""
        if self.nibbles:
            return decode_scales(_join_nibbles(blocks_NB[:, self.nibbles]), self.number)[:, None]
        width = WIDTHS[self.number]
        return np.stack([decode_scales(blocks_NB[:, at : at + width], self.number) for at in self.offsets], axis=1)

    def write(self, blocks_NB: Bytes, scales_NF: Floats) -> Bytes:
        """A copy of the blocks that holds the given scales, rounded to the format."""
        new_NB = blocks_NB.copy()
        if self.nibbles:
            upper_NW = _split_nibbles(encode_scales(scales_NF[:, 0], self.number))
            new_NB[:, self.nibbles] = (blocks_NB[:, self.nibbles] & 0x0F) | upper_NW
            return new_NB
        for field, at in enumerate(self.offsets):
            new_NB[:, at : at + WIDTHS[self.number]] = encode_scales(scales_NF[:, field], self.number)
        return new_NB

    def is_blanked_by(self, gain: float) -> bool:
        """True where a gain of 0 has no scale that could hold it: then the whole block becomes zero bytes, whose values are 0."""
        return gain == 0 and self.number == "E8M0"


def rescale(blocks_NB: Bytes, form: BlockFormat, factor: float, *, divide: bool = False) -> tuple[Bytes, Rounding]:
    """N blocks [N, bytes] with every scale times (or divided by) ``factor``, rounded to nearest, and what that lost."""
    old_NF = form.read(blocks_NB)
    if form.is_blanked_by(factor):
        return np.zeros_like(blocks_NB), measured(old_NF, old_NF, old_NF)
    want_NF = scaled(old_NF, factor, divide=divide)
    new_NB = form.write(blocks_NB, np.where(np.isfinite(old_NF), want_NF, 0.0))
    vanished_NF = (want_NF == 0) & (old_NF != 0) & (factor != 0)
    clipped_at = E8M0_LARGEST if form.number == "E8M0" else np.inf
    return new_NB, measured(old_NF, want_NF, form.read(new_NB), vanished_NF, clipped_at)


def decode_scales(raw_NW: Bytes, number: str) -> Floats:
    """[N, width] bytes -> [N] float64, without error.

    E8M0 is 2^(code - 128): ggml keeps MXFP4's values doubled and halves the scale. Code 255 is NaN (OCP MX specification 1.0).
    """
    if number != "E8M0":
        return decode(raw_NW.tobytes(), number)
    code_N = raw_NW[:, 0].astype(np.int32)
    return np.where(code_N == E8M0_NAN, np.nan, np.ldexp(1.0, code_N - 128))


def encode_scales(values_N: Floats, number: str) -> Bytes:
    """[N] float64 -> [N, width] bytes, to nearest; E8M0 stores its ends for what is beyond them."""
    if number != "E8M0":
        return np.frombuffer(encode(values_N, number), np.uint8).reshape(-1, WIDTHS[number])
    with np.errstate(divide="ignore"):
        exponent_N = np.clip(np.rint(np.log2(np.abs(values_N))), -128, 126)
    return (exponent_N + 128).astype(np.uint8).reshape(-1, 1)


def _join_nibbles(columns_N4: Bytes) -> Bytes:
    upper_N4 = columns_N4 >> 4
    return np.stack([upper_N4[:, 0] | (upper_N4[:, 1] << 4), upper_N4[:, 2] | (upper_N4[:, 3] << 4)], axis=1)


def _split_nibbles(raw_N2: Bytes) -> Bytes:
    return np.stack([raw_N2[:, 0] << 4, raw_N2[:, 0] & 0xF0, raw_N2[:, 1] << 4, raw_N2[:, 1] & 0xF0], axis=1)


def _half(name: str, num_values: int, num_bytes: int, *offsets: int) -> BlockFormat:
    return BlockFormat(name=name, num_values=num_values, num_bytes=num_bytes, number="F16", offsets=offsets)


BLOCK_FORMATS = {
    entry.name: entry
    for entry in (
        BlockFormat(name="F32", num_values=1, num_bytes=4, number="F32"),
        BlockFormat(name="F16", num_values=1, num_bytes=2, number="F16"),
        BlockFormat(name="BF16", num_values=1, num_bytes=2, number="BF16"),
        _half("Q4_0", 32, 18, 0),
        _half("Q4_1", 32, 20, 0, 2),
        _half("Q5_0", 32, 22, 0),
        _half("Q5_1", 32, 24, 0, 2),
        _half("Q8_0", 32, 34, 0),
        _half("Q2_K", 256, 84, 80, 82),
        _half("Q3_K", 256, 110, 108),
        _half("Q4_K", 256, 144, 0, 2),
        _half("Q5_K", 256, 176, 0, 2),
        _half("Q6_K", 256, 210, 208),
        _half("IQ1_S", 256, 50, 0),
        BlockFormat(name="IQ1_M", num_values=256, num_bytes=56, number="F16", nibbles=(49, 51, 53, 55)),
        _half("IQ2_XXS", 256, 66, 0),
        _half("IQ2_XS", 256, 74, 0),
        _half("IQ2_S", 256, 82, 0),
        _half("IQ3_XXS", 256, 98, 0),
        _half("IQ3_S", 256, 110, 0),
        _half("IQ4_NL", 32, 18, 0),
        _half("IQ4_XS", 256, 136, 0),
        _half("TQ1_0", 256, 54, 52),
        _half("TQ2_0", 256, 66, 64),
        BlockFormat(name="MXFP4", num_values=32, num_bytes=17, number="E8M0"),
    )
}


def block_format(tensor: str, type_name: str) -> BlockFormat:
    """The format of a tensor; ValueError names a type whose scales cannot be multiplied."""
    found = BLOCK_FORMATS.get(type_name)
    if found is None:
        raise ValueError(
            f"{tensor} is {type_name}, whose scales cannot be multiplied: quantise this tensor to one of {', '.join(BLOCK_FORMATS)}"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class GgufModel(Container):
    """A GGUF file, or the parts of a model, which are numbered '0', '1', ... whatever the files are called.

    The shape of a tensor is in GGUF order (fastest dimension first). ``header_bytes``: where the tensor data of each part
    begins. ``numbers``: those of its metadata that a plan is checked against.
    """

    header_bytes: Mapping[str, int]
    architecture: str
    name: str | None
    numbers: Mapping[str, int]

    @property
    def first(self) -> Path:
        """The file that is given to an engine."""
        return self.paths["0"]

    def step(self, dtype: str) -> int:
        """A whole number of blocks."""
        block = BLOCK_FORMATS[dtype].num_bytes
        return max(1, folder_files.PIECE // block) * block

    def scale(self, piece: bytes, dtype: str, factor: float, divide: bool) -> tuple[bytes, Rounding]:
        """Blocks with their scales times ``factor``, or divided by it."""
        form = BLOCK_FORMATS[dtype]
        blocks_NB = np.frombuffer(piece, np.uint8).reshape(-1, form.num_bytes)
        new_NB, lost = rescale(blocks_NB, form, factor, divide=divide)
        return new_NB.tobytes(), lost


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a model's path is that of a GGUF file: by its name, or because it is a file."""
    return os.fspath(path).endswith(".gguf") or Path(path).is_file()


def read_gguf(path: Path) -> GgufModel:
    """Read the header of a GGUF file and of all its parts; ValueError for whatever is missing, cut short or inconsistent."""
    first = read_header(path)
    paths = _part_paths(path, _number(first, "split.count") or 1, _number(first, "split.no") or 0)
    headers = [first, *map(read_header, paths[1:])]
    architecture = str(first.metadata.get("general.architecture"))
    tensors: dict[str, StoredTensor] = {}
    for part, header in enumerate(headers):
        for item in header.tensors:
            if item.name in tensors:
                raise ValueError(
                    f"{item.name} is in {paths[int(tensors[item.name].shard)].name} and again in {paths[part].name}"
                )
            end = item.offset + item.num_bytes
            tensors[item.name] = StoredTensor(item.name, str(part), item.type_name, item.shape, item.offset, end)
    announced = _number(first, "split.tensors.count")
    if len(paths) > 1 and announced is not None and announced != len(tensors):
        raise ValueError(
            f"{path.name} announces {announced} tensors, its {len(paths)} parts hold {len(tensors)}: fetch the parts again"
        )
    numbers = {key: _number(first, f"{architecture}.{key}") for key in _KEYS}
    name = first.metadata.get("general.name")
    return GgufModel(
        paths={str(part): file for part, file in enumerate(paths)},
        header_bytes={str(part): header.num_bytes for part, header in enumerate(headers)},
        architecture=architecture,
        name=name if isinstance(name, str) else None,
        numbers={key: value for key, value in numbers.items() if value is not None},
        tensors=tensors,
    )


def part_names(name: str, count: int) -> list[str]:
    """File names of a model of ``count`` parts, as llama.cpp looks for them; any name is good for a model of one part."""
    if count == 1:
        return [name]
    match = _PART.match(name)
    stem = match["stem"] if match else name.removesuffix(".gguf")
    return [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def _part_paths(path: Path, count: int, number: int) -> tuple[Path, ...]:
    if count == 1:
        return (path,)
    names = part_names(path.name, count)
    if number != 0:
        raise ValueError(f"{path} is part {number + 1} of {count}: give the first part, {names[0]!r}")
    if path.name != names[0]:
        raise ValueError(
            f"{path} is the first of {count} parts and has lost its name: the first part must be named like {names[0]!r}"
        )
    paths = tuple(path.with_name(name) for name in names)
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise ValueError(
            f"{path} is the first of {count} parts, and {missing[0]!r} is not in the same folder: fetch all parts"
        )
    return paths


def _number(header: Header, key: str) -> int | None:
    """A whole number of the metadata; None where it is absent or something else."""
    value = header.metadata.get(key)
    return value if isinstance(value, int) else None
