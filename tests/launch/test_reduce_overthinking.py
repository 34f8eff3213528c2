"""The overthinking job as its users start it, on the embedded models; small, but every step is real."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from launch.cli.main import main as moe_steer
from launch.jobs.overthinking_options import METHODS
from launch.reduce_overthinking import main
from moe_steer.directions import Direction
from moe_steer.lab import LAB_SAE
from moe_steer.saes import load_sae, save_sae
from rank_processes import ROOT, RunningRanks, run_ranks
from reasoning_evals.runs.run_folder import read_generations

pytestmark = pytest.mark.slow

SCRIPT = "launch/reduce_overthinking.py"
SMALL = [
    "--num-identification",
    "24",
    "--num-tuning",
    "4",
    "--num-test",
    "6",
    "--samples",
    "1",
    "--samples-tuning",
    "1",
]
SIZES = [*SMALL, "--batch-size", "96"]
SMALL = [
    *SIZES,
    "--strengths",
    "0.1",
    "--decision-strengths",
    "0.2",
    "--budgets",
    "0.5",
]
PAGES = ("results.json", "report.md", "report.html")
DENSE = [*SMALL, "--samples-identification", "4", "--max-new-tokens", "128"]
MOE = [*SMALL, "--model", "lab", "--layers", "2", "--methods", "caa", "decision", "budget", "--max-new-tokens", "80"]
SAE_ALONE = [*SIZES, "--samples-identification", "4", "--max-new-tokens", "128", "--methods", "sta"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished job on the dense model, with all methods."""
    folder = tmp_path_factory.mktemp("job") / "dense"
    assert main([*DENSE, "--layers", "3", "--out", str(folder)]) == 0
    return folder


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def tried_settings(folder: Path) -> set[str]:
    """Labels of all that was tried on the tuning problems."""
    return {arm["name"] for arm in results_of(folder)["tuning"]["arms"]} - {"baseline"}


def test_every_method_is_compared_with_the_baseline(finished: Path) -> None:
    results = results_of(finished)
    assert [arm["name"] for arm in results["comparison"]["arms"]] == ["baseline", *METHODS]
    assert set(results["verdicts"]) == set(METHODS)
    assert results["left_out"] == []
    assert set(results["thoughts"]) == {"baseline", *METHODS}
    assert results["chosen"]["decision"]["scope"] == "step_end:stop+line"
    assert results["chosen"]["caa"]["scope"] == "thought"


def test_directions_are_files_with_their_history(finished: Path) -> None:
    for method in ("caa", "sta", "sae", "atom", "decision"):
        (file,) = (finished / "directions").glob(f"{method}-L*.safetensors")
        direction = Direction.load(file)
        assert direction.header["residual_norm"] > 0
        assert ("sae" in direction.header) == (method in ("sta", "sae", "atom"))
        notes = direction.header["notes"]
        assert notes["contrast"] == ("decisions" if method == "decision" else "thoughts")
        assert len(notes["template_sha256"]) == len(notes["tokenizer_sha256"]) == 64
        assert ("sae_fit_4" in notes) == (method != "decision")
    assert len(Direction.load(next((finished / "directions").glob("atom-*.safetensors"))).header["atoms"]) == 1
    report = (finished / "directions" / "atoms.md").read_text()
    assert [line for line in report.splitlines() if line.startswith("# ")] == [
        f"# {method}, layer 4" for method in ("sta", "all_atoms", "single_atom")
    ]


def test_the_fit_of_the_sae_is_said_before_it_is_used(finished: Path) -> None:
    fit = results_of(finished)["sae_fit"]
    assert 0 < fit["fraction_variance_unexplained"] < 0.5
    line = f"the SAE of layer 4 on this model: variance unexplained {fit['fraction_variance_unexplained']:.3f}, "
    assert line in (finished / "report.md").read_text()
    assert line in (finished / "report.html").read_text()


