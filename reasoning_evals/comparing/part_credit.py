"""Credit by part: of a problem that asks for several values, the share that an answer has right.

Accuracy, and every verdict, counts an answer as right when all of its parts are. An arm may still get more parts right, and that
is what is compared here, over the problems with two parts or more. Which part is which: "(a) ... (b) ..." by its letter, other
values by their place in an ordered list, and in any order where the target says so; more values than parts earn nothing, since
they may be guesses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from reasoning_evals.comparing.comparison import Difference, Measure
from reasoning_evals.comparing.statistics import mean_estimate, paired_difference
from reasoning_evals.comparing.tables import clusters_of, default_pairs, tables_of
from reasoning_evals.grading import num_parts, part_verdicts
from reasoning_evals.problems import Problem
from reasoning_evals.runs import GradeRow


class PartCredit(NamedTuple):
    """Arm b against arm a, in shares of the parts of a problem."""

    a: str
    b: str
    num_problems: int
    credit_a: Measure
    credit_b: Measure
    difference: Difference


def credit(problem: Problem, row: GradeRow) -> float:
    """The share of the problem's parts that a graded answer has right; 0 for an answer that was not reached."""
    if row.correct or row.outcome != "wrong" or row.extracted is None:
        return float(row.correct)
    verdicts = list(part_verdicts(problem, row.extracted))
    return sum(verdict.outcome == "correct" for verdict in verdicts) / len(verdicts)


def part_credits(rows: Sequence[GradeRow], problems: Sequence[Problem], baseline: str = "baseline") -> list[PartCredit]:
    """Every pair of arms. ValueError where no two problems have several parts, and for arms that cannot be compared."""
    parts = {problem.problem_id: num_parts(problem) for problem in problems}
    several = {problem.problem_id: problem for problem in problems if parts[problem.problem_id] > 1}
    if len(several) < 2:
        raise ValueError(
            f"credit by part needs 2 problems with several parts (answer type list), and {len(several)} of "
            f"{len(problems)} have: leave --by-part out"
        )
    tables = tables_of([row for row in rows if row.problem_id in several])
    found: Mapping[str, list[float]] = {
        name: table.means(lambda row: credit(several[row.problem_id], row)) for name, table in tables.items()
    }
    clusters = clusters_of(tables[baseline]) if baseline in tables else None
    k = len(next(iter(next(iter(tables.values())).rows.values())))
    smallest = math.lcm(*(parts[name] for name in several)) * k  # every credit is a whole number of these
    return [
        PartCredit(
            a,
            b,
            len(several),
            Measure.of(mean_estimate(found[a], clusters)),
            Measure.of(mean_estimate(found[b], clusters)),
            Difference.of(paired_difference(found[a], found[b], clusters, denominator=smallest, limit=1.0)),
        )
        for a, b in default_pairs(list(tables), baseline)
    ]
