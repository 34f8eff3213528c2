"""Laws of the graders: right answers in any dressing are right, other ones are wrong, and no text breaks a grader."""

import re
import subprocess
import sys
import threading
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoning_evals import Problem, grade
from reasoning_evals.grading import OUTCOMES, Grade, grade_answer
from reasoning_evals.grading.structure import _WORDS
from reasoning_evals.problems import ANSWER_TYPES

DRESSINGS = (
    "\\boxed{%s}", "so \\boxed{%s} it is.", "\\boxed{%s}.", "\\fbox{%s}", "\\boxed{ %s }", "$\\boxed{%s}$", "\\[ \\boxed{%s} \\]",
    "\\boxed{x = %s}", "\\boxed{m+n = %s}", "\\boxed{\\$%s}", "\\boxed{%s\\text{ apples}}", "\\boxed{%s \\text{ cm}^2}",
    "\\boxed{%s.0}", "\\boxed{\\mathbf{%s}}", "\\boxed{\\approx %s}", "\\boxed{(%s)}", "\\boxed{%s^\\circ}", "\\boxed{%s\\%%}",
    "<think>maybe \\boxed{77777}</think>\\boxed{%s}", "77777</think>The answer is \\boxed{%s}", "\\boxed{77777} no, \\boxed{%s}",
    "The answer is %s.", "**Answer:** %s", "the final answer is $%s$", "#### %s", "%s", "We get %s at the end.", "\\boxed{0+%s}",
)  # fmt: skip
integers = st.integers(-(10**12), 10**12)


def write_integer(value, style):
    if style == "thousands":
        return f"{value:,}"
    if style == "latex thousands":
        return f"{value:,}".replace(",", "{,}")
    if style == "zeros":
        return f"{value:05d}"
    return str(value).replace("-", "−") if style == "unicode" else str(value)


@given(
    integers, st.sampled_from(DRESSINGS), st.sampled_from(["plain", "thousands", "latex thousands", "zeros", "unicode"])
)
@settings(deadline=None, max_examples=400)
def test_a_correct_integer_in_any_dressing_is_correct(value, dressing, style):
    if "+%s" in dressing and value < 0:
        dressing = "\\boxed{%s}"
    text = dressing % write_integer(value, style)
    assert grade(Problem("p", "How many, in percent?", value, "integer"), text).outcome == "correct"


@given(integers, integers, st.sampled_from(DRESSINGS))
@settings(deadline=None, max_examples=300)
def test_another_integer_in_any_dressing_is_wrong(target, value, dressing):
    if value == target or ("+%s" in dressing and value < 0):
        return
    assert grade(Problem("p", "?", target, "integer"), dressing % value).outcome == "wrong"


@given(st.fractions(max_denominator=999), st.fractions(max_denominator=999))
@settings(deadline=None, max_examples=100)
def test_rational_expressions_are_decided_exactly(left, right):
    written = [
        f"{right}",
        f"\\frac{{{right.numerator}}}{{{right.denominator}}}",
        f"({right.numerator})/({right.denominator})",
    ]
    for text in written:
        outcome = grade(Problem("p", "?", str(left), "expression"), f"\\boxed{{{text}}}").outcome
        assert outcome == ("correct" if left == right else "wrong")


UNITS = [("m", Fraction(1)), ("km", Fraction(1000)), ("cm", Fraction(1, 100)), ("mm", Fraction(1, 1000))]


@given(
    st.fractions(min_value=Fraction(1, 10**6), max_value=10**6, max_denominator=10**6),
    st.integers(-25, 25),
    st.sampled_from(UNITS),
    st.sampled_from(UNITS),
    st.fractions(min_value=Fraction(-1, 10), max_value=Fraction(1, 10), max_denominator=10**4),
)
@settings(deadline=None, max_examples=200)
def test_the_tolerance_is_relative_at_every_magnitude_and_in_every_unit(value, power, target_unit, unit, error):
    if abs(abs(error) - Fraction(1, 100)) < Fraction(1, 1000):
        return
    exact = value * Fraction(10) ** power
    given = exact * target_unit[1] / unit[1] * (1 + error)
    problem = Problem("p", "?", f"{float(exact):.15e}", "quantity", unit=target_unit[0], tolerance=0.01)
    graded = grade(problem, f"\\boxed{{{float(given):.15e} \\text{{ {unit[0]}}}}}")
    assert graded.outcome == ("correct" if abs(error) < Fraction(1, 100) else "wrong")


letters = st.sampled_from("ABCDEFGHIJ")


@given(
    letters,
    letters,
    st.sampled_from(["\\boxed{%s}", "\\boxed{\\text{(%s)}}", "\\boxed{%s. the first}", "Answer: %s", "**(%s)**"]),
)
@settings(deadline=None, max_examples=200)
def test_choices(target, letter, dressing):
    outcome = grade(Problem("p", "?", target, "choice"), dressing % letter).outcome
    assert outcome == ("correct" if letter == target else "wrong")


@given(st.lists(st.integers(-99, 99), min_size=2, max_size=6), st.randoms())
@settings(deadline=None, max_examples=100)
def test_lists_know_whether_order_counts(values, random):
    shuffled = random.sample(values, len(values))
    text = "\\boxed{" + ", ".join(map(str, shuffled)) + "}"
    free = Problem("p", "?", "{" + ", ".join(map(str, values)) + "}", "list")
    fixed = Problem("p", "?", values, "list")
    assert grade(free, text).outcome == "correct"
    assert grade(fixed, text).outcome == ("correct" if shuffled == values else "wrong")


