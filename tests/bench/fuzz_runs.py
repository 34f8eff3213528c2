"""What the fuzzer breaks in folders of runs and jobs, and the commands that read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz import Target, command
from fuzz_judge import Judge, Rules, anything, json_judge, lines_judge
from fuzz_mutations import Mutate, mutate_json, mutate_lines

NONE = type(None)


def run_targets(home: Path, jobs: bool) -> list[Target]:
    """Runs by a scripted sampler, and jobs on the embedded models."""
    return [*_runs(home), *(_jobs(home) if jobs else [])]


def run(*arguments: str) -> Callable[[Path], str]:
    """Reads a folder with a command; ``{}`` is the folder."""
    return lambda folder: command(*(argument.format(folder) for argument in arguments))


def _runs(home: Path) -> list[Target]:
    from reasoning_evals.engines import SamplingConfig
    from reasoning_evals.runs import grade_run, read_grades, run_arms
    from scripted_sampler import arms, problems

    folder = home / "run"
    run_arms(arms(), problems(3), folder, 2, SamplingConfig(), seed=7, task="demo")
    grade_run(folder)
    free = {
        "prompts",
        "config_hash",
        "versions",
        "hardware",
        "commit",
        "created",
        "details",
        "describe",
        "sampler",
        "sampling",
    }
    config = Rules(
        free=frozenset(free), optional=frozenset(free | {"problems"}), names=frozenset({"arms"}), unknown=True
    )
    completion = Rules(
        optional=frozenset({"num_tokens", "num_thinking"}), also={"num_tokens": (int,)}, halves=True, torn=True
    )
    audit = Rules(
        free=frozenset({"kind", "layer", "expert", "gain"}),
        optional=frozenset({"*"}),
        also={"weight_added": (int,), "tokens": (float,)},
        unknown=True,
        torn=True,
    )
    rows = Rules(optional=frozenset({"unit", "cluster_id", "domain", "tolerance"}), free=frozenset({"target"}))
    grades = Rules(
        halves=True,
        also=dict.fromkeys(("extracted", "thinking_tokens", "answer_tokens", "domain", "cluster_id"), (NONE, str, int)),
    )
    compare, report = run("compare", "--baseline", "{}"), run("report", "{}")
    export, thinking = run("export", "{}", "--format", "lm-eval", "--out", "{}/x"), run("power", "--baseline", "{}")
    made: list[tuple[str, str, Mutate, Callable[[Path], Any], Judge, float]] = [
        ("compare run.json", "run.json", mutate_json, compare, json_judge(config), 1.0),
        ("export run.json", "run.json", mutate_json, export, json_judge(config), 0.5),
        ("thinking run.json", "run.json", mutate_json, run("thinking", "{}", "--model", "lab"), json_judge(config), 0.5),
        ("thinking generations", "generations.jsonl", mutate_lines, run("thinking", "{}", "--model", "lab"), lines_judge(completion), 0.5),
        ("compare generations", "generations.jsonl", mutate_lines, compare, lines_judge(completion), 1.5),
        ("report generations", "generations.jsonl", mutate_lines, report, lines_judge(completion), 0.7),
        ("export generations", "generations.jsonl", mutate_lines, export, lines_judge(completion), 0.5),
        ("power problems", "problems.jsonl", mutate_lines, thinking, lines_judge(rows), 1.0),
        ("report audit", "audit.jsonl", mutate_lines, report, lines_judge(audit), 1.0),
        ("grades", "grades.jsonl", mutate_lines, lambda f: read_grades(f), lines_judge(grades), 1.0),
    ]  # fmt: skip
    return [
        Target(name=name, folder=folder, file=file, mutate=mutate, read=read, judge=judge, share=share, named=("run.json", "problems.jsonl", "not a run folder", "a run over", "samples", "a sample of"))
        for name, file, mutate, read, judge, share in made
    ]  # fmt: skip


def _jobs(home: Path) -> list[Target]:
    import safety_files
    from launch import evaluate, reduce_overthinking, safety, steer_r1

    few = ["--num-identification", "12", "--num-tuning", "3", "--num-test", "3", "--samples", "1", "--batch-size", "32"]
    started: dict[str, tuple[Any, list[str]]] = {
        "evaluate": (evaluate, ["--num-problems", "3", "--samples", "1", "--max-new-tokens", "12", "--arms", "baseline", "nowait"]),
        "experts": (steer_r1, [*few, "--greedy", "--gains", "4", "--max-new-tokens", "40"]),
        "overthinking": (
            reduce_overthinking,
            [*few, "--samples-tuning", "1", "--model", "lab", "--layers", "2", "--methods", "caa", "budget", "--max-new-tokens", "80", "--strengths", "0.1", "--budgets", "0.5", "--num-identification", "24", "--samples-identification", "2"],
        ),
        "safety": (safety, [*safety_files.write_all(home / "safety files"), "--attack-tokens", "6", "--gsm8k-tokens", "5", "--batch-size", "8"]),
    }  # fmt: skip
    targets = []
    for name, (script, options) in started.items():
        folder = home / f"job {name}"
        code = script.main([*options, "--out", str(folder)])
        assert code == 0, f"the job {name} ended with {code}"
        for path in sorted(
            path for path in folder.rglob("*.json*") if path.name not in ("grades.jsonl", "report.html")
        ):
            file = str(path.relative_to(folder))
            lines = path.suffix == ".jsonl"
            targets.append(
                Target(name=f"job {name} {file}", folder=folder, file=file, mutate=mutate_lines if lines else mutate_json, read=run("report", "{}"),
                       judge=lines_judge(_HYGIENE) if lines and "generations" in file and "identification" not in file else anything,
                       named=("run.json", "problems.jsonl", "a run", "samples", "a sample of", "results.json", "holds", "has"), share=0.25)
            )  # fmt: skip
    return targets


_HYGIENE = Rules(
    optional=frozenset({"num_tokens", "num_thinking"}), also={"num_tokens": (int,)}, halves=True, torn=True
)
