"""Small changes to a JSON file's text that can be taken back to the letter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

from moe_steer.baking.record import Patch


def apply_patches(text: str, patches: Iterable[Patch], where: str) -> str:
    """Carry the patches out in order; ValueError when one does not fit."""
    for old, new in patches:
        if text.count(old) != 1:
            raise ValueError(
                f"{where} holds {old[:80]!r} {text.count(old)} times instead of once: it was changed by hand"
            )
        text = text.replace(old, new)
    return text


def keeps_length(patches: Iterable[Patch]) -> bool:
    """Whether every patch puts as many bytes as it takes, so that nothing behind it moves."""
    return all(len(old.encode()) == len(new.encode()) for old, new in patches)


def byte_edits(text: str, patches: Iterable[Patch], where: str) -> list[tuple[int, bytes]]:
    """(offset, bytes) of the patches in the file; ValueError when one does not fit or does not keep its length."""
    data = text.encode()
    edits: list[tuple[int, bytes]] = []
    for old, new in ((old.encode(), new.encode()) for old, new in patches):
        if len(old) != len(new):
            raise ValueError(
                f"{where}: {old[:80]!r} cannot become {new[:80]!r} in place, because they differ in length"
            )
        if data.count(old) != 1:
            raise ValueError(
                f"{where} holds {old[:80]!r} {data.count(old)} times instead of once: it was changed by hand"
            )
        edits.append((data.index(old), new))
    return edits


def reverse_patches(patches: Iterable[Patch]) -> list[Patch]:
    """What takes the patches back."""
    return [(new, old) for old, new in reversed(list(patches))]


def moved_entries(index_text: str, moves: Mapping[str, tuple[str, str]]) -> list[Patch]:
    """Patches that move tensors in an index: name -> (old shard, new shard)."""
    return [_moved(index_text, name, old, new) for name, (old, new) in moves.items()]


def _moved(index_text: str, name: str, old: str, new: str) -> Patch:
    pattern = re.escape(json.dumps(name)) + r"\s*:\s*" + re.escape(json.dumps(old))
    found = re.findall(pattern, index_text)
    if len(found) != 1:
        raise ValueError(f"the index has {len(found)} readable entries of {name}: save the checkpoint again")
    return found[0], found[0].removesuffix(json.dumps(old)) + json.dumps(new)


def added_entries(index_text: str, shard: str, names: Iterable[str]) -> list[Patch]:
    """A patch that adds tensors at the head of an index's weight_map."""
    match = re.search(r'"weight_map"\s*:\s*\{', index_text)
    if match is None or index_text.count(match[0]) != 1:
        raise ValueError("the index has no readable weight_map: save the checkpoint again")
    lines = "".join(f"\n    {json.dumps(name)}: {json.dumps(shard)}," for name in names)
    return [(match[0], match[0] + lines)] if lines else []


def new_index(weight_map: Mapping[str, str], total_size: int) -> str:
    """The text of an index."""
    content = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(content, indent=2) + "\n"
