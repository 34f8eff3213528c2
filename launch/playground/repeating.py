"""A column as files and a command: the plan, the problem, and the line that makes the same tokens again without a page."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from launch.core.options import BASELINE, HeldModel
from launch.core.prompt_options import PromptOptions
from launch.playground.asked import Asked
from launch.playground.running import Here, There, request_of
from moe_steer import SteeringPlan
from reasoning_evals.engines.http_client import Address
from reasoning_evals.problems import write_problems

PLAN = "plan.json"


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
