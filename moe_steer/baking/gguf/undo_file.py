"""What earlier versions kept when they rounded a GGUF file in place: ``NAME.steering.undo``.

It holds the scale bytes of every changed slice, the original ones and then the baked ones. They are the only way back, because
there is no source file. Earlier versions also wrote ``NAME.steering.journal``, which is there only where such a write was cut off.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe_steer.baking.edits import Change, Edit
from moe_steer.baking.gguf.blocks import BLOCK_FORMATS
from moe_steer.baking.gguf.model import GgufModel


def undo_path(first: Path) -> Path:
    """The undo file of a model, by its first file."""
    return first.with_name(f"{first.name}.steering.undo")


def refuse_half_written(first: Path) -> None:
    """ValueError for a file whose change in place was cut off."""
    journal = first.with_name(f"{first.name}.steering.journal")
    if journal.exists():
        raise ValueError(
            f"{first} is half written, an earlier version was cut off while it changed it in place ({journal.name}): unbake it with that version, or fetch the original"
        )


def original_scales(model: GgufModel, changes: list[Change]) -> list[Change]:
    """Changes that put the kept scale bytes back, for all changes of a record in its order."""
    kept, at, found = undo_path(model.first).read_bytes(), 0, []
    for change in changes:
        tensor, (edit,) = change.tensor, change.edits
        form = BLOCK_FORMATS[tensor.dtype]
        columns = list(form.touched_columns(edit.factor))
        old = b"".join(piece for _, piece in model.pieces(tensor))
        new_NB = np.frombuffer(old, np.uint8).reshape(-1, form.num_bytes).copy()
        size = len(new_NB) * len(columns)
        if len(kept) < at + size:
            raise ValueError(f"{undo_path(model.first)} is incomplete: fetch the original model again")
        new_NB[:, columns] = np.frombuffer(kept[at : at + size], np.uint8).reshape(-1, len(columns))
        at += 2 * size
        back = Edit(operation="replace", begin=0, end=len(old), layer=edit.layer, old=old, new=new_NB.tobytes())
        found.append(Change(tensor=tensor, edits=(back,), before=change.before))
    return found
