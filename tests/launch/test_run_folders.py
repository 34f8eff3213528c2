"""Run folders that are not what they were, or not what a command takes them for: one line that names the file, exit code 1, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.cli.main import main

SMALL = ["--model", "lab", "--num", "3", "--samples", "2", "--batch-size", "6", "--max-new-tokens"]
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of ``moe-steer generate --plan``."""
    home = tmp_path_factory.mktemp("runs")
    plan = home / "mine.json"
    plan.write_text(json.dumps({"version": 1, "experts": [{"layer": 2, "expert": 5, "gain": 3.0}]}))
    assert main(["generate", *SMALL, "48", "--plan", str(plan), "--out", str(home / "run")]) == 0
    return home / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def commands(folder: Path, out: Path) -> dict[str, list[str]]:
    return {
        "compare": ["compare", "--baseline", str(folder), "--baseline-arm", "steered", "--out", str(out / "c.json")],
        "thinking": ["thinking", str(folder), "--out", str(out / "t.json")],
        "report": ["report", str(folder)],
        "export": ["export", str(folder), "--out", str(out / "x.parquet")],
        "collect": ["collect", "--traces", str(folder), "--out", str(out / "k.safetensors")],
        "inspect": ["inspect", str(folder)],
    }


def edit_run(folder: Path, change: Change) -> None:
    path = folder / "run.json"
    run = json.loads(path.read_text())
    change(run)
    path.write_text(json.dumps(run))


def edit_sample(folder: Path, change: Change, *, added: bool = False) -> None:
    path = folder / "generations.jsonl"
    lines = path.read_text().splitlines()
    row = json.loads(lines[0])
    digest = row.pop("digest")  # without it a line is read as older versions wrote it
    change(row)
    if row.pop("keeps_digest", False):
        row["digest"] = digest
    path.write_text("\n".join([*(lines if added else lines[1:]), json.dumps(row)]) + "\n")


def of_run(change: Change) -> Callable[[Path], None]:
    return lambda folder: edit_run(folder, change)


def of_sample(change: Change, *, added: bool = False) -> Callable[[Path], None]:
    return lambda folder: edit_sample(folder, change, added=added)


@pytest.mark.parametrize(
    ("spoil", "said", "asked"),
    [
        (of_run(lambda run: run["config"].update(seed=5)), "run.json, arm 'steered': its settings are not those that its", "all"),
        (of_run(lambda run: run["config"].update(arm_order=[])), "run.json orders the arms [] and describes ['steered']", "all"),
        (of_run(lambda run: run["config"].pop("problems")), "run.json does not say 'problems' in its config", "all"),
        (of_run(lambda run: run["config"]["sampling"].pop("top_p")), "run.json does not say the top_p of its sampling", "all"),
        (of_sample(lambda row: row.update(config_hash="0" * 16)), "generations.jsonl holds a sample that is not of this run", "all"),
        (of_sample(lambda row: row.update(arm="other")), "holds a sample of arm 'other', which is not of this run", "all"),
        (of_sample(lambda row: row.update(text="4", keeps_digest=True)), "generations.jsonl:6: not a completion (it was changed since", "all"),
        (of_sample(lambda row: row.update(token_ids=[5, -1])), "generations.jsonl:6: not a completion (token_ids hold -1", "all"),
        (of_sample(lambda row: row.update(sample_idx=7), added=True), "arm 'steered', where samples count from 0 to 1): take it out", "all"),
        (of_run(lambda run: run.update(history="x")), "run.json: 'history' is 'x': give a list, each item an object", "all"),
        (of_run(lambda run: run.update(job="steer_r1")), "run.json: the run has the setting 'arm_order'", "report"),
    ],
)  # fmt: skip
def test_a_spoilt_folder_is_refused_by_every_command_that_reads_it(
    spoil: Callable[[Path], None], said: str, asked: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "r", tmp_path / "out"
    shutil.copytree(run, folder)
    spoil(folder)
    before = contents(folder)
    which = {"all": None, "report": ("report",)}[asked]
    for name, words in commands(folder, out).items():
        if which is None or name in which:
            capsys.readouterr()
            assert main(words) == 1, name
            error = capsys.readouterr().err
            assert said in error, name
            assert error.count("\n") == 1, name
    assert contents(folder) == before
    assert not out.exists()


def test_an_unfinished_run_is_counted_with_a_word(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "r")
    path = tmp_path / "r" / "generations.jsonl"
    path.write_bytes(path.read_bytes()[:-40])  # as a killed process leaves it
    assert main(["collect", "--traces", str(tmp_path / "r"), "--out", str(tmp_path / "k.safetensors")]) == 0
    said = capsys.readouterr()
    assert f"NOTE: {tmp_path / 'r'} is not finished, 5 of its 6 answers are read\n" in said.err
    assert "5 traces," in said.out


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        ({"model": "lab", "tasks": ["harm"], "arms": ["baseline", "steered"]}, ("harm",)),  # launch/safety.py
        ({"model": "lab", "collect_stats": {}}, ()),  # launch/collect_stats.py, and launch/steer_r1.py before its test
    ],
)
def test_the_folder_of_a_job_is_no_run(
    config: dict[str, Any], steps: tuple[str, ...], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "job"
    (folder / "classified").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"version": 1, "config": config}))
    shutil.copy(folder / "run.json", folder / "classified")  # another job's, with no samples
    for step in steps:
        shutil.copytree(run, folder / step)
    remedy = "".join(f": give one of its steps, {folder / step}" for step in steps)
    for words in (
        ["compare", "--baseline", str(folder)],
        ["report", str(folder)],
        ["export", str(folder), "--out", "x"],
        ["inspect", str(folder)],
    ):
        assert main(words) == 1
        assert capsys.readouterr().err == (
            f"moe-steer: {folder} is the folder of a job and holds no samples itself{remedy}\n"
        )


