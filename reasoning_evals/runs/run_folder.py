"""The files of a run: run.json (settings, versions, hardware), and one generations and one audit file per rank (``audits``)."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_steer.files import create_whole, write_whole
from moe_steer.json_files import check_types, quoted, read_json, short
from reasoning_evals.problems import Problem, read_problems
from reasoning_evals.runs.completions import (
    Completion,
    arm_thoughts,
    read_completions,
)

_PACKAGES = ("torch", "transformers", "deepspeed", "numpy", "scipy", "mpmath", "moe-steer")

RUN_FILE = "run.json"
PROBLEMS_FILE = "problems.jsonl"
GRADES_FILE = "grades.jsonl"
OPTIONS = "options"
"""Where run.json keeps what a command was asked, beside the config that decides the samples: a run is resumed under other options too."""
_HASHES = ("config_hash", "prompts", "problems")


def provenance() -> dict[str, Any]:
    """created, commit, versions, hardware: plain JSON values."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": versions,
        "hardware": _hardware(),
    }


def _commit() -> str | None:
    """Commit of the checkout that this package runs from, "+changes" when files differ; None outside one."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def _hardware() -> dict[str, Any]:
    hardware: dict[str, Any] = {"machine": platform.machine(), "cpus": os.cpu_count(), "devices": []}
    if (torch := sys.modules.get("torch")) is not None:
        hardware["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            hardware["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return hardware


_CONFIG_TYPES = {
    "arm_order": list[str],
    "arms": dict,
    "k": int,
    "num_problems": int,
    "problems": str,
    "sampling": dict,
    "seed": int,
    "task": str,
}


_SAMPLING_TYPES = {
    "greedy": bool,
    "max_new_tokens": int,
    "batch_size": int,
    "top_k": int,
    "temperature": float,
    "top_p": float,
}
_ARM_TYPES = {"sampler": dict, "details": dict, "prompts": str, "config_hash": str}


def digest(value: Any) -> str:
    """16 hexadecimal digits of the sha256 of a JSON value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def config_hash(config: Mapping[str, Any], name: str, arm: Mapping[str, Any]) -> str:
    """Over all that decides an arm's samples but the choice of problems. ``config``: of the run; ``arm``: its own entry."""
    about = {key: config[key] for key in ("task", "k", "seed", "sampling")}
    about |= {"arm": name, **{key: arm[key] for key in ("sampler", "details", "prompts")}}
    return digest(json.loads(json.dumps(about)))  # as run.json has it: there every key is a text, and sorted as one


def run_problems(folder: Path) -> list[Problem]:
    """The problems of a run. ValueError where problems.jsonl is not the one that the run was made with: an edited target would
    change every accuracy without a word."""
    if not (folder / PROBLEMS_FILE).is_file():
        raise ValueError(f"{folder} has lost its {PROBLEMS_FILE}: run it again with the same options, which writes it")
    problems = read_problems(folder / PROBLEMS_FILE)
    if digest([problem.to_dict() for problem in problems]) != read_run(folder)["config"].get("problems"):
        raise ValueError(
            f"{folder / PROBLEMS_FILE} does not hold the problems of this run, whose digest is in {RUN_FILE}: restore the file "
            "(from Python, grade_run takes corrected targets as its problems)"
        )
    return problems


def open_run(folder: Path, config: Mapping[str, Any]) -> None:
    """Write the folder's run.json, or check that an existing one has the same config.

    Several ranks may do this at once; one of them writes. ValueError in one line when the configs differ.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder for the run")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps(config))
    path = folder / RUN_FILE
    if not path.exists():
        text = json.dumps({"version": 1, "config": wanted, **provenance()}, indent=1, sort_keys=True) + "\n"
        create_whole(path, text)
    found = read_run(folder)["config"]
    if differences := dict(_differences(found, wanted)):
        # Name the settings that differ before the hashes, which differ as a consequence.
        ordered = sorted(differences, key=lambda name: name.rpartition(".")[2] in _HASHES)
        shown = "; ".join(f"{name}: {differences[name]}" for name in ordered[:3]) + (
            "; ..." if len(ordered) > 3 else ""
        )
        raise ValueError(
            f"{folder} holds a run of another config ({shown}): take another folder, or the settings of that run"
        )


def read_run(folder: Path) -> dict[str, Any]:
    """The content of run.json; ValueError when there is none, or when it is not a run's."""
    path = folder / RUN_FILE
    missing = f"{folder} is not a run folder: it has no {RUN_FILE}"
    run = read_json(path, "restore it, or take another folder", missing=missing)
    if type(run.get("version")) is not int or run["version"] != 1 or not isinstance(run.get("config"), dict):
        raise ValueError(f"{path} is not the run.json of an evaluation, version 1: take another folder")
    check_types(run, str(path), {"history": list[dict], OPTIONS: dict})
    if {"arm_order", "sampling"} & set(run["config"]):  # else the folder is a job's, whose config is its options
        if absent := sorted(set(_CONFIG_TYPES) - set(run["config"])):
            raise ValueError(f"{path} does not say {absent[0]!r} in its config: restore it, or take another folder")
        check_types(run["config"], f"{path}, config", _CONFIG_TYPES)
        _check_arms(path, run["config"])
    return run


