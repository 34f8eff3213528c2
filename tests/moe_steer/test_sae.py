"""The SAE itself: laws of its four kinds, precisions, and what it refuses."""

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import sae_files as files
from moe_steer.saes import SAE
from sae_cases import ABOUT, make


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(["relu", "jumprelu", "topk", "gated"]))
def test_laws_of_every_kind(seed: int, kind: str) -> None:
    sae = make(kind, seed)
    x = torch.randn(2, 5, files.D, generator=torch.Generator().manual_seed(seed)) * 2
    before = x.clone()
    acts = sae.encode(x)
    assert acts.shape == (2, 5, files.F)
    assert bool((acts >= 0).all())
    assert torch.equal(x, before), "the input is left alone"
    for row in range(2):
        assert torch.allclose(acts[row], sae.encode(x[row]), atol=1e-5), "tokens do not see one another"
    if kind == "topk":
        assert int((acts > 0).sum(-1).max()) <= 3
        plain = dataclasses.replace(sae, kind="relu", k=None).encode(x)
        assert torch.equal(acts.sum(-1) <= plain.sum(-1) + 1e-4, torch.ones(2, 5, dtype=torch.bool))
    if kind == "jumprelu":
        assert sae.threshold_F is not None
        assert bool((acts[acts > 0] > sae.threshold_F.expand_as(acts)[acts > 0]).all())


def test_hand_computed() -> None:
    sae = SAE(
        kind="topk",
        W_enc_DF=torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, -1.0]]),
        b_enc_F=torch.tensor([0.0, 0.5, 0.0]),
        W_dec_FD=torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]),
        b_dec_D=torch.tensor([1.0, 0.0]),
        apply_b_dec_to_input=True,
        k=2,
        about=ABOUT,
    )
    acts = sae.encode(torch.tensor([[3.0, 1.0], [0.0, -2.0]]))  # less b_dec: (2, 1) and (-1, -2)
    assert acts.tolist() == [[2.0, 1.5, 0.0], [0.0, 0.0, 1.0]]  # of (2, 1.5, 1) two; of (-1, -1.5, 1) one is positive
    assert sae.decode(acts).tolist() == [[3.0, 1.5], [3.0, 2.0]]


def test_an_activation_at_its_threshold_is_off() -> None:
    sae = make("jumprelu", W_enc_DF=torch.eye(files.D), W_dec_FD=torch.eye(files.D), b_enc_F=torch.zeros(files.D), threshold_F=torch.full((files.D,), 0.5), apply_b_dec_to_input=False)  # fmt: skip
    x = torch.full((1, files.D), 0.5)
    assert not bool(sae.encode(x).any())
    assert bool((sae.encode(x + 1e-3) > 0.5).all())


def test_elsewhere_and_in_another_precision() -> None:
    sae = make("gated")
    assert sae.to(dtype=torch.float32) is sae
    half = sae.to(dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.tensors().values()} == {torch.bfloat16}
    assert half.encode(torch.ones(1, files.D)).dtype == torch.bfloat16
    assert set(half.tensors()) == {"W_enc_DF", "b_enc_F", "W_dec_FD", "b_dec_D", "r_mag_F", "b_mag_F"}
    assert (sae.d_in, sae.width) == (files.D, files.F)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "lasso"}, "kind 'lasso' is unknown: one of relu, jumprelu, topk, gated"),
        ({"W_enc_DF": torch.zeros(3)}, "two dimensions are expected"),
        ({"W_dec_FD": torch.zeros(6, 20)}, r"W_dec_FD has shape \(6, 20\), with an encoder of 6 x 20 it should be \(20, 6\)"),
        ({"b_enc_F": torch.zeros(6)}, r"b_enc_F has shape \(6,\)"),
        ({"b_dec_D": torch.zeros(20)}, "b_dec_D has shape"),
        ({"k": None}, "k is None in a topk SAE"),
        ({"k": 21}, "k is 21: give 1 to 20"),
        ({"threshold_F": torch.zeros(20)}, "a topk SAE has no threshold_F"),
        ({"kind": "jumprelu", "k": None}, "a jumprelu SAE needs threshold_F"),
        ({"kind": "relu"}, "k is 3 in a relu SAE"),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make(), **changes)  # type: ignore[arg-type]


def test_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"activations of width 7 meet an SAE of width 6 \(here\)"):
        make().encode(torch.zeros(1, 7))
