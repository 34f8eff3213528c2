"""Whatever goes wrong: the source stays as it is, no folder is left that looks whole, and the message says what happened."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bake_checkpoints import gains, looks_whole, qwen, snapshot
from moe_steer.baking import bake, edits, staging, unbake, verify_bake
from moe_steer.baking.safetensors import writing

PLAN = gains((1, 2, 64.0))
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"


def assert_nothing_happened(tmp_path: Path, source: Path, before: dict[str, str]) -> None:
    assert snapshot(source) == before
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


# --- checkpoints that are not what they say -------------------------------------------------------------------------------


def edit_index(source: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((source / INDEX).read_text())
    change(index["weight_map"])
    (source / INDEX).write_text(json.dumps(index))


def edit_header(path: Path, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode().ljust(length)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


EMBED = "model.embed_tokens.weight"


def lying_dtype(header: dict[str, dict[str, object]]) -> None:
    header[next(iter(set(header) - {"__metadata__"}))]["dtype"] = "F64"


def shifted(header: dict[str, dict[str, object]]) -> None:
    first = next(name for name in header if name != "__metadata__")
    header[first]["data_offsets"] = [offset + 4 for offset in header[first]["data_offsets"]]  # type: ignore[attr-defined]


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (
        lambda s: (s / SHARD).unlink(),
        f"the shard .*{SHARD} is missing: fetch the rest of the checkpoint",
    ),
    "truncated data": (
        lambda s: os.truncate(s / SHARD, (s / SHARD).stat().st_size - 3),
        rf"{SHARD} is incomplete or damaged \(\d+ bytes, \d+ expected\): fetch it again",
    ),
    "data behind the end": (
        lambda s: (s / SHARD).write_bytes((s / SHARD).read_bytes() + b"x"),
        rf"{SHARD} is incomplete or damaged \(\d+ bytes, \d+ expected\)",
    ),
    "truncated header": (
        lambda s: os.truncate(s / SHARD, 100),
        f"{SHARD} is incomplete or damaged .it has no safetensors header: 100 bytes cannot hold one",
    ),
    "empty shard": (
        lambda s: os.truncate(s / SHARD, 0),
        f"{SHARD} is incomplete or damaged .it has no safetensors header: 0 bytes cannot hold one",
    ),
    "header of noise": (
        lambda s: (s / SHARD).write_bytes(struct.pack("<Q", 64) + b"\xff" * 200),
        f"{SHARD} is incomplete or damaged .its header",
    ),
    "header that is no object": (
        lambda s: (s / SHARD).write_bytes(struct.pack("<Q", 8) + b"[1, 2]  "),
        f"{SHARD} is incomplete or damaged .its header",
    ),
    "gigantic header": (
        lambda s: (s / SHARD).write_bytes(struct.pack("<Q", 1 << 60) + b"{}" * 100),
        f"{SHARD} is incomplete or damaged .it has no safetensors header: 208 bytes cannot hold one",
    ),
    "header with a wrong type": (lambda s: edit_header(s / SHARD, lying_dtype), "contradicts itself"),
    "header with moved data": (lambda s: edit_header(s / SHARD, shifted), "does not follow its neighbour's"),
    "index with a wrong shard": (
        lambda s: edit_index(s, lambda m: m.update({EMBED: SHARD})),
        rf"{SHARD} is not what {INDEX} says \(the tensor {EMBED} is not in it and is in model-00001-of-00003.safetensors\)",
    ),
    "index with an invented tensor": (
        lambda s: edit_index(s, lambda m: m.update({"model.more": SHARD})),
        rf"{SHARD} is not what {INDEX} says \(the tensor model.more is not in it\): fetch",
    ),
    "index without a tensor": (
        lambda s: edit_index(s, lambda m: m.pop(EMBED)),
        rf"model-00001-of-00003.safetensors is not what {INDEX} says \(the index does not list its tensor {EMBED}\)",
    ),
    "index that leads outside": (
        lambda s: edit_index(s, lambda m: m.update({EMBED: "../x.safetensors"})),
        "puts model.embed_tokens.weight into '../x.safetensors': a safetensors file of the same folder is needed",
    ),
    "index without a map": (lambda s: (s / INDEX).write_text("{}"), "it has no weight_map; fetch it again"),
    "index of noise": (lambda s: (s / INDEX).write_text("{"), "is not JSON"),
    "no config": (lambda s: (s / "config.json").unlink(), "config.json is missing: give the folder of a checkpoint"),
    "config of noise": (lambda s: (s / "config.json").write_bytes(b"\xff"), "config.json is not UTF-8 text"),
    "two checkpoints in one folder": (
        lambda s: (s / "model.safetensors").write_bytes(b""),
        "holds several checkpoints .*: leave one, so that all engines load the same",
    ),
    "an adapter beside the weights": (
        lambda s: (s / "adapter_config.json").write_text("{}"),
        "holds an adapter, .*: merge it into its model first .* remove adapter_config.json",
    ),
    "no safetensors": (lambda s: (s / INDEX).unlink(), "holds neither model.safetensors nor .*: convert the weights"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints_are_refused_by_what_is_broken(name: str, tmp_path: Path) -> None:
    damage, message = BROKEN[name]
    source = qwen(tmp_path / "source", 3)
    damage(source)
    before = snapshot(source)
    with pytest.raises(ValueError, match=message):
        bake(source, PLAN, tmp_path / "baked")
    assert_nothing_happened(tmp_path, source, before)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no model folder"):
        bake(tmp_path / "nothing", PLAN, tmp_path / "baked")


# --- targets ------------------------------------------------------------------------------------------------------------


def test_targets_that_would_harm_are_refused(tmp_path: Path) -> None:
    source = qwen(tmp_path / "source")
    before = snapshot(source)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(source)
    for target, message in (
        (source, "source and target are the same folder"),
        (tmp_path / "link", "source and target are the same folder"),
        (tmp_path / "source" / ".." / "source", "source and target are the same folder"),
        (source / "baked", "lies inside the source"),
        (tmp_path / "link" / "baked", "lies inside the source"),
        (tmp_path, "lies inside the target"),
        (tmp_path / "full", "exists and is not empty: remove it, or give the name of a new folder"),
        (tmp_path / "file", "exists and is not a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            bake(source, PLAN, target)
    assert snapshot(source) == before
    assert snapshot(tmp_path / "full") == snapshot(tmp_path / "full")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path: Path) -> None:
    source = qwen(tmp_path / "source")
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "a" / "b" / "baked"):
        bake(source, PLAN, target)
        verify_bake(target, source)


@pytest.fixture
def nobody() -> Iterator[None]:
    """Without the powers of root, if the tests have them."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_target(nobody: None) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = qwen(folder / "source")
        before = snapshot(source)
        (folder / "locked").mkdir(mode=0o555)
        with pytest.raises(OSError, match=r"locked/baked was not written: Permission denied; nothing is left of it"):
            bake(source, PLAN, folder / "locked" / "baked", copy=True)
        assert not any((folder / "locked").iterdir())
        assert snapshot(source) == before


