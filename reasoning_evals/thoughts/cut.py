"""What leaks after a cut: how much a model goes on thinking once a budget has ended its thought, measured on the samples of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_steer.thinking import ANSWER, THOUGHT, TokenTags
from reasoning_evals.comparing import cluster_names, mean_estimate
from reasoning_evals.report import Table
from reasoning_evals.runs import Completion, GradeRow, read_generations, read_run, run_thoughts
from reasoning_evals.thoughts.segments import segment_thought

_BUDGETS = ("thinking_budget", "soft_budget")
HELD = "prompt_holds"
"""In the details of an arm: tokens of the thought that its prompts hold already, the line break of R1's template for one."""


@dataclass(frozen=True, kw_only=True)
class CutThoughts:
    """The samples of one arm whose first thought reached its budget. Means over those samples; tokens as the model's."""

    arm: str
    budget: int
    samples: int
    cut: int
    """Samples whose first thought held as many tokens as the budget, or more."""
    over: float | None
    """Tokens of that thought beyond the budget: the grace that it used. None where nothing was cut, as for what follows."""
    reopened: float | None
    """Tokens of thoughts that were opened again behind it."""
    talking: float | None
    """Share of the answers in which a sentence begins a new attempt or a check, such as one with Wait."""
    talking_baseline: float | None
    """The same of the baseline's answers to these samples."""
    paired: int
    """Cut samples that, in both arms, came to the end of an answer."""
    leak: float | None
    """Over these: reopened tokens, and tokens of the answer more than the baseline's answer to the same sample has."""
    leak_low: float | None
    leak_high: float | None
    """95% interval of ``leak``, over problems."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def cut_thoughts(folder: Path | str, rows: Iterable[GradeRow], baseline: str) -> list[CutThoughts]:
    """One for each arm of a run that has a budget. ``rows``: the run's grades."""
    config = read_run(Path(folder))["config"]
    budgets = {name: number for name in config["arm_order"] if (number := _budget(config["arms"][name])) is not None}
    if not budgets:
        return []
    graded = {(row.arm, row.problem_id, row.sample_idx): row for row in rows}
    said: dict[tuple[str, str, int], Completion] = {
        (item.arm, item.problem_id, item.sample_idx): item for item in read_generations(Path(folder))
    }
    return [_of_arm(name, number, config, graded, said, baseline) for name, number in budgets.items()]


def thought_lengths(ids: Sequence[int], opened: bool, tags: TokenTags) -> list[int]:
    """Tokens of each thought of a response, in order, tags not counted; ``opened``: the prompt ends inside the first.

    >>> thought_lengths([5, 6, 2, 8, 1, 7, 2, 9], opened=True, tags=TokenTags.of_pair((1,), (2,)))
    [2, 1]
    """
    found = [0] if opened else []
    inside = opened
    position = 0
    while position < len(ids):
        tag = tags.at(ids, position)
        if tag is None:
            if inside:
                found[-1] += 1
            position += 1
            continue
        form, phase, _ = tag
        if phase == THOUGHT and not inside:
            found.append(0)
        inside = phase == THOUGHT or (inside and phase != ANSWER)
        position += len(form)
    return found


def _budget(arm: Mapping[str, Any]) -> int | None:
    rules = [rule for rule in arm["details"].get("decoding", ()) if rule["rule"] in _BUDGETS]
    return int(rules[0]["num_tokens"]) if rules else None


def _of_arm(
    name: str,
    budget: int,
    config: Mapping[str, Any],
    graded: Mapping[tuple[str, str, int], GradeRow],
    said: Mapping[tuple[str, str, int], Completion],
    baseline: str,
) -> CutThoughts:
    readers = run_thoughts(config)
    reader, held = readers[name], int(config["arms"][name]["details"].get(HELD, 0))
    leaks: dict[str, list[int]] = {}
    over, reopened, talking, talking_baseline = [], [], [], []
    mine = [key for key in said if key[0] == name]
    assert reader.tags is not None, "a budget has tags"
    for key in mine:
        item = said[key]
        thoughts = thought_lengths(item.token_ids, reader.opens(item.prompt), reader.tags)
        first = thoughts[0] + held * reader.opens(item.prompt) if thoughts else 0
        if not thoughts or first < budget or graded[key].state not in ("closed", "empty"):
            continue
        again = sum(thoughts[1:])
        over.append(first - budget)
        reopened.append(again)
        talking.append(_switches(reader.split(item.text, item.prompt).answer))
        other = said.get((baseline, *key[1:]))
        if other is None or name == baseline:
            continue
        talking_baseline.append(_switches(readers[baseline].split(other.text, other.prompt).answer))
        rows = (graded[key], graded[baseline, key[1], key[2]])
        lengths = [row.answer_tokens for row in rows if row.finish_reason == "stop" and row.answer_tokens is not None]
        if len(lengths) == 2:
            leaks.setdefault(key[1], []).append(again + lengths[0] - lengths[1])
    per_problem = [sum(values) / len(values) for values in leaks.values()]
    cluster_of = {key[1]: graded[key].cluster_id for key in mine}
    clusters = cluster_names({problem: cluster_of[problem] for problem in leaks})
    estimate = mean_estimate(per_problem, clusters) if len(set(clusters or leaks)) > 1 else None
    return CutThoughts(
        arm=name,
        budget=budget,
        samples=len(mine),
        cut=len(over),
        over=_mean(over),
        reopened=_mean(reopened),
        talking=_mean(talking),
        talking_baseline=_mean(talking_baseline),
        paired=sum(len(values) for values in leaks.values()),
        leak=_mean(per_problem),
        leak_low=estimate.low if estimate else None,
        leak_high=estimate.high if estimate else None,
    )


def _switches(answer: str) -> bool:
    return len(segment_thought(answer)) > 1


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def cut_line(one: CutThoughts) -> str:
    """An arm's cut thoughts in a sentence."""
    said = f"{one.arm}: {one.cut} of {one.samples} thoughts reached the budget of {one.budget} tokens"
    if not one.cut:
        return said
    said += f", {one.over:.1f} tokens over it on average"
    if one.leak is None:
        return said + "; no leak can be measured: no such sample has an answer in both arms"
    interval = "" if one.leak_low is None else f" ({one.leak_low:+.1f} to {one.leak_high:+.1f})"
    return said + (
        f"; after the cut {one.leak:+.1f} tokens{interval} leak into the answer, against the baseline's answers to the same {one.paired} samples"
    )


def cut_table(cuts: Sequence[CutThoughts]) -> Table:
    """The cut thoughts of all arms, for the page."""

    def number(value: float | None, form: str = ".1f") -> str:
        return "–" if value is None else format(value, form)

    head = ["arm", "budget", "cut", "over", "reopened", "new attempts in the answer", "the baseline's", "leak", "95%"]
    rows = [
        [
            one.arm,
            str(one.budget),
            f"{one.cut} of {one.samples}",
            number(one.over),
            number(one.reopened),
            number(one.talking, ".1%"),
            number(one.talking_baseline, ".1%"),
            number(one.leak, "+.1f"),
            "–" if one.leak_low is None else f"{one.leak_low:+.1f} to {one.leak_high:+.1f}",
        ]
        for one in cuts
    ]
    return Table(head=head, rows=rows)
