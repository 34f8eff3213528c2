"""A real server, started as a user starts it, asked over HTTP. Runs in this project's environment; STEER_PYTHON is vLLM's."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[3]
NAMES = ("g2", "g16", "g64", "direction", "thought", "steps", "choice")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Server:
    """``moe-steer serve MODEL`` with plans of the reference."""

    def __init__(
        self,
        folder: Path,
        log: Path,
        port: int | None = None,
        options: Sequence[str] = (),
        model: str = "lab",
        names: Sequence[str] = NAMES,
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log, self.model = log, model
        plans = [part for name in names for part in ("--plan", str(folder / f"{name}.json"))]
        command = [sys.executable, "-m", "launch.cli.main", "serve", model, *plans, "--port", str(self.port)]
        command += [
            "--python",
            os.environ["STEER_PYTHON"],
            "--",
            "--dtype",
            "float32",
            "--max-model-len",
            "512",
            "--enforce-eager",
            *options,
        ]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        with log.open("ab") as file:
            # In a group of its own, so that all its processes can be killed at once.
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        deadline = time.monotonic() + 500
        while "what fired: /v1/steering" not in log.read_text(errors="replace"):
            assert self.process.poll() is None, log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
            time.sleep(0.5)

    def post(self, **body: Any) -> httpx.Response:
        body = {"model": self.model, "max_tokens": 5, "temperature": 0, "prompt": [1, 5, 6, 7], **body}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=300)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60)

    def end(self, number: int) -> None:
        os.killpg(self.process.pid, number)
        self.process.wait(60)


@pytest.fixture(scope="module")
def lab(reference: dict[str, Any]) -> dict[str, Any]:
    return reference["lab"]


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(folder, tmp_path_factory.mktemp("serve") / "log")
    yield started
    started.end(signal.SIGTERM)


def test_how_to_ask_is_said_in_one_line(server: Server) -> None:
    [line] = [one for one in server.log.read_text(errors="replace").splitlines() if one.startswith("serving lab at")]
    assert f"{server.url}/v1 with {', '.join(NAMES)}; ask with " in line
    assert '"vllm_xargs": {"moe_steer": "g2"}' in line


def test_all_plans_at_once_write_what_the_hooked_model_writes(server: Server, lab: dict[str, Any]) -> None:
    pairs = [(n, asked) for n in range(len(lab["prompts"])) for asked in lab["asked"]]
    before = server.get("/v1/steering").json()["plans"]

    def tokens(pair: tuple[int, str]) -> list[int]:
        n, asked = pair
        length = lab["new_tokens"]
        more = {"return_token_ids": True, "vllm_xargs": {"moe_steer": asked}}
        return server.post(prompt=lab["prompts"][n], max_tokens=length, **more).json()["choices"][0]["token_ids"]

    with ThreadPoolExecutor(len(pairs)) as pool:
        found = dict(zip(pairs, pool.map(tokens, pairs), strict=True))
    assert [pair for pair in pairs if found[pair] != lab["asked"][pair[1]]["tokens"][pair[0]]] == []
    after = server.get("/v1/steering").json()["plans"]
    hits = [b - a for a, b in zip(before["thought"]["hits"], after["thought"]["hits"], strict=True)]
    assert hits == lab["asked"]["thought"]["hits"]


def test_the_state_of_the_server(server: Server, folder: Path) -> None:
    from moe_steer import SteeringPlan

    state = server.get("/v1/steering").json()
    assert (state["version"], state["default"], set(state["plans"])) == (1, None, set(NAMES))
    assert state["server"]["engine"] == "vllm"
    for name, said in state["plans"].items():
        plan = SteeringPlan.load(folder / f"{name}.json")
        assert said["digest"] == plan.digest()
        assert len(said["entries"]) == len(said["hits"]) == len(plan.active_experts) + len(plan.active_residual)
    assert state["plans"]["choice"]["layers"] == [1, 2, 3]
    assert state["plans"]["choice"]["routers"] == ["CPURouter"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_audit_of_one_reply(server: Server, lab: dict[str, Any], stream: bool) -> None:
    prompts = lab["prompts"][:2]
    asked = {
        "vllm_xargs": {"moe_steer": "direction*0.5"},
        "prompt": prompts,
        "n": 2,
        "temperature": 1.0,
        "max_tokens": 9,
    }
    reply = server.post(stream=stream, ignore_eos=True, **asked)
    first = reply.text.split("\n")[0].removeprefix("data: ") if stream else reply.text
    found = server.get(f"/v1/steering/requests/{json.loads(first)['id']}").json()
    assert [(one["prompt"], one["sample"]) for one in found["samples"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for one in found["samples"]:
        # The last token is never processed; a later sample reads its prompt's whole blocks from the cache.
        assert (one["plan"], one["dose"], one["hits"]) == ("direction", 0.5, [one["tokens"]])
        assert one["tokens"] <= len(prompts[one["prompt"]]) + 8
        assert one["tokens"] >= 8
    assert server.get("/v1/steering/requests/cmpl-nobody").status_code == 404


HOSTILE = {
    "unknown plan": {"vllm_xargs": {"moe_steer": "nope"}},
    "a dose of 1e308": {"vllm_xargs": {"moe_steer": "g64*1e308"}},
    "a dose that is no number": {"vllm_xargs": {"moe_steer": "g64*nan"}},
    "a dose below 0": {"vllm_xargs": {"moe_steer": "g64*-3"}},
    "ten thousand names": {"vllm_xargs": {"moe_steer": ["g64"] * 10_000}},
    "a number": {"vllm_xargs": {"moe_steer": 7}},
    "an object": {"vllm_xargs": {"moe_steer": {"name": "g64"}}},
    "null": {"vllm_xargs": {"moe_steer": None}},
    "50 MB of name": {"vllm_xargs": {"moe_steer": "g" * 50_000_000}},
    "50 MB of prompt": {"vllm_xargs": {"moe_steer": "g64"}, "prompt": "a " * 25_000_000},
    "control characters": {"vllm_xargs": {"moe_steer": "\x1b[31mg64\x00"}},
    "a path": {"vllm_xargs": {"moe_steer": "../../etc/passwd"}},
    "beams": {"vllm_xargs": {"moe_steer": "g64"}, "use_beam_search": True, "n": 2},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_request_is_refused_and_the_server_serves_on(
    server: Server, lab: dict[str, Any], kind: str, stream: bool
) -> None:
    reply = server.post(stream=stream, **HOSTILE[kind])
    assert 400 <= reply.status_code < 500, reply.text[:300]
    assert len(reply.text) < 5000
    good = server.post(prompt=lab["prompts"][0], return_token_ids=True, vllm_xargs={"moe_steer": "g64"})
    assert good.json()["choices"][0]["token_ids"] == lab["asked"]["g64"]["tokens"][0][:5]


def test_chat(server: Server) -> None:
    body = {
        "model": "lab",
        "messages": [{"role": "user", "content": "What is 3 + 4?"}],
        "max_tokens": 30,
        "temperature": 0,
    }
    texts = []
    for asked in ("off", "g64", "nope"):
        reply = httpx.post(
            f"{server.url}/v1/chat/completions", json={**body, "vllm_xargs": {"moe_steer": asked}}, timeout=60
        )
        texts.append(reply.json()["choices"][0]["message"]["content"] if reply.is_success else reply.status_code)
    assert texts[0] != texts[1]
    assert texts[2] == 400


def test_the_sampler_asks_for_a_plan_by_its_digest(server: Server, folder: Path, tmp_path: Path) -> None:
    """This project's own client: two arms on one server, the audit of each sample added up."""

    def generate(out: str, *more: str) -> tuple[int, list[dict[str, Any]]]:
        options = [
            "--endpoint",
            f"{server.url}/v1",
            "--model",
            "lab",
            "--num",
            "6",
            "--greedy",
            "--max-new-tokens",
            "60",
        ]
        command = [sys.executable, "-m", "launch.cli.main", "generate", *options, "--out", str(tmp_path / out), *more]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        file = tmp_path / out / "generations.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        shown.append(done.stdout + done.stderr)
        return done.returncode, sorted(rows, key=lambda row: row["problem_id"])

    shown: list[str] = []
    before = server.get("/v1/steering").json()["plans"]["g64"]
    code, plain = generate("plain")
    assert (code, len(plain)) == (0, 6), shown
    code, steered = generate("steered", "--plan", str(folder / "g64.json"))
    assert (code, len(steered)) == (0, 6), shown
    assert [row["text"] for row in plain] != [row["text"] for row in steered]
    after = server.get("/v1/steering").json()["plans"]["g64"]
    hits = [b - a for a, b in zip(before["hits"], after["hits"], strict=True)]
    assert min(hits) > 0
    for n in hits:
        assert f"selected by {n} tokens" in shown[1], (hits, shown[1])
    from moe_steer import ExpertGain, SteeringPlan

    SteeringPlan(experts=[ExpertGain(1, 1, 2.0)]).save(tmp_path / "other.json")
    code, none = generate("other", "--plan", str(tmp_path / "other.json"))
    assert (code, none) == (1, []), "a plan that the server does not have is refused before anything is asked"


