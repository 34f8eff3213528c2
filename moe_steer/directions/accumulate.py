"""Tokens of samples, as they come, into ``Moments``. Never holds samples x atoms: atoms are encoded in chunks of
tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_steer.directions.moments import WEIGHTS, AtomMoments, Moments

if TYPE_CHECKING:
    from moe_steer.saes.sae import SAE

_NUMBERS_PER_CHUNK = {"cpu": 1 << 21}
_NUMBERS_PER_CHUNK_ELSEWHERE = 1 << 26
"""Activations encoded at once: 8 MB in float32 on the CPU, 256 MB on an accelerator, whose kernels need the work."""


class Accumulator:
    """One side of a contrast at one layer.

    ``width``: D. ``sae``: also measure its atoms. ``second``: also sum x x^T, D x D. Sums stay on the device of the
    tokens until ``moments``.
    """

    def __init__(self, width: int, *, weight: str = "sample", sae: SAE | None = None, second: bool = False) -> None:
        if weight not in WEIGHTS:
            raise ValueError(f"weight is {weight!r}: choose one of {', '.join(WEIGHTS)}")
        self._weight = weight
        self._sae = sae
        self._num_samples = 0
        self._num_tokens = 0
        self._sum_D = torch.zeros(width, dtype=torch.float64)
        self._norm_sum = torch.zeros((), dtype=torch.float64)
        self._second_DD = torch.zeros(width, width, dtype=torch.float64) if second else None
        if sae is not None:
            self._sums_2F = torch.zeros(2, sae.width, dtype=torch.float64, device=sae.device)
            self._fired_2F = torch.zeros(2, sae.width, dtype=torch.int64, device=sae.device)

    @torch.no_grad()
    def add(self, x_TD: Tensor, sizes: Sequence[int]) -> Tensor:
        """Add samples: their tokens one after another, ``sizes`` tokens each (at least 1). Returns their means [N, D],
        float64."""
        if sum(sizes) != len(x_TD) or any(size < 1 for size in sizes):
            raise ValueError(
                f"sizes {list(sizes)[:8]} do not divide {len(x_TD)} tokens: give the length of every sample"
            )
        exact_TD = x_TD.double()
        owner_T = torch.repeat_interleave(torch.tensor(sizes, device=x_TD.device))
        sizes_N1 = torch.tensor(sizes, dtype=torch.float64, device=x_TD.device)[:, None]
        means_ND = exact_TD.new_zeros(len(sizes), x_TD.shape[1]).index_add_(0, owner_T, exact_TD) / sizes_N1
        units = means_ND if self._weight == "sample" else exact_TD
        self._sum_D = self._sum_D.to(x_TD.device) + units.sum(0)
        self._norm_sum = self._norm_sum.to(x_TD.device) + exact_TD.norm(dim=1).sum()
        if self._second_DD is not None:
            self._second_DD = self._second_DD.to(x_TD.device).addmm_(units.T, units)
        self._num_samples += len(sizes)
        self._num_tokens += len(x_TD)
        if self._sae is not None:
            self._add_atoms(self._sae, x_TD, sizes)
        return means_ND

    def moments(self) -> Moments:
        """What was added so far, on the CPU."""
        atoms = None
        if self._sae is not None:
            sums_2F, fired_2F = self._sums_2F.cpu(), self._fired_2F.cpu()
            atoms = AtomMoments(
                sum_F=sums_2F[0], square_F=sums_2F[1], samples_fired_F=fired_2F[0], tokens_fired_F=fired_2F[1]
            )
        return Moments(
            weight=self._weight,
            num_samples=self._num_samples,
            num_tokens=self._num_tokens,
            sum_D=self._sum_D.cpu(),
            norm_sum=float(self._norm_sum),
            second_DD=None if self._second_DD is None else self._second_DD.cpu(),
            atoms=atoms,
        )

    def _add_atoms(self, sae: SAE, x_TD: Tensor, sizes: Sequence[int]) -> None:
        """A sample may reach over several chunks: what is known of the one that is not finished is carried on."""
        numbers = _NUMBERS_PER_CHUNK.get(sae.device.type, _NUMBERS_PER_CHUNK_ELSEWHERE)
        owner_T = torch.repeat_interleave(torch.tensor(sizes))
        share_T = 1 / torch.tensor(sizes, dtype=torch.float64)[owner_T]
        carried_F: Tensor | None = None
        step = max(1, numbers // sae.width)
        for start in range(0, len(x_TD), step):
            acts_TF = sae.encode(x_TD[start : start + step])
            acts_TF = acts_TF.to(torch.promote_types(acts_TF.dtype, torch.float32))  # 16 bits count to 256
            stop = start + len(acts_TF)
            first, last = int(owner_T[start]), int(owner_T[stop - 1])
            # A matrix product takes all the samples' means of the chunk at once, however short they are.
            mean_NT = torch.zeros(last - first + 1, stop - start, dtype=torch.float64)
            mean_NT[owner_T[start:stop] - first, torch.arange(stop - start)] = share_T[start:stop]
            parts_NF = mean_NT.to(acts_TF) @ acts_TF
            if carried_F is not None:
                parts_NF[0] += carried_F
            unfinished = stop < len(x_TD) and int(owner_T[stop]) == last
            carried_F = parts_NF[-1].clone() if unfinished else None
            parts_NF = parts_NF[:-1] if unfinished else parts_NF
            units = parts_NF if self._weight == "sample" else acts_TF
            self._sums_2F[0] += units.sum(0)
            self._sums_2F[1] += units.square().sum(0)
            # In place, and added as they are: counting a mask of booleans would first widen it to 8 bytes an entry.
            self._fired_2F[0] += parts_NF.gt_(0).sum(0).long()
            self._fired_2F[1] += acts_TF.gt_(0).sum(0).long()
