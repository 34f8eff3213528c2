"""How an error reads on the command line, and the exit code that goes with it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


def one_line(error: BaseException) -> str:
    """The message of an error as one line; the type where there is no message. Of a file that the system refuses, its name and why."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)!r}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    text = " ".join(str(error).split())
    return text or type(error).__name__


def exit_code(program: str, work: Callable[[], int | None], again: str = "started again with the same options") -> int:
    """Do the work; 0 or what it returns when it is done, 1 with one line on stderr when it failed or was stopped by Ctrl-C.

    With MOE_STEER_TRACEBACK set, the error itself comes through.
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
