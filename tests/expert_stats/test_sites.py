"""Which positions are counted, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_stats import MarkerSet, Trace
from expert_stats.counter import count_sites
from stats_helpers import MARKERS

# position       0  1  2  3  4  5  6  7 | 8  9 10 11 12 13 14
IDS = (2, 9, 9, 9, 3, 4, 1, 7, 8, 3, 4, 5, 2, 9, 3)
TRACE = Trace("a", IDS, 8)


def sites(
    trace: Trace = TRACE, base: str = "generated", prompt_tail: int = 4, **changes: Any
) -> tuple[list[int], list[list[int]]]:
    markers = MarkerSet(markers=MARKERS.markers, **changes)
    found = count_sites(trace, markers, base=base, prompt_tail=prompt_tail)
    return found.base.tolist(), [reading.tolist() for reading in found.readings]


def test_the_response_and_the_tag_that_opens_it() -> None:
    # "</think>" at 0 is a quotation; the two-token form of "Alternatively" at 4-5 ends within the prompt's last four tokens.
    assert sites() == ([5, 6, *range(8, 15)], [[6], [12], [5, 10, 11]])


def test_the_tail_of_the_prompt_is_a_choice() -> None:
    assert sites(prompt_tail=2) == ([6, *range(8, 15)], [[6], [12], [10, 11]])
    assert sites(prompt_tail=0) == (list(range(8, 15)), [[], [12], [10, 11]])
    assert sites(prompt_tail=99)[1] == [[6], [0, 12], [5, 10, 11]]


def test_all_tokens_as_base() -> None:
    assert sites(base="all") == (list(range(15)), [[6], [0, 12], [5, 10, 11]])


def test_first_token_of_an_occurrence() -> None:
    assert sites(token="first") == ([4, 6, *range(8, 15)], [[6], [12], [4, 9, 11]])


def test_only_the_first_occurrence() -> None:
    assert sites(repeats="first")[1] == [[6], [12], [5]]
    assert sites(repeats="first", prompt_tail=2)[1] == [[6], [12], [10]]


def test_the_position_before_where_a_marker_is_predicted() -> None:
    assert sites(position="predicted") == ([3, 5, *range(7, 14)], [[5], [11], [3, 8, 10]])
    assert sites(position="predicted", token="last")[1] == [[5], [11], [4, 9, 10]]
    # Nothing predicts the first token of a text.
    assert sites(base="all", position="predicted") == (list(range(14)), [[5], [11], [3, 8, 10]])


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=30),
    st.data(),
    st.sampled_from(["generated", "all"]),
    st.sampled_from(["input", "predicted"]),
    st.sampled_from(["first", "last"]),
)
def test_readings_are_distinct_and_in_the_base(
    ids: list[int], data: st.DataObject, base: str, position: str, token: str
) -> None:
    trace = Trace("a", tuple(ids), data.draw(st.integers(0, len(ids))))
    found_base, readings = sites(trace, base, data.draw(st.integers(0, 5)), position=position, token=token)
    assert found_base == sorted(set(found_base))
    assert all(0 <= at < len(ids) for at in found_base)
    for reading in readings:
        assert reading == sorted(set(reading))
        assert set(reading) <= set(found_base)
    if position == "input":
        assert set(range(trace.prompt_length, len(ids))) <= set(found_base)


def test_an_occurrence_across_the_border_is_read_at_its_token() -> None:
    trace = Trace("a", (9, 9, 9, 9, 9, 3, 4, 9), 6)
    assert sites(trace, prompt_tail=0)[1][2] == [6]
    assert sites(trace, prompt_tail=0, token="first")[1][2] == []


@pytest.mark.parametrize("prompt_length", [0, 15])
def test_empty_prompt_and_empty_response(prompt_length: int) -> None:
    found_base, _ = sites(Trace("a", IDS, prompt_length), prompt_tail=0)
    assert len(found_base) == 15 - prompt_length
