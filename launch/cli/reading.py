"""Commands that read a finished run: ``report`` builds its pages again, ``inspect`` shows where chosen experts fire, token by token,
``export`` writes what other tools read, ``thinking`` compares arms by what their thoughts do."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from launch.cli.comparing import sampling_notes
from launch.core.option_checks import check_counts, check_folder, check_out
from moe_steer.files import write_whole
from reasoning_evals import exports, report, runs, thoughts


@dataclass(frozen=True, kw_only=True)
class Report:
    """Grade a run again and build its pages again: report.md and report.html, without a model."""

    folder: Annotated[str, tyro.conf.Positional]
    """Folder of a job (main job, evaluate, overthinking, safety), or of any run with generations."""
    title: str | None = None
    """Title of the page, for a run that is not of a job."""
    caps: tuple[int, ...] = ()
    """Token limits, such as 1024 4096 16384: the page also compares the same samples cut at each."""
    by_part: bool = False
    """Of problems with several parts (answer type list), also compare the share of parts that are right."""

    def run(self) -> int:
        """Write the pages."""
        from launch.jobs import rebuild

        folder = Path(self.folder)
        asked = report.Rereading(self.caps, self.by_part)
        summary = rebuild(folder, asked)
        if summary is not None:
            print(summary.lstrip())
            return 0
        runs.grade_run(folder)
        report.write_pages(asked.added_to(report.build_report(folder, title=self.title), folder), folder)
        print(f"report: {folder / 'report.html'}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Look at answers of a run token by token: where chosen experts fire, how strongly, at which marks; a table here, and a page.

    What the main job left is shown at once. --again, or another run of a mixture-of-experts model, loads the model and runs the
    answers through it once more, each steered as its arm was.
    """

    folder: Annotated[str, tyro.conf.Positional]
    """Folder of the main job, or of any run with generations."""
    again: bool = False
    """Record the traces again, though the folder has some."""
    num: int = 6
    """Problems whose first answers are recorded, in every arm."""
    each: bool = False
    """A line for each trace, instead of one for each arm."""
    experts: tuple[str, ...] = ()
    """Experts to record, as LAYER:EXPERT; default those of the plans and the best of the scores."""
    model: str | None = None
    """Model to load; default the one that the run names."""
    backend: str = "auto"
    """How the model is held; see moe_steer.load_model."""

    def run(self) -> int:
        """Print the table, and say where the page is."""
        from launch.core.trace_views import inspect_run

        check_counts(self, ("num",))
        folder = Path(self.folder)
        asked = self.again or self.experts or self.model is not None
        if asked or not (folder / report.VIEWS_FILE).is_file():
            views = inspect_run(folder, self.num, self.experts, self.model, self.backend)
            views.save(folder)
        else:
            views = report.TraceViews.load(folder)
        print(views.table(self.each))
        print(f"page: {folder / report.TRACES_PAGE}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a run's samples and scores for other tools: lm-evaluation-harness files, parquet, or Inspect logs."""

    folder: Annotated[str, tyro.conf.Positional]
    """Folder of a finished run."""
    out: str
    """Folder to write to, a subfolder or file for each arm; with parquet, the file."""
    format: Literal["lm-eval", "parquet", "inspect"] = "parquet"
    """lm-eval (samples and results), parquet (a row a sample), inspect (needs the package inspect-ai)."""
    private: bool = False
    """Also write questions whose authors ask not to publish them; the export then stays with you."""

    def run(self) -> int:
        """Grade, write, and say what was written."""

        if self.format != "parquet":
            check_folder(self.out)
        if self.format == "parquet":
            check_out(self.out, one_file=True)
            paths = [exports.export_parquet(self.folder, self.out, private=self.private)]
        elif self.format == "lm-eval":
            paths = exports.export_lm_eval(self.folder, self.out, private=self.private)
        else:
            paths = exports.export_inspect(self.folder, self.out, private=self.private)
        for path in paths:
            print(f"wrote {path}")
        return 0


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

        folders = [_run_folder(Path(given)) for given in (self.folder, *self.arm_folder)]
        configs = [runs.read_run(folder)["config"] for folder in folders]
        names = _arm_names(folders, configs)
        print("".join(f"{note}\n" for note in sampling_notes(folders)), end="")
        baseline = self.baseline_arm or names[0]
        if baseline not in names:
            raise ValueError(f"--baseline-arm {baseline} is not an arm of {folders[0]}: it has {', '.join(names)}")
        markers = self.switch_words or thoughts.SWITCH_MARKERS
        judge = thoughts.AttemptJudge()
        samples: list[thoughts.TracedSample] = []
        for folder, config in zip(folders, configs, strict=True):
            samples += _traced(folder, self._counter(config), judge, markers)
        summary = thoughts.summarise_thinking(samples, baseline)
        notes = thoughts.thinking_notes(samples, summary)
        print("\n".join([*thoughts.thinking_lines(summary), *notes]))
        if self.out:
            values = {"version": 1, **summary.to_dict(), "switch_words": list(markers), "notes": notes}
            write_whole(self.out, json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
            print(f"wrote {self.out}")
        return 0

    def _counter(self, config: dict[str, Any]) -> Callable[[str], int]:
        """Counts tokens as the run's model does."""
        from moe_steer.backends import read_tokenizer

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
    folder: Path, count_tokens: Callable[[str], int], judge: thoughts.AttemptJudge, markers: Sequence[str]
) -> list[thoughts.TracedSample]:
    """The samples of a folder in the order of its grades, with a progress line while it takes."""
    from moe_steer.console import tracked

    rows = thoughts.graded_rows(folder)
    place = {(row.arm, row.problem_id, row.sample_idx): index for index, row in enumerate(rows)}
    samples = tracked(thoughts.trace_run(folder, rows, count_tokens, judge, markers), "thoughts", total=len(rows))
    return sorted(samples, key=lambda one: place[one.row.arm, one.row.problem_id, one.row.sample_idx])
