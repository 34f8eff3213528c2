"""Copies that share their source's blocks: the same files as ever, with next to nothing written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from bake_checkpoints import gains, qwen, snapshot
from moe_steer.baking import bake, folder_files, unbake, verify_bake
from moe_steer.baking.safetensors.target import apply_patches, byte_edits, keeps_length

PLAN = gains((1, 2, 64.0), (0, 3, 0.5))
INDEX = "model.safetensors.index.json"


def fake_clone(reader: int, writer: int) -> bool:
    """What a file system that shares blocks does, as far as a reader can tell."""
    os.pwrite(writer, os.pread(reader, os.fstat(reader).st_size, 0), 0)
    return True


def no_clone(reader: int, writer: int) -> bool:
    return False


def comparable(folder: Path) -> dict[str, str]:
    """Hashes of all files but the record, which tells times and the bytes written."""
    return {name: digest for name, digest in snapshot(folder).items() if name != "steering.json"}


def large_source(folder: Path) -> Path:
    source = qwen(folder, 3)
    (source / "tokenizer.json").write_bytes(b"x" * 50_000)
    return source


@pytest.mark.parametrize("how", ["overlay", "rewrite", "copy"])
def test_shared_or_not_the_files_are_the_same(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = large_source(tmp_path / "source")
    before = snapshot(source)
    certificates = {}
    for name, clone in (("shared", fake_clone), ("plain", no_clone)):
        monkeypatch.setattr(folder_files, "clone", clone)
        certificates[name] = bake(
            source, PLAN, tmp_path / name, "in-order" if how == "overlay" else None, copy=how == "copy"
        )
        verify_bake(tmp_path / name, source)
    assert comparable(tmp_path / "shared") == comparable(tmp_path / "plain")
    assert snapshot(source) == before
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "plain").iterdir()}
    plain, shared = certificates["plain"], certificates["shared"]
    assert plain.files_written == shared.files_written
    record = json.loads((tmp_path / "shared" / "steering.json").read_text())["files"]
    assert shared.bytes_written == sum(file["written"] for file in record.values())
    assert record["tokenizer.json"]["written"] == record["config.json"]["written"] == 0
    if how == "overlay":
        entry = '"model.layers.1.mlp.experts.2.down_proj.weight": "model-steered-000000.safetensors"'
        overlay = sizes["model-steered-000000.safetensors"]
        assert shared.bytes_written == overlay + 2 * len(entry)
        # The index and the tokenizer are written in full, and the changed entries once more over the copy.
        assert plain.bytes_written == sum(sizes[name] for name in plain.files_written) + 2 * len(entry)
    else:
        assert shared.bytes_written == shared.changed_bytes
        assert plain.bytes_written == sum(sizes[name] for name in plain.files_written) + plain.changed_bytes
    unbake(tmp_path / "shared", tmp_path / "restored")
    assert snapshot(tmp_path / "restored") == before


def test_entries_that_change_their_length_are_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards with names of two lengths: no overlay's name fits both, and nothing is patched in place."""
    source = qwen(tmp_path / "source", 4)
    index = json.loads((source / INDEX).read_text())
    longer = "model-00002-of-000004.safetensors"
    (source / "model-00002-of-00004.safetensors").rename(source / longer)
    moved = {name: longer if "00002" in shard else shard for name, shard in index["weight_map"].items()}
    (source / INDEX).write_text(json.dumps({**index, "weight_map": moved}))
    plan = gains(*((1, expert, 2.0) for expert in range(4)))
    monkeypatch.setattr(folder_files, "clone", fake_clone)
    certificate = bake(source, plan, tmp_path / "baked", overlay="in-order")
    verify_bake(tmp_path / "baked", source)
    assert "model-steered.safetensors" in certificate.files_written
    new = json.loads((tmp_path / "baked" / INDEX).read_text())
    changed = {name for name in moved if new["weight_map"][name] != moved[name]}
    assert changed == {f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in range(4)}
    assert new["metadata"] == index["metadata"]


def test_edits_in_place_are_the_patches_and_refuse_other_lengths() -> None:
    text = '{"metadata": "ä", "a": "one", "b": "two"}'
    patches = [('"a": "one"', '"a": "ONE"'), ('"b": "two"', '"b": "TWO"')]
    assert keeps_length(patches)
    data = bytearray(text.encode())
    for offset, new in byte_edits(text, patches, "index"):
        data[offset : offset + len(new)] = new
    assert data.decode() == apply_patches(text, patches, "index")
    assert not keeps_length([('"a": "one"', '"a": "öne"')])  # three letters, four bytes
    with pytest.raises(ValueError, match="index: .* cannot become .* in place, because they differ in length"):
        byte_edits(text, [('"a": "one"', '"a": "öne"')], "index")
    with pytest.raises(ValueError, match="2 times instead of once: it was changed by hand"):
        byte_edits("one one", [("one", "two")], "index")


def test_a_full_disk_is_no_reason_where_blocks_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = large_source(tmp_path / "source")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    monkeypatch.setattr(folder_files, "clone", no_clone)
    with pytest.raises(ValueError, match="would be written: make room"):
        bake(source, PLAN, tmp_path / "baked", copy=True)
    monkeypatch.setattr(folder_files, "clone", fake_clone)
    bake(source, PLAN, tmp_path / "baked", copy=True)
    verify_bake(tmp_path / "baked", source)


def test_on_a_file_system_that_shares_blocks(tmp_path: Path) -> None:
    image, mounted = tmp_path / "image", tmp_path / "xfs"
    mounted.mkdir()
    with open(image, "wb") as file:
        file.truncate(400 << 20)
    try:
        subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", str(image)], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(mounted)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a loop mount of XFS needs root and xfsprogs: {error}")
    try:
        source = large_source(mounted / "source")
        before = snapshot(source)
        assert folder_files.can_clone(source / "tokenizer.json", mounted)
        certificate = bake(source, PLAN, mounted / "baked", overlay="in-order")
        assert certificate.bytes_written < 2000
        verify_bake(mounted / "baked", source)
        bake(source, PLAN, tmp_path / "elsewhere", overlay="in-order", copy=True)
        index = (tmp_path / "elsewhere" / INDEX).read_bytes()
        assert (mounted / "baked" / INDEX).read_bytes() == index
        assert bake(source, PLAN, mounted / "rewritten").bytes_written == certificate.changed_bytes
        unbake(mounted / "rewritten", mounted / "restored")
        assert snapshot(mounted / "restored") == snapshot(source) == before
    finally:
        subprocess.run(["umount", str(mounted)], check=True)
