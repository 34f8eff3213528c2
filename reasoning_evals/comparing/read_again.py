"""The same samples read in other ways: at lower token limits, and part by part.

At lower limits: is a gain one in being right, or in finishing? A run that stopped every sample at N tokens also holds what it would have been
with any lower limit: the first tokens are the same. A thought that is cut there is truncated, and an answer that is cut there is cut; neither is
graded as right, also where a box stood before the cut, because what was written up to there is not read again. Lengths are counts of the recorded
token ids.

By part: of a problem that asks for several values, the share that an answer has right. Accuracy, and every verdict, counts an answer as right
when all of its parts are. An arm may still get more parts right, and that is what is compared here, over the problems with two parts or more.
Which part is which: "(a) ... (b) ..." by its letter, other values by their place in an ordered list, and in any order where the target says so;
more values than parts earn nothing, since they may be guesses.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from reasoning_evals.comparing.comparison import Difference, Measure, rounded
from reasoning_evals.comparing.statistics import holm, mcnemar_p, paired_difference, proportion_estimate
from reasoning_evals.comparing.tables import Table, clusters_of, default_pairs, tables_of
from reasoning_evals.comparing.verdicts import ALPHA, HELPED, HURT, NOTHING, interval_text, p_text, points, verdict_p
from reasoning_evals.grading import num_parts, part_verdicts
from reasoning_evals.problems import Problem
from reasoning_evals.runs import GradeRow

_UNFINISHED = ("truncated", "unclosed", "cut")


@dataclass(frozen=True, kw_only=True, slots=True)
class AtCap:
    """Arm b against arm a at one token limit."""

    cap: int
    a: str
    b: str
    finished_a: float
    """Share of samples that came to their answer within the limit."""
    finished_b: float
    accuracy: Difference
    """In all: the sum of the next two, in every problem."""
    by_finishing: Difference
    """Right answers of b that a did not finish, less those of a that b did not; samples of equal number are paired."""
    by_being_right: Difference
    """Where both finished."""
    p_value: float
    holm_p: float
    """Adjusted for all limits and pairs."""
    verdict: str
    where: str
    """finishing, right answers among those finished, both, or not settled; empty without an effect."""
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values: dict[str, Any] = rounded(dataclasses.asdict(self))
        return values


def cut_rows(rows: Sequence[GradeRow], cap: int) -> list[GradeRow]:
    """The samples as they are with at most ``cap`` tokens. ValueError for a cap below 1, and where samples were cut before it: nobody
    knows how these go on."""
    if cap < 1:
        raise ValueError(f"a cap must be 1 token or more, got {cap}")
    if early := [row for row in rows if row.finish_reason == "length" and row.total_tokens < cap]:
        one = early[0]
        raise ValueError(
            f"cap {cap} cannot be read: {len(early)} of {len(rows)} samples were cut before it (such as sample {one.sample_idx} of "
            f"problem {one.problem_id!r}, arm {one.arm!r}, at {one.total_tokens}); leave it out, or sample with a higher token limit"
        )
    return [row if row.total_tokens <= cap else _cut(row, cap) for row in rows]


def _cut(row: GradeRow, cap: int) -> GradeRow:
    cut = dataclasses.replace(row, finish_reason="length", total_tokens=cap, extracted=None, method="")
    where = f"cut at {cap} of {row.total_tokens} tokens"
    thinking, answer = row.thinking_tokens, row.answer_tokens
    if row.state == "none":
        return dataclasses.replace(cut, outcome="cut", reason=f"{where}, before its end", answer_tokens=answer and cap)
    if thinking is None or answer is None:
        return dataclasses.replace(cut, outcome="truncated", state="truncated", reason=where)
    opens_answer = row.total_tokens - answer - (row.finish_reason == "stop")  # tokens up to the answer, tags included
    if row.state != "truncated" and cap > opens_answer:
        return dataclasses.replace(
            cut, outcome="cut", reason=f"{where}, inside the answer", answer_tokens=cap - opens_answer
        )
    return dataclasses.replace(
        cut,
        outcome="truncated",
        state="truncated",
        reason=f"{where}, inside the thought",
        thinking_tokens=min(thinking, cap),
        answer_tokens=0,
    )


def at_caps(rows: Sequence[GradeRow], caps: Sequence[int], baseline: str = "baseline") -> list[AtCap]:
    """Every pair of arms at every cap, caps in rising order; verdicts after Holm over all of them.

    ValueError for an unknown baseline, for arms that cannot be compared, and for caps that the samples do not reach.
    """
    found = []
    for cap in sorted(set(caps)):
        tables = tables_of(cut_rows(rows, cap))
        if baseline not in tables:
            raise ValueError(f"no arm is named {baseline!r}: the arms are {sorted(tables)}; name the baseline")
        found += [(cap, tables[a], tables[b]) for a, b in default_pairs(list(tables), baseline)]
    parts = [_parts(a, b) for _, a, b in found]
    adjusted = holm([p for *_, p in parts])
    return [_judge(cap, a, b, part, p, len(found)) for (cap, a, b), part, p in zip(found, parts, adjusted, strict=True)]


def finished(row: GradeRow) -> bool:
    """Whether a sample came to its answer. One that is right did, also where the limit cut what came after."""
    return row.correct or (row.outcome not in _UNFINISHED and row.finish_reason != "length")


_Parts = tuple[Difference, Difference, Difference, Difference, float]


def _parts(a: Table, b: Table) -> _Parts:
    """Accuracy, its two parts, the share of samples that finished, and the verdict's p."""
    clusters = clusters_of(a)
    k = len(next(iter(a.rows.values())))
    finishing, right, rates = [], [], ([], [])  # type: ignore[var-annotated]
    for name, rows_a in a.rows.items():
        pairs = list(zip(rows_a, b.rows[name], strict=True))
        finishing.append(sum((y.correct and not finished(x)) - (x.correct and not finished(y)) for x, y in pairs) / k)
        right.append(sum(y.correct - x.correct for x, y in pairs if finished(x) and finished(y)) / k)
        rates[0].append(sum(x.correct for x, _ in pairs) / k)
        rates[1].append(sum(y.correct for _, y in pairs) / k)
    zero = [0.0] * len(right)
    ended = a.means(finished), b.means(finished)
    total, *rest = (
        Difference.of(paired_difference(before, after, clusters, denominator=k, limit=1.0))
        for before, after in (rates, (zero, finishing), (zero, right), ended)
    )
    exact = None
    if k == 1 and clusters is None:
        moved = [after - before for before, after in zip(*rates, strict=True)]
        exact = mcnemar_p(moved.count(1), moved.count(-1))
    return total, rest[0], rest[1], rest[2], verdict_p(total, exact)


