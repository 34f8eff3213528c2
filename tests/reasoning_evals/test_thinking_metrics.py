import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graded_rows import false_positive_rate
from reasoning_evals import Problem
from reasoning_evals.thinking import Loop, longest_repeat, loop_at_end
from reasoning_evals.thoughts.metrics import (
    Attempt,
    ThoughtTrace,
    distinct_efficiency,
    oe_rule,
    trace_thought,
    ut_rule,
)
from reasoning_evals.thoughts.segments import candidates, segment_thought

SEVEN = Problem("seven", "3+4?", "7", "integer")
THOUGHT = (
    "3 + 4 means counting on from 3, so 3 + 4 = 8. Wait, that is one too many: 3 + 4 = 7.\n"
    "Alternatively, 4 + 3 = 7, which agrees. Hmm. But wait, maybe I misread the task? The answer is 9."
)


def words(text):
    return len(text.split())


def test_segments_of_a_thought():
    segments = segment_thought(THOUGHT)
    openings = [segment.text.split()[0] for segment in segments]
    assert openings == ["3", "Wait,", "Alternatively,", "Hmm."]
    assert segments[-1].text.split()[1:3] == ["But", "wait,"]


@pytest.mark.parametrize(
    ("thought", "count"),
    [
        ("", 0),
        ("   ", 0),
        ("no marker here", 1),
        ("Wait, wait. Let me check this once more now.", 1),
        ("I await the waiter. Waiting is dull, he said to me.", 1),
        ("It was so, and wait, it was not at all like that.", 1),
        ("We have found the number five.\nwait, is it five or rather six?", 2),
        ("We have found the number five. **Wait**, is it five or rather six?", 2),
        ("A first way to look at it. Let me double-check the sum of both.", 2),
        ("A first way to look at it. Let me  verify the sum of both now.", 2),
        ("A first way to look at it. Oh wait, that is wrong.", 2),
        ("A first way to look at it. Oh no, wait, that is wrong.", 2),
        ("A first way to look at it. Ok so wait, that is wrong.", 2),
        ("A first way to look at it. Let me *just* double-check this.", 2),
        ("A first way to look at it. Let me just quickly check this.", 2),
        ("A first way to look at it. Let's verify this.", 2),
        ("3 + 4 = 7. Wait, let me check: 7 - 4 = 3.", 2),
        ("It is (B). Hmm, is it?", 2),
        ("Let me see. Wait, what was asked here?", 1),
        ("Okay. So the waiter was there, and oh so late he was.", 1),
    ],
)
def test_where_a_thought_is_cut(thought, count):
    assert len(segment_thought(thought)) == count


@given(
    st.lists(
        st.sampled_from(["Wait, ", "so 3 + 4 = 8. ", "Alternatively ", "\n", "Hmm. ", "it is five, I would say. "]),
        max_size=20,
    )
)
@settings(deadline=None, max_examples=200)
def test_segments_cover_the_thought(parts):
    thought = "".join(parts)
    segments = segment_thought(thought)
    assert "".join(segment.text for segment in segments) == (thought if thought.strip() else "")
    assert all(thought[segment.start : segment.end] == segment.text for segment in segments)
    assert all(
        len(segment.text.strip()) >= 20 or any(one.isdigit() for one in segment.text) for segment in segments[:-1]
    )


def test_other_markers_and_what_is_none():
    assert (
        len(segment_thought("Der erste Weg ist sehr lang. Moment, es geht auch anders herum.", markers=["moment"])) == 2
    )
    with pytest.raises(ValueError, match="expected words that begin a new attempt"):
        segment_thought("x", markers=[])
    with pytest.raises(ValueError, match="none of them empty"):
        segment_thought("x", markers=["wait", ""])


def test_candidates():
    assert candidates("so 3 + 4 = 8. Then \\boxed{7}, and the answer is 9.", "integer") == ["8", "7", "9"]
    assert candidates("$v = 5$ m/s, and $x + y = \\frac{1}{2}$.", "number") == ["5 m/s", "\\frac{1}{2}"]
    assert candidates("= 12 m.\n", "quantity") == ["12 m"]
    assert candidates("Option (B) is out, so (C).", "choice") == ["B", "C"]
    assert candidates("nothing", "integer") == []


