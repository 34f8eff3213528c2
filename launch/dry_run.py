"""A start without the model: options, plan, problems, memory and machine are checked; no weight is read, nothing is written."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.core.beforehand import USUAL_PROMPT, Machine, look, settle
from launch.core.failure import in_own_words
from launch.core.options import RunOptions
from launch.core.ranks import Ranks
from launch.jobs.experts_options import Options
from moe_steer import SteeringPlan
from moe_steer.console import counted


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a model lies on a machine. ``total``, ``limit``: bytes on the fullest rank, and what tensors may fill there; ``total``
    is 0 where the memory cannot be planned, and ``reason`` says why."""

    backend: str
    reason: str
    total: int
    loading: int
    limit: int
    layers_with_experts: int
    experts_a_layer: int

    def __str__(self) -> str:
        from moe_steer.backends import gib

        experts = (
            f"{self.layers_with_experts} layers of {self.experts_a_layer} experts"
            if self.layers_with_experts
            else "a dense model"
        )
        if not self.total:
            return f"{self.backend} ({self.reason}); {experts}"
        return (
            f"{self.backend} ({self.reason}): {gib(self.total)} of {gib(self.limit)} GiB a rank, "
            f"{gib(self.loading)} GiB of CPU memory while loading; {experts}"
        )


def fit(
    options: RunOptions,
    plan: SteeringPlan | None,
    config: Any,
    machine: Machine,
    prompt: int = USUAL_PROMPT,
    rows: int = 0,
) -> Fit:
    """The plan against the model's shape, and the backend against the machine's memory, from the configuration alone.

    ``prompt``: tokens of the longest prompt; ``rows``: samples decoded together where there are fewer than ``options.rows``.
    ValueError says what does not fit.
    """
    from moe_steer.backends import Unplanned, check_name, choose_backend, gib, refusal, skeleton
    from moe_steer.layers import model_shape

    check_name(options.backend)
    shape = model_shape(skeleton(config, "bfloat16"))
    if plan is not None:
        plan.check(shape)
    rows, context = rows or options.rows, prompt + options.token_limit
    backend, reason = options.backend, "asked for"
    if backend == "auto":
        held = (options.dtype, options.offload, machine.limit, machine.on_gpu)
        asked: dict[str, Any] = {"max_memory": options.max_memory, "gpus": machine.in_one_process}
        backend, _ = choose_backend(config, machine.gpus, *held, batch=rows, context=context, prompt=prompt, **asked)
        reason = "the fastest that fits"
    if why_not := refusal(backend, config, machine.gpus):
        raise ValueError(f"backend {backend!r} cannot run this model: {why_not}")
    experts = {"layers_with_experts": len(shape.moe_layers), "experts_a_layer": shape.num_experts}
    try:
        offload = options.offload or ("cpu" if (options.backend, backend) == ("auto", "device_map") else "")
        found = machine.plan(options, config, rows, context, prompt=prompt, offload=offload)
    except Unplanned as error:  # says nothing against the start
        return Fit(backend=backend, reason=str(error), total=0, loading=0, limit=machine.limit, **experts)
    footprint = next(item for item in found.footprints if item.backend == backend)
    if footprint.why_not:
        raise ValueError(f"backend {backend!r} cannot run this job: {footprint.why_not}")
    if not footprint.fits:
        others = [item.backend for item in found.footprints if item.fits]
        change = f"use --backend {others[0]}" if others else in_own_words(found.advice, rows)
        raise ValueError(
            f"backend {backend!r} does not fit on {machine.what}: {gib(footprint.total)} of {gib(machine.limit)} GiB a rank; {change}"
        )
    return Fit(
        backend=backend,
        reason=reason,
        total=footprint.total,
        loading=footprint.loading,
        limit=machine.limit,
        **experts,
    )


def report(options: Options, ranks: Ranks) -> str:
    """What a start with these options would do, as lines; ValueError, as the start itself would raise it, where it cannot."""
    from launch.core.problem_sets import problem_sets
    from launch.core.wiring import markers_for, parse_coefficients
    from launch.jobs.experts import questions_of
    from launch.jobs.experts_options import check_kind, given_plan, inputs_of
    from moe_steer.backends import check_shards, resolve
    from reasoning_evals.runs import RUN_FILE, open_run

    plan = given_plan(options)
    sets = problem_sets(options)
    known = look(options, quiet=not ranks.is_main)
    check_kind(options, plan, known.shape)
    if Path(resolve(options.model)).is_dir():
        check_shards(resolve(options.model))
    if plan is None or plan.experts:
        markers_for(known.tokenizer, options.markers, parse_coefficients(options.coefficients))
    machine = Machine.of_options(options, ranks.world_size)
    prompt = known.longest_prompt(questions_of(sets))
    elsewhere = bool(options.gpus)
    options, room = settle(
        dataclasses.replace(options, dry_run=False, gpus=None, gpu_gib=None), known, prompt, Ranks(), machine
    )
    work = _work(options, plan, [len(part) for part in sets])
    found = fit(options, plan, known.config, machine, prompt, min(room.rows, max(work.values())))
    if options.offload not in ("", "cpu") and not elsewhere and not Path(options.offload).is_dir():
        raise ValueError(
            f"offload names no folder: {options.offload!r}: give 'cpu' or an existing folder on a local NVMe disk"
        )
    folder = Path(options.folder)
    started = (folder / RUN_FILE).exists()
    if started:
        open_run(folder, options.config() | inputs_of(options, plan))
    numbers = f", {len(plan.top_k)} top_k" if plan and plan.top_k else ""
    experts = (
        f"{counted(len(plan.experts), 'expert')}, {counted(len(plan.residual), 'vector')}{numbers}, fits the model"
        if plan
        else "to be found"
    )
    return "\n".join(
        [
            f"model     {options.model} ({known.config.model_type})",
            f"machine   {machine.what}",
            f"backend   {found}" + (f"; weights rest in {options.offload}" if options.offload else ""),
            f"plan      {experts}",
            f"problems  {options.problems}: "
            + ", ".join(f"{len(part)} {name}" for name, part in sets._asdict().items()),
            f"prompts   at most {prompt} tokens, answers at most {options.token_limit}",
            "samples   " + ", ".join(f"{number} {step}" for step, number in work.items()),
            f"folder    {folder}, {'which is continued' if started else 'new'}",
            f"start     {_start(ranks)}",
            "dry run: nothing was loaded or written",
        ]
    )


def _work(options: Options, plan: SteeringPlan | None, sizes: list[int]) -> dict[str, int]:
    """Samples of each step."""
    from launch.jobs.experts import CALIBRATION

    identification, tuning, test = sizes
    k = options.num_samples
    if plan is not None:
        if not plan.experts:
            return {"test": test * 2 * k}
        return {"calibration": min(CALIBRATION, test), "test": test * 3 * k}
    sweep = tuning * (len(options.gains) + 1) * k if len(options.gains) > 1 else 0
    return {"identification": identification, "tuning": sweep, "test": test * 3 * k}


def _start(ranks: Ranks) -> str:
    """Who started this process, in words."""
    if ranks.world_size == 1:
        return "one process"
    nodes, node = os.environ.get("CROSS_SIZE", "1"), os.environ.get("CROSS_RANK", "0")
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return f"{ranks.world_size} ranks on {nodes} node{'s' * (nodes != '1')} (this is node {node}), meeting at {where}"
