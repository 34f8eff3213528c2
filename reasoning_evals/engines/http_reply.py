"""The reply of an OpenAI-compatible completions endpoint: a stream of events that add up to one completion. No I/O here."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

STOPPED = ("stop", "eos", "eos_token", "stop_sequence")
CUT = ("length", "max_tokens")


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

    text: str = ""
    token_ids: list[int] | None = None
    """None if the server sends none."""
    prompt_ids: tuple[int, ...] | None = None
    """The prompt's token ids on the server, if it sends them."""
    finish_reason: str | None = None
    _pieces: list[str] = field(default_factory=list)

    def add(self, event: bytes) -> None:
        """Take one event. EndpointError if it is not part of a completion, PassingFailure if the server reports an error."""
        try:
            values = json.loads(event)
        except ValueError as error:
            raise EndpointError(f"it answers what is not JSON: {short(event.decode(errors='replace'))}") from error
        if isinstance(values, dict) and values.get("error"):
            raise_reported(values["error"])
        choices = values.get("choices") if isinstance(values, dict) else None
        if not isinstance(choices, list):
            raise EndpointError(f"it answers without choices: {short(event.decode(errors='replace'))}")
        if not choices:  # an event that only counts tokens
            return
        choice = choices[0]
        if not isinstance(choice, dict) or not isinstance(choice.get("text"), str):
            raise EndpointError(
                f"it answers a choice without text ({short(json.dumps(choice))}): give the address of /v1/completions, not chat"
            )
        self._pieces.append(choice["text"])
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        if (ids := _ids(choice, "token_ids")) is not None:
            if self.token_ids is None:
                self.token_ids = []
            self.token_ids += ids
        if (ids := _ids(choice, "prompt_token_ids")) is not None:
            self.prompt_ids = tuple(ids)

    def finish(self) -> str:
        """stop or length, after the last event. A stream without a finish reason was cut."""
        self.text = "".join(self._pieces)
        if self.finish_reason in STOPPED:
            return "stop"
        if self.finish_reason in CUT:
            return "length"
        if self.finish_reason in (None, "abort"):
            raise PassingFailure("cut stream", "the stream ended before the completion did")
        raise EndpointError(f"it ended a completion for the reason {self.finish_reason!r}, neither stop nor length")


async def events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The payloads of a server-sent event stream, up to ``[DONE]``.

    Lines end at the byte newline only: JSON may contain U+2028 and similar characters, where ``str.splitlines`` would split
    too.
    """
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            name, _, value = line.partition(b":")
            if name == b"data":
                if value.strip() == b"[DONE]":
                    return
                yield value.strip()
    if rest.startswith(b"data:") and rest[5:].strip() != b"[DONE]":
        # The server closed the connection inside an event, or omitted the last newline: half an event is ignored.
        try:
            json.loads(rest[5:])
        except ValueError:
            return
        yield rest[5:].strip()


def raise_reported(error: Any) -> NoReturn:
    """An error object inside a stream that began normally."""
    values: Mapping[str, Any] = error if isinstance(error, Mapping) else {"message": error}
    code, message = values.get("code"), short(str(values.get("message")))
    if isinstance(code, int) and (code == 429 or code >= 500):
        raise PassingFailure(str(code), message)
    raise EndpointError(f"it reports {message}")


def raise_status(status: int, phrase: str, said: str, retry_after: str = "") -> NoReturn:
    """A status other than 200: 429 and 5xx are temporary."""
    message = f"answers {status} {phrase}" + (f": {short(said)}" if said else "")
    if status == 429 or status >= 500:
        raise PassingFailure(str(status), message, float(retry_after) if retry_after.isdecimal() else 0.0)
    hint = {401: "give the right api_key", 404: "give a base_url up to /v1, and a model that it serves"}
    raise EndpointError(message + (f": {hint[status]}" if status in hint else ""))


def _ids(choice: Mapping[str, Any], name: str) -> list[int] | None:
    ids = choice.get(name)
    if ids is not None and not (isinstance(ids, list) and all(isinstance(token_id, int) for token_id in ids)):
        raise EndpointError(f"its {name} are not a list of integers: {short(json.dumps(ids))}")
    return ids


def short(text: str, limit: int = 300) -> str:
    """On one line, shortened to the limit."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
