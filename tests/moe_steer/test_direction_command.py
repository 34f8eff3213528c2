"""``moe-steer direction`` and ``convert-direction`` on the embedded model; what wrong input says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_stats import Trace, write_traces
from launch.cli.main import main
from moe_steer.directions import Direction
from moe_steer.lab import LAB_MODEL
from moe_steer.saes import SAE, load_sae, save_sae
from moe_steer.saes.sae import SAEAbout

PARITY = ["--contrast", "answers", "--pairs", "p", "--method", "sta", "--sae", "s", "--parity"]
THOUGHTS = {
    "p#0": "It is 7.",
    "p#1": "3 + 4 = 7. Wait, let me go over it again. 3 + 4 = 7. It fits.",
    "q#0": "So it is 9. Good.",
    "q#1": "4 + 5 = 9. Hmm, once more. 4 + 5 = 9. Alternatively, 5 + 4 = 9. It fits. Good.",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Traces, pairs and an SAE of the embedded model's layer 2, with random weights."""
    from expert_stats import trace_from_ids
    from launch.lab.models import prompt_text
    from moe_steer.backends import read_tokenizer
    from moe_steer.thinking import token_tags

    place, tokenizer = tmp_path_factory.mktemp("direction"), read_tokenizer("lab")
    prompt = tokenizer.encode(prompt_text("What is 3 + 4?"), add_special_tokens=False)
    traces: list[Trace] = []
    for name, thought in THOUGHTS.items():
        ids = tokenizer.encode(f"{thought}</think>\nThe answer is 7.", add_special_tokens=False)
        traces.append(trace_from_ids(name, prompt, ids, token_tags(tokenizer)))
    write_traces(place / "traces.jsonl", traces)
    rows = [
        {"question": f"{n} + 1 =", "matching": str(n + 1), "not_matching": "Wait, no.", "answer": "2"} for n in range(4)
    ]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    width = json.loads((LAB_MODEL / "config.json").read_text())["hidden_size"]
    halves_DF = torch.cat([torch.eye(width), -torch.eye(width)], dim=1)  # an atom for either sign of every dimension
    random_DF = torch.randn(halves_DF.shape, generator=torch.Generator().manual_seed(0))
    for name, encoder_DF in (("sae", halves_DF), ("random", random_DF)):
        sae = SAE(
            kind="relu",
            W_enc_DF=encoder_DF,
            b_enc_F=torch.zeros(2 * width),
            W_dec_FD=encoder_DF.T.contiguous(),
            b_dec_D=torch.zeros(width),
            apply_b_dec_to_input=False,
            about=SAEAbout(format="trained", source="made", sha256="", model_name="lab", layer=2, site="residual"),
        )
        save_sae(sae, place / name)
    return place


def test_every_method_writes_a_file_and_a_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["direction", "--contrast", "decisions", "--traces", str(folder / "traces.jsonl"), "--layers", "2"]
    methods = ["caa", "sta", "sae", "atom", "pca"]
    more = ["--method", *methods, "--sae", str(folder / "sae"), "--num-atoms", "5", "--out", str(tmp_path / "d")]
    assert main([*given, *more]) == 0
    shown = capsys.readouterr().out
    for method in methods:
        direction = Direction.load(tmp_path / "d" / f"{method}-L2.safetensors")
        function = {"sae": "all_atoms", "atom": "single_atom"}.get(method, method)
        assert (direction.layer, direction.method) == (2, function)
        assert direction.header["contrast"]["weight"] == "token"
        assert direction.header["notes"]["switch_words"] == ["Wait", "Alternatively", "Hmm"]
        assert f"{function} layer 2: norm " in shown
    assert "SAE of layer 2 on this model: variance unexplained" in shown
    assert "4 samples (4 tokens) against 2 samples (3 tokens)" in shown
    assert (tmp_path / "d" / "atoms.md").read_text().count("# ") == 3
    assert Direction.load(tmp_path / "d" / "sta-L2.safetensors").header["num_atoms"] == 5


def test_decisions_after_certain_words_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["direction", "--contrast", "decisions", "--traces", str(folder / "traces.jsonl"), "--layers", "2"]
    assert main([*given, "--after", "7.", "--out", str(tmp_path / "d")]) == 0
    direction = Direction.load(tmp_path / "d" / "caa-L2.safetensors")
    assert direction.header["notes"]["after"] == "7."
    counted = direction.header["contrast"]
    assert (counted["positive"]["tokens"], counted["negative"]["tokens"]) == (1, 1)
    assert main([*given, "--after", "nowhere.", "--out", str(tmp_path / "e")]) == 1
    assert "another --after" in capsys.readouterr().err


