"""Load balancing without an extra loss: the router's correction bias moves towards experts that are used too little.

Rule of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): b_e += rate * sign(mean load - load_e), after every step.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch

from moe_steer.layers import model_shape, moe_layers
from moe_steer.observe import observe_routing


class LoadBalancer:
    """Watches which experts are chosen inside a `with` block; `update` then moves each router's correction bias.

    A dense model has nothing to balance: its worst load is 0.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        layers = moe_layers(model) if model_shape(model).num_experts else []
        self.routers: dict[int, Any] = {layer.index: layer.router for layer in layers}
        self._chosen_TK: dict[int, torch.Tensor] = {}
        self._watching = ExitStack()

    def __enter__(self) -> LoadBalancer:
        if self.routers:
            self._watching.enter_context(observe_routing(self._model, self._record))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watching.close()

    def _record(self, layer: int, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor) -> None:
        self._chosen_TK[layer] = topk_ids_TK

    @torch.no_grad()
    def update(self, real_mask_BS: torch.Tensor, rate: float) -> float:
        """Move the biases by `rate`; returns the largest load of the step over the mean load, over all layers."""
        worst = 0.0
        for layer, router in self.routers.items():
            chosen_NK = self._chosen_TK[layer][real_mask_BS.flatten()]
            load_E = torch.bincount(chosen_NK.flatten(), minlength=router.num_experts).float()
            router.e_score_correction_bias.add_(rate * torch.sign(load_E.mean() - load_E))
            worst = max(worst, float(load_E.max() / load_E.mean()))
        return worst
