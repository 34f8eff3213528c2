"""Does a server serve what it should? Its greedy tokens and their log-probabilities, scored again in this process, steered and plain.

And the counts of traces from the routing that a server records while it reads them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from expert_stats import MarkerSet, RoutedTrace, RoutingCounts, Trace, count_routed, decode_array, routed_trace
from launch.core.served.connection import Connection
from launch.core.wiring import ANOTHER
from moe_steer import SteeringPlan, steer
from moe_steer.json_files import quoted
from moe_steer.layers import ModelShape
from reasoning_evals.engines import ServedPlan
from reasoning_evals.prompts import render_prompt

_LEAST_SHIFT = 1e-3
"""Nats: a plan that moves log-probabilities by less on these prompts cannot be told from none on a server that rounds."""
_SHARE_OFF = 0.25
_NOISE = 0.5
"""Of the expected shift: how far a server's rounding may take its log-probabilities from the ones here."""


_ROUNDING = {"torch.float32": 0.01, "torch.bfloat16": 0.2, "torch.float16": 0.05}
"""Nats that other kernels of the same precision explain."""


class WrongModel(RuntimeError):
    """The server serves another model than it should."""


@dataclass(frozen=True, kw_only=True)
class EndpointCheck:
    """Log-probabilities of the server's own greedy tokens, in nats. ``expected``: how far the plan moves them here (root mean
    square); ``share``: how much of that the server's have moved (least squares: 0 plain, 1 steered); ``off`` and ``off_plain``: how
    far the server's are from the steered and the plain ones here. Of ``tokens`` so many are the most likely ones here, steered and
    plain."""

    prompts: int
    tokens: int
    expected: float
    share: float
    off: float
    off_plain: float
    steered_tokens: int
    plain_tokens: int
    dtype: str

    @property
    def line(self) -> str:
        """The numbers in a sentence."""
        return (
            f"{self.prompts} prompts, {self.tokens} greedy tokens: the plan moves their log-probabilities by {self.expected:.3g} nats here, and "
            f"{100 * self.share:.0f}% of that on the server, which is {self.off:.2g} off the steered model and {self.off_plain:.2g} off the "
            f"plain one; {self.steered_tokens} are the steered model's choice, {self.plain_tokens} the plain one's"
        )

    @property
    def warning(self) -> str:
        """What a server that serves a steered model leaves open; "" where nothing."""
        if self.off <= _ROUNDING.get(self.dtype, 0.01):
            return ""
        return (
            f"its log-probabilities are {self.off:.2g} nats off, more than rounding in {self.dtype.removeprefix('torch.')} explains: it "
            "computes in another precision (--dtype), or at another gain that says nearly the same here"
        )

    def check(self) -> None:
        """WrongModel unless the server serves the steered model; ValueError where these prompts cannot tell."""
        if self.expected < _LEAST_SHIFT:
            raise ValueError(
                f"the plan moves the log-probabilities of these prompts by {self.expected:.1g} nats only, which cannot be seen on a "
                "server: give --prompts at which it acts"
            )
        if self.off <= _NOISE * self.expected and abs(self.share - 1) <= _SHARE_OFF:
            return
        if self.off_plain <= _NOISE * self.expected:
            raise WrongModel(
                "the server serves the plain model: see how it loads a baked folder (an overlay and a loader with an order of its own), "
                f"or whether it was asked for the plan; {self.line}"
            )
        raise WrongModel(f"the server serves neither the steered model nor the plain one: {self.line}")


def check_endpoint(
    connection: Connection,
    model: Any,
    tokenizer: Any,
    plan: SteeringPlan,
    prompts: Sequence[str],
    max_new_tokens: int,
    asked: ServedPlan | None,
) -> EndpointCheck:
    """Ask the server for greedy answers and score each token here, under the plan and without it.

    ``model``: the plain one. ``asked``: the plan that requests name; that of a baked model is in its weights. EndpointError for a
    server that sends no log-probabilities or no token ids.
    """
    rendered = [list(render_prompt(tokenizer, prompt).token_ids) for prompt in prompts]
    fixed = {"model": connection.name, "max_tokens": max_new_tokens, "temperature": 0, "logprobs": 1}
    fixed |= {"return_token_ids": True, **(asked.fields if asked else {})}
    replies = connection.server.complete([fixed | {"prompt": ids} for ids in rendered], 1 << 24)
    theirs: list[torch.Tensor] = []
    here: list[torch.Tensor] = []
    plain: list[torch.Tensor] = []
    chosen = [0, 0]
    for prompt_ids, reply in zip(rendered, replies, strict=True):
        ids, said = scored_tokens(reply["choices"], len(tokenizer))
        theirs.append(torch.tensor(said, dtype=torch.float64))
        for index, (applied, kept) in enumerate(((plan, here), (SteeringPlan(), plain))):
            scores_T, same = _scores(model, tokenizer, applied, prompt_ids, ids)
            kept.append(scores_T)
            chosen[index] += same
    server_T, steered_T, plain_T = (torch.cat(parts) for parts in (theirs, here, plain))
    shift_T = steered_T - plain_T
    moved = float(shift_T.square().sum())
    return EndpointCheck(
        prompts=len(prompts),
        tokens=len(server_T),
        expected=_rms(shift_T),
        share=float((shift_T * (server_T - plain_T)).sum()) / moved if moved else math.nan,
        off=_rms(server_T - steered_T),
        off_plain=_rms(server_T - plain_T),
        steered_tokens=chosen[0],
        plain_tokens=chosen[1],
        dtype=str(model.dtype),
    )


