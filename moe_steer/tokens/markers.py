"""Reasoning markers as token ids of one tokenizer: `<think>`, `</think>`, "Alternatively", any word.

RICE (arXiv 2505.14681) does not define which token's routing belongs to a marker, so every choice is a field of
`MarkerSet`. The token forms of a word are found by tokenizing it in several contexts.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from moe_steer.thinking import forms_of, text_spans, thinking_format, token_tags, token_texts
from moe_steer.tokens.steps import WordEdges, inside_a_word, word_edges

_BEFORE = ("", " ", "\n", "\n\n", "(", ". ")
_AFTER = ("", ",", " ", "\n")
_TAG = re.compile(r"<[^<>\s]+>")
_PADDING = string.whitespace + string.punctuation

RICE_COEFFICIENTS: Mapping[str, float] = {"<think>": 1.0, "</think>": -1.0, "Alternatively": -1.0}
"""RICE Eq. 6: the start of a thought counts for an expert, its end and a switch count against it."""
POSITIONS = ("input", "predicted")
TOKENS = ("last", "first")
REPEATS = ("all", "first")


def find_forms(tokenizer: Any, name: str, *, either_case: bool, split_tags: bool) -> tuple[tuple[int, ...], ...]:
    """All distinct token sequences that spell ``name``: at the start of a text, after a space, after a newline, before a comma.

    `<think>` and `</think>` stand for the start and the end of a thought in every thinking format: where the model writes
    other tags, those are meant. A tag must be a single token unless ``split_tags``, or unless it is the model's own. ValueError
    when the tokenizer cannot express it.
    """
    if not name.strip():
        raise ValueError(f"marker {name!r} is empty: give a tag or a word")
    if (own := _own_tags(tokenizer, name)) is not None:
        return own
    if _TAG.fullmatch(name):
        several = split_tags or _thinks_in_it(tokenizer, name)
        return forms_of(tokenizer, name) if several else (_tag_form(tokenizer, name),)
    found: set[tuple[int, ...]] = set()
    for word in _spellings(name, either_case):
        for text in (before + word + after for before in _BEFORE for after in _AFTER):
            form = _window(tokenizer, tokenizer.encode(text, add_special_tokens=False), word)
            if form is not None:
                found.add(form)
    unknown = tokenizer.unk_token_id
    found = {form for form in found if unknown is None or unknown not in form}
    if not found:
        raise ValueError(
            f"marker {name!r} cannot be written with this tokenizer: choose a marker whose text it can encode and decode"
        )
    return tuple(found)


def _own_tags(tokenizer: Any, name: str) -> tuple[tuple[int, ...], ...] | None:
    """The forms of the model's own tags, where a general name is given for them."""
    fmt = thinking_format(tokenizer) if name in ("<think>", "</think>") else None
    if fmt is None or fmt.name == "think" or not fmt.thinks:
        return None
    tags = token_tags(tokenizer, fmt)
    assert tags is not None
    return tags.opening if name == "<think>" else tags.closing


def _thinks_in_it(tokenizer: Any, name: str) -> bool:
    """Whether a tag is the model's own, so that it may be several tokens, as in Hunyuan-A13B and Llama-Nemotron."""
    return name in ("<think>", "</think>") and thinking_format(tokenizer).name == "think"


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 over the vocabulary: two tokenizers with the same digest give a token id the same text."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def text_notes(tokenizer: Any) -> dict[str, Any]:
    """For the header of a direction: sha256 of the vocabulary and of the chat template with which its texts were tokenized."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    return {
        "tokenizer_sha256": tokenizer_digest(tokenizer),
        "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
    }


def _tag_form(tokenizer: Any, name: str) -> tuple[int, ...]:
    token_id = tokenizer.get_vocab().get(name)
    if token_id is None or token_id == tokenizer.unk_token_id:
        pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode(name, add_special_tokens=False))
        raise ValueError(
            f"marker {name!r} is not a token of this tokenizer (it splits into {pieces}): name the tag that this model thinks with, "
            "or other markers (from Python: split_tags=True allows a tag of several tokens)"
        )
    return (int(token_id),)


def _spellings(name: str, either_case: bool) -> Iterator[str]:
    yield name
    for first in {name[0].lower(), name[0].upper()} - {name[0]}:
        if either_case and len(first) == 1:
            yield first + name[1:]


def _window(tokenizer: Any, ids: list[int], word: str) -> tuple[int, ...] | None:
    """The shortest run of tokens whose text is the word, ignoring white space and punctuation at its ends."""
    for length in range(1, len(ids) + 1):
        for start in range(len(ids) - length + 1):
            part = ids[start : start + length]
            text = tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if word in (text, text.strip(), text.strip(_PADDING)):
                return tuple(part)
    return None


class Span(NamedTuple):
    """One occurrence of a marker: tokens start .. stop - 1."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Marker:
    """A marker and its token forms. Forms are sorted longest first, so that a longer form is not matched as a shorter one."""

    name: str
    forms: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        forms = {tuple(int(token) for token in form) for form in self.forms}
        if not self.name or not forms or () in forms:
            raise ValueError(
                f"marker {self.name!r} has the forms {sorted(forms)!r}: give a name and non-empty token ids"
            )
        if any(token < 0 for form in forms for token in form):
            raise ValueError(f"marker {self.name!r} has a negative token id in {sorted(forms)!r}: give ids >= 0")
        object.__setattr__(self, "forms", tuple(sorted(forms, key=lambda form: (-len(form), form))))


