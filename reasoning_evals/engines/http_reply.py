"""The reply of an OpenAI-compatible endpoint: a stream of events that add up to one completion. No I/O here.

Nothing in it is trusted: types, sizes and token ids are checked, and what is quoted in a message is short and without secrets.
"""

from __future__ import annotations

import datetime
import email.utils
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from moe_steer.json_files import short
from reasoning_evals.engines.sampling import Request, Sample

_ENDS = {
    "stop": {"stop", "eos", "eos_token", "stop_sequence", "end", "end_turn", "complete", "completed", "normal", "endoftext", "tool_calls", "tool_use", "function_call"},
    "length": {"length", "max_tokens", "max_output_tokens", "token_limit", "model_length", "model_context_window_exceeded", "repetition", "repetition_truncation"},
    "content_filter": {"content_filter", "content_filtered", "safety", "recitation", "refusal", "sensitive", "prohibited_content", "blocklist", "spii", "guardrail_intervened", "error_toxic"},
    "": {"", "abort", "error", "cancelled", "canceled", "cancel", "timeout", "time_limit", "not_finished", "network_error", "insufficient_system_resource"},
}  # fmt: skip
"""What servers call an end, by what it is here; nothing is a completion that broke off. A call of a tool that nobody offered ends
one like any other text; a loop that a server saw and ended is a cut."""
PASSING = (408, 409, 424, 425, 429, 498)
"""Statuses below 500 after which the same request may succeed; 424 is TGI's failed generation, 498 Groq's lack of capacity."""
_SERVER_TROUBLE = re.compile(
    r"internal|server.?error|overload|unavailable|rate.?limit|too many requests|time.?out|timed out|engine|try again|retry",
    re.IGNORECASE,
)
_LONGEST_ID = 256


class EndpointError(RuntimeError):
    """The endpoint cannot do what was asked, and a retry would not help."""


