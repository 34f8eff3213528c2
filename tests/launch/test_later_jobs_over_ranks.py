"""The jobs beside the main one on two ranks: what one rank finds, and killed there, continued on one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import safety_files
from launch.core.levers.exit_probe import ExitProbe
from launch.evaluate import main as evaluate
from launch.safety import main as safety
from moe_steer import ExpertGain, SteeringPlan
from moe_steer.gates import Probe
from rank_processes import ROOT, RunningRanks
from reasoning_evals.comparing import RiskControl
from reasoning_evals.runs import read_audit
from reasoning_evals.runs.run_folder import read_generations

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Job:
    """A script, its options but for the folder, and a finished run of it on one rank."""

    script: str
    run: Callable[[list[str]], int]
    options: list[str]
    finished: Path

    def on_two_ranks(self, folder: Path, *more: str) -> RunningRanks:
        """Start it there."""
        return RunningRanks(ROOT / self.script, 2, [*self.options, *more, "--out", str(folder)])


def arms_of(folder: Path) -> list[str]:
    """Options that name arms of every kind: a plan, a gated one, prompts, bans, budgets, texts that are written, early exits. Some
    are joined, which costs less."""
    SteeringPlan(experts=[ExpertGain(2, 3, 16.0)], scope="thought").save(folder / "turned.json")
    weight_D = torch.randn(128, generator=torch.Generator().manual_seed(0)) / 8
    probe = Probe(weight_D=weight_D, bias=0.0, layer=1)
    probe.save(folder / "probe.safetensors")
    when = {"any": [{"on": "probe", "file": "probe.safetensors", "above": 0.7}, {"on": "entropy", "above": 0.5}]}
    gated = [ExpertGain(2, 3, 16.0, when=when)]
    SteeringPlan(experts=gated, scope="thought", base_dir=str(folder)).save(folder / "gated.json")
    control = RiskControl(threshold=0.7, rate=0.5, problems=9, empirical=0.1, exits=0.5)
    ExitProbe(probe=probe, every=1, control=control, sampling={"greedy": True}).save(str(folder / "exit.safetensors"))
    plans = [f"plan:{folder}/turned.json", f"plan:{folder}/gated.json+deer:0.1,2"]
    rules = ["no-thinking", "nowait+remind:8+budget:40", "hint:20+tip:50,600+soft:20,8,6,4", "continue:45"]
    exits = [f"exit:{folder}/exit.safetensors"]
    return ["--arms", "baseline", *plans, *rules, *exits, "--trial-prompt", "{close}\\boxed{", "--exit-words", "So"]


@pytest.fixture(scope="module", params=["evaluate", "safety"])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "evaluate":
        options = [*arms_of(folder), "--greedy", "--num-problems", "6", "--max-new-tokens", "64", "--batch-size", "3"]
        run: Callable[[list[str]], int] = evaluate
    else:
        options = [*safety_files.write_all(folder), "--attack-tokens", "6", "--gsm8k-tokens", "5", "--batch-size", "8"]
        run = safety
    assert run([*options, "--out", str(folder / "one")]) == 0
    return Job(f"launch/{request.param}.py", run, options, folder / "one")


def tokens_of(folder: Path) -> dict[Any, Any]:
    """Sample -> token ids, of every part of the run; no sample may stand twice."""
    found = [
        (where.parent.relative_to(folder).as_posix(), item.key[:4], item.token_ids)
        for where in sorted(folder.rglob("run.json"))
        if list(where.parent.glob("generations*.jsonl"))
        for item in read_generations(where.parent)
    ]
    assert len({item[:2] for item in found}) == len(found)
    return {item[:2]: item[2] for item in found}


def finish(running: RunningRanks) -> str:
    """Its output; the test fails when it fails."""
    done = running.wait(240)
    assert done.codes == [0, 0], done.text[-3000:]
    return done.text


def test_two_ranks_find_what_one_finds(job: Job, tmp_path: Path) -> None:
    said = finish(job.on_two_ranks(tmp_path / "two"))
    assert said.count("report:") == 1, "only rank 0 talks"
    tokens = tokens_of(job.finished)
    assert len(tokens) >= 20
    assert tokens_of(tmp_path / "two") == tokens
    assert (tmp_path / "two" / "results.json").read_bytes() == (job.finished / "results.json").read_bytes()
    if job.script == "launch/evaluate.py":
        assert read_audit(tmp_path / "two").rows == approximately(read_audit(job.finished).rows)
        gates = read_audit(job.finished).gates
        assert {arm for arm, _, _ in gates} == {"plan:gated+deer:0.1,2"}
        assert len(gates) == 6
        assert any(row.get("exits") for row in read_audit(job.finished).rows["plan:gated+deer:0.1,2"])
        assert read_audit(tmp_path / "two").gates == approximately(gates)
        plain = {key[1:]: ids for (_, key), ids in tokens.items() if key[0] == "baseline"}
        changed = {key[0] for (_, key), ids in tokens.items() if ids != plain[key[1:]]}
        assert changed == {key[0] for _, key in tokens} - {"baseline"}


def approximately(found: Any) -> Any:
    """Sums of floats in another order are not the same to the bit."""
    if isinstance(found, dict):
        return {key: approximately(value) for key, value in found.items()}
    if isinstance(found, list):
        return [approximately(value) for value in found]
    return pytest.approx(found) if isinstance(found, float) else found


def test_one_model_over_two_ranks_finds_it_too(job: Job, tmp_path: Path) -> None:
    if job.script != "launch/evaluate.py":
        pytest.skip("the stand-ins of the safety experiment are dense and smaller than what ranks can share")
    finish(job.on_two_ranks(tmp_path / "two", "--backend", "tp_ep"))
    assert tokens_of(tmp_path / "two") == tokens_of(job.finished)


def test_killed_on_two_ranks_it_continues_on_one(job: Job, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    running = job.on_two_ranks(folder)
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in folder.rglob("generations*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.01)
    running.kill()
    assert not (folder / "results.json").exists()
    kept = {path: path.read_bytes() for path in folder.rglob("generations*.jsonl")}
    whole = {path: text[: text.rfind(b"\n") + 1] for path, text in kept.items()}  # the kill may tear the last line
    assert any(whole.values())
    assert job.run([*job.options, "--out", str(folder)]) == 0
    assert all(path.read_bytes().startswith(text) for path, text in whole.items()), "nothing was sampled again"
    assert tokens_of(folder) == tokens_of(job.finished)
    assert (folder / "results.json").read_bytes() == (job.finished / "results.json").read_bytes()
