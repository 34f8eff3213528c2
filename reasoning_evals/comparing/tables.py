"""Graded rows by arm and problem: what every comparison starts from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reasoning_evals.runs import GradeRow


class Table(NamedTuple):
    """The rows of one arm by problem, samples in order; problems in the order of the first arm."""

    name: str
    rows: dict[str, list[GradeRow]]

    def per_problem(self, field: str) -> list[float] | None:
        """Mean over the samples of each problem; None when a value was not measured."""
        values = [[getattr(row, field) for row in rows] for rows in self.rows.values()]
        if any(value is None for samples in values for value in samples):
            return None
        return [sum(samples) / len(samples) for samples in values]

    def means(self, of: Callable[[GradeRow], float]) -> list[float]:
        """Mean over the samples of each problem, of something that is known of all of them."""
        return [sum(map(of, samples)) / len(samples) for samples in self.rows.values()]

    def share(self, *outcomes: str) -> float:
        """Share of all samples with one of these outcomes."""
        rows = [row for samples in self.rows.values() for row in samples]
        return sum(row.outcome in outcomes for row in rows) / len(rows)


def tables_of(rows: Sequence[GradeRow]) -> dict[str, Table]:
    """Arm -> its table. ValueError when arms have different problems or sample numbers, or the rows are of several tasks."""
    if not rows:
        raise ValueError("nothing to compare: no graded samples are given")
    if len(tasks := {row.task for row in rows}) > 1:
        raise ValueError(f"the samples are of {len(tasks)} tasks ({sorted(tasks)}): compare each task on its own")
    samples: dict[str, dict[str, dict[int, GradeRow]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row.sample_idx in samples[row.arm][row.problem_id]:
            raise ValueError(f"sample {row.sample_idx} of problem {row.problem_id!r}, arm {row.arm!r}, is there twice")
        samples[row.arm][row.problem_id][row.sample_idx] = row
    first_name, first = next(iter(samples.items()))
    for name, problems in samples.items():
        if problems.keys() != first.keys():
            only = sorted(problems.keys() ^ first.keys())
            raise ValueError(
                f"arms {first_name!r} and {name!r} have different problems ({len(only)} are in one only, such as "
                f"{only[0]!r}): sample the same problems in both"
            )
        for problem in first:
            if problems[problem].keys() != next(iter(first.values())).keys():
                raise ValueError(
                    f"arm {name!r} has {len(problems[problem])} samples of problem {problem!r}, arm {first_name!r} has "
                    f"{len(next(iter(first.values())))} a problem: sample the same number everywhere"
                )
    return {
        name: Table(name, {problem: [problems[problem][j] for j in sorted(problems[problem])] for problem in first})
        for name, problems in samples.items()
    }


def clusters_of(table: Table) -> list[str] | None:
    """A cluster id per problem, or None when no two problems share one."""
    return cluster_names({name: samples[0].cluster_id for name, samples in table.rows.items()})


def cluster_names(cluster_of: Mapping[str, str | None]) -> list[str] | None:
    """Problem -> its cluster, None where it is on its own: a cluster's name for each, or None when no two problems share one."""
    named = [f"problem {name}" if one is None else f"cluster {one}" for name, one in cluster_of.items()]
    return named if len(set(named)) < len(named) else None


def default_pairs(names: Sequence[str], baseline: str) -> list[tuple[str, str]]:
    """(a, b) for b against a: every arm against the baseline, and against the placebos, whose names start with "placebo"."""
    placebos = [name for name in names if name.startswith("placebo") and name != baseline]
    treated = [name for name in names if name != baseline and name not in placebos]
    return [(baseline, name) for name in [*treated, *placebos]] + [(p, name) for name in treated for p in placebos]


def refuse_degenerate(name: str, table_PK: NDArray[np.float64]) -> None:
    """ValueError for verdicts that say nothing of how much a sample varies: a plan from them would promise that any effect shows."""
    if table_PK.ndim != 2 or not table_PK.size:
        raise ValueError(f"{name} holds no samples: sample it first, or give the noise as a number")
    num_problems, k = table_PK.shape
    if num_problems < 2:
        raise ValueError(f"{name} has one problem, which says nothing of others: give a run over at least 2 problems")
    if table_PK.min() == table_PK.max():
        verdict, other = ("right", "harder") if table_PK.min() else ("wrong", "easier")
        raise ValueError(
            f"every sample of {name} is {verdict}, so that its noise cannot be measured and an effect has "
            f"{'no room' if verdict == 'right' else 'nothing to start from'}: take {other} problems, or give the noise as a number"
        )
    if k > 1 and not table_PK.var(axis=1).any():
        raise ValueError(
            f"all {k} samples of each problem of {name} have one verdict, so that no noise is seen: were they drawn at "
            "temperature 0? sample it with more temperature or more samples, or give the noise as a number"
        )
