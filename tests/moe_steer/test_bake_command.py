"""``moe-steer bake``, ``verify`` and ``unbake``; and source and baked model compared in a forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bake_checkpoints import gains, qwen, snapshot
from launch.cli.bake import Bake, Unbake, Verify
from launch.cli.main import main
from moe_steer import ResidualVector
from moe_steer.baking import BakeMismatch, bake, verify_bake
from moe_steer.baking.forward import PROMPTS, ForwardComparison, applied_plan, compare_forward
from tiny import VOCAB, deepseek_v3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny DeepSeek-V3 with a tokenizer of single bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("forward") / "source"
    deepseek_v3().save_pretrained(folder)
    vocabulary = {chr(33 + i): i for i in range(VOCAB - 6)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="!").save_pretrained(folder)
    return folder


def plan_file(folder: Path, *entries: tuple[int, int, float]) -> str:
    gains(*entries).save(folder / "plan.json")
    return str(folder / "plan.json")


@pytest.mark.slow
def test_bake_verify_unbake(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_file(tmp_path, (1, 3, 64.0), (3, 5, 0.5))
    out = str(tmp_path / "baked")
    assert Bake(model=str(source), plan=plan, out=out).run() == 0
    shown = capsys.readouterr().out
    assert "bit-exact: the baked model computes what the steered one does (deepseek_v3, verified)" in shown
    assert "layer   1 expert   3 gain 64: bit-exact; plain weights" in shown
    options: dict[str, Any] = {"max_new_tokens": 4, "dtype": "float32"}
    assert Verify(baked=out, model=str(source), forward=True, **options).run() == 0
    shown = capsys.readouterr().out
    assert f"{len(PROMPTS)} prompts in torch.float32: largest logit difference 0.00e+00 (relative 0.00e+00)" in shown
    assert "20 of 20 greedy tokens agree" in shown
    assert Unbake(baked=out, out=str(tmp_path / "restored")).run() == 0
    assert "2 tensors have the hashes they had before the bake" in capsys.readouterr().out
    assert snapshot(tmp_path / "restored") == snapshot(source)


@pytest.mark.slow
def test_forward_tells_another_bake_from_this_one(source: Path, tmp_path: Path) -> None:
    certificate = bake(source, gains((1, 3, 64.0)), tmp_path / "baked")
    options: dict[str, Any] = {"dtype": "float32"}
    other = compare_forward(tmp_path / "baked", source, gains((1, 3, 32.0)), PROMPTS[:1], 2, **options)
    with pytest.raises(BakeMismatch, match="baked and hooked logits differ by .* do not serve this checkpoint"):
        other.check(certificate)
    rounded = bake(source, gains((1, 3, 10.0)), tmp_path / "rounded")
    same = compare_forward(tmp_path / "rounded", source, gains((1, 3, 10.0), (2, 15, 1.5)), PROMPTS[:1], 2, **options)
    assert "layer 2 expert 15" in same.silent or same.relative > 0
    near = compare_forward(tmp_path / "rounded", source, gains((1, 3, 10.0)), PROMPTS[:2], 2, **options)
    assert 0 < near.relative < 1e-5
    near.check(rounded)


def test_tokens_count_for_exact_bakes() -> None:
    result = ForwardComparison(
        prompts=1, worst=0.0, relative=0.0, tokens=8, same_tokens=7, dtype="torch.float32", silent=()
    )
    from moe_steer.baking import Certificate

    exact = Certificate(verdict="exact", bound=0.0, model_type="x", family="verified", entries=())
    with pytest.raises(BakeMismatch, match="only 7 of 8 greedy tokens agree"):
        result.check(exact)
    broken = ForwardComparison(
        prompts=1, worst=0.0, relative=float("nan"), tokens=8, same_tokens=8, dtype="torch.float32", silent=()
    )
    with pytest.raises(BakeMismatch, match="differ by nan"):
        broken.check(exact)


def test_the_applied_plan_has_the_baked_gains(tmp_path: Path) -> None:
    from test_bake_formats import CASES, quantised

    parts = next(it.parts for it in CASES.values() if it.powers_only)
    certificate = bake(quantised(tmp_path / "source", parts), gains((1, 2, 10.0)), tmp_path / "baked", round_gains=True)
    assert [entry.gain for entry in applied_plan(gains((1, 2, 10.0), (0, 1, 3.0)), certificate).experts] == [8.0, 3.0]


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source = qwen(tmp_path / "source")
    plan = plan_file(tmp_path, (1, 2, 2.0))
    with pytest.raises(ValueError, match="give --out, the folder to write"):
        Bake(model=str(source), plan=plan).run()
    asked = {"model": str(source), "plan": plan, "out": str(tmp_path / "baked")}
    lost = "an overlay leaves the old tensors .* serves the plain model without a word: leave --overlay out, or say with --loader"
    for loader in (None, "vllm"):
        with pytest.raises(ValueError, match=lost):
            Bake(**asked, overlay=True, loader=loader).run()
    with pytest.raises(ValueError, match="--loader says how an engine reads an overlay: give --overlay too"):
        Bake(**asked, loader="by-index").run()
    assert not (tmp_path / "baked").exists()
    with pytest.raises(ValueError, match="--hash-all is for checkpoint folders"):
        Bake(model="model.gguf", plan=plan, out="x.gguf", hash_all=True).run()
    with pytest.raises(ValueError, match="--forward needs --model"):
        Verify(baked=str(tmp_path / "baked"), forward=True).run()
    with pytest.raises(ValueError, match="--forward is for checkpoint folders"):
        Verify(baked="x.gguf", forward=True).run()
    with pytest.raises(ValueError, match="give --out, the folder to write the original to"):
        Unbake(baked=str(tmp_path / "baked")).run()
    with pytest.raises(ValueError, match="a GGUF file is restored in place: give --baked alone"):
        Unbake(baked="x.gguf", out="y").run()


@pytest.mark.slow
def test_prompts_of_ones_own_and_other_plans(source: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "baked")
    Bake(model=str(source), plan=plan_file(tmp_path, (1, 3, 2.0)), out=out, overlay=True, loader="in-order").run()
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    options: dict[str, Any] = {"max_new_tokens": 2, "dtype": "float32", "experts_implementation": "eager"}
    asked = str(tmp_path / "prompts.txt")
    assert Verify(baked=out, model=str(source), forward=True, prompts=asked, **options).run() == 0
    other = plan_file(tmp_path, (1, 3, 4.0))
    with pytest.raises(ValueError, match="is not the plan that was baked: give --plan with the file that was"):
        Verify(baked=out, model=str(source), forward=True, plan=other, **options).run()


def test_gguf_files_go_their_own_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    from gguf_files import write_gguf

    source, target = str(write_gguf(tmp_path / "m.gguf", "Q8_0")), str(tmp_path / "out.gguf")
    before = (tmp_path / "m.gguf").read_bytes()
    plan = plan_file(tmp_path, (1, 2, 64.0))
    assert Bake(model=source, plan=plan, out=target).run() == 0
    assert "bit-exact: 1 slices changed in" in capsys.readouterr().out
    assert Verify(baked=target, model=source).run() == 0
    assert "bit-exact: 1 changed slices are as they were baked" in capsys.readouterr().out
    assert Unbake(baked=target).run() == 0
    assert Path(target).read_bytes() == before


def test_vectors_may_be_exported_beside_the_bake(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")

    source = qwen(tmp_path / "source")
    save_file({"vector": torch.ones(8)}, tmp_path / "v.safetensors")
    both = gains((1, 2, 2.0), residual=[ResidualVector(1, "v.safetensors", 0.5)])
    both.save(tmp_path / "plan.json")
    out = {"out": str(tmp_path / "baked"), "control_vector": str(tmp_path / "v.gguf")}
    assert Bake(model=str(source), plan=str(tmp_path / "plan.json"), **out).run() == 0
    assert verify_bake(tmp_path / "baked", source).certificate.verdict == "exact"
    (direction,) = gguf.GGUFReader(str(tmp_path / "v.gguf")).tensors
    assert direction.data.tolist() == [0.5] * 8


def test_the_command_line_says_what_failed_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = qwen(tmp_path / "source")
    plan = plan_file(tmp_path, (1, 9, 2.0))
    assert main(["bake", "--model", str(source), "--plan", plan, "--out", str(tmp_path / "baked")]) == 1
    error = capsys.readouterr().err
    assert error == "moe-steer: expert 9 at layer 1 does not exist: this model has experts 0-3, name one of them\n"
    plan = plan_file(tmp_path, (1, 2, 2.0))
    assert (
        main(
            [
                "bake",
                "--model",
                str(source),
                "--plan",
                plan,
                "--out",
                str(tmp_path / "baked"),
                "--overlay",
                "--loader",
                "in-order",
            ]
        )
        == 0
    )
    assert main(["verify", "--baked", str(tmp_path / "baked"), "--model", str(source)]) == 0
    assert main(["unbake", "--baked", str(tmp_path / "baked"), "--out", str(tmp_path / "restored")]) == 0
    assert snapshot(tmp_path / "restored") == snapshot(source)


def test_baking_needs_no_model_library(tmp_path: Path) -> None:
    """Neither torch nor transformers is imported to bake and verify gains."""
    import subprocess
    import sys

    source = qwen(tmp_path / "source", 1, torch.bfloat16)
    script = (
        "import sys\n"
        "from moe_steer.baking import bake, verify_bake\n"
        "from moe_steer.plan import ExpertGain, SteeringPlan\n"
        f"bake({str(source)!r}, SteeringPlan(experts=[ExpertGain(1, 2, 3.0)]), {str(tmp_path / 'baked')!r})\n"
        f"verify_bake({str(tmp_path / 'baked')!r}, {str(source)!r})\n"
        "print([name for name in ('torch', 'transformers', 'safetensors', 'deepspeed') if name in sys.modules])\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
    assert done.stdout == "[]\n", done.stderr


def test_what_a_gguf_bake_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    from gguf_files import WIDTH, write_gguf

    parts = write_gguf(tmp_path / "m.gguf", "MXFP4", split=4)
    assert parts.name.startswith("m-00001-of-")
    save_file({"vector": torch.ones(WIDTH)}, tmp_path / "v.safetensors")
    plan = gains((1, 2, 3.0), (2, 0, 4.0), residual=[ResidualVector(1, "v.safetensors", 0.5)])
    plan.save(tmp_path / "plan.json")
    words = ["bake", "--model", str(parts), "--plan", str(tmp_path / "plan.json"), "--round"]
    target, vector = tmp_path / "out.gguf", tmp_path / "cv.gguf"
    assert main([*words, "--out", str(target), "--control-vector", str(vector)]) == 0
    out = capsys.readouterr().out
    first = tmp_path / parts.name.replace("m-", "out-")
    assert first.exists()
    assert f"2 slices changed in {first} (the first of" in out
    assert "layer 1 expert 2: 3 asked, 4 baked" in out or "layer 1 expert 2: 3 asked, 2 baked" in out
    assert "bound: 0.333 (relative error of a block scale)" in out
    assert "undo: " in out
    assert f"control vector: {vector}, layers 1" in out
    assert f"llama-server --model {first} --control-vector {vector}" in out
    assert f"next: moe-steer verify --baked {first} --model {parts}" in out
    assert main(["verify", "--baked", str(first), "--model", str(parts)]) == 0


def test_a_gguf_bake_speaks_of_options_when_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    from gguf_files import WIDTH, write_gguf

    source = str(write_gguf(tmp_path / "m.gguf", "F16"))
    save_file({"vector": torch.ones(WIDTH)}, tmp_path / "v.safetensors")
    gains(residual=[ResidualVector(1, "v.safetensors", 0.5)]).save(tmp_path / "v.json")
    gains((1, 2, 3.0)).save(tmp_path / "g.json")
    vector, words = tmp_path / "cv.gguf", ["bake", "--model", source, "--plan"]
    assert main([*words, str(tmp_path / "v.json"), "--out", str(tmp_path / "o.gguf")]) == 1
    assert "give --control-vector FILE" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "g.json")]) == 1
    assert "give --out, the folder to write (for a GGUF model: the file)" in capsys.readouterr().err
    with pytest.raises(SystemExit) as refused:
        main([*words, str(tmp_path / "g.json"), "--out", "o.gguf", "--in-place"])
    assert refused.value.code == 2, "no option of that name: a file is not changed in place"
    assert "--in-place" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "v.json"), "--control-vector", str(vector)]) == 0, "vectors alone need no model"
    assert f"wrote {vector}: 1 residual vectors" in capsys.readouterr().out
    assert main([*words, str(tmp_path / "g.json"), "--out", str(tmp_path / "o.gguf")]) == 0
    out = capsys.readouterr().out
    assert "undo: keep the source file: rounding cannot be undone" in out
    assert out.endswith(f"next: moe-steer verify --baked {tmp_path / 'o.gguf'} --model {source}\n")


def test_an_embedded_model_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.cli.bake import model_folder
    from moe_steer.lab import EMBEDDED

    monkeypatch.chdir(tmp_path)
    assert {name: model_folder(name) for name in EMBEDDED} == {
        name: str(model.folder) for name, model in EMBEDDED.items()
    }
    (tmp_path / "lab-dense").mkdir()
    assert model_folder("lab-dense") == "lab-dense", "a folder of that name comes first"
