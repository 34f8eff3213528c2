"""The record of a baked GGUF file: ``NAME.steering.json`` next to the (first part of the) model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from moe_steer.baking.edits import Edit
from moe_steer.baking.gguf_gains import certify, is_exact
from moe_steer.baking.gguf_model import BLOCK_FORMATS, GgufModel
from moe_steer.baking.numbers import Rounding
from moe_steer.baking.planning import Certificate, EntryCertificate, Work
from moe_steer.baking.record import ChangedTensor, Record, RecordedFile, sealed, unsealed
from moe_steer.json_files import check_types, read_json, short
from moe_steer.plan import SteeringPlan

RECORD_VERSION = 2
_UNSEALED = 1
"""The version without a hash over itself."""
BOUND_OF = "relative error of a block scale"
_KEYS = {"mode", "verdict", "bound", "reversible", "plan", "plan_digest", "model", "files", "slices"}


def gguf_record_path(first: Path) -> Path:
    """Where the record of a model is, by its first file."""
    return first.with_name(f"{first.name}.steering.json")


def undo_words(certificate: Certificate) -> str:
    """How a bake is taken back."""
    if certificate.reversible:
        return "unbake divides by the gains, bit for bit"
    return "keep the source file: rounding cannot be undone"


def gguf_record_text(record: Record, source: GgufModel) -> str:
    """The record as JSON."""
    certificate = record.certificate
    asked = {(entry.layer, entry.expert): entry.gain for entry in certificate.entries}
    body = {
        "version": RECORD_VERSION,
        "format": "gguf",
        "mode": "copy",
        "verdict": certificate.verdict_words,
        "bound": certificate.bound,
        "bound_of": BOUND_OF,
        "reversible": certificate.reversible,
        "undo": undo_words(certificate),
        "plan": record.plan.to_dict(),
        "plan_digest": record.plan_digest,
        "model": {
            "architecture": source.architecture,
            "name": source.name,
            "source": record.source_name,
            **source.numbers,
        },
        "files": [
            {"name": name, "size": file.size, "sha256_header": record.headers[part], "sha256": file.sha256}
            for name, (part, file) in zip(certificate.parts, record.files.items(), strict=True)
        ],
        "slices": [_slice(change, asked) for change in record.changes],
        "control_vector": record.control_vector,
        "notes": list(certificate.notes),
        "versions": {"gguf": version("gguf")},
    }
    return sealed(body, indent=2)


def _slice(change: ChangedTensor, asked: Mapping[tuple[int, int | None], float]) -> dict[str, Any]:
    (edit,), lost, span = change.edits, change.lost, change.span
    assert lost is not None
    assert span is not None
    gain = asked[edit.layer, edit.expert]
    return {
        "layer": edit.layer,
        "expert": edit.expert,
        "asked": gain,
        "gain": edit.factor,
        "tensor": change.name,
        "type": change.dtype,
        "part": int(change.shard),
        "offset": span[0],
        "num_bytes": span[1] - span[0],
        "num_scales": lost.numbers,
        "num_rounded": lost.inexact,
        "max_relative_error": lost.worst,
        "exact": is_exact(gain, edit.factor, lost),
        "sha256_before": change.sha256_before,
        "sha256_after": change.sha256_after,
    }


def read_gguf_record(model: GgufModel) -> Record:
    """The record of a baked model; ValueError says what is wrong with it, or that it is not this model's."""
    path = gguf_record_path(model.first)
    if not path.is_file():
        raise ValueError(f"there is no certificate {str(path)!r}: the model was not baked, or was moved without it")
    data = read_json(path, "it was changed after it was written; bake again")
    missing = sorted(_KEYS - set(data))
    is_known = data.get("format") == "gguf" and data.get("version") in (_UNSEALED, RECORD_VERSION)
    if missing or not is_known:
        raise ValueError(
            f"{path} is not a GGUF certificate of version {RECORD_VERSION}: "
            + (f"it lacks {missing[0]!r}" if missing else "it is another kind")
        )
    if data["version"] != _UNSEALED or "sha256" in data:
        data = unsealed(path, indent=2)
    try:
        return _checked(data, model)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} cannot be used: {short(error)}") from error