def test_a_read_only_source_is_enough(nobody: None) -> None:
    with tempfile.TemporaryDirectory() as name:
        source = qwen(Path(name) / "source", 3)
        for path in (*source.iterdir(), source):
            path.chmod(0o555 if path.is_dir() else 0o444)
        try:
            bake(source, PLAN, Path(name) / "baked")
            verify_bake(Path(name) / "baked", source)
        finally:
            source.chmod(0o755)


def test_another_file_system_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def no_links(source: str, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    source = qwen(tmp_path / "source", 3)
    before = snapshot(source)
    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(
        ValueError, match="cannot be hard-linked into .* on the same file system, or give --copy or --symlink"
    ):
        bake(source, PLAN, tmp_path / "baked")
    assert_nothing_happened(tmp_path, source, before)
    bake(source, PLAN, tmp_path / "baked", copy=True)
    verify_bake(tmp_path / "baked", source)


# --- the disk ------------------------------------------------------------------------------------------------------------


def test_too_little_room_is_seen_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    source = qwen(tmp_path / "source", 3)
    before = snapshot(source)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(ValueError, match="GB free and .* would be written: make room, or bake with --overlay"):
        bake(source, PLAN, tmp_path / "baked")
    assert_nothing_happened(tmp_path, source, before)
    monkeypatch.undo()
    bake(source, PLAN, tmp_path / "baked")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(ValueError, match="would be written: make room, or give a folder on another disk"):
        unbake(tmp_path / "baked", tmp_path / "again")


@pytest.mark.parametrize("how", ["rewrite", "overlay", "copy", "unbake"])
def test_a_write_that_fails_leaves_nothing(how: str, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the kernel refuses the write in the same place."""
    source = qwen(tmp_path / "source")
    if how == "unbake":
        bake(source, PLAN, tmp_path / "baked")
    before = {path.name: snapshot(path) for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, limits[1]))
    try:
        with pytest.raises(
            OSError, match="was not written: File too large; nothing is left of it, and the source is as it was"
        ):
            if how == "unbake":
                unbake(tmp_path / "baked", tmp_path / "target")
            else:
                bake(
                    source,
                    PLAN,
                    tmp_path / "deep" / "target",
                    overlay="in-order" if how == "overlay" else None,
                    copy=how == "copy",
                )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert {path.name: snapshot(path) for path in tmp_path.iterdir()} == before


def test_a_full_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        source = qwen(tmp_path / "source")
        (source / "tokenizer.json").write_bytes(b"x" * 100_000)
        before = snapshot(source)
        with pytest.raises(OSError, match="baked was not written: No space left on device; nothing is left of it"):
            bake(source, PLAN, small / "baked", copy=True)
        assert not any(small.iterdir())
        assert snapshot(source) == before
    finally:
        subprocess.run(["umount", str(small)], check=True)


# --- kill -9 ---------------------------------------------------------------------------------------------------------------


def bake_that_stops(stage: str, source: Path, target: Path, overlay: bool) -> int:
    """The id of a process whose bake has come to this stage and waits there; forked, so that it imports nothing anew."""
    module = {"_sync_folders": staging, "_remove_leftovers": staging, "write_at": edits}.get(stage, writing)
    reader, writer = os.pipe()

    def stop_here(*args: Any, **_: Any) -> None:
        if stage == "write_at" and args[0]:
            os.pwrite(args[0], args[1][: len(args[1]) // 2], args[2])
        os.write(writer, b"here")
        time.sleep(60)

    child = os.fork()
    if child == 0:
        try:
            setattr(module, stage, stop_here)
            bake(source, PLAN, target, overlay="in-order" if overlay else None)
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as said:
        assert said.read(4) == b"here"
    return child


@pytest.mark.parametrize(
    ("stage", "overlay"),
    [
        ("_place_shards", ""),
        ("write_at", ""),
        ("_write_side_files", ""),
        ("_proven", ""),
        ("write_text", ""),
        ("_sync_folders", ""),
        ("_sync_folders", "overlay"),
    ],
)
def test_killed_at_any_stage(stage: str, overlay: str, tmp_path: Path) -> None:
    source = qwen(tmp_path / "source", 3)
    before = snapshot(source)
    child = bake_that_stops(stage, source, tmp_path / "baked", bool(overlay))
    # A run beside it leaves the other's files alone.
    (left,) = [path for path in tmp_path.iterdir() if path.name.startswith(".baked.unfinished-")]
    staging._remove_leftovers(tmp_path / "baked")
    assert left.exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert snapshot(source) == before
    assert not (tmp_path / "baked").exists()
    assert not list(left.rglob("config.json"))
    assert not looks_whole(left)
    bake(source, PLAN, tmp_path / "baked", overlay="in-order" if overlay else None)
    verify_bake(tmp_path / "baked", source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["baked", "source"]
    assert snapshot(source) == before


def test_leftovers_without_a_lock_are_removed_when_they_are_old(tmp_path: Path) -> None:
    source = qwen(tmp_path / "source")
    old, young = tmp_path / ".baked.unfinished-old", tmp_path / ".baked.unfinished-young"
    for folder in (old, young):
        folder.mkdir()
    os.utime(old, (1, 1))
    bake(source, PLAN, tmp_path / "baked")
    assert (old.exists(), young.exists()) == (False, True)


def test_interrupted_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    source = qwen(tmp_path / "source", 3)
    before = snapshot(source)
    monkeypatch.setattr(edits, "write_at", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bake(source, PLAN, tmp_path / "baked")
    assert_nothing_happened(tmp_path, source, before)


def test_of_two_bakes_into_one_folder_the_later_says_what_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = qwen(tmp_path / "source")
    rename, target = os.rename, tmp_path / "baked"

    def late(old: Path, new: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        bake(source, PLAN, target)
        rename(old, new)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(OSError, match="baked was not written: another run has made it in the meantime, which stays"):
        bake(source, PLAN, target)
    verify_bake(target, source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["baked", "source"]


def test_the_target_appears_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the last moment there is neither a target nor a config.json beside weights."""
    seen = []
    rename = os.rename

    def watched(old: Path, new: Path) -> None:
        seen.append((Path(new).name, (tmp_path / "baked").exists(), looks_whole(tmp_path / "source")))
        rename(old, new)
        time.sleep(0)

    source = qwen(tmp_path / "source")
    monkeypatch.setattr(os, "rename", watched)
    bake(source, PLAN, tmp_path / "baked")
    assert seen == [("config.json", False, True), ("baked", False, True)]
