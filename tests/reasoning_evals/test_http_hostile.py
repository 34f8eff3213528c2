"""What an endpoint may send, attempt by attempt: kept, asked again, or refused; never trusted, never without an end."""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import time
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any

import pytest

from local_endpoint import Handler, serving
from reasoning_evals.engines.http_audit import Tally
from reasoning_evals.engines.http_client import Address, events
from reasoning_evals.engines.http_reply import EndpointError, PassingFailure, Reply, wait_of, whole_text
from reasoning_evals.engines.http_sampler import HttpSampler
from reasoning_evals.engines.sampling import Request, SamplingConfig
from tiny_reasoners import tiny_tokenizer

CONFIG = SamplingConfig(max_new_tokens=20, batch_size=8)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def choice(text: Any, finish: Any = None, **more: Any) -> str:
    return "data: " + json.dumps({"choices": [{"index": 0, "text": text, "finish_reason": finish, **more}]})


def error(value: Any) -> list[str]:
    """The beginning of a completion, then an error."""
    return [choice("4"), "data: " + json.dumps({"error": value})]


GOOD = (200, "text/event-stream", [choice("4"), choice("2", "stop"), "data: [DONE]"])
STREAM = "text/event-stream"
Answer = tuple[Any, ...]


def attempts(*answers: Answer, **options: Any) -> tuple[str, int]:
    """(text or error, requests) of one sample; the last answer repeats."""

    def say(handler: Handler, body: dict[str, Any]) -> None:
        status, kind, lines, *headers = answers[min(len(server.bodies), len(answers)) - 1]
        handler.start(status, kind, **(headers[0] if headers else {}))
        for line in lines:
            handler.write((line if isinstance(line, bytes) else line.encode()) + b"\n\n")

    with serving(say) as server:
        settings = {"max_retries": 3, "backoff": 0.001, "tokenizer": tiny_tokenizer(), **options}
        http = HttpSampler(server.url, "m", **settings)
        try:
            found = next(http.sample([Request((1, 2), 5, "k", "why?")], CONFIG)).text
        except EndpointError as caught:
            found = f"ERROR {caught}"
            assert "\n" not in found
            assert len(found) < 1000
        return found, len(server.bodies)


KEPT: dict[str, list[Any]] = {
    "null last": [choice("42"), choice(None, "stop")],
    "null first": [choice(None), choice("42", "stop")],
    "no text last": [choice("42"), 'data: {"choices": [{"index": 0, "finish_reason": "stop"}]}'],
    "no DONE": [choice("42", "stop")],
    "names, ids, comments": [": ping", "event: completion", "id: 7", "retry: 10", choice("42", "stop")],
    "CRLF": [choice("42", "stop") + "\r", "data: [DONE]\r"],
    "CR alone": [(choice("4") + "\r\r" + choice("2", "stop") + "\r\r" + 'data: {"usage": {}}\r\r').encode()],
    "an event over several lines": [
        'data: {"choices":\ndata: [{"text": "42",\ndata:  "finish_reason": "stop"}]\ndata: }'
    ],
    "several lines, CRLF": ['data: {"choices":\r\ndata: [{"text": "42", "finish_reason": "stop"}]}\r\n\r'],
    "no blank lines": [choice("4") + "\n" + choice("2", "stop") + "\ndata: [DONE]"],
    "counts as floats": [choice("42", "stop"), 'data: {"choices": [], "usage": {"completion_tokens": 5.0}}'],
    "a byte order mark": [b"\xef\xbb\xbf" + choice("42", "stop").encode()],
    "no blank behind the colon": [choice("42", "stop").replace("data: ", "data:")],
    "an empty event": ["data:", "data: ", choice("42", "stop")],
    "counts behind": [choice("42", "stop"), 'data: {"choices": [], "usage": {"completion_tokens": 5}}'],
    "counts of null": [choice("42", "stop"), 'data: {"choices": [], "usage": null}'],
    "an error of null": ['data: {"error": null, "choices": [{"text": "42", "finish_reason": "stop"}]}'],
    "another word for stop": [choice("42", "EOS")],
    "null alone": ["data: null", choice("42", "stop")],
    "choices of null": [choice("4"), 'data: {"id": "x", "choices": null}', choice("2", "stop")],
    "counts without choices": [choice("42", "stop"), 'data: {"usage": {"completion_tokens": 5}}'],
    "counts beside choices of null": [
        choice("42", "stop"),
        'data: {"choices": null, "usage": {"completion_tokens": 5}}',
    ],
    "a named ping": ['event: ping\ndata: {"type": "ping"}', "event: ping\ndata: {}", choice("42", "stop")],
    "the window is full, Mistral": [choice("42", "model_length")],
    "the window is full, Anthropic": [choice("42", "model_context_window_exceeded")],
    "a loop that vLLM saw": [choice("42", "repetition")],
    "a tool, Anthropic": [choice("42", "tool_use")],
    "another word, Ollama": [choice("42", "end")],
    "another word, Bedrock": [choice("42", "END-TURN")],
    "with a prefix": [choice("42", "FINISH_REASON_STOP")],
    "null as a text until the end, DashScope": [choice("4", "null"), choice("2", "null"), choice("", "stop")],
    "ids of null": [choice("42", "stop", token_ids=None, prompt_token_ids=None)],
}


