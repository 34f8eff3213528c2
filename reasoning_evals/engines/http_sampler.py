"""The HTTP sampler: any OpenAI-compatible endpoint (vLLM, SGLang, llama.cpp, a hosted one), for completions or as a chat."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import httpx

from moe_steer.thinking import token_tags
from reasoning_evals.engines.http_audit import AUDITED, Tally
from reasoning_evals.engines.http_chat import Chat, ChatReply
from reasoning_evals.engines.http_client import Address, ask
from reasoning_evals.engines.http_reply import EndpointError, PassingFailure, Reply, sample_of, short
from reasoning_evals.engines.http_server import ServedPlan, fired
from reasoning_evals.engines.http_traffic import Traffic
from reasoning_evals.engines.sampling import Request, Sample, SamplingConfig, thinking_notes
from reasoning_evals.prompts import RenderedPrompt, render_prompt

__all__ = ["EndpointError", "HttpSampler"]
_EXTENSIONS = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "return_token_ids": True,
}
_NEW_LIMIT = "max_completion_tokens"
_SPARE = {
    "stream_options": "stream_options",
    "n": r"""["'`]n\\?["'`]""",
    "seed": r"(?<![\w-])seed(?!\w)",
}
"""Fields without which a request asks for the same, but for the seed: how a refusal names it."""
_UNKNOWN = re.compile(
    r"extra|un(?:known|supported|recogni[sz]ed|expected)|not (?:permitted|supported|allowed)", re.IGNORECASE
)
"""How a refusal of a field reads, not of its value."""
_LONGEST_WAIT = 600.0
"""Seconds that a server may ask for before a retry; one that wants more is asked again by the user."""
_BYTES_A_TOKEN = 4096
"""Far more than the events of a token take."""


