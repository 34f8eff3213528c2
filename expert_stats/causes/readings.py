"""What is read from a model's logits: the outcomes whose causes are looked for, over the units that they are averaged over.

An outcome is a mean over problems; a problem's value is a weighted sum over the places that its readings name:

    right-wrong   log p(right response) - log p(wrong response): means over the responses of each side
    tokens        log-odds of given next tokens at decision points: mean over the points of a trace, then over traces
    loop          log-odds that a loop goes on: of the token that stood one period earlier, at the places inside the loop
    loss          minus the mean log p of a text's tokens

And the values themselves (``values_of``), with or without a gradient, in bounded memory. The decoder runs once a batch; the head runs
over a bounded number of places at a time, because the logits of a long trace would outweigh all else. With a gradient, the head's
gradient is gathered at the decoder's output first and then taken through the decoder, whose layers are recomputed one by one
(`moe_steer.inside.recomputed`). Weights are frozen: only activations carry a gradient.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expert_stats.trace_counts import problem_of
from moe_steer.contrasts.sequences import batches, check_sequences, padded
from moe_steer.hooks import call_hooks
from moe_steer.inside import recomputed, replaced_output
from moe_steer.layers import decoder, decoder_layers, evaluating, unwrap
from moe_steer.tokens import Trace

OUTCOMES = ("right-wrong", "tokens", "loop", "loss")
HEAD_TOKENS = 2048
"""Places whose logits are held at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One sequence, and what is read from it: the sum over places ``at`` of log p, or log-odds, of a set of next tokens.

    ``problem`` is the unit of resampling. ``tokens``: a set of token ids for each place, all of one size. ``odds``: log p of the
    set minus log p of everything else, instead of log p. ``weight`` multiplies the sum.
    """

    name: str
    problem: str
    token_ids: tuple[int, ...]
    at: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]
    odds: bool
    weight: float

    def __post_init__(self) -> None:
        if (
            not self.at
            or list(self.at) != sorted(set(self.at))
            or not 0 <= self.at[0] <= self.at[-1] < len(self.token_ids)
        ):
            raise ValueError(
                f"{self.name!r} is read at {list(self.at)[:8]}: give ascending places in its {len(self.token_ids)} tokens"
            )
        if len(self.tokens) != len(self.at) or len({len(one) for one in self.tokens}) != 1 or not self.tokens[0]:
            raise ValueError(
                f"{self.name!r} is read at {len(self.at)} places: give as many token sets, all of one size"
            )

    @property
    def needed(self) -> int:
        """Tokens up to the last place; later ones change nothing."""
        return self.at[-1] + 1

    @property
    def pair(self) -> None:
        """Readings share no row."""


def right_against_wrong(right: Iterable[Trace], wrong: Iterable[Trace]) -> list[Reading]:
    """log p(right) - log p(wrong) of the responses to each problem that has both. ValueError when none has."""
    sides: list[dict[str, list[Trace]]] = [defaultdict(list), defaultdict(list)]
    for side, traces in zip(sides, (right, wrong), strict=True):
        for trace in traces:
            if trace.prompt_length and len(trace.token_ids) > trace.prompt_length:
                side[problem_of(trace.trace_id)].append(trace)
    both = sorted(set(sides[0]) & set(sides[1]))
    if not both:
        raise ValueError(
            f"no problem has both a right and a wrong trace ({len(sides[0])} have right ones, {len(sides[1])} wrong ones): "
            "sample several answers a problem"
        )
    found = []
    for problem in both:
        for sign, side, word in ((1.0, sides[0], "right"), (-1.0, sides[1], "wrong")):
            traces = side[problem]
            for trace in traces:
                places = range(trace.prompt_length - 1, len(trace.token_ids) - 1)
                name = f"{trace.trace_id} ({word})"
                found.append(_next_tokens(name, problem, trace.token_ids, places, sign / len(traces)))
    return found


def token_odds(traces: Iterable[Trace], places: Mapping[str, Sequence[int]], tokens: Sequence[int]) -> list[Reading]:
    """Log-odds that one of ``tokens`` comes next, at the given places of each trace (by trace_id). ValueError without any."""
    wanted = tuple(dict.fromkeys(int(token) for token in tokens))
    named = [(trace, tuple(sorted(set(places.get(trace.trace_id, ()))))) for trace in traces]
    return _of_traces([(trace, at, (wanted,) * len(at)) for trace, at in named], "hold no decision point")


def loop_odds(traces: Iterable[Trace], loops: Mapping[str, tuple[int, int]]) -> list[Reading]:
    """Log-odds that a loop goes on. ``loops``: trace_id -> (period, length) of the loop with which the trace ends.

    Read from the end of the loop's first round on: there the next token is the one that stood a period earlier. The last place is
    that of the last token but one. ValueError without any loop.
    """
    rows: list[tuple[Trace, tuple[int, ...], tuple[tuple[int, ...], ...]]] = []
    for trace in traces:
        period, length = loops.get(trace.trace_id, (0, 0))
        size = len(trace.token_ids)
        at = tuple(range(size - length + period - 1, size - 1)) if period else ()
        rows.append((trace, at, tuple((trace.token_ids[place + 1],) for place in at)))
    return _of_traces(rows, "end in no loop")


def text_loss(texts: Mapping[str, Sequence[int]]) -> list[Reading]:
    """Minus the mean log p of each text's tokens but the first; a text is a unit. ValueError for texts of one token."""
    found = []
    for name, ids in texts.items():
        if len(ids) < 2:
            raise ValueError(f"the text {name!r} has {len(ids)} tokens: give texts of at least 2")
        found.append(_next_tokens(name, name, tuple(ids), range(len(ids) - 1), -1.0 / (len(ids) - 1)))
    return found


