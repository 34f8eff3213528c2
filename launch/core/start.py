"""How every job starts: options, ranks, the work, an exit code."""

from __future__ import annotations

import io
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import TypeVar

import torch
import tyro

from launch.core.failure import MEMORY_ERRORS, DryRun, in_words
from launch.core.option_checks import refuse_idle, refuse_misread
from launch.core.ranks import Ranks, ranks_of_this_run, speaks
from moe_steer.errors import begin_program, exit_code, one_line, readers_may_leave, safe_console_for

OptionsT = TypeVar("OptionsT")

_FIRST_SPEAKS = 2.0
"""Seconds: the launcher ends all ranks as soon as one has ended."""


def start(
    options_type: type[OptionsT],
    run: Callable[[OptionsT, Ranks], None],
    argv: Sequence[str] | None = None,
    *,
    program: str,
    description: str | None = None,
) -> int:
    """Parse the options (wrong usage exits with 2), join the ranks, run; returns the exit code. Of several ranks, one speaks."""
    begin_program()
    warnings.filterwarnings("ignore", message=".*NVML.*")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns in every process that it had to find this out
    arguments = list(sys.argv[1:] if argv is None else argv)

    def parse() -> OptionsT:
        refuse_misread(program, options_type, arguments)
        options = tyro.cli(options_type, args=arguments, prog=program, description=description)
        try:
            refuse_idle(options)
        except ValueError as error:
            print(f"{program}: {one_line(error)}", file=sys.stderr)
            raise SystemExit(2) from error
        return options

    with readers_may_leave(), safe_console_for(arguments):
        options = _parsed_once(parse)

    def work() -> None:
        try:
            with ranks_of_this_run() as ranks, ranks.at_end:
                try:
                    run(options, ranks)
                except DryRun as report:
                    ranks.say(str(report))
        except MEMORY_ERRORS as error:
            raise RuntimeError(in_words(error)) from error

    return exit_code(program, work)


def _parsed_once(parse: Callable[[], OptionsT]) -> OptionsT:
    """The options; of several ranks only the first prints what is wrong with them, and the others wait for it to do so."""
    if speaks():
        return parse()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return parse()
    except SystemExit:
        time.sleep(_FIRST_SPEAKS)
        raise
