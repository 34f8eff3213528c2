"""Scopes: the tokens at which a plan acts; and the tokens of a tokenizer on which scopes depend (thinking tags, ends of
sentences, lines and paragraphs).

A scope is written as a kind, for two kinds with a parameter after a colon:

``all | prompt | thought | answer | generated | step_end``, ``step_end:sentence``, ``step_end:line``,
``step_end:paragraph``, several classes joined by ``+`` (``step_end:sentence+paragraph``), and ``after:N``. ``step_end``
alone is ``step_end:sentence+line``; ``moe_steer.tokens.positions`` defines each of them.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_steer.json_files import quoted
from moe_steer.thinking import TokenTags, token_tags
from moe_steer.tokens.steps import ANY_STOP, LINE, SENTENCE, STOP, token_class

SCOPES = ("all", "prompt", "thought", "answer", "generated", "step_end")
"""The kinds without a parameter."""
STEP_CLASSES = ("sentence", "line", "paragraph", "stop")
SCOPE_FORMS = "all, prompt, thought, answer, generated, step_end, step_end:CLASS with sentence, line, paragraph or stop (joined by +), after:N"
"""All forms, for help texts and error messages."""
_ENDED_BY = {"sentence": SENTENCE | STOP, "stop": ANY_STOP}
_PLAIN_STEP_END = frozenset({"sentence", "line"})

_TOKENIZERS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_CLASSES: weakref.WeakKeyDictionary[Any, tuple[int, ...]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True, slots=True)
class Scope:
    """A parsed scope: its kind and its parameter."""

    kind: str
    classes: frozenset[str] = frozenset()
    """For ``step_end``: the classes of tokens that end a step."""
    skip: int = 0
    """For ``after``: number of generated tokens before steering starts."""


def parse_scope(text: object) -> Scope:
    """Read a scope; ValueError in one line for anything else.

    >>> parse_scope("after:64").skip
    64
    >>> sorted(parse_scope("step_end").classes)
    ['line', 'sentence']
    """
    if not isinstance(text, str):
        raise ValueError(f"scope {quoted(text)} is {type(text).__name__}: give one of {SCOPE_FORMS}")
    kind, colon, parameter = text.partition(":")
    if kind == "after":
        if not re.fullmatch("0|[1-9][0-9]*", parameter):
            raise ValueError(
                f"scope {quoted(text)} does not say after how many generated tokens: write after:N, for example after:64"
            )
        return Scope(kind=kind, skip=int(parameter))
    if kind not in SCOPES:
        raise ValueError(f"scope {quoted(text)} is unknown: choose one of {SCOPE_FORMS}")
    if kind == "step_end":
        return Scope(kind=kind, classes=_classes(text, parameter) if colon else _PLAIN_STEP_END)
    if colon:
        raise ValueError(
            f"scope {quoted(text)}: {kind} takes no parameter, write {kind!r}; only step_end and after take one"
        )
    return Scope(kind=kind)


def _classes(text: str, parameter: str) -> frozenset[str]:
    names = parameter.split("+")
    unknown = [name for name in names if name not in STEP_CLASSES]
    if unknown:
        raise ValueError(
            f"scope {quoted(text)} names the class {quoted(unknown[0])}: step_end takes {', '.join(STEP_CLASSES)}, joined by +"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"scope {quoted(text)} names a class twice: name each once")
    return frozenset(names)


@dataclass(frozen=True)
class SpecialTokens:
    """The token ids on which scopes depend; ``classes[id]`` has the bits of a token."""

    tags: TokenTags | None
    """Around thoughts; None for a model that does not think."""
    classes: tuple[int, ...]

    def can_end(self, classes: Sequence[str] | frozenset[str]) -> bool:
        """Whether any token of this tokenizer can end a step of these classes."""
        bits = 0
        for one in self.classes:
            bits |= one
        # A paragraph may also end by two line ends in a row.
        return any(bits & _ENDED_BY.get(name, LINE) for name in classes)


def special_tokens(tokenizer: Any) -> SpecialTokens:
    """Read the ids of the thinking tags and the class of every token."""
    if tokenizer not in _CLASSES:  # a second for a large vocabulary, and every steered chunk of a run asks
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], skip_special_tokens=True)
        _CLASSES[tokenizer] = tuple(map(token_class, texts))
    return SpecialTokens(tags=token_tags(tokenizer), classes=_CLASSES[tokenizer])


def remember_tokenizer(model: Any, tokenizer: Any) -> None:
    """Let ``steer`` find the tokenizer of a model that ``load_model`` loaded."""
    _TOKENIZERS[model] = tokenizer


def tokenizer_of(model: Any) -> Any:
    """The remembered tokenizer, or None."""
    return _TOKENIZERS.get(model)
