"""``moe-steer power``: how many problems and samples an effect needs.

``moe-steer compare``: graded runs -> paired comparison.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from moe_steer.console import aligned, counted
from moe_steer.files import write_whole
from reasoning_evals import comparing, runs


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare arms problem by problem: paired differences in accuracy and tokens, with intervals and a verdict in words."""

    baseline: str
    """Run folder that holds the baseline arm."""
    arm_folder: tuple[str, ...] = ()
    """Run folders of the other arms; none when the baseline's folder holds them all."""
    baseline_arm: str = "baseline"
    """Name of the baseline arm."""
    caps: tuple[int, ...] = ()
    """Token limits, such as 1024 4096 16384: the same samples are also read cut at each, to say whether a gain is one in finishing."""
    out: str | None = None
    """Comparison file to write (JSON)."""

    renamed: ClassVar = {"--arm": "--arm-folder"}

    def run(self) -> int:
        """Print the arms and the verdicts."""

        from reasoning_evals import compare_arms

        rows = rows_of_folders((self.baseline, *self.arm_folder))
        comparison = compare_arms(rows, baseline=self.baseline_arm)
        capped = comparing.at_caps(rows, self.caps, self.baseline_arm)
        print(f"{counted(comparison.num_problems, 'problem')} x {counted(comparison.num_samples, 'sample')}")
        for one in comparison.arms:
            tokens = f", {one.thinking_tokens.mean:.1f} thinking tokens" if one.thinking_tokens else ""
            interval = f"{100 * one.accuracy.low:.1f} to {100 * one.accuracy.high:.1f}"
            print(
                f"{one.name}: {100 * one.accuracy.mean:.1f}% correct (95% interval {interval}){tokens}, {100 * one.truncated:.1f}% never closed their thought"
            )
        for note in comparing.unanswered_notes(rows):
            print(note)
        for pair in comparison.pairs:
            print(pair.sentence)
        if capped:
            print("\n".join(["", "The same samples, cut at each limit", *comparing.cap_lines(capped)]))
        if self.out:
            values = comparison.to_dict() | ({"caps": [one.to_dict() for one in capped]} if capped else {})
            text = json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
            write_whole(self.out, text + "\n")
            print(f"wrote {self.out}")
        return 0


def rows_of_folders(folders: Sequence[str]) -> list[runs.GradeRow]:
    """The grades of all folders. An arm whose name an earlier folder has goes by the name of its folder, and a line says so.

    ValueError where that does not tell them apart: one folder given twice, or two folders of one name.
    """

    places = [Path(folder).resolve() for folder in folders]
    if twice := [folder for folder, place in zip(folders, places, strict=True) if places.count(place) > 1]:
        raise ValueError(f"the run folder {twice[0]} is given twice: give every run once")
    found: list[runs.GradeRow] = []
    for folder in folders:
        rows = runs.grade_run(folder)
        taken, own = {row.arm for row in found}, list(dict.fromkeys(row.arm for row in rows))
        name = Path(folder).resolve().name
        names = {arm: name if len(own) == 1 else f"{name}/{arm}" for arm in own if arm in taken}
        for arm, new in names.items():
            if new in taken or new in own:
                raise ValueError(
                    f"{folder} and an earlier folder both call an arm {arm!r}: sample one of them again with --arm-name OTHER"
                )
            print(
                f"two runs call an arm {arm!r}: that of {folder} is named {new!r} here (generate names one with --arm-name)"
            )
        found += [dataclasses.replace(row, arm=names.get(row.arm, row.arm)) for row in rows]
    for note in sampling_notes(folders):
        print(note)
    return found


def sampling_notes(folders: Sequence[str | Path]) -> list[str]:
    """A sentence for every run that was sampled in another way than the first: what is compared is that difference too."""

    rules = [runs.read_run(Path(folder))["config"]["sampling"] for folder in folders]
    notes = []
    for folder, rule in zip(folders[1:], rules[1:], strict=True):
        drawn = not (rule["greedy"] and rules[0]["greedy"])
        names = ("greedy", *(("temperature", "top_p", "top_k") if drawn else ()), "max_new_tokens")
        if others := [name for name in names if rule[name] != rules[0][name]]:
            this, first = (", ".join(f"{name} {one[name]}" for name in others) for one in (rule, rules[0]))
            notes.append(
                f"NOTE: {folder} was sampled with {this}, and {folders[0]} with {first}: a difference may come from that"
            )
    return notes


