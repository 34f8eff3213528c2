"""Chunks of all arms that a server samples at the same time: it is never idle for the sake of one long thought."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from local_endpoint import Handler, Server, serving
from reasoning_evals.engines import HttpAudit, HttpSampler, Request, SamplingConfig
from reasoning_evals.engines.http_reply import EndpointError
from reasoning_evals.engines.http_traffic import Traffic
from reasoning_evals.problems import Problem
from reasoning_evals.runs.run import Arm, run_arms
from reasoning_evals.runs.run_folder import read_generations
from tiny_reasoners import tiny_tokenizer

PROBLEMS = [Problem(f"p{i}", f"what is 2 + {i:02d}?", str(2 + i), "integer") for i in range(8)]
ARMS, CHUNK, K = ("plain", "gentle", "strong"), 4, 2
SAMPLES = len(ARMS) * len(PROBLEMS) * K


class Straggler:
    """Answers at once, but for the first request: that one is answered after all others, or after 20 s."""

    def __init__(self) -> None:
        self.asked, self.others = 0, threading.Semaphore(0)
        self.lock = threading.Lock()
        self.waited: bool | None = None

    def __call__(self, handler: Handler, body: dict[str, Any]) -> None:
        with self.lock:
            first, self.asked = self.asked == 0, self.asked + 1
        if first:
            self.waited = all(self.others.acquire(timeout=20) for _ in range(SAMPLES - 1))
        answer(handler, body)
        if not first:
            self.others.release()


def answer(handler: Handler, body: dict[str, Any]) -> None:
    handler.start()
    handler.event("two</think>\\boxed{4}", "stop", token_ids=[9, 9, 1])
    handler.write(b"data: [DONE]\n\n")


@contextmanager
def arms(say: Any, places: int = 3) -> Iterator[tuple[Server, list[Arm]]]:
    tokenizer = tiny_tokenizer()
    with serving(say) as server:
        traffic = Traffic(places)
        samplers = [
            HttpSampler(server.url, name, tokenizer, backoff=0.01, max_retries=0, concurrency=traffic) for name in ARMS
        ]
        yield server, [Arm(one.model, one, context=lambda one=one: HttpAudit(one)) for one in samplers]  # type: ignore[misc]


def sample(arms: list[Arm], folder: Path, **more: Any) -> int:
    return run_arms(
        arms, PROBLEMS, folder, K, SamplingConfig(batch_size=CHUNK, max_new_tokens=9), seed=1, **more
    ).num_new


@pytest.fixture(autouse=True)
def no_chunk_goes_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever happens, no thread is left."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(("chunk ", "http-sampler"))] == []


def test_one_long_thought_holds_up_nobody(tmp_path: Path) -> None:
    say = Straggler()
    with arms(say) as (server, three):
        assert sample(three, tmp_path) == SAMPLES
    assert say.waited, "all other samples, of all arms, were made while one was under way"
    assert server.most_under_way <= 3, "of all arms together"
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert sorted((line["arm"], line["chunk"]) for line in lines) == [
        (arm, i) for arm in sorted(ARMS) for i in range(4)
    ]
    assert [line["rows"][0]["samples"] for line in lines] == [CHUNK] * 12, "each chunk counts its own samples"


def test_arms_stay_abreast_of_one_another(tmp_path: Path) -> None:
    with arms(answer, places=1) as (server, three):
        sample(three, tmp_path)
    asked = [body["model"] for body in server.bodies]
    assert asked == [arm for _ in range(4) for arm in ARMS for _ in range(CHUNK)]


def test_the_first_failure_ends_all_chunks_and_the_run_goes_on_later(tmp_path: Path) -> None:
    """One request is refused while others hang: nobody waits for those."""
    hang = threading.Event()
    count = iter(range(1000))

    def say(handler: Handler, body: dict[str, Any]) -> None:
        number = next(count)
        if number == 9:
            handler.start(400, "application/json")
            handler.write(b'{"error": "no"}')
        elif number > 6:
            hang.wait(20)
        else:
            answer(handler, body)

    with arms(say) as (_, three), pytest.raises(EndpointError, match="400"):
        sample(three, tmp_path)
    hang.set()
    kept = len(list(read_generations(tmp_path)))
    assert 0 < kept <= 7
    with arms(answer) as (_, three):
        assert sample(three, tmp_path) == SAMPLES - kept
    assert len(list(read_generations(tmp_path))) == SAMPLES


def test_what_the_run_refuses_ends_what_is_under_way(tmp_path: Path) -> None:
    """The disk, or a sample that came out otherwise: the error is that of the run, not of the server."""
    with arms(answer) as (_, three):
        sample(three, tmp_path)
    path = tmp_path / "generations.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")

    def other(handler: Handler, body: dict[str, Any]) -> None:
        handler.start()
        handler.event("three</think>\\boxed{5}", "stop", token_ids=[9, 8, 1])
        handler.write(b"data: [DONE]\n\n")

    with arms(other) as (_, three), pytest.raises(RuntimeError, match="came out differently the second time"):
        sample(three, tmp_path, check_repeats=True)


def test_a_chunk_that_has_not_asked_yet_is_ended_too(tmp_path: Path) -> None:
    """One chunk fails while another still writes its requests: nobody waits for what that one asks later."""
    released = threading.Event()

    def say(handler: Handler, body: dict[str, Any]) -> None:
        if body["model"] == "plain":
            handler.start(400, "application/json")
        else:
            released.wait(20)

    with arms(say) as (_, three):
        late = three[1].sampler
        assert isinstance(late, HttpSampler)
        write = late.body

        def slowly(*given: Any) -> dict[str, Any]:
            time.sleep(0.1)
            return write(*given)

        late.body = slowly  # type: ignore[method-assign]
        begin = time.monotonic()
        with pytest.raises(EndpointError, match="400"):
            sample(three, tmp_path)
        assert time.monotonic() - begin < 10
        released.set()


def test_a_traffic_is_for_one_server_and_one_key() -> None:
    """Its connections carry a key: another server must not see it."""
    with serving(answer) as one, serving(answer) as other:
        traffic = Traffic(2)
        asked = [Request((1,), 5, "k", "why?")]
        list(HttpSampler(one.url, "m", api_key="a" * 20, concurrency=traffic).sample(asked, SamplingConfig()))
        for url, key in ((other.url, "a" * 20), (one.url, "b" * 20)):
            with pytest.raises(ValueError, match="for one server and one key"):
                list(HttpSampler(url, "m", api_key=key, concurrency=traffic).sample(asked, SamplingConfig()))
    assert other.bodies == []