@pytest.mark.parametrize("name", KEPT)
def test_kept_at_the_first_request(name: str) -> None:
    assert attempts((200, STREAM, KEPT[name])) == ("42", 1)


@pytest.mark.parametrize(
    "kind", [STREAM, "text/event-stream; charset=utf-8", "text/plain", "application/json", "application/octet-stream"]
)
def test_the_name_of_a_stream(kind: str) -> None:
    assert attempts((200, kind, GOOD[2]))[0] == "42"


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "text/plain"])
def test_one_answer_in_place_of_a_stream(kind: str) -> None:
    body = json.dumps(
        {"choices": [{"text": "42", "finish_reason": "stop"}], "usage": {"completion_tokens": 3}}, indent=1
    )
    assert attempts((200, kind, [body])) == ("42", 1)


PASSING: dict[str, tuple[Answer, str]] = {
    **{f"status {code}": ((code, "text/plain", []), str(code)) for code in (408, 409, 424, 425, 429, 498, 500, 502, 503, 504, 529)},
    "an HTML page of a gateway": ((502, "text/html", ["<html>Bad Gateway</html>"]), "502"),
    **{f"code {code!r}": ((200, STREAM, error({"message": "x", "code": code})), str(code)) for code in ("500", 500, "503", 429, "408")},
    "a status in it": ((200, STREAM, error({"message": "x", "status": 503})), "503"),
    "bare text": ((200, STREAM, error("Internal server error")), "server error"),
    "bare text of any words": ((200, STREAM, error("CUDA error: an illegal memory access")), "server error"),
    "bare text first": ((200, STREAM, ['data: {"error": "Internal server error"}']), "server error"),
    "overloaded first": ((200, STREAM, ['data: {"error": {"type": "overloaded_error", "message": "busy"}}']), "server error"),
    "a type alone": ((200, STREAM, ['data: {"error": {"type": "InternalServerError"}}']), "server error"),
    "an error field": ((200, STREAM, [choice("4"), 'error: {"code": 500, "message": "slot"}']), "500"),
    "an error object": ((200, STREAM, [choice("4"), 'data: {"object": "error", "message": "died", "code": 500}']), "500"),
    "an error in one answer": ((200, "application/json", ['{"error": {"code": "503", "message": "loading"}}']), "503"),
    "cut before the reason": ((200, STREAM, [choice("4")]), "cut stream"),
    "nothing at all": ((200, STREAM, []), "cut stream"),
    "comments alone": ((200, STREAM, [": ping", ": ping"]), "cut stream"),
    "null as a text, then cut": ((200, STREAM, [choice("4", "null")]), "cut stream"),
    "half a body": ((200, "application/json", ['{"choices": [{"text": "4']), "cut stream"),
    "a body of nothing": ((200, "application/json", []), "cut stream"),
    "a body of blank lines": ((200, "application/json", ["", ""]), "cut stream"),
    "half an event behind a whole one": ((200, STREAM, [choice("4"), choice("2")[:30]]), "not JSON"),
    "two events in one line": ((200, STREAM, [choice("4"), choice("2")[:30] + choice("2", "stop")]), "not JSON"),
    "an error in a list, Gemini": ((200, "application/json", ['[{"error": {"code": 503, "message": "busy"}}]']), "503"),
    "an error in a list of the stream": ((200, STREAM, [choice("4"), 'data: [{"error": {"code": 429}}]']), "429"),
    "aborted": ((200, STREAM, [choice("4", "abort")]), "cut stream"),
    **{
        f"broken by {reason}": ((200, STREAM, [choice("4", reason)]), "cut stream")
        for reason in ("error", "time_limit", "cancel", "insufficient_system_resource", "network_error", "timeout", "cancelled")
    },
    "a detail alone": ((200, STREAM, [choice("4"), 'event: error\ndata: {"detail": "engine dead"}']), "server error"),
    "choices of null alone": ((200, "application/json", ['{"choices": null}']), "cut stream"),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSING)
