"""What baking writes: for every family of the tests, every number format, and GGUF files of every block type."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import gguf_files
from bake_checkpoints import gains, qwen, snapshot
from family_cases import case
from moe_steer import SteeringPlan, bake, unbake, verify_bake
from same.commands import inside, quiet, run_command
from same.compare import Items
from same.normalise import json_text, record_of_a_bake, text_of
from test_bake_families import BAKED
from test_bake_formats import CASES, quantised
from test_gguf_bake import ALL

RECORD = "steering.json"


def folder_bakes(work: Path) -> Items:
    """Of checkpoint folders: every family, every number format, shards."""
    return family_items(work) | format_items(work)


def family_items(work: Path) -> Items:
    """Each family, with a plan that holds a gain of 0 (not to be taken back), and as an overlay without it (taken back)."""
    items = {}
    for name in BAKED:
        source = Path(name, "source")
        with inside(work), quiet():
            it = case(name)
            it.model.save_pretrained(source)
        plan = it.plan()
        reversible = dataclasses.replace(plan, experts=[entry for entry in plan.experts if entry.gain])
        items |= _baked(f"bake/{name}/default", source, plan, work)
        items |= _baked(f"bake/{name}/overlay", source, reversible, work, overlay="in-order")
        items |= _baked(f"bake/{name}/reversible", source, reversible, work)
        shutil.rmtree(work / name)
    return items


def format_items(work: Path) -> Items:
    """Each number format, at a power of two and at a gain that may have to be rounded; and a checkpoint of shards."""
    items = {}
    for name, it in CASES.items():
        source = Path("formats", name.replace(" ", "-").replace(",", ""))
        with inside(work):
            quantised(source, it.parts)
        items |= _baked(f"bake/format-{source.name}/power", source, gains((1, 2, 4.0)), work)
        items |= _baked(f"bake/format-{source.name}/rounded", source, gains((1, 2, 10.0)), work, round_gains=True)
    with inside(work):
        qwen(Path("shards"), num_shards=3)
    for overlay in (False, True):
        plan = gains((0, 1, 3.0), (1, 2, 64.0))
        items |= _baked(
            f"bake/shards/{'overlay' if overlay else 'default'}",
            Path("shards"),
            plan,
            work,
            overlay="in-order" if overlay else None,
        )
    return items


def _baked(name: str, source: Path, plan: SteeringPlan, work: Path, **options: Any) -> Items:
    """Bake, verify, unbake; the record, the hashes of the files, and what each step said."""
    target, back = Path("baked"), Path("restored")
    said = []
    with inside(work), quiet():
        try:
            bake(source, plan, target, **options)
            said.append(f"verified: {_plain(verify_bake(target, source))}")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
        files = snapshot(target) if target.is_dir() else {}
        record = json.loads((target / RECORD).read_text()) if (target / RECORD).is_file() else {}
        try:
            unbake(target, back)
            said.append(f"unbaked: the source byte for byte is {snapshot(back) == snapshot(source)}")
        except Exception as error:
            said.append(f"unbake: {type(error).__name__}: {error}")
        for folder in (target, back):
            shutil.rmtree(folder, ignore_errors=True)
    files.pop(RECORD, None)  # an item of its own
    hashes = "".join(f"{file} {digest}\n" for file, digest in files.items())
    return {
        f"{name}/files": hashes + text_of("\n".join(said), work),
        f"{name}/{RECORD}": text_of(json_text(record_of_a_bake(record)), work),
    }


def _plain(value: Any) -> str:
    return json.dumps(dataclasses.asdict(value), sort_keys=True, default=str)


def gguf_items(work: Path) -> Items:
    """GGUF bakes from the command line: every block type, in parts, in place, rounded."""
    gains((1, 2, 64.0), (2, 0, 0.25)).save(work / "power.json")
    gains((1, 2, 3.0)).save(work / "three.json")
    items = {}
    for kind in ALL:
        gguf_files.write_gguf(work / f"{kind}.gguf", kind)
        items |= _gguf(f"gguf/{kind}", f"{kind}.gguf", "power.json", "", work)
        items |= _gguf(f"gguf/{kind}-rounded", f"{kind}.gguf", "three.json", " --round", work)
    parts = gguf_files.write_gguf(work / "parts.gguf", "MXFP4", split=4).name
    items |= _gguf("gguf/parts", parts, "power.json", "", work)
    said = [
        run_command(line, work).text()
        for line in ("bake --model Q8_0.gguf --plan three.json --in-place", "verify --baked Q8_0.gguf")
    ]
    said.append(_hashes(work, "Q8_0.gguf*"))
    said.append(run_command("unbake --baked Q8_0.gguf", work).text())
    return items | {"gguf/in-place": "\n".join([*said, _hashes(work, "Q8_0.gguf*")])}


def _gguf(name: str, source: str, plan: str, more: str, work: Path) -> Items:
    baked = source.replace("parts", "out") if source.startswith("parts") else "out.gguf"
    lines = [
        f"bake --model {source} --plan {plan} --out out.gguf{more}",
        f"verify --baked {baked} --model {source}",
        f"unbake --baked {baked}",
    ]
    said = []
    for line in lines:
        said.append(f"$ {line}\n{run_command(line, work).text()}{_hashes(work, 'out*')}")
        record = work / f"{baked}.steering.json"
        if line.startswith("bake") and record.is_file():
            said.append(text_of(json_text(record_of_a_bake(json.loads(record.read_text()))), work))
    for path in work.glob("out*"):
        path.unlink()
    return {name: "\n".join(said)}


def _hashes(work: Path, pattern: str) -> str:
    """Of the files, not of the records beside them, whose contents are compared by their values."""
    digests = snapshot(work)
    names = sorted(path.name for path in work.glob(pattern))
    return "".join(f"{name} {'' if name.endswith('.json') else digests[name]}\n" for name in names)
