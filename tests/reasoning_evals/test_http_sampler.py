"""The HTTP sampler against a small server on this machine that behaves, and misbehaves, as told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from local_endpoint import Handler, Say, Server, serving
from reasoning_evals.engines import Served
from reasoning_evals.engines import Server as Asked
from reasoning_evals.engines.http_audit import Tally
from reasoning_evals.engines.http_reply import Reply, short
from reasoning_evals.engines.http_sampler import EndpointError, HttpSampler
from reasoning_evals.engines.sampling import Request, Sample, SamplingConfig
from reasoning_evals.problems import Problem
from reasoning_evals.runs.grading_pass import grade_run
from reasoning_evals.runs.run import Arm, run_arms
from reasoning_evals.runs.run_folder import read_generations
from tiny_reasoners import tiny_tokenizer

CONFIG = SamplingConfig(max_new_tokens=50, batch_size=32)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def serve() -> Iterator[Callable[[Say], Server]]:
    with ExitStack() as servers:
        yield lambda say: servers.enter_context(serving(say))


def echo(handler: Handler, body: dict[str, Any]) -> None:
    """A vLLM-like stream; the text depends on the seed alone."""
    handler.start()
    handler.write(b": a comment\n\n")
    handler.event("wait, ", prompt_token_ids=None, token_ids=[5, 6])
    handler.event(f"</think>{body['seed']}", "stop", token_ids=[7, body["seed"], 1])
    handler.write(b'data: {"choices": [], "usage": {"completion_tokens": 5}}\n\ndata: [DONE]\n\n')


def requests(num: int, prompt: Callable[[int], str] = lambda i: f"question {i}") -> list[Request]:
    return [Request(tuple(prompt(i).encode()), 100 + i, i, prompt(i)) for i in range(num)]


def sampler(server: Server, **options: Any) -> HttpSampler:
    return HttpSampler(server.url, "m", **{"backoff": 0.01, "max_retries": 3, **options})


def test_one_request_a_sample_with_its_own_seed(serve: Callable[[Say], Server], tally: Tally) -> None:
    server = serve(echo)
    http = sampler(server, api_key="secret")
    found = sorted(http.sample(requests(3), CONFIG), key=lambda sample: sample.key)
    assert found == [Sample(i, (5, 6, 7, 100 + i, 1), f"wait, </think>{100 + i}", "stop") for i in range(3)]
    assert (dict(+tally.counts), tally.reasons) == ({"samples": 3}, {})
    assert sorted(body["seed"] for body in server.bodies) == [100, 101, 102]
    assert {body["prompt"] for body in server.bodies} == {"question 0", "question 1", "question 2"}
    assert server.headers_seen[0]["authorization"] == "Bearer secret"
    assert "secret" not in json.dumps(http.describe())


def test_everything_about_decoding_is_said(serve: Callable[[Say], Server]) -> None:
    server = serve(echo)
    list(sampler(server).sample(requests(1), CONFIG))
    assert server.bodies[-1] == {
        "model": "m",
        "prompt": "question 0",
        "max_tokens": 50,
        "temperature": 0.6,
        "top_p": 0.95,
        "n": 1,
        "seed": 100,
        "stream": True,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "add_special_tokens": False,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "return_token_ids": True,
    }
    list(sampler(server).sample(requests(1), SamplingConfig(greedy=True, top_k=20)))
    assert [server.bodies[-1][name] for name in ("temperature", "top_p", "top_k")] == [0.0, 1.0, -1]
    list(sampler(server, extensions=False, prompt_as_ids=True).sample(requests(1), CONFIG))
    assert set(server.bodies[-1]) == {"model", "prompt", "max_tokens", "temperature", "top_p", "n", "seed", "stream"}
    assert server.bodies[-1]["prompt"] == list(b"question 0")
    with pytest.raises(ValueError, match="top_k is 20, which plain OpenAI endpoints do not know"):
        list(sampler(server, extensions=False).sample(requests(1), SamplingConfig(top_k=20)))


def test_longest_prompts_are_asked_first_and_so_many_at_once(serve: Callable[[Say], Server]) -> None:
    def say(handler: Handler, body: dict[str, Any]) -> None:
        time.sleep(0.03 if body["seed"] % 2 else 0.005)
        echo(handler, body)

    server = serve(say)
    asked = requests(12, lambda i: "q" * (1 + i % 4))
    found = [sample.key for sample in sampler(server, concurrency=3).sample(asked, CONFIG)]
    assert sorted(found) == list(range(12))
    assert [len(body["prompt"]) for body in server.bodies[:3]] == [4, 4, 4]
    assert server.most_under_way == 3


def test_text_with_unicode_line_ends_is_one_event(serve: Callable[[Say], Server]) -> None:
    text = "a\u2028b\x85c\u2029\r\n\x0cd é"

    def say(handler: Handler, body: dict[str, Any]) -> None:
        handler.start()
        line = (
            b"data: "
            + json.dumps({"choices": [{"text": text, "finish_reason": "length"}]}, ensure_ascii=False).encode()
        )
        for i in range(0, len(line), 7):  # cut anywhere, also inside a character
            handler.write(line[i : i + 7])
        handler.write(b"\r\n\r\ndata: [DONE]\r\n\r\n")

    found = next(sampler(serve(say), tokenizer=tiny_tokenizer()).sample(requests(1), CONFIG))
    assert (found.text, found.finish_reason) == (text, "length")


def test_a_long_answer_is_put_together_in_linear_time() -> None:
    reply, event = Reply(), json.dumps({"choices": [{"text": "x", "token_ids": [1]}]}).encode()
    begin = time.monotonic()
    for _ in range(33_000):
        reply.add(event)
    reply.add(b'{"choices": [{"text": "", "finish_reason": "length", "token_ids": []}]}')
    assert reply.finish() == "length"
    assert (len(reply.text), len(reply.token_ids or ())) == (33_000, 33_000)
    assert time.monotonic() - begin < 3


def test_429_then_ok_is_counted(serve: Callable[[Say], Server], tally: Tally) -> None:
    seen: set[int] = set()

    def say(handler: Handler, body: dict[str, Any]) -> None:
        if body["seed"] not in seen:
            seen.add(body["seed"])
            handler.start(429, "application/json", Retry_After="1")
            handler.write(b'{"error": {"message": "slow down"}}')
        else:
            echo(handler, body)

    server = serve(say)
    http = sampler(server)
    begin = time.monotonic()
    assert len(list(http.sample(requests(2), CONFIG))) == 2
    assert time.monotonic() - begin >= 1
    assert (dict(+tally.counts), tally.reasons) == ({"samples": 2, "retried": 2}, {"429": 2})
    assert len(server.bodies) == 4


def test_500_forever_ends_in_one_line(serve: Callable[[Say], Server], tally: Tally) -> None:
    def say(handler: Handler, body: dict[str, Any]) -> None:
        handler.start(500, "text/plain")
        handler.write(b"out of\nmemory")

    server = serve(say)
    http = sampler(server, max_retries=2)
    with pytest.raises(EndpointError) as caught:
        list(http.sample(requests(1), CONFIG))
    message = str(caught.value)
    assert f"{server.url}/completions: answers 500" in message
    assert "out of memory; given up after 3 attempts" in message
    assert "\n" not in message
    assert len(server.bodies) == 3
    assert tally.reasons == {"500": 2}


@pytest.mark.parametrize("tail", [b"", b'data: {"choices": [{"te'])
def test_a_cut_stream_is_asked_again_with_the_same_seed(
    serve: Callable[[Say], Server], tail: bytes, tally: Tally
) -> None:
    def say(handler: Handler, body: dict[str, Any]) -> None:
        if len(server.bodies) == 1:
            handler.start()
            handler.event("half", token_ids=[9])
            handler.write(tail)
        else:
            echo(handler, body)

    server = serve(say)
    http = sampler(server)
    assert [sample.text for sample in http.sample(requests(1), CONFIG)] == ["wait, </think>100"]
    assert tally.reasons == {"cut stream": 1}
    assert server.bodies[0] == server.bodies[1]


def test_a_connection_that_is_refused_or_broken_is_asked_again(serve: Callable[[Say], Server], tally: Tally) -> None:
    server = serve(lambda handler, body: None)  # hangs up without an answer
    http = sampler(server, max_retries=1)
    with pytest.raises(EndpointError, match="given up after 2 attempts"):
        list(http.sample(requests(1), CONFIG))
    assert tally.reasons == {"connection": 1}
    nobody = HttpSampler("http://127.0.0.1:1/v1", "m", max_retries=1, backoff=0)
    with pytest.raises(EndpointError, match="given up after 2 attempts"):
        list(nobody.sample(requests(1), CONFIG))


@pytest.mark.parametrize(
    ("status", "kind", "answer", "message"),
    [
        (200, "text/event-stream", b"data: {oops\n\n", "it answers what is not JSON: {oops"),
        (200, "text/event-stream", b"data: [1]\n\n", "it answers without choices: [1]"),
        (200, "application/json", b"<html>", "it answers what is not JSON: <html>"),
        (200, "text/event-stream", b'data: {"choices": [{"delta": {}}]}\n\n', "of /v1/completions, not chat"),
        (200, "text/event-stream", b'data: {"error": {"message": "bad seed", "code": 400}}\n\n', "reports bad seed"),
        (200, "application/json", b'{"choices": [{"text": "x", "finish_reason": "odd"}]}', "neither stop"),
        (
            200,
            "application/json",
            b'{"choices": [{"text": "x", "token_ids": 5}]}',
            "token_ids are not a list of integers: 5",
        ),
        (400, "application/json", b'{"error": {"message": "too long"}}', "answers 400 Bad Request: "),
        (401, "text/plain", b"", "give the right api_key"),
        (404, "text/plain", b"no such model", "give a base_url up to /v1, and a model that it serves"),
    ],
)
def test_what_cannot_pass_is_not_asked_again(
    serve: Callable[[Say], Server], status: int, kind: str, answer: bytes, message: str
) -> None:
    def say(handler: Handler, body: dict[str, Any]) -> None:
        handler.start(status, kind)
        handler.write(answer)

    server = serve(say)
    http = sampler(server)
    with pytest.raises(EndpointError) as caught:
        list(http.sample(requests(1), CONFIG))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(server.bodies) == 1


def test_trouble_inside_a_stream_may_pass(serve: Callable[[Say], Server], tally: Tally) -> None:
    def say(handler: Handler, body: dict[str, Any]) -> None:
        if len(server.bodies) == 1:
            handler.start()
            handler.write(b'data: {"error": {"message": "engine died", "code": 503}}\n\n')
        else:
            echo(handler, body)

    server = serve(say)
    http = sampler(server)
    assert len(list(http.sample(requests(1), CONFIG))) == 1
    assert tally.reasons == {"503": 1}


def test_a_silent_stream_is_given_up_but_a_slow_one_is_not(serve: Callable[[Say], Server]) -> None:
    def slow(handler: Handler, body: dict[str, Any]) -> None:
        handler.start()
        for _ in range(6):
            time.sleep(0.1)
            handler.event("x", token_ids=[1])
        handler.event("", "stop")

    assert next(sampler(serve(slow), chunk_timeout=0.4).sample(requests(1), CONFIG)).text == "xxxxxx"

    def silent(handler: Handler, body: dict[str, Any]) -> None:
        handler.start()
        server.released.wait(5)

    server = serve(silent)
    begin = time.monotonic()
    with pytest.raises(EndpointError, match=r"silent for 0.3 s: raise chunk_timeout or lower concurrency"):
        list(sampler(server, chunk_timeout=0.3).sample(requests(1), CONFIG))
    assert time.monotonic() - begin < 3
    assert len(server.bodies) == 1


def test_a_failure_is_said_before_its_turn_and_ends_the_rest(serve: Callable[[Say], Server]) -> None:
    def say(handler: Handler, body: dict[str, Any]) -> None:
        if body["seed"] == 103:
            handler.start(400, "text/plain")
        else:
            handler.start()
            server.released.wait(10)

    server = serve(say)
    begin = time.monotonic()
    with pytest.raises(EndpointError, match="answers 400"):
        list(sampler(server).sample(requests(4), CONFIG))
    assert time.monotonic() - begin < 5
    assert not any(thread.name == "http-sampler" for thread in threading.enumerate())


def test_a_reader_that_stops_early_leaves_nothing_behind(serve: Callable[[Say], Server]) -> None:
    def say(handler: Handler, body: dict[str, Any]) -> None:
        if body["seed"] != 100:
            server.released.wait(10)
        echo(handler, body)

    server = serve(say)
    samples = sampler(server).sample(requests(3), CONFIG)
    assert next(samples).key == 0
    samples.close()  # type: ignore[attr-defined]
    assert not any(thread.name == "http-sampler" for thread in threading.enumerate())


def test_ids_are_made_from_the_text_where_the_server_sends_none(serve: Callable[[Say], Server], tally: Tally) -> None:
    tokenizer = tiny_tokenizer()
    text = "</think>"

    def say(handler: Handler, body: dict[str, Any]) -> None:
        handler.start(200, "application/json")  # a server that cannot stream
        choice = {"text": text + tokenizer.eos_token, "finish_reason": "stop"}
        handler.write(json.dumps({"choices": [choice]}).encode())

    server = serve(say)
    http = sampler(server, tokenizer=tokenizer)
    found = next(http.sample(requests(1), CONFIG))
    assert found.text == text
    assert found.token_ids == (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    assert tally.counts["retokenized"] == 1
    with pytest.raises(EndpointError, match="it sends no token ids: give the model's tokenizer"):
        next(sampler(server).sample(requests(1), CONFIG))


def test_a_prompt_that_the_server_reads_otherwise_is_refused(serve: Callable[[Say], Server]) -> None:
    def say(handler: Handler, body: dict[str, Any]) -> None:
        handler.start()
        handler.event("x", "stop", token_ids=[1], prompt_token_ids=[0, *body["prompt"].encode()])

    with pytest.raises(EndpointError, match="reads the prompt as 11 tokens, here it has 10: its tokenizer is another"):
        next(sampler(serve(say)).sample(requests(1), CONFIG))


def test_a_run_over_http_is_graded_and_resumed(serve: Callable[[Say], Server], tmp_path: Path) -> None:
    def say(handler: Handler, body: dict[str, Any]) -> None:
        handler.start()
        right = "4" if body["model"] == "good" else "5"
        handler.event("two and two</think>\\boxed{" + right + "}", "stop", token_ids=[9, 9, 7, 11, 1])
        handler.write(b"data: [DONE]\n\n")

    server = serve(say)
    problems = [Problem(f"p{i}", f"what is 2 + 2 ({i})?", "4", "integer") for i in range(3)]
    tokenizer = tiny_tokenizer()
    arms = [Arm(name, HttpSampler(server.url, name, tokenizer, backoff=0.01)) for name in ("good", "bad")]

    def run() -> int:
        return run_arms(arms, problems, tmp_path, 2, SamplingConfig(batch_size=4, max_new_tokens=9), seed=1).num_new

    assert run() == 12
    assert [row.correct for row in grade_run(tmp_path)] == [True] * 6 + [False] * 6
    assert run() == 0
    whole = (tmp_path / "generations.jsonl").read_bytes()
    (tmp_path / "generations.jsonl").write_bytes(whole[: len(whole) // 2])
    assert run() > 0
    assert len(list(read_generations(tmp_path))) == 12
    assert sorted((tmp_path / "generations.jsonl").read_bytes().splitlines()) == sorted(whole.splitlines())


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match="base_url must start with http"):
        HttpSampler("localhost:8000", "m")
    with pytest.raises(ValueError, match=r"base_url 'http://x:y/v1' is not a URL"):
        HttpSampler("http://x:y/v1", "m")
    with pytest.raises(ValueError, match="expected concurrency >= 1"):
        HttpSampler("http://x/v1", "m", concurrency=0)
    with pytest.raises(ValueError, match="no tokenizer to render prompts with"):
        HttpSampler("http://x/v1", "m").render("why?")
    with pytest.raises(ValueError, match="has no prompt: render its prompt first"):
        next(HttpSampler("http://x/v1", "m").sample([Request((1,), 1, "k")], CONFIG))
    assert short("a\n" * 400).endswith("...")


@pytest.mark.parametrize(
    ("status", "content"),
    [
        (404, b"Not Found"),
        (400, b"unknown route"),
        (403, b""),
        (200, b"<html>every address is this page</html>"),
        (200, b""),
        (200, b'{"error": "Unexpected endpoint or method. (GET /v1/steering)"}'),
        (200, b'{"version": 1, "server": {"engine": "x"}, "plans": {}}'),
    ],
)
def test_a_server_without_the_plug_in_knows_no_plans(
    serve: Callable[[Say], Server], status: int, content: bytes
) -> None:
    server = serve(echo)
    server.said_of["/v1/steering"] = (status, "text/plain", content)
    assert Asked(base_url=server.url).served() == (Served({"engine": "x"}, {}) if b"plans" in content else None)


@pytest.mark.parametrize("content", [b'{"version": 2, "plans": {}}', b'{"version": 1}', b"[]"])
def test_another_plug_in_is_refused(serve: Callable[[Say], Server], content: bytes) -> None:
    server = serve(echo)
    server.said_of["/v1/steering"] = (200, "application/json", content)
    with pytest.raises(EndpointError, match="another version of its plug-in"):
        Asked(base_url=server.url).served()


@pytest.mark.parametrize("content", [b'{"data": [{"id": "a"}, {"id": "a"}, {"id": 5}]}', b'[{"id": "a"}]'])
def test_what_a_server_calls_its_models(serve: Callable[[Say], Server], content: bytes) -> None:
    server = serve(echo)
    server.said_of["/v1/models"] = (200, "application/json", content)
    assert Asked(base_url=server.url).names() == ["a"]
