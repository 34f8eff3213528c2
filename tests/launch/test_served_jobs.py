"""Jobs on a served model: the same arms as in this process, named in requests; what a server must have, and is refused without."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from expert_stats import RoutingCounts
from launch.cli.main import main as command_line
from launch.core.served.checking import scored_tokens
from launch.evaluate import main as evaluate
from launch.reduce_overthinking import main as reduce_overthinking
from launch.steer_r1 import main as steer_r1
from local_endpoint import Handler
from moe_steer import ExpertGain, SteeringPlan, load_model
from reasoning_evals.runs.audits import read_audit
from reasoning_evals.runs.run_folder import read_generations, read_run
from served_lab import BakedLab, ServedLab, served

pytestmark = pytest.mark.slow

FEW = ["--samples", "1", "--greedy", "--max-new-tokens", "24"]
PLAN = SteeringPlan(experts=[ExpertGain(2, 5, 64.0), ExpertGain(3, 2, 16.0)])


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def lab() -> tuple[Any, Any]:
    return load_model("lab")


def texts(folder: Path) -> dict[tuple[str, str, int], tuple[str, tuple[int, ...]]]:
    return {(i.arm, i.problem_id, i.sample_idx): (i.text, i.token_ids) for i in read_generations(folder)}


def same_counts(here: Path, there: Path) -> None:
    one, other = (RoutingCounts.load(path).grouped() for path in (here, there))
    assert one["joint_GMLE"].sum() > 0
    assert {name: bool((one[name] == other[name]).all()) for name in one} == dict.fromkeys(one, True)


def test_an_evaluation_on_a_server_is_the_one_in_this_process(
    lab: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Greedy samples token by token, the plan's hits to the token; run.json says plan and server; a second start samples nothing."""
    PLAN.save(tmp_path / "loud.json")
    asked = ["--arms", "baseline", f"plan:{tmp_path / 'loud.json'}", "prompt-after", "--num-problems", "4", *FEW]
    assert evaluate([*asked, "--out", str(tmp_path / "here")]) == 0
    with served(ServedLab(*lab, {"any-name": PLAN}, default="any-name")) as url:
        there = [*asked, "--out", str(tmp_path / "there"), "--endpoint", url]
        assert evaluate(there) == 0
        shown = capsys.readouterr().out
        assert evaluate(there) == 0
    assert "server: the-lab, vllm 0.32.0 0.1.0, 1 steering plans" in shown
    assert texts(tmp_path / "there") == texts(tmp_path / "here")
    rows = read_audit(tmp_path / "there").rows["plan:loud"]
    hits = {(row["layer"], row["expert"]): row["tokens"] for row in rows if row["kind"] == "expert"}
    own = {(row["layer"], row["expert"]): row["tokens"] for row in read_audit(tmp_path / "here").rows["plan:loud"]}
    assert hits == own
    assert min(hits.values()) > 0
    run = read_run(tmp_path / "there")
    assert run["config"]["arms"]["plan:loud"]["details"]["plan"] == PLAN.digest()
    assert run["config"]["arms"]["baseline"]["sampler"]["server"] == {
        "engine": "vllm",
        "version": "0.32.0",
        "plugin": "0.1.0",
    }
    assert [entry["backend"] for entry in run["history"]] == ["endpoint", "endpoint"]
    assert "plan:loud" in (tmp_path / "there" / "report.html").read_text()


