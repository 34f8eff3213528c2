"""STA with exact counts, its baselines, and PCA: laws, hand-computed cases, second opinions, error texts."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from direction_cases import contrast_of, plain_sae, random_sides
from moe_steer.direction import Direction
from moe_steer.directions import DirectionWarning, all_atoms, caa, pca, single_atom, sta
from moe_steer.directions.atoms import density_F, effect_size_F, rank_of, rate_difference_F
from moe_steer.directions.methods import Contrast
from moe_steer.directions.moments import PairMoments


def atoms_of(direction: Direction) -> dict[int, float]:
    return dict(direction.header["atoms"])


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    wanted=st.integers(1, 30),
    by=st.sampled_from(["both", "amplitude", "frequency", "effect"]),
    sides=st.sampled_from(["one", "two"]),
    rate=st.sampled_from(["token", "sample"]),
    max_density=st.sampled_from([0.4, 1.0]),
)
def test_exactly_as_many_atoms_as_asked_for(
    seed: int, wanted: int, by: str, sides: str, rate: str, max_density: float
) -> None:
    """And every one of them passes the filters; fewer only where no more pass."""
    sae = plain_sae(30, seed)
    contrast = contrast_of(*random_sides(seed, 30, 4), sae)
    allowed_F = (contrast.difference_F != 0) & (density_F(contrast) <= max_density)
    if by in ("both", "frequency"):
        allowed_F &= contrast.difference_F * rate_difference_F(contrast, rate) > 0
    if sides == "one":
        allowed_F &= contrast.difference_F > 0
    available = int(allowed_F.sum())
    options = {"num_atoms": wanted, "by": by, "sides": sides, "rate": rate, "max_density": max_density}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if available == 0:
            with pytest.raises(ValueError, match="no atom is kept at layer 3"):
                sta(contrast, sae, **options)  # type: ignore[arg-type]
            return
        direction = sta(contrast, sae, **options)  # type: ignore[arg-type]
    kept = atoms_of(direction)
    assert len(kept) == direction.header["num_atoms"] == min(wanted, available)
    assert all(bool(allowed_F[atom]) for atom in kept)
    assert all(weight == float(contrast.difference_F[atom]) for atom, weight in kept.items())
    assert bool(caught) == (available < wanted)
    assert direction.norm == pytest.approx(float(contrast.difference_D.norm()), rel=1e-5)


def test_ties_go_by_amplitude_then_by_index() -> None:
    """Hand-computed: one sample a side. Atoms 1, 2 and 4 fire on the positive side alone: equal rates."""
    sae = plain_sae(5)
    one = torch.tensor([[0.0, 1.0, 2.0, 0.0, 2.0]]).double()
    contrast = contrast_of([one], [torch.zeros(1, 5).double()], sae)
    assert list(atoms_of(sta(contrast, sae, num_atoms=1, by="frequency"))) == [2]
    assert sorted(atoms_of(sta(contrast, sae, num_atoms=2, by="frequency"))) == [2, 4]
    assert sorted(atoms_of(sta(contrast, sae, num_atoms=3, by="frequency"))) == [1, 2, 4]


def test_equal_scores_share_the_best_place() -> None:
    assert rank_of(torch.tensor([3.0, 5.0, 3.0, 1.0])).tolist() == [1, 0, 1, 3]


def test_fewer_atoms_than_asked_for_is_said() -> None:
    sae = plain_sae(5)
    contrast = contrast_of([torch.eye(5)[:1].double()], [torch.zeros(1, 5).double()], sae)
    with pytest.warns(DirectionWarning, match="4 atoms were asked for and 1 tell the sides apart at layer 3"):
        sta(contrast, sae, num_atoms=4)


def test_effect_size_against_numpy() -> None:
    sae = plain_sae(20, 4)
    positive, negative = random_sides(4, 20, 8)
    contrast = contrast_of(positive, negative, sae)
    p, n = (np.stack([x.clamp(min=0).mean(0).numpy() for x in side]) for side in (positive, negative))
    pooled = np.sqrt((p.var(0, ddof=1) * 7 + n.var(0, ddof=1) * 7) / 14)
    live = np.concatenate([p, n]).max(0) > 0
    middle = np.sort(pooled[live])[(live.sum() - 1) // 2]  # torch's median: the lower of two middles
    np.testing.assert_allclose(effect_size_F(contrast).numpy(), (p.mean(0) - n.mean(0)) / (pooled + middle))


def test_effect_size_needs_a_spread() -> None:
    sae = plain_sae(20, 4)
    contrast = contrast_of(*random_sides(4, 20, 1), sae)
    with pytest.raises(ValueError, match="1 positive and 1 negative samples: an effect size needs 2 of each"):
        sta(contrast, sae, keep=0.2, by="effect")


def test_rates_do_not_depend_on_how_long_or_how_many() -> None:
    """Hand-computed: atom 0 fires at 1 of 2 and at 4 of 8 tokens; smoothed, (1.5 / 3) - (4.5 / 9) = 0."""
    sae = plain_sae(1)
    short = [torch.tensor([[1.0], [0.0]]).double()]
    long = [torch.tensor([[1.0], [0.0]] * 4).double()]
    assert float(rate_difference_F(contrast_of(short, long, sae), "token")) == 0
    assert float(rate_difference_F(contrast_of(short, long, sae), "sample")) == 0


def test_dense_atoms_are_dropped() -> None:
    sae = plain_sae(2)
    positive = [torch.tensor([[5.0, 1.0], [5.0, 0.0]]).double()]
    negative = [torch.tensor([[1.0, 0.0], [1.0, 0.0]]).double()]
    contrast = contrast_of(positive, negative, sae)
    assert density_F(contrast).tolist() == [1.0, 0.25]
    assert list(atoms_of(sta(contrast, sae, num_atoms=1, by="amplitude"))) == [0]
    assert list(atoms_of(sta(contrast, sae, num_atoms=1, max_density=0.5))) == [1]


def test_all_atoms_is_the_decoded_difference_without_the_bias() -> None:
    sae = plain_sae(20, 4)
    contrast = contrast_of(*random_sides(4, 20, 4), sae)
    direction = all_atoms(contrast, sae, match_norm=False)
    expected_D = sae.decode(contrast.positive.mean_F) - sae.decode(contrast.negative.mean_F)
    torch.testing.assert_close(direction.vector_D, expected_D.float())
    header = direction.header
    v, c = expected_D, contrast.difference_D
    assert header["cosine_with_caa"] == pytest.approx(float(v @ c / v.norm() / c.norm()))
    assert header["norm_explained"] == pytest.approx(1 - float((c - v).square().sum() / c.square().sum()))
    assert all_atoms(contrast, sae).norm == pytest.approx(caa(contrast).norm, rel=1e-5)


def test_caa_explains_itself() -> None:
    header = caa(contrast_of(*random_sides(4, 20, 4))).header
    assert header["cosine_with_caa"] == pytest.approx(1)
    assert header["norm_explained"] == 1
    assert "sae" not in header


def test_single_atom_given_and_chosen() -> None:
    sae = plain_sae(3)
    positive = [torch.tensor([[4.0, 1.0, 0.0]]).double(), torch.tensor([[0.0, 1.1, 0.0]]).double()]
    negative = [torch.tensor([[0.0, 0.0, 2.0]]).double(), torch.tensor([[0.0, 0.1, 2.1]]).double()]
    contrast = contrast_of(positive, negative, sae)
    chosen = single_atom(contrast, sae)
    assert chosen.header["atoms"] == [[1, 1.0]], "raised by 1 in both: more certain than 4 in one of two"
    expected_D = sae.W_dec_FD[1] / sae.W_dec_FD[1].norm() * contrast.difference_D.norm()
    torch.testing.assert_close(chosen.vector_D, expected_D.float())
    assert single_atom(contrast, sae, 2).header["atoms"] == [[2, -1.0]], "it is weaker on the positive side"
    first = contrast_of(positive[:1], negative[:1], sae)
    assert single_atom(first, sae).header["options"] == {
        "match_norm": True,
        "atom": 0,
        "chosen_by": "difference of means",
    }
    with pytest.raises(ValueError, match="atom 3 does not exist: this SAE has atoms 0-2"):
        single_atom(contrast, sae, 3)
    silent = contrast_of([torch.zeros(1, 3).double()], [torch.ones(1, 3).double()], sae)
    with pytest.raises(ValueError, match="no atom is stronger on the positive side at layer 3"):
        single_atom(silent, sae)


def test_pca_without_pairs_against_a_decomposition() -> None:
    positive, negative = random_sides(6, 5, 8)
    contrast = contrast_of(positive, negative, second=True)
    units = [torch.stack([x.mean(0) for x in side]) for side in (positive, negative)]
    middle_D = (units[0].mean(0) + units[1].mean(0)) / 2
    centred = torch.cat(units) - middle_D
    _, values, axes = torch.linalg.svd(centred)
    direction = pca(contrast, match_norm=False)
    axis_D = axes[0] * torch.sign(axes[0] @ contrast.difference_D)
    torch.testing.assert_close(direction.vector_D, axis_D.float(), rtol=1e-4, atol=1e-5)
    assert direction.header["norm_explained"] == pytest.approx(direction.header["cosine_with_caa"] ** 2)
    share = float(values[0] ** 2 / values.square().sum())
    assert direction.header["options"]["share_of_variance"] == pytest.approx(share)


def test_pca_of_pairs_takes_their_differences() -> None:
    positive, negative = random_sides(6, 5, 8)
    differences = torch.stack([p.mean(0) - n.mean(0) for p, n in zip(positive, negative, strict=True)])
    contrast = contrast_of(positive, negative, second=True)
    pairs = PairMoments(num_pairs=8, second_DD=differences.T @ differences)
    paired = Contrast(layer=3, positive=contrast.positive, negative=contrast.negative, pairs=pairs)
    axis_D = torch.linalg.svd(differences)[2][0]
    direction = pca(paired, match_norm=False)
    assert abs(float(direction.vector_D.double() @ axis_D)) == pytest.approx(1, abs=1e-6)
    assert float(direction.vector_D.double() @ contrast.difference_D) > 0


def test_pca_needs_second_moments() -> None:
    with pytest.raises(ValueError, match="layer 3 has no second moments: collect it with second_moments=True"):
        pca(contrast_of(*random_sides(6, 5, 8)))


def test_equal_sides_have_no_direction() -> None:
    positive, _ = random_sides(6, 5, 3)
    with pytest.raises(ValueError, match="no direction at layer 3: both sides have the same mean"):
        caa(contrast_of(positive, positive))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "size"}, "by is 'size': choose one of both, amplitude, frequency, effect"),
        ({"sides": "three"}, "sides is 'three': choose one of one, two"),
        ({"rate": "word"}, "rate is 'word': choose one of token, sample"),
        ({"max_density": 0.0}, "max_density is 0.0: give a share of the tokens above 0, up to 1"),
        ({"keep": 1.5}, "keep is 1.5: give a share from 0 to 1"),
        ({"trim": -0.1}, "trim is -0.1: give a share from 0 to 1"),
        ({"num_atoms": 0}, "num_atoms is 0: give at least 1"),
        ({"keep": 0.0}, "no atom is kept at layer 3 with"),
        ({"parity": True, "by": "effect"}, "parity=True goes with keep or trim"),
        ({"parity": True, "sides": "one"}, "parity=True goes with keep or trim"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, float | str], message: str) -> None:
    sae = plain_sae(8)
    with pytest.raises(ValueError, match=message):
        sta(contrast_of(*random_sides(1, 8, 4), sae), sae, **options)  # type: ignore[arg-type]
