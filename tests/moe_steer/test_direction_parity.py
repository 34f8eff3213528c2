"""STA in parity mode against the released formulae written down a second time: kept atoms, vector, norm, and every odd
case."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from direction_cases import contrast_of, plain_sae, random_sides, released
from moe_steer.directions import DirectionWarning, all_atoms, caa, sta
from moe_steer.directions.methods import decode_weights
from moe_steer.directions.target_atoms import select_released

MODES = {"act_and_freq": "both", "only_act": "amplitude", "only_freq": "frequency"}


class Compared(NamedTuple):
    """``differs``: in what ``sta`` is not as the release; ``is_vector``: False where the release makes NaN of a vector of 0."""

    differs: list[str]
    is_vector: bool


def compare(seed: int, width: int, number: int, pec: float, mode: str) -> Compared:
    sae = plain_sae(width, seed)
    positive, negative = random_sides(seed, width, number)
    contrast = contrast_of(positive, negative, sae)
    means = [np.stack([x_TF.clamp(min=0).mean(0).numpy() for x_TF in side]) for side in (positive, negative)]
    caa_D = np.mean([p.mean(0).numpy() - n.mean(0).numpy() for p, n in zip(positive, negative, strict=True)], axis=0)
    decoder = sae.W_dec_FD.numpy()
    kept, vector_D, scaled_D = released(means[0], means[1], decoder, caa_D, pec, mode)
    by = MODES[mode]
    assert contrast.positive.atoms is not None
    assert contrast.negative.atoms is not None
    frequency_F = contrast.positive.atoms.samples_fired_F - contrast.negative.atoms.samples_fired_F
    found = select_released(
        contrast.difference_F, frequency_F, pec, by_amplitude=by != "frequency", by_frequency=by != "amplitude"
    )
    weights_F = torch.where(found.kept_F, contrast.difference_F, 0)
    agrees = {
        "kept atoms": torch.nonzero(found.kept_F).flatten().tolist() == kept,
        "vector": np.allclose(decode_weights(sae, weights_F).numpy(), vector_D, rtol=1e-12, atol=1e-12),
    }
    is_vector = bool(np.isfinite(scaled_D).all() and np.linalg.norm(scaled_D))
    if is_vector:
        direction = sta(contrast, sae, keep=pec, parity=True, by=by)
        header = direction.header
        agrees |= {
            "scaled vector": np.allclose(direction.vector_D.numpy(), scaled_D, rtol=1e-5, atol=1e-6),
            "norm": header["norm"] == pytest.approx(np.linalg.norm(caa_D), rel=1e-12),
            "norm before scaling": header["unscaled_norm"] == pytest.approx(np.linalg.norm(vector_D), rel=1e-12),
            "atoms": sorted(atom for atom, _ in header["atoms"]) == [a for a in kept if contrast.difference_F[a] != 0],
        }
    else:
        with pytest.raises(ValueError, match="no direction at layer 3|no atom is kept"):
            sta(contrast, sae, keep=pec, parity=True, by=by)
    return Compared([what for what, same in agrees.items() if not same], is_vector)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    width=st.integers(3, 24),
    number=st.sampled_from([1, 2, 4]),  # means are exact, so that ties are ties in any order of adding
    pec=st.sampled_from([0.0, 0.006, 0.1, 0.35, 0.5, 0.9, 0.99]),
    mode=st.sampled_from(sorted(MODES)),
)
def test_kept_atoms_vector_and_norm_are_the_released_ones(
    seed: int, width: int, number: int, pec: float, mode: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DirectionWarning)
        assert compare(seed, width, number, pec, mode).differs == []


@pytest.mark.parametrize("mode", sorted(MODES))
def test_the_comparison_is_not_empty(mode: str) -> None:
    assert all(compare(seed, 64, 4, 0.2, mode).is_vector for seed in range(4))


def test_a_threshold_of_the_kth_largest_counted_from_0_keeps_one_more() -> None:
    """Hand-computed: F = 4, keep 0.5, so k = 2 and the third largest is the threshold."""
    amplitude_F, frequency_F = torch.tensor([4.0, -3.0, 2.0, 1.0]), torch.tensor([1.0, -3.0, 2.0, 0.0])
    found = select_released(amplitude_F, frequency_F, 0.5)
    assert found.kept_F.tolist() == [True, True, True, False]
    assert (found.amplitude_threshold, found.frequency_threshold) == (2.0, pytest.approx(1 / 3))


def test_ties_are_all_kept() -> None:
    amplitude_F, frequency_F = torch.tensor([4.0, 2.0, 2.0, 2.0, 0.0]), torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0])
    assert select_released(amplitude_F, frequency_F, 0.2).kept_F.tolist() == [True, True, True, True, False]


def test_the_smallest_amplitude_has_no_sign_left() -> None:
    """min|x| becomes 0 on norming, so that atom never agrees in sign, however frequent it is."""
    amplitude_F, frequency_F = torch.tensor([4.0, 1.0, 2.0]), torch.tensor([1.0, 9.0, 3.0])
    assert select_released(amplitude_F, frequency_F, 0.0, by_amplitude=False).kept_F.tolist() == [False, False, True]


@pytest.mark.parametrize("frequency", [[0.0, 0.0, 0.0], [2.0, 2.0, 2.0]])
def test_frequencies_that_are_all_alike_keep_everything(frequency: list[float]) -> None:
    """The release divides 0 by 0 there; no score is left, the threshold is 0, and the criterion vanishes."""
    found = select_released(torch.tensor([1.0, 2.0, 3.0]), torch.tensor(frequency), 0.3)
    assert found.frequency_threshold == 0
    assert found.kept_F.tolist() == [False, False, True]  # by amplitude alone


def sparse_sides(live: int, width: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    positive, negative = random_sides(7, width, 4)
    for x_TF in (*positive, *negative):
        x_TF[:, live:] = 0
    return positive, negative


def test_a_zero_threshold_is_warned_about_and_means_plain_decoded_caa() -> None:
    sae = plain_sae(40)
    contrast = contrast_of(*sparse_sides(6, 40), sae)
    with pytest.warns(DirectionWarning) as caught:
        direction = sta(contrast, sae, keep=0.35, parity=True)
    texts = [str(item.message) for item in caught]
    assert any("the amplitude threshold at layer 3 is 0, so that criterion keeps every atom" in text for text in texts)
    assert any("the frequency threshold at layer 3 is 0" in text for text in texts)
    assert torch.equal(direction.vector_D, all_atoms(contrast, sae).vector_D)
    assert direction.header["options"]["num_kept"] == 40


def test_no_warning_without_a_zero_threshold() -> None:
    sae = plain_sae(40)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        direction = sta(contrast_of(*random_sides(3, 40, 6), sae), sae, keep=0.1, parity=True)
    assert [str(item.message) for item in caught] == []
    assert 0 < direction.header["options"]["num_kept"] < 40


def test_keep_and_trim_name_the_same_selection() -> None:
    """EasyEdit's trim is 1 - keep; its float arithmetic, 1 - 0.9 = 0.0999..., decides the place of the threshold."""
    sae = plain_sae(40)
    contrast = contrast_of(*random_sides(3, 40, 6), sae)
    kept = sta(contrast, sae, keep=0.35, parity=True)
    trimmed = sta(contrast, sae, trim=0.65, parity=True)
    assert torch.equal(kept.vector_D, trimmed.vector_D)
    assert trimmed.header["options"]["keep"] == pytest.approx(0.35)
    values_F = torch.arange(10.0) + 1
    assert int((1 - 0.9) * 10) == 0
    assert select_released(values_F, values_F, 1 - 0.9).kept_F.sum() == 1
    with pytest.raises(ValueError, match=r"keep 0.3, trim 0.7 and num_atoms None all say how many atoms: give one"):
        sta(contrast, sae, keep=0.3, trim=0.7)


