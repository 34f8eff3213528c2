"""What a server offers: plans by name. And what a request asks for: a name, a dose, or nothing. Nothing else comes over HTTP."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_steer import SteeringPlan
from moe_steer.json_files import quoted, short
from moe_steer.tokens import parse_scope, tag_scopes

KEY = "moe_steer"
"""Of the engine's ``additional_config``, and of a request's ``vllm_xargs``."""
OFF = "off"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MOST_SHOWN, _MOST_KNOWN, _MOST_SHORT = 20, 1000, 100


@dataclass(frozen=True)
class Asked:
    """A plan and its dose."""

    name: str
    dose: float = 1.0

    def __str__(self) -> str:
        return self.name if self.dose == 1.0 else f"{self.name}*{self.dose!r}"


@dataclass(frozen=True)
class Served:
    """Plans by name, and the one of requests that ask for none."""

    plans: Mapping[str, SteeringPlan] = field(default_factory=dict)
    default: Asked | None = None
    _known: dict[str, tuple[Asked, str]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What was asked for before, with its salt: requests ask for the same few things."""

    @classmethod
    def of(cls, settings: object) -> Served:
        """Read ``{"plans": {name: file}, "default": "name*0.5"}``; ValueError in one line for anything else, for a plan that no
        engine can follow, and where a file no longer holds the plan that ``digests`` names."""
        if not isinstance(settings, Mapping) or set(settings) - {"plans", "default", "digests", "plugin"}:
            raise ValueError(
                f'{KEY} of additional_config is {quoted(settings)}: give {{"plans": {{NAME: FILE}}, "default": NAME}}'
            )
        files = settings.get("plans")
        if not isinstance(files, Mapping) or not files:
            raise ValueError(f"{KEY} of additional_config names no plans: give them as {{NAME: FILE}}")
        plans = {}
        for name, file in files.items():
            if not isinstance(name, str) or name == OFF or not _NAME.fullmatch(name):
                raise ValueError(
                    f"plan name {quoted(name)}: give up to 64 letters, digits, dots, - and _, and not {OFF!r}"
                )
            if not isinstance(file, str):
                raise ValueError(f"plan {name} is {quoted(file)}: give the path of a plan file")
            plans[name] = SteeringPlan.load(file)
            try:
                plans[name].refuse_outside("an engine")
            except ValueError as error:
                raise ValueError(f"plan {name}: {error}") from error
            if plans[name].top_k:
                raise ValueError(
                    f"plan {name} sets top_k, and an engine gives every token the model's own number of experts: take it out, or run the plan in process"
                )
            was = (settings.get("digests") or {}).get(name, plans[name].digest())
            if was != plans[name].digest():
                raise ValueError(
                    f"{file} has changed since the server was started, or is another file here: start it again"
                )
        served = cls(plans)
        default = settings.get("default")
        return cls(plans, None if default is None else served.asked({KEY: default}))

    @property
    def scopes(self) -> set[str]:
        """Of all entries that change something."""
        return {scope for plan in self.plans.values() for scope in channels(plan)}

    def asked(self, extra: Mapping[str, Any] | None) -> Asked | None:
        """What the extra arguments of a request ask for; ValueError for a name that is not served, and for a dose that its plan
        cannot have."""
        if not extra or KEY not in extra:
            return self.default
        text = extra[KEY]
        if not isinstance(text, str):
            raise ValueError(
                f"{KEY} is {short(repr(text))}: give the name of a plan, as in 'NAME' or 'NAME*0.5', or {OFF!r}"
            )
        if text == OFF:
            return None
        if text in self._known:
            return self._known[text][0]
        name, star, number = text.partition("*")
        if name not in self.plans:
            names = ", ".join(sorted(self.plans)[:_MOST_SHOWN]) or "none"
            raise ValueError(f"plan {quoted(name)} is not served here: choose one of {names}, or {OFF!r}")
        try:
            dose = float(number) if star else 1.0
        except ValueError:
            raise ValueError(f"dose {quoted(number)} is no number: write {name}*0.5") from None
        self.plans[name].dosed(dose)
        asked = Asked(name, dose)
        if len(self._known) < _MOST_KNOWN and len(text) < _MOST_SHORT:
            self._known[text] = asked, self._salt(asked)
        return asked

    def salt(self, asked: Asked) -> str:
        """Different for every effect on the key-value cache, so that no request reads what another one's plan has written."""
        found = self._known.get(str(asked))
        return found[1] if found is not None else self._salt(asked)

    def _salt(self, asked: Asked) -> str:
        return f"{KEY}:{self.plans[asked.name].digest()}*{asked.dose!r}"

    def reads_tokens(self, asked: Asked) -> bool:
        """Whether a scope of the plan needs the ids of the prompt."""
        return bool(tag_scopes(channels(self.plans[asked.name])))


def settings_of(config: Any) -> Any:
    """What a vLLM configuration says of plans; None for nothing."""
    extra = config.additional_config
    return extra.get(KEY) if isinstance(extra, dict) else None


def served_by(config: Any) -> Served:
    """What an engine of this configuration serves: no plan where it says nothing."""
    settings = settings_of(config)
    return Served() if settings is None else Served.of(settings)


def channels(plan: SteeringPlan) -> list[str]:
    """The scopes of a plan: of its entries on experts first, then the others of residual entries."""
    scopes = [plan.scope, *(entry.scope for entry in plan.active_residual)]
    for scope in scopes:
        parse_scope(scope)
    return list(dict.fromkeys(scopes))


def entries(plan: SteeringPlan) -> list[dict[str, Any]]:
    """The entries that change something, in the order of their hits."""
    return [
        *({"kind": "expert", **entry.to_dict()} for entry in plan.active_experts),
        *(entry.audit_row() for entry in plan.active_residual),
    ]
