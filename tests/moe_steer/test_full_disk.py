"""A full disk: the file is named, nothing half is left, and the same command continues."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_steer.errors import exit_code, one_line
from moe_steer.files import create_whole, load_plain, naming_full_disk, write_whole, written_aside
from moe_steer.loading import load_model
from reasoning_evals.engines import SamplingConfig
from reasoning_evals.runs import read_generations, run_arms
from scripted_sampler import arms, problems


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def said(error: BaseException, name: str) -> bool:
    line = one_line(error)
    return f"{name}' was not written, the disk is full: free some space, then the same command continues" in line


@pytest.mark.parametrize("how", ["write_whole", "create_whole", "safetensors", "torch", "text"])
def test_every_writer_names_the_file(how: str, small: Path) -> None:
    target = small / "deep" / "a.bin"
    with pytest.raises(OSError, match="No space left") as caught:
        if how == "write_whole":
            write_whole(target, b"x" * 200_000)
        elif how == "create_whole":
            create_whole(target, "x" * 200_000)
        else:
            with written_aside(target) as aside:
                if how == "safetensors":
                    save_file({"a": torch.zeros(50_000)}, aside)
                elif how == "torch":
                    torch.save(torch.zeros(50_000), aside)
                else:
                    aside.write_text("x" * 200_000)
    assert said(caught.value, "a.bin")
    assert caught.value.filename == str(target)
    assert list(target.parent.iterdir()) == []
    if how != "torch":  # whose writer keeps the removed file open until the process ends
        write_whole(target, "y")
        assert target.read_text() == "y"


def test_another_failure_stays_what_it_is(tmp_path: Path) -> None:
    for error in (
        ValueError("no"),
        OSError(2, "No such file"),
        RuntimeError("PytorchStreamWriter failed writing file"),
    ):
        with pytest.raises(type(error)) as caught, naming_full_disk(tmp_path / "a"):
            raise error
        assert caught.value is error


def test_a_run_on_a_full_disk_continues_with_every_sample(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, folder, filler = small.parent / "whole", small / "run", small / "filler"
    run_arms(arms(), problems(12), whole, 3, SamplingConfig(batch_size=8), seed=7, task="demo")
    filler.write_bytes(b"x" * 50_000)

    def work() -> None:
        run_arms(arms(), problems(12), folder, 3, SamplingConfig(batch_size=8), seed=7, task="demo")

    assert exit_code("moe-steer", work) == 1
    line = capsys.readouterr().err
    assert "generations.jsonl' was not written, the disk is full: free some space, then the same command" in line
    assert 0 < len(list(read_generations(folder))) < 72
    filler.unlink()
    assert exit_code("moe-steer", work) == 0
    order = [sorted(read_generations(one), key=lambda item: item.key) for one in (folder, whole)]
    assert order[0] == order[1]
    assert len(order[0]) == 72


def test_a_limit_on_the_size_of_files_says_what_to_raise(tmp_path: Path) -> None:
    work = (
        "import sys; from moe_steer.errors import exit_code; from reasoning_evals.engines import SamplingConfig;"
        "from reasoning_evals.runs import run_arms; from scripted_sampler import arms, problems; import resource;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2);"
        "sys.exit(exit_code('moe-steer', lambda: run_arms(arms(), problems(12), sys.argv[1], 3, SamplingConfig(batch_size=8), seed=7,"
        " task='demo') and None))"
    )
    folder = tmp_path / "run"
    for limit, name in [(8_000, "generations.jsonl"), (1 << 30, "")]:
        command = [sys.executable, "-c", work, str(folder), str(limit)]
        paths = os.pathsep.join(sys.path)
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
        )
        assert done.returncode == (1 if name else 0), done.stderr
        if name:
            assert (
                f"/{name}' was not written, no file may be larger here: raise the limit (ulimit -f), or" in done.stderr
            )
            assert done.stderr.count("\n") == 1
    assert len(list(read_generations(folder))) == 72


def test_a_folder_that_may_not_be_written_to_is_named_by_the_file_that_was_meant(small: Path) -> None:
    (small / "a.json").write_text("mine")
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    for name in ("a.json", "b.json"):
        for write in (write_whole, create_whole):
            with pytest.raises(OSError, match="Read-only") as caught:
                write(small / name, "new")
            assert one_line(caught.value) == f"'{small / name}': read-only file system"
    assert (small / "a.json").read_text() == "mine"


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo it ran",)


def test_nobody_is_advised_to_allow_pickles(tmp_path: Path) -> None:
    (tmp_path / "v.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"a": Evil()}, tmp_path / "w.pt")
    for name in ("v.pt", "w.pt"):
        with pytest.raises(ValueError, match="other pickles are not opened") as caught:
            load_plain(tmp_path / name)
        assert "weights_only" not in one_line(caught.value)
    folder = tmp_path / "model"
    from moe_steer.lab import LAB_MODEL

    folder.mkdir()
    for path in Path(LAB_MODEL).iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    torch.save({"model.embed_tokens.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="other pickles are not opened") as caught:
        load_model(str(folder))
    assert "weights_only" not in str(caught.value)
    assert "weights_only" not in one_line(RuntimeError("set `weights_only` to False"))


@pytest.mark.parametrize("command", [["-m", "launch.cli.main", "--help"], ["-m", "launch.cli.main", "plan", "--help"]])
def test_help_into_head_is_quiet(command: list[str]) -> None:
    code = f"({sys.executable} {' '.join(command)}; echo code $? >&2) | head -c 1 >/dev/null"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stderr == "code 0\n"
