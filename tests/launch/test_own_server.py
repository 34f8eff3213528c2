"""``--engine vllm``: the job starts `moe-steer serve` itself; a stand-in plays the engine behind it, and passes on to the embedded model."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.core.served.connection import OWNER, _cause, _with_gpus
from launch.evaluate import main as evaluate
from launch.steer_r1 import main as steer_r1
from moe_steer import ExpertGain, SteeringPlan, load_model
from reasoning_evals.runs.audits import read_audit
from reasoning_evals.runs.run_folder import read_generations, read_run
from served_lab import ServedLab, served

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FEW = ["--samples", "1", "--greedy", "--max-new-tokens", "16", "--num-problems", "3"]
PLAN = SteeringPlan(experts=[ExpertGain(2, 5, 64.0), ExpertGain(3, 2, 16.0)])
ENGINE = """#!{python} -S
import json, os, sys, urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
if sys.argv[1] == "-c":
    print(json.dumps({{"missing": [], "plugins": [], "cpu": False}}))
    sys.exit()
said = dict(zip(sys.argv[3::2], sys.argv[4::2]))
if "--fails" in sys.argv:
    print("WARNING it may cause errors like `OSError: many files`", "(Worker-0) ERROR 11-29 [x.py:9] ValueError: no kernel for this", sep="\\n")
    sys.exit("RuntimeError: Engine core initialization failed. See root cause above.")
with open({said!r}, "a") as file:
    file.write(json.dumps({{**said, "pid": os.getpid()}}) + "\\n")
class Handler(BaseHTTPRequestHandler):
    def pass_on(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
        request = urllib.request.Request({url!r} + self.path, body, dict(self.headers))
        try:
            reply = urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            reply = error
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.headers["Content-Type"])
        self.end_headers()
        self.wfile.write(reply.read())
    do_GET = do_POST = pass_on
    def log_message(self, *args): pass
ThreadingHTTPServer(("127.0.0.1", int(said["--port"])), Handler).serve_forever()
"""


class StartedLab(ServedLab):
    """Knows the plans that its last start was given, by the names it was given them."""

    def __init__(self, said: Path) -> None:
        super().__init__(*load_model("lab"), None)
        self.said = said

    def starts(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.said.read_text().splitlines()]

    @property
    def plans(self) -> Any:
        files = json.loads(self.starts()[-1]["--additional-config"])["moe_steer"]["plans"]
        return {name: SteeringPlan.load(file) for name, file in files.items()}

    @plans.setter
    def plans(self, _: Any) -> None: ...

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": self.starts()[-1]["--served-model-name"]}]}
        return super().get(path)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The laboratory, and the interpreter to name."""
    folder = tmp_path_factory.mktemp("engine")
    lab = StartedLab(folder / "said")
    with served(lab) as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("PYTHONPATH", str(ROOT))
        python = folder / "python"
        python.write_text(ENGINE.format(python=sys.executable, said=str(lab.said), url=url.removesuffix("/v1")))
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        yield lab, str(python)


