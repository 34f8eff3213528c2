"""The commands of the first five minutes: ``moe-steer demo``, ``moe-steer doctor``, and ``moe-steer memory``, what a model needs on each GPU under
every backend, from its configuration alone."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from ctypes.util import find_library
from dataclasses import dataclass
from importlib import metadata
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class Demo:
    """See it work: find the experts of the embedded model that think, turn them up, compare; a page to open, in about a minute."""

    out: str = "runs/demo"
    """Folder of the run; started again, it continues there."""
    seed: int = 0
    """Decides problems, samples and whatever else is drawn."""

    def run(self) -> int:
        """The main job in this process: no launcher, no network, no checkout."""
        from launch.core.ranks import refuse_several_ranks
        from launch.steer_r1 import main

        refuse_several_ranks("moe-steer demo", "deepspeed launch/steer_r1.py --quick")
        few = ["--quick", "--gains", "4", "16"]  # half of the gains: two thirds of the time
        return main([*few, "--out", self.out, "--seed", str(self.seed)], program="moe-steer demo")


NAME = "moe-steer"
_SHOWN = ("torch", "transformers", "deepspeed", "accelerate", "safetensors")
_QUANTISERS = ("bitsandbytes", "compressed-tensors", "torchao", "gptqmodel", "optimum-quanto", "hqq")
"""Packages by which transformers reads quantised checkpoints; each is needed for checkpoints of its own kind only."""
_ENGINES = ("vllm", "sglang")


class Finding(NamedTuple):
    """One line of the screen. ``state``: "ok", "--" for what is only needed for some work, "!!" for what nothing runs without."""

    state: str
    what: str
    said: str


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Say what this machine has and lacks for GPUs, FP8, GGUF, offload, several nodes and engines, with the command that mends each."""

    def run(self) -> int:
        """Print one screen; 1 when a package that every run needs is missing or of another version."""
        found = [*packages(), *devices(), *optional()]
        width = max(len(one.what) for one in found)
        print(
            f"{NAME} {_version(NAME) or 'is not installed'}, Python {platform.python_version()}, {platform.platform()}"
        )
        print(", ".join(f"{name} {_version(name) or 'missing'}" for name in _SHOWN) + "\n")
        for one in found:
            print(f"{one.state}  {one.what:{width}}  {one.said}")
        broken = [one for one in found if one.state == "!!"]
        print("\nok: ready   --: missing, and needed for this line's work only   !!: nothing runs without it")
        print(
            f"next: {broken[0].said.partition(': ')[2]}"
            if broken
            else "next: moe-steer demo    the main job, in about a minute"
        )
        return 1 if broken else 0


def packages() -> list[Finding]:
    """The packages that every run needs, as this distribution's own metadata asks for them."""
    try:
        asked = metadata.requires(NAME) or []
    except metadata.PackageNotFoundError:
        return [Finding("!!", "packages", "this code is not installed: pip install .")]
    wrong = [text for text in asked if "extra ==" not in text and not _satisfied(text)]
    if wrong:
        words = ", ".join(f"{text} (here: {_version(_bare(text)) or 'missing'})" for text in wrong)
        quoted = " ".join(f"'{text}'" for text in wrong)
        return [Finding("!!", "packages", f"{words}: pip install {quoted}")]
    return [Finding("ok", "packages", f"all {sum('extra ==' not in text for text in asked)} that every run needs")]


def devices() -> list[Finding]:
    """CPU, memory and GPUs, as torch sees them."""
    import torch

    memory, cores = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), len(os.sched_getaffinity(0))
    disk = shutil.disk_usage(".").free
    found = [
        Finding(
            "ok", "CPU", f"{cores} cores, {memory / 2**30:.0f} GiB of memory, {disk / 2**30:.0f} GiB free on this disk"
        )
    ]
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        for number, card in enumerate(cards):
            said = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability {card.major}.{card.minor}"
            found.append(Finding("ok", f"GPU {number}", said))
        old = [number for number, card in enumerate(cards) if (card.major, card.minor) < (8, 9)]
        fp8 = f"GPUs {', '.join(map(str, old))} have no FP8: such checkpoints expand to bfloat16, at twice the memory"
        return [*found, Finding("--", "FP8 on GPUs", fp8) if old else _package("FP8 on GPUs", "fp8", "kernels")]
    return [*found, Finding("--", "GPU", _why_no_gpu(torch.__version__, torch.version.cuda))]


