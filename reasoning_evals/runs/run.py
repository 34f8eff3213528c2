"""The evaluation loop: sample every problem k times in every arm, so that a killed and resumed run equals an unbroken one.

What happens, from top to bottom (``run_arms``, then ``grade_run``):

1. Prompts. Each arm renders each problem to token ids. Prompts, sampling settings, seed and each arm's details (its steering
   plan, say) are hashed into the arm's config_hash.
2. run.json is written by the first rank that arrives and problems.jsonl by rank 0, before anything is sampled. If run.json
is already
   there, its config must be the same: a folder never mixes two runs.
3. Chunks. The problems are sorted by prompt length, longest first (so that memory runs out at the start or never), with the k
   samples of a problem next to each other, and cut into chunks. A chunk is what a sampler gets at once and the unit of resuming:
   batch_size samples where there are few, up to four times as many where eight chunks are left all the same (``chunk_size``).
   The sampler decodes batch_size of them together and fills the places of finished ones from the rest: with the long tail that
   thoughts have, 8 batches at once took a third of the forwards of 8 batches one by one, 4 batches 0.41, 2 batches 0.61. Chunks
   depend on problems, prompts, k and batch_size only, not on the ranks or on what is already done: so a sample always meets the
   same neighbours in its batch, and rounding is the same. Rank r of W takes the chunks r, r + W, r + 2W, ... of every arm, and
   goes through the arms chunk by chunk, so that a run that is stopped early has the same problems in all arms. A server is asked
   for the next chunk, of whatever arm, before the last one is finished (``sample_chunks``).
4. Seeds. The seed of a sample is a hash of (run seed, task, problem id, sample number). The arm is not part of it: sample j
of a
   problem draws the same random numbers in every arm, which makes the paired comparison sharper.
5. Sampling. The arm's context (``steer`` with its plan) is entered around each chunk. Each finished sample is appended to this
   rank's generations file, one JSON line. At the end of a chunk the context's audit rows (tokens steered per expert) are
   appended
   to the audit file, and only then the chunk's last sample: a complete chunk therefore always has its audit.
6. Resuming. A chunk with all samples on disk is skipped. One with a missing sample is sampled again as a whole, because its
   batch must have the same rows as before, but only the missing samples are stored. A torn last line is cut off first.
7. Grading is a separate pass over the finished folder (``grading_pass``): it writes grades.jsonl, which can be deleted and made
   again without the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moe_steer.console import Progress
from reasoning_evals.engines import Request, Sample, Sampler, SamplingConfig
from reasoning_evals.problems import Problem, asked_once, check_unique, read_problems, write_problems
from reasoning_evals.prompts import RenderedPrompt
from reasoning_evals.runs.audits import AuditWriter, audit_file
from reasoning_evals.runs.chunks import Chunk, Event, Work, plan_chunks, sample_chunks
from reasoning_evals.runs.completions import Completion, CompletionKey, JsonLinesWriter
from reasoning_evals.runs.grading_pass import GradeRow, grade_run, read_grades
from reasoning_evals.runs.run_folder import (
    PROBLEMS_FILE,
    config_hash,
    digest,
    generation_file,
    open_run,
    read_generations,
)

__all__ = ["Arm", "GradeRow", "RunSummary", "grade_run", "read_grades", "run_arms"]
Render = Callable[[str], RenderedPrompt]


@dataclass(frozen=True, slots=True)
class Arm:
    """One side of a comparison: a sampler, and what is done to its model while it samples."""

    name: str
    sampler: Sampler
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Entered around each chunk. If its value has ``to_rows()`` (a steering audit), the rows are stored and added up."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON values that describe the context, such as a plan's digest; part of the run's config."""
    render: Render | None = None
    """This arm's own prompt, for arms that differ by prompt."""


class RunSummary(NamedTuple):
    """What this rank did in this call."""

    num_samples: int
    """Samples that this rank is responsible for."""
    num_new: int
    """How many of these were sampled in this call."""
    num_new_tokens: int
    seconds: float


