"""A job at work: one model, its ranks, its folder. Loads, samples, waits, grades, records and fails in one way for every job."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.core.failure import in_own_words
from launch.core.findings import Findings, publish
from launch.core.options import HeldModel, Room, RunOptions
from launch.core.prompt_options import PromptOptions, ask_prompts
from launch.core.ranks import Ranks, speaks
from launch.core.served.connection import Connection, OwnServer
from launch.core.served.server_options import EngineOptions
from moe_steer import SteeringPlan, load_model, steer
from moe_steer.backends import layout_of, lockstep
from moe_steer.layers import ModelShape, model_shape
from reasoning_evals import Problem, run_arms
from reasoning_evals.engines import InProcessSampler, SamplingConfig
from reasoning_evals.runs import RUN_FILE, Arm, GradeRow, add_to_run, grade_run, open_run, read_run


@dataclass(frozen=True, kw_only=True)
class Session:
    """What every step of a job works with."""

    options: RunOptions
    ranks: Ranks
    model: Any
    """None where a server holds it."""
    tokenizer: Any
    room: Room
    """What memory was planned for, which decides how many rows are decoded at once; the options may have more."""
    shape: ModelShape
    connection: Connection | None = None
    """The server that is asked in place of the model."""

    @classmethod
    def load(cls, options: RunOptions, ranks: Ranks, room: Room, tokenizer: Any, shape: ModelShape | None) -> Session:
        """Load the model that the options ask for, once ``settle`` has found its room, or reach the server that holds it; nothing is
        written. ``tokenizer`` and ``shape`` are what ``look`` has found: a server shows neither."""
        if options.held_by:
            if ranks.world_size > 1:
                raise ValueError(
                    f"a server batches by itself: with --{options.held_by} start one process, without the launcher"
                )
            if shape is None:
                raise ValueError(
                    f"the layers of {options.model} cannot be told from its configuration: leave --{options.held_by} out"
                )
            connection = cls._reached(options, ranks, room)
            model = None
        else:
            connection = None
            model, tokenizer = load_room(options, room)
            shape = model_shape(model)
        about = {"tokenizer": tokenizer, "shape": shape, "connection": connection}
        return cls(options=options, ranks=ranks, model=model, room=room, **about)

    @staticmethod
    def _reached(options: RunOptions, ranks: Ranks, room: Room) -> Connection:
        assert isinstance(options, EngineOptions)
        if options.endpoint:
            connection = Connection.to(options)
            ranks.say(connection.line)
            return connection
        given = ["--max-model-len", str(room.context), *(("--revision", options.revision) if options.revision else ())]
        given += ["--trust-remote-code"] if options.trust_remote_code else []
        own = OwnServer(
            options=options, model=options.model, given=tuple(given), folder=Path(options.folder), say=ranks.say
        )
        ranks.at_end.callback(own.stop)
        return Connection(server=own.reached, name=own.model, own=own)

    def require(self, plans: Mapping[str, SteeringPlan | None]) -> None:
        """ValueError, with the command that starts the right server, for one that lacks some of these plans, given by the names of
        their arms. They are left in the folder."""
        if self.connection is not None:
            self.connection.require(plans, self.folder, self.options.model)

    @property
    def folder(self) -> Path:
        """The folder of the job."""
        return Path(self.options.folder)

    def open(self, job: str, config: Mapping[str, Any]) -> None:
        """Take the folder for this job, or continue in it; ValueError where it holds a run of another config."""
        if self.ranks.is_main:
            open_run(self.folder, config)
        self.record(job)
        self.ranks.barrier()

    def record(self, job: str, **more: Any) -> None:
        """Add to run.json, on rank 0, the job's name, and to its ``history`` how this start holds the model, on how many ranks.

        Backend and ranks are not part of what a run is: the plan, the problems and the seeds are, and a run may continue on
        another machine. Which samples came from where can be read from the times.
        """
        if not self.ranks.is_main:
            return
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        entry = {"backend": layout_of(self.model).backend, "ranks": self.ranks.world_size, "started": now}
        if self.connection is not None:
            entry |= {"backend": "endpoint", "server": self.connection.engine}
        history = [*read_run(self.folder).get("history", []), entry]
        add_to_run(self.folder, job=job, history=history, **more)

    def arm(self, name: str, plan: SteeringPlan | None = None) -> Arm:
        """The model under a plan, or as it is; ValueError for a plan that does not fit."""
        if self.connection is not None:
            if plan is not None:
                plan.check(self.shape)
            return self.connection.arm(name, self.tokenizer, plan)
        return arm_here(name, self.model, self.tokenizer, plan)

    def sample(
        self,
        step: str,
        arms: Sequence[Arm],
        problems: Sequence[Problem],
        k: int,
        *,
        task: str | None = None,
        sampling: SamplingConfig | None = None,
    ) -> None:
        """Sample into the step's folder, every rank its share. Returns on every rank when all have finished.

        Ranks with a share of their own may finish far apart: the others wait as long as files grow.
        """
        folder = self.folder / step
        layout = layout_of(self.model)
        index, number = layout.share
        for arm in arms:
            if isinstance(
                arm.sampler, InProcessSampler
            ):  # a rank that sets rows aside would leave others in their forward
                take_room(arm.sampler, self.room, sets_aside=not (layout.lockstep or layout.same_tokens))
        with _folder_of_rank(folder, self.model, self.ranks) as mine, lockstep(self.model):
            run_arms(
                arms,
                problems,
                mine,
                k,
                sampling or self.sampling(),
                self.options.seed,
                rank=index,
                world_size=number,
                progress=None if self.ranks.is_main else False,
                task=self.options.task if task is None else task,
            )
        if not layout.lockstep:
            self.ranks.wait_while_growing(folder)
        self.ranks.barrier()

    def sampling(self, **changes: Any) -> SamplingConfig:
        """The decoding rule of the options, but for the changes."""
        options = self.options
        rule: dict[str, Any] = {
            "temperature": options.heat,
            "top_p": options.nucleus,
            "max_new_tokens": options.token_limit,
            "greedy": options.takes_most_likely,
            "batch_size": options.rows,
        }
        return SamplingConfig(**rule | changes)

    def grade(self, step: str, problems: Sequence[Problem], judge: Any = None) -> list[GradeRow]:
        """Grade the step's answers on rank 0; the grades, on every rank."""
        rows = grade_run(self.folder / step, problems, judge) if self.ranks.is_main else []
        graded: list[GradeRow] = self.ranks.broadcast(rows)
        return graded

    def finish(self, findings: Findings | None) -> None:
        """Write and print what rank 0 found (the others may pass None). RuntimeError on every rank, with --strict, for an arm
        that changed nothing."""
        silent: Sequence[str] = ()
        if self.ranks.is_main:
            assert findings is not None
            print(publish(findings))
            silent = findings.silent
        if self.options.strict and (silent := self.ranks.broadcast(silent)):
            raise RuntimeError("; ".join(silent))