def test_a_server_that_lacks_the_plan_or_the_field_is_refused_with_the_command_to_start(
    lab: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PLAN.save(tmp_path / "loud.json")
    asked = [
        "--arms",
        "baseline",
        f"plan:{tmp_path / 'loud.json'}",
        "--num-problems",
        "2",
        *FEW,
        "--out",
        str(tmp_path / "run"),
    ]
    lacks = {
        "takes no steering plans (GET /v1/steering names none), and would ignore them without a word": None,
        "does not have the plan of plan:loud": {"loud": SteeringPlan(experts=[ExpertGain(2, 5, 2.0)])},
    }
    for words, plans in lacks.items():
        with served(ServedLab(*lab, plans)) as url:
            assert evaluate([*asked, "--endpoint", url]) == 1
        said = capsys.readouterr().err
        assert said == (
            f"evaluate.py: the server at {url} {words}: start it with 'moe-steer serve lab --plan {tmp_path / 'run' / 'plans'}', "
            "then this again\n"
        )
        assert SteeringPlan.load(tmp_path / "run" / "plans" / "plan-loud.json").digest() == PLAN.digest()
        assert not (tmp_path / "run" / "generations.jsonl").exists()
    with served(ServedLab(*lab, None)) as url:  # without plans any server will do
        plain = ["--arms", "baseline", "prompt-after", *asked[3:-1], str(tmp_path / "plain"), "--endpoint", url]
        assert evaluate(plain) == 0
        capsys.readouterr()
        assert evaluate([*asked[:2], "nowait", *asked[3:-1], str(tmp_path / "ban"), "--endpoint", url]) == 1
    assert (
        "the arm 'nowait' is a rule of decoding, which runs in this process and not on a server"
        in capsys.readouterr().err
    )


def test_a_plan_that_never_fired_fails_a_strict_run(
    lab: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that says it has the plan, and serves the plain model."""
    PLAN.save(tmp_path / "loud.json")
    asked = ["--arms", "baseline", f"plan:{tmp_path / 'loud.json'}", "--num-problems", "2", *FEW, "--strict"]
    with served(ServedLab(*lab, {"loud": PLAN}, ignores=True)) as url:
        assert evaluate([*asked, "--out", str(tmp_path / "run"), "--endpoint", url]) == 1
    assert "plan:loud: nothing of the plan fired in the whole run" in capsys.readouterr().err


def test_generate_names_a_plan_in_its_requests(
    lab: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PLAN.save(tmp_path / "loud.json")
    asked = ["generate", "--model", "the-lab", "--tokenizer", "lab", "--num", "3", "--greedy", "--max-new-tokens", "16"]
    asked += ["--plan", str(tmp_path / "loud.json"), "--out", str(tmp_path / "run")]
    with served(ServedLab(*lab, {"x": PLAN})) as url:
        assert command_line([*asked, "--endpoint", url]) == 0
    shown = capsys.readouterr().out
    assert "steered: " in shown
    assert "layer 2 expert 5 x64: selected by " in shown
    assert "0 retries" in shown
    with served(ServedLab(*lab, None)) as url:
        assert command_line([*asked[:-1], str(tmp_path / "other"), "--endpoint", url]) == 1
    assert "takes no steering plans" in capsys.readouterr().err


def test_the_main_job_searches_on_a_server_in_two_starts_and_finds_what_it_finds_here(
    lab: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counts from routed_experts equal those of a forward pass here, the plans are left for the second server, and then all steps
    go through: the same experts, placebo and greedy answers."""
    sizes = [
        "--model",
        "lab",
        "--num-identification",
        "6",
        "--num-tuning",
        "2",
        "--num-test",
        "2",
        "--gains",
        "4",
        "16",
        *FEW,
    ]
    assert steer_r1([*sizes, "--out", str(tmp_path / "here")]) == 0
    there = [*sizes, "--out", str(tmp_path / "there"), "--endpoint"]
    with served(ServedLab(*lab, {})) as url:
        assert steer_r1([*there, url]) == 1
        assert "sends no routed_experts: start vLLM with --enable-return-routed-experts" in capsys.readouterr().err
    with served(ServedLab(*lab, {}, routing=True)) as url:
        assert steer_r1([*there, url]) == 1
    assert "does not have the plan of gain 4, gain 16, placebo gain 4, placebo gain 16" in capsys.readouterr().err
    same_counts(*(tmp_path / name / "counts.safetensors" for name in ("here", "there")))
    left = {path.stem: SteeringPlan.load(path) for path in (tmp_path / "there" / "plans").glob("*.json")}
    with served(ServedLab(*lab, left)) as url:
        assert steer_r1([*there, url]) == 0
    said = capsys.readouterr().out
    assert "what was chosen is not measured in the test's answers: the server at" in said, "this one sends no routing"
    for name in ("plan", "placebo"):
        plans = [SteeringPlan.load(tmp_path / folder / f"{name}.json").digest() for folder in ("here", "there")]
        assert plans[0] == plans[1]
    assert texts(tmp_path / "there" / "test") == texts(tmp_path / "here" / "test")
    results = json.loads((tmp_path / "there" / "results.json").read_text())
    assert {
        arm: min(row["tokens"] for row in rows if row["kind"] == "expert") > 0
        for arm, rows in results["firing"].items()
        if arm != "baseline"
    } == {
        "steered": True,
        "placebo": True,
    }


def test_collect_on_a_server_counts_what_a_forward_pass_here_counts(lab: tuple[Any, Any], tmp_path: Path) -> None:
    with served(ServedLab(*lab, None, routing=True)) as url:
        made = ["generate", "--num", "4", "--greedy", "--max-new-tokens", "24", "--out", str(tmp_path / "run")]
        assert command_line(made) == 0
        for name, more in (("here", []), ("there", ["--endpoint", url])):
            asked = ["collect", "--traces", str(tmp_path / "run"), "--out", str(tmp_path / f"{name}.safetensors")]
            assert command_line([*asked, *more]) == 0
    same_counts(*(tmp_path / f"{name}.safetensors" for name in ("here", "there")))


def test_directions_of_a_run_with_the_model_are_tried_on_a_server(
    lab: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--model", "lab", "--quick", "--methods", "caa", "--layers", "2", "--max-new-tokens", "80", "--greedy"]
    sizes += ["--num-test", "2", "--num-tuning", "2", "--samples-tuning", "1"]
    made = ["--num-identification", "24", "--samples-identification", "2", "--out", str(tmp_path / "here")]
    assert reduce_overthinking([*sizes, *made]) == 0
    there = [*sizes, "--out", str(tmp_path / "there"), "--endpoint", "http://127.0.0.1:9/v1"]
    with pytest.raises(SystemExit, match="2"):
        reduce_overthinking(there)
    assert "caa are learned from the residual stream" in capsys.readouterr().err
    there = [*there[:-2], "--directions", str(tmp_path / "here" / "directions"), "--endpoint"]
    with served(ServedLab(*lab, {})) as url:
        assert reduce_overthinking([*there, url]) == 1
    assert "does not have the plan of caa L2 x0.2" in capsys.readouterr().err
    left = {path.stem: SteeringPlan.load(path) for path in (tmp_path / "there" / "plans").glob("*.json")}
    with served(ServedLab(*lab, left)) as url:
        assert reduce_overthinking([*there, url]) == 0
    assert texts(tmp_path / "there" / "test") == texts(tmp_path / "here" / "test")


def test_one_waits_for_a_server_that_starts_and_one_that_is_away(
    lab: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not up at the start; then gone in the middle of the run and up again, both with the same port."""
    away = ["--arms", "baseline", "prompt-after", "--num-problems", "2", *FEW, "--endpoint"]
    assert evaluate([*away, "http://127.0.0.1:9/v1", "--out", str(tmp_path / "down")]) == 1
    said = capsys.readouterr().err
    assert "see whether the server is up and its log; --wait-server SECONDS waits for one that starts" in said
    with pytest.raises(SystemExit, match="2"):
        evaluate([*away[:-1], "--wait-server", "5"])
    assert "--wait-server is for sampling over HTTP: give --endpoint" in capsys.readouterr().err
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asked = [*away, f"http://127.0.0.1:{port}/v1", "--wait-server", "60", "--out", str(tmp_path / "run")]
    started = threading.Event()

    class Dying(ServedLab):
        def __call__(self, handler: Handler, body: dict[str, Any]) -> None:
            started.set()
            handler.connection.close()

    def life() -> None:
        time.sleep(0.5)
        with served(Dying(*lab, None), port):
            assert started.wait(60)
        with served(ServedLab(*lab, None), port):
            assert done.wait(60)

    done = threading.Event()
    thread = threading.Thread(target=life)
    thread.start()
    try:
        assert evaluate(asked) == 0
    finally:
        done.set()
        thread.join()
    assert len(texts(tmp_path / "run")) == 4
    retries = [row for rows in read_audit(tmp_path / "run").rows.values() for row in rows if row["kind"] == "retry"]
    assert {row["cause"] for row in retries} == {"connection"}


def test_verify_tells_a_server_that_serves_the_plain_model(
    lab: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plan that requests name, followed, ignored and followed at another gain; and a baked folder, served and not."""
    PLAN.save(tmp_path / "loud.json")
    (tmp_path / "two.txt").write_text("What is 26^2 - 17^2?\nA train travels 180 km in 2.5 hours. How fast is it?\n")
    verify = ["verify", "--model", "lab", "--prompts", str(tmp_path / "two.txt"), "--max-new-tokens", "8", "--endpoint"]
    named = ["--plan", str(tmp_path / "loud.json")]
    with served(ServedLab(*lab, {"loud": PLAN})) as url:
        assert command_line([*verify, url, *named]) == 0
    shown = capsys.readouterr().out
    assert "the server serves the steered model: 2 prompts, 16 greedy tokens: the plan moves their" in shown
    assert "100% of that on the server" in shown
    assert "; 16 are the steered model's choice, " in shown
    with served(ServedLab(*lab, {"loud": PLAN}, ignores=True)) as url:
        assert command_line([*verify, url, *named]) == 1
    said = capsys.readouterr().err
    assert said.startswith("moe-steer: the server serves the plain model: see how it loads a baked folder")
    assert said.count("\n") == 1
    with served(ServedLab(*lab, None)) as url:
        assert command_line([*verify, url, *named]) == 1
    assert f"start it with 'moe-steer serve lab --plan {tmp_path / 'loud.json'}'" in capsys.readouterr().err

    baked = ["--baked", str(tmp_path / "baked")]
    assert command_line(["bake", "--model", "lab", *named, "--out", baked[1]]) == 0
    for plan, code in ((PLAN, 0), (SteeringPlan(), 1)):
        with served(BakedLab(*lab, plan)) as url:
            assert command_line([*verify, url, *baked]) == code
    assert "the server serves the plain model" in capsys.readouterr().err
    half = SteeringPlan(experts=[ExpertGain(entry.layer, entry.expert, entry.gain / 4) for entry in PLAN.experts])
    other = SteeringPlan(experts=[ExpertGain(1, expert, 64.0) for expert in range(8)])
    for name, plan in (("half", half), ("other", other)):
        with served(BakedLab(*lab, plan)) as url:
            assert command_line([*verify, url, *baked]) == (name == "other")
    shown = capsys.readouterr()
    assert re.search(
        r"WARNING: its log-probabilities are [0-9.]+ nats off, more than rounding in float32 explains", shown.out
    )
    assert "the server serves neither the steered model nor the plain one: 2 prompts" in shown.err


def test_verify_says_where_it_cannot_tell(
    lab: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faint = SteeringPlan(experts=[ExpertGain(2, 5, 1.0001)])
    faint.save(tmp_path / "faint.json")
    verify = ["verify", "--model", "lab", "--max-new-tokens", "4", "--plan", str(tmp_path / "faint.json"), "--endpoint"]
    with served(ServedLab(*lab, {"faint": faint})) as url:
        assert command_line([*verify, url]) == 1
    assert "which cannot be seen on a server: give --prompts at which it acts" in capsys.readouterr().err
    for arguments, words in (
        (["verify", "--endpoint", url], "--endpoint needs --model, the plain model to compare with"),
        (["verify"], "give --baked, the folder or GGUF file to check, or --endpoint, the server"),
        (["verify", "--baked", "x", "--wait-server", "3"], "--wait-server is for sampling over HTTP: give --endpoint"),
    ):
        assert command_line(arguments) == 1
        assert words in capsys.readouterr().err
    for odd in ({}, {"logprobs": {"token_logprobs": [0.5]}, "token_ids": []}, {"logprobs": {"content": [{"id": 1}]}}):
        with pytest.raises(ValueError, match="sends no token ids with log-probabilities"):
            scored_tokens([odd], 10)
    ours = {"logprobs": {"content": [{"id": 7, "logprob": -0.5}, {"id": 1, "logprob": -1}]}}
    assert scored_tokens([ours], 10) == ([7, 1], [-0.5, -1.0])
