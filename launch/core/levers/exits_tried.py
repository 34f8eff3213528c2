"""Every exit point of a run's thoughts tried out: what the model answers when its thought ends there, and what a probe reads there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.core.wiring import read_any_traces
from moe_steer.observe import observe_residual
from moe_steer.thinking import thinking_format, token_tags
from moe_steer.tokens import Trace
from reasoning_evals.decoding import exit_points
from reasoning_evals.engines import InProcessSampler, Request, SamplingConfig
from reasoning_evals.grading import grade_thought
from reasoning_evals.runs import grade_run, run_problems, sample_seed


@dataclass(frozen=True, kw_only=True)
class Tried:
    """The exit points of one sample, in order."""

    problem_id: str
    trace: Trace
    right: bool
    """Whether the whole response is right."""
    points: tuple[int, ...]
    """Positions in the trace."""
    answers: tuple[bool, ...]
    """Whether the answer behind each is right."""

    @property
    def harms(self) -> tuple[bool, ...]:
        """Whether an exit at each point loses a right answer."""
        return tuple(self.right and not answer for answer in self.answers)


def try_exits(
    folder: str,
    arm: str,
    model: Any,
    tokenizer: Any,
    config: SamplingConfig,
    *,
    step_ends: Sequence[int],
    every: int,
    watch: Any = lambda label, items, total: items,
) -> list[Tried]:
    """The samples of a graded run that have exit points. ``config``: how the answers behind exits are sampled, as the run's were.

    The closing tag is written behind each exit point, and the model goes on. An answer that the token limit cuts is not right.
    """
    tags, fmt = token_tags(tokenizer), thinking_format(tokenizer)
    if tags is None:
        raise ValueError(f"an exit ends a thought, and {fmt.describe()}: name the tags with --thinking")
    problems = {problem.problem_id: problem for problem in run_problems(Path(folder))}
    rows = {f"{row.arm}/{row.task}/{row.problem_id}#{row.sample_idx}": row for row in grade_run(folder)}
    traces = [trace for trace in read_any_traces([folder], tokenizer, arm) if trace.thought_start is not None]
    points = {trace.trace_id: _points(trace, step_ends, every) for trace in traces}
    asked = [
        Request(
            prompt_ids=(*trace.token_ids[: place + 1], *tags.close),
            seed=sample_seed(0, "early exit", trace.trace_id, place),
            key=(trace.trace_id, place),
        )
        for trace in traces
        for place in points[trace.trace_id]
    ]
    if not asked:
        raise ValueError(f"{folder} holds no thought with an exit point: give a run whose thoughts have steps")
    prompts = {trace.trace_id: trace.prompt_length for trace in traces}
    behind: dict[tuple[str, int], bool] = {}
    by_key = {request.key: request for request in asked}
    samples = InProcessSampler(model, tokenizer).sample(asked, config)
    for sample in watch("exits tried", samples, len(asked)):
        name, _ = sample.key
        thought = tokenizer.decode(by_key[sample.key].prompt_ids[prompts[name] :], clean_up_tokenization_spaces=False)
        split = fmt.split(thought + sample.text, opened=True)
        judged = grade_thought(problems[rows[name].problem_id], split)
        behind[sample.key] = judged.outcome == "correct" and sample.finish_reason == "stop"
    return [
        Tried(
            problem_id=rows[trace.trace_id].problem_id,
            trace=trace,
            right=rows[trace.trace_id].correct,
            points=tuple(points[trace.trace_id]),
            answers=tuple(behind[trace.trace_id, place] for place in points[trace.trace_id]),
        )
        for trace in traces
    ]


def hidden_at(model: Any, tried: Sequence[Tried], layer: int) -> Iterator[Tensor]:
    """For each sample float32 [points, D]: the residual stream behind ``layer`` at its exit points, one forward a sample."""
    found: list[Tensor] = []
    for item in tried:
        if not item.points:
            yield torch.zeros(0, 0)
            continue
        found.clear()
        ids_1S = torch.tensor([item.trace.token_ids[: item.points[-1] + 1]], device=model.device)
        with (
            torch.no_grad(),
            observe_residual(model, [layer], lambda _, hidden_BSD: found.append(hidden_BSD), stop=True),
        ):
            model(ids_1S, use_cache=False)
        yield found[0][0, list(item.points)].float().cpu()


def by_problem(tried: Sequence[Tried], scores: Sequence[Sequence[float]]) -> Mapping[str, list[list[Any]]]:
    """problem -> its samples' exit points, with their scores."""
    from reasoning_evals.comparing import ExitPoint

    found: dict[str, list[list[Any]]] = {}
    for item, numbers in zip(tried, scores, strict=True):
        sample = [ExitPoint(score=score, harms=harm) for score, harm in zip(numbers, item.harms, strict=True)]
        found.setdefault(item.problem_id, []).append(sample)
    return found


def _points(trace: Trace, step_ends: Sequence[int], every: int) -> list[int]:
    """Without one right before the end: there the model exits by itself."""
    assert trace.thought_start is not None
    stop = len(trace.token_ids) - 1 if trace.thought_end is None else trace.thought_end
    places = exit_points(trace.token_ids, trace.prompt_length, trace.thought_start, stop, step_ends, every)
    return [place for place in places if place + 1 != trace.thought_end]
