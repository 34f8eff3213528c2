from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from reasoning_evals.engines.in_process import InProcessSampler
from reasoning_evals.engines.sampling import Request, SamplingConfig, UniformStreams, draw, nucleus, take_most_likely
from tiny_reasoners import tiny_model, tiny_tokenizer


def warped(logits_BV: torch.Tensor, temperature: float, top_p: float, top_k: int) -> torch.Tensor:
    """The library's own classes, in generate's order: the second opinion."""
    steps = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        steps.append(TopPLogitsWarper(top_p))
    return steps(torch.zeros(1, 1), logits_BV.float()).softmax(-1)


def ours(logits_BV: torch.Tensor, temperature: float, top_p: float, top_k: int) -> torch.Tensor:
    ids_BC, probabilities_BC = nucleus(logits_BV, temperature, top_p, top_k)
    dense = torch.zeros(logits_BV.shape).scatter_add_(-1, ids_BC, probabilities_BC)
    return dense / dense.sum(-1, keepdim=True)


@pytest.mark.parametrize("vocabulary", [5, 64, 700, 3000])
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(0.6, 0.95, 0), (1.0, 1.0, 0), (0.6, 0.95, 20), (1.3, 0.5, 0), (1.0, 1.0, 3)]
)
def test_distribution_equals_the_library_warpers(
    vocabulary: int, spread: float, temperature: float, top_p: float, top_k: int
) -> None:
    logits_BV = torch.randn(16, vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * spread
    expected = warped(logits_BV, temperature, top_p, top_k)
    torch.testing.assert_close(ours(logits_BV, temperature, top_p, top_k), expected, rtol=1e-4, atol=2e-6)


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**31),
    vocabulary=st.integers(1, 300),
    top_p=st.floats(0.01, 1.0),
    uniform=st.sampled_from([0.0, 0.5, 1 - 2**-53]),
    tied=st.booleans(),
)
def test_a_cut_token_is_never_drawn(seed: int, vocabulary: int, top_p: float, uniform: float, tied: bool) -> None:
    logits_BV = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(seed)) * 4
    logits_BV = logits_BV.round() if tied else logits_BV
    ids_B = draw(logits_BV, torch.full((4,), uniform, dtype=torch.float64), 0.7, top_p, 0)
    ids_BC, probabilities_BC = nucleus(logits_BV, 0.7, top_p, 0)
    drawn_B = probabilities_BC[ids_BC == ids_B[:, None]]
    assert (drawn_B > 0).all()
    assert len(drawn_B) == 4


def test_minus_infinity_logits_are_never_drawn() -> None:
    logits = torch.full((3, 200), -torch.inf)
    logits[:, [7, 150]] = torch.tensor([1.0, 1.0])
    uniform = torch.tensor([0.0, 0.4999, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniform, 1.0, 1.0, 0).tolist() == [7, 7, 150]
    assert draw(logits, uniform, 1.0, 0.99, 0).tolist() == [7, 7, 150]
    assert take_most_likely(logits).tolist() == [7, 7, 7]


def test_uniform_streams_are_philox_by_seed_whatever_the_rows() -> None:
    streams = UniformStreams([3, 5, 9], torch.device("cpu"))
    first = torch.stack([streams.next() for _ in range(100)])
    streams.select([2, 1])
    rest = torch.stack([streams.next() for _ in range(200)])
    for seed, column, kept in ((3, 0, None), (5, 1, 1), (9, 2, 0)):
        expected = np.random.Generator(np.random.Philox(key=seed)).random(300)
        np.testing.assert_array_equal(first[:, column].numpy(), expected[:100])
        if kept is not None:
            np.testing.assert_array_equal(rest[:, kept].numpy(), expected[100:])


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.8, 0.9, 0), (1.0, 0.95, 6)])
def test_sampled_tokens_follow_the_exact_distribution(temperature: float, top_p: float, top_k: int) -> None:
    """Chi-square of first and second tokens over seeds against the exact warped softmax of the model."""
    model = tiny_model("deepseek_v3", seed=2, spread=0.1)
    model.generation_config.eos_token_id = 1
    sampler = InProcessSampler(model, tiny_tokenizer())
    prompt, num = (0, 4, 9, 11, 5), 4000
    config = SamplingConfig(temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=2, batch_size=1000)
    samples = list(sampler.sample([Request(prompt, seed, seed) for seed in range(num)], config))
    with torch.no_grad():
        first = warped(model(torch.tensor([prompt])).logits[:, -1], temperature, top_p, top_k)[0].double()
        inputs = torch.tensor([(*prompt, token) for token in range(len(first))])
        second = warped(model(inputs).logits[:, -1], temperature, top_p, top_k).double()
    second[1] = 0  # a stop token has no successor
    both = (first[:, None] * second).sum(0)
    for position, expected in ((0, first), (1, both)):
        seen = torch.zeros(len(expected), dtype=torch.double)
        for sample in samples:
            if len(sample.token_ids) > position:
                seen[sample.token_ids[position]] += 1
        assert (seen[expected == 0] == 0).all()
        wanted = expected / expected.sum() * seen.sum()
        large = wanted >= 5
        observed, theory = seen[large].tolist(), wanted[large].tolist()
        if wanted[~large].sum() > 0:
            observed, theory = [*observed, seen[~large].sum().item()], [*theory, wanted[~large].sum().item()]
        assert stats.chisquare(observed, theory).pvalue > 1e-3