def texts(folder: Path) -> dict[tuple[str, str, int], tuple[str, tuple[int, ...]]]:
    return {(i.arm, i.problem_id, i.sample_idx): (i.text, i.token_ids) for i in read_generations(folder)}


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def gone_within(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not is_gone(pid) and time.monotonic() < end:
        time.sleep(0.1)
    return is_gone(pid)


def test_a_job_starts_its_engine_once_and_ends_it(
    engine: tuple[StartedLab, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The samples are those of the job in this process; the plans of the arms are there at the first start."""
    lab, python = engine
    PLAN.save(tmp_path / "loud.json")
    asked = ["--arms", "baseline", f"plan:{tmp_path / 'loud.json'}", *FEW]
    assert evaluate([*asked, "--out", str(tmp_path / "here")]) == 0
    given = ["--engine", "vllm", "--engine-python", python, "--engine-options=--dtype float32"]
    assert evaluate([*asked, "--out", str(tmp_path / "there"), *given]) == 0
    (start,) = lab.starts()
    assert (start["--served-model-name"], start["--dtype"]) == ("lab", "float32")
    assert int(start["--max-model-len"]) > 16
    assert gone_within(int(start["pid"]), 10)
    assert texts(tmp_path / "there") == texts(tmp_path / "here")
    there, here = (
        [row["tokens"] for row in read_audit(tmp_path / name).rows["plan:loud"] if row["kind"] == "expert"]
        for name in ("there", "here")
    )
    assert there == here
    assert min(there) > 0
    assert read_run(tmp_path / "there")["history"][0]["server"]["engine"] == "vllm"
    shown = capfd.readouterr().out
    log = tmp_path / "there" / "engine.log"
    assert f"starting vllm with lab; what it says goes to {log}" in shown
    assert "server: lab, vllm 0.32.0 0.1.0, 1 steering plans" in shown
    assert "serving lab at http://127.0.0.1:" in log.read_text()


def test_an_engine_that_does_not_start_says_why(
    engine: tuple[StartedLab, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["--engine", "vllm", "--engine-python", engine[1], "--engine-options=--fails yes"]
    assert evaluate(["--arms", "baseline", "prompt-after", *FEW, "--out", str(tmp_path / "run"), *given]) == 1
    said = capfd.readouterr().err
    log = tmp_path / "run" / "engine.log"
    assert said == f"evaluate.py: vllm did not start: ValueError: no kernel for this (all of it in {log})\n"


def test_an_engine_ends_with_a_job_that_is_killed(engine: tuple[StartedLab, str], tmp_path: Path) -> None:
    """A shell plays the job: it starts the server, and is killed."""
    lab, python = engine
    before = len(lab.starts())
    SteeringPlan().save(tmp_path / "none.json")
    serve = [sys.executable, "-m", "launch.cli.main", "serve", "lab-dense", "--plan", str(tmp_path / "none.json")]
    script = f'{OWNER}=$$ "$@" & wait'
    with (tmp_path / "log").open("wb") as log:
        job = subprocess.Popen(
            ["sh", "-c", script, "sh", *serve, "--python", python, "--port", "0"], cwd=ROOT, stdout=log
        )
    try:
        end = time.monotonic() + 300
        while len(lab.starts()) == before and time.monotonic() < end:
            time.sleep(0.1)
        pid = int(lab.starts()[before]["pid"])
        assert not is_gone(pid)
    finally:
        job.kill()
        job.wait()
    assert gone_within(pid, 20)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--engine", "vllm", "--endpoint", "http://127.0.0.1:9/v1"], "--endpoint is a server that runs, and --engine starts one: give one"),
        (["--engine-options=--dtype float32"], "--engine-options is for a server that this start runs: give --engine, or leave it out"),
        (["--engine", "vllm", "--dtype", "float32"], "--dtype is decided by the server: leave it out"),
        (["--engine", "vllm", "--wait-server", "5"], "--wait-server is for sampling over HTTP: give --endpoint"),
        (["--engine", "vllm", "--dry-run"], "the server of --engine has its own: leave one out"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        steer_r1(given)
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_it_is_spread_over_the_gpus_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert _with_gpus(["--dtype", "auto"]) == ["--dtype", "auto"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert _with_gpus(["--dtype", "auto"]) == ["--dtype", "auto", "--tensor-parallel-size", "4"]
    for own in (["--data-parallel-size", "4"], ["-tp", "2"], ["--tensor_parallel_size=2"]):
        assert _with_gpus(own) == own


@pytest.mark.parametrize(
    "line",
    [
        "ValueError: no kernel",
        "(APIServer pid=31322) ValueError: no kernel",
        "(Worker-0) ERROR 11-29 [x.py:9] ValueError: no kernel",
        "ERROR 11-29 [x.py:9] ValueError: no kernel",
    ],
)
def test_the_first_error_is_found_whoever_says_it(line: str, tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text(
        f"WARNING it may cause `OSError: many files`\n{line}\nRuntimeError: the engine failed\nmoe-steer: the server ended\n"
    )
    assert _cause(log, 0) == "ValueError: no kernel"