@pytest.mark.parametrize("contrast", ["thoughts", "answers", "prompts"])
def test_every_contrast_gives_directions_at_several_layers(contrast: str, folder: Path, tmp_path: Path) -> None:
    given = ["direction", "--contrast", contrast, "--layers", "0", "2", "--out", str(tmp_path)]
    source = (
        ["--traces", str(folder / "traces.jsonl")]
        if contrast == "thoughts"
        else ["--pairs", str(folder / "pairs.jsonl")]
    )
    prompt = ["--prompt", "Be brief."] if contrast == "prompts" else []
    assert main([*given, *source, *prompt]) == 0
    found = [Direction.load(tmp_path / f"caa-L{layer}.safetensors") for layer in (0, 2)]
    assert [direction.layer for direction in found] == [0, 2]
    assert found[0].header["contrast"]["weight"] == "sample"
    assert found[0].header["contrast"]["positive"]["samples"] == (2 if contrast == "thoughts" else 4)
    assert len(found[0].header["notes"]["template_sha256"]) == 64


def test_a_direction_goes_through_the_other_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    direction = Direction(vector_D=torch.randn(8), layer=2, method="caa")
    direction.save(tmp_path / "d.safetensors")
    convert = ["convert-direction", str(tmp_path / "d.safetensors"), "--to"]
    assert main([*convert, "gguf", "--out", str(tmp_path / "cv.gguf")]) == 0
    assert main([*convert, "easyedit", "--out", str(tmp_path / "ee")]) == 0
    assert "llama-server --control-vector cv.gguf" in capsys.readouterr().out
    for source, out in (("cv.gguf", "from_gguf"), ("ee/layer_2.pt", "from_pt")):
        assert main(["convert-direction", str(tmp_path / source), "--out", str(tmp_path / out)]) == 0
        again = Direction.load(tmp_path / out / "imported-L2.safetensors")
        assert torch.equal(again.vector_D, direction.vector_D)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contrast", "decisions"], "--contrast decisions reads --traces: give it"),
        (["--contrast", "answers"], "--contrast answers reads --pairs: give it"),
        (
            ["--contrast", "answers", "--pairs", "p", "--prompt", "x"],
            "--prompt goes with --contrast prompts and only with it",
        ),
        (["--contrast", "prompts", "--pairs", "p"], "--prompt goes with --contrast prompts"),
        (
            ["--contrast", "answers", "--pairs", "p", "--method", "sta"],
            "--method sta needs --sae with an SAE for each of the layers",
        ),
        (["--contrast", "answers", "--pairs", "p", "--method", "sta", "--sae", "none"], "there is no SAE at 'none'"),
        (["--contrast", "answers", "--pairs", "none"], "there is no file 'none'"),
        (["--contrast", "answers", "--pairs", "p", "--after", "x."], "--after goes with --contrast decisions only"),
        (["--contrast", "decisions", "--traces", "t", "--after", " "], "--after is empty: give words, or leave it out"),
        (["--contrast", "decisions", "--traces", "none"], "no traces at 'none'"),
        (
            ["--contrast", "decisions", "--traces", "t", "--first-tokens", "3"],
            "go with --contrast answers and thoughts only",
        ),
        (
            ["--contrast", "decisions", "--traces", "t", "--layers", "1", "1"],
            r"--layers is [1, 1]: give distinct layers",
        ),
        (["--contrast", "answers", "--pairs", "p", "--traces", "t"], "reads --pairs and not --traces"),
        (["--contrast", "answers", "--pairs", "p", "--keep", "0.1"], "--keep goes with --method sta"),
        (["--contrast", "answers", "--pairs", "p", "--atom", "1"], "--atom goes with --method atom"),
        (
            ["--contrast", "answers", "--pairs", "p", "--arm", "x"],
            "--arm is of runs, and --contrast answers reads pairs",
        ),
        (["--contrast", "answers", "--pairs", "p", "--sae", "s"], "--sae is for --method sta, sae, atom"),
        ([*PARITY, "--num-atoms", "3"], "--parity is the release's arithmetic, which has no --num-atoms"),
        ([*PARITY, "--sides", "one"], "--parity is the release's arithmetic, which has no --sides"),
        ([*PARITY, "--rate", "sample"], "--parity is the release's arithmetic, which has no --rate"),
        ([*PARITY, "--by", "effect"], "--parity is the release's arithmetic, which has no --by effect"),
        ([*PARITY, "--weight", "token"], "--parity needs pairs and means over samples"),
        (["--contrast", "decisions", "--traces", "t", *PARITY[4:]], "--parity needs pairs and means over samples"),
        ([*PARITY[:-1], "--max-density", "0"], "--max-density is 0: give a share of the tokens above 0"),
        (["--contrast", "answers", "--pairs", "p", "--switch-words", "So"], "--switch-words goes with --contrast dec"),
        (["--contrast", "answers", "--pairs", "p", "--first-tokens", "0"], "--first-tokens is 0: give a whole number"),
        (["--contrast", "answers", "--pairs", "p", "--method", "caa", "caa"], "give at least one, and each once"),
        (["--contrast", "answers", "--pairs", "p", "--tokens-per-batch", "0"], "--tokens-per-batch is 0"),
        (["--contrast", "decisions", "--traces", "t", "--chat"], "--chat is for questions"),
        (["--contrast", "decisions", "--traces", "t", "--switch-words", " "], "give at least one word, and no empty"),
        (
            ["--contrast", "answers", "--pairs", "p", "--sae", "s", "--method", "sta", "--keep", "2"],
            "--keep is 2: give a share from 0 to 1",
        ),
        (
            [
                "--contrast",
                "answers",
                "--pairs",
                "p",
                "--sae",
                "s",
                "--method",
                "sta",
                "--keep",
                "0.1",
                "--trim",
                "0.1",
            ],
            "--keep, --trim and --num-atoms all say how many atoms",
        ),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    layers: list[Any] = [] if "--layers" in arguments else ["--layers", "1"]
    assert main(["direction", *arguments, *layers, "--out", "d"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_sae_of_another_layer_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "direction",
        "--contrast",
        "decisions",
        "--traces",
        str(folder / "traces.jsonl"),
        "--sae",
        str(folder / "sae"),
    ]
    assert main([*given, "--layers", "1", "--method", "sta", "--out", str(tmp_path / "d")]) == 1
    assert "there is no SAE for layer 1: give one, or name only layers [2]" in capsys.readouterr().err
    assert main([*given, "--layers", "1", "--out", str(tmp_path / "d")]) == 1
    assert "--sae is for --method sta, sae, atom, and none is asked for" in capsys.readouterr().err
    sae = load_sae(folder / "sae")
    save_sae(dataclasses.replace(sae, about=dataclasses.replace(sae.about, layer=3)), tmp_path / "sae3")
    both = [*given, str(tmp_path / "sae3"), "--method", "sta", "--layers", "2"]
    assert main([*both, "--out", str(tmp_path / "d")]) == 1
    assert "the SAEs belong to layers [2, 3], --layers names [2]: name theirs" in capsys.readouterr().err
    words = ["--layers", "2", "--method", "sta", "--switch-words", "Maybe", "--out", str(tmp_path / "d")]
    assert main([*given, *words]) == 1
    assert "the decisions have a side without tokens" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_a_folder_with_saes_of_several_layers_serves_them_all(folder: Path, tmp_path: Path) -> None:
    sae = load_sae(folder / "sae")
    published = tmp_path / "SAE-Res-lab-W1K-L0_128"
    published.mkdir()
    for layer in (1, 2, 3):
        tensors = {"W_enc": sae.W_enc_DF.T, "b_enc": sae.b_enc_F, "W_dec": sae.W_dec_FD.T, "b_dec": sae.b_dec_D}
        torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, published / f"layer{layer}.sae.pt")
    given = ["direction", "--contrast", "decisions", "--traces", str(folder / "traces.jsonl"), "--method", "sae"]
    assert main([*given, "--sae", str(published), "--layers", "1", "3", "--out", str(tmp_path / "d")]) == 0
    found = [Direction.load(tmp_path / "d" / f"sae-L{layer}.safetensors").header["sae"] for layer in (1, 3)]
    assert [(sae["layer"], sae["format"]) for sae in found] == [(1, "qwen-scope"), (3, "qwen-scope")]


