"""The in-process sampler on families with caches of their own: what would go wrong if their state or padding were left as it is.

``tests/launch/test_every_family.py`` samples every family that is loaded; here are the two that are refused at loading. Rows share
prompts, have prompts of unequal lengths, end at different steps, and those that wait take their places.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import transformers

from families import REFUSED, available, batch
from narrow_families import ALONE, generated, narrow, until
from reasoning_evals.engines import cache_rows, decoder
from reasoning_evals.engines.batch import Decoder
from reasoning_evals.engines.in_process import InProcessSampler
from reasoning_evals.engines.kv_cache import growing_cache
from reasoning_evals.engines.sampling import Request, SamplingConfig

NEW_TOKENS = 12
ORDER = (1, 0, 3, 1, 2, 0, 2, 3, 1)
"""The prompts of the requests, by number."""


class Words:
    eos_token_id = None

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return " ".join(map(str, ids))


@functools.cache
def prompts() -> list[tuple[int, ...]]:
    """Three lengths, most beyond the windows; two prompts share one."""
    return [tuple(row[:length].tolist()) for row, length in zip(batch(4, 14), (14, 5, 9, 9), strict=True)]


@functools.cache
def alone(name: str) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Prompt -> greedy tokens, without an end."""
    return generated(narrow(name), prompts(), NEW_TOKENS)


def check(name: str, size: int, order: Sequence[int]) -> None:
    """Requests for these prompts, by number, ``size`` rows at a time, against each prompt alone."""
    model, expected = narrow(name), alone(name)
    # Tokens that some answers hold early and others late or never, so that rows end at different steps.
    model.generation_config.eos_token_id = sorted({expected[prompts()[0]][6], expected[prompts()[1]][-4]})
    sampler = InProcessSampler(model, Words(), batch_size=size)
    requests = [Request(prompts()[number], 0, key) for key, number in enumerate(order)]
    made = {
        sample.key: sample.token_ids
        for sample in sampler.sample(requests, SamplingConfig(greedy=True, max_new_tokens=NEW_TOKENS))
    }
    for request in requests:
        assert made[request.key] == until(expected[request.prompt_ids], sampler.stop_ids)


@pytest.mark.parametrize("name", [name for name in available() if name in REFUSED])
def test_greedy_equals_generate_of_each_prompt_alone(name: str) -> None:
    check(name, 4, ORDER)
    assert Decoder(narrow(name), SamplingConfig(greedy=True), (), None).joins


def test_where_padding_is_read_prompts_of_one_length_are_filled_in_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "reads_padding", lambda model, cache: True)
    name, lengths = "qwen3_next", []

    def watch(_: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[1] > 1:
            lengths.append(kwargs["input_ids"].shape[1])
            assert kwargs["attention_mask"].all()

    alone(name)
    handle = narrow(name).register_forward_pre_hook(watch, with_kwargs=True)
    check(name, 4, ORDER)
    handle.remove()
    assert lengths[:2] == [14, 9]


def test_whether_a_model_masks_what_its_recurrent_layers_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = narrow("qwen3_next")
    cache = Decoder(model, SamplingConfig(), (), None).new_cache(1)
    assert not cache_rows.reads_padding(model, cache)
    monkeypatch.delattr(inspect.getmodule(type(model)), "create_recurrent_attention_mask")
    assert cache_rows.reads_padding(model, cache)
    assert not cache_rows.reads_padding(model, growing_cache(narrow("qwen3_moe").config))


LEFT_BEHIND = ["minimax"] if transformers.__version__ >= "5.23" else ["minimax", "deepseek_v4"]
"""transformers 5.23 has mended the second."""


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_the_comparison_notices_state_that_the_librarys_own_method_leaves_behind(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_rows, "_tensors", lambda holder: iter(()))
    with pytest.raises((AssertionError, RuntimeError)):
        check(name, 4, ORDER)


@pytest.mark.parametrize("name", sorted(ALONE - {"minimax"}))
def test_the_comparison_notices_padding_that_a_cache_of_its_own_kind_counts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "can_join", lambda cache: True)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        check(name, 4, ORDER)


def test_a_model_that_cannot_be_sampled_is_refused_in_one_line() -> None:
    config = transformers.MambaConfig(vocab_size=96, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = transformers.MambaForCausalLM(config)
    sampler = InProcessSampler(model, Words())
    with pytest.raises(ValueError, match="MambaForCausalLM keeps states and no keys.*use --endpoint"):
        list(sampler.sample([Request((5, 6), 0, 0)], SamplingConfig()))
