"""Reading a checkpoint by shard: which experts a rank reads, and what ZeRO-3 is left with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import core_model_loading
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

from moe_steer.backends.streaming import _among_zeros, _keep_own_experts, cut_while_reading, own_experts_while_reading
from moe_steer.backends.zero3 import settings, without_compiled_shared_memory, zero3_section

E, F, D = 6, 4, 3


def ranks(monkeypatch: pytest.MonkeyPatch, rank: int, number: int) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda *_: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: number)


def converter(*operations: Any, num: int = E) -> WeightConverter:
    """The conversion of a layer's gate and up projections, of which nothing has been read yet."""
    generator = torch.Generator().manual_seed(0)
    made = WeightConverter(["experts.*.gate.weight", "experts.*.up.weight"], "experts.gate_up", list(operations))
    for pattern in made.source_patterns:
        for expert in range(num):
            value = torch.randn(F, D, generator=generator)
            name = pattern.replace("*", str(expert))
            made.add_tensor("experts.gate_up", name, pattern, lambda value=value: value)
    return made


@pytest.mark.parametrize("number", [1, 2, 3, 6])
def test_the_parts_of_all_ranks_are_the_whole_in_memory_order(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = converter(MergeModulelist(dim=0), Concatenate(dim=1)).convert("experts.gate_up")["experts.gate_up"]
    assert whole.shape == (E, 2 * F, D)
    parts = []
    for rank in range(number):
        ranks(monkeypatch, rank, number)
        own = converter(MergeModulelist(dim=0), Concatenate(dim=1))
        assert _keep_own_experts(own, whole)
        assert [len(items) for items in own.collected_tensors.values()] == [E // number] * 2
        parts.append(own.convert("experts.gate_up")["experts.gate_up"].flatten())
    assert torch.equal(torch.cat(parts), whole.flatten())


def test_other_conversions_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.empty(E, 2 * F, D)
    ranks(monkeypatch, 0, 4)  # 6 experts for 4 ranks: a part would end inside an expert
    assert not _keep_own_experts(converter(MergeModulelist(dim=0), Concatenate(dim=1)), whole)
    ranks(monkeypatch, 0, 2)
    for odd in (
        converter(MergeModulelist(dim=1), Concatenate(dim=1)),
        converter(MergeModulelist(dim=0), Concatenate(dim=0)),
        converter(MergeModulelist(dim=0), Concatenate(dim=1), Transpose(0, 1)),
        converter(MergeModulelist(dim=0), Concatenate(dim=1), num=E - 1),
    ):
        before = [len(items) for items in odd.collected_tensors.values()]
        assert not _keep_own_experts(odd, whole)
        assert [len(items) for items in odd.collected_tensors.values()] == before


@pytest.mark.parametrize("number", [2, 3])
def test_own_experts_lie_among_zeros_at_their_place(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = torch.nn.Module()
    holder.gate_up = torch.nn.Parameter(torch.empty(E, 2 * F, D, device="meta"))
    vars(holder)["get_parameter_or_buffer"] = holder.get_parameter  # as transformers' models have it
    whole = converter(MergeModulelist(dim=0), Concatenate(dim=1)).convert("gate_up")["experts.gate_up"]
    pieces = []
    for rank in range(number):
        ranks(monkeypatch, rank, number)
        made = converter(MergeModulelist(dim=0), Concatenate(dim=1))
        with own_experts_while_reading():
            found = made.convert("gate_up", holder)["experts.gate_up"]
        own = slice(rank * E // number, (rank + 1) * E // number)
        assert torch.equal(found[own], whole[own])
        assert found[own].count_nonzero() == found.count_nonzero()
        pieces.append(found)
    assert torch.equal(sum(pieces[1:], pieces[0]), whole)


def test_the_zeros_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks(monkeypatch, 1, 4)
    before = resident_bytes()
    whole = _among_zeros(torch.ones(1, 16, 2**20), torch.Size([4, 16, 2**20]))
    assert whole.numel() * 4 == 2**28
    assert resident_bytes() - before < 2**27 + 2**22  # the part twice: as made here, and in its place
    assert whole[1].all()


def resident_bytes() -> int:
    """Memory of this process that is not a file's pages."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one, perhaps the one that another test of this process left."""
    if dist.is_initialized():
        assert dist.get_world_size() == 1
        yield
        return
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    without_compiled_shared_memory()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]


def test_the_library_is_as_before_afterwards(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)
    before = (core_model_loading.set_param_for_module, WeightConverter.convert)
    with (
        pytest.raises(ZeroDivisionError),
        cut_while_reading(settings(torch.float32, zero_optimization=zero3_section())),
    ):
        assert core_model_loading.set_param_for_module is not before[0]
        raise ZeroDivisionError
    assert (core_model_loading.set_param_for_module, WeightConverter.convert) == before
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ
