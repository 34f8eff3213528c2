"""Chat endpoints (/v1/chat/completions): messages in, thought and answer out, written as one text that grading reads as any other."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_steer.json_files import quoted
from moe_steer.thinking import FORMATS, OUTSIDE, ThinkingFormat
from reasoning_evals.engines.http_reply import EndpointError, Reply, whole_text
from reasoning_evals.prompts import RenderedPrompt

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Where servers put a thought that they have separated from the answer; those that send several send it several times."""
_PARTS = {"thinking": 0, "reasoning": 0, "text": 1, "output_text": 1, "summary_text": 1}
"""Kinds of parts of a content: 0 of the thought, 1 of the answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """How a chat endpoint is asked, and how what it sends becomes a text.

    The server renders the prompt by its own template. ValueError for a format in which an answer alone says nothing of itself.
    """

    fmt: ThinkingFormat = FORMATS["think"]
    """How thoughts are written into the text; also the format in which the model writes them where the server leaves them in."""
    system: str | None = None
    """A message before every question."""
    effort: str | None = None
    """Sent as reasoning_effort."""
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Sent as chat_template_kwargs, which vLLM and SGLang know."""

    def __post_init__(self) -> None:
        if self.fmt.starts == OUTSIDE:
            raise ValueError(
                f"the thinking format {self.fmt.name} is not for chat endpoints, which take thought and answer apart themselves: "
                "leave it out"
            )

    def render(self, question: str) -> RenderedPrompt:
        """The messages of a question as JSON; no token ids, since the server makes them."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return RenderedPrompt(json.dumps([*system, {"role": "user", "content": question}], ensure_ascii=False), ())

    def fields(self, prompt: str, extensions: bool) -> dict[str, Any]:
        """What a request says in place of a prompt; ValueError for a prompt that ``render`` did not make."""
        try:
            messages = json.loads(prompt)
        except ValueError:
            messages = None
        if not isinstance(messages, list):
            raise ValueError(
                f"the prompt is {quoted(prompt)}: a chat endpoint takes messages, as Chat.render makes them"
            )
        if self.template_arguments and not extensions:
            raise ValueError("template arguments are a field that plain OpenAI endpoints do not know: leave them out")
        return {
            "messages": messages,
            "stream_options": {"include_usage": True},
            **({"reasoning_effort": self.effort} if self.effort is not None else {}),
            **({"chat_template_kwargs": dict(self.template_arguments)} if self.template_arguments else {}),
        }

    def write(self, thought: str, answer: str) -> str:
        """Thought and answer as the format writes them, so that its ``split`` gives them back. A thought without an answer
        stays open: nobody knows that it had ended.

        Tags that either of them speaks of get a blank (``< /think>``), for they would be taken for the real ones.
        """
        if not thought.strip():
            return answer
        if not self.fmt.thinks:
            raise EndpointError(
                f"it sends a thought, and the thinking format is {self.fmt.name}: name another, or none"
            )
        thought, answer = self._disarmed(thought), self._disarmed(answer)
        return self.fmt.write(thought, answer) if answer.strip() else f"{self.fmt.open}{thought}"

    def to_dict(self) -> dict[str, Any]:
        """For run.json; the messages are in the prompts."""
        return {"effort": self.effort, "template_arguments": dict(self.template_arguments)}

    def _disarmed(self, text: str) -> str:
        for item in self.fmt.switches:
            pattern = item.pattern or re.escape(item.text.strip())
            text = re.sub(pattern, lambda found: f"{found[0][:1]} {found[0][1:]}", text)
        return text


@dataclass(slots=True)
class ChatReply(Reply):
    """A message that is arriving."""

    chat: Chat = field(default_factory=Chat)
    _thoughts: list[str] = field(default_factory=list)

    def finish(self) -> str:
        """As of a completion; the text is that of thought and answer."""
        reason = Reply.finish(self)
        self.text = self.chat.write(whole_text(self._thoughts), self.text)
        return reason

    @property
    def _began(self) -> bool:
        return bool(self._pieces or self._thoughts)

    def _take_text(self, choice: Mapping[str, Any]) -> bool:
        message = choice.get("delta") if choice.get("delta") is not None else choice.get("message")
        if message is None and choice.get("text") is None:
            message = {}
        if not isinstance(message, dict):
            raise EndpointError(
                f"it answers a choice without a message ({self._quoted(dict(choice))}): give the address of "
                "/v1/chat/completions, or ask it for completions (without --chat-endpoint)"
            )
        if choice.get("delta") is None and self._pieces and message.get("content") == whole_text(self._pieces):
            return False  # MiniMax says all of it once more at the end
        named = next((message[name] for name in _THOUGHTS if message.get(name)), None)
        thought, content = _in_parts(message.get("content"))
        moved = False
        for piece, pieces, name in (
            (named or _in_details(message) or thought, self._thoughts, "reasoning"),
            (content, self._pieces, "content"),
            (message.get("refusal"), self._pieces, "refusal"),
        ):
            moved |= self._keep(piece, pieces, name)
        return moved


def _in_details(message: Mapping[str, Any]) -> str | None:
    """The thought in ``reasoning_details`` (MiniMax, and OpenRouter beside its other field) or ``thinking_blocks`` (Anthropic's, by
    way of LiteLLM); encrypted ones have no text."""
    details = message.get("reasoning_details") or message.get("thinking_blocks")
    if not isinstance(details, list):
        return None
    texts = [
        item.get("text") or item.get("summary") or item.get("thinking") for item in details if isinstance(item, dict)
    ]
    return "".join(text for text in texts if isinstance(text, str))


def _in_parts(content: Any) -> tuple[Any, Any]:
    """Thought and answer of a content in parts, as Mistral and Databricks send it; any other content is the answer, as it is."""
    if not isinstance(content, list):
        return None, content
    found = ["", ""]
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _PARTS:
            return None, content
        inner = next((part[name] for name in (kind, "text", "summary") if part.get(name)), "")
        inner = _in_parts(inner)[1] if isinstance(inner, list) else inner
        if not isinstance(inner, str):
            return None, content
        found[_PARTS[kind]] += inner
    return found[0], found[1]
