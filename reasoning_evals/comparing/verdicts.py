"""The numbers of a comparison in words: verdicts, notes, and formats of differences and p-values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from moe_steer.console import counted
from reasoning_evals.comparing.comparison import Difference
from reasoning_evals.comparing.detection import least_units
from reasoning_evals.comparing.statistics import paired_difference
from reasoning_evals.runs import GradeRow

ALPHA = 0.05
HELPED, HURT, NOTHING = "helped", "hurt", "no effect shown"
FEWER_TOKENS, MORE_TOKENS, SAME_LENGTH = "fewer tokens", "more tokens", "no change in length shown"
NO_INTERVAL = "no interval"
_MUCH_MORE_CUT = 0.05
_NUMBERS = {6: "six", 7: "seven", 8: "eight", 9: "nine", 10: "ten"}


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the setting under test was chosen."""

    num_settings: int
    """Settings that were tried: experts, gains, strengths."""
    on: str
    """The data of the choice, in words: "120 tuning problems"."""
    num_shared: int = 0
    """Problems that were used both for the choice and in this comparison."""
    num_arms: int | None = None
    """Number of tuned arms, each with its own settings; None where one plan was chosen for the run."""

    @property
    def choice(self) -> str:
        """The choice as a sentence."""
        if self.num_arms is None:
            return f"The plan was chosen among {self.num_settings} settings on {self.on}"
        if self.num_arms == 1:
            return f"1 arm was tuned, among {self.num_settings} settings, on {self.on}"
        return f"{self.num_arms} arms were tuned, each among settings of its own ({self.num_settings} in all), on {self.on}"


@dataclass(frozen=True, slots=True)
class Family:
    """The pairs of one comparison: their verdicts are judged together."""

    num_pairs: int
    one_baseline: bool
    """Whether all arms are compared with the same one."""
    unit: str
    """What counts once: "problem", or "cluster" where problems belong together."""

    @classmethod
    def of(cls, pairs: Sequence[tuple[str, str]], clustered: bool) -> Family:
        """From (a, b), b against a."""
        return cls(len(pairs), len({a for a, _ in pairs}) < 2, "cluster" if clustered else "problem")

    @property
    def words(self) -> str:
        """Such as: Holm over 3 arms."""
        return f"Holm over {self.num_pairs} {'arms' if self.one_baseline else 'pairs of arms'}"

    @property
    def least_units(self) -> int:
        """Units that must change for a verdict at the first threshold of Holm's procedure."""
        return least_units(ALPHA / max(1, self.num_pairs))


@dataclass(frozen=True, slots=True)
class Cut:
    """Shares of the samples of arms a and b that the token limit cut."""

    a: float
    b: float
    differs: bool
    """By 5 points or more, or significantly over problems (sign-flip test)."""

    @classmethod
    def of(cls, a_P: Sequence[float], b_P: Sequence[float], clusters: Sequence[str] | None, k: int) -> Cut:
        """From the share of each problem's k samples."""
        a, b = fmean(a_P), fmean(b_P)
        if a == b:
            return cls(a, b, False)
        p_value = paired_difference(a_P, b_P, clusters, k, num_resamples=1).sign_flip_p
        return cls(a, b, abs(b - a) >= _MUCH_MORE_CUT or p_value < ALPHA)


def verdict_p(accuracy: Difference, mcnemar_p: float | None) -> float:
    """The p-value of the verdict: with one sample a problem that of the exact McNemar test; otherwise the larger one of the paired t
    test over problems and the sign-flip test. The t test alone is too optimistic where nearly all problems are ties; if all
    problems changed alike, there is no t test."""
    if accuracy.mean == 0:
        return 1.0
    return max(accuracy.p_value, accuracy.sign_flip_p) if mcnemar_p is None else mcnemar_p


