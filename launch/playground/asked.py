"""What a page asks for, checked: a prompt, how it is sampled, and two to four columns, each the model as it is or steered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from launch.core.levers.arm_words import check_rule
from launch.core.options import BASELINE
from moe_steer import ResidualVector, SteeringPlan
from moe_steer.direction import VectorFile
from moe_steer.json_files import check_types, is_number, quoted
from moe_steer.layers import ModelShape
from moe_steer.plan import GATED_VERSION
from reasoning_evals import Problem
from reasoning_evals.engines import OFF, SamplingConfig, Served, ServedPlan
from reasoning_evals.grading import type_of
from reasoning_evals.problems import LABEL

T = TypeVar("T")
YOURS = "yours"
"""The plan that is made on the page."""
FREE = "prompt"
"""The task and the problem of a prompt that the user has written."""
FEWEST, MOST = 2, 4
_COLUMN = {
    "kind": str,
    "plan": str,
    "dose": float,
    "direction": str,
    "layer": int,
    "strength": float,
    "unit": str,
    "scope": str,
    "word": str,
}
_SETTINGS = {"prompt": dict, "sampling": dict, "plan": dict, "columns": list[dict], "colour": str}


@dataclass(frozen=True, kw_only=True)
class Column:
    """One side. ``word``: its rule of prompt or decoding, ``baseline`` for none. ``served``: the plan of a server, in place of ``plan``."""

    title: str
    plan: SteeringPlan | None = None
    word: str = BASELINE
    served: ServedPlan | None = None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A run of the page. ``problem`` has the answer type ``label`` where nobody knows the right answer."""

    problem: Problem
    task: str
    seed: int
    sampling: SamplingConfig
    columns: tuple[Column, ...]

    @property
    def graded(self) -> bool:
        """Whether the problem has a right answer."""
        return self.problem.answer_type != LABEL


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What this playground has: problems of a task, plans and directions by name, the model's shape or a server's plans."""

    problems: list[Problem]
    task: str
    token_limit: int
    shape: ModelShape | None = None
    plans: Mapping[str, SteeringPlan] = field(default_factory=dict)
    directions: Mapping[str, VectorFile] = field(default_factory=dict)
    served: Served | None = None

    @property
    def remote(self) -> bool:
        """Whether a server holds the model."""
        return self.shape is None

    def read(self, settings: Any) -> Asked:
        """ValueError, in one line, for settings that no run can follow."""
        given = _typed(settings, "the page", _SETTINGS)
        columns = given.get("columns", [])
        if not FEWEST <= len(columns) <= MOST:
            raise ValueError(f"the page has {len(columns)} columns: show {FEWEST} to {MOST}")
        sampling, seed = self._sampling(given.get("sampling", {}))
        problem, task = self._problem(given.get("prompt", {}))
        made = given.get("plan", {})
        built = [
            _named(f"column {number}", partial(self._column, item, made)) for number, item in enumerate(columns, 1)
        ]
        return Asked(problem=problem, task=task, seed=seed, sampling=sampling, columns=tuple(built))

    def own_plan(self, made: Any) -> SteeringPlan:
        """The plan that is made on the page: the experts' entries go through the reader of plan files as they are, with whatever
        keys it knows (a gate too); directions and numbers of experts are those of the plan that it began from."""
        kinds = {"base": str | None, "experts": list[dict], "scope": str, "renormalize": bool}
        given = _typed(made, "your plan", kinds)
        base = self.plan_named(given["base"]) if given.get("base") else SteeringPlan()
        values: dict[str, Any] = {
            "version": GATED_VERSION,
            **{key: given[key] for key in ("experts", "scope", "renormalize") if key in given},
        }
        read = SteeringPlan.from_dict(values)
        changes = {key: getattr(read, key) for key in ("experts", "scope", "renormalize")}
        return dataclasses.replace(base, **changes, provenance={"made": "moe-steer playground"})

    def plan_named(self, name: object) -> SteeringPlan:
        """The plan of a file."""
        if name not in self.plans:
            raise ValueError(f"the plan {quoted(name)} is not open here: start the playground with --plan FILE")
        return self.plans[str(name)]

    def _column(self, item: Any, made: Any) -> Column:
        given = _typed(item, "it", _COLUMN)
        kind = given.get("kind")
        if kind == "plain":
            return Column(title="plain", served=OFF if self.served else None)
        if kind == "plan":
            return self._under_plan(given, made)
        if kind not in ("direction", "arm"):
            raise ValueError(f"the kind {quoted(kind)} is unknown: choose plain, plan, direction or arm")
        if self.remote:
            what = "a direction of your own" if kind == "direction" else "a rule of prompt or decoding"
            raise ValueError(
                f"{what} acts inside this process, and a server holds the model: choose a plan of the server"
            )
        return self._along(given) if kind == "direction" else _by_rule(given)

    def _under_plan(self, given: Mapping[str, Any], made: Any) -> Column:
        name, dose = given.get("plan", YOURS), given.get("dose", 1.0)
        if not is_number(dose):
            raise ValueError(f"the dose is {quoted(dose)}: give a finite number")
        title = ("your plan" if name == YOURS else name) + (f" x{dose:g}" if dose != 1 else "")
        if self.remote:
            plans = {plan.name: plan for plan in self.served.plans.values()} if self.served else {}
            if name not in plans:
                raise ValueError(
                    f"the server has no plan {quoted(name)}: it has {', '.join(plans) or 'none, start it with moe-steer serve --plan FILE'}"
                )
            return Column(
                title=title, served=plans[name] if dose == 1 else plans[name]._replace(name=f"{name}*{dose:g}")
            )
        plan = (self.own_plan(made) if name == YOURS else self.plan_named(name)).dosed(dose)
        plan.check(self.shape)
        return Column(title=title, plan=plan)

    def _along(self, given: Mapping[str, Any]) -> Column:
        name = given.get("direction", "")
        if name not in self.directions:
            raise ValueError(
                f"the direction {quoted(name)} is not open here: start the playground with --direction FILE"
            )
        found = self.directions[name]
        settings = {key: given[key] for key in ("strength", "unit", "scope") if key in given}
        layer = given.get("layer", found.header.get("layer", 0))
        plan = SteeringPlan(
            residual=[ResidualVector(layer, vector=found, **settings)], provenance={"made": "moe-steer playground"}
        )
        plan.check(self.shape)
        return Column(title=f"{name} x{settings.get('strength', 1):g}", plan=plan)

    def _sampling(self, values: Any) -> tuple[SamplingConfig, int]:
        kinds = {"seed": int, "temperature": float, "top_p": float, "max_new_tokens": int, "greedy": bool}
        given = _typed(values, "sampling", kinds)
        seed = given.pop("seed", 0)
        limit = given.setdefault("max_new_tokens", self.token_limit)
        if limit > self.token_limit:
            raise ValueError(
                f"answers of {limit} tokens: this playground was started for {self.token_limit} at most (--max-new-tokens)"
            )
        if not abs(seed) < 2**53:
            raise ValueError(f"the seed is {seed}: give a whole number of up to 15 digits")
        return SamplingConfig(**given, batch_size=1), seed

    def _problem(self, values: Any) -> tuple[Problem, str]:
        given = _typed(values, "the prompt", {"index": int | None, "text": str, "target": str})
        index = given.get("index")
        if index is not None:
            if not 0 <= index < len(self.problems):
                raise ValueError(f"problem {index + 1} of {self.task} does not exist: it has {len(self.problems)}")
            return self.problems[index], self.task
        text, target = given.get("text", ""), given.get("target", "").strip()
        if not text.strip():
            raise ValueError("the prompt is empty: write one, or choose a problem")
        return Problem(FREE, text, target or "unknown", type_of(target) if target else LABEL), FREE


def _by_rule(given: Mapping[str, Any]) -> Column:
    word = given.get("word", "").strip()
    check_rule(word, "a column of plans")
    if word.startswith("exit:"):
        raise ValueError(
            f"the arm {word!r} reads the model while it decodes: compare it with 'moe-steer evaluate --arms baseline {word}'"
        )
    return Column(title=word, word=word)


def _typed(values: Any, where: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{where} says {quoted(values)}: a JSON object is expected")
    if unknown := sorted(set(values) - set(kinds)):
        raise ValueError(f"{where} has the unknown key {quoted(unknown[0])}: it may hold {', '.join(kinds)}")
    return dict(check_types(values, where, kinds))


def _named(where: str, make: Callable[[], T]) -> T:
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
