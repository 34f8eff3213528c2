"""Forced experts, biases and another k on two processes against one: as in one, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rank_processes import ROOT, run_ranks

pytestmark = pytest.mark.slow

WORKER = ROOT / "tests" / "launch" / "choice_worker.py"
CASES = [f"{backend}:deepseek_v3" for backend in ("tp_ep", "zero3", "autoep", "autoep_zero3")] + ["tp_ep:qwen3_moe"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("choice")
    (folder / "out").mkdir()
    done = run_ranks(WORKER, 2, [str(folder / "out"), str(folder / "models"), *CASES], 280)
    assert done.codes == [0, 0], done.text[-3000:]
    return [json.loads((folder / "out" / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("plan", ["all", "generated", "top_k"])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_choose_as_one_process(case: str, plan: str, results: list[dict[str, Any]]) -> None:
    for rank in results:
        found = rank[case][plan]
        if case.startswith("autoep") and plan == "top_k":
            assert "AutoEP sends every token to the model's own number of experts" in found["refused"]
            continue
        assert "refused" not in found, found
        assert found["logits"] <= (0.0 if case.startswith("zero3") else 1e-5)
        assert found["effect"] > 0.05, "a plan that was not applied would be seen"
        assert found["routed"]
        assert found["tokens"]
        assert found["rows"]
