"""Audit files of a run: the rows that an arm's context reports (a steering audit), chunk by chunk, so that a killed run keeps them.

A line has the rows of one chunk of one arm, and, of a plan with gates, what its gated entries did in each sample of the chunk: for
every one ``row``, its place among the rows, and what ``moe_steer``'s ``Audit.to_samples`` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from moe_steer.json_files import check_types, parse_json, quoted
from reasoning_evals.runs.completions import JsonLinesWriter, complete_lines, json_line
from reasoning_evals.runs.run_folder import digest

SUMS = (
    *("tokens", "weight_added", "scoped", "selected_before", "selected_after"),
    *("norm_added", "rows", "opened_rows", "reopened_rows", "openings"),
    *("samples", "retried_samples", "retokenized", "counted", "filtered", "unaudited", "unseeded", "retries"),
    *("trials", "trial_tokens", "readings", "exits"),
)
"""The fields of an audit row that are added up; all others identify the row."""


def audit_file(folder: Path, rank: int, world_size: int) -> Path:
    """The file to which a rank appends audit rows."""
    return folder / ("audit.jsonl" if world_size == 1 else f"audit.rank{rank}.jsonl")


_TYPES = {"arm": str, "chunk": int, "rows": list[dict], "samples": list[dict]}
_SAMPLE = {"problem_id": str, "sample_idx": int, "gates": list[dict]}
_ACTS = {"row": int, "openings": int, "open_tokens": int, "tokens": int}
_ADDED = {"weight_added": float, "norm_added": float}


def audit_line(arm: str, chunk: int, audit: Any) -> str | None:
    """What an audit says of a chunk, as its line; None where it says nothing. Its samples are called by their CompletionKeys."""
    if not hasattr(audit, "to_rows"):
        return None
    line: dict[str, Any] = {"arm": arm, "chunk": chunk, "rows": audit.to_rows()}
    found = audit.to_samples() if hasattr(audit, "to_samples") else {}
    samples = [
        {"problem_id": key.problem_id, "sample_idx": key.sample_idx, "gates": acts} for key, acts in found.items()
    ]
    if samples:
        line["samples"] = sorted(samples, key=lambda sample: (sample["problem_id"], sample["sample_idx"]))
    return json_line(line)


class AuditWriter:
    """Appends lines; creates the file with the first."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: JsonLinesWriter | None = None

    def append(self, line: str) -> None:
        """One line, of ``audit_line``."""
        if self._writer is None:
            self._writer = JsonLinesWriter(self._path)
        self._writer.append(line)

    def __enter__(self) -> AuditWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()


class RunAudit(NamedTuple):
    """What the audit files of a run say; arms whose context reported nothing are absent."""

    rows: dict[str, list[dict[str, Any]]]
    """Arm -> rows added up over the chunks; a chunk that ran twice because the run was killed counts once."""
    gates: dict[tuple[str, str, int], list[dict[str, Any]]]
    """(arm, problem, sample) -> of every gated entry of the arm's plan what it is, and what it did in that sample (``audit_line``)."""


def read_audit(folder: Path | str) -> RunAudit:
    """The audit of a run folder; ValueError names the line that is wrong."""
    entries = list(_entries(folder))
    totals: dict[str, dict[str, dict[str, Any]]] = {}
    gates: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for entry in sorted(entries, key=lambda one: (one["arm"], one["chunk"])):
        for row in entry["rows"]:
            about = {name: value for name, value in row.items() if name not in SUMS}
            total = totals.setdefault(entry["arm"], {}).setdefault(digest(about), {name: row[name] for name in about})
            for name in SUMS:
                if name in row:
                    total[name] = total.get(name, 0) + row[name]
    for entry in entries:
        names = [
            {name: value for name, value in row.items() if name in ("kind", "layer", "expert", "file", "when")}
            for row in entry["rows"]
        ]
        for sample in entry.get("samples", ()):
            acts = [{**names[act["row"]], **{n: v for n, v in act.items() if n != "row"}} for act in sample["gates"]]
            gates[entry["arm"], sample["problem_id"], sample["sample_idx"]] = acts
    return RunAudit({arm: list(rows.values()) for arm, rows in totals.items()}, gates)


def read_gates(folder: Path | str) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    """``read_audit(folder).gates``."""
    return read_audit(folder).gates


def gates_text(acts: Sequence[Mapping[str, Any]]) -> str:
    """What the gated entries of a plan did in one sample, in a line; empty without any."""
    said = []
    for act in acts:
        who = f"expert {act['expert']}" if act["kind"] == "expert" else f"vector {act['file']}"
        added = f"norm {act['norm_added']:.4g}" if "norm_added" in act else f"weight {act['weight_added']:.4g}"
        said.append(
            f"layer {act['layer']} {who}: gate opened {act['openings']} times, open at {act['open_tokens']} tokens, "
            f"acted at {act['tokens']}, {added} added"
        )
    return "; ".join(said)


def _entries(folder: Path | str) -> Iterator[dict[str, Any]]:
    """Every line; of a chunk that ran twice the last one, in the order of the files."""
    chunks: dict[tuple[str, int], dict[str, Any]] = {}
    for path in sorted(Path(folder).glob("audit*.jsonl")):
        for number, line in enumerate(complete_lines(path), 1):
            where = f"{path}:{number}"
            entry = parse_json(line, where, "restore the line, or remove it")
            if not isinstance(entry, dict) or set(entry) | {"samples"} != set(_TYPES):
                raise ValueError(
                    f"{where} is {quoted(entry)}: an object with arm, chunk, rows is expected, and samples where there are gates"
                )
            check_types(entry, where, _TYPES)
            for row in entry["rows"]:
                check_types(row, where, dict.fromkeys(SUMS, float))
            for sample in entry.get("samples", ()):
                _check_sample(sample, where, entry["rows"])
            chunks[entry["arm"], entry["chunk"]] = entry
    return iter(chunks.values())


def _check_sample(sample: dict[str, Any], where: str, rows: Sequence[Mapping[str, Any]]) -> None:
    check_types(sample, where, _SAMPLE)
    if set(sample) != set(_SAMPLE):
        raise ValueError(f"{where} has a sample {quoted(sample)}: one has {', '.join(_SAMPLE)}")
    for act in sample["gates"]:
        check_types(act, where, _ACTS | _ADDED)
        if len(act) != 5 or not {*_ACTS, *_ADDED} >= set(act) >= set(_ACTS) or not 0 <= act["row"] < len(rows):
            raise ValueError(f"{where} has a gate {quoted(act)}: one has {', '.join(_ACTS)}, and {' or '.join(_ADDED)}")
        row = rows[act["row"]]
        if not {"kind", "layer", "when", "expert" if row.get("kind") == "expert" else "file"} <= set(row):
            raise ValueError(f"{where} has a gate of the row {quoted(row)}, which names no gated entry")
