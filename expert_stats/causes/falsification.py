"""Does an expert, or an atom of a sparse autoencoder, answer to the thought or to the token? Rates by condition, and a verdict.

Compared are the rate at the marker in thoughts with the rate at the same marker elsewhere and injected (the same token, no thought),
and with the rate at matched tokens of thoughts (the same thought, another token). Whatever holds the same token at the same rate
without a thought answers to the token, whatever fires all over a thought does not answer to its marker.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

from expert_stats.causes.over_problems import mean_and_error
from expert_stats.causes.probes import CONDITIONS, Probe, RoutingRecorder
from expert_stats.collect import batches, run_traces
from moe_steer.console import aligned
from moe_steer.contrasts.sequences import MarkedSequence, padded
from moe_steer.layers import decoder, model_shape, unwrap
from moe_steer.observe import observe_residual

Array = np.ndarray[Any, Any]
Target = tuple[str, int, int]
"""("expert" or "atom", absolute layer, number)."""
VERDICTS = {
    "token": "answers to the token: the same token without a thought fires it at least half as often",
    "thought": "answers to the thought: the token alone does less, and other tokens of a thought at least half as much",
    "both": "answers to this token in thoughts: the token alone does less, and so do other tokens of a thought",
    "neither": "does not answer to the marker: other tokens of a thought fire it at least half as often",
    "open": "nothing shown: give more traces and texts",
}
_ENOUGH = 0.5
"""A condition that reaches this share of the rate in thoughts does as well, if its interval says so."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Mean over units of the share of a condition's places at which a target fires; NaN error of one unit."""

    mean: float
    error: float
    units: int
    places: int


@dataclass(frozen=True, kw_only=True)
class Falsified:
    """One line of the table: the rates by condition (those that occur), and a key of `VERDICTS`."""

    target: Target
    rates: Mapping[str, Rate]
    verdict: str


def falsify(
    model: Any,
    probes: Sequence[Probe],
    experts: Sequence[tuple[int, int]] = (),
    atoms: Sequence[tuple[int, int]] = (),
    saes: Mapping[int, Any] | None = None,
    *,
    tokens_per_batch: int = 8192,
    progress: bool | None = False,
) -> list[Falsified]:
    """The table for experts (absolute layer, expert) and atoms (layer, atom) of ``saes`` (by layer, `moe_steer.saes.SAE`).

    An expert fires where the router selects it, an atom where it is active. ValueError for an expert, atom or layer that does not exist.
    """
    fires = _of_experts(model, probes, experts, tokens_per_batch, progress) if experts else {}
    for layer in sorted({layer for layer, _ in atoms}):
        sae, own = (saes or {}).get(layer), [atom for at, atom in atoms if at == layer]
        if sae is None or not all(0 <= atom < sae.width for atom in own):
            raise ValueError(
                f"atoms {own} of layer {layer} need an SAE of that layer which has them: give it, or other atoms"
            )
        fires |= _of_atoms(model, probes, layer, own, sae, tokens_per_batch)
    level = 0.05 / max(1, 4 * len(fires))
    found = []
    for target, fired in fires.items():
        rates = rates_of(probes, fired)
        found.append(Falsified(target=target, rates=rates, verdict=verdict_of(rates, level)))
    return found


def rates_of(probes: Sequence[Probe], fired: Sequence[Array]) -> dict[str, Rate]:
    """Condition -> rate. ``fired``: for each probe, bool by token."""
    found = {}
    for condition in CONDITIONS:
        by_unit: dict[str, list[float]] = defaultdict(list)
        for probe, at in zip(probes, fired, strict=True):
            by_unit[probe.unit] += at[list(probe.places.get(condition, ()))].astype(float).tolist()
        shares = np.array([np.mean(values) for values in by_unit.values() if values])
        if len(shares):
            mean, error = mean_and_error(shares)
            places = sum(map(len, by_unit.values()))
            found[condition] = Rate(mean=float(mean), error=float(error), units=len(shares), places=places)
    return found


