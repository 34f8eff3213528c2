"""``moe-steer generate --endpoint``: a run over HTTP, what the endpoint did kept with it, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.cli.main import main
from local_endpoint import Handler, serving
from reasoning_evals.engines.http_audit import HttpAudit, http_line
from reasoning_evals.engines.http_sampler import HttpSampler
from reasoning_evals.engines.sampling import Request, SamplingConfig
from reasoning_evals.report import build_report, render_html, render_markdown
from reasoning_evals.runs.audits import read_audit
from reasoning_evals.runs.run_folder import read_generations, read_run

KEY = "ENDPOINT_KEY_OF_THIS_TEST"


class Moody:
    """Answers every sample with its seed's last digit; refuses the first two requests, and breaks off the third."""

    def __init__(self) -> None:
        self.num = 0

    def __call__(self, handler: Handler, body: dict[str, Any]) -> None:
        with handler.server.lock:
            self.num += 1
            num = self.num
        if num <= 2:
            handler.start(429, "text/plain", Retry_After="0")
            return
        handler.start()
        handler.event(f"so</think>The answer is \\boxed{{{body['seed'] % 10}}}.", None if num == 3 else "stop")
        if num > 3:
            handler.write(b"data: [DONE]\n\n")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def generate(url: str, out: Path, *more: str) -> int:
    fast = ("--num", "6", "--samples", "2", "--concurrency", "3", "--server", "a script, 1.0")
    return main(["generate", "--endpoint", url, "--model", "lab", *fast, "--out", str(out), *more])


@pytest.mark.slow
def test_a_run_keeps_what_the_endpoint_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "a-secret")
    out = tmp_path / "run"
    with serving(Moody()) as server:
        assert generate(server.url, out, "--api-key-variable", KEY) == 0
        shown = capsys.readouterr().out
        line = "endpoint: 12 samples, 3 retries of 3 samples (429: 2, cut stream: 1), 12 without token ids, which were made from the text"
        assert line in shown
        assert "12 samples of 6 problems, 12 of them new" in shown
        assert {seen["authorization"] for seen in server.headers_seen} == {"Bearer a-secret"}
        assert server.most_under_way <= 3
        assert {body["model"] for body in server.bodies} == {"lab"}
        assert all(body["prompt"].endswith("<think>\n") for body in server.bodies)
        assert all("repetition_penalty" in body for body in server.bodies)

        # Started again it asks for nothing and says the same; torn, it makes the chunk again and counts it once.
        num = server.under_way, len(server.bodies)
        assert generate(server.url, out, "--concurrency", "2") == 0
        assert (server.under_way, len(server.bodies)) == num
        assert line in capsys.readouterr().out
        path = out / "generations.jsonl"
        whole = path.read_bytes()
        path.write_bytes(whole[:-5])
        assert generate(server.url, out) == 0
        assert path.read_bytes() == whole
    assert "endpoint: 12 samples, 0 retries, 12 without" in capsys.readouterr().out

    run = read_run(out)
    sampler = run["config"]["arms"]["baseline"]["sampler"]
    assert (sampler["engine"], sampler["model"], sampler["server"]) == ("http", "lab", {"said": "a script, 1.0"})
    assert "a-secret" not in "".join(path.read_text() for path in out.iterdir())
    assert {row["kind"] for row in read_audit(out).rows["baseline"]} == {"endpoint"}
    assert [json.loads(line)["rows"][1:] for line in (out / "audit.jsonl").read_text().splitlines()] == [
        [{"kind": "retry", "cause": "429", "retries": 2}, {"kind": "retry", "cause": "cut stream", "retries": 1}],
        [],
    ]
    assert len({one.seed for one in read_generations(out)}) == 12
    report = build_report(out)
    assert "retried samples" in render_html(report)
    assert "endpoint" in render_markdown(report)


