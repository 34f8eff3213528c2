"""vLLM's layer of experts and its routers, those for GPUs too, on a CPU under expert parallelism and its load balancer (EPLB): plans
are bound as in a server, and every token is compared with float64, also after experts have moved.

Not vLLM's own are the top-k kernels of two routers, written here in torch, and what ``cpu_parallel`` adds. The kernel that maps the
model's experts to their replicas is vLLM's, in Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import interpreted  # noqa: F401 - before vLLM is imported

# isort: split
import numpy as np
import pytest
import torch
import triton
import vllm.platforms
import vllm.triton_utils
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.distributed.eplb.eplb_state import EplbLayerState, EplbState, compute_logical_maps
from vllm.distributed.eplb.policy import EPLB_POLICIES
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import cpu_prepack_moe_weight
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.router import base_router
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter

import cpu_parallel  # noqa: F401
import fake_routers
from moe_steer import ExpertGain, SteeringPlan
from moe_steer_vllm.binding import bind
from moe_steer_vllm.following import Step

TOKENS, EXPERTS, REPLICAS, WIDTH, INNER = 60, 8, 4, 64, 32
BIASED = {"scoring_func": "sigmoid", "e_score_correction_bias": fake_routers.BIAS_E}
GROUPED = {**BIASED, "num_expert_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
ROUTERS: dict[str, tuple[Callable[..., Any], Any]] = {
    "softmax": (FusedTopKRouter, fake_routers.ROUTERS["softmax"]()),
    "sigmoid and bias": (
        lambda **sizes: FusedTopKBiasRouter(**sizes, **BIASED, routed_scaling_factor=1.5),
        fake_routers.ROUTERS["sigmoid and bias"](),
    ),
    "groups and bias": (
        lambda **sizes: GroupedTopKRouter(**sizes, **GROUPED),
        fake_routers.ROUTERS["groups and bias"](),
    ),
    "on a CPU": (
        lambda **sizes: CPURouter(**sizes, **GROUPED, use_grouped_topk=True),
        fake_routers.ROUTERS["on a CPU"](),
    ),
}
PLANS = {
    "gains": SteeringPlan(experts=[ExpertGain(0, 1, 4.0), ExpertGain(0, 2, 0.5), ExpertGain(0, 6, 3.0)]),
    "choice": SteeringPlan(
        experts=[ExpertGain(0, 7, 5.0, force="in"), ExpertGain(0, 5, force="out"), ExpertGain(0, 3, logit_bias=1.5)],
        renormalize=True,
        model={"model_type": "tiny", "num_layers": 1, "num_experts": EXPERTS},
    ),
}
ASKED = [None, "gains", "choice"]
DRAW = torch.Generator().manual_seed(7)
HIDDEN_TD, LOGITS_TE = torch.randn(TOKENS, WIDTH, generator=DRAW), torch.randn(TOKENS, EXPERTS, generator=DRAW)
UP_EID = torch.randn(EXPERTS, 2 * INNER, WIDTH, generator=DRAW) / 8
DOWN_EDI = torch.randn(EXPERTS, WIDTH, INNER, generator=DRAW) / 8


def top_k(score: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    """In place of a CUDA kernel, which writes each token's weights and ids to its first two arguments."""

    def kernel(weights: Any, ids: Any, _: Any, logits: Any, again: bool, bias: Any = None, factor: float = 1.0, **__: Any) -> None:  # fmt: skip
        scores_TE = score(logits.double())
        ids.copy_((scores_TE if bias is None else scores_TE + bias).topk(ids.shape[1]).indices)
        found_TK = scores_TE.gather(1, ids.long())
        weights.copy_(factor * (found_TK / found_TK.sum(-1, keepdim=True) if again else found_TK))

    return kernel


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What runs on a GPU alone, made to run here."""
    monkeypatch.setattr("vllm._custom_ops.topk_softmax", top_k(lambda logits: logits.softmax(-1)))
    monkeypatch.setattr("vllm._custom_ops.topk_sigmoid", top_k(torch.sigmoid))
    with pytest.MonkeyPatch.context() as there:
        there.setattr(vllm.platforms, "current_platform", SimpleNamespace(is_cuda_alike=lambda: True))
        there.setattr(vllm.triton_utils, "triton", triton)
        there.setattr(vllm.triton_utils, "tl", triton.language)
        spec = importlib.util.spec_from_file_location("router_of_a_gpu", base_router.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    monkeypatch.setattr(base_router, "eplb_map_to_physical_and_record", module.eplb_map_to_physical_and_record)
    return monkeypatch


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmConfig]:
    """Of one process, which plays all ranks in turn."""
    found = VllmConfig()
    with set_current_vllm_config(found):
        store = tmp_path_factory.mktemp("ranks") / "store"
        init_distributed_environment(1, 0, f"file://{store}", 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        found.parallel_config.enable_expert_parallel = True
        yield found


class Rank:
    """A model of one layer on one of several ranks, bound to the plans."""

    def __init__(self, kind: str, rank: int, ranks: int, replicas: int, config: Any, folder: Path, gpu: Any) -> None:
        self.config, sizes = config, {"top_k": 2, "global_num_experts": EXPERTS + replicas}
        self.eplb = EplbLayerState() if replicas else None
        config.parallel_config.enable_eplb = bool(replicas)
        config.compilation_config.static_forward_context.clear()
        gpu.setattr("vllm.model_executor.layers.fused_moe.config.get_tensor_model_parallel_rank", lambda: rank)
        self.runner = FusedMoEFactory(
            num_experts=EXPERTS, top_k=2, hidden_size=WIDTH, intermediate_size=INNER, params_dtype=torch.float32,
            tp_size=ranks, enable_eplb=bool(replicas), num_redundant_experts=replicas, prefix="model.layers.0.mlp.experts",
            router=ROUTERS[kind][0](**sizes, eplb_state=self.eplb),
        )  # fmt: skip
        self.static = dict(config.compilation_config.static_forward_context)
        experts = self.runner.routed_experts
        experts.quant_method.process_weights_after_loading(experts)
        map_E = self.runner.expert_map
        self.places = [e for e in range(EXPERTS + replicas) if map_E is None or map_E[e] >= 0]
        self.following = bind(self.model(), self.bound(folder), "cpu")

    def model(self) -> nn.Module:
        layer = nn.Module()
        layer.experts = self.runner
        model = nn.Module()
        model.layers = nn.ModuleList([layer])
        return model

    def bound(self, folder: Path) -> Any:
        """What ``bind`` reads of an engine's configuration."""
        for name, plan in PLANS.items():
            plan.save(folder / f"{name}.json")
        hf = SimpleNamespace(model_type="tiny", num_hidden_layers=1, hidden_size=WIDTH)
        return SimpleNamespace(
            additional_config={"moe_steer": {"plans": {name: str(folder / f"{name}.json") for name in PLANS}}},
            model_config=SimpleNamespace(
                hf_config=hf, hf_text_config=hf, runner_type="generate", dtype=torch.float32, enforce_eager=False
            ),
            parallel_config=self.config.parallel_config,
            scheduler_config=self.config.scheduler_config,
            compilation_config=self.config.compilation_config,
            speculative_config=None,
            kv_transfer_config=None,
        )

    def place(self, model_of_P: Tensor) -> None:
        """Let each place hold the expert of the model that a load balancer has put there."""
        here = model_of_P[self.places]
        for name, whole in (("w13_weight", UP_EID), ("w2_weight", DOWN_EDI)):
            getattr(self.runner.routed_experts, name).data.copy_(cpu_prepack_moe_weight(whole, "vec")[here])
        if self.eplb is not None:
            places, counts = compute_logical_maps(model_of_P[None], EXPERTS)
            self.loads = torch.zeros(1, len(model_of_P), dtype=torch.int32)
            self.runner.set_eplb_state(0, self.loads, places, counts)
            self.eplb.should_record_tensor = torch.tensor(True)
            self.eplb.num_unpadded_tokens_tensors = [torch.tensor(TOKENS, dtype=torch.int32)]

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights and ids [T, K] as the experts' kernel has them, and this rank's output [T, D]: a third of the tokens each."""
        n = TOKENS // len(ASKED)
        for number, asked in enumerate(ASKED):
            self.following.come(f"cmpl-{number}-0-01234567", asked and {"moe_steer": asked})
        counts = np.full(len(ASKED), n)
        names = [f"cmpl-{number}-0-01234567" for number in range(len(ASKED))]
        self.following.step(Step(names, counts, 0 * counts, counts, lambda r, length: None), lambda: None)
        self.config.compilation_config.static_forward_context = self.static
        experts, seen = self.runner.routed_experts, []
        kernel = type(experts).forward_modular
        experts.forward_modular = lambda **given: (seen.append(given), kernel(experts, **given))[1]
        with set_forward_context(None, self.config):
            output_TD = self.runner(HIDDEN_TD.clone(), LOGITS_TE.clone())
        self.following.go(names)
        return seen[0]["topk_weights"], seen[0]["topk_ids"], output_TD


def by_hand(kind: str) -> tuple[list[dict[int, float]], Tensor]:
    """Of each token the model's experts with their weights, and the output [T, D], in float64."""
    found, output_TD = [], torch.zeros(TOKENS, WIDTH, dtype=torch.float64)
    for t in range(TOKENS):
        asked = ASKED[t * len(ASKED) // TOKENS]
        logits_E = LOGITS_TE[t].double().numpy().copy()
        found.append(fake_routers.by_hand(ROUTERS[kind][1], PLANS[asked] if asked else None, 0, logits_E))
        for expert, weight in found[-1].items():
            gate_I, up_I = (UP_EID[expert].double() @ HIDDEN_TD[t].double()).chunk(2)
            output_TD[t] += weight * (DOWN_EDI[expert].double() @ (nn.functional.silu(gate_I) * up_I))
    return found, output_TD


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize(("ranks", "replicas"), [(1, 0), (2, 0), (2, REPLICAS)])
def test_plans_are_of_the_models_experts_wherever_these_lie(
    kind: str, ranks: int, replicas: int, config: Any, tmp_path: Path, gpu: pytest.MonkeyPatch
) -> None:
    ranked = [Rank(kind, rank, ranks, replicas, config, tmp_path, gpu) for rank in range(ranks)]
    assert sorted(place for rank in ranked for place in rank.places) == list(range(EXPERTS + replicas))
    expected, expected_TD = by_hand(kind)
    model_of_P = torch.tensor(EplbState.build_initial_global_physical_to_logical_map(EXPERTS, replicas))
    for moved in range(3 if replicas else 1):
        for rank in ranked:
            rank.place(model_of_P)
        found = [rank.run() for rank in ranked]
        for weights_TK, ids_TK, _ in found:
            for t in range(TOKENS):
                pairs = dict(zip(model_of_P[ids_TK[t].long()].tolist(), weights_TK[t].tolist(), strict=True))
                assert pairs == pytest.approx(expected[t], rel=1e-5, abs=1e-7), t
            assert len(torch.unique(ids_TK)) > EXPERTS - (replicas == 0), "also the second place of an expert"
        assert torch.allclose(sum(output_TD for *_, output_TD in found).double(), expected_TD, atol=1e-5)
        hits = [sum(entry.expert in chosen for chosen in expected[TOKENS // 3 : 2 * TOKENS // 3]) for entry in PLANS["gains"].experts]  # fmt: skip
        assert min(hits) > 0
        for rank in ranked:
            assert rank.following.status()["gains"]["hits"] == [number * (moved + 1) for number in hits]
        if replicas:
            before, loads = model_of_P, torch.zeros(1, EXPERTS, dtype=torch.int64)
            loads[0].scatter_add_(0, model_of_P, ranked[0].loads[0].long())
            assert loads.sum() == 2 * TOKENS, "vLLM's own count of the load"
            [model_of_P] = EPLB_POLICIES["default"].rebalance_experts(
                loads, EXPERTS + replicas, 1, 1, ranks, before[None]
            )
            model_of_P = model_of_P if not torch.equal(model_of_P, before) else before.flip(0)
