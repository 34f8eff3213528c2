"""The corpus of graded answers: every trap that a grader fell into somewhere is a case, with its source."""

import json
from pathlib import Path

import pytest

from reasoning_evals import Problem, grade

CASES = json.loads(Path(__file__).with_name("grading_cases.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['type']}-{case['source']}"[:60])
def test_case(case):
    problem = Problem(
        "case",
        case.get("prompt", "?"),
        case["target"],
        case["type"],
        unit=case.get("unit"),
        tolerance=case.get("tolerance"),
    )
    text = "\\boxed{" + "1+" * 3000 + "1}" if case["text"] == "LONG" else case["text"]
    graded = grade(problem, text, opened=case.get("opened", False))
    assert graded.outcome == case["outcome"], graded
    assert case.get("reason", "") in graded.reason
    if "extracted" in case:
        assert graded.extracted == case["extracted"]


def test_every_case_has_a_source_and_no_case_stands_twice():
    assert all(case["source"] for case in CASES)
    keys = [json.dumps({key: value for key, value in case.items() if key != "source"}) for case in CASES]
    assert len(set(keys)) == len(keys)


def test_the_corpus_covers_every_outcome_that_text_can_cause():
    assert {case["outcome"] for case in CASES} == {"correct", "wrong", "no_answer", "truncated", "grader_error"}
