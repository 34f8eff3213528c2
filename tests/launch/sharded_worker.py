"""What every rank does in tests/launch/test_sharded_*.py: load under a backend, compare with one unsharded process, write down.

Usage: sharded_worker.py OUT FOLDER backend:model backend+cpu:model backend+nvme:model ...
"""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from expert_stats import MarkerSet, RoutingCounts, Trace
from expert_stats.collect import collect_counts
from launch.core.ranks import Ranks, leave
from launch.core.wiring import broadcast_plan, collect_over_ranks
from moe_steer import ExpertGain, ResidualVector, SteeringPlan, load_model, steer
from moe_steer.backends.layout import layout_of, lockstep
from moe_steer.layers import model_shape
from reasoning_evals.engines.in_process import InProcessSampler
from reasoning_evals.engines.sampling import Request, SamplingConfig
from sharded_models import run_cases

BETAS = (4.0, 0.0, 8.0)
Samples = dict[str, tuple[int, ...]]


def plan_for(model: Any, folder: Path) -> SteeringPlan:
    """Three experts (on the first and last shard) and one residual vector; only the vector for a dense model."""
    shape = model_shape(model)
    file = folder / f"direction{shape.hidden_size}.safetensors"
    generator = torch.Generator().manual_seed(3)
    save_file({"vector": torch.randn(shape.hidden_size, generator=generator) * 0.3}, str(file))
    experts = []
    if shape.moe_layers:
        places = [(shape.moe_layers[0], 0), (shape.moe_layers[-1], shape.num_experts - 1), (shape.moe_layers[-1], 5)]
        experts = [ExpertGain(layer=at, expert=e, gain=g) for (at, e), g in zip(places, BETAS, strict=True)]
    return SteeringPlan(experts=experts, residual=[ResidualVector(layer=1, file=str(file), strength=0.5)])


def requests(num: int) -> list[Request]:
    """Prompts of unequal length, the same on every rank."""
    generator = torch.Generator().manual_seed(5)
    lengths = [4, 9, 6, 13, 5, 7, 11, 8][:num]
    return [
        Request(key=f"r{i}", prompt_ids=tuple(torch.randint(2, 90, (n,), generator=generator).tolist()), seed=i)
        for i, n in enumerate(lengths)
    ]


def traces() -> list[Trace]:
    """Traces of unequal length with both tags."""
    generator = torch.Generator().manual_seed(11)
    found = []
    for i, length in enumerate((20, 33, 27, 41, 18)):
        ids = torch.randint(2, 96, (length,), generator=generator).tolist()
        ids[4], ids[length - 6] = 97, 98
        found.append(
            Trace(trace_id=f"t{i}", token_ids=tuple(ids), prompt_length=4, thought_start=4, thought_end=length - 6)
        )
    return found


@dataclasses.dataclass(frozen=True)
class Computed:
    """What one model says to one input, with and without the plan; ``moved``: with the plan's vector alone."""

    plain: torch.Tensor
    steered: torch.Tensor
    moved: torch.Tensor
    fired: dict[Any, int]
    generated: torch.Tensor


def compute(model: Any, plan: SteeringPlan, share: tuple[int, int]) -> Computed:
    """Logits and generated tokens; ranks that share the samples each get an input of their own."""
    ids = torch.randint(2, 90, (2, 11), generator=torch.Generator().manual_seed(1 + share[0]))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).logits
        with steer(model, plan) as audit:
            steered = model(ids, attention_mask=mask).logits
        with steer(model, dataclasses.replace(plan, experts=()), quiet=True):
            moved = model(ids, attention_mask=mask).logits
        generated = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    return Computed(plain, steered, moved, {place: fired.tokens for place, fired in audit.fired.items()}, generated)


@functools.cache
def reference_of(checkpoint: Path) -> tuple[Any, Any, SteeringPlan]:
    """One process with the whole model, its tokenizer, and the plan for it."""
    model, tokenizer = load_model(checkpoint, backend="plain")
    return model, tokenizer, plan_for(model, checkpoint.parent)


@functools.cache
def reference_computes(checkpoint: Path, share: tuple[int, int]) -> Computed:
    """What the model of one process says: the same for every backend, so made once."""
    model, _, plan = reference_of(checkpoint)
    return compute(model, plan, share)


