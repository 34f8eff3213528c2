"""Over- and underthinking of 99 thoughts of DeepSeek-R1 (every fourth of yale-nlp/Physics), against themselves cut at the first right
answer."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from launch.cli.main import main
from reasoning_evals import Problem, split_thought
from reasoning_evals.engines.sampling import Request, Sample, SamplingConfig
from reasoning_evals.prompts import RenderedPrompt
from reasoning_evals.runs.run import Arm, run_arms
from reasoning_evals.thoughts.metrics import AttemptJudge, trace_thought
from test_grading_traces import DATA, SUBJECTS, answer_type

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"the recorded responses are not at {DATA}"),
]


def read_lines(name: str) -> Iterator[dict[str, Any]]:
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


class Recorded:
    """Says what was recorded."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.texts = texts

    def render(self, question: str) -> RenderedPrompt:
        return RenderedPrompt(f"{question}\n", (1,))

    def describe(self) -> dict[str, Any]:
        return {"engine": "recorded", "model": "lab"}

    def sample(self, requests: Sequence[Request], config: SamplingConfig) -> Iterator[Sample]:
        for request in requests:
            yield Sample(request.key, (9,), self.texts[request.key.problem_id], "stop")


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    made = []
    for subject in SUBJECTS:
        for row in read_lines(f"{subject}.problems.jsonl.gz"):
            target = row["final_answers"][0]
            made.append(Problem(row["id"], row["questions"], target, answer_type(target)))
    return made


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    rows = [row for subject in SUBJECTS for row in read_lines(f"{subject}.jsonl.gz")]
    return {row["id"]: row["solution"] or "" for row in rows[1::4]}


def cut(problem: Problem, text: str, judge: AttemptJudge) -> str:
    """The thought up to the end of its first attempt that states the right answer, closed; else as it was."""
    thought = split_thought(text).thought
    if not thought:
        return text
    trace = trace_thought(problem, thought, False, len, judge=judge)
    end = trace.first_correct_token
    return text if end is None else f"<think>{thought[:end]}</think>{split_thought(text).answer}"


@pytest.fixture(scope="module")
def summary(problems: list[Problem], texts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    asked = [problem for problem in problems if problem.problem_id in texts]
    judge = AttemptJudge()
    short = {problem.problem_id: cut(problem, texts[problem.problem_id], judge) for problem in asked}
    folder = tmp_path_factory.mktemp("r1")
    arms = [Arm("r1", Recorded(texts)), Arm("cut", Recorded(short))]
    run_arms(arms, asked, folder / "run", 1, SamplingConfig(greedy=True), 0, task="physics")
    with pytest.MonkeyPatch.context() as patch:  # what the judge knows by now need not be graded again
        patch.setattr("reasoning_evals.thoughts.AttemptJudge", lambda: judge)
        assert main(["thinking", str(folder / "run"), "--out", str(folder / "thinking.json")]) == 0
    found: dict[str, Any] = json.loads((folder / "thinking.json").read_text())
    return found


def test_the_thoughts_of_r1(summary: dict[str, Any]) -> None:
    r1 = summary["arms"][0]
    assert (r1["num_samples"], r1["num_thoughts"]) == (99, 96)
    values = {name: value["mean"] for name, value in r1["values"].items()}
    assert values["closed"] == pytest.approx(87 / 99, abs=1e-5)
    assert values["truncated"] == pytest.approx(9 / 99, abs=1e-5)
    assert values["attempts"] > 10
    assert 0 <= values["chance"] < 0.05 < values["stated"]
    assert values["outcome_efficiency"] < values["stated"]


def test_a_thought_cut_at_its_first_right_answer_is_efficient(summary: dict[str, Any]) -> None:
    r1, cut_arm = ({name: value["mean"] for name, value in arm["values"].items()} for arm in summary["arms"])
    assert cut_arm["stated"] == r1["stated"]
    assert cut_arm["outcome_efficiency"] == pytest.approx(cut_arm["stated"], abs=1e-5)
    assert cut_arm["tokens_after_first_right"] == 0
    assert cut_arm["underthinking"] == 0 < r1["underthinking"]
    assert cut_arm["first_right_at"] == pytest.approx(r1["first_right_at"], rel=1e-3)
    assert cut_arm["thinking_tokens"] < 0.9 * r1["thinking_tokens"]
    changes = summary["arms"][1]["changes"]
    assert changes["outcome_efficiency"]["low"] > 0
    assert changes["thinking_tokens"]["high"] < 0


def test_what_the_thoughts_of_r1_cannot_tell_is_said(summary: dict[str, Any]) -> None:
    said = "\n".join(summary["notes"])
    assert "samples without a thought, from attempts on left out: 3 of 99 of r1, 3 of 99 of cut" in said
    assert re.search(r"problems with a target that no grader can read: \d+ \(", said)
    assert re.search(r"problems that ask for a formula or a list: \d+, seen in boxes", said)
