"""How an arm's completions are read: where the thought ends and the answer begins, from what run.json says of its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moe_steer.thinking import FORMATS, ThinkingFormat, Thought, TokenTags, opening_shown, read_from_text
from reasoning_evals.thinking import TokenCounts, count_tokens


class ArmThoughts(NamedTuple):
    """The thinking format of an arm's model."""

    fmt: ThinkingFormat | None
    """None where the sampler did not say: then each text is read by the tags that it shows."""
    tags: TokenTags | None
    """Its tags as token ids; None where there are none, or the sampler did not say."""
    opened: bool | None
    """Whether every prompt of the arm opens a thought; None: the end of each prompt decides."""

    def split(self, text: str | None, prompt: str) -> Thought:
        """Thought and answer of one completion.

        A model that is said not to think, and writes a known opening tag first, is read by that tag: a truncated thought must
        not be graded because nothing in the template spoke of it.
        """
        fmt = self._of(text, prompt)
        return fmt.split(text, opened=self.opens(prompt))

    def opens(self, prompt: str) -> bool:
        """Whether completions of a prompt start inside the thought."""
        if self.opened is not None:
            return self.opened
        return (self.fmt or FORMATS["think"]).opens(prompt)

    def count_tokens(self, token_ids: Sequence[int], prompt: str, text: str, stopped: bool) -> TokenCounts | None:
        """Tokens of thought and answer; None where the tags' ids are not known."""
        if self.tags is not None:
            return count_tokens(token_ids, self.opens(prompt), self.tags, stopped)
        if self.fmt is not None and not self.fmt.thinks and self._of(text, prompt) is self.fmt:
            return TokenCounts(0, len(token_ids) - stopped, len(token_ids))
        return None

    def _of(self, text: str | None, prompt: str) -> ThinkingFormat:
        if self.fmt is None:
            return read_from_text(text, self.opens(prompt))
        return self.fmt if self.fmt.thinks else opening_shown(text) or self.fmt


def arm_thoughts(arm: Mapping[str, Any]) -> ArmThoughts:
    """Of an arm's entry in run.json."""
    sampler = arm.get("sampler", {})
    said = arm.get("details", {}).get("prompt_opens_thought")
    fmt = ThinkingFormat.from_dict(sampler["thinking"]) if sampler.get("thinking") else None
    tags = sampler.get("thinking_tokens")
    if tags is None and sampler.get("tag_ids"):  # folders of versions that knew <think> alone
        return ArmThoughts(fmt, TokenTags.of_pair(*sampler["tag_ids"]), None if said is None else bool(said))
    return ArmThoughts(fmt, TokenTags.from_dict(tags) if tags else None, None if said is None else bool(said))
