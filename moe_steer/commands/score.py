"""``moe-steer score``: routing counts -> nPMI scores."""

from __future__ import annotations

from dataclasses import dataclass


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

        from expert_stats import RoutingCounts, score_experts
        from expert_stats.counts import sum_counts
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
            from expert_stats.plots import heat_map

            Path(self.heatmap).write_text(heat_map(scores), encoding="utf-8")
        print(f"wrote {self.out}; next: moe-steer plan --scores {self.out} --top 2 --gain 64 --out plan.json")
        return 0
