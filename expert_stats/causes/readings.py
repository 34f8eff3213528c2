"""What is read from a model's logits: the outcomes whose causes are looked for, over the units that they are averaged over.

An outcome is a mean over problems; a problem's value is a weighted sum over the places that its readings name:

    right-wrong   log p(right response) - log p(wrong response): means over the responses of each side
    tokens        log-odds of given next tokens at decision points: mean over the points of a trace, then over traces
    loop          log-odds that a loop goes on: of the token that stood one period earlier, at the places inside the loop
    loss          minus the mean log p of a text's tokens
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from expert_stats.trace_counts import problem_of
from moe_steer.tokens import Trace

OUTCOMES = ("right-wrong", "tokens", "loop", "loss")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One sequence, and what is read from it: the sum over places ``at`` of log p, or log-odds, of a set of next tokens.

    ``problem`` is the unit of resampling. ``tokens``: a set of token ids for each place, all of one size. ``odds``: log p of the
    set minus log p of everything else, instead of log p. ``weight`` multiplies the sum.
    """

    name: str
    problem: str
    token_ids: tuple[int, ...]
    at: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]
    odds: bool
    weight: float

    def __post_init__(self) -> None:
        if (
            not self.at
            or list(self.at) != sorted(set(self.at))
            or not 0 <= self.at[0] <= self.at[-1] < len(self.token_ids)
        ):
            raise ValueError(
                f"{self.name!r} is read at {list(self.at)[:8]}: give ascending places in its {len(self.token_ids)} tokens"
            )
        if len(self.tokens) != len(self.at) or len({len(one) for one in self.tokens}) != 1 or not self.tokens[0]:
            raise ValueError(
                f"{self.name!r} is read at {len(self.at)} places: give as many token sets, all of one size"
            )

    @property
    def needed(self) -> int:
        """Tokens up to the last place; later ones change nothing."""
        return self.at[-1] + 1

    @property
    def pair(self) -> None:
        """Readings share no row."""


def right_against_wrong(right: Iterable[Trace], wrong: Iterable[Trace]) -> list[Reading]:
    """log p(right) - log p(wrong) of the responses to each problem that has both. ValueError when none has."""
    sides: list[dict[str, list[Trace]]] = [defaultdict(list), defaultdict(list)]
    for side, traces in zip(sides, (right, wrong), strict=True):
        for trace in traces:
            if trace.prompt_length and len(trace.token_ids) > trace.prompt_length:
                side[problem_of(trace.trace_id)].append(trace)
    both = sorted(set(sides[0]) & set(sides[1]))
    if not both:
        raise ValueError(
            f"no problem has both a right and a wrong trace ({len(sides[0])} have right ones, {len(sides[1])} wrong ones): "
            "sample several answers a problem"
        )
    found = []
    for problem in both:
        for sign, side, word in ((1.0, sides[0], "right"), (-1.0, sides[1], "wrong")):
            traces = side[problem]
            for trace in traces:
                places = range(trace.prompt_length - 1, len(trace.token_ids) - 1)
                name = f"{trace.trace_id} ({word})"
                found.append(_next_tokens(name, problem, trace.token_ids, places, sign / len(traces)))
    return found


def token_odds(traces: Iterable[Trace], places: Mapping[str, Sequence[int]], tokens: Sequence[int]) -> list[Reading]:
    """Log-odds that one of ``tokens`` comes next, at the given places of each trace (by trace_id). ValueError without any."""
    wanted = tuple(dict.fromkeys(int(token) for token in tokens))
    named = [(trace, tuple(sorted(set(places.get(trace.trace_id, ()))))) for trace in traces]
    return _of_traces([(trace, at, (wanted,) * len(at)) for trace, at in named], "hold no decision point")


def loop_odds(traces: Iterable[Trace], loops: Mapping[str, tuple[int, int]]) -> list[Reading]:
    """Log-odds that a loop goes on. ``loops``: trace_id -> (period, length) of the loop with which the trace ends.

    Read from the end of the loop's first round on: there the next token is the one that stood a period earlier. The last place is
    that of the last token but one. ValueError without any loop.
    """
    rows: list[tuple[Trace, tuple[int, ...], tuple[tuple[int, ...], ...]]] = []
    for trace in traces:
        period, length = loops.get(trace.trace_id, (0, 0))
        size = len(trace.token_ids)
        at = tuple(range(size - length + period - 1, size - 1)) if period else ()
        rows.append((trace, at, tuple((trace.token_ids[place + 1],) for place in at)))
    return _of_traces(rows, "end in no loop")


def text_loss(texts: Mapping[str, Sequence[int]]) -> list[Reading]:
    """Minus the mean log p of each text's tokens but the first; a text is a unit. ValueError for texts of one token."""
    found = []
    for name, ids in texts.items():
        if len(ids) < 2:
            raise ValueError(f"the text {name!r} has {len(ids)} tokens: give texts of at least 2")
        found.append(_next_tokens(name, name, tuple(ids), range(len(ids) - 1), -1.0 / (len(ids) - 1)))
    return found


def _next_tokens(name: str, problem: str, ids: tuple[int, ...], places: range, weight: float) -> Reading:
    tokens = tuple((ids[place + 1],) for place in places)
    return Reading(
        name=name, problem=problem, token_ids=ids, at=tuple(places), tokens=tokens, odds=False, weight=weight
    )


def _of_traces(rows: list[tuple[Trace, tuple[int, ...], tuple[tuple[int, ...], ...]]], nothing: str) -> list[Reading]:
    used = [row for row in rows if row[1]]
    if not used:
        raise ValueError(f"the {len(rows)} traces {nothing}: give others, or another outcome")
    number: dict[str, int] = defaultdict(int)
    for trace, _, _ in used:
        number[problem_of(trace.trace_id)] += 1
    return [
        Reading(
            name=trace.trace_id,
            problem=problem_of(trace.trace_id),
            token_ids=trace.token_ids,
            at=at,
            tokens=tokens,
            odds=True,
            weight=1.0 / len(at) / number[problem_of(trace.trace_id)],
        )
        for trace, at, tokens in used
    ]
