"""A small share of the fuzzer's mutants, and that the fuzzer sees each kind of fault. All of them: tests/bench/fuzz.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fuzz
from fuzz_judge import Rules, json_judge
from fuzz_mutations import mutate_json
from fuzz_targets import build_targets

pytestmark = pytest.mark.slow

MUTANTS = 200


def test_no_mutant_is_a_fault(tmp_path: Path) -> None:
    targets = build_targets(tmp_path, jobs=False)
    said: list[str] = []
    counts, faults = fuzz.fuzz(targets, MUTANTS, seed=1, show=said.append)
    assert not faults, "\n".join(said)
    assert counts["accepted"] + counts["refused"] == MUTANTS
    assert min(counts["accepted"], counts["refused"]) > 20, "mutants that are all refused, or all read, show little"
    assert sum(counts[f"{target.name}: refused"] > 0 for target in targets) > len(targets) // 2


def test_the_same_seed_gives_the_same_mutants(tmp_path: Path) -> None:
    targets = build_targets(tmp_path, jobs=False)[:12]
    first = [fuzz.mutant(targets, 7, number)[1] for number in range(30)]
    assert first == [fuzz.mutant(targets, 7, number)[1] for number in range(30)]
    assert first != [fuzz.mutant(targets, 8, number)[1] for number in range(30)]


def _accepts(folder: Path) -> Any:
    return (folder / "f.json").read_bytes()


def _crashes(folder: Path) -> Any:
    return json.loads(_accepts(folder))["a"]["b"].lower()


def _names_no_file(folder: Path) -> Any:
    raise ValueError("it is wrong")


def _quotes_at_length(folder: Path) -> Any:
    raise ValueError(f"f.json holds {_accepts(folder).decode('utf-8', 'replace')[:590]}")


def _leaves_a_file(folder: Path) -> Any:
    (folder / "half").write_text("")
    raise ValueError("f.json is wrong")


def _hangs(folder: Path) -> Any:
    while True:
        pass


def _dies(folder: Path) -> Any:
    import os

    os._exit(3)


def _eats(folder: Path) -> Any:
    return bytearray(64 << 30)


def _advises(folder: Path) -> Any:
    raise fuzz.Refused("f.json: Weights only load failed, set weights_only=False")  # as a command that printed it


KINDS: dict[str, Callable[[Path], Any]] = {
    "wrong acceptance": _accepts,
    "traceback": _crashes,
    "no file named": _names_no_file,
    "long quote": _quotes_at_length,
    "left behind": _leaves_a_file,
    "hang": _hangs,
    "memory": _eats,
    "no line": _advises,
}


@pytest.mark.parametrize("kind", [*KINDS, "death"])
def test_every_kind_of_fault_is_seen(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "CPU_SECONDS", 1)
    folder = tmp_path / "example"
    folder.mkdir()
    (folder / "f.json").write_text(json.dumps({"a": {"b": "x" * 400}, "c": [1, 2, 3]}))
    read = _dies if kind == "death" else KINDS[kind]
    target = fuzz.Target(
        name="planted", folder=folder, file="f.json", mutate=mutate_json, read=read, judge=json_judge(Rules())
    )
    _, faults = fuzz.fuzz([target], 3, seed=0, show=lambda line: None)
    assert {"hang" if kind == "death" else kind} <= {fault.kind for fault in faults}
