"""The controls of the whole main job in their quick form, a guard that fails, and what the job does by causes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from expert_stats import ExpertScores
from expert_stats.causes import Causes
from launch.core.options import options_from
from launch.core.outcomes import DECISIONS, token_readings
from launch.jobs.experts import candidate_plans
from launch.jobs.experts_options import Options
from launch.lab import controls
from launch.lab.planted_expert import PlantedExpert
from launch.steer_r1 import main as main_job
from moe_steer import load_model
from moe_steer.thinking import token_tags
from moe_steer.tokens import trace_from_ids
from rank_processes import ROOT, run_ranks
from reasoning_evals.runs import read_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all controls, run."""
    out = tmp_path_factory.mktemp("controls")
    assert controls.main(["--quick", "--processes", "1", "--out", str(out)]) == 0
    return out


def test_the_planted_cause_is_found_and_the_negatives_show_nothing(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    causal, plain, inert = results["controls"]
    assert [one["name"] for one in results["controls"]] == ["causal", "plain", "inert"]
    assert all(one["passed"] for one in results["controls"])
    assert causal["expert"] == [3, 5]
    assert causal["verdict"] == "helped"
    assert causal["points"]["low"] > 0
    assert causal["planted"]["causes"]["rank"] == 1
    assert causal["planted"]["npmi_as_rice"]["rank"] is None, (
        "it never fires at <think>, so nPMI there has nothing to say of it"
    )
    assert inert["planted"]["npmi_as_rice"]["rank"] is None
    assert plain["verdict"] == inert["verdict"] == "no effect shown"
    assert inert["expert"] == [3, 5]
    assert inert["every_sample_equal"]
    assert inert["planted"]["npmi_at_failures"]["rank"] == 1, "nPMI takes it for one that matters"
    assert inert["planted"]["npmi_at_failures"]["q"] <= 0.05
    assert inert["planted"]["causes"]["score"] == 0.0
    assert inert["planted"]["verdict"] == "inert"
    assert inert["smallest_shown"] > 0
    html = (folder / "report.html").read_text()
    assert "3 of 3 controls passed." in html
    assert html.count("<img ") == 3
    assert "<script" not in html
    page = (folder / "causal" / "report.md").read_text()
    assert "## The experts, by the problems that chose them" in page
    assert "| 3:5 | " in page


def test_a_control_that_fails_is_an_error_and_nothing_is_sampled_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("generations*.jsonl")}
    wrong = replace(controls.CONTROLS[2], verdict="helped")
    monkeypatch.setattr(controls, "CONTROLS", (wrong,))
    assert controls.main(["--quick", "--processes", "1", "--out", str(folder)]) == 1
    said = capsys.readouterr()
    assert "1 of 1 controls failed: inert" in said.err
    assert "FAILED  inert" in said.out
    assert {path: path.read_bytes() for path in folder.rglob("generations*.jsonl")} == before
    card = folder / "models" / "inert" / "README.md"
    card.write_text(card.read_text().replace("sha256 ", "sha256 0"))
    assert controls.main(["--quick", "--processes", "1", "--out", str(folder)]) == 1
    assert "planted otherwise, or in other weights: remove" in capsys.readouterr().err


def test_gains_below_1_are_tried_on_experts_that_go_the_other_way(folder: Path) -> None:
    run = folder / "causal"
    scores = ExpertScores.load(run / "scores.json")
    options = options_from(read_run(run)["config"], Options, ["given_plan", "given_counts"])
    plans = candidate_plans(replace(options, gains=(4.0, 16.0, 0.5)), scores)
    causes = Causes.load(run / "causes.json")
    mean_LE = np.where(causes.selected_LE > 0, causes.gradient_PLE.mean(0), 0.0)
    for gain, at in ((4.0, mean_LE.argmax()), (0.5, mean_LE.argmin())):
        row, expert = divmod(int(at), mean_LE.shape[1])
        assert [(one.layer, one.expert, one.gain) for one in plans[gain].experts] == [
            (causes.layers[row], expert, gain)
        ]
    assert plans[16.0].experts[0].expert == plans[4.0].experts[0].expert


