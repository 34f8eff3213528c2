"""Expert gains of one plan inside SGLang, as a forward hook of its own interface (--forward-hooks). NOT RUN HERE.

Written against the source of SGLang 0.5.23, which needs a GPU; what its modules return is stood in for in tests/engines. One plan
for the whole server, scope all:

    python -m sglang.launch_server --model-path MODEL --disable-prefill-cuda-graph --disable-decode-cuda-graph \\
      --forward-hooks '[{"name": "moe-steer", "target_modules": ["*.topk"], "hook_factory": "moe_steer_sglang:gains", "config": {"plan": "plan.json"}}]'

SGLang registers its hooks after CUDA graphs are captured, and a graph that is replayed runs no hook: with graphs the server would be
unsteered without a word. So graphs must be off, and whatever else keeps the hook from acting is refused by name. Where no module
matches the pattern, SGLang warns and goes on: look for one line a layer of the plan, "gains act in layer", when the first request came.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moe_steer import SteeringPlan
from moe_steer.json_files import quoted

VERSION = "0.5.23"
_LOGGER = logging.getLogger(__name__)


def gains(config: Mapping[str, Any]) -> Callable[[Any, Any, Any], Any]:
    """The factory that ``hook_factory`` names; ``config``: {"plan": FILE}. ValueError for a plan or a server that it cannot steer."""
    if set(config) != {"plan"}:
        raise ValueError(f'config of the hook is {quoted(dict(config))}: give {{"plan": FILE}}')
    plan = SteeringPlan.load(config["plan"])
    _refuse_plan(plan, config["plan"])
    _refuse_server()
    by_layer: dict[int, dict[int, float]] = {}
    for entry in plan.active_experts:
        by_layer.setdefault(entry.layer, {})[entry.expert] = entry.gain
    return hook(by_layer, plan.renormalize)


def hook(by_layer: Mapping[int, Mapping[int, float]], renormalize: bool = False) -> Callable[[Any, Any, Any], Any]:
    """(module, arguments, output) of a TopK -> the output with the gains of its layer on the weights."""
    tables: dict[tuple[int, torch.device], Tensor] = {}

    def steered(module: Any, args: Any, output: Any) -> Any:
        if module.layer_id not in by_layer:
            return output
        weights_TK, ids_TK = getattr(output, "topk_weights", None), getattr(output, "topk_ids", None)
        if weights_TK is None or ids_TK is None or hasattr(output, "packed_topk_ids"):
            raise ValueError(
                f"layer {module.layer_id}: {type(output).__name__} holds no weights that can be changed, since the kernel routes by "
                "itself: choose --moe-runner-backend triton, or bake the plan"
            )
        key = (module.layer_id, ids_TK.device)
        if key not in tables:
            named = by_layer[module.layer_id]
            table = torch.ones(max(named) + 2)  # the last row: all other experts, shared ones and padding
            for expert, gain in named.items():
                table[expert] = gain
            tables[key] = table.to(ids_TK.device)
            _LOGGER.warning("moe-steer: gains act in layer %d", module.layer_id)
        others = len(tables[key]) - 1
        known_TK = torch.where((ids_TK < 0) | (ids_TK > others), others, ids_TK).long()
        new_TK = weights_TK * tables[key][known_TK].to(weights_TK.dtype)
        if renormalize:
            sums = new_TK.sum(-1, keepdim=True)
            new_TK = new_TK * torch.where(sums > 0, weights_TK.sum(-1, keepdim=True) / sums, 1.0)
        return output._replace(topk_weights=new_TK)

    return steered


def _refuse_plan(plan: SteeringPlan, file: str) -> None:
    plan.refuse_outside("an engine")
    acts = {entry.action for entry in plan.active_experts if entry.acts_on_choice}
    if plan.active_residual or plan.top_k or acts or plan.scope != "all":
        raise ValueError(
            f"{file} holds more than gains in scope all, which is what SGLang's hook can do: serve it with vLLM"
        )
    if not plan.active_experts:
        raise ValueError(f"{file} changes nothing: give a plan with gains")


def _refuse_server() -> None:
    import sglang
    from sglang.srt.model_executor.cuda_graph_config import cuda_graph_fully_disabled
    from sglang.srt.runtime_context import get_server_args

    if sglang.__version__ != VERSION:
        raise ValueError(
            f"the hook was written for SGLang {VERSION}, and this is {sglang.__version__}: install that one, or bake the plan"
        )
    args = get_server_args()
    reasons = {
        "CUDA graphs, which replay without hooks (--disable-prefill-cuda-graph --disable-decode-cuda-graph)": not cuda_graph_fully_disabled(),
        "torch.compile (--enable-torch-compile)": bool(args.enable_torch_compile),
        "placed experts, whose ids are no longer the router's (--enable-eplb, --ep-num-redundant-experts, --init-expert-location)": (
            bool(args.enable_eplb) or bool(args.ep_num_redundant_experts) or args.init_expert_location != "trivial"
        ),
        "speculative decoding (--speculative-algorithm)": args.speculative_algorithm is not None,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(f"gains cannot be served with {'; nor with '.join(found)}: leave it out, or bake the plan")
