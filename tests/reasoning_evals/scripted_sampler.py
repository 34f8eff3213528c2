"""A sampler that needs no model: what it says depends on the request's seed alone. Also a program that runs it, to be killed."""

from __future__ import annotations

import hashlib
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from moe_steer.thinking import TokenTags
from reasoning_evals.engines.sampling import Request, Sample, SamplingConfig
from reasoning_evals.problems import Problem
from reasoning_evals.prompts import RenderedPrompt
from reasoning_evals.runs.run import Arm, run_arms

OPEN_ID, CLOSE_ID, STOP_ID = 6, 7, 1


class ScriptedSampler:
    """Thinks for a while, then answers right with probability ``skill``."""

    def __init__(self, skill: float = 0.6, delay: float = 0.0, shift: int = 0) -> None:
        self.skill, self.delay, self.shift = skill, delay, shift
        self.batches: list[list[Any]] = []

    def render(self, question: str) -> RenderedPrompt:
        text = f"<|user|>{question}<|assistant|><think>\n"
        return RenderedPrompt(text, tuple(text.encode()))

    def describe(self) -> dict[str, Any]:
        tags = TokenTags.of_pair([OPEN_ID], [CLOSE_ID])
        return {"engine": "script", "skill": self.skill, "thinking_tokens": tags._asdict()}

    def sample(self, requests: Sequence[Request], config: SamplingConfig) -> Iterator[Sample]:
        self.batches.append([request.key for request in requests])
        neighbours = hashlib.sha256(repr([request.seed for request in requests]).encode()).hexdigest()[:6]
        for request in sorted(requests, key=lambda request: request.seed):
            if self.delay:
                time.sleep(random.random() * self.delay)
            dice = random.Random(request.seed + self.shift)
            length = dice.randint(3, 30)
            if dice.random() < 0.1:
                yield Sample(request.key, tuple([9] * length), f"hm {neighbours} \\boxed{{0}}", "length")
                continue
            right = request.prompt.split("is ")[1].split("?")[0]
            answer = right if dice.random() < self.skill else "-1"
            ids = (*[9] * length, CLOSE_ID, 11, 12, STOP_ID)
            # The text tells who else was in the batch: a resumed chunk must have been whole.
            yield Sample(request.key, ids, f"hm {neighbours}\u2028\n</think>\\boxed{{{answer}}}", "stop")


class Rows:
    """What a steering audit looks like from here."""

    def __init__(self, sampler: ScriptedSampler | None = None) -> None:
        self.tokens = 0
        self._sampler = sampler

    def to_samples(self) -> dict[Any, list[dict[str, Any]]]:
        """Of every sample of the chunk what a gated entry did in it."""
        keys = self._sampler.batches[-1] if self._sampler else []
        acts = {"row": 0, "open_tokens": 3, "tokens": 2, "weight_added": 0.5}
        return {key: [{**acts, "openings": int(key.problem_id[1:]) + key.sample_idx}] for key in keys}

    def to_rows(self) -> list[dict[str, Any]]:
        row = {"kind": "expert", "layer": 1, "expert": 2, "gain": 64.0, **({"when": "x >= 1"} if self._sampler else {})}
        return [{**row, "tokens": self.tokens, "weight_added": self.tokens / 2}]


@contextmanager
def audited(sampler: ScriptedSampler | None = None) -> Iterator[Rows]:
    rows = Rows(sampler)
    rows.tokens = 3
    yield rows


def problems(num: int) -> list[Problem]:
    return [
        Problem(f"p{i}", f"what is {i}?", str(i), "integer", domain="maths" if i % 2 else "physics") for i in range(num)
    ]


def arms(delay: float = 0.0, gated: bool = False) -> list[Arm]:
    steered = ScriptedSampler(0.8, delay, shift=1)
    return [
        Arm("baseline", ScriptedSampler(0.5, delay)),
        Arm("steered", steered, partial(audited, steered) if gated else audited, {"plan": "abc"}),
    ]


def main(out_dir: str, rank: str, world_size: str, delay: str) -> None:
    run_arms(
        arms(float(delay), gated=True),
        problems(12),
        out_dir,
        3,
        SamplingConfig(batch_size=8),
        seed=7,
        rank=int(rank),
        world_size=int(world_size),
        task="demo",
        check_repeats=True,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
