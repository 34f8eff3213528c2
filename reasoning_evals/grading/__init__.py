"""Graders: is this final answer the right one, and why."""

from reasoning_evals.grading.dispatch import TIME_LIMIT, grade, grade_answer, grade_many
from reasoning_evals.grading.records import OUTCOMES, Grade, Verdict
from reasoning_evals.grading.workers import WorkerPool

__all__ = ["OUTCOMES", "TIME_LIMIT", "Grade", "Verdict", "WorkerPool", "grade", "grade_answer", "grade_many"]
