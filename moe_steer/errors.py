"""What a program says: errors as one line of text and an exit code; nothing from outside can steer the terminal."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

# Control characters, and marks that reorder or hide the text around them.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")


def visible(text: object) -> str:
    """Text without control characters, direction marks and lone surrogates: each becomes U+FFFD."""
    return _UNSEEN.sub("\ufffd", str(text).encode("utf-8", "replace").decode()).replace("\u2028", "\n")


class _Console:
    """A text stream that shows control characters instead of passing them on: texts of models and endpoints, arm names and
    file names may hold some. Progress bars move the cursor themselves: rich writes to the stream behind, and those of other
    libraries keep the carriage return."""

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream  # where rich looks for the stream behind a proxy

    def write(self, text: str) -> int:
        """Write it, with what the stream's encoding does not have as question marks."""
        shown = "\r".join(map(visible, text.split("\r"))) if self.isatty() else visible(text)
        encoding = self.rich_proxied_file.encoding or "utf-8"
        try:
            self.rich_proxied_file.write(shown.encode(encoding, "replace").decode(encoding))
        except BrokenPipeError:  # the reader of a pipe (``| head``) has read enough, which ends no work
            _let_go(self.rich_proxied_file)
        return len(text)

    def flush(self) -> None:
        """As of the stream."""
        try:
            self.rich_proxied_file.flush()
        except BrokenPipeError:
            _let_go(self.rich_proxied_file)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


def _let_go(stream: TextIO) -> None:
    """What is written from now on goes nowhere, at the interpreter's end too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def begin_program() -> None:
    """What every program does first. A process may be started with stdout or stderr closed; libraries' bars are silent when piped."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


@contextmanager
def safe_console() -> Iterator[None]:
    """Within it, whatever is printed is text: no control sequence reaches the terminal."""
    out, err = (cast("TextIO", _Console(stream)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(out), redirect_stderr(err):
        yield


@contextmanager
def readers_may_leave() -> Iterator[None]:
    """Within it, help is printed: the reader of a pipe (``--help | head``) may have read enough, which is no failure."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        _let_go(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            print(f"moe-steer: {one_line(error)}", file=sys.stderr)
        raise SystemExit(0 if isinstance(error, BrokenPipeError) else 1) from None


def safe_console_for(arguments: Iterable[str]) -> AbstractContextManager[None]:
    """``safe_console`` while a command line is parsed that holds something to hide: else the parser may use colours."""
    return safe_console() if any(visible(item) != item for item in arguments) else nullcontext()


FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def one_line(error: BaseException) -> str:
    """The message of an error as one line; its type if it has no message; file name and reason for an OSError, and what to do
    about a full disk. torch's advice to run the code in a pickle is not passed on."""
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        why, first = "the disk is full", "free some space"
        if error.errno == errno.EFBIG:
            why, first = "no file may be larger here", "raise the limit (ulimit -f), or write to another disk"
        where = f"{os.fsdecode(error.filename)!r} was not written, {why}" if error.filename else str(error)
        return f"{visible(' '.join(where.split()))}: {first}, then the same command continues"
    if "weights_only" in str(error):
        return "a file of weights holds other things than tensors, and other pickles are not opened: give safetensors"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)!r}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    text = visible(" ".join(str(error).split()))
    return text or type(error).__name__


def exit_code(program: str, work: Callable[[], int | None], again: str = "started again with the same options") -> int:
    """Run ``work``: its exit code or 0 on success; 1, with one line on stderr, on failure or Ctrl-C.

    With MOE_STEER_TRACEBACK set, the error is raised with its traceback.
    """
    with safe_console():
        try:
            code = work() or 0
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            print(f"{program}: stopped; {again}, it continues where it was", file=sys.stderr)
            return 1
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            if os.environ.get("MOE_STEER_TRACEBACK"):
                raise
            print(f"{program}: {one_line(error)}", file=sys.stderr)
            return 1
        finally:
            try:
                sys.stdout.flush()
            except OSError:  # said above
                _let_go(sys.stdout)
