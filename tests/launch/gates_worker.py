"""What every rank does in tests/launch/test_sharded_gates.py: gates and transforms under a backend, against one process.

Usage: gates_worker.py OUT FOLDER backend:model ...
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from launch.core.ranks import Ranks, leave
from launch.core.wiring import broadcast_plan
from moe_steer import ExpertGain, ResidualVector, SteeringPlan, load_model, steer
from moe_steer.backends.layout import layout_of
from moe_steer.gates import Probe
from moe_steer.layers import model_shape
from sharded_models import run_cases


def plans_for(model: Any, folder: str) -> dict[str, SteeringPlan]:
    """Gates on a probe, on confidence and on loops; every deed, at every site."""
    shape = model_shape(model)
    first, last = shape.moe_layers[0], shape.moe_layers[-1]
    random = torch.Generator().manual_seed(5)
    weight_D, vector_D = torch.randn(2, shape.hidden_size, generator=random)
    Probe(weight_D=weight_D / 4, bias=0.0, layer=first).save(f"{folder}/probe.safetensors")
    SteeringPlan(residual=[ResidualVector(last, vector=vector_D)]).save(f"{folder}/v.json")
    probe = {"on": "probe", "file": "probe.safetensors", "above": 0.6, "until": 0.4, "ramp": 2}
    unsure = {"on": "entropy", "above": 3.0, "until": 2.5}
    loop = {"on": "loop", "above": 2, "copies": 2}

    def at(layer: int, **more: Any) -> ResidualVector:
        return ResidualVector(layer, file=f"v-L{last}.safetensors", **more)

    gated = [ExpertGain(last, e, 6.0, when=probe) for e in range(0, shape.num_experts, 2)]
    gated += [ExpertGain(first, 1, force="in", when=unsure), ExpertGain(first, 4, logit_bias=2.0, when=loop)]
    sites = [at(last, do="rotate", strength=30.0, site="attention"), at(last, do="clamp", high=0.0, site="mlp")]
    return {
        "gates": SteeringPlan(experts=gated, residual=[at(last, when=unsure), at(last, when=probe)], base_dir=folder),
        "transforms": SteeringPlan(residual=[*sites, at(last, do="ablate", when=probe)], base_dir=folder),
        "head": SteeringPlan(
            residual=[ResidualVector(first, vector=vector_D[:16], do="set", to=2.0, site="head", head=1)]
        ),
    }


def compute(model: Any, plan: SteeringPlan, share: tuple[int, int]) -> dict[str, Any]:
    """Tokens, logits of the prompt and audit; ranks that share the samples each get an input of their own."""
    ids = torch.randint(2, 90, (2, 9), generator=torch.Generator().manual_seed(1 + share[0]))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad(), steer(model, plan, quiet=True) as audit:
        made = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    rows = [{k: v for k, v in row.items() if k not in ("weight_added", "norm_added")} for row in audit.to_rows()]
    return {"logits": torch.stack(made.logits), "tokens": made.sequences, "rows": rows}


def compare(backend: str, checkpoint: Path, ranks: Ranks) -> dict[str, Any]:
    """Plan -> what differs, as JSON values; or what the backend says against it."""
    reference, _ = load_model(checkpoint, backend="plain")
    model, _ = load_model(checkpoint, backend=backend)
    share = layout_of(model).share
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, plan in plans_for(reference, folder).items():
            one = compute(reference, plan, share)
            sent = plan if name == "head" else broadcast_plan(plan if ranks.is_main else None, ranks)
            try:
                many = compute(model, sent, share)
            except ValueError as error:
                result[name] = {"refused": str(error)}
                continue
            plain = compute(reference, SteeringPlan(), share)
            off = (one["logits"] - plain["logits"]).abs().max() if one["logits"].shape == plain["logits"].shape else 9.0
            same = one["logits"].shape == many["logits"].shape
            result[name] = {
                "logits": float((one["logits"] - many["logits"]).abs().max()) if same else 9.0,
                "effect": float(off),
                "tokens": torch.equal(one["tokens"], many["tokens"]),
                "rows": [{k: v for k, v in row.items() if k != "file"} for row in many["rows"]],
                "one": [{k: v for k, v in row.items() if k != "file"} for row in one["rows"]],
            }
    return result


if __name__ == "__main__":
    run_cases(lambda backend, name, folder, ranks: compare(backend, folder / name, ranks))
    leave(0)
