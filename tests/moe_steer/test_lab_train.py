"""The training script: batches depend on their number alone, a broken run ends like an unbroken one."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from launch.lab import batches as batches_module
from launch.lab.batches import BatchMaker, LoadBalancer, corpus
from launch.lab.models import new_model, train_tokenizer
from launch.lab.train import Recipe, batch_loss, check_rate_at, learning_rate_at, load_or_train_tokenizer, train

RECIPE = Recipe(steps=4, warmup_steps=2, tokenizer_samples=200)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(corpus(200, seed=0))


@pytest.fixture(autouse=True)
def small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "POOL_SIZE", 8)
    monkeypatch.setattr(batches_module, "BATCH_SIZE", 4)
    monkeypatch.setattr(batches_module, "BATCHES_PER_POOL", 2)


@pytest.mark.slow
def test_two_and_two_steps_equal_four(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    whole = train(RECIPE, tmp_path / "whole", tokenizer, save_every=2, log_every=1)
    train(RECIPE, tmp_path / "parts", tokenizer, save_every=2, log_every=1, stop_at=2)
    log = tmp_path / "parts" / "loss.jsonl"
    with log.open("a") as file:
        file.write('{"step": 3, "loss": 99.0}\n{"torn')
    resumed = train(RECIPE, tmp_path / "parts", tokenizer, save_every=2, log_every=1)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    curves = [
        [(record["step"], record["loss"]) for record in map(json.loads, path.read_text().splitlines())]
        for path in (tmp_path / "whole" / "loss.jsonl", log)
    ]
    assert curves[0] == curves[1]
    assert [step for step, _ in curves[0]] == [1, 2, 3, 4]


def test_a_state_of_another_recipe_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    train(RECIPE, tmp_path, tokenizer, stop_at=1)
    with pytest.raises(ValueError, match=r"another learning_rate; use another --work folder"):
        train(dataclasses.replace(RECIPE, learning_rate=1.0), tmp_path, tokenizer)


def test_batches_depend_on_their_number_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    maker = BatchMaker(tokenizer, seed=1)
    first = maker(3)
    maker(0)
    assert torch.equal(maker(3).input_ids_BS, first.input_ids_BS)
    assert not torch.equal(BatchMaker(tokenizer, seed=2)(3).input_ids_BS[:, :40], first.input_ids_BS[:, :40])


def test_later_solutions_check_more_often(tokenizer: PreTrainedTokenizerBase) -> None:
    recipe = Recipe(check_rates=((0, 0.0), (20, 0.7)))
    maker = BatchMaker(tokenizer, seed=1, check_rate=lambda step: check_rate_at(step, recipe))
    early, late = (
        sum(tokenizer.decode(row).count("We want") for step in steps for row in maker(step).input_ids_BS)
        for steps in (range(20), range(20, 40))
    )
    assert late > 2 * early
    assert torch.equal(maker(0).input_ids_BS, BatchMaker(tokenizer, 1, lambda _: 0.0)(0).input_ids_BS)


def test_loss_counts_thought_and_answer_only(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = BatchMaker(tokenizer, seed=1)(0)
    think = tokenizer.convert_tokens_to_ids("<think>")
    for ids, counted, filled in zip(batch.input_ids_BS, batch.loss_mask_BS, batch.real_mask_BS, strict=True):
        opening = ids.tolist().index(think)
        assert not counted[: opening + 2].any()
        assert counted[opening + 2 : int(filled.sum())].all()
        assert ids[counted][-1] == tokenizer.eos_token_id
        assert not counted[~filled].any()


def test_balancing_moves_the_bias_towards_idle_experts(tokenizer: PreTrainedTokenizerBase) -> None:
    model = new_model(tokenizer, seed=0)
    batch = BatchMaker(tokenizer, seed=1)(0)
    with LoadBalancer(model) as balancer:
        batch_loss(model, batch)
        first = min(balancer.routers)
        chosen = balancer._chosen_TK[first][batch.real_mask_BS[:, :-1].flatten()]
        worst = balancer.update(batch.real_mask_BS[:, :-1], rate=0.5)
    load = torch.bincount(chosen.flatten(), minlength=16)
    assert int(load.sum()) == 2 * int(batch.real_mask_BS[:, :-1].sum())
    assert torch.equal(
        balancer.routers[first].e_score_correction_bias, 0.5 * torch.sign(load.float().mean() - load.float())
    )
    assert worst >= 1
    assert all(not router._forward_hooks for router in balancer.routers.values())


def test_learning_rate_rises_then_falls() -> None:
    recipe = Recipe(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate_at(step, recipe) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.02 <= rates[-1] < 0.03


def test_tokenizer_is_learned_once_per_folder(tmp_path: Path) -> None:
    first = load_or_train_tokenizer(RECIPE, tmp_path)
    stamp = (tmp_path / "tokenizer" / "tokenizer.json").stat().st_mtime_ns
    assert load_or_train_tokenizer(RECIPE, tmp_path).get_vocab() == first.get_vocab()
    assert (tmp_path / "tokenizer" / "tokenizer.json").stat().st_mtime_ns == stamp
