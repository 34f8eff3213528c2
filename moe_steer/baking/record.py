"""What was baked, how to check it and how to take it back: steering.json of a checkpoint (gguf_record.py has that of a GGUF file)."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_steer.baking.edits import Change, Container, Edit, NewTensor, StoredTensor
from moe_steer.baking.folder_files import sha256_file
from moe_steer.baking.numbers import Rounding
from moe_steer.baking.planning import Certificate
from moe_steer.json_files import check_types, quoted, read_json, record_of, short
from moe_steer.plan import SteeringPlan

RECORD = "steering.json"
RECORD_VERSION = 1
UNDO = (
    "moe-steer unbake --baked THIS_FOLDER --out NEW_FOLDER restores the original and proves it by the hashes 'before'. "
    "By hand: take the tensors under 'changes' from the original checkpoint."
)
Patch = tuple[str, str]
"""(old, new): a piece of a text file that occurs exactly once before, and what is there after. See safetensors/target.py."""


class BakeMismatch(ValueError):
    """A baked model is not what its record, or its source, says."""


@dataclass(frozen=True, kw_only=True)
class ChangedTensor:
    """One tensor: its file now (``shard``), its file in the source (``source_shard``, None if it is new), edits and hashes.

    In GGUF files, whose tensors hold all experts of a layer, ``span`` is the range of the file that holds the changed expert:
    hashes and edits are those of that range. ``lost`` is what rounding lost there; neither is in steering.json.
    """

    name: str
    shard: str
    source_shard: str | None
    dtype: str
    shape: tuple[int, ...]
    edits: tuple[Edit, ...]
    sha256_before: str | None
    sha256_after: str
    span: tuple[int, int] | None = None
    lost: Rounding | None = None

    @property
    def where(self) -> str:
        """The tensor, and the expert where it holds several."""
        return self.name if self.span is None else f"{self.name}, expert {self.edits[0].expert},"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, as in steering.json."""
        keys = ("name", "shard", "source_shard", "dtype", "shape", "edits", "sha256_before", "sha256_after")
        values = {key: getattr(self, key) for key in keys}
        return {**values, "shape": list(self.shape), "edits": [edit.to_dict() for edit in self.edits]}