def _next_tokens(name: str, problem: str, ids: tuple[int, ...], places: range, weight: float) -> Reading:
    tokens = tuple((ids[place + 1],) for place in places)
    return Reading(
        name=name, problem=problem, token_ids=ids, at=tuple(places), tokens=tokens, odds=False, weight=weight
    )


def _of_traces(rows: list[tuple[Trace, tuple[int, ...], tuple[tuple[int, ...], ...]]], nothing: str) -> list[Reading]:
    used = [row for row in rows if row[1]]
    if not used:
        raise ValueError(f"the {len(rows)} traces {nothing}: give others, or another outcome")
    number: dict[str, int] = defaultdict(int)
    for trace, _, _ in used:
        number[problem_of(trace.trace_id)] += 1
    return [
        Reading(
            name=trace.trace_id,
            problem=problem_of(trace.trace_id),
            token_ids=trace.token_ids,
            at=at,
            tokens=tokens,
            odds=True,
            weight=1.0 / len(at) / number[problem_of(trace.trace_id)],
        )
        for trace, at, tokens in used
    ]


def reading_batches(model: Any, readings: Sequence[Reading], tokens_per_batch: int) -> list[list[Reading]]:
    """Readings of about one length together. ValueError for what does not fit the model."""
    if not readings:
        raise ValueError("there is nothing to read an outcome from: give traces or texts")
    check_sequences(model, readings)  # type: ignore[arg-type]
    return list(batches(readings, tokens_per_batch))


def values_of(model: Any, batch: Sequence[Reading], *, backward: bool = False) -> Tensor:
    """Value of each reading [B], float64 on the CPU. ``backward``: also send the gradient of their sum to whatever carries one."""
    inner, body = unwrap(model), decoder(model)
    call = _call(inner, batch)
    values_B = torch.zeros(len(batch), dtype=torch.float64)
    places = [(row, number) for row, item in enumerate(batch) for number in range(len(item.at))]
    _, layers = decoder_layers(model)
    with evaluating(model), torch.set_grad_enabled(backward), recomputed(layers if backward else []):
        output = _decoded(inner, body, call)
        hidden_BSD = output[0]
        if backward and not hidden_BSD.requires_grad:
            raise ValueError(
                "no gradient reaches the output of this model's decoder, its kernels keep none: load it in bfloat16 or float32, from an "
                "unquantised checkpoint"
            )
        leaf_BSD = hidden_BSD.detach().requires_grad_(backward)
        for start in range(0, len(places), HEAD_TOKENS):
            some = places[start : start + HEAD_TOKENS]
            value_N = _read(batch, some, lambda one: _logits(inner, body, call, output, one), leaf_BSD)
            values_B.index_add_(0, torch.tensor([row for row, _ in some]), value_N.detach().double().cpu())
            if backward:
                value_N.sum().backward()  # type: ignore[no-untyped-call]
        if backward:
            hidden_BSD.backward(leaf_BSD.grad)
    return values_B


