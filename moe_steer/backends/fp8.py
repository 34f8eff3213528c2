"""Expanding FP8 checkpoints whose last block is not full, such as DeepSeek-R1's ``kv_a_proj_with_mqa`` (576 rows, blocks of 128)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_steer.backends.checkpoint import is_fp8

_LEAST_CAPABILITY = (8, 9)
"""CUDA compute capability; transformers expands FP8 to bfloat16 below it, and on a CPU."""


def has_fp8_hardware(on_gpu: bool) -> bool:
    """Whether FP8 stays FP8: on this machine's GPUs by what they are; GPUs that are described only are taken to be able to."""
    if not on_gpu:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= _LEAST_CAPABILITY


def refuse_without_kernels(config: Any) -> None:
    """ValueError, before a terabyte is read, when FP8 would stay FP8 here and the package that computes with it is missing."""
    if is_fp8(config) and torch.cuda.is_available() and has_fp8_hardware(True) and find_spec("kernels") is None:
        raise ValueError(
            "an FP8 checkpoint needs the package 'kernels' on this GPU: pip install 'moe-steer[fp8]', "
            "or use a backend that expands it to bfloat16 (zero3, autoep, autoep_zero3)"
        )


@contextmanager
def whole_blocks(config: Any) -> Iterator[None]:
    """While it lasts, transformers expands partly filled blocks too.

    transformers 5.22 takes the block size from the shapes (rows / rows of scales): where the last block is partly filled it
    raises, or, when the division happens to leave no rest, scales with blocks of the wrong size. Here the weight is filled up to
    whole blocks of the size that the checkpoint states, expanded, and cut back.
    """
    if not is_fp8(config):
        yield
        return
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    quantization = config.quantization_config
    stated = quantization.get("weight_block_size") if isinstance(quantization, dict) else quantization.weight_block_size
    block_rows, block_columns = stated or (128, 128)
    original = Fp8Dequantize._dequantize_one

    def expand(self: Any, quantized: Tensor, scales: Tensor, output_dtype: Any = None) -> Tensor:
        if scales.ndim < 2 or quantized.element_size() != 1 or not quantized.is_floating_point():
            return original(self, quantized, scales, output_dtype=output_dtype)
        rows, columns = quantized.shape[-2:]
        missing_rows = scales.shape[-2] * block_rows - rows
        missing_columns = scales.shape[-1] * block_columns - columns
        if not (0 < missing_rows < block_rows or 0 < missing_columns < block_columns):
            return original(self, quantized, scales, output_dtype=output_dtype)
        filled = pad(quantized.float(), (0, max(missing_columns, 0), 0, max(missing_rows, 0)))
        return original(self, filled, scales, output_dtype=output_dtype)[..., :rows, :columns]

    Fp8Dequantize._dequantize_one = expand  # type: ignore[method-assign]
    try:
        yield
    finally:
        Fp8Dequantize._dequantize_one = original  # type: ignore[method-assign]
