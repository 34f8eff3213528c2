"""A checkpoint read one parameter at a time, each sharded over the ranks before the next is read.

transformers 5.22 under its own ZeRO-3 switch first puts the experts of all layers together, on every rank, and reads an FP8
checkpoint whole. Its ordinary way of loading makes one parameter after the other (experts stacked, FP8 blocks expanded, names
translated) and sets it in a model that has no weights yet: here each is handed to DeepSpeed at that moment. Of stacked experts,
which are nearly all of a large model, a rank reads only those that its shard holds; so it does for DeepSpeed's AutoEP.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_SEQUENTIAL = "HF_DEACTIVATE_ASYNC_LOAD"


@contextmanager
def cut_while_reading(settings: dict[str, Any]) -> Iterator[None]:
    """Inside the block, ``from_pretrained`` keeps only this rank's part of every parameter: ``settings`` is the DeepSpeed
    configuration.

    All ranks must read the same checkpoint together. A rank holds its shard and at most a few copies of one parameter.
    """
    import deepspeed
    from transformers import core_model_loading
    from transformers.core_model_loading import WeightConverter

    cutter = deepspeed.zero.Init(config_dict_or_path=settings)
    set_whole, convert_all = core_model_loading.set_param_for_module, WeightConverter.convert
    own: set[str] = set()

    def convert(self: Any, layer_name: str, model: Any = None, *rest: Any, **named: Any) -> dict[str, Any]:
        mine = _keep_own_experts(self, model.get_parameter_or_buffer(layer_name))
        found = convert_all(self, layer_name, model, *rest, **named)
        if mine:
            own.update(found)
        return found

    def set_and_cut(model: Any, target_name: str, value: Any, loading_info: Any, *rest: Any) -> None:
        path, _, name = target_name.rpartition(".")
        module = model.get_submodule(path)
        if target_name in own:
            whole = module._parameters[name].shape
            loading_info.missing_keys.discard(target_name)
            if value.shape[1:] != whole[1:]:
                loading_info.mismatched_keys.add((target_name, torch.Size((whole[0], *value.shape[1:])), whole))
                return
            module._parameters[name] = _cut_already(cutter, whole, value)
            return
        set_whole(model, target_name, value, loading_info, *rest)
        parameter = module._parameters.get(name)
        if parameter is not None and not parameter.is_meta:
            cutter._convert_to_zero_parameters([parameter])

    core_model_loading.set_param_for_module = set_and_cut  # type: ignore[assignment]
    try:
        with _one_after_the_other(convert):
            yield
    finally:
        core_model_loading.set_param_for_module = set_whole


@contextmanager
def own_experts_while_reading() -> Iterator[None]:
    """Inside the block, ``from_pretrained`` reads only this rank's experts; the others are zeros that take no memory.

    For code that then shards them itself, as DeepSpeed's AutoEP does: rank r of n has E / n experts, from r * E / n on.
    """
    from transformers.core_model_loading import WeightConverter

    convert_all = WeightConverter.convert

    def convert(self: Any, layer_name: str, model: Any = None, *rest: Any, **named: Any) -> dict[str, Any]:
        whole = model.get_parameter_or_buffer(layer_name)
        mine = _keep_own_experts(self, whole)
        found = convert_all(self, layer_name, model, *rest, **named)
        return {name: _among_zeros(part, whole.shape) for name, part in found.items()} if mine else found

    with _one_after_the_other(convert):
        yield


def _among_zeros(part: Any, shape: torch.Size) -> Tensor:
    """This rank's experts at their place in a tensor of ``shape``, whose other pages are never written and so use no memory."""
    part = part[0] if isinstance(part, list) else part
    if part.shape[1:] != shape[1:]:
        return part  # the library then says which tensor has another shape
    pages = mmap.mmap(-1, shape.numel() * part.element_size())
    whole = torch.frombuffer(pages, dtype=part.dtype).view(shape)
    first = dist.get_rank() * part.shape[0]
    whole[first : first + part.shape[0]] = part
    return whole


@contextmanager
def _one_after_the_other(convert: Any) -> Iterator[None]:
    """Use ``convert`` for conversions; the library's threads would read far ahead, up to the whole checkpoint."""
    from transformers.core_model_loading import WeightConverter

    before, convert_all = os.environ.get(_SEQUENTIAL), WeightConverter.convert
    os.environ[_SEQUENTIAL] = "1"
    WeightConverter.convert = convert  # type: ignore[method-assign]
    try:
        yield
    finally:
        WeightConverter.convert = convert_all  # type: ignore[method-assign]
        if before is None:
            del os.environ[_SEQUENTIAL]
        else:
            os.environ[_SEQUENTIAL] = before


def _keep_own_experts(converter: Any, whole: Tensor) -> bool:
    """Remove the experts of other ranks, unread, from a conversion that stacks one tensor per expert; returns whether it
    was possible.

    ZeRO-3 cuts a parameter [E, ...] in memory order, so a rank's part is E / ranks experts, where that is a whole number.
    """
    ranks, num_experts = dist.get_world_size(), whole.shape[0] if whole.ndim else 0
    lists = list(converter.collected_tensors.values())
    if num_experts % ranks or any(len(items) != num_experts for items in lists):
        return False
    operations: dict[str, Any] = {type(op).__name__: getattr(op, "dim", None) for op in converter.operations}
    if operations.pop("MergeModulelist", None) != 0 or operations.pop("Concatenate", 1) < 1:
        return False
    if set(operations) - {"Fp8Dequantize"} or converter.quantization_operation is not None:
        return False
    each = num_experts // ranks
    first = dist.get_rank() * each
    for items in lists:
        items[:] = items[first : first + each]
    return True


def _cut_already(cutter: Any, shape: torch.Size, part: Tensor) -> nn.Parameter:
    """A parameter of ``shape`` as ZeRO-3 represents it, with this rank's ``part`` in memory order."""
    from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
    from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus

    nothing = torch.empty(1, dtype=part.dtype, device=cutter.local_device)
    parameter: Any = nn.Parameter(nothing.expand(shape), requires_grad=part.is_floating_point())
    cutter._convert_to_deepspeed_param(parameter)
    disk = None if parameter.ds_persist else cutter.param_swapper
    if disk is not None and not disk.swappable_tensor(numel=part.numel()):
        disk = None
    kept: Any
    if disk is not None:
        buffer = disk.get_buffer(parameter, part.numel())
        buffer.copy_(part.detach().flatten())
        kept = torch.empty(0, dtype=part.dtype)
        kept.data = buffer
    else:
        rest = "cpu" if cutter.param_swapper is not None else cutter.remote_device
        kept = part.detach().flatten().to(cutter.local_device if parameter.ds_persist else rest)
        if cutter.pin_memory and kept.device.type == "cpu":
            kept = kept.pin_memory()
    parameter.ds_tensor = kept
    kept.ds_numel = kept.numel()
    kept.status = PartitionedParamStatus.AVAILABLE
    kept.final_location = OffloadDeviceEnum.nvme if disk is not None else None
    parameter.ds_numel_aligned = shape.numel()
    if disk is not None:
        disk.swap_out_and_release([parameter])
    parameter.partition()  # the part is copied: release the rest
    parameter._is_hf_initialized = True
    return parameter
