"""Bake RICE's plan into a checkpoint of DeepSeek-R1's shape: time, memory and bytes written, as an overlay and rewritten.

The checkpoint has R1's tensors in FP8 blocks (61 layers and one of multi-token prediction, 256 experts, 163 shards, 688 GB) but
its files are holes: only headers, index, tokenizer and the scales of the steered experts take room on the disk.

Bytes written are counted four ways: what the certificate says, what the process gave the page cache to write (write_bytes of
/proc/self/io: whole pages of data), how much fuller the file system became, and what reached its block device (with journal and
metadata, and with what anybody else wrote there: run it on a file system of its own). To compare file systems that share blocks:

    truncate -s 4G xfs.img && mkfs.xfs -m reflink=1 xfs.img && mount -o loop xfs.img /mnt
    python tests/bench/bake_r1.py [--folder /mnt] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
NUM_LAYERS, NUM_EXPERTS, NUM_SHARDS, WIDTH, INNER, DENSE_INNER = 61, 256, 163, 7168, 2048, 18432
STEERED = ((39, 182), (29, 126))
TOKENIZER_BYTES = 7_847_602
Entry = tuple[str, str, tuple[int, ...]]


def fp8(name: str, rows: int, columns: int) -> Iterator[Entry]:
    yield f"{name}.weight", "F8_E4M3", (rows, columns)
    yield f"{name}.weight_scale_inv", "F32", (math.ceil(rows / 128), math.ceil(columns / 128))


def mlp(name: str, inner: int) -> Iterator[Entry]:
    yield from fp8(f"{name}.gate_proj", inner, WIDTH)
    yield from fp8(f"{name}.up_proj", inner, WIDTH)
    yield from fp8(f"{name}.down_proj", WIDTH, inner)


def tensors() -> Iterator[Entry]:
    """Names, types and shapes of DeepSeek-R1."""
    yield "model.embed_tokens.weight", "BF16", (129280, WIDTH)
    for layer in range(NUM_LAYERS + 1):
        name = f"model.layers.{layer}"
        yield from fp8(f"{name}.self_attn.q_a_proj", 1536, WIDTH)
        yield from fp8(f"{name}.self_attn.q_b_proj", 24576, 1536)
        yield from fp8(f"{name}.self_attn.kv_a_proj_with_mqa", 576, WIDTH)
        yield from fp8(f"{name}.self_attn.kv_b_proj", 32768, 512)
        yield from fp8(f"{name}.self_attn.o_proj", WIDTH, 16384)
        for norm, width in (
            ("self_attn.q_a_layernorm", 1536),
            ("self_attn.kv_a_layernorm", 512),
            ("input_layernorm", WIDTH),
        ):
            yield f"{name}.{norm}.weight", "BF16", (width,)
        yield f"{name}.post_attention_layernorm.weight", "BF16", (WIDTH,)
        if layer < 3:
            yield from mlp(f"{name}.mlp", DENSE_INNER)
            continue
        yield f"{name}.mlp.gate.weight", "BF16", (NUM_EXPERTS, WIDTH)
        yield f"{name}.mlp.gate.e_score_correction_bias", "F32", (NUM_EXPERTS,)
        yield from mlp(f"{name}.mlp.shared_experts", INNER)
        for expert in range(NUM_EXPERTS):
            yield from mlp(f"{name}.mlp.experts.{expert}", INNER)
    yield "model.norm.weight", "BF16", (WIDTH,)
    yield "lm_head.weight", "BF16", (129280, WIDTH)


def size_of(entry: Entry) -> int:
    return math.prod(entry[2]) * {"F8_E4M3": 1, "BF16": 2, "F32": 4}[entry[1]]


def write_sparse(folder: Path) -> None:
    """All shards as holes behind real headers, with numbers where the steered experts' scales lie."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "num_hidden_layers": NUM_LAYERS,
        "n_routed_experts": NUM_EXPERTS,
        "hidden_size": WIDTH,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    entries = list(tensors())
    total = sum(map(size_of, entries))
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if filled >= total * len(shards) / NUM_SHARDS:
            shards.append([])
        shards[-1].append(entry)
        filled += size_of(entry)
    assert len(shards) == NUM_SHARDS
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        path = folder / f"model-{number:05d}-of-{NUM_SHARDS:06d}.safetensors"
        write_shard(path, shard)
        weight_map.update({name: path.name for name, _, _ in shard})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "tokenizer.json").write_bytes(random.Random(0).randbytes(TOKENIZER_BYTES))


