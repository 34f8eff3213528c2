"""Loading a model and its tokenizer, under any backend."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch

from moe_steer.backends import (
    Layout,
    LoadRequest,
    Unplanned,
    cached_folder,
    check_name,
    check_shards,
    choose_backend,
    is_gguf,
    loader,
    one_line_of,
    place_here,
    read_tokenizer,
    refusal,
    refuse_unknown_quantisation,
    refuse_without_kernels,
    remember_layout,
    resolve,
    skeleton,
    torch_dtype,
)
from moe_steer.lab import EMBEDDED
from moe_steer.layers import model_shape
from moe_steer.tokens import remember_tokenizer


def load_model(
    path_or_id: str | os.PathLike[str],
    backend: str = "auto",
    *,
    dtype: str = "auto",
    device: str | None = None,
    experts_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    offload: str = "",
    max_memory: str = "",
    check: bool = True,
    batch: int = 1,
    context: int | None = None,
) -> tuple[Any, Any]:
    """Load a model that writes text, and its tokenizer, for inference; returns (model, tokenizer).

    ``path_or_id``: a folder, a hub id, or an embedded model (``moe_steer.lab.EMBEDDED``). ``backend``: ``plain`` holds the
    whole model on every rank; device_map spreads it over the GPUs, CPU memory and disk of one process; tp_ep, autoep,
    autoep_zero3 and zero3 spread it over the ranks of the run (``moe_steer.backends``); ``auto`` chooses the fastest that fits
    and prints which. ``dtype``: ``auto`` (as stored) or a torch name such as ``bfloat16``. ``device``: default the GPU of this rank where there is one, else the CPU.
    ``experts_implementation``: eager, batched_mm or grouped_mm; default the library's choice. ``batch``, ``context``: rows
    decoded together and tokens that each may reach, for ``auto``. ``offload``: for zero3 and device_map, ``cpu`` or a folder on
    a local NVMe disk. ``max_memory``: for device_map, what weights may fill, as ``0=20GiB,cpu=30GiB``. ``check``: try a sharded
    model on a probe before handing it out (``moe_steer.selfcheck``). ValueError, in one line, when there is no such model, it
    cannot be read or lacks a tensor, its experts cannot be reached, or the backend cannot run it.
    ``moe_steer.backends.layout_of(model)`` says which rank needs which tokens.
    """
    check_name(backend)
    torch_dtype(dtype)
    name = resolve(path_or_id)
    request = LoadRequest(
        name=name,
        dtype=dtype,
        device=device or (f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"),
        experts_implementation=experts_implementation,
        revision=revision,
        trust_remote_code=trust_remote_code,
        offload=offload,
    )
    from transformers.utils import logging

    if _rank() == 0 and sys.stderr.isatty():
        logging.enable_progress_bar()
    else:
        logging.disable_progress_bar()
    if Path(name).is_dir():
        check_shards(name)
    elif not name.endswith(".gguf") and (cached := cached_folder(name, revision)):
        check_shards(cached, partial=True)
    # The configuration first: for a wrong name the tokenizer's reader would ask the hub twice.
    config = one_line_of(path_or_id, request.config)
    tokenizer = read_tokenizer(path_or_id, **request.hub_options)
    refuse_unknown_quantisation(config)
    one_line_of(path_or_id, lambda: _refuse_unsteerable(config))
    layout = _layout(backend, config, request, batch, context, max_memory)
    if layout.backend == "device_map":
        rest = request.offload or ("cpu" if backend == "auto" else "")
        places = place_here(config, dtype, rest, max_memory, batch=batch, context=context)
        request = dataclasses.replace(request, places=places)
    model, layout = one_line_of(path_or_id, lambda: loader(layout.backend)(request, layout))
    model.eval().requires_grad_(False)
    if os.fspath(path_or_id) in EMBEDDED:
        model.config._name_or_path = os.fspath(path_or_id)  # independent of where the package is installed
    if is_gguf(config):
        model.config._name_or_path = name  # the library names the folder
        if _rank() == 0:
            dtype = str(model.dtype).removeprefix("torch.")
            print(f"{name}: the weights of the GGUF file were dequantised to {dtype}", file=sys.stderr, flush=True)
    remember_layout(model, layout)
    remember_tokenizer(model, tokenizer)
    if check and layout.backend != "plain":
        from moe_steer.selfcheck import check_backend

        check_backend(model)
    return model, tokenizer


def _refuse_unsteerable(config: Any) -> None:
    """ValueError, before a weight is read, for a model that cannot be built, or in which no layer or expert can be reached.

    Says nothing of a model whose code comes with the checkpoint: that code need not run without data.
    """
    if type(config).__module__.partition(".")[0] != "transformers":
        return
    try:
        model = skeleton(config, "bfloat16")
    except Unplanned:
        return
    try:
        model_shape(model)
    except ValueError as error:
        raise ValueError(f"{error}; to measure it as it is, serve it and give --endpoint") from error


def _layout(
    backend: str, config: Any, request: LoadRequest, batch: int, context: int | None, max_memory: str
) -> Layout:
    rank, world_size = _rank(), int(os.environ.get("WORLD_SIZE", "1"))
    reason = f"{backend}: asked for"
    if backend == "auto":
        backend, reason = choose_backend(
            config, world_size, request.dtype, request.offload, batch=batch, context=context, max_memory=max_memory
        )
        if rank == 0 and (world_size > 1 or backend != "plain" or "cannot be planned" in reason):
            print(f"backend {reason}", file=sys.stderr, flush=True)
    why_not = refusal(backend, config, world_size)
    if why_not:
        raise ValueError(f"backend {backend!r} cannot run this model: {why_not}")
    if request.offload and backend not in ("zero3", "device_map"):
        raise ValueError(
            f"offload {request.offload!r} is a feature of zero3 and device_map, not of {backend}: leave it out, or use one of them"
        )
    if max_memory and backend != "device_map":
        raise ValueError(
            f"max_memory {max_memory!r} is a feature of device_map, not of {backend}: leave it out, or use device_map"
        )
    if backend in ("plain", "device_map", "tp_ep"):
        refuse_without_kernels(config)
    if backend not in ("plain", "device_map"):
        _join_ranks(world_size)
    return Layout(backend=backend, rank=rank, world_size=world_size, reason=reason)


def _join_ranks(world_size: int) -> None:
    """Sharded backends need the process group of the run; a single process creates a group of one."""
    from moe_steer.backends import without_compiled_shared_memory

    without_compiled_shared_memory()
    if torch.distributed.is_initialized():
        return
    if world_size > 1:
        raise ValueError(
            "the ranks have not met yet: start with 'deepspeed', and load inside launch.ranks.ranks_of_this_run()"
        )
    for key, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        os.environ.setdefault(key, value)
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
