"""Training: gradients against autograd, selection against a sort, the same bytes after an interruption, a planted dictionary."""

import dataclasses
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from moe_steer.saes import SAEAbout, TrainRecipe, load_sae, measure_fit, train_sae
from moe_steer.saes.training_state import load_state, save_state
from moe_steer.saes.training_step import Weights, batch_topk, train_step

D, F = 12, 40
SMALL = TrainRecipe(width=F, k=3, steps=30, dead_after_steps=4, seed=1)


def planted(num: int, seed: int, atoms: int = 14) -> tuple[Tensor, Tensor]:
    """Tokens that are sums of 3 of some unit atoms, and the atoms."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(atoms, D, generator=torch.Generator().manual_seed(77))
    rows /= rows.norm(dim=-1, keepdim=True)
    chosen = torch.rand(num, atoms, generator=generator).topk(3, dim=-1).indices
    size = torch.rand(num, 3, generator=generator) + 0.5
    return torch.zeros(num, atoms).scatter(1, chosen, size) @ rows * 5 + 2, rows


def endless(done: int) -> Iterator[Tensor]:
    number = done
    while True:
        yield planted(128, number)[0]
        number += 1


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    num=st.integers(1, 9),
    k=st.integers(1, 8),
    guess=st.floats(0, 3),
    ties=st.booleans(),
)
def test_the_largest_of_the_batch_whatever_the_guess(seed: int, num: int, k: int, guess: float, ties: bool) -> None:
    z = torch.randn(num, 8, generator=torch.Generator().manual_seed(seed))
    z = (2 * z).round() / 2 if ties else z
    found = batch_topk(z, k, guess)
    order = sorted(z.flatten().tolist(), reverse=True)
    limit = order[min(num * k, len(order)) - 1]
    expected = torch.where((z >= limit) & (z > 0), z, 0.0)
    assert torch.equal(found.csr().to_dense(), expected)
    turned, places = found.transposed()
    assert torch.equal(turned.csr().to_dense(), expected.T)
    assert torch.equal(found.values_N[places], turned.values_N)


@pytest.mark.parametrize("num_dead", [0, 4, 15])
def test_gradients_equal_autograd(num_dead: int) -> None:
    generator = torch.Generator().manual_seed(num_dead)
    fields = {
        "W_enc_DF": torch.randn(D, F, generator=generator),
        "b_enc_F": torch.randn(F, generator=generator),
        "W_dec_FD": torch.randn(F, D, generator=generator),
        "b_dec_D": torch.randn(D, generator=generator),
    }
    fields = {name: value.double() for name, value in fields.items()}
    x = torch.randn(17, D, generator=generator).double()
    dead = torch.zeros(F, dtype=torch.bool)
    dead[:num_dead] = True
    fields["b_enc_F"][dead] -= 9  # dead indeed
    result = train_step(Weights(**fields), x, 3, 0.1, dead, 0.25)

    leaves = {name: value.clone().requires_grad_() for name, value in fields.items()}
    z = (x - leaves["b_dec_D"]) @ leaves["W_enc_DF"] + leaves["b_enc_F"]
    limit = z.flatten().sort(descending=True).values[3 * 17 - 1]
    acts = torch.where((z >= limit) & (z > 0), z, 0.0)
    error = (x - leaves["b_dec_D"] - acts @ leaves["W_dec_FD"]).square().mean()
    loss = error
    if num_dead:
        rest = (x - acts @ leaves["W_dec_FD"] - leaves["b_dec_D"]).detach()
        top = z.masked_fill(~dead, -torch.inf).topk(min(D // 2, num_dead), dim=-1)
        aux = torch.zeros_like(z).scatter(1, top.indices, top.values)
        loss = loss + 0.25 * (rest - aux @ leaves["W_dec_FD"]).square().mean() / error.detach()
    loss.backward()
    assert result.error == pytest.approx(float(error.detach()), rel=1e-12)
    assert result.threshold == pytest.approx(float(limit.detach()), rel=1e-12)
    assert torch.equal(result.fired_F, (acts > 0).any(0))
    for name, leaf in leaves.items():
        assert torch.allclose(result.gradients.fields()[name], leaf.grad, atol=1e-12), name


def final_bytes(work: Path) -> list[bytes]:
    names = ("state.safetensors", "sae/sae_weights.safetensors", "sae/cfg.json")
    return [(work / name).read_bytes() for name in names]


@pytest.mark.parametrize("stops", [(1,), (7, 8, 29)])
@pytest.mark.parametrize("skipping", [True, False])
def test_interrupted_and_resumed_the_bytes_are_the_same(stops: tuple[int, ...], skipping: bool, tmp_path: Path) -> None:
    batches = endless if skipping else [planted(128, number)[0] for number in range(30)]
    train_sae(batches, D, SMALL, tmp_path / "whole")
    for stop in stops:
        train_sae(batches, D, SMALL, tmp_path / "cut", stop_at=stop)
    sae = train_sae(batches, D, SMALL, tmp_path / "cut")
    whole = final_bytes(tmp_path / "whole")
    assert final_bytes(tmp_path / "cut") == whole
    assert train_sae([], D, SMALL, tmp_path / "cut").about.sha256 == sae.about.sha256, (
        "a finished training needs no data"
    )
    other = dataclasses.replace(SMALL, seed=2)
    train_sae(batches, D, other, tmp_path / "other")
    assert final_bytes(tmp_path / "other")[1] != whole[1], "the comparison can fail"


def test_the_processor_is_left_as_it_was(tmp_path: Path) -> None:
    for before in (True, False):
        torch.set_flush_denormal(before)
        train_sae(endless, D, dataclasses.replace(SMALL, steps=2), tmp_path / str(before))
        assert bool(torch.tensor(1e-39) * 1 == 0) == before


def test_killed_between_two_saves_it_goes_back_to_the_first(tmp_path: Path) -> None:
    def breaks(done: int) -> Iterator[Tensor]:
        yield from islice(endless(done), 13)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        train_sae(breaks, D, SMALL, tmp_path / "cut", save_every=5)
    seen: list[int] = []
    train_sae(endless, D, SMALL, tmp_path / "cut", save_every=5, progress=lambda now: seen.append(now.step))
    assert seen == list(range(11, 31))
    train_sae(endless, D, SMALL, tmp_path / "whole")
    assert final_bytes(tmp_path / "cut") == final_bytes(tmp_path / "whole")
    assert not list((tmp_path / "cut").rglob("*.tmp"))


def test_a_planted_dictionary_is_found(tmp_path: Path) -> None:
    recipe = TrainRecipe(width=F, k=3, steps=300, dead_after_steps=50)
    about = SAEAbout(format="trained", source="", sha256="", model_name="toy", layer=2, site="residual")
    sae = train_sae(endless, D, recipe, tmp_path, about=about)
    test, atoms = planted(4000, 10**6)
    fit = measure_fit(sae, [test])
    assert fit.fraction_variance_unexplained < 0.15
    assert 2.5 < fit.l0 < 3.5
    closest = (atoms @ sae.W_dec_FD.T).max(dim=1).values
    assert float(closest.median()) > 0.85  # of 40 random atoms the nearest is at about 0.6
    assert torch.allclose(sae.W_dec_FD.norm(dim=-1), torch.ones(F), atol=1e-5)
    assert sae.kind == "jumprelu"
    assert sae.threshold_F is not None
    assert len(sae.threshold_F.unique()) == 1
    assert (sae.about.model_name, sae.about.layer, sae.about.site) == ("toy", 2, "residual")
    assert load_sae(tmp_path / "sae").about.sha256 == sae.about.sha256


def test_the_auxiliary_loss_revives_dead_atoms(tmp_path: Path) -> None:
    alive = {}
    for weight in (0.0, 1 / 32):
        recipe = dataclasses.replace(SMALL, steps=200, aux_weight=weight)
        path = tmp_path / str(weight) / "state.safetensors"
        train_sae(endless, D, recipe, path.parent, stop_at=20)
        state = load_state(path, recipe, D, torch.device("cpu"))
        state.weights.b_enc_F[:30] = -8.0  # no token reaches these any more
        save_state(path, state, recipe)
        sae = train_sae(endless, D, recipe, path.parent)
        acts = sae.encode(planted(2000, 10**6)[0])
        alive[weight] = int((acts[:, :30] > 0).any(0).sum())
    assert alive[0.0] == 0
    assert alive[1 / 32] > 0


def test_scale_and_shift_of_the_activations_do_not_matter(tmp_path: Path) -> None:
    plain = train_sae(endless, D, SMALL, tmp_path / "plain")
    moved = train_sae(lambda done: (1000 * x for x in endless(done)), D, SMALL, tmp_path / "moved")
    x = planted(50, 5)[0]
    assert torch.allclose(moved.encode(1000 * x) / 1000, plain.encode(x), atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width is 0: give a whole number of at least 1"),
        ({"k": 41}, "k is 41 and width 40"),
        ({"seed": 1 << 70}, "seed is 1180591620717411303424: give a whole number of at most 1099511627776"),
        ({"learning_rate": 2.0}, "learning_rate 2.0"),
        ({"decay_share": -1.0}, "decay_share -1.0"),
    ],
)
def test_wrong_recipes(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]


def test_wrong_activations_and_folders(tmp_path: Path) -> None:
    x = planted(64, 1)[0]
    for batches, message in (
        ([x[:, :5]], r"a batch has shape \(64, 5\): give \[tokens, 12\]"),
        ([x * float("inf")], "not finite"),
        ([x * 0], "do not vary"),
        ([x] * 4, "the activations ended after 4 batches, 30 steps were asked for"),
    ):
        with pytest.raises(ValueError, match=message):
            train_sae(batches, D, SMALL, tmp_path / message[:12])
    train_sae(endless, D, SMALL, tmp_path / "begun", stop_at=2)
    with pytest.raises(ValueError, match="holds a training with another k, steps: use another folder"):
        train_sae(endless, D, dataclasses.replace(SMALL, k=4, steps=31), tmp_path / "begun")
    with pytest.raises(ValueError, match="holds a training on width 12, these activations have width 13"):
        train_sae(endless, 13, SMALL, tmp_path / "begun")
    path = tmp_path / "begun" / "state.safetensors"
    path.write_bytes((path.parent / "sae" / "sae_weights.safetensors").read_bytes())
    with pytest.raises(ValueError, match="holds no training"):
        train_sae(endless, D, SMALL, tmp_path / "begun")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is not a whole safetensors file .*: remove it to begin the training again"):
        train_sae(endless, D, SMALL, tmp_path / "begun")


def test_the_rate_rises_stays_and_falls() -> None:
    recipe = TrainRecipe(width=4, k=1, steps=100, learning_rate=0.1, warmup_steps=10, decay_share=0.5)
    rates = [recipe.rate_at(step, 16) for step in range(100)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[20] == rates[49] == 0.1
    assert rates[-1] == pytest.approx(0.002)
    assert dataclasses.replace(recipe, learning_rate=None).rate_at(30, 16) == pytest.approx(0.025)
    assert json.loads(json.dumps(dataclasses.asdict(recipe)))["k"] == 1
