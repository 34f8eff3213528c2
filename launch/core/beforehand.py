"""What a start knows before weights are read: the kind of model, how long answers may be, how many rows memory holds."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from launch.core.failure import DryRun, in_own_words
from launch.core.options import HeldModel, Room
from launch.core.prompt_options import ask_prompts, task_line
from launch.core.ranks import Ranks
from moe_steer.backends import (
    FITS,
    MemoryPlan,
    Unplanned,
    available_bytes,
    check_name,
    choose_backend,
    gpus_here,
    plan_memory,
    read_config,
    read_tokenizer,
    skeleton,
)
from moe_steer.layers import ModelShape, model_shape
from reasoning_evals.prompts import render_prompt
from reasoning_evals.runs import RUN_FILE, read_run

OptionsT = TypeVar("OptionsT", bound=Any)

USUAL_PROMPT = 1024
"""Tokens of a prompt, where memory must be planned before the prompts are known."""
BATCHES = (64, 32, 16, 8, 4, 2, 1)
"""Rows decoded together that are tried where the user names no number."""
ASKED_TOGETHER = 32
"""Samples of a chunk on a server, which makes many chunks at once: what a kill may lose is small."""
_UNPLANNED = 16
"""The most of them where memory cannot be planned."""
_SHARED = "tp_ep"
"""The backend under which all ranks together decode the same rows."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """A model by its configuration and tokenizer. ``shape``: None where only the loaded model tells."""

    config: Any
    tokenizer: Any
    shape: ModelShape | None

    @property
    def context(self) -> int | None:
        """Tokens that prompt and answer may have together, by the configuration's own word; None where it has none."""
        most: int | None = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return most if most and most > 0 else None

    def longest_prompt(self, questions: Iterable[str], added: str = "") -> int:
        """Tokens of the longest prompt; ``added``: what an arm may put before or after every question."""
        return max(len(render_prompt(self.tokenizer, question + added).token_ids) for question in questions)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run gets: ``gpus`` ranks, one a GPU; ``limit``: bytes that tensors may fill on each; ``what``: in words; ``on_gpu``:
    whether it computes with the kernels of a GPU; ``here``: whether it is this one, whose CPU memory and other GPUs are known."""

    gpus: int
    limit: int
    what: str
    on_gpu: bool = True
    here: bool = False

    @classmethod
    def of_gpus(cls, gpus: int, gpu_gib: float, name: str = "GPUs") -> Machine:
        """So many GPUs of the size that their maker states."""
        from moe_steer.backends import GPU_SHARE

        return cls(gpus=gpus, limit=int(gpu_gib * GPU_SHARE * 2**30), what=f"{gpus} x {name} of {gpu_gib:g} GiB")

    @classmethod
    def of_ranks(cls, world_size: int) -> Machine:
        """The ranks of this start, on this machine."""
        import torch

        limit, where = available_bytes(world_size)
        what = f"{world_size} rank{'s' * (world_size > 1)} here, {where}"
        return cls(gpus=world_size, limit=limit, what=what, on_gpu=torch.cuda.is_available(), here=True)

    @classmethod
    def of_options(cls, options: Any, world_size: int) -> Machine:
        """The machine that a dry run asks about, else the one of this start."""
        if options.gpus and options.gpu_gib:
            return cls.of_gpus(options.gpus, options.gpu_gib)
        return cls.of_ranks(world_size)

    def plan(self, options: HeldModel, config: Any, rows: int, context: int, **more: Any) -> MemoryPlan:
        """What a model needs here under every backend, for so many ``rows`` of ``context`` tokens. ``more``: of ``plan_memory``."""
        asked: dict[str, Any] = {
            "dtype": options.dtype,
            "offload": options.offload,
            "max_memory": options.max_memory,
        } | more
        here: dict[str, Any] = {"on_gpu": self.on_gpu, "gpus": self.in_one_process}
        return plan_memory(config, self.gpus, self.limit, context=context, batch=rows, **asked, **here)

    @property
    def in_one_process(self) -> tuple[int, ...] | None:
        """Bytes of every GPU of this machine that a start of one process may fill; None elsewhere, and for several ranks."""
        return gpus_here() if self.here and self.gpus == 1 else None


def _dry(options: Any, machine: Machine, room: Room, why: str) -> DryRun:
    return DryRun(
        f"model     {options.model}\n"
        f"machine   {machine.what}\n"
        f"memory    {room.rows} rows of up to {room.context} tokens; {why}\n"
        f"answers   {options.sampling_in_words}; {options.num_samples} a problem and arm\n"
        f"folder    {options.folder}\n"
        "dry run: nothing was loaded or written"
    )


def look(options: Any, *, quiet: bool = False) -> Known:
    """Read configuration and tokenizer, and say how the model thinks. ValueError, in one line, for what cannot be read."""
    hub = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    config = read_config(options.model, **hub)
    tokenizer = read_tokenizer(options.model, **hub)
    ask_prompts(tokenizer, options, quiet=quiet)
    try:
        # By the name that the user gave, as a loaded model has it: plans and counts keep it.
        shape = dataclasses.replace(model_shape(skeleton(config, "bfloat16")), name=options.model)
    except ValueError:  # loading says it, if it is an error
        shape = None
    return Known(config=config, tokenizer=tokenizer, shape=shape)


def settle(
    options: OptionsT, known: Known, longest: int, ranks: Ranks, machine: Machine | None = None
) -> tuple[OptionsT, Room]:
    """The options with what they leave to the model and the machine: the longest answer, where the context has less room than
    the default, and the rows decoded together. Says what it chose.

    ``longest``: tokens of the longest prompt. A run that continues keeps its rows: they decide the last bits. Where this machine
    holds fewer, the room has those. ValueError, in one line, for an answer that the context does not hold, and where not even
    one row fits. DryRun where the user asked for no more than this.
    """
    options = _within_context(options, known, longest, ranks)
    if line := task_line(options):
        ranks.say(line)
    context = longest + options.token_limit
    if options.held_by:  # the server batches; these are asked for together
        options = asked_together(options)
        return options, Room(rows=options.rows, context=context)
    dry = getattr(options, "dry_run", False)
    if dry:
        machine = machine or Machine.of_options(options, ranks.world_size)
    if options.batch_size or options.is_lab:
        room = Room(rows=options.rows, context=context)
        if dry and machine:
            raise _dry(options, machine, room, _fits(options, known.config, machine, context)(room.rows, True).why)
        return options, room
    stored = ranks.broadcast(_stored_batch(Path(options.folder)) if ranks.is_main else None)
    machine = machine or Machine.of_ranks(ranks.world_size)
    fits = _fits(options, known.config, machine, context)
    rows, held = ranks.broadcast(_most_rows(fits, stored or BATCHES[0], machine.gpus))
    places = stored or (BATCHES[0] if held.planned else rows)
    more = f", and up to {places} where answers turn out shorter" if rows < places and held.planned else ""
    if stored is None:
        number = f"as many as fit up to {places}" if rows == places else f"as many as fit{more}"
        ranks.say(f"batch: {rows} rows of up to {context} tokens are decoded together, {number}; {held.why}")
    else:
        fewer = f", {rows} of them at once, which is what fits here{more}; {held.why}" if rows < stored else ""
        ranks.say(f"batch: {stored} rows, as this run began{fewer}")
    room = Room(rows=rows, context=context, stretches=held.planned and rows < places)
    if dry:
        raise _dry(options, machine, room, held.why)
    return dataclasses.replace(options, batch_size=places), room


def asked_together(options: OptionsT) -> OptionsT:
    """The options with the samples of a chunk on a server; a run that continues keeps its number."""
    rows = options.batch_size or _stored_batch(Path(options.folder)) or ASKED_TOGETHER
    return dataclasses.replace(options, batch_size=rows)


def _within_context(options: OptionsT, known: Known, longest: int, ranks: Ranks) -> OptionsT:
    if known.context is None or longest + options.token_limit <= known.context:
        return options
    room = known.context - longest
    of = f"the context of {options.model}, {known.context} tokens"
    if room < 1:
        raise ValueError(
            f"the longest prompt has {longest} tokens, which fills {of}: leave it out, or take another model"
        )
    if getattr(options, "max_new_tokens", 0) is not None:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in options.limited_by)
        raise ValueError(
            f"answers of {options.token_limit} tokens after prompts of up to {longest} do not fit {of}: {named} may be {room} at most"
        )
    ranks.say(f"answers: at most {room} new tokens, which is what {of}, leaves beside prompts of up to {longest}")
    return dataclasses.replace(options, max_new_tokens=room)


def _stored_batch(folder: Path) -> int | None:
    """The rows of the run that lies in the folder."""
    if not (folder / RUN_FILE).is_file():
        return None
    config = read_run(folder)["config"]
    found: int | None = config.get("batch_size") or config.get("sampling", {}).get("batch_size")
    return found


class _Held(NamedTuple):
    """What holds so many rows: the backend, and why it is that one, in words. ``planned``: memory was measured."""

    backend: str
    why: str
    planned: bool = True


def _most_rows(fits: Callable[[int, bool], _Held], most: int, ranks: int) -> tuple[int, _Held]:
    """(rows, what holds them) with which most rows are under way on all ranks, in GPUs alone if it can be. ValueError where not even one
    row fits."""
    tried = list(dict.fromkeys([most, *(number for number in BATCHES if number < most)]))
    held: dict[int, _Held] = {}

    def fitting(rows: int, rests: bool, backend: str = "") -> bool:
        try:
            held[rows] = held.get(rows) or fits(rows, rests)
        except ValueError:
            return False
        return backend in ("", held[rows].backend)

    # Many rows are worth less than weights that need not be copied for each token.
    for rests in (False, True):
        place = bisect.bisect_left(tried, True, key=lambda rows: fitting(rows, rests))
        if place == len(tried):
            continue
        rows = tried[place]
        fewest = tried[-1]
        # More rows may need a slower backend, whose ranks all decode the same ones: less than a few rows on each rank.
        if ranks > 1 and held[rows].backend == _SHARED and fitting(fewest, rests) and held[fewest].backend != _SHARED:
            backend = held[fewest].backend
            own = tried[bisect.bisect_left(tried, True, key=lambda rows: fitting(rows, rests, backend))]
            rows = own if own * ranks >= rows else rows
        return rows, held[rows]
    return 1, fits(1, True)


def _fits(options: HeldModel, config: Any, machine: Machine, context: int) -> Callable[[int, bool], _Held]:
    """(Rows, whether weights may rest in CPU memory unasked) -> what holds them; ValueError, with this command's own options in
    it, where nothing does."""

    def chosen(rows: int, rests: bool) -> _Held:
        where: tuple[Any, ...] = () if machine.here else (machine.limit, machine.on_gpu)
        more: dict[str, Any] = {"batch": rows, "context": context, "max_memory": options.max_memory, "rests": rests}
        try:
            backend, why = choose_backend(config, machine.gpus, options.dtype, options.offload, *where, **more)
        except ValueError as error:
            raise ValueError(in_own_words(str(error), rows)) from error
        if FITS not in why and rows > _UNPLANNED:
            raise ValueError(why)
        return _Held(backend, why, FITS in why)

    def asked(rows: int, _: bool) -> _Held:
        try:
            plan = machine.plan(options, config, rows, context)
        except Unplanned as error:
            if rows > _UNPLANNED:
                raise
            return _Held(options.backend, f"{options.backend}: asked for; {error}", False)
        found = next(item for item in plan.footprints if item.backend == options.backend)
        if not found.fits and rows > 1:  # one row is tried: the user named the backend
            raise ValueError(found.why_not)
        return _Held(options.backend, f"{options.backend}: asked for")

    check_name(options.backend)
    return chosen if options.backend == "auto" else asked
