"""Streaming statistics of one side of a contrast at one layer: O(D), and O(F) with an SAE. Two parts add up to the
whole.

Tokens of samples, as they come, into ``Moments``. Never holds samples x atoms: atoms are encoded in chunks of
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moe_steer.saes import SAE


WEIGHTS = ("sample", "token")


@dataclass(frozen=True, kw_only=True, eq=False)
class AtomMoments:
    """Sums over the units of a side (its samples' means, or its tokens) of the activations of F atoms.

    ``sum_F``, ``square_F``: float64, of the activations and of their squares. ``samples_fired_F``, ``tokens_fired_F``:
    int64, in how many samples an atom fired at least once, and at how many tokens.
    """

    sum_F: Tensor
    square_F: Tensor
    samples_fired_F: Tensor
    tokens_fired_F: Tensor

    def __add__(self, other: AtomMoments) -> AtomMoments:
        return AtomMoments(
            sum_F=self.sum_F + other.sum_F,
            square_F=self.square_F + other.square_F,
            samples_fired_F=self.samples_fired_F + other.samples_fired_F,
            tokens_fired_F=self.tokens_fired_F + other.tokens_fired_F,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """One side of a contrast at one layer; sums in float64 on the CPU.

    ``weight``: the unit that counts once, "sample" (the mean over a sample's tokens, as in CAA and STA) or "token".
    ``norm_sum``: sum over tokens of the norm of the residual stream. ``second_DD``: sum over units of x x^T, where
    asked for.
    """

    weight: str
    num_samples: int
    num_tokens: int
    sum_D: Tensor
    norm_sum: float
    second_DD: Tensor | None = None
    atoms: AtomMoments | None = None

    def __post_init__(self) -> None:
        if self.weight not in WEIGHTS:
            raise ValueError(f"weight is {self.weight!r}: choose one of {', '.join(WEIGHTS)}")

    @property
    def num_units(self) -> int:
        """What sums are divided by."""
        return self.num_samples if self.weight == "sample" else self.num_tokens

    @property
    def mean_D(self) -> Tensor:
        """Mean residual stream over units."""
        return self.sum_D / self.num_units

    @property
    def mean_F(self) -> Tensor:
        """Mean activation of every atom over units."""
        return self._atoms.sum_F / self.num_units

    @property
    def variance_F(self) -> Tensor:
        """Sample variance (n - 1) of every atom's activation over units; 0 for a single unit."""
        deviation_F = self._atoms.square_F - self._atoms.sum_F.square() / self.num_units
        return deviation_F.clamp(min=0) / max(1, self.num_units - 1)

    @property
    def _atoms(self) -> AtomMoments:
        if self.atoms is None:
            raise ValueError("this contrast was collected without an SAE: collect it again with saes={layer: sae}")
        return self.atoms

    def __add__(self, other: Moments) -> Moments:
        """Both together. ValueError when they do not measure the same."""
        mine, theirs = self._kind(), other._kind()
        if mine != theirs:
            raise ValueError(f"moments of {mine} and of {theirs} cannot be added: collect both in the same way")
        return Moments(
            weight=self.weight,
            num_samples=self.num_samples + other.num_samples,
            num_tokens=self.num_tokens + other.num_tokens,
            sum_D=self.sum_D + other.sum_D,
            norm_sum=self.norm_sum + other.norm_sum,
            second_DD=None if self.second_DD is None or other.second_DD is None else self.second_DD + other.second_DD,
            atoms=None if self.atoms is None or other.atoms is None else self.atoms + other.atoms,
        )

    def _kind(self) -> str:
        atoms = f", {len(self.atoms.sum_F)} atoms" if self.atoms is not None else ""
        second = ", second moments" if self.second_DD is not None else ""
        return f"[{self.weight} means, width {len(self.sum_D)}{atoms}{second}]"


@dataclass(frozen=True, kw_only=True, eq=False)
class PairMoments:
    """``second_DD``: sum over pairs of d d^T, d = mean of the positive sample - mean of the negative one."""

    num_pairs: int
    second_DD: Tensor

    def __add__(self, other: PairMoments) -> PairMoments:
        return PairMoments(num_pairs=self.num_pairs + other.num_pairs, second_DD=self.second_DD + other.second_DD)


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
