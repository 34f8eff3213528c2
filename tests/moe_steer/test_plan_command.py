"""``moe-steer plan`` with directions, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launch.cli.main import main
from moe_steer.plan import SteeringPlan


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made").mkdir()
    head = {"direction": json.dumps({"layer": 20, "site": "residual", "residual_norm": 10.0})}
    save_file({"vector": torch.ones(4)}, tmp_path / "made" / "d.safetensors", head)
    save_file({"vector": torch.ones(4)}, tmp_path / "plain.safetensors")
    return tmp_path


def test_directions_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--residual",
        "20:made/d.safetensors=0.5@step_end:paragraph",
        "3:plain.safetensors=-2e-1",
        "--scope",
        "after:8",
    ]
    assert main(["plan", "--out", "plans/p.json", *words]) == 0
    plan = SteeringPlan.load("plans/p.json")
    first, second = plan.residual
    assert (first.layer, first.strength, first.scope, first.unit) == (20, 0.5, "step_end:paragraph", "vector")
    assert (second.layer, second.strength, second.scope) == (3, -0.2, "after:8")
    assert first.file == "../made/d.safetensors", "named from the plan's folder"
    assert plan.load_shift(first).tolist() == [0.5] * 4
    out = capsys.readouterr().out
    assert "layer  20 vector ../made/d.safetensors strength 0.5 scope step_end:paragraph" in out
    assert out.splitlines()[-1] == "wrote plans/p.json: 0 experts, 2 vectors"


def test_directions_beside_experts_and_added_to_a_plan(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experts = ["--experts", "39:182=4", "--scope", "thought"]
    assert main(["plan", "--out", "a.json", *experts, "--residual", "3:plain.safetensors=1"]) == 0
    words = ["--residual", f"20:{here}/made/d.safetensors=0.1@generated", "--unit", "residual_norm"]
    assert main(["plan", "--out", "plans/b.json", "--start", "a.json", *words]) == 0
    plan = SteeringPlan.load("plans/b.json")
    assert plan.scope == "thought"
    assert [(e.layer, e.expert, e.gain) for e in plan.experts] == [(39, 182, 4.0)]
    assert [(e.layer, e.scope, e.unit) for e in plan.residual] == [
        (3, "thought", "vector"),
        (20, "generated", "residual_norm"),
    ]
    assert plan.load_shift(plan.residual[0]).tolist() == [1.0] * 4, "its file is still found from the new folder"
    assert plan.load_shift(plan.residual[1]).tolist() == pytest.approx([0.5] * 4)
    assert "strength 0.1 of the residual norm scope generated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--residual", "plain.safetensors=1"],
            "names no direction: write LAYER:FILE=STRENGTH or LAYER:FILE=STRENGTH@SCOPE",
        ),
        (["--residual", "3:plain.safetensors"], "names no direction"),
        (
            ["--residual", "3:plain.safetensors=much"],
            "the strength 'much' in '3:plain.safetensors=much' is not a number",
        ),
        (["--residual", "3:plain.safetensors=nan"], "strength of the residual vector at layer 3 is nan"),
        (["--residual", "3:plain.safetensors=1@mind"], "scope 'mind' is unknown: choose one of all, prompt"),
        (["--residual", "3:none.safetensors=1"], "there is no file"),
        (["--residual", "3:made/d.safetensors=1"], "was made for layer 20 and the plan adds it at layer 3"),
        (["--residual", "3:plain.safetensors=1", "--unit", "residual_norm"], "has no residual_norm in its header"),
        (["--residual", "3:plain.safetensors=1", "--unit", "miles"], "'miles': choose one of vector, residual_norm"),
        (["--experts", "1:2", "--unit", "residual_norm"], "says how to read --residual, and there is none"),
        (["--experts", "1:2", "--start", "a.json"], "give exactly one of --scores, --preset and --experts"),
        (["--start", "a.json"], "no plan file at 'a.json'"),
        (["--residual", "3:plain.safetensors=1", "--scope", ""], "scope '' is unknown"),
        (["--residual", "3:plain.safetensors=1", "--gain", "3"], "--gain, --top and --min-support are for experts"),
        (["--residual", "3:plain.safetensors=1@answer", "--scope", "thought"], "every --residual names its own scope"),
        (["--experts", "1:2=3", "--gain", "5"], "--gain is not read with --experts as given: leave it out"),
        (["--experts", "1:2", "--top", "3"], "--top is not read with --experts as given: leave it out"),
        (
            ["--preset", "rice-r1-math", "--min-support", "3"],
            "--min-support is not read with --preset as given: leave it out",
        ),
        (["--residual", "3:plain.safetensors=1", "--renormalize"], "--renormalize is for the gains of experts"),
        (["--residual", "3:layer_3.pt=1"], "read it with 'moe-steer convert-direction layer_3.pt --out FOLDER' first"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--out", "p.json", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (here / "p.json").exists()


def test_a_scope_that_no_entry_would_follow_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--out", "a.json", "--residual", "3:plain.safetensors=1"]) == 0
    assert main(["plan", "--out", "b.json", "--start", "a.json", "--scope", "answer"]) == 1
    assert "--scope answer would change nothing: the vectors of a.json keep their own" in capsys.readouterr().err
    assert not (here / "b.json").exists()


def test_strength_zero_is_written_and_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--out", "a.json", "--residual", "3:plain.safetensors=0"]) == 0
    shown = capsys.readouterr()
    assert "strength 0 scope all (adds nothing)" in shown.out
    assert "NOTE: the plan changes nothing" in shown.err


def test_the_plan_says_which_model_its_directions_were_made_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("qwen2", "llama"):
        model = {"model_type": kind, "num_layers": 5, "num_experts": 0, "name": kind, "hidden_size": 4, "top_k": 0}
        head = {"direction": json.dumps({"layer": 2, "site": "residual", "model": model})}
        save_file({"vector": torch.ones(4)}, here / f"{kind}.safetensors", head)
    assert main(["plan", "--out", "a.json", "--residual", "2:qwen2.safetensors=1", "3:plain.safetensors=1"]) == 0
    expected = {"model_type": "qwen2", "num_layers": 5, "num_experts": 0, "name": "qwen2"}
    assert SteeringPlan.load("a.json").model == expected
    assert main(["plan", "--out", "b.json", "--residual", "2:qwen2.safetensors=1", "2:llama.safetensors=1"]) == 1
    assert "llama.safetensors was made on a model with model_type 'llama'" in capsys.readouterr().err
    assert main(["plan", "--out", ".", "--residual", "2:qwen2.safetensors=1"]) == 1
    assert "--out . is a folder: name the plan file in it" in capsys.readouterr().err


def test_the_options_of_evidence_are_for_scores(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(here / "plan.json")]
    for arguments, message in (
        (["--experts", "1:2", "--unproven"], "--unproven is not read with --experts as given"),
        (["--experts", "1:2", "--max-q", "0.1"], "--max-q is not read with --experts as given"),
        (["--scores", "s.json", "--unproven", "--max-q", "0.1"], "give one of them"),
        (["--scores", "s.json", "--max-q", "0"], "give a rate above 0, at most 1"),
    ):
        assert main(["plan", *arguments, *out]) == 1
        shown = capsys.readouterr().err
        assert message in shown
        assert shown.count("\n") == 1
