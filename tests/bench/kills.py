"""Jobs that are killed at random moments and started again: every sample is there once, and equal to that of an undisturbed run.

    OMP_NUM_THREADS=1 python tests/bench/kills.py [--n 100] [--seed 0] [--jobs experts overthinking safety evaluation] [--ranks 1 2]

Four jobs on small models in quick form, on one rank and on two (zero3). Each is run once undisturbed; then runs of it are killed
(SIGKILL, all ranks) up to six times a run, and the same command continues. The die chooses when: one kill in five some time after the
start, the others when the run has written some more samples, and up to half a second later, so that few come after the end.
Checked: the run ends with exit code 0; no sample is lost, none stands twice in the files, all have the tokens and texts of the
undisturbed run; results.json is the same. The last line is the summary; the exit code says whether something differed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / room) for room in ("moe_steer", "launch"))]

import safety_files
from rank_processes import RunningRanks, stop_server

LIMIT = 400.0
FEW = ["--num-identification", "12", "--num-tuning", "4", "--num-test", "6", "--samples", "2", "--batch-size", "4"]
JOBS = {
    "experts": ("steer_r1.py", [*FEW, "--gains", "4", "16", "--max-new-tokens", "48"]),
    "overthinking": (
        "reduce_overthinking.py",
        [*FEW, "--num-identification", "24", "--model", "lab", "--layers", "2", "--methods", "caa", "budget", "--samples-tuning", "1",
         "--strengths", "0.1", "--budgets", "0.5", "--samples-identification", "2", "--max-new-tokens", "80"],
    ),
    "safety": ("safety.py", ["--attack-tokens", "6", "--gsm8k-tokens", "5", "--batch-size", "2"]),
    "evaluation": ("evaluate.py", ["--num-problems", "12", "--samples", "2", "--max-new-tokens", "60", "--batch-size", "4", "--arms", "baseline", "nowait", "budget:12"]),
}  # fmt: skip

Samples = dict[tuple[Any, ...], tuple[Any, ...]]


class Left(NamedTuple):
    """What a run left."""

    samples: Samples
    """(step, arm, problem, number) -> text, tokens and end."""
    doubled: int
    """Lines beyond the first of a sample."""
    results: bytes


def left_by(folder: Path) -> Left:
    """Read from the files themselves, line by line: the readers of the package leave out what stands twice."""
    lines: Counter[tuple[Any, ...]] = Counter()
    samples: Samples = {}
    for path in sorted(folder.rglob("generations*.jsonl")):
        for line in path.read_bytes().split(b"\n")[:-1]:
            row = json.loads(line)
            key = (str(path.parent.relative_to(folder)), row["arm"], row["problem_id"], row["sample_idx"])
            lines[key] += 1
            samples[key] = (row["text"], tuple(row["token_ids"]), row["finish_reason"])
    return Left(samples, lines.total() - len(lines), (folder / "results.json").read_bytes())


def differences(found: Left, wanted: Left) -> list[str]:
    """What a killed run has other than the undisturbed one, in words."""
    problems = []
    if lost := wanted.samples.keys() - found.samples.keys():
        problems.append(f"{len(lost)} samples lost")
    if more := found.samples.keys() - wanted.samples.keys():
        problems.append(f"{len(more)} samples too many")
    if found.doubled:
        problems.append(f"{found.doubled} samples twice")
    other = [key for key in found.samples.keys() & wanted.samples.keys() if found.samples[key] != wanted.samples[key]]
    if other:
        problems.append(f"{len(other)} samples differ, first {min(other)}")
    if not problems and found.results != wanted.results:
        problems.append("results.json differs")
    return problems


def undisturbed(script: Path, ranks: int, options: list[str], folder: Path) -> tuple[Left, float]:
    """What it leaves, and the seconds that it takes."""
    done = RunningRanks(script, ranks, [*options, "--out", str(folder)]).wait(LIMIT)
    if done.codes != [0] * ranks:
        raise RuntimeError(f"{script.name} on {ranks} ranks ended with {done.codes}: {done.text[-2000:]}")
    return left_by(folder), done.seconds


def written(folder: Path) -> int:
    """Samples in the files now."""
    return sum(path.read_bytes().count(b"\n") for path in folder.rglob("generations*.jsonl"))


def moment_of(folder: Path, whole: int, seconds: float, left: int, dice: random.Random) -> float:
    """Seconds after the start at which to kill, returned when that moment is near: the run goes on meanwhile. ``left``: kills to come."""
    began, before = time.monotonic(), written(folder)
    if before == whole or dice.random() < 0.2:
        return dice.uniform(0.05, 0.6) * seconds
    target = before + dice.randint(1, max(1, 2 * (whole - before) // (left + 1)))
    while time.monotonic() - began < LIMIT and (written(folder) < target or not (folder / "run.json").exists()):
        if (folder / "report.html").exists():  # the end
            break
        time.sleep(0.02)
    return time.monotonic() - began + dice.uniform(0, 0.5)


def killed(
    script: Path,
    ranks: int,
    options: list[str],
    folder: Path,
    whole: int,
    seconds: float,
    kills: int,
    dice: random.Random,
) -> tuple[int, list[str]]:
    """(kills that met a running job, what differs afterwards)."""
    met = 0
    for number in range(kills):
        running = RunningRanks(script, ranks, [*options, "--out", str(folder)])
        done = running.wait(moment_of(folder, whole, seconds, kills - number, dice))
        if any(done.codes) or None not in done.codes:
            if done.codes == [0] * ranks:  # it was faster than the die
                break
            if any(code for code in done.codes if code):
                return met, [f"it ended by itself with {done.codes}: {done.text[-500:]}"]
        met += 1
    last = RunningRanks(script, ranks, [*options, "--out", str(folder)]).wait(LIMIT)
    if last.codes != [0] * ranks:
        return met, [f"started again it ended with {last.codes}: {last.text[-1500:]}"]
    return met, []


def main() -> int:
    """Kill, continue, compare; print a line a run, and the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100, help="kills in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    options = parser.parse_args()
    dice, began, done, faults, runs = random.Random(options.seed), time.monotonic(), 0, 0, 0
    wanted: dict[tuple[str, int], tuple[Left, float]] = {}
    kinds = [(job, ranks) for ranks in options.ranks for job in options.jobs]
    with tempfile.TemporaryDirectory() as home:
        given = safety_files.write_all(Path(home, "safety files"))
        while done < options.n and runs < 10 * options.n:
            job, ranks = kinds[runs % len(kinds)]
            name, asked = JOBS[job]
            asked = [*asked, *(given if job == "safety" else []), *(["--backend", "zero3"] if ranks > 1 else [])]
            script = ROOT / "launch" / name
            if (job, ranks) not in wanted:
                wanted[job, ranks] = undisturbed(script, ranks, asked, Path(home, f"{job}-{ranks}"))
            whole, seconds = wanted[job, ranks]
            folder = Path(home, f"run-{runs}")
            kills = min(dice.randint(1, 6), options.n - done)
            met, problems = killed(script, ranks, asked, folder, len(whole.samples), seconds, kills, dice)
            problems = problems or differences(left_by(folder), whole)
            done, runs, faults = done + met, runs + 1, faults + bool(problems)
            said = "; ".join(problems) or f"{len(whole.samples)} samples, none lost, none twice, all equal"
            print(f"{job} on {ranks} ranks, {met} kills: {said}", flush=True)
    stop_server()
    print(f"{done} kills in {runs} runs, seed {options.seed}: {faults} runs differ, {time.monotonic() - began:.0f} s")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