def verdict_on(
    a: str,
    b: str,
    accuracy: Difference,
    num_problems: int,
    k: int,
    mcnemar_p: float | None,
    holm_p: float,
    family: Family,
    cut: Cut,
    unit: str = "points of accuracy",
) -> tuple[str, str]:
    """(verdict, what is to be said) on b against a. An effect is shown when ``holm_p``, the verdict's own p adjusted for all
    pairs of the comparison, is below .05."""
    p_value = verdict_p(accuracy, mcnemar_p)
    shown = holm_p < ALPHA
    verdict = (HELPED if accuracy.mean > 0 else HURT) if shown else NOTHING
    p = p_text(p_value)
    if family.num_pairs > 1:
        p += f" alone, {p_text(holm_p)} after {family.words}" if shown else " alone"
    size = (
        f"{points(accuracy.mean)} {unit} ({interval_text(accuracy)}, "
        f"{p}, {_deciding_test(accuracy, mcnemar_p)}; {counted(num_problems, 'problem')} x {counted(k, 'sample')})"
    )
    sentences = [f"{b} against {a}: {verdict}, {size}."]
    if shown:
        sentences.append(_exaggeration(accuracy))
    else:
        if p_value < ALPHA:
            better = "better" if accuracy.mean > 0 else "worse"
            sentences.append(f"Nominally {better} ({p_text(p_value)}), not after {family.words} ({p_text(holm_p)}).")
        sentences.append(_what_could_be_shown(accuracy, family))
        if accuracy.se > 0 and accuracy.p_value < ALPHA <= p_value:
            other = "exact McNemar" if mcnemar_p is not None else "sign-flip"
            sentences.append(
                f"The paired t test alone would say otherwise ({p_text(accuracy.p_value)}); the {other} test does not agree "
                f"({p_text(accuracy.sign_flip_p)})."
            )
    sentences.append(cut_text(a, b, cut))
    return verdict, " ".join(sentence for sentence in sentences if sentence)


def _deciding_test(accuracy: Difference, mcnemar_p: float | None) -> str:
    if mcnemar_p is not None:
        return "exact McNemar test"
    return difference_test(accuracy) if accuracy.p_value >= accuracy.sign_flip_p else "sign-flip test"


def _exaggeration(accuracy: Difference) -> str:
    """The winner's curse: runs that show an effect are those that happened to find it large."""
    if accuracy.power is None or accuracy.exaggeration is None or round(accuracy.exaggeration, 2) <= 1:
        return ""  # of an effect as large as an effect can be, or as good as sure to be shown
    return (
        f"Effects that are shown are too large on average: if the true one were {points(accuracy.mean)} points, such a run would "
        f"show it with {100 * accuracy.power:.0f}% power, and then {accuracy.exaggeration:.2f} times its size."
    )


def _what_could_be_shown(accuracy: Difference, family: Family) -> str:
    changed, least = accuracy.num_changed, family.least_units
    after = f" after {family.words}" if family.num_pairs > 1 else ""
    if changed == 0:
        return "Every problem was solved equally often in both arms, so the run cannot say how small an effect it could show."
    if accuracy.detectable is None:
        return (
            f"Nothing can be shown: {counted(changed, family.unit)} changed, and at least "
            f"{_NUMBERS.get(least, str(least))} must change to show anything{after}."
        )
    return (
        f"The smallest effect that this run could have shown (80% power{after}) is {detectable_text(accuracy)} points."
    )


def cut_text(a: str, b: str, cut: Cut) -> str:
    """Said where truncation differs between the arms."""
    if not cut.differs:
        return ""
    return (
        f"The token limit cut {100 * cut.b:.1f}% of the samples of {b}, {100 * cut.a:.1f}% of {a}: the lengths of these are lower "
        "bounds."
    )


def length_verdict(ratio: float, holm_p: float) -> str:
    """In words, of mean tokens of b / of a."""
    if holm_p >= ALPHA or ratio == 1:
        return SAME_LENGTH
    return FEWER_TOKENS if ratio < 1 else MORE_TOKENS


