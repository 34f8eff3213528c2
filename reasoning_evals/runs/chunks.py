"""How a run is cut into chunks (what a sampler gets at once), the seed of each sample, and the order in which chunks are sampled."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

from reasoning_evals.engines import RemoteSampler, Request, Sample, Sampler, SamplingConfig
from reasoning_evals.prompts import RenderedPrompt
from reasoning_evals.runs.audits import audit_line
from reasoning_evals.runs.completions import CompletionKey

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


class Work(NamedTuple):
    """A chunk of an arm, to be sampled by the arm's sampler inside its context."""

    arm: str
    chunk: Chunk
    sampler: Sampler
    context: Callable[[], AbstractContextManager[Any]]


class Ended(NamedTuple):
    """A chunk has all its samples; ``line``: what its audit says, for the audit file."""

    line: str | None


Event = Sample | Ended
Events = Generator[tuple[Work, Event], None, None]


def sample_chunks(works: Sequence[Work], config: SamplingConfig) -> Events:
    """The samples of every chunk, each as soon as it is finished, and then ``Ended``.

    One chunk after another, as a model in this process decodes one batch at a time. Where all samplers ask a server, the next
    chunk of any arm begins as soon as less is asked for than twice its places: else the server would be idle while the last long
    thoughts of a chunk are made. Close it to end what is under way.
    """
    remote = [work.sampler for work in works if isinstance(work.sampler, RemoteSampler)]
    return _overlapping(works, config, remote) if len(remote) == len(works) else _in_turn(works, config)


def _events(work: Work, config: SamplingConfig) -> Iterator[Event]:
    with work.context() as audit:
        yield from work.sampler.sample(work.chunk.requests, config)
        line = audit_line(work.arm, work.chunk.number, audit)
    yield Ended(line)


def _in_turn(works: Sequence[Work], config: SamplingConfig) -> Events:
    for work in works:
        for event in _events(work, config):
            yield work, event


def _overlapping(works: Sequence[Work], config: SamplingConfig, samplers: Sequence[RemoteSampler]) -> Events:
    places = min((sampler.places for sampler in samplers), default=1)
    news: SimpleQueue[tuple[Work, Event | BaseException]] = SimpleQueue()

    def listen(work: Work) -> None:
        try:
            for event in _events(work, config):
                news.put((work, event))
        except BaseException as error:  # it is raised by the thread that waits for news
            news.put((work, error))

    left, threads, asked, open_chunks = deque(works), deque[Thread](), 0, 0
    try:
        while left or open_chunks:
            while left and asked < 2 * places:
                work = left.popleft()
                threads.append(Thread(target=listen, args=(work,), name=f"chunk {work.chunk.number} of {work.arm}"))
                threads[-1].start()
                asked += len(work.chunk.requests)
                open_chunks += 1
            work, event = news.get()
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, Ended):
                open_chunks -= 1
            else:
                asked -= 1
            yield work, event
    finally:  # after an error of one chunk, of the disk or of the user the others are still under way
        while any(thread.is_alive() for thread in threads):
            for sampler in samplers:  # again and again: a thread may not have asked yet
                sampler.give_up()
            for thread in threads:
                thread.join(0.05)
