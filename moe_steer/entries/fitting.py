"""Entries of a plan, checked: read strictly from its file; and whether they fit where they shall act, a model (its layers, experts, vectors, sites
and probes) or a place that cannot do all of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from moe_steer.entries.expert_entry import ExpertGain, check_choice
from moe_steer.entries.residual_entry import ResidualVector
from moe_steer.gates.conditions import PROBED
from moe_steer.gates.probe import Probe
from moe_steer.json_files import quoted

if TYPE_CHECKING:
    from moe_steer.layers import ModelShape


def refuse_unknown(where: str, data: Mapping[str, Any], allowed: set[str]) -> None:
    """ValueError for a key of ``data`` that is not allowed."""
    unknown = sorted(set(data) - allowed)
    if unknown:
        raise ValueError(f"unknown key {quoted(unknown[0])} in {where}: it may hold {', '.join(sorted(allowed))}")


def listed(data: Mapping[str, Any], key: str) -> list[Any]:
    """The list under a key, empty where there is none."""
    value = data.get(key, [])
    if not isinstance(value, list):
        raise ValueError(f"{key!r} is {type(value).__name__}: give a JSON list")
    return value


def read_entry(kind: Any, keys: Sequence[str], where: str, position: int, item: Any) -> Any:
    """An entry of a kind from its JSON object; ValueError for an unknown key, and for one that is missing."""
    if not isinstance(item, Mapping):
        raise ValueError(f"{where}[{position}] is {quoted(item)}: give a JSON object")
    refuse_unknown(f"{where}[{position}]", item, set(keys))
    needed = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
    needed += ["file"] if kind is ResidualVector else []
    needed += ["gain"] if kind is ExpertGain and not {"force", "logit_bias"} & set(item) else []
    if set(needed) - set(item):
        raise ValueError(f"{where}[{position}] is not complete: give {', '.join(needed)}")
    return kind(**item)


def by_content(entry: Mapping[str, Any], probe: Callable[[str], Probe]) -> dict[str, Any]:
    """An entry's JSON values with what its gate's probes compute in place of where their files lie."""

    def one(condition: Mapping[str, Any]) -> dict[str, Any]:
        sha256 = {"sha256": probe(condition["file"]).digest()} if "file" in condition else {}
        return {key: value for key, value in condition.items() if key != "file"} | sha256

    when = entry.get("when")
    if when is None:
        return dict(entry)
    joined = next((key for key in ("all", "any") if key in when), None)
    said = one(when) if joined is None else {**when, joined: [one(condition) for condition in when[joined]]}
    return {**entry, "when": said}


def refuse_twice(experts: Sequence[ExpertGain], top_k: Sequence[Any]) -> None:
    """ValueError for an expert, or a layer of top_k, that is named twice."""
    seen: set[tuple[int, int]] = set()
    for entry in experts:
        key = (entry.layer, entry.expert)
        if key in seen:
            raise ValueError(f"layer {entry.layer} expert {entry.expert} occurs twice in the plan: keep one gain")
        seen.add(key)
    by_layer = [entry.layer for entry in top_k]
    if len(set(by_layer)) < len(by_layer):
        raise ValueError("top_k names a layer twice: keep one k for each layer")


def refuse_contradiction(plan: Any) -> None:
    """ValueError for an entry that the model which the plan itself names does not have."""
    model = plan.model or {}
    for entry in (*plan.experts, *plan.residual, *plan.top_k):
        for key, size in (("layer", "num_layers"), ("expert", "num_experts"), ("k", "num_experts")):
            number, most = getattr(entry, key, None), model.get(size)
            if number is not None and most is not None and number >= most + (key == "k"):
                raise ValueError(
                    f"the plan names {key} {quoted(number)} of a model with {most} {size.removeprefix('num_')}: correct one of them"
                )


def free_name(stem: str, taken: Collection[str]) -> str:
    """The name of a new file beside those that are taken."""
    endings = ("", *(f"-{number}" for number in range(2, len(taken) + 2)))
    return next(name for ending in endings if (name := f"{stem}{ending}.safetensors") not in taken)


def check_fits_model(plan: Any, model: Any) -> None:
    """Refuse a plan that does not fit ``model`` (a transformers model or a ``ModelShape``); ValueError names the entry."""
    shape: ModelShape
    if hasattr(model, "moe_layers") and hasattr(model, "num_experts"):  # or the shape of a checkpoint's files
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
    for expert in plan.experts:
        expert.check(shape)
    check_choice(plan.experts, plan.top_k, model, shape)
    for entry in plan.residual:
        if entry.layer >= shape.num_layers:
            raise ValueError(
                f"residual layer {entry.layer} does not exist: this model has layers 0-{shape.num_layers - 1}, name one of them"
            )
        entry.check(plan.vector(entry), shape)
        plan.load_shift(entry)  # refuses a strength that the vector cannot be measured by
        if model is not shape:
            check_site(entry, model)
    check_gates([*plan.experts, *plan.residual], plan.probe, shape)


def check_gates(
    entries: Sequence[ExpertGain | ResidualVector], probe: Callable[[str], Probe], shape: ModelShape
) -> None:
    """ValueError where a probe of an entry's gate does not fit the model, or reads a layer that has not run when the entry acts."""
    gated = ((gated, condition) for gated in entries if gated.when for condition in gated.when.conditions)
    for entry, one in gated:
        if one.on not in PROBED:
            continue
        found = probe(one.file)
        found.check(shape)
        first = found.layer + (isinstance(entry, ExpertGain) or entry.acts_inside)
        what = f"expert {entry.expert}" if isinstance(entry, ExpertGain) else entry.name
        if entry.layer < first:
            raise ValueError(
                f"{what} at layer {entry.layer} is gated by {one.file!r}, which reads the output of layer {found.layer}, and that "
                f"comes later: gate entries of layer {first} and above by it, or make a probe at a lower layer"
            )


def check_site(entry: ResidualVector, model: Any) -> None:
    """ValueError where the model has no such place, or no such head."""
    from moe_steer.inside import place_of  # which needs torch, and plans of gains do not

    place = place_of(model, entry.layer, entry.site)
    if entry.head is not None and entry.head >= place.heads:
        raise ValueError(
            f"head {entry.head} at layer {entry.layer} does not exist: this model has heads 0-{place.heads - 1}, name one of them"
        )


class Entries(Protocol):
    """The part of a plan that matters here."""

    @property
    def experts(self) -> Sequence[ExpertGain]: ...

    @property
    def residual(self) -> Sequence[ResidualVector]: ...


def refuse_outside(plan: Entries, where: str) -> None:
    """ValueError for a plan with an entry that needs this process; ``where`` it was to go: 'a baked model', 'a server'."""
    named: list[tuple[ExpertGain | ResidualVector, str]] = [
        (one, f"expert {one.expert} at layer {one.layer}") for one in plan.experts
    ]
    named += [(one, f"{one.name} at layer {one.layer}") for one in plan.residual]
    for entry, name in named:
        if entry.when is not None:
            raise ValueError(
                f"{name} is gated (when: {entry.when}), which {where} cannot follow: take 'when' out, or steer in process "
                "('moe-steer generate', 'moe-steer evaluate', or steer() in Python)"
            )
        if isinstance(entry, ResidualVector) and not entry.only_adds:
            raise ValueError(
                f"{name} is to {entry.do} at the site {entry.site}, and {where} only adds at outputs of layers: take it out, or steer in "
                "process ('moe-steer generate', 'moe-steer evaluate', or steer() in Python)"
            )
