"""Gates and transforms on two processes against one: as in one, or refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rank_processes import ROOT, run_ranks

pytestmark = pytest.mark.slow

WORKER = ROOT / "tests" / "launch" / "gates_worker.py"
CASES = ("tp_ep:qwen3_moe", "zero3:deepseek_v3")


def counts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the names of files, which other ranks keep elsewhere."""
    return [{key: re.sub(r"\S+\.safetensors", "FILE", str(value)) for key, value in row.items()} for row in rows]


def test_two_ranks_gate_and_transform_as_one_process(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    done = run_ranks(WORKER, 2, [str(tmp_path / "out"), str(tmp_path / "models"), *CASES], 240)
    assert done.codes == [0, 0], done.text[-3000:]
    ranks = [json.loads((tmp_path / "out" / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for case in CASES:
        for rank in ranks:
            for name, found in rank[case].items():
                if case.startswith("tp_ep") and name == "head":  # which shares its heads among the ranks
                    assert "where attention is not split over ranks" in found["refused"], (case, found)
                    continue
                assert "refused" not in found, (case, name, found)
                assert found["logits"] <= (0.0 if case.startswith("zero3") else 1e-4), (case, name, found)
                assert found["effect"] > 0.01, (case, name)
                assert found["tokens"], (case, name)
                assert counts(found["rows"]) == counts(found["one"]), (case, name)
                if name == "gates":
                    assert sum(row["openings"] > 0 for row in found["one"]) >= 3, found["one"]
