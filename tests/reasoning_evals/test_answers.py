import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoning_evals.grading.answers import extract_answer
from reasoning_evals.grading.records import boxes, last_box
from reasoning_evals.problems import ANSWER_TYPES


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{4}", "4"),
        (r"\boxed {4}", "4"),
        (r"\fbox{4}", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x : x > 0 \right\}}", r"\left\{ x : x > 0 \right\}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{2} \boxed{}", "2"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{x = \boxed{5}}", r"x = \boxed{5}"),
        (r"$\boxed 5$", "5"),
        (r"\boxed\frac12", r"\frac12"),
        (r"\boxedtext{4}", None),
        (r"\boxed{4", None),
        ("4", None),
    ],
)
def test_last_box(text, content):
    assert last_box(text) == content


@pytest.mark.parametrize(
    ("text", "answer_type", "expected"),
    [
        (r"so \boxed{7}. The answer is 8.", "integer", ("7", "box")),
        ("x = 4\n#### 18", "integer", ("18", "hashes")),
        ("The answer is $\\frac{3}{4}$.", "expression", ("$\\frac{3}{4}$", "phrase")),
        ("**Final Answer**: 42", "integer", ("42", "phrase")),
        ("The final answer is therefore 3/4 because of x.", "expression", ("3/4", "phrase")),
        ("The answer to the question (in metres) is 3.5 m. Good.", "quantity", ("3.5 m", "phrase")),
        ("The answer is 5. No: the answer is 6.", "integer", ("6", "phrase")),
        ("5 m", "quantity", ("5 m", "whole")),
        ("p - q", "expression", ("p - q", "whole")),
        ("(B)", "choice", ("(B)", "whole")),
        ("She has 18 eggs left.", "integer", ("18", "last number")),
        ("It falls about 5.3 m/s downward.", "quantity", ("5.3 m/s downward", "last number")),
        ("Thus 1.6 × 10⁻¹⁹ C", "quantity", ("1.6 × 10⁻¹⁹ C", "last number")),
        ("It is $x+1$, I think.", "expression", ("x+1", "last formula")),
        ("I would take (C) here.", "choice", ("C", "last letter")),
        ("I do not know.", "expression", None),
        ("I do not know.", "choice", None),
        ("A difficult question.", "integer", None),
        ("The answer is 7. No, 8.", "integer", ("7 or 8", "phrase")),
        ("The answer is 7.\n\nNo other value works.", "integer", ("7", "phrase")),
        ("\\boxed{7}. Wait, no. The answer is 8.", "integer", ("8", "phrase")),
        ("\\boxed{7}. It is wrong to say that the answer is 8.", "integer", ("7", "box")),
        ('{"answer": 18, "confidence": 95}', "integer", ("18", "phrase")),
        ("It costs 70 000 kr.", "integer", ("70 000", "last number")),
        ("Either B or C", "choice", None),
        ("B or C?", "choice", None),
        ("So A it is.", "choice", ("A", "last letter")),
        ("\\boxed{7}\n\nWait, is it 8? If the answer is 8, then n = 11.", "integer", ("7", "box")),
        ("\\framebox[2cm]{7}", "integer", ("7", "box")),
        ("The answer is 7, not 8.", "integer", ("7", "phrase")),
        ("The answer is:\n\n$$\n7\n$$", "integer", ("7", "phrase")),
        ("**Answer:** The trip takes 7 hours.", "integer", ("7", "last number")),
        ("So 14/2 = 7 hours for 5 rooms.", "integer", ("7", "last number")),
        ("7 is the answer. It has 3 parts.", "integer", ("7", "last number")),
        ("The number is $\\underline{1,250}$.", "integer", ("$1,250", "last number")),
        ("$x<1$ or $x>3$", "expression", ("x<1 or x>3", "last formula")),
        ("It is $x$, less than $x+1$.", "expression", ("x", "last formula")),
        ("", "integer", None),
        (r"The answer is \boxed{12", "integer", None),
        ("<response>The answer is 4.</response>", "integer", ("4", "phrase")),
        ("<solution>It is $x < 5$.</solution>", "expression", ("x < 5", "last formula")),
        ("So the answer is B.[END FINAL RESPONSE]", "choice", ("B", "phrase")),
        ("<CONCLUSION>The answer is 3.</CONCLUSION>", "integer", ("3", "phrase")),
        ("<answer>7</answer></response>", "integer", ("7", "whole")),
        ("The answer is x<response>2.", "expression", ("x", "phrase")),
    ],
)
def test_extraction(text, answer_type, expected):
    assert extract_answer(text, answer_type) == expected


@given(st.text(alphabet=st.sampled_from(list(r"\{}boxed 1$")), max_size=200))
@settings(deadline=None, max_examples=200)
def test_boxes_are_balanced_and_never_fail(text):
    for content in boxes(text):
        assert content.strip() == content != ""


@given(st.integers(0, 30), st.text(alphabet="ab12+ ", min_size=1).filter(str.strip))
@settings(deadline=None, max_examples=50)
def test_a_box_in_braces_gives_its_content(levels, inner):
    content = "{" * levels + inner.strip() + "}" * levels
    assert last_box("text \\boxed{" + content + "} text") == content


@pytest.mark.parametrize(
    "unit",
    [
        "\\boxed{",
        "\\(",
        "answer ",
        "{",
        "answer to ",
        "1",
        "1,111",
        "(A",
        "$",
        "\\[",
        "=",
        "####",
        "\\boxed{the answer ",
        "\\boxed ",
        "option is (",
        "<|a",
        "\\boxed{\\text{ ",
        '"answer": "\\\\',
        "answer is 7. no, or ",
        "\\boxed{7}. Wait, ",
        "1 000 ",
        "B and ",
        "\\framebox[",
        "\\underline{1,",
        "between 1 and ",
        "if the answer is ",
        '"answer to "',
        "3 = 4 in ",
        "$x$ or ",
        "solutions are ",
    ],
)
@pytest.mark.parametrize("answer_type", ANSWER_TYPES)
def test_hostile_repetition_is_read_in_linear_time(unit, answer_type):
    started = time.perf_counter()
    extract_answer(unit * (200_000 // len(unit)), answer_type)
    assert time.perf_counter() - started < 3
