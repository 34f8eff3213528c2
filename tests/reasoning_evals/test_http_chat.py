"""Chat endpoints as arms: thought and answer of any server become a text that is split again; counts without a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.cli.main import main
from local_endpoint import Handler, Say, Server, serving
from moe_steer.thinking import FORMATS, OUTSIDE
from reasoning_evals.engines import Chat, HttpSampler, Request, Sample, SamplingConfig
from reasoning_evals.engines.http_audit import Tally
from reasoning_evals.engines.http_reply import EndpointError
from reasoning_evals.runs import read_audit, read_generations, read_grades, read_run
from tiny_reasoners import tiny_tokenizer

CONFIG = SamplingConfig(max_new_tokens=20, batch_size=8)
THINK = FORMATS["think"]
KEY = "CHAT_KEY_OF_THIS_TEST"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def write(
    handler: Handler, *deltas: dict[str, Any], finish: str | None = "stop", usage: Any = None, **more: Any
) -> None:
    handler.start()
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    for one in [*choices, {"index": 0, "delta": {}, "finish_reason": finish, **more}]:
        handler.write(b"data: " + json.dumps({"choices": [one]}).encode() + b"\n\n")
    if usage is not None:
        handler.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
    handler.write(b"data: [DONE]\n\n")


def one(say: Say, chat: Chat | None = None, prompt: str = "", **options: Any) -> tuple[Sample, Server]:
    chat = chat or Chat()
    with serving(say) as server:
        http = HttpSampler(server.url, "m", chat=chat, **{"max_retries": 1, "backoff": 0.001, **options})
        request = Request((), 7, "k", prompt or chat.render("why?").text)
        return next(http.sample([request], CONFIG)), server


USAGE = {"completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 6}}
ROLE = {"role": "assistant", "content": ""}
DELTAS: dict[str, tuple[list[dict[str, Any]], str, str, str]] = {
    # deltas, finish -> state of the thought, thought, answer
    "vLLM, DeepSeek": ([ROLE, {"reasoning_content": "so "}, {"reasoning_content": "so"}, {"content": "4"}], "closed", "so so", "4"),
    "OpenRouter, Groq, Ollama": ([ROLE, {"reasoning": "so "}, {"reasoning": "so"}, {"content": "4"}], "closed", "so so", "4"),
    "both at once": ([{"reasoning": "so", "reasoning_content": "so"}, {"content": "4"}], "closed", "so", "4"),
    "in parts, Mistral": ([{"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "so"}]}]}, {"content": "4"}], "closed", "so", "4"),
    "all in parts": ([{"content": [{"type": "thinking", "thinking": "so"}, {"type": "text", "text": "4"}]}], "closed", "so", "4"),
    "in details, MiniMax": ([{"reasoning_details": [{"type": "reasoning.text", "text": "so"}]}, {"content": "4"}], "closed", "so", "4"),
    "in details as well": ([{"reasoning": "so", "reasoning_details": [{"text": "so"}]}, {"content": "4"}], "closed", "so", "4"),
    "in blocks, Anthropic": ([{"thinking_blocks": [{"type": "thinking", "thinking": "so"}]}, {"content": "4"}], "closed", "so", "4"),
    "a part with a summary, Databricks": ([{"content": [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]}]}, {"content": [{"type": "text", "text": "4"}]}], "closed", "so", "4"),
    "other names": ([{"thinking": "so"}, {"content": [{"type": "output_text", "text": "4"}]}], "closed", "so", "4"),
    "parts beside the thought": ([{"reasoning": "so", "content": [{"type": "thinking", "thinking": "so"}]}, {"content": "4"}], "closed", "so", "4"),
    "encrypted details": ([{"reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]}, {"content": "4"}], "none", "", "4"),
    "nulls": ([{"content": None, "reasoning_content": "so"}, {"content": "4", "reasoning": None}], "closed", "so", "4"),
    "no thought": ([ROLE, {"content": "4"}, {"content": "2"}], "none", "", "42"),
    "blank thought": ([{"reasoning": " \n"}, {"content": "4"}], "none", "", "4"),
    "tags left in": ([{"content": "<think>so"}, {"content": "</think>4"}], "closed", "so", "4"),
    "half the tags left in": ([{"content": "so</think>4"}], "closed", "so", "4"),
    "a tag in the thought": ([{"reasoning": "I write </think> and <think> soon"}, {"content": "4"}], "closed", "I write < /think> and < think> soon", "4"),
    "a tag in the answer": ([{"reasoning": "so"}, {"content": "the tag <think> is 4"}], "closed", "so", "the tag < think> is 4"),
    "a thought that never ends": ([{"reasoning": "so"}], "truncated", "so", ""),
    "a refusal": ([{"refusal": "I will not."}], "none", "", "I will not."),
    "a call of a tool": ([{"reasoning": "so"}, {"content": "4", "tool_calls": [{"id": "x"}]}], "closed", "so", "4"),
}  # fmt: skip


@pytest.mark.parametrize("name", DELTAS)
def test_what_servers_send_is_split_again(name: str) -> None:
    deltas, state, thought, answer = DELTAS[name]
    sample, server = one(lambda handler, _: write(handler, *deltas, usage=USAGE))
    assert tuple(THINK.split(sample.text, opened=False)) == (state, thought, answer)
    assert sample == Sample("k", (), sample.text, "stop", 9, 6)
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "why?"}]


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.starts != OUTSIDE and fmt.thinks])
def test_every_format_gives_back_what_was_written(name: str) -> None:
    fmt, chat = FORMATS[name], Chat(fmt=FORMATS[name])
    for thought in ("so", "a\n\nb", f"x {fmt.close} y", f"{fmt.open}z", f"{fmt.end}{fmt.open}{fmt.close}"):
        for answer in ("4", f"the tags {fmt.open.strip()} and {fmt.close.strip()}: 4", "\\boxed{4}\n"):
            found = fmt.split(chat.write(thought, answer), prompt=chat.render("q").text)
            assert found.state == "closed"
            assert "".join(found.thought.split()) == "".join(chat._disarmed(thought).split())
            assert found.answer.endswith("4") or found.answer.endswith("4}")
        assert fmt.split(chat.write(thought, " "), prompt="x").state == "truncated"
    assert fmt.split(chat.write("", "4")) == ("none", "", "4")


def test_an_answer_in_one_piece() -> None:
    def say(handler: Handler, body: dict[str, Any]) -> None:
        handler.start(200, "application/json")
        message = {"role": "assistant", "content": "4", "reasoning_content": "so"}
        choice = {"index": 0, "message": message, "finish_reason": "length"}
        handler.write(json.dumps({"choices": [choice], "usage": {"completion_tokens": 3}}).encode())

    sample, _ = one(say)
    assert (sample.text, sample.finish_reason, sample.num_tokens) == (THINK.write("so", "4"), "length", 3)


@pytest.mark.parametrize(
    ("usage", "tokens", "thinking"),
    [
        ({"prompt_tokens": 32, "completion_tokens": 90, "total_tokens": 122, "completion_tokens_details": {"reasoning_tokens": 40}}, 90, 40),
        ({"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 135, "completion_tokens_details": {"reasoning_tokens": 94}}, 103, 94),  # xAI
        ({"prompt_tokens": 32, "completion_tokens": 90, "total_tokens": 162, "completion_tokens_details": {"reasoning_tokens": 40}}, 130, 40),
        ({"prompt_tokens": 21, "completion_tokens": 5, "total_tokens": 86}, 65, 60),  # Gemini
        ({"completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 94}}, 103, 94),  # a part is no more than the whole
        ({"prompt_tokens": 1, "completion_tokens": 9, "total_tokens": 10, "reasoning_tokens": 6}, 9, 6),  # SGLang
        ({"prompt_tokens": None, "completion_tokens": 9, "total_tokens": 400}, 9, None),
        ({"prompt_tokens": 0, "completion_tokens": 9, "total_tokens": 9, "completion_tokens_details": None}, 9, None),
        ({"prompt_tokens": 50, "completion_tokens": 9, "total_tokens": 20}, 9, None),
        ({"prompt_tokens": -1, "completion_tokens": 9, "total_tokens": 8.0}, 9, None),
    ],
)  # fmt: skip
def test_a_thought_counts_as_tokens_wherever_the_server_counts_it(
    usage: Any, tokens: int, thinking: int | None
) -> None:
    sample, _ = one(lambda handler, _: write(handler, {"reasoning": "so"}, {"content": "4"}, usage=usage))
    assert (sample.num_tokens, sample.num_thinking) == (tokens, thinking)


@pytest.mark.parametrize(
    ("deltas", "reasoning", "thinking"),
    [
        ([{"content": "4"}], 6, 6),  # counted, and not shown: OpenAI
        ([{"content": "4"}], 0, 0),
        ([{"content": "4"}], None, 0),
        ([{"reasoning": "so"}, {"content": "4"}], 6, 6),
        ([{"reasoning": "so"}, {"content": "4"}], 0, None),  # shown, and not counted: SGLang
        ([{"content": "<think>so</think>4"}], 0, None),
        ([{"content": "<think>\n</think>4"}], 0, 0),
    ],
)
def test_tokens_of_a_thought_are_graded_by_what_is_known(
    deltas: list[dict[str, Any]], reasoning: int | None, thinking: int | None, tmp_path: Path
) -> None:
    usage = {"completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": reasoning}}
    with serving(lambda handler, _: write(handler, *deltas, usage=usage)) as server:
        assert generate(server.url, tmp_path / "run") == 0
    row = read_grades(tmp_path / "run")[0]
    answer = None if thinking is None else 9 - thinking
    assert (row.thinking_tokens, row.answer_tokens, row.total_tokens) == (thinking, answer, 9)


@pytest.mark.parametrize("place", ["choice", "x_groq"])
def test_counts_in_the_choice_or_beside_it(place: str) -> None:
    def say(handler: Handler, _: Any) -> None:
        choice = {"index": 0, "delta": {"content": "4"}, "finish_reason": "stop"}
        counted = {"usage": USAGE}
        event = {"choices": [choice | counted]} if place == "choice" else {"choices": [choice], place: counted}
        handler.start()
        handler.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    sample, _ = one(say)
    assert (sample.text, sample.num_tokens, sample.num_thinking) == ("4", 9, 6)


def test_a_message_that_is_said_again_at_the_end_counts_once() -> None:
    whole = {"delta": None, "message": {"content": "42"}}
    sample, _ = one(lambda handler, _: write(handler, {"content": "4"}, {"content": "2"}, usage=USAGE, **whole))
    assert sample.text == "42"


def test_token_ids_are_taken_where_they_are_sent() -> None:
    sample, _ = one(lambda handler, _: write(handler, {"content": "4"}, token_ids=[5, 6], usage=USAGE))
    assert (sample.token_ids, sample.num_tokens, sample.num_thinking) == ((5, 6), None, 6)


def test_without_ids_and_counts_a_tokenizer_is_needed() -> None:
    def say(handler: Handler, _: Any) -> None:
        write(handler, {"content": "4"})

    with pytest.raises(EndpointError, match="it sends no token ids: give the model's tokenizer"):
        one(say)
    with pytest.raises(EndpointError, match="it sends no token ids"):  # 0 tokens of a text is no count
        one(lambda handler, _: write(handler, {"content": "4"}, usage={"completion_tokens": 0}))
    tokenizer = tiny_tokenizer()
    assert one(say, tokenizer=tokenizer)[0].token_ids[-1] == tokenizer.eos_token_id


def test_what_is_sent() -> None:
    def say(handler: Handler, _: Any) -> None:
        write(handler, {"content": "4"}, usage=USAGE)

    own = {"model", "messages", "stream_options", "max_tokens", "temperature", "top_p", "n", "seed", "stream"}
    chat = Chat(system="Be brief.", effort="low", template_arguments={"enable_thinking": False})
    body = one(say, chat)[1].bodies[0]
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "why?"}]
    assert (body["reasoning_effort"], body["chat_template_kwargs"]) == ("low", {"enable_thinking": False})
    assert (body["stream_options"], body["max_tokens"], body["seed"]) == ({"include_usage": True}, 20, 7)
    assert set(body) - own == {
        *("reasoning_effort", "chat_template_kwargs", "top_k", "min_p", "repetition_penalty", "skip_special_tokens"),
        *("spaces_between_special_tokens", "return_token_ids"),
    }
    assert set(one(say, extensions=False)[1].bodies[0]) == own
    assert set(one(say, Chat(effort="high"), extensions=False)[1].bodies[0]) == own | {"reasoning_effort"}
    with pytest.raises(ValueError, match="template arguments are a field that plain OpenAI endpoints do not know"):
        one(say, chat, extensions=False)
    with pytest.raises(ValueError, match="a chat endpoint takes messages, as Chat.render makes them"):
        one(say, prompt="User: why?")
    with pytest.raises(ValueError, match="prompt_as_ids is for completions"):
        one(say, prompt_as_ids=True)
    with pytest.raises(ValueError, match="the thinking format harmony is not for chat endpoints"):
        Chat(fmt=FORMATS["harmony"])


@pytest.mark.parametrize(
    "said",
    [
        '{{"detail": [{{"type": "extra_forbidden", "loc": ["body", "{}"], "msg": "Extra inputs are not permitted"}}]}}',
        'Invalid JSON payload received. Unknown name "{}": Cannot find field.',
        "Unsupported parameter: '{}'",
        '{{"error": {{"message": "Unknown name \\"{}\\""}}}}',
    ],
)
def test_fields_that_a_server_refuses_are_left_out_and_a_lost_seed_is_said(said: str, tally: Tally) -> None:
    def say(handler: Handler, body: dict[str, Any]) -> None:
        refused = [name for name in ("stream_options", "n", "seed") if name in body]
        if refused:
            handler.start(422, "application/json")
            handler.write(said.format(refused[0]).encode())
        else:
            write(handler, {"content": "4"}, usage=USAGE)

    with serving(say) as server:
        http = HttpSampler(server.url, "m", chat=Chat(), extensions=False, backoff=0.001)
        for key in ("a", "b"):
            assert next(http.sample([Request((), 7, key, Chat().render("why?").text)], CONFIG)).text == "4"
        assert len(server.bodies) == 3 + 1 + 1, "the second request is sent without them"
    assert tally.counts["unseeded"] == 2


def test_a_refusal_of_something_else_leaves_nothing_out() -> None:
    def say(handler: Handler, body: dict[str, Any]) -> None:
        handler.start(400, "application/json")
        handler.write(b'{"error": {"message": "temperature must be 1; seeds and name are fine, so is n"}}')

    with serving(say) as server:
        http = HttpSampler(server.url, "m", chat=Chat(), extensions=False)
        with pytest.raises(EndpointError, match="temperature must be 1"):
            next(http.sample([Request((), 7, "a", Chat().render("why?").text)], CONFIG))
        assert len(server.bodies) == 1


def test_models_that_take_the_limit_under_another_name() -> None:
    def say(handler: Handler, body: dict[str, Any]) -> None:
        if "max_tokens" in body:
            handler.start(400, "application/json")
            said = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
            handler.write(json.dumps({"error": {"message": said, "code": "unsupported_parameter"}}).encode())
        else:
            assert body["max_completion_tokens"] == 20
            write(handler, {"content": "4"}, usage=USAGE)

    with serving(say) as server:
        http = HttpSampler(server.url, "m", chat=Chat(), extensions=False, concurrency=1)
        requests = [Request((), number, number, Chat().render("why?").text) for number in range(3)]
        assert len(list(http.sample(requests, CONFIG))) == 3
        assert len(list(http.sample(requests, CONFIG))) == 3
    assert ["max_tokens" in body for body in server.bodies].count(True) <= 3
    assert not any("max_tokens" in body for body in server.bodies[-3:])


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"choices": [{"text": "4"}]}, "without --chat-endpoint"),
        ({"choices": [{"delta": "4"}]}, "without a message"),
        ({"choices": [{"delta": {"content": 4}}]}, "its content is not a text: 4"),
        ({"choices": [{"delta": {"content": ["4"]}}]}, "its content is not a text"),
        ({"choices": [{"delta": {"content": [{"type": "text", "text": 4}]}}]}, "its content is not a text"),
        ({"choices": [{"delta": {"content": [{"type": "image_url"}]}}]}, "its content is not a text"),
        ({"choices": [{"delta": {"reasoning": {"a": 1}}}]}, "its reasoning is not a text"),
        ({"choices": [], "usage": {"completion_tokens": -1}}, "it counts -1 tokens"),
        ({"choices": [], "usage": {"completion_tokens": True}}, "it counts true tokens"),
        ({"choices": [], "usage": {"completion_tokens": 1, "completion_tokens_details": {"reasoning_tokens": "x"}}}, "it counts x"),
    ],
)  # fmt: skip
def test_what_is_no_message_is_refused(event: dict[str, Any], message: str) -> None:
    def say(handler: Handler, _: Any) -> None:
        handler.start()
        handler.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    with pytest.raises(EndpointError, match=message):
        one(say)


def test_a_format_without_thoughts_meets_one() -> None:
    with pytest.raises(EndpointError, match="it sends a thought, and the thinking format is none"):
        one(
            lambda handler, _: write(handler, {"reasoning": "so"}, {"content": "4"}, usage=USAGE),
            Chat(fmt=FORMATS["none"]),
        )


def answering(handler: Handler, body: dict[str, Any]) -> None:
    """A hosted model: right where the seed is even, filtered at every fifth, and one stream that breaks."""
    with handler.server.lock:
        first = len(handler.server.bodies) == 1
    if first:
        write(handler, {"reasoning_content": "so"}, finish=None)
    elif body["seed"] % 5 == 0:
        write(handler, {"content": "I "}, finish="content_filter", usage={"completion_tokens": 1})
    else:
        answer = f"\\boxed{{{body['seed'] % 10}}}"
        write(handler, {"reasoning_content": "so, \x1b[2J"}, {"content": answer}, usage=USAGE)


def generate(url: str, out: Path, *more: str) -> int:
    sizes = ("--num", "5", "--samples", "2", "--concurrency", "2", "--max-new-tokens", "50")
    model = ("--endpoint", url, "--chat-endpoint", "--model", "a/hosted")
    return main(["generate", *model, *sizes, "--out", str(out), *more])


def test_any_hosted_model_is_an_arm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "sk-0123456789abc\n")
    out = tmp_path / "run"
    with serving(answering) as server:
        asked = (
            "--system",
            "Be brief.",
            "--effort",
            "high",
            "--template-arg",
            "budget=3",
            "--arm-name",
            "a\x1b[31mred",
        )
        assert generate(server.url, out, *asked, "--api-key-variable", KEY) == 0
        whole = (out / "generations.jsonl").read_bytes()
        assert {seen["authorization"] for seen in server.headers_seen} == {"Bearer sk-0123456789abc"}
        (out / "generations.jsonl").write_bytes(whole[:-9])
        assert generate(server.url, out, *asked) == 0
        assert (out / "generations.jsonl").read_bytes() == whole
        assert {body["reasoning_effort"] for body in server.bodies} == {"high"}
        assert server.bodies[0]["chat_template_kwargs"] == {"budget": 3}
        assert generate(server.url, out, "--effort", "low", "--arm-name", "a\x1b[31mred") == 1
    shown = "".join(capsys.readouterr())
    assert "1 retries of 1 samples (cut stream: 1)" in shown
    assert "without token ids, which the server counted" in shown
    assert "\x1b" not in shown
    assert "sk-0123" not in shown + "".join(path.read_text() for path in out.iterdir())

    sampler = read_run(out)["config"]["arms"]["a\x1b[31mred"]["sampler"]
    assert sampler["chat"] == {"effort": "high", "template_arguments": {"budget": 3}}
    assert (sampler["thinking"]["name"], sampler["thinking_tokens"]) == ("think", None)
    samples = {(item.problem_id, item.sample_idx): item for item in read_generations(out)}
    grades = read_grades(out)
    assert len(grades) == 10
    for row in grades:
        item = samples[row.problem_id, row.sample_idx]
        if item.seed % 5 == 0:
            assert (row.finish_reason, row.outcome, row.total_tokens) == ("content_filter", "no_answer", 1)
            assert "content filter" in row.reason
        else:
            assert (row.state, row.extracted) == ("closed", str(item.seed % 10))
            assert (row.thinking_tokens, row.answer_tokens, row.total_tokens) == (6, 3, 9)
    (counts,) = read_audit(out).rows["a\x1b[31mred"][:1]
    assert counts.get("filtered", 0) == sum(row.finish_reason == "content_filter" for row in grades)
    assert main(["report", str(out)]) == 0
    assert "\x1b" not in "".join(path.read_text() for path in out.glob("report.*"))
    for form in ("lm-eval", "parquet"):
        assert main(["export", str(out), "--format", form, "--out", str(tmp_path / form)]) == 0
    assert "\x1b" not in "".join(capsys.readouterr())
    assert main(["collect", "--model", "lab", "--traces", str(out), "--out", str(tmp_path / "counts")]) == 1
    assert "came from a chat endpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--no-thinking"], "--no-thinking is for prompts that are rendered here"),
        (["--chat-template", "x.jinja"], "--chat-template is for prompts that are rendered here"),
        (["--prompt-as-ids"], "--prompt-as-ids is for completions"),
        (["--thinking", "harmony"], "the thinking format harmony is not for chat endpoints"),
        (["--thinking", "odd"], "the thinking format 'odd' is unknown"),
        (["--plain-endpoint", "--template-arg", "a=1"], "plain OpenAI endpoints do not know"),
        (["--template-arg", "a"], "write NAME=VALUE"),
        (["--tokenizer", "./nowhere"], "there is no model folder './nowhere'"),
        (["--api-key-variable", "hf_AbCdEfSecret"], "give the variable's name, not the key"),
        (["--api-key-variable", "sk-AbCdEfSecret"], "give the variable's name, not the key"),
    ],
)
def test_what_is_refused(arguments: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("http://127.0.0.1:9/v1", tmp_path / "run", *arguments) == 1
    shown = capsys.readouterr().err
    assert text in shown
    assert "Secret" not in shown
    assert shown.count("\n") == 1


def test_it_needs_an_endpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--chat-endpoint", "--num", "2", "--out", str(tmp_path / "run")]) == 1
    assert "--chat-endpoint is for sampling over HTTP: give --endpoint" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["u:hunter22", "hunter22"])
def test_a_password_reaches_no_console_and_no_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(handler: Handler, _: Any) -> None:
        handler.start(400, "text/plain")
        handler.write(b"who is hunter22? \x1b[2J")

    with serving(say) as server:
        assert generate(f"http://{name}@{server.url[7:]}", tmp_path / "run") == 1
    shown = "".join(capsys.readouterr())
    files = "".join(path.read_text() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert "answers 400" in shown
    assert "hunter22" not in shown + files
    assert "\x1b" not in shown
