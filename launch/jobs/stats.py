"""Routing statistics: traces through a model to counts, scores and pictures, in parts that survive an interruption."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expert_stats import (
    BASES,
    BY,
    MAX_Q,
    MISSING_MARKER,
    ZERO_JOINT,
    ExpertScores,
    MarkerSet,
    RoutingCounts,
    Trace,
    Unproven,
    evidence_sentence,
    family_lines,
    fresh_lines,
    interval_lines,
    scores_and_estimate,
    select_experts,
    sum_counts,
)
from expert_stats.causes import Causes
from expert_stats.evidence import Estimate
from expert_stats.rivals import Measures, Sources, rival_of
from launch.core.option_checks import check_counts
from launch.core.options import ELSEWHERE, MIN_SUPPORT, ModelOptions, TraceOptions, config_of
from launch.core.outcomes import graded_answers
from launch.core.ranks import Ranks
from launch.core.wiring import collect_over_ranks, counted, parse_coefficients, read_any_traces, references_for
from moe_steer.files import write_whole
from moe_steer.layers import model_shape
from moe_steer.tokens import POSITIONS, RICE_COEFFICIENTS, check_traces
from reasoning_evals.runs import digest, open_run

COUNTS, SCORES = "counts.safetensors", "scores.json"
_PARTS = "parts"
_SCORING = frozenset({"coefficients", "min_support", "by", "zero_joint", "missing_marker", "top"})
"""Options that the counts do not depend on: they may change between two starts."""


MARKERS = ("<think>", "</think>", "Alternatively", "Wait")


@dataclass(frozen=True, kw_only=True)
class CountingOptions(TraceOptions):
    """Which traces are counted, and how."""

    markers: tuple[str, ...] = MARKERS
    """Tags and words whose routing is counted, in all their token forms."""
    base: str = "generated"
    """Tokens that base rates are taken from: generated (as RICE), or all."""
    position: str = "input"
    """Routing while the marker is the input token (input), or where it is predicted (predicted)."""
    tokens_per_batch: int = 8192
    """Padded tokens of one forward pass."""

    def __post_init__(self) -> None:
        check_counts(self, ("tokens_per_batch",))
        _check_choice(self, "base", BASES)
        _check_choice(self, "position", POSITIONS)


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """How counts become scores."""

    coefficients: tuple[str, ...] = ()
    """What each marker counts for, as NAME=NUMBER; default <think>=1 </think>=-1 Alternatively=-1, others 0."""
    by: str = "npmi"
    """The score: npmi (markers with a tenth of any tokens mixed in: the same quantity at any number of traces), rice (the
    published formula) or risk (difference of selection rates at markers and elsewhere). With more files 'moe-steer score' has mass,
    norm, influence, contrast and causes (expert_stats/rivals/methods.py)."""
    zero_joint: str | None = None
    """Of --by rice: what a marker adds at which the expert never fired: minus_one (the limit of nPMI, the default), half (as if
    it had fired there half a time) or skip (nothing)."""
    min_support: int | None = None
    """Least number of joint selections; default a tenth of the marker's occurrences, at least 3."""
    missing_marker: str = "skip"
    """A marker that never occurred: skip (leave it out of the score), or error."""
    top: int = 10
    """Rows of the table to print."""

    def __post_init__(self) -> None:
        check_counts(self, ("top", "min_support"))
        _check_choice(self, "by", self.methods())
        if self.zero_joint is not None:
            _check_choice(self, "zero_joint", ZERO_JOINT)
            if self.by != "rice":
                raise ValueError(f"--zero-joint {self.zero_joint} is a rule of --by rice: leave it out, or give both")
        _check_choice(self, "missing_marker", MISSING_MARKER)
        parse_coefficients(self.coefficients)

    @staticmethod
    def methods() -> tuple[str, ...]:
        """What --by may name."""
        return (*BY, "risk")

    def sources(self) -> Sources:
        """What the score may read beside the counts."""
        return Sources()

    def score(self, counts: RoutingCounts, measured_on: RoutingCounts | None = None) -> ExpertScores:
        """The scores of the counts under these options."""
        return self.score_by(self.by, counts, self.sources(), measured_on)[0]

    def score_by(
        self, by: str, counts: RoutingCounts, sources: Sources, measured_on: RoutingCounts | None = None
    ) -> tuple[ExpertScores, Estimate]:
        """Scores by a method, and what they estimate. ValueError for what it lacks, and for options that it does not read."""
        if by not in (*BY, "risk") and (self.coefficients or self.min_support is not None):
            option = "--coefficients" if self.coefficients else "--min-support"
            raise ValueError(f"{option} is for scores at markers, and {by} is none: leave it out")
        return scores_and_estimate(
            counts,
            parse_coefficients(self.coefficients) or None,
            by=by if by in BY else BY[0],
            zero_joint=self.zero_joint,
            min_support=self.min_support,
            missing_marker=self.missing_marker,
            rival=rival_of(by, counts, sources),
            measured_on=measured_on,
        )


@dataclass(frozen=True, kw_only=True)
class RivalFiles:
    """Files that rivals of nPMI read."""

    measures: str | None = None
    """For mass, norm and influence: a file of 'moe-steer measure'."""
    graded: tuple[str, ...] = ()
    """For contrast: folders of runs whose answers were counted; they are graded again."""
    causes: str | None = None
    """For causes: a file of 'moe-steer causes'."""

    def sources(self) -> Sources:
        """What is in them."""

        return Sources(
            measures=Measures.load(self.measures) if self.measures else None,
            right=graded_answers(self.graded) if self.graded else None,
            causes=Causes.load(self.causes) if self.causes else None,
        )


