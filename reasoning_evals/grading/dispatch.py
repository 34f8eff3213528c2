"""From a generated text to its verdict: split off the thought, find the final answer, call the grader of its answer type."""

from __future__ import annotations

import re

from reasoning_evals.grading.answers import Extraction, extract_answer, first_turn
from reasoning_evals.grading.expressions import grade_expression, grade_list, part_verdicts, read_list
from reasoning_evals.grading.latex import clean
from reasoning_evals.grading.records import Grade, Verdict, boxes, wrong
from reasoning_evals.grading.values import GRADERS, read_choice
from reasoning_evals.problems import LABEL, Problem
from reasoning_evals.thinking import Thought, split_thought

_OR = re.compile(
    r"[\s,(]+(?:\\text\s*\{\s*)?or(?![a-zA-Z])[\s}]*|\s+\((?=\s*(?:\\approx|=)?\s*-?[\d.])(?=[^()]*\)?[\s.]*$)"
)


def grade(problem: Problem, text: str | None, opened: bool = False) -> Grade:
    """The verdict on one generated text, of whose model nothing is known (``split_thought``).

    ``opened``: the prompt ended inside the thought. No text makes this function raise.
    """
    return grade_thought(problem, split_thought(text, opened))


def grade_parts(problem: Problem, text: str | None, opened: bool = False) -> list[Grade]:
    """The verdict on each value of a list, for credit by part: the mean of ``is_correct``. Other answer types have one part.

    Parts are told apart by "(a) ... (b) ..." or as values of a list; the values of an ordered list are judged by their place.
    """
    whole = grade(problem, text, opened)
    if problem.answer_type != "list":
        return [whole]
    if whole.extracted is None or whole.is_correct:
        return [whole] * max(1, num_parts(problem))
    verdicts = part_verdicts(problem, whole.extracted)
    return [Grade(verdict.outcome, whole.extracted, verdict.reason, whole.method) for verdict in verdicts]


def num_parts(problem: Problem) -> int:
    """How many values a problem asks for."""
    return len(read_list(problem.target)[0]) if problem.answer_type == "list" else 1


def grade_thought(problem: Problem, thought: Thought) -> Grade:
    """The verdict on a text that is split already. A thought that never closes is "truncated"; otherwise the final answer is
    taken from the answer part alone."""
    if problem.answer_type == LABEL:
        return Grade(
            "grader_error", None, "no grader decides a label: judge the run by a classifier, reasoning_evals.safety"
        )
    if thought.state == "truncated":
        return Grade("truncated", None, "the thought never closes")
    thought = thought._replace(answer=first_turn(thought.answer))
    found = extract_answer(thought.answer, problem.answer_type)
    if problem.answer_type == "list":
        found = _list_of_boxes(problem, thought.answer, found)
    elif problem.answer_type == "choice" and found and found.method == "box":
        found = _letter_beside_box(thought.answer, found)
    if (
        found is None
        and (not re.search(r"\d|\b[A-J]\b", thought.answer) or problem.answer_type in ("expression", "list"))
        and len(thought.answer) < 200
        and grade_answer(problem, thought.answer).outcome == "correct"
    ):
        # June 20, no solution, one half: words that only the target makes an answer.
        found = Extraction(thought.answer, "whole")
    if found is None:
        return Grade("no_answer", None, "no final answer after the thought" if thought.answer else "no answer part")
    verdict = grade_answer(problem, found.text)
    reason = verdict.reason if found.method == "box" else f"{verdict.reason}; no box, taken from: {found.method}"
    return Grade(verdict.outcome, found.text, reason, found.method)


def grade_answer(problem: Problem, answer: str) -> Verdict:
    """The verdict on a final answer that was already extracted."""
    try:
        if problem.answer_type == "expression":
            return grade_expression(problem, answer)
        if problem.answer_type == "list":
            return grade_list(problem, answer)
        verdict = GRADERS[problem.answer_type](problem, answer)
        if (
            verdict.outcome == "wrong"
            and problem.answer_type != "choice"
            and len(both := _OR.split(answer.rstrip(") "))) == 2
        ):
            verdicts = [GRADERS[problem.answer_type](problem, one) for one in both]  # 1/2 or 0.5
            return verdict if any(one.outcome != "correct" for one in verdicts) else verdicts[0]
        return verdict
    except RecursionError:
        return wrong("nested too deep")
    except Exception as error:  # one answer must not end a run; the outcome keeps it visible
        return Verdict("grader_error", f"{type(error).__name__}: {error}")


def _list_of_boxes(problem: Problem, answer: str, found: Extraction | None) -> Extraction | None:
    """Several boxes with one value each may be one list; if the last box contains a list itself, it alone is the answer."""
    expected = num_parts(problem)
    if found is None or found.method != "box" or expected < 2 or len(read_list(found.text)[0]) != 1:
        return found
    values = boxes(answer)
    blocks = [values[start : start + expected] for start in range(0, len(values), expected)]
    if all(
        sorted(map(clean, block)) == sorted(map(clean, blocks[0])) for block in blocks
    ):  # said once, or again as a summary
        values = blocks[-1]
    else:
        values = list({clean(value): value for value in values}.values())
    return Extraction("; ".join(values), f"{expected} boxes") if len(values) == expected else found


def _letter_beside_box(answer: str, found: Extraction) -> Extraction:
    """The letter that the text states where the box holds mathematics: \\boxed{A = 12}. So the answer is C."""
    if read_choice(found.text) and not re.match(r"\W*[A-J]\s*=", found.text):
        return found
    stated = extract_answer(answer, "choice", boxed=False)
    return stated if stated and stated.method != "last letter" and read_choice(stated.text) else found
