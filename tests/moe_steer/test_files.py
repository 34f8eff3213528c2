"""A file appears whole or not at all, where several ranks may write at once, and nothing written aside is left."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_steer.files import create_whole, read_weight_map, tensor_places, write_whole, written_aside


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_and_its_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_whole(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    write_whole(path, b"second")
    assert path.read_bytes() == b"second"
    with written_aside(path) as aside:
        aside.write_text("third")
        assert path.read_bytes() == b"second", "the old file stands until the new one is whole"
    assert path.read_text() == "third"
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), written_aside(path) as aside:
        aside.write_text("half")
        raise error
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("a.txt", "old")]


def test_two_writers_do_not_share_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of two machines may have one number and write into one folder."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path = tmp_path / "a.txt"
    with written_aside(path) as one, written_aside(path) as other:
        one.write_text("one")
        other.write_text("other")
        assert not path.exists()
    assert path.read_text() == "one", "the last one to end"
    assert names(tmp_path) == ["a.txt"]


def test_two_machines_whose_processes_draw_their_own_numbers(tmp_path: Path) -> None:
    """Two real processes that both believe to be process 7 and write at the same time."""
    code = (
        "import os, sys, pathlib; os.getpid = lambda: 7\n"
        "from moe_steer.files import written_aside\n"
        "with written_aside(sys.argv[1]) as aside: print(aside, flush=True); sys.stdin.readline(); aside.write_text(sys.argv[2])\n"
    )
    start = [sys.executable, "-c", code, str(tmp_path / "a.txt")]
    writers = [
        subprocess.Popen([*start, text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for text in ("one", "other")
    ]
    asides = [writer.stdout.readline() for writer in writers if writer.stdout is not None]
    assert len(set(asides)) == 2
    for writer in writers:
        writer.communicate("go\n", timeout=60)
        assert writer.returncode == 0
    assert (tmp_path / "a.txt").read_text() == "other"
    assert names(tmp_path) == ["a.txt"]


def test_a_name_may_be_as_long_as_a_name_may_be(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)
    write_whole(path, "text")
    assert path.read_text() == "text"


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    write_whole(tmp_path / "whole", "text")
    create_whole(tmp_path / "created", "text")
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_the_content_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("sync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("name"), replace(*paths)))
    write_whole(tmp_path / "a.txt", "text")
    assert done == ["sync", "name", "sync"], "the file, its name, the folder"


def test_the_first_one_to_create_wins(tmp_path: Path) -> None:
    create_whole(tmp_path / "a.txt", "first")
    create_whole(tmp_path / "a.txt", "second")
    assert (tmp_path / "a.txt").read_text() == "first"
    assert names(tmp_path) == ["a.txt"]


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise PermissionError("links are not supported")

    monkeypatch.setattr(os, "link", no_links)
    create_whole(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("write", [write_whole, create_whole])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, str], None]
) -> None:
    def full(self: Path, content: bytes) -> None:
        self.touch()
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "a.txt", "text")
    assert names(tmp_path) == []


@pytest.mark.parametrize("module", ["moe_steer.files", "moe_steer.json_files"])
def test_the_leaves_bring_no_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False\n"


def test_places_of_tensors_are_those_of_the_library_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.int8)}, path, metadata={"x": "y"})
    whole = path.read_bytes()
    found = tensor_places(path)
    assert {name: (place.dtype, place.shape) for name, place in found.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("I8", (4,)),
    }
    assert all(
        whole[place.begin : place.end] == (b"\0" * 24 if name == "a" else b"\1" * 4) for name, place in found.items()
    )
    (length,) = struct.unpack("<Q", whole[:8])
    head = whole[8 : 8 + length]
    for broken in (
        whole[:-1], whole + b"x", whole[:5], b"", struct.pack("<Q", 2**63) + whole[8:],
        whole[:8] + head.replace(b"[2,3]", b"[3,3]") + whole[8 + length :],
        whole[:8] + head.replace(b"[2,3]", b"[2,x]") + whole[8 + length :],
        whole[:8] + head.replace(b'"b"', b'"a"') + whole[8 + length :],
    ):  # fmt: skip
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="header|bytes|data of"):
            tensor_places(path)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/x.safetensors", "x.bin", 3, None, "a/b.safetensors"])
def test_an_index_that_leads_elsewhere_is_refused(file: object, tmp_path: Path) -> None:
    path = tmp_path / "i.json"
    path.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": file}}))
    with pytest.raises(ValueError, match="i.json puts b into .*: a safetensors file of the same folder is needed"):
        read_weight_map(path)
