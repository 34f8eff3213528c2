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
   goes through the arms chunk by chunk, so that a run that is stopped early has the same problems in all arms.
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

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moe_steer.progress import Progress
from reasoning_evals.engines import Request, Sample, Sampler, SamplingConfig
from reasoning_evals.problems import Problem, check_unique, write_problems
from reasoning_evals.prompts import RenderedPrompt
from reasoning_evals.runs.audits import AuditWriter, audit_file, audit_line
from reasoning_evals.runs.completions import Completion, CompletionKey, JsonLinesWriter
from reasoning_evals.runs.grading_pass import GradeRow, grade_run, read_grades
from reasoning_evals.runs.run_folder import (
    PROBLEMS_FILE,
    content_digest,
    digest,
    generation_file,
    open_run,
    read_generations,
)

__all__ = ["Arm", "GradeRow", "RunSummary", "grade_run", "read_grades", "run_arms"]
Render = Callable[[str], RenderedPrompt]


_MOST_BATCHES, _FEWEST_CHUNKS = 4, 8


class Chunk(NamedTuple):
    """Samples that a sampler gets at once; the keys are CompletionKeys."""

    number: int
    requests: tuple[Request, ...]


def sample_seed(seed: int, task: str, problem_id: str, sample_idx: int) -> int:
    """A 53-bit number (exact in every JSON reader) that is the same on every machine and in every arm."""
    text = json.dumps([seed, task, problem_id, sample_idx], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11


def chunk_size(num_samples: int, batch_size: int) -> int:
    """Samples of a chunk: whole batches, as many as leave every rank of a usual machine its share of the chunks.

    >>> [chunk_size(number, 64) // 64 for number in (30, 960, 1024, 1920, 2048, 100_000)]
    [1, 1, 2, 3, 4, 4]
    """
    return batch_size * max(1, min(_MOST_BATCHES, num_samples // (batch_size * _FEWEST_CHUNKS)))


def plan_chunks(
    keys: Sequence[CompletionKey], prompts: Sequence[RenderedPrompt], k: int, seed: int, batch_size: int
) -> tuple[Chunk, ...]:
    """Longest prompts first, the k samples of a problem next to each other, cut every ``chunk_size`` samples.

    ``keys`` and ``prompts``: one per problem, in the same order; the sample number of a key is replaced.
    """
    order = sorted(range(len(keys)), key=lambda index: (-len(prompts[index].token_ids), index))
    requests = [
        Request(
            prompt_ids=prompts[index].token_ids,
            seed=sample_seed(seed, keys[index].task, keys[index].problem_id, sample_idx),
            key=keys[index]._replace(sample_idx=sample_idx),
            prompt=prompts[index].text,
        )
        for index in order
        for sample_idx in range(k)
    ]
    size = chunk_size(len(requests), batch_size)
    starts = range(0, len(requests), size)
    return tuple(Chunk(i, tuple(requests[start : start + size])) for i, start in enumerate(starts))


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

    stored = {completion.key: content_digest(completion) for completion in read_generations(folder)}
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

        for one, chunk in todo:
            _run_chunk(one, chunk, config, stored, store, audit_writer, check_repeats, bar)
    return RunSummary(num_samples, num_new, num_tokens, time.monotonic() - start)


class _ArmWork(NamedTuple):
    arm: Arm
    identity: dict[str, Any]
    config_hash: str
    chunks: tuple[Chunk, ...]


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
    config_hash = digest(
        {"task": task, "k": k, "seed": seed, "sampling": config.to_dict(), "arm": arm.name, **identity}
    )
    keys = [CompletionKey(arm.name, task, problem.problem_id, 0, config_hash) for problem in problems]
    return _ArmWork(arm, identity, config_hash, plan_chunks(keys, prompts, k, seed, config.batch_size))


def _run_chunk(
    one: _ArmWork,
    chunk: Chunk,
    config: SamplingConfig,
    stored: Mapping[CompletionKey, bytes],
    store: Callable[[Completion], None],
    audit_writer: AuditWriter,
    check_repeats: bool,
    bar: Progress,
) -> None:
    """Sample a chunk and store its missing completions. The last one is stored after the audit: a chunk with all its
    samples on disk then always has its audit too."""
    requests = {request.key: request for request in chunk.requests}
    waiting: Completion | None = None
    if steps := hasattr(one.arm.sampler, "on_tokens"):  # it says what it makes token by token
        one.arm.sampler.on_tokens = bar.made
    with one.arm.context() as audit:
        for sample in one.arm.sampler.sample(chunk.requests, config):
            request = requests.pop(sample.key)
            completion = _completion(sample, request.prompt, request.seed)
            bar.made(0 if steps else completion.total_tokens)
            if sample.key in stored:
                if check_repeats and stored[sample.key] != content_digest(completion):
                    raise RuntimeError(
                        f"sampling is not deterministic here: sample {sample.key.sample_idx} of problem "
                        f"{sample.key.problem_id!r}, arm {sample.key.arm!r}, came out differently the second time"
                    )
                continue
            if waiting is not None:
                store(waiting)
            waiting = completion
        if requests:
            raise RuntimeError(
                f"the sampler of arm {one.arm.name!r} left out {len(requests)} of {len(chunk.requests)} samples"
            )
        line = audit_line(one.arm.name, chunk.number, audit)
    if line is not None:
        audit_writer.append(line)
    if waiting is not None:
        store(waiting)


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