def scored_tokens(choices: Sequence[Mapping[str, Any]], vocabulary: int) -> tuple[list[int], list[float]]:
    """Token ids of a completion and their log-probabilities: as vLLM sends them, and as llama.cpp does. ValueError where either
    is missing."""
    choice = choices[0] if len(choices) == 1 else {}
    said = choice.get("logprobs")
    said = said if isinstance(said, dict) else {}
    entries = said.get("content")
    if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
        ids, scores = [entry.get("id") for entry in entries], [entry.get("logprob") for entry in entries]
    else:
        ids, scores = choice.get("token_ids") or [], said.get("token_logprobs") or []
    right = all(type(token) is int and 0 <= token < vocabulary for token in ids)
    if not ids or len(ids) != len(scores) or not right or not all(isinstance(one, int | float) for one in scores):
        raise ValueError(
            f"the server sends no token ids with log-probabilities ({quoted(dict(choice))}): ask one that does, as vLLM and llama.cpp do"
        )
    return ids, [float(one) for one in scores]


def _scores(
    model: Any, tokenizer: Any, plan: SteeringPlan, prompt_ids: list[int], ids: list[int]
) -> tuple[torch.Tensor, int]:
    """Log-probabilities [T] of the tokens after the prompt, float64, and how many of them are the most likely ones."""
    tokens_1S = torch.tensor([prompt_ids + ids], device=model.device)
    with torch.inference_mode():
        with steer(model, plan, tokenizer=tokenizer, prompt_lengths=[len(prompt_ids)], quiet=True):
            logits_TV = model(tokens_1S, use_cache=False).logits[0, len(prompt_ids) - 1 : -1].float().cpu()
    ids_T = torch.tensor(ids)
    scores_T = logits_TV.log_softmax(-1).gather(-1, ids_T[:, None])[:, 0].double()
    return scores_T, int((logits_TV.argmax(-1) == ids_T).sum())


def _rms(values_T: torch.Tensor) -> float:
    return float(values_T.square().mean().sqrt())


def count_served(
    connection: Connection, traces: Sequence[Trace], shape: ModelShape, markers: MarkerSet, **options: Any
) -> RoutingCounts:
    """The counts that ``collect_over_ranks`` takes of these traces, from the routing that a server records while it reads them.

    ValueError for a server that records none.
    """
    return count_routed(
        served_routing(connection, traces, shape), shape, markers, engine="endpoint", coming=traces, **options
    )


def served_routing(connection: Connection, traces: Sequence[Trace], shape: ModelShape) -> Iterator[RoutedTrace]:
    """The routing of every token of each trace: a server reads all of them as a prompt, unsteered, and makes one token more."""
    off = connection.asked(None)
    fixed = {"model": connection.name, "max_tokens": 1, "temperature": 0, "return_token_ids": True}
    bodies = [fixed | {"prompt": list(trace.token_ids)} | (off.fields if off else {}) for trace in traces]
    longest = max((len(trace.token_ids) for trace in traces), default=0)
    most = (1 << 22) + longest * (shape.num_layers * (shape.top_k + 2) * 4 * 2 + 64)
    for trace, reply in zip(traces, connection.server.complete(bodies, most), strict=True):
        (choice,) = reply["choices"] if len(reply["choices"]) == 1 else ({},)
        if choice.get("routed_experts") is None:
            raise ValueError(
                f"the server at {connection.server.base_url} sends no routed_experts: start vLLM with --enable-return-routed-experts, "
                "or count with the model loaded ('moe-steer collect') and give the file (steer_r1.py --counts)"
            )
        read = choice.get("prompt_token_ids", reply.get("prompt_token_ids"))
        if read is not None and read != list(trace.token_ids):
            raise ValueError(f"the server reads trace {trace.trace_id!r} as other tokens than it was sent: {ANOTHER}")
        recorded = decode_array(
            choice["routed_experts"], f"routed_experts of trace {trace.trace_id!r}", np.dtype("<i4")
        )
        yield routed_trace(trace, recorded, shape)
