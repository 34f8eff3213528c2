"""The words of ``when``: conditions on what is known at a token, and how they open and close a gate.

    {"on": "entropy", "above": 2.0, "until": 1.5, "ramp": 8}
    {"all": [{"on": "probe", "file": "check.safetensors", "above": 0.7}, {"on": "spent", "above": 200}], "ramp": 4}

- A condition opens at a token whose value is at least ``above`` (or at most ``below``), and stays open until a token whose value
  is under ``until`` (over it, with ``below``); without ``until`` the two borders are one.
- A gate is open at a token where its condition is, or all or any of several, each with borders of its own.
- ``ramp``: at the n-th token since it opened (the opening one is the first) a gate acts with n / ramp of its entry, at most all of
  it. It closes at once. Without a ramp it is 1.
- The state goes on at every real token of a row, prompt included, whether the entry's scope holds there or not.

What each value is, exactly: ``moe_steer.gates.values``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from moe_steer.json_files import is_number, quoted

if TYPE_CHECKING:
    from torch import Tensor

OWN_KEYS: Mapping[str, tuple[str, ...]] = {
    "probe": ("file",),
    "difficulty": ("file",),
    "entropy": (),
    "margin": (),
    "loop": ("copies", "period"),
    "spent": (),
    "paragraphs_since": ("word",),
}
"""What a condition may be on, and the keys that it has beside ``above``, ``below`` and ``until``."""
PROBED = ("probe", "difficulty")
CONFIDENT = ("entropy", "margin")
_SHARES = (*PROBED, "margin")
_BORDERS = ("above", "below", "until")
_MOST_PERIOD = 256


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition; ``below`` and ``until`` as in the words above. ``file``: of a probe. ``copies`` and ``period``: of a loop, how often
    the same tokens must stand one behind the other, and how many tokens they are at most. ``word``: what paragraphs are counted from."""

    on: str
    above: float | None = None
    below: float | None = None
    until: float | None = None
    file: str = ""
    word: str = ""
    copies: int = 3
    period: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.on, str) or self.on not in OWN_KEYS:
            raise ValueError(f"a condition on {quoted(self.on)}: choose one of {', '.join(OWN_KEYS)}")
        if (self.above is None) == (self.below is None):
            raise ValueError(f"the condition on {self.on} needs one border: give 'above' or 'below', and not both")
        for name in _BORDERS:
            value = getattr(self, name)
            if value is not None and not is_number(value):
                raise ValueError(f"{name} of the condition on {self.on} is {quoted(value)}: give a finite number")
            if value is not None and self.on in _SHARES and not 0 <= value <= 1:
                raise ValueError(f"{name} of the condition on {self.on} is {quoted(value)}: give a number from 0 to 1")
            if value is not None and value < 0:
                raise ValueError(f"{name} of the condition on {self.on} is {quoted(value)}, and it is never below 0")
        if self.until is not None and (self.until > self.opens if self.above is not None else self.until < self.opens):
            raise ValueError(
                f"the condition on {self.on} opens at {self.opens:g} and would close at once at {self.until:g}: give an 'until' "
                f"{'at or under' if self.above is not None else 'at or over'} it"
            )
        for name in ("file", "word"):
            value = getattr(self, name)
            if not isinstance(value, str) or bool(value) != (name in OWN_KEYS[self.on]):
                raise ValueError(
                    f"{name} of the condition on {self.on} is {quoted(value)}: "
                    f"{'give a text' if name in OWN_KEYS[self.on] else 'leave it out'}"
                )
        for name, least, most in (("copies", 2, 1000), ("period", 1, _MOST_PERIOD)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ValueError(
                    f"{name} of the condition on {self.on} is {quoted(value)}: give a whole number from {least} to {most}"
                )

    @property
    def opens(self) -> float:
        """The border at which it opens."""
        border = self.above if self.above is not None else self.below
        assert border is not None
        return float(border)

    @property
    def closes(self) -> float:
        """The border beyond which it closes."""
        return self.opens if self.until is None else float(self.until)

    @property
    def source(self) -> tuple[Any, ...]:
        """What its value is computed from: equal for conditions that differ in their borders alone."""
        return (self.on, *(getattr(self, key) for key in OWN_KEYS[self.on]))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        own = {key: getattr(self, key) for key in OWN_KEYS[self.on]}
        borders = {key: getattr(self, key) for key in _BORDERS if getattr(self, key) is not None}
        return {"on": self.on, **own, **borders}

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Condition:
        """Read JSON values; ValueError, which begins with ``where``, for all that is no condition."""
        if not isinstance(data, Mapping) or "on" not in data:
            raise ValueError(
                f"{where} is {quoted(data)}: give an object with 'on' and a border, or a list under 'all' or 'any'"
            )
        on = data["on"]
        known = {"on", *_BORDERS, *(OWN_KEYS.get(on, ()) if isinstance(on, str) else ())}
        if isinstance(on, str) and on in OWN_KEYS and (unknown := sorted(map(str, set(data) - known))):
            raise ValueError(
                f"{where} has the key {quoted(unknown[0])}: on {on} it may hold {', '.join(sorted(known))}"
            )
        try:
            return cls(**data) if not (isinstance(on, str) and on not in OWN_KEYS) else cls(on)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error

    def __str__(self) -> str:
        of = " ".join(str(getattr(self, key)) for key in OWN_KEYS[self.on])
        sign, back = (">=", "<") if self.above is not None else ("<=", ">")
        return f"{self.on}{f' {of}' if of else ''} {sign} {self.opens:g}" + (
            f" until {back} {self.until:g}" if self.until is not None else ""
        )


@dataclass(frozen=True, slots=True)
class When:
    """The gate of an entry: its conditions, whether ``all`` or ``any`` of them must hold, and the ramp in tokens."""

    conditions: tuple[Condition, ...]
    joined: str = "all"
    ramp: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "conditions", tuple(self.conditions))
        if not self.conditions or self.joined not in ("all", "any"):
            raise ValueError("a gate without a condition is no gate: give one, or a list under 'all' or 'any'")
        if len(set(self.conditions)) < len(self.conditions):
            raise ValueError("a gate names a condition twice: name it once")
        if not isinstance(self.ramp, int) or isinstance(self.ramp, bool) or self.ramp < 1:
            raise ValueError(f"ramp of a gate is {quoted(self.ramp)}: give a whole number of tokens >= 1")

    def renamed(self, name: Callable[[str], str]) -> When:
        """With its probes' files named otherwise."""
        named = [dataclasses.replace(one, file=name(one.file)) if one.file else one for one in self.conditions]
        return dataclasses.replace(self, conditions=tuple(named))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        ramp = {"ramp": self.ramp} if self.ramp > 1 else {}
        if len(self.conditions) == 1:
            return {**self.conditions[0].to_dict(), **ramp}
        return {self.joined: [one.to_dict() for one in self.conditions], **ramp}

    @classmethod
    def of(cls, data: Any) -> When:
        """A gate from JSON values, or one as it is; ValueError, which begins with 'when', for anything else."""
        if isinstance(data, When):
            return data
        if not isinstance(data, Mapping):
            raise ValueError(f"when is {quoted(data)}: give a JSON object")
        lists = [key for key in ("all", "any") if key in data]
        rest = {key: value for key, value in data.items() if key != "ramp"}
        if not lists:
            found, joined = [Condition.from_dict(rest, "when")], "all"
        else:
            joined = lists[0]
            if len(rest) > 1 or not isinstance(data[joined], list):
                raise ValueError(
                    f"when holds {quoted(sorted(map(str, rest)))}: give a list under 'all' or under 'any', and a ramp"
                )
            found = [Condition.from_dict(one, f"when.{joined}[{i}]") for i, one in enumerate(data[joined])]
        try:
            return cls(tuple(found), joined if len(found) > 1 else "all", data.get("ramp", 1))
        except ValueError as error:
            raise ValueError(f"when: {error}") from error

    def __str__(self) -> str:
        text = (" and " if self.joined == "all" else " or ").join(map(str, self.conditions))
        return text + (f", over {self.ramp} tokens" if self.ramp > 1 else "")


class Factors(Protocol):
    """The gates of a running model, as those who act ask for them (``moe_steer.gates.following``)."""

    def number_of(self, when: When) -> int:
        """The number by which ``factor`` knows a gate."""

    def opened(self, number: int) -> Tensor:
        """bool [T, 1]: where a gate is open."""

    def factor(self, number: int) -> Tensor | None:
        """float32 [T, 1], 0 to 1: with how much of its entry a gate acts at each token. None: with all of it where it is open."""

    def part(self, number: int) -> Tensor:
        """The same, of a gate without a ramp too: 1 where it is open."""