def test_asked_again(name: str) -> None:
    bad, cause = PASSING[name]
    assert attempts(bad, GOOD) == ("42", 2)
    text, number = attempts(bad)
    assert (text[:6], number) == ("ERROR ", 4)
    assert "given up after 4 attempts" in text
    assert cause


REFUSED: dict[str, tuple[Answer, str]] = {
    "a login page": ((200, "text/html", ["<html>Login</html>"]), "answers with text/html"),
    "a login page with a charset": ((200, "text/html; charset=utf-8", ["<html>Login</html>"]), "a login page"),
    "XHTML": ((200, "application/xhtml+xml", ["<html>Login</html>"]), "answers with xml"),
    "a picture": ((200, "image/png", [b"\x89PNG\x1b[2J"]), "answers with image/"),
    "a page that calls itself a stream": ((200, STREAM, ["<html>Login</html>"]), "not JSON: <html>Login</html>"),
    "a page without a type": ((200, "text/plain", ["Please log in:", "here"]), "not JSON: Please log in:"),
    "lines of JSON": ((200, "application/x-ndjson", ['{"response": "4"}', '{"response": "2"}']), "not JSON"),
    "redirected": ((302, "text/html", [], {"Location": "https://u:p@login.example/v1?k=1"}), "Found: https://***@login.example/v1: it sends requests elsewhere"),
    "too long": ((400, "application/json", ['{"object":"error","message":"maximum context length is 4096"}']), "4096"),
    "forbidden": ((403, "text/plain", []), "an api_key that may use the model"),
    "unprocessable": ((422, "application/json", ['{"detail": "no seed"}']), "no seed"),
    "code 400 as text": ((200, STREAM, error({"message": "bad seed", "code": "400"})), "reports bad seed"),
    "a list of errors": ((200, STREAM, ['data: [{"error": {"code": 400, "message": "bad key"}}]']), "reports bad key"),
    "a list of nothing": ((200, STREAM, ["data: []"]), "without choices"),
    "a code in words first": ((200, STREAM, ['data: {"error": {"code": "invalid_api_key", "message": "no"}}']), "reports no"),
    "other words first": ((200, STREAM, ['data: {"error": {"message": "all good"}}']), "reports all good"),
    "a message alone": ((200, STREAM, ['data: {"message": "who are you"}']), "reports who are you"),
    "half an event": ((200, STREAM, [choice("4")[:30]]), "not JSON"),
    "an error of MiniMax": ((200, "application/json", ['{"base_resp": {"status_code": 1004, "status_msg": "login fail"}, "choices": null}']), "reports login fail"),
    "half a thing of several lines": ((200, STREAM, ["data: {\ndata: 5"]), "not JSON"),
    "events of Anthropic's own": ((200, STREAM, ['data: {"type": "message_start", "message": {"id": "x"}}']), "without choices"),
    "no money left, OpenAI": ((429, "application/json", ['{"error": {"code": "insufficient_quota"}}']), "insufficient_quota"),
    "a field that it does not know": ((422, "text/plain", ["min_p: extra"]), "does not take min_p, ask it without fields"),
    "counts of halves": ((200, STREAM, ['data: {"choices": [], "usage": {"completion_tokens": 5.5}}']), "it counts 5.5 tokens"),
    "deep": ((200, STREAM, ["data: " + "[" * 100_000]), "not JSON"),
    "long digits": ((200, STREAM, ['data: {"choices": [{"text": "a", "token_ids": [' + "9" * 5000 + "]}]}"]), "not JSON"),
    "two completions": ((200, STREAM, ['data: {"choices": [{"text": "a"}, {"text": "b"}]}']), "other than with one"),
    "the second one": ((200, STREAM, [choice("4"), 'data: {"choices": [{"text": "b", "index": 1}]}']), "other than with"),
    "a choice of text": ((200, STREAM, ['data: {"choices": ["a"]}']), "other than with one completion"),
    "text of numbers": ((200, STREAM, [choice(5)]), "its text is not a text: 5"),
    "text in a list": ((200, STREAM, [choice(["4"])]), "its text is not a text"),
    "a reason of numbers": ((200, STREAM, [choice("4", 5)]), "its finish_reason is not a text: 5"),
    "a reason in an object": ((200, STREAM, [choice("4", {"a": 1})]), "its finish_reason is not a text"),
    "a reason of its own": ((200, STREAM, [choice("4", "whatever")]), "for the reason 'whatever'"),
    "a chat": ((200, STREAM, ['data: {"choices": [{"delta": {"content": "4"}}]}']), "--chat-endpoint"),
    **{
        f"ids {ids}": ((200, STREAM, [choice("a", "stop", token_ids=ids)]), text)
        for ids, text in [
            ([-5, 99999999999999999999], "its token_ids hold -5, and the model's tokenizer has the ids 0 to"),
            ([3, 99999999999999999999], "its token_ids hold 99999999999999999999"),
            ([10**6], "its token_ids hold 1000000"),
            ([True], "not a list of integers: [true]"),
            ([1.0], "not a list of integers: [1.0]"),
            (["1"], "not a list of integers"),
            ([[1]], "not a list of integers"),
            ({"0": 1}, "not a list of integers"),
            ("12", "not a list of integers"),
            ([1] * 21, "more than the 20 tokens that were asked for"),
        ]
    },
    "ids bit by bit": ((200, STREAM, [choice("a", token_ids=[1] * 7)] * 4), "more than the 20 tokens"),
    "prompt ids": ((200, STREAM, [choice("a", "stop", prompt_token_ids=[-1])]), "its prompt_token_ids hold -1"),
    "counts of text": ((200, STREAM, ['data: {"choices": [], "usage": {"completion_tokens": "5"}}']), "it counts 5 tokens"),
    "a pause of a day": ((429, "text/plain", [], {"Retry-After": "86400"}), "a pause of 86400 s: start the run again then"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_after_one_request(name: str) -> None:
    answer, message = REFUSED[name]
    text, number = attempts(answer, GOOD)
    assert message in text
    assert (text[:6], number) == ("ERROR ", 1)


def test_a_filtered_completion_says_so(tally: Tally) -> None:
    def say(handler: Handler, body: dict[str, Any]) -> None:
        handler.start()
        handler.event("I will", token_ids=[5, 6])
        handler.event("", ["content_filter", "SAFETY", "refusal", "sensitive"][body["seed"]])

    with serving(say) as server:
        http = HttpSampler(server.url, "m")
        samples = list(http.sample([Request((1,), seed, seed, "q") for seed in range(4)], CONFIG))
    assert [(sample.text, sample.finish_reason) for sample in samples] == [("I will", "content_filter")] * 4
    assert tally.counts["filtered"] == 4


@pytest.mark.parametrize("finish", ["stop", "length", "content_filter"])
def test_an_empty_completion_is_a_sample(finish: str) -> None:
    assert attempts((200, STREAM, [choice("", finish)]), tokenizer=None) == ("", 1)
    assert attempts((200, STREAM, [choice(None, finish)])) == ("", 1)


def test_half_characters_are_put_together() -> None:
    assert whole_text(["\ud83d", "\ude00"]) == "\U0001f600"
    assert whole_text(["a\ud800", " b"]) == "a\ufffd b"
    assert attempts((200, STREAM, ['data: {"choices": [{"text": "\\ud83d"}]}', choice("\ude00!", "stop")])) == (
        "\U0001f600!",
        1,
    )


async def _chunks(parts: list[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def read(parts: list[bytes]) -> list[bytes]:
    async def collect() -> list[bytes]:
        return [event async for event in events(_chunks(parts))]

    return asyncio.run(collect())


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_lines_end_wherever_chunks_do(end: bytes) -> None:
    body = end.join(
        [b'data: {"a":', b"data: 1}", b"", b": c", b'data: {"b": 2}', b'data: {"c": 3}', b"", b"data: [DONE]", b""]
    )
    for size in (1, 2, 3, 1000):
        found = read([body[at : at + size] for at in range(0, len(body), size)])
        assert [json.loads(event) for event in found] == [{"a": 1}, {"b": 2}, {"c": 3}]


@pytest.mark.parametrize("seed", range(20))
def test_a_stream_cut_anywhere_is_the_same(seed: int) -> None:
    """Against the whole body, split by hand."""
    rng = random.Random(seed)
    lines = [rng.choice([": c", "", 'data: {"a": 1}', "data: \u2028x\x85", "event: e", "data:"]) for _ in range(30)]
    body = "\n".join([*lines, "data: [DONE]", "data: after", ""]).encode()
    expected = [line.encode()[5:].strip() for line in lines if line.startswith("data:") and line[5:].strip(" ")]
    cuts = sorted(rng.choices(range(len(body)), k=12))
    parts = [body[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    assert read(parts) == expected


def test_a_line_without_an_end_is_read_in_linear_time() -> None:
    begin = time.monotonic()
    assert len(read([b"x" * 64] * 400_000)[0]) == 64 * 400_000
    assert time.monotonic() - begin < 5


def test_endless_replies_end() -> None:
    def endless(kind: str, piece: bytes) -> tuple[str, float]:
        def say(handler: Handler, body: dict[str, Any]) -> None:
            handler.start(*((200, STREAM) if kind != "refusal" else (400, "text/plain")))
            while not server.released.is_set():
                handler.write(piece)

        with serving(say) as server:
            begin = time.monotonic()
            with pytest.raises(EndpointError) as caught:
                next(HttpSampler(server.url, "m").sample([Request((1,), 5, "k", "why?")], CONFIG))
            assert len(server.bodies) == 1
        return str(caught.value), time.monotonic() - begin

    for kind, piece, message in [
        ("line", b"data: " + b"x" * 65536, "its answer is longer than"),
        ("events", choice("x" * 1000).encode() + b"\n\n", "its answer is longer than"),
        ("comments", b": " + b"x" * 65536 + b"\n", "its answer is longer than"),
        ("refusal", b"x" * 65536, "answers 400"),
    ]:
        said, seconds = endless(kind, piece)
        assert message in said
        assert seconds < 5


@pytest.mark.parametrize(
    "piece", [b": ping\n\n", b'data: {"choices": []}\n\n', choice("").encode() + b"\n\n", b"data:\n\n"]
)
def test_a_stream_that_only_stays_alive_is_given_up(piece: bytes) -> None:
    def say(handler: Handler, body: dict[str, Any]) -> None:
        handler.start()
        while not server.released.wait(0.05):
            handler.write(piece)

    with serving(say) as server:
        begin = time.monotonic()
        with pytest.raises(EndpointError, match=r"silent for 0.4 s"):
            next(HttpSampler(server.url, "m", chunk_timeout=0.4).sample([Request((1,), 5, "k", "why?")], CONFIG))
        assert 0.3 < time.monotonic() - begin < 3


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "2"}, 2),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "in a while"}, 10_000),
        ({"retry-after": email.utils.formatdate(time.time() - 100, usegmt=True)}, 0),
        ({}, 0),
        *(({"retry-after": text}, 0) for text in ("", "soon", "-5", "nan", "inf", "1e999", "Mon, 99 Foo", "\x1b[2J")),
    ],
)
def test_the_pause_that_is_asked_for(headers: dict[str, str], seconds: float) -> None:
    if headers.get("retry-after") == "in a while":  # a date, of the test's own time
        headers = {"retry-after": email.utils.formatdate(time.time() + seconds, usegmt=True)}
    assert wait_of(headers) == pytest.approx(seconds, abs=60 if seconds == 10_000 else 0)


