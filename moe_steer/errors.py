"""Errors on the command line: one line of text and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def one_line(error: BaseException) -> str:
    """The message of an error as one line; its type if it has no message; file name and reason for an OSError."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)!r}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    text = " ".join(str(error).split())
    return text or type(error).__name__


def exit_code(program: str, work: Callable[[], int | None], again: str = "started again with the same options") -> int:
    """Run ``work``: its exit code or 0 on success; 1, with one line on stderr, on failure or Ctrl-C.

    With MOE_STEER_TRACEBACK set, the error is raised with its traceback.
    """
    try:
        return work() or 0
    except KeyboardInterrupt:
        print(f"{program}: stopped; {again}, it continues where it was", file=sys.stderr)
        return 1
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("MOE_STEER_TRACEBACK"):
            raise
        print(f"{program}: {one_line(error)}", file=sys.stderr)
        return 1
