"""Verification: it passes on what was baked, and on nothing else."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from bake_checkpoints import gains, qwen
from moe_steer.baking import BakeMismatch, bake, edits, verify_bake
from moe_steer.baking.folder_files import sha256_file
from moe_steer.baking.safetensors import writing

PLAN = gains((1, 2, 64.0), (0, 3, 3.0))


@pytest.fixture(params=["one file", "shards", "overlay", "copies"])
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    how = request.param
    source = qwen(tmp_path / "source", 1 if how == "one file" else 3)
    (source / "tokenizer.json").write_text("{}")
    bake(source, PLAN, tmp_path / "baked", overlay="in-order" if how == "overlay" else None, copy=how == "copies")
    return source, tmp_path / "baked"


def flip(path: Path, position: int) -> None:
    """Change one byte, without changing the file that it may be linked with, and keep its time."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << (position % 8)
    path.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_one_flipped_byte_anywhere_is_found(folders: tuple[Path, Path]) -> None:
    source, baked = folders
    verify_bake(baked)
    verify_bake(baked, source)
    chance = random.Random(7)
    for path in sorted(baked.iterdir()):
        size = path.stat().st_size
        for position in {0, size - 1, *(chance.randrange(size) for _ in range(4))}:
            kept = path.read_bytes()
            flip(path, position)
            for against in (None, source):
                with pytest.raises(ValueError, match=r"."):
                    verify_bake(baked, against)
            path.write_bytes(kept)
            if path.name == "steering.json":
                verify_bake(baked, source)


def test_a_flipped_byte_is_named(folders: tuple[Path, Path]) -> None:
    source, baked = folders
    shard = sorted(baked.glob("*.safetensors"))[0]
    flip(shard, shard.stat().st_size - 1)
    with pytest.raises(BakeMismatch, match=f"{shard.name} was changed after baking: its hash differs; bake again"):
        verify_bake(baked)
    with pytest.raises(BakeMismatch, match=shard.name):
        verify_bake(baked, source)


def test_large_linked_shards_carry_no_hash_and_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "HASH_LIMIT", 0)
    source = qwen(tmp_path / "source", 3)
    bake(source, gains((1, 2, 64.0)), tmp_path / "baked")
    found = verify_bake(tmp_path / "baked")
    assert len(found.unhashed) == 2
    assert verify_bake(tmp_path / "baked", source).unhashed == ()
    shard = tmp_path / "baked" / found.unhashed[0]
    flip(shard, 4000)
    verify_bake(tmp_path / "baked")  # size and time are what they were: this is what 'unhashed' means
    with pytest.raises(BakeMismatch, match=r"differs from .* at byte 4000, where nothing was baked"):
        verify_bake(tmp_path / "baked", source)
    shard.touch()
    with pytest.raises(BakeMismatch, match="has no hash, and its time differs from that of the bake: pass the source"):
        verify_bake(tmp_path / "baked")
    bake(source, gains((1, 2, 64.0)), tmp_path / "hashed", hash_all=True)
    assert verify_bake(tmp_path / "hashed").unhashed == ()


def test_a_byte_flipped_through_the_link_is_found_by_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "HASH_LIMIT", 0)
    source = qwen(tmp_path / "source", 3)
    bake(source, gains((1, 2, 64.0)), tmp_path / "baked")
    name = verify_bake(tmp_path / "baked").unhashed[0]
    with open(tmp_path / "baked" / name, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    os.utime(source / name, ns=(1, 1))
    with pytest.raises(BakeMismatch, match="is the same file as the source's and was changed after baking"):
        verify_bake(tmp_path / "baked", source)


def test_another_source_is_no_source(tmp_path: Path) -> None:
    source = qwen(tmp_path / "source")
    bake(source, gains((1, 2, 64.0)), tmp_path / "baked")
    other = qwen(tmp_path / "other")
    flip(other / "model.safetensors", (other / "model.safetensors").stat().st_size - 1)
    with pytest.raises(BakeMismatch, match=r"differs from .*other.* at byte \d+, where nothing was baked"):
        verify_bake(tmp_path / "baked", other)
    with pytest.raises(ValueError, match="is itself baked: give the original model as the source"):
        verify_bake(tmp_path / "baked", tmp_path / "baked")


def test_edits_are_carried_out_again_on_the_source(tmp_path: Path) -> None:
    """Hashes alone would agree with themselves: a record whose edit is another one is found out."""
    from moe_steer.baking.record import RECORD, sealed

    source = qwen(tmp_path / "source")
    bake(source, gains((1, 2, 64.0)), tmp_path / "baked")
    path = tmp_path / "baked" / RECORD
    record = json.loads(path.read_text())
    record["changes"][0]["edits"][0]["factor"] = 32.0
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="its own hash does not fit"):
        verify_bake(tmp_path / "baked")
    path.write_text(sealed({key: value for key, value in record.items() if key != "sha256"}, indent=1))
    verify_bake(tmp_path / "baked")
    with pytest.raises(BakeMismatch, match="is not the source's tensor with the recorded edits"):
        verify_bake(tmp_path / "baked", source)


def test_missing_and_added_files(tmp_path: Path) -> None:
    source = qwen(tmp_path / "source", 3)
    bake(source, gains((1, 2, 64.0)), tmp_path / "baked")
    baked = tmp_path / "baked"
    shutil.copy(source / "model-00001-of-00003.safetensors", baked / "model-00000.safetensors")
    with pytest.raises(BakeMismatch, match="was not written by the bake, and an engine may load it: remove it"):
        verify_bake(baked)
    (baked / "model-00000.safetensors").unlink()
    (baked / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(BakeMismatch, match="model-00001-of-00003.safetensors is missing: bake again"):
        verify_bake(baked)


def test_a_bake_that_does_not_arrive_is_no_bake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The read-back: a disk that keeps other bytes than were written."""
    source = qwen(tmp_path / "source")
    before = sha256_file(source / "model.safetensors")
    monkeypatch.setattr(edits, "write_at", lambda descriptor, data, offset: None)
    with pytest.raises(OSError, match="did not arrive on the disk as it was written"):
        bake(source, gains((1, 2, 64.0)), tmp_path / "baked")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert sha256_file(source / "model.safetensors") == before