def _judge(cap: int, a: Table, b: Table, parts: _Parts, holm_p: float, num: int) -> AtCap:
    total, finishing, right, ended, p_value = parts
    verdict = NOTHING if holm_p >= ALPHA else HELPED if total.mean > 0 else HURT
    where = _where(total, finishing, right, ended) if verdict != NOTHING else ""
    kind = "gain" if total.mean > 0 else "loss"
    after = f" alone, {p_text(holm_p)} after Holm over {num} pairs and caps" if num > 1 else ""
    word = f"a {kind} in {where}" if where != _OPEN else f"a {kind}, {_OPEN}"
    sentence = (
        f"{b.name} against {a.name} at {cap:,} tokens: {verdict}, {points(total.mean)} points ({interval_text(total)}, {p_text(p_value)}"
        f"{after}) = {points(finishing.mean)} by finishing ({interval_text(finishing)}) and {points(right.mean)} by being right where both "
        f"finished ({interval_text(right)})" + (f": {word}." if where else ".")
    )
    share_a, share_b = (sum(table.means(finished)) / len(table.rows) for table in (a, b))
    return AtCap(
        cap=cap,
        a=a.name,
        b=b.name,
        finished_a=share_a,
        finished_b=share_b,
        accuracy=total,
        by_finishing=finishing,
        by_being_right=right,
        p_value=p_value,
        holm_p=holm_p,
        verdict=verdict,
        where=where,
        sentence=sentence,
    )


_FINISHING, _RIGHT, _BOTH = "finishing", "right answers among those finished", "finishing and in right answers"
_OPEN = "in which of the two is not settled"


def _where(total: Difference, finishing: Difference, right: Difference, ended: Difference) -> str:
    """Which part of a shown difference is shown: Holm over the two, each in the direction of the whole. Finishing is one only where the
    share that finished differs too: where as many finish, an arm that is right more often also is among those that only it finished."""
    both = max(verdict_p(finishing, None), verdict_p(ended, None) if ended.mean * total.mean > 0 else 1.0)
    by_p = holm([both, verdict_p(right, None)])
    first, second = (p < ALPHA and part.mean * total.mean > 0 for p, part in zip(by_p, (finishing, right), strict=True))
    return {(True, True): _BOTH, (True, False): _FINISHING, (False, True): _RIGHT, (False, False): _OPEN}[first, second]


def cap_lines(found: Sequence[AtCap]) -> list[str]:
    """One sentence a pair and cap, and for every pair whether its gain was one in finishing alone."""
    lines = [one.sentence for one in found]
    for a, b in dict.fromkeys((one.a, one.b) for one in found):
        mine = [one for one in found if (one.a, one.b) == (a, b)]
        shown = [one for one in mine if one.verdict != NOTHING]
        caps = ", ".join(f"{one.cap:,}" for one in shown)
        if len({one.verdict for one in shown}) == 1 and all(one.where == _FINISHING for one in shown):
            kind = "gain" if shown[0].accuracy.mean > 0 else "loss"
            last = mine[-1]
            end = "" if last in shown else f"; at {last.cap:,} none is shown"
            lines.append(f"{b} against {a}: the {kind} is one in finishing (at {caps} tokens){end}.")
    return lines


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
            Measure.of(proportion_estimate(found[a], clusters)),
            Measure.of(proportion_estimate(found[b], clusters)),
            Difference.of(paired_difference(found[a], found[b], clusters, denominator=smallest, limit=1.0)),
        )
        for a, b in default_pairs(list(tables), baseline)
    ]
