"""The evaluation of several arms as its users start it, on the embedded model; few problems, short answers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.cli.main import main as command_line
from launch.core.levers.arm_rules import token_forms, token_spellings
from launch.core.levers.arm_words import arm_name, check_arms, parse_arm
from launch.core.option_checks import refuse_idle
from launch.evaluate import main
from launch.jobs.evaluation import EvaluateOptions
from moe_steer import ExpertGain, SteeringPlan
from moe_steer.lab import LAB_MODEL
from reasoning_evals.decoding import NOWAIT_WORDS
from reasoning_evals.runs import read_grades
from reasoning_evals.runs.audits import read_audit
from reasoning_evals.runs.run_folder import read_generations, read_run

pytestmark = pytest.mark.slow

SMALL = ["--num-problems", "6", "--samples", "1", "--max-new-tokens", "80", "--batch-size", "6"]
ARMS = [
    "baseline",
    "tip:50,600",
    "tip-close:50,60",
    "nowait",
    "budget:12",
    "prompt-before",
    "prompt-after",
    "no-thinking",
    "continue:45",
    "soft:20,8,6,4",
    "remind:8+budget:30",
    "hint:20",
    "deer:0.6,2",
]


def plan_file(folder: Path) -> str:
    path = folder / "turned.json"
    SteeringPlan(experts=[ExpertGain(2, 3, 16.0)], scope="thought").save(path)
    return str(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run with every kind of arm."""
    folder = tmp_path_factory.mktemp("evaluate")
    arms = [*ARMS, f"plan:{plan_file(folder)}", f"plan:{folder / 'turned.json'}+budget:12"]
    trial = ["--trial-prompt", "{close}\\boxed{"]
    assert main([*SMALL, "--arms", *arms, *trial, "--out", str(folder / "run")]) == 0
    return folder / "run"


def thoughts(folder: Path, arm: str) -> list[str]:
    return [item.text.split("</think>")[0] for item in read_generations(folder) if item.arm == arm]


