"""How well an SAE fits the very tokens that a contrast is measured on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expert_stats.contrast_sequences import MarkedSequence, batches, padded, tokens_of_a_forward
from moe_steer.backends.layout import layout_of
from moe_steer.layers import decoder, unwrap
from moe_steer.observe import observe_residual

if TYPE_CHECKING:
    from moe_steer.saes import SAE, SAEFit


def measure_contrast_fit(
    model: Any,
    sequences: Sequence[MarkedSequence],
    layer: int,
    sae: SAE,
    *,
    max_tokens: int = 4096,
    batch_tokens: int | None = None,
) -> SAEFit:
    """``measure_fit`` over the marked tokens of the first sequences at one layer, about ``max_tokens`` of them.

    ValueError for an SAE that belongs elsewhere.
    """
    from moe_steer.saes import check_fits, measure_fit

    check_fits(sae, model, layer)
    chosen, number = [], 0
    for item in sequences:
        if number < max_tokens:
            chosen.append(item)
            number += len(item.positive) + len(item.negative)
    return measure_fit(sae, _marked_tokens(model, chosen, layer, batch_tokens))


def _marked_tokens(
    model: Any, sequences: Sequence[MarkedSequence], layer: int, batch_tokens: int | None
) -> Iterator[Tensor]:
    body = decoder(model)
    device = unwrap(model).get_input_embeddings().weight.device
    seen: list[Tensor] = []
    for batch in batches(sequences, tokens_of_a_forward(batch_tokens, device)):
        with (
            torch.no_grad(),
            observe_residual(
                model, [layer], lambda _, hidden_BSD: seen.append(hidden_BSD), stop=not layout_of(model).in_step
            ),
        ):
            body(**padded(batch, device), use_cache=False)
        places = [(row, place) for row, item in enumerate(batch) for place in (*item.positive, *item.negative)]
        row_T, place_T = torch.tensor(places, device=seen[-1].device).T
        yield seen.pop()[row_T, place_T]
