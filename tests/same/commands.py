"""Starts the programs of this repository: in this process where possible, since importing the libraries takes seconds."""

from __future__ import annotations

import importlib
import io
import logging
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from same.normalise import ROOT, text_of

SETTINGS = {
    "OMP_NUM_THREADS": "1",  # sums in one order
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "COLUMNS": "500",  # no help text is broken
    "NO_COLOR": "1",
    "TERM": "dumb",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
JOB_SECONDS = 900


class Done(NamedTuple):
    """Exit code, and what was printed, made comparable."""

    code: int
    out: str
    err: str

    def text(self) -> str:
        """As an item."""
        return f"exit code {self.code}\n--- stdout\n{self.out}--- stderr\n{self.err}"


def settle_environment() -> None:
    """The same surroundings for every run, before torch is imported."""
    os.environ.update(SETTINGS)
    for name in ("MOE_STEER_TRACEBACK", "MOE_STEER_WAIT_SECONDS", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        os.environ.pop(name, None)


def console_script() -> Callable[[], Any]:
    """What ``moe-steer`` starts, as pyproject.toml names it: the one place that knows no module of the sources."""
    found = re.search(r'^moe-steer = "([\w.]+):(\w+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError("pyproject.toml names no script moe-steer")
    program: Callable[[], Any] = getattr(importlib.import_module(found[1]), found[2])
    return program


def run_command(line: str, work: Path) -> Done:
    """Run one command line in this process, in the folder ``work``.

    The first word is a script of launch/ (``steer_r1.py``) or a command of moe-steer.
    """
    words = shlex.split(line)
    out, err = _Printed(), _Printed()
    with inside(work), _arguments(words), redirect_stdout(out), redirect_stderr(err), quiet():
        try:
            if words and words[0].endswith(".py"):
                runpy.run_path(str(ROOT / "launch" / words[0]), run_name="__main__")
                code: Any = 0
            else:
                code = console_script()()
        except SystemExit as stopped:
            code = stopped.code
        except BaseException as error:  # a traceback is a result too: its kind, not its lines
            code = 70
            err.write(f"TRACEBACK {type(error).__name__}: {error}\n")
    return Done(int(code or 0), text_of(out.text(), work), text_of(err.text(), work))


class _Printed(io.TextIOWrapper):
    """Keeps what is printed. In UTF-8, as a terminal: a stream without an encoding gets other frames from tyro."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", newline="")

    def text(self) -> str:
        """Everything so far."""
        self.flush()
        kept = self.buffer
        assert isinstance(kept, io.BytesIO)
        return kept.getvalue().decode("utf-8")


def run_job(line: str, work: Path, ranks: int) -> Done:
    """Start a script of launch/ by the launcher on so many ranks; TimeoutExpired after ``JOB_SECONDS``."""
    words = shlex.split(line)
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    command = [launcher, "--num_accelerators", str(ranks), "--master_port", str(29700 + os.getpid() % 2000)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*command, str(ROOT / "launch" / words[0]), *words[1:]],
        cwd=work,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=JOB_SECONDS,
        check=False,
    )
    return Done(done.returncode, text_of(done.stdout, work), text_of(done.stderr, work))


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """``folder`` as the working directory: all paths in the results are relative to it."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings and logs of the libraries: many come once a process, so they would hang on what ran before."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _arguments(words: list[str]) -> Iterator[None]:
    before = sys.argv
    script = bool(words) and words[0].endswith(".py")
    sys.argv = [str(ROOT / "launch" / words[0]), *words[1:]] if script else ["moe-steer", *words]
    try:
        yield
    finally:
        sys.argv = before
