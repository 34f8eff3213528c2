"""Which files a bake writes, links and leaves behind; overlays; and the way back."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch

from bake_checkpoints import gains, qwen, raw, read_all, read_shard, snapshot, tensor_of, write_shard
from family_cases import case, logits
from moe_steer import SteeringPlan, steer
from moe_steer.baking import bake, unbake, verify_bake
from moe_steer.baking.safetensors.folder import open_checkpoint
from moe_steer.baking.safetensors.target import overlay_name

DOWN = "model.layers.1.mlp.experts.2.down_proj.weight"
PLAN = gains((1, 2, 64.0))


def inode(path: Path) -> int:
    return path.stat().st_ino


@pytest.mark.parametrize("overlay", [False, True])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_the_baked_checkpoint_is_the_source_but_for_the_tensor(num_shards: int, overlay: bool, tmp_path: Path) -> None:
    source = qwen(tmp_path / "source", num_shards)
    before = snapshot(source)
    bake(source, PLAN, tmp_path / "baked", overlay="in-order" if overlay else None)
    old, new = read_all(source), read_all(tmp_path / "baked")
    assert old.keys() == new.keys()
    assert torch.equal(tensor_of(new[DOWN]), tensor_of(old[DOWN]) * 64)
    assert {name for name in old if old[name] != new[name]} == {DOWN}
    assert snapshot(source) == before
    assert verify_bake(tmp_path / "baked", source).compared_bytes


def test_only_shards_with_changes_are_written(tmp_path: Path) -> None:
    source = qwen(tmp_path / "source", 4)
    certificate = bake(source, PLAN, tmp_path / "baked")
    written = [name for name in certificate.files_written if name.endswith(".safetensors")]
    assert written == [json.loads((source / "model.safetensors.index.json").read_text())["weight_map"][DOWN]]
    for shard in source.glob("*.safetensors"):
        assert (inode(shard) == inode(tmp_path / "baked" / shard.name)) == (shard.name not in written)
    index = "model.safetensors.index.json"
    assert (source / index).read_bytes() == (tmp_path / "baked" / index).read_bytes()
    assert inode(source / "config.json") != inode(tmp_path / "baked" / "config.json")


def test_copies_and_symbolic_links(tmp_path: Path) -> None:
    source = qwen(tmp_path / "source", 4)
    bake(source, PLAN, tmp_path / "copied", copy=True)
    bake(source, PLAN, tmp_path / "linked", symlink=True)
    assert not {inode(path) for path in source.iterdir()} & {inode(path) for path in (tmp_path / "copied").iterdir()}
    links = [path for path in (tmp_path / "linked").iterdir() if path.is_symlink()]
    assert len(links) == 3
    assert all(path.resolve().parent == source for path in links)
    assert read_all(tmp_path / "linked") == read_all(tmp_path / "copied")
    for folder in ("copied", "linked"):
        verify_bake(tmp_path / folder, source)
    with pytest.raises(ValueError, match="copy and symlink exclude each other"):
        bake(source, PLAN, tmp_path / "both", copy=True, symlink=True)


def test_a_source_of_symbolic_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    blobs = qwen(tmp_path / "blobs", 3)
    source = tmp_path / "snapshot"
    source.mkdir()
    for path in blobs.iterdir():
        (source / path.name).symlink_to(path)
    bake(source, PLAN, tmp_path / "baked")
    assert not any(path.is_symlink() for path in (tmp_path / "baked").iterdir())
    assert torch.equal(tensor_of(read_all(tmp_path / "baked")[DOWN]), tensor_of(read_all(blobs)[DOWN]) * 64)


def test_an_overlay_holds_nothing_but_the_change(tmp_path: Path) -> None:
    source = qwen(tmp_path / "source", 3)
    certificate = bake(source, PLAN, tmp_path / "baked", overlay="in-order")
    (name,) = {path.name for path in (tmp_path / "baked").glob("*.safetensors")} - {
        path.name for path in source.iterdir()
    }
    assert name == "model-steered-000000.safetensors"
    shard = read_shard(tmp_path / "baked" / name)
    assert list(shard) == [DOWN]
    assert all(inode(path) == inode(tmp_path / "baked" / path.name) for path in source.glob("*.safetensors"))
    (note,) = [note for note in certificate.notes if "two tensors of one name" in note]
    assert "steered in an engine that reads the shards one after another in order of name" in note
    assert note in verify_bake(tmp_path / "baked").certificate.summary()
    assert json.loads((tmp_path / "baked" / "steering.json").read_text())["certificate"]["loader"] == "in-order"
    old, new = (
        (folder / "model.safetensors.index.json").read_text().splitlines() for folder in (source, tmp_path / "baked")
    )
    assert len([1 for a, b in zip(old, new, strict=True) if a != b]) == 1


def test_a_bake_is_steered_in_every_order_of_its_shards_and_an_overlay_only_in_that_of_its_loader(
    tmp_path: Path,
) -> None:
    """Engines with several loading threads keep the tensor of whichever shard came last; an overlay holds two of one name."""

    def loaded(folder: Path) -> list[float]:
        found = []
        for order in permutations(sorted(folder.glob("*.safetensors"))):
            tensors: dict[str, tuple[str, list[int], bytes]] = {}
            for shard in order:
                tensors |= read_shard(shard)
            found.append((tensor_of(tensors[DOWN]) / plain).mean().item())
        return found

    source = qwen(tmp_path / "source", 3)
    plain = tensor_of(read_all(source)[DOWN])
    bake(source, PLAN, tmp_path / "baked")
    bake(source, PLAN, tmp_path / "overlay", overlay="in-order")
    assert set(loaded(tmp_path / "baked")) == {64.0}
    assert set(loaded(tmp_path / "overlay")) == {1.0, 64.0}
    assert loaded(tmp_path / "overlay")[0] == 64.0


@pytest.mark.parametrize("num_shards", [1, 3])
def test_the_library_loads_the_overlays_tensor(num_shards: int, tmp_path: Path) -> None:
    """transformers loads whole files in the order of their names: the overlay must come last."""
    it = case("qwen3_moe")
    size = "10GB" if num_shards == 1 else "60KB"
    it.model.save_pretrained(tmp_path / "source", max_shard_size=size)
    assert (len(list((tmp_path / "source").glob("*.safetensors"))) > 1) == (num_shards > 1)
    bake(tmp_path / "source", it.plan(), tmp_path / "baked", overlay="in-order")
    options = {"experts_implementation": "eager"}
    original = type(it.model).from_pretrained(tmp_path / "source", **options).eval()
    plain = type(it.model).from_pretrained(tmp_path / "baked", **options).eval()
    with steer(original, it.plan(), quiet=True):
        hooked_BSV = logits(original, it.ids_BS)
    assert torch.equal(logits(plain, it.ids_BS), hooked_BSV)


def test_an_overlays_name_comes_last_in_plain_and_natural_order(tmp_path: Path) -> None:
    source = qwen(tmp_path / "source", 3)
    names = {}
    for stem in ("model-{}-of-3", "model.safetensors-{}-of-3", "weights-{}", "z{}"):
        index = {}
        for name, shard in json.loads((source / "model.safetensors.index.json").read_text())["weight_map"].items():
            index[name] = stem.format(int(shard[6:11]) + 8) + ".safetensors"
        folder = tmp_path / stem.format("n")
        folder.mkdir()
        (folder / "config.json").write_text((source / "config.json").read_text())
        for number, shard in enumerate(sorted(source.glob("*.safetensors"))):
            os.link(shard, folder / (stem.format(number + 9) + ".safetensors"))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        names[stem] = overlay_name(open_checkpoint(folder))
        assert all(names[stem] > shard.name for shard in folder.glob("*.safetensors"))
    assert names == {
        "model-{}-of-3": "model-steered.safetensors",
        "model.safetensors-{}-of-3": "steered.safetensors",
        "weights-{}": "zz-steered.safetensors",
        "z{}": "zz-steered.safetensors",
    }


@pytest.mark.parametrize(
    ("shard", "expected"),
    [
        ("model-00001-of-000163.safetensors", "model-steered-0000000.safetensors"),  # as DeepSeek-R1's are called
        ("model-00001-of-2.safetensors", "model-steered-00.safetensors"),
        ("model-0001-of-2.safetensors", "model-steered-0.safetensors"),
        ("model-001-of-2.safetensors", "model-steered-.safetensors"),
        ("model-01-of-2.safetensors", "model-steered.safetensors"),
        ("model-1-of-2.safetensors", "steered-0000.safetensors"),
        ("model-1.safetensors", "steered.safetensors"),
        ("m-1.safetensors", "model-steered.safetensors"),  # no name of that length
    ],
)
def test_an_overlays_name_is_as_long_as_the_names_it_replaces(shard: str, expected: str, tmp_path: Path) -> None:
    source = replace(open_checkpoint(qwen(tmp_path / "source", 3)), paths={shard: tmp_path / shard})
    assert overlay_name(source, {shard}) == expected
    assert len(expected) == len(shard) or shard == "m-1.safetensors"
    assert overlay_name(source, {shard, shard + "x"}) == "model-steered.safetensors"


def test_side_files_come_along_and_other_weights_do_not(tmp_path: Path) -> None:
    source = qwen(tmp_path / "source")
    (source / "figures").mkdir()
    (source / ".cache").mkdir()
    for name in (
        "tokenizer.json",
        "figures/plot.png",
        ".gitattributes",
        "pytorch_model.bin",
        "consolidated.safetensors",
        ".cache/x",
    ):
        (source / name).write_bytes(name.encode())
    certificate = bake(source, PLAN, tmp_path / "baked")
    taken = {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "figures/plot.png",
        ".gitattributes",
        "steering.json",
    }
    assert set(snapshot(tmp_path / "baked")) == taken
    assert any(
        "left out" in note and "consolidated.safetensors, pytorch_model.bin" in note for note in certificate.notes
    )


@pytest.mark.parametrize("overlay", [False, True])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unbake_restores_every_file_bit_for_bit(
    num_shards: int, overlay: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = qwen(tmp_path / "source", num_shards, dtype)
    bake(source, gains((1, 2, 64.0), (0, 1, 0.125)), tmp_path / "baked", overlay="in-order" if overlay else None)
    record = unbake(tmp_path / "baked", tmp_path / "restored")
    assert len(record.changes) == 2
    assert snapshot(tmp_path / "restored") == snapshot(source)


@pytest.mark.parametrize(
    ("gain", "why"),
    [(3.0, "gain 3 was rounded when it was baked"), (0.0, "was silenced .gain 0. and its numbers are gone")],
)
def test_unbake_says_when_it_cannot(gain: float, why: str, tmp_path: Path) -> None:
    source = qwen(tmp_path / "source", 1, torch.bfloat16)
    assert not bake(source, gains((1, 2, gain)), tmp_path / "baked").reversible
    with pytest.raises(ValueError, match=f"{DOWN}.*{why}.*take the original checkpoint"):
        unbake(tmp_path / "baked", tmp_path / "restored")
    assert not (tmp_path / "restored").exists()
    assert bake(source, gains((1, 2, gain)), tmp_path / "overlay", overlay="in-order").reversible
    unbake(tmp_path / "overlay", tmp_path / "restored")
    assert snapshot(tmp_path / "restored") == snapshot(source)


def test_unbake_refuses_a_folder_that_was_changed(tmp_path: Path) -> None:
    source = qwen(tmp_path / "source")
    with pytest.raises(ValueError, match=r"has no steering.json: it was not written by 'moe-steer bake'"):
        unbake(source, tmp_path / "restored")
    bake(source, PLAN, tmp_path / "baked")
    with open(tmp_path / "baked" / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(ValueError, match="was changed after baking"):
        unbake(tmp_path / "baked", tmp_path / "restored")


def test_what_is_baked_is_not_baked_again(tmp_path: Path) -> None:
    source = qwen(tmp_path / "source")
    bake(source, PLAN, tmp_path / "baked")
    with pytest.raises(ValueError, match="was baked before .* put both plans into one and bake the original"):
        bake(tmp_path / "baked", PLAN, tmp_path / "again")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    source = qwen(tmp_path / "source", 3)
    first = source / "model-00001-of-00003.safetensors"
    tensors = read_shard(first)
    write_shard(first, {**tensors, DOWN: raw(torch.zeros(8, 16))})
    with pytest.raises(ValueError, match=f"{DOWN} is in several shards, and engines may load either"):
        bake(source, PLAN, tmp_path / "baked")


def test_the_record_carries_plan_hashes_and_the_way_back(tmp_path: Path) -> None:
    source = qwen(tmp_path / "source")
    bake(source, PLAN, tmp_path / "baked")
    record = json.loads((tmp_path / "baked" / "steering.json").read_text())
    assert SteeringPlan.from_dict(record["plan"]).digest() == record["plan_digest"] == PLAN.digest()
    (change,) = record["changes"]
    assert change["name"] == DOWN
    import hashlib

    for key, folder in (("sha256_before", source), ("sha256_after", tmp_path / "baked")):
        assert change[key] == hashlib.sha256(read_all(folder)[DOWN][2]).hexdigest()
    assert "moe-steer unbake" in record["undo"]
    assert record["certificate"]["verdict"] == "exact"