def test_an_sae_that_explains_nothing_is_refused_and_a_poor_one_warned_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sae = load_sae(LAB_SAE)
    save_sae(dataclasses.replace(sae, W_dec_FD=-sae.W_dec_FD), tmp_path / "wrong")
    options = [*SAE_ALONE, "--sae", str(tmp_path / "wrong"), "--out", str(tmp_path / "run")]
    assert main(options) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the SAE of layer 4 explains nothing of these tokens" in error
    assert not list(tmp_path.glob("run/directions/*.safetensors"))
    answers = {path: path.read_bytes() for path in (tmp_path / "run").rglob("generations*.jsonl")}
    assert answers
    save_sae(dataclasses.replace(sae, W_dec_FD=0.2 * sae.W_dec_FD), tmp_path / "poor")
    options = [*SAE_ALONE, "--sae", str(tmp_path / "poor"), "--strengths", "0.1"]
    for _ in range(2):  # on a later start too
        assert main([*options, "--out", str(tmp_path / "run")]) == 0
        before, _, after = capsys.readouterr().out.partition("3/4")
        assert "the SAE of layer 4 on this model: variance unexplained 0." in before
        assert "WARNING: the SAE leaves 0." in before
        assert "WARNING: the SAE leaves 0." in after
    assert len(results_of(tmp_path / "run")["warnings"]) == 1
    assert {path: path.read_bytes() for path in answers} == answers, "the folder is free for another SAE, answers kept"


def test_the_pages_say_what_was_found(finished: Path) -> None:
    results, page = results_of(finished), (finished / "report.html").read_text()
    markdown = (finished / "report.md").read_text()
    for sentence in results["sentences"]:
        assert sentence in markdown
        assert sentence in page
    for title in ("Length and cost", "What was chosen", "Accuracy against thinking, test problems"):
        assert title in page
    methods = {setting.partition(" ")[0].partition(":")[0] for setting in tried_settings(finished)}
    assert (
        f"{len(methods)} arms were tuned, each among settings of its own ({len(tried_settings(finished))} in all)"
        in page
    )
    assert "The plan was chosen" not in page
    table = markdown.split("## Length and cost")[1].split("##")[0]
    assert not re.search(r"-\d", table), "tables have a real minus sign"
    assert "<script" not in page
    assert not [path for path in finished.rglob("*") if path.name.endswith((".partial", ".tmp"))]


def test_started_again_it_samples_nothing_and_says_the_same(finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("generations*.jsonl")}
    results = (finished / "results.json").read_bytes()
    assert main([*DENSE, "--layers", "3", "--out", str(finished)]) == 0
    assert {path: path.read_bytes() for path in finished.rglob("generations*.jsonl")} == before
    assert (finished / "results.json").read_bytes() == results


def test_the_report_command_builds_the_same_pages(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: (finished / name).read_bytes() for name in PAGES}
    for name in PAGES[1:]:
        (finished / name).unlink()
    assert moe_steer(["report", str(finished)]) == 0
    assert f"report: {finished / 'report.html'}" in capsys.readouterr().out
    assert {name: (finished / name).read_bytes() for name in PAGES} == before


