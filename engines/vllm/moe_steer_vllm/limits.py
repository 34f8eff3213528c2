"""What this plug-in cannot steer, refused by name before a weight is read: a request that is steered less than it asked looks
exactly like one that is steered."""

from __future__ import annotations

import re
from typing import Any

from moe_steer_vllm import SUPPORTED
from moe_steer_vllm.served import Served


def refuse_version(version: str) -> None:
    """ValueError for a vLLM that this plug-in was not tested on."""
    found = re.match(r"(\d+)\.(\d+)", version)
    low, high = (".".join(map(str, number)) for number in SUPPORTED)
    if found is None or not SUPPORTED[0] <= (int(found[1]), int(found[2])) < SUPPORTED[1]:
        raise ValueError(
            f"moe-steer-vllm was tested on vLLM {low} up to, not including, {high}, and this is {version}: install one of those"
        )


def refuse_config(config: Any, served: Served) -> None:
    """ValueError, in one line, where a vLLM configuration asks for what plans cannot follow. ``config``: a ``VllmConfig``."""
    parallel = config.parallel_config
    reasons = {
        "speculative decoding (speculative_config), which runs tokens that are taken back": config.speculative_config
        is not None,
        "pipeline parallelism (pipeline_parallel_size)": parallel.pipeline_parallel_size > 1,
        "prefill context parallelism (prefill_context_parallel_size)": parallel.prefill_context_parallel_size > 1,
        "microbatches (enable_dbo, ubatch_size), which cut a batch in two": parallel.use_ubatching,
        "sequence parallelism of experts over data-parallel ranks": parallel.use_sequence_parallel_moe,
        "elastic expert parallelism (enable_elastic_ep), whose ranks come and go": parallel.enable_elastic_ep,
        "a key-value connector (kv_transfer_config), whose caches may not keep plans apart": config.kv_transfer_config
        is not None,
        f"a model that does not write text (runner {config.model_config.runner_type})": config.model_config.runner_type
        != "generate",
        "residual vectors in float16, in which vLLM scales the residual stream of some models; use bfloat16": "float16"
        in str(config.model_config.dtype).replace("bfloat16", "")
        and any(plan.active_residual for plan in served.plans.values()),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(
            f"steering plans cannot be served with {'; nor with '.join(found)}: start vLLM without it, or without plans"
        )


def refuse_runner(runner: Any, layer: int) -> None:
    """ValueError where the weights of one layer's experts cannot be reached. ``runner``: vLLM's MoERunner."""
    name = type(runner.router).__name__
    if runner.is_monolithic:
        kernel = type(runner._quant_method).__name__
        raise ValueError(
            f"the experts of layer {layer} are run by a monolithic kernel ({kernel}) that routes inside, where no weight can be reached: choose another kernel for experts (--moe-backend), or bake the plan"
        )
    if name not in ("FusedTopKRouter", "FusedTopKBiasRouter", "GroupedTopKRouter", "CPURouter", "CustomRoutingRouter"):
        raise ValueError(f"the router of layer {layer} is a {name}, whose weights cannot be reached: bake the plan")
    if getattr(runner, "do_naive_dispatch_combine", False):
        raise ValueError(
            f"the router of layer {layer} is given the tokens of all data-parallel ranks, which are steered by their own requests: use an all-to-all backend for experts, or tensor parallelism"
        )
