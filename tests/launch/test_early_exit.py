"""From a graded run to a probe with a stated mis-exit rate to an arm that ends thoughts by it, as its users go."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.cli.main import main as command_line
from launch.core.levers.arm_rules import step_ends
from launch.core.levers.arm_words import parse_arm
from launch.core.levers.exit_probe import ExitProbe, Tried, exit_warnings, hidden_at
from launch.core.wiring import read_any_traces
from launch.evaluate import main
from moe_steer.gates import Probe
from moe_steer.lab import LAB_MODEL
from reasoning_evals.decoding import exit_points
from reasoning_evals.runs import read_grades
from reasoning_evals.runs.audits import read_audit
from reasoning_evals.runs.run_folder import read_generations

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a graded run and exit.safetensors."""
    folder = tmp_path_factory.mktemp("exit")
    run = ["generate", "--num", "30", "--max-new-tokens", "150", "--seed", "3", "--batch-size", "30"]
    assert command_line([*run, "--out", str(folder / "tuning")]) == 0
    exit_file = str(folder / "exit.safetensors")
    options = ["--rate", "0.25", "--answer-tokens", "12", "--layer", "2"]
    assert command_line(["early-exit", str(folder / "tuning"), *options, "--out", exit_file]) == 0
    return folder


def test_the_file_states_its_rate_and_what_it_was_calibrated_on(
    calibrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = ExitProbe.load(str(calibrated / "exit.safetensors"))
    assert (found.control.rate, found.control.problems, found.every, found.probe.layer) == (0.25, 15, 1, 2)
    assert found.probe.threshold == found.control.threshold
    assert found.control.empirical <= 0.25
    assert found.sampling["temperature"] == 0.6
    again = ["early-exit", str(calibrated / "tuning"), "--out", str(calibrated / "again.safetensors"), "--rate"]
    given = ["--probe", str(calibrated / "exit.safetensors"), "--answer-tokens", "12"]
    assert command_line([*again, "0.2", *given]) == 1, "the problems that trained a probe cannot calibrate it"
    error = capsys.readouterr().err
    assert f"{len(found.probe.trained_on or ())} of the 30 problems of" in error
    assert "the rate would not hold; give a run of other problems" in error
    for header, words in (
        (found.probe.header | {"trained": {"prompts": ["0" * 12]}}, "none of these problems trained it"),
        ({**found.probe.header, "trained": {}}, "its rate holds if none of these problems trained it"),
    ):
        dataclasses.replace(found.probe, header=header).save(calibrated / "other.safetensors")
        given[1] = str(calibrated / "other.safetensors")
        assert command_line([*again, "0.2", *given]) == 0
        said = capsys.readouterr().out
        assert f"the probe was given ({words}), 30 calibrated it" in said
    assert "stated mis-exit rate: at most 0.2 of the samples of a new problem of this kind" in said
    assert command_line([*again, "0.01", *given]) == 1
    assert "30 problems can state no rate below 0.0323" in capsys.readouterr().err


def test_a_thought_ends_at_the_first_exit_point_that_the_probe_is_sure_of(calibrated: Path) -> None:
    found = ExitProbe.load(str(calibrated / "exit.safetensors"))
    eager = dataclasses.replace(found, every=2, control=dataclasses.replace(found.control, threshold=0.6))
    eager.save(str(calibrated / "eager.safetensors"))
    arms = ["baseline", f"exit:{calibrated / 'eager.safetensors'}"]
    small = ["--num-problems", "10", "--samples", "1", "--max-new-tokens", "120", "--batch-size", "5"]
    assert main([*small, "--arms", *arms, "--out", str(calibrated / "run")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(LAB_MODEL)
    model = AutoModelForCausalLM.from_pretrained(LAB_MODEL, dtype=torch.float32)
    plain = read_any_traces([str(calibrated / "run")], tokenizer, "baseline")
    ended = {t.trace_id.split("/")[-1]: t for t in read_any_traces([str(calibrated / "run")], tokenizer, "exit:eager")}
    exits = 0
    for trace in plain:
        assert trace.thought_start is not None
        stop = trace.thought_end or len(trace.token_ids) - 1
        points = exit_points(
            trace.token_ids, trace.prompt_length, trace.thought_start, stop, step_ends(tokenizer), every=2
        )
        tried = Tried(problem_id="", trace=trace, right=True, points=tuple(points), answers=(True,) * len(points))
        (hidden_TD,) = hidden_at(model, [tried], 2)
        shares = eager.probe.probability(hidden_TD).tolist() if points else []
        sure = [place for place, share in zip(points, shares, strict=True) if share > 0.6]
        expected = sure[0] + 1 if sure else trace.thought_end
        assert ended[trace.trace_id.split("/")[-1]].thought_end == expected
        exits += bool(sure) and expected != trace.thought_end
    (row,) = read_audit(calibrated / "run").rows["exit:eager"]
    assert row["exits"] >= exits > 2
    assert row["readings"] >= row["exits"]
    stated = json.loads((calibrated / "run" / "results.json").read_text())["mis_exits"]["exit:eager"]
    rows = {(r.arm, r.problem_id): r.correct for r in read_grades(calibrated / "run")}
    lost = [rows["baseline", p] and not rows["exit:eager", p] for p in {key[1] for key in rows}]
    assert stated["stated"] == 0.25
    assert stated["seen"]["mean"] == pytest.approx(sum(lost) / len(lost))
    assert "states that it loses at most 25%" in stated["sentence"]
    assert len(list(read_generations(calibrated / "run"))) == 20


def test_what_voids_a_stated_rate_is_said() -> None:
    calibration = {"rate": 0.05, "sampling": {"temperature": 0.6, "greedy": False}}
    one = {"calibration": calibration, "stated": 0.05, "seen": {"low": 0.06}, "sentence": ""}
    said = exit_warnings({"exit:x": one}, {"temperature": 1.0, "greedy": False})
    assert "was stated for temperature 0.6, this run has 1.0" in said[0]
    assert "these problems are of another kind" in said[1]
    fine = {**one, "seen": {"low": 0.01}}
    assert exit_warnings({"exit:x": fine}, {"temperature": 0.6, "greedy": False}) == []


def test_a_probe_without_a_rate_and_an_exit_beside_another_rule_are_refused(
    calibrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Probe(weight_D=torch.ones(8), bias=0.0, layer=0).save(calibrated / "bare.safetensors")
    out = ["--out", str(calibrated / "refused")]
    assert main(["--num-problems", "2", "--arms", "baseline", f"exit:{calibrated / 'bare.safetensors'}", *out]) == 1
    assert (
        "is a probe without a stated mis-exit rate: calibrate it with 'moe-steer early-exit" in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match="another rule beside it would void it"):
        parse_arm("exit:a.safetensors+nowait")
