"""Ranks that die, and two nodes: started by the launcher that users start, where it has a part in what is looked at."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from rank_processes import LAUNCHER, ROOT, environment, free_port, launch, run_ranks, start_launcher

pytestmark = pytest.mark.slow

HERE = ROOT / "tests" / "launch"


BY_LAUNCHER = ("kill", "hang")
"""Failures after which the launcher must end a rank that waits or sleeps; the others end by themselves, and the seconds that
the launcher's four processes import are saved."""


def start(mode: str, folder: Path, limit: float) -> tuple[int, str]:
    """(exit code, output) of two ranks that fail in this way; a collective is waited for four seconds."""
    worker, job, patience = HERE / "failing_worker.py", ["--mode", mode, "--folder", str(folder)], "4"
    if mode in BY_LAUNCHER:
        done = launch(["--num_accelerators", "2", str(worker), *job], limit, MOE_STEER_WAIT_SECONDS=patience)
    else:
        done = run_ranks(worker, 2, job, limit, MOE_STEER_WAIT_SECONDS=patience)
    codes = [code for code in done.codes if code is not None]
    if not codes:
        pytest.fail(f"still running after {limit} s: {done.text[-2000:]}")
    return max(codes, key=abs), done.text


def is_running(pid: int) -> bool:
    """Whether a process is there and not just waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


SAID = {
    "kill": "job: rank 0 lost another rank, which was killed or whose node is gone; what was sampled is kept",
    "raise": "job: rank 1: the disk of rank 1 is full",
    "memory": "job: rank 1: [enforce fail at alloc_cpu.cpp",
    "refuse": "job: there is no model folder",
    "hang": "job: rank 0 waited 4 s for the other ranks in vain: one hangs, or has much more to do "
    "(MOE_STEER_WAIT_SECONDS sets how long to wait); what was sampled is kept",
}
"""What each failure is reported as, on one line, once."""


@pytest.mark.parametrize(
    "mode",
    ["kill", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("hang", "raise", "memory", "refuse"))],
)
def test_a_rank_that_fails_ends_the_run_and_the_first_cause_is_said_once(mode: str, tmp_path: Path) -> None:
    code, text = start(mode, tmp_path, 80)
    ended = time.time()
    assert code != 0
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
    assert not any(map(is_running, pids))
    assert text.count(SAID[mode]) == 1, text[-3000:]
    assert text.count("job: ") == 1
    assert "Traceback" not in text
    assert mode == "kill" or "frame #" not in text
    if mode != "refuse":
        assert ended - float((tmp_path / "failed_at").read_text()) < 30
        assert (tmp_path / "kept.jsonl").read_text() == "a finished sample\n"


def test_a_rank_that_still_stores_samples_is_waited_for(tmp_path: Path) -> None:
    """Six seconds, where a collective waits for four."""
    code, text = start("slow", tmp_path, 80)
    assert code == 0, text[-3000:]
    assert (tmp_path / "kept.jsonl").read_text().count("another finished sample") == 12


def test_a_rank_that_stores_nothing_is_not(tmp_path: Path) -> None:
    code, text = start("idle", tmp_path, 80)
    assert code != 0
    assert text.count(SAID["hang"]) == 1, text[-3000:]


@pytest.mark.parametrize("whom", ["launcher", pytest.param("group", marks=pytest.mark.slow)])
def test_ctrl_c_leaves_no_process_behind(whom: str, tmp_path: Path) -> None:
    """To the launcher alone, as by ``kill -INT``, and to everything that it started, as by a terminal."""
    job = [str(HERE / "failing_worker.py"), "--mode", "wait", "--folder", str(tmp_path)]
    with (tmp_path / "log").open("w") as log:
        process = start_launcher(["--num_accelerators", "2", *job], log)
    try:
        deadline = time.monotonic() + 80
        while not (tmp_path / "failed_at").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
        pids += members(process.pid)
        assert len(set(pids)) >= 4  # the launcher, its helper, two ranks
        began = time.monotonic()
        if whom == "launcher":
            process.send_signal(signal.SIGINT)
        else:
            os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) != 0
        while any(map(is_running, pids)) and time.monotonic() < began + 30:
            time.sleep(0.1)
        assert [pid for pid in pids if is_running(pid)] == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def members(group: int) -> list[int]:
    """The processes of a process group."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[2]) == group:
                found.append(int(folder.name))
    return found


def test_ranks_refuse_together_what_one_of_them_reads(tmp_path: Path) -> None:
    """Else the others would wait in the next collective for a rank that is gone, and say that."""
    (tmp_path / "out").mkdir()
    cases = [f"{backend}:{how}" for backend in ("tp_ep", "autoep", "zero3") for how in ("lost", "cut")]
    arguments = [str(tmp_path / "out"), str(tmp_path / "models"), *cases]
    done = run_ranks(HERE / "refusing_worker.py", 2, arguments, 100)
    assert done.codes == [0, 0], done.text[-3000:]
    first, second = (json.loads((tmp_path / "out" / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for case in cases:
        wanted = "experts.13.up_proj.weight'" if case.endswith("lost") else "mlp.experts.gate_up_proj'"
        assert wanted in first[case], case
        assert first[case] == second[case]


def test_two_nodes_give_what_one_process_gives(tmp_path: Path) -> None:
    from test_sharded_backends import check

    (tmp_path / "out").mkdir()
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    cases, port = ["tp_ep:deepseek_v3", "zero3:deepseek_v3", "autoep:qwen3_moe"], str(free_port())
    env = environment(PATH=f"{LAUNCHER.parent}{os.pathsep}{os.environ['PATH']}")
    nodes = []
    for rank in (0, 1):
        where = [
            "--hostfile",
            str(hosts),
            "--no_ssh",
            "--node_rank",
            str(rank),
            "--master_addr",
            "127.0.0.1",
            "--master_port",
            port,
        ]
        job = [
            "--no_local_rank",
            str(HERE / "sharded_worker.py"),
            str(tmp_path / "out"),
            str(tmp_path / "models"),
            *cases,
        ]
        log = (tmp_path / f"log{rank}").open("w")
        nodes.append(
            subprocess.Popen(
                [str(LAUNCHER), *where, *job], env=env, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )
        )
    try:
        codes = [node.wait(timeout=200) for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
    assert codes == [0, 0], (tmp_path / "log0").read_text()[-3000:]
    ranks = [json.loads((tmp_path / "out" / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for case in cases:
        check(case, ranks)
