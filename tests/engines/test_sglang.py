"""The hook for SGLang on stand-ins of what its TopK returns (its source was read, it was not run), and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from moe_steer import ExpertGain, ResidualVector, SteeringPlan
from moe_steer_sglang import VERSION, gains, hook

WEIGHTS, IDS = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.5, 0.5]]), torch.tensor([[3, 1], [9, 3], [-1, 17]])


class StandardTopKOutput(NamedTuple):
    topk_weights: Tensor
    topk_ids: Tensor
    router_logits: Tensor


class BypassedTopKOutput(NamedTuple):
    hidden_states: Tensor
    raw_router_logits: Tensor


class TopK(nn.Module):
    def __init__(self, layer_id: int) -> None:
        super().__init__()
        self.layer_id = layer_id

    def forward(self, output: Any) -> Any:
        return output


def through(layer: int, output: Any, **options: Any) -> Any:
    module = TopK(layer)
    module.register_forward_hook(hook({3: {3: 4.0, 9: 0.0}}, **options))
    return module(output)


def test_gains_reach_the_weights_of_their_layer_alone(caplog: pytest.LogCaptureFixture) -> None:
    output = StandardTopKOutput(WEIGHTS, IDS, torch.zeros(3, 10))
    steered = through(3, output)
    assert torch.allclose(steered.topk_weights, torch.tensor([[2.4, 0.4], [0.0, 1.2], [0.5, 0.5]]))
    assert steered.topk_ids is output.topk_ids
    assert caplog.messages == ["moe-steer: gains act in layer 3"]
    assert through(2, output) is output
    assert torch.allclose(through(3, output, renormalize=True).topk_weights.sum(-1), torch.ones(3))


def test_a_kernel_that_routes_by_itself_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="layer 3: BypassedTopKOutput holds no weights that can be changed"):
        through(3, BypassedTopKOutput(torch.zeros(3, 4), torch.zeros(3, 10)))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """SGLang's own settings, as the hook reads them."""
    args = SimpleNamespace(
        enable_torch_compile=False, enable_eplb=False, ep_num_redundant_experts=0, init_expert_location="trivial",
        speculative_algorithm=None, graphs=False, version=VERSION,
    )  # fmt: skip
    modules = {name: ModuleType(name) for name in ("sglang", "sglang.srt", "sglang.srt.model_executor")}
    graphs, context = "sglang.srt.model_executor.cuda_graph_config", "sglang.srt.runtime_context"
    modules |= {name: ModuleType(name) for name in (graphs, context)}
    modules["sglang"].__getattr__ = lambda name: args.version  # type: ignore[method-assign]
    modules[graphs].cuda_graph_fully_disabled = lambda: not args.graphs  # type: ignore[attr-defined]
    modules[context].get_server_args = lambda: args  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return args


def plan_file(folder: Path, **parts: Any) -> dict[str, str]:
    SteeringPlan(**parts).save(folder / "plan.json")
    return {"plan": str(folder / "plan.json")}


def test_the_factory_reads_a_plan(server: SimpleNamespace, tmp_path: Path) -> None:
    steered = gains(plan_file(tmp_path, experts=[ExpertGain(3, 3, 4.0)]))
    output = steered(TopK(3), (), StandardTopKOutput(WEIGHTS, IDS, torch.zeros(3, 10)))
    assert torch.allclose(output.topk_weights[0], torch.tensor([2.4, 0.4]))


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("graphs", True, "CUDA graphs, which replay without hooks"),
        ("enable_torch_compile", True, "torch.compile"),
        ("enable_eplb", True, "placed experts"),
        ("init_expert_location", "some.json", "placed experts"),
        ("ep_num_redundant_experts", 2, "placed experts"),
        ("speculative_algorithm", "EAGLE", "speculative decoding"),
        ("version", "0.5.24", "written for SGLang 0.5.23, and this is 0.5.24"),
    ],
)  # fmt: skip
def test_a_server_that_would_lose_the_plan_is_refused_by_name(
    server: SimpleNamespace, tmp_path: Path, setting: str, value: Any, message: str
) -> None:
    setattr(server, setting, value)
    with pytest.raises(ValueError, match=message):
        gains(plan_file(tmp_path, experts=[ExpertGain(3, 3, 4.0)]))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"residual": [ResidualVector(1, vector=torch.ones(4))]}, "holds more than gains in scope all"),
        ({"experts": [ExpertGain(3, 3, force="in")]}, "holds more than gains in scope all"),
        ({"experts": [ExpertGain(3, 3, 2.0)], "scope": "thought"}, "holds more than gains in scope all"),
        ({}, "changes nothing"),
    ],
)  # fmt: skip
def test_what_the_hook_cannot_do_is_refused(
    server: SimpleNamespace, tmp_path: Path, parts: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gains(plan_file(tmp_path, **parts))
    with pytest.raises(ValueError, match="config of the hook is"):
        gains({"plans": "plan.json"})