def unanswered_notes(rows: Sequence[GradeRow]) -> tuple[str, ...]:
    """One sentence an arm about responses without an answer, where "truncated" or "no answer" says too little: no thought of the
    arm ever closed; thoughts never closed though the responses ended by themselves, so that a higher token limit would not
    help; answers were cut by the limit; no grader judged them."""
    notes = []
    for arm in dict.fromkeys(row.arm for row in rows):
        mine = [row for row in rows if row.arm == arm]
        number = f"of {len(mine)} responses"
        open_rows = [row for row in mine if row.state == "truncated"]
        unclosed = sum(row.outcome == "unclosed" for row in mine)
        cut = sum(row.outcome == "cut" for row in mine)
        if open_rows and not any(row.state in ("closed", "empty") for row in mine):
            notes.append(
                f"{arm}: no thought ever closed ({len(open_rows)} {number} are inside a thought to their end): raise "
                "--max-new-tokens, or, if this model writes its thoughts in another way, say so with --thinking"
            )
        elif unclosed:
            notes.append(f"{arm}: {unclosed} {number} ended by themselves inside a thought that never closes")
        if failed := [row.reason for row in mine if row.outcome == "grader_error"]:
            notes.append(f"{arm}: {len(failed)} {number} were not judged ({failed[0]})")
        if cut:
            notes.append(f"{arm}: {cut} {number} were cut by the token limit before they gave an answer")
    return tuple(notes)


def notes_on(family: Family, clustered: bool, tuned: Tuning | None) -> tuple[str, ...]:
    """Notes that a careful reader needs in addition to the verdicts."""
    notes = []
    if family.num_pairs > 1:
        notes.append(
            f"{family.num_pairs} pairs of arms are compared. Verdicts follow {family.words}, which keeps the chance of any false one "
            'below 5%; so do the verdicts on length, among themselves. "Alone" and "nominally" leave this correction out.'
        )
    if clustered:
        notes.append("Some problems share a cluster: standard errors and bootstrap are over clusters.")
    if tuned is not None and tuned.num_shared:
        its = "its" if tuned.num_arms is None else "their"
        notes.append(
            f"{tuned.choice}, and {tuned.num_shared} of those problems are compared here: "
            f"{its} p-values are too small and {its} effect too large."
        )
    elif tuned is not None:
        notes.append(f"{tuned.choice}, none of which is compared here: the choice needs no correction.")
    return tuple(notes)


def interval_text(difference: Difference) -> str:
    """The interval of a difference of shares inside a sentence: left out where all problems changed alike, since its width
    of 0 would not mean certainty."""
    if difference.se == 0:
        return f"{NO_INTERVAL}: all moved alike"
    return f"95% interval {points(difference.low)} to {points(difference.high)}"


def difference_test(difference: Difference) -> str:
    """The name of the test that gave ``p_value``."""
    return "paired t test" if difference.se > 0 else "sign-flip test"


def detectable_text(difference: Difference) -> str:
    """The smallest difference of shares that could be shown, in points; at most 100."""
    if difference.detectable is None:
        return "–"
    return "more than 100" if difference.detectable > 1 else f"{100 * difference.detectable:.1f}"


def t_text(difference: Difference) -> str:
    """The p-value of the t test in a table; left out where all problems changed alike."""
    return p_cell(difference.p_value) if difference.se > 0 else "–"


def p_cell(p_value: float) -> str:
    """As ``p_text``, under a heading that says p.

    >>> p_cell(0.0004), p_cell(0.042), p_cell(math.nan)
    ('< .001', '.042', 'undefined')
    """
    return p_text(p_value).removeprefix("p ").removeprefix("= ")


def points(difference: float) -> str:
    """A difference of shares in percentage points, signed.

    >>> points(0.0123), points(-0.5), points(-0.0001)
    ('+1.2', '-50.0', '0.0')
    """
    text = f"{100 * difference:+.1f}"
    return "0.0" if float(text) == 0 else text


def p_text(p_value: float) -> str:
    """A p-value in the usual notation.

    >>> p_text(0.0004), p_text(0.042), p_text(0.5), p_text(1.0)
    ('p < .001', 'p = .042', 'p = .50', 'p = 1.00')
    """
    if math.isnan(p_value):
        return "p undefined"
    if p_value < 0.001:
        return "p < .001"
    text = f"{p_value:.3f}" if p_value < 0.1 else f"{p_value:.2f}"
    return f"p = {text.removeprefix('0')}"
