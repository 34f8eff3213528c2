"""Batches of a model's activations: every token once, mixed, and the same from any batch on."""

import copy
from itertools import islice

import pytest
import torch
from torch import Tensor

from moe_steer.saes.activations import ActivationBatches, residual_of
from tiny import VOCAB, hook_count, qwen2, qwen3_moe


def sequences(num: int = 30, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 18, (num,), generator=generator).tolist()
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def naive(model: object, items: list[list[int]], layer: int, skip: int) -> Tensor:
    """One sequence at a time through the whole model, from its own list of hidden states (which leaves hooks behind)."""
    model, rows = copy.deepcopy(model), []
    for item in items:
        with torch.no_grad():
            hidden = model(torch.tensor([item]), output_hidden_states=True).hidden_states  # type: ignore[operator]
        rows.append(hidden[layer + 1][0, skip:])
    return torch.cat(rows)


def in_order(rows: Tensor) -> Tensor:
    """Sorted by the first number, so that sets of rows can be compared."""
    return rows[rows[:, 0].argsort()]


@pytest.mark.parametrize("make", [qwen2, qwen3_moe])
@pytest.mark.parametrize("skip", [0, 1])
def test_the_residual_stream_of_every_token_once(make: object, skip: int) -> None:
    model, items = make(), sequences()  # type: ignore[operator]
    calls: list[int] = []
    handle = model.model.layers[2].register_forward_hook(lambda *_: calls.append(1))
    found = torch.cat(list(residual_of(model, items, 1, skip_first=skip, tokens_per_forward=64)))
    handle.remove()
    assert torch.allclose(in_order(found), in_order(naive(model, items, 1, skip)), atol=2e-5)
    assert calls == [], "the layer above did not run"
    assert hook_count(model) == 0


@pytest.mark.parametrize("buffer_tokens", [60, 10_000])
def test_from_any_batch_on_the_batches_are_the_same(buffer_tokens: int) -> None:
    batches = ActivationBatches(
        model=qwen2(), sequences=sequences(), layer=1, batch_size=16, buffer_tokens=buffer_tokens, tokens_per_forward=64
    )
    whole = list(islice(batches(0), 45))
    assert {tuple(batch.shape) for batch in whole} == {(16, 32)}
    for done in (1, 7, 17, 40):
        rest = list(islice(batches(done), 5))
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[done : done + 5], strict=True))
    assert not torch.equal(whole[0], whole[1])
    other = ActivationBatches(
        model=qwen2(), sequences=sequences(), layer=1, batch_size=16, buffer_tokens=buffer_tokens, seed=1
    )
    assert not torch.equal(next(iter(other(0))), whole[0])
    assert other.digest() != batches.digest()


def test_one_pass_is_mixed_and_leaves_out_less_than_a_batch() -> None:
    items = sequences(60)
    batches = ActivationBatches(model=qwen2(), sequences=items, layer=1, batch_size=32)
    everything = naive(qwen2(), items, 1, 1)
    num_batches = len(everything) // 32
    found = torch.cat(list(islice(batches(0), num_batches)))
    distance = torch.cdist(found, everything)
    nearest = distance.argmin(dim=1)
    assert float(distance.min(dim=1).values.max()) < 1e-2
    assert len(set(nearest.tolist())) >= 0.98 * len(found), "no token twice (some tokens are alike)"
    again = torch.cat(list(islice(batches(num_batches), num_batches)))
    assert not torch.equal(again, found), "another pass has another order"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequences": []}, "there are no sequences to run"),
        ({"sequences": [[1, 2], []]}, "sequence 1 is empty or holds ids outside 0-99 of qwen2"),
        ({"sequences": [[1, 100]]}, "sequence 0 is empty or holds ids outside"),
        ({"sequences": [[1] * 300]}, "sequence 0 has 300 tokens, the context of qwen2 256"),
        ({"sequences": [[1, 2, 3]]}, "the sequences hold 2 tokens after the first 1 of each: a batch of 16 needs more"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"skip_first": -1}, "skip_first -1"),
    ],
)
def test_what_cannot_be_run(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActivationBatches(**{"model": qwen2(), "sequences": sequences(), "layer": 1, "batch_size": 16, **changes})  # type: ignore[arg-type]
