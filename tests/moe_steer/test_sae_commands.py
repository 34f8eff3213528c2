"""``moe-steer train-sae`` and ``sae-fit``, on the embedded model."""

import json
import re
import shutil
from pathlib import Path

import pytest

import sae_files as files
from launch.cli.main import main
from moe_steer.saes import load_sae


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems of the lab, one a line."""
    from moe_steer.lab.problems import lab_task

    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text(
        "\n".join(problem["prompt"].replace("\n", " ") for problem in lab_task(split="train", num=120, seed=3))
    )
    return path


def arguments(texts: Path, out: Path) -> list[str]:
    sizes = ["--width", "96", "--k", "8", "--tokens", "12800", "--batch-size", "128", "--save-every", "20"]
    return ["train-sae", "--texts", str(texts), "--layer", "1", "--out", str(out), *sizes]


def test_trained_measured_and_continued(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sae"
    assert main(arguments(texts, out)) == 0
    shown = capsys.readouterr().out
    assert re.search(
        r"96 atoms on layer 1, held-out texts: variance unexplained 0\.\d+, \d+\.\d atoms a token, ", shown
    )
    fit = json.loads((out / "fit.json").read_text())
    assert 0 < fit["fraction_variance_unexplained"] < 0.6
    sae = load_sae(out)
    assert (sae.about.layer, sae.about.site, sae.about.model_name, sae.width) == (1, "residual", "lab", 96)
    before = (out / "sae_weights.safetensors").read_bytes()
    assert main(arguments(texts, out)) == 0
    assert (out / "sae_weights.safetensors").read_bytes() == before

    report = tmp_path / "fit.json"
    capsys.readouterr()
    assert (
        main(["sae-fit", "--sae", str(out), "--texts", str(texts), "--max-tokens", "900", "--json", str(report)]) == 0
    )
    shown = capsys.readouterr().out
    assert "saelens SAE, jumprelu, 96 atoms, layer 1, of lab" in shown
    assert json.loads(report.read_text())["fit"]["fraction_variance_unexplained"] < 0.6

    assert main([*arguments(texts, out), "--seed", "1"]) == 1
    assert "holds a training on another model, layer, texts or batches" in capsys.readouterr().err
    assert main(["sae-fit", "--sae", str(out), "--texts", str(texts), "--layer", "2"]) == 1
    assert "belongs to layer 1, not 2" in capsys.readouterr().err
    for option, value, least in (("--skip-first", "-1", 0), ("--tokens-per-forward", "0", 1), ("--max-tokens", "0", 1)):
        assert main(["sae-fit", "--sae", str(out), "--texts", str(texts), option, value]) == 1
        assert f"{option} is {value}: give a whole number >= {least}" in capsys.readouterr().err
    shutil.rmtree(out / "training")
    assert main(arguments(texts, out)) == 1
    assert "holds an SAE without the state of its training: name another folder" in capsys.readouterr().err
    assert (out / "sae_weights.safetensors").read_bytes() == before
    assert main(["sae-fit", "--sae", str(out), "--texts", str(texts), "--k", "3"]) == 1
    assert "--k is 3, and this jumprelu SAE does not take it" in capsys.readouterr().err
    assert main(["sae-fit", "--sae", str(out), "--texts", str(texts), "--max-tokens", "0"]) == 1
    assert "--max-tokens is 0" in capsys.readouterr().err


def test_a_foreign_sae_is_warned_about_or_refused(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "foreign.pt"
    shapes = {"encoder.weight": (64, 128), "encoder.bias": (64,), "decoder.weight": (128, 64), "decoder.bias": (128,)}
    torch.save({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, path)
    assert main(["sae-fit", "--sae", str(path), "--texts", str(texts), "--max-tokens", "300"]) == 1
    assert "is not known: give it with --layer" in capsys.readouterr().err
    assert main(["sae-fit", "--sae", str(path), "--texts", str(texts), "--max-tokens", "300", "--layer", "2"]) == 0
    assert "more than half of the variance is unexplained" in capsys.readouterr().err
    other = files.saelens(tmp_path).path
    assert main(["sae-fit", "--sae", str(other), "--texts", str(texts)]) == 1
    assert "layer 7 does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--layer", "9"], "layer 9 does not exist"),
        (["--k", "97"], "k is 97 and width 96"),
        (["--texts", "none.txt"], "the file of texts 'none.txt' cannot be read"),
        (["--tokens", "0"], "--tokens is 0: give a whole number >= 1"),
        (["--save-every", "0"], "--save-every is 0"),
        (["--learning-rate", "-1"], "--learning-rate is -1: give a number above 0"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(
    changes: list[str], message: str, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(texts, tmp_path / "out")
    if "--texts" in changes:  # a list may stand there once
        at = given.index("--texts")
        del given[at : at + 2]
    assert main([*given, *changes]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_no_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out"), "--width", "8", "--k", "2", "--tokens", "10", "--layer", "1"]
    assert main(["train-sae", *out]) == 1
    assert "give --traces or --texts" in capsys.readouterr().err