def run_arms(
    arms: Sequence[Arm],
    problems: Sequence[Problem],
    out_dir: Path | str,
    k: int,
    config: SamplingConfig,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    render: Render | None = None,
    progress: bool | None = None,
    task: str = "task",
    check_repeats: bool = False,
) -> RunSummary:
    """Sample every problem k times in every arm, into ``out_dir``; samples that are already there are kept.

    The work is cut into chunks of one to four batches whose composition depends on problems, prompts, k and config alone. Rank r of W does the chunks i with i % W == r, in every arm. A chunk with a missing sample runs in full and only
    the missing samples are appended, so a killed and resumed run equals an unbroken one.

    The seed of a sample is a hash of (seed, task, problem, sample number), the same in every arm. ``render`` makes the
    prompts (default: the sampler's own). ``progress`` draws a bar (default: on a terminal, on rank 0).
    ``check_repeats`` compares samples that had to be made again with the stored ones, and raises RuntimeError when they
    differ. ValueError when the folder holds a run of another config.
    """
    if k < 1 or not problems or not arms:
        raise ValueError(
            f"nothing to sample: {len(arms)} arms, {len(problems)} problems, k = {k}; each must be at least 1"
        )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
    if len({arm.name for arm in arms}) < len(arms):
        raise ValueError(f"every arm needs its own name, got {[arm.name for arm in arms]}")
    check_unique(problems)
    folder = Path(out_dir)
    problems = _as_begun(folder / PROBLEMS_FILE, problems)
    work = [_work_of(arm, problems, k, config, seed, task, render) for arm in arms]
    run_config = {
        "task": task,
        "k": k,
        "seed": seed,
        "sampling": config.to_dict(),
        "num_problems": len(problems),
        "problems": digest([problem.to_dict() for problem in problems]),
        "arms": {one.arm.name: {**one.identity, "config_hash": one.config_hash} for one in work},
        "arm_order": [arm.name for arm in arms],
    }
    open_run(folder, run_config)
    if rank == 0 and not (folder / PROBLEMS_FILE).exists():
        write_problems(folder / PROBLEMS_FILE, problems)

    stored = {completion.key: completion.digest for completion in read_generations(folder)}
    expected = {request.key for one in work for chunk in one.chunks for request in chunk.requests}
    if foreign := next((key for key in stored if key not in expected), None):
        raise ValueError(f"{folder} holds a sample that is not of this run ({tuple(foreign)}): take another folder")
    mine = [
        (one, chunk)
        for index in range(rank, len(work[0].chunks), world_size)
        for one in work
        for chunk in [one.chunks[index]]
    ]
    num_samples = sum(len(chunk.requests) for _, chunk in mine)
    num_done = sum(request.key in stored for _, chunk in mine for request in chunk.requests)
    todo = [(one, chunk) for one, chunk in mine if any(request.key not in stored for request in chunk.requests)]
    start, num_new, num_tokens = time.monotonic(), 0, 0
    with (
        JsonLinesWriter(generation_file(folder, rank, world_size)) as writer,
        AuditWriter(audit_file(folder, rank, world_size)) as audit_writer,
        Progress(num_samples, num_done, progress, rank, longest=config.max_new_tokens) as bar,
    ):

        def store(completion: Completion) -> None:
            nonlocal num_new, num_tokens
            writer.append(completion.to_json())
            num_new += 1
            num_tokens += completion.total_tokens
            bar.stored()

        for arm in arms:
            if hasattr(arm.sampler, "on_tokens"):  # it says what it makes token by token
                arm.sampler.on_tokens = bar.made
        book = _Book(stored, store, audit_writer, bar, check_repeats)
        chunks = [Work(one.arm.name, chunk, one.arm.sampler, one.arm.context) for one, chunk in todo]
        with closing(sample_chunks(chunks, config)) as events:
            for of, event in events:
                book.take(of, event)
    return RunSummary(num_samples, num_new, num_tokens, time.monotonic() - start)


