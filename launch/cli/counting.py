"""``moe-steer collect``: traces through a model -> routing counts. ``moe-steer score``: routing counts -> nPMI scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from expert_stats import BY, MarkerSet, RoutingCounts, count_routed, sum_counts
from expert_stats.rivals import METHODS
from launch.core.options import ModelOptions
from launch.core.served.checking import count_served
from launch.core.served.connection import Connection
from launch.core.served.server_options import JobServerOptions
from launch.core.wiring import collect_over_ranks, counted, read_any_traces, read_routed, references_for
from launch.jobs.stats import CountingOptions, RivalFiles, ScoringOptions, next_plan, verdict
from moe_steer.tokens import check_traces

if TYPE_CHECKING:
    from launch.core.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Collect(CountingOptions, JobServerOptions, ModelOptions):
    """Count which experts the router selects at reasoning markers, over traces run through a model.

    Long collections that can be interrupted, and several ranks: deepspeed --num_gpus 8 launch/collect_stats.py ...
    """

    traces: tuple[str, ...] = ()
    """Trace files, generations*.jsonl files, or folders of runs; or --routed."""
    routed: tuple[str, ...] = ()
    """In place of --traces: files or folders of responses with the routing that their engine recorded (routed_experts of vLLM,
    SGLang and training frameworks; JSON, JSON lines, parquet; expert_stats/rollouts.py has the forms). No weights are loaded."""
    out: str
    """Counts file to write (safetensors)."""
    add_to: tuple[str, ...] = ()
    """Counts files of other shards of the same model and markers, added to the result."""

    def run(self) -> int:
        """Write the counts and say what was counted."""
        self._check_source()
        from launch.core.ranks import ranks_of_this_run

        with ranks_of_this_run() as ranks:
            self._collect(ranks)
        return 0

    def _collect(self, ranks: Ranks) -> None:

        from launch.core.session import load_asked

        earlier = [RoutingCounts.load(path) for path in self.add_to]
        if self.routed:
            self._finish(self._recorded(earlier), earlier)
            return
        if self.endpoint:
            self._finish(self._served(earlier), earlier)
            return
        model, tokenizer = load_asked(self, batch=1, context=None)
        markers = MarkerSet.from_tokenizer(tokenizer, self.markers, position=self.position)
        traces = read_any_traces(self.traces, tokenizer, self.arm)
        references = _known(earlier) or references_for(tokenizer, traces, markers)
        counts = collect_over_ranks(
            model,
            traces,
            markers,
            ranks,
            base=self.base,
            references=references,
            tokens_per_batch=self.tokens_per_batch,
            add_to=earlier,
        )
        if ranks.is_main:
            self._finish(counts, earlier)

    def _check_source(self) -> None:
        if bool(self.traces) == bool(self.routed):
            raise ValueError(
                "give --traces, or --routed with responses whose routing an engine recorded: one of the two"
            )
        forward = ("backend", "dtype", "offload", "max_memory", "tokens_per_batch")
        given = [name for name in ("arm", "endpoint", *forward) if getattr(self, name) != getattr(type(self), name)]
        if self.routed and given:
            raise ValueError(
                f"--{given[0].replace('_', '-')} is for a forward pass, and --routed needs none: leave it out"
            )
        if self.endpoint and self.tokens_per_batch != type(self).tokens_per_batch:
            raise ValueError(
                "--tokens-per-batch is for a forward pass here, and the server makes its own: leave it out"
            )

    def _served(self, earlier: Sequence[RoutingCounts]) -> RoutingCounts:
        """The counts of --traces from the routing that a server records while it reads them."""
        from launch.core.beforehand import look

        known = look(self)
        if known.shape is None or not known.shape.moe_layers:
            raise ValueError(f"{self.model} has no experts by its configuration: there is no routing to count")
        markers = MarkerSet.from_tokenizer(known.tokenizer, self.markers, position=self.position)
        traces = read_any_traces(self.traces, known.tokenizer, self.arm)
        check_traces(traces)
        references = _known(earlier) or references_for(known.tokenizer, traces, markers)
        connection = Connection.to(self)
        print(connection.line)
        return count_served(
            connection, traces, known.shape, markers, base=self.base, references=references, add_to=earlier
        )

    def _recorded(self, earlier: Sequence[RoutingCounts]) -> RoutingCounts:
        """The counts of --routed, from the model's configuration and tokenizer alone."""
        from launch.core.beforehand import look

        known = look(self)
        if known.shape is None:
            raise ValueError(
                f"the layers of {self.model} cannot be told from its configuration: count its traces with --traces"
            )
        markers = MarkerSet.from_tokenizer(known.tokenizer, self.markers, position=self.position)
        if not known.shape.moe_layers:
            raise ValueError(f"{self.model} is a dense model: there is no routing to count")
        source = (self.routed, known.tokenizer, known.shape)
        references = _known(earlier) or references_for(
            known.tokenizer, (item.trace for item in read_routed(*source)), markers
        )
        return count_routed(
            read_routed(*source), known.shape, markers, base=self.base, references=references, add_to=earlier
        )

    def _finish(self, counts: RoutingCounts, earlier: Sequence[RoutingCounts]) -> None:

        for other in earlier:
            counts = counts + other
        counts.save(self.out)
        print(counted(counts))
        print(f"wrote {self.out}; next: moe-steer score --counts {self.out} --out scores.json")