def verdict_of(rates: Mapping[str, Rate], level: float) -> str:
    """A key of `VERDICTS`. ``level``: of each comparison, two-sided (Bonferroni over the table).

    "Less" means that the difference's interval lies below 0; "does as well" that at least half of the rate in thoughts is
    reached, interval included.
    """
    thought = rates["thought"]
    if thought.mean == 0:
        return "neither"
    # One condition without the thought that does as well is enough against it.
    alone = [_against(thought, rates[name], level) for name in ("injected", "elsewhere") if name in rates]
    token_alone = "equal" if "equal" in alone else "less" if alone and set(alone) == {"less"} else "open"
    others = _against(thought, rates["matched"], level) if "matched" in rates else "open"
    if others == "equal":
        return "thought" if token_alone == "less" else "neither"
    if token_alone == "equal":
        return "token"
    return "both" if token_alone == "less" and others == "less" else "open"


def _against(thought: Rate, other: Rate, level: float) -> str:
    """Whether the other condition does "less", as well ("equal"), or neither is shown."""
    units = min(thought.units, other.units)
    if units < 2:
        return "open"
    quantile = float(scipy.stats.t.ppf(1 - level / 2, units - 1))
    reach = quantile * float(np.hypot(thought.error, other.error))
    # A rate of 0 or 1 in every unit has no spread; what its units could have hidden is left by the rule of three.
    reach = max(reach, 3 / units if thought.error == 0 and other.error == 0 else 0.0)
    if other.mean - _ENOUGH * thought.mean > reach and other.mean > 0:
        return "equal"
    return "less" if thought.mean - other.mean > reach else "open"


def table_of(found: Sequence[Falsified]) -> str:
    """The table as text for a terminal, with each verdict in words."""
    names = [name for name in CONDITIONS if any(name in row.rates for row in found)]
    lines = [["", *names]]
    for row in found:
        kind, layer, number = row.target
        cells = [_cell(row.rates.get(name)) for name in names]
        lines.append([f"layer {layer} {kind} {number}", *cells])
    text = aligned(lines)
    for line, row in enumerate(found, start=1):
        text[line] += f"  {VERDICTS[row.verdict]}"
    return "\n".join(text)


def _cell(rate: Rate | None) -> str:
    if rate is None:
        return "-"
    return f"{100 * rate.mean:.1f}% +-{100 * rate.error:.1f}" if np.isfinite(rate.error) else f"{100 * rate.mean:.1f}%"


def _of_experts(
    model: Any,
    probes: Sequence[Probe],
    experts: Sequence[tuple[int, int]],
    tokens_per_batch: int,
    progress: bool | None,
) -> dict[Target, list[Array]]:
    recorder = RoutingRecorder(model_shape(model), experts)
    run_traces(model, [probe.trace for probe in probes], recorder, tokens_per_batch=tokens_per_batch, progress=progress)
    firing = recorder.finish()
    found: dict[Target, list[Array]] = {}
    for layer, expert in experts:
        rows = []
        for probe in probes:
            fired = np.zeros(len(probe.trace.token_ids), dtype=bool)
            at = firing[probe.trace.trace_id].get((layer, expert))
            if at is not None:
                fired[at.positions_N] = True
            rows.append(fired)
        found["expert", layer, expert] = rows
    return found


def _of_atoms(
    model: Any, probes: Sequence[Probe], layer: int, atoms: Sequence[int], sae: Any, tokens_per_batch: int
) -> dict[Target, list[Array]]:
    inner, body = unwrap(model), decoder(model)
    device = inner.get_input_embeddings().weight.device
    number = {probe.trace.trace_id: index for index, probe in enumerate(probes)}
    found: dict[Target, list[Array]] = {("atom", layer, atom): [np.zeros(0)] * len(probes) for atom in atoms}
    for batch in batches([probe.trace for probe in probes], tokens_per_batch):
        rows = [MarkedSequence(one.trace_id, one.token_ids, positive=(len(one.token_ids) - 1,)) for one in batch]

        def sink(_: int, hidden_BSD: Tensor, batch: Sequence[Any] = batch) -> None:
            for row, trace in enumerate(batch):
                active_TA = sae.encode(hidden_BSD[row, : len(trace.token_ids)].to(sae.dtype))[:, list(atoms)] > 0
                for column, atom in enumerate(atoms):
                    found["atom", layer, atom][number[trace.trace_id]] = active_TA[:, column].cpu().numpy()

        with torch.no_grad(), observe_residual(model, [layer], sink, stop=True):
            body(**padded(rows, device), use_cache=False)
    return found
