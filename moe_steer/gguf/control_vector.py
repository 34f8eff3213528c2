"""``export_control_vector``: residual vectors as the GGUF control vector that llama.cpp loads with ``--control-vector``."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_steer.entries.fitting import refuse_outside
from moe_steer.files import written_aside
from moe_steer.gguf.header import architectures_of, gguf_package
from moe_steer.plan import SteeringPlan


def export_control_vector(plan: SteeringPlan, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Write the residual vectors of a plan, times their strengths in their units, as a GGUF control vector; returns what was written.

    ``direction.N`` is added to the output of decoder block N at every token, which is what a residual entry of layer N and
    scope "all" means; several entries of one layer are summed. Layers in between get zeros, since some readers stop at the
    first gap. ValueError for a plan without vectors, for other scopes, for layer 0 (llama.cpp has no direction there), for
    vectors of different widths, and for a plan that also holds gains: those are baked, and ``bake`` does both at once.
    """
    refuse_outside(plan, "a control vector")
    if plan.top_k:
        raise ValueError("the plan also has top_k entries, which a control vector cannot hold: leave them out of it")
    if plan.active_experts:
        raise ValueError(
            f"the plan also names {len(plan.active_experts)} experts, which a control vector cannot hold: use bake with control_vector=FILE for both"
        )
    return export_residual(plan, Path(path), _model_hint(plan))


def export_residual(plan: SteeringPlan, path: Path, architecture: str) -> dict[str, Any]:
    """As ``export_control_vector``, whatever else the plan holds; ``architecture`` becomes the file's model hint."""
    refuse_outside(plan, "a control vector")
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
        if entry.layer == 0:
            raise ValueError(
                "the residual entry of layer 0 cannot be exported: llama.cpp's control vectors begin at layer 1"
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