@pytest.mark.slow
def test_plain_servers_and_ids(tmp_path: Path) -> None:
    with serving(Moody()) as server:
        assert (
            generate(server.url, tmp_path / "run", "--plain-endpoint", "--prompt-as-ids", "--arm-name", "steered") == 0
        )
        assert all(
            set(body) == {"model", "prompt", "max_tokens", "temperature", "top_p", "n", "seed", "stream"}
            for body in server.bodies
        )
        assert all(isinstance(body["prompt"], list) for body in server.bodies)
    assert list(read_run(tmp_path / "run")["config"]["arms"]) == ["steered"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--num", "0"], "num is 0: give a whole number >= 1"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--concurrency", "4"], "--concurrency is for sampling over HTTP: give --endpoint, or leave it out"),
        (["--server", "vllm"], "--server is for sampling over HTTP"),
        (["--plain-endpoint"], "--plain-endpoint is for sampling over HTTP"),
        (
            ["--endpoint", "http://127.0.0.1:9/v1", "--plan", "p.json", "--plain-endpoint"],
            "--plan is named in a field beyond OpenAI's own, and --plain-endpoint sends none: leave one out",
        ),
        (["--endpoint", "http://127.0.0.1:9/v1", "--dtype", "bfloat16"], "--dtype is decided by the server"),
        (["--endpoint", "127.0.0.1:9"], "base_url must start with http:// or https://, got '127.0.0.1:9'"),
        (
            ["--endpoint", "http://127.0.0.1:9/v1", "--api-key-variable", "NOT_SET_X"],
            "the environment variable NOT_SET_X is empty",
        ),
        (
            ["--endpoint", "http://127.0.0.1:9/v1", "--model", "./served"],
            "folder or hub id as --tokenizer, or --chat-endpoint",
        ),
        (["--endpoint", "http://127.0.0.1:9/v1", "--tokenizer", "./nowhere"], "there is no model folder './nowhere'"),
    ],
)
def test_what_is_refused(arguments: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--out", str(tmp_path / "run"), "--num", "2", *arguments]) == 1
    shown = capsys.readouterr().err
    assert text in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_counts_are_those_of_the_block(tmp_path: Path) -> None:
    with serving(Moody()) as server:
        sampler = HttpSampler(server.url, "m", backoff=0.001, tokenizer=None)
        sampler.tokenizer = type(
            "Letters", (), {"__call__": lambda self, text, **_: {"input_ids": list(text.encode())}}
        )()
        audits = []
        for _ in range(2):
            with HttpAudit(sampler) as audit:
                list(sampler.sample([Request((1,), 5, "k", "why?")], SamplingConfig(max_new_tokens=9)))
            audits.append(audit.to_rows())
    counts = {"kind": "endpoint", "samples": 1, "retokenized": 1}
    assert audits[0] == [
        {**counts, "retried_samples": 1},
        {"kind": "retry", "cause": "429", "retries": 2},
        {"kind": "retry", "cause": "cut stream", "retries": 1},
    ]
    assert audits[1] == [{**counts, "retried_samples": 0}]
    assert http_line(audits[1]) == "endpoint: 1 samples, 0 retries, 1 without token ids, which were made from the text"


def test_two_runs_that_were_not_named_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cold, hot, same = tmp_path / "cold", tmp_path / "hot", tmp_path / "elsewhere" / "hot"
    with serving(Moody()) as server:
        assert generate(server.url, cold, "--temperature", "0.6") == 0
        assert generate(server.url, hot, "--temperature", "1.0") == 0
    shutil.copytree(hot, same)
    capsys.readouterr()
    out = tmp_path / "c.json"
    assert main(["compare", "--baseline", str(cold), "--arm-folder", str(hot), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"two runs call an arm 'baseline': that of {hot} is named 'hot' here" in shown
    assert "hot against baseline: " in shown
    assert [arm["name"] for arm in json.loads(out.read_text())["arms"]] == ["baseline", "hot"]
    for folders, message in [((hot, same), "both call an arm 'baseline'"), ((cold,), "is given twice")]:
        assert main(["compare", "--baseline", str(cold), "--arm-folder", *map(str, folders)]) == 1
        assert message in capsys.readouterr().err
