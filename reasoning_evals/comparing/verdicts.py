"""The numbers of a comparison in words: verdicts, notes, and formats of differences and p-values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from reasoning_evals.comparing.comparison import Difference
from reasoning_evals.runs import GradeRow

ALPHA = 0.05
HELPED, HURT, NOTHING = "helped", "hurt", "no effect shown"
NO_INTERVAL = "no interval"


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


def verdict_on(
    a: str,
    b: str,
    accuracy: Difference,
    num_problems: int,
    k: int,
    mcnemar_p: float | None,
    num_changed: int,
    unit: str = "points of accuracy",
) -> tuple[str, str]:
    """(verdict, one sentence) on b against a.

    An effect is shown when the paired t test over problems and the sign-flip test both give p < .05; with one sample a
    problem, when the exact McNemar test does. The t test alone is too optimistic where nearly all problems are ties; if all
    problems changed alike, there is no t test and no interval.
    """
    p_value = accuracy.p_value if mcnemar_p is None else mcnemar_p
    test = "exact McNemar test" if mcnemar_p is not None else difference_test(accuracy)
    shown = accuracy.mean != 0 and max(p_value, accuracy.sign_flip_p) < ALPHA
    verdict = (HELPED if accuracy.mean > 0 else HURT) if shown else NOTHING
    size = (
        f"{points(accuracy.mean)} {unit} ({interval_text(accuracy)}, "
        f"{p_text(p_value)}, {test}; {num_problems} problems x {k} {'sample' if k == 1 else 'samples'})"
    )
    if verdict != NOTHING:
        return verdict, f"{b} against {a}: {verdict}, {size}."
    sentence = f"{b} against {a}: {verdict}, {size}. "
    if num_changed == 0:
        sentence += "Every problem was solved equally often in both arms, so the run cannot say how small an effect it could show."
    elif accuracy.detectable is not None:
        sentence += (
            f"The smallest effect that this run could have shown (80% power) is {detectable_text(accuracy)} points."
        )
    if accuracy.se > 0 and accuracy.p_value < ALPHA:
        other = "exact McNemar" if mcnemar_p is not None else "sign-flip"
        sentence += (
            f" The paired t test alone would say otherwise ({p_text(accuracy.p_value)}); the {other} test does not agree "
            f"({p_text(accuracy.sign_flip_p)})."
        )
    return verdict, sentence.strip()


def unanswered_notes(rows: Sequence[GradeRow]) -> tuple[str, ...]:
    """One sentence an arm about responses without an answer, where "truncated" or "no answer" says too little: no thought of the
    arm ever closed; thoughts never closed though the responses ended by themselves, so that a higher token limit would not
    help; answers were cut by the limit."""
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
        if cut:
            notes.append(f"{arm}: {cut} {number} were cut by the token limit before they gave an answer")
    return tuple(notes)


def notes_on(num_pairs: int, clustered: bool, tuned: Tuning | None) -> tuple[str, ...]:
    """Notes that a careful reader needs in addition to the verdicts."""
    notes = []
    if num_pairs > 1:
        notes.append(
            f"{num_pairs} pairs of arms are compared. Verdicts use each pair's own p-value; Holm-adjusted p-values stand "
            "beside them."
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
    return p_text(difference.p_value).removeprefix("p = ") if difference.se > 0 else "–"


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
