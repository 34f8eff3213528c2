"""Whether the weight files of a checkpoint hold what its index says, by their headers; for loading and for baking."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from moe_steer.files import read_weight_map, tensor_places
from moe_steer.json_files import short

SINGLE_FILE = "model.safetensors"
_UNREAD = ("rotary_emb.inv_freq", "_cached", "attn.bias", "masked_bias", "position_ids", "_float_tensor")
"""Ends of names of constants that older libraries stored beside the weights: nobody reads them, and an index may leave them out."""
_CONSTANT = ("BOOL", "U8", "I8", "I16", "I32", "I64")
"""Nor is a tensor of such numbers that no index lists: a mask (``attention.bias``), a place in a sequence."""
_PIECE = 1 << 24


class Place(Protocol):
    """Where a tensor lies: bytes ``begin`` to ``end`` of its file."""

    @property
    def dtype(self) -> str: ...

    @property
    def begin(self) -> int: ...

    @property
    def end(self) -> int: ...


def check_shards(folder: str | os.PathLike[str], *, partial: bool = False) -> None:
    """ValueError that names the first weight file of a local checkpoint that is missing, cut short, no safetensors file, or not what
    the index says (``contradiction``); and for weights in one file beside others in shards, of which transformers takes the file
    and engines the shards.

    ``partial``: a missing file is not an error, it will be downloaded. Reads headers only, so a terabyte takes a second; a
    rank that fails later, while loading, would leave the other ranks waiting, and its error names no file.
    """
    index = Path(folder, "model.safetensors.index.json")
    listed = read_weight_map(index) if index.is_file() else {}
    names = set(listed.values()) or {path.name for path in Path(folder).glob("*.safetensors")}
    if SINGLE_FILE not in names and Path(folder, SINGLE_FILE).is_file():
        raise ValueError(
            f"{os.fspath(folder)!r} holds two checkpoints ({SINGLE_FILE}, {index.name}): leave one, so that all engines load the same"
        )
    held: dict[str, Mapping[str, Place]] = {}
    for name in sorted(names):
        path = Path(folder, name)
        if not path.is_file() and partial:
            continue
        if not path.is_file():
            raise ValueError(f"the weight file {name} is missing in {os.fspath(folder)!r}: fetch the checkpoint again")
        try:
            held[name] = tensor_places(path)
        except (ValueError, OSError) as error:
            raise _damaged(folder, name, str(error)) from None
    if listed and (found := contradiction(folder, listed, held)):
        raise _damaged(folder, *found)


def _damaged(folder: str | os.PathLike[str], name: str, why: str) -> ValueError:
    return ValueError(f"the weight file {name} in {os.fspath(folder)!r} is damaged ({why}): fetch it again")


def contradiction(
    folder: str | os.PathLike[str], listed: Mapping[str, str], held: Mapping[str, Mapping[str, Place]]
) -> tuple[str, str] | None:
    """The first file that is not what the index says, and why in words; None where there is none.

    ``listed``: tensor -> file, as the index says; ``held``: file -> its tensors, of the files that are there.
    """
    for tensor, name in sorted(listed.items()):
        if name in held and tensor not in held[name]:
            other = next((file for file, tensors in held.items() if tensor in tensors), None)
            return name, f"the tensor {short(tensor)} is not in it" + (f" and is in {other}" if other else "")
    for name, tensors in sorted(held.items()):
        for tensor, place in sorted(tensors.items()):
            if tensor.endswith(_UNREAD):
                continue
            where = listed.get(tensor)
            if where is None and place.dtype not in _CONSTANT:
                return name, f"the index does not list its tensor {short(tensor)}"
            # The library reads the files in the order of their names and keeps the last: an overlay comes last, and the index names it.
            if where is None or where >= name or where not in held:
                continue
            if not _same(Path(folder, where), held[where][tensor], Path(folder, name), place):
                return name, f"it holds {short(tensor)} again, which the index takes from {where}"
    return None


def _same(one: Path, place: Place, other: Path, again: Place) -> bool:
    """Whether two tensors have the same bytes: then it does not matter which is read."""
    left = place.end - place.begin
    if (place.dtype, left) != (again.dtype, again.end - again.begin):
        return False
    with open(one, "rb") as first, open(other, "rb") as second:
        first.seek(place.begin)
        second.seek(again.begin)
        while left > 0:
            piece = min(left, _PIECE)
            if first.read(piece) != second.read(piece):
                return False
            left -= piece
    return True