@pytest.mark.parametrize(
    ("text", "answer_type", "stated"),
    [
        ("Taking two away gives us 7 apples.", "integer", ["7 apples"]),
        ("It should be 7", "integer", ["7"]),
        ("That makes 3 + 4, so 7.", "integer", ["7"]),
        ("So, 7. Good.", "integer", ["7"]),
        ("The total comes out to $7.", "integer", ["7"]),
        ("The sum is exactly 7, then.", "integer", ["7"]),
        ("a = 7. And b = 5", "integer", []),
        ("Let m = 3 kg, F = 6 N. Then a = F/m = 2 m/s^2.", "quantity", ["2 m/s^2"]),
        ("x = 3, y = 4, so z = 7.", "integer", ["7"]),
        ("x + 2 = 9, thus x = 7.", "integer", ["9", "7"]),
        ("So 7 of them went home and 2 stayed.", "integer", []),
        ("It gives 7 times as much as before the change was made.", "integer", []),
        ("The options are (A), (B), (C).", "choice", []),
        ("The options are (A) 5 m, (B) 6 m and (C) 7 m.", "choice", []),
        ("It is either (A) or (B).", "choice", []),
        ("(A) five metres\n(B) six metres\nSo it must be (B).", "choice", ["B"]),
        ("(B) is right.", "choice", ["B"]),
        ("I would say option C.", "choice", ["C"]),
    ],
)
def test_wordings_of_an_answer(text, answer_type, stated):
    assert candidates(text, answer_type) == stated


@pytest.mark.parametrize(
    ("thought", "answers"),
    [
        ("3 + 4 = 7, so the answer is 7. Counting on from 4 is 5, 6, 7 and 4 + 3 = 7.", ["7", "7"]),
        ("Adding, 3 + 4 = 7.\n\nFrom the other side, 4 + 3 = 7.", ["7", "7"]),
        ("3 + 4 = 7, so the answer is 7. So the final answer is 7, I am sure of it.", ["7"]),
        ("3 + 4 = 7.\n\nThe answer is 7, as was to be shown here.", ["7"]),
        ("First 3 + 1 = 4.\n\nNext, 4 + 3 = 7, and this is the end.", ["7"]),
    ],
)
def test_a_second_solution_without_a_marker(thought, answers):
    trace = trace_thought(SEVEN, thought, correct=True, count_tokens=words)
    assert [attempt.answer for attempt in trace.attempts] == answers
    assert trace.tokens == words(thought)


def test_another_route_to_an_answer_is_a_repeat_by_rule_and_no_repeat_for_the_paper():
    thought = "Adding, 3 + 4 = 7.\n\nFrom the other side, 4 + 3 = 7."
    by_rule = trace_thought(SEVEN, thought, True, words)
    paper = trace_thought(SEVEN, thought, True, words, cluster=lambda texts: range(len(texts)))
    assert distinct_efficiency([by_rule]) < 1 == distinct_efficiency([paper])


def test_a_thought_attempt_by_attempt():
    trace = trace_thought(SEVEN, THOUGHT, correct=False, count_tokens=words)
    assert [attempt.answer for attempt in trace.attempts] == ["8", "7", "7", "9"]
    assert [attempt.correct for attempt in trace.attempts] == [False, True, True, False]
    lengths = [attempt.tokens for attempt in trace.attempts]
    assert trace.tokens == sum(lengths) == words(THOUGHT)
    assert trace.first_correct_token == lengths[0] + lengths[1]
    assert trace.tokens_after_first_correct == lengths[2] + lengths[3]
    assert trace.answer_changes == 2
    assert trace.correct_to_wrong == 1
    assert trace.revisit_rate == pytest.approx(1 / 3)
    assert trace.strategies == (0, 1, 1, 3)


def trace_of(correct, *attempts, strategies=None):
    """Attempts as (tokens, right)."""
    made = tuple(Attempt(tokens, "1" if right else "0", right, right) for tokens, right in attempts)
    return ThoughtTrace(correct=correct, attempts=made, strategies=strategies or tuple(range(len(made))))


