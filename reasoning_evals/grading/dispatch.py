"""From a generated text to its verdict: split off the thought, find the final answer, call the grader of its answer type.

The grader of choices is here too: option letters, and the words True, False, Yes, No.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from reasoning_evals.answers import Extraction, boxes, extract_answer
from reasoning_evals.grading.expressions import grade_expression, grade_quantity
from reasoning_evals.grading.latex import clean
from reasoning_evals.grading.lists import grade_list, read_list
from reasoning_evals.grading.numbers import grade_integer, grade_number
from reasoning_evals.grading.records import MAX_CHARS, Grade, Verdict, bad_target, correct, short, wrong
from reasoning_evals.grading.workers import WorkerPool
from reasoning_evals.problems import LABEL, Problem
from reasoning_evals.thinking import Thought, split_thought

_TRUTH = {"true": "True", "yes": "True", "correct": "True", "false": "False", "no": "False", "incorrect": "False"}
_MARKS = re.compile(r"\\text\s*|\\mathbf\s*|[{}*$\"'`\\]")
_LEAD = re.compile(r"^(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)\b\s*(?:is\b)?[\s:]*", re.I)
_LETTER = re.compile(r"^\(?\s*([A-Ja-j])\s*(?:[).:,;]|$|\s+(?=and\b|or\b|&|-)|(?=\s*[=(]))")
_UPPER_WORD = re.compile(r"^([A-HJ])\s+\S")
_SECOND = re.compile(r"^[\s).:]*(?:,|;|/|&|and\b|or\b)\s*\(?[A-J]\s*(?:[),.;]|$)")

TIME_LIMIT = 5.0
"""Seconds for one comparison in a worker."""


def grade_choice(problem: Problem, answer: str) -> Verdict:
    """Correct when the answer names the target's letter, alone or before the option's text."""
    wanted = read_choice(problem.target)
    if wanted is None:
        return bad_target(f"{short(problem.target)!r} is neither an option letter nor True or False")
    given = read_choice(answer)
    if given is None:
        return wrong(f"no single option in {short(answer)!r}")
    return correct("the same option") if given == wanted else wrong(f"{given} is not {wanted}")


def read_choice(text: str) -> str | None:
    """The capital letter, "True" or "False" that a text states; None for none or for several."""
    surface = _LEAD.sub("", _MARKS.sub("", clean(text[:MAX_CHARS])).strip())
    word = surface.strip(" .!()").lower()
    if word in _TRUTH:
        return _TRUTH[word]
    match = _LETTER.match(surface) or _UPPER_WORD.match(surface)
    if not match or _SECOND.match(surface[match.end(1) :]):
        return None
    return match[1].upper()


def grade(
    problem: Problem,
    text: str | None,
    opened: bool = False,
    *,
    timeout: float = TIME_LIMIT,
    pool: WorkerPool | None = None,
) -> Grade:
    """The verdict on one generated text, of whose model nothing is known (``split_thought``).

    ``opened``: the prompt ended inside the thought. ``timeout`` limits a comparison that needs a worker process; ``pool``: the
    workers to use. No text makes this function raise.
    """
    return grade_thought(problem, split_thought(text, opened), timeout=timeout, pool=pool)


def grade_thought(
    problem: Problem, thought: Thought, *, timeout: float = TIME_LIMIT, pool: WorkerPool | None = None
) -> Grade:
    """The verdict on a text that is split already. A thought that never closes is "truncated"; otherwise the final answer is
    taken from the answer part alone."""
    if problem.answer_type == LABEL:
        return Grade(
            "grader_error", None, "no grader decides a label: judge the run by a classifier, reasoning_evals.safety"
        )
    if thought.state == "truncated":
        return Grade("truncated", None, "the thought never closes")
    found = extract_answer(thought.answer, problem.answer_type)
    if problem.answer_type == "list":
        found = _list_of_boxes(problem, thought.answer, found)
    if found is None:
        return Grade("no_answer", None, "no final answer after the thought" if thought.answer else "no answer part")
    verdict = grade_answer(problem, found.text, timeout=timeout, pool=pool)
    reason = verdict.reason if found.method == "box" else f"{verdict.reason}; no box, taken from: {found.method}"
    return Grade(verdict.outcome, found.text, reason, found.method)


def grade_answer(
    problem: Problem,
    answer: str,
    *,
    timeout: float = TIME_LIMIT,
    pool: WorkerPool | None = None,
    in_process: bool = False,
) -> Verdict:
    """The verdict on a final answer that was already extracted. ``in_process``: start no worker, for quick checks of many
    answers."""
    try:
        if problem.answer_type == "expression":
            return grade_expression(problem, answer, timeout, pool, in_process)
        if problem.answer_type == "list":
            return grade_list(problem, answer, timeout, pool, in_process)
        return _GRADERS[problem.answer_type](problem, answer)
    except Exception as error:  # one answer must not end a run; the outcome keeps it visible
        return Verdict("grader_error", f"{type(error).__name__}: {error}")


def grade_many(
    pairs: Iterable[tuple[Problem, str | None]], workers: int = 1, timeout: float = TIME_LIMIT, opened: bool = False
) -> list[Grade]:
    """The verdicts on many (problem, text) pairs, in order; ``workers`` comparisons run in worker processes at a time."""
    with WorkerPool(workers) as pool:
        if workers == 1:
            return [grade(problem, text, opened, timeout=timeout, pool=pool) for problem, text in pairs]
        with ThreadPoolExecutor(workers) as threads:
            jobs = [threads.submit(grade, problem, text, opened, timeout=timeout, pool=pool) for problem, text in pairs]
            return [job.result() for job in jobs]


def _list_of_boxes(problem: Problem, answer: str, found: Extraction | None) -> Extraction | None:
    """Several boxes with one value each may be one list; if the last box contains a list itself, it alone is the answer."""
    if found is None or found.method != "box" or len(read_list(found.text)[0]) != 1:
        return found
    values = boxes(answer)
    expected = len(read_list(problem.target)[0])
    if expected > 1 and len(values) == expected:
        return Extraction(", ".join(values), f"{expected} boxes")
    return found


_GRADERS = {
    "integer": grade_integer,
    "number": grade_number,
    "quantity": grade_quantity,
    "choice": grade_choice,
}
