"""A program that starts a run again and again and kills it with signal 9 each time, then lets it finish.

    python killed_runs.py FOLDER WORLD_SIZE SEED NUM_KILLS

Each start is a process of its own, forked off after the imports so that many kills take little time. It prints a JSON line a
kill: how the process ended, and how many bytes of generations were there.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from reasoning_evals.engines.sampling import SamplingConfig
from reasoning_evals.problems import Problem
from reasoning_evals.runs.grading_pass import grade_run
from reasoning_evals.runs.run import run_arms
from scripted_sampler import arms, problems

LONGEST_SECONDS = 0.06
DELAY = 0.004


def many_problems() -> list[Problem]:
    return problems(40)


def run_once(folder: Path, rank: int, world_size: int, delay: float) -> None:
    config = SamplingConfig(batch_size=8)
    run_arms(
        arms(delay, gated=True),
        many_problems(),
        folder,
        4,
        config,
        7,
        rank,
        world_size,
        task="demo",
        check_repeats=True,
    )


def run_and_grade(folder: Path, world_size: int) -> None:
    for rank in range(world_size):
        run_once(folder, rank, world_size, 0.0)
    grade_run(folder)


def start(folder: Path, rank: int, world_size: int) -> int:
    """The id of a process that runs one rank."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            run_once(folder, rank, world_size, DELAY)
            status = 0
        finally:
            os._exit(status)
    return process


def num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("generations*.jsonl"))


def tear(folder: Path, dice: random.Random) -> bool:
    """Leave what a kill in the middle of a write leaves: the last line of generations cut, or the head of another line."""
    torn = False
    for path in sorted(folder.glob("*.jsonl")):
        content = path.read_bytes()
        if path.name == "problems.jsonl" or not content or dice.random() < 0.3:
            continue
        lines = content.split(b"\n")
        last = lines[-2] if len(lines) > 1 else b""
        if path.name.startswith("generations") and content.endswith(b"\n") and dice.random() < 0.5:
            path.write_bytes(content[: -dice.randint(1, len(last))])
        elif content.endswith(b"\n"):
            path.write_bytes(content + last[: dice.randint(1, len(last))])
        torn = True
    return torn


def main(out_dir: str, world: str, seed: str, kills: str) -> None:
    folder, world_size, dice, scissors = (
        Path(out_dir),
        int(world),
        random.Random(int(seed)),
        random.Random(int(seed) + 1),
    )
    for _ in range(int(kills)):
        before = num_bytes(folder)
        processes = [start(folder, rank, world_size) for rank in range(world_size)]
        moment = time.monotonic() + dice.random() * LONGEST_SECONDS
        if dice.random() < 0.5:  # half of them right after a write, which is when something can be half done
            wanted = before + dice.randrange(1500)  # on a busy machine these see to it that the run gets on
            while num_bytes(folder) <= wanted and time.monotonic() < moment + 3.0:
                time.sleep(0.0002)
        else:
            time.sleep(max(0.0, moment - time.monotonic()))
        for process in processes:
            os.kill(process, signal.SIGKILL)
        ended = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        grown = num_bytes(folder)
        torn = scissors.random() < 0.5 and tear(folder, scissors)
        print(json.dumps({"ended": ended, "bytes": grown, "torn": torn}))
    run_and_grade(folder, world_size)


if __name__ == "__main__":
    main(*sys.argv[1:])
