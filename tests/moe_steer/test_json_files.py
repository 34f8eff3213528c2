"""JSON of other people: what the strict reader refuses, in one line with file and key, for every kind of file that takes it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sae_files
from expert_stats import ExpertScores
from moe_steer import SteeringPlan
from moe_steer.json_files import (
    MAX_DEPTH,
    NotJSON,
    check_types,
    csv_rows,
    is_number,
    parse_json,
    quoted,
    read_json_lines,
    record_of,
    short,
)
from moe_steer.saes.reading import load_sae
from moe_steer.tokens.traces import read_traces
from reasoning_evals.problems import read_problems
from reasoning_evals.runs.audits import read_audit
from reasoning_evals.runs.completions import read_completions
from reasoning_evals.runs.grading_pass import read_grades
from reasoning_evals.runs.run_folder import config_hash, read_run
from reasoning_evals.tasks.own_file import load_own_file

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def deep(depth: int) -> str:
    return "[" * depth + "]" * depth


@given(value=VALUES)
def test_what_the_standard_writer_writes_is_read_as_it_is(value: Any) -> None:
    text = json.dumps(value)
    assert parse_json(text, "f", "r") == parse_json(text.encode(), "f", "r") == json.loads(text)
    assert parse_json(json.dumps(value, ensure_ascii=False), "f", "r") == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"gain": 2, "gain": 64}', "f.json:3 holds the key 'gain' twice in one object: keep one"),
        (b'[{"x": {"a": 1, "b": 2, "a": 1}}]', "holds the key 'a' twice"),
        (b'{"gain": NaN}', "f.json:3 holds nan under the key 'gain'"),
        (b'{"gain": [1, [-Infinity]]}', "holds -inf under the key 'gain'"),
        (b'{"gain": 1e400}', "holds inf under the key 'gain', or a number too large for float64: give a finite number"),
        (b'{"gain": ' + b"9" * 309 + b".0}", "holds inf under the key 'gain'"),
        (b'{"gain": ' + b"9" * 5000 + b"}", "f.json:3 holds a number of more than 4300 digits: mend"),
        (b"\xef\xbb\xbf{}", "f.json:3 begins with a byte order mark: save it in UTF-8 without one"),
        (b'{"name": "\xe9"}', "f.json:3 is not UTF-8 text .* at byte 10.: save it in UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "f.json:3 is not UTF-8 text"),
        (rb'{"name": {"x": ["\ud800"]}}', "f.json:3 holds half a surrogate pair under the key 'x', which is not a character"),
        (rb'{"\udc00": 1}', "half a surrogate pair under the key"),
        (b'{"a": ' + deep(99).encode() + b"}", None),
        (b'{"a": ' + deep(100).encode() + b"}", "f.json:3 is nested deeper than 100 levels under the key 'a': mend"),
        (deep(100_000).encode(), "f.json:3 is nested deeper than 100 levels: mend"),
        (b'{"a": 1', "f.json:3 is not JSON .*: mend"),
        (b"", "f.json:3 is not JSON"),
        (b"{} {}", "f.json:3 is not JSON .Extra data"),
    ],
)  # fmt: skip
def test_what_is_refused_and_how_it_is_named(content: bytes, message: str | None) -> None:
    if message is None:
        parse_json(content, "f.json:3", "mend it")
        return
    with pytest.raises(ValueError, match=message) as caught:
        parse_json(content, "f.json:3", "mend it")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    str(caught.value).encode()


def test_whole_pairs_and_answers_of_models_are_read() -> None:
    assert parse_json(rb'{"a": "\ud83d\ude00"}', "f", "r") == {"a": "\U0001f600"}
    assert parse_json(rb'{"a": "\ud800"}', "f", "r", surrogates=True) == {"a": "\ud800"}
    assert parse_json(b'{"a": "NaN 1e400 [[[["}', "f", "r") == {"a": "NaN 1e400 [[[["}
    assert parse_json(json.dumps({"a": ["{"] * 3 * MAX_DEPTH}), "f", "r")["a"][0] == "{"


@pytest.mark.parametrize(
    ("kind", "good", "bad", "message"),
    [
        (str, ["", "a"], [1, None], "f: 'x' is 1: give a text"),
        (int, [0, -3], [True, 1.0, "1"], "f: 'x' is True: give a whole number"),
        (float, [0, 1.5], [True, 10**400, float("nan"), "1"], "f: 'x' is True: give a number"),
        (bool, [False], [0, "false", None], "f: 'x' is 0: give true or false"),
        (list[int], [[], [1]], [[True], [1.0], {}, "a"], "f: 'x' is .True.: give a list, each item a whole number"),
        (list[dict], [[{}]], [["text"], None], "f: 'x' is .'text'.: give a list, each item an object"),
        (dict | None, [{}, None], [[], "text"], "f: 'x' is ..: give an object or null"),
    ],
)
def test_types_of_values(kind: Any, good: list[Any], bad: list[Any], message: str) -> None:
    for value in good:
        assert check_types({"x": value, "y": 1}, "f", {"x": kind, "z": int}) == {"x": value, "y": 1}
    for number, value in enumerate(bad):
        with pytest.raises(ValueError, match=message if number == 0 else "give "):
            check_types({"x": value}, "f", {"x": kind})


def test_numbers_and_quotes() -> None:
    assert [is_number(value) for value in (1, -1.5, 10**308, True, 10**309, float("inf"), float("nan"), "1", None)] == [
        True,
        True,
        True,
        *[False] * 6,
    ]
    assert quoted("short") == "'short'"
    assert len(quoted("x" * 10_000)) == 200


def test_lines_plain_and_gzipped(tmp_path: Path) -> None:
    content = b'{"a": 1}\r\n\n  \n{"a": "\xe2\x80\xa8"}\n{"a": 3'
    for name in ("x.jsonl", "x.jsonl.gz"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        rows = list(read_json_lines(path, torn_tail=True))
        assert rows == [(f"{path}:1", {"a": 1}), (f"{path}:4", {"a": "\u2028"})]
        with pytest.raises(NotJSON, match=f"{name}:5 is not JSON"):
            list(read_json_lines(path))
    path.write_bytes(gzip.compress(content)[:-9])
    with pytest.raises(ValueError, match="x.jsonl.gz is a damaged gzip file"):
        list(read_json_lines(path))


def test_a_torn_tail_hides_nothing_else(tmp_path: Path) -> None:
    """A last line without a newline that is whole but wrong was not left by a killed writer."""
    (tmp_path / "x.jsonl").write_text('{"a": 1, "a": 2}')
    with pytest.raises(ValueError, match="holds the key 'a' twice"):
        list(read_json_lines(tmp_path / "x.jsonl", torn_tail=True))


def _sae(path: Path) -> Any:
    sae = sae_files.saelens(path.parent).path
    path.replace(sae / "cfg.json")
    return load_sae(sae)


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "plan": ("plan.json", SteeringPlan.load),
    "problems": ("problems.jsonl", read_problems),
    "own list": ("problems.json", lambda path: load_own_file(str(path))),
    "completions": ("generations.jsonl", lambda path: list(read_completions(path))),
    "grades": ("grades.jsonl", lambda path: read_grades(path.parent)),
    "audit": ("audit.jsonl", lambda path: read_audit(path.parent).rows),
    "run": ("run.json", lambda path: read_run(path.parent)),
    "scores": ("scores.json", ExpertScores.load),
    "sae": ("cfg.json", _sae),
    "traces": ("traces.jsonl", read_traces),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"version": 1, "version": 2}\n', "holds the key 'version' twice"),
        (b'{"version": NaN}\n', "holds nan under the key 'version'"),
        (b'{"version": 1e999}\n', "holds inf under the key 'version'"),
        (b'{"version": ' + deep(20_000).encode() + b"}\n", "is nested deeper than 100 levels"),
        (b'\xef\xbb\xbf{"version": 1}\n', "byte order mark"),
        (b'{"version": "\xff"}\n', "is not UTF-8 text"),
    ],
)
def test_every_reader_refuses_them_and_names_the_file(
    reader: str, content: bytes, message: str, tmp_path: Path
) -> None:
    name, read = READERS[reader]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


COMPLETION = {
    "arm": "a", "task": "t", "problem_id": "p", "sample_idx": 0, "prompt": "q", "text": "x", "token_ids": [1],
    "finish_reason": "stop", "seed": 5, "config_hash": "c",
}  # fmt: skip
GRADE = {
    "arm": "a", "task": "t", "problem_id": "p", "sample_idx": 0, "outcome": "correct", "extracted": None, "reason": "",
    "method": "", "state": "none", "finish_reason": "stop", "thinking_tokens": None, "answer_tokens": 1, "total_tokens": 1,
}  # fmt: skip
ARM = {"sampler": {}, "details": {}, "prompts": "q"}
CONFIG: dict[str, Any] = {
    "arm_order": ["a"], "k": 2, "num_problems": 1, "problems": "p", "seed": 0, "task": "t",
    "sampling": {"greedy": False, "max_new_tokens": 1, "batch_size": 1, "top_k": 0, "temperature": 1.0, "top_p": 1.0},
}  # fmt: skip
CONFIG["arms"] = {"a": {**ARM, "config_hash": config_hash(CONFIG, "a", ARM)}}
PLAN = {"version": 1, "experts": [{"layer": 1, "expert": 2, "gain": 2}]}


@pytest.mark.parametrize(
    ("reader", "content", "message"),
    [
        ("plan", {**PLAN, "model": "text"}, "model of the plan is 'text': give a JSON object"),
        ("plan", {**PLAN, "model": {"num_layers": "6"}}, "plan.model: 'num_layers' is '6': give a whole number or null"),
        ("plan", {**PLAN, "provenance": 5}, "provenance of the plan is 5"),
        ("plan", {**PLAN, "scope": {}}, "scope"),
        ("plan", {"version": 1, "experts": [{"layer": 1, "expert": 2, "gain": 10**400}]}, "gain .* is 1000.*: give a finite"),
        ("completions", {**COMPLETION, "text": 5}, "generations.jsonl:1: not a completion .'text' is 5: give a text"),
        ("completions", {**COMPLETION, "token_ids": [1, "2"]}, "'token_ids' is .1, '2'.: give a list, each item a whole"),
        ("completions", {**COMPLETION, "seed": True}, "'seed' is True"),
        ("grades", {**GRADE, "total_tokens": "1"}, "grades.jsonl:1: not a grade: 'total_tokens' is '1': give a whole number"),
        ("grades", [1], "grades.jsonl:1: not a grade"),
        ("audit", {"arm": "a", "chunk": 0, "rows": ["text"]}, "audit.jsonl:1: 'rows' is .'text'.: give a list, each item an"),
        ("audit", {"arm": "a", "chunk": 0, "rows": [{"tokens": "3"}]}, "audit.jsonl:1: 'tokens' is '3': give a number"),
        ("audit", {"arm": "a", "chunk": 0}, "audit.jsonl:1 is .*: an object with arm, chunk, rows is expected"),
        ("run", {"version": 1, "config": {**CONFIG, "k": {}}}, "run.json, config: 'k' is {}: give a whole number"),
        ("sae", {"architecture": "standard", "metadata": "text"}, "cfg.json: 'metadata' is 'text': give an object or null"),
        ("sae", {"architecture": "standard", "apply_b_dec_to_input": "false"}, "'apply_b_dec_to_input' is 'false': give true"),
        ("scores", {"version": 1, "marker_names": "a"}, "scores.json holds no expert scores .*'marker_names' is 'a'"),
    ],
)  # fmt: skip
def test_wrong_types_are_refused_by_key(reader: str, content: Any, message: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    (tmp_path / name).write_text(json.dumps(content) + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("reader", "content"),
    [("plan", PLAN), ("completions", COMPLETION), ("grades", GRADE), ("run", {"version": 1, "config": CONFIG})],
)
def test_the_good_ones_are_read(reader: str, content: Any, tmp_path: Path) -> None:
    """What the refused ones above were made from."""
    name, read = READERS[reader]
    (tmp_path / name).write_text(json.dumps(content) + "\n")
    assert read(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2,3\n", "f.csv:2: the record has 3 cells, and 2 columns are named: put texts with commas in quotes"),
        ("a,b\n1\n", "f.csv:2: the record has 1 cells, and 2 columns"),
        ("a,a\n1,2\n", "f.csv:1 names 'a' twice"),
        ("a,\n1,2\n", "f.csv:1 leaves a column without a name"),
        ('a,b\n1,"2\n', "f.csv:2 is not CSV"),
        ('a,b\n1,"2"x\n', "f.csv:2 is not CSV"),
        (f"a,b\n1,{'x' * 140_000}\n", "f.csv:2 is not CSV .field larger"),
    ],
)
def test_csv_that_contradicts_itself_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        list(csv_rows(text, "f.csv"))
    assert len(str(caught.value)) < 300


def test_csv_is_read_as_the_standard_library_reads_it() -> None:
    text = 'a,b\r\n"x, ""y""",2\r\n\r\n"two\nlines",3\r\n'
    found = list(csv_rows(text, "f.csv"))
    assert [row for _, row in found] == list(csv.DictReader(io.StringIO(text, newline="")))
    assert [where for where, _ in found] == ["f.csv:2", "f.csv:5"]
    assert list(csv_rows("", "f.csv")) == []


