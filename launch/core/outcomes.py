"""From what a user names (traces, texts, tokens, places) to the readings of an outcome."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

from expert_stats.causes import Causes, Reading, find_causes, loop_odds, right_against_wrong, text_loss, token_odds
from launch.core.ranks import Ranks
from launch.core.wiring import read_any_traces, text_lines
from moe_steer.backends import layout_of
from moe_steer.thinking import thinking_format
from moe_steer.tokens import MarkerSet, Trace, scoped_positions
from reasoning_evals import loop_at_end
from reasoning_evals.runs import RUN_FILE, grade_run, sample_name

DECISIONS = "decisions"
"""Places of thoughts at which one of the named tokens, or the tag that ends a thought, came next."""


def is_run(path: str) -> bool:
    """Whether a path is the folder of a run, whose answers can be graded."""
    return Path(path, RUN_FILE).is_file()


def graded_answers(paths: Sequence[str]) -> dict[str, bool]:
    """trace_id -> whether the answer is right, of all samples of runs. ValueError for what is no folder of a run."""
    found: dict[str, bool] = {}
    for path in paths:
        if not is_run(path):
            raise ValueError(f"{path} is no folder of a run, so nobody knows which answers are right: give one")
        found |= {sample_name(row): row.correct for row in grade_run(path)}
    return found


def split_by_grade(paths: Sequence[str], tokenizer: Any, arm: str | None) -> tuple[list[Trace], list[Trace]]:
    """(right, wrong) traces of graded runs. ValueError for what is no folder of a run."""
    right: list[Trace] = []
    wrong: list[Trace] = []
    for path in paths:
        if not is_run(path):
            raise ValueError(
                f"{path} is no folder of a run, so nobody knows which answers are right: give the wrong ones with --against"
            )
        answers = graded_answers([path])
        for trace in read_any_traces([path], tokenizer, arm):
            (right if answers.get(trace.trace_id) else wrong).append(trace)
    return right, wrong


def right_wrong_readings(
    traces: Sequence[str], against: Sequence[str], tokenizer: Any, arm: str | None
) -> list[Reading]:
    """Of graded runs, or of right traces ``against`` wrong ones."""
    if not against:
        return right_against_wrong(*split_by_grade(traces, tokenizer, arm))
    return right_against_wrong(read_any_traces(traces, tokenizer, arm), read_any_traces(against, tokenizer, arm))


def token_readings(traces: Sequence[Trace], tokenizer: Any, tokens: Sequence[str], at: str) -> list[Reading]:
    """Log-odds of the named tokens (default: the tag that ends a thought) at the `DECISIONS`, or wherever a scope holds; by default also
    where a thought ended."""
    names = tuple(tokens) or (closing_tag(tokenizer),)
    if at == DECISIONS:
        return token_odds(traces, _decisions(traces, tokenizer, names), first_tokens(tokenizer, names))
    places = {}
    for trace in traces:
        found = scoped_positions(at, tokenizer, trace.token_ids, trace.prompt_length)
        if not tokens and trace.thought_end is not None and trace.thought_end > trace.prompt_length:
            found = [*found, trace.thought_end - 1]
        places[trace.trace_id] = found
    return token_odds(traces, places, first_tokens(tokenizer, names))


def _decisions(traces: Sequence[Trace], tokenizer: Any, names: Sequence[str]) -> dict[str, list[int]]:
    """ValueError for names that a thought can only end with: where both sides of the decision are one, there is none."""
    close = closing_tag(tokenizer)
    if not set(names) - {close, "</think>"}:
        raise ValueError(
            f"at decisions a thought ends with {close} or goes on: name the tokens with which it goes on, such as Wait"
        )
    markers = MarkerSet.from_tokenizer(tokenizer, names, split_tags=True)
    found = {}
    for trace in traces:
        spans = [span for spans in markers.find_occurrences(trace.token_ids).values() for span in spans]
        inside = {span.start - 1 for span in spans if trace.thought and span.start in trace.thought}
        ends = (
            {trace.thought_end - 1}
            if trace.thought_end is not None and trace.thought_end < len(trace.token_ids)
            else set()
        )
        found[trace.trace_id] = [place for place in inside | ends if place >= trace.prompt_length - 1]
    return found


def token_words(tokenizer: Any, tokens: Sequence[str], at: str) -> str:
    """What ``token_readings`` reads, in words."""
    return f"log-odds that {' or '.join(tokens or (closing_tag(tokenizer),))} comes next, at {at}"


def closing_tag(tokenizer: Any) -> str:
    """The tag that ends a thought. ValueError for a model that does not think."""
    fmt = thinking_format(tokenizer)
    if not fmt.thinks:
        raise ValueError("this model does not think, so no tag ends a thought: name the next tokens with --tokens")
    return fmt.close.strip()


def first_tokens(tokenizer: Any, names: Sequence[str]) -> list[int]:
    """The tokens that the named words and tags are, in each form that is one token; of others the first token of their forms."""
    found: list[int] = []
    for marker in MarkerSet.from_tokenizer(tokenizer, names, split_tags=True).markers:
        whole = [form for form in marker.forms if len(form) == 1]
        found += [form[0] for form in whole or marker.forms]
    return found


def loop_readings(traces: Sequence[Trace]) -> list[Reading]:
    """Log-odds that the loops with which traces end go on."""
    loops = {trace.trace_id: loop_at_end(trace.token_ids[trace.prompt_length :]) for trace in traces}
    return loop_odds(traces, loops)


def loss_readings(texts: Sequence[str], tokenizer: Any) -> list[Reading]:
    """Loss of texts, one a line of the named files; a line is a unit."""
    lines = ((f"{name}#{n}", line) for name in texts for n, line in enumerate(text_lines(name), 1))
    return text_loss({name: list(tokenizer(line)["input_ids"]) for name, line in lines})


class Dealt(TypedDict):
    """How passes over traces are dealt out to ranks, for `expert_stats`."""

    share: tuple[int, int]
    add: Callable[[Any], Any]


def dealt_out(model: Any, ranks: Ranks) -> Dealt:
    """Each rank its share, and the sums added up. Where one model stretches over the ranks all of them run all batches: a backward pass is
    collective too."""
    layout = layout_of(model)
    alike = layout.same_tokens or layout.lockstep
    return {"share": (0, 1) if alike else layout.share, "add": (lambda part: part) if alike else ranks.add}


def causes_over_ranks(
    model: Any, readings: Sequence[Reading], ranks: Ranks, kind: str, words: str, **options: Any
) -> Causes:
    """What turning each expert up or down does to an outcome, on every rank the same. ``options``: those of ``find_causes``."""
    places = sum(len(item.at) for item in readings)
    outcome = {"kind": kind, "words": words, "places": places}
    return find_causes(
        model, readings, outcome=outcome, watch=watch_on_terminal(ranks.is_main), **dealt_out(model, ranks), **options
    )


def decision_causes(
    model: Any, tokenizer: Any, traces: Sequence[Trace], tokens: Sequence[str], ranks: Ranks, wanted: str
) -> Causes:
    """What every expert does, by its derivative alone, to the odds that a thought goes on with one of the tokens where it went on or ended."""
    readings = token_readings(traces, tokenizer, tokens, DECISIONS)
    words = token_words(tokenizer, tokens, DECISIONS)
    return causes_over_ranks(model, readings, ranks, "tokens", words, wanted=wanted, each=0)


def watch_on_terminal(shows: bool) -> Any:
    """A progress bar on a terminal; nothing elsewhere."""
    from moe_steer.console import tracked

    return lambda label, items: tracked(items, label, shown=None if shows else False)
