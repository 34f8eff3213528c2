"""How every script of this folder starts: options, ranks, the work, an exit code."""

from __future__ import annotations

import io
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Protocol, TypeVar, runtime_checkable

import tyro

from launch.failure import MEMORY_ERRORS, in_words
from launch.ranks import Ranks, ranks_of_this_run
from launch.repeated import refuse_repeated
from moe_steer.errors import exit_code, one_line

OptionsT = TypeVar("OptionsT")


@runtime_checkable
class Asked(Protocol):
    """Options that are looked at once more when a user gives them, and not when a finished run's are read back: another
    version may have stored what this one refuses."""

    def check_asked(self) -> None:
        """ValueError for options that nothing in the run would follow."""


_FIRST_SPEAKS = 2.0
"""Seconds: the launcher ends all ranks as soon as one has ended."""


def start(
    options_type: type[OptionsT],
    run: Callable[[OptionsT, Ranks], None],
    argv: Sequence[str] | None,
    program: str,
    description: str | None,
) -> int:
    """Parse the options (wrong usage exits with 2), join the ranks, run; returns the exit code. Of several ranks, one speaks."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message=".*NVML.*")
    arguments = list(sys.argv[1:] if argv is None else argv)

    def parse() -> OptionsT:
        refuse_repeated(program, options_type, arguments)
        options = tyro.cli(options_type, args=arguments, prog=program, description=description)
        if isinstance(options, Asked):
            try:
                options.check_asked()
            except ValueError as error:
                print(f"{program}: {one_line(error)}", file=sys.stderr)
                raise SystemExit(2) from error
        return options

    options = _parsed_once(parse)

    def work() -> None:
        try:
            with ranks_of_this_run() as ranks:
                run(options, ranks)
        except MEMORY_ERRORS as error:
            raise RuntimeError(in_words(error)) from error

    return exit_code(program, work)


def _parsed_once(parse: Callable[[], OptionsT]) -> OptionsT:
    """The options; of several ranks, only the first says what is wrong with them, and the others give it the time to."""
    if os.environ.get("RANK", "0") == "0":
        return parse()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return parse()
    except SystemExit:
        time.sleep(_FIRST_SPEAKS)
        raise
