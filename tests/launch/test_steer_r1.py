"""The main job as its users start it, on the embedded model; small, but every step is real."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from expert_stats import RoutingCounts
from launch.cli.main import main as command_line
from launch.jobs.experts_findings import NO_PLACEBO
from launch.steer_r1 import main
from moe_steer import ExpertGain, ResidualVector, SteeringPlan
from rank_processes import ROOT, RunningRanks, launch, run_ranks
from reasoning_evals.runs.run_folder import read_generations

pytestmark = pytest.mark.slow

SMALL = ["--num-identification", "24", "--num-tuning", "8", "--num-test", "16", "--gains", "4", "16", "--samples", "2"]
SMALL += ["--batch-size", "64", "--max-new-tokens", "64", "--model", "lab-plain"]
"""Two of three answers of lab-plain end within 64 tokens; those of lab-search take three times as many."""
GIVEN = ["--num-test", "16", "--samples", "2", "--batch-size", "64"]
"""With a given plan there is nothing to search."""
DENSE_WIDTH = 128  # of lab-dense


SCRIPT = ROOT / "launch" / "steer_r1.py"
FEW = [*SMALL, "--samples", "1", "--greedy", "--num-identification", "12", "--num-tuning", "4", "--num-test", "6"]
"""Greedy refuses two samples; on several ranks its tokens must be the same."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished job, in a process of its own."""
    folder = tmp_path_factory.mktemp("job") / "one"
    done = run_ranks(SCRIPT, 1, [*SMALL, "--out", str(folder)], 240)
    assert done.codes == [0], done.text[-3000:]
    assert "report:" in done.text
    return folder


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller one, greedy, on one rank."""
    folder = tmp_path_factory.mktemp("job") / "greedy"
    assert main([*FEW, "--out", str(folder)]) == 0
    closed = sum("</think>" in answer.text for answer in read_generations(folder / "test"))
    assert closed > 0, "else no answer is graded, and two runs cannot differ by a grade"
    return folder


def test_it_leaves_a_whole_run_folder(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert results["verdict"] in ("helped", "hurt", "no effect shown")
    arms = {arm["name"]: arm for arm in results["comparison"]["arms"]}
    assert list(arms) == ["baseline", "steered", "placebo"]
    assert 0.1 < arms["baseline"]["accuracy"]["mean"] <= 1.0
    assert results["comparison"]["num_samples"] == 2
    plan = SteeringPlan.load(finished / "plan.json")
    placebo = SteeringPlan.load(finished / "placebo.json")
    assert [e.layer for e in plan.experts] == [e.layer for e in placebo.experts]
    assert not {(e.layer, e.expert) for e in plan.experts} & {(e.layer, e.expert) for e in placebo.experts}
    assert all(row["tokens"] > 0 for row in results["firing"]["steered"])
    counts = RoutingCounts.load(finished / "counts.safetensors").check()
    assert counts.num_traces == 24
    assert int(counts.occurrences_M[0]) == 24, "<think> stands once in every prompt"
    html = (finished / "report.html").read_text()
    assert "<script" not in html
    assert html.count("<svg") >= 5
    assert "http://" not in html.replace("http://www.w3.org", "")
    page, evidence = (finished / "report.md").read_text(), results["evidence"][0]
    assert results["sentence"] in page
    assert evidence.startswith("UNPROVEN: nothing shows that "), "<think> is a token like others in the lab"
    assert "<think> is one token in a fixed place, and number " in evidence
    assert 0 <= page.find(evidence.partition("<")[0]) < page.find(results["sentence"]), (
        "the page leads with its evidence"
    )
    fresh = results["evidence"][1]
    assert fresh.startswith("FRESH: score and 95% interval from 16 problems that did not choose it: layer ")
    assert all(f"layer {e.layer} expert {e.expert} " in fresh for e in plan.experts)
    assert page.find("FRESH: ") < page.find(results["sentence"])
    assert RoutingCounts.load(finished / "fresh_counts.safetensors").num_traces == 16 * 2, "of the test's baseline"
    assert plan.provenance["evidence"] == "unproven"
    lead, _, box = html.partition('<div class="verdict')
    assert "UNPROVEN: nothing shows that " in lead
    assert box.index('<p class="word">') < box.index("</div>"), "and the verdict keeps its place"
    assert not [path for path in finished.rglob("*") if path.name.endswith((".partial", ".tmp"))]


def test_the_same_seed_gives_the_same_results(finished: Path, tmp_path: Path) -> None:
    assert main([*SMALL, "--out", str(tmp_path / "again")]) == 0
    for name in ("results.json", "plan.json", "placebo.json"):
        assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes(), name


def tokens_of(folder: Path) -> dict[Any, Any]:
    """Sample -> token ids of one step."""
    return {completion.key[:4]: completion.token_ids for completion in read_generations(folder)}


def test_two_ranks_give_the_same_counts_and_greedy_tokens(greedy: Path, tmp_path: Path) -> None:
    """By the launcher, as the README says."""
    two = tmp_path / "two"
    done = launch(["--num_accelerators", "2", str(SCRIPT), *FEW, "--out", str(two)], 240)
    assert done.codes == [0], done.text[-3000:]
    assert done.text.count("report:") == 1, "only rank 0 talks"
    assert RoutingCounts.load(greedy / "counts.safetensors") == RoutingCounts.load(two / "counts.safetensors")
    for step in ("identification", "tuning", "test"):
        assert tokens_of(greedy / step) == tokens_of(two / step), step
    assert len(list((two / "test").glob("generations.rank*.jsonl"))) == 2


@pytest.mark.parametrize("backend", ["tp_ep"])
def test_one_model_over_two_ranks_gives_the_same_greedy_tokens(greedy: Path, tmp_path: Path, backend: str) -> None:
    folder = tmp_path / "two"
    done = run_ranks(SCRIPT, 2, [*FEW, "--backend", backend, "--out", str(folder)], 240)
    assert done.codes == [0, 0], done.text[-3000:]
    assert done.text.count("report:") == 1, "only rank 0 talks"
    one, two = (RoutingCounts.load(run / "counts.safetensors") for run in (greedy, folder))
    assert one.num_tokens == two.num_tokens
    assert (one.grouped()["expert_GLE"] == two.grouped()["expert_GLE"]).all()
    for step in ("identification", "test"):
        assert tokens_of(greedy / step) == tokens_of(folder / step), step
    results = [json.loads((run / "results.json").read_text()) for run in (greedy, folder)]
    assert results[0]["sentence"] == results[1]["sentence"]
    tokens_fired = [[row["tokens"] for row in result["firing"]["steered"]] for result in results]
    assert tokens_fired[0] == tokens_fired[1]


def test_killed_and_started_again_it_continues(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    running = RunningRanks(SCRIPT, 1, [*SMALL, "--out", str(folder)])
    deadline = time.monotonic() + 120
    while not list(folder.glob("tuning/generations*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    running.kill()
    assert not (folder / "results.json").exists()
    kept = (folder / "identification" / "generations.jsonl").read_bytes()
    assert main([*SMALL, "--out", str(folder)]) == 0
    assert (folder / "identification" / "generations.jsonl").read_bytes() == kept, "nothing was sampled again"
    assert (folder / "results.json").read_bytes() == (finished / "results.json").read_bytes()


def test_the_pages_can_be_built_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: (finished / name).read_bytes() for name in ("results.json", "report.html", "report.md")}
    (finished / "report.html").unlink()
    assert command_line(["report", str(finished)]) == 0
    assert "report:" in capsys.readouterr().out
    assert {name: (finished / name).read_bytes() for name in before} == before


def test_a_folder_of_another_config_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--seed", "7", "--out", str(finished)]) == 1
    error = capsys.readouterr().err
    assert "holds a run of another config (seed: 0 there, 7 now)" in error
    assert error.count("\n") == 1


def test_a_given_plan_is_tested_as_it_is(tmp_path: Path) -> None:
    SteeringPlan(experts=[ExpertGain(2, 3, 4.0)], scope="thought").save(tmp_path / "plan.json")
    out = tmp_path / "run"
    assert (
        main(
            [
                *GIVEN,
                "--plan",
                str(tmp_path / "plan.json"),
                "--out",
                str(out),
                "--num-test",
                "6",
                "--max-new-tokens",
                "24",
            ]
        )
        == 0
    )
    results = json.loads((out / "results.json").read_text())
    assert results["plan"]["experts"] == [{"layer": 2, "expert": 3, "gain": 4.0}]
    assert results["plan"]["scope"] == "thought"
    assert results["tuning"] is None
    assert results["placebo"]["experts"][0]["layer"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "./nowhere"], "there is no model folder './nowhere'"),
        (["--preset", "rice-r1-math"], "the plan was made for num_layers 61, this model has 4"),
        (["--preset", "rice"], "preset 'rice' is unknown: choose one of rice-r1-math"),
        (["--plan", "none.json"], "no plan file at 'none.json'"),
        (["--problems", "none.jsonl"], "none.jsonl"),
        (["--top", "99", "--num-identification", "4"], "experts qualify"),
        (["--scope", "step_end", "--backend", "magic"], "backend 'magic' is unknown"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    out = tmp_path / "run"
    sizes = GIVEN if {"--preset", "--plan"} & set(options) else [*SMALL, "--num-tuning", "2"]
    assert main([*sizes, "--out", str(out), *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (out / "results.json").exists()
    assert not (out / "plan.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--gains", "1"], "gains are [1.0]"), (["--bogus"], "--bogus"), (["--scope", "mind"], "mind")],
)
def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_plan_of_which_nothing_fired_is_loud_and_with_strict_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two tokens never reach the answer, so a plan for the answer meets nothing."""
    SteeringPlan(experts=[ExpertGain(2, 3, 4.0)], scope="answer").save(tmp_path / "plan.json")
    options = [*GIVEN, "--plan", str(tmp_path / "plan.json"), "--max-new-tokens", "2", "--num-test", "4"]
    options += [
        "--coefficients",
        "<think>=0",
        "Alternatively=1",
    ]  # which two tokens do not hold: no marker that counts is met
    assert main([*options, "--out", str(tmp_path / "loud")]) == 0
    assert "WARNING: steered: nothing of the plan fired in the whole run" in capsys.readouterr().out
    assert main([*options, "--out", str(tmp_path / "strict"), "--strict"]) == 1
    assert "nothing of the plan fired in the whole run" in capsys.readouterr().err


