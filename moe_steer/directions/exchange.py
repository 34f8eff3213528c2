"""Directions from and to other tools: EasyEdit2's bare tensors, and the GGUF control vectors of repeng and
llama.cpp."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_steer.direction import SITE, Direction
from moe_steer.files import load_plain, written_aside


def import_easyedit(path: str | os.PathLike[str], layer: int | None = None) -> Direction:
    """A file of ``torch.save(tensor[D])``, opened without running any code in it.

    EasyEdit names it ``layer_L.pt`` or ``layer_L_....pt``: ``layer`` is needed where the name does not say it, and wins
    where it does. Its vectors are added to the output of decoder block L, positive side first, as here. ValueError for
    anything but one vector.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise ValueError(f"there is no file {name!r}: give a vector that EasyEdit wrote")
    found = re.search(r"layer_(\d+)", Path(path).name)
    if layer is None and found is None:
        raise ValueError(f"the name of {name!r} does not say the layer (layer_20.pt): give it")
    value = load_plain(path)
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} holds a {type(value).__name__}: a vector of EasyEdit is one tensor [D] of floats")
    if value.ndim != 1 or not value.is_floating_point() or value.layout != torch.strided:
        what = f"a tensor of shape {tuple(value.shape)}, {value.dtype}, {value.layout}"
        raise ValueError(f"{name} holds {what}: a vector of EasyEdit is one tensor [D] of floats")
    value = value.detach().float()  # here what is too large becomes infinite, and what is too small 0
    if not bool(value.isfinite().all()) or not bool(value.any()):
        what = "numbers that are not finite" if bool(value.any()) else "a vector of zeros, which has no direction"
        raise ValueError(f"{name} holds {what}: make it again")
    header = _origin("easyedit", path, value)
    chosen = layer if layer is not None else int(found[1]) if found else 0
    return Direction(vector_D=value, layer=chosen, method="imported", header=header)


def export_easyedit(direction: Direction, folder: str | os.PathLike[str]) -> Path:
    """Write ``layer_L.pt`` into a folder, the bare tensor that EasyEdit's vector applier reads; the header does not fit
    into it.

    ValueError when the file is there already, and for a direction of another place than the block's output.
    """
    if direction.site != SITE:
        raise ValueError(f"the direction is of site {direction.site!r}, and EasyEdit adds to the output of a block")
    target = Path(folder) / f"layer_{direction.layer}.pt"
    if target.exists():
        raise ValueError(f"{str(target)!r} exists: give another folder, or remove it first")
    with written_aside(target) as aside:
        torch.save(direction.vector_D.clone(), aside)
    return target


def import_gguf(path: str | os.PathLike[str]) -> list[Direction]:
    """The directions of a GGUF control vector, by layer; layers of zeros, which fill gaps, are left out.

    ``direction.N`` belongs to the output of decoder block N. ValueError for another kind of file, and where nothing is
    left.
    """
    from moe_steer.gguf import gguf_package, read_header

    header = read_header(Path(path))
    kind = header.metadata.get("general.architecture")
    if kind != "controlvector":
        raise ValueError(f"{os.fspath(path)!r} is a GGUF file of {kind!r}: a control vector is needed")
    found = []
    for item in gguf_package().GGUFReader(os.fspath(path)).tensors:
        match = re.fullmatch(r"direction\.(\d+)", item.name)
        if match is None or item.tensor_type.name != "F32" or len(item.shape) != 1:
            raise ValueError(
                f"{os.fspath(path)!r} holds {item.name!r}: a control vector holds direction.N, float32 vectors"
            )
        vector_D = torch.tensor(item.data, dtype=torch.float32)
        if bool(vector_D.any()):
            more = {"model_hint": str(header.metadata.get("controlvector.model_hint", ""))}
            origin = _origin("gguf", path, vector_D, more)
            if not bool(vector_D.isfinite().all()):
                raise ValueError(f"{os.fspath(path)!r} holds numbers in {item.name} that are not finite: make it again")
            found.append(Direction(vector_D=vector_D, layer=int(match[1]), method="imported", header=origin))
    if not found:
        raise ValueError(f"{os.fspath(path)!r} holds no vector that is not 0: there is nothing to import")
    return sorted(found, key=lambda direction: direction.layer)


def export_gguf(files: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]) -> dict[str, Any]:
    """Write the directions in ``files`` as one GGUF control vector; directions of one layer add up. Returns what was
    written.

    ValueError for layer 0 (llama.cpp has no direction there), different widths or models, and a file that is there
    already.
    """
    from moe_steer.gguf import export_control_vector
    from moe_steer.plan import ResidualVector, SteeringPlan

    directions = [Direction.load(file) for file in files]
    types = {str(one.header["model"]["model_type"]) for one in directions if one.header.get("model")}
    if len(types) > 1:
        raise ValueError(f"the directions belong to {', '.join(sorted(types))}: a control vector is for one model")
    entries = [
        ResidualVector(one.layer, str(Path(file).resolve())) for one, file in zip(directions, files, strict=True)
    ]
    model = {"model_type": types.pop()} if types else None
    return export_control_vector(SteeringPlan(residual=entries, model=model), path)


def _origin(
    format: str, path: str | os.PathLike[str], vector_D: Tensor, more: Mapping[str, str] | None = None
) -> dict[str, Any]:
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    origin = {"format": format, "file": Path(path).name, "sha256": digest, **(more or {})}
    return {"imported_from": origin, "norm": float(vector_D.double().norm())}
