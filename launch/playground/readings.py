"""What is read of every token while it is generated: entropy, experts with their weights, projections, whether the plan acted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_steer import observe_residual, observe_routing
from moe_steer.entries.audit import Audit
from moe_steer.layers import ModelShape

Array = np.ndarray[Any, Any]
TOP = 8
"""Experts of a token that the page lists, by weight, over all layers."""


class Stopped(Exception):
    """The user has ended the run."""


class Seen(NamedTuple):
    """What the forward that processed a token showed. ``ids_LK``, ``weights_LK``: the routers' choices and final weights (gain
    included), one row a layer with experts; ``projections_NL``: the residual stream after every layer along each direction."""

    ids_LK: Array
    weights_LK: Array
    projections_NL: Array
    steered: bool


def colour_of(text: object, shape: ModelShape | None, directions: Sequence[str]) -> tuple[str, ...]:
    """What tokens are coloured by: ``steered``, ``entropy``, ``expert:LAYER:NUMBER`` or ``projection:LAYER:DIRECTION``. ValueError, in one
    line, for another word, and for what this model does not show. ``shape``: None where a server holds the model."""
    kind, _, rest = str(text).partition(":")
    if kind not in ("steered", "entropy", "expert", "projection"):
        raise ValueError(f"the colour {str(text)[:60]!r} is unknown: choose steered, entropy, expert or projection")
    if shape is None:
        raise ValueError(
            f"a server sends text, and not what its model does inside: colouring by {kind} needs the model here, start without --endpoint"
        )
    if kind in ("steered", "entropy"):
        return (kind,)
    layer, _, name = rest.partition(":")
    if kind == "expert":
        if not shape.moe_layers:
            raise ValueError(f"{shape.model_type} is a dense model without experts: choose another colour")
        if not (layer.isdecimal() and int(layer) in shape.moe_layers):
            raise ValueError(
                f"layer {layer[:12]!r} has no experts: choose one of {', '.join(map(str, shape.moe_layers))}"
            )
        if not (name.isdecimal() and int(name) < shape.num_experts):
            raise ValueError(f"expert {name[:12]!r} does not exist: this model has experts 0-{shape.num_experts - 1}")
    else:
        if name not in directions:
            raise ValueError(
                f"the direction {name[:60]!r} is not open here: start the playground with --direction FILE"
            )
        if not (layer.isdecimal() and int(layer) < shape.num_layers):
            raise ValueError(f"layer {layer[:12]!r} does not exist: this model has layers 0-{shape.num_layers - 1}")
    return (kind, layer, name)


def number_of(value: Any) -> float | None:
    """A reading as JSON has it; None for what is no number, as a gain beyond all measure makes."""
    return round(float(value), 4) if math.isfinite(value) else None


class Readings:
    """The tokens of one answer, as they are made. Lists only grow, so that another thread may read what is there.

    ``seen[i]`` belongs to ``token_ids[i]`` and is there one step later: a token is processed when the next one is drawn, and the
    last one never.
    """

    def __init__(self, shape: ModelShape, directions: Mapping[str, Tensor]) -> None:
        self.token_ids: list[int] = []
        self.entropies: list[float] = []
        """Nats: of the model's own distribution of each token, before temperature and rules."""
        self.seen: list[Seen] = []
        self.stop = False
        self._shape = shape
        self._names = list(directions)
        self._unit_ND = [
            vector_D.double() / max(float(vector_D.double().norm()), 1e-30) for vector_D in directions.values()
        ]
        self._audit: Audit | None = None
        self._acted = 0
        self._prompt_length = 0
        self._routed: dict[int, tuple[Tensor, Tensor]] = {}
        self._projected: dict[int, Tensor] = {}
        self._device_ND: Tensor | None = None

    def __call__(self, ids_BT: Tensor, logits_BV: Tensor) -> Tensor:
        """Called as the first rule of decoding, with one row: logits stay as they are."""
        if self.stop:
            raise Stopped
        if not self._prompt_length:
            self._prompt_length = ids_BT.shape[1]
            self._acts()  # what the prompt made fire is not the first token's
        else:
            self.token_ids.append(int(ids_BT[0, -1]))
            self.seen.append(self._of_this_forward())
        logs_V = logits_BV[0].float().log_softmax(-1)
        self.entropies.append(float(-(logs_V.exp() * logs_V.clamp(min=-1e4)).sum()))
        return logits_BV

    @contextmanager
    def watching(self, model: Any, audit: Audit) -> Iterator[None]:
        """Inside ``steer``: read every forward of the model."""
        self._audit = audit
        with ExitStack() as stack:
            if self._shape.moe_layers:
                stack.enter_context(observe_routing(model, self._take_routing))
            if self._names:
                stack.enter_context(observe_residual(model, range(self._shape.num_layers), self._take_residual))
            yield

    def finish(self, token_ids: Sequence[int]) -> None:
        """The answer is complete: its last token was drawn and never processed."""
        self.token_ids += token_ids[len(self.token_ids) :]

    def values(self, start: int, colour: Sequence[str]) -> list[float | None]:
        """The reading that tokens are coloured by, from token ``start`` on; None where there is none."""
        number = len(self.token_ids)
        if colour[0] == "entropy":
            return [number_of(value) for value in self.entropies[start:number]]
        found = [number_of(self._value(seen, colour)) for seen in self.seen[start:number]]
        return [*found, *[None] * (number - start - len(found))]

    def _value(self, seen: Seen, colour: Sequence[str]) -> float:
        if colour[0] == "steered":
            return float(seen.steered)
        layer, name = int(colour[1]), colour[2]
        if colour[0] == "projection":
            return float(seen.projections_NL[self._names.index(name), layer])
        row = self._shape.moe_layers.index(layer)
        return float(seen.weights_LK[row][seen.ids_LK[row] == int(name)].sum())

    def experts(self, index: int) -> list[list[float | None]]:
        """[layer, expert, weight] of the experts of a token with the largest weights."""
        if index >= len(self.seen) or not self._shape.moe_layers:
            return []
        ids_LK, weights_LK = self.seen[index].ids_LK, self.seen[index].weights_LK
        order = np.argsort(-weights_LK, axis=None, kind="stable")[:TOP]
        rows, places = np.unravel_index(order, weights_LK.shape)
        return [
            [self._shape.moe_layers[row], int(ids_LK[row, k]), number_of(weights_LK[row, k])]
            for row, k in zip(rows.tolist(), places.tolist(), strict=True)
            if ids_LK[row, k] < self._shape.num_experts
        ]

    def _acts(self) -> bool:
        """Whether the plan acted since the last call."""
        acted = sum(row["tokens"] for row in self._audit.to_rows()) if self._audit else 0
        before, self._acted = self._acted, acted
        return acted > before

    def _of_this_forward(self) -> Seen:
        layers = [layer for layer in self._shape.moe_layers if layer in self._routed]
        width = max((len(self._routed[layer][0]) for layer in layers), default=0)
        ids_LK = np.full((len(self._shape.moe_layers), width), self._shape.num_experts, np.int32)
        weights_LK = np.zeros(ids_LK.shape, np.float32)
        for row, layer in enumerate(self._shape.moe_layers):
            if layer in self._routed:
                ids_K, weights_K = self._routed[layer]
                ids_LK[row, : len(ids_K)], weights_LK[row, : len(ids_K)] = ids_K.cpu().numpy(), weights_K.cpu().numpy()
        projections_NL = np.full((len(self._names), self._shape.num_layers), math.nan, np.float32)
        for layer, values_N in self._projected.items():
            projections_NL[:, layer] = values_N.cpu().numpy()
        return Seen(ids_LK, weights_LK, projections_NL, self._acts())

    def _take_routing(self, layer: int, ids_TK: Tensor, weights_TK: Tensor) -> None:
        self._routed[layer] = (ids_TK[-1], weights_TK[-1])

    def _take_residual(self, layer: int, hidden_BSD: Tensor) -> None:
        last_D = (
            hidden_BSD[0, -1].reshape(-1, len(self._unit_ND[0])).double().mean(0)
        )  # several streams a token: their mean
        if self._device_ND is None or self._device_ND.device != last_D.device:
            self._device_ND = torch.stack(self._unit_ND).to(last_D.device)
        self._projected[layer] = self._device_ND @ last_D