def test_a_plan_of_directions_alone_says_what_it_is_and_that_it_has_no_placebo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "directions").mkdir()
    vector = torch.randn(DENSE_WIDTH, generator=torch.Generator().manual_seed(0))
    save_file({"vector": vector}, tmp_path / "directions" / "mine.safetensors")
    entry = ResidualVector(4, "directions/mine.safetensors", 50.0, "step_end")
    SteeringPlan(residual=[entry]).save(tmp_path / "shorter.json")
    run = tmp_path / "run"
    options = ["--num-test", "4", "--samples", "1", "--max-new-tokens", "48", "--strict", "--out", str(run)]
    assert main(["--model", "lab-dense", "--plan", str(tmp_path / "shorter.json"), *options]) == 0
    said = capsys.readouterr().out
    assert "\n1/1  4 test problems x 1 sample in 2 arms: baseline, steered\n" in said
    assert "placebo must match" not in said
    assert "counting routing" not in said
    assert said.count(f"WARNING: {NO_PLACEBO}") == 1
    assert json.loads((run / "results.json").read_text())["warnings"] == [NO_PLACEBO]
    page, html = (run / "report.md").read_text(), (run / "report.html").read_text()
    assert page.startswith("# Does the plan help lab-dense?\n")
    vectors = "layer 4 vector directions/mine.safetensors, strength 50 in unit vector, scope step"
    assert f"- Plan: {vectors}\\_end\n" in page
    assert f"{vectors}_end" in html
    assert f"- Warning 1: {NO_PLACEBO}\n" in page
    assert not (run / "calibration").exists()
    before = {name: (run / name).read_bytes() for name in ("results.json", "report.html", "report.md")}
    assert command_line(["report", str(run)]) == 0
    assert {name: (run / name).read_bytes() for name in before} == before


def test_a_dense_model_without_a_plan_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--model", "lab-dense", "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == (
        "steer_r1.py: lab-dense is a dense model and has no experts to find: give --plan with directions "
        "('moe-steer direction', 'moe-steer plan --residual'), or use launch/reduce_overthinking.py\n"
    )
    assert not (tmp_path / "run").exists()
