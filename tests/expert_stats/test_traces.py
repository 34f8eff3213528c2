"""Traces: validation, thought spans, files whole and torn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_stats import Trace, read_traces, trace_from_ids, write_traces
from moe_steer.thinking import TokenTags

TRACES = [Trace("a#0", (5, 1, 6, 2, 7), 2, 2, 3), Trace("b#0", (5, 6), 1)]


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    write_traces(tmp_path / "deep" / "t.jsonl", TRACES)
    assert read_traces(tmp_path / "deep" / "t.jsonl") == TRACES
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["t.jsonl"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=20), st.data())
def test_any_valid_trace_survives_the_file(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int], data: st.DataObject
) -> None:
    start = data.draw(st.none() | st.integers(0, len(ids)))
    end = None if start is None else data.draw(st.none() | st.integers(start, len(ids)))
    trace = Trace('x\n"é', tuple(ids), data.draw(st.integers(0, len(ids))), start, end)
    path = tmp_path_factory.mktemp("t") / "t.jsonl"
    write_traces(path, [trace])
    assert read_traces(path) == [trace]


def test_a_torn_last_line_is_left_out_with_a_warning_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    write_traces(path, TRACES)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="line 2 is cut off and was left out: 1 traces were read"):
        assert read_traces(path) == TRACES[:1]
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_traces(path, strict=True)


@pytest.mark.parametrize(
    ("line", "advice"),
    [
        (
            {"problem_id": "a", "sample_idx": 0, "text": "4"},
            "name the file generations.jsonl, or give the run's folder",
        ),
        ({"id": "a", "solution": "<think>2 + 2</think>4"}, "texts become traces by moe_steer.tokens.trace_from_ids"),
    ],
)
def test_what_is_not_of_token_ids_is_told_its_way(line: dict[str, Any], advice: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=advice):
        read_traces(path)


def test_a_missing_last_newline_is_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    write_traces(path, TRACES)
    path.write_bytes(path.read_bytes()[:-1])
    assert read_traces(path, strict=True) == TRACES


GOOD = '{"trace_id":"a","token_ids":[1,2],"prompt_length":1}'


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD[:-4], GOOD], "line 1 is not JSON"),
        ([GOOD, ""], "line 2 is not JSON"),
        ([GOOD, "{", ""], "line 2 is not JSON"),
        (["{"], "line 1 is not JSON"),
        (["[1]"], "line 1 is list: give a JSON object"),
        ([GOOD.replace("prompt_length", "prompt")], "line 1 has the unknown key 'prompt'"),
        (['{"trace_id":"a","token_ids":[1]}'], "line 1 lacks 'prompt_length'"),
        ([GOOD.replace("[1,2]", "[1,-2]")], "line 1: token_ids of trace 'a' hold -2: give whole numbers >= 0"),
        ([GOOD.replace("[1,2]", "[1,true]")], "hold True: give whole numbers"),
        ([GOOD.replace("[1,2]", "[1,2.5]")], "hold 2.5: give whole numbers"),
        ([GOOD.replace("[1,2]", "[]")], "has no tokens"),
        ([GOOD.replace("[1,2]", '"12"')], "give a list of token ids"),
        ([GOOD.replace(":1}", ":3}")], "prompt_length of trace 'a' is 3: give a whole number from 0 to its length 2"),
        ([GOOD.replace(":1}", ':1,"thought_start":9}')], "thought_start of trace 'a' is 9"),
        ([GOOD.replace(":1}", ':1,"thought_end":1}')], "runs from None to 1"),
        ([GOOD.replace('"a"', '""')], "give a non-empty text"),
        ([GOOD, GOOD], "line 2 repeats the trace_id 'a' of line 1"),
    ],
)
def test_anything_else_broken_is_refused_by_line(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        read_traces(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_traces_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match="holds no traces"):
        read_traces(path)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_traces(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="there are no traces"):
        write_traces(tmp_path / "new.jsonl", [])
    with pytest.raises(ValueError, match="trace_id 'a#0' occurs twice"):
        write_traces(tmp_path / "new.jsonl", [TRACES[0], TRACES[0]])
    assert not (tmp_path / "new.jsonl").exists()


@pytest.mark.parametrize(
    ("prompt", "response", "span"),
    [
        ([5, 1, 6], [7, 7, 2, 8], (2, 5)),  # the template opens the thought
        ([5], [1, 7, 2, 8], (2, 3)),  # the model opens it
        ([5, 1, 6], [7, 7], (2, None)),  # never closed
        ([5], [7, 8], (None, None)),  # no thought
        ([5], [7, 2, 8], (1, 2)),  # closed, never opened
        ([1, 9, 2, 5], [1, 7, 2, 8], (5, 6)),  # a thought of an earlier turn
        ([1, 9, 2, 5], [7, 8], (None, None)),
        ([5, 1], [2, 8], (2, 2)),  # an empty thought
    ],
)
def test_the_thought_is_found(prompt: list[int], response: list[int], span: tuple[int | None, int | None]) -> None:
    trace = trace_from_ids("a", prompt, response, TokenTags.of_pair((1,), (2,)))
    assert (trace.thought_start, trace.thought_end) == span
    assert (trace.prompt_length, trace.token_ids) == (len(prompt), (*prompt, *response))


def test_ids_of_numpy_become_plain_numbers() -> None:
    trace = Trace("a", tuple(np.array([3, 4])), 1)
    assert json.dumps(trace.token_ids) == "[3, 4]"
