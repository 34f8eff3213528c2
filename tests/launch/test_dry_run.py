"""Everything but loading weights: what a dry run checks, says and leaves alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.dry_run import Machine, fit
from launch.jobs.experts_options import Options
from launch.steer_r1 import main
from moe_steer import ExpertGain, SteeringPlan
from moe_steer.backends import plan_memory, read_config

LAB = ["--quick", "--dry-run"]


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a weight would be an error."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a dry run reads weights")

    monkeypatch.setattr("moe_steer.backends.checkpoint.LoadRequest.model", refuse)


def test_it_says_what_would_be_done_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main([*LAB, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "plain (the fastest that fits)" in text
    assert "3 layers of 16 experts" in text
    assert "48 identification, 120 tuning, 192 test" in text  # samples: 12 x (4 gains + baseline) x 2, 32 x 3 arms x 2
    assert f"{out}, new" in text
    assert "one process" in text
    assert not out.exists()


def test_a_given_plan_is_checked_and_its_samples_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SteeringPlan(experts=[ExpertGain(2, 3, 4.0)]).save(tmp_path / "plan.json")
    assert main([*LAB, "--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert "1 expert, 0 vectors, fits the model" in text
    assert "32 calibration, 192 test" in text


def test_another_machine_decides_backend_and_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = [*LAB, "--out", str(tmp_path / "run"), "--gpus", "2"]
    assert main([*job, "--gpu-gib", "24", "--backend", "tp_ep"]) == 0
    text = capsys.readouterr().out
    assert "2 x GPUs of 24 GiB" in text
    assert "tp_ep (asked for)" in text
    assert main([*job, "--gpu-gib", "0.05", "--backend", "tp_ep"]) == 1
    assert "backend 'tp_ep' does not fit on 2 x GPUs of 0.05 GiB" in capsys.readouterr().err


def test_one_process_has_all_gpus_that_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the start: device_map spreads the layers over them, and needs no CPU memory."""
    config = read_config("lab")
    options = Options(backend="device_map", quick=True, max_new_tokens=40, batch_size=1)
    whole = plan_memory(config, 1, 2**34, context=64, prompt=24).footprints[0]
    near = whole.total * 8 // 10
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("launch.core.beforehand.available_bytes", lambda world_size: (near, "GPU memory"))
    monkeypatch.setattr("launch.core.beforehand.gpus_here", lambda: (near, near))
    assert fit(options, None, config, Machine.of_ranks(1), prompt=24).backend == "device_map"
    monkeypatch.setattr("launch.core.beforehand.gpus_here", lambda: (near,))
    with pytest.raises(ValueError, match="backend 'device_map' cannot run this job: .* find no room"):
        fit(options, None, config, Machine.of_ranks(1), prompt=24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "rice-r1-math"], "the plan was made for num_layers 61, this model has 4"),
        (["--backend", "magic"], "backend 'magic' is unknown"),
        (["--backend", "tp_ep", "--offload", "cpu"], "offload is a feature of zero3"),
        (["--gpus", "3", "--gpu-gib", "24", "--backend", "autoep"], "16 experts cannot be shared evenly by 3 ranks"),
        (["--model", "./nowhere"], "there is no model folder './nowhere'"),
        (
            ["--model", "lab-dense"],
            "lab-dense is a dense model and has no experts to find: give --plan with directions",
        ),
        (["--problems", "none.jsonl"], "none.jsonl"),
        (["--coefficients", "Wait=x"], "'Wait=x' is not a coefficient"),
    ],
)
def test_what_the_start_would_refuse_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main([*LAB, "--out", str(tmp_path / "run"), *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_is_continued_or_refused_as_by_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from reasoning_evals.runs.run_folder import open_run

    options = Options(quick=True, out=str(tmp_path))
    open_run(tmp_path, options.config() | {"given_plan": None})
    before = (tmp_path / "run.json").read_bytes()
    assert main([*LAB, "--out", str(tmp_path), "--backend", "zero3"]) == 0
    assert "which is continued" in capsys.readouterr().out
    assert main([*LAB, "--out", str(tmp_path), "--seed", "5"]) == 1
    assert "holds a run of another config (seed: 0 there, 5 now)" in capsys.readouterr().err
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_damaged_weight_file_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moe_steer.lab import LAB_MODEL

    model = tmp_path / "model"
    model.mkdir()
    for file in LAB_MODEL.iterdir():
        if file.suffix in (".json", ".jinja"):
            (model / file.name).write_bytes(file.read_bytes())
    (model / "model.safetensors").write_bytes(b"nothing")
    job = [*LAB, "--model", str(model), "--out", str(tmp_path / "run"), "--max-new-tokens", "64", "--batch-size", "8"]
    assert main(job) == 1
    assert "the weight file model.safetensors" in capsys.readouterr().err
    (model / "model.safetensors").unlink()  # a configuration and a tokenizer are enough
    assert main(job) == 0
    assert json.loads((model / "config.json").read_text())["model_type"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--gpus", "2", "--gpu-gib", "80"], "describe a machine for"),
        (["--dry-run", "--gpus", "2"], "give both, or none"),
        (["--dry-run", "--gpus", "0", "--gpu-gib", "80"], "give positive numbers"),
    ],
)
def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str], wrong: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(wrong)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