@dataclass(frozen=True, kw_only=True, slots=True)
class MarkerSet:
    """Ordered markers, their coefficients, and the token at which the routing of an occurrence is read."""

    markers: tuple[Marker, ...]
    coefficients: tuple[float, ...] = ()
    """c_x of RICE Eq. 6, one per marker. Default: `RICE_COEFFICIENTS`, and 0 for every other name (measured, but not in the
    combined score)."""
    position: str = "input"
    """"input": the routing while the marker's token is the input. "predicted": the position before it, where the model
    predicts it."""
    token: str = ""
    """"last" or "first" token of an occurrence of several tokens. Default: "last" for "input", "first" for "predicted"."""
    repeats: str = "all"
    """"all" occurrences count, or only the "first" of each trace."""
    tokenizer: str = ""
    """Fingerprint of the tokenizer of the ids."""
    edges: WordEdges | None = field(default=None, compare=False, repr=False)
    """The whole-word rule; None: occurrences inside words count too."""
    texts: tuple[str, ...] | None = field(default=None, compare=False, repr=False)
    """The text of every token, where a tag is written in several: such a tag is found in the text, because its ends merge
    with their neighbours. None: every tag is one token."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "markers", tuple(self.markers))
        if not self.markers:
            raise ValueError("a marker set needs at least one marker: give names such as '<think>'")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"the marker names {list(self.names)} are not distinct: give each marker once")
        if not self.coefficients:
            object.__setattr__(self, "coefficients", tuple(RICE_COEFFICIENTS.get(name, 0.0) for name in self.names))
        object.__setattr__(self, "coefficients", tuple(float(value) for value in self.coefficients))
        if len(self.coefficients) != len(self.markers) or not all(map(math.isfinite, self.coefficients)):
            raise ValueError(
                f"coefficients are {list(self.coefficients)}: give one finite number for each of {list(self.names)}"
            )
        _one_of("position", self.position, POSITIONS)
        object.__setattr__(self, "token", self.token or ("last" if self.position == "input" else "first"))
        _one_of("token", self.token, TOKENS)
        _one_of("repeats", self.repeats, REPEATS)

    @property
    def names(self) -> tuple[str, ...]:
        """The markers' names, in order."""
        return tuple(marker.name for marker in self.markers)

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: Any,
        names: Sequence[str] = tuple(RICE_COEFFICIENTS),
        coefficients: Mapping[str, float] | None = None,
        *,
        either_case: bool = True,
        whole_words: bool = True,
        split_tags: bool = False,
        position: str = "input",
        token: str = "",
        repeats: str = "all",
    ) -> MarkerSet:
        """Find all token forms of the named markers under a transformers tokenizer.

        ``coefficients``: name -> c_x; other names have +1 for `<think>`, -1 for `</think>` and "Alternatively", and 0
        otherwise. ``either_case``: the first letter of a word may be upper or lower case. ``whole_words``: "Wait" is not
        found in "Waiting". ``split_tags``: a tag such as `<think>` may be several tokens; otherwise it must be a token of
        its own. ValueError names a marker that the tokenizer cannot express.
        """

        given = dict(coefficients or {})
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ValueError(f"a coefficient is given for {unknown[0]!r}, which is not among the markers {list(names)}")
        chosen = {**RICE_COEFFICIENTS, **given}
        markers = tuple(
            Marker(name, find_forms(tokenizer, name, either_case=either_case, split_tags=split_tags)) for name in names
        )
        split = [marker.name for marker in markers if _TAG.fullmatch(marker.name) and len(marker.forms[-1]) > 1]
        return cls(
            markers=markers,
            coefficients=tuple(chosen.get(name, 0.0) for name in names),
            position=position,
            token=token,
            repeats=repeats,
            tokenizer=tokenizer_digest(tokenizer),
            edges=word_edges(tokenizer) if whole_words else None,
            texts=token_texts(tokenizer)
            if split and (split_tags or all(_thinks_in_it(tokenizer, name) for name in split))
            else None,
        )

    def find_occurrences(self, token_ids: Sequence[int]) -> dict[str, list[Span]]:
        """Occurrences of every marker, in order: non-overlapping, the longest form first, linear in the number of tokens."""
        ids_T = np.asarray(token_ids, dtype=np.int64)
        found = {}
        for marker in self.markers:
            if self.texts is not None and _TAG.fullmatch(marker.name):
                known = len(self.texts)  # models have rows beyond the vocabulary, and may write them
                spans = text_spans([self.texts[token] if token < known else "" for token in ids_T], marker.name)
                found[marker.name] = [Span(*span) for span in spans]
            else:
                found[marker.name] = find_spans(ids_T, marker.forms, self.edges)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything that must be equal for two counts to be added, as plain JSON values."""
        return {
            "names": list(self.names),
            "forms": [[list(form) for form in marker.forms] for marker in self.markers],
            "coefficients": list(self.coefficients),
            "position": self.position,
            "token": self.token,
            "repeats": self.repeats,
            "whole_words": self.edges is not None,
            "tokenizer": self.tokenizer,
        }


def find_spans(
    ids_T: np.ndarray[Any, Any], forms: Sequence[tuple[int, ...]], edges: WordEdges | None = None
) -> list[Span]:
    """Occurrences of one marker's forms (longest first) from left to right; occurrences do not overlap.

    >>> find_spans(np.array([7, 1, 2, 1]), [(1, 2), (1,)])
    [Span(start=1, stop=3), Span(start=3, stop=4)]
    """
    candidates = np.flatnonzero(np.isin(ids_T, sorted({form[0] for form in forms})))
    found: list[Span] = []
    free = 0
    for start in candidates.tolist():
        if start < free:
            continue
        for form in forms:
            stop = start + len(form)
            if tuple(ids_T[start:stop].tolist()) == form and not inside_a_word(ids_T, start, stop, edges):
                found.append(Span(start, stop))
                free = stop
                break
    return found


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(allowed)}")
