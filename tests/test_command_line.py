"""The single steps from the command line, one after another, on the embedded model; and what wrong input says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli.main import COMMANDS, JOBS, main
from moe_steer import SteeringPlan

SHORT = ["--num", "24", "--max-new-tokens", "120"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generations of 24 problems, the counts, the scores, and a plan."""
    folder = tmp_path_factory.mktemp("steps")
    assert main(["generate", *SHORT, "--out", str(folder / "plain")]) == 0
    assert main(["collect", "--traces", str(folder / "plain"), "--out", str(folder / "counts.safetensors")]) == 0
    scored = ["score", "--counts", str(folder / "counts.safetensors"), "--out", str(folder / "scores.json")]
    assert main([*scored, "--missing-marker", "skip", "--heatmap", str(folder / "map.svg")]) == 0
    planned = ["plan", "--scores", str(folder / "scores.json"), "--gain", "8", "--out", str(folder / "plan.json")]
    assert main(planned) == 1, "24 short answers prove no expert"
    assert main([*planned, "--unproven"]) == 0
    return folder


def test_the_steps_lead_to_a_plan(runs: Path) -> None:
    plan = SteeringPlan.load(runs / "plan.json")
    assert [entry.gain for entry in plan.experts] == [8.0, 8.0]
    assert (runs / "map.svg").read_text().startswith("<svg")


