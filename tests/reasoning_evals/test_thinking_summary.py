"""Over- and underthinking of a run's arms against a plain recount."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
from scipy import stats

from graded_rows import false_positive_rate
from reasoning_evals import Problem
from reasoning_evals.comparing.compare import compare_arms
from reasoning_evals.comparing.statistics import proportion_estimate, wilson_interval
from reasoning_evals.runs.run import Arm
from reasoning_evals.thoughts.metrics import (
    AttemptJudge,
    distinct_efficiency,
    judge_by_rule,
    oe_rule,
    trace_thought,
    ut_rule,
)
from reasoning_evals.thoughts.summary import MOST, ThinkingSummary, summarise_thinking
from reasoning_evals.thoughts.table import thinking_notes
from reasoning_evals.thoughts.traced import (
    MEASURES,
    UNREADABLE,
    TracedSample,
    graded_rows,
    shuffled_targets,
    trace_run,
)
from spoken_runs import AGAIN, RIGHT, WRONG, Rambling, Spoken, write_run

ANSWERS = {"p0": "{right}", "p1": "99", "p2": "99", "p3": "{right}"}
LONG = {"p0": RIGHT + AGAIN, "p1": RIGHT + AGAIN + WRONG, "p2": WRONG, "p3": RIGHT}
SHORT = {"p0": RIGHT, "p1": RIGHT + WRONG, "p2": WRONG, "p3": ""}


def words(text: str) -> int:
    return len(text.split())


def traced(folder: Path) -> list[TracedSample]:
    rows = graded_rows(folder)
    place = {(row.arm, row.problem_id, row.sample_idx): index for index, row in enumerate(rows)}
    return sorted(
        trace_run(folder, rows, words), key=lambda one: place[one.row.arm, one.row.problem_id, one.row.sample_idx]
    )


@pytest.fixture
def samples(tmp_path: Path) -> list[TracedSample]:
    return traced(
        write_run(tmp_path / "run", [Arm("baseline", Spoken(LONG, ANSWERS)), Arm("short", Spoken(SHORT, ANSWERS))])
    )


def interval(values: list[float]) -> tuple[float, float]:
    half = stats.t.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def test_the_numbers_by_hand(samples: list[TracedSample]) -> None:
    summary = summarise_thinking(samples)
    baseline, short = summary.arms
    assert (summary.baseline, summary.num_problems, summary.num_samples) == ("baseline", 4, 1)
    assert (baseline.num_samples, baseline.num_thoughts, short.num_thoughts) == (4, 4, 3)
    right, again, wrong = (words(text) for text in (RIGHT, AGAIN, WRONG))
    lengths = [right + again, right + again + wrong, wrong, right]
    first = [right / lengths[0], right / lengths[1], 0.0, 1.0]
    new = [right / lengths[0], (right + wrong) / lengths[1], 1.0, 1.0]
    means = {name: value.mean for name, value in baseline.values.items() if value is not None}
    assert means == pytest.approx(
        {
            "accuracy": 0.5,
            "thinking_tokens": fmean(lengths),
            "closed": 1,
            "truncated": 0,
            "attempts": fmean([2, 3, 1, 1]),
            "stated": 0.75,
            "chance": 0,
            "first_right_at": right,
            "tokens_after_first_right": fmean([again, again + wrong, 0]),
            "outcome_efficiency": fmean(first),
            "new_answer_share": fmean(new),
            "underthinking": fmean([1 - right / lengths[1], 0.0]),  # p1, which had it, and p2, which never did
            "answer_changes": fmean([0, 1, 0, 0]),
            "right_to_wrong": fmean([0, 1, 0, 0]),
            "revisit_rate": fmean([1, 0.5, 0, 0]),
        }
    )
    outcome = baseline.values["outcome_efficiency"]
    assert outcome is not None
    assert (outcome.low, outcome.high) == pytest.approx(proportion_estimate(first)[2:4])
    assert (outcome.num_samples, outcome.num_problems) == (4, 4)
    assert baseline.values["underthinking"] is not None
    assert baseline.values["underthinking"].num_samples == 2
    assert baseline.changes == {}

    change = short.changes["outcome_efficiency"]
    differences = [1 - first[0], right / (right + wrong) - first[1], 0.0]  # p3 has no thought in the short arm
    assert change is not None
    assert (change.mean, change.num_problems) == (pytest.approx(fmean(differences)), 3)
    assert (change.low, change.high) == pytest.approx(interval(differences))
    tokens = short.changes["thinking_tokens"]
    assert tokens is not None
    assert (tokens.mean, tokens.num_problems) == (pytest.approx(-fmean([again, again, 0, right])), 4)


TARGETS = {f"q{i}": str(10 + i) for i in range(30)}


def ramble(folder: Path, clusters: int | None = None) -> tuple[list[TracedSample], dict[str, Rambling]]:
    problems = [
        Problem(name, f"{name}?", target, "integer", cluster_id=None if clusters is None else f"c{i % clusters}")
        for i, (name, target) in enumerate(TARGETS.items())
    ]
    arms = {name: Rambling(shift, TARGETS) for name, shift in (("baseline", 0), ("other", 1))}
    write_run(folder, [Arm(name, sampler) for name, sampler in arms.items()], problems, k=3)
    return traced(folder), arms


def recount(pieces: list[str], right: bool, closes: bool) -> dict[str, float]:
    """The measures of a thought from the pieces that it was put together from."""
    values: dict[str, float] = {"accuracy": right and closes, "closed": closes, "truncated": not closes}
    lengths = [words(piece) for piece in pieces]
    values["thinking_tokens"] = sum(lengths)
    if not pieces:
        return values
    hits = [place for place, piece in enumerate(pieces) if "{right}" in piece]
    values["attempts"] = len(pieces)
    values["stated"] = bool(hits)
    upto = sum(lengths[: hits[0] + 1]) if hits else 0
    if hits:
        values |= {"first_right_at": upto, "tokens_after_first_right": sum(lengths) - upto}
    values["outcome_efficiency"] = upto / sum(lengths)
    if not (right and closes):
        values["underthinking"] = 1 - upto / sum(lengths) if hits else 0
    answers = ["99" if piece == WRONG else "right" if "{right}" in piece else None for piece in pieces]
    fresh = [answer is None or answer not in answers[:place] for place, answer in enumerate(answers)]
    values["new_answer_share"] = sum(n for n, new in zip(lengths, fresh, strict=True) if new) / sum(lengths)
    said = [answer for answer in answers if answer]
    turns = list(itertools.pairwise(said))
    values["answer_changes"] = sum(a != b for a, b in turns)
    values["right_to_wrong"] = turns.count(("right", "99"))
    values["revisit_rate"] = fmean(said[i] in said[:i] for i in range(1, len(said))) if turns else 0
    return values


@pytest.mark.parametrize("clusters", [None, 7])
def test_many_thoughts_against_a_naive_recount(clusters: int | None, tmp_path: Path) -> None:
    samples, arms = ramble(tmp_path / "run", clusters)
    summary = summarise_thinking(samples)
    assert summary.num_clusters == clusters
    group: Callable[[str], str] = lambda name: name if clusters is None else str(int(name[1:]) % clusters)  # noqa: E731
    told = {
        arm: [(name, recount(*what)) for (name, _), what in sorted(sampler.said.items())]
        for arm, sampler in arms.items()
    }
    for arm in summary.arms:
        for measure in MEASURES:
            if measure.name == "chance":
                continue
            found = [(group(name), float(v[measure.name])) for name, v in told[arm.name] if measure.name in v]
            mean = fmean(value for _, value in found)
            sums: dict[str, float] = {}
            for name, value in found:
                sums[name] = sums.get(name, 0) + value - mean
            scale = len(sums) / (len(sums) - 1)
            se = math.sqrt(scale * sum(s * s for s in sums.values())) / len(found)
            t = stats.t.ppf(0.975, len(sums) - 1)
            low, high = mean - t * se, mean + t * se
            if (
                measure.kind == "share" and se > 0
            ):  # of as many trials as have this standard error: where |x - mean| = t se(x); 4 a problem at most where numbers differ
                number = Counter(name for name, v in told[arm.name] if measure.name in v).values()
                most = MOST * len(found) ** 2 / sum(n * n for n in number) if len(set(number)) > 1 else math.inf
                part = t * t / min(most, mean * (1 - mean) / se**2)
                low, high = sorted(np.roots([1 + part, -(2 * mean + part), mean * mean]))
            if measure.kind == "tokens":  # on the logarithm, each group left out in turn
                groups = sorted({name for name, _ in found})
                rest = [fmean(v for name, v in found if name != own) for own in groups]
                se = math.sqrt((len(groups) - 1) / len(groups) * sum(math.log(one / mean) ** 2 for one in rest))
                whole = sum(v for _, v in found)
                shares = [sum(v for name, v in found if name == own) / whole for own in groups]
                reach = stats.t.ppf(0.975, 1 / sum(share**2 for share in shares) - 1) * se
                low, high = mean * math.exp(-reach), mean * math.exp(reach)
            value = arm.values[measure.name]
            assert value is not None
            assert (value.mean, value.low, value.high) == pytest.approx((mean, low, high)), measure.name
            assert value.num_samples == len(found)
    if clusters is None:
        for name, change in summary.arms[1].changes.items():
            if name == "chance":
                continue
            means = []
            for arm_name in ("baseline", "other"):
                by_problem: dict[str, list[float]] = {}
                for problem, values in told[arm_name]:
                    if name in values:
                        by_problem.setdefault(problem, []).append(values[name])
                means.append({problem: fmean(values) for problem, values in by_problem.items()})
            common = sorted(means[0].keys() & means[1].keys())
            reference = stats.ttest_rel([means[1][p] for p in common], [means[0][p] for p in common])
            ends = reference.confidence_interval()
            assert change is not None
            assert (change.low, change.high) == pytest.approx((ends.low, ends.high)), name
            assert change.num_problems == len(common)
    traces = [sample.trace for sample in samples if sample.row.arm == "baseline" and sample.trace]
    rules = {"outcome_efficiency": oe_rule, "new_answer_share": distinct_efficiency, "underthinking": ut_rule}
    for name, rule in rules.items():
        value = summary.arms[0].values[name]
        assert value is not None
        assert value.mean == pytest.approx(rule(traces))


def test_samples_of_one_problem_are_one_witness(samples: list[TracedSample]) -> None:
    many = [
        dataclasses.replace(one, row=dataclasses.replace(one.row, sample_idx=j)) for one in samples for j in range(10)
    ]
    once, often = (summarise_thinking(some).arms[0].values for some in (samples, many))
    for name, value in once.items():
        other = often[name]
        assert value is not None
        assert other is not None
        assert (value.mean, value.low, value.high) == pytest.approx((other.mean, other.low, other.high)), name


def test_accuracies_are_those_of_the_comparison(tmp_path: Path, samples: list[TracedSample]) -> None:
    for some in (samples, ramble(tmp_path / "plain")[0], ramble(tmp_path / "clustered", 7)[0]):
        compared = compare_arms([sample.row for sample in some], baseline="baseline", pairs=[])
        for arm, other in zip(summarise_thinking(some).arms, compared.arms, strict=True):
            found = arm.values["accuracy"]
            assert found is not None
            assert (found.mean, found.low, found.high) == pytest.approx(dataclasses.astuple(other.accuracy))


def test_shares_that_are_all_alike_have_an_interval(samples: list[TracedSample]) -> None:
    closed = summarise_thinking(samples).arms[0].values["closed"]
    assert closed is not None
    assert (closed.low, closed.high) == wilson_interval(4, 4)


def test_the_order_of_samples_changes_nothing(tmp_path: Path) -> None:
    samples, _ = ramble(tmp_path / "run")
    shuffled = random.Random(1).sample(samples, len(samples))

    def by_arm(summary: ThinkingSummary) -> list[object]:
        return sorted(summary.to_dict()["arms"], key=lambda arm: str(arm["name"]))

    assert by_arm(summarise_thinking(shuffled, "baseline")) == by_arm(summarise_thinking(samples, "baseline"))


def test_arms_that_do_not_fit_are_refused(samples: list[TracedSample]) -> None:
    with pytest.raises(ValueError, match="no arm is named 'x': the arms are"):
        summarise_thinking(samples, "x")
    with pytest.raises(ValueError, match="have different problems"):
        summarise_thinking(samples[:-1])
    with pytest.raises(ValueError, match="nothing to compare"):
        summarise_thinking([])


def test_chance_looks_at_every_attempt_and_deals_alike() -> None:
    """A long thought states more answers than are judged in one attempt."""
    seven, eight = (Problem(name, "?", target, "integer") for name, target in (("seven", "7"), ("eight", "8")))
    thought = "First of all we have 1 + 7 = 8. " + "Wait, let me count that again: 1 + 2 = 3. " * 40
    trace = trace_thought(seven, thought, False, words)
    assert sum(len(attempt.stated) for attempt in trace.attempts) == 41
    assert false_positive_rate([seven, eight], [trace, trace_thought(eight, "", False, words)]) == 0.5
    problems = [Problem(f"p{i}", "?", str(i % 5), "integer") for i in range(40)]
    dealt = shuffled_targets(problems * 2, seed=3)
    assert dealt == shuffled_targets(problems * 2, seed=3) != shuffled_targets(problems * 2, seed=4)
    assert all(
        one is not None and one.target != problem.target for one, problem in zip(dealt, problems * 2, strict=True)
    )
    assert dealt[:40] != dealt[40:]


def test_the_judge_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def asks(problem: Problem, answer: str) -> bool:
        asked.append(answer)
        return judge_by_rule(problem, answer)

    monkeypatch.setattr("reasoning_evals.thoughts.metrics.judge_by_rule", asks)
    judge = AttemptJudge()
    other = Problem("j", "?", "7", "integer")
    assert [judge(other, text) for text in ("7", "8", "7", "8")] == [True, False, True, False]
    assert asked == ["7", "8"]
    assert judge.reads_target(other)
    assert not judge.reads_target(Problem("k", "?", "}{", "quantity"))


def test_what_cannot_be_said_is_said(tmp_path: Path, samples: list[TracedSample]) -> None:
    def notes(items: list[TracedSample]) -> list[str]:
        return thinking_notes(items, summarise_thinking(items))

    assert notes(samples) == ["samples without a thought, from attempts on left out: 1 of 4 of short"]
    one = samples[:4]
    assert notes(one) == [
        "baseline is the only arm: nothing is compared; give the folder of another one with --arm-folder"
    ]
    unjudged = [dataclasses.replace(s, unjudged=UNREADABLE, states_shuffled_target=None) for s in one]
    values = summarise_thinking(unjudged).arms[0].values
    assert {name for name, value in values.items() if value} == {
        "accuracy", "thinking_tokens", "closed", "truncated", "attempts",
    }  # fmt: skip
    assert notes(unjudged)[1:] == [
        "problems with a target that no grader can read: 4 (p0, p1, p2 and 1 more), from stated on left out"
    ]
    failed = [dataclasses.replace(s, row=dataclasses.replace(s.row, outcome="grader_error")) for s in one]
    assert notes(failed)[1:] == [
        "no response is wrong, so none underthinks: baseline",
        "the grader failed at 4 of 4 responses: they are not taken for wrong ones",
    ]
    hit = [dataclasses.replace(s, states_shuffled_target=True) for s in one]
    assert "thoughts often state the answer to ANOTHER problem (baseline 100.0%): a right one means little there" in (
        notes(hit)
    )
    none = [dataclasses.replace(s, states_shuffled_target=None) for s in one]
    assert "no chance rate (baseline): no problem has another answer of the same type to look for" in notes(none)
    boxed = [dataclasses.replace(s, boxed_only=s.row.problem_id == "p1") for s in one]
    assert (
        "problems that ask for a formula or a list: 1, seen in boxes and after 'answer is' alone, so stated is a lower bound"
        in notes(boxed)
    )
