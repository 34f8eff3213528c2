"""What every rank does in tests/launch/test_sharded_choice.py: force experts and change k under a backend, compare with one process.

Usage: choice_worker.py OUT FOLDER backend:model ...
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from launch.core.ranks import Ranks, leave
from moe_steer import ExpertGain, SteeringPlan, TopK, load_model, observe_routing, steer
from moe_steer.backends.layout import layout_of
from moe_steer.layers import model_shape
from sharded_models import run_cases


def plans_for(model: Any) -> dict[str, SteeringPlan]:
    """Experts of the first and the last shard; k changed at one layer, in another scope."""
    shape = model_shape(model)
    first, last = shape.moe_layers[0], shape.moe_layers[-1]
    experts = [
        ExpertGain(first, shape.num_experts - 1, 4.0, force="in"),
        ExpertGain(first, 0, force="out"),
        ExpertGain(last, 5, force="in"),
        ExpertGain(last, 9, logit_bias=2.0),
    ]
    other_k = [TopK(first, shape.top_k - 1, "generated"), TopK(last, shape.top_k + 1)]
    return {
        "all": SteeringPlan(experts=experts),
        "generated": SteeringPlan(experts=experts, scope="generated"),
        "top_k": SteeringPlan(experts=experts, top_k=other_k),
    }


def compute(model: Any, plan: SteeringPlan, share: tuple[int, int]) -> dict[str, Any]:
    """Logits, routing, tokens and audit; ranks that share the samples each get an input of their own."""
    ids = torch.randint(2, 90, (2, 11), generator=torch.Generator().manual_seed(1 + share[0]))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    routed: dict[int, torch.Tensor] = {}
    with torch.no_grad(), steer(model, plan, prompt_lengths=[4, 6], strict=True) as audit:
        with observe_routing(model, lambda layer, ids_TK, _: routed.__setitem__(layer, ids_TK.sort(-1).values)):
            logits = model(ids, attention_mask=mask).logits
    with torch.no_grad(), steer(model, plan, strict=True) as later:
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    rows = [{k: v for k, v in row.items() if k != "weight_added"} for row in audit.to_rows() + later.to_rows()]
    return {"logits": logits, "routed": routed, "tokens": tokens, "rows": rows}


def compare(backend: str, checkpoint: Path, ranks: Ranks) -> dict[str, Any]:
    """Plan -> what differs, as JSON values; or what the backend says against it."""
    reference, _ = load_model(checkpoint, backend="plain")
    model, _ = load_model(checkpoint, backend=backend)
    share = layout_of(model).share
    result: dict[str, Any] = {}
    for name, plan in plans_for(reference).items():
        one = compute(reference, plan, share)
        try:
            many = compute(model, plan, share)
        except ValueError as error:
            result[name] = {"refused": str(error)}
            continue
        plain = compute(reference, SteeringPlan(), share)
        result[name] = {
            "logits": float((one["logits"] - many["logits"]).abs().max()),
            "effect": float((one["logits"] - plain["logits"]).abs().max()),
            "routed": all(torch.equal(one["routed"][layer], many["routed"][layer]) for layer in one["routed"]),
            "tokens": torch.equal(one["tokens"], many["tokens"]),
            "rows": one["rows"] == many["rows"],
        }
    return result


if __name__ == "__main__":
    run_cases(lambda backend, name, folder, ranks: compare(backend, folder / name, ranks))
    leave(0)
