"""The files that lm-evaluation-harness (0.4.x) writes: per-document samples and aggregated results, one folder per arm."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_steer.files import write_whole
from reasoning_evals.comparing import majority_correct, pass_at_k
from reasoning_evals.exports.graded_run import GradedRun, ProblemSamples, clean, file_name, open_graded_run
from reasoning_evals.runs import json_line

FILTER = "none"
NO_ANSWER = "[invalid]"


def export_lm_eval(run_folder: Path | str, out_dir: Path | str, private: bool = False) -> list[Path]:
    """Write ``ARM/samples_TASK_DATE.jsonl`` and ``ARM/results_DATE.json`` for each arm of a graded run; the date is the run's.

    A document has one request whose ``resps`` are its k responses, thought included; ``filtered_resps`` are the extracted
    answers. Metrics: avg@k, pass@k and maj@k; standard errors are over problems, or over clusters where problems share one.
    The same run gives the same bytes. See ``open_graded_run`` for the errors.
    """
    run = open_graded_run(run_folder, private)
    paths = []
    for arm in run.arms:
        folder = Path(out_dir) / run.file_names[arm]
        folder.mkdir(parents=True, exist_ok=True)
        date = run.created.replace(tzinfo=None).isoformat().replace(":", "-")
        lines = [_line(run, one) for one in run.samples(arm)]
        samples, results = folder / f"samples_{file_name(run.task)}_{date}.jsonl", folder / f"results_{date}.json"
        write_whole(samples, "".join(json_line(line) + "\n" for line in lines))
        write_whole(results, json.dumps(_results(run, arm, lines), indent=2, ensure_ascii=False) + "\n")
        paths += [samples, results]
    return paths


def _line(run: GradedRun, one: ProblemSamples) -> dict[str, Any]:
    problem = {name: clean(value) if isinstance(value, str) else value for name, value in one.problem.to_dict().items()}
    grades = [grade for _, grade in one.samples]
    correct = [grade.correct for grade in grades]
    metrics = {
        f"avg@{run.k}": sum(correct) / run.k,
        f"pass@{run.k}": pass_at_k(run.k, sum(correct), run.k),
        f"maj@{run.k}": majority_correct([grade.extracted for grade in grades], correct),
    }
    prompt = clean(one.samples[0][0].prompt)
    return {
        "doc_id": one.place,
        "doc": problem,
        "target": problem["target"],
        "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": _generation(run)}},
        "resps": [[clean(completion.text) for completion, _ in one.samples]],
        "filtered_resps": [[NO_ANSWER if grade.extracted is None else clean(grade.extracted) for grade in grades]],
        "filter": FILTER,
        "metrics": list(metrics),
        "doc_hash": _hash(json.dumps(problem, indent=2, ensure_ascii=False)),
        "prompt_hash": _hash(prompt),
        "target_hash": _hash(str(problem["target"])),
        **metrics,
    }


def _columns(value: Any) -> Any:
    """With lists as JSON texts: lm-eval reads its files through pyarrow, whose lists hold one type."""
    if isinstance(value, dict):
        return {name: _columns(part) for name, part in value.items()}
    return json.dumps(value) if isinstance(value, list) else value


def _generation(run: GradedRun) -> dict[str, Any]:
    rule = run.config["sampling"]
    values = {"do_sample": not rule["greedy"], "max_gen_toks": rule["max_new_tokens"]}
    if not rule["greedy"]:
        values |= {"temperature": rule["temperature"], "top_p": rule["top_p"], "top_k": rule["top_k"]}
    return values


def _results(run: GradedRun, arm: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    task = run.task
    names: list[str] = lines[0]["metrics"]
    numbers: dict[str, Any] = {"name": task, "alias": task, "sample_len": len(lines)}
    for name in names:
        values = [line[name] for line in lines]
        error = run.standard_error(values)
        numbers[f"{name},{FILTER}"] = sum(values) / len(values)
        numbers[f"{name}_stderr,{FILTER}"] = "N/A" if error is None else error
    identity = run.config["arms"][arm]
    hashes = "".join(line["doc_hash"] + line["prompt_hash"] + line["target_hash"] for line in lines)
    return {
        "results": {task: numbers},
        "group_subtasks": {task: []},
        "configs": {
            task: {
                "task": task,
                "output_type": "generate_until",
                "num_fewshot": 0,
                "repeats": run.k,
                "generation_kwargs": _generation(run),
                "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names],
                "metadata": {"version": 1, "arm": arm},
            }
        },
        "versions": {task: 1},
        "n-shot": {task: 0},
        "higher_is_better": {task: dict.fromkeys(names, True)},
        "n-samples": {task: {"original": len(lines), "effective": len(lines)}},
        "config": {
            "model": identity["sampler"].get("engine", "unknown"),
            "model_args": _columns({key: value for key, value in identity["sampler"].items() if key != "engine"}),
            "batch_size": run.config["sampling"]["batch_size"],
            "gen_kwargs": _generation(run),
            "random_seed": run.config["seed"],
            "arm": arm,
            "arm_details": _columns(identity["details"]),
            "config_hash": identity["config_hash"],
            "packages": dict(run.versions),
        },
        "git_hash": run.commit,
        "date": run.created.timestamp(),
        "task_hashes": {task: _hash(hashes)},
        "model_source": identity["sampler"].get("engine", "unknown"),
        "model_name": run.model(arm),
        "model_name_sanitized": file_name(run.model(arm)),
        "system_instruction": None,
        "fewshot_as_multiturn": False,
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