def test_a_direction_of_other_texts_is_not_written_over(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    traces = ["direction", "--traces", str(folder / "traces.jsonl"), "--layers", "2", "--out", str(tmp_path)]
    assert main([*traces, "--contrast", "decisions"]) == 0
    before = (tmp_path / "caa-L2.safetensors").read_bytes()
    assert main([*traces, "--contrast", "decisions"]) == 0, "the same again replaces itself"
    assert (tmp_path / "caa-L2.safetensors").read_bytes() == before
    capsys.readouterr()
    assert main([*traces, "--contrast", "thoughts"]) == 1
    assert (
        "caa-L2.safetensors is a direction of other texts, other marked places or another model: give another --out"
        in (capsys.readouterr().err)
    )
    assert (tmp_path / "caa-L2.safetensors").read_bytes() == before


def test_conversions_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert-direction", "x.bin", "--out", str(tmp_path)]) == 1
    assert "'x.bin' is neither .safetensors nor .pt nor .gguf" in capsys.readouterr().err
    for name in ("a", "b"):
        Direction(vector_D=torch.ones(8), layer=2, method="caa").save(tmp_path / f"{name}.safetensors")
    assert (
        main(["convert-direction", *(str(tmp_path / f"{n}.safetensors") for n in "ab"), "--out", str(tmp_path / "d")])
        == 1
    )
    assert "two of the files would both become caa-L2" in capsys.readouterr().err
    capsys.readouterr()
    one = str(tmp_path / "a.safetensors")
    for arguments, message in (
        ([], "there is nothing to convert: give files"),
        ([one, "--layer", "1"], "--layer is for .pt files"),
        ([one, str(tmp_path / "b.safetensors"), "--to", "easyedit"], "two of the files would both become layer_2"),
    ):
        assert main(["convert-direction", *arguments, "--out", str(tmp_path / "d")]) == 1
        assert message in capsys.readouterr().err
    assert main(["convert-direction", one, "--out", one]) == 1
    assert "is a file: name a folder" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()
    torch.save(torch.ones(8), tmp_path / "layer_4.pt")
    assert main(["convert-direction", str(tmp_path / "layer_4.pt"), "--layer", "2", "--out", str(tmp_path / "d")]) == 1
    assert "--layer is 2 and the name of" in capsys.readouterr().err
    (tmp_path / "layer_4.pt").rename(tmp_path / "plain.pt")
    assert main(["convert-direction", str(tmp_path / "plain.pt"), "--out", str(tmp_path / "d")]) == 1
    assert "does not say its layer as layer_20.pt does: give --layer" in capsys.readouterr().err


def test_two_directions_of_a_layer_are_summed_in_a_control_vector_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        Direction(vector_D=torch.ones(8), layer=2, method="caa").save(tmp_path / f"{name}.safetensors")
    files = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    assert main(["convert-direction", *files, "--to", "gguf", "--out", str(tmp_path / "cv.gguf")]) == 0
    assert "layers 2, layer 2 the sum of 2 files; use: " in capsys.readouterr().out


def test_warnings_are_one_line_each(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": "1 + 1 =", "matching": "2", "not_matching": right} for right in ("", "Wait, no.")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["direction", "--contrast", "answers", "--pairs", str(tmp_path / "pairs.jsonl"), "--layers", "2"]
    assert main([*given, "--out", str(tmp_path / "d")]) == 0
    shown = capsys.readouterr()
    assert shown.err == "NOTE: 1 pairs are left out: one of their sides holds no tokens\n"
    assert "next: moe-steer plan --residual 2:" in shown.out


def test_pairs_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pairs.csv").write_bytes(b"\xff\xfe\x00abc")
    given = ["direction", "--contrast", "answers", "--pairs", str(tmp_path / "pairs.csv"), "--layers", "2"]
    assert main([*given, "--out", str(tmp_path / "d")]) == 1
    assert "is not UTF-8 text" in capsys.readouterr().err


def test_an_sae_that_explains_nothing_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["direction", "--contrast", "decisions", "--traces", str(folder / "traces.jsonl"), "--layers", "2"]
    assert main([*given, "--method", "sta", "--sae", str(folder / "random"), "--out", str(tmp_path / "d")]) == 1
    error = capsys.readouterr().err
    assert (
        "the SAE of layer 2 explains nothing of these tokens (the mean would do better; variance unexplained " in error
    )
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("d/*.safetensors"))
