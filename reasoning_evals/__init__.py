"""Judges text: problems, final answers, graders, thinking, runs and paired comparisons."""

from typing import TYPE_CHECKING

from moe_steer.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from reasoning_evals.comparing.compare import compare_arms
    from reasoning_evals.grading import Grade, grade
    from reasoning_evals.problems import Problem
    from reasoning_evals.runs.completions import Completion
    from reasoning_evals.runs.run import run_arms
    from reasoning_evals.tasks import load_task
    from reasoning_evals.thinking import split_thought

_HOME = {
    "Completion": "reasoning_evals.runs.completions",
    "Grade": "reasoning_evals.grading",
    "Problem": "reasoning_evals.problems",
    "compare_arms": "reasoning_evals.comparing.compare",
    "grade": "reasoning_evals.grading",
    "load_task": "reasoning_evals.tasks",
    "run_arms": "reasoning_evals.runs.run",
    "split_thought": "reasoning_evals.thinking",
}
__all__ = ["Completion", "Grade", "Problem", "compare_arms", "grade", "load_task", "run_arms", "split_thought"]

__getattr__ = lazy_exports(__name__, _HOME)
