"""Which tokens are prompt, thought, answer or step end: tracked through prefill, cached decoding, left padding and dropped
rows.

Definitions, one row at a time, padding never counted:
- all        every real token
- prompt     the first ``prompt_lengths[b]`` tokens, or, when no lengths are given, the tokens of the forward that fills an
  empty cache
- generated  every real token that is not prompt
- after:N    every generated token that has at least N generated tokens before it; after:0 is generated
- thought    from the tag that opens a thought (its last token included) to the token before the last one of the tag that
  closes it; a tag in the prompt opens it too. Which tags: ``moe_steer.thinking``
- answer     from the tag that begins the answer (its last token included) on: it is the token whose processing starts the
  answer
- step_end   the tokens of a thought that end a step (of a model that does not think: the generated tokens that do); chosen by
  classes (``step_end`` alone: sentence+line)
  - sentence   tokens whose text ends in . ! ? or their full-width forms, closers and white space may follow; not decimal points,
    abbreviations, list numbers. Where the next token decides, it is that token (``moe_steer.tokens.steps``)
  - stop       tokens whose text ends in . ! ? or their full-width forms, decimal points and all: for texts without decimals, where
    no stop need wait for the next token
  - line       tokens whose text ends in a line break; blanks may follow
  - paragraph  tokens whose text ends in a blank line, and white space with a line break right after a token that ended a line
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_steer.inside import cache_of, columns_of
from moe_steer.thinking import THOUGHT
from moe_steer.tokens.cache_rows import (
    Follower,
    RowName,
    Rows,
    Tokens,
    leave_rows,
    real_tokens,
    rows_on,
)
from moe_steer.tokens.ragged import in_scope, started_phases
from moe_steer.tokens.scopes import (
    SpecialTokens,
    parse_scope,
    remember_tokenizer,
    special_tokens,
    tokenizer_of,
)
from moe_steer.tokens.steps import sentence_ends

__all__ = [
    "PROMPT_SCOPES",
    "TAG_SCOPES",
    "PositionTracker",
    "SpecialTokens",
    "remember_tokenizer",
    "special_tokens",
    "tag_scopes",
    "tokenizer_of",
]
TAG_SCOPES = frozenset({"thought", "answer", "step_end"})
"""Kinds of scope that need token ids and the thinking tags."""
PROMPT_SCOPES = frozenset({"prompt", "generated", "after"})
"""Kinds of scope that need the end of the prompt."""


def tag_scopes(scopes: Collection[str]) -> list[str]:
    """The scopes that need the tags of a tokenizer, sorted."""
    return sorted(text for text in scopes if parse_scope(text).kind in TAG_SCOPES)


class PositionTracker:
    """Gives ``mask(scope)`` for the current forward. ``hooks.call_hooks`` on the decoder calls it."""

    def __init__(
        self,
        scopes: Collection[str],
        special: SpecialTokens | None,
        prompt_lengths: Sequence[int] | None = None,
        cache_by_default: bool = True,
        follower: Follower | None = None,
    ) -> None:
        self._scopes = {text: parse_scope(text) for text in scopes}
        kinds = {scope.kind for scope in self._scopes.values()}
        self._follows_tags = bool(kinds & TAG_SCOPES)
        self._needs_prompt = bool(kinds & PROMPT_SCOPES) or follower is not None
        self._special = special
        if special is not None:
            self._needs_prompt = self._needs_prompt or (special.tags is None and "step_end" in kinds)
            for text, scope in self._scopes.items():
                if scope.kind in ("thought", "answer") and special.tags is None:
                    raise ValueError(
                        f"scope {text!r}: this model does not think, so no token is of a thought: use scope generated, "
                        "or name its tags with --thinking"
                    )
                if scope.classes and not special.can_end(scope.classes):
                    raise ValueError(
                        f"scope {text!r}: no token of this tokenizer ends a {' or '.join(sorted(scope.classes))}, use another class or scope"
                    )
        self._counts_on = self._follows_tags or follower is not None or "after" in kinds
        self._prompt_lengths = prompt_lengths
        self._cache_by_default = cache_by_default
        self._follower = follower
        self._classes_V: Tensor | None = None
        self._masks: dict[str, Tensor | None] | None = None
        self._next: dict[str, Any] | None = None
        """What ``Rows`` will say behind the forward that runs."""

    @property
    def finds_prompts(self) -> bool:
        """Whether it takes the forward that fills an empty cache for the whole prompt."""
        return self._needs_prompt and self._prompt_lengths is None

    def before(self, call: dict[str, Any]) -> None:
        """Compute the masks of the tokens that enter the decoder now."""
        self._next = None  # left by a forward that ended in an error
        ids_BS = call.get("input_ids")
        ids: Tensor = ids_BS if ids_BS is not None else call["inputs_embeds"][..., 0]
        num_rows, length = ids.shape
        known, real_BS = real_tokens(call, ids)
        # On a GPU the test for padding would wait for the device.
        if real_BS is not None and real_BS.device.type == "cpu" and bool(real_BS.all()):
            real_BS = None
        self._masks = {"all": None if real_BS is None else real_BS.reshape(-1)}
        if not self._follows_tags and not self._needs_prompt:
            return
        if not known:
            raise ValueError(
                "a plan with a scope needs an attention mask that says which tokens are padding, [batch, tokens] or [batch, 1, tokens, "
                "columns of the cache] (or none): pass that (continuous batching makes another: leave it out), or use scope all"
            )
        if _holds_several_texts(call, ids):
            raise ValueError(
                "a plan with a scope cannot follow texts that are packed into one row (position_ids that start again, cu_seq_lens_q): give each text a row of its own, or use scope all"
            )
        rows = self._rows_of(call, num_rows, real_BS, ids)
        has_prompt = length > 1 or rows.forwards == 0 or self._prompt_lengths is not None
        tokens = Tokens((num_rows, length), ids_BS, real_BS, rows, self.mask, has_prompt)
        phase_BS = tail_BN = None
        ends = None
        if self._follows_tags:
            ids_BS = self._ids(ids_BS)
            # Columns: the state before this forward, then the state after each of its tokens.
            started_BS, tail_BN = self._started(rows.tail_BN, ids_BS, tokens.real_BS)
            phase_BS = carried(rows.phase_B, started_BS - 1, tokens.real_BS & (started_BS > 0))
            ends = sentence_ends(rows.bits_B, self._bits(ids_BS), tokens.real_BS, carried)
        for text, scope in self._scopes.items():
            if scope.kind != "all":
                number_BS = tokens.number_BS
                mask_BS = in_scope(scope, number_BS, self._thought(phase_BS, number_BS), phase_BS, ends)
                self._masks[text] = (mask_BS if real_BS is None else real_BS & mask_BS).reshape(-1)
        self._next = {
            "seen_B": tokens.seen_B(),
            "prompt_B": rows.prompt_B,
            "phase_B": rows.phase_B if phase_BS is None else phase_BS[:, -1],
            "bits_B": rows.bits_B if ends is None else ends.bits_BT[:, -1],
            "tail_BN": rows.tail_BN if tail_BN is None else tail_BN,
            "forwards": rows.forwards + 1,
            "follows_tags": self._follows_tags,
            "names": rows.names,
            "columns": columns_of(call) + length,
        }
        if self._follower is not None:
            self._follower.begin(tokens, rows)

    def after(self, call: dict[str, Any], output: Any) -> None:
        """Store the rows' state on the cache for the next forward."""
        known, self._next, self._masks = self._next, None, None
        if known is None:
            return
        gates = {} if self._follower is None else self._follower.end()
        cache = cache_of(call, output)
        if cache is not None:
            leave_rows(cache, Rows(**known, gates=gates))

    def mask(self, scope: str) -> Tensor | None:
        """bool [T], T = B*S row by row: which tokens are real and in scope. None means every token."""
        if self._masks is None:
            if scope == "all":
                return None
            raise RuntimeError(
                f"scope {scope!r} needs the whole model to run, and a layer was called on its own, as gradient checkpointing does in the "
                "backward pass: switch that off, or use scope all"
            )
        return self._masks[scope]

    def _rows_of(self, call: dict[str, Any], num_rows: int, real_BS: Tensor | None, ids_BS: Tensor) -> Rows:
        cache, past = cache_of(call), columns_of(call)
        device = ids_BS.device
        if past:
            rows = rows_on(cache)
            if rows is None or (self._follows_tags and not rows.follows_tags):
                raise ValueError(
                    "the cache was filled before steer() was entered: run the prompt inside the with-block"
                )
            if past > rows.columns and self._counts_on:
                raise ValueError(
                    "the cache was filled outside of steer() since the last steered forward, so a scope or gate that counts tokens has lost its place: run all forwards of a text inside a with-block, or use scope all or generated"
                )
            if len(rows.seen_B) != num_rows:
                raise ValueError(f"the cache has {len(rows.seen_B)} rows and the input {num_rows}: feed the same rows")
            return rows
        if self._prompt_lengths is not None:
            if len(self._prompt_lengths) != num_rows:
                raise ValueError(
                    f"{len(self._prompt_lengths)} prompt_lengths for {num_rows} rows: give one length a row"
                )
            prompt_B = torch.tensor(list(self._prompt_lengths), device=device)
        else:
            uses_cache = call.get("use_cache")
            uses_cache = self._cache_by_default if uses_cache is None else uses_cache
            if cache is None and not uses_cache and self._needs_prompt:
                raise ValueError(
                    "scope prompt, generated or after:N without a cache cannot tell where the prompt ends: pass prompt_lengths"
                )
            prompt_B = (torch.ones_like(ids_BS, dtype=torch.bool) if real_BS is None else real_BS).sum(1)
        zeros_B = torch.zeros(num_rows, dtype=torch.long, device=device)
        longest = 1 if self._special is None or self._special.tags is None else len(self._special.tags.forms[0][0])
        tail_BN = torch.full((num_rows, longest - 1), -1, dtype=torch.long, device=device)
        names = () if self._follower is None else tuple(RowName() for _ in range(num_rows))
        return Rows(seen_B=zeros_B, prompt_B=prompt_B, phase_B=zeros_B, bits_B=zeros_B, tail_BN=tail_BN, names=names)

    def _ids(self, ids_BS: Tensor | None) -> Tensor:
        if ids_BS is None or self._special is None:
            raise ValueError(
                "scope thought, answer or step_end needs token ids: call the model with input_ids, not embeddings"
            )
        return ids_BS

    def _started(self, tail_BN: Tensor, ids_BS: Tensor, real_BS: Tensor) -> tuple[Tensor, Tensor]:
        """1 + the phase that starts with a token, the last one of a tag; 0 where it starts none. And the rows' last N tokens.

        ``tail_BN``: the N tokens before these, so that a tag of N + 1 tokens is seen over the border of two forwards. Padding
        on the left stands between the two only in a prefill, whose tail is empty.
        """
        if self._special is None or self._special.tags is None:
            return torch.zeros_like(ids_BS), tail_BN
        longest, length = tail_BN.shape[1], ids_BS.shape[1]
        window_BT = torch.cat([tail_BN, ids_BS.where(real_BS, -1)], 1)

        def back(places: int) -> Tensor:
            return window_BT[:, longest - places : longest - places + length]

        return started_phases(self._special.tags, back), window_BT[:, window_BT.shape[1] - longest :]

    def _thought(self, phase_BS: Tensor | None, number_BS: Tensor) -> Tensor | None:
        """Which tokens belong to a thought, or, of a model that does not think, to the response."""
        if phase_BS is None:
            return None
        if self._special is not None and self._special.tags is None:
            return number_BS >= 0
        return phase_BS[:, 1:] == THOUGHT

    def _bits(self, ids_BS: Tensor) -> Tensor:
        """Each token's class; ids beyond the tokenizer (a padded vocabulary) have none."""
        assert self._special is not None
        if self._classes_V is None or self._classes_V.device != ids_BS.device:
            self._classes_V = torch.tensor([*self._special.classes, 0], device=ids_BS.device)
        return self._classes_V[ids_BS.clamp(max=len(self._classes_V) - 1)]


