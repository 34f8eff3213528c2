"""Run source and baked checkpoint and compare: the source steered in process, the baked one as it is."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from moe_steer.baking.planning import Certificate
from moe_steer.baking.record import BakeMismatch
from moe_steer.plan import SteeringPlan

PROMPTS = (
    "If 3x + 5 = 20, what is x? Think step by step.",
    "A train travels 180 km in 2.5 hours. What is its average speed in km/h?",
    "How many prime numbers are there between 20 and 40?",
    "A ball is dropped from a height of 20 m. How long does it take to reach the ground? Take g = 10 m/s^2.",
    "The sum of two numbers is 31 and their difference is 7. Find both numbers.",
)
_TOLERANCE = {"torch.float32": 1e-5, "torch.float16": 1e-2, "torch.bfloat16": 5e-2}
"""Relative error of logits that other orders of rounding explain, by the type the model computes in."""


@dataclass(frozen=True, kw_only=True)
class ForwardComparison:
    """Logits of hooked and baked model over the prompts, and greedy tokens after them.

    ``worst`` is the largest difference of one logit, ``relative`` the largest of a prompt's in the L2 norm; ``same_tokens`` of
    ``tokens`` greedy ones agree up to the first difference; ``silent`` lists entries that no prompt made fire.
    """

    prompts: int
    worst: float
    relative: float
    tokens: int
    same_tokens: int
    dtype: str
    silent: tuple[str, ...]

    def check(self, certificate: Certificate) -> None:
        """BakeMismatch when the difference is more than the certificate allows."""
        bound = max((entry.rounding for entry in certificate.entries), default=0.0)  # of the gains that were baked
        allowed = 8 * bound + _TOLERANCE.get(self.dtype, 1e-2) if bound else 0.0
        if not self.relative <= allowed:
            raise BakeMismatch(
                f"baked and hooked logits differ by {self.relative:.2e} (relative), {allowed:.2e} is allowed: do not serve this checkpoint"
            )
        if not bound and self.same_tokens != self.tokens:
            raise BakeMismatch(
                f"only {self.same_tokens} of {self.tokens} greedy tokens agree: do not serve this checkpoint"
            )


def applied_plan(plan: SteeringPlan, certificate: Certificate) -> SteeringPlan:
    """The plan with the gains that were baked."""
    applied = {(entry.layer, entry.expert): entry.applied for entry in certificate.entries}
    experts = [replace(entry, gain=applied.get((entry.layer, entry.expert), entry.gain)) for entry in plan.experts]
    return replace(plan, experts=experts)


def compare_forward(
    baked_dir: str | os.PathLike[str],
    source: str | os.PathLike[str],
    plan: SteeringPlan,
    prompts: Sequence[str] = PROMPTS,
    max_new_tokens: int = 32,
    **options: Any,
) -> ForwardComparison:
    """Load the source, run it hooked, then load the baked checkpoint and run that; never both at once.

    ``plan`` with the gains that were baked (``applied_plan``). ``options`` go to ``load_model``, with experts_implementation
    "eager" unless they say otherwise. Both folders must have a tokenizer.
    """
    hooked, dtype, silent = _outputs(source, plan, prompts, max_new_tokens, options)
    plain, _, _ = _outputs(baked_dir, None, prompts, max_new_tokens, options)
    worst = relative = 0.0
    tokens = same = 0
    for (logits_SV, ids), (other_SV, other_ids) in zip(hooked, plain, strict=True):
        difference_SV = (logits_SV - other_SV).abs()
        worst = max(worst, float(difference_SV.max()))
        relative = max(relative, float(difference_SV.norm() / logits_SV.norm()))
        tokens += max(len(ids), len(other_ids))
        same += next(
            (i for i, (a, b) in enumerate(zip(ids, other_ids, strict=False)) if a != b), min(len(ids), len(other_ids))
        )
    return ForwardComparison(
        prompts=len(prompts),
        worst=worst,
        relative=relative,
        tokens=tokens,
        same_tokens=same,
        dtype=dtype,
        silent=silent,
    )


def _outputs(
    folder: str | os.PathLike[str],
    plan: SteeringPlan | None,
    prompts: Sequence[str],
    max_new_tokens: int,
    options: dict[str, Any],
) -> tuple[list[tuple[Any, list[int]]], str, tuple[str, ...]]:
    """Per prompt: logits [S, V] in float32 and the greedy tokens after it. Then the type, and the entries that never fired."""
    import torch
    from transformers import GenerationConfig

    from moe_steer.entries.audit import SteeringWarning
    from moe_steer.loading import load_model
    from moe_steer.steering import steer

    try:
        # Experts one by one: the order in which the faster ways add up depends on where a tensor is in its file.
        model, tokenizer = load_model(folder, **{"experts_implementation": "eager", **options})
    except ValueError:  # a family without the choice
        model, tokenizer = load_model(folder, **options)
    stops = {"eos_token_id": model.generation_config.eos_token_id, "pad_token_id": model.generation_config.pad_token_id}
    model.generation_config = GenerationConfig(
        **stops
    )  # a publisher's penalties and limits are no part of what is compared
    found = []
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", SteeringWarning)
        with steer(model, plan) if plan is not None else nullcontext() as audit:
            for prompt in prompts:
                inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
                logits_SV = model(**inputs, use_cache=False).logits[0].float().cpu()
                out = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
                found.append((logits_SV, out[0, inputs["input_ids"].shape[1] :].tolist()))
        acted = audit.acted if audit is not None else {}
        silent = tuple(f"layer {layer} expert {expert}" for (layer, expert), tokens in acted.items() if not tokens)
    dtype = str(model.dtype)
    del model
    gc.collect()
    return found, dtype, silent