def test_every_arm_is_compared_with_the_baseline(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    names = [*ARMS, "plan:turned", "plan:turned+budget:12"]
    assert [arm["name"] for arm in results["comparison"]["arms"]] == names
    assert [(pair["a"], pair["b"]) for pair in results["comparison"]["pairs"]] == [
        ("baseline", name) for name in names[1:]
    ]
    assert results["warnings"] == []
    for page in ("report.md", "report.html"):
        text = (finished / page).read_text()
        assert all(name in text for name in names)
    assert not list(finished.rglob("*.partial"))


def test_an_empty_thought_is_answered_and_a_short_one_goes_on(finished: Path) -> None:
    rows = {(row.arm, row.problem_id): row for row in read_grades(finished)}
    for (arm, _), row in rows.items():
        if arm == "no-thinking":
            assert (row.state, row.thinking_tokens) == ("none", 0)
            assert row.outcome not in ("truncated", "unclosed")
        if arm == "continue:45":
            assert row.thinking_tokens is not None
            assert row.thinking_tokens >= 44, "the newline of the prompt is one of the 45"
    asked = [item for item in read_generations(finished) if item.arm == "no-thinking"]
    assert all(item.prompt.endswith("<think>\nOkay, I think I have finished thinking.\n</think>\n\n") for item in asked)
    assert not any("<think>" in item.text for item in asked)
    going_on = [item.text for item in read_generations(finished) if item.arm == "continue:45"]
    assert any("Wait" in text for text in going_on)
    (rule,) = read_run(finished)["config"]["arms"]["continue:45"]["details"]["decoding"]
    assert (rule["rule"], rule["num_tokens"]) == ("continuation", 45)


def test_a_soft_budget_a_reminder_a_hint_and_a_trial_exit_do_what_they_say(finished: Path) -> None:
    said = {arm: [item for item in read_generations(finished) if item.arm == arm] for arm in ARMS}
    grades = {arm: [row for row in read_grades(finished) if row.arm == arm] for arm in ARMS}
    assert all(row.thinking_tokens is not None and row.thinking_tokens <= 25 for row in grades["soft:20,8,6,4"])
    assert all("\nI should come to the answer now.\n" in item.text for item in said["remind:8+budget:30"])
    assert all("Think for about 20 tokens, then answer." in item.prompt for item in said["hint:20"])
    plain = {item.problem_id: item.text.partition("</think>")[0] for item in said["baseline"]}
    (row,) = [row for row in read_audit(finished).rows["deer:0.6,2"] if row["kind"] == "exit"]
    ended = 0
    for item in said["deer:0.6,2"]:
        thought, _, _ = item.text.partition("</think>")
        whole = plain[item.problem_id]
        assert whole.startswith(thought), "up to its end the thought is the baseline's"
        ended += thought != whole
        assert thought == whole or whole[len(thought) :].lstrip().startswith("Wait")
    assert row["exits"] == ended > 0
    assert row["trials"] >= row["exits"]
    assert row["trial_tokens"] > row["trials"]


def test_what_leaks_behind_a_cut_is_measured(finished: Path) -> None:
    cuts = {one["arm"]: one for one in json.loads((finished / "results.json").read_text())["cut_thoughts"]}
    assert set(cuts) == {"budget:12", "plan:turned+budget:12", "soft:20,8,6,4", "remind:8+budget:30"}
    rows = {(row.arm, row.problem_id): row for row in read_grades(finished)}
    cut = [row for row in rows.values() if row.arm == "budget:12" and (row.thinking_tokens or 0) >= 11]
    assert (cuts["budget:12"]["cut"], cuts["budget:12"]["over"]) == (len(cut), 0.0)
    pairs = [(row, rows["baseline", row.problem_id]) for row in cut]
    more = [
        a.answer_tokens - b.answer_tokens for a, b in pairs if (a.finish_reason, b.finish_reason) == ("stop", "stop")
    ]  # type: ignore[operator]
    assert cuts["budget:12"]["paired"] == len(more)
    assert cuts["budget:12"]["leak"] == pytest.approx(sum(more) / len(more))
    assert cuts["soft:20,8,6,4"]["over"] <= 6
    assert (
        "thoughts reached the budget of 12 tokens" in (finished / "report.md").read_text()
        or "Cut thoughts" in (finished / "report.md").read_text()
    )


def test_the_run_says_every_setting_of_every_arm(finished: Path) -> None:
    arms = read_run(finished)["config"]["arms"]
    (tip,) = arms["tip:50,600"]["details"]["decoding"]
    assert (tip["rule"], tip["alpha"], tip["beta"]) == ("switch_penalty", 50.0, 600)
    (close,) = arms["tip-close:50,60"]["details"]["decoding"]
    assert close["forms"] == [list(close["tags"]["close"])]
    assert arms["nowait"]["details"]["decoding"][0]["rule"] == "ban"
    assert [rule["rule"] for rule in arms["plan:turned+budget:12"]["details"]["decoding"]] == ["thinking_budget"]
    assert arms["plan:turned+budget:12"]["details"]["plan"] == arms["plan:turned"]["details"]["plan"]
    assert arms["prompt-after"]["details"]["prompt_opens_thought"] is True
    assert "decoding" not in arms["baseline"]["details"]


def test_every_arm_does_what_it_is_named_after(finished: Path) -> None:
    assert not any("Alternatively" in text for text in thoughts(finished, "tip:50,600"))
    banned = " ".join(thoughts(finished, "nowait")).lower().split()
    assert not {"wait", "wait,", "hmm,", "alternatively,"} & set(banned)
    grades = [json.loads(line) for line in (finished / "grades.jsonl").read_text().splitlines()]
    assert min(row["thinking_tokens"] for row in grades if row["arm"] == "baseline") < 59
    assert min(row["thinking_tokens"] for row in grades if row["arm"] == "tip-close:50,60") >= 59
    for arm in ("budget:12", "plan:turned+budget:12"):
        # The prompt's newline is the first of the twelve; the tag itself is not counted.
        assert max(row["thinking_tokens"] for row in grades if row["arm"] == arm) == 11
    prompts = {item.arm: item.prompt for item in read_generations(finished)}
    assert prompts["prompt-before"].endswith("before I answer.\n<think>\n")
    assert prompts["prompt-after"].endswith("before I answer.\n")
    assert prompts["tip:50,600"] == prompts["baseline"]


def test_the_pages_can_be_built_again(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert b"Ways to control the reasoning of lab" in before["report.html"]
    for name in ("report.html", "report.md", "grades.jsonl"):
        (folder / name).unlink()
    assert command_line(["report", str(folder)]) == 0
    assert "\nbaseline  " in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_page_of_a_folder_that_says_less_is_not_replaced_by_a_poorer_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    command = [*SMALL, "--arms", "baseline", "nowait", "--out", str(folder)]
    assert main(command) == 0
    run = json.loads((folder / "run.json").read_text())
    page, results = ((folder / name).read_bytes() for name in ("report.html", "results.json"))
    for job in ("of later", ["evaluate"]):
        (folder / "run.json").write_text(json.dumps(run | {"job": job}))
        assert command_line(["report", str(folder)]) == 1
        assert f"the job {job!r}, which this version does not know" in capsys.readouterr().err
    options = run["options"] | {"arms": ["baseline", "tip"]}
    (folder / "run.json").write_text(json.dumps(run | {"job": "evaluate", "options": options}))
    assert command_line(["report", str(folder)]) == 1
    assert "run.json has options for the arms baseline, tip and samples of baseline, nowait" in capsys.readouterr().err
    (folder / "results.json").write_text("{}")
    assert command_line(["report", str(folder)]) == 1
    assert (
        "results.json is not what a job wrote, it lists no warnings: start launch/evaluate.py"
        in capsys.readouterr().err
    )
    (folder / "results.json").write_bytes(results)
    del run["options"]
    (folder / "run.json").write_text(json.dumps(run))
    capsys.readouterr()
    assert command_line(["report", str(folder)]) == 1
    error = capsys.readouterr().err
    assert (
        "start launch/evaluate.py again with the same options, it samples nothing twice and writes the pages" in error
    )
    assert error.count("\n") == 1
    assert (folder / "report.html").read_bytes() == page
    generations = (folder / "generations.jsonl").read_bytes()
    assert main(command) == 0, "the options are no part of what the run is"
    assert (folder / "generations.jsonl").read_bytes() == generations
    assert command_line(["report", str(folder)]) == 0


def test_it_continues_where_it_was_and_refuses_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "run")]
    assert main([*SMALL, *out, "--arms", "baseline", "tip:3,40"]) == 0
    generations = tmp_path / "run" / "generations.jsonl"
    whole = generations.read_bytes()
    results = (tmp_path / "run" / "results.json").read_bytes()
    generations.write_bytes(b"".join(whole.splitlines(keepends=True)[:7]))
    (tmp_path / "run" / "results.json").unlink()
    assert main([*SMALL, *out, "--arms", "baseline", "tip:3,40"]) == 0
    assert sorted(generations.read_bytes().splitlines()) == sorted(whole.splitlines())
    assert (tmp_path / "run" / "results.json").read_bytes() == results
    capsys.readouterr()
    other = ["--arms", "baseline", "tip:3,40", "--switch-words", "Alternatively", "Wait"]
    assert main([*SMALL, *out, *other]) == 1
    error = capsys.readouterr().err
    assert "holds a run of another config (arms.tip:3,40.details.decoding" in error
    assert error.count("\n") == 1
    assert command_line(["report", str(tmp_path / "run")]) == 0