class HttpSampler:
    """Samples from an endpoint: one request a sample, with the sample's own seed, streamed.

    Prompts are sent as rendered here, so every arm sees the same bytes, and the server's chat template and reasoning parser
    are not used; with ``chat`` it is the server that renders messages and takes thoughts apart. Decoding follows ``SamplingConfig`` alone: servers take what a request omits from the model's
    generation_config, so every setting is sent. Each sample comes as soon as it is there.

    base_url: up to and with ``/v1``. A user and password in it are sent as a header, and never shown.
    model: the name that the server serves the model under.
    tokenizer: of that model; renders prompts, and makes token ids where the server sends none. Not needed for a run with its
        own ``render`` on a server that sends ids, nor for a chat that sends ids or counts.
    chat: ask /v1/chat/completions, in this way.
    concurrency: requests under way at once; a ``Traffic`` counts those of all samplers that have it together.
    chunk_timeout: seconds that a stream may bring nothing new, the wait in the server's queue included. Not retried: a server
        that is too slow would only be asked twice.
    max_retries: attempts after the first, a sample, on a failed connection, 408, 409, 425, 429 and 5xx.
    backoff: seconds before the first retry, doubled each time up to 60; a server's Retry-After counts when it is longer, and
        holds back all requests.
    extensions: send the fields of vLLM and SGLang that keep special tokens in the text, add no BOS, return token ids and
        switch off defaults of the model. False for servers that refuse unknown fields.
    prompt_as_ids: send token ids instead of text, for servers that add a BOS to any text (llama.cpp).
    plan: the steering plan of the server that every request names.
    outage: seconds that the server may be away: until then a failed attempt is made again, however often.
    engine: plain JSON values that identify the server: version, precision, parallelism, batch-invariant or not. Part of the
        run's identity; the address is not, since a server may move between two sessions of a run.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        tokenizer: Any = None,
        *,
        concurrency: int | Traffic = 64,
        chunk_timeout: float = 600.0,
        max_retries: int = 5,
        backoff: float = 1.0,
        api_key: str | None = None,
        extensions: bool = True,
        prompt_as_ids: bool = False,
        engine: Mapping[str, Any] | None = None,
        chat: Chat | None = None,
        plan: ServedPlan | None = None,
        outage: float = 0.0,
    ) -> None:
        self._traffic = concurrency if isinstance(concurrency, Traffic) else Traffic(concurrency)
        self.places = self._traffic.places
        """Requests under way at once: a run asks for several chunks at a time to have so many."""
        if self.places < 1 or max_retries < 0 or not chunk_timeout > 0 or backoff < 0:
            raise ValueError(
                "expected concurrency >= 1, max_retries >= 0, chunk_timeout > 0 and backoff >= 0, got "
                f"{self.places}, {max_retries}, {chunk_timeout}, {backoff}"
            )
        if chat is not None and prompt_as_ids:
            raise ValueError("a chat endpoint takes messages, and prompt_as_ids is for completions: leave it out")
        self._address = Address(base_url, "/completions" if chat is None else "/chat/completions", api_key)
        self._chat = chat
        self.model = model
        self.tokenizer = tokenizer
        self._patience = chunk_timeout
        self._vocabulary = _size_of(tokenizer)
        self._limit_name = "max_tokens"
        self._left_out: set[str] = set()
        self._max_retries = max_retries
        self._backoff = backoff
        self._extensions = extensions
        self._prompt_as_ids = prompt_as_ids
        self._engine = dict(engine or {})
        self._plan = plan
        self._outage = outage
        self.on_reply: Callable[[Reply], None] | None = None
        """Called with the reply at each event of it; what it raises ends the sampling."""

    @property
    def plan_entries(self) -> Sequence[Mapping[str, Any]]:
        """What the counts of the plan belong to."""
        return self._plan.entries if self._plan else ()

    def render(self, question: str) -> RenderedPrompt:
        """The question in the tokenizer's chat template, or as a chat's messages; ValueError without either."""
        if self._chat is not None:
            return self._chat.render(question)
        if self.tokenizer is None:
            raise ValueError("no tokenizer to render prompts with: give the model's, or a run with its own render")
        return render_prompt(self.tokenizer, question)

    def describe(self) -> dict[str, Any]:
        """What identifies this engine in run.json."""
        if self._chat is not None:
            tags = None if self.tokenizer is None else token_tags(self.tokenizer, self._chat.fmt)
            how = {"thinking": self._chat.fmt.to_dict(), "thinking_tokens": tags._asdict() if tags else None}
            how["chat"] = self._chat.to_dict()
        else:
            how = {} if self.tokenizer is None else thinking_notes(self.tokenizer)
        return {
            "engine": "http",
            "model": self.model,
            "extensions": self._extensions,
            "prompt_as_ids": self._prompt_as_ids,
            "server": self._engine,
            **how,
        }

    def sample(self, requests: Sequence[Request], config: SamplingConfig) -> Iterator[Sample]:
        """Yield the samples as they are finished; they are asked for longest prompts first, equal prompts in the order given.

        EndpointError in one line when a sample fails for good; pending requests are then cancelled.
        """
        bodies = [(request, self.body(request, config)) for request in requests]
        bodies.sort(key=lambda item: -(len(item[0].prompt_ids) or len(item[0].prompt)))
        tally = AUDITED.get() or Tally()
        asks = [partial(self._sample_one, request, body, tally) for request, body in bodies]
        yield from self._traffic.ask(self._address, self._patience, asks)

    def give_up(self) -> None:
        """End what is under way, in whatever thread."""
        self._traffic.end(EndpointError("another part of the run has ended"))

    def body(self, request: Request, config: SamplingConfig) -> dict[str, Any]:
        """What is sent for a sample."""
        if not (request.prompt_ids if self._prompt_as_ids else request.prompt):
            raise ValueError(f"request {request.key!r} has no prompt: render its prompt first")
        body: dict[str, Any] = {
            "model": self.model,
            **(
                {"prompt": list(request.prompt_ids) if self._prompt_as_ids else request.prompt}
                if self._chat is None
                else self._chat.fields(request.prompt, self._extensions)
            ),
            self._limit_name: config.max_new_tokens,
            "temperature": 0.0 if config.greedy else config.temperature,
            "top_p": 1.0 if config.greedy else config.top_p,
            "n": 1,
            "seed": request.seed,
            "stream": True,
            **(self._plan.fields if self._plan else {}),
        }
        if not self._extensions:
            if config.top_k and not config.greedy:
                raise ValueError(f"top_k is {config.top_k}, which plain OpenAI endpoints do not know: set it to 0")
            return body
        return body | {
            **_EXTENSIONS,
            "top_k": -1 if config.greedy or not config.top_k else config.top_k,
            **({"add_special_tokens": False} if self._chat is None else {}),
        }

    async def _sample_one(
        self, request: Request, body: dict[str, Any], tally: Tally, client: httpx.AsyncClient
    ) -> Sample:
        jitter = random.Random(request.seed)
        shown = self._address.shown
        until = time.monotonic() + self._outage
        for attempt in itertools.count():
            while (left := self._traffic.resume_at - time.monotonic()) > 0:  # a pause that the server asked of anyone
                await asyncio.sleep(left + jitter.uniform(0.0, self._backoff))
            try:
                sample = await self._attempt(client, request, body, tally)
            except PassingFailure as failure:
                if attempt >= self._max_retries and time.monotonic() >= until:
                    raise EndpointError(
                        f"{shown}: {failure}; given up after {attempt + 1} attempts: see the server's log; "
                        "the run continues where it was"
                    ) from failure
                if failure.wait > _LONGEST_WAIT:
                    raise EndpointError(
                        f"{shown}: {failure}; it asks for a pause of {failure.wait:.0f} s: start the run again then, it "
                        "continues where it was"
                    ) from failure
                tally.reasons[failure.kind] += 1
                tally.counts["retried"] += attempt == 0
                self._traffic.resume_at = max(
                    self._traffic.resume_at, time.monotonic() + failure.wait if failure.wait else 0.0
                )
                await asyncio.sleep(min(60.0, self._backoff * 2 ** min(attempt, 9)) * jitter.uniform(0.5, 1.0))
            except (TimeoutError, httpx.TimeoutException) as error:
                raise EndpointError(
                    f"{shown}: silent for {self._patience:g} s: raise chunk_timeout or lower concurrency"
                ) from error
            except (EndpointError, httpx.HTTPError) as error:
                said = short(self._address.hide(str(error)), 600) or type(error).__name__
                raise EndpointError(f"{shown}: {said}") from None
            else:
                tally.counts["samples"] += 1
                tally.counts["filtered"] += sample.finish_reason == "content_filter"
                return sample
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, client: httpx.AsyncClient, request: Request, body: dict[str, Any], tally: Tally) -> Sample:
        most_tokens = body.get("max_tokens") or body[_NEW_LIMIT]
        limits: dict[str, Any] = {"most_tokens": most_tokens, "vocabulary": self._vocabulary}
        reply = (
            Reply(hide=self._address.hide, **limits)
            if self._chat is None
            else ChatReply(hide=self._address.hide, chat=self._chat, **limits)
        )
        reply.heard = self.on_reply
        most = (1 << 20) + 64 * len(request.prompt) + _BYTES_A_TOKEN * most_tokens
        for name in self._left_out:
            body.pop(name, None)
        while True:
            try:
                await ask(client, self._address, body, reply, self._patience, most)
                break
            except EndpointError as error:
                if not self._asks_otherwise(body, str(error)):
                    raise
        sample, how = sample_of(reply, request, self.tokenizer, counts=self._chat is not None or self.tokenizer is None)
        if self._address.repeated_in(reply.text):
            raise EndpointError("its completion holds the key or password that was sent: it is not stored")
        hits: Sequence[int] | None = ()
        if self._plan is not None and self._plan.entries:
            hits = await fired(client, self._address, self._plan, reply.request_id)
        tally.counts["unaudited"] += hits is None
        tally.counts["unseeded"] += "seed" not in body
        tally.hits.update(dict(enumerate(hits or ())))
        if how:
            tally.counts[how] += 1
        return sample

    def _asks_otherwise(self, body: dict[str, Any], refusal: str) -> bool:
        """Whether a refusal names a field that the server takes under another name, or that may be left out: the body, and those
        to come, are then without it. EndpointError, which says so, for one that only the user can leave out."""
        refused = [name for name in (*_EXTENSIONS, "top_k", "add_special_tokens") if name in refusal]
        if refused and self._extensions:
            raise EndpointError(
                f"{refusal}: it does not take {refused[0]}, ask it without fields beyond OpenAI's own (--plain-endpoint)"
            )
        if self._chat is not None and _NEW_LIMIT not in body and _NEW_LIMIT in refusal:
            body[_NEW_LIMIT] = body.pop("max_tokens")  # OpenAI's newer models take the limit under this name only
            self._limit_name = _NEW_LIMIT
            return True
        if re.match("answers 4(00|22) ", refusal) and _UNKNOWN.search(refusal):
            for name, pattern in _SPARE.items():
                if name in body and re.search(pattern, refusal):
                    self._left_out.add(name)
                    del body[name]
                    return True
        return False


def _size_of(tokenizer: Any) -> int | None:
    """How many token ids a tokenizer has; None where it does not say."""
    return len(tokenizer) if hasattr(tokenizer, "__len__") else None
