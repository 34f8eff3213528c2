import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoning_evals.problems import ANSWER_TYPES, Problem, check_unique, read_problems, write_problems
from reasoning_evals.tasks.own_file import load_own_file

LINE = {"problem_id": "a", "prompt": "2+2?", "target": "4", "answer_type": "integer"}


def write_lines(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("target", "answer_type", "text"),
    [
        (18, "integer", "18"),
        ("025", "integer", "25"),
        ("1,234", "integer", "1234"),
        ("-7", "integer", "-7"),
        (0.25, "number", "0.25"),
        (1e-19, "number", "1e-19"),
        (True, "choice", "True"),
        ([1, 2.5], "list", "[1, 2.5]"),
        (" B ", "choice", "B"),
        ("-12,345,678", "integer", "-12345678"),
        ("1,00,000", "integer", "100000"),
    ],
)
def test_targets_become_text(target, answer_type, text):
    assert Problem("a", "?", target, answer_type).target == text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"problem_id": ""}, "problem_id is '': expected a text"),
        ({"prompt": 5}, "prompt is 5: expected a text"),
        ({"answer_type": "int"}, "answer_type is 'int', expected one of integer, number"),
        ({"target": None}, "target is None, expected a text"),
        ({"target": float("nan"), "answer_type": "number"}, "target is nan"),
        ({"target": "4.5"}, "target is '4.5', an integer has digits and a sign alone; for other numbers"),
        ({"target": "9" * 2000}, "an integer has digits"),
        ({"target": "+-3"}, "expected one integer"),
        ({"target": "1,2,3"}, "target is '1,2,3', an integer has digits"),
        ({"target": "3,14"}, "target is '3,14', an integer has digits"),
        ({"target": "1,234,5"}, "an integer has digits"),
        ({"target": ",123"}, "an integer has digits"),
        ({"target": "\u0663"}, "an integer has digits"),
        ({"unit": 3}, "unit is 3, expected a text or nothing"),
        ({"tolerance": -0.1}, "tolerance is -0.1, expected a relative error from 0 to below 1"),
        ({"tolerance": True}, "tolerance is True"),
    ],
)
def test_what_is_no_problem_is_refused_in_one_line(fields, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        Problem(**{**LINE, **fields})
    assert message in str(error.value)


texts = st.text(min_size=1, max_size=30).filter(str.strip)


@given(
    st.lists(
        st.builds(
            Problem,
            texts,
            texts,
            texts,
            st.sampled_from([kind for kind in ANSWER_TYPES if kind != "integer"]),
            unit=st.none() | texts,
            tolerance=st.none() | st.floats(0, 0.9),
        ),
        unique_by=lambda problem: problem.problem_id,
        max_size=5,
    )
)
@settings(deadline=None, max_examples=50)
def test_files_give_back_what_was_written(tmp_path_factory, problems):
    path = tmp_path_factory.mktemp("problems") / "p.jsonl"
    write_problems(path, problems)
    assert read_problems(path) == problems
    assert not path.with_name("p.jsonl.partial").exists()


def test_gzipped_files_are_read(tmp_path):
    path = tmp_path / "p.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(LINE))
    assert read_problems(path) == [Problem(**LINE)]


def test_a_torn_last_line_is_named_or_left_out_when_asked(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", LINE, '{"problem_id": "b", "pro')
    with pytest.raises(ValueError, match=r"p\.jsonl:2 is not JSON .*: restore the line, or cut it off"):
        read_problems(path)
    assert [problem.problem_id for problem in read_problems(path, torn_tail=True)] == ["a"]


def test_a_torn_line_in_the_middle_is_never_left_out(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", '{"problem_id": "b", "pro', LINE)
    with pytest.raises(ValueError, match=r"p\.jsonl:1 is not JSON"):
        read_problems(path, torn_tail=True)


def test_unknown_and_missing_columns_are_named_with_what_would_fit(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", {"id": "a", "prompt": "?", "target": "4"})
    with pytest.raises(ValueError, match=r"p\.jsonl:1: unknown column 'id', column 'problem_id' is missing") as error:
        read_problems(path)
    assert "a problem has the columns problem_id, prompt, target" in str(error.value)
    assert "mapped by columns=" in str(error.value)


def test_an_id_may_occur_once(tmp_path):
    with pytest.raises(ValueError, match="problem_id 'a' occurs twice"):
        read_problems(write_lines(tmp_path / "p.jsonl", LINE, LINE))
    with pytest.raises(ValueError, match="problem_id 'a' occurs twice"):
        write_problems(tmp_path / "q.jsonl", [Problem(**LINE)] * 2)
    assert not (tmp_path / "q.jsonl").exists()
    check_unique([Problem(**LINE)])


def test_a_line_that_is_no_object_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"p\.jsonl:1: expected a JSON object, got list"):
        read_problems(write_lines(tmp_path / "p.jsonl", [1]))


def test_an_option_beyond_j_is_refused_before_anything_is_sampled(tmp_path):
    row = {"problem_id": "eleven", "prompt": "?", "target": "(K)", "answer_type": "choice"}
    path = write_lines(tmp_path / "mine.jsonl", row)
    with pytest.raises(
        ValueError,
        match=r"mine\.jsonl: target of 'eleven' is '\(K\)': options are graded from A to J, .* or True or False in full",
    ):
        load_own_file(str(path))
    assert load_own_file(str(write_lines(path, {**row, "target": "(J)"})))[0].target == "(J)"
