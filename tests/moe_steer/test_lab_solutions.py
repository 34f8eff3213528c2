"""The written solutions: right in the end, wrong now and then at first, checked a random number of times."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.lab.solutions import MAX_CHECKS, write_solution
from moe_steer.lab.family import NotWholeError, Scratch, evaluate, long_multiplication, show, slipped
from moe_steer.lab.problems import FAMILIES, draw_params, make_problem

SENTENCE = re.compile(r"(\d+) ([-+*/]) (\d+) = (?:[\d +]+ = )?(\d+)\.")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_boxed_answer_is_the_target_and_slips_are_corrected(name: str) -> None:
    family, rng = FAMILIES[name], random.Random(name)
    num_slipped = 0
    for _ in range(120):
        params = draw_params(family, "train", rng)
        problem = make_problem(family, params)
        wanted = problem.target if problem.unit is None else f"{problem.target} {problem.unit}"
        solution = write_solution(family, params, rng)
        assert solution.answer == f"The answer is \\boxed{{{wanted}}}."
        assert solution.text().count("</think>") == 1
        assert solution.thought.endswith(".")
        assert solution.num_checks <= MAX_CHECKS
        assert solution.thought.count("We want") == solution.num_checks
        if str(solution.first_value) != problem.target:
            num_slipped += 1
            assert solution.num_corrections >= 1
            assert "Let me redo it." in solution.thought
            assert f"So it is {show(solution.first_value, problem.unit)}." in solution.thought
            assert solution.thought.rfind(f"So it is {wanted}.") > solution.thought.find("Let me redo it.")
    assert 10 <= num_slipped <= 60


def test_right_first_attempts_get_a_random_number_of_checks() -> None:
    family, rng = FAMILIES["product"], random.Random(1)
    solutions = [write_solution(family, (23, 4), rng) for _ in range(600)]
    counts = [solution.num_checks for solution in solutions if solution.first_value == 92]
    assert set(counts) == set(range(MAX_CHECKS + 1))
    assert 0.4 < counts.count(0) / len(counts) < 0.6


def test_arithmetic_outside_the_slip_is_right() -> None:
    """Of a solution with one slip in the first attempt, at most that one sentence (or the slipped check) is wrong."""
    rng = random.Random(2)
    for _ in range(300):
        family = FAMILIES[rng.choice(sorted(FAMILIES))]
        solution = write_solution(family, draw_params(family, "train", rng), rng)
        wrong = [
            match.group(0)
            for match in SENTENCE.finditer(solution.thought)
            if evaluate(int(match[1]), match[2], int(match[3])) != int(match[4])
        ]
        assert len(wrong) <= 1 + solution.num_checks
        if solution.num_corrections == 0:
            assert wrong == []


def test_sheet_writes_long_multiplication_by_hand_computed_parts() -> None:
    sheet = Scratch()
    assert sheet.multiply(234, 3) == 702
    assert sheet.multiply(30, 4) == 120
    assert sheet.divide(sheet.add(7, 5), 4) == 3
    assert sheet.text() == "234 * 3 = 600 + 90 + 12 = 702. 30 * 4 = 120. 7 + 5 = 12. 12 / 4 = 3."


def test_divisions_with_a_remainder_and_negative_differences_are_refused() -> None:
    with pytest.raises(NotWholeError, match="7 / 2"):
        Scratch().divide(7, 2)
    with pytest.raises(NotWholeError, match="negative"):
        Scratch().subtract(2, 7)


@settings(deadline=None, max_examples=200)
@given(left=st.integers(0, 2000), right=st.integers(0, 2000), seed=st.integers(0, 1000))
def test_parts_add_up_and_slips_are_wrong(left: int, right: int, seed: int) -> None:
    middle = long_multiplication(left, "*", right)
    if middle:
        assert sum(int(part) for part in middle.removesuffix(" = ").split(" + ")) == left * right
    wrong = slipped(left, random.Random(seed))
    assert wrong != left
    assert wrong >= 0