def _why_no_gpu(build: str, cuda: str | None) -> str:
    if not (shutil.which("nvidia-smi") or os.path.exists("/proc/driver/nvidia/version")):
        return "this machine shows no NVIDIA driver; the embedded models need none"
    if cuda is None:
        return f"there is a driver, but PyTorch {build} has no CUDA: pip install --force-reinstall torch --index-url <CUDA wheel index>"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return f"CUDA_VISIBLE_DEVICES={hidden!r} hides them: unset CUDA_VISIBLE_DEVICES"
    return f"the driver does not run CUDA {cuda}: see nvidia-smi, then take a newer driver or an older build of torch"


def optional() -> list[Finding]:
    """What some work needs."""
    offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
    build = [name for name, there in (("g++", shutil.which("g++")), ("libaio-dev", find_library("aio"))) if not there]
    launcher = shutil.which("deepspeed")
    beside = os.path.join(os.path.dirname(sys.executable), "deepspeed")
    activate = f"PATH={os.path.dirname(sys.executable)}:$PATH" if os.path.exists(beside) else "pip install deepspeed"
    return [
        Finding("ok", "launcher", launcher)
        if launcher
        else Finding("--", "launcher", f"deepspeed is not on PATH: {activate}"),
        Finding("ok", "several nodes", pdsh)
        if (pdsh := shutil.which("pdsh"))
        else Finding("--", "several nodes", "apt-get install pdsh, or start every node by hand (--no_ssh)"),
        Finding(
            "--",
            "NVMe offload",
            f"--offload FOLDER under zero3 is compiled at its first use: apt-get install {' '.join(build)}",
        )
        if build
        else Finding("ok", "NVMe offload", "g++ and libaio are there, compiled at the first use"),
        _package("GGUF files", "gguf", "gguf"),
        Finding("--", "hub", "HF_HUB_OFFLINE is set, only models and data in the cache are found: unset HF_HUB_OFFLINE")
        if offline
        else Finding("ok", "hub", "models and data sets are fetched when they are named"),
        _any_of("quantised", _QUANTISERS, "other checkpoints name the package that they need"),
        _any_of(
            "engines here", _ENGINES, "any OpenAI-compatible server answers prompts: moe-steer generate --endpoint URL"
        ),
        _package("Inspect logs", "inspect", "inspect-ai"),
        _package("documentation", "docs", "mkdocs-material"),
    ]


def _package(what: str, extra: str, name: str) -> Finding:
    """The package of an optional extra."""
    there = _version(name)
    if there is None:
        return Finding("--", what, f"pip install '{NAME}[{extra}]'")
    asked = [text for text in _asked_of(NAME, extra) if _bare(text) == name]
    if not all(map(_satisfied, asked)):
        return Finding("--", what, f"{name} {there} is another version than asked for: pip install '{NAME}[{extra}]'")
    return Finding("ok", what, f"{name} {there}")


def _asked_of(distribution: str, extra: str) -> Iterator[str]:
    """What an extra asks for, also through the extras of other packages."""
    from packaging.requirements import Requirement

    for text in metadata.requires(distribution) or ():
        if f'extra == "{extra}"' in text:
            yield text
            one = Requirement(text)
            for inner in one.extras:
                yield from _asked_of(one.name, inner)


