"""Which experts think: traces through a model to counts, scores and pictures, in one folder.

    deepspeed launch/collect_stats.py --traces runs/lab/identification --out runs/lab-stats
    deepspeed --num_gpus 8 launch/collect_stats.py --model PATH_OR_HUB_ID --traces traces.jsonl --out runs/stats

The traces are taken in parts, each of which leaves its counts behind: stopped and started again, it goes on with the first
part that is missing, on any number of ranks.

Exit code 0: done; 1: the work failed, one line says why; 2: wrong usage.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.ranks import Ranks, leave
from launch.shared_options import (
    ELSEWHERE,
    Backend,
    Dtype,
    LocalRank,
    Offload,
    Revision,
    TrustRemoteCode,
    check_counts,
    config_of,
    load_asked,
)
from launch.start import start

if TYPE_CHECKING:
    from expert_stats import ExpertScores, Trace

COUNTS, SCORES = "counts.safetensors", "scores.json"
PICTURES = ("heatmap.svg", "stability.svg")
_PARTS = "parts"
_SCORING = frozenset({"coefficients", "min_support", "zero_joint", "missing_marker", "top"})
"""Options that the counts do not depend on: they may change between two starts."""


@dataclass(frozen=True, kw_only=True)
class CollectOptions:
    """Count the routing of traces at reasoning markers, score every expert."""

    traces: tuple[str, ...]
    """Trace files, generations*.jsonl files, or folders of runs."""
    out: str
    """Folder of the statistics."""
    arm: str | None = None
    """Of runs of several arms, the one whose answers are read."""
    model: str = "lab"
    """Model folder, hub id, or 'lab' for the embedded mixture-of-experts model."""
    markers: tuple[str, ...] = ("<think>", "</think>", "Alternatively")
    """Tags and words whose routing is counted, in all their token forms."""
    base: str = "generated"
    """Tokens that base rates are taken from: generated (as RICE), or all."""
    position: str = "input"
    """Routing while the marker is the input token (input), or where it is predicted (predicted)."""
    coefficients: tuple[str, ...] = ()
    """What each marker counts for, as NAME=NUMBER; default <think>=1 </think>=-1 Alternatively=-1."""
    zero_joint: str = "half"
    """What a marker adds at which the expert never fired: half, skip or minus_one; see moe-steer score --help."""
    min_support: int | None = None
    """Least number of joint selections; default a tenth of the marker's occurrences, at least 3."""
    missing_marker: str = "skip"
    """A marker that never occurred: skip (leave it out of the score), or error."""
    top: int = 10
    """Rows of the table to print."""
    part: int = 256
    """Traces of a part: what an interruption costs at most."""
    tokens_per_batch: int = 8192
    """Padded tokens of one forward pass."""
    backend: Backend = "auto"
    offload: Offload = ""
    dtype: Dtype = "auto"
    revision: Revision = None
    trust_remote_code: TrustRemoteCode = False
    local_rank: LocalRank = 0

    def __post_init__(self) -> None:
        from expert_stats import BASES, MISSING_MARKER, ZERO_JOINT
        from launch.wiring import parse_coefficients
        from moe_steer.tokens import POSITIONS, RICE_COEFFICIENTS

        check_counts(self, ("top", "part", "tokens_per_batch", "min_support"))
        allowed_values = (
            ("zero_joint", ZERO_JOINT),
            ("missing_marker", MISSING_MARKER),
            ("base", BASES),
            ("position", POSITIONS),
        )
        for name, allowed in allowed_values:
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        given = parse_coefficients(self.coefficients)
        weights = {name: given.get(name, RICE_COEFFICIENTS.get(name, 0.0)) for name in self.markers}
        if not any(value > 0 for value in weights.values()):
            raise ValueError(f"no marker has a coefficient above 0 ({weights}): give one with --coefficients")
        for name in given:
            if name not in self.markers:
                raise ValueError(f"the coefficient of {name!r} belongs to no marker: add it to --markers")

    def config(self, traces: Sequence[Trace]) -> dict[str, Any]:
        """What the counts depend on."""
        from reasoning_evals.runs import digest

        content = digest([[trace.trace_id, trace.token_ids, trace.prompt_length] for trace in traces])
        return {
            "collect_stats": config_of(self, ELSEWHERE | _SCORING) | {"traces": len(traces), "traces_hash": content}
        }


