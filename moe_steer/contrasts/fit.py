"""How well an SAE fits the very tokens that a contrast is measured on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_steer.backends.layout import layout_of
from moe_steer.contrasts.sequences import MarkedSequence, batches, padded, tokens_of_a_forward
from moe_steer.layers import decoder, unwrap
from moe_steer.observe import observe_residual

if TYPE_CHECKING:
    from moe_steer.saes import SAE, SAEFit


def contrast_fits(
    model: Any, sequences: Sequence[MarkedSequence], saes: Mapping[int, SAE], *, batch_tokens: int | None = None
) -> dict[int, SAEFit]:
    """Layer -> fit of its SAE, as ``measure_contrast_fit`` measures it. ValueError for one that explains nothing."""
    from moe_steer.saes.fit import refuse_unexplained

    fits = {}
    for layer, sae in saes.items():
        fits[layer] = measure_contrast_fit(model, sequences, layer, sae, batch_tokens=batch_tokens)
        refuse_unexplained(fits[layer], layer)
    return fits


def fit_notes(fits: Mapping[int, SAEFit]) -> dict[str, Any]:
    """What a direction's header says of the SAEs' fit: sae_fit_LAYER."""
    return {f"sae_fit_{layer}": fit.to_dict() for layer, fit in fits.items()}


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
