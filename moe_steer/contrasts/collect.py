"""Marked sequences through a model: the two sides of a contrast at any number of layers in one pass, and how well SAEs fit the
tokens that the contrast is measured on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_steer.backends import layout_of
from moe_steer.contrasts.rows import Marks, Row, arguments, can_share, marks, packed
from moe_steer.contrasts.sequences import (
    MarkedSequence,
    batches,
    check_sequences,
    padded,
    tokens_of_a_forward,
    whole_pairs,
)
from moe_steer.directions.methods import HASH_MODULUS, Contrast, describe_sae
from moe_steer.directions.moments import Accumulator, PairMoments
from moe_steer.layers import decoder, evaluating, model_shape, unwrap
from moe_steer.observe import observe_residual

if TYPE_CHECKING:
    from moe_steer.saes import SAE, SAEFit

__all__ = ["MarkedSequence", "collect_contrast", "data_digest"]


def collect_contrast(
    model: Any,
    sequences: Sequence[MarkedSequence],
    layers: Sequence[int],
    *,
    saes: Mapping[int, SAE] | None = None,
    weight: str = "sample",
    batch_tokens: int | None = None,
    second_moments: bool = False,
    notes: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, Contrast]:
    """Layer -> the statistics of the positive and of the negative positions of the sequences at its output.

    One pass for all layers: rows are right-padded, without gradients, and no layer above the highest one runs (except under
    backends whose ranks must run whole forwards together). The common prompt of a pair is computed once if the model allows
    it (see ``can_share``). Works on dense and mixture-of-experts models. ``saes``: also measure the atoms of these layers,
    over the marked tokens alone and chunk by chunk; memory grows with the number of atoms, never with the number of
    samples. ``weight``: "sample" counts every sequence's side once, "token" every token. ``batch_tokens``: of one forward,
    padding included; default ``tokens_of_a_forward``. ``second_moments``: also what ``pca`` needs, D x D numbers a side.
    ``notes``: goes into the header of every direction. ``progress(done, of)``: after every batch, in sequences. The result
    depends on the batches only by rounding.

    Pairs with an empty side are skipped with a warning. ValueError, before anything runs, for no sequences, a
    name that occurs twice, tokens that do not fit the model, layers that do not exist, and an SAE of another place; and for families whose layers do not return one residual stream (DeepSeek-V4's hyper-connections).
    """
    saes = dict(saes or {})
    sequences = list(sequences)
    shape = model_shape(model)
    _check(model, shape, sequences, layers, saes)
    kept, num_left_out = whole_pairs(sequences)
    if num_left_out:
        warnings.warn(f"{num_left_out} pairs are left out: one of their sides holds no tokens", stacklevel=2)
    pairing = second_moments and any(item.pair is not None for item in kept)
    rows = packed(kept)
    if any(row.saved for row in rows) and not can_share(model, rows, max(layers)):
        rows = [Row((item,)) for item in kept]
    inner, body = unwrap(model), decoder(model)
    embeddings = inner.get_input_embeddings().weight
    todo = list(batches(rows, tokens_of_a_forward(batch_tokens, embeddings.device), keep_pairs=pairing))
    if not todo:
        raise ValueError("no sequence marks a position: there is nothing to contrast")
    sums = {
        layer: _LayerSums(shape.hidden_size, weight, saes.get(layer), second_moments, pairing) for layer in set(layers)
    }
    stop = not layout_of(model).lockstep  # ranks in lockstep expect whole forwards of each other
    done = 0
    with torch.no_grad(), evaluating(inner):
        for batch in todo:
            with observe_residual(model, sorted(sums), _sink(sums, batch, shape.hidden_size), stop=stop):
                body(**arguments(batch, embeddings.device, embeddings.dtype), use_cache=False)
            done += sum(len(row.members) for row in batch)
            if progress is not None:
                progress(done, sum(len(row.members) for batch in todo for row in batch))
    data = data_digest(kept)
    return {
        layer: Contrast(
            layer=layer,
            positive=one.sides[0].moments(),
            negative=one.sides[1].moments(),
            model=shape.to_dict(),
            sae=describe_sae(saes[layer]) if layer in saes else None,
            data=data,
            num_left_out=num_left_out,
            pairs=one.pair_moments(),
            notes=dict(notes or {}),
        )
        for layer, one in sorted(sums.items())
    }


def data_digest(sequences: Sequence[MarkedSequence]) -> int:
    """``Contrast.data`` of these sequences; pairs with an empty side do not count."""
    return sum(item.digest() for item in whole_pairs(sequences)[0]) % HASH_MODULUS


class _LayerSums:
    """Both sides at one layer, and, for pairs, the second moment of their differences."""

    def __init__(self, width: int, weight: str, sae: SAE | None, second: bool, pairing: bool) -> None:
        self.sides = [Accumulator(width, weight=weight, sae=sae, second=second) for _ in range(2)]
        self._second_DD = torch.zeros(width, width, dtype=torch.float64) if pairing else None
        self._waiting: dict[str, tuple[int, Tensor]] = {}
        self._num_pairs = 0

    def add(self, hidden_BSD: Tensor, sides: Sequence[Marks]) -> None:
        """Add the marked tokens of one forward, positive and negative."""
        for side, found in enumerate(sides):
            if not found.members:
                continue
            x_TD = hidden_BSD[found.row_T.to(hidden_BSD.device), found.slot_T.to(hidden_BSD.device)]
            means_ND = self.sides[side].add(x_TD, found.sizes)
            if self._second_DD is not None:
                for item, mean_D in zip(found.members, means_ND.cpu(), strict=True):
                    self._meet(item.pair, side, mean_D)

    def _meet(self, pair: str | None, side: int, mean_D: Tensor) -> None:
        """The two sequences of a pair are neighbours, so only the means of a batch or two wait for their partner."""
        if pair is None or self._second_DD is None:
            return
        if pair not in self._waiting:
            self._waiting[pair] = (side, mean_D)
            return
        other_side, other_D = self._waiting.pop(pair)
        if other_side == side:
            raise ValueError(f"pair {pair!r} has two sequences of one side: second moments need one of each")
        self._second_DD.addr_(mean_D - other_D, mean_D - other_D)  # the sign does not matter here
        self._num_pairs += 1

    def pair_moments(self) -> PairMoments | None:
        """None unless requested."""
        if self._second_DD is None:
            return None
        return PairMoments(num_pairs=self._num_pairs, second_DD=self._second_DD)


def _sink(sums: Mapping[int, _LayerSums], batch: Sequence[Row], width: int) -> Callable[[int, Tensor], None]:
    sides = [marks(batch, side) for side in ("positive", "negative")]

    def sink(layer: int, hidden_BSD: Tensor) -> None:
        if hidden_BSD.ndim != 3 or hidden_BSD.shape[-1] != width:
            raise ValueError(
                f"layer {layer} returns {list(hidden_BSD.shape)} and not [rows, tokens, {width}]: this family has no single residual stream to take a direction from"
            )
        sums[layer].add(hidden_BSD, sides)

    return sink


def _check(
    model: Any, shape: Any, sequences: Sequence[MarkedSequence], layers: Sequence[int], saes: Mapping[int, SAE]
) -> None:
    from moe_steer.saes import check_fits

    if not sequences:
        raise ValueError(
            "there are no sequences: make some with answer_pairs, thought_pairs, prompt_pairs or decision_sites"
        )
    for layer in layers:
        if not 0 <= layer < shape.num_layers:
            raise ValueError(f"layer {layer} does not exist: this model has layers 0-{shape.num_layers - 1}")
    if not layers or not set(saes) <= set(layers):
        raise ValueError(
            f"layers are {list(layers)} and SAEs are given for {sorted(saes)}: name the layers of the SAEs as well"
        )
    for layer, sae in saes.items():
        check_fits(sae, shape, layer)
    check_sequences(model, sequences)


def contrast_fits(
    model: Any, sequences: Sequence[MarkedSequence], saes: Mapping[int, SAE], *, batch_tokens: int | None = None
) -> dict[int, SAEFit]:
    """Layer -> fit of its SAE, as ``measure_contrast_fit`` measures it. ValueError for an SAE that explains nothing."""
    from moe_steer.saes import refuse_unexplained

    fits = {}
    for layer, sae in saes.items():
        fits[layer] = measure_contrast_fit(model, sequences, layer, sae, batch_tokens=batch_tokens)
        refuse_unexplained(fits[layer], layer)
    return fits


def fit_notes(fits: Mapping[int, SAEFit]) -> dict[str, Any]:
    """The SAEs' fit for a direction's header: sae_fit_LAYER."""
    return {f"sae_fit_{layer}": fit.to_dict() for layer, fit in fits.items()}


_FIT_TOKENS = 4096


def measure_contrast_fit(
    model: Any,
    sequences: Sequence[MarkedSequence],
    layer: int,
    sae: SAE,
    *,
    batch_tokens: int | None = None,
) -> SAEFit:
    """``measure_fit`` over the marked tokens of the first sequences at one layer, about 4,096 of them.

    ValueError for an SAE of another layer or width.
    """
    from moe_steer.saes import check_fits, measure_fit

    check_fits(sae, model, layer)
    chosen, number = [], 0
    for item in sequences:
        if number < _FIT_TOKENS:
            chosen.append(item)
            number += len(item.positive) + len(item.negative)
    return measure_fit(sae, _marked_tokens(model, chosen, layer, batch_tokens))


def marked_states(
    model: Any, sequences: Sequence[MarkedSequence], layers: Sequence[int], batch_tokens: int | None = None
) -> Iterator[tuple[list[MarkedSequence], dict[int, Tensor]]]:
    """Batch after batch, the longest sequences first: its sequences, and layer -> the residual stream [T, D] at their marked tokens,
    one sequence behind the other, of each the positive ones before the negative ones."""
    body = decoder(model)
    device = unwrap(model).get_input_embeddings().weight.device
    for batch in batches(sequences, tokens_of_a_forward(batch_tokens, device)):
        places = [(row, place) for row, item in enumerate(batch) for place in (*item.positive, *item.negative)]
        row_T, place_T = torch.tensor(places).T
        found: dict[int, Tensor] = {}

        def take(layer: int, hidden_BSD: Tensor, at: tuple[Tensor, Tensor] = (row_T, place_T), to: Any = found) -> None:
            to[layer] = hidden_BSD[at[0].to(hidden_BSD.device), at[1].to(hidden_BSD.device)]

        with torch.no_grad(), observe_residual(model, layers, take, stop=not layout_of(model).lockstep):
            body(**padded(batch, device), use_cache=False)
        yield batch, found


def _marked_tokens(
    model: Any, sequences: Sequence[MarkedSequence], layer: int, batch_tokens: int | None
) -> Iterator[Tensor]:
    for _, found in marked_states(model, sequences, [layer], batch_tokens):
        yield found[layer]