def test_only_one_expert_differs_from_the_lab(folder: Path) -> None:
    own, planted = (
        load_model("lab-search")[0].state_dict(),
        load_model(str(folder / "models" / "causal"))[0].state_dict(),
    )
    changed = {name for name in own if not torch.equal(own[name], planted[name])}
    assert {name.partition("mlp.")[2] for name in changed} == {
        "gate.weight",
        "gate.e_score_correction_bias",
        "experts.down_proj",
    }
    for name in changed:
        assert "layers.3." in name
        different = (own[name] != planted[name]).reshape(len(own[name]), -1).any(-1)
        assert different.nonzero().flatten().tolist() == [5]
    assert 'raises the logits of "Wait" and "Alternatively"' in PlantedExpert(kind="causal", out=folder).card()
    weaker = PlantedExpert(kind="causal", out=folder, strength=0.5).card()
    assert "--kind causal --layer 3 --expert 5 --strength 0.5 --solutions 64`" in weaker
    assert "--kind inert --layer 3 --expert 5 --solutions 64`" in PlantedExpert(kind="inert", out=folder).card()
    with pytest.raises(ValueError, match="an inert one does not"):
        PlantedExpert(kind="inert", out=folder, strength=3.0)


def test_decisions_are_where_a_thought_goes_on_or_ends() -> None:
    tokenizer = load_model("lab-search")[1]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (
        "<think>\n", "Try 4: wrong. Wait, try 5: wrong. Alternatively, try 6: right.</think>\nWait, the answer is 6.",
    )]  # fmt: skip
    trace = trace_from_ids("a#0", *ids, token_tags(tokenizer))
    (reading,) = token_readings([trace], tokenizer, ("Wait", "Alternatively"), DECISIONS)
    said = [tokenizer.decode(trace.token_ids[: place + 1]).rpartition(" ")[2] for place in reading.at]
    assert said == ["wrong.", "wrong.", "right."], "behind the thought no decision is left"
    after = [tokenizer.decode([trace.token_ids[place + 1]]) for place in reading.at]
    assert after == [" Wait", " Alternatively", "</think>"]
    assert reading.odds
    close = "name the tokens with which it goes on"
    for tokens in ((), ("</think>",)):
        with pytest.raises(ValueError, match=close):
            token_readings([trace], tokenizer, tokens, DECISIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--by", "causes", "--counts", "x"], "which --counts keeps away: leave one out"),
        (["--by", "causes", "--endpoint", "http://127.0.0.1:1/v1"], "which --endpoint keeps away"),
        (["--tokens", "Hmm"], "--tokens is for --by causes"),
        (["--wanted", "lower"], "--wanted is for --by causes"),
        (["--by", "causes", "--plan", "x.json"], "--by is for experts that are searched, and --plan gives them"),
        (["--by", "causes", "--tokens"], "--tokens is empty"),
    ],
)  # fmt: skip
def test_what_would_not_be_followed_is_wrong_usage(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main_job(options)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.slow
def test_two_ranks_choose_the_same_by_causes(tmp_path: Path) -> None:
    few = ["--model", "lab-search", "--by", "causes", "--top", "1", "--gains", "4", "--greedy", "--batch-size", "64"]
    few += ["--num-identification", "8", "--num-tuning", "1", "--num-test", "2", "--max-new-tokens", "72"]
    assert main_job([*few, "--out", str(tmp_path / "one")]) == 0
    done = run_ranks(ROOT / "launch" / "steer_r1.py", 2, [*few, "--out", str(tmp_path / "two")], 240)
    assert done.codes == [0, 0], done.text[-3000:]
    one, two = (Causes.load(tmp_path / name / "causes.json") for name in ("one", "two"))
    assert one.problems == two.problems
    np.testing.assert_allclose(two.gradient_PLE, one.gradient_PLE, rtol=1e-3, atol=1e-5)
    plans = [json.loads((tmp_path / name / "plan.json").read_text())["experts"] for name in ("one", "two")]
    assert plans[0] == plans[1]
