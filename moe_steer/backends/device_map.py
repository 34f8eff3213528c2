"""accelerate's big-model inference: one process; layers fill the GPUs, which may be of unequal size, then CPU memory, then disk.

A layer computes where it rests. One that rests in CPU memory or on disk is copied to the first GPU (without a GPU: into CPU
memory) for its call, and its key-value cache stays there. accelerate does this by replacing ``forward`` of the modules, so
our hooks, which torch runs around ``forward``, see the same calls and tensors as in the plain model.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from moe_steer.backends import offload
from moe_steer.backends.checkpoint import LoadRequest
from moe_steer.backends.layout import Layout

Device = int | str
"""Number of a GPU, ``cpu`` or ``disk``."""


class Placement(NamedTuple):
    """``modules``: name of a module -> the device where it and all below it rest; ``held``: bytes of weights on each device;
    ``largest``: bytes of the largest module that is copied for its call, 0 when none is."""

    modules: dict[str, Device]
    held: dict[Device, int]
    largest: int

    def __str__(self) -> str:
        names = {device: f"GPU {device}" if isinstance(device, int) else device for device in self.held}
        return ", ".join(f"{names[device]}: {number / 2**30:.3g} GiB" for device, number in self.held.items())


def place(
    model: Any,
    gpus: Sequence[int],
    host: int | None,
    disk: bool,
    *,
    cache: int = 0,
    activations: int = 0,
    asked: str = "",
) -> Placement:
    """Where the modules of a model on the meta device rest; ValueError, in one line, where there is no room for them.

    ``gpus``: bytes that tensors may fill on each; ``host``: of CPU memory, None for no limit, 0 for none; ``disk``: whether
    the rest may be files. ``cache``, ``activations``: bytes of the whole model's work. ``asked``: what weights may fill
    instead, device by device, as text (``0=20GiB,cpu=30GiB``).
    """
    if asked:
        return _fill(model, check_max_memory(asked), disk)
    host = 2**62 if host is None else host
    if not gpus:
        return _fill(model, {"cpu": host - cache - activations}, disk)
    # Each layer's cache lies where the layer computes: a GPU gets it in proportion to its size.
    rooms: dict[Device, int] = {
        number: size - activations - cache * size // sum(gpus) for number, size in enumerate(gpus)
    }
    try:
        return _fill(model, rooms, False)
    except ValueError:
        if not host and not disk:
            raise
    # Layers that rest elsewhere compute on the first GPU, and have their cache there.
    return _fill(model, {**rooms, 0: gpus[0] - activations - cache, "cpu": host}, disk)


def check_max_memory(text: str) -> dict[Device, int]:
    """``0=20GiB,cpu=30GiB`` as numbers of bytes; ValueError for what is no such list."""
    from accelerate.utils.modeling import convert_file_size_to_int

    found: dict[Device, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        device: Device = int(name) if name.isdecimal() else name
        try:
            number = convert_file_size_to_int(size)
        except ValueError:
            number = -1
        if device in found or number < 0 or not (isinstance(device, int) or device == "cpu"):
            raise ValueError(
                f"max_memory {text!r} is not understood at {part.strip()!r}: name each GPU by its number and 'cpu' once, with a "
                "size, as in 0=20GiB,cpu=30GiB (what is left rests in the folder that offload names)"
            )
        found[device] = number
    return found


def _fill(model: Any, rooms: Mapping[Device, int], disk: bool) -> Placement:
    """Devices filled one after the other, by the library's own rule."""
    from transformers.integrations.accelerate import expand_device_map, infer_auto_device_map

    # A CPU that may hold nothing is left out: the library would keep room there for the largest layer.
    sizes = {device: max(room, 0) for device, room in rooms.items() if device != "cpu" or room > 0 or len(rooms) == 1}
    with _without_warnings():
        modules = infer_auto_device_map(model, max_memory=sizes, no_split_module_classes=model._no_split_modules)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    where = expand_device_map(modules, list(tensors))
    held: Counter[Device] = Counter()
    for name, tensor in tensors.items():
        held[where[name]] += tensor.numel() * tensor.element_size()
    placement = Placement(
        dict(modules), {d: held[d] for d in (*sizes, "disk") if held[d]}, _largest(model, where, sizes)
    )
    if held["disk"] and not disk:
        raise ValueError(
            f"{held['disk'] / 2**30:.3g} of {held.total() / 2**30:.3g} GiB of weights find no room: use offload 'cpu' or a folder "
            "on a local disk, or more in max_memory"
        )
    _refuse_resting_embeddings(model, where, sizes)
    return placement


def _largest(model: Any, where: Mapping[str, Device], sizes: Mapping[Device, int]) -> int:
    """Bytes of the largest module whose weights are copied for its call."""
    copied = {"cpu", "disk"} if any(isinstance(device, int) for device in sizes) else {"disk"}
    own: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if where[name] in copied:
            own[name.rpartition(".")[0]] += parameter.numel() * parameter.element_size()
    return max(own.values(), default=0)


def _refuse_resting_embeddings(model: Any, where: Mapping[str, Device], sizes: Mapping[Device, int]) -> None:
    """The input embeddings and the first tensor tell every caller on which device a model takes its tokens: they must be there."""
    embeddings = model.get_input_embeddings()
    names = [name for name, module in model.named_modules() if module is embeddings]
    first = next(iter(where))
    computing = next(iter(sizes))
    resting = [
        name for name in (*(f"{name}.weight" for name in names), first) if where.get(name, computing) != computing
    ]
    if resting:
        raise ValueError(
            f"{resting[0]} has no room on the first device ({'GPU ' if isinstance(computing, int) else ''}{computing}, "
            f"{sizes[computing] / 2**30:.3g} GiB for weights): it takes the tokens, so give that device more in max_memory, or use "
            "a smaller batch"
        )


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Inside the block accelerate does not warn of GPUs that are not here: they may be planned for."""
    logs = [logging.getLogger(name) for name in ("accelerate.utils.modeling", "transformers.integrations.accelerate")]
    before = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)


def load(request: LoadRequest, layout: Layout) -> tuple[Any, Layout]:
    """Load with the placement in the request. Weights on disk are read from the checkpoint itself where it holds them as they
    are; those that the library converts are written into a folder of this process, which is deleted with the model."""
    assert request.places is not None
    own = offload.own_folder(request.offload) if "disk" in request.places.values() else None
    model = request.model(device_map=dict(request.places), offload_folder=own)
    if own is not None:
        weakref.finalize(model, offload.delete, own)
    return model, layout


def refusal(config: Any, world_size: int) -> str:
    """Why one process cannot hold a model of ``config``; empty when it can."""
    if world_size > 1:
        return "one process spreads the layers over all GPUs: start it without deepspeed, or use tp_ep or zero3"
    return ""