def test_problems_that_are_gone_come_back_with_the_same_command(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "r"
    shutil.copytree(run, folder)
    kept = (folder / "problems.jsonl").read_bytes()
    (folder / "problems.jsonl").unlink()
    assert main(["report", str(folder)]) == 1
    assert capsys.readouterr().err == (
        f"moe-steer: {folder} has lost its problems.jsonl: run it again with the same options, which writes it\n"
    )
    assert main(["generate", *SMALL, "48", "--plan", str(run.parent / "mine.json"), "--out", str(folder)]) == 0
    assert (folder / "problems.jsonl").read_bytes() == kept


def test_a_plan_that_lies_in_the_folder_is_not_replaced(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    shutil.copy(run / "plan.json", plan)
    words = ["generate", *SMALL, "4", "--plan", str(plan), "--out", str(out)]
    out.mkdir()
    foreign = json.dumps({"version": 1, "experts": [{"layer": 1, "expert": 3, "gain": 9.0}]})
    (out / "plan.json").write_text(foreign)
    assert main(words) == 1
    assert capsys.readouterr().err == (
        f"moe-steer: {out / 'plan.json'} is another plan than {plan}, and is not replaced: give another --out\n"
    )
    assert contents(out) == {"plan.json": foreign.encode()}, "before anything is sampled"
    own = json.dumps({**json.loads(plan.read_text()), "provenance": {"by": "me"}})
    (out / "plan.json").write_text(own)
    assert main(words) == 0
    assert (out / "plan.json").read_text() == own, "the same plan is left as it is"
    other = tmp_path / "other"
    assert main(["generate", *SMALL, "4", "--out", str(other)]) == 0
    before = contents(other)
    assert main([*words[:-1], str(other)]) == 1
    assert contents(other) == before, "a plan is not put beside a run of other settings"


def test_the_plan_is_kept_before_anything_is_sampled(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        assert (tmp_path / "out" / "plan.json").is_file()
        raise ValueError("stopped")

    monkeypatch.setattr("reasoning_evals.run_arms", stop)
    words = ["generate", *SMALL, "4", "--plan", str(run / "plan.json"), "--out", str(tmp_path / "out")]
    assert main(words) == 1
    assert (tmp_path / "out" / "plan.json").is_file()


def test_a_file_is_no_folder_for_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("mine")
    assert main(["generate", *SMALL, "4", "--out", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == f"moe-steer: {tmp_path / 'run'} is a file: name a folder for the run\n"
    assert (tmp_path / "run").read_text() == "mine"


def test_runs_that_were_sampled_in_two_ways_are_compared_with_a_word(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hot = str(tmp_path / "hot")
    assert main(["generate", *SMALL, "40", "--temperature", "1", "--arm-name", "hot", "--out", hot]) == 0
    note = (
        f"NOTE: {hot} was sampled with temperature 1.0, max_new_tokens 40, and {run} with temperature 0.6, max_new_tokens 48: "
        "a difference may come from that\n"
    )
    for words in (["compare", "--baseline", str(run), "--baseline-arm", "steered"], ["thinking", str(run)]):
        capsys.readouterr()
        assert main([*words, "--arm-folder", hot]) == 0
        assert note in capsys.readouterr().out


def test_inspect_reads_a_run_under_a_plan(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "r"
    shutil.copytree(run, folder)
    assert main(["inspect", str(folder), "--num", "1"]) == 0
    told = capsys.readouterr().out
    assert "layer 2 expert 5" in told
    assert "steered" in told
    for name in ("plan.json", "trace_views.json"):
        (folder / name).unlink()
    assert main(["inspect", str(folder)]) == 1
    assert capsys.readouterr().err == (
        f"moe-steer: {folder} does not hold the plans of its arms (steered): put each beside run.json, as plan.json or into a "
        "folder plans\n"
    )
