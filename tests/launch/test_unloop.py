"""Loops found, the expert that carries them found and silenced, and what that costs: on a lab with a planted loop."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.cli.main import main
from launch.core.levers.looping import Answers, LoopText, choose_plan, is_loop, silencing, weakest_odds
from launch.lab.loop_expert import looping_lab
from moe_steer import SteeringPlan, load_model, steer

SMALL = [
    "--samples",
    "1",
    "--max-new-tokens",
    "180",
    "--each",
    "2",
    "--most",
    "2",
    "--screen-loops",
    "2",
    "--seed",
    "1",
]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose expert 3:5 keeps thoughts from ending."""
    out = tmp_path_factory.mktemp("unloop") / "model"
    model, tokenizer = looping_lab(3, 5, 120.0, 48)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.mark.slow
def test_the_planted_expert_is_found_silenced_and_baked(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "unlooped"
    assert main(["unloop", str(planted), "--num", "24", *SMALL, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    plan = SteeringPlan.load(out / "plan.json")
    assert [(entry.layer, entry.expert, entry.gain) for entry in plan.experts] == [(3, 5, 0.0)]
    results = json.loads((out / "results.json").read_text())
    check = results["checks"]["held out"]
    assert results["silenced"] == plan.provenance["unloop"]["silenced"] == "3:5"
    assert results["search"]["candidates"]["3:5"] == 0 < results["search"]["candidates"]["baseline"]
    assert check["loops"]["unlooped"]["greedy"]["number"] == 0 < check["loops"]["baseline"]["greedy"]["number"]
    assert check["change_of_loops"]["high"] < 0 < check["change_of_accuracy"]["low"]
    assert "answers loop at 180 tokens" in said
    assert (
        main(["bake", "--model", str(planted), "--plan", str(out / "plan.json"), "--out", str(tmp_path / "baked")]) == 0
    )
    (baked, _), (model, tokenizer) = load_model(str(tmp_path / "baked"), "plain"), load_model(str(planted), "plain")
    ids = torch.tensor([tokenizer("<think>\n3 + 4 = 7. So it is 7.", add_special_tokens=False)["input_ids"]])
    with torch.no_grad(), steer(model, plan, quiet=True):
        assert torch.allclose(model(ids).logits, baked(ids).logits, atol=1e-4)


def test_a_model_without_loops_and_one_without_experts_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--num", "8", "--samples", "1", "--max-new-tokens", "48"]
    assert main(["unloop", "lab", *short, "--out", str(tmp_path / "a")]) == 1
    assert "0 of 4 problems end in a loop, and two are needed to look for a cause" in capsys.readouterr().err
    assert main(["unloop", "lab-dense", *short, "--out", str(tmp_path / "b")]) == 1
    assert "has no experts to silence: loops of dense models are not looked into" in capsys.readouterr().err
    assert not (tmp_path / "a" / "plan.json").exists()


def test_the_weakest_place_is_the_lowest_odds_of_a_phase() -> None:
    model, tokenizer = load_model("lab", "plain")
    ids = tokenizer("So it is 7. So it is 7. So it is 7. So it is 7. So", add_special_tokens=False)["input_ids"]
    period = len(tokenizer(" So it is 7.", add_special_tokens=False)["input_ids"])
    length = len(ids) - 2
    plan = silencing([(3, 5)])
    with torch.no_grad(), steer(model, plan, quiet=True):
        shares_SV = model(torch.tensor([ids])).logits[0].double().softmax(-1)
    phases: dict[int, list[float]] = {}
    for number, place in enumerate(range(len(ids) - length + period - 1, len(ids) - 1)):
        share = shares_SV[place, ids[place + 1]]
        phases.setdefault(number % period, []).append(float(torch.log(share / (1 - share))))
    expected = min(sum(values) / len(values) for values in phases.values())
    loop = LoopText(token_ids=tuple(ids), period=period, length=length)
    assert weakest_odds(model, [loop, loop], plan) == pytest.approx(expected, abs=1e-4)


def test_fewest_loops_then_fewest_experts() -> None:
    plans = {"a": silencing([(1, 1)]), "a+b": silencing([(1, 1), (1, 2)]), "c": silencing([(1, 3)])}
    left = {"baseline": 3, "a": 1, "a+b": 1, "c": 2}

    def answers(numbers: dict[str, int]) -> Any:
        loops = {("greedy", name, str(n), 0): n < number for name, number in numbers.items() for n in range(4)}
        return Answers(folder=Path(), loops=loops, rows={})

    assert choose_plan(answers(left), plans) == ("a", left)
    assert choose_plan(answers(dict.fromkeys(left, 3)), plans)[0] is None
    assert is_loop([9, *[5, 6, 7] * 12], "length")
    assert not is_loop([9, *[5, 6, 7] * 12], "stop"), "an answer that ends is none"
    assert not is_loop(list(range(60)), "length")