@dataclass(frozen=True, kw_only=True)
class Power:
    """Say how many problems and samples an effect needs, from a baseline run or from numbers; no model is loaded."""

    baseline: str | None = None
    """Run folder with a baseline arm, best with several samples a problem; or give --noise."""
    baseline_arm: str = "baseline"
    """Name of the baseline arm."""
    arm: str | None = None
    """Name of another arm on the same problems: the spread of the effect is then measured, not assumed."""
    arm_folder: str | None = None
    """Run folder of that arm, if it is another one."""
    noise: float | None = None
    """E p(1-p) of one arm, in place of a baseline run: 0.25 at most, about 0.10 for a strong model on AIME."""
    effect_sd: float = 0.1
    """Spread of the true effect over problems, as a share (w); not used where it is measured."""
    points: tuple[float, ...] = (2.0, 5.0, 10.0)
    """Effects to look for, in percentage points."""
    samples: tuple[int, ...] = (1, 4, 8, 16, 32, 64)
    """Samples a problem."""
    problems: tuple[int, ...] = ()
    """Numbers of problems; default the baseline's, else 30, 60, 198 and 500."""
    power: float = 0.8
    """Chance with which a true effect is to be shown."""
    alpha: float = 0.05
    """Level of the two-sided test, of all arms together."""
    num_arms: int = 1
    """Arms that will be compared with the baseline at once: each verdict then has alpha / num-arms, Holm's first threshold."""
    out: str | None = None
    """JSON file to write."""

    def run(self) -> int:
        """Print the tables."""

        assumptions, size = self._assumptions()
        plan = comparing.plan_power(
            assumptions,
            effects=[points / 100 for points in self.points],
            samples=self.samples,
            problems=self.problems or ((size[0],) if size else (30, 60, 198, 500)),
            target_power=self.power,
            alpha=self.alpha,
            num_arms=self.num_arms,
        )
        self._print(plan)
        if size:
            self._print_run(assumptions, *size)
        if self.out:
            write_whole(self.out, json.dumps(plan.to_dict(), indent=1) + "\n")
            print(f"wrote {self.out}")
        return 0

    def _assumptions(self) -> tuple[comparing.Assumptions, tuple[int, int] | None]:
        """And problems and samples of the baseline, where there is one and no two of its problems share a cluster."""

        if (self.baseline is None) == (self.noise is None):
            raise ValueError("give either --baseline RUN or --noise E, the mean of p(1-p) of one arm (0.25 at most)")
        if self.baseline is None:
            assert self.noise is not None
            if not 0 <= self.noise <= 0.25:
                raise ValueError(f"--noise must be in [0, 0.25], got {self.noise}: it is the mean of p(1-p) of one arm")
            if not 0 <= self.effect_sd <= 1:
                raise ValueError(
                    f"--effect-sd must be in [0, 1], got {self.effect_sd:g}: it is a spread of shares, 0.1 is 10 points"
                )
            if self.noise == self.effect_sd == 0:
                raise ValueError("--noise 0 and --effect-sd 0 leave nothing that varies: give one of them above 0")
            if self.arm or self.arm_folder:
                raise ValueError("--arm and --arm-folder need --baseline: give the baseline run instead of --noise")
            given = comparing.Assumptions(
                noise=2 * self.noise,
                effect_variance=self.effect_sd**2,
                noise_source="as given",
                effect_source="assumed",
            )
            return given, None
        if self.arm_folder and not self.arm:
            raise ValueError("--arm-folder needs --arm, the name of the arm to measure")
        if self.arm == self.baseline_arm and not self.arm_folder:
            raise ValueError(f"--arm {self.arm} is the baseline itself: name another arm")
        rows = runs.grade_run(self.baseline)
        table = _table(rows, self.baseline_arm)
        size = (len(table), len(next(iter(table.values()))))
        rate = sum(sum(values) for values in table.values()) / (size[0] * size[1])
        print(
            f"{self.baseline_arm}: {counted(size[0], 'problem')} x {counted(size[1], 'sample')}, {100 * rate:.1f}% correct"
        )
        if shared := comparing.cluster_names({row.problem_id: row.cluster_id for row in rows}):
            print(
                f"NOTE: the {size[0]} problems lie in {len(set(shared))} clusters, and those that share one count for less than these "
                "tables say: what this run could show, moe-steer compare says"
            )
        if self.arm is None:
            return comparing.assume_from_baseline(list(table.values()), self.effect_sd), None if shared else size
        other = _table(runs.grade_run(self.arm_folder) if self.arm_folder else rows, self.arm)
        for note in sampling_notes([self.baseline, self.arm_folder] if self.arm_folder else ()):
            print(note)
        if other.keys() != table.keys():
            raise ValueError(
                f"arms {self.baseline_arm!r} and {self.arm!r} have different problems: sample the same in both"
            )
        return comparing.assume_from_pair(
            list(table.values()), [other[name] for name in table]
        ), None if shared else size

    def _print(self, plan: comparing.PowerPlan) -> None:
        assumed = plan.assumptions
        spread = "none" if assumed.effect_variance <= 0 else f"{100 * assumed.effect_variance**0.5:.1f} points"
        print(f"noise, variance of a difference of two samples: {assumed.noise:.3f} ({assumed.noise_source})")
        print(f"spread of the effect over problems: {spread} ({assumed.effect_source})")
        if assumed.changed < 1:
            print(f"problems that change between the arms: {100 * assumed.changed:.1f}%")
        level = f"two-sided level {plan.alpha:.3g}" + (f" each of {self.num_arms} arms" if self.num_arms > 1 else "")
        print(f"verdicts of a comparison, paired by problem: {level}, power {plan.target_power:.0%}")
        print("\nproblems needed")
        _table_lines(
            "samples a problem",
            [f"{points:g} points" for points in self.points],
            [
                (str(k), ["unknown" if n is None else str(n) for n in row])
                for k, row in zip(plan.samples, plan.needed, strict=True)
            ],
        )
        heads = [f"{n} problems" for n in plan.problems]
        print(f"\nsmallest effect shown with {plan.target_power:.0%} power, in points")
        _table_lines(
            "samples a problem",
            heads,
            [
                (str(k), ["none" if effect is None else f"{100 * effect:.1f}" for effect in row])
                for k, row in zip(plan.samples, plan.detectable, strict=True)
            ],
        )

        if any(effect is None for row in plan.detectable for effect in row):
            print(f"none: too few problems change for any verdict, {comparing.least_units(plan.alpha)} are the least")
        print("\nsamples a problem needed")
        _table_lines(
            "effect",
            heads,
            [
                (f"{points:g} points", ["never" if k is None else str(k) for k in row])
                for points, row in zip(self.points, plan.samples_needed, strict=True)
            ],
        )
        if any(k is None for row in plan.samples_needed for k in row):
            varies = "the effect varies too much over so few problems; only more problems help"
            print("never:", varies if assumed.changed else "not one of the measured problems changed between the arms")

    def _print_run(self, assumptions: comparing.Assumptions, num_problems: int, k: int) -> None:

        size = f"a comparison of this run's size ({num_problems} problems x {k})"
        plan = comparing.plan_power(assumptions, [0.05], [k], [num_problems], self.power, self.alpha, self.num_arms)
        found = plan.detectable[0][0]
        if found is None:
            print(
                f"\n{size} can show nothing: too few problems change, {comparing.least_units(plan.alpha)} are the least"
            )
        else:
            print(f"\n{size} shows an effect of {100 * found:.1f} points with {self.power:.0%} power")


def _table(rows: Sequence[runs.GradeRow], arm: str) -> dict[str, list[bool]]:
    """Verdicts by problem."""
    table: dict[str, list[bool]] = {}
    for row in rows:
        if row.arm == arm:
            table.setdefault(row.problem_id, []).append(row.correct)
    if not table:
        raise ValueError(f"no arm is named {arm!r}: the arms are {sorted({row.arm for row in rows})}; name one of them")
    return table


def _table_lines(corner: str, heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> None:
    print("\n".join(aligned([[name, *cells] for name, cells in [(corner, heads), *rows]])))
