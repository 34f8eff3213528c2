"""Over- and underthinking by rule: when a thought first states the right answer, and what happens afterwards.

Definitions follow arXiv 2412.21187 (outcome and process efficiency) and 2501.18585 (underthinking), with rules instead of
their judge models: attempts are segments between marker words (``segments``), an attempt's answers are what it ``stated``. They
compare arms only; they do not reproduce the papers' numbers, and they mean something only for short answers, which a thought may
also hit by chance: see ``traced.shuffled_targets``.

Judging what thoughts state: many answers to few problems, most of them said before, none of them worth minutes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from reasoning_evals.grading import grade_answer, read_amount
from reasoning_evals.problems import Problem
from reasoning_evals.thoughts.segments import (
    SWITCH_MARKERS,
    Segment,
    candidates,
    cut_second_solutions,
    placed_candidates,
    segment_thought,
)

Judge = Callable[[Problem, str], bool]
"""Whether an answer to the problem is right."""
Cluster = Callable[[Sequence[str]], Sequence[int]]
"""For each segment's text, the number of its strategy."""


class Attempt(NamedTuple):
    """One segment of a thought, and the answers that it states."""

    tokens: int
    answer: str | None
    """The last answer of the segment; numbers as their value, without a unit."""
    correct: bool
    """Whether any answer that it states is right."""
    ends_correct: bool
    """Whether the last one is."""
    stated: tuple[str, ...] = ()
    """All answers of the segment, as written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ThoughtTrace:
    """A thought, attempt by attempt."""

    correct: bool
    """Whether the response's final answer was right."""
    attempts: tuple[Attempt, ...]
    strategies: tuple[int, ...]
    """The strategy of each attempt. By rule: a new one unless the attempt states an earlier answer again."""

    @property
    def tokens(self) -> int:
        return sum(attempt.tokens for attempt in self.attempts)

    @property
    def first_correct_token(self) -> int | None:
        """Tokens up to the end of the first attempt that states the right answer, None where none does."""
        total = 0
        for attempt in self.attempts:
            total += attempt.tokens
            if attempt.correct:
                return total
        return None

    @property
    def tokens_after_first_correct(self) -> int | None:
        first = self.first_correct_token
        return None if first is None else self.tokens - first

    @property
    def answer_changes(self) -> int:
        """How often the stated answer changes from one attempt that states one to the next."""
        answers = [attempt.answer for attempt in self.attempts if attempt.answer is not None]
        return sum(before != after for before, after in itertools.pairwise(answers))

    @property
    def correct_to_wrong(self) -> int:
        """How often a wrong answer follows a right one."""
        ends = [attempt.ends_correct for attempt in self.attempts if attempt.answer is not None]
        return sum(before and not after for before, after in itertools.pairwise(ends))

    @property
    def revisit_rate(self) -> float:
        """Share of the later answers that had been stated before."""
        answers = [attempt.answer for attempt in self.attempts if attempt.answer is not None]
        later = range(1, len(answers))
        return fmean(answers[index] in answers[:index] for index in later) if later else 0.0


def trace_thought(
    problem: Problem,
    thought: str,
    correct: bool,
    count_tokens: Callable[[str], int],
    *,
    markers: Sequence[str] = SWITCH_MARKERS,
    judge: Judge | None = None,
    cluster: Cluster | None = None,
) -> ThoughtTrace:
    """Cut a thought into attempts and judge what each of them states.

    ``correct`` is the verdict on the whole response. ``count_tokens`` counts with the model's own tokenizer. ``judge``
    (default: the grader of the problem's answer type, without worker processes) and ``cluster`` (default: by stated answer)
    may be models.
    """
    judge = judge or judge_by_rule
    segments = cut_second_solutions(
        thought,
        segment_thought(thought, markers),
        lambda text: [
            (at, _canonical(answer, problem.answer_type)) for at, answer in placed_candidates(text, problem.answer_type)
        ],
    )
    attempts = tuple(_attempt(problem, segment, count_tokens, judge) for segment in segments)
    strategies = _by_answer(attempts) if cluster is None else tuple(cluster([segment.text for segment in segments]))
    if len(strategies) != len(attempts):
        raise ValueError(f"cluster gave {len(strategies)} numbers for {len(attempts)} segments: expected one for each")
    return ThoughtTrace(correct=correct, attempts=attempts, strategies=strategies)


