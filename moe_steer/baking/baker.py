"""``bake``: a plan written into a copy of a model."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from moe_steer.baking.certificate import Certificate, check_overlay
from moe_steer.baking.gguf.gguf_writing import bake_gguf
from moe_steer.baking.gguf.model import is_gguf
from moe_steer.baking.planning import refuse_plan
from moe_steer.baking.safetensors.writing import bake_checkpoint
from moe_steer.gguf.control_vector import export_control_vector
from moe_steer.plan import SteeringPlan

StrPath = str | os.PathLike[str]


def bake(
    model: StrPath,
    plan: SteeringPlan,
    out: StrPath,
    overlay: str | None = None,
    *,
    copy: bool = False,
    symlink: bool = False,
    round_gains: bool = False,
    hash_all: bool = False,
    control_vector: StrPath | None = None,
) -> Certificate:
    """Write ``plan`` into a copy of a model, which any engine then serves as it is; returns what was done, and how exactly.

    A gain multiplies what makes the expert's output: its down projection (weights or their scales, and its bias). That equals
    the gain on the gate weight, because the output is weight * projection(x).

    ``model``: a folder with config.json and safetensors files, or a GGUF file (the first part of a model in several parts); it
    is only read. ``out``: the folder or file to write, which must not exist (a folder may be empty); it appears when all is
    done, or not at all. ``overlay``: put the changed tensors into a small shard of their own instead of rewriting the shards
    that hold them. The old tensors then stay in the folder under the same names, so its value says how the engine reads shards
    (``certificate.LOADERS``): any other way serves the plain model. Unchanged shards are hard-linked; ``copy`` copies them, ``symlink`` points to them. Every copy shares its
    source's blocks where the file system can (XFS, btrfs), so that only changes are written. ``round_gains``: where a format
    holds only powers of two, take the nearest one, and accept GGUF scales that lose bits below their format's range.
    ``hash_all``: hash unchanged shards as well, however large. ``control_vector``: write the plan's residual vectors to this
    GGUF control vector instead of baking them. ``overlay``, ``symlink`` and ``hash_all`` are for folders.

    ValueError for plans and models that cannot be baked, OSError when writing failed; nothing is left then.
    """
    if is_gguf(model):
        for option, value in (("overlay", overlay is not None), ("symlink", symlink), ("hash-all", hash_all)):
            if value:
                raise ValueError(f"--{option} is for checkpoint folders, and {os.fspath(model)} is a GGUF file")
        refuse_plan(plan)
        return bake_gguf(model, plan, Path(out), copy=copy, round_gains=round_gains, control_vector=control_vector)
    if control_vector is not None:
        export_control_vector(dataclasses.replace(plan, experts=(), top_k=()), control_vector)
        plan = dataclasses.replace(plan, residual=())
    refuse_plan(plan)
    check_overlay(overlay)
    return bake_checkpoint(
        model,
        plan,
        Path(out),
        loader=overlay,
        copy=copy,
        symlink=symlink,
        round_gains=round_gains,
        hash_all=hash_all,
    )
