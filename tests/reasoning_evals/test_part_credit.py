"""Credit by part: from ``moe-steer report --by-part`` to the page, and against the parts as they are graded from the text."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from graded_rows import row
from launch.cli.main import main
from reasoning_evals import Problem, grade
from reasoning_evals.comparing.read_again import credit, part_credits
from reasoning_evals.engines.sampling import Request, Sample, SamplingConfig
from reasoning_evals.grading import grade_parts
from reasoning_evals.runs.run import Arm, run_arms
from scripted_sampler import CLOSE_ID, STOP_ID, ScriptedSampler, problems

PARTS = [Problem(f"p{i}", f"what is {i}, {i + 1}, x y?", f"[{i}, {i + 1}, x y]", "list") for i in range(8)]


class ByPart(ScriptedSampler):
    """Has each part right with probability ``skill``."""

    def sample(self, requests: Sequence[Request], config: SamplingConfig) -> Iterator[Sample]:
        for request in sorted(requests, key=lambda request: request.seed):
            dice = random.Random(request.seed + self.shift)
            parts = request.prompt.split("is ")[1].split("?")[0].split(", ")
            said = ", ".join(part if dice.random() < self.skill else "-1" for part in parts)
            yield Sample(request.key, (9, CLOSE_ID, 11, STOP_ID), f"hm\n</think>\\boxed{{{said}}}", "stop")


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{3, 4, y x}",
        "\\boxed{(a) 3 (b) 5 (c) x y}",
        "\\boxed{3, 4, x y, 5}",
        "\\boxed{4, 3, z}",
        "\\boxed{3, 4",
        "no",
    ],
)
def test_it_is_the_mean_over_the_parts_of_the_text(text: str) -> None:
    problem = PARTS[3]
    whole = grade(problem, text)
    graded = dataclasses.replace(row("a", "p3", 0, whole.is_correct), outcome=whole.outcome, extracted=whole.extracted)
    parts = grade_parts(problem, text)
    assert credit(problem, graded) == sum(part.is_correct for part in parts) / len(parts)


def test_from_the_command_to_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = [Arm("baseline", ByPart(0.5)), Arm("steered", ByPart(0.9, shift=1))]
    run_arms(
        arms,
        [*PARTS, Problem("one", "what is 3?", "3", "integer")],
        tmp_path / "run",
        4,
        SamplingConfig(),
        seed=7,
        task="demo",
    )
    assert main(["report", str(tmp_path / "run"), "--by-part"]) == 0
    page = (tmp_path / "run" / "report.md").read_text()
    assert "## Credit by part" in page
    assert "By part, over the 8 problems with several: steered has 8" in page or "steered has 9" in page
    assert "Credit by part" in (tmp_path / "run" / "report.html").read_text()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "Credit by part" not in (tmp_path / "run" / "report.md").read_text()


def test_the_interval_covers_and_equal_arms_differ_seldom() -> None:
    """A planted difference of 0.2 in the chance of a part, 100 runs: within the interval in 95%, up to the noise of 100 runs."""
    inside = shown = 0
    for seed in range(100):
        dice = random.Random(seed)
        rows = []
        for arm, skill in (("baseline", 0.5), ("steered", 0.7)):
            for problem in PARTS:
                level = skill + dice.uniform(-0.2, 0.2)
                said = ", ".join(part if dice.random() < level else "-1" for part in problem.prompt[8:-1].split(", "))
                right = "-1" not in said
                rows.append(dataclasses.replace(row(arm, problem.problem_id, 0, right), extracted=said))
        found = part_credits(rows, PARTS)[0].difference
        inside += found.low <= 0.2 <= found.high
        shown += found.low > 0
    assert inside >= 88  # 95% but for three standard errors
    assert 20 < shown < 100


def test_a_run_without_parts_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_arms(
        [Arm("baseline", ScriptedSampler())], problems(3), tmp_path / "run", 2, SamplingConfig(), seed=7, task="demo"
    )
    assert main(["report", str(tmp_path / "run"), "--by-part"]) == 1
    assert (
        "credit by part needs 2 problems with several parts (answer type list), and 0 of 3 have"
        in capsys.readouterr().err
    )
