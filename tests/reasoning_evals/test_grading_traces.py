"""396 responses of DeepSeek-R1 to physics problems, with recorded verdicts (yale-nlp/Physics).

The recorded verdicts are exact symbolic equality or a language model's word; they call 7.7 km against 7.75 km, and even 3 m against
3 m, different. So every disagreement on numbers and quantities is listed beside this file, with whose fault it is; a new one fails.
"""

import gzip
import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from reasoning_evals import Problem, grade, load_task, split_thought
from reasoning_evals.grading import grade_answer
from reasoning_evals.grading.latex import clean
from reasoning_evals.grading.numbers import read_amount
from reasoning_evals.grading.records import Unreadable
from reasoning_evals.grading.structure import parse_answer
from reasoning_evals.grading.units import parse_unit

DATA = Path(__file__).parents[3] / "shared" / "data" / "physics_r1_traces"
SUBJECTS = ("mechanics", "optics", "electro")
ADJUDICATED = json.loads(Path(__file__).with_name("physics_traces_adjudicated.json").read_text(encoding="utf-8"))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"the recorded responses are not at {DATA}")


def read_lines(name):
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def responses():
    return [row for subject in SUBJECTS for row in read_lines(f"{subject}.jsonl.gz")]


def answer_type(target):
    """number, quantity or expression, from how the target is written; equations are no numbers."""
    try:
        amount = read_amount(target)
        if amount.rest:
            return "quantity" if parse_unit(amount.rest) else "expression"
        return "number" if parse_answer(clean(target)).kind == "value" else "expression"
    except Unreadable:
        return "expression"


def judged_pairs(responses):
    """(id, index, answer type, target, answer, recorded verdict, our outcome), each pair of answers of a response once."""
    for row in responses:
        seen = set()
        for index, recorded in enumerate(row["equivalency_results"] or []):
            answer, target = recorded["input_expressions"]["expr1"], recorded["input_expressions"]["expr2"]
            if (answer, target) in seen:
                continue
            seen.add((answer, target))
            kind = answer_type(target)
            verdict = grade_answer(Problem("pair", "?", target, kind), answer)
            yield row["id"], index, kind, target, answer, bool(recorded["final_result"]), verdict.outcome


@pytest.fixture(scope="module")
def pairs(responses):
    started = time.monotonic()
    found = list(judged_pairs(responses))
    assert time.monotonic() - started < 60
    return found


def test_thought_and_answer_are_split_right_on_all(responses):
    states = Counter()
    for row in responses:
        text = row["solution"]
        split = split_thought(text)
        states[split.state] += 1
        if split.state == "closed":
            before, after = text.split("</think>")
            assert split.thought == before.removeprefix("<think>").strip()
            assert split.answer == after.strip()
            assert split_thought(before.removeprefix("<think>") + "</think>" + after, opened=True) == split
        elif split.state == "truncated":
            assert "</think>" not in text
            assert (split.thought, split.answer) == (text.removeprefix("<think>").strip(), "")
        else:
            assert text is None
    assert states == {"closed": 340, "truncated": 52, "none": 4}


def test_no_response_breaks_the_grader(responses):
    """Whole responses against their first published answer; truncated and missing ones are told apart from wrong ones."""
    targets = {}
    for subject in SUBJECTS:
        for row in read_lines(f"{subject}.problems.jsonl.gz"):
            targets[row["id"]] = row["final_answers"][0]
    outcomes = Counter()
    started = time.monotonic()
    for row in responses:
        target = targets[row["id"]]
        graded = grade(Problem(row["id"], "?", target, answer_type(target)), row["solution"])
        outcomes[graded.outcome] += 1
        if graded.outcome == "grader_error":
            assert graded.reason.startswith("target: "), graded
    assert outcomes["truncated"] == 52
    assert outcomes["correct"] > 40
    assert outcomes["no_answer"] >= 4
    assert time.monotonic() - started < 120


def test_disagreements_on_numbers_and_quantities_are_the_adjudicated_ones(pairs):
    found = {
        (name, index): (kind, outcome == "correct")
        for name, index, kind, _, _, recorded, outcome in pairs
        if kind != "expression" and (outcome == "correct") != recorded
    }
    listed = {(case["id"], case["pair"]): (case["type"], case["ours"] == "correct") for case in ADJUDICATED}
    assert found == listed
    assert {case["fault"] for case in ADJUDICATED} <= {"record", "grader"}


def test_precision_on_numbers_and_quantities(pairs):
    """Of what we call right, the share that is: as recorded, or as adjudicated where the record is at fault."""
    excused = {(case["id"], case["pair"]) for case in ADJUDICATED if case["fault"] == "record"}
    accepted = [pair for pair in pairs if pair[2] != "expression" and pair[6] == "correct"]
    right = [pair for pair in accepted if pair[5] or (pair[0], pair[1]) in excused]
    assert len(accepted) > 100
    assert len(right) / len(accepted) >= 0.99
    missed = [pair for pair in pairs if pair[2] != "expression" and pair[5] and pair[6] != "correct"]
    assert len(right) / (len(right) + len(missed)) >= 0.96


def test_expressions_are_a_lower_bound(pairs):
    """Free-form formulas: few false accepts, about half of the recorded ones found."""
    counts = Counter((pair[6] == "correct", pair[5]) for pair in pairs if pair[2] == "expression")
    assert counts[True, True] / (counts[True, True] + counts[True, False]) >= 0.95
    assert counts[True, True] / (counts[True, True] + counts[False, True]) >= 0.45


def test_the_problems_are_a_task():
    problems = load_task("physics", data_dir=DATA / "optics.problems.jsonl.gz")
    assert len(problems) == 93
    types = Counter(problem.answer_type for problem in problems)
    assert types == {"list": 55, "expression": 20, "quantity": 12, "number": 4, "choice": 2}
    assert all(problem.domain == "physics/optics" for problem in problems)


def test_targets_typed_by_what_they_are_make_ten_verdicts_right_and_none_wrong(responses):
    texts = {row["id"]: row["solution"] for row in responses}
    changed = []
    for subject in SUBJECTS:
        for problem in load_task("physics", data_dir=DATA / f"{subject}.problems.jsonl.gz"):
            text = texts.get(problem.problem_id.removeprefix("physics-"))
            if text is not None and problem.answer_type not in ("expression", "list"):
                typed, untyped = (grade(one, text) for one in (problem, replace(problem, answer_type="expression")))
                changed += [(untyped.is_correct, typed.is_correct)] if untyped.is_correct != typed.is_correct else []
    assert changed == [(False, True)] * 10
