"""The HTTP sampler: any OpenAI-compatible endpoint (vLLM, SGLang, llama.cpp, a hosted one), for completions or as a chat."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

import httpx

from moe_steer.thinking import token_tags
from reasoning_evals.engines.http_audit import HttpStats
from reasoning_evals.engines.http_chat import Chat, ChatReply
from reasoning_evals.engines.http_client import Address, ask, give_up, open_client
from reasoning_evals.engines.http_reply import EndpointError, PassingFailure, Reply, sample_of, short
from reasoning_evals.engines.http_server import ServedPlan, fired
from reasoning_evals.engines.sampling import Request, Sample, SamplingConfig, thinking_notes
from reasoning_evals.prompts import RenderedPrompt, render_prompt

__all__ = ["EndpointError", "HttpSampler", "HttpStats"]
_NEW_LIMIT = "max_completion_tokens"
_LONGEST_WAIT = 600.0
"""Seconds that a server may ask for before a retry; one that wants more is asked again by the user."""
_BYTES_A_TOKEN = 4096
"""Far more than the events of a token take."""


class HttpSampler:
    """Samples from an endpoint: one request a sample, with the sample's own seed, streamed.

    Prompts are sent as rendered here, so every arm sees the same bytes, and the server's chat template and reasoning parser
    are not used; with ``chat`` it is the server that renders messages and takes thoughts apart. Decoding follows ``SamplingConfig`` alone: servers take what a request omits from the model's
    generation_config, so every setting is sent. Samples come in a fixed order (longest prompt first, as the Sampler
    protocol wants it), each as soon as it and those before it are there. This costs nothing on resume, because a run makes
    an unfinished chunk anew anyway. A chunk is the run's ``batch_size``: take several times ``concurrency``, so that the
    server is kept busy.

    base_url: up to and with ``/v1``. A user and password in it are sent as a header, and never shown.
    model: the name that the server serves the model under.
    tokenizer: of that model; renders prompts, and makes token ids where the server sends none. Not needed for a run with its
        own ``render`` on a server that sends ids, nor for a chat that sends ids or counts.
    chat: ask /v1/chat/completions, in this way.
    concurrency: requests under way at once.
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
        concurrency: int = 64,
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
        if concurrency < 1 or max_retries < 0 or not chunk_timeout > 0 or backoff < 0:
            raise ValueError(
                "expected concurrency >= 1, max_retries >= 0, chunk_timeout > 0 and backoff >= 0, got "
                f"{concurrency}, {max_retries}, {chunk_timeout}, {backoff}"
            )
        if chat is not None and prompt_as_ids:
            raise ValueError("a chat endpoint takes messages, and prompt_as_ids is for completions: leave it out")
        self._address = Address(base_url, "/completions" if chat is None else "/chat/completions", api_key)
        self._chat = chat
        self.model = model
        self.tokenizer = tokenizer
        self._concurrency = concurrency
        self._patience = chunk_timeout
        self._vocabulary = _size_of(tokenizer)
        self._resume_at = 0.0
        self._limit_name = "max_tokens"
        self._max_retries = max_retries
        self._backoff = backoff
        self._extensions = extensions
        self._prompt_as_ids = prompt_as_ids
        self._engine = dict(engine or {})
        self._reasons: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._plan = plan
        self._hits: Counter[int] = Counter()
        self._outage = outage
        self.on_reply: Callable[[Reply], None] | None = None
        """Called with the reply at each event of it; what it raises ends the sampling."""

    @property
    def stats(self) -> HttpStats:
        """Counts since this sampler was made; not part of ``describe``, which must be the same when a run is resumed."""
        return HttpStats(
            num_samples=self._counts["samples"],
            num_retried_samples=self._counts["retried"],
            reasons=dict(sorted(self._reasons.items())),
            num_retokenized=self._counts["retokenized"],
            num_counted=self._counts["counted"],
            num_filtered=self._counts["filtered"],
            num_unaudited=self._counts["unaudited"],
            hits=tuple(self._hits[index] for index in range(len(self.plan_entries))),
        )

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
        """Yield the samples, longest prompts first, equal prompts in the order given.

        EndpointError in one line when a sample fails for good; pending requests are then cancelled.
        """
        bodies = [(request, self.body(request, config)) for request in requests]
        client = open_client(self._address, self._concurrency, self._patience)
        places = asyncio.Semaphore(self._concurrency)
        failed: Future[BaseException] = Future()

        async def one(request: Request, body: dict[str, Any]) -> Sample:
            try:
                async with places:  # report the failure that happened first
                    return await self._sample_one(client, request, body)
            except Exception as error:
                if not failed.done():
                    failed.set_result(error)
                raise

        futures: list[Future[Sample]] = []
        # An event loop in its own thread: works inside notebooks, and pending requests can be cancelled at once.
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="http-sampler", daemon=True)
        thread.start()
        try:
            for request, body in sorted(bodies, key=lambda item: -(len(item[0].prompt_ids) or len(item[0].prompt))):
                futures.append(asyncio.run_coroutine_threadsafe(one(request, body), loop))
            for future in futures:
                either: list[Future[Any]] = [future, failed]
                wait(either, return_when=FIRST_COMPLETED)
                if failed.done():  # raise at once, not when this sample's turn comes
                    raise failed.result()
                yield future.result()
        finally:
            asyncio.run_coroutine_threadsafe(give_up(client), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

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
            "top_k": -1 if config.greedy or not config.top_k else config.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            **({"add_special_tokens": False} if self._chat is None else {}),
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "return_token_ids": True,
        }

    async def _sample_one(self, client: httpx.AsyncClient, request: Request, body: dict[str, Any]) -> Sample:
        jitter = random.Random(request.seed)
        shown = self._address.shown
        until = time.monotonic() + self._outage
        for attempt in itertools.count():
            while (left := self._resume_at - time.monotonic()) > 0:  # a pause that the server asked of anyone
                await asyncio.sleep(left + jitter.uniform(0.0, self._backoff))
            try:
                sample = await self._attempt(client, request, body)
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
                self._reasons[failure.kind] += 1
                self._counts["retried"] += attempt == 0
                self._resume_at = max(self._resume_at, time.monotonic() + failure.wait if failure.wait else 0.0)
                await asyncio.sleep(min(60.0, self._backoff * 2 ** min(attempt, 9)) * jitter.uniform(0.5, 1.0))
            except (TimeoutError, httpx.TimeoutException) as error:
                raise EndpointError(
                    f"{shown}: silent for {self._patience:g} s: raise chunk_timeout or lower concurrency"
                ) from error
            except (EndpointError, httpx.HTTPError) as error:
                said = short(self._address.hide(str(error)), 600) or type(error).__name__
                raise EndpointError(f"{shown}: {said}") from None
            else:
                self._counts["samples"] += 1
                self._counts["filtered"] += sample.finish_reason == "content_filter"
                return sample
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, client: httpx.AsyncClient, request: Request, body: dict[str, Any]) -> Sample:
        most_tokens = body.get("max_tokens") or body[_NEW_LIMIT]
        limits: dict[str, Any] = {"most_tokens": most_tokens, "vocabulary": self._vocabulary}
        reply = (
            Reply(hide=self._address.hide, **limits)
            if self._chat is None
            else ChatReply(hide=self._address.hide, chat=self._chat, **limits)
        )
        reply.heard = self.on_reply
        most = (1 << 20) + 64 * len(request.prompt) + _BYTES_A_TOKEN * most_tokens
        try:
            await ask(client, self._address, body, reply, self._patience, most)
        except EndpointError as error:
            if self._chat is None or _NEW_LIMIT in body or _NEW_LIMIT not in str(error):
                raise
            body[_NEW_LIMIT] = body.pop("max_tokens")  # OpenAI's newer models take the limit under this name only
            self._limit_name = _NEW_LIMIT
            await ask(client, self._address, body, reply, self._patience, most)
        sample, how = sample_of(reply, request, self.tokenizer, counts=self._chat is not None or self.tokenizer is None)
        if self._address.repeated_in(reply.text):
            raise EndpointError("its completion holds the key or password that was sent: it is not stored")
        if self._plan is not None and self._plan.entries:
            hits = await fired(client, self._address, self._plan, reply.request_id)
            self._counts["unaudited"] += hits is None
            self._hits.update(dict(enumerate(hits or ())))
        if how:
            self._counts[how] += 1
        return sample


def _size_of(tokenizer: Any) -> int | None:
    """How many token ids a tokenizer has; None where it does not say."""
    return len(tokenizer) if hasattr(tokenizer, "__len__") else None
