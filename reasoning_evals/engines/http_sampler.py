"""The HTTP sampler: any OpenAI-compatible /v1/completions endpoint (vLLM, SGLang, llama.cpp, a hosted one)."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, NamedTuple

import httpx

from reasoning_evals.engines.http_reply import EndpointError, PassingFailure, Reply, events, raise_status, short
from reasoning_evals.engines.sampling import Request, Sample, SamplingConfig, thinking_notes
from reasoning_evals.prompts import RenderedPrompt, render_prompt

__all__ = ["EndpointError", "HttpSampler", "HttpStats"]


class HttpStats(NamedTuple):
    """Counts of requests so far. Failures need not be random (a long completion has more time to fail), so retries can bias
    what is sampled."""

    num_samples: int
    num_retried_samples: int
    reasons: dict[str, int]
    """Retries by cause: an HTTP status, "connection", or "cut stream"."""
    num_retokenized: int
    """Samples whose ids the server did not send, so that the text was tokenized again here."""


class HttpSampler:
    """Samples from a completions endpoint: one request a sample, with the sample's own seed, streamed.

    Prompts are sent as rendered here, so every arm sees the same bytes, and the server's chat template and reasoning parser
    are not used. Decoding follows ``SamplingConfig`` alone: servers take what a request omits from the model's
    generation_config, so every setting is sent. Samples come in a fixed order (longest prompt first, as the Sampler
    protocol wants it), each as soon as it and those before it are there. This costs nothing on resume, because a run makes
    an unfinished chunk anew anyway. A chunk is the run's ``batch_size``: take several times ``concurrency``, so that the
    server is kept busy.

    base_url: up to and with ``/v1``.
    model: the name that the server serves the model under.
    tokenizer: of that model; renders prompts, and makes token ids where the server sends none. Not needed for a run with its
        own ``render`` on a server that sends ids.
    concurrency: requests under way at once.
    chunk_timeout: seconds that a stream may be silent, the wait in the server's queue included. Not retried: a server that is
        too slow would only be asked twice.
    max_retries: attempts after the first, a sample, on a failed connection, 429 and 5xx.
    backoff: seconds before the first retry, doubled each time up to 60; a server's Retry-After counts when it is longer.
    extensions: send the fields of vLLM and SGLang that keep special tokens in the text, add no BOS, return token ids and
        switch off defaults of the model. False for servers that refuse unknown fields.
    prompt_as_ids: send token ids instead of text, for servers that add a BOS to any text (llama.cpp).
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
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(
                f"base_url must start with http:// or https://, got {base_url!r}: such as http://HOST:8000/v1"
            )
        try:
            httpx.URL(base_url)
        except httpx.InvalidURL as error:
            raise ValueError(f"base_url {base_url!r} is not a URL ({error}): such as http://HOST:8000/v1") from error
        if concurrency < 1 or max_retries < 0 or not chunk_timeout > 0 or backoff < 0:
            raise ValueError(
                "expected concurrency >= 1, max_retries >= 0, chunk_timeout > 0 and backoff >= 0, got "
                f"{concurrency}, {max_retries}, {chunk_timeout}, {backoff}"
            )
        self.url = base_url.rstrip("/") + "/completions"
        self.model = model
        self.tokenizer = tokenizer
        self._concurrency = concurrency
        self._timeout = httpx.Timeout(chunk_timeout, connect=min(30.0, chunk_timeout), pool=None)
        self._max_retries = max_retries
        self._backoff = backoff
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._extensions = extensions
        self._prompt_as_ids = prompt_as_ids
        self._engine = dict(engine or {})
        self._reasons: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()

    @property
    def stats(self) -> HttpStats:
        """Counts since this sampler was made; not part of ``describe``, which must be the same when a run is resumed."""
        return HttpStats(
            num_samples=self._counts["samples"],
            num_retried_samples=self._counts["retried"],
            reasons=dict(sorted(self._reasons.items())),
            num_retokenized=self._counts["retokenized"],
        )

    def render(self, question: str) -> RenderedPrompt:
        """The question in the tokenizer's chat template; ValueError without a tokenizer."""
        if self.tokenizer is None:
            raise ValueError("no tokenizer to render prompts with: give the model's, or a run with its own render")
        return render_prompt(self.tokenizer, question)

    def describe(self) -> dict[str, Any]:
        """What identifies this engine in run.json."""
        return {
            "engine": "http",
            "model": self.model,
            "extensions": self._extensions,
            "prompt_as_ids": self._prompt_as_ids,
            "server": self._engine,
            **({} if self.tokenizer is None else thinking_notes(self.tokenizer)),
        }

    def sample(self, requests: Sequence[Request], config: SamplingConfig) -> Iterator[Sample]:
        """Yield the samples, longest prompts first, equal prompts in the order given.

        EndpointError in one line when a sample fails for good; pending requests are then cancelled.
        """
        bodies = [(request, self._body(request, config)) for request in requests]
        client = httpx.AsyncClient(
            timeout=self._timeout,
            headers=self._headers,
            limits=httpx.Limits(max_connections=self._concurrency, max_keepalive_connections=self._concurrency),
        )
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
            asyncio.run_coroutine_threadsafe(_give_up(client), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    def _body(self, request: Request, config: SamplingConfig) -> dict[str, Any]:
        if not (request.prompt_ids if self._prompt_as_ids else request.prompt):
            raise ValueError(f"request {request.key!r} has no prompt: render its prompt first")
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(request.prompt_ids) if self._prompt_as_ids else request.prompt,
            "max_tokens": config.max_new_tokens,
            "temperature": 0.0 if config.greedy else config.temperature,
            "top_p": 1.0 if config.greedy else config.top_p,
            "n": 1,
            "seed": request.seed,
            "stream": True,
        }
        if not self._extensions:
            if config.top_k and not config.greedy:
                raise ValueError(f"top_k is {config.top_k}, which plain OpenAI endpoints do not know: set it to 0")
            return body
        return body | {
            "top_k": -1 if config.greedy or not config.top_k else config.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "add_special_tokens": False,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "return_token_ids": True,
        }

    async def _sample_one(self, client: httpx.AsyncClient, request: Request, body: dict[str, Any]) -> Sample:
        jitter = random.Random(request.seed)
        for attempt in range(self._max_retries + 1):
            try:
                sample = await self._attempt(client, request, body)
            except PassingFailure as failure:
                if attempt == self._max_retries:
                    raise EndpointError(
                        f"{self.url}: {failure}; given up after {attempt + 1} attempts: see the server's log; "
                        "the run continues where it was"
                    ) from failure
                self._reasons[failure.kind] += 1
                self._counts["retried"] += attempt == 0
                pause = min(60.0, self._backoff * 2**attempt) * jitter.uniform(0.5, 1.0)
                await asyncio.sleep(max(pause, min(failure.wait, 60.0)))
            except httpx.TimeoutException as error:
                raise EndpointError(
                    f"{self.url}: silent for {self._timeout.read:g} s: raise chunk_timeout or lower concurrency"
                ) from error
            except (EndpointError, httpx.HTTPError) as error:
                raise EndpointError(f"{self.url}: {short(str(error)) or type(error).__name__}") from error
            else:
                self._counts["samples"] += 1
                return sample
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, client: httpx.AsyncClient, request: Request, body: dict[str, Any]) -> Sample:
        reply = Reply()
        try:
            async with client.stream("POST", self.url, json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    after = response.headers.get("retry-after", "")
                    raise_status(response.status_code, response.reason_phrase, response.text, after)
                if response.headers.get("content-type", "").startswith(
                    "application/json"
                ):  # a server that cannot stream
                    reply.add(await response.aread())
                else:
                    async for event in events(response.aiter_bytes()):
                        reply.add(event)
        except (httpx.ConnectTimeout, httpx.NetworkError, httpx.RemoteProtocolError) as error:
            raise PassingFailure("connection", short(str(error)) or type(error).__name__) from error
        finish_reason = reply.finish()
        return self._finished(request, reply, finish_reason)

    def _finished(self, request: Request, reply: Reply, finish_reason: str) -> Sample:
        if reply.prompt_ids is not None and request.prompt_ids and reply.prompt_ids != request.prompt_ids:
            raise EndpointError(
                f"it reads the prompt as {len(reply.prompt_ids)} tokens, here it has {len(request.prompt_ids)}: "
                "its tokenizer is another, or it adds a BOS; give its tokenizer, or set prompt_as_ids"
            )
        text = reply.text
        stop_text = getattr(self.tokenizer, "eos_token", None)
        if finish_reason == "stop" and stop_text:
            text = text.removesuffix(stop_text)  # some servers keep it with the special tokens
        if reply.token_ids:
            return Sample(request.key, tuple(reply.token_ids), text, finish_reason)
        if self.tokenizer is None:
            raise EndpointError(
                "it sends no token ids: give the model's tokenizer, so that they are made from the text"
            )
        self._counts["retokenized"] += 1
        ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        stop_id = getattr(self.tokenizer, "eos_token_id", None)
        if finish_reason == "stop" and stop_id is not None:
            ids = (*ids, stop_id)
        return Sample(request.key, ids, text, finish_reason)


async def _give_up(client: httpx.AsyncClient) -> None:
    """Cancel the pending requests of this loop and close the connections."""
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.aclose()
