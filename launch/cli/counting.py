"""``moe-steer collect``: traces through a model -> routing counts.

``moe-steer score``: routing counts -> nPMI scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Collect:
    """Count which experts the router selects at reasoning markers, over traces run through a model.

    Long collections that can be interrupted, and several ranks: deepspeed --num_gpus 8 launch/collect_stats.py ...
    """

    traces: tuple[str, ...]
    """Trace files, generations*.jsonl files, or folders of runs."""
    arm: str | None = None
    """Of runs of several arms, the one whose answers are read."""
    out: str
    """Counts file to write (safetensors)."""
    model: str = "lab"
    """Model folder, hub id, or 'lab' for the embedded mixture-of-experts model."""
    markers: tuple[str, ...] = ("<think>", "</think>", "Alternatively")
    """Tags and words whose routing is counted, in all their token forms."""
    base: str = "generated"
    """Tokens that base rates are taken from: generated (as RICE), or all."""
    position: str = "input"
    """Routing while the marker is the input token (input), or where it is predicted (predicted)."""
    add_to: tuple[str, ...] = ()
    """Counts files of other shards of the same model and markers, added to the result."""
    tokens_per_batch: int = 8192
    """Padded tokens of one forward pass."""
    backend: str = "auto"
    """How the model is held; see moe_steer.load_model."""
    dtype: str = "auto"
    """Precision: auto (as stored), float32, bfloat16 or float16."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""

    def run(self) -> int:
        """Write the counts and say what was counted."""
        from launch.ranks import ranks_of_this_run

        with ranks_of_this_run() as ranks:
            self._collect(ranks)
        return 0

    def _collect(self, ranks: Ranks) -> None:
        import sys

        from expert_stats import MarkerSet, RoutingCounts
        from launch.sharded import collect_over_ranks
        from launch.wiring import counted, read_any_traces
        from moe_steer.loading import load_model

        earlier = [RoutingCounts.load(path) for path in self.add_to]
        model, tokenizer = load_model(
            self.model, self.backend, dtype=self.dtype, trust_remote_code=self.trust_remote_code
        )
        markers = MarkerSet.from_tokenizer(tokenizer, self.markers, position=self.position)
        traces = read_any_traces(self.traces, tokenizer, self.arm)
        counts = collect_over_ranks(
            model,
            traces,
            markers,
            ranks,
            base=self.base,
            tokens_per_batch=self.tokens_per_batch,
            progress=ranks.is_main and sys.stderr.isatty(),
        )
        if not ranks.is_main:
            return
        for other in earlier:
            counts = counts + other
        counts.save(self.out)
        print(counted(counts))
        print(f"wrote {self.out}; next: moe-steer score --counts {self.out} --out scores.json")


@dataclass(frozen=True, kw_only=True)
class Score:
    """Score every expert by nPMI between its routing and the markers (RICE, Eq. 2-6), with support, interval and null."""

    counts: tuple[str, ...]
    """Counts files; several are added up first."""
    out: str
    """Score file to write (JSON)."""
    coefficients: tuple[str, ...] = ()
    """What each marker counts for, as NAME=NUMBER; default <think>=1 </think>=-1 Alternatively=-1."""
    zero_joint: str = "half"
    """What a marker adds at which the expert never fired: half (as if it had fired there half a time), skip (nothing) or minus_one (the limit of nPMI)."""
    min_support: int | None = None
    """Least number of joint selections; default a tenth of the marker's occurrences, at least 3."""
    missing_marker: str = "error"
    """A marker that never occurred: error, or skip (leave it out of the score)."""
    heatmap: str | None = None
    """Also draw layers x experts as an SVG file."""
    top: int = 10
    """Rows of the table to print."""

    def run(self) -> int:
        """Write the scores and print the best."""
        from pathlib import Path

        from expert_stats import RoutingCounts, score_experts, sum_counts
        from launch.wiring import parse_coefficients

        contents = [Path(path).read_bytes() if Path(path).is_file() else path for path in self.counts]
        if len(set(contents)) < len(contents):
            raise ValueError(
                f"--counts {' '.join(self.counts)}: the same counts stand there twice; give each file once"
            )
        counts = sum_counts(RoutingCounts.load(path) for path in self.counts)
        scores = score_experts(
            counts,
            parse_coefficients(self.coefficients) or None,
            zero_joint=self.zero_joint,
            min_support=self.min_support,
            missing_marker=self.missing_marker,
        )
        scores.save(self.out)
        print(scores.table(self.top))
        stability = ", ".join(f"{key} {value:.2f}" for key, value in scores.stability.items())
        print(f"agreement of two halves of the traces: {stability}")
        if self.heatmap:
            from expert_stats import heat_map

            Path(self.heatmap).write_text(heat_map(scores), encoding="utf-8")
        print(f"wrote {self.out}; next: moe-steer plan --scores {self.out} --top 2 --gain 64 --out plan.json")
        return 0
