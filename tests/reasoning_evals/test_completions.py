from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasoning_evals.runs.completions import Completion, JsonLinesWriter, read_completions
from reasoning_evals.runs.run_folder import read_generations

# Lone surrogates too: an endpoint's JSON may hold them.
ANY_TEXT = st.text(st.characters(codec=None))


def make(**changes: object) -> Completion:
    values: dict[str, object] = {
        "arm": "baseline",
        "task": "t",
        "problem_id": "p0",
        "sample_idx": 0,
        "prompt": "q<think>\n",
        "text": "a</think>b",
        "token_ids": (1, 2, 3),
        "finish_reason": "stop",
        "seed": 5,
        "config_hash": "c",
    }
    return Completion(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "ids", "fits"),
    [("a", [ord("a")], True), ("a", [900], False), ("", [900], True), ("--", [900], True), ("a", [10**12], False), ("a", [45] * 201, True)],
)  # fmt: skip
def test_tokens_that_this_tokenizer_does_not_have_are_no_text_of_it(text: str, ids: list[int], fits: bool) -> None:
    """They are decoded to nothing, with which every text begins."""

    class Letters:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            if max(ids) > 2**32:
                raise OverflowError
            return "".join(chr(one) for one in ids if one < 128)

    assert make(text=text, token_ids=tuple(ids)).is_of(Letters()) is fits


def write(path: Path, *completions: Completion) -> None:
    with JsonLinesWriter(path) as writer:
        for completion in completions:
            writer.append(completion.to_json())


@settings(deadline=None, max_examples=60)
@given(text=ANY_TEXT, ids=st.lists(st.integers(0, 10**6)), name=st.text(min_size=1))
def test_any_text_survives_the_file(
    tmp_path_factory: pytest.TempPathFactory, text: str, ids: list[int], name: str
) -> None:
    path = tmp_path_factory.mktemp("c") / "generations.jsonl"
    completion = make(text=text, token_ids=tuple(ids), problem_id=name)
    write(path, completion, make(sample_idx=1))
    assert list(read_completions(path)) == [completion, make(sample_idx=1)]


def test_torn_last_line_is_left_out_and_cut_before_the_next_append(tmp_path: Path) -> None:
    path = tmp_path / "generations.jsonl"
    write(path, make(), make(sample_idx=1))
    whole = path.read_bytes()
    for cut in (1, 10, len(make(sample_idx=1).to_json())):
        path.write_bytes(whole[:-cut])
        assert list(read_completions(path)) == [make()]
    write(path, make(sample_idx=1))
    assert path.read_bytes() == whole


def test_a_file_that_is_one_torn_line_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "generations.jsonl"
    path.write_bytes(b"x" * 200_000)
    assert list(read_completions(path)) == []
    write(path, make())
    assert list(read_completions(path)) == [make()]


@pytest.mark.parametrize(
    "line", ['{"arm": 1', "[]", '{"arm": "b"}', "null", json.dumps({**json.loads(make().to_json()), "x": 1})]
)
def test_a_bad_line_inside_names_file_and_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "generations.jsonl"
    path.write_text(make().to_json() + "\n" + line + "\n" + make(sample_idx=1).to_json() + "\n")
    with pytest.raises(ValueError, match=r"generations.jsonl:2: not a completion") as info:
        list(read_completions(path))
    assert "\n" not in str(info.value)


def test_a_line_that_was_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "generations.jsonl"
    row = json.loads(make().to_json())
    for changed in (
        {"text": "5"},
        {"finish_reason": "length"},
        {"token_ids": [1]},
        {"num_tokens": 3},
        {"digest": None},
    ):
        path.write_text(json.dumps(row | changed) + "\n")
        with pytest.raises(ValueError, match=r"generations.jsonl:1: .*it was changed since it was sampled"):
            list(read_completions(path))
    older = {name: value for name, value in row.items() if name != "digest"}  # of a version that wrote none
    path.write_text(json.dumps(row, indent=None, sort_keys=True) + "\n" + json.dumps(older) + "\n")
    assert list(read_completions(path)) == [make(), make()]


def test_duplicates_count_once_and_differing_ones_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "generations.rank0.jsonl", make(), make(sample_idx=1))
    write(tmp_path / "generations.rank1.jsonl", make())
    assert list(read_generations(tmp_path)) == [make(), make(sample_idx=1)]
    write(tmp_path / "generations.rank1.jsonl", make(sample_idx=1, text="other"))
    with pytest.raises(
        ValueError, match="sample 1 of problem 'p0', arm 'baseline', is there twice with different content"
    ):
        list(read_generations(tmp_path))


def test_two_writers_at_once_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "generations.jsonl"
    with JsonLinesWriter(path), pytest.raises(ValueError, match="another process is writing"):
        JsonLinesWriter(path)
    write(path, make())


def test_every_line_is_in_the_file_before_append_returns(tmp_path: Path) -> None:
    path = tmp_path / "generations.jsonl"
    with JsonLinesWriter(path) as writer:
        for index in range(3):
            writer.append(make(sample_idx=index).to_json())
            assert len(list(read_completions(path))) == index + 1


def test_finish_reason_is_checked() -> None:
    with pytest.raises(ValueError, match="finish_reason must be one of"):
        make(finish_reason="eos")