@functools.cache
def reference_samples(checkpoint: Path, steered: bool, share: tuple[int, int], config: SamplingConfig) -> Samples:
    """Its samples of this rank's requests."""
    model, tokenizer, plan = reference_of(checkpoint)
    return samples(model, tokenizer, plan if steered else SteeringPlan(), share, config)


def samples(model: Any, tokenizer: Any, plan: SteeringPlan, share: tuple[int, int], config: SamplingConfig) -> Samples:
    """Request -> tokens. The requests are an odd number: ranks with fewer must keep the others company."""
    own = requests(5)[share[0] :: share[1]]
    with lockstep(model), steer(model, plan, quiet=True):
        return {s.key: s.token_ids for s in InProcessSampler(model, tokenizer).sample(own, config)}


def compare(backend: str, name: str, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Everything the tests look at, as JSON values."""
    checkpoint = folder / name
    backend, _, place = backend.partition("+")
    (folder / "disk").mkdir(exist_ok=True)
    reference, tokenizer, plan = reference_of(checkpoint)
    model, _ = load_model(checkpoint, backend=backend, offload=str(folder / "disk") if place == "nvme" else place)
    layout = layout_of(model)
    plan = broadcast_plan(plan if ranks.is_main else None, ranks)
    result: dict[str, Any] = {"same_tokens": layout.same_tokens, "share": layout.share, "digest": plan.digest()}
    result["bytes"] = held_bytes(model)
    result["files"] = sum(path.stat().st_size for path in (folder / "disk").glob(f"zero3-*-{os.getpid()}-*/**/*.swp"))
    wanted, found = ({name: str(t.dtype) for name, t in each.named_buffers()} for each in (reference, model))
    result["precision_equal"] = all(found[name] == wanted[name] for name in found.keys() & wanted.keys())
    result["shape_equal"] = model_shape(model).to_dict() == model_shape(reference).to_dict()
    one, many = reference_computes(checkpoint, layout.share), compute(model, plan, layout.share)
    result["plain"] = float((one.plain - many.plain).abs().max())
    result["steered"] = float((one.steered - many.steered).abs().max())
    result["by_token"] = (one.steered - many.steered).abs().amax(-1).flatten().tolist()
    result["effect"] = float((one.steered - one.plain).abs().max())
    result["residual"] = float((one.moved - many.moved).abs().max())
    result["residual_effect"] = float((one.moved - one.plain).abs().max())
    result["audit_equal"] = one.fired == many.fired
    result["generate_equal"] = torch.equal(one.generated, many.generated)
    if name.endswith("_bf16"):  # the roundings of logits alone are looked at
        return result
    length = 3 if layout.same_tokens else 3 + ranks.rank
    config = SamplingConfig(greedy=True, max_new_tokens=length, batch_size=2)
    for key, change in (("greedy", SteeringPlan()), ("steered_greedy", plan)):
        got = samples(model, tokenizer, change, layout.share, config)
        result[key] = got == reference_samples(checkpoint, key == "steered_greedy", layout.share, config)
    if model_shape(reference).moe_layers:
        markers = MarkerSet.from_tokenizer(tokenizer, ("<think>", "</think>"))
        single = reference_counts(checkpoint)
        counts = collect_over_ranks(model, traces(), markers, ranks, tokens_per_batch=64)
        result["counts_equal"] = [one.stamp for one in counts.traces] == [one.stamp for one in single.traces]
        result["counted"] = int(counts.grouped()["expert_GLE"].sum())
    return result


@functools.cache
def reference_counts(checkpoint: Path) -> RoutingCounts:
    """What one process counts."""
    model, tokenizer, _ = reference_of(checkpoint)
    markers = MarkerSet.from_tokenizer(tokenizer, ("<think>", "</think>"))
    return collect_counts(model, traces(), markers, tokens_per_batch=64)


def held_bytes(model: Any) -> int:
    """Bytes of parameters and buffers that this process holds."""
    total = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        kept = getattr(tensor, "ds_tensor", None)
        if kept is not None and tensor.numel() == 0:
            tensor = kept
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        total += local.numel() * local.element_size()
    return total


if __name__ == "__main__":
    run_cases(compare)
    leave(0)
