"""Tests on a real vLLM, on the CPU, in an environment of its own: ``make engines``. Not part of ``make test``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # engine and test in one process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":  # it is made of Triton kernels
    from interpreted import as_backend_for_cpus

    as_backend_for_cpus()

FOLDER = Path(os.environ.get("STEER_REFERENCE", "build/engines/reference")).resolve()


@pytest.fixture(scope="session")
def folder() -> Path:
    """Where ``reference.py`` wrote plans, the model and its reference."""
    assert (FOLDER / "reference.json").is_file(), "run engines/vllm/tests/reference.py FOLDER first (make engines does)"
    return FOLDER


@pytest.fixture(scope="session")
def reference(folder: Path) -> dict[str, Any]:
    """Of each model: prompts, and what it wrote after them under hooks."""
    return json.loads((folder / "reference.json").read_text())
