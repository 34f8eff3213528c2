"""The corpus of graded answers: every trap that a grader fell into somewhere is a case, with its source."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from reasoning_evals import Problem, grade
from reasoning_evals.grading import grade_parts

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


KINDS = json.loads(Path(__file__).with_name("grading_kinds.json").read_text(encoding="utf-8"))
"""By kind of trap: one target, and the texts that are right, wrong or no answer for it."""


@pytest.mark.parametrize("row", KINDS, ids=lambda row: f"{row['kind']}: {row['target']}"[:70])
def test_kinds(row):
    problem = Problem("case", row.get("prompt", "?"), row["target"], row["type"], unit=row.get("unit"))
    for outcomes, texts in ((("correct",), "right"), (("wrong", "no_answer"), "wrong"), (("no_answer",), "no_answer")):
        verdicts = {text: grade(problem, text) for text in row.get(texts, ())}
        assert not {text: verdict for text, verdict in verdicts.items() if verdict.outcome not in outcomes}


def test_credit_by_part():
    problem = Problem("parts", "?", ["3 m", "4 s", "x y"], "list")

    def credit(text):
        parts = grade_parts(problem, text)
        assert len(parts) == 3
        return sum(part.is_correct for part in parts)

    assert credit("\\boxed{(a) 3 m (b) 4 s (c) y x}") == 3
    assert credit("\\boxed{(a) 3 m (b) 5 s (c) y x}") == 2
    assert credit("\\boxed{(c) y x, (a) 2 m, (b) 4 s}") == 2  # the letter says which part it is
    assert credit("\\boxed{3 m, 4 s}") == 2
    assert credit("\\boxed{4 s, 3 m, x y}") == 1  # an ordered list is judged by place
    assert credit("\\boxed{3 m, 4 s, x y, 5 m}") == 0  # more values than parts: a list of guesses
    assert credit("I do not know") == 0
    free = replace(problem, target="{3 m; 4 s; x y}")
    assert [part.is_correct for part in grade_parts(free, "\\boxed{4 s, 7 m, y x}")] == [False, True, True]
    assert [part.outcome for part in grade_parts(Problem("one", "?", "5", "integer"), "\\boxed{5}")] == ["correct"]


def test_every_case_has_a_source_and_no_case_stands_twice():
    assert all(case["source"] for case in CASES)
    keys = [json.dumps({key: value for key, value in case.items() if key != "source"}) for case in CASES]
    assert len(set(keys)) == len(keys)


def test_the_corpus_covers_every_outcome_that_text_can_cause():
    assert {case["outcome"] for case in CASES} == {"correct", "wrong", "no_answer", "truncated", "grader_error"}