def test_endless_numbers_are_kept_where_they_are_asked_for() -> None:
    text = '{"time_step_limit": [0.0, Infinity]}'
    with pytest.raises(ValueError, match="finite"):
        parse_json(text, "f", "r")
    assert parse_json(text, "f", "r", endless=True)["time_step_limit"][1] == float("inf")
    with pytest.raises(ValueError, match="twice"):
        parse_json('{"a": Infinity, "a": 1}', "f", "r", endless=True)


def test_types_of_options_are_checked_as_json_writes_them() -> None:
    types = {"a": tuple[str, ...], "b": Literal["x", "y"], "c": Optional[int]}  # noqa: UP045 -- as libraries write it
    check_types({"a": ["x"], "b": "y", "c": None}, "f", types)
    for wrong in ({"a": [1]}, {"a": "x"}, {"b": "z"}, {"b": ["x"]}, {"c": True}, {"c": 1.0}):
        with pytest.raises(ValueError, match="f: "):
            check_types(wrong, "f", types)


def test_what_a_library_says_is_shortened() -> None:
    assert short(ValueError("a\n b  c")) == "a b c"
    assert short(KeyError()) == "KeyError"
    assert len(short(ValueError("x" * 10_000))) == 200


@dataclass(frozen=True, kw_only=True)
class Shape:
    """For the test below."""

    name: str
    corners: tuple[tuple[int, int], ...]
    weights: tuple[float, ...] = ()
    area: float | None = None


def test_a_record_is_made_of_its_json_object_strictly() -> None:
    data = {"name": "a", "corners": [[0, 1], [2, 3]], "weights": [1, 0.5]}
    assert record_of(Shape, data, "x") == Shape(name="a", corners=((0, 1), (2, 3)), weights=(1, 0.5))
    assert record_of(Shape, {"name": "a"}, "x", corners=()) == Shape(name="a", corners=())
    for change, said in (
        ({"corners": [[0, 1, 2]]}, "x: 'corners' is"),
        ({"corners": [[0, "1"]]}, "x: 'corners' is"),
        ({"weights": "1"}, "x: 'weights' is '1': give a list, each item a number"),
        ({"area": "1"}, "x: 'area' is '1': give a number or null"),
        ({"colour": 1}, "x: unknown key 'colour'"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            record_of(Shape, {**data, **change}, "x")
    with pytest.raises(ValueError, match="x: 'name' is missing"):
        record_of(Shape, {"corners": []}, "x")
