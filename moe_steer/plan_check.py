"""Whether a steering plan fits a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moe_steer.residual_files import read_vector

if TYPE_CHECKING:
    from moe_steer.layers import ModelShape
    from moe_steer.plan import SteeringPlan


def check_plan(plan: SteeringPlan, model: Any) -> None:
    """Refuse a plan that does not fit ``model`` (a transformers model or a ``ModelShape``); ValueError names the entry."""
    shape: ModelShape
    if hasattr(model, "moe_layers") and hasattr(model, "num_experts"):
        shape = model
    else:
        from moe_steer.layers import model_shape

        shape = model_shape(model)
    for key in ("model_type", "num_layers", "num_experts"):
        wanted = (plan.model or {}).get(key)
        if wanted is not None and wanted != getattr(shape, key):
            raise ValueError(
                f"the plan was made for {key} {wanted!r}, this model has {getattr(shape, key)!r}: give that model, or a plan for this one"
            )
    _check_experts(plan, shape)
    _check_residual(plan, shape)


def _check_experts(plan: SteeringPlan, shape: ModelShape) -> None:
    if plan.experts and not shape.moe_layers:
        raise ValueError(
            f"the plan names experts, but {shape.model_type} is a dense model: use residual vectors, or a mixture-of-experts model"
        )
    for entry in plan.experts:
        if entry.layer not in shape.moe_layers:
            raise ValueError(
                f"layer {entry.layer} (expert {entry.expert}) has no experts in this model: layers with experts are {_ranges(shape.moe_layers)}, name one of them"
            )
        if entry.expert >= shape.num_experts:
            raise ValueError(
                f"expert {entry.expert} at layer {entry.layer} does not exist: this model has experts 0-{shape.num_experts - 1}, name one of them"
            )


def _check_residual(plan: SteeringPlan, shape: ModelShape) -> None:
    for entry in plan.residual:
        if entry.layer >= shape.num_layers:
            raise ValueError(
                f"residual layer {entry.layer} does not exist: this model has layers 0-{shape.num_layers - 1}, name one of them"
            )
        found = read_vector(plan.vector_path(entry), entry)
        made_for = found.header.get("model")
        for key in ("model_type", "num_layers"):
            wanted = made_for.get(key) if isinstance(made_for, dict) else None
            if wanted is not None and wanted != getattr(shape, key):
                raise ValueError(
                    f"the vector {entry.file!r} was made on a model with {key} {wanted!r}, this one has {getattr(shape, key)!r}: give that model, or make a direction on this one with 'moe-steer direction'"
                )
        width = len(found.vector_D)
        if width != shape.hidden_size:
            raise ValueError(
                f"the vector {entry.file!r} has width {width}, the model's residual stream has {shape.hidden_size}: make a direction on this model with 'moe-steer direction'"
            )
        plan.load_shift(entry)  # refuses a strength that the file cannot be measured by


def _ranges(numbers: Sequence[int]) -> str:
    """'1-3, 5' for (1, 2, 3, 5)."""
    parts: list[str] = []
    start = previous = numbers[0]
    for number in [*numbers[1:], -1]:
        if number == previous + 1:
            previous = number
            continue
        parts.append(str(start) if start == previous else f"{start}-{previous}")
        start = previous = number
    return ", ".join(parts)
