"""``moe-steer collect --routed``: responses whose routing an engine recorded, from files to a plan; no weights are read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from expert_stats import RoutingCounts
from launch.cli.main import main
from moe_steer import SteeringPlan, load_model
from moe_steer.layers import model_shape
from moe_steer.observe import observe_routing
from reasoning_evals.runs import read_completions


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the embedded model, and beside it what an engine would have returned: flat records with routed_experts."""
    folder = tmp_path_factory.mktemp("routed")
    assert main(["generate", "--num", "12", "--max-new-tokens", "100", "--out", str(folder / "run")]) == 0
    model, tokenizer = load_model("lab")
    shape = model_shape(model)
    with (folder / "rollouts.jsonl").open("w") as file:
        for item in read_completions(folder / "run" / "generations.jsonl"):
            prompt = tokenizer(item.prompt, add_special_tokens=False)["input_ids"]
            tokens = [*prompt, *item.token_ids]
            ids = np.zeros((len(tokens), shape.num_layers, shape.top_k), dtype=int)
            with (
                torch.no_grad(),
                observe_routing(model, lambda layer, found, _, to=ids: to.__setitem__((slice(None), layer), found)),
            ):
                model(torch.tensor([tokens]))
            row = {"problem_id": item.problem_id, "prompt_ids": prompt, "completion_ids": item.token_ids}
            file.write(json.dumps({**row, "routed_experts": ids[:-1].tolist()}) + "\n")
    return folder  # fmt: skip


def test_from_rollouts_to_a_plan(rollouts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = ["collect", "--markers", "<think>", "</think>", "--out"]
    forward = tmp_path / "forward.safetensors"
    assert main([*counted, str(forward), "--traces", str(rollouts / "run")]) == 0
    monkeypatch.setattr("launch.core.session.load_model", None)  # weights are not read
    recorded = tmp_path / "recorded.safetensors"
    assert main([*counted, str(recorded), "--routed", str(rollouts / "rollouts.jsonl")]) == 0
    mine, theirs = RoutingCounts.load(recorded), RoutingCounts.load(forward)
    assert mine.grouped()["marker_GM"].sum(0)[0] == 12
    np.testing.assert_array_equal(mine.grouped()["joint_GMLE"].sum(0)[0], theirs.grouped()["joint_GMLE"].sum(0)[0])
    assert mine.num_tokens == theirs.num_tokens - 12, "the last token of a response has no routing"
    scores, plan = tmp_path / "scores.json", tmp_path / "plan.json"
    assert main(["score", "--counts", str(recorded), "--out", str(scores)]) == 0
    assert main(["plan", "--scores", str(scores), "--out", str(plan), "--unproven"]) == 0
    assert len(SteeringPlan.load(plan).experts) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --traces, or --routed"),
        (["--traces", "a", "--routed", "b"], "one of the two"),
        (["--routed", "b", "--dtype", "float32"], "--dtype is for a forward pass, and --routed needs none"),
        (["--routed", "b", "--arm", "x"], "--arm is for a forward pass"),
        (["--routed", "missing.jsonl"], "no rollouts at 'missing.jsonl'"),
        (["--model", "lab-dense", "--routed", "rollouts.jsonl"], "dense model"),
        (["--routed", "cut.jsonl"], "cut.jsonl:1: routed_experts of trace 'a#0' hold 1 rows for 3 tokens"),
        (["--routed", "foreign.jsonl"], "token 999999 is none of this model's"),
    ],
)
def test_wrong_input_is_one_line(
    rollouts: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(rollouts)
    routed = np.zeros((1, model_shape(load_model("lab")[0]).num_layers, 1)).astype(int).tolist()
    row = {"problem_id": "a", "prompt_ids": [1, 2], "completion_ids": [3], "routed_experts": routed}
    Path("cut.jsonl").write_text(json.dumps(row) + "\n")
    Path("foreign.jsonl").write_text(json.dumps({**row, "completion_ids": [999999]}) + "\n")
    out = tmp_path / "counts.safetensors"
    assert main(["collect", *arguments, "--out", str(out)]) in (1, 2)
    shown = capsys.readouterr().err.strip()
    assert message in shown
    assert "\n" not in shown.split("moe-steer")[-1]
    assert not out.exists()