def main(argv: Sequence[str] | None = None, program: str = "collect_stats.py") -> int:
    """Parse, run, report; returns the exit code."""
    return start(CollectOptions, run, argv, program, __doc__)


def run(options: CollectOptions, ranks: Ranks) -> None:
    """Count what is not counted yet, add up, score, draw."""
    from expert_stats import MarkerSet
    from launch.wiring import read_any_traces
    from moe_steer.layers import model_shape
    from moe_steer.tokens import check_traces
    from reasoning_evals.runs import open_run

    model, tokenizer = load_asked(options)
    if not model_shape(model).moe_layers:
        raise ValueError(
            f"{options.model} is a dense model and has no experts to count: contrast its residual stream with 'moe-steer direction'"
        )
    markers = MarkerSet.from_tokenizer(tokenizer, options.markers, position=options.position)
    traces = sorted(read_any_traces(options.traces, tokenizer, options.arm), key=lambda trace: trace.trace_id)
    check_traces(traces)  # all of them, before the first part is counted
    folder = Path(options.out)
    if ranks.is_main:
        open_run(folder, options.config(traces))
    ranks.barrier()
    if not ranks.agree((folder / COUNTS).is_file()):
        _count(options, ranks, model, markers, traces)
    if ranks.is_main:
        print(_publish(options, folder))


def _count(options: CollectOptions, ranks: Ranks, model: Any, markers: Any, traces: Sequence[Trace]) -> None:
    """counts.safetensors, by way of the counts of every part."""
    from expert_stats import RoutingCounts, sum_counts
    from launch.sharded import collect_over_ranks

    parts = Path(options.out, _PARTS)
    starts = range(0, len(traces), options.part)
    files = [parts / f"{number:05d}.safetensors" for number in range(len(starts))]
    missing = ranks.agree([number for number, file in enumerate(files) if not file.is_file()])
    before = f", {len(files) - len(missing)} of them counted before" if len(missing) < len(files) else ""
    ranks.say(f"{len(traces)} traces, in parts of {options.part}: {len(files)}{before}")
    for number in missing:
        counts = collect_over_ranks(
            model,
            traces[starts[number] : starts[number] + options.part],
            markers,
            ranks,
            base=options.base,
            tokens_per_batch=options.tokens_per_batch,
            progress=ranks.is_main and sys.stderr.isatty(),
        )
        if ranks.is_main:
            counts.save(files[number])
    if ranks.is_main:
        sum_counts(RoutingCounts.load(file) for file in files).save(Path(options.out, COUNTS))
        shutil.rmtree(parts)
    ranks.barrier()


def _publish(options: CollectOptions, folder: Path) -> str:
    """Write the scores and the pictures; returns the summary."""
    from expert_stats import RoutingCounts, score_experts
    from launch.wiring import counted, parse_coefficients

    counts = RoutingCounts.load(folder / COUNTS)
    scores = score_experts(
        counts,
        parse_coefficients(options.coefficients) or None,
        zero_joint=options.zero_joint,
        min_support=options.min_support,
        missing_marker=options.missing_marker,
    )
    scores.save(folder / SCORES)
    _draw(scores, folder)
    return "\n".join(
        [
            counted(counts),
            scores.table(options.top),
            f"wrote {folder / COUNTS}, {SCORES} and {', '.join(PICTURES)}; "
            f"next: moe-steer plan --scores {folder / SCORES} --top 2 --gain 64 --out plan.json",
        ]
    )


def _draw(scores: ExpertScores, folder: Path) -> None:
    from expert_stats import heat_map, rank_stability
    from moe_steer.files import write_text

    write_text(folder / PICTURES[0], heat_map(scores))
    if scores.ranking():
        write_text(folder / PICTURES[1], rank_stability(scores))


if __name__ == "__main__":
    leave(main())
