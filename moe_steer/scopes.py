"""The words that say at which tokens a plan acts: a kind, and for two of the kinds a parameter after a colon.

``all | prompt | thought | answer | generated | step_end``, ``step_end:sentence``, ``step_end:line``, ``step_end:paragraph``, several
classes joined by ``+`` (``step_end:sentence+paragraph``), and ``after:N``. ``step_end`` alone is ``step_end:sentence+line``; what
each one means is said in ``moe_steer.positions``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SCOPES = ("all", "prompt", "thought", "answer", "generated", "step_end")
"""The kinds that stand alone."""
STEP_CLASSES = ("sentence", "line", "paragraph")
SCOPE_FORMS = "all, prompt, thought, answer, generated, step_end, step_end:CLASS with sentence, line or paragraph (joined by +), after:N"
"""All forms, for help texts and error messages."""
_PLAIN_STEP_END = frozenset({"sentence", "line"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Scope:
    """A scope that was read: its kind and what follows the colon."""

    kind: str
    classes: frozenset[str] = frozenset()
    """Of ``step_end``: the classes of tokens that end a step."""
    skip: int = 0
    """Of ``after``: generated tokens that are left alone first."""


def parse_scope(text: object) -> Scope:
    """Read a scope; ValueError in one line for anything else.

    >>> parse_scope("after:64").skip
    64
    >>> sorted(parse_scope("step_end").classes)
    ['line', 'sentence']
    """
    if not isinstance(text, str):
        raise ValueError(f"scope {text!r} is {type(text).__name__}: give one of {SCOPE_FORMS}")
    kind, colon, parameter = text.partition(":")
    if kind == "after":
        if not re.fullmatch("0|[1-9][0-9]*", parameter):
            raise ValueError(
                f"scope {text!r} does not say after how many generated tokens: write after:N, for example after:64"
            )
        return Scope(kind=kind, skip=int(parameter))
    if kind not in SCOPES:
        raise ValueError(f"scope {text!r} is unknown: choose one of {SCOPE_FORMS}")
    if kind == "step_end":
        return Scope(kind=kind, classes=_classes(text, parameter) if colon else _PLAIN_STEP_END)
    if colon:
        raise ValueError(f"scope {text!r}: {kind} takes no parameter, write {kind!r}; only step_end and after take one")
    return Scope(kind=kind)


def _classes(text: str, parameter: str) -> frozenset[str]:
    names = parameter.split("+")
    unknown = [name for name in names if name not in STEP_CLASSES]
    if unknown:
        raise ValueError(
            f"scope {text!r} names the class {unknown[0]!r}: step_end takes {', '.join(STEP_CLASSES)}, joined by +"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"scope {text!r} names a class twice: name each once")
    return frozenset(names)
