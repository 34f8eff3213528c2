"""Every backend on two processes against one unsharded process: logits, samples, counts, audits, memory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from torch.utils.cpp_extension import get_default_build_root

from rank_processes import ROOT, run_ranks
from sharded_models import CONFIGS, PRESET_CONFIGS

pytestmark = pytest.mark.slow

WORKER = ROOT / "tests" / "launch" / "sharded_worker.py"
BACKENDS = ("tp_ep", "autoep", "autoep_zero3", "zero3")
ASYNC_IO = [*Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()).glob("**/async_io/*.so")]
OFFLOADED = ["zero3+cpu:wide", *(["zero3+nvme:wide"] if ASYNC_IO else [])]
FAST = [*(f"{backend}:deepseek_v3" for backend in BACKENDS), "tp_ep:qwen3_moe", "autoep:qwen3_moe", *OFFLOADED]
REFUSED = {
    f"{backend}:{model}": f"AutoEP has no preset for {CONFIGS[model][0]}"
    for backend in ("autoep", "autoep_zero3")
    for model in ("glm4_moe", "gpt_oss", "qwen2")
}
ROUNDED = [f"{backend}:{model}" for backend in BACKENDS for model in CONFIGS if model.endswith("_bf16")]
SLOW = [f"{backend}:{model}" for backend in BACKENDS for model in CONFIGS]
SLOW = [case for case in SLOW if case not in FAST + ROUNDED]
SLOW += [f"autoep:{model}" for model in PRESET_CONFIGS]


def run_cases(folder: Path, cases: list[str], num_ranks: int, limit: float) -> list[dict[str, Any]]:
    """The results of every rank."""
    (folder / "out").mkdir()
    done = run_ranks(WORKER, num_ranks, [str(folder / "out"), str(folder / "models"), *cases], limit)
    assert done.codes == [0] * num_ranks, done.text[-3000:]
    return [json.loads((folder / "out" / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_cases(tmp_path_factory.mktemp("fast"), FAST, 2, 280)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_cases(tmp_path_factory.mktemp("slow"), SLOW, 2, 400)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    cases = [*(f"{backend}:deepseek_v3" for backend in BACKENDS), "tp_ep:qwen3_moe"]
    return run_cases(tmp_path_factory.mktemp("four"), cases, 4, 400)


def check(case: str, ranks: list[dict[str, Any]]) -> None:
    """What must hold for one case on all ranks."""
    results = [rank[case] for rank in ranks]
    if case in REFUSED:
        assert all(REFUSED[case] in result["refused"] for result in results)
        return
    assert all("refused" not in result for result in results), results
    backend, _, model = case.partition(":")
    limit = 0.0 if backend.startswith("zero3") else 1e-5
    for result in results:
        assert result["shape_equal"]
        assert result["precision_equal"]
        assert result["plain"] <= limit
        assert result["steered"] <= limit
        assert result["effect"] > 0.05  # a plan that was not applied would be seen
        assert result["residual"] <= limit
        assert result["residual_effect"] > 0.05
        assert result["audit_equal"]
        assert result["generate_equal"]
        assert result["greedy"]
        assert result["steered_greedy"]
    if model != "qwen2":
        assert all(result["counts_equal"] for result in results)
        assert len({result["counted"] for result in results}) == 1
    shares = [tuple(result["share"]) for result in results]
    expected = [(0, 1)] * len(ranks) if backend == "tp_ep" else [(rank, len(ranks)) for rank in range(len(ranks))]
    assert shares == expected


@pytest.mark.parametrize("case", FAST)
def test_two_ranks_equal_one_process(case: str, fast: list[dict[str, Any]]) -> None:
    check(case, fast)


@pytest.mark.skipif(not ASYNC_IO, reason="DeepSpeed's operator async_io takes minutes to compile, and has not been")
def test_what_is_sent_to_nvme_lies_there_while_it_is_used(fast: list[dict[str, Any]]) -> None:
    experts = 2 * 16 * 3 * 256 * 128 * 4  # two layers of experts in float32
    assert all(rank["zero3+nvme:wide"]["files"] == experts // 2 for rank in fast)
    assert all(rank["zero3+nvme:wide"]["bytes"] < rank["zero3+cpu:wide"]["bytes"] - 0.9 * experts // 2 for rank in fast)
    assert not any(rank["zero3+cpu:wide"]["files"] for rank in fast)


@pytest.mark.parametrize("case", SLOW)
def test_two_ranks_equal_one_process_in_every_family(case: str, slow: list[dict[str, Any]]) -> None:
    check(case, slow)


@pytest.mark.parametrize("case", [*(f"{backend}:deepseek_v3" for backend in BACKENDS), "tp_ep:qwen3_moe"])
def test_four_ranks_equal_one_process(case: str, four: list[dict[str, Any]]) -> None:
    check(case, four)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_holds_what_the_memory_plan_says(backend: str, fast: list[dict[str, Any]], tmp_path: Path) -> None:
    from moe_steer.backends import read_config
    from moe_steer.backends.blueprint import skeleton
    from moe_steer.backends.shards import shard_of
    from sharded_models import save_checkpoint

    model = skeleton(read_config(save_checkpoint("deepseek_v3", tmp_path)))
    planned = shard_of(model, backend, 2).weights
    held = max(rank[f"{backend}:deepseek_v3"]["bytes"] for rank in fast)
    assert held == pytest.approx(planned, rel=0.05)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """On one rank and on two."""
    folders = [tmp_path_factory.mktemp(f"rounded{number}") for number in (1, 2)]
    return [run_cases(folder, ROUNDED, number, 140) for number, folder in enumerate(folders, start=1)]


def assert_rounding(result: dict[str, Any]) -> None:
    """Apart by roundings of bfloat16 (steps of 0.03 at these logits); where one of them decides for another expert, by more."""
    apart = sorted(result["by_token"])
    assert apart[len(apart) * 8 // 10] <= 0.1
    assert result["effect"] > 0.5


@pytest.mark.parametrize("case", ROUNDED)
def test_in_bfloat16_one_rank_computes_what_one_process_does(case: str, rounded: list[list[dict[str, Any]]]) -> None:
    """Also what families keep in float32 beside it: rotary frequencies, routing biases."""
    result = rounded[0][0][case]
    assert result["precision_equal"]
    if case.startswith("autoep"):  # DeepSpeed's own block adds up its experts in another order
        assert_rounding(result)
    else:
        assert result["plain"] == result["steered"] == 0.0


@pytest.mark.parametrize("case", ROUNDED)
def test_in_bfloat16_two_ranks_differ_by_its_rounding(case: str, rounded: list[list[dict[str, Any]]]) -> None:
    for rank in rounded[1]:
        assert rank[case]["precision_equal"]
        if case.startswith("zero3"):
            assert rank[case]["plain"] == rank[case]["steered"] == 0.0
        else:
            assert_rounding(rank[case])


@pytest.fixture(scope="module")
def mid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the checkpoints that loading is measured with: the first worker writes them, and 430 MiB take seconds."""
    return tmp_path_factory.mktemp("mid")


@pytest.mark.parametrize("backend", ["plain", *BACKENDS])
def test_loading_takes_what_the_memory_plan_says(backend: str, mid: Path, tmp_path: Path) -> None:
    from moe_steer.backends import read_config
    from moe_steer.backends.blueprint import skeleton
    from moe_steer.backends.shards import shard_of

    (tmp_path / "out").mkdir()
    arguments = [str(tmp_path / "out"), str(mid), backend]
    done = run_ranks(WORKER.with_name("loading_worker.py"), 2, arguments, 150)
    assert done.codes == [0, 0], done.text[-3000:]
    planned = shard_of(skeleton(read_config(mid / "mid")), backend, 2)
    for rank in (0, 1):
        found = json.loads((tmp_path / "out" / f"rank{rank}.json").read_text())
        assert found["held"] == pytest.approx(planned.weights, rel=0.05)
        assert found["peak"] < 1.15 * planned.loading + 48 * 2**20  # the libraries' own buffers
