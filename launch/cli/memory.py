"""``moe-steer memory``: what a model needs on each GPU under every backend, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass


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
        from moe_steer.backends import FEWER, GPU_SHARE, check_name, gib, plan_memory, read_config

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