@pytest.mark.parametrize("status", [408, 409, 425, 429, 503])
def test_a_pause_holds_back_all_requests(status: int, tally: Tally) -> None:
    times: list[float] = []

    def say(handler: Handler, body: dict[str, Any]) -> None:
        times.append(time.monotonic())
        if len(times) == 1:
            handler.start(status, "text/plain", Retry_After="0.6")
            return
        handler.start()
        handler.event("x", "stop", token_ids=[1])

    with serving(say) as server:
        http = HttpSampler(server.url, "m", backoff=0.001, concurrency=1)
        assert len(list(http.sample([Request((1,), seed, seed, "q") for seed in range(3)], CONFIG))) == 3
    assert times[1] - times[0] >= 0.55
    assert tally.reasons == {str(status): 1}


KEY = "sk-abcdefgh-0123456789"


@pytest.mark.parametrize("around", ["{}\n", "{}\r\n", " {}", "\t{} \n\n"])
def test_a_key_with_blanks_around_it_is_sent_without(around: str) -> None:
    address = Address("http://h/v1", "/completions", around.format(KEY))
    assert address.headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "key", ["", " \n", "sk-secret\nX-Evil: 1", "sk secret", "sk-secr\u00e9t", "sk-secret\x00", "sk\x1b[2J"]
)
def test_a_key_that_no_header_carries_is_refused_unseen(key: str) -> None:
    with pytest.raises(ValueError, match="the api_key") as caught:
        HttpSampler("http://h/v1", "m", api_key=key)
    assert "secr" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "http://user:hunter22@{}/v1",
        "http://hunter22@{}/v1",
        "http://u:hunter22%40x%3A@{}/v1/",
        "http://:hunter22@{}/v1",
    ],
)
@pytest.mark.parametrize("status", [200, 302, 400, 401, 404, 500])
def test_a_password_in_the_address_becomes_a_header_and_is_shown_nowhere(address: str, status: int) -> None:
    word = address[7:].partition("@{}")[0].removeprefix("user:").removeprefix("u:").removeprefix(":")

    def say(handler: Handler, body: dict[str, Any]) -> None:
        sent = handler.headers["authorization"]
        handler.start(status, "text/plain")
        handler.write(
            f"you sent {sent}: {word}, {urllib.parse.unquote(word)}: {'x ' * 132}{word} {'y ' * 200}".encode()
        )

    with serving(say) as server:
        http = HttpSampler(address.format(server.url[7:-3]), "m", max_retries=0)
        assert "hunter22" not in json.dumps(http.describe())
        with pytest.raises(EndpointError) as caught:
            next(http.sample([Request((1,), 5, "k", "why?")], CONFIG))
    sent = server.headers_seen[0]["authorization"]
    assert sent.startswith("Basic ")
    link: BaseException | None = caught.value
    while link is not None:
        assert "hunter22" not in f"{link} {link!r}"
        assert sent.split()[1] not in f"{link} {link!r}"
        link = link.__cause__ or link.__context__