def add_to_run(folder: Path, **more: Any) -> None:
    """Put these into run.json, beside its config."""
    write_whole(folder / RUN_FILE, json.dumps(read_run(folder) | more, indent=1, sort_keys=True) + "\n")


def _check_arms(path: Path, config: Mapping[str, Any]) -> None:
    """ValueError for entries of arms that no run wrote, such as a thinking format that is none, and for settings that were changed since."""
    if absent := sorted(set(_SAMPLING_TYPES) - set(config["sampling"])):
        raise ValueError(f"{path} does not say the {absent[0]} of its sampling: restore the file")
    check_types(config["sampling"], f"{path}, sampling", _SAMPLING_TYPES)
    if not config["arms"] or sorted(config["arm_order"]) != sorted(config["arms"]):
        raise ValueError(
            f"{path} orders the arms {quoted(config['arm_order'])} and describes {quoted(sorted(config['arms']))}: restore the file"
        )
    for name, arm in config["arms"].items():
        where = f"{path}, arm {quoted(name)}"
        if not isinstance(arm, dict):
            raise ValueError(f"{where} is {quoted(arm)}: restore the file, or take another folder")
        if absent := sorted(set(_ARM_TYPES) - set(arm)):
            raise ValueError(f"{path} does not say the {absent[0]} of arm {quoted(name)}: restore the file")
        check_types(arm, where, _ARM_TYPES)
        check_types(arm["sampler"], where, {"model": str | None})
        try:
            arm_thoughts(arm)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{where} does not say how its texts are split ({short(error)}): restore the file"
            ) from error
        if config_hash(config, name, arm) != arm["config_hash"]:
            raise ValueError(
                f"{where}: its settings are not those that its samples were made with (they do not give its config_hash): restore the file"
            )


def refuse_job(folder: Path) -> None:
    """ValueError for the folder of a job with several steps: its samples are in the folders of the steps."""
    if "arm_order" not in read_run(folder)["config"]:
        inner = sorted(path.parent for path in folder.glob(f"*/{RUN_FILE}"))
        steps = [str(step) for step in inner if "arm_order" in read_run(step)["config"]]
        remedy = f": give one of its steps, {', '.join(steps)}" if steps else ""
        raise ValueError(f"{folder} is the folder of a job and holds no samples itself{remedy}")


def generation_file(folder: Path, rank: int, world_size: int) -> Path:
    """The file to which a rank appends its completions."""
    return folder / ("generations.jsonl" if world_size == 1 else f"generations.rank{rank}.jsonl")


def read_generations(folder: Path) -> Iterator[Completion]:
    """Every completion of a run once, in the order of the files, for any number of ranks.

    ValueError when a sample is there twice with different content, and for one of another arm or number, or made with other settings, than
    run.json has (where there is one). Keeps one digest per sample in memory.
    """
    config = read_run(folder)["config"] if (folder / RUN_FILE).is_file() else {}
    arms = config["arms"] if "arm_order" in config else None
    seen: dict[tuple[Any, ...], str] = {}
    for path in sorted(folder.glob("generations*.jsonl")):
        for completion in read_completions(path):
            if arms is not None and completion.arm not in arms:
                raise ValueError(
                    f"{path} holds a sample of arm {completion.arm!r}, which is not of this run: {sorted(arms)} are"
                )
            if arms is not None and completion.config_hash != arms[completion.arm]["config_hash"]:
                raise ValueError(
                    f"{path} holds a sample that is not of this run (sample {completion.sample_idx} of problem {completion.problem_id!r}, arm "
                    f"{completion.arm!r}, was made with other settings than {RUN_FILE} has): take it out, or take another folder"
                )
            if arms is not None and not 0 <= completion.sample_idx < config["k"]:
                raise ValueError(
                    f"{path} holds a sample that is not of this run (sample {completion.sample_idx} of problem {completion.problem_id!r}, arm "
                    f"{completion.arm!r}, where samples count from 0 to {config['k'] - 1}): take it out, or take another folder"
                )
            content = completion.digest
            if completion.key not in seen:
                seen[completion.key] = content
                yield completion
            elif seen[completion.key] != content:
                raise ValueError(
                    f"{path}: sample {completion.sample_idx} of problem {completion.problem_id!r}, arm {completion.arm!r}, "
                    "is there twice with different content: the folder mixes runs, sample again in a new one"
                )


def _differences(found: Any, wanted: Any, where: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in sorted(found.keys() | wanted.keys()):
            inner = f"{where}.{name}" if where else str(name)
            yield from _differences(found.get(name, "nothing"), wanted.get(name, "nothing"), inner)
    elif found != wanted:
        yield where, f"{_short(found)} there, {_short(wanted)} now"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
