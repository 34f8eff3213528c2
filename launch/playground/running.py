"""The columns of a run, side by side: each in a thread of its own, on a copy of the model that shares the weights and has its own
hooks; or by a server."""

from __future__ import annotations

import copy
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from launch.core.levers.arm_building import parts_of
from launch.core.served.connection import Connection
from launch.playground.asked import MOST, Asked, Column
from launch.playground.readings import Readings, Stopped
from moe_steer import SteeringPlan, steer
from moe_steer.backends import layout_of
from moe_steer.direction import VectorFile
from moe_steer.errors import one_line
from moe_steer.layers import ModelShape
from reasoning_evals import Completion
from reasoning_evals.engines import HttpSampler, InProcessSampler, Request, Sample
from reasoning_evals.engines.http_reply import Reply
from reasoning_evals.prompts import RenderedPrompt
from reasoning_evals.runs import GradeRow, arm_thoughts, judge_one, sample_seed


@dataclass
class Answer:
    """One column while it runs and after. ``state``: waiting, running, done, stopped or failed. ``error``: why it failed, in a line."""

    column: Column
    readings: Readings | None = None
    state: str = "waiting"
    error: str = ""
    prompt: str = ""
    token_ids: tuple[int, ...] = ()
    """All of them, once it is done."""
    grade: GradeRow | None = None
    seconds: float = 0.0
    reply: Reply | None = None
    """What a server has sent so far."""
    reader: Any = None
    """How the thought is told from the answer: an ``ArmThoughts``."""

    @property
    def ended(self) -> bool:
        """Whether nothing more comes."""
        return self.state in ("done", "stopped", "failed")

    def ids(self) -> list[int] | None:
        """The tokens so far; None where a server sends text alone."""
        if self.token_ids:
            return list(self.token_ids)
        if self.reply is not None:
            return None if self.reply.token_ids is None else list(self.reply.token_ids)
        return list(self.readings.token_ids) if self.readings else []


@dataclass
class Run:
    """A run of the page. ``stopping``: the user has ended it."""

    asked: Asked
    answers: list[Answer]
    threads: list[threading.Thread] = field(default_factory=list)
    stopping: bool = False

    @property
    def ended(self) -> bool:
        """Whether all columns are."""
        return all(answer.ended for answer in self.answers)

    def stop(self) -> None:
        """End all columns: those of this process at their next token, those of a server at once, for its next word may be long in coming."""
        self.stopping = True
        for answer in self.answers:
            if answer.readings is not None:
                answer.readings.stop = True
            elif not answer.ended:
                answer.state = "stopped"

    def wait(self, seconds: float | None = None) -> None:
        """Until all columns have ended; for each at most so long."""
        for thread in self.threads:
            thread.join(seconds)


@dataclass(frozen=True, kw_only=True)
class Here:
    """A model in this process."""

    model: Any
    tokenizer: Any
    shape: ModelShape
    directions: Mapping[str, VectorFile]
    context: int | None = None
    """Tokens that prompt and answer may have together."""
    _one_by_one: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def copies(self) -> Sequence[Any]:
        """A model for every column. They share all weights, and each has modules of its own, which hooks of another do not meet.
        Of a model that is not plainly held (its parts know each other by other ways) there is one, and columns take turns."""
        if layout_of(self.model).backend != "plain":
            return [self.model]
        return [self.model, *(twin(self.model) for _ in range(MOST - 1))]

    def start(self, asked: Asked) -> Run:
        """Begin all columns; ValueError, in one line, for one that cannot begin."""
        run = Run(asked, [Answer(column) for column in asked.columns])
        works = [
            self._work(run, answer, model)
            for answer, model in zip(run.answers, itertools.cycle(self.copies), strict=False)
        ]
        return _begin(run, works)

    def _work(self, run: Run, answer: Answer, model: Any) -> Callable[[], Sample]:
        column, asked = answer.column, run.asked
        plan = column.plan or SteeringPlan()
        _, parts = parts_of(column.word, self.tokenizer, column.plan)
        readings = answer.readings = Readings(
            self.shape, {name: found.vector_D for name, found in self.directions.items()}
        )
        from transformers import LogitsProcessorList

        sampler = InProcessSampler(model, self.tokenizer, processors=LogitsProcessorList([readings, *parts.processors]))
        request = request_of(asked, column, parts.render or sampler.render)
        length, most = len(request.prompt_ids), asked.sampling.max_new_tokens
        if self.context is not None and length + most > self.context:
            raise ValueError(
                f"a prompt of {length} tokens and an answer of {most} do not fit the model's context of {self.context}: shorten one of them"
            )
        answer.prompt = request.prompt
        answer.reader = arm_thoughts({"sampler": sampler.describe(), "details": parts.details})
        turn: AbstractContextManager[Any] = self._one_by_one if len(self.copies) == 1 else nullcontext()

        def work() -> Sample:
            with (
                turn,
                steer(model, plan, tokenizer=self.tokenizer, quiet=True) as audit,
                readings.watching(model, audit),
            ):
                answer.state = "running"
                (sample,) = sampler.sample([request], asked.sampling)
            readings.finish(sample.token_ids)
            return sample

        return work