@pytest.mark.parametrize(
    "address",
    [
        *(
            f"http://user:hunter22@{rest}"
            for rest in ("h:port/v1", "h:70000/v1", "h/v1?a=1", "h/v1#x", "/v1", "[::1/v1")
        ),
        *("http://user:hunter22/x@h/v1", "user:hunter22@h/v1", "ftp://user:hunter22@h/v1", "http://h/v1?key=hunter22"),
        *("http://user:hunter22?@h/v1", "http://u:hunter22://x@h/v1", "http://u:hunter22\n@h/v1"),
    ],
)
def test_an_address_that_is_refused_shows_no_password(address: str) -> None:
    try:
        http = HttpSampler(address, "m", max_retries=0)
    except ValueError as caught:
        said = str(caught)
    else:
        with pytest.raises(EndpointError) as failed:
            next(http.sample([Request((1,), 5, "k", "why?")], CONFIG))
        said = str(failed.value)
    assert "hunter22" not in said


def test_a_password_and_a_key_are_one_too_many() -> None:
    with pytest.raises(ValueError, match="give one of them"):
        HttpSampler("http://user:pass@h/v1", "m", api_key="k")


def test_a_completion_that_repeats_the_key_is_not_stored() -> None:
    text, number = attempts((200, STREAM, [choice(f"your key is {KEY}", "stop")]), api_key=KEY)
    assert "holds the key or password" in text
    assert (KEY in text, number) == (False, 1)