def judge_by_rule(problem: Problem, answer: str) -> bool:
    """The grader of the problem's answer type."""
    return grade_answer(problem, answer).outcome == "correct"


def oe_rule(traces: Iterable[ThoughtTrace]) -> float | None:
    """Outcome efficiency: mean of (tokens to the first right answer / tokens), 0 for a thought without one.

    arXiv 2412.21187, section 2.2. 1: no token was spent after the answer was found. None for no thoughts.
    """
    return _mean((trace.first_correct_token or 0) / trace.tokens for trace in traces if trace.tokens)


def ut_rule(traces: Iterable[ThoughtTrace]) -> float | None:
    """Underthinking: over INCORRECT responses, mean of (1 - tokens to the first right attempt / tokens).

    arXiv 2501.18585, section 3. A thought that never states the right answer contributes 0. None when no response is wrong.
    """
    wrong = [trace for trace in traces if not trace.correct and trace.tokens]
    return _mean(0.0 if (first := trace.first_correct_token) is None else 1 - first / trace.tokens for trace in wrong)


def distinct_efficiency(traces: Iterable[ThoughtTrace]) -> float | None:
    """Share of tokens in attempts that are the first of their strategy, mean over thoughts.

    With strategies from a judge that clusters SOLUTIONS (``trace_thought(cluster=...)``) this is the process efficiency of
    arXiv 2412.21187, section 2.3. With those by rule it is the share of new ANSWERS, another number: the rule calls another route to
    the same answer a repeat, the paper's clusters do not. The table names it "new answer".
    """
    return _mean(_distinct_share(trace) for trace in traces if trace.tokens)


def _attempt(problem: Problem, segment: Segment, count_tokens: Callable[[str], int], judge: Judge) -> Attempt:
    stated = candidates(segment.text, problem.answer_type)
    verdicts = [judge(problem, answer) for answer in stated]
    last = _canonical(stated[-1], problem.answer_type) if stated else None
    return Attempt(count_tokens(segment.text), last, any(verdicts), bool(verdicts) and verdicts[-1], tuple(stated))


def _canonical(answer: str, answer_type: str) -> str:
    """A canonical form of an answer, so that 7, 7.0 and 7 m do not count as changes."""
    if answer_type in ("integer", "number", "quantity"):
        try:
            return str(read_amount(answer).value)
        except ValueError:  # not a number, or one with too many digits to print
            return answer
    return answer


def _by_answer(attempts: Sequence[Attempt]) -> tuple[int, ...]:
    seen: dict[str, int] = {}
    strategies = []
    for index, attempt in enumerate(attempts):
        strategies.append(index if attempt.answer is None else seen.setdefault(attempt.answer, index))
    return tuple(strategies)


def _distinct_share(trace: ThoughtTrace) -> float:
    seen: set[int] = set()
    distinct = 0
    for attempt, strategy in zip(trace.attempts, trace.strategies, strict=True):
        distinct += attempt.tokens if strategy not in seen else 0
        seen.add(strategy)
    return distinct / trace.tokens


def _mean(values: Iterable[float]) -> float | None:
    kept = list(values)
    return fmean(kept) if kept else None


class AttemptJudge:
    """The graders as a ``Judge``: each answer to a problem is judged once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, str | None, str], bool] = {}

    def __call__(self, problem: Problem, answer: str) -> bool:
        """Whether an answer to the problem is right."""
        key = (problem.problem_id, problem.target, problem.unit, answer)
        if key not in self._known:
            self._known[key] = judge_by_rule(problem, answer)
        return self._known[key]

    def reads_target(self, problem: Problem) -> bool:
        """Whether a grader can read the problem's target (some are not formulas). Tested with another answer, because an
        answer with the same text as the target is accepted without reading it."""
        return grade_answer(problem, "0").outcome != "grader_error"
