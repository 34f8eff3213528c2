"""Broken files of every format that a user can hand over, into every reader: refused in one line, or read because they are legal.

    OMP_NUM_THREADS=1 python tests/bench/fuzz.py [--n 2000] [--seed 0] [--only NAME ...] [--keep DIR]

A fault is a traceback of another type than the tools' own, a message that is long, quotes at length or names no file, a hang, memory
without bound, a wrong exit code, a file that is left behind by a refusal, and a file that is read although it is illegal (as judged by
code that shares nothing with the readers). Each mutant is read in a forked process with limits of processor time and memory. Same
seed, same mutants. The last line is the summary; the exit code says whether there was a fault. ``--keep``: where mutants of faults go.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [
    str(ROOT),
    str(Path(__file__).parent),
    *(str(ROOT / "tests" / room) for room in ("moe_steer", "expert_stats", "reasoning_evals", "launch")),
]

from fuzz_judge import Judge
from fuzz_mutations import Mutate

CPU_SECONDS, WALL_SECONDS, MORE_BYTES = 10, 120, 3 << 30
LONGEST, LONGEST_QUOTE = 600, 200
OURS = ("moe_steer", "expert_stats", "reasoning_evals", "launch")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One file of one format, and one way in which it is read."""

    name: str
    folder: Path
    """The example, with all that belongs to it."""
    file: str
    """The one that is broken, within the folder."""
    mutate: Mutate
    read: Callable[[Path], Any]
    """Reads the folder; raises what the tool raises."""
    judge: Judge
    named: tuple[str, ...] = ()
    """What a message may name instead of the file."""
    share: float = 1.0
    """How many mutants, in proportion."""


class Refused(ValueError):
    """A command that ended with 1 or 2 and one line."""


class Fault(NamedTuple):
    """What went wrong with one mutant."""

    number: int
    target: str
    kind: str
    what: str


class Hang(BaseException):
    """More processor time than any file may take."""


def command(*arguments: str) -> str:
    """What ``moe-steer`` prints; ``Refused`` for exit codes 1 and 2 with a line. Any other end is an AssertionError."""
    from launch.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    code: object
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as error:
            code = error.code
    said = err.getvalue()
    if code in (1, 2) and said.strip():
        raise Refused(said.rstrip("\n"))
    assert code == 0 or (code == 1 and out.getvalue()), f"exit code {code} without a word"
    return out.getvalue()


def examine(target: Target, number: int, broken: bytes, folder: Path) -> tuple[str, str, str]:
    """(accepted, refused or the kind of a fault; what; message) of one mutant, whose file is written into a copy of the example."""
    example = (target.folder / target.file).read_bytes()
    (folder / target.file).write_bytes(broken)
    before = _listing(folder)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            target.read(folder)
    except Hang:
        return "hang", f"more than {CPU_SECONDS} s", ""
    except MemoryError:
        return "memory", f"more than {MORE_BYTES >> 30} GiB", ""
    except Exception as error:
        return _judge_refusal(target, error, example, broken, before, folder)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    problem = target.judge(example, broken)
    return ("wrong acceptance", problem, "") if problem else ("accepted", "", "")


def _judge_refusal(
    target: Target, error: Exception, example: bytes, broken: bytes, before: set[str], folder: Path
) -> tuple[str, str, str]:
    from moe_steer.errors import one_line

    said = str(error) if isinstance(error, Refused) else one_line(error)
    kind = type(error)
    own = kind.__module__.split(".")[0] in OURS or kind is Refused
    if not (own or kind is ValueError or (isinstance(error, OSError) and error.filename)):
        return "traceback", f"{kind.__module__}.{kind.__name__}: {said[:200]}", said
    if "\n" in said or re.search(r"Traceback|weights_only|0x1b|\x1b", said):
        return "no line", said[:300], said
    if len(said) > LONGEST + len(str(folder)) * said.count(str(folder)):
        return "long message", f"{len(said)} characters: {said[:200]}", said
    text = broken.decode("utf-8", "replace")
    if any(said[at : at + LONGEST_QUOTE + 1] in text for at in range(len(said) - LONGEST_QUOTE)):
        return "long quote", said[:250], said
    plain = said.replace(str(folder), "")
    if not any(name in (said if name == str(folder) else plain) for name in (Path(target.file).name, *target.named)):
        return "no file named", said[:250], said
    if left := _listing(folder) - before:
        return "left behind", ", ".join(sorted(left)), said
    return "refused", "", said