@dataclass(frozen=True, kw_only=True)
class CollectOptions(ScoringOptions, CountingOptions, ModelOptions):
    """Count the routing of traces at reasoning markers, score every expert."""

    out: str
    """Folder of the statistics."""
    part: int = 256
    """Traces of a part: what an interruption costs at most."""

    def __post_init__(self) -> None:
        CountingOptions.__post_init__(self)
        ScoringOptions.__post_init__(self)
        check_counts(self, ("part",))
        given = parse_coefficients(self.coefficients)
        weights = {name: given.get(name, RICE_COEFFICIENTS.get(name, 0.0)) for name in self.markers}
        if not any(value > 0 for value in weights.values()):
            raise ValueError(f"no marker has a coefficient above 0 ({weights}): give one with --coefficients")
        for name in given:
            if name not in self.markers:
                raise ValueError(f"the coefficient of {name!r} belongs to no marker: add it to --markers")

    def config(self, traces: Sequence[Trace]) -> dict[str, Any]:
        """What the counts depend on."""

        content = digest([[trace.trace_id, trace.token_ids, trace.prompt_length] for trace in traces])
        return {
            "collect_stats": config_of(self, ELSEWHERE | _SCORING) | {"traces": len(traces), "traces_hash": content}
        }


def _check_choice(options: object, name: str, allowed: Sequence[str]) -> None:
    value = getattr(options, name)
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(allowed)}")


def run(options: CollectOptions, ranks: Ranks) -> None:
    """Count what is not counted yet, add up, score, draw."""
    from launch.core.session import load_asked

    model, tokenizer = load_asked(options, batch=1, context=None)
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
    if not ranks.broadcast((folder / COUNTS).is_file()):
        _count(options, ranks, model, tokenizer, markers, traces)
    if ranks.is_main:
        print(_publish(options, folder))


def _count(
    options: CollectOptions, ranks: Ranks, model: Any, tokenizer: Any, markers: Any, traces: Sequence[Trace]
) -> None:
    """counts.safetensors, by way of the counts of every part."""

    references = references_for(tokenizer, traces, markers)  # of all traces: parts with others would not add up
    parts = Path(options.out, _PARTS)
    starts = range(0, len(traces), options.part)
    files = [parts / f"{number:05d}.safetensors" for number in range(len(starts))]
    missing = ranks.broadcast([number for number, file in enumerate(files) if not file.is_file()])
    before = f", {len(files) - len(missing)} of them counted before" if len(missing) < len(files) else ""
    ranks.say(f"{len(traces)} traces, in parts of {options.part}: {len(files)}{before}")
    for number in missing:
        counts = collect_over_ranks(
            model,
            traces[starts[number] : starts[number] + options.part],
            markers,
            ranks,
            base=options.base,
            references=references,
            tokens_per_batch=options.tokens_per_batch,
        )
        if ranks.is_main:
            counts.save(files[number])
    if ranks.is_main:
        sum_counts(RoutingCounts.load(file) for file in files).save(Path(options.out, COUNTS))
        shutil.rmtree(parts)
    ranks.barrier()


def _publish(options: CollectOptions, folder: Path) -> str:
    """Write the scores and the pictures; returns the summary."""
    counts = RoutingCounts.load(folder / COUNTS)
    scores = options.score(counts)
    scores.save(folder / SCORES)
    pictures = _draw(scores, folder)
    return "\n".join(
        [
            counted(counts),
            scores.table(options.top),
            verdict(scores),
            f"wrote {folder / COUNTS}, {SCORES} and {', '.join(pictures)}; next: {next_plan(scores, folder / SCORES)}",
        ]
    )


def verdict(scores: ExpertScores) -> str:
    """What the evidence says of the best two, in a sentence; then intervals from problems that did not choose, what others rest on where that is little, and how far families of problems agree."""

    best = [(row.layer, row.expert) for row in scores.ranking()[:2]]
    first = evidence_sentence(scores, best, MAX_Q) if best else "UNPROVEN: no expert has support at a marker"
    return "\n".join([first, *fresh_lines(scores, best), *interval_lines(scores), *family_lines(scores)])


def next_plan(scores: ExpertScores, path: str | Path) -> str:
    """The command that makes a plan of the best two, with the word that it takes where they lack evidence; what to do instead
    where there are not two."""
    try:
        select_experts(scores, top=2, min_support=MIN_SUPPORT)
    except Unproven:
        return f"moe-steer plan --scores {path} --top 2 --gain 64 --out plan.json --unproven"
    except ValueError:
        return "count more traces: no two experts qualify for a plan"
    return f"moe-steer plan --scores {path} --top 2 --gain 64 --out plan.json"


def _draw(scores: ExpertScores, folder: Path) -> list[str]:
    """The names of the pictures."""
    from expert_stats import family_matrix, heat_map, rank_stability

    pictures = {"heatmap.svg": heat_map(scores)}
    if scores.ranking():
        pictures["stability.svg"] = rank_stability(scores)
    if len(scores.families["families"]) > 1:
        pictures["domains.svg"] = family_matrix(scores)
    for name, picture in pictures.items():
        write_whole(folder / name, picture)
    return list(pictures)