def load_asked(options: HeldModel, *, quiet: bool = False, **memory: Any) -> tuple[Any, Any]:
    """The model that the options ask for, with its tokenizer. ``memory``: ``batch`` and ``context`` of the decoding to plan for."""
    model, tokenizer = load_model(
        options.model,
        options.backend,
        dtype=options.dtype,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        offload=options.offload,
        max_memory=options.max_memory,
        **memory,
    )
    if isinstance(options, PromptOptions):
        ask_prompts(tokenizer, options, quiet=quiet or not speaks())
    return model, tokenizer


def load_room(options: HeldModel, room: Room) -> tuple[Any, Any]:
    """``load_asked`` for the room that ``settle`` has found: it has said how the model thinks."""
    try:
        return load_asked(options, quiet=True, batch=room.rows, context=room.context)
    except ValueError as error:
        raise ValueError(in_own_words(str(error), room.rows)) from error


def steering(model: Any, tokenizer: Any, plan: SteeringPlan) -> Callable[[], Any]:
    """The context in which the model is steered; the run keeps its audit."""
    return lambda: steer(model, plan, tokenizer=tokenizer, quiet=True)


def arm_here(name: str, model: Any, tokenizer: Any, plan: SteeringPlan | None) -> Arm:
    """A loaded model under a plan, or as it is; ValueError for a plan that does not fit."""
    sampler = InProcessSampler(model, tokenizer)
    if plan is None:
        return Arm(name, sampler, details={"plan": None})
    plan.check(model)
    return Arm(name, sampler, context=steering(model, tokenizer, plan), details={"plan": plan.digest()})


def take_room(sampler: InProcessSampler, room: Room, *, sets_aside: bool) -> None:
    """Decode as many rows at once as ``settle`` has found room for."""
    sampler.hold(room.rows, sets_aside=sets_aside, context=room.context if room.stretches else 0)


@contextmanager
def unclaimed_when_refused(folder: Path, made: Path, ranks: Ranks) -> Iterator[None]:
    """While directions are made: where they are refused (ValueError) and ``made`` does not exist yet, run.json is removed, so
    that a start with another SAE, or with other methods, may use the folder and what was sampled in it so far."""
    try:
        yield
    except ValueError:
        if ranks.is_main and not made.exists():
            (folder / RUN_FILE).unlink(missing_ok=True)
        raise


@contextmanager
def _folder_of_rank(folder: Path, model: Any, ranks: Ranks) -> Iterator[Path]:
    """Where this rank writes. Ranks over which one model is spread all make every sample: rank 0 keeps them, the others work in
    a copy of what the folder holds already (they must skip the same samples), which is removed at the end."""
    layout = layout_of(model)
    if layout.writes and not layout.same_tokens:
        yield folder
        return
    present = (
        {path.name: path.read_bytes() for path in folder.glob("*.json*")} if ranks.is_main and folder.is_dir() else {}
    )
    present = ranks.broadcast(present)
    if ranks.is_main:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="rank-") as copy:
        for name, content in present.items():
            Path(copy, name).write_bytes(content)
        yield Path(copy)