def test_two_arms_are_compared(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steered = ["generate", *SHORT, "--plan", str(runs / "plan.json"), "--out", str(runs / "steered")]
    assert main(steered) == 0
    shown = capsys.readouterr().out
    assert "selected by" in shown
    assert main(steered) == 0
    assert "0 of them new" in capsys.readouterr().out, "a finished run is not sampled again"
    compared = ["compare", "--baseline", str(runs / "plain"), "--arm-folder", str(runs / "steered")]
    assert main([*compared, "--out", str(runs / "comparison.json")]) == 0
    assert "steered against baseline:" in capsys.readouterr().out
    assert json.loads((runs / "comparison.json").read_text())["num_problems"] == 24
    assert main(["report", str(runs / "steered")]) == 0
    assert (runs / "steered" / "report.html").is_file()


def test_a_plan_beside_a_rule_that_counts_says_what_the_plan_did(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rule's own row of the audit was taken for one of the plan's."""
    words = ["--plan", str(runs / "plan.json"), "--rule", "deer", "--num", "2", "--max-new-tokens", "30"]
    assert main(["generate", *words, "--out", str(tmp_path / "deer")]) == 0
    assert capsys.readouterr().out.count("selected by") == 2


def test_counts_of_two_shards_add_up(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["generate", "--num", "6", "--max-new-tokens", "60", "--seed", "5", "--out", str(tmp_path / "more")]
    assert main(more) == 0
    collect = ["collect", "--add-to", str(runs / "counts.safetensors"), "--out", str(tmp_path / "both.safetensors")]
    assert main([*collect, "--traces", str(tmp_path / "more")]) == 0
    assert "30 traces" in capsys.readouterr().out
    assert main([*collect, "--traces", str(runs / "plain")]) == 1, "the same traces would be counted twice"
    assert "twice" in capsys.readouterr().err


def test_overview_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    said = [line for line in shown.splitlines() if line.startswith("  ")]
    assert sorted(line.split()[0] for line in said) == sorted([*COMMANDS, *JOBS]), "each in one group"
    assert all(line[-1] in ".?" for line in said), "whole sentences, however long"
    assert main([]) == 2
    assert main(["steer"]) == 2
    assert (
        "there is no command 'steer': choose one of demo, doctor, playground, collect, collect-stats, score"
        in capsys.readouterr().err
    )
    assert main(["genrate"]) == 2
    assert "there is no command 'genrate': did you mean generate?" in capsys.readouterr().err
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([name, "--help"])
        assert stopped.value.code == 0
        capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--out", "p.json"], "give exactly one of --scores, --preset and --experts"),
        (["plan", "--out", "p.json", "--preset", "rice-r2"], "preset 'rice-r2' is unknown"),
        (["plan", "--out", "p.json", "--experts", "39-182"], "'39-182' names no expert: write LAYER:EXPERT"),
        (["plan", "--out", "p.json", "--experts", "39:182=nan"], "gain of layer 39 expert 182 is nan"),
        (["plan", "--out", "p.json", "--scores", "none.json"], "none.json"),
        (["score", "--out", "s.json", "--counts", "none.safetensors"], "none.safetensors"),
        (["collect", "--out", "c.safetensors", "--traces", "none.jsonl"], "no traces at 'none.jsonl'"),
        (["collect", "--out", "c.safetensors", "--traces", "x", "--markers", "<ponder>"], "<ponder>"),
        (["generate", "--out", "g", "--plan", "unknown_key.json"], "unknown key 'beta' in plan"),
        (["generate", "--out", "g", "--plan", "out_of_range.json"], "expert 99 at layer 1 does not exist"),
        (["generate", "--out", "g", "--model", "empty_folder"], "holds no config.json"),
        (["generate", "--out", "g", "--model", "broken_model"], "model.safetensors in 'broken_model' is damaged"),
        (["generate", "--out", "g", "--greedy", "--samples", "2"], "the same answer every time: leave --samples 2 out"),
        (["generate", "--out", "g", "--greedy", "--temperature", "0.3"], "--temperature 0.3 would change nothing"),
        (["generate", "--out", "g", "--problems", "torn.jsonl"], "torn.jsonl:2 is not JSON"),
        (["collect", "--out", "c.safetensors", "--traces", "torn_traces.jsonl"], "torn_traces.jsonl"),
        (
            ["generate", "--out", "g", "--problems", "latin.jsonl"],
            "latin.jsonl:1 is not UTF-8 text (invalid continuation",
        ),
        (
            ["generate", "--out", "g", "--temperature", "-1", "--model", "empty_folder"],
            "temperature must be a positive",
        ),
        (["generate", "--out", "g", "--top-p", "0", "--model", "empty_folder"], "top_p must be in (0, 1]"),
        (["generate", "--out", "torn.jsonl", "--num", "2"], "torn.jsonl is a file: name a folder for the run"),
        (["compare", "--baseline", "empty_folder"], "is not a run folder"),
        (["report", "empty_folder"], "is not a run folder"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from moe_steer.lab import LAB_MODEL

    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "unknown_key.json").write_text('{"version": 1, "beta": 3}')
    (tmp_path / "out_of_range.json").write_text('{"version": 1, "experts": [{"layer": 1, "expert": 99, "gain": 2}]}')
    problem = '{"problem_id": "a", "prompt": "1 + 1?", "target": "2", "answer_type": "integer"}\n'
    (tmp_path / "torn.jsonl").write_text(problem + problem[:40])
    (tmp_path / "latin.jsonl").write_bytes(problem.replace("1 + 1", "é é").encode("latin-1"))
    (tmp_path / "torn_traces.jsonl").write_text('{"trace_id": "a", "token_ids": [1, 2')
    broken = tmp_path / "broken_model"
    broken.mkdir()
    for file in LAB_MODEL.iterdir():
        data = file.read_bytes()
        (broken / file.name).write_bytes(data[:1000] if file.suffix == ".safetensors" else data)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_dense_model_is_refused_for_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moe_steer.lab import LAB_MODEL
    from tiny import qwen2

    folder = tmp_path / "dense"
    qwen2().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((LAB_MODEL / name).read_bytes())
    plan = tmp_path / "plan.json"
    SteeringPlan.from_dict({"version": 1, "experts": [{"layer": 1, "expert": 2, "gain": 4}]}).save(plan)
    assert main(["generate", "--model", str(folder), "--plan", str(plan), "--out", str(tmp_path / "g")]) == 1
    assert "qwen2 is a dense model" in capsys.readouterr().err


POWER = ["power", "--noise", "0.1", "--problems", "30"]


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("arguments", [["direction", "--help"], ["--help"], POWER])
def test_a_reader_that_has_read_enough_ends_no_work(arguments: list[str], buffered: bool, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "p.json")] if arguments is POWER else []
    script = "import os, sys; os.close(1); os.dup2(int(sys.argv[1]), 1); from launch.cli.main import main; sys.exit(main(sys.argv[2:]))"
    reader, writer = os.pipe()
    os.close(reader)  # nobody reads
    done = subprocess.run(
        [sys.executable, *([] if buffered else ["-u"]), "-c", script, str(writer), *arguments, *out],
        pass_fds=[writer], stderr=subprocess.PIPE, text=True, check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert not out or Path(out[1]).is_file()


@pytest.mark.parametrize("arguments", [["--help"], ["power", "--help"], POWER])
@pytest.mark.parametrize(
    ("redirection", "code", "said"), [(">&-", 0, ""), (">&- 2>&-", 0, ""), (">/dev/full", 1, "No space left on device: free some")]
)  # fmt: skip
def test_a_stdout_that_is_closed_or_full(arguments: list[str], redirection: str, code: int, said: str) -> None:
    command = ["bash", "-c", f'"$@" {redirection}', "-", sys.executable, "-m", "launch.cli.main", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    assert done.returncode == code
    assert done.stderr.count("\n") == (1 if said else 0)
    assert said in done.stderr


@pytest.mark.parametrize("words", [["--plan", ""], ["--plan="], ["--out", "", "--num", "2"], ["--arm-name", ""]])
def test_an_option_with_nothing_behind_it_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["generate", *words, *([] if words[0] == "--out" else ["--out", "run"])])
    assert caught.value.code == 2
    option = words[0].removesuffix("=")
    assert capsys.readouterr().err == (
        f"moe-steer generate: {option} has nothing behind it, as a variable that is not set leaves it: name something\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_options_that_may_be_empty(tmp_path: Path) -> None:
    given = ["--system", "", "--offload", "", "--num", "1", "--max-new-tokens", "2", "--out", str(tmp_path / "run")]
    assert main(["generate", *given]) == 0
    assert main(["generate", *given[4:], "--template-arg=mood="]) == 1, "an argument with an empty value is one"


@pytest.mark.parametrize("command", [POWER, ["thinking", "none"], ["score", "--counts", "none"], ["export", "none"]])
def test_a_place_where_no_file_can_be(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("mine")
    for out, said in [
        ("folder", "--out folder is a folder: name a file"),
        ("file/new/p.json", "--out file/new/p.json lies in file, which is a file: name a place in a folder"),
    ]:
        assert main([*command, "--out", out]) == 1
        assert capsys.readouterr() == ("", f"moe-steer: {said}\n")
    assert main(["export", "none", "--format", "lm-eval", "--out", "file"]) == 1
    assert capsys.readouterr().err == "moe-steer: --out file is a file: name a folder\n"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["plan", "--experts", "1:12=8", "--experts", "3:2=8", "--out", "p.json"], "--experts"),
        (["score", "--counts", "a", "--counts=b", "--out", "s.json"], "--counts"),
        (["sae-fit", "--sae", "a", "--add", "b", "--traces", "a", "--traces=b"], "--traces"),
    ],
)
def test_an_option_given_twice_is_refused(
    arguments: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said == f"moe-steer {arguments[0]}: {option} is given twice: give it once, with all its values behind it\n"


def test_a_list_with_nothing_in_it_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """An empty name of a file is the folder in which one stands: whatever traces lie there would be counted."""
    with pytest.raises(SystemExit) as caught:
        main(["collect", "--traces", "", "--out", "c"])
    assert caught.value.code == 2
    assert "--traces has nothing behind it" in capsys.readouterr().err


def test_the_same_counts_twice_are_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = str(runs / "counts.safetensors")
    assert main(["score", "--counts", counts, counts, "--out", str(tmp_path / "s.json")]) == 1
    assert "the same counts are named twice; give each file once" in capsys.readouterr().err
    assert not (tmp_path / "s.json").exists()


def test_the_folder_of_a_job_is_named_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"version": 1, "config": {}}))
    assert main(["generate", "--num", "1", "--max-new-tokens", "2", "--out", str(tmp_path / "test")]) == 0
    for command in (
        ["compare", "--baseline", str(tmp_path)],
        ["power", "--baseline", str(tmp_path)],
        ["export", str(tmp_path), "--format", "parquet", "--out", str(tmp_path / "x.parquet")],
    ):
        assert main(command) == 1
        assert f"holds no samples itself: give one of its steps, {tmp_path}/test\n" in capsys.readouterr().err
