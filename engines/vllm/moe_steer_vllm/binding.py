"""Plans bound to a loaded model: checked against it, made tables, and put into the routers and layers that they name."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

from moe_steer.layers import ModelShape, decoder_layers
from moe_steer.tokens import PositionTracker, special_tokens, tag_scopes
from moe_steer_vllm.choosing import rule_of
from moe_steer_vllm.following import Following
from moe_steer_vllm.limits import refuse_config, refuse_runner
from moe_steer_vllm.served import served_by
from moe_steer_vllm.tables import steer_layer, steer_router


def bind(model: Any, config: Any, device: Any) -> Following:
    """Check the plans against a loaded model, build their tables, and wrap the routers and layers that they name."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    served = served_by(config)
    refuse_config(config, served)
    text = config.model_config.hf_text_config
    whole = SimpleNamespace(config=config.model_config.hf_config, named_modules=model.named_modules)
    layers = decoder_layers(whole)[1]
    runners = {module.layer_id: module for module in model.modules() if isinstance(module, MoERunner)}
    shape = ModelShape(
        model_type=config.model_config.hf_config.model_type,
        num_layers=len(layers),
        # The router's own number counts the replicas of EPLB too, and ids are those of the model.
        num_experts=next((runner.moe_config.num_logical_experts for runner in runners.values()), 0),
        top_k=next((runner.router.top_k for runner in runners.values()), 0),
        moe_layers=tuple(sorted(runners)),
        hidden_size=text.hidden_size,
    )
    for name, plan in served.plans.items():
        try:
            plan.check(shape)
        except ValueError as error:
            raise ValueError(f"plan {name}: {error}") from error
    special = None
    if tag_scopes(served.scopes):
        from vllm.tokenizers import cached_tokenizer_from_config

        special = special_tokens(cached_tokenizer_from_config(config.model_config))
        PositionTracker(served.scopes, special)  # refuses scopes that this tokenizer cannot have
    limits = config.scheduler_config
    # Padded batches are longer than the longest that is scheduled: a graph's size is the next one upwards.
    longest = max([limits.max_num_batched_tokens, *(config.compilation_config.cudagraph_capture_sizes or [])])
    places, eager = longest + limits.max_num_seqs + 512, bool(config.model_config.enforce_eager)
    following = Following(served, special, places, limits.max_num_seqs, device, eager)
    plans = list(served.plans.values())
    for layer in sorted({entry.layer for plan in plans for entry in plan.active_experts}):
        runner = runners[layer]
        refuse_runner(runner, layer)
        rule = functools.partial(rule_of, runner.router, shape.num_experts, text.hidden_size, device)
        steer_router(runner, runner.router, layer, plans, following.tokens, rule)
        following.routers[layer] = type(runner.router).__name__
    for layer in sorted({entry.layer for plan in plans for entry in plan.active_residual}):
        steer_layer(layers[layer], layer, plans, following.tokens)
    return following
