"""Runs whose thoughts are put together from known pieces, so that their measures can be counted by hand."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reasoning_evals import Problem
from reasoning_evals.engines.sampling import Request, Sample, SamplingConfig
from reasoning_evals.prompts import RenderedPrompt
from reasoning_evals.runs.run import Arm, run_arms

PROBLEMS = [Problem(f"p{i}", f"{i} + 1?", str(i + 1), "integer") for i in range(4)]
RIGHT = "Here we add one and so we get the sum = {right}. "
AGAIN = "Wait, let me count it all again: once more = {right}. "
WRONG = "Wait, maybe I was off by ten there: the sum = 99. "
VAGUE = "Hmm, this is not at all as easy as I thought it was. "


def say(pieces: Sequence[str], right: str) -> str:
    return "".join(pieces).replace("{right}", right)


class Spoken:
    """Says the same of a problem every time; ``answers`` are its final ones."""

    def __init__(self, thoughts: Mapping[str, str], answers: Mapping[str, str], model: str | None = "lab") -> None:
        self.thoughts, self.answers, self.model = thoughts, answers, model

    def render(self, question: str) -> RenderedPrompt:
        return RenderedPrompt(f"{question}<think>\n", (1,))

    def describe(self) -> dict[str, Any]:
        return {"engine": "spoken", "model": self.model, "says": sorted(self.thoughts.values())}

    def sample(self, requests: Sequence[Request], config: SamplingConfig) -> Iterator[Sample]:
        for request in requests:
            name = request.key.problem_id
            right = PROBLEMS[int(name[1:])].target
            text = f"{self.thoughts[name]}</think>\\boxed{{{self.answers[name]}}}"
            yield Sample(request.key, (9,) * 5, say([text], right), "stop")


class Rambling(Spoken):
    """Puts pieces together at random, now and then none, now and then without an end; ``said`` keeps what it said."""

    def __init__(self, shift: int, targets: Mapping[str, str]) -> None:
        super().__init__({}, {})
        self.shift, self.targets = shift, targets
        self.said: dict[tuple[str, int], tuple[list[str], bool, bool]] = {}

    def describe(self) -> dict[str, Any]:
        return {"engine": "rambling", "model": "lab", "shift": self.shift}

    def sample(self, requests: Sequence[Request], config: SamplingConfig) -> Iterator[Sample]:
        for request in requests:
            dice = random.Random(request.seed + self.shift)
            pieces = [dice.choice([RIGHT, WRONG, VAGUE])] if dice.random() < 0.9 else []
            while pieces and dice.random() < 0.7:
                pieces.append(dice.choice([AGAIN, WRONG, VAGUE]))
            right, closes = dice.random() < 0.6, not pieces or dice.random() < 0.85
            name = request.key.problem_id
            self.said[name, request.key.sample_idx] = pieces, right, closes
            answer = self.targets[name] if right else "98"
            end = f"</think>\\boxed{{{answer}}}" if closes else ""
            text = say(pieces, self.targets[name]) + end
            yield Sample(request.key, (9,) * 5, text, "stop" if closes else "length")


def write_run(folder: Path, arms: list[Arm], problems: Sequence[Problem] = PROBLEMS, k: int = 1) -> Path:
    run_arms(arms, problems, folder, k, SamplingConfig(greedy=k == 1), 0, task="demo")
    return folder
