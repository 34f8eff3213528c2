"""``moe-steer thinking``: over- and underthinking of the arms of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

if TYPE_CHECKING:
    from reasoning_evals.thoughts import AttemptJudge, TracedSample

_STEPS = {"identification", "tuning"}  # of a job, before its test


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """Over- and underthinking by rule: when thoughts first state the right answer, and what they do afterwards."""

    folder: Annotated[str, tyro.conf.Positional]
    """Folder of a run with generations, or of a job, of which the test step is read."""
    arm_folder: tuple[str, ...] = ()
    """Folders of further arms on the same problems; none when the first folder holds them all."""
    baseline_arm: str | None = None
    """Arm that the others are compared with; default the first of the run."""
    switch_words: tuple[str, ...] = ()
    """Sentence openings that begin a new attempt; default those of the papers, such as Wait, Alternatively, Hmm, Let me check."""
    model: str | None = None
    """Model whose tokenizer counts; default the one that the run names."""
    trust_remote_code: bool = False
    """Run tokenizer code that comes with the checkpoint."""
    out: str | None = None
    """File to write with all numbers (JSON)."""

    renamed: ClassVar = {"--arm": "--arm-folder", "--baseline": "--baseline-arm"}

    def run(self) -> int:
        """Grade, trace every thought, print one table and what it does not say."""
        import json

        from moe_steer.files import write_whole
        from reasoning_evals.runs import read_run
        from reasoning_evals.thoughts import (
            SWITCH_MARKERS,
            AttemptJudge,
            summarise_thinking,
            thinking_lines,
            thinking_notes,
        )

        folders = [_run_folder(Path(given)) for given in (self.folder, *self.arm_folder)]
        configs = [read_run(folder)["config"] for folder in folders]
        names = _arm_names(folders, configs)
        baseline = self.baseline_arm or names[0]
        if baseline not in names:
            raise ValueError(f"--baseline-arm {baseline} is not an arm of {folders[0]}: it has {', '.join(names)}")
        markers = self.switch_words or SWITCH_MARKERS
        judge = AttemptJudge()
        samples: list[TracedSample] = []
        for folder, config in zip(folders, configs, strict=True):
            samples += _traced(folder, self._counter(config), judge, markers)
        summary = summarise_thinking(samples, baseline)
        notes = thinking_notes(samples, summary)
        print("\n".join([*thinking_lines(summary), *notes]))
        if self.out:
            values = {"version": 1, **summary.to_dict(), "switch_words": list(markers), "notes": notes}
            Path(self.out).parent.mkdir(parents=True, exist_ok=True)
            write_whole(Path(self.out), json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
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
        try:
            tokenizer = read_tokenizer(named, trust_remote_code=self.trust_remote_code)
        except (ValueError, OSError) as error:
            if self.model:
                raise
            raise ValueError(
                f"the tokenizer of the run's model cannot be had ({error}): give one like it with --model"
            ) from error
        return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _run_folder(given: Path) -> Path:
    """The folder with the generations: the given one, or the test step of a job."""
    for folder in (given, given / "test"):
        if any(folder.glob("generations*.jsonl")):
            return folder
    inside = sorted({path.parent.name for path in given.glob("*/generations*.jsonl")})
    if inside and _STEPS.issuperset(inside):
        raise ValueError(
            f"{given} holds an unfinished job, without its test: start it again, it continues where it was"
        )
    if inside:
        raise ValueError(
            f"{given} holds several runs: give one of them, {', '.join(str(given / name) for name in inside)}"
        )
    raise ValueError(f"{given} holds no generations: give the folder of a run ('moe-steer generate') or of a job")


def _arm_names(folders: Sequence[Path], configs: Sequence[dict[str, Any]]) -> list[str]:
    """In the order of the folders; ValueError where two have one name, or the folders other problems."""
    names: list[str] = []
    for folder, config in zip(folders, configs, strict=True):
        if config["problems"] != configs[0]["problems"]:
            raise ValueError(f"{folder} and {folders[0]} have different problems: sample the same in both")
        if twice := set(names) & set(config["arm_order"]):
            raise ValueError(
                f"{folder} holds another arm named {min(twice)!r}: sample it again with --arm-name OTHER_NAME"
            )
        names += config["arm_order"]
    return names


def _traced(
    folder: Path, count_tokens: Callable[[str], int], judge: AttemptJudge, markers: Sequence[str]
) -> list[TracedSample]:
    """The samples of a folder in the order of its grades, with a progress line while it takes."""
    from moe_steer.console.progress import tracked
    from reasoning_evals.thoughts import graded_rows, trace_run

    rows = graded_rows(folder)
    place = {(row.arm, row.problem_id, row.sample_idx): index for index, row in enumerate(rows)}
    samples = tracked(trace_run(folder, rows, count_tokens, judge, markers), "thoughts", total=len(rows))
    return sorted(samples, key=lambda one: place[one.row.arm, one.row.problem_id, one.row.sample_idx])