_SLICE = {
    **dict.fromkeys(("layer", "expert", "part", "offset", "num_bytes", "num_scales", "num_rounded"), int),
    **dict.fromkeys(("asked", "gain", "max_relative_error"), float),
    **dict.fromkeys(("tensor", "type", "sha256_before", "sha256_after"), str),
}


def _checked(data: dict[str, Any], model: GgufModel) -> Record:
    check_types(data, "", {"slices": list[dict], "files": list[dict], "model": dict, "plan": dict})
    for entry in data["slices"]:
        check_types(entry, "slices", _SLICE)
    if len(data["files"]) != len(model.paths):
        raise ValueError(
            f"{model.first} has {len(model.paths)} parts and the certificate lists {len(data['files'])}: they do not belong together"
        )
    changes = tuple(_change(entry, model) for entry in data["slices"])
    slices = groupby(data["slices"], lambda it: (it["layer"], it["expert"]))
    work = Work(entries=[_entry(list(group)) for _, group in slices], notes=list(data.get("notes", ())))
    parts = dict(zip(model.shards, data["files"], strict=True))
    certificate = replace(
        work.certificate(data["model"]["architecture"], "GGUF"),
        changed_tensors=len(changes),
        changed_bytes=sum(item["num_bytes"] for item in data["slices"]),
        files_written=tuple(file["name"] for file in parts.values() if file["sha256"] is not None),
        parts=tuple(file["name"] for file in parts.values()),
    )
    return Record(
        plan=SteeringPlan.from_dict(data["plan"], base_dir=model.first.parent),
        plan_digest=data["plan_digest"],
        certificate=certificate,
        changes=changes,
        files={part: _file(part, file["size"], file["sha256"]) for part, file in parts.items()},
        patches={},
        source_name=data["model"].get("source") or "",
        source_sha256={},
        headers={part: file["sha256_header"] for part, file in parts.items()},
        control_vector=data.get("control_vector"),
    )


def _file(part: str, size: int, sha256: str | None) -> RecordedFile:
    """Parts without a hash are links to the source."""
    made = "linked" if sha256 is None else "rewritten"
    return RecordedFile(made=made, source=part, size=size, mtime_ns=None, sha256=sha256)


def _entry(slices: list[Mapping[str, Any]]) -> EntryCertificate:
    found = [(it["tensor"], it["type"], _lost(it)) for it in slices]
    return certify(slices[0]["layer"], slices[0]["expert"], slices[0]["asked"], slices[0]["gain"], found)


def _lost(entry: Mapping[str, Any]) -> Rounding:
    return Rounding(worst=entry["max_relative_error"], inexact=entry["num_rounded"], numbers=entry["num_scales"])


def _change(entry: Mapping[str, Any], model: GgufModel) -> ChangedTensor:
    try:
        span = (entry["offset"], entry["offset"] + entry["num_bytes"])
        which = {"layer": entry["layer"], "expert": entry["expert"], "factor": entry["gain"]}
        edit = Edit(operation="multiply", begin=0, end=entry["num_bytes"], **which)
        tensor, dtype, shard = model.tensors.get(entry["tensor"]), entry["type"], str(entry["part"])
        change = ChangedTensor(
            name=entry["tensor"],
            shard=shard,
            source_shard=shard,
            dtype=dtype,
            shape=() if tensor is None else tensor.shape,
            edits=(edit,),
            sha256_before=entry["sha256_before"],
            sha256_after=entry["sha256_after"],
            span=span,
            lost=_lost(entry),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"the certificate's entry {dict(entry)!r} is not complete: {error}") from error
    inside = (
        tensor is not None
        and dtype in BLOCK_FORMATS
        and (tensor.dtype, tensor.shard) == (dtype, shard)
        and tensor.begin <= span[0] <= span[1] <= tensor.end
    )
    if not inside:
        raise ValueError(
            f"the certificate lists {change.name} ({dtype}) at byte {span[0]}, which this file does not hold there: they do not belong together"
        )
    return change
