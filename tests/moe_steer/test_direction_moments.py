"""Streaming statistics against a loop over samples; parts against the whole; chunks of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from direction_cases import contrast_of, plain_sae, random_sides
from moe_steer.directions import Accumulator, Moments, PairMoments, moments


def naive(samples: list[Tensor], sae: Any, weight: str) -> dict[str, Any]:
    """Sample by sample, token by token."""
    acts = [sae.encode(x_TD) for x_TD in samples]
    units_x = [x.mean(0) for x in samples] if weight == "sample" else [row for x in samples for row in x]
    units_a = [a.mean(0) for a in acts] if weight == "sample" else [row for a in acts for row in a]
    return {
        "num_units": len(units_x),
        "mean_D": sum(units_x) / len(units_x),
        "mean_F": sum(units_a) / len(units_a),
        "variance_F": torch.stack(units_a).var(0) if len(units_a) > 1 else torch.zeros_like(units_a[0]),
        "samples_fired_F": sum((a > 0).any(0).long() for a in acts),
        "tokens_fired_F": sum((a > 0).sum(0) for a in acts),
        "norm_sum": sum(float(row.norm()) for x in samples for row in x),
        "second_DD": sum(torch.outer(row, row) for row in units_x),
    }


def differing(moments: Moments, expected: dict[str, Any]) -> list[str]:
    """Which statistics are not the expected ones."""
    atoms = moments.atoms
    assert atoms is not None
    found = [name for name in ("num_units",) if getattr(moments, name) != expected[name]]
    if moments.norm_sum != pytest.approx(expected["norm_sum"]):
        found.append("norm_sum")
    for name in ("mean_D", "mean_F", "variance_F", "second_DD"):
        ours, wanted = getattr(moments, name), expected[name]
        if ours.shape != wanted.shape or not torch.allclose(ours, wanted, rtol=1e-10, atol=1e-12):
            found.append(name)
    return found + [
        name for name in ("samples_fired_F", "tokens_fired_F") if not torch.equal(getattr(atoms, name), expected[name])
    ]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    cuts=st.lists(st.integers(1, 6), max_size=3),
    tokens_per_chunk=st.integers(1, 12),
    weight=st.sampled_from(["sample", "token"]),
)
def test_any_calls_and_any_chunks_give_the_naive_sums(
    seed: int, sizes: list[int], cuts: list[int], tokens_per_chunk: int, weight: str
) -> None:
    sae = plain_sae(11, seed, d_in=5)
    generator = torch.Generator().manual_seed(seed)
    samples = [torch.randn(size, 5, generator=generator, dtype=torch.float64) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "_NUMBERS_PER_CHUNK", {"cpu": tokens_per_chunk * sae.width})
        whole = Accumulator(5, weight=weight, sae=sae, second=True)
        rest = list(samples)
        for cut in [*cuts, len(samples)]:
            some, rest = rest[:cut], rest[cut:]
            if some:
                means_ND = whole.add(torch.cat(some), [len(x) for x in some])
                torch.testing.assert_close(means_ND, torch.stack([x.mean(0) for x in some]))
    assert differing(whole.moments(), naive(samples, sae, weight)) == []


@pytest.mark.parametrize("weight", ["sample", "token"])
def test_parts_add_up_to_one_pass(weight: str) -> None:
    sae = plain_sae(11, d_in=5)
    samples = [torch.randn(size, 5, dtype=torch.float64) for size in (3, 1, 4, 2)]
    parts = []
    for some in (samples[:1], samples[1:]):
        part = Accumulator(5, weight=weight, sae=sae, second=True)
        part.add(torch.cat(some), [len(x) for x in some])
        parts.append(part.moments())
    assert differing(parts[1] + parts[0], naive(samples, sae, weight)) == []
    assert differing(parts[0], naive(samples, sae, weight)) != []


def test_an_atom_with_a_tiny_activation_has_fired() -> None:
    side = Accumulator(2, sae=plain_sae(2))
    side.add(torch.tensor([[1e-30, 0.0], [0.0, 0.0]], dtype=torch.float64), [2])
    atoms = side.moments().atoms
    assert atoms is not None
    assert atoms.samples_fired_F.tolist() == [1, 0]


def test_an_sae_in_16_bits_still_counts_every_token() -> None:
    side = Accumulator(2, sae=plain_sae(2).to(dtype=torch.bfloat16))
    side.add(torch.ones(1001, 2), [1001])
    atoms = side.moments().atoms
    assert atoms is not None
    assert atoms.tokens_fired_F.tolist() == [1001, 1001]
    assert side.moments().mean_F.tolist() == pytest.approx([1, 1], rel=1e-4)


def test_what_does_not_belong_together_is_refused() -> None:
    with_atoms, plain = Accumulator(2, sae=plain_sae(2)), Accumulator(2)
    for side in (with_atoms, plain):
        side.add(torch.ones(2, 2), [1, 1])
    with pytest.raises(
        ValueError, match=r"\[sample means, width 2, 2 atoms\] and of \[sample means, width 2\] cannot be added"
    ):
        _ = with_atoms.moments() + plain.moments()
    with pytest.raises(ValueError, match="sizes \\[1, 2\\] do not divide 2 tokens"):
        plain.add(torch.ones(2, 2), [1, 2])
    with pytest.raises(ValueError, match="sizes \\[2, 0\\] do not divide 2 tokens"):
        plain.add(torch.ones(2, 2), [2, 0])
    with pytest.raises(ValueError, match="weight is 'word': choose one of sample, token"):
        Accumulator(2, weight="word")
    with pytest.raises(ValueError, match="collected without an SAE"):
        _ = plain.moments().mean_F


def test_contrasts_add_up_and_know_their_place() -> None:
    sae = plain_sae(6)
    positive, negative = random_sides(2, 6, 4)
    halves = [contrast_of(positive[part], negative[part], sae) for part in (slice(0, 1), slice(1, 4))]
    whole, total = contrast_of(positive, negative, sae), halves[0] + halves[1]
    torch.testing.assert_close(total.difference_F, whole.difference_F)
    torch.testing.assert_close(total.difference_D, whole.difference_D)
    assert total.residual_norm == pytest.approx(whole.residual_norm)
    with pytest.raises(ValueError, match="contrasts with sae .* cannot be added"):
        _ = whole + contrast_of(positive, negative)
    moments = PairMoments(num_pairs=1, second_DD=torch.eye(2))
    assert (moments + moments).num_pairs == 2


def test_the_atoms_must_be_those_of_the_sae() -> None:
    contrast = contrast_of(*random_sides(2, 6, 4), plain_sae(6))
    with pytest.raises(ValueError, match="was measured with the SAE made with seed 0, not with made with seed 1"):
        contrast.check_sae(plain_sae(6, 1))
    with pytest.raises(ValueError, match="layer 3 was collected without an SAE: collect it again with saes={3: sae}"):
        contrast_of(*random_sides(2, 6, 4)).check_sae(plain_sae(6))


def test_an_empty_side_has_no_difference() -> None:
    contrast = contrast_of(*random_sides(2, 6, 4))
    empty = Accumulator(6).moments()
    with pytest.raises(ValueError, match="the negative side of the contrast at layer 3 holds no token"):
        _ = type(contrast)(layer=3, positive=contrast.positive, negative=empty).difference_D