def _listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def mutant(targets: Sequence[Target], seed: int, number: int) -> tuple[Target, bytes]:
    """The mutant of a number: the same for the same seed, whatever ran before."""
    dice = random.Random(f"{seed}:{number}")
    target = dice.choices(targets, [one.share for one in targets])[0]
    broken = (target.folder / target.file).read_bytes()
    for _ in range(dice.choice((1, 1, 1, 1, 2))):
        broken = target.mutate(dice, broken)
    return target, broken


def _work(targets: Sequence[Target], seed: int, first: int, n: int, to: Connection, keep: Path | None) -> None:
    """A forked process: mutants from ``first`` on, a message before and after each."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + MORE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (size, size))

    def stop(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGPROF, stop)
    with tempfile.TemporaryDirectory() as home:
        for number in range(first, n):
            to.send((number, None))
            target, broken = mutant(targets, seed, number)
            folder = Path(home, target.folder.name)
            shutil.copytree(target.folder, folder, symlinks=True)
            outcome, what, said = examine(target, number, broken, folder)
            shutil.rmtree(folder)
            if keep and outcome not in ("accepted", "refused"):
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{number}-{target.name}".replace("/", "_")).write_bytes(broken)
            to.send((number, (target.name, outcome, what, said)))
    to.send(None)


def fuzz(
    targets: Sequence[Target], n: int, seed: int, keep: Path | None = None, show: Callable[[str], None] = print
) -> tuple[Counter[str], list[Fault]]:
    """Outcomes by name, and the faults. A process that hangs beyond Python's reach, or dies, is a fault, and another one goes on."""
    counts: Counter[str] = Counter()
    faults: list[Fault] = []
    fork = multiprocessing.get_context("fork")

    def note(number: int, name: str, outcome: str, what: str) -> None:
        counts[outcome] += 1
        counts[f"{name}: {outcome}"] += 1
        if outcome not in ("accepted", "refused"):
            faults.append(Fault(number, name, outcome, what))
            show(f"mutant {number} of {name}: {outcome}: {what}")

    first = 0
    while first < n:
        ours, theirs = fork.Pipe(duplex=False)
        process = fork.Process(target=_work, args=(targets, seed, first, n, theirs, keep))
        process.start()
        theirs.close()
        for number, found in _messages(ours):
            first = number + 1
            if found is None:
                running = number
                continue
            note(number, *found[:3])
            running = -1
        process.join(1)
        if process.is_alive() or running >= 0:
            process.kill()
            process.join()
            name = mutant(targets, seed, running)[0].name
            note(running, name, "hang", f"the process ended, or took more than {WALL_SECONDS} s, in compiled code")
            first = running + 1
    return counts, faults


def _messages(pipe: Connection) -> Iterator[Any]:
    while pipe.poll(WALL_SECONDS):
        try:
            message = pipe.recv()
        except EOFError:
            return
        if message is None:
            return
        yield message


def main() -> int:
    """Run, print the faults, and the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=())
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    from fuzz_targets import build_targets

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        targets = [
            one for one in build_targets(Path(home)) if not options.only or one.name.startswith(tuple(options.only))
        ]
        for target in targets:  # a reader that refuses the example itself would pass everything
            with contextlib.redirect_stdout(io.StringIO()):
                target.read(Path(shutil.copytree(target.folder, Path(home, "whole", target.name), symlinks=True)))
        counts, faults = fuzz(targets, options.n, options.seed, options.keep)
    for target in targets:
        print(
            f"{target.name}: {counts[f'{target.name}: accepted']} accepted, {counts[f'{target.name}: refused']} refused"
        )
    print(
        f"{options.n} mutants of {len(targets)} formats, seed {options.seed}: {counts['accepted']} accepted, {counts['refused']} refused, "
        f"{len(faults)} faults, {time.monotonic() - began:.0f} s"
    )
    return int(bool(faults))


if __name__ == "__main__":
    import fuzz as this  # the module that the targets import, whose classes are compared

    sys.exit(this.main())
