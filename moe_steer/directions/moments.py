"""Streaming statistics of one side of a contrast at one layer: O(D), and O(F) with an SAE. Two parts add up to the
whole."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

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
