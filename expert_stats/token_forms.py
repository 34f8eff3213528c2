"""The token forms of a word under one tokenizer, found by writing the word in context and reading the tokens back."""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Iterator
from typing import Any

from expert_stats.markers import WordEdges

_BEFORE = ("", " ", "\n", "\n\n", "(", ". ")
_AFTER = ("", ",", " ", "\n")
_TAG = re.compile(r"<[^<>\s]+>")
_LETTERS = frozenset(string.ascii_letters)
_PADDING = string.whitespace + string.punctuation
_SPACES = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "\n", "ĉ": "\t"})  # how vocabularies write white space


def find_forms(tokenizer: Any, name: str, *, either_case: bool, split_tags: bool) -> tuple[tuple[int, ...], ...]:
    """All distinct token sequences that spell ``name``: at the start of a text, after a space, after a newline, before a comma.

    A tag such as `<think>` must be one token of its own unless ``split_tags``. ValueError when the tokenizer cannot express it.
    """
    if not name.strip():
        raise ValueError(f"marker {name!r} is empty: give a tag or a word")
    if _TAG.fullmatch(name) and not split_tags:
        return (_tag_form(tokenizer, name),)
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


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 over the vocabulary: two tokenizers with the same digest give a token id the same text."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def text_notes(tokenizer: Any) -> dict[str, Any]:
    """What a direction's header says of how its texts became tokens: sha256 of the vocabulary and of the chat template."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    return {
        "tokenizer_sha256": tokenizer_digest(tokenizer),
        "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
    }


def word_edges(tokenizer: Any) -> WordEdges | None:
    """Which tokens continue a word; None for a tokenizer whose tokens are always whole words."""
    texts = {token_id: token.translate(_SPACES) for token, token_id in tokenizer.get_vocab().items() if token}
    words = sorted((token_id, text) for token_id, text in texts.items() if set(text) <= _LETTERS)
    if words and not _joins(tokenizer, *words[0]):
        # Tokens are separated on decoding (WordPiece, word-level): only the marked continuations join a word.
        starts = {token_id for token_id, text in texts.items() if text[:2] == "##" and text[2:3] in _LETTERS}
    else:
        starts = {token_id for token_id, text in texts.items() if text[0] in _LETTERS}
    ends = {token_id for token_id, text in texts.items() if text[-1] in _LETTERS}
    return WordEdges(starts_with_letter=frozenset(starts), ends_with_letter=frozenset(ends)) if starts else None


def _tag_form(tokenizer: Any, name: str) -> tuple[int, ...]:
    token_id = tokenizer.get_vocab().get(name)
    if token_id is None or token_id == tokenizer.unk_token_id:
        pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode(name, add_special_tokens=False))
        raise ValueError(
            f"marker {name!r} is not a token of this tokenizer (it splits into {pieces}): name the tag that this model thinks with, "
            "or allow a tag of several tokens with split_tags=True"
        )
    return (int(token_id),)


def _spellings(name: str, either_case: bool) -> Iterator[str]:
    yield name
    for first in {name[0].lower(), name[0].upper()} - {name[0]}:
        if either_case and len(first) == 1:
            yield first + name[1:]


def _window(tokenizer: Any, ids: list[int], word: str) -> tuple[int, ...] | None:
    """The shortest run of tokens whose text is the word, give or take white space and punctuation at its ends."""
    for length in range(1, len(ids) + 1):
        for start in range(len(ids) - length + 1):
            part = ids[start : start + length]
            text = tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if word in (text, text.strip(), text.strip(_PADDING)):
                return tuple(part)
    return None


def _joins(tokenizer: Any, token_id: int, text: str) -> bool:
    pair = tokenizer.decode([token_id, token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text + text in pair