def test_the_report_command_refuses_an_unfinished_job(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(finished / "run.json", tmp_path)
    assert moe_steer(["report", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "holds an unfinished job: start launch/reduce_overthinking.py again, it continues where it was" in error
    assert error.count("\n") == 1


def test_a_folder_of_other_options_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*DENSE, "--layers", "2", "--out", str(finished)]) == 1
    assert "layers" in capsys.readouterr().err


def tokens_of(folder: Path) -> dict[Any, Any]:
    """Sample -> token ids, in all steps; no sample may stand twice."""
    found = [
        (step, completion.key[:4], completion.token_ids)
        for step in ("identification", "tuning", "test")
        for completion in read_generations(folder / step)
    ]
    assert len({item[:2] for item in found}) == len(found)
    return {item[:2]: item[2] for item in found}


@pytest.fixture(scope="module")
def on_one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished greedy job on the mixture-of-experts model."""
    folder = tmp_path_factory.mktemp("job") / "moe"
    assert main([*MOE, "--greedy", "--out", str(folder)]) == 0
    return folder


def test_two_ranks_give_the_same_directions_and_greedy_tokens(on_one_rank: Path, tmp_path: Path) -> None:
    done = run_ranks(ROOT / SCRIPT, 2, [*MOE, "--greedy", "--out", str(tmp_path / "two")], 240)
    assert done.codes == [0, 0], done.text[-3000:]
    assert done.text.count("report:") == 1, "only rank 0 talks"
    for name in ("caa-L2.safetensors", "decision-L2.safetensors"):
        one, two = ((run / "directions" / name).read_bytes() for run in (on_one_rank, tmp_path / "two"))
        assert one == two, name
    assert tokens_of(tmp_path / "two") == tokens_of(on_one_rank)


def test_killed_on_two_ranks_it_continues_on_one(on_one_rank: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    running = RunningRanks(ROOT / SCRIPT, 2, [*MOE, "--greedy", "--out", str(folder)])
    deadline = time.monotonic() + 120
    while not list(folder.glob("tuning/generations*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.kill()
    assert not (folder / "results.json").exists()
    kept = {path: path.read_bytes() for path in (folder / "identification").glob("generations*.jsonl")}
    assert kept
    assert main([*MOE, "--greedy", "--out", str(folder)]) == 0
    assert {path: path.read_bytes() for path in kept} == kept, "nothing was sampled again"
    assert tokens_of(folder) == tokens_of(on_one_rank)
    assert (folder / "results.json").read_bytes() == (on_one_rank / "results.json").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "9"], "layer 9 does not exist: this model has layers 0-3"),
        pytest.param(
            [
                "--switch-words",
                "Zebra",
                "--methods",
                "decision",
                "--samples-identification",
                "2",
                "--max-new-tokens",
                "80",
            ],
            "no thought stops and goes on at Zebra: name its words",
            marks=pytest.mark.slow,
        ),
        (["--sae", "nowhere", "--methods", "sta"], "nowhere"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SIZES, "--model", "lab", *options, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "nowait", "--strengths", "0.1"], "--strengths is for caa, sta, sae, atom: add one to --methods"),
        (["--methods", "caa", "--keep", "0.1"], "--keep is for sta: add one to --methods, or leave it out"),
        (["--keep", "0.1"], "--keep is for sta: add one to --methods, or leave it out"),
        (["--methods", "concise-prompt", "--layers", "2"], "--layers is for caa, decision: add one"),
        (["--methods", "nowait", "--switch-words", "Hm"], "--switch-words is for decision: add one to --methods"),
        (["--methods", "nowait", "--samples-identification", "7"], "--samples-identification is for caa, "),
        (["--methods", "nowait", "--margin", "5"], "--margin is for caa, "),
        (["--greedy", "--samples-tuning", "7"], "the same answer every time: leave --samples-tuning 7 out"),
        (["--data-dir", "here"], "--data-dir here is for a task, and the lab makes its problems up: leave it out"),
    ],
)
def test_options_that_nothing_would_follow_are_wrong_usage(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--model", "lab", *options, "--out", str(tmp_path / "run")])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("reduce_overthinking.py: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_needs_no_answers_samples_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--num-test", "4", "--samples", "1", "--batch-size", "32", "--methods", "nowait", "concise-prompt"]
    options += ["--max-new-tokens", "48"]
    folder = tmp_path / "run"
    assert main([*options, "--out", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "1/4  no unsteered answers are needed: nothing is learned or tuned" in shown
    assert "2/4" not in shown
    assert "3/4" not in shown
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["test"]
    results = (folder / "results.json").read_bytes()
    assert moe_steer(["report", str(folder)]) == 0
    assert (folder / "results.json").read_bytes() == results


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--methods", "magic"])
    assert caught.value.code == 2
    assert "methods hold 'magic'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["--task", "gsm8k", "--problems", "lab"])
    assert caught.value.code == 2
    assert "--task and --problems are two names of one option: give one" in capsys.readouterr().err
