"""A probe with a stated mis-exit rate: as a file, what it reads while a model decodes, the rate held against what a run shows; and every exit point
of a run's thoughts tried out, which is what the rate is stated from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_steer.gates import Probe
from moe_steer.json_files import check_types, record_of
from moe_steer.layers import model_shape
from moe_steer.observe import observe_residual
from moe_steer.thinking import TokenTags, thinking_format, token_tags
from moe_steer.tokens import Trace
from reasoning_evals.comparing import RiskControl, lost_answers
from reasoning_evals.decoding import ProbeExit, exit_points
from reasoning_evals.engines import InProcessSampler, Request, SamplingConfig
from reasoning_evals.grading import grade_thought
from reasoning_evals.runs import GradeRow, grade_run, run_problems, sample_name, sample_seed

_KEY = "early_exit"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitProbe:
    """A probe, and how its threshold was calibrated for ending thoughts: the header's ``early_exit``."""

    probe: Probe
    every: int
    """Every so many step ends of a thought are exit points."""
    control: RiskControl
    sampling: Mapping[str, Any]
    """Temperature and so on of the run that it was calibrated on."""

    def save(self, path: str) -> None:
        """Write the probe's file."""
        about = {**dataclasses.asdict(self.control), "every": self.every, "sampling": dict(self.sampling)}
        header = {**self.probe.header, _KEY: about}
        dataclasses.replace(self.probe, threshold=self.control.threshold, header=header).save(path)

    @classmethod
    def load(cls, path: str) -> ExitProbe:
        """ValueError in one line for a file that is none, and for a probe without a stated rate."""
        probe = Probe.load(path)
        about = probe.header.get(_KEY)
        if about is None:
            raise ValueError(
                f"{path} is a probe without a stated mis-exit rate: calibrate it with 'moe-steer early-exit RUN --probe {path} --out FILE'"
            )
        where = f"{path}, {_KEY}"
        about = dict(check_types(about, where, {"every": int, "sampling": dict}))
        every, sampling = about.pop("every"), about.pop("sampling")
        return cls(probe=probe, every=every, control=record_of(RiskControl, about, where), sampling=sampling)

    def about(self) -> dict[str, Any]:
        """What identifies it in run.json."""
        return {
            "probe": self.probe.digest(),
            "layer": self.probe.layer,
            "calibration": {**dataclasses.asdict(self.control), "sampling": dict(self.sampling)},
        }


class ProbeReading:
    """The probabilities of a probe at the last tokens of the last forward."""

    def __init__(self, exit_probe: ExitProbe) -> None:
        self.exit_probe = exit_probe
        self._last_B: Tensor | None = None

    def __call__(self) -> Tensor:
        assert self._last_B is not None, "no forward of the model was watched"
        return self._last_B

    def rule(self, tags: TokenTags, step_ends: Sequence[int]) -> ProbeExit:
        """The decoding rule that reads here."""
        found = self.exit_probe
        return ProbeExit(
            tags=tags,
            step_ends=tuple(step_ends),
            every=found.every,
            threshold=found.control.threshold,
            read=self,
            about=found.about(),
        )

    def context(self, model: Any) -> Callable[[], AbstractContextManager[Any]]:
        """In which every forward of the model is read. ValueError for a probe of another model."""
        probe = self.exit_probe.probe
        probe.check(model_shape(model))

        def read(layer: int, hidden_BSD: Tensor) -> None:
            self._last_B = probe.probability(hidden_BSD[:, -1])

        @contextmanager
        def watching() -> Iterator[None]:
            with observe_residual(model, [probe.layer], read):
                yield

        return watching


def reading_of(rule: ProbeExit) -> ProbeReading:
    """What a rule that ``ProbeReading.rule`` made reads."""
    assert isinstance(rule.read, ProbeReading)
    return rule.read


def mis_exits(arm: Mapping[str, Any], rows: Iterable[GradeRow], baseline: str, name: str) -> dict[str, Any] | None:
    """Of an arm that ends thoughts on a probe: the stated rate, the share of samples that were right and no longer are, with its
    interval over problems, and both in a sentence. None for other arms. ``arm``: its entry in run.json."""
    rules = [rule for rule in arm["details"].get("decoding", ()) if rule["rule"] == "probe_exit"]
    if not rules:
        return None
    calibration = rules[0]["calibration"]
    seen = lost_answers(rows, baseline, name)
    sentence = (
        f"{name}: states that it loses at most {100 * calibration['rate']:g}% of a problem's samples in expectation; here it lost "
        f"{100 * seen.mean:.1f}% ({100 * max(0.0, seen.low):.1f} to {100 * seen.high:.1f}) that {baseline} solved"
    )
    numbers = {key: getattr(seen, key) for key in ("mean", "low", "high", "num_problems")}
    return {"stated": calibration["rate"], "seen": numbers, "calibration": calibration, "sentence": sentence}


def exit_warnings(found: Mapping[str, Mapping[str, Any]], sampling: Mapping[str, Any]) -> list[str]:
    """What voids a stated rate: other sampling than that of the calibration, or a run that shows a higher one."""
    said = []
    for name, one in found.items():
        made = one["calibration"]["sampling"]
        other = sorted(key for key in made if key in sampling and made[key] != sampling[key])
        if other and not (made.get("greedy") and sampling.get("greedy")):
            said.append(
                f"{name}: its mis-exit rate was stated for {other[0]} {made[other[0]]}, this run has {sampling[other[0]]}: it need not hold"
            )
        if one["seen"]["low"] > one["stated"]:
            said.append(
                f"{name}: more right answers were lost than the stated rate allows: these problems are of another kind than those that "
                "calibrated it; calibrate it on problems like these"
            )
    return said


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
    read: Sequence[Trace],
    model: Any,
    tokenizer: Any,
    config: SamplingConfig,
    *,
    step_ends: Sequence[int],
    every: int,
    watch: Any = lambda label, items, total: items,
) -> list[Tried]:
    """The samples of a graded run that have exit points. ``read``: its traces; ``config``: how the answers behind exits are sampled, as the
    run's were.

    The closing tag is written behind each exit point, and the model goes on. An answer that the token limit cuts is not right.
    """
    tags, fmt = token_tags(tokenizer), thinking_format(tokenizer)
    if tags is None:
        raise ValueError(f"an exit ends a thought, and {fmt.describe()}: name the tags with --thinking")
    problems = {problem.problem_id: problem for problem in run_problems(Path(folder))}
    rows = {sample_name(row): row for row in grade_run(folder)}
    traces = [trace for trace in read if trace.thought_start is not None]
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
