"""From what a user names (traces, texts, tokens, places) to the readings of an outcome."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expert_stats.causes import Reading, loop_odds, right_against_wrong, text_loss, token_odds
from launch.core.wiring import read_any_traces, text_lines
from moe_steer.thinking import thinking_format
from moe_steer.tokens import MarkerSet, Trace, scoped_positions
from reasoning_evals.runs import grade_run
from reasoning_evals.thinking import loop_at_end


def graded_answers(paths: Sequence[str]) -> dict[str, bool]:
    """trace_id -> whether the answer is right, of all samples of runs. ValueError for what is no folder of a run."""
    found: dict[str, bool] = {}
    for path in paths:
        if not Path(path, "run.json").is_file():
            raise ValueError(f"{path} is no folder of a run, so nobody knows which answers are right: give one")
        rows = grade_run(path)
        found |= {f"{row.arm}/{row.task}/{row.problem_id}#{row.sample_idx}": bool(row.correct) for row in rows}
    return found


def split_by_grade(paths: Sequence[str], tokenizer: Any, arm: str | None) -> tuple[list[Trace], list[Trace]]:
    """(right, wrong) traces of graded runs. ValueError for what is no folder of a run."""
    right: list[Trace] = []
    wrong: list[Trace] = []
    for path in paths:
        if not Path(path, "run.json").is_file():
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


def token_readings(traces: Sequence[Trace], tokenizer: Any, tokens: Sequence[str], scope: str) -> list[Reading]:
    """Log-odds of the named tokens (default: the tag that ends a thought) wherever ``scope`` holds, and where a thought ended."""
    names = tuple(tokens) or (closing_tag(tokenizer),)
    places = {}
    for trace in traces:
        found = scoped_positions(scope, tokenizer, trace.token_ids, trace.prompt_length)
        if not tokens and trace.thought_end is not None and trace.thought_end > trace.prompt_length:
            found = [*found, trace.thought_end - 1]
        places[trace.trace_id] = found
    return token_odds(traces, places, first_tokens(tokenizer, names))


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
