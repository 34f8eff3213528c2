"""Traces to look at, token by token: what is known of each token, its file, the table of a terminal, and the page.

The page has a script (it colours tokens), so it is a page of its own beside the report, which has none. Only that script may run:
the page's policy names its digest. Texts reach the page as JSON and are put in as text, never as markup.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from moe_steer.console import aligned
from moe_steer.files import write_whole
from moe_steer.json_files import check_types, quoted, read_json, short
from reasoning_evals.report import text as form
from reasoning_evals.report.build import TRACES_PAGE
from reasoning_evals.report.page import template, template_text

VIEWS_FILE = "trace_views.json"
_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceView:
    """One trace of T tokens. Every position is a token's number from 0, prompt included."""

    name: str
    arm: str
    outcome: str
    """The grade, in a word; "" where it was not graded."""
    tokens: Sequence[str]
    """The text of each token."""
    prompt_length: int
    thought: tuple[int, int] | None
    """First token of the thought, and the first one after it."""
    marks: Mapping[str, Sequence[int]]
    """What is marked (a marker's name, "step end", "steered") -> the tokens."""
    fired: Mapping[str, Mapping[str, Sequence[float]]]
    """Name of an expert ("layer 3 expert 5") -> "at": tokens at which it was selected, "weight": its final weight there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceViews:
    """Some traces of a run."""

    title: str
    experts: Mapping[str, str]
    """Name of an expert -> what it is in this run ("plan", "placebo", "rank 4"); in the order in which they are offered."""
    traces: Sequence[TraceView]

    def save(self, folder: Path) -> None:
        """Write the file and the page, each completely or not at all."""
        record = {"version": _VERSION, **dataclasses.asdict(self)}
        write_whole(folder / VIEWS_FILE, json.dumps(record, ensure_ascii=True, separators=(",", ":")) + "\n")
        write_whole(folder / TRACES_PAGE, render_views(self))

    @classmethod
    def load(cls, folder: Path) -> TraceViews:
        """What ``save`` wrote; ValueError in one line for anything else."""
        path = folder / VIEWS_FILE
        again = f"make it again with 'moe-steer inspect {folder} --again'"
        record = read_json(path, again, {"version": int, "title": str, "experts": dict, "traces": list})
        if record.pop("version", None) != _VERSION:
            raise ValueError(f"{path} is of another version: {again}")
        try:
            check_types(record["experts"], "its experts", dict.fromkeys(record["experts"], str))
            traces = [_trace(item) for item in record.pop("traces")]
            return cls(traces=traces, **record)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(f"{path} holds no traces to look at ({short(error)}): {again}") from error

    def table(self, each: bool = False) -> str:
        """One line an arm and expert, over its traces, or with ``each`` one a trace and expert that fires in it: how often it
        fires, in what part, how strongly, and at how many of the marked tokens."""
        groups: dict[tuple[str, ...], list[TraceView]] = {}
        for trace in self.traces:
            groups.setdefault((trace.arm, trace.name, trace.outcome) if each else (trace.arm,), []).append(trace)
        head = ["arm", *(["trace", "outcome"] if each else ["traces"]), "expert", "is", "fires", "in prompt", "thought"]
        lines = [[*head, "answer", "mean weight", "at"]]
        for key, traces in groups.items():
            for name, role in self.experts.items():
                if any(name in trace.fired for trace in traces):
                    lines.append([*key, *([] if each else [str(len(traces))]), name, role, *_summary(traces, name)])
        return "\n".join(aligned([[form.visible(cell) for cell in line] for line in lines], left=len(lines[0])))


def render_views(views: TraceViews) -> str:
    """The page, self-contained: it loads nothing and sends nothing."""
    data = json.dumps(dataclasses.asdict(views), ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    script, style = template_text("traces.js"), template_text("traces.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page: str = template("traces.html.jinja").render(
        title=views.title, data=Markup(data), script=Markup(script), style=Markup(style), digest=digest
    )
    return page


def _summary(traces: Sequence[TraceView], name: str) -> list[str]:
    num, weights = [0, 0, 0], 0.0
    marked: dict[str, list[int]] = {}
    for trace in traces:
        entry = trace.fired.get(name, {"at": [], "weight": []})
        start, stop = trace.thought or (0, 0)
        for place in entry["at"]:
            num[0 if place < trace.prompt_length else 1 if start <= place < stop else 2] += 1
        weights += sum(entry["weight"])
        for mark, places in trace.marks.items():
            found = marked.setdefault(mark, [0, 0])
            found[0] += len(set(places).intersection(entry["at"]))
            found[1] += len(places)
    at = ", ".join(f"{mark} {fires}/{all_}" for mark, (fires, all_) in marked.items())
    return [*map(str, (sum(num), *num)), f"{weights / max(sum(num), 1):.3f}", at]


def _trace(item: Any) -> TraceView:
    types = {
        "name": str,
        "arm": str,
        "outcome": str,
        "tokens": list[str],
        "prompt_length": int,
        "marks": dict,
        "fired": dict,
    }
    check_types(item, "a trace", types)
    check_types(item["marks"], "its marks", dict.fromkeys(item["marks"], list[int]))
    check_types(item["fired"], "its experts", dict.fromkeys(item["fired"], dict))
    for entry in item["fired"].values():
        check_types(entry, "an expert", {"at": list[int], "weight": list[float]})
        if set(entry) != {"at", "weight"}:
            raise ValueError(f"an expert has the keys {quoted(sorted(entry))}")
    thought = check_types(item, "a trace", {"thought": list[int] | None}).pop("thought")
    trace = TraceView(thought=None if thought is None else (thought[0], thought[1]), **item)
    for places in [*trace.marks.values(), *(entry["at"] for entry in trace.fired.values())]:
        if not all(type(place) is int and 0 <= place < len(trace.tokens) for place in places):
            raise ValueError(f"trace {trace.name!r} marks a token that it has not")
    if any(len(entry["at"]) != len(entry["weight"]) for entry in trace.fired.values()):
        raise ValueError(f"trace {trace.name!r} has tokens without a weight")
    return trace