TOKENS = [*"\\{}[]()$^_=+-*/,.;:|!%&<> \n'0123456789abcdefxyzEN", "\\frac", "\\sqrt", "\\text{", "\\pm", "\\boxed{", "\\left",
          "\\mathrm{", "≤", "²", "½", "π", "<think>", "</think>", "∞", "\\cup", "\\begin{pmatrix}", "\\log", "\\sin", "\\cdot"]  # fmt: skip
markup = st.lists(st.sampled_from(TOKENS), max_size=60).map("".join)
TARGETS = {
    "integer": "5",
    "number": "0.5",
    "quantity": "5 m/s",
    "expression": "\\frac{x}{2}",
    "choice": "B",
    "list": "[1, x]",
}


@given(markup | st.text(max_size=80), st.sampled_from(ANSWER_TYPES), st.booleans())
@settings(deadline=None, max_examples=400)
def test_no_text_breaks_a_grader(text, answer_type, opened):
    problem = Problem("p", "?", TARGETS[answer_type], answer_type)
    verdict = grade_answer(problem, text)
    assert verdict.outcome in ("correct", "wrong")
    if answer_type not in ("expression", "list"):
        assert grade(problem, "\\boxed{" + text + "}", opened).outcome in OUTCOMES
    assert grade_answer(problem, text) == verdict


@given(markup, st.sampled_from([kind for kind in ANSWER_TYPES if kind != "integer"]))
@settings(deadline=None, max_examples=300)
def test_no_target_breaks_a_grader(target, answer_type):
    if target.strip():
        verdict = grade_answer(Problem("p", "?", target, answer_type), "5")
        assert verdict.outcome in ("correct", "wrong", "grader_error")


@pytest.mark.parametrize(
    "text",
    ["(" * 5000, "{" * 1999, "1+" * 999 + "1", "9" * 1999, "x^" * 900 + "x", "\\frac" * 300, "-" * 1999 + "1", "|" * 1999, "\\sqrt" * 300 + "2",
     "9**9**9**9", "9!" + "!" * 500, "(9^{999})^{999}", "1/" * 900 + "3", "e^{e^{e^{e^e}}}", "\\sin(10^{10^{9}})", "m^{99999999}", "5 m**9**9**9",
     "5 " + "m/" * 900 + "s", "1e999999999", "0.1e-99999", "\\binom{10^9}{10^8}", "1,111" * 300, "\\text{" * 300, "a, " * 600, "\\pm" * 500 + "1", "(1," * 500, "{1," * 400 + "}" * 400, "5 m" + ")" * 900, "5 " + "(m" * 60,
     "\\frac{1}{" * 180 + "5" + "}" * 180, "seventy " * 240, "0." + "3" * 1900 + "...", "0.\\dot{3}" * 200, "x>1 \\text{ and } " * 100 + "x>2", "0." + "12" * 900 + "\\ldots 7",
     "\\approx 6" * 180, "1999!/1998!" * 150 + "\\pi"],
)  # fmt: skip
@pytest.mark.parametrize("answer_type", ANSWER_TYPES)
def test_hostile_answers_are_wrong_at_once(text, answer_type):
    done = []
    problem = Problem("p", "?", TARGETS[answer_type], answer_type)
    thread = threading.Thread(target=lambda: done.append(grade_answer(problem, text)), daemon=True)
    thread.start()
    thread.join(5)
    assert done, "the grader hangs"
    assert done[0].outcome == "wrong", done[0]


def test_outcomes_are_closed():
    with pytest.raises(ValueError, match="outcome is 'right': expected one of correct, wrong"):
        Grade("right", None, "")


def test_grading_imports_neither_models_nor_data_sets_nor_units_before_they_are_needed():
    program = (
        "import sys; from reasoning_evals import Problem, grade; "
        "assert grade(Problem('p', '?', '5', 'integer'), 'so \\\\boxed{5}').outcome == 'correct'; "
        "print([name for name in ('torch', 'transformers', 'datasets', 'deepspeed', 'sympy', 'pint') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("count", [1, 200])
def test_a_long_sentence_that_is_no_words_is_read_at_once(count):
    """From a thought of DeepSeek-R1: a bracket that never closes behind a sentence."""
    sentence = " and ".join(["yes, by appropriate choice of the grating parameters"] * count) + " (like b"
    verdict = grade_answer(Problem("p", "?", "\\frac{a}{b}", "expression"), sentence)
    assert verdict.outcome == "wrong"


@pytest.mark.parametrize(
    "rest", ["x" * 300 + "{%", " and" * 400 + "1", "\\text{ a" * 200, " m" * 600 + "(", "1 h " * 300, "(a) " * 400]
)
@pytest.mark.parametrize("answer_type", ["integer", "number", "quantity", "expression", "list"])
def test_what_follows_a_number_is_read_at_once(rest, answer_type):
    """A run of 300 letters once took more than the age of the universe."""
    test_hostile_answers_are_wrong_at_once(f"42{rest}", answer_type)


@given(st.lists(st.sampled_from(["a", "bc", " ", "  ", ",", "2", "(", "\\text{a b}", "\\text {c}", "\n"]), max_size=7))
@settings(deadline=None, max_examples=500)
def test_what_counts_as_words(pieces):
    """The plain way to say it, which takes exponential time on long texts."""
    plain = re.compile(r"(?:\\text\s*\{[^{}\\$]*\}|[A-Za-z]{2,}(?: [A-Za-z]+)*|[\s,.;!?'\"-])+")
    text = "".join(pieces)
    assert bool(_WORDS.fullmatch(text)) == bool(plain.fullmatch(text))