def test_a_key_is_not_shown_cut_in_half() -> None:
    said, _ = attempts((400, "text/plain", ["x" * 290 + KEY + " y" * 200]), api_key=KEY)
    assert "sk-" not in said


def test_an_odd_proxy_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://user:hunter22@proxy:port")
    with pytest.raises(ValueError, match="the address of a proxy in the environment") as caught:
        next(HttpSampler("http://h/v1", "m").sample([Request((1,), 5, "k", "why?")], CONFIG))
    assert "hunter22" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ALL_PROXY", "socks5://proxy:1", "a SOCKS proxy"),
        ("NO_PROXY", "localhost,[::1]", "NO_PROXY"),
        ("SSL_CERT_FILE", "/nowhere/ca.pem", "SSL_CERT_FILE"),
    ],
)
def test_an_environment_that_no_client_can_use_is_one_line(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        next(HttpSampler("http://h/v1", "m").sample([Request((1,), 5, "k", "why?")], CONFIG))
    assert attempts(GOOD) == ("42", 1)  # a server on this machine needs none of it


def test_a_server_that_speaks_no_tls_is_not_asked_again() -> None:
    with serving(lambda handler, body: handler.start(400)) as server:
        http = HttpSampler(server.url.replace("http", "https", 1), "m", max_retries=2, backoff=0.001)
        with pytest.raises(
            EndpointError, match="WRONG_VERSION_NUMBER.*: it speaks no TLS, give an address that starts w"
        ):
            next(http.sample([Request((1,), 5, "k", "why?")], CONFIG))


def test_a_server_on_this_machine_is_not_asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_PROXY")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert attempts(GOOD) == ("42", 1)
    assert [Address(f"http://{host}:1/v1", "", None).is_near for host in ("localhost", "[::1]", "127.0.1.1")] == [
        True
    ] * 3
    assert not Address("http://127.0.0.1.example/v1", "", None).is_near


@pytest.mark.parametrize("seed", range(60))
def test_random_events_are_kept_or_refused(seed: int) -> None:
    """Any JSON in any place: no other exception than the two."""
    rng = random.Random(seed)

    def value(depth: int = 0) -> Any:
        leaves = [None, True, -1, 2, 1e300, float("nan"), "", "stop", "a\ud800", "\x1b[2J", 10**30]
        if depth > 3 or rng.random() < 0.5:
            return rng.choice(leaves)
        names = [
            "choices",
            "text",
            "token_ids",
            "finish_reason",
            "error",
            "code",
            "message",
            "usage",
            "index",
            "prompt_token_ids",
        ]
        if rng.random() < 0.5:
            return [value(depth + 1) for _ in range(rng.randrange(3))]
        return {rng.choice(names): value(depth + 1) for _ in range(rng.randrange(4))}

    for _ in range(40):
        reply = Reply(most_tokens=5, vocabulary=50)
        shape = (
            value()
            if rng.random() < 0.3
            else {"choices": [{rng.choice(["text", "finish_reason", "token_ids"]): value(2)}]}
        )
        try:
            reply.add(json.dumps(shape).encode())
            reply.finish()
        except (EndpointError, PassingFailure) as caught:
            said = str(caught)
        else:
            said = ""
        assert len(said) < 1000


@pytest.mark.parametrize(
    ("address", "is_near"),
    [
        *((f"http://{host}:8000/v1", True) for host in ("localhost", "127.0.0.1", "127.8.8.8", "0.0.0.0", "[::1]", "[::]")),
        *((f"http://{host}:65535/v1", False) for host in ("10.0.0.1", "h", "0.0.0.1", "[::2]", "localhost.example")),
    ],
)  # fmt: skip
def test_a_proxy_is_not_asked_for_a_server_on_this_machine(address: str, is_near: bool) -> None:
    assert Address(address, "/completions", None).is_near is is_near