def _any_of(what: str, names: Sequence[str], otherwise: str) -> Finding:
    there = [f"{name} {version}" for name in names if (version := _version(name))]
    return (
        Finding("ok", what, ", ".join(there))
        if there
        else Finding("--", what, f"none of {', '.join(names)}; {otherwise}")
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _bare(requirement: str) -> str:
    """The name of a requirement such as ``transformers>=5.21,<5.25``."""
    from packaging.requirements import Requirement

    return Requirement(requirement).name


def _satisfied(requirement: str) -> bool:
    """Whether the installed version is one that is asked for; a build (``+cpu``) does not matter."""
    from packaging.requirements import Requirement

    asked = Requirement(requirement)
    there = _version(asked.name)
    return there is not None and asked.specifier.contains(there, prereleases=True)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Say which backend fits, which is fastest, and what to change if none fits; reads the configuration, no weights."""

    model: str
    """Model folder, config.json, GGUF file, hub id, 'lab', 'lab-dense' or 'lab-search'."""
    backend: str = "auto"
    """Only this backend; auto: all, and which is the fastest that fits."""
    gpus: int
    """GPUs: one rank on each; for device_map one process over all."""
    gpu_gib: float
    """Memory of one GPU in GiB, as its maker states it (80 for an H100, 141 for an H200)."""
    dtype: str = "auto"
    """Precision of the weights: auto (as stored), fp8, bf16, or a torch name."""
    context: int = 32768
    """Tokens that a sequence may reach, prompt included."""
    batch: int = 1
    """Sequences decoded together on a rank."""
    prompt: int = 1024
    """Tokens of the longest prompt, which is read at once."""
    offload: str = ""
    """For zero3 and device_map: 'cpu', or a folder on a local NVMe disk, where weights rest that the GPUs do not hold."""
    max_memory: str = ""
    """For device_map: what weights may fill on each device, as 0=20GiB,1=10GiB,cpu=30GiB; default what is left."""
    host_gib: float | None = None
    """CPU memory for one rank in GiB; given, a backend that needs more while loading is left out."""
    trust_remote_code: bool = False
    """Run configuration code that comes with the checkpoint."""

    def run(self) -> int:
        """Print the table and the verdict; 1 when nothing fits."""
        from launch.core.option_checks import check_numbers
        from moe_steer.backends import FEWER, GPU_SHARE, check_name, gib, plan_memory, read_config

        check_numbers(self, dict.fromkeys(("gpus", "context", "batch", "prompt"), 1))
        for name, value in (("gpu-gib", self.gpu_gib), ("host-gib", self.host_gib)):
            if value is not None and value <= 0:
                raise ValueError(f"--{name} is {value:g}: give a number above 0")
        dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(self.dtype, self.dtype)
        check_name(self.backend)
        limit = int(self.gpu_gib * GPU_SHARE * 2**30)
        plan = plan_memory(
            read_config(self.model, trust_remote_code=self.trust_remote_code),
            self.gpus,
            limit,
            dtype=dtype,
            context=self.context,
            batch=self.batch,
            prompt=self.prompt,
            offload=self.offload,
            host_limit=None if self.host_gib is None else int(self.host_gib * 2**30),
            max_memory=self.max_memory,
            gpus=(limit,) * self.gpus,
        )
        shown = [item for item in plan.footprints if self.backend in ("auto", item.backend)]
        print(
            f"{self.model} on {self.gpus} x {self.gpu_gib:g} GiB, {self.batch} x {self.context} tokens; GiB on each GPU:"
        )
        print(
            f"{'backend':13}{'weights':>9}{'gathered':>10}{'cache':>9}{'activations':>13}{'total':>9}{'host':>9}{'loading':>9}  "
        )
        for item in shown:
            if item.why_not:
                print(f"{item.backend:13}{item.why_not}")
                continue
            numbers = (item.weights, item.gathered, item.cache, item.activations, item.total, item.host, item.loading)
            cells = [f"{gib(n):>{w}}" for n, w in zip(numbers, (9, 10, 9, 13, 9, 9, 9), strict=True)]
            print(
                f"{item.backend:13}{''.join(cells)}  {'fits' if item.fits else 'too large'}"
                + (f" ({item.places})" if item.places else "")
            )
        print(
            f"host, loading: CPU memory of one rank, at rest and while loading; {1 - GPU_SHARE:.0%} of a GPU is left free"
        )
        if self.backend != "auto":
            return 0 if shown[0].fits else 1
        if plan.fastest:
            print(f"fastest that fits: {plan.fastest.backend}")
            return 0
        print(f"none fits: {plan.advice.replace(FEWER, 'a smaller --batch or --context')}")
        return 1
