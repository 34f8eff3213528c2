"""steering.json: what was baked, how to check it and how to take it back."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_steer.baking.certificate import Certificate
from moe_steer.baking.edits import Edit
from moe_steer.baking.textpatch import Patch
from moe_steer.plan import SteeringPlan

RECORD = "steering.json"
RECORD_VERSION = 1
UNDO = (
    "moe-steer unbake --baked THIS_FOLDER --out NEW_FOLDER restores the original and proves it by the hashes 'before'. "
    "By hand: take the tensors under 'changes' from the original checkpoint."
)


@dataclass(frozen=True, kw_only=True)
class ChangedTensor:
    """One tensor: where it lies now (``shard``), where it lay (``source_shard``, None if it is new), its edits and hashes."""

    name: str
    shard: str
    source_shard: str | None
    dtype: str
    shape: tuple[int, ...]
    edits: tuple[Edit, ...]
    sha256_before: str | None
    sha256_after: str


@dataclass(frozen=True, kw_only=True)
class RecordedFile:
    """One file of the baked folder. ``made``: linked, symlinked, copied, rewritten, patched or new.

    ``source`` is its name in the source, None if there is none; ``sha256`` is None for large linked shards, whose identity
    rests on ``size``, ``mtime_ns`` and the comparison with the source. ``written``: bytes of data written for it, 0 for a link;
    a file that shares its source's blocks counts what was changed in it.
    """

    made: str
    source: str | None
    size: int
    mtime_ns: int
    sha256: str | None
    written: int = 0


@dataclass(frozen=True, kw_only=True)
class Record:
    """The contents of steering.json."""

    plan: SteeringPlan
    plan_digest: str
    certificate: Certificate
    changes: tuple[ChangedTensor, ...]
    files: Mapping[str, RecordedFile]
    patches: Mapping[str, tuple[Patch, ...]]
    source_name: str
    source_sha256: Mapping[str, str]
    left_out: tuple[str, ...]

    def to_text(self) -> str:
        """JSON with a hash over itself."""
        body: dict[str, Any] = {
            "version": RECORD_VERSION,
            "plan": self.plan.to_dict(),
            "plan_digest": self.plan_digest,
            "certificate": self.certificate.to_dict(),
            "changes": [
                {**asdict(change), "shape": list(change.shape), "edits": [edit.to_dict() for edit in change.edits]}
                for change in self.changes
            ],
            "files": {name: asdict(file) for name, file in self.files.items()},
            "patches": {name: [list(patch) for patch in patches] for name, patches in self.patches.items()},
            "source": {"name": self.source_name, "sha256": dict(self.source_sha256)},
            "left_out": list(self.left_out),
            "undo": UNDO,
        }
        return json.dumps({**body, "sha256": _digest(body)}, indent=1, allow_nan=False) + "\n"


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def has_record(folder: Path) -> bool:
    """Whether the folder was written by a bake."""
    return (folder / RECORD).exists()


def read_record(folder: str | os.PathLike[str]) -> Record:
    """Read steering.json; ValueError when it is missing, of another version, or not as it was written."""
    path = Path(folder) / RECORD
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        body = {key: value for key, value in data.items() if key != "sha256"}
        if body.get("version") != RECORD_VERSION:
            raise ValueError(
                f"{path} is of version {body.get('version')!r}: this program reads version {RECORD_VERSION}"
            )
        if data.get("sha256") != _digest(body):
            raise ValueError(f"{path} was changed after it was written: its own hash does not fit")
    except FileNotFoundError:
        raise ValueError(f"{os.fspath(folder)!r} has no {RECORD}: it was not written by 'moe-steer bake'") from None
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it was changed after it was written") from None
    return Record(
        plan=SteeringPlan.from_dict(body["plan"], base_dir=folder),
        plan_digest=body["plan_digest"],
        certificate=Certificate.from_dict(body["certificate"]),
        changes=tuple(_changed(change) for change in body["changes"]),
        files={name: RecordedFile(**file) for name, file in body["files"].items()},
        patches={name: tuple((old, new) for old, new in patches) for name, patches in body["patches"].items()},
        source_name=body["source"]["name"],
        source_sha256=body["source"]["sha256"],
        left_out=tuple(body["left_out"]),
    )


def _changed(data: Mapping[str, Any]) -> ChangedTensor:
    edits = tuple(Edit.from_dict(edit) for edit in data["edits"])
    return ChangedTensor(**{**data, "shape": tuple(data["shape"]), "edits": edits})
