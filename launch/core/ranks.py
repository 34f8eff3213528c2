"""The processes of one run: who am I, wait for the others, say something once. Rank 0 alone talks and decides.

And how every job starts: options, ranks, the work, an exit code.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
import tyro

from launch.core.failure import (
    MEMORY_ERRORS,
    DryRun,
    end_with_the_launcher,
    error_to_report,
    failure_is_reported,
    in_words,
)
from launch.core.option_checks import check_finite, refuse_idle, refuse_misread
from moe_steer.backends import without_compiled_shared_memory
from moe_steer.errors import begin_program, exit_code, one_line, readers_may_leave, safe_console_for

OptionsT = TypeVar("OptionsT")

_FIRST_SPEAKS = 2.0
"""Seconds: the launcher ends all ranks as soon as one has ended."""

_WAIT_SECONDS = 3600.0
"""How long a rank waits for another before it takes it for dead: one may sample long while another has finished its share."""
_LOOK_EVERY = 0.2
_IN_VAIN = "ProcessGroup: timed out waiting for ranks that write nothing"
"""Read by ``error_to_report`` like a collective that timed out."""
_STORE_STAYS = 1.0
"""Seconds that rank 0 outlives its failure: ranks that fail at the same moment ask its store who speaks."""


@dataclass(frozen=True)
class Ranks:
    """This process among the ``world_size`` processes of the run."""

    rank: int = 0
    world_size: int = 1
    at_end: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """What ends with the run, as a server that it has started."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints, decides and writes shared files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.world_size > 1:
            dist.barrier()

    def wait_while_growing(self, folder: Path) -> None:
        """Wait until every rank has come here, as long as files in ``folder`` grow: one rank may have more left to sample than a
        collective waits for. RuntimeError when nothing was written for ``wait_seconds``."""
        if self.world_size == 1:
            return
        patience = wait_seconds()
        store = dist.distributed_c10d._get_default_store()
        call = store.add(f"moe_steer/calls/{self.rank}", 1)  # all ranks come here equally often
        key = f"moe_steer/there/{call}"
        store.add(key, 1)
        size, since = -1, time.monotonic()
        while store.add(key, 0) < self.world_size:
            if failure_is_reported():  # on another node, whose launcher does not end this one's ranks
                leave(1)
            written = sum(path.stat().st_size for path in folder.glob("*.jsonl"))
            if written != size:
                size, since = written, time.monotonic()
            elif time.monotonic() - since > patience:
                raise RuntimeError(_IN_VAIN)
            time.sleep(_LOOK_EVERY)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def add(self, part: Any) -> Any:
        """The sum of all ranks' arrays, on every rank."""
        if self.world_size == 1:
            return part
        tensor = torch.from_numpy(part.copy())
        tensor = tensor.cuda() if "nccl" in dist.get_backend() else tensor
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def assert_same(self, what: str, value: Any) -> None:
        """ValueError on every rank when a value that all must share differs between them."""
        if self.world_size == 1:
            return
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        odd = [rank for rank, other in enumerate(values) if other != values[0]]
        if odd:
            raise ValueError(
                f"{what} differs on rank {odd[0]} ({values[odd[0]]!r}, rank 0 has {values[0]!r}): start all ranks alike"
            )

    def say(self, text: str) -> None:
        """Print a line on rank 0."""
        if self.is_main:
            print(text, flush=True)


@contextmanager
def ranks_of_this_run() -> Iterator[Ranks]:
    """Join the process group that the launcher prepared, if there is one, and leave it at the end.

    An error comes through on the rank that had it first; the other ranks end without a word. MOE_STEER_WAIT_SECONDS sets
    how long a rank waits for the others.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    end_with_the_launcher()
    if world_size == 1:
        yield Ranks()
        return
    import deepspeed

    without_compiled_shared_memory()
    sys.stdout.flush()
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        take_gpu(int(os.environ.get("LOCAL_RANK", "0")))
    waited = wait_seconds()
    deepspeed.init_distributed(
        dist_backend=backend, timeout=datetime.timedelta(seconds=waited), verbose=False, auto_mpi_discovery=False
    )
    rank = dist.get_rank()
    try:
        yield Ranks(rank, world_size)
        dist.barrier()
    except BaseException as error:
        said = error_to_report(error, rank, waited)
        if said is None:
            leave(1)
        if said is error:
            raise
        raise said from error
    dist.destroy_process_group()


def take_gpu(local_rank: int) -> None:
    """Make one GPU this rank's own, before anything is sent: NCCL sends objects from the current GPU, which otherwise is the
    first one for all ranks. ValueError for more ranks than GPUs on this machine."""
    number = torch.cuda.device_count()
    if local_rank >= number:
        raise ValueError(
            f"rank {local_rank} of this machine has no GPU, there are {number}: start at most {number} ranks here (--num_gpus)"
        )
    torch.cuda.set_device(local_rank)


def wait_seconds() -> float:
    """How long a rank waits for another; ValueError when MOE_STEER_WAIT_SECONDS is not a positive number."""
    given = os.environ.get("MOE_STEER_WAIT_SECONDS", str(_WAIT_SECONDS))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"MOE_STEER_WAIT_SECONDS is {given!r}: give a positive number of seconds")
    return seconds


def refuse_several_ranks(program: str, instead: str) -> None:
    """ValueError when a launcher started several ranks of a program that is one process: all would write the same files."""
    number = int(os.environ.get("WORLD_SIZE", "1"))
    if number > 1:
        raise ValueError(
            f"{program} is one process, and this is one of {number} ranks: start it without a launcher, or use {instead}"
        )


def speaks() -> bool:
    """Whether this process says what all of them would say; known before the ranks have met."""
    return os.environ.get("RANK", "0") == "0"


def leave(code: int) -> NoReturn:
    """End this process. Where ranks have met, at once: gloo's threads now and then abort the interpreter's own way out
    ("terminate called without an active exception"), and the launcher would take that for a failure of a run that is
    already written."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not dist.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if code and os.environ.get("RANK") == "0":
        time.sleep(_STORE_STAYS)
    os._exit(code)


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
            check_finite(options)
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