def decoded(model: Any, batch: Sequence[Reading]) -> Any:
    """The decoder's output, which the head reads; no gradient."""
    inner, body = unwrap(model), decoder(model)
    with evaluating(model), torch.no_grad():
        return _decoded(inner, body, _call(inner, batch))


def divergences(model: Any, batch: Sequence[Reading], before: Any, after: Any) -> Tensor:
    """KL(before || after), of two outputs of ``decoded``, of the next token's distribution, in nats, summed over the places of each reading: [B], float64."""
    inner, body = unwrap(model), decoder(model)
    call, found_B = _call(inner, batch), torch.zeros(len(batch), dtype=torch.float64)
    places = [(row, at) for row, item in enumerate(batch) for at in item.at]
    with evaluating(model), torch.no_grad():
        for start in range(0, len(places), HEAD_TOKENS // 2):
            rows, at = (list(side) for side in zip(*places[start : start + HEAD_TOKENS // 2], strict=True))
            log_p, log_q = (
                _logits(inner, body, call, output, output[0][rows, at]).log_softmax(-1) for output in (before, after)
            )
            value_N = (log_p.exp() * (log_p - log_q)).sum(-1)
            found_B.index_add_(0, torch.tensor(rows), value_N.double().cpu())
    return found_B


def _call(inner: Any, batch: Sequence[Reading]) -> dict[str, Any]:
    return {**padded(batch, inner.get_input_embeddings().weight.device), "use_cache": False}  # type: ignore[arg-type]


def _decoded(inner: Any, body: Any, call: dict[str, Any]) -> Any:
    """The decoder's output. The whole model is called, so that a wrapper prepares the decoder's arguments, and its head sees one
    place only."""
    caught: list[Any] = []
    with call_hooks(body, lambda _: None, lambda _, output: caught.append(output)):
        keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(inner.forward).parameters else {}
        inner(**call, **keep)
    return caught[-1]


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    shown = copy.copy(output)
    shown["last_hidden_state"] = hidden
    return shown


def _logits(inner: Any, body: Any, call: dict[str, Any], output: Any, hidden_ND: Tensor) -> Tensor:
    """Logits [N, V] of hidden states at places of any rows: the model's own head, with what it does to the logits, on one long row."""
    with replaced_output(body, _with_hidden(output, hidden_ND[None])):
        logits_NV: Tensor = inner(**call).logits[0]
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))


def _read(
    batch: Sequence[Reading],
    places: Sequence[tuple[int, int]],
    logits_of: Callable[[Tensor], Tensor],
    hidden_BSD: Tensor,
) -> Tensor:
    """The weighted value at each place (row, number among its places), [N]."""
    device = hidden_BSD.device
    rows_N = torch.tensor([row for row, _ in places], device=device)
    at_N = torch.tensor([batch[row].at[number] for row, number in places], device=device)
    logits_NV = logits_of(hidden_BSD[rows_N, at_N])
    device = logits_NV.device
    # Sets of one row are of one size; those of other rows are filled up with their own first token, which counts once.
    sets = [batch[row].tokens[number] for row, number in places]
    widest = max(map(len, sets))
    tokens_NK = torch.tensor([(*one, *one[:1] * (widest - len(one))) for one in sets], device=device)
    fill_NK = (
        torch.arange(widest, device=device)[None] >= torch.tensor([len(one) for one in sets], device=device)[:, None]
    )
    chosen_N = logits_NV.gather(-1, tokens_NK).masked_fill(fill_NK, -torch.inf).logsumexp(-1)
    odds_N = torch.tensor([batch[row].odds for row, _ in places], device=device)
    # Not from log p: where p is nearly 1, as in a loop, 1 - p would round to 0.
    without_NV = logits_NV.scatter(-1, tokens_NK, -torch.inf)
    rest_N = torch.where(odds_N[:, None], without_NV, logits_NV).logsumexp(-1)
    weights_N = torch.tensor([batch[row].weight for row, _ in places], dtype=logits_NV.dtype, device=device)
    return weights_N * (chosen_N - rest_N)
