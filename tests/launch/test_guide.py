"""``moe-steer doctor`` says what the machine says by other ways; what is missing comes with its command. Progress of long work."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import pytest
import torch

from launch import guide
from launch.cli.main import main
from moe_steer import console


def screen(capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    """What the doctor prints."""
    assert main(["doctor"]) == code
    said = capsys.readouterr()
    assert not said.err
    return said.out


def test_one_screen_of_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    said = screen(capsys)
    assert len(said.splitlines()) <= 24
    for name in ("torch", "transformers", "deepspeed"):
        assert f"{name} {importlib.metadata.version(name)}" in said
    assert f"Python {platform.python_version()}" in said
    assert f"{len(os.sched_getaffinity(0))} cores" in said
    assert ("GPU 0" in said) == torch.cuda.is_available()
    assert "next: moe-steer demo" in said


def test_what_is_missing_comes_with_its_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version
    gone = {"gguf", "inspect-ai", "mkdocs-material"}

    def without(name: str) -> str:
        if name in gone:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    monkeypatch.setattr(guide.shutil, "which", lambda name: None)
    monkeypatch.setattr(guide, "find_library", lambda name: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = screen(capsys)
    for mend in ("'moe-steer[gguf]'", "'moe-steer[inspect]'", "'moe-steer[docs]'", "apt-get install pdsh"):
        assert mend in said
    assert "apt-get install g++ libaio-dev" in said
    assert "unset HF_HUB_OFFLINE" in said
    assert f"PATH={os.path.dirname(guide.sys.executable)}:$PATH" in said


def test_a_package_of_another_version_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "5.0.0" if n == "transformers" else version(n))
    said = screen(capsys, 1)
    assert "!!  packages" in said
    assert "(here: 5.0.0): pip install 'transformers" in said


class _Card:
    name, total_memory, major, minor = "Test GPU", 80 * 2**30, 8, 0


def test_gpus_and_why_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: _Card)
    found = {one.what: one.said for one in guide.devices()}
    assert found["GPU 1"] == "Test GPU, 80 GiB, compute capability 8.0"
    assert "GPUs 0, 1 have no FP8" in found["FP8 on GPUs"]
    monkeypatch.setattr(guide.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "pip install --force-reinstall torch" in guide._why_no_gpu("2.13.0+cpu", None)
    assert "the driver does not run CUDA 13.0" in guide._why_no_gpu("2.13.0", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "unset CUDA_VISIBLE_DEVICES" in guide._why_no_gpu("2.13.0", "13.0")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the test sets."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_an_estimate_within_its_first_minute(clock: list[float], capsys: Any) -> None:
    with console.Progress(10, what="sampling", longest=100) as bar:
        for second in range(60):
            clock[0] = float(second)
            bar.made(4)  # nothing is finished: at most 1000 tokens are left to make
        lines = capsys.readouterr().err.splitlines()
        assert lines == ["sampling: 0 of 10, 4 tokens/s, at most 3 min left"]
        clock[0] = 100.0
        bar.stored(5)
    assert capsys.readouterr().err == "sampling: 5 of 10, 2 tokens/s, about 2 min left\n"


def test_short_work_and_other_ranks_leave_no_line(clock: list[float], capsys: Any) -> None:
    assert list(console.tracked(range(3), "grading")) == [0, 1, 2]
    watch = console.follow("reading", rank=1)
    for done in (1, 2):
        clock[0] += 100
        watch(done, 2)
    assert capsys.readouterr().err == ""
