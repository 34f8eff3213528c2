"""What a page shows, kept by the server: settings and the last run, by the name in the page's address. A refresh finds all of it; the
settings are on the disk, too, and survive the server. And a column as files and a command: the line that makes the same tokens without a page."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from launch.core.options import BASELINE, HeldModel
from launch.core.prompt_options import PromptOptions
from launch.core.trace_views import texts_of
from launch.playground.asked import Asked, Offer
from launch.playground.readings import number_of
from launch.playground.running import Answer, Here, Run, There, request_of
from moe_steer import SteeringPlan
from moe_steer.files import write_whole
from moe_steer.json_files import quoted, read_json
from moe_steer.thinking import ANSWER, THOUGHT
from reasoning_evals.engines.http_client import Address
from reasoning_evals.problems import write_problems
from reasoning_evals.report.text import OUTCOMES
from reasoning_evals.thinking import token_phases

SETTINGS = "settings.json"
PLAN = "plan.json"
_NAME = re.compile(r"[A-Za-z0-9_-]{6,40}")
_PARTS = {THOUGHT: "thought", ANSWER: "answer", -1: "tag"}


class Busy(RuntimeError):
    """Another run has the model."""


@dataclass
class Board:
    """One page."""

    settings: dict[str, Any] | None = None
    run: Run | None = None
    ran_with: dict[str, Any] | None = None
    """The settings of the run."""


@dataclass
class Boards:
    """All pages of a playground. One run at a time: the columns of two would wait for each other."""

    folder: Path
    offer: Offer
    bench: Here | There
    ending: bool = False
    """Whether nobody is told anything more."""
    _boards: dict[str, Board] = field(default_factory=dict)
    _starting: threading.Lock = field(default_factory=threading.Lock)

    def board(self, name: str) -> Board:
        """The page of a name; a new one where there is none. ValueError for what cannot be the name of a folder."""
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"the page's name {quoted(name[:60])} is not one of this playground: open the address without it"
            )
        if name not in self._boards:
            self._boards[name] = Board(settings=_stored(self.folder / name / SETTINGS))
        return self._boards[name]

    def keep(self, name: str, settings: Any) -> None:
        """Keep the settings of a page as they are; whether a run can follow them is said when one is asked for."""
        if not isinstance(settings, dict):
            raise ValueError(f"the settings are {quoted(settings)}: a JSON object is expected")
        board = self.board(name)
        if settings != board.settings:
            board.settings = settings
            write_whole(self.place(name) / SETTINGS, json.dumps(settings, indent=1, allow_nan=False) + "\n")

    def place(self, name: str) -> Path:
        """The folder of a page, which is made."""
        self.board(name)
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def start(self, name: str, settings: Any) -> Run:
        """Run what the settings ask for. ValueError for settings that cannot be followed; Busy while another run goes on."""
        asked = self.offer.read(settings)
        with self._starting:
            if not all(run.ended for run in self._runs()):
                raise Busy("a run is under way, here or on another page: stop it there, or wait for its end")
            self.keep(name, settings)
            board = self.board(name)
            board.run, board.ran_with = self.bench.start(asked), settings
        return board.run

    def end(self) -> None:
        """End all runs at their next token, and whatever is told of them."""
        self.ending = True
        for run in self._runs():
            run.stop()

    def wait(self, seconds: float) -> None:
        """Until all runs have ended: an interpreter that ends while another thread computes is aborted."""
        for run in self._runs():
            run.wait(seconds)

    def _runs(self) -> list[Run]:
        return [board.run for board in self._boards.values() if board.run is not None]

    def parts(self, answer: Answer, ids: Sequence[int] | None) -> list[str]:
        """What each token belongs to: thought, answer, tag or other."""
        if ids is None or answer.reader is None:
            return ["answer"]
        reader = answer.reader
        if reader.tags is None:
            return ["answer"] * len(ids)
        stopped = bool(answer.grade and answer.grade.finish_reason == "stop")
        phases = token_phases(ids[: len(ids) - stopped], reader.opens(answer.prompt), reader.tags)
        return [*(_PARTS.get(phase, "other") for phase in phases), *(["tag"] if stopped else [])]


def _stored(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found = read_json(path, "delete it, and the page starts anew")
    return found if isinstance(found, dict) else None


@dataclass
class Telling:
    """One reader of a run, and what it has been told so far. ``colour``: see ``readings.colour_of``; empty for none."""

    boards: Boards
    run: Run
    colour: Sequence[str] = ()
    _told: dict[int, int] = field(default_factory=dict)
    _texts: dict[int, list[str]] = field(default_factory=dict)
    _ended: set[int] = field(default_factory=set)

    def news(self) -> Iterator[dict[str, Any]]:
        """What the columns have that was not told. At its end a column is told once more, whole: only then is it known how all of it
        is read."""
        for number, answer in enumerate(self.run.answers):
            ended = answer.ended  # before its tokens are looked at
            if number in self._ended:
                continue
            ids = answer.ids()
            start = 0 if ended or ids is None else self._told.get(number, 0)
            length = 1 if ids is None else len(ids)
            if ended or length > start or number not in self._told:
                self._told[number] = length
                yield self._column(number, answer, ids, start)
            if ended:
                self._ended.add(number)

    def _column(self, number: int, answer: Answer, ids: list[int] | None, start: int) -> dict[str, Any]:
        readings, parts = answer.readings, self.boards.parts(answer, ids)
        texts = self._told_texts(number, answer, ids)
        length = len(texts)
        values = readings.values(start, self.colour) if readings and self.colour else []
        tokens = [
            {
                "id": None if ids is None else ids[at],
                "text": texts[at],
                "part": parts[at] if at < len(parts) else "answer",
                "value": values[at - start] if at - start < len(values) else None,
                **(_details(readings, at) if readings else {}),
            }
            for at in range(start, length)
        ]
        grade = answer.grade
        return {
            "column": number,
            "from": start,
            "length": length,
            "tokens": tokens,
            "state": answer.state,
            "error": answer.error,
            "title": answer.column.title,
            "seconds": round(answer.seconds, 2),
            "counts": {"thought": grade.thinking_tokens, "answer": grade.answer_tokens, "total": grade.total_tokens}
            if grade
            else None,
            "grade": {
                "outcome": grade.outcome,
                "word": OUTCOMES.get(grade.outcome, grade.outcome),
                "extracted": grade.extracted,
                "reason": grade.reason,
            }
            if grade and self.run.asked.graded
            else None,
        }

    def _told_texts(self, number: int, answer: Answer, ids: list[int] | None) -> list[str]:
        if ids is None:
            return [answer.reply.so_far if answer.reply else ""]
        known = self._texts.setdefault(number, [])
        if len(known) > len(ids):  # a server that was asked again
            known.clear()
        waiting = next((back for back in range(min(3, len(known)), 0, -1) if not any(known[-back:])), 0)
        first = len(known) - waiting  # tokens of half a character are read again with the next
        known[first:] = texts_of(self.boards.bench.tokenizer, ids[first:])
        return known


def _details(readings: Any, at: int) -> dict[str, Any]:
    seen = readings.seen[at] if at < len(readings.seen) else None
    return {
        "entropy": number_of(readings.entropies[at]) if at < len(readings.entropies) else None,
        "steered": seen.steered if seen else None,
        "experts": readings.experts(at),
    }


class Saved(NamedTuple):
    """``plan``: the file, "" for a column without a plan of its own. ``command``: what to type."""

    plan: str
    command: str


@dataclass(frozen=True, kw_only=True)
class Repeater:
    """``options``: those of this start."""

    options: HeldModel
    bench: Here | There

    def save(self, folder: Path, asked: Asked, number: object) -> Saved:
        """Write the files of column ``number`` (from 0) into a folder of its own, named by what is in them."""
        if type(number) is not int or not 0 <= number < len(asked.columns):
            raise ValueError(f"column {number!r:.20} does not exist: the page shows {len(asked.columns)}")
        column = asked.columns[number]
        if isinstance(self.bench, There):
            return Saved("", self._request(self.bench, asked, number))
        what = [
            column.plan.digest() if column.plan else "",
            column.word,
            asked.seed,
            asked.sampling.to_dict(),
            asked.problem.to_dict(),
        ]
        home = folder / hashlib.sha256(json.dumps(what).encode()).hexdigest()[:10]
        home.mkdir(exist_ok=True)
        problems = home / f"{asked.task}.jsonl"
        write_problems(problems, [asked.problem])
        words = ["moe-steer", "generate", *self._model_options(), "--problems", str(problems), *self._sampling(asked)]
        plan = ""
        if column.plan is not None:
            plan = str(home / PLAN)
            _alone(column.plan).save(plan)
            words += ["--plan", plan]
        if column.word != BASELINE:
            words += ["--rule", column.word]
        return Saved(plan, shlex.join([*words, "--out", str(home / "answer")]))

    def _model_options(self) -> list[str]:
        """The options of this start that decide how the model is held and asked, where they are not the usual ones."""
        words = ["--model", self.options.model]
        for one in (*dataclasses.fields(HeldModel), *dataclasses.fields(PromptOptions)):
            value = getattr(self.options, one.name)
            if one.name == "model" or value == one.default:
                continue
            option = f"--{one.name.replace('_', '-')}"
            for item in value if isinstance(value, tuple) else (value,):
                words += [option] if item is True else [option, str(item)]
        return words

    def _sampling(self, asked: Asked) -> list[str]:
        rule = asked.sampling
        drawn = (
            ["--greedy"] if rule.greedy else ["--temperature", f"{rule.temperature!r}", "--top-p", f"{rule.top_p!r}"]
        )
        return ["--seed", str(asked.seed), "--samples", "1", *drawn, "--max-new-tokens", str(rule.max_new_tokens)]

    def _request(self, there: There, asked: Asked, number: int) -> str:
        """A request for the same tokens: a dose is a word of the request, and no file of ours."""
        column = asked.columns[number]
        sampler = there.sampler(column)
        body = sampler.body(request_of(asked, column, sampler.render), asked.sampling) | {"stream": False}
        key = getattr(self.options, "api_key_variable", None)
        secret = f' -H "Authorization: Bearer ${key}"' if key else ""
        address = shlex.quote(Address(there.connection.server.base_url, "/completions", None).shown)
        return f"curl {address} -H 'Content-Type: application/json'{secret} -d {shlex.quote(json.dumps(body))}"


def _alone(plan: SteeringPlan) -> SteeringPlan:
    """The plan with its vectors in memory, so that saving writes them beside it."""
    residual = [dataclasses.replace(entry, file="", vector=plan.vector(entry)) for entry in plan.residual]
    return dataclasses.replace(plan, residual=residual)
