"""What is asked of the hub: a commit for every data set that one is known of, and no guess for the others."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from reasoning_evals import load_task
from reasoning_evals.tasks.loading import SPECS

UNKNOWN = {"scibench", "tpbench", "physics"}


def test_only_these_reasoning_sets_have_no_commit_on_record() -> None:
    reasoning = {spec.family: spec.revision for spec in SPECS.values() if spec.sampling.temperature > 0}
    assert {family for family, revision in reasoning.items() if revision is None} == UNKNOWN
    assert len(reasoning) >= 14


@pytest.mark.parametrize("name", sorted(UNKNOWN))
def test_without_a_commit_nothing_is_loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match="no commit of .* is on record, give revision= .or data_dir= with local files"):
        load_task(name)


@pytest.mark.parametrize(
    ("name", "options", "asked"),
    [
        (
            "aime2025",
            {},
            {"data_files": None, "split": "train", "revision": "c94da77eb22bbd6439e62a323bec18493a421302"},
        ),
        ("aime2025", {"revision": "f" * 40}, {"data_files": None, "split": "train", "revision": "f" * 40}),
        (
            "phybench",
            {},
            {
                "data_files": "PHYBench-questions_v1.json",
                "split": "train",
                "revision": "d6d91c787b7abb865eb2490a328bf85a9f5095f0",
            },
        ),
    ],
)
def test_the_commit_and_the_file_are_asked_for(
    name: str, options: dict[str, Any], asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {
            "problem_idx": 1,
            "id": 1,
            "problem": "What is 1 + 1?",
            "content": "What is x?",
            "answer": "2",
            "tag": "OPTICS",
        },
        {
            "problem_idx": 2,
            "id": 2,
            "problem": "What is 1 + 2?",
            "content": "What is y?",
            "answer": "3",
            "tag": "OPTICS",
        },
    ]
    calls = []

    def load_dataset(path: str, config: str | None, **keywords: Any) -> list[dict[str, Any]]:
        calls.append((path, config, keywords))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [problem.target for problem in load_task(name, **options)] == ["2", "3"]
    assert calls == [(SPECS[name].hub_id, None, asked)]