def test_an_arm_without_effect_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*SMALL, "--out", str(tmp_path / "run"), "--arms", "tip:1,1", "budget:79"]
    assert main([*command, "--greedy", "--strict", "--max-new-tokens", "8"]) == 1
    assert "budget:79: every sample equals the one of tip:1,1, token by token" in capsys.readouterr().err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["baseline"] == "tip:1,1"
    assert len(results["warnings"]) == 1


def test_a_cut_thought_is_truncated_where_the_prompt_goes_on_after_the_tag(tmp_path: Path) -> None:
    command = [*SMALL, "--arms", "baseline", "prompt-after", "--max-new-tokens", "4", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    grades = [json.loads(line) for line in (tmp_path / "run" / "grades.jsonl").read_text().splitlines()]
    assert {(row["state"], row["outcome"], row["thinking_tokens"]) for row in grades} == {("truncated", "truncated", 4)}


def test_a_file_of_problems(tmp_path: Path) -> None:
    rows = [
        {"problem_id": str(n), "prompt": f"What is {n} + 2?", "target": str(n + 2), "answer_type": "integer"}
        for n in range(4)
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    assert (
        main(
            [*SMALL, "--problems", str(path), "--num-problems", "3", "--arms", "baseline", "nowait", "--out", str(out)]
        )
        == 0
    )
    comparison = json.loads((out / "results.json").read_text())["comparison"]
    assert (comparison["task"], comparison["num_problems"]) == ("mine", 3)


def test_words() -> None:
    assert [rule.numbers for rule in parse_arm("tip:3,600+budget:0")] == [(3.0, 600.0), (0.0,)]
    assert arm_name(parse_arm("plan:/some/where/my.plan.json+budget:64")) == "plan:my.plan+budget:64"
    assert arm_name(parse_arm("tip:2.5")) == "tip:2.5"
    assert EvaluateOptions().folder == "runs/lab-evaluate"
    assert EvaluateOptions(greedy=True, arms=("tip", "baseline")).baseline == "baseline"
    assert EvaluateOptions(arms=("tip:3", "nowait")).baseline == "tip:3"


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        (["baseline"], "give at least two"),
        (["baseline", "tap"], "the arm 'tap' has the unknown rule 'tap'"),
        (["baseline", "tip", "tip"], "two arms are named 'tip'"),
        (["baseline", "plan:a/x.json", "plan:b/x.json"], "two arms are named 'plan:x'"),
        (["baseline", "budget"], "has 'budget' in it: write budget:N"),
        (["baseline", "budget:1.5"], "has 'budget:1.5' in it"),
        (["baseline", "continue:1.5"], "has 'continue:1.5' in it"),
        (["baseline", "effort"], "names no effort: write effort:WORD"),
        (["baseline", "no-thinking+thinking-off"], "has two rules of the same kind"),
        (["baseline", "budget:20+continue:20"], "ends its thought before it may end"),
        (["baseline", "soft:20+budget:30"], "two rules of the same kind"),
        (["baseline", "soft:20,8,4,6,1"], "write soft:N or soft:N,RAMP"),
        (["baseline", "remind:30+soft:30"], "reminds of a budget that is spent"),
        (["baseline", "deer:1.5"], "has 'deer:1.5' in it"),
        (["baseline", "tip:0"], "has 'tip:0' in it"),
        (["baseline", "tip:3,600,1"], "has 'tip:3,600,1' in it"),
        (["baseline", "tip:x"], "has 'tip:x' in it"),
        (["baseline", "tip:inf"], "has 'tip:inf' in it"),
        (["baseline", "nowait:3"], "has 'nowait:3' in it: write nowait, "),
        (["baseline", "plan:"], "names no plan: write plan:FILE"),
        (["baseline", "prompt-before+prompt-after"], "two rules of the same kind"),
        (["baseline", "baseline+tip"], "baseline is the model without any rule"),
    ],
)
def test_wrong_words_are_wrong_usage(arms: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        check_arms(arms)
    with pytest.raises(SystemExit) as stopped:
        main(["--arms", *arms])
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arms", "baseline", "plan:none.json"], "no plan file at 'none.json'"),
        (["--arms", "baseline", "preset:rice-r1-math"], "the plan was made for num_layers 61, this model has 4"),
        (["--arms", "baseline", "prompt-before", "--thinking-prompt", "</think>"], "the thinking prompt is '</think>'"),
        (["--model", "./nowhere"], "there is no model folder './nowhere'"),
        (["--problems", "none.jsonl"], "none.jsonl"),
        (["--problems", "two.jsonl", "--num-problems", "5"], "'two.jsonl' holds 2 problems, 5 are wanted: give more"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_1(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    row = {"prompt": "1 + 1?", "target": "2", "answer_type": "integer"}
    (tmp_path / "two.jsonl").write_text("".join(json.dumps({"problem_id": name, **row}) + "\n" for name in "ab"))
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "--out", str(tmp_path / "run"), *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "generations.jsonl").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"arms": ("baseline", "nowait"), "switch_words": ("Hm",)},
            "--switch-words is for tip, tip-close: add one to --arms",
        ),
        ({"arms": ("baseline", "tip"), "ban_words": ("Hm",)}, "--ban-words is for nowait: add one to --arms"),
        ({"arms": ("baseline", "tip"), "thinking_prompt": "x"}, "--thinking-prompt is for prompt-before, "),
        ({"arms": ("baseline", "tip"), "reminder": "x"}, "--reminder is for remind: add one to --arms"),
        ({"arms": ("baseline", "tip"), "exit_words": ("Hm",)}, "--exit-words is for deer: add one to --arms"),
        ({"greedy": True, "samples": 4}, "leave --samples 4 out"),
        ({"greedy": True, "temperature": 0.3}, "--temperature 0.3 would change nothing: the most likely token is"),
        ({"data_dir": "here"}, "--data-dir here is for a task, and the lab makes its problems up"),
        ({"temperature": float("nan")}, "temperature must be a positive number, got nan: for the argmax use greedy"),
    ],
)
def test_options_that_nothing_would_follow_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refuse_idle(EvaluateOptions(**given))


def test_every_spelling_that_the_lab_writes_is_found() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(LAB_MODEL)
    forms = token_forms(tokenizer, NOWAIT_WORDS)
    assert token_spellings(tokenizer, ["Wait"])
    assert {tokenizer.decode(form).strip(" .,\n").lower() for form in token_spellings(tokenizer, NOWAIT_WORDS)} <= set(
        NOWAIT_WORDS
    )
    for text in (" Wait", " Hmm", " Alternatively", "Wait", "wait"):
        assert tuple(tokenizer.encode(text, add_special_tokens=False)) in forms
