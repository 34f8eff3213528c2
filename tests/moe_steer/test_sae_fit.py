"""The fit of an SAE against a naive one in float64, and what it is refused for."""

import dataclasses

import pytest
import torch

import sae_files as files
from moe_steer.layers import ModelShape
from moe_steer.saes import check_fits, measure_fit
from moe_steer.saes import fit as fit_module
from sae_cases import make

SHAPE = ModelShape("qwen2", 28, 0, 0, (), files.D, "models/r1-distill")


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "gated"])
def test_equal_to_the_definition_however_it_is_cut(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = make(kind).to(dtype=torch.float64)
    x = torch.randn(200, files.D, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 4
    acts = sae.encode(x)
    error = ((x - sae.decode(acts)) ** 2).sum()
    expected = float(error / ((x - x.mean(0)) ** 2).sum())
    monkeypatch.setattr(fit_module, "_NUMBERS_PER_CHUNK", 7 * files.F)
    for batches in ([x], list(x.split(33)), [x.reshape(4, 50, files.D)]):
        fit = measure_fit(sae, batches)
        assert fit.fraction_variance_unexplained == pytest.approx(expected, rel=1e-12)
        assert fit.l0 == pytest.approx(float((acts > 0).sum(-1).double().mean()), rel=1e-12)
        assert fit.dead_share == pytest.approx(1 - float((acts > 0).any(0).double().mean()), abs=1e-12)
        assert fit.num_tokens == 200


def test_a_large_mean_costs_no_digits() -> None:
    sae = make("relu").to(dtype=torch.float64)
    x = torch.randn(100, files.D, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 1e7
    variance = float(((x - x.mean(0)) ** 2).sum())
    error = float(((x - sae.decode(sae.encode(x))) ** 2).sum())
    assert measure_fit(sae, x.split(10)).fraction_variance_unexplained == pytest.approx(error / variance, rel=1e-7)


def test_the_mean_alone_leaves_everything_unexplained() -> None:
    x = torch.randn(500, files.D, generator=torch.Generator().manual_seed(5))
    silent = make("jumprelu", threshold_F=torch.full((files.F,), 1e9), b_dec_D=x.mean(0))
    fit = measure_fit(silent, [x])
    assert fit.fraction_variance_unexplained == pytest.approx(1.0, abs=1e-6)
    assert (fit.l0, fit.dead_share) == (0.0, 1.0)
    assert str(fit) == "variance unexplained 1.000, 0.0 atoms a token, 100.0% of atoms dead, 500 tokens"


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "there are no activations"),
        ([torch.zeros(0, files.D)], "there are no activations"),
        ([torch.ones(9, files.D)], "do not vary or are not finite"),
        ([torch.full((9, files.D), float("nan"))], "do not vary or are not finite"),
        ([torch.ones(9, 5)], "activations of width 5 meet an SAE of width 6"),
    ],
)
def test_what_cannot_be_measured(batches: list[torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_fit(make(), batches)


def test_an_sae_that_belongs_elsewhere_is_refused_in_one_line() -> None:
    sae = make()
    check_fits(sae, SHAPE, 3)
    about = sae.about
    check_fits(dataclasses.replace(sae, about=dataclasses.replace(about, layer=None, site=None)), SHAPE, 9)
    wrong = [
        (sae, SHAPE, 28, "layer 28 does not exist: qwen2 has layers 0-27"),
        (sae, SHAPE, 4, "belongs to layer 3, not to layer 4"),
        (sae, dataclasses.replace(SHAPE, hidden_size=1536), 3, "reads activations of width 6, r1-distill has width 1536"),
        (dataclasses.replace(sae, about=dataclasses.replace(about, site="mlp_out")), SHAPE, 3, "reads mlp_out, not the residual"),
    ]  # fmt: skip
    for one, shape, layer, message in wrong:
        with pytest.raises(ValueError, match=message) as caught:
            check_fits(one, shape, layer)
        assert "\n" not in str(caught.value)
    from tiny import qwen2

    with pytest.raises(ValueError, match="qwen2 has width 32"):
        check_fits(sae, qwen2(), 1)