def test_keep_1_keeps_every_atom() -> None:
    sae = plain_sae(12)
    contrast = contrast_of(*random_sides(3, 12, 3), sae)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DirectionWarning)
        direction = sta(contrast, sae, keep=1.0, parity=True)
    assert direction.header["options"]["num_kept"] == 12
    assert torch.equal(direction.vector_D, all_atoms(contrast, sae).vector_D)


def test_keep_0_keeps_the_atom_that_leads_by_both_or_is_refused() -> None:
    sae = plain_sae(3)
    leader = [torch.tensor([[4.0, 1.0, 0.0]]).double()], [torch.tensor([[0.0, 0.5, 0.25]]).double()]
    direction = sta(contrast_of(*leader, sae), sae, keep=0.0, parity=True)
    assert direction.header["atoms"] == [[0, 4.0]]
    apart = [torch.tensor([[4.0, 1.0, 0.0]]).double()] * 2, [torch.tensor([[0.5, 0.0, 0.0]]).double()] * 2
    with pytest.raises(ValueError, match="no atom is kept at layer 3 with"):
        sta(contrast_of(*apart, sae), sae, keep=0.0, parity=True)


def test_all_zero_atoms_are_refused_where_the_release_makes_nan() -> None:
    sae = plain_sae(8)
    positive, negative = random_sides(3, 8, 3)
    silent = [-x_TF.abs() for x_TF in positive], [-x_TF.abs() - 1 for x_TF in negative]
    contrast = contrast_of(*silent, sae)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DirectionWarning)
        with pytest.raises(ValueError, match="no direction at layer 3: the vector of sta is 0"):
            sta(contrast, sae, keep=0.35, parity=True)
    with pytest.raises(ValueError, match="the vector of all_atoms is 0"):
        all_atoms(contrast, sae)


def test_parity_needs_pairs_and_none_of_our_own_settings() -> None:
    sae = plain_sae(12)
    positive, negative = random_sides(3, 12, 3)
    with pytest.raises(ValueError, match="parity=True goes with keep or trim and by both, amplitude, frequency alone"):
        sta(contrast_of(positive, negative, sae), sae, num_atoms=3, parity=True)
    with pytest.raises(ValueError, match="3 and 2 samples by sample: collect pairs with weight='sample'"):
        sta(contrast_of(positive, negative[:2], sae), sae, parity=True)


def test_caa_is_the_released_mean_of_differences() -> None:
    positive, negative = random_sides(5, 9, 4)
    differences = [p.mean(0) - n.mean(0) for p, n in zip(positive, negative, strict=True)]
    expected_D = torch.stack(differences).mean(0)
    assert torch.allclose(caa(contrast_of(positive, negative)).vector_D, expected_D.float(), rtol=1e-6)