def test_rates_by_hand():
    first = trace_of(True, (10, False), (10, True), (20, True))
    never = trace_of(False, (30, False))
    given_up = trace_of(False, (10, True), (30, False))
    assert oe_rule([first]) == pytest.approx(20 / 40)
    assert oe_rule([first, never]) == pytest.approx((20 / 40 + 0) / 2)
    assert ut_rule([first, never]) == 0
    assert ut_rule([first, never, given_up]) == pytest.approx((0 + 30 / 40) / 2)
    assert ut_rule([first]) is None
    assert oe_rule([]) is None
    assert distinct_efficiency([trace_of(True, (10, True), (30, True), strategies=(5, 5))]) == pytest.approx(10 / 40)
    assert distinct_efficiency([first]) == 1


def test_judge_and_clusters_may_be_brought():
    trace = trace_thought(
        SEVEN, THOUGHT, True, words, judge=lambda problem, answer: answer == "8", cluster=lambda texts: [0] * len(texts)
    )
    assert [attempt.correct for attempt in trace.attempts] == [True, False, False, False]
    assert distinct_efficiency([trace]) == pytest.approx(trace.attempts[0].tokens / trace.tokens)
    with pytest.raises(ValueError, match="cluster gave 1 numbers for 4 segments"):
        trace_thought(SEVEN, THOUGHT, True, words, cluster=lambda texts: [0])


def test_chance_is_measured_with_the_targets_of_others():
    eight = Problem("eight", "?", "8", "integer")
    twin = Problem("twin", "?", "7", "integer")
    letter = Problem("letter", "?", "B", "choice")

    def rate(problems, thoughts):
        return false_positive_rate(
            problems, [trace_thought(p, text, False, words) for p, text in zip(problems, thoughts, strict=True)]
        )

    assert rate([SEVEN, eight], ["3 + 4 = 7.", "4 + 4 = 8."]) == 0
    assert rate([SEVEN, eight], ["3 + 4 = 8.", "4 + 4 = 8."]) == 0.5
    assert rate([SEVEN, twin], ["3 + 4 = 7.", "3 + 4 = 7."]) is None
    assert rate([SEVEN, letter], ["7", "B"]) is None
    with pytest.raises(ValueError, match="2 problems and 1 thoughts"):
        false_positive_rate([SEVEN, eight], [trace_thought(SEVEN, "7", False, words)])


def naive_loop(ids, copies, min_tokens):
    best = Loop(0, 0)
    for period in range(1, len(ids)):
        length = period
        while length < len(ids) and ids[-length - 1] == ids[-length - 1 + period]:
            length += 1
        if length >= copies * period and length >= min_tokens and length > best.length:
            best = Loop(period, length)
    return best


def naive_repeat(ids):
    text = [tuple(ids[start : start + length]) for length in range(len(ids)) for start in range(len(ids) - length + 1)]
    return max((len(stretch) for stretch in set(text) if text.count(stretch) > 1), default=0)


@given(st.lists(st.integers(0, 2), max_size=24), st.integers(2, 4), st.integers(1, 8))
@settings(deadline=None, max_examples=200)
def test_loops_against_a_naive_search(ids, copies, min_tokens):
    assert loop_at_end(ids, copies, min_tokens) == naive_loop(ids, copies, min_tokens)


@given(st.lists(st.integers(0, 2), max_size=16))
@settings(deadline=None, max_examples=100)
def test_repeats_against_a_naive_search(ids):
    assert longest_repeat(ids) == naive_repeat(ids)


def test_long_sequences_are_quick():
    ids = [token * 7919 % 101 for token in range(15_000)] + [1, 2, 3] * 1000
    assert loop_at_end(ids) == Loop(3, 3000)
    assert longest_repeat(ids) >= 2997
    with pytest.raises(ValueError, match="copies is 1 and min_tokens 30"):
        loop_at_end(ids, copies=1)


def test_metrics_are_plain_json():
    trace = trace_thought(SEVEN, THOUGHT, False, words)
    assert json.dumps([trace.tokens, trace.first_correct_token, trace.revisit_rate, trace.strategies])
