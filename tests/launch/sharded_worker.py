"""What every rank does in tests/launch/test_sharded_*.py: load under a backend, compare with one unsharded process, write down.

Usage: sharded_worker.py OUT FOLDER backend:model backend+cpu:model backend+nvme:model ...
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from expert_stats import MarkerSet, Trace
from expert_stats.collect import collect_counts
from launch.core.ranks import Ranks, leave, ranks_of_this_run
from launch.core.sharded import broadcast_plan, collect_over_ranks
from moe_steer import ExpertGain, ResidualVector, SteeringPlan, load_model, steer
from moe_steer.backends.layout import layout_of, lockstep
from moe_steer.layers import model_shape
from reasoning_evals.engines.in_process import InProcessSampler
from reasoning_evals.engines.sampling import Request, SamplingConfig
from sharded_models import VOCAB, save_checkpoint

BETAS = (4.0, 0.0, 8.0)


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


def compare(backend: str, name: str, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Everything the tests look at, as JSON values."""
    checkpoint = folder / name
    reference, tokenizer = load_model(checkpoint, backend="plain")
    backend, _, place = backend.partition("+")
    (folder / "disk").mkdir(exist_ok=True)
    model, _ = load_model(checkpoint, backend=backend, offload=str(folder / "disk") if place == "nvme" else place)
    layout = layout_of(model)
    plan = broadcast_plan(plan_for(reference, folder) if ranks.is_main else None, ranks)
    result: dict[str, Any] = {"same_tokens": layout.same_tokens, "share": layout.share, "digest": plan.digest()}
    result["bytes"] = held_bytes(model)
    result["files"] = sum(path.stat().st_size for path in (folder / "disk").glob(f"zero3-*-{os.getpid()}-*/**/*.swp"))
    wanted, found = ({name: str(t.dtype) for name, t in each.named_buffers()} for each in (reference, model))
    result["precision_equal"] = all(found[name] == wanted[name] for name in found.keys() & wanted.keys())
    result["shape_equal"] = model_shape(model).to_dict() == model_shape(reference).to_dict()
    ids = torch.randint(2, 90, (2, 11), generator=torch.Generator().manual_seed(1 + layout.share[0]))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        plain = [each(ids, attention_mask=mask).logits for each in (reference, model)]
        with steer(reference, plan) as audit_one:
            one = reference(ids, attention_mask=mask).logits
        with steer(model, plan) as audit_many:
            many = model(ids, attention_mask=mask).logits
        vectors = dataclasses.replace(plan, experts=())
        with steer(reference, vectors, quiet=True):
            one_moved = reference(ids, attention_mask=mask).logits
        with steer(model, vectors, quiet=True):
            many_moved = model(ids, attention_mask=mask).logits
        generated = [
            each.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False) for each in (reference, model)
        ]
    result["plain"] = float((plain[0] - plain[1]).abs().max())
    result["steered"] = float((one - many).abs().max())
    result["by_token"] = (one - many).abs().amax(-1).flatten().tolist()
    result["effect"] = float((one - plain[0]).abs().max())
    result["residual"] = float((one_moved - many_moved).abs().max())
    result["residual_effect"] = float((one_moved - plain[0]).abs().max())
    result["audit_equal"] = {k: v.tokens for k, v in audit_one.fired.items()} == {
        k: v.tokens for k, v in audit_many.fired.items()
    }
    result["generate_equal"] = torch.equal(*generated)
    own = requests(5)[
        layout.share[0] :: layout.share[1]
    ]  # an odd number: ranks with fewer must keep the others company
    config = SamplingConfig(
        greedy=True, max_new_tokens=7 + 5 * ranks.rank if not layout.same_tokens else 7, batch_size=2
    )
    for key, change in (("greedy", SteeringPlan()), ("steered_greedy", plan)):
        with lockstep(model), steer(model, change, quiet=True):
            got = {s.key: s.token_ids for s in InProcessSampler(model, tokenizer).sample(own, config)}
        with steer(reference, change, quiet=True):
            want = {s.key: s.token_ids for s in InProcessSampler(reference, tokenizer).sample(own, config)}
        result[key] = got == want
    if model_shape(reference).moe_layers:
        markers = MarkerSet.from_tokenizer(tokenizer, ("<think>", "</think>"))
        single = collect_counts(reference, traces(), markers, tokens_per_batch=64)
        counts = collect_over_ranks(model, traces(), markers, ranks, tokens_per_batch=64)
        result["counts_equal"] = all((counts.arrays[key] == array).all() for key, array in single.arrays.items())
        result["counted"] = int(counts.expert_GLE.sum())
    return result


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


def main() -> None:
    """Run all cases that the command line names; the results of this rank go to OUT/rank<k>.json."""
    out, folder = Path(sys.argv[1]), Path(sys.argv[2])
    results: dict[str, Any] = {}
    with ranks_of_this_run() as ranks:
        for case in sys.argv[3:]:
            backend, _, name = case.partition(":")
            if ranks.is_main:
                save_checkpoint(name, folder)
            ranks.barrier()
            try:
                results[case] = compare(backend, name, folder, ranks)
            except ValueError as error:
                results[case] = {"refused": str(error)}
            (out / f"rank{ranks.rank}.json").write_text(json.dumps(results))
    assert VOCAB


if __name__ == "__main__":
    main()
    leave(0)
