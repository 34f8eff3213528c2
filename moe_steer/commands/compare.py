"""``moe-steer compare``: graded runs -> paired comparison."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare arms problem by problem: paired differences in accuracy and tokens, with intervals and a verdict in words."""

    baseline: str
    """Run folder that holds the baseline arm."""
    arm: tuple[str, ...] = ()
    """Run folders of the other arms; none when the baseline's folder holds them all."""
    baseline_arm: str = "baseline"
    """Name of the baseline arm."""
    out: str | None = None
    """Comparison file to write (JSON)."""

    def run(self) -> int:
        """Print the arms and the verdicts."""
        from pathlib import Path

        from reasoning_evals import compare_arms
        from reasoning_evals.grading_pass import grade_run
        from reasoning_evals.whole_files import write_whole

        rows = [row for folder in (self.baseline, *self.arm) for row in grade_run(folder)]
        comparison = compare_arms(rows, baseline=self.baseline_arm)
        print(f"{comparison.num_problems} problems x {comparison.num_samples} samples")
        for one in comparison.arms:
            tokens = f", {one.thinking_tokens.mean:.1f} thinking tokens" if one.thinking_tokens else ""
            interval = f"{100 * one.accuracy.low:.1f} to {100 * one.accuracy.high:.1f}"
            print(
                f"{one.name}: {100 * one.accuracy.mean:.1f}% correct (95% interval {interval}){tokens}, {100 * one.truncated:.1f}% truncated"
            )
        for pair in comparison.pairs:
            print(pair.sentence)
        if self.out:
            target = Path(self.out)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, comparison.to_json())
            print(f"wrote {self.out}")
        return 0
