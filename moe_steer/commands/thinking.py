"""``moe-steer thinking``: over- and underthinking of the arms of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from reasoning_evals.problems import Problem
    from reasoning_evals.thinking_summary import ArmThinking, ThinkingChange

MEANINGLESS = 0.2
"""Chance rate above which a right answer in a thought is said to mean little."""


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """Over- and underthinking by rule: when thoughts first state the right answer, and what they do afterwards."""

    folder: Annotated[str, tyro.conf.Positional]
    """Folder of a run with generations, or of a job, of which the test step is read."""
    baseline: str | None = None
    """Arm that the others are compared with; default the first of the run."""
    switch_words: tuple[str, ...] = ()
    """Sentence openings that begin a new attempt; default those of the papers, such as Wait, Alternatively, Hmm, Let me check."""
    model: str | None = None
    """Model whose tokenizer counts; default the one that the run names."""
    trust_remote_code: bool = False
    """Run tokenizer code that comes with the checkpoint."""
    out: str | None = None
    """File to write with all numbers (JSON)."""

    def run(self) -> int:
        """Grade, trace every thought, print one table."""
        import json

        from reasoning_evals.grading_pass import grade_run
        from reasoning_evals.run_folder import read_run
        from reasoning_evals.segments import SWITCH_MARKERS
        from reasoning_evals.thinking_summary import arm_thinking, thinking_change, thinking_json, thoughts_of_run
        from reasoning_evals.whole_files import write_whole

        folder = _run_folder(Path(self.folder))
        config = read_run(folder)["config"]
        names: list[str] = config["arm_order"]
        baseline = self.baseline or names[0]
        if baseline not in names:
            raise ValueError(f"--baseline {baseline} is no arm of {folder}: it has {', '.join(names)}")
        count_tokens = self._counter(config)
        rows = grade_run(folder)
        judge = _judge()
        found = thoughts_of_run(folder, rows, count_tokens, judge, self.switch_words or SWITCH_MARKERS)
        thoughts = [item for item in _shown(found, len(rows)) if item is not None]
        if not thoughts:
            raise ValueError(f"{folder} holds no thoughts: nothing stands between <think> and </think> in any answer")
        numbers = {name: sum(row.arm == name for row in rows) for name in names}
        arms = [
            arm_thinking(name, numbers[name], [item for item in thoughts if item.arm == name], judge) for name in names
        ]
        changes = [thinking_change(name, baseline, thoughts) for name in names if name != baseline]
        print("\n".join(_lines(arms, changes, {item.problem.answer_type for item in thoughts})))
        if self.out:
            Path(self.out).parent.mkdir(parents=True, exist_ok=True)
            write_whole(Path(self.out), json.dumps(thinking_json(arms, changes), indent=1, allow_nan=False) + "\n")
            print(f"wrote {self.out}")
        return 0

    def _counter(self, config: dict[str, Any]) -> Callable[[str], int]:
        """Counts tokens as the run's model does."""
        from moe_steer.loading import read_tokenizer

        named = self.model or next(
            (arm["sampler"]["model"] for arm in config["arms"].values() if arm["sampler"].get("model")), None
        )
        if named is None:
            raise ValueError("the run does not name its model: give the one whose tokenizer counts with --model")
        tokenizer = read_tokenizer(named, trust_remote_code=self.trust_remote_code)
        return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _run_folder(given: Path) -> Path:
    """The folder with the generations: the given one, or the test step of a job."""
    for folder in (given, given / "test"):
        if list(folder.glob("generations*.jsonl")):
            return folder
    raise ValueError(f"{given} holds no generations: give the folder of a run ('moe-steer generate') or of a job")


def _judge() -> Callable[[Problem, str], bool]:
    """The killable graders, each (problem, answer) once: a thought that goes round says the same answer again and again."""
    from reasoning_evals.grading import grade_answer

    known: dict[tuple[str, str, str], bool] = {}

    def judge(problem: Problem, answer: str) -> bool:
        key = (problem.problem_id, problem.target, answer)
        if key not in known:
            known[key] = grade_answer(problem, answer).outcome == "correct"
        return known[key]

    return judge


def _shown(items: Any, total: int) -> Any:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, "thoughts", total=total, console=console, disable=not console.is_terminal, transient=True)


def _lines(arms: list[ArmThinking], changes: list[ThinkingChange], answer_types: set[str]) -> list[str]:
    from reasoning_evals.report.text import count, percent

    def interval(estimate: Any) -> str:
        if estimate is None:
            return "–"
        return f"{100 * estimate.mean:.1f} ({100 * max(0, estimate.low):.1f} to {100 * min(1, estimate.high):.1f})"

    width = max(8, *(len(arm.arm) for arm in arms)) + 2
    heads = ("tokens", "attempts", "stated", "chance", "outcome efficiency", "process efficiency", "underthinking")
    widths = (8, 10, 9, 9, 23, 23, 23)
    lines = [f"{'arm':{width}}" + "".join(f"{head:>{size}}" for head, size in zip(heads, widths, strict=True))]
    for arm in arms:
        cells = (
            count(arm.tokens.mean if arm.tokens else None),
            "–" if arm.attempts is None else f"{arm.attempts.mean:.2f}",
            percent(arm.stated.mean if arm.stated else None),
            percent(arm.chance),
            interval(arm.outcome_efficiency),
            interval(arm.process_efficiency),
            interval(arm.underthinking),
        )
        lines.append(
            f"{arm.arm:{width}}" + "".join(f"{cell:>{size}}" for cell, size in zip(cells, widths, strict=True))
        )
    for change in changes:
        lines.append(_change(change))
    lines.append(
        "outcome efficiency: share of a thought up to its first right answer (100: nothing after it; 0: never stated). process"
    )
    lines.append(
        "efficiency: share in attempts at new answers. underthinking: share after the first right answer, of wrong responses only."
    )
    for arm in arms:
        if arm.num_thoughts < arm.num_samples:
            lines.append(
                f"{arm.arm}: {arm.num_samples - arm.num_thoughts} of {arm.num_samples} samples have no thought"
            )
        if not arm.num_wrong and arm.num_thoughts:
            lines.append(f"{arm.arm}: no response with a thought is wrong, so there is no underthinking to measure")
        if arm.chance is not None and arm.chance > MEANINGLESS:
            lines.append(
                f"{arm.arm}: {percent(arm.chance)} of the thoughts state the answer to ANOTHER problem: a right one means little here"
            )
    if "expression" in answer_types or "list" in answer_types:
        lines.append(
            "expressions and lists are found in boxes and after 'the answer is': thoughts state them in other ways too"
        )
    return lines


def _change(change: ThinkingChange) -> str:
    parts = []
    for name, found in (
        ("outcome efficiency", change.outcome_efficiency),
        ("process efficiency", change.process_efficiency),
    ):
        if found is None:
            parts.append(f"{name}: too few problems with thoughts in both")
        else:
            parts.append(
                f"{name} {100 * found.mean:+.1f} points ({100 * found.low:+.1f} to {100 * found.high:+.1f}, sign-flip p = {found.sign_flip_p:.2g})"
            )
    return f"{change.arm} against {change.baseline}: " + "; ".join(parts)