def _known(earlier: Sequence[RoutingCounts]) -> dict[int, str]:
    """The reference tokens of counts to add to: counts with others would not add up."""
    found = earlier[0].references if earlier else None
    return dict(zip(found.tokens, found.texts, strict=True)) if found else {}


@dataclass(frozen=True, kw_only=True)
class Score(RivalFiles, ScoringOptions):
    """Score every expert by nPMI between its routing and the markers (RICE, Eq. 2-6), or by a rival, with intervals and evidence."""

    counts: tuple[str, ...]
    """Counts files; several are added up first."""
    out: str
    """Score file to write (JSON)."""
    measure_on: tuple[str, ...] = ()
    """Counts files of other problems: what --counts chooses is measured there. Without them half of the problems measures what the
    other half chooses."""
    heatmap: str | None = None
    """Also draw layers x experts as an SVG file."""

    @staticmethod
    def methods() -> tuple[str, ...]:
        return METHODS

    def run(self) -> int:
        """Write the scores and print the best."""

        readers = {"measures": ("mass", "norm", "influence"), "graded": ("contrast",), "causes": ("causes",)}
        for option, methods in readers.items():
            if getattr(self, option) and self.by not in methods:
                raise ValueError(f"--{option} is for --by {' or '.join(methods)}: leave it out, or score by it")
        if self.measure_on and self.by not in (*BY, "risk"):
            raise ValueError(f"--measure-on is for --by {', '.join(BY)} or risk, which counts alone tell: leave it out")
        measured_on = summed(self.measure_on, "--measure-on") if self.measure_on else None
        scores = self.score(summed(self.counts), measured_on)
        scores.save(self.out)
        print(scores.table(self.top))
        print(verdict(scores))
        stability = ", ".join(f"{key} {value:.2f}" for key, value in scores.stability.items())
        print(f"agreement of two halves of the problems: {stability}")
        if self.heatmap:
            from expert_stats import heat_map

            Path(self.heatmap).write_text(heat_map(scores), encoding="utf-8")
        print(f"wrote {self.out}; next: {next_plan(scores, self.out)}")
        return 0


def summed(paths: Sequence[str], option: str = "--counts") -> RoutingCounts:
    """The sum of counts files. ValueError where the same counts are named twice."""

    contents = [Path(path).read_bytes() if Path(path).is_file() else path for path in paths]
    if len(set(contents)) < len(contents):
        raise ValueError(f"{option} {' '.join(paths)}: the same counts are named twice; give each file once")
    return sum_counts(RoutingCounts.load(path) for path in paths)