@dataclass(frozen=True, kw_only=True)
class There:
    """A model behind a server."""

    connection: Connection
    tokenizer: Any

    def start(self, asked: Asked) -> Run:
        """Begin all columns."""
        run = Run(asked, [Answer(column) for column in asked.columns])
        return _begin(run, [self._work(run, answer) for answer in run.answers])

    def sampler(self, column: Column) -> HttpSampler:
        """What asks the server for a column: twice at most, for who looks at a page soon wants to know why nothing comes."""
        return self.connection.sampler(self.tokenizer, column.served, max_retries=1)

    def _work(self, run: Run, answer: Answer) -> Callable[[], Sample]:
        sampler = self.sampler(answer.column)
        request = request_of(run.asked, answer.column, sampler.render)
        answer.prompt = request.prompt
        answer.reader = arm_thoughts({"sampler": sampler.describe()})

        def arrives(reply: Reply) -> None:
            if run.stopping:
                raise Stopped
            answer.reply, answer.state = reply, "running"

        sampler.on_reply = arrives

        def work() -> Sample:
            (sample,) = sampler.sample([request], run.asked.sampling)
            return sample

        return work


def twin(model: Any) -> Any:
    """A copy of a model's modules around the same tensors."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def request_of(asked: Asked, column: Column, render: Callable[[str], RenderedPrompt]) -> Request:
    """The same sample, to the seed, that ``moe-steer generate`` makes of this problem."""
    prompt = render(asked.problem.prompt)
    seed = sample_seed(asked.seed, asked.task, asked.problem.problem_id, 0)
    return Request(prompt.token_ids, seed, column.title, prompt.text)


def _begin(run: Run, works: Sequence[Callable[[], Sample]]) -> Run:
    for answer, work in zip(run.answers, works, strict=True):
        thread = threading.Thread(
            target=_finish, args=(run, answer, work), name=f"column {answer.column.title}", daemon=True
        )
        run.threads.append(thread)
    for thread in run.threads:
        thread.start()
    return run


def _finish(run: Run, answer: Answer, work: Callable[[], Sample]) -> None:
    """One column, from its first token to its grade; whatever goes wrong is said in it."""
    begun = time.monotonic()
    try:
        sample = work()
        if answer.ended:  # stopped meanwhile
            return
        answer.seconds = time.monotonic() - begun
        answer.grade = _graded(run.asked, answer, sample)
        answer.token_ids, answer.state = sample.token_ids, "done"
    except Stopped:
        answer.state = "stopped"
    except Exception as error:  # a column that fails must not take the page with it
        answer.error, answer.state = ("", "stopped") if run.stopping else (one_line(error), "failed")


def _graded(asked: Asked, answer: Answer, sample: Sample) -> GradeRow:
    from reasoning_evals.grading import grade_thought

    completion = Completion(
        arm=answer.column.title, task=asked.task, problem_id=asked.problem.problem_id, sample_idx=0, prompt=answer.prompt,
        text=sample.text, token_ids=sample.token_ids, finish_reason=sample.finish_reason, seed=asked.seed, config_hash="",
        num_tokens=sample.num_tokens, num_thinking=sample.num_thinking,
    )  # fmt: skip
    return judge_one(completion, asked.problem, grade_thought, answer.reader)
