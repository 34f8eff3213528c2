from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_steer.thinking import TokenTags
from reasoning_evals.engines.sampling import SamplingConfig
from reasoning_evals.problems import Problem
from reasoning_evals.runs.completions import Completion
from reasoning_evals.runs.run import GradeRow, grade_run, read_grades, run_arms
from reasoning_evals.runs.run_folder import read_generations
from reasoning_evals.thinking import TokenCounts, count_tokens, split_thought
from scripted_sampler import CLOSE_ID, OPEN_ID, STOP_ID, arms, problems


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run_arms(arms(), problems(6), tmp_path, 3, SamplingConfig(batch_size=4), seed=1, task="demo")
    return tmp_path


def test_rows_come_in_run_order_and_agree_with_the_samples(folder: Path) -> None:
    rows = grade_run(folder, problems(6))
    assert [(row.arm, row.problem_id, row.sample_idx) for row in rows] == [
        (arm, f"p{i}", j) for arm in ("baseline", "steered") for i in range(6) for j in range(3)
    ]
    samples = {(c.arm, c.problem_id, c.sample_idx): c for c in read_generations(folder)}
    for row in rows:
        sample = samples[row.arm, row.problem_id, row.sample_idx]
        right = f"\\boxed{{{row.problem_id[1:]}}}" in sample.text and sample.finish_reason == "stop"
        assert row.correct == right
        assert row.total_tokens == len(sample.token_ids)
        if sample.finish_reason == "stop":
            assert (row.state, row.thinking_tokens, row.answer_tokens) == ("closed", len(sample.token_ids) - 4, 2)
            assert row.extracted in (row.problem_id[1:], "-1")
        else:
            # The box inside an unfinished thought is not an answer, though problem p0's answer is 0.
            assert (row.outcome, row.state) == ("truncated", "truncated")
            assert (row.thinking_tokens, row.answer_tokens) == (len(sample.token_ids), 0)
    assert {row.outcome for row in rows} == {"correct", "wrong", "truncated"}
    assert read_grades(folder) == rows


def test_grading_again_gives_the_same_file_whatever_the_order_of_the_lines(folder: Path) -> None:
    grade_run(folder)
    before = (folder / "grades.jsonl").read_bytes()
    path = folder / "generations.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    (folder / "generations.rank5.jsonl").write_bytes(b"".join(lines[:9]))
    path.write_bytes(b"".join(lines[:4:-1]))
    grade_run(folder)
    assert (folder / "grades.jsonl").read_bytes() == before


def test_missing_samples_are_an_error_with_their_number(folder: Path) -> None:
    grade_run(folder)
    path = folder / "generations.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-5]))
    before = (folder / "grades.jsonl").read_bytes()
    with pytest.raises(ValueError, match="has 31 of 36 samples, 5 are missing"):
        grade_run(folder)
    assert (folder / "grades.jsonl").read_bytes() == before


def test_other_problems_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="is a run over 6 problems, 5 are given"):
        grade_run(folder, problems(5))
    with pytest.raises(ValueError, match="which is not among the problems"):
        grade_run(folder, [*problems(5), Problem("x", "q", "1", "integer")])


def test_corrected_targets_and_another_judge_are_taken(folder: Path) -> None:
    corrected = [Problem(p.problem_id, p.prompt, "-1", "integer") for p in problems(6)]
    first, second = grade_run(folder), grade_run(folder, corrected)
    closed = [pair for pair in zip(first, second, strict=True) if pair[0].state == "closed"]
    assert closed
    assert all(a.correct != b.correct for a, b in closed)

    class Always:
        outcome, extracted, reason = "wrong", None, "always"

    rows = grade_run(folder, grade=lambda problem, thought: Always())
    assert {row.outcome for row in rows} == {"wrong"}


def test_grades_of_an_ungraded_or_damaged_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match="has no grades.jsonl: grade the run first"):
        read_grades(folder)
    rows = grade_run(folder)
    (folder / "grades.jsonl").write_text(json.dumps({**rows[0].to_dict(), "extra": 1}) + "\n")
    with pytest.raises(ValueError, match=r"grades.jsonl:1: not a grade"):
        read_grades(folder)


def test_a_sampler_without_tags_leaves_the_counts_open(tmp_path: Path) -> None:
    arm = arms()[0]
    arm.sampler.describe = lambda: {"engine": "script"}  # type: ignore[method-assign]
    run_arms([arm], problems(2), tmp_path, 1, SamplingConfig(), seed=1)
    rows = grade_run(tmp_path)
    assert all(row.thinking_tokens is None and row.answer_tokens is None and row.total_tokens > 0 for row in rows)


TOKENS = {3: "a", 4: "b ", 5: "\n", OPEN_ID: "<think>", CLOSE_ID: "</think>"}


@settings(deadline=None, max_examples=300)
@given(ids=st.lists(st.sampled_from(sorted(TOKENS)), max_size=14), opened=st.booleans(), stopped=st.booleans())
def test_token_counts_agree_with_the_split_of_the_text(ids: list[int], opened: bool, stopped: bool) -> None:
    """Every token is a letter here, so the counts can be read off the split text."""
    letters = [token for token in ids if token != 4 and token != 5]
    thought = split_thought("".join(TOKENS[token] for token in letters), opened)
    generated = (*letters, STOP_ID) if stopped else tuple(letters)
    counts = count_tokens(generated, opened, TokenTags.of_pair([OPEN_ID], [CLOSE_ID]), stopped)
    inside = len(thought.thought)
    assert counts.total == len(generated)
    assert counts.thinking == inside
    if thought.state != "truncated":
        assert counts.answer == len(thought.answer)


def test_tags_of_several_tokens_are_found() -> None:
    ids = (9, 9, 20, 21, 8, 1)
    tags = TokenTags.of_pair([20, 22], [20, 21])
    assert count_tokens(ids, True, tags, True) == TokenCounts(2, 1, 6)
    assert count_tokens((20, 22, 9, 20, 21, 8), False, tags, False) == TokenCounts(1, 1, 6)


def test_grade_row_refuses_unknown_keys() -> None:
    with pytest.raises(ValueError, match="not a grade"):
        GradeRow.from_dict({"arm": "a"})
    assert "text" not in GradeRow.__dataclass_fields__
    assert "text" in Completion.__dataclass_fields__


def test_problems_and_arms_of_another_run_are_refused(folder: Path) -> None:
    """An edited target changes every accuracy, and an arm that nobody ran has no settings."""
    path = folder / "problems.jsonl"
    whole = path.read_text()
    path.write_text(
        whole.replace('"target":"', '"target":"1', 1)
        if '"target":"' in whole
        else whole.replace('"target": "', '"target": "1', 1)
    )
    assert path.read_text() != whole
    with pytest.raises(
        ValueError, match=r"problems.jsonl does not hold the problems of this run, whose digest is in run.json"
    ):
        grade_run(folder)
    path.write_text(whole)
    assert grade_run(folder)
    (generations,) = folder.glob("generations*.jsonl")
    lines = generations.read_text().splitlines(keepends=True)
    row = json.loads(lines[0])
    del row["digest"]  # as older versions wrote it
    generations.write_text("".join([json.dumps(row | {"arm": "other"}) + "\n", *lines[1:]]))
    with pytest.raises(ValueError, match="holds a sample of arm 'other', which is not of this run"):
        grade_run(folder)
