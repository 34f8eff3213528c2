"""Loading a model and its tokenizer, under any backend."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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
    config_of,
    is_gguf,
    loader,
    place_here,
    refusal,
    refuse_unknown_quantisation,
    refuse_without_kernels,
    remember_layout,
    skeleton,
    torch_dtype,
    where_it_lies,
)
from moe_steer.json_files import read_json, short
from moe_steer.lab import EMBEDDED
from moe_steer.layers import model_shape
from moe_steer.tokens import read_tokenizer_files, remember_tokenizer

_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


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
    config = _one_line(path_or_id, request.config)
    tokenizer = read_tokenizer(path_or_id, **request.hub_options)
    refuse_unknown_quantisation(config)
    _one_line(path_or_id, lambda: _refuse_unsteerable(config))
    layout = _layout(backend, config, request, batch, context, max_memory)
    if layout.backend == "device_map":
        rest = request.offload or ("cpu" if backend == "auto" else "")
        places = place_here(config, dtype, rest, max_memory, batch=batch, context=context)
        request = dataclasses.replace(request, places=places)
    model, layout = _one_line(path_or_id, lambda: loader(layout.backend)(request, layout))
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


def read_config(path_or_id: str | os.PathLike[str], **options: Any) -> Any:
    """Only the configuration of a model, named as for ``load_model``; a config.json without weights is enough."""
    given = Path(os.fspath(path_or_id))
    name = str(given.parent) if given.name == "config.json" else resolve(path_or_id)
    with _quiet_library():  # its warnings about a configuration come before our one line that refuses it
        return _one_line(path_or_id, lambda: config_of(name, **options))


def read_tokenizer(path_or_id: str | os.PathLike[str], **options: Any) -> Any:
    """Only the tokenizer of a model, named as for ``load_model``."""
    source, file = where_it_lies(resolve(path_or_id))
    for path in (Path(source, name) for name in ("tokenizer_config.json", "special_tokens_map.json")):
        if path.is_file():  # the library's reader keeps the last of two equal keys
            read_json(path, "fetch it again", {"model_max_length": int | float | None}, endless=True)
    # lab-dense names the class that R1-Distill-Qwen names, on purpose (lab/export.py); transformers advises against it
    with _quiet_library() if os.fspath(path_or_id) in EMBEDDED else nullcontext():
        read = _one_line(path_or_id, lambda: read_tokenizer_files(source, **file, **options), "the tokenizer of ")
    if file:
        read.name_or_path = resolve(path_or_id)  # the library names the folder
    return read


@contextmanager
def _quiet_library() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def resolve(path_or_id: str | os.PathLike[str]) -> str:
    """The folder, GGUF file or hub id; ValueError for what does not exist, and for a folder that holds neither config.json nor
    one GGUF file."""
    name = os.fspath(path_or_id)
    name = str(EMBEDDED[name].folder) if name in EMBEDDED else name
    if Path(name).is_dir() and not Path(name, "config.json").is_file() and (files := sorted(Path(name).glob("*.gguf"))):
        if len(files) > 1 and not _PART.search(files[0].name):
            raise ValueError(f"{name!r} holds {len(files)} GGUF files: give one of them, such as {os.fspath(files[0])}")
        name = os.fspath(files[0])
    if name.endswith(".gguf"):
        return _gguf(name)
    looks_like_path = os.sep in name or name.startswith(".")
    if looks_like_path and not Path(name).exists() and (name.count("/") != 1 or name[0] in "./"):
        raise ValueError(
            f"there is no model folder {name!r}: give a folder with config.json, a hub id or one of {', '.join(EMBEDDED)}"
        )
    if Path(name, "adapter_config.json").is_file() and not Path(name, "config.json").is_file():
        raise ValueError(
            f"{name!r} holds an adapter: merge it into its model first (peft: merge_and_unload, save_pretrained)"
        )
    if Path(name).exists() and not Path(name, "config.json").is_file():
        raise ValueError(f"{name!r} holds no config.json: give the folder of a checkpoint in the transformers format")
    return name


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


def _gguf(name: str) -> str:
    """The name of a GGUF file, local or in a hub repository; ValueError for a file that is not there, or is only a part."""
    if not Path(name).is_file() and (name.count("/") < 2 or name[0] in "./"):
        raise ValueError(f"there is no GGUF file {name!r}: give a file, or owner/name/file.gguf for one on the hub")
    if part := _PART.search(name):
        raise ValueError(
            f"{name!r} is one of {int(part[1])} parts, which the library does not join: llama-gguf-split --merge FIRST_PART WHOLE "
            "does, then give the whole file"
        )
    return name


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


def _said(error: Exception) -> list[str]:
    """The lines of an error, shortened; a headline that ends in a colon takes the next one with it."""
    if "weights_only" in str(error):  # torch advises to run the code in the file
        return [
            "its weights hold other things than tensors, and other pickles are not opened: give a safetensors checkpoint"
        ]
    if "trust_remote_code" in str(error):
        return ["its code comes with the checkpoint: read through it, then --trust-remote-code runs it"]
    if isinstance(error, KeyError):
        return [f"transformers looks for the key {short(str(error))} in its files and finds none: fetch it again"]
    lines = [short(line) for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return [f"{lines[0]} {lines[1]}"] if lines[0].endswith(":") and len(lines) > 1 else lines


def _one_line(path_or_id: str | os.PathLike[str], load: Callable[[], Any], what: str = "") -> Any:
    try:
        with warnings.catch_warnings():
            for said in ("Initializing zero-element tensors", "Detected pickle protocol"):
                warnings.filterwarnings("ignore", said)
            return load()
    except torch.cuda.OutOfMemoryError as error:
        raise ValueError(
            f"the model {os.fspath(path_or_id)!r} does not fit on this GPU: ask 'moe-steer memory' which backend does"
        ) from error
    except Exception as error:  # the library raises a dozen kinds for missing, gated, torn and unknown checkpoints
        first = _said(error)
        name = os.fspath(path_or_id)
        if resolve(name).endswith(".gguf"):
            package = isinstance(error, ImportError) and "gguf" in str(error).lower()
            remedy = "pip install 'moe-steer[gguf]'" if package else "give the checkpoint that the file was made from"
            raise ValueError(
                f"{what}the GGUF file {name!r} cannot be read by transformers ({first[0].rstrip('.')}): {remedy}"
            ) from error
        if isinstance(error, ModuleNotFoundError) and error.name:  # some quantisers import their package without a word
            first[0] += f": pip install {error.name.partition('.')[0]}"
        known = "" if "/" in name else f" (the embedded models are {' and '.join(EMBEDDED)})"
        raise ValueError(f"{what}the model {name!r} cannot be loaded: {first[0]}{known}") from error
