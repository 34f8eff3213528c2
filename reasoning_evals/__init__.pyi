from reasoning_evals.comparing import compare_arms as compare_arms
from reasoning_evals.grading import Grade as Grade
from reasoning_evals.grading import grade as grade
from reasoning_evals.problems import Problem as Problem
from reasoning_evals.runs import Completion as Completion
from reasoning_evals.runs import run_arms as run_arms
from reasoning_evals.tasks import load_task as load_task
from reasoning_evals.thinking import split_thought as split_thought
