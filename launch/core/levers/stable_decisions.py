"""Decision sites sampled again, and the stable ones kept (``moe_steer.contrasts.stability``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_steer.console.progress import tracked
from moe_steer.contrasts import Behaviour, MarkedSequence, Stability, shown_by, sites_of, stable_sites
from moe_steer.thinking import token_tags
from reasoning_evals.engines import InProcessSampler, Request, SamplingConfig
from reasoning_evals.runs import sample_seed

TOKENS = 12
"""New tokens of a re-generation: words that lead up to a switch, and the switch."""


def keep_stable(
    model: Any,
    tokenizer: Any,
    sequences: Sequence[MarkedSequence],
    switch_words: Sequence[str],
    *,
    samples: int,
    share: float,
    temperature: float,
    top_p: float,
    batch_size: int = 64,
) -> tuple[list[MarkedSequence], list[Stability]]:
    """The sequences with the sites at which the behaviour comes back in ``share`` of ``samples`` re-generations, and how many those
    are. The samples of a site share its prefill."""
    tags = token_tags(tokenizer)
    assert tags is not None, "decisions are made in thoughts"
    by_name = {item.name: item for item in sequences}
    asked = [
        Request(
            prompt_ids=by_name[name].token_ids[: place + 1],
            seed=sample_seed(0, "decision", f"{name}@{place}", number),
            key=(name, place),
        )
        for name, place in sites_of(sequences)
        for number in range(samples)
    ]
    config = SamplingConfig(temperature=temperature, top_p=top_p, max_new_tokens=TOKENS, batch_size=batch_size)
    found: dict[tuple[str, int], list[tuple[int, ...]]] = {}
    sampled = InProcessSampler(model, tokenizer).sample(asked, config)
    for sample in tracked(sampled, "re-generating decisions", total=len(asked)):
        found.setdefault(sample.key, []).append(sample.token_ids)
    behaviour = Behaviour.of(tokenizer, tags, switch_words)
    return stable_sites(sequences, shown_by(sequences, behaviour, found), share)
