"""The main job on one of several ranks; rank 1 runs out of memory after some samples. Usage: resume_worker.py SAMPLES OPTIONS...

SAMPLES 0 lets it finish.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

from launch.core.ranks import leave
from launch.steer_r1 import main
from reasoning_evals.engines.in_process import InProcessSampler


def fail_after(number: int) -> None:
    """Let the in-process sampler run out of memory when it has made so many samples in this process."""
    sample = InProcessSampler.sample
    made = 0

    def short(self: Any, requests: Any, config: Any) -> Iterator[Any]:
        nonlocal made
        for item in sample(self, requests, config):
            made += 1
            if made > number:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
            yield item

    InProcessSampler.sample = short  # type: ignore[method-assign]


if __name__ == "__main__":
    if int(sys.argv[1]) and os.environ["RANK"] == "1":
        fail_after(int(sys.argv[1]))
    leave(main(sys.argv[2:]))
