"""What vLLM's CPU build lacks for experts on several ranks, as ``worker_extension_cls`` of an engine: imported in each of its workers.

Its layer hands the map of experts to ranks to the experts of a CPU, which do not look at it: their kernel takes the ids of experts that
lie elsewhere for places of its own tables, and sums up something else or dies (SIGSEGV). And its collectives have no ``all_gatherv`` and
``reduce_scatterv``, by which data-parallel ranks exchange tokens (NotImplementedError). Everything else is as vLLM has it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.model_executor.layers.fused_moe.experts import cpu_moe


class Extension:
    """Nothing: importing this module is what counts."""


def local(kernel: Any) -> Any:
    """The kernel, told of the experts of this rank alone: the others weigh 0 here."""

    def apply(self: Any, *, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None, **more: Any) -> None:
        if expert_map is not None:
            here_TK = expert_map[topk_ids.long()].to(topk_ids.dtype)
            topk_weights = topk_weights.where(here_TK >= 0, 0.0)
            topk_ids = here_TK.clamp(min=0)
        kernel(self, topk_weights=topk_weights, topk_ids=topk_ids, expert_map=None, **more)

    return apply


def all_gatherv(self: Any, given: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """The rows of all ranks, of which each has its own number."""
    if isinstance(given, list):
        return [all_gatherv(self, one, dim, sizes) for one in given]
    sizes = sizes or [len(given)] * self.world_size
    parts = [given.new_empty(n, *given.shape[1:]) for n in sizes]
    for rank, part in enumerate(parts):
        if rank == self.rank_in_group:
            part.copy_(given)
        dist.broadcast(part, self.ranks[rank], group=self.device_group)
    return torch.cat(parts)


def reduce_scatterv(self: Any, given: Tensor, dim: int = 0, sizes: list[int] | None = None) -> Tensor:
    """This rank's rows of the sum over all ranks."""
    whole = given.clone()
    dist.all_reduce(whole, group=self.device_group)
    return whole.split(sizes or len(given) // self.world_size)[self.rank_in_group].contiguous()


cpu_moe.CPUUnquantizedExperts.apply = local(cpu_moe.CPUUnquantizedExperts.apply)
CpuCommunicator.all_gatherv, CpuCommunicator.reduce_scatterv = all_gatherv, reduce_scatterv