def scoped_positions(scope: str, tokenizer: Any, token_ids: Sequence[int], prompt_length: int) -> list[int]:
    """The tokens of one whole text that are in a scope; none where the model has no such tokens at all."""
    try:
        tracker = PositionTracker([scope], special_tokens(tokenizer), [prompt_length])
    except ValueError:  # a model that does not think has no thought
        return []
    tracker.before({"input_ids": torch.tensor([list(token_ids)]), "use_cache": False})
    mask_T = tracker.mask(scope)
    return list(range(len(token_ids))) if mask_T is None else mask_T.nonzero()[:, 0].tolist()


def carried(before_B: Tensor, value_BS: Tensor, counts_BS: Tensor) -> Tensor:
    """[B, 1 + S]: ``before_B``, then at each token the value of the latest real token so far."""
    value_BS = value_BS.to(before_B.dtype)
    if value_BS.shape[1] == 1:
        return torch.cat([before_B[:, None], torch.where(counts_BS, value_BS, before_B[:, None])], 1)
    columns = torch.cat([before_B[:, None], value_BS], 1)
    numbers_S = torch.arange(1, value_BS.shape[1] + 1, device=value_BS.device)
    place_BS = torch.where(counts_BS, numbers_S, 0).cummax(1).values
    return torch.cat([columns[:, :1], columns.gather(1, place_BS)], 1)


def _holds_several_texts(call: Mapping[str, Any], ids: Tensor) -> bool:
    """Whether attention may keep parts of a row apart, by what the library reads that off; it batches continuously in this way too."""
    if call.get("cu_seq_lens_q") is not None:
        return True
    places = call.get("position_ids")
    if call.get("attention_mask") is not None or not isinstance(places, Tensor) or places.ndim != 2:
        return False
    return ids.shape[1] > 1 and bool((places.diff(dim=1) != 1).any())
