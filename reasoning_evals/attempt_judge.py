"""Judging what thoughts state: many answers to few problems, most of them said before, none of them worth minutes."""

from __future__ import annotations

from reasoning_evals.grading import TIME_LIMIT, WorkerPool, grade_answer
from reasoning_evals.problems import Problem

MAX_TIMEOUTS = 3
"""Answers to one problem that may run into the time limit; after them its answers are judged without a worker process."""


class AttemptJudge:
    """The graders as a ``Judge``: each answer to a problem once, what may hang in the killable worker processes.

    ``timeout``: seconds for one comparison in a worker; ``pool`` brings own workers.
    """

    def __init__(self, timeout: float = TIME_LIMIT, pool: WorkerPool | None = None) -> None:
        self._timeout, self._pool = timeout, pool
        self._known: dict[tuple[str, str, str | None, str], bool] = {}
        self._late: dict[str, int] = {}

    @property
    def num_timeouts(self) -> int:
        """Answers that ran into the time limit; they count as wrong."""
        return sum(self._late.values())

    def __call__(self, problem: Problem, answer: str) -> bool:
        """Whether an answer to the problem is right."""
        key = (problem.problem_id, problem.target, problem.unit, answer)
        if key not in self._known:
            self._known[key] = self._outcome(problem, answer) == "correct"
        return self._known[key]

    def reads_target(self, problem: Problem) -> bool:
        """Whether a grader can read the problem's target; some are no formulas. Asked by another answer: an equal text is not read."""
        return self._outcome(problem, "0") != "grader_error"

    def _outcome(self, problem: Problem, answer: str) -> str:
        late = self._late.get(problem.problem_id, 0)
        verdict = grade_answer(problem, answer, timeout=self._timeout, pool=self._pool, in_process=late >= MAX_TIMEOUTS)
        if verdict.outcome == "grader_timeout":
            self._late[problem.problem_id] = late + 1
        return verdict.outcome