class _ArmWork(NamedTuple):
    arm: Arm
    identity: dict[str, Any]
    config_hash: str
    chunks: tuple[Chunk, ...]


def _as_begun(file: Path, problems: Sequence[Problem]) -> Sequence[Problem]:
    """The problems of a run that goes on, as it holds them where an earlier version gave no cluster to a question that is asked twice."""
    begun: Sequence[Problem] = ()
    with suppress(ValueError):
        begun = read_problems(file) if file.is_file() else ()
    return begun if asked_once(begun) == list(problems) else problems


def _work_of(
    arm: Arm, problems: Sequence[Problem], k: int, config: SamplingConfig, seed: int, task: str, render: Render | None
) -> _ArmWork:
    make_prompt = arm.render or render or arm.sampler.render
    prompts = [make_prompt(problem.prompt) for problem in problems]
    identity = {
        "sampler": arm.sampler.describe(),
        "details": dict(arm.details),
        "prompts": digest([prompt.text for prompt in prompts]),
    }
    made = config_hash({"task": task, "k": k, "seed": seed, "sampling": config.to_dict()}, arm.name, identity)
    keys = [CompletionKey(arm.name, task, problem.problem_id, 0, made) for problem in problems]
    return _ArmWork(arm, identity, made, plan_chunks(keys, prompts, k, seed, config.batch_size))


class _Book:
    """Stores the missing completions of the chunks under way. The last one of a chunk is stored after its audit: a chunk with all
    its samples on disk then always has its audit too."""

    def __init__(
        self,
        stored: Mapping[CompletionKey, str],
        store: Callable[[Completion], None],
        audit_writer: AuditWriter,
        bar: Progress,
        check_repeats: bool,
    ) -> None:
        self._stored, self._store, self._audit_writer = stored, store, audit_writer
        self._bar, self._check_repeats = bar, check_repeats
        self._missing: dict[tuple[str, int], dict[CompletionKey, Request]] = {}
        self._waiting: dict[tuple[str, int], Completion] = {}

    def take(self, of: Work, event: Event) -> None:
        """A sample of a chunk, or its end; RuntimeError where they are not what they must be."""
        place = (of.arm, of.chunk.number)
        missing = self._missing.setdefault(place, {request.key: request for request in of.chunk.requests})
        if isinstance(event, Sample):
            self._take_sample(place, missing.pop(event.key), event, counted=hasattr(of.sampler, "on_tokens"))
            return
        if missing:
            raise RuntimeError(
                f"the sampler of arm {of.arm!r} left out {len(missing)} of {len(of.chunk.requests)} samples"
            )
        if event.line is not None:
            self._audit_writer.append(event.line)
        del self._missing[place]
        if (last := self._waiting.pop(place, None)) is not None:
            self._store(last)

    def _take_sample(self, place: tuple[str, int], request: Request, sample: Sample, *, counted: bool) -> None:
        completion = _completion(sample, request.prompt, request.seed)
        self._bar.made(0 if counted else completion.total_tokens)
        if sample.key in self._stored:
            if self._check_repeats and self._stored[sample.key] != completion.digest:
                raise RuntimeError(
                    f"sampling is not deterministic here: sample {sample.key.sample_idx} of problem "
                    f"{sample.key.problem_id!r}, arm {sample.key.arm!r}, came out differently the second time"
                )
            return
        if place in self._waiting:
            self._store(self._waiting[place])
        self._waiting[place] = completion


def _completion(sample: Sample, prompt: str, seed: int) -> Completion:
    key: CompletionKey = sample.key
    return Completion(
        arm=key.arm,
        task=key.task,
        problem_id=key.problem_id,
        sample_idx=key.sample_idx,
        prompt=prompt,
        text=sample.text,
        token_ids=sample.token_ids,
        finish_reason=sample.finish_reason,
        seed=seed,
        config_hash=key.config_hash,
        num_tokens=sample.num_tokens,
        num_thinking=sample.num_thinking,
    )