@pytest.mark.kill
def test_a_killed_server_loses_no_sample(folder: Path, tmp_path: Path) -> None:
    server = Server(folder, tmp_path / "log")

    def generate(out: Path) -> subprocess.Popen[bytes]:
        options = [
            "--endpoint",
            f"{server.url}/v1",
            "--model",
            "lab",
            "--num",
            "40",
            "--samples",
            "2",
            "--out",
            str(out),
        ]
        command = [sys.executable, "-m", "launch.cli.main", "generate", *options, "--batch-size", "8"]
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})

    def lines(out: Path) -> list[str]:
        file = out / "generations.jsonl"
        return file.read_text().splitlines() if file.exists() else []

    def texts(out: Path) -> list[Any]:
        return sorted((row["problem_id"], row["sample_idx"], row["text"]) for row in map(json.loads, lines(out)))

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert generate(whole).wait(600) == 0
    client = generate(broken)
    while len(lines(broken)) < 8:
        assert client.poll() is None
        time.sleep(0.1)
    server.end(signal.SIGKILL)
    assert client.wait(300) == 1
    kept = len(lines(broken))
    assert 8 <= kept < 80
    server = Server(folder, tmp_path / "log-2", server.port)
    try:
        assert generate(broken).wait(600) == 0
    finally:
        server.end(signal.SIGTERM)
    assert texts(broken) == texts(whole)
