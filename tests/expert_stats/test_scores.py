"""The record of scores: ranking, table, file."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from expert_stats import ExpertScores, score_experts
from stats_helpers import counts_of, random_counts


def test_the_ranking_goes_by_score_then_support_then_place() -> None:
    scores = score_experts(random_counts(2, num_layers=2, num_experts=4), missing_marker="skip")
    tied = dataclasses.replace(
        scores,
        score_LE=np.array([[0.5, 0.5, 0.9, np.nan], [0.5, 0.1, 0.5, 0.5]]),
        joint_MLE=np.array([[[3, 4, 1, 9], [4, 9, 4, 3]]] + [[[0] * 4] * 2] * 2),
        supported_LE=np.array([[True, True, True, True], [True, False, True, True]]),
    )
    order = [(row.layer, row.expert) for row in tied.ranking()]
    assert order == [(1, 2), (1, 1), (2, 0), (2, 2), (1, 0), (2, 3)]  # layers are absolute: the first with experts is 1
    assert [(row.layer, row.expert) for row in tied.ranking(supported_only=False)][-1] == (2, 1)


def test_a_row_tells_what_the_tables_hold() -> None:
    scores = score_experts(counts_of([(4, 8, 4, 1024)]))
    row = scores.ranking()[0]
    assert (row.layer, row.expert, row.support, row.rate, row.npmi) == (1, 0, 4, 8 / 1024, (0.875,))
    assert row.score == scores.score_LE[0, 0]
    assert math.isnan(row.q)  # one trace is no evidence
    assert "-" in scores.table().splitlines()[1].split()
    assert row.supported


def test_the_table_is_made_for_people() -> None:
    lines = score_experts(random_counts(2, num_experts=8), missing_marker="skip").table(3).splitlines()
    assert lines[0].split() == [
        "rank",
        "layer",
        "expert",
        "score",
        "bound",
        "top",
        "2",
        "support",
        "rate",
        "q",
        "token",
        "<think>",
        "</think>",
        "Alternatively",
    ]
    assert len({len(line) for line in lines}) == 1
    assert len(lines) <= 4


def test_a_file_gives_back_every_number(tmp_path: Path) -> None:
    scores = score_experts(random_counts(2, num_experts=8), missing_marker="skip")
    scores.save(tmp_path / "deep" / "s.json")
    again = ExpertScores.load(tmp_path / "deep" / "s.json")
    for item in dataclasses.fields(scores):
        before, after = getattr(scores, item.name), getattr(again, item.name)
        if isinstance(before, np.ndarray):
            assert before.dtype == after.dtype
            np.testing.assert_array_equal(before, after)
        elif item.name != "halves":
            assert before == after, item.name
    for before, after in zip(scores.halves, again.halves, strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)
    assert again.table() == scores.table()
    assert repr(again.ranking()) == repr(scores.ranking())
    record = json.loads((tmp_path / "deep" / "s.json").read_text())
    assert again.fresh == scores.fresh, "none is undefined here"
    assert {one["chosen_by"] for one in record["fresh"]} == {"first half", "second half"}
    undefined = dataclasses.replace(scores, fresh=(scores.fresh[0]._replace(low=math.nan, high=math.nan),))
    undefined.save(tmp_path / "deep" / "s.json")
    assert repr(ExpertScores.load(tmp_path / "deep" / "s.json").fresh) == repr(undefined.fresh)
    older = {key: value for key, value in record.items() if key != "fresh"} | {"version": 3}
    (tmp_path / "deep" / "s.json").write_text(json.dumps(older))
    assert ExpertScores.load(tmp_path / "deep" / "s.json").fresh == (), "files of version 3 had none"
    assert record["stability"]["spearman"] == pytest.approx(scores.stability["spearman"])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["s.json"]


def test_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    scores = score_experts(random_counts(2), missing_marker="skip")
    scores.save(path)
    record = json.loads(path.read_text())
    for spoilt in (
        path.read_text()[:-20],
        "[]",
        "{}",
        json.dumps({**record, "version": 1}),
        json.dumps({**record, "extra": 2}),
        json.dumps({**record, "tables": {**record["tables"], "score_LE": [[1.0]]}}),
        json.dumps({**record, "tables": {}}),
        json.dumps({**record, "fresh": [{**record["fresh"][0], "low": "0"}]}),
        json.dumps({**record, "fresh": [{**record["fresh"][0], "chosen_by": "all"}]}),
        json.dumps({**record, "fresh": [{"chosen_by": "all problems"}]}),
    ):
        path.write_text(spoilt)
        with pytest.raises(ValueError, match="holds no expert scores") as caught:
            ExpertScores.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        ExpertScores.load(tmp_path / "none.json")