def write_shard(path: Path, shard: list[Entry]) -> None:
    header, at, written = {}, 0, []
    for entry in shard:
        name, dtype, shape = entry
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size_of(entry)]}
        if any(f"layers.{layer}.mlp.experts.{expert}.down_proj.weight_scale_inv" in name for layer, expert in STEERED):
            written.append((at, np.random.default_rng(0).random(shape, dtype=np.float32).tobytes()))
        at += size_of(entry)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for offset, data in written:
            file.seek(8 + len(text) + offset)
            file.write(data)
        file.truncate(8 + len(text) + at)


CHILD = """
import json, resource, sys, time
started = time.perf_counter()
from moe_steer.baking import bake, verify_bake
from moe_steer.entries.presets import preset_plan
source, target, overlay, verify = sys.argv[1:]
if verify:
    verify_bake(target, source)
    result = {}
else:
    certificate = bake(source, preset_plan("rice-r1-math", 2, 64.0), target, overlay="in-order" if overlay else None)
    result = {"verdict": certificate.verdict, "changed_bytes": certificate.changed_bytes, "files": certificate.files_written,
              "certified_bytes": certificate.bytes_written}
with open("/proc/self/io") as io:
    result["write_bytes"] = int(next(line for line in io if line.startswith("write_bytes")).split()[1])
result["seconds"] = time.perf_counter() - started
result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps(result))
"""


def run(source: Path, target: Path, overlay: bool, verify: bool = False) -> dict[str, object]:
    """One bake or verification in a process of its own, from the start of Python."""
    arguments = [str(source), str(target), "1" if overlay else "", "1" if verify else ""]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def used_bytes(folder: Path) -> int:
    """Bytes that are taken on a folder's file system."""
    os.sync()
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def device_bytes(folder: Path) -> int | None:
    """Bytes that a folder's block device was given to write so far; None where it has none (btrfs, overlays)."""
    os.sync()
    number = folder.stat().st_dev
    path = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat")
    return int(path.read_text().split()[6]) * 512 if path.exists() else None


def new_files(source: Path, target: Path) -> dict[str, tuple[int, int]]:
    """Files of the target that are not links to the source: (size, bytes on the disk)."""
    known = {path.stat().st_ino for path in source.iterdir()}
    stats = {path.name: path.stat() for path in target.iterdir()}
    return {name: (it.st_size, it.st_blocks * 512) for name, it in stats.items() if it.st_ino not in known}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, commit {commit}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        source, target = Path(name) / "r1", Path(name) / "baked"
        write_sparse(source)
        shards = list(source.glob("*.safetensors"))
        print(
            f"source: {len(shards)} shards, {sum(path.stat().st_size for path in shards) / 1e9:.0f} GB ({sum(path.stat().st_blocks for path in shards) * 512 / 1e6:.0f} MB on the disk), "
            f"{sum(1 for _ in tensors())} tensors, index {(source / 'model.safetensors.index.json').stat().st_size / 1e6:.1f} MB"
        )
        for how, overlay in (("overlay", True), ("rewrite", False)):
            runs, grown, device = [], [], []
            for _ in range(arguments.repeats):
                shutil.rmtree(target, ignore_errors=True)
                used, before = used_bytes(Path(name)), device_bytes(Path(name))
                runs.append(run(source, target, overlay))
                after = device_bytes(Path(name))
                grown.append(used_bytes(Path(name)) - used)
                device.append(None if after is None or before is None else after - before)
            seconds = [float(str(it["seconds"])) for it in runs]
            peak = max(float(str(it["peak_mb"])) for it in runs)
            written = new_files(source, target)
            weights = {file: size for file, (size, _) in written.items() if file.endswith(".safetensors")}
            others = sum(size for file, (size, _) in written.items() if file not in weights)
            print(
                f"{how}: {runs[0]['verdict']}, median {statistics.median(seconds):.2f} s ({min(seconds):.2f}-{max(seconds):.2f}), peak {peak:.0f} MB, "
                f"{runs[0]['changed_bytes']} bytes of scales changed; weights written: {len(weights)} file(s), {sum(weights.values()):,} bytes; "
                f"sizes of index, config, tokenizer and record: {others:,} bytes"
            )
            checked = run(source, target, overlay, verify=True)
            record = (target / "steering.json").stat().st_size
            print(
                f"  written: {runs[0]['certified_bytes']:,} bytes by the certificate and {record:,} of steering.json; by the kernel's count for the "
                f"process {[it['write_bytes'] for it in runs]}, the file system grew by {grown}, its device wrote {device}"
            )
            print(
                f"  verified against the source in {float(str(checked['seconds'])):.2f} s, peak {float(str(checked['peak_mb'])):.0f} MB"
            )
    print(f"peak of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