class PassingFailure(Exception):
    """A temporary failure; ``kind`` is its name in the counts, ``wait`` the pause in seconds that the server asks for."""

    def __init__(self, kind: str, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.kind = kind
        self.wait = wait


@dataclass(slots=True)
class Reply:
    """A completion that is arriving."""

    most_tokens: int | None = None
    """The limit that was asked for; None: not checked."""
    vocabulary: int | None = None
    """Number of token ids of the model; None where it is not known."""
    hide: Callable[[str], str] = str
    """Takes secrets out of a text."""
    text: str = ""
    token_ids: list[int] | None = None
    """None if the server sends none."""
    prompt_ids: tuple[int, ...] | None = None
    """The prompt's token ids on the server, if it sends them."""
    finish_reason: str | None = None
    num_tokens: int | None = None
    """Generated tokens by the server's own count, if it sends that."""
    num_thinking: int | None = None
    """Those of them that were thought."""
    request_id: str | None = None
    """What the server calls this request."""
    heard: Callable[[Reply], None] | None = None
    """Called after each event."""
    _pieces: list[str] = field(default_factory=list)

    def add(self, event: bytes) -> bool:
        """Take one event; whether it brought the completion further. EndpointError if it is no part of one, PassingFailure if the
        server reports an error of its own, or breaks an event of a completion that had begun."""
        try:
            values = json.loads(event) if event.strip() else None
        except (ValueError, RecursionError) as error:
            said = f"it answers what is not JSON: {self._quoted(event)}"
            raise PassingFailure("cut stream", said) if self._began else EndpointError(said) from error
        if values is None:  # keeps the connection alive
            return False
        if isinstance(values, list) and len(values) == 1:  # Gemini's errors
            values = values[0]
        choices = values.get("choices") if isinstance(values, dict) else None
        if isinstance(values, dict) and (
            values.get("error") or (choices is None and ("detail" in values or isinstance(values.get("message"), str)))
        ):
            raise_reported(values.get("error") or values, self._began, self.hide)
        base = values.get("base_resp") if isinstance(values, dict) else None
        if isinstance(base, dict) and base.get("status_code"):  # MiniMax's errors
            raise_reported({"message": base.get("status_msg")}, self._began, self.hide)
        if choices is None and _says_nothing(values):
            choices = []
        if not isinstance(choices, list):
            raise EndpointError(f"it answers without choices: {self._quoted(event)}")
        for place in (values.get("x_groq"), values, choices[0] if choices else None):
            if isinstance(place, dict) and isinstance(usage := place.get("usage"), dict):
                self._take_usage(usage)
        if isinstance(named := values.get("id"), str):
            self.request_id = named[:_LONGEST_ID]
        if not choices:  # an event that only counts tokens
            return False
        choice = choices[0]
        if not isinstance(choice, dict) or len(choices) > 1 or choice.get("index") not in (None, 0):
            raise EndpointError(f"it answers other than with one completion: {self._quoted(event)}")
        moved = self._take_text(choice) or (self.finish_reason is None and bool(choice.get("finish_reason")))
        self._take_reason(choice.get("finish_reason"))
        if (ids := self._ids(choice, "token_ids")) is not None:
            self.token_ids = self.token_ids or []
            self.token_ids += ids
            moved = moved or bool(ids)
        for place in (choice, values):
            if (ids := self._ids(place, "prompt_token_ids")) is not None:
                self.prompt_ids = tuple(ids)
        if self.heard is not None:
            self.heard(self)
        return moved

    def finish(self) -> str:
        """stop, length or content_filter, after the last event. A stream without a finish reason was cut."""
        self.text = whole_text(self._pieces)
        reason = (self.finish_reason or "").lower().replace("-", "_").removeprefix("finish_reason_")
        for end, names in _ENDS.items():
            if reason in names and end:
                return end
            if reason in names:
                raise PassingFailure("cut stream", "the stream ended before the completion did")
        raise EndpointError(f"it ended a completion for the reason {self._quoted(reason)!r}, neither stop nor length")

    @property
    def so_far(self) -> str:
        """The text that has arrived."""
        return whole_text(list(self._pieces))

    @property
    def _began(self) -> bool:
        return bool(self._pieces)

    def _take_text(self, choice: Mapping[str, Any]) -> bool:
        """The text of a choice; null and no text at all are an empty one."""
        piece = choice.get("text")
        if piece is None and ("delta" in choice or "message" in choice):
            raise EndpointError(
                f"it answers a choice without text ({self._quoted(choice)}): give the address of /v1/completions, not chat, "
                "or ask it as a chat endpoint (--chat-endpoint)"
            )
        return self._keep(piece, self._pieces, "text")

    def _keep(self, piece: Any, pieces: list[str], name: str) -> bool:
        if piece is not None and not isinstance(piece, str):
            raise EndpointError(f"its {name} is not a text: {self._quoted(piece)}")
        if piece:
            pieces.append(piece)
        return bool(piece)

    def _take_reason(self, reason: Any) -> None:
        if reason is not None and not isinstance(reason, str):
            raise EndpointError(f"its finish_reason is not a text: {self._quoted(reason)}")
        self.finish_reason = (reason if reason != "null" else None) or self.finish_reason  # a text on DashScope

    def _take_usage(self, usage: Mapping[str, Any]) -> None:
        """The server's counts. xAI and Gemini leave the thought out of ``completion_tokens``, and the total holds it."""
        details = usage.get("completion_tokens_details")
        thinking = self._count((details if isinstance(details, dict) else usage).get("reasoning_tokens"))
        if (whole := self._count(usage.get("completion_tokens", usage.get("output_tokens")))) is not None:
            beside = thinking if thinking and thinking > whole else 0
            prompt, total = usage.get("prompt_tokens"), usage.get("total_tokens")  # nothing else asks for these
            rest = total - prompt if isinstance(prompt, int) and isinstance(total, int) and prompt > 0 else 0
            self.num_tokens = max(whole + beside, rest)
            thinking = thinking if thinking or self.num_tokens == whole else self.num_tokens - whole
        self.num_thinking = self.num_thinking if thinking is None else thinking

    def _count(self, value: Any) -> int | None:
        if value is None:
            return None
        if type(value) in (int, float) and 0 <= value < 1 << 31 and value == int(value):
            return int(value)
        raise EndpointError(f"it counts {self._quoted(value)} tokens: a whole number is expected")

    def _ids(self, place: Mapping[str, Any], name: str) -> list[int] | None:
        ids = place.get(name)
        if ids is None:
            return None
        if not isinstance(ids, list) or set(map(type, ids)) - {int}:
            raise EndpointError(f"its {name} are not a list of integers: {self._quoted(ids)}")
        limit = self.vocabulary or 1 << 31
        if ids and not (min(ids) >= 0 and max(ids) < limit):
            odd = next(number for number in ids if not 0 <= number < limit)
            raise EndpointError(
                f"its {name} hold {self._quoted(odd)}, and the model's tokenizer has the ids 0 to {limit - 1}: "
                "give the tokenizer of the model that it serves"
            )
        total = len(self.token_ids or ()) + len(ids)
        if name == "token_ids" and self.most_tokens is not None and total > self.most_tokens:
            raise EndpointError(f"it sends more than the {self.most_tokens} tokens that were asked for")
        return ids

    def _quoted(self, value: Any) -> str:
        text = value.decode(errors="replace") if isinstance(value, bytes) else value
        return short(self.hide(text if isinstance(text, str) else json.dumps(text)))


def _says_nothing(values: Any) -> bool:
    """Whether an event without choices only counts tokens or keeps the connection alive."""
    if not isinstance(values, dict):
        return False
    return not values or "choices" in values or isinstance(values.get("usage"), dict) or values.get("type") == "ping"


def sample_of(reply: Reply, request: Request, tokenizer: Any, *, counts: bool) -> tuple[Sample, str]:
    """The sample that a reply brought, and what it lacks: "counted" (no ids; with ``counts`` the server's number of tokens is
    taken), "retokenized" (its ids were made from the text), or nothing."""
    finish_reason = reply.finish()
    if reply.prompt_ids is not None and request.prompt_ids and reply.prompt_ids != request.prompt_ids:
        raise EndpointError(
            f"it reads the prompt as {len(reply.prompt_ids)} tokens, here it has {len(request.prompt_ids)}: "
            "its tokenizer is another, or it adds a BOS; give its tokenizer, or set prompt_as_ids"
        )
    text = reply.text
    stop_text = getattr(tokenizer, "eos_token", None)
    if finish_reason == "stop" and stop_text:
        text = text.removesuffix(stop_text)  # some servers keep it with the special tokens
    if reply.token_ids:
        ids = tuple(reply.token_ids)
        return Sample(request.key, ids, text, finish_reason, num_thinking=reply.num_thinking), ""
    counted = reply.num_tokens or (None if text else 0)  # 0 tokens of a text: it does not count
    if counted is not None and counts:
        return Sample(request.key, (), text, finish_reason, counted, reply.num_thinking), "counted"
    if tokenizer is None:
        raise EndpointError("it sends no token ids: give the model's tokenizer, so that they are made from the text")
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    stop_id = getattr(tokenizer, "eos_token_id", None)
    if finish_reason == "stop" and stop_id is not None:
        ids = (*ids, stop_id)
    return Sample(request.key, ids, text, finish_reason), "retokenized"


def whole_text(pieces: list[str]) -> str:
    """The pieces as one text: halves of a character that came in two pieces are put together, others become U+FFFD."""
    text = "".join(pieces)
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def wait_of(headers: Mapping[str, str]) -> float:
    """The pause in seconds that an answer asks for: Retry-After as seconds or as a date, or retry-after-ms; 0 for none."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        return max(0.0, seconds) if math.isfinite(seconds) else 0.0
    try:
        until = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        if until.tzinfo is None:
            until = until.replace(tzinfo=datetime.timezone.utc)
        return max(0.0, until.timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0


def raise_reported(error: Any, began: bool, hide: Callable[[str], str] = str) -> NoReturn:
    """An error inside a stream that began normally, as an object or as a text, its code as a number or as a text.

    Without a code: the server's own fault if its words say so, or if the completion had begun, since what is wrong with a
    request shows before.
    """
    values: Mapping[str, Any] = error if isinstance(error, Mapping) else {"message": error}
    said = values.get("message") if values.get("message") is not None else json.dumps(error)
    message = short(hide(str(said)))
    codes = [
        str(values[key]) for key in ("code", "status", "status_code", "http_status") if values.get(key) is not None
    ]
    code = next((int(text) for text in codes if re.fullmatch(r"[1-5]\d\d", text)), None)
    words = " ".join([*codes, str(values.get("type")), message])
    if code in PASSING or (code or 0) >= 500 or (code is None and (began or _SERVER_TROUBLE.search(words))):
        raise PassingFailure(str(code or "server error"), f"it reports {message}")
    raise EndpointError(f"it reports {message}")