@dataclass(frozen=True, kw_only=True)
class RecordedFile:
    """One file of the baked folder. ``made``: linked, symlinked, copied, rewritten, patched or new.

    ``source`` is its name in the source, None if there is none; ``sha256`` is None for large linked shards, which are
    identified by ``size``, ``mtime_ns`` (not kept for GGUF files) and the comparison with the source. ``written``: bytes of data
    written for it, 0 for a link; a file that shares its source's blocks counts what was changed in it.
    """

    made: str
    source: str | None
    size: int
    mtime_ns: int | None
    sha256: str | None
    written: int = 0


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of a bake. ``headers`` (file -> hash of its header) and ``control_vector`` are those of GGUF files."""

    plan: SteeringPlan
    plan_digest: str
    certificate: Certificate
    changes: tuple[ChangedTensor, ...]
    files: Mapping[str, RecordedFile]
    patches: Mapping[str, tuple[Patch, ...]]
    source_name: str
    source_sha256: Mapping[str, str]
    left_out: tuple[str, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    control_vector: Mapping[str, Any] | None = None

    def to_text(self) -> str:
        """JSON with a hash over itself."""
        body: dict[str, Any] = {
            "version": RECORD_VERSION,
            "plan": self.plan.to_dict(),
            "plan_digest": self.plan_digest,
            "certificate": self.certificate.to_dict(),
            "changes": [change.to_dict() for change in self.changes],
            "files": {name: asdict(file) for name, file in self.files.items()},
            "patches": {name: [list(patch) for patch in patches] for name, patches in self.patches.items()},
            "source": {"name": self.source_name, "sha256": dict(self.source_sha256)},
            "left_out": list(self.left_out),
            "undo": UNDO,
        }
        return sealed(body, indent=1)


def sealed(body: Mapping[str, Any], indent: int) -> str:
    """A record as text, with a hash over itself under the key ``sha256``."""
    return json.dumps({**body, "sha256": _digest(body)}, indent=indent, allow_nan=False) + "\n"


def unsealed(path: Path, indent: int) -> dict[str, Any]:
    """What ``sealed`` wrote to a file; ValueError where any byte of it is another one."""
    again = "it was changed after it was written"
    data = read_json(path, again)
    body = {key: value for key, value in data.items() if key != "sha256"}
    if data.get("sha256") != _digest(body) or path.read_bytes() != sealed(body, indent).encode():
        raise ValueError(f"{path} is not as it was written: its own hash does not fit; bake again")
    return body


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def has_record(folder: Path) -> bool:
    """Whether the folder was written by a bake."""
    return (folder / RECORD).exists()


def read_record(folder: str | os.PathLike[str]) -> Record:
    """Read steering.json; ValueError when it is missing, of another version, or not as it was written."""
    path = Path(folder) / RECORD
    if not path.is_file():
        raise ValueError(f"{os.fspath(folder)!r} has no {RECORD}: it was not written by 'moe-steer bake'")
    body = unsealed(path, indent=1)
    if body.get("version") != RECORD_VERSION:
        raise ValueError(
            f"{path} is of version {quoted(body.get('version'))}: this program reads version {RECORD_VERSION}"
        )
    try:
        return _checked(check_types(body, "", _BODY), folder)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} cannot be used ({short(error)}): bake again") from error


_BODY = {
    **{"plan": dict, "plan_digest": str, "certificate": dict, "changes": list[dict], "source": dict},
    **{"files": dict, "patches": dict, "left_out": list[str]},
}


def _checked(body: Mapping[str, Any], folder: str | os.PathLike[str]) -> Record:
    """The record in a body; an error for whatever no bake writes, as a baked folder may come from anywhere."""
    check_types(body["source"], "source", {"name": str, "sha256": dict})
    files = {name: record_of(RecordedFile, file, name) for name, file in body["files"].items()}
    for name in (*files, *(file.source for file in files.values() if file.source is not None)):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"it names {quoted(name)}, which is outside of the folder")
    changes = tuple(map(_changed, body["changes"]))
    for name in (*(change.shard for change in changes), *body["patches"]):
        if name not in files:
            raise ValueError(f"{quoted(name)} is changed and not among its files")
    return Record(
        plan=SteeringPlan.from_dict(body["plan"], base_dir=folder),
        plan_digest=body["plan_digest"],
        certificate=Certificate.from_dict(body["certificate"]),
        changes=changes,
        files=files,
        patches={name: tuple(map(_patch, patches)) for name, patches in body["patches"].items()},
        source_name=body["source"]["name"],
        source_sha256=body["source"]["sha256"],
        left_out=tuple(body["left_out"]),
    )


def _changed(data: dict[str, Any]) -> ChangedTensor:
    edits = tuple(map(Edit.from_dict, data["edits"]))
    check_types(data, "changes", {"shape": list[int]})
    return record_of(ChangedTensor, data, "changes", shape=tuple(data["shape"]), edits=edits, span=None, lost=None)


def _patch(pair: Any) -> Patch:
    check_types({"patch": pair}, "patches", {"patch": list[str]})
    old, new = pair
    return old, new


def recorded(path: Path, made: str, source: str | None, hashed: bool, written: int) -> RecordedFile:
    """What the record says about a file."""
    status = path.stat()
    return RecordedFile(
        made=made,
        source=source,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        sha256=sha256_file(path) if hashed else None,
        written=written,
    )


def proven(
    source: Container, places: Iterable[tuple[Change | NewTensor, Container, StoredTensor]], spans: bool = False
) -> list[ChangedTensor]:
    """What the record says about the changes, each read back from where it was written.

    ``places``: a change, the written files and where it is in them. ``spans``: record the ranges (GGUF). OSError when the
    disk holds other bytes than were meant to be written.
    """
    found = []
    for change, written, tensor in places:
        wanted = change.sha256(source)
        if written.sha256(tensor) != wanted:
            raise OSError(errno.EIO, f"{tensor.name} did not arrive on the disk as it was written")
        found.append(
            ChangedTensor(
                name=tensor.name,
                shard=tensor.shard,
                source_shard=change.source_shard,
                dtype=tensor.dtype,
                shape=tensor.shape,
                edits=change.edits,
                sha256_before=change.before,
                sha256_after=wanted,
                span=(tensor.begin, tensor.end) if spans else None,
                lost=change.lost,
            )
        )
    return found
